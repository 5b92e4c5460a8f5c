"""Whole detectors and segmenters of mmdetection, mmsegmentation and detectron2: what they are, and where their tensors
belong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.build import build_detector, build_segmenter
from ..heads.detection import Detector
from ..heads.detection.published import from_published
from ..heads.mask2former import answers
from ..heads.necks.a3fpn import A3FPN, published_state
from ..heads.segmentation.published import from_mask2former, from_mmseg
from .manifest import Checkpoint

State = Mapping[str, Tensor]
BACKBONE = "backbone."
NECK = re.compile(  # A3-FPN's
    r"(neck|backbone\.a3fpn|decode_head\.a3fpn|sem_seg_head\.pixel_decoder\.a3fpn)"
    r"\.(a3fpn_body\.|conv[0-4]+\.|extra_convs\.)"
)
ORDERS = ("rgb", "bgr")
# in files of older versions of detectron2, which learn neither
STATISTICS = ("pixel_mean", "pixel_std")
_STORED = dict(zip(STATISTICS, ("mean", "std"), strict=True))
ANCHORS = re.compile(r"proposal_generator\.anchor_generator\.cell_anchors\.(\d+)")  # of each level


@dataclass(frozen=True)
class Plan:
    """What a checkpoint is of: the builder's arguments but the backbone's name and own ones."""

    build: Callable[..., nn.Module]
    arguments: dict[str, Any]

    @property
    def task(self) -> str:
        return "detect" if self.build is build_detector else "segment"


# what the tags of published files say: head; dataset (and task), classes
_HEADS = {
    "maskrcnn": "mask_rcnn",
    "cascade": "cascade_mask_rcnn",
    "faster_rcnn": "faster_rcnn",
    "retinanet": "retinanet",
    "upernet": "upernet",
    "mask2former": "mask2former",
}
_CLASSES = {
    "coco_panoptic": 133,
    "coco": 80,
    "ade20k_instance": 100,
    "ade20k": 150,
    "cityscapes_instance": 8,
    "cityscapes": 19,
    "voc": 20,
}


@dataclass(frozen=True)
class Told:
    """What a file does not tell, but the manifest or the user.

    Attributes:
        arguments: of the model.
        bgr: the file's first filters are for blue, green and red.
        task: ``"detect"``, ``"segment"`` or ``"panoptic"``, if known.
    """

    arguments: dict[str, Any]
    bgr: bool
    task: str | None


def told(state: State, arguments: Mapping[str, Any], known: Checkpoint | None) -> Told:
    """What is known of a file besides its tensors: of detectron2's, what its configuration says.

    Raises:
        ValueError: if something of it is not known (the message lists it), said in a way that it cannot be or otherwise
            than by the file, or if ``known`` is a classifier.
    """
    if known is not None and known.task == "classify":
        raise ValueError(f"it is of a dense model, {known.name} is a classifier: it is not that checkpoint")
    arguments = dict(arguments)
    given = {key: arguments.pop(key, None) for key in ("channel_order", "task")}
    order = given["channel_order"] or (known and known.channel_order)
    if order not in (None, *ORDERS):
        raise ValueError(f"channel_order is {order!r}, it must be one of {', '.join(ORDERS)}")
    task = given["task"] or (known and known.task)
    if given["task"] not in (None, "detect", "segment"):
        raise ValueError(f"task is {given['task']!r}, it must be detect or segment")
    resnet = any(name.startswith(("backbone.res2.", "backbone.bottom_up.res2.")) for name in state)
    regions = any(name.startswith("proposal_generator.") for name in state)
    stored = {key: state[name].flatten().double() / 255 for name, key in _STORED.items() if name in state}
    stored = {key: (value.flip(0) if order == "bgr" else value).tolist() for key, value in stored.items()}
    _check_said(arguments)
    if order == "bgr" and arguments.get("in_chans", 3) != 3:
        raise ValueError(f"channel_order is bgr, but the images have {arguments['in_chans']} channels")
    missing = []
    if resnet and "stride_in_1x1" not in arguments:
        missing.append(
            "stride_in_1x1=true or false (MODEL.RESNETS.STRIDE_IN_1X1: a block strides in its first convolution, 1x1, "
            "or in its second, 3x3)"
        )
    if (resnet or regions) and order is None:
        missing.append("channel_order=bgr or rgb (INPUT.FORMAT)")
    for key in ("mean", "std") if resnet or regions else ():
        if known is None and key not in (*arguments, *stored):
            missing.append(f"{key}=[...] (MODEL.PIXEL_{key.upper()} over 255, in the order red, green, blue)")
    if missing:
        raise ValueError(
            f"it is detectron2's, and does not tell what its configuration does. Say with --set: {'; '.join(missing)}"
        )
    for key, values in stored.items():
        said = arguments.get(key) or (known and getattr(known, key)) or values
        if len(said) != len(values) or not torch.allclose(
            torch.tensor(said), torch.tensor(values), rtol=1e-5, atol=1e-6
        ):
            raise ValueError(
                f"its pixel_{key} over 255, in the order red, green, blue, is {values}, but {key} is said to be "
                f"{list(said)}" + ("" if key in arguments else f" of {known.name}")
            )
        if known is None:
            arguments.setdefault(key, values)
    _check_said(arguments)
    return Told(arguments, order == "bgr", task)


def _check_said(arguments: Mapping[str, Any]) -> None:
    first, channels = arguments.get("stride_in_1x1", False), arguments.get("in_chans", 3)
    if not isinstance(first, bool):
        raise ValueError(f"stride_in_1x1 is {first!r}, it must be true or false")
    for key in [key for key in ("mean", "std") if key in arguments]:
        values = arguments[key]
        numbers = isinstance(values, (list, tuple)) and all(isinstance(each, (int, float)) for each in values)
        inside = numbers and all((0 if key == "mean" else 1e-6) <= each <= 1 for each in values)
        if not inside or len(values) != channels:
            raise ValueError(f"{key} is {values!r}, it must be {channels} numbers from 0 to 1, one for each channel")


def plan(state: State, task: str | None = None) -> Plan:
    """What the names and shapes of a whole dense model tell of it.

    Args:
        task: of a Mask2Former, whose file does not tell it; ``"panoptic"`` ones become segmenters.

    Raises:
        ValueError: if this package has no such model, or none that answers as the published one; the message says what
            there is and why it is not read.
    """
    names = tuple(state)
    groups = sorted({name.partition(".")[0] for name in names} - {"backbone"})

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    a3fpn = any("a3fpn_body." in name for name in names)
    if has("sem_seg_head.predictor.class_embed."):
        return _mask2former(state, task, a3fpn)
    if has("roi_heads.box_head.0."):
        raise ValueError("it is detectron2's cascade of heads (roi_heads.box_head.0 ...), which is not converted here")
    if has("roi_head.bbox_head.0."):
        return _cascade(state, a3fpn)
    if has("proposal_generator.rpn_head.") and has("roi_heads.box_head.fc1."):
        return _rcnn(state, a3fpn, has("roi_heads.mask_head."), _DETECTRON2, "detectron2")
    if has("rpn_head.") and has("roi_head.bbox_head.shared_fcs."):
        return _rcnn(state, a3fpn, has("roi_head.mask_head."), _MMDET, "mmdet")
    if has("bbox_head.retina_cls.") and a3fpn:
        return _retinanet(state)
    if has("bbox_head.retina_cls."):
        raise ValueError(
            "it is a RetinaNet on an FPN: mmdetection makes P6 from C5, or P7 without a ReLU before it, torchvision's "
            "does neither, so the answers would differ"
        )
    if has("decode_head.psp_modules."):
        return _upernet(state, a3fpn)
    if has("decode_head.scale_heads."):
        raise ValueError(
            "its head is mmsegmentation's FPNHead, with BatchNorm where the semantic FPN here, as its paper, has "
            "GroupNorm"
        )
    raise ValueError(f"this package has no heads like {', '.join(groups) or 'none'}")


def check_tag(plan: Plan, known: Checkpoint) -> None:
    """Compare what a file is of with what the tag of a published one says.

    Raises:
        ValueError: if the head, the neck or the number of classes is another.
    """
    head = next((head for start, head in _HEADS.items() if known.tag.removeprefix("a3fpn_").startswith(start)), None)
    classes = next((count for dataset, count in _CLASSES.items() if dataset in known.tag), None)
    neck = "a3fpn" if known.tag.startswith("a3fpn_") else "fpn"
    expected = {"head": head, "neck": neck, "num_classes": classes}
    if wrong := {key: value for key, value in expected.items() if value not in (None, plan.arguments[key])}:
        got = ", ".join(f"{key} {plan.arguments[key]}" for key in wrong)
        raise ValueError(
            f"it has {got}, {known.name} has {', '.join(f'{key} {value}' for key, value in wrong.items())}: it is not "
            "that checkpoint"
        )


def timm_alone(told: Told) -> dict[str, Any]:
    """The arguments of a backbone that timm builds.

    Raises:
        ValueError: if it has none like it, or its configuration could not say what images it takes.
    """
    arguments = dict(told.arguments)
    first = arguments.pop("stride_in_1x1", False)
    if first or told.bgr:
        what = "stride_in_1x1 true" if first else "channel_order bgr"
        raise ValueError(f"its backbone has {what}, timm's do not: convert it whole, without --backbone")
    return arguments


def build(plan: Plan, architecture: str, arguments: Mapping[str, Any], mean: Any = None, std: Any = None) -> nn.Module:
    """The model of a plan on a backbone with these arguments; those of neck and heads add to the plan's."""
    merged = {**plan.arguments, "mean": mean, "std": std}
    for key, value in arguments.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    try:
        return plan.build(architecture, **merged).eval()
    except TypeError as error:
        raise ValueError(f"{architecture} does not take these arguments: {error}") from error


