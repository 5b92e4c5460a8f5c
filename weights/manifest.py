"""The released checkpoints: ``manifest.yaml``, joined with the ``default_cfgs`` of the classifiers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model

from ..backbones import download
from ..heads.upsamplers import PUBLISHED

FILE = Path(__file__).with_name("manifest.yaml")
TASKS = ("classify", "detect", "segment", "panoptic", "upsample")
KEY_FORMATS = ("authors", "timm", "mmdet", "detectron2")
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

_FAMILY_KEYS = {"code", "licence", "note", "keys", "defaults", "checkpoints"}
# fields that a classifier's PretrainedCfg has under other names
_CFG_FIELDS = {
    "weights_licence": "license",
    "classes": "num_classes",
    "input": "input_size",
    "crop": "crop_pct",
    "crop_mode": "crop_mode",
    "interpolation": "interpolation",
    "mean": "mean",
    "std": "std",
}


class ManifestError(ValueError):
    """An entry of the manifest is invalid; the message names the checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """One released file; the head of manifest.yaml documents the fields.

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
    keys: str
    task: str = "classify"
    address: str | None = None
    page: str | None = None
    file: str | None = None
    mirrors: tuple[str, ...] = ()
    original: str | None = None
    sha256: str | None = None
    score: Mapping[str, float] = field(default_factory=dict)
    parameters: float | None = None
    averaged: bool | None = None
    classes: int | None = None
    input: tuple[int, int, int] | None = None
    crop: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    arguments: Mapping[str, Any] = field(default_factory=dict)
    channel_order: str | None = None
    note: str | None = None
    about: str | None = None  # the family's note

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Address and mirrors, in the order they are tried; empty if the file must be downloaded manually."""
        return (self.address, *self.mirrors) if self.address else ()

    def fetch(self) -> Path:
        """The file, from a cache or the first address that works.

        Raises:
            OSError: no address works (see `backbones.download.fetch`), or there is none.
        """
        if not self.addresses:
            raise OSError(f"{self.file} has no address: download it from {self.page} and name the file")
        return download.fetch(self.name, self.addresses, self.sha256)

    def score_text(self) -> str:
        """The published score as text: ``"top-1 81.8"``; empty if unknown."""
        return ", ".join(f"{SCORES[key]} {value:g}" for key, value in self.score.items())

    def preprocessing(self) -> dict[str, Any]:
        """Inputs and classes as far as known, as fields of timm's ``PretrainedCfg``."""
        values = {theirs: getattr(self, ours) for ours, theirs in _CFG_FIELDS.items() if ours != "weights_licence"}
        return {key: value for key, value in values.items() if value is not None}


@functools.cache
def checkpoints(file: Path = FILE) -> dict[str, Checkpoint]:
    """All checkpoints by their names ``MODEL.TAG``, in the order of the manifest.

    Raises:
        ManifestError: an entry is incomplete, has unknown keys, is a duplicate, or repeats the ``default_cfgs``.

    Examples:
        >>> from foveal.weights.manifest import checkpoints
        >>> checkpoints()["dinat_mini.in1k"].weights_licence
        'mit'
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if PyYAML was built with libyaml
    families = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)["families"]
    found: dict[str, Checkpoint] = {}
    for family, shared in families.items():
        if unknown := sorted(set(shared) - _FAMILY_KEYS):
            raise ManifestError(f"family {family}: unknown {', '.join(unknown)}")
        own = {"family": family, "keys": shared["keys"], "about": shared.get("note"), "code": shared.get("code")}
        own |= {f"{part}_licence": licence for part, licence in shared["licence"].items()}
        for row in shared["checkpoints"]:
            checkpoint = _checkpoint(dict(own), {**shared.get("defaults", {}), **row})
            if checkpoint.name in found:
                raise ManifestError(f"{checkpoint.name} is a duplicate")
            found[checkpoint.name] = checkpoint
    places = [place for each in found.values() for place in each.addresses]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        raise ManifestError(f"more than one checkpoint has the address {', '.join(twice)}")
    return found


def of_model(architecture: str) -> dict[str, Checkpoint]:
    """The checkpoints of one model, dense ones on it as a backbone included, by tag.

    Examples:
        >>> from foveal.weights.manifest import of_model
        >>> "in1k" in of_model("dinat_mini")
        True
    """
    return {each.tag: each for each in checkpoints().values() if each.model == architecture}


def _checkpoint(own: dict[str, Any], row: dict[str, Any]) -> Checkpoint:
    """A row completed by its family, and for classifiers by the ``default_cfgs`` of the model."""
    name = f"{row.get('model')}.{row.get('tag')}"
    if not is_model(str(row.get("model"))):
        raise ManifestError(f"{name}: timm has no such model")
    row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    if row.get("task", "classify") in ("classify", "upsample"):
        row |= _from_cfg(name, row)
    own["code"] = own["code"] or getattr(get_pretrained_cfg(row["model"]), "origin_url", None)
    try:
        checkpoint = Checkpoint(**{**own, **row})
    except TypeError as error:  # an unknown key, or one that is missing
        raise ManifestError(f"{name}: {error}") from error
    if problems := [text for text, wrong in _problems(checkpoint).items() if wrong]:
        raise ManifestError(f"{name}: {'; '.join(problems)}")
    return checkpoint


def _from_cfg(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    upsamplers = {each.checkpoint: each for each in PUBLISHED.values()}
    cfg = upsamplers[name].cfg if name in upsamplers else get_arch_pretrained_cfgs(row["model"]).get(name)
    if cfg is None:
        raise ManifestError(f"{name}: no such tag in the default_cfgs of {row['model']}")
    address, *mirrors = [*download.addresses(cfg), None]
    stated = {"address": address, "mirrors": tuple(mirrors[:-1]), "sha256": download.hash_in_name(address or "")}
    stated |= {ours: getattr(cfg, theirs) for ours, theirs in _CFG_FIELDS.items()}
    if name in upsamplers:  # their classes are timm's default
        stated |= {"classes": None, "arguments": upsamplers[name].arguments}
    if repeated := sorted(set(row) & set(stated)):
        raise ManifestError(f"{name}: {', '.join(repeated)} belong in the default_cfgs of a classifier")
    return stated


def _problems(each: Checkpoint) -> dict[str, Any]:
    """Checks of an entry: (problem, whether it occurs)."""
    places = [
        place for place in each.addresses if not re.fullmatch(r"https://\S+/\S+|hf://[^/\s]+/[^/\s]+(/[^/\s]+)?", place)
    ]
    choices = {"task": TASKS, "keys": KEY_FORMATS, "channel_order": (None, "rgb", "bgr")}
    return {
        f"tag {each.tag!r} must be text": not isinstance(each.tag, str) or not each.tag,
        "requires an address, or a page and a file": bool(each.address) == bool(each.page and each.file),
        f"invalid addresses {places}": places,
        f"unknown scores {sorted(set(each.score) - set(SCORES))}": set(each.score) - set(SCORES),
        f"scores {dict(each.score)} must be percentages": not all(0 < value < 100 for value in each.score.values()),
        f"sha256 {each.sha256!r}": not re.fullmatch(r"[0-9a-f]{8,64}|None", str(each.sha256)),
        **{
            f"{key} {getattr(each, key)!r} must be one of {', '.join(filter(None, known))}": getattr(each, key)
            not in known
            for key, known in choices.items()
        },
    }
