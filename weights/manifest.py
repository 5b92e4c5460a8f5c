"""The manifest of released checkpoints, ``manifest.yaml``, read and checked; and what the backbones know of it.

``python -m foveal.weights.manifest`` writes ``backbones/published.py`` anew.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("manifest.yaml")
TASKS = ("classify", "detect", "segment", "panoptic")
FORMATS = ("authors", "timm", "mmdet", "detectron2")
SCORES = {
    "top1": "top-1",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "miou": "mIoU",
    "miou_ms": "mIoU (multi-scale)",
    "pq": "PQ",
}

_OF_A_FAMILY = {"code", "licence", "note", "keys", "teacher", "defaults", "checkpoints"}

# What a row of published.py leaves out, in the words of timm's PretrainedCfg.
DEFAULTS: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


class ManifestError(ValueError):
    """The manifest says something that cannot be; the message names the checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """One released file; the fields are explained at the head of the manifest.

    Examples:
        >>> from foveal.weights.manifest import checkpoints
        >>> mini = checkpoints()["dinat_mini.in1k"]
        >>> mini.task, mini.score_text(), mini.preprocessing()["input_size"]
        ('classify', 'top-1 81.8', (3, 224, 224))
    """

    family: str
    code: str
    code_licence: str
    weights_licence: str
    model: str
    tag: str
    task: str
    keys: str
    address: str | None = None
    page: str | None = None
    file: str | None = None
    mirrors: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()
    original: str | None = None
    sha256: str | None = None
    score: Mapping[str, float] = field(default_factory=dict)
    parameters: float | None = None
    classes: int | None = None
    input: tuple[int, int, int] | None = None
    crop: float | None = None
    crop_mode: str = "center"
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    channel_order: str | None = None
    note: str | None = None
    about: str | None = None  # the family's note

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the file is, in the order in which they are tried; empty if it can only be fetched by hand."""
        return (*filter(None, [self.address]), *self.mirrors, *self.unconfirmed)

    def score_text(self) -> str:
        """The published score for people: ``"top-1 81.8"``; empty if none is known."""
        return ", ".join(f"{SCORES[key]} {value:g}" for key, value in self.score.items())

    def preprocessing(self) -> dict[str, Any]:
        """What the manifest says of the inputs, in the words of timm's ``PretrainedCfg``."""
        facts = {
            "num_classes": self.classes,
            "input_size": self.input,
            "crop_pct": self.crop,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
        }
        return {key: value for key, value in facts.items() if value is not None}