def preprocessing(model: nn.Module, known: Checkpoint | None = None) -> dict[str, Any]:
    """What a reader of config.json should know of the images, as training writes it; of a published segmenter of ADE20K
    also the size at which it was evaluated, its crops' short side and four times that at most."""
    channels = model.arguments.get("in_chans", 3)
    images = {"in_chans": channels, "mean": model.arguments["mean"], "std": model.arguments["std"]}
    if not isinstance(model, Detector):
        if known is None or known.input is None or "ade20k" not in known.tag:
            return images
        side = min(known.input[1:])
        # mmsegmentation resizes by OpenCV, detectron2 by Pillow
        return images | {"inference": {"bounds": [4 * side, side], "antialias": known.keys == "detectron2"}}
    transform = model.detector.transform
    return images | {"short_side": transform.min_size[-1], "max_size": transform.max_size}


def features_of(model: nn.Module) -> tuple[str, nn.Module]:
    """What stands before the names of a dense model's backbone, and that, without what timm puts around it."""
    prefix = "detector.backbone.features.network." if isinstance(model, Detector) else "features.network."
    network = model.get_submodule(prefix.rstrip("."))
    wrapped = type(network).__name__ == "FeatureGetterNet"
    return (f"{prefix}model.", network.model) if wrapped else (prefix, network)


