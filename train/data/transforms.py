"""timm's training transform for image files, with a faster crop and resize, and seeded draws."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose

from ...backbones.images import MODES, open_image, read_pixels, to_mode
from ...configs.schema import AugmentConfig
from .corruption import Corruption
from .guard import DataError

JPEG_STEP = 2  # libjpeg can decode at 1/2, 1/4 or 1/8 of the size
FAST = ("random", "bilinear", "bicubic")  # interpolations for which PyTorch resizes bytes like Pillow


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's CPU generators inside the block, and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first, second, third = np.random.SeedSequence(seed).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)  # torch.manual_seed would also seed GPUs
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Crop(RandomResizedCropAndInterpolation):
    """timm's random crop, cut before conversion (and possibly before decoding) and resized by PyTorch.

    Draws equal timm's, and so do pixels up to rounding: PyTorch's antialiased resize of bytes follows Pillow's. With
    ``draft`` a JPEG whose crop has at least twice the target size in both directions is decoded at a reduced size (an
    inverse DCT of some of the frequencies), which changes its pixels slightly.
    """

    def __init__(self, *args, channels: int, draft: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.channels, self.draft = channels, draft

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        mode = random.choice(self.interpolation) if isinstance(self.interpolation, tuple) else self.interpolation
        box = (left, top, left + width, top + height)
        if self.draft and min(height / self.size[0], width / self.size[1]) >= JPEG_STEP:
            whole = image.size
            # large enough for the crop to have the target size
            image.draft(None, (-(-whole[0] * self.size[1] // width), -(-whole[1] * self.size[0] // height)))
            ratio = (image.width / whole[0], image.height / whole[1]) * 2
            box = tuple(round(edge * part) for edge, part in zip(box, ratio, strict=True))
        image = to_mode(image.crop(box), self.channels)
        pixels = torch.from_numpy(np.array(image).reshape(1, image.height, image.width, self.channels))
        pixels = F.interpolate(pixels.permute(0, 3, 1, 2), self.size, mode=mode.value, antialias=True)
        array = pixels.permute(0, 2, 3, 1)[0].numpy()
        return Image.fromarray(array if self.channels == 3 else array[..., 0])


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep this number of bits per channel. A magnitude may leave 0, which gives black; timm passes 0 to Pillow, which
    rejects it from version 13 on."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _repair(transform: Callable) -> None:
    """Replace timm's posterize by :func:`posterize`."""
    if isinstance(transform, auto_augment.AugmentOp) and transform.aug_fn is auto_augment.posterize:
        transform.aug_fn = posterize
    nested = getattr(transform, "ops", None) or [op for ops in getattr(transform, "policy", ()) for op in ops]
    for each in nested:
        _repair(each)


class TrainTransform:
    """timm's training transform in two steps, of which only the first reads the file: ``read`` the random crop, then
    ``augment`` it (flips, AutoAugment or colour jitter) to uint8 ``[C, H, W]``; of other than 1 or 3 channels to
    float32 in [0, 255], without changes of colour.

    Args:
        config: of ``augment``.
        decode: ``"timm"``, ``"fast"`` or ``"draft"``, see `Crop`.
        input_size: (C, H, W).
        mean: fill value of AutoAugment, in [0, 1].
    """

    def __init__(self, config: AugmentConfig, decode: str, input_size: Sequence[int], mean: Sequence[float]):
        self.channels = input_size[0]
        coloured = self.channels in MODES
        primary, secondary, final = create_transform(
            tuple(input_size),
            is_training=True,
            use_prefetcher=True,  # returns bytes; normalized on the device
            separate=True,
            scale=tuple(config.scale),
            ratio=tuple(config.ratio),
            hflip=config.hflip,
            vflip=config.vflip,
            color_jitter=config.color_jitter if coloured else None,
            auto_augment=config.auto_augment if coloured else None,
            interpolation=config.interpolation,
            mean=tuple(mean),
        )
        crop, *steps = [*primary.transforms, *secondary.transforms, *final.transforms]
        for step in steps:
            _repair(step)
        self.lazy = coloured and decode != "timm"
        if self.lazy:
            if config.interpolation not in FAST:
                raise DataError(
                    f"augment.interpolation={config.interpolation}: data.decode={decode} has {', '.join(FAST)}; "
                    "data.decode=timm has the others"
                )
            kept = {"scale": crop.scale, "ratio": crop.ratio, "interpolation": config.interpolation}
            crop = Crop(crop.size, **kept, channels=self.channels, draft=decode == "draft")
        self.crop, self.augment = crop, Compose(steps)

    def read(self, file: IO[bytes]) -> Image.Image | torch.Tensor:
        """The random crop of an image file, resized to the input size."""
        return self.crop((open_image if self.lazy else read_pixels)(file, self.channels))


class EvalTransform:
    """timm's evaluation transform in two steps: ``read`` a file, then ``augment`` the image to uint8 ``[C, H, W]``; of
    other than 1 or 3 channels to float32 in [0, 255].

    Args:
        preprocessing: timm's names (input_size, interpolation, crop_pct, crop_mode).
        corruption: applied to the uint8 image.
    """

    def __init__(self, preprocessing: dict, corruption: Corruption | None = None):
        self.channels = preprocessing["input_size"][0]
        kept = ("input_size", "interpolation", "crop_pct", "crop_mode")
        self.augment = create_transform(use_prefetcher=True, **{key: preprocessing[key] for key in kept})
        if corruption is not None:
            self.augment = Compose([self.augment, corruption])

    def read(self, file: IO[bytes]) -> Image.Image | torch.Tensor:
        return read_pixels(file, self.channels)
