"""MoH-ViT: TransNeXt with gates on its attention heads.

Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., arXiv:2410.11842). Authors' code:
https://github.com/SkyworkAI/MoH (Apache-2.0). This is an independent implementation; the published weights load
unchanged and give the published outputs.

At every position, the outputs of all shared heads and of those other heads that score highest there are multiplied by
gates before the projection; the rest is multiplied by zero. All heads are computed, so this saves no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import without_autocast
from .base import CollectingBackbone, create
from .layers import init_weights, is_plain
from .transnext import BASE, SMALL, TransNeXt, checkpoint_filter_fn

__all__ = ["MoHViT", "checkpoint_filter_fn", "family"]


class HeadGates(nn.Module):
    """Gates of attention heads: the first ``shared`` heads take part at every position, of the others the ``routed``
    that score highest there (MoH, arXiv:2410.11842, section 3.2).

    Scores are float32 or wider in any precision, as rounding would choose other heads."""

    # inputs, not scores: a block that is recomputed in the backward pass must compute the same again
    collected: list[torch.Tensor] | None = None

    def __init__(self, dim: int, num_heads: int, shared: int, routed: int) -> None:
        super().__init__()
        rest = num_heads - shared
        if shared < 2 or not 0 <= routed <= rest or (routed == 0) != (rest == 0):
            raise ValueError(f"{shared} shared and {routed} routed heads do not fit {num_heads} heads")
        self.routed = routed
        self.wg_1 = nn.Linear(dim, shared, bias=False)
        if routed:
            self.wg = nn.Linear(dim, rest, bias=False)
            self.wg_0 = nn.Linear(dim, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the factors ``[B, H, W, heads]``."""
        shared = _scores(self.wg_1, x)
        shared = shared * shared.shape[-1]
        if not self.routed:
            return shared
        if self.collected is not None:
            self.collected.append(x)
        scores, chosen = self._choose(x)
        scores = scores * chosen
        scores = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).eps) * self.routed
        both = 2 * _scores(self.wg_0, x)
        return torch.cat([shared * both[..., :1], scores * both[..., 1:]], -1)

    def _choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the other heads, and 1 for those that take part, else 0, ``[B, H, W, rest]`` each."""
        scores = _scores(self.wg, x)
        indices = scores.topk(self.routed, -1).indices
        return scores, (indices[..., None] == torch.arange(scores.shape[-1], device=x.device)).to(scores.dtype).sum(-2)

    def balance(self, x: torch.Tensor) -> torch.Tensor:
        """The load-balancing loss: 1 if the other heads share scores and positions equally times their share."""
        scores, chosen = (each.flatten(0, -2) for each in self._choose(x))
        return (scores.mean(0) * chosen.mean(0)).sum() * scores.shape[-1]


def _scores(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight: Any = layer.weight
    if not is_plain(layer):
        y = layer(x)
        return y.to(torch.promote_types(y.dtype, torch.float32)).softmax(-1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x):
        return F.linear(x, weight.to(x.dtype)).softmax(-1)


class MoHViT(CollectingBackbone, TransNeXt):
    """MoH-ViT. Takes images of any size.

    The auxiliary loss is the load-balancing loss of the routed heads, which the authors add with a weight of 0.01.

    Args:
        shared_heads: per stage, heads that take part at every position, at least 2.
        routed_heads: per stage, how many of the other heads take part at a position; 0 if there are none.
        kwargs: of `TransNeXt`.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.moh_vit import MoHViT
        >>> model = timm.create_model("test_foveal_moh_vit", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('MoHViT', (1, 10))
    """

    def __init__(self, shared_heads: Sequence[int], routed_heads: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not len(shared_heads) == len(routed_heads) == len(self.stages):
            raise ValueError(f"{shared_heads=} and {routed_heads=} are not of {len(self.stages)} stages")
        stages: Any = self.stages
        for stage, shared, routed in zip(stages, shared_heads, routed_heads, strict=True):
            for block in stage.blocks:
                heads, dim = block.attn.num_heads, block.attn.proj.in_features
                block.attn.gates = HeadGates(dim, heads, shared, routed)
                init_weights(block.attn.gates)

    def _collectors(self) -> list[Any]:
        return [m for m in self.modules() if isinstance(m, HeadGates) and m.routed]

    def _auxiliary_loss(self, collected: list[tuple[Any, torch.Tensor]]) -> torch.Tensor:
        return torch.stack([gates.balance(x) for gates, x in collected]).mean()


# ---- registry


def _cfg(size: str = "", **facts: Any) -> dict[str, Any]:
    """Of a model on the hub, where the name of one file is known."""
    page = f"https://huggingface.co/Chat-UniVi/MoH-ViT-{size}"
    by_hand = f"The file is on {page}; its name is not known here, so it is not downloaded automatically: pass "
    by_hand += "pretrained=True, pretrained_cfg_overlay=dict(file=PATH)."
    return {
        "pool_size": (7, 7),
        "first_conv": "stem.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/SkyworkAI/MoH",
        "paper_ids": ["arXiv:2410.11842", "arXiv:2311.17132"],
        **({"notes": (by_hand,)} if size in ("S-80", "S-75", "B-75") else {}),
        **facts,
    }


default_cfgs = generate_default_cfgs(
    {
        "moh_vit_s_80.in1k": _cfg("S-80"),
        "moh_vit_s_75.in1k": _cfg("S-75"),
        "moh_vit_b_75.in1k": _cfg("B-75"),
        "moh_vit_b_50.in1k": _cfg(
            url="https://huggingface.co/Chat-UniVi/MoH-ViT-B-50/resolve/main/moh_transnext_base_50.pth"
        ),
        "test_foveal_moh_vit.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), origin_url=None),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"MoH-ViT"``."""
    return "MoH-ViT"


_create = partial(create, checkpoint_filter_fn, MoHViT)


@register_model
def moh_vit_s_80(pretrained: bool = False, **kwargs: Any) -> MoHViT:
    """MoH-ViT-S, 80 % of whose heads take part, 49.9 M parameters."""
    args = dict(shared_heads=(3, 6, 3, 8), routed_heads=(0, 0, 6, 12))
    return _create("moh_vit_s_80", pretrained, kwargs, **SMALL, **args)


@register_model
def moh_vit_s_75(pretrained: bool = False, **kwargs: Any) -> MoHViT:
    """MoH-ViT-S, 75 % of whose heads take part, 49.9 M parameters."""
    args = dict(shared_heads=(3, 6, 3, 4), routed_heads=(0, 0, 6, 12))
    return _create("moh_vit_s_75", pretrained, kwargs, **SMALL, **args)


@register_model
def moh_vit_b_75(pretrained: bool = False, **kwargs: Any) -> MoHViT:
    """MoH-ViT-B, 75 % of whose heads take part, 90.0 M parameters."""
    args = dict(shared_heads=(4, 8, 4, 5), routed_heads=(0, 0, 8, 16))
    return _create("moh_vit_b_75", pretrained, kwargs, **BASE, **args, drop_path_rate=0.6)


@register_model
def moh_vit_b_50(pretrained: bool = False, **kwargs: Any) -> MoHViT:
    """MoH-ViT-B, 50 % of whose heads take part, 90.0 M parameters."""
    args = dict(shared_heads=(2, 2, 2, 4), routed_heads=(2, 4, 6, 8))
    return _create("moh_vit_b_50", pretrained, kwargs, **BASE, **args, drop_path_rate=0.6)


@register_model
def test_foveal_moh_vit(pretrained: bool = False, **kwargs: Any) -> MoHViT:
    """A very small MoH-ViT, for tests and demonstrations."""
    args = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(2, 2, 6, 8), mlp_ratios=(4, 4, 2, 2))
    args |= dict(shared_heads=(2, 2, 2, 3), routed_heads=(0, 0, 2, 3))
    return _create("test_foveal_moh_vit", pretrained, kwargs, **args, pretrain_size=64)
