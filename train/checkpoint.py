"""Checkpoints: folders that timm loads, plus the state of the trainer, written so that a kill never loses the old one.

A checkpoint folder has ``config.json`` and ``model.safetensors`` for ``timm.create_model("local-dir:FOLDER",
pretrained=True)``: the evaluated weights, which are the averaged ones with EMA. ``last/`` also has ``trainer.pt`` (read
with ``weights_only=True``), with EMA the raw weights in ``raw.safetensors``, and ``checksums.json`` of all files. A
folder is written under a temporary name, synced to disk and renamed; previous ones are kept as ``NAME.old``,
``NAME.old2`` ..., see :func:`generations`.
"""

import errno
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import adapt_input_conv, save_for_hf
from torch import Tensor, nn

from ..backbones.download import file_sha256
from ..backbones.loading import read_weights
from ..errors import RunError
from ..heads.legacy import migrate_state_dict

WEIGHTS = "model.safetensors"
RAW = "raw.safetensors"
TRAINER = "trainer.pt"
FULL = 2**16  # bytes left on a disk that took no more
CHECKSUMS = "checksums.json"


class CheckpointError(RunError):
    """A checkpoint cannot be read or written; the message is meant for the user."""


class DamagedError(CheckpointError):
    """Files of a checkpoint do not match their checksums."""


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(folder: Path, fill: Callable[[Path], None], keep: int = 1) -> None:
    """Replace ``folder`` by the files that ``fill`` writes, or leave it unchanged on failure.

    Args:
        keep: number of folders to keep: ``folder`` and the newest previous ones.

    Raises:
        CheckpointError: writing failed (for example a full disk); the temporary folder is removed, the old ones are
            intact.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        temporary.mkdir(parents=True)
        fill(temporary)
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        shifted = [(path, _older(folder, age)) for age, path in enumerate(generations(folder)[: max(keep - 1, 1)], 1)]
        for path, place in reversed(shifted):
            if path != place:
                shutil.rmtree(place, ignore_errors=True)
                path.rename(place)
        temporary.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, RuntimeError) and shutil.disk_usage(temporary.parent).free < FULL:  # torch.save's words
            reason = os.strerror(errno.ENOSPC)
        shutil.rmtree(temporary, ignore_errors=True)
        kept = newest(folder)
        raise CheckpointError(
            f"the checkpoint {folder} could not be written: {reason}; "
            + (f"{kept} from before is intact" if kept else "there was none before")
        ) from error
    for old in generations(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def _older(folder: Path, age: int) -> Path:
    return folder.with_name(f"{folder.name}.old{age if age > 1 else ''}")


def generations(folder: Path) -> list[Path]:
    """``folder`` and the previous ones that exist, newest first."""
    older = folder.parent.glob(f"{folder.name}.old*") if folder.parent.is_dir() else ()
    ages = {path: path.name.removeprefix(f"{folder.name}.old") or "1" for path in older}
    kept = sorted((path for path, age in ages.items() if age.isdigit()), key=lambda path: int(ages[path]))
    return [path for path in (folder, *kept) if path.is_dir()]


def newest(folder: Path) -> Path | None:
    """``folder``, or the previous one if the run was killed between the two renames, or None."""
    return next(iter(generations(folder)), None)


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}


def seal(folder: Path) -> None:
    """Write ``checksums.json`` with the SHA-256 of every file of ``folder``."""
    (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder), indent=2) + "\n", encoding="utf-8")


def verify(folder: Path) -> None:
    """Compare the files of ``folder`` with their checksums.

    Raises:
        DamagedError: a file is missing or damaged; the message names it.
    """
    try:
        written, found = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")), _checksums(folder)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{folder / CHECKSUMS} cannot be checked: {error}") from error
    if not isinstance(written, dict):
        raise DamagedError(f"{folder / CHECKSUMS} holds no checksums")
    for name, value in written.items():
        if name not in found:
            raise DamagedError(f"{folder / name} is missing")
        if found[name] != value:
            raise DamagedError(f"{folder / name} is damaged: its SHA-256 is not the one that was written")


def save_model(folder: Path, model: nn.Module, model_args: Mapping[str, Any], classes: list[str]) -> None:
    """Write ``config.json`` and ``model.safetensors`` of ``model`` into an existing folder, in timm's format."""

    def contiguous(_: nn.Module, state: dict[str, Tensor], *__: Any) -> None:
        state.update({name: tensor.contiguous() for name, tensor in state.items()})  # channels-last weights are not

    hook = model.register_state_dict_post_hook(contiguous)
    try:
        config = {"label_names": list(classes)}
        save_for_hf(model, str(folder), config, model_args=dict(model_args), safe_serialization=True)
    finally:
        hook.remove()
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if "num_classes" in content.get("model_args", {}):  # also in the configuration; transformers takes no second one
        del content["model_args"]["num_classes"]
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_epoch(folder: Path, epoch: int) -> None:
    """Add the epoch to ``config.json`` of a model folder."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"epoch": epoch}, indent=2), encoding="utf-8")


def read_epoch(folder: Path) -> int | None:
    """The epoch from :func:`write_epoch`; None if there is none.

    Raises:
        CheckpointError: ``config.json`` cannot be read.
    """
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("epoch")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} can't be read: {error}") from None


def save_raw(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the raw weights, in addition to the averaged ones."""
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, folder / RAW)


