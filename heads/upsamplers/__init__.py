"""Upsamplers: the last map of a frozen backbone at several times its resolution."""

from __future__ import annotations

from .base import Bilinear, Upsampler
from .naf import NAF
from .published import PUBLISHED, UPSAMPLERS, create_upsampler, load_upsampler
from .pyramid import Pyramid
from .uplift import UPLiFT

__all__ = [
    "NAF",
    "PUBLISHED",
    "UPSAMPLERS",
    "Bilinear",
    "Pyramid",
    "UPLiFT",
    "Upsampler",
    "create_upsampler",
    "load_upsampler",
]
