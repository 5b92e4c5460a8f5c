"""CARE: convolution and linear attention, decoupled and fused twice.

Paper: CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction (Zhou et al., CVPR
2025, arXiv:2411.16170). The authors' repository, https://github.com/zhouyuan888888/CARE-Transformer, has no licence for
code or weights. This is an independent implementation; checkpoints in the authors' format load unchanged and give the
published outputs.

A block splits its channels into four equal parts. The first is the memory, which bypasses the mixing; the others go
through a global operation (a pair of strip convolutions in the first two stages, linear attention in the last two), a
3x3 and a 7x7 depthwise convolution. One interaction (an inverted residual without the outer residual) fuses the three,
another one fuses the result with the memory.

The network has two classifiers, one of which the authors trained by distillation. The output is their mean.

Parameters have the authors' names. Feature maps are ``[B, C, H, W]``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SelectAdaptivePool2d
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import at_least, channels_last_on_cpu, is_dynamic
from .base import Backbone, check_head, check_names, create, keep_new, unwrap
from .layers import (
    Classifiers,
    Stage,
    add_scaled,
    drop_path_rates,
    fx_leaf,
    gelu_of,
    init_weights,
    scale_channels,
    sum_of,
    unwatched,
)

__all__ = ["CARE", "checkpoint_filter_fn", "family"]


class TokenMixer(nn.Module):
    """The memory, a global operation, a 3x3 and a 7x7 depthwise convolution, each on a quarter of the channels.

    Args:
        dim: channels.
        head_dim: channels per head of the linear attention; None for strip convolutions in its place.
    """

    def __init__(self, dim: int, head_dim: int | None) -> None:
        super().__init__()
        part = dim // 4
        self.head_dim = head_dim
        if head_dim is None:
            self.dwconvatt_1 = nn.Conv2d(part, part, (11, 1), padding=(5, 0), groups=part)
            self.dwconvatt_2 = nn.Conv2d(part, part, (1, 11), padding=(0, 5), groups=part)
        else:
            if part % head_dim:
                raise ValueError(f"{part} channels of attention (embed_dim {dim}) are not divisible by {head_dim=}")
            self.qk = nn.Conv2d(part, 2 * part, 1)
        self.dwconv1 = nn.Conv2d(part, part, 3, padding=1, groups=part)
        self.dwconv2 = nn.Conv2d(part, part, 7, padding=3, groups=part)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, C, H, W]`` to the memory ``[B, C / 4, H, W]`` and the features ``[B, 3 * C / 4, H, W]``."""
        memory, a, b, c = x.chunk(4, dim=1)
        if self.head_dim is None:
            a = self.dwconvatt_1(a) + self.dwconvatt_2(a)
        else:
            a = linear_attention(self.qk(a), a, self.head_dim)
        return memory, torch.cat([a, self.dwconv1(b), self.dwconv2(c)], dim=1)


