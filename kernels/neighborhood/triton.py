"""Neighborhood attention in Triton: one fused forward pass, two backward passes; the CUDA default.

Inputs ``[B, H, W, N, D]`` may have any strides. Only the log-sum-exp of each query is kept for the backward pass. Two
``torch.library`` operations with fakes, so compilers see one node; calls do not synchronize, so CUDA graphs can capture
them. The order of summation is fixed, so results are deterministic.

This file plans and launches; the kernels are in ``triton_kernels.py``.
"""

# pyright: reportCallIssue=false, reportArgumentType=false  (a kernel is launched with more than its own arguments)

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import flops, triton_support
from ..bias import Bias
from ..problem import Problem
from ..tracing import transformed
from ..window import BOUNDARIES, Window, pairs_of, window_list, windows_of

Choice = tuple[int, ...]
LOG2E = math.log2(math.e)
LARGEST_DEPTH = 256
LARGEST_BIASED = 32  # keys along an axis; a program holds the whole table in registers
WORKSPACE_BYTES = 64 * 2**20  # maximum for the partial sums of a bias gradient
# Cost of loading a key, in units of one query-key pair; an estimate, not tuned on a GPU.
LOAD_COST = 32
UNROLLED_BLOCKS, UNROLLED_BYTES = (
    8,
    160 * 1024,
)  # of keys and values; with those of the next image, all in shared memory
BLOCK_COST = 13  # cost of a block of keys, in keys, from the instructions that it adds


def unsupported_reason(problem: Problem) -> str | None:
    reason = triton_support.unsupported_reason(problem)
    if reason is not None:
        return reason
    if problem.dropout_p > 0:
        return f"the Triton kernels have no attention dropout (got {problem.dropout_p})"
    deepest = max(problem.shape[4], problem.value_depth)
    if deepest > LARGEST_DEPTH:
        return f"the Triton kernels take depths up to {LARGEST_DEPTH} (got {deepest})"
    if problem.bias is not None and max(problem.kernel_size) > LARGEST_BIASED:
        return f"the Triton kernels take a bias up to a kernel_size of {LARGEST_BIASED} (got {problem.kernel_size})"
    if not problem.tracing and transformed():
        return "the transforms of torch.func and forward mode need standard operators"
    return None


# ------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class LaunchTiling:
    """Tiles of queries along one axis: ``step`` queries each, ``tiles`` of them on the longest group, the first with
    the ``window.ahead`` queries that an offset leaves out. Every tile sees only keys among the ``span`` that start
    ``before`` keys left of its first query."""

    step: int
    tiles: int
    before: int
    span: int


def _lengths(window: Window, length: int) -> set[int]:
    """Lengths of the non-empty dilation groups."""
    return {n for n in (window.group_length(length), window.group_length(length, window.dilation - 1)) if n > 0}


