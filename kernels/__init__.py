"""Neighborhood attention and aggregation, used by all backbones. README.md has the layouts and the support matrix."""

import warnings as _warnings
from typing import Any as _Any

from . import bias as _bias
from .aggregate import neighborhood_aggregate, neighborhood_mix
from .bias import DecomposedRelativePositionBias, RelativePositionBias
from .cache import TensorCache
from .dispatch import BackendError, Call, backend, recording
from .neighborhood import neighborhood_attention

__all__ = [
    "BackendError",
    "Call",
    "DecomposedRelativePositionBias",
    "RelativePositionBias",
    "TensorCache",
    "backend",
    "neighborhood_aggregate",
    "neighborhood_attention",
    "neighborhood_mix",
    "recording",
]

_RENAMED = {"FactoredBias": "DecomposedRelativePositionBias", "TableBias": "RelativePositionBias"}


def __getattr__(name: str) -> _Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _warnings.warn(f"{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return getattr(_bias, _RENAMED[name])
