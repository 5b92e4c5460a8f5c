"""Swin with agent attention or inline attention in place of its windows: Agent-Swin and InLine-Swin.

Papers: Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030); Agent Attention (Han et al., ECCV 2024,
arXiv:2312.08874); InLine (Han et al., NeurIPS 2024, arXiv:2412.06590). Authors' code, without a licence for it or the
weights: https://github.com/LeapLabTHU/Agent-Attention and https://github.com/LeapLabTHU/InLine. This is an independent
implementation; checkpoints in the authors' format load and give the published outputs.

The first blocks of a stage attend to the whole map by `AgentAttention2d` or `InlineAttention2d`, the others to shifted
windows (`ShiftedWindowAttention2d`), every second of which is shifted. Images of any size: they are zero-padded to a
multiple of 4, and odd maps before merging. Position biases of agents are interpolated. Swin itself is timm's (see
`foveal.replace_attention`); here ``attention="softmax"`` makes the same network.

Parameters have the authors' names. The table of position biases is by key - query, theirs by query - key.
Feature maps are channels-last inside, ``[B, H, W, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import ShiftedWindowAttention2d, resampled_positions, table_by_key
from .base import Backbone, check_names, create, keep_new, unwrap
from .hosts import (
    UNPUBLISHED,
    attention_of_stages,
    check_agent_shapes,
    family,
    own_convolution,
    published_cfg,
    stage_sizes,
)
from .layers import Level, PreNormBlock, drop_path_rates, init_weights
from .nat import PatchMerging, patch_embed

__all__ = ["Swin", "checkpoint_filter_fn", "family"]


class Swin(Backbone):
    """Swin whose first blocks in a stage attend to the whole map. Takes images of any size.

    Args:
        img_size: of training, an int or (height, width); position biases of agents are interpolated for others.
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dim: channels of stage 0, doubled at every further stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        attention: of the first blocks of a stage, to the whole map: ``"agent"`` or ``"inline"``. ``"softmax"``: windows
            in all blocks, as in Swin itself.
        global_depths: how many blocks of each stage attend to the whole map.
        window_size: rows and columns of the windows of the other blocks.
        mlp_ratio: hidden channels of the MLP, relative to the stage's.
        agents: rows and columns of the grid of agents in training, per stage.
        agent_shapes: likewise, of the grid to compute with, to which position biases are interpolated. None:
            ``agents``. The authors' detectors and segmenters have other shapes than their classifiers. Given, the
            biases do not decay.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.
        out_norm: add a LayerNorm per stage, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to
            their maps, as in the authors' detection and segmentation models.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import foveal, timm, torch
        >>> model = timm.create_model("test_foveal_agent_swin", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('Swin', (1, 10))
    """

    stem_name, levels_name = "patch_embed", "layers"
    downsample_last = True
    tables = ("relative_position_bias_table",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attention: str = "agent",
        global_depths: Sequence[int] = (2, 2, 6, 0),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        agents: Sequence[int] = (3, 4, 7, 7),
        agent_shapes: Sequence[int | Sequence[int]] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        per_stage: dict[str, Any] = dict(depths=depths, num_heads=num_heads, global_depths=global_depths, agents=agents)
        attend = attention_of_stages(attention, stage_sizes(img_size, len(depths)), agent_shapes, **per_stage)
        if any(not 0 <= some <= depth for some, depth in zip(global_depths, depths, strict=True)):
            raise ValueError(f"global_depths {global_depths} exceed depths {tuple(depths)}")
        whole = (0,) * len(depths) if attention == "softmax" else global_depths
        self.agent_shapes = agents if attention != "agent" else agent_shapes  # None: wrong for a dense checkpoint
        if agent_shapes is not None:  # of detectors and segmenters, in whose recipes the biases of agents do not decay
            self.tables = (*self.tables, *(f".{name}_bias" for name in ("an", "na", "ah", "aw", "ha", "wa")))
        self.patch_embed = patch_embed(in_chans, embed_dim, patch_size=4)
        rates = drop_path_rates(drop_path_rate, depths)
        levels = []
        for i, heads in enumerate(num_heads):
            dim = embed_dim * 2**i
            blocks = []
            for j, rate in enumerate(rates[i]):
                if j < whole[i]:
                    layer = attend[i](dim)
                else:
                    layer = ShiftedWindowAttention2d(dim, heads, window_size, window_size // 2 if j % 2 else 0)
                blocks.append(PreNormBlock(dim, layer, mlp_ratio, rate, eps=1e-5))
            levels.append(Level(blocks, PatchMerging(dim) if i + 1 < len(depths) else None))
            self._add_map(dim, f"layers.{i}.blocks")
        self.layers = nn.Sequential(*levels)
        self.norm = nn.LayerNorm(dim)
        init_weights(self)
        self._init_head(dim, num_classes, global_pool, drop_rate)


# ---- checkpoints

_BUFFERS = (".relative_position_index", ".attn_mask")  # of the authors, which follow from sizes


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Swin) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the authors' classifiers, their mmdetection and mmsegmentation checkpoints (only the ``backbone.``; create
    the model with ``features_only=True, out_norm=True``, and ``agent_shapes``), and state dicts of these models, also
    wrapped by ``features_only`` or ``DistributedDataParallel``, or under ``state_dict`` or ``model``. Position biases
    of another image or window size are resampled, as in the authors' fine-tuning.

    If the checkpoint has no norms of ``out_norm``, those of the model keep their values.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model, or it is of
            a dense model and the model has no ``agent_shapes``.
    """
    own = model.state_dict()
    found = {}
    for name, value in unwrap(state_dict).items():
        name = own_convolution(name)
        if name.endswith(".attn.relative_position_bias_table"):
            name = name.replace(".attn.", ".attn.rel_pos.")
            value = _own_table(value, own.get(name))
        elif name.endswith(".attn.rel_pos.relative_position_bias_table"):
            value = _resampled(value, own.get(name))
        if not name.endswith(_BUFFERS):
            found[name] = value
    keep_new(found, own)
    check_names(found, own, ignore=r"head\.|norm\." if model.out_norm else r"head\.")
    check_agent_shapes(state_dict, model, len(found))
    return resampled_positions(found, own)


def _own_table(table: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """Swin's table as that of `RelativePositionTable`, resampled to windows of the size of ``own``."""
    side = math.isqrt(table.shape[0]) // 2 + 1
    return _resampled(table_by_key(table, (side, side)), own)


def _resampled(table: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    if own is None or table.shape[1:] == own.shape[1:]:
        return table
    return F.interpolate(table[None].float(), own.shape[1:], mode="bicubic")[0].to(table.dtype)


# ---- registry

_swin = partial(published_cfg, first_conv="patch_embed.proj", paper="arXiv:2103.14030")

default_cfgs = generate_default_cfgs(
    {
        "agent_swin_t.in1k": _swin("agent", "a2ddc1190c224f768a41"),
        "agent_swin_s.in1k": _swin("agent", "f607172c9fea4d6e99bb"),
        "agent_swin_s_288.in1k": _swin("agent", "09760394e93b4046a25e", 288, crop_pct=1.0),
        "agent_swin_b.in1k": _swin("agent", "4fcd2d0114bb490483c3"),
        "agent_swin_b_384.in1k": _swin("agent", "bb84ee9058954706a557", 384, crop_pct=1.0),
        "inline_swin_t.in1k": _swin("inline", "32810869fcc34410966b"),
        "inline_swin_s.in1k": _swin("inline", "e9657fd247c04c7cb1a1"),
        "inline_swin_b.in1k": _swin("inline", "bf23564bb64c420aafe1"),
        "test_foveal_agent_swin.untrained": _swin("agent", "", 64, **UNPUBLISHED),
    }
)

_create = partial(create, checkpoint_filter_fn, Swin)
_SMALL: dict[str, Any] = dict(depths=(2, 2, 18, 2), global_depths=(2, 2, 0, 0), drop_path_rate=0.3)
_BASE: dict[str, Any] = dict(_SMALL, embed_dim=128, num_heads=(4, 8, 16, 32), global_depths=(2, 2, 2, 0))
_BASE["drop_path_rate"] = 0.5


@register_model
def agent_swin_t(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-T, 29 M parameters."""
    return _create("agent_swin_t", pretrained, kwargs, drop_path_rate=0.2)


@register_model
def agent_swin_s(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-S, 50 M parameters."""
    return _create("agent_swin_s", pretrained, kwargs, **_SMALL)


@register_model
def agent_swin_s_288(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-S for images of 288, with windows of 9, 50 M parameters."""
    return _create("agent_swin_s_288", pretrained, kwargs, **_SMALL, window_size=9, img_size=288)


@register_model
def agent_swin_b(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-B, 88 M parameters."""
    return _create("agent_swin_b", pretrained, kwargs, **_BASE)


@register_model
def agent_swin_b_384(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-B for images of 384, with windows of 12, 88 M parameters."""
    return _create("agent_swin_b_384", pretrained, kwargs, **_BASE, window_size=12, img_size=384)


@register_model
def inline_swin_t(pretrained: bool = False, **kwargs: Any) -> Swin:
    """InLine-Swin-T, 29 M parameters."""
    return _create("inline_swin_t", pretrained, kwargs, attention="inline", drop_path_rate=0.2)


@register_model
def inline_swin_s(pretrained: bool = False, **kwargs: Any) -> Swin:
    """InLine-Swin-S, 50 M parameters."""
    return _create("inline_swin_s", pretrained, kwargs, **_SMALL, attention="inline")


@register_model
def inline_swin_b(pretrained: bool = False, **kwargs: Any) -> Swin:
    """InLine-Swin-B, 88 M parameters."""
    return _create("inline_swin_b", pretrained, kwargs, **_BASE, attention="inline")


@register_model
def test_foveal_agent_swin(pretrained: bool = False, **kwargs: Any) -> Swin:
    """A very small Agent-Swin, for tests and demonstrations."""
    args: dict[str, Any] = dict(embed_dim=16, depths=(1, 1, 2, 2), num_heads=(1, 2, 2, 4), global_depths=(1, 1, 0, 0))
    args |= dict(mlp_ratio=2.0, agents=(2, 2, 3, 3), window_size=3, img_size=64)
    return _create("test_foveal_agent_swin", pretrained, kwargs, **args)
