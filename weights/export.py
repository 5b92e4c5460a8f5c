"""Write a model for use elsewhere, in one of the formats of ``formats.py``, checked there against the original.

Classifiers and dense models (detectors, segmenters) differ in what is traced and in how outputs are compared.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from ..backbones import family, list_models
from ..backbones.loading import load, local_path, refuse_exported, resolve
from ..heads.checkpoint import load_dense, read_dense_config, reparameterize
from ..heads.detection import Detector
from ..heads.detection.traceable import OneImage, suppress, suppress_op
from ..heads.registry import head_spec
from . import ANY_SIZE, cards
from .compare import Difference, compare, detection_error, relative_error
from .folder import RECORD, TOLERANCE, check_output, published_config, staged, without_record, write_config
from .formats import FORMATS, LEAST_SIZE, ExportError, ExportSpec, Run, library, output_names, outputs_of, run_of
from .images import metadata, preprocessing, read_batches, sample_images, top1

INT8_TOLERANCE = 0.25  # root mean square, of the logits': beyond it, the calibration images were the wrong ones
INT8_LARGEST = 1.0  # of the largest logit, on the inputs of the check, noise among them
HALF_TOLERANCE = 1e-2  # of the largest logit, of a model in float16, whose numbers have 11 bits
_TRACED_SIZE = (136, 152)  # for dynamic shape: no map of any level has a length that a tracer takes for a constant


@dataclass(frozen=True)
class ExportResult:
    """What was written: the folder, its files, and how far its outputs are from the original's (of the largest)."""

    folder: Path
    files: list[str]
    difference: float | None  # None where this machine cannot run the format
    checked: list[str] = field(default_factory=list)  # the inputs it was checked on
    notes: list[str] = field(default_factory=list)  # other results, in words


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
) -> ExportResult:
    """Write a model to the folder ``output`` in the format ``to``, check it there, and only then put it in place.

    ``config.json`` and a card, README.md, which shows how to run the model, go with it. Branches and norms that only
    training needs are folded. Inputs and outputs:

    * classifiers: ``image`` ``[batch, C, H, W]``, float32 and prepared as the card shows, at the model's input size, to
      ``logits`` ``[batch, classes]``
    * segmenters: ``image`` ``[batch, C, rows, columns]`` in [0, 1] to ``logits`` ``[batch, classes, rows, columns]``
    * detectors: ``image`` ``[1, C, rows, columns]`` in [0, 1] to ``boxes`` ``[n, 4]`` (corners, in pixels), ``labels``
      int64 ``[n]`` from 0, ``scores`` ``[n]`` in descending order, and with masks ``masks`` ``[n, 1, rows, columns]``;
      resizing to the detector's own size and non-maximum suppression are inside

    Args:
        source: what `foveal.load` takes.
        to: ``safetensors`` (as trained, for `foveal.load` and timm), ``onnx``, ``pt2`` (`torch.export`), ``aoti``
            (compiled for this machine), ``openvino`` or ``coreml`` (checked on macOS only).
        images: image files to check with, besides random inputs; without any, two photographs of scikit-learn's.
        half: weights, and where the runtime can arithmetic, in float16; inputs and outputs stay float32.
        int8: ONNX with convolutions and linear layers in 8 bits, see `quantize.py`.
        calibration: some hundred image files, or folders of them, that set the ranges for ``int8``.
        dynamic: make height and width dynamic, too, from `LEAST_SIZE` pixels on.
        size: rows and columns of the images of a detector or segmenter; None: `default_size`.
        score: a folder of images for each class, on which the original and the exported model are scored.
        force: write into a folder that is not empty, replacing files of the same names and no others.

    Raises:
        ValueError: for an unknown format or one without what is asked for, a source or output folder that cannot be
            used, or a detector that finds nothing in the images, so that nothing is compared.
        ImportError: if the format needs a package that is not installed.
        OSError: if the output cannot be written or an image not be read.
        ExportError: if outputs differ by more than `TOLERANCE`, `HALF_TOLERANCE` or `INT8_LARGEST`, or the format's
            own library cannot convert or run the model; nothing is written.

    Examples:
        >>> import timm
        >>> model = timm.create_model("test_foveal_dinat", num_classes=3)
        >>> timm.models.save_for_hf(model, "folder", safe_serialization=True)
        >>> from foveal.weights.export import export
        >>> export("folder", "safetensors", "exported").files
        ['README.md', 'config.json', 'model.safetensors']
    """
    options = Options(to.lower(), images, half, int8, calibration, dynamic, size, score)
    folder = _dense_folder(source)
    job = _Classifier(source, options) if folder is None else _Dense(folder, options)
    output = check_output(output, force, job.folders, options.to)
    job.load()
    return _write(job, options, output)


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

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise ValueError(f"unknown format {self.to!r}, must be one of {', '.join(FORMATS)}")


