"""Parameter names of mmdetection's and detectron2's detectors, and the position of the background class; names of
Conditional DETR."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..names import translate

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
_CASCADE = (  # the first number is the stage
    ("roi_head.bbox_head.{}.shared_convs.{}.conv.", "detector.roi_heads.box_head.{}.convs.{}.0."),
    ("roi_head.bbox_head.{}.shared_convs.{}.bn.", "detector.roi_heads.box_head.{}.convs.{}.1."),
    ("roi_head.bbox_head.{}.shared_fcs.{}.", "detector.roi_heads.box_head.{}.fcs.{}."),
    ("roi_head.bbox_head.{}.fc_cls.", "detector.roi_heads.box_predictor.{}.cls_score."),
    ("roi_head.bbox_head.{}.fc_reg.", "detector.roi_heads.box_predictor.{}.bbox_pred."),
    ("roi_head.mask_head.{}.convs.{}.conv.", "detector.roi_heads.mask_head.{}.{}.0."),
    ("roi_head.mask_head.{}.upsample.", "detector.roi_heads.mask_predictor.{}.conv5_mask."),
    ("roi_head.mask_head.{}.conv_logits.", "detector.roi_heads.mask_predictor.{}.mask_fcn_logits."),
)
_RETINA = (
    ("bbox_head.cls_convs.{}.conv.", "detector.head.classification_head.conv.{}.0."),
    ("bbox_head.reg_convs.{}.conv.", "detector.head.regression_head.conv.{}.0."),
    ("bbox_head.retina_cls.", "detector.head.classification_head.cls_logits."),
    ("bbox_head.retina_reg.", "detector.head.regression_head.bbox_reg."),
)
_DETECTRON2 = (
    *((f"backbone.fpn_lateral{i + 2}.", f"detector.backbone.neck.pyramid.inner_blocks.{i}.0.") for i in range(4)),
    *((f"backbone.fpn_output{i + 2}.", f"detector.backbone.neck.pyramid.layer_blocks.{i}.0.") for i in range(4)),
    ("proposal_generator.rpn_head.conv.", "detector.rpn.head.conv.0.0."),
    ("proposal_generator.rpn_head.objectness_logits.", "detector.rpn.head.cls_logits."),
    ("proposal_generator.rpn_head.anchor_deltas.", "detector.rpn.head.bbox_pred."),
    ("roi_heads.box_head.fc1.", "detector.roi_heads.box_head.fc6."),
    ("roi_heads.box_head.fc2.", "detector.roi_heads.box_head.fc7."),
    ("roi_heads.box_predictor.", "detector.roi_heads.box_predictor."),
    *((f"roi_heads.mask_head.mask_fcn{i + 1}.", f"detector.roi_heads.mask_head.{i}.0.") for i in range(4)),
    ("roi_heads.mask_head.deconv.", "detector.roi_heads.mask_predictor.conv5_mask."),
    ("roi_heads.mask_head.predictor.", "detector.roi_heads.mask_predictor.mask_fcn_logits."),
)
_NAMES = (*_FPN, *_RCNN, *_CASCADE, *_RETINA, *_DETECTRON2)


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Neck (FPN) and heads of mmdetection's Faster, Mask and Cascade Mask R-CNN and RetinaNet, and of detectron2's
    Faster and Mask R-CNN, under the names of `Detector`, without backbone and A3-FPN.

    Both have the background as the last class, torchvision as the first. torchvision also has boxes and masks for the
    background, which are never used: they are set to zero. With ``convention`` ``"mmdet"`` or ``"detectron2"`` the
    detections equal theirs, except that torchvision rounds boxes to pixels when it pastes masks.

    Args:
        state_dict: without the tensors of the backbone and an A3-FPN.

    Raises:
        ValueError: a name that does not belong to these detectors.
    """
    result = {}
    # a cascade without convolutions has one box for all classes
    stage = r"(\d\.)?" if any(".shared_convs." in name for name in state_dict) else ""
    by_class = re.compile(rf"\.box_predictor\.{stage}bbox_pred\.")
    laterals = len({name.split(".")[2] for name in state_dict if name.startswith("neck.lateral_convs.")})
    extra = [f"neck.fpn_convs.{laterals + i}.conv." for i in (0, 1)]  # of a RetinaNet
    table = (
        *((name, f"detector.backbone.neck.pyramid.extra_blocks.p{6 + i}.") for i, name in enumerate(extra)),
        *_NAMES,
    )
    for name, tensor in state_dict.items():
        own = translate(name, table)
        if own is None:
            raise ValueError(f"{name} is no parameter of a supported detector with an FPN or A3-FPN")
        if ".cls_score." in own:
            tensor = tensor.roll(1, 0)
        elif by_class.search(own):
            tensor = torch.cat([tensor.new_zeros(4, *tensor.shape[1:]), tensor])
        elif ".mask_fcn_logits." in own:
            tensor = torch.cat([tensor.new_zeros(1, *tensor.shape[1:]), tensor])
        result[own] = tensor
    return result


# transformers' names of Conditional DETR below ``model.`` (its version 5; before, and on the hub) to the authors'
_TRANSFORMERS_DETR = (
    (r"^(encoder|decoder)\.", r"transformer.\1."),
    (r"^query_position_embeddings\.", "query_embed."),
    (r"^input_projection\.", "input_proj."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.decoder\.layernorm\.", ".decoder.norm."),
    (r"(decoder\.layers\.\d+)\.self_attn\.(?!out_proj)", r"\1.sa_"),
    (r"(decoder\.layers\.\d+)\.encoder_attn\.(?!out_proj)", r"\1.ca_"),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.([sc]a_[qk])_(content|pos)", r".\1\2"),
)


def from_conditional_detr(state_dict: Mapping[str, Tensor], prefix: str = "detector.head.") -> dict[str, Tensor]:
    """The head of Conditional DETR under the names of `conditional_detr.ConditionalDETRHead`.

    Args:
        state_dict: with the authors' names or transformers', without the tensors of the backbone.
        prefix: before the new names.
    """
    result = {}
    for name, tensor in state_dict.items():
        for theirs, ours in _TRANSFORMERS_DETR:
            name = re.sub(theirs, ours, name)
        if (joint := ".self_attn.in_proj_") in name:  # queries, keys and values
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[prefix + name.replace(joint, f".self_attn.{letter}_proj.")] = part
        else:
            result[prefix + name] = tensor
    return result
