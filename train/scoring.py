"""Evaluation of a classifier: every sample once, whatever the number of processes."""

import csv
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from .data import Loader


@dataclass
class Example:
    """One held-out image for the figure: uint8 ``[C, H, W]``, its class, and the model's answer with probability."""

    image: torch.Tensor
    target: int
    predicted: int
    probability: float


@dataclass
class Score:
    """top1 and top5 in percent, mean cross-entropy, number of samples, samples per second (all processes together)."""

    top1: float
    top5: float
    loss: float
    n: int
    images_per_second: float
    right: list[Example] = field(default_factory=list)
    wrong: list[Example] = field(default_factory=list)
    confusion: dict[tuple[int, int], int] = field(default_factory=dict)  # (class, predicted): samples, where any


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The precision of ``train.amp`` for evaluation; the same in a run and after it."""
    if amp == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[amp])


@torch.inference_mode()
def score(
    model: nn.Module,
    loader: Loader,
    num_classes: int,
    *,
    amp: str = "no",
    keep: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Score:
    """Scores ``model`` on every sample of ``loader``.

    Args:
        num_classes: width of the model's output.
        amp: ``no``, ``bf16`` or ``fp16``.
        keep: how many right and how many wrong examples to keep for a figure (of this process); above 0 the score has
            its ``confusion`` too, of all processes.
        on_batch: called with the number of samples after each batch.
    """
    device = loader.normalize.device
    top1 = MulticlassAccuracy(num_classes, average="micro", validate_args=False).to(device)
    top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro", validate_args=False).to(device)
    loss, count = MeanMetric().to(device), SumMetric().to(device)
    right: list[Example] = []
    wrong: list[Example] = []
    answers: Counter[tuple[int, int]] = Counter()
    model.eval()
    start = time.perf_counter()
    for images, targets in loader.epoch(0):
        with autocast(device, amp):
            logits = model(images)
        logits = logits.float()
        top1.update(logits, targets)
        top5.update(logits, targets)
        loss.update(F.cross_entropy(logits, targets, reduction="none"))
        count.update(len(targets))
        if len(right) < keep or len(wrong) < keep:
            _keep(images, targets, logits, loader, keep, right, wrong)
        if keep:
            answers.update(zip(targets.tolist(), logits.argmax(-1).tolist(), strict=True))
        if on_batch is not None:
            on_batch(len(targets))
    n = int(count.compute())
    seconds = time.perf_counter() - start
    if n == 0:
        raise ValueError("there was no sample to evaluate")
    if keep:
        answers = sum(gather_object([answers]), Counter())
    return Score(
        top1=100 * round(n * top1.compute().item()) / n,  # the float32 share, back to the exact count
        top5=100 * round(n * top5.compute().item()) / n,
        loss=loss.compute().item(),
        n=n,
        images_per_second=n / seconds,
        right=right,
        wrong=wrong,
        confusion=dict(sorted(answers.items())),
    )


def write_confusion(run: Path, classes: Sequence[str], confusion: dict[tuple[int, int], int]) -> None:
    """Writes RUN/confusion.csv, how many samples of each class were taken for which, and RUN/classes.csv, how many
    there are of each, and the percent of them that are right (recall) and of what is so called (precision)."""
    true, said, hits = Counter(), Counter(), Counter()
    for (target, predicted), count in confusion.items():
        true[target] += count
        said[predicted] += count
        hits[target] += count * (target == predicted)
    # a model may have more outputs than the data have classes
    names = [*classes, *(f"output {i}" for i in range(len(classes), max(said, default=0) + 1))]

    def percent(part: int, whole: int) -> float | str:
        return 100 * part / whole if whole else ""

    tables = {
        "confusion.csv": [
            ["class", "predicted", "count"],
            *([names[t], names[p], count] for (t, p), count in confusion.items()),
        ],
        "classes.csv": [
            ["class", "images", "recall", "precision"],
            *([names[i], true[i], percent(hits[i], true[i]), percent(hits[i], said[i])] for i in range(len(names))),
        ],
    }
    for file, rows in tables.items():
        temporary = run / f".{file}"
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)
        temporary.replace(run / file)


def _keep(images, targets, logits, loader, keep: int, right: list[Example], wrong: list[Example]) -> None:
    probabilities, predicted = logits.softmax(-1).max(-1)
    hits = (predicted == targets).tolist()
    for i, hit in enumerate(hits):
        book = right if hit else wrong
        if len(book) < keep:
            image = loader.normalize.undo(images[i : i + 1])[0]
            book.append(Example(image, int(targets[i]), int(predicted[i]), float(probabilities[i])))
