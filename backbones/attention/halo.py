"""Blocked attention with a halo (HaloNet)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.layers.halo_attn import HaloAttn
from torch import nn

from ...kernels import DecomposedRelativePositionBias, neighborhood_attention
from ..layers import for_convolution, fx_leaf, refuse_scripting


class RelativeEmbedding(nn.Module):
    """Learned vectors for the row and the column offsets from query to key, ``[2 * window - 1, D]`` each, shared by the
    heads; the names are those of timm's checkpoints."""

    def __init__(self, window: int, depth: int, std: float) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, depth))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, depth))
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=std)

    def forward(self, halo_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The row and column embeddings, with `key - query + window - 1` relative to one origin as their index."""
        rows, columns = (F.pad(t[halo_size:], (0, 0, 0, halo_size)) for t in (self.height_rel, self.width_rel))
        return rows, columns


class HaloAttention2d(nn.Module):
    """Blocked local attention with a halo (HaloNet, arXiv:2103.12731, section 2), on ``[B, C, H, W]``.

    The map is split into blocks; all queries of a block attend to the block and a halo around it, with a position bias
    of row and column embeddings dotted with the query. There is no output projection. Any map size is supported: blocks
    start at the top left, the last ones may be cut, and ``boundary`` applies to positions outside the map.

    With ``stride`` 2 there is a query at every second row and column, starting with the first (odd lengths are rounded
    up); keys and values keep the full resolution.

    Parameters have timm's names and shapes (``q``, ``kv``, ``pos_embed``). The embeddings are indexed as in timm, by
    ``key - query + window - 1`` with the key relative to the window's corner and the query to its block's, so the first
    ``halo_size`` rows are never used.

    Args:
        dim: input channels.
        dim_out: output channels, those of all value heads; None for ``dim``.
        stride: 1, or 2 for every second query.
        num_heads: heads; must divide ``dim_out``.
        head_dim: channels of a query or key head; None for ``dim_out // num_heads``.
        block_size: side of a block.
        halo_size: width of the halo on each side.
        qkv_bias: learn biases in the projections.
        boundary: ``"mask"`` excludes positions outside the map from the softmax, as in the paper; with ``"zero"`` they
            take part with zero keys and values, as in the training of timm's published weights.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import HaloAttention2d
        >>> attention = HaloAttention2d(dim=64, num_heads=2, block_size=8, halo_size=3, stride=2)
        >>> attention(torch.randn(1, 64, 16, 21)).shape
        torch.Size([1, 64, 8, 11])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        stride: int = 1,
        num_heads: int = 8,
        head_dim: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qkv_bias: bool = False,
        boundary: str = "mask",
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if dim_out % num_heads:
            raise ValueError(f"dim_out {dim_out} is not divisible by num_heads {num_heads}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        if block_size < 1 or halo_size < 0:
            raise ValueError(
                f"block_size must be at least 1 and halo_size 0, got block_size {block_size}, halo_size {halo_size}"
            )
        if boundary not in ("mask", "zero"):
            raise ValueError(f'boundary must be "mask" or "zero", got {boundary!r}')
        self.stride = stride
        self.num_heads = num_heads
        self.head_dim = dim_out // num_heads if head_dim is None else head_dim
        self.value_dim = dim_out // num_heads
        self.block_size = block_size
        self.halo_size = halo_size
        self.boundary = boundary
        self.scale = self.head_dim**-0.5
        # options of timm's module, see `from_timm`
        self.scale_bias = False
        self.dense_offsets = False
        self.avg_pool = False

        keys = num_heads * self.head_dim
        self.q = nn.Conv2d(dim, keys, 1, stride=stride, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, keys + dim_out, 1, bias=qkv_bias)  # per head: key, then value
        self.pos_embed = RelativeEmbedding(block_size + 2 * halo_size, self.head_dim, self.scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from a truncated normal with standard deviation ``dim ** -0.5``; PyTorch's default for biases."""
        for conv in (self.q, self.kv):
            trunc_normal_(conv.weight, std=conv.in_channels**-0.5)

    @classmethod
    def from_timm(cls, module: HaloAttn) -> HaloAttention2d:
        """Convert timm's module: the same outputs, with shared (not copied) parameters.

        Behaviour kept from timm: zero keys outside the map; with stride 2 an average pool after the attention, if
        requested or if the block is odd, otherwise position offsets that count strided queries (the third query of a
        block, at its fifth position, has an offset of two). The pool rounds an odd length down if timm supports the
        map (both sides are multiples of the block), and up otherwise.
        """
        with torch.device("meta"):
            new = cls(
                module.q.in_channels,
                module.dim_out_v,
                stride=module.block_stride,
                num_heads=module.num_heads,
                head_dim=module.dim_head_qk,
                block_size=module.block_size,
                halo_size=module.halo_size,
                boundary="zero",
            )
        new.q, new.kv = module.q, module.kv
        new.pos_embed.height_rel, new.pos_embed.width_rel = module.pos_embed.height_rel, module.pos_embed.width_rel
        new.pos_embed.training = module.pos_embed.training
        new.scale = module.scale
        new.scale_bias = module.scale_pos_embed
        new.dense_offsets = module.block_stride > 1
        new.avg_pool = not isinstance(module.pool, nn.Identity)
        new.training = module.training
        return new

    def extra_repr(self) -> str:
        return (
            f"block_size={self.block_size}, halo_size={self.halo_size}, num_heads={self.num_heads}, "
            f"stride={2 if self.avg_pool else self.stride}, boundary={self.boundary}"
        )

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, dim, H, W]`` to ``[B, dim_out, h, w]`` in PyTorch's channels_last memory format."""
        height, width = x.shape[2:]
        # views, contiguous if x is in channels_last; converting x first is not faster
        q = self.q(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, self.head_dim))
        kv = self.kv(x).permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, self.head_dim + self.value_dim))
        k, v = kv.split((self.head_dim, self.value_dim), -1)

        factor = self.scale if self.scale_bias else 1.0
        rows, columns = (factor * table for table in self.pos_embed(self.halo_size))
        window = self.block_size + 2 * self.halo_size
        x = neighborhood_attention(
            q,
            k,
            v,
            kernel_size=(window, window),
            stride=self.block_size,
            query_stride=self.stride,
            bias=DecomposedRelativePositionBias(rows, columns, counted=self.dense_offsets),
            boundary=self.boundary,
            scale=self.scale,
        )
        x = for_convolution(x.flatten(3).permute(0, 3, 1, 2))
        if self.avg_pool:
            up = height % self.block_size > 0 or width % self.block_size > 0
            x = F.avg_pool2d(x, 2, ceil_mode=up, count_include_pad=False)
        return x
