"""timm's models on this package's kernels: same parameters, names and methods, other attention.

`replace_attention` changes the class of timm's blocks in place. The new classes inherit from timm's; only the part that
cuts a map into windows, attends in each and puts them together is replaced.

Windows follow one rule at every size: they start at the top left, shifted ones (Swin, arXiv:2103.14030) at the shift,
and the map ends where it ends. Where timm pads a map to a multiple of the window, its padding takes part as keys; here
there is none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.layers.halo_attn import HaloAttn
from timm.models import davit, maxxvit, swin_transformer, swin_transformer_v2, twins
from torch import nn

from .attention import HaloAttention2d, TensorCache, table_by_key, window_attention
from .layers import fx_leaf, linear, refuse_scripting

__all__ = ["replace_attention"]


# ---------------------------------------------------------------------------------------------------------------------
# Attention of maps [B, H, W, C]; timm's takes windows
# ---------------------------------------------------------------------------------------------------------------------


class _MapAttention(nn.Module):
    """What the attention modules share: ``cache`` stores what the kernels derive from a bias table in eval."""

    __prepare_scriptable__ = refuse_scripting
    cache: TensorCache
    # of timm, without types there
    qkv: Any
    proj: Any
    proj_drop: Any
    attn_drop: Any
    window_size: Any
    num_heads: Any
    ws: Any
    k_bias: Any
    v_bias: Any


class SwinAttention(_MapAttention, swin_transformer.WindowAttention):
    """Swin's shifted windows."""

    @fx_leaf
    def forward(self, x: torch.Tensor, shift: tuple[int, int]) -> torch.Tensor:
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        table = table_by_key(self.relative_position_bias_table, self.window_size)
        drop = self.attn_drop.p if self.training else 0.0
        x = window_attention(q, k, v, self.window_size, shift=shift, table=table, cache=self.cache, dropout_p=drop)
        return self.proj_drop(linear(self.proj, x))


class SwinV2Attention(_MapAttention, swin_transformer_v2.WindowAttention):
    """Shifted windows of Swin V2 (arXiv:2111.09883): cosine attention, position bias from an MLP."""

    @fx_leaf
    def forward(self, x: torch.Tensor, shift: tuple[int, int]) -> torch.Tensor:
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if self.qkv_bias_separate and bias is not None:
            qkv = self.qkv(x) + bias
        else:
            qkv = self.qkv(x) if bias is None else F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100.0)).exp().squeeze(-1)
        k = F.normalize(k, dim=-1)
        table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table))
        table = table_by_key(table.flatten(0, 2), self.window_size)
        drop = self.attn_drop.p if self.training else 0.0
        x = window_attention(
            q, k, v, self.window_size, shift=shift, table=table, cache=self.cache, scale=1.0, dropout_p=drop
        )
        return self.proj_drop(self.proj(x))


class DaViTAttention(_MapAttention, davit.WindowAttention):
    """DaViT's windows (arXiv:2204.03645), without a position bias."""

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        return self.proj(window_attention(q, k, v, self.window_size))


class TwinsAttention(_MapAttention, twins.LocallyGroupedAttn):
    """Locally grouped attention of Twins (arXiv:2104.13840), without a position bias, on ``[B, H * W, C]``."""

    @fx_leaf
    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        q, k, v = self.qkv(x.unflatten(1, size)).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        drop = self.attn_drop.p if self.training else 0.0
        x = window_attention(q, k, v, (self.ws, self.ws), dropout_p=drop)
        return self.proj_drop(self.proj(x.flatten(1, 2)))


def _partition_attention(
    attn: maxxvit.AttentionCl | maxxvit.Attention2d,
    qkv: torch.Tensor,
    size: tuple[int, int],
    grid: bool,
    cache: TensorCache,
) -> torch.Tensor:
    """MaxViT's attention (arXiv:2204.01697) for packed projections ``[B, H, W, 3 * C]``."""
    if attn.head_first:
        q, k, v = qkv.unflatten(-1, (attn.num_heads, 3, attn.dim_head)).unbind(4)
    else:
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.dim_head)).unbind(3)
    rel_pos, table = attn.rel_pos, None
    if isinstance(rel_pos, RelPosBiasTf):
        table = rel_pos.relative_position_bias_table
    elif isinstance(rel_pos, RelPosMlp):
        table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).flatten(0, -2))
        table = table_by_key(table if rel_pos.bias_gain is None else rel_pos.bias_gain * table, size)
    elif rel_pos is not None:
        table = table_by_key(rel_pos.relative_position_bias_table, size)
    drop = attn.attn_drop.p if attn.training else 0.0
    return window_attention(q, k, v, size, grid=grid, table=table, cache=cache, dropout_p=drop)


