"""Export a model to one of the formats of `formats.FORMATS`, and compare what was written with the original."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from ..backbones import family, list_models
from ..backbones.images import class_labels
from ..backbones.loading import Source, load, local_path, refuse_exported, resolve
from ..files import write_json
from ..heads.checkpoint import load_dense, read_dense_config, reparameterize
from ..heads.detection import Detector
from ..heads.detection.traceable import OneImage, suppress, suppress_op
from ..heads.registry import head_spec
from ..train.tasks import import_remembered
from . import ANY_SIZE, cards
from .compare import Difference, compare, detection_error, relative_error
from .folder import RECORD, TOLERANCE, check_output, published_config, staged, without_record
from .formats import FORMATS, LEAST_SIZE, ExportError, ExportSpec, library, output_names, outputs_of, run_of
from .images import metadata, preprocessing, read_batches, sample_images, top1

INT8_TOLERANCE = 0.25  # relative RMS error of the logits; above it, the calibration images do not suit the model
INT8_LARGEST = 1.0  # of the largest logit, on the inputs of the check, random ones included
HALF_TOLERANCE = 1e-2  # of the largest logit, in float16 with its 11 significant bits
_TRACED_SIZE = (136, 152)  # for dynamic shapes: no side of a feature map is 1, which a tracer treats as a constant


@dataclass(frozen=True)
class ExportResult:
    """What was written: the folder, its files, and the largest difference from the original's outputs."""

    folder: Path
    files: list[str]
    difference: float | None  # None where this machine cannot run the format
    checked: list[str] = field(default_factory=list)  # names of the inputs compared
    notes: list[str] = field(default_factory=list)  # other results, as text


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
    pretrained: bool = True,
    on_phase: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Write a model to the folder ``output`` in the format ``to``; the folder appears only once the outputs match.

    The folder also gets ``config.json`` and a card, README.md, with code that runs the model. Training-only branches
    and norms are folded. Inputs and outputs:

    * classifiers: ``image`` ``[batch, C, H, W]``, float32 and normalized as the card shows, at the model's input size,
      to ``logits`` ``[batch, classes]``
    * segmenters: ``image`` ``[batch, C, rows, columns]`` in [0, 1] to ``logits`` ``[batch, classes, rows, columns]``
    * detectors: ``image`` ``[1, C, rows, columns]`` in [0, 1] to ``boxes`` ``[n, 4]`` (corners, in pixels), ``labels``
      int64 ``[n]`` from 0, ``scores`` ``[n]`` in descending order, and with masks ``masks`` ``[n, 1, rows, columns]``;
      resizing to the detector's own size and non-maximum suppression are part of the graph

    Args:
        source: as for `foveal.load`.
        to: ``safetensors`` (as trained, for `foveal.load` and timm), ``onnx``, ``pt2`` (`torch.export`), ``aoti``
            (compiled for this machine), ``openvino`` or ``coreml`` (checked on macOS only).
        images: image files to compare on, besides random inputs; by default scikit-learn's two sample images.
        half: weights, and computation where the runtime supports it, in float16; inputs and outputs stay float32.
        int8: ONNX with convolutions and linear layers in 8 bits, see `quantize.py`.
        calibration: a few hundred image files, or folders of them, that set the ranges for ``int8``.
        dynamic: dynamic height and width as well, from `LEAST_SIZE` pixels on.
        size: rows and columns of the images of a detector or segmenter; None: `default_size`.
        score: an ImageFolder on which the original and the exported classifier are scored.
        force: write into a folder that is not empty, replacing files of the same names and no others.
        pretrained: False builds a model name with random weights instead of fetching published ones.
        on_phase: called with each phase in a few words, before it begins.

    Raises:
        ValueError: unknown format, unsupported options, a source or output folder that cannot be used, or a detector
            without detections in the images, so that nothing is compared.
        ImportError: a package that the format needs is not installed.
        OSError: the output cannot be written or an image not be read.
        ExportError: outputs differ by more than `TOLERANCE`, `HALF_TOLERANCE` or `INT8_LARGEST`, or the format's own
            library cannot convert or run the model; nothing is written.

    Examples:
        >>> import timm
        >>> model = timm.create_model("test_foveal_dinat", num_classes=3)
        >>> timm.models.save_for_hf(model, "folder", safe_serialization=True)
        >>> from foveal.weights.export import export
        >>> export("folder", "safetensors", "exported").files
        ['README.md', 'config.json', 'model.safetensors']
    """
    options = Options(to.lower(), images, half, int8, calibration, dynamic, size, score, pretrained)
    import_remembered(source)
    if dense := _dense_folder(source):
        folder, prepare = dense[0], functools.partial(_dense, source, *dense, options)
    else:
        found = resolve(source)
        folder, prepare = found.folder, functools.partial(_classifier, source, found, options)
    output = check_output(output, force, [folder, local_path(source)] if folder else [], FORMATS[options.to].file)
    on_phase(f"loading {source}")
    job = prepare()
    return _write(job, options, output, on_phase)


@dataclass(frozen=True)
class Options:
    """The arguments of `export`."""

    to: str
    images: Sequence[str | Path] = ()
    half: bool = False
    int8: bool = False
    calibration: Sequence[str | Path] = ()
    dynamic: bool = False
    size: tuple[int, int] | None = None
    score: str | Path | None = None
    pretrained: bool = True

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise ValueError(f"unknown format {self.to!r}, must be one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Job:
    """A loaded model, how it is written, and what is compared."""

    name: str
    model: Any
    spec: ExportSpec
    inputs: dict[str, Tensor]  # by name, [B, C, H, W]
    difference: Difference
    unit: str  # of the difference
    config: dict[str, Any]  # config.json
    metadata: dict[str, Any]  # of an ONNX file
    card: Callable[[str], str]  # with the result of the comparison


def _write(job: Job, options: Options, output: Path, on_phase: Callable[[str], None]) -> ExportResult:
    """Convert, compare, and put the folder in place."""
    to, spec, inputs, notes = options.to, job.spec, job.inputs, []
    on_phase(f"running {job.name} on {len(inputs)} inputs")
    expected = {name: outputs_of(job.model, x) for name, x in inputs.items()}
    if isinstance(job.model, Detector):
        notes.append(_detections(job.name, expected))
    before = None if options.score is None else top1(job.model, options.score, job.config)
    batches = read_batches(job.model, options.calibration) if options.int8 else []
    with staged(output) as folder:
        write_json(folder / "config.json", job.config)
        on_phase(f"converting to {to}, which may take minutes")
        with library(to, f"convert {job.name}"):
            FORMATS[to].write(spec, folder)
        unavailable, difference = FORMATS[to].not_here(), None
        if not unavailable:
            on_phase(f"comparing {FORMATS[to].file} with the original")
            limit = HALF_TOLERANCE if spec.half else TOLERANCE
            difference = compare(expected, run_of(to, folder), inputs, limit, job.difference)
        if options.int8:
            on_phase("quantizing to 8 bits, and comparing again")
            notes.append(_to_int8(folder, job.model, batches))
            difference = compare(expected, run_of(to, folder), inputs, INT8_LARGEST, job.difference)
        if to == "onnx":
            set_onnx_metadata(folder, job.metadata)
        if before is not None:
            on_phase(f"scoring on {options.score}")
            run, batch = run_of(to, folder), None if spec.any_batch else 1
            after = top1(job.model, str(options.score), job.config, lambda x: run(x)[0], batch)
            (was, _), (now, count) = before, after
            change = f"the original {was:.2f} % ({now - was:+.2f})"
            notes.append(f"top-1 {now:.2f} % on {count:,} images of {options.score}, {change}")
        checked = [] if unavailable else list(inputs)
        outcome = f"converted, not run: {unavailable}"
        if difference is not None:
            outcome = f"differs from the original by {difference:.1e} {job.unit}, on {', '.join(checked)}"
        (folder / "README.md").write_text(job.card("; ".join([outcome, *notes])), encoding="utf-8")
        files = sorted(path.name for path in folder.iterdir())
    return ExportResult(output, files, difference, checked, notes)


def _detections(name: str, expected: Mapping[str, Sequence[Tensor]]) -> str:
    count = sum(len(boxes) for boxes, *_ in expected.values())
    if not count:
        raise ValueError(f"{name} detects nothing in {', '.join(expected)}: name an image with objects by --image")
    return f"{count} detections compared"


def _dense_folder(source: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Model folder and config.json of a detector or segmenter; None for other sources.

    Raises:
        ValueError: a file in such a folder, or an export that cannot be loaded.
    """
    path = local_path(source)
    if path.suffix == ".safetensors" and path.is_file() and read_dense_config(path.parent) is not None:
        raise ValueError(f"{source} is a file of a detector or segmenter; name its folder, {path.parent}")
    if not str(source).strip() or not path.is_dir() or (dense := read_dense_config(path)) is None:
        return None
    refuse_exported(dense[0])
    return dense


