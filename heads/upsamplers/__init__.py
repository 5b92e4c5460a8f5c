"""Upsamplers: the last map of a frozen backbone at several times its resolution."""

from __future__ import annotations

from .base import Bilinear, Upsampler
from .naf import NAF
from .uplift import UPLiFT

UPSAMPLERS: dict[str, type[Upsampler]] = {each.kind: each for each in (UPLiFT, NAF, Bilinear)}

__all__ = ["NAF", "UPSAMPLERS", "Bilinear", "UPLiFT", "Upsampler"]
