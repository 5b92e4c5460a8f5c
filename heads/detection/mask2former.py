"""Mask2Former (Cheng et al., arXiv 2112.01527) for instance segmentation: each query is an object or none; its box is
the bounding box of its mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..backbone import Backbone
from ..mask2former import decoder, losses, normalizers, query_outputs

Size = Sequence[int]  # rows, columns


class InstanceMask2Former(nn.Module):
    """transformers' Mask2Former with the interface of torchvision's detectors; classes are numbered from 0.

    Args:
        backbone: with maps at strides 4, 8, 16, 32 and no neck.
        transform: arguments of torchvision's ``GeneralizedRCNNTransform``.
        a3fpn: see `heads.mask2former.decoder`.
        detections_per_img: maximum number of detections, pairs of a query and a class.
        score_thresh: minimum score; a mask without a pixel has the score 0.
        settings: of transformers' ``Mask2FormerConfig``, whose defaults are the published ones: ``num_queries`` (100),
            ``class_weight`` (2), ``mask_weight`` (5), ``dice_weight`` (5), ``no_object_weight`` (0.1),
            ``train_num_points`` (12,544), ``decoder_layers`` (10: nine, and the queries themselves), ...

    Raises:
        ImportError: transformers is not installed.
        ValueError: other strides, settings unknown to transformers or A3-FPN, or fewer than one detection.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        transform: dict[str, Any],
        *,
        a3fpn: dict[str, Any] | None = None,
        detections_per_img: int = 100,
        score_thresh: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if detections_per_img < 1:
            raise ValueError(f"detections_per_img must be at least 1, got {detections_per_img}")
        self.transform = GeneralizedRCNNTransform(**transform)
        self.backbone = backbone
        self.head = decoder(backbone, num_classes, settings, a3fpn)
        self.detections_per_img, self.score_thresh = detections_per_img, score_thresh

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """As `Detector`; objects with an empty mask, for example after a crop, are ignored in training."""
        if self.training and (targets is None or any("masks" not in target for target in targets)):
            raise ValueError("mask2former needs targets with masks in training")
        sizes = [image.shape[-2:] for image in images]
        batch, targets = self.transform(images, targets if self.training else None)
        if self.training:
            masks, labels = zip(*(_objects(each, batch.tensors.shape[-2:]) for each in targets), strict=True)
            return losses(self.head, batch.tensors, masks, labels)
        classes, masks = (layers[-1] for layers in query_outputs(self.head, batch.tensors))
        padded, seen = batch.tensors.shape[-2:], batch.image_sizes
        limits = self.detections_per_img, self.score_thresh
        each = zip(classes, masks, seen, sizes, strict=True)
        return [instances(logits, own, padded, inner, size, *limits) for logits, own, inner, size in each]

    def normalizers(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """What each of the losses of a batch is divided by."""
        if not self.training:  # `forward` resizes the masks, and small ones may vanish
            _, targets = self.transform(images, targets)
        return normalizers(self.head, [each["labels"][each["masks"].bool().flatten(1).any(1)] for each in targets])


def _objects(target: dict[str, Tensor], size: Size) -> tuple[Tensor, Tensor]:
    """Masks, in the size of the batch, and labels of the objects that have a pixel."""
    masks = target["masks"]
    keep = masks.bool().flatten(1).any(1)
    padding = (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2])
    return F.pad(masks[keep], padding), target["labels"][keep]


def instances(
    classes: Tensor, masks: Tensor, padded: Size, seen: Size, size: Size, limit: int, threshold: float = 0.0
) -> dict[str, Tensor]:
    """The detected objects of one image (post-processing of the paper's section 4.1).

    The top pairs of a query and a class (without "no object"). The score is the class probability times the mean mask
    probability over the pixels above 0.5.

    Args:
        classes, masks: logits ``[queries, classes + 1]``, "no object" last, and ``[queries, h, w]``.
        padded, seen, size: rows and columns of the padded batch, of the image in its top left corner, and of the
            original image.
        limit: maximum number of pairs.
        threshold: scores must be higher.

    Returns:
        In descending order of score, ``boxes`` ``[N, 4]`` (around the mask's pixels), ``labels`` int64 ``[N]``,
        ``scores`` ``[N]`` and ``masks`` ``[N, 1, rows, columns]``, the probability of each pixel.
    """
    shares = classes.softmax(-1)[:, :-1]
    best = shares.flatten().topk(min(limit, shares.numel()))
    query, labels = best.indices // shares.shape[1], best.indices % shares.shape[1]
    query, own = query.unique(return_inverse=True)  # a query may have several classes
    logits = F.interpolate(masks[None, query], tuple(padded), mode="bilinear", align_corners=False)
    logits = logits[..., : seen[0], : seen[1]]
    masks = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)[0].sigmoid()
    inside = masks > 0.5
    scores = best.values * ((masks * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1))[own]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > threshold]
    own = own[order]
    return {
        "boxes": around(inside)[own],
        "labels": labels[order],
        "scores": scores[order],
        "masks": masks[own, None],
    }


def around(masks: Tensor) -> Tensor:
    """Bounding boxes ``[N, 4]`` of masks, bool ``[N, H, W]``, along the outer edges of the pixels; the whole image for
    an empty mask."""
    sides = []
    for along in (masks.any(1).byte(), masks.any(2).byte()):  # columns, rows
        first, last = along.argmax(1), along.shape[1] - along.flip(1).argmax(1)
        sides.append((first, last))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1).float()
