"""From an image file to the input of a model."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config

ORIENTATION = 0x0112  # EXIF
MODES = {1: "L", 3: "RGB"}
# Exceptions of Pillow's decoders for damaged, malicious or too large files.
_UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, ArithmeticError, LookupError, EOFError, MemoryError)
_UNREADABLE += (struct.error, NotImplementedError, Image.DecompressionBombError)
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# factors to [0, 255]; the range of other types is unknown
_UNITS = {"uint8": 1.0, "uint16": 1 / 257, "int16": 1 / 257, "float16": 255.0, "float32": 255.0, "float64": 255.0}


class ChannelError(ValueError):
    """An image has another number of channels than requested."""

    def __init__(self, found: int, channels: int):
        super().__init__(f"has {found} channel{'s' * (found != 1)}, not {channels}")
        self.found = found


def image_suffixes() -> set[str]:
    """Suffixes of readable images: those of Pillow, and ``.npy``."""
    known = Image.registered_extensions()
    found = {suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in ("PDF", "MPEG", "HDF5")}
    return found | {".npy"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one that a system or tool adds to folders of images."""
    return name.startswith((".", "__MACOSX")) or name.lower() in ("thumbs.db", "desktop.ini")


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits with 1 (grey) or 3 (RGB) channels.

    16-bit grey is divided by 257, so that 0 .. 65,535 becomes 0 .. 255 (``Image.convert`` alone would clip at 255).
    Transparency is composited over black.

    Raises:
        ChannelError: another number of channels.
        ValueError: 32-bit integer or float pixels, whose range is unknown.
    """
    if channels not in MODES:
        raise ChannelError(len(image.getbands()), channels)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(f"pixels are {kind} (mode {image.mode}), whose range is not known; save 8 or 16 bits")
    if image.mode in _SIXTEEN:
        values = image.convert("I")  # the only mode with a conversion from every byte order
        # point() on mode I takes only value * scale + offset and truncates: half a step rounds to the nearest
        image = values.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(MODES[channels])


def upright(image: Image.Image) -> Image.Image:
    """The image rotated by its EXIF orientation; the same object, not decoded yet, where the tag changes nothing."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) in range(2, 9) else image


def open_image(file: IO[bytes], channels: int) -> Image.Image | torch.Tensor:
    """Opens an image, upright.

    For 1 or 3 channels, returns Pillow's image, usually not decoded yet, for `to_mode`. For other numbers, which the
    file must have (.npy ``[H, W, C]``, TIFF, RGBA), returns float32 ``[C, H, W]`` in [0, 255]: 16-bit values are
    divided by 257, floats multiplied by 255, without clipping.

    Raises:
        ChannelError: another number of channels; more than 4 are not converted to 1 or 3.
        ImportError: a TIFF that needs tifffile.
        ValueError: an unsupported type, NaN, or a damaged array. Pillow's errors for damaged files are not caught.
    """
    kind = _kind(file)
    if kind != "npy" and (kind != "tiff" or channels in MODES):
        try:
            return _open_pillow(file, channels)
        except UnidentifiedImageError:
            if kind != "tiff":
                raise
    pixels = _read_npy(file) if kind == "npy" else _read_tiff(file)
    if pixels.shape[-1] not in (MODES if channels in MODES else (channels,)):
        raise ChannelError(pixels.shape[-1], channels)
    if channels not in MODES:
        return _to_tensor(pixels)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels are {pixels.dtype}, whose range is not known; save 8 or 16 bits")
    if pixels.dtype == np.uint16:
        pixels = (pixels * (1 / 257) + 0.5).astype(np.uint8)
    return Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])


def image_shape(path: str | Path, channels: int = 3) -> tuple[int, int, int]:
    """Rows, columns and channels of an image file, upright, from its header.

    Args:
        channels: as for `open_image`; alpha does not count for 1 or 3.

    Raises:
        as `open_image`, except ChannelError.
    """
    with open(path, "rb") as file:
        kind = _kind(file)
        if kind == "npy":
            return _npy_header(file)[0]
        try:
            if kind == "tiff" and channels not in MODES:
                raise UnidentifiedImageError
            with Image.open(file) as image:
                found = len(image.getbands()) if image.mode != "P" else 3
                if channels in MODES:
                    found = _samples(image) if _samples(image) > 4 else 1 if image.mode[0] in "1LIF" else 3
                shape, turned = (image.height, image.width, found), image.getexif().get(ORIENTATION, 1) >= 5
        except UnidentifiedImageError:
            if kind != "tiff":
                raise
            series = _open_tiff(file)
            shape, turned = _tiff_shape(series), series.keyframe.tags.valueof("Orientation", 1) >= 5
    return (shape[1], shape[0], shape[2]) if turned else shape


def kept_suffix(file: IO[bytes]) -> str:
    """``npy`` or ``tif`` for files with more channels than Pillow reads, else an empty string."""
    kind = _kind(file)
    if kind != "tiff":
        return kind
    try:
        with Image.open(file) as image:
            return "tif" if _samples(image) > len(image.getbands()) else ""
    except UnidentifiedImageError:
        return "tif"
    finally:
        file.seek(0)


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Converts an image ``[H, W, C]`` to three channels for drawing. With other than 1 or 3 channels, takes the first
    three, scaled to their maximum."""
    if image.shape[-1] in MODES:
        return image.repeat(3, -1) if image.shape[-1] == 1 else image
    shown = image[..., [0, 1, min(2, image.shape[-1] - 1)]].astype(np.float32)
    shown = (shown / max(float(shown.max()), 1e-6)).clip(0, 1)
    return (255 * shown).round().astype(np.uint8) if image.dtype == np.uint8 else shown


@contextmanager
def _damaged(kind: str) -> Iterator[None]:
    """Converts the readers' errors for damaged files to ValueError."""
    try:
        yield
    except (*_UNREADABLE, zlib.error, TokenError) as error:
        raise ValueError(f"not {kind}: {error or type(error).__name__}") from error


