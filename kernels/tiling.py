"""Tiling of a map into tiles of queries with spans of keys, shared by the ``tiled`` backends of both operations.

The map is split into its dilation groups, each group into tiles of queries. All windows of a tile lie inside one span
of keys with the same size for every tile, so a tile needs only a few dense matrix products. This file has

* the plan of a call: its tiles (``AxisTiling``, ``plan_of``);
* views of maps as dilation groups, tiles and spans;
* the chunks that a map is computed in, and the memory that they share (``chunks``, ``Scratch``).

B batch, H W map, N heads, C channels, G G2 dilation groups of rows and columns, h w positions of a group,
R Q tiles of rows and columns, T T2 queries of a tile, S S2 keys of its span.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Problem
from .tracing import tracing, transformed
from .window import Window

# Approximate query-key pairs of a chunk. On a 2-core CPU with 2 MiB of L2 and 32 MiB of L3 cache, half or twice as many
# take the same time; without chunks it is 1.5 to 2 times slower.
CHUNK = 1 << 20


# ---------------------------------------------------------------------------------------------------- planning


class AxisTiling(NamedTuple):  # a plain tuple, which Dynamo accepts as a constant in every release
    """How one axis of the dilation groups ``first:stop`` (all of ``length`` positions) is cut into tiles."""

    first: int
    stop: int
    length: int
    queries: int  # of a group: its length, unless there is a query stride
    tile: int
    tiles: int
    step: int  # positions from the first query of a tile to that of the next: tile * query_stride
    before: int  # padding before the first position, so that the first tile has a full span
    after: int  # padding after the last position, so that the last tile has a full span
    span: int
    ahead: int  # queries missing from the first tile: tiles begin with the blocks of an offset
    ragged: int  # queries missing from the last tile
    runs: tuple[tuple[int, int, int], ...]  # (start, stop, pattern) of consecutive tiles with equal windows
    order: tuple[int, ...]  # the pattern of every tile
    samples: tuple[int, ...]  # one tile of each pattern
    keys: int  # of the window of one query
    between: int  # rows of a bias table from one query of a tile to the next
    offsets: int  # between a query and a key of a tile; t and s have the one with the number between * (T - 1 - t) + s
    masked: bool  # whether some key of a span is not for all queries of the tile


def cut(window: Window, first: int, stop: int, length: int, tile: int) -> AxisTiling:
    queries = window.queries(length)
    starts = [window.start(i, length) for i in range(queries)]
    ahead = window.ahead if tile < queries and tile % window.stride == 0 else 0
    tiles, step = -(-(queries + ahead) // tile), tile * window.query_stride
    spans = [(t * step, starts[max(t * tile - ahead, 0) : (t + 1) * tile - ahead]) for t in range(tiles)]
    before = max(ahead, *(q0 - min(s) for q0, s in spans))
    span = max(max(s) + window.kernel_size - (q0 - before) for q0, s in spans)
    # with a large query stride the last queries may not see the end of the map, but the spans must cover it
    span = max(span, length + before - (tiles - 1) * step)
    between = window.rows_between if tile > 1 else 0
    shapes = []  # relative to the tile: its windows and, with boundary "mask", the edges of the map
    for q0, s in spans:
        base = q0 - before
        edges = (max(-base, 0), min(length - base, span)) if window.boundary == "mask" else (0, span)
        lacking = (None,) * (ahead if q0 == 0 else 0)  # windows of queries before the first
        shapes.append(((*lacking, *(x - base for x in s)), edges))
    patterns = list(dict.fromkeys(shapes))
    order = tuple(map(patterns.index, shapes))
    changes = [t for t in range(tiles + 1) if t in (0, tiles) or order[t] != order[t - 1]]
    return AxisTiling(
        first=first,
        stop=stop,
        length=length,
        queries=queries,
        tile=tile,
        tiles=tiles,
        step=step,
        before=before,
        after=(tiles - 1) * step + span - before - length,
        span=span,
        ahead=ahead,
        ragged=tiles * tile - ahead - queries,
        runs=tuple((start, stop, order[start]) for start, stop in itertools.pairwise(changes)),
        order=order,
        samples=tuple(map(order.index, range(len(patterns)))),
        keys=window.kernel_size,
        between=between,
        offsets=between * (tile - 1) + span,
        masked=span != window.kernel_size or any(any(s) or edges != (0, span) for s, edges in patterns),
    )


Plans = tuple[tuple[AxisTiling, AxisTiling], ...]
Cost = Callable[[AxisTiling, AxisTiling], float]


def pairs(a: AxisTiling, b: AxisTiling) -> int:
    """Query-key pairs of all tiles of one dilation group."""
    return a.tiles * a.tile * a.span * b.tiles * b.tile * b.span


@lru_cache(maxsize=1024)
def plan(rows: Window, columns: Window, height: int, width: int, cost: Cost) -> Plans:
    """The cheapest tilings, one for each pair of group lengths (at most four; one where the dilations divide)."""

    def candidates(window: Window, extent: int) -> list[list[AxisTiling]]:
        d, short = window.dilation, extent % window.dilation
        groups = [(0, d)] if short == 0 else [(0, short), (short, d)]
        choices = []
        for first, stop in groups:
            length = window.group_length(extent, first)
            if length == 0:
                continue
            queries, together = window.queries(length), -(-window.stride // window.query_stride)
            sizes = {*range(1, min(queries, 24) + 1), min(queries, together), queries}
            if window.counted:  # offsets are evenly spaced only inside a stride group
                sizes = {min(queries, together)}
            choices.append([cut(window, first, stop, length, tile) for tile in sorted(sizes)])
        return choices

    return tuple(
        min(((a, b) for a in row_axes for b in column_axes), key=lambda pair: cost(*pair))
        for row_axes in candidates(rows, height)
        for column_axes in candidates(columns, width)
    )


@torch.compiler.assume_constant_result
def _compile_time_plan(rows: tuple, columns: tuple, height: int, width: int, cost: Cost) -> Plans:
    return plan(Window(*rows), Window(*columns), height, width, cost)


def plan_of(problem: Problem, cost: Cost) -> Plans:
    """``plan`` of a call; a constant in compiled code."""
    if torch.compiler.is_compiling():
        return _compile_time_plan(problem.rows.arguments, problem.columns.arguments, *problem.size, cost)
    return plan(problem.rows, problem.columns, *problem.size, cost)


def chunkable(problem: Problem, *tensors: Tensor) -> bool:
    """Whether a call may run in chunks: eager mode on a CPU, plain tensors. Everything else uses standard operators,
    which tracers, the transforms of ``torch.func`` and tensor subclasses support."""
    return not problem.tracing and _plain(problem, *tensors)


def one_node(problem: Problem, *tensors: Tensor) -> bool:
    """Whether a call in chunks is one node of a graph that torch.compile makes. Exporters get standard operators."""
    exporting = torch.compiler.is_exporting() or not torch.compiler.is_compiling()
    return problem.tracing and not exporting and _plain(problem, *tensors)


def _plain(problem: Problem, *tensors: Tensor) -> bool:
    return (
        not transformed() and problem.device == "cpu" and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits and sums: float16 overflows at 65,504, and bfloat16 has three significant digits."""
    return torch.promote_types(dtype, torch.float32)


