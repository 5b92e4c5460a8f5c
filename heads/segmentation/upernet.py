"""UPerNet (Xiao et al., arXiv 1807.10221) for semantic segmentation.

The last level goes through a pyramid pooling module (Zhao et al., arXiv 1612.01105); a top-down path or another neck
fuses the levels; all of them, resized to the finest one's size, are fused and classified.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Neck, ShapeSpec
from .layers import Classifier, ConvNormAct, resize


class PyramidPooling(nn.Module):
    """Average pooling to 1x1, 2x2, 3x3, 6x6 bins, each with a 1x1 convolution, concatenated with the map.

    Args:
        in_channels, channels: of the map; of each bin size and of the output.
        bins: bins along each axis.
    """

    def __init__(self, in_channels: int, channels: int, bins: Sequence[int] = (1, 2, 3, 6)):
        super().__init__()
        self.bins = tuple(bins)
        self.parts = nn.ModuleList(ConvNormAct(in_channels, channels, 1) for _ in self.bins)
        self.fuse = ConvNormAct(in_channels + len(self.bins) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` to ``[B, channels, H, W]``."""
        size = x.shape[-2:]
        pooled = (part(F.adaptive_avg_pool2d(x, n)) for part, n in zip(self.parts, self.bins, strict=True))
        return self.fuse(torch.cat([x, *(resize(p, size) for p in pooled)], 1))


class TopDown(Neck):
    """UPerNet's pyramid: FPN with norm and ReLU after each convolution; the last level is not changed."""

    def __init__(self, spec: ShapeSpec, channels: int):
        super().__init__()
        finer = spec.channels[:-1]
        self.lateral = nn.ModuleList(ConvNormAct(c, channels, 1) for c in finer)
        self.output = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in finer)
        self.spec = ShapeSpec((channels,) * len(spec.channels), spec.strides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        *finer, x = maps
        result = [x]
        for i in reversed(range(len(finer))):
            lateral = self.lateral[i](finer[i])
            x = lateral + resize(x, lateral.shape[-2:])
            result.insert(0, self.output[i](x))
        return result


class UPerNet(nn.Module):
    """The head.

    Args:
        spec: channels and strides of the backbone's maps, finest first.
        channels: width of pooling, pyramid and fusion.
        bins: of the pyramid pooling.
        dropout: channel dropout before the classifier.
        neck: builds the neck from the spec of the levels, where the last is the pooled one with ``channels`` channels;
            its maps must have the spec's strides. None: the paper's top-down path.

    Raises:
        ValueError: the neck changes the strides.
    """

    def __init__(
        self,
        spec: ShapeSpec,
        num_classes: int,
        *,
        channels: int = 512,
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        neck: Callable[[ShapeSpec], Neck] | None = None,
    ):
        super().__init__()
        self.pooling = PyramidPooling(spec.channels[-1], channels, bins)
        pooled = ShapeSpec((*spec.channels[:-1], channels), spec.strides)
        self.neck: Neck = TopDown(pooled, channels) if neck is None else neck(pooled)
        if tuple(self.neck.spec.strides) != tuple(spec.strides):
            raise ValueError(f"UPerNet: the neck gives strides {self.neck.spec.strides}, the backbone {spec.strides}")
        self.fuse = ConvNormAct(sum(self.neck.spec.channels), channels, 3)
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The backbone's maps to logits ``[B, num_classes, h, w]`` at the finest one's size."""
        levels = self.neck([*maps[:-1], self.pooling(maps[-1])])
        size = levels[0].shape[-2:]
        return self.classifier(self.fuse(torch.cat([resize(level, size) for level in levels], 1)))
