"""A3-FPN (arXiv 2604.10210): columns of growing height, in which every level is fused from all the others.

A column reads neighbouring levels of the pyramid and recomputes each of them from all of them: the others are resized
to it (`Sample`), aligned by deformable sampling with offsets and weights predicted from all levels (`Resampler`), and
summed with one sigmoid weight map each (`Fusion`); then channels with small weights are folded into those with large
weights (`Reassemble`). The first column has two levels, the last all:

    top_down     (2, 3) -> (1, 2, 3) -> (0, 1, 2, 3)      the released detectors
    bottom_up    (0, 1) -> (0, 1, 2) -> (0, 1, 2, 3)      the paper's figure, the released UPerNet
    columns=1                           (0, 1, 2, 3)      in the pixel decoder of the released Mask2Former

If strides do not divide a map (odd sizes), maps are cropped or padded by repeating the last row and column; otherwise
the outputs match the published implementation. Its SyncBN is BatchNorm here;
`nn.SyncBatchNorm.convert_sync_batchnorm` converts it.

Supports `torch.compile` and ONNX export.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..backbone import GroupNorm, Neck, ShapeSpec
from ..body import check_foldable
from .resample import DeformableResampling

# Settings of the released models and their lighter variant, for widths of 256 and 512. Both have 16 channels per group,
# which `A3FPN` keeps for other widths.
PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(squeeze_limit=4, expansion=4.0, resampling=True, offset_scale=2.0),
    "lite": dict(squeeze_limit=None, expansion=2.0, resampling="last", offset_scale=1.0),
}
_GROUP = 16  # channels of a group, and the reduction of the maps that predict a level's weights


class ConvNormAct(nn.Module):
    """Convolution without bias, BatchNorm, and GELU unless ``act=False``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        padding = 0 if stride == kernel else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class Sample(nn.Module):
    """Resample a map to the channels and size of another level.

    Upsampling: a 1x1 convolution (if the channels differ) and bilinear interpolation. Downsampling: a convolution with
    kernel size = stride, depthwise if the channels are equal.
    """

    def __init__(self, inputs: int, outputs: int, up: int, down: int) -> None:
        super().__init__()
        self.up, self.down = up, down
        if down > 1:
            groups = inputs if inputs == outputs else 1
            self.conv: nn.Module = ConvNormAct(inputs, outputs, down, down, groups)
        else:
            self.conv = ConvNormAct(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """``[B, inputs, h, w]`` to ``[B, outputs, *size]``."""
        if self.down > 1:
            return self.conv(_fit(x, size[0] * self.down, size[1] * self.down))
        x = self.conv(x)
        if self.up > 1:
            x = F.interpolate(x, scale_factor=self.up, mode="bilinear", align_corners=False)
        return _fit(x, *size)


def _fit(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Crop a map to its top left corner, or pad it by repeating the last row and column."""
    x = x[..., :height, :width]
    missing = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else x


class RepVGG(nn.Module):
    """Parallel 3x3 and 1x1 convolutions (arXiv 2101.03697, without the identity); a single 3x3 for inference."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, channels, 3, act=False)
        self.conv2 = ConvNormAct(channels, channels, act=False)
        self.folded: nn.Conv2d | None = None
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.folded(x) if self.folded is not None else self.conv1(x) + self.conv2(x))

    @torch.no_grad()
    def reparameterize(self) -> None:
        if self.folded is not None:
            return
        for branch in (self.conv1, self.conv2):
            check_foldable(branch.conv, branch.norm)
        three, one = (fuse_conv_bn_eval(x.conv.eval(), x.norm.eval()) for x in (self.conv1, self.conv2))
        assert three.bias is not None and one.bias is not None  # of the norms
        three.weight += F.pad(one.weight, [1, 1, 1, 1])
        three.bias += one.bias
        self.folded = three.train(self.training)
        del self.conv1, self.conv2


class RepCSP(nn.Module):
    """Two 1x1 convolutions, RepVGG blocks after the first; summed and projected to ``outputs`` channels."""

    def __init__(self, inputs: int, outputs: int, blocks: int, expansion: float) -> None:
        super().__init__()
        hidden = int(outputs * expansion)
        self.conv1 = ConvNormAct(inputs, hidden)
        self.conv2 = ConvNormAct(inputs, hidden)
        self.blocks = nn.Sequential(*(RepVGG(hidden) for _ in range(blocks)))
        self.conv3 = nn.Conv2d(hidden, outputs, 1) if hidden != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(self.blocks(self.conv1(x)) + self.conv2(x))


class Resampler(nn.Module):
    """Deformable sampling of a map guided by a context, normalized over the channels."""

    def __init__(self, channels: int, groups: int, norm: bool = True, **kwargs: Any) -> None:
        super().__init__()
        self.resampling = DeformableResampling(channels, groups, **kwargs)
        self.norm = LayerNorm2d(channels, eps=1e-6) if norm else nn.Identity()
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.resampling(x, context)))


