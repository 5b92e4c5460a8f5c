"""A semantic segmenter: images of any size in, logits of the same size out."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features, dense_parameter_groups
from .layers import resize


class Segmenter(nn.Module):
    """A backbone's features, a head, perhaps an auxiliary head for training; normalization and padding inside.

    Args:
        features: the backbone.
        head, auxiliary: the maps to logits; the auxiliary one only answers in training.
        mean, std: per channel, of values in [0, 1].
        size_divisor: images are padded with the mean, right and bottom, to multiples of it, and the logits cropped.
            1 leaves them as they are, which a backbone that cuts patches or windows may refuse or crop.

    Attributes:
        arguments: what rebuilds it, from whoever built it.
    """

    classes: list[str]  # where it was loaded, and the next
    config: dict[str, Any]

    def __init__(
        self,
        features: Features,
        head: nn.Module,
        auxiliary: nn.Module | None = None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size_divisor: int = 32,
    ):
        super().__init__()
        self.features, self.head, self.auxiliary = features, head, auxiliary
        self.size_divisor = size_divisor
        self.arguments: dict[str, Any] = {}
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Float images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes, H, W]``; in training with an auxiliary head
        to the pair of its and the auxiliary logits, both of that size, the auxiliary ones second."""
        rows, columns = images.shape[-2:]
        images = (images - self.mean) / self.std
        images = F.pad(images, (0, -columns % self.size_divisor, 0, -rows % self.size_divisor))
        maps = self.features(images)
        logits = self._crop(self.head(maps), images, rows, columns)
        if self.auxiliary is None or not self.training:
            return logits
        return logits, self._crop(self.auxiliary(maps), images, rows, columns)

    def parameter_groups(
        self, weight_decay: float, layer_decay: float | None = None, backbone_lr_ratio: float = 1.0
    ) -> list[dict[str, Any]]:
        """As an optimizer takes them; see `heads.features.dense_parameter_groups`."""
        return dense_parameter_groups(self, self.features, weight_decay, layer_decay, backbone_lr_ratio)

    @staticmethod
    def _crop(logits: Tensor, images: Tensor, rows: int, columns: int) -> Tensor:
        return resize(logits, images.shape[-2:])[..., :rows, :columns]