# ---- classifiers


def _classifier(source: str | Path, found: Source, options: Options) -> Job:
    """Check the options, and load a classifier, prepared according to its ``pretrained_cfg``."""
    to, elsewhere = options.to, FORMATS[options.to].not_here()
    fixed = _fixed_size(found.architecture, to)
    features = ((found.config or {}).get("model_args") or {}).get("features_only")
    problems = {
        f"{source} is a backbone that returns feature maps; export takes classifiers": features,
        f"--size {options.size} is for detectors and segmenters, not for {source}": options.size is not None,
        "--int8 requires onnx without --half": options.int8 and (to != "onnx" or options.half),
        "--int8 and --calibration, a few hundred images, require each other": options.int8 != bool(options.calibration),
        f"{found.architecture} does not support --dynamic: {fixed}": options.dynamic and fixed,
        f"--score runs the exported model, and {to} does not run here: {elsewhere}": options.score and elsewhere,
    }
    FORMATS[to].check(to, options.dynamic)
    if texts := [text for text, wrong in problems.items() if wrong]:
        raise ValueError("; ".join(texts))
    model: Any = _load_classifier(found, source, options)
    _check_logits(source, model, options)
    config: dict[str, Any] = found.config or published_config(
        model.pretrained_cfg, model.num_classes, model.num_features
    )
    if not features and "label_names" not in config and (names := class_labels(model, source)):
        config = config | {"label_names": names}
    if not options.pretrained:
        origin = {"weights": "none: random values"}
    elif found.folder is None:
        cfg = model.pretrained_cfg
        origin = {"weights": f"published as `{found.name}`, {cfg.get('origin_url')}"}
        origin["licence of the published weights"] = cfg.get("license")
    else:
        origin = cards.origin(without_record(config), config.get(RECORD), found.folder)
        origin["measured"] = cards.training_score(found.folder)
    spec = classifier_spec(model, to, options.half, options.dynamic)
    command = f"{found.name if found.folder is None else 'SOURCE'} --to {to}{' --dynamic' * options.dynamic}"
    command += " --half" * options.half + " --int8 --calibration IMAGES" * options.int8
    command += " --no-pretrained" * (not options.pretrained)
    return Job(
        name=found.architecture,
        model=model,
        spec=spec,
        inputs=classifier_inputs(model, options.images, to, options.dynamic),
        difference=relative_error,
        unit="of the largest logit",
        config=_stated_once(without_record(config), model),
        metadata=metadata(model),
        card=lambda checked: cards.classifier_card(model, to, spec, origin, checked, command),
    )


