"""Tensors kept between eager calls: masks and indices of a shape, and what is derived from a learned table in eval."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .tracing import tracing

BUDGET = 128 << 20  # bytes of all caches together; the layers of a DiNAT take less than one MiB

_caches: WeakSet[TensorCache] = WeakSet()
_lock = threading.Lock()


class TensorCache:
    """Results of functions, kept until the caches of the process exceed `BUDGET`: then all of them are emptied.

    The owner of a bias table passes its cache along with the table (``RelativePositionBias(table, cache)``), so that
    what is kept ends with the module. Copies of a cache, by ``copy`` or ``pickle``, are empty.

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

        With a ``source``: the latest ``function(source, *args)``, as long as ``source`` holds the same numbers. These
        are compared, as identity and version would not do: ``.data.copy_()`` and NumPy views change a parameter behind
        both. Nothing is kept of a source that wants a gradient or is no plain tensor in CPU memory, nor under a tracer.
        """
        if tracing() or not (source is None or _is_constant(source)):
            return function(*args) if source is None else function(source, *args)
        key = (function, *args) if source is None else function
        found = self._entries.get(key)  # read once: other threads may replace it
        if found is not None:
            kept_args, copy, result = found
            if source is None or (kept_args == args and copy.dtype == source.dtype and torch.equal(copy, source)):
                return result
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a backward
            # copied before it is used: what another thread writes meanwhile shows next time
            copy = None if source is None else source.detach().clone()
            result = function(*args) if copy is None else function(copy, *args)
        self._keep(key, (args, copy, result))
        return result

    def _keep(self, key: Any, entry: tuple[tuple, Any, Any]) -> None:
        size = _nbytes(entry[1:])
        # numbers alone: no FakeTensor or other mode's product
        if size > BUDGET or any(type(t) is not Tensor or t.device.type == "meta" for t in _tensors(entry[1:])):
            return
        with _lock:
            if size + sum(cache.nbytes for cache in _caches) > BUDGET:
                for cache in _caches:
                    cache.clear()
            self._entries[key] = entry


# Masks and indices: what depends on shapes alone.
CONSTANTS = TensorCache()


def _is_constant(source: Tensor) -> bool:
    """Whether ``source`` is numbers that can be compared at once; on another device that would wait for the device."""
    wants_gradient = source.requires_grad and torch.is_grad_enabled()
    plain = type(source) in (Tensor, nn.Parameter) and source.device.type == "cpu"
    return plain and not wants_gradient and not torch._C._are_functorch_transforms_active()


def _tensors(held: Any) -> list[Tensor]:
    if isinstance(held, Tensor):
        return [held]
    return [t for each in held or () for t in _tensors(each)]


def _nbytes(held: Any) -> int:
    return sum(t.nbytes for t in _tensors(held))
