"""Parameter names of published segmenters: UPerNet of mmsegmentation and transformers, the authors' Mask2Former."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..names import check_fit, translate
from ..necks.a3fpn import A3FPN
from ..necks.published import load_published

# mmseg's name, ours; {} is a number. The convolutions of both have a `conv`; its norm is mmseg's `bn`, ours `norm`.
UPERNET = (
    ("decode_head.psp_modules.{}.1.", "head.pooling.parts.{}."),
    ("decode_head.bottleneck.", "head.pooling.fuse."),
    ("decode_head.lateral_convs.{}.", "head.neck.lateral.{}."),
    ("decode_head.fpn_convs.{}.", "head.neck.output.{}."),
    ("decode_head.fpn_bottleneck.", "head.fuse."),
    ("decode_head.conv_seg.", "head.classifier.conv."),
    ("auxiliary_head.convs.{}.", "auxiliary.convs.{}."),
    ("auxiliary_head.conv_seg.", "auxiliary.classifier.conv."),
)

# of FPN and FPNHead, whose steps stand at every second place of a level, between enlargements
SEMANTIC_FPN = (
    ("neck.lateral_convs.{}.conv.", "head.neck.pyramid.inner_blocks.{}.0."),
    ("neck.fpn_convs.{}.conv.", "head.neck.pyramid.layer_blocks.{}.0."),
    ("decode_head.scale_heads.{}.{}.", "head.steps.{}.{}."),
    ("decode_head.conv_seg.", "head.classifier.conv."),
)

# the names of the authors' Mask2Former (on detectron2), transformers'
_PIXELS, _MODULE = "model.pixel_level_module.decoder.", "model.transformer_module."
_ENCODER, _DECODER = f"{_PIXELS}encoder.layers.{{}}.", f"{_MODULE}decoder.layers.{{}}."
_MASK2FORMER = (
    ("criterion.empty_weight", "criterion.empty_weight"),
    ("sem_seg_head.pixel_decoder.input_proj.{}.", f"{_PIXELS}input_projections.{{}}."),
    ("sem_seg_head.pixel_decoder.transformer.level_embed", f"{_PIXELS}level_embed"),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{}.self_attn.", f"{_ENCODER}self_attn."),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{}.norm1.", f"{_ENCODER}self_attn_layer_norm."),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{}.linear{}.", f"{_ENCODER}fc{{}}."),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{}.norm2.", f"{_ENCODER}final_layer_norm."),
    ("sem_seg_head.pixel_decoder.adapter_{}.norm.", f"{_PIXELS}adapter_{{}}.1."),
    ("sem_seg_head.pixel_decoder.adapter_{}.", f"{_PIXELS}adapter_{{}}.0."),
    ("sem_seg_head.pixel_decoder.layer_{}.norm.", f"{_PIXELS}layer_{{}}.1."),
    ("sem_seg_head.pixel_decoder.layer_{}.", f"{_PIXELS}layer_{{}}.0."),
    ("sem_seg_head.pixel_decoder.mask_features.", f"{_PIXELS}mask_projection."),
    ("sem_seg_head.predictor.query_feat.", f"{_MODULE}queries_features."),
    ("sem_seg_head.predictor.query_embed.", f"{_MODULE}queries_embedder."),
    ("sem_seg_head.predictor.level_embed.", f"{_MODULE}level_embed."),
    ("sem_seg_head.predictor.input_proj.{}.", f"{_MODULE}input_projections.{{}}."),
    ("sem_seg_head.predictor.transformer_cross_attention_layers.{}.multihead_attn.", f"{_DECODER}cross_attn."),
    ("sem_seg_head.predictor.transformer_cross_attention_layers.{}.norm.", f"{_DECODER}cross_attn_layer_norm."),
    ("sem_seg_head.predictor.transformer_self_attention_layers.{}.self_attn.", f"{_DECODER}self_attn."),
    ("sem_seg_head.predictor.transformer_self_attention_layers.{}.norm.", f"{_DECODER}self_attn_layer_norm."),
    ("sem_seg_head.predictor.transformer_ffn_layers.{}.linear{}.", f"{_DECODER}fc{{}}."),
    ("sem_seg_head.predictor.transformer_ffn_layers.{}.norm.", f"{_DECODER}final_layer_norm."),
    ("sem_seg_head.predictor.decoder_norm.", f"{_MODULE}decoder.layernorm."),
    ("sem_seg_head.predictor.mask_embed.layers.{}.", f"{_MODULE}decoder.mask_predictor.mask_embedder.{{}}.0."),
    ("sem_seg_head.predictor.class_embed.", "class_predictor."),
)


def from_mmseg(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The heads of a published UPerNet or semantic FPN under the names of `Segmenter`, without backbone and A3-FPN.

    Supports the names of mmsegmentation and of transformers' ``UperNetForSemanticSegmentation``.

    Raises:
        ValueError: a head's tensor that does not belong to them.
    """
    result = {}
    pyramid = any(name.startswith("decode_head.scale_heads.") for name in state_dict)
    table, parts = (
        (SEMANTIC_FPN, ("decode_head.", "neck.")) if pyramid else (UPERNET, ("decode_head.", "auxiliary_head."))
    )
    for name, tensor in state_dict.items():
        if not name.startswith(parts) or name.startswith("decode_head.a3fpn."):
            continue
        usual = name.replace(".batch_norm.", ".bn.").replace("_head.classifier.", "_head.conv_seg.")
        usual = re.sub(r"(?<=scale_heads\.)(\d+)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) // 2}", usual)
        own = translate(usual, table)
        if own is None:
            raise ValueError(f"{name} is no parameter of {'semantic FPN' if pyramid else 'UPerNet'}")
        result[own.replace(".bn.", ".norm.")] = tensor
    return result