def pattern_order(axis: AxisTiling, device: torch.device) -> Tensor:
    """The pattern of every tile of an axis."""
    return torch.tensor(axis.order, device=device)


# ------------------------------------------------------------------------------------------------------- views


def split_groups(x: Tensor, dilation: tuple[int, int]) -> Tensor:
    """[B, H, W, N, C] -> view [B, G, G2, N, h, w, C], padded with zeros where the dilation does not divide the map."""
    (d, d2), (height, width) = dilation, x.shape[1:3]
    if height % d or width % d2:
        x = F.pad(x, (0, 0, 0, 0, 0, -width % d2, 0, -height % d))
    return x.unflatten(2, (-1, d2)).unflatten(1, (-1, d)).permute(0, 2, 4, 5, 1, 3, 6)


def take(x: Tensor, *index: slice, dim: int = 0) -> Tensor:
    """``x`` indexed with slices from dimension ``dim`` on, without an operator for full slices."""
    shape = x.shape
    for at, cut in enumerate(index, dim):
        if cut.stop - cut.start < shape[at]:
            x = x.narrow(at, cut.start, cut.stop - cut.start)
    return x


def select_groups(x: Tensor, a: AxisTiling, b: AxisTiling) -> Tensor:
    """The dilation groups and positions of one plan, from [B, G, G2, N, h, w, C]. With a query stride there is one
    plan, so nothing is cut off from keys or queries."""
    return x[:, a.first : a.stop, b.first : b.stop, :, : a.length, : b.length]


def query_tiles(x: Tensor, a: AxisTiling, b: AxisTiling) -> Tensor:
    """[B, G, G2, N, h, w, C] -> view [B, G, G2, N, R, Q, T, T2, C]."""
    if a.ragged or b.ragged or a.ahead or b.ahead:
        x = F.pad(x, (0, 0, b.ahead, b.ragged, a.ahead, a.ragged))
    return x.unflatten(5, (b.tiles, b.tile)).unflatten(4, (a.tiles, a.tile)).transpose(5, 6)


