"""Attention inside windows and grids, with a table of position biases (MaxViT, AsCAN, Swin)."""

from __future__ import annotations

import bisect
import itertools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels import RelativePositionBias, TensorCache, neighborhood_attention
from ...kernels.tracing import is_dynamic
from ..layers import fx_leaf, linear, refuse_scripting
from .maps import map_sizes


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


def table_by_key(table: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Swin's table ``[(2h - 1) * (2w - 1), heads]``, by query - key, as ``[heads, 2h - 1, 2w - 1]`` by key - query."""
    rows, columns = (2 * length - 1 for length in size)
    return table.view(rows, columns, -1).flip(0, 1).permute(2, 0, 1)


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
        B, H, W, C = map_sizes(x)
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


class ShiftedWindowAttention2d(PartitionAttention2d):
    """Multi-head attention inside windows that may be shifted, with relative position bias (Swin, arXiv:2103.14030,
    section 3.2).

    A map is zero-padded to whole windows at the right and the bottom before the qkv projection. Padding is not masked,
    as in the authors' detectors. An axis that fits into one window is not shifted.

    Args:
        dim: channels C.
        num_heads: heads; must divide ``dim``.
        window_size: rows and columns of a window.
        shift: where the first whole window starts, on both axes; 0 for windows that are not shifted.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import ShiftedWindowAttention2d
        >>> attention = ShiftedWindowAttention2d(dim=64, num_heads=2, window_size=7, shift=3)
        >>> attention(torch.randn(1, 16, 20, 64)).shape
        torch.Size([1, 16, 20, 64])
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int = 0) -> None:
        super().__init__(dim, num_heads, (window_size, window_size), "block")
        if not 0 <= shift < window_size:
            raise ValueError(f"shift must be from 0 to {window_size - 1} in windows of {window_size}, got {shift}")
        self.window_size, self.shift = window_size, shift

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift={self.shift}, num_heads={self.num_heads}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, C]`` to the same shape, for any H and W."""
        H, W = map_sizes(x)[1:3]
        (top, bottom, down), (left, right, across) = (self._axis(length) for length in (H, W))
        free = is_dynamic(H, W)
        if free or bottom or right:
            x = F.pad(x, (0, 0, left, right, top, bottom))
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        size = self.window_size, self.window_size
        assert self.rel_pos is not None  # of windows of a fixed size
        table, cache = self.rel_pos(size), self.rel_pos.cache
        y = window_attention(q, k, v, size, shift=(down, across), table=table, cache=cache, scale=self.scale)
        if free:  # exporters do not know a slice's length
            rows, columns = (torch.arange(length, device=x.device) for length in (H, W))
            y = y.index_select(1, rows + top).index_select(2, columns + left)
        elif bottom or right:
            y = y[:, :H, :W]
        return linear(self.proj, y)

    def _axis(self, length: int) -> tuple[int, int, int]:
        """Padding before and after an axis, and its shift."""
        count = (length + self.window_size - 1) // self.window_size
        after = count * self.window_size - length
        if is_dynamic(length):  # one graph for both cases: a map of one window is moved into the first whole one
            missing: Any = 2 - torch.sym_min(count, 2)
            return self.shift * missing, after, self.shift
        return 0, after, self.shift if count > 1 else 0


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
