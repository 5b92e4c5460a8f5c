"""Cards, README.md: of published files, of converted folders, and of exports, with code that runs them."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg

from .._version import __version__
from ..backbones import download, list_models
from ..backbones.images import MODES
from ..backbones.profile import profile
from ..heads.detection import Detector
from .folder import CHECKPOINT, RECORD
from .formats import LEAST_SIZE, ExportSpec, output_names
from .images import metadata
from .manifest import Checkpoint, checkpoints

# Whose names a file's tensors have.
KEY_FORMATS = {
    "authors": "the authors' models",
    "timm": "timm's models",
    "foveal": "this package's models",
    "transformers": "transformers",
    "mmdet": "mmdetection or mmsegmentation",
    "detectron2": "detectron2",
}
# The heads of published detectors and segmenters that are converted, as their tags and as the builders name them.
DENSE_HEADS = {
    "maskrcnn": "mask_rcnn",
    "cascade": "cascade_mask_rcnn",
    "faster_rcnn": "faster_rcnn",
    "retinanet": "retinanet",
    "upernet": "upernet",
    "mask2former": "mask2former",
}
_SPEED = Path(__file__).parents[1] / "benchmarks" / "results" / "models-cpu-2core.csv"
_UNKNOWN = "not known: that of whoever made the file"
_PIXELS = "the class of each pixel and does not tell objects apart"
_LISTED = 100  # class names in a card at most
_HERE = "PATH_OF_THIS_FOLDER"


# ---- of a published file


def facts(checkpoint: Checkpoint) -> dict[str, str]:
    """What is known of a published file: from the manifest, the model's size and cost, and its measured speed."""
    classifier = checkpoint.task == "classify"
    counted = profile(checkpoint.name if classifier else checkpoint.model)
    crop = f"{checkpoint.interpolation}, crop {checkpoint.crop:g} ({checkpoint.crop_mode}), " if classifier else ""
    rows = {
        "model": f"`{checkpoint.model}`" + ("" if classifier else f", the backbone of a model to {checkpoint.task}"),
        "parameters": f"{counted.parameters:,}" + ("" if classifier else " (of the backbone with its classifier)"),
        "GMACs": f"{counted.macs / 1e9:.2f} for one image of {_by(counted.input_size)}" if classifier else "",
        "classes": f"{checkpoint.classes:,}" if classifier and checkpoint.classes else "",
        "input": f"{_by(checkpoint.input)}, as published" if checkpoint.input else "",
        "preprocessing": f"{crop}mean {_text(checkpoint.mean)}, std {_text(checkpoint.std)}",
        "arguments of the backbone": ", ".join(f"{key}={value}" for key, value in checkpoint.arguments.items()),
        **_published(checkpoint),
        "address": checkpoint.address or f"{checkpoint.file}, by hand from {checkpoint.page}",
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


def _published(checkpoint: Checkpoint) -> dict[str, str]:
    """Rows of the cards of a published file and of what is converted from it."""
    own = [] if checkpoint.model in list_models() else [f"{checkpoint.model} is timm's."]
    return {
        "paper": _paper(checkpoint.model),
        "published score": checkpoint.score_text() or "none",
        "licence of the weights": checkpoint.weights_licence,
        "licence of the code": checkpoint.code_licence,
        "code of the authors": checkpoint.code,
        "converted from": checkpoint.original or "",
        "measured speed": _speed(checkpoint) if checkpoint.task == "classify" else "",
        "note": " ".join(filter(None, [checkpoint.note, checkpoint.about, *own])),
    }


def _convertible(checkpoint: Checkpoint) -> str:
    """How much of a dense model `convert` takes."""
    backbone = "" if checkpoint.arguments.get("stride_in_1x1") else "; with --backbone its backbone"
    if re.match(rf"(a3fpn_)?({'|'.join(DENSE_HEADS)})_", checkpoint.tag):
        gives = f"; it then gives {_PIXELS}" if checkpoint.task == "panoptic" else ""
        return f"the whole model{gives}{backbone}"
    return "the backbone, with --backbone; there are no such heads here"


def _hash(checkpoint: Checkpoint) -> str:
    """The published hash of a file, or its first digits; else the one recorded at the first download."""
    if checkpoint.sha256:
        return checkpoint.sha256 + ("" if len(checkpoint.sha256) == 64 else " ... (its first digits, as published)")
    recorded = next(filter(None, map(download.recorded_sha256, checkpoint.addresses)), None)
    if recorded:
        return f"{recorded} (recorded at the first download)"
    return "none published; recorded at the first download and checked from then on"


def _speed(checkpoint: Checkpoint) -> str:
    """The latest measurement of this model at its input size on a CPU; empty if there is none."""
    if not _SPEED.is_file():
        return ""
    size = "x".join(map(str, checkpoint.input or ()))
    with _SPEED.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == checkpoint.model]
    rows = [row for row in rows if row["input"].partition("x")[2] == size]
    if not rows:
        return ""
    row = rows[-1]
    batch, forward = int(row["input"].partition("x")[0]), float(row["forward_ms"])
    return (
        f"{1000 * batch / forward:.1f} images/s: {forward:,.0f} ms for {batch} images, with the backward pass "
        f"{float(row['forward_backward_ms']):,.0f} ms; {row['cpu']}, {row['threads']} threads, float32, torch "
        f"{row['torch']}, {row['date']}"
    )


