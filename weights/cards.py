"""Model cards, README.md: of published files, of converted folders, and of exports, with code that runs them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml
from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg

from .._version import __version__
from ..backbones import download, list_models
from ..backbones.images import MODES
from ..backbones.profile import profile
from ..heads.detection import Detector
from ..heads.registry import head_spec
from .folder import CHECKPOINT, RECORD
from .formats import LEAST_SIZE, ExportSpec, output_names
from .images import metadata
from .manifest import Checkpoint, checkpoints

# Whose parameter names a file has.
KEY_FORMATS = {
    "authors": "the authors' models",
    "timm": "timm's models",
    "foveal": "this package's models",
    "transformers": "transformers",
    "mmdet": "mmdetection, mmsegmentation or mmpretrain",
    "detectron2": "detectron2",
}
# The heads that `foveal convert` supports: prefix of the tags of published files, and name of the builder.
DENSE_HEADS = {
    "maskrcnn": "mask_rcnn",
    "cascade": "cascade_mask_rcnn",
    "faster_rcnn": "faster_rcnn",
    "retinanet": "retinanet",
    "upernet": "upernet",
    "semantic_fpn": "semantic_fpn",
    "mask2former": "mask2former",
    "conditional_detr": "conditional_detr",
}
_UNKNOWN = "unknown: ask the author of the file"
SEMANTIC_ONLY = "the class of each pixel; objects of a class are not separated"
_MAX_CLASSES = 100  # class names listed in a card


# ---- published files


def facts(checkpoint: Checkpoint) -> dict[str, str]:
    """Facts of a published file: the manifest's entry, and the size and cost of the model."""
    classifier = checkpoint.task == "classify"
    counted = profile(checkpoint.name if classifier else checkpoint.model)
    crop = f"{checkpoint.interpolation}, crop {checkpoint.crop:g} ({checkpoint.crop_mode}), " if classifier else ""
    rows = {
        "model": f"`{checkpoint.model}`" + ("" if classifier else f", the backbone ({checkpoint.task})"),
        "parameters": f"{counted.parameters:,}" + ("" if classifier else " (backbone with its classifier)"),
        "GMACs": f"{counted.macs / 1e9:.2f} for one image of {_size(counted.input_size)}" if classifier else "",
        "classes": f"{checkpoint.classes:,}" if classifier and checkpoint.classes else "",
        "input": f"{_size(checkpoint.input)}, as published" if checkpoint.input else "",
        "preprocessing": f"{crop}mean {_text(checkpoint.mean)}, std {_text(checkpoint.std)}",
        "arguments of the backbone": ", ".join(f"{key}={value}" for key, value in checkpoint.arguments.items()),
        **_published(checkpoint),
        "address": checkpoint.address or f"{checkpoint.file}, manual download from {checkpoint.page}",
        "mirrors": ", ".join(checkpoint.mirrors),
        "sha256": _hash(checkpoint),
        "format": f"keys of {KEY_FORMATS[checkpoint.keys]}",
        "foveal convert": "" if classifier else _convertible(checkpoint),
    }
    return {name: value for name, value in rows.items() if value}


def published_card(checkpoint: Checkpoint) -> str:
    """The card of a published file, Markdown."""
    if checkpoint.task == "classify" and checkpoint.addresses:
        code = _python(f'timm.create_model("{checkpoint.name}", pretrained=True).eval()', "logits = model(images)")
    else:
        source = checkpoint.name if checkpoint.addresses else f"{checkpoint.file} --model {checkpoint.name}"
        code = f"```\nfoveal convert {source} --output FOLDER\n```"
    return _card(checkpoint.name, facts(checkpoint), code)


def head_of(checkpoint: Checkpoint) -> str | None:
    """The head that the tag of a published detector or segmenter names; None if this package does not have it."""
    tag = checkpoint.tag.removeprefix("a3fpn_")
    return next((head for start, head in DENSE_HEADS.items() if tag.startswith(f"{start}_")), None)


def _published(checkpoint: Checkpoint) -> dict[str, str]:
    """Rows for a published file and for models converted from it."""
    timms = "" if checkpoint.model in list_models() else f"{checkpoint.model} is timm's."
    return {
        "paper": _paper(checkpoint.model),
        "published score": checkpoint.score_text() or "none",
        "licence of the weights": checkpoint.weights_licence,
        "licence of the code": checkpoint.code_licence,
        "code of the authors": checkpoint.code,
        "converted from": checkpoint.original or "",
        "note": " ".join(filter(None, [checkpoint.note, checkpoint.about, timms])),
    }


