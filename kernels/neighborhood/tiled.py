"""Neighborhood attention in plain PyTorch operations: the default on CPUs, for compilers and for exporters.

The map is cut into tiles of queries with one span of keys each (``kernels/tiling.py``). A tile is one small dense
attention with a mask: a few batched matrix products instead of a gather of K keys for each query.

Four forms; the first two share the planning, the views and the bias:

* ``_attend``: standard operators on all tiles at once, for other devices, the exporters and dropout; ``_gathered`` for
  graphs that leave PyTorch.
* ``_Chunked``: eager mode on a CPU, forward and backward in chunks that stay in the CPU's cache. The backward pass
  keeps only q, k, v and the bias, and for small calls the probabilities. ``torch.compile`` calls it as one node.
* ``_one_window`` and ``_by_rows``: eager mode on a CPU, for a map that every query sees completely, a small one with
  the decomposed bias (HaloNet's last maps) and a large one with a table.

B batch, H W map, N heads, C channels, G G2 dilation groups of rows and columns, R Q tiles of rows and columns,
T T2 queries of a tile, S S2 keys of its span, P P2 patterns: tiles with the same windows relative to the tile.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from .. import flops, tiling
from ..bias import Bias, DecomposedRelativePositionBias, RelativePositionBias
from ..cache import CONSTANTS, TensorCache
from ..problem import Problem
from ..tiling import AxisTiling, Plans, Scratch
from ..tracing import leaves_pytorch, transformed
from ..window import Window, pairs_of, window_list, windows_of

# What copying one key and value into a span, and adding its gradient back, costs in units of one query-key pair; fitted
# on a 2-core CPU.
COPY_COST = 64.0


def unsupported_reason(problem: Problem) -> str | None:
    """Supports every call on any device."""
    return None


def _cost(a: AxisTiling, b: AxisTiling) -> float:
    """Cost of the tiles of one dilation group, in query-key pairs."""
    pairs = tiling.pairs(a, b)
    if a.tiles == b.tiles == 1 and a.span == a.length and b.span == b.length:  # no copy
        return pairs
    patterns = len(a.samples) * len(b.samples) * a.tile * a.span * b.tile * b.span
    copied = a.tiles * a.span * b.tiles * b.span
    return pairs + patterns + COPY_COST * copied


# -------------------------------------------------------------------------------------- mask and table of a tile


def _pattern_index(window: Window, axis: AxisTiling, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(row, seen)`` of every pattern, both [P, T, S]: row of the bias table, and whether the query sees the key."""
    tile = torch.tensor(axis.samples, device=device)[:, None, None]
    query = tile * axis.tile + torch.arange(axis.tile, device=device)[:, None]
    query = ((query - axis.ahead).clamp(min=0) if axis.ahead else query).clamp(max=axis.queries - 1)
    key = tile * axis.step - axis.before + torch.arange(axis.span, device=device)
    offset = key - window.starts(query, axis.length)
    seen = (offset >= 0) & (offset < window.kernel_size)
    if window.boundary == "mask":
        seen = seen & (key >= 0) & (key < axis.length)
    row = window.table_row(key, query).clamp(0, 2 * window.kernel_size - 2)
    return row, seen


