"""Detectors and segmenters of mmdetection, mmsegmentation and detectron2: which model a file belongs to."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ..heads.build import build_dense
from ..heads.detection import Detector
from ..heads.detection.published import from_conditional_detr
from .cards import head_of
from .manifest import Checkpoint
from .names import ANCHORS, BACKBONE, STATISTICS, State

# Dataset (and task) in the tags of published files, number of classes.
_CLASSES = {
    "conditional_detr": 91,  # of COCO, by id
    "coco_panoptic": 133,
    "coco": 80,
    "ade20k_instance": 100,
    "ade20k": 150,
    "cityscapes_instance": 8,
    "cityscapes": 19,
    "voc": 20,
}


# ---- what a file does not contain


@dataclass(frozen=True)
class SourceMetadata:
    """Facts about a dense file, from the manifest or the user, that its tensors do not show.

    Attributes:
        arguments: of the model.
        bgr: the first convolution takes blue, green and red.
        task: ``"detect"``, ``"segment"`` or ``"panoptic"``, if known.
    """

    arguments: dict[str, Any]
    bgr: bool
    task: str | None

    def for_timm(self) -> dict[str, Any]:
        """The arguments of the backbone as a timm model.

        Raises:
            ValueError: timm has no such backbone, or its cfg cannot state the channel order.
        """
        arguments = dict(self.arguments)
        first = arguments.pop("stride_in_1x1", False)
        if own := ["stride_in_1x1=true"] * first + ["channel_order=bgr"] * self.bgr:
            raise ValueError(f"timm has no backbone with {', '.join(own)}: convert the whole model, without --backbone")
        return arguments


def source_metadata(state: State, arguments: Mapping[str, Any], known: Checkpoint | None) -> SourceMetadata:
    """Collect what the tensors of a file do not show; for detectron2, what its configuration contains.

    Args:
        arguments: the user's, of the model, with ``channel_order`` and ``task``.
        known: the file's entry in the manifest.

    Raises:
        ValueError: facts that are missing (the message lists them), invalid or contradicted by the file, or ``known``
            is a classifier.
    """
    if known is not None and known.task == "classify":
        raise ValueError(f"a detector or segmenter, but {known.name} is a classifier")
    arguments = dict(arguments)
    order, task = arguments.pop("channel_order", None), arguments.pop("task", None)
    for key, value, values in (
        ("channel_order", order, ("rgb", "bgr")),
        ("task", task, ("detect", "segment")),
        ("stride_in_1x1", arguments.get("stride_in_1x1"), (True, False)),
    ):
        if value is not None and value not in values:
            raise ValueError(f"{key} is {value!r}, must be one of {', '.join(map(str, values))}")
    order, task = order or (known and known.channel_order), task or (known and known.task)
    channels = arguments.get("in_chans", 3)
    if order == "bgr" and channels != 3:
        raise ValueError(f"channel_order is bgr, but the images have {channels} channels")
    stored = {}  # old files contain mean and standard deviation
    for name, key in zip(STATISTICS, ("mean", "std"), strict=True):
        if name in state:
            values = state[name].flatten().double() / 255
            stored[key] = (values.flip(0) if order == "bgr" else values).tolist()
    for key, values in [*stored.items(), *((key, arguments[key]) for key in ("mean", "std") if key in arguments)]:
        _check_statistics(key, values, channels)
    if missing := _missing(state, arguments, order, () if known is not None else {"mean", "std"} - stored.keys()):
        raise ValueError(f"the tensors do not show these, pass them by --set: {missing}")
    for key, values in stored.items():
        stated = arguments.get(key) or (known and getattr(known, key)) or values
        if not torch.allclose(torch.tensor(stated), torch.tensor(values), rtol=1e-5, atol=1e-6):
            owner = "--set" if key in arguments or known is None else known.name
            raise ValueError(f"pixel_{key} in the file, over 255 and in RGB, is {values}; {owner}: {list(stated)}")
    return SourceMetadata(arguments if known is not None else stored | arguments, order == "bgr", task)


def _missing(state: State, arguments: Mapping[str, Any], order: str | None, statistics: Collection[str]) -> str:
    """What nobody has stated: entries of detectron2's configuration, or the dilation of a DETR.

    Args:
        statistics: those that are unknown; none of a published file.
    """
    if any("decoder.ref_point_head." in name for name in state):
        return "" if not statistics or "output_stride" in arguments else "output_stride=32, or 16 for DC5"
    resnet = any(name.startswith(("backbone.res2.", "backbone.bottom_up.res2.")) for name in state)
    if not resnet and not any(name.startswith("proposal_generator.") for name in state):
        return ""
    missing = {
        "stride_in_1x1=true or false (MODEL.RESNETS.STRIDE_IN_1X1)": resnet and arguments.get("stride_in_1x1") is None,
        "channel_order=bgr or rgb (INPUT.FORMAT)": order is None,
        **{
            f"{key}=[...] (MODEL.PIXEL_{key.upper()} over 255, in RGB)": key not in arguments
            for key in sorted(statistics)
        },
    }
    return "; ".join(text for text, applies in missing.items() if applies)


def _check_statistics(key: str, values: Any, channels: int) -> None:
    least = 0 if key == "mean" else 1e-6
    numbers = isinstance(values, (list, tuple)) and all(isinstance(each, (int, float)) for each in values)
    if not numbers or len(values) != channels or not all(least <= each <= 1 for each in values):
        raise ValueError(f"{key} is {values!r}, must be {channels} numbers from 0 to 1, one for each channel")


# ---- what the names and shapes of a file show


@dataclass(frozen=True)
class HeadConfig:
    """Task and builder arguments of a dense model, without those of the backbone."""

    task: str
    arguments: dict[str, Any]

    def build(self, architecture: str, arguments: Mapping[str, Any], mean: Any = None, std: Any = None) -> nn.Module:
        """The model on a backbone with these arguments; those of neck and heads are merged into the config's."""
        merged = {**self.arguments, "mean": mean, "std": std}
        if self.arguments["head"] == "conditional_detr" and "output_stride" in arguments:  # it reads the last map
            merged["strides"] = [arguments["output_stride"]]
        for key, value in arguments.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = {**merged[key], **value} if both else value
        try:
            return build_dense(self.task, {"name": architecture, **merged}).eval()
        except TypeError as error:
            raise ValueError(f"invalid arguments for {architecture}: {error}") from error

    def check_tag(self, known: Checkpoint) -> None:
        """Raise ValueError if the tag of a published file names another head, neck or number of classes."""
        expected = {
            "head": head_of(known),
            "neck": "a3fpn" if known.tag.startswith("a3fpn_") else "fpn",
            "num_classes": next((count for dataset, count in _CLASSES.items() if dataset in known.tag), None),
        }
        if wrong := {key: value for key, value in expected.items() if value not in (None, self.arguments[key])}:
            got = ", ".join(f"{key} {self.arguments[key]}" for key in wrong)
            raise ValueError(f"got {got}; {known.name}: {', '.join(f'{key} {value}' for key, value in wrong.items())}")


