"""MaxViT.

Paper: MaxViT: Multi-Axis Vision Transformer (Tu et al., ECCV 2022, arXiv:2204.01697). Code and weights of the authors:
Apache-2.0, https://github.com/google-research/maxvit. timm has them converted to PyTorch (``maxvit_*_tf_*``); these
load unchanged and give timm's outputs.

A convolutional stem of stride 2, then four stages of blocks. A block is an MBConv (the first of a stage halves the
map), attention inside windows (block attention) and attention across a grid over the whole map (grid attention), each
attention with its own MLP. The stem and MBConv are timm's; the attention uses this package's operation.

timm's models take their image size or multiples of it. These take any size: see ``partition`` of `MaxViT`.

With ``features_only`` timm returns five feature maps, including the stem's at stride 2; these return the four of the
stages.

Feature maps are ``[B, C, H, W]`` between stages, in the channels_last memory format, so that the attention's
``[B, H, W, C]`` is a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, DropPath, LayerNorm2d, NormMlpClassifierHead
from timm.models import generate_default_cfgs, register_model
from timm.models.maxxvit import MaxxVitConvCfg, MbConvBlock, Stem
from torch import nn

from .attention import PartitionAttention2d, RelativePositionTable, resample_table
from .base import POOLS, Backbone, check_head, check_names, create, keep_new, registered_cfg, unwrap
from .layers import (
    ConvSame,
    Mlp,
    Stage,
    TanhGELU,
    channels_last,
    check_foldable,
    drop_path_rates,
    fold_batch_norm,
    fx_leaf,
    guard_activations,
    positive_pair,
)

__all__ = ["MaxViT", "checkpoint_filter_fn", "family"]

_CONV_EPS = 1e-3
_CONV = MaxxVitConvCfg(norm_eps=_CONV_EPS, act_layer="gelu_tanh", padding="same")  # TensorFlow's, as published
_NORM_EPS = 1e-5
_PARTITION_RATIO = 32  # image size over partition size, as published: the last map is one window
_TABLE = "relative_position_bias_table"


class AvgPoolSame(nn.Module):
    """2x2 average pooling of stride 2. An odd length is padded with a zero that counts, as in timm's `AvgPool2dSame`;
    unlike there, even lengths are not copied."""

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bottom, right = (size % 2 for size in x.shape[-2:])
        return F.avg_pool2d(F.pad(x, (0, right, 0, bottom)) if bottom or right else x, 2)


class PartitionBlock(nn.Module):
    """Pre-norm partition attention and MLP, each with stochastic depth, on ``[B, H, W, C]``."""

    def __init__(
        self,
        attn: PartitionAttention2d,
        dim: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.mlp.act = TanhGELU((self.mlp, "fc1"))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MaxViTBlock(nn.Module):
    """MBConv, block attention, grid attention (section 3.3, figure 2), on ``[B, C, H, W]``."""

    def __init__(
        self,
        in_chs: int,
        dim: int,
        stride: int,
        head_dim: int,
        partition_size: tuple[int, int],
        parts: int | None,
        mlp_ratio: float,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv = MbConvBlock(in_chs, dim, stride=stride, cfg=_CONV, drop_path=drop_path)
        for norm in (self.conv.norm1, self.conv.norm2):
            norm.act = TanhGELU((norm, "drop"))
        if stride == 2:
            self.conv.shortcut.pool = AvgPoolSame()
        attentions = (
            PartitionAttention2d(
                dim, dim // head_dim, partition_size, kind, parts=parts, attn_drop=attn_drop, proj_drop=proj_drop
            )
            for kind in ("block", "grid")
        )
        self.attn_block, self.attn_grid = (
            PartitionBlock(attn, dim, mlp_ratio, proj_drop, drop_path) for attn in attentions
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.attn_grid(self.attn_block(x)).permute(0, 3, 1, 2)


class MaxViT(Backbone):
    """MaxViT. Takes images of any size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        img_size: image size, an int or (rows, columns), which sets ``partition_size``: 1/32 of it, rounded down, at
            least 1. Other image sizes are accepted.
        partition_size: positions per window and points of the grid along an axis, an int or (rows, columns), in all
            stages; None: from ``img_size``. The position bias tables are for this size; those of a checkpoint for
            another size are resampled on load.
        partition: for images of a size other than ``img_size``. ``"fixed"``: windows and grids keep
            ``partition_size``; if it does not divide a map, those at the right and the bottom are smaller (equal to
            timm for multiples of the size). ``"scaled"``: keep the number of windows, 8, 4, 2 and 1 along an axis from
            the first stage to the last; their size follows the map, and the tables are resampled (equal to timm's model
            of that ``img_size`` with these weights).
        depths: blocks per stage.
        dims: channels per stage.
        stem_width: channels of the stem.
        head_dim: channels per attention head.
        mlp_ratio: hidden channels of the MLP, relative to the stage's.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention projection and in the MLP.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.
        out_norm: add a LayerNorm per stage, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to
            their maps, for detection and segmentation.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.maxvit import MaxViT
        >>> model = timm.create_model("test_foveal_maxvit", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('MaxViT', (1, 10))
        >>> assert isinstance(model, MaxViT)
        >>> model.reparameterize()(torch.randn(1, 3, 64, 96)).shape  # folded, for inference
        torch.Size([1, 10])
    """

    output_fmt = "NCHW"
    tables = (_TABLE,)

    head: NormMlpClassifierHead

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        img_size: int | tuple[int, int] = 224,
        partition_size: int | tuple[int, int] | None = None,
        partition: str = "fixed",
        depths: Sequence[int] = (2, 2, 5, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        stem_width: int = 64,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        if len(depths) != len(dims):
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} differ in length")
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"dims {tuple(dims)} are not all divisible by head_dim {head_dim}")
        if partition not in ("fixed", "scaled"):
            raise ValueError(f'partition must be "fixed" or "scaled", got {partition!r}')
        self.partition = partition
        self.drop_rate = drop_rate
        self.img_size, self.partition_size = _sizes(img_size, partition_size)
        options: dict[str, Any] = dict(head_dim=head_dim, partition_size=self.partition_size, mlp_ratio=mlp_ratio)
        options |= dict(proj_drop=proj_drop_rate, attn_drop=attn_drop_rate)

        self.stem = _stem(in_chans, stem_width)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        in_chs = stem_width
        for i, dim in enumerate(dims):
            parts = _PARTITION_RATIO // (4 * 2**i) if partition == "scaled" else None
            blocks = []
            for j, rate in enumerate(rates[i]):
                blocks.append(MaxViTBlock(in_chs, dim, 2 if j == 0 else 1, parts=parts, drop_path=rate, **options))
                in_chs = dim
            stages.append(Stage(blocks))
            self._add_map(dim, f"stages.{i}", _layer_norm)
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if type(module) is Conv2dSame:
                module.__class__ = ConvSame
        _init_weights(self)
        self.num_features = self.embed_dim = dims[-1]
        self._set_head(num_classes, global_pool, dims[-1])
        guard_activations(self)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        partition_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size in place: set the windows and resample the position bias tables.

        The tables become new parameters; create the optimizer afterwards.

        Args:
            img_size: int or (rows, columns); None: unchanged.
            partition_size: int or (rows, columns); None: 1/32 of ``img_size``, rounded down.
        """
        img_size = self.img_size if img_size is None else img_size
        self.img_size, self.partition_size = _sizes(img_size, partition_size)
        for module in self.modules():
            if isinstance(module, RelativePositionTable):
                module.set_window_size(self.partition_size)
        if hasattr(self, "_model_args"):  # from which timm (>= 1.0.30) rebuilds this model from its saved files
            self._model_args = {**self._model_args, "img_size": self.img_size, "partition_size": self.partition_size}
            self._traits = {**self._traits, "img_size": self.img_size}

    def reparameterize(self) -> MaxViT:
        """Fold the batch norms into the adjacent convolutions in place, for deployment.

        Outputs equal those in evaluation mode up to rounding. Parameter names change: such a model does not load
        published checkpoints and should not be trained. Idempotent.

        Returns:
            self.
        """
        _fold(self.stem, "conv1", "norm1")
        for module in list(self.modules()):
            if isinstance(module, MbConvBlock):
                _fold(module, "conv1_1x1", "norm1")
                _fold(module, "conv2_kxk", "norm2")
                _fold_before(module.conv1_1x1, module, "pre_norm")
        return self

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise learning rates."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stem", blocks=[(r"^stages\.(\d+)", None), (r"^norm", (99999,))] if coarse else fine)

    def _set_head(self, num_classes: int, global_pool: str, hidden_size: int | None) -> None:
        pools = [pool for pool in POOLS if pool != "catavgmax"]  # the head's norm has the channels of the map
        check_head(num_classes, global_pool, pools)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head = NormMlpClassifierHead(
            self.num_features,
            num_classes,
            hidden_size=hidden_size,
            pool_type=global_pool,
            drop_rate=self.drop_rate,
            norm_layer=_layer_norm,
        )
        self.head_hidden_size = self.head.num_features

    def get_classifier(self) -> nn.Module:
        """The classifier, the last layer of the head: a Linear (a 1x1 Conv2d without pooling), or an Identity."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for ``num_classes`` (0: none), and the pooling if one is given. The norm
        and the hidden layer of the head keep their weights."""
        old, like = self.head, next(self.parameters())
        self._set_head(num_classes, self.global_pool if global_pool is None else global_pool, old.hidden_size)
        head = self.head.to(device=like.device, dtype=like.dtype).train(self.training)
        head.norm = old.norm
        with torch.no_grad():  # Linear and 1x1 Conv2d differ only in shape
            for new, kept in zip(head.pre_logits.parameters(), old.pre_logits.parameters(), strict=True):
                new.copy_(kept.view_as(new))
                new.requires_grad_(kept.requires_grad)

    def _remove_head(self) -> None:
        self._set_head(0, "", None)
        self.head.norm = nn.Identity()
        self.head.train(self.training)

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(channels_last(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """``[B, num_features, h, w]`` to the logits, or with ``pre_logits`` to ``[B, head_hidden_size]``: pooled,
        normalized, through the hidden layer and tanh."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)  # also a head that the user put there


_layer_norm = partial(LayerNorm2d, eps=_NORM_EPS)


def _stem(in_chans: int, width: int) -> Stem:
    stem = Stem(
        in_chans,
        width,
        padding=_CONV.padding,
        bias=True,
        act_layer=_CONV.act_layer,
        norm_layer=_CONV.norm_layer,
        norm_eps=_CONV_EPS,
    )
    stem.norm1.act = TanhGELU((stem.norm1, "drop"))
    return stem


def _sizes(
    img_size: int | tuple[int, int], partition_size: int | tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Image and partition size as pairs."""
    rows, columns = positive_pair("img_size", img_size)
    if partition_size is None:
        partition_size = max(1, rows // _PARTITION_RATIO), max(1, columns // _PARTITION_RATIO)
    return (rows, columns), positive_pair("partition_size", partition_size)


def _init_weights(model: nn.Module) -> None:
    """As timm: convolutions by fan-out (EfficientNet), Linear layers Xavier-uniform (ViT), biases near 0."""
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=math.sqrt(2.0 / fan_out))
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if "mlp" in name:
                nn.init.normal_(m.bias, std=1e-6)
            else:
                nn.init.zeros_(m.bias)


def _fold(parent: nn.Module, conv: str, name: str) -> None:
    """Fold the batch norm ``name`` of ``parent``, if not yet folded, into the convolution before it."""
    norm = getattr(parent, name)
    if fold_batch_norm(getattr(parent, conv), norm):
        setattr(parent, name, TanhGELU((parent, conv)).train(norm.training))


def _fold_before(conv: Any, parent: nn.Module, name: str) -> None:
    """Fold the batch norm ``name`` of ``parent``, if not yet folded, into the 1x1 convolution after it."""
    norm = getattr(parent, name)
    if getattr(norm, "running_var", None) is not None:  # also synchronized and frozen ones
        check_foldable(conv, norm)
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        with torch.no_grad():
            conv.bias += conv.weight[:, :, 0, 0] @ shift
            conv.weight *= scale[:, None, None]
        setattr(parent, name, nn.Identity())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: dict[str, Any], model: MaxViT) -> dict[str, torch.Tensor]:
    """A checkpoint of timm's ``maxvit_*_tf_*`` or of these models as a state dict of ``model``; changes neither.

    The names are the same. Position bias tables for another partition size are resampled, as in timm; the layers of the
    head become Linear or 1x1 Conv2d, depending on the pooling. If the checkpoint has no norms of ``out_norm``, those of
    the model keep their values.

    Args:
        state_dict: names to tensors, or a checkpoint with them under ``state_dict`` or ``model``; the prefixes of
            ``DistributedDataParallel``, ``features_only`` and detectors (``module.``, ``model.``, ``backbone.``) are
            removed.
        model: the model to load the result into.

    Raises:
        ValueError: the parameter names (except the head's, which timm handles) do not fit the model.
    """
    state_dict = unwrap(state_dict)

    own = model.state_dict()
    keep_new(state_dict, own)
    check_names(state_dict, own)
    for name, value in state_dict.items():
        if name.endswith(_TABLE):
            rows, columns = ((size + 1) // 2 for size in own[name].shape[1:])
            state_dict[name] = resample_table(value, (rows, columns))
        elif name.startswith("head.") and name in own and value.numel() == own[name].numel():
            state_dict[name] = value.reshape(own[name].shape)
    return state_dict


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------


_TAGS = {
    "in1k": [f"{size}_{pixels}" for size in ("tiny", "small", "base", "large") for pixels in (224, 384, 512)],
    "in21k": ["base_224", "large_224", "xlarge_224"],
    "in21k_ft_in1k": [f"{size}_{pixels}" for size in ("base", "large", "xlarge") for pixels in (384, 512)],
}


def _cfg(size: str, tag: str, **facts: Any) -> dict[str, Any]:
    """timm's configuration of the same weights, including its copy on the hub."""
    theirs = registered_cfg(f"maxvit_{size.replace('_', '_tf_')}.{tag}")
    return {
        **theirs.to_dict(),
        "fixed_input_size": False,
        "origin_url": "https://github.com/google-research/maxvit",
        "paper_ids": "arXiv:2204.01697",
        **facts,
    }


_TEST = dict(input_size=(3, 64, 64), pool_size=(2, 2), hf_hub_id=None)

default_cfgs = generate_default_cfgs(
    {
        **{f"maxvit_{size}.{tag}": _cfg(size, tag) for tag, sizes in _TAGS.items() for size in sizes},
        "test_foveal_maxvit.untrained": _cfg("tiny_224", "in1k", **_TEST),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"MaxViT"``."""
    return "MaxViT"


_create = partial(create, checkpoint_filter_fn, MaxViT)

# depths, widths and stochastic depth: table 1 of the paper and the authors' configurations
_TINY = dict(stem_width=64, depths=(2, 2, 5, 2), dims=(64, 128, 256, 512), drop_path_rate=0.2)
_SMALL = dict(stem_width=64, depths=(2, 2, 5, 2), dims=(96, 192, 384, 768), drop_path_rate=0.3)
_BASE = dict(stem_width=64, depths=(2, 6, 14, 2), dims=(96, 192, 384, 768), drop_path_rate=0.4)
_LARGE = dict(stem_width=128, depths=(2, 6, 14, 2), dims=(128, 256, 512, 1024), drop_path_rate=0.6)
# its stochastic depth is not published; MaxViT-L's here
_XLARGE = dict(stem_width=192, depths=(2, 6, 14, 2), dims=(192, 384, 768, 1536), drop_path_rate=0.6)


@register_model
def maxvit_tiny_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Tiny, 31 M parameters, for 224 x 224."""
    return _create("maxvit_tiny_224", pretrained, kwargs, **_TINY, img_size=224)


@register_model
def maxvit_tiny_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Tiny, 31 M parameters, for 384 x 384."""
    return _create("maxvit_tiny_384", pretrained, kwargs, **_TINY, img_size=384)


@register_model
def maxvit_tiny_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Tiny, 31 M parameters, for 512 x 512."""
    return _create("maxvit_tiny_512", pretrained, kwargs, **_TINY, img_size=512)


@register_model
def maxvit_small_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Small, 69 M parameters, for 224 x 224."""
    return _create("maxvit_small_224", pretrained, kwargs, **_SMALL, img_size=224)


@register_model
def maxvit_small_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Small, 69 M parameters, for 384 x 384."""
    return _create("maxvit_small_384", pretrained, kwargs, **_SMALL, img_size=384)


@register_model
def maxvit_small_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Small, 69 M parameters, for 512 x 512."""
    return _create("maxvit_small_512", pretrained, kwargs, **_SMALL, img_size=512)


@register_model
def maxvit_base_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Base, 120 M parameters, for 224 x 224."""
    return _create("maxvit_base_224", pretrained, kwargs, **_BASE, img_size=224)


@register_model
def maxvit_base_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Base, 120 M parameters, for 384 x 384."""
    return _create("maxvit_base_384", pretrained, kwargs, **_BASE, img_size=384)


@register_model
def maxvit_base_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Base, 120 M parameters, for 512 x 512."""
    return _create("maxvit_base_512", pretrained, kwargs, **_BASE, img_size=512)


@register_model
def maxvit_large_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Large, 212 M parameters, for 224 x 224."""
    return _create("maxvit_large_224", pretrained, kwargs, **_LARGE, img_size=224)


@register_model
def maxvit_large_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Large, 212 M parameters, for 384 x 384."""
    return _create("maxvit_large_384", pretrained, kwargs, **_LARGE, img_size=384)


@register_model
def maxvit_large_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-Large, 212 M parameters, for 512 x 512."""
    return _create("maxvit_large_512", pretrained, kwargs, **_LARGE, img_size=512)


@register_model
def maxvit_xlarge_224(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-XLarge, 475 M parameters, for 224 x 224."""
    return _create("maxvit_xlarge_224", pretrained, kwargs, **_XLARGE, img_size=224)


@register_model
def maxvit_xlarge_384(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-XLarge, 475 M parameters, for 384 x 384."""
    return _create("maxvit_xlarge_384", pretrained, kwargs, **_XLARGE, img_size=384)


@register_model
def maxvit_xlarge_512(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """MaxViT-XLarge, 475 M parameters, for 512 x 512."""
    return _create("maxvit_xlarge_512", pretrained, kwargs, **_XLARGE, img_size=512)


@register_model
def test_foveal_maxvit(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    """A very small MaxViT, for tests and demonstrations."""
    args = dict(stem_width=16, depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), head_dim=16, img_size=64)
    return _create("test_foveal_maxvit", pretrained, kwargs, **args)
