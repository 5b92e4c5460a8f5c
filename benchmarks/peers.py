"""Alternatives to our operations, as functions of the same tensors.

Each takes a `Layer` and returns a function of its tensors, or None if it does not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.attention import AggregatedAttention2d
from ..kernels import Call, recording
from ..kernels.aggregate.softmax import expand_table
from ..kernels.window import Window
from .cases import Layer
from .measure import installed

Function = Callable[..., Tensor]
DENSE_MASK_POSITIONS = 1024  # maximum map size for scaled_dot_product_attention with a dense mask


def unfold_aggregate(weights: Tensor, v: Tensor, *, kernel_size: int | tuple[int, int]) -> Tensor:
    """Neighborhood aggregation by unfolding, boundary "shift", odd kernels, on ``[B, H, W, heads, D]``: all windows
    inside the map, and the outer ones repeated for the border."""
    rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    batch, height, width, heads, depth = v.shape
    windows = F.unfold(v.permute(0, 3, 4, 1, 2).flatten(1, 2), (rows, columns))
    windows = windows.unflatten(-1, (height - rows + 1, width - columns + 1))
    windows = F.pad(windows, (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
    windows = windows.reshape(batch, heads, depth, rows * columns, height, width)
    return torch.einsum("bhwnk,bndkhw->bhwnd", weights, windows)


def unfold_mix(call: Call) -> Tensor | None:
    """`unfold_aggregate` in place of a `neighborhood_mix`, for `kernels.recording`."""
    if call.operation != "neighborhood_mix":
        return None
    logits, v, table, kernel_bias = call.tensors
    bias = expand_table(table, call.problem.rows, call.problem.columns, v.shape[1:3]) + kernel_bias
    weights = (logits.permute(0, 3, 1, 2, 4) + bias).softmax(-1).permute(0, 2, 3, 1, 4)
    return unfold_aggregate(weights, v, kernel_size=call.problem.kernel_size)


def unfold_attention(self: Any, x: Tensor) -> Tensor:
    """`AggregatedAttention2d.forward` for ``[B, H, W, C]`` without kernels: 3x3 windows by unfolding, and one softmax
    over them and the pooled map."""
    if self.reduction == 1:
        return _without_unfolding(self, x)
    _, H, W, _ = x.shape
    heads = self.num_heads, x.shape[3] // self.num_heads
    q = F.normalize(self.q(x).unflatten(3, heads), dim=-1).transpose(1, 3).transpose(2, 3).flatten(2, 3)  # B N HW D
    k, v = self.kv(x).unflatten(3, (2, *heads)).unbind(3)
    near_k, near_v = (
        F.unfold(t.flatten(3).permute(0, 3, 1, 2), 3, padding=1).unflatten(1, (*heads, 9)).permute(0, 1, 4, 2, 3)
        for t in (F.normalize(k, dim=-1), v)
    )  # B N HW D 9
    pooled = self.kv(self._pool(x))
    pooled_k, pooled_v = pooled.flatten(1, 2).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)  # B N hw D
    table, index, _ = self.cpb((H, W), pooled.shape[1:3], v)
    bias = table.index_select(1, index.flatten()).unflatten(1, index.shape[1:]).unflatten(3, (W, -1))  # N H h W w
    bias = bias.transpose(2, 3).flatten(3).flatten(1, 2)
    inside = F.unfold(x.new_ones(1, 1, H, W), 3, padding=1)[0].T > 0  # HW 9
    count = inside.sum(1, keepdim=True) + pooled_k.shape[2]
    scaled = (q + self.query_embedding) * F.softplus(self.temperature) * count.log()
    local = (scaled[..., None, :] @ near_k)[..., 0, :] + self.relative_pos_bias_local[:, None]
    local = local.masked_fill(~inside, -math.inf)
    logits = torch.cat([local, scaled @ F.normalize(pooled_k, dim=-1).transpose(-1, -2) + bias], -1)
    local, rest = logits.softmax(-1).split([9, pooled_k.shape[2]], -1)
    local = local + q @ self.learnable_tokens + self.learnable_bias
    y = (near_v @ local[..., None])[..., 0] + rest @ pooled_v  # B N HW D
    return self.proj(y.transpose(1, 2).flatten(2).unflatten(1, (H, W)))


_without_unfolding = AggregatedAttention2d.forward


@contextmanager
def by_unfolding() -> Iterator[None]:
    """Inside, neighborhood operations of OverLoCK and TransNeXt unfold their windows, as code without kernels does."""
    with recording(unfold_mix), mock.patch.object(AggregatedAttention2d, "forward", unfold_attention):
        yield


def _is_plain(layer: Layer) -> bool:
    """Whether NATTEN and dense masks support the window rule: boundary "shift", a query at every key."""
    return layer.operation == "attention" and layer.queries == layer.shape[1:3] and layer.bias != "factored"


def natten(layer: Layer) -> Function | None:
    """NATTEN's fused kernels, without bias."""
    if not _is_plain(layer) or layer.rows.boundary != "shift" or installed("natten") == "not installed":
        return None
    from natten import na2d

    pairs = {name: layer.options[name] for name in ("kernel_size", "stride", "dilation")}
    return lambda q, k, v: na2d(q, k, v, **pairs)


