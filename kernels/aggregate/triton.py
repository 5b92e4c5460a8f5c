"""Neighborhood aggregation in Triton: the CUDA default.

As in ``tiled.py``, ``M`` is the matrix of a tile (queries by keys, zeros outside the windows), and there are three
products. The gradients of each are the other two, so derivatives of every order exist:

* ``apply``: ``M @ values``, the aggregation, one program per tile of queries;
* ``dots``: ``queries @ keys^T`` inside the windows, one program per tile of queries;
* ``spread``: ``M^T @ queries``, one program per tile of keys, over the queries that see one of them.

Each output is written by one program in a fixed order of summation; there are no atomics.

``mix`` aggregates with the softmax of logits and biases: the same kernels compute the weights from the logits as they
load them, and store the log-sum-exp of each query for the backward pass.

B batch, H W map, N heads, D channels, K = Kh * Kw keys of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import flops, triton_support
from ..problem import Problem
from ..tracing import transformed

DEEPEST = 256  # channels of a head


def unsupported_reason(problem: Problem) -> str | None:
    if problem.value_depth > DEEPEST:
        return f"the Triton kernels of aggregation take heads of at most {DEEPEST} channels (got {problem.value_depth})"
    if math.prod(problem.kernel_size) >= triton_support.LARGEST:
        most = triton_support.LARGEST - 1
        return f"the Triton kernels of aggregation take windows of at most {most} keys (got {problem.kernel_size})"
    if not problem.tracing and transformed():
        return "the transforms of torch.func and forward mode need standard operators"
    return triton_support.unsupported_reason(problem)


# --------------------------------------------------------------------------------------------- the three products


def _product(name: str, depth: Callable[[Tensor, list[int]], int]) -> torch.library.CustomOpDef:
    """Register the product of ``x`` and ``y`` as an operator; ``depth(y, window)``: channels of its output."""

    def empty(y: Tensor, window: list[int]) -> Tensor:
        return y.new_empty(*y.shape[:4], depth(y, window))

    @torch.library.custom_op(f"foveal::aggregate_{name}", mutates_args=())
    def product(x: Tensor, y: Tensor, window: list[int], boundary: str) -> Tensor:
        from . import triton_kernels

        out = empty(y, window)
        getattr(triton_kernels, name)(x, y, out, window, boundary)
        return out

    @product.register_fake
    def _(x: Tensor, y: Tensor, window: list[int], boundary: str) -> Tensor:
        return empty(y, window)

    return product


_apply = _product("apply", lambda v, window: v.shape[4])
_dots = _product("dots", lambda k, window: window[0] * window[1])
_spread = _product("spread", lambda q, window: q.shape[4])


def _setup_context(ctx, inputs, output) -> None:
    x, y, *ctx.window = inputs
    ctx.save_for_backward(x, y)


def _derivative(of_x: Callable[..., Tensor], of_y: Callable[..., Tensor]) -> Callable:
    def backward(ctx, grad: Tensor):
        wanted = zip((of_x, of_y), ctx.needs_input_grad, strict=False)
        return *(of(grad, *ctx.saved_tensors, *ctx.window) if needed else None for of, needed in wanted), None, None

    return backward


# x, y: weights and values; queries and keys; weights and queries
for _operator, _of_x, _of_y in (
    (_apply, lambda g, x, y, *w: _dots(g, y, *w), lambda g, x, y, *w: _spread(x, g, *w)),
    (_dots, lambda g, x, y, *w: _apply(g, y, *w), lambda g, x, y, *w: _spread(g, x, *w)),
    (_spread, lambda g, x, y, *w: _dots(y, g, *w), lambda g, x, y, *w: _apply(x, g, *w)),
):
    _operator.register_autograd(_derivative(_of_x, _of_y), setup_context=_setup_context)


# ------------------------------------------------------------------------------------- weights from a softmax


@torch.library.custom_op("foveal::aggregate_mix", mutates_args=())
def _mix(
    logits: Tensor, v: Tensor, table: Tensor | None, kernel_bias: Tensor | None, window: list[int], boundary: str
) -> tuple[Tensor, Tensor]:
    from . import triton_kernels

    out, sums = v.new_empty(v.shape), v.new_empty(v.shape[:4], dtype=torch.float32)
    softmax = {"sums": sums, "table": table, "kernel_bias": kernel_bias}
    triton_kernels.apply(logits, v, out, window, boundary, softmax)
    return out, sums


@_mix.register_fake
def _(logits, v, table, kernel_bias, window, boundary):
    return v.new_empty(v.shape), v.new_empty(v.shape[:4], dtype=torch.float32)


@torch.library.custom_op("foveal::aggregate_mix_backward", mutates_args=())
def _mix_backward(
    grad: Tensor,
    logits: Tensor,
    v: Tensor,
    table: Tensor | None,
    kernel_bias: Tensor | None,
    out: Tensor,
    sums: Tensor,
    window: list[int],
    boundary: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the logits, values, table and kernel bias; empty tensors for inputs that are not given."""
    from . import triton_kernels

    softmax = {"sums": sums, "table": table, "kernel_bias": kernel_bias}
    grad_logits, grad_v = v.new_empty(logits.shape), v.new_empty(v.shape)
    triton_kernels.dots(grad, v, grad_logits, window, boundary, logits, out, softmax)
    triton_kernels.spread(logits, grad, grad_v, window, boundary, softmax)
    grad_table, grad_bias = v.new_empty(0), v.new_empty(0)
    if table is not None or kernel_bias is not None:
        together = grad_logits.sum(0, dtype=torch.float32)
        if table is not None:
            sums_of_table = together.new_empty(table.shape)
            triton_kernels.fold_table(together, sums_of_table, window, boundary)
            grad_table = sums_of_table.to(table.dtype)
        if kernel_bias is not None:
            grad_bias = together.sum((0, 1, 2)).to(kernel_bias.dtype)
    return grad_logits, grad_v, grad_table, grad_bias