# ---- of a converted folder


def converted_card(config: Mapping[str, Any], measured: str | None = None) -> str:
    """A README.md for the folder of this ``config.json``, which `convert` wrote.

    Args:
        measured: a score that was measured with the converted model, in words.
    """
    record, dense = config[RECORD], "pretrained_cfg" not in config
    checkpoint, args = checkpoints().get(record["checkpoint"]), config.get("arguments", {})
    architecture = args["name"] if dense else config["architecture"]
    features = bool((config.get("model_args") or {}).get("features_only"))
    if dense:
        model = f"{args['head']} with {args['neck']} on `{architecture}`, {len(config['classes'])} classes"
        use = "found = model([image])  # float [3, H, W] in [0, 1]"
        use = use if config["task"] == "detect" else "logits = model(images)  # float [B, 3, H, W] in [0, 1]"
        code = _python(f'foveal.load("{_HERE}")', use)
    else:
        kind = "a backbone: it returns feature maps" if features else f"{config['num_classes']:,} classes"
        model, use = (
            f"`{architecture}`, {kind}",
            "maps = model(images)  # a list" if features else "logits = model(images)",
        )
        code = _python(f'timm.create_model("local-dir:{_HERE}", pretrained=True).eval()', use)
    rows = {"model": f"{model}, {record['parameters']:,} parameters"}
    if checkpoint is None:
        rows |= {"paper": _paper(architecture), "weights": f"from `{record['file']}`, not known to be a published file"}
        rows["licence of the weights"] = (config.get("pretrained_cfg") or {}).get("license") or _UNKNOWN
    else:
        rows["weights"] = f"`{checkpoint.name}`, published as {checkpoint.address or checkpoint.page}"
        rows |= _published(checkpoint)
        rows["published score"] += " (of the whole dense model)" * features
        if checkpoint.task == "panoptic" and dense and config["task"] == "segment":
            rows["gives"] = _PIXELS
    rows |= {"input": _input(config["preprocessing" if dense else "pretrained_cfg"], dense), "measured": measured}
    checked = "\n".join(f"* {each}" for each in record_lines(record))
    written = f"Written by foveal {record['version']}: `foveal convert`."
    return _card(checkpoint.name if checkpoint else architecture, rows, code, f"## Checked\n\n{checked}", written)


def record_lines(record: Mapping[str, Any]) -> list[str]:
    """What a record of a conversion says, in words."""
    averaged = {True: "the averaged (EMA) weights, ", False: "the raw weights, ", None: ""}[record["averaged"]]
    heads = ", ".join(f"{count} `{group}`" for group, count in record["heads"].items())
    return [
        f"made from `{record['file']}`: {averaged}keys of {KEY_FORMATS[record['keys']]}, sha256 `{record['sha256']}`",
        f"all {record['tensors']} tensors of it are used, all {record['parameters']:,} parameters are set",
        *([f"left out, of the heads: {heads}"] if heads else []),
        *([f"left out, as nothing reads them: {listed(record['dropped'])}"] if record["dropped"] else []),
        *(["its first filters, for BGR images, flipped to RGB"] if record.get("bgr") else []),
        f"`model.safetensors` has sha256 `{record['model_sha256']}`",
        "the outputs for a fixed image, computed before writing and stored in `config.json`, are those of the written "
        "model; `foveal verify` computes them again",
    ]


