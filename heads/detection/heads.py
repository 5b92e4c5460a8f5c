"""torchvision's detectors on any backbone and neck: Faster, Mask and Cascade Mask R-CNN, RetinaNet, FCOS.

Each takes a backbone, the number of classes without the background, arguments of torchvision's
``GeneralizedRCNNTransform``, and keyword arguments (``head_kwargs`` of a recipe): those below and torchvision's own.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss

from ..backbone import Backbone
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
from .parts import AlignedMasks, Anchors, BoundedCoder, FullCoder, FullLinearCoder, region_pool

RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors


def mask_rcnn(
    backbone: Backbone,
    num_classes: int,
    transform: dict[str, Any],
    *,
    box_width: int = 1024,
    mask_width: int = 256,
    convention: str = "torchvision",
    **kwargs: Any,
) -> nn.Module:
    """Mask R-CNN (He et al., arXiv 1703.06870).

    Args:
        box_width, mask_width: channels of the heads.
        convention: ``"torchvision"``; ``"mmdet"`` for weights of mmdetection, whose anchors (`Anchors`), pooling
            (`AlignedPool`), mask targets (`AlignedMasks`) and boxes (`BoundedCoder`) differ slightly; ``"detectron2"``,
            which differs in the first three.
        kwargs: ``anchor_scale`` (side of an anchor in strides), ``anchor_ratios``, and torchvision's own.
    """
    parts = _box_head(backbone, box_width, num_classes) | _mask_head(backbone, mask_width, num_classes)
    model = _rcnn(MaskRCNN, backbone, transform, parts, convention, **kwargs)
    if convention != "torchvision":
        model.roi_heads = AlignedMasks(model.roi_heads)
    return model


def faster_rcnn(
    backbone: Backbone,
    num_classes: int,
    transform: dict[str, Any],
    *,
    box_width: int = 1024,
    convention: str = "torchvision",
    **kwargs: Any,
) -> nn.Module:
    """Faster R-CNN (Ren et al., arXiv 1506.01497), with the arguments of `mask_rcnn`."""
    return _rcnn(FasterRCNN, backbone, transform, _box_head(backbone, box_width, num_classes), convention, **kwargs)


def cascade_mask_rcnn(
    backbone: Backbone,
    num_classes: int,
    transform: dict[str, Any],
    *,
    box_head: str = "4conv1fc",
    box_width: int = 1024,
    mask_width: int = 256,
    convention: str = "torchvision",
    **kwargs: Any,
) -> nn.Module:
    """Cascade Mask R-CNN (Cai & Vasconcelos, arXiv 1712.00726), see `cascade.CascadeHeads`.

    Args:
        box_head: ``"4conv1fc"``: four convolutions with BatchNorm and a fully connected layer, boxes for each class, as
            (Di)NAT's were trained; ``"2fc"``: two fully connected layers, one box for all classes, as in the paper.
        convention: ``"torchvision"`` or ``"mmdet"``.
        box_width, mask_width, kwargs: see `mask_rcnn`.
    """
    coder = _coder(convention, ("torchvision", "mmdet"))
    if box_head not in BOX_HEADS:
        raise ValueError(f"box_head must be one of {', '.join(BOX_HEADS)}, got {box_head!r}")
    heads = [BoxHead(box_head, backbone.out_channels, 7, box_width) for _ in range(STAGES)]
    predictors = [box_predictor(box_width, num_classes + 1, box_head == "2fc") for _ in range(STAGES)]
    masks = [_mask_head(backbone, mask_width, num_classes) for _ in range(STAGES)]
    mmdet = convention == "mmdet"
    codes = [tuple(1 / deviation for deviation in stage) for stage in MMDET_DEVIATIONS] if mmdet else CODES
    parts = {
        "box_head": nn.ModuleList(heads),
        "box_predictor": nn.ModuleList(predictors),
        **{name: nn.ModuleList(each[name] for each in masks) for name in masks[0]},
        "coders": [coder(stage) for stage in codes],
        "mask_loss": aligned_mask_loss if mmdet else maskrcnn_loss,
    }
    by_stage = ("box_fg_iou_thresh", "box_bg_iou_thresh", "bbox_reg_weights")
    return _rcnn(CascadeMaskRCNN, backbone, transform, parts, convention, reserved=by_stage, **kwargs)


def _rcnn(
    detector: type,
    backbone: Backbone,
    transform: dict[str, Any],
    parts: dict[str, Any],
    convention: str,
    *,
    anchor_scale: float = 8.0,
    anchor_ratios: Sequence[float] = RATIOS,
    reserved: Sequence[str] = (),
    **kwargs: Any,
) -> Any:
    """``parts``: the heads, as arguments of ``detector``; ``reserved``: its arguments that users may not set."""
    coder, exact = _coder(convention, ("torchvision", "mmdet", "detectron2")), convention != "torchvision"
    parts = {
        **parts,
        "rpn_anchor_generator": Anchors(backbone.spec.strides, [anchor_scale], anchor_ratios, not exact),
        "box_roi_pool": region_pool(backbone, 7, exact),
    }
    if "mask_head" in parts:
        parts["mask_roi_pool"] = region_pool(backbone, 14, exact)
    _check_known(kwargs, detector, (*transform, *parts, *reserved))
    model = detector(backbone, **parts, **transform, **kwargs)
    for part in (model.rpn, model.roi_heads):
        part.box_coder = coder(part.box_coder.weights)
    return model


def _box_head(backbone: Backbone, width: int, num_classes: int) -> dict[str, nn.Module]:
    return {
        "box_head": TwoMLPHead(backbone.out_channels * 7 * 7, width),
        "box_predictor": FastRCNNPredictor(width, num_classes + 1),  # class 0 is the background
    }


def _mask_head(backbone: Backbone, width: int, num_classes: int) -> dict[str, nn.Module]:
    return {
        "mask_head": MaskRCNNHeads(backbone.out_channels, (width,) * 4, 1),
        "mask_predictor": MaskRCNNPredictor(width, width, num_classes + 1),
    }


def _coder(convention: str, known: Sequence[str]) -> type[BoxCoder]:
    if convention not in known:
        raise ValueError(f"convention must be one of {', '.join(known)}, got {convention!r}")
    return BoundedCoder if convention == "mmdet" else FullCoder


def _check_known(kwargs: Collection[str], detector: type, reserved: Collection[str]) -> None:
    """Raise for unknown arguments, which torchvision's detectors ignore."""
    classes = (detector, FasterRCNN) if issubclass(detector, FasterRCNN) else (detector,)
    known = {name for each in classes for name in inspect.signature(each.__init__).parameters}
    known -= {*reserved, "self", "backbone", "num_classes", "kwargs"}
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"{detector.__name__} has no argument {name!r}; nearest: {', '.join(near) or 'none'}")


