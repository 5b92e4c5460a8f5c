"""TransNeXt: attention to the neighborhood and to a pooled map in one softmax.

Paper: TransNeXt: Robust Foveal Visual Perception for Vision Transformers (Shi, CVPR 2024, arXiv:2311.17132). Authors'
code: https://github.com/DaiShiResearch/TransNeXt (Apache-2.0). This is an independent implementation, which needs none
of their CUDA extension; the published weights load unchanged and give the published outputs.

The blocks are aggregated attention (`AggregatedAttention2d`) and a gated MLP with a depthwise convolution in the gate,
both pre-norm. A LayerNorm closes every stage, and the next stage reads its output. The positions of a pooled map are
the means of their members', in units of the map in training (224 pixels) at any size.

Feature maps are channels-last inside, ``[B, H, W, C]``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import AggregatedAttention2d, DepthwiseConv, to_nchw
from .base import Backbone, check_names, create, unwrap
from .layers import Stage, drop_path_rates, half_linear, in_inference, init_convs, init_weights, linear

__all__ = ["TransNeXt", "checkpoint_filter_fn", "family"]


HIDDEN = 2**20  # hidden values of the MLP that are computed at once in inference, 4 MB in float32


class ConvGLU(nn.Module):
    """Gated MLP: the GELU of a 3x3 depthwise convolution of one half of the hidden channels gates the other half."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = DepthwiseConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if in_inference(x, self.fc1, self.dwconv, self.fc2):
            return self._in_parts(x)
        gate, x = linear(self.fc1, x).chunk(2, -1)
        return linear(self.fc2, nn.functional.gelu(self.dwconv(gate)) * x)

    def _in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """Some images, or rows of one, after the other, and of these one half of the channels after the other."""
        B, H, W, _ = x.shape
        rows = max(1, HIDDEN // (W * self.fc2.in_features)) if x.device.type == "cpu" else B * H
        if rows >= B * H:
            return self._rows(x, 0, H)
        images, rows = max(1, rows // H), -(-H // -(-H // rows))  # parts of about one size
        y = torch.empty_like(x)
        for i in range(0, B, images):
            for first in range(0, H, rows):
                last = min(first + rows, H)
                y[i : i + images, first:last] = self._rows(x[i : i + images], first, last)
        return y

    def _rows(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The output for the rows from ``first`` to ``last``; the convolution reads one more at each side."""
        start, stop = max(0, first - 1), min(x.shape[1], last + 1)
        gate = self.dwconv(half_linear(self.fc1, x[:, start:stop], 0))[:, first - start : last - start]
        gate = torch.ops.aten.gelu_(gate).mul_(half_linear(self.fc1, x[:, first:last], 1))
        return linear(self.fc2, gate)


class TransNeXtBlock(nn.Module):
    """Pre-norm attention and ConvGLU, each with a residual and DropPath."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGLU(dim, int(2 / 3 * int(dim * mlp_ratio)))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Convolution with overlapping windows and LayerNorm: ``[B, C, H, W]`` to ``[B, h, w,
    dim_out]``."""

    def __init__(self, dim: int, dim_out: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(PatchEmbed):
    """3x3 convolution of stride 2 and LayerNorm of a channels-last map; an odd length is rounded up."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, dim_out, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(to_nchw(x))


class TransNeXt(Backbone):
    """TransNeXt. Takes images of any size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dims: channels per stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        mlp_ratios: hidden channels of the MLP before its halving to two thirds, relative to ``embed_dims``.
        reductions: sides of the map by those of the pooled one, per stage; 1: attention to the map itself.
        pretrain_size: side of the images that the offsets of the position bias are learned on, in pixels.
        bias_size: None, or the side in pixels of a square image whose position bias is interpolated to other sizes, as
            the authors' detectors (800) and segmenters (512) do; at this size the two are the same.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.transnext import TransNeXt
        >>> model = timm.create_model("test_foveal_transnext", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('TransNeXt', (1, 10))
    """

    tables = ("relative_pos_bias_local", "query_embedding", "temperature", "cpb.fc1.weight", "cpb.fc2.weight")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dims: Sequence[int] = (72, 144, 288, 576),
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        pretrain_size: int = 224,
        bias_size: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, output_stride)
        per_stage = dict(embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, reductions=reductions)
        lengths = {name: len(each) for name, each in per_stage.items()}
        if set(lengths.values()) != {len(depths)}:
            raise ValueError(f"depths {tuple(depths)} differ in length from others, which have {lengths}")
        if bias_size is not None and bias_size < 4 * 2 ** (len(depths) - 1):
            raise ValueError(
                f"bias_size {bias_size} has no map at the last stage, of stride {4 * 2 ** (len(depths) - 1)}"
            )
        self.stem = PatchEmbed(in_chans, embed_dims[0], 7, 4, 3)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(embed_dims):
            stride = 4 * 2**i
            bias = dict(base_size=pretrain_size // stride, bias_size=bias_size and bias_size // stride)
            attend = functools.partial(AggregatedAttention2d, dim, num_heads[i], reductions[i], **bias)
            blocks = [TransNeXtBlock(dim, attend(), mlp_ratios[i], rate) for rate in rates[i]]
            downsample = Downsample(embed_dims[i - 1], dim) if i > 0 else None
            stages.append(Stage(blocks, downsample, nn.LayerNorm(dim, eps=1e-6)))
            self._add_map(dim, f"stages.{i}")
        self.stages = nn.Sequential(*stages)
        init_convs(self)
        init_weights(self)
        self._init_head(embed_dims[-1], num_classes, global_pool, drop_rate)


# ---- checkpoints

_PARTS = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}


def _own_name(name: str) -> str:
    """Our name of a parameter: ``stages.0.blocks.`` for the authors' ``block1.``, for instance."""
    name = re.sub(r"\.attn\.(wg(?:_[01])?)\.", r".attn.gates.\1.", name)  # of MoH-ViT
    name = re.sub(r"\.cpb_fc([12])\.", r".cpb.fc\1.", name).replace(".dwconv.dwconv.", ".dwconv.conv.")
    if match := re.match(rf"({'|'.join(_PARTS)})([1-4])\.", name):
        name = f"stages.{int(match[2]) - 1}.{_PARTS[match[1]]}.{name[match.end() :]}"
    return re.sub(r"^stages\.0\.downsample\.", "stem.", name)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: TransNeXt) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the names of the authors, the backbones of their detectors and segmenters included, and of these models,
    also wrapped by ``features_only`` or ``DistributedDataParallel``, or under ``state_dict`` or ``model``.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    state_dict = {_own_name(name): value for name, value in unwrap(state_dict).items()}
    check_names(state_dict, model.state_dict())
    return state_dict


