"""`foveal demo`: the whole way on real handwritten digits, in minutes on a CPU.

Classification: train, evaluate, draw, export and predict. Detection and segmentation: write composites of the digits on
photographs, train on them, evaluate, draw and predict.
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
from .train import Prediction, evaluate, predict, train
from .train.data.memory import load_digits
from .weights.export import export
from .weights.folder import TOLERANCE
from .weights.formats import ExportError
from .weights.images import preprocessing, read_image

RECIPE = "classify/digits"
VAL_FRACTION = 0.2
TASKS = ("classify", "detect", "segment")
COMPOSITES = Path("data", "digits-composites")  # where the recipes of detection and segmentation have them


def demo(task: str, output: Path | None = None) -> None:
    """Run all steps into a new folder: `output`, or, if that exists, the next free name after it.

    Args:
        task: one of `TASKS`.
        output: None for `runs/demo`, `runs/demo-detect` or `runs/demo-segment`.

    Raises:
        ValueError: if there is no such task.
        OSError: if the folder cannot be written.
        ExportError: if what was exported does not answer as the trained model does.
    """
    if task not in TASKS:
        raise ValueError(f"there is no demo of {task!r}; there are {', '.join(TASKS)}")
    output = _free(output or Path("runs", "demo" if task == "classify" else f"demo-{task}"))
    try:
        output.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror}") from error
    console = Console(soft_wrap=True, highlight=False)
    if task == "classify":
        _classify(output, console)
    else:
        _dense(task, output, console)


def _classify(output: Path, console: Console) -> None:
    run = output / "run"
    start = time.monotonic()

    console.rule(f"1. train {RECIPE} (1,797 handwritten digits, a fifth held out)")
    train(RECIPE, [f"output={run}"])

    console.rule("2. evaluate the best epoch on the held-out digits")
    evaluate(run, console=console)

    console.rule("3. export")
    digit, label = _write_digit(output / "digit.png")
    for to in ("safetensors", "onnx"):
        done = export(run, to, output / to, images=[digit])
        console.print(f"{done.folder}: {', '.join(done.files)}")
        console.print(f"differs from the trained model by {done.difference:.1e} of the largest logit")
    _check_timm(run, output / "safetensors", digit)
    console.print(f'timm.create_model("local-dir:{output / "safetensors"}", pretrained=True) agrees on {digit.name}')

    console.rule(f"4. predict a held-out digit, a {label}")
    for prediction in predict(run, [digit], top=3):
        _print(prediction, console)

    console.rule(f"done in {time.monotonic() - start:.0f} s")
    for path, what in {
        run / "predictions.png": "held-out digits, the mistakes marked",
        run / "curves.png": "loss and accuracy by epoch",
        run / "metrics.csv": "the same as numbers",
        run / "best": "the best epoch, a folder that timm loads",
        output / "safetensors": "the same, exported with a card",
        output / "onnx": "for onnxruntime",
    }.items():
        if not path.exists():
            raise RuntimeError(f"the demo did not write {path}")
        console.print(f"{path!s:40} {what}")
    console.print(f"\ntry: foveal predict {digit} --model {run}")


def _dense(task: str, output: Path, console: Console) -> None:
    recipe, run = f"{task}/digits", output / "run"
    start = time.monotonic()

    console.rule(f"1. train {recipe} (handwritten digits on photographs)")
    train(recipe, [f"output={run}", f"data.root={COMPOSITES}"])

    console.rule("2. evaluate the best epoch on the held-out composites")
    result = output / "result.json"
    evaluate(run, [f"output={result}"], console)

    console.rule("3. predict a held-out composite")
    image, drawn = COMPOSITES / "val" / "000000.jpg", output / "prediction"
    for prediction in predict(run, [image], threshold=0.5, output=drawn):
        _print(prediction, console)

    console.rule(f"done in {time.monotonic() - start:.0f} s")
    for path, what in {
        run / "predictions.png": "held-out composites, what is there beside what is found",
        run / "pictures": "the same after each epoch",
        run / "curves.png": "loss and scores by epoch",
        run / "metrics.csv": "the same as numbers",
        run / "best": "the best epoch, for `foveal predict` and `foveal.heads.checkpoint.load_dense`",
        result: "its scores",
        drawn: "the predicted composite",
    }.items():
        if not path.exists():
            raise RuntimeError(f"the demo did not write {path}")
        console.print(f"{path!s:40} {what}")
    console.print(f"\ntry: foveal predict {image} --model {run} --output {output}")


def _print(prediction: Prediction, console: Console) -> None:
    if prediction.error is not None:
        raise prediction.error
    console.print(prediction.path)
    for result in prediction.results:
        console.print(f"  {result}")


def _free(output: Path) -> Path:
    candidate, n = output, 1
    while candidate.exists():
        n += 1
        candidate = output.with_name(f"{output.name}-{n}")
    return candidate


def _write_digit(path: Path) -> tuple[Path, int]:
    """The first held-out digit as an image file, and what it shows."""
    images, labels = load_digits(VAL_FRACTION)["val"]
    Image.fromarray(np.asarray(images[0], dtype=np.uint8)).save(path)
    return path, int(labels[0])


@torch.no_grad()
def _check_timm(run: Path, folder: Path, digit: Path) -> None:
    """What timm alone makes of the exported folder must be what was trained."""
    trained = load(run)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = preprocessing(trained)(read_image(digit, trained.pretrained_cfg["input_size"][0]))[None]
    expected, got = trained(image), loaded(image)
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ExportError(f"timm's model differs from the trained one by {difference:.1e} of the largest logit")