def _pattern_mask(
    rows: Window, columns: Window, a: AxisTiling, b: AxisTiling, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """0 where the query sees the key, else -inf: [P, P2, T*T2, S*S2]."""
    seen = _pattern_index(rows, a, device)[1][:, None, :, None, :, None]
    seen = seen & _pattern_index(columns, b, device)[1][None, :, None, :, None, :]
    zero = torch.zeros((), dtype=dtype, device=device)
    mask = torch.where(seen, zero, float("-inf"))
    return mask.reshape(len(a.samples), len(b.samples), a.tile * b.tile, a.span * b.span)


def _pattern_bias(
    table: Tensor | None,
    rows: Window,
    columns: Window,
    a: AxisTiling,
    b: AxisTiling,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Table plus mask for each pattern of tiles, [N or 1, P, P2, T*T2, S*S2]; None if neither is needed."""
    mask = None
    if a.masked or b.masked:
        mask = CONSTANTS.get(_pattern_mask, rows, columns, a, b, dtype, device)[None]
    if table is None:
        return mask
    row = CONSTANTS.get(_pattern_index, rows, a, device)[0]
    column = CONSTANTS.get(_pattern_index, columns, b, device)[0]
    bias = table.index_select(1, row.flatten()).index_select(2, column.flatten())
    bias = bias.unflatten(2, column.shape).unflatten(1, row.shape)  # N P T S P2 T2 S2
    bias = bias.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    return bias if mask is None else bias + mask


def _patterns(
    table: Tensor | None, rows: Window, columns: Window, size: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """``_pattern_bias`` of each plan for a map of ``size`` on the CPU, without a gradient."""
    with torch.inference_mode(False), torch.no_grad():
        table = None if table is None else table.to(dtype)
        plans = tiling.plan(rows, columns, *size, _cost)
        return tuple(_pattern_bias(table, rows, columns, a, b, dtype, torch.device("cpu")) for a, b in plans)


# -------------------------------------------------------------------------------------- all tiles at once


def _tile_bias(
    table: Tensor | None, problem: Problem, a: AxisTiling, b: AxisTiling, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """``_pattern_bias`` of every tile, [N or 1, R, Q, T*T2, S*S2]."""
    added = _pattern_bias(table, problem.rows, problem.columns, a, b, dtype, device)
    if added is None:
        return None
    for dim, axis in ((1, a), (2, b)):
        if len(axis.runs) > 1:
            added = added.index_select(dim, CONSTANTS.get(tiling.pattern_order, axis, device))
        else:
            added = added.expand(*(axis.tiles if i == dim else -1 for i in range(5)))
    return added


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, problem: Problem, plans: Plans) -> Tensor:
    """Standard operators only; maps [B, H, W, N, C]."""
    if leaves_pytorch() and not isinstance(bias, DecomposedRelativePositionBias):
        return _gathered(q, k, v, None if bias is None else bias.table, problem, plans)
    outs = []
    working = tiling.working_dtype(q.dtype)
    table = bias.table.to(working) if isinstance(bias, RelativePositionBias) else None
    heads = q.shape[3]
    q, k, v = (tiling.split_groups(t, problem.dilation) for t in (q, k, v))
    for a, b in plans:
        tiles = tiling.query_tiles(tiling.select_groups(q, a, b), a, b)
        queries = tiles.flatten(6, 7)
        keys, values = (
            tiling.key_spans(tiling.pad_keys(tiling.select_groups(t, a, b), a, b), a, b).flatten(6, 7) for t in (k, v)
        )
        added = _tile_bias(table, problem, a, b, working, q.device)
        if isinstance(bias, DecomposedRelativePositionBias):
            decomposed = _decomposed_bias(tiles.to(working), bias, problem, a, b)
            added = decomposed if added is None else added + decomposed
        # Exporters get the products: they decompose SDPA into a kernel with other strides, on which later views fail,
        # and torch.jit.trace would record the batch size. So do torch.func's transforms: the kernel has no forward-mode
        # derivative and, under vmap, none of the bias.
        products = torch.compiler.is_exporting() or torch.jit.is_tracing() or transformed()
        if products or problem.dropout_p > 0 or (added is not None and added.ndim == 8):
            logits = (queries.to(working) * problem.scale) @ keys.to(working).transpose(-1, -2)
            weights = (logits if added is None else logits + added).softmax(-1).to(values.dtype)
            out = F.dropout(weights, problem.dropout_p) @ values
        else:
            batch = queries.shape[:3]
            if added is not None:
                added = added.to(q.dtype).expand(heads, -1, -1, -1, -1).flatten(0, 2)[None]
            out = F.scaled_dot_product_attention(
                *(t.flatten(3, 5).flatten(0, 2) for t in (queries, keys, values)), attn_mask=added, scale=problem.scale
            )
            out = out.unflatten(1, (heads, a.tiles, b.tiles)).unflatten(0, batch)
        outs.append(tiling.from_query_tiles(out.unflatten(6, (a.tile, b.tile)), a, b))
    return tiling.join(outs, plans, problem)


def _positions(axis: AxisTiling, dilation: int, outside: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the queries, [G, R, T], and the keys, [G, R, S], of all dilation groups and tiles of an axis are on the
    map; a tile that lacks queries repeats one."""
    group, tile = np.arange(axis.first, axis.stop)[:, None, None], np.arange(axis.tiles)[:, None]
    query = (tile * axis.tile + np.arange(axis.tile) - axis.ahead).clip(0, axis.queries - 1)
    key = tile * axis.step + np.arange(axis.span) - axis.before
    inside = (key >= 0) & (key < axis.length)
    return query * dilation + group, np.where(inside, key * dilation + group, outside)


def _on_map(rows: np.ndarray, columns: np.ndarray, width: int) -> np.ndarray:
    """Positions [G, R, T] on rows and [G2, Q, T2] on columns as those on a flattened map, [G*G2, R*Q, T*T2]."""
    at = rows[:, None, :, None, :, None] * width + columns[None, :, None, :, None, :]
    return at.reshape(len(rows) * len(columns), rows.shape[1] * columns.shape[1], -1)


def _select(x: Tensor, at: np.ndarray) -> Tensor:
    """Positions ``at`` [M, T] of a map [B, N, H*W, C] by one gather with constant indices: [B, N, M, T, C]."""
    if not np.array_equal(at.ravel(), np.arange(operator.index(x.shape[2]))):
        x = x.index_select(2, torch.tensor(at.ravel().tolist(), device=x.device))
    return x.unflatten(2, at.shape)


def _gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, problem: Problem, plans: Plans) -> Tensor:
    """`_attend` for other runtimes, where transposes of many dimensions are slow, and a softmax over more than five is
    not fused: tiles are gathered from maps [B, N, H*W, C], and the output from the tiles."""
    working, count = tiling.working_dtype(q.dtype), math.prod(problem.size)
    maps = [t.flatten(1, 2).transpose(1, 2) for t in (q.to(working), k.to(working), v)]
    if zero := problem.boundary == "zero":  # what the keys outside read
        maps[1:] = (F.pad(t, (0, 0, 0, 1)) for t in maps[1:])
    table = None if table is None else table.to(working)
    outs, slots, total = [], np.empty((1, math.prod(problem.query_size)), dtype=np.int64), 0
    for a, b in plans:
        rows, columns = (_positions(axis, d, count) for axis, d in zip((a, b), problem.dilation, strict=True))
        queries = _on_map(rows[0], columns[0], problem.query_size[1])
        keys = _on_map(rows[1], columns[1], problem.size[1]).clip(max=count - (not zero))
        (groups, each, _), span = queries.shape, keys.shape[2]
        slots[0, queries.ravel()] = total + np.arange(queries.size)
        total += queries.size
        places = (queries.reshape(groups * each, -1), *2 * (keys.reshape(-1, span),))
        tiles = [_select(t, at) for t, at in zip(maps, places, strict=True)]  # B N G*G2*R*Q T*T2 C
        logits = (tiles[0] * problem.scale) @ tiles[1].transpose(-1, -2)
        added = _tile_bias(table, problem, a, b, working, q.device)
        if added is not None:
            added = added.flatten(1, 2)  # N or 1, R*Q, T*T2, S*S2
            if groups > 1 and each > 1:
                added = added[:, None].expand(-1, groups, -1, -1, -1).flatten(1, 2)
            logits = logits + added
        out = F.dropout(logits.softmax(-1).to(v.dtype), problem.dropout_p) @ tiles[2]
        outs.append(out.flatten(2, 3))
    out = _select(torch.cat(outs, 2) if len(outs) > 1 else outs[0], slots)[:, :, 0]
    return out.transpose(1, 2).unflatten(1, problem.query_size)


def _decomposed_bias(
    tiles: Tensor, bias: DecomposedRelativePositionBias, problem: Problem, a: AxisTiling, b: AxisTiling
) -> Tensor:
    """q . rows + q . columns for every query and key of a tile: [B, G, G2, N, R, Q, T*T2, S*S2]."""
    sides = []
    for embedding, window, axis, (tile_dim, query_dim) in zip(
        bias.tensors, problem.windows, (a, b), ((4, 6), (5, 7)), strict=True
    ):
        embedding = (embedding if embedding.ndim == 3 else embedding[None]).to(tiles.dtype)
        dots = tiles @ embedding.transpose(-1, -2)[:, None, None, None]  # B G G2 N R Q T T2 2K-1
        row = CONSTANTS.get(_pattern_index, window, axis, tiles.device)[0]  # P T S
        row = row[CONSTANTS.get(tiling.pattern_order, axis, tiles.device)]  # R T S
        shape = [1] * 9
        shape[tile_dim], shape[query_dim], shape[8] = row.shape
        sides.append(dots.gather(-1, row.reshape(shape).expand(*dots.shape[:8], -1)))
    return (sides[0].unsqueeze(-1) + sides[1].unsqueeze(-2)).flatten(8, 9).flatten(6, 7)


# ------------------------------------------------------------------------------------------- chunk by chunk


def _offsets(window: Window, axis: AxisTiling) -> tuple[int, int, int]:
    """Rows of a bias table for the offsets between queries and keys of a tile, ``(before, first, count)``: ``before``
    offsets outside the table, then ``count`` rows from ``first`` on."""
    first = window.kernel_size - 1 - (axis.before - axis.ahead) - axis.between * (axis.tile - 1)
    last = min(first + axis.offsets, 2 * window.kernel_size - 1)
    return max(-first, 0), max(first, 0), last - max(first, 0)


def _sum_offsets(x: Tensor, axis: AxisTiling) -> Tensor:
    """[N, T, S, Z] -> [N, M, Z]: sums over all query-key pairs with the same offset."""
    n, t, _, z = x.shape
    m, step = axis.offsets, axis.between
    shifted = x.new_zeros(n, t, m, z)
    shifted.as_strided(x.shape, (t * m * z, (m - step) * z, z, 1), step * (t - 1) * z).copy_(x)
    return shifted.sum(1)


class _ChunkBias:
    """Bias of one plan during the computation of its chunks, and the sum of its gradients.

    A table is part of ``patterns``, with the mask. The decomposed bias of a chunk is the product of its queries with
    ``embedding`` [N or 1, M + M2, D]: the rows of both embeddings for the offsets inside a tile, equal for all tiles.
    """

    def __init__(
        self, problem: Problem, a: AxisTiling, b: AxisTiling, patterns: Tensor | None, tensors: Sequence[Tensor]
    ):
        self.problem, self.a, self.b, self.patterns, self.embedding = problem, a, b, patterns, None
        if problem.bias is DecomposedRelativePositionBias:
            sides = []
            for t, window, axis in zip(tensors, problem.windows, (a, b), strict=True):
                before, first, count = _offsets(window, axis)
                side = (t if t.ndim == 3 else t[None]).to(tiling.working_dtype(problem.dtype)).narrow(1, first, count)
                after = axis.offsets - before - count
                sides.append(F.pad(side, (0, 0, before, after)) if before or after else side)
            heads = max(len(t) for t in sides)
            self.embedding = torch.cat([t.expand(heads, -1, -1) for t in sides], 1)
        self.grad: Tensor | None = None  # of the embedding, or of the table as [N, T*T2, S*S2]

    def probabilities(self, scratch: Scratch, q: Tensor, k: Tensor, heads: slice, rows: slice) -> Tensor:
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
            for r, c, p, p2 in tiling.blocks(rows, self.a, self.b):
                shaped[:, :, r, c].add_(patterns[:, p, p2, None, None])
        return torch.softmax(logits, -1, out=logits)

    def add_grad(self, scratch: Scratch, q: Tensor, dq: Tensor, logit_grad: Tensor, heads: slice, rows: slice) -> None:
        """Accumulate the gradient of a chunk's logits; add the gradient through the decomposed bias to ``dq``."""
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
                # not `@`, which an autocast around the backward would cast
                products = scratch.bmm("products", dots.transpose(1, 2), q)
                self.grad[heads] += products.view(-1, heads.stop - heads.start, tiles, *embedding.shape[1:]).sum((0, 2))
            dq.baddbmm_(dots, embedding)
        elif self.problem.bias is RelativePositionBias:
            if self.grad is None:
                self.grad = logit_grad.new_zeros(self.problem.shape[3], *logit_grad.shape[1:])
            shaped = logit_grad.view(-1, heads.stop - heads.start, tiles, *logit_grad.shape[1:])
            shaped = shaped.sum(2) if tiles > 1 else shaped[:, :, 0]  # a single sum over both is 15 times slower
            self.grad[heads] += shaped.sum(0)

    def add_to(self, grads: list[Tensor | None]) -> None:
        """Add the sum to the gradients of the bias tensors; None for those that are not needed."""
        if self.grad is None:  # no bias, or no chunk: an empty batch
            return
        a, b, windows = self.a, self.b, self.problem.windows
        if self.embedding is not None:
            sides = self.grad.split((a.offsets, b.offsets), 1)
            for grad, side, window, axis in zip(grads, sides, windows, (a, b), strict=True):
                if grad is not None:
                    before, first, count = _offsets(window, axis)
                    side = side[:, before : before + count]
                    grad.narrow(-2, first, count).add_(side if grad.ndim == 3 else side.sum(0))
        elif grads[0] is not None:
            x = self.grad.view(-1, a.tile, b.tile, a.span, b.span).transpose(2, 3)
            x = _sum_offsets(x.reshape(*x.shape[:3], -1), a)
            x = _sum_offsets(x.reshape(-1, b.tile, b.span, 1), b).view(*x.shape[:2], -1)
            (before, first, count), (before2, first2, count2) = map(_offsets, windows, (a, b))
            x = x[:, before : before + count, before2 : before2 + count2]
            grads[0][:, first : first + count, first2 : first2 + count2] += x

    def _of(self, heads: slice, count: int, tiles: int) -> Tensor:
        """The embedding for ``count`` = n*N*R*Q tiles: shared, [1, M, D], or one per tile, [n*N*R*Q, M, D]."""
        assert self.embedding is not None
        if len(self.embedding) == 1:
            return self.embedding
        some = self.embedding[heads]
        return some[None, :, None].expand(count // (len(some) * tiles), -1, tiles, -1, -1).flatten(0, 2)

    def _joined(self, x: Tensor) -> Tensor:
        """[n*N*R*Q, T*T2, C], as one matrix [1, n*N*R*Q*T*T2, C] if the embedding is shared."""
        assert self.embedding is not None
        return x.view(1, -1, x.shape[2]) if len(self.embedding) == 1 else x

    def _by_key(self, dots: Tensor) -> tuple[Tensor, Tensor]:
        """Views [n, T, T2, S] and [n, T, T2, S2] of [n, T*T2, M + M2], by query and key instead of by offset."""
        (n, queries, m), (a, b) = dots.shape, (self.a, self.b)
        first = dots.storage_offset() + a.between * (a.tile - 1)
        rows = dots.as_strided((n, a.tile, b.tile, a.span), (queries * m, b.tile * m - a.between, m, 1), first)
        first = dots.storage_offset() + a.offsets + b.between * (b.tile - 1)
        columns = dots.as_strided((n, a.tile, b.tile, b.span), (queries * m, b.tile * m, m - b.between, 1), first)
        return rows, columns


def _mixing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the products of probabilities and values, with sums in float32: bfloat16 where oneDNN has it."""
    if (
        dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return dtype
    return tiling.working_dtype(dtype)


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    problem: Problem,
    plans: Plans,
    patterns: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor]]:
    """Attention of all tiles, chunk by chunk, and the probabilities that are kept for the backward pass; ``patterns``
    are the ``_pattern_bias`` of the plans. The output is that of the map padded to a multiple of the dilation."""
    # a single chunk keeps its probabilities: saves a fifth of the backward for at most 4 bytes x CHUNK
    logits = sum(_logits(problem, a, b) for a, b in plans)
    keep = problem.needs_grad and problem.bias is not DecomposedRelativePositionBias and logits <= tiling.CHUNK
    kept = []
    scratch = Scratch(q, tiling.working_dtype(q.dtype))
    mixing = _mixing_dtype(v.dtype)
    qs, ks, vs = (tiling.split_groups(t, problem.dilation) for t in (q, k, v))
    out = _map_of_groups(v, (*qs.shape[:6], v.shape[-1]), problem.dilation)
    outs = tiling.split_groups(out, problem.dilation)
    for (a, b), pattern in zip(plans, patterns, strict=True):
        bias = _ChunkBias(problem, a, b, pattern, tensors)
        for index, heads, tile_rows in tiling.chunks(qs.shape, a, b, _chunk_size(problem, a, b)):
            tiles = tiling.query_tiles(tiling.take(qs, *index), a, b)
            keys = scratch.spans("all k", tiling.take(ks, *index), a, b)
            values = scratch.spans("all v", tiling.take(vs, *index), a, b, mixing)
            for rows in tile_rows:
                q_, k_ = (scratch.flat(name, t, rows) for name, t in (("q", tiles), ("k", keys)))
                v_ = scratch.flat("v", values, rows, mixing)
                weights = factors = bias.probabilities(scratch, q_, k_, heads, rows)
                if weights.dtype != mixing:
                    factors = scratch("factors", *weights.shape, dtype=mixing).copy_(weights)
                target = tiling.take(outs, *index)
                tiling.store(target, scratch.bmm("out", factors, v_), rows, (a.tile, b.tile), (a.ahead, b.ahead))
                if keep:
                    kept.append(weights)
                    del scratch.held["weights"]
    return out, kept


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    wanted: Sequence[bool],
    problem: Problem,
    plans: Plans,
    patterns: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and of those tensors of the bias that are ``wanted``; arguments as of `_in_chunks`."""
    probabilities = iter(kept)
    working = tiling.working_dtype(q.dtype)
    scratch = Scratch(q, working)
    maps = [tiling.split_groups(t, problem.dilation) for t in (q, k, v, grad)]
    grads = [_map_of_groups(q, t.shape, problem.dilation) for t in maps[:3]]
    targets = [tiling.split_groups(t, problem.dilation) for t in grads]
    bias_grads = [
        torch.zeros_like(t, dtype=torch.promote_types(t.dtype, working)) if needed else None
        for t, needed in zip(tensors, wanted, strict=True)
    ]
    for (a, b), pattern in zip(plans, patterns, strict=True):
        bias = _ChunkBias(problem, a, b, pattern, tensors)
        for index, heads, tile_rows in tiling.chunks(maps[0].shape, a, b, _chunk_size(problem, a, b)):
            chunk, into = ([tiling.take(t, *index) for t in each] for each in (maps, targets))
            _chunk_backward(chunk, into, heads, tile_rows, bias, probabilities, scratch)
        bias.add_to(bias_grads)
    dq, dk, dv = (t[:, : x.shape[1], : x.shape[2]] for t, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, *(None if g is None else g.to(t.dtype) for g, t in zip(bias_grads, tensors, strict=True))


class _Chunked(torch.autograd.Function):
    """`_in_chunks` with `_gradients`."""

    @staticmethod
    def forward(ctx, q, k, v, problem, plans, patterns, *tensors):
        ctx.call = problem, plans, patterns
        out, kept = _in_chunks(q, k, v, tensors, *ctx.call)
        ctx.save_for_backward(q, k, v, *kept, *tensors)
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True: the terms through q, k and v would be missing
            raise RuntimeError(
                "backend 'tiled' has no second derivatives on a CPU; for create_graph=True use backend='reference'"
            )
        wanted = ctx.needs_input_grad[6:]
        q, k, v, *saved = ctx.saved_tensors
        first = len(saved) - len(wanted)
        kept, tensors = saved[:first], saved[first:]
        dq, dk, dv, *grads = _gradients(grad, q, k, v, tensors, kept, wanted, *ctx.call)
        return dq, dk, dv, None, None, None, *grads


def _map_of_groups(like: Tensor, groups: tuple[int, ...], dilation: tuple[int, int]) -> Tensor:
    """An uninitialised map whose dilation groups have the shape [B, G, G2, N, h, w, C] without padding."""
    batch, _, _, heads, height, width, channels = groups
    return like.new_empty(batch, height * dilation[0], width * dilation[1], heads, channels)


def _chunk_backward(
    chunk: list[Tensor],
    targets: list[Tensor],
    heads: slice,
    tile_rows: list[slice],
    bias: _ChunkBias,
    kept: Iterator[Tensor],
    scratch: Scratch,
) -> None:
    """Gradients of the chunk (q, k, v and the output's gradient) into ``targets``; ``kept``: its probabilities."""
    a, b, scale = bias.a, bias.b, bias.problem.scale
    ahead = a.ahead, b.ahead
    apart = (a.span, b.span, a.before, b.before) == (a.step, b.step, *ahead)  # spans do not overlap
    q, k, v, grad = chunk
    tiles, grad_tiles = tiling.query_tiles(q, a, b), tiling.query_tiles(grad, a, b)
    keys, values = scratch.spans("all k", k, a, b), scratch.spans("all v", v, a, b)
    sums: list[Any] = [
        None if apart else scratch(name, *tiling.padded_shape(t, a, b)).zero_()
        for name, t in zip(("all dk", "all dv"), targets[1:], strict=True)
    ]
    for rows in tile_rows:
        named = (("q", tiles), ("k", keys), ("v", values), ("grad", grad_tiles))
        q_, k_, v_, grad_ = (scratch.flat(name, t, rows) for name, t in named)
        weights = next(kept, None)
        if weights is None:
            weights = bias.probabilities(scratch, q_, k_, heads, rows)
        logit_grad = scratch.bmm("logits", grad_, v_.transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(logit_grad, weights, -1, logit_grad.dtype, grad_input=logit_grad)
        # from here on, each product reuses the memory of a factor that is not needed again
        dv = scratch.bmm("v", weights.transpose(1, 2), grad_)
        dq = scratch.bmm("grad", logit_grad, k_, scale)
        bias.add_grad(scratch, q_, dq, logit_grad, heads, rows)
        tiling.store(targets[0], dq, rows, (a.tile, b.tile), ahead)
        dk = scratch.bmm("k", logit_grad.transpose(1, 2), q_, scale)
        for spans, like, target, total in zip((dk, dv), (keys, values), targets[1:], sums, strict=True):
            if apart:
                tiling.store(target, spans, rows, (a.span, b.span), ahead)
            else:
                spans = spans.view(*like.shape[:4], rows.stop - rows.start, *like.shape[5:8], spans.shape[-1])
                tiling.add_spans(total, spans, rows, a, b)
    if not apart:
        for target, total in zip(targets[1:], sums, strict=True):
            target.copy_(tiling.inner(total, a, b))


def _logits(problem: Problem, a: AxisTiling, b: AxisTiling) -> int:
    """Query-key pairs of one plan, over images, heads and dilation groups."""
    return problem.shape[0] * problem.shape[3] * (a.stop - a.first) * (b.stop - b.first) * tiling.pairs(a, b)


def _chunk_size(problem: Problem, a: AxisTiling, b: AxisTiling) -> int:
    """Logits of a chunk of one plan. With the decomposed bias at most about a quarter of all, to save memory
    (HaloNet has few, large layers)."""
    if problem.bias is not DecomposedRelativePositionBias:
        return tiling.CHUNK
    return max(1, min(tiling.CHUNK, _logits(problem, a, b)) // 4)


# -------------------------------------------------------------------------------------- a map in one window


def _window_rows(window: Window, length: int, device: torch.device) -> Tensor:
    """Row of the bias table for each query and key of the window that all queries share, [T, K]: first the keys inside
    the map, then the others."""
    key = window.start(0, length) + torch.arange(window.kernel_size, device=device)
    inside = (key >= 0) & (key < length)
    key = torch.cat([key[inside], key[~inside]])
    return window.table_row(key, torch.arange(window.queries(length), device=device)[:, None])


def _in_one_window(problem: Problem) -> bool:
    """Whether all queries share one window that covers the map, and their logits fit one chunk."""
    if problem.boundary == "shift":
        return False
    for window, length in zip(problem.windows, problem.size, strict=True):
        start, blocks = window.start(0, length), window.stride < length or window.offset
        if window.dilation > 1 or blocks or start > 0 or start + window.kernel_size < length:
            return False
    count = problem.shape[0] * problem.shape[3] * math.prod(problem.query_size) * math.prod(problem.size)
    return count <= tiling.CHUNK


def _one_window(q: Tensor, k: Tensor, v: Tensor, bias: DecomposedRelativePositionBias, problem: Problem) -> Tensor:
    """Attention to all keys of the map and, with boundary "zero", to one extra key with a zero value that stands for
    all keys outside: their logits are row bias + column bias, so the sum of their exponentials factorises.
    Standard operators, differentiated by autograd; maps [B, H, W, N, C]."""
    working, (height, width) = tiling.working_dtype(q.dtype), problem.size
    queries, keys, values = (t.to(working).permute(0, 3, 1, 2, 4).flatten(2, 3) for t in (q, k, v))  # B N HW C
    heads = q.shape[3] if any(t.ndim == 3 for t in bias.tensors) else 1
    embedding = [t.expand(heads, -1, -1).to(working) for t in bias.tensors]
    embedding = torch.cat(embedding, 1).transpose(1, 2)  # N or 1, D, 2Kh-1 + 2Kw-1
    dots = (queries @ (embedding if heads > 1 else embedding[0])).unflatten(2, problem.query_size)
    row = CONSTANTS.get(_window_rows, problem.rows, height, q.device)[:, None]
    column = CONSTANTS.get(_window_rows, problem.columns, width, q.device) + 2 * problem.rows.kernel_size - 1
    by_row, by_column = (dots.gather(-1, at.expand(*dots.shape[:4], -1)) for at in (row, column))  # B N h w K
    near_row, far_row = by_row.split((height, problem.rows.kernel_size - height), -1)
    near_column, far_column = by_column.split((width, problem.columns.kernel_size - width), -1)

    logits = torch.matmul(queries * problem.scale, keys.transpose(2, 3)).view(*dots.shape[:4], height, width)
    logits = (logits + (near_row[..., None] + near_column[..., None, :])).flatten(4).flatten(2, 3)
    if problem.boundary == "zero" and problem.kernel_size != problem.size:
        # outside: a row outside and any column, or a row inside and a column outside
        outside = torch.logaddexp(
            far_row.logsumexp(-1) + by_column.logsumexp(-1), near_row.logsumexp(-1) + far_column.logsumexp(-1)
        )
        weights = torch.cat([logits, outside.flatten(2)[..., None]], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    out = (weights @ values).to(v.dtype).unflatten(2, problem.query_size)
    return out.permute(0, 2, 3, 1, 4).contiguous()


def _by_rows(q: Tensor, k: Tensor, v: Tensor, table: Tensor, problem: Problem) -> Tensor:
    """Attention of every position of a large map to every other, with a table, a few rows of queries at a time: their
    bias is a part of the table expanded along columns alone, [N, 2Kh-1, w, W], and is not kept."""
    working, (height, width) = tiling.working_dtype(q.dtype), problem.size
    queries, keys, values = (t.to(working).permute(0, 3, 1, 2, 4) for t in (q, k, v))  # B N H W C
    keys, values = keys.flatten(2, 3), values.flatten(2, 3)
    column = problem.columns.table_row(torch.arange(width), torch.arange(width)[:, None])
    expanded = table.to(working).index_select(2, column.flatten()).unflatten(2, column.shape)
    step, outs = max(1, tiling.CHUNK // (q.shape[3] * width * height * width)), []
    for first in range(0, height, step):
        arguments = queries[:, :, first : first + step], keys, values, expanded, first, problem
        outs.append(
            checkpoint(_some_rows, *arguments, use_reentrant=False) if problem.needs_grad else _some_rows(*arguments)
        )
    return torch.cat(outs, 2).permute(0, 2, 3, 1, 4).to(v.dtype).contiguous()


def _some_rows(q: Tensor, k: Tensor, v: Tensor, expanded: Tensor, first: int, problem: Problem) -> Tensor:
    """The rows from ``first`` on of `_by_rows`: [B, N, T, W, V]."""
    last, (height, width) = problem.rows.kernel_size - 1, problem.size
    parts = [expanded.narrow(1, last - row, height) for row in range(first, first + q.shape[2])]
    bias = torch.stack(parts, 1).transpose(2, 3).flatten(3).flatten(1, 2)[None]  # 1 N T*W H*W
    out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=bias, scale=problem.scale)
    return out.unflatten(2, (-1, width))


# ------------------------------------------------------------------------------------- one node of a compiled graph


@lru_cache(maxsize=256)
def _cache_at(address: int) -> TensorCache:
    """The expansions of the table at an address; the cache compares its values."""
    return TensorCache()


def _call(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, second: Tensor | None, window: list[int], scale: float
) -> tuple[Bias | None, Problem]:
    rows, columns = windows_of(tuple(window))
    bias: Bias | None = None
    if second is not None:
        bias = DecomposedRelativePositionBias(first, second, columns.counted)
    elif first is not None:
        bias = RelativePositionBias(first, _cache_at(first.data_ptr()))
    shape, kind = tuple(k.shape), None if bias is None else type(bias)
    return bias, Problem(shape, v.shape[4], rows, columns, q.dtype, q.device.type, False, False, bias=kind, scale=scale)


@torch.library.custom_op("foveal::tiled_attention", mutates_args=())
def _node(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, second: Tensor | None, window: list[int], scale: float
) -> Tensor:
    """`forward` of eager mode for torch.compile, whose code for all tiles at once takes longer than the chunks."""
    bias, problem = _call(q, k, v, first, second, window, scale)
    with torch.no_grad():
        return forward(q, k, v, bias, problem).contiguous()


@_node.register_fake
def _(q, k, v, first, second, window, scale):
    return v.new_empty(*q.shape[:4], v.shape[4])


@torch.library.custom_op("foveal::tiled_attention_backward", mutates_args=())
def _node_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    window: list[int],
    scale: float,
    wanted: bool,
) -> list[Tensor]:
    """Gradients of q, k, v and, if ``wanted``, of the tensors of the bias."""
    bias, problem = _call(q, k, v, first, second, window, scale)
    tensors = () if bias is None else bias.tensors
    with torch.no_grad():
        plans = tiling.plan_of(problem, _cost)
        grads = _gradients(
            grad, q, k, v, tensors, (), [wanted] * len(tensors), problem, plans, _patterns_of(bias, problem)
        )
    return [g.contiguous() for g in grads if g is not None]


@_node_backward.register_fake
def _(grad, q, k, v, first, second, window, scale, wanted):
    biases = (first, second) if wanted else ()
    return [t.new_empty(t.shape) for t in (q, k, v, *biases) if t is not None]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    needed = ctx.needs_input_grad[3:5]
    dq, dk, dv, *biases = _node_backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale, any(needed))
    biases = [*biases, None, None][:2]
    return dq, dk, dv, *(g if n else None for g, n in zip(biases, needed, strict=True)), None, None


_node.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.foveal.tiled_attention)
def _(q, k, v, first, second, window, *_, **__) -> int:
    return flops.attention(pairs_of(q, window), q[4], v[4])


@register_flop_formula(torch.ops.foveal.tiled_attention_backward)
def _(grad, q, k, v, first, second, window, *_, **__) -> int:
    return flops.attention(pairs_of(q, window), q[4], v[4], backward=True)


# ----------------------------------------------------------------------------------------------- the backend


def _patterns_of(bias: Bias | None, problem: Problem) -> tuple[Tensor | None, ...]:
    """`_patterns` of a call."""
    arguments = problem.rows, problem.columns, problem.size, tiling.working_dtype(problem.dtype)
    if not isinstance(bias, RelativePositionBias):
        return _patterns(None, *arguments)
    if bias.cache is None:
        return _patterns(bias.table, *arguments)
    return bias.cache.get(_patterns, *arguments, source=bias.table)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, problem: Problem) -> Tensor:
    """[B, h, w, N, D] x [B, H, W, N, D] x [B, H, W, N, V] -> [B, h, w, N, V]."""
    tensors = () if bias is None else bias.tensors
    eager = tiling.chunkable(problem, q, k, v, *tensors) and problem.dropout_p == 0
    if eager and isinstance(bias, DecomposedRelativePositionBias) and _in_one_window(problem):
        return _one_window(q, k, v, bias, problem)
    compiled = tiling.one_node(problem, q, k, v, *tensors) and problem.dropout_p == 0
    plans = tiling.plan_of(problem, _cost)
    a, b = plans[0]
    large = a.tile * a.span * b.tile * b.span > tiling.CHUNK  # a single tile exceeds a chunk
    if not (eager or compiled) or (large and bias is None):
        return _attend(q, k, v, bias, problem, plans)  # SDPA does not store the logits of a large tile without bias
    whole = a.span == a.length and b.span == b.length and max(*problem.dilation, *problem.query_stride) == 1
    if large and isinstance(bias, RelativePositionBias) and whole and not (a.masked or b.masked):
        if compiled:
            return _attend(q, k, v, bias, problem, plans)
        return _by_rows(q, k, v, bias.table, problem)
    if compiled:
        first, second = (*tensors, None, None)[:2]
        return _node(q, k, v, first, second, window_list(*problem.windows), problem.scale)
    out = _Chunked.apply(q, k, v, problem, plans, _patterns_of(bias, problem), *tensors)
    return tiling.crop(out, *problem.query_size)