def from_query_tiles(x: Tensor, a: AxisTiling, b: AxisTiling) -> Tensor:
    """[B, G, G2, N, R, Q, T, T2, C] -> [B, G, G2, N, h, w, C]."""
    x = x.transpose(5, 6).flatten(6, 7).flatten(4, 5)
    return x[:, :, :, :, a.ahead : a.ahead + a.queries, b.ahead : b.ahead + b.queries]


def pad_keys(x: Tensor, a: AxisTiling, b: AxisTiling) -> Tensor:
    """[B, G, G2, N, h, w, C] padded with zeros as far as the spans reach."""
    if a.before or a.after or b.before or b.after:
        return F.pad(x, (0, 0, b.before, b.after, a.before, a.after))
    return x


def key_spans(x: Tensor, a: AxisTiling, b: AxisTiling) -> Tensor:
    """Padded [B, G, G2, N, h, w, C] -> [B, G, G2, N, R, Q, S, S2, C]: a view, or a gather under tracing."""
    if a.tiles == b.tiles == 1:
        return x[:, :, :, :, None, None]
    if tracing():  # few exporters support overlapping views; all support a gather
        for dim, axis in ((5, b), (4, a)):
            at = torch.arange(axis.tiles, device=x.device)[:, None] * axis.step
            at = at + torch.arange(axis.span, device=x.device)
            x = x.index_select(dim, at.flatten()).unflatten(dim, (axis.tiles, axis.span))
        return x.transpose(5, 6)
    return x.unfold(4, a.span, a.step).unfold(5, b.span, b.step).permute(0, 1, 2, 3, 4, 5, 7, 8, 6)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """[B, H + ., W + ., N, C] -> contiguous [B, H, W, N, C]."""
    return x if tuple(x.shape[1:3]) == (height, width) else x[:, :height, :width].contiguous()


def join(outs: list[Tensor], plans: Plans, problem: Problem) -> Tensor:
    """Join the outputs of the plans, [B, G, G2, N, h, w, C] of their dilation groups, into one map of the queries."""
    longest = [max(axis.queries for axis in side) for side in zip(*plans, strict=True)]
    grid: dict[int, list[Tensor]] = {}
    for (a, b), out in zip(plans, outs, strict=True):
        out = F.pad(out, (0, 0, 0, longest[1] - b.queries, 0, longest[0] - a.queries))
        grid.setdefault(a.first, []).append(out)
    rows = [row[0] if len(row) == 1 else torch.cat(row, 2) for row in grid.values()]
    out = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return crop(out.permute(0, 4, 1, 5, 2, 3, 6).flatten(3, 4).flatten(1, 2), *problem.query_size)


# ------------------------------------------------------------------------------------------- chunk by chunk


class Chunk(NamedTuple):
    """Index of a part of [B, G, G2, N, h, w, C] (as in ``select_groups``), its heads, and its tile rows in slices of
    about the chunk size."""

    index: tuple[slice, ...]
    heads: slice
    tile_rows: list[slice]


