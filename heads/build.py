"""Build backbones, detectors and segmenters by name. The arguments are the keys of a recipe's ``model``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from .backbone import Backbone, GroupNorm, body_spec
from .body import build_body, synchronized
from .dense import DenseModel
from .detection import Detector
from .legacy import moved, old_arguments
from .necks import NECKS, build_neck
from .registry import HeadSpec, head_spec
from .segmentation.segmenter import SegmentationModel
from .upsamplers import Pyramid, Upsampler, create_upsampler, load_upsampler

Model = TypeVar("Model", bound=DenseModel)
Upsampling = str | Path | Upsampler | Mapping[str, Any]


def build_backbone(
    name: str,
    *,
    neck: str | None = None,
    neck_kwargs: Mapping[str, Any] | None = None,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    upsample: Upsampling | None = None,
    **kwargs: Any,
) -> Backbone:
    """The feature maps of any foveal or timm model.

    Args:
        name: of the model, with or without the tag of its weights.
        neck: ``"fpn"``, ``"a3fpn"`` or None.
        neck_kwargs: see `necks`.
        frozen_stages: see `Backbone`.
        norm_eval: see `Backbone`.
        upsample: makes the ``strides`` that the model lacks, for plain transformers, too: finer ones by an upsampler,
            which is not trained, coarser ones by pooling; see `upsamplers.Pyramid`. ``"bilinear"``, a published name or
            a folder, as `upsamplers.load_upsampler` takes them; an `Upsampler`; or its ``name`` and arguments, for
            random weights.
        kwargs: ``pretrained``: start from the published weights.
            ``checkpoint``: start from a run folder of ``foveal train`` (of a detector or segmenter: its backbone), a
            model folder as timm writes it, or a file in any key format of the model's family (classification or dense).
            ``strides``: of the body's maps, 4 to 32 by default; the last map of each stride is used.
            ``out_indices``: the maps by timm's indices instead, for models without those strides.
            ``sync_bn``: SyncBatchNorm if a process group is initialized.
            ``drop_path_rate``: stochastic depth; None: the model's default.
            ``grad_checkpointing``: recompute the blocks' activations in the backward pass.
            ``stride_in_1x1``: the bottleneck blocks of a ResNet stride in their first convolution, as in detectron2's
            weights. All others are passed to `timm.create_model`. If the model's class has these arguments,
            ``out_norm=True`` (a new norm per map) and flexible image sizes are the default.

    Raises:
        ValueError: if the name, the strides or the weights do not fit, for example a checkpoint that lacks any
            parameter but the new norms.
        OSError: if published weights cannot be fetched.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_backbone
        >>> backbone = build_backbone("test_foveal_dinat", strides=(8, 16, 32), frozen_stages=1)
        >>> backbone.spec
        ShapeSpec(channels=(32, 64, 128), strides=(8, 16, 32))
        >>> [tuple(each.shape) for each in backbone(torch.randn(1, 3, 64, 96)).values()]
        [(1, 32, 8, 12), (1, 64, 4, 6), (1, 128, 2, 3)]
        >>> plain = build_backbone("vit_tiny_patch16_224", upsample="bilinear")
        >>> [tuple(each.shape) for each in plain(torch.randn(1, 3, 64, 96)).values()]
        [(1, 192, 16, 24), (1, 192, 8, 12), (1, 192, 4, 6), (1, 192, 2, 3)]
    """
    strides = kwargs.pop("strides", (4, 8, 16, 32))
    body, classifier = build_body(name, strides=strides, upsampled=upsample is not None, **kwargs)
    pyramid = None
    if upsample is not None:
        cfg: Any = body.pretrained_cfg
        image = [_per_channel(cfg[key], kwargs.get("in_chans", 3)) for key in ("mean", "std")]
        pyramid = Pyramid(_upsampler(upsample), body_spec(body), strides, *image)
    spec = body_spec(body) if pyramid is None else pyramid.spec
    made = None if neck is None else build_neck(neck, spec, **(neck_kwargs or {}))
    options: dict[str, Any] = dict(frozen_stages=frozen_stages, norm_eval=norm_eval, pyramid=pyramid)
    return Backbone(body, made, classifier=classifier, **options)


def _upsampler(upsample: Upsampling) -> Upsampler:
    if isinstance(upsample, Upsampler):
        return upsample
    return create_upsampler(**upsample) if isinstance(upsample, Mapping) else load_upsampler(upsample)


@old_arguments(backbone="name")
def build_detector(
    name: str,
    head: str = "mask_rcnn",
    neck: str = "fpn",
    *,
    num_classes: int,
    min_size: int = 800,
    max_size: int = 1333,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    strides: Sequence[int] | None = None,
    neck_kwargs: Mapping[str, Any] | None = None,
    head_kwargs: Mapping[str, Any] | None = None,
    sync_bn: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Detector:
    """A detector on any foveal or timm backbone: ``build_detector(**vars(config.model), num_classes=80)``.

    Args:
        name: of the backbone.
        head: a name in `registry.HEADS`; ``"mask2former"`` needs transformers.
        neck: ``"fpn"`` or ``"a3fpn"``; for Mask2Former, inside its pixel decoder; Conditional DETR has none.
        num_classes: without the background; labels start at 0.
        min_size: short side of resized images in evaluation.
        max_size: limit of the long side, which takes precedence.
        mean: per channel, of images in [0, 1]; None: the backbone's.
        std: as ``mean``.
        strides: of the maps that the neck reads; None: the head's.
        neck_kwargs: see `necks`.
        head_kwargs: see `detection.heads`, `detection.mask2former` and `detection.conditional_detr`.
        sync_bn: of the whole detector.
        kwargs: of the model, passed to `build_backbone`.
        options: of `build_backbone`: ``pretrained``, ``checkpoint``, ``frozen_stages``, ``upsample``, ...

    Raises:
        ValueError: if a name or an argument does not fit.
        ImportError: ``mask2former`` without transformers.
        OSError: if published weights cannot be fetched.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_detector
        >>> detector = build_detector("test_foveal_dinat", "fcos", num_classes=5, min_size=64, max_size=96).eval()
        >>> with torch.no_grad():
        ...     (found,) = detector([torch.rand(3, 60, 80)])  # float in [0, 1], of any size
        >>> sorted(found), found["boxes"].shape[1]  # corners in pixels
        (['boxes', 'labels', 'scores'], 4)
    """
    spec = head_spec("detect", head)
    neck_kwargs, head_kwargs, options = dict(neck_kwargs or {}), dict(head_kwargs or {}), {**(kwargs or {}), **options}
    strides = options.pop("strides", strides)
    arguments = dict(name=name, head=head, neck=neck, num_classes=num_classes, min_size=min_size, max_size=max_size)
    arguments |= dict(strides=strides, neck_kwargs=neck_kwargs, head_kwargs=head_kwargs, **options)
    backbone = build_backbone(name, **_body_and_neck(spec, neck, neck_kwargs, strides), **options)
    image = _statistics(backbone, mean, std, options.get("in_chans", 3))
    transform = {"min_size": min_size, "max_size": max_size, **{f"image_{key}": each for key, each in image.items()}}
    transform |= dict(size_divisible=32, _skip_resize=True)  # no resize in training
    own = _pixel_decoder(neck, head_kwargs, neck_kwargs) if spec.neck == "inside" else {}
    detector = _build_head(spec, backbone, num_classes, transform, head_kwargs | own)
    return _finished(Detector(detector, spec, num_classes), sync_bn, arguments | image)


@old_arguments(backbone="name")
def build_segmenter(
    name: str,
    head: str = "upernet",
    neck: str = "fpn",
    *,
    num_classes: int,
    auxiliary: bool = True,
    size_divisor: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    neck_kwargs: Mapping[str, Any] | None = None,
    head_kwargs: Mapping[str, Any] | None = None,
    auxiliary_kwargs: Mapping[str, Any] | None = None,
    segmenter: str | Path | None = None,
    sync_bn: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> SegmentationModel:
    """A semantic segmenter on any foveal or timm backbone: float images in [0, 1] to logits of their size.

    Args:
        name: of the backbone.
        head: a name in `registry.HEADS`; ``"mask2former"`` needs transformers.
        neck: ``"fpn"`` or ``"a3fpn"``. UPerNet with ``"fpn"`` has its own top-down path; with ``"a3fpn"`` the pooled
            last map and the finer ones go through A3-FPN. For Mask2Former, inside its pixel decoder.
        auxiliary: for UPerNet, an FCN head on the third map, whose logits are the second output in training.
        size_divisor: see `SegmentationModel`.
        mean: per channel, of images in [0, 1]; None: the backbone's.
        std: as ``mean``.
        neck_kwargs: of the neck.
        head_kwargs: of `UPerNet`, `SemanticFPN` or `Mask2Former`.
        auxiliary_kwargs: of `FCN`; ignored without an auxiliary head.
        segmenter: if a file, the backbone's checkpoint; the heads are loaded later, see `published.load_heads`.
        sync_bn: of the whole segmenter.
        kwargs: of the model, passed to `build_backbone`.
        options: of `build_backbone`: ``pretrained``, ``checkpoint``, ``frozen_stages``, ``upsample``, ...

    Raises:
        ValueError: if a name or an argument does not fit.
        ImportError: ``mask2former`` without transformers.
        OSError: if published weights cannot be fetched.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_segmenter
        >>> segmenter = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=5).eval()
        >>> segmenter(torch.rand(1, 3, 50, 70)).shape
        torch.Size([1, 5, 50, 70])
    """
    spec, options = head_spec("segment", head), {**(kwargs or {}), **options}
    parts = dict(neck_kwargs=neck_kwargs, head_kwargs=head_kwargs, auxiliary_kwargs=auxiliary_kwargs)
    parts = {key: dict(value or {}) for key, value in parts.items()}
    arguments = dict(name=name, head=head, neck=neck, num_classes=num_classes, auxiliary=auxiliary)
    if spec.strides != (4, 8, 16, 32):
        options = {"strides": spec.strides, **options}
    arguments |= dict(size_divisor=size_divisor, **parts, **options)
    backbone = build_backbone(name, **options | _started_from(segmenter, options))
    image = _statistics(backbone, mean, std, options.get("in_chans", 3))
    own = parts.pop("head_kwargs")
    if spec.neck == "inside":
        more = _pixel_decoder(neck, own, **parts)
    else:
        _check_neck(spec, neck, parts["neck_kwargs"])
        more = dict(neck=neck, auxiliary=auxiliary, **parts) if spec.neck == "before" else {}
    model = _build_head(spec, backbone, num_classes, image | dict(size_divisor=size_divisor), own | more)
    return _finished(model, sync_bn, arguments | image)


def _started_from(segmenter: str | Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's checkpoint if the weights of the whole model are one file."""
    if segmenter is None:
        return {}
    if options.get("pretrained") or options.get("checkpoint") is not None:
        raise ValueError(f"segmenter={str(segmenter)!r} holds the backbone, too: no pretrained, no checkpoint")
    return dict(checkpoint=segmenter) if Path(segmenter).is_file() else {}


