"""Translate the parameter names of a file to those of a model, and account for every element.

The family's ``checkpoint_filter_fn`` runs on element indices in place of weights, which shows where each element of the
model comes from, so which tensors are used, and how to reverse the translation (`restored`).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from ..backbones import family, list_models
from ..backbones.base import NamesError, unwrap
from ..backbones.loading import without_wrappers
from ..heads.detection import Detector
from ..heads.detection.published import from_conditional_detr, from_published
from ..heads.necks import A3FPN
from ..heads.necks.published import published_state
from ..heads.segmentation.published import from_mask2former, from_mmseg
from ..heads.upsamplers.published import checkpoint_filter_fn as upsampler_filter
from .cards import listed
from .manifest import checkpoints

State = Mapping[str, Tensor]
Translate = Callable[[State], dict[str, Tensor]]

BACKBONE = "backbone."
# what stands between it and the names of the network: detectron2, Conditional DETR's authors, transformers
_WITHIN = ("bottom_up.", "0.body.", "conv_encoder.model.", "model.")
STATISTICS = ("pixel_mean", "pixel_std")  # buffers in files of old versions of detectron2
ANCHORS = re.compile(r"proposal_generator\.anchor_generator\.cell_anchors\.(\d+)")  # likewise, by level
_NECK = re.compile(  # A3-FPN's
    r"(neck|backbone\.a3fpn|decode_head\.a3fpn|sem_seg_head\.pixel_decoder\.a3fpn)"
    r"\.(a3fpn_body\.|conv[0-4]+\.|extra_convs\.)"
)
_INDEX = ".relative_position_index"  # a buffer of isotropic ViT and Swin that follows from the image or window size
_UNREAD = re.compile(r"backbone\.(extra_norms\.|norm)\d\.(weight|bias)")  # of a map that no neck reads
_CONSTANT = re.compile(  # of RMT and STViT, which check them, and the masks of Swin's shifted windows
    r"(backbone\.)?layers\.\d+\.(Relpos\.(angle|decay)|blocks\.\d+\.(attn\.(un)?fold\.weights|attn_mask))"
)
_CLASS_TOKEN = re.compile(  # of FAN, and what follows it
    r"(backbone\.)?((norm|head)\.(weight|bias)|cls_token|cls_attn_blocks\.\d+\.((attn|mlp)\.[\w.]+|gamma2))"
)
_ODD = 1103515245  # multiplication by it modulo 2^31 is a permutation


def bare(name: str) -> str:
    return name.removeprefix("module.").removeprefix("model.")


def backbone_names(names: Iterable[str]) -> dict[str, str]:
    """The names of the backbone's tensors in a dense model, and the same without detectron2's ``bottom_up`` and others
    of its kind."""
    names = [name for name in names if name.startswith(BACKBONE)]
    inner = (BACKBONE + part for part in _WITHIN)
    prefix = next((each for each in inner if any(name.startswith(each) for name in names)), BACKBONE)
    return {name: BACKBONE + name[len(prefix) :] for name in names if name.startswith(prefix)}


def of_mmpretrain(names: Iterable[str]) -> bool:
    """Whether these are of a classifier of MMPretrain: a backbone and one Linear."""
    rest = [name for name in names if not name.startswith(BACKBONE)]
    return bool(rest) and all(name.startswith("head.fc.") for name in rest)


def has_level_norms(names: Iterable[str]) -> bool:
    """Whether there is a norm for each level, which only the backbones of dense models have."""
    starts = ("extra_norm.", "extra_norms.", "hidden_states_norms.", *(f"norm{i}." for i in range(4)))
    names = [bare(name) for name in names]
    closes_stages = any(name.startswith("norm4.") for name in names)  # those of VAN begin with norm1
    return not closes_stages and any(name.startswith(starts) for name in names)


def key_format(names: Iterable[str], architecture: str, own: Iterable[str]) -> str:
    """The format of the names, one of `cards.KEY_FORMATS`; ``own`` are those of the model."""
    names, own = [bare(name) for name in names], {bare(name) for name in own}
    if any("patch_embeddings.projection" in name or name.startswith("van.encoder.") for name in names):
        return "transformers"
    if any("decoder.ref_point_head." in name for name in names):  # of Conditional DETR
        return "authors" if any(name.startswith("transformer.") for name in names) else "transformers"
    if any(name.startswith(("backbone.bottom_up.", "sem_seg_head.", "roi_heads.", "criterion.")) for name in names):
        return "detectron2"
    if any(name.startswith(BACKBONE) for name in names):
        return "mmdet"
    published = (each.keys for each in checkpoints().values() if (each.model, each.task) == (architecture, "classify"))
    ours = "foveal" if own.issuperset(names) else "authors"  # whose weights are not published
    return next(published, ours if architecture in list_models() else "timm")


# ---- translation


def family_filter(architecture: str) -> Callable[[dict[str, Any], nn.Module], dict[str, Any]]:
    """The ``checkpoint_filter_fn`` of a model's family; for models of timm itself a translation of ResNets."""
    module = sys.modules[model_entrypoint(architecture).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state, net: unwrap(_resnet(state, net)))