def body(names: Iterable[str]) -> dict[str, str]:
    """The names of the backbone's tensors and what they are without what detectron2 puts before them beside a neck."""
    names = [name for name in names if name.startswith(BACKBONE)]
    below = f"{BACKBONE}bottom_up."
    prefix = below if any(name.startswith(below) for name in names) else BACKBONE
    return {name: BACKBONE + name[len(prefix) :] for name in names if name.startswith(prefix)}


def translated(
    state: State, model: nn.Module, backbone: Callable[[State, nn.Module], State], bgr: bool = False
) -> dict[str, Tensor]:
    """A published state under the names of ``model``.

    Args:
        backbone: gives the backbone's tensors its own names.
        bgr: the first filters are turned round.

    Raises:
        ValueError: names that are no part of it.
    """
    prefix, network = features_of(model)
    own = body(state)
    result = {
        prefix + name: tensor for name, tensor in backbone({own[name]: state[name] for name in own}, network).items()
    }
    if bgr:
        first = f"{prefix}{network.pretrained_cfg['first_conv']}.weight"
        result[first] = result[first].flip(1)
    between = {name: tensor for name, tensor in state.items() if NECK.match(name)}
    for place, neck in model.named_modules():
        if isinstance(neck, A3FPN):
            result |= {f"{place}.{name}": tensor for name, tensor in published_state(neck, between).items()}
    rest = {name: state[name] for name in state if not (name in own or name in between or _not_learned(name))}
    detector = isinstance(model, Detector)
    if model.arguments["head"] == "mask2former":
        return result | from_mask2former(rest, "detector.head." if detector else "head.")
    return result | (from_published(rest) if detector else from_mmseg(rest))


