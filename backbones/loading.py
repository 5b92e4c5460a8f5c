"""Load a model with its weights from whatever names it: a model name, a training run, a model folder, a file."""

from __future__ import annotations

import argparse
import difflib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import huggingface_hub
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict, get_arch_pretrained_cfgs, get_pretrained_cfg, is_model
from torch import nn

from . import list_models

WEIGHTS = "model.safetensors"
# What a model folder may hold its weights in, in timm's order of preference.
_WEIGHT_FILES = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_HUB_FILES = (WEIGHTS, "pytorch_model.bin")  # and what a repository on the hub may
_TIMEOUT = 4  # seconds to find out that a server is out of reach


@dataclass(frozen=True)
class Source:
    """What a user's name turned out to be: a registered model, or a folder (and perhaps one file) of weights."""

    architecture: str
    tag: str | None = None
    folder: Path | None = None
    file: Path | None = None
    config: dict[str, Any] | None = None  # of the folder: its config.json

    @property
    def name(self) -> str:
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture


def resolve(source: str | Path) -> Source:
    """Find out what `source` names; see `load` for what it may be and what is raised."""
    text = str(source)
    if not text.strip():
        raise ValueError("the model name is empty; `foveal list` shows the names")
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if not isinstance(source, Path) and not text.startswith("local-dir:") and is_model(text):
        return _resolve_name(text)
    if path.is_dir():
        return _resolve_folder(path)
    if path.suffix == ".safetensors" and path.is_file():
        folder = _resolve_folder(path.parent, runs=False)
        return Source(folder.architecture, folder=path.parent, file=path, config=folder.config)
    if path.is_file():
        raise ValueError(f"{path} is neither a folder nor a .safetensors file")
    raise ValueError(f"{text!r} is no model name, folder or .safetensors file{_nearest(text)}")


def load(source: str | Path, **kwargs: Any) -> nn.Module:
    """Build a model in evaluation mode, with its trained weights.

    Args:
        source: a model name with published weights (``"dinat_tiny"``, ``"dinat_large.in22k_ft_in1k"``); a folder that
            ``foveal train`` wrote (its ``best/`` is taken); a model folder as timm writes and reads it (``config.json``
            beside ``model.safetensors``); or one ``.safetensors`` file inside such a folder.
        kwargs: passed to `timm.create_model`: ``num_classes``, ``in_chans``, ``features_only`` ...

    Raises:
        ValueError: if `source` is none of these, names an unknown architecture, has no trained weights, or its weights
            do not fit the architecture.
        OSError: if published weights cannot be fetched.
    """
    found = resolve(source)
    if found.folder is None:
        return _load_published(found, kwargs)

    file = found.file or next(found.folder / name for name in _WEIGHT_FILES if (found.folder / name).is_file())
    return _build(f"local-dir:{found.folder}", found.architecture, file, kwargs)


def _build(name: str, architecture: str, file: Path, kwargs: dict[str, Any]) -> nn.Module:
    """Create a model with the weights of a file. timm gets tensors: older versions read pickles that run code."""
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    overlay |= {"source": None, "file": None, "state_dict": _read(file)}
    try:
        model = timm.create_model(name, pretrained=True, **{**kwargs, "pretrained_cfg_overlay": overlay})
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file} does not fit {architecture}: {_first_lines(error)}") from error
    model.pretrained_cfg |= {"state_dict": None, "file": str(file)}  # do not hold the tensors twice
    return model.eval()


def _read(file: Path) -> dict[str, Any]:
    """The tensors of a file, safetensors or a pickle of nothing else."""
    try:
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            # training scripts put their arguments beside the tensors; a Namespace only holds attributes
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged, or holds more than tensors and is not read for safety; save the weights as "
            f"{WEIGHTS} instead"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no named tensors")
    return clean_state_dict(state)


def unknown_model(name: str) -> ValueError:
    """The error for a model name that is not registered, with the nearest names that are."""
    return ValueError(f"unknown model {name!r}{_nearest(name)}")


