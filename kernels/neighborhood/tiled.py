"""Neighborhood attention in plain PyTorch operations: the CPU default, and what compilers and exporters see.

The map is split into its dilation groups, each group into tiles of queries. All windows of a tile lie inside one span
of keys, of the same size for every tile, so a tile is one small dense attention with a mask: a few batched matrix
products instead of a gather of K keys for each query.

Two forms share the planning, the views and the bias:

* ``_attend``: standard operators on all tiles at once. Traced through by ``torch.compile`` and the exporters; also
  takes dropout.
* ``_Chunked``: eager mode on a CPU. Walks over pieces that stay in the cache, forward and backward, and keeps nothing
  but q, k, v and the bias for the backward, but for small calls (below) the probabilities.

B batch, H W map, N heads, C channels, G G2 dilation phases of rows and columns, R Q tiles of rows and columns,
T T2 queries of a tile, S S2 keys of its span.
"""

from __future__ import annotations

import math
import operator
import threading
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..bias import FactoredBias, TableBias
from ..problem import Problem, tracing
from ..window import Window

# A piece of a chunked call: about this many logits. Measured on a 2-core CPU with 2 MiB of second-level and 32 MiB of
# third-level cache; half and twice as many cost the same, unchunked costs 1.5 to 2 times as much.
PIECE = 1 << 20

# What copying one key and value into a span, and adding its gradient back, costs in units of one query-key pair. Fitted
# on the same machine.
COPY_COST = 64.0

# Masks and indices kept between calls, for all shapes together; a DiNAT's layers take less than one MiB.
CONSTANT_BYTES = 128 << 20


def unsupported_reason(problem: Problem) -> str | None:
    """Runs everything, on any device."""
    return None


# ---------------------------------------------------------------------------------------------------- planning


class Axis(NamedTuple):  # a tuple of numbers: what Dynamo takes as a constant in every release
    """How one axis of the dilation groups ``first:stop`` (all of ``length`` positions) is cut into tiles."""

    first: int
    stop: int
    length: int
    tile: int
    tiles: int
    before: int  # keys that the span of a tile reaches before its first query
    after: int  # padding behind the last position, so that the last tile has a full span
    span: int
    ragged: int  # queries that the last tile is short of
    runs: tuple[tuple[int, int, int], ...]  # (tile from, tile to, pattern): neighbouring tiles with equal windows
    order: tuple[int, ...]  # the pattern of every tile
    samples: tuple[int, ...]  # one tile of each pattern
    masked: bool  # whether some key of a span is not for all queries of the tile


