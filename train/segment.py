"""``foveal train segment``: from a recipe to a trained, measured, loadable semantic segmenter."""

import csv
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from ..backbones.images import read_upright
from ..configs.schema import ConfigError, SegmentConfig, load_config, override_value
from ..heads.build import build_segmenter, load_dense, read_dense_config, save_dense
from ..heads.segmentation import Mask2Former, Segmenter, probabilities
from ..heads.segmentation.published import load_heads
from . import checkpoint, pictures, plots
from .data import Data, DataError
from .data.files import UNREADABLE
from .data.guard import printable
from .data.semantic import IGNORE, Batch, SemanticLoader, build_semantic_data, find_classes
from .engine import State
from .run import run_evaluation, run_recipe, write_json
from .scoring import autocast

PICTURES = 4  # held-out images drawn after each evaluation


def build_model(config: SegmentConfig, num_classes: int) -> Segmenter:
    """The recipe's segmenter, with the weights that it names.

    Raises:
        ConfigError: parts that there are not, settings that they don't have, or weights that don't fit.
    """
    model, data = config.model, config.data
    if model.segmenter is not None and (model.pretrained or model.checkpoint is not None):
        raise ConfigError("model.segmenter holds the backbone too: leave out model.pretrained and model.checkpoint")
    published = model.segmenter is not None and Path(model.segmenter).is_file()
    try:
        return build_segmenter(
            model.name,
            model.head,
            model.neck,
            num_classes=num_classes,
            auxiliary=model.auxiliary,
            size_divisor=model.size_divisor,
            mean=data.mean,
            std=data.std,
            neck_kwargs=model.neck_kwargs,
            head_kwargs=model.head_kwargs,
            auxiliary_kwargs=model.auxiliary_kwargs,
            pretrained=model.pretrained,
            checkpoint=model.segmenter if published else model.checkpoint,
            sync_bn=model.sync_bn,
            in_chans=data.in_chans,
            frozen_stages=model.frozen_stages,
            norm_eval=model.norm_eval,
            drop_path_rate=model.drop_path_rate,
            grad_checkpointing=model.grad_checkpointing,
            **model.kwargs,
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(f"model {model.name!r} with {model.neck} and {model.head}: {error}") from error


def load_initial(model: Segmenter, source: str) -> list[str]:
    """Loads a whole segmenter's weights to start from: a run, a model folder, or the heads of a file with mmseg's
    names (its backbone is `build_segmenter`'s to load). Classifiers of other classes are left out.

    Returns:
        the names of the tensors that keep their initial values: empty, or those of the classifiers.
    """
    path = Path(source)
    try:
        if path.is_file():
            return load_heads(model, checkpoint.read_tensors(path))
        found = read_dense_config(path)
        if found is None:
            raise ValueError(f"{source} is neither a file nor a folder of a segmenter")
        tensors = checkpoint.read_tensors(checkpoint.find_weights(found[0]))
        own = model.state_dict()
        other = [
            name
            for name in own
            if ".classifier.conv." in name and name in tensors and tensors[name].shape != own[name].shape
        ]
        model.load_state_dict(tensors | {name: own[name] for name in other})
        return other
    except (ValueError, RuntimeError) as error:
        raise checkpoint.CheckpointError(f"model.segmenter: {error}") from None


def inference(config: SegmentConfig) -> dict[str, Any]:
    """The keyword arguments of :func:`probabilities` by which a recipe evaluates.

    Raises:
        ConfigError: sliding windows that would leave pixels out, or windows for whole images.
    """
    given = config.eval
    if given.mode == "whole" and (given.crop_size or given.stride):
        raise ConfigError(
            f"eval.mode=whole with eval.crop_size={given.crop_size}, eval.stride={given.stride}: mode=slide has them"
        )
    window = None if given.mode == "whole" else list(given.crop_size or config.augment.crop_size)
    if window and given.stride and any(step > side for step, side in zip(given.stride, window, strict=True)):
        raise ConfigError(f"eval.stride={given.stride} is beyond the windows of {window}, which would leave pixels out")
    return {
        "bounds": given.scale,
        "multiple_of": given.size_divisor,
        "antialias": config.data.antialias,
        "window": window,
        "stride": given.stride if window else None,
        "scales": list(given.ratios),
        "flip": given.flip,
    }


@dataclass
class Score:
    """confusion: int64 ``[classes, classes]``, pixels by true (rows) and predicted class, over all processes; n:
    images."""

    confusion: np.ndarray
    n: int
    images_per_second: float

    @property
    def iou(self) -> np.ndarray:
        """In percent, by class; NaN for a class that neither the masks nor the answers hold."""
        hits = np.diag(self.confusion).astype(float)
        union = self.confusion.sum(0) + self.confusion.sum(1) - np.diag(self.confusion)
        return 100 * np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)

    @property
    def metrics(self) -> dict[str, float]:
        """In percent: the mean IoU of the classes that occur, the mean of their recalls, the pixels that are right."""
        hits, pixels = np.diag(self.confusion).astype(float), self.confusion.sum(1)
        recall = np.divide(hits, pixels, out=np.full_like(hits, np.nan), where=pixels > 0)
        return {
            "miou": float(np.nanmean(self.iou)),
            "mean_accuracy": 100 * float(np.nanmean(recall)),
            "pixel_accuracy": 100 * float(hits.sum() / pixels.sum()),
        }