def head_config(state: State, task: str | None = None) -> HeadConfig:
    """The heads of a dense model, from the names and shapes of its tensors.

    Args:
        task: of a Mask2Former, whose file does not show it; ``"panoptic"`` becomes a segmenter.

    Raises:
        ValueError: this package does not have these heads, or has them with other outputs; the message names them.
    """

    def has(start: str) -> bool:
        return any(name.startswith(start) for name in state)

    a3fpn = any("a3fpn_body." in name for name in state)
    if has("sem_seg_head.predictor.class_embed."):
        task, arguments = _mask2former(state, task)
    elif any("decoder.ref_point_head." in name for name in state):
        task, arguments = "detect", _conditional_detr(state)
    elif has("roi_head.bbox_head.0."):
        task, arguments = "detect", _cascade(state)
    elif has("proposal_generator.rpn_head.") and has("roi_heads.box_head.fc1."):
        task, arguments = "detect", _rcnn(state, "detectron2")
    elif has("rpn_head.") and has("roi_head.bbox_head.shared_fcs."):
        task, arguments = "detect", _rcnn(state, "mmdet")
    elif has("bbox_head.retina_cls."):
        task, arguments = "detect", _retinanet(state, a3fpn)
    elif has("decode_head.scale_heads.") and not a3fpn:
        task, arguments = "segment", _semantic_fpn(state)
    elif has("decode_head.psp_modules."):
        task, arguments = "segment", _upernet(state)
    else:
        groups = sorted({name.partition(".")[0] for name in state} - {"backbone"})
        unknown = f"this package has no heads like {', '.join(groups) or 'none'}"
        raise ValueError(next((reason for start, reason in _UNSUPPORTED.items() if has(start)), unknown))
    return HeadConfig(task, {"neck": "a3fpn" if a3fpn else "fpn", **arguments})


_UNSUPPORTED = {
    "roi_heads.box_head.0.": "detectron2's cascade heads (roi_heads.box_head.0 ...)",
}


def _size(state: State, name: str, axis: int = 0) -> int:
    if name not in state:
        raise ValueError(f"{name} is missing, which would show the width")
    return state[name].shape[axis]


def _count(state: State, pattern: str) -> int:
    """How many different numbers the names have in the place of ``#``."""
    found = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
    return len({match[1] for match in map(found.match, state) if match})