def _cut(window: Window, first: int, stop: int, length: int, tile: int) -> Axis:
    starts = [window.start(i, length) for i in range(length)]
    tiles = -(-length // tile)
    spans = [(t * tile, starts[t * tile : (t + 1) * tile]) for t in range(tiles)]
    before = max(0, *(q0 - min(s) for q0, s in spans))
    span = max(max(s) + window.kernel_size - (q0 - before) for q0, s in spans)
    shapes: dict[tuple, int] = {}
    runs: list[list[int]] = []
    samples = []
    masked = False
    for t, (q0, s) in enumerate(spans):
        # relative to the tile: the windows, and (boundary "mask") where the map begins and ends
        base = q0 - before
        edges = (max(-base, 0), min(length - base, span)) if window.boundary == "mask" else (0, span)
        shape = (*(x - base for x in s), *edges)
        if shape not in shapes:
            shapes[shape] = len(shapes)
            samples.append(t)
            masked |= edges != (0, span) or any(x != base for x in s) or span != window.kernel_size
        if runs and runs[-1][2] == shapes[shape]:
            runs[-1][1] = t + 1
        else:
            runs.append([t, t + 1, shapes[shape]])
    return Axis(
        first=first,
        stop=stop,
        length=length,
        tile=tile,
        tiles=tiles,
        before=before,
        after=(tiles - 1) * tile + span - before - length,
        span=span,
        ragged=tiles * tile - length,
        runs=tuple((start, stop, pattern) for start, stop, pattern in runs),
        order=tuple(pattern for start, stop, pattern in runs for _ in range(start, stop)),
        samples=tuple(samples),
        masked=masked,
    )


def _cost(rows: Axis, columns: Axis) -> float:
    pairs = rows.tiles * rows.tile * rows.span * columns.tiles * columns.tile * columns.span
    copied = rows.tiles * rows.span * columns.tiles * columns.span
    patterns = len(rows.samples) * len(columns.samples) * rows.tile * rows.span * columns.tile * columns.span
    whole = rows.tiles == columns.tiles == 1 and rows.span == rows.length and columns.span == columns.length
    return pairs if whole else pairs + patterns + COPY_COST * copied


@lru_cache(maxsize=1024)
def plan(rows: Window, columns: Window, height: int, width: int) -> tuple[tuple[Axis, Axis], ...]:
    """The tilings of a call, one for each pair of group lengths (at most four; one where the dilations divide)."""

    def candidates(window: Window, extent: int) -> list[list[Axis]]:
        d, short = window.dilation, extent % window.dilation
        classes = [(0, d)] if short == 0 else [(0, short), (short, d)]
        choices = []
        for first, stop in classes:
            length = window.group_length(extent, first)
            if length == 0:
                continue
            sizes = {*range(1, min(length, 24) + 1), min(length, window.stride), length}
            choices.append([_cut(window, first, stop, length, tile) for tile in sorted(sizes)])
        return choices

    return tuple(
        min(((a, b) for a in row_axes for b in column_axes), key=lambda pair: _cost(*pair))
        for row_axes in candidates(rows, height)
        for column_axes in candidates(columns, width)
    )


def _compile_time_plan(rows: tuple, columns: tuple, height: int, width: int) -> tuple[tuple[Axis, Axis], ...]:
    return plan(Window(*rows), Window(*columns), height, width)


_compile_time_plan = torch.compiler.assume_constant_result(_compile_time_plan)


def _pattern_index(window: Window, axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(row, seen)`` of every pattern, both [P, T, S]: the bias table's row, and whether the query sees the key."""
    tile = torch.tensor(axis.samples, device=device)[:, None, None]
    query = (tile * axis.tile + torch.arange(axis.tile, device=device)[:, None]).clamp(max=axis.length - 1)
    key = tile * axis.tile - axis.before + torch.arange(axis.span, device=device)
    offset = key - window.starts(query, axis.length)
    seen = (offset >= 0) & (offset < window.kernel_size)
    if window.boundary == "mask":
        seen = seen & (key >= 0) & (key < axis.length)
    row = window.table_row(key, query).clamp(0, 2 * window.kernel_size - 2)
    return row, seen


def _pattern_order(axis: Axis, device: torch.device) -> tuple[Tensor]:
    return (torch.tensor(axis.order, device=device),)


def _pattern_mask(
    rows: Window, columns: Window, a: Axis, b: Axis, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor]:
    """0 where the query sees the key, else -inf: [P, P2, T*T2, S*S2]."""
    seen = _pattern_index(rows, a, device)[1][:, None, :, None, :, None]
    seen = seen & _pattern_index(columns, b, device)[1][None, :, None, :, None, :]
    zero = torch.zeros((), dtype=dtype, device=device)
    mask = torch.where(seen, zero, float("-inf"))
    return (mask.reshape(len(a.samples), len(b.samples), a.tile * b.tile, a.span * b.span),)


_constants: dict[tuple, tuple[Tensor, ...]] = {}


def _constant(function, *key) -> tuple[Tensor, ...]:
    """``function(*key)``, kept between eager calls; built anew under a tracer: its tensors must not leak out of it."""
    if tracing():
        return function(*key)
    found = _constants.get((function, *key))
    if found is None:
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a backward
            found = function(*key)
        if all(type(t) is Tensor and t.device.type != "meta" for t in found):  # no FakeTensor or other mode's product
            if sum(t.nbytes for kept in (*_constants.values(), found) for t in kept) > CONSTANT_BYTES:
                _constants.clear()
            _constants[(function, *key)] = found
    return found


def _pattern_bias(
    table: Tensor | None, problem: Problem, a: Axis, b: Axis, dtype: torch.dtype, device
) -> Tensor | None:
    """Table and mask together for each pattern of tiles, [N or 1, P, P2, T*T2, S*S2]; None where neither is needed."""
    mask = None
    if a.masked or b.masked:
        mask = _constant(_pattern_mask, problem.rows, problem.columns, a, b, dtype, device)[0][None]
    if table is None:
        return mask
    row = _constant(_pattern_index, problem.rows, a, device)[0]
    column = _constant(_pattern_index, problem.columns, b, device)[0]
    bias = table.index_select(1, row.flatten()).index_select(2, column.flatten())
    bias = bias.unflatten(2, column.shape).unflatten(1, row.shape)  # N P T S P2 T2 S2
    bias = bias.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    return bias if mask is None else bias + mask


# Parameters that were expanded without a gradient: (call, copy of the table, expansion). The expansion is used again
# only while the table's numbers equal the copy's. Identity and version would not do: `.data.copy_()` and NumPy views
# change a parameter behind both. The comparison costs 1 us.
_expanded: WeakIdKeyDictionary = WeakIdKeyDictionary()
_expanding = threading.Lock()


def _patterns(table: Tensor | None, problem: Problem, plans: tuple[tuple[Axis, Axis], ...]) -> list[Tensor | None]:
    """``_pattern_bias`` of each plan, without a gradient; of a table that is a parameter kept between calls in eval."""
    working, device = _working(problem.dtype), torch.device(problem.device)
    keep = type(table) is torch.nn.Parameter and not problem.needs_grad
    call = (problem.rows, problem.columns, problem.shape[1:3], working, table.dtype) if keep else None
    if keep:
        found = _expanded.get(table)
        if found is not None and found[0] == call and torch.equal(found[1], table):
            return found[2]
    with torch.inference_mode(False), torch.no_grad():
        copy = table.detach().clone() if keep else None  # before: what another thread writes meanwhile shows next time
        source = copy if keep else table
        source = None if source is None else source.to(working)
        patterns = [_pattern_bias(source, problem, a, b, working, device) for a, b in plans]
    if keep:
        with _expanding:
            if sum(t.nbytes for kept in (*(e[2] for e in _expanded.values()), patterns) for t in kept) > CONSTANT_BYTES:
                _expanded.clear()
            _expanded[table] = (call, copy, patterns)
    return patterns


# ------------------------------------------------------------------------------------------------------- views


def _split_phases(x: Tensor, dilation: tuple[int, int]) -> Tensor:
    """[B, H, W, N, C] -> view [B, G, G2, N, h, w, C], padded with zeros where the dilation does not divide the map."""
    (d, d2), (height, width) = dilation, x.shape[1:3]
    if height % d or width % d2:
        x = F.pad(x, (0, 0, 0, 0, 0, -width % d2, 0, -height % d))
    return x.unflatten(2, (-1, d2)).unflatten(1, (-1, d)).permute(0, 2, 4, 5, 1, 3, 6)


def _take(x: Tensor, index: dict[int, slice]) -> Tensor:
    """``x`` indexed with a slice for each of some dimensions: one operator for each that cuts something off."""
    shape = x.shape
    for dim, cut in index.items():
        if cut.stop - cut.start < shape[dim]:
            x = x.narrow(dim, cut.start, cut.stop - cut.start)
    return x


def _of_class(x: Tensor, a: Axis, b: Axis) -> Tensor:
    """The phases and positions of one plan out of [B, G, G2, N, h, w, C]."""
    return x[:, a.first : a.stop, b.first : b.stop, :, : a.length, : b.length]


def _query_tiles(x: Tensor, a: Axis, b: Axis) -> Tensor:
    """[B, G, G2, N, h, w, C] -> view [B, G, G2, N, R, Q, T, T2, C]."""
    if a.ragged or b.ragged:
        x = F.pad(x, (0, 0, 0, b.ragged, 0, a.ragged))
    return x.unflatten(5, (b.tiles, b.tile)).unflatten(4, (a.tiles, a.tile)).transpose(5, 6)


def _from_query_tiles(x: Tensor, a: Axis, b: Axis) -> Tensor:
    """[B, G, G2, N, R, Q, T, T2, C] -> [B, G, G2, N, h, w, C]."""
    return x.transpose(5, 6).flatten(6, 7).flatten(4, 5)[:, :, :, :, : a.length, : b.length]


def _pad_keys(x: Tensor, a: Axis, b: Axis) -> Tensor:
    if a.before or a.after or b.before or b.after:
        return F.pad(x, (0, 0, b.before, b.after, a.before, a.after))
    return x


def _key_spans(x: Tensor, a: Axis, b: Axis) -> Tensor:
    """Padded [B, G, G2, N, h, w, C] -> [B, G, G2, N, R, Q, S, S2, C]: a view, or a gather where it is traced."""
    if a.tiles == b.tiles == 1:
        return x[:, :, :, :, None, None]
    if tracing():  # exporters know a gather with constant indices; views that overlap, few do
        for dim, axis in ((5, b), (4, a)):
            at = torch.arange(axis.tiles, device=x.device)[:, None] * axis.tile
            at = at + torch.arange(axis.span, device=x.device)
            x = x.index_select(dim, at.flatten()).unflatten(dim, (axis.tiles, axis.span))
        return x.transpose(5, 6)
    return x.unfold(4, a.span, a.tile).unfold(5, b.span, b.tile).permute(0, 1, 2, 3, 4, 5, 7, 8, 6)


# -------------------------------------------------------------------------------------- all tiles at once


def _attend(q: Tensor, k: Tensor, v: Tensor, bias_tensors: tuple[Tensor, ...], problem: Problem, plans) -> Tensor:
    """Standard operators only. q, k, v are [B, G, G2, N, h, w, C]; returns the same layout, in full."""
    grid: dict[int, list[Tensor]] = {}
    full, working = q.shape[4:6], _working(q.dtype)
    bias_tensors = tuple(t.to(working) for t in bias_tensors)
    for a, b in plans:
        tiles = _query_tiles(_of_class(q, a, b), a, b)
        queries = tiles.flatten(6, 7)
        keys, values = (_key_spans(_pad_keys(_of_class(t, a, b), a, b), a, b).flatten(6, 7) for t in (k, v))
        table = bias_tensors[0] if problem.bias is TableBias else None
        bias = _pattern_bias(table, problem, a, b, working, q.device)
        if bias is not None:  # N R Q T*T2 S*S2
            for dim, axis in ((1, a), (2, b)):
                if len(axis.runs) > 1:
                    bias = bias.index_select(dim, _constant(_pattern_order, axis, bias.device)[0])
                else:
                    bias = bias.expand(*(axis.tiles if i == dim else -1 for i in range(5)))
        if bias_tensors and table is None:
            factored = _factored_bias(tiles.to(working), bias_tensors, problem, a, b)
            bias = factored if bias is None else bias + factored
        # Exporters trace one attention kernel and decompose into another, of other strides, where the views behind it
        # fail: they get the three products.
        if problem.dropout_p > 0 or (bias is not None and bias.ndim == 8) or torch.compiler.is_exporting():
            logits = (queries.to(working) * problem.scale) @ keys.to(working).transpose(-1, -2)
            weights = (logits if bias is None else logits + bias).softmax(-1).to(values.dtype)
            out = F.dropout(weights, problem.dropout_p) @ values
        else:
            batch = queries.shape[:3]
            if bias is not None:
                bias = bias.to(q.dtype).expand(q.shape[3], -1, -1, -1, -1).flatten(0, 2)[None]
            out = F.scaled_dot_product_attention(
                *(t.flatten(3, 5).flatten(0, 2) for t in (queries, keys, values)), attn_mask=bias, scale=problem.scale
            )
            out = out.unflatten(1, (q.shape[3], a.tiles, b.tiles)).unflatten(0, batch)
        out = _from_query_tiles(out.unflatten(6, (a.tile, b.tile)), a, b)
        out = F.pad(out, (0, 0, 0, full[1] - b.length, 0, full[0] - a.length))
        grid.setdefault(a.first, []).append(out)
    rows = [row[0] if len(row) == 1 else torch.cat(row, 2) for row in grid.values()]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def _factored_bias(tiles: Tensor, bias_tensors: tuple[Tensor, ...], problem: Problem, a: Axis, b: Axis) -> Tensor:
    """q . rows + q . columns for every query and key of a tile: [B, G, G2, N, R, Q, T*T2, S*S2]."""
    sides = []
    for embedding, window, axis, (tile_dim, query_dim) in zip(
        bias_tensors, (problem.rows, problem.columns), (a, b), ((4, 6), (5, 7)), strict=True
    ):
        if embedding.ndim == 2:
            embedding = embedding[None]
        dots = tiles @ embedding.transpose(-1, -2)[:, None, None, None]  # B G G2 N R Q T T2 2K-1
        row = _constant(_pattern_index, window, axis, tiles.device)[0]  # P T S
        row = row[_constant(_pattern_order, axis, tiles.device)[0]]  # R T S
        shape = [1] * 9
        shape[tile_dim], shape[query_dim], shape[8] = row.shape
        sides.append(dots.gather(-1, row.reshape(shape).expand(*dots.shape[:8], -1)))
    return (sides[0].unsqueeze(-1) + sides[1].unsqueeze(-2)).flatten(8, 9).flatten(6, 7)


# ------------------------------------------------------------------------------------------- piece by piece


def _share(count: int, logits: int, piece: int) -> int:
    """Of ``count`` units of ``logits`` each, those that make one of equal pieces."""
    return max(1, -(-count // max(1, min(count, round(count * logits / piece)))))


def _pieces(shape: tuple[int, ...], a: Axis, b: Axis, piece: int | None = None):
    """Slices of (batch, row phases, tile rows) of one plan, each of about ``piece`` (by default PIECE) logits."""
    batch, heads = shape[0], shape[3]
    piece = PIECE if piece is None else piece
    tile_row = heads * (b.stop - b.first) * b.tiles * a.tile * b.tile * a.span * b.span
    rows = _share(a.tiles, tile_row, piece)
    phases = _share(a.stop - a.first, tile_row * rows, piece) if rows == a.tiles else 1
    images = _share(batch, tile_row * rows * phases, piece) if phases == a.stop - a.first else 1
    for i in range(0, batch, images):
        for g in range(a.first, a.stop, phases):
            yield (
                slice(i, min(i + images, batch)),
                slice(g, min(g + phases, a.stop)),
                [slice(r, min(r + rows, a.tiles)) for r in range(0, a.tiles, rows)],
            )


def _parts(shape: tuple[int, ...], a: Axis, b: Axis, piece: int):
    """``(part, heads, groups)``: slices of [B, G, G2, N, h, w, C] by dimension, of its heads, of tile rows."""
    phase_row = (b.stop - b.first) * a.tiles * b.tiles * a.tile * b.tile * a.span * b.span
    share = _share(shape[3], phase_row, piece)
    for first in range(0, shape[3], share):
        heads = slice(first, min(first + share, shape[3]))
        for images, phases, groups in _pieces((*shape[:3], heads.stop - first, *shape[4:]), a, b, piece):
            part = (images, phases, slice(b.first, b.stop), heads, slice(0, a.length), slice(0, b.length))
            yield dict(enumerate(part)), heads, groups


def _blocks(rows: slice, a: Axis, b: Axis):
    """Rectangles of tiles with one pattern inside a slice of tile rows: (row slice, column slice, pattern, pattern)."""
    for start, stop, p in a.runs:
        start, stop = max(start, rows.start) - rows.start, min(stop, rows.stop) - rows.start
        if start < stop:
            for left, right, p2 in b.runs:
                yield slice(start, stop), slice(left, right), p, p2


class _Scratch:
    """Memory that the pieces of one call share: fresh pages for each would cost as much as the arithmetic on them."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype, self.held = like, dtype, {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor; the one of the same name before it is given up."""
        count = math.prod(shape)
        if name not in self.held or self.held[name].numel() < count:
            self.held[name] = self.like.new_empty(count, dtype=self.dtype)
        return _take(self.held[name], {0: slice(0, count)}).view(shape)

    def flat(self, name: str, x: Tensor, rows: slice) -> Tensor:
        """Some tile rows of [B, G, G2, N, R, Q, T, T2, C], copied to [B*G*G2*N*R*Q, T*T2, C]."""
        x = _take(x, {4: rows})
        return self(name, *x.shape).copy_(x).view(-1, x.shape[6] * x.shape[7], x.shape[8])

    def bmm(self, name: str, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        out = self(name, x.shape[0], x.shape[1], y.shape[2])
        return torch.baddbmm(out, x, y, beta=0.0, alpha=factor, out=out)

    def spans(self, name: str, x: Tensor, a: Axis, b: Axis) -> Tensor:
        """[B, G, G2, N, h, w, C] -> [B, G, G2, N, R, Q, S, S2, C], a view; of a padded copy where spans reach out."""
        if a.before or a.after or b.before or b.after:
            whole = self(name, *_padded_shape(x, a, b))
            whole.zero_()
            _inner(whole, a, b).copy_(x)
            x = whole
        return _key_spans(x, a, b)


def _padded_shape(x: Tensor, a: Axis, b: Axis) -> tuple[int, ...]:
    return *x.shape[:4], a.before + a.length + a.after, b.before + b.length + b.after, x.shape[6]


def _inner(x: Tensor, a: Axis, b: Axis) -> Tensor:
    """The map in its padded form [B, G, G2, N, h, w, C]."""
    return _take(x, {4: slice(a.before, a.before + a.length), 5: slice(b.before, b.before + b.length)})


def _offsets(window: Window, axis: Axis) -> tuple[int, int, int]:
    """Which rows of a bias table the T + S - 1 offsets between a query and a key of a tile are: ``(before, first,
    count)``, ``before`` that the table lacks, since no query sees so far, then ``count`` from its row ``first`` on."""
    first = window.kernel_size - axis.before - axis.tile
    last = min(first + axis.tile + axis.span - 1, 2 * window.kernel_size - 1)
    return max(-first, 0), max(first, 0), last - max(first, 0)


def _sum_offsets(x: Tensor) -> Tensor:
    """[N, T, S, Z] -> [N, T + S - 1, Z]: the sums over all pairs of query t and key s with the same T - 1 - t + s."""
    n, t, s, z = x.shape
    m = t + s - 1
    shifted = x.new_zeros(n, t, m, z)
    shifted.as_strided(x.shape, (t * m * z, (m - 1) * z, z, 1), (t - 1) * z).copy_(x)
    return shifted.sum(1)


class _PieceBias:
    """The bias of one plan during a walk over its pieces, and the sum of its gradients.

    The table stands in ``patterns``, with the mask. The factored bias of a piece is a product of its queries with
    ``embedding`` [N or 1, M, D]: the rows of both embeddings for the M = T + S - 1 + T2 + S2 - 1 offsets between the
    queries and keys of a tile, which are the same for every tile.
    """

    def __init__(self, problem: Problem, a: Axis, b: Axis, patterns: Tensor | None, tensors: tuple[Tensor, ...]):
        self.problem, self.a, self.b, self.patterns, self.embedding = problem, a, b, patterns, None
        if problem.bias is FactoredBias:
            sides = []
            for t, window, axis in zip(tensors, (problem.rows, problem.columns), (a, b), strict=True):
                before, first, count = _offsets(window, axis)
                side = (t if t.ndim == 3 else t[None]).to(_working(problem.dtype)).narrow(1, first, count)
                after = axis.tile + axis.span - 1 - before - count
                sides.append(F.pad(side, (0, 0, before, after)) if before or after else side)
            heads = max(len(t) for t in sides)
            self.embedding = torch.cat([t.expand(heads, -1, -1) for t in sides], 1)
        self.grad: Tensor | None = None  # of the embedding, or of the table as [N, T*T2, S*S2]

    def probabilities(self, scratch: _Scratch, q: Tensor, k: Tensor, heads: slice, rows: slice) -> Tensor:
        """softmax(scale q k^T + bias): [n*N*R*Q, T*T2, S*S2] from the flattened tiles [n*N*R*Q, ..., C]."""
        tiles = (rows.stop - rows.start) * self.b.tiles
        logits = scratch("weights", q.shape[0], q.shape[1], k.shape[1])
        if self.embedding is not None:
            embedding = self._of(heads, q.shape[0], tiles)
            dots = scratch("dots", q.shape[0], q.shape[1], embedding.shape[1])
            torch.bmm(self._joined(q), embedding.transpose(1, 2), out=self._joined(dots))
            by_row, by_column = self._by_key(dots)
            torch.add(by_row[..., None], by_column[..., None, :], out=logits.view(*by_row.shape, self.b.span))
        beta = 0.0 if self.embedding is None else 1.0
        torch.baddbmm(logits, q, k.transpose(1, 2), beta=beta, alpha=self.problem.scale, out=logits)
        if self.patterns is not None:
            patterns = self.patterns if self.patterns.shape[0] == 1 else self.patterns[heads]
            shaped = logits.view(-1, patterns.shape[0], rows.stop - rows.start, self.b.tiles, *logits.shape[1:])
            for r, c, p, p2 in _blocks(rows, self.a, self.b):
                shaped[:, :, r, c].add_(patterns[:, p, p2, None, None])
        return torch.softmax(logits, -1, out=logits)

    def add_grad(self, scratch: _Scratch, q: Tensor, dq: Tensor, logit_grad: Tensor, heads: slice, rows: slice) -> None:
        """Take in the gradient of the logits of a piece, and add to ``dq`` what comes through the factored bias."""
        tiles = (rows.stop - rows.start) * self.b.tiles
        if self.embedding is not None:
            if self.grad is None:
                self.grad = torch.zeros_like(self.embedding)
            embedding = self._of(heads, q.shape[0], tiles)
            dots = scratch("dots", q.shape[0], q.shape[1], embedding.shape[1]).zero_()
            by_row, by_column = self._by_key(dots)
            shaped = logit_grad.view(*by_row.shape, self.b.span)
            torch.sum(shaped, -1, out=by_row)
            torch.sum(shaped, -2, out=by_column)
            dots, q, dq = (self._joined(t) for t in (dots, q, dq))
            if len(self.embedding) == 1:
                self.grad.baddbmm_(dots.transpose(1, 2), q)
            else:
                products = (dots.transpose(1, 2) @ q).view(-1, heads.stop - heads.start, tiles, *embedding.shape[1:])
                self.grad[heads] += products.sum(2).sum(0)
            dq.baddbmm_(dots, embedding)
        elif self.problem.bias is TableBias:
            if self.grad is None:
                self.grad = logit_grad.new_zeros(self.problem.shape[3], *logit_grad.shape[1:])
            shaped = logit_grad.view(-1, heads.stop - heads.start, tiles, *logit_grad.shape[1:])
            shaped = shaped.sum(2) if tiles > 1 else shaped[:, :, 0]  # one sum over both is 15 times slower
            self.grad[heads] += shaped.sum(0)

    def add_to(self, grads: list[Tensor | None]) -> None:
        """Add the sum to the gradients of the bias tensors; None stands for one that is not wanted."""
        if self.grad is None:  # no bias, or no piece: an empty batch
            return
        a, b, windows = self.a, self.b, (self.problem.rows, self.problem.columns)
        if self.embedding is not None:
            sides = self.grad.split((a.tile + a.span - 1, b.tile + b.span - 1), 1)
            for grad, side, window, axis in zip(grads, sides, windows, (a, b), strict=True):
                if grad is not None:
                    before, first, count = _offsets(window, axis)
                    side = side[:, before : before + count]
                    grad.narrow(-2, first, count).add_(side if grad.ndim == 3 else side.sum(0))
        elif grads[0] is not None:
            x = self.grad.view(-1, a.tile, b.tile, a.span, b.span).transpose(2, 3)
            x = _sum_offsets(x.reshape(*x.shape[:3], -1))
            x = _sum_offsets(x.reshape(-1, b.tile, b.span, 1)).view(*x.shape[:2], -1)
            (before, first, count), (before2, first2, count2) = map(_offsets, windows, (a, b))
            x = x[:, before : before + count, before2 : before2 + count2]
            grads[0][:, first : first + count, first2 : first2 + count2] += x

    def _of(self, heads: slice, count: int, tiles: int) -> Tensor:
        """The embedding for ``count`` = n*N*R*Q tiles: one for all, [1, M, D], or one for each, [n*N*R*Q, M, D]."""
        if len(self.embedding) == 1:
            return self.embedding
        some = self.embedding[heads]
        return some[None, :, None].expand(count // (len(some) * tiles), -1, tiles, -1, -1).flatten(0, 2)

    def _joined(self, x: Tensor) -> Tensor:
        """[n*N*R*Q, T*T2, C], as one matrix [1, n*N*R*Q*T*T2, C] where there is one embedding for all."""
        return x.view(1, -1, x.shape[2]) if len(self.embedding) == 1 else x

    def _by_key(self, dots: Tensor) -> tuple[Tensor, Tensor]:
        """Views [n, T, T2, S] and [n, T, T2, S2] of [n, T*T2, M]: the entries for query t and key s, T - 1 - t + s."""
        (n, queries, m), (a, b) = dots.shape, (self.a, self.b)
        rows = dots.as_strided(
            (n, a.tile, b.tile, a.span), (queries * m, b.tile * m - 1, m, 1), dots.storage_offset() + a.tile - 1
        )
        first = a.tile + a.span - 1 + b.tile - 1
        columns = dots.as_strided(
            (n, a.tile, b.tile, b.span), (queries * m, b.tile * m, m - 1, 1), dots.storage_offset() + first
        )
        return rows, columns


def _add_spans(total: Tensor, spans: Tensor, rows: slice, a: Axis, b: Axis) -> None:
    """Add key-span gradients [B, G, G2, N, R, Q, S, S2, C] of some tile rows onto the padded map they were cut from."""
    *lead, line, cell, step = total.stride()
    for i in range(0, a.span, a.tile):
        height = min(a.tile, a.span - i)
        for j in range(0, b.span, b.tile):
            width = min(b.tile, b.span - j)
            part = _take(spans, {6: slice(i, i + height), 7: slice(j, j + width)})
            # every tile's part lands on its own cells, so the target is a view without overlap
            first = total.storage_offset() + (rows.start * a.tile + i) * line + j * cell
            total.as_strided(part.shape, (*lead, a.tile * line, b.tile * cell, line, cell, step), first).add_(part)


def _store(target: Tensor, tiles: Tensor, rows: slice, a: Axis, b: Axis) -> None:
    """Write flattened query tiles [B*G*G2*N*R*Q, T*T2, C] of some tile rows to their place in the map."""
    tiles = tiles.view(*target.shape[:4], rows.stop - rows.start, b.tiles, a.tile, b.tile, tiles.shape[-1])
    lines = slice(rows.start * a.tile, min(rows.stop * a.tile, a.length))
    target = _take(target, {4: lines})
    if target.shape[4:6] == (tiles.shape[4] * a.tile, b.tiles * b.tile):  # no ragged tile: one strided copy
        target.unflatten(5, (b.tiles, b.tile)).unflatten(4, (-1, a.tile)).transpose(5, 6).copy_(tiles)
    else:
        tiles = tiles.transpose(5, 6).flatten(6, 7).flatten(4, 5)
        target.copy_(_take(tiles, {4: slice(0, target.shape[4]), 5: slice(0, b.length)}))


class _Chunked(torch.autograd.Function):
    """Attention of all tiles, piece by piece; ``patterns`` are the ``_pattern_bias`` of the plans.

    The output is that of the map padded to a multiple of the dilation.
    """

    @staticmethod
    def forward(ctx, q, k, v, problem, plans, patterns, *tensors):
        ctx.problem, ctx.plans, ctx.patterns = problem, plans, patterns
        # what is one piece keeps its probabilities: a fifth of the time of a backward, for at most 4 bytes x PIECE
        logits = sum(_logits(problem, a, b) for a, b in plans)
        keep = problem.needs_grad and problem.bias is not FactoredBias and logits <= PIECE
        kept = []
        scratch = _Scratch(q, _working(q.dtype))
        qs, ks, vs = (_split_phases(t, problem.dilation) for t in (q, k, v))
        batch, _, _, heads, height, width, _ = qs.shape
        d, d2 = problem.dilation
        out = v.new_empty(batch, height * d, width * d2, heads, v.shape[-1])
        outs = _split_phases(out, problem.dilation)
        for (a, b), pattern in zip(plans, patterns, strict=True):
            bias = _PieceBias(problem, a, b, pattern, tensors)
            for part, heads, groups in _parts(qs.shape, a, b, _piece(problem, a, b)):
                tiles = _query_tiles(_take(qs, part), a, b)
                keys, values = (scratch.spans(n, _take(t, part), a, b) for n, t in (("all k", ks), ("all v", vs)))
                for rows in groups:
                    q_, k_, v_ = (scratch.flat(n, t, rows) for n, t in (("q", tiles), ("k", keys), ("v", values)))
                    weights = bias.probabilities(scratch, q_, k_, heads, rows)
                    _store(_take(outs, part), scratch.bmm("out", weights, v_), rows, a, b)
                    if keep:
                        kept.append(weights)
                        del scratch.held["weights"]
        ctx.save_for_backward(q, k, v, *kept, *tensors)
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True: saying nothing would leave out the terms through q, k and v
            raise RuntimeError(
                "backend 'tiled' gives first derivatives only on a CPU; for create_graph=True use backend='reference'"
            )
        problem, plans = ctx.problem, ctx.plans
        q, k, v, *saved = ctx.saved_tensors
        first = len(saved) - (len(ctx.needs_input_grad) - 6)
        kept, tensors = iter(saved[:first]), saved[first:]
        working = _working(q.dtype)
        scratch = _Scratch(q, working)
        dilation = problem.dilation
        qs, ks, vs, gs = (_split_phases(t, dilation) for t in (q, k, v, grad))
        padded = (qs.shape[0], qs.shape[4] * dilation[0], qs.shape[5] * dilation[1], qs.shape[3])
        grads = [t.new_empty(*padded, t.shape[-1]) for t in (q, k, v)]
        dqs, dks, dvs = (_split_phases(t, dilation) for t in grads)
        bias_grads = [
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, working)) if needed else None
            for t, needed in zip(tensors, ctx.needs_input_grad[6:], strict=True)
        ]
        for (a, b), pattern in zip(plans, ctx.patterns, strict=True):
            bias = _PieceBias(problem, a, b, pattern, tensors)
            apart = (a.span, b.span, a.before, b.before) == (a.tile, b.tile, 0, 0)  # every key is in one span only
            for part, heads, groups in _parts(qs.shape, a, b, _piece(problem, a, b)):
                tiles, grad_tiles = _query_tiles(_take(qs, part), a, b), _query_tiles(_take(gs, part), a, b)
                keys, values = (scratch.spans(n, _take(t, part), a, b) for n, t in (("all k", ks), ("all v", vs)))
                targets = [_take(t, part) for t in (dks, dvs)]
                sums = [
                    None if apart else scratch(n, *_padded_shape(t, a, b)).zero_()
                    for n, t in zip(("all dk", "all dv"), targets, strict=True)
                ]
                for rows in groups:
                    named = (("q", tiles), ("k", keys), ("v", values), ("grad", grad_tiles))
                    q_, k_, v_, grad_ = (scratch.flat(name, t, rows) for name, t in named)
                    weights = next(kept, None)
                    if weights is None:
                        weights = bias.probabilities(scratch, q_, k_, heads, rows)
                    logit_grad = scratch.bmm("logits", grad_, v_.transpose(1, 2))
                    torch.ops.aten._softmax_backward_data.out(
                        logit_grad, weights, -1, logit_grad.dtype, grad_input=logit_grad
                    )
                    # from here on, each product takes the place of the factor that is not needed again
                    dv = scratch.bmm("v", weights.transpose(1, 2), grad_)
                    dq = scratch.bmm("grad", logit_grad, k_, problem.scale)
                    bias.add_grad(scratch, q_, dq, logit_grad, heads, rows)
                    _store(_take(dqs, part), dq, rows, a, b)
                    dk = scratch.bmm("k", logit_grad.transpose(1, 2), q_, problem.scale)
                    for spans, like, target, total in zip((dk, dv), (keys, values), targets, sums, strict=True):
                        if apart:
                            _store(target, spans, rows, a, b)
                        else:
                            _add_spans(total, _unflat(spans, like, rows), rows, a, b)
                if not apart:
                    for target, total in zip(targets, sums, strict=True):
                        target.copy_(_inner(total, a, b))
            bias.add_to(bias_grads)
        dq, dk, dv = (t[:, : q.shape[1], : q.shape[2]] for t in grads)
        bias_grads = (None if g is None else g.to(t.dtype) for g, t in zip(bias_grads, tensors, strict=True))
        return dq, dk, dv, None, None, None, *bias_grads


def _logits(problem: Problem, a: Axis, b: Axis) -> int:
    """Query-key pairs of one plan."""
    tiles = problem.shape[0] * problem.shape[3] * (a.stop - a.first) * (b.stop - b.first) * a.tiles * b.tiles
    return tiles * a.tile * b.tile * a.span * b.span


def _piece(problem: Problem, a: Axis, b: Axis) -> int:
    """Logits of a piece of one plan. Fewer with the factored bias, where the layers are few and their memory counts
    (HaloNet): about a quarter of all at most, so that even a small map is never unfolded as a whole."""
    return PIECE if problem.bias is not FactoredBias else max(1, min(PIECE, _logits(problem, a, b)) // 4)


def _working(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums are held in: a float16 logit overflows at 65,504, and bfloat16 has three digits."""
    return torch.promote_types(dtype, torch.float32)


def _unflat(x: Tensor, like: Tensor, rows: slice) -> Tensor:
    return x.view(*like.shape[:4], rows.stop - rows.start, *like.shape[5:8], x.shape[-1])


def forward(q: Tensor, k: Tensor, v: Tensor, bias_tensors: tuple[Tensor, ...], problem: Problem) -> Tensor:
    """[B, H, W, N, D] x [B, H, W, N, D] x [B, H, W, N, V] -> [B, H, W, N, V]."""
    height, width = (operator.index(n) for n in problem.shape[1:3])  # tracers: the plan is for this size, a constant
    if torch.compiler.is_compiling():
        r, c = problem.rows, problem.columns
        plans = _compile_time_plan(
            (r.kernel_size, r.stride, r.dilation, r.boundary),
            (c.kernel_size, c.stride, c.dilation, c.boundary),
            height,
            width,
        )
    else:
        plans = plan(problem.rows, problem.columns, height, width)
    table = bias_tensors[0] if problem.bias is TableBias else None
    rows, columns = plans[0]
    large = rows.tile * rows.span * columns.tile * columns.span > PIECE  # one tile alone is more than a piece
    chunked = (
        not problem.tracing
        and not torch._C._are_functorch_transforms_active()  # grad and vmap of torch.func want standard operators
        and problem.device == "cpu"
        and not (large and problem.bias is None)  # plain attention: fused, and without the logits in memory
        and problem.dropout_p == 0
        and type(q) in (Tensor, torch.nn.Parameter)
    )
    if chunked:
        patterns = _patterns(table, problem, plans)
        return _crop(_Chunked.apply(q, k, v, problem, plans, patterns, *bias_tensors), height, width)
    parts = [_split_phases(t, problem.dilation) for t in (q, k, v)]
    out = _attend(*parts, bias_tensors, problem, plans)
    return _crop(out.permute(0, 4, 1, 5, 2, 3, 6).flatten(3, 4).flatten(1, 2), height, width)


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    return x if tuple(x.shape[1:3]) == (height, width) else x[:, :height, :width].contiguous()