def retinanet(
    backbone: Backbone,
    num_classes: int,
    transform: dict[str, Any],
    *,
    anchor_scale: float = 4.0,
    anchor_ratios: Sequence[float] = RATIOS,
    convention: str = "torchvision",
    **kwargs: Any,
) -> nn.Module:
    """RetinaNet (Lin et al., arXiv 1708.02002).

    Args:
        anchor_scale: side, in strides, of the smallest of the three anchors of an octave.
        convention: ``"torchvision"`` or ``"mmdet"``, see `mask_rcnn`.
    """
    coder = _coder(convention, ("torchvision", "mmdet"))
    octave = [anchor_scale * 2 ** (step / 3) for step in range(3)]
    anchors = Anchors(backbone.spec.strides, octave, anchor_ratios, convention == "torchvision")
    _check_known(kwargs, RetinaNet, (*transform, "anchor_generator"))
    model = RetinaNet(backbone, num_classes, anchor_generator=anchors, **transform, **kwargs)
    for part in (model, model.head.regression_head):
        part.box_coder = coder(part.box_coder.weights)
    return model


class CountedFCOS(FCOS):
    """torchvision's, which divides its losses by the number of points on an object, and counts them beforehand."""

    @torch.no_grad()
    def normalizers(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """Points of a batch that lie on an object, float ``[1]``."""
        batch, targets = self.transform(images, targets)
        rows, columns = batch.tensors.shape[-2:]
        strides = self.backbone.spec.strides
        maps = [batch.tensors.new_empty(1, 1, -(-rows // step), -(-columns // step)) for step in strides]
        points = self.anchor_generator(batch, maps)
        matching = SimpleNamespace(  # the part of the model that `compute_loss` needs, up to the matching
            center_sampling_radius=self.center_sampling_radius,
            head=SimpleNamespace(compute_loss=lambda *found: torch.cat(found[-1])),
        )
        levels = [each.shape[-2] * each.shape[-1] for each in maps]
        return (FCOS.compute_loss(matching, targets, {}, points, levels) >= 0).sum().float()[None]


def fcos(backbone: Backbone, num_classes: int, transform: dict[str, Any], **kwargs: Any) -> nn.Module:
    """FCOS (Tian et al., arXiv 1904.01355). Its only anchor has the side of the stride, which scales the distances."""
    anchors = Anchors(backbone.spec.strides, [1.0], [1.0])
    _check_known(kwargs, FCOS, (*transform, "anchor_generator"))
    kwargs = {"score_thresh": 0.05, **kwargs}  # torchvision's 0.2 lowers the AP
    model = CountedFCOS(backbone, num_classes, anchor_generator=anchors, **transform, **kwargs)
    for part in (model, model.head):
        part.box_coder = FullLinearCoder(normalize_by_size=True)
    return model
