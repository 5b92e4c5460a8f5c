"""Write a model for use elsewhere, in one of the formats of ``formats.py``, checked there against the original."""

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

import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from .._version import __version__
from ..backbones import family, list_models
from ..backbones.images import to_mode
from ..backbones.loading import Source, load, resolve
from .formats import FORMATS, ExportError, Job, Run, as_tuple
from .images import preprocessing, read_image

TOLERANCE = 1e-4  # of the largest logit: what an exported model may differ from the original
INT8_TOLERANCE = 0.25  # root mean square, of the logits': further away, the calibration images were the wrong ones
HALF_TOLERANCE = 1e-2  # the same of a model in float16, whose numbers have 11 bits
RECORD = "conversion"  # the part of a config.json that `foveal convert` adds
_TRACED_SIZE = (136, 152)  # for any size: no map of any level has a length that a tracer takes for a constant
ANY_SIZE = ("NAT", "DiNAT", "DiNAT_s", "OverLoCK", "CARE")  # families whose graph can leave height and width free
_REMOVED = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "architecture")


@dataclass(frozen=True)
class Export:
    """What was written: the folder, its files, and how far its outputs are from the original's (of the largest)."""

    folder: Path
    files: list[str]
    difference: float | None  # None where this machine cannot run the format
    checked: list[str] = field(default_factory=list)  # the inputs it was checked on, in words
    notes: list[str] = field(default_factory=list)  # what else was found out, in words


def export(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    images: Sequence[str | Path] = (),
    half: bool = False,
    int8: bool = False,
    calibration: Sequence[str | Path] = (),
    dynamic: bool = False,
    size: tuple[int, int] | None = None,
    score: str | Path | None = None,
    force: bool = False,
) -> Export:
    """Write a model to the folder `output` in the format `to`, check it there, and only then put it in place.

    Beside the model's own files the folder gets ``config.json`` and a card, README.md. Input is ``image`` ``[batch, C,
    H, W]``, float32, at the model's input size with any batch, and output ``logits`` ``[batch, classes]``. A model with
    a `reparameterize` method is written in that form. Detectors and segmenters: see `export_dense`.

    ======================  ========================================================================================
    ``safetensors``         ``model.safetensors``, as trained: ``timm.create_model("local-dir:...", pretrained=True)``
    ``onnx``                ``model.onnx``, run by onnxruntime and others
    ``pt2``                 ``model.pt2``: `torch.export.load`, for PyTorch without this package
    ``aoti``                ``model.pt2``: compiled for this machine's processor, `torch._inductor.aoti_load_package`
    ``openvino``            ``model.xml`` and ``model.bin``, for OpenVINO's runtime
    ``coreml``              ``model.mlpackage``, one image at a time, for macOS and iOS; run and checked on macOS only
    ======================  ========================================================================================

    Args:
        source: what `foveal.load` takes.
        images: image files to check with, besides random inputs; without any, two photographs of scikit-learn's.
        half: weights, and where the runtime can arithmetic, in float16; inputs and outputs stay float32.
        int8: ONNX with convolutions and linear layers in 8 bits, see `quantize.py`.
        calibration: image files, or folders of them, that set the ranges for ``int8``; some hundred suffice.
        dynamic: leave height and width free, too.
        size: rows and columns of the images of a detector or segmenter.
        score: a folder with a folder of images for each class: what is written is scored on them beside the original.
        force: write into a folder that is not empty, replacing files of the same names and no others.

    Raises:
        ValueError: for an unknown format, one that cannot hold what is asked for, a source that cannot be loaded, or an
            output that is not empty or the source.
        ImportError: if the format needs a package that is not installed.
        OSError: if the output cannot be written, or a compiler is missing; the message names it.
        ExportError: if the exported model differs by more than `TOLERANCE`, or `HALF_TOLERANCE`, or the format's own
            library cannot convert it; nothing is written then.
    """
    to = to.lower()
    if to not in FORMATS:
        raise ValueError(f"cannot export to {to!r}; the formats are {', '.join(FORMATS)}")
    from ..heads.build import read_dense_config  # with torchvision's detectors: not for every command

    if Path(source).is_dir() and read_dense_config(source) is not None:
        from .export_dense import export_dense

        asked = {"--half": half, "--int8": int8, "--dynamic": dynamic, "--score": score is not None}
        if any(asked.values()):
            names = ", ".join(name for name, wanted in asked.items() if wanted)
            raise ValueError(f"{source} holds a detector or segmenter: {names} is for classifiers")
        return export_dense(source, to, output, images=images, size=size, force=force)
    if size is not None:
        raise ValueError(f"{source} is no detector or segmenter: a size is for these; --dynamic leaves it free")
    found = resolve(source)
    FORMATS[to].check(to, dynamic, half)
    if int8:
        _check_int8(to, half, calibration)
    elif calibration:
        raise ValueError("calibration images are for --int8")
    if dynamic and (reason := _one_size(found.architecture)):
        raise ValueError(f"{found.architecture} does not go with --dynamic: {reason}")
    sources = () if found.folder is None else (found.folder, _path(source))
    output = check_output(output, force, sources)

    if found.config is not None and (found.config.get("model_args") or {}).get("features_only"):
        raise ValueError(f"{source} is a backbone that gives feature maps; what is exported are classifiers")
    model = load(source)
    config = found.config or published_config(model.pretrained_cfg, model.num_classes, model.num_features)
    config = {key: value for key, value in config.items() if key != RECORD}  # which is of that folder's file
    job, inputs = classifier_job(model, to, half, dynamic), check_inputs(model, images, to, dynamic)
    batches = _batches(model, calibration) if int8 else ()

    try:
        with staged(output) as folder:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            difference = write_checked(to, job, folder, model, inputs)
            notes = []
            if int8:
                notes.append(_to_int8(folder, model, batches))
                difference = _largest_difference(model, FORMATS[to].open(folder), inputs)
            done = Export(output, [], difference, list(inputs) if difference is not None else [], notes)
            if score is not None:
                done.notes.append(_score(FORMATS[to].open(folder), job, model, config, Path(score)))
            (folder / "README.md").write_text(_card(model, config, found, to, job, int8, done), encoding="utf-8")
            done.files.extend(sorted(path.name for path in folder.iterdir()))
    except OSError as error:  # it names a temporary folder, if anything
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error
    return done