def _body_and_neck(
    spec: HeadSpec, neck: str, neck_kwargs: dict[str, Any], strides: Sequence[int] | None
) -> dict[str, Any]:
    """The arguments of `build_backbone` for a detector."""
    _check_neck(spec, neck, neck_kwargs)
    if spec.neck != "before":
        return dict(strides=strides or spec.strides)
    defaults: dict[str, Any] = dict(extra_levels=spec.extra_levels)
    if strides is None and neck == "a3fpn" and spec.strides[0] > 4:  # it reads the finest map, too, without output
        strides, defaults["start_level"] = (4, *spec.strides), 1
    return dict(strides=strides or spec.strides, neck=neck, neck_kwargs={**defaults, **neck_kwargs})


def _check_neck(spec: HeadSpec, neck: str, neck_kwargs: Mapping[str, Any]) -> None:
    if spec.neck == "none" and (neck != "fpn" or neck_kwargs):  # "fpn" is the default of every head
        raise ValueError(f"{spec.name} has no neck, got neck={neck!r} with {neck_kwargs}")


def _pixel_decoder(
    neck: str, head_kwargs: dict[str, Any], neck_kwargs: dict[str, Any], auxiliary_kwargs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The argument of Mask2Former for the pyramid in its pixel decoder."""
    if auxiliary_kwargs:
        raise ValueError(f"Mask2Former has no auxiliary head for auxiliary_kwargs={auxiliary_kwargs}")
    if neck not in NECKS:
        raise ValueError(f"unknown neck {neck!r}; choose from {', '.join(NECKS)}")
    if "a3fpn" in head_kwargs:
        raise ValueError(f"set A3-FPN by neck and neck_kwargs, not by head_kwargs a3fpn={head_kwargs['a3fpn']}")
    if neck == "a3fpn":
        return {"a3fpn": neck_kwargs}
    if neck_kwargs:
        raise ValueError(f"the FPN in the pixel decoder takes no neck_kwargs, got {neck_kwargs}")
    return {}


def _build_head(
    spec: HeadSpec, backbone: Backbone, num_classes: int, around: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    try:
        return spec.build(backbone, num_classes, around, **kwargs)
    except TypeError as error:
        raise ValueError(f"{spec.name} with {kwargs}: {error}") from None


def _finished(model: Model, sync_bn: bool, arguments: dict[str, Any]) -> Model:
    model = synchronized(model, sync_bn)
    module: Any
    for module in set(model.modules()) - set(model.backbone.body.modules()):
        if getattr(module, "inplace", False):  # torchvision's activations, which overwrite what a hook may hold
            module.inplace = False
        if type(module) is nn.GroupNorm:  # torchvision's and transformers', too
            module.__class__ = GroupNorm
    model.arguments = {key: value for key, value in arguments.items() if key not in ("pretrained", "checkpoint")}
    if (pyramid := model.backbone.pyramid) is not None:  # its weights are the model's from now on
        pyramid.statistics(arguments["mean"], arguments["std"])
        model.arguments["upsample"] = pyramid.upsampler.arguments
    else:
        model.arguments.pop("upsample", None)
    return model


def _statistics(
    backbone: Backbone, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> dict[str, list[float]]:
    """``mean`` and ``std`` per channel, as given or the backbone's; for grey images on an RGB backbone the mean over
    the three channels, as timm sums the filters of the first convolution."""
    found = {}
    for name, given in (("mean", mean), ("std", std)):
        values = _per_channel(getattr(backbone, name), channels) if given is None else list(given)
        if len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values for images of {channels} channels: {values}")
        found[name] = values
    return found


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    """The values, or for another number of channels their mean."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


BUILDERS: dict[str, Callable[..., Any]] = {
    "detect": build_detector,
    "segment": build_segmenter,
    "upsample": create_upsampler,
}


def build_dense(task: str, arguments: Mapping[str, Any]) -> Any:
    """The model of ``"detect"``, ``"segment"`` or ``"upsample"`` with these arguments of its builder.

    Examples:
        >>> from foveal.heads.build import build_dense, build_segmenter
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=5)
        >>> type(build_dense("segment", model.arguments)).__name__
        'Segmenter'
    """
    return BUILDERS[task](**arguments)


_MOVED = ("load_dense", "read_dense_config", "reparameterize", "save_dense")
__getattr__ = moved(
    __name__, {"build_features": "features:build_features", **{name: f"checkpoint:{name}" for name in _MOVED}}
)
