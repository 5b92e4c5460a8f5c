"""Whether a converted model folder still holds what was converted, and whether that is what was published."""

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
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str


def verify(folder: str | Path, images: str | Path | None = None, write_card: bool = False) -> Iterator[Check]:
    """Check a folder that `convert` wrote, one thing after the other.

    The file against its hash; the names in it against the model's; the number of parameters against the record and the
    published one, where that is known; the outputs for a fixed image against those of the original tensors (of a
    detector, what its heads compute before they select); preprocessing and licence against the manifest; and with
    ``images``, an ImageFolder, the top-1 score.

    Args:
        images: a folder with a folder of images for each class, named in the order of the classes (or as the
            ``label_names`` of the model's configuration).
        write_card: write the score into the folder's card.

    Raises:
        ValueError: if the folder was not written by `convert`, its record is damaged, the folders of ``images`` are not
            the classes, the model is no classifier, or the card is to be written without images.
        OSError: if something cannot be read.

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
        raise FileNotFoundError(f"{path} does not exist; `foveal verify` checks a folder that `foveal convert` wrote")
    found = read_folder(path)
    record = _record(found)
    if write_card and images is None:
        raise ValueError("--card writes the score into the card: give --images, too")
    if images is not None and found.dense:
        raise ValueError(
            f"{path} is a model to {found.config['task']}: `foveal evaluate` scores it, with data.root=..."
        )
    digest, known = file_sha256(found.weights), record["model_sha256"]
    yield Check("file", digest == known, f"sha256 {digest}" + ("" if digest == known else f", it was {known}"))
    try:
        model = load_raw(found.path)
    except (ValueError, TypeError) as error:  # the latter of arguments that a model does not take
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
    """What `convert` recorded, with the entries that are compared."""
    record = found.record
    if record is None:
        raise ValueError(
            f"{found.path} has no record of a conversion; `foveal verify` checks what `foveal convert` wrote"
        )
    try:
        outputs = [
            {"shape": list(each["shape"]), "values": list(map(float, each["values"]))}
            | {key: float(each[key]) for key in ("norm", "largest")}
            for each in record["fingerprint"]["outputs"]
        ]
        shape = [int(each) for each in record["fingerprint"]["input"]]
        if len(shape) != 4 or not isinstance(record["checkpoint"], (str, type(None))):
            raise ValueError(f"input {shape}, checkpoint {record['checkpoint']!r}")
        compared = {"parameters": int(record["parameters"]), "model_sha256": str(record["model_sha256"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the record of the conversion in {found.path / 'config.json'} is damaged: {error!r}"
        ) from error
    return record | compared | {"fingerprint": {"input": shape, "outputs": outputs}}


def _checks(model: Any, found: ModelFolder, record: Mapping[str, Any]) -> Iterator[Check]:
    """Names, parameters, outputs, and what is published."""
    inner = model.model if isinstance(model, RawOutputs) else without_getter(model)
    with safe_open(found.weights, framework="pt") as stream:
        stored = set(migrate_state_dict(dict.fromkeys(stream.keys())))
    own = set(inner.state_dict())
    other = ", ".join(sorted(stored ^ own)[:8])
    yield Check("names", stored == own, f"{len(own)} tensors" + (f"; only in one: {other}" if other else ""))
    checkpoint = checkpoints().get(record["checkpoint"])
    yield _parameters(inner, record, checkpoint)
    apart = difference(fingerprint(model, tuple(record["fingerprint"]["input"][1:])), record["fingerprint"])
    what = f"{apart:.1e} of the largest value from the original's, {TOLERANCE:g} allowed"
    yield Check("outputs for the fixed image", apart <= TOLERANCE, what)
    if checkpoint is not None:
        yield _published(found.config, checkpoint)
    elif record["checkpoint"] is not None:
        yield Check("as the manifest says", False, f"it has no {record['checkpoint']}")


def _parameters(model: Any, record: Mapping[str, Any], checkpoint: Checkpoint | None) -> Check:
    count = sum(p.numel() for p in model.parameters())
    passed, text = count == record["parameters"], f"{count:,}"
    if not passed:
        text += f", recorded were {record['parameters']:,}"
    if checkpoint is not None and checkpoint.parameters is not None and checkpoint.task == "classify":
        # as many digits as are published
        published = f"{checkpoint.parameters:g}"
        digits = len(published.partition(".")[2])
        fits = math.isclose(round(count / 1e6, digits), checkpoint.parameters, abs_tol=0.6 * 10**-digits)
        passed, text = passed and fits, text + f", published: {published} M"
    return Check("parameters", passed, text)


def _published(config: Mapping[str, Any], checkpoint: Checkpoint) -> Check:
    """Preprocessing and licence of a ``config.json`` against the manifest; of a dense model what it has of them."""
    if "pretrained_cfg" in config:
        cfg: Mapping[str, Any] = config["pretrained_cfg"]
        expected = {**checkpoint.preprocessing(), "license": checkpoint.weights_licence}
    else:
        cfg = config["arguments"]
        expected = {"mean": checkpoint.mean, "std": checkpoint.std, **checkpoint.arguments}

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    wrong = [f"{k} {cfg.get(k)}, not {plain(v)}" for k, v in expected.items() if cfg.get(k) != plain(v)]
    return Check("as the manifest says", not wrong, "; ".join(wrong) or ", ".join(expected))
