"""Whole detectors and segmenters of mmdetection and mmsegmentation: what they are, and where their tensors belong."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.build import build_detector, build_segmenter
from ..heads.detection import Detector
from ..heads.detection.published import from_mmdet, is_a3fpn
from ..heads.necks.a3fpn import A3FPN, published_state
from ..heads.segmentation.published import from_mmseg

State = Mapping[str, Tensor]
BACKBONE = "backbone."


@dataclass(frozen=True)
class Plan:
    """What a checkpoint is of: the builder's arguments but the backbone's name and own ones."""

    build: Callable[..., nn.Module]
    arguments: dict[str, Any]

    @property
    def task(self) -> str:
        return "detect" if self.build is build_detector else "segment"


def plan(state: State) -> Plan:
    """What the names and shapes of a whole dense model tell of it.

    Raises:
        ValueError: if this package has no such model, or none that answers as the published one; the message says what
            there is and why it is not read.
    """
    names = tuple(state)
    groups = sorted({name.partition(".")[0] for name in names} - {"backbone"})

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    a3fpn = any("a3fpn_body." in name for name in names)
    if has("backbone.bottom_up.", "sem_seg_head.", "roi_heads.", "criterion."):
        raise ValueError(
            f"the heads ({', '.join(groups) or 'under backbone.'}) are detectron2's, whose names and conventions have "
            "not been checked here against its own code"
        )
    if has("roi_head.bbox_head.0."):
        raise ValueError("it is a cascade of heads (roi_head.bbox_head.0 ...), which this package does not have")
    if has("rpn_head.") and has("roi_head.bbox_head.shared_fcs."):
        return Plan(build_detector, _rcnn(state, a3fpn, has("roi_head.mask_head.")))
    if has("bbox_head.retina_cls.") and a3fpn:
        return Plan(build_detector, _retinanet(state))
    if has("bbox_head.retina_cls."):
        raise ValueError(
            "it is a RetinaNet on an FPN: mmdetection makes P6 from C5, or P7 without a ReLU before it, torchvision's "
            "does neither, so the answers would differ"
        )
    if has("decode_head.psp_modules."):
        return Plan(build_segmenter, _upernet(state, a3fpn))
    if has("decode_head.scale_heads."):
        raise ValueError(
            "its head is mmsegmentation's FPNHead, with BatchNorm where the semantic FPN here, as its paper, has "
            "GroupNorm"
        )
    raise ValueError(f"this package has no heads like {', '.join(groups) or 'none'}")


def refuse(state: State) -> None:
    """Raise ValueError, with the reason, for a backbone whose file does not tell what its answers are."""
    if any(re.match(r"backbone\.(bottom_up\.)?res2\.", name) for name in state):
        raise ValueError(
            "its backbone is detectron2's ResNet, of which the file does not tell whether the first or the second "
            "convolution of a block strides: neither it nor what stands on it is converted. The A3-FPN neck alone is "
            "read by foveal.heads.necks.a3fpn.from_published"
        )


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


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """What a reader of config.json should know of the images, as training writes it."""
    channels = model.arguments.get("in_chans", 3)
    images = {"in_chans": channels, "mean": model.arguments["mean"], "std": model.arguments["std"]}
    if not isinstance(model, Detector):
        return images
    transform = model.detector.transform
    return images | {"short_side": transform.min_size[-1], "max_size": transform.max_size}


def features_of(model: nn.Module) -> tuple[str, nn.Module]:
    """What stands before the names of a dense model's backbone, and that, without what timm puts around it."""
    prefix = "detector.backbone.features.network." if isinstance(model, Detector) else "features.network."
    network = model.get_submodule(prefix.rstrip("."))
    wrapped = type(network).__name__ == "FeatureGetterNet"
    return (f"{prefix}model.", network.model) if wrapped else (prefix, network)