class PartitionAttention(_MapAttention, maxxvit.AttentionCl):
    """MaxViT's windows and grids."""

    @fx_leaf
    def forward(self, x: torch.Tensor, size: tuple[int, int], grid: bool) -> torch.Tensor:
        x = _partition_attention(self, linear(self.qkv, x), size, grid, self.cache)
        return self.proj_drop(linear(self.proj, x))


class PartitionAttentionNCHW(_MapAttention, maxxvit.Attention2d):
    """MaxViT's windows and grids, on ``[B, C, H, W]``."""

    @fx_leaf
    def forward(self, x: torch.Tensor, size: tuple[int, int], grid: bool) -> torch.Tensor:
        x = _partition_attention(self, self.qkv(x).permute(0, 2, 3, 1), size, grid, self.cache)
        return self.proj_drop(self.proj(x.permute(0, 3, 1, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks, which cut the map in timm
# ---------------------------------------------------------------------------------------------------------------------


class _ShiftedBlock(nn.Module):
    """Of Swin and Swin V2: the map is neither rolled nor padded, and there is no mask."""

    attn: Any
    shift_size: Any

    def get_attn_mask(self, *args, **kwargs) -> None:
        return None

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, tuple(self.shift_size))


class SwinBlock(_ShiftedBlock, swin_transformer.SwinTransformerBlock):
    """A block of Swin."""


class SwinV2Block(_ShiftedBlock, swin_transformer_v2.SwinTransformerV2Block):
    """A block of Swin V2."""


class DaViTBlock(davit.SpatialBlock):
    """The spatial block of DaViT."""

    drop_path1: Any
    norm2: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        shortcut = self.cpe1(x).flatten(2).transpose(1, 2)
        x = self.attn(self.norm1(shortcut).view(B, H, W, C)).view(B, H * W, C)
        x = shortcut + self.drop_path1(x)
        x = self.cpe2(x.transpose(1, 2).view(B, C, H, W))
        if self.mlp is not None:
            x = x.flatten(2).transpose(1, 2)
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
            x = x.transpose(1, 2).view(B, C, H, W)
        return x


class _PartitionBlock(nn.Module):
    attn: Any
    partition_size: Any

    def _partition_attn(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, tuple(self.partition_size), not self.partition_block)


class PartitionBlock(_PartitionBlock, maxxvit.PartitionAttentionCl):
    """Window or grid attention of MaxViT."""


class PartitionBlockNCHW(_PartitionBlock, maxxvit.PartitionAttention2d):
    """Window or grid attention of MaxViT, on ``[B, C, H, W]``."""


class ParallelBlock(maxxvit.ParallelPartitionAttention):
    """Windows and grids of MaxViT side by side."""

    def _partition_attn(self, x: torch.Tensor) -> torch.Tensor:
        size = tuple(self.partition_size)
        return torch.cat([self.attn_block(x, size, False), self.attn_grid(x, size, True)], dim=-1)


_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.WindowAttention: SwinAttention,
    swin_transformer_v2.WindowAttention: SwinV2Attention,
    davit.WindowAttention: DaViTAttention,
    maxxvit.AttentionCl: PartitionAttention,
    maxxvit.Attention2d: PartitionAttentionNCHW,
}
_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.SwinTransformerBlock: SwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: SwinV2Block,
    davit.SpatialBlock: DaViTBlock,
    maxxvit.PartitionAttentionCl: PartitionBlock,
    maxxvit.PartitionAttention2d: PartitionBlockNCHW,
    maxxvit.ParallelPartitionAttention: ParallelBlock,
}


def _attentions(block: nn.Module) -> list[Any]:
    return [child for name, child in block.named_children() if name.startswith("attn")]


