"""Convert a checkpoint to a model folder: every tensor is used, every parameter is set, and outputs are compared."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
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
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import clean_state_dict, get_pretrained_cfg, is_model
from torch import Tensor, nn

from .._version import __version__
from ..backbones import family, list_models, loading
from ..backbones.base import scored_raw, unwrap
from ..backbones.download import file_sha256
from ..backbones.loading import WEIGHTS
from ..files import write_json
from ..heads.build import build_dense
from ..heads.checkpoint import load_dense, read_dense_config, save_dense
from ..heads.legacy import migrate_state_dict
from ..heads.registry import head_spec
from ..heads.upsamplers import PUBLISHED, create_upsampler
from . import dense, names
from .cards import SEMANTIC_ONLY, converted_card, listed, record_lines
from .fingerprint import RawOutputs, difference, fingerprint
from .folder import RECORD, TOLERANCE, check_output, published_config, read_folder, staged
from .manifest import Checkpoint, checkpoints
from .names import bare

_SOURCE = "source"  # field of the safetensors header: names, dtypes and shapes of the source file
_COCO = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # the ids of its 80 categories
_DETR = {"activation_function": "relu", "position_embedding_type": "sine"}  # what transformers may change
_TIMMS = set(inspect.signature(timm.create_model).parameters) - {"model_name", "kwargs"}  # not arguments of a model


class ConversionError(ValueError):
    """File and model do not fit, or the outputs of the written model differ; nothing was written."""


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    folder: Path
    files: list[str]
    record: dict[str, Any]  # as in config.json
    model: str  # a description

    def lines(self) -> list[str]:
        """The same as text."""
        name = self.record["checkpoint"]
        note = checkpoints()[name].note if name else "not a known published file: licence and preprocessing are unknown"
        record = [line.replace("`", "") for line in record_lines(self.record)]
        return [f"{self.folder}: {', '.join(self.files)}", self.model, *record, *([note] if note else [])]


@dataclass(frozen=True)
class _Source:
    """The file to convert, and what is known of it."""

    file: Path
    architecture: str
    checkpoint: Checkpoint | None
    arguments: dict[str, Any]
    config: dict[str, Any] | None  # of a timm folder
    transformers: Mapping[str, Any] = field(default_factory=dict)  # config.json of a folder of transformers


@dataclass(frozen=True)
class ConvertedModel:
    """A model with the weights of a file, not yet written."""

    model: Any  # the module that holds the weights
    raw: nn.Module  # the module whose outputs the fingerprint records
    arguments: dict[str, Any]
    state: dict[str, Tensor]  # the tensors of the file that are used
    description: str
    write: Callable[[Path], None]  # config.json and model.safetensors
    heads: dict[str, int] = field(default_factory=dict)  # tensors left out, by the first part of their names
    dropped: list[str] = field(default_factory=list)  # tensors that no module uses
    bgr: bool = False


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
    """Convert a checkpoint to a model folder: ``config.json``, ``model.safetensors`` and a card, README.md.

    Supported parameter names are those of the authors, timm, transformers, mmdetection, mmsegmentation and detectron2.

    A whole detector or segmenter is converted if this package has its heads with the same outputs: Faster and Mask
    R-CNN on an FPN or A3-FPN (mmdetection, detectron2), Cascade Mask R-CNN (mmdetection), RetinaNet on A3-FPN or on
    mmdetection's FPN, UPerNet (also with A3-FPN), mmsegmentation's semantic FPN, Mask2Former (the authors', on
    detectron2), Conditional DETR (the authors', transformers). Others raise; ``backbone`` converts their backbone.

    Args:
        source: a ``.pth``, ``.pth.tar``, ``.bin`` or ``.safetensors`` file; a folder of transformers, timm or a
            training run of this package; or a name in the manifest (``dinat_mini.in1k``), which is downloaded. An
            upsampler's is also ``"naf"``, ``"uplift_dinov2_s14"`` or ``"uplift_dinov3_splus16"``; so is ``model``.
        model: the model's name (a dense model's backbone), preferably with the tag of the manifest, which states
            licence and preprocessing. Required unless ``source`` names it.
        ema: take averaged weights (True) or raw ones (False); None: those of the published score, averaged ones if
            nothing is known and there are any.
        backbone: convert only the backbone of a detector or segmenter, as a model that returns feature maps.
        arguments: model arguments that the file does not show: ``dilations``, ``in_chans`` ... For detectron2, unless
            the manifest has them, also ``stride_in_1x1`` of a ResNet, ``channel_order`` of the images (``"bgr"`` or
            ``"rgb"``; the converted model takes RGB), their ``mean`` and ``std`` (RGB, in [0, 1]), and for Mask2Former
            ``task``, ``"segment"`` or ``"detect"``. For a Conditional DETR of its authors, ``output_stride``.
        force: write into a folder that is not empty, replacing files of the same names and no others.

    Raises:
        ValueError: an invalid source, model or output, or a file that is damaged, contains code, or does not fit the
            model; the message lists unused and missing tensors.
        OSError: a file cannot be downloaded, read or written.

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
    raw = scored_raw(found.architecture) if found.checkpoint is None else found.checkpoint.averaged is False
    state, averaged = _tensors(content, found.file, (False if raw else None) if ema is None else ema)
    try:
        converted = _converted(state, content, found, {**found.arguments, **(arguments or {})}, backbone)
        with staged(output) as folder:
            converted.write(folder)
            keys = "authors"
            if not is_upsampler(found.checkpoint):
                keys = names.key_format(state, found.architecture, converted.model.state_dict())
            record = _complete(folder, converted, found, keys, averaged)
            files = sorted(path.name for path in folder.iterdir())
    except ValueError as error:
        raise ConversionError(f"{found.file} as {found.architecture}: {error}") from error
    return Conversion(output, files, record, converted.description)


