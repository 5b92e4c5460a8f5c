"""SG-Former: attention to tokens that are merged by their significance.

Paper: SG-Former: Self-guided Transformer with Evolving Token Reallocation (Ren et al., ICCV 2023, arXiv:2308.12216).
The authors' repository, https://github.com/OliverRensu/SG-Former, has no licence for code or weights. This is an
independent implementation of the code of August 2023; checkpoints in the authors' format load unchanged and, in
float64, give the outputs of their code.

Blocks alternate. In a hybrid block, half of the heads attend to a map that a strided convolution has reduced, half
inside windows. The attention that a position receives in both is its significance. In a guided block all positions
attend to few tokens: the positions in order of significance, merged by learned weights, more of them the less
significant they are. The last stage has plain attention. A LayerNorm closes every stage, and the next reads its output.

The authors' code takes only 224x224 images. Here windows are cut off at the border, the reduced map is zero-padded, the
position embedding is resampled, and groups that positions do not fill take some twice (`merge_ranks`), which changes
nothing at multiples of 224.

The order of nearly equal significances depends on rounding, and merged tokens on the order. It is computed in float32
or wider, but outputs in float32 on another device or in another batch differ by up to some percent; in float64 they do
not.

Feature maps are ``[B, H, W, C]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, build_sincos2d_pos_embed
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import nn

from .attention import DepthwiseConv, GuidedAttention2d, HybridAttention2d, SelfAttention2d, resized_nhwc, to_nchw
from .base import Backbone, check_names, create, unwrap
from .layers import Blocks, Stage, drop_path_rates, init_convs, init_weights, linear, positive_pair

__all__ = ["SGFormer", "checkpoint_filter_fn", "family"]


class Mlp(nn.Module):
    """MLP with a depthwise convolution and its residual before the activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden, 3, residual=True)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self.fc2, F.gelu(self.dwconv(linear(self.fc1, x))))


class SGBlock(nn.Module):
    """Pre-norm attention and MLP with stochastic depth; takes and returns a map and the significances."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, significance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, significance = self.attn(self.norm1(x), significance)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x))), significance


class SGBlocks(Blocks):
    """Blocks that take the significances from the block before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        significance = None
        for block in self:
            run = partial(checkpoint, block, use_reentrant=False) if self.grad_checkpointing else block
            x, significance = run(x, significance)
        return x


