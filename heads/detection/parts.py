"""Replacements for parts of torchvision's detectors: strides from the backbone instead of inferred from sizes, boxes
decoded in full precision, and the conventions of mmdetection and detectron2."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from ..backbone import Backbone
from .cascade import aligned_mask_loss


class Anchors(AnchorGenerator):
    """Anchors at the strides of the neck. torchvision divides the image's side by the map's, which differs if the
    map's side was rounded up.

    Args:
        rounded: round corners to whole pixels, as torchvision does; mmdetection and detectron2 do not.
    """

    def __init__(
        self, strides: Sequence[int], scales: Sequence[float], ratios: Sequence[float], rounded: bool = True
    ) -> None:
        sizes = tuple(tuple(s * stride for s in scales) for stride in strides)
        super().__init__(sizes, (tuple(ratios),) * len(strides))
        self.strides = strides
        if not rounded:
            heights = torch.tensor(tuple(ratios)).sqrt()[:, None]
            for level, size in enumerate(sizes):
                x, y = ((side * torch.tensor(size)).flatten() / 2 for side in (1 / heights, heights))
                self.cell_anchors[level] = torch.stack([-x, -y, x, y], 1)

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Anchors ``[N, 4]`` of all levels, for each image."""
        x = feature_maps[0]
        self.set_cell_anchors(torch.float32, x.device)  # not the maps' dtype: half precision is too coarse for pixels
        steps = [[torch.tensor(stride, device=x.device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(m.shape[-2:]) for m in feature_maps], steps))
        return [anchors for _ in image_list.image_sizes]


class AlignedPool(MultiScaleRoIAlign):
    """RoIAlign as in mmdetection and detectron2: ``aligned=True`` (shifted by half a pixel from torchvision's default)
    and an adaptive number of samples per bin."""

    def forward(
        self, x: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """As `MultiScaleRoIAlign`: maps by name and the regions ``[N, 4]`` of each image to ``[sum of N, C, h, w]``."""
        maps, levels = [x[name] for name in self.featmap_names], self.map_levels(boxes)
        regions = torch.cat([F.pad(own, (1, 0), value=float(image)) for image, own in enumerate(boxes)])
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (level_map, scale) in enumerate(zip(maps, self.scales, strict=True)):
            here = torch.where(levels == level)[0]
            own = roi_align(level_map.to(regions.dtype), regions[here], self.output_size, scale, 0, aligned=True)
            pooled[here] = own.to(pooled.dtype)
        return pooled


class FullCoder(BoxCoder):
    """Decodes in the more precise dtype of codes and boxes. torchvision uses that of the codes, which is half precision
    under autocast: bfloat16 has no value between 512 and 516 pixels."""

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Codes ``[N, 4 n]`` of boxes ``[N, 4]`` to corners ``[N, 4 n]``."""
        return super().decode_single(rel_codes.to(torch.promote_types(rel_codes.dtype, boxes.dtype)), boxes)


class FullLinearCoder(BoxLinearCoder):
    """The same for FCOS."""

    def decode(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Codes ``[..., 4]`` of boxes ``[..., 4]`` to corners ``[..., 4]``."""
        return super().decode(rel_codes.to(torch.promote_types(rel_codes.dtype, boxes.dtype)), boxes)


class BoundedCoder(FullCoder):
    """mmdetection's box coder: limits shrinking of a side to a factor of 62.5, too; torchvision limits only growth."""

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Codes ``[N, 4 n]`` of boxes ``[N, 4]`` to corners ``[N, 4 n]``."""
        lowest = [-math.inf, -math.inf, *(-self.bbox_xform_clip * weight for weight in self.weights[2:])]
        bounds = rel_codes.new_tensor(lowest).repeat(rel_codes.shape[1] // 4)
        return super().decode_single(rel_codes.maximum(bounds), boxes)


class AlignedMasks(RoIHeads):
    """torchvision's heads with `aligned_mask_loss`.

    Args:
        heads: torchvision's, of a Mask R-CNN.
    """

    def __init__(self, heads: RoIHeads) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(heads))

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """As `RoIHeads`."""
        found, losses = super().forward(features, proposals, image_shapes, targets)
        if self.training:
            regions, matched, labels, _ = self.samples
            inside = [own > 0 for own in labels]
            regions = [own[chosen] for own, chosen in zip(regions, inside, strict=True)]
            matched = [own[chosen] for own, chosen in zip(matched, inside, strict=True)]
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, regions, image_shapes)))
            objects = ([target[name] for target in targets] for name in ("masks", "labels"))
            losses["loss_mask"] = aligned_mask_loss(logits, regions, *objects, matched)
            del self.samples
        return found, losses

    def has_mask(self) -> bool:
        """Whether torchvision's forward computes masks: not in training."""
        return not self.training

    def select_training_samples(self, *given: Any) -> tuple[Any, ...]:
        """torchvision's, stored for the mask loss."""
        self.samples = super().select_training_samples(*given)
        return self.samples


def region_pool(backbone: Backbone, size: int, aligned: bool) -> MultiScaleRoIAlign:
    """Pool ``size x size`` from the level that fits a region (FPN, arXiv 1612.03144, equation 1)."""
    spec, coarsest = backbone.spec, backbone.body_spec.strides[-1]
    strides = tuple(stride for stride in spec.strides if stride <= coarsest)  # not from levels that the neck adds
    steps = {fine / coarse for fine, coarse in itertools.pairwise(strides)}
    if not (steps <= {0.5} or steps <= {1.0}):  # equation 1 assumes strides that double
        raise ValueError(f"regions are pooled from maps whose strides double from one to the next, got {strides}")
    kind = AlignedPool if aligned else MultiScaleRoIAlign
    pool = kind([str(level) for level in range(len(strides))], output_size=size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool
