"""Scores on held-out images: every image counts once, whatever the number of processes.

A scorer collects predictions batch by batch; `Scorer.run` runs it on a loader. `ClassificationScorer` and
`SegmentationScorer` are here, the one for detection in `detection_metrics`.
"""

import csv
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from ..files import atomic
from .data import IGNORE, DataError

Metrics = dict[str, Any]  # floats, or None if there is nothing to measure
# of a batch, float [2, K]: the K terms of the loss, each times the count that it is a mean over, and these counts
Losses = Tensor


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The precision of ``train.amp`` for evaluation, the same during and after a run."""
    if amp == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[amp])


class Scorer(ABC):
    """Collects predictions and losses; all processes get the same figures.

    Attributes, after `run`:
        metrics: by the names of metrics.csv, ``val_loss`` first: the mean over all images as if they were one batch.
        n: images, of all processes.
        images_per_second: of all processes together, without the time of `compute`.
    """

    metrics: Metrics
    n: int = 0
    images_per_second: float = 0.0

    @abstractmethod
    def add(self, batch: Any, predictions: Any) -> int:
        """Add the predictions of a batch; returns its number of images."""

    @abstractmethod
    def compute(self) -> Metrics:
        """The metrics of the predictions over all processes; a collective."""

    @torch.no_grad()  # not inference_mode: tensors that are cached here (anchors, index plans) are used in training
    def run(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        predict: Callable[[nn.Module, Any], tuple[Any, Losses | None]],
        on_batch: Callable[[int], None] | None = None,
    ) -> "Scorer":
        """Score ``model`` on ``batches``, this process's share of the images.

        Args:
            predict: ``(model, batch)`` to predictions as `add` takes them, and the losses of the batch.
            on_batch: called with the number of images after each batch.
        """
        model.eval()
        count, start = 0, time.perf_counter()
        losses: list[Losses] = []
        for batch in batches:
            predictions, terms = predict(model, batch)
            images = self.add(batch, predictions)
            losses += [] if terms is None else [terms]
            count += images
            if on_batch is not None:
                on_batch(images)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.n = sum(gather_object([count]))
        self.images_per_second = self.n / (time.perf_counter() - start)
        self.metrics = {"val_loss": _mean_loss(losses)} | self.compute()
        return self


def _mean_loss(losses: Sequence[Losses]) -> float | None:
    """The loss over the batches of all processes; None if there is nothing to learn."""
    own = [torch.stack(list(losses)).cpu().double().sum(0)] if losses else []
    found: list[Tensor] = gather_object(own)
    sums, counts = sum(found) if found else torch.zeros(2, 1)
    return (sums / counts.clamp(min=1)).sum().item() if counts.any() else None


@dataclass
class Example:
    """One held-out image for the figure: uint8 ``[C, H, W]``, its class, the predicted one and its probability."""

    image: Tensor
    target: int
    predicted: int
    probability: float


class ClassificationScorer(Scorer):
    """Top-1 and top-5 accuracy in percent.

    Args:
        num_classes: width of the logits.
        keep: how many right and how many wrong examples of this process to keep for a figure; with any, ``confusion``
            counts (class, predicted) pairs over all processes.
        undo: normalized images to uint8 ``[B, C, H, W]`` on the CPU, for the examples.
    """

    def __init__(self, num_classes: int, keep: int = 0, undo: Callable[[Tensor], Tensor] = Tensor.byte):
        self.top, self.keep, self.undo = min(5, num_classes), keep, undo
        self.right: list[Example] = []
        self.wrong: list[Example] = []
        self.confusion: dict[tuple[int, int], int] = Counter()
        self._hits = torch.zeros(2, dtype=torch.int64)

    def add(self, batch: tuple[Tensor, Tensor], predictions: Tensor) -> int:
        """batch: images and targets ``[B]``; predictions: logits ``[B, num_classes]``, float32."""
        images, targets = batch
        predicted = predictions.argmax(1)
        in_top = (predictions.topk(self.top).indices == targets[:, None]).any(1)
        # on the device, without waiting for it
        self._hits = self._hits.to(targets.device) + torch.stack([(predicted == targets).sum(), in_top.sum()])
        if self.keep:
            self.confusion.update(zip(targets.tolist(), predicted.tolist(), strict=True))
            self._keep(images, targets, predictions)
        return len(targets)

    def _keep(self, images: Tensor, targets: Tensor, logits: Tensor) -> None:
        probabilities, predicted = (values.tolist() for values in logits.softmax(1).max(1))
        for i, target in enumerate(targets.tolist()):
            examples = self.right if predicted[i] == target else self.wrong
            if len(examples) < self.keep:
                image = self.undo(images[i : i + 1])[0]
                examples.append(Example(image, target, predicted[i], probabilities[i]))

    def compute(self) -> Metrics:
        """Raises:
        DataError: there was no image.
        """
        if self.n == 0:
            raise DataError("there are no images to evaluate")
        if self.keep:
            self.confusion = dict(sorted(sum(gather_object([self.confusion]), Counter()).items()))
        hits: Any = reduce(self._hits, "sum")
        top1, top5 = hits.tolist()
        return {"top1": 100 * top1 / self.n, "top5": 100 * top5 / self.n}


class SegmentationScorer(Scorer):
    """Mean IoU, mean accuracy (recall by class) and pixel accuracy, in percent.

    Attributes:
        confusion: int64 ``[classes, classes]``, pixels by true (rows) and predicted class; after `run` over all
            processes.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.masks: list[tuple[str, bytes]] = []  # of images without masks: name, PNG of the predicted classes
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self._counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, batch: tuple[Tensor, Tensor], predictions: Tensor) -> int:
        """batch: images and targets ``[B, H, W]``, 255 where there is no class; predictions: classes ``[B, H, W]``."""
        images, targets = batch
        known = targets != IGNORE
        pairs = targets[known] * self.num_classes + predictions[known]
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self._counts = self._counts.to(targets.device) + counts.view(self.num_classes, -1)
        return len(images)

    def compute(self) -> Metrics:
        """Raises:
        DataError: there was no pixel with a class.
        """
        counts: Any = reduce(self._counts, "sum")
        self.confusion = counts.cpu().numpy()
        if self.confusion.sum() == 0:
            raise DataError(f"there was no pixel with a class to evaluate in {self.n} images")
        hits, pixels = np.diag(self.confusion).astype(float), self.confusion.sum(1)
        recall = np.divide(hits, pixels, out=np.full_like(hits, np.nan), where=pixels > 0)
        return {
            "miou": float(np.nanmean(self.iou)),
            "mean_accuracy": 100 * float(np.nanmean(recall)),
            "pixel_accuracy": 100 * float(hits.sum() / pixels.sum()),
        }

    @property
    def iou(self) -> np.ndarray:
        """In percent, by class; NaN for a class that occurs neither in the masks nor in the predictions."""
        hits = np.diag(self.confusion).astype(float)
        union = self.confusion.sum(0) + self.confusion.sum(1) - np.diag(self.confusion)
        return 100 * np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


def write_confusion(run: Path, classes: Sequence[str], confusion: dict[tuple[int, int], int]) -> None:
    """Write RUN/confusion.csv, the number of images by class and predicted class, and RUN/classes.csv, the number of
    images of each class with recall and precision in percent."""
    true, named, hits = Counter(), Counter(), Counter()
    for (target, predicted), count in confusion.items():
        true[target] += count
        named[predicted] += count
        hits[target] += count * (target == predicted)
    # a model may have more outputs than the data have classes
    names = [*classes, *(f"output {i}" for i in range(len(classes), max(named, default=0) + 1))]

    def percent(part: int, total: int) -> float | str:
        return 100 * part / total if total else ""

    pairs = ((names[t], names[p], count) for (t, p), count in confusion.items())
    write_table(run / "confusion.csv", ("class", "predicted", "count"), pairs)
    rows = ((n, true[i], percent(hits[i], true[i]), percent(hits[i], named[i])) for i, n in enumerate(names))
    write_table(run / "classes.csv", ("class", "images", "recall", "precision"), rows)


def write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, None as an empty field."""
    with atomic(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
