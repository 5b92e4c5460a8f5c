"""OverLoCK: overview first, look closely next.

Paper: OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels (Lou and Yu, CVPR 2025,
arXiv:2502.20087). Code and weights of the authors: Apache-2.0, https://github.com/LMMMEng/OverLoCK. This is an
independent implementation; the published checkpoints load unchanged and give the published outputs.

There are three networks. The base-net encodes the image up to stride 16 (``blocks1`` to ``blocks3``); the overview-net
computes a context at stride 32 (``blocks4``); the focus-net processes strides 16 and 32 again (``sub_blocks3``,
``sub_blocks4``), guided by this context, which is concatenated to the channels of the map. Its blocks use ContMix, a
convolution whose kernel at each position follows from the affinities to the pooled context.

The large depthwise convolutions are trained with parallel smaller, dilated ones (`DilatedReparam`), which
`OverLoCK.reparameterize` folds.

Parameters have the authors' names. Feature maps are ``[B, C, H, W]``, on a CPU in the channels_last memory format, in
which depthwise convolutions are several times faster.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, create_classifier, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .attention import ChannelNorm, channels_last_on_cpu, context_mixing, is_dynamic
from .base import Backbone, check_head, check_names, create, keep_new, unwrap
from .layers import (
    GELU,
    Blocks,
    average_pool,
    check_foldable,
    depthwise_conv,
    drop_path_rates,
    for_convolution,
    fx_leaf,
    is_fixed,
    is_plain,
    may_overwrite,
    unwatched,
)

__all__ = ["OverLoCK", "checkpoint_filter_fn", "family"]

# (kernel, dilation) of the branches parallel to a large kernel
BRANCHES = {
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
POOLED = 7  # the context is pooled to 7x7 positions


class DilatedReparam(nn.Module):
    """A large depthwise convolution and parallel smaller, dilated ones, each with a BatchNorm, summed (UniRepLKNet,
    arXiv:2311.15599).

    Without batch statistics they equal one convolution. In evaluation mode its kernel is computed at every forward,
    which is cheap, if all branches are plain convolutions and norms with fixed statistics; `reparameterize` does it
    permanently.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f"kernel_size must be one of {tuple(BRANCHES)}, got {kernel_size}")
        self.kernel_size = kernel_size
        self.reparameterized = False
        self.lk_origin = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self.origin_bn = nn.BatchNorm2d(dim)
        for k, d in BRANCHES[kernel_size]:
            conv = nn.Conv2d(dim, dim, k, padding=d * (k - 1) // 2, dilation=d, groups=dim, bias=False)
            self.add_module(f"dil_conv_k{k}_{d}", conv)
            self.add_module(f"dil_bn_k{k}_{d}", nn.BatchNorm2d(dim))

    def branches(self) -> list[tuple[nn.Module, nn.Module]]:
        """The pairs of convolution and norm that are summed."""
        names = [(f"dil_conv_k{k}_{d}", f"dil_bn_k{k}_{d}") for k, d in BRANCHES[self.kernel_size]]
        return [(self.lk_origin, self.origin_bn), *((getattr(self, a), getattr(self, b)) for a, b in names)]

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight ``[C, 1, K, K]`` and bias ``[C]`` of the convolution that equals all branches with the running
        statistics of the norms; differentiable."""
        convs, norms = zip(*self.branches(), strict=True)
        scales = [bn.weight * (bn.running_var + bn.eps).rsqrt() for bn in norms]
        kernel, *others = (conv.weight * scale.view(-1, 1, 1, 1) for conv, scale in zip(convs, scales, strict=True))
        for (k, d), other in zip(BRANCHES[self.kernel_size], others, strict=True):
            reach = d * (k // 2)
            taps = slice(self.kernel_size // 2 - reach, self.kernel_size // 2 + reach + 1, d)
            kernel[:, :, taps, taps] += other
        biases = (bn.bias - bn.running_mean * scale for bn, scale in zip(norms, scales, strict=True))
        return kernel, reduce(operator.add, biases)

    def reparameterize(self) -> None:
        """Replace the branches by one convolution in place; frozen if the large one is."""
        if self.reparameterized:
            return
        for conv, norm in self.branches():
            check_foldable(conv, norm)
        weight, bias = copy.deepcopy(self).double().folded()
        old = self.lk_origin
        with torch.device("meta"):
            k, dim = self.kernel_size, old.in_channels
            conv = nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim)
        trained = old.weight.requires_grad
        conv.weight = nn.Parameter(weight.detach().to(old.weight.dtype), requires_grad=trained)
        conv.bias = nn.Parameter(bias.detach().to(old.weight.dtype), requires_grad=trained)
        for name in [name for name, _ in self.named_children()]:
            delattr(self, name)
        self.lk_origin = conv.train(self.training)
        self.reparameterized = True

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reparameterized:
            return self.lk_origin(x)
        branches = self.branches()
        if self.training or not all(is_plain(conv) and is_fixed(bn) for conv, bn in branches):
            return reduce(operator.add, (bn(self._convolved(conv, x)) for conv, bn in branches))
        return depthwise_conv(x, *self.folded())

    @staticmethod
    def _convolved(conv: Any, x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv(x, conv.weight, conv.bias, conv.dilation[0]) if is_plain(conv) else conv(x)


class ResDWConv(nn.Conv2d):
    """3x3 depthwise convolution with a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = depthwise_conv(x, self.weight, self.bias)
        return y.add_(x) if may_overwrite(y) else x + y


class LayerScale(nn.Module):
    """A factor and an offset per channel."""

    def __init__(self, dim: int, init_value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), float(init_value)))
        self.bias = nn.Parameter(torch.zeros(dim))

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.bias.view(-1, 1, 1), x, self.weight.view(-1, 1, 1))


