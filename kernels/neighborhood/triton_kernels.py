"""The kernels of ``triton.py``. Imports Triton, so import it only where a kernel is launched.

A program processes a tile of TH x TW queries of one dilation group, in one image after another, and loops over the keys
that any of them sees, in blocks of KR rows and KC columns. Bias and mask, over the scale, are the start of the product
of queries and keys:

* table or no bias: expanded by ``expand`` for each column of tiles, loaded by ``_bias``;
* decomposed: the sum of a row part and a column part, which are products of the query with a row of an embedding, or
  ``UNSEEN``. In ``queries_backward`` both parts are computed once for all blocks; a product with a 0/1 matrix takes
  them to the keys of a block.

The key columns of every tile start ``before`` keys left of its first query. The gradient of a table can thus be summed
by position in the tile over many tiles, and by offset only at the end.

``keys_backward`` does the reverse: a tile of keys, and the queries that see them.

Each output is written by one program in a fixed order of summation; there are no atomics.

Names: m a query of a tile, e a key of a block; R and C the rows of the padded embeddings, R those of the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import first_query, group_length, last_query, query_count, table_index, window_start

LOG2E = tl.constexpr(1.4426950408889634)
SHIFT = tl.constexpr(0)
MASK = tl.constexpr(2)
TABLE = tl.constexpr(1)
DECOMPOSED = tl.constexpr(2)
UNSEEN = tl.constexpr(-1e30)  # below every logit; finite, as its product with 0 is summed


# ----------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _place(tile, height, width, dilation_rows, dilation_columns, tiles_rows, tiles_columns):
    """(dilation group of rows and of columns, their lengths, row and column of the tile) of a tile index."""
    column = tile % tiles_columns
    tile = tile // tiles_columns
    row = tile % tiles_rows
    tile = tile // tiles_rows
    group_column = tile % dilation_columns
    group_row = tile // dilation_columns % dilation_rows
    length_rows = group_length(height, group_row, dilation_rows)
    length_columns = group_length(width, group_column, dilation_columns)
    return group_row, group_column, length_rows, length_columns, row, column


@triton.jit
def _query_axis(
    first, number, step, length, K: tl.constexpr, STRIDE: tl.constexpr, APART: tl.constexpr, COUNTED: tl.constexpr,
    MOVED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One axis of the queries of a tile, from ``first`` on: (query, whether it exists, window start, table index)."""
    query = first + number
    valid = (number < step) & (query < query_count(length, APART))
    if AHEAD:
        valid = valid & (query >= 0)
    return (
        query,
        valid,
        window_start(query, length, K, STRIDE, APART, MOVED, AHEAD),
        table_index(query, STRIDE, APART, COUNTED),
    )


@triton.jit
def _at(row, column, stride_row, stride_column, WIDE: tl.constexpr):
    """Offset of a position inside an image."""
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    return row * stride_row + column * stride_column


