"""Triplet attention, and timm's ResNets and MobileNetV2 with it; ULSAM.

Paper: Rotate to Attend: Convolutional Triplet Attention Module (Misra et al., WACV 2021, arXiv:2010.03045). Authors'
code: https://github.com/landskape-ai/triplet-attention (MIT). This is an independent implementation; the published
weights load unchanged and give the published outputs.

A gate over each pair of the axes channels, rows and columns, from the maximum and the mean over the third: no reduction
of channels and about 300 parameters. It follows the last norm of a block, before the sum. The networks are timm's
`ResNet` and `EfficientNet` (Apache-2.0), with their methods; `TripletAttention` also is an ``attn_layer`` for others:
``timm.create_model("resnet34", block_args=dict(attn_layer=TripletAttention))``.

Feature maps are ``[B, C, H, W]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .base import check_names, unwrap
from .layers import guard_activations, plain_numbers, refuse_scripting

__all__ = ["ULSAM", "TripletAttention", "checkpoint_filter_fn", "family"]


class Gate(nn.Module):
    """Maximum and mean ``[B, 2, rows, columns]`` to a gate in (0, 1), ``[B, rows, columns]``."""

    def __init__(self, kernel_size: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **factory)
        self.bn = nn.BatchNorm2d(1, momentum=0.01, **factory)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def set_kernel_size(self, kernel_size: int) -> None:
        """Give the convolution another kernel, with new weights, where the size differs."""
        if kernel_size != self.conv.kernel_size[0]:
            like = self.conv.weight
            self.conv = nn.Conv2d(
                2, 1, kernel_size, padding=kernel_size // 2, bias=False, device=like.device, dtype=like.dtype
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).sigmoid().squeeze(1)


class TripletAttention(nn.Module):
    """The mean of three gates, of channels and columns (``cw``), rows and channels (``hc``), and rows and columns
    (``hw``), times the map ``[B, C, H, W]``.

    Args:
        channels: of the map; the parameters do not depend on it.
        kernel_size: odd, of the gates' convolutions.
        no_spatial: without the gate of rows and columns.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an even kernel.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.triplet import TripletAttention
        >>> model = timm.create_model("resnet34", block_args=dict(attn_layer=TripletAttention)).eval()
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 1000])
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self, channels: int, kernel_size: int = 7, no_spatial: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        factory = dict(device=device, dtype=dtype)
        self.cw = Gate(kernel_size, **factory)
        self.hc = Gate(kernel_size, **factory)
        self.hw = None if no_spatial else Gate(kernel_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        # the map is never rotated: only the maxima and means, which have one axis less
        gates = self.cw(_pooled(x, 2)).unsqueeze(2) + self.hc(_pooled(x, 3).transpose(2, 3)).transpose(1, 2)[..., None]
        if self.hw is None:
            return x * (gates * (1 / 2))
        return x * ((gates + self.hw(_pooled(x, 1)).unsqueeze(1)) * (1 / 3))


def _pooled(x: Tensor, axis: int) -> Tensor:
    return torch.stack([x.amax(axis), x.mean(axis)], 1)


class Subspace(nn.Module):
    """``x * (1 + softmax over the positions)`` of a group of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9)
        self.conv_point = nn.Conv2d(channels, 1, 1)
        self.bn_point = nn.BatchNorm2d(1, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(self.bn_dws(self.conv_dws(x)).relu(), 3, 1, 1)
        y = self.bn_point(self.conv_point(y)).relu()
        return x + x * y.flatten(2).softmax(2).view_as(y)


class ULSAM(nn.Module):
    """Ultra-lightweight subspace attention (arXiv:2006.15102): an attention map for each of ``num_splits`` groups of
    the channels. Names of https://github.com/Nandan91/ULSAM, which states no licence; no weights are published.

    Examples:
        >>> import torch
        >>> from foveal.backbones.triplet import ULSAM
        >>> ULSAM(32, num_splits=4)(torch.randn(2, 32, 7, 9)).shape
        torch.Size([2, 32, 7, 9])
    """

    def __init__(self, channels: int, num_splits: int = 4) -> None:
        super().__init__()
        if channels % num_splits:
            raise ValueError(f"{channels} channels are not divisible by num_splits {num_splits}")
        self.subspaces = nn.ModuleList(Subspace(channels // num_splits) for _ in range(num_splits))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.subspaces), 1)
        return torch.cat([module(part) for module, part in zip(self.subspaces, parts, strict=True)], 1)


# ---- networks


class TripletBasicBlock(BasicBlock):
    """timm's block, with a sum that overwrites no tensor that a hook may hold."""

    def forward(self, x: Tensor) -> Tensor:
        aa: Any = self.aa
        y = aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        return self.act2(_residual(self, self.bn2(self.conv2(y)), x))


class TripletBottleneck(Bottleneck):
    """Likewise."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        aa: Any = self.aa
        y = aa(self.act2(self.drop_block(self.bn2(self.conv2(y)))))
        return self.act3(_residual(self, self.bn3(self.conv3(y)), x))


def _residual(block: Any, y: Tensor, x: Tensor) -> Tensor:
    y = y if block.se is None else block.se(y)
    y = y if block.drop_path is None else block.drop_path(y)
    return y + (x if block.downsample is None else block.downsample(x))


def _resnet(*, kernel_size: int = 7, no_spatial: bool = False, **kwargs: Any) -> ResNet:
    attention = partial(TripletAttention, kernel_size=kernel_size, no_spatial=no_spatial)
    block_args = {"attn_layer": attention, **(kwargs.pop("block_args", None) or {})}
    model = ResNet(block_args=block_args, zero_init_last=kwargs.pop("zero_init_last", False), **kwargs)
    for module in model.modules():
        if isinstance(module, TripletAttention) and module.hw is not None:
            nn.init.zeros_(module.hw.bn.weight)  # this gate starts at 1/2
    guard_activations(model)
    return model


_DEPTHS = (1, 2, 3, 4, 3, 3, 1)  # of MobileNetV2


def _mobilenetv2(
    *, kernel_size: int = 7, no_spatial: bool = False, channel_multiplier: float = 1.0, **kwargs: Any
) -> EfficientNet:
    rows = zip(_DEPTHS, (1, 2, 2, 2, 1, 2, 1), (16, 24, 32, 64, 96, 160, 320), strict=True)
    stages = [[f"ir_r{n}_k3_s{stride}_e6_c{channels}"] for n, stride, channels in rows]
    stages[0] = ["ds_r1_k3_s1_c16"]
    model = EfficientNet(
        decode_arch_def(stages),
        num_features=max(1280, round_channels(1280, channel_multiplier)),
        round_chs_fn=partial(round_channels, multiplier=channel_multiplier),
        act_layer=nn.ReLU6,
        **kwargs,
    )
    for block in list(model.blocks.modules()):  # type: ignore[union-attr]
        for conv, norm in (("conv_pwl", "bn3"), ("conv_pw", "bn2")):  # of an inverted residual; of the first block
            if hasattr(block, conv):
                channels: int = getattr(block, conv).out_channels
                attention = TripletAttention(channels, kernel_size, no_spatial)
                setattr(block, norm, nn.Sequential(getattr(block, norm), attention))
                break
    guard_activations(model)
    return model


_GATES = {"ChannelGateH": "cw", "ChannelGateW": "hc", "SpatialGate": "hw"}
# the authors renamed the attribute of the block, the gates and their parts after training
_GATE = re.compile(
    rf"(\.(?:triplet_attention|triplet|pcam|se))?\.({'|'.join(_GATES)}|cw|hc|hw)\.(?:(?:spatial|conv)\.)?(conv|bn)\."
)
# torchvision's names in the blocks of MobileNetV2: of the first, and of all others
_FIRST = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2.0", "3": "bn2.1"}
_LATER = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3.0", "4": "bn3.1"}


def _mobilenet_names() -> dict[str, str]:
    """torchvision's name of each layer -> timm's."""
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2"}
    blocks = [f"blocks.{stage}.{i}" for stage, depth in enumerate(_DEPTHS) for i in range(depth)]
    for number, block in enumerate(blocks, 1):
        parts = _FIRST if number == 1 else _LATER
        names |= {f"features.{number}.conv.{theirs}": f"{block}.{ours}" for theirs, ours in parts.items()}
    return names | {"classifier.1": "classifier"}


_TORCHVISION = _mobilenet_names()


def own_name(name: str) -> str:
    """timm's name of a parameter, and ours of a gate's."""
    if match := re.match(r"(?:features\.\d+(?:\.conv)?|classifier)(?:\.\d+)+", name):
        name = _TORCHVISION.get(match[0], match[0]) + name[match.end() :]
    return _GATE.sub(lambda m: f"{'.se' if m[1] else ''}.{_GATES.get(m[2], m[2])}.{m[3]}.", name)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Convert a checkpoint to a state dict of ``model``, whose gates get the checkpoint's kernel size.

    Supports the three kinds of names in the authors' files, torchvision's names of MobileNetV2, and those of these
    models, also wrapped by ``DistributedDataParallel``, or under ``state_dict`` or ``model``.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    state_dict = {own_name(name): value for name, value in unwrap(state_dict).items()}
    check_names(state_dict, model.state_dict(), ignore=r"(fc|classifier)\.")
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            module.set_kernel_size(state_dict[f"{name}.conv.weight"].shape[-1])
    return state_dict


# ---- registry

_NOTES = (
    "The weights are on Google Drive and not downloaded automatically: get the file from the page in `foveal info` and "
    "pass pretrained=True, pretrained_cfg_overlay=dict(file=PATH).",
    "kernel_size is the gates', 7 unless a checkpoint has another.",
)


def _cfg(**facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "mit",
        "origin_url": "https://github.com/landskape-ai/triplet-attention",
        "paper_ids": "arXiv:2010.03045",
        "notes": _NOTES,
        **facts,
    }


_MOBILENET = dict(first_conv="conv_stem", classifier="classifier")
default_cfgs = generate_default_cfgs(
    {
        "triplet_resnet18.in1k": _cfg(),
        "triplet_resnet18.in1k_k3": _cfg(),
        "triplet_resnet50.in1k": _cfg(),
        "triplet_resnet50.in1k_k3": _cfg(),
        "triplet_mobilenetv2_100.in1k": _cfg(**_MOBILENET),
        "triplet_mobilenetv2_100.in1k_k3": _cfg(**_MOBILENET),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"Triplet"``."""
    return "Triplet"


def _create(
    build: Callable[..., Any], variant: str, pretrained: bool, kwargs: Mapping[str, Any], **defaults: Any
) -> Any:
    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter"),
        **plain_numbers({**defaults, **kwargs}),
    )


@register_model
def triplet_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with triplet attention, 11.7 M parameters."""
    return _create(_resnet, "triplet_resnet18", pretrained, kwargs, block=TripletBasicBlock, layers=(2, 2, 2, 2))


@register_model
def triplet_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 with triplet attention, 25.6 M parameters."""
    return _create(_resnet, "triplet_resnet50", pretrained, kwargs, block=TripletBottleneck, layers=(3, 4, 6, 3))


@register_model
def triplet_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNetV2 with triplet attention, 3.5 M parameters."""
    return _create(_mobilenetv2, "triplet_mobilenetv2_100", pretrained, kwargs)