def from_mask2former(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The heads of the authors' Mask2Former under transformers' names. The fused query, key and value projection of
    self-attention is split into three tensors.

    Args:
        state_dict: without the tensors of the backbone and an A3-FPN.
        prefix: of transformers' names, where a model has its ``Mask2FormerForUniversalSegmentation``.

    Raises:
        ValueError: a tensor that does not belong to Mask2Former.
    """
    result = {}
    for name, tensor in state_dict.items():
        own = translate(name, _MASK2FORMER)
        if own is None:
            raise ValueError(f"{name} is no parameter of Mask2Former")
        if ".self_attn.in_proj_" in own:
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                result[prefix + own.replace("in_proj_", f"{part}_proj.")] = value
        else:
            result[prefix + own] = tensor
    return result


def load_heads(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Load the heads of a published UPerNet into a `Segmenter`; its backbone is not changed.

    An auxiliary head that the model lacks, and classifiers with other classes, are skipped.

    Returns:
        Names of the model's tensors that are not loaded: none, or those of the classifiers.

    Raises:
        ValueError: names or shapes that do not fit the model, which is then unchanged.
    """
    neck = getattr(model.head, "neck", None)
    neck = neck if isinstance(neck, A3FPN) and any(n.startswith("decode_head.a3fpn.") for n in state_dict) else None
    parts = tuple(f"head.{name}." for name, _ in model.head.named_children() if name != "neck" or neck is None)
    own = {name: t for name, t in model.state_dict().items() if name.startswith((*parts, "auxiliary."))}
    found = from_mmseg(state_dict)
    if not any(name.startswith("auxiliary.") for name in own):
        found = {name: t for name, t in found.items() if not name.startswith("auxiliary.")}
    other = [n for n in own if ".classifier.conv." in n and n in found and own[n].shape != found[n].shape]
    check_fit(own, found, other_shape=other)
    if neck is not None:
        load_published(neck, {n: t for n, t in state_dict.items() if n.startswith("decode_head.a3fpn.")})
    model.load_state_dict({n: t for n, t in found.items() if n not in other}, strict=False)
    return other
