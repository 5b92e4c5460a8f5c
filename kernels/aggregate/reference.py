"""Reference implementation of neighborhood aggregation, by gather: any device, any floating dtype, every option.

The other backends are tested against it.

B batch, H W map, N heads, D channels, Kh Kw keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from .softmax import mix_by


def unsupported_reason(problem: Problem) -> str | None:
    """Supports every call."""
    return None


def _near(x: Tensor, problem: Problem) -> Tensor:
    """The keys of every query, zero outside the map: [B, H, W, N, C] -> [B, H, W, Kh, Kw, N, C], at least float32."""
    row_at, row_in, _ = problem.rows.keys(x.shape[1], x.device)  # H Kh
    column_at, column_in, _ = problem.columns.keys(x.shape[2], x.device)  # W Kw
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    near = x[:, row_at[:, None, :, None], column_at[None, :, None, :]]
    if problem.boundary == "shift":
        return near
    inside = row_in[:, None, :, None] & column_in[None, :, None, :]
    return near.masked_fill(~inside[None, :, :, :, :, None, None], 0.0)


def forward(weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """[B, H, W, N, Kh*Kw] x [B, H, W, N, D] -> [B, H, W, N, D]."""
    near = _near(v, problem)
    weights = weights.to(near.dtype).unflatten(-1, problem.kernel_size)
    return torch.einsum("bhwnij,bhwijnd->bhwnd", weights, near).to(v.dtype)


mix = mix_by(forward)


def logits(q: Tensor, k: Tensor, problem: Problem) -> Tensor:
    """[B, H, W, N, D] x [B, H, W, N, D] -> [B, H, W, N, Kh*Kw]: ``q . k`` for the keys of every window."""
    near = _near(k, problem)
    return torch.einsum("bhwnd,bhwijnd->bhwnij", q.to(near.dtype), near).flatten(-2).to(k.dtype)
