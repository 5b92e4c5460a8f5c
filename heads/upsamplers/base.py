"""Base class of the upsamplers, and bilinear interpolation as one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


class Upsampler(nn.Module):
    """Enlarges the last map of a backbone, guided by the image. Its outputs are weighted means of the map's vectors.

    Attributes:
        kind: its name in `UPSAMPLERS`.
        arguments: ``name`` and arguments of `create_upsampler`, to build it again.
        statistics: mean and standard deviation per channel of the images that it takes; None: the backbone's.
        channels: of the maps that it takes; None: any number.
        patch: the stride of the maps that it takes; None: any.

    Examples:
        >>> import torch
        >>> from foveal.heads.upsamplers import UPSAMPLERS
        >>> upsampler = UPSAMPLERS["naf"]()
        >>> maps = upsampler.maps(torch.rand(1, 3, 160, 160), torch.rand(1, 32, 10, 10), [(20, 20), (40, 40)])
        >>> [tuple(x.shape) for x in maps]
        [(1, 32, 20, 20), (1, 32, 40, 40)]
    """

    task = "upsample"
    kind: ClassVar[str]
    statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]] | None] = None
    channels: int | None = None
    patch: int | None = None

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {"name": self.kind, **arguments}

    def forward(self, image: Tensor, features: Tensor, size: Sequence[int]) -> Tensor:
        """Enlarge a map.

        Args:
            image: ``[B, 3, H, W]``, normalized (`statistics`), of any size.
            features: the backbone's map ``[B, C, h, w]``.
            size: rows and columns of the output, at least those of the map.

        Returns:
            ``[B, C, *size]`` in the dtype of ``features``.

        Raises:
            ValueError: tokens instead of a map, shapes that do not fit each other, or a smaller size.
        """
        return self.maps(image, features, [size])[0]

    def maps(self, image: Tensor, features: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """The map at several sizes, which may share their computations; otherwise as `forward`."""
        self.check(image, features)
        h, w = features.shape[-2:]
        wanted = [(rows, columns) for rows, columns in sizes]
        for rows, columns in wanted:
            if rows < h or columns < w:
                raise ValueError(f"{self.kind} enlarges a map of {h} x {w}, but the output is {rows} x {columns}")
        return [x.to(features.dtype) for x in self.enlarged(image, features, wanted)]

    def enlarged(self, image: Tensor, features: Tensor, sizes: list[Size]) -> list[Tensor]:
        """`maps` for arguments that fit."""
        raise NotImplementedError

    def check(self, image: Tensor, features: Tensor) -> None:
        if features.ndim != 4:
            raise ValueError(
                f"features must be a map [B, C, h, w], got {tuple(features.shape)}: reshape tokens [B, N, C] without "
                "the class token, or take a map of timm's forward_intermediates(output_fmt='NCHW')"
            )
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[0] != features.shape[0]:
            raise ValueError(
                f"image must be [B, 3, H, W] with the batch of features {tuple(features.shape)}, got "
                f"{tuple(image.shape)}"
            )
        if self.channels not in (None, features.shape[1]):
            raise ValueError(f"this {self.kind} takes maps of {self.channels} channels, got {features.shape[1]}")


class Bilinear(Upsampler):
    """Bilinear interpolation, which ignores the image: the baseline.

    Examples:
        >>> import torch
        >>> from foveal.heads.upsamplers import Bilinear
        >>> Bilinear()(torch.rand(1, 3, 64, 64), torch.rand(1, 8, 4, 4), (16, 16)).shape
        torch.Size([1, 8, 16, 16])
    """

    kind = "bilinear"

    def enlarged(self, image: Tensor, features: Tensor, sizes: list[Size]) -> list[Tensor]:
        return [F.interpolate(features, size, mode="bilinear", align_corners=False) for size in sizes]
