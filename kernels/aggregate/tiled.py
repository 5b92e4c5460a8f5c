"""Neighborhood aggregation in plain PyTorch operations: the default on CPUs, for compilers and for exporters.

The map is cut into tiles of queries with one span of keys each, as for attention (``kernels/tiling.py``). ``M`` is the
matrix of a tile, queries by keys of the span: the weights inside the windows, zeros elsewhere. There are three
products, and the gradients of each are the other two:

* ``apply``: ``M @ values``, the aggregation;
* ``dots``: ``queries @ keys^T`` inside the windows: the logits of attention, the gradient of the weights;
* ``spread``: ``M^T @ queries``, summed over the spans: the gradient of the values.

A tile may be a whole row or the whole map; the planner chooses the cheapest.

There are two forms: standard operators on all tiles at once, for exporters and other devices, and chunks that stay in
the CPU's cache; torch.compile calls these as one node. Only the two inputs are kept for the backward pass.

B batch, H W map, N heads, C channels, K = Kh * Kw keys of a window, G G2 dilation groups of rows and columns,
R Q tiles of rows and columns, T T2 queries of a tile, S S2 keys of its span.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import flops, tiling
from ..cache import CONSTANTS
from ..problem import Problem
from ..tiling import AxisTiling, Plans
from ..window import Window, pairs_of, window_list, windows_of
from .softmax import fold_table, mix_by, weights

# What copying one key and value into a span costs, in units of one query-key pair; fitted on a 2-core CPU.
COPY_COST = 32.0
FILL_COST = 2.0  # one weight of a map that the tiles do not divide


def unsupported_reason(problem: Problem) -> str | None:
    """Supports every call on any device."""
    return None


def _cost(a: AxisTiling, b: AxisTiling) -> float:
    """Cost of the tiles of one dilation group, in query-key pairs."""
    copied = a.tiles * a.span * b.tiles * b.span
    weights = a.tiles * a.tile * a.keys * b.tiles * b.tile * b.keys
    filled = weights if a.ragged or b.ragged else 0  # padding copies the weights
    return tiling.pairs(a, b) + COPY_COST * copied + FILL_COST * filled


def _places(rows: Window, columns: Window, a: AxisTiling, b: AxisTiling, device: torch.device) -> Tensor:
    """Index of each query's keys in the span of its tile, for every pattern of tiles: [P, P2, T*T2, K]."""
    sides = []
    for window, axis in ((rows, a), (columns, b)):
        tile = torch.tensor(axis.samples, device=device)[:, None] * axis.tile
        query = (tile + torch.arange(axis.tile, device=device)).clamp(max=axis.length - 1)
        start = window.starts(query, axis.length) - (tile - axis.before)
        sides.append(start[..., None] + torch.arange(window.kernel_size, device=device))  # P T Kh
    row, column = sides
    places = row[:, None, :, None, :, None] * b.span + column[None, :, None, :, None, :]
    return places.flatten(4, 5).flatten(2, 3).contiguous()


# -------------------------------------------------------------------------------------- all tiles at once


def _all_at_once(name: str, x: Tensor, y: Tensor, problem: Problem, plans: Plans) -> Tensor:
    """``apply`` or ``dots`` in standard operators; maps [B, H, W, N, C]."""
    outs = []
    dtype, working = y.dtype, tiling.working_dtype(y.dtype)
    x, y = (tiling.split_groups(t.to(working), problem.dilation) for t in (x, y))
    for a, b in plans:
        places = CONSTANTS.get(_places, problem.rows, problem.columns, a, b, x.device)
        for dim, axis in ((0, a), (1, b)):
            places = places.index_select(dim, CONSTANTS.get(tiling.pattern_order, axis, x.device))
        keys = tiling.key_spans(tiling.pad_keys(tiling.select_groups(y, a, b), a, b), a, b).flatten(6, 7)
        tiles = tiling.query_tiles(tiling.select_groups(x, a, b), a, b).flatten(6, 7)
        if name == "apply":
            zeros = tiles.new_zeros(*tiles.shape[:7], a.span * b.span)
            if torch.jit.is_tracing():  # the TorchScript exporter would write the batch size into these zeros
                zeros = F.pad(tiles[..., :0], (0, a.span * b.span))
            out = zeros.scatter(-1, places.expand_as(tiles), tiles) @ keys
        else:
            products = tiles @ keys.transpose(-1, -2)
            out = products.gather(-1, places.expand_as(products[..., : places.shape[-1]]))
        outs.append(tiling.from_query_tiles(out.unflatten(6, (a.tile, b.tile)), a, b))
    return tiling.join(outs, plans, problem).to(dtype)


