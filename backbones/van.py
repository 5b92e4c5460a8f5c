"""VAN: attention by large depthwise convolutions.

Paper: Visual Attention Network (Guo et al., CVMJ 2023, arXiv:2202.09741). Authors' code:
https://github.com/Visual-Attention-Network/VAN-Classification (Apache-2.0). This is an independent implementation; the
published weights load unchanged and give the published outputs.

The attention is a gate: a 5x5 depthwise, a 7x7 depthwise of dilation 3 and a 1x1 convolution, which together reach
23x23 positions, make a map that multiplies the features, unnormalized and unbounded. It has a residual of its own, from
the normalized input. A LayerNorm closes every stage, and the next stage reads its output.

Feature maps are ``[B, C, H, W]``, on a CPU in the channels_last memory format, in which these convolutions are fastest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import ChannelNorm, channels_last_on_cpu, is_dynamic, leaves_pytorch
from .base import Backbone, check_names, create, unwrap
from .layers import Stage, drop_path_rates, for_convolution, fx_leaf, init_convs, init_weights, scale_channels

__all__ = ["VAN", "checkpoint_filter_fn", "family"]


class DilatedDepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with dilation that keeps the size of the map, zero-padded.

    On a CPU PyTorch runs it without dilation on the ``dilation**2`` maps of every ``dilation``-th row and column, in
    channels_last, several times as fast; other runtimes get the convolution, which they run faster."""

    def __init__(self, dim: int, kernel_size: int, dilation: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation, groups=dim)

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # one node for other runtimes, and for a mode such as PyTorch's FLOP counter, which would count the padding
        watched = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
        if x.device.type != "cpu" or watched or leaves_pytorch() or is_dynamic(*x.shape[2:]):
            return super().forward(x)
        (B, C, H, W), d = x.shape, self.dilation[0]
        h, w = -(-H // d), -(-W // d)
        if H % d or W % d:
            x = F.pad(x, (0, w * d - W, 0, h * d - H))
        x = x.reshape(B, C, h, d, w, d).permute(0, 3, 5, 2, 4, 1).reshape(B * d * d, h, w, C).permute(0, 3, 1, 2)
        x = F.conv2d(x, self.weight, self.bias, padding=self.kernel_size[0] // 2, groups=C)
        x = x.permute(0, 2, 3, 1).reshape(B, d, d, h, w, C).permute(0, 3, 1, 4, 2, 5).reshape(B, h * d, w * d, C)
        return for_convolution(x[:, :H, :W].permute(0, 3, 1, 2))


class LargeKernelAttention(nn.Module):
    """Features times a map that depthwise convolutions make of them, between 1x1 convolutions, and a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = DilatedDepthwiseConv2d(dim, 7, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.proj_1(x))
        return x + self.proj_2(y * self.conv1(self.conv_spatial(self.conv0(y))))


class ConvMlp(nn.Module):
    """1x1 convolution, 3x3 depthwise convolution, GELU, 1x1 convolution."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class VANBlock(nn.Module):
    """Attention and MLP, each after a BatchNorm, with LayerScale and stochastic depth."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = LargeKernelAttention(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(scale_channels(self.attn(self.norm1(x)), self.layer_scale_1))
        return x + self.drop_path(scale_channels(self.mlp(self.norm2(x)), self.layer_scale_2))


class PatchEmbed(nn.Module):
    """Convolution with overlapping windows, which rounds the size up, and BatchNorm."""

    def __init__(self, dim: int, dim_out: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, kernel_size, stride, kernel_size // 2)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))


class VAN(Backbone):
    """Visual Attention Network. Takes images of any size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dims: channels per stage.
        depths: blocks per stage.
        mlp_ratios: hidden channels of the MLP, relative to ``embed_dims``.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.

    Raises:
        ValueError: on arguments of different lengths; the message has them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.van import VAN
        >>> model = timm.create_model("test_foveal_van", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('VAN', (1, 10))
    """

    output_fmt = "NCHW"
    tables = ()

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 12, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, output_stride)
        if not len(embed_dims) == len(depths) == len(mlp_ratios):
            raise ValueError(f"{depths=}, {embed_dims=} and {mlp_ratios=} differ in length")
        self.stem = PatchEmbed(in_chans, embed_dims[0], 7, 4)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, ratio) in enumerate(zip(embed_dims, mlp_ratios, strict=True)):
            downsample = PatchEmbed(embed_dims[i - 1], dim, 3, 2) if i > 0 else None
            blocks = [VANBlock(dim, ratio, drop_path=rate) for rate in rates[i]]
            stages.append(Stage(blocks, downsample, ChannelNorm(dim, eps=1e-6)))
            self._add_map(dim, f"stages.{i}")
        self.stages = nn.Sequential(*stages)
        init_convs(self)
        init_weights(self)
        self._init_head(embed_dims[-1], num_classes, global_pool, drop_rate)

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(channels_last_on_cpu(x))


# ---- checkpoints

_PARTS = {"patch_embed": "downsample", "block": "blocks", "blocks": "blocks", "norm": "norm"}
_NAMES = {  # of transformers, MMPretrain and the authors, to ours
    r"^van\.encoder\.": "",
    r"\.embeddings\.": ".downsample.",
    r"\.(convolution|projection)\.": ".proj.",
    r"\.normalization\.": ".norm.",
    r"\.layers\.": ".blocks.",
    r"\.pre_normomalization\.": ".norm1.",  # so misspelled
    r"\.post_normalization\.": ".norm2.",
    r"\.attention\.pre_projection\.conv\.": ".attn.proj_1.",
    r"\.attention\.post_projection\.": ".attn.proj_2.",
    r"\.(attention\.attention_layer\.attention|attn\.spatial_gating_unit)\.": ".attn.",
    r"\.attn\.(depth_wise|DW_conv)\.": ".attn.conv0.",
    r"\.attn\.(depth_wise_dilated|DW_D_conv)\.": ".attn.conv_spatial.",
    r"\.attn\.point_wise\.": ".attn.conv1.",
    r"\.attention_scaling\.weight$": ".layer_scale_1",
    r"\.mlp_scaling\.weight$": ".layer_scale_2",
    r"\.mlp\.in_dense\.": ".mlp.fc1.",
    r"\.mlp\.(depth_wise|dwconv\.dwconv)\.": ".mlp.dwconv.",
    r"\.mlp\.out_dense\.": ".mlp.fc2.",
    r"^classifier\.": "head.",
}


def _own_name(name: str) -> str:
    """Our name of a parameter: ``stages.0.blocks.`` for the authors' ``block1.``, for instance."""
    for pattern, own in _NAMES.items():
        name = re.sub(pattern, own, name)
    if match := re.match(rf"({'|'.join(_PARTS)})([1-4])\.", name):
        name = f"stages.{int(match[2]) - 1}.{_PARTS[match[1]]}.{name[match.end() :]}"
    return re.sub(r"^stages\.0\.downsample\.", "stem.", name)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VAN) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the names of the authors, their segmenters' backbones included, of transformers (whose ``van.layernorm``
    is used nowhere and left out), of MMPretrain, and of these models, also wrapped by ``features_only`` or
    ``DistributedDataParallel``, or under ``state_dict`` or ``model``.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    given = unwrap(state_dict).items()
    state_dict = {_own_name(name): value for name, value in given if not name.startswith("van.layernorm.")}
    check_names(state_dict, model.state_dict())
    return state_dict


# ---- registry

_NOTES = ("The authors' repositories are Apache-2.0; their READMEs ask to contact the authors for commercial use.",)
_BY_HAND = (
    *_NOTES,
    "These weights are only in a folder of Tsinghua's cloud and not downloaded automatically: get van_b4.pth or "
    "van_b*_22k.pth from there and pass pretrained=True, pretrained_cfg_overlay=dict(file=PATH).",
)
_SIZES = {"van_b0": "Tiny_754", "van_b1": "Small_811", "van_b2": "Base_828", "van_b3": "Large_839"}


def _cfg(**facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "first_conv": "stem.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/Visual-Attention-Network/VAN-Classification",
        "paper_ids": "arXiv:2202.09741",
        "notes": _NOTES,
        **facts,
    }


def _in1k(file: str = "", **facts: Any) -> dict[str, Any]:
    """Normalized as in the authors' training; the copies for transformers state other statistics."""
    if file:
        hub, size = "Visual-Attention-Network", file.partition("_")[0]
        facts["url"] = f"https://huggingface.co/{hub}/VAN-{size}-original/resolve/main/van_{file.lower()}.pth.tar"
        facts["hf_hub_id"] = f"{hub}/van-{size.lower()}"
    return _cfg(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9, **facts)


default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.in1k": _in1k(file) for name, file in _SIZES.items()},
        "van_b4.in1k": _in1k(notes=_BY_HAND),
        **{f"van_{size}.in22k": _cfg(num_classes=21841, notes=_BY_HAND) for size in ("b4", "b5", "b6")},
        "test_foveal_van.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), origin_url=None, notes=None),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"VAN"``."""
    return "VAN"


_create = partial(create, checkpoint_filter_fn, VAN)


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B0 (VAN-Tiny), 4.1 M parameters."""
    return _create("van_b0", pretrained, kwargs, embed_dims=(32, 64, 160, 256), depths=(3, 3, 5, 2))


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B1 (VAN-Small), 13.9 M parameters."""
    return _create("van_b1", pretrained, kwargs, depths=(2, 2, 4, 2))


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B2 (VAN-Base), 26.6 M parameters."""
    return _create("van_b2", pretrained, kwargs, depths=(3, 3, 12, 3))


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B3 (VAN-Large), 44.8 M parameters."""
    return _create("van_b3", pretrained, kwargs, depths=(3, 5, 27, 3))


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B4, 60.3 M parameters."""
    return _create("van_b4", pretrained, kwargs, depths=(3, 6, 40, 3))


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B5, 90.0 M parameters with 1,000 classes."""
    return _create("van_b5", pretrained, kwargs, embed_dims=(96, 192, 480, 768), depths=(3, 3, 24, 3))


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B6, 199.8 M parameters with 1,000 classes."""
    return _create("van_b6", pretrained, kwargs, embed_dims=(96, 192, 384, 768), depths=(6, 6, 90, 6))


@register_model
def test_foveal_van(pretrained: bool = False, **kwargs: Any) -> VAN:
    """A very small VAN, for tests and demonstrations."""
    args = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), mlp_ratios=(4, 4, 2, 2))
    return _create("test_foveal_van", pretrained, kwargs, **args)
