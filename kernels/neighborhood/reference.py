"""Reference implementation of neighborhood attention, by gather: any device, any floating dtype, every option.

The other backends are tested against it.

B batch, H W map, h w queries (H W without a query stride), N heads, D query/key channels, V value channels, K = Kh * Kw
keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bias import Bias, RelativePositionBias
from ..problem import Problem


def unsupported_reason(problem: Problem) -> str | None:
    """Supports every call."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, problem: Problem) -> Tensor:
    """[B, h, w, N, D] x [B, H, W, N, D] x [B, H, W, N, V] -> [B, h, w, N, V]; arithmetic in at least float32."""
    out_dtype = v.dtype
    working = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(working), k.to(working), v.to(working)
    height, width = k.shape[1:3]
    row_at, row_in, row = problem.rows.keys(height, q.device)  # h Kh
    column_at, column_in, column = problem.columns.keys(width, q.device)  # w Kw
    inside = row_in[:, None, :, None] & column_in[None, :, None, :]  # h w Kh Kw

    def gather(t: Tensor) -> Tensor:  # B H W N C -> B h w Kh Kw N C, zero outside the map
        near = t[:, row_at[:, None, :, None], column_at[None, :, None, :]]
        if problem.boundary == "shift":
            return near
        return near.masked_fill(~inside[None, :, :, :, :, None, None], 0.0)

    logits = torch.einsum("bhwnd,bhwijnd->bhwnij", q * problem.scale, gather(k))
    if isinstance(bias, RelativePositionBias):
        entries = bias.table.to(working)[:, row[:, None, :, None], column[None, :, None, :]]  # N h w Kh Kw
        logits = logits + entries.permute(1, 2, 0, 3, 4)
    elif bias is not None:
        rows, columns = (t.to(working).expand(q.shape[3], -1, -1) for t in bias.tensors)
        logits = logits + torch.einsum("bhwnd,nhid->bhwni", q, rows[:, row])[..., None]
        logits = logits + torch.einsum("bhwnd,nwjd->bhwnj", q, columns[:, column])[..., None, :]
    if problem.boundary == "mask":
        logits = logits.masked_fill(~inside[:, :, None], float("-inf"))
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:])
    if problem.dropout_p > 0:
        weights = F.dropout(weights, problem.dropout_p)
    return torch.einsum("bhwnij,bhwijnd->bhwnd", weights, gather(v)).to(out_dtype)