def _input(cfg: Mapping[str, Any], dense: bool) -> str:
    statistics = f"mean {_text(cfg['mean'])}, std {_text(cfg['std'])}"
    if dense:
        sizes = f", short side {cfg['short_side']} up to {cfg['max_size']}" if "short_side" in cfg else ""
        taken = f"images of {cfg['in_chans']} channels in [0, 1], of any size"
        return f"{taken}; the model does the rest: {statistics}{sizes}"
    crop = f"crop {cfg['crop_pct']} ({cfg.get('crop_mode', 'center')})"
    return f"{_by(cfg['input_size'])}, {statistics}, {crop}, {cfg['interpolation']}"


# ---- of an export


def origin(config: Mapping[str, Any], record: Mapping[str, Any] | None, folder: Path) -> dict[str, str | None]:
    """Rows of a card: where the weights of a folder come from, and their licence, as far as known."""
    checkpoint, licence = checkpoints().get(config.get(CHECKPOINT)), "licence of the published weights"
    if checkpoint is not None:
        published = f"published as {checkpoint.address or checkpoint.page}"
        return {
            "weights": f"`{checkpoint.name}`, {published}, converted; from {folder}",
            licence: checkpoint.weights_licence,
        }
    if record is not None:
        return {
            "weights": f"from {folder}, converted from `{record['file']}`; not known to be a published file",
            licence: (config.get("pretrained_cfg") or {}).get("license") or _UNKNOWN,
        }
    return {"weights": f"from {folder}"}


def classifier_card(
    model: Any, to: str, spec: ExportSpec, origin: Mapping[str, Any], checked: str, options: str = ""
) -> str:
    """The card of an exported classifier.

    Args:
        origin: rows that say where its weights come from.
        checked: the result of the comparison with the original, in words.
        options: of `foveal export`, besides the format.
    """
    images, architecture = metadata(model), model.pretrained_cfg["architecture"]
    cfg = {**get_pretrained_cfg(architecture).to_dict(), **model.pretrained_cfg}
    names, classes = images.get("label_names"), str(model.num_classes)
    if names:
        named = ", ".join(f"{i} {name}" for i, name in enumerate(names)).replace("|", "\\|")
        classes += f": {named}" if len(names) <= _LISTED else ", their names in config.json"
    size = "height, width" if spec.any_size else _text(images["input_size"][1:])
    shape = f"[{'batch' if spec.any_batch else 1}, {images['input_size'][0]}, {size}]"
    rows = {
        "architecture": f"`{architecture}`, {sum(p.numel() for p in model.parameters()):,} parameters",
        "paper": ", ".join(filter(None, [cfg.get("paper_name"), _text(cfg.get("paper_ids"))])),
        **origin,
        "input": f"{_by(images['input_size'])}, from pixels in [0, 1] less mean {_text(images['mean'])}, by std "
        f"{_text(images['std'])}; resized ({images['interpolation']}), crop {images['crop_pct']} "
        f"({images['crop_mode']})",
        "classes": classes,
        "numbers": "float16; images and logits float32" if spec.half else None,
        "size": f"any height and width from {LEAST_SIZE} on" if spec.any_size else None,
        "check of this file": checked,
    }
    code = "\n".join(filter(None, [preparing(model), _run_code(to, ("logits",), shape)]))
    return _exported(architecture, rows, code, f"{to}{options}")