def _stated_once(config: dict[str, Any], model: Any) -> dict[str, Any]:
    """A config.json without ``num_classes`` in ``model_args``, which timm's `save_for_hf` writes and transformers
    refuses, as it stands beside them, too."""
    arguments = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
    kept = {key: value for key, value in config.items() if key != "model_args"} | {"num_classes": model.num_classes}
    return kept | {"model_args": arguments} if arguments else kept


def _load_classifier(found: Source, source: str | Path, options: Options) -> nn.Module:
    if not options.pretrained:
        if found.folder is not None:
            raise ValueError(f"--no-pretrained is for model names; {source} has weights of its own")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file each time
            return timm.create_model(found.name, pretrained=False).eval()
    hint = f"{source} --no-pretrained exports it with random weights"
    try:
        return load(source)
    except OSError as error:
        raise OSError(f"{error}. {hint}" if found.folder is None else str(error)) from error
    except ValueError as error:
        raise ValueError(f"{error} {hint}" if found.folder is None else str(error)) from error


def _check_logits(source: str | Path, model: Any, options: Options) -> None:
    """Raise ValueError for what only the loaded model shows: no logits, or an input size below the dynamic ones."""
    size = model.pretrained_cfg["input_size"]
    if options.dynamic and min(size[1:]) < LEAST_SIZE:
        raise ValueError(f"--dynamic takes heights and widths from {LEAST_SIZE} on, {source} has {size[1:]}")
    if options.to == "safetensors":
        return
    shape = outputs_of(model, torch.zeros(1, *size))[0].shape[1:]
    if model.num_classes < 1 or tuple(shape) != (model.num_classes,):
        raise ValueError(
            f"{source} returns {list(shape)} for an image and has {model.num_classes} classes (num_classes, "
            f"global_pool?): {options.to} requires a classifier; --to safetensors accepts any model"
        )


