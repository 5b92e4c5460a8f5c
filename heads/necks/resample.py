"""Deformable aggregation with DCNv4's semantics (arXiv 2401.06197), on `torchvision.ops.deform_conv2d`.

At every position, per channel group, the output is the sum of 9 bilinear samples of a map (zeros outside), each times
an unbounded weight: no softmax, no sigmoid. Sample (i, j), column i and row j of a 3x3 grid, lies at
``x + s * (i - 1 + dx), y + s * (j - 1 + dy)``: the scale s applies to the grid and the learned offsets.

`deform_conv2d` stores no samples for the backward pass, but on a CPU takes nine times as long as `grid_sample`, which
is also what exporters support: there the samples are taken one by one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

_TAPS = [(i, j) for i in range(3) for j in range(3)]  # (column, row) in the order of the checkpoints


def deformable_aggregate(
    value: torch.Tensor,
    points: torch.Tensor,
    groups: int,
    offset_scale: float,
    center: bool = True,
    fused: bool | None = None,
) -> torch.Tensor:
    """Sum of nine (without the center, eight) weighted samples around every position.

    Args:
        value: ``[B, C, H, W]``; half precision is computed in float32.
        points: ``[B, >= groups * 3 * K, H, W]``: for each group the K offsets as x, y pairs, then the K weights, the K
            samples in column-major order. Further channels are ignored.
        groups: of channels.
        offset_scale: s above.
        center: whether sample (1, 1) takes part.
        fused: by `deform_conv2d`, or one sample at a time; None: the former, but on a CPU and for export the latter.

    Returns:
        ``[B, C, H, W]``, as ``value``.
    """
    batch, channels, height, width = value.shape
    taps = [tap for tap in _TAPS if center or tap != (1, 1)]
    precise = torch.promote_types(value.dtype, torch.float32)
    points = points[:, : groups * 3 * len(taps)].to(precise)
    points = points.reshape(batch * groups, 3 * len(taps), height, width)
    offsets, weights = points.split([2 * len(taps), len(taps)], 1)
    offsets = offsets.unflatten(1, (len(taps), 2))
    x = value.to(precise).reshape(batch * groups, channels // groups, height, width)  # groups become images
    if fused is None:
        fused = value.device.type != "cpu" and not torch.compiler.is_exporting()
    gather = _gather_fused if fused else _gather_each
    return gather(x, offsets, weights, taps, offset_scale).reshape(value.shape).to(value.dtype)


def _gather_each(
    x: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, taps: list[tuple[int, int]], scale: float
) -> torch.Tensor:
    height, width = x.shape[-2:]
    columns = torch.arange(width, device=x.device, dtype=x.dtype)
    rows = torch.arange(height, device=x.device, dtype=x.dtype)[:, None]
    if torch.compiler.is_exporting():  # one node instead of nine, to export faster
        base = x.new_tensor(taps)[:, :, None, None] - 1
        at_x = columns + scale * (offsets[:, :, 0] + base[:, 0])
        at_y = rows + scale * (offsets[:, :, 1] + base[:, 1])
        grid = torch.stack([(2 * at_x + 1) / width - 1, (2 * at_y + 1) / height - 1], -1)
        samples = F.grid_sample(x, grid.flatten(1, 2), align_corners=False)  # rows of all samples stacked
        return (samples.unflatten(2, (len(taps), height)) * weights[:, None]).sum(2)
    total = torch.zeros_like(x)
    for k, (i, j) in enumerate(taps):
        at_x = columns + scale * (offsets[:, k, 0] + (i - 1))
        at_y = rows + scale * (offsets[:, k, 1] + (j - 1))
        # grid_sample's coordinates run from -1 at the outer edge of the first pixel to 1 at that of the last
        grid = torch.stack([(2 * at_x + 1) / width - 1, (2 * at_y + 1) / height - 1], -1)
        total = total + F.grid_sample(x, grid, align_corners=False) * weights[:, k, None]
    return total


def _gather_fused(
    x: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, taps: list[tuple[int, int]], scale: float
) -> torch.Tensor:
    # torchvision takes row-major samples and (y, x) offsets from the unscaled grid; a missing sample gets weight 0
    order = [(i, j) for j in range(3) for i in range(3)]
    stretch = (scale - 1) * offsets.new_tensor([[j - 1, i - 1] for i, j in order])
    nothing = torch.zeros_like(weights[:, 0])
    weights = torch.stack([weights[:, taps.index(tap)] if tap in taps else nothing for tap in order], 1)
    nothing = torch.zeros_like(offsets[:, 0])
    moves = torch.stack([offsets[:, taps.index(tap)].flip(1) if tap in taps else nothing for tap in order], 1)
    moves = moves * scale + stretch[:, :, None, None]
    ones = x.new_ones(x.shape[1], 1, 3, 3)  # a kernel for each channel
    return deform_conv2d(x, moves.flatten(1, 2), ones, padding=1, mask=weights)


class DeformableResampling(nn.Module):
    """DCNv4 with offsets and weights from a second map, as in A3-FPN.

    Args:
        channels: of both maps.
        groups: of channels that share offsets and weights.
        offset_scale: stretches the grid and the offsets.
        context_kernel: of the depthwise convolution on the context before the offsets and weights; None: none.
        output_bias: of the output projection.
        center: whether the position itself is one of the samples.
        center_scale: blend in each position's own value, with a gate per group.
        pointwise: project the values and the result.

    Raises:
        ValueError: if the groups do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        offset_scale: float = 1.0,
        context_kernel: int | None = 3,
        output_bias: bool = True,
        center: bool = True,
        center_scale: bool = False,
        pointwise: bool = True,
    ) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels can't be split into {groups} groups")
        self.groups, self.offset_scale, self.center = groups, offset_scale, center
        self.context = nn.Identity()
        if context_kernel:
            self.context = nn.Conv2d(channels, channels, context_kernel, padding=context_kernel // 2, groups=channels)
        # a multiple of 8 channels, as in the checkpoints; the last ones are unused
        self.points = nn.Conv2d(channels, math.ceil(groups * (9 if center else 8) * 3 / 8) * 8, 1)
        self.value = nn.Conv2d(channels, channels, 1) if pointwise else nn.Identity()
        self.output = nn.Conv2d(channels, channels, 1, bias=output_bias) if pointwise else nn.Identity()
        self.center_gate = nn.Conv2d(channels, groups, 1) if center_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero offsets and weights, so that the initial result is zero; Xavier for the projections."""
        for module in (self.points, self.center_gate):
            if module is not None:
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (self.value, self.output):
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Both ``[B, C, H, W]`` to ``[B, C, H, W]``."""
        value = self.value(x)
        points = self.points(self.context(context))
        y = deformable_aggregate(value, points, self.groups, self.offset_scale, self.center)
        if self.center_gate is not None:
            gate = self.center_gate(y).sigmoid().repeat_interleave(y.shape[1] // self.groups, 1)
            y = y * (1 - gate) + value * gate
        return self.output(y)
