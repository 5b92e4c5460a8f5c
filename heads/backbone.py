"""Multi-scale feature maps: a timm network, an optional neck, frozen stages and the parameter groups of both."""

from __future__ import annotations

import fnmatch
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._features import FeatureGetterNet, FeatureHookNet
from timm.models._manipulate import group_with_matcher
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class ShapeSpec:
    """Channels and strides (relative to the image) of a list of feature maps, the finest map first.

    Raises:
        ValueError: if the lengths differ, the lists are empty, or the strides decrease.

    Examples:
        >>> from foveal.heads.backbone import ShapeSpec
        >>> len(ShapeSpec(channels=(64, 128), strides=(4, 8)))
        2
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.channels or len(self.channels) != len(self.strides) or min(self.channels + self.strides) < 1:
            raise ValueError(f"each map needs channels and a stride, got {self.channels} and {self.strides}")
        if list(self.strides) != sorted(self.strides):
            raise ValueError(f"the finest map comes first, got strides {self.strides}")

    def __len__(self) -> int:
        return len(self.channels)


def power_of_two(stride: int) -> int:
    """The nearest power of two: the stride of a body of this stride on images that are resized by their ratio."""
    return 2 ** round(math.log2(stride))


class GroupNorm(nn.GroupNorm):
    """PyTorch's, also for groups of one value (a map of one pixel with as many groups as channels), which it refuses
    for a single image, in evaluation too. Such a value is its own mean: the output is the bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.num_groups == self.num_channels and x.shape[2:].numel() == 1:
            # exactly, as the next norm would amplify rounding errors; with gradients for all parameters
            return (x - x) * self.weight[:, None, None] + self.bias[:, None, None]
        return super().forward(x)


class Neck(nn.Module):
    """Base class: maps as a list, the finest first, to maps of ``spec``."""

    spec: ShapeSpec