@_mix_backward.register_fake
def _(grad, logits, v, table, kernel_bias, out, sums, window, boundary):
    return (
        v.new_empty(logits.shape),
        v.new_empty(v.shape),
        v.new_empty(0) if table is None else table.new_empty(table.shape),
        v.new_empty(0) if kernel_bias is None else kernel_bias.new_empty(kernel_bias.shape),
    )


def _mix_setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.boundary = inputs
    ctx.save_for_backward(*tensors, *output)


def _mix_gradient(ctx, grad: Tensor, _):
    logits, v, table, kernel_bias, out, sums = ctx.saved_tensors
    grads = _mix_backward(grad, logits, v, table, kernel_bias, out, sums, ctx.window, ctx.boundary)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:4], strict=True)), None, None


_mix.register_autograd(_mix_gradient, setup_context=_mix_setup_context)


# the pairs of a query and a key are the elements of the weights, logits or dots


@register_flop_formula([torch.ops.foveal.aggregate_apply, torch.ops.foveal.aggregate_spread])
def _(weights, y, *_, **__) -> int:
    return flops.aggregation(math.prod(weights), y[4])


@register_flop_formula(torch.ops.foveal.aggregate_dots)
def _(q, k, *_, out_shape, **__) -> int:
    return flops.aggregation(math.prod(out_shape), k[4])


@register_flop_formula(torch.ops.foveal.aggregate_mix)
def _(logits, v, *_, **__) -> int:
    return flops.aggregation(math.prod(logits), v[4])


@register_flop_formula(torch.ops.foveal.aggregate_mix_backward)
def _(grad, logits, v, *_, **__) -> int:
    return flops.aggregation(math.prod(logits), v[4], backward=True)


# ----------------------------------------------------------------------------------------------- the backend


def _window(problem: Problem) -> tuple[list[int], str]:
    return [*problem.kernel_size, *problem.dilation], problem.boundary


def forward(weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """[B, H, W, N, K] x [B, H, W, N, D] -> [B, H, W, N, D]."""
    return _apply(weights, v, *_window(problem))


def logits(q: Tensor, k: Tensor, problem: Problem) -> Tensor:
    """[B, H, W, N, D] x [B, H, W, N, D] -> [B, H, W, N, K]: ``q . k`` for the keys of every window."""
    return _dots(q, k, *_window(problem))


def mix(logits: Tensor, v: Tensor, table: Tensor | None, kernel_bias: Tensor | None, problem: Problem) -> Tensor:
    """[B, H, W, N, K] x [B, H, W, N, D] -> [B, H, W, N, D]: ``forward`` with a softmax over logits plus biases."""
    table = None if table is None else table.contiguous()
    kernel_bias = None if kernel_bias is None else kernel_bias.contiguous()
    return _mix(logits, v, table, kernel_bias, *_window(problem))[0]
