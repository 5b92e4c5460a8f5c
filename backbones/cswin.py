"""CSWin with agent attention or inline attention in the first two stages: Agent-CSWin and InLine-CSWin.

Papers: CSWin Transformer (Dong et al., CVPR 2022, arXiv:2107.00652); Agent Attention (Han et al., ECCV 2024,
arXiv:2312.08874); InLine (Han et al., NeurIPS 2024, arXiv:2412.06590). Authors' code, without a licence for it or the
weights: https://github.com/LeapLabTHU/Agent-Attention and https://github.com/LeapLabTHU/InLine. This is an independent
implementation; checkpoints in the authors' format load and give the published outputs.

The first two stages attend to the whole map by `AgentAttention2d` or `InlineAttention2d`, the third inside stripes and
the last to the whole map by `CrossShapedAttention2d`. The kernel of inline attention is computed from the map before
its norm, unlike in the other networks with it. Images of any size: they are zero-padded to a multiple of 4, an odd
length of a map is rounded up, and the last stripe ends where the map does.

Feature maps are channels-last inside, ``[B, H, W, C]``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import CrossShapedAttention2d, resampled_positions, to_multiple
from .base import Backbone, check_names, create, keep_new, unwrap
from .hosts import UNPUBLISHED, attention_of_stages, family, published_cfg, stage_sizes
from .layers import PreNormBlock, Stage, drop_path_rates, init_weights
from .transnext import Downsample, PatchEmbed

__all__ = ["CSWin", "checkpoint_filter_fn", "family"]


class CSWinBlock(PreNormBlock):
    """A `PreNormBlock` whose attention also reads the map before the norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, None, x)