@triton.jit
def _load(base, at, inside, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load channels [positions, BLOCK]; zero where ``inside`` is false and beyond the last channel."""
    channel = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if DEPTH < BLOCK:
        mask = mask & (channel < DEPTH)[None, :]
    return tl.load(base + (at[:, None] + channel[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(base, at, inside, x, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if DEPTH < BLOCK:
        mask = mask & (channel < DEPTH)[None, :]
    tl.store(base + at[:, None] + channel[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _load_both(
    x, y, row, column, inside, x_row, x_column, y_row, y_column, x_image, y_image,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Keys and values, or queries and gradients, of positions in an image; ALIKE if their strides are equal."""
    x_at = _at(row, column, x_row, x_column, WIDE) + x_image
    y_at = x_at
    if not ALIKE:
        y_at = _at(row, column, y_row, y_column, WIDE) + y_image
    return _load(x, x_at, inside, D, BD), _load(y, y_at, inside, DV, BDV)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _halves(x, dtype: tl.constexpr):
    """Two numbers of ``dtype`` with the sum x, of twice the precision."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def _load_embedding(base, dtype: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BD: tl.constexpr):
    """An embedding in the dtype of the queries, and what that cuts off."""
    row = tl.arange(0, P)
    return _halves(_load(base, row * D, row < ROWS, D, BD).to(tl.float32), dtype)


@triton.jit
def _dots(q, embedding, rest, PRECISION: tl.constexpr):
    """q . embedding, [queries, P]."""
    dots = _dot(q, tl.trans(embedding), PRECISION)
    if q.dtype != tl.float32:
        dots = tl.dot(q, tl.trans(rest), dots, input_precision=PRECISION)
    return dots


@triton.jit
def _seen(key, start, length, K: tl.constexpr, BOUNDARY: tl.constexpr):
    """Whether a query sees a key along one axis; the arguments broadcast."""
    seen = (key >= start) & (key < start + K)
    if BOUNDARY == MASK:
        seen = seen & (key >= 0) & (key < length)
    return seen


@triton.jit
def _part(
    first, start, index, length, dots, inverse_scale,
    K: tl.constexpr, P: tl.constexpr, BOUNDARY: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Row or column part of a decomposed bias and of the mask, [queries, SPAN], for the keys from ``first`` on."""
    key = first + tl.arange(0, SPAN)[None, :]
    picked = tl.gather(dots, tl.minimum(tl.maximum(key - index[:, None] + (K - 1), 0), P - 1), 1)
    return tl.where(_seen(key, start[:, None], length, K, BOUNDARY), picked * inverse_scale, UNSEEN)


@triton.jit
def _places(number, SPAN: tl.constexpr, dtype: tl.constexpr):
    """0/1 matrix [SPAN, keys]: the column of a key has its 1 in row ``number``."""
    return tl.where(tl.arange(0, SPAN)[:, None] == number[None, :], 1.0, 0.0).to(dtype)


@triton.jit
def _add_part(bias, part, number, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """``bias`` [queries, keys] plus, for each key, the column ``number`` of ``part``; for 16-bit ``dtype`` in two
    halves of bfloat16, which has the range of float32."""
    if dtype == tl.float32:
        bias = tl.dot(part, _places(number, part.shape[1], tl.float32), bias, input_precision=PRECISION)
    else:
        places = _places(number, part.shape[1], tl.bfloat16)
        high, low = _halves(part, tl.bfloat16)
        bias = tl.dot(high, places, tl.dot(low, places, bias))
    return bias


# ------------------------------------------------------------------------------------------- masks and bias tables


@triton.jit
def expand(
    table, expanded, table_head, inverse_scale, width, dilation, step, tiles, lead, before, nearest,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr, APART: tl.constexpr, COUNTED: tl.constexpr,
    AHEAD: tl.constexpr, BOUNDARY: tl.constexpr, BIAS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    SLABS: tl.constexpr, ABOVE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bias and mask of every column of tiles: [heads, groups, tiles, SLABS, ROWS, S / 8, T, 8]; see ``_bias``.

    -inf where a query does not see a key, else the table [N, 2 KH - 1, 2 KW - 1] over the scale of the logits. A slab
    is for the queries whose table index is ``nearest`` + slab rows below the first row of their window, which is row
    ABOVE of the slab. T columns of queries, S of keys; with KEYS, of keys and of queries.
    """
    tile = tl.program_id(1) % tiles
    group = tl.program_id(1) // tiles
    length = group_length(width, group, dilation)
    x = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    row = x // (T * S) % ROWS - ABOVE
    number = x // 8 % T
    other = x // (8 * T) % (S // 8) * 8 + x % 8
    if KEYS:
        key = tile * step - lead
        query = first_query(tl.maximum(key, 0), length, KW, STRIDE, APART, BOUNDARY == SHIFT, AHEAD) + other
        key += number
    else:
        query = tile * step - AHEAD
        key = query * APART - before + other
        query += number
    start = window_start(query, length, KW, STRIDE, APART, BOUNDARY == SHIFT, AHEAD)
    seen = (number < step) & (query < query_count(length, APART)) & (row >= 0) & (row < KH)
    if AHEAD:
        seen = seen & (query >= 0)
    seen = seen & _seen(key, start, length, KW, BOUNDARY)
    value = tl.zeros((BLOCK,), tl.float32)
    if BIAS == TABLE:
        entry_row = row - (nearest + x // (T * S * ROWS)) + (KH - 1)
        at = entry_row * (2 * KW - 1) + key - table_index(query, STRIDE, APART, COUNTED) + (KW - 1)
        seen = seen & (x < SLABS * ROWS * T * S)
        value = tl.load(table + tl.program_id(0) * table_head + at, mask=seen, other=0.0).to(tl.float32) * inverse_scale
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (SLABS * ROWS * T * S) + x
    tl.store(expanded + at, tl.where(seen, value, float("-inf")), mask=x < SLABS * ROWS * T * S)


@triton.jit
def _bias(
    expanded, first, last, low, row, column, length, nearest,
    M: tl.constexpr, T: tl.constexpr, S: tl.constexpr, KR: tl.constexpr, KC: tl.constexpr, K: tl.constexpr,
    STRIDE: tl.constexpr, APART: tl.constexpr, COUNTED: tl.constexpr, AHEAD: tl.constexpr, BOUNDARY: tl.constexpr,
    SLABS: tl.constexpr, ABOVE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Bias and mask, [M, KR * KC], of the block ``row`` rows below ``low`` and ``column`` columns right of the first.

    They are over the scale, to be the start of the product's accumulator. ``expanded`` is that of the tile's columns,
    loaded in the order in which the threads of a tensor core's product hold their results (16x8: eight rows of four
    pairs, twice), so that no thread needs another's. A tile of keys and a block of queries with KEYS, else of queries
    and of keys; ``last`` is the last row of queries.
    """
    x = tl.arange(0, M * KR * KC)  # as [KR, KC / 8, 2, M / 16, 8, 8]
    m = x // 8 % (M // 2)
    m = m // 8 * 16 + x // (4 * M) % 2 * 8 + m % 8
    other = row + x // (M * KC)
    query = tl.minimum(low + other if KEYS else first + m // T, last)
    if AHEAD:
        query = tl.maximum(query, 0)  # others have no slab
    start = window_start(query, length, K, STRIDE, APART, BOUNDARY == SHIFT, AHEAD)
    slab = tl.zeros_like(query)
    if SLABS > 1:
        slab = (table_index(query, STRIDE, APART, COUNTED) - start - nearest) * ROWS
    if KEYS:
        at = m // T
        below = ABOVE + slab + tl.minimum(tl.maximum(first - start, -ABOVE), K)
    elif BOUNDARY == MASK:  # the row above the windows, of -inf, for keys outside the map
        at = tl.where((low + other >= 0) & (low + other < length), ABOVE + slab + low - start + other, ABOVE - 1)
        below = tl.zeros_like(query)
    else:
        at = ABOVE + slab + low - start
        below = other
    first_key = expanded + (at * (T * S) + m % T * 8 + x % 8)
    across = column // 8 + x // (8 * M) % (KC // 8)
    loaded = tl.load(tl.max_contiguous(first_key + (below * (T * S) + across * (8 * T)), 2))
    loaded = tl.reshape(loaded, (KR, KC // 8, 2, M // 16, 8, 8))
    return tl.reshape(tl.permute(loaded, (3, 2, 4, 0, 1, 5)), (M, KR * KC))


# ----------------------------------------------------------------------------------------------------- forward


@triton.jit
def forward(
    q, k, v, expanded, bias_rows, bias_columns, out, lse,
    q_image, q_row, q_column, q_head, k_image, k_row, k_column, k_head, v_image, v_row, v_column, v_head,
    expanded_head, rows_head, columns_head,
    scale, batch, heads, height, width, dilation_rows, dilation_columns,
    step_rows, step_columns, tiles_rows, tiles_columns, before, nearest,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr,
    COUNTED_H: tl.constexpr, COUNTED_W: tl.constexpr, AHEAD_H: tl.constexpr, AHEAD_W: tl.constexpr,
    BOUNDARY: tl.constexpr, BIAS: tl.constexpr,
    SLABS: tl.constexpr, ABOVE: tl.constexpr, ROWS: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, KR: tl.constexpr, KC: tl.constexpr, DOWN: tl.constexpr, CHUNKS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head in every image: the output [B, h, w, N, DV], log-sum-exp in base 2 [B, h, w, N]."""
    BM: tl.constexpr = TH * TW
    BK: tl.constexpr = KR * KC
    head = tl.program_id(0) % heads
    group_row, group_column, length_rows, length_columns, tile_row, tile_column = _place(
        tl.program_id(0) // heads, height, width, dilation_rows, dilation_columns, tiles_rows, tiles_columns
    )
    first_row, first_column = tile_row * step_rows - AHEAD_H, tile_column * step_columns - AHEAD_W
    last_row = tl.minimum(first_row + step_rows, query_count(length_rows, NH)) - 1
    if (last_row < first_row) | (first_column >= query_count(length_columns, NW)):
        return  # this group is shorter than others

    m = tl.arange(0, BM)
    row, row_valid, row_start, row_index = _query_axis(
        first_row, m // TW, step_rows, length_rows, KH, SH, NH, COUNTED_H, BOUNDARY == SHIFT, AHEAD_H
    )
    column, column_valid, column_start, column_index = _query_axis(
        first_column, m % TW, step_columns, length_columns, KW, SW, NW, COUNTED_W, BOUNDARY == SHIFT, AHEAD_W
    )
    valid = row_valid & column_valid
    position_row, position_column = row * dilation_rows + group_row, column * dilation_columns + group_column
    q_at = _at(position_row, position_column, q_row, q_column, WIDE)
    query_height, query_width = query_count(height, NH), query_count(width, NW)
    at = _at(position_row, position_column, query_width * heads, heads, WIDE)

    wide_head = head.to(tl.int64)
    q += wide_head * q_head
    k += wide_head * k_head
    v += wide_head * v_head
    row_embedding, row_rest, column_embedding, column_rest = 0.0, 0.0, 0.0, 0.0
    if BIAS != DECOMPOSED:
        expanded += wide_head * expanded_head
        expanded += (group_column * tiles_columns + tile_column) * (SLABS * ROWS * TW * KC * CHUNKS)
    else:
        dtype: tl.constexpr = q.dtype.element_ty
        row_embedding, row_rest = _load_embedding(bias_rows + head * rows_head, dtype, 2 * KH - 1, D, R, BD)
        column_embedding, column_rest = _load_embedding(bias_columns + head * columns_head, dtype, 2 * KW - 1, D, C, BD)
    low = window_start(first_row, length_rows, KH, SH, NH, BOUNDARY == SHIFT, AHEAD_H)
    left = first_column * NW - before
    e = tl.arange(0, BK)

    for image in range(tl.program_id(1), batch, tl.num_programs(1)):
        far_image = tl.cast(image, tl.int64) if WIDE else image
        queries = _load(q, q_at + far_image * q_image, valid, D, BD)
        row_dots, column_dots = 0.0, 0.0
        if BIAS == DECOMPOSED:
            row_dots = _dots(queries, row_embedding, row_rest, PRECISION)
            column_dots = _dots(queries, column_embedding, column_rest, PRECISION)
        largest = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BDV), tl.float32)
        for block in tl.range(0, DOWN * CHUNKS, loop_unroll_factor=UNROLL):
            down, side = block // CHUNKS * KR, block % CHUNKS * KC
            key_row, key_column = low + down + e // KC, left + side + e % KC
            inside = (key_row >= 0) & (key_row < length_rows) & (key_column >= 0) & (key_column < length_columns)
            position_r, position_c = key_row * dilation_rows + group_row, key_column * dilation_columns + group_column
            keys, values = _load_both(
                k, v, position_r, position_c, inside, k_row, k_column, v_row, v_column, far_image * k_image,
                far_image * v_image, D, BD, DV, BDV, WIDE, ALIKE,
            )  # fmt: skip
            if BIAS == DECOMPOSED:
                row_part = _part(
                    low + down, row_start, row_index, length_rows, row_dots, LOG2E / scale, KH, R, BOUNDARY, KR
                )
                column_part = _part(
                    left + side, column_start, column_index, length_columns, column_dots, LOG2E / scale, KW, C,
                    BOUNDARY, KC,
                )  # fmt: skip
                bias = tl.reshape(row_part[:, :, None] + column_part[:, None, :], (BM, BK))
            else:
                bias = _bias(
                    expanded, first_row, last_row, low, down, side, length_rows, nearest,
                    BM, TW, KC * CHUNKS, KR, KC, KH, SH, NH, COUNTED_H, AHEAD_H, BOUNDARY, SLABS, ABOVE, ROWS, False,
                )  # fmt: skip
            logits = tl.dot(queries, tl.trans(keys), bias, input_precision=PRECISION)
            larger = tl.maximum(largest, tl.max(logits, 1))
            offset = larger * scale
            if BIAS != DECOMPOSED and DOWN * CHUNKS > 1:
                offset = tl.where(larger == float("-inf"), 0.0, offset)  # no key seen so far: avoid inf - inf
            weights = tl.exp2(logits * scale - offset[:, None])
            if block > 0:
                shrink = tl.exp2(largest * scale - offset)
                total *= shrink
                acc *= shrink[:, None]
            total += tl.sum(weights, 1)
            acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
            largest = larger

        first_image = tl.cast(image, tl.int64) * query_height * query_width * heads + wide_head
        _store(out + first_image * DV, at * DV, valid, acc * (1.0 / total)[:, None], DV, BDV)
        tl.store(lse + first_image + at, largest * scale + tl.log2(total), mask=valid)


# -------------------------------------------------------------------------------- gradients of queries and bias


@triton.jit
def queries_backward(
    q, k, v, expanded, bias_rows, bias_columns, out, grad, lse, delta, dq, work,
    q_image, q_row, q_column, q_head, k_image, k_row, k_column, k_head, v_image, v_row, v_column, v_head,
    g_image, g_row, g_column, g_head,
    expanded_head, rows_head, columns_head,
    scale, batch, heads, height, width, dilation_rows, dilation_columns,
    step_rows, step_columns, tiles_rows, tiles_columns, before, nearest, count, programs, chunk,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr,
    COUNTED_H: tl.constexpr, COUNTED_W: tl.constexpr, AHEAD_H: tl.constexpr, AHEAD_W: tl.constexpr,
    BOUNDARY: tl.constexpr, BIAS: tl.constexpr,
    SLABS: tl.constexpr, ABOVE: tl.constexpr, ROWS: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, KR: tl.constexpr, KC: tl.constexpr, DOWN: tl.constexpr, CHUNKS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, SPAN_H: tl.constexpr, SPAN_W: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr, UNROLL: tl.constexpr,
    DQ: tl.constexpr, DBIAS: tl.constexpr, ALL_CHUNKS: tl.constexpr,
):  # fmt: skip
    """``count`` tiles of queries of a head, distributed over ``programs`` programs for each of several sets of images.

    DQ: write dq [B, h, w, N, D] and delta [B, h, w, N], the sums of grad * out. DBIAS: write each program's partial sum
    of the bias gradient to ``work`` [N, programs, ...]: [R, TW, KC] for a table, [R + C, BD] for embeddings. Without
    ALL_CHUNKS only block column ``chunk`` (for a table whose tiles have more than one block column).
    """
    BM: tl.constexpr = TH * TW
    BK: tl.constexpr = KR * KC
    head = tl.program_id(0) % heads
    program = tl.program_id(0) // heads
    wide_head = head.to(tl.int64)
    q += wide_head * q_head
    k += wide_head * k_head
    v += wide_head * v_head
    grad += wide_head * g_head
    row_embedding, row_rest, column_embedding, column_rest = 0.0, 0.0, 0.0, 0.0
    if BIAS == DECOMPOSED:
        dtype: tl.constexpr = q.dtype.element_ty
        row_embedding, row_rest = _load_embedding(bias_rows + head * rows_head, dtype, 2 * KH - 1, D, R, BD)
        column_embedding, column_rest = _load_embedding(bias_columns + head * columns_head, dtype, 2 * KW - 1, D, C, BD)
    table_sum, row_sum, column_sum = 0.0, 0.0, 0.0
    if DBIAS and BIAS == TABLE:
        table_sum = tl.zeros((R, TW * KC), tl.float32)
    elif DBIAS:
        row_sum, column_sum = tl.zeros((R, BD), tl.float32), tl.zeros((C, BD), tl.float32)
    m = tl.arange(0, BM)
    e = tl.arange(0, BK)
    query_height, query_width = query_count(height, NH), query_count(width, NW)
    across: tl.constexpr = CHUNKS if ALL_CHUNKS else 1
    first_chunk = chunk
    if ALL_CHUNKS:
        first_chunk = 0

    for tile in range(program, count, programs):
        group_row, group_column, length_rows, length_columns, tile_row, tile_column = _place(
            tile, height, width, dilation_rows, dilation_columns, tiles_rows, tiles_columns
        )
        first_row, first_column = tile_row * step_rows - AHEAD_H, tile_column * step_columns - AHEAD_W
        last_row = tl.minimum(first_row + step_rows, query_count(length_rows, NH)) - 1
        images = batch
        if (last_row < first_row) | (first_column >= query_count(length_columns, NW)):
            images = 0  # this group is shorter than others
        row, row_valid, row_start, row_index = _query_axis(
            first_row, m // TW, step_rows, length_rows, KH, SH, NH, COUNTED_H, BOUNDARY == SHIFT, AHEAD_H
        )
        column, column_valid, column_start, column_index = _query_axis(
            first_column, m % TW, step_columns, length_columns, KW, SW, NW, COUNTED_W, BOUNDARY == SHIFT, AHEAD_W
        )
        valid = row_valid & column_valid
        position_row, position_column = row * dilation_rows + group_row, column * dilation_columns + group_column
        at = _at(position_row, position_column, query_width * heads, heads, WIDE)
        q_at = _at(position_row, position_column, q_row, q_column, WIDE)
        g_at = _at(position_row, position_column, g_row, g_column, WIDE)
        tile_bias = expanded
        if BIAS != DECOMPOSED:
            tile_bias += wide_head * expanded_head
            tile_bias += (group_column * tiles_columns + tile_column) * (SLABS * ROWS * TW * KC * CHUNKS)
        low = window_start(first_row, length_rows, KH, SH, NH, BOUNDARY == SHIFT, AHEAD_H)
        left = first_column * NW - before

        for image in range(tl.program_id(1), images, tl.num_programs(1)):
            far_image = tl.cast(image, tl.int64) if WIDE else image
            first_image = tl.cast(image, tl.int64) * query_height * query_width * heads + wide_head
            queries = _load(q, q_at + far_image * q_image, valid, D, BD)
            grads = _load(grad, g_at + far_image * g_image, valid, DV, BDV)
            outs = _load(out + first_image * DV, at * DV, valid, DV, BDV)
            deltas = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
            offset = tl.load(lse + first_image + at, mask=valid, other=float("inf"))  # weights of 0
            drow, dcolumn = 0.0, 0.0
            row_part, column_part = 0.0, 0.0
            if BIAS == DECOMPOSED:
                dots = _dots(queries, row_embedding, row_rest, PRECISION)
                row_part = _part(low, row_start, row_index, length_rows, dots, LOG2E / scale, KH, R, BOUNDARY, SPAN_H)
                dots = _dots(queries, column_embedding, column_rest, PRECISION)
                column_part = _part(
                    left, column_start, column_index, length_columns, dots, LOG2E / scale, KW, C, BOUNDARY, SPAN_W
                )
                drow, dcolumn = tl.zeros((BM, SPAN_H), tl.float32), tl.zeros((BM, SPAN_W), tl.float32)
            acc = tl.zeros((BM, BD), tl.float32)
            for block in tl.range(0, DOWN * across, loop_unroll_factor=UNROLL):
                down, side = block // across * KR, (first_chunk + block % across) * KC
                key_row, key_column = low + down + e // KC, left + side + e % KC
                inside = (key_row >= 0) & (key_row < length_rows) & (key_column >= 0) & (key_column < length_columns)
                position_r = key_row * dilation_rows + group_row
                position_c = key_column * dilation_columns + group_column
                keys, values = _load_both(
                    k, v, position_r, position_c, inside, k_row, k_column, v_row, v_column, far_image * k_image,
                    far_image * v_image, D, BD, DV, BDV, WIDE, ALIKE,
                )  # fmt: skip
                if BIAS == DECOMPOSED:
                    bias = tl.zeros((BM, BK), tl.float32)
                    bias = _add_part(bias, row_part, down + e // KC, queries.dtype, PRECISION)
                    bias = _add_part(bias, column_part, side + e % KC, queries.dtype, PRECISION)
                else:
                    bias = _bias(
                        tile_bias, first_row, last_row, low, down, side, length_rows, nearest,
                        BM, TW, KC * CHUNKS, KR, KC, KH, SH, NH, COUNTED_H, AHEAD_H, BOUNDARY, SLABS, ABOVE, ROWS,
                        False,
                    )  # fmt: skip
                logits = tl.dot(queries, tl.trans(keys), bias, input_precision=PRECISION)
                weights = tl.exp2(logits * scale - offset[:, None])
                dlogits = weights * (_dot(grads, tl.trans(values), PRECISION) - deltas[:, None])
                narrow = dlogits.to(keys.dtype)
                if DQ:
                    acc = tl.dot(narrow, keys, acc, input_precision=PRECISION)
                if BIAS == DECOMPOSED:
                    places = tl.trans(_places(down + e // KC, SPAN_H, keys.dtype))
                    drow = tl.dot(narrow, places, drow, input_precision=PRECISION)
                    places = tl.trans(_places(side + e % KC, SPAN_W, keys.dtype))
                    dcolumn = tl.dot(narrow, places, dcolumn, input_precision=PRECISION)
                if DBIAS and BIAS == TABLE:
                    # sum over rows of the tile and block by offset, as a product with a 0/1 matrix
                    shaped = tl.permute(tl.reshape(dlogits, (TH, TW, KR, KC)), (0, 2, 1, 3))
                    pair = tl.arange(0, TH * KR)
                    index = table_index(first_row + pair // KR, SH, NH, COUNTED_H)
                    same = (low + down + pair % KR - index + (KH - 1))[None, :] == tl.arange(0, R)[:, None]
                    ones = tl.where(same, 1.0, 0.0).to(keys.dtype)
                    shaped = tl.reshape(shaped, (TH * KR, TW * KC)).to(keys.dtype)
                    table_sum = tl.dot(ones, shaped, table_sum, input_precision=PRECISION)
            acc *= scale / LOG2E
            if BIAS == DECOMPOSED:
                drow = _by_offset(drow, row_index, low, KH, SPAN_H, R).to(queries.dtype)
                dcolumn = _by_offset(dcolumn, column_index, left, KW, SPAN_W, C).to(queries.dtype)
                if DQ:
                    acc = tl.dot(drow, row_embedding, acc, input_precision=PRECISION)
                    acc = tl.dot(dcolumn, column_embedding, acc, input_precision=PRECISION)
                if DBIAS:
                    row_sum = tl.dot(tl.trans(drow), queries, row_sum, input_precision=PRECISION)
                    column_sum = tl.dot(tl.trans(dcolumn), queries, column_sum, input_precision=PRECISION)
            if DQ:
                _store(dq + first_image * D, at * D, valid, acc, D, BD)
                tl.store(delta + first_image + at, deltas, mask=valid)

    place = (wide_head * tl.num_programs(1) + tl.program_id(1)) * programs + program
    if DBIAS and BIAS == TABLE:
        work += place * (R * TW * KC)
        tl.store(work + tl.arange(0, R)[:, None] * (TW * KC) + tl.arange(0, TW * KC)[None, :], table_sum)
    elif DBIAS:
        work += place * ((R + C) * BD)
        channel = tl.arange(0, BD)[None, :]
        tl.store(work + tl.arange(0, R)[:, None] * BD + channel, row_sum)
        tl.store(work + (R + tl.arange(0, C))[:, None] * BD + channel, column_sum)


@triton.jit
def _by_offset(sums, index, first, K: tl.constexpr, SPAN: tl.constexpr, P: tl.constexpr):
    """Scatter [queries, SPAN], keys from ``first`` on, to [queries, P], rows of the embedding."""
    key = tl.arange(0, P)[None, :] + index[:, None] - (K - 1) - first
    picked = tl.gather(sums, tl.minimum(tl.maximum(key, 0), SPAN - 1), 1)
    return tl.where((key >= 0) & (key < SPAN), picked, 0.0)


@triton.jit
def table_gradient(
    sums, dtable, before,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, NW: tl.constexpr,
    TW: tl.constexpr, KC: tl.constexpr, CHUNKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One row of a head's table gradient from the sums by position in the tile, ``sums`` [CHUNKS, N, R, TW, KC]."""
    head, row = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, C)
    acc = tl.zeros((C,), tl.float32)
    for query in tl.static_range(TW):
        key = column - COLUMNS // 2 + before + query * NW
        inside = (key >= 0) & (key < CHUNKS * KC)
        at = (((key // KC * tl.num_programs(0) + head) * R + row) * TW + query) * KC + key % KC
        acc += tl.load(sums + at, mask=inside, other=0.0)
    tl.store(dtable + (head * ROWS + row) * COLUMNS + column, acc, mask=column < COLUMNS)


# ----------------------------------------------------------------------------------- gradients of keys and values


@triton.jit
def keys_backward(
    q, k, v, expanded, bias_rows, bias_columns, grad, lse, delta, dk, dv,
    q_image, q_row, q_column, q_head, k_image, k_row, k_column, k_head, v_image, v_row, v_column, v_head,
    g_image, g_row, g_column, g_head,
    expanded_head, rows_head, columns_head,
    scale, batch, heads, height, width, dilation_rows, dilation_columns,
    step_rows, step_columns, tiles_rows, tiles_columns, lead_rows, lead_columns, nearest,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr,
    COUNTED_H: tl.constexpr, COUNTED_W: tl.constexpr, AHEAD_H: tl.constexpr, AHEAD_W: tl.constexpr,
    BOUNDARY: tl.constexpr, BIAS: tl.constexpr,
    SLABS: tl.constexpr, ABOVE: tl.constexpr, ROWS: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, QR: tl.constexpr, QC: tl.constexpr, DOWN: tl.constexpr, CHUNKS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
    UNROLL: tl.constexpr, VARIES: tl.constexpr,
):  # fmt: skip
    """A tile of TH x TW keys of one head in every image, over blocks of QR x QC queries: dk [B, H, W, N, D] and
    dv [B, H, W, N, DV]. VARIES: only over as many blocks as the queries of the tile need."""
    BN: tl.constexpr = TH * TW
    BQ: tl.constexpr = QR * QC
    head = tl.program_id(0) % heads
    group_row, group_column, length_rows, length_columns, tile_row, tile_column = _place(
        tl.program_id(0) // heads, height, width, dilation_rows, dilation_columns, tiles_rows, tiles_columns
    )
    first_row, first_column = tile_row * step_rows - lead_rows, tile_column * step_columns - lead_columns
    if (first_row >= length_rows) | (first_column >= length_columns):
        return  # this group is shorter than others

    n = tl.arange(0, BN)
    row, column = first_row + n // TW, first_column + n % TW
    last_row = tl.minimum(first_row + step_rows, length_rows) - 1
    last_column = tl.minimum(first_column + step_columns, length_columns) - 1
    valid = (row >= 0) & (row <= last_row) & (column >= 0) & (column <= last_column)
    position_row, position_column = row * dilation_rows + group_row, column * dilation_columns + group_column
    k_at = _at(position_row, position_column, k_row, k_column, WIDE)
    v_at = _at(position_row, position_column, v_row, v_column, WIDE)
    at = _at(position_row, position_column, width * heads, heads, WIDE)
    query_height, query_width = query_count(height, NH), query_count(width, NW)
    wide_head = head.to(tl.int64)
    q += wide_head * q_head
    k += wide_head * k_head
    v += wide_head * v_head
    grad += wide_head * g_head
    row_embedding, row_rest, column_embedding, column_rest = 0.0, 0.0, 0.0, 0.0
    if BIAS != DECOMPOSED:
        expanded += wide_head * expanded_head
        expanded += (group_column * tiles_columns + tile_column) * (SLABS * ROWS * TW * QC * CHUNKS)
    else:
        dtype: tl.constexpr = q.dtype.element_ty
        row_embedding, row_rest = _load_embedding(bias_rows + head * rows_head, dtype, 2 * KH - 1, D, R, BD)
        column_embedding, column_rest = _load_embedding(bias_columns + head * columns_head, dtype, 2 * KW - 1, D, C, BD)

    low = first_query(tl.maximum(first_row, 0), length_rows, KH, SH, NH, BOUNDARY == SHIFT, AHEAD_H)
    high = last_query(last_row, length_rows, KH, SH, NH, BOUNDARY == SHIFT, AHEAD_H) + 1
    left = first_query(tl.maximum(first_column, 0), length_columns, KW, SW, NW, BOUNDARY == SHIFT, AHEAD_W)
    right = last_query(last_column, length_columns, KW, SW, NW, BOUNDARY == SHIFT, AHEAD_W) + 1
    blocks_down, blocks_across, reciprocal = DOWN, CHUNKS, 0
    if VARIES:
        blocks_down, blocks_across = tl.cdiv(tl.maximum(high - low, 0), QR), tl.cdiv(tl.maximum(right - left, 0), QC)
        reciprocal = 65536 // tl.maximum(blocks_across, 1) + 1
    e = tl.arange(0, BQ)
    for image in range(tl.program_id(1), batch, tl.num_programs(1)):
        far_image = tl.cast(image, tl.int64) if WIDE else image
        first_image = tl.cast(image, tl.int64) * query_height * query_width * heads + wide_head
        keys = _load(k, k_at + far_image * k_image, valid, D, BD)
        values = _load(v, v_at + far_image * v_image, valid, DV, BDV)
        dkeys = tl.zeros((BN, BD), tl.float32)
        dvalues = tl.zeros((BN, BDV), tl.float32)
        for block in tl.range(0, blocks_down * blocks_across, loop_unroll_factor=UNROLL):
            # a division, which is exact for the few blocks of a window with a bias
            block_row = block * reciprocal >> 16 if VARIES else block // CHUNKS
            down, side = block_row * QR, (block - block_row * blocks_across) * QC
            query_row, query_column = low + down + e // QC, left + side + e % QC
            inside = (query_row < high) & (query_column < right)
            position_r = query_row * dilation_rows + group_row
            position_c = query_column * dilation_columns + group_column
            queries, grads = _load_both(
                q, grad, position_r, position_c, inside, q_row, q_column, g_row, g_column, far_image * q_image,
                far_image * g_image, D, BD, DV, BDV, WIDE, ALIKE,
            )  # fmt: skip
            lse_at = _at(position_r, position_c, query_width * heads, heads, WIDE)
            offset = tl.load(lse + first_image + lse_at, mask=inside, other=float("inf"))  # weights of 0
            deltas = tl.load(delta + first_image + lse_at, mask=inside, other=0.0)
            if BIAS == DECOMPOSED:
                dots = _dots(queries, row_embedding, row_rest, PRECISION)
                start = window_start(query_row, length_rows, KH, SH, NH, BOUNDARY == SHIFT, AHEAD_H)
                index = table_index(query_row, SH, NH, COUNTED_H)
                row_part = _part(first_row, start, index, length_rows, dots, LOG2E / scale, KH, R, BOUNDARY, TH)
                dots = _dots(queries, column_embedding, column_rest, PRECISION)
                start = window_start(query_column, length_columns, KW, SW, NW, BOUNDARY == SHIFT, AHEAD_W)
                index = table_index(query_column, SW, NW, COUNTED_W)
                column_part = _part(
                    first_column, start, index, length_columns, dots, LOG2E / scale, KW, C, BOUNDARY, TW
                )
                bias = tl.reshape(tl.trans(row_part)[:, None, :] + tl.trans(column_part)[None, :, :], (BN, BQ))
            else:
                bias = _bias(
                    expanded, first_row, query_count(length_rows, NH) - 1, low, down, side, length_rows, nearest,
                    BN, TW, QC * CHUNKS, QR, QC, KH, SH, NH, COUNTED_H, AHEAD_H, BOUNDARY, SLABS, ABOVE, ROWS, True,
                )  # fmt: skip
            logits = tl.dot(keys, tl.trans(queries), bias, input_precision=PRECISION)
            weights = tl.exp2(logits * scale - offset[None, :])
            dvalues = tl.dot(weights.to(grads.dtype), grads, dvalues, input_precision=PRECISION)
            dlogits = weights * (_dot(values, tl.trans(grads), PRECISION) - deltas[None, :])
            dkeys = tl.dot(dlogits.to(queries.dtype), queries, dkeys, input_precision=PRECISION)

        first_image = tl.cast(image, tl.int64) * height * width * heads + wide_head
        _store(dk + first_image * D, at * D, valid, dkeys * (scale / LOG2E), D, BD)
        _store(dv + first_image * DV, at * DV, valid, dvalues, DV, BDV)
