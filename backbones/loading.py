"""Load a model with its weights from a model name, a training run, a model folder or a file."""

from __future__ import annotations

import difflib
import json
import pickle
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict, get_arch_pretrained_cfgs, get_pretrained_cfg, is_model
from torch import nn

from . import download
from .base import ARGUMENTS, Unread, registered_cfg, scored_raw

WEIGHTS = "model.safetensors"
# Names of the weights file in a model folder, in timm's order of preference.
WEIGHT_FILES = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")

# Names of the averaged and the raw weights in a checkpoint.
_AVERAGED, _RAW = ("state_dict_ema", "model_ema"), ("state_dict", "model")

# Exceptions of zipfile's and torch's readers for damaged files.
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
_UNREADABLE += (ArithmeticError, MemoryError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Source:
    """A resolved source: a registered model, or a folder (and possibly one file) of weights."""

    architecture: str
    tag: str | None = None
    folder: Path | None = None
    file: Path | None = None
    config: dict[str, Any] | None = None  # of the folder: its config.json

    @property
    def name(self) -> str:
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture


def local_path(source: str | Path) -> Path:
    """The path of ``local-dir:FOLDER``, ``~/FOLDER`` or a plain path; it need not exist."""
    return Path(str(source).removeprefix("local-dir:")).expanduser()


def resolve(source: str | Path) -> Source:
    """Resolve `source`; see `load` for its forms and the errors."""
    text = str(source)
    if not text.strip():
        raise ValueError("the model name is empty; `foveal list` shows the names")
    path = local_path(source)
    if not isinstance(source, Path) and not text.startswith("local-dir:") and is_model(text):
        return _resolve_name(text)
    if path.is_dir():
        return _resolve_folder(path)
    if path.suffix == ".safetensors" and path.is_file():
        if not (path.parent / "config.json").is_file():
            raise ValueError(
                f"{path} has no config.json next to it, so its architecture is unknown: "
                f"`foveal convert {path} --model NAME --output FOLDER` writes a model folder"
            )
        folder = _resolve_folder(path.parent, runs=False)
        return Source(folder.architecture, folder=path.parent, file=path, config=folder.config)
    if path.is_file():
        raise ValueError(f"{path} {_other_file(path)}")
    raise ValueError(f"{text!r} is no model name, folder or .safetensors file{_nearest(text)}")


def load(source: str | Path, **kwargs: Any) -> nn.Module:
    """Build a model in evaluation mode, with its trained weights.

    Args:
        source: a model name with published weights (``"dinat_tiny"``, ``"dinat_large.in22k_ft_in1k"``); a run folder of
            ``foveal train`` (its ``best/`` is loaded); a model folder in timm's format (``config.json`` and
            ``model.safetensors``); or a ``.safetensors`` file in such a folder.
        kwargs: passed to `timm.create_model`: ``num_classes``, ``in_chans``, ``features_only`` ...

    Raises:
        ValueError: if `source` is none of these, names an unknown architecture, or has no weights that fit it.
        OSError: if published weights cannot be downloaded.
    """
    found = resolve(source)
    if found.folder is not None:
        return _build(f"local-dir:{found.folder}", found.architecture, weights_file(found), kwargs)
    cfg = get_pretrained_cfg(found.name)
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if cfg is None or not (cfg.has_weights or overlay.get("file") or overlay.get("state_dict")):
        raise ValueError(
            f"{found.architecture} has no weights to fetch. Train it (foveal train classify CONFIG), or build it with "
            f'random ones: timm.create_model("{found.architecture}"). {" ".join((cfg and cfg.notes) or ())}'.rstrip()
        )
    if overlay.get("state_dict") or cfg.custom_load:  # already tensors, or a format that only timm supports
        return timm.create_model(found.name, pretrained=True, **kwargs).eval()
    file = overlay.get("file") or download.fetch(found.name, download.addresses(cfg))
    return _build(found.name, found.architecture, Path(file), kwargs)


def weights_file(found: Source) -> Path:
    """The weights file of a resolved folder."""
    if found.file is not None:
        return found.file
    folder = found.folder
    assert folder is not None, found
    return next(folder / name for name in WEIGHT_FILES if (folder / name).is_file())


def _build(name: str, architecture: str, file: Path, kwargs: dict[str, Any]) -> nn.Module:
    """Create a model with the weights of a file. timm gets tensors, since older versions unpickle unsafely."""
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    overlay |= {"source": None, "file": None, "state_dict": read_weights(file, architecture)}
    try:
        model: Any = timm.create_model(name, pretrained=True, **{**kwargs, "pretrained_cfg_overlay": overlay})
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file} does not fit {architecture}: {first_lines(error)}") from error
    model.pretrained_cfg |= {"state_dict": None, "file": str(file)}  # do not keep the tensors twice
    return model.eval()