def may_be_unread(name: str) -> bool:
    """Whether a tensor may stay behind: of A3-FPN, of which the authors compute parts that nothing reads, or statistics
    of the images and anchors, which are no weights here."""
    return NECK.match(name) is not None or _not_learned(name)


def _not_learned(name: str) -> bool:
    return name in STATISTICS or ANCHORS.fullmatch(name) is not None


def check_anchors(state: State, model: nn.Module) -> None:
    """Compare the anchors that a file holds with those of the model that it becomes.

    Raises:
        ValueError: if they are others.
    """
    rpn = getattr(getattr(model, "detector", None), "rpn", None)
    own = rpn.anchor_generator.cell_anchors if rpn is not None else []
    for name in state:
        if not (found := ANCHORS.fullmatch(name)):
            continue
        level = int(found[1])
        theirs, ours = state[name].float(), own[level].float() if level < len(own) else torch.empty(0, 4)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-3):  # pixels
            raise ValueError(f"its anchors {name} are {theirs.tolist()}, here they are {ours.tolist()}")


def of_timm(state: State, network: nn.Module) -> dict[str, Tensor]:
    """timm's names for the stem of ResNet-C, as mmdetection and mmsegmentation name it, whose last norm stands where
    other ResNets have their first, and for detectron2's ResNet, whose frozen norms do not count batches; others as they
    are.

    Raises:
        ValueError: if the file has such a stem and the network has not.
    """
    own = network.state_dict()
    if any(re.search(r"(^|\.)res2\.\d+\.conv1\.", name) for name in state) and "layer1.0.conv1.weight" in own:
        return _of_detectron2(state, own)
    if not any(re.search(r"(^|\.)stem\.7\.", name) for name in state) or "bn1.weight" not in own:
        return dict(state)
    if "conv1.3.weight" not in own:
        raise ValueError("its stem has three convolutions, as that of ResNet-C: timm's resnet50c, for one")
    places = {"stem.7.": "bn1.", **{f"stem.{i}.": f"conv1.{i}." for i in (0, 1, 3, 4, 6)}}
    pattern = re.compile(r"(?<![^.])stem\.[013467]\.")
    return {pattern.sub(lambda found: places[found[0]], name, count=1): tensor for name, tensor in state.items()}


def _of_detectron2(state: State, own: State) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        for theirs, ours in _RESNET:
            name = theirs.sub(ours, name)
        name = re.sub(r"(^|\.)res(\d)\.", lambda found: f"{found[1]}layer{int(found[2]) - 1}.", name)
        result[name] = tensor
    for name in [name for name in result if name.endswith(".running_mean")]:
        count = f"{name.removesuffix('running_mean')}num_batches_tracked"
        if count not in result and count.removeprefix(BACKBONE) in own:
            result[count] = torch.zeros((), dtype=torch.int32)
    return result


class Raw(nn.Module):
    """What a dense model computes before anything is selected: numbers that change little where weights change little,
    as its detections do not. For `fingerprint`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[1, C, H, W]`` to the maps of the neck, the logits and deltas on them, and of four fixed regions the
        classes, boxes and mask logits; a segmenter's logits; the logits of Mask2Former's classes and masks."""
        if self.model.arguments["head"] == "mask2former":
            return self._queries(image)
        if not isinstance(self.model, Detector):
            return [self.model(image)]
        detector = self.model.detector
        maps = self.model.pyramid(image)
        levels = list(maps.values())
        if not hasattr(detector, "rpn"):
            found = detector.head(levels)
            return [*levels, *(found[key] for key in sorted(found))]
        logits, deltas = detector.rpn.head(levels)
        heads, (rows, columns) = detector.roi_heads, image.shape[-2:]
        share = torch.tensor([[0, 0, 1, 1], [0.1, 0.2, 0.3, 0.5], [0.4, 0.3, 0.55, 0.6], [0.2, 0.1, 0.9, 0.8]])
        regions = [share.to(image) * torch.tensor([columns, rows, columns, rows]).to(image)]
        pooled = heads.box_roi_pool(maps, regions, [(rows, columns)])
        stages = zip(_stages(heads.box_head), _stages(heads.box_predictor), strict=True)
        boxes = [part for head, predictor in stages for part in predictor(head(pooled))]
        masks = []
        if self.model.masks:
            pooled = heads.mask_roi_pool(maps, regions, [(rows, columns)])
            stages = zip(_stages(heads.mask_head), _stages(heads.mask_predictor), strict=True)
            masks = [predictor(head(pooled)) for head, predictor in stages]
        return [*levels, *logits, *deltas, *boxes, *masks]

    def _queries(self, image: Tensor) -> list[Tensor]:
        """Every query attends everywhere: whether a place is outside its mask hangs on the sign of a logit."""
        head = (self.model.detector if isinstance(self.model, Detector) else self.model).head
        predictor = head.model.transformer_module.decoder.mask_predictor
        handle = predictor.register_forward_hook(lambda _, __, found: (found[0], torch.zeros_like(found[1])))
        try:
            return [layers[-1] for layers in answers(head, image)]
        finally:
            handle.remove()


