"""Mask2Former (Cheng et al., arXiv 2112.01527) for semantic segmentation."""

from contextlib import nullcontext
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
        masks = resize(masks, images.shape[-2:])[..., :rows, :columns].sigmoid()
        shares = classes.softmax(-1)[..., :-1]
        kind = images.device.type
        # in float32, to separate classes of similar scores; a traced graph must not contain the context
        exact = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with exact:
            scores = torch.einsum("bqc,bqhw->bchw", shares, masks)
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()

    def normalizers(self, targets: Tensor) -> Tensor:
        """What each of the losses of a batch is divided by."""
        return normalizers(self.head, _classes(targets))


def _classes(targets: Tensor) -> list[Tensor]:
    """The classes that occur, of each image."""
    return [found[found != IGNORE] for found in (image.unique() for image in targets)]