def dense_card(model: Any, to: str, size: tuple[int, int], origin: Mapping[str, Any], checked: str) -> str:
    """The card of an exported detector or segmenter for images of ``size``, rows and columns."""
    arguments, detects = model.arguments, isinstance(model, Detector)
    rows, columns = size
    batch = "1" if detects or to == "openvino" else "batch"
    shape = f"[{batch}, {channels_of(model)}, {rows}, {columns}]"
    inside, returned = "normalization", f"`logits` [{batch}, {len(model.classes)}, {rows}, {columns}]"
    if detects:
        transform, owner = model.detector.transform, getattr(model.detector, "roi_heads", model.detector)
        seen = tuple(transform([torch.zeros(channels_of(model), *size)])[0].image_sizes[0])
        inside += f", the resize to {seen[0]} x {seen[1]}" * (seen != size) + " and non-maximum suppression"
        masks = f", `masks` [n, 1, {rows}, {columns}]" * model.masks
        returned = (
            f"`boxes` [n, 4] in its pixels, `labels` int64 [n], `scores` [n], the best first{masks}; scores above "
        )
        returned += f"{owner.score_thresh:g}, at most {owner.detections_per_img} detections"
    parts = f"`{arguments['head']}` on `{arguments['name']}`"
    if arguments["head"] != "mask2former":
        parts += f", neck `{arguments['neck']}`"
    table = {
        "model": f"{parts}, {sum(p.numel() for p in model.parameters()):,} parameters",
        **origin,
        "classes": ", ".join(f"{i} {name}" for i, name in enumerate(model.classes)),
        "input": f"`image` {shape}, float32 in [0, 1]; inside: {inside}" if to != "safetensors" else None,
        "output": returned if to != "safetensors" else None,
        "check of this file": checked,
    }
    title = f"{arguments['head']} on {arguments['name']}"
    options = to if to == "safetensors" else f"{to} --size {rows}x{columns}"
    return _exported(title, table, dense_example(model, to, size), options)


def channels_of(model: Any) -> int:
    """Of the images that a detector or segmenter takes."""
    statistics: Any = model.detector.transform.image_mean if isinstance(model, Detector) else model.mean
    return len(statistics)


def training_score(folder: Path) -> str | None:
    """The score that the training run of these weights recorded, if they come from one."""
    summary = folder.parent / "summary.json"
    if folder.name not in ("best", "best.old") or not summary.is_file():
        return None
    score = json.loads(summary.read_text(encoding="utf-8"))
    epoch = score.get("best_epoch", score["epochs"])
    return f"top-1 {score['top1']:.2f} % on {score['n']:,} held-out images, after epoch {epoch} of {score['epochs']}"


# ---- code in cards

_OPEN = """\
import numpy as np
from PIL import Image, ImageOps

photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")
"""
_CROP = """\
width, height = {resized}
photo = photo.resize((width, height), Image.Resampling.{interpolation})
left, top = round((width - {columns}) / 2), round((height - {rows}) / 2)
pixels = np.asarray(photo.crop((left, top, left + {columns}, top + {rows})), np.float32) / 255
pixels = (pixels.reshape({rows}, {columns}, {channels}) - {mean}) / {std}
image = pixels.transpose(2, 0, 1)[None].astype(np.float32)
"""
_LETTERBOX = """\
rows, columns = {size}
scale = min(rows / photo.height, columns / photo.width)
height, width = (max(1, round(side * scale)) for side in (photo.height, photo.width))
image = np.empty((1, {channels}, rows, columns), np.float32)
image[:] = np.array({mean}, np.float32).reshape(-1, 1, 1)  # the padding
pixels = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR), np.float32)
image[0, :, :height, :width] = pixels.reshape(height, width, -1).transpose(2, 0, 1) / 255
"""
_RUN = {  # what opens the model, and what runs it on image, a NumPy array
    "safetensors": (
        'import foveal\nimport torch\n\nmodel = foveal.load("PATH_OF_THIS_FOLDER")',
        "model(torch.from_numpy(image))",
    ),
    "onnx": (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")',
        'session.run(None, {"image": image})',
    ),
    "pt2": ('import torch\n\nmodel = torch.export.load("model.pt2").module()', "model(torch.from_numpy(image))"),
    "aoti": (
        'import torch\nimport torch._inductor\n\nmodel = torch._inductor.aoti_load_package("model.pt2")',
        "model(torch.from_numpy(image))",
    ),
    "openvino": (
        'import openvino\n\ncore = openvino.Core()\nmodel = core.read_model("model.xml")\n'
        "model.reshape(image.shape)  # the file is for one image; dynamic dimensions go wrong on its CPU runtime\n"
        'compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
        "compiled(image).values()",
    ),
    "coreml": (
        'import coremltools\n\nmodel = coremltools.models.MLModel("model.mlpackage")',
        'model.predict({"image": image}).values()',
    ),
}