def _stages(part: nn.Module) -> list[nn.Module]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def names_of_classes(checkpoint: Mapping[str, Any], count: int) -> list[str] | None:
    """The names of the classes that mmcv or mmengine wrote into a checkpoint; None if there are not ``count``."""
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    nested = meta.get("dataset_meta")
    for names in (meta.get("CLASSES"), nested.get("classes") if isinstance(nested, Mapping) else None):
        if isinstance(names, Sequence) and not isinstance(names, str) and len(names) == count:
            return [str(name) for name in names]
    return None


# ---- by the shapes


def _size(state: State, name: str, axis: int = 0) -> int:
    if name not in state:
        raise ValueError(f"it has no {name}, which would tell its width")
    return state[name].shape[axis]


# where a box head, a mask head, the classes and the neck's width are seen
_MMDET = {
    "box": "roi_head.bbox_head.shared_fcs.0.weight",
    "mask": "roi_head.mask_head.convs.0.conv.weight",
    "classes": "roi_head.bbox_head.fc_cls.weight",
    "neck": "rpn_head.rpn_conv.weight",
}
_DETECTRON2 = {
    "box": "roi_heads.box_head.fc1.weight",
    "mask": "roi_heads.mask_head.mask_fcn1.weight",
    "classes": "roi_heads.box_predictor.cls_score.weight",
    "neck": "proposal_generator.rpn_head.conv.weight",
}
_RESNET = [  # detectron2's name, timm's
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"(^|\.)stem\.conv1\.norm\.", r"\1bn1."),
        (r"(^|\.)stem\.conv1\.", r"\1conv1."),
        (r"\.shortcut\.norm\.", ".downsample.1."),
        (r"\.shortcut\.", ".downsample.0."),
        (r"\.conv(\d)\.norm\.", r".bn\1."),
    )
]


def _rcnn(state: State, a3fpn: bool, masks: bool, places: Mapping[str, str], convention: str) -> Plan:
    head: dict[str, Any] = {"convention": convention, "box_width": _size(state, places["box"])}
    if masks:
        head["mask_width"] = _size(state, places["mask"])
    kind, neck = "mask_rcnn" if masks else "faster_rcnn", "a3fpn" if a3fpn else "fpn"
    arguments = dict(
        head=kind,
        neck=neck,
        num_classes=_size(state, places["classes"]) - 1,
        neck_kwargs={"out_channels": _size(state, places["neck"], 1)},
        head_kwargs=head,
    )
    return Plan(build_detector, arguments)


def _mask2former(state: State, task: str | None, a3fpn: bool) -> Plan:
    if task is None:
        raise ValueError(
            "it is a Mask2Former, and its file does not tell whether it is for the class of each pixel or for objects: "
            "say --set task=segment or --set task=detect"
        )
    pixels, queries = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    layer = f"{pixels}transformer.encoder.layers."
    levels = _size(state, f"{pixels}transformer.level_embed")
    if levels != 3:
        raise ValueError(f"its pixel decoder attends to {levels} maps, that of Mask2Former here to 3")
    count = lambda start: len({name[len(start) :].split(".")[0] for name in state if name.startswith(start)})  # noqa: E731
    settings = dict(
        feature_size=_size(state, f"{pixels}mask_features.weight", 1),
        mask_feature_size=_size(state, f"{pixels}mask_features.weight"),
        hidden_dim=_size(state, f"{queries}query_feat.weight", 1),
        # of each head, for each of the levels, four points of two coordinates
        num_attention_heads=_size(state, f"{layer}0.self_attn.sampling_offsets.weight") // (levels * 4 * 2),
        encoder_layers=count(layer),
        encoder_feedforward_dim=_size(state, f"{layer}0.linear1.weight"),
        decoder_layers=count(f"{queries}transformer_ffn_layers.") + 1,
        dim_feedforward=_size(state, f"{queries}transformer_ffn_layers.0.linear1.weight"),
        enforce_input_projection=f"{queries}input_proj.0.weight" in state,
        num_queries=_size(state, f"{queries}query_feat.weight"),
    )
    arguments = dict(
        head="mask2former",
        neck="a3fpn" if a3fpn else "fpn",
        num_classes=_size(state, f"{queries}class_embed.weight") - 1,
        head_kwargs=settings,
    )
    if task == "detect":
        return Plan(build_detector, arguments)
    return Plan(build_segmenter, arguments | {"auxiliary": False})