@torch.no_grad()  # not inference_mode: index plans cached here are used by the training after it
def score(
    model: nn.Module,
    loader: SemanticLoader,
    num_classes: int,
    settings: dict[str, Any],
    *,
    amp: str = "no",
    on_batch: Callable[[int], None] | None = None,
) -> Score:
    """Scores ``model`` on every pixel with a class of every image of ``loader``, once, by however many processes.

    Args:
        settings: of :func:`probabilities`.
        amp: ``no``, ``bf16`` or ``fp16``.
        on_batch: called with the number of images after each batch.

    Raises:
        DataError: there was no pixel with a class.
    """
    device = loader.device
    matrix = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False).to(device)
    count = SumMetric().to(device)
    model.eval()
    start = time.perf_counter()

    def logits(images: Tensor) -> Tensor:
        with autocast(device, amp):
            return model(images)

    for images, targets in loader.epoch(0):
        matrix.update(probabilities(logits, images, **settings).argmax(1), targets)
        count.update(len(images))
        if on_batch is not None:
            on_batch(len(images))
    confusion, n = matrix.compute().cpu().numpy(), int(count.compute())
    if confusion.sum() == 0:
        raise DataError(f"there was no pixel with a class to evaluate in {n} images")
    return Score(confusion, n, n / (time.perf_counter() - start))


def segmentation_loss(logits: Tensor, targets: Tensor, ignored_in_mean: bool) -> Tensor:
    """Cross-entropy of logits ``[B, classes, H, W]``; the sum over pixels with a class, divided by their number or,
    with ``ignored_in_mean``, by that of all pixels."""
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    pixels = targets.numel() if ignored_in_mean else (targets != IGNORE).sum().clamp(min=1)
    return total / pixels


