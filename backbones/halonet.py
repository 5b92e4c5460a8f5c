"""HaloNet, and timm's convolutional hybrids with its attention.

Paper: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (Vaswani et al., CVPR 2021,
arXiv:2103.12731). Its authors published neither code nor weights.

* **HaloNet** (``halo_h0`` ... ``halo_h7``) is a ResNet with blocked local attention in place of every 3x3 convolution,
  implemented from the paper's table of sizes and public implementations. No trained weights exist.
* **Hybrids** (``halo26t``, ``halo50ts`` ...) are timm's networks, `timm.models.byobnet.ByobNet` with timm's
  configurations (Apache-2.0), in which `replace_attention` substitutes this package's attention. Parameters, outputs
  and methods are timm's, so timm's published weights load. In addition they take any input size and need a fraction of
  the memory. They are named like timm's without "net".

Feature maps are ``[B, C, H, W]``, in the channels_last memory format after the first attention.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ConvNormAct, DropPath, LayerNorm2d, create_act_layer, create_norm_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import ByobNet
from torch import nn

from .attention import HaloAttention2d
from .base import Backbone, create, keep_new, registered_cfg, unwrap
from .layers import Blocks, drop_path_rates, guard_activations, plain_numbers
from .replace import replace_attention

__all__ = ["HaloNet", "checkpoint_filter_fn", "family"]


class HaloBlock(nn.Module):
    """Bottleneck of a 1x1 convolution to ``dim``, halo attention with values of ``value_dim``, and a 1x1 convolution to
    ``out_dim``, each with batch norm; the shortcut is projected where the shape changes or ``project`` asks for it."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        value_dim: int,
        out_dim: int,
        *,
        stride: int,
        num_heads: int,
        block_size: int,
        halo_size: int,
        boundary: str,
        act_layer: str,
        project: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv1_1x1 = ConvNormAct(in_dim, dim, 1, act_layer=act_layer)
        self.self_attn = HaloAttention2d(
            dim,
            value_dim,
            stride=stride,
            num_heads=num_heads,
            head_dim=dim // num_heads,
            block_size=block_size,
            halo_size=halo_size,
            boundary=boundary,
        )
        self.post_attn = create_norm_act_layer("batchnorm2d", value_dim, act_layer=act_layer)
        self.conv3_1x1 = ConvNormAct(value_dim, out_dim, 1, apply_act=False)
        self.shortcut = ConvNormAct(in_dim, out_dim, 1, stride=stride, apply_act=False) if project else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        act: Any = create_act_layer(act_layer, inplace=True)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.post_attn(self.self_attn(self.conv1_1x1(x)))
        y = self.drop_path(self.conv3_1x1(y))
        return self.act(y + self.shortcut(x))