def _convertible(checkpoint: Checkpoint) -> str:
    """How much of a dense model `convert` supports."""
    if checkpoint.task == "upsample":
        return "the upsampler"
    if head_of(checkpoint) is None:
        return "the backbone, with --backbone; this package does not have the heads"
    outputs = f"; its output is {SEMANTIC_ONLY}" if checkpoint.task == "panoptic" else ""
    backbone = "" if checkpoint.arguments.get("stride_in_1x1") else "; with --backbone its backbone"
    return f"the whole model{outputs}{backbone}"


def _hash(checkpoint: Checkpoint) -> str:
    if checkpoint.sha256:
        return checkpoint.sha256 + ("" if len(checkpoint.sha256) == 64 else " ... (its first digits, as published)")
    recorded = next(filter(None, map(download.recorded_sha256, checkpoint.addresses)), None)
    if recorded:
        return f"{recorded} (recorded at the first download)"
    return "none published; recorded at the first download and checked from then on"


# ---- converted folders


def converted_card(config: Mapping[str, Any], measured: str | None = None) -> str:
    """The README.md for a folder that `convert` wrote, from its ``config.json``.

    Args:
        measured: the score that `verify` measured, as text.
    """
    record, dense = config[RECORD], "pretrained_cfg" not in config
    checkpoint = checkpoints().get(record["checkpoint"])
    features = bool((config.get("model_args") or {}).get("features_only"))
    if dense:
        args = config["arguments"]
        architecture = args["name"]
        kind = f"{args.get('head')}, neck {args.get('neck')}, {len(config['classes'])} classes"
        build, images = 'foveal.load("PATH_OF_THIS_FOLDER")', "float [B, 3, H, W] in [0, 1]"
        use = f"logits = model(images)  # {images}"
        if config["task"] == "detect":
            use = "found = model([image])  # float [3, H, W] in [0, 1]"
        if config["task"] == "upsample":
            kind, images = "upsampler", "a normalized image [B, 3, H, W] and a backbone's map [B, C, h, w]"
            use = f"larger = model(image, features, (rows, columns))  # {images}"
    else:
        architecture = config["architecture"]
        kind = "backbone, returns feature maps" if features else f"{config['num_classes']:,} classes"
        build = 'timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()'
        use = "maps = model(images)  # a list" if features else "logits = model(images)"
    rows = {"model": f"`{architecture}`, {kind}, {record['parameters']:,} parameters"}
    if checkpoint is None:
        rows |= {"paper": _paper(architecture), "weights": f"from `{record['file']}`, not known to be a published file"}
        rows["licence of the weights"] = _licence(config)
    else:
        rows |= {"weights": f"`{checkpoint.name}`, {_address(checkpoint)}", **_published(checkpoint)}
        rows["published score"] += " (of the whole dense model)" * features
        if checkpoint.task == "panoptic" and dense and config["task"] == "segment":
            rows["output"] = SEMANTIC_ONLY
    rows |= {"input": _input(config["preprocessing" if dense else "pretrained_cfg"], dense), "measured": measured or ""}
    checked = "\n".join(f"* {each}" for each in record_lines(record))
    written = f"Written by foveal {record['version']}: `foveal convert`."
    title = checkpoint.name if checkpoint else architecture
    return _card(title, rows, _python(build, use), f"## Checked\n\n{checked}", written)


def record_lines(record: Mapping[str, Any]) -> list[str]:
    """The record of a conversion as text."""
    averaged = {True: "the averaged (EMA) weights, ", False: "the raw weights, ", None: ""}[record["averaged"]]
    heads = ", ".join(f"{count} `{group}`" for group, count in record["heads"].items())
    lines = [
        f"source `{record['file']}`: {averaged}keys of {KEY_FORMATS[record['keys']]}, sha256 `{record['sha256']}`",
        f"all {record['tensors']} tensors used, all {record['parameters']:,} parameters set",
        f"heads left out: {heads}" if heads else "",
        f"unused, left out: {listed(record['dropped'])}" if record["dropped"] else "",
        "first convolution flipped from BGR to RGB" if record.get("bgr") else "",
        f"`model.safetensors` has sha256 `{record['model_sha256']}`",
        "the written model reproduces the outputs for a fixed image that were computed before writing and are stored "
        "in `config.json`; `foveal verify` computes them again",
    ]
    return list(filter(None, lines))


def _input(cfg: Mapping[str, Any], dense: bool) -> str:
    statistics = f"mean {_text(cfg['mean'])}, std {_text(cfg['std'])}"
    if not dense:
        crop = f"crop {cfg['crop_pct']} ({cfg.get('crop_mode', 'center')})"
        return f"{_size(cfg['input_size'])}, {statistics}, {crop}, {cfg['interpolation']}"
    sizes = f", short side {cfg['short_side']} up to {cfg['max_size']}" if "short_side" in cfg else ""
    return f"images of {cfg['in_chans']} channels in [0, 1], any size; applied inside: {statistics}{sizes}"


