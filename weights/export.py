"""Write a model for use elsewhere: a folder that timm loads, or an ONNX file checked in onnxruntime."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from torch import nn

from .._version import __version__
from ..backbones.loading import WEIGHTS, Source, load, resolve
from .images import preprocessing, read_image

FORMATS = ("safetensors", "onnx")
TOLERANCE = 1e-4  # of the largest logit: what an exported model may differ from the original
RECORD = "conversion"  # the part of a config.json that `foveal convert` adds
_ONNX_SINGLE_FILE = 1_800_000_000  # bytes of weights; protobuf ends at 2 GiB, so larger models keep them beside it
_REMOVED = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "architecture")


class ExportError(RuntimeError):
    """An exported model does not answer as the original does."""


@dataclass(frozen=True)
class Export:
    """What was written: the folder, its files, and how far its outputs are from the original's (of the largest)."""

    folder: Path
    files: list[str]
    difference: float
    checked: list[str] = field(default_factory=list)  # the inputs it was checked on, in words


def export(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    images: Sequence[str | Path] = (),
    force: bool = False,
) -> Export:
    """Write a model to the folder `output` in the format `to`, check it there, and only then put it in place.

    ``safetensors``: ``config.json``, ``model.safetensors`` and a card, README.md; ``timm.create_model("local-dir:...",
    pretrained=True)`` loads it. ``onnx``: ``model.onnx``, input ``image`` ``[batch, C, H, W]`` at the model's input
    size with any batch, output ``logits`` ``[batch, classes]``, and the same card and configuration beside it; a model
    with a `reparameterize` method is written in that form.

    Args:
        source: what `foveal.load` takes.
        images: image files to check with, besides random inputs.
        force: write into a folder that is not empty, replacing files of the same names and no others.

    Raises:
        ValueError: for an unknown format, a source that cannot be loaded, or an output that is not empty or the source.
        OSError: if the output cannot be written; the message names it.
        ExportError: if the exported model differs by more than `TOLERANCE`; nothing is written then.
    """
    to = to.lower()
    if to not in FORMATS:
        raise ValueError(f"cannot export to {to!r}; the formats are {', '.join(FORMATS)}")
    from ..heads.build import read_dense_config  # with torchvision's detectors: not for every command

    if Path(source).is_dir() and (dense := read_dense_config(source)) is not None:
        raise ValueError(
            f"{source} holds a model of `foveal train {dense[1].get('task')}`; classifiers are exported so far. "
            "foveal.load reads it"
        )
    found = resolve(source)
    sources = () if found.folder is None else (found.folder, _path(source))
    output = check_output(output, force, sources)

    if found.config is not None and (found.config.get("model_args") or {}).get("features_only"):
        raise ValueError(f"{source} is a backbone that gives feature maps; what is exported are classifiers")
    model = load(source)
    config = found.config or published_config(model.pretrained_cfg, model.num_classes, model.num_features)
    config = {key: value for key, value in config.items() if key != RECORD}  # which is of that folder's file
    inputs = _inputs(model, images)

    try:
        difference, files = _write(model, config, found, to, output, inputs)
    except OSError as error:  # it names a temporary folder, if anything
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error
    return Export(output, files, difference, list(inputs))


