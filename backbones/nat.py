"""NAT, DiNAT, DiNAT_s and their isotropic forms.

Papers: Neighborhood Attention Transformer (Hassani et al., CVPR 2023, arXiv:2204.07143); Dilated Neighborhood Attention
Transformer (Hassani and Shi, 2022, arXiv:2209.15001). Code and weights of the authors: MIT licence,
https://github.com/SHI-Labs/Neighborhood-Attention-Transformer. This is an independent implementation; the published
checkpoints load unchanged and give the published outputs.

* **NAT** is a hierarchical transformer of four levels: an overlapping convolutional tokenizer, neighborhood attention
  blocks, and convolutional downsamplers between the levels. **DiNAT** is NAT with a dilation per block.
* **DiNAT_s** is Swin with neighborhood attention instead of window attention: patch embedding and patch merging.
* **Isotropic** models are ViTs of 12 blocks on patches of 16, with neighborhood attention (`nat_isotropic_*`,
  `dinat_isotropic_*`) or plain attention (`vitrpb_isotropic_*`), and a relative position bias in all of them.

Parameters have the authors' names, so state dicts of these models are in the published format; see
`checkpoint_filter_fn` for other formats.

Feature maps are channels-last inside, ``[B, H, W, C]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, to_2tuple
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import nn

from .attention import NeighborhoodAttention2d, is_dynamic, to_nchw
from .base import Backbone, check_names, create, keep_new, unwrap
from .layers import Blocks, Level, Mlp, drop_path_rates, fx_leaf, init_weights, linear, positive_pair

__all__ = ["NAT", "DiNATs", "Isotropic", "checkpoint_filter_fn", "family"]


Dilations = Sequence[Sequence[int]] | str | None


class NATBlock(nn.Module):
    """Pre-norm neighborhood attention and MLP, each with optional LayerScale and one shared stochastic depth."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int],
        dilation: int | str = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2d(
            dim, num_heads, kernel_size, dilation, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attn(self.norm1(x))
        x = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma2 is None else self.gamma2 * y)


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2 without an activation between them, then LayerNorm: stride 4."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """3x3 convolution of stride 2 to twice the channels, then LayerNorm; an odd length is rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(to_nchw(x)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Swin's downsampler: 2x2 neighbors concatenated, LayerNorm, Linear to twice the channels; odd lengths are padded
    with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        h, w = (H + 1) // 2, (W + 1) // 2
        if is_dynamic(H, W) or H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, 2 * w - W, 0, 2 * h - H))
        # the channel order is (column, row, C), column outermost
        x = x.reshape(B, h, 2, w, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, h, w, 4 * C)
        return linear(self.reduction, self.norm(x))