@fx_leaf
def linear_attention(qk: torch.Tensor, v: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Attention without a softmax, linear in the number of positions: with ``q, k = elu(qk) + 1``,
    ``q (k^T v / N) / (q . mean(k) + 1e-6)`` over the N positions of the map.

    Sums over positions use at least float32, also under autocast.

    Args:
        qk: ``[B, 2 * C, H, W]``, queries first.
        v: ``[B, C, H, W]``.
        head_dim: consecutive channels of a head; divides C.

    Returns:
        ``[B, C, H, W]`` in the dtype of ``v``.
    """
    B, C, H, W = v.shape
    dtype = v.dtype
    wide = torch.promote_types(torch.promote_types(dtype, qk.dtype), torch.float32)
    device = v.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return linear_attention(qk.to(wide), v.to(wide), head_dim).to(dtype)
    q, k = (F.elu(qk.to(wide)) + 1.0).chunk(2, dim=1)
    q, k, v = (_by_head(x, head_dim) for x in (q, k, v.to(wide)))
    vk = torch.bmm(v, k.transpose(1, 2)) / (H * W)
    z = torch.bmm(k.mean(-1).unsqueeze(-2), q) + 1e-6
    return (torch.bmm(vk, q) / z).reshape(B, C, H, W).to(dtype)


def _by_head(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``[B, C, H, W]`` to ``[B * C / head_dim, head_dim, H * W]``."""
    B, C, H, W = x.shape
    if is_dynamic(H, W):  # exporters guard on a single position to decide whether this is a view
        x = x.clone(memory_format=torch.contiguous_format)
    return x.reshape(B * (C // head_dim), head_dim, H * W)


class Interaction(nn.Module):
    """The dual interaction: fuses the features among themselves, then with the memory.

    Args:
        dim: channels.
        ratios: expansion of the two, relative to their inputs (three quarters of ``dim``, and ``dim``).
        project: project the output to ``dim`` channels and add the input; otherwise it has ``ratios[1] * dim``.
    """

    def __init__(self, dim: int, ratios: tuple[int, int], project: bool = True) -> None:
        super().__init__()
        features = dim // 4 * 3
        hidden = features * ratios[0]
        self.inter1_norm = nn.BatchNorm2d(features)
        self.inter1_fc1 = nn.Conv2d(features, hidden, 1)
        self.inter1_conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.inter1_fc2 = nn.Conv2d(hidden, features, 1)
        hidden = dim * ratios[1]
        self.inter2_norm = nn.BatchNorm2d(dim)
        self.inter2_fc1 = nn.Conv2d(dim, hidden, 1)
        self.inter2_conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.inter2_fc2 = nn.Conv2d(hidden, dim, 1) if project else None

    def forward(self, memory: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x = sum_of(x, self.inter1_fc2, self.inter1_conv(gelu_of(self.inter1_fc1, self.inter1_norm(x))))
        x = torch.cat([memory, x], dim=1)
        y = self.inter2_conv(gelu_of(self.inter2_fc1, self.inter2_norm(x)))
        return y if self.inter2_fc2 is None else sum_of(x, self.inter2_fc2, y)


class CAREBlock(nn.Module):
    """Token mixer and interaction with LayerScale and stochastic depth around both.

    ``expand`` makes it the last block of the network, which widens to ``ratios[1] * dim`` channels for the classifiers
    and has neither LayerScale nor a residual.
    """

    gamma: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        ratios: tuple[int, int],
        head_dim: int | None,
        drop_path: float = 0.0,
        expand: bool = False,
    ) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(dim, head_dim)
        self.inter_layer = Interaction(dim, ratios, project=not expand)
        self.register_parameter("gamma", None if expand else nn.Parameter(torch.full((dim,), 1e-6)))
        self.drop_path = DropPath(drop_path) if drop_path > 0 and not expand else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, features = self.token_mixer(x)
        y = self.inter_layer(memory, features)
        if self.gamma is None:
            return y
        if type(self.drop_path) is nn.Identity and unwatched(self.drop_path):
            return add_scaled(x, y, self.gamma)
        return x + self.drop_path(scale_channels(y, self.gamma))


class Downsample(nn.Sequential):
    """BatchNorm and a 2x2 convolution of stride 2."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(nn.BatchNorm2d(dim), nn.Conv2d(dim, dim_out, 2, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(at_least(x, 2))


class CAREHead(nn.Module):
    """GELU, LayerNorm and Linear over the last axis."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(F.gelu(x)))


def _head(dim: int, num_classes: int) -> nn.Module:
    head = CAREHead(dim, num_classes) if num_classes else nn.Identity()
    init_weights(head)
    return head


class CARE(Backbone):
    """CARE Transformer. Takes images of any size.

    The stem and the downsamplers do not pad: a remainder at the bottom and the right is dropped, as in the authors'
    code. A map that would become empty is zero-padded.

    Feature maps are in the channels_last memory format on a CPU, where it is faster; elsewhere the format follows the
    input.

    Args:
        in_chans: image channels.
        num_classes: classes of both classifiers, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dims: channels per stage, divisible by 4.
        depths: blocks per stage.
        ratios: per stage, the expansion of the two interactions. The last block of the last stage has
            ``ratios[-1][1] * embed_dims[-1]`` output channels.
        head_dims: per stage, the channels of an attention head; None: strip convolutions instead of attention.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0. The last block itself has
            no residual, and so none.
        out_norm: add a LayerNorm per stage, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to
            their maps, for dense prediction. Not in the authors' code.

    Attributes:
        distilled_training: see `set_distilled_training`.
        reparameterized: see `reparameterize`.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.care import CARE
        >>> model = timm.create_model("test_foveal_care", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('CARE', (1, 10))
        >>> assert isinstance(model, CARE)
        >>> model.reparameterize()(torch.randn(1, 3, 64, 96)).shape  # folded, for inference
        torch.Size([1, 10])
    """

    output_fmt = "NCHW"
    heads = ("head", "dist_head")

    head: Any  # CAREHeads, or Identities without classes
    dist_head: Any

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (2, 4, 8, 4),
        ratios: Sequence[tuple[int, int]] = ((2, 2), (2, 4), (4, 4), (4, 4)),
        head_dims: Sequence[int | None] = (None, None, 16, 32),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        lengths = {"embed_dims": len(embed_dims), "ratios": len(ratios), "head_dims": len(head_dims)}
        if set(lengths.values()) != {len(depths)}:
            raise ValueError(f"depths {tuple(depths)} differ in length from others, which have {lengths}")
        if any(dim % 4 for dim in embed_dims):
            raise ValueError(f"embed_dims must be divisible by 4, got {tuple(embed_dims)}")
        if min(depths) < 1:
            raise ValueError(f"depths must be at least 1, got {tuple(depths)}")
        self.distilled_training = False
        self.reparameterized = False

        self.stem = nn.Sequential(nn.Conv2d(in_chans, embed_dims[0], 4, stride=4), nn.BatchNorm2d(embed_dims[0]))
        rates = drop_path_rates(drop_path_rate, depths)
        last = (len(depths) - 1, depths[-1] - 1)
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            downsample = Downsample(embed_dims[i - 1], dim) if i > 0 else None
            blocks = [
                CAREBlock(dim, ratios[i], head_dims[i], drop_path=rates[i][j], expand=(i, j) == last)
                for j in range(depth)
            ]
            stages.append(Stage(blocks, downsample))
            self._add_map(dim * ratios[i][1] if i == last[0] else dim, f"stages.{i}", LayerNorm2d)
        self.stages = nn.Sequential(*stages)
        init_weights(self)
        self._init_head(self.feature_info[-1]["num_chs"], num_classes, global_pool, drop_rate)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        check_head(num_classes, global_pool)
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head, self.dist_head = (_head(self.head_hidden_size, num_classes) for _ in range(2))

    def get_classifier(self) -> Classifiers:
        """The two classifiers, the distilled one second: Linears, or Identities without classes."""
        heads = self.head, self.dist_head
        return Classifiers(head.fc for head in heads) if self.num_classes else Classifiers(heads)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let `forward` return the pair (logits, distilled logits) in training mode instead of their mean."""
        self.distilled_training = enable

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(at_least(channels_last_on_cpu(x), 4))

    def forward_head(
        self, x: torch.Tensor, pre_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``[B, num_features, h, w]`` to the logits, or with ``pre_logits`` to ``[B, head_hidden_size]``."""
        x = self.head_drop(self.global_pool(x))
        if pre_logits or not self.num_classes:
            return x
        if self.global_pool.is_identity():  # the classifiers take the channels last
            x = x.permute(0, 2, 3, 1)
        logits, distilled = self.head(x), self.dist_head(x)
        if self.global_pool.is_identity():
            logits, distilled = logits.permute(0, 3, 1, 2), distilled.permute(0, 3, 1, 2)
        if self.training and self.distilled_training:
            return logits, distilled
        return (logits + distilled) / 2

    def reparameterize(self) -> CARE:
        """Fold every BatchNorm into the convolution beside it, in place, for inference.

        Outputs equal those in evaluation mode up to rounding, including the border, as the convolutions have no
        padding. Idempotent. `checkpoint_filter_fn` converts state dicts between both forms.

        Returns:
            The model itself.
        """
        if not self.reparameterized:
            whole = self.state_dict()
            folded = fold_batch_norms(whole)
            for name in whole:
                if name.endswith(".running_var"):  # BatchNorms, also synchronized and frozen ones
                    self.set_submodule(name.removesuffix(".running_var"), nn.Identity())
            self.load_state_dict(folded)
            self.reparameterized = True
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_EPS = nn.BatchNorm2d(1).eps
_HEADS = r"(dist_)?head\."


def fold_batch_norms(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a state dict of `CARE` to the form of `CARE.reparameterize`, in float64. Does not change the argument.

    Raises:
        ValueError: a tensor of a BatchNorm is missing.
    """
    out = dict(state_dict)
    for name in state_dict:
        if not name.endswith(".running_var"):
            continue
        bn = name.removesuffix(".running_var")
        if bn == "stem.1":  # the only one that follows its convolution
            conv = "stem.0"
        elif bn.endswith(".downsample.0"):
            conv = bn.removesuffix("0") + "1"
        else:
            conv = bn.removesuffix("norm") + "fc1"
        needed = [f"{bn}.{leaf}" for leaf in _BATCH_NORM[:4]] + [f"{conv}.weight", f"{conv}.bias"]
        missing = [each for each in needed if each not in out]
        if missing:
            raise ValueError(
                f"the checkpoint is not of this model: {name} cannot be folded without {', '.join(missing)}"
            )
        gain, offset, mean, var, weight, bias = (out[each] for each in needed)
        for leaf in _BATCH_NORM:
            out.pop(f"{bn}.{leaf}", None)
        scale = gain.double() * (var.double() + _EPS).rsqrt()
        shift = offset.double() - mean.double() * scale
        if bn == "stem.1":
            w = weight.double() * scale[:, None, None, None]
            b = bias.double() * scale + shift
        else:
            w = weight.double() * scale[:, None, None]
            b = bias.double() + (weight.double() * shift[:, None, None]).sum((1, 2, 3))
        out[f"{conv}.weight"], out[f"{conv}.bias"] = w.to(weight.dtype), b.to(bias.dtype)
    return out


def checkpoint_filter_fn(state_dict: dict[str, Any], model: CARE) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the authors' checkpoints, which have the same names, and state dicts of these models, also wrapped by
    ``features_only`` or ``DistributedDataParallel``. A reparameterized model loads other checkpoints folded. Any other
    model loads a reparameterized checkpoint with identity BatchNorms: the outputs are the same, but training would
    continue from neutral statistics.

    If the checkpoint has no norms of ``out_norm``, those of the model keep their values.

    Args:
        state_dict: names to tensors, or a checkpoint with them under ``state_dict`` or ``model``.
        model: the model to load the result into.

    Raises:
        ValueError: the parameter names (except the classifiers', which timm handles) do not fit the model.
    """
    state_dict = unwrap(state_dict)
    own = model.state_dict()

    batch_norms = [name.removesuffix(".running_var") for name in own if name.endswith(".running_var")]
    if not batch_norms:
        state_dict = fold_batch_norms(state_dict)
    elif not any(f"{bn}.{leaf}" in state_dict for bn in batch_norms for leaf in _BATCH_NORM):  # a reparameterized one
        neutral = (torch.ones_like, torch.zeros_like, torch.zeros_like, torch.ones_like, torch.zeros_like)
        for bn in batch_norms:
            for leaf, fill in zip(_BATCH_NORM, neutral, strict=True):
                state_dict[f"{bn}.{leaf}"] = fill(own[f"{bn}.{leaf}"])
            state_dict[f"{bn}.running_var"] -= _EPS

    keep_new(state_dict, own)
    if not model.num_classes:
        state_dict = {name: value for name, value in state_dict.items() if not re.match(_HEADS, name)}
    check_names(state_dict, own, ignore=_HEADS)
    return state_dict


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------

_NOTES = (
    "The authors' repository has no licence for code or weights.",
    "Their weights are only on Google Drive and not downloaded automatically: get CARETrans_S*.pth.tar from the folder "
    "linked in their repository and pass pretrained=True, pretrained_cfg_overlay=dict(file=PATH).",
)


def _cfg(**facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "first_conv": "stem.0",
        "classifier": ("head.fc", "dist_head.fc"),
        "license": "none stated",
        "origin_url": "https://github.com/zhouyuan888888/CARE-Transformer",
        "paper_ids": "arXiv:2411.16170",
        "notes": _NOTES,
        **facts,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.in1k": _cfg() for name in ("care_s0", "care_s1", "care_s2")},
        "test_foveal_care.untrained": _cfg(
            input_size=(3, 64, 64), pool_size=(2, 2), license="apache-2.0", origin_url=None, notes=None
        ),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"CARE"``."""
    return "CARE"


_create = partial(create, checkpoint_filter_fn, CARE)


@register_model
def care_s0(pretrained: bool = False, **kwargs: Any) -> CARE:
    """CARE-S0, 7.3 M parameters."""
    args = dict(embed_dims=(32, 64, 128, 256), depths=(2, 4, 8, 4), ratios=((2, 2), (2, 4), (4, 4), (4, 4)))
    return _create("care_s0", pretrained, kwargs, **args)


@register_model
def care_s1(pretrained: bool = False, **kwargs: Any) -> CARE:
    """CARE-S1, 9.6 M parameters."""
    args = dict(embed_dims=(32, 64, 128, 256), depths=(3, 6, 10, 6), ratios=((2, 4), (2, 4), (4, 4), (4, 4)))
    return _create("care_s1", pretrained, kwargs, **args)


@register_model
def care_s2(pretrained: bool = False, **kwargs: Any) -> CARE:
    """CARE-S2, 19.5 M parameters."""
    args = dict(embed_dims=(32, 64, 192, 384), depths=(3, 6, 10, 6), ratios=((4, 4), (4, 4), (4, 4), (4, 4)))
    return _create("care_s2", pretrained, kwargs, **args)


@register_model
def test_foveal_care(pretrained: bool = False, **kwargs: Any) -> CARE:
    """A very small CARE, for tests and demonstrations."""
    args = dict(embed_dims=(16, 16, 32, 64), depths=(1, 1, 2, 2), ratios=((2, 2),) * 4, head_dims=(None, None, 4, 8))
    return _create("test_foveal_care", pretrained, kwargs, **args)