def _share(count: int, pairs: int, size: int) -> int:
    """Units per chunk when ``count`` units of ``pairs`` each are divided into equal chunks of about ``size``."""
    return max(1, -(-count // max(1, min(count, round(count * pairs / size)))))


def chunks(shape: tuple[int, ...], a: AxisTiling, b: AxisTiling, size: int) -> Iterator[Chunk]:
    """Chunks of about ``size`` query-key pairs: as many tile rows, heads, dilation groups and images as fit."""
    batch, heads = shape[0], shape[3]
    group_row = (b.stop - b.first) * pairs(a, b)
    heads_each = _share(heads, group_row, size)
    for n in range(0, heads, heads_each):
        some = slice(n, min(n + heads_each, heads))
        tile_row = (some.stop - n) * group_row // a.tiles
        rows = _share(a.tiles, tile_row, size)
        groups = _share(a.stop - a.first, tile_row * rows, size) if rows == a.tiles else 1
        images = _share(batch, tile_row * rows * groups, size) if groups == a.stop - a.first else 1
        tile_rows = [slice(r, min(r + rows, a.tiles)) for r in range(0, a.tiles, rows)]
        for i in range(0, batch, images):
            for g in range(a.first, a.stop, groups):
                lead = slice(i, min(i + images, batch)), slice(g, min(g + groups, a.stop)), slice(b.first, b.stop)
                yield Chunk((*lead, some, slice(0, a.length), slice(0, b.length)), some, tile_rows)


def blocks(rows: slice, a: AxisTiling, b: AxisTiling) -> Iterator[tuple[slice, slice, int, int]]:
    """Rectangles of tiles with one pattern inside a slice of tile rows: (row slice, column slice, pattern, pattern)."""
    for start, stop, p in a.runs:
        start, stop = max(start, rows.start) - rows.start, min(stop, rows.stop) - rows.start
        if start < stop:
            for left, right, p2 in b.runs:
                yield slice(start, stop), slice(left, right), p, p2


class Scratch:
    """Memory shared by the chunks of one call: allocating pages for each would cost as much as the arithmetic."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype, self.held = like, dtype, {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, in the memory of the previous one with the same name, which has the same dtype."""
        count = math.prod(shape)
        if name not in self.held or self.held[name].numel() < count:
            self.held[name] = self.like.new_empty(count, dtype=dtype or self.dtype)
        return take(self.held[name], slice(0, count)).view(shape)

    def flat(self, name: str, x: Tensor, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """Some tile rows of [B, G, G2, N, R, Q, T, T2, C], copied to [B*G*G2*N*R*Q, T*T2, C]."""
        x = take(x, rows, dim=4)
        return self(name, *x.shape, dtype=dtype).copy_(x).view(-1, x.shape[6] * x.shape[7], x.shape[8])

    def bmm(self, name: str, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        """``factor * x @ y``, with ``out=`` also because autocast, which may surround a backward, ignores that."""
        out = self(name, x.shape[0], x.shape[1], y.shape[2], dtype=x.dtype)
        return torch.baddbmm(out, x, y, beta=0.0, alpha=factor, out=out)

    def spans(self, name: str, x: Tensor, a: AxisTiling, b: AxisTiling, dtype: torch.dtype | None = None) -> Tensor:
        """[B, G, G2, N, h, w, C] -> [B, G, G2, N, R, Q, S, S2, C]: a view, of a padded copy if spans leave the map."""
        if a.before or a.after or b.before or b.after:
            whole = self(name, *padded_shape(x, a, b), dtype=dtype)
            whole.zero_()
            inner(whole, a, b).copy_(x)
            x = whole
        return key_spans(x, a, b)


def padded_shape(x: Tensor, a: AxisTiling, b: AxisTiling) -> tuple[int, ...]:
    """Shape of ``pad_keys(x, a, b)``."""
    return *x.shape[:4], a.before + a.length + a.after, b.before + b.length + b.after, x.shape[6]


def inner(x: Tensor, a: AxisTiling, b: AxisTiling) -> Tensor:
    """The map inside its padded form [B, G, G2, N, h, w, C]."""
    return take(x, slice(a.before, a.before + a.length), slice(b.before, b.before + b.length), dim=4)


def add_spans(total: Tensor, spans: Tensor, rows: slice, a: AxisTiling, b: AxisTiling) -> None:
    """Add gradients of key spans [B, G, G2, N, R, Q, S, S2, C] of some tile rows to the padded map ``total``."""
    *lead, line, cell, channel = total.stride()
    for i in range(0, a.span, a.step):
        height = min(a.step, a.span - i)
        for j in range(0, b.span, b.step):
            width = min(b.step, b.span - j)
            part = take(spans, slice(i, i + height), slice(j, j + width), dim=6)
            # these parts of different tiles do not overlap, so neither does the target view
            first = total.storage_offset() + (rows.start * a.step + i) * line + j * cell
            total.as_strided(part.shape, (*lead, a.step * line, b.step * cell, line, cell, channel), first).add_(part)


def store(target: Tensor, tiles: Tensor, rows: slice, size: tuple[int, int], ahead: tuple[int, int] = (0, 0)) -> None:
    """Write flattened tiles [B*G*G2*N*R*Q, T*T2, C] of some tile rows into ``target`` [B, G, G2, N, h, w, C].
    ``size``: T, T2 of the queries, or S, S2 of keys whose spans do not overlap; ``ahead``: missing from the first."""
    (t, t2), (length, length2) = size, target.shape[4:6]
    tiles = tiles.view(*target.shape[:4], rows.stop - rows.start, -1, t, t2, tiles.shape[-1])
    at = rows.start * t - ahead[0]
    first = max(at, 0)
    target = take(target, slice(first, min(rows.stop * t - ahead[0], length)), dim=4)
    if target.shape[4:6] == (tiles.shape[4] * t, tiles.shape[5] * t2):  # no ragged tile: one strided copy
        target.unflatten(5, (-1, t2)).unflatten(4, (-1, t)).transpose(5, 6).copy_(tiles)
    else:
        tiles = tiles.transpose(5, 6).flatten(6, 7).flatten(4, 5)
        inside = slice(first - at, first - at + target.shape[4]), slice(ahead[1], ahead[1] + length2)
        target.copy_(take(tiles, *inside, dim=4))
