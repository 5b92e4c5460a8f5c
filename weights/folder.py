"""What a model folder is (``config.json``, the model's files, a card README.md), and how one is written.

`foveal.load` and ``timm.create_model("local-dir:...", pretrained=True)`` read those that hold safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones import loading
from ..backbones.loading import WEIGHT_FILES, WEIGHTS
from ..heads.checkpoint import read_dense_config

TOLERANCE = 1e-4  # of the largest value: what the outputs of a written model may differ from the original's
RECORD = "conversion"  # the part of a config.json that `foveal convert` adds
CHECKPOINT = "checkpoint"  # in the record, and in the config.json of an export: the name in the manifest

# The model files of each format, beside config.json and the card.
MODEL_FILES = {
    "safetensors": (WEIGHTS,),
    "onnx": ("model.onnx", "model.onnx.data"),  # the weights of a large model are beside it
    "pt2": ("model.pt2",),
    "aoti": ("model.pt2",),
    "openvino": ("model.xml", "model.bin"),
    "coreml": ("model.mlpackage",),
}
_NOT_PUBLISHED = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "architecture")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with weights: of a classifier or backbone, as timm writes it, or a detector or segmenter (``dense``)."""

    path: Path
    config: dict[str, Any]
    weights: Path
    dense: bool

    @property
    def record(self) -> Any:
        """What `foveal convert` recorded; None in other folders."""
        return self.config.get(RECORD)


def read_folder(folder: str | Path) -> ModelFolder:
    """Find config.json and weights in a folder; in a training run, those of its ``best/``.

    Raises:
        ValueError: it is no model folder.
    """
    folder = loading.local_path(folder)
    if (dense := read_dense_config(folder)) is not None:
        path, config = dense
        return ModelFolder(path, config, path / WEIGHTS, dense=True)
    found = loading.resolve(folder)
    file = loading.weights_file(found)
    return ModelFolder(file.parent, found.config or {}, file, dense=False)


def published_config(cfg: Mapping[str, Any], num_classes: int, num_features: int) -> dict[str, Any]:
    """The ``config.json`` that timm reads back, from the ``pretrained_cfg`` of a model that was created by name."""
    return {
        "architecture": cfg["architecture"],
        "num_classes": num_classes,
        "num_features": num_features,
        "pretrained_cfg": {k: v for k, v in cfg.items() if k not in _NOT_PUBLISHED and v is not None},
    }


def without_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the record of a conversion, which belongs to the converted file, but with the name of the
    published checkpoint, whose licence stays."""
    kept = {key: value for key, value in config.items() if key != RECORD}
    name = (config.get(RECORD) or {}).get(CHECKPOINT)
    return kept if name is None else kept | {CHECKPOINT: name}


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_output(output: str | Path, force: bool, sources: Sequence[Path] = (), to: str = "safetensors") -> Path:
    """The folder to write, as a path.

    Raises:
        ValueError: if it is a file, one of ``sources``, a training run, not empty without ``force``, or holds model
            files of another format than ``to``, which would stay beside a config.json and a card that are not theirs.
    """
    output = Path(output).expanduser()
    above = next((each for each in (output, *output.parents) if each.exists()), output)
    names = dict.fromkeys([*WEIGHT_FILES, *(name for files in MODEL_FILES.values() for name in files)])
    left = [name for name in names if name not in MODEL_FILES.get(to, ()) and (output / name).exists()]
    run = any((output / best / "config.json").is_file() for best in ("best", "best.old"))
    problems = {
        f"{above} is a file": above.exists() and not above.is_dir(),
        "it is the source": output.resolve() in (source.resolve() for source in sources),
        "it is not empty; --force replaces files of the same names": not force and _filled(output),
        "it is a training run, whose best/ would be read instead": run,
        f"it holds {', '.join(left)} of another model, not replaced by {to}": left,
    }
    if found := next((text for text, wrong in problems.items() if wrong), None):
        raise ValueError(f"cannot write the folder {output}: {found}; choose another")
    return output


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder under a temporary name, whose files are moved to ``output`` when the block ends.

    Raises:
        OSError: if it cannot be written, naming ``output``, or if another export was put there meanwhile.
    """
    config = output / "config.json"
    filled = config.exists()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            folder = Path(scratch) / "export"
            folder.mkdir()
            yield folder
            if config.exists() and not filled:
                raise OSError(f"{output} was written by another export meanwhile; choose another folder")
            _put_in_place(folder, output)
    except OSError as error:
        if error.errno is None:  # a message of this package
            raise
        raise OSError(f"cannot write {output}: {error.strerror}") from error  # it names the temporary folder


def _put_in_place(folder: Path, output: Path) -> None:
    """Move a finished folder to its name; into a folder that exists entry by entry, each file replaced in one step."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):  # safetensors writes for the owner alone
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    if not output.exists():
        os.rename(folder, output)
        return
    for path in folder.iterdir():
        target = output / path.name
        if target.is_dir() and not target.is_symlink():  # a folder is not replaced in one step
            shutil.rmtree(target)
        os.replace(path, target)
