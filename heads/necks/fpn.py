"""torchvision's feature pyramid network (arXiv 1612.03144) on the maps of any backbone."""

from __future__ import annotations

import torch
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..backbone import Neck, ShapeSpec


class InputLevels(LastLevelP6P7):
    """Two levels from the last input map, without an activation between them, as mmdetection's RetinaNet has them."""

    def forward(
        self, p: list[torch.Tensor], c: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        p6 = self.p6(c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class FPN(Neck):
    """Lateral 1x1 convolutions, a top-down path of nearest upsampling, and 3x3 convolutions.

    Args:
        spec: of the input maps.
        out_channels: of every output map.
        extra_levels: ``"pool"``: one coarser map by subsampling the last (Faster and Mask R-CNN); ``"p6p7"``: two by
            strided convolutions of the last (RetinaNet, FCOS); ``"input"``: two by strided convolutions of the last
            input map (`InputLevels`).

    Attributes:
        spec: of the output maps.

    Raises:
        ValueError: if ``extra_levels`` is none of these.

    Examples:
        >>> import torch
        >>> from foveal.heads.backbone import ShapeSpec
        >>> from foveal.heads.necks import FPN
        >>> maps = [torch.randn(1, 64, 20, 26), torch.randn(1, 128, 10, 13)]
        >>> [tuple(each.shape) for each in FPN(ShapeSpec((64, 128), (8, 16)), out_channels=32)(maps)]
        [(1, 32, 20, 26), (1, 32, 10, 13)]
    """

    def __init__(self, spec: ShapeSpec, out_channels: int = 256, extra_levels: str | None = None) -> None:
        super().__init__()
        blocks = {
            None: lambda: None,
            "pool": LastLevelMaxPool,
            "p6p7": lambda: LastLevelP6P7(out_channels, out_channels),
            "input": lambda: InputLevels(spec.channels[-1], out_channels),
        }
        if extra_levels not in blocks:
            raise ValueError(f'extra_levels must be None, "pool", "p6p7" or "input", got {extra_levels!r}')
        self.pyramid = FeaturePyramidNetwork(list(spec.channels), out_channels, blocks[extra_levels]())
        extra = {None: 0, "pool": 1, "p6p7": 2, "input": 2}[extra_levels]
        strides = spec.strides + tuple(spec.strides[-1] * 2 ** (i + 1) for i in range(extra))
        self.spec = ShapeSpec((out_channels,) * len(strides), strides)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Maps ``[B, C, h, w]`` of the input spec, of any sizes, to those of `spec`."""
        return list(self.pyramid({str(i): x for i, x in enumerate(maps)}).values())
