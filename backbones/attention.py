"""Attention modules over feature maps, channels-last. The only file of this folder that calls the kernels.

Layout: x is ``[B, H, W, C]``; q, k and v are ``[B, H, W, heads, D]`` with ``C = heads * D``.
"""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, to_2tuple, trunc_normal_
from timm.layers.halo_attn import HaloAttn
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..kernels import (
    DecomposedRelativePositionBias,
    RelativePositionBias,
    TensorCache,
    neighborhood_aggregate,
    neighborhood_attention,
    neighborhood_mix,
)
from ..kernels.aggregate.api import neighborhood_logits
from ..kernels.cache import CONSTANTS
from ..kernels.checks import autocast_enabled
from ..kernels.tracing import is_dynamic, transformed, without_size_guards
from ..kernels.tracing import leaves_pytorch as leaves_pytorch  # for the other files of this folder
from .layers import (
    average_pool,
    bicubic,
    channels_last,
    fx_leaf,
    is_plain,
    linear,
    may_overwrite,
    refuse_scripting,
    shortfall,
)


def _sizes(x: torch.Tensor) -> tuple[int, int, int, int]:
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
        return x.clone(memory_format=torch.contiguous_format) if is_dynamic(*x.shape[2:]) else x


def to_nchw(x: torch.Tensor) -> torch.Tensor:
    """A map ``[B, H, W, C]`` as ``[B, C, H, W]``: a view, and for a dynamic shape a copy, as exporters guard on lengths
    of 1 to decide the memory format of a convolution's input."""
    x = x.permute(0, 3, 1, 2)
    # by index: a node of torch.fx cannot be unpacked
    return x.clone(memory_format=torch.contiguous_format) if is_dynamic(x.shape[2], x.shape[3]) else x