def _write(job: _Classifier | _Dense, options: Options, output: Path) -> ExportResult:
    """Everything that happens after the model is loaded."""
    to, spec, inputs, notes = options.to, job.spec(), job.inputs(), []
    expected = {name: outputs_of(job.model, x) for name, x in inputs.items()}
    notes += job.check(expected)
    before = top1(job.model, options.score, job.config) if options.score is not None else None
    batches = read_batches(job.model, options.calibration) if options.int8 else []
    with staged(output) as folder:
        write_config(folder, job.config)
        with library(to, f"convert {job.name}"):
            FORMATS[to].write(spec, folder)
        runs = FORMATS[to].not_here() is None
        limit = HALF_TOLERANCE if spec.half else TOLERANCE
        difference = compare(expected, run_of(to, folder), inputs, limit, job.difference) if runs else None
        if options.int8:
            notes.append(_to_int8(folder, job.model, batches))
            difference = compare(expected, run_of(to, folder), inputs, INT8_LARGEST, job.difference)
        if to == "onnx":
            set_onnx_metadata(folder, job.metadata())
        if before is not None:
            after = top1(_Exported(run_of(to, folder), spec, job.model), options.score, job.config)
            notes.append(_scores(before, after, options.score))
        checked = list(inputs) if runs else []
        (folder / "README.md").write_text(job.card(spec, difference, checked, notes), encoding="utf-8")
        files = sorted(path.name for path in folder.iterdir())
    return ExportResult(output, files, difference, checked, notes)


def _scores(before: tuple[float, int], after: tuple[float, int], images: str | Path) -> str:
    (was, _), (now, count) = before, after
    return f"top-1 {now:.2f} % on {count:,} images of {images}, the original {was:.2f} % ({now - was:+.2f})"


def _dense_folder(source: str | Path) -> Path | None:
    """The folder of a detector or segmenter that `foveal.load` takes; None of anything else.

    Raises:
        ValueError: if it is one file of such a folder, or an export that cannot be loaded.
    """
    path = local_path(source)
    if not str(source).strip():
        return None
    if path.suffix == ".safetensors" and path.is_file() and read_dense_config(path.parent) is not None:
        raise ValueError(f"{source} is a file of a detector or segmenter; name its folder, {path.parent}")
    if not path.is_dir() or (dense := read_dense_config(path)) is None:
        return None
    refuse_exported(dense[0])
    return path


# ---- classifiers


class _Classifier:
    """A classifier to export, prepared as its ``pretrained_cfg`` says."""

    difference: Difference = staticmethod(relative_error)

    def __init__(self, source: str | Path, options: Options) -> None:
        to, self.source, self.options, self.found = options.to, source, options, resolve(source)
        fixed, elsewhere = _fixed_size(self.found.architecture, to), FORMATS[to].not_here()
        features = ((self.found.config or {}).get("model_args") or {}).get("features_only")
        problems = {
            f"{source} is a backbone that returns feature maps; what is exported are classifiers": features,
            f"--size {options.size} is for detectors and segmenters, not for {source}": options.size is not None,
            "--int8 is for onnx without --half": options.int8 and (to != "onnx" or options.half),
            "--int8 and --calibration, some hundred images, need each other": options.int8 != bool(options.calibration),
            f"{self.found.architecture} does not support --dynamic: {fixed}": options.dynamic and fixed,
            f"--score runs the exported model, and {to} does not run here: {elsewhere}": options.score and elsewhere,
        }
        FORMATS[to].check(to, options.dynamic)
        if found := [text for text, wrong in problems.items() if wrong]:
            raise ValueError("; ".join(found))
        self.name = self.found.architecture
        self.folders = () if self.found.folder is None else (self.found.folder, local_path(source))

    def load(self) -> None:
        """Load the model, and refuse what cannot be seen before."""
        model: Any = load(self.source)
        config = self.found.config or published_config(model.pretrained_cfg, model.num_classes, model.num_features)
        self.model, self.config, self.record = model, without_record(config), config.get(RECORD)
        to, size = self.options.to, model.pretrained_cfg["input_size"]
        if self.options.dynamic and min(size[1:]) < LEAST_SIZE:
            raise ValueError(f"--dynamic takes heights and widths from {LEAST_SIZE} on, {self.source} has {size[1:]}")
        if to == "safetensors":
            return
        shape = outputs_of(model, torch.zeros(1, *size))[0].shape[1:]
        if model.num_classes < 1 or tuple(shape) != (model.num_classes,):
            raise ValueError(
                f"{self.source} returns {list(shape)} for an image and has {model.num_classes} classes (num_classes, "
                f"global_pool?): {to} holds a classifier; --to safetensors takes it as it is"
            )

    def spec(self) -> ExportSpec:
        return classifier_spec(self.model, self.options.to, self.options.half, self.options.dynamic)

    def inputs(self) -> dict[str, Tensor]:
        return classifier_inputs(self.model, self.options.images, self.options.to, self.options.dynamic)

    def check(self, expected: Mapping[str, Sequence[Tensor]]) -> list[str]:
        return []

    def metadata(self) -> dict[str, Any]:
        return metadata(self.model)

    def card(self, spec: ExportSpec, difference: float | None, checked: list[str], notes: list[str]) -> str:
        options, folder = self.options, self.found.folder
        if folder is None:
            cfg: Any = self.model.pretrained_cfg
            origin = {"weights": f"published as `{self.found.name}`, {cfg.get('origin_url')}"}
            origin["licence of the published weights"] = cfg.get("license")
        else:
            origin = cards.origin(self.config, self.record, folder) | {"measured": cards.training_score(folder)}
        outcome = f"converted, not run: {FORMATS[options.to].not_here()}"
        if difference is not None:
            outcome = f"differs from the original by {difference:.1e} of the largest logit"
        flags = " --half" * options.half + " --int8" * options.int8 + " --dynamic" * options.dynamic
        return cards.classifier_card(self.model, options.to, spec, origin, "; ".join([outcome, *notes]), flags)


