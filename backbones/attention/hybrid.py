"""Hybrid-scale and guided attention (SG-Former)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.tracing import is_dynamic, without_size_guards
from ..layers import fx_leaf, linear
from .full import attend
from .maps import DepthwiseConv, map_sizes, to_nchw, to_nhwc
from .super_token import _from_cells, _padded, _to_cells

_PARTS = {2: ((0, 1, 2), (1, 2, 2)), 3: ((0, 1, 4), (1, 3, 4), (3, 4, 4))}  # first, last, of how many


class LocallyEnhancedAttention2d(nn.Module):
    """Base of SG-Former's attentions, which add a 3x3 depthwise convolution of their input and project the sum.

    ``forward`` takes a map ``[B, H, W, dim]`` and the significance of its positions, ``[B, H, W]`` or None, and returns
    both.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.lepe_linear = nn.Linear(dim, dim)
        self.lepe_conv = DepthwiseConv(dim, 3)
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def _projected(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The sum of the heads' outputs ``y`` and the convolution of ``x``, both ``[B, H, W, dim]``."""
        return linear(self.proj, y + self.lepe_conv(linear(self.lepe_linear, x)))


class SelfAttention2d(LocallyEnhancedAttention2d):
    """Attention over the whole map, without position bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)

    @fx_leaf
    def forward(self, x: torch.Tensor, significance: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        q = linear(self.q, x).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        k, v = linear(self.kv, x).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self._projected(attend(q, k, v).flatten(2).unflatten(1, x.shape[1:3]), x), None


class HybridAttention2d(LocallyEnhancedAttention2d):
    """Attention to a map that is reduced by a strided convolution in the first half of the heads, inside windows in the
    second half (SG-Former, arXiv:2308.12216, section 3.2).

    The significance of a position is the attention that it receives on average over heads and queries: in its window,
    plus on the reduced map. It has no gradient and is float32 or wider. At the right and the bottom, the convolution
    takes zeros as positions outside the map; windows are cut off.

    Args:
        dim: channels.
        num_heads: heads, an even number that divides ``dim``.
        ratio: kernel size and stride of the reduction.
        window_size: rows and columns of a window.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import HybridAttention2d
        >>> attention = HybridAttention2d(dim=64, num_heads=2, ratio=8)
        >>> y, significance = attention(torch.randn(1, 56, 60, 64))
        >>> y.shape, significance.shape
        (torch.Size([1, 56, 60, 64]), torch.Size([1, 56, 60]))
    """

    def __init__(self, dim: int, num_heads: int, ratio: int, window_size: int = 7) -> None:
        super().__init__(dim, num_heads)
        if num_heads % 2:
            raise ValueError(f"num_heads must be even, got {num_heads}")
        self.ratio, self.window_size = ratio, window_size
        self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim)
        self.q1 = nn.Linear(dim, dim // 2)
        self.kv1 = nn.Linear(dim, dim)
        self.q2 = nn.Linear(dim, dim // 2)
        self.kv2 = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}, window_size={self.window_size}"

    @fx_leaf
    @without_size_guards
    def forward(self, x: torch.Tensor, significance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        coarse, of_reduced = self._reduced(x)
        fine, of_windows = self._windows(x)
        return self._projected(torch.cat([coarse, fine], -1), x), of_reduced + of_windows

    def _reduced(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (H, W), heads = map_sizes(x)[1:3], self.num_heads // 2
        reduced = to_nhwc(self.sr(to_nchw(_padded(x, self.ratio))))
        size = reduced.shape[1:3]
        reduced = linear(self.kv1, F.gelu(self.norm(reduced.flatten(1, 2))))
        k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in reduced.chunk(2, -1))
        y, received = _weighed(linear(self.q1, x).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2), k, v)
        row, column = (torch.arange(length, device=x.device) // self.ratio for length in (H, W))
        received = received.unflatten(1, size).index_select(1, row).index_select(2, column)
        return y.transpose(1, 2).flatten(2).unflatten(1, (H, W)), received

    def _windows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (H, W), heads, size = map_sizes(x)[1:3], self.num_heads // 2, self.window_size
        qkv = _to_cells(torch.cat([linear(self.q2, x), linear(self.kv2, x)], -1), size)
        q, k, v = qkv.unflatten(-1, (3 * heads, -1)).transpose(3, 4).chunk(3, 3)
        padded = is_dynamic(H, W) or H % size or W % size
        inside = _to_cells(x.new_ones(1, H, W, 1), size)[:, :, :, None] if padded else None
        y, received = _weighed(q, k, v, inside)
        y, received = (_from_cells(t, size, (H, W)) for t in (y.transpose(3, 4).flatten(4), received[..., None]))
        return y, received.squeeze(-1)


def _weighed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inside: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``[..., heads, N, D]`` to ``[..., heads, M, D]``, and the mean of the weights of each key over heads
    and queries, ``[..., M]``. With padding, ``inside`` ``[..., 1, N, 1]`` is 0 there and 1 elsewhere, and N = M."""
    k = k.transpose(-1, -2)
    if is_dynamic(*k.shape):  # contiguous tensors, for others of which exporters guard on a single key
        k, v = (t.clone(memory_format=torch.contiguous_format) for t in (k, v))
    logits = (q * q.shape[-1] ** -0.5) @ k
    if inside is not None:
        logits = logits.masked_fill(inside.transpose(-1, -2) == 0, -torch.inf)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    y, weights = weights.to(v.dtype) @ v, weights.detach()
    if inside is None:
        return y, weights.mean((-3, -2))
    return y, (weights * inside).sum((-3, -2)) / (inside.sum((-3, -2)) * q.shape[-3])


class GuidedAttention2d(LocallyEnhancedAttention2d):
    """Attention to tokens that are merged from positions of similar significance (SG-Former, arXiv:2308.12216, section
    3.3).

    Args:
        dim: channels.
        num_heads: heads, an even number that divides ``dim``. The two halves have keys and values of their own.
        lengths: how many positions are merged to a token, the least significant first: three numbers, for the first
            quarter, the half in the middle and the last quarter of the positions, or two, for a half each.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import GuidedAttention2d
        >>> attention = GuidedAttention2d(dim=64, num_heads=2, lengths=(196, 56, 28))
        >>> y, _ = attention(torch.randn(1, 56, 60, 64), torch.rand(1, 56, 60))
        >>> y.shape
        torch.Size([1, 56, 60, 64])
    """

    def __init__(self, dim: int, num_heads: int, lengths: Sequence[int]) -> None:
        super().__init__(dim, num_heads)
        if num_heads % 2:
            raise ValueError(f"num_heads must be even, got {num_heads}")
        if len(lengths) not in _PARTS:
            raise ValueError(f"lengths must be two or three numbers, got {lengths}")
        self.lengths = tuple(lengths)
        self.merge = nn.ModuleList(nn.Linear(length, 1) for length in lengths)
        self.q = nn.Linear(dim, dim)
        self.kv1 = nn.Linear(dim, dim)
        self.kv2 = nn.Linear(dim, dim)

    @fx_leaf
    @without_size_guards
    def forward(self, x: torch.Tensor, significance: torch.Tensor) -> tuple[torch.Tensor, None]:
        tokens = self._merged(x.flatten(1, 2), significance.flatten(1).argsort(1))
        # the authors make the tokens for kv2 of a map in column order, which is the same order by significance
        k, v = torch.stack([linear(self.kv1, tokens), linear(self.kv2, tokens)], 2).chunk(2, -1)
        k, v = (each.unflatten(-1, (self.num_heads // 2, -1)).flatten(2, 3) for each in (k, v))
        q = linear(self.q, x).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        return self._projected(attend(q, k, v).flatten(2).unflatten(1, x.shape[1:3]), x), None

    def _merged(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Positions ``[B, N, C]``, and their numbers by significance ``[B, N]``, to tokens ``[B, M, C]``."""
        tokens = []
        for part, length, layer in zip(_PARTS[len(self.lengths)], self.lengths, self.merge, strict=True):
            chosen = order[:, merge_ranks(order.shape[1], part, length, order.device)]
            group = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))
            group = group.unflatten(1, (group.shape[1] // length, length))
            tokens.append(layer(group.transpose(2, 3)).squeeze(-1))
        return torch.cat(tokens, 1)


def merge_ranks(count: int, part: tuple[int, int, int], length: int, device: torch.device) -> torch.Tensor:
    """The ranks to merge, ``[groups * length]``, of a part of ``count`` positions.

    Ranks are evenly spread over as many groups as the part needs: where it does not fill them, some occur twice.

    Args:
        count: positions.
        part: (first, last, whole): from ``first / whole`` of the positions to ``last / whole``, rounded outwards.
        length: ranks of a group.
        device: of the result.
    """
    first, last = count * part[0] // part[2], (count * part[1] + part[2] - 1) // part[2]
    total = (last - first + length - 1) // length * length
    at, excess = torch.arange(total, device=device), total - (last - first)
    # first + at * (last - first) // total without large products, which OpenVINO computes in 32 bits
    return first + at - torch.div(at * excess + (total - 1), total, rounding_mode="floor")
