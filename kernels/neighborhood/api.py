"""The public operation: validate the arguments, choose a backend.

Layout legend: B batch, H W map, h w queries, N heads, D query/key channels, V value channels.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..bias import Bias, DecomposedRelativePositionBias, RelativePositionBias
from ..checks import (
    HEADS_FIRST,
    IntPair,
    autocast,
    autocast_enabled,
    check_tensor,
    check_window,
    pair,
    warn_heads_first,
)
from ..dispatch import run
from ..problem import Problem, of_tensors
from ..tracing import is_dynamic
from ..window import Window
from . import dynamic, native, natten, reference, tiled, triton

BACKENDS = {
    "reference": reference,
    "tiled": tiled,
    "dynamic": dynamic,
    "native": native,
    "triton": triton,
    "natten": natten,
}
BIASES = RelativePositionBias, DecomposedRelativePositionBias


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: IntPair,
    stride: IntPair = 1,
    dilation: IntPair = 1,
    query_stride: IntPair = 1,
    offset: IntPair = 0,
    bias: Bias | None = None,
    boundary: str = "shift",
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention of every position of a map to the ``kernel_size`` window around it.

    Neighborhood Attention Transformer (arXiv 2204.07143), Dilated NAT (arXiv 2209.15001); with ``stride``, blocks of
    queries share a window (Generalized Neighborhood Attention, arXiv 2504.16922; HaloNet, arXiv 2103.12731).
    ``kernels/window.py`` defines which keys a query sees.

    Args:
        q: queries ``[B, h, w, heads, D]``, float16, bfloat16, float32 or float64, any strides. ``h, w`` equals
            ``H, W`` unless there is a ``query_stride``.
        k: keys ``[B, H, W, heads, D]``, same dtype and device as ``q``.
        v: values ``[B, H, W, heads, Dv]``.
        kernel_size: keys per axis, an int or a pair (rows, columns); so are the next four.
        stride: positions per axis whose queries share one window; at most ``kernel_size``.
        dilation: distance between neighbouring keys; need not divide the map.
        query_stride: distance between neighbouring queries: query ``(i, j)`` has the window and bias of position
            ``(i, j) * query_stride``. ``h = ceil(H / query_stride)``, likewise ``w``. Not with a dilation.
        offset: where the blocks of ``stride`` queries begin: at the positions congruent to it modulo ``stride``, the
            first block with fewer queries. Shifted windows (Swin, arXiv 2103.14030) are blocks with the shift as offset
            and ``boundary="mask"``. Not with a query_stride or boundary "shift".
        bias: ``RelativePositionBias`` or ``DecomposedRelativePositionBias``, added to the scaled logits in at least
            float32.
        boundary: ``"shift"`` (windows are moved inside the map), ``"zero"`` (keys and values outside are zero and take
            part in the softmax) or ``"mask"`` (keys outside are excluded).
        scale: factor on ``q . k``; ``None`` is ``D ** -0.5``.
        dropout_p: probability of dropping an attention weight. Applied whenever it is above zero, as in
            ``torch.nn.functional.scaled_dot_product_attention``: pass 0.0 in evaluation.
        backend: a backend's name, or ``None`` for the automatic choice.

    Returns:
        ``[B, h, w, heads, Dv]`` in the dtype of ``v``. Under autocast the inputs are cast to the autocast dtype.

    Raises:
        ValueError: inconsistent shapes, devices or options; with ``boundary="shift"``, a map smaller than
            ``kernel_size * dilation``.
        TypeError: dtypes that differ or are not floating point, or options of a wrong type.
        BackendError: the requested backend cannot run this call.

    Examples:
        >>> import torch
        >>> from foveal.kernels import neighborhood_attention
        >>> q = k = v = torch.randn(1, 14, 14, 2, 32)
        >>> neighborhood_attention(q, k, v, kernel_size=7, dilation=2).shape
        torch.Size([1, 14, 14, 2, 32])
        >>> neighborhood_attention(q[:, ::2, ::2], k, v, kernel_size=7, query_stride=2).shape
        torch.Size([1, 7, 7, 2, 32])
    """
    kernel_size, stride = pair("kernel_size", kernel_size), pair("stride", stride)
    dilation, query_stride = pair("dilation", dilation), pair("query_stride", query_stride)
    offset = pair("offset", offset, least=None)
    _check_tensors(q, k, v, query_stride)
    cast = autocast_enabled(q)
    if cast:
        q, k, v = autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    check_window((k.shape[1], k.shape[2]), kernel_size, dilation, boundary, k.shape[3])
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    _check_bias(bias, q, kernel_size)
    if bias is None:
        warn_heads_first(k)
    rows, columns = _windows(kernel_size, stride, dilation, query_stride, offset, boundary, bias)
    factor: float = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if factor != factor:  # NaN, in a form that torch.compile takes: a factor that products of matrices may leave out
        q, factor = q * factor, 1.0
    tensors = q, k, v, *(() if bias is None else bias.tensors)
    problem = Problem(
        shape=tuple(k.shape),
        value_depth=v.shape[-1],
        rows=rows,
        columns=columns,
        bias=None if bias is None else type(bias),
        scale=factor,
        dropout_p=float(dropout_p),
        **of_tensors(*tensors),
    )
    with torch.autocast(q.device.type, enabled=False) if cast else nullcontext():  # backends see plain arithmetic
        return run("neighborhood_attention", BACKENDS, problem, (q, k, v, bias), backend)