class NAT(Backbone):
    """NAT and DiNAT. Takes images of any size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the levels cannot keep their resolution.
        embed_dim: channels of level 0, doubled at every further level.
        depths: blocks per level.
        num_heads: attention heads per level.
        kernel_size: attention window, an int or (rows, columns).
        dilations: one list per level with a dilation per block; None for 1 everywhere (NAT); or ``"auto"``: blocks of a
            level alternate between 1 and the largest dilation that fits the map, ``max(1, min(H, W) // kernel_size)``,
            computed at every forward. At 224 with kernel 7 these are the published dilations. If a fixed dilation
            exceeds the map, the map is padded (see `NeighborhoodAttention2d`); ``"auto"`` only pads maps smaller than
            the kernel.
        mlp_ratio: hidden channels of the MLP, relative to the level's.
        qkv_bias: bias in the qkv projections.
        layer_scale: initial value of LayerScale (``gamma1``, ``gamma2``); None: no LayerScale.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention projection and in the MLP.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.
        out_norm: add a LayerNorm per level, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to
            their maps, as in the authors' detection and segmentation models.
        interpolate_rpb: let `checkpoint_filter_fn` resample position bias tables of another kernel size.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import foveal, timm, torch
        >>> model = timm.create_model("test_foveal_dinat", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('NAT', (1, 10))
    """

    stem_name, levels_name = "patch_embed", "levels"
    downsample_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | tuple[int, int] = 7,
        dilations: Dilations = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
        interpolate_rpb: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        if len(depths) != len(num_heads):
            raise ValueError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)} differ in length")
        self.embed_dim = embed_dim
        self.interpolate_rpb = interpolate_rpb
        self.kernel_size = to_2tuple(kernel_size)
        options: dict[str, Any] = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, layer_scale=layer_scale)
        options |= dict(proj_drop=proj_drop_rate, attn_drop=attn_drop_rate)

        self.patch_embed = self._tokenizer(in_chans, embed_dim)
        dilated, rates = _dilations(dilations, depths), drop_path_rates(drop_path_rate, depths)
        levels = []
        for i, heads in enumerate(num_heads):
            dim = embed_dim * 2**i
            blocks = [
                NATBlock(dim, heads, kernel_size, dilation, drop_path=rate, **options)
                for dilation, rate in zip(dilated[i], rates[i], strict=True)
            ]
            levels.append(Level(blocks, self._downsampler(dim) if i < len(depths) - 1 else None))
            self._add_map(dim, f"{self.levels_name}.{i}.blocks")
        setattr(self, self.levels_name, nn.Sequential(*levels))
        self.norm = nn.LayerNorm(dim)
        init_weights(self)
        self._init_head(dim, num_classes, global_pool, drop_rate)

    def _tokenizer(self, in_chans: int, dim: int) -> nn.Module:
        return ConvTokenizer(in_chans, dim)

    def _downsampler(self, dim: int) -> nn.Module:
        return ConvDownsampler(dim)


class DiNATs(NAT):
    """DiNAT_s: NAT's levels with Swin's patch embedding and patch merging. Arguments as for `NAT`.

    Examples:
        >>> import torch
        >>> from foveal.backbones.nat import DiNATs
        >>> model = DiNATs(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=10)
        >>> model(torch.randn(1, 3, 64, 96)).shape  # dinat_s_tiny and others are such models
        torch.Size([1, 10])
    """

    levels_name = "layers"

    def _tokenizer(self, in_chans: int, dim: int) -> nn.Module:
        return patch_embed(in_chans, dim, patch_size=4)

    def _downsampler(self, dim: int) -> nn.Module:
        return PatchMerging(dim)


