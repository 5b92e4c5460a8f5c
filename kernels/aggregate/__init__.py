"""Neighborhood aggregation: one folder for the operation, one file for each backend."""

from .api import neighborhood_aggregate, neighborhood_mix

__all__ = ["neighborhood_aggregate", "neighborhood_mix"]