def restore(folder: str | Path) -> dict[str, Tensor]:
    """The original tensors of a folder that `convert` wrote, bit for bit, without those that were left out.

    Raises:
        ValueError: `convert` did not write the folder.

    Examples:
        >>> import timm, torch
        >>> torch.save(timm.create_model("test_foveal_dinat", num_classes=3).state_dict(), "weights.pth")
        >>> from foveal.weights.convert import convert, restore
        >>> _ = convert("weights.pth", "folder", model="test_foveal_dinat")
        >>> original = torch.load("weights.pth", weights_only=True)
        >>> all(torch.equal(value, original[name]) for name, value in restore("folder").items())
        True
    """
    found = read_folder(folder)
    with safe_open(found.weights, framework="pt") as stream:
        header = (stream.metadata() or {}).get(_SOURCE)
    if header is None:
        raise ValueError(f"{found.weights} has no record of its source; it was not written by `foveal convert`")
    with torch.device("meta"):
        if found.dense:
            arguments = found.config["arguments"]
            net = build_dense(found.config["task"], arguments)
            bgr, dense_model = (found.record or {}).get("bgr", False), found.config["task"] != "upsample"
            translate = names.of_dense(net, arguments["name"], bgr) if dense_model else names.of_upsampler
        else:
            architecture, arguments = found.config["architecture"], dict(found.config.get("model_args") or {})
            if not arguments.get("features_only"):
                arguments.setdefault("num_classes", found.config["num_classes"])
            translate = names.of_family(names.without_getter(_create(architecture, arguments)), architecture)
    return names.restored(json.loads(header), migrate_state_dict(load_file(found.weights)), translate)


# ---- the source


