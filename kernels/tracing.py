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


def symbolic(*sizes: int) -> bool:
    """Whether one of some sizes is free: an exporter is to record what holds for every value.

    Not so under ``torch.compile``, which may leave a size free, too: what it compiles for one size is faster.
    """
    if torch.compiler.is_dynamo_compiling():  # there a free size looks like any int
        return torch.compiler.is_exporting() and not all(has_static_value(size) for size in sizes)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def for_any_size(function: Callable) -> Callable:
    """Let what ``function`` does with maps of free sizes be recorded without conditions on them.

    PyTorch asks of every length whether it is 1, as memory could be laid out in more ways then. An exporter takes down
    each answer as a condition, so that a graph recorded for maps of several tiles would not hold for those of one.
    In here the answer is no, from which nothing follows but that an operation is not left out.
    """

    @wraps(function)
    def wrapped(*args):
        free = any(isinstance(x, Tensor) and symbolic(*x.shape[1:3]) for x in args)
        if not free or torch.compiler.is_dynamo_compiling():
            return function(*args)
        with _config.patch(backed_size_oblivious=True):  # pyright: ignore[reportAttributeAccessIssue]
            return function(*args)

    return wrapped
