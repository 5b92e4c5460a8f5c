"""Attention inside stripes of rows and of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.tracing import is_dynamic
from .full import SoftmaxAttention2d, attend
from .maps import DepthwiseConv, map_sizes

ROWS, COLUMNS = 1, 2  # dimensions of a map


class CrossShapedAttention2d(SoftmaxAttention2d):
    """Attention inside cross-shaped windows (CSWin, arXiv:2107.00652, section 3): of one half of the heads inside
    stripes of columns, of the other inside stripes of rows.

    A 3x3 depthwise convolution of the values is added, zero-padded at the borders of a stripe, too. Stripes begin at
    the top left; the last one ends where the map does.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``, and be even for stripes.
        stripe_width: columns, or rows, of a stripe; None: all heads attend to the whole map.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import CrossShapedAttention2d
        >>> attention = CrossShapedAttention2d(dim=64, num_heads=2, stripe_width=7)
        >>> attention(torch.randn(1, 16, 20, 64)).shape
        torch.Size([1, 16, 20, 64])
    """

    def __init__(self, dim: int, num_heads: int, stripe_width: int | None) -> None:
        super().__init__(dim, num_heads)
        if stripe_width is not None and stripe_width < 1:
            raise ValueError(f"stripe_width must be at least 1, got {stripe_width}")
        if stripe_width is not None and num_heads % 2:
            raise ValueError(f"stripes of {stripe_width} need an even number of heads, got num_heads {num_heads}")
        self.stripe_width = stripe_width
        parts = 1 if stripe_width is None else 2
        self.lepe = nn.ModuleList(DepthwiseConv(dim // parts, 3) for _ in range(parts))

    def extra_repr(self) -> str:
        return f"stripe_width={self.stripe_width}, num_heads={self.num_heads}"

    def _mix(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: tuple[int, int], source: torch.Tensor
    ) -> torch.Tensor:
        if self.stripe_width is None:
            local = self.lepe[0](self._to_map(v, size))
            return super()._mix(q, k, v, size, source) + self._to_tokens(local)
        halves = zip(*(self._to_map(t, size).chunk(2, -1) for t in (q, k, v)), strict=True)
        columns, rows = halves
        parts = self._in_stripes(columns, COLUMNS, self.lepe[0]), self._in_stripes(rows, ROWS, self.lepe[1])
        return self._to_tokens(torch.cat(parts, -1))

    def _in_stripes(self, maps: Sequence[torch.Tensor], axis: int, lepe: nn.Module) -> torch.Tensor:
        """The output for half of the channels of q, k and v, ``[B, H, W, C / 2]``."""
        length, width, mask = map_sizes(maps[0])[axis], self.stripe_width, None
        assert width is not None
        if is_dynamic(length):  # the last stripe is padded and masked
            count = (length + width - 1) // width
            after = count * width - length
            maps = [F.pad(t, (0, 0, 0, after) if axis == COLUMNS else (0, 0, 0, 0, 0, after)) for t in maps]
        elif length > width and (rest := length % width):  # the last stripe is narrower
            split = zip(*(t.split((length - rest, rest), axis) for t in maps), strict=True)
            return torch.cat([self._in_stripes(part, axis, lepe) for part in split], axis)
        else:
            count, width = max(1, length // width), min(width, length)
        batch = -1 if torch.jit.is_tracing() else maps[0].shape[0]  # which torch.jit.trace would record
        q, k, v = (t.unflatten(axis, (count, width)).movedim(axis, 1) for t in maps)  # B n h w C/2
        if is_dynamic(length):
            q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
            mask = _outside(length, q, axis)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        tokens = (t.flatten(1, 2).unflatten(-1, (self.num_heads // 2, -1)) for t in (q, k, v))
        y = attend(*tokens, mask=mask).flatten(2).unflatten(1, v.shape[1:3]) + lepe(v)
        y = y.unflatten(0, (batch, count)).movedim(1, axis)
        if not is_dynamic(length):
            return y.flatten(axis, axis + 1)
        y = y.clone(memory_format=torch.contiguous_format).flatten(axis, axis + 1)
        return y.index_select(axis, torch.arange(length, device=y.device))


def _outside(length: int, stripes: torch.Tensor, axis: int) -> torch.Tensor:
    """A mask of the keys outside a map whose ``axis`` has ``length`` positions, for stripes ``[B, n, h, w, C]``: ``[B *
    n, 1, 1, h * w]``."""
    B, count, height, width, _ = stripes.shape
    along = width if axis == COLUMNS else height
    outside = torch.arange(count * along, device=stripes.device) >= length
    outside = outside.unflatten(0, (count, 1, along) if axis == COLUMNS else (count, along, 1))
    mask = torch.zeros(1, 1, 1, 1, device=stripes.device).masked_fill(outside, -math.inf)
    return mask.expand(B, count, height, width).flatten(2).flatten(0, 1)[:, None, None]
