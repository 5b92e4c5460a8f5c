"""Someone else's file of weights as a verified model folder: every tensor of the file used, every parameter set.

What happened to each element is found by running the family's ``checkpoint_filter_fn`` on numbers that say where they
come from instead of on weights. That shows which tensors a conversion uses, and turns it round (`restore`).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict, get_pretrained_cfg, is_model, model_entrypoint
from torch import nn

from .._version import __version__
from ..backbones import list_models, loading
from ..backbones.download import file_sha256
from ..backbones.layers import unwrap
from ..backbones.loading import WEIGHTS
from ..heads.build import build_dense, load_dense, read_dense_config, save_dense
from . import dense, download
from .cards import KEY_FORMATS as FORMATS
from .cards import converted_card, counted, listed, summary
from .fingerprint import difference, fingerprint
from .folder import RECORD, TOLERANCE, check_output, published_config, staged
from .manifest import Checkpoint, checkpoints

_SOURCE = "source"  # the field of the safetensors header with the names of the file that was converted
_COCO = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # the ids of its 80 categories
_ODD = 1103515245  # times this modulo 2^31 every place is another
_TIMMS = set(inspect.signature(timm.create_model).parameters) - {"model_name", "kwargs"}  # no arguments of a model
_INDEX = ".relative_position_index"  # stored by the authors' isotropic ViT, though it follows from the image size


class ConversionError(ValueError):
    """The file and the model do not fit, or what was written does not answer as it should; nothing was written."""


@dataclass(frozen=True)
class Conversion:
    """What was written, and from what."""

    folder: Path
    files: list[str]
    record: dict[str, Any]  # as in config.json
    model: str  # in words

    def lines(self) -> list[str]:
        """The same for people."""
        return [f"{self.folder}: {', '.join(self.files)}", *summary(self.record, self.model)]


@dataclass(frozen=True)
class _Found:
    """What is to be converted: a file, and what is known of it."""

    file: Path
    architecture: str
    checkpoint: Checkpoint | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None  # of a timm folder
    dilations: list[int] | None = None  # of every block, as a folder of transformers tells


def convert(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    ema: bool | None = None,
    backbone: bool = False,
    arguments: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Conversion:
    """Write a file of weights as a model folder: ``config.json``, ``model.safetensors`` and a card, README.md.

    `foveal.load` and ``timm.create_model("local-dir:...", pretrained=True)`` read it, `verify` checks it. The formats
    of the names are told apart: the authors', timm's, transformers', mmdetection's, mmsegmentation's, detectron2's.

    A whole detector or segmenter becomes one of this package, where it has those heads and they answer alike: Faster
    and Mask R-CNN on an FPN or A3-FPN (of mmdetection and detectron2), Cascade Mask R-CNN (of mmdetection), RetinaNet
    on A3-FPN, UPerNet (also with A3-FPN), Mask2Former (the authors', on detectron2). Others are refused with the
    reason; ``backbone`` converts theirs.

    Detectron2's files do not tell what their configurations do; the manifest does of published ones, else it is asked
    for, as arguments: ``stride_in_1x1`` of a ResNet, ``channel_order`` of the images (``"bgr"`` or ``"rgb"``; the
    converted model takes RGB), their ``mean`` and ``std`` (of RGB in [0, 1]), and of a Mask2Former ``task``,
    ``"segment"`` or ``"detect"``. One for panoptic segmentation becomes a segmenter, which gives the class of each
    pixel and does not tell objects apart, unless ``task`` says otherwise.

    Args:
        source: a ``.pth``, ``.pth.tar``, ``.bin`` or ``.safetensors`` file; a folder of transformers, timm or a
            training run of this package; or a name of the manifest (``dinat_mini.in1k``), which is fetched.
        model: the model's name (of a dense one its backbone's), better with the tag of the manifest, which tells
            licence and preprocessing. Needed unless ``source`` tells it.
        ema: take averaged weights (True) or those that were trained (False); None: averaged ones if there are any.
        backbone: of a detector or segmenter, convert the backbone and leave out neck and heads. The folder then holds a
            model that gives feature maps.
        arguments: of the model, besides what the file tells (classes, auxiliary head): ``dilations``, ``in_chans`` ...
        force: write into a folder that is not empty, replacing files of the same names and no others.

    Raises:
        ValueError: if the source, the model or the output is none, the file is damaged or holds code, or file and model
            do not fit; the message lists what is left over on either side.
        OSError: if something cannot be fetched, read or written.

    Examples:
        >>> import timm, torch
        >>> torch.save(timm.create_model("test_foveal_dinat", num_classes=3).state_dict(), "weights.pth")
        >>> from foveal.weights.convert import convert
        >>> done = convert("weights.pth", "folder", model="test_foveal_dinat")
        >>> done.files
        ['README.md', 'config.json', 'model.safetensors']
    """
    found = _locate(source, model)
    output = check_output(output, force, [found.file.parent])
    content = loading.read_checkpoint(found.file)
    state, averaged = _tensors(content, found.file, ema)
    keys, heads = key_format(state, found.architecture), {}
    whole = len(state)
    inside = dense.body(map(_bare, state))
    body = {name: value for name, value in state.items() if _bare(name) in inside}
    rest = Counter(_bare(name).removeprefix(dense.BACKBONE).partition(".")[0] for name in state if name not in body)
    is_dense = bool(body) or _has_level_norms(state)
    if backbone and not is_dense:
        raise ConversionError(f"{found.file} has no backbone under its heads: leave out --backbone")
    if backbone and (left := [key for key in ("task", "num_classes") if key in (arguments or {})]):
        raise ConversionError(f"{' and '.join(left)}: that is of the heads, which --backbone leaves out")
    arguments = {**found.arguments, **(arguments or {})}
    if wrong := sorted(_TIMMS & set(arguments)):
        raise ValueError(f"{', '.join(wrong)}: that says how timm loads a model, it is no argument of one")
    if "out_indices" in arguments and not (is_dense or arguments.get("features_only")):
        raise ValueError("out_indices: that is of a model that gives feature maps; this becomes a classifier")
    if is_dense:
        try:
            told = dense.told({_bare(name): value for name, value in state.items()}, arguments, found.checkpoint)
            arguments = dense.timm_alone(told) if backbone else told.arguments
        except ValueError as error:
            raise ConversionError(f"{found.file}: {error}") from error
    if is_dense and not backbone:
        try:
            made = _whole(state, content, found, told)
        except _NotWhole as error:
            belong = f" and to its heads {counted(rest)}" if body and rest else ""
            raise ConversionError(
                f"{found.file} is of a dense model, keys of {FORMATS[keys]}: of its {whole} tensors "
                f"{len(body or state)} belong to the backbone{belong}. It is not converted whole: {error}. --backbone "
                "converts the backbone"
            ) from error
    else:
        if body:
            state, heads = body, rest
        made = _single(state, found, arguments, is_dense)
    record = {
        "file": found.file.name,
        "sha256": file_sha256(found.file),
        "checkpoint": found.checkpoint.name if found.checkpoint else None,
        "keys": keys,
        "averaged": averaged,
        "heads": dict(heads),
        "dropped": made.dropped,
        "bgr": is_dense and told.bgr,
        "tensors": len(state) - len(made.dropped),
        "parameters": sum(p.numel() for p in made.model.parameters()),
        "fingerprint": fingerprint(made.answers, _fingerprint_size(found, made.arguments)),
        "version": __version__,
    }
    if not all(math.isfinite(each["norm"]) for each in record["fingerprint"]["outputs"]):
        raise ConversionError(
            f"{found.file} is damaged or of another model: the answer to the fixed image is not finite"
        )
    spec = {
        name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
        for name, value in state.items()
        if name not in made.dropped
    }
    with staged(output) as folder:
        made.write(folder)
        _complete(folder, record, spec)
        files = sorted(path.name for path in folder.iterdir())
    return Conversion(output, files, record, made.words)


def restore(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of the file that `convert` made a folder from, under their own names, bit for bit. What was left out
    is not among them.

    Raises:
        ValueError: if the folder was not written by `convert`.

    Examples:
        >>> import timm, torch
        >>> torch.save(timm.create_model("test_foveal_dinat", num_classes=3).state_dict(), "weights.pth")
        >>> from foveal.weights.convert import convert, restore
        >>> _ = convert("weights.pth", "folder", model="test_foveal_dinat")
        >>> original = torch.load("weights.pth", weights_only=True)
        >>> all(torch.equal(value, original[name]) for name, value in restore("folder").items())
        True
    """
    folder = Path(folder)
    whole = read_dense_config(folder)
    found = loading.resolve(folder) if whole is None else None
    file = loading.weights_file(found) if whole is None else whole[0] / WEIGHTS
    with safe_open(file, framework="pt") as stream:
        header = (stream.metadata() or {}).get(_SOURCE)
    if header is None:
        raise ValueError(f"{file} does not tell what it was converted from; it was not written by `foveal convert`")
    spec = json.loads(header)
    with torch.device("meta"):
        if whole is not None:
            net = build_dense(whole[1]["task"], whole[1]["arguments"])
            bgr = (whole[1].get(RECORD) or {}).get("bgr", False)
            translate = _of_dense(net, whole[1]["arguments"]["backbone"], bgr)
        else:
            arguments = dict(found.config.get("model_args") or {})
            if not arguments.get("features_only"):
                arguments.setdefault("num_classes", found.config["num_classes"])
            translate = _of_family(_inner(_create(found.architecture, arguments)), found.architecture)
    restored = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in spec.items()}
    for name in restored:
        if name.endswith(_INDEX):
            restored[name] = _relative_position_index(math.isqrt(len(restored[name])))
    origins, starts = _trace(restored, translate)
    names, weights = list(restored), load_file(file)
    bounds = torch.tensor([*starts.values(), 1 + sum(value.numel() for value in restored.values())])
    for name, origin in origins.items():
        ids, values = origin.flatten().long(), weights[name].flatten()
        first, last = torch.searchsorted(bounds, torch.stack([ids.min(), ids.max()]), right=True).tolist()
        for i in range(max(first - 1, 0), last):
            chosen = (ids >= bounds[i]) & (ids < bounds[i + 1])
            target = restored[names[i]]
            target.view(-1)[ids[chosen] - bounds[i]] = values[chosen].to(target.dtype)
    return restored


