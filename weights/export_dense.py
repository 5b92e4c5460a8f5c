"""Write a detector or a segmenter for use elsewhere, checked against the original."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import expand_boxes
from torchvision.transforms.v2.functional import pil_to_tensor

from .._version import __version__
from ..backbones.images import MODES, to_mode
from ..heads.build import load_dense, read_dense_config, reparameterize, save_dense
from ..heads.detection import Detector
from ..heads.detection.traceable import OneImage, suppress, suppress_op
from .export import RECORD, TOLERANCE, Export, check_output, describe_onnx, origin, photographs, staged, without_record
from .formats import FORMATS, ExportError, Job, Run, library, run_of
from .images import read_image

Size = tuple[int, int]

_OPENVINO = ("upernet", "semantic_fpn")  # heads that were seen to be the same there


def export_dense(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    images: Sequence[str | Path] = (),
    size: Size | None = None,
    force: bool = False,
) -> Export:
    """Write what `foveal train detect` or `segment` left to the folder `output`, check it there, then put it in place.

    Beside the model's own file the folder gets ``config.json`` and a card, README.md, which says how to run it. Input
    is ``image``, float32 in [0, 1]; normalization is inside.

    * detectors, one image: ``[1, C, rows, columns]`` to ``boxes`` ``[n, 4]`` (corners in its pixels), ``labels`` int64
      ``[n]`` from 0 on, ``scores`` ``[n]``, the best first, and with masks ``masks`` ``[n, 1, rows, columns]``; the
      resize to the detector's own size and non-maximum suppression are inside
    * segmenters: ``[batch, C, rows, columns]`` to ``logits`` ``[batch, classes, rows, columns]``

    ``safetensors`` is the folder as `foveal.load` reads it. In all others branches are folded where the backbone or the
    neck can; an ONNX file has the names of the classes in its metadata.

    Args:
        source: a run's folder, or one of `save_dense`.
        to: ``"safetensors"``, ``"onnx"``, ``"pt2"``, or of UPerNet and semantic FPN ``"openvino"``.
        images: image files to check with, besides random inputs; without any, two photographs of scikit-learn's.
        size: rows and columns; None: `default_size`. Not for safetensors, which holds weights for every size.
        force: write into a folder that is not empty, replacing files of the same names and no others.

    Raises:
        ValueError: a format that cannot hold it, an output that is not empty or the source, or that with ``force``
            would keep another format's model, a size that is none, or a detector that finds nothing in the images, so
            that nothing could be compared.
        ImportError: if the format needs a package that is not installed.
        OSError: if the output cannot be written; the message names it.
        ExportError: if the exported model differs by more than `TOLERANCE`, or the format's own library cannot convert
            or run it; nothing is written then.
    """
    found = read_dense_config(source)
    if found is None:
        raise ValueError(f"{source} holds no detector or segmenter")
    folder, config = found
    config, record = without_record(config), config.get(RECORD)
    task, head = config.get("task"), (config.get("arguments") or {}).get("head")
    known = ("safetensors", "onnx", "pt2") + ("openvino",) * (head in _OPENVINO)
    if (task, head) == ("detect", "mask2former"):  # its boxes jump by a pixel where a mask's logit changes its sign
        known = ("safetensors",)
    if to not in known:
        raise ValueError(
            f"{source} holds a {head} of `foveal train {task}`, which goes to {', '.join(known)}, not to {to}"
        )
    FORMATS[to].check(to)
    if size is not None and to == "safetensors":
        raise ValueError(f"safetensors does not go with a size, {size}: it holds weights, for images of any size")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"a size is rows and columns of the images, got {size}")
    output = check_output(output, force, (folder, Path(source)), to)
    model = load_dense(source)
    size = size or default_size(model)
    inputs = _inputs(model, size, images)
    try:
        with staged(output) as scratch:
            if to == "safetensors":
                names = {"format", "task", "arguments", "classes", "preprocessing"}
                more = {key: value for key, value in config.items() if key not in names}
                save_dense(scratch, model, model.classes, config["preprocessing"], **more)
                again = load_dense(scratch)
                run: Run = lambda image: _answer(again, image)  # noqa: E731
            else:
                job = dense_job(model, to, size)
                with library(to, f"convert {source}"):
                    FORMATS[to].write(job, scratch)
                if to == "onnx":
                    shape = list(job.example.shape[1:])
                    describe_onnx(scratch, {"task": task, "input_size": shape, "classes": list(model.classes)})
                made = {"format": to, "size": list(size), "outputs": list(job.outputs)}
                text = json.dumps(config | {"export": made}, indent=2) + "\n"
                (scratch / "config.json").write_text(text, encoding="utf-8")
                run = run_of(to, scratch)
            difference, notes = _compare(model, run, inputs, source)
            done = Export(output, [], difference, list(inputs), notes)
            text = _card(model, to, size, origin(config, record, folder), done)
            (scratch / "README.md").write_text(text, encoding="utf-8")
            done.files.extend(sorted(path.name for path in scratch.iterdir()))
    except OSError as error:
        if error.errno is None:  # a message of this package
            raise
        raise OSError(f"cannot write {output}: {error.strerror}") from error  # it names a temporary folder
    return done


def default_size(model: nn.Module) -> Size:
    """Rows and columns of a photograph, 4:3, as the model sees it in evaluation.

    A detector's short side; the sliding windows of a segmenter, else the shorter bound of its images, else the size
    that its backbone was made for. The long side is rounded up to a multiple of 32, within the bounds of the recipe.
    """
    if isinstance(model, Detector):
        transform = model.detector.transform
        short, most = transform.min_size[-1], transform.max_size
    else:
        inference = model.config["preprocessing"].get("inference") or {}
        if inference.get("window"):
            return tuple(inference["window"])
        if not inference.get("bounds"):
            return tuple(model.features.network.pretrained_cfg["input_size"][1:])
        short, most = min(inference["bounds"]), max(inference["bounds"])
    return min(short, most), min(-(-short * 4 // (3 * 32)) * 32, most)


def dense_job(model: nn.Module, to: str, size: Size) -> Job:
    """How a detector or a segmenter is written: its branches folded, for images of one size."""
    model = reparameterize(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(0)
    channels = _channels(model)
    if not isinstance(model, Detector):
        return Job(model, torch.rand(2, channels, *size, generator=generator))
    example = torch.rand(1, channels, *size, generator=generator)
    # ONNX has an operator that suppresses by class, for PyTorch torchvision's comes with it
    graph = OneImage(model, size, suppress_op if to == "onnx" else suppress).eval()
    names = ("boxes", "labels", "scores", "masks")[: 3 + model.masks]
    translations = {torch.ops.foveal.suppress.default: _onnx_suppress} if to == "onnx" else {}
    return Job(graph, example, names, any_batch=False, translations=translations)


def _onnx_suppress(boxes: Any, scores: Any, groups: Any, count: int, threshold: float) -> Any:
    """`heads.detection.traceable.suppress` by ONNX's NonMaxSuppression, which numbers boxes class by class."""
    from onnxscript import opset18 as op

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