def _kind(file: IO[bytes]) -> str:
    start = file.read(8)
    file.seek(0)
    return "npy" if start.startswith(b"\x93NUMPY") else "tiff" if start.startswith(_TIFF) else ""


def _samples(image: Image.Image) -> int:
    """Samples per pixel of a TIFF, some of which Pillow drops; 1 for other formats."""
    return getattr(image, "tag_v2", {}).get(277, 1)


def _open_pillow(file: IO[bytes], channels: int) -> Image.Image | torch.Tensor:
    image = Image.open(file)
    if _samples(image) > 4:
        raise ChannelError(_samples(image), channels)
    if channels in MODES:
        return upright(image)
    if len(image.getbands()) != channels:
        raise ChannelError(3 if image.mode == "P" else len(image.getbands()), channels)
    return _to_tensor(np.asarray(upright(image)))


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    if pixels.dtype.name not in _UNITS:
        raise ValueError(f"pixels are {pixels.dtype}, whose range is not known; save 8 or 16 bits, or floats")
    scaled = pixels.transpose(2, 0, 1).astype(np.float32) * np.float32(_UNITS[pixels.dtype.name])
    if not np.isfinite(scaled).all():
        raise ValueError("pixels are NaN or infinite")
    return torch.from_numpy(scaled)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape and type of an array; checks that it has two or three axes and is not truncated."""
    with _damaged("a readable array"):
        read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"an array of shape {shape}; images are (H, W, C) or (H, W)")
    place = file.tell()
    if dtype.hasobject or file.seek(0, 2) - place < math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the file is too short for an array of shape {shape} and type {dtype}")
    return (shape[0], shape[1], shape[2] if len(shape) == 3 else 1), dtype


def _read_npy(file: IO[bytes]) -> np.ndarray:
    shape, _ = _npy_header(file)
    file.seek(0)
    return np.load(file, allow_pickle=False).reshape(shape)


def _open_tiff(file: IO[bytes]) -> Any:
    """The first series of a TIFF, perhaps of several pages."""
    try:
        import tifffile
    except ModuleNotFoundError:
        raise ImportError("a TIFF of several channels needs tifffile: pip install 'foveal[tiff]'") from None
    file.seek(0)
    with _damaged("a readable TIFF"):
        series = tifffile.TiffFile(file, name="image.tif").series[0]  # the path of the file may be bytes
        rows, columns, _ = _tiff_shape(series)
    if Image.MAX_IMAGE_PIXELS is not None and rows * columns > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{rows:,} x {columns:,} pixels")
    return series


def _tiff_shape(series: Any) -> tuple[int, int, int]:
    if len(series.axes) > 3 or any(series.axes.count(axis) != 1 for axis in "YX"):
        raise ValueError(f"axes {series.axes} of shape {series.shape}; images have rows, columns and channels")
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return sizes["Y"], sizes["X"], math.prod(series.shape) // (sizes["Y"] * sizes["X"])


def _read_tiff(file: IO[bytes]) -> np.ndarray:
    series = _open_tiff(file)
    order = sorted(range(len(series.axes)), key=lambda axis: "YX".find(series.axes[axis]) % 3)
    with _damaged("a readable TIFF"):
        pixels = series.asarray().transpose(order).reshape(_tiff_shape(series))
    turned = series.keyframe.tags.valueof("Orientation", 1)
    if turned >= 5:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if turned in (3, 4, 7, 8) else 1, :: -1 if turned in (2, 3, 6, 7) else 1]


def read_pixels(file: IO[bytes], channels: int) -> Image.Image | torch.Tensor:
    """As `open_image`, decoded, and with 1 or 3 channels converted by `to_mode`."""
    image = open_image(file, channels)
    return to_mode(image, channels) if isinstance(image, Image.Image) else image


def read_image(path: str | Path, channels: int) -> Image.Image | torch.Tensor:
    """Open an image, upright: with 1 (grey) or 3 (RGB) channels as Pillow's image of 8 bits, with others as float32
    ``[C, H, W]`` in [0, 1], where 1 is the largest value of 8 or 16 bits.

    Raises:
        OSError: if the file is missing, is not an image or has other channels; the message names it.
        ImportError: a TIFF that needs tifffile.
    """
    try:
        with open(path, "rb") as file:
            image = read_pixels(file, channels)
        return image / 255 if isinstance(image, torch.Tensor) else image
    except FileNotFoundError as error:
        raise OSError(f"{path}: no such file") from error
    except ChannelError as error:
        raise OSError(f"{path} {error}") from error
    except _UNREADABLE as error:
        raise OSError(f"{path}: not a readable image: {error or type(error).__name__}") from error


def label_names(model: Any) -> list[str] | None:
    """Class names that come with a classifier's weights, by index; timm also has them by number."""
    names = model.pretrained_cfg.get("label_names")
    if isinstance(names, dict):
        names = [name for _, name in sorted((int(index), name) for index, name in names.items())]
    return list(names) if names else None


def preprocessing(model: Any) -> Any:
    """Evaluation transform of a model from its ``pretrained_cfg``: PIL image to ``[C, H, W]`` tensor."""
    return create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg), is_training=False)


def class_labels(model: Any, source: str | Path) -> list[str] | None:
    """The names that came with the weights, else timm's of the ImageNet that the classifier has the size of."""
    names = label_names(model)
    if names is not None:
        if len(names) != model.num_classes:
            raise ValueError(f"{source} has {len(names)} label_names for {model.num_classes} classes")
        return names
    subset = infer_imagenet_subset(model)
    if not subset:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(model.num_classes)]