def classifier_spec(model: Any, to: str, half: bool = False, dynamic: bool = False) -> ExportSpec:
    """How a classifier is written to a format: reparameterized where it can be, with any batch."""
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
    """What to check with, by name: random batches of two sizes, and images. ``[B, C, H, W]``."""
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
    """Why the graph of a model is for one height and width; None if it need not be."""
    if architecture in list_models() and family(architecture) in ANY_SIZE:
        if to == "aoti" and family(architecture) != "CARE":
            return "AOTInductor does not end within ten minutes with windows of dynamic shape; use pt2 or onnx"
        return None
    return f"only {', '.join(ANY_SIZE)} do; without it the file has the model's input size"


class _Exported(nn.Module):
    """An exported classifier that can be scored."""

    def __init__(self, run: Run, spec: ExportSpec, model: Any) -> None:
        super().__init__()
        self.run, self.single = run, not spec.any_batch
        self.pretrained_cfg, self.num_classes = model.pretrained_cfg, model.num_classes

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.run(batch)[0] for batch in (images.split(1) if self.single else [images])])


@torch.no_grad()
def _to_int8(folder: Path, model: Any, batches: Sequence[Tensor]) -> str:
    """Quantize ``model.onnx`` in place. Returns how the outputs changed on the calibration images, in words.

    Raises:
        ExportError: if they are further from the original's than `INT8_TOLERANCE`.
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
            f"in 8 bits the logits of the calibration images differ by {error:.2f} of their root mean square, more "
            f"than {INT8_TOLERANCE}; nothing was written"
        )
    return (
        f"in 8 bits: root mean square difference {error:.1e} of the logits', the same first class for "
        f"{100 * agree:.1f} % of {len(got):,} calibration images"
    )


def set_onnx_metadata(folder: Path, facts: Mapping[str, Any]) -> None:
    """Put facts into the metadata of ``model.onnx``, each as JSON, for whoever has the file without the folder."""
    import onnx

    file = folder / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(model, {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()})
    onnx.save(model, file)


# ---- detectors and segmenters


class _Dense:
    """A detector or segmenter to export, for images of one size in [0, 1]."""

    def __init__(self, source: Path, options: Options) -> None:
        (self.folder, self.read), self.source, self.options = read_dense_config(source), source, options
        asked = {"--half": options.half, "--int8": options.int8, "--calibration": bool(options.calibration)}
        asked |= {"--dynamic": options.dynamic, "--score": options.score is not None}
        if given := [name for name, value in asked.items() if value]:
            raise ValueError(f"{', '.join(given)}: for classifiers only; {source} is a detector or segmenter")
        to, size = options.to, options.size
        head = head_spec(self.read.get("task"), (self.read.get("arguments") or {}).get("head"))
        known = [name for name in ("safetensors", "onnx", "pt2", "openvino") if name not in head.not_exported]
        if to not in known:
            reason = head.not_exported.get(to, "it is for classifiers only")
            raise ValueError(f"{head.name} ({head.task}) exports to {', '.join(known)}, not to {to}: {reason}")
        FORMATS[to].check(to)
        if size is not None and (to == "safetensors" or len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be positive rows and columns, and none for safetensors; got {size} for {to}")
        self.name, self.folders = str(source), (self.folder, source)

    def load(self) -> None:
        model, to = load_dense(self.source), self.options.to
        self.size = self.options.size or default_size(model)
        self.model, self.record, self.config = model, self.read.get(RECORD), without_record(self.read)
        if to != "safetensors":
            made = {"format": to, "size": list(self.size), "outputs": list(output_names(model))}
            self.config |= {"export": made}

    @functools.cached_property
    def difference(self) -> Difference:
        return detection_error(self.model) if isinstance(self.model, Detector) else relative_error

    def spec(self) -> ExportSpec:
        return dense_spec(self.model, self.options.to, self.size)

    def inputs(self) -> dict[str, Tensor]:
        """Random values, and images resized to the size; ``[B, C, H, W]``."""
        channels = cards.channels_of(self.model)
        batch = 1 if isinstance(self.model, Detector) else 2
        generator = torch.Generator().manual_seed(1)
        inputs = {f"random, batch {batch}": torch.rand(batch, channels, *self.size, generator=generator)}
        for name, image in sample_images(self.options.images, channels).items():
            pixels = pil_to_tensor(image).float().div(255)[None]
            resized = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)
            inputs[name] = resized.clamp(0, 1)
        return inputs

    def check(self, expected: Mapping[str, Sequence[Tensor]]) -> list[str]:
        if not isinstance(self.model, Detector):
            return []
        count = sum(len(boxes) for boxes, *_ in expected.values())
        if not count:
            raise ValueError(
                f"{self.source} finds nothing in {', '.join(expected)}, so nothing can be compared; name an image in "
                "which it does with --image"
            )
        return [f"{count} detections compared"]

    def metadata(self) -> dict[str, Any]:
        channels = cards.channels_of(self.model)
        return {"task": self.read["task"], "input_size": [channels, *self.size], "classes": list(self.model.classes)}

    def card(self, spec: ExportSpec, difference: float | None, checked: list[str], notes: list[str]) -> str:
        detects = isinstance(self.model, Detector)
        measure = "of the longer side (boxes) or of 1 (scores, masks)" if detects else "of the largest logit"
        outcome = f"differs from the original by {difference:.1e} {measure}, on {'; '.join(checked)}"
        origin = cards.origin(self.config, self.record, self.folder)
        return cards.dense_card(self.model, self.options.to, self.size, origin, "; ".join([outcome, *notes]))


def default_size(model: Any) -> tuple[int, int]:
    """Rows and columns of a photograph, 4:3, as the model sees it in evaluation.

    A detector's short side; the sliding windows of a segmenter, else the shorter bound of its images, else the input
    size of its backbone. The long side is rounded up to a multiple of 32, within the bounds of the recipe.
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
    generator, names = torch.Generator().manual_seed(0), output_names(model)
    if not isinstance(model, Detector) or to == "safetensors":
        return ExportSpec(model, torch.rand(2, cards.channels_of(model), *size, generator=generator), names)
    example = torch.rand(1, cards.channels_of(model), *size, generator=generator)
    # ONNX has an operator that suppresses by class, for PyTorch torchvision's comes with it
    graph = OneImage(model, size, suppress_op if to == "onnx" else suppress).eval()
    translations = {torch.ops.foveal.suppress.default: _onnx_suppress} if to == "onnx" else {}
    return ExportSpec(graph, example, names, any_batch=False, translations=translations)


def _onnx_suppress(boxes: Any, scores: Any, groups: Any, count: int, threshold: float) -> Any:
    """`heads.detection.traceable.suppress` by ONNX's NonMaxSuppression, which numbers boxes class by class."""
    from onnxscript import opset18

    op: Any = opset18
    own = op.Equal(op.Unsqueeze(groups, [0]), op.Unsqueeze(op.Constant(value_ints=list(range(count))), [1]))
    by_group = op.Where(own, op.Unsqueeze(scores, [0]), op.Constant(value_float=-1.0))
    found = op.NonMaxSuppression(
        op.Unsqueeze(boxes, [0]),
        op.Unsqueeze(by_group, [0]),
        op.Constant(value_ints=[2**31 - 1]),
        op.Constant(value_floats=[threshold]),
        op.Constant(value_floats=[-0.5]),  # scores of no other group
    )
    left = op.Squeeze(op.Slice(found, [2], [3], [1]), [1])
    _, order = op.TopK(op.Gather(scores, left), op.Shape(left), largest=1, sorted=1)
    return op.Gather(left, order)
