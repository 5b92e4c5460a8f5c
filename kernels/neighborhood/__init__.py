"""Neighborhood attention: one folder for the operation, one file for each backend."""

from .api import neighborhood_attention

__all__ = ["neighborhood_attention"]