def of_family(net: Any, architecture: str) -> Translate:
    """The translation for a classifier or backbone."""

    def translate(state: State) -> dict[str, Tensor]:
        places = backbone_names(map(bare, state))
        named = {places.get(bare(name), name): value for name, value in state.items()}
        return family_filter(architecture)(without_wrappers(named), net)

    return translate


def of_dense(model: Any, architecture: str, bgr: bool) -> Translate:
    """The translation for a detector or segmenter; ``bgr`` flips the first convolution to RGB."""
    detects = isinstance(model, Detector)
    prefix = "detector.backbone.body." if detects else "backbone.body."
    network = model.get_submodule(prefix.rstrip("."))
    inner_network = without_getter(network)
    prefix += "model." * (inner_network is not network)

    def translate(state: State) -> dict[str, Tensor]:
        state = {bare(name): value for name, value in state.items()}
        own = backbone_names(state)
        inner = family_filter(architecture)(without_wrappers({own[name]: state[name] for name in own}), inner_network)
        result = {prefix + name: tensor for name, tensor in inner.items()}
        if bgr:
            first = f"{prefix}{inner_network.pretrained_cfg['first_conv']}.weight"
            result[first] = result[first].flip(1)
        between = {name: tensor for name, tensor in state.items() if _NECK.match(name)}
        for place, neck in model.named_modules():
            if isinstance(neck, A3FPN):
                result |= {f"{place}.{name}": tensor for name, tensor in published_state(neck, between).items()}
        rest = {name: x for name, x in state.items() if not (name in own or may_be_unused(name))}
        if model.arguments["head"] == "mask2former":
            return result | from_mask2former(rest, "detector.head." if detects else "head.")
        if model.arguments["head"] == "conditional_detr":
            return result | from_conditional_detr(rest)
        return result | (from_published(rest) if detects else from_mmseg(rest))

    return translate


def of_upsampler(state: State) -> dict[str, Tensor]:
    """The translation for an upsampler: names without wrappers, and without constants."""
    return upsampler_filter({bare(name): value for name, value in state.items()})


def without_getter(model: Any) -> Any:
    """The backbone inside timm's wrapper for models that return feature maps."""
    return model.model if type(model).__name__ == "FeatureGetterNet" else model


def unused_by_classifiers(name: str) -> bool:
    """Whether a tensor of a classifier is used nowhere, and so need not be used here: transformers' VAN has one norm
    too many, the files of RMT and STViT have constants, and a FAN backbone has no class token."""
    name = bare(name)
    return name.startswith("van.layernorm.") or bool(_CONSTANT.fullmatch(name) or _CLASS_TOKEN.fullmatch(name))


def may_be_unused(name: str) -> bool:
    """Whether a tensor may be unused: of A3-FPN, parts of which the authors compute and never read, a buffer of
    image statistics, anchors or constants, or the norm of a map that no neck reads."""
    name = bare(name)
    return name in STATISTICS or bool(
        _NECK.match(name) or ANCHORS.fullmatch(name) or _CONSTANT.fullmatch(name) or _UNREAD.fullmatch(name)
    )


