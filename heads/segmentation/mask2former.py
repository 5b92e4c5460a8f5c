"""Mask2Former (Cheng et al., arXiv 2112.01527) for semantic segmentation: transformers' decoder on our features."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import Features, dense_parameter_groups
from .layers import resize

IGNORE = 255  # of the targets: a pixel without a class


class _Encoder:
    """A backbone as transformers' pixel level module calls one. No module: the segmenter owns the features."""

    def __init__(self, features: Features):
        self.features, self.channels = features, features.spec.channels

    def __call__(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(feature_maps=self.features(images))


def _decoder(features: Features, num_classes: int, settings: dict[str, Any]) -> nn.Module:
    """transformers' Mask2FormerForUniversalSegmentation around the features, without a backbone of its own.

    Raises:
        ImportError: transformers is not there.
        ValueError: settings that its configuration does not have.
    """
    try:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, TimmBackboneConfig
        from transformers.models.mask2former import modeling_mask2former as published
    except ImportError as error:
        raise ImportError(
            f"mask2former needs transformers and scipy: pip install transformers scipy ({error})"
        ) from None
    if features.spec.strides != (4, 8, 16, 32):
        raise ValueError(f"mask2former reads maps at strides 4, 8, 16, 32, the backbone gives {features.spec.strides}")
    unknown = set(settings) - set(Mask2FormerConfig().to_dict()) | set(settings) & {"backbone_config", "num_labels"}
    if unknown:
        raise ValueError(f"mask2former: no such settings: {', '.join(sorted(unknown))}")
    # the configuration wants some backbone; none is made of it
    config = Mask2FormerConfig(backbone_config=TimmBackboneConfig(), num_labels=num_classes, **settings)

    class PixelLevel(published.Mask2FormerPixelLevelModule):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.decoder = published.Mask2FormerPixelDecoder(config, feature_channels=features.spec.channels)

    class Body(published.Mask2FormerModel):
        def __init__(self) -> None:
            published.Mask2FormerPreTrainedModel.__init__(self, config)
            self.pixel_level_module = PixelLevel()
            self.transformer_module = published.Mask2FormerTransformerModule(config.feature_size, config)
            self.post_init()

    class Whole(Mask2FormerForUniversalSegmentation):
        def __init__(self) -> None:
            published.Mask2FormerPreTrainedModel.__init__(self, config)
            self.model = Body()
            self.weight_dict = {
                "loss_cross_entropy": config.class_weight,
                "loss_mask": config.mask_weight,
                "loss_dice": config.dice_weight,
            }
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.criterion = published.Mask2FormerLoss(config=config, weight_dict=self.weight_dict)
            self.post_init()

    whole = Whole()
    # only now: transformers' initialization is not for the backbone
    whole.model.pixel_level_module.encoder = _Encoder(features)
    return whole


class Mask2Former(nn.Module):
    """Queries that each answer with a class and a mask; matched to the classes of an image, one mask each, in training.

    Args:
        features: a backbone with maps at strides 4, 8, 16, 32.
        num_classes: the queries may also answer "none".
        mean, std: per channel, of values in [0, 1].
        size_divisor: images are padded, right and bottom, to multiples of it; there is no class in the padding.
        settings: of transformers' ``Mask2FormerConfig``: ``num_queries``, ``feature_size``, ``encoder_layers``, ...

    Attributes:
        arguments: what rebuilds it, from whoever built it.

    Raises:
        ImportError: transformers is not installed.
        ValueError: other strides, or settings that transformers does not know.
    """

    def __init__(
        self,
        features: Features,
        num_classes: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size_divisor: int = 32,
        **settings: Any,
    ):
        super().__init__()
        self.features, self.size_divisor = features, size_divisor
        self.head = _decoder(features, num_classes, settings)
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
            masks = [F.pad(mask.to(images.dtype), padding) for mask in masks]
            return self.head(images, mask_labels=masks, class_labels=classes).loss
        answer = self.head(images)
        masks = resize(answer.masks_queries_logits.float(), images.shape[-2:])[..., :rows, :columns].sigmoid()
        shares = answer.class_queries_logits.float().softmax(-1)[..., :-1]
        scores = torch.einsum("bqc,bqhw->bchw", shares, masks)
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()

    def parameter_groups(
        self, weight_decay: float, layer_decay: float | None = None, backbone_lr_ratio: float = 1.0
    ) -> list[dict[str, Any]]:
        """As an optimizer takes them; see `heads.features.dense_parameter_groups`. Embeddings are not decayed."""
        embeddings = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        embeddings |= {name for name, _ in self.named_parameters() if name.endswith("level_embed")}
        return dense_parameter_groups(self, self.features, weight_decay, layer_decay, backbone_lr_ratio, embeddings)
