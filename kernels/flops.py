"""FLOPs of the operations, as PyTorch's counter (``torch.utils.flop_counter``) reports them.

Counted is the definition, whatever the backend: a query multiplies each key of its window and each value, once. Biases
and the softmax are not counted. The backward pass of attention computes the logits again, as PyTorch counts its own.

Backends in plain PyTorch operations also multiply masked pairs. While a counter is on they run inside one
``torch.library`` operation, ``foveal::neighborhood_call``, which hides their products and has the formula. The others
are operations already; their formulas stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode, register_flop_formula

from .bias import RelativePositionBias
from .problem import Problem
from .tracing import below_autograd, transformed


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


def counting(problem: Problem) -> bool:
    """Whether a counter of PyTorch sees this call. Transforms of ``torch.func``, sharded tensors and dropout, whose
    backward pass needs the random numbers of the forward pass, stay with the backend's own products."""
    on = not problem.tracing and torch._C._len_torch_dispatch_stack() > 0
    if not on or problem.subclass or problem.dropout_p > 0 or transformed():
        return False
    return any(isinstance(mode, _FlopCounterMode) for mode in _get_current_dispatch_mode_stack())


@dataclass(frozen=True)
class _Run:
    """A call of a backend, as a function of its tensors, for the operation below."""

    function: Callable[..., Tensor]
    shape: tuple[int, ...]  # of the output
    flops: int
    backward_flops: int


_current: ContextVar[_Run] = ContextVar("current")


@contextmanager
def _running(run: _Run) -> Iterator[None]:
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


@torch.library.custom_op("foveal::neighborhood_call", mutates_args=())
def _call(tensors: Sequence[Tensor], flops: int) -> Tensor:
    return _current.get().function(*tensors)


@_call.register_fake
def _(tensors, flops):
    return tensors[1].new_empty(_current.get().shape)


@torch.library.custom_op("foveal::neighborhood_call_backward", mutates_args=())
def _call_backward(grad: Tensor, tensors: Sequence[Tensor], flops: int) -> list[Tensor]:
    with below_autograd(), torch.autocast(grad.device.type, enabled=False):
        inputs = [t.detach().requires_grad_(True) for t in tensors]
        out = _current.get().function(*inputs)
    return list(torch.autograd.grad(out, inputs, grad))


@_call_backward.register_fake
def _(grad, tensors, flops):
    return [t.new_empty(t.shape) for t in tensors]


def _setup_context(ctx, inputs, output) -> None:
    ctx.run = _current.get()
    ctx.save_for_backward(*inputs[0])


def _backward(ctx, grad: Tensor):
    with _running(ctx.run):
        return _call_backward(grad, ctx.saved_tensors, ctx.run.backward_flops), None


_call.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.foveal.neighborhood_call, torch.ops.foveal.neighborhood_call_backward])
def _flops(*args, **kwargs) -> int:
    return args[-1]


def counted(operation: str, function: Callable[..., Tensor], tensors: tuple, problem: Problem) -> Tensor:
    """``function(*tensors, problem)`` as one ``torch.library`` operation with the FLOPs of its definition."""

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
    forward, backward = of_problem(operation, problem), of_problem(operation, problem, backward=True)
    run = _Run(of_flat, problem.output_shape(operation), forward, backward)
    with _running(run):
        return _call(flat, run.flops)
