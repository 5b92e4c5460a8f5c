"""A semantic segmenter: images of any size in, logits of the same size out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone
from ..dense import DenseModel
from ..necks import build_neck
from .layers import FCN, Linear, resize
from .semantic_fpn import SemanticFPN
from .upernet import UPerNet


class SegmentationModel(DenseModel):
    """Base class of `Segmenter` and `Mask2Former`: normalization and padding.

    Args:
        mean, std: per channel, of values in [0, 1].
        size_divisor: images are padded with the mean, right and bottom, to multiples of it, and the logits cropped.
            1: no padding; a backbone with patches or windows may then reject or crop an image.
    """

    task = "segment"
    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, *, mean: Sequence[float], std: Sequence[float], size_divisor: int = 32):
        super().__init__()
        self.backbone, self.size_divisor = backbone, size_divisor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def pad(self, x: Tensor) -> Tensor:
        """Pad ``[..., H, W]`` with zeros, right and bottom, to multiples of ``size_divisor``."""
        rows, columns = x.shape[-2:]
        return F.pad(x, (0, -columns % self.size_divisor, 0, -rows % self.size_divisor))


class Segmenter(SegmentationModel):
    """A backbone, a head, and optionally an auxiliary head for training.

    Args:
        backbone: without a neck.
        head, auxiliary: list of maps to logits; the auxiliary head is used in training only.
        kwargs: of `SegmentationModel`.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, auxiliary: nn.Module | None = None, **kwargs: Any):
        super().__init__(backbone, **kwargs)
        self.head, self.auxiliary = head, auxiliary

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Float images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes, H, W]``; in training with an auxiliary head
        to a pair of logits, the auxiliary head's second."""
        rows, columns = images.shape[-2:]
        images, maps = self._maps(images)
        logits = self._crop(self.head(maps), images, rows, columns)
        if self.auxiliary is None or not self.training:
            return logits
        return logits, self._crop(self.auxiliary(maps), images, rows, columns)

    def coarse(self, images: Tensor) -> tuple[Tensor, tuple[int, int], Callable[[Tensor], Tensor]]:
        """The maps ``[B, channels, h, w]`` before they are resized, the size to resize them to, of the padded images,
        and what turns any resized rows and columns of them into logits: the maps are the logits here."""
        images, maps = self._maps(images)
        return self.head(maps), (images.shape[-2], images.shape[-1]), lambda logits: logits

    def _maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        images = self.pad((images - self.mean) / self.std)
        return images, list(self.backbone(images).values())

    @staticmethod
    def _crop(logits: Tensor, images: Tensor, rows: int, columns: int) -> Tensor:
        return resize(logits, images.shape[-2:])[..., :rows, :columns]


def upernet(
    backbone: Backbone,
    num_classes: int,
    image: dict[str, Any],
    *,
    neck: str = "fpn",
    neck_kwargs: dict[str, Any],
    auxiliary: bool = True,
    auxiliary_kwargs: dict[str, Any],
    **kwargs: Any,
) -> Segmenter:
    """UPerNet; ``neck="fpn"`` is its own top-down path. ``auxiliary``: add an FCN head. ``kwargs``: of `UPerNet`."""
    spec, make = backbone.spec, None
    if neck != "fpn":
        own: dict[str, Any] = {"out_channels": kwargs.get("channels", 512)}
        if neck == "a3fpn":  # as in the released segmenter; its last map has the channels of the pooling
            own |= dict(direction="bottom_up", updated_first=True)
            own["squeeze"] = [*(min(2**i, 4) for i in range(len(spec) - 1)), 1]
        make = lambda pooled: build_neck(neck, pooled, **own | neck_kwargs)  # noqa: E731
    elif neck_kwargs:
        raise ValueError(f"the top-down path of upernet takes no neck_kwargs, got {neck_kwargs}")
    head = UPerNet(spec, num_classes, neck=make, **kwargs)
    if not auxiliary:
        return Segmenter(backbone, head, **image)
    level = auxiliary_kwargs.get("level", 2)
    if not 0 <= level < len(spec):
        raise ValueError(f"auxiliary_kwargs: level must be one of {len(spec)} maps from 0 on, got {level}")
    return Segmenter(backbone, head, FCN(spec.channels[level], num_classes, **auxiliary_kwargs), **image)


def semantic_fpn(
    backbone: Backbone,
    num_classes: int,
    image: dict[str, Any],
    *,
    neck: str = "fpn",
    neck_kwargs: dict[str, Any],
    auxiliary: bool = False,
    auxiliary_kwargs: dict[str, Any],
    **kwargs: Any,
) -> Segmenter:
    """Semantic FPN, without an auxiliary head; ``kwargs``: of `SemanticFPN`."""
    return Segmenter(
        backbone, SemanticFPN(build_neck(neck, backbone.spec, **neck_kwargs), num_classes, **kwargs), **image
    )


def linear(
    backbone: Backbone, num_classes: int, image: dict[str, Any], *, dropout: float = 0.0, **no: Any
) -> Segmenter:
    """A linear classifier of every position of the finest map, without neck and auxiliary head; see `Linear`."""
    if (no["neck"], no["neck_kwargs"]) != ("fpn", {}):  # the default of every head
        raise ValueError(f"the linear head has no neck, got {no['neck']!r} with {no['neck_kwargs']}")
    if unknown := no.keys() - {"neck", "neck_kwargs", "auxiliary", "auxiliary_kwargs"}:
        raise TypeError(f"unknown {', '.join(sorted(unknown))}")
    return Segmenter(backbone, Linear(backbone.spec.channels[0], num_classes, dropout=dropout), **image)
