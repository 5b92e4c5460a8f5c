"""The attention operations every backbone stands on (see README.md here for layouts and the support matrix)."""

from .aggregate import neighborhood_aggregate, neighborhood_mix
from .bias import FactoredBias, TableBias
from .dispatch import BackendError, Call, backend, recording
from .neighborhood import neighborhood_attention

__all__ = [
    "BackendError",
    "Call",
    "FactoredBias",
    "TableBias",
    "backend",
    "neighborhood_aggregate",
    "neighborhood_attention",
    "neighborhood_mix",
    "recording",
]