class GRN(nn.Module):
    """Global response normalization (ConvNeXt V2, arXiv:2301.00808).

    Args:
        dim: channels.
        after: (parent, name) of the child that makes its input, which inference overwrites unless a hook may hold it.
    """

    def __init__(self, dim: int, after: tuple[nn.Module, str]) -> None:
        super().__init__()
        self.after = after
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        response = _norm_of_channels(x)
        factor = self.gamma * (response / (response.mean(1, keepdim=True) + 1e-6)) + 1
        maker = getattr(*self.after)
        held = not isinstance(maker, nn.Conv2d) or not unwatched(maker) or not unwatched(self)
        if not held and all(may_overwrite(each) for each in (x, factor, self.beta)):
            return torch.addcmul(self.beta, x, factor, out=x)
        return torch.addcmul(self.beta, x, factor)


@fx_leaf
def _norm_of_channels(x: torch.Tensor) -> torch.Tensor:
    """L2 norm of the channels of ``[B, C, H, W]``. ``vector_norm`` of channels-last maps takes five times as long on a
    CPU as two standard operations."""
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if x.device.type != "cpu" or x.dtype == torch.float16 or exporting:  # squares exceed float16
        return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    if may_overwrite(x) and x.numel() > 0:
        square = torch.empty_like(x[0])  # one image at a time, in memory that stays in the cache
        return torch.stack([torch.mul(each, each, out=square).sum((1, 2), keepdim=True) for each in x]).sqrt()
    # a gradient of 0 for a channel of zeros, as that of vector_norm
    return x.square().sum((2, 3), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).sqrt()


class SqueezeExcite(nn.Module):
    """Squeeze and excitation with an eighth of the channels inside, at least 16."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = max(16, dim // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, inner, 1), nn.GELU(), nn.Conv2d(inner, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.proj(x)


class RepConvBlock(nn.Module):
    """The block of the base-net and the overview-net: large-kernel convolution and MLP in one residual branch.

    With ``layer_scale`` (its initial value), the scale sits on the identity path, not on the branch.
    """

    def __init__(
        self, dim: int, kernel_size: int, mlp_ratio: float, layer_scale: float | None, drop_path: float
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.dwconv = ResDWConv(dim)
        self.proj = nn.Sequential(
            ChannelNorm(dim),
            DilatedReparam(dim, kernel_size),
            nn.BatchNorm2d(dim),
            SqueezeExcite(dim),
            nn.Conv2d(dim, hidden, 1),
            nn.GELU(),
            ResDWConv(hidden),
            nn.Identity(),
            nn.Conv2d(hidden, dim, 1),
            DropPath(drop_path) if drop_path > 0 else nn.Identity(),
        )
        self.proj[5], self.proj[7] = GELU((self.proj, "4")), GRN(hidden, (self.proj, "6"))
        self.ls = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x)


def _pool(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``F.adaptive_avg_pool2d``, which the older ONNX exporter knows only where the sizes divide each other."""
    if (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()) or is_dynamic(*size, *x.shape[2:]):
        return average_pool(x, size)
    return F.adaptive_avg_pool2d(x, size)


class ContextPool(nn.AdaptiveAvgPool2d):
    """The pooling of the context, also for dynamic shapes."""

    output_size: Any  # an int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _pool(x, (self.output_size, self.output_size))


