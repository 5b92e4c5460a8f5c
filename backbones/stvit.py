"""Super Token ViT: attention between averages of similar positions.

Paper: Vision Transformer with Super Token Sampling (Huang et al., CVPR 2023, arXiv:2211.11167). The authors' code,
https://github.com/hhb072/STViT, names the MIT licence, but the repository has no licence file, and none is stated for
the weights. This is an independent implementation; checkpoints in the authors' format load and give the published
outputs.

A block is a 3x3 depthwise convolution, super token attention and an MLP with a 3x3 depthwise convolution inside, each
with a residual. The attention has a LayerNorm before it, the MLP a BatchNorm. In the first two stages the map is
divided into cells of 8x8 and 4x4 positions, whose super tokens attend to each other; later all positions do.

A projection to 1024 channels with BatchNorm and SiLU comes between the last map and the pooling.

Feature maps are channels-last inside, ``[B, H, W, C]``, and the authors' 1x1 convolutions are Linears. Parameters have
their names, except ``norm1``, ``mlp2.dwconv`` and ``downsample``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import ConvDownsample, ConvFeedForward, DepthwiseConv, SuperTokenAttention2d, to_nchw
from .base import ProjectedBackbone, check_names, create, keep_new, unwrap
from .layers import Level, drop_path_rates, scaled

__all__ = ["STViT", "checkpoint_filter_fn", "family"]


class STViTBlock(nn.Module):
    """Positional convolution, attention and MLP; the last two with optional LayerScale and DropPath."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        token_size: int,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv(dim, 3, residual=True)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SuperTokenAttention2d(dim, num_heads, token_size)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp2 = ConvFeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for name in ("gamma_1", "gamma_2"):  # of four dimensions, as weight decay applies to them
            gamma = None if layer_scale is None else nn.Parameter(torch.full((1, 1, 1, dim), float(layer_scale)))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pos_embed(x)
        x = x + self.drop_path(scaled(self.attn(self.norm1(x)), self.gamma_1))
        y = self.norm2(to_nchw(x)).permute(0, 2, 3, 1)
        return x + self.drop_path(scaled(self.mlp2(y), self.gamma_2))