@lru_cache(maxsize=4096)
def launch_tiling(window: Window, length: int, tile: int) -> LaunchTiling:
    """Tiles of at most ``tile`` queries, about equally large; whole stride groups if one fits."""
    queries = window.ahead + window.queries(window.group_length(length))
    together = window.stride // window.query_stride if window.stride % window.query_stride == 0 else 1
    if together > tile:
        together = -(-together // -(-together // tile))
    groups = -(-queries // together)
    tiles = -(-groups // (tile // together))
    step = -(-groups // tiles) * together
    tiles = -(-queries // step)
    before = after = 0
    for group in _lengths(window, length):
        for first in range(-window.ahead, window.queries(group), step):
            last = min(first + step, window.queries(group)) - 1
            at = first * window.query_stride
            before = max(before, at - window.start(first, group))
            after = max(after, window.start(last, group) + window.kernel_size - at)
    return LaunchTiling(step, tiles, before, before + after)


@dataclass(frozen=True)
class KeyTiling:
    """Tiles of keys along one axis: ``step`` keys each, the first without ``lead`` of them. ``spans``: queries that see
    a key of each tile of the longest group; at most ``span`` in any group."""

    step: int
    lead: int
    spans: tuple[int, ...]
    span: int

    @property
    def tiles(self) -> int:
        return len(self.spans)

    def blocks(self, size: int) -> int:
        """Blocks of ``size`` queries that the tiles need in all."""
        return sum(-(-span // size) for span in self.spans)


@lru_cache(maxsize=4096)
def key_tiling(window: Window, length: int, tile: int) -> KeyTiling:
    """Tiles of at most ``tile`` keys that the fewest queries see: with a stride, they begin at a window's end."""
    groups = {n: [window.start(q, n) for q in range(window.queries(n))] for n in _lengths(window, length)}

    def tiling(step: int, lead: int) -> KeyTiling:
        spans = {}
        for group, starts in groups.items():
            spans[group] = tuple(
                bisect_left(starts, min(first + step, group)) - bisect_right(starts, max(first, 0) - window.kernel_size)
                for first in range(-lead, group, step)
            )
        return KeyTiling(step, lead, spans[max(spans)], max(map(max, spans.values())))

    together = window.stride if window.stride <= tile else tile
    steps = {tile, tile // together * together}
    tilings = [tiling(step, lead) for step in steps for lead in (range(step) if window.stride > 1 else (0,))]
    return min(tilings, key=lambda t: (t.tiles * t.span, t.lead, -t.step))


@dataclass(frozen=True)
class LaunchShape:
    """Sizes and options of a launch; ``bias`` is 0, 1 (table) or 2 (decomposed)."""

    batch: int
    heads: int
    height: int
    width: int
    depth: int
    value_depth: int
    rows: Window
    columns: Window
    bias: int
    dtype: torch.dtype

    @property
    def shape_class(self) -> tuple:
        """Key of the autotuning: calls of one class use the same tiles."""
        size = self.batch * self.heads * self.height * self.width
        windows = [
            (w.kernel_size, w.stride, w.query_stride, w.boundary, w.dilation > 1, *([w.offset] if w.offset else []))
            for w in self.windows
        ]
        return self.dtype, self.depth, self.value_depth, self.bias, *windows, size.bit_length()

    @property
    def windows(self) -> tuple[Window, Window]:
        return self.rows, self.columns

    @property
    def blocks(self) -> tuple[int, int]:
        """Channels as padded by the kernels: depth and value depth."""
        return max(16, 1 << (self.depth - 1).bit_length()), max(16, 1 << (self.value_depth - 1).bit_length())


def _block(rows: int, columns: int, size: int, least: int = 1) -> tuple[float, int, int]:
    """(cost, block rows, block columns) of the cheapest cover of a rectangle by blocks of ``size`` positions or half
    of them, with at least ``least`` rows."""
    choices = []
    for positions, width in itertools.product((size, size // 2), (8, 16, 32, 64)):
        if width * least <= positions >= 16:
            height, across = positions // width, -(-columns // width)
            # more than one block across: the gradient of a table needs a launch for each
            cost = -(-rows // height) * (positions + BLOCK_COST) * across * (1.0 if across == 1 else 1.25)
            choices.append((cost, height, width))
    return min(choices)


def _shapes(queries: int) -> Iterator[tuple[int, int]]:
    """Candidate (rows, columns) of a tile of ``queries``."""
    for width in (4, 8, 16, 32):
        if queries // 16 <= width <= queries:
            yield queries // width, width


def _query_tile(call: LaunchShape, queries: int, keys: int) -> tuple[int, int, int, int]:
    """The cheapest (TH, TW, KR, KC)."""
    choices = []
    for th, tw in _shapes(queries):
        a, b = launch_tiling(call.rows, call.height, th), launch_tiling(call.columns, call.width, tw)
        least = -(-16 // th) if call.bias == 1 else 1  # the product that sums a table's gradient needs 16 rows
        if 8 * least > keys:
            continue
        cost, height, width = _block(a.span, b.span, keys, least)
        choices.append((a.tiles * b.tiles * cost * (queries + LOAD_COST), abs(th - tw), (th, tw, height, width)))
    return min(choices)[2]


def _key_tile(call: LaunchShape, keys: int, queries: int) -> tuple[int, int, int, int]:
    """The cheapest (TH, TW, QR, QC)."""
    choices = []
    for th, tw in _shapes(keys):
        a, b = key_tiling(call.rows, call.height, th), key_tiling(call.columns, call.width, tw)
        for size, qc in itertools.product((queries, queries // 2), (8, 16, 32, 64)):
            if qc <= size >= 16:
                cost = a.blocks(size // qc) * b.blocks(qc) * (size + BLOCK_COST) * (keys + LOAD_COST)
                choices.append((cost, abs(th - tw), (th, tw, size // qc, qc)))
    return min(choices)[2]


def _sizes(kernel: str, call: LaunchShape) -> list[tuple[int, int, int, int]]:
    """(queries or keys of a tile, keys or queries of a block, warps, stages), the default first.

    The largest that do not spill registers on sm_90; the gradient of the queries with a decomposed bias spills from 64
    channels on. Not tuned for speed yet.
    """
    depth, decomposed, keys = max(call.blocks), call.bias == 2, kernel == "keys_backward"
    if call.dtype == torch.float32:
        if depth > 64:
            large = (16, 16 if keys and depth > 128 else 32, 8, 1)
            return [large, (16, 16, 8 if keys else 4, 1)] if decomposed and large[1] > 16 else [large]
        if depth > 32:
            return [(32, 32, 8, 2)]
        return [(32, 16, 4, 2) if keys and not decomposed else (32, 32, 8, 2), (16, 32, 4, 2)]
    if depth > 128:
        if decomposed:
            return [(16, 32, 8, 1), (16, 16, 8, 1)]
        return [(64, 32, 8, 1) if kernel == "forward" else (32, 32, 8, 1)]
    if depth > 64:
        if decomposed and kernel != "forward":
            return [(32, 32, 8, 2) if keys else (64, 32, 8, 1), (16, 32, 8, 1)]
        return [(32, 32, 4, 2) if keys else (64, 32, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2)]
    if decomposed and kernel != "forward" and (depth > 32 or kernel == "queries_backward"):
        return [(64, 32, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2)]
    if kernel == "forward":
        whole = [(64, 256, 4, 2)] if decomposed and depth <= 32 else []
        return [*whole, (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 2, 2), (128, 128, 8, 2)]
    unrolled = [(64, 64 if keys else 32, 4, 2)] if depth <= 32 else []
    return [*unrolled, (64, 64, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3), (32, 32, 2, 3), (16, 64, 2, 3)]


@lru_cache(maxsize=1024)
def candidates(kernel: str, call: LaunchShape) -> tuple[tuple[int, ...], ...]:
    """Candidates (tile rows, tile columns, block rows, block columns, warps, stages), the default first."""
    find = _key_tile if kernel == "keys_backward" else _query_tile
    return tuple((*find(call, tile, block), warps, stages) for tile, block, warps, stages in _sizes(kernel, call))


# ---------------------------------------------------------------------------------------------------- launching


def _launch_shape(k: Tensor, v: Tensor, first: Tensor | None, second: Tensor | None, window: list[int]) -> LaunchShape:
    batch, height, width, heads, depth = k.shape
    bias = 0 if first is None else 1 if second is None else 2
    return LaunchShape(batch, heads, height, width, depth, v.shape[4], *windows_of(tuple(window)), bias, k.dtype)


def _dense(t: Tensor) -> Tensor:
    """``t`` with contiguous channels; other strides are kept."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _constants(call: LaunchShape, wide: bool) -> dict:
    """Compile-time constants of all kernels."""
    from ..triton_common import input_precision, power_of_2

    (bd, bdv), (a, b) = call.blocks, call.windows
    r, c = (max(16, power_of_2(2 * w.kernel_size)) if call.bias else 1 for w in (a, b))
    return {
        "D": call.depth, "DV": call.value_depth, "BD": bd, "BDV": bdv,
        "KH": a.kernel_size, "KW": b.kernel_size, "SH": a.stride, "SW": b.stride,
        "NH": a.query_stride, "NW": b.query_stride, "COUNTED_H": a.counted, "COUNTED_W": b.counted,
        "AHEAD_H": a.ahead, "AHEAD_W": b.ahead,
        "BOUNDARY": BOUNDARIES.index(a.boundary), "BIAS": call.bias, "R": r, "C": c,
        "PRECISION": input_precision(call.dtype), "WIDE": wide,
    }  # fmt: skip


def _head_stride(t: Tensor | None) -> int:
    """Head stride of a contiguous bias tensor; 0 if all heads share it."""
    return t.stride(0) if t is not None and t.ndim == 3 else 0


def _sizes_of(call: LaunchShape) -> tuple[int, ...]:
    return call.heads, call.height, call.width, call.rows.dilation, call.columns.dilation


@lru_cache(maxsize=4096)
def _offsets(window: Window, length: int) -> tuple[int, int]:
    """(smallest, largest) distance from the first row of a window to the table index of its query."""
    found: set[int] = set()
    for group in _lengths(window, length):
        query = torch.arange(window.queries(group))
        index = window.kernel_size - 1 - window.table_row(torch.zeros_like(query), query)
        found |= set((index - window.starts(query, group)).tolist())
    return min(found), max(found)


@dataclass(frozen=True)
class Expansion:
    """Bias and mask of a launch, expanded: see ``_bias`` in ``triton_kernels.py``."""

    table: Tensor | None
    nearest: int
    constants: dict[str, int]

    @property
    def head_stride(self) -> int:
        return self.table.stride(0) if self.table is not None and self.table.shape[0] > 1 else 0


def expand_bias(
    table: Tensor | None, call: LaunchShape, scale: float, tile: tuple[int, int], block: tuple[int, int], keys: bool,
    device: torch.device,
) -> Expansion:  # fmt: skip
    """The table by query column and key column of each tile of columns, with -inf where a query does not see a key;
    ``keys``: for tiles of keys and blocks of queries."""
    from . import triton_kernels

    if call.bias == 2:
        return Expansion(None, 0, {"SLABS": 1, "ABOVE": 0, "ROWS": 0})
    rows, columns = call.windows
    if keys:
        keys_across = key_tiling(columns, call.width, tile[1])
        before, lead, step, tiles = 0, keys_across.lead, keys_across.step, keys_across.tiles
        span, above, other = keys_across.span, tile[0], rows.kernel_size + tile[0]
    else:
        a, b = launch_tiling(rows, call.height, tile[0]), launch_tiling(columns, call.width, tile[1])
        before, lead, step, tiles = b.before, 0, b.step, b.tiles
        span, above, other = b.span, max(1, a.span - rows.kernel_size), -(-a.span // block[0]) * block[0]
    span = -(-span // block[1]) * block[1]
    nearest, farthest = _offsets(rows, call.height) if table is not None else (0, 0)
    constants = {"SLABS": farthest - nearest + 1, "ABOVE": above, "ROWS": above + other}
    heads, groups = 1 if table is None else call.heads, columns.dilation
    size = math.prod((constants["SLABS"], constants["ROWS"], tile[1], span))
    expanded = torch.empty(heads, groups * tiles, size, dtype=torch.float32, device=device)
    triton_kernels.expand[(heads, groups * tiles, -(-size // 1024))](
        table, expanded, _head_stride(table), 1 / scale, call.width, groups, step, tiles, lead, before, nearest,
        KH=rows.kernel_size, KW=columns.kernel_size, STRIDE=columns.stride, APART=columns.query_stride,
        COUNTED=columns.counted, AHEAD=columns.ahead, BOUNDARY=BOUNDARIES.index(columns.boundary),
        BIAS=int(table is not None), T=tile[1], S=span, **constants, KEYS=keys, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return Expansion(expanded, nearest, constants)


def _images(call: LaunchShape, programs: int, device: torch.device) -> int:
    """Programs that share the images of a tile, about equally: about eight in all per multiprocessor."""
    from .. import triton_common

    shares = min(call.batch, max(1, -(-8 * triton_common.processors(device) // programs)))
    return -(-call.batch // -(-call.batch // shares))


def _unrolled(kernel: str, call: LaunchShape, blocks: int, keys: int, stages: int) -> int:
    """``blocks`` if the loop over the keys is unrolled, so that a whole image is loaded ahead; else 1."""
    if call.dtype == torch.float32 or stages != 2 or blocks > UNROLLED_BLOCKS:
        return 1
    backward, decomposed = kernel != "forward", call.bias == 2
    if (backward and decomposed) or (max(call.blocks) > 32 and (backward or decomposed)):
        return 1  # too many registers
    return blocks if blocks * keys * sum(call.blocks) * 2 * stages <= UNROLLED_BYTES else 1


def launch_forward(q, k, v, first, second, out, lse, call: LaunchShape, scale: float, choice: Choice, wide: bool):
    from . import triton_kernels

    th, tw, kr, kc, warps, stages = choice
    a, b = launch_tiling(call.rows, call.height, th), launch_tiling(call.columns, call.width, tw)
    programs = call.rows.dilation * call.columns.dilation * a.tiles * b.tiles * call.heads
    bias = expand_bias(first, call, scale, (th, tw), (kr, kc), False, q.device)
    down, across = -(-a.span // kr), -(-b.span // kc)
    triton_kernels.forward[(programs, _images(call, programs, q.device))](
        q, k, v, bias.table, first, second, out, lse, *q.stride()[:4], *k.stride()[:4], *v.stride()[:4],
        bias.head_stride, _head_stride(first), _head_stride(second), scale * LOG2E,
        call.batch, *_sizes_of(call), a.step, b.step, a.tiles, b.tiles, b.before, bias.nearest,
        **_constants(call, wide), **bias.constants, TH=th, TW=tw, KR=kr, KC=kc, DOWN=down, CHUNKS=across,
        ALIKE=k.stride() == v.stride(), UNROLL=_unrolled("forward", call, down * across, kr * kc, stages),
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


def _programs(call: LaunchShape, count: int, share: int) -> int:
    """Programs per head that share ``count`` tiles when each writes partial sums of a bias gradient."""
    return max(1, min(count, WORKSPACE_BYTES // (4 * share * call.heads)))


def launch_queries_backward(
    q, k, v, first, second, out, grad, lse, delta, dq, call: LaunchShape, scale: float, wanted: bool, choice, wide: bool
) -> list[Tensor]:
    """Compute dq and delta; return the float32 gradients of the bias if ``wanted``."""
    from ..triton_common import power_of_2
    from . import triton_kernels

    th, tw, kr, kc, warps, stages = choice
    a, b = launch_tiling(call.rows, call.height, th), launch_tiling(call.columns, call.width, tw)
    count = call.rows.dilation * call.columns.dilation * a.tiles * b.tiles
    constants = _constants(call, wide)
    r, c, down, chunks = constants["R"], constants["C"], -(-a.span // kr), -(-b.span // kc)
    bias = expand_bias(first, call, scale, (th, tw), (kr, kc), False, q.device)
    share = r * tw * kc * chunks if call.bias == 1 else (r + c) * constants["BD"]
    images, programs = _images(call, count * call.heads, q.device), count
    if wanted and _programs(call, count, images * share) < count:
        images, programs = 1, _programs(call, count, share)

    def run(dq: bool, dbias: bool, work: Tensor | None, chunk: int | None) -> None:
        blocks = down * (chunks if chunk is None else 1)
        triton_kernels.queries_backward[(programs * call.heads, images)](
            q, k, v, bias.table, first, second, out, grad, lse, delta, dq_, work,
            *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *grad.stride()[:4],
            bias.head_stride, _head_stride(first), _head_stride(second), scale * LOG2E, call.batch, *_sizes_of(call),
            a.step, b.step, a.tiles, b.tiles, b.before, bias.nearest, count, programs, chunk or 0,
            **constants, **bias.constants, SPAN_H=power_of_2(down * kr, 16), SPAN_W=power_of_2(chunks * kc, 16),
            TH=th, TW=tw, KR=kr, KC=kc, DOWN=down, CHUNKS=chunks,
            ALIKE=k.stride() == v.stride(), UNROLL=_unrolled("queries_backward", call, blocks, kr * kc, stages),
            DQ=dq, DBIAS=dbias, ALL_CHUNKS=chunk is None, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip

    dq_ = dq
    if not wanted:
        run(True, False, None, None)
        return []
    if call.bias == 2:
        work = q.new_empty(call.heads, images * programs, r + c, constants["BD"], dtype=torch.float32)
        run(True, True, work, None)
        sums = work.sum(1)[..., : call.depth].split((r, c), 1)
        sums = [s[:, : 2 * w.kernel_size - 1] for s, w in zip(sums, call.windows, strict=True)]
        return [s if t.ndim == 3 else s.sum(0) for s, t in zip(sums, (first, second), strict=True)]
    work = q.new_empty(chunks, call.heads, images * programs, r * tw * kc, dtype=torch.float32)
    if chunks == 1:
        run(True, True, work, None)
    else:
        run(True, False, None, None)
        for chunk in range(chunks):
            run(False, True, work[chunk], chunk)
    dtable = torch.empty(first.shape, dtype=torch.float32, device=first.device)
    triton_kernels.table_gradient[(call.heads, first.shape[1])](
        work.sum(2), dtable, b.before, ROWS=first.shape[1], COLUMNS=first.shape[2], NW=call.columns.query_stride,
        TW=tw, KC=kc, CHUNKS=chunks, R=r, C=c,
    )  # fmt: skip
    return [dtable]


def launch_keys_backward(
    q, k, v, first, second, grad, lse, delta, dk, dv, call: LaunchShape, scale: float, choice: Choice, wide: bool
):
    from . import triton_kernels

    th, tw, qr, qc, warps, stages = choice
    a, b = key_tiling(call.rows, call.height, th), key_tiling(call.columns, call.width, tw)
    programs = call.rows.dilation * call.columns.dilation * a.tiles * b.tiles * call.heads
    bias = expand_bias(first, call, scale, (th, tw), (qr, qc), True, q.device)
    down, across = -(-a.span // qr), -(-b.span // qc)
    triton_kernels.keys_backward[(programs, _images(call, programs, q.device))](
        q, k, v, bias.table, first, second, grad, lse, delta, dk, dv,
        *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *grad.stride()[:4],
        bias.head_stride, _head_stride(first), _head_stride(second), scale * LOG2E, call.batch, *_sizes_of(call),
        a.step, b.step, a.tiles, b.tiles, a.lead, b.lead, bias.nearest,
        **_constants(call, wide), **bias.constants, TH=th, TW=tw, QR=qr, QC=qc, DOWN=down, CHUNKS=across,
        ALIKE=q.stride() == grad.stride(), VARIES=call.bias == 2 and down * across > 1,
        UNROLL=_unrolled("keys_backward", call, down * across, qr * qc, stages),
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- operations


@torch.library.custom_op("foveal::neighborhood_attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, second: Tensor | None, window: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp in base 2 of each query). ``first`` alone is a bias table; ``first`` and ``second`` are row
    and column embeddings."""
    from ..triton_common import launch, wide

    q, k, v = _dense(q), _dense(k), _dense(v)
    first, second = (None if t is None else t.contiguous() for t in (first, second))
    out, lse = _outputs(q, v)
    if q.numel() == 0:
        return out, lse
    call, far = _launch_shape(k, v, first, second, window), wide(q, k, v, out)

    def run(choice: Choice) -> None:
        launch_forward(q, k, v, first, second, out, lse, call, scale, choice, far)

    with torch.cuda.device_of(q):
        launch("attention", call.shape_class, candidates("forward", call), run)
    return out, lse


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:4], v.shape[4]), q.new_empty(q.shape[:4], dtype=torch.float32)


@attention.register_fake
def _(q, k, v, first, second, window, scale):
    return _outputs(q, v)


@torch.library.custom_op("foveal::neighborhood_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: list[int],
    scale: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dfirst, dsecond); the last two are empty without a bias or if ``wanted`` is false."""
    from ..triton_common import launch, wide

    grad, q, k, v = _dense(grad), _dense(q), _dense(k), _dense(v)
    dense = tuple(None if t is None else t.contiguous() for t in (first, second))
    dq, dk, dv, dfirst, dsecond = _gradients(q, k, v, first, second, wanted)
    if q.numel() == 0:
        return dq, dk, dv, dfirst.zero_(), dsecond.zero_()
    call, far = _launch_shape(k, v, first, second, window), wide(grad, q, k, v, out, dk, dv)
    delta = torch.empty_like(lse)

    def queries(choice: Choice) -> list[Tensor]:
        return launch_queries_backward(q, k, v, *dense, out, grad, lse, delta, dq, call, scale, wanted, choice, far)

    def keys(choice: Choice) -> None:
        launch_keys_backward(q, k, v, *dense, grad, lse, delta, dk, dv, call, scale, choice, far)

    with torch.cuda.device_of(q):
        shape_class = (*call.shape_class, wanted)
        sums = launch("attention, queries", shape_class, candidates("queries_backward", call), queries)
        launch("attention, keys", shape_class, candidates("keys_backward", call), keys)  # after delta
    for target, total in zip((dfirst, dsecond), sums, strict=False):
        target.copy_(total)
    return dq, dk, dv, dfirst, dsecond


def _gradients(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, second: Tensor | None, wanted: bool):
    contiguous = (t.new_empty(t.shape) for t in (q, k, v))
    biases = (t.new_empty(t.shape) if wanted and t is not None else q.new_empty(0) for t in (first, second))
    return *contiguous, *biases


@attention_backward.register_fake
def _(grad, q, k, v, first, second, out, lse, window, scale, wanted):
    return _gradients(q, k, v, first, second, wanted)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, first, second, ctx.window, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, first, second, *output)


def _backward(ctx, grad: Tensor | None, _):
    wanted = any(ctx.needs_input_grad[3:5])
    dq, dk, dv, *biases = attention_backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale, wanted)
    biases = (g if needed else None for g, needed in zip(biases, ctx.needs_input_grad[3:5], strict=True))
    return dq, dk, dv, *biases, None, None


attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.foveal.neighborhood_attention)
def _(q, k, v, first, second, window, *_, **__) -> int:
    return flops.attention(pairs_of(q, window), q[4], v[4])


@register_flop_formula(torch.ops.foveal.neighborhood_attention_backward)
def _(grad, q, k, v, first, second, out, lse, window, *_, **__) -> int:
    return flops.attention(pairs_of(q, window), q[4], v[4], backward=True)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, problem: Problem) -> Tensor:
    """[B, h, w, N, D] x [B, H, W, N, D] x [B, H, W, N, V] -> [B, h, w, N, V]."""
    # float32 is the most a bias needs, as q is never float64; with a float32 q it is float32, because the gradients of
    # the logits are multiplied in the dtype of the bias
    exact = q.dtype == torch.float32
    tensors = () if bias is None else bias.tensors
    tensors = tuple(t.float() if exact or t.dtype == torch.float64 else t for t in tensors)
    first, second = (*tensors, None, None)[:2]
    scale = problem.scale
    if not scale > 0:  # the kernels divide by it, and take the largest logit before they multiply
        k, scale = k * scale, 1.0
    return attention(q, k, v, first, second, window_list(*problem.windows), scale)[0]
