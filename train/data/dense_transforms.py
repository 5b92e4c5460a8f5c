"""Augmentation of images with boxes or masks, for detection and segmentation: torchvision's v2 transforms and others.

A transform takes a dictionary with ``image`` and ``boxes``, ``labels``, ``masks`` or ``mask`` as tv_tensors, and only
uses PyTorch's CPU generator.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import mask as run_lengths
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ...configs.schema import DetectAugmentConfig, SegmentAugmentConfig
from ...heads.segmentation.inference import rescale_size
from .guard import DataError

IGNORE = 255  # a pixel without a class


class SemanticMask(tv_tensors.Mask):
    """A mask that is resized with ``nearest-exact``, aligned with its image.

    torchvision's own class, used for instances, resizes with ``nearest`` and shifts by up to half a pixel. Its Mask
    R-CNN compensates for that: with aligned masks, `detect/digits` loses 12 points of mask AP.
    """


@F.register_kernel(F.resize, SemanticMask)
def _resize_mask(mask: SemanticMask, size: list[int], max_size: int | None = None, **_: Any) -> SemanticMask:
    pixels = mask.as_subclass(torch.Tensor)
    pixels = pixels if mask.ndim > 2 else pixels[None]  # [N, H, W]
    resized = F.resize_image(pixels, size, v2.InterpolationMode.NEAREST_EXACT, max_size)
    return tv_tensors.wrap(resized.reshape(*mask.shape[:-2], *resized.shape[-2:]), like=mask)


class LazyMasks(tv_tensors.TVTensor):
    """Masks of N objects as run lengths, of which flips, crops and nearest resizing only move the rows and columns.
    `decode` returns the pixels that the transforms of a `Mask` return, exactly, without N masks of the image's size.

    The tensor holds the numbers of the objects, int64 ``[N]``.

    Attributes:
        codes: of all objects, COCO's compressed run lengths.
        rows, columns: int64, the pixels of the image that are taken.
    """

    codes: Sequence[dict[str, Any]]
    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, codes: Sequence[dict[str, Any]], height: int, width: int) -> "LazyMasks":
        return torch.arange(len(codes)).as_subclass(cls)._with(codes, torch.arange(height), torch.arange(width))

    def _with(self, codes: Sequence[dict[str, Any]], rows: torch.Tensor, columns: torch.Tensor) -> "LazyMasks":
        self.codes, self.rows, self.columns = codes, rows, columns
        return self

    def moved(self, rows: torch.Tensor, columns: torch.Tensor) -> "LazyMasks":
        return self.as_subclass(torch.Tensor).as_subclass(LazyMasks)._with(self.codes, rows, columns)

    def __getitem__(self, keep: Any) -> "LazyMasks":
        kept = self.as_subclass(torch.Tensor)[keep]
        return kept.as_subclass(LazyMasks)._with(self.codes, self.rows, self.columns)

    def decode(self) -> torch.Tensor:
        """uint8 ``[N, rows, columns]``."""
        masks = np.empty((len(self), len(self.rows), len(self.columns)), np.uint8)
        place = np.ix_(self.rows.numpy(), self.columns.numpy())
        for mask, number in zip(masks, self.tolist(), strict=True):
            mask[:] = run_lengths.decode(self.codes[number])[place]
        return torch.from_numpy(masks)


@F.register_kernel(F.resize, LazyMasks)
def _resize_lazy(masks: LazyMasks, size: list[int], **_: Any) -> LazyMasks:
    height, width = size
    # as an image of one column and of one row, by the rule for masks
    rows = F.resize_mask(masks.rows.float().view(1, -1, 1), [height, 1]).view(-1).long()
    columns = F.resize_mask(masks.columns.float().view(1, 1, -1), [1, width]).view(-1).long()
    return masks.moved(rows, columns)


@F.register_kernel(F.crop, LazyMasks)
def _crop_lazy(masks: LazyMasks, top: int, left: int, height: int, width: int) -> LazyMasks:
    return masks.moved(masks.rows[top : top + height], masks.columns[left : left + width])


@F.register_kernel(F.horizontal_flip, LazyMasks)
def _flip_lazy(masks: LazyMasks) -> LazyMasks:
    return masks.moved(masks.rows, masks.columns.flip(0))


@F.register_kernel(F.vertical_flip, LazyMasks)
def _vertical_flip_lazy(masks: LazyMasks) -> LazyMasks:
    return masks.moved(masks.rows.flip(0), masks.columns)


def _of_boxes(sample: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What is removed with a box."""
    return tuple(sample[key] for key in ("labels", "masks") if key in sample)


class RandomScale(v2.Transform):
    """Resize by a random factor of a base size.

    Args:
        base: limits of the long and the short side, the aspect ratio is kept; None: the image's size.
        ratio: minimum and maximum factor.
    """

    def __init__(self, base: Sequence[int] | None, ratio: Sequence[float], antialias: bool):
        super().__init__()
        self.base, self.ratio, self.antialias = base, ratio, antialias

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = self.ratio[0] + float(torch.rand(())) * (self.ratio[1] - self.ratio[0])
        return {"size": list(rescale_size(v2.query_size(flat_inputs), self.base, factor))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, params["size"], antialias=self.antialias)


