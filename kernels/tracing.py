"""What the operations need to know of compilers and exporters."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import has_static_value


def tracing() -> bool:
    """Whether a compiler or exporter records the operators of this call instead of running them once."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_dynamic(*sizes: int) -> bool:
    """Whether one of some sizes is dynamic: an exporter records what holds for every value.

    Not so under ``torch.compile``, which has dynamic sizes, too: what it compiles for one size is faster.
    """
    if torch.compiler.is_dynamo_compiling():  # there a dynamic size looks like any int
        return torch.compiler.is_exporting() and not all(has_static_value(size) for size in sizes)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def without_size_guards(function: Callable) -> Callable:
    """Export ``function`` for maps of dynamic shape without guards on the shape.

    PyTorch checks of every length whether it is 1, as memory could be laid out in more ways then. An exporter records
    the result as a guard, so that a graph recorded for maps of several tiles would not hold for those of one.
    In here the result is no, which has no effect but that an operation is not left out.
    """

    @wraps(function)
    def wrapped(*args):
        dynamic = any(isinstance(x, Tensor) and is_dynamic(*x.shape[1:3]) for x in args)
        if not dynamic or torch.compiler.is_dynamo_compiling():
            return function(*args)
        with _config.patch(backed_size_oblivious=True):  # pyright: ignore[reportAttributeAccessIssue]
            return function(*args)

    return wrapped