@functools.cache
def checkpoints(file: Path = FILE) -> dict[str, Checkpoint]:
    """All checkpoints by their names ``MODEL.TAG``, in the order of the manifest.

    Raises:
        ManifestError: if something is missing, unknown or there twice.

    Examples:
        >>> from foveal.weights.manifest import checkpoints
        >>> checkpoints()["dinat_mini.in1k"].weights_licence
        'mit'
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # where PyYAML was built with libyaml: ten times as fast
    families = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)["families"]
    found: dict[str, Checkpoint] = {}
    for family, shared in families.items():
        if unknown := sorted(set(shared) - _OF_A_FAMILY):
            raise ManifestError(f"family {family}: unknown {', '.join(unknown)}")
        own = {"code": shared["code"], "keys": shared["keys"], "about": shared.get("note")}
        own |= {f"{of}_licence": licence for of, licence in shared["licence"].items()}
        for row in shared["checkpoints"]:
            checkpoint = _checked({"family": family, **own, **shared["defaults"], **row})
            if checkpoint.name in found:
                raise ManifestError(f"{checkpoint.name} is there twice")
            found[checkpoint.name] = checkpoint
    places = [place for each in found.values() for place in each.addresses]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        raise ManifestError(f"addresses of more than one checkpoint: {', '.join(twice)}")
    return found


def of_model(architecture: str) -> dict[str, Checkpoint]:
    """The checkpoints of one model, dense ones on it as a backbone included, by tag.

    Examples:
        >>> from foveal.weights.manifest import of_model
        >>> "in1k" in of_model("dinat_mini")
        True
    """
    return {each.tag: each for each in checkpoints().values() if each.model == architecture}


def _checked(row: dict[str, Any]) -> Checkpoint:
    name = f"{row.get('model')}.{row.get('tag')}"
    fields = {each.name: each for each in dataclasses.fields(Checkpoint)}
    if unknown := sorted(set(row) - set(fields)):
        raise ManifestError(f"{name}: unknown {', '.join(unknown)}")
    needed = {key for key, each in fields.items() if each.default is each.default_factory is dataclasses.MISSING}
    if missing := sorted(key for key in needed if not isinstance(row.get(key), str)):
        raise ManifestError(f"{name}: {', '.join(missing)} missing or no text")
    row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    checkpoint = Checkpoint(**row)

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise ManifestError(f"{name}: {what}")

    demand(bool(checkpoint.address) != bool(checkpoint.page and checkpoint.file), "an address, or a page and a file")
    for place in checkpoint.addresses:
        demand(bool(re.fullmatch(r"https://\S+/\S+|hf://[^/\s]+/[^/\s]+", place)), f"{place!r} is no address")
    demand(checkpoint.task in TASKS, f"task {checkpoint.task!r} is none of {', '.join(TASKS)}")
    demand(checkpoint.keys in FORMATS, f"keys {checkpoint.keys!r} is none of {', '.join(FORMATS)}")
    demand(set(checkpoint.score) <= set(SCORES), f"scores {sorted(checkpoint.score)}, known are {', '.join(SCORES)}")
    demand(checkpoint.channel_order in (None, "rgb", "bgr"), f"channel_order {checkpoint.channel_order!r}, rgb or bgr")
    demand(all(0 < value < 100 for value in checkpoint.score.values()), f"scores {checkpoint.score} are not per cent")
    sha256 = checkpoint.sha256
    demand(sha256 is None or re.fullmatch(r"[0-9a-f]{8,64}", str(sha256)) is not None, f"sha256 {sha256!r}")
    if checkpoint.task == "classify":
        demand(None not in (checkpoint.classes, checkpoint.input, checkpoint.crop, checkpoint.interpolation), "inputs")
    demand(None not in (checkpoint.mean, checkpoint.std), "mean and std")
    return checkpoint


# ---- what the backbones know of it


def backbone_table() -> tuple[dict[str, dict[str, Any]], dict[str, tuple[str, ...]], dict[str, str]]:
    """What published.py holds: the facts of classification checkpoints in timm's words, by family and name; other
    places of the file than those facts name; and the hashes that are known."""
    facts: dict[str, dict[str, Any]] = {}
    places: dict[str, tuple[str, ...]] = {}
    hashes: dict[str, str] = {}
    for name, each in checkpoints().items():
        if each.task != "classify":
            continue
        url = next((place for place in each.addresses if place.startswith("https://")), None)
        hub = next((place for place in (each.address, *each.mirrors) if place and place.startswith("hf://")), None)
        row = {"url": url, "hf_hub_id": hub and hub.removeprefix("hf://"), "license": each.weights_licence}
        row |= {key: value for key, value in each.preprocessing().items() if value != DEFAULTS[key]}
        facts.setdefault(each.family, {})[name] = {key: value for key, value in row.items() if value is not None}
        if rest := tuple(place for place in each.addresses if place not in (url, hub)):
            places[name] = rest
        if each.sha256:
            hashes[name] = each.sha256
    return facts, places, hashes


def render() -> str:
    """The source of ``backbones/published.py``."""
    facts, places, hashes = backbone_table()
    return (
        '"""What is published of the models here: written by ``python -m foveal.weights.manifest``, do not edit."""\n\n'
        "from __future__ import annotations\n\nfrom typing import Any\n\n"
        "# of every row below that does not say otherwise\n"
        f"DEFAULTS: dict[str, Any] = {_source(DEFAULTS)}\n\n"
        "# by family and name, the fields of timm's PretrainedCfg\n"
        f"PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {_source(facts)}\n\n"
        "# other places of the file, tried after those\n"
        f"MIRRORS: dict[str, tuple[str, ...]] = {_source(places)}\n\n"
        "# of the file, or how it begins\n"
        f"SHA256: dict[str, str] = {_source(hashes)}\n"
    )


def _source(value: Any, indent: str = "") -> str:
    """A value as ruff formats it."""
    if isinstance(value, dict):
        inner = indent + "    "
        rows = "".join(f"{inner}{json.dumps(key)}: {_source(each, inner)},\n" for key, each in value.items())
        return f"{{\n{rows}{indent}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_source, value))}{',' if len(value) == 1 else ''})"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def main() -> None:
    target = Path(__file__).parents[1] / "backbones" / "published.py"
    temporary = target.with_suffix(".new")
    temporary.write_text(render(), encoding="utf-8")
    os.replace(temporary, target)
    print(f"{target}: {len(checkpoints())} checkpoints in the manifest")


if __name__ == "__main__":
    main()