def classifier_spec(model: Any, to: str, half: bool = False, dynamic: bool = False) -> ExportSpec:
    """How a classifier is written to a format: reparameterized where it can be, with a dynamic batch size."""
    if to != "safetensors" and hasattr(model, "reparameterize"):
        model = copy.deepcopy(model).reparameterize()
    batch = 1 if to == "coreml" else 3
    channels, *size = model.pretrained_cfg["input_size"]
    if dynamic:
        size = _TRACED_SIZE
    example = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    return ExportSpec(model, example, any_batch=batch > 1, any_size=dynamic, half=half)


def classifier_inputs(
    model: Any, images: Sequence[str | Path], to: str = "onnx", dynamic: bool = False
) -> dict[str, Tensor]:
    """Inputs to compare on, by name: random batches of two sizes, and images. ``[B, C, H, W]``."""
    channels, rows, columns = model.pretrained_cfg["input_size"]
    generator = torch.Generator().manual_seed(0)
    batches = (1,) if to == "coreml" else (1, 3)
    inputs = {f"random, batch {n}": torch.randn(n, channels, rows, columns, generator=generator) for n in batches}
    if dynamic:
        for height, width in ((LEAST_SIZE, columns + 32), (rows + 45, LEAST_SIZE), (2 * rows, columns // 2 + 19)):
            shape = (1, channels, height, width)
            inputs[f"random, {height}x{width}"] = torch.randn(shape, generator=generator)
    transform = preprocessing(model)
    return inputs | {name: transform(image)[None] for name, image in sample_images(images, channels).items()}


def _fixed_size(architecture: str, to: str) -> str | None:
    """Why a model's graph has a fixed height and width; None if it supports a dynamic shape."""
    if architecture not in list_models() or family(architecture) not in ANY_SIZE:
        return f"only {', '.join(ANY_SIZE)} do; without it the file has the model's input size"
    if to == "aoti" and family(architecture) != "CARE":
        return "AOTInductor takes more than ten minutes for windows of dynamic shape; use pt2 or onnx"
    return None


@torch.no_grad()
def _to_int8(folder: Path, model: Any, batches: Sequence[Tensor]) -> str:
    """Quantize ``model.onnx`` in place; returns the change of the outputs on the calibration images, as text.

    Raises:
        ExportError: if the change exceeds `INT8_TOLERANCE`.
    """
    from .quantize import quantize

    file = folder / "model.onnx"
    with library("onnxruntime", "quantize this model"):
        quantize(file, folder / "int8.onnx", batches)
    os.replace(folder / "int8.onnx", file)
    run = run_of("onnx", folder)
    expected = torch.cat([model(batch) for batch in batches])
    got = torch.cat([run(batch)[0] for batch in batches])
    error = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()
    agree = (got.argmax(1) == expected.argmax(1)).float().mean().item()
    if not error <= INT8_TOLERANCE:
        raise ExportError(
            f"8-bit logits of the calibration images have a relative RMS error of {error:.2f}, more than "
            f"{INT8_TOLERANCE}; nothing was written"
        )
    return (
        f"8 bits: relative RMS error {error:.1e} of the logits, same top class for {100 * agree:.1f} % of {len(got):,} "
        "calibration images"
    )


def set_onnx_metadata(folder: Path, facts: Mapping[str, Any]) -> None:
    """Store facts in the metadata of ``model.onnx``, each as JSON, for users of the file without its folder, and name
    its dynamic axes as `ExportSpec` does (the exporter numbers them)."""
    import onnx

    file = folder / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    own = [axis.dim_param for axis in model.graph.input[0].type.tensor_type.shape.dim]
    names = {old: new for old, new in zip(own, ("batch", "", "height", "width"), strict=True) if old}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), axis.dim_param)
    onnx.helper.set_model_props(model, {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()})
    onnx.save(model, file)


# ---- detectors and segmenters


