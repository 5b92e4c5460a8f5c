"""The base class of the backbones, with timm's methods, and helpers to create and load models."""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, is_model
from timm.models._features import FeatureGetterNet
from torch import nn

from .layers import Blocks, init_weights, plain_numbers, refuse_scripting, to_format

POOLS = ("", "avg", "max", "avgmax", "catavgmax")


class Backbone(nn.Module):
    """A stem, levels with a feature map each, and a head of pooling, dropout and classifier.

    A subclass calls this constructor, builds its stem and levels (a Sequential named ``levels_name``), calls `_add_map`
    for each level and finally `_init_head`. It defines `_stem` and overrides other methods with an underscore as
    needed. The final norm is ``norm``; the norms of ``out_norm`` are ``norm0``, ``norm1`` ...

    Args:
        in_chans: image channels.
        output_stride: as requested by the user; only ``stride`` is supported.
        stride: of the last map.
        out_norm: add a norm per map, which `forward_intermediates` applies.
    """

    output_fmt = "NHWC"  # of the maps inside and of forward_features
    stem_name = "stem"
    levels_name = "stages"  # part of every parameter's name
    downsample_last = False  # the levels are `layers.Level`s, which end in the downsampler, else `layers.Stage`s
    uniform = False  # all levels have the same shape, so the final norm and the head fit every map
    heads: tuple[str, ...] = ("head",)  # the classifiers; further ones may be None
    tables: tuple[str, ...] = ("rpb",)  # suffixes of the names of relative position biases
    out_indices: int | Sequence[int] | None = None  # default of features_only: all maps
    __prepare_scriptable__ = refuse_scripting

    feature_info: list[dict[str, Any]]
    num_features: int
    num_classes: int
    global_pool: Any  # a module with timm's ``feat_mult`` and ``pool_type``, or the latter alone
    head: nn.Module
    norm: nn.Module

    def __init__(self, in_chans: int, output_stride: int, stride: int = 32, out_norm: bool = False) -> None:
        super().__init__()
        if output_stride != stride:
            raise ValueError(f"output_stride {output_stride} is not supported: {type(self).__name__} has {stride}")
        self.in_chans = in_chans
        self.out_norm = out_norm
        self.feature_info = []

    def _add_map(self, channels: int, module: str, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        """Add a feature map with ``channels`` at twice the stride of the previous one, starting at 4."""
        i = len(self.feature_info)
        self.feature_info.append(dict(num_chs=channels, reduction=4 * 2**i, module=module))
        if self.out_norm:
            self.add_module(f"norm{i}", norm_layer(channels))

    # ---- the head

    def _init_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        self.num_features = num_features
        self.drop_rate = drop_rate
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(num_classes, global_pool)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        check_head(num_classes, global_pool)
        self.num_classes = num_classes
        layers: Any = create_classifier(self._head_width, num_classes, pool_type=global_pool, input_fmt=self.output_fmt)
        self.global_pool, self.head = layers
        self.head_hidden_size = self._head_width * self.global_pool.feat_mult()
        init_weights(self.head)

    @property
    def _head_width(self) -> int:
        """Channels of the map that is pooled."""
        return self.num_features

    def _remove_head(self) -> None:
        self.reset_classifier(0, "")

    def get_classifier(self) -> nn.Module:
        """The classifier: a Linear, or an Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, an auxiliary one too, by a new one for ``num_classes`` (0: none), and the pooling if
        one is given. Hidden layers of the head stay."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        like = next(self.parameters())
        self._set_head(num_classes, pool)
        for name in self.heads:
            head = getattr(self, name)
            if head is not None:
                head.to(device=like.device, dtype=like.dtype).train(self.training)

    # ---- training

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides biases and norms: the relative position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(self.tables)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise learning rates; the norm of a stage is with its last block."""
        level = rf"^{self.levels_name}\.(\d+)"
        last = 99999
        between = (last if self.downsample_last else 0,)
        fine = [
            (rf"{level}\.downsample", between),
            (rf"{level}\.blocks\.(\d+)", None),
            (rf"{level}\.norm", (last,)),
            (r"^(?:norm|proj\b)", (last,)),
        ]
        return dict(stem=rf"^{self.stem_name}", blocks=level if coarse else fine)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations. BatchNorms in them then see
        every batch twice, which only acts like a larger momentum."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.grad_checkpointing = enable

    # ---- features

    @property
    def _levels(self) -> Any:  # a Sequential
        return getattr(self, self.levels_name)

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the input of the first level."""
        return getattr(self, self.stem_name)(x)

    def _level(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The map of level ``i`` from that of the previous level or the stem."""
        if self.downsample_last:
            return self._levels[i].blocks(self._levels[i - 1].downsample(x) if i else x)
        return self._levels[i](x)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if hasattr(self, "norm") else x

    def _maps(
        self, x: torch.Tensor, take: Sequence[int], stop: int, norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The map of level ``stop``, and the maps of the levels ``take``, optionally normalized."""
        maps = []
        x = self._stem(x)
        for i in range(stop + 1):
            x = self._level(i, x)
            if i in take and self.out_norm:
                maps.append(getattr(self, f"norm{i}")(x))
            elif i in take:
                maps.append(self._norm(x) if norm and (self.uniform or i == len(self.feature_info) - 1) else x)
        return x, maps

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The feature maps of the levels, before downsampling for the next.

        Args:
            x: images ``[B, in_chans, H, W]``.
            indices: the last n maps if an int, these maps if a sequence, all if None.
            norm: apply the final norm, if any, to the last map, or to all maps of an isotropic model. A model with
                ``out_norm`` always applies its norms per map instead.
            stop_early: skip the levels after the last requested one.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: return only the maps.

        Returns:
            The maps (at strides 4, 8, 16, 32 for a hierarchical model), or (final features as from `forward_features`,
            maps). With ``stop_early`` the final features are those of the last level that ran.
        """
        count = len(self.feature_info)
        take, last = take_indices(count, indices)
        stop = last if stop_early or intermediates_only else count - 1
        x, maps = self._maps(x, take, stop, norm)
        maps = [to_format(each, output_fmt, self.output_fmt) for each in maps]
        if intermediates_only:
            return maps
        return (self._norm(x) if self.uniform or stop == count - 1 else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove everything that `forward_intermediates` does not need for ``indices``; returns them as a list."""
        take, last = take_indices(len(self.feature_info), indices)
        shortened = last < len(self.feature_info) - 1 and not self.uniform
        self._prune(take, last)
        self.feature_info = self.feature_info[: last + 1]
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if (prune_norm or shortened) and hasattr(self, "norm"):
            self.norm = nn.Identity()
        if prune_head or shortened:
            self._remove_head()
        return take

    def _prune(self, take: Sequence[int], last: int) -> None:
        """Remove the levels after ``last``, and the norms of maps that are not in ``take``."""
        del self._levels[last + 1 :]
        if self.downsample_last:
            self._levels[-1].downsample = nn.Identity()
        if self.out_norm:
            for i in set(range(len(self.feature_info))) - set(take):
                delattr(self, f"norm{i}")

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, in_chans, H, W]`` to the last map, through the final norm if there is one: ``[B, h, w,
        num_features]``, or ``[B, num_features, h, w]`` if ``output_fmt`` is ``"NCHW"``."""
        return self._norm(self._levels(self._stem(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The map of `forward_features` to logits, or with ``pre_logits`` to ``[B, head_hidden_size]``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))


class ProjectedBackbone(Backbone):
    """A `Backbone` whose head has a Linear ``proj``, a BatchNorm ``norm`` and SiLU before the pooling;
    `forward_features` returns the map before them."""

    proj: Any  # an Identity without a head

    @property
    def _head_width(self) -> int:
        return getattr(self.proj, "out_features", self.num_features)

    def _remove_head(self) -> None:
        self.proj, self.norm = nn.Identity(), nn.Identity()
        super()._remove_head()

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.proj, nn.Identity):
            return x
        return F.silu(self.norm(self.proj(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """``[B, h, w, num_features]`` to the logits, or with ``pre_logits`` to ``[B, head_hidden_size]``."""
        return super().forward_head(self._project(x), pre_logits)


class CollectingBackbone(Backbone):
    """A `Backbone` that has a loss of its own in training, of what the modules `_collectors` append to ``collected``,
    an attribute that is a list in a forward pass with the loss, else None."""

    auxiliary_training = False

    def _collectors(self) -> list[Any]:
        raise NotImplementedError

    def _auxiliary_loss(self, collected: list[tuple[Any, Any]]) -> torch.Tensor:
        """The loss of pairs of a module and what it appended."""
        raise NotImplementedError

    def set_auxiliary_training(self, enable: bool = True) -> None:
        """Let `forward` return the pair (logits, auxiliary loss) in training mode."""
        self.auxiliary_training = enable

    def forward(self, x: torch.Tensor) -> Any:
        """Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``; see also `set_auxiliary_training`."""
        if not (self.training and self.auxiliary_training):
            return super().forward(x)
        modules = self._collectors()
        try:  # a block that is recomputed in the backward pass collects nothing
            for each in modules:
                each.collected = []
            logits = super().forward(x)
            collected = [(each, given) for each in modules for given in each.collected]
        finally:
            for each in modules:
                each.collected = None
        return logits, self._auxiliary_loss(collected)


def check_head(num_classes: int, global_pool: str, pools: Sequence[str] = POOLS) -> None:
    """Raise a ValueError for a pooling that is not one of ``pools``, or a negative number of classes."""
    if global_pool not in pools:
        raise ValueError(f"global_pool must be one of {tuple(pools)}, got {global_pool!r}")
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")


def take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """timm's ``indices`` of `forward_intermediates` (the last n, a list, or all) as a list within ``range(count)``, and
    the largest of them."""
    if indices is None:
        indices = count
    if isinstance(indices, (int, np.integer)):
        given: Sequence[int] = range(-indices, 0) if indices <= count else ()
    else:
        given = indices
    if not given or not all(-count <= i < count for i in given):
        raise ValueError(f"indices {indices} are empty or out of range for {count} maps")
    take = [i % count for i in given]
    return take, max(take)


# ---- creating and loading


class Unread:
    """Placeholder for other objects in a checkpoint: accepts any arguments and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# For torch.load, the arguments that training scripts store with their weights: a Namespace is harmless, paths in it are
# not read, and a CfgNode becomes a dict.
ARGUMENTS = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),  # the only class with attributes that torch lets set items
    *((Unread, f"{module}.{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
]


def scored_raw(architecture: str) -> bool:
    """Whether the published score is of the raw weights, where a file has averaged (EMA) ones, too."""
    return architecture == "rmt_t" or architecture.startswith(("shiftvit_", "stvit_", "tap_fan_"))


Model = TypeVar("Model", bound=Backbone)
Filter = Callable[[dict[str, Any], Any], dict[str, torch.Tensor]]


def create(
    filter_fn: Filter, cls: type[Model], variant: str, pretrained: bool, kwargs: Mapping[str, Any], **defaults: Any
) -> Model:
    """Build a registered model with timm's builder; the user's ``kwargs`` override the variant's ``defaults``."""
    arguments = plain_numbers({**defaults, **kwargs})
    out_indices = arguments.pop("out_indices", cls.out_indices)
    if out_indices is None and arguments.get("feature_cls", "getter") != "getter":  # timm's others need a number
        out_indices = len(arguments.get("depths", range(4)))
    feature_cfg = dict(out_indices=out_indices, feature_cls="getter")
    device, dtype = arguments.pop("device", None), arguments.pop("dtype", None)
    overlay = arguments.get("pretrained_cfg_overlay") or {}
    file = overlay.get("file") if pretrained and scored_raw(variant) else None
    with torch.serialization.safe_globals(ARGUMENTS), nullcontext() if device is None else torch.device(device):
        if file is not None and Path(file).suffix != ".safetensors":  # of which timm takes the averaged weights
            whole = torch.load(file, map_location="cpu", weights_only=True)
            arguments["pretrained_cfg_overlay"] = {**overlay, "file": None, "state_dict": whole}
        model = build_model_with_cfg(
            cls, variant, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=feature_cfg, **arguments
        )
    if file is not None:
        loaded: Any = model
        loaded.pretrained_cfg |= {"state_dict": None, "file": str(file)}  # do not keep the tensors twice
    if isinstance(model, FeatureGetterNet):
        net: Any = model  # whose own names begin with "model."; without this timm's layer decay has no effect
        net.group_matcher = partial(_inside, net.model)
    elif cls.output_fmt == "NHWC" or cls._set_head is not Backbone._set_head:
        model.pretrained_cfg = model.default_cfg = WithoutTestTimePool(model.pretrained_cfg)
    return model if dtype is None else model.to(dtype)


class WithoutTestTimePool(dict):
    """A `default_cfg` that refuses timm's test-time pooling (``validate.py --test-pool``), which expects maps
    ``[B, C, h, w]`` and a single Linear as head. Only test-time pooling reads ``["pool_size"]``."""

    def __getitem__(self, key: str) -> Any:
        if key == "pool_size":
            raise NotImplementedError(
                f"timm's test-time pooling (--test-pool) does not apply to {self['architecture']}, which pools maps of "
                "any size: evaluate it without"
            )
        return super().__getitem__(key)


def _inside(model: Any, coarse: bool = False) -> dict[str, Any]:
    """The `group_matcher` of a model that is the child ``model`` of another module."""

    def inside(rule: Any) -> Any:
        if isinstance(rule, str):
            return re.sub(r"^\^", r"^model\\.", rule)
        return [(inside(pattern), order) for pattern, order in rule]

    return {name: inside(rule) for name, rule in model.group_matcher(coarse=coarse).items()}


def registered_cfg(name: str) -> PretrainedCfg:
    """timm's configuration of a registered model, with or without a tag; ValueError for other names."""
    cfg = get_pretrained_cfg(name)
    if cfg is None and is_model(name):
        raise ValueError(
            f"the model {name!r} has no configuration: its module needs "
            f"default_cfgs = generate_default_cfgs({{{name!r}: ...}}) (docs/new_backbone.md)"
        )
    if cfg is None:
        raise ValueError(f"no model {name!r} is registered")
    return cfg


def bare_names(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's tensors, out of a ``state_dict`` or ``model``, without the prefixes of ``DistributedDataParallel``
    and ``features_only``."""
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    for prefix in ("module.", "model."):
        if checkpoint and all(name.startswith(prefix) for name in checkpoint):
            checkpoint = {name[len(prefix) :]: value for name, value in checkpoint.items()}
    return dict(checkpoint)


def unwrap(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint, as a new dict with the names of a bare model.

    Removes a ``state_dict`` or ``model`` around the tensors, and the prefixes of ``DistributedDataParallel`` and
    ``features_only``. For a detector or segmenter, keeps only the ``backbone.``; of an MMPretrain classifier also its
    ``head.fc``, as ``head``.
    """
    checkpoint = bare_names(checkpoint)
    backbone = {name[9:]: value for name, value in checkpoint.items() if name.startswith("backbone.")}
    if backbone:
        backbone |= {f"head.{name[8:]}": value for name, value in checkpoint.items() if name.startswith("head.fc.")}
    return backbone or checkpoint


def keep_new(state_dict: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], pattern: str = r"norm\d") -> None:
    """Add the model's values for matching names if the checkpoint has none of them (newly added norms). Norms of maps
    that the model does not return are left out."""
    names = [name for name in own if re.match(pattern, name)]
    if not any(name in state_dict for name in names):
        state_dict.update({name: own[name] for name in names})
    unread = [name for name in state_dict if re.fullmatch(r"norm\d\.(weight|bias)", name) and name not in own]
    for name in unread if any(re.match(r"norm\d", name) for name in own) else ():
        del state_dict[name]


class NamesError(ValueError):
    """The names of a checkpoint do not fit the model; those of ``common`` tensors do, if the model is on ``meta``."""

    def __init__(self, message: str, common: int):
        super().__init__(message)
        self.common = common


def check_names(
    state_dict: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    ignore: str = r"head\.",
    map_norms: str = r"norm\d",
) -> None:
    """Check the names of a checkpoint against those of the model.

    Args:
        ignore: pattern of names that may differ: timm handles the classifier.
        map_norms: pattern of norms per feature map, which a model without ``out_norm`` lacks.

    Raises:
        NamesError: names are missing or unexpected; the message has the first ones.
        ValueError: a dense model's checkpoint for a classifier.
    """
    needed, given = ({name for name in names if not re.match(ignore, name)} for names in (own, state_dict))
    missing, unexpected = sorted(needed - given), sorted(given - needed)
    if any(re.match(map_norms, name) for name in unexpected) and not any(re.match(map_norms, name) for name in own):
        raise ValueError(
            f"the checkpoint is of a dense model, with norms per feature map ({unexpected[0]}, ...): create the model "
            "with features_only=True, out_norm=True"
        )
    if missing or unexpected:
        raise NamesError(
            f"the checkpoint does not fit the model: missing {_some(missing)}, unexpected {_some(unexpected)}",
            sum(not state_dict[name].is_meta for name in needed & given),  # without those that a filter adds
        )


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "none"