def _takes(block: nn.Module) -> bool:
    """Whether everything of a block that the new class computes otherwise is timm's own."""
    if type(block) not in _BLOCKS or any(type(attn) not in _ATTENTION for attn in _attentions(block)):
        return False
    biases = (getattr(attn, "rel_pos", None) for attn in _attentions(block))
    return all(bias is None or type(bias) in (RelPosBias, RelPosBiasTf, RelPosMlp) for bias in biases)


def _describe(module: Any) -> str:
    if isinstance(module, twins.LocallyGroupedAttn):
        return f"window_size={(module.ws, module.ws)}, num_heads={module.num_heads}"
    heads = f"num_heads={_attentions(module)[0].num_heads}"
    if isinstance(module, ParallelBlock):
        return f"block and grid, partition_size={module.partition_size}, {heads}"
    if isinstance(module, _PartitionBlock):
        return f"{'block' if module.partition_block else 'grid'}, partition_size={module.partition_size}, {heads}"
    shift = f", shift_size={module.shift_size}" if isinstance(module, _ShiftedBlock) else ""
    return f"window_size={module.window_size}{shift}, {heads}"


def _swap(module: Any) -> None:
    """Give a module of timm, and its attention, the class of this file."""
    kind = type(module)
    if kind is twins.LocallyGroupedAttn:
        module.__class__, module.cache = TwinsAttention, TensorCache()
        return
    for attn in _attentions(module):
        attn.__class__, attn.cache = _ATTENTION[type(attn)], TensorCache()
    module.__class__ = _BLOCKS[kind]
    if issubclass(_BLOCKS[kind], _ShiftedBlock):
        module.attn_mask = None


def replace_attention(model: nn.Module) -> dict[str, str]:
    """Replace the windowed attention of a timm model by this package's, in place.

    Replaced are `timm.layers.halo_attn.HaloAttn` (HaloNet and hybrids), the shifted windows of Swin and Swin V2, the
    windows of Twins and DaViT, and the windows and grids of MaxViT. Subclasses of timm's modules, and blocks whose
    attention or position bias has been replaced by something else, are left alone.

    Parameters, names, state dicts, devices, dtypes, ``requires_grad``, training mode, methods and a running optimizer
    stay valid, and outputs and gradients are the same where timm's windows tile the map. Windows are not unfolded,
    rolled, padded or masked in memory, and the attention takes any map size; other layers keep their limits (create
    Swin with timm's ``strict_img_size=False``). Where the window does not divide the map, timm's models pad (MaxViT's
    raise): the padding takes part as keys, and with a shift opposite borders see each other. Here windows end at the
    border, so outputs differ there.

    A ``HaloAttn`` becomes another module, without its hooks. The other modules change their class and keep them; hooks
    on the attention of a block then see a map, not windows.

    Args:
        model: any module, changed in place.

    Returns:
        The names of the replaced modules with a description; empty if there are none.

    Raises:
        ValueError: ``model`` itself is a ``HaloAttn``; use `HaloAttention2d.from_timm`.

    Examples:
        >>> import foveal, timm, torch
        >>> model = timm.create_model(
        ...     "swin_tiny_patch4_window7_224",
        ...     embed_dim=16,
        ...     depths=(2,),
        ...     num_heads=(2,),
        ...     window_size=3,
        ...     img_size=28,
        ...     strict_img_size=False,
        ... )
        >>> foveal.replace_attention(model)["layers.0.blocks.1"]
        'window_size=(3, 3), shift_size=(1, 1), num_heads=2'
        >>> model(torch.randn(1, 3, 52, 40)).shape
        torch.Size([1, 1000])
    """
    if type(model) is HaloAttn:
        raise ValueError("the model is itself a HaloAttn; use HaloAttention2d.from_timm(module)")
    new: dict[nn.Module, nn.Module] = {}  # a shared module stays shared
    replaced = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is HaloAttn:
            if module not in new:
                new[module] = HaloAttention2d.from_timm(module)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new[module])
            replaced[name] = new[module].extra_repr()
        elif type(module) is twins.LocallyGroupedAttn or _takes(module) or module in new:
            if module not in new:
                _swap(module)
                new[module] = module
            replaced[name] = _describe(module)
    return replaced
