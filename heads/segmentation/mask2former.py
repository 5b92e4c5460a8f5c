"""Mask2Former (Cheng et al., arXiv 2112.01527) for semantic segmentation."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features, dense_parameter_groups
from ..mask2former import answers, decoder, embeddings, losses
from .layers import resize

IGNORE = 255  # of the targets: a pixel without a class


class Mask2Former(nn.Module):
    """Queries that each answer with a class and a mask; matched to the classes of an image, one mask each, in training.

    Args:
        features: a backbone with maps at strides 4, 8, 16, 32.
        num_classes: the queries may also answer "none".
        mean, std: per channel, of values in [0, 1].
        size_divisor: images are padded, right and bottom, to multiples of it; there is no class in the padding.
        a3fpn: see `heads.mask2former.decoder`.
        settings: of transformers' ``Mask2FormerConfig``: ``num_queries``, ``feature_size``, ``encoder_layers``, ...

    Attributes:
        arguments: what rebuilds it, from whoever built it.

    Raises:
        ImportError: transformers is not installed.
        ValueError: other strides, or settings that transformers or A3-FPN does not know.
    """

    classes: list[str]  # where it was loaded, and the next
    config: dict[str, Any]

    def __init__(
        self,
        features: Features,
        num_classes: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size_divisor: int = 32,
        a3fpn: dict[str, Any] | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.features, self.size_divisor = features, size_divisor
        self.head = decoder(features, num_classes, settings, a3fpn)
        self.arguments: dict[str, Any] = {}
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Float images ``[B, C, H, W]`` in [0, 1] to log scores ``[B, classes, H, W]``, whose softmax is each class's
        share (the sum over queries of class probability times mask, as published, divided by that of all classes); with
        ``targets``, int64 ``[B, H, W]`` and `IGNORE` where there is no class, to the loss, a scalar."""
        rows, columns = images.shape[-2:]
        padding = (0, -columns % self.size_divisor, 0, -rows % self.size_divisor)
        images = F.pad((images - self.mean) / self.std, padding)
        if targets is not None:
            classes = [image.unique() for image in targets]
            classes = [found[found != IGNORE] for found in classes]
            masks = [image == found[:, None, None] for image, found in zip(targets, classes, strict=True)]
            masks = [F.pad(mask, padding) for mask in masks]
            return sum(losses(self.head, images, masks, classes).values())
        classes, masks = (layers[-1] for layers in answers(self.head, images))
        masks = resize(masks, images.shape[-2:])[..., :rows, :columns].sigmoid()
        shares = classes.softmax(-1)[..., :-1]
        kind = images.device.type
        # half precision cannot tell the shares of near classes apart; a traced graph is not to hold the context
        exact = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with exact:
            scores = torch.einsum("bqc,bqhw->bchw", shares, masks)
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()

    def parameter_groups(
        self, weight_decay: float, layer_decay: float | None = None, backbone_lr_ratio: float = 1.0
    ) -> list[dict[str, Any]]:
        """As an optimizer takes them; see `heads.features.dense_parameter_groups`. Embeddings are not decayed."""
        rates = weight_decay, layer_decay, backbone_lr_ratio
        return dense_parameter_groups(self, self.features, *rates, embeddings(self))