class Backbone(nn.Module):
    """A timm feature network and an optional neck, with the interface of torchvision's ``BackboneWithFPN``.

    Args:
        body: what ``timm.create_model(name, features_only=True, ...)`` returns.
        neck: applied to the body's maps; None: the heads read the body's maps.
        classifier: the same model without ``features_only``, preferably on the meta device. timm renames the parameters
            of some feature networks; the published names, `group_matcher` and `no_weight_decay` are read from it.
        frozen_stages: -1: train everything. n: freeze the stem and the first n stages and keep them in evaluation mode
            (statistics of norms, dropout). A stage ends with a map of stride 4 or more; norms that a feature network
            adds per map are not part of it, but freeze with all stages if a map is upsampled. In a transformer of
            one stride, each block is a stage; the final norm is part of the last one.
        norm_eval: keep every BatchNorm of the body in evaluation mode; its weights are trained unless frozen.
        pyramid: makes maps of strides that the body lacks, see `upsamplers.Pyramid`.

    Attributes:
        spec: channels and strides of the output maps.
        body_spec: channels and strides of the body's maps.
        out_channels: channels of the first output map, of all of them with a neck.
        mean, std: per channel, the body's normalization of images in [0, 1].

    Raises:
        ValueError: if the body has fewer stages than ``frozen_stages``, or ``group_matcher`` does not separate them.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_backbone
        >>> backbone = build_backbone("test_foveal_dinat", neck="fpn", neck_kwargs={"out_channels": 32})
        >>> backbone.spec
        ShapeSpec(channels=(32, 32, 32, 32), strides=(4, 8, 16, 32))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 96)).values()]
        [(1, 32, 16, 24), (1, 32, 8, 12), (1, 32, 4, 6), (1, 32, 2, 3)]
    """

    def __init__(
        self,
        body: nn.Module,
        neck: Neck | None = None,
        *,
        classifier: Any,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        pyramid: Any = None,
    ) -> None:
        super().__init__()
        self.body, self.pyramid, self.neck = body, pyramid, neck
        self.body_spec = body_spec(body)
        self.spec: ShapeSpec = self.body_spec if pyramid is None else pyramid.spec
        if neck is not None:
            self.spec = neck.spec
        self.out_channels = self.spec.channels[0]
        cfg: Any = body.pretrained_cfg
        self.mean, self.std = (tuple(cfg[key]) for key in ("mean", "std"))
        self.norm_eval = norm_eval
        self._channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")

        self._published = published_names(body, classifier)
        known = {name for name, _ in _named(classifier)}
        self._added = {name for name, published in self._published.items() if published not in known}
        self._layers = classifier.group_matcher() if hasattr(classifier, "group_matcher") else None
        self._not_decayed = tuple(classifier.no_weight_decay()) if hasattr(classifier, "no_weight_decay") else ()

        own = {name: published for name, published in self._published.items() if name not in self._added}
        self._frozen = names_of_stages(frozen_stages, classifier, own, {name for name, _ in body.named_modules()})
        learning = {name for name, _ in body.named_parameters()} & own.keys() - self._frozen
        if learning and all(own[name].startswith("norm.") for name in learning):
            self._frozen |= {name for name, published in own.items() if f"{published}.".startswith("norm.")}
            learning = set()
        if pyramid is not None and frozen_stages >= 0 and not learning:
            self._frozen |= self._added  # an upsampler is trained for the map as it is
        for name, parameter in body.named_parameters():
            if name in self._frozen:
                parameter.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for name, module in self.body.named_modules():
            if name in self._frozen or (self.norm_eval and isinstance(module, _BatchNorm)):
                module.training = False
        return self

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Images ``[B, C, H, W]`` to maps ``[B, spec.channels[i], H / spec.strides[i], W / spec.strides[i]]``.

        The keys are ``"0"``, ``"1"``, ..., the finest map first.
        """
        if self.pyramid is not None:
            images = self.pyramid.resized(images)
        maps = self.body_maps(images)
        if self.pyramid is not None:
            maps = self.pyramid(images, maps)
        if self.neck is not None:
            maps = self.neck(maps)
        return OrderedDict((str(level), x) for level, x in enumerate(maps))

    def body_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The maps of ``body_spec``."""
        maps = list(self.body(images))
        return [x.permute(0, 3, 1, 2) for x in maps] if self._channels_last else maps

    def parameter_groups(
        self, weight_decay: float, layer_decay: float | None = None, lr_ratio: float = 1.0, *, lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups of the body's trainable parameters.

        Args:
            weight_decay: for all but vectors, biases and the model's ``no_weight_decay``.
            layer_decay: layer-wise decay by timm's `group_matcher`: the last layer gets this times the heads' rate, the
                one before its square, and so on. Norms added by the feature network get the full rate.
            lr_ratio: multiplies all rates.
            lr: base rate; each group gets its own ``lr``, for any optimizer. None: it gets ``lr_scale``, which timm's
                schedulers multiply by and PyTorch's optimizers ignore.

        Raises:
            ValueError: ``layer_decay`` for a model without `group_matcher`.
        """
        published = {name: self._published[name] for name, _ in self.body.named_parameters()}
        scales = dict.fromkeys(published, lr_ratio)
        if layer_decay is not None:
            if self._layers is None:
                raise ValueError(f"layer_decay={layer_decay} needs a model with a group_matcher")
            own = [name for name in published if name not in self._added]
            layers = group_with_matcher(((published[n], n) for n in own), self._layers, return_values=True)
            for i, names in layers.items():
                scales.update(dict.fromkeys(names, lr_ratio * layer_decay ** (len(layers) - i)))
        named = [(name, published[name], p, scales[name]) for name, p in self.body.named_parameters()]
        rows = [(p, scale, decays(pub, p, self._not_decayed)) for _, pub, p, scale in named]
        return grouped(rows, weight_decay, lr)


def names_of_stages(count: int, classifier: Any, own: Mapping[str, str], modules: Collection[str]) -> set[str]:
    """Names of the parameters and modules that belong to the stem and the first ``count`` stages.

    Args:
        count: -1: none, not even the stem.
        classifier: the model by whose `group_matcher` and ``feature_info`` the stages are told apart.
        own: the names to choose from, with the classifier's names for them.
        modules: those of ``own`` that name modules.

    Raises:
        ValueError: there are not so many stages, or the `group_matcher` does not separate them.
    """
    if count < 0:
        return set()
    info = [i for i in feature_info(classifier) if i["reduction"] >= 4]
    if len({i["reduction"] for i in info}) > 1:
        info = {i["reduction"]: i for i in info}.values()
    ends = [f"{i['module']}." for i in info]  # with the dot after a module's name that patterns may end in
    if count > len(ends):
        raise ValueError(f"frozen_stages={count}, but {type(classifier).__name__} has {len(ends)} stages")

    own = {name: f"{published}." if name in modules else published for name, published in own.items()}
    matcher = classifier.group_matcher(coarse=True) if hasattr(classifier, "group_matcher") else {}
    groups: Any = group_with_matcher(((name, name) for name in {*own.values(), *ends}), matcher, reverse=True)
    if sorted({groups[end] for end in ends}) != [groups[end] for end in ends]:
        raise ValueError(
            f"frozen_stages={count}: the group_matcher of {type(classifier).__name__} does not separate its stages"
        )
    last = groups[ends[count - 1]] if count else groups[ends[0]] - 1
    return {name for name, published in own.items() if groups[published] <= last}


def decays(name: str, parameter: nn.Parameter, exempt: Collection[str]) -> bool:
    """Whether weight decay applies: not to vectors, biases and ``exempt`` names or patterns."""
    vector = parameter.ndim <= 1 or name.endswith(".bias")
    return not vector and not any(fnmatch.fnmatch(name, pattern) for pattern in exempt)


def grouped(
    rows: list[tuple[nn.Parameter, float, bool]], weight_decay: float, lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups from rows (parameter, scale of its rate, whether it decays), without frozen parameters."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter, scale, decays in rows:
        if parameter.requires_grad:
            rate = {"lr_scale": scale} if lr is None else {"lr": lr * scale}
            new = dict(params=[], weight_decay=weight_decay if decays else 0.0, **rate)
            groups.setdefault((scale, decays), new)["params"].append(parameter)
    return list(groups.values())


def body_spec(body: Any) -> ShapeSpec:
    """Channels and strides of the maps of a timm feature network."""
    return ShapeSpec(tuple(body.feature_info.channels()), tuple(body.feature_info.reduction()))


def feature_info(classifier: Any) -> list[dict[str, Any]]:
    """timm's table of a classifier's maps: ``num_chs``, ``reduction``, ``module`` of each."""
    return getattr(classifier.feature_info, "info", classifier.feature_info)


def _named(model: nn.Module) -> list[tuple[str, Any]]:
    """Modules, parameters and buffers."""
    return [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]


def published_names(body: nn.Module, classifier: nn.Module) -> dict[str, str]:
    """Map names in a feature network to those of the classifier: timm wraps the model, or takes it apart and joins the
    first two parts of names (``stages.0`` becomes ``stages_0``)."""
    prefix = "model." if isinstance(body, FeatureGetterNet) else ""
    prefix = "body." if isinstance(body, FeatureHookNet) and "body" in body else prefix
    joined = {name.replace(".", "_", 1): name for name, _ in _named(classifier) if "." in name}
    names = (name for name, _ in _named(body) if name)
    return {name: joined.get(bare := name.removeprefix(prefix), bare) for name in names}