def _channels(model: nn.Module) -> int:
    return len(model.detector.transform.image_mean) if isinstance(model, Detector) else len(model.mean)


def _mean(model: nn.Module) -> list[float]:
    """The mean of the images by channel."""
    mean = model.detector.transform.image_mean if isinstance(model, Detector) else model.mean
    return [round(float(value), 6) for value in mean]


def _inputs(model: nn.Module, size: Size, images: Sequence[str | Path]) -> dict[str, Tensor]:
    """What to check with, by what it is: random values, and photographs brought to the size. ``[B, C, H, W]``."""
    channels = _channels(model)
    generator = torch.Generator().manual_seed(1)
    batch = 1 if isinstance(model, Detector) else 2
    inputs = {f"random, batch {batch}": torch.rand(batch, channels, *size, generator=generator)}
    pictures = {str(path): read_image(path, channels) for path in images}
    if not images and channels in (1, 3):
        pictures = {name: to_mode(picture, channels) for name, picture in photographs().items()}
    for name, picture in pictures.items():
        pixels = pil_to_tensor(picture).float().div(255)[None]
        inputs[name] = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
    return inputs


@torch.no_grad()
def _answer(model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """What the model itself gives, in the order of an exported one."""
    if not isinstance(model, Detector):
        return (model(image),)
    (found,) = model(list(image))
    return tuple(found[name] for name in ("boxes", "labels", "scores", "masks")[: 3 + model.masks])


@torch.no_grad()
def _compare(model: nn.Module, run: Run, inputs: Mapping[str, Tensor], source: str | Path) -> tuple[float, list[str]]:
    """The largest difference over all inputs, and what it was found on."""
    worst, objects = 0.0, 0
    for name, x in inputs.items():
        expected, got = _answer(model, x), run(x)
        if isinstance(model, Detector):
            error = detections_differ(expected, got, tuple(x.shape[-2:]), *_limits(model))
            objects += len(expected[0])
        else:
            error = ((got[0] - expected[0]).abs().max() / expected[0].abs().max()).item()
        if not error <= TOLERANCE:  # also true of NaN
            raise ExportError(
                f"the exported model finds other objects than {source} in {name}"
                if error == math.inf
                else f"the exported model differs from {source} by {error:.1e} on {name}, more than {TOLERANCE:.0e}; "
                "nothing was written"
            )
        worst = max(worst, error)
    if not isinstance(model, Detector):
        return worst, []
    if not objects:
        raise ValueError(
            f"{source} finds nothing in {', '.join(inputs)}, so nothing could be compared; name an image in which it "
            "does with --image"
        )
    return worst, [f"{objects} detections compared"]


def _limits(model: Detector) -> tuple[float, int]:
    """The score and the number that detections end at."""
    owner = getattr(model.detector, "roi_heads", model.detector)
    return owner.score_thresh, owner.detections_per_img


def detections_differ(
    expected: Sequence[Tensor], got: Sequence[Tensor], size: Size, threshold: float, limit: int
) -> float:
    """How far two answers to one image are apart: the largest difference of matched boxes (of the image's longer side),
    scores and masks; infinite if one has an object that the other lacks.

    Detections may come in another order. Those whose scores are within `TOLERANCE` of where detections end may be in
    one answer only. Masks are pasted in whole pixels, and compared where rounding chose the same ones.

    Args:
        expected, got: ``boxes`` ``[n, 4]``, ``labels`` ``[n]``, ``scores`` ``[n]``, perhaps ``masks``.
        threshold, limit: the lowest score and the largest number of detections.
    """
    boxes, labels, scores = expected[:3]
    apart = (boxes[:, None] - got[0]).abs().amax(-1) / max(size) if len(boxes) and len(got[0]) else None
    worst, left, missing = 0.0, set(range(len(got[0]))), []
    for i in range(len(boxes)):
        choices = sorted(left)
        if choices:
            cost = torch.maximum(apart[i, choices], (scores[i] - got[2][choices]).abs())
            cost = cost.masked_fill(got[1][choices] != labels[i], math.inf)
            best = int(cost.argmin())
            if cost[best] <= TOLERANCE:
                j = choices[best]
                left.remove(j)
                worst = max(worst, float(cost[best]), _masks_differ(expected, got, i, j))
                continue
        missing.append(float(scores[i]))
    end = max(threshold, float(scores.min())) if len(scores) == limit else threshold
    others = missing + [float(got[2][j]) for j in left]
    return worst if all(abs(score - end) <= TOLERANCE for score in others) else math.inf


def _masks_differ(expected: Sequence[Tensor], got: Sequence[Tensor], i: int, j: int) -> float:
    if len(expected) == 3:
        return 0.0
    ours, theirs = (expand_boxes(boxes, 30 / 28).long() for boxes in (expected[0][[i]], got[0][[j]]))
    return float((expected[3][i] - got[3][j]).abs().max()) if torch.equal(ours, theirs) else 0.0


# ---- the card

_PREPARE = """\
import numpy as np
from PIL import Image, ImageOps

rows, columns = {size}
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")
scale = min(rows / photo.height, columns / photo.width)
height, width = (max(1, round(side * scale)) for side in (photo.height, photo.width))
image = np.empty((1, {channels}, rows, columns), np.float32)
image[:] = np.array({mean}, np.float32).reshape(-1, 1, 1)  # what the photograph leaves free
pixels = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR), np.float32)
image[0, :, :height, :width] = pixels.reshape(height, width, -1).transpose(2, 0, 1) / 255
"""
_RUN = {
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
{outputs} = session.run(None, {{"image": image}})
""",
    "pt2": """\
import torch{torchvision}

model = torch.export.load("model.pt2").module()
with torch.no_grad():
    {outputs} = {call}
""",
    "openvino": """\
import openvino

model = openvino.Core().compile_model("model.xml", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
{outputs} = model(image).values()
""",
}
_AFTER = {
    "detect": "boxes = boxes / scale  # in pixels of the photograph: left, top, right, bottom\n",
    "segment": "classes = logits.argmax(1)[0, :height, :width]  # of each pixel of the resized photograph\n",
}
_SAFETENSORS = """\
import foveal
import torch

model = foveal.load("PATH_OF_THIS_FOLDER")
with torch.no_grad():
    {call}
"""


def example(model: nn.Module, to: str, size: Size) -> str:
    """Python that runs an exported model on ``photo.jpg``, as it stands in the card."""
    detects = isinstance(model, Detector)
    channels = _channels(model)
    if to == "safetensors":
        call = (
            f"(found,) = model([torch.rand({channels}, 480, 640)])  # images in [0, 1], of any sizes"
            if detects
            else f"logits = model(torch.rand(1, {channels}, 480, 640))  # images in [0, 1], of any size"
        )
        return _SAFETENSORS.format(call=call)
    names = ("boxes", "labels", "scores", "masks")[: 3 + model.masks] if detects else ("logits",)
    outputs = ", ".join(names) + "," * (len(names) == 1 and to != "pt2")
    call = "model(torch.from_numpy(image))"
    prepare = _PREPARE.format(
        size=f"{size[0]}, {size[1]}", mode=MODES.get(channels), channels=channels, mean=_mean(model)
    )
    torchvision = "\nimport torchvision  # the file uses its operators" if detects else ""
    run = _RUN[to].format(outputs=outputs, call=call, torchvision=torchvision)
    if channels not in MODES:  # which no photograph has
        return run
    return prepare + "\n" + run + _AFTER["detect" if detects else "segment"]


def _card(model: nn.Module, to: str, size: Size, whence: Mapping[str, str | None], done: Export) -> str:
    arguments, detects = model.arguments, isinstance(model, Detector)
    rows, columns = size
    batch = "1" if detects or to == "openvino" else "batch"
    shape = f"[{batch}, {_channels(model)}, {rows}, {columns}]"
    if to == "safetensors":
        given = returned = None
    elif detects:
        transform = model.detector.transform
        seen = tuple(transform([torch.zeros(_channels(model), *size)])[0].image_sizes[0])
        inside = "" if seen == size else f", and the resize to {seen[0]} x {seen[1]}"
        given = f"`image` {shape}, float32 in [0, 1]; normalization{inside} is inside"
        returned = "`boxes` [n, 4] in its pixels, `labels` int64 [n], `scores` [n], the best first"
        returned += f", `masks` [n, 1, {rows}, {columns}]" * model.masks
        threshold, limit = _limits(model)
        returned += f"; scores above {threshold:g}, at most {limit} detections, non-maximum suppression is inside"
    else:
        given = f"`image` {shape}, float32 in [0, 1]; normalization is inside"
        given += "; for other batches `reshape` the model before it is compiled" * (to == "openvino")
        returned = f"`logits` [{batch}, {len(model.classes)}, {rows}, {columns}]"
    parts = f"`{arguments['head']}` on `{arguments['backbone']}`"
    if arguments["head"] != "mask2former":
        parts += f", neck `{arguments['neck']}`"
    measure = "of the longer side (boxes) or of 1 (scores, masks)" if detects else "of the largest logit"
    checked = f"differs from the original by {done.difference:.1e} {measure}, on {'; '.join(done.checked)}"
    table = {
        "model": f"{parts}, {sum(p.numel() for p in model.parameters()):,} parameters",
        **whence,
        "classes": ", ".join(f"{i} {name}" for i, name in enumerate(model.classes)),
        "input": given,
        "output": returned,
        "check of this file": "; ".join([checked, *done.notes]),
    }
    lines = "\n".join(f"| {name} | {value} |" for name, value in table.items() if value)
    fitted = "" if to == "safetensors" else f" --size {rows}x{columns}"
    return (
        f"# {arguments['head']} on {arguments['backbone']}\n\n| | |\n|---|---|\n{lines}\n\n"
        f"```python\n{example(model, to, size)}```\n\n"
        f"Written by foveal {__version__}: `foveal export SOURCE --to {to}{fitted}`.\n"
    )
