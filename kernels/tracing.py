"""Helpers for compilers and exporters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import has_static_value


def tracing() -> bool:
    """Whether this call is being traced by a compiler or exporter."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


_ELSEWHERE = ContextVar("elsewhere", default=False)


@contextmanager
def for_other_runtimes() -> Iterator[None]:
    """What is exported inside runs on another runtime than PyTorch's: see `leaves_pytorch`."""
    token = _ELSEWHERE.set(True)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


def leaves_pytorch() -> bool:
    """Whether this call is being traced for another runtime, which gets operations as they are defined rather than as
    PyTorch runs them fastest."""
    elsewhere = torch.compiler.is_exporting() and _ELSEWHERE.get()
    return elsewhere or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed, which PyTorch's fused attention does not have."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is on: both know standard operators alone."""
    return forward_mode() or torch._C._are_functorch_transforms_active()


def is_dynamic(*sizes: int) -> bool:
    """Whether one of the sizes is dynamic in an export.

    False under ``torch.compile``, even for dynamic sizes: code compiled for one size is faster.
    """
    if torch.compiler.is_dynamo_compiling():  # there a dynamic size looks like any int
        return torch.compiler.is_exporting() and not all(has_static_value(size) for size in sizes)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def without_size_guards(function: Callable) -> Callable:
    """Export ``function`` for maps of dynamic shape without guards on the shape.

    PyTorch checks whether a length is 1, to skip operations, and exporters record the result as a guard: a graph traced
    for several tiles would not hold for one. Inside ``function`` the result is always no, so nothing is skipped.
    """

    @wraps(function)
    def wrapped(*args, **kwargs):
        dynamic = any(isinstance(x, Tensor) and is_dynamic(*x.shape[1:3]) for x in (*args, *kwargs.values()))
        if not dynamic or torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        with _config.patch(backed_size_oblivious=True):  # pyright: ignore[reportAttributeAccessIssue]
            return function(*args, **kwargs)

    return wrapped
