"""Which backend runs a call: the first of the measured order that supports it, or the one asked for by name.

A backend is a module with ``unsupported_reason(problem) -> str | None`` and
``forward(*tensors, problem)``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch

from . import triton_support
from .problem import Problem

ENVIRONMENT = "FOVEAL_BACKEND"
NAMES = ("reference", "tiled", "dynamic", "triton", "natten")

# Measured order, per device type; what is not listed (mps, xpu, ...) takes "other". On CUDA nothing has been measured
# yet: the kernels written for it go first, then what needs nothing installed and gives gradients for everything.
ORDER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("tiled", "reference"),
    "cuda": ("triton", "tiled", "natten", "reference")
    if triton_support.AUTOMATIC
    else ("tiled", "natten", "reference"),
    "other": ("tiled", "reference"),
}


def _passed_over(name: str, operation: str, problem: Problem) -> str | None:
    """Why the automatic choice leaves a call that a backend can run to one behind it.

    Plain windows are dense attention, which ``tiled`` hands to PyTorch's own kernels. That these win there is not
    measured yet; if they do not, this condition goes.
    """
    if name == "triton" and operation == "neighborhood_attention" and problem.plain_windows:
        return "these windows have no neighbours, which is dense attention"
    return None


_log = logging.getLogger(__name__)
_announced: set[tuple[str, str]] = set()
# (name or None, who asked), the last one counts
_forced: list[tuple[str | None, str]] = [
    (os.environ.get(ENVIRONMENT) or None, f"the environment variable {ENVIRONMENT}")
]


class BackendError(RuntimeError):
    """The backend that was asked for does not exist or cannot run this call.

    Examples:
        >>> import torch
        >>> from foveal.kernels import BackendError, neighborhood_attention
        >>> q = torch.randn(1, 6, 6, 1, 8)
        >>> try:
        ...     neighborhood_attention(q, q, q, kernel_size=3, backend="fast")
        ... except BackendError as error:
        ...     print(error)
        unknown backend 'fast' from the argument backend; there are reference, tiled, dynamic, triton, natten
    """


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Use the backend ``name`` for every call inside the block (``None``: automatic choice).

    The choice is process-wide, like ``FOVEAL_BACKEND``, which is read once, at import; an explicit ``backend=``
    argument of a call wins over both. A backend that cannot run a call raises `BackendError` with its reason.

    Examples:
        >>> import torch
        >>> from foveal.kernels import backend, neighborhood_attention
        >>> q = torch.randn(1, 6, 6, 1, 8)
        >>> with backend("reference"):
        ...     judge = neighborhood_attention(q, q, q, kernel_size=3)
        >>> torch.allclose(neighborhood_attention(q, q, q, kernel_size=3), judge, atol=1e-5)
        True
    """
    if name is not None:
        _check_name(name, "backend()")
    entry = (name, "the backend() context")
    _forced.append(entry)
    try:
        yield
    finally:
        # its own entry, not the last one: blocks of several threads may end in any order
        del _forced[max(i for i, other in enumerate(_forced) if other is entry)]


def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r} from {source}; there are {', '.join(NAMES)}")


def choose(operation: str, backends: Mapping[str, ModuleType], problem: Problem, requested: str | None) -> ModuleType:
    """The backend module for ``problem``, a call of ``operation``.

    Raises:
        BackendError: the backend asked for (argument, context or environment variable) cannot run it, with its reason.
    """
    name, source = (requested, "the argument backend") if requested is not None else _forced[-1]
    if name is not None:
        _check_name(name, source)
        if name not in backends:
            raise BackendError(
                f"{operation} has no backend {name!r} (asked for by {source}); it has {', '.join(backends)}"
            )
        reason = backends[name].unsupported_reason(problem)
        if reason is not None:
            raise BackendError(f"backend {name!r} (asked for by {source}) cannot run this call: {reason}")
        return backends[name]
    if problem.tracing:  # compilers and exporters are to see standard operators, or one node that they know
        if _as_one_node(operation, backends, problem):
            return backends["triton"]
        return backends["dynamic" if problem.free else "tiled"]
    reasons = []
    for name in ORDER.get(problem.device, ORDER["other"]):
        if name not in backends:
            continue
        reason = backends[name].unsupported_reason(problem) or _passed_over(name, operation, problem)
        if reason is None:
            if (problem.device, name) not in _announced:
                _announced.add((problem.device, name))
                _log.info("backend %s on %s%s", name, problem.device, f" ({'; '.join(reasons)})" if reasons else "")
            return backends[name]
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no backend can run this call: {'; '.join(reasons)}")


def _as_one_node(operation: str, backends: Mapping[str, ModuleType], problem: Problem) -> bool:
    """Whether the Triton kernels run under ``torch.compile``; exporters cannot take them."""
    return (
        problem.device == "cuda"
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and "triton" in backends
        and "triton" in ORDER["cuda"]
        and backends["triton"].unsupported_reason(problem) is None
        and _passed_over("triton", operation, problem) is None
    )