def classifier_job(model: nn.Module, to: str, half: bool = False, dynamic: bool = False) -> Job:
    """How a classifier is written to a format: re-parameterised where it can be, with any batch."""
    # the branches and norms that only training needs are folded away; what is compared is the model as it was loaded
    if to != "safetensors" and hasattr(model, "reparameterize"):
        model = copy.deepcopy(model).reparameterize()
    batch = 1 if to == "coreml" else 3
    channels, *size = model.pretrained_cfg["input_size"]
    if dynamic:
        size = _TRACED_SIZE
    example = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    return Job(model, example, any_batch=batch > 1, any_size=dynamic, half=half)


def write_checked(to: str, job: Job, folder: Path, original: nn.Module, inputs: Mapping[str, Tensor]) -> float | None:
    """Write a job to a folder and compare what runs there with the original model.

    Returns:
        the largest difference, of the largest value of an output; None if this machine cannot run the format.

    Raises:
        ExportError: if it is more than `TOLERANCE` (`HALF_TOLERANCE` of a half job), or it cannot be converted.
    """
    name = getattr(original, "pretrained_cfg", {}).get("architecture") or type(original).__name__
    FORMATS[to].write(job, folder)
    if FORMATS[to].not_here() is not None:
        return None
    difference = _largest_difference(original, FORMATS[to].open(folder), inputs)
    limit = HALF_TOLERANCE if job.half else TOLERANCE
    if not difference <= limit:  # also true of NaN
        raise ExportError(
            f"the exported {name} differs from the original by {difference:.1e} of the largest logit, more than "
            f"{limit:.0e}; nothing was written"
        )
    return difference


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


def _check_int8(to: str, half: bool, calibration: Sequence[str | Path]) -> None:
    if to != "onnx":
        raise ValueError(f"--int8 is for onnx, quantised by onnxruntime; {to} is written in float")
    if half:
        raise ValueError("--int8 does not go with --half: what it does not quantise stays in float32")
    if not calibration:
        raise ValueError("--int8 needs images that the model was made for, some hundred: --calibration FOLDER or FILE")


def _batches(model: nn.Module, calibration: Sequence[str | Path]) -> list[Tensor]:
    """The calibration images as the model takes them, in batches."""
    files, extensions = [], get_img_extensions(as_set=True)
    for path in map(Path, calibration):
        below = sorted(each for each in path.rglob("*") if each.suffix.lower() in extensions)
        files += below if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no images in {', '.join(map(str, calibration))}")
    transform, channels = preprocessing(model), model.pretrained_cfg["input_size"][0]
    images = torch.stack([transform(read_image(file, channels)) for file in files])
    return list(images.split(32))


