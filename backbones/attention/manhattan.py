"""Attention with a decay by Manhattan distance (RMT)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ...kernels.cache import CONSTANTS
from ...kernels.tracing import is_dynamic, without_size_guards
from ..layers import fx_leaf, linear
from .full import attend, in_chunks
from .maps import DepthwiseConv

MASK_ENTRIES = 2**23  # of a decay mask that is made at once, 32 MB in float32


class ManhattanAttention2d(nn.Module):
    """Manhattan self-attention (RMT, arXiv:2309.11523, section 3), with a 5x5 depthwise convolution of the values.

    Head h adds ``log(1 - 2^(-initial_value - heads_range * h / num_heads))`` to the logits for every step of distance.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``, into heads of an even number of channels.
        axes: ``"both"`` or ``"each"``, see `decayed_attention`.
        initial_value: the larger, the slower the decay of all heads.
        heads_range: the larger, the slower the decay of the last heads.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import ManhattanAttention2d
        >>> attention = ManhattanAttention2d(dim=64, num_heads=4, axes="each")
        >>> attention(torch.randn(1, 14, 20, 64)).shape
        torch.Size([1, 14, 20, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, axes: str, initial_value: float = 2.0, heads_range: float = 4.0
    ) -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"dim {dim} is not divisible by twice the num_heads {num_heads}")
        if axes not in ("both", "each"):
            raise ValueError(f'axes must be "both" or "each", got {axes!r}')
        self.num_heads = num_heads
        self.axes = axes
        # not a buffer: half precision would round it
        power = -initial_value - heads_range * np.arange(num_heads, dtype=np.float32) / num_heads
        self.decay: tuple[float, ...] = tuple(np.log(1 - np.exp2(power, dtype=np.float32)).tolist())
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.lepe = DepthwiseConv(dim, 5)
        self.out_proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"axes={self.axes}, num_heads={self.num_heads}, decay={self.decay[0]:.3f} to {self.decay[-1]:.3f}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        v = linear(self.v_proj, x)
        q, k, values = (
            t.unflatten(-1, (self.num_heads, -1)) for t in (linear(self.q_proj, x), linear(self.k_proj, x), v)
        )
        y = decayed_attention(rotate_by_index(q), rotate_by_index(k), values, self.decay, self.axes)
        return linear(self.out_proj, y.flatten(3) + self.lepe(v))


@without_size_guards
def rotate_by_index(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``x`` ``[B, H, W, heads, D]`` by the row-major index of a position in its map (RMT).

    The pair of channels (2i, 2i + 1) turns by ``index * 10000^(-i / (D / 2 - 1))``: the last pair by 1/10000 of the
    index. So it depends on the width of the map. Computed in float32 for every dtype: half precision has no exact
    integers above 2048 (bfloat16: 256).
    """
    H, W = x.shape[1:3]
    cos, sin = CONSTANTS.get(_rotation, H, W, x.shape[-1], x.device)
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, 2).unflatten(-1, (-1, 2))  # Core ML: rank 5
    even, odd = pairs.unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return pairs.flatten(-2).unflatten(1, (H, W)).to(x.dtype)


def _rotation(height: int, width: int, depth: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``[height * width, 1, depth / 2]``, rounded as in the authors' code."""
    index = torch.arange(height * width, device=device).float()
    speed = 1.0 / 10000 ** torch.linspace(0, 1, depth // 2, device=device)
    angle = (index[:, None] * speed)[:, None]
    return angle.cos(), angle.sin()


@without_size_guards
def decayed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: Sequence[float], axes: str
) -> torch.Tensor:
    """Attention whose logits decrease linearly with the distance from query to key (RMT, arXiv 2309.11523, section 3).

    Equals `neighborhood_attention` with the whole axis or map as window and ``decay * distance`` as bias, but runs on
    PyTorch's ``scaled_dot_product_attention``, since tiles do not help with such windows. On large maps, queries are
    processed in chunks of rows, whose masks have at most `MASK_ENTRIES` values and are recomputed in the backward pass;
    exports of a dynamic shape use a single chunk.

    Args:
        q, k, v: ``[B, H, W, heads, D]``.
        decay: added to the logits per step of distance, for each head; negative.
        axes: ``"both"``: attention to the whole map, with the Manhattan distance. ``"each"``: along rows, then along
            columns with the first output as values.

    Returns:
        ``[B, H, W, heads, D]``.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import decayed_attention
        >>> q = torch.randn(1, 14, 20, 2, 32)
        >>> decayed_attention(q, q, q, decay=(-0.3, -0.1), axes="each").shape
        torch.Size([1, 14, 20, 2, 32])
    """
    H, W = q.shape[1:3]
    decay = tuple(decay)
    rows, columns = (CONSTANTS.get(_decay_mask, length, decay, q.device) for length in (H, W))
    if axes == "each":
        batch = -1 if torch.jit.is_tracing() else q.shape[0]  # which torch.jit.trace would record
        v = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), columns).unflatten(0, (batch, H))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), rows).unflatten(0, (batch, W)).transpose(1, 2)
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    step = None if is_dynamic(H, W) else MASK_ENTRIES // (len(decay) * H * W * W)
    return in_chunks(_attend_chunk, step, (q, rows), k, v, columns)


def _decay_mask(length: int, decay: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """``decay * |i - j|`` ``[heads, length, length]`` in float32."""
    at = torch.arange(length, device=device)
    return torch.tensor(decay, device=device)[:, None, None] * (at[:, None] - at).abs()


def _attend_chunk(
    q: torch.Tensor, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Some rows of queries ``[B, h, W, heads, D]`` on all keys ``[B, H * W, heads, D]``. ``rows`` ``[heads, h, H]`` and
    ``columns`` ``[heads, W, W]`` are added to the logits."""
    mask = rows[:, :, None, :, None] + columns[:, None, :, None]
    return attend(q.flatten(1, 2), k, v, mask.flatten(3).flatten(1, 2)).unflatten(1, q.shape[1:3])
