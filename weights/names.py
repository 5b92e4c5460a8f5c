"""From the names of a published file to those of a model, with every element accounted for.

What happened to each element is found by running the family's ``checkpoint_filter_fn`` on numbers that say where they
come from instead of on weights. That shows which tensors are used, and reverses the translation (`restored`).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.models import clean_state_dict, model_entrypoint
from torch import Tensor, nn

from ..backbones import list_models
from ..backbones.base import unwrap
from ..heads.detection import Detector
from ..heads.detection.published import from_published
from ..heads.necks import A3FPN
from ..heads.necks.published import published_state
from ..heads.segmentation.published import from_mask2former, from_mmseg
from .cards import listed
from .manifest import checkpoints

State = Mapping[str, Tensor]
Translate = Callable[[State], dict[str, Tensor]]

BACKBONE = "backbone."
STATISTICS = ("pixel_mean", "pixel_std")  # in files of older versions of detectron2, which learn neither
ANCHORS = re.compile(r"proposal_generator\.anchor_generator\.cell_anchors\.(\d+)")  # of each level
_NECK = re.compile(  # A3-FPN's
    r"(neck|backbone\.a3fpn|decode_head\.a3fpn|sem_seg_head\.pixel_decoder\.a3fpn)"
    r"\.(a3fpn_body\.|conv[0-4]+\.|extra_convs\.)"
)
_INDEX = ".relative_position_index"  # stored by the authors' isotropic ViT, though it follows from the image size
_ODD = 1103515245  # times this modulo 2^31 every place is another


def bare(name: str) -> str:
    return name.removeprefix("module.").removeprefix("model.")


def backbone_names(names: Iterable[str]) -> dict[str, str]:
    """The names of the backbone's tensors in a dense model, and the same without detectron2's ``bottom_up``."""
    names = [name for name in names if name.startswith(BACKBONE)]
    below = f"{BACKBONE}bottom_up."
    prefix = below if any(name.startswith(below) for name in names) else BACKBONE
    return {name: BACKBONE + name[len(prefix) :] for name in names if name.startswith(prefix)}


def has_level_norms(names: Iterable[str]) -> bool:
    """Whether a norm for each level says that the backbone is a dense model's."""
    starts = ("extra_norm.", "hidden_states_norms.", *(f"norm{i}." for i in range(4)))
    return any(bare(name).startswith(starts) for name in names)


def key_format(names: Iterable[str], architecture: str) -> str:
    """Whose names they are, one of `cards.KEY_FORMATS`."""
    names = [bare(name) for name in names]
    if any("patch_embeddings.projection" in name for name in names):
        return "transformers"
    if any(name.startswith(("backbone.bottom_up.", "sem_seg_head.", "roi_heads.", "criterion.")) for name in names):
        return "detectron2"
    if any(name.startswith(BACKBONE) for name in names):
        return "mmdet"
    published = (each.keys for each in checkpoints().values() if (each.model, each.task) == (architecture, "classify"))
    return next(published, "foveal" if architecture in list_models() else "timm")


# ---- translation


def family_filter(architecture: str) -> Callable[[dict[str, Any], nn.Module], dict[str, Any]]:
    """The ``checkpoint_filter_fn`` of a model's family; for timm's other models, what is around the names comes off."""
    module = sys.modules[model_entrypoint(architecture).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state, net: unwrap(_of_resnets(state, net)))


def of_family(net: Any, architecture: str) -> Translate:
    """From a file's names to those of a classifier or backbone."""

    def translate(state: State) -> dict[str, Tensor]:
        places = backbone_names(map(bare, state))
        named = {places.get(bare(name), name): value for name, value in state.items()}
        return family_filter(architecture)(clean_state_dict(named), net)

    return translate


def of_dense(model: Any, architecture: str, bgr: bool) -> Translate:
    """From a file's names to those of a detector or segmenter.

    Args:
        bgr: the first filters are flipped from BGR to RGB.
    """
    detects = isinstance(model, Detector)
    prefix, network = backbone_of(model)

    def translate(state: State) -> dict[str, Tensor]:
        state = {bare(name): value for name, value in state.items()}
        own = backbone_names(state)
        inner = {own[name]: state[name] for name in own}
        inner = family_filter(architecture)(clean_state_dict(inner), network)
        result = {prefix + name: tensor for name, tensor in inner.items()}
        if bgr:
            first = f"{prefix}{network.pretrained_cfg['first_conv']}.weight"
            result[first] = result[first].flip(1)
        between = {name: tensor for name, tensor in state.items() if _NECK.match(name)}
        for place, neck in model.named_modules():
            if isinstance(neck, A3FPN):
                result |= {f"{place}.{name}": tensor for name, tensor in published_state(neck, between).items()}
        rest = {name: x for name, x in state.items() if not (name in own or name in between or _not_learned(name))}
        if model.arguments["head"] == "mask2former":
            return result | from_mask2former(rest, "detector.head." if detects else "head.")
        return result | (from_published(rest) if detects else from_mmseg(rest))

    return translate


def backbone_of(model: Any) -> tuple[str, Any]:
    """The prefix of a dense model's backbone, and the backbone, without what timm puts around it."""
    prefix = "detector.backbone.body." if isinstance(model, Detector) else "backbone.body."
    network = model.get_submodule(prefix.rstrip("."))
    inner = without_getter(network)
    return (prefix, network) if inner is network else (f"{prefix}model.", inner)


def without_getter(model: Any) -> Any:
    """The backbone itself, in a model of timm's that returns feature maps."""
    return model.model if type(model).__name__ == "FeatureGetterNet" else model


