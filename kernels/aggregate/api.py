"""The public operations: validate the arguments, choose a backend.

Layout legend: B batch, H W map, N heads, D value channels, Kh Kw keys of a window.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..bias import RelativePositionBias
from ..checks import IntPair, autocast, autocast_enabled, check_tensor, check_window, pair, warn_heads_first
from ..dispatch import run
from ..problem import Problem, of_tensors
from ..tracing import is_dynamic
from ..window import Window
from . import dynamic, reference, tiled, triton

BACKENDS = {"reference": reference, "tiled": tiled, "dynamic": dynamic, "triton": triton}


def neighborhood_aggregate(
    weights: Tensor,
    v: Tensor,
    *,
    kernel_size: IntPair,
    dilation: IntPair = 1,
    boundary: str = "shift",
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of the values in the ``kernel_size`` window around each position.

    The second half of neighborhood attention, for given weights: a convolution whose kernel depends on the position
    (OverLoCK, arXiv 2502.20087; ``na2d_av`` in NATTEN up to 0.17). The weights are not normalised:
    ``out[x] = sum over t of weights[x, t] * v[key(x, t)]``. ``kernels/window.py`` defines which keys a query sees.

    Args:
        weights: ``[B, H, W, heads, Kh * Kw]``, keys in row-major order; float16, bfloat16, float32 or float64, any
            strides.
        v: values ``[B, H, W, heads, D]``, same dtype and device as ``weights``.
        kernel_size: keys per axis, an int or a pair (rows, columns).
        dilation: distance between neighbouring keys, an int or a pair; need not divide the map.
        boundary: ``"shift"`` (windows are moved inside the map), ``"zero"`` or ``"mask"`` (keys outside contribute
            nothing; without a softmax the two are the same).
        backend: a backend's name, or ``None`` for the automatic choice.

    Returns:
        ``[B, H, W, heads, D]`` in the dtype of ``v``. Under autocast the inputs are cast to the autocast dtype.

    Raises:
        ValueError: inconsistent shapes, devices or options; with ``boundary="shift"``, a map smaller than
            ``kernel_size * dilation``.
        TypeError: dtypes that differ or are not floating point, or options of a wrong type.
        BackendError: the requested backend cannot run this call.

    Examples:
        >>> import torch
        >>> from foveal.kernels import neighborhood_aggregate
        >>> weights = torch.randn(1, 14, 14, 2, 5 * 5).softmax(-1)
        >>> neighborhood_aggregate(weights, torch.randn(1, 14, 14, 2, 32), kernel_size=5).shape
        torch.Size([1, 14, 14, 2, 32])
    """
    kernel_size, dilation = pair("kernel_size", kernel_size), pair("dilation", dilation)
    _check_values("weights", weights, v, kernel_size)
    warn_heads_first(v)
    return _run(
        "neighborhood_aggregate", "forward", {"weights": weights, "v": v}, kernel_size, dilation, boundary, backend
    )


def neighborhood_mix(
    logits: Tensor,
    v: Tensor,
    *,
    kernel_size: IntPair,
    dilation: IntPair = 1,
    bias: RelativePositionBias | None = None,
    kernel_bias: Tensor | None = None,
    boundary: str = "shift",
    backend: str | None = None,
) -> Tensor:
    """`neighborhood_aggregate` with the softmax of logits as weights: a convolution with input-dependent kernels
    (OverLoCK's ContMix, arXiv 2502.20087, section 3.3).

    The Triton kernels fuse the softmax; other backends compute the weights first.

    Args:
        logits: ``[B, H, W, heads, Kh * Kw]``, keys in row-major order, any strides.
        v: values ``[B, H, W, heads, D]``, same dtype and device as ``logits``.
        kernel_size: as in `neighborhood_aggregate`.
        dilation: likewise.
        bias: relative position bias, a table of ``[heads, 2*Kh - 1, 2*Kw - 1]``, added to the logits.
        kernel_bias: ``[Kh * Kw]``, added to the logits of every position and head.
        boundary: as in `neighborhood_attention`: ``"shift"``, ``"zero"`` (positions outside the map take part in the
            softmax, with zero values) or ``"mask"`` (they are excluded).
        backend: a backend's name, or ``None`` for the automatic choice.

    Returns:
        ``[B, H, W, heads, D]`` in the dtype of ``v``. Under autocast logits and values are cast to the autocast dtype.
        The softmax is computed in float32 at least.

    Raises:
        ValueError, TypeError, BackendError: as `neighborhood_aggregate`; biases of another shape or device.

    Examples:
        >>> import torch
        >>> from foveal.kernels import RelativePositionBias, neighborhood_mix
        >>> logits, v = torch.randn(1, 14, 14, 2, 5 * 5), torch.randn(1, 14, 14, 2, 32)
        >>> neighborhood_mix(logits, v, kernel_size=5, bias=RelativePositionBias(torch.zeros(2, 9, 9))).shape
        torch.Size([1, 14, 14, 2, 32])
    """
    kernel_size, dilation = pair("kernel_size", kernel_size), pair("dilation", dilation)
    _check_values("logits", logits, v, kernel_size)
    if bias is not None and not isinstance(bias, RelativePositionBias):
        raise TypeError(f"bias must be a RelativePositionBias or None, got {type(bias).__name__}")
    table = None if bias is None else bias.table
    wanted: dict[str, tuple[int, ...]] = {"kernel_bias": (kernel_size[0] * kernel_size[1],)}
    wanted["bias.table"] = v.shape[3], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1
    for (name, shape), t in zip(wanted.items(), (kernel_bias, table), strict=True):
        if t is not None and (t.shape != shape or t.device != v.device):
            raise ValueError(
                f"{name} must be {shape} on the device of v, {v.device}; got {tuple(t.shape)} on {t.device}"
            )
    tensors = {"logits": logits, "v": v}
    return _run("neighborhood_mix", "mix", tensors, kernel_size, dilation, boundary, backend, (table, kernel_bias))