class Stem(PatchEmbed):
    """7x7 convolution of stride 4 and LayerNorm; images are zero-padded to a multiple of 4."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(in_chans, dim, 7, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(to_multiple(x, 4))


class CSWin(Backbone):
    """CSWin whose first two stages attend to the whole map. Takes images of any size.

    Args:
        img_size: of training, an int or (height, width); position biases of agents are interpolated for others.
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dim: channels of stage 0, doubled at every further stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        attention: of the first two stages, to the whole map: ``"agent"`` or ``"inline"``. ``"softmax"``: stripes in all
            stages, as in CSWin itself.
        stripe_widths: columns or rows of the stripes in the other stages; None: attention to the whole map.
        mlp_ratio: hidden channels of the MLP, relative to the stage's.
        agents: rows and columns of the grid of agents in training, per stage.
        agent_shapes: likewise, of the grid to compute with, to which position biases are interpolated; None:
            ``agents``.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.
        out_norm: add a LayerNorm per stage, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to
            their maps.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import foveal, timm, torch
        >>> model = timm.create_model("test_foveal_agent_cswin", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('CSWin', (1, 10))
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attention: str = "agent",
        stripe_widths: Sequence[int | None] = (1, 2, 7, None),
        mlp_ratio: float = 4.0,
        agents: Sequence[int] = (3, 4, 7, 7),
        agent_shapes: Sequence[int | Sequence[int]] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        per_stage: dict[str, Any] = dict(depths=depths, num_heads=num_heads, agents=agents, stripe_widths=stripe_widths)
        sizes, options = stage_sizes(img_size, len(depths)), dict(lepe=True) if attention == "inline" else None
        attend = attention_of_stages(attention, sizes, agent_shapes, options, **per_stage)
        whole = 0 if attention == "softmax" else 2
        self.stem = Stem(in_chans, embed_dim)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, heads in enumerate(num_heads):
            dim = embed_dim * 2**i
            stripes = partial(CrossShapedAttention2d, num_heads=heads, stripe_width=stripe_widths[i])
            layers = ((attend[i] if i < whole else stripes)(dim) for _ in rates[i])
            blocks = [
                CSWinBlock(dim, layer, mlp_ratio, rate, eps=1e-5) for layer, rate in zip(layers, rates[i], strict=True)
            ]
            stages.append(Stage(blocks, Downsample(dim // 2, dim) if i else None))
            self._add_map(dim, f"stages.{i}")
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dim)
        init_weights(self)
        self._init_head(dim, num_classes, global_pool, drop_rate)


# ---- checkpoints

_NAMES = {  # of the authors, to ours; get_v is LePE, the convolution of the values
    r"^stage1_conv_embed\.0\.": "stem.proj.",
    r"^stage1_conv_embed\.2\.": "stem.norm.",
    r"^merge(\d)\.conv\.": r"stages.\1.downsample.proj.",
    r"^merge(\d)\.norm\.": r"stages.\1.downsample.norm.",
    r"^(stage\d\.\d+)\.(qkv|proj)\.": r"\1.attn.\2.",
    r"^(stage[12]\.\d+)\.attns\.0\.get_v\.": r"\1.attn.dwc.conv.",
    r"^(stage[12]\.\d+)\.attns\.0\.": r"\1.attn.",
    r"^(stage[34]\.\d+)\.attns\.(\d)\.get_v\.": r"\1.attn.lepe.\2.conv.",
}


def _own_name(name: str) -> str:
    """Our name of a parameter: ``stages.0.blocks.`` for the authors' ``stage1.``, for instance."""
    for pattern, own in _NAMES.items():
        name = re.sub(pattern, own, name)
    return re.sub(r"^stage(\d)\.(?=\d)", lambda match: f"stages.{int(match[1]) - 1}.blocks.", name)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: CSWin) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the authors' classifiers, of which the averaged weights (``state_dict_ema``) are taken, whose scores are
    published, and state dicts of these models, also wrapped by ``features_only`` or ``DistributedDataParallel``, or
    under ``state_dict`` or ``model``. Position biases of agents for another image size are resampled.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    averaged = state_dict.get("state_dict_ema")
    given = unwrap(averaged if isinstance(averaged, dict) else state_dict)
    own = model.state_dict()
    found = {_own_name(name): value for name, value in given.items()}
    keep_new(found, own)
    check_names(found, own, ignore=r"head\.|norm\." if model.out_norm else r"head\.")
    return resampled_positions(found, own)


# ---- registry

_cswin = partial(published_cfg, first_conv="stem.proj", paper="arXiv:2107.00652")

default_cfgs = generate_default_cfgs(
    {
        "agent_cswin_t.in1k": _cswin("agent", "8c562a74441e46d5902b"),
        "agent_cswin_s.in1k": _cswin("agent", "30eb8af675bc4b7a8747"),
        "agent_cswin_b.in1k": _cswin("agent", "c8035b0839b2410c8c9f"),
        "agent_cswin_b_384.in1k": _cswin("agent", "1239be0df44b47719432", 384),
        "inline_cswin_t.in1k": _cswin("inline", "49fa2ecc543647c4b970"),
        "inline_cswin_s.in1k": _cswin("inline", "59f4e65f776f4052b93c"),
        "inline_cswin_b.in1k": _cswin("inline", "91e17121df284ae38521"),
        "test_foveal_agent_cswin.untrained": _cswin("agent", "", 64, **UNPUBLISHED),
    }
)

_create = partial(create, checkpoint_filter_fn, CSWin)
_SMALL: dict[str, Any] = dict(depths=(3, 6, 29, 2), drop_path_rate=0.4)
_BASE: dict[str, Any] = dict(depths=(3, 6, 29, 2), embed_dim=96, num_heads=(4, 8, 16, 32))


@register_model
def agent_cswin_t(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """Agent-CSWin-T, 20 M parameters."""
    return _create("agent_cswin_t", pretrained, kwargs, drop_path_rate=0.2)


@register_model
def agent_cswin_s(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """Agent-CSWin-S, 33 M parameters."""
    return _create("agent_cswin_s", pretrained, kwargs, **_SMALL)


@register_model
def agent_cswin_b(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """Agent-CSWin-B, 73 M parameters."""
    return _create("agent_cswin_b", pretrained, kwargs, **_BASE, drop_path_rate=0.5)


@register_model
def agent_cswin_b_384(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """Agent-CSWin-B for images of 384, with stripes of 12, 73 M parameters."""
    args = dict(_BASE, stripe_widths=(1, 2, 12, None), img_size=384, drop_path_rate=0.7)
    return _create("agent_cswin_b_384", pretrained, kwargs, **args)


@register_model
def inline_cswin_t(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """InLine-CSWin-T, 21 M parameters."""
    return _create("inline_cswin_t", pretrained, kwargs, attention="inline", drop_path_rate=0.2)


@register_model
def inline_cswin_s(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """InLine-CSWin-S, 33 M parameters."""
    return _create("inline_cswin_s", pretrained, kwargs, **_SMALL, attention="inline")


@register_model
def inline_cswin_b(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """InLine-CSWin-B, 73 M parameters."""
    return _create("inline_cswin_b", pretrained, kwargs, **_BASE, attention="inline", drop_path_rate=0.5)


@register_model
def test_foveal_agent_cswin(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """A very small Agent-CSWin, for tests and demonstrations."""
    args = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), stripe_widths=(1, 2, 3, None), mlp_ratio=2.0)
    return _create("test_foveal_agent_cswin", pretrained, kwargs, **args, agents=(2, 2, 3, 3), img_size=64)
