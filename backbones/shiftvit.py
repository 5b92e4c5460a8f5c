"""ShiftViT: blocks that move channels by one position instead of attending.

Paper: When Shift Operation Meets Vision Transformer: An Extremely Simple Alternative to Attention Mechanism (Wang et
al., AAAI 2022, arXiv:2201.10801). Authors' code: https://github.com/microsoft/SPACH (MIT). This is an independent
implementation; the published weights load unchanged and give the published outputs.

A block moves a part of the channels by one position to the left, right, up and down, zeros entering, and adds an MLP to
the moved map: the move itself has no residual around it. All norms are GroupNorm with a single group, whose statistics
are those of the whole map of an image: what is padded around an image changes the output of its pixels.

Feature maps are ``[B, C, H, W]``, on a CPU in the channels_last memory format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvMlp, DropPath, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import at_least, channels_last_on_cpu
from .base import Backbone, check_names, create, keep_new, unwrap
from .layers import Stage, drop_path_rates

__all__ = ["ShiftViT", "checkpoint_filter_fn", "family"]

map_norm = partial(nn.GroupNorm, 1)


def shift(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Shift the first ``channels`` of ``x`` ``[B, C, H, W]`` by one position to the left, the next ones to the right,
    up and down, with zeros at the border; the others stay."""
    left, right, up, down, rest = x.split([channels] * 4 + [x.shape[1] - 4 * channels], dim=1)
    left, right = F.pad(left, (0, 1))[..., 1:], F.pad(right, (1, 0))[..., :-1]
    up, down = F.pad(up, (0, 0, 0, 1))[..., 1:, :], F.pad(down, (0, 0, 1, 0))[..., :-1, :]
    return torch.cat([left, right, up, down, rest], dim=1)


