"""Registry of the heads by task and name.

`build_detector` and `build_segmenter` construct heads from this table, the exporters read ``not_exported``, and the
choices of a recipe's ``model.head`` are its names (tests/heads/test_registry.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .detection import heads
from .detection.conditional_detr import ConditionalDETR
from .detection.mask2former import InstanceMask2Former
from .segmentation import segmenter
from .segmentation.mask2former import Mask2Former

_NO_OPENVINO = {"openvino": "not compared with PyTorch there"}
_STEPS = "its boxes jump by a pixel where a mask's logit changes its sign"


@dataclass(frozen=True)
class HeadSpec:
    """A head.

    Attributes:
        name: as ``model.head`` names it.
        task: ``"detect"`` or ``"segment"``.
        build: of a detector, ``(backbone, num_classes, transform, **head_kwargs)`` to a module with the interface of
            torchvision's detectors, ``transform`` being arguments of its ``GeneralizedRCNNTransform``; of a segmenter,
            ``(backbone, num_classes, image, **head_kwargs)`` to a `SegmentationModel`, ``image`` being arguments of it.
        kind: how it finds objects or classes: ``"two_stage"`` and ``"one_stage"`` are torchvision's detectors, with
            anchors or points and non-maximum suppression; ``"box_queries"``, ``"mask_queries"``: the queries of a
            transformer, without both; ``"pixels"``: the logits of a segmenter.
        masks: it predicts object masks and needs them in training.
        first_class: 1 if its classes start at 1, with the background as 0.
        strides: of the backbone's maps that are read.
        extra_levels: coarser maps that the neck adds, see `FPN`.
        neck: its place: ``"before"`` the head; ``"inside"``: the head's pixel decoder replaces it, and A3-FPN goes into
            that; ``"none"``: the head reads one of the body's maps and takes no neck.
        not_exported: reasons why it is not exported, by format.

    Examples:
        >>> from foveal.heads.registry import HEADS
        >>> HEADS["detect"]["mask_rcnn"].masks, HEADS["detect"]["fcos"].strides
        (True, (8, 16, 32))
    """

    name: str
    task: str
    build: Callable[..., nn.Module]
    kind: str = "pixels"
    masks: bool = False
    first_class: int = 0
    strides: tuple[int, ...] = (4, 8, 16, 32)
    extra_levels: str | None = None
    neck: str = "before"
    not_exported: Mapping[str, str] = field(default_factory=dict)


_RCNN: dict[str, Any] = dict(kind="two_stage", first_class=1, extra_levels="pool", not_exported=_NO_OPENVINO)
_SINGLE_STAGE: dict[str, Any] = dict(kind="one_stage", strides=(8, 16, 32), extra_levels="p6p7")
_SINGLE_STAGE |= dict(not_exported=_NO_OPENVINO)
_MASK2FORMER: dict[str, Any] = dict(kind="mask_queries", neck="inside")
_SPECS = (
    HeadSpec("mask_rcnn", "detect", heads.mask_rcnn, masks=True, **_RCNN),
    HeadSpec("cascade_mask_rcnn", "detect", heads.cascade_mask_rcnn, masks=True, **_RCNN),
    HeadSpec("faster_rcnn", "detect", heads.faster_rcnn, **_RCNN),
    HeadSpec("retinanet", "detect", heads.retinanet, **_SINGLE_STAGE),
    HeadSpec("fcos", "detect", heads.fcos, **_SINGLE_STAGE),
    HeadSpec(
        "mask2former",
        "detect",
        InstanceMask2Former,
        masks=True,
        not_exported=dict.fromkeys(("onnx", "pt2", "openvino"), _STEPS),
        **_MASK2FORMER,
    ),
    HeadSpec(
        "conditional_detr",
        "detect",
        ConditionalDETR,
        kind="box_queries",
        strides=(32,),
        neck="none",
        not_exported=_NO_OPENVINO,
    ),
    HeadSpec("upernet", "segment", segmenter.upernet),
    HeadSpec("semantic_fpn", "segment", segmenter.semantic_fpn),
    HeadSpec("linear", "segment", segmenter.linear, strides=(4,)),
    HeadSpec("mask2former", "segment", Mask2Former, not_exported=_NO_OPENVINO, **_MASK2FORMER),
)
HEADS: dict[str, dict[str, HeadSpec]] = {
    task: {spec.name: spec for spec in _SPECS if spec.task == task} for task in ("detect", "segment")
}


def head_spec(task: str, name: str) -> HeadSpec:
    """The entry of a head.

    Raises:
        ValueError: unknown task or head; the message lists the known ones.

    Examples:
        >>> from foveal.heads.registry import head_spec
        >>> head_spec("segment", "upernet").not_exported
        {}
    """
    if task not in HEADS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(HEADS)}")
    if name not in HEADS[task]:
        raise ValueError(f"unknown head {name!r} for {task}; choose from {', '.join(HEADS[task])}")
    return HEADS[task][name]