def _windows(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    query_stride: tuple[int, int],
    offset: tuple[int, int],
    boundary: str,
    bias: Bias | None,
) -> tuple[Window, Window]:
    if max(query_stride) > 1 and max(dilation) > 1:
        raise ValueError(f"query_stride {query_stride} and dilation {dilation} cannot be combined")
    offset = offset[0] % stride[0], offset[1] % stride[1]
    if max(offset) > 0 and (max(query_stride) > 1 or boundary == "shift"):
        raise ValueError(
            f"offset {offset} cannot be combined with query_stride {query_stride} and boundary {boundary!r}: it needs "
            "query_stride 1 and boundary 'zero' or 'mask'"
        )
    counted = isinstance(bias, DecomposedRelativePositionBias) and bias.counted
    for axis, size, step, apart in zip(("rows", "columns"), kernel_size, stride, query_stride, strict=True):
        if step > size:
            raise ValueError(f"stride {step} is larger than kernel_size {size} ({axis})")
        if counted and step % apart:
            raise ValueError(
                f"a counted bias needs a query_stride that divides stride, got query_stride {apart}, stride {step} "
                f"({axis})"
            )
    rows, columns = (
        Window(size, step, spacing, boundary, apart, counted and apart > 1, first)
        for size, step, spacing, apart, first in zip(kernel_size, stride, dilation, query_stride, offset, strict=True)
    )
    return rows, columns


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, query_stride: tuple[int, int]) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, t, "[B, H, W, heads, D]")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    dynamic_shape = is_dynamic(*k.shape[1:3])
    rows, columns = (-(-length // n) for length, n in zip(k.shape[1:3], query_stride, strict=True))
    if dynamic_shape and max(query_stride) > 1:
        rows, columns = q.shape[1:3]  # tracers cannot prove that different roundings are equal
    if q.shape != (k.shape[0], rows, columns, *k.shape[3:]) or k.shape[:4] != v.shape[:4]:
        wanted = "one shape" if query_stride == (1, 1) else f"one shape, but {rows} x {columns} queries (query_stride)"
        raise ValueError(
            f"q and k must have {wanted}, and v that of k up to its last dimension, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not dynamic_shape and min(*k.shape[1:], v.shape[4]) < 1:
        raise ValueError(f"only the batch may be empty, got q {tuple(q.shape)}, v {tuple(v.shape)}")


def _check_bias(bias: Bias | None, q: Tensor, kernel_size: tuple[int, int]) -> None:
    if bias is None:
        return
    if not isinstance(bias, BIASES):
        raise TypeError(f"bias must be a {' or a '.join(kind.__name__ for kind in BIASES)}, got {type(bias).__name__}")
    for name, allowed in bias.expected(q.shape[3], q.shape[4], kernel_size).items():
        t = getattr(bias, name)
        if tuple(t.shape) not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            first = q.shape[1] != q.shape[3] and t.shape[0] == q.shape[1]
            raise ValueError(
                f"{type(bias).__name__}.{name} has shape {list(t.shape)}, expected {wanted} "
                f"(heads {q.shape[3]}, kernel_size {kernel_size[0]} x {kernel_size[1]}){HEADS_FIRST if first else ''}"
            )
        if not t.is_floating_point() or t.dtype.itemsize < 2:
            raise TypeError(f"{type(bias).__name__}.{name} must be floating point, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{type(bias).__name__}.{name} is on {t.device}, q on {q.device}")
