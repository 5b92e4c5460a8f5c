"""AsCAN: convolutional blocks first, transformer blocks last. A reconstruction.

Paper: AsCAN: Asymmetric Convolution-Attention Networks for Efficient Recognition and Generation (Kag et al., NeurIPS
2024, arXiv:2411.04967). **This is a reconstruction: the paper's code and weights are not public, and the layout is
ours. It is sized to 55 M parameters and 7.7 GMACs, 98 M and 16.7, 173 M and 30.7; these figures are not verified
against the paper.**

From the paper's abstract and overview figure: a convolutional stem, four stages of convolutional (C) and transformer
(T) blocks, distributed asymmetrically, with more C early and more T late; plain attention in the T blocks; pooling and
a classifier. The rest is chosen here:

* a string of ``C`` and ``T`` describes each stage, see `AsCAN`;
* C is FusedMBConv (EfficientNetV2, arXiv:2104.00298): 3x3 convolution to ``expansion`` times the width, squeeze and
  excitation, 1x1 convolution back, and a residual;
* T is a pre-norm transformer block: attention over the whole map with relative position bias, and an MLP;
* every stage halves the map: a leading C has stride 2, in the 3x3 convolution and in a 1x1 convolution of the residual;
  a leading T follows a 3x3 convolution of stride 2 with a norm.

Feature maps are channels-last between the blocks, ``[B, H, W, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, SqueezeExcite, create_norm_layer, get_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import FullAttention2d, RelativePositionTable, resample_table
from .base import Backbone, check_names, create, keep_new, unwrap
from .layers import Mlp, Stage, drop_path_rates, fold_batch_norm, for_convolution, init_weights, positive_pair

__all__ = ["AsCAN", "checkpoint_filter_fn", "family"]

NORMS = ("batchnorm2d", "groupnorm1", "layernorm2d")
ACTIVATIONS = ("gelu", "hard_swish", "relu", "silu")
POSITIONS = ("bias", "none")


class ConvNormAct(nn.Module):
    """Convolution (stride 2 rounds odd lengths up), norm, and optional activation; NCHW."""

    def __init__(
        self, in_chs: int, out_chs: int, kernel_size: int, stride: int, norm_layer: str, act_layer: str | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
        self.norm = create_norm_layer(norm_layer, out_chs)
        act: Any = nn.Identity if act_layer is None else get_act_layer(act_layer)
        self.act = act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))

    def reparameterize(self) -> None:
        """Fold a BatchNorm into the convolution, in place."""
        if fold_batch_norm(self.conv, self.norm):
            self.norm = nn.Identity()


class Downsample(ConvNormAct):
    """3x3 convolution of stride 2 and norm, on channels-last maps."""

    def __init__(self, in_chs: int, out_chs: int, norm_layer: str) -> None:
        super().__init__(in_chs, out_chs, 3, 2, norm_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(for_convolution(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class ConvBlock(nn.Module):
    """C: FusedMBConv. ``[B, H, W, in_chs]`` to ``[B, H', W', dim]``; stride 2 rounds odd lengths up."""

    def __init__(
        self,
        in_chs: int,
        dim: int,
        stride: int,
        expansion: float,
        se_ratio: float,
        norm_layer: str,
        act_layer: str,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden, squeezed = int(dim * expansion), int(dim * se_ratio)
        self.expand = ConvNormAct(in_chs, hidden, 3, stride, norm_layer, act_layer)
        act: Any = get_act_layer(act_layer)
        self.se = SqueezeExcite(hidden, rd_channels=squeezed, act_layer=act) if squeezed else nn.Identity()
        self.project = ConvNormAct(hidden, dim, 1, 1, norm_layer)
        straight = stride == 1 and in_chs == dim
        self.shortcut = nn.Identity() if straight else ConvNormAct(in_chs, dim, 1, stride, norm_layer)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = for_convolution(x.permute(0, 3, 1, 2))
        y = self.project(self.se(self.expand(x)))
        return (self.shortcut(x) + self.drop_path(y)).permute(0, 2, 3, 1)


class TransformerBlock(nn.Module):
    """T: pre-norm attention over the whole map and MLP. ``[B, H, W, dim]`` to the same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int] | None,
        mlp_ratio: float,
        act_layer: str,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = FullAttention2d(dim, num_heads, map_size, attn_drop=attn_drop, proj_drop=proj_drop)
        self.norm2 = nn.LayerNorm(dim)
        act: Any = get_act_layer(act_layer)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act, drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AsCAN(Backbone):
    """AsCAN, a reconstruction (see the module docstring). Takes images of any size.

    Args:
        img_size: training size, an int or (height, width). The position bias tables are for maps of this size and are
            resampled for others, see `set_input_size`.
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        stages: the blocks of each of the four stages, a string of ``C`` and ``T`` such as ``"CCT"``.
        embed_dims: channels per stage.
        stem_width: channels of the stem's two 3x3 convolutions, the first of stride 2.
        expansion: hidden channels of a C block, relative to ``embed_dims``.
        se_ratio: channels of its squeeze and excitation, relative to ``embed_dims``; 0 for none.
        mlp_ratio: hidden channels of the MLP of a T block, relative to ``embed_dims``.
        head_dim: channels of an attention head; divides the channels of every stage that has a T.
        norm_layer: norm of stem, C blocks and downsamplers: ``"batchnorm2d"``, ``"groupnorm1"`` or ``"layernorm2d"``.
            T blocks have LayerNorm.
        act_layer: activation: ``"gelu"``, ``"hard_swish"``, ``"relu"`` or ``"silu"``.
        position: ``"bias"``, relative position bias tables, or ``"none"``.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention projection and in the MLP.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.
        out_norm: add a LayerNorm per stage, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to
            their maps, for dense prediction.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.ascan import AsCAN
        >>> model = timm.create_model("test_foveal_ascan", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('AsCAN', (1, 10))
        >>> assert isinstance(model, AsCAN)
        >>> model.reparameterize()(torch.randn(1, 3, 64, 96)).shape  # folded, for inference
        torch.Size([1, 10])
    """

    tables = (".relative_position_bias_table",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        stages: Sequence[str] = ("CC", "CC", "CCTTTTT", "CTTTTTT"),
        embed_dims: Sequence[int] = (80, 160, 320, 640),
        stem_width: int = 64,
        expansion: float = 4.0,
        se_ratio: float = 0.25,
        mlp_ratio: float = 4.0,
        head_dim: int = 32,
        norm_layer: str = "batchnorm2d",
        act_layer: str = "gelu",
        position: str = "bias",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        _check_layout(stages, embed_dims, head_dim)
        _check_choice("norm_layer", norm_layer, NORMS)
        _check_choice("act_layer", act_layer, ACTIVATIONS)
        _check_choice("position", position, POSITIONS)
        self.img_size = positive_pair("img_size", img_size)
        self.reparameterized = False

        self.stem = nn.Sequential(
            ConvNormAct(in_chans, stem_width, 3, 2, norm_layer, act_layer),
            ConvNormAct(stem_width, stem_width, 3, 1, norm_layer, act_layer),
        )
        conv: dict[str, Any] = dict(expansion=expansion, se_ratio=se_ratio, norm_layer=norm_layer, act_layer=act_layer)
        attention: dict[str, Any] = dict(mlp_ratio=mlp_ratio, act_layer=act_layer)
        attention |= dict(proj_drop=proj_drop_rate, attn_drop=attn_drop_rate)
        rates = drop_path_rates(drop_path_rate, [len(stage) for stage in stages])
        modules = []
        before = stem_width
        for i, (stage, dim) in enumerate(zip(stages, embed_dims, strict=True)):
            size = _map_size(self.img_size, 4 * 2**i) if position == "bias" else None
            downsample = Downsample(before, dim, norm_layer) if stage[0] == "T" else None
            blocks = []
            for j, (kind, rate) in enumerate(zip(stage, rates[i], strict=True)):
                if kind == "C":
                    blocks.append(ConvBlock(before, dim, 2 if j == 0 else 1, drop_path=rate, **conv))
                else:
                    blocks.append(TransformerBlock(dim, dim // head_dim, size, drop_path=rate, **attention))
                before = dim
            modules.append(Stage(blocks, downsample))
            self._add_map(dim, f"stages.{i}")
        self.stages = nn.Sequential(*modules)
        self.norm = nn.LayerNorm(before)
        init_weights(self)
        self._init_head(before, num_classes, global_pool, drop_rate)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the position bias tables permanently to another image size, for training at that size.

        Otherwise they are resampled on the fly for images of another size than ``img_size``. The tables become new
        parameters; create the optimizer afterwards.

        Raises:
            ValueError: the size is not a positive int or a pair of them; the model is not changed.
        """
        self.img_size = positive_pair("img_size", img_size)
        for stage, info in zip(self.stages, self.feature_info, strict=True):
            for module in stage.modules():
                if isinstance(module, RelativePositionTable):
                    module.set_window_size(_map_size(self.img_size, info["reduction"]))

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x).permute(0, 2, 3, 1)

    def reparameterize(self) -> AsCAN:
        """Fold every BatchNorm into the convolution before it, in place, for inference.

        Outputs equal those in evaluation mode up to rounding. Idempotent. The state dict then has other names and only
        fits a reparameterized model.

        Returns:
            The model itself.
        """
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                module.reparameterize()
        self.reparameterized = True
        return self


def _map_size(img_size: tuple[int, int], stride: int) -> tuple[int, int]:
    return math.ceil(img_size[0] / stride), math.ceil(img_size[1] / stride)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_layout(stages: Sequence[str], embed_dims: Sequence[int], head_dim: int) -> None:
    if isinstance(stages, str) or len(stages) != 4 or not all(isinstance(stage, str) for stage in stages):
        raise ValueError(f"stages must be four strings, the blocks of each stage, got {stages!r}")
    for i, stage in enumerate(stages):
        if not stage or set(stage) - set("CT"):
            raise ValueError(f"a stage must be a non-empty string of C and T; stage {i} is {stage!r}")
    if len(embed_dims) != 4:
        raise ValueError(f"embed_dims must have four entries, one for each stage, got {tuple(embed_dims)}")
    for i, (stage, dim) in enumerate(zip(stages, embed_dims, strict=True)):
        if "T" in stage and dim % head_dim:
            raise ValueError(f"embed_dims[{i}] = {dim} is not divisible by head_dim {head_dim}, and stage {i} has a T")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: dict[str, Any], model: AsCAN) -> dict[str, torch.Tensor]:
    """Convert a checkpoint of these models to a state dict of ``model``. Changes neither argument.

    There are no published checkpoints. Supports state dicts of these models, also wrapped by ``features_only`` or
    ``DistributedDataParallel``; position bias tables for another ``img_size`` are resampled. Norms that the checkpoint
    lacks (those of ``out_norm``, or the final one) keep their values.

    Args:
        state_dict: names to tensors, or a checkpoint with them under ``state_dict`` or ``model``.
        model: the model to load the result into.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    state_dict = unwrap(state_dict)
    own = model.state_dict()

    keep_new(state_dict, own)
    if not any(name.startswith(("norm.", "head.")) for name in state_dict):  # of features_only
        state_dict.update({name: own[name] for name in ("norm.weight", "norm.bias")})
    if not model.reparameterized and "stem.0.norm.weight" not in state_dict and "stem.0.conv.bias" in state_dict:
        raise ValueError(
            "the checkpoint is of a reparameterized model: make the model, call reparameterize(), then load_state_dict"
        )
    check_names(state_dict, own)
    for name in state_dict:
        if name.endswith(model.tables):
            rows, columns = own[name].shape[1:]
            state_dict[name] = resample_table(state_dict[name], ((rows + 1) // 2, (columns + 1) // 2))
    return state_dict


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------

_NOTES = (
    "A reconstruction: the paper's code and weights are not public, and the layout is ours. The figures that it is "
    "sized to are not verified against the paper.",
)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "first_conv": "stem.0.conv",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": None,
        "paper_ids": "arXiv:2411.04967",
        "notes": _NOTES,
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "ascan_tiny.untrained": _cfg(),
        "ascan_base.untrained": _cfg(),
        "ascan_large.untrained": _cfg(),
        "test_foveal_ascan.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"AsCAN"``."""
    return "AsCAN"


_create = partial(create, checkpoint_filter_fn, AsCAN)


@register_model
def ascan_tiny(pretrained: bool = False, **kwargs: Any) -> AsCAN:
    """AsCAN-Tiny, 55.5 M parameters. A reconstruction, not verified against the paper."""
    stages = ("CC", "CC", "CC" + 5 * "T", "C" + 6 * "T")
    return _create("ascan_tiny", pretrained, kwargs, stages=stages, embed_dims=(80, 160, 320, 640), drop_path_rate=0.3)


@register_model
def ascan_base(pretrained: bool = False, **kwargs: Any) -> AsCAN:
    """AsCAN-Base, 98.4 M parameters. A reconstruction, not verified against the paper."""
    stages = ("CC", "CCCCT", "CCC" + 10 * "T", "C" + 6 * "T")
    return _create("ascan_base", pretrained, kwargs, stages=stages, embed_dims=(96, 192, 384, 768), drop_path_rate=0.4)


@register_model
def ascan_large(pretrained: bool = False, **kwargs: Any) -> AsCAN:
    """AsCAN-Large, 173.4 M parameters. A reconstruction, not verified against the paper."""
    stages = ("CCC", "CCCCT", "CC" + 13 * "T", "C" + 6 * "T")
    args = dict(stages=stages, embed_dims=(128, 256, 512, 1024), drop_path_rate=0.5)
    return _create("ascan_large", pretrained, kwargs, **args)


@register_model
def test_foveal_ascan(pretrained: bool = False, **kwargs: Any) -> AsCAN:
    """A very small AsCAN, for tests and demonstrations."""
    args = dict(
        img_size=64, stages=("C", "CT", "CT", "TT"), embed_dims=(16, 16, 32, 64), stem_width=16, expansion=2, head_dim=8
    )
    return _create("test_foveal_ascan", pretrained, kwargs, **args)
