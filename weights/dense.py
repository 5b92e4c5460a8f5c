"""Whole detectors and segmenters of mmdetection, mmsegmentation and detectron2: what a file is of."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..heads.build import build_dense
from ..heads.detection import Detector
from .cards import DENSE_HEADS
from .manifest import Checkpoint
from .names import ANCHORS, STATISTICS, State

# What the tags of published files name: dataset (and task), classes.
_CLASSES = {
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
    """What the manifest or the user knows of a dense file and its tensors do not show.

    Attributes:
        arguments: of the model.
        bgr: the file's first filters are for blue, green and red.
        task: ``"detect"``, ``"segment"`` or ``"panoptic"``, if known.
    """

    arguments: dict[str, Any]
    bgr: bool
    task: str | None

    def for_timm(self) -> dict[str, Any]:
        """The arguments of the backbone alone, built by timm.

        Raises:
            ValueError: if timm has none like it, or its configuration could not state the channel order.
        """
        arguments = dict(self.arguments)
        first = arguments.pop("stride_in_1x1", False)
        if own := ["stride_in_1x1=true"] * first + ["channel_order=bgr"] * self.bgr:
            raise ValueError(f"timm has no backbone with {', '.join(own)}: convert it whole, without --backbone")
        return arguments


def source_metadata(state: State, arguments: Mapping[str, Any], known: Checkpoint | None) -> SourceMetadata:
    """What is known of a file besides its tensors: of detectron2's, what its configuration says.

    Args:
        arguments: the user's, of the model, with ``channel_order`` and ``task``.
        known: the published file that it is.

    Raises:
        ValueError: if something is not known (the message lists it), has no possible value or another than in the file,
            or if ``known`` is a classifier.
    """
    if known is not None and known.task == "classify":
        raise ValueError(f"a dense model, but {known.name} is a classifier")
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
    for key in ("mean", "std"):
        if key in arguments:
            _check_statistics(key, arguments[key], channels)
    stored = _stored_statistics(state, order == "bgr", channels)
    if missing := _missing(state, arguments, order, () if known is not None else {"mean", "std"} - stored.keys()):
        raise ValueError(
            f"detectron2 keeps some facts in its configuration, not in the file; give them with --set: {missing}"
        )
    for key, values in stored.items():
        stated = arguments.get(key) or (known and getattr(known, key)) or values
        if not torch.allclose(torch.tensor(stated), torch.tensor(values), rtol=1e-5, atol=1e-6):
            source = "given" if key in arguments or known is None else known.name
            raise ValueError(f"pixel_{key} in the file, over 255 and in RGB, is {values}; {source}: {list(stated)}")
    if known is None:
        arguments = stored | arguments
    return SourceMetadata(arguments, order == "bgr", task)


def _stored_statistics(state: State, bgr: bool, channels: int) -> dict[str, list[float]]:
    """Mean and standard deviation that old files hold, of RGB in [0, 1]."""
    stored = {}
    for name, key in zip(STATISTICS, ("mean", "std"), strict=True):
        if name in state:
            values = state[name].flatten().double() / 255
            stored[key] = (values.flip(0) if bgr else values).tolist()
            _check_statistics(name, stored[key], channels)
    return stored


def _missing(state: State, arguments: Mapping[str, Any], order: str | None, statistics: Collection[str]) -> str:
    """What detectron2's configuration says and nobody has told."""
    resnet = any(name.startswith(("backbone.res2.", "backbone.bottom_up.res2.")) for name in state)
    if not resnet and not any(name.startswith("proposal_generator.") for name in state):
        return ""
    missing = []
    if resnet and arguments.get("stride_in_1x1") is None:
        missing.append("stride_in_1x1=true or false (MODEL.RESNETS.STRIDE_IN_1X1)")
    if order is None:
        missing.append("channel_order=bgr or rgb (INPUT.FORMAT)")
    for key in sorted(set(statistics) - arguments.keys()):
        missing.append(f"{key}=[...] (MODEL.PIXEL_{key.upper()} over 255, in RGB)")
    return "; ".join(missing)


def _check_statistics(key: str, values: Any, channels: int) -> None:
    least = 0 if key == "mean" else 1e-6
    numbers = isinstance(values, (list, tuple)) and all(isinstance(each, (int, float)) for each in values)
    if not numbers or len(values) != channels or not all(least <= each <= 1 for each in values):
        raise ValueError(f"{key} is {values!r}, must be {channels} numbers from 0 to 1, one for each channel")


# ---- what a file shows by its names and shapes


