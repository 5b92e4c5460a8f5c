"""NATTEN's fused kernels: no bias, boundary "shift".

A ``torch.library`` operation with a fake and a gradient, so that compilers see one node. The backward pass reruns
NATTEN's forward, because its backward operators are not public.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import flops
from ..bias import Bias
from ..problem import Problem


@lru_cache(maxsize=1)
def installed_version() -> str | None:
    try:
        return version("natten")
    except PackageNotFoundError:
        return None


def unsupported_reason(problem: Problem) -> str | None:
    found = installed_version()
    if found is None:
        return "natten is not installed (pip install 'foveal[natten]')"
    major, minor = re.match(r"(\d+)\.(\d+)", found).groups()
    if (int(major), int(minor)) < (0, 20):
        return f"natten {found} is too old, 0.20 is required"
    if problem.bias is not None:
        return f"NATTEN has no relative position bias since 0.20 (got {problem.bias.__name__})"
    if problem.boundary != "shift":
        return f"NATTEN only has boundary 'shift' (got {problem.boundary!r})"
    if problem.query_stride != (1, 1):
        return f"NATTEN has no query_stride (got {problem.query_stride})"
    if problem.dropout_p > 0:
        return f"NATTEN has no attention dropout (got {problem.dropout_p})"
    if problem.shape[0] == 0:
        return "NATTEN does not take an empty batch"
    if problem.device not in ("cpu", "cuda"):
        return f"NATTEN runs on cpu and cuda, not on {problem.device}"
    if problem.device == "cpu" and problem.needs_grad:
        return "NATTEN has no gradient on a CPU"
    if problem.dtype == torch.float64:
        return "NATTEN has no float64 kernels"
    if min(problem.kernel_size) < 2:
        return f"NATTEN needs a kernel_size of at least 2 (got {problem.kernel_size})"
    depth = problem.shape[4]
    if problem.value_depth != depth:
        return f"NATTEN needs values with the depth of the queries (got {problem.value_depth} and {depth})"
    if depth % 8 or (problem.device == "cpu" and depth & (depth - 1)):
        return f"NATTEN needs a depth that is a multiple of 8, on a CPU a power of two (got {depth})"
    return None


def _call(q: Tensor, k: Tensor, v: Tensor, window: list[int], scale: float) -> Tensor:
    from natten import na2d  # costs seconds to import, so only where it is used

    kernel_size, stride, dilation = tuple(window[:2]), tuple(window[2:4]), tuple(window[4:])
    return na2d(q, k, v, kernel_size=kernel_size, stride=stride, dilation=dilation, scale=scale)


@torch.library.custom_op("foveal::natten_na2d", mutates_args=())
def natten_na2d(q: Tensor, k: Tensor, v: Tensor, window: list[int], scale: float) -> Tensor:
    return _call(q.contiguous(), k.contiguous(), v.contiguous(), window, scale)


@natten_na2d.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: list[int], scale: float) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("foveal::natten_na2d_backward", mutates_args=())
def natten_na2d_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Custom operators run with the autograd dispatch keys excluded, which enable_grad does not undo.
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        inputs = [t.detach().contiguous().requires_grad_(True) for t in (q, k, v)]
        out = _call(*inputs, window, scale)
    return torch.autograd.grad(out, inputs, grad.contiguous())


@natten_na2d_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: list[int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx, grad: Tensor):
    return *natten_na2d_backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale), None, None


natten_na2d.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.foveal.natten_na2d)
def _(q, k, v, window, *_, **__) -> int:
    return flops.attention(math.prod(q[:4]) * window[0] * window[1], q[4], v[4])


@register_flop_formula(torch.ops.foveal.natten_na2d_backward)
def _(grad, q, k, v, window, *_, **__) -> int:
    return flops.attention(math.prod(q[:4]) * window[0] * window[1], q[4], v[4], backward=True)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, problem: Problem) -> Tensor:
    """[B, H, W, N, D] x [B, H, W, N, D] x [B, H, W, N, V] -> [B, H, W, N, V]."""
    window = [*problem.kernel_size, *problem.stride, *problem.dilation]
    return natten_na2d(q, k, v, window, problem.scale)
