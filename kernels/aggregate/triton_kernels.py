"""Triton kernels of neighborhood aggregation and their launchers.

A program processes a tile of one image, head and dilation group, and loops over the keys that its queries see (or the
queries that see its keys) in blocks. ``M``, queries by keys, is built for one block at a time: the window rule gives
the index of a key among its query's weights, if there is one, and the weight is loaded from there, by the thread that
needs it in the product (see ``_pairs``).

B batch, H W map, N heads, D channels, K = Kh * Kw keys of a window.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..triton_common import (
    first_query,
    group_length,
    input_precision,
    last_query,
    launch,
    power_of_2,
    wide,
    window_start,
)
from ..window import Window

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(triton_support.LARGEST)  # a multiple of it by a window's length fits 32 bits
LOWEST = tl.constexpr(-1e30)  # below every logit; its multiple by LOG2E is finite

# --------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _program(heads, height, width, dilation_rows, dilation_columns, TH: tl.constexpr, TW: tl.constexpr):
    """(image, head, dilation group of the rows and the columns, its length in rows and columns, first row and column of
    the tile). Heads vary fastest, so neighbouring programs read neighbouring memory."""
    down = tl.cdiv(tl.cdiv(height, dilation_rows), TH)
    across = tl.cdiv(tl.cdiv(width, dilation_columns), TW)
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    column = rest % across * TW
    rest = rest // across
    row = rest % down * TH
    rest = rest // down
    group_column = rest % dilation_columns
    rest = rest // dilation_columns
    group_row = rest % dilation_rows
    image = (rest // dilation_rows).to(tl.int64)
    rows = group_length(height, group_row, dilation_rows)
    columns = group_length(width, group_column, dilation_columns)
    return image, head, group_row, group_column, rows, columns, row, column


@triton.jit
def _keys_seen(first, tile, length, K: tl.constexpr, SHIFT: tl.constexpr):
    """(first key that a tile of queries sees along an axis, number of keys)."""
    start = window_start(first, length, K, 1, 1, SHIFT)
    return start, window_start(tl.minimum(first + tile, length) - 1, length, K, 1, 1, SHIFT) + K - start


@triton.jit
def _queries_seeing(first, tile, length, K: tl.constexpr, SHIFT: tl.constexpr):
    """(first query that sees a key of a tile along an axis, number of queries)."""
    start = first_query(first, length, K, 1, 1, SHIFT)
    return start, last_query(tl.minimum(first + tile, length) - 1, length, K, 1, 1, SHIFT) + 1 - start


@triton.jit
def _at(
    row, column, group_row, group_column, dilation_rows, dilation_columns, stride_row, stride_column,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Offset inside an image of a position of a dilation group."""
    y, x = row * dilation_rows + group_row, column * dilation_columns + group_column
    if WIDE:
        y, x = y.to(tl.int64), x.to(tl.int64)
    return y * stride_row + x * stride_column


