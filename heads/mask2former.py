"""Mask2Former (Cheng et al., arXiv 2112.01527) on any backbone, with transformers' pixel decoder, queries, matching and
losses. Shared by its segmenter and its detector."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, ShapeSpec
from .necks import build_neck

QUERIES = 8192  # of the pixel decoder, up to which it treats them together
_BY_QUERY = ("position_embeddings", "reference_points")  # arguments of its attention
# terms of the published loss and their names here
LOSSES = {"cross_entropy": "loss_class", "mask": "loss_mask", "dice": "loss_dice"}


class _Encoder:
    """Adapts a backbone to transformers' pixel level module. Not a module: the model around it owns the backbone."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.channels = backbone, backbone.spec.channels

    def __call__(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(feature_maps=list(self.backbone(images).values()))


def decoder(backbone: Backbone, num_classes: int, settings: dict[str, Any], a3fpn: dict[str, Any] | None = None) -> Any:
    """transformers' Mask2FormerForUniversalSegmentation on one of our backbones.

    Args:
        settings: of transformers' ``Mask2FormerConfig``: ``num_queries``, ``feature_size``, ``encoder_layers``, ...
        a3fpn: settings of an `A3FPN` that replaces the FPN of the pixel decoder and fuses the encoder's maps with the
            finest map, as in A3-FPN's released models. None: the FPN.

    Raises:
        ImportError: transformers is not installed.
        ValueError: strides other than 4, 8, 16, 32, unknown or invalid settings, or an A3-FPN whose maps do not fit the
            decoder.
    """
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import Mask2FormerConfig, TimmBackboneConfig
        from transformers.models.mask2former import modeling_mask2former as published
    except ImportError as error:
        raise ImportError(
            f"mask2former needs transformers and scipy: pip install transformers scipy ({error})"
        ) from None
    if backbone.spec.strides != (4, 8, 16, 32):
        raise ValueError(f"mask2former reads maps at strides 4, 8, 16, 32, the backbone gives {backbone.spec.strides}")
    known = Mask2FormerConfig().to_dict()
    unknown = set(settings) - set(known) | set(settings) & {"backbone_config", "num_labels"}
    if unknown:
        raise ValueError(f"mask2former: no such settings: {', '.join(sorted(unknown))}")
    # YAML may give 2 for 2.0, which the configuration rejects
    settings = {k: float(v) if type(v) is int and type(known[k]) is float else v for k, v in settings.items()}
    try:  # the configuration requires a backbone, which is not built
        config = Mask2FormerConfig(backbone_config=TimmBackboneConfig(), num_labels=num_classes, **settings)
    except StrictDataclassError as error:
        raise ValueError(f"mask2former: {' '.join(str(error).split())}") from None

    whole = _network(published, config, backbone.spec.channels, a3fpn is not None)
    _attend_in_parts(whole, published.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention)
    # after transformers' initialization, which must not change these
    whole.model.pixel_level_module.encoder = _Encoder(backbone)
    if a3fpn is not None:
        spec = ShapeSpec((backbone.spec.channels[0], *[config.feature_size] * 3), backbone.spec.strides)
        neck = build_neck("a3fpn", spec, **dict(out_channels=config.feature_size, columns=1, squeeze=[1] * 4) | a3fpn)
        wanted = ShapeSpec((config.feature_size,) * 4, spec.strides)
        if neck.spec != wanted:
            raise ValueError(f"neck a3fpn with {a3fpn} gives {neck.spec}, the decoder of mask2former reads {wanted}")
        whole.model.pixel_level_module.decoder.a3fpn = neck
    return whole


def _network(published: Any, config: Any, channels: Sequence[int], a3fpn: bool) -> Any:
    """transformers' Mask2FormerForUniversalSegmentation without a backbone.

    Args:
        published: transformers' module, an optional dependency.
        config: its ``Mask2FormerConfig``.
        channels: of the backbone's maps.
    """

    class PixelLevel(published.Mask2FormerPixelLevelModule):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            decoder = _a3fpn_pixel_decoder(published) if a3fpn else published.Mask2FormerPixelDecoder
            self.decoder = decoder(config, feature_channels=channels)

    class Body(published.Mask2FormerModel):
        def __init__(self) -> None:
            published.Mask2FormerPreTrainedModel.__init__(self, config)
            self.pixel_level_module = PixelLevel()
            self.transformer_module = published.Mask2FormerTransformerModule(config.feature_size, config)
            self.post_init()

    class Loss(published.Mask2FormerLoss):
        def get_num_masks(self, class_labels: Sequence[Tensor], device: torch.device) -> Tensor:
            """Of this batch; the training loop weighs it among those of an update (`normalizers`)."""
            return torch.tensor(float(sum(map(len, class_labels))), device=device).clamp(min=1)

    class Network(published.Mask2FormerForUniversalSegmentation):
        def __init__(self) -> None:
            published.Mask2FormerPreTrainedModel.__init__(self, config)
            self.model = Body()
            self.weight_dict = {
                "loss_cross_entropy": config.class_weight,
                "loss_mask": config.mask_weight,
                "loss_dice": config.dice_weight,
            }
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.criterion = Loss(config=config, weight_dict=self.weight_dict)
            self.post_init()

    return Network()


def _attend_in_parts(whole: nn.Module, published: type[nn.Module]) -> None:
    """Makes the pixel decoder's deformable attention treat the queries of large maps in three parts in evaluation: the
    values that all of them sample take 0.8 GB for an image of 1024 x 1024 pixels."""

    class InParts(published):
        def forward(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor, ...]:
            queries = hidden_states.shape[1]
            if self.training or queries <= QUERIES:
                return super().forward(hidden_states, **given)
            by_query = {"hidden_states": hidden_states} | {
                k: given.pop(k) for k in _BY_QUERY if given.get(k) is not None
            }
            step = -(-queries // 3)  # each part projects all values again
            found = []
            for start in range(0, queries, step):
                part = {key: value[:, start : start + step] for key, value in by_query.items()}
                found.append(super().forward(**part, **given))
            return tuple(torch.cat(each, 1) for each in zip(*found, strict=True))

    for module in whole.modules():
        if type(module) is published:
            module.__class__ = InParts


def _a3fpn_pixel_decoder(published: Any) -> type[nn.Module]:
    class A3FPNPixelDecoder(published.Mask2FormerPixelDecoder):
        """A pixel decoder with an `A3FPN`, assigned later, in place of its FPN."""

        def __init__(self, config: Any, feature_channels: Sequence[int]) -> None:
            super().__init__(config, feature_channels)
            del self.adapter_1, self.layer_1  # the FPN's
            self.num_fpn_levels, self.lateral_convolutions, self.output_convolutions = 0, [], []

        def forward(self, features: Sequence[Tensor], **kwargs: Any) -> Any:
            found = super().forward(features, **kwargs)
            finest, *maps = self.a3fpn([features[0], *reversed(found.multi_scale_features)])
            found.mask_features, found.multi_scale_features = self.mask_projection(finest), tuple(reversed(maps))
            return found

    return A3FPNPixelDecoder


def query_outputs(head: Any, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions of the queries before the first layer and after each layer of the decoder.

    Args:
        images: normalized, ``[B, C, H, W]``, sides divisible by the strides.

    Returns:
        Class logits ``[B, queries, classes + 1]``, "no object" last, and mask logits ``[B, queries, H / 4, W / 4]``, in
        float32 also under autocast.
    """
    found = head.model(images, output_hidden_states=True, return_dict=True)
    states = found.transformer_decoder_intermediate_states
    classes = [_exact(head.class_predictor(state.transpose(0, 1))) for state in states]
    return classes, [_exact(masks) for masks in found.masks_queries_logits]


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def losses(head: Any, images: Tensor, masks: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """The weighted losses of classes, masks and their overlap (dice), each summed over the layers of the decoder and
    divided by its part of `normalizers`.

    Args:
        images: as `query_outputs` takes them.
        masks: per image, 0 or 1 in any dtype, ``[N, H, W]`` for its N >= 0 objects.
        labels: per image, int64 ``[N]``.
    """
    class_logits, mask_logits = query_outputs(head, images)
    deep = head.config.use_auxiliary_loss
    with torch.autocast(images.device.type, enabled=False):  # matching runs in NumPy, which has no bfloat16
        found = head.get_loss_dict(
            masks_queries_logits=mask_logits[-1],
            class_queries_logits=class_logits[-1],
            mask_labels=[each.float() for each in masks],
            class_labels=labels,
            auxiliary_predictions=head.get_auxiliary_logits(class_logits, mask_logits) if deep else None,
        )
    layers = ["", *(f"_{layer}" for layer in range(deep * (len(class_logits) - 1)))]
    return {ours: sum(found[f"loss_{name}{layer}"] for layer in layers) for name, ours in LOSSES.items()}


def normalizers(head: Any, labels: Sequence[Tensor]) -> Tensor:
    """What each of the `losses` of a batch is divided by, ``[3]``: the sum of the queries' weights, in units of which
    even a batch without objects has one or more, and twice the number of objects."""
    objects, queries = sum(map(len, labels)), len(labels) * head.config.num_queries
    classes = objects + head.config.no_object_weight * (queries - objects)
    return torch.tensor([classes * head.config.num_queries, objects, objects], dtype=torch.float32)
