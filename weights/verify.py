"""Verify a converted model folder against the record of its conversion and the published checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..backbones import loading
from ..backbones.download import file_sha256
from ..files import atomic
from ..heads.legacy import migrate_state_dict
from .cards import converted_card
from .convert import load_raw
from .fingerprint import RawOutputs, difference, fingerprint
from .folder import TOLERANCE, ModelFolder, read_folder
from .images import top1
from .manifest import Checkpoint, checkpoints
from .names import without_getter


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool
    detail: str


def verify(folder: str | Path, images: str | Path | None = None, write_card: bool = False) -> Iterator[Check]:
    """Check a folder that `convert` wrote, yielding one `Check` after the other.

    The checks: hash of the file; names of the tensors; number of parameters against the record and the publication, if
    known; outputs for a fixed image against those of the original tensors (for a detector before it selects
    detections); preprocessing and licence against the manifest; with ``images`` also the top-1 score.

    Args:
        images: an ImageFolder with a folder for each class, sorted like the classes (or named by ``label_names`` in
            config.json).
        write_card: write the score into the folder's card.

    Raises:
        ValueError: `convert` did not write the folder, its record is damaged, the folders of ``images`` are not the
            classes, the model is not a classifier, or ``write_card`` without ``images``.
        OSError: a file cannot be read.

    Examples:
        >>> import timm, torch
        >>> torch.save(timm.create_model("test_foveal_dinat", num_classes=3).state_dict(), "weights.pth")
        >>> from foveal.weights.convert import convert
        >>> from foveal.weights.verify import verify
        >>> _ = convert("weights.pth", "folder", model="test_foveal_dinat")
        >>> for check in verify("folder"):
        ...     print(check.name, check.passed)
        file True
        names True
        parameters True
        outputs for the fixed image True
    """
    path = loading.local_path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass a folder that `foveal convert` wrote")
    found = read_folder(path)
    record = _record(found)
    if write_card and images is None:
        raise ValueError("--card writes the score: pass --images as well")
    if images is not None and found.dense:
        raise ValueError(f"the task of {path} is {found.config['task']}: use `foveal evaluate` with data.root=...")
    digest, known = file_sha256(found.weights), record["model_sha256"]
    yield Check("file", digest == known, f"sha256 {digest}" + ("" if digest == known else f", it was {known}"))
    try:
        model = load_raw(found.path)
    except (ValueError, TypeError) as error:  # the latter for unknown arguments of a model
        yield Check("loads", False, str(error))
        return
    yield from _checks(model, found, record)
    if images is not None:
        score, count = top1(model, images, found.config)
        text = f"top-1 {score:.3f} % on {count:,} images"
        checkpoint = checkpoints().get(record["checkpoint"])
        expected = checkpoint.score.get("top1") if checkpoint is not None else None
        yield Check("score", True, text + (f", published: {expected:g}" if expected is not None else ""))
        if write_card:
            with atomic(found.path / "README.md") as new:
                new.write_text(converted_card(found.config, text), encoding="utf-8")


def _record(found: ModelFolder) -> dict[str, Any]:
    """The record of the conversion, with the entries and types that the checks need."""
    record = found.record
    if record is None:
        raise ValueError(f"{found.path} has no record of a conversion; pass a folder that `foveal convert` wrote")
    try:
        keys = ("fingerprint", "checkpoint", "parameters", "model_sha256")
        recorded, checkpoint, count, digest = (record[key] for key in keys)
        if difference(recorded, recorded) != 0 or len(recorded["input"]) != 4:
            raise ValueError(f"fingerprint of {recorded['input']}")
        if not (isinstance(checkpoint, (str, type(None))) and isinstance(count, int) and isinstance(digest, str)):
            raise ValueError(f"checkpoint {checkpoint!r}, parameters {count!r}, model_sha256 {digest!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found.path / 'config.json'}: damaged record of the conversion: {error!r}") from error
    return record


def _checks(model: Any, found: ModelFolder, record: Mapping[str, Any]) -> Iterator[Check]:
    """Names, parameters, outputs, and the manifest."""
    inner = model.model if isinstance(model, RawOutputs) else without_getter(model)
    with safe_open(found.weights, framework="pt") as stream:
        stored = set(migrate_state_dict(dict.fromkeys(stream.keys())))
    own = set(inner.state_dict())
    other = ", ".join(sorted(stored ^ own)[:8])
    yield Check("names", stored == own, f"{len(own)} tensors" + (f"; only in file or model: {other}" if other else ""))
    checkpoint = checkpoints().get(record["checkpoint"])
    yield _parameters(inner, record, checkpoint)
    apart = difference(fingerprint(model, tuple(record["fingerprint"]["input"][1:])), record["fingerprint"])
    detail = f"difference {apart:.1e} of the largest value, limit {TOLERANCE:g}"
    yield Check("outputs for the fixed image", apart <= TOLERANCE, detail)
    if checkpoint is not None:
        yield _published(found.config, checkpoint)
    elif record["checkpoint"] is not None:
        yield Check("manifest", False, f"no entry {record['checkpoint']}")


def _parameters(model: Any, record: Mapping[str, Any], checkpoint: Checkpoint | None) -> Check:
    count = sum(p.numel() for p in model.parameters())
    passed, text = count == record["parameters"], f"{count:,}"
    if not passed:
        text += f", recorded were {record['parameters']:,}"
    if checkpoint is not None and checkpoint.parameters is not None and checkpoint.task == "classify":
        # to the published number of digits
        published = f"{checkpoint.parameters:g}"
        digits = len(published.partition(".")[2])
        fits = math.isclose(round(count / 1e6, digits), checkpoint.parameters, abs_tol=0.6 * 10**-digits)
        passed, text = passed and fits, text + f", published: {published} M"
    return Check("parameters", passed, text)


def _published(config: Mapping[str, Any], checkpoint: Checkpoint) -> Check:
    """Compare preprocessing, licence and, of a dense model, arguments in ``config.json`` with the manifest."""
    if "pretrained_cfg" in config:
        cfg: Mapping[str, Any] = config["pretrained_cfg"]
        expected = {**checkpoint.preprocessing(), "license": checkpoint.weights_licence}
    else:
        cfg = config["arguments"]
        images = {"mean": checkpoint.mean, "std": checkpoint.std} if checkpoint.task != "upsample" else {}
        expected = {**images, **checkpoint.arguments}

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    wrong = [f"{k} {cfg.get(k)}, not {plain(v)}" for k, v in expected.items() if cfg.get(k) != plain(v)]
    return Check("manifest", not wrong, "; ".join(wrong) or ", ".join(expected))
