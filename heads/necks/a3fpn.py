"""A3-FPN (arXiv 2604.10210): columns of growing height, in which every level is fused from all the others.

A column takes neighbouring levels of the pyramid and gives each of them anew, from all of them as they came in: the
others are brought to its size (`Sample`), put in place by deformable samples around every position, whose offsets and
weights come from all of them together (`Resampler`), and added up with one sigmoid weight map each (`Fusion`); then
channels of little weight are folded into those of more (`Reassemble`). The first column has two levels, the last all:

    top_down     (2, 3) -> (1, 2, 3) -> (0, 1, 2, 3)      the released detectors
    bottom_up    (0, 1) -> (0, 1, 2) -> (0, 1, 2, 3)      the paper's figure, the released UPerNet
    columns=1                           (0, 1, 2, 3)      behind the pixel decoder of the released Mask2Former

Where strides do not divide a map (odd sizes), maps are cut off or continued by their last row and column; where they
do, the outputs are the published implementation's. Its SyncBN is BatchNorm here, which
`nn.SyncBatchNorm.convert_sync_batchnorm` turns into one.

It compiles, and exports to ONNX too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from ..backbone import ShapeSpec
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
        kernels, biases = [], []
        for branch in (self.conv1, self.conv2):
            scale = branch.norm.weight / (branch.norm.running_var + branch.norm.eps).sqrt()
            kernels.append(branch.conv.weight * scale[:, None, None, None])
            biases.append(branch.norm.bias - branch.norm.running_mean * scale)
        weight = kernels[0] + F.pad(kernels[1], [1, 1, 1, 1])
        self.folded = nn.Conv2d(*weight.shape[1::-1], 3, padding=1).to(weight)
        self.folded.weight.copy_(weight)
        self.folded.bias.copy_(sum(biases))
        self.folded.train(self.training)
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
        if self.resamplers is not None:
            contexts = self.context(torch.cat(maps, 1)).chunk(len(self.resamplers), 1)
            moved = [r(x, context) for r, x, context in zip(self.resamplers, maps, contexts)]  # noqa: B905 less the own
            maps = [*moved, maps[-1]]
        weights = self.weights(torch.cat([f(x) for f, x in zip(self.compress, maps, strict=True)], 1)).sigmoid()
        return sum(x * weights[:, i : i + 1] for i, x in enumerate(maps))


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

    def __init__(self, level: int, channels: Sequence[int], strides: Sequence[int], groups: int, **fusion: Any) -> None:
        super().__init__()
        self.level = level
        self.sources = sources(level, len(channels))
        self.samples = nn.ModuleList(
            Sample(channels[i], channels[level], *_ratio(strides[i], strides[level])) for i in self.sources
        )
        self.fusion = Fusion(channels[level], len(channels), **fusion)
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


class A3FPN(nn.Module):
    """The pyramid network. What a preset leaves open follows from the maps' channels, unless given.

    Args:
        spec: of the maps that it is given, at least two.
        out_channels: of every map that it gives.
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
        spec: of the maps that it gives.

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
        if count < 2:
            raise ValueError(f"A3FPN fuses at least two maps, got channels {spec.channels}")
        for name, value, known in (
            ("preset", preset, tuple(PRESETS)),
            ("direction", direction, ("top_down", "bottom_up")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        extra = {None: 0, "pool": 0, "p6p7": 2}.get(extra_levels, extra_levels)
        if not isinstance(extra, int) or extra < 0:
            raise ValueError(f'extra_levels must be None, "pool", "p6p7" or a number of maps, got {extra_levels!r}')
        if not 0 <= start_level < count:
            raise ValueError(f"start_level must be one of {count} levels, got {start_level}")
        columns = count - 1 if columns is None else columns
        if not 1 <= columns < count:
            raise ValueError(f"{count} levels make up to {count - 1} columns, got columns={columns}")
        settings = PRESETS[preset]
        limit = settings["squeeze_limit"] or 2**count
        squeeze = self._by_level("squeeze", squeeze, [min(2**i, limit) for i in range(count)])
        widths = [channels // s for channels, s in zip(spec.channels, squeeze, strict=True)]
        if min(widths) < 1:
            raise ValueError(f"squeeze {squeeze} leaves nothing of channels {spec.channels}")
        compress = self._by_level("compress", compress, [max(width // _GROUP, 8) for width in widths])
        groups = self._by_level("groups", groups, [_groups(width) for width in widths])
        dcn_groups = self._by_level("resampling_groups", resampling_groups, [_groups(width) for width in widths])
        if resampling is None:
            resampling = settings["resampling"]
        if resampling == "last":
            resampling = [False] * (columns - 1) + [True]
        resampling = [resampling] * columns if isinstance(resampling, bool) else list(resampling)
        if len(resampling) != columns:
            raise ValueError(f"resampling is for {columns} columns, got {resampling}")
        kwargs["offset_scale"] = settings["offset_scale"] if offset_scale is None else offset_scale
        expansion = settings["expansion"] if expansion is None else expansion

        self.squeeze = nn.ModuleList(
            ConvNormAct(inputs, width) if s != 1 else nn.Identity()
            for inputs, width, s in zip(spec.channels, widths, squeeze, strict=True)
        )
        self.updated_first = updated_first and direction == "bottom_up"
        self.columns = nn.ModuleList()
        self.levels: list[list[int]] = []  # that each column reads
        for height, resamples in zip(range(count - columns + 1, count + 1), resampling, strict=True):
            read = list(range(count))[-height:] if direction == "top_down" else list(range(height))
            given = [level for level in read if height < count or level >= start_level]
            self.levels.append(read)
            column = {
                str(level): Level(
                    read.index(level),
                    [widths[i] for i in read],
                    [spec.strides[i] for i in read],
                    groups[level],
                    compress=compress[level],
                    blocks=blocks,
                    expansion=expansion,
                    resampling={"groups": dcn_groups[level], **kwargs} if resamples else None,
                )
                for level in given
            }
            self.columns.append(nn.ModuleDict(column))

        self.start_level = start_level
        self.outputs = nn.ModuleList(ConvNormAct(width, out_channels, 3) for width in widths[start_level:])
        self.pool = extra_levels == "pool"
        self.extra = nn.ModuleList(ConvNormAct(out_channels, out_channels, 3, 2) for _ in range(extra))
        coarser = [spec.strides[-1] * 2 ** (i + 1) for i in range(extra + self.pool)]
        strides = (*spec.strides[start_level:], *coarser)
        self.spec = ShapeSpec((out_channels,) * len(strides), strides)

    @staticmethod
    def _by_level(name: str, given: Sequence[int] | None, default: list[int]) -> list[int]:
        given = default if given is None else list(given)
        if len(given) != len(default) or min(given) < 1:
            raise ValueError(f"{name} must be {len(default)} numbers of at least 1, got {given}")
        return given

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Maps ``[B, C, h, w]`` as the given spec says, of any sizes, to those of `spec`.

        They may also come, and then go, coarsest first, as the released Mask2Former has them.
        """
        if len(maps) != len(self.squeeze):
            raise ValueError(f"A3FPN was made for {len(self.squeeze)} maps, got {len(maps)}")
        if maps[0].shape[-2:].numel() < maps[-1].shape[-2:].numel():
            return self.forward(maps[::-1])[::-1]
        maps = [f(x) for f, x in zip(self.squeeze, maps, strict=True)]
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


def _groups(width: int) -> int:
    """How many groups of at least 16 channels (all of them if there are fewer) divide the width."""
    size = next(size for size in range(min(_GROUP, width), width + 1) if width % size == 0)
    return width // size


# --------------------------------------------------------------------------------------------------------------------
# The authors' keywords and parameter names (mason-ching/A3-FPN, commit 95cb097).

_SAMPLER = re.compile(r"(up|down)sample(\d?)")
_RENAMED = (
    (r"\.MCA\.weight_level_(\d)\.", lambda m: f".fusion.compress.{int(m[1]) - 1}."),
    (r"\.MCA\.weight_levels\.bottlenecks\.", ".fusion.weights.blocks."),
    (r"\.MCA\.weight_levels\.conv3\.conv\.", ".fusion.weights.conv3."),
    (r"\.MCA\.weight_levels\.", ".fusion.weights."),
    (r"\.MCA\.context_conv\.", ".fusion.context."),
    (r"\.MCA\.resampler(\d)\.", lambda m: f".fusion.resamplers.{int(m[1]) - 1}."),
    (r"\.resampling\.offset_mask_dw\.", ".resampling.context."),
    (r"\.resampling\.offset_mask\.", ".resampling.points."),
    (r"\.resampling\.value_proj\.", ".resampling.value."),
    (r"\.resampling\.output_proj\.", ".resampling.output."),
    (r"\.resampling\.center_feature_scale_proj_", ".resampling.center_gate."),
    (r"\.ICA\.gn\.", ".reassemble.gate."),
    (r"\.ICA\.", ".reassemble."),
)


def from_published(config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> A3FPN:
    """The neck of one of the authors' models, with its weights.

    Args:
        config: keywords of the authors' ``A3FPN``, with their defaults: ``in_channels``, ``out_channels``, ``squeeze``,
            ``compress_channel``, ``group_num``, ``num_repblocks``, ``expansion``, ``using_resampling``, ``dcn_groups``,
            ``dcn_config``, and of their mmdetection version ``num_outs`` and ``end_level``. ``direction`` (ours)
            decides where the widths leave open whether the columns grow upwards or downwards.
        state_dict: the neck's weights under their names, alone or in the checkpoint of a whole model (``neck.`` in
            mmdetection, ``backbone.a3fpn.`` in detectron2, ``decode_head.a3fpn.`` in mmsegmentation,
            ``...pixel_decoder.a3fpn.`` in Mask2Former).

    Returns:
        The neck in training mode. The map that detectron2 pools from the last one is not this class's there, nor here.

    Raises:
        ValueError: on keywords or weights that this neck does not have.
    """
    state = _neck_weights(state_dict)
    mmdet = "conv44.conv.weight" in state
    config = dict(config)
    given = {**_published_defaults(mmdet), **{name: value for name, value in config.items() if name != "direction"}}
    unknown = sorted(set(given) - set(_published_defaults(True)) - {"norm", "init_cfg"})
    if unknown:
        raise ValueError(f"the published A3FPN has no {', '.join(unknown)}")
    for name in ("norm", "norm_cfg"):
        kind = given[name].get("type") if isinstance(given.get(name), Mapping) else given.get(name)
        if kind not in (None, "SyncBN", "BN", "nnSyncBN"):
            raise ValueError(f"{name} is {kind!r}, this neck has BatchNorm (SyncBN) only")

    channels = tuple(given["in_channels"])
    spread = lambda value: [value] * len(channels) if isinstance(value, int) else list(value)  # noqa: E731
    squeeze = spread(given["squeeze"])
    columns = len({height for height, _ in filter(None, map(_body, state))})
    resampling = spread(given["using_resampling"])[-columns:]
    direction = config.get("direction") or _direction(state, state_dict, config, channels, squeeze)
    start = max(given["end_level"] - given["num_outs"], 0)
    made = (given["num_outs"] > len(channels)) + start

    neck = A3FPN(
        ShapeSpec(channels, tuple(4 * 2**i for i in range(len(channels)))),
        given["out_channels"],
        direction=direction,
        columns=columns,
        extra_levels=made,
        start_level=start,
        squeeze=squeeze,
        compress=given["compress_channel"],
        groups=given["group_num"],
        resampling=[bool(r) for r in resampling],
        resampling_groups=spread(given["dcn_groups"]),
        expansion=given["expansion"],
        blocks=given["num_repblocks"],
        updated_first=direction == "bottom_up",
        **_resampler_arguments(given["dcn_config"]),
    )
    _load_published(neck, state)
    return neck


def load_published(neck: A3FPN, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Loads the authors' weights into a neck of their settings, or, where they don't fit it, nothing.

    Args:
        state_dict: as `from_published` takes it.

    Raises:
        ValueError: names or shapes that are not this neck's.
    """
    _load_published(neck, _neck_weights(state_dict))


def published_state(neck: A3FPN, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' weights, as `from_published` takes them, under the names of a neck of their settings.

    Left out is what the authors compute and drop, and convolutions that they keep folded beside their branches.
    """
    return _renamed(neck, _neck_weights(state_dict))


def _published_defaults(mmdet: bool) -> dict[str, Any]:
    widths = [16, 16, 16, 32] if mmdet else [16, 16, 32, 32]
    return dict(
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
        num_outs=5 if mmdet else 4,
        end_level=5 if mmdet else 4,
        squeeze=1,
        act=None,
        norm_cfg=None,
        compress_channel=widths,
        group_num=widths,
        num_repblocks=1,
        expansion=1.0,
        using_resampling=False,
        dcn_groups=4,
        dcn_config={},
    )


def _resampler_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(
        dict(
            dcn_norm="LN",
            offset_scale=0.5,
            dw_kernel_size=3,
            dcn_output_bias=False,
            center_feature_scale=False,
            remove_center=False,
            without_pointwise=False,
        ),
        **config,
    )
    norm = config.pop("dcn_norm")
    norm = norm.get("type") if isinstance(norm, Mapping) else norm
    if norm not in ("LN", "", False, None):
        raise ValueError(f"dcn_norm is {norm!r}, the resampled maps have LN or nothing")
    arguments = dict(
        norm=norm == "LN",
        offset_scale=config.pop("offset_scale"),
        context_kernel=config.pop("dw_kernel_size"),
        output_bias=config.pop("dcn_output_bias"),
        center_scale=config.pop("center_feature_scale"),
        center=not config.pop("remove_center"),
        pointwise=not config.pop("without_pointwise"),
    )
    if config:
        raise ValueError(f"the published resampler has no {', '.join(sorted(config))}")
    return arguments


def _neck_weights(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The neck's tensors out of a whole model's, without what stands before their names."""
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    prefixes = {name[: name.index("a3fpn_body.")] for name in state_dict if "a3fpn_body." in name}
    if len(prefixes) != 1:
        found = ", ".join(sorted(prefixes)) or "none"
        raise ValueError(f"the weights of one A3-FPN are wanted, found before its names: {found}")
    (prefix,) = prefixes
    own = re.compile(r"a3fpn_body\.|conv[0-4]+\.|extra_convs\.")
    state = {n[len(prefix) :]: torch.as_tensor(t) for n, t in state_dict.items() if n.startswith(prefix)}
    # folded convolutions, which the authors keep beside their branches
    return {n: t for n, t in state.items() if own.match(n) and not re.search(r"bottlenecks\.\d+\.conv\.", n)}


def _direction(
    state: Mapping[str, torch.Tensor],
    whole: Mapping[str, Any],
    config: Mapping[str, Any],
    channels: Sequence[int],
    squeeze: Sequence[int],
) -> str:
    """By the widths of the first column; where all levels have the same, by whose names or keywords these are."""
    widths = [c // s for c, s in zip(channels, squeeze, strict=True)]
    for height in range(2, len(widths)):
        own = [state.get(f"a3fpn_body.a3fpn_{height}_level{i}.ICA.norm.weight") for i in range(height)]
        if all(x is not None for x in own) and widths[:height] != widths[-height:]:
            return "top_down" if [len(x) for x in own] == widths[-height:] else "bottom_up"
    mmseg = any("decode_head." in name for name in whole) or "norm_cfg" in config
    return "bottom_up" if mmseg and "conv44.conv.weight" not in state else "top_down"


def _body(name: str) -> tuple[int, int] | None:
    """Height and level of the column that a published name is of."""
    match = re.match(r"a3fpn_body\.a3fpn_(\d+)_level(\d+)\.", name)
    return (int(match[1]), int(match[2])) if match else None


def _renamed(neck: A3FPN, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    own, start = neck.state_dict(), neck.start_level
    # mmdetection's always has conv44, used or not; the maps after it are extra_convs
    conv44 = len(neck.extra) > len({name.split(".")[1] for name in state if name.startswith("extra_convs.")})
    result: dict[str, torch.Tensor] = {}
    unused = {f"conv{i}{i}" for i in range(start)} | (set() if conv44 else {"conv44"})
    smallest = len(neck.levels[0])
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if body := _body(name):
            height, position = body
            level = neck.levels[height - smallest][position]
            if height == len(neck.squeeze) and level < start:
                continue  # computed and then dropped there
            name = f"columns.{height - smallest}.{level}." + _level_name(name.split(".", 2)[2], height, position)
        elif first in unused:
            continue
        elif first == "extra_convs":
            i, _, rest = rest.partition(".")
            name = f"extra.{int(i) + conv44}.{rest}"
        elif first == "conv44":
            name = f"extra.0.{rest}"
        elif len(first) == len("conv0"):
            name = f"squeeze.{first[-1]}.{rest}"
        else:
            name = f"outputs.{int(first[-1]) - start}.{rest}"
        if name in own and tensor.ndim == 2 and own[name].ndim == 4:  # linear layers are 1x1 convolutions here
            tensor = tensor[:, :, None, None]
        result[name] = tensor
    return result


def _load_published(neck: A3FPN, state: dict[str, torch.Tensor]) -> None:
    own, renamed = neck.state_dict(), _renamed(neck, state)
    wrong = [n for n, x in own.items() if n in renamed and x.shape != renamed[n].shape]
    parts = (
        ("missing", sorted(set(own) - set(renamed))),
        ("unexpected", sorted(set(renamed) - set(own))),
        ("of another shape", [f"{n} {tuple(renamed[n].shape)} for {tuple(own[n].shape)}" for n in wrong]),
    )
    if any(names for _, names in parts):
        found = "; ".join(f"{len(n)} {what}: {', '.join(n[:4])}{' ...' * (len(n) > 4)}" for what, n in parts if n)
        raise ValueError(f"the weights are not of this neck: {found}")
    neck.load_state_dict(renamed)


def _level_name(name: str, height: int, level: int) -> str:
    if match := _SAMPLER.match(name):
        factor = int(match[2] or 2)
        source = level + int(math.log2(factor)) * (1 if match[1] == "up" else -1)
        rest = name.partition(".sample_layer.")[2].removeprefix("0.")
        return f"samples.{sources(level, height).index(source)}.conv.{rest}"
    name = "." + name
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name[1:]
