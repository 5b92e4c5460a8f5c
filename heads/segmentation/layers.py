"""Layers of the segmentation heads: convolution with norm and activation, resizing, and the auxiliary head."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize, ``align_corners=False``, to ``size`` (rows, columns); `x` itself if it has that size."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class ConvNormAct(nn.Sequential):
    """Convolution without bias ("same" padding), batch norm, ReLU. He initialization (arXiv 1502.01852), fan out.

    Args:
        norm: makes the norm for a number of channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = norm(out_channels)
        self.act = nn.ReLU()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


class Classifier(nn.Sequential):
    """Channel dropout and a 1x1 convolution to logits, initialized with small random weights."""

    def __init__(self, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)


class Linear(nn.Module):
    """Batch norm and a classifier on the finest map: a linear probe of the features (as DINOv2's, arXiv 2304.07193,
    section 7.4)."""

    def __init__(self, in_channels: int, num_classes: int, *, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.classifier = Classifier(in_channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, num_classes, h, w]`` at the map's stride."""
        return self.classifier(self.norm(maps[0]))


class FCN(nn.Module):
    """Fully convolutional head on one level (Long et al., arXiv 1411.4038): 3x3 convolutions and a classifier.

    Args:
        in_channels: of the level.
        level: index of the backbone's map that it reads; 2 is stride 16 of a pyramid from stride 4.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        level: int = 2,
        channels: int = 256,
        num_convs: int = 1,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.level = level
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(*(ConvNormAct(a, b, 3) for a, b in pairwise(widths)))
        self.classifier = Classifier(widths[-1], num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits ``[B, num_classes, h, w]`` at the level's stride."""
        return self.classifier(self.convs(maps[self.level]))