# ------------------------------------------------------------------------------------------- chunk by chunk


class _Chunked:
    """The three products chunk by chunk, on maps [B, H, W, N, C]. Keys outside the map are zeros."""

    def __init__(self, like: Tensor, problem: Problem, plans: Plans) -> None:
        self.like, self.problem, self.plans = like, problem, plans
        self.scratch = tiling.Scratch(like, tiling.working_dtype(like.dtype))

    def groups(self, *maps: Tensor) -> list[Tensor]:
        return [tiling.split_groups(x, self.problem.dilation) for x in maps]

    def empty(self, depth: int) -> Tensor:
        """An uninitialised map, padded to a multiple of the dilation."""
        (d, d2), (batch, height, width, heads, _) = self.problem.dilation, self.like.shape
        return self.like.new_empty(batch, height + -height % d, width + -width % d2, heads, depth)

    def cropped(self, padded: Tensor) -> Tensor:
        return tiling.crop(padded, *self.like.shape[1:3])

    def chunks(self, groups: Tensor) -> Iterator[tuple]:
        """(tiling of the rows, tiling of the columns, index of the chunk in [B, G, G2, N, h, w, C], its tile rows)."""
        for a, b in self.plans:
            for index, _, tile_rows in tiling.chunks(groups.shape, a, b, tiling.CHUNK):
                yield a, b, index, tile_rows

    def blocks(self, matrix: Tensor, weights: Tensor, rows: slice, a: AxisTiling, b: AxisTiling) -> Iterator[tuple]:
        """(matrices, weights, index of the weights in the matrices) of each rectangle of tiles with one pattern."""
        places = CONSTANTS.get(_places, self.problem.rows, self.problem.columns, a, b, matrix.device)
        places = places.unflatten(2, (a.tile, b.tile))
        for r, c, p, p2 in tiling.blocks(rows, a, b):
            part = weights[:, :, :, :, r, c]
            yield matrix[:, :, :, :, r, c], part, places[p, p2].expand(part.shape)

    def matrices(self, tiles: Tensor, rows: slice, a: AxisTiling, b: AxisTiling) -> Tensor:
        """``M`` of some tile rows of weights [B, G, G2, N, R, Q, T, T2, K]: [B*G*G2*N*R*Q, T*T2, S*S2]."""
        tiles = tiles[:, :, :, :, rows]
        matrix = self.scratch("matrix", *tiles.shape[:8], a.span * b.span).zero_()
        for target, part, places in self.blocks(matrix, tiles, rows, a, b):
            target.scatter_(-1, places, part.to(matrix.dtype))
        return matrix.view(-1, a.tile * b.tile, a.span * b.span)

    def apply(self, weights: Tensor, v: Tensor) -> Tensor:
        out = self.empty(v.shape[-1])
        ws, vs, outs = self.groups(weights, v, out)
        for a, b, index, tile_rows in self.chunks(vs):
            tiles, spans = tiling.query_tiles(ws[index], a, b), self.scratch.spans("padded", vs[index], a, b)
            for rows in tile_rows:
                matrix, values = self.matrices(tiles, rows, a, b), self.scratch.flat("keys", spans, rows)
                tiling.store(outs[index], self.scratch.bmm("out", matrix, values), rows, (a.tile, b.tile))
        return self.cropped(out)

    def dots(self, q: Tensor, k: Tensor) -> Tensor:
        kernel_area = math.prod(self.problem.kernel_size)
        out = self.empty(kernel_area)
        qs, ks, outs = self.groups(q, k, out)
        for a, b, index, tile_rows in self.chunks(qs):
            tiles, spans = tiling.query_tiles(qs[index], a, b), self.scratch.spans("padded", ks[index], a, b)
            # read straight into the output where its tiles are views of it
            targets = None
            if out.dtype == self.scratch.dtype and not (a.ragged or b.ragged):
                targets = tiling.query_tiles(outs[index], a, b)
            for rows in tile_rows:
                queries, keys = self.scratch.flat("queries", tiles, rows), self.scratch.flat("keys", spans, rows)
                shape = (*tiles.shape[:4], rows.stop - rows.start, *tiles.shape[5:8])
                products = self.scratch.bmm("matrix", queries, keys.transpose(1, 2)).view(*shape, -1)
                read = self.scratch("out", *shape, kernel_area) if targets is None else targets[:, :, :, :, rows]
                for source, target, places in self.blocks(products, read, rows, a, b):
                    torch.gather(source, -1, places, out=target)
                if targets is None:
                    tiling.store(outs[index], read, rows, (a.tile, b.tile))
        return self.cropped(out)

    def spread(self, weights: Tensor, q: Tensor) -> Tensor:
        out = self.empty(q.shape[-1])
        ws, qs, outs = self.groups(weights, q, out)
        for a, b, index, tile_rows in self.chunks(qs):
            weight_tiles, tiles = (tiling.query_tiles(t[index], a, b) for t in (ws, qs))
            total = self.scratch("padded", *tiling.padded_shape(outs[index], a, b)).zero_()
            for rows in tile_rows:
                matrix, queries = self.matrices(weight_tiles, rows, a, b), self.scratch.flat("queries", tiles, rows)
                spans = self.scratch.bmm("spans", matrix.transpose(1, 2), queries)
                shape = (*tiles.shape[:4], rows.stop - rows.start, b.tiles, a.span, b.span, tiles.shape[-1])
                tiling.add_spans(total, spans.view(shape), rows, a, b)
            outs[index] = tiling.inner(total, a, b)
        return self.cropped(out)