class HaloNet(Backbone):
    """HaloNet. Takes images of any size.

    The stages have attention widths 64, 128, 256, 512. ``value_ratio`` widens only the values and ``out_ratio`` only
    the outputs of blocks: widening whole bottlenecks would give the larger models two to three times the parameters.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        widths: channels of queries and keys per stage, a multiple of ``num_heads``.
        depths: blocks per stage.
        num_heads: attention heads, in every stage.
        block_size: the paper's b.
        halo_size: the paper's h.
        value_ratio: the paper's r_v, channels of the values over those of the queries.
        out_ratio: the paper's r_b, channels of a block's output over those of the queries.
        num_features: the paper's d_f, channels of a last 1x1 convolution; None: none.
        stem_dim: channels of the stem, a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2.
        boundary: positions outside the map are excluded (``"mask"``, as in the paper), or have zero keys and values
            (``"zero"``, as in timm).
        act_layer: activation, by timm's name.
        zero_init_last: initialize the weights of each block's last batch norm with 0.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.
        out_norm: add a LayerNorm over the channels per stage, ``norm0`` ..., that `forward_intermediates` and
            ``features_only`` apply to their maps.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import foveal, timm, torch
        >>> model = timm.create_model("test_foveal_halonet", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('HaloNet', (1, 10))
    """

    output_fmt = "NCHW"
    tables = ("_rel",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 3, 7, 3),
        num_heads: int = 8,
        block_size: int = 8,
        halo_size: int = 3,
        value_ratio: float = 1.0,
        out_ratio: float = 1.0,
        num_features: int | None = None,
        stem_dim: int = 64,
        boundary: str = "mask",
        act_layer: str = "relu",
        zero_init_last: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        if len(widths) != len(depths):
            raise ValueError(f"widths {tuple(widths)} and depths {tuple(depths)} differ in length")
        if any(width % num_heads for width in widths):
            raise ValueError(f"widths {tuple(widths)} are not all divisible by num_heads {num_heads}")
        options: dict[str, Any] = dict(num_heads=num_heads, block_size=block_size, halo_size=halo_size)
        options |= dict(boundary=boundary, act_layer=act_layer)

        stem: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=ConvNormAct(in_chans, stem_dim, 7, stride=2, act_layer=act_layer),
            pool=nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stem = nn.Sequential(stem)
        stages = []
        dims = [int(width * out_ratio) for width in widths]
        dim = stem_dim
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = []
            for j, rate in enumerate(rates):
                sizes = dim, widths[i], int(widths[i] * value_ratio), dims[i]
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(HaloBlock(*sizes, stride=stride, project=j == 0, drop_path=rate, **options))
                dim = dims[i]
            stages.append(Blocks(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final_conv = nn.Identity()
        modules = [f"stages.{i}" for i in range(len(dims))]
        if num_features is not None:
            self.final_conv = ConvNormAct(dim, num_features, 1, act_layer=act_layer)
            dims[-1], modules[-1] = num_features, "final_conv"
        for dim, module in zip(dims, modules, strict=True):
            self._add_map(dim, module, LayerNorm2d)
        self._init_weights(zero_init_last)
        self._init_head(dims[-1], num_classes, global_pool, drop_rate)
        guard_activations(self)

    def _init_weights(self, zero_init_last: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and not m.weight.is_meta:
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        for m in self.modules():
            if isinstance(m, HaloAttention2d) and not m.q.weight.is_meta:
                m.reset_parameters()  # not those of other convolutions
            if isinstance(m, HaloBlock) and zero_init_last:
                norm: Any = m.conv3_1x1.bn
                nn.init.zeros_(norm.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return dict(stem=r"^stem", blocks=[(blocks, None), (r"^final_conv|^norm", (99999,))])

    def _level(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The map of stage ``i``; the final convolution belongs to the last one."""
        x = self.stages[i](x)
        return self.final_conv(x) if i == len(self.stages) - 1 else x

    def _prune(self, take: Sequence[int], last: int) -> None:
        if last < len(self.stages) - 1:
            self.final_conv = nn.Identity()
        super()._prune(take, last)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """``[B, num_features, h, w]`` to the logits, or with ``pre_logits`` to ``[B, head_hidden_size]``; without
        pooling, to maps of these."""
        if pre_logits or self.global_pool.pool_type:
            return super().forward_head(x, pre_logits)
        return self.head(self.head_drop(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, in_chans, H, W]`` to the last map, ``[B, num_features, h, w]``."""
        return self.final_conv(self.stages(self.stem(x)))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: dict[str, Any], model: HaloNet) -> dict[str, torch.Tensor]:
    """Convert a checkpoint of a `HaloNet` to a state dict of ``model``. Changes neither argument.

    There are no published weights of HaloNet, so this only unwraps a ``state_dict`` or ``model`` and removes the
    prefixes ``module.`` and ``model.``. If the checkpoint has no norms of ``out_norm``, those of the model keep their
    values. The hybrids' checkpoints are timm's and need no conversion.
    """
    state_dict = unwrap(state_dict)
    keep_new(state_dict, model.state_dict())
    return state_dict


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------

_PAPER = "arXiv:2103.12731"
_UNPUBLISHED = (
    "no weights are published, by the authors or by timm",
    "implemented from the paper's table of sizes and public implementations; parameter counts are not confirmed; heads "
    "(8 in every stage), activation (ReLU) and shortcuts (projected in the first block of a stage) are this package's "
    "choice",
)
_HYBRID = "timm's network, weights and outputs, with this package's attention: any input size, less memory"
_FIXED = (
    "timm's network, weights and outputs, with this package's halo attention; its other attention layers are timm's "
    "and have a fixed input size, img_size="
)


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, size, size),
        "pool_size": (math.ceil(size / 32), math.ceil(size / 32)),
        "crop_pct": 0.95,
        "first_conv": "stem.conv1.conv",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": _PAPER,
        "notes": _UNPUBLISHED,
        **kwargs,
    }


def _hybrid_cfg(architecture: str) -> dict[str, Any]:
    """timm's configuration, including addresses, of the weights that this model loads."""
    return {
        **registered_cfg(_HYBRIDS[architecture][1]).to_dict(),
        "min_input_size": None,
        "origin_url": "https://github.com/huggingface/pytorch-image-models",
        "paper_ids": _PAPER,
        "notes": (_FIXED if architecture.endswith("_256") else _HYBRID,),
    }


# our name: timm's configuration, timm's weights
_HYBRIDS = {
    "halo26t": ("halonet26t", "halonet26t.a1h_in1k"),
    "halo50ts": ("halonet50ts", "halonet50ts.a1h_in1k"),
    "sehalo33ts": ("sehalonet33ts", "sehalonet33ts.ra2_in1k"),
    "eca_haloext26ts": ("eca_halonext26ts", "eca_halonext26ts.c1_in1k"),
    "haloregz_b": ("haloregnetz_b", "haloregnetz_b.ra3_in1k"),
    "lamhalobot50ts_256": ("lamhalobotnet50ts", "lamhalobotnet50ts_256.a1h_in1k"),
    "halo2bot50ts_256": ("halo2botnet50ts", "halo2botnet50ts_256.a1h_in1k"),
}

default_cfgs = generate_default_cfgs(
    {
        "halo_h0.untrained": _cfg(256),
        "halo_h1.untrained": _cfg(256),
        "halo_h2.untrained": _cfg(256),
        "halo_h3.untrained": _cfg(320),
        "halo_h4.untrained": _cfg(384),
        "halo_h5.untrained": _cfg(448),
        "halo_h6.untrained": _cfg(512),
        "halo_h7.untrained": _cfg(600),
        **{f"{name}.{theirs.partition('.')[2]}": _hybrid_cfg(name) for name, (_, theirs) in _HYBRIDS.items()},
        "test_foveal_halonet.untrained": _cfg(64, notes=()),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"HaloNet"``, or ``"HaloNet hybrid"`` for timm's networks."""
    return "HaloNet hybrid" if name in _HYBRIDS else "HaloNet"


_create = partial(create, checkpoint_filter_fn, HaloNet)


def _byobnet(**kwargs: Any) -> ByobNet:
    model = ByobNet(**kwargs)
    replace_attention(model)
    guard_activations(model)
    return model


def _create_hybrid(variant: str, pretrained: bool, **kwargs: Any) -> ByobNet:
    return build_model_with_cfg(
        _byobnet,
        variant,
        pretrained,
        model_cfg=model_cfgs[_HYBRIDS[variant][0]],
        feature_cfg=dict(flatten_sequential=True),
        **plain_numbers(kwargs),
    )


@register_model
def halo_h0(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H0, 5.5 M parameters, for 256 pixels. No weights are published."""
    return _create("halo_h0", pretrained, kwargs, depths=(3, 3, 7, 3), block_size=8, halo_size=3, out_ratio=0.5)


@register_model
def halo_h1(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H1, 8.1 M parameters, for 256 pixels. No weights are published."""
    return _create("halo_h1", pretrained, kwargs, depths=(3, 3, 10, 3), block_size=8, halo_size=3, out_ratio=1.0)


@register_model
def halo_h2(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H2, 9.4 M parameters, for 256 pixels. No weights are published."""
    return _create("halo_h2", pretrained, kwargs, depths=(3, 3, 11, 3), block_size=8, halo_size=3, out_ratio=1.25)


@register_model
def halo_h3(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H3, 11.8 M parameters, for 320 pixels. No weights are published."""
    args = dict(depths=(3, 3, 12, 3), block_size=10, halo_size=3, out_ratio=1.5, num_features=1024)
    return _create("halo_h3", pretrained, kwargs, **args)


@register_model
def halo_h4(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H4, 19.1 M parameters, for 384 pixels. No weights are published."""
    args = dict(depths=(3, 3, 12, 3), block_size=12, halo_size=2, out_ratio=3.0, num_features=1280)
    return _create("halo_h4", pretrained, kwargs, **args)


@register_model
def halo_h5(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H5, 30.7 M parameters, for 448 pixels. No weights are published."""
    args = dict(depths=(3, 3, 23, 3), block_size=14, halo_size=2, value_ratio=2.5, out_ratio=2.0, num_features=1536)
    return _create("halo_h5", pretrained, kwargs, **args)


@register_model
def halo_h6(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H6, 43.5 M parameters, for 512 pixels. No weights are published."""
    args = dict(depths=(3, 3, 24, 3), block_size=8, halo_size=4, value_ratio=3.0, out_ratio=2.75, num_features=1536)
    return _create("halo_h6", pretrained, kwargs, **args)


@register_model
def halo_h7(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H7, 67.4 M parameters, for 600 pixels. No weights are published."""
    args = dict(depths=(3, 3, 26, 3), block_size=10, halo_size=3, value_ratio=4.0, out_ratio=3.5, num_features=2048)
    return _create("halo_h7", pretrained, kwargs, **args)


@register_model
def halo26t(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """timm's halonet26t, 12.5 M parameters: halo attention at the end of stage 3 and in stage 4 of a ResNet-26-T."""
    return _create_hybrid("halo26t", pretrained, **kwargs)


@register_model
def halo50ts(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """timm's halonet50ts, 22.7 M parameters: halo attention in stages 2 to 4 of a ResNet-50-T with SiLU."""
    return _create_hybrid("halo50ts", pretrained, **kwargs)


@register_model
def sehalo33ts(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """timm's sehalonet33ts, 13.7 M parameters: halo attention in stages 2 to 4 of an SE-ResNet-33-T with SiLU."""
    return _create_hybrid("sehalo33ts", pretrained, **kwargs)


@register_model
def eca_haloext26ts(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """timm's eca_halonext26ts, 10.8 M parameters: halo attention in stages 3 and 4 of an ECA-ResNeXt-26-T with SiLU."""
    return _create_hybrid("eca_haloext26ts", pretrained, **kwargs)


@register_model
def haloregz_b(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """timm's haloregnetz_b, 11.7 M parameters: halo attention in stages 3 and 4 of a RegNetZ."""
    return _create_hybrid("haloregz_b", pretrained, **kwargs)


@register_model
def lamhalobot50ts_256(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """timm's lamhalobotnet50ts_256, 22.6 M parameters: lambda, halo and bottleneck attention in stages 2, 3 and 4. The
    last takes one input size, ``img_size=``."""
    return _create_hybrid("lamhalobot50ts_256", pretrained, **kwargs)


@register_model
def halo2bot50ts_256(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """timm's halo2botnet50ts_256, 22.6 M parameters: halo attention in stages 2 and 3, bottleneck attention in stage 4.
    The last takes one input size, ``img_size=``."""
    return _create_hybrid("halo2bot50ts_256", pretrained, **kwargs)


@register_model
def test_foveal_halonet(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """A very small HaloNet, for tests and demonstrations."""
    args = dict(widths=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=2, block_size=4, halo_size=1, stem_dim=16)
    args |= dict(value_ratio=1.5, out_ratio=2.0, num_features=96, zero_init_last=False)
    return _create("test_foveal_halonet", pretrained, kwargs, **args)
