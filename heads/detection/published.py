"""The parameter names of mmdetection's detectors, and what differs in their values: the place of the background."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# mmdet's name, ours; {} is a number
_FPN = (
    ("neck.lateral_convs.{}.conv.", "detector.backbone.neck.pyramid.inner_blocks.{}.0."),
    ("neck.fpn_convs.{}.conv.", "detector.backbone.neck.pyramid.layer_blocks.{}.0."),
)
_RCNN = (
    ("rpn_head.rpn_conv.", "detector.rpn.head.conv.0.0."),
    ("rpn_head.rpn_cls.", "detector.rpn.head.cls_logits."),
    ("rpn_head.rpn_reg.", "detector.rpn.head.bbox_pred."),
    ("roi_head.bbox_head.shared_fcs.0.", "detector.roi_heads.box_head.fc6."),
    ("roi_head.bbox_head.shared_fcs.1.", "detector.roi_heads.box_head.fc7."),
    ("roi_head.bbox_head.fc_cls.", "detector.roi_heads.box_predictor.cls_score."),
    ("roi_head.bbox_head.fc_reg.", "detector.roi_heads.box_predictor.bbox_pred."),
    ("roi_head.mask_head.convs.{}.conv.", "detector.roi_heads.mask_head.{}.0."),
    ("roi_head.mask_head.upsample.", "detector.roi_heads.mask_predictor.conv5_mask."),
    ("roi_head.mask_head.conv_logits.", "detector.roi_heads.mask_predictor.mask_fcn_logits."),
)
_RETINA = (
    ("bbox_head.cls_convs.{}.conv.", "detector.head.classification_head.conv.{}.0."),
    ("bbox_head.reg_convs.{}.conv.", "detector.head.regression_head.conv.{}.0."),
    ("bbox_head.retina_cls.", "detector.head.classification_head.cls_logits."),
    ("bbox_head.retina_reg.", "detector.head.regression_head.bbox_reg."),
)
_NAMES = [
    (re.compile(re.escape(theirs).replace(r"\{\}", r"(\d+)")), ours) for theirs, ours in (*_FPN, *_RCNN, *_RETINA)
]


def from_mmdet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Neck (FPN) and heads of mmdetection's Faster R-CNN, Mask R-CNN and RetinaNet under the names of `Detector`,
    without backbone and A3-FPN.

    The background is mmdetection's last class and torchvision's first one. For it torchvision also has boxes and masks,
    which nothing reads: they are zeros here. With ``convention="mmdet"`` the detections are mmdetection's; masks are
    put into the image as torchvision does it, which rounds boxes to pixels there.

    Args:
        state_dict: names that are of none of these parts are passed over if they begin with ``backbone.``, or are those
            of an A3-FPN.

    Raises:
        ValueError: a name that is no part of these detectors.
    """
    result = {}
    for name, tensor in state_dict.items():
        if name.startswith("backbone.") or is_a3fpn(name):
            continue
        for theirs, ours in _NAMES:
            if match := theirs.match(name):
                own = ours.format(*match.groups()) + name[match.end() :]
                break
        else:
            raise ValueError(f"{name} is no parameter of Faster R-CNN, Mask R-CNN or RetinaNet with an FPN or A3-FPN")
        if ".cls_score." in own:
            tensor = tensor.roll(1, 0)
        elif ".box_predictor.bbox_pred." in own:
            tensor = torch.cat([tensor.new_zeros(4, *tensor.shape[1:]), tensor])
        elif ".mask_fcn_logits." in own:
            tensor = torch.cat([tensor.new_zeros(1, *tensor.shape[1:]), tensor])
        result[own] = tensor
    return result


def is_a3fpn(name: str) -> bool:
    """Whether a name of a detector's checkpoint is of A3-FPN."""
    return re.match(r"neck\.(a3fpn_body\.|conv[0-4]+\.|extra_convs\.)", name) is not None