def _derivatives(name: str, x: Tensor, y: Tensor, grad: Tensor) -> tuple[tuple[str, Tensor, Tensor], ...]:
    """The products that are the gradients of ``x`` and ``y``."""
    return {
        "apply": (("dots", grad, y), ("spread", x, grad)),  # x weights, y values
        "dots": (("apply", grad, y), ("spread", grad, x)),  # x queries, y keys
        "spread": (("dots", y, grad), ("apply", x, grad)),  # x weights, y queries
    }[name]


class _Product(torch.autograd.Function):
    """One of the products, by name. Its gradients are the other two, so derivatives of every order exist."""

    @staticmethod
    def forward(ctx, name, x, y, problem, plans):
        ctx.call = name, problem, plans
        ctx.save_for_backward(x, y)
        return getattr(_Chunked(y, problem, plans), name)(x, y)

    @staticmethod
    def backward(ctx, grad):
        name, problem, plans = ctx.call
        wanted = zip(_derivatives(name, *ctx.saved_tensors, grad), ctx.needs_input_grad[1:3], strict=True)
        return None, *(_Product.apply(*of, problem, plans) if needed else None for of, needed in wanted), None, None


# ------------------------------------------------------------------------------------ nodes of compiled graphs


def _problem(y: Tensor, window: list[int]) -> Problem:
    rows, columns = windows_of(tuple(window))
    return Problem(tuple(y.shape), y.shape[4], rows, columns, y.dtype, y.device.type, False, False)


@torch.library.custom_op("foveal::tiled_product", mutates_args=())
def _node(name: str, x: Tensor, y: Tensor, window: list[int]) -> Tensor:
    """`_Product` for torch.compile, whose code for all tiles at once takes longer than the chunks."""
    problem = _problem(y, window)
    with torch.no_grad():
        return getattr(_Chunked(y, problem, tiling.plan_of(problem, _cost)), name)(x, y)


@_node.register_fake
def _(name, x, y, window):
    return y.new_empty(*y.shape[:4], window[1] * window[7] if name == "dots" else y.shape[4])


def _node_setup_context(ctx, inputs, output) -> None:
    ctx.name, x, y, ctx.window = inputs
    ctx.save_for_backward(x, y)


def _node_backward(ctx, grad):
    wanted = zip(_derivatives(ctx.name, *ctx.saved_tensors, grad), ctx.needs_input_grad[1:3], strict=True)
    return None, *(_node(*of, ctx.window) if needed else None for of, needed in wanted), None


_node.register_autograd(_node_backward, setup_context=_node_setup_context)


