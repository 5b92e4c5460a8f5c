"""Neighborhood attention with a projection (NAT, DiNAT)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import nn

from ...kernels import RelativePositionBias, TensorCache, neighborhood_attention
from ...kernels.tracing import is_dynamic
from ..layers import fx_leaf, is_plain, linear, refuse_scripting, shortfall
from .maps import map_sizes


class NeighborhoodAttention2d(nn.Module):
    """Multi-head neighborhood attention with relative position bias (NAT, arXiv:2204.07143, section 3.1; the dilation:
    DiNAT, arXiv:2209.15001, section 3.1).

    Each query attends to the ``kernel_size`` window around it, shifted inside the map at the borders. A map smaller
    than ``kernel_size * dilation`` is zero-padded to it at the right and the bottom before the qkv projection, and the
    output is cropped. Padding is not masked, as in the training of the published checkpoints.

    A ``kernel_size`` equal to the map gives plain attention with a relative position bias.

    Args:
        dim: channels C.
        num_heads: heads; must divide ``dim``.
        kernel_size: window, an int or (rows, columns).
        dilation: distance between neighboring window positions, or ``"auto"``: the largest that fits the map,
            ``max(1, min(H // rows, W // columns))``, computed at every forward.
        qkv_bias: learn a bias in the qkv projection.
        rel_pos_bias: learn ``rpb``, the ``[heads, 2 * rows - 1, 2 * columns - 1]`` table that is added to the logits
            by the offset (in dilated steps) from query to key.
        attn_drop: dropout probability on the attention weights.
        proj_drop: dropout probability on the output.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import NeighborhoodAttention2d
        >>> attention = NeighborhoodAttention2d(dim=64, num_heads=2, kernel_size=7, dilation=2)
        >>> attention(torch.randn(1, 16, 20, 64)).shape
        torch.Size([1, 16, 20, 64])
    """

    __prepare_scriptable__ = refuse_scripting

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
        pair: Any = to_2tuple(kernel_size)
        self.kernel_size: tuple[int, int] = pair
        rows, columns = self.kernel_size
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        if min(rows, columns) < 1:
            raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
        if dilation != "auto" and (not isinstance(dilation, (int, np.integer)) or dilation < 1):
            raise ValueError(f'dilation must be an int of at least 1 or "auto", got {dilation!r}')
        self.dilation = dilation if isinstance(dilation, str) else int(dilation)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * rows - 1, 2 * columns - 1))
            trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.bias_cache = TensorCache()
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, num_heads={self.num_heads}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, C]`` to the same shape, for any H and W."""
        B, H, W, C = map_sizes(x)
        rows, columns = self.kernel_size
        dynamic_shape = is_dynamic(H, W)
        dilation = self.dilation
        if dynamic_shape and isinstance(dilation, str):
            raise ValueError(
                'dilation "auto" follows the size of the map and so needs to know it: export such a model with a fixed '
                "height and width, or create it with dilations given"
            )
        if isinstance(dilation, str):
            dilation = max(1, min(H // rows, W // columns))

        if dynamic_shape:  # a pad of zero if the map is large enough
            bottom, right = shortfall(H, rows * dilation), shortfall(W, columns * dilation)
        else:
            bottom, right = max(0, rows * dilation - H), max(0, columns * dilation - W)
        enlarge = dynamic_shape or bottom or right
        if enlarge and not dynamic_shape and is_plain(self.qkv):
            qkv = self._append_bias(linear(self.qkv, x), bottom, right)
        else:
            qkv = linear(self.qkv, F.pad(x, (0, 0, 0, right, 0, bottom)) if enlarge else x)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        x = neighborhood_attention(
            q,
            k,
            v,
            kernel_size=self.kernel_size,
            dilation=dilation,
            bias=None if self.rpb is None else RelativePositionBias(self.rpb, self.bias_cache),
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        if dynamic_shape:
            x = x.index_select(1, torch.arange(H, device=x.device)).index_select(2, torch.arange(W, device=x.device))
        elif bottom or right:
            x = x[:, :H, :W]
        return self.proj_drop(linear(self.proj, x.reshape(B, H, W, C)))

    def _append_bias(self, qkv: torch.Tensor, bottom: int, right: int) -> torch.Tensor:
        """Append the projection of zero inputs, which is its bias."""
        B, H, W, C = qkv.shape
        fill = qkv.new_zeros(C) if self.qkv.bias is None else self.qkv.bias.to(qkv.dtype)
        if right:
            qkv = torch.cat([qkv, fill.expand(B, H, right, C)], dim=2)
        if bottom:
            qkv = torch.cat([qkv, fill.expand(B, bottom, W + right, C)], dim=1)
        return qkv
