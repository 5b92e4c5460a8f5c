"""Feature maps of a backbone, with what dense heads need around them: strides, frozen stages, parameter groups."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._features import FeatureGetterNet, FeatureHookNet
from timm.models._manipulate import group_with_matcher
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class FeatureSpec:
    """What a list of feature maps looks like: channels and strides to the image, the finest map first.

    Raises:
        ValueError: if there are not as many of both, none at all, or strides that decrease.

    Examples:
        >>> from foveal.heads.features import FeatureSpec
        >>> len(FeatureSpec(channels=(64, 128), strides=(4, 8)))
        2
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.channels or len(self.channels) != len(self.strides) or min(self.channels + self.strides) < 1:
            raise ValueError(f"a map has a width and a stride, got channels {self.channels} and strides {self.strides}")
        if list(self.strides) != sorted(self.strides):
            raise ValueError(f"the finest map comes first, got strides {self.strides}")

    def __len__(self) -> int:
        return len(self.channels)


class Features(nn.Module):
    """A timm ``features_only`` network as the backbone of a dense model.

    Args:
        network: what ``timm.create_model(name, features_only=True, ...)`` gives, of any kind.
        whole: the same model without ``features_only``, best on the meta device: timm renames the parameters of some
            feature networks, and this one has their published names, `group_matcher` and `no_weight_decay`. Only read.
        frozen_stages: -1: everything learns. n: the stem and the first n stages neither learn nor leave evaluation
            mode (statistics of norms, dropout). A stage ends with a map of stride 4 or more; norms that a network of
            feature maps has per map, beyond the classifier's, are not part of it.
        norm_eval: every BatchNorm keeps its statistics in training; its weights still learn unless they are frozen.

    Attributes:
        spec: channels and strides of the maps.
        mean, std: by channel, what the images (in [0, 1]) are to be normalised with.

    Raises:
        ValueError: if the network has fewer stages than are to be frozen, or does not say what belongs to them.

    Examples:
        >>> from foveal.heads.build import build_features
        >>> features = build_features("test_foveal_dinat", frozen_stages=1)
        >>> groups = features.parameter_groups(weight_decay=0.05, layer_decay=0.8)
        >>> {group["weight_decay"] for group in groups} == {0.0, 0.05}
        True
    """

    def __init__(self, network: nn.Module, whole: Any, *, frozen_stages: int = -1, norm_eval: bool = False) -> None:
        super().__init__()
        info: Any = network.feature_info
        self.network = network
        self.spec = FeatureSpec(tuple(info.channels()), tuple(info.reduction()))
        cfg: Any = network.pretrained_cfg
        self.mean, self.std = (tuple(cfg[key]) for key in ("mean", "std"))
        self.norm_eval = norm_eval
        self._channels_last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")

        self._published = _published_names(network, whole)
        known = {name for name, _ in _named(whole)}
        self._added = {name for name, published in self._published.items() if published not in known}
        self._layers = whole.group_matcher() if hasattr(whole, "group_matcher") else None
        self._not_decayed = tuple(whole.no_weight_decay()) if hasattr(whole, "no_weight_decay") else ()

        self._frozen = self._names_up_to(frozen_stages, whole)
        for name, parameter in network.named_parameters():
            if name in self._frozen:
                parameter.requires_grad_(False)
        self.train()

    def _names_up_to(self, count: int, whole: Any) -> set[str]:
        """Names of the network's parameters and modules that belong to the stem and its first ``count`` stages."""
        if count < 0:
            return set()
        info = [i for i in getattr(whole.feature_info, "info", whole.feature_info) if i["reduction"] >= 4]
        if len({i["reduction"] for i in info}) > 1:
            info = {i["reduction"]: i for i in info}.values()
        ends = [f"{i['module']}." for i in info]  # with the dot after a module's name that patterns may end in
        if count > len(ends):
            raise ValueError(f"frozen_stages={count}, but {type(whole).__name__} has {len(ends)} stages")

        own = {name: published for name, published in self._published.items() if name not in self._added}
        modules = {name for name, _ in self.network.named_modules()}
        own = {name: f"{published}." if name in modules else published for name, published in own.items()}
        matcher = whole.group_matcher(coarse=True) if hasattr(whole, "group_matcher") else {}
        groups: Any = group_with_matcher(((name, name) for name in {*own.values(), *ends}), matcher, reverse=True)
        if sorted({groups[end] for end in ends}) != [groups[end] for end in ends]:
            raise ValueError(
                f"the group_matcher of {type(whole).__name__} does not tell its stages apart to freeze them"
            )
        last = groups[ends[count - 1]] if count else groups[ends[0]] - 1
        return {name for name, published in own.items() if groups[published] <= last}

    def train(self, mode: bool = True) -> Features:
        super().train(mode)
        for name, module in self.network.named_modules():
            if name in self._frozen or (self.norm_eval and isinstance(module, _BatchNorm)):
                module.training = False
        return self

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images ``[B, C, H, W]`` to maps ``[B, channels[i], H / strides[i], W / strides[i]]``, the finest first."""
        maps = self.network(images)
        return [x.permute(0, 3, 1, 2) for x in maps] if self._channels_last else list(maps)

    def parameter_groups(
        self, weight_decay: float, layer_decay: float | None = None, lr_ratio: float = 1.0
    ) -> list[dict[str, Any]]:
        """Parameters that learn, as an optimizer takes them; ``lr_scale`` multiplies the learning rate (as in timm).

        Args:
            weight_decay: of all but vectors, biases and what the model's ``no_weight_decay`` names.
            layer_decay: the last layer (by timm's `group_matcher`) learns at this times the heads' rate, the one before
                at its square, and so on. Norms that only the network of feature maps has learn at the full rate.
            lr_ratio: times this.

        Raises:
            ValueError: if ``layer_decay`` is asked of a network that does not say what its layers are.
        """
        published = {name: self._published[name] for name, _ in self.network.named_parameters()}
        scales = dict.fromkeys(published, lr_ratio)
        if layer_decay is not None:
            if self._layers is None:
                raise ValueError("layer_decay is for networks with a group_matcher, this one has none")
            own = [name for name in published if name not in self._added]
            layers = group_with_matcher(((published[n], n) for n in own), self._layers, return_values=True)
            for i, names in layers.items():
                scales.update(dict.fromkeys(names, lr_ratio * layer_decay ** (len(layers) - i)))
        named = [(name, published[name], p, scales[name]) for name, p in self.network.named_parameters()]
        return _grouped([(p, scale, _decays(pub, p, self._not_decayed)) for _, pub, p, scale in named], weight_decay)


def dense_parameter_groups(
    model: nn.Module,
    features: Features,
    weight_decay: float,
    layer_decay: float | None = None,
    backbone_lr_ratio: float = 1.0,
    not_decayed: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The parameter groups of a dense model: those of its backbone (`Features.parameter_groups`), and all others at the
    full rate, decayed unless they are vectors, biases or ``not_decayed`` by name."""
    theirs = {id(p) for p in features.parameters()}
    rest = [(p, 1.0, _decays(name, p, not_decayed)) for name, p in model.named_parameters() if id(p) not in theirs]
    return features.parameter_groups(weight_decay, layer_decay, backbone_lr_ratio) + _grouped(rest, weight_decay)


def _decays(name: str, parameter: nn.Parameter, exempt: Collection[str] = ()) -> bool:
    vector = parameter.ndim <= 1 or name.endswith(".bias")
    return not vector and not any(fnmatch.fnmatch(name, pattern) for pattern in exempt)


def _grouped(rows: list[tuple[nn.Parameter, float, bool]], weight_decay: float) -> list[dict[str, Any]]:
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter, scale, decays in rows:
        if parameter.requires_grad:
            new = dict(params=[], weight_decay=weight_decay if decays else 0.0, lr_scale=scale)
            groups.setdefault((scale, decays), new)["params"].append(parameter)
    return list(groups.values())


def _named(model: nn.Module) -> list[tuple[str, Any]]:
    """Modules, parameters and buffers."""
    return [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]


def _published_names(network: nn.Module, whole: nn.Module) -> dict[str, str]:
    """From the names in a feature network to those of the whole model: timm wraps the model, or takes it apart and
    joins the first two parts of names (``stages.0`` becomes ``stages_0``)."""
    prefix = "model." if isinstance(network, FeatureGetterNet) else ""
    prefix = "body." if isinstance(network, FeatureHookNet) and "body" in network else prefix
    joined = {name.replace(".", "_", 1): name for name, _ in _named(whole) if "." in name}
    names = (name for name, _ in _named(network) if name)
    return {name: joined.get(bare := name.removeprefix(prefix), bare) for name in names}