@torch.library.custom_op("foveal::tiled_mix", mutates_args=())
def _mix_node(logits: Tensor, v: Tensor, table: Tensor | None, kernel_bias: Tensor | None, window: list[int]) -> Tensor:
    """`mix` of eager mode for torch.compile, which would look up the table again in every pass of the softmax."""
    with torch.no_grad():
        return _mix(logits, v, table, kernel_bias, _problem(v, window)).contiguous()


@_mix_node.register_fake
def _(logits, v, table, kernel_bias, window):
    return v.new_empty(v.shape)


@torch.library.custom_op("foveal::tiled_mix_backward", mutates_args=())
def _mix_node_backward(
    grad: Tensor, logits: Tensor, v: Tensor, table: Tensor | None, kernel_bias: Tensor | None, window: list[int]
) -> list[Tensor]:
    """Gradients of the logits, the values and those biases that are given."""
    problem, inside = _problem(v, window), window
    if problem.boundary == "mask":  # the weights of keys outside are zero
        inside = window_list(*(replace(each, boundary="zero") for each in problem.windows))
    with torch.no_grad():
        made, wide = weights(logits, table, kernel_bias, problem), tiling.working_dtype(v.dtype)
        dots = _node("dots", grad, v, inside).to(wide)
        dz = torch.ops.aten._softmax_backward_data(dots, made.to(wide), -1, wide)
        grads = [dz.to(logits.dtype), _node("spread", made, grad, inside)]
        together = dz.sum(0)  # H W N K
        if table is not None:
            grads.append(fold_table(together, table, problem))
        if kernel_bias is not None:
            grads.append(together.sum((0, 1, 2)).to(kernel_bias.dtype))
    return [g.contiguous() for g in grads]


@_mix_node_backward.register_fake
def _(grad, logits, v, table, kernel_bias, window):
    return [t.new_empty(t.shape) for t in (logits, v, table, kernel_bias) if t is not None]


def _mix_setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _mix_gradient(ctx, grad):
    tensors = ctx.saved_tensors
    grads = iter(_mix_node_backward(grad, *tensors, ctx.window))
    found = [None if t is None else next(grads) for t in tensors]
    return *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False)), None


_mix_node.register_autograd(_mix_gradient, setup_context=_mix_setup_context)


@register_flop_formula(torch.ops.foveal.tiled_product)
def _(name, x, y, window, *_, **__) -> int:
    return flops.aggregation(pairs_of(y, window), y[4])


@register_flop_formula(torch.ops.foveal.tiled_mix)
def _(logits, v, table, kernel_bias, window, *_, **__) -> int:
    return flops.aggregation(pairs_of(v, window), v[4])


@register_flop_formula(torch.ops.foveal.tiled_mix_backward)
def _(grad, logits, v, table, kernel_bias, window, *_, **__) -> int:
    return flops.aggregation(pairs_of(v, window), v[4], backward=True)


# ----------------------------------------------------------------------------------------------- the backend


def _run(name: str, x: Tensor, y: Tensor, problem: Problem) -> Tensor:
    if tiling.one_node(problem, x, y):
        return _node(name, x, y, window_list(*problem.windows))
    plans = tiling.plan_of(problem, _cost)
    if tiling.chunkable(problem, x, y):
        return _Product.apply(name, x, y, problem, plans)
    return _all_at_once(name, x, y, problem, plans)


def forward(weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """[B, H, W, N, Kh*Kw] x [B, H, W, N, D] -> [B, H, W, N, D]."""
    return _run("apply", weights, v, problem)


_mix = mix_by(forward)


def mix(logits: Tensor, v: Tensor, table: Tensor | None, kernel_bias: Tensor | None, problem: Problem) -> Tensor:
    """[B, H, W, N, K] x [B, H, W, N, D] -> [B, H, W, N, D]: ``forward`` with a softmax over logits plus biases."""
    tensors = [t for t in (logits, v, table, kernel_bias) if t is not None]
    if tiling.one_node(problem, *tensors):
        return _mix_node(logits, v, table, kernel_bias, window_list(*problem.windows))
    return _mix(logits, v, table, kernel_bias, problem)


def logits(q: Tensor, k: Tensor, problem: Problem) -> Tensor:
    """[B, H, W, N, D] x [B, H, W, N, D] -> [B, H, W, N, Kh*Kw]: ``q . k`` for the keys of every window."""
    return _run("dots", q, k, problem)
