"""Maps ``[B, H, W, C]`` and ``[B, C, H, W]``: sizes, layouts, and convolutions of channels-last maps."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from ...kernels.tracing import is_dynamic
from ..layers import Mlp, bicubic, channels_last, for_convolution, fx_leaf, linear, may_overwrite, shortfall


def map_sizes(x: torch.Tensor) -> tuple[int, int, int, int]:
    """The shape of a map ``[B, H, W, C]``, with H and W as ints where torch.jit.trace has sizes as tensors."""
    B, H, W, C = x.shape
    if is_dynamic(H, W):
        return B, H, W, C
    return B, operator.index(H), operator.index(W), C


@fx_leaf
def channels_last_on_cpu(x: torch.Tensor) -> torch.Tensor:
    """Converts ``x`` ``[B, C, H, W]`` to channels-last memory on a CPU, unless its shape is dynamic: exporters
    then treat maps of one row as a special case."""
    if x.device.type != "cpu" or is_dynamic(*x.shape[2:]):
        return x
    return channels_last(x)


@fx_leaf
def at_least(x: torch.Tensor, size: int) -> torch.Tensor:
    """Zero-pad maps smaller than ``size`` at the bottom and the right, which would otherwise become empty."""
    free = is_dynamic(*x.shape[-2:])
    bottom, right = (shortfall(length, size) if free else max(0, size - length) for length in x.shape[-2:])
    return F.pad(x, (0, right, 0, bottom)) if free or bottom or right else x


@fx_leaf
def to_multiple(x: torch.Tensor, size: int) -> torch.Tensor:
    """Zero-pad ``x`` ``[B, C, H, W]`` at the bottom and the right to multiples of ``size``."""
    H, W = x.shape[-2:]
    # of positive numbers: ONNX rounds others to zero
    bottom, right = ((length + size - 1) // size * size - length for length in (H, W))
    return F.pad(x, (0, right, 0, bottom)) if is_dynamic(H, W) or bottom or right else x


def resized(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``x`` ``[B, C, H, W]`` by bicubic interpolation; of a dynamic shape also where it has the size already, which
    changes nothing."""
    free = is_dynamic(*x.shape[2:], *size)
    if not free and tuple(x.shape[2:]) == tuple(size):
        return x
    y = bicubic(x, size)
    # exporters guard on a single row to decide the memory format of what follows
    return y.clone(memory_format=torch.contiguous_format) if free else y


@fx_leaf
def resized_nhwc(x: torch.Tensor, like: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
    """`resized` for ``[B, H, W, C]``, to the size of the map ``like`` if it is given."""
    target = size if like is None else like.shape[1:3]
    return resized(x.permute(0, 3, 1, 2), target).permute(0, 2, 3, 1)


class ChannelNorm(LayerNorm2d):
    """LayerNorm over the channels of ``[B, C, H, W]``."""

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        # it permutes to channels-last; exporters guard on a single row to decide the memory format
        return x.clone(memory_format=torch.contiguous_format) if is_dynamic(*x.shape[2:]) else for_convolution(x)


def to_nchw(x: torch.Tensor) -> torch.Tensor:
    """A map ``[B, H, W, C]`` as ``[B, C, H, W]``: a view, and for a dynamic shape a copy, as exporters guard on lengths
    of 1 to decide the memory format of a convolution's input."""
    x = x.permute(0, 3, 1, 2)
    # by index: a node of torch.fx cannot be unpacked
    return x.clone(memory_format=torch.contiguous_format) if is_dynamic(x.shape[2], x.shape[3]) else for_convolution(x)


def to_nhwc(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_nchw`."""
    x = x.permute(0, 2, 3, 1)
    return x.clone(memory_format=torch.contiguous_format) if is_dynamic(x.shape[1], x.shape[2]) else x


class DepthwiseConv(nn.Module):
    """Depthwise convolution of a channels-last map; with ``residual``, the sum of it and the map."""

    def __init__(self, dim: int, kernel_size: int, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = to_nhwc(self.conv(to_nchw(x)))
        if not self.residual:
            return y
        return y.add_(x) if may_overwrite(y, self.conv) else y + x


class ConvFeedForward(nn.Module):
    """MLP with a 3x3 depthwise convolution and its residual after the activation (RMT, STViT)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden, 3, residual=True)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self.fc2, self.dwconv(F.gelu(linear(self.fc1, x))))


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise convolution, LayerNorm and MLP, with LayerScale and a residual (arXiv:2201.03545)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_dw = DepthwiseConv(dim, 7)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * self.mlp(self.norm(self.conv_dw(x)))


class ConvNeXtStem(nn.Module):
    """Convolution of patches that do not overlap, without the incomplete ones at the borders, and LayerNorm: images
    ``[B, C, H, W]`` to ``[B, h, w, dim]``. Images smaller than a patch are zero-padded."""

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(to_nhwc(self.proj(at_least(x, self.patch_size))))


class ConvNeXtDownsample(nn.Module):
    """LayerNorm and 2x2 convolution of stride 2 of a channels-last map; an odd length is rounded down, 1 stays."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reduction = nn.Conv2d(dim, dim_out, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return to_nhwc(self.reduction(at_least(to_nchw(self.norm(x)), 2)))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 and BatchNorm; an odd length is rounded up."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(to_nchw(x))).permute(0, 2, 3, 1)