@torch.no_grad()
def _to_int8(folder: Path, model: nn.Module, batches: Sequence[Tensor]) -> str:
    """Quantise ``model.onnx`` in its place. Returns how the answers changed on the calibration images, in words.

    Raises:
        ExportError: if the new answers are further from the original's than `INT8_TOLERANCE`.
    """
    from .quantize import quantize

    file = folder / "model.onnx"
    quantize(file, folder / "int8.onnx", batches)
    os.replace(folder / "int8.onnx", file)
    run = FORMATS["onnx"].open(folder)
    expected = torch.cat([model(batch) for batch in batches])
    got = torch.cat([run(batch)[0] for batch in batches])
    error = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()
    agree = (got.argmax(1) == expected.argmax(1)).float().mean().item()
    if not error <= INT8_TOLERANCE:
        raise ExportError(
            f"in 8 bits the logits of the calibration images differ by {error:.2f} of their root mean square, more "
            f"than {INT8_TOLERANCE}; nothing was written"
        )
    return (
        f"in 8 bits: root mean square difference {error:.1e} of the logits', the same first class for "
        f"{100 * agree:.1f} % of {len(got):,} calibration images"
    )


class _Answers(nn.Module):
    """What was exported, as a classifier that can be scored."""

    def __init__(self, run: Run, job: Job, model: nn.Module) -> None:
        super().__init__()
        self.run, self.single = run, not job.any_batch
        self.pretrained_cfg, self.num_classes = model.pretrained_cfg, model.num_classes

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.run(part)[0] for part in (images.split(1) if self.single else [images])])


def _score(run: Run, job: Job, model: nn.Module, config: Mapping[str, Any], images: Path) -> str:
    from .verify import top1

    (before, count), (after, _) = (top1(each, images, config) for each in (model, _Answers(run, job, model)))
    return f"top-1 {after:.2f} % on {count:,} images of {images}, the original {before:.2f} % ({after - before:+.2f})"


def _path(source: str | Path) -> Path:
    return Path(str(source).removeprefix("local-dir:")).expanduser()


def _one_size(architecture: str) -> str | None:
    """Why the graph of a model is for one height and width; None if it need not be."""
    if architecture in list_models() and family(architecture) in ANY_SIZE:
        return None
    return "the windows of its attention follow from the size of the image; export it with the size that you need"


def check_inputs(
    model: nn.Module, images: Sequence[str | Path], to: str = "onnx", dynamic: bool = False
) -> dict[str, Tensor]:
    """What to check with: random batches of two sizes, and photographs. Words -> ``[B, C, H, W]``."""
    channels, rows, columns = model.pretrained_cfg["input_size"]
    generator = torch.Generator().manual_seed(0)
    batches = (1,) if to == "coreml" else (1, 3)
    inputs = {f"random, batch {n}": torch.randn(n, channels, rows, columns, generator=generator) for n in batches}
    if dynamic:
        for height, width in ((rows, columns + 32), (rows + 45, columns), (2 * rows, columns // 2 + 19)):
            shape = (1, channels, height, width)
            inputs[f"random, {height}x{width}"] = torch.randn(shape, generator=generator)
    transform = preprocessing(model)
    for path in images:
        inputs[str(path)] = transform(read_image(path, channels))[None]
    if not images and channels in (1, 3):
        for name, photograph in photographs().items():
            inputs[name] = transform(to_mode(photograph, channels))[None]
    return inputs


def photographs() -> dict[str, Image.Image]:
    from sklearn.datasets import load_sample_images  # takes a second to import

    found = load_sample_images()
    return {
        Path(name).name: Image.fromarray(pixels) for name, pixels in zip(found.filenames, found.images, strict=True)
    }


@torch.no_grad()
def _largest_difference(model: nn.Module, run: Run, inputs: Mapping[str, Tensor]) -> float:
    """Largest error over largest value, the worst of the inputs and outputs."""
    worst = 0.0
    for x in inputs.values():
        for expected, got in zip(as_tuple(model(x)), run(x), strict=True):
            error = ((got - expected).abs().max() / expected.abs().max()).item()
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


def _card(model: nn.Module, config: dict[str, Any], found: Source, to: str, job: Job, int8: bool, done: Export) -> str:
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
        "numbers": "float16; images and logits float32" if job.half else None,
        "size": "any height and width" if job.any_size else None,
        "check of this file": "; ".join([checked(to, done), *done.notes]),
    }
    size = "height, width" if job.any_size else f"{rows}, {columns}"
    use = FORMATS[to].use.replace("SHAPE", f"[{'batch' if job.any_batch else 1}, {channels}, {size}]")
    options = " --half" * job.half + " --int8" * int8 + " --dynamic" * job.any_size
    table = "\n".join(f"| {name} | {value} |" for name, value in rows_of_table.items() if value)
    return (
        f"# {config['architecture']}\n\n| | |\n|---|---|\n{table}\n\n```python\n{use}\n```\n\n"
        f"Written by foveal {__version__}: `foveal export SOURCE --to {to}{options}`.\n"
    )


def checked(to: str, done: Export) -> str:
    """The outcome of the check in words."""
    if done.difference is None:
        return f"converted, not run: {FORMATS[to].not_here()}"
    return f"differs from the original by {done.difference:.1e} of the largest logit"


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