class Fusion(nn.Module):
    """Fuse maps of one size: all but the last, the level's own, are resampled; then a weighted sum per position.

    Args:
        channels: of the maps.
        inputs: number of maps.
        compress: channels of each map in the weight network.
        blocks, expansion: of the `RepCSP` that predicts the weights.
        resampling: arguments of `Resampler`; None: no resampling.
    """

    def __init__(
        self, channels: int, inputs: int, compress: int, blocks: int, expansion: float, resampling: dict | None
    ) -> None:
        super().__init__()
        self.context = self.resamplers = None
        if resampling is not None:
            self.context = ConvNormAct(channels * inputs, channels * (inputs - 1))
            self.resamplers = nn.ModuleList(Resampler(channels, **resampling) for _ in range(inputs - 1))
        self.compress = nn.ModuleList(ConvNormAct(channels, compress) for _ in range(inputs))
        self.weights = RepCSP(compress * inputs, inputs, blocks, expansion)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """n maps ``[B, C, H, W]``, the level's own last, to one."""
        if self.resamplers is not None and self.context is not None:
            contexts = self.context(torch.cat(maps, 1)).chunk(len(self.resamplers), 1)
            moved = [r(x, context) for r, x, context in zip(self.resamplers, maps, contexts)]  # noqa: B905 less the own
            maps = [*moved, maps[-1]]
        weights = self.weights(torch.cat([f(x) for f, x in zip(self.compress, maps, strict=True)], 1)).sigmoid()
        return reduce(operator.add, (x * weights[:, i : i + 1] for i, x in enumerate(maps)))


class ChannelShare(GroupNorm):
    """Group norm, each channel times the share of its weight in the sum of all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (self.weight / self.weight.sum())[:, None, None]


class Reassemble(nn.Module):
    """Values of channels with a small gate are added, in part, to the mirrored channel.

    The gate is a hard step at 0.5 and has a gradient only below it.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.gate = ChannelShare(groups, channels)
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate(x).sigmoid()
        keeps = gate > 0.5
        kept = torch.where(keeps, torch.ones_like(gate), gate) * x
        moved = torch.where(keeps, torch.zeros_like(gate), gate) * x
        return self.act(self.norm(kept + moved.flip(1)))


class Level(nn.Module):
    """One level of a column: sample the others to it (coarser ones first, nearest first), fuse, reassemble."""

    def __init__(
        self,
        level: int,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        groups: int,
        resampling_groups: int,
        resampling: dict[str, Any] | None,
        **fusion: Any,
    ) -> None:
        super().__init__()
        if resampling is not None:
            resampling = {"groups": resampling_groups, **resampling}
        self.level = level
        self.sources = sources(level, len(channels))
        self.samples = nn.ModuleList(
            Sample(channels[i], channels[level], *_ratio(strides[i], strides[level])) for i in self.sources
        )
        self.fusion = Fusion(channels[level], len(channels), resampling=resampling, **fusion)
        self.reassemble = Reassemble(channels[level], groups)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        own = maps[self.level]
        others = [f(maps[i], own.shape[-2:]) for i, f in zip(self.sources, self.samples, strict=True)]
        return self.reassemble(self.fusion([*others, own]))


def sources(level: int, count: int) -> list[int]:
    """The other levels of ``count`` in the order of fusion: coarser ones, then finer ones, the nearest first."""
    return [*range(level + 1, count), *range(level - 1, -1, -1)]


