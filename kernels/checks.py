"""Argument checks shared by the public operations."""

from __future__ import annotations

import operator
import warnings

import numpy as np
import torch
from torch import Tensor

from .tracing import is_dynamic
from .window import BOUNDARIES

IntPair = int | tuple[int, int]


def pair(name: str, value: IntPair, least: int | None = 1) -> tuple[int, int]:
    """An int or a pair of ints as (rows, columns)."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or any(isinstance(x, bool) or not isinstance(x, (int, np.integer)) for x in both):
        raise TypeError(f"{name} must be an int or a pair of ints (rows, columns), got {value!r}")
    if least is not None and min(both) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return operator.index(both[0]), operator.index(both[1])  # a constant under tracing, as the plan needs


def check_tensor(name: str, t: Tensor, layout: str) -> None:
    """Raise unless ``t`` has five dimensions and a supported floating dtype; ``layout`` names them in the error."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.ndim != 5:
        raise ValueError(f"{name} must be {layout}, got {t.ndim} dimensions: {tuple(t.shape)}")
    if not t.is_floating_point() or t.dtype.itemsize < 2:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")


HEADS_FIRST = "; expected [B, H, W, heads, D]; heads seem to be first"


def warn_heads_first(t: Tensor) -> None:
    """Warn of a tensor that looks like ``[B, heads, H, W, D]`` and that the window fits all the same: of a square map,
    with more columns than channels, or with the strides of heads that were moved to the front."""
    if is_dynamic(*t.shape[1:4]) or t.shape[2] != t.shape[3] or t.shape[1] == t.shape[2]:
        return
    moved = t.stride(1) < min(t.stride(2), t.stride(3))
    if (moved or t.shape[3] > t.shape[4]) and not torch.compiler.is_compiling():
        _, rows, columns, heads, depth = t.shape
        warnings.warn(
            f"{tuple(t.shape)} is read as [B, H, W, heads, D]: a map of {rows} x {columns} with {heads} heads of "
            f"{depth} channels. If the heads are first, permute the tensors: x.permute(0, 2, 3, 1, 4)",
            stacklevel=3,
        )


def check_window(
    size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int], boundary: str, heads: int = 0
) -> None:
    """Raise unless ``boundary`` is known and, with "shift", the window fits a map of ``size``. ``heads``: the dimension
    behind the map, which has its columns if the caller put the heads first."""
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary {boundary!r} is not one of {', '.join(BOUNDARIES)}")
    if boundary != "shift":
        return
    for axis, length, keys, step in zip(("rows", "columns"), size, kernel_size, dilation, strict=True):
        if is_dynamic(length):  # a condition of the graph, unless it is known to hold
            torch._check(
                length >= keys * step,
                lambda: f"the window of kernel_size {keys} x dilation {step} does not fit a map of fewer {axis}",  # noqa: B023
            )
        elif keys * step > length:
            fits = size[1] >= kernel_size[0] * dilation[0] and heads >= kernel_size[1] * dilation[1]
            raise ValueError(
                f"the window of kernel_size {keys} x dilation {step} = {keys * step} does not fit the map's {length} "
                f"{axis} (map {size[0]} x {size[1]}, boundary 'shift'); pad the map or take a smaller dilation"
                f"{HEADS_FIRST if fits else ''}"
            )


def autocast_enabled(t: Tensor) -> bool:
    """Whether autocast is on for the device of ``t``."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast all to the autocast dtype, unless one is float64."""
    if any(t.dtype == torch.float64 for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t.to(dtype) for t in tensors)
