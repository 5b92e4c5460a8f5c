"""Attention modules over feature maps, channels-last. The only file of this folder that calls the kernels.

Layout: x is ``[B, H, W, C]``; q, k and v are ``[B, H, W, heads, D]`` with ``C = heads * D``.
"""

from __future__ import annotations

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import nn

from ..kernels import TableBias, neighborhood_attention


class NeighborhoodAttention2d(nn.Module):
    """Multi-head neighborhood attention with relative position bias (NAT, arXiv:2204.07143, section 3.1; the dilation:
    DiNAT, arXiv:2209.15001, section 3.1).

    Each query attends to the ``kernel_size`` window around it, shifted inside the map at the borders. A map smaller
    than ``kernel_size * dilation`` is enlarged to it at the right and the bottom, and the output is cropped: the
    added positions are zeros at the input of the qkv projection, so that their q, k and v are its bias. They are
    attended to like any other, and the published checkpoints were trained so.

    A ``kernel_size`` equal to the map gives plain attention with a relative position bias.

    Args:
        dim: channels C.
        num_heads: heads; must divide ``dim``.
        kernel_size: window, an int or (rows, columns), in positions of the (dilated) map.
        dilation: distance between neighboring window positions, or ``"auto"``: the largest that fits the map at hand,
            ``max(1, min(H // rows, W // columns))``, chosen at every forward.
        qkv_bias: learn a bias in the qkv projection.
        rel_pos_bias: learn ``rpb``, the ``[heads, 2 * rows - 1, 2 * columns - 1]`` table that is added to the logits
            by the offset (in dilated steps) from query to key.
        attn_drop: dropout probability on the attention weights.
        proj_drop: dropout probability on the output.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int],
        dilation: int | str = 1,
        *,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        rows, columns = self.kernel_size = to_2tuple(kernel_size)
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        if min(rows, columns) < 1:
            raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
        if dilation != "auto" and (not isinstance(dilation, int) or dilation < 1):
            raise ValueError(f'dilation must be an int of at least 1 or "auto", got {dilation!r}')
        self.dilation = dilation
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * rows - 1, 2 * columns - 1))
            trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, num_heads={self.num_heads}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, C]`` to the same shape, for any H and W."""
        B, H, W, C = x.shape
        rows, columns = self.kernel_size
        dilation = max(1, min(H // rows, W // columns)) if self.dilation == "auto" else self.dilation

        qkv = self.qkv(x)
        bottom, right = max(0, rows * dilation - H), max(0, columns * dilation - W)
        if bottom or right:
            qkv = self._enlarge(qkv, bottom, right)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        x = neighborhood_attention(
            q,
            k,
            v,
            kernel_size=self.kernel_size,
            dilation=dilation,
            bias=None if self.rpb is None else TableBias(self.rpb),
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        if bottom or right:
            x = x[:, :H, :W]
        return self.proj_drop(self.proj(x.reshape(B, H, W, C)))

    def _enlarge(self, qkv: torch.Tensor, bottom: int, right: int) -> torch.Tensor:
        """Append what the projection answers to zeros, its bias, instead of projecting zeros."""
        B, H, W, C = qkv.shape
        fill = qkv.new_zeros(C) if self.qkv.bias is None else self.qkv.bias.to(qkv.dtype)
        if right:
            qkv = torch.cat([qkv, fill.expand(B, H, right, C)], dim=2)
        if bottom:
            qkv = torch.cat([qkv, fill.expand(B, bottom, W + right, C)], dim=1)
        return qkv
