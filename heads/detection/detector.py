"""torchvision's detectors over any backbone and neck, told the strides that they would otherwise guess from sizes."""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from ..backbone import Backbone
from ..dense import DenseModel
from .cascade import (
    BOX_HEADS,
    CODES,
    MMDET_DEVIATIONS,
    STAGES,
    BoxHead,
    CascadeMaskRCNN,
    aligned_mask_loss,
    box_predictor,
)

Target = dict[str, torch.Tensor]
RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors


class Anchors(AnchorGenerator):
    """Anchors at the strides of the neck. torchvision divides the image's side by the map's, which is another number
    wherever a map was rounded up.

    Args:
        rounded: corners on whole pixels, as torchvision has them; mmdetection and detectron2 do not round.
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
        """Corners ``[N, 4]`` of all levels' anchors, for each image."""
        x = feature_maps[0]
        self.set_cell_anchors(torch.float32, x.device)  # not the maps' type: half precision cannot tell pixels apart
        steps = [[torch.tensor(stride, device=x.device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(m.shape[-2:]) for m in feature_maps], steps))
        return [anchors for _ in image_list.image_sizes]


class AlignedPool(MultiScaleRoIAlign):
    """RoIAlign as mmdetection and detectron2 have it: a region's corners lie between the centres of pixels (half a
    pixel to the left of torchvision's), and each of its bins takes as many samples as it has pixels."""

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
    """Decodes in the more exact type of the two. torchvision takes that of the codes, a half in mixed precision, where
    bfloat16 has nothing between 512 and 516 pixels."""

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Codes ``[N, 4 n]`` of boxes ``[N, 4]`` to corners ``[N, 4 n]``."""
        return super().decode_single(rel_codes.to(torch.promote_types(rel_codes.dtype, boxes.dtype)), boxes)


class FullLinearCoder(BoxLinearCoder):
    """The same for FCOS."""

    def decode(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Codes ``[..., 4]`` of boxes ``[..., 4]`` to corners ``[..., 4]``."""
        return super().decode(rel_codes.to(torch.promote_types(rel_codes.dtype, boxes.dtype)), boxes)


class BoundedCoder(FullCoder):
    """Boxes as mmdetection has them: a side shrinks by no more than it may grow, 62.5 times, which torchvision limits
    alone."""

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Codes ``[N, 4 n]`` of boxes ``[N, 4]`` to corners ``[N, 4 n]``."""
        lowest = [-math.inf, -math.inf, *(-self.bbox_xform_clip * weight for weight in self.weights[2:])]
        bounds = rel_codes.new_tensor(lowest).repeat(rel_codes.shape[1] // 4)
        return super().decode_single(rel_codes.maximum(bounds), boxes)


class AlignedMasks(RoIHeads):
    """torchvision's heads, whose masks learn by `aligned_mask_loss`.

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
        """Whether torchvision's forward shall compute masks: not in training."""
        return not self.training

    def select_training_samples(self, *given: Any) -> tuple[Any, ...]:
        """torchvision's, kept for the masks."""
        self.samples = super().select_training_samples(*given)
        return self.samples


def _is_mmdet(convention: str, *others: str) -> bool:
    """Whether anchors and regions stay where they are, as in mmdetection and ``others``: neither rounded nor moved."""
    known = ("torchvision", "mmdet", *others)
    if convention not in known:
        raise ValueError(f"convention must be one of {', '.join(known)}, got {convention!r}")
    return convention != "torchvision"