def may_be_unused(name: str) -> bool:
    """Whether a tensor may be left out: of A3-FPN, of which the authors compute parts that nothing reads, or statistics
    of the images and anchors, which are no weights here."""
    return _NECK.match(bare(name)) is not None or _not_learned(bare(name))


def _not_learned(name: str) -> bool:
    return name in STATISTICS or ANCHORS.fullmatch(name) is not None


_DETECTRON2 = [  # detectron2's ResNet, timm's
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"(^|\.)stem\.conv1\.norm\.", r"\1bn1."),
        (r"(^|\.)stem\.conv1\.", r"\1conv1."),
        (r"\.shortcut\.norm\.", ".downsample.1."),
        (r"\.shortcut\.", ".downsample.0."),
        (r"\.conv(\d)\.norm\.", r".bn\1."),
        *((rf"(^|\.)res{i + 1}\.", rf"\1layer{i}.") for i in range(1, 5)),
    )
]


def _of_resnets(state: State, network: Any) -> dict[str, Tensor]:
    """timm's names for detectron2's ResNet, whose frozen norms do not count batches, and for the stem of ResNet-C in
    mmdetection and mmsegmentation, whose last norm stands where other ResNets have their first; others as they are.

    Raises:
        ValueError: if the file has such a stem and the network has not.
    """
    own, result = network.state_dict(), {}
    if any(re.search(r"(^|\.)res2\.\d+\.conv1\.", name) for name in state) and "layer1.0.conv1.weight" in own:
        for name, tensor in state.items():
            for theirs, ours in _DETECTRON2:
                name = theirs.sub(ours, name)
            result[name] = tensor
        for name in [name for name in result if name.endswith(".running_mean")]:
            count = f"{name.removesuffix('running_mean')}num_batches_tracked"
            if count not in result and count.removeprefix(BACKBONE) in own:
                result[count] = torch.zeros((), dtype=torch.int32)
        return result
    if not any(re.search(r"(^|\.)stem\.7\.", name) for name in state) or "bn1.weight" not in own:
        return dict(state)
    if "conv1.3.weight" not in own:
        raise ValueError("its stem has three convolutions, as that of ResNet-C: use resnet50c, for one")
    places = {"7": "bn1", **{i: f"conv1.{i}" for i in "01346"}}
    stem = re.compile(r"(?<![^.])stem\.([013467])\.")
    return {stem.sub(lambda found: f"{places[found[1]]}.", name, count=1): tensor for name, tensor in state.items()}


# ---- every element


def fitted(
    state: dict[str, Tensor], net: Any, translate: Translate, may_be_unused: Callable[[str], bool]
) -> tuple[dict[str, Tensor], list[str]]:
    """The state of the model, made of all of ``state`` and nothing else, and the tensors of ``state`` left out of it.

    Raises:
        ValueError: listing what of the file is not used, what of the model not set, and shapes that differ.
    """
    for name, value in state.items():
        if name.endswith(_INDEX) and not torch.equal(value, _position_index(value)):
            raise ValueError(f"{name} orders the position bias in another way than this model")
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
    dropped = [name for name in unused if may_be_unused(name)]
    differ = {
        "of the file not used": [name for name in unused if name not in dropped],
        "of the model not set": [name for name in own if name not in origins],
        "of another shape": [
            f"{name} {tuple(origin.shape)} for {tuple(own[name].shape)}"
            for name, origin in origins.items()
            if name in own and origin.shape != own[name].shape
        ],
    }
    if text := "; ".join(f"{what}: {listed(names)}" for what, names in differ.items() if names):
        raise ValueError(text)
    return translate(state), dropped


def restored(spec: Mapping[str, tuple[str, list[int]]], weights: State, translate: Translate) -> dict[str, Tensor]:
    """The tensors of a file, by their dtypes and shapes, from the weights that `translate` made of them."""
    state = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in spec.items()}
    state |= {name: _position_index(value) for name, value in state.items() if name.endswith(_INDEX)}
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
    """Where each element of the model's state comes from: its place, from 1 on, among all elements of ``state``, or 0
    if it is made up; and the place at which each tensor of ``state`` begins. Tensors that a filter takes from elsewhere
    are left out.

    Raises:
        ValueError: if elements are computed, as by resampling, not taken.
    """
    starts, total = {}, 1
    for name, value in state.items():
        starts[name], total = total, total + value.numel()
    if total >= 2**31:
        raise ValueError(f"{total:,} numbers are more than can be told apart")
    places = {  # in int32, which no weights are
        name: torch.arange(start, start + state[name].numel(), dtype=torch.int32).reshape(state[name].shape)
        for name, start in starts.items()
    }
    scrambled = lambda value: (value.long() * _ODD % 2**31).int()  # noqa: E731
    result = translate(places)
    again = translate({name: scrambled(value) for name, value in places.items()})
    for name, value in result.items():
        if value.dtype == torch.int32 and not torch.equal(scrambled(value), again[name]):
            raise ValueError(f"{name} would be computed from the file's numbers (resampled), not taken from it")
    return {name: value for name, value in result.items() if value.dtype == torch.int32}, starts


def _position_index(like: Tensor) -> Tensor:
    """The row of the position bias table, flattened, for each pair of tokens of a square map, ``[side^2, side^2]``: the
    offset of the key from the query, counted from ``1 - side``."""
    side = math.isqrt(len(like))
    y, x = (grid.flatten() for grid in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    rows, columns = y[None] - y[:, None] + side - 1, x[None] - x[:, None] + side - 1
    return rows * (2 * side - 1) + columns