@dataclass(frozen=True)
class HeadConfig:
    """What a checkpoint is of: the task and the builder's arguments, without the backbone and its own ones."""

    task: str
    arguments: dict[str, Any]

    def build(self, architecture: str, arguments: Mapping[str, Any], mean: Any = None, std: Any = None) -> nn.Module:
        """The model on a backbone with these arguments; those of neck and heads add to the config's."""
        merged = {**self.arguments, "mean": mean, "std": std}
        for key, value in arguments.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = {**merged[key], **value} if both else value
        try:
            return build_dense(self.task, {"name": architecture, **merged}).eval()
        except TypeError as error:
            raise ValueError(f"{architecture} does not take these arguments: {error}") from error

    def check_tag(self, known: Checkpoint) -> None:
        """Raises ValueError if the tag of a published file names another head, neck or number of classes."""
        a3fpn = known.tag.startswith("a3fpn_")
        expected = {
            "head": head_of(known),
            "neck": "a3fpn" if a3fpn else "fpn",
            "num_classes": next((count for dataset, count in _CLASSES.items() if dataset in known.tag), None),
        }
        if wrong := {key: value for key, value in expected.items() if value not in (None, self.arguments[key])}:
            got = ", ".join(f"{key} {self.arguments[key]}" for key in wrong)
            raise ValueError(
                f"it has {got}; {known.name}: {', '.join(f'{key} {value}' for key, value in wrong.items())}"
            )


def head_of(known: Checkpoint) -> str | None:
    """The head that the tag of a published file names; None if there is no such head here."""
    tag = known.tag.removeprefix("a3fpn_")
    return next((head for start, head in DENSE_HEADS.items() if tag.startswith(f"{start}_")), None)


def head_config(state: State, task: str | None = None) -> HeadConfig:
    """What the names and shapes of a whole dense model show.

    Args:
        task: of a Mask2Former, whose file does not show it; ``"panoptic"`` ones become segmenters.

    Raises:
        ValueError: if this package has no such model, or none with the same outputs; the message says what it has.
    """

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in state)

    a3fpn = any("a3fpn_body." in name for name in state)
    if has("sem_seg_head.predictor.class_embed."):
        task, arguments = _mask2former(state, task)
    elif has("roi_head.bbox_head.0."):
        task, arguments = "detect", _cascade(state)
    elif has("proposal_generator.rpn_head.") and has("roi_heads.box_head.fc1."):
        task, arguments = "detect", _rcnn(state, "detectron2")
    elif has("rpn_head.") and has("roi_head.bbox_head.shared_fcs."):
        task, arguments = "detect", _rcnn(state, "mmdet")
    elif has("bbox_head.retina_cls.") and a3fpn:
        task, arguments = "detect", _retinanet(state)
    elif has("decode_head.psp_modules."):
        task, arguments = "segment", _upernet(state)
    else:
        raise ValueError(next((text for start, text in _OTHERS.items() if has(start)), None) or _no_heads(state))
    return HeadConfig(task, {"neck": "a3fpn" if a3fpn else "fpn", **arguments})


_OTHERS = {
    "roi_heads.box_head.0.": "detectron2's cascade of heads (roi_heads.box_head.0 ...) is not supported",
    "bbox_head.retina_cls.": "RetinaNet on an FPN: mmdetection makes P6 from C5, or P7 without a ReLU before it, "
    "torchvision's does neither, so the outputs would differ",
    "decode_head.scale_heads.": "mmsegmentation's FPNHead has BatchNorm where the semantic FPN here, as in its paper, "
    "has GroupNorm",
}


def _no_heads(state: State) -> str:
    groups = sorted({name.partition(".")[0] for name in state} - {"backbone"})
    return f"this package has no heads like {', '.join(groups) or 'none'}"


def _size(state: State, name: str, axis: int = 0) -> int:
    if name not in state:
        raise ValueError(f"it has no {name}, which would show its width")
    return state[name].shape[axis]


def _count(state: State, pattern: str) -> int:
    """How many different numbers the names have at ``#``."""
    found = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
    return len({match[1] for match in map(found.match, state) if match})


# Where the width of a box head, of a mask head, the number of classes and the neck's width are seen.
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
        raise ValueError(f"a cascade of {stages} stages, here are 3")
    if not any(name.startswith("roi_head.mask_head.0.") for name in state):
        raise ValueError("a cascade without masks; here is Cascade Mask R-CNN")
    first = "roi_head.bbox_head.0."
    convs, layers = _count(state, f"{first}shared_convs.#.conv"), _count(state, f"{first}shared_fcs.#.")
    classes, codes = _size(state, f"{first}fc_cls.weight") - 1, _size(state, f"{first}fc_reg.weight")
    kinds = {(4, 1, 4 * classes): "4conv1fc", (0, 2, 4): "2fc"}
    if (convs, layers, codes) not in kinds:
        raise ValueError(
            f"box heads with {convs} convolutions, {layers} fully connected layers and {codes} deltas for {classes} "
            "classes; here are heads with 4 and 1 and boxes by class, and with 0 and 2 and one box for all"
        )
    head = {
        "convention": "mmdet",
        "box_head": kinds[convs, layers, codes],
        "box_width": _size(state, f"{first}shared_fcs.0.weight"),
        "mask_width": _size(state, "roi_head.mask_head.0.convs.0.conv.weight"),
    }
    return dict(
        head="cascade_mask_rcnn",
        num_classes=classes,
        neck_kwargs={"out_channels": _size(state, "rpn_head.rpn_conv.weight", 1)},
        head_kwargs=head,
    )


