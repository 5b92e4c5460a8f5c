"""Triton kernels of neighborhood aggregation and their launchers.

A program processes one tile of one image, head and dilation group, and loops in steps over the keys that its queries
see (or the queries that see its keys). ``M``, queries by keys, is built for one step at a time: the window rule gives
the index of a key among its query's weights, if there is one, and the weight is loaded from there.

B batch, H W map, N heads, D channels, K = Kh * Kw keys of a window.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import first_query, group_length, input_precision, last_query, launch, power_of_2, window_start

# --------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _program(heads, height, width, dilation_rows, dilation_columns, tile_rows, tile_columns):
    """(image, head, dilation group of the rows and the columns, its length in rows and columns, first row and column of
    the tile). Heads vary fastest, so neighbouring programs read neighbouring memory."""
    down = tl.cdiv(tl.cdiv(height, dilation_rows), tile_rows)
    across = tl.cdiv(tl.cdiv(width, dilation_columns), tile_columns)
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    column = rest % across * tile_columns
    rest = rest // across
    row = rest % down * tile_rows
    rest = rest // down
    group_column = rest % dilation_columns
    rest = rest // dilation_columns
    group_row = rest % dilation_rows
    image = (rest // dilation_rows).to(tl.int64)
    rows = group_length(height, group_row, dilation_rows)
    columns = group_length(width, group_column, dilation_columns)
    return image, head, group_row, group_column, rows, columns, row, column


@triton.jit
def _tile(first_row, first_column, down, across, rows, columns, begin, BLOCK: tl.constexpr):
    """``BLOCK`` positions of a rectangle starting at ``begin``: (row, column, inside the map, inside the rectangle)."""
    number = begin + tl.arange(0, BLOCK)
    row = first_row + number // across
    column = first_column + number % across
    within = number < down * across
    return row, column, within & (row >= 0) & (row < rows) & (column >= 0) & (column < columns), within


@triton.jit
def _keys_seen(
    first_row, first_column, tile_rows, tile_columns, rows, columns, KH: tl.constexpr, KW: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """The rectangle of keys that a tile of queries sees: (first row, first column, rows, columns)."""
    row = window_start(first_row, rows, KH, 1, 1, SHIFT)
    column = window_start(first_column, columns, KW, 1, 1, SHIFT)
    end_row = window_start(tl.minimum(first_row + tile_rows, rows) - 1, rows, KH, 1, 1, SHIFT) + KH
    end_column = window_start(tl.minimum(first_column + tile_columns, columns) - 1, columns, KW, 1, 1, SHIFT) + KW
    return row, column, end_row - row, end_column - column


@triton.jit
def _positions(row, column, group_row, group_column, dilation_rows, dilation_columns):
    """Map coordinates of positions of a dilation group."""
    return (row * dilation_rows + group_row).to(tl.int64), (column * dilation_columns + group_column).to(tl.int64)


@triton.jit
def _number(image, head, y, x, heads, height, width):
    """Flat index of a position and head in ``[B, H, W, N]``."""
    return ((image * height + y) * width + x) * heads + head


@triton.jit
def _load_map(pointer, at, ok, stride, depth, BLOCK_D: tl.constexpr):
    """Load ``[positions, BLOCK_D]``; zeros where a position is not ``ok`` and beyond the depth."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(
        pointer + at[:, None] + (d.to(tl.int64) * stride)[None, :], mask=ok[:, None] & (d < depth)[None, :], other=0.0
    )