def _visible(layer: Layer, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each axis, ``[queries, positions]``: whether the query sees the position, and the row of the table."""
    found = []
    for window, length in zip((layer.rows, layer.columns), layer.shape[1:3], strict=True):
        position, inside, row = window.keys(length, device)
        visible = torch.zeros(len(position), length + 1, dtype=torch.bool, device=device)
        rows = torch.zeros(len(position), length + 1, dtype=torch.long, device=device)
        at = torch.where(inside, position, length)  # keys outside share a column that is cut off
        visible.scatter_(1, at, True)
        rows.scatter_(1, at, row)
        found += [visible[:, :length], rows[:, :length]]
    return tuple(found)


def flex(layer: Layer, device: str) -> Function | None:
    """PyTorch's flex_attention, compiled, with a block mask and the table added by its score_mod."""
    if not _is_plain(layer) or layer.rows.boundary == "zero" or device != "cuda":
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # Dynamo stops compiling after some variants
    _, height, width, _, depth = layer.shape
    rows, row_of, columns, column_of = _visible(layer, device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rows[q // width, k // width] & columns[q % width, k % width]

    mask = create_block_mask(mask_mod, None, None, height * width, height * width, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[h, row_of[i // width, j // width], column_of[i % width, j % width]]

        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        out = compiled(q, k, v, score_mod=None if table is None else score_mod, block_mask=mask, scale=depth**-0.5)
        return out.transpose(1, 2).unflatten(1, (height, width))

    return call


def dense(layer: Layer, device: str) -> Function | None:
    """scaled_dot_product_attention over the whole map with a dense mask that includes the table."""
    _, height, width, _, _ = layer.shape
    if not _is_plain(layer) or layer.rows.boundary == "zero" or height * width > DENSE_MASK_POSITIONS:
        return None
    rows, row_of, columns, column_of = _visible(layer, device)
    hidden = ~(rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        if table is None:
            mask = torch.zeros(hidden.shape, dtype=q.dtype, device=device)
        else:
            mask = table[:, row_of[:, None, :, None], column_of[None, :, None, :]].flatten(3).flatten(1, 2)
        mask = mask.masked_fill(hidden, float("-inf"))
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).unflatten(1, (height, width))

    return call


def eager(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention as matrix products and a softmax."""
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v


def windowed(layer: Layer, attend: Function = F.scaled_dot_product_attention) -> Function | None:
    """scaled_dot_product_attention, or another, on windows that tile the map."""
    both, size = (layer.rows, layer.columns), layer.shape[1:3]
    tiled = all(
        w.kernel_size == w.stride and length % (w.kernel_size * w.dilation) == 0
        for w, length in zip(both, size, strict=True)
    )
    grid = all(w.kernel_size * w.dilation == length for w, length in zip(both, size, strict=True))
    block = all(w.dilation == 1 for w in both)
    if not _is_plain(layer) or not tiled or not (grid or block):
        return None
    p, p2 = (w.kernel_size for w in both)
    parts = tuple(length // w.kernel_size for length, w in zip(size, both, strict=True))

    def cut(t: Tensor) -> Tensor:  # B H W N D -> B*parts N P*P D
        if block:
            t = t.unflatten(2, (parts[1], p2)).unflatten(1, (parts[0], p)).permute(0, 1, 3, 5, 2, 4, 6)
        else:
            t = t.unflatten(2, (p2, parts[1])).unflatten(1, (p, parts[0])).permute(0, 2, 4, 5, 1, 3, 6)
        return t.flatten(4, 5).flatten(0, 2)

    def joined(t: Tensor, batch: int) -> Tensor:
        t = t.unflatten(0, (batch, *parts)).unflatten(4, (p, p2))  # B R Q N P P D
        t = t.permute(0, 1, 4, 2, 5, 3, 6) if block else t.permute(0, 4, 1, 5, 2, 3, 6)
        return t.flatten(3, 4).flatten(1, 2)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        mask = None if table is None else expand_table(table, Window(p), Window(p2), (p, p2)).flatten(1, 2)[None]
        return joined(attend(*map(cut, (q, k, v)), attn_mask=mask), q.shape[0])

    return call


def factored(layer: Layer, concatenate: bool) -> Function:
    """scaled_dot_product_attention on a map in one window, with a bias by embeddings of rows and columns times the
    query: as a dense mask, or as more channels of queries and keys (FlashBias, arXiv 2505.12044)."""
    size, depth = layer.shape[1:3], layer.shape[4]

    def call(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        sides = []
        for t, length, letter in zip((rows, columns), size, "hw", strict=True):
            at = torch.arange(length, device=t.device)
            near = t[at - at[:, None] + length - 1]  # by query, key, D
            sides.append(torch.einsum(f"bhwnd,{letter}kd->bnhwk", q, near).flatten(2, 3))
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        if concatenate:
            ones = [torch.eye(n, dtype=k.dtype, device=k.device) for n in size]
            places = torch.cat([ones[0].repeat_interleave(size[1], 0), ones[1].repeat(size[0], 1)], 1)
            q, k = torch.cat([q * depth**-0.5, *sides], -1), torch.cat([k, places.expand(*k.shape[:3], -1)], -1)
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            mask = (sides[0][..., None] + sides[1][..., None, :]).flatten(3)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).unflatten(1, size)

    return call