def to_nhwc(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_nchw`."""
    x = x.permute(0, 2, 3, 1)
    return x.clone(memory_format=torch.contiguous_format) if is_dynamic(x.shape[1], x.shape[2]) else x


class NeighborhoodAttention2d(nn.Module):
    """Multi-head neighborhood attention with relative position bias (NAT, arXiv:2204.07143, section 3.1; the dilation:
    DiNAT, arXiv:2209.15001, section 3.1).

    Each query attends to the ``kernel_size`` window around it, shifted inside the map at the borders. A map smaller
    than ``kernel_size * dilation`` is zero-padded to it at the right and the bottom before the qkv projection, and the
    output is cropped. Padding is not masked, as in the training of the published checkpoints.

    A ``kernel_size`` equal to the map gives plain attention with a relative position bias.

    Args:
        dim: channels C.
        num_heads: heads; must divide ``dim``.
        kernel_size: window, an int or (rows, columns).
        dilation: distance between neighboring window positions, or ``"auto"``: the largest that fits the map,
            ``max(1, min(H // rows, W // columns))``, computed at every forward.
        qkv_bias: learn a bias in the qkv projection.
        rel_pos_bias: learn ``rpb``, the ``[heads, 2 * rows - 1, 2 * columns - 1]`` table that is added to the logits
            by the offset (in dilated steps) from query to key.
        attn_drop: dropout probability on the attention weights.
        proj_drop: dropout probability on the output.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import NeighborhoodAttention2d
        >>> attention = NeighborhoodAttention2d(dim=64, num_heads=2, kernel_size=7, dilation=2)
        >>> attention(torch.randn(1, 16, 20, 64)).shape
        torch.Size([1, 16, 20, 64])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int],
        dilation: int | str = 1,
        *,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        pair: Any = to_2tuple(kernel_size)
        self.kernel_size: tuple[int, int] = pair
        rows, columns = self.kernel_size
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        if min(rows, columns) < 1:
            raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
        if dilation != "auto" and (not isinstance(dilation, (int, np.integer)) or dilation < 1):
            raise ValueError(f'dilation must be an int of at least 1 or "auto", got {dilation!r}')
        self.dilation = dilation if isinstance(dilation, str) else int(dilation)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * rows - 1, 2 * columns - 1))
            trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.bias_cache = TensorCache()
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, num_heads={self.num_heads}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, C]`` to the same shape, for any H and W."""
        B, H, W, C = _sizes(x)
        rows, columns = self.kernel_size
        dynamic_shape = is_dynamic(H, W)
        dilation = self.dilation
        if dynamic_shape and isinstance(dilation, str):
            raise ValueError(
                'dilation "auto" follows the size of the map and so needs to know it: export such a model with a fixed '
                "height and width, or create it with dilations given"
            )
        if isinstance(dilation, str):
            dilation = max(1, min(H // rows, W // columns))

        if dynamic_shape:  # a pad of zero if the map is large enough
            bottom, right = shortfall(H, rows * dilation), shortfall(W, columns * dilation)
        else:
            bottom, right = max(0, rows * dilation - H), max(0, columns * dilation - W)
        enlarge = dynamic_shape or bottom or right
        if enlarge and not dynamic_shape and is_plain(self.qkv):
            qkv = self._append_bias(linear(self.qkv, x), bottom, right)
        else:
            qkv = linear(self.qkv, F.pad(x, (0, 0, 0, right, 0, bottom)) if enlarge else x)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        x = neighborhood_attention(
            q,
            k,
            v,
            kernel_size=self.kernel_size,
            dilation=dilation,
            bias=None if self.rpb is None else RelativePositionBias(self.rpb, self.bias_cache),
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        if dynamic_shape:
            x = x.index_select(1, torch.arange(H, device=x.device)).index_select(2, torch.arange(W, device=x.device))
        elif bottom or right:
            x = x[:, :H, :W]
        return self.proj_drop(linear(self.proj, x.reshape(B, H, W, C)))

    def _append_bias(self, qkv: torch.Tensor, bottom: int, right: int) -> torch.Tensor:
        """Append the projection of zero inputs, which is its bias."""
        B, H, W, C = qkv.shape
        fill = qkv.new_zeros(C) if self.qkv.bias is None else self.qkv.bias.to(qkv.dtype)
        if right:
            qkv = torch.cat([qkv, fill.expand(B, H, right, C)], dim=2)
        if bottom:
            qkv = torch.cat([qkv, fill.expand(B, bottom, W + right, C)], dim=1)
        return qkv


class RelativePositionTable(nn.Module):
    """A relative position bias table for windows of one size, resampled for windows of another.

    The parameter has timm's name and orientation (``RelPosBiasTf``): ``[heads, 2 * rows - 1, 2 * columns - 1]``, the
    entry for a key ``t`` and a query ``i`` at ``t - i + size - 1``.

    Args:
        num_heads: heads.
        window_size: (rows, columns).
    """

    def __init__(self, num_heads: int, window_size: tuple[int, int]) -> None:
        super().__init__()
        rows, columns = (2 * size - 1 for size in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_heads, rows, columns).normal_(std=0.02))
        self.cache = TensorCache()

    @property
    def window_size(self) -> tuple[int, int]:
        rows, columns = map(operator.index, self.relative_position_bias_table.shape[1:])
        return (rows + 1) // 2, (columns + 1) // 2

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Resample the parameter to windows of another size, in place."""
        table = self.relative_position_bias_table
        resampled = resample_table(table.detach(), window_size).clone()
        self.relative_position_bias_table = nn.Parameter(resampled, requires_grad=table.requires_grad)

    def forward(self, window_size: tuple[int, int]) -> torch.Tensor:
        """The table for windows of ``window_size``, differentiable; in eval, a resampled one is cached."""
        table = self.relative_position_bias_table
        if window_size != self.window_size:
            return self.cache.get(resample_table, window_size, source=table)
        return table.clone()  # FSDP frees the parameter itself when this returns


def resample_table(table: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """A table ``[heads, 2 * h - 1, 2 * w - 1]`` for windows of another size ``(rows, columns)``.

    Linear interpolation per axis between points whose distances grow geometrically from the centre, as in BEiT and
    ``timm.layers.resize_rel_pos_bias_table``, up to rounding. If one axis changes, both are resampled, as there.
    """
    size = tuple(2 * length - 1 for length in window_size)
    if tuple(table.shape[1:]) == size:
        return table
    out = table.to(torch.promote_types(table.dtype, torch.float32))
    for dim, target in ((1, size[0]), (2, size[1])):
        lower, upper, weight = _interpolation(operator.index(table.shape[dim]), operator.index(target))
        shape = (-1, 1) if dim == 1 else (-1,)
        weight = torch.tensor(weight, dtype=out.dtype, device=out.device).view(shape)
        lower, upper = (torch.tensor(i, device=out.device) for i in (lower, upper))
        out = torch.lerp(out.index_select(dim, lower), out.index_select(dim, upper), weight)
    return out.to(table.dtype)


@torch.compiler.assume_constant_result
def _interpolation(source: int, target: int) -> tuple[list[int], list[int], list[float]]:
    """For each of ``target`` positions the two neighbouring source positions and the weight of the upper one."""
    steps, reach = source // 2, target // 2
    low, high = 1.01, 1.5  # bounds of the ratio at which the outermost points meet the ends of the target
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    distances = list(itertools.accumulate(ratio**i for i in range(steps)))
    points = [-d for d in reversed(distances)] + [0.0] + distances
    lower, upper, weights = [], [], []
    for x in range(-reach, reach + 1):
        b = min(bisect.bisect_left(points, x), source - 1)
        a = max(b - 1, 0)
        lower.append(a)
        upper.append(b)
        weights.append(0.0 if a == b else min((x - points[a]) / (points[b] - points[a]), 1.0))
    return lower, upper, weights


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    grid: bool = False,
    table: torch.Tensor | None = None,
    cache: TensorCache | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention inside the windows of a map of any size; windows that leave the map are cut.

    Args:
        q: queries ``[B, H, W, heads, D]``.
        k: keys, likewise.
        v: values, likewise.
        size: (rows, columns) of a window.
        shift: where the first whole window starts (Swin's shifted windows).
        grid: a window is ``size`` positions spread evenly over the map, ``ceil(length / size)`` apart.
        table: position bias ``[heads, 2 * rows - 1, 2 * columns - 1]``, by key - query.
        cache: keeps what the kernels derive from the table in eval.
        scale: factor on the logits; None is ``D ** -0.5``.
        dropout_p: probability of dropping an attention weight.

    Returns:
        ``[B, H, W, heads * D]``.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import window_attention
        >>> q, k, v = torch.randn(3, 1, 16, 20, 2, 8)
        >>> window_attention(q, k, v, (7, 7), shift=(3, 3)).shape
        torch.Size([1, 16, 20, 16])
    """
    H, W = q.shape[1:3]
    if not is_dynamic(H, W):
        H, W = operator.index(H), operator.index(W)  # torch.jit.trace has sizes as tensors
    x = neighborhood_attention(
        q,
        k,
        v,
        kernel_size=size,
        stride=size,
        dilation=(-(-H // size[0]), -(-W // size[1])) if grid else 1,
        offset=shift,
        bias=None if table is None else RelativePositionBias(table, cache),
        boundary="mask",
        scale=scale,
        dropout_p=dropout_p,
    )
    return x.flatten(3)


class PartitionAttention2d(nn.Module):
    """Multi-head attention inside the partitions of a map, with relative position bias (MaxViT, arXiv:2204.01697,
    sections 3.2 and 3.3).

    A partition is a window of ``partition_size`` neighbors (``"block"``), or ``partition_size`` positions spread evenly
    over the map, ``ceil(length / size)`` apart (``"grid"``). If the size does not divide the map, the map counts as
    padded to a multiple, the padding is masked, and partitions at the right and the bottom are smaller.

    Args:
        dim: channels C.
        num_heads: heads; must divide ``dim``.
        partition_size: (rows, columns) of a partition and of the bias table. None, with ``parts``: no position bias.
        kind: ``"block"`` or ``"grid"``.
        parts: None: partitions of ``partition_size`` for every map. A number: windows per axis; their size follows the
            map, ``ceil(length / parts)``, and the table is resampled (`resample_table`).
        attn_drop: dropout probability on the attention weights.
        proj_drop: dropout probability on the output.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import PartitionAttention2d
        >>> attention = PartitionAttention2d(dim=64, num_heads=2, partition_size=(7, 7), kind="grid")
        >>> attention(torch.randn(1, 16, 20, 64)).shape
        torch.Size([1, 16, 20, 64])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int,
        partition_size: tuple[int, int] | None,
        kind: str,
        *,
        parts: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        if kind not in ("block", "grid"):
            raise ValueError(f'kind must be "block" or "grid", got {kind!r}')
        if (parts is None) if partition_size is None else min(partition_size) < 1:
            raise ValueError(f"partition_size must be at least 1, got {partition_size}")
        self.kind = kind
        self.parts = parts
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rel_pos = None if partition_size is None else RelativePositionTable(num_heads, partition_size)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        fixed = None if self.rel_pos is None or self.parts else self.rel_pos.window_size
        size = f"parts={self.parts}" if fixed is None else f"partition_size={fixed}"
        return f"{self.kind}, {size}, num_heads={self.num_heads}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, C]`` to the same shape, for any H and W."""
        B, H, W, C = _sizes(x)
        if self.parts:
            size = -(-H // self.parts), -(-W // self.parts)
        else:
            assert self.rel_pos is not None  # the constructor asks for one of the two
            size = self.rel_pos.window_size
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        x = window_attention(
            q,
            k,
            v,
            size,
            grid=self.kind == "grid",
            table=None if self.rel_pos is None else self.rel_pos(size),
            cache=None if self.rel_pos is None else self.rel_pos.cache,
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(linear(self.proj, x.reshape(B, H, W, C)))


class FullAttention2d(PartitionAttention2d):
    """Multi-head attention over the whole map, with relative position bias.

    The bias table is for maps of ``map_size`` and resampled for others (`RelativePositionTable`).

    Args:
        dim: channels C.
        num_heads: heads; must divide ``dim``.
        map_size: (rows, columns) of the bias table; None: no position bias.
        attn_drop: dropout probability on the attention weights.
        proj_drop: dropout probability on the output.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import FullAttention2d
        >>> attention = FullAttention2d(dim=64, num_heads=2, map_size=(14, 14))
        >>> attention(torch.randn(1, 16, 20, 64)).shape
        torch.Size([1, 16, 20, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int] | None,
        *,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, map_size, "block", parts=1, attn_drop=attn_drop, proj_drop=proj_drop)


class RelativeEmbedding(nn.Module):
    """Learned vectors for the row and the column offsets from query to key, ``[2 * window - 1, D]`` each, shared by the
    heads; the names are those of timm's checkpoints."""

    def __init__(self, window: int, depth: int, std: float) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, depth))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, depth))
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=std)

    def forward(self, halo_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The row and column embeddings, with `key - query + window - 1` relative to one origin as their index."""
        rows, columns = (F.pad(t[halo_size:], (0, 0, 0, halo_size)) for t in (self.height_rel, self.width_rel))
        return rows, columns


class HaloAttention2d(nn.Module):
    """Blocked local attention with a halo (HaloNet, arXiv:2103.12731, section 2), on ``[B, C, H, W]``.

    The map is split into blocks; all queries of a block attend to the block and a halo around it, with a position bias
    of row and column embeddings dotted with the query. There is no output projection. Any map size is supported: blocks
    start at the top left, the last ones may be cut, and ``boundary`` applies to positions outside the map.

    With ``stride`` 2 there is a query at every second row and column, starting with the first (odd lengths are rounded
    up); keys and values keep the full resolution.

    Parameters have timm's names and shapes (``q``, ``kv``, ``pos_embed``). The embeddings are indexed as in timm, by
    ``key - query + window - 1`` with the key relative to the window's corner and the query to its block's, so the first
    ``halo_size`` rows are never used.

    Args:
        dim: input channels.
        dim_out: output channels, those of all value heads; None for ``dim``.
        stride: 1, or 2 for every second query.
        num_heads: heads; must divide ``dim_out``.
        head_dim: channels of a query or key head; None for ``dim_out // num_heads``.
        block_size: side of a block.
        halo_size: width of the halo on each side.
        qkv_bias: learn biases in the projections.
        boundary: ``"mask"`` excludes positions outside the map from the softmax, as in the paper; with ``"zero"`` they
            take part with zero keys and values, as in the training of timm's published weights.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import HaloAttention2d
        >>> attention = HaloAttention2d(dim=64, num_heads=2, block_size=8, halo_size=3, stride=2)
        >>> attention(torch.randn(1, 64, 16, 21)).shape
        torch.Size([1, 64, 8, 11])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        stride: int = 1,
        num_heads: int = 8,
        head_dim: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qkv_bias: bool = False,
        boundary: str = "mask",
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if dim_out % num_heads:
            raise ValueError(f"dim_out {dim_out} is not divisible by num_heads {num_heads}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        if block_size < 1 or halo_size < 0:
            raise ValueError(
                f"block_size must be at least 1 and halo_size 0, got block_size {block_size}, halo_size {halo_size}"
            )
        if boundary not in ("mask", "zero"):
            raise ValueError(f'boundary must be "mask" or "zero", got {boundary!r}')
        self.stride = stride
        self.num_heads = num_heads
        self.head_dim = dim_out // num_heads if head_dim is None else head_dim
        self.value_dim = dim_out // num_heads
        self.block_size = block_size
        self.halo_size = halo_size
        self.boundary = boundary
        self.scale = self.head_dim**-0.5
        # options of timm's module, see `from_timm`
        self.scale_bias = False
        self.dense_offsets = False
        self.avg_pool = False

        keys = num_heads * self.head_dim
        self.q = nn.Conv2d(dim, keys, 1, stride=stride, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, keys + dim_out, 1, bias=qkv_bias)  # per head: key, then value
        self.pos_embed = RelativeEmbedding(block_size + 2 * halo_size, self.head_dim, self.scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from a truncated normal with standard deviation ``dim ** -0.5``; PyTorch's default for biases."""
        for conv in (self.q, self.kv):
            trunc_normal_(conv.weight, std=conv.in_channels**-0.5)

    @classmethod
    def from_timm(cls, module: HaloAttn) -> HaloAttention2d:
        """Convert timm's module: the same outputs, with shared (not copied) parameters.

        Behaviour kept from timm: zero keys outside the map; with stride 2 an average pool after the attention, if
        requested or if the block is odd, otherwise position offsets that count strided queries (the third query of a
        block, at its fifth position, has an offset of two). The pool rounds an odd length down if timm supports the
        map (both sides are multiples of the block), and up otherwise.
        """
        with torch.device("meta"):
            new = cls(
                module.q.in_channels,
                module.dim_out_v,
                stride=module.block_stride,
                num_heads=module.num_heads,
                head_dim=module.dim_head_qk,
                block_size=module.block_size,
                halo_size=module.halo_size,
                boundary="zero",
            )
        new.q, new.kv = module.q, module.kv
        new.pos_embed.height_rel, new.pos_embed.width_rel = module.pos_embed.height_rel, module.pos_embed.width_rel
        new.pos_embed.training = module.pos_embed.training
        new.scale = module.scale
        new.scale_bias = module.scale_pos_embed
        new.dense_offsets = module.block_stride > 1
        new.avg_pool = not isinstance(module.pool, nn.Identity)
        new.training = module.training
        return new

    def extra_repr(self) -> str:
        return (
            f"block_size={self.block_size}, halo_size={self.halo_size}, num_heads={self.num_heads}, "
            f"stride={2 if self.avg_pool else self.stride}, boundary={self.boundary}"
        )

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, dim, H, W]`` to ``[B, dim_out, h, w]`` in PyTorch's channels_last memory format."""
        height, width = x.shape[2:]
        # views, contiguous if x is in channels_last; converting x first is not faster
        q = self.q(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, self.head_dim))
        kv = self.kv(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, self.head_dim + self.value_dim))
        k, v = kv.split((self.head_dim, self.value_dim), -1)

        factor = self.scale if self.scale_bias else 1.0
        rows, columns = (factor * table for table in self.pos_embed(self.halo_size))
        window = self.block_size + 2 * self.halo_size
        x = neighborhood_attention(
            q,
            k,
            v,
            kernel_size=(window, window),
            stride=self.block_size,
            query_stride=self.stride,
            bias=DecomposedRelativePositionBias(rows, columns, counted=self.dense_offsets),
            boundary=self.boundary,
            scale=self.scale,
        )
        x = x.flatten(3).permute(0, 3, 1, 2)
        if self.avg_pool:
            up = height % self.block_size > 0 or width % self.block_size > 0
            x = F.avg_pool2d(x, 2, ceil_mode=up, count_include_pad=False)
        return x


@without_size_guards
def context_mixing(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj: nn.Conv2d,
    tables: Sequence[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Context-mixing dynamic convolution (OverLoCK's ContMix, arXiv:2502.20087).

    The affinities of a position's query to S pooled positions of the context are projected to the weights of its own
    convolution kernel, one for each head and table, with a relative position bias and a softmax over the kernel. At the
    borders the window is shifted inside the map.

    The weight of a plain ``proj`` is multiplied with the pooled keys before the queries, which gives the same product
    without storing the affinities. Any other ``proj`` is called with the affinities.

    Args:
        q: queries ``[B, H, W, heads, D]``.
        k: keys ``[B, S, heads, D]``.
        v: values ``[B, H, W, C]``. The channels are divided equally among the tables' kernels, in the order of
            ``tables``, and then among the heads.
        proj: from affinities ``[B * heads, S, H, W]`` to logits, a 1x1 convolution from S channels to the concatenated
            kernels.
        tables: position biases ``[heads, 2 * K - 1, 2 * K - 1]``, one for each kernel of K x K.
        scale: of the affinities.

    Returns:
        ``[B, H, W, C]``.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import context_mixing
        >>> q, k = torch.randn(1, 14, 14, 2, 8), torch.randn(1, 49, 2, 8)
        >>> proj = torch.nn.Conv2d(49, 7 * 7 + 5 * 5, 1)
        >>> tables = torch.zeros(2, 13, 13), torch.zeros(2, 9, 9)
        >>> context_mixing(q, k, torch.randn(1, 14, 14, 32), proj, tables, 8**-0.5).shape
        torch.Size([1, 14, 14, 32])
    """
    H, W, heads = q.shape[1:4]
    sizes = [(operator.index(table.shape[-1]) + 1) // 2 for table in tables]  # ints, also under torch.jit.trace
    q = q.permute(0, 3, 1, 2, 4).flatten(2, 3)  # B heads HW D
    k = (scale * k).permute(0, 2, 3, 1)  # B heads D S
    shares = v.unflatten(-1, (len(tables), heads, -1)).unbind(3)
    areas = [size * size for size in sizes]
    biases: Sequence[torch.Tensor | None]
    if is_plain(proj) and proj.bias is not None:
        kernels = proj.weight.flatten(1).split(areas)  # K*K S
        maps = [(q @ (k @ kernel.t())).unflatten(2, (H, W)).permute(0, 2, 3, 1, 4) for kernel in kernels]
        biases = proj.bias.split(areas)
    else:
        affinities = (k.mT @ q.mT).flatten(0, 1).unflatten(2, (H, W))  # B*heads S H W
        maps = proj(affinities).unflatten(0, (-1, heads)).permute(0, 3, 4, 1, 2).split(areas, -1)
        biases = [None] * len(sizes)
    mixed = []
    for size, table, logits, bias, share in zip(sizes, tables, maps, biases, shares, strict=True):  # B H W heads K*K
        table = RelativePositionBias(table)
        mixed.append(neighborhood_mix(logits, share, kernel_size=size, bias=table, kernel_bias=bias))
    return torch.stack(mixed, dim=3).flatten(3)


# ---- convolutions of channels-last maps


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


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 and BatchNorm; an odd length is rounded up."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(to_nchw(x))).permute(0, 2, 3, 1)


# ---- attention that decays with the distance

MASK_ENTRIES = 2**23  # of a decay mask that is made at once, 32 MB in float32


class ManhattanAttention2d(nn.Module):
    """Manhattan self-attention (RMT, arXiv:2309.11523, section 3), with a 5x5 depthwise convolution of the values.

    Head h adds ``log(1 - 2^(-initial_value - heads_range * h / num_heads))`` to the logits for every step of distance.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``, into heads of an even number of channels.
        axes: ``"both"`` or ``"each"``, see `decayed_attention`.
        initial_value: the larger, the slower the decay of all heads.
        heads_range: the larger, the slower the decay of the last heads.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import ManhattanAttention2d
        >>> attention = ManhattanAttention2d(dim=64, num_heads=4, axes="each")
        >>> attention(torch.randn(1, 14, 20, 64)).shape
        torch.Size([1, 14, 20, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, axes: str, initial_value: float = 2.0, heads_range: float = 4.0
    ) -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"dim {dim} is not divisible by twice the num_heads {num_heads}")
        if axes not in ("both", "each"):
            raise ValueError(f'axes must be "both" or "each", got {axes!r}')
        self.num_heads = num_heads
        self.axes = axes
        # not a buffer: half precision would round it
        power = -initial_value - heads_range * np.arange(num_heads, dtype=np.float32) / num_heads
        self.decay: tuple[float, ...] = tuple(np.log(1 - np.exp2(power, dtype=np.float32)).tolist())
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.lepe = DepthwiseConv(dim, 5)
        self.out_proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"axes={self.axes}, num_heads={self.num_heads}, decay={self.decay[0]:.3f} to {self.decay[-1]:.3f}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        v = linear(self.v_proj, x)
        q, k, values = (
            t.unflatten(-1, (self.num_heads, -1)) for t in (linear(self.q_proj, x), linear(self.k_proj, x), v)
        )
        y = decayed_attention(rotate_by_index(q), rotate_by_index(k), values, self.decay, self.axes)
        return linear(self.out_proj, y.flatten(3) + self.lepe(v))


@without_size_guards
def rotate_by_index(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``x`` ``[B, H, W, heads, D]`` by the row-major index of a position in its map (RMT).

    The pair of channels (2i, 2i + 1) turns by ``index * 10000^(-i / (D / 2 - 1))``: the last pair by 1/10000 of the
    index. So it depends on the width of the map. Computed in float32 for every dtype: half precision has no exact
    integers above 2048 (bfloat16: 256).
    """
    H, W = x.shape[1:3]
    cos, sin = CONSTANTS.get(_rotation, H, W, x.shape[-1], x.device)
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, 2).unflatten(-1, (-1, 2))  # Core ML: rank 5
    even, odd = pairs.unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return pairs.flatten(-2).unflatten(1, (H, W)).to(x.dtype)


def _rotation(height: int, width: int, depth: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``[height * width, 1, depth / 2]``, rounded as in the authors' code."""
    index = torch.arange(height * width, device=device).float()
    speed = 1.0 / 10000 ** torch.linspace(0, 1, depth // 2, device=device)
    angle = (index[:, None] * speed)[:, None]
    return angle.cos(), angle.sin()


@without_size_guards
def decayed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: Sequence[float], axes: str
) -> torch.Tensor:
    """Attention whose logits decrease linearly with the distance from query to key (RMT, arXiv 2309.11523, section 3).

    Equals `neighborhood_attention` with the whole axis or map as window and ``decay * distance`` as bias, but runs on
    PyTorch's ``scaled_dot_product_attention``, since tiles do not help with such windows. On large maps, queries are
    processed in chunks of rows, whose masks have at most `MASK_ENTRIES` values and are recomputed in the backward pass;
    exports of a dynamic shape use a single chunk.

    Args:
        q, k, v: ``[B, H, W, heads, D]``.
        decay: added to the logits per step of distance, for each head; negative.
        axes: ``"both"``: attention to the whole map, with the Manhattan distance. ``"each"``: along rows, then along
            columns with the first output as values.

    Returns:
        ``[B, H, W, heads, D]``.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import decayed_attention
        >>> q = torch.randn(1, 14, 20, 2, 32)
        >>> decayed_attention(q, q, q, decay=(-0.3, -0.1), axes="each").shape
        torch.Size([1, 14, 20, 2, 32])
    """
    H, W = q.shape[1:3]
    decay = tuple(decay)
    rows, columns = (CONSTANTS.get(_decay_mask, length, decay, q.device) for length in (H, W))
    if axes == "each":
        batch = -1 if torch.jit.is_tracing() else q.shape[0]  # which torch.jit.trace would record
        v = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), columns).unflatten(0, (batch, H))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), rows).unflatten(0, (batch, W)).transpose(1, 2)
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    step = None if is_dynamic(H, W) else MASK_ENTRIES // (len(decay) * H * W * W)
    return _in_chunks(_attend_chunk, step, (q, rows), k, v, columns)


def _in_chunks(
    function: Callable, step: int | None, split: Sequence[torch.Tensor], *whole: torch.Tensor
) -> torch.Tensor:
    """``function(*split, *whole)`` in chunks of ``step`` (at least 1; None: one chunk) along the dimension 1 of
    ``split`` and of the result, which are recomputed in the backward pass."""
    if step is None or step >= split[0].shape[1]:
        return function(*split, *whole)
    again = torch.is_grad_enabled() and not transformed() and not torch.jit.is_tracing()
    run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False) if again else function
    chunks = zip(*(x.split(max(1, step), 1) for x in split), strict=True)
    return torch.cat([run(*parts, *whole) for parts in chunks], 1)


def _decay_mask(length: int, decay: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """``decay * |i - j|`` ``[heads, length, length]`` in float32."""
    at = torch.arange(length, device=device)
    return torch.tensor(decay, device=device)[:, None, None] * (at[:, None] - at).abs()


def _attend_chunk(
    q: torch.Tensor, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Some rows of queries ``[B, h, W, heads, D]`` on all keys ``[B, H * W, heads, D]``. ``rows`` ``[heads, h, H]`` and
    ``columns`` ``[heads, W, W]`` are added to the logits."""
    mask = rows[:, :, None, :, None] + columns[:, None, :, None]
    return attend(q.flatten(1, 2), k, v, mask.flatten(3).flatten(1, 2)).unflatten(1, q.shape[1:3])


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Attention of ``[B, N, heads, D]`` to ``[B, M, heads, D]``. A mask ``[heads, N, M]`` in float32 is added to the
    logits and not copied for each image. ``scale`` is ``D ** -0.5`` unless given."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    # exporters decompose SDPA with guards, and it has no forward-mode derivative and no batching rules
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or transformed():
        working = torch.promote_types(q.dtype, torch.float32)
        # contiguous tensors, for others of which exporters guard on a single position
        q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k.transpose(-1, -2), v))
        logits = (q.to(working) * factor) @ k.to(working)
        out = (logits if mask is None else logits + mask).softmax(-1).to(v.dtype) @ v
        return out.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    added = None if mask is None else mask.to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=factor).transpose(1, 2)


# ---- attention of super tokens


class TokenAttention2d(nn.Module):
    """Multi-head attention over the whole map, without position bias; q, k and v of a head are next to each other in
    the output of ``qkv``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        return linear(self.proj, _attend_tokens(linear(self.qkv, x), self.num_heads))


@without_size_guards
def _attend_tokens(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (num_heads, 3, -1)).unbind(3)
    return attend(q, k, v).flatten(2).unflatten(1, qkv.shape[1:3])


class SuperTokenAttention2d(nn.Module):
    """Super token attention (STViT, arXiv:2211.11167, section 3.2), with one iteration of sampling.

    The map is divided into cells of ``token_size`` positions, with a super token each. Every position is associated
    with the super tokens of the 3x3 cells around it, by a softmax over their similarities (`associate`). Super tokens
    become the average of their positions, attend to each other, and every position gets the sum of its nine. No
    gradient flows through the association, as in the authors' training. The map is zero-padded to whole cells at the
    right and the bottom; padding is not masked, as there.

    Args:
        dim: channels.
        num_heads: heads of the attention between super tokens; must divide ``dim``.
        token_size: rows and columns of a cell; 1: plain attention over all positions.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import SuperTokenAttention2d
        >>> attention = SuperTokenAttention2d(dim=64, num_heads=2, token_size=8)
        >>> attention(torch.randn(1, 28, 36, 64)).shape
        torch.Size([1, 28, 36, 64])
    """

    def __init__(self, dim: int, num_heads: int, token_size: int) -> None:
        super().__init__()
        if not isinstance(token_size, (int, np.integer)) or token_size < 1:
            raise ValueError(f"token_size must be an int of at least 1, got {token_size!r}")
        self.token_size = int(token_size)
        self.stoken_refine = TokenAttention2d(dim, num_heads)

    def extra_repr(self) -> str:
        return f"token_size={self.token_size}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        if self.token_size == 1:
            return self.stoken_refine(x)
        return _attend_super_tokens(x, self.token_size, self.stoken_refine)


@without_size_guards
def _attend_super_tokens(x: torch.Tensor, size: int, refine: nn.Module) -> torch.Tensor:
    pixels = _to_cells(x, size)
    weights = associate(pixels)
    tokens = refine(_sample(pixels, weights))
    return _from_cells(weights.to(tokens.dtype) @ _neighbors(tokens), size, _sizes(x)[1:3])


def _padded(x: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, H, W, C]`` with zeros at the right and the bottom up to multiples of ``size``."""
    H, W = _sizes(x)[1:3]
    # of positive numbers: ONNX rounds others to zero
    bottom, right = ((length + size - 1) // size * size - length for length in (H, W))
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if is_dynamic(H, W) or bottom or right else x


def _to_cells(x: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, H, W, C]`` to zero-padded cells of ``size`` rows and columns, ``[B, h, w, size * size, C]``."""
    x = _padded(x, size)
    x = x.unflatten(1, (x.shape[1] // size, size)).unflatten(3, (x.shape[2] // size, size)).transpose(2, 3)
    # flatten would make exporters guard on the number of cells
    return x.clone(memory_format=torch.contiguous_format).flatten(3, 4)


def _from_cells(x: torch.Tensor, size: int, shape: tuple[int, int]) -> torch.Tensor:
    """Cells ``[B, h, w, size * size, C]`` to ``[B, *shape, C]``, without the padding."""
    x = x.unflatten(3, (size, size)).transpose(2, 3).clone(memory_format=torch.contiguous_format)
    x = x.flatten(3, 4).flatten(1, 2)
    if not is_dynamic(*shape):
        return x[:, : shape[0], : shape[1]]
    row, column = (torch.arange(length, device=x.device) for length in shape)  # exporters do not know a slice's length
    return x.index_select(1, row).index_select(2, column)


def associate(pixels: torch.Tensor) -> torch.Tensor:
    """Weights of the super tokens of the 3x3 cells around each position, row by row; without gradient.

    The logits are products with the averages of the cells, divided by ``C ** 0.5``; cells outside the map count as
    zeros, and so have a weight.

    Args:
        pixels: ``[B, h, w, P, C]``, the P positions of each of h x w cells.

    Returns:
        ``[B, h, w, P, 9]``, at least in float32.
    """
    pixels = pixels.detach()
    logits = pixels @ (_neighbors(pixels.mean(3)) * pixels.shape[-1] ** -0.5).transpose(-1, -2)
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _sample(pixels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The super tokens ``[B, h, w, C]``: averages of the positions ``[B, h, w, P, C]`` around with their weights."""
    tokens = _add_neighbors(weights.to(pixels.dtype).transpose(-1, -2) @ pixels)
    total = _add_neighbors(weights.sum(3)[..., None])
    return (tokens / (total + 1e-12)).to(pixels.dtype)


def _neighbors(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens ``[B, h, w, C]`` of the 3x3 cells around each, zeros outside the map: ``[B, h, w, 9, C]``."""
    h, w = tokens.shape[1:3]
    padded = F.pad(tokens, (0, 0, 1, 1, 1, 1))
    rows = torch.stack([padded[:, i : i + h] for i in range(3)], 3)
    return torch.stack([rows[:, :, i : i + w] for i in range(3)], 4).flatten(3, 4)


def _add_neighbors(parts: torch.Tensor) -> torch.Tensor:
    """The transpose of `_neighbors`: adds nine parts ``[B, h, w, 9, C]`` to the cells around: ``[B, h, w, C]``."""
    h, w = parts.shape[1:3]
    rows = _add_overlapping(parts.unflatten(3, (3, 3)).unbind(4))[:, :, 1 : 1 + w].unbind(3)
    return _add_overlapping(rows)[:, 1 : 1 + h]


def _add_overlapping(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of three tensors, each one position after the previous along the third axis from the end."""
    before, at, after = parts
    return F.pad(before, (0, 0, 0, 0, 0, 2)) + F.pad(at, (0, 0, 0, 0, 1, 1)) + F.pad(after, (0, 0, 0, 0, 2, 0))


# ---- attention to tokens that are merged by their significance


class LocallyEnhancedAttention2d(nn.Module):
    """Base of SG-Former's attentions, which add a 3x3 depthwise convolution of their input and project the sum.

    ``forward`` takes a map ``[B, H, W, dim]`` and the significance of its positions, ``[B, H, W]`` or None, and returns
    both.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.lepe_linear = nn.Linear(dim, dim)
        self.lepe_conv = DepthwiseConv(dim, 3)
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def _projected(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The sum of the heads' outputs ``y`` and the convolution of ``x``, both ``[B, H, W, dim]``."""
        return linear(self.proj, y + self.lepe_conv(linear(self.lepe_linear, x)))


class SelfAttention2d(LocallyEnhancedAttention2d):
    """Attention over the whole map, without position bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)

    @fx_leaf
    def forward(self, x: torch.Tensor, significance: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        q = linear(self.q, x).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        k, v = linear(self.kv, x).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self._projected(attend(q, k, v).flatten(2).unflatten(1, x.shape[1:3]), x), None


class HybridAttention2d(LocallyEnhancedAttention2d):
    """Attention to a map that is reduced by a strided convolution in the first half of the heads, inside windows in the
    second half (SG-Former, arXiv:2308.12216, section 3.2).

    The significance of a position is the attention that it receives on average over heads and queries: in its window,
    plus on the reduced map. It has no gradient and is float32 or wider. At the right and the bottom, the convolution
    takes zeros as positions outside the map; windows are cut off.

    Args:
        dim: channels.
        num_heads: heads, an even number that divides ``dim``.
        ratio: kernel size and stride of the reduction.
        window_size: rows and columns of a window.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import HybridAttention2d
        >>> attention = HybridAttention2d(dim=64, num_heads=2, ratio=8)
        >>> y, significance = attention(torch.randn(1, 56, 60, 64))
        >>> y.shape, significance.shape
        (torch.Size([1, 56, 60, 64]), torch.Size([1, 56, 60]))
    """

    def __init__(self, dim: int, num_heads: int, ratio: int, window_size: int = 7) -> None:
        super().__init__(dim, num_heads)
        if num_heads % 2:
            raise ValueError(f"num_heads must be even, got {num_heads}")
        self.ratio, self.window_size = ratio, window_size
        self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim)
        self.q1 = nn.Linear(dim, dim // 2)
        self.kv1 = nn.Linear(dim, dim)
        self.q2 = nn.Linear(dim, dim // 2)
        self.kv2 = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}, window_size={self.window_size}"

    @fx_leaf
    @without_size_guards
    def forward(self, x: torch.Tensor, significance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        coarse, of_reduced = self._reduced(x)
        fine, of_windows = self._windows(x)
        return self._projected(torch.cat([coarse, fine], -1), x), of_reduced + of_windows

    def _reduced(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (H, W), heads = _sizes(x)[1:3], self.num_heads // 2
        reduced = to_nhwc(self.sr(to_nchw(_padded(x, self.ratio))))
        size = reduced.shape[1:3]
        reduced = linear(self.kv1, F.gelu(self.norm(reduced.flatten(1, 2))))
        k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in reduced.chunk(2, -1))
        y, received = _weighed(linear(self.q1, x).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2), k, v)
        row, column = (torch.arange(length, device=x.device) // self.ratio for length in (H, W))
        received = received.unflatten(1, size).index_select(1, row).index_select(2, column)
        return y.transpose(1, 2).flatten(2).unflatten(1, (H, W)), received

    def _windows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (H, W), heads, size = _sizes(x)[1:3], self.num_heads // 2, self.window_size
        qkv = _to_cells(torch.cat([linear(self.q2, x), linear(self.kv2, x)], -1), size)
        q, k, v = qkv.unflatten(-1, (3 * heads, -1)).transpose(3, 4).chunk(3, 3)
        padded = is_dynamic(H, W) or H % size or W % size
        inside = _to_cells(x.new_ones(1, H, W, 1), size)[:, :, :, None] if padded else None
        y, received = _weighed(q, k, v, inside)
        y, received = (_from_cells(t, size, (H, W)) for t in (y.transpose(3, 4).flatten(4), received[..., None]))
        return y, received.squeeze(-1)


def _weighed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inside: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``[..., heads, N, D]`` to ``[..., heads, M, D]``, and the mean of the weights of each key over heads
    and queries, ``[..., M]``. With padding, ``inside`` ``[..., 1, N, 1]`` is 0 there and 1 elsewhere, and N = M."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if inside is not None:
        logits = logits.masked_fill(inside.transpose(-1, -2) == 0, -torch.inf)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    y, weights = weights.to(v.dtype) @ v, weights.detach()
    if inside is None:
        return y, weights.mean((-3, -2))
    return y, (weights * inside).sum((-3, -2)) / (inside.sum((-3, -2)) * q.shape[-3])


class GuidedAttention2d(LocallyEnhancedAttention2d):
    """Attention to tokens that are merged from positions of similar significance (SG-Former, arXiv:2308.12216, section
    3.3).

    Args:
        dim: channels.
        num_heads: heads, an even number that divides ``dim``. The two halves have keys and values of their own.
        lengths: how many positions are merged to a token, the least significant first: three numbers, for the first
            quarter, the half in the middle and the last quarter of the positions, or two, for a half each.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import GuidedAttention2d
        >>> attention = GuidedAttention2d(dim=64, num_heads=2, lengths=(196, 56, 28))
        >>> y, _ = attention(torch.randn(1, 56, 60, 64), torch.rand(1, 56, 60))
        >>> y.shape
        torch.Size([1, 56, 60, 64])
    """

    def __init__(self, dim: int, num_heads: int, lengths: Sequence[int]) -> None:
        super().__init__(dim, num_heads)
        if num_heads % 2:
            raise ValueError(f"num_heads must be even, got {num_heads}")
        if len(lengths) not in _PARTS:
            raise ValueError(f"lengths must be two or three numbers, got {lengths}")
        self.lengths = tuple(lengths)
        self.merge = nn.ModuleList(nn.Linear(length, 1) for length in lengths)
        self.q = nn.Linear(dim, dim)
        self.kv1 = nn.Linear(dim, dim)
        self.kv2 = nn.Linear(dim, dim)

    @fx_leaf
    @without_size_guards
    def forward(self, x: torch.Tensor, significance: torch.Tensor) -> tuple[torch.Tensor, None]:
        tokens = self._merged(x.flatten(1, 2), significance.flatten(1).argsort(1))
        # the authors make the tokens for kv2 of a map in column order, which is the same order by significance
        k, v = torch.stack([linear(self.kv1, tokens), linear(self.kv2, tokens)], 2).chunk(2, -1)
        k, v = (each.unflatten(-1, (self.num_heads // 2, -1)).flatten(2, 3) for each in (k, v))
        q = linear(self.q, x).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        return self._projected(attend(q, k, v).flatten(2).unflatten(1, x.shape[1:3]), x), None

    def _merged(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Positions ``[B, N, C]``, and their numbers by significance ``[B, N]``, to tokens ``[B, M, C]``."""
        tokens = []
        for part, length, layer in zip(_PARTS[len(self.lengths)], self.lengths, self.merge, strict=True):
            chosen = order[:, merge_ranks(order.shape[1], part, length, order.device)]
            group = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))
            group = group.unflatten(1, (group.shape[1] // length, length))
            tokens.append(layer(group.transpose(2, 3)).squeeze(-1))
        return torch.cat(tokens, 1)


_PARTS = {2: ((0, 1, 2), (1, 2, 2)), 3: ((0, 1, 4), (1, 3, 4), (3, 4, 4))}  # first, last, of how many


def merge_ranks(count: int, part: tuple[int, int, int], length: int, device: torch.device) -> torch.Tensor:
    """The ranks to merge, ``[groups * length]``, of a part of ``count`` positions.

    Ranks are evenly spread over as many groups as the part needs: where it does not fill them, some occur twice.

    Args:
        count: positions.
        part: (first, last, whole): from ``first / whole`` of the positions to ``last / whole``, rounded outwards.
        length: ranks of a group.
        device: of the result.
    """
    first, last = count * part[0] // part[2], (count * part[1] + part[2] - 1) // part[2]
    total = (last - first + length - 1) // length * length
    at, excess = torch.arange(total, device=device), total - (last - first)
    # first + at * (last - first) // total without large products, which OpenVINO computes in 32 bits
    return first + at - torch.div(at * excess + (total - 1), total, rounding_mode="floor")


# ---- attention to a neighborhood and a pooled map

BIASES = 2**21  # position biases that are expanded at once, 8 MB in float32


class AggregatedAttention2d(nn.Module):
    """Pixel-focused and aggregated attention (TransNeXt, arXiv:2311.17132, sections 3.1 to 3.3).

    One softmax over the cosine similarities to the 3x3 neighborhood and to an average-pooled map, each with a position
    bias, times a temperature and the logarithm of the number of keys. Then a learned linear function of the query is
    added to the weights of the neighborhood. With ``reduction`` 1, the keys are all positions of the map alone.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``.
        reduction: sides of the map, relative to the pooled one, whose sides are rounded down, but at least 1.
        base_size: of `LogPositionBias`.
        bias_size: likewise, in positions of this map.
        gates: a module from the input to factors of the heads' outputs, ``[B, H, W, heads]``, or None.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import AggregatedAttention2d
        >>> attention = AggregatedAttention2d(dim=48, num_heads=2, reduction=8, base_size=56)
        >>> attention(torch.randn(1, 28, 45, 48)).shape
        torch.Size([1, 28, 45, 48])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int,
        base_size: int,
        bias_size: int | None = None,
        gates: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.reduction = num_heads, reduction
        depth = dim // num_heads
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, depth).normal_(std=0.02))
        if reduction > 1:
            self.q = nn.Linear(dim, dim)
            self.kv = nn.Linear(dim, 2 * dim)  # of the map and of the pooled one
            self.sr = nn.Conv2d(dim, dim, 1)
            self.norm = nn.LayerNorm(dim)
            self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, 9).normal_(std=0.0004))
            self.learnable_tokens = nn.Parameter(torch.empty(num_heads, depth, 9).normal_(std=0.02))
            self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, 9))
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.cpb = LogPositionBias(num_heads, base_size, bias_size, reduction)
        self.gates = gates
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}, num_heads={self.num_heads}"

    @fx_leaf
    @without_size_guards
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        if self.reduction == 1:
            q, k, v = linear(self.qkv, x).unflatten(-1, (3, *heads)).unbind(3)
            q = _unit(q)
            y, _ = self._attend(q, k, v)
        else:
            q = _unit(linear(self.q, x).unflatten(-1, heads))
            k, v = linear(self.kv, x).unflatten(-1, (2, *heads)).unbind(3)
            pooled_k, pooled_v = self.kv(self._pool(x)).unflatten(-1, (2, *heads)).unbind(3)
            y, weights = self._attend(q, pooled_k, pooled_v, k)
            assert weights is not None  # of the neighbors, which are given
            learned = torch.einsum("bhwnd,ndk->bhwnk", q.to(v.dtype), self.learnable_tokens) + self.learnable_bias[:, 0]
            y = y + neighborhood_aggregate((weights + learned).to(v.dtype), v, kernel_size=3, boundary="zero")
        if self.gates is not None:
            y = y * self.gates(x)[..., None].to(y.dtype)
        return linear(self.proj, y.flatten(3))

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """Features of the pooled map, ``[B, h, w, dim]``."""
        _, H, W, _ = _sizes(x)
        y = F.gelu(self.sr(to_nchw(x)))
        free = is_dynamic(H, W)
        size: Any = tuple((torch.sym_max if free else max)(1, length // self.reduction) for length in (H, W))
        exact = free or torch.jit.is_tracing()  # the older exporter knows fixed sizes alone
        y = average_pool(y, size) if exact else F.adaptive_avg_pool2d(y, size)
        return self.norm(y.permute(0, 2, 3, 1))

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, neighbors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output for unit queries ``[B, H, W, heads, D]`` on a map ``[B, h, w, heads, D]``, and the weights of the
        ``neighbors`` (keys) in the softmax, ``[B, H, W, heads, 9]``."""
        H, W = _sizes(q[..., 0])[1:3]
        h, w = _sizes(k[..., 0])[1:3]
        bias = self.cpb((H, W), (h, w), v)
        count, logits = torch.full((), h * w, dtype=q.dtype, device=q.device), None
        if neighbors is not None:
            inside = CONSTANTS.get(_inside_map, H, W, q.device)
            count = (count + inside.sum(-1))[..., None, None]
        temperature = F.softplus(self.temperature[:, 0].to(q.dtype)) * count.log()
        q = (q + self.query_embedding[:, 0]) * temperature
        if neighbors is None:
            return _attend_pooled(q.to(v.dtype), _unit(k).to(v.dtype), v, *bias), None
        with without_autocast(q):  # logits of half precision are too coarse
            logits = neighborhood_logits(q, _unit(neighbors), kernel_size=3, boundary="zero")
        logits = (logits + self.relative_pos_bias_local).masked_fill(~inside[:, :, None], -math.inf)
        extra = logits.logsumexp(-1)
        y = _attend_pooled(q.to(v.dtype), _unit(k).to(v.dtype), v, *bias, extra)
        depth = v.shape[-1]
        return y[..., :depth], logits.softmax(-1) * y[..., depth : depth + 1]


class LogPositionBias(nn.Module):
    """Position bias of keys that are means of a map: an MLP of the logarithm of their offset from the query
    (TransNeXt, arXiv:2311.17132, section 3.3).

    It is computed once for each offset between rows and between columns, in eval once for each size of the map.

    Args:
        num_heads: heads.
        base_size: side of the map in training, the unit of the offsets.
        bias_size: None: offsets count in maps of all sizes as in training. A side: the bias of a square map of this
            side is interpolated to others, as in the authors' detectors and segmenters.
        reduction: of `AggregatedAttention2d`, for the keys of this square map.
    """

    def __init__(self, num_heads: int, base_size: int, bias_size: int | None, reduction: int) -> None:
        super().__init__()
        self.base_size, self.bias_size, self.reduction = base_size, bias_size, reduction
        self.fc1 = nn.Linear(2, 512)
        self.fc2 = nn.Linear(512, num_heads)
        self.cache = TensorCache()

    def extra_repr(self) -> str:
        return f"base_size={self.base_size}, bias_size={self.bias_size}"

    def forward(
        self, size: tuple[int, int], pooled: tuple[int, int], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For a map of ``size`` (H, W) and its ``pooled`` one (h, w), on the device and in the dtype of ``like``: the
        bias of all row offsets ``[heads, offsets, W * w]``, and index and weight of these offsets by rows, ``[terms, H,
        h]`` each, for `_take_biases`."""
        layers, device = (self.fc1, self.fc2), like.device
        axes = list(zip(size, pooled, strict=True))
        square = None if self.bias_size is None else (self.bias_size, max(1, self.bias_size // self.reduction))
        maps = axes if square is None else [square, square]
        rows, columns = (_offsets(*each) for each in maps)
        if all(is_plain(layer) for layer in layers):
            source = torch.cat([p.flatten() for layer in layers for p in (layer.weight, layer.bias)])
            table = self.cache.get(_bias_table, self.fc2.out_features, rows, columns, self.base_size, source=source)
        else:
            y, x = (_log_offsets(each, self.base_size, device) for each in (rows, columns))
            grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).to(like.dtype)
            table = self.fc2(F.relu(self.fc1(grid))).permute(2, 0, 1)
        of_rows, of_columns = (
            CONSTANTS.get(_bias_terms, axis, square, offsets, device)
            for axis, offsets in zip(axes, (rows, columns), strict=True)
        )
        return _take_biases(table, 2, *of_columns), *of_rows


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _inside_map(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Whether the positions of the 3x3 neighborhoods are inside a map, ``[height, width, 9]``."""
    inside = []
    for length in (height, width):
        at = torch.arange(length, device=device)[:, None] + torch.arange(-1, 2, device=device)
        inside.append((at >= 0) & (at < length))
    return (inside[0][:, None, :, None] & inside[1][:, None, :]).flatten(2)


def _offsets(length: int, pooled: int) -> tuple[int, int, int]:
    """The offsets from the centres of adaptive pooling's bins to positions, as a range of half steps."""
    if is_dynamic(length):  # all that may occur: exporters fail on the division in the bounds
        return 2 - 2 * length, 2 * length - 1, 1
    first, last = -(-length // pooled) - 1, (pooled - 1) * length // pooled + length - 1  # twice the outer centres
    return -last, 2 * (length - 1) - first + 1, 1 if length % pooled else 2  # equal bins: every second half step


def _log_offsets(
    offsets: tuple[int, int, int], base_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    steps = torch.arange(*offsets, dtype=dtype, device=device) * (4 / max(1, base_size - 1))
    return steps.sign() * (1 + steps.abs()).log2() / 3


def _bias_table(
    source: torch.Tensor, heads: int, rows: tuple[int, int, int], columns: tuple[int, int, int], base_size: int
) -> torch.Tensor:
    """``[heads, row offsets, column offsets]`` by the parameters of both layers in a row, in float32 at least."""
    source = source.to(torch.promote_types(source.dtype, torch.float32))
    hidden = (source.shape[0] - heads) // (3 + heads)
    weight, bias, *second = source.split([2 * hidden, hidden, heads * hidden, heads])
    y, x = (_log_offsets(each, base_size, source.device, source.dtype)[:, None] for each in (rows, columns))
    y, x = y * weight[0::2], x * weight[1::2] + bias
    step = None if is_dynamic(*rows, *columns) else BIASES // (x.shape[0] * hidden)
    with without_autocast(source):
        return _in_chunks(_bias_rows, step, (y[None],), x, second[0].view(heads, hidden), second[1])


def _bias_rows(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The second layer on sums of ``y`` ``[1, r, hidden]`` and ``x`` ``[columns, hidden]``, ``[heads, r, columns]``."""
    return F.linear(F.relu(y[0, :, None] + x), weight, bias).permute(2, 0, 1)


def _bias_terms(
    axis: tuple[int, int], square: tuple[int, int] | None, offsets: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index among the ``offsets``, and weight, of the terms of the bias of an axis (length L, pooled l), ``[terms, L,
    l]`` each: one, or the four between which that of a ``square`` map is interpolated, over its keys and queries."""
    length, pooled = axis if square is None else square
    number = torch.arange(pooled, device=device)
    start = torch.div(number * length, pooled, rounding_mode="floor")
    stop = torch.div((number + 1) * length + (pooled - 1), pooled, rounding_mode="floor")
    at = 2 * torch.arange(length, device=device)[:, None]
    index = torch.div(at - (start + stop - 1) - offsets[0], offsets[2], rounding_mode="floor")
    if square is None:
        return index[None], torch.ones_like(index[None], dtype=torch.float32)
    queries, keys = (_linear(source, target, device) for source, target in zip(square, axis, strict=True))
    terms = list(itertools.product(queries, keys))
    return (
        torch.stack([index[query][:, key] for (query, _), (key, _) in terms]),
        torch.stack([query[:, None] * key for (_, query), (_, key) in terms]),
    )


def _linear(source: int, target: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two positions, and their weights, of linear interpolation as in ``F.interpolate``, ``[target]`` each."""
    scale = torch.full((), source, dtype=torch.float32, device=device) / target
    at = ((torch.arange(target, device=device) + 0.5) * scale - 0.5).clamp(min=0)
    lower = at.floor().clamp(max=source - 1)
    weight = at - lower
    return [(lower.long(), 1 - weight), ((lower + 1).clamp(max=source - 1).long(), weight)]


def _take_biases(table: torch.Tensor, dim: int, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum of weighted terms ``[terms, L, l]`` of a table along ``dim``, which becomes ``L * l``."""
    parts = [table.index_select(dim, each.flatten()) for each in index.unbind()]
    if len(parts) == 1:
        return parts[0]
    shape = (-1, *[1] * (table.ndim - 1 - dim))
    weighted = [part * each.view(shape).to(part.dtype) for part, each in zip(parts, weight.flatten(1), strict=True)]
    return weighted[0] + weighted[1] + (weighted[2] + weighted[3])


@without_size_guards
def _attend_pooled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    columns: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of ``[B, H, W, heads, D]`` to a pooled map ``[B, h, w, heads, D]``, without scaling, with a position
    bias from `LogPositionBias`.

    ``extra`` are the logits ``[B, H, W, heads]`` of one more key with value 0, whose weight is an additional channel of
    the output (the others are padding). It is a dot product, too: of two channels for half precision, whose sum it is.
    """
    _, H, W, heads, depth = q.shape
    if is_dynamic(H, W):  # flattening a part of a tensor leaves guards on lengths of 1
        q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    if extra is not None:
        more = 2 + -(depth + 2) % 8
        high = extra.to(q.dtype)
        q = F.pad(torch.cat([q, torch.stack([high, (extra - high).to(q.dtype)], -1)], -1), (0, more - 2))
        channel = torch.arange(depth + more, device=q.device) - depth
        zeros = F.pad(q[:, 0, :1, :, :0], (0, depth + more))  # the older ONNX exporter would record a batch of others
        k, v = (
            torch.cat([F.pad(x, (0, more)), zeros + ((channel >= 0) & (channel < ones))], 1)
            for x, ones in ((k, 2), (v, 1))
        )
    step = None if is_dynamic(H, W) else BIASES // (heads * W * k.shape[1])
    return _in_chunks(_attend_pooled_chunk, step, (q, index, weight), k, v, columns)


def _attend_pooled_chunk(
    q: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor:
    """Some rows of queries ``[B, r, W, heads, D]`` on all keys ``[B, h * w (+ 1), heads, D]``."""
    bias = _take_biases(columns, 1, index, weight)  # heads r*h W*w
    bias = bias.unflatten(1, index.shape[1:]).unflatten(3, (q.shape[2], -1)).permute(0, 1, 3, 2, 4)
    if is_dynamic(*q.shape[1:3]):  # as above
        bias = bias.clone(memory_format=torch.contiguous_format)
    bias = bias.flatten(3).flatten(1, 2)  # heads r*W h*w
    bias = F.pad(bias, (0, k.shape[1] - bias.shape[2]))
    return attend(q.flatten(1, 2), k, v, bias, scale=1.0).unflatten(1, q.shape[1:3])
