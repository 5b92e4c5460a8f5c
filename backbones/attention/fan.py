"""Attention of FAN and TAP-FAN: among tokens, among channels, and to a class token (arXiv:2204.12451, 2303.11126)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn

from ...kernels.tracing import without_size_guards
from ..layers import Mlp, depthwise_conv, fx_leaf, linear
from .aggregated import without_autocast
from .full import attend
from .maps import to_nchw, to_nhwc


class TokenMixing2d(nn.Module):
    """Multi-head attention over the whole map, without position bias.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``.
    """

    collected: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # a list collects the queries and keys

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        q, kv = linear(self.q, x), linear(self.kv, x)
        if self.collected is not None:
            self.collected.append((q, kv[..., : q.shape[-1]]))
        return linear(self.proj, _mix_tokens(q, kv, self.num_heads))

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The attention ``[B, heads, N, N]`` of queries and keys ``[B, H, W, dim]``, as collected, in float32 at
        least."""
        q, k = (t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k))
        q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
        with without_autocast(q):
            return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)


@without_size_guards
def _mix_tokens(q: torch.Tensor, kv: torch.Tensor, num_heads: int) -> torch.Tensor:
    k, v = kv.flatten(1, 2).unflatten(-1, (2, num_heads, -1)).unbind(2)
    queries = q.flatten(1, 2).unflatten(-1, (num_heads, -1))
    return attend(queries, k, v).flatten(2).unflatten(1, q.shape[1:3])


class ConvMlp(nn.Module):
    """MLP with two 3x3 depthwise convolutions, GELU and BatchNorm between, and their scaled residual in place of the
    activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv1 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = linear(self.fc1, x)
        y = self.conv2(self.bn(F.gelu(self.conv1(to_nchw(x)))))
        return linear(self.fc2, x + self.gamma * to_nhwc(y))


class ChannelMixing2d(nn.Module):
    """Gates of the channels by the whole map, times an MLP of it (FAN, arXiv:2204.12451, section 3.2).

    A channel's gate is the sigmoid of the product, over all tokens, of its query and the mean key of its head, each a
    softmax over the tokens. The product is near 1 / tokens, so all gates are near a half.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``.
        mlp_ratio: hidden channels of the MLP, relative to ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.q = nn.Linear(dim, dim)
        self.mlp_v = ConvMlp(dim, int(dim * mlp_ratio))
        self.norm_v = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        gate = channel_gates(linear(self.q, x), x, self.temperature)
        return gate * self.norm_v(self.mlp_v(x))


