"""Choice of a backend, and recording of calls: every call of every operation passes through `run`.

A backend is a module with ``unsupported_reason(problem) -> str | None`` and, for each operation it supports, a function
``(*tensors, problem) -> Tensor``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from foveal.errors import RunError  # absolute: in a checkout, transformers imports this folder as "kernels"

from . import flops, triton_support
from .problem import Problem

ENVIRONMENT = "FOVEAL_BACKEND"
NAMES = ("reference", "tiled", "dynamic", "native", "triton", "natten")
OPERATORS = ("native", "triton", "natten")  # registered with torch.library; the others are plain PyTorch operations

_log = logging.getLogger(__name__)
_announced: set[tuple[str, str, str]] = set()
# (name or None, source); the last one applies
_forced: list[tuple[str | None, str]] = [
    (os.environ.get(ENVIRONMENT) or None, f"the environment variable {ENVIRONMENT}")
]


class BackendError(RunError):
    """The requested backend does not exist or cannot run this call.

    Examples:
        >>> import torch
        >>> from foveal.kernels import BackendError, neighborhood_attention
        >>> q = torch.randn(1, 6, 6, 1, 8)
        >>> try:
        ...     neighborhood_attention(q, q, q, kernel_size=3, backend="gpu")
        ... except BackendError as error:
        ...     print(error)
        unknown backend 'gpu' (from the argument backend), choose from reference, tiled, dynamic, native, triton, natten
    """


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Use the backend ``name`` for every call inside the block (``None``: automatic choice).

    The choice is process-wide, like the environment variable ``FOVEAL_BACKEND``, which is read at import. The
    ``backend=`` argument of a call overrides both. A backend that cannot run a call raises `BackendError`.

    Examples:
        >>> import torch
        >>> from foveal.kernels import backend, neighborhood_attention
        >>> q = torch.randn(1, 6, 6, 1, 8)
        >>> with backend("reference"):
        ...     reference = neighborhood_attention(q, q, q, kernel_size=3)
        >>> torch.allclose(neighborhood_attention(q, q, q, kernel_size=3), reference, atol=1e-5)
        True
    """
    if name is not None:
        _check_name(name, "backend()")
    entry = (name, "the backend() context")
    _forced.append(entry)
    try:
        yield
    finally:
        # remove this entry, which need not be the last: blocks of several threads may end in any order
        del _forced[max(i for i, other in enumerate(_forced) if other is entry)]


def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r} (from {source}), choose from {', '.join(NAMES)}")