@triton.jit
def _load_map(pointer, at, ok, stride, depth, BLOCK_D: tl.constexpr):
    """Load ``[positions, BLOCK_D]``; zeros where a position is not ``ok`` and beyond the depth."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(pointer + (at[:, None] + (d * stride)[None, :]), mask=ok[:, None] & (d < depth)[None, :], other=0.0)


@triton.jit
def _store_map(pointer, at, ok, values, depth, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (d < depth)[None, :]
    tl.store(pointer + (at[:, None] + d[None, :]), values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _pairs(M: tl.constexpr, E: tl.constexpr):
    """Row and column of each element of an [M, E] matrix, as a list: a thread has those that it holds of an operand or
    a result of a tensor core's product (16x8: eight rows of four pairs, twice), so that no thread needs another's."""
    x = tl.arange(0, M * E)  # as [E / 8, 2, 2, M / 16, 8, 4]
    rest = x // (2 * M)
    return x // 32 % (M // 16) * 16 + rest % 2 * 8 + x // 4 % 8, rest // 4 * 8 + x % 4 * 2 + rest // 2 % 2


@triton.jit
def _matrix(x, M: tl.constexpr, E: tl.constexpr):
    """The matrix [M, E] of a list as by ``_pairs``."""
    x = tl.reshape(x, (E // 8, 2, 2, M // 16, 8, 4))
    return tl.reshape(tl.permute(x, (3, 2, 4, 0, 5, 1)), (M, E))


@triton.jit
def _list(x, M: tl.constexpr, E: tl.constexpr):
    """The inverse of ``_matrix``."""
    x = tl.reshape(x, (M // 16, 2, 8, E // 8, 4, 2))
    return tl.reshape(tl.permute(x, (3, 5, 1, 0, 2, 4)), (M * E,))


@triton.jit
def _on_map(key, length):
    return (key >= 0) & (key < length)


@triton.jit
def _number(query, key, length, K: tl.constexpr, SHIFT: tl.constexpr, CLIP: tl.constexpr):
    """Index of a key in a query's window along one axis, ``FAR`` if it is not there. CLIP: no window has keys outside
    the map."""
    number = key - window_start(query, length, K, 1, 1, SHIFT)
    seen = (number.to(tl.uint32) < K) & (query < length)
    if CLIP:
        seen &= _on_map(key, length)
    return tl.where(seen, number, FAR)


@triton.jit
def _offset(index, stride, WIDE: tl.constexpr):
    """Offset of a weight from the first of its query."""
    if WIDE:
        index = index.to(tl.int64)
    return index * stride


@triton.jit
def _logits(
    values, seen, number, row_entry, column_entry, table, kernel_bias,
    KW: tl.constexpr, TABLE: tl.constexpr, KERNEL_BIAS: tl.constexpr,
):  # fmt: skip
    """Logits plus biases."""
    z = values.to(tl.float32)
    if TABLE:
        z += tl.load(table + row_entry * (2 * KW - 1) + column_entry, mask=seen, other=0.0).to(tl.float32)
    if KERNEL_BIAS:
        z += tl.load(kernel_bias + number, mask=seen, other=0.0).to(tl.float32)
    return z


# ----------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _apply(
    weights, v, out, sums, table, kernel_bias,
    weights_b, weights_h, weights_w, weights_n, weights_k, v_b, v_h, v_w, v_n, v_d,
    heads, height, width, depth, dilation_rows, dilation_columns,
    KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, ZEROS: tl.constexpr,
    SOFTMAX: tl.constexpr, TABLE: tl.constexpr, KERNEL_BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, ER: tl.constexpr, EC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``M @ v`` for a tile of TH x TW queries, over blocks of ER x EC keys; with ``SOFTMAX``, also the log-sum-exp
    (base 2) of each query, into ``sums``. ``ZEROS``: positions outside the map take part in the softmax."""
    M: tl.constexpr = TH * TW
    E: tl.constexpr = ER * EC
    image, head, group_row, group_column, rows, columns, first_row, first_column = _program(
        heads, height, width, dilation_rows, dilation_columns, TH, TW
    )
    if (first_row >= rows) | (first_column >= columns):  # this group is shorter than the longest
        return
    wide_head = head.to(tl.int64)
    weights += image * weights_b + wide_head * weights_n
    v += image * v_b + wide_head * v_n
    if TABLE:
        table += head * ((2 * KH - 1) * (2 * KW - 1))
    m, e = _pairs(M, E)
    number = tl.arange(0, E)
    query_row, query_column = first_row + m // TW, first_column + m % TW
    weights_at = weights + _at(
        query_row, query_column, group_row, group_column, dilation_rows, dilation_columns, weights_h, weights_w, WIDE
    )
    low, down = _keys_seen(first_row, TH, rows, KH, SHIFT)
    left, across = _keys_seen(first_column, TW, columns, KW, SHIFT)

    CLIP: tl.constexpr = not (SHIFT or ZEROS)
    UNSEEN: tl.constexpr = float("-inf") if SOFTMAX else 0.0
    total = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    top = tl.full([M], LOWEST, dtype=tl.float32)
    mass = tl.zeros([M], dtype=tl.float32)
    for side in range(0, across, EC):
        key_column = left + side + e % EC
        column_number = _number(query_column, key_column, columns, KW, SHIFT, CLIP)
        for step in range(0, down, ER):
            key_row = low + step + e // EC
            index = _number(query_row, key_row, rows, KH, SHIFT, CLIP) * KW + column_number
            seen = index < KH * KW
            x = tl.load(weights_at + _offset(index, weights_k, WIDE), mask=seen, other=UNSEEN)
            row, column = low + step + number // EC, left + side + number % EC
            at = _at(row, column, group_row, group_column, dilation_rows, dilation_columns, v_h, v_w, WIDE)
            ok = _on_map(row, tl.minimum(low + down, rows)) & _on_map(column, tl.minimum(left + across, columns))
            values = _load_map(v, at, ok, v_d, depth, BLOCK_D)
            if SOFTMAX:
                z = _logits(
                    x, seen, index, key_row - query_row + (KH - 1), key_column - query_column + (KW - 1),
                    table, kernel_bias, KW, TABLE, KERNEL_BIAS,
                )  # fmt: skip
                z = _matrix(z, M, E)
                new = tl.maximum(top, tl.max(z, 1))
                p = tl.exp2(z * LOG2E - (new * LOG2E)[:, None])
                shrink = tl.exp2((top - new) * LOG2E)
                mass = mass * shrink + tl.sum(p, 1)
                total = total * shrink[:, None]
                top = new
                p = p.to(values.dtype)
            else:
                p = _matrix(x, M, E)
            total = tl.dot(p, values, total, input_precision=PRECISION)

    m = tl.arange(0, M)
    query_row, query_column = first_row + m // TW, first_column + m % TW
    query_ok = (query_row < rows) & (query_column < columns)
    at = _at(
        query_row, query_column, group_row, group_column, dilation_rows, dilation_columns, width * heads, heads, WIDE
    )
    first = image * height * width * heads + wide_head
    if SOFTMAX:
        mass = tl.where(query_ok, mass, 1.0)
        total = total * (1.0 / mass)[:, None]
        tl.store(sums + first + at, top * LOG2E + tl.log2(mass), mask=query_ok)
    _store_map(out + first * depth, at * depth, query_ok, total, depth, BLOCK_D)