def check_output(output: str | Path, force: bool, sources: Sequence[Path] = ()) -> Path:
    """The folder to write, as a path.

    Raises:
        ValueError: if it is a file, one of ``sources``, or not empty without ``force``.
    """
    output = Path(output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; the output is a folder")
    if output.resolve() in (source.resolve() for source in sources):
        raise ValueError(f"{output} is what is exported; choose another folder")
    if not force and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another folder, or --force to replace files in it")
    return output


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder under a temporary name, whose files are put in place as `output` if the block ends well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        folder = Path(scratch) / "export"
        folder.mkdir()
        yield folder
        _put_in_place(folder, output)


def _write(
    model: nn.Module, config: dict[str, Any], found: Source, to: str, output: Path, inputs: dict[str, torch.Tensor]
) -> tuple[float, list[str]]:
    """Write and check under a temporary name, then rename. Returns the largest difference and the file names."""
    with staged(output) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write = _write_safetensors if to == "safetensors" else _write_onnx
        difference = write(model, folder, inputs)
        if not difference <= TOLERANCE:  # also true of NaN
            raise ExportError(
                f"the exported {config['architecture']} differs from the original by {difference:.1e} of the largest "
                f"logit, more than {TOLERANCE:.0e}; nothing was written"
            )
        (folder / "README.md").write_text(_card(model, config, found, to, difference), encoding="utf-8")
        files = sorted(path.name for path in folder.iterdir())
    return difference, files


def _path(source: str | Path) -> Path:
    return Path(str(source).removeprefix("local-dir:")).expanduser()


def _inputs(model: nn.Module, images: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """What to check with: random batches of two sizes, and the images given. Words -> ``[B, C, H, W]``."""
    channels, rows, columns = model.pretrained_cfg["input_size"]
    generator = torch.Generator().manual_seed(0)
    inputs = {f"random, batch {n}": torch.randn(n, channels, rows, columns, generator=generator) for n in (1, 3)}
    transform = preprocessing(model)
    for path in images:
        inputs[str(path)] = transform(read_image(path, channels))[None]
    return inputs


def _write_safetensors(model: nn.Module, folder: Path, inputs: dict[str, torch.Tensor]) -> float:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    copy = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return _largest_difference(model, lambda x: copy(x), inputs)


def _write_onnx(model: nn.Module, folder: Path, inputs: dict[str, torch.Tensor]) -> float:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it and says so less clearly
    except ImportError as error:
        raise ImportError(f"ONNX export needs {error.name}: pip install 'foveal[export]'") from error

    file = folder / "model.onnx"
    example = next(x for x in inputs.values() if len(x) > 1)  # a batch of 1 would be taken for a constant
    # the branches and norms that only training needs are folded away; what is compared is the model as it was loaded
    deployed = copy.deepcopy(model).reparameterize() if hasattr(model, "reparameterize") else model
    size = sum(p.numel() * p.element_size() for p in deployed.parameters())
    torch.onnx.export(
        deployed,
        (example,),
        file,
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        external_data=size > _ONNX_SINGLE_FILE,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return _largest_difference(
        model, lambda x: torch.from_numpy(session.run(["logits"], {"image": x.numpy()})[0]), inputs
    )


@torch.no_grad()
def _largest_difference(model: nn.Module, other: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Largest error over largest value, the worst of the inputs."""
    worst = 0.0
    for x in inputs.values():
        expected = model(x)
        error = ((other(x) - expected).abs().max() / expected.abs().max()).item()
        if not error <= worst:  # NaN must win
            worst = error
    return worst


def published_config(cfg: Mapping[str, Any], num_classes: int, num_features: int) -> dict[str, Any]:
    """The ``config.json`` that timm reads back, by the ``pretrained_cfg`` of a model that was built by its name."""
    return {
        "architecture": cfg["architecture"],
        "num_classes": num_classes,
        "num_features": num_features,
        "pretrained_cfg": {k: v for k, v in cfg.items() if k not in _REMOVED and v is not None},
    }


def _card(model: nn.Module, config: dict[str, Any], found: Source, to: str, difference: float) -> str:
    cfg = {**(get_pretrained_cfg(config["architecture"]).to_dict()), **config.get("pretrained_cfg", {})}
    channels, rows, columns = model.pretrained_cfg["input_size"]
    parameters = sum(p.numel() for p in model.parameters())
    published = found.folder is None
    weights = f"published as `{found.name}`, {cfg.get('origin_url')}" if published else f"from {found.folder}"
    rows_of_table = {
        "architecture": f"`{config['architecture']}`, {parameters:,} parameters",
        "paper": ", ".join(filter(None, [cfg.get("paper_name"), _text(cfg.get("paper_ids"))])),
        "weights": weights,
        "licence of the published weights": cfg.get("license") if published else None,
        "input": f"{channels} x {rows} x {columns}, mean {_text(cfg.get('mean'))}, std {_text(cfg.get('std'))}",
        "classes": str(model.num_classes),
        "measured": _measured(found),
        "check of this file": f"differs from the original by {difference:.1e} of the largest logit",
    }
    use = (
        'import foveal, timm\n\nmodel = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()'
        if to == "safetensors"
        else 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        '(logits,) = session.run(["logits"], {"image": images})  # float32 '
        f"[batch, {channels}, {rows}, {columns}]"
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows_of_table.items() if value)
    return (
        f"# {config['architecture']}\n\n| | |\n|---|---|\n{table}\n\n```python\n{use}\n```\n\n"
        f"Written by foveal {__version__}: `foveal export SOURCE --to {to}`.\n"
    )


def _measured(found: Source) -> str | None:
    """The score that the training run of these weights recorded, if they come from one."""
    if found.folder is None or found.folder.name not in ("best", "best.old"):
        return None
    summary = found.folder.parent / "summary.json"
    if not summary.is_file():
        return None
    score = json.loads(summary.read_text(encoding="utf-8"))
    return f"top-1 {score['top1']:.2f} % on {score['n']:,} held-out images, after {score['epochs']} epochs"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _text(value: Any) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value or "")


def _put_in_place(folder: Path, output: Path) -> None:
    """Move a finished folder to its name; into a folder that exists file by file, each replaced in one step."""
    for path in folder.iterdir():
        path.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
    if not output.exists():
        os.rename(folder, output)
        return
    for path in sorted(folder.iterdir()):
        staged = output / f".{path.name}.new"
        shutil.move(path, staged)
        os.replace(staged, output / path.name)