def _retinanet(state: State) -> dict[str, Any]:
    anchors, classes = _size(state, "bbox_head.retina_reg.weight") // 4, _size(state, "bbox_head.retina_cls.weight")
    if anchors != 9:
        raise ValueError(f"a RetinaNet with {anchors} anchors at each place, here are 9")
    return dict(
        head="retinanet",
        num_classes=classes // anchors,
        neck_kwargs={"out_channels": _size(state, "bbox_head.retina_cls.weight", 1)},
        head_kwargs={"convention": "mmdet", "detections_per_img": 100},
    )


def _upernet(state: State) -> dict[str, Any]:
    auxiliary = "auxiliary_head.conv_seg.weight" in state
    arguments = dict(
        head="upernet",
        num_classes=_size(state, "decode_head.conv_seg.weight"),
        auxiliary=auxiliary,
        head_kwargs={"channels": _size(state, "decode_head.conv_seg.weight", 1)},
    )
    if auxiliary:
        channels = _size(state, "auxiliary_head.conv_seg.weight", 1)
        arguments["auxiliary_kwargs"] = {"channels": channels, "num_convs": _count(state, "auxiliary_head.convs.#.")}
    return arguments


def _mask2former(state: State, task: str | None) -> tuple[str, dict[str, Any]]:
    if task is None:
        raise ValueError(
            "a Mask2Former, whose file does not show whether it segments images or detects objects: give --set "
            "task=segment or --set task=detect"
        )
    pixels, queries = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    layer = f"{pixels}transformer.encoder.layers."
    levels = _size(state, f"{pixels}transformer.level_embed")
    if levels != 3:
        raise ValueError(f"its pixel decoder attends to {levels} maps, that of Mask2Former here to 3")
    settings = dict(
        feature_size=_size(state, f"{pixels}mask_features.weight", 1),
        mask_feature_size=_size(state, f"{pixels}mask_features.weight"),
        hidden_dim=_size(state, f"{queries}query_feat.weight", 1),
        # of each head, for each of the levels, four points of two coordinates
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


def check_anchors(state: State, model: Any) -> None:
    """Raises ValueError if the anchors that a file holds are not those of the model that it becomes."""
    rpn = getattr(getattr(model, "detector", None), "rpn", None)
    own = rpn.anchor_generator.cell_anchors if rpn is not None else []
    for name in filter(ANCHORS.fullmatch, state):
        level = int(ANCHORS.fullmatch(name)[1])
        theirs, ours = state[name].float(), own[level].float() if level < len(own) else torch.empty(0, 4)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-3):  # pixels
            raise ValueError(f"its anchors {name} are {theirs.tolist()}, here they are {ours.tolist()}")


# ---- what is written beside the weights


def preprocessing(model: Any, known: Checkpoint | None = None) -> dict[str, Any]:
    """What a reader of config.json should know of the images, as training writes it; of a published segmenter of ADE20K
    also the size at which it was evaluated, its crops' short side and four times that at most."""
    channels = model.arguments.get("in_chans", 3)
    images = {"in_chans": channels, "mean": model.arguments["mean"], "std": model.arguments["std"]}
    if isinstance(model, Detector):
        transform: Any = model.detector.transform
        return images | {"short_side": transform.min_size[-1], "max_size": transform.max_size}
    if known is None or known.input is None or "ade20k" not in known.tag:
        return images
    side = min(known.input[1:])
    # mmsegmentation resizes by OpenCV, detectron2 by Pillow
    return images | {"inference": {"scale": [4 * side, side], "antialias": known.keys == "detectron2"}}


def class_names(checkpoint: Mapping[str, Any], count: int) -> list[str]:
    """The names of the classes that mmcv or mmengine wrote into a checkpoint; ``class 0`` ... if not ``count`` of
    them."""
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    nested = meta.get("dataset_meta")
    for names in (meta.get("CLASSES"), nested.get("classes") if isinstance(nested, Mapping) else None):
        if isinstance(names, Sequence) and not isinstance(names, str) and len(names) == count:
            return [str(name) for name in names]
    return [f"class {i}" for i in range(count)]
