"""Attention of every position to every other, and work in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...kernels.tracing import is_dynamic, transformed, without_size_guards
from ..layers import fx_leaf, linear, refuse_scripting
from .maps import map_sizes


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
        q, k, v = contiguous(q, k.transpose(-1, -2), v)
        logits = (q.to(working) * factor) @ k.to(working)
        out = (logits if mask is None else logits + mask).softmax(-1).to(v.dtype) @ v
        return out.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    added = None if mask is None else mask.to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=factor).transpose(1, 2)


def contiguous(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """Contiguous copies in exports, as exporters guard on lengths of 1 of other tensors' products; else as they are."""
    if not (torch.compiler.is_exporting() or torch.jit.is_tracing() or transformed()):
        return tensors
    return [t.clone(memory_format=torch.contiguous_format) for t in tensors]


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


class SoftmaxAttention2d(nn.Module):
    """Multi-head attention over the whole map, without position bias, as in ViT: q, k and v one after the other in the
    output of ``qkv``. The base of agent and inline attention, which replace the softmax.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``.
        class_token: a class token precedes the positions, so tokens and the size of the map are passed.
        split_q: the queries have a Linear of their own, ``q``, and the others ``kv``, as in PVT.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import SoftmaxAttention2d
        >>> SoftmaxAttention2d(dim=64, num_heads=2)(torch.randn(1, 14, 20, 64)).shape
        torch.Size([1, 14, 20, 64])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, dim: int, num_heads: int, *, class_token: bool = False, split_q: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.prefix = int(class_token)
        self.split_q = split_q
        if split_q:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    @fx_leaf
    @without_size_guards
    def forward(
        self, x: torch.Tensor, size: tuple[int, int] | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A map ``[B, H, W, dim]`` to the same shape, for any H and W; or with its ``size`` (H, W) tokens ``[B, N,
        dim]``, N = H * W and one more with ``class_token``. ``residual``, of the shape of ``x``, is for attentions that
        read the input before its norm, too. ValueError for other shapes."""
        self._check(x, size, residual)
        tokens = x if size else x.flatten(1, 2)
        if self.split_q:
            q, (k, v) = linear(self.q, tokens), linear(self.kv, tokens).chunk(2, -1)
        else:
            q, k, v = linear(self.qkv, tokens).chunk(3, -1)
        where = size or map_sizes(x)[1:3]
        source = tokens if residual is None else residual.flatten(1, -2)
        y = linear(self.proj, self._mix(q, k, v, where, source))
        return y if size else y.unflatten(1, where)

    def _check(self, x: torch.Tensor, size: tuple[int, int] | None, residual: torch.Tensor | None) -> None:
        if torch.jit.is_tracing() or is_dynamic(*x.shape, *(size or ())):  # which would record or guard the sizes
            return
        if size is None and (x.ndim != 4 or self.prefix):
            raise ValueError(f"expected a map [B, H, W, dim] without class token, or a size; got {tuple(x.shape)}")
        if size is not None and (x.ndim != 3 or x.shape[1] != self.prefix + math.prod(size)):
            raise ValueError(f"size {tuple(size)} has {self.prefix} + {math.prod(size)} tokens, got {tuple(x.shape)}")
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"residual must have the shape {tuple(x.shape)}, got {tuple(residual.shape)}")

    def _mix(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: tuple[int, int], source: torch.Tensor
    ) -> torch.Tensor:
        """All ``[B, N, dim]``, as the output."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return attend(q, k, v).flatten(2)

    def _to_map(self, tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Tokens without the class token as a map ``[B, H, W, dim]``."""
        return (tokens[:, self.prefix :] if self.prefix else tokens).unflatten(1, size)

    def _to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """A map as tokens, with zeros for the class token."""
        return F.pad(x.flatten(1, 2), (0, 0, self.prefix, 0)) if self.prefix else x.flatten(1, 2)
