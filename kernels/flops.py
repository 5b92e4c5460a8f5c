"""FLOPs of the operations, as PyTorch's counter (``torch.utils.flop_counter``) reports them.

Counted is the definition, whatever the backend: a query multiplies each key of its window and each value, once. Biases
and the softmax are not counted. The backward pass of attention computes the logits again, as PyTorch counts its own.

Backends in plain PyTorch operations also multiply masked pairs. While a counter is on, it is shown one operation for
such a call, ``foveal::neighborhood_call``, and none of the backend's. The other backends are ``torch.library``
operations; their formulas stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode, flop_registry, register_flop_formula

from .bias import RelativePositionBias
from .problem import Problem
from .tracing import transformed


def attention(pairs: int, depth: int, value_depth: int, backward: bool = False) -> int:
    """FLOPs of attention over ``pairs`` of a query and a key."""
    return 2 * pairs * (3 * depth + 2 * value_depth if backward else depth + value_depth)


def aggregation(pairs: int, depth: int, backward: bool = False) -> int:
    """FLOPs of one of the products of an aggregation, or of the two that are its gradients."""
    return 2 * pairs * depth * (2 if backward else 1)


def of_problem(operation: str, problem: Problem, backward: bool = False) -> int:
    """FLOPs of a call."""
    if operation == "neighborhood_attention":
        return attention(problem.pairs, problem.shape[4], problem.value_depth, backward)
    return aggregation(problem.pairs, problem.shape[4], backward)


def _counters() -> list[Any]:
    """PyTorch's counters that see the operations of this thread."""
    if not torch._C._len_torch_dispatch_stack():
        return []
    return [mode.counter for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _FlopCounterMode)]


def counting(problem: Problem) -> bool:
    """Whether a counter sees this call as one operation: not under transforms of ``torch.func``, on sharded tensors, or
    with dropout, whose backward pass needs the random numbers of the forward pass."""
    if problem.tracing or problem.subclass or problem.dropout_p > 0:
        return False
    return bool(_counters()) and not transformed()


@torch.library.custom_op("foveal::neighborhood_call", mutates_args=())
def _show(x: Tensor, flops: int) -> None:
    """An operation without effect, which the counter sees."""


@_show.register_fake
def _(x, flops):
    return None


@register_flop_formula(torch.ops.foveal.neighborhood_call)
def _(x, flops, *_, **__) -> int:
    return flops


def _flash(q, k, v, *_, **__) -> int:
    return attention(math.prod(q[:3]) * k[2], q[3], v[3])


def _flash_backward(grad, q, k, v, *_, **__) -> int:
    return attention(math.prod(q[:3]) * k[2], q[3], v[3], backward=True)


# PyTorch (2.14) has formulas for its own attention, from shapes [B, heads, N, D], but not for the kernel for CPUs
_ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}
for _operator, _formula in _ON_CPU.items():
    if _operator not in flop_registry:
        register_flop_formula(_operator)(_formula)


@contextmanager
def _shown_as(x: Tensor, flops: int) -> Iterator[None]:
    """Counters count ``flops``, and nothing inside the block."""
    _show(x, flops)
    formulas = [(counter, counter.flop_registry) for counter in _counters()]
    try:
        for counter, _ in formulas:
            counter.flop_registry = {}
        yield
    finally:
        for counter, registry in formulas:
            counter.flop_registry = registry


@dataclass(frozen=True)
class _Run:
    """A call of a backend as a function of its tensors, and its FLOPs."""

    function: Callable[..., Tensor]
    flops: int
    backward_flops: int


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *tensors):
        ctx.run = run
        ctx.save_for_backward(*tensors)
        with _shown_as(tensors[0], run.flops):
            return run.function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with _shown_as(grad, ctx.run.backward_flops), torch.autocast(grad.device.type, enabled=False):
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_(True) for t in ctx.saved_tensors]
                out = ctx.run.function(*inputs)
            return None, *torch.autograd.grad(out, inputs, grad)


def counted(operation: str, function: Callable[..., Tensor], tensors: tuple, problem: Problem) -> Tensor:
    """``function(*tensors, problem)``, which counters see as one operation with the FLOPs of its definition."""

    def of_flat(*flat: Tensor) -> Tensor:
        rest = iter(flat)
        arguments: list = []
        for x in tensors:
            if x is None or isinstance(x, Tensor):
                arguments.append(x if x is None else next(rest))
            elif isinstance(x, RelativePositionBias):
                arguments.append(RelativePositionBias(next(rest)))
            else:
                arguments.append(replace(x, rows=next(rest), columns=next(rest)))
        return function(*arguments, problem)

    flat = [t for x in tensors if x is not None for t in ((x,) if isinstance(x, Tensor) else x.tensors)]
    run = _Run(of_flat, of_problem(operation, problem), of_problem(operation, problem, backward=True))
    return _Counted.apply(run, *flat)