# ---- the source


def _locate(source: str | Path, model: str | None) -> _Found:
    """Find the file, the model and what the manifest says of them."""
    path = loading.local_path(source)
    known, dilations = checkpoints(), None
    if path.is_file():
        file, told, config = path, None, None
    elif path.is_dir():
        file, told, config, dilations = _in_folder(path)
    elif str(source) in known:
        checkpoint = known[str(source)]
        file, told, config = download.fetch(checkpoint), checkpoint.name, None
    else:
        names = ", ".join(sorted(each.name for each in known.values() if each.model == str(source).partition(".")[0]))
        raise ValueError(
            f"{str(source)!r} is no file, folder or name of a published checkpoint"
            + (f"; those of that model: {names}" if names else "; `foveal info MODEL` shows them")
        )
    if told is None and model is None:
        raise ValueError(f"{file} does not tell which model it is of: name it with --model")
    name = told if model is None else model
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        raise loading.unknown_model(architecture)
    if told is not None and (of := told.partition(".")[0]) != architecture:
        if of in list_models():
            raise ValueError(f"{path} says that it is of {of}, not of {architecture}")
        config = None  # timm's own folder of weights that a model here loads, say
    of_this = {each.name: each for each in known.values() if each.model == architecture}
    if tag and name not in of_this and config is None:
        raise ValueError(f"{name} is not in the manifest; of {architecture} there are: {', '.join(of_this) or 'none'}")
    checkpoint = of_this.get(name) if tag else next((each for each in of_this.values() if _is_of(file, each)), None)
    if path.is_file():
        _check_name(file, name, checkpoint)
    arguments = dict((config or {}).get("model_args") or {})
    if checkpoint is not None:
        arguments = {**checkpoint.arguments, **arguments}
    return _Found(file, architecture, checkpoint, arguments, config, dilations)