# The tensors that show the widths of box head and mask head, the number of classes, and the neck's width.
_RCNN = {
    "mmdet": (
        "roi_head.bbox_head.shared_fcs.0.weight",
        "roi_head.mask_head.convs.0.conv.weight",
        "roi_head.bbox_head.fc_cls.weight",
        "rpn_head.rpn_conv.weight",
    ),
    "detectron2": (
        "roi_heads.box_head.fc1.weight",
        "roi_heads.mask_head.mask_fcn1.weight",
        "roi_heads.box_predictor.cls_score.weight",
        "proposal_generator.rpn_head.conv.weight",
    ),
}


def _rcnn(state: State, convention: str) -> dict[str, Any]:
    box, mask, classes, neck = _RCNN[convention]
    head: dict[str, Any] = {"convention": convention, "box_width": _size(state, box)}
    masks = any(".mask_head." in name for name in state)
    if masks:
        head["mask_width"] = _size(state, mask)
    return dict(
        head="mask_rcnn" if masks else "faster_rcnn",
        num_classes=_size(state, classes) - 1,
        neck_kwargs={"out_channels": _size(state, neck, 1)},
        head_kwargs=head,
    )


def _cascade(state: State) -> dict[str, Any]:
    if (stages := _count(state, "roi_head.bbox_head.#.")) != 3:
        raise ValueError(f"a cascade of {stages} stages, only 3 are supported")
    if not any(name.startswith("roi_head.mask_head.0.") for name in state):
        raise ValueError("a cascade without masks, only Cascade Mask R-CNN is supported")
    first = "roi_head.bbox_head.0."
    convs, layers = _count(state, f"{first}shared_convs.#.conv"), _count(state, f"{first}shared_fcs.#.")
    classes, codes = _size(state, f"{first}fc_cls.weight") - 1, _size(state, f"{first}fc_reg.weight")
    kinds = {(4, 1, 4 * classes): "4conv1fc", (0, 2, 4): "2fc"}
    if (convs, layers, codes) not in kinds:
        raise ValueError(
            f"box heads with {convs} convolutions, {layers} fully connected layers and {codes} deltas for {classes} "
            "classes; supported are 4 and 1 with boxes by class, and 0 and 2 with class-agnostic boxes"
        )
    head = {
        "convention": "mmdet",
        "box_head": kinds[convs, layers, codes],
        "box_width": _size(state, f"{first}shared_fcs.0.weight"),
        "mask_width": _size(state, "roi_head.mask_head.0.convs.0.conv.weight"),
    }
    neck = {"out_channels": _size(state, "rpn_head.rpn_conv.weight", 1)}
    return dict(head="cascade_mask_rcnn", num_classes=classes, neck_kwargs=neck, head_kwargs=head)


