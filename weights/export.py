"""Write a model for use elsewhere, in one of the formats of ``formats.py``, checked there against the original."""

from __future__ import annotations

import copy
import json
import math
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
from timm.data import resolve_data_config
from timm.data.readers.img_extensions import get_img_extensions
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from .._version import __version__
from ..backbones import family, list_models
from ..backbones.images import to_mode
from ..backbones.loading import Source, load, local_path, refuse_exported, resolve
from .formats import FORMATS, LEAST_SIZE, ExportError, Job, Run, as_tuple, library, run_of, stale
from .images import label_names, preparing, preprocessing, read_image
from .manifest import Checkpoint, checkpoints

TOLERANCE = 1e-4  # of the largest logit: what an exported model may differ from the original
INT8_TOLERANCE = 0.25  # root mean square, of the logits': further away, the calibration images were the wrong ones
INT8_LARGEST = 1.0  # of the largest logit, on the inputs of the check, noise among them
HALF_TOLERANCE = 1e-2  # the same of a model in float16, whose numbers have 11 bits
RECORD = "conversion"  # the part of a config.json that `foveal convert` adds
_CHECKPOINT = "checkpoint"  # of it, and what an export keeps: the name in the manifest
_TRACED_SIZE = (136, 152)  # for any size: no map of any level has a length that a tracer takes for a constant
ANY_SIZE = ("NAT", "DiNAT", "DiNAT_s", "OverLoCK", "CARE")  # families whose graph can leave height and width free
_LISTED = 100  # class names in a card at most
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
    H, W]``, float32, at the model's input size with any batch, and output ``logits`` ``[batch, classes]``. Images are
    prepared as the card shows: normalization is not part of the file. A model with a `reparameterize` method is written
    in that form. Detectors and segmenters: see `export_dense`.

    | `to` | |
    |---|---|
    | ``safetensors`` | ``model.safetensors``, as trained: ``timm.create_model("local-dir:...", pretrained=True)`` |
    | ``onnx`` | ``model.onnx``, run by onnxruntime and others; preprocessing and class names are in its metadata |
    | ``pt2`` | ``model.pt2``: `torch.export.load`, for PyTorch without this package |
    | ``aoti`` | ``model.pt2``: compiled for this machine's processor, `torch._inductor.aoti_load_package` |
    | ``openvino`` | ``model.xml`` and ``model.bin``, for OpenVINO's runtime |
    | ``coreml`` | ``model.mlpackage``, one image at a time, for macOS and iOS; run and checked on macOS only |

    Args:
        source: what `foveal.load` takes.
        images: image files to check with, besides random inputs; without any, two photographs of scikit-learn's.
        half: weights, and where the runtime can arithmetic, in float16; inputs and outputs stay float32.
        int8: ONNX with convolutions and linear layers in 8 bits, see `quantize.py`.
        calibration: image files, or folders of them, that set the ranges for ``int8``; some hundred suffice.
        dynamic: leave height and width free, too, from `LEAST_SIZE` pixels on.
        size: rows and columns of the images of a detector or segmenter.
        score: a folder with a folder of images for each class: what is written is scored on them beside the original.
        force: write into a folder that is not empty, replacing files of the same names and no others.

    Raises:
        ValueError: for an unknown format, one that cannot hold what is asked for, a source that cannot be loaded, or an
            output that is not empty or the source, or that with ``force`` would keep another format's model.
        ImportError: if the format needs a package that is not installed.
        OSError: if the output cannot be written, or an image not be read; the message names it.
        ExportError: if the exported model differs by more than `TOLERANCE`, `HALF_TOLERANCE`, or `INT8_LARGEST`, the
            format's own library cannot convert or run it, or finds no compiler; nothing is written then.

    Examples:
        >>> import timm
        >>> model = timm.create_model("test_foveal_dinat", num_classes=3)
        >>> timm.models.save_for_hf(model, "folder", safe_serialization=True)
        >>> from foveal.weights.export import export
        >>> done = export("folder", "safetensors", "exported")
        >>> done.files, done.difference
        (['README.md', 'config.json', 'model.safetensors'], 0.0)
    """
    to = to.lower()
    if to not in FORMATS:
        raise ValueError(f"cannot export to {to!r}; the formats are {', '.join(FORMATS)}")
    if (folder := _dense_folder(source)) is not None:
        from .export_dense import export_dense

        asked = {"--half": half, "--int8": int8, "--calibration": bool(calibration), "--dynamic": dynamic}
        names = [name for name, wanted in (asked | {"--score": score is not None}).items() if wanted]
        if names:
            are = "is" if len(names) == 1 else "are"
            raise ValueError(f"{source} holds a detector or segmenter: {', '.join(names)} {are} for classifiers")
        return export_dense(folder, to, output, images=images, size=size, force=force)
    found = resolve(source)
    if size is not None:
        raise ValueError(
            f"{source} is neither a detector nor a segmenter: --size is for these; a classifier is written for its own "
            "input size"
        )
    FORMATS[to].check(to, dynamic, half)
    if int8:
        _check_int8(to, half, calibration)
    elif calibration:
        raise ValueError("calibration images are for --int8")
    if dynamic and (reason := _one_size(found.architecture, to)):
        raise ValueError(f"{found.architecture} does not go with --dynamic: {reason}")
    sources = () if found.folder is None else (found.folder, local_path(source))
    output = check_output(output, force, sources, to)
    if score is not None and (reason := FORMATS[to].not_here()):
        raise ValueError(f"--score runs what was written, and {to} is not run here: {reason}")

    if found.config is not None and (found.config.get("model_args") or {}).get("features_only"):
        raise ValueError(f"{source} is a backbone that gives feature maps; what is exported are classifiers")
    model = load(source)
    if to != "safetensors" and model.num_classes < 1:
        raise ValueError(
            f"{source} has no classifier, num_classes is 0: {to} holds one; --to safetensors takes it as it is"
        )
    config = found.config or published_config(model.pretrained_cfg, model.num_classes, model.num_features)
    config, record = without_record(config), config.get(RECORD)
    if dynamic and min(model.pretrained_cfg["input_size"][1:]) < LEAST_SIZE:
        rows, columns = model.pretrained_cfg["input_size"][1:]
        raise ValueError(
            f"{to} with --dynamic takes heights and widths from {LEAST_SIZE} on, and {source} has images of "
            f"{rows} x {columns}: leave out --dynamic"
        )
    before = None if score is None else _top1(model, config, score)  # first: a folder may not be what it should be
    job, inputs = classifier_job(model, to, half, dynamic), check_inputs(model, images, to, dynamic)
    with torch.no_grad():
        if (shape := tuple(as_tuple(model(job.example))[0].shape[1:])) != (model.num_classes,) and to != "safetensors":
            raise ValueError(
                f"{source} gives {list(shape)} of an image, not {model.num_classes} logits (global_pool?): "
                f"{to} holds a classifier; --to safetensors takes it as it is"
            )
    batches = _batches(model, calibration) if int8 else ()

    try:
        with staged(output) as folder:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            difference = write_checked(to, job, folder, model, inputs)
            notes = []
            if int8:
                notes.append(_to_int8(folder, model, batches))
                difference = _largest_difference(model, run_of(to, folder), inputs)
                if not difference <= INT8_LARGEST:  # also true of NaN
                    raise ExportError(
                        f"in 8 bits the logits of {', '.join(inputs)} differ from the original's by up to "
                        f"{difference:.1e} of the largest logit, more than {INT8_LARGEST:g}; nothing was written"
                    )
            done = Export(output, [], difference, list(inputs) if difference is not None else [], notes)
            if to == "onnx":
                describe_onnx(folder, _facts(model))
            if before is not None:
                (was, _), (now, count) = before, _top1(_Answers(run_of(to, folder), job, model), config, score)
                text = f"top-1 {now:.2f} % on {count:,} images of {score}, the original {was:.2f} % ({now - was:+.2f})"
                done.notes.append(text)
            text = _card(model, config, found, record, to, job, int8, done)
            (folder / "README.md").write_text(text, encoding="utf-8")
            done.files.extend(sorted(path.name for path in folder.iterdir()))
    except OSError as error:
        if error.errno is None:  # a message of this package, of an image say
            raise
        raise OSError(f"cannot write {output}: {error.strerror}") from error  # it names a temporary folder
    return done


def _dense_folder(source: str | Path) -> Path | None:
    """The folder of a detector or segmenter that `foveal.load` takes; None of anything else.

    Raises:
        ValueError: if it is one file of such a folder, or an export that cannot be loaded.
    """
    from ..heads.build import read_dense_config  # with torchvision's detectors: not for every command

    path = local_path(source)
    if not str(source).strip():
        return None
    if path.suffix == ".safetensors" and path.is_file() and read_dense_config(path.parent) is not None:
        raise ValueError(f"{source} is a file of a detector or segmenter; name its folder, {path.parent}")
    if not path.is_dir() or (dense := read_dense_config(path)) is None:
        return None
    refuse_exported(dense[0])
    return path


def without_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the record of a conversion, which is of the converted file; but with the name of the
    published checkpoint, whose licence stays."""
    kept = {key: value for key, value in config.items() if key != RECORD}
    name = (config.get(RECORD) or {}).get(_CHECKPOINT)
    return kept if name is None else kept | {_CHECKPOINT: name}