class ContMix(nn.Module):
    """A convolution whose kernel at each position follows from the affinities to the pooled context.

    A mixin: its parameters belong to the block that inherits from it, with the authors' names.
    """

    def _init_mixer(self, dim: int, context_dim: int, kernel_sizes: tuple[int, int], num_heads: int) -> None:
        if dim % (2 * num_heads):
            raise ValueError(f"{dim} channels are not divisible by 2 x {num_heads} heads")
        self.dims = dim, context_dim
        self.kernel_size = max(kernel_sizes)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5  # as published; heads of q and k have half of these channels
        self.weight_query = nn.Sequential(nn.Conv2d(dim, dim // 2, 1, bias=False), nn.BatchNorm2d(dim // 2))
        self.weight_key = nn.Sequential(
            ContextPool(POOLED), nn.Conv2d(context_dim, dim // 2, 1, bias=False), nn.BatchNorm2d(dim // 2)
        )
        self.weight_proj = nn.Conv2d(POOLED**2, sum(k * k for k in kernel_sizes), 1)
        for i, k in enumerate(kernel_sizes, 1):
            self.register_parameter(f"rpb{i}", nn.Parameter(torch.zeros(num_heads, 2 * k - 1, 2 * k - 1)))
        self.dyconv_proj = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def mix(self, x: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, dim, H, W]`` mixed with kernels from ``both`` ``[B, dim + context_dim, H, W]``."""
        H, W = x.shape[2:]
        free = is_dynamic(H, W)
        small = not free and min(H, W) < self.kernel_size
        if free:
            small = not statically_known_true(torch.sym_min(H, W) >= self.kernel_size)
        if small:
            size = _enlarged_or_same(H, W, self.kernel_size) if free else _enlarged(H, W, self.kernel_size)
            x, both = (F.interpolate(t, size=size, mode="bilinear", align_corners=False) for t in (x, both))
        features, context = both.split(self.dims, 1)
        q = self.weight_query(features).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1))
        k = self.weight_key(context).flatten(2).transpose(1, 2).unflatten(-1, (self.num_heads, -1))
        v = x.permute(0, 2, 3, 1)
        x = context_mixing(q, k, v, self.weight_proj, (self.rpb1, self.rpb2), self.scale)
        x = for_convolution(x.permute(0, 3, 1, 2))
        if small:
            x = _pool(x, (H, W))
        return self.dyconv_proj(x)


class ContMixBlock(ContMix):
    """The block of the focus-net: ContMix, guided by the context, and an MLP.

    The map has the features and then the context as channels: ``[B, dim + context_dim, H, W]``.

    Args:
        dim: channels of the features.
        context_dim: channels of the context.
        kernel_sizes: of the two dynamic convolutions, the smaller first; each mixes half of the features' channels.
            A map with a side shorter than the larger kernel is upsampled for ContMix, and the result averaged back.
        num_heads: heads of each of the two.
        mlp_ratio: hidden channels of the MLP, relative to ``dim``.
        layer_scale: initial value of the scales on the identity paths.
        drop_path: stochastic depth.
        first: use the context as it is. All other blocks add the initial context, both scaled.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        kernel_sizes: tuple[int, int],
        num_heads: int,
        mlp_ratio: float,
        layer_scale: float,
        drop_path: float,
        first: bool,
    ) -> None:
        super().__init__()
        both, hidden = dim + context_dim, int(dim * mlp_ratio)
        self.x_scale = None if first else LayerScale(context_dim)
        self.h_scale = None if first else LayerScale(context_dim)
        self.dwconv1 = ResDWConv(both)
        self.norm1 = ChannelNorm(both)
        self.fusion = nn.Sequential(
            nn.Conv2d(both, both, 3, padding=1, groups=both),
            nn.BatchNorm2d(both),
            nn.GELU(),
            nn.Conv2d(both, dim, 1),
            nn.Identity(),
        )
        self.fusion[4] = GRN(dim, (self.fusion, "3"))
        self._init_mixer(dim, context_dim, kernel_sizes, num_heads)
        self.lepe = nn.Sequential(DilatedReparam(dim, self.kernel_size), nn.BatchNorm2d(dim))
        self.se_layer = SqueezeExcite(dim)
        self.gate = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, both, 1))

        self.dwconv2 = ResDWConv(both)
        self.norm2 = ChannelNorm(both)
        self.mlp = nn.Sequential(
            nn.Conv2d(both, hidden, 1), nn.GELU(), ResDWConv(hidden), nn.Identity(), nn.Conv2d(hidden, both, 1)
        )
        self.mlp[1], self.mlp[3] = GELU((self.mlp, "0")), GRN(hidden, (self.mlp, "2"))
        self.ls1 = LayerScale(both, layer_scale)
        self.ls2 = LayerScale(both, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    @fx_leaf
    def forward(self, x: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, dim + context_dim, H, W]`` to the same shape; ``initial``: the initial context of the focus-net,
        ``[B, context_dim, H, W]``."""
        if self.x_scale is not None and self.h_scale is not None:
            x, context = x.split(self.dims, 1)
            x = torch.cat([x, self.x_scale(context) + self.h_scale(initial)], 1)
        x = self.dwconv1(x)
        both = self.norm1(x)
        y = self.fusion(both)
        mixed = self.mix(y, both) + self.lepe(y)
        x = self.ls1(x) + self.drop_path(self.proj(self.gate(y) * self.se_layer(mixed)))
        x = self.dwconv2(x)
        return self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))


class ContMixBlocks(Blocks):
    """A sequence of focus-net blocks, which all take the initial context."""

    def forward(self, x: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = checkpoint(block, x, initial) if self.grad_checkpointing else block(x, initial)
        return x


def _enlarged(height: int, width: int, least: int) -> tuple[int, int]:
    """The size with a short side of ``least`` and the long side in proportion, rounded down as in the authors' code."""
    if height < width:
        return least, int(least / height * width)
    return max(int(least / width * height), least), least


def _enlarged_or_same(height: int, width: int, least: int) -> tuple[Any, Any]:
    """`_enlarged` if a side is shorter than ``least``, otherwise the same size; for dynamic sizes. If one side is a
    multiple of nine of the other, the long side may be one more: the authors' floating-point result is then below the
    exact integer."""
    shorter = torch.sym_min(height, width)
    enlarged = torch.sym_max(shorter, least)
    # a lower bound for the exporter
    return torch.sym_max(enlarged * height // shorter, least), torch.sym_max(enlarged * width // shorter, least)


class ContextDownsample(nn.Module):
    """3x3 convolutions of stride 2 with BatchNorm, one for the features and one for the context."""

    def __init__(self, dim: int, dim_out: int, context_dim: int) -> None:
        super().__init__()
        self.dims = dim, context_dim
        self.x_proj = _conv_bn(dim, dim_out, 2)
        self.h_proj = _conv_bn(context_dim, context_dim, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, context = x.split(self.dims, 1)
        return torch.cat([self.x_proj(x), self.h_proj(context)], 1)


def _conv_bn(dim: int, dim_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, dim_out, 3, stride, 1, bias=False), nn.BatchNorm2d(dim_out))


class Head(nn.Sequential):
    """Hidden layer, norm, activation, pooling, classifier."""


class OverLoCK(Backbone):
    """OverLoCK. Takes images of any size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dims: channels of the features at strides 4, 8, 16 and 32. The context has a quarter of the last.
        depths: blocks of the base-net at strides 4, 8, 16 and of the overview-net.
        sub_depths: blocks of the focus-net at strides 16 and 32.
        num_heads: of the focus-net's blocks at strides 16 and 32, for each of the two kernels (twice the numbers in
            the authors' code).
        kernel_sizes: large kernels at strides 4, 8, 16 and 32.
        small_kernel_size: of the other dynamic convolution of the focus-net's blocks.
        mlp_ratio: hidden channels of the base-net's and the overview-net's MLPs, relative to the features'.
        sub_mlp_ratio: likewise for the focus-net.
        head_width: channels of the head's hidden layer.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the focus-net's last block; the rate grows linearly from 0, through the
            base-net, the overview-net and the focus-net.
        aux_head: add a classifier on the context, see `set_auxiliary_training`. The authors trained with one, with a
            loss weight of 0.4.
        out_norm: add the norms of the authors' detection and segmentation models, ``extra_norm``.
            `forward_intermediates` and ``features_only`` apply them.
        out_overview: with ``out_norm``, fuse the overview-net's map into the last map, by a fifth norm and ``h_proj``,
            as in the authors' detection models, but not in their segmentation models.

    Attributes:
        auxiliary_training: see `set_auxiliary_training`.
        reparameterized: see `reparameterize`.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.overlock import OverLoCK
        >>> model = timm.create_model("test_foveal_overlock", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('OverLoCK', (1, 10))
        >>> assert isinstance(model, OverLoCK)
        >>> model.reparameterize()(torch.randn(1, 3, 64, 96)).shape  # folded, for inference
        torch.Size([1, 10])
    """

    output_fmt = "NCHW"
    tables = ()  # position biases decay, as in the authors' training, and so do the factors of GRN and LayerScale
    heads = ("head", "aux_head")

    patch_embed2: nn.Sequential
    patch_embed3: nn.Sequential
    patch_embed4: nn.Sequential
    blocks1: Blocks
    blocks2: Blocks
    blocks3: Blocks
    blocks4: Blocks  # of the overview-net
    sub_blocks3: ContMixBlocks
    sub_blocks4: ContMixBlocks
    extra_norm: nn.ModuleList  # with ``out_norm``
    head: Any  # a Head, or what a user puts in its place, from maps to logits
    aux_head: Any  # a Sequential of norm, pooling and classifier, or None

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dims: Sequence[int] = (56, 112, 256, 336),
        depths: Sequence[int] = (2, 2, 3, 2),
        sub_depths: Sequence[int] = (6, 2),
        num_heads: Sequence[int] = (8, 12),
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        small_kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        sub_mlp_ratio: float = 3.0,
        head_width: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        aux_head: bool = False,
        out_norm: bool = False,
        out_overview: bool = True,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        _check_sizes(4, embed_dims=embed_dims, depths=depths, kernel_sizes=kernel_sizes)
        _check_sizes(2, sub_depths=sub_depths, num_heads=num_heads)
        if embed_dims[3] % 4:
            raise ValueError(f"the last of embed_dims must be divisible by 4, got {tuple(embed_dims)}")
        self.reparameterized = False
        context_dim = embed_dims[3] // 4
        dims = *embed_dims[:2], embed_dims[2] + context_dim, embed_dims[3] + context_dim

        self.patch_embed1 = _stem(in_chans, embed_dims[0])
        for i in (2, 3, 4):
            self.add_module(f"patch_embed{i}", _conv_bn(embed_dims[i - 2], embed_dims[i - 1], 2))
        self.high_level_proj = nn.Conv2d(embed_dims[3], context_dim, 1)
        self.patch_embedx = ContextDownsample(embed_dims[2], embed_dims[3], context_dim)
        rates = drop_path_rates(drop_path_rate, [*depths, *sub_depths])
        for i in range(4):
            scale = 1.0 if i >= 2 else None
            blocks = [RepConvBlock(embed_dims[i], kernel_sizes[i], mlp_ratio, scale, rate) for rate in rates[i]]
            self.add_module(f"blocks{i + 1}", Blocks(*blocks))
        for i, heads in zip((2, 3), num_heads, strict=True):
            sizes = embed_dims[i], context_dim, (small_kernel_size, kernel_sizes[i]), heads, sub_mlp_ratio
            blocks = [
                ContMixBlock(*sizes, layer_scale=1.0, drop_path=rate, first=i == 2 and j == 0)
                for j, rate in enumerate(rates[i + 2])
            ]
            self.add_module(f"sub_blocks{i + 1}", ContMixBlocks(*blocks))
        modules = ("blocks1", "blocks2", f"sub_blocks3.{sub_depths[0] - 1}", f"sub_blocks4.{sub_depths[1] - 1}")
        self._init_maps(dims, modules, embed_dims[3] if out_overview else None)

        hidden = nn.Conv2d(dims[3], head_width, 1, bias=False)
        self.head = Head(hidden, nn.BatchNorm2d(head_width), nn.SiLU(), nn.Identity(), nn.Identity())
        self.aux_head = None
        if aux_head:
            self.aux_head = nn.Sequential(nn.BatchNorm2d(embed_dims[3]), nn.AdaptiveAvgPool2d(1), nn.Identity())
        self.auxiliary_training = aux_head
        self._init_head(dims[3], num_classes, global_pool, drop_rate)
        _init_weights(self)

    def _init_maps(self, dims: Sequence[int], modules: Sequence[str], overview_dim: int | None) -> None:
        """The feature maps, and the layers of ``out_norm`` and ``out_overview``."""
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=module)
            for i, (dim, module) in enumerate(zip(dims, modules, strict=True))
        ]
        self.h_proj = None
        if self.out_norm:
            self.extra_norm = nn.ModuleList(LayerNorm2d(dim) for dim in dims)
        if self.out_norm and overview_dim is not None:
            self.extra_norm.append(LayerNorm2d(overview_dim))
            self.h_proj = nn.Sequential(nn.Conv2d(overview_dim, dims[3], 1), LayerScale(dims[3], 1e-5))

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        check_head(num_classes, global_pool)
        self.num_classes = num_classes
        hidden = self.head[0]
        width = self.num_features if isinstance(hidden, nn.Identity) else hidden.out_channels
        layers: Any = create_classifier(width, num_classes, global_pool, use_conv=True)
        self.head[3], self.head[4] = layers
        self.head_hidden_size = width * self.global_pool.feat_mult()
        _init_weights(self.head[4])
        if self.aux_head is not None:
            width = self.aux_head[0].num_features
            self.aux_head[2] = nn.Conv2d(width, num_classes, 1) if num_classes else nn.Identity()
            _init_weights(self.aux_head[2])

    @property
    def global_pool(self) -> Any:
        """The pooling layer, between the head's hidden layer and its classifier."""
        return self.head[3]

    def get_classifier(self) -> nn.Module:
        """The classifier: a 1x1 convolution, or an Identity without classes; a head that the user put there, whole."""
        return self.head[4] if isinstance(self.head, Head) else self.head

    def set_auxiliary_training(self, enable: bool = True) -> None:
        """Let `forward` return the pair (logits, auxiliary logits) in training mode.

        Raises:
            ValueError: the model has no auxiliary head.
        """
        if enable and self.aux_head is None:
            raise ValueError("this model has no auxiliary head: create it with aux_head=True")
        self.auxiliary_training = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise learning rates: in the order of computation."""
        dense = (r"^(?:extra_norm|h_proj)", (99999,))
        if coarse:
            blocks = r"^(?:patch_embed|blocks)([1-4])\."
            focus = [(r"^(?:high_level_proj|sub_blocks3)", (3,)), (r"^(?:patch_embedx|sub_blocks4)", (4,)), dense]
        else:
            blocks = [(r"^patch_embed([2-4])\.", (0,)), (r"^blocks([1-4])\.(\d+)", None)]
            focus = [
                (r"^high_level_proj", (3, 0)),
                (r"^patch_embedx", (4, 0)),
                (r"^sub_blocks([34])\.(\d+)", None),
                dense,
            ]
        return dict(stem=r"^patch_embed1", blocks=blocks, focus=focus)

    def _stages(self, x: torch.Tensor, last: int = 3) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The maps of the stages up to ``last``, and the overview-net's ``[B, embed_dims[3], h, w]`` if it ran."""
        maps, overview = [self.blocks1(self.patch_embed1(channels_last_on_cpu(x)))], None
        if last >= 1:
            maps.append(self.blocks2(self.patch_embed2(maps[0])))
        if last >= 2:
            x = self.blocks3(self.patch_embed3(maps[1]))
            overview = self.blocks4(self.patch_embed4(x))
            context = self.high_level_proj(overview)
            near = F.interpolate(context, size=x.shape[2:], mode="bilinear", align_corners=False)
            maps.append(self.sub_blocks3(torch.cat([x, near], 1), near))
        if last >= 3:
            maps.append(self.sub_blocks4(self.patch_embedx(maps[2]), context))
        return maps, overview

    def _maps(
        self, x: torch.Tensor, take: Sequence[int], stop: int, norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The maps of the authors' detection and segmentation models: of the base-net's first two stages and of the
        focus-net's two, the latter with the context after the features."""
        maps, overview = self._stages(x, stop)
        return maps[-1], [self._normalized(i, maps[i], overview) for i in sorted(take)]

    def _normalized(self, i: int, x: torch.Tensor, overview: torch.Tensor | None) -> torch.Tensor:
        if not self.out_norm:
            return x
        x = self.extra_norm[i](x)
        return x if i < 3 or self.h_proj is None else x + self.h_proj(self.extra_norm[4](overview))

    def _prune(self, take: Sequence[int], last: int) -> None:
        unused = [
            [],
            ["patch_embed2", "blocks2"],
            ["patch_embed3", "patch_embed4", "blocks3", "blocks4", "high_level_proj", "sub_blocks3"],
            ["patch_embedx", "sub_blocks4"],
        ]
        for name in [name for names in unused[last + 1 :] for name in names if hasattr(self, name)]:
            delattr(self, name)
        if self.out_norm:
            if 3 not in take:
                self._drop_overview()
            for i in set(range(4)) - set(take):
                self.extra_norm[i] = nn.Identity()

    def _remove_head(self) -> None:
        self.head = Head(*(nn.Identity() for _ in self.head))
        self._drop_aux_head()
        self._set_head(0, "")

    def _drop_overview(self) -> None:
        self.extra_norm, self.h_proj = self.extra_norm[:4], None

    def _drop_aux_head(self) -> None:
        self.aux_head = None
        self.auxiliary_training = False

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, in_chans, H, W]`` to the last map, context included, ``[B, num_features, h, w]``."""
        return self._stages(x, len(self.feature_info) - 1)[0][-1]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """``[B, num_features, h, w]`` to the logits, or with ``pre_logits`` to ``[B, head_hidden_size]``."""
        if not isinstance(self.head, Head):
            return self.head(x)
        *layers, classifier = self.head
        for layer in layers:
            x = layer(x)
        x = self.head_drop(x)
        if not pre_logits:
            x = classifier(x)
        return x if self.global_pool.is_identity() else x.flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``; see also `set_auxiliary_training`."""
        maps, overview = self._stages(x, len(self.feature_info) - 1)
        logits = self.forward_head(maps[-1])
        if self.training and self.auxiliary_training:
            return logits, self.aux_head(overview).flatten(1)
        return logits

    def reparameterize(self) -> OverLoCK:
        """Fold the branches of every large convolution and drop the auxiliary head, in place, for inference.

        Outputs equal those in evaluation mode up to rounding. This is the form of the authors' ``_reparam``
        checkpoints, in which all other BatchNorms remain. Idempotent.

        Returns:
            The model itself.
        """
        for module in self.modules():
            if isinstance(module, DilatedReparam):
                module.reparameterize()
        self._drop_aux_head()
        self.reparameterized = True
        return self