def _locate(source: str | Path, model: str | None) -> _Source:
    """Find the file, the model and its entry in the manifest."""
    short = {name: each.checkpoint for name, each in PUBLISHED.items()}
    model = short.get(model or "", model)
    if not loading.local_path(source).exists():
        source = short.get(str(source), source)
    path, known = loading.local_path(source), checkpoints()
    config = stated = None
    theirs: dict[str, Any] = {}
    if path.is_file():
        file = path
    elif path.is_dir():
        file, stated, config, theirs = _in_folder(path)
        if stated is None and model is None:
            kind = theirs["model_type"]
            near = ", ".join(_family_of(kind)) or "none of this type"
            raise ValueError(f"{path / 'config.json'}, of type {kind}, describes no known model; pass --model: {near}")
    elif str(source) in known:
        file, stated = known[str(source)].fetch(), str(source)
    else:
        near = ", ".join(sorted(each.name for each in known.values() if each.model == str(source).partition(".")[0]))
        hint = f"published for that model: {near}" if near else "`foveal info MODEL` lists them"
        raise ValueError(f"{str(source)!r} is no file, folder or name of a published checkpoint; {hint}")
    name = stated if model is None else model
    if name is None:
        fitting = [each.name for each in known.values() if _is_file_of(file, each)]
        if not fitting:
            near = ", ".join(names.closest(_tensors(loading.read_checkpoint(file), file, None)[0]))
            hint = f"closest: {near}" if near else "no model here has most of its tensors"
            raise ValueError(f"{file} does not name its model: pass --model; {hint}")
        name = _only(file, fitting)
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        raise loading.unknown_model(architecture)
    if stated is not None and (other := stated.partition(".")[0]) != architecture:
        if other in list_models():
            raise ValueError(f"{path} names the model {other}, not {architecture}")
        config = None  # of timm's own network, whose weights a model here loads
    own = {each.name: each for each in known.values() if each.model == architecture}
    if tag and name not in own and config is None:
        raise ValueError(f"{name} is not in the manifest; known for {architecture}: {', '.join(own) or 'none'}")
    published = next((each for each in known.values() if _is_file_of(file, each)), None)
    checkpoint = own.get(name) if tag else published if published in own.values() else None
    if path.is_file() and published is not None:
        _check_file(file, name, published, checkpoint)
    arguments = {**(checkpoint.arguments if checkpoint else {}), **((config or {}).get("model_args") or {})}
    if theirs.get("model_type") == "conditional_detr":
        arguments |= _of_detr(theirs)
    return _Source(file, architecture, checkpoint, arguments, config, theirs)


def _check_file(file: Path, name: str, published: Checkpoint, checkpoint: Checkpoint | None) -> None:
    """A file named as a published one must be that one: files of other models may have the same shapes."""
    if published is not checkpoint:
        raise ValueError(f"{file} has the name of the published {published.name}, not of {name}: rename other files")
    if published.sha256 and not (digest := file_sha256(file)).startswith(published.sha256):
        raise ConversionError(f"sha256 of {file} is {digest}, published for {published.name}: {published.sha256}")


def _in_folder(folder: Path) -> tuple[Path, str | None, dict[str, Any] | None, dict[str, Any]]:
    """The weights file, the model's name, and the config.json of timm's, or of transformers."""
    config, content = folder / "config.json", None
    with contextlib.suppress(ValueError):
        content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    if isinstance(content, dict) and "architecture" not in content and "model_type" in content:
        file = next((folder / name for name in loading.WEIGHT_FILES if (folder / name).is_file()), None)
        if file is None:
            raise OSError(f"{folder} has no weights: none of {', '.join(loading.WEIGHT_FILES)}")
        return file, _of_transformers(content, config), None, content
    found = read_folder(folder)
    if found.dense:
        raise ValueError(f"{folder} is already a detector or segmenter of this package: use foveal.load")
    # a converted folder keeps the name of its checkpoint
    return found.weights, (found.record or {}).get("checkpoint") or found.config["architecture"], found.config, {}


def _only(file: Path, candidates: list[str]) -> str:
    if len(candidates) != 1:
        raise ValueError(f"{file} does not name its model: pass --model; it fits {', '.join(candidates)}")
    return candidates[0]


def _of_transformers(content: Mapping[str, Any], config: Path) -> str | None:
    """The model that a config.json of transformers describes; None if it describes none of these.

    Raises:
        ValueError: it describes several; the message has them.
    """
    if content["model_type"] == "conditional_detr":  # on a backbone of timm
        inner = content.get("backbone_config") or {}
        name = inner.get("backbone") if inner.get("model_type") == "timm_backbone" else content.get("backbone")
        return name if name is not None and is_model(name) else None
    found = []
    for name in _family_of(content["model_type"]):
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        theirs = _for_transformers(model, content["model_type"])
        found += [name] * all(content.get(key) == value for key, value in theirs.items())
    return _only(config, found) if found else None