def _check_name(file: Path, name: str, checkpoint: Checkpoint | None) -> None:
    """Hold a file with the name of a published one to that: of other models the shapes may be the same."""
    published = next((each for each in checkpoints().values() if _is_of(file, each)), None)
    if published is None:
        return
    if published is not checkpoint:
        raise ValueError(
            f"{file} has the name of the published {published.name}, not of {name}: rename the file if it is not that"
        )
    if published.sha256 and not (digest := file_sha256(file)).startswith(published.sha256):
        raise ConversionError(
            f"{file} has the name of {published.name}, but is not it: its sha256 is {digest}, that of the published "
            f"file is {published.sha256}"
        )


def _in_folder(folder: Path) -> tuple[Path, str | None, dict[str, Any] | None, list[int] | None]:
    """File, model name and timm configuration of a folder; a folder of transformers has neither of the latter, but
    tells dilations."""
    config = folder / "config.json"
    with contextlib.suppress(ValueError):
        content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if isinstance(content, dict) and "architecture" not in content and "model_type" in content:
            for name in loading.WEIGHT_FILES:
                if (folder / name).is_file():
                    dilations = content.get("dilations") or []
                    if content["model_type"] == "nat":
                        dilations = [[1] * depth for depth in content.get("depths") or []]
                    return folder / name, None, None, [each for level in dilations for each in level] or None
            raise OSError(f"{folder} has no weights: none of {', '.join(loading.WEIGHT_FILES)}")
    if read_dense_config(folder) is not None:
        raise ValueError(f"{folder} holds a detector or segmenter of this package already: foveal.load reads it")
    found = loading.resolve(folder)
    # a converted folder still tells which checkpoint it is of
    checkpoint = (found.config.get(RECORD) or {}).get("checkpoint")
    return loading.weights_file(found), checkpoint or found.architecture, found.config, None