def _cascade(state: State, a3fpn: bool) -> Plan:
    stages = {name.split(".")[2] for name in state if name.startswith("roi_head.bbox_head.")}
    if stages != {"0", "1", "2"}:
        raise ValueError(f"it is a cascade of {len(stages)} stages, here are 3")
    if not any(name.startswith("roi_head.mask_head.0.") for name in state):
        raise ValueError("it is a cascade without masks, here is Cascade Mask R-CNN")
    first = "roi_head.bbox_head.0."
    convs = sum(bool(re.match(r"roi_head\.bbox_head\.0\.shared_convs\.\d\.conv\.weight", name)) for name in state)
    layers = sum(bool(re.match(r"roi_head\.bbox_head\.0\.shared_fcs\.\d\.weight", name)) for name in state)
    classes, codes = _size(state, f"{first}fc_cls.weight") - 1, _size(state, f"{first}fc_reg.weight")
    kinds = {(4, 1, 4 * classes): "4conv1fc", (0, 2, 4): "2fc"}
    if (convs, layers, codes) not in kinds:
        raise ValueError(
            f"its box heads have {convs} convolutions, {layers} fully connected layers and {codes} deltas for "
            f"{classes} classes; here are heads of 4 and 1 with boxes by class, and of 0 and 2 with one box for all"
        )
    head = {
        "convention": "mmdet",
        "box_head": kinds[convs, layers, codes],
        "box_width": _size(state, f"{first}shared_fcs.0.weight"),
        "mask_width": _size(state, "roi_head.mask_head.0.convs.0.conv.weight"),
    }
    arguments = dict(
        head="cascade_mask_rcnn",
        neck="a3fpn" if a3fpn else "fpn",
        num_classes=classes,
        neck_kwargs={"out_channels": _size(state, "rpn_head.rpn_conv.weight", 1)},
        head_kwargs=head,
    )
    return Plan(build_detector, arguments)


def _retinanet(state: State) -> Plan:
    anchors, classes = _size(state, "bbox_head.retina_reg.weight") // 4, _size(state, "bbox_head.retina_cls.weight")
    if anchors != 9:
        raise ValueError(f"it is a RetinaNet with {anchors} anchors at each place, here are 9")
    arguments = dict(
        head="retinanet",
        neck="a3fpn",
        num_classes=classes // anchors,
        neck_kwargs={"out_channels": _size(state, "bbox_head.retina_cls.weight", 1)},
        head_kwargs={"convention": "mmdet", "detections_per_img": 100},
    )
    return Plan(build_detector, arguments)


def _upernet(state: State, a3fpn: bool) -> Plan:
    auxiliary = "auxiliary_head.conv_seg.weight" in state
    arguments: dict[str, Any] = dict(
        head="upernet",
        neck="a3fpn" if a3fpn else "fpn",
        num_classes=_size(state, "decode_head.conv_seg.weight"),
        auxiliary=auxiliary,
        head_kwargs={"channels": _size(state, "decode_head.conv_seg.weight", 1)},
    )
    if auxiliary:
        convs = {name.split(".")[2] for name in state if name.startswith("auxiliary_head.convs.")}
        channels = _size(state, "auxiliary_head.conv_seg.weight", 1)
        arguments["auxiliary_kwargs"] = {"channels": channels, "num_convs": len(convs)}
    return Plan(build_segmenter, arguments)
