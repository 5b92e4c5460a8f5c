"""The public operation: checks at the border, choice of a backend, nothing else.

Layout legend: B batch, H W map, N heads, D value channels, Kh Kw keys of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import IntPair, autocast, autocast_enabled, check_tensor, check_window, pair
from ..dispatch import choose
from ..problem import Problem, tracing
from ..window import Window
from . import reference, tiled

BACKENDS = {"reference": reference, "tiled": tiled}


def neighborhood_aggregate(
    weights: Tensor,
    v: Tensor,
    *,
    kernel_size: IntPair,
    dilation: IntPair = 1,
    boundary: str = "shift",
    backend: str | None = None,
) -> Tensor:
    """Sum of the values in the ``kernel_size`` window around every point, with weights given for each point and key.

    The second half of neighborhood attention on its own, for weights that come from elsewhere: a convolution whose
    kernel depends on the position (OverLoCK, arXiv 2502.20087; ``na2d_av`` of NATTEN up to 0.17). Nothing is
    normalised: ``out[x] = sum over t of weights[x, t] * v[key(x, t)]``. The rule that says which keys a query sees is
    in ``kernels/window.py``.

    Args:
        weights: ``[B, H, W, heads, Kh * Kw]``, any values; the keys of a window row by row. float16, bfloat16, float32
            or float64, any strides.
        v: values ``[B, H, W, heads, D]``, same dtype and device as ``weights``.
        kernel_size: keys per axis, an int or a pair (rows, columns), likewise ``dilation``.
        dilation: distance of neighbouring keys; need not divide the map.
        boundary: ``"shift"`` (windows are moved inside the map), ``"zero"`` or ``"mask"``: keys outside contribute
            nothing. These two are the same here, as there is no softmax that a key could be left out of.
        backend: a backend's name, or ``None`` for the automatic choice.

    Returns:
        ``[B, H, W, heads, D]`` in the dtype of ``v``. Under autocast the inputs are cast to the autocast dtype.

    Raises:
        ValueError: shapes, devices or options that do not fit together; with ``boundary="shift"``, a map smaller than
            ``kernel_size * dilation``.
        TypeError: dtypes that differ or are not floating point, or options of a wrong type.
        BackendError: the backend asked for cannot run this call.

    >>> weights = torch.randn(1, 14, 14, 2, 5 * 5).softmax(-1)
    >>> neighborhood_aggregate(weights, torch.randn(1, 14, 14, 2, 32), kernel_size=5).shape
    torch.Size([1, 14, 14, 2, 32])
    """
    kernel_size, dilation = pair("kernel_size", kernel_size), pair("dilation", dilation)
    check_tensor("weights", weights, "[B, H, W, heads, Kh * Kw]")
    check_tensor("v", v, "[B, H, W, heads, D]")
    if weights.shape[:4] != v.shape[:4]:
        raise ValueError(
            "weights and v must have one shape up to the last dimension, got "
            f"weights {tuple(weights.shape)}, v {tuple(v.shape)}"
        )
    check_area("weights", weights, kernel_size)
    return _run(
        "neighborhood_aggregate", "forward", {"weights": weights, "v": v}, kernel_size, dilation, boundary, backend
    )


def neighborhood_logits(
    q: Tensor, k: Tensor, *, kernel_size: IntPair, dilation: IntPair = 1, backend: str | None = None
) -> Tensor:
    """``q . k`` for every key in the window, ``[B, H, W, heads, Kh * Kw]``, unscaled; boundary "shift".

    For ``kernels/compat.py``: the gradient of the weights of :func:`neighborhood_aggregate` is this same product.
    Arguments and errors as there, with ``q`` and ``k`` ``[B, H, W, heads, D]``.
    """
    kernel_size, dilation = pair("kernel_size", kernel_size), pair("dilation", dilation)
    for name, t in (("q", q), ("k", k)):
        check_tensor(name, t, "[B, H, W, heads, D]")
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    return _run("neighborhood_logits", "logits", {"q": q, "k": k}, kernel_size, dilation, "shift", backend)


def check_area(name: str, weights: Tensor, kernel_size: tuple[int, int]) -> None:
    """One weight for every key of a window."""
    rows, columns = kernel_size
    if weights.shape[4] != rows * columns:
        raise ValueError(
            f"{name} must have {rows} x {columns} = {rows * columns} numbers per head and position (kernel_size), "
            f"got {weights.shape[4]}: {name} {tuple(weights.shape)}"
        )


def _run(
    operation: str,
    function: str,
    tensors: dict[str, Tensor],
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    boundary: str,
    backend: str | None,
) -> Tensor:
    """What both operations share: ``function`` of a backend, on tensors that agree in their first four dimensions."""
    (name, x), (other, y) = tensors.items()
    if x.device != y.device:
        raise ValueError(f"{name} and {other} must be on one device, got {x.device} and {y.device}")
    if min(y.shape[1:]) < 1:
        raise ValueError(f"only the batch may be empty, got {name} {tuple(x.shape)}, {other} {tuple(y.shape)}")
    check_window(tuple(y.shape[1:3]), kernel_size, dilation, boundary)
    cast = autocast_enabled(y)
    if cast:
        x, y = autocast(x, y)
    if x.dtype != y.dtype:
        raise TypeError(f"{name} and {other} must have one dtype, got {x.dtype} and {y.dtype}")
    boundary = "zero" if boundary == "mask" else boundary  # one thing here: they share their plans
    problem = Problem(
        shape=tuple(y.shape),
        value_depth=y.shape[-1],
        rows=Window(kernel_size[0], 1, dilation[0], boundary),
        columns=Window(kernel_size[1], 1, dilation[1], boundary),
        dtype=y.dtype,
        device=y.device.type,
        needs_grad=torch.is_grad_enabled() and (x.requires_grad or y.requires_grad),
        tracing=tracing(),
    )
    call = getattr(choose(operation, BACKENDS, problem, backend), function)
    if cast:
        with torch.autocast(y.device.type, enabled=False):  # the casts are done: backends see plain arithmetic
            return call(x, y, problem)
    return call(x, y, problem)
