"""Pyramid Vision Transformer with agent or InLine attention.

Papers: Agent Attention (Han et al., ECCV 2024, arXiv:2312.08874); InLine attention: Bridging the Divide: Reconsidering
Softmax and Linear Attention (Han et al., NeurIPS 2024, arXiv:2412.06590); PVT (Wang et al., ICCV 2021,
arXiv:2102.12122). The authors' repositories, https://github.com/LeapLabTHU/Agent-Attention and
https://github.com/LeapLabTHU/InLine, state no licence for code or weights. This is an independent implementation;
checkpoints in the authors' format load unchanged and give the published outputs.

Every stage is a patch embedding without overlap, an absolute position embedding, and pre-norm blocks. The keys are not
reduced, as both attentions are linear in the number of positions. There is no class token and no final norm.

Position embeddings are interpolated to any map. In the authors' code those of the later stages are not, if the first
map has the size of such a stage in training, which crashes or misplaces them (448x448, 112x448).

Feature maps are channels-last inside, ``[B, H, W, C]``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import at_least, resampled_positions, to_nchw
from .base import Backbone, check_names, create, unwrap
from .hosts import (
    CODE,
    UNPUBLISHED,
    attention_of_stages,
    check_agent_shapes,
    family,
    own_convolution,
    published_cfg,
    stage_sizes,
)
from .layers import PreNormBlock, Stage, bilinear, drop_path_rates, fx_leaf, init_weights

__all__ = ["PVT", "checkpoint_filter_fn", "family"]


class PatchEmbed(nn.Module):
    """Convolution without overlap, which rounds the size down (but to at least 1), LayerNorm, and a learned position
    embedding: ``[B, C, H, W]`` to ``[B, h, w, dim_out]``."""

    def __init__(self, dim: int, dim_out: int, patch_size: int, map_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(dim, dim_out, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim_out)
        self.pos_embed = nn.Parameter(torch.empty(1, *map_size, dim_out))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _positioned(self.norm(self.proj(at_least(x, self.patch_size)).permute(0, 2, 3, 1)), self.pos_embed)


@fx_leaf
def _positioned(x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, H, W, C]`` plus the embedding, interpolated bilinearly as in the authors' dense models."""
    return x + bilinear(embedding.permute(0, 3, 1, 2), x.shape[1:3]).permute(0, 2, 3, 1)


class Downsample(PatchEmbed):
    """`PatchEmbed` of a channels-last map, of stride 2."""

    def __init__(self, dim: int, dim_out: int, map_size: tuple[int, int]) -> None:
        super().__init__(dim, dim_out, 2, map_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(to_nchw(x))


class PVT(Backbone):
    """Pyramid Vision Transformer. Takes images of any size.

    Args:
        img_size: of training, an int or (height, width); position embeddings and biases are interpolated for others.
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dims: channels per stage.
        depths: blocks per stage.
        num_heads: attention heads per stage; must divide the channels.
        mlp_ratios: hidden channels of the MLP per stage, relative to ``embed_dims``.
        attention: ``"agent"``, ``"inline"`` or ``"softmax"`` (over the whole map).
        agents: of `AgentAttention2d`, per stage.
        agent_shapes: ``agent_shape`` of `AgentAttention2d` per stage, or None for ``agents``. The authors' detectors
            and segmenters have (12, 16, 28, 28).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.pvt import PVT
        >>> model = timm.create_model("test_foveal_agent_pvt", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('PVT', (1, 10))
    """

    tables = ()

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attention: str = "softmax",
        agents: Sequence[int] = (3, 4, 7, 7),
        agent_shapes: Sequence[int | Sequence[int]] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, output_stride)
        sizes = stage_sizes(img_size, len(depths), rounds_up=False)
        per_stage = dict(embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, agents=agents)
        attend = attention_of_stages(attention, sizes, agent_shapes, dict(split_q=True), depths=depths, **per_stage)
        self.agent_shapes = agents if attention != "agent" else agent_shapes  # None: may be wrong for a dense file
        rates, stages = drop_path_rates(drop_path_rate, depths), []
        for i, (dim, size) in enumerate(zip(embed_dims, sizes, strict=True)):
            blocks = [PreNormBlock(dim, attend[i](dim), mlp_ratios[i], rate) for rate in rates[i]]
            if i == 0:
                self.stem = PatchEmbed(in_chans, dim, 4, size)
            stages.append(Stage(blocks, Downsample(embed_dims[i - 1], dim, size) if i else None))
            self._add_map(dim, f"stages.{i}")
        self.stages = nn.Sequential(*stages)
        init_weights(self)
        self._init_head(embed_dims[-1], num_classes, global_pool, drop_rate)


# ---- checkpoints


