"""RMT: attention that decays with the Manhattan distance.

Paper: RMT: Retentive Networks Meet Vision Transformers (Fan et al., CVPR 2024, arXiv:2309.11523). The authors'
repository, https://github.com/qhfan/RMT, has no licence for code or weights (only the text of mmsegmentation's for its
copy of that). This is an independent implementation of the code of June 2024; checkpoints in the authors' format load
unchanged and give the published outputs. Files of the network before that, without rotation, do not fit.

A block is a 3x3 depthwise convolution, Manhattan self-attention (MaSA) and an MLP with a 3x3 depthwise convolution
inside, each with a residual. MaSA adds ``decay * distance`` to the logits, with a decay for each head that is not
learned. In the last stage (of `rmt_t` the last two) it is over the whole map; before, over the row and then the column.
Queries and keys are rotated by the row-major index of their position.

A projection to 1024 channels with BatchNorm and SiLU comes between the last map and the pooling.

Parameters have the authors' names. Feature maps are channels-last inside, ``[B, H, W, C]``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import ConvDownsample, ConvFeedForward, DepthwiseConv, ManhattanAttention2d
from .base import ProjectedBackbone, check_names, create, keep_new, scored_raw, unwrap
from .layers import Classifiers, Level, drop_path_rates, init_weights, scaled

__all__ = ["RMT", "checkpoint_filter_fn", "family"]


class RMTBlock(nn.Module):
    """Positional convolution, pre-norm attention and MLP; the last two with optional LayerScale and DropPath."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self, dim: int, attention: nn.Module, mlp_ratio: float, layer_scale: float | None, drop_path: float
    ) -> None:
        super().__init__()
        self.pos = DepthwiseConv(dim, 3, residual=True)
        self.retention_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.retention = attention
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for name in ("gamma_1", "gamma_2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((1, 1, 1, dim), float(layer_scale)))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pos(x)
        x = x + self.drop_path(scaled(self.retention(self.retention_layer_norm(x)), self.gamma_1))
        return x + self.drop_path(scaled(self.ffn(self.final_layer_norm(x)), self.gamma_2))


class PatchEmbed(nn.Module):
    """Four 3x3 convolutions with BatchNorm, the first and the third of stride 2, with GELU between: stride 4."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (in_chans, dim // 2, dim // 2, dim, dim)
        for (chs, out_chs), stride in zip(pairwise(widths), (2, 1, 2, 1), strict=True):
            layers += [nn.Conv2d(chs, out_chs, 3, stride, 1), nn.BatchNorm2d(out_chs), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


class RMT(ProjectedBackbone):
    """RMT. Takes images of any size.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dims: channels per stage.
        depths: blocks per stage.
        num_heads: attention heads per stage; twice as many must divide the channels.
        heads_ranges: ``heads_range`` of `ManhattanAttention2d`, per stage.
        mlp_ratios: hidden channels of the MLP per stage, relative to ``embed_dims``.
        axes: of `ManhattanAttention2d`, per stage.
        layer_scales: initial value of LayerScale per stage, None for none.
        projection: channels after the projection that precedes the pooling.
        aux_head: a second classifier, of the networks trained with token labels, whose largest logits over all
            positions count half: ``"features"``, on the last map, ``"projected"``, after the projection, or None.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.
        out_norm: add a LayerNorm per stage, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to
            their maps, as in the authors' detection and segmentation models.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import foveal, timm, torch
        >>> model = timm.create_model("test_foveal_rmt", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('RMT', (1, 10))
    """

    stem_name, levels_name = "patch_embed", "layers"
    heads = ("head", "aux_head")
    aux_head: Any  # a Linear, an Identity without classes, or None
    downsample_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        heads_ranges: Sequence[float] = (4, 4, 6, 6),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        axes: Sequence[str] = ("each", "each", "each", "both"),
        layer_scales: Sequence[float | None] = (None, None, None, None),
        projection: int = 1024,
        aux_head: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        per_stage = dict(embed_dims=embed_dims, num_heads=num_heads, heads_ranges=heads_ranges, mlp_ratios=mlp_ratios)
        lengths = {name: len(each) for name, each in dict(per_stage, axes=axes, layer_scales=layer_scales).items()}
        if set(lengths.values()) != {len(depths)}:
            raise ValueError(f"depths {tuple(depths)} differ in length from others, which have {lengths}")
        if aux_head not in (None, "features", "projected"):
            raise ValueError(f'aux_head must be None, "features" or "projected", got {aux_head!r}')
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0])
        rates = drop_path_rates(drop_path_rate, depths)
        levels = []
        for i, dim in enumerate(embed_dims):
            attend = partial(ManhattanAttention2d, dim, num_heads[i], axes[i], heads_range=heads_ranges[i])
            blocks = [RMTBlock(dim, attend(), mlp_ratios[i], layer_scales[i], rate) for rate in rates[i]]
            levels.append(Level(blocks, ConvDownsample(dim, embed_dims[i + 1]) if i + 1 < len(depths) else None))
            self._add_map(dim, f"layers.{i}.blocks")
        self.layers = nn.Sequential(*levels)
        self.proj = nn.Linear(embed_dims[-1], projection)
        self.norm = nn.BatchNorm2d(projection)
        self.aux_on, self.aux_head = aux_head, None
        init_weights(self)
        self._init_head(embed_dims[-1], num_classes, global_pool, drop_rate)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        super()._set_head(num_classes, global_pool)
        if self.aux_on is not None:
            width = self.num_features if self.aux_on == "features" else self._head_width
            self.aux_head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
            init_weights(self.aux_head)

    def _remove_head(self) -> None:
        self.aux_on, self.aux_head = None, None
        super()._remove_head()

    def get_classifier(self) -> nn.Module:
        """The classifier, or both, the one of token labels second: Linears, or Identities without classes."""
        return self.head if self.aux_on is None else Classifiers((self.head, self.aux_head))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """``[B, h, w, num_features]`` to the logits, or with ``pre_logits`` to ``[B, head_hidden_size]``."""
        y = self._project(x)
        pooled = self.head_drop(self.global_pool(y))
        if pre_logits or not self.num_classes:
            return pooled
        logits = self.head(pooled)
        if self.aux_on is None:
            return logits
        return logits + 0.5 * self.aux_head(x if self.aux_on == "features" else y).amax((1, 2), logits.ndim == 4)


# ---- checkpoints


def checkpoint_filter_fn(state_dict: dict[str, Any], model: RMT) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the authors' classifiers, their mmdetection and mmsegmentation checkpoints (only the ``backbone.``; create
    the model with ``features_only=True, out_norm=True``), and state dicts of these models, also wrapped by
    ``features_only`` or ``DistributedDataParallel``. Of a checkpoint with averaged weights (``model_ema``) these are
    taken, whose scores are published, except for `rmt_t`. The constants ``Relpos`` are compared and left out.

    If the checkpoint has no norms of ``out_norm``, or no head, those of the model keep their values.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) or constants do not fit the model,
            or the classifier of token labels is on another map.
    """
    raw = scored_raw(getattr(model, "pretrained_cfg", {}).get("architecture", ""))
    averaged = state_dict.get("model_ema")
    own = model.state_dict()
    found = {}
    layers: Any = model.layers
    for name, value in unwrap(averaged if isinstance(averaged, dict) and not raw else state_dict).items():
        if constant := re.match(r"layers\.(\d+)\.Relpos\.(\w+)", name):
            decay = value.new_tensor(layers[int(constant[1])].blocks[0].retention.decay)
            given = value.is_floating_point() and not value.is_meta  # not while `foveal convert` traces the names
            if constant[2] == "decay" and given and not torch.allclose(value, decay, 0.02):
                raise ValueError(f"{name} of the checkpoint is {value.tolist()}, of the model {decay.tolist()}")
        else:
            found[re.sub(r"^extra_norms\.(\d)", r"norm\1", name)] = value
    keep_new(found, own)
    if model.out_norm:
        keep_new(found, own, r"(proj|norm)\.")
    if not model.num_classes:
        found = {name: value for name, value in found.items() if not name.startswith("aux_head.")}
    check_names(found, own)
    aux = found.get("aux_head.weight")
    if aux is not None and aux.shape[1] != own["aux_head.weight"].shape[1]:
        other = {"features": "projected", "projected": "features"}[str(model.aux_on)]
        raise ValueError(f"aux_head of the checkpoint has {aux.shape[1]} channels: create the model with {other=}")
    return found


# ---- registry

_NOTES = (
    "The authors' repository has no licence for code or weights.",
    "Their weights are only on Baidu and not downloaded automatically: get the file from the page in `foveal info` and "
    "pass pretrained=True, pretrained_cfg_overlay=dict(file=PATH).",
)


def _cfg(**facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "none stated",
        "origin_url": "https://github.com/qhfan/RMT",
        "paper_ids": "arXiv:2309.11523",
        "notes": _NOTES,
        **facts,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"rmt_{size}.in1k": _cfg() for size in "tsbl"},
        **{f"rmt_{size}.in1k_token_label": _cfg(classifier=("head", "aux_head")) for size in "sbl"},
        "test_foveal_rmt.untrained": _cfg(
            input_size=(3, 64, 64), pool_size=(2, 2), license="apache-2.0", origin_url=None, notes=None
        ),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"RMT"``."""
    return "RMT"


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **args: Any) -> RMT:
    """The tag decides on a classifier of token labels; that of `rmt_s` has the shape of the projected map."""
    cfg = kwargs.get("pretrained_cfg")
    tag = cfg if isinstance(cfg, str) or cfg is None else (cfg if isinstance(cfg, dict) else vars(cfg)).get("tag")
    if "token_label" in (tag or ""):
        args["aux_head"] = "projected" if variant == "rmt_s" else "features"
    return create(checkpoint_filter_fn, RMT, variant, pretrained, kwargs, **args)


_SCALED = dict(layer_scales=(None, None, 1e-6, 1e-6), mlp_ratios=(4, 4, 3, 3))


@register_model
def rmt_t(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-T, 14 M parameters."""
    return _create("rmt_t", pretrained, kwargs, axes=("each", "each", "both", "both"), drop_path_rate=0.1)


@register_model
def rmt_s(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-S, 27 M parameters."""
    args = dict(depths=(3, 4, 18, 4), mlp_ratios=(4, 4, 3, 3), drop_path_rate=0.15)
    return _create("rmt_s", pretrained, kwargs, **args)


@register_model
def rmt_b(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-B, 54 M parameters."""
    args = dict(embed_dims=(80, 160, 320, 512), depths=(4, 8, 25, 8), num_heads=(5, 5, 10, 16))
    return _create("rmt_b", pretrained, kwargs, **args, heads_ranges=(5, 5, 6, 6), **_SCALED, drop_path_rate=0.4)


@register_model
def rmt_l(pretrained: bool = False, **kwargs: Any) -> RMT:
    """RMT-L, 95 M parameters."""
    args = dict(embed_dims=(112, 224, 448, 640), depths=(4, 8, 25, 8), num_heads=(7, 7, 14, 20))
    return _create("rmt_l", pretrained, kwargs, **args, heads_ranges=(6, 6, 6, 6), **_SCALED, drop_path_rate=0.5)


@register_model
def test_foveal_rmt(pretrained: bool = False, **kwargs: Any) -> RMT:
    """A very small RMT with LayerScale, for tests and demonstrations."""
    args = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2))
    args |= dict(axes=("each", "each", "both", "both"), layer_scales=(None, None, 0.1, 0.1), projection=96)
    return _create("test_foveal_rmt", pretrained, kwargs, **args)