class Isotropic(Backbone):
    """The isotropic forms: blocks of one width at stride 16, without a class token or absolute positions.

    Args:
        img_size: with ``full_attention`` the only input size, an int or (height, width); position bias tables of
            another size are resampled on load. Otherwise None: neighborhood attention takes any size.
        patch_size: kernel size and stride of the patch embedding; inputs are padded to a multiple.
        depth: blocks.
        full_attention: attend to the whole map (ViT with relative position bias) instead of ``kernel_size``.
        dilations: a dilation per block; None for 1 everywhere; or ``"auto"`` as for `NAT`.
        output_stride: only ``patch_size``.

    The other arguments are those of `NAT`.

    Raises:
        ValueError: on arguments that do not fit together, and, with ``full_attention``, on an input of another size.

    Examples:
        >>> import torch
        >>> from foveal.backbones.nat import Isotropic
        >>> model = Isotropic(embed_dim=24, depth=2, num_heads=2, num_classes=10)
        >>> model(torch.randn(1, 3, 64, 96)).shape  # nat_isotropic_small and others are such models
        torch.Size([1, 10])
    """

    stem_name, levels_name = "patch_embed", "layers"
    uniform = True
    out_indices = 3

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | tuple[int, int] = 7,
        dilations: Sequence[int] | str | None = None,
        full_attention: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        interpolate_rpb: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, stride=patch_size)
        if full_attention != (img_size is not None):
            raise ValueError(f"img_size is required for full attention and not allowed otherwise; got {img_size}")
        if full_attention and dilations is not None:
            raise ValueError(f"full attention has no dilations, got {dilations}")
        self.img_size = None if img_size is None else positive_pair("img_size", img_size)
        if self.img_size is not None:
            height, width = self.img_size
            kernel_size = math.ceil(height / patch_size), math.ceil(width / patch_size)
        self.kernel_size = to_2tuple(kernel_size)
        # tables of full attention depend on the input size, so a requested size implies resampling
        self.interpolate_rpb = interpolate_rpb or full_attention
        options: dict[str, Any] = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, layer_scale=layer_scale)
        options |= dict(proj_drop=proj_drop_rate, attn_drop=attn_drop_rate)

        self.patch_embed = patch_embed(in_chans, embed_dim, patch_size)
        given: Dilations = dilations if dilations is None or isinstance(dilations, str) else [dilations]
        (dilated,) = _dilations(given, [depth])
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        blocks = [
            NATBlock(embed_dim, num_heads, kernel_size, dilation, drop_path=rate, **options)
            for dilation, rate in zip(dilated, rates, strict=True)
        ]
        self.layers = Blocks(*blocks)
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"layers.{j}") for j in range(depth)]
        self.norm = nn.LayerNorm(embed_dim)
        init_weights(self)
        self._init_head(embed_dim, num_classes, global_pool, drop_rate)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise learning rates."""
        return dict(stem=r"^patch_embed", blocks=[(r"^layers\.(\d+)", None), (r"^norm", (99999,))])

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.patch_embed(x if self.img_size is None else _of_size(x, self.img_size))

    def _level(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_seq(self.layers[i : i + 1], x) if self.layers.grad_checkpointing else self.layers[i](x)


@fx_leaf
def _of_size(x: torch.Tensor, img_size: tuple[int, int]) -> torch.Tensor:
    """``x`` as it is; ValueError if it is of another size."""
    if tuple(x.shape[-2:]) != img_size:
        height, width = img_size
        raise ValueError(
            f"input is {x.shape[-2]}x{x.shape[-1]}, this model takes {height}x{width} only: its position bias "
            f"tables are for that size; create it with img_size=({x.shape[-2]}, {x.shape[-1]})"
        )
    return x


def patch_embed(in_chans: int, dim: int, patch_size: int) -> PatchEmbed:
    """Patches of images of any size, which are zero-padded to a multiple, as a channels-last map after LayerNorm."""
    return PatchEmbed(
        img_size=None,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=dim,
        norm_layer=nn.LayerNorm,
        output_fmt="NHWC",
        strict_img_size=False,
        dynamic_img_pad=True,
    )


def _dilations(dilations: Dilations, depths: Sequence[int]) -> list[list[int | str]]:
    """One list per level with an entry per block: an int, or "auto"."""
    if dilations is None:
        return [[1] * depth for depth in depths]
    if dilations == "auto":
        return [[1 if j % 2 == 0 else "auto" for j in range(depth)] for depth in depths]
    if isinstance(dilations, str) or any(not isinstance(level, Sequence) for level in dilations):
        raise ValueError(f'dilations must be None, "auto" or one list per level, got {dilations!r}')
    got = [len(level) for level in dilations]
    if got != list(depths):
        raise ValueError(f"dilations has {got} entries per level, depths are {list(depths)}; got {dilations!r}")
    return [list(level) for level in dilations]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

_FROM_TRANSFORMERS = (
    (r"^(dinat|nat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.", r"levels.\1.blocks.\2."),
    (r"^encoder\.levels\.(\d+)\.downsample\.", r"levels.\1.downsample."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: NAT | Isotropic, interpolate_rpb: bool | None = None
) -> dict[str, torch.Tensor]:
    """Convert a checkpoint of any published format to a state dict of ``model``. Changes neither argument.

    Supported are

    * the authors' classification checkpoints, which have the same names;
    * their mmdetection, mmsegmentation and detectron2 checkpoints, of which only the ``backbone.`` is used. They have a
      norm per level (``norm0`` ...) and no final norm or classifier, so create the model with
      ``features_only=True, out_norm=True``;
    * Hugging Face transformers' Nat and Dinat models (with or without classifier, and their backbones);
    * state dicts of these models, also wrapped by ``features_only`` or ``DistributedDataParallel``.

    If the checkpoint has no norms of ``out_norm``, those of the model keep their values.

    Args:
        state_dict: names to tensors, or a checkpoint with them under ``state_dict`` or ``model``.
        model: the model to load the result into.
        interpolate_rpb: resample relative position bias tables of another kernel size, bicubically, as the authors did
            from 7x7 to 11x11. None: the ``interpolate_rpb`` of the model.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model, or a table
            has another size and ``interpolate_rpb`` is off.
    """
    state_dict = unwrap(state_dict)
    if any(name.endswith("patch_embeddings.projection.0.weight") for name in state_dict):
        state_dict = _from_transformers(state_dict)
    # an index that follows from the table's size, stored by the authors' ViT with relative position bias
    state_dict = {k: v for k, v in state_dict.items() if not k.endswith(".relative_position_index")}

    own = model.state_dict()
    keep_new(state_dict, own)
    check_names(state_dict, own, ignore=r"head\.|norm\." if model.out_norm else r"head\.")

    resample = model.interpolate_rpb if interpolate_rpb is None else interpolate_rpb
    for name in state_dict:
        if name.endswith(".rpb"):
            state_dict[name] = _fit_rpb(name, state_dict[name], own[name], resample)
    return state_dict


def _from_transformers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, value in state_dict.items():
        for pattern, replacement in _FROM_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^hidden_states_norms\.stage(\d+)\.", lambda m: f"norm{int(m[1]) - 1}.", name)
        if name.endswith(".layer_scale_parameters"):
            stem = name.removesuffix("layer_scale_parameters")
            out[stem + "gamma1"], out[stem + "gamma2"] = value[0], value[1]
        else:
            out[name] = value
    for name in [name for name in out if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        out[name.replace(".query.", ".qkv.")] = torch.cat([out.pop(part) for part in parts])
    return out


def _fit_rpb(name: str, table: torch.Tensor, own: torch.Tensor, resample: bool) -> torch.Tensor:
    """``table`` resampled to the size of ``own``; both ``[heads, 2 * rows - 1, 2 * columns - 1]``."""
    size, wanted = tuple(table.shape[-2:]), tuple(own.shape[-2:])
    if size == wanted:
        return table
    if not resample:
        raise ValueError(
            f"{name} of the checkpoint is {size[0]}x{size[1]}, made for kernel_size {tuple(s // 2 + 1 for s in size)}; "
            f"the model's is {wanted[0]}x{wanted[1]}, kernel_size {tuple(s // 2 + 1 for s in wanted)}. "
            "interpolate_rpb=True resamples it"
        )
    return F.interpolate(table[None].float(), size=wanted, mode="bicubic", align_corners=False)[0].to(table.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------

_384: dict[str, Any] = dict(input_size=(3, 384, 384), crop_pct=1.0)


def _file(path: str, hub: str | None = None, **facts: Any) -> dict[str, Any]:
    """Addresses of the authors' file and of its copy on the hub with transformers' names."""
    project, _, file = path.partition("/")
    copy = {"hf_hub_id": f"shi-labs/{hub}"} if hub else {}
    return {"url": f"https://shi-labs.com/projects/{project}/checkpoints/{file}", **copy, **facts}


_WEIGHTS = {
    "nat_mini.in1k": _file("nat/CLS/nat_mini.pth", hub="nat-mini-in1k-224"),
    "nat_tiny.in1k": _file("nat/CLS/nat_tiny.pth"),
    "nat_small.in1k": _file("nat/CLS/nat_small.pth"),
    "nat_base.in1k": _file("nat/CLS/nat_base.pth", hub="nat-base-in1k-224"),
    "dinat_mini.in1k": _file("dinat/imagenet1k/dinat_mini_in1k_224.pth", hub="dinat-mini-in1k-224"),
    "dinat_tiny.in1k": _file("dinat/imagenet1k/dinat_tiny_in1k_224.pth", hub="dinat-tiny-in1k-224"),
    "dinat_small.in1k": _file("dinat/imagenet1k/dinat_small_in1k_224.pth", hub="dinat-small-in1k-224"),
    "dinat_base.in1k": _file("dinat/imagenet1k/dinat_base_in1k_224.pth", hub="dinat-base-in1k-224"),
    "dinat_large.in22k_ft_in1k": _file(
        "dinat/imagenet1k/dinat_large_in22k_in1k_224.pth", hub="dinat-large-in22k-in1k-224"
    ),
    "dinat_large.in22k": _file("dinat/imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
    "dinat_large_384.in22k_ft_in1k": _file(
        "dinat/imagenet1k/dinat_large_in22k_in1k_384.pth", hub="dinat-large-in22k-in1k-384", **_384
    ),
    "dinat_large_384_11x11.in22k_ft_in1k": _file(
        "dinat/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", hub="dinat-large-11x11-in22k-in1k-384", **_384
    ),
    "dinat_large_384_11x11.in22k": _file(
        "dinat/imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=21841, **_384
    ),
    "dinat_s_tiny.in1k": _file("dinat/imagenet1k/dinat_s_tiny_in1k_224.pth"),
    "dinat_s_small.in1k": _file("dinat/imagenet1k/dinat_s_small_in1k_224.pth"),
    "dinat_s_base.in1k": _file("dinat/imagenet1k/dinat_s_base_in1k_224.pth"),
    "dinat_s_large.in22k_ft_in1k": _file("dinat/imagenet1k/dinat_s_large_in1k_224.pth"),
    "dinat_s_large.in22k": _file("dinat/imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841),
    "dinat_s_large_384.in22k_ft_in1k": _file("dinat/imagenet1k/dinat_s_large_in1k_384.pth", **_384),
    "nat_isotropic_small.in1k": _file("dinat/isotropic/nat_isotropic_small_in1k_224.pth"),
    "dinat_isotropic_small.in1k": _file("dinat/isotropic/dinat_isotropic_small_in1k_224.pth"),
    "vitrpb_isotropic_small.in1k": _file("dinat/isotropic/vitrpb_small_in1k_224.pth"),
    "nat_isotropic_base.in1k": _file("dinat/isotropic/nat_isotropic_base_in1k_224.pth"),
    "dinat_isotropic_base.in1k": _file("dinat/isotropic/dinat_isotropic_base_in1k_224.pth"),
    "vitrpb_isotropic_base.in1k": _file("dinat/isotropic/vitrpb_base_in1k_224.pth"),
}
_TEST = dict(input_size=(3, 64, 64), license="apache-2.0", origin_url=None)


def _cfg(name: str, **facts: Any) -> dict[str, Any]:
    """A `PretrainedCfg` with defaults: images of 224, a crop of 0.875, ImageNet's mean and standard deviation."""
    isotropic = "isotropic" in name
    size = facts.get("input_size", (3, 224, 224))[1:]
    return {
        "pool_size": tuple(length // (16 if isotropic else 32) for length in size),
        "first_conv": "patch_embed.proj" if isotropic or "dinat_s_" in name else "patch_embed.proj.0",
        "classifier": "head",
        "fixed_input_size": "vitrpb" in name,
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": "arXiv:2204.07143" if family(name.partition(".")[0]) == "NAT" else "arXiv:2209.15001",
        **facts,
    }


def family(name: str) -> str:
    """The family of a model of this file: ``"NAT"``, ``"DiNAT"``, ``"DiNAT_s"`` or ``"isotropic"``."""
    if "isotropic" in name:
        return "isotropic"
    if name.startswith("dinat_s_"):
        return "DiNAT_s"
    return "DiNAT" if "dinat" in name else "NAT"


default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg(name, **facts) for name, facts in _WEIGHTS.items()},
        **{name: _cfg(name, **_TEST) for name in ("test_foveal_nat.untrained", "test_foveal_dinat.untrained")},
    }
)


