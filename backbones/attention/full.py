"""Attention of every position to every other, and work in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...kernels.tracing import transformed, without_size_guards
from ..layers import fx_leaf, linear


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Attention of ``[B, N, heads, D]`` to ``[B, M, heads, D]``. A mask ``[heads, N, M]`` in float32 is added to the
    logits and not copied for each image. ``scale`` is ``D ** -0.5`` unless given."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    # exporters decompose SDPA with guards, and it has no forward-mode derivative and no batching rules
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or transformed():
        working = torch.promote_types(q.dtype, torch.float32)
        # contiguous tensors, for others of which exporters guard on a single position
        q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k.transpose(-1, -2), v))
        logits = (q.to(working) * factor) @ k.to(working)
        out = (logits if mask is None else logits + mask).softmax(-1).to(v.dtype) @ v
        return out.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    added = None if mask is None else mask.to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=factor).transpose(1, 2)


def in_chunks(
    function: Callable, step: int | None, split: Sequence[torch.Tensor], *whole: torch.Tensor
) -> torch.Tensor:
    """``function(*split, *whole)`` in chunks of ``step`` (at least 1; None: one chunk) along the dimension 1 of
    ``split`` and of the result, which are recomputed in the backward pass."""
    if step is None or step >= split[0].shape[1]:
        return function(*split, *whole)
    again = torch.is_grad_enabled() and not transformed() and not torch.jit.is_tracing()
    run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False) if again else function
    chunks = zip(*(x.split(max(1, step), 1) for x in split), strict=True)
    return torch.cat([run(*parts, *whole) for parts in chunks], 1)


class TokenAttention2d(nn.Module):
    """Multi-head attention over the whole map, without position bias; q, k and v of a head are next to each other in
    the output of ``qkv``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        return linear(self.proj, _attend_tokens(linear(self.qkv, x), self.num_heads))


@without_size_guards
def _attend_tokens(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (num_heads, 3, -1)).unbind(3)
    return attend(q, k, v).flatten(2).unflatten(1, qkv.shape[1:3])