def _check_sizes(count: int, **given: Sequence[int]) -> None:
    for name, values in given.items():
        if len(values) != count or min(values) < 1:
            raise ValueError(f"{name} must be {count} numbers of at least 1, got {tuple(values)}")


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    """Four 3x3 convolutions, two of stride 2, with BatchNorm, and GELU between them."""
    sizes = [(in_chans, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim, 2), (dim, dim, 1)]
    layers = [layer for arguments in sizes for layer in (*_conv_bn(*arguments), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def _init_weights(module: nn.Module) -> None:
    """As the authors: convolutions from a normal with std 0.02 truncated at two std, biases 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and not m.weight.is_meta:
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


_DENSE = r"extra_norm\.|h_proj\."  # layers of ``out_norm``


def checkpoint_filter_fn(state_dict: dict[str, Any], model: OverLoCK) -> dict[str, torch.Tensor]:
    """Convert a checkpoint of any published format to a state dict of ``model``.

    Supported are

    * the authors' classification checkpoints, which have the same names;
    * their reparameterized ones: **the model is reparameterized in place** if it is not yet. Conversely, a
      reparameterized model loads other checkpoints folded;
    * their mmdetection and mmsegmentation checkpoints, of which only the ``backbone.`` is used. They have
      ``extra_norm`` and no classifier, so create the model with ``features_only=True, out_norm=True``. Those for
      segmentation have no ``h_proj``: **the model is changed in place** to ``out_overview=False``;
    * state dicts of these models, also wrapped by ``features_only`` or ``DistributedDataParallel``.

    ``aux_head.*`` in the authors' checkpoints is dropped if the model has no such head; its classifier is not loaded if
    the number of classes differs. If the checkpoint has no ``extra_norm`` and ``h_proj``, those of the model keep their
    values.

    Args:
        state_dict: names to tensors, or a checkpoint with them under ``state_dict`` or ``model``. Not changed.
        model: the model to load the result into.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    state_dict = unwrap(state_dict)

    folded = any(name.endswith(".lk_origin.bias") for name in state_dict)
    if folded and not model.reparameterized:
        if model.aux_head is not None:
            raise ValueError("the checkpoint is reparameterized and has no auxiliary head: leave out aux_head=True")
        model.reparameterize()
    elif model.reparameterized and not folded:
        state_dict = _fold_branches(state_dict)

    overview = any(name.startswith(("extra_norm.4.", "h_proj.")) for name in state_dict)
    if "extra_norm.3.weight" in state_dict and not overview and model.h_proj is not None:  # of a segmentation model
        model._drop_overview()

    own = model.state_dict()
    if model.aux_head is None:
        state_dict = {name: value for name, value in state_dict.items() if not name.startswith("aux_head.")}
    else:
        for name in ("aux_head.2.weight", "aux_head.2.bias"):
            if name in state_dict and name not in own:  # a model without classes
                del state_dict[name]
            elif name in state_dict and own[name].shape != state_dict[name].shape:
                state_dict[name] = own[name]
    keep_new(state_dict, own, _DENSE)
    dense = any(re.match(_DENSE, name) for name in own)
    check_names(state_dict, own, ignore=r"head\." if dense else r"head\.4\.", map_norms=_DENSE)
    return state_dict


def _fold_branches(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a state dict to that of a reparameterized model; the argument is not changed."""
    out = dict(state_dict)
    for name in state_dict:
        if not name.endswith(".lk_origin.weight"):
            continue
        prefix = name.removesuffix("lk_origin.weight")
        inner = {n[len(prefix) :]: out.pop(n) for n in state_dict if n.startswith(prefix)}
        weight = inner["lk_origin.weight"]
        block = DilatedReparam(weight.shape[0], weight.shape[-1]).to(weight)
        block.load_state_dict(inner)
        block.reparameterize()
        out.update({prefix + n: value for n, value in block.state_dict().items()})
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------

_NOTES = (
    "Fold the training branches before inference or export: model.reparameterize(). The published parameter counts are "
    "those of that form.",
)


_FILES = "https://github.com/LMMMEng/OverLoCK/releases/download/v1"
_WEIGHTS: dict[str, dict[str, Any]] = {
    "overlock_xt.in1k": dict(url=f"{_FILES}/overlock_xt_in1k_224.pth", crop_pct=0.925),
    "overlock_xt.in1k_reparam": dict(url=f"{_FILES}/overlock_xt_in1k_224_reparam.pth", crop_pct=0.925),
    "overlock_t.in1k": dict(url=f"{_FILES}/overlock_t_in1k_224.pth"),
    "overlock_t.in1k_reparam": dict(url=f"{_FILES}/overlock_t_in1k_224_reparam.pth"),
    "overlock_s.in1k": dict(url=f"{_FILES}/overlock_s_in1k_224.pth"),
    "overlock_s.in1k_reparam": dict(url=f"{_FILES}/overlock_s_in1k_224_reparam.pth"),
    "overlock_b.in1k": dict(url=f"{_FILES}/overlock_b_in1k_224.pth", crop_pct=0.975),
    "overlock_b.in1k_reparam": dict(url=f"{_FILES}/overlock_b_in1k_224_reparam.pth", crop_pct=0.975),
}


def _cfg(name: str, **facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "first_conv": "patch_embed1.0",
        "classifier": "head.4",
        "crop_pct": 0.95,
        "license": "apache-2.0",
        "origin_url": "https://github.com/LMMMEng/OverLoCK",
        "paper_ids": "arXiv:2502.20087",
        "notes": () if name.endswith("_reparam") else _NOTES,
        **facts,
    }


_TEST = dict(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=0.925, origin_url=None)

default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg(name, **facts) for name, facts in _WEIGHTS.items()},
        "test_foveal_overlock.untrained": _cfg("test_foveal_overlock", **_TEST),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"OverLoCK"``."""
    return "OverLoCK"


_create = partial(create, checkpoint_filter_fn, OverLoCK)


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-XT, 17 M parameters, reparameterized 16 M."""
    args = dict(embed_dims=(56, 112, 256, 336), depths=(2, 2, 3, 2), sub_depths=(6, 2), num_heads=(8, 12))
    return _create("overlock_xt", pretrained, kwargs, **args, drop_path_rate=0.1)


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-T, 34 M parameters, reparameterized 33 M."""
    args = dict(embed_dims=(64, 128, 256, 512), depths=(4, 4, 6, 2), sub_depths=(12, 2), num_heads=(8, 16))
    return _create("overlock_t", pretrained, kwargs, **args, drop_path_rate=0.15)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-S, 58 M parameters, reparameterized 56 M."""
    args = dict(embed_dims=(64, 128, 320, 512), depths=(6, 6, 8, 3), sub_depths=(16, 3), num_heads=(16, 32))
    return _create("overlock_s", pretrained, kwargs, **args, drop_path_rate=0.4)


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-B, 97 M parameters, reparameterized 95 M."""
    args = dict(embed_dims=(80, 160, 384, 576), depths=(8, 8, 10, 4), sub_depths=(20, 4), num_heads=(12, 18))
    return _create("overlock_b", pretrained, kwargs, **args, drop_path_rate=0.5)


@register_model
def test_foveal_overlock(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """A very small OverLoCK, for tests and demonstrations."""
    args = dict(embed_dims=(16, 24, 32, 48), depths=(1, 1, 1, 1), sub_depths=(1, 1), num_heads=(2, 4))
    args |= dict(kernel_sizes=(7, 7, 7, 7), mlp_ratio=2.0, sub_mlp_ratio=2.0, head_width=64)
    return _create("test_foveal_overlock", pretrained, kwargs, **args)