class PatchEmbed(nn.Module):
    """Four 3x3 convolutions, the first and the third of stride 2, with GELU and then BatchNorm after each: stride 4."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        half = dim // 2
        for chs, out_chs, stride in ((in_chans, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
            layers += [nn.Conv2d(chs, out_chs, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(out_chs)]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


class STViT(ProjectedBackbone):
    """Super Token ViT. Takes images of any size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dims: channels per stage.
        depths: blocks per stage.
        num_heads: attention heads per stage; must divide the channels.
        token_sizes: ``token_size`` of `SuperTokenAttention2d`, per stage. Weights fit every size; the authors name
            (16, 8, 1, 1) for large images.
        mlp_ratio: hidden channels of the MLP, relative to ``embed_dims``.
        layer_scales: initial value of LayerScale per stage, None for none.
        projection: channels after the projection that precedes the pooling.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.
        out_norm: add a LayerNorm per stage, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to
            their maps. The authors published no detection or segmentation models.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import foveal, timm, torch
        >>> model = timm.create_model("test_foveal_stvit", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('STViT', (1, 10))
    """

    stem_name, levels_name = "patch_embed", "layers"
    downsample_last = True
    tables = ()

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        token_sizes: Sequence[int] = (8, 4, 1, 1),
        mlp_ratio: float = 4.0,
        layer_scales: Sequence[float | None] = (None, None, None, None),
        projection: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        per_stage = dict(embed_dims=embed_dims, num_heads=num_heads, token_sizes=token_sizes, layer_scales=layer_scales)
        lengths = {name: len(each) for name, each in per_stage.items()}
        if set(lengths.values()) != {len(depths)}:
            raise ValueError(f"depths {tuple(depths)} differ in length from others, which have {lengths}")
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0])
        rates = drop_path_rates(drop_path_rate, depths)
        levels = []
        for i, dim in enumerate(embed_dims):
            block = partial(STViTBlock, dim, num_heads[i], token_sizes[i], mlp_ratio, layer_scales[i])
            downsample = ConvDownsample(dim, embed_dims[i + 1]) if i + 1 < len(depths) else None
            levels.append(Level([block(rate) for rate in rates[i]], downsample))
            self._add_map(dim, f"layers.{i}.blocks")
        self.layers = nn.Sequential(*levels)
        self.proj = nn.Linear(embed_dims[-1], projection)
        self.norm = nn.BatchNorm2d(projection)
        self._init_head(embed_dims[-1], num_classes, global_pool, drop_rate)  # other Linears as PyTorch's convolutions


# ---- checkpoints

_CONSTANTS = (".attn.fold.weights", ".attn.unfold.weights")
_NAMES = {  # of the authors, to ours
    ".norm1.norm.": ".norm1.",
    ".mlp2.conv.": ".mlp2.dwconv.",
    ".downsample.proj.0.": ".downsample.reduction.",
    ".downsample.proj.1.": ".downsample.norm.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: STViT) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the authors' classifiers, and state dicts of these models, also wrapped by ``features_only`` or
    ``DistributedDataParallel``. Of a checkpoint with averaged weights (``model_ema``) the raw ones (``model``) are
    taken, whose scores are published. The constants ``attn.fold`` and ``attn.unfold`` are compared and left out.

    If the checkpoint has no norms of ``out_norm``, or no head, those of the model keep their values.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) or constants do not fit the model.
    """
    own = model.state_dict()
    found = {}
    for name, value in unwrap(state_dict).items():
        if name.endswith(_CONSTANTS):
            given = value.is_floating_point() and not value.is_meta  # not while `foveal convert` traces the names
            if given and not torch.equal(value.flatten(1), torch.eye(9).to(value)):
                raise ValueError(f"{name} of the checkpoint is not nine 3x3 kernels that copy a neighbor each")
            continue
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        if name.endswith((".gamma_1", ".gamma_2")):
            value = value.view(1, 1, 1, -1)
        elif value.ndim == 4 and value.shape[2:] == (1, 1):  # a 1x1 convolution
            value = value.flatten(1)
        found[name] = value
    keep_new(found, own)
    if model.out_norm:
        keep_new(found, own, r"(proj|norm)\.")
    check_names(found, own)
    return found


# ---- registry

_NOTES = (
    "The authors' code names the MIT licence; their repository has no licence file, and the weights have none stated.",
    "Their weights are only in a Google Drive folder and not downloaded automatically: get stvit-*.pth from the page "
    "in `foveal info` and pass pretrained=True, pretrained_cfg_overlay=dict(file=PATH).",
)


def _cfg(**facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "none stated",
        "origin_url": "https://github.com/hhb072/STViT",
        "paper_ids": "arXiv:2211.11167",
        "notes": _NOTES,
        **facts,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"stvit_{size}.in1k": _cfg() for size in "sbl"},
        **{
            f"stvit_{size}.in1k_384": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0) for size in "sbl"
        },
        "test_foveal_stvit.untrained": _cfg(
            input_size=(3, 64, 64), pool_size=(2, 2), license="apache-2.0", origin_url=None, notes=None
        ),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"STViT"``."""
    return "STViT"


_create = partial(create, checkpoint_filter_fn, STViT)


@register_model
def stvit_s(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT-S, 25 M parameters."""
    return _create("stvit_s", pretrained, kwargs)


@register_model
def stvit_b(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT-B, 52 M parameters."""
    args = dict(embed_dims=(96, 192, 384, 512), depths=(4, 6, 14, 6), num_heads=(2, 3, 6, 8))
    return _create("stvit_b", pretrained, kwargs, **args, layer_scales=(None, None, 1e-6, 1e-6))


@register_model
def stvit_l(pretrained: bool = False, **kwargs: Any) -> STViT:
    """STViT-L, 95 M parameters."""
    args = dict(embed_dims=(96, 192, 448, 640), depths=(4, 7, 19, 8), num_heads=(2, 3, 7, 10))
    return _create("stvit_l", pretrained, kwargs, **args, layer_scales=(None, None, 1e-6, 1e-6))


@register_model
def test_foveal_stvit(pretrained: bool = False, **kwargs: Any) -> STViT:
    """A very small STViT with LayerScale, for tests and demonstrations."""
    args = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), token_sizes=(4, 2, 1, 1))
    args |= dict(mlp_ratio=2, layer_scales=(None, None, 0.1, 0.1), projection=96)
    return _create("test_foveal_stvit", pretrained, kwargs, **args)