def _region_pool(backbone: Backbone, size: int, aligned: bool) -> MultiScaleRoIAlign:
    """Pools ``size x size`` from the level that fits a region (FPN, arXiv 1612.03144, equation 1)."""
    spec, coarsest = backbone.spec, backbone.body_spec.strides[-1]
    strides = tuple(stride for stride in spec.strides if stride <= coarsest)  # not from what the neck adds
    steps = {fine / coarse for fine, coarse in itertools.pairwise(strides)}
    if not (steps <= {0.5} or steps <= {1.0}):  # the equation's level would be another map, or none
        raise ValueError(f"regions are pooled from maps whose strides double from one to the next, got {strides}")
    kind = AlignedPool if aligned else MultiScaleRoIAlign
    pool = kind([str(level) for level in range(len(strides))], output_size=size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool


def _known(kwargs: dict[str, Any], detector: type, given: Sequence[str]) -> dict[str, Any]:
    """The same arguments, all of them ones that ``detector`` has; it would swallow others without a word."""
    names = [n for n in inspect.signature(detector.__init__).parameters if n not in ("self", "backbone", "kwargs")]
    if issubclass(detector, FasterRCNN):
        names += inspect.signature(FasterRCNN.__init__).parameters
    names = [n for n in dict.fromkeys(names) if n not in (*given, "self", "backbone", "kwargs")]
    for name in kwargs:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            raise ValueError(f"{detector.__name__} has no argument {name!r}; nearest: {', '.join(near) or 'none'}")
    return kwargs


_GIVEN = ("num_classes", "min_size", "max_size", "image_mean", "image_std")


def _rcnn(
    backbone: Backbone,
    num_classes: int,
    transform: dict[str, Any],
    detector: type,
    anchor_scale: float = 8.0,
    anchor_ratios: Sequence[float] = RATIOS,
    box_width: int = 1024,
    mask_width: int = 256,
    convention: str = "torchvision",
    **kwargs: Any,
) -> nn.Module:
    exact = _is_mmdet(convention, "detectron2")
    parts: dict[str, Any] = {
        "rpn_anchor_generator": Anchors(backbone.spec.strides, [anchor_scale], anchor_ratios, not exact),
        "box_roi_pool": _region_pool(backbone, 7, exact),
        "box_head": TwoMLPHead(backbone.out_channels * 7 * 7, box_width),
        "box_predictor": FastRCNNPredictor(box_width, num_classes + 1),  # class 0 is the background
    }
    if detector is MaskRCNN:
        parts |= {"mask_roi_pool": _region_pool(backbone, 14, exact), **_mask_head(backbone, mask_width, num_classes)}
    model = detector(backbone, **parts, **transform, **_known(kwargs, detector, (*_GIVEN, *parts)))
    coder = BoundedCoder if convention == "mmdet" else FullCoder
    for part in (model.rpn, model.roi_heads):
        part.box_coder = coder(part.box_coder.weights)
    if exact and detector is MaskRCNN:
        model.roi_heads = AlignedMasks(model.roi_heads)
    return model


def _mask_head(backbone: Backbone, width: int, num_classes: int) -> dict[str, nn.Module]:
    return {
        "mask_head": MaskRCNNHeads(backbone.out_channels, (width,) * 4, 1),
        "mask_predictor": MaskRCNNPredictor(width, width, num_classes + 1),
    }


def mask_rcnn(backbone: Backbone, num_classes: int, transform: dict[str, Any], **kwargs: Any) -> nn.Module:
    """Mask R-CNN (He et al., arXiv 1703.06870). ``kwargs``: ``anchor_scale`` (side of an anchor in strides),
    ``anchor_ratios``, ``box_width``, ``mask_width``, and torchvision's own numbers; ``convention``: ``"mmdet"``
    for weights of mmdetection, whose anchors (`Anchors`), pooling (`AlignedPool`), masks to learn (`AlignedMasks`) and
    boxes (`BoundedCoder`) differ a little from those of ``"torchvision"``; ``"detectron2"``, which differs in all but
    the last of them."""
    return _rcnn(backbone, num_classes, transform, MaskRCNN, **kwargs)


def faster_rcnn(backbone: Backbone, num_classes: int, transform: dict[str, Any], **kwargs: Any) -> nn.Module:
    """Faster R-CNN (Ren et al., arXiv 1506.01497); the same ``kwargs`` without ``mask_width``."""
    if "mask_width" in kwargs:
        raise ValueError("faster_rcnn has no masks, so no mask_width")
    return _rcnn(backbone, num_classes, transform, FasterRCNN, **kwargs)


def cascade_mask_rcnn(
    backbone: Backbone,
    num_classes: int,
    transform: dict[str, Any],
    anchor_scale: float = 8.0,
    anchor_ratios: Sequence[float] = RATIOS,
    box_head: str = "4conv1fc",
    box_width: int = 1024,
    mask_width: int = 256,
    convention: str = "torchvision",
    **kwargs: Any,
) -> nn.Module:
    """Cascade Mask R-CNN (Cai & Vasconcelos, arXiv 1712.00726), see `cascade.CascadeHeads`; the ``kwargs`` of
    `mask_rcnn`. ``box_head``: ``"4conv1fc"``: four convolutions with BatchNorm and a fully connected layer, boxes for
    each class, as (Di)NAT's were trained; ``"2fc"``: two fully connected layers, one box for all classes, as in the
    paper."""
    mmdet = _is_mmdet(convention)
    if box_head not in BOX_HEADS:
        raise ValueError(f"box_head must be one of {', '.join(BOX_HEADS)}, got {box_head!r}")
    heads = [BoxHead(box_head, backbone.out_channels, 7, box_width) for _ in range(STAGES)]
    predictors = [box_predictor(box_width, num_classes + 1, box_head == "2fc") for _ in range(STAGES)]
    masks = [_mask_head(backbone, mask_width, num_classes) for _ in range(STAGES)]
    codes = [tuple(1 / deviation for deviation in stage) for stage in MMDET_DEVIATIONS] if mmdet else CODES
    coder = BoundedCoder if mmdet else FullCoder
    parts: dict[str, Any] = {
        "rpn_anchor_generator": Anchors(backbone.spec.strides, [anchor_scale], anchor_ratios, not mmdet),
        "box_roi_pool": _region_pool(backbone, 7, mmdet),
        "box_head": nn.ModuleList(heads),
        "box_predictor": nn.ModuleList(predictors),
        "mask_roi_pool": _region_pool(backbone, 14, mmdet),
        **{name: nn.ModuleList(each[name] for each in masks) for name in masks[0]},
        "coders": [coder(stage) for stage in codes],
        "mask_loss": aligned_mask_loss if mmdet else maskrcnn_loss,
    }
    told = (*_GIVEN, *parts, "box_fg_iou_thresh", "box_bg_iou_thresh", "bbox_reg_weights")  # by stage
    model = CascadeMaskRCNN(backbone, **parts, **transform, **_known(kwargs, CascadeMaskRCNN, told))
    model.rpn.box_coder = coder(model.rpn.box_coder.weights)
    return model


def retinanet(
    backbone: Backbone,
    num_classes: int,
    transform: dict[str, Any],
    anchor_scale: float = 4.0,
    anchor_ratios: Sequence[float] = RATIOS,
    convention: str = "torchvision",
    **kwargs: Any,
) -> nn.Module:
    """RetinaNet (Lin et al., arXiv 1708.02002): three anchors an octave, the smallest ``anchor_scale`` strides wide.
    ``convention``: ``"torchvision"`` or ``"mmdet"``, as for `mask_rcnn`."""
    mmdet = _is_mmdet(convention)
    octave = [anchor_scale * 2 ** (step / 3) for step in range(3)]
    anchors = Anchors(backbone.spec.strides, octave, anchor_ratios, not mmdet)
    given = (*_GIVEN, "anchor_generator")
    model = RetinaNet(backbone, num_classes, anchor_generator=anchors, **transform, **_known(kwargs, RetinaNet, given))
    coder = BoundedCoder if mmdet else FullCoder
    for part in (model, model.head.regression_head):
        part.box_coder = coder(part.box_coder.weights)
    return model


def fcos(backbone: Backbone, num_classes: int, transform: dict[str, Any], **kwargs: Any) -> nn.Module:
    """FCOS (Tian et al., arXiv 1904.01355); the side of its one anchor is the stride, by which it scales distances."""
    anchors = Anchors(backbone.spec.strides, [1.0], [1.0])
    given = (*_GIVEN, "anchor_generator")
    kwargs = {"score_thresh": 0.05, **kwargs}  # torchvision's 0.2 is for showing, and cuts average precision
    model = FCOS(backbone, num_classes, anchor_generator=anchors, **transform, **_known(kwargs, FCOS, given))
    for part in (model, model.head):
        part.box_coder = FullLinearCoder(normalize_by_size=True)
    return model


class Detector(DenseModel):
    """A detector with torchvision's interface and classes numbered 0 .. ``num_classes`` - 1, whatever it does inside.

    Args:
        detector: what a constructor of `registry.HEADS` returns.
        head: its entry there.
        num_classes: without the background.

    Attributes:
        masks: whether it predicts masks, and is trained on them.
    """

    task = "detect"

    def __init__(self, detector: nn.Module, head: Any, num_classes: int) -> None:
        super().__init__()
        self.detector = detector
        self.num_classes = num_classes
        self.masks: bool = head.masks
        self.first_class: int = head.first_class

    @property
    def backbone(self) -> Backbone:
        return self.detector.backbone

    def forward(self, images: list[torch.Tensor], targets: list[Target] | None = None) -> Any:
        """Losses in training, detections in evaluation.

        Args:
            images: float ``[C, H, W]`` each, in [0, 1], of any sizes. In training they are taken as they are; in
                evaluation they are resized to the detector's ``min_size`` and ``max_size``.
            targets: in training, for each image ``boxes`` float ``[N, 4]`` (corners, pixels), ``labels`` int64 ``[N]``
                and for a head with masks ``masks`` uint8 ``[N, H, W]``.

        Returns:
            in training a mapping of losses; in evaluation for each image, the best first, ``boxes`` ``[N, 4]`` in its
            own pixels, ``scores`` ``[N]``, ``labels`` ``[N]`` and with masks ``masks`` float ``[N, 1, H, W]``, the
            probability of each pixel.
        """
        if targets is not None:
            targets = [target | {"labels": target["labels"] + self.first_class} for target in targets]
        found = self.detector(images, targets)
        if self.training:
            return found
        return [each | {"labels": each["labels"] - self.first_class} for each in found]
