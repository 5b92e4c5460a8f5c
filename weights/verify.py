"""Whether a converted model folder still holds what was converted, and whether that is what was published."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..backbones import loading
from ..backbones.download import file_sha256
from ..files import atomic
from ..heads.build import read_dense_config
from .cards import converted_card
from .convert import answering
from .fingerprint import difference, fingerprint
from .folder import RECORD, TOLERANCE
from .images import top1
from .manifest import Checkpoint, checkpoints


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str


def verify(folder: str | Path, images: str | Path | None = None, write_card: bool = False) -> Iterator[Check]:
    """Check a folder that `convert` wrote, one thing after the other.

    The file against its hash; the names in it against the model's; the number of parameters against the record and the
    published one, where that is known; the answer to a fixed image against the one that the original tensors gave (of a
    detector, what its heads compute before they select);
    preprocessing and licence against the manifest; and with ``images``, an ImageFolder, the top-1 score.

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
        answer to the fixed image True
    """
    folder = loading.local_path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"there is no {folder}; `foveal verify` checks a folder that `foveal convert` wrote")
    whole = read_dense_config(folder)
    if whole is None:
        found = loading.resolve(folder)
        place, config, file = found.folder, found.config or {}, loading.weights_file(found)
    else:
        (place, config), file = whole, whole[0] / loading.WEIGHTS
    record = config.get(RECORD)
    if record is None:
        raise ValueError(f"{folder} has no record of a conversion; `foveal verify` checks what `foveal convert` wrote")
    if damaged := _damaged(record):
        raise ValueError(f"the record of the conversion in {place / 'config.json'} is damaged: {damaged}")
    if write_card and images is None:
        raise ValueError("the score goes into the card, and there is none without images: --card goes with --images")
    if images is not None and whole is not None:
        raise ValueError(f"{folder} is a model to {config['task']}: `foveal evaluate` scores it, with data.root=...")
    digest = file_sha256(file)
    known = record["model_sha256"]
    yield Check("file", digest == known, f"sha256 {digest}" + ("" if digest == known else f", it was {known}"))

    try:
        model = answering(place)
    except (ValueError, TypeError) as error:  # the latter of arguments that a model does not take
        yield Check("loads", False, str(error))
        return
    inner = model.model if type(model).__name__ in ("FeatureGetterNet", "Raw") else model
    with safe_open(file, framework="pt") as stream:
        stored = set(stream.keys())
    own = set(inner.state_dict())
    strange = ", ".join(sorted(stored ^ own)[:8])
    yield Check("names", stored == own, f"{len(own)} tensors" + (f"; only in one: {strange}" if strange else ""))

    checkpoint = checkpoints().get(record["checkpoint"])
    yield _parameters(inner, record, checkpoint)
    apart = difference(fingerprint(model, tuple(record["fingerprint"]["input"][1:])), record["fingerprint"])
    what = f"{apart:.1e} of the largest value from the original's, {TOLERANCE:.0e} allowed"
    yield Check("answer to the fixed image", apart <= TOLERANCE, what)
    if checkpoint is not None:
        yield _published(config, checkpoint)
    elif record["checkpoint"] is not None:
        yield Check("as the manifest says", False, f"it has no {record['checkpoint']}")
    if images is not None:
        score, count = top1(model, images, config)
        text = f"top-1 {score:.3f} % on {count:,} images"
        expected = checkpoint.score.get("top1") if checkpoint is not None else None
        yield Check("score", True, text + (f", published: {expected:g}" if expected is not None else ""))
        if write_card:
            target = place / "README.md"
            with atomic(target) as new:
                new.write_text(converted_card(config, text), encoding="utf-8")


def _damaged(record: Any) -> str | None:
    """What is wrong with the form of a record, in words."""
    kinds = {"checkpoint": (str, type(None)), "fingerprint": dict, "model_sha256": str, "parameters": int}
    if not isinstance(record, dict):
        return f"it is {record!r}"
    if lacking := sorted(set(kinds) - set(record)):
        return f"no {', '.join(lacking)}"
    if wrong := [key for key, kind in kinds.items() if not isinstance(record[key], kind)]:
        return ", ".join(f"{key} is {record[key]!r}" for key in wrong)
    shape, outputs = record["fingerprint"].get("input"), record["fingerprint"].get("outputs")
    if not (isinstance(shape, list) and len(shape) == 4 and all(isinstance(each, int) for each in shape)):
        return f"the fingerprint's input is {shape!r}"
    fields = {"shape", "norm", "largest", "values"}
    if not (isinstance(outputs, list) and all(isinstance(each, dict) and fields <= set(each) for each in outputs)):
        return f"the fingerprint's outputs lack {', '.join(sorted(fields))}"
    return None


def _parameters(model: nn.Module, record: Mapping[str, Any], checkpoint: Checkpoint | None) -> Check:
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