def _resolve_name(text: str) -> Source:
    architecture, _, tag = text.partition(".")
    known = get_arch_pretrained_cfgs(architecture)
    if tag and text not in known:
        tags = ", ".join(sorted(name.partition(".")[2] for name in known if "." in name)) or "none"
        raise ValueError(f"{architecture} has no weights tagged {tag!r}; its tags: {tags}")
    return Source(architecture, tag=tag or get_pretrained_cfg(architecture).tag)


def _resolve_folder(folder: Path, runs: bool = True) -> Source:
    # a run writes best/ anew and renames it; killed between its two renames, it leaves the last one as best.old/
    for best in ("best", "best.old"):
        if runs and (folder / best / "config.json").is_file():
            folder = folder / best
            break
    config_file = folder / "config.json"
    if not config_file.is_file():
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
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        raise ValueError(f"{folder} has no weights: none of {', '.join(_WEIGHT_FILES)}")
    return Source(architecture, folder=folder, config=config)


def _load_published(found: Source, kwargs: dict[str, Any]) -> nn.Module:
    cfg = get_pretrained_cfg(found.name)
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if cfg is None or not (cfg.has_weights or overlay.get("file") or overlay.get("state_dict")):
        notes = " ".join(["", *(cfg.notes or ())]) if cfg is not None else ""
        raise ValueError(
            f"{found.architecture} has no weights to fetch. Train it (foveal train classify CONFIG), or build it with "
            f'random ones: timm.create_model("{found.architecture}").{notes}'
        )
    if overlay.get("state_dict") or cfg.custom_load:  # tensors already, or a format that timm alone knows
        return timm.create_model(found.name, pretrained=True, **kwargs).eval()
    file = Path(overlay["file"]) if overlay.get("file") else _fetch(found.name, cfg)
    return _build(found.name, found.architecture, file, kwargs)


def _fetch(name: str, cfg: Any) -> Path:
    """The file of published weights: from the caches of torch.hub and the Hugging Face hub, else from either's server.

    Raises:
        OSError: if it is in neither cache and no server answers; the message says where to put it by hand.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(cfg.url).path).name if cfg.url else None
    if cached is not None and cached.is_file():
        return cached
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _HUB_FILES
    for file in names if repository else ():
        path = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(path, str):
            return Path(path)

    failures = []
    if cached is not None:
        try:
            _probe(cfg.url)
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(cfg.url, str(cached), progress=False)
            return cached
        except OSError as error:
            failures.append(f"{cfg.url}: {_first_lines(error)}")
    for file in names if repository else ():
        address = huggingface_hub.hf_hub_url(repository, file, revision=revision or None)
        try:
            _probe(address)  # the hub's own client tries again for a minute
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision or None))
        except OSError as error:
            failures.append(f"{address}: {_first_lines(error)}")
            if not isinstance(error, HTTPError):
                break  # no server, so no other file of it
    advice = (
        f"Download {cfg.url} elsewhere and put it at {cached}" if cached else f"See https://huggingface.co/{repository}"
    )
    raise OSError(f"cannot fetch the weights of {name} ({'; '.join(failures)}). {advice}")


def _probe(address: str) -> None:
    """Raise OSError quickly if an address is out of reach or has nothing."""
    with urlopen(Request(address, method="HEAD", headers={"User-Agent": "foveal"}), timeout=_TIMEOUT):
        pass


def _nearest(name: str) -> str:
    def closeness(candidates: list[str]) -> float:  # of the best, which comes first
        return difflib.SequenceMatcher(None, name, candidates[0]).ratio() if candidates else 0.0

    ours = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
    others = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.7)
    near = ours if closeness(ours) >= closeness(others) else others
    return f"; nearest: {', '.join(near)}" if near else "; `foveal list` shows the names"


def _first_lines(error: BaseException, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) + (" ..." if len(lines) > count else "")