def _is_of(file: Path, checkpoint: Checkpoint) -> bool:
    """Whether a file has the name of a published one."""
    address = checkpoint.file or (checkpoint.address or "").removeprefix("hf://")
    return Path(urlparse(address).path).name == file.name


def _tensors(checkpoint: dict[str, Any], file: Path, ema: bool | None) -> tuple[dict[str, torch.Tensor], bool | None]:
    """The tensors of a checkpoint, and whether they are averaged; None where it holds one kind and does not say."""
    other = checkpoint.get("ema_state_dict")
    if isinstance(other, dict) and isinstance(checkpoint.get("state_dict"), dict):
        # mmengine changes the two about when it saves: state_dict is of the averaged ones (EMAHook)
        raw = {name.removeprefix("module."): value for name, value in other.items() if name.startswith("module.")}
        checkpoint = {"state_dict": raw, "state_dict_ema": checkpoint["state_dict"]}
    state, averaged = loading.pick_weights(checkpoint, file, ema)
    said = averaged or any(key in checkpoint for key in ("state_dict_ema", "model_ema"))
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if strange := [
        name
        for name, value in tensors.items()
        if value.is_quantized or value.is_complex() or value.layout is not torch.strided
    ]:
        raise ConversionError(f"{file} holds quantised, complex or sparse numbers: {listed(strange)}")
    return tensors, averaged if said else None


# ---- what the names tell


def key_format(state: Mapping[str, Any], architecture: str) -> str:
    """The format of the names of a state dict, one of `FORMATS`."""
    names = [_bare(name) for name in state]
    if any("patch_embeddings.projection" in name for name in names):
        return "transformers"
    if any(name.startswith(("backbone.bottom_up.", "sem_seg_head.", "roi_heads.", "criterion.")) for name in names):
        return "detectron2"
    if any(name.startswith("backbone.") for name in names):
        return "mmdet"
    published = [each.keys for each in checkpoints().values() if each.model == architecture and each.task == "classify"]
    if published:
        return published[0]
    return "foveal" if architecture in list_models() else "timm"


def _bare(name: str) -> str:
    return name.removeprefix("module.").removeprefix("model.")


def _has_level_norms(state: Mapping[str, Any]) -> bool:
    starts = ("extra_norm.", "hidden_states_norms.", *(f"norm{i}." for i in range(4)))
    return any(_bare(name).startswith(starts) for name in state)


