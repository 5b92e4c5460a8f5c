"""``na2d_qk`` and ``na2d_av`` of NATTEN 0.17, for code written against them.

NATTEN 0.20 removed the unfused operations, relative position biases and its CPU kernels. Models that use the attention
weights between the two products (OverLoCK, NAT and DiNAT as published) therefore need NATTEN 0.17 and an old PyTorch.
These two functions replace it, on any device, with gradients::

    from foveal.kernels.compat import na2d_av, na2d_qk

    attn = na2d_qk(scale * query, key, kernel_size=7, dilation=2, rpb=rpb).softmax(-1)
    out = na2d_av(attn, value, kernel_size=7, dilation=2)

The layout is ``[B, heads, H, W, D]``, unlike in the rest of this package. Names, order and defaults of the arguments
are NATTEN's. As there, ``na2d_qk`` does not scale. Unlike there, the kernel size may be even, and sizes that do not fit
raise a ``ValueError``. New code should use :func:`~foveal.kernels.neighborhood_attention`, which fuses both products
and the softmax and needs less time and memory.
"""

from __future__ import annotations

from torch import Tensor

from .aggregate import neighborhood_aggregate
from .aggregate.api import check_area, neighborhood_logits
from .aggregate.softmax import expand_table
from .checks import IntPair, autocast_enabled, check_tensor, pair
from .window import Window


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntPair,
    dilation: IntPair = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool | tuple[bool, bool] | None = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """The logits of neighborhood attention: ``query . key`` for every key in the window, plus ``rpb``.

    Args:
        query: ``[B, heads, H, W, D]``, scaled by the caller; float16, bfloat16, float32 or float64, any strides.
        key: same shape, dtype and device.
        kernel_size: keys per axis, an int or a pair (rows, columns), likewise ``dilation``.
        dilation: distance of neighbouring keys.
        additional_keys: not supported (keys that every query sees in addition to its window).
        is_causal: not supported (windows that only look back).
        rpb: relative position bias, ``[heads, 2 * Kh - 1, 2 * Kw - 1]``.

    Returns:
        ``[B, heads, H, W, Kh * Kw]`` in the dtype of ``key``, keys in row-major order. Under autocast the inputs are
        cast to the autocast dtype.

    Raises:
        NotImplementedError: ``additional_keys`` or ``is_causal``.
        ValueError, TypeError, BackendError: as `neighborhood_attention`.

    Examples:
        >>> import torch
        >>> from foveal.kernels.compat import na2d_qk
        >>> q, k = torch.randn(2, 1, 2, 14, 14, 32)
        >>> na2d_qk(q * 32**-0.5, k, kernel_size=7, dilation=2, rpb=torch.zeros(2, 13, 13)).shape
        torch.Size([1, 2, 14, 14, 49])
    """
    _refuse("additional_keys", additional_keys, is_causal)
    kernel_size, dilation = pair("kernel_size", kernel_size), pair("dilation", dilation)
    _check(query=query, key=key)
    if query.shape != key.shape:
        raise ValueError(f"query and key must have one shape, got {tuple(query.shape)} and {tuple(key.shape)}")
    if rpb is not None:
        _check_rpb(rpb, query, kernel_size)
    q, k = (t.permute(0, 2, 3, 1, 4) for t in (query, key))
    logits = neighborhood_logits(q, k, kernel_size=kernel_size, dilation=dilation).permute(0, 3, 1, 2, 4)
    if rpb is None:
        return logits
    rows, columns = (Window(size, 1, step) for size, step in zip(kernel_size, dilation, strict=True))
    return logits + expand_table(rpb.to(logits.dtype), rows, columns, query.shape[2:4])


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntPair,
    dilation: IntPair = 1,
    additional_values: Tensor | None = None,
    is_causal: bool | tuple[bool, bool] | None = False,
) -> Tensor:
    """The output of neighborhood attention: the values of every window, weighted by ``attn``.

    Args:
        attn: ``[B, heads, H, W, Kh * Kw]``, any values, keys in row-major order; dtypes as in `na2d_qk`.
        value: ``[B, heads, H, W, D]``, same dtype and device.
        kernel_size: keys per axis, an int or a pair (rows, columns), likewise ``dilation``.
        dilation: distance of neighbouring keys.
        additional_values: not supported, as ``additional_keys`` of `na2d_qk`.
        is_causal: not supported.

    Returns:
        ``[B, heads, H, W, D]`` in the dtype of ``value``. Under autocast the inputs are cast to the autocast dtype.

    Raises:
        NotImplementedError: ``additional_values`` or ``is_causal``.
        ValueError, TypeError, BackendError: as `neighborhood_aggregate`.

    Examples:
        >>> import torch
        >>> from foveal.kernels.compat import na2d_av
        >>> attn = torch.randn(1, 2, 14, 14, 49).softmax(-1)
        >>> na2d_av(attn, torch.randn(1, 2, 14, 14, 32), kernel_size=7, dilation=2).shape
        torch.Size([1, 2, 14, 14, 32])
    """
    _refuse("additional_values", additional_values, is_causal)
    kernel_size, dilation = pair("kernel_size", kernel_size), pair("dilation", dilation)
    _check(attn=attn, value=value)
    if attn.shape[:4] != value.shape[:4]:
        raise ValueError(
            "attn and value must have one shape up to the last dimension, got "
            f"{tuple(attn.shape)} and {tuple(value.shape)}"
        )
    check_area("attn", attn, kernel_size)
    weights, v = (t.permute(0, 2, 3, 1, 4) for t in (attn, value))
    out = neighborhood_aggregate(weights, v, kernel_size=kernel_size, dilation=dilation)
    return out.permute(0, 3, 1, 2, 4)


def _refuse(name: str, additional: Tensor | None, is_causal: bool | tuple[bool, bool] | None) -> None:
    if additional is not None:
        raise NotImplementedError(f"{name} (got shape {list(additional.shape)}) is not supported, use None")
    if is_causal is not None and is_causal is not False and (is_causal is True or any(is_causal)):
        raise NotImplementedError(f"is_causal={is_causal} is not supported")


def _check(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        check_tensor(name, t, "[B, heads, H, W, D]")


def _check_rpb(rpb: Tensor, query: Tensor, kernel_size: tuple[int, int]) -> None:
    expected = (query.shape[1], *(2 * k - 1 for k in kernel_size))
    if tuple(rpb.shape) != expected:
        raise ValueError(
            f"rpb has shape {list(rpb.shape)}, expected {list(expected)} "
            f"(heads {query.shape[1]}, kernel_size {kernel_size[0]} x {kernel_size[1]})"
        )
    if not autocast_enabled(query) and rpb.dtype != query.dtype:
        raise TypeError(f"query, key and rpb must have one dtype, got {query.dtype} and {rpb.dtype} (rpb)")
    if rpb.device != query.device:
        raise ValueError(f"rpb is on {rpb.device}, query on {query.device}")