def _own_name(name: str) -> str:
    """Our name of a parameter: ``stages.0.blocks.`` for the authors' ``block1.``, for instance."""
    name = re.sub(r"^block([1-4])\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.", name)
    name = re.sub(r"^patch_embed([1-4])\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.", name)
    name = re.sub(r"^pos_embed([1-4])$", lambda match: f"stages.{int(match[1]) - 1}.downsample.pos_embed", name)
    return own_convolution(re.sub(r"^stages\.0\.downsample\.", "stem.", name))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: PVT) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the names of the authors, the backbones of their detectors and segmenters included, and of these models,
    also wrapped by ``features_only`` or ``DistributedDataParallel``, or under ``state_dict`` or ``model``. Position
    embeddings and biases for another ``img_size`` are interpolated.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model, or the
            checkpoint is of a detector or segmenter and the model has no ``agent_shapes``.
    """
    own = model.state_dict()
    found = {_own_name(name): value for name, value in unwrap(state_dict).items()}
    check_names(found, own)
    check_agent_shapes(state_dict, model, len(found))
    return resampled_positions(found, own)


# ---- registry

_FILES = {  # on Tsinghua's cloud
    "agent_pvt_t.in1k": "13fdf0e0a7c5498c934f",
    "agent_pvt_s.in1k": "36b8be9a8863456685a3",
    "agent_pvt_m.in1k": "4d00ecacf18b45f9b88c",
    "agent_pvt_m_256.in1k": "654df734121643b19c52",
    "agent_pvt_l.in1k": "040cfe0cfbbe4762ad09",
    "inline_pvt_t.in1k": "90ac52b1555b401eb5e6",
    "inline_pvt_s.in1k": "1ab953b2479d433080a3",
    "inline_pvt_m.in1k": "a72aec31e6084bc0a280",
    "inline_pvt_l.in1k": "efd91318ba964f01b288",
}


_pvt = partial(published_cfg, first_conv="stem.proj", paper="arXiv:2102.12122")
default_cfgs = generate_default_cfgs(
    {
        **{name: _pvt(name.partition("_")[0], file, 256 if "_256" in name else 224) for name, file in _FILES.items()},
        **{f"test_foveal_{kind}_pvt.untrained": _pvt(kind, "", 64, **UNPUBLISHED) for kind in CODE},
    }
)

_create = partial(create, checkpoint_filter_fn, PVT)
_S = dict(depths=(3, 4, 6, 3))
_M = dict(depths=(3, 4, 18, 3), drop_path_rate=0.3)
_L = dict(depths=(3, 8, 27, 3), drop_path_rate=0.3)
_AGENT: dict[str, Any] = dict(attention="agent", drop_path_rate=0.1)
_INLINE: dict[str, Any] = dict(attention="inline", num_heads=(2, 4, 10, 16), drop_path_rate=0.1)
_SMALL = dict(
    img_size=64, embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), mlp_ratios=(2, 2, 2, 2), agents=(2, 2, 3, 3)
)


@register_model
def agent_pvt_t(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-T, 11.6 M parameters."""
    return _create("agent_pvt_t", pretrained, kwargs, **_AGENT)


@register_model
def agent_pvt_s(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-S, 20.6 M parameters."""
    return _create("agent_pvt_s", pretrained, kwargs, **{**_AGENT, **_S})


@register_model
def agent_pvt_m(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-M, 35.9 M parameters."""
    return _create("agent_pvt_m", pretrained, kwargs, **{**_AGENT, **_M})


@register_model
def agent_pvt_m_256(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-M for 256 pixels, 36.1 M parameters."""
    return _create("agent_pvt_m_256", pretrained, kwargs, **{**_AGENT, **_M}, img_size=256)


@register_model
def agent_pvt_l(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-L, 48.7 M parameters."""
    return _create("agent_pvt_l", pretrained, kwargs, **{**_AGENT, **_L})


@register_model
def inline_pvt_t(pretrained: bool = False, **kwargs: Any) -> PVT:
    """InLine-PVT-T, 12.0 M parameters."""
    return _create("inline_pvt_t", pretrained, kwargs, **_INLINE)


@register_model
def inline_pvt_s(pretrained: bool = False, **kwargs: Any) -> PVT:
    """InLine-PVT-S, 21.6 M parameters."""
    return _create("inline_pvt_s", pretrained, kwargs, **{**_INLINE, **_S})


@register_model
def inline_pvt_m(pretrained: bool = False, **kwargs: Any) -> PVT:
    """InLine-PVT-M, 37.6 M parameters."""
    return _create("inline_pvt_m", pretrained, kwargs, **{**_INLINE, **_M})


@register_model
def inline_pvt_l(pretrained: bool = False, **kwargs: Any) -> PVT:
    """InLine-PVT-L, 51.2 M parameters."""
    return _create("inline_pvt_l", pretrained, kwargs, **{**_INLINE, **_L})


@register_model
def test_foveal_agent_pvt(pretrained: bool = False, **kwargs: Any) -> PVT:
    """A very small Agent-PVT, for tests and demonstrations."""
    return _create("test_foveal_agent_pvt", pretrained, kwargs, **_SMALL, attention="agent", num_heads=(1, 2, 3, 4))


@register_model
def test_foveal_inline_pvt(pretrained: bool = False, **kwargs: Any) -> PVT:
    """A very small InLine-PVT, for tests and demonstrations."""
    return _create("test_foveal_inline_pvt", pretrained, kwargs, **_SMALL, attention="inline", num_heads=(2, 4, 6, 8))