def _ratio(stride: int, to: int) -> tuple[int, int]:
    """Upsampling and downsampling factor from ``stride`` to the stride ``to``."""
    up, down = max(stride // to, 1), max(to // stride, 1)
    if stride * down != to * up:
        raise ValueError(f"strides must divide one another, got {stride} and {to}")
    return up, down


class A3FPN(Neck):
    """The pyramid network. Unless given, settings that the preset leaves open follow from the channels of the maps.

    Args:
        spec: of the input maps, at least two.
        out_channels: of every output map.
        preset: ``"full"``, the released models' settings (squeeze 1, 2, 4, 4; expansion 4; resampling in every column,
            the grid stretched by 2), or ``"lite"`` (squeeze 1, 2, 4, 8; expansion 2; resampling in the last column).
        direction: ``"top_down"`` or ``"bottom_up"``, see above.
        columns: number of columns, the last ones; None: number of levels - 1.
        extra_levels: ``"pool"``: one coarser map by subsampling the last; a number: that many by strided convolutions;
            ``"p6p7"``: two.
        start_level: number of the finest maps without an output (1 for RetinaNet's P3 to P7).
        squeeze: per level, reduction of the channels.
        compress: per level, channels of the maps in the weight network.
        groups: per level, of the GroupNorm in `Reassemble`.
        resampling: whether the columns resample; one value or one per column.
        resampling_groups: per level.
        expansion: of the weight network.
        blocks: of the weight network.
        offset_scale: of `Resampler`.
        updated_first: bottom-up, the finer level of the first column reads the new map of the coarser one, as in the
            released segmenter.
        **kwargs: of `Resampler`.

    Attributes:
        spec: of the output maps.

    Raises:
        ValueError: if the arguments do not fit the maps or each other; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.heads.backbone import ShapeSpec
        >>> from foveal.heads.necks import A3FPN
        >>> neck = A3FPN(ShapeSpec((64, 128), (8, 16)), out_channels=64, preset="lite").eval()
        >>> maps = [torch.randn(1, 64, 20, 26), torch.randn(1, 128, 10, 13)]
        >>> [tuple(each.shape) for each in neck(maps)]
        [(1, 64, 20, 26), (1, 64, 10, 13)]
    """

    def __init__(
        self,
        spec: ShapeSpec,
        out_channels: int = 256,
        preset: str = "full",
        *,
        direction: str = "top_down",
        columns: int | None = None,
        extra_levels: str | int | None = None,
        start_level: int = 0,
        squeeze: Sequence[int] | None = None,
        compress: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        resampling: bool | Sequence[bool] | None = None,
        resampling_groups: Sequence[int] | None = None,
        expansion: float | None = None,
        blocks: int = 1,
        offset_scale: float | None = None,
        updated_first: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        count = len(spec)
        columns = count - 1 if columns is None else columns
        if not 1 <= columns < count:
            raise ValueError(f"columns must be from 1 to {count - 1} for channels {spec.channels}, got {columns}")
        if not 0 <= start_level < count:
            raise ValueError(f"start_level must be one of {count} levels, got {start_level}")
        extra = {None: 0, "pool": 0, "p6p7": 2}.get(extra_levels, extra_levels)
        if not isinstance(extra, (int, np.integer)) or extra < 0:
            raise ValueError(f'extra_levels must be None, "pool", "p6p7" or a number of maps, got {extra_levels!r}')
        bottom_up = _one_of("direction", direction, ("top_down", "bottom_up")) == "bottom_up"
        settings = PRESETS[_one_of("preset", preset, PRESETS)]
        own = dict(squeeze=squeeze, compress=compress, groups=groups, resampling_groups=resampling_groups)
        squeeze, widths, levels = _by_level(spec, settings["squeeze_limit"] or 2**count, own)
        resamples = _by_column(settings["resampling"] if resampling is None else resampling, columns)
        kwargs["offset_scale"] = settings["offset_scale"] if offset_scale is None else offset_scale
        fusion = dict(blocks=blocks, expansion=settings["expansion"] if expansion is None else expansion)

        self.squeeze = nn.ModuleList(
            ConvNormAct(inputs, width) if s != 1 else nn.Identity()
            for inputs, width, s in zip(spec.channels, widths, squeeze, strict=True)
        )
        heights = range(count - columns + 1, count + 1)
        self.levels = [list(range(h) if bottom_up else range(count - h, count)) for h in heights]  # that columns read
        self.columns = nn.ModuleList()
        for read, resampled in zip(self.levels, resamples, strict=True):
            inputs = [widths[i] for i in read], [spec.strides[i] for i in read]
            made = read if len(read) < count else read[start_level:]
            around: dict[str, Any] = dict(fusion, resampling=kwargs if resampled else None)
            self.columns.append(
                nn.ModuleDict({str(i): Level(read.index(i), *inputs, **levels[i], **around) for i in made})
            )
        self.updated_first = updated_first and bottom_up
        self.start_level = start_level
        self.outputs = nn.ModuleList(ConvNormAct(width, out_channels, 3) for width in widths[start_level:])
        self.pool = extra_levels == "pool"
        self.extra = nn.ModuleList(ConvNormAct(out_channels, out_channels, 3, 2) for _ in range(extra))
        strides = *spec.strides[start_level:], *(spec.strides[-1] * 2 ** (i + 1) for i in range(extra + self.pool))
        self.spec = ShapeSpec((out_channels,) * len(strides), strides)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Maps ``[B, C, h, w]`` of the input spec, of any sizes, to those of `spec`.

        If they are ordered coarsest first, as in the released Mask2Former, so are the outputs.
        """
        if len(maps) != len(self.squeeze):
            raise ValueError(f"A3FPN was made for {len(self.squeeze)} maps, got {len(maps)}")
        if maps[0].shape[-2:].numel() < maps[-1].shape[-2:].numel():
            return self.forward(maps[::-1])[::-1]
        maps = [f(x) for f, x in zip(self.squeeze, maps, strict=True)]
        column: Any  # a ModuleDict of levels
        for read, column in zip(self.levels, self.columns, strict=True):
            given = [maps[i] for i in read]
            if self.updated_first and len(read) == 2:
                given[1] = maps[1] = column["1"](given)
                column = {i: level for i, level in column.items() if i == "0"}
            for i, level in column.items():
                maps[int(i)] = level(given)
        maps = [f(x) for f, x in zip(self.outputs, maps[self.start_level :], strict=True)]
        if self.pool:
            maps.append(maps[-1][..., ::2, ::2])
        for conv in self.extra:
            maps.append(conv(maps[-1]))
        return maps

    def reparameterize(self) -> A3FPN:
        """Fold the branches of every RepVGG block into one convolution, in place, for inference.

        Outputs equal those in evaluation mode up to rounding. Idempotent.

        Returns:
            The neck itself.
        """
        for module in self.modules():
            if isinstance(module, RepVGG):
                module.reparameterize()
        return self


def _one_of(name: str, value: str, known: Collection[str]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def _by_level(
    spec: ShapeSpec, limit: int, given: dict[str, Sequence[int] | None]
) -> tuple[list[int], list[int], list[dict[str, int]]]:
    """Per level, the reduction of the channels, the reduced channels, and the other settings."""

    def checked(name: str, default: list[int]) -> list[int]:
        value = given[name]
        values = default if value is None else list(value)
        if len(values) != len(spec) or min(values) < 1:
            raise ValueError(f"{name} must be {len(spec)} numbers of at least 1, got {values}")
        return values

    squeeze = checked("squeeze", [min(2**i, limit) for i in range(len(spec))])
    widths = [channels // s for channels, s in zip(spec.channels, squeeze, strict=True)]
    if min(widths) < 1:
        raise ValueError(f"squeeze {squeeze} leaves nothing of channels {spec.channels}")
    defaults = {name: [_groups(width) for width in widths] for name in ("groups", "resampling_groups")}
    defaults["compress"] = [max(width // _GROUP, 8) for width in widths]
    settings = {name: checked(name, default) for name, default in defaults.items()}
    return squeeze, widths, [{name: each[i] for name, each in settings.items()} for i in range(len(spec))]


def _by_column(resampling: bool | str | Sequence[bool], columns: int) -> list[bool]:
    if resampling == "last":
        return [False] * (columns - 1) + [True]
    resamples: list[Any] = [resampling] * columns if isinstance(resampling, bool) else list(resampling)
    if len(resamples) != columns:
        raise ValueError(f"resampling must be {columns} values, one for each column, got {resamples}")
    return resamples


def _groups(width: int) -> int:
    """The largest number of groups with at least 16 channels that divides the width."""
    size = next(size for size in range(min(_GROUP, width), width + 1) if width % size == 0)
    return width // size
