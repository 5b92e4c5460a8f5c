"""From an image file to the input of a model."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config

ORIENTATION = 0x0112  # EXIF
MODES = {1: "L", 3: "RGB"}
# Exceptions of Pillow's decoders for damaged, malicious or too large files.
_UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, ArithmeticError, LookupError, EOFError, MemoryError)
_UNREADABLE += (struct.error, NotImplementedError, Image.DecompressionBombError)
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits with 1 (grey) or 3 (RGB) channels.

    16-bit grey is divided by 257, so that 0 .. 65,535 becomes 0 .. 255 (``Image.convert`` alone would clip at 255).
    Transparency is composited over black.

    Raises:
        ValueError: another number of channels, or 32-bit integer or float pixels, whose range is unknown.
    """
    if channels not in MODES:
        raise ValueError(f"the model takes {channels} channels; image files have 1 or 3")
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


def read_upright(path: str | Path, channels: int) -> Image.Image:
    """Open an image, apply its EXIF orientation and convert it by `to_mode`.

    Raises:
        ValueError: as `to_mode`. Pillow's errors for missing or damaged files are not caught.
    """
    with Image.open(path) as image:
        return to_mode(upright(image), channels)


def read_image(path: str | Path, channels: int) -> Image.Image:
    """Open an image, upright, with 1 (grey) or 3 (RGB) channels.

    Raises:
        ValueError: if the model takes another number of channels.
        OSError: if the file is missing or is not an image; the message names it.
    """
    if channels not in (1, 3):
        raise ValueError(f"the model takes {channels} channels; image files have 1 or 3")
    try:
        return read_upright(path, channels)
    except FileNotFoundError as error:
        raise OSError(f"{path}: no such file") from error
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
