"""transformers' Mask2Former without a backbone of its own, optionally with A3-FPN in its pixel decoder. Imported by
`mask2former.decoder` alone, as transformers is optional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers.models.mask2former import modeling_mask2former as published


class A3FPNPixelDecoder(published.Mask2FormerPixelDecoder):
    """With an `A3FPN`, assigned later, on the encoder's maps and the backbone's finest, in place of its FPN."""

    def __init__(self, config: Any, feature_channels: Sequence[int]) -> None:
        super().__init__(config, feature_channels)
        del self.adapter_1, self.layer_1  # the FPN's
        self.num_fpn_levels, self.lateral_convolutions, self.output_convolutions = 0, [], []

    def forward(self, features: Sequence[Tensor], **kwargs: Any) -> Any:
        found = super().forward(features, **kwargs)
        finest, *maps = self.a3fpn([features[0], *reversed(found.multi_scale_features)])
        found.mask_features, found.multi_scale_features = self.mask_projection(finest), tuple(reversed(maps))
        return found


class PixelLevel(published.Mask2FormerPixelLevelModule):
    def __init__(self, config: Any, channels: Sequence[int], a3fpn: bool) -> None:
        nn.Module.__init__(self)
        decoder = A3FPNPixelDecoder if a3fpn else published.Mask2FormerPixelDecoder
        self.decoder = decoder(config, feature_channels=channels)


class Body(published.Mask2FormerModel):
    def __init__(self, config: Any, channels: Sequence[int], a3fpn: bool) -> None:
        published.Mask2FormerPreTrainedModel.__init__(self, config)
        self.pixel_level_module = PixelLevel(config, channels, a3fpn)
        self.transformer_module = published.Mask2FormerTransformerModule(config.feature_size, config)
        self.post_init()


class Loss(published.Mask2FormerLoss):
    def get_num_masks(self, class_labels: Sequence[Tensor], device: torch.device) -> Tensor:
        """Masks for each process; transformers divides by the processes twice."""
        count = torch.tensor(float(sum(map(len, class_labels))), device=device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(count)
            count /= distributed.get_world_size()
        return count.clamp(min=1)


class Network(published.Mask2FormerForUniversalSegmentation):
    """Args:
    config: transformers' ``Mask2FormerConfig``.
    channels: of the backbone's maps.
    a3fpn: whether `A3FPNPixelDecoder` is the pixel decoder.
    """

    def __init__(self, config: Any, channels: Sequence[int], a3fpn: bool) -> None:
        published.Mask2FormerPreTrainedModel.__init__(self, config)
        self.model = Body(config, channels, a3fpn)
        self.weight_dict = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.criterion = Loss(config=config, weight_dict=self.weight_dict)
        self.post_init()
