"""UPLiFT (arXiv 2601.17950): one small network that doubles the sides of a map, applied as often as needed.

Written from the paper and its published code (mwalmer-umd/UPLiFT, MIT), with its parameter names. An image encoder runs
once. A step computes, for every position of the map of twice the size, a softmax over 17 offsets, and averages its
input map at these offsets around the position. Differences: any batch and map size, on any device; the 17-fold gather
is `neighborhood_aggregate` on 5x5 windows, with eight weights of zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import neighborhood_aggregate
from ...kernels.tracing import tracing
from .base import Size, Upsampler

_RADIUS = 2
_BAND = 32  # rows of a map that are averaged at once
# Rows and columns of the offsets, in the order of the published weights: a 5x5 window's inner 3x3 window, and every
# second position of its border.
OFFSETS = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if max(abs(y), abs(x)) < 2 or (y % 2 == 0 and x % 2 == 0)]


class Residual(nn.Module):
    """3x3 convolutions with batch norm and ReLU, then a 1x1 convolution; plus the input, cut or padded with zeros to
    ``channels``."""

    def __init__(self, in_channels: int, channels: int, convs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in [in_channels, *[channels] * (convs - 1)]:
            conv = nn.Conv2d(width, channels, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        kept = min(x.shape[1], y.shape[1])
        if kept == y.shape[1]:
            return y + x[:, :kept]
        return torch.cat([y[:, :kept] + x, y[:, kept:]], 1)


class _Block(nn.Module):
    """A `Residual` by its published name."""

    def __init__(self, in_channels: int, channels: int, convs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(in_channels, channels, convs)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


class Encoder(nn.Module):
    """The image at full size to two maps of 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.block_0 = _Block(3, 16, 1)
        self.block_1 = _Block(16, 32, 1)
        self.block_2 = _Block(32, 64, 1)
        self.block_3 = _Block(64, 128, 1)
        self.block_4 = _Block(128, 128, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.block_3(self.block_2(self.block_1(self.block_0(image))))
        return fine, self.block_4(fine)


class Doubling(nn.Module):
    """A transposed convolution plus bilinear interpolation with aligned corners."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = [2 * side for side in x.shape[-2:]]
        return self.up(x) + F.interpolate(x, double, mode="bilinear", align_corners=True)


class Decoder(nn.Module):
    """A map ``[B, C, h, w]`` and the encoder's maps to a guide ``[B, 64, 2h, 2w]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_0 = _Block(channels + 128, 64, 2)
        self.up_1 = Doubling(64)
        self.block_1 = _Block(64 + 128, 64, 2)

    def forward(self, x: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = self.block_0(torch.cat([x, _nearest(coarse, (h, w))], 1))
        return self.block_1(torch.cat([self.up_1(x), _nearest(fine, (2 * h, 2 * w))], 1))


def _nearest(x: Tensor, size: Size) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="nearest")


class Attender(nn.Module):
    """A guide ``[B, 64, 2h, 2w]`` to weights of the offsets, and the values ``[B, C, h, w]`` averaged with them."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(64, len(OFFSETS), 1)
        order = [len(OFFSETS)] * (2 * _RADIUS + 1) ** 2  # the last of 18 weights, which is zero
        for k, (y, x) in enumerate(OFFSETS):
            order[(y + _RADIUS) * (2 * _RADIUS + 1) + x + _RADIUS] = k
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def weights(self, guide: Tensor) -> Tensor:
        """``[B, h + 4, 2, w + 4, 2, 25]``: of the 5x5 window of each of the four cells that a position is divided into;
        on a border of two positions, zeros."""
        weights = (self.conv1(guide) + guide[:, : len(OFFSETS)]).softmax(1)
        weights = F.pad(weights, (0, 0, 0, 0, 0, 1)).permute(0, 2, 3, 1).index_select(-1, self.order)
        batch, height, width, _ = weights.shape
        border = 2 * _RADIUS
        weights = F.pad(weights, (0, 0, border, border, border, border))
        return weights.view(batch, height // 2 + border, 2, width // 2 + border, 2, -1)

    def forward(self, weights: Tensor, values: Tensor) -> Tensor:
        """``[B, C, 2h, 2w]``, channels last, cell by cell; in inference in bands of rows, to bound the memory."""
        batch, channels, h, w = values.shape
        # windows are moved inside the map at its border: there it is wide enough that no query of the map is concerned
        v = F.pad(values, [_RADIUS] * 4, mode="replicate").permute(0, 2, 3, 1).unsqueeze(3)
        out, inner = values.new_empty(batch, h, 2, w, 2, channels), slice(_RADIUS, -_RADIUS)
        band = h if tracing() or torch.is_grad_enabled() else _BAND
        for start in range(0, h, band):
            rows, border = slice(start, start + band), slice(start, start + band + 2 * _RADIUS)
            for cell in (0, 0), (0, 1), (1, 0), (1, 1):
                own = weights[:, border, cell[0], :, cell[1]].unsqueeze(3)
                found = neighborhood_aggregate(own, v[:, border], kernel_size=5)
                out[:, rows, cell[0], :, cell[1]] = found[:, inner, inner, 0]
        return out.view(batch, 2 * h, 2 * w, channels).permute(0, 3, 1, 2)


class UPLiFT(Upsampler):
    """Doubles the sides of one backbone's last map, any number of times.

    Args:
        channels: of the map.
        patch: its stride. Unless a power of two, the image is first enlarged to the next one for each position (14 to
            16).

    Examples:
        >>> import torch
        >>> from foveal.heads.upsamplers import UPLiFT
        >>> upsampler = UPLiFT(channels=192, patch=16).eval()
        >>> upsampler(torch.rand(1, 3, 64, 96), torch.rand(1, 192, 4, 6), (16, 24)).shape
        torch.Size([1, 192, 16, 24])
    """

    kind = "uplift"
    patch: int  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, channels: int = 384, patch: int = 16) -> None:
        super().__init__(channels=channels, patch=patch)
        if channels < 1 or patch < 1:
            raise ValueError(f"channels and patch must be at least 1, got {channels} and {patch}")
        self.channels, self.patch = channels, patch
        self.encoder = Encoder()
        self.decoder = Decoder(channels)
        self.attender = Attender()

    def enlarged(self, image: Tensor, features: Tensor, sizes: list[Size]) -> list[Tensor]:
        h, w = features.shape[-2:]
        counts = [max(math.ceil(math.log2(max(rows / h, columns / w))), 0) for rows, columns in sizes]
        steps = [features, *self.steps(image, features, max(counts))]
        return [
            x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True)
            for x, size in ((steps[count], size) for count, size in zip(counts, sizes, strict=True))
        ]

    def steps(self, image: Tensor, features: Tensor, count: int) -> list[Tensor]:
        """The maps ``[B, C, 2h, 2w]``, ``[B, C, 4h, 4w]``, ... of ``count`` steps."""
        self.check(image, features)
        if count == 0:
            return []
        full = 2 ** math.ceil(math.log2(self.patch))
        if full != self.patch:
            size = [side * full // self.patch for side in image.shape[-2:]]
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        guides: tuple[Tensor, ...] = self.encoder(image)
        maps = [features]
        for number in range(count):
            weights = self.attender.weights(self.decoder(maps[-1], *guides))
            if number == count - 1:
                guides = ()  # frees half of the memory before the largest map
            maps.append(self.attender(weights, maps[-1]))
        return maps[1:]
