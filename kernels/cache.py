"""Cache of tensors between eager calls: masks and indices of a shape, and values derived from a bias table in eval."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .tracing import tracing, transformed

BUDGET = 128 << 20  # bytes of all caches together; a DiNAT needs less than one MiB
SHARE = 16  # a result above this part of the budget is not kept: those of a few layers would clear all caches each time

_caches: WeakSet[TensorCache] = WeakSet()
_lock = threading.Lock()


class TensorCache:
    """Cached function results. When the caches of the process together exceed `BUDGET`, all of them are cleared. A
    result above a sixteenth of it is not kept.

    A module passes its cache along with its bias table (``RelativePositionBias(table, cache)``), so cached tensors
    are freed with the module. A copied or pickled cache is empty.

    Examples:
        >>> import torch
        >>> from foveal.kernels import RelativePositionBias, TensorCache, neighborhood_attention
        >>> cache, table = TensorCache(), torch.zeros(2, 13, 13)
        >>> q = k = v = torch.randn(1, 14, 14, 2, 32)
        >>> for _ in range(2):  # the second call finds the table expanded
        ...     out = neighborhood_attention(q, k, v, kernel_size=7, bias=RelativePositionBias(table, cache))
        >>> cache.nbytes > table.nbytes
        True
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[tuple, Any, Any]] = {}  # (arguments, copy of the source or None, result)
        with _lock:
            _caches.add(self)

    def __reduce__(self) -> tuple[type, tuple]:
        return TensorCache, ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(_nbytes((source, result)) for _, source, result in list(self._entries.values()))

    def clear(self) -> None:
        self._entries.clear()

    def get(self, function: Callable, *args: Any, source: Tensor | None = None) -> Any:
        """``function(*args)``, a tensor or a tuple of tensors, computed once for each ``args``.

        With a ``source``: ``function(source, *args)``, recomputed when the values of ``source`` change. Values are
        compared, because ``.data.copy_()`` and NumPy views change a parameter without changing identity or version.
        Nothing is cached if ``source`` requires a gradient or is not a plain CPU tensor, while tracing, or under
        ``torch.func``'s transforms, whose tensors are not valid afterwards.
        """
        if tracing() or transformed() or not (source is None or _is_constant(source)):
            return function(*args) if source is None else function(source, *args)
        key = (function, *args) if source is None else function
        found = self._entries.get(key)  # read once: other threads may replace it
        if found is not None:
            kept_args, copy, result = found
            if source is None or (kept_args == args and copy.dtype == source.dtype and torch.equal(copy, source)):
                return result
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a backward
            # copied first: a write by another thread in the meantime is found next time
            copy = None if source is None else source.detach().clone()
            result = function(*args) if copy is None else function(copy, *args)
        self._keep(key, (args, copy, result))
        return result

    def _keep(self, key: Any, entry: tuple[tuple, Any, Any]) -> None:
        size = _nbytes(entry[1:])
        # plain tensors only: no FakeTensor or other mode's output
        if size > BUDGET // SHARE or any(type(t) is not Tensor or t.device.type == "meta" for t in _tensors(entry[1:])):
            return
        with _lock:
            if size + sum(cache.nbytes for cache in _caches) > BUDGET:
                for cache in _caches:
                    cache.clear()
            self._entries[key] = entry


# Masks and indices, which depend on shapes alone.
CONSTANTS = TensorCache()


def _is_constant(source: Tensor) -> bool:
    """Whether the values of ``source`` can be compared; on another device that would synchronize."""
    wants_gradient = source.requires_grad and torch.is_grad_enabled()
    plain = type(source) in (Tensor, nn.Parameter) and source.device.type == "cpu"
    return plain and not wants_gradient


def _tensors(held: Any) -> list[Tensor]:
    if isinstance(held, Tensor):
        return [held]
    return [t for each in held or () for t in _tensors(each)]


def _nbytes(held: Any) -> int:
    return sum(t.nbytes for t in _tensors(held))