_DETECTRON2 = {  # detectron2's ResNet to timm's
    r"(^|\.)stem\.conv1\.norm\.": r"\1bn1.",
    r"(^|\.)stem\.conv1\.": r"\1conv1.",
    r"\.shortcut\.norm\.": ".downsample.1.",
    r"\.shortcut\.": ".downsample.0.",
    r"\.conv(\d)\.norm\.": r".bn\1.",
    **{rf"(^|\.)res{i + 1}\.": rf"\1layer{i}." for i in range(1, 5)},
}
# the stem of ResNet-C in mmdetection and mmsegmentation, whose last norm stands where other ResNets have their first
_RESNET_C = {r"(?<![^.])stem\.7\.": "bn1.", r"(?<![^.])stem\.([01346])\.": r"conv1.\1."}


def _resnet(state: State, network: Any) -> dict[str, Tensor]:
    """timm's names for the ResNets of detectron2 and for ResNet-C; other files unchanged, but for frozen norms.

    Raises:
        ValueError: the file has the stem of ResNet-C and the network does not.
    """
    own, table = network.state_dict(), {}
    if any(re.search(r"(^|\.)res2\.\d+\.conv1\.", name) for name in state) and "layer1.0.conv1.weight" in own:
        table = _DETECTRON2
    elif any(re.search(r"(^|\.)stem\.7\.", name) for name in state) and "bn1.weight" in own:
        table = _RESNET_C
        if "conv1.3.weight" not in own:
            raise ValueError("the file has the three-convolution stem of ResNet-C: choose such a model, as resnet50c")
    result = {}
    for name, tensor in state.items():
        for theirs, ours in table.items():
            name = re.sub(theirs, ours, name, count=1)
        result[name] = tensor
    if not any(name.endswith(".num_batches_tracked") for name in result):  # frozen norms do not count batches
        for name in [name for name in result if name.endswith(".running_mean")]:
            count = f"{name.removesuffix('running_mean')}num_batches_tracked"
            if count.removeprefix(BACKBONE) in own:
                result.setdefault(count, torch.zeros((), dtype=torch.int32))
    return result


def closest(state: State) -> list[str]:
    """The models that a file of unknown origin may be of, at most five, each with the number of tensors that it shares
    with the file: by name and shape, or by name if no model has all names. Empty if none has half of them."""
    total, names = len(state), [name for name in list_models() if not name.startswith("test_")]
    network = {name: (family(name), model_entrypoint(name).__module__) for name in names}
    first = {network[name]: name for name in reversed(names)}
    counts = {kind: _shared(state, name)[0] for kind, name in first.items()}
    near = [kind for kind, count in counts.items() if count > 0.8 * max(counts.values())]
    models = [name for name in names if network[name] in near]
    count = {name: _shared(state, name) for name in models}
    fitting = {name: alike for name, (_, alike) in count.items() if alike}
    whole = {name: alike for name, alike in fitting.items() if alike == total}
    found = whole or fitting or {name: common for name, (common, _) in count.items() if 2 * common > total}
    order = sorted(found, key=lambda name: -found[name])
    return [f"{name} ({found[name]} of {total} tensors)" for name in order[:5]]


def _shared(state: State, architecture: str) -> tuple[int, int]:
    """The number of tensors of a model that a file has, by name, and by name and shape; the latter is 0 if names are
    missing or unexpected."""
    with torch.device("meta"):
        net = timm.create_model(architecture)
    try:
        translated = of_family(net, architecture)(state)
    except NamesError as error:
        return error.common, 0
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError):
        return 0, 0  # what the family's translation expects is missing
    own = net.state_dict()
    common = [name for name in translated if name in own and not translated[name].is_meta]
    return len(common), sum(own[name].shape == translated[name].shape for name in common)


# ---- accounting for every element


