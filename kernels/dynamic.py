"""Tiling of an axis of unknown length, shared by the ``dynamic`` backends of both operations.

A plan of ``kernels/tiling.py`` holds for one map size. Here only the side of a tile is a constant; the number of tiles,
their positions and the keys that their queries see are computed with tensor operations, so one traced graph works for
every size. Queries and keys are gathered into tiles, each tile is dense, and the outputs are gathered back.

Symbols as in ``kernels/tiling.py``; M and M2 count the tiles of all dilation groups, group by group.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .window import Window

TILE = 7  # minimum queries of a tile along an axis: what the plan for a fixed 224 uses on most maps of the zoo


class DynamicAxisTiling(NamedTuple):
    """Tiling of one axis of the map; the tensors are int64 or bool."""

    tile: int
    tiles: int  # an int or a SymInt
    span: int
    query_at: Tensor  # [M*T] row of the query map
    key_at: Tensor  # [M*S] row of the key map
    inside: Tensor  # [M*S] whether that row exists; otherwise ``key_at`` is clamped
    first: Tensor  # [M, T] start of the query's window in the span
    row: Tensor  # [M, T, S] row of the bias table, 2K - 1 for a key that the query does not see
    back: Tensor  # [h] index of the query's output among the M*T


def tile_of(window: Window) -> int:
    """Queries of a tile: whole stride groups."""
    together = window.stride // math.gcd(window.stride, window.query_stride)
    return -(-max(TILE, window.kernel_size) // together) * together


# Tilings in the current trace: the layers of a stage share them, which halves the graph.
_recorded: WeakKeyDictionary = WeakKeyDictionary()


def axis_tiling(window: Window, length: int, device: torch.device) -> DynamicAxisTiling:
    """Tiling of an axis of ``length`` positions, an int or a SymInt; nothing here guards on its value."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(length, torch.SymInt):
        return _axis_tiling(window, length, device)
    tilings = _recorded.setdefault(mode.tracer, {})
    key = window, length.node.expr, device
    if key not in tilings:
        tilings[key] = _axis_tiling(window, length, device)
    return tilings[key]


def _axis_tiling(window: Window, length: int, device: torch.device) -> DynamicAxisTiling:
    d, n, tile, ahead = window.dilation, window.query_stride, tile_of(window), window.ahead
    longest = window.group_length(length)  # of the first group; others are at most one shorter
    queries = window.queries(length)
    each = (window.queries(longest) + (ahead + tile - 1)) // tile  # tiles of a group; the first lacks ``ahead`` queries
    tiles = d * each
    # how far apart the windows of a tile's first and last query begin; a tile begins with a stride group
    span: Any = (tile - 1) * n // window.stride * window.stride + window.kernel_size
    if window.boundary != "zero":
        span = torch.sym_min(span, longest)  # positions outside the map are not needed

    end, per_group = (torch.full((), count, dtype=torch.int64, device=device) for count in (length - 1, each))
    number = torch.arange(tiles, device=device)[:, None]
    group = torch.div(number, per_group, rounding_mode="floor")  # M 1
    in_group = ((end - group) // d + 1).clamp(min=1)  # a group beyond the end of the map counts as one position
    last = (in_group + n - 1) // n - 1
    query = (number - group * per_group) * tile + torch.arange(tile, device=device)
    query = torch.minimum((query - ahead).clamp(min=0) if ahead else query, last)  # M T
    start = window.starts(query, in_group)
    base = start[:, :1]  # the smallest
    if window.boundary != "zero":
        base = torch.minimum(base, in_group - span).clamp(min=0)
    key = base + torch.arange(span, device=device)  # M S
    inside = (key >= 0) & (key < in_group)

    offset = key[:, None] - start[..., None]  # M T S
    seen = (offset >= 0) & (offset < window.kernel_size)
    if window.boundary == "mask":
        seen = seen & inside[:, None]
    row = window.table_row(key[:, None], query[..., None])
    x = torch.arange(queries, device=device)
    j = x // d + ahead if ahead else x // d
    return DynamicAxisTiling(
        tile=tile,
        tiles=tiles,
        span=span,
        query_at=torch.minimum(query * d + group, torch.full_like(end, queries - 1)).flatten(),
        key_at=torch.minimum((key * d + group).clamp(min=0), end).flatten(),
        inside=inside.flatten(),
        first=start - base,
        row=torch.where(seen, row, 2 * window.kernel_size - 1),
        back=(x % d * per_group + j // tile) * tile + j % tile,
    )


def _gather(x: Tensor, rows: Tensor, columns: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """[B, H, W, N, C] -> [B, M, M2, N, T*T2, C], by the rows [M*T] and columns [M2*T2] of tiles; ``sizes``: M, M2, T,
    T2.

    Gathering axis by axis would be cheaper, but needs a transpose of the tiles of a row with the rows of a tile, on
    which exporters guard whether there is more than one.
    """
    a, b, t, t2 = sizes
    at = rows.unflatten(0, (a, 1, t, 1)) * x.shape[2] + columns.unflatten(0, (1, b, 1, t2))
    x = x.clone(memory_format=torch.contiguous_format).flatten(1, 2).index_select(1, at.flatten())
    return x.unflatten(1, (a, b, t * t2)).transpose(3, 4)


def query_tiles(x: Tensor, a: DynamicAxisTiling, b: DynamicAxisTiling) -> Tensor:
    """[B, h, w, N, C] -> [B, M, M2, N, T*T2, C]."""
    return _gather(x, a.query_at, b.query_at, (a.tiles, b.tiles, a.tile, b.tile))


def key_spans(x: Tensor, a: DynamicAxisTiling, b: DynamicAxisTiling, boundary: str) -> Tensor:
    """[B, H, W, N, C] -> [B, M, M2, N, S*S2, C], with boundary "zero" zeros outside the map."""
    sizes = a.tiles, b.tiles, a.span, b.span
    x = _gather(x, a.key_at, b.key_at, sizes)
    if boundary == "zero":
        inside = a.inside.unflatten(0, (a.tiles, 1, a.span, 1)) & b.inside.unflatten(0, (1, b.tiles, 1, b.span))
        x = x * inside.flatten(2, 3).to(x.dtype)[:, :, None, :, None]
    return x


def from_query_tiles(x: Tensor, a: DynamicAxisTiling, b: DynamicAxisTiling) -> Tensor:
    """[B, M, M2, N, T*T2, C] -> [B, h, w, N, C]."""
    x = x.unflatten(4, (a.tile, b.tile)).permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)
    return x.index_select(1, a.back).index_select(2, b.back)