# ---- exports


def origin(config: Mapping[str, Any], record: Mapping[str, Any] | None, folder: Path) -> dict[str, str]:
    """Rows of a card: where the weights of a folder come from, and their licence, as far as known."""
    checkpoint, licence = checkpoints().get(config.get(CHECKPOINT, "")), "licence of the published weights"
    if checkpoint is not None:
        weights = f"`{checkpoint.name}`, {_address(checkpoint)}, converted; from {folder}"
        return {"weights": weights, licence: checkpoint.weights_licence}
    if record is not None:
        weights = f"from {folder}, converted from `{record['file']}`; not known to be a published file"
        return {"weights": weights, licence: _licence(config)}
    return {"weights": f"from {folder}"}


def training_score(folder: Path) -> str:
    """The score that the training run of a classifier recorded; empty if the folder is not from a run."""
    summary = folder.parent / "summary.json"
    if folder.name not in ("best", "best.old") or not summary.is_file():
        return ""
    score = json.loads(summary.read_text(encoding="utf-8"))
    epoch = score.get("best_epoch", score["epochs"])
    return f"top-1 {score['top1']:.2f} % on {score['n']:,} held-out images, after epoch {epoch} of {score['epochs']}"


def classifier_card(
    model: Any, to: str, spec: ExportSpec, origin: Mapping[str, str], checked: str, command: str
) -> str:
    """The card of an exported classifier.

    Args:
        origin: rows about the source of the weights.
        checked: the result of the comparison with the original, as text.
        command: arguments of `foveal export`, without ``--output``.
    """
    images, architecture = metadata(model), model.pretrained_cfg["architecture"]
    published: Any = get_pretrained_cfg(architecture)
    cfg = published.to_dict() | model.pretrained_cfg
    names, classes = images.get("label_names"), str(model.num_classes)
    if names:
        named = ", ".join(f"{i} {name}" for i, name in enumerate(names)).replace("|", "\\|")
        classes += f": {named}" if len(names) <= _MAX_CLASSES else ", names in config.json"
    size = "height, width" if spec.any_size else _text(images["input_size"][1:])
    shape = f"[{'batch' if spec.any_batch else 1}, {images['input_size'][0]}, {size}]"
    rows = {
        "architecture": f"`{architecture}`, {sum(p.numel() for p in model.parameters()):,} parameters",
        "paper": ", ".join(filter(None, [cfg.get("paper_name"), _text(cfg.get("paper_ids"))])),
        **origin,
        "input": f"{_size([images['input_size'][0], 'height', 'width']) + ', trained at ' if spec.any_size else ''}"
        f"{_size(images['input_size'])}, pixels in [0, 1] minus mean {_text(images['mean'])}, divided by std "
        f"{_text(images['std'])}; resized ({images['interpolation']}), crop {images['crop_pct']} "
        f"({images['crop_mode']})",
        "classes": classes,
        "precision": "float16; images and logits float32" if spec.half else "",
        "size": f"any height and width from {LEAST_SIZE} on" if spec.any_size else "",
        "check of this file": checked,
    }
    prepare, run = preparing(model), _run(to, ("logits",), shape)
    place = "PATH_OF_THIS_FOLDER/" * (to == "safetensors")
    best = _example("after_classify", classes=str(model.num_classes), place=place) if prepare else ""
    code = "\n".join(filter(None, ["import json\n" if best else "", prepare, run + best]))
    return _exported(architecture, rows, code, command)


def dense_card(model: Any, to: str, size: tuple[int, int], origin: Mapping[str, str], checked: str) -> str:
    """The card of an exported detector or segmenter for images of ``size``, rows and columns."""
    arguments, detects, (rows, columns) = model.arguments, isinstance(model, Detector), size
    batch = "1" if detects or to == "openvino" else "batch"
    channels = len(image_mean(model))
    inside, outputs = "normalization", f"`logits` [{batch}, {len(model.classes)}, {rows}, {columns}]"
    if detects:
        transform, owner = model.detector.transform, model.selector
        seen = tuple(transform([torch.zeros(channels, *size)])[0].image_sizes[0])
        inside += f", the resize to {seen[0]} x {seen[1]}" * (seen != size)
        inside += " and non-maximum suppression" * (model.kind != "box_queries")
        masks = f", `masks` [n, 1, {rows}, {columns}]" * model.masks
        outputs = f"`boxes` [n, 4] in pixels, `labels` int64 [n], `scores` [n], in descending order{masks}; scores "
        outputs += f"above {owner.score_thresh:g}, at most {owner.detections_per_img} detections"
    before = head_spec(model.task, arguments["head"]).neck == "before"
    neck = f", neck `{arguments['neck']}`" if before else ""
    parts = f"`{arguments['head']}` on `{arguments['name']}`{neck}"
    command, table = (
        f"SOURCE --to {to}",
        {"model": f"{parts}, {sum(p.numel() for p in model.parameters()):,} parameters", **origin},
    )
    table["classes"] = ", ".join(f"{i} {name}" for i, name in enumerate(model.classes))
    if to != "safetensors":
        shape = f"[{batch}, {channels}, {rows}, {columns}]"
        table |= {"input": f"`image` {shape}, float32 in [0, 1]; inside: {inside}", "output": outputs}
        command += f" --size {rows}x{columns}"
    table["check of this file"] = checked
    title = f"{arguments['head']} on {arguments['name']}"
    return _exported(title, table, dense_example(model, to, size), command)