def translated(state: State, model: nn.Module, backbone: Callable[[State, nn.Module], State]) -> dict[str, Tensor]:
    """A published state under the names of ``model``.

    Args:
        backbone: gives the backbone's tensors its own names.

    Raises:
        ValueError: names that are no part of it.
    """
    prefix, network = features_of(model)
    own = {name: tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
    result = {prefix + name: tensor for name, tensor in backbone(own, network).items()}
    detector = isinstance(model, Detector)
    place = "detector.backbone.neck" if detector else "head.neck"
    neck = model.get_submodule(place) if detector or hasattr(model.head, "neck") else None
    if isinstance(neck, A3FPN):
        only = {name: tensor for name, tensor in state.items() if is_neck(name)}
        result |= {f"{place}.{name}": tensor for name, tensor in published_state(neck, only).items()}
    rest = {name: tensor for name, tensor in state.items() if name not in own}
    return result | (from_mmdet(rest) if detector else from_mmseg(rest))


def is_neck(name: str) -> bool:
    """Whether a name is of A3-FPN, in a detector or in UPerNet; the authors compute parts of it that nothing reads."""
    return is_a3fpn(name) or name.startswith("decode_head.a3fpn.")


def deep_stem(state: State, network: nn.Module) -> dict[str, Tensor]:
    """timm's names for the stem of ResNet-C, as mmdetection and mmsegmentation name it, whose last norm stands where
    other ResNets have their first; others as they are.

    Raises:
        ValueError: if the file has such a stem and the network has not.
    """
    own = network.state_dict()
    if not any(re.search(r"(^|\.)stem\.7\.", name) for name in state) or "bn1.weight" not in own:
        return dict(state)
    if "conv1.3.weight" not in own:
        raise ValueError("its stem has three convolutions, as that of ResNet-C: timm's resnet50c, for one")
    places = {"stem.7.": "bn1.", **{f"stem.{i}.": f"conv1.{i}." for i in (0, 1, 3, 4, 6)}}
    pattern = re.compile(r"(?<![^.])stem\.[013467]\.")
    return {pattern.sub(lambda found: places[found[0]], name, count=1): tensor for name, tensor in state.items()}


class Raw(nn.Module):
    """What a dense model computes before anything is selected: numbers that change little where weights change little,
    as its detections do not. For `fingerprint`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[1, C, H, W]`` to the maps of the neck, the logits and deltas on them, and of four fixed regions the
        classes, boxes and mask logits; a segmenter's logits."""
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
        scores, boxes = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, regions, [(rows, columns)])))
        masks = []
        if self.model.masks:
            pooled = heads.mask_roi_pool(maps, regions, [(rows, columns)])
            masks = [heads.mask_predictor(heads.mask_head(pooled))]
        return [*levels, *logits, *deltas, scores, boxes, *masks]


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


def _rcnn(state: State, a3fpn: bool, masks: bool) -> dict[str, Any]:
    head: dict[str, Any] = {"convention": "mmdet"}
    head["box_width"] = _size(state, "roi_head.bbox_head.shared_fcs.0.weight")
    if masks:
        head["mask_width"] = _size(state, "roi_head.mask_head.convs.0.conv.weight")
    return dict(
        head="mask_rcnn" if masks else "faster_rcnn",
        neck="a3fpn" if a3fpn else "fpn",
        num_classes=_size(state, "roi_head.bbox_head.fc_cls.weight") - 1,
        neck_kwargs={"out_channels": _size(state, "rpn_head.rpn_conv.weight", 1)},
        head_kwargs=head,
    )


def _retinanet(state: State) -> dict[str, Any]:
    anchors, classes = _size(state, "bbox_head.retina_reg.weight") // 4, _size(state, "bbox_head.retina_cls.weight")
    if anchors != 9:
        raise ValueError(f"it is a RetinaNet with {anchors} anchors at each place, here are 9")
    return dict(
        head="retinanet",
        neck="a3fpn",
        num_classes=classes // anchors,
        neck_kwargs={"out_channels": _size(state, "bbox_head.retina_cls.weight", 1)},
        head_kwargs={"convention": "mmdet", "detections_per_img": 100},
    )


def _upernet(state: State, a3fpn: bool) -> dict[str, Any]:
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
    return arguments
