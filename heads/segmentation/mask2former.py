"""Mask2Former (Cheng et al., arXiv 2112.01527) for semantic segmentation."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..mask2former import decoder, losses, normalizers, query_outputs
from .layers import resize
from .segmenter import SegmentationModel

IGNORE = 255  # target of a pixel without a class


class Mask2Former(SegmentationModel):
    """Each query predicts a class and a mask; in training queries are matched to the classes of an image.

    Args:
        backbone: with maps at strides 4, 8, 16, 32, without a neck.
        num_classes: without "no object", which the queries predict too.
        image: arguments of `SegmentationModel`.
        a3fpn: see `heads.mask2former.decoder`.
        settings: of transformers' ``Mask2FormerConfig``: ``num_queries``, ``feature_size``, ``encoder_layers``, ...

    Raises:
        ImportError: transformers is not installed.
        ValueError: other strides, or settings unknown to transformers or A3-FPN.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        image: dict[str, Any],
        *,
        a3fpn: dict[str, Any] | None = None,
        **settings: Any,
    ):
        super().__init__(backbone, **image)
        self.head = decoder(backbone, num_classes, settings, a3fpn)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        """Float images ``[B, C, H, W]`` in [0, 1] to log scores ``[B, classes, H, W]``, whose softmax is each class's
        share (the sum over queries of class probability times mask, as published, divided by that of all classes); with
        ``targets``, int64 ``[B, H, W]`` and `IGNORE` where there is no class, to a mapping of losses."""
        rows, columns = images.shape[-2:]
        images = self.pad((images - self.mean) / self.std)
        if targets is not None:
            classes = _classes(targets)
            masks = [image == found[:, None, None] for image, found in zip(targets, classes, strict=True)]
            return losses(self.head, images, [self.pad(mask) for mask in masks], classes)
        classes, masks = (layers[-1] for layers in query_outputs(self.head, images))
        return _scores(classes, resize(masks, images.shape[-2:])[..., :rows, :columns])

    def coarse(self, images: Tensor) -> tuple[Tensor, tuple[int, int], Callable[[Tensor], Tensor]]:
        """As of `Segmenter`: the mask logits ``[B, queries, h, w]``, which become scores once they are resized."""
        images = self.pad((images - self.mean) / self.std)
        classes, masks = (layers[-1] for layers in query_outputs(self.head, images))
        return masks, (images.shape[-2], images.shape[-1]), partial(_scores, classes)

    def normalizers(self, targets: Tensor) -> Tensor:
        """What each of the losses of a batch is divided by."""
        return normalizers(self.head, _classes(targets))


def _scores(classes: Tensor, masks: Tensor) -> Tensor:
    """Log scores ``[B, classes, H, W]`` from class logits ``[B, queries, classes + 1]`` and mask logits
    ``[B, queries, H, W]``."""
    shares, masks = classes.softmax(-1)[..., :-1], masks.sigmoid()
    kind = masks.device.type
    # in float32, to separate classes of similar scores; a traced graph must not contain the context
    exact = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with exact:
        scores = torch.einsum("bqc,bqhw->bchw", shares, masks)
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()


def _classes(targets: Tensor) -> list[Tensor]:
    """The classes that occur, of each image."""
    return [found[found != IGNORE] for found in (image.unique() for image in targets)]
