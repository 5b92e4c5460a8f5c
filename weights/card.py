"""Cards of weights: what the manifest says of a published file, and of a converted one also what was checked."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg

from ..backbones import download, list_models
from ..backbones.profile import profile
from .export import RECORD
from .manifest import Checkpoint, checkpoints

_SPEED = Path(__file__).parents[1] / "benchmarks" / "results" / "models-cpu-2core.csv"
_UNKNOWN = "not known: that of whoever made the file"
_KEYS = {
    "authors": "the authors' names",
    "timm": "timm's names",
    "mmdet": "a whole model of mmdetection or mmsegmentation",
    "detectron2": "a whole model of detectron2",
}
_PIXELS = "the class of each pixel and does not tell objects apart"
_USE = """```python
import foveal, timm

model = {build}
{answer}
```"""


def facts(checkpoint: Checkpoint) -> dict[str, str]:
    """What is known of a published file, in words, by what it is: of the manifest, the model's size and cost as counted
    here, and its measured speed where there is a measurement."""
    classifier = checkpoint.task == "classify"
    counted = profile(checkpoint.name if classifier else checkpoint.model)
    table = {
        "model": f"`{checkpoint.model}`" + ("" if classifier else f", the backbone of a model to {checkpoint.task}"),
        "paper": _paper(checkpoint.model),
        "published score": checkpoint.score_text() or "none",
        "parameters": f"{counted.parameters:,}" + ("" if classifier else " (of the backbone with its classifier)"),
        "GMACs": f"{counted.macs / 1e9:.2f} for one image of {_by(counted.input_size)}" if classifier else "",
        "classes": f"{checkpoint.classes:,}" if classifier and checkpoint.classes else "",
        "input": f"{_by(checkpoint.input)}, as published" if checkpoint.input else "",
        "preprocessing": _preprocessing(checkpoint),
        "arguments of the backbone": ", ".join(f"{key}={value}" for key, value in checkpoint.arguments.items()),
        "licence of the weights": checkpoint.weights_licence,
        "licence of the code": checkpoint.code_licence,
        "code of the authors": checkpoint.code,
        "address": checkpoint.address or f"{checkpoint.file}, by hand from {checkpoint.page}",
        "mirrors": ", ".join([*checkpoint.mirrors, *(f"{place} (not confirmed)" for place in checkpoint.unconfirmed)]),
        "converted from": checkpoint.original or "",
        "sha256": _hash(checkpoint),
        "format": _KEYS[checkpoint.keys],
        "foveal convert": "" if classifier else _converted(checkpoint),
        "measured speed": _speed(checkpoint) if classifier else "",
        "note": _note(checkpoint),
    }
    return {name: value for name, value in table.items() if value}


def published_card(checkpoint: Checkpoint) -> str:
    """The card of a published file, Markdown."""
    if checkpoint.task == "classify" and checkpoint.addresses:
        use = _use(f'timm.create_model("{checkpoint.name}", pretrained=True).eval()', "logits = model(images)")
    else:
        source = checkpoint.name if checkpoint.addresses else f"{checkpoint.file} --model {checkpoint.name}"
        use = f"```\nfoveal convert {source} --output FOLDER\n```"
    return f"# {checkpoint.name}\n\n{_table(facts(checkpoint))}\n\n{use}\n"


def card(config: Mapping[str, Any], measured: str | None = None) -> str:
    """A README.md for the folder of this ``config.json``, which `convert` wrote.

    Args:
        measured: a score that was measured with the converted model, in words.
    """
    record = config[RECORD]
    checkpoint = checkpoints().get(record["checkpoint"])
    whole = "pretrained_cfg" not in config  # a detector or segmenter
    architecture = config["arguments"]["backbone"] if whole else config["architecture"]
    features = bool((config.get("model_args") or {}).get("features_only"))
    table: dict[str, Any] = {
        "model": _model(config, architecture, whole, features),
        "paper": _paper(architecture),
    }
    if checkpoint is None:
        table["weights"] = f"from `{record['file']}`; that is not known to be a published file"
        table["licence of the weights"] = (config.get("pretrained_cfg") or {}).get("license") or _UNKNOWN
    else:
        of_part = " (of the whole dense model)" if features else ""
        table |= {
            "weights": f"`{checkpoint.name}`, published as {checkpoint.address or checkpoint.page}",
            "converted from": checkpoint.original,
            "code of the authors": f"{checkpoint.code}, licence: {checkpoint.code_licence}",
            "licence of the weights": checkpoint.weights_licence,
            "published score": checkpoint.score_text() + of_part if checkpoint.score else None,
            "gives": _PIXELS if checkpoint.task == "panoptic" and whole and config["task"] == "segment" else None,
            "measured speed": None if whole or features else _speed(checkpoint),
            "note": _note(checkpoint),
        }
    table |= {"input": _input(config, whole), "measured": measured}
    averaged = {True: "; the averaged (EMA) weights", False: "; the raw weights", None: ""}[record["averaged"]]
    checked = [
        f"made from `{record['file']}`, sha256 `{record['sha256']}`{averaged}",
        f"all {record['tensors']} tensors of it are used, all parameters are set",
        *([f"left out, of the heads: {_groups(record['heads'])}"] if record["heads"] else []),
        *([f"left out, as nothing reads them: {_text(record['dropped'])}"] if record["dropped"] else []),
        *(["its first filters, for images in the order BGR, turned round for RGB"] if record.get("bgr") else []),
        f"`model.safetensors` has sha256 `{record['model_sha256']}`",
        "the answer to a fixed image was computed before writing and is that of the written model; it is stored in "
        "`config.json`, and `foveal verify` computes it again",
    ]
    if whole:
        answer = "found = model([image])  # float [3, H, W] in [0, 1]"
        answer = answer if config["task"] == "detect" else "logits = model(images)  # float [B, 3, H, W] in [0, 1]"
        use = _use('foveal.load("PATH_OF_THIS_FOLDER")', answer)
    else:
        answer = "maps = model(images)  # a list" if features else "logits = model(images)"
        use = _use('timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()', answer)
    title = checkpoint.name if checkpoint else architecture
    return (
        f"# {title}\n\n{_table(table)}\n\n{use}\n\n## Checked\n\n"
        + "\n".join(f"* {each}" for each in checked)
        + f"\n\nWritten by foveal {record['version']}: `foveal convert`.\n"
    )


def _model(config: Mapping[str, Any], architecture: str, whole: bool, features: bool) -> str:
    size = f"{config[RECORD]['parameters']:,} parameters"
    if whole:
        made = config["arguments"]
        return f"{made['head']} with {made['neck']} on `{architecture}`, {size}, {len(config['classes'])} classes"
    kind = "a backbone: it gives feature maps" if features else f"{config['num_classes']:,} classes"
    return f"`{architecture}`, {size}, {kind}"


def _input(config: Mapping[str, Any], whole: bool) -> str:
    if whole:
        images = config["preprocessing"]
        statistics = f"mean {_text(images['mean'])}, std {_text(images['std'])}"
        sizes = f", short side {images['short_side']} up to {images['max_size']}" if "short_side" in images else ""
        taken = f"images of {images['in_chans']} channels in [0, 1], of any size"
        return f"{taken}; the model does the rest: {statistics}{sizes}"
    cfg = config["pretrained_cfg"]
    return (
        f"{_by(cfg['input_size'])}, mean {_text(cfg['mean'])}, std {_text(cfg['std'])}, crop {cfg['crop_pct']} "
        f"({cfg.get('crop_mode', 'center')}), {cfg['interpolation']}"
    )


def _preprocessing(checkpoint: Checkpoint) -> str:
    statistics = f"mean {_text(checkpoint.mean)}, std {_text(checkpoint.std)}"
    if checkpoint.task != "classify":
        return statistics
    return f"{checkpoint.interpolation}, crop {checkpoint.crop:g} ({checkpoint.crop_mode}), {statistics}"


def _converted(checkpoint: Checkpoint) -> str:
    """How much of a dense model can be converted, see `dense.plan` and `dense.timm_alone`."""
    backbone = "" if checkpoint.arguments.get("stride_in_1x1") else "; with --backbone its backbone"
    if re.match(r"(a3fpn_)?(maskrcnn|cascade|faster_rcnn|retinanet|upernet|mask2former)_", checkpoint.tag):
        gives = f"; it then gives {_PIXELS}" if checkpoint.task == "panoptic" else ""
        return f"the whole model{gives}{backbone}"
    return "the backbone, with --backbone; there are no such heads here"


def _hash(checkpoint: Checkpoint) -> str:
    """The hash that is published of a file, or how it begins; else the one recorded when it was first received here."""
    if checkpoint.sha256:
        return checkpoint.sha256 + ("" if len(checkpoint.sha256) == 64 else " ... (how it begins, as published)")
    for address in checkpoint.addresses:
        recorded = download.recorded_sha256(address)
        if recorded:
            return f"{recorded} (recorded at the first download)"
    return "none published; recorded at the first download and held from then on"


def _speed(checkpoint: Checkpoint) -> str:
    """The latest measurement of this model at its input size on a CPU, in words; empty if there is none."""
    if not _SPEED.is_file():
        return ""
    size = "x".join(map(str, checkpoint.input or ()))
    with _SPEED.open(encoding="utf-8", newline="") as file:
        rows = [each for each in csv.DictReader(file) if each["model"] == checkpoint.model]
    for row in reversed(rows):
        batch, _, shape = row["input"].partition("x")
        if shape == size:
            forward = float(row["forward_ms"])
            return (
                f"{1000 * int(batch) / forward:.1f} images/s: {forward:,.0f} ms for {batch} images, with the backward "
                f"pass {float(row['forward_backward_ms']):,.0f} ms; {row['cpu']}, {row['threads']} threads, float32, "
                f"torch {row['torch']}, {row['date']}"
            )
    return ""


def _paper(architecture: str) -> str:
    """Of the models here; timm's name that of the recipe of its own weights."""
    return _text(get_pretrained_cfg(architecture).paper_ids) if architecture in list_models() else ""


def _note(checkpoint: Checkpoint) -> str:
    own = [] if checkpoint.model in list_models() else [f"{checkpoint.model} is timm's."]
    return " ".join(filter(None, [checkpoint.note, checkpoint.about, *own]))


def _use(build: str, answer: str) -> str:
    return _USE.format(build=build, answer=answer)


def _table(rows: Mapping[str, Any]) -> str:
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return f"| | |\n|---|---|\n{lines}"


def _groups(heads: Mapping[str, int]) -> str:
    return ", ".join(f"{count} `{group}`" for group, count in heads.items())


def _by(size: Any) -> str:
    return " x ".join(map(str, size))


def _text(value: Any) -> str:
    return ", ".join(str(each) for each in value) if isinstance(value, (list, tuple)) else str(value or "")