# ---------------------------------------------------------------------------------------------------- recording


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operation, as `recording` reports it.

    Attributes:
        operation: ``"neighborhood_attention"``, ``"neighborhood_aggregate"``, ``"neighborhood_mix"`` or
            ``"neighborhood_logits"``.
        problem: shapes, windows, dtype and options: ``shape`` (of the keys), ``value_depth``, ``query_size``,
            ``rows`` and ``columns`` (a `Window` each), ``bias`` (its class), ``scale``, ``dropout_p``, ``device``.
        tensors: inputs of the backend. Attention: q, k, v and bias; aggregation: weights and v; mix: logits, v, table
            and kernel_bias.

    Examples:
        >>> import torch
        >>> from foveal.kernels import Call, neighborhood_aggregate, recording
        >>> calls: list[Call] = []
        >>> with recording(calls.append):
        ...     out = neighborhood_aggregate(torch.ones(1, 6, 8, 1, 9), torch.ones(1, 6, 8, 1, 4), kernel_size=3)
        >>> calls[0].backend, calls[0].problem.kernel_size
        ('tiled', (3, 3))
    """

    operation: str
    problem: Problem
    tensors: tuple
    _backends: Mapping[str, ModuleType]
    _requested: str | None

    def empty_output(self) -> Tensor:
        """An uninitialised tensor with the shape and dtype of the output."""
        return self.tensors[1].new_empty(self.problem.output_shape(self.operation))

    @property
    def flops(self) -> int:
        """FLOPs of the operation by its definition (``kernels/flops.py``), two for each multiply-accumulate."""
        return flops.of_problem(self.operation, self.problem)

    @property
    def backend(self) -> str:
        """Name of the chosen backend; raises `BackendError` if the requested one cannot run the call."""
        return choose(self.operation, self._backends, self.problem, self._requested)


_recorders: ContextVar[tuple[Callable[[Call], Tensor | None], ...]] = ContextVar("recorders", default=())


@contextmanager
def recording(on_call: Callable[[Call], Tensor | None]) -> Iterator[None]:
    """Inside the block, pass every `Call` of this thread to ``on_call`` before its backend runs.

    If ``on_call`` returns a tensor, it becomes the output and no backend runs (``call.empty_output()`` for counting).
    Calls under tracing or inside a compiled graph are not recorded. Blocks nest; the innermost is called first.

    Examples:
        >>> import torch
        >>> from foveal.kernels import neighborhood_attention, recording
        >>> q = torch.randn(1, 6, 6, 1, 8)
        >>> with recording(lambda call: print(call.operation, call.problem.kernel_size)):
        ...     out = neighborhood_attention(q, q, q, kernel_size=3)
        neighborhood_attention (3, 3)
    """
    token = _recorders.set((on_call, *_recorders.get()))
    try:
        yield
    finally:
        _recorders.reset(token)


# --------------------------------------------------------------------------------------------------- the choice


def run(
    operation: str,
    backends: Mapping[str, ModuleType],
    problem: Problem,
    tensors: tuple,
    requested: str | None,
    *,
    function: str = "forward",
) -> Tensor:
    """Run ``function`` of the backend chosen for ``problem`` on ``tensors``."""
    if not problem.tracing:
        for on_call in _recorders.get():
            out = on_call(Call(operation, problem, tensors, backends, requested))
            if out is not None:
                return out
    name = choose(operation, backends, problem, requested)
    chosen = getattr(backends[name], function)
    if flops.counting(problem) and name not in OPERATORS:
        return flops.counted(operation, chosen, tensors, problem)
    return chosen(*tensors, problem)


def choose(operation: str, backends: Mapping[str, ModuleType], problem: Problem, requested: str | None) -> str:
    """Name of the backend for ``problem``, a call of ``operation``.

    Raises:
        BackendError: the requested backend (argument, context or environment variable) cannot run it.
    """
    name, source = (requested, "the argument backend") if requested is not None else _forced[-1]
    if name is None:
        return _automatic(operation, backends, problem)
    _check_name(name, source)
    if name not in backends:
        raise BackendError(f"{operation} has no backend {name!r} (from {source}), choose from {', '.join(backends)}")
    reason = backends[name].unsupported_reason(problem)
    if reason is not None:
        raise BackendError(f"backend {name!r} (from {source}) cannot run this call: {reason}")
    _announce(problem, name, f"from {source}")
    return name


def _announce(problem: Problem, name: str, why: str) -> None:
    """Log each choice once."""
    choice = problem.device, name, why.partition(":")[0]
    if not problem.tracing and choice not in _announced:
        _announced.add(choice)
        _log.info("backend %s on %s%s", name, problem.device, f" ({why})" if why else "")


def _automatic(operation: str, backends: Mapping[str, ModuleType], problem: Problem) -> str:
    """``triton`` where it runs, else ``tiled``, which runs everything; ``natten`` and ``reference`` only by name, and
    ``native`` where it runs if ``FOVEAL_NATIVE=1`` is set.

    Non-overlapping windows are dense attention: ``tiled`` runs ``scaled_dot_product_attention``. Exporters get standard
    operators, from ``dynamic`` if the shape is dynamic. ``torch.compile`` sees a Triton or native kernel as one node.
    """
    exporting = problem.tracing and (torch.compiler.is_exporting() or not torch.compiler.is_compiling())
    name, reason = "dynamic" if problem.tracing and problem.dynamic_shape else "tiled", None
    if problem.device == "cuda" and triton_support.AUTOMATIC and not exporting:
        dense = operation == "neighborhood_attention" and problem.plain_windows  # which an exporter would guard
        reason = "dense windows" if dense else backends["triton"].unsupported_reason(problem)
        name, reason = (name, f"not triton: {reason}") if reason else ("triton", None)
    elif "native" in backends and backends["native"].AUTOMATIC and not exporting:
        reason = backends["native"].unsupported_reason(problem)
        name, reason = (name, f"not native: {reason}") if reason else ("native", None)
    _announce(problem, name, reason or "")
    return name
