"""NAF, neighborhood attention filtering (arXiv 2511.18452): one network for the map of any backbone, to any size.

Written from the paper and the model of valeoai/NAF (Apache-2.0), with its parameter names; the rotary embedding from
its formula. Queries are an encoding of the image, keys its mean over the positions of the map, values the map itself,
without any projection. Differences: the attention is one call of `neighborhood_attention`, on a CPU, in an export and
with gradients, too; for whole ratios neither keys nor values are enlarged. The outputs have the features' dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ...kernels import neighborhood_attention
from .base import Size, Upsampler

_GROUPS = 8  # of the norms
_BASE = 100.0  # of the rotary embedding's frequencies


class Block(nn.Module):
    """Twice group norm, SiLU and a convolution with reflected borders. There is no residual."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels)
        self.conv1 = _conv(channels, channels, kernel_size)
        self.norm2 = nn.GroupNorm(_GROUPS, channels)
        self.conv2 = _conv(channels, channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def _conv(in_channels: int, channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, padding_mode="reflect")


class ImageEncoder(nn.Module):
    """An image to ``dim`` channels: a half for pixels (1x1 convolutions), a half for their context (3x3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()

        def branch(kernel_size: int) -> nn.Sequential:
            half = dim // 2
            return nn.Sequential(_conv(3, half, kernel_size), Block(half, kernel_size), Block(half, kernel_size))

        self.encoder, self.sem_encoder = branch(1), branch(3)

    def forward(self, image: Tensor, size: Size) -> Tensor:
        """``[B, dim, *size]``: means of the encoded pixels."""
        return torch.cat([_mean(branch(image), size) for branch in (self.encoder, self.sem_encoder)], 1)


class NAF(Upsampler):
    """Enlarges any backbone's map to any size.

    Args:
        dim: channels of queries and keys.
        heads: of the attention and the rotary embedding; they divide the map's channels, too.
        kernel_size: side of the window, in positions of the map.

    Examples:
        >>> import torch
        >>> from foveal.heads.upsamplers import NAF
        >>> NAF()(torch.rand(1, 3, 160, 160), torch.rand(1, 32, 10, 10), (20, 20)).shape
        torch.Size([1, 32, 20, 20])
    """

    kind = "naf"
    statistics = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def __init__(self, dim: int = 256, heads: int = 4, kernel_size: int = 9) -> None:
        super().__init__(dim=dim, heads=heads, kernel_size=kernel_size)
        if dim % (4 * heads) or dim % (2 * _GROUPS):
            raise ValueError(f"dim must be a multiple of 4 * heads and of {2 * _GROUPS}, got {dim} and {heads} heads")
        self.heads, self.kernel_size = heads, kernel_size
        self.image_encoder = ImageEncoder(dim)

    def check(self, image: Tensor, features: Tensor) -> None:
        super().check(image, features)
        _, channels, h, w = features.shape
        if channels % self.heads:
            raise ValueError(f"naf has {self.heads} heads, which do not divide {channels} channels")
        if min(h, w) < self.kernel_size:
            raise ValueError(
                f"naf averages windows of {self.kernel_size} x {self.kernel_size} positions, but the map is {h} x {w}: "
                "it needs a larger image or a finer backbone"
            )

    def enlarged(self, image: Tensor, features: Tensor, sizes: list[Size]) -> list[Tensor]:
        return [self._attend(self.queries(image, size), features) for size in sizes]

    def queries(self, image: Tensor, size: Size) -> Tensor:
        """The encoded image ``[B, dim, *size]``, rotated."""
        rows, columns = size
        height, width = image.shape[-2:]
        if height > 4 * rows or width > 4 * columns:
            # as published: both sides are bounded by both output sides, so that the image may lose its aspect ratio
            least = 4 * min(rows, columns)
            image = F.interpolate(image, (min(height, least), min(width, least)), mode="bilinear", align_corners=False)
        return _rotated(self.image_encoder(image, size), self.heads)

    def _attend(self, queries: Tensor, features: Tensor) -> Tensor:
        h, w = features.shape[-2:]
        keys = _mean(queries, (h, w))
        rows, columns = (side // own for side, own in zip(queries.shape[-2:], (h, w), strict=True))
        if queries.shape[-2:] == (h * rows, w * columns):
            return self._by_cells(queries, keys, features.to(queries.dtype), rows, columns)
        q, k, v = (
            x.unflatten(1, (self.heads, -1)).permute(0, 3, 4, 1, 2)
            for x in (
                queries,
                *(
                    F.interpolate(x.to(queries.dtype), queries.shape[-2:], mode="nearest-exact")
                    for x in (keys, features)
                ),
            )
        )
        out = neighborhood_attention(q, k, v, kernel_size=self.kernel_size, dilation=(rows, columns))
        return out.permute(0, 3, 4, 1, 2).flatten(1, 2)

    def _by_cells(self, queries: Tensor, keys: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
        """For whole ratios: with a dilation of the ratio, the queries of one position of the map see the same window of
        the map itself. They are heads of it, which read the same keys and values."""
        batch, channels, h, w = values.shape
        q = queries.view(batch, self.heads, -1, h, rows, w, columns).permute(1, 0, 3, 5, 4, 6, 2).flatten(4, 5)
        k, v = (x.unflatten(1, (self.heads, 1, -1)).permute(1, 0, 4, 5, 2, 3) for x in (keys, values))
        out = values.new_empty(batch, self.heads, channels // self.heads, h, rows, w, columns)
        for head in range(self.heads):  # one by one, to bound the memory
            own = (x[head].expand(-1, -1, -1, rows * columns, -1) for x in (k, v))
            found = neighborhood_attention(q[head], *own, kernel_size=self.kernel_size)
            out[:, head] = found.unflatten(3, (rows, columns)).permute(0, 5, 1, 3, 2, 4)
        return out.view(batch, channels, h * rows, w * columns)


def _mean(x: Tensor, size: Size) -> Tensor:
    """Means over the bins of adaptive pooling, which may overlap or repeat."""
    return x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)


def _rotated(x: Tensor, heads: int) -> Tensor:
    """Rotary position embedding of ``[B, C, H, W]``: channels i and i + d / 2 of a head of d channels are rotated by an
    angle, a quarter of them by that of the row and a quarter by that of the column."""
    (height, width), depth = x.shape[-2:], x.shape[1] // heads
    frequencies = 2 * math.pi / _BASE ** (torch.arange(depth // 4, device=x.device) / (depth // 4))
    place = torch.promote_types(x.dtype, torch.float32)
    y, x_ = (2 * (torch.arange(n, device=x.device, dtype=place) + 0.5) / n - 1 for n in (height, width))
    angles = torch.cat(
        [
            (frequencies.to(place)[:, None, None] * y[:, None]).expand(-1, -1, width),
            (frequencies.to(place)[:, None, None] * x_).expand(-1, height, -1),
        ]
    )
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.unflatten(1, (heads, 2, -1)).unbind(2)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], 2).flatten(1, 3)