def _told_by(state: Mapping[str, torch.Tensor], found: _Found, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model, with those that the file tells."""
    with torch.device("meta"):
        shaped = {key: value for key, value in arguments.items() if key not in ("features_only", "out_indices")}
        plain = _create(found.architecture, shaped)
    known = inspect.signature(type(plain).__init__).parameters
    if arguments.get("features_only"):
        names = dict.fromkeys(dense.body(map(_bare, state)).values() or state)
        if "out_norm" in known and _has_level_norms(unwrap(names)):
            arguments.setdefault("out_norm", True)
        return arguments
    folded = any(name.endswith(".lk_origin.bias") for name in state)
    if "aux_head" in known and not folded and any(_bare(name).startswith("aux_head.") for name in state):
        arguments.setdefault("aux_head", True)
    if "num_classes" not in arguments:
        classes = _classes(state, plain)
        expected = found.checkpoint.classes if found.checkpoint else classes
        if classes != expected and classes is not None:
            raise ConversionError(
                f"{found.file} has {classes} classes, {found.checkpoint.name} has {expected}: it is not that checkpoint"
            )
        if classes is not None and classes != plain.num_classes:
            arguments["num_classes"] = classes
    return arguments


def _classes(state: Mapping[str, torch.Tensor], model: nn.Module) -> int | None:
    """The number of classes in a file, None if it has no classifier."""
    meta = {name: value.to("meta") for name, value in state.items()}
    with contextlib.suppress(ValueError):  # that it does not fit is said later, of the right model
        meta = _filter(model.pretrained_cfg["architecture"])(clean_state_dict(meta), model)
    classifiers = model.pretrained_cfg["classifier"]
    for classifier in [classifiers] if isinstance(classifiers, str) else classifiers:
        weight = meta.get(f"{classifier}.weight")
        if weight is not None:
            return weight.shape[0]
    return None


# ---- fitting


@dataclass(frozen=True)
class _Made:
    """A model with the weights of a file, not yet written."""

    model: nn.Module  # whose parameters they are
    answers: nn.Module  # what a fingerprint is taken of
    state: dict[str, torch.Tensor]
    arguments: dict[str, Any]
    words: str
    write: Callable[[Path], None]  # config.json and model.safetensors
    dropped: list[str] = field(default_factory=list)  # tensors of the file


class _NotWhole(ValueError):
    """A dense model that this package does not have."""


def _single(state: dict[str, torch.Tensor], found: _Found, arguments: dict[str, Any], features: bool) -> _Made:
    """A classifier or a backbone."""
    statistics = {}
    if features:
        arguments["features_only"] = True
        statistics = {key: arguments.pop(key) for key in ("mean", "std") if key in arguments}
    arguments = _told_by(state, found, arguments)
    net = _create(found.architecture, arguments).eval()
    inner = _inner(net)
    if found.dilations is not None:
        own = [m.dilation for m in inner.modules() if hasattr(m, "rpb") and hasattr(m, "dilation")]
        if own != found.dilations:
            raise ConversionError(
                f"{found.file.with_name('config.json')} has the dilations {found.dilations}, {found.architecture} has "
                f"{own}: it is of another model, or say --set dilations=..."
            )
    result, _ = _fitted(state, inner, _of_family(inner, found.architecture), found)
    _load(inner, result, found)
    config = _config(net, found, arguments)
    if statistics:
        config["pretrained_cfg"] |= statistics

    def write(folder: Path) -> None:
        save_file({name: value.detach().contiguous() for name, value in inner.state_dict().items()}, folder / WEIGHTS)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    words = f"{found.architecture}, a backbone" if features else f"{found.architecture}, a classifier"
    return _Made(inner, net, result, arguments, words, write)


def _whole(state: dict[str, torch.Tensor], content: dict[str, Any], found: _Found, told: dense.Told) -> _Made:
    """A detector or segmenter.

    Raises:
        _NotWhole: if this package has none like it.
        ConversionError: if it has, and something does not fit.
    """
    bare = {_bare(name): value for name, value in state.items()}
    try:
        plan = dense.plan(bare, told.task)
    except ValueError as error:
        raise _NotWhole(str(error)) from error
    if told.task not in (None, plan.task) and (told.task, plan.task) != ("panoptic", "segment"):
        raise ConversionError(f"{found.file} is of a model to {plan.task}, not to {told.task}")
    known, arguments = found.checkpoint, dict(told.arguments)
    if known is not None:
        try:
            dense.check_tag(plan, known)
        except ValueError as error:
            raise ConversionError(f"{found.file}: {error}") from error
    if plan.task == "detect" and known is not None and known.input is not None:
        _, short_side, most = known.input
        arguments = {"min_size": short_side, "max_size": most, **arguments}
    net = dense.build(plan, found.architecture, arguments, known and known.mean, known and known.std)
    try:
        dense.check_anchors(bare, net)
    except ValueError as error:
        raise ConversionError(f"{found.file}: {error}") from error
    unread = lambda name: dense.may_be_unread(_bare(name))  # noqa: E731  where all that is known finds its place
    result, dropped = _fitted(state, net, _of_dense(net, found.architecture, told.bgr), found, unread)
    _load(net, result, found)
    count = plan.arguments["num_classes"]
    classes = dense.names_of_classes(content, count) or [f"class {i}" for i in range(count)]
    more = {}
    if plan.task == "detect" and known is not None and "_coco" in known.tag and count == len(_COCO):
        more["category_ids"] = list(_COCO)

    def write(folder: Path) -> None:
        save_dense(folder, net, classes, dense.preprocessing(net, known), **more)

    words = f"{plan.arguments['head']} on {found.architecture} with {plan.arguments['neck']}, {count} classes"
    if told.task == "panoptic":
        words += (
            "; made for panoptic segmentation, it gives the class of each pixel here and does not tell objects apart"
        )
    return _Made(net, dense.Raw(net), result, told.arguments, words, write, dropped)


def _load(net: nn.Module, state: Mapping[str, torch.Tensor], found: _Found) -> None:
    """Set everything in a model, strictly.

    Raises:
        ConversionError: for numbers that are not finite, or that the model cannot hold.
    """
    if broken := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ConversionError(f"{found.file} is damaged: {listed(broken)} not finite")
    net.load_state_dict(state)
    own = net.state_dict()
    changed = [
        f"{name} in {str(value.dtype).removeprefix('torch.')}"
        for name, value in state.items()
        if own[name].is_floating_point() > value.is_floating_point()
        or not torch.equal(own[name].double(), value.double())
    ]
    if changed:
        raise ConversionError(
            f"{found.file} holds numbers that the model, in float32, does not hold as they are: {listed(changed)}"
        )


def _create(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(architecture, **arguments)
    except TypeError as error:
        raise ValueError(f"{architecture} does not take these arguments: {error}") from error


def _inner(model: nn.Module) -> nn.Module:
    """The backbone itself, in a model that gives feature maps."""
    return model.model if type(model).__name__ == "FeatureGetterNet" else model


def _filter(architecture: str) -> Callable[[dict[str, Any], nn.Module], dict[str, Any]]:
    """The filter of a model's family; for others of timm, what is around the names is taken off."""
    module = sys.modules[model_entrypoint(architecture).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state, net: unwrap(dense.of_timm(state, net)))


_Translate = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


def _of_family(net: nn.Module, architecture: str) -> _Translate:
    """From a file's names to those of a classifier or backbone, by its family's filter."""

    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        places = dense.body(map(_bare, state))
        named = {places.get(_bare(name), name): value for name, value in state.items()}
        return _filter(architecture)(clean_state_dict(named), net)

    return translate


def _of_dense(net: nn.Module, architecture: str, bgr: bool) -> _Translate:
    """From a file's names to those of a detector or segmenter."""
    family = _filter(architecture)

    def translate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {_bare(name): value for name, value in state.items()}
        return dense.translated(bare, net, lambda own, network: family(clean_state_dict(dict(own)), network), bgr)

    return translate


def _trace(state: Mapping[str, torch.Tensor], translate: _Translate) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Where each element of the model's state comes from, by its place, from 1 on, among all elements of ``state`` in
    their order, or 0 if it is made up; and the place at which each tensor of ``state`` begins. Tensors that a filter
    takes from elsewhere are left out.

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
    elsewhere = lambda value: (value.long() * _ODD % 2**31).int()  # noqa: E731
    result = translate(places)
    again = translate({name: elsewhere(value) for name, value in places.items()})
    for name, value in result.items():
        if value.dtype == torch.int32 and not torch.equal(elsewhere(value), again[name]):
            raise ValueError(f"{name} would be computed from the file's numbers (resampled), not taken from it")
    return {name: value for name, value in result.items() if value.dtype == torch.int32}, starts


def _fitted(
    state: dict[str, torch.Tensor],
    net: nn.Module,
    translate: _Translate,
    found: _Found,
    unread: Callable[[str], bool] = lambda name: False,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state of the model, made of all of ``state`` and nothing else; and which tensors of ``state`` are left out of
    it, as ``unread`` allows."""
    for name, value in state.items():
        side = math.isqrt(len(value)) if name.endswith(_INDEX) else 0
        if side and not torch.equal(value, _relative_position_index(side)):
            raise ConversionError(f"{found.file}: {name} orders the position bias in another way than this model")
    try:
        origins, starts = _trace(state, translate)
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"{found.file} does not fit {found.architecture}: {error}") from error
    used = torch.zeros(1 + sum(value.numel() for value in state.values()), dtype=torch.bool)
    own = net.state_dict()
    for name, origin in origins.items():
        if name in own:
            used[origin.flatten().long()] = True
    unused = [
        name
        for name, start in starts.items()
        if not name.endswith(_INDEX) and not used[start : start + state[name].numel()].all()
    ]
    dropped = [name for name in unused if unread(name)]
    unused = [name for name in unused if not unread(name)]
    unset = [name for name in own if name not in origins]
    shapes = [
        f"{name} {tuple(origin.shape)} for {tuple(own[name].shape)}"
        for name, origin in origins.items()
        if name in own and origin.shape != own[name].shape
    ]
    if unused or unset or shapes:
        parts = [
            *([f"of the file not used: {listed(unused)}"] if unused else []),
            *([f"of the model not set: {listed(unset)}"] if unset else []),
            *([f"of another shape: {listed(shapes)}"] if shapes else []),
        ]
        raise ConversionError(f"{found.file} does not fit {found.architecture}; {'; '.join(parts)}")
    return translate(state), dropped


def _relative_position_index(side: int) -> torch.Tensor:
    """The row of the position bias table, flattened, for each pair of tokens of a square map, ``[side^2, side^2]``: the
    offset of the key from the query, counted from ``1 - side``."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    rows, columns = y[None] - y[:, None] + side - 1, x[None] - x[:, None] + side - 1
    return rows * (2 * side - 1) + columns


# ---- the folder


def _complete(folder: Path, record: dict[str, Any], spec: dict[str, Any]) -> None:
    """Add to a written folder where it comes from and a card; read it again and compare."""
    weights, file = folder / WEIGHTS, folder / "config.json"
    save_file(load_file(weights), weights, metadata={"format": "pt", _SOURCE: json.dumps(spec)})
    record["model_sha256"] = file_sha256(weights)
    config = json.loads(file.read_text(encoding="utf-8")) | {RECORD: record}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = tuple(record["fingerprint"]["input"][1:])
    apart = difference(fingerprint(answering(folder), size), record["fingerprint"])
    if not apart <= TOLERANCE:  # also true of NaN
        raise ConversionError(
            f"the outputs of the converted model differ by {apart:.1e} of the largest value, more than "
            f"{TOLERANCE:g}; nothing was written"
        )
    (folder / "README.md").write_text(converted_card(config), encoding="utf-8")


def answering(folder: Path) -> nn.Module:
    """The model of a folder that `convert` wrote, as its fingerprint is taken."""
    return loading.load(folder) if read_dense_config(folder) is None else dense.Raw(load_dense(folder))


def _config(net: nn.Module, found: _Found, arguments: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` that timm reads back."""
    stated = {key: value for key, value in arguments.items() if key != "num_classes"}
    stated = {"model_args": stated} if stated else {}
    if found.config is not None:
        kept = {key: value for key, value in found.config.items() if key not in (RECORD, "model_args")}
        return {**kept, **stated}
    # that of a model that gives feature maps lacks the classifier, which timm needs to load it
    cfg = {**get_pretrained_cfg(found.architecture).to_dict(), **net.pretrained_cfg, "architecture": found.architecture}
    if found.checkpoint is not None:
        cfg |= {"tag": found.checkpoint.tag, "license": found.checkpoint.weights_licence}
        cfg |= {"origin_url": found.checkpoint.code, **found.checkpoint.preprocessing()}
    else:
        cfg |= {"tag": None, "license": None}  # whose those are is not known
    if not arguments.get("features_only"):
        cfg["num_classes"] = net.num_classes
    cfg["input_size"] = (arguments.get("in_chans", 3), *cfg["input_size"][1:])
    features = net.feature_info.channels()[-1] if arguments.get("features_only") else net.num_features
    config = published_config(cfg, cfg["num_classes"], features)
    return {**config, **stated}


def _fingerprint_size(found: _Found, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """The input size of the model's name, if it takes others: a dense checkpoint's own would take minutes."""
    size = arguments.get("img_size", get_pretrained_cfg(found.architecture).input_size[1:])
    rows, columns = (size, size) if isinstance(size, int) else size
    return (arguments.get("in_chans", 3), rows, columns)