_create = partial(create, checkpoint_filter_fn)


def _alternating(depths: Sequence[int], *largest: int) -> tuple[tuple[int, ...], ...]:
    """Dilations as published: every level alternates between 1 and its largest."""
    return tuple(tuple(1 if j % 2 == 0 else d for j in range(n)) for n, d in zip(depths, largest, strict=True))


_D6, _D18 = (3, 4, 6, 5), (3, 4, 18, 5)
_MINI = dict(depths=_D6, num_heads=(2, 4, 8, 16), embed_dim=64, mlp_ratio=3, drop_path_rate=0.2)
_TINY = dict(depths=_D18, num_heads=(2, 4, 8, 16), embed_dim=64, mlp_ratio=3, drop_path_rate=0.2)
_SMALL = dict(depths=_D18, num_heads=(3, 6, 12, 24), embed_dim=96, mlp_ratio=2, drop_path_rate=0.3)
_BASE = dict(depths=_D18, num_heads=(4, 8, 16, 32), embed_dim=128, mlp_ratio=2, drop_path_rate=0.5, layer_scale=1e-5)
_LARGE = dict(depths=_D18, num_heads=(6, 12, 24, 48), embed_dim=192, mlp_ratio=2, drop_path_rate=0.35)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini, 20 M parameters."""
    return _create(NAT, "nat_mini", pretrained, kwargs, **_MINI)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny, 28 M parameters."""
    return _create(NAT, "nat_tiny", pretrained, kwargs, **_TINY)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small, 51 M parameters; unlike DiNAT-Small it has LayerScale."""
    return _create(NAT, "nat_small", pretrained, kwargs, **_SMALL, layer_scale=1e-5)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base, 90 M parameters."""
    return _create(NAT, "nat_base", pretrained, kwargs, **_BASE)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini, 20 M parameters."""
    return _create(NAT, "dinat_mini", pretrained, kwargs, **_MINI, dilations=_alternating(_D6, 8, 4, 2, 1))


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny, 28 M parameters."""
    return _create(NAT, "dinat_tiny", pretrained, kwargs, **_TINY, dilations=_alternating(_D18, 8, 4, 2, 1))


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small, 51 M parameters; unlike NAT-Small it has no LayerScale."""
    return _create(NAT, "dinat_small", pretrained, kwargs, **_SMALL, dilations=_alternating(_D18, 8, 4, 2, 1))


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base, 90 M parameters."""
    return _create(NAT, "dinat_base", pretrained, kwargs, **_BASE, dilations=_alternating(_D18, 8, 4, 2, 1))


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large, 201 M parameters. ImageNet-22K pretraining used a drop_path_rate of 0.2."""
    return _create(NAT, "dinat_large", pretrained, kwargs, **_LARGE, dilations=_alternating(_D18, 8, 4, 2, 1))


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large at 384."""
    return _create(NAT, "dinat_large_384", pretrained, kwargs, **_LARGE, dilations=_alternating(_D18, 13, 6, 3, 1))


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large at 384 with kernel 11."""
    args = dict(_LARGE, kernel_size=11, dilations=_alternating(_D18, 8, 4, 2, 1))
    return _create(NAT, "dinat_large_384_11x11", pretrained, kwargs, **args)


_S6, _S18 = (2, 2, 6, 2), (2, 2, 18, 2)
_S_TINY = dict(depths=_S6, num_heads=(3, 6, 12, 24), embed_dim=96, mlp_ratio=4, drop_path_rate=0.2)
_S_SMALL = dict(depths=_S18, num_heads=(3, 6, 12, 24), embed_dim=96, mlp_ratio=4, drop_path_rate=0.3)
_S_BASE = dict(depths=_S18, num_heads=(4, 8, 16, 32), embed_dim=128, mlp_ratio=4, drop_path_rate=0.5)
_S_LARGE = dict(depths=_S18, num_heads=(6, 12, 24, 48), embed_dim=192, mlp_ratio=4, drop_path_rate=0.35)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Tiny, 28 M parameters."""
    return _create(DiNATs, "dinat_s_tiny", pretrained, kwargs, **_S_TINY, dilations=_alternating(_S6, 8, 4, 2, 1))


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Small, 50 M parameters."""
    return _create(DiNATs, "dinat_s_small", pretrained, kwargs, **_S_SMALL, dilations=_alternating(_S18, 8, 4, 2, 1))


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Base, 88 M parameters."""
    return _create(DiNATs, "dinat_s_base", pretrained, kwargs, **_S_BASE, dilations=_alternating(_S18, 8, 4, 2, 1))


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Large, 197 M parameters. ImageNet-22K pretraining used a drop_path_rate of 0.2."""
    return _create(DiNATs, "dinat_s_large", pretrained, kwargs, **_S_LARGE, dilations=_alternating(_S18, 8, 4, 2, 1))


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Large at 384."""
    args = dict(_S_LARGE, dilations=_alternating(_S18, 13, 6, 3, 1))
    return _create(DiNATs, "dinat_s_large_384", pretrained, kwargs, **args)


