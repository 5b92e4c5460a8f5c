"""Layers and helpers that several families share and timm does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.utils.fusion import fuse_conv_bn_weights


class Blocks(nn.Sequential):
    """Blocks in a row, recomputed in the backward pass while ``grad_checkpointing`` is set."""

    grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self, x)
        return super().forward(x)


class Stage(nn.Module):
    """Blocks at one resolution, after a ``downsample`` unless it is None."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = Blocks(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x if self.downsample is None else self.downsample(x))


def init_weights(module: nn.Module) -> None:
    """Linear layers from a normal cut at two deviations of 0.02, biases 0; other layers keep PyTorch's defaults."""
    for m in module.modules():
        if isinstance(m, nn.Linear) and not m.weight.is_meta:
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth rates, linear over all blocks from 0 to ``rate``, split by level."""
    last = max(sum(depths) - 1, 1)
    rates = iter([rate * i / last for i in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def to_format(x: torch.Tensor, output_fmt: str, own: str = "NHWC") -> torch.Tensor:
    """A map of the format ``own`` as ``"NHWC"`` or ``"NCHW"``; one made of the other is a view."""
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f'output_fmt must be "NCHW" or "NHWC", got {output_fmt!r}')
    if output_fmt == own:
        return x
    return x.permute(0, 3, 1, 2) if own == "NHWC" else x.permute(0, 2, 3, 1)


def positive_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """An int as (rows, columns), a pair as it is; ValueError with ``name`` for others and for lengths below 1."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(length, int) and length > 0 for length in pair):
        raise ValueError(f"{name} must be a positive int or a pair (rows, columns) of them, got {value!r}")
    return pair[0], pair[1]


def fold_batch_norm(conv: nn.Conv2d, norm: Any) -> bool:
    """Fold a BatchNorm, also a synchronized or frozen one, into the convolution before it; False for other modules."""
    if getattr(norm, "running_var", None) is None:
        return False
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.bias.requires_grad_(conv.weight.requires_grad)
    return True


def shortfall(length: int, least: int) -> int:
    """How much ``length`` is short of ``least``, for a dynamic size, too: 0 where an exporter knows that it is not."""
    if statically_known_true(length >= least):
        return 0
    longer: Any = torch.sym_max(length, least)
    return longer - length


def average_pool(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``F.adaptive_avg_pool2d`` of ``[B, C, H, W]`` for dynamic sizes, as a matrix product for each axis."""
    for target in (size[1], size[0]):
        source = x.shape[3]
        number = torch.arange(target, device=x.device)[:, None]
        length = torch.full((), source, dtype=torch.int64, device=x.device)
        start = torch.div(number * length, target, rounding_mode="floor")
        stop = torch.div((number + 1) * length + (target - 1), target, rounding_mode="floor")
        position = torch.arange(source, device=x.device)
        inside = (position >= start) & (position < stop)
        matrix = (inside / (stop - start)).to(x.dtype)  # target, source
        # of two dimensions each, without a broadcast: there an exporter takes down which lengths are 1
        lines = x.clone(memory_format=torch.contiguous_format).flatten(0, 2)
        x = (lines @ matrix.t()).unflatten(0, x.shape[:3]).transpose(2, 3)
    return x