def save_trainer(folder: Path, state: dict[str, Any]) -> None:
    """Write the trainer's state: only tensors and plain Python values."""
    with (folder / TRAINER).open("wb") as file:
        torch.save(state, file)


def read_trainer(folder: Path) -> dict[str, Any]:
    """The state from `save_trainer`, in a folder that has passed `verify`."""
    state = torch.load(folder / TRAINER, map_location="cpu", weights_only=True)
    if state.get("format") != 1:
        raise CheckpointError(f"{folder / TRAINER} is of another version: format {state.get('format')}, not 1")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file by name, without running code from it.

    Raises:
        CheckpointError: the file is missing or damaged, or has other content.
    """
    try:
        tensors = read_weights(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if other := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path} holds no model weights: {other[0]} is no tensor")
    return tensors


def find_weights(source: str | Path) -> Path:
    """The weights file of a file, a timm folder, or a run folder (its ``best/``)."""
    path = Path(source)
    if path.is_dir():
        for folder in filter(None, (path, newest(path / "best"))):
            for name in (WEIGHTS, "pytorch_model.bin"):
                if (folder / name).is_file():
                    return folder / name
        raise CheckpointError(f"{path} holds neither {WEIGHTS} nor pytorch_model.bin, nor best/ with one")
    if not path.is_file():
        raise CheckpointError(f"the checkpoint {path} does not exist")
    return path


def _differences(tensors: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    own = model.state_dict()
    lines = []
    missing, foreign = [k for k in own if k not in tensors], [k for k in tensors if k not in own]
    shapes = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing:
        lines.append(f"{len(missing)} of {len(own)} tensors are missing ({', '.join(missing[:3])})")
    if foreign:
        lines.append(f"{len(foreign)} are foreign ({', '.join(foreign[:3])})")
    if shapes:
        pairs = (f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}" for k in shapes[:3])
        lines.append(f"{len(shapes)} have another shape ({', '.join(pairs)})")
    return lines


def read_exact(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors of a file, whose names and shapes must equal the model's.

    Raises:
        CheckpointError: unreadable, or not of this model.
    """
    tensors = migrate_state_dict(read_tensors(path))
    differences = _differences(tensors, model)
    if differences:
        raise CheckpointError(f"{path} is not a checkpoint of this model: {'; '.join(differences)}")
    return tensors


def load_exact(model: nn.Module, path: Path) -> None:
    """Load a file, whose names and shapes must equal the model's; nothing is loaded unless everything fits."""
    model.load_state_dict(read_exact(model, path))


def _layers(model: Any, key: str) -> tuple[str, ...]:
    """Names of layers in ``pretrained_cfg``."""
    found = model.pretrained_cfg.get(key) or ()
    return (found,) if isinstance(found, str) else tuple(found)


def load_initial(model: nn.Module, source: str | Path) -> list[str]:
    """Load initial weights, in any key format of the model family, without a classifier for other classes; the first
    convolution of RGB images is adapted to other channels.

    Returns:
        The names of the tensors that are not loaded: none, or those of the classifier.

    Raises:
        CheckpointError: unreadable, or not of this model, which is then unchanged.
    """
    path = find_weights(source)
    tensors = read_tensors(path)
    if _differences(tensors, model):
        family = sys.modules[type(model).__module__]
        remap = getattr(family, "checkpoint_filter_fn", None)
        if remap is not None:
            arguments = (tensors, model) if len(inspect.signature(remap).parameters) > 1 else (tensors,)
            try:
                tensors = dict(remap(*arguments))
            except (KeyError, IndexError, ValueError, RuntimeError, AttributeError) as error:
                raise CheckpointError(f"{path} is not a checkpoint of this model: {error!r}") from None
    own = model.state_dict()
    for name in (f"{layer}.weight" for layer in _layers(model, "first_conv")):
        if name in tensors and tensors[name].ndim == 4 and tensors[name].shape[1] == 3 != own[name].shape[1]:
            tensors[name] = adapt_input_conv(own[name].shape[1], tensors[name])  # as timm's pretrained=True
    heads = _layers(model, "classifier")
    dropped = [
        name
        for name in own
        if name.rpartition(".")[0] in heads and name in tensors and tensors[name].shape != own[name].shape
    ]
    tensors |= {name: own[name] for name in dropped}
    differences = _differences(tensors, model)
    if differences:
        raise CheckpointError(f"{path} is not a checkpoint of this model: {'; '.join(differences)}")
    model.load_state_dict(tensors)
    return dropped