def image_mean(model: Any) -> list[float]:
    """The mean that a detector or segmenter subtracts, one number for each channel of its images."""
    values = model.detector.transform.image_mean if model.task == "detect" else model.mean.flatten()
    return [round(float(value), 6) for value in values]


# ---- code in cards


@functools.cache
def _examples() -> dict[str, str]:
    file = files("foveal.weights") / "model_cards" / "examples.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _example(name: str, **values: Any) -> str:
    return Template(_examples()[name]).substitute(values)


def _run(to: str, outputs: tuple[str, ...], shape: str) -> str:
    names = ", ".join(outputs)
    return _example(to, outputs=names, unpacked=names + "," * (len(outputs) == 1), shape=shape)


def preparing(model: Any) -> str | None:
    """Python code with Pillow and NumPy that preprocesses ``photo.jpg``, or ``image.npy`` of other channels than 1 or
    3, like a classifier's `preprocessing`, to ``image`` ``[1, C, H, W]``; None for crops other than center."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    channels, rows, columns = config["input_size"]
    if config["crop_mode"] != "center":
        return None
    height, width = (math.floor(side / config["crop_pct"]) for side in (rows, columns))
    resized = f"(int({height} * side / min(photo.size)) for side in photo.size)"
    if height != width:
        resized = f"(round(side / min(photo.width / {width}, photo.height / {height})) for side in photo.size)"
    values = dict(rows=rows, columns=columns, channels=channels, mean=list(config["mean"]), std=list(config["std"]))
    crop = "crop" if channels in MODES else "crop_bands"
    return _opening(channels) + _example(crop, resized=resized, interpolation=config["interpolation"].upper(), **values)


def _opening(channels: int) -> str:
    if channels in MODES:
        return _example("open", mode=MODES[channels])
    return _example("open_bands", channels=channels)


def dense_example(model: Any, to: str, size: tuple[int, int]) -> str:
    """Python code that runs an exported detector or segmenter on ``photo.jpg``, or ``image.npy`` of other than 1 or 3
    channels, letterboxed to ``size``; for safetensors on random pixels."""
    detects, mean, (rows, columns) = isinstance(model, Detector), image_mean(model), size
    channels = len(mean)
    if to == "safetensors":
        return _example(f"safetensors_{model.task}", channels=channels)
    run = _run(to, output_names(model), f"[1, {channels}, {rows}, {columns}] in [0, 1]")
    if detects and to == "pt2":
        run = f"import torchvision  # registers the operators of the file\n{run}"
    letterbox = "letterbox" if channels in MODES else "letterbox_bands"
    prepare = _example(letterbox, rows=rows, columns=columns, channels=channels, mean=mean)
    return _opening(channels) + prepare + "\n" + run + _example(f"after_{model.task}")


# ---- parts of a card


def _card(title: str, rows: Mapping[str, str], code: str, *more: str) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return "\n\n".join([f"# {title}", f"| | |\n|---|---|\n{table}", code, *more]) + "\n"


def _exported(title: str, rows: Mapping[str, str], code: str, command: str) -> str:
    written = f"Written by foveal {__version__}: `foveal export {command} --output FOLDER`."
    return _card(title, rows, f"```python\n{code}```", written)


def _python(build: str, use: str) -> str:
    return f"```python\nimport foveal, timm\n\nmodel = {build}\n{use}\n```"


def _address(checkpoint: Checkpoint) -> str:
    return f"published as {checkpoint.address or checkpoint.page}"


def _licence(config: Mapping[str, Any]) -> str:
    return (config.get("pretrained_cfg") or {}).get("license") or _UNKNOWN


def _paper(architecture: str) -> str:
    """Empty for timm's models, whose cfg names the paper of the training recipe."""
    cfg: Any = get_pretrained_cfg(architecture)
    return _text(cfg.paper_ids) if architecture in list_models() else ""


def _size(size: Any) -> str:
    return " x ".join(map(str, size))


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")


def listed(names: list[str], most: int = 12) -> str:
    """The number of names and the first of them, as text."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} ({', '.join(names[:most])}{rest})"
