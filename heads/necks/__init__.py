"""Feature pyramids between a backbone and its heads, built from the `ShapeSpec` of its maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backbone import Neck, ShapeSpec
from .a3fpn import A3FPN
from .fpn import FPN

NECKS: dict[str, Callable[..., Neck]] = {"fpn": FPN, "a3fpn": A3FPN}


def build_neck(name: str, spec: ShapeSpec, **kwargs: Any) -> Neck:
    """The neck ``name`` (a key of `NECKS`) for maps of this `ShapeSpec`.

    Raises:
        ValueError: if there is no such neck, or the settings do not fit.

    Examples:
        >>> from foveal.heads.backbone import ShapeSpec
        >>> from foveal.heads.necks import build_neck
        >>> build_neck("fpn", ShapeSpec((64, 128), (8, 16)), out_channels=32, extra_levels="pool").spec
        ShapeSpec(channels=(32, 32, 32), strides=(8, 16, 32))
    """
    if name not in NECKS:
        raise ValueError(f"unknown neck {name!r}; choose from {', '.join(NECKS)}")
    try:
        return NECKS[name](spec, **kwargs)
    except TypeError as error:
        raise ValueError(f"neck {name} with {kwargs}: {error}") from None


__all__ = ["A3FPN", "FPN", "NECKS", "build_neck"]