@triton.jit
def _store_map(pointer, at, ok, values, depth, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (d < depth)[None, :]
    tl.store(pointer + at[:, None] + d[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _in_window(
    query_row, query_column, key_row, key_column, rows, columns,
    KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(index of the key in the query's window, whether it is in it), ``[queries, keys]``."""
    row = key_row[None, :] - window_start(query_row, rows, KH, 1, 1, SHIFT)[:, None]
    column = key_column[None, :] - window_start(query_column, columns, KW, 1, 1, SHIFT)[:, None]
    number = row * KW + column
    if WIDE:
        number = number.to(tl.int64)
    return number, (row >= 0) & (row < KH) & (column >= 0) & (column < KW)


@triton.jit
def _logits(
    values, number, seen, query_row, query_column, key_row, key_column, table, kernel_bias, head,
    KH: tl.constexpr, KW: tl.constexpr, TABLE: tl.constexpr, KERNEL_BIAS: tl.constexpr,
):  # fmt: skip
    """Logits plus biases in base 2; -inf where a query does not see a key."""
    z = values.to(tl.float32)
    if TABLE:
        row = key_row[None, :] - query_row[:, None] + KH - 1
        column = key_column[None, :] - query_column[:, None] + KW - 1
        at = (head * (2 * KH - 1) + row) * (2 * KW - 1) + column
        z += tl.load(table + at, mask=seen, other=0.0).to(tl.float32)
    if KERNEL_BIAS:
        z += tl.load(kernel_bias + number, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, z * 1.4426950408889634, float("-inf"))


# ----------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _apply(
    weights, v, out, sums, table, kernel_bias,
    weights_b, weights_h, weights_w, weights_n, weights_k, v_b, v_h, v_w, v_n, v_d,
    heads, height, width, depth, dilation_rows, dilation_columns, tile_rows, tile_columns,
    KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, ZEROS: tl.constexpr,
    SOFTMAX: tl.constexpr, TABLE: tl.constexpr, KERNEL_BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``M @ v`` for a tile of queries; with ``SOFTMAX``, also the log-sum-exp (base 2) of each query, into ``sums``.
    ``ZEROS``: positions outside the map take part in the softmax."""
    image, head, group_row, group_column, rows, columns, first_row, first_column = _program(
        heads, height, width, dilation_rows, dilation_columns, tile_rows, tile_columns
    )
    if (first_row >= rows) | (first_column >= columns):  # this group is shorter than the longest
        return
    query_row, query_column, query_ok, _ = _tile(
        first_row, first_column, tile_rows, tile_columns, rows, columns, 0, BLOCK_Q
    )
    query_y, query_x = _positions(query_row, query_column, group_row, group_column, dilation_rows, dilation_columns)
    weights_at = query_y * weights_h + query_x * weights_w
    weights += image * weights_b + head.to(tl.int64) * weights_n
    v += image * v_b + head.to(tl.int64) * v_n

    total = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_Q], dtype=tl.float32)
    key_first_row, key_first_column, down, across = _keys_seen(
        first_row, first_column, tile_rows, tile_columns, rows, columns, KH, KW, SHIFT
    )
    for begin in range(0, down * across, BLOCK_K):
        key_row, key_column, on_map, within = _tile(
            key_first_row, key_first_column, down, across, rows, columns, begin, BLOCK_K
        )
        number, inside = _in_window(query_row, query_column, key_row, key_column, rows, columns, KH, KW, SHIFT, WIDE)
        key_ok = on_map
        if ZEROS:
            key_ok = within
        seen = inside & query_ok[:, None] & key_ok[None, :]
        m = tl.load(weights + weights_at[:, None] + number * weights_k, mask=seen, other=0.0)
        key_y, key_x = _positions(key_row, key_column, group_row, group_column, dilation_rows, dilation_columns)
        values = _load_map(v, key_y * v_h + key_x * v_w, on_map, v_d, depth, BLOCK_D)
        if SOFTMAX:
            z = _logits(
                m, number, seen, query_row, query_column, key_row, key_column, table, kernel_bias, head,
                KH, KW, TABLE, KERNEL_BIAS,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(z, 1))
            finite = tl.where(new == float("-inf"), 0.0, new)  # no key seen so far
            p = tl.exp2(z - finite[:, None])
            shrink = tl.exp2(top - finite)
            mass = mass * shrink + tl.sum(p, 1)
            total = total * shrink[:, None]
            top = new
            m = p.to(values.dtype)
        total = tl.dot(m, values, total, input_precision=PRECISION)

    at = _number(image, head, query_y, query_x, heads, height, width)
    if SOFTMAX:
        mass = tl.where(query_ok, mass, 1.0)
        total = total / mass[:, None]
        tl.store(sums + at, top + tl.log2(mass), mask=query_ok)
    _store_map(out, at * depth, query_ok, total, depth, BLOCK_D)


@triton.jit
def _dots(
    queries, keys, out, weights, output, sums, table, kernel_bias,
    queries_b, queries_h, queries_w, queries_n, queries_d, keys_b, keys_h, keys_w, keys_n, keys_d,
    weights_b, weights_h, weights_w, weights_n, weights_k,
    heads, height, width, depth, dilation_rows, dilation_columns, tile_rows, tile_columns,
    KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, ZEROS: tl.constexpr,
    SOFTMAX: tl.constexpr, TABLE: tl.constexpr, KERNEL_BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """``queries @ keys^T`` inside the windows of a tile of queries. With ``SOFTMAX`` the queries are the gradient of
    ``output``, the keys are the values, and the result is the gradient of the logits ``weights``."""
    image, head, group_row, group_column, rows, columns, first_row, first_column = _program(
        heads, height, width, dilation_rows, dilation_columns, tile_rows, tile_columns
    )
    if (first_row >= rows) | (first_column >= columns):
        return
    query_row, query_column, query_ok, _ = _tile(
        first_row, first_column, tile_rows, tile_columns, rows, columns, 0, BLOCK_Q
    )
    queries += image * queries_b + head.to(tl.int64) * queries_n
    keys += image * keys_b + head.to(tl.int64) * keys_n
    query_y, query_x = _positions(query_row, query_column, group_row, group_column, dilation_rows, dilation_columns)
    queries_at = query_y * queries_h + query_x * queries_w
    at = _number(image, head, query_y, query_x, heads, height, width)
    if SOFTMAX:
        weights += image * weights_b + head.to(tl.int64) * weights_n
        weights_at = query_y * weights_h + query_x * weights_w
        mass = tl.load(sums + at, mask=query_ok, other=0.0)
        mean = tl.zeros([BLOCK_Q], dtype=tl.float32)
        for d in tl.static_range(0, DEPTH, BLOCK_D):
            x = _load_map(queries + d * queries_d, queries_at, query_ok, queries_d, depth - d, BLOCK_D)
            y = _load_map(output + d, at * depth, query_ok, 1, depth - d, BLOCK_D)
            mean += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    if DEPTH == BLOCK_D:
        x = _load_map(queries, queries_at, query_ok, queries_d, depth, BLOCK_D)

    key_first_row, key_first_column, down, across = _keys_seen(
        first_row, first_column, tile_rows, tile_columns, rows, columns, KH, KW, SHIFT
    )
    for begin in range(0, down * across, BLOCK_K):
        key_row, key_column, on_map, within = _tile(
            key_first_row, key_first_column, down, across, rows, columns, begin, BLOCK_K
        )
        key_y, key_x = _positions(key_row, key_column, group_row, group_column, dilation_rows, dilation_columns)
        keys_at = key_y * keys_h + key_x * keys_w
        products = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
        for d in tl.static_range(0, DEPTH, BLOCK_D):
            if DEPTH > BLOCK_D:
                x = _load_map(queries + d * queries_d, queries_at, query_ok, queries_d, depth - d, BLOCK_D)
            values = _load_map(keys + d * keys_d, keys_at, on_map, keys_d, depth - d, BLOCK_D)
            products = tl.dot(x, tl.trans(values), products, input_precision=PRECISION)
        number, inside = _in_window(query_row, query_column, key_row, key_column, rows, columns, KH, KW, SHIFT, WIDE)
        inside = inside & query_ok[:, None] & within[None, :]
        if SOFTMAX:
            seen = inside
            if not ZEROS:
                seen = inside & on_map[None, :]
            m = tl.load(weights + weights_at[:, None] + number * weights_k, mask=seen, other=0.0)
            z = _logits(
                m, number, seen, query_row, query_column, key_row, key_column, table, kernel_bias, head,
                KH, KW, TABLE, KERNEL_BIAS,
            )  # fmt: skip
            products = tl.exp2(z - mass[:, None]) * (products - mean[:, None])
        # keys outside the map are written too
        tl.store(out + (at * (KH * KW))[:, None] + number, products.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _spread(
    weights, queries, out, sums, table, kernel_bias,
    weights_b, weights_h, weights_w, weights_n, weights_k, queries_b, queries_h, queries_w, queries_n, queries_d,
    heads, height, width, depth, dilation_rows, dilation_columns, tile_rows, tile_columns,
    KH: tl.constexpr, KW: tl.constexpr, SHIFT: tl.constexpr, ZEROS: tl.constexpr,
    SOFTMAX: tl.constexpr, TABLE: tl.constexpr, KERNEL_BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``M^T @ queries`` for a tile of keys, over all queries that see one of them."""
    image, head, group_row, group_column, rows, columns, first_row, first_column = _program(
        heads, height, width, dilation_rows, dilation_columns, tile_rows, tile_columns
    )
    if (first_row >= rows) | (first_column >= columns):
        return
    key_row, key_column, key_ok, _within = _tile(
        first_row, first_column, tile_rows, tile_columns, rows, columns, 0, BLOCK_K
    )
    weights += image * weights_b + head.to(tl.int64) * weights_n
    queries += image * queries_b + head.to(tl.int64) * queries_n

    query_first_row = first_query(first_row, rows, KH, 1, 1, SHIFT)
    query_first_column = first_query(first_column, columns, KW, 1, 1, SHIFT)
    last_row = tl.minimum(first_row + tile_rows, rows) - 1
    last_column = tl.minimum(first_column + tile_columns, columns) - 1
    down = last_query(last_row, rows, KH, 1, 1, SHIFT) + 1 - query_first_row
    across = last_query(last_column, columns, KW, 1, 1, SHIFT) + 1 - query_first_column
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for begin in range(0, down * across, BLOCK_Q):
        query_row, query_column, query_ok, _query_within = _tile(
            query_first_row, query_first_column, down, across, rows, columns, begin, BLOCK_Q
        )
        number, inside = _in_window(query_row, query_column, key_row, key_column, rows, columns, KH, KW, SHIFT, WIDE)
        seen = inside & query_ok[:, None] & key_ok[None, :]
        query_y, query_x = _positions(query_row, query_column, group_row, group_column, dilation_rows, dilation_columns)
        weights_at = query_y * weights_h + query_x * weights_w
        m = tl.load(weights + weights_at[:, None] + number * weights_k, mask=seen, other=0.0)
        x = _load_map(queries, query_y * queries_h + query_x * queries_w, query_ok, queries_d, depth, BLOCK_D)
        if SOFTMAX:
            z = _logits(
                m, number, seen, query_row, query_column, key_row, key_column, table, kernel_bias, head,
                KH, KW, TABLE, KERNEL_BIAS,
            )  # fmt: skip
            at = _number(image, head, query_y, query_x, heads, height, width)
            mass = tl.load(sums + at, mask=query_ok, other=0.0)
            m = tl.exp2(z - mass[:, None]).to(x.dtype)
        total = tl.dot(tl.trans(m), x, total, input_precision=PRECISION)

    key_y, key_x = _positions(key_row, key_column, group_row, group_column, dilation_rows, dilation_columns)
    at = _number(image, head, key_y, key_x, heads, height, width)
    _store_map(out, at * depth, key_ok, total, depth, BLOCK_D)


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


def sizes(name: str, depth: int, dtype: torch.dtype) -> list[tuple[int, int, int, int]]:
    """(positions of a tile, positions of a step, warps, stages), the default first: that with the fewest instructions.
    None of them spills registers on compute capability 9.0. Not tuned on a GPU yet."""
    if dtype == torch.float32:
        return [(16, 32, 4, 1)] if depth <= 128 else [(16, 32, 8, 1)]
    if depth > 128:
        return [(32, 32, 8, 1)]
    wide = [(32, 32, 4, 1), (32, 32, 8, 1), (64, 32, 8, 1)]
    if depth > 32:
        return wide
    fewest = {"apply": (16, 16, 1, 1), "dots": (16, 32, 1, 1), "spread": (16, 32, 2, 1)}
    return [*([fewest[name]] if depth <= 16 else []), *wide, (16, 32, 4, 1), (16, 64, 4, 1)]


@lru_cache(maxsize=4096)
def tile_shape(length: tuple[int, int], kernel_size: tuple[int, int], size: int, step: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most ``size`` positions on a map of ``length``: the shape that needs the fewest
    steps of ``step`` positions; ties go to the widest, for longer runs in memory."""

    def tile(columns: int) -> tuple[int, int]:
        return min(size // columns, length[0]), columns

    def cost(columns: int) -> tuple[int, int]:
        tiles = math.prod(-(-x // t) for x, t in zip(length, tile(columns), strict=True))
        span = math.prod(min(x, t + k - 1) for x, t, k in zip(length, tile(columns), kernel_size, strict=True))
        return tiles * -(-span // step), -columns

    return tile(min(range(1, min(size, length[1]) + 1), key=cost))


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
        rows, columns = tile_shape(length, kernel_size, size, step)
        tiles = math.prod(dilation) * -(-length[0] // rows) * -(-length[1] // columns)
        kernel[(batch * heads * tiles,)](
            **arguments, heads=heads, height=height, width=width, depth=depth,
            dilation_rows=dilation[0], dilation_columns=dilation[1], tile_rows=rows, tile_columns=columns,
            KH=kernel_size[0], KW=kernel_size[1], SHIFT=boundary == "shift", ZEROS=softmax and boundary == "zero",
            SOFTMAX=softmax, TABLE=whole["table"] is not None, KERNEL_BIAS=whole["kernel_bias"] is not None,
            WIDE=math.prod(kernel_size) * arguments.get("weights_k", 0) >= 2**31, PRECISION=input_precision(out.dtype),
            BLOCK_Q=step if name == "spread" else size, BLOCK_K=size if name == "spread" else step,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    shape_class = (out.dtype, padded, kernel_size, max(dilation) > 1, boundary, softmax, math.prod(shape).bit_length())
    with torch.cuda.device_of(out):
        launch(f"aggregate, {name}", shape_class, sizes(name, depth, out.dtype), run)


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