@triton.jit
def _dots(
    queries, keys, out, weights, output, sums, table, kernel_bias,
    queries_b, queries_h, queries_w, queries_n, queries_d, keys_b, keys_h, keys_w, keys_n, keys_d,
    weights_b, weights_h, weights_w, weights_n, weights_k,
    heads, height, width, depth, dilation_rows, dilation_columns,
    KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, ZEROS: tl.constexpr,
    SOFTMAX: tl.constexpr, TABLE: tl.constexpr, KERNEL_BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, ER: tl.constexpr, EC: tl.constexpr,
    BLOCK_D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``queries @ keys^T`` inside the windows of a tile of queries. With ``SOFTMAX`` the queries are the gradient of
    ``output``, the keys are the values, and the result is the gradient of the logits ``weights``."""
    M: tl.constexpr = TH * TW
    E: tl.constexpr = ER * EC
    image, head, group_row, group_column, rows, columns, first_row, first_column = _program(
        heads, height, width, dilation_rows, dilation_columns, TH, TW
    )
    if (first_row >= rows) | (first_column >= columns):
        return
    wide_head = head.to(tl.int64)
    queries += image * queries_b + wide_head * queries_n
    keys += image * keys_b + wide_head * keys_n
    first = image * height * width * heads + wide_head
    out += first * (KH * KW)
    m = tl.arange(0, M)
    query_row, query_column = first_row + m // TW, first_column + m % TW
    query_ok = (query_row < rows) & (query_column < columns)
    queries_at = _at(
        query_row, query_column, group_row, group_column, dilation_rows, dilation_columns, queries_h, queries_w, WIDE
    )
    if SOFTMAX:
        weights += image * weights_b + wide_head * weights_n
        at = _at(
            query_row, query_column, group_row, group_column, dilation_rows, dilation_columns, width * heads, heads,
            WIDE,
        )  # fmt: skip
        mass = tl.load(sums + first + at, mask=query_ok, other=0.0)
        mean = tl.zeros([M], dtype=tl.float32)
        for d in tl.static_range(0, DEPTH, BLOCK_D):
            x = _load_map(queries + d * queries_d, queries_at, query_ok, queries_d, depth - d, BLOCK_D)
            y = _load_map(output + first * depth + d, at * depth, query_ok, 1, depth - d, BLOCK_D)
            mean += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
        if TABLE:
            table += head * ((2 * KH - 1) * (2 * KW - 1))
    if DEPTH == BLOCK_D:
        x = _load_map(queries, queries_at, query_ok, queries_d, depth, BLOCK_D)

    m, e = _pairs(M, E)
    number = tl.arange(0, E)
    query_row, query_column = first_row + m // TW, first_column + m % TW
    out_at = out + _at(
        query_row, query_column, group_row, group_column, dilation_rows, dilation_columns, width * heads * (KH * KW),
        heads * (KH * KW), WIDE,
    )  # fmt: skip
    if SOFTMAX:
        weights_at = weights + _at(
            query_row, query_column, group_row, group_column, dilation_rows, dilation_columns, weights_h, weights_w,
            WIDE,
        )  # fmt: skip
    low, down = _keys_seen(first_row, TH, rows, KH, SHIFT)
    left, across = _keys_seen(first_column, TW, columns, KW, SHIFT)
    for side in range(0, across, EC):
        key_column = left + side + e % EC
        column_number = _number(query_column, key_column, columns, KW, SHIFT, False)
        for step in range(0, down, ER):
            key_row = low + step + e // EC
            index = _number(query_row, key_row, rows, KH, SHIFT, False) * KW + column_number
            seen = index < KH * KW
            row, column = low + step + number // EC, left + side + number % EC
            keys_at = _at(row, column, group_row, group_column, dilation_rows, dilation_columns, keys_h, keys_w, WIDE)
            ok = _on_map(row, tl.minimum(low + down, rows)) & _on_map(column, tl.minimum(left + across, columns))
            products = tl.zeros([M, E], dtype=tl.float32)
            if SOFTMAX:
                products -= mean[:, None]
            for d in tl.static_range(0, DEPTH, BLOCK_D):
                if DEPTH > BLOCK_D:
                    x = _load_map(queries + d * queries_d, queries_at, query_ok, queries_d, depth - d, BLOCK_D)
                values = _load_map(keys + d * keys_d, keys_at, ok, keys_d, depth - d, BLOCK_D)
                products = tl.dot(x, tl.trans(values), products, input_precision=PRECISION)
            if SOFTMAX:
                z = _logits(
                    tl.load(weights_at + _offset(index, weights_k, WIDE), mask=seen, other=float("-inf")), seen, index,
                    key_row - query_row + (KH - 1), key_column - query_column + (KW - 1), table, kernel_bias,
                    KW, TABLE, KERNEL_BIAS,
                )  # fmt: skip
                if not (SHIFT or ZEROS):
                    z = tl.where(_on_map(key_row, rows) & _on_map(key_column, columns), z, float("-inf"))
                products *= tl.exp2(_matrix(z, M, E) * LOG2E - mass[:, None])
            # keys outside the map are written too
            products = _list(products.to(out.dtype.element_ty), M, E)
            tl.store(out_at + _offset(index, 1, WIDE), products, mask=seen)


@triton.jit
def _spread(
    weights, queries, out, sums, table, kernel_bias,
    weights_b, weights_h, weights_w, weights_n, weights_k, queries_b, queries_h, queries_w, queries_n, queries_d,
    heads, height, width, depth, dilation_rows, dilation_columns,
    KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, ZEROS: tl.constexpr,
    SOFTMAX: tl.constexpr, TABLE: tl.constexpr, KERNEL_BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, ER: tl.constexpr, EC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``M^T @ queries`` for a tile of TH x TW keys, over all queries that see one of them, in blocks of ER x EC."""
    M: tl.constexpr = TH * TW
    E: tl.constexpr = ER * EC
    image, head, group_row, group_column, rows, columns, first_row, first_column = _program(
        heads, height, width, dilation_rows, dilation_columns, TH, TW
    )
    if (first_row >= rows) | (first_column >= columns):
        return
    wide_head = head.to(tl.int64)
    weights += image * weights_b + wide_head * weights_n
    queries += image * queries_b + wide_head * queries_n
    first = image * height * width * heads + wide_head
    if TABLE:
        table += head * ((2 * KH - 1) * (2 * KW - 1))
    m, e = _pairs(M, E)
    number = tl.arange(0, E)
    key_row, key_column = first_row + m // TW, first_column + m % TW
    low, down = _queries_seeing(first_row, TH, rows, KH, SHIFT)
    left, across = _queries_seeing(first_column, TW, columns, KW, SHIFT)
    UNSEEN: tl.constexpr = float("-inf") if SOFTMAX else 0.0
    total = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    for side in range(0, across, EC):
        query_column = left + side + e % EC
        column_number = _number(query_column, key_column, columns, KW, SHIFT, True)
        for step in range(0, down, ER):
            query_row = low + step + e // EC
            index = _number(query_row, key_row, rows, KH, SHIFT, True) * KW + column_number
            seen = index < KH * KW
            weights_at = weights + _at(
                query_row, query_column, group_row, group_column, dilation_rows, dilation_columns, weights_h,
                weights_w, WIDE,
            )  # fmt: skip
            p = tl.load(weights_at + _offset(index, weights_k, WIDE), mask=seen, other=UNSEEN)
            row, column = low + step + number // EC, left + side + number % EC
            ok = (row < low + down) & (column < left + across)
            at = _at(row, column, group_row, group_column, dilation_rows, dilation_columns, queries_h, queries_w, WIDE)
            x = _load_map(queries, at, ok, queries_d, depth, BLOCK_D)
            if SOFTMAX:
                z = _logits(
                    p, seen, index, key_row - query_row + (KH - 1), key_column - query_column + (KW - 1),
                    table, kernel_bias, KW, TABLE, KERNEL_BIAS,
                )  # fmt: skip
                at = _at(
                    row, column, group_row, group_column, dilation_rows, dilation_columns, width * heads, heads, WIDE
                )
                mass = tl.load(sums + first + at, mask=ok, other=0.0)
                p = tl.exp2(_matrix(z, M, E) * LOG2E - mass[None, :]).to(x.dtype)
            else:
                p = _matrix(p, M, E)
            total = tl.dot(p, x, total, input_precision=PRECISION)

    m = tl.arange(0, M)
    key_row, key_column = first_row + m // TW, first_column + m % TW
    at = _at(key_row, key_column, group_row, group_column, dilation_rows, dilation_columns, width * heads, heads, WIDE)
    ok = (key_row < rows) & (key_column < columns)
    _store_map(out + first * depth, at * depth, ok, total, depth, BLOCK_D)


@triton.jit
def _fold(
    logits, out, heads, height, width, dilation_rows, dilation_columns,
    KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One row of one head's bias table: sums of ``logits`` ``[H, W, N, K]`` over all queries, by offset."""
    head = tl.program_id(0) // (2 * KH - 1)
    table_row = tl.program_id(0) % (2 * KH - 1)
    table_column = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    for y in range(height):
        row = y // dilation_rows
        rows = group_length(height, y % dilation_rows, dilation_rows)
        down = table_row - (KH - 1) + row - window_start(row, rows, KH, 1, 1, SHIFT)
        if (down >= 0) & (down < KH):
            for begin in range(0, width, BLOCK_Q):
                x = begin + tl.arange(0, BLOCK_Q)
                column = x // dilation_columns
                columns = group_length(width, x % dilation_columns, dilation_columns)
                first = window_start(column, columns, KW, 1, 1, SHIFT)
                across = table_column[None, :] - (KW - 1) + (column - first)[:, None]
                inside = (across >= 0) & (across < KW) & (x < width)[:, None]
                at = ((y * width + x).to(tl.int64) * heads + head) * (KH * KW) + down * KW
                total += tl.sum(tl.load(logits + at[:, None] + across, mask=inside, other=0.0), 0)
    at = tl.program_id(0) * (2 * KW - 1) + table_column
    tl.store(out + at, total, mask=table_column < 2 * KW - 1)


# --------------------------------------------------------------------------------------------------- launchers


def sizes(depth: int, dtype: torch.dtype) -> list[tuple[int, int, int, int]]:
    """(positions of a tile, of a block, warps, stages), the default first: that with the fewest instructions. None of
    them spills registers on compute capability 9.0. Not tuned on a GPU yet."""
    if dtype == torch.float32:
        return [(16, 32, 4, 1)] if depth <= 128 else [(16, 32, 8, 1)]
    if depth > 128:
        return [(32, 32, 8, 1)]
    wide = [(64, 32, 4, 1), (32, 32, 4, 1), (64, 32, 8, 1)]
    return [(16, 32, 1, 1), (32, 32, 2, 1), *wide] if depth <= 32 else wide


# Cost of a block and of a tile, in columns of M, from the instructions that they add.
BLOCK_COST, TILE_COST = 7, 35


@dataclass(frozen=True)
class TileShape:
    """Rows and columns of a tile and of a block, and tiles along both axes of a dilation group."""

    tile: tuple[int, int]
    block: tuple[int, int]
    tiles: tuple[int, int]


@lru_cache(maxsize=4096)
def spans(window: Window, length: int, tile: int, keys: bool) -> list[int]:
    """Keys that each tile of queries sees along an axis; with ``keys``, queries that see each tile of keys."""
    starts = [window.start(i, length) for i in range(length)]
    found = []
    for first in range(0, length, tile):
        last = min(first + tile, length) - 1
        if keys:
            found.append(bisect_right(starts, last) - bisect_right(starts, first - window.kernel_size))
        else:
            found.append(starts[last] + window.kernel_size - starts[first])
    return found


@lru_cache(maxsize=4096)
def tile_shape(windows: tuple[Window, Window], length: tuple[int, int], size: int, step: int, keys: bool) -> TileShape:
    """The cheapest shape of tiles of ``size`` positions and blocks of ``step`` or fewer on a map of ``length``; ties go
    to the widest, for longer runs in memory."""

    def powers(largest: int, least: int = 1) -> list[int]:
        return [1 << i for i in range(least.bit_length() - 1, largest.bit_length())]

    best = None
    for tw, e, ec in itertools.product(powers(size), powers(step, 16), powers(step, 8)):
        if ec > e or tw >= 2 * length[1]:
            continue
        seen = [spans(w, n, t, keys) for w, n, t in zip(windows, length, (size // tw, tw), strict=True)]
        blocks = [sum(-(-n // block) for n in s) for s, block in zip(seen, (e // ec, ec), strict=True)]
        tiles = len(seen[0]), len(seen[1])
        cost = math.prod(blocks) * (e + BLOCK_COST) + math.prod(tiles) * TILE_COST, -tw, -ec
        if best is None or cost < best[0]:
            best = cost, TileShape((size // tw, tw), (e // ec, ec), tiles)
    return best[1]


def _launch(
    name: str,
    kernel,
    shape: torch.Size,
    window: list[int],
    boundary: str,
    strided: dict[str, Tensor | None],
    whole: dict[str, Tensor | None],
) -> None:
    """``kernel`` for maps of ``shape`` ``[B, H, W, N, D]``, on tensors of any strides and on contiguous ones."""
    batch, height, width, heads, depth = shape
    kernel_size, dilation = (window[0], window[1]), (window[2], window[3])
    windows = tuple(Window(k, boundary=boundary) for k in kernel_size)
    length = tuple(-(-x // d) for x, d in zip((height, width), dilation, strict=True))
    if batch == 0:
        return
    arguments: dict[str, object] = {**strided, **whole}
    for tensor, t in strided.items():
        names = (f"{tensor}_{axis}" for axis in ("bhwnk" if tensor == "weights" else "bhwnd"))
        arguments.update(zip(names, (0,) * 5 if t is None else t.stride(), strict=True))
    out, softmax = whole["out"], whole["sums"] is not None
    padded = power_of_2(depth, 16)
    if name == "dots":  # float32 loops over the depth: there are no tensor cores for it
        arguments |= {"DEPTH": padded, "BLOCK_D": min(padded, 32) if out.dtype == torch.float32 else padded}
    else:
        arguments |= {"BLOCK_D": padded}

    def run(choice: tuple[int, int, int, int]) -> None:
        size, step, warps, stages = choice
        chosen = tile_shape(windows, length, size, step, name == "spread")
        tiles = math.prod(dilation) * math.prod(chosen.tiles)
        kernel[(batch * heads * tiles,)](
            **arguments, heads=heads, height=height, width=width, depth=depth,
            dilation_rows=dilation[0], dilation_columns=dilation[1],
            KH=kernel_size[0], KW=kernel_size[1], SHIFT=boundary == "shift", ZEROS=softmax and boundary == "zero",
            SOFTMAX=softmax, TABLE=whole["table"] is not None, KERNEL_BIAS=whole["kernel_bias"] is not None,
            WIDE=wide(*(t for t in (*strided.values(), *whole.values()) if t is not None)),
            PRECISION=input_precision(out.dtype), TH=chosen.tile[0], TW=chosen.tile[1], ER=chosen.block[0],
            EC=chosen.block[1], num_warps=warps, num_stages=stages,
        )  # fmt: skip

    shape_class = (out.dtype, padded, kernel_size, max(dilation) > 1, boundary, softmax, math.prod(shape).bit_length())
    with torch.cuda.device_of(out):
        launch(f"aggregate, {name}", shape_class, sizes(depth, out.dtype), run)


_NONE: dict[str, Tensor | None] = dict.fromkeys(("sums", "table", "kernel_bias"))


def apply(weights: Tensor, v: Tensor, out: Tensor, window: list[int], boundary: str, softmax=_NONE) -> None:
    """``M @ v``; ``softmax`` holds the output ``sums`` ``[B, H, W, N]`` and the biases."""
    _launch("apply", _apply, v.shape, window, boundary, {"weights": weights, "v": v}, {"out": out, **softmax})


def dots(
    q: Tensor, k: Tensor, out: Tensor, window: list[int], boundary: str, logits=None, output=None, softmax=_NONE
) -> None:
    """``q @ k^T`` inside the windows; with ``softmax``, the gradient of ``logits`` given the gradient ``q`` of
    ``output``."""
    strided = {"queries": q, "keys": k, "weights": logits}
    _launch("dots", _dots, k.shape, window, boundary, strided, {"out": out, "output": output, **softmax})


def spread(weights: Tensor, q: Tensor, out: Tensor, window: list[int], boundary: str, softmax=_NONE) -> None:
    """``M^T @ q``."""
    _launch("spread", _spread, q.shape, window, boundary, {"weights": weights, "queries": q}, {"out": out, **softmax})


def fold_table(logits: Tensor, out: Tensor, window: list[int], boundary: str) -> None:
    """Sum contiguous ``logits`` ``[H, W, N, K]`` over the queries into a bias table ``out``
    ``[N, 2*Kh - 1, 2*Kw - 1]``, both float32."""
    height, width, heads, _ = logits.shape
    KH, KW, *dilation = window
    with torch.cuda.device_of(out):
        _fold[(heads * (2 * KH - 1),)](
            logits, out, heads, height, width, *dilation,
            KH=KH, KW=KW, SHIFT=boundary == "shift", BLOCK_Q=16, BLOCK_T=power_of_2(2 * KW - 1), num_warps=4,
        )  # fmt: skip
