"""`foveal demo`: train on real handwritten digits, evaluate, export and predict, in minutes on a CPU.

Classification trains on the digits; detection and segmentation on digits pasted into photos.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console

from .backbones.loading import load
from .train import evaluate, predict, train
from .train.data.memory import load_digits
from .weights.export import export
from .weights.folder import TOLERANCE
from .weights.formats import ExportError
from .weights.images import preprocessing, read_image

COMPOSITES = Path("data", "digits-composites")  # the data of the recipes of detection and segmentation
FILES = {
    "run/predictions.png": "held-out images with predictions",
    "run/curves.png": "loss and metrics by epoch",
    "run/metrics.csv": "the same as numbers",
    "run/report.html": "everything about the run on one page",
    "run/best": "the best epoch, for `foveal.load`",
}


def demo(task: str, output: Path | None = None) -> None:
    """Run all steps of the demo.

    Args:
        task: ``classify``, ``detect`` or ``segment``.
        output: new folder, by default under ``runs/``; if it exists, the next free name is used.

    Raises:
        ValueError: unknown task.
        OSError: the folder cannot be written.
        ExportError: outputs of the exported model differ from the trained model's.
    """
    if task not in ("classify", "detect", "segment"):
        raise ValueError(f"there is no demo {task!r}: choose classify, detect or segment")
    output = _new_folder(output or Path("runs", "demo" if task == "classify" else f"demo-{task}"))
    run, start, files = output / "run", time.monotonic(), dict(FILES)
    console = Console(soft_wrap=True, highlight=False)

    console.rule(f"1. train {task}/digits")
    data = [] if task == "classify" else [f"data.root={COMPOSITES}"]
    train(f"{task}/digits", [f"output={run}", *data])

    console.rule("2. evaluate the best epoch on held-out images")
    evaluate(run, console=console)

    console.rule("3. predict a held-out image")
    if task == "classify":
        image, label = _write_digit(output / "digit.png")
        console.print(f"a held-out digit, a {label}")
        predictions = predict(run, [image], top=3)
    else:
        image = COMPOSITES / "val" / "000000.jpg"
        predictions = predict(run, [image], output=output / "prediction")
        files["prediction"] = "the image with its prediction"
    for prediction in predictions:
        if prediction.error is not None:
            raise prediction.error
        console.print(prediction.path, *(f"  {result}" for result in prediction.results), sep="\n")

    if task == "classify":
        console.rule("4. export")
        _export(run, output, image, console)
        files |= {"safetensors": "the model for timm, with a card", "onnx": "the model for onnxruntime"}

    console.rule(f"done in {time.monotonic() - start:.0f} s")
    for name, content in files.items():
        if not (output / name).exists():
            raise RuntimeError(f"the demo did not write {output / name}")
        console.print(f"{output / name!s:40} {content}")
    console.print(f"\ntry: foveal predict {image} --model {run}")


def _new_folder(output: Path) -> Path:
    """``output``, or the next free name after it, created."""
    candidate, n = output, 1
    while candidate.exists():
        n += 1
        candidate = output.with_name(f"{output.name}-{n}")
    try:
        candidate.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"cannot write {candidate}: {error.strerror}") from error
    return candidate


def _write_digit(path: Path) -> tuple[Path, int]:
    """The first held-out digit as an image file, and its label."""
    images, labels = load_digits(0.2)["val"]
    Image.fromarray(np.asarray(images[0], dtype=np.uint8)).save(path)
    return path, int(labels[0])


@torch.no_grad()
def _export(run: Path, output: Path, image: Path, console: Console) -> None:
    """Export to safetensors and ONNX, and compare the former with timm's own loading."""
    for to in ("safetensors", "onnx"):
        exported = export(run, to, output / to, images=[image])
        console.print(f"{exported.folder}: {', '.join(exported.files)}; relative difference {exported.difference:.1e}")
    model = load(run)
    cfg: dict = model.pretrained_cfg  # type: ignore[assignment]
    pixels = preprocessing(model)(read_image(image, cfg["input_size"][0]))[None]
    expected = model(pixels)
    logits = timm.create_model(f"local-dir:{output / 'safetensors'}", pretrained=True).eval()(pixels)
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ExportError(f"timm's model differs from the trained one by {difference:.1e} of the largest logit")
    console.print(f'timm.create_model("local-dir:{output / "safetensors"}", pretrained=True) agrees on {image.name}')