def _of_detr(content: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that transformers' config.json of a Conditional DETR states and its tensors do not show.

    Raises:
        ValueError: a network that is not supported.
    """
    inner = content.get("backbone_config") or {}
    stated = {key: content.get(key, 8) for key in ("encoder_attention_heads", "decoder_attention_heads")}
    other = {key: content.get(key, value) for key, value in _DETR.items() if content.get(key, value) != value}
    if other or len(set(stated.values())) > 1:
        raise ValueError(f"a Conditional DETR with {other | stated}; supported are {_DETR} and equal numbers of heads")
    built = content.get("backbone_kwargs") or {}
    stride = inner.get("output_stride") or built.get("output_stride") or (16 if content.get("dilation") else 32)
    return {"output_stride": stride, "head_kwargs": {"num_heads": stated["encoder_attention_heads"]}}


def _family_of(model_type: str) -> list[str]:
    """The models that transformers' config.json may describe."""
    of = {"nat": "NAT", "dinat": "DiNAT", "van": "VAN"}.get(model_type)
    return [name for name in list_models() if family(name) == of and not name.startswith("test_")]


def _for_transformers(model: Any, model_type: str) -> dict[str, Any]:
    """The keys of transformers' config.json that identify a model within its family."""
    if model_type == "van":
        widths = [info["num_chs"] for info in model.feature_info]
        return {"depths": [len(stage.blocks) for stage in model.stages], "hidden_sizes": widths}
    attention = [[block.attn for block in level.blocks] for level in model.levels]
    first = attention[0][0]
    theirs = {
        "depths": [len(level) for level in attention],
        "embed_dim": first.num_heads * first.head_dim,
        "kernel_size": first.kernel_size[0],
    }
    if model_type == "dinat":
        theirs["dilations"] = [[each.dilation for each in level] for level in attention]
    return theirs


def _is_file_of(file: Path, checkpoint: Checkpoint) -> bool:
    address = checkpoint.file or (checkpoint.address or "").removeprefix("hf://")
    return Path(urlparse(address).path).name == file.name


def _tensors(content: dict[str, Any], file: Path, ema: bool | None) -> tuple[dict[str, Tensor], bool | None]:
    """The tensors of a checkpoint, and whether they are averaged; None if unknown."""
    other = content.get("ema_state_dict")
    if isinstance(other, dict) and isinstance(content.get("state_dict"), dict):
        # mmengine's EMAHook swaps the two when it saves: state_dict has the averaged weights
        raw = {name.removeprefix("module."): value for name, value in other.items() if name.startswith("module.")}
        content = {"state_dict": raw, "state_dict_ema": content["state_dict"]}
    state, averaged = loading.pick_weights(content, file, ema)
    both = averaged or any(key in content for key in ("state_dict_ema", "model_ema"))
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    plain = {n for n, x in tensors.items() if not (x.is_quantized or x.is_complex() or x.layout is not torch.strided)}
    if other := [name for name in tensors if name not in plain]:
        raise ConversionError(f"{file} has quantized, complex or sparse tensors: {listed(other)}")
    return tensors, averaged if both else None


# ---- the model


def _converted(
    state: dict[str, Tensor], content: dict[str, Any], source: _Source, arguments: dict[str, Any], backbone: bool
) -> ConvertedModel:
    """A classifier, a dense model, the backbone of one, or an upsampler."""
    if is_upsampler(source.checkpoint):
        return _upsampler(state, arguments)
    plain = {bare(name): value for name, value in state.items()}
    inside = names.backbone_names(plain)
    body = {name: value for name, value in state.items() if bare(name) in inside}
    heads = Counter(bare(name).removeprefix(names.BACKBONE).partition(".")[0] for name in state if name not in body)
    is_dense = names.has_level_norms(state) or (bool(body) and not names.of_mmpretrain(plain))
    if backbone and not is_dense:
        raise ValueError("not a detector or segmenter: leave out --backbone")
    classifier = not (is_dense or arguments.get("features_only"))
    refused = _TIMMS | ({"task", "num_classes"} if backbone else set()) | ({"out_indices"} if classifier else set())
    if wrong := sorted(refused & arguments.keys()):
        kind = "backbone" if backbone else "classifier" if classifier else "detector or segmenter"
        raise ValueError(f"{', '.join(wrong)}: not an argument of a {kind}")
    if not is_dense:
        return _single(state, source, arguments)
    metadata = dense.source_metadata(plain, arguments, source.checkpoint)
    if backbone:
        arguments = {**metadata.for_timm(), "features_only": True}
        return _single(body or state, source, arguments, dict(heads) if body else {})
    try:
        config = dense.head_config(plain, metadata.task)
    except ValueError as error:
        counts = ", ".join(f"{count} {group}" for group, count in heads.items())
        raise ValueError(
            f"a dense model of {len(state)} tensors: {len(body or state)} of the backbone"
            f"{f', heads: {counts}' if body and heads else ''}. The whole model is not supported: {error}. --backbone "
            "converts the backbone"
        ) from error
    return _dense(state, content, source, metadata, config)


def _single(
    state: dict[str, Tensor], source: _Source, arguments: dict[str, Any], heads: dict[str, int] | None = None
) -> ConvertedModel:
    """A classifier or a backbone."""
    features = bool(arguments.get("features_only"))
    statistics = {key: arguments.pop(key) for key in ("mean", "std") if features and key in arguments}
    arguments = _inferred(state, source, arguments)
    net = _create(source.architecture, arguments).eval()
    inner = names.without_getter(net)
    own = [m.dilation for m in inner.modules() if hasattr(m, "rpb") and hasattr(m, "dilation")]
    dilations = source.transformers.get("dilations") or []
    if source.transformers.get("model_type") == "nat":
        dilations = [[1] * depth for depth in source.transformers.get("depths") or []]
    stated = [each for level in dilations for each in level]
    if stated and stated != own:
        raise ValueError(
            f"config.json has the dilations {stated}, {source.architecture} has {own}: choose another model, "
            "or --set dilations=..."
        )
    translate = names.of_family(inner, source.architecture)
    result, dropped = names.fitted(state, inner, translate, names.unused_by_classifiers)
    _load(inner, result)
    config = _config(net, source, arguments)
    if statistics:
        config["pretrained_cfg"] |= statistics

    def write(folder: Path) -> None:
        save_file({name: value.detach().contiguous() for name, value in inner.state_dict().items()}, folder / WEIGHTS)
        write_json(folder / "config.json", config)

    description = f"{source.architecture}, a {'backbone' if features else 'classifier'}"
    used = {name: value for name, value in state.items() if name not in dropped}
    return ConvertedModel(inner, net, arguments, used, description, write, heads or {}, dropped)


def is_upsampler(checkpoint: Checkpoint | None) -> bool:
    return checkpoint is not None and checkpoint.task == "upsample"


def _upsampler(state: dict[str, Tensor], arguments: dict[str, Any]) -> ConvertedModel:
    net: Any = create_upsampler(**arguments).eval()
    result, dropped = names.fitted(state, net, names.of_upsampler, lambda name: name.endswith(".rope.periods"))
    _load(net, result)

    def write(folder: Path) -> None:
        save_dense(folder, net, [], {"in_chans": 3, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD})

    used = {name: value for name, value in state.items() if name not in dropped}
    return ConvertedModel(net, RawOutputs(net), arguments, used, f"upsampler {net.kind}", write, dropped=dropped)


def _dense(
    state: dict[str, Tensor],
    content: dict[str, Any],
    source: _Source,
    metadata: dense.SourceMetadata,
    config: dense.HeadConfig,
) -> ConvertedModel:
    """A detector or segmenter."""
    if metadata.task not in (None, config.task) and (metadata.task, config.task) != ("panoptic", "segment"):
        raise ValueError(f"the task of this model is {config.task}, not {metadata.task}")
    known, arguments = source.checkpoint, dict(metadata.arguments)
    if known is not None:
        config.check_tag(known)
        if config.task == "detect" and known.input is not None:
            arguments = {"min_size": known.input[1], "max_size": known.input[2], **arguments}
    net: Any = config.build(source.architecture, arguments, known and known.mean, known and known.std)
    dense.check_anchors({bare(name): value for name, value in state.items()}, net)
    translate = names.of_dense(net, source.architecture, metadata.bgr)
    result, dropped = names.fitted(state, net, translate, names.may_be_unused)
    _load(net, result)
    classes = dense.class_names(content, config.arguments["num_classes"], source.transformers.get("id2label"))
    coco = config.task == "detect" and known is not None and "_coco" in known.tag
    more = {"category_ids": list(_COCO)} if coco and len(classes) == len(_COCO) else {}
    if config.arguments["head"] == "conditional_detr":  # its classes are numbered by category id
        more = {"category_ids": list(range(len(classes)))}
        if coco and not source.transformers:
            classes = dense.COCO_BY_ID

    def write(folder: Path) -> None:
        save_dense(folder, net, classes, dense.preprocessing(net, known), **more)

    head, neck = config.arguments["head"], config.arguments["neck"]
    with_neck = f" with {neck}" * (head_spec(config.task, head).neck != "none")
    description = f"{head} on {source.architecture}{with_neck}, {len(classes)} classes"
    if metadata.task == "panoptic":
        description += f"; of a panoptic model: {SEMANTIC_ONLY}"
    used = {name: value for name, value in state.items() if name not in dropped}
    raw = RawOutputs(net)
    return ConvertedModel(net, raw, metadata.arguments, used, description, write, dropped=dropped, bgr=metadata.bgr)


def _inferred(state: Mapping[str, Tensor], source: _Source, arguments: dict[str, Any]) -> dict[str, Any]:
    """The model's arguments, completed by what the file shows."""
    with torch.device("meta"):
        shaped = {key: value for key, value in arguments.items() if key not in ("features_only", "out_indices")}
        plain = _create(source.architecture, shaped)
    known = inspect.signature(type(plain).__init__).parameters
    if arguments.get("features_only"):
        own = dict.fromkeys(names.backbone_names(map(bare, state)).values() or state)
        if "out_norm" in known and names.has_level_norms(unwrap(own)):
            arguments.setdefault("out_norm", True)
        return arguments
    folded = any(name.endswith(".lk_origin.bias") for name in state)
    aux = {bare(name): value for name, value in state.items() if bare(name).startswith("aux_head.")}
    if "aux_head" in known and not folded and aux:
        on = {plain.num_features: "features", plain.head_hidden_size: "projected"}  # of RMT, a Linear
        weight = aux.get("aux_head.weight")
        arguments.setdefault("aux_head", True if weight is None else on.get(weight.shape[-1]))
    if "num_classes" not in arguments and (classes := _classes(state, plain)) is not None:
        if source.checkpoint is not None and classes != source.checkpoint.classes:
            raise ValueError(f"it has {classes} classes, {source.checkpoint.name} has {source.checkpoint.classes}")
        if classes != plain.num_classes:
            arguments["num_classes"] = classes
    return arguments


def _classes(state: Mapping[str, Tensor], model: Any) -> int | None:
    """The number of classes in a file, None if it has no classifier."""
    meta = {name: value.to("meta") for name, value in state.items()}
    with contextlib.suppress(ValueError):  # a file that does not fit is reported later, for the final model
        meta = names.family_filter(model.pretrained_cfg["architecture"])(clean_state_dict(meta), model)
    classifiers = model.pretrained_cfg["classifier"]
    classifiers = [classifiers] if isinstance(classifiers, str) else classifiers
    weights = (meta.get(f"{classifier}.weight") for classifier in classifiers)
    return next((weight.shape[0] for weight in weights if weight is not None), None)


def _load(net: Any, state: Mapping[str, Tensor]) -> None:
    """Load strictly, and without rounding.

    Raises:
        ValueError: numbers that are not finite, or that the model's dtype does not represent.
    """
    if broken := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(f"damaged: {listed(broken)} not finite")
    net.load_state_dict(state)
    own = net.state_dict()
    changed = [
        f"{name} in {str(value.dtype).removeprefix('torch.')}"
        for name, value in state.items()
        if own[name].is_floating_point() > value.is_floating_point()
        or not torch.equal(own[name].double(), value.double())
    ]
    if changed:
        raise ValueError(f"cannot be represented in the model's float32: {listed(changed)}")


def _create(architecture: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return timm.create_model(architecture, **arguments)
    except TypeError as error:
        raise ValueError(f"invalid arguments for {architecture}: {error}") from error


# ---- the folder


def _complete(
    folder: Path, converted: ConvertedModel, source: _Source, keys: str, averaged: bool | None
) -> dict[str, Any]:
    """Add a card and the record, which is returned, to a written folder, if the model in it has the same outputs."""
    outputs = fingerprint(converted.raw, _fingerprint_size(source, converted.arguments))
    if not all(math.isfinite(each["norm"]) for each in outputs["outputs"]):
        raise ValueError("damaged or of another model: the outputs for the fixed image are not finite")
    weights = folder / WEIGHTS
    spec = {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in converted.state.items()}
    save_file(load_file(weights), weights, metadata={"format": "pt", _SOURCE: json.dumps(spec)})
    record = {
        "file": source.file.name,
        "sha256": file_sha256(source.file),
        "checkpoint": source.checkpoint.name if source.checkpoint else None,
        "keys": keys,
        "averaged": averaged,
        "heads": converted.heads,
        "dropped": converted.dropped,
        "bgr": converted.bgr,
        "tensors": len(converted.state),
        "parameters": sum(p.numel() for p in converted.model.parameters()),
        "fingerprint": outputs,
        "version": __version__,
        "model_sha256": file_sha256(weights),
    }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {RECORD: record}
    write_json(folder / "config.json", config)
    apart = difference(fingerprint(load_raw(folder), tuple(outputs["input"][1:])), outputs)
    if not apart <= TOLERANCE:  # also true of NaN
        raise ValueError(
            f"outputs of the written model differ by {apart:.1e} of the largest value, more than {TOLERANCE:g}; "
            "nothing was written"
        )
    (folder / "README.md").write_text(converted_card(config), encoding="utf-8")
    return record


def load_raw(folder: Path) -> Any:
    """The model in a folder that `convert` wrote, with the outputs that its fingerprint records."""
    return loading.load(folder) if read_dense_config(folder) is None else RawOutputs(load_dense(folder))


def _config(net: Any, source: _Source, arguments: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` that timm reads."""
    stated = {key: value for key, value in arguments.items() if key != "num_classes"}
    stated = {"model_args": stated} if stated else {}
    if source.config is not None:
        return {key: value for key, value in source.config.items() if key not in (RECORD, "model_args")} | stated
    # the cfg of a model that returns feature maps lacks the classifier, which timm needs to load it
    published: Any = get_pretrained_cfg(source.architecture)
    cfg = published.to_dict() | net.pretrained_cfg
    cfg |= {"architecture": source.architecture, "tag": None, "license": None}
    if source.checkpoint is not None:
        cfg |= {"tag": source.checkpoint.tag, "license": source.checkpoint.weights_licence}
        cfg |= {"origin_url": source.checkpoint.code, **source.checkpoint.preprocessing()}
    cfg["input_size"] = (arguments.get("in_chans", 3), *cfg["input_size"][1:])
    features = arguments.get("features_only")
    if not features:
        cfg["num_classes"] = net.num_classes
    width = net.feature_info.channels()[-1] if features else net.num_features
    return published_config(cfg, cfg["num_classes"], width) | stated


def _fingerprint_size(source: _Source, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """The input size of the classifier: the image size of a dense checkpoint would take minutes."""
    if is_upsampler(source.checkpoint):
        return 3, 144, 176
    cfg: Any = get_pretrained_cfg(source.architecture)
    size = arguments.get("img_size", cfg.input_size[1:])
    rows, columns = (size, size) if isinstance(size, int) else size
    return (arguments.get("in_chans", 3), rows, columns)