def _dense(source: str | Path, folder: Path, read: dict[str, Any], options: Options) -> Job:
    """Check the options, and load a detector or segmenter, which takes images of one size in [0, 1]."""
    to, size = options.to, options.size
    asked = {"--half": options.half, "--int8": options.int8, "--calibration": bool(options.calibration)}
    asked |= {"--dynamic": options.dynamic, "--score": options.score is not None}
    asked |= {"--no-pretrained": not options.pretrained}
    if given := [name for name, value in asked.items() if value]:
        raise ValueError(f"{', '.join(given)}: for classifiers only; {source} is a detector or segmenter")
    if read.get("task") == "upsample":
        raise ValueError(f"{source} is an upsampler, which is exported as a part of a model: train one with upsample=")
    head = head_spec(str(read.get("task")), str((read.get("arguments") or {}).get("head")))
    known = [name for name in ("safetensors", "onnx", "pt2", "openvino") if name not in head.not_exported]
    if to not in known:
        reason = head.not_exported.get(to, "it is for classifiers only")
        raise ValueError(f"{head.name} ({head.task}) exports to {', '.join(known)}, not to {to}: {reason}")
    FORMATS[to].check(to)
    if size is not None and (to == "safetensors" or len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be positive rows and columns, and none for safetensors; got {size} for {to}")
    model = load_dense(folder)
    size, config, detects = size or default_size(model), without_record(read), isinstance(model, Detector)
    if to != "safetensors":
        config["export"] = {"format": to, "size": list(size), "outputs": list(output_names(model))}
    channels, origin = len(cards.image_mean(model)), cards.origin(config, read.get(RECORD), folder)
    return Job(
        name=str(source),
        model=model,
        spec=dense_spec(model, to, size),
        inputs=_dense_inputs(model, options.images, size),
        difference=detection_error(model) if detects else relative_error,
        unit="of the longer side (boxes) or of 1 (scores, masks)" if detects else "of the largest logit",
        config=config,
        metadata={"task": read["task"], "input_size": [channels, *size], "classes": list(model.classes)},
        card=lambda checked: cards.dense_card(model, to, size, origin, checked),
    )


def _dense_inputs(model: Any, images: Sequence[str | Path], size: tuple[int, int]) -> dict[str, Tensor]:
    """Inputs to compare on, by name: random values, and images resized to ``size``. ``[B, C, H, W]``."""
    channels, batch = len(cards.image_mean(model)), 1 if isinstance(model, Detector) else 2
    generator = torch.Generator().manual_seed(1)
    inputs = {f"random, batch {batch}": torch.rand(batch, channels, *size, generator=generator)}
    for name, image in sample_images(images, channels).items():
        pixels = image if isinstance(image, Tensor) else pil_to_tensor(image).float().div(255)
        inputs[name] = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)
    return inputs


def default_size(model: Any) -> tuple[int, int]:
    """Rows and columns of a 4:3 image at the scale of the evaluation.

    The short side is a detector's, the size of a segmenter's sliding windows, else the lower bound of its scale, else
    the input size of its backbone. The long side is rounded up to a multiple of 32, within the bounds of the recipe.
    """
    if isinstance(model, Detector):
        transform: Any = model.detector.transform
        short, most = transform.min_size[-1], transform.max_size
    else:
        inference = model.config["preprocessing"].get("inference") or {}
        if inference.get("crop_size"):
            return tuple(inference["crop_size"])
        if not inference.get("scale"):
            return tuple(model.backbone.body.pretrained_cfg["input_size"][1:])
        short, most = min(inference["scale"]), max(inference["scale"])
    return min(short, most), min(-(-short * 4 // (3 * 32)) * 32, most)


def dense_spec(model: Any, to: str, size: tuple[int, int]) -> ExportSpec:
    """How a detector or a segmenter is written to a format: reparameterized, for images of one size."""
    if to != "safetensors":
        model = reparameterize(copy.deepcopy(model))
    names, single = output_names(model), isinstance(model, Detector) and to != "safetensors"
    shape = (1 if single else 2, len(cards.image_mean(model)), *size)
    example = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if not single:
        return ExportSpec(model, example, names)
    # ONNX has an operator for suppression by class, PyTorch gets torchvision's
    graph = OneImage(model, size, suppress_op if to == "onnx" else suppress).eval()
    translations = {torch.ops.foveal.suppress.default: _onnx_suppress} if to == "onnx" else {}
    return ExportSpec(graph, example, names, any_batch=False, translations=translations)


def _onnx_suppress(boxes: Any, scores: Any, groups: Any, count: int, threshold: float) -> Any:
    """`heads.detection.traceable.suppress` by ONNX's NonMaxSuppression, which orders boxes by class."""
    from onnxscript import opset18

    op: Any = opset18
    own = op.Equal(op.Unsqueeze(groups, [0]), op.Unsqueeze(op.Constant(value_ints=list(range(count))), [1]))
    by_group = op.Where(own, op.Unsqueeze(scores, [0]), op.Constant(value_float=-1.0))
    found = op.NonMaxSuppression(
        op.Unsqueeze(boxes, [0]),
        op.Unsqueeze(by_group, [0]),
        op.Constant(value_ints=[2**31 - 1]),
        op.Constant(value_floats=[threshold]),
        op.Constant(value_floats=[-0.5]),  # drops boxes of other groups
    )
    left = op.Squeeze(op.Slice(found, [2], [3], [1]), [1])
    _, order = op.TopK(op.Gather(scores, left), op.Shape(left), largest=1, sorted=1)
    return op.Gather(left, order)