# ---- registry


def _cfg(**facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "first_conv": "stem.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/DaiShiResearch/TransNeXt",
        "paper_ids": "arXiv:2311.17132",
        **facts,
    }


def _in1k(name: str, size: int = 224, tuned: bool = False) -> dict[str, Any]:
    """The authors' file on the hub: of 224 pixels, or fine-tuned at 384, for which images are not cropped."""
    name = f"{name}_{size}_1k" + "_ft_1k" * tuned
    hub = f"DaiShiResearch/transnext-{name.replace('_', '-')}"
    facts = dict(url=f"https://huggingface.co/{hub}/resolve/main/transnext_{name}.pth", input_size=(3, size, size))
    crop = dict(crop_pct=1.0, crop_mode="squash") if size >= 384 else dict(crop_pct=0.875)
    return _cfg(**facts, **crop, pool_size=(size // 32, size // 32))


default_cfgs = generate_default_cfgs(
    {
        "transnext_micro.in1k": _in1k("micro"),
        "transnext_micro_aaaa.in1k": _in1k("micro_AAAA", 256),
        "transnext_tiny.in1k": _in1k("tiny"),
        "transnext_small.in1k": _in1k("small"),
        "transnext_small.in1k_384": _in1k("small", 384, tuned=True),
        "transnext_base.in1k": _in1k("base"),
        "transnext_base.in1k_384": _in1k("base", 384, tuned=True),
        "test_foveal_transnext.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), origin_url=None),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"TransNeXt"``."""
    return "TransNeXt"


_create = functools.partial(create, checkpoint_filter_fn, TransNeXt)
SMALL: dict[str, Any] = dict(depths=(5, 5, 22, 5), drop_path_rate=0.45)
BASE: dict[str, Any] = dict(embed_dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), num_heads=(4, 8, 16, 32))


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Micro, 12.8 M parameters."""
    args = dict(embed_dims=(48, 96, 192, 384), num_heads=(2, 4, 8, 16), drop_path_rate=0.15)
    return _create("transnext_micro", pretrained, kwargs, **args)


@register_model
def transnext_micro_aaaa(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Micro with aggregated attention in all stages, for 256 pixels, 13.1 M parameters."""
    args = dict(embed_dims=(48, 96, 192, 384), num_heads=(2, 4, 8, 16), drop_path_rate=0.15)
    args |= dict(reductions=(16, 8, 4, 2), pretrain_size=256)
    return _create("transnext_micro_aaaa", pretrained, kwargs, **args)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Tiny, 28.3 M parameters."""
    return _create("transnext_tiny", pretrained, kwargs, drop_path_rate=0.25)


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Small, 49.7 M parameters."""
    return _create("transnext_small", pretrained, kwargs, **SMALL)


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """TransNeXt-Base, 89.7 M parameters."""
    return _create("transnext_base", pretrained, kwargs, **BASE, drop_path_rate=0.6)


@register_model
def test_foveal_transnext(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    """A very small TransNeXt, for tests and demonstrations."""
    args = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), mlp_ratios=(4, 4, 2, 2))
    return _create("test_foveal_transnext", pretrained, kwargs, **args, pretrain_size=64)