class ShiftBlock(nn.Module):
    """Shift, and an MLP with a residual from the shifted map.

    Args:
        dim: channels.
        n_div: one ``n_div``-th of the channels moves in each of the four directions.
    """

    def __init__(self, dim: int, n_div: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.moved = dim // n_div
        self.norm2 = map_norm(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = shift(x, self.moved)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """4x4 convolution of stride 4, and norm. A remainder is dropped."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 4, stride=4)
        self.norm = map_norm(dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(at_least(x, 4)))


class Downsample(nn.Module):
    """Norm, and 2x2 convolution of stride 2. A remainder is dropped."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm = map_norm(dim)
        self.reduction = nn.Conv2d(dim, dim_out, 2, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduction(at_least(self.norm(x), 2))


class ShiftViT(Backbone):
    """ShiftViT. Takes images of any size.

    Patch embedding and downsamplers do not pad: a remainder at the bottom and the right is dropped, as in the authors'
    code. A map that would become empty is zero-padded.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dim: channels of the first stage; each further stage has twice as many.
        depths: blocks per stage.
        mlp_ratio: hidden channels of the MLPs, relative to those of the stage.
        n_div: one ``n_div``-th of the channels moves in each direction.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.
        out_norm: add a norm per stage, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to their
            maps, for dense prediction. The authors published no dense code.

    Raises:
        ValueError: more than all channels would move; the message has the numbers.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.shiftvit import ShiftViT
        >>> model = timm.create_model("test_foveal_shiftvit", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('ShiftViT', (1, 10))
    """

    output_fmt = "NCHW"
    tables = ()

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dim: int = 96,
        depths: Sequence[int] = (6, 8, 18, 6),
        mlp_ratio: float = 2.0,
        n_div: int = 12,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        if n_div < 4:
            raise ValueError(f"n_div must be at least 4, for four directions, got {n_div}")
        self.stem = PatchEmbed(in_chans, embed_dim)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i in range(len(depths)):
            dim = embed_dim * 2**i
            blocks = [ShiftBlock(dim, n_div, mlp_ratio, drop_path=rate) for rate in rates[i]]
            stages.append(Stage(blocks, Downsample(dim // 2, dim) if i > 0 else None))
            self._add_map(dim, f"stages.{i}", map_norm)
        self.stages = nn.Sequential(*stages)
        self.norm = map_norm(dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._init_head(dim, num_classes, global_pool, drop_rate)

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(channels_last_on_cpu(x))


# ---- checkpoints


def _own_name(name: str) -> str:
    """Our name of a parameter: the authors' layers end in the downsampler of the next."""
    name = re.sub(r"^patch_embed\.", "stem.", name)
    name = re.sub(r"^layers\.(\d)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.", name)
    return re.sub(r"^layers\.", "stages.", name)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ShiftViT) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the authors' checkpoints and state dicts of these models, also wrapped by ``features_only`` or
    ``DistributedDataParallel``, or under ``state_dict`` or ``model``. If the checkpoint has no norms of ``out_norm``,
    those of the model keep their values.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    state_dict = {_own_name(name): value for name, value in unwrap(state_dict).items()}
    own = model.state_dict()
    keep_new(state_dict, own)
    check_names(state_dict, own)
    return state_dict


# ---- registry


def _cfg(file: str = "", **facts: Any) -> dict[str, Any]:
    return {
        "url": f"https://github.com/microsoft/SPACH/releases/download/v1.0/{file}.pth" if file else "",
        "pool_size": (7, 7),
        "interpolation": "bicubic",
        "first_conv": "stem.proj",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/microsoft/SPACH",
        "paper_ids": "arXiv:2201.10801",
        **facts,
    }


default_cfgs = generate_default_cfgs(
    {
        "shiftvit_tiny_light.in1k": _cfg("shiftvit_tiny_light"),
        "shiftvit_tiny.in1k": _cfg("shiftvit_tiny_r2"),
        "shiftvit_small_light.in1k": _cfg("shiftvit_small_light"),
        "shiftvit_small.in1k": _cfg("shiftvit_small_r2"),
        "shiftvit_base_light.untrained": _cfg(),
        "shiftvit_base.untrained": _cfg(),
        "test_foveal_shiftvit.untrained": _cfg(
            input_size=(3, 64, 64), pool_size=(2, 2), license="apache-2.0", origin_url=None
        ),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"ShiftViT"``."""
    return "ShiftViT"


_create = partial(create, checkpoint_filter_fn, ShiftViT)


@register_model
def shiftvit_tiny_light(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """ShiftViT-Tiny/light, 19.6 M parameters."""
    args = dict(depths=(2, 2, 6, 2), mlp_ratio=4, drop_path_rate=0.2)
    return _create("shiftvit_tiny_light", pretrained, kwargs, **args)


@register_model
def shiftvit_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """ShiftViT-Tiny, 28.6 M parameters."""
    return _create("shiftvit_tiny", pretrained, kwargs, depths=(6, 8, 18, 6), drop_path_rate=0.2)


@register_model
def shiftvit_small_light(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """ShiftViT-Small/light, 33.8 M parameters."""
    args = dict(depths=(2, 2, 18, 2), mlp_ratio=4, drop_path_rate=0.4)
    return _create("shiftvit_small_light", pretrained, kwargs, **args)


@register_model
def shiftvit_small(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """ShiftViT-Small, 50.3 M parameters."""
    return _create("shiftvit_small", pretrained, kwargs, depths=(10, 18, 36, 10), drop_path_rate=0.4)


@register_model
def shiftvit_base_light(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """ShiftViT-Base/light, 59.7 M parameters. No weights are published."""
    args = dict(embed_dim=128, depths=(2, 2, 18, 2), mlp_ratio=4, n_div=16, drop_path_rate=0.5)
    return _create("shiftvit_base_light", pretrained, kwargs, **args)


@register_model
def shiftvit_base(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """ShiftViT-Base, 89.0 M parameters. No weights are published."""
    args = dict(embed_dim=128, depths=(10, 18, 36, 10), n_div=16, drop_path_rate=0.6)
    return _create("shiftvit_base", pretrained, kwargs, **args)


@register_model
def test_foveal_shiftvit(pretrained: bool = False, **kwargs: Any) -> ShiftViT:
    """A very small ShiftViT, for tests and demonstrations."""
    return _create("test_foveal_shiftvit", pretrained, kwargs, embed_dim=24, depths=(1, 1, 2, 1), n_div=6)
