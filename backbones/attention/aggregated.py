"""Aggregated attention: a neighborhood and a pooled map in one softmax (TransNeXt, MoH-ViT)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels import TensorCache, neighborhood_aggregate
from ...kernels.aggregate.api import neighborhood_logits
from ...kernels.cache import CONSTANTS
from ...kernels.checks import autocast_enabled
from ...kernels.tracing import is_dynamic, without_size_guards
from ..layers import average_pool, for_operators, fx_leaf, is_plain, linear, refuse_scripting
from .full import attend, in_chunks
from .maps import map_sizes, to_nchw

BIASES = 2**19  # position biases that are expanded at once, 2 MB in float32
KEPT = 2**23  # largest number of probabilities that are kept for the backward pass, 32 MB in float32


class AggregatedAttention2d(nn.Module):
    """Pixel-focused and aggregated attention (TransNeXt, arXiv:2311.17132, sections 3.1 to 3.3).

    One softmax over the cosine similarities to the 3x3 neighborhood and to an average-pooled map, each with a position
    bias, times a temperature and the logarithm of the number of keys. Then a learned linear function of the query is
    added to the weights of the neighborhood. With ``reduction`` 1, the keys are all positions of the map alone.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``.
        reduction: sides of the map, relative to the pooled one, whose sides are rounded down, but at least 1.
        base_size: of `LogPositionBias`.
        bias_size: likewise, in positions of this map.
        gates: a module from the input to factors of the heads' outputs, ``[B, H, W, heads]``, or None.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import AggregatedAttention2d
        >>> attention = AggregatedAttention2d(dim=48, num_heads=2, reduction=8, base_size=56)
        >>> attention(torch.randn(1, 28, 45, 48)).shape
        torch.Size([1, 28, 45, 48])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int,
        base_size: int,
        bias_size: int | None = None,
        gates: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.reduction = num_heads, reduction
        depth = dim // num_heads
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, depth).normal_(std=0.02))
        if reduction > 1:
            self.q = nn.Linear(dim, dim)
            self.kv = nn.Linear(dim, 2 * dim)  # of the map and of the pooled one
            self.sr = nn.Conv2d(dim, dim, 1)
            self.norm = nn.LayerNorm(dim)
            self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, 9).normal_(std=0.0004))
            self.learnable_tokens = nn.Parameter(torch.empty(num_heads, depth, 9).normal_(std=0.02))
            self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, 9))
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.cpb = LogPositionBias(num_heads, base_size, bias_size, reduction)
        self.gates = gates
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}, num_heads={self.num_heads}"

    @fx_leaf
    @without_size_guards
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        if self.reduction == 1:
            q, k, v = linear(self.qkv, x).unflatten(-1, (3, *heads)).unbind(3)
            q = _unit(q)
            y, _ = self._attend(q, k, v)
        else:
            q = _unit(linear(self.q, x).unflatten(-1, heads))
            k, v = linear(self.kv, x).unflatten(-1, (2, *heads)).unbind(3)
            pooled_k, pooled_v = self.kv(self._pool(x)).unflatten(-1, (2, *heads)).unbind(3)
            y, weights = self._attend(q, pooled_k, pooled_v, k)
            assert weights is not None  # of the neighbors, which are given
            learned = torch.einsum("bhwnd,ndk->bhwnk", q.to(v.dtype), self.learnable_tokens) + self.learnable_bias[:, 0]
            y = y + neighborhood_aggregate((weights + learned).to(v.dtype), v, kernel_size=3, boundary="zero")
        if self.gates is not None:
            y = y * self.gates(x)[..., None].to(y.dtype)
        return linear(self.proj, y.flatten(3))

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """Features of the pooled map, ``[B, h, w, dim]``."""
        _, H, W, _ = map_sizes(x)
        y = F.gelu(self.sr(to_nchw(x)))
        free = is_dynamic(H, W)
        size: Any = tuple((torch.sym_max if free else max)(1, length // self.reduction) for length in (H, W))
        exact = free or torch.jit.is_tracing()  # the older exporter knows fixed sizes alone
        y = average_pool(y, size) if exact else F.adaptive_avg_pool2d(y, size)
        return self.norm(y.permute(0, 2, 3, 1))

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, neighbors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output for unit queries ``[B, H, W, heads, D]`` on a map ``[B, h, w, heads, D]``, and the weights of the
        ``neighbors`` (keys) in the softmax, ``[B, H, W, heads, 9]``."""
        H, W = map_sizes(q[..., 0])[1:3]
        h, w = map_sizes(k[..., 0])[1:3]
        bias = self.cpb((H, W), (h, w), v)
        count, logits = torch.full((), h * w, dtype=q.dtype, device=q.device), None
        if neighbors is not None:
            inside = CONSTANTS.get(_inside_map, H, W, q.device)
            count = (count + inside.sum(-1))[..., None, None]
        temperature = F.softplus(self.temperature[:, 0].to(q.dtype)) * count.log()
        q = (q + self.query_embedding[:, 0]) * temperature
        if neighbors is None:
            return _attend_pooled(q.to(v.dtype), _unit(k).to(v.dtype), v, *bias)
        with without_autocast(q):  # logits of half precision are too coarse
            logits = neighborhood_logits(q, _unit(neighbors), kernel_size=3, boundary="zero")
        logits = (logits + self.relative_pos_bias_local).masked_fill(~inside[:, :, None], -math.inf)
        total = logits.logsumexp(-1)
        y, share = _attend_pooled(q.to(v.dtype), _unit(k).to(v.dtype), v, *bias, total)
        assert share is not None
        return y, (logits - total[..., None]).exp() * share[..., None]  # softmax is slow for 9 numbers


class LogPositionBias(nn.Module):
    """Position bias of keys that are means of a map: an MLP of the logarithm of their offset from the query
    (TransNeXt, arXiv:2311.17132, section 3.3).

    It is computed once for each offset between rows and between columns, in eval once for each size of the map.

    Args:
        num_heads: heads.
        base_size: side of the map in training, the unit of the offsets.
        bias_size: None: offsets count in maps of all sizes as in training. A side: the bias of a square map of this
            side is interpolated to others, as in the authors' detectors and segmenters.
        reduction: of `AggregatedAttention2d`, for the keys of this square map.
    """

    def __init__(self, num_heads: int, base_size: int, bias_size: int | None, reduction: int) -> None:
        super().__init__()
        self.base_size, self.bias_size, self.reduction = base_size, bias_size, reduction
        self.fc1 = nn.Linear(2, 512)
        self.fc2 = nn.Linear(512, num_heads)
        self.cache = TensorCache()

    def extra_repr(self) -> str:
        return f"base_size={self.base_size}, bias_size={self.bias_size}"

    def forward(
        self, size: tuple[int, int], pooled: tuple[int, int], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For a map of ``size`` (H, W) and its ``pooled`` one (h, w), on the device and in the dtype of ``like``: the
        bias of all row offsets ``[heads, offsets, W * w]``, and index and weight of these offsets by rows, ``[terms, H,
        h]`` each, for `_take_biases`."""
        layers, device = (self.fc1, self.fc2), like.device
        axes = list(zip(size, pooled, strict=True))
        square = None if self.bias_size is None else (self.bias_size, max(1, self.bias_size // self.reduction))
        maps = axes if square is None else [square, square]
        rows, columns = (_offsets(*each) for each in maps)
        if all(is_plain(layer) for layer in layers):
            source = torch.cat([p.flatten() for layer in layers for p in (layer.weight, layer.bias)])
            table = self.cache.get(_bias_table, self.fc2.out_features, rows, columns, self.base_size, source=source)
        else:
            y, x = (_log_offsets(each, self.base_size, device) for each in (rows, columns))
            grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).to(like.dtype)
            table = self.fc2(F.relu(self.fc1(grid))).permute(2, 0, 1)
        of_rows, of_columns = (
            CONSTANTS.get(_bias_terms, axis, square, offsets, device)
            for axis, offsets in zip(axes, (rows, columns), strict=True)
        )
        return _take_biases(table, 2, *of_columns), *of_rows


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _inside_map(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Whether the positions of the 3x3 neighborhoods are inside a map, ``[height, width, 9]``."""
    inside = []
    for length in (height, width):
        at = torch.arange(length, device=device)[:, None] + torch.arange(-1, 2, device=device)
        inside.append((at >= 0) & (at < length))
    return (inside[0][:, None, :, None] & inside[1][:, None, :]).flatten(2)


def _offsets(length: int, pooled: int) -> tuple[int, int, int]:
    """The offsets from the centres of adaptive pooling's bins to positions, as a range of half steps."""
    if is_dynamic(length):  # all that may occur: exporters fail on the division in the bounds
        return 2 - 2 * length, 2 * length - 1, 1
    first, last = -(-length // pooled) - 1, (pooled - 1) * length // pooled + length - 1  # twice the outer centres
    return -last, 2 * (length - 1) - first + 1, 1 if length % pooled else 2  # equal bins: every second half step


def _log_offsets(
    offsets: tuple[int, int, int], base_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    steps = torch.arange(*offsets, dtype=dtype, device=device) * (4 / max(1, base_size - 1))
    return steps.sign() * (1 + steps.abs()).log2() / 3


def _bias_table(
    source: torch.Tensor, heads: int, rows: tuple[int, int, int], columns: tuple[int, int, int], base_size: int
) -> torch.Tensor:
    """``[heads, row offsets, column offsets]`` by the parameters of both layers in a row, in float32 at least."""
    source = source.to(torch.promote_types(source.dtype, torch.float32))
    hidden = (source.shape[0] - heads) // (3 + heads)
    weight, bias, *second = source.split([2 * hidden, hidden, heads * hidden, heads])
    y, x = (_log_offsets(each, base_size, source.device, source.dtype)[:, None] for each in (rows, columns))
    y, x = y * weight[0::2], x * weight[1::2] + bias
    step = None if is_dynamic(*rows, *columns) else BIASES // (x.shape[0] * hidden)
    with without_autocast(source):
        return in_chunks(_bias_rows, step, (y[None],), x, second[0].view(heads, hidden), second[1])


def _bias_rows(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The second layer on sums of ``y`` ``[1, r, hidden]`` and ``x`` ``[columns, hidden]``, ``[heads, r, columns]``."""
    return F.linear((y[0, :, None] + x).relu_(), weight, bias).permute(2, 0, 1)


def _bias_terms(
    axis: tuple[int, int], square: tuple[int, int] | None, offsets: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index among the ``offsets``, and weight, of the terms of the bias of an axis (length L, pooled l), ``[terms, L,
    l]`` each: one, or the four between which that of a ``square`` map is interpolated, over its keys and queries."""
    length, pooled = axis if square is None else square
    number = torch.arange(pooled, device=device)
    start = torch.div(number * length, pooled, rounding_mode="floor")
    stop = torch.div((number + 1) * length + (pooled - 1), pooled, rounding_mode="floor")
    at = 2 * torch.arange(length, device=device)[:, None]
    index = torch.div(at - (start + stop - 1) - offsets[0], offsets[2], rounding_mode="floor")
    if square is None:
        return index[None], torch.ones_like(index[None], dtype=torch.float32)
    queries, keys = (_linear(source, target, device) for source, target in zip(square, axis, strict=True))
    terms = list(itertools.product(queries, keys))
    return (
        torch.stack([index[query][:, key] for (query, _), (key, _) in terms]),
        torch.stack([query[:, None] * key for (_, query), (_, key) in terms]),
    )


def _linear(source: int, target: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two positions, and their weights, of linear interpolation as in ``F.interpolate``, ``[target]`` each."""
    scale = torch.full((), source, dtype=torch.float32, device=device) / target
    at = ((torch.arange(target, device=device) + 0.5) * scale - 0.5).clamp(min=0)
    lower = at.floor().clamp(max=source - 1)
    weight = at - lower
    return [(lower.long(), 1 - weight), ((lower + 1).clamp(max=source - 1).long(), weight)]


def _take_biases(table: torch.Tensor, dim: int, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum of weighted terms ``[terms, L, l]`` of a table along ``dim``, which becomes ``L * l``."""
    parts = [table.index_select(dim, each.flatten()) for each in index.unbind()]
    if len(parts) == 1:
        return parts[0]
    shape = (-1, *[1] * (table.ndim - 1 - dim))
    weighted = [part * each.view(shape).to(part.dtype) for part, each in zip(parts, weight.flatten(1), strict=True)]
    return weighted[0] + weighted[1] + (weighted[2] + weighted[3])


@without_size_guards
def _attend_pooled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    columns: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    extra: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of ``[B, H, W, heads, D]`` to a pooled map ``[B, h, w, heads, D]``, without scaling, with a position
    bias from `LogPositionBias`.

    ``extra`` are the logits ``[B, H, W, heads]`` of one more key with value 0, whose weight is the second output.
    """
    if is_dynamic(*q.shape[1:3]):  # flattening a part of a tensor leaves guards on lengths of 1
        q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    inputs = q, k.flatten(1, 2), v.flatten(1, 2), columns, index, weight, extra
    if _chunkable(q, k, v, columns, *([] if extra is None else [extra])):
        return _PooledAttention.apply(*inputs)
    return _in_operators(*inputs)


def _in_operators(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    columns: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    extra: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """On keys ``[B, h * w, heads, D]``. The additional logit is a dot product, too, and its weight a channel of the
    output: of two channels for half precision, whose sum it is, and of others that are padding."""
    _, H, W, heads, depth = q.shape
    if extra is not None:
        more = 2 + -(depth + 2) % 8
        high = extra.to(q.dtype)
        q = F.pad(torch.cat([q, torch.stack([high, (extra - high).to(q.dtype)], -1)], -1), (0, more - 2))
        channel = torch.arange(depth + more, device=q.device) - depth
        zeros = F.pad(q[:, 0, :1, :, :0], (0, depth + more))  # the older ONNX exporter would record a batch of others
        k, v = (
            torch.cat([F.pad(x, (0, more)), zeros + ((channel >= 0) & (channel < ones))], 1)
            for x, ones in ((k, 2), (v, 1))
        )
    step = None if is_dynamic(H, W) else BIASES // (heads * W * k.shape[1])
    y = in_chunks(_attend_pooled_chunk, step, (q, index, weight), k, v, columns)
    return (y, None) if extra is None else (y[..., :depth], y[..., depth])


def _attend_pooled_chunk(
    q: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor:
    """Some rows of queries ``[B, r, W, heads, D]``."""
    bias = _chunk_bias(columns, index, weight, q.shape[2])
    bias = F.pad(bias, (0, k.shape[1] - bias.shape[2]))
    return attend(q.flatten(1, 2), k, v, bias, scale=1.0).unflatten(1, q.shape[1:3])


def _chunk_bias(columns: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
    """The bias of some rows of queries, ``[heads, r * W, h * w]``."""
    bias = _take_biases(columns, 1, index, weight)  # heads r*h W*w
    bias = bias.unflatten(1, index.shape[1:]).unflatten(3, (width, -1)).permute(0, 1, 3, 2, 4)
    if is_dynamic(index.shape[1], width):  # as above
        bias = bias.clone(memory_format=torch.contiguous_format)
    return bias.flatten(3).flatten(1, 2)


def _chunkable(*tensors: torch.Tensor) -> bool:
    """Whether `_PooledAttention` takes them: in eager mode on a CPU, in float32 or float64; or to count its products,
    without values."""
    exact = all(t.device.type in ("cpu", "meta") and t.dtype in (torch.float32, torch.float64) for t in tensors)
    return exact and not autocast_enabled(tensors[0]) and not for_operators(*tensors)


class _PooledAttention(torch.autograd.Function):
    """`_in_operators` in chunks that stay in the cache of a CPU, where PyTorch's fused attention has no gradient of the
    bias. More than `KEPT` probabilities are computed again in the backward pass.

    Inside, the rows of keys are in reverse order, in which the row offset grows with both rows, and ``extra`` is the
    logit of a last key of zeros, whose value is zeros, too."""

    @staticmethod
    def forward(ctx, q, k, v, columns, index, weight, extra):
        y, share = torch.empty_like(q), None if extra is None else torch.empty_like(extra)
        keys, values = (_keys_first(x, index, extra) for x in (k, v))
        keep, kept = any(ctx.needs_input_grad) and q[..., 0].numel() * k.shape[1] <= KEPT, []
        rooms: dict[str, torch.Tensor] = {}
        biases = _RowBiases(columns, index, weight, q.shape[2])
        for rows, parts in _chunks(q, k.shape[1]):
            bias = biases.of(rows)
            for images in parts:
                weights = _weights(q, keys, bias, extra, images, rows, rooms, keep)
                y[images, rows] = _heads_last(weights @ values[images], q)
                if share is not None:
                    share[images, rows] = _heads_last(weights[..., -1:], q)[..., 0]
                kept += [weights] * keep
        ctx.save_for_backward(q, k, v, columns, index, weight, extra, y, *kept)
        return y, share

    @staticmethod
    def backward(ctx, grad, grad_share):
        q, k, v, columns, index, weight, extra, y, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # for derivatives of higher order; aliases, as one input may depend on another
            inputs = [None if t is None else t.view_as(t) for t in (q, k, v, columns, index, weight, extra)]
            wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
            pairs = zip(_in_operators(*inputs), (grad, grad_share), strict=True)
            outputs, grads = zip(*((out, each) for out, each in pairs if out is not None), strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        keys, values = (_keys_first(x, index, extra) for x in (k, v))
        known, rooms = iter(kept), {}
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        biases = _RowBiases(columns, index, weight, q.shape[2])
        biases.grad = torch.zeros_like(biases.table)
        dextra = None if extra is None else torch.empty_like(extra)
        for rows, parts in _chunks(q, k.shape[1]):
            bias = None if kept else biases.of(rows)
            for images in parts:
                weights = next(known) if bias is None else _weights(q, keys, bias, extra, images, rows, rooms)
                outer = _heads_first(grad[images, rows])
                sums = (outer * _heads_first(y[images, rows])).sum(-1, keepdim=True)
                inner = _room(rooms, "inner", q, *weights.shape)
                torch.matmul(outer, values[images].transpose(-1, -2), out=inner)
                if dextra is not None:
                    upper = _heads_first(grad_share[images, rows][..., None])
                    inner[..., -1:] = upper
                    sums.addcmul_(weights[..., -1:], upper)
                inner.sub_(sums).mul_(weights)
                if dextra is not None:
                    dextra[images, rows] = _heads_last(inner[..., -1:], q)[..., 0]
                dv[images] += weights.transpose(-1, -2) @ outer
                dq[images, rows] = _heads_last(inner @ keys[images], q)
                dk[images] += inner.transpose(-1, -2) @ _heads_first(q[images, rows])
                biases.add_grad(inner[..., : k.shape[1]].unflatten(2, (-1, q.shape[2])), rows)
        dk, dv = (_reverse_rows(t[:, :, : k.shape[1]].transpose(1, 2), index) for t in (dk, dv))
        return dq, dk, dv, biases.grad_of_columns(), None, None, dextra


def _chunks(q: torch.Tensor, keys: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows, and for each of them parts of the batch, of about `BIASES` logits together."""
    batch, H, W, heads, _ = q.shape
    step = max(1, BIASES // (heads * W * keys))
    images = max(1, step // H)
    for first in range(0, H if batch else 0, step):
        parts = [slice(i, min(i + images, batch)) for i in range(0, batch, images)]
        yield slice(first, min(first + step, H)), parts


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """``[B, ..., heads, D]`` to ``[B, heads, N, D]``."""
    return x.flatten(1, -3).transpose(1, 2).contiguous()


def _heads_last(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``[b, heads, r * W, D]`` to ``[b, r, W, heads, D]``."""
    return x.transpose(1, 2).unflatten(1, (-1, q.shape[2]))


def _reverse_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Keys ``[B, h * w, heads, D]`` with the last row first."""
    return x.unflatten(1, (index.shape[2], -1)).flip(1).flatten(1, 2)


def _keys_first(x: torch.Tensor, index: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
    """Keys or values ``[B, h * w, heads, D]`` as ``[B, heads, h * w (+ 1), D]``."""
    x = _reverse_rows(x, index)
    return _heads_first(x if extra is None else torch.cat([x, torch.zeros_like(x[:, :1])], 1))


def _weights(
    q: torch.Tensor,
    keys: torch.Tensor,
    bias: list[torch.Tensor],
    extra: torch.Tensor | None,
    images: slice,
    rows: slice,
    rooms: dict[str, torch.Tensor],
    keep: bool = False,
) -> torch.Tensor:
    """The probabilities of a chunk, ``[b, heads, r * W, h * w (+ 1)]``; those of the next one take their memory, unless
    they are to ``keep``."""
    queries, keys = _heads_first(q[images, rows]), keys[images]
    logits = _room(rooms, "logits", q, *queries.shape[:3], keys.shape[2])
    for each, target in zip(bias, logits.unflatten(2, (-1, q.shape[2])).unbind(2), strict=True):
        target[..., : each.shape[2]] = each
    if extra is not None:
        logits[..., -1:] = _heads_first(extra[images, rows][..., None])
    flat = logits.flatten(0, 1)
    torch.baddbmm(flat, queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out=flat)
    return logits.softmax(-1) if keep else torch.softmax(logits, -1, out=logits)


def _room(rooms: dict[str, torch.Tensor], name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised memory that is taken again for each chunk: new memory costs several times the arithmetic on it."""
    count = math.prod(shape)
    if name not in rooms or rooms[name].numel() < count:
        rooms[name] = like.new_empty(count)
    return rooms[name][:count].view(shape)


class _RowBiases:
    """The bias of rows of queries, ``[heads, W, keys]`` each, from `LogPositionBias`, and its gradient.

    Where each row of queries, and of keys, is one number of offsets after the row before, offsets are grouped by their
    remainder of the latter: so the bias is a view of this table, with all keys of a query in a row."""

    grad: torch.Tensor

    def __init__(self, columns: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, width: int) -> None:
        self.columns, self.width = columns, width
        self.index, self.weight = index.flip(2), weight.flip(2)
        self.steps = _steps(self.index)
        self.table = columns
        if self.steps is not None:
            every = self.steps[2]
            x = F.pad(columns, (0, 0, 0, -columns.shape[1] % every)).unflatten(2, (width, -1)).unflatten(1, (-1, every))
            self.table = x.permute(0, 3, 2, 1, 4).contiguous()  # heads W every offsets w

    def _row(self, table: torch.Tensor, row: int) -> torch.Tensor:
        assert self.steps is not None
        first, step, every = self.steps
        start, group = divmod(first + row * step, every)
        part = table[:, :, group, start : start + self.index.shape[2]]
        return part.view(*part.shape[:2], -1)

    def of(self, rows: slice) -> list[torch.Tensor]:
        if self.steps is not None:
            return [self._row(self.table, row) for row in range(rows.start, rows.stop)]
        bias = _chunk_bias(self.columns, self.index[:, rows], self.weight[:, rows], self.width)
        return list(bias.unflatten(1, (-1, self.width)).unbind(1))

    def add_grad(self, grad: torch.Tensor, rows: slice) -> None:
        """Add that of some images, ``[b, heads, r, W, keys]``."""
        grad = grad.sum(0) if len(grad) > 1 else grad[0]
        if self.steps is not None:
            for row, each in zip(range(rows.start, rows.stop), grad.unbind(1), strict=True):
                self._row(self.grad, row).add_(each)
            return
        index, weight = self.index[:, rows], self.weight[:, rows]
        grad = grad.unflatten(3, (index.shape[2], -1)).transpose(2, 3).flatten(3).flatten(1, 2)
        for at, factor in zip(index.flatten(1), weight.flatten(1), strict=True):
            self.grad.index_add_(1, at, grad * factor[:, None].to(grad.dtype) if len(index) > 1 else grad)

    def grad_of_columns(self) -> torch.Tensor:
        if self.steps is None:
            return self.grad
        x = self.grad.permute(0, 3, 2, 1, 4).flatten(3).flatten(1, 2)
        return x[:, : self.columns.shape[1]]


def _steps(index: torch.Tensor) -> tuple[int, int, int] | None:
    """The first of the offsets ``[1, H, h]``, and the steps to those of the next row and of the next key, or None where
    they differ or are interpolated."""
    if len(index) > 1 or index.is_meta or not index.numel():
        return None
    numbers = index[0]
    first = int(numbers[0, 0])
    down, along = (int(each[1]) - first if len(each) > 1 else 1 for each in (numbers[:, 0], numbers[0]))
    rows, keys = (torch.arange(length, device=index.device) for length in numbers.shape)
    even = min(down, along) > 0 and torch.equal(numbers, first + rows[:, None] * down + keys * along)
    return (first, down, along) if even else None