def fitted(
    state: dict[str, Tensor], net: Any, translate: Translate, may_be_unused: Callable[[str], bool]
) -> tuple[dict[str, Tensor], list[str]]:
    """The complete state of a model from all elements of ``state``, and the names of the tensors left out.

    Raises:
        ValueError: tensors of the file that are not used, of the model that are not set, or of another shape.
    """
    for name, value in state.items():
        if name.endswith(_INDEX) and not torch.equal(value, _position_index(name, value)):
            raise ValueError(f"{name} orders the position bias differently from this model")
    try:
        origins, starts = _trace(state, translate)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    used = torch.zeros(1 + sum(value.numel() for value in state.values()), dtype=torch.bool)
    own = net.state_dict()
    for name in own.keys() & origins.keys():
        used[origins[name].flatten().long()] = True
    unused = [
        name
        for name, start in starts.items()
        if not name.endswith(_INDEX) and not used[start : start + state[name].numel()].all()
    ]
    shapes = {name: (tuple(x.shape), tuple(own[name].shape)) for name, x in origins.items() if name in own}
    differ = {
        "of the file not used": [name for name in unused if not may_be_unused(name)],
        "of the model not set": [name for name in own if name not in origins],
        "of another shape": [
            f"{name} {theirs} for {ours}" for name, (theirs, ours) in shapes.items() if theirs != ours
        ],
    }
    if text := "; ".join(f"{kind}: {listed(names)}" for kind, names in differ.items() if names):
        raise ValueError(text)
    return translate(state), unused


def restored(spec: Mapping[str, tuple[str, list[int]]], weights: State, translate: Translate) -> dict[str, Tensor]:
    """The tensors of a file, given their dtypes and shapes, from the weights that `translate` made of them."""
    state = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in spec.items()}
    state |= {name: _position_index(name, value) for name, value in state.items() if name.endswith(_INDEX)}
    origins, starts = _trace(state, translate)
    names = list(state)
    bounds = torch.tensor([*starts.values(), 1 + sum(value.numel() for value in state.values())])
    for name, origin in origins.items():
        ids, values = origin.flatten().long(), weights[name].flatten()
        first, last = torch.searchsorted(bounds, torch.stack([ids.min(), ids.max()]), right=True).tolist()
        for i in range(max(first - 1, 0), last):
            chosen = (ids >= bounds[i]) & (ids < bounds[i + 1])
            target = state[names[i]]
            target.view(-1)[ids[chosen] - bounds[i]] = values[chosen].to(target.dtype)
    return state


def _trace(state: State, translate: Translate) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The origin of each element of the model's state: its index, from 1 on, among all elements of ``state``, 0 for a
    constant; and the index at which each tensor of ``state`` begins. Tensors that are not of ``state`` are left out.

    Raises:
        ValueError: elements are computed, as by resampling, not copied.
    """
    starts, total = {}, 1
    for name, value in state.items():
        starts[name], total = total, total + value.numel()
    if total >= 2**31:
        raise ValueError(f"{total:,} numbers exceed the indices of int32")
    places = {  # in int32, which no weights have
        name: torch.arange(start, start + state[name].numel(), dtype=torch.int32).reshape(state[name].shape)
        for name, start in starts.items()
    }
    scrambled = lambda value: (value.long() * _ODD % 2**31).int()  # noqa: E731
    result = translate(places)
    again = translate({name: scrambled(value) for name, value in places.items()})
    for name, value in result.items():
        if value.dtype == torch.int32 and not torch.equal(scrambled(value), again[name]):
            raise ValueError(f"{name} would be resampled from the file's numbers, not copied")
    return {name: value for name, value in result.items() if value.dtype == torch.int32}, starts


def _position_index(name: str, like: Tensor) -> Tensor:
    """The row of the flattened position bias table for each pair of tokens of a square map, ``[side^2, side^2]``: the
    offset of the key from the query, of Swin (with blocks in layers) the reverse, counted from ``1 - side``."""
    side = math.isqrt(len(like))
    y, x = (grid.flatten() for grid in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    rows, columns = y[None] - y[:, None] + side - 1, x[None] - x[:, None] + side - 1
    index = rows * (2 * side - 1) + columns
    return index.T.contiguous() if ".blocks." in name else index