class Task:
    """What segmentation brings to the engine."""

    metrics = ("miou", "mean_accuracy", "pixel_accuracy")
    monitor = "miou"

    def __init__(self, config: SegmentConfig, model: Segmenter, classes: list[str], data: Data):
        self.config, self.model, self.classes, self.data = config, model, classes, data
        self.notes = list(data.notes)
        self.settings = inference(config)
        self.identity = {
            "model": json.dumps(model.arguments, sort_keys=True),
            "classes": classes,
            "data.kind": config.data.kind,
            "evaluation": json.dumps(self.settings, sort_keys=True),
            "augmentation": json.dumps(vars(config.augment), sort_keys=True),
            "loss": json.dumps(vars(config.loss), sort_keys=True),
        }

    def train_step(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        if isinstance(self.model, Mask2Former):
            return model(batch.images, batch.targets)
        output = model(batch.images)
        logits, extra = output if isinstance(output, tuple) else (output, None)
        whole = self.config.loss.ignored_in_mean
        loss = segmentation_loss(logits, batch.targets, whole)
        if extra is not None:
            loss = loss + self.config.loss.auxiliary * segmentation_loss(extra, batch.targets, whole)
        return loss

    def _score(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> Score:
        return score(
            model, self.data.val, len(self.classes), self.settings, amp=self.config.train.amp, on_batch=on_batch
        )

    def evaluate(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> dict[str, float]:
        return self._score(model, on_batch).metrics

    def save_weights(self, folder: Path, model: nn.Module) -> None:
        mean, std = (getattr(model, name).flatten().tolist() for name in ("mean", "std"))
        preprocessing = {
            "in_chans": self.config.data.in_chans,
            "mean": mean,
            "std": std,
            "inference": self.settings,
        }
        save_dense(folder, model, self.classes, preprocessing)

    def on_epoch(self, run: Path, model: nn.Module, epoch: int) -> None:
        """Draws a few held-out images with their true and predicted classes: pictures/epoch_001.png."""
        self._draw(model, run / "pictures" / f"epoch_{epoch:03}.png", f"{self.config.model.name}, epoch {epoch}")

    @torch.no_grad()
    def _draw(self, model: nn.Module, path: Path, title: str) -> None:
        dataset, device, examples = self.data.val.dataset, self.data.val.device, []
        model.eval()
        shown = min(PICTURES, len(dataset))
        for position in (i * len(dataset) // shown for i in range(shown)):
            try:
                image, labels = dataset.read(position)
            except UNREADABLE:  # the evaluation before has booked it
                continue
            with autocast(device, self.config.train.amp):
                answer = probabilities(model, image[None].to(device).float().div_(255), **self.settings)
            predicted = answer.argmax(1)[0].cpu().numpy()
            examples.append((image.permute(1, 2, 0).numpy(), labels.numpy(), predicted))
        if examples:
            plots.segmentations(examples, self.classes, path, title)

    def headline(self, row: dict[str, Any]) -> str:
        return f"mIoU {row['miou']:.2f} %  pixel accuracy {row['pixel_accuracy']:.2f} %"

    def describe(self) -> str:
        model = self.config.model
        crop = "x".join(map(str, self.config.augment.crop_size))
        neck = "" if model.head == "mask2former" else f" with {model.neck}"
        return f"{model.name}, {model.head}{neck}, crop {crop}, {len(self.classes)} classes"

    def finish(self, run: Path, state: State, model: nn.Module, draw: bool) -> dict[str, Any]:
        """Curves, predictions and the IoU of each class, of the best weights."""
        result = self._score(model)
        best, config = state.best, self.config
        if draw:
            title = f"{config.model.name} on {config.data.kind}"
            shown = {"miou": "mIoU, %", "pixel_accuracy": "pixel accuracy, %"}
            plots.curves(state.history, run / "curves.png", title, shown, self.monitor)
            self._draw(model, run / "predictions.png", f"{config.model.name}, epoch {best['epoch']}")
            write_classes(run / "classes.csv", self.classes, result)
        return {
            "model": config.model.name,
            "head": config.model.head,
            "neck": config.model.neck,
            "best_epoch": best["epoch"],
            **{name: best[name] for name in self.metrics},
            "last_miou": state.history[-1]["miou"],
            "n": result.n,
        }


def write_classes(path: Path, classes: Sequence[str], result: Score) -> None:
    """Pixels and IoU of each class; the IoU is empty where there is nothing to measure."""
    temporary = Path(f"{path}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "pixels", "iou"])
        for name, pixels, iou in zip(classes, result.confusion.sum(1), result.iou, strict=True):
            writer.writerow([name, pixels, "" if np.isnan(iou) else iou])
    os.replace(temporary, path)


def train(config_path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Trains the recipe at ``config_path`` (a file or a shipped recipe's name) with ``key=value`` overrides; the exit
    code is that of `run.run_recipe`.

    Examples:
        >>> from foveal.train.segment import train
        >>> train("dinat_tiny_upernet_ade20k", ["data.root=nowhere", "model.pretrained=false"])  # doctest: +ELLIPSIS
        error: ...nowhere...
        1
    """
    return run_recipe(config_path, overrides, SegmentConfig, build_task)


def build_task(config: SegmentConfig, accelerator: Accelerator) -> Task:
    """The model and the data that a recipe asks for, the model on the CPU and with its initial weights."""
    together = accelerator.num_processes if config.model.sync_bn else 1
    if config.model.head == "upernet" and config.train.batch_size * together == 1:
        raise ConfigError("train.batch_size=1: UPerNet normalises maps of one pixel, which takes two images or more")
    classes = find_classes(config.data)
    model = build_model(config, len(classes))
    data = build_semantic_data(
        config,
        classes,
        model.mean.flatten().tolist(),
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    new = load_initial(model, config.model.segmenter) if config.model.segmenter is not None else []
    task = Task(config, model, classes, data)
    if new:
        task.notes.append(f"not in {config.model.segmenter} for these classes, so new: {', '.join(new)}")
    return task


def evaluate(source: str, overrides: Sequence[str] = ()) -> int:
    """Scores a trained run (its ``best/``), a checkpoint folder inside it, or a model folder.

    For a run the recipe is the one saved with it; for a model folder the overrides say what the data are.
    ``output=FILE`` writes the result as JSON.

    The exit code is that of `run.run_evaluation`.

    Examples:
        >>> from foveal.train.segment import evaluate
        >>> evaluate("nowhere", ["data.root=/path/to/ade20k"])  # doctest: +ELLIPSIS
        error: nowhere...
        1
    """
    return run_evaluation(_evaluate, source, overrides)


def _evaluate(source: str, overrides: list[str], console: Console) -> None:
    file = override_value(overrides, "output")
    overrides = [o for o in overrides if not o.startswith("output=")]
    folder = Path(source)
    model = load_dense(folder)
    recipe = next((f / "config.yaml" for f in (folder, folder.resolve().parent) if (f / "config.yaml").is_file()), None)
    defaults = {"output": "-", "model": {"name": model.arguments["backbone"]}}
    if recipe is None:  # as it was evaluated where it was trained, unless the overrides say otherwise
        given = dict(model.config["preprocessing"].get("inference", {}))
        seen = {"antialias": given.pop("antialias", True), "in_chans": model.arguments.get("in_chans", 3)}
        recipe_keys = {"bounds": "scale", "multiple_of": "size_divisor", "window": "crop_size", "scales": "ratios"}
        evaluation = {recipe_keys.get(key, key): value for key, value in given.items()}
        defaults |= {"eval": evaluation | {"mode": "slide" if given.get("window") else "whole"}, "data": seen}
    config = load_config(recipe, overrides, SegmentConfig, defaults)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = Accelerator().device
    classes = find_classes(config.data)
    if len(classes) != model.arguments["num_classes"]:
        raise ConfigError(f"{source} has {model.arguments['num_classes']} classes, the data have {len(classes)}")
    if classes != model.classes and sorted(classes) == sorted(model.classes):
        theirs, ours = next(pair for pair in zip(classes, model.classes, strict=True) if pair[0] != pair[1])
        raise ConfigError(f"{source} has the classes in another order: {ours} where the data have {theirs}")
    data = build_semantic_data(config, classes, model.mean.flatten().tolist(), device=device, train=False)
    result = score(model.to(device), data.val, len(classes), inference(config), amp=config.train.amp)
    metrics = result.metrics
    table = Table(title=f"{source}: {config.data.kind}, {config.eval.mode} images")
    row = {"mIoU %": "miou", "mean accuracy %": "mean_accuracy", "pixel accuracy %": "pixel_accuracy"}
    for name in (*row, "n", "images/s"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{metrics[key]:.2f}" for key in row.values()), f"{result.n:,}", f"{result.images_per_second:,.1f}")
    console.print(table)
    bad = data.bad.names
    if bad:
        console.print(f"[yellow]{len(bad)} bad samples left out:[/] {escape(printable(', '.join(sorted(bad)[:5])))}")
    if file is not None:
        by_class = {name: None if np.isnan(v) else v for name, v in zip(classes, result.iou.tolist(), strict=True)}
        content = {"source": source, "model": model.arguments["backbone"], **metrics, "iou": by_class, "n": result.n}
        write_json(Path(file), content | {"images_per_second": result.images_per_second, "bad": bad})


def predict(
    source: str | Path, images: Sequence[str | Path], output: Path | None = None
) -> Iterator[tuple[str, list[tuple[str, float]] | OSError]]:
    """The classes of the pixels of image files, found as in the model's last evaluation.

    Args:
        source: a run or a folder of `save_dense`.
        output: a folder for ``NAME.png``, the classes as a palette image (the colours of Pascal VOC); None: nothing is
            written.

    Yields:
        the path, and the classes with their share of the pixels, the largest first; or the error where an image cannot
        be read.

    Raises:
        ValueError: the folder holds no segmenter, or cannot be loaded; or drawings would replace images or each other.
    """
    places = pictures.places(images, output) if output is not None else [None] * len(images)
    model = load_dense(source)
    settings = model.config["preprocessing"].get("inference", {})
    channels = model.arguments.get("in_chans", 3)
    for path, place in zip(images, places, strict=True):
        try:
            pixels = np.array(read_upright(path, channels))
        except UNREADABLE as error:
            yield str(path), OSError(f"{path}: {error}")
            continue
        image = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None].float() / 255
        labels = probabilities(model, image, **settings).argmax(1)[0].numpy().astype(np.uint8)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            drawn = Image.fromarray(labels)
            drawn.putpalette(plots.label_colours(256).tobytes())
            temporary = place.with_name(f".{place.name}")
            drawn.save(temporary)
            temporary.replace(place)
        shares = np.bincount(labels.ravel(), minlength=len(model.classes)) / labels.size
        yield str(path), [(model.classes[k], float(shares[k])) for k in np.argsort(-shares) if shares[k] > 0]