def checkpoint_of(config: Mapping[str, Any]) -> Checkpoint | None:
    """The published checkpoint that a config.json of `without_record` names."""
    return checkpoints().get(config.get(_CHECKPOINT))


def origin(config: Mapping[str, Any], record: Mapping[str, Any] | None, folder: Path) -> dict[str, str | None]:
    """Rows of a card: whence the weights of a folder are, and their licence, where that is known."""
    checkpoint = checkpoint_of(config)
    if checkpoint is not None:
        address = checkpoint.address or checkpoint.page
        return {
            "weights": f"`{checkpoint.name}`, published as {address}, converted; from {folder}",
            "licence of the published weights": checkpoint.weights_licence,
        }
    if record is not None:
        licence = (config.get("pretrained_cfg") or {}).get("license")
        return {
            "weights": f"from {folder}, converted from `{record['file']}`; not known to be a published file",
            "licence of the published weights": licence or "not known: that of whoever made the file",
        }
    return {"weights": f"from {folder}"}


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
    with library(to, f"convert {name}"):
        FORMATS[to].write(job, folder)
    if FORMATS[to].not_here() is not None:
        return None
    difference = _largest_difference(original, run_of(to, folder), inputs)
    limit = HALF_TOLERANCE if job.half else TOLERANCE
    if not difference <= limit:  # also true of NaN
        raise ExportError(
            f"the exported {name} differs from the original by {difference:.1e} of the largest logit, more than "
            f"{limit:.0e}; nothing was written"
        )
    return difference