def _run_code(to: str, names: tuple[str, ...], shape: str) -> str:
    start, run = _RUN[to]
    in_torch = "torch.from_numpy" in run  # others return a collection, also of one output
    outputs = ", ".join(names) + "," * (len(names) == 1 and not in_torch)
    line = f"{outputs} = {run}  # float32 {shape}\n"
    return f"{start}\nwith torch.no_grad():\n    {line}" if in_torch else f"{start}\n{line}"


def preparing(model: Any) -> str | None:
    """Python that makes ``image`` ``[1, C, H, W]`` of ``photo.jpg`` as a classifier's `preprocessing` does, with Pillow
    and NumPy alone; None for images that no file holds, or that are not cropped from the centre."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    channels, rows, columns = config["input_size"]
    if channels not in MODES or config["crop_mode"] != "center":
        return None
    height, width = (math.floor(side / config["crop_pct"]) for side in (rows, columns))
    resized = f"(int({height} * side / min(photo.size)) for side in photo.size)"
    if height != width:
        resized = f"(round(side / min(photo.width / {width}, photo.height / {height})) for side in photo.size)"
    interpolation, mean, std = config["interpolation"].upper(), list(config["mean"]), list(config["std"])
    size = dict(rows=rows, columns=columns, channels=channels)
    return _OPEN.format(mode=MODES[channels]) + _CROP.format(
        resized=resized, interpolation=interpolation, mean=mean, std=std, **size
    )


def dense_example(model: Any, to: str, size: tuple[int, int]) -> str:
    """Python that runs an exported detector or segmenter on ``photo.jpg``, letterboxed to ``size``; of safetensors, and
    for channels that no photo has, on any image."""
    detects, channels, names = isinstance(model, Detector), channels_of(model), output_names(model)
    if to == "safetensors":
        image = f"torch.rand({channels}, 480, 640)" if detects else f"torch.rand(1, {channels}, 480, 640)"
        outputs, given = ("(found,)", f"[{image}]") if detects else ("logits", image)
        return (
            f'import foveal\nimport torch\n\nmodel = foveal.load("{_HERE}")\nwith torch.no_grad():\n'
            f"    {outputs} = model({given})  # images in [0, 1], of any size\n"
        )
    run = _run_code(to, names, f"[1, {channels}, {size[0]}, {size[1]}] in [0, 1]")
    if detects and to == "pt2":
        run = f"import torchvision  # registers the operators of the file\n{run}"
    if channels not in MODES:
        return run
    values = model.detector.transform.image_mean if detects else model.mean
    mean = [round(float(value), 6) for value in values]
    prepare = _LETTERBOX.format(size=f"{size[0]}, {size[1]}", channels=channels, mean=mean)
    after = "classes = logits.argmax(1)[0, :height, :width]  # of each pixel of the resized photo\n"
    if detects:
        after = "boxes = boxes / scale  # in pixels of the photo: left, top, right, bottom\n"
    return _OPEN.format(mode=MODES[channels]) + prepare + "\n" + run + after


# ---- the parts of a card


def _card(title: str, rows: Mapping[str, Any], code: str, *more: str) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return "\n\n".join([f"# {title}", f"| | |\n|---|---|\n{table}", code, *more]) + "\n"


def _exported(title: str, rows: Mapping[str, Any], code: str, options: str) -> str:
    written = f"Written by foveal {__version__}: `foveal export SOURCE --to {options}`."
    return _card(title, rows, f"```python\n{code}```", written)


def _python(build: str, use: str) -> str:
    return f"```python\nimport foveal, timm\n\nmodel = {build}\n{use}\n```"


def _paper(architecture: str) -> str:
    """Of the models here; under timm's names it is that of the recipe of timm's own weights."""
    return _text(get_pretrained_cfg(architecture).paper_ids) if architecture in list_models() else ""


def _by(size: Any) -> str:
    return " x ".join(map(str, size))


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")


def listed(names: list[str], most: int = 12) -> str:
    """The number of names, and the first of them."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} ({', '.join(names[:most])}{rest})"


def counted(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {group}" for group, count in groups.items())
