"""FAN and TAP-FAN: attention among tokens and among channels, for robustness to corrupted images.

Papers: Understanding The Robustness in Vision Transformers (Zhou et al., ICML 2022, arXiv:2204.12451), code
https://github.com/NVlabs/FAN; Robustifying Token Attention for Vision Transformers (Guo et al., ICCV 2023,
arXiv:2303.11126), code https://github.com/guoyongcs/TAPADL. NVIDIA's code and weights are under the NVIDIA Source Code
License, for non-commercial use alone; TAPADL's are MIT by its authors, who built on NVIDIA's code. This is an
independent implementation; the published weights load and give the published outputs, of the hybrids with the usual
layer norm over channels (the authors' divides by C - 1 there).

Blocks at stride 16 are attention among the tokens, and a gate for each channel times an MLP with convolutions
(`ChannelMixing2d`), both pre-norm. In TAP-FAN the attention reads means of the tokens' neighborhoods
(`TokenAwarePooling2d`). A class token then attends to all tokens in two further blocks, which are the pooling of the
network; the patch tokens pass through their norms alone.

* **FAN-ViT** has four convolutions of stride 2 before the blocks: all maps are at stride 16.
* **FAN-Hybrid** has two ConvNeXt stages before them: maps at strides 4, 8, 16 and 16.

Feature maps are channels-last inside, ``[B, H, W, C]``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .attention import (
    ChannelMixing2d,
    ClassAttentionPool,
    ConvNeXtBlock,
    ConvNeXtDownsample,
    ConvNeXtStem,
    FourierPosition,
    TokenAwarePooling2d,
    TokenMixing2d,
    at_least,
    attention_diversification_loss,
    to_nchw,
    to_nhwc,
)
from .base import POOLS, CollectingBackbone, check_head, check_names, create, keep_new, unwrap
from .layers import Stage, init_weights

__all__ = ["FAN", "checkpoint_filter_fn", "family"]


class FANBlock(nn.Module):
    """Attention among tokens and among channels, both pre-norm with LayerScale and DropPath.

    ``num_scales``: of the pooling of the tokens before the attention, whose residual does not see it; None for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1.0,
        num_scales: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dilation_predictor = None if num_scales is None else TokenAwarePooling2d(dim, num_scales)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = TokenMixing2d(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ChannelMixing2d(dim, num_heads, mlp_ratio)
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.dilation_predictor is None else self.dilation_predictor(x)
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(y)))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class TokenEmbed(nn.Module):
    """A channels-last map to tokens of half its resolution, with their position."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 2, 2)
        self.pos_embed = FourierPosition(dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return to_nhwc(self.pos_embed(self.proj(at_least(to_nchw(x), 2))))


class ConvTokenEmbed(nn.Module):
    """Four 3x3 convolutions of stride 2 with BatchNorm, and GELU between: images ``[B, C, H, W]`` to tokens ``[B, h, w,
    dim]`` with their position. An odd length is rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for chs, out_chs in ((in_chans, dim // 8), (dim // 8, dim // 4), (dim // 4, dim // 2), (dim // 2, dim)):
            conv = nn.Conv2d(chs, out_chs, 3, 2, 1, bias=False)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(out_chs)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])
        self.pos_embed = FourierPosition(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return to_nhwc(self.pos_embed(self.proj(x)))


MAPS = 4  # of every network, the last of them after the class token's blocks


class FAN(CollectingBackbone):
    """FAN and TAP-FAN. Take images of any size.

    The features (`forward_features`) are the map after the last block; the blocks of the class token are part of
    `forward_head`. The last of the four feature maps has the patch tokens after these blocks. The auxiliary loss is the
    attention diversification loss of all blocks, which the authors of TAP-FAN add with a weight of 1.

    Args:
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"token"``, the class token; ``"avg"``, ``"max"``, ``"avgmax"`` or ``"catavgmax"`` of the last
            map, or ``""`` for a map of logits.
        output_stride: only 16.
        embed_dim: channels of the tokens.
        depth: blocks at stride 16.
        num_heads: attention heads of all blocks.
        map_blocks: blocks whose outputs are feature maps, besides the ConvNeXt stages and the last map.
        conv_depths: blocks of the two ConvNeXt stages of a hybrid; empty for a ViT.
        conv_dims: their channels.
        mlp_ratio: hidden channels of the MLPs at stride 16, relative to ``embed_dim``.
        layer_scale: initial value of LayerScale at stride 16.
        num_scales: scales of TAP-FAN's pooling; None for FAN.
        learnable_downsample: None, or the channels of a 3x3 convolution of stride 2 on the last feature map, as in the
            authors' detectors (768).
        head_init_scale: factor on the classifier's initial weights.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, the same in all blocks at stride 16.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.fan import FAN
        >>> model = timm.create_model("test_foveal_fan", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('FAN', (1, 10))
    """

    tables = ("cls_token",)
    learnable_downsample: nn.Conv2d | None

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        output_stride: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        map_blocks: Sequence[int] = (4, 7, 11),
        conv_depths: Sequence[int] = (),
        conv_dims: Sequence[int] = (128, 256),
        mlp_ratio: float = 4.0,
        layer_scale: float = 1.0,
        num_scales: int | None = None,
        learnable_downsample: int | None = None,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, output_stride, stride=16)
        ends = [-1, *map_blocks]
        if len(map_blocks) != (1 if conv_depths else 3) or ends != sorted(set(ends)) or ends[-1] >= depth:
            raise ValueError(f"{map_blocks=} must be 1 (hybrid) or 3 (ViT) increasing numbers of blocks below {depth=}")
        if len(conv_depths) not in (0, len(conv_dims)):
            raise ValueError(f"{conv_depths=} and {conv_dims=} differ in length")
        self.head_init_scale = head_init_scale
        block = partial(FANBlock, embed_dim, num_heads, mlp_ratio, layer_scale, num_scales, drop_path_rate)
        stages = [[block() for _ in range(start, end)] for start, end in itertools.pairwise([*ends, depth - 1])]
        down: nn.Module | None = None
        self.stem: nn.Module = ConvTokenEmbed(in_chans, embed_dim)
        if conv_depths:
            self.stem = ConvNeXtStem(in_chans, conv_dims[0])
            down = TokenEmbed(conv_dims[-1], embed_dim)
        self.stages = nn.Sequential()
        for i, (dim, count) in enumerate(zip(conv_dims, conv_depths, strict=False)):
            narrow = ConvNeXtDownsample(conv_dims[i - 1], dim) if i else None
            self.stages.append(Stage([ConvNeXtBlock(dim) for _ in range(count)], narrow))
            self._add_map(dim, f"stages.{i}")
        for i, blocks in enumerate(stages, len(self.stages)):
            self.stages.append(Stage(blocks, down if i == len(conv_depths) else None))
            self.feature_info.append(dict(num_chs=embed_dim, reduction=16, module=f"stages.{i}"))
        self.feature_info[-1] |= dict(module="class_attention.map")
        self.class_attention = ClassAttentionPool(embed_dim, num_heads, mlp_ratio, layer_scale)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.learnable_downsample = None
        if learnable_downsample is not None:
            self.learnable_downsample = nn.Conv2d(embed_dim, learnable_downsample, 3, 2, 1)
            self.feature_info[-1] |= dict(num_chs=learnable_downsample, reduction=32)
        init_weights(self)
        self._init_head(embed_dim, num_classes, global_pool, drop_rate)

    # ---- the head

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        check_head(num_classes, global_pool, ("token", *POOLS))
        if global_pool == "token" and self.class_attention.cls_token is None:
            raise ValueError('global_pool="token": the class token was pruned with the head')
        super()._set_head(num_classes, "" if global_pool == "token" else global_pool)
        if global_pool == "token":
            self.global_pool.pool_type = "token"  # it passes through
        if isinstance(self.head, nn.Linear) and not self.head.weight.is_meta:
            with torch.no_grad():
                self.head.weight.mul_(self.head_init_scale)

    def _remove_head(self) -> None:
        super()._remove_head()
        self.class_attention.drop_class_token()

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The map ``[B, h, w, embed_dim]`` of `forward_features` to logits, or with ``pre_logits`` to ``[B,
        head_hidden_size]``."""
        pool: Any = self.global_pool
        token, last = self.class_attention(x)
        x = self.norm(token)[:, 0] if pool.pool_type == "token" else pool(self.norm(last))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    # ---- features

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise learning rates; the class token is after the blocks."""
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"].append((r"^(?:class_attention|learnable_downsample)", (99999,)))
        return groups

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return x  # of the features

    def _maps(
        self, x: torch.Tensor, take: Sequence[int], stop: int, norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, maps = super()._maps(x, take, stop, norm)
        if max(take) == MAPS - 1:
            _, last = self.class_attention(maps[-1])
            last = self.norm(last) if norm else last
            maps[-1] = last if self.learnable_downsample is None else to_nhwc(self.learnable_downsample(to_nchw(last)))
        return x, maps

    def _prune(self, take: Sequence[int], last: int) -> None:
        super()._prune(take, last)
        if last < MAPS - 1:
            self.class_attention.drop_class_token(whole=True)
            self.learnable_downsample = None

    # ---- training

    def _collectors(self) -> list[Any]:
        return [m for m in self.modules() if isinstance(m, TokenMixing2d)]

    def _auxiliary_loss(self, collected: list[tuple[Any, Any]]) -> torch.Tensor:
        return attention_diversification_loss([attention.weights(*pair) for attention, pair in collected])


# ---- checkpoints

_NAMES = (  # of the authors, to ours
    (r"^pos_embeder\.", "pos_embed."),
    (r"^patch_embed\.backbone\.stem\.0\.", "stem.proj."),
    (r"^patch_embed\.backbone\.stem\.1\.", "stem.norm."),
    (r"^patch_embed\.backbone\.stages\.", "stages."),
    (r"^(stages\.\d)\.downsample\.0\.", r"\1.downsample.norm."),
    (r"^(stages\.\d)\.downsample\.1\.", r"\1.downsample.reduction."),
    (r"\.conv_dw\.(weight|bias)$", r".conv_dw.conv.\1"),
    (r"\.mlp_v\.dwconv\.", ".mlp_v."),
    (r"^cls_attn_blocks\.", "class_attention.blocks."),
    (r"^cls_token$", "class_attention.cls_token"),
)


_CLASS_TOKEN = r"class_attention\.(cls_token$|blocks\.\d+\.(attn\.|mlp\.|gamma2$))"


def _own_name(name: str, hybrid: bool, blocks: Sequence[str]) -> str:
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    embed = "stages.2.downsample." if hybrid else "stem."
    name = re.sub(r"^patch_embed\.(?=proj\.)|^(?=pos_embed\.)", embed, name)
    if (match := re.match(r"blocks\.(\d+)\.", name)) and int(match[1]) < len(blocks):
        name = f"{blocks[int(match[1])]}.{name[match.end() :]}"
    return name


def checkpoint_filter_fn(state_dict: dict[str, Any], model: FAN) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the classifiers of FAN and TAP-FAN, the backbones of their segmenters and detectors, older names
    (``pos_embeder``, a common ``attn.qkv`` of the class token), and state dicts of these models, also wrapped by
    ``features_only`` or ``DistributedDataParallel``, or under ``state_dict`` or ``model``.

    If the checkpoint has no ``learnable_downsample``, no final norm or no class token, those of the model keep their
    values; a feature network leaves out the last two.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    own, found = model.state_dict(), {}
    stages: Any = model.stages
    hybrid = isinstance(model.stem, ConvNeXtStem)
    first = 2 if hybrid else 0
    blocks = [f"stages.{i}.blocks.{j}" for i in range(first, len(stages)) for j in range(len(stages[i].blocks))]
    for name, value in unwrap(state_dict).items():
        name = _own_name(name, hybrid, blocks)
        if match := re.fullmatch(r"(class_attention\.blocks\.\d+\.attn)\.qkv\.(weight|bias)", name):
            found |= {f"{match[1]}.{part}.{match[2]}": each for part, each in zip("qkv", value.chunk(3), strict=True)}
            continue
        if value.ndim == 4 and re.search(r"\.mlp\.fc[12]\.", name):  # 1x1 convolutions of the ConvNeXt stages
            value = value.flatten(1)
        found[name] = value
    if "class_attention.cls_token" not in own:  # of a feature network
        unread = rf"{_CLASS_TOKEN}|norm\."
        found = {name: value for name, value in found.items() if name in own or not re.match(unread, name)}
    for pattern in (r"learnable_downsample\.", r"norm\.", _CLASS_TOKEN):
        keep_new(found, own, pattern)
    check_names(found, own)
    return found


# ---- registry

_NC = (
    "The code and weights of FAN are under the NVIDIA Source Code License, for non-commercial use (research or "
    "evaluation) alone."
)
_TAP = (
    "The authors of TAP-FAN name the MIT licence. Their code contains files of FAN, which NVIDIA licenses for "
    "non-commercial use alone."
)


def _cfg(**facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (14, 14),
        "crop_pct": 1.0,
        "first_conv": "stem.proj",
        "classifier": "head",
        "license": "NVIDIA non-commercial",
        "origin_url": "https://github.com/NVlabs/FAN",
        "paper_ids": "arXiv:2204.12451",
        "notes": (_NC,),
        **facts,
    }


def _file(name: str, **facts: Any) -> dict[str, Any]:
    hub = "https://github.com/zhoudaquan/fully_attentional_network_ckpt/releases/download/v1.0.0/"
    return _cfg(url=f"{hub}fan_{name}.pth.tar", **facts)


def _tap(**facts: Any) -> dict[str, Any]:
    papers = ["arXiv:2303.11126", "arXiv:2204.12451"]
    given = dict(license="mit", origin_url="https://github.com/guoyongcs/TAPADL", paper_ids=papers, notes=(_TAP,))
    return _cfg(**given | facts)


_VIT = dict(first_conv="stem.proj.0.0")
_384 = dict(input_size=(3, 384, 384), pool_size=(24, 24))
_22K = dict(num_classes=21841)
_TEST = dict(input_size=(3, 64, 64), pool_size=(4, 4), license="apache-2.0", origin_url=None, notes=None)
default_cfgs = generate_default_cfgs(
    {
        "fan_vit_tiny.in1k": _file("vit_tiny", **_VIT),
        "fan_vit_small.in1k": _file("vit_small", **_VIT),
        "fan_vit_base.in1k": _file("vit_base", **_VIT),
        "fan_vit_large.untrained": _cfg(**_VIT),
        "fan_hybrid_tiny.in1k": _file("hybrid_tiny"),
        "fan_hybrid_small.in1k": _file("hybrid_small"),
        "fan_hybrid_base.in1k": _file("hybrid_base"),
        "fan_hybrid_base.in22k_ft_in1k": _file("hybrid_base_in22k_1k"),
        "fan_hybrid_base.in22k_ft_in1k_384": _file("hybrid_base_in22k_1k_384", **_384),
        "fan_hybrid_base.in22k": _file("hybrid_base_in22k", **_22K),
        "fan_hybrid_large.in22k_ft_in1k": _file("hybrid_large_in22k_1k"),
        "fan_hybrid_large.in22k_ft_in1k_384": _file("hybrid_large_in22k_1k_384", **_384),
        "fan_hybrid_large.in22k": _file("hybrid_large_in22k", **_22K),
        "tap_fan_hybrid_tiny.untrained": _tap(),
        "tap_fan_hybrid_base.in1k": _tap(
            url="https://github.com/guoyongcs/TAPADL/releases/download/v1.0/tapadl_fan_base.pth.tar"
        ),
        "test_foveal_fan.untrained": _cfg(**_TEST),
        "test_foveal_tap_fan.untrained": _tap(**_TEST),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"FAN"`` or ``"TAP-FAN"``."""
    return "TAP-FAN" if "tap_fan" in name else "FAN"


_create = partial(create, checkpoint_filter_fn, FAN)
_HYBRID: dict[str, Any] = dict(depth=8, num_heads=8, map_blocks=(7,), conv_depths=(3, 3), drop_path_rate=0.1)
_BASE: dict[str, Any] = dict(
    embed_dim=448, depth=16, num_heads=8, map_blocks=(15,), conv_depths=(3, 3), drop_path_rate=0.35
)


@register_model
def fan_vit_tiny(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-ViT-Tiny, 7.3 M parameters."""
    return _create("fan_vit_tiny", pretrained, kwargs)


@register_model
def fan_vit_small(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-ViT-Small, 28.4 M parameters."""
    return _create("fan_vit_small", pretrained, kwargs, embed_dim=384, num_heads=8, drop_path_rate=0.2)


@register_model
def fan_vit_base(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-ViT-Base, 54.4 M parameters."""
    return _create("fan_vit_base", pretrained, kwargs, embed_dim=448, depth=18, num_heads=8, drop_path_rate=0.35)


@register_model
def fan_vit_large(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-ViT-Large, 80.6 M parameters."""
    args = dict(embed_dim=480, depth=24, num_heads=10, drop_path_rate=0.3, head_init_scale=0.001)
    return _create("fan_vit_large", pretrained, kwargs, **args)


@register_model
def fan_hybrid_tiny(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-Hybrid-Tiny, 7.5 M parameters."""
    return _create("fan_hybrid_tiny", pretrained, kwargs, **_HYBRID)


@register_model
def fan_hybrid_small(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-Hybrid-Small, 26.1 M parameters."""
    args = dict(embed_dim=384, depth=10, map_blocks=(9,), drop_path_rate=0.25)
    return _create("fan_hybrid_small", pretrained, kwargs, **_HYBRID | args)


@register_model
def fan_hybrid_base(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-Hybrid-Base, 50.5 M parameters."""
    return _create("fan_hybrid_base", pretrained, kwargs, **_BASE)


@register_model
def fan_hybrid_large(pretrained: bool = False, **kwargs: Any) -> FAN:
    """FAN-Hybrid-Large, 76.9 M parameters."""
    args = dict(embed_dim=480, depth=22, num_heads=10, map_blocks=(18,), conv_depths=(3, 5))
    return _create("fan_hybrid_large", pretrained, kwargs, **args, drop_path_rate=0.45, head_init_scale=0.001)


@register_model
def tap_fan_hybrid_tiny(pretrained: bool = False, **kwargs: Any) -> FAN:
    """TAP-FAN-Hybrid-Tiny, 7.5 M parameters."""
    return _create("tap_fan_hybrid_tiny", pretrained, kwargs, **_HYBRID, num_scales=4)


@register_model
def tap_fan_hybrid_base(pretrained: bool = False, **kwargs: Any) -> FAN:
    """TAP-FAN-Hybrid-Base, 50.7 M parameters."""
    return _create("tap_fan_hybrid_base", pretrained, kwargs, **_BASE, num_scales=4)


_SMALL: dict[str, Any] = dict(embed_dim=48, depth=3, num_heads=4, map_blocks=(1,), conv_depths=(1, 1))
_SMALL |= dict(conv_dims=(16, 32), mlp_ratio=2)


@register_model
def test_foveal_fan(pretrained: bool = False, **kwargs: Any) -> FAN:
    """A very small FAN-Hybrid, for tests and demonstrations."""
    return _create("test_foveal_fan", pretrained, kwargs, **_SMALL)


@register_model
def test_foveal_tap_fan(pretrained: bool = False, **kwargs: Any) -> FAN:
    """A very small TAP-FAN-Hybrid, for tests and demonstrations."""
    return _create("test_foveal_tap_fan", pretrained, kwargs, **_SMALL, num_scales=4)