_ISO_SMALL = dict(embed_dim=384, depth=12, num_heads=12, drop_path_rate=0.1)
_ISO_BASE = dict(embed_dim=768, depth=12, num_heads=24, drop_path_rate=0.4)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic NAT-Small, 22 M parameters."""
    return _create(Isotropic, "nat_isotropic_small", pretrained, kwargs, **_ISO_SMALL)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic NAT-Base, 86 M parameters."""
    return _create(Isotropic, "nat_isotropic_base", pretrained, kwargs, **_ISO_BASE)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic DiNAT-Small, 22 M parameters."""
    return _create(Isotropic, "dinat_isotropic_small", pretrained, kwargs, **_ISO_SMALL, dilations=(1, 2) * 6)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic DiNAT-Base, 86 M parameters."""
    return _create(Isotropic, "dinat_isotropic_base", pretrained, kwargs, **_ISO_BASE, dilations=(1, 2) * 6)


@register_model
def vitrpb_isotropic_small(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """ViT-Small with relative position bias, 22 M parameters; fixed input size, ``img_size=``."""
    return _create(Isotropic, "vitrpb_isotropic_small", pretrained, kwargs, **_ISO_SMALL, full_attention=True)


@register_model
def vitrpb_isotropic_base(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """ViT-Base with relative position bias, 86 M parameters; fixed input size, ``img_size=``."""
    return _create(Isotropic, "vitrpb_isotropic_base", pretrained, kwargs, **_ISO_BASE, full_attention=True)


@register_model
def test_foveal_nat(pretrained: bool = False, **kwargs: Any) -> NAT:
    """A very small NAT with LayerScale, for tests and demonstrations."""
    args = dict(depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), embed_dim=16, mlp_ratio=2, kernel_size=5, layer_scale=1e-5)
    return _create(NAT, "test_foveal_nat", pretrained, kwargs, **args)


@register_model
def test_foveal_dinat(pretrained: bool = False, **kwargs: Any) -> NAT:
    """A very small DiNAT, for tests and demonstrations."""
    depths = (2, 2, 2, 1)
    args: dict[str, Any] = dict(depths=depths, num_heads=(1, 2, 4, 8), embed_dim=16, mlp_ratio=2, kernel_size=3)
    args["dilations"] = _alternating(depths, 5, 2, 1, 1)
    return _create(NAT, "test_foveal_dinat", pretrained, kwargs, **args)