@fx_leaf
@without_size_guards
def channel_gates(q: torch.Tensor, k: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Gates ``[B, 1, 1, C]`` of queries and keys ``[B, H, W, C]``, for a ``temperature`` ``[heads, 1, 1]``."""
    q, k = (t.flatten(1, 2).softmax(1).unflatten(-1, (temperature.shape[0], -1)) for t in (q, k))
    gate = (q * k.mean(-1, keepdim=True)).sum(1).sigmoid() * temperature[:, :, 0].to(q.dtype)
    return gate.flatten(1)[:, None, None]


class TokenAwarePooling2d(nn.Module):
    """Token-aware average pooling: means of neighborhoods, weighted for each token by a softmax over their scales (TAP,
    arXiv:2303.11126, section 4.1).

    Scale 0 is the token itself, scale s the mean of the 3x3 neighbors that are s apart. Outside the map is 0, which
    counts in the mean.

    Args:
        dim: channels.
        num_scales: scales.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import TokenAwarePooling2d
        >>> TokenAwarePooling2d(dim=64)(torch.randn(2, 14, 20, 64)).shape
        torch.Size([2, 14, 20, 64])
    """

    def __init__(self, dim: int, num_scales: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.proj = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_scales),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False),
        )

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights of the scales, ``[B, scales, H, W]``, for a map ``[B, dim, H, W]``."""
        return self.proj(x).softmax(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        y = to_nchw(x)
        return to_nhwc(weighted_means(y, self.weights(y), self.dim))


@fx_leaf
def weighted_means(x: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    """``x`` ``[B, dim, H, W]`` and its means over 3x3 neighbors at dilations 1, 2 ..., summed with ``weights`` ``[B,
    scales, H, W]``."""
    weights = weights.to(x.dtype)
    kernel = torch.full((dim, 1, 3, 3), 1 / 9, dtype=x.dtype, device=x.device)
    y = x * weights[:, :1]
    for scale in range(1, weights.shape[1]):
        y = y + depthwise_conv(x, kernel, None, scale) * weights[:, scale : scale + 1]
    return y


class ClassAttentionPool(nn.Module):
    """A class token that attends to itself and all patch tokens, which only the norms change.

    Args:
        dim: channels.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the MLP, relative to ``dim``.
        layer_scale: initial value of LayerScale.
        depth: blocks.
    """

    cls_token: nn.Parameter | None

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float, depth: int = 2) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.blocks = nn.ModuleList(ClassAttentionBlock(dim, num_heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.map = nn.Identity()  # a module that has the map as its output

    def drop_class_token(self, whole: bool = False) -> None:
        """Keep the norms of the patch tokens alone, or with ``whole`` nothing."""
        blocks: Any = self.blocks
        self.cls_token = None
        for block in blocks:
            block.attn = block.mlp = block.gamma2 = None
        if whole:
            del blocks[:]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """A map ``[B, H, W, dim]`` to the class token ``[B, 1, dim]``, unless it was dropped, and a map."""
        token = None
        if self.cls_token is not None:
            token = self.cls_token.repeat(x.shape[0], 1, 1)  # no view, which hooks take for a leaf
        for block in self.blocks:
            token, x = block(token, x)
        return token, self.map(x)


class ClassAttentionBlock(nn.Module):
    """Attention and MLP of a class token, pre-norm with LayerScale; a model without the token has neither."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn: ClassAttention | None = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp: Mlp | None = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma2: nn.Parameter | None = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, token: torch.Tensor | None, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """``[B, 1, dim]`` or None, and the map ``[B, H, W, dim]``, to both after the block."""
        y = self.norm1(x)
        if token is not None:
            assert self.attn is not None and self.mlp is not None
            given = self.norm1(token)
            token = self.norm2(token + self.gamma1 * self.attn(given, torch.cat([given, flat(y)], 1)))
            token = token + self.gamma2 * self.mlp(token)
        return token, 2 * self.norm2(x + self.gamma1 * y)  # doubled, as published


class ClassAttention(nn.Module):
    """Multi-head attention of one query, with a Linear each for q, k and v."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``[B, 1, dim]`` and ``[B, N, dim]`` to ``[B, 1, dim]``."""
        q, k, v = linear(self.q, token), linear(self.k, x), linear(self.v, x)
        return linear(self.proj, _by_heads(q, k, v, self.num_heads))


@fx_leaf
@without_size_guards
def _by_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))
    return attend(q, k, v).flatten(2)


@fx_leaf
@without_size_guards
def flat(x: torch.Tensor) -> torch.Tensor:
    """``[B, H, W, C]`` as ``[B, H * W, C]``."""
    return x.flatten(1, 2)


class FourierPosition(nn.Module):
    """Position code of any map: sines and cosines of rows and columns as fractions of the map, projected (as XCiT's,
    arXiv:2106.09681).

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * FREQUENCIES, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, dim, H, W]`` with its code added."""
        return x + self.token_projection(position_code(x))


FREQUENCIES = 32  # of sines and cosines, for each axis


@fx_leaf
def position_code(x: torch.Tensor) -> torch.Tensor:
    """``[1, 2 * FREQUENCIES, H, W]`` for a map ``x`` ``[B, C, H, W]``, in its dtype."""
    height, width = x.shape[2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (_axis_code(length, wide, x.device) for length in (height, width))
    code = [rows[:, :, None].expand(-1, -1, width), columns[:, None].expand(-1, height, -1)]
    return torch.cat(code)[None].to(x.dtype)


def _axis_code(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    at = torch.arange(1, length + 1, dtype=dtype, device=device)
    at = at / (at[-1:] + 1e-6) * (2 * math.pi)
    pair = torch.arange(FREQUENCIES // 2, dtype=dtype, device=device) * (2 / FREQUENCIES)
    angle = at / 10000 ** pair[:, None]
    return torch.stack([angle.sin(), angle.cos()], 1).flatten(0, 1)


def attention_diversification_loss(maps: Sequence[torch.Tensor], threshold: float = 2.0) -> torch.Tensor:
    """The mean similarity of the attention of single tokens to the mean attention (ADL, arXiv:2303.11126, section 4.2).

    Attention is averaged over the heads, and weights of at most ``threshold`` times the uniform weight 1 / N count as
    0. The similarity is the cosine.

    Args:
        maps: attention ``[B, heads, N, N]`` of each block, a softmax over the last axis.
        threshold: see above.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import attention_diversification_loss
        >>> attention_diversification_loss([torch.eye(4).expand(1, 2, 4, 4)])  # all tokens attend to others
        tensor(0.)
    """
    losses = []
    for each in maps:
        each = each.mean(1)
        mean, least = each.mean(1, keepdim=True), threshold / each.shape[-1]
        each, mean = (t.masked_fill(t <= least, 0) for t in (each, mean))
        losses.append(F.cosine_similarity(mean, each, dim=-1).mean())
    return torch.stack(losses).sum() / (len(losses) + 1e-6)