class ConvNorm(nn.Sequential):
    """Convolution and GroupNorm of a single group, over the whole map."""

    def __init__(self, dim: int, dim_out: int, kernel_size: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.norm = nn.GroupNorm(1, dim_out)


class Stem(nn.Module):
    """Three 3x3 convolutions, the first and the last of stride 2, LayerNorm and position embedding: stride 4."""

    def __init__(self, in_chans: int, dim: int, map_size: tuple[int, int]) -> None:
        super().__init__()
        layers = [ConvNorm(in_chans, dim, 3, 2), nn.GELU(), ConvNorm(dim, dim, 3), nn.GELU(), ConvNorm(dim, dim, 3, 2)]
        self.conv = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dim)
        embedding = build_sincos2d_pos_embed(list(map_size), dim, dtype=torch.get_default_dtype())
        self.pos_embed = nn.Parameter(embedding.unflatten(0, map_size)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + resized_nhwc(self.pos_embed, x, ())


class Downsample(nn.Sequential):
    """1x1, 3x3 depthwise of stride 2 and 1x1 convolution; an odd length is rounded up."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, dim_out)
        self.conv2 = ConvNorm(dim_out, dim_out, 3, 2, groups=dim_out)
        self.conv3 = ConvNorm(dim_out, dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(to_nchw(x)))))).permute(0, 2, 3, 1)


class SGFormer(Backbone):
    """SG-Former. Takes images of any size.

    Args:
        img_size: training size, an int or (height, width), of the position embedding; resampled for others.
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dims: channels per stage; the first divisible by 4.
        depths: blocks per stage.
        num_heads: attention heads per stage; divide the channels, and are even except in the last stage.
        mlp_ratio: hidden channels of the MLP, relative to ``embed_dims``.
        ratios: ``ratio`` of `HybridAttention2d` per stage before the last.
        lengths: ``lengths`` of `GuidedAttention2d` per stage before the last.
        window_size: of `HybridAttention2d`.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.sgformer import SGFormer
        >>> model = timm.create_model("test_foveal_sgformer", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('SGFormer', (1, 10))
    """

    tables = ("pos_embed",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 16, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4,
        ratios: Sequence[int] = (8, 4, 2),
        lengths: Sequence[Sequence[int]] = ((196, 56, 28), (49, 14, 7), (2, 1)),
        window_size: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, output_stride)
        if not len(depths) == len(embed_dims) == len(num_heads) == len(ratios) + 1 == len(lengths) + 1:
            raise ValueError(f"{depths=}, {embed_dims=}, {num_heads=}, {ratios=} and {lengths=} do not fit together")
        if any(dim % heads for dim, heads in zip(embed_dims, num_heads, strict=True)) or any(
            heads % 2 for heads in num_heads[:-1]
        ):
            raise ValueError(f"{num_heads=} must divide {embed_dims=} and be even before the last stage")
        rows, columns = self.img_size = positive_pair("img_size", img_size)
        self.stem = Stem(in_chans, embed_dims[0], (-(-rows // 4), -(-columns // 4)))
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks = []
            for j, rate in enumerate(rates[i]):
                if i == len(depths) - 1:
                    attention: nn.Module = SelfAttention2d(dim, heads)
                elif j % 2 == 0:
                    attention = HybridAttention2d(dim, heads, ratios[i], window_size)
                else:
                    attention = GuidedAttention2d(dim, heads, lengths[i])
                blocks.append(SGBlock(dim, attention, mlp_ratio, rate))
            downsample = Downsample(embed_dims[i - 1], dim) if i else None
            stages.append(Stage(SGBlocks(*blocks), downsample, nn.LayerNorm(dim, eps=1e-6)))
            self._add_map(dim, f"stages.{i}")
        self.stages = nn.Sequential(*stages)
        init_convs(self)
        init_weights(self)
        self._init_head(embed_dims[-1], num_classes, global_pool, drop_rate)


# ---- checkpoints

_PARTS = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}
_NAMES = {  # of the authors, to ours
    r"\.c\.": ".conv.",
    r"\.bn\.": ".norm.",
    r"\.(lepe_conv|dwconv)\.(?:dwconv\.)?(weight|bias)$": r".\1.conv.\2",
    r"\.attn\.f1\.": ".attn.merge.0.",
    r"\.attn\.f2\.": ".attn.merge.1.",
    r"\.attn\.f3\.": ".attn.merge.2.",
    r"^pos_embed$": "stem.pos_embed",
}


def _own_name(name: str) -> str:
    """Our name of a parameter: ``stages.0.blocks.`` for the authors' ``block1.``, for instance."""
    for pattern, own in _NAMES.items():
        name = re.sub(pattern, own, name)
    if match := re.match(rf"({'|'.join(_PARTS)})([1-4])\.", name):
        name = f"stages.{int(match[2]) - 1}.{_PARTS[match[1]]}.{name[match.end() :]}"
    return re.sub(r"^stages\.0\.downsample\.", "stem.", name)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SGFormer) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports checkpoints of the authors' code, of which the averaged weights (``state_dict_ema``) are taken, and state
    dicts of these models, also wrapped by ``features_only`` or ``DistributedDataParallel``, or under ``state_dict`` or
    ``model``. A position embedding of another size is resampled.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    averaged = state_dict.get("state_dict_ema")
    given = unwrap(averaged if isinstance(averaged, dict) else state_dict)
    result = {_own_name(name): value for name, value in given.items()}
    check_names(result, model.state_dict())
    embedding = result["stem.pos_embed"]
    if embedding.ndim == 3:  # the authors' is of a square
        size = math.isqrt(embedding.shape[1])
        embedding = embedding.unflatten(1, (size, -1))
    result["stem.pos_embed"] = resized_nhwc(embedding, model.stem.pos_embed, ())
    return result


# ---- registry

_NOTES = (
    "The authors' repository has no licence for code or weights.",
    "Their weights are only in a folder of Google Drive and not downloaded automatically: get the file from the page "
    "in `foveal info` and pass pretrained=True, pretrained_cfg_overlay=dict(file=PATH).",
)


def _cfg(**facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "first_conv": "stem.conv.0.conv",
        "classifier": "head",
        "license": "none stated",
        "origin_url": "https://github.com/OliverRensu/SG-Former",
        "paper_ids": "arXiv:2308.12216",
        "notes": _NOTES,
        **facts,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"sgformer_{size}.in1k": _cfg(crop_pct=0.9) for size in "smb"},
        "test_foveal_sgformer.untrained": _cfg(
            input_size=(3, 64, 64), pool_size=(2, 2), license="apache-2.0", origin_url=None, notes=None
        ),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"SG-Former"``."""
    return "SG-Former"


_create = partial(create, checkpoint_filter_fn, SGFormer)


@register_model
def sgformer_s(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """SG-Former-S, 22.5 M parameters."""
    return _create("sgformer_s", pretrained, kwargs, drop_path_rate=0.1)


@register_model
def sgformer_m(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """SG-Former-M, 38.7 M parameters."""
    return _create("sgformer_m", pretrained, kwargs, depths=(2, 6, 28, 2), drop_path_rate=0.2)


@register_model
def sgformer_b(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """SG-Former-B, 78.0 M parameters."""
    args = dict(embed_dims=(96, 192, 384, 768), depths=(4, 6, 24, 2), num_heads=(4, 6, 12, 24), drop_path_rate=0.4)
    return _create("sgformer_b", pretrained, kwargs, **args)


@register_model
def test_foveal_sgformer(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """A very small SG-Former, for tests and demonstrations."""
    args = dict(img_size=64, embed_dims=(16, 32, 48, 64), depths=(2, 2, 2, 1), num_heads=(2, 2, 4, 4), mlp_ratio=3)
    return _create("test_foveal_sgformer", pretrained, kwargs, **args, lengths=((8, 4, 2), (4, 2, 1), (2, 1)))