class RandomCrop(v2.Transform):
    """A random crop of ``size`` (rows, columns), or less if the image is smaller."""

    def __init__(self, size: Sequence[int]):
        super().__init__()
        self.size = size

    def draw_size(self, size: Sequence[int]) -> list[int]:
        """Rows and columns of the crop for an image of ``size``."""
        return [min(most, side) for most, side in zip(self.size, size, strict=True)]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        size = v2.query_size(flat_inputs)
        rows, columns = self.draw_size(size)
        top, left = (int(torch.randint(s - c + 1, ())) for s, c in zip(size, (rows, columns), strict=True))
        return {"top": top, "left": left, "height": rows, "width": columns}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class RandomSizeCrop(RandomCrop):
    """A crop with independent random sides between two lengths, limited by the image (DETR, arXiv 2005.12872, appendix
    A.4)."""

    def draw_size(self, size: Sequence[int]) -> list[int]:
        least, most = self.size
        return [int(torch.randint(min(least, side), min(most, side) + 1, ())) for side in size]


class BalancedCrop(RandomCrop):
    """A random crop in which no class covers ``max_ratio`` of the labelled pixels, or the tenth attempt."""

    def __init__(self, size: Sequence[int], max_ratio: float):
        super().__init__(size)
        self.max_ratio = max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        mask = next(each for each in flat_inputs if isinstance(each, tv_tensors.Mask))
        for _ in range(10):
            params = super().make_params(flat_inputs)
            if self.max_ratio >= 1:
                break
            counts = torch.bincount(self.transform(mask, params).flatten().long(), minlength=IGNORE + 1)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.max_ratio * counts.sum():
                break
        return params


class PadTo(v2.Transform):
    """Pad at the bottom and the right to a size: images with ``fill`` (0..255 per channel), masks with 255."""

    def __init__(self, size: Sequence[int], fill: Sequence[float]):
        super().__init__()
        self.size, self.fill = size, list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        rows, columns = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(self.size[1] - columns, 0), max(self.size[0] - rows, 0)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = IGNORE if isinstance(inpt, tv_tensors.Mask) else self.fill
        return self._call_kernel(F.pad, inpt, params["padding"], fill=fill)


class PhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's photometric distortion of SSD (arXiv 1512.02325) without channel permutation, with the hue range of
    segmentation recipes."""

    def __init__(self):
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


def detection_transform(config: DetectAugmentConfig, coloured: bool = True) -> v2.Transform:
    """Flip, then resize: to a random size, with ``crop_prob`` resize, crop and resize again, or with ``scale_jitter``
    large-scale jittering (arXiv 2012.07177); then the final crop and photometric distortion. Images smaller than the
    crop are padded in their batch. Resizing is not antialiased, as in the detectors' evaluation.

    Args:
        coloured: False: images have other channels than grey or RGB, which are not distorted.

    Raises:
        DataError: inconsistent sizes.
    """
    last: list[v2.Transform] = [RandomCrop(config.final_crop_size)] if config.final_crop_size is not None else []
    if config.photometric and coloured:
        last.append(PhotometricDistort())
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(config.hflip),
            v2.RandomVerticalFlip(config.vflip),
            _detection_resize(config),
            *last,
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1.0, labels_getter=_of_boxes),  # boxes that the crop has removed
        ]
    )


def _detection_resize(config: DetectAugmentConfig) -> v2.Transform:
    sizes = config.min_size
    if not sizes or (config.crop_prob and not config.crop_min_size):
        raise DataError("augment.min_size and augment.crop_min_size need a length at least")
    if config.sampling == "range":
        if len(sizes) != 2 or sizes[0] > sizes[1]:
            raise DataError(f"augment.min_size={sizes}: sampling=range takes the least and the largest")
        sizes = list(range(sizes[0], sizes[1] + 1))
    if config.crop_size[0] > config.crop_size[1]:
        raise DataError(f"augment.crop_size={config.crop_size}: the least side, then the largest")
    if config.scale_jitter is not None:
        if config.final_crop_size is None or config.crop_prob or config.scale_jitter[0] > config.scale_jitter[1]:
            raise DataError(
                f"augment.scale_jitter={config.scale_jitter} is the least factor and the largest, of "
                f"augment.final_crop_size={config.final_crop_size}, without augment.crop_prob={config.crop_prob}"
            )
        rows, columns = config.final_crop_size
        least, most = config.scale_jitter
        return v2.ScaleJitter((columns, rows), (least, most), antialias=False)  # its target is (width, height)
    resize = v2.RandomShortestSize(sizes, config.max_size, antialias=False)
    if not config.crop_prob:
        return resize
    first = v2.RandomShortestSize(config.crop_min_size, antialias=False)
    cropped = v2.Compose([first, RandomSizeCrop(config.crop_size), resize])
    return v2.RandomChoice([resize, cropped], p=[1 - config.crop_prob, config.crop_prob])


def segmentation_transform(
    config: SegmentAugmentConfig, fill: Sequence[float], antialias: bool, coloured: bool = True
) -> v2.Transform:
    """Random resize, crop, flip and photometric distortion, then padding to the size of the crop.

    Args:
        fill: padding per channel, 0..255; the mask is padded with 255.
        coloured: see `detection_transform`.
    """
    return v2.Compose(
        [
            RandomScale(config.scale, config.ratio_range, antialias),
            BalancedCrop(config.crop_size, config.cat_max_ratio),
            v2.RandomHorizontalFlip(config.hflip),
            *([PhotometricDistort()] if config.photometric and coloured else []),
            PadTo(config.crop_size, fill),
        ]
    )