def check_output(output: str | Path, force: bool, sources: Sequence[Path] = (), to: str = "safetensors") -> Path:
    """The folder to write, as a path.

    Raises:
        ValueError: if it is a file, one of ``sources``, a training run, not empty without ``force``, or holds model
            files of another format than ``to``, which would stay beside a config.json and a card that are not theirs.
    """
    output = Path(output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; the output is a folder")
    above = next((parent for parent in output.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{output} cannot be a folder: {above} is a file")
    if output.resolve() in (source.resolve() for source in sources):
        raise ValueError(f"{output} is what is exported; choose another folder")
    if not force and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another folder, or --force to replace files in it")
    for best in ("best", "best.old"):
        if (output / best / "config.json").is_file():
            raise ValueError(
                f"{output} is a training run: its {best}/ would be read instead of what is written; choose another "
                "folder"
            )
    if left := stale(output, to):
        raise ValueError(
            f"{output} holds {', '.join(left)}, which {to} does not replace and which would be left of another model; "
            "choose another folder, or remove them"
        )
    return output


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder under a temporary name, whose files are put in place as `output` if the block ends well.

    Raises:
        OSError: if it cannot be written, or meanwhile another export was put there, which would be mixed with this one.
    """
    config = output / "config.json"
    filled = config.exists()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        folder = Path(scratch) / "export"
        folder.mkdir()
        yield folder
        if config.exists() and not filled:
            raise OSError(f"{output} was written by another export meanwhile; choose another folder")
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
    with library("onnxruntime", "quantise this model"):
        quantize(file, folder / "int8.onnx", batches)
    os.replace(folder / "int8.onnx", file)
    run = run_of("onnx", folder)
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


def _top1(model: nn.Module, config: Mapping[str, Any], images: str | Path) -> tuple[float, int]:
    from .verify import top1  # which imports this module

    return top1(model, Path(images), config)


def describe_onnx(folder: Path, facts: Mapping[str, Any]) -> None:
    """Put facts into the metadata of ``model.onnx``, each as JSON, for whoever has the file without the folder."""
    import onnx

    file, new = folder / "model.onnx", folder / "described.onnx"
    model = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(model, {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()})
    onnx.save(model, new)
    os.replace(new, file)


def _facts(model: nn.Module) -> dict[str, Any]:
    """How images are prepared for a classifier, and what its classes are called, where that is known."""
    facts = {"architecture": model.pretrained_cfg["architecture"]}
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    facts |= {key: config[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")}
    names = label_names(model)
    return facts if names is None else facts | {"label_names": names}


def _one_size(architecture: str, to: str) -> str | None:
    """Why the graph of a model is for one height and width; None if it need not be."""
    if architecture in list_models() and family(architecture) in ANY_SIZE:
        if to == "aoti" and family(architecture) != "CARE":
            return "AOTInductor does not end within ten minutes with windows of free sizes; pt2 and onnx hold them"
        return None
    *names, last = ANY_SIZE
    return f"free sizes are offered for {', '.join(names)} and {last} alone; without it the file has its input size"


def check_inputs(
    model: nn.Module, images: Sequence[str | Path], to: str = "onnx", dynamic: bool = False
) -> dict[str, Tensor]:
    """What to check with: random batches of two sizes, and photographs. Words -> ``[B, C, H, W]``."""
    channels, rows, columns = model.pretrained_cfg["input_size"]
    generator = torch.Generator().manual_seed(0)
    batches = (1,) if to == "coreml" else (1, 3)
    inputs = {f"random, batch {n}": torch.randn(n, channels, rows, columns, generator=generator) for n in batches}
    if dynamic:
        for height, width in ((LEAST_SIZE, columns + 32), (rows + 45, LEAST_SIZE), (2 * rows, columns // 2 + 19)):
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
            if error > worst or math.isnan(error):  # NaN stays: nothing is more than it
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


def _card(
    model: nn.Module,
    config: dict[str, Any],
    found: Source,
    record: Mapping[str, Any] | None,
    to: str,
    job: Job,
    int8: bool,
    done: Export,
) -> str:
    cfg = {**(get_pretrained_cfg(config["architecture"]).to_dict()), **config.get("pretrained_cfg", {})}
    facts, names, classes = _facts(model), label_names(model), str(model.num_classes)
    if names:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names)).replace("|", "\\|")
        classes += f": {listed}" if len(names) <= _LISTED else ", their names in config.json"
    channels, rows, columns = facts["input_size"]
    parameters = sum(p.numel() for p in model.parameters())
    if found.folder is None:
        whence = {"weights": f"published as `{found.name}`, {cfg.get('origin_url')}"}
        whence["licence of the published weights"] = cfg.get("license")
    else:
        whence = origin(config, record, found.folder)
    rows_of_table = {
        "architecture": f"`{config['architecture']}`, {parameters:,} parameters",
        "paper": ", ".join(filter(None, [cfg.get("paper_name"), _text(cfg.get("paper_ids"))])),
        **whence,
        "input": f"{channels} x {rows} x {columns}, from pixels in [0, 1] less mean {_text(facts['mean'])}, by std "
        f"{_text(facts['std'])}; resized ({facts['interpolation']}), crop {facts['crop_pct']} ({facts['crop_mode']})",
        "classes": classes,
        "measured": _measured(found),
        "numbers": "float16; images and logits float32" if job.half else None,
        "size": f"any height and width from {LEAST_SIZE} on" if job.any_size else None,
        "check of this file": "; ".join([checked(to, done), *done.notes]),
    }
    size = "height, width" if job.any_size else f"{rows}, {columns}"
    use = FORMATS[to].use.replace("SHAPE", f"[{'batch' if job.any_batch else 1}, {channels}, {size}]")
    if prepare := preparing(model):
        own = dict.fromkeys(("safetensors", "pt2", "aoti"), "images = torch.from_numpy(images)\n")
        own["coreml"] = "image = images\n"
        use = prepare + "\n" + use.replace("\n\n", "\n\n" + own.get(to, ""), 1)
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
    epoch = score.get("best_epoch", score["epochs"])
    return f"top-1 {score['top1']:.2f} % on {score['n']:,} held-out images, after epoch {epoch} of {score['epochs']}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _text(value: Any) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value or "")


def _put_in_place(folder: Path, output: Path) -> None:
    """Move a finished folder to its name; into a folder that exists entry by entry, each file replaced in one step."""
    for path in folder.rglob("*"):  # safetensors writes for the owner alone
        path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
    if not output.exists():
        os.rename(folder, output)
        return
    for path in sorted(folder.iterdir()):
        target, new, old = output / path.name, output / f".{path.name}.new", output / f".{path.name}.old"
        for left in (new, old):  # of an export that was killed
            _remove(left)
        shutil.move(path, new)
        if target.exists() and (target.is_dir() or new.is_dir()):  # a folder is replaced by no single step
            os.rename(target, old)
        os.replace(new, target)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
