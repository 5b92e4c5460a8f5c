"""Read and write model folders: ``config.json``, the model's files, and a card, README.md.

`foveal.load` and ``timm.create_model("local-dir:...", pretrained=True)`` read folders with safetensors.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones import loading
from ..backbones.loading import EXPORTED, WEIGHT_FILES, WEIGHTS
from ..heads.checkpoint import read_dense_config

TOLERANCE = 1e-4  # of the largest value: the allowed difference between outputs of a written model and the original
RECORD = "conversion"  # the key that `foveal convert` adds to config.json
CHECKPOINT = "checkpoint"  # the name in the manifest: a key of the record, and of an export's config.json
_NOT_PUBLISHED = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "architecture")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with weights: of a classifier or backbone in timm's format, or a detector or segmenter (``dense``)."""

    path: Path
    config: dict[str, Any]
    weights: Path
    dense: bool

    @property
    def record(self) -> Any:
        """The record of `foveal convert`; None in other folders."""
        return self.config.get(RECORD)


def read_folder(folder: str | Path) -> ModelFolder:
    """Find config.json and weights in a folder; in a training run, those of ``best/``.

    Raises:
        ValueError: not a model folder.
    """
    folder = loading.local_path(folder)
    if (dense := read_dense_config(folder)) is not None:
        path, config = dense
        return ModelFolder(path, config, path / WEIGHTS, dense=True)
    found = loading.resolve(folder)
    file = loading.weights_file(found)
    return ModelFolder(file.parent, found.config or {}, file, dense=False)


def published_config(cfg: Mapping[str, Any], num_classes: int, num_features: int) -> dict[str, Any]:
    """The ``config.json`` that timm reads, from a model's ``pretrained_cfg``."""
    return {
        "architecture": cfg["architecture"],
        "num_classes": num_classes,
        "num_features": num_features,
        "pretrained_cfg": {k: v for k, v in cfg.items() if k not in _NOT_PUBLISHED and v is not None},
    }


def without_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the record, which describes another file, but with the name of the published checkpoint,
    whose licence still applies."""
    kept = {key: value for key, value in config.items() if key != RECORD}
    name = (config.get(RECORD) or {}).get(CHECKPOINT)
    return kept if name is None else kept | {CHECKPOINT: name}


def check_output(output: str | Path, force: bool, sources: Sequence[Path] = (), file: str = WEIGHTS) -> Path:
    """The folder to write, as a path.

    Args:
        file: of the model, which will be written.

    Raises:
        ValueError: it is a file, one of ``sources``, a training run, not empty without ``force``, or has model files
            of other formats, which the new config.json and card would not describe.
    """
    output = Path(output).expanduser()
    above = next((each for each in (output, *output.parents) if each.exists()), output)
    left = [name for name in (*WEIGHT_FILES, *EXPORTED) if name != file and (output / name).exists()]
    run = any((output / best / "config.json").is_file() for best in ("best", "best.old"))
    filled = output.is_dir() and any(output.iterdir())
    problems = {
        f"{above} is a file": above.exists() and not above.is_dir(),
        "it is the source": output.resolve() in (source.resolve() for source in sources),
        "it is not empty; --force replaces files of the same names": filled and not force,
        "it is a training run, whose best/ would be read instead": run,
        f"it contains {', '.join(left)} of another model, which {file} does not replace": left,
    }
    if found := next((text for text, wrong in problems.items() if wrong), None):
        raise ValueError(f"cannot write the folder {output}: {found}; choose another")
    return output


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved to ``output`` when the block ends.

    Raises:
        OSError: ``output`` cannot be written, or another process wrote to it meanwhile.
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
                raise OSError(f"another process wrote {output} meanwhile; choose another folder")
            _put_in_place(folder, output)
    except OSError as error:
        if error.errno is None:  # raised by this package
            raise
        raise OSError(f"cannot write {output}: {error.strerror}") from error  # the original names the temporary folder


def _put_in_place(folder: Path, output: Path) -> None:
    """Rename a finished folder; into an existing folder move entry by entry, each file atomically."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):  # safetensors writes files that only the owner can read
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    if not output.exists():
        os.rename(folder, output)
        return
    for path in folder.iterdir():
        target = output / path.name
        if target.is_dir() and not target.is_symlink():  # os.replace cannot replace a folder
            shutil.rmtree(target)
        os.replace(path, target)