def read_weights(file: Path, architecture: str = "") -> dict[str, Any]:
    """The tensors of a safetensors file or a pickle of only tensors. If it has averaged (EMA) and raw ones, those of
    the published score of ``architecture``; the averaged ones if unknown.

    Raises:
        ValueError: it is damaged, or has other objects or no tensors.
    """
    checkpoint = read_checkpoint(file)
    raw = scored_raw(architecture) and any(isinstance(checkpoint.get(key), dict) for key in _RAW)
    return without_wrappers(pick_weights(checkpoint, file, ema=False if raw else None)[0])


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a file: tensors by name, possibly nested, and other entries. Runs no code from the file.

    Raises:
        ValueError: it is damaged, or a pickle with other objects than tensors, numbers and strings.
    """
    with file.open("rb"):
        pass  # from here on an OSError comes from the content
    if file.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    broken = None
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()  # torch.load does not check checksums
        with torch.serialization.safe_globals(ARGUMENTS):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # torch names the first object that is not allowed
        if refused and broken is None and (read := _without_history(file)) is not None:
            return read
        if refused and broken is None:
            raise ValueError(
                f"{file} contains other objects than tensors ({refused[1]}), which could run code, and is not read; "
                f"save the weights as {WEIGHTS} instead"
            ) from error
        # torch's first line suggests unsafe loading
        detail = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = detail[1] if detail else first_lines(error, 1) or type(error).__name__
        raise ValueError(f"{file} is damaged, truncated, or not a weights file: {reason}") from error
    if broken is not None:
        raise ValueError(f"{file} is damaged: wrong checksum of {broken}")
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file} contains no named tensors but a {type(checkpoint).__name__}")
    return checkpoint


_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
# of which mmengine's buffers of losses consist, beside it
_OF_HISTORY = {"builtins.getattr", "numpy.ndarray", "numpy.dtype"} | {
    f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}


def _without_history(file: Path) -> dict[str, Any] | None:
    """A checkpoint of mmengine without its loss history; None for others. The history's classes and functions are
    replaced by `Unread`, so none of them runs."""
    try:
        wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        if _HISTORY not in wanted or not wanted <= {_HISTORY, *_OF_HISTORY}:
            return None
        stand_ins = [(Unread, name) for name in wanted]
        with torch.serialization.safe_globals([*ARGUMENTS, *stand_ins]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE:
        return None
    return checkpoint if isinstance(checkpoint, dict) else None


def pick_weights(checkpoint: dict[str, Any], file: Path, ema: bool | None = None) -> tuple[dict[str, Any], bool]:
    """The named tensors in a checkpoint, and whether they are the averaged (EMA) ones.

    Args:
        ema: averaged weights (True), raw ones (False), or averaged if there are any (None).

    Raises:
        ValueError: there are none of that kind.
    """
    held = {
        kind: checkpoint[key]
        for kind, keys in ((True, _AVERAGED), (False, _RAW))
        for key in keys[::-1]
        if isinstance(checkpoint.get(key), dict)
    }
    held = held or {False: checkpoint}
    averaged = True in held if ema is None else ema
    if averaged not in held:
        asked, other = ("averaged (EMA)", "raw") if averaged else ("raw", "averaged (EMA)")
        raise ValueError(f"{file} has no {asked} weights, only {other} ones")
    state = held[averaged]
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} has no named tensors")
    return state, averaged


def without_wrappers(state: dict[str, Any]) -> dict[str, Any]:
    """The state by the names of the model's own modules, without the prefixes of DDP (the first) and of torch.compile,
    which may have wrapped any of them."""
    plain = {re.sub(r"(^|\.)(_orig_mod\.)+", r"\1", str(name)): value for name, value in state.items()}
    return clean_state_dict(plain)


def unknown_model(name: str) -> ValueError:
    """The error for a model name that is not registered, with the nearest names that are."""
    return ValueError(f"unknown model {name!r}{_nearest(name)}; one of your own is known after --import MODULE")


def _resolve_name(text: str) -> Source:
    architecture, _, tag = text.partition(".")
    known = get_arch_pretrained_cfgs(architecture)
    if tag and text not in known:
        tags = ", ".join(sorted(name.partition(".")[2] for name in known if "." in name)) or "none"
        raise ValueError(f"{architecture} has no weights tagged {tag!r}; its tags: {tags}")
    return Source(architecture, tag=tag or registered_cfg(architecture).tag)


def _resolve_folder(folder: Path, runs: bool = True) -> Source:
    # a run replaces best/ by two renames; if killed between them, it leaves the previous one as best.old/
    for best in ("best", "best.old"):
        if runs and (folder / best / "config.json").is_file():
            folder = folder / best
            break
    config_file = folder / "config.json"
    if not config_file.is_file():
        refuse_exported(folder)
        unfinished = runs and (folder / "config.yaml").is_file()
        raise ValueError(
            f"{folder} is a training run without a finished epoch: it has no best/"
            if unfinished
            else f"{folder} is no model folder (it has no config.json) and no training run (it has no best/)"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file} is not JSON: {error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise ValueError(f"{config_file} does not name a timm architecture; it was written by another library")
    if not is_model(architecture):
        raise ValueError(f"{config_file}: {unknown_model(architecture)}")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        refuse_exported(folder)
        raise ValueError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)}")
    return Source(architecture, folder=folder, config=config)


# Exported programs, which cannot be loaded as weights of a PyTorch model.
EXPORTED = {
    "model.onnx": "ONNX, for onnxruntime",
    "model.pt2": "a compiled or exported program, for torch.export.load or torch._inductor.aoti_load_package",
    "model.xml": "OpenVINO's format, for its runtime",
    "model.mlpackage": "Core ML, for macOS and iOS",
}


def refuse_exported(folder: Path) -> None:
    """Raise ValueError if a folder has an exported program instead of weights."""
    found = [name for name in EXPORTED if (folder / name).exists()]
    if found and not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ValueError(
            f"{folder} is an export: {found[0]} is {EXPORTED[found[0]]}, and cannot be loaded as a PyTorch model; "
            "load what it was exported from, or export that --to safetensors. Its README.md shows how to run it"
        )


def _other_file(path: Path) -> str:
    """Description of a file that cannot be loaded."""
    for name, what in EXPORTED.items():
        if path.suffix == Path(name).suffix:
            return f"is {what}, and cannot be loaded as a PyTorch model"
    if path.suffix in (".pth", ".pt", ".bin", ".tar", ".ckpt"):
        return "has only weights: `foveal convert FILE --model NAME --output FOLDER` converts it to a model folder"
    return "is neither a folder nor a .safetensors file"


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
    return f"; nearest: {', '.join(near)}" if near else "; `foveal list` shows the names"


def first_lines(error: BaseException, count: int = 3) -> str:
    """The first lines of an error's message, as one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) + (" ..." if len(lines) > count else "")