def neighborhood_logits(
    q: Tensor,
    k: Tensor,
    *,
    kernel_size: IntPair,
    dilation: IntPair = 1,
    boundary: str = "shift",
    backend: str | None = None,
) -> Tensor:
    """``q . k`` for every key in the window, ``[B, H, W, heads, Kh * Kw]``, unscaled; 0 for keys outside the map.

    For ``kernels/compat.py`` and softmaxes over further keys; the same product is the gradient of the weights of
    :func:`neighborhood_aggregate`. Arguments and errors as there; ``q`` and ``k`` are ``[B, H, W, heads, D]``.
    """
    kernel_size, dilation = pair("kernel_size", kernel_size), pair("dilation", dilation)
    for name, t in (("q", q), ("k", k)):
        check_tensor(name, t, "[B, H, W, heads, D]")
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    return _run("neighborhood_logits", "logits", {"q": q, "k": k}, kernel_size, dilation, boundary, backend)


def check_area(name: str, weights: Tensor, kernel_size: tuple[int, int]) -> None:
    """Raise unless there is one weight for every key of a window."""
    rows, columns = kernel_size
    if weights.shape[4] != rows * columns:
        raise ValueError(
            f"{name} must have {rows} x {columns} = {rows * columns} numbers per head and position (kernel_size), "
            f"got {weights.shape[4]}: {name} {tuple(weights.shape)}"
        )


def _check_values(name: str, weights: Tensor, v: Tensor, kernel_size: tuple[int, int]) -> None:
    """Raise unless every value's position has one weight or logit for each key of its window."""
    check_tensor(name, weights, "[B, H, W, heads, Kh * Kw]")
    check_tensor("v", v, "[B, H, W, heads, D]")
    if weights.shape[:4] != v.shape[:4]:
        raise ValueError(
            f"{name} and v must have one shape up to the last dimension, got "
            f"{name} {tuple(weights.shape)}, v {tuple(v.shape)}"
        )
    check_area(name, weights, kernel_size)


def _run(
    operation: str,
    function: str,
    tensors: dict[str, Tensor],
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    boundary: str,
    backend: str | None,
    biases: tuple[Tensor | None, ...] = (),
) -> Tensor:
    """Run ``function`` of a backend on tensors that agree in their first four dimensions."""
    (name, x), (other, y) = tensors.items()
    if x.device != y.device:
        raise ValueError(f"{name} and {other} must be on one device, got {x.device} and {y.device}")
    if not is_dynamic(*y.shape[1:3]) and min(y.shape[1:]) < 1:
        raise ValueError(f"only the batch may be empty, got {name} {tuple(x.shape)}, {other} {tuple(y.shape)}")
    check_window((y.shape[1], y.shape[2]), kernel_size, dilation, boundary, y.shape[3])
    cast = autocast_enabled(y)
    if cast:
        x, y = autocast(x, y)
    if x.dtype != y.dtype:
        raise TypeError(f"{name} and {other} must have one dtype, got {x.dtype} and {y.dtype}")
    if boundary == "mask" and function != "mix":
        boundary = "zero"  # the same without a softmax: they share their plans
    problem = Problem(
        shape=tuple(y.shape),
        value_depth=y.shape[-1],
        rows=Window(kernel_size[0], 1, dilation[0], boundary),
        columns=Window(kernel_size[1], 1, dilation[1], boundary),
        **of_tensors(y, x, *biases),
    )
    with torch.autocast(y.device.type, enabled=False) if cast else nullcontext():  # backends see plain arithmetic
        return run(operation, BACKENDS, problem, (x, y, *biases), backend, function=function)