def _retinanet(state: State, a3fpn: bool) -> dict[str, Any]:
    anchors, classes = _size(state, "bbox_head.retina_reg.weight") // 4, _size(state, "bbox_head.retina_cls.weight")
    if anchors != 9:
        raise ValueError(f"a RetinaNet with {anchors} anchors for each location, only 9 are supported")
    neck: dict[str, Any] = {"out_channels": _size(state, "bbox_head.retina_cls.weight", 1)}
    if not a3fpn:  # the first level beside those with a lateral convolution
        extra = f"neck.fpn_convs.{_count(state, 'neck.lateral_convs.#.')}.conv.weight"
        if (width := _size(state, extra, 1)) == neck["out_channels"]:
            raise ValueError(
                f"RetinaNet whose {extra} takes {width} channels, as all maps of its FPN: supported are P6 "
                "from the backbone's last map and no ReLU before P7 (add_extra_convs=on_input)"
            )
        neck["extra_levels"] = "input"
    head = {"convention": "mmdet", "detections_per_img": 100}
    return dict(head="retinanet", num_classes=classes // anchors, neck_kwargs=neck, head_kwargs=head)


def _upernet(state: State) -> dict[str, Any]:
    classifier, auxiliary = "decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight"
    arguments = dict(
        head="upernet",
        num_classes=_size(state, classifier),
        auxiliary=auxiliary in state,
        head_kwargs={"channels": _size(state, classifier, 1)},
    )
    if auxiliary in state:
        convs = _count(state, "auxiliary_head.convs.#.")
        arguments["auxiliary_kwargs"] = {"channels": _size(state, auxiliary, 1), "num_convs": convs}
    return arguments


def _semantic_fpn(state: State) -> dict[str, Any]:
    classifier = "decode_head.conv_seg.weight"
    return dict(
        head="semantic_fpn",
        num_classes=_size(state, classifier),
        auxiliary=False,
        neck_kwargs={"out_channels": _size(state, "neck.lateral_convs.0.conv.weight")},
        head_kwargs={"convention": "mmseg", "channels": _size(state, classifier, 1)},
    )


def _mask2former(state: State, task: str | None) -> tuple[str, dict[str, Any]]:
    if task is None:
        raise ValueError("the file of a Mask2Former does not show its task: pass --set task=segment or task=detect")
    pixels, queries = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    layer = f"{pixels}transformer.encoder.layers."
    levels = _size(state, f"{pixels}transformer.level_embed")
    if levels != 3:
        raise ValueError(f"a pixel decoder with attention to {levels} maps, only 3 are supported")
    settings = dict(
        feature_size=_size(state, f"{pixels}mask_features.weight", 1),
        mask_feature_size=_size(state, f"{pixels}mask_features.weight"),
        hidden_dim=_size(state, f"{queries}query_feat.weight", 1),
        # for each head and level four points of two coordinates
        num_attention_heads=_size(state, f"{layer}0.self_attn.sampling_offsets.weight") // (levels * 4 * 2),
        encoder_layers=_count(state, f"{layer}#."),
        encoder_feedforward_dim=_size(state, f"{layer}0.linear1.weight"),
        decoder_layers=_count(state, f"{queries}transformer_ffn_layers.#.") + 1,
        dim_feedforward=_size(state, f"{queries}transformer_ffn_layers.0.linear1.weight"),
        enforce_input_projection=f"{queries}input_proj.0.weight" in state,
        num_queries=_size(state, f"{queries}query_feat.weight"),
    )
    classes = _size(state, f"{queries}class_embed.weight") - 1
    arguments = dict(head="mask2former", num_classes=classes, head_kwargs=settings)
    return ("detect", arguments) if task == "detect" else ("segment", arguments | {"auxiliary": False})


def _conditional_detr(state: State) -> dict[str, Any]:
    head = from_conditional_detr({name: x for name, x in state.items() if not name.startswith(BACKBONE)}, "")
    settings = dict(
        width=_size(head, "class_embed.weight", 1),
        ffn_width=_size(head, "transformer.decoder.layers.0.linear1.weight"),
        encoder_layers=_count(head, "transformer.encoder.layers.#."),
        decoder_layers=_count(head, "transformer.decoder.layers.#."),
        num_queries=_size(head, "query_embed.weight"),
        size_divisor=1,
    )
    return dict(head="conditional_detr", num_classes=_size(head, "class_embed.weight"), head_kwargs=settings)


def check_anchors(state: State, model: Any) -> None:
    """Raise ValueError if the anchors in a file differ from the model's."""
    regions = isinstance(model, Detector) and model.kind == "two_stage"
    own = model.detector.rpn.anchor_generator.cell_anchors if regions else []
    for name, match in ((name, ANCHORS.fullmatch(name)) for name in state):
        if match is None:
            continue
        level = int(match[1])
        theirs, ours = state[name].float(), own[level].float() if level < len(own) else torch.empty(0, 4)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-3):  # pixels
            raise ValueError(f"{name} has the anchors {theirs.tolist()}, the model {ours.tolist()}")


# ---- what config.json states besides


def preprocessing(model: Any, known: Checkpoint | None = None) -> dict[str, Any]:
    """The images of a model, as training writes them to config.json; for published segmenters on ADE20K also the scale
    of the evaluation: short side of the crops, and at most four times that."""
    channels = model.arguments.get("in_chans", 3)
    images = {"in_chans": channels, "mean": model.arguments["mean"], "std": model.arguments["std"]}
    if isinstance(model, Detector):
        transform: Any = model.detector.transform
        return images | {"short_side": transform.min_size[-1], "max_size": transform.max_size}
    if known is None or known.input is None or "ade20k" not in known.tag:
        return images
    side = min(known.input[1:])
    # mmsegmentation resizes by OpenCV, detectron2 by Pillow, which antialiases
    return images | {"inference": {"scale": [4 * side, side], "antialias": known.keys == "detectron2"}}


# of the 91 ids, with names for those that have none
COCO_BY_ID = [
    f"class {i}" if name in ("N/A", "__background__") else name
    for i, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
]


def class_names(checkpoint: Mapping[str, Any], count: int, by_id: Mapping[str, str] | None = None) -> list[str]:
    """The ``count`` class names that mmcv or mmengine stored in a checkpoint, or those of transformers' ``id2label``;
    ``class 0`` ... for classes without a name."""
    if by_id is not None:
        names = [by_id.get(str(i), "N/A") for i in range(count)]
        return [f"class {i}" if name == "N/A" else name for i, name in enumerate(names)]
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    nested = meta.get("dataset_meta")
    for names in (meta.get("CLASSES"), nested.get("classes") if isinstance(nested, Mapping) else None):
        if isinstance(names, Sequence) and not isinstance(names, str) and len(names) == count:
            return [str(name) for name in names]
    return [f"class {i}" for i in range(count)]
