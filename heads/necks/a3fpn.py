"""A3-FPN (arXiv 2604.10210): columns of growing height, in which every level is fused from all the others.

A column reads neighbouring levels of the pyramid and recomputes each of them from all of them: the others are resized
to it (`Sample`), aligned by deformable samples around every position, whose offsets and weights come from all of them
(`Resampler`), and summed with one sigmoid weight map each (`Fusion`); then channels of little weight are folded into
those of more (`Reassemble`). The first column has two levels, the last all:

    top_down     (2, 3) -> (1, 2, 3) -> (0, 1, 2, 3)      the released detectors
    bottom_up    (0, 1) -> (0, 1, 2) -> (0, 1, 2, 3)      the paper's figure, the released UPerNet
    columns=1                           (0, 1, 2, 3)      behind the pixel decoder of the released Mask2Former

Where strides do not divide a map (odd sizes), maps are cut off or continued by their last row and column; where they
do, the outputs are the published implementation's. Its SyncBN is BatchNorm here, which
`nn.SyncBatchNorm.convert_sync_batchnorm` turns into one.

It compiles, and exports to ONNX too.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..backbone import Neck, ShapeSpec
from .resample import DeformableResampling

# The settings of the released models, and of their lighter variant. They are for widths of 256 and 512; both give 16
# channels to a group, which `A3FPN` keeps for other widths.
PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(squeeze_limit=4, expansion=4.0, resampling=True, offset_scale=2.0),
    "lite": dict(squeeze_limit=None, expansion=2.0, resampling="last", offset_scale=1.0),
}
_GROUP = 16  # channels of a group, and how many times the maps that weigh a level are narrower than it


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
    """A map of one level, brought to another's channels and size.

    Upwards by a 1x1 convolution (where the channels differ) and bilinear interpolation; downwards by a convolution as
    large as its stride, depthwise where the channels agree.
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
    """The top left corner of a map, continued by its last row and column where it is too small."""
    x = x[..., :height, :width]
    missing = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else x


class RepVGG(nn.Module):
    """A 3x3 and a 1x1 convolution side by side (arXiv 2101.03697, without the identity), one 3x3 for inference."""

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
        three, one = (fuse_conv_bn_eval(x.conv.eval(), x.norm.eval()) for x in (self.conv1, self.conv2))
        assert three.bias is not None and one.bias is not None  # of the norms
        three.weight += F.pad(one.weight, [1, 1, 1, 1])
        three.bias += one.bias
        self.folded = three.train(self.training)
        del self.conv1, self.conv2


class RepCSP(nn.Module):
    """Two 1x1 convolutions, RepVGG blocks behind the first, added up and brought to ``outputs`` channels."""

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
    """Deformable samples of a map where its context says, normalized over the channels."""

    def __init__(self, channels: int, groups: int, norm: bool = True, **kwargs: Any) -> None:
        super().__init__()
        self.resampling = DeformableResampling(channels, groups, **kwargs)
        self.norm = LayerNorm2d(channels, eps=1e-6) if norm else nn.Identity()
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.resampling(x, context)))


class Fusion(nn.Module):
    """Maps of one size in one: all but the last, a level's own, are resampled; then summed, weighted by position.

    Args:
        channels: of the maps.
        inputs: how many there are.
        compress: channels that each is brought to for the weights.
        blocks, expansion: of the `RepCSP` that gives the weights.
        resampling: arguments of `Resampler`, or None for none.
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
        """n maps ``[B, C, H, W]``, the level's own at the end, to one."""
        if self.resamplers is not None and self.context is not None:
            contexts = self.context(torch.cat(maps, 1)).chunk(len(self.resamplers), 1)
            moved = [r(x, context) for r, x, context in zip(self.resamplers, maps, contexts)]  # noqa: B905 less the own
            maps = [*moved, maps[-1]]
        weights = self.weights(torch.cat([f(x) for f, x in zip(self.compress, maps, strict=True)], 1)).sigmoid()
        return reduce(operator.add, (x * weights[:, i : i + 1] for i, x in enumerate(maps)))


class Reassemble(nn.Module):
    """Values whose group-normalized channel counts for little are added, in part, to the channel's mirror image.

    The gate is a hard step at 0.5; only below it does it have a gradient.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.gate = nn.GroupNorm(groups, channels)
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.gate.weight / self.gate.weight.sum()
        gate = (self.gate(x) * share[:, None, None]).sigmoid()
        keeps = gate > 0.5
        kept = torch.where(keeps, torch.ones_like(gate), gate) * x
        moved = torch.where(keeps, torch.zeros_like(gate), gate) * x
        return self.act(self.norm(kept + moved.flip(1)))


class Level(nn.Module):
    """One level of a column: the others sampled to it, nearest first and coarser before finer; fused; reassembled."""

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
    """How many times a map of ``stride`` grows and shrinks to have the stride ``to``."""
    up, down = max(stride // to, 1), max(to // stride, 1)
    if stride * down != to * up:
        raise ValueError(f"strides must divide one another, got {stride} and {to}")
    return up, down


class A3FPN(Neck):
    """The pyramid network. What a preset leaves open follows from the maps' channels, unless given.

    Args:
        spec: of the input maps, at least two.
        out_channels: of every output map.
        preset: ``"full"``, the released models' settings (squeeze 1, 2, 4, 4; expansion 4; resampling in every column,
            the grid stretched by 2), or ``"lite"`` (squeeze 1, 2, 4, 8; expansion 2; resampling in the last column).
        direction: ``"top_down"`` or ``"bottom_up"``, see above.
        columns: how many, the last ones; None: as many as there are levels but one.
        extra_levels: ``"pool"``: one coarser map by subsampling the last; a number: so many by strided convolutions;
            ``"p6p7"``: two.
        start_level: leave out so many of the finest maps (1 for RetinaNet's P3 to P7).
        squeeze: by level, how many times the maps are narrower than those given.
        compress: by level, channels of the maps that weigh the inputs.
        groups: by level, of the reassembly's GroupNorm.
        resampling: whether the columns resample; one for all or one for each.
        resampling_groups: by level.
        expansion: of the network that weighs the inputs.
        blocks: of the same.
        offset_scale: of `Resampler`.
        updated_first: bottom-up, the finer level of the first column reads the new map of the coarser one, as in the
            released segmentor.
        **kwargs: of `Resampler`.

    Attributes:
        spec: of the output maps.

    Raises:
        ValueError: if the arguments do not fit the maps or one another; the message names them.

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
        if not isinstance(extra, int) or extra < 0:
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

        They may also come, and then go, coarsest first, as the released Mask2Former has them.
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

        The outputs are those of evaluation mode up to rounding. Repeating it changes nothing.

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
    """How many times the maps are squeezed, their channels then, and the further settings of each level."""

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
    """How many groups of at least 16 channels (all of them if there are fewer) divide the width."""
    size = next(size for size in range(min(_GROUP, width), width + 1) if width % size == 0)
    return width // size
