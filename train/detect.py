"""Object detection and instance segmentation on COCO annotations: the detector of a recipe, its scores and its
predictions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..backbones.loading import local_path
from ..configs.schema import ConfigError, DetectConfig, load_config
from ..heads.build import build_detector
from ..heads.checkpoint import load_dense, save_dense
from ..heads.detection import Detector
from ..heads.registry import HEADS
from . import deprecated, plots, task
from .data import Data, DetectBatch, build_detection_data
from .data.dataset import UNREADABLE
from .detection_metrics import CocoScorer, metric_names
from .scoring import Metrics, autocast
from .task import Result, find_recipe, processes

SHOWN = 6  # held-out images in each picture
SURE = 0.5  # score from which a detection is drawn
Found = dict[str, Tensor]  # boxes [N, 4], labels [N], scores [N], perhaps masks [N, 1, H, W]


class Task(task.Task):
    """A detector: ``(images, targets)`` to a dictionary of losses in training, images to detections in evaluation."""

    schema = DetectConfig
    monitor = "box_ap"
    files = ("output", "predictions")  # the latter in COCO's result format
    model: Detector
    data: Data

    def __init__(self, config: DetectConfig, model: Detector, data: Data):
        super().__init__(config, model, list(data.categories.values()), data)
        self.metrics = metric_names(model.masks)
        kinds = ("box", "mask") if model.masks else ("box",)
        self.curves = tuple((f"{kind}_{name}", f"{kind} {name.upper()}") for kind in kinds for name in ("ap", "ap50"))
        self.identity = {
            "model": json.dumps(model.arguments, sort_keys=True),
            "categories": json.dumps(data.categories, sort_keys=True),
            "augmentation": json.dumps(vars(config.augment), sort_keys=True),
        }

    @classmethod
    def build(cls, config: DetectConfig, accelerator: Accelerator) -> "Task":
        """The recipe's detector with its initial weights, and its data."""
        masks = HEADS["detect"][config.model.head].masks
        data = build_detection_data(config, masks=masks, device=accelerator.device, **processes(accelerator))
        return cls(config, build_model(config, len(data.categories)), data)

    @classmethod
    def load(cls, source: str | Path, overrides: list[str], accelerator: Accelerator) -> "Task":
        """A run or a checkpoint in it (the data are its recipe's), or a model folder (the overrides say what the data
        are)."""
        model = load_dense(local_path(source))
        ids = model.config.get("category_ids") or ()
        if len(ids) != len(model.classes):
            raise ConfigError(f"{source}: its config.json has no `category_ids`, the id of each class in annotations")
        transform, channels = model.detector.transform, len(model.detector.transform.image_mean)
        defaults = {
            "output": "-",
            "model": {"name": model.arguments["name"], "head": model.arguments["head"]},
            "data": {"in_chans": channels, "min_size": transform.min_size[-1], "max_size": transform.max_size},
        }
        config = load_config(find_recipe(source), overrides, DetectConfig, defaults)
        transform.min_size, transform.max_size = (config.data.min_size,), config.data.max_size
        data = build_detection_data(
            config,
            masks=model.masks,
            categories=dict(zip(ids, model.classes, strict=True)),
            device=accelerator.device,
            train=False,
            **processes(accelerator),
        )
        return cls(config, model, data)

    def train_step(self, model: nn.Module, batch: DetectBatch, epoch: int) -> Tensor:
        return sum(model(batch.images, batch.targets).values())

    def score(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> CocoScorer:
        scorer = CocoScorer(self.data.val.dataset.index, self.model.masks)
        scorer.run(model, self.data.val.epoch(0), self._predict, on_batch)
        return scorer

    def _predict(self, model: nn.Module, batch: DetectBatch) -> list[Found]:
        return detect(model, batch.images, self.config.train.amp)

    def save_weights(self, folder: Path, model: nn.Module) -> None:
        transform = model.detector.transform
        mean, std = list(transform.image_mean), list(transform.image_std)
        sizes = {"short_side": transform.min_size[-1], "max_size": transform.max_size}
        images = {"in_chans": len(mean), **sizes, "mean": mean, "std": std}
        save_dense(folder, model, self.classes, images, category_ids=list(self.data.categories))

    def headline(self, row: dict[str, Any]) -> str:
        kinds = ("box", "mask") if self.model.masks else ("box",)
        return "  ".join(f"{kind} AP {row[f'{kind}_ap']:.2f} (AP50 {row[f'{kind}_ap50']:.2f})" for kind in kinds)

    def describe(self) -> str:
        model, size = self.config.model, f"{self.config.data.min_size}/{self.config.data.max_size}"
        return f"{model.name}, {model.neck}, {model.head}, {size}, {len(self.classes)} classes"

    def table(self, metrics: Metrics) -> tuple[str, list[dict[str, str]]]:
        rows = []
        for kind in ("box", "mask") if self.model.masks else ("box",):
            values = ["-" if v is None else f"{v:.2f}" for name, v in metrics.items() if name.startswith(kind)]
            columns = ("", "AP", "AP50", "AP75", "small", "medium", "large")
            rows.append(dict(zip(columns, [kind, *values], strict=True)))
        return str(self.config.data.val_annotations), rows

    def draw(self, model: nn.Module, path: Path, title: str) -> None:
        dataset, device = self.data.val.dataset, self.data.val.device
        count = min(SHOWN, len(dataset))
        images, truths = [], []
        for number in (i * len(dataset) // count for i in range(count)):
            try:
                image = dataset.image(number)
            except UNREADABLE:
                continue  # it is in the book of unreadable images
            images.append(image.to(device).float().div_(255))
            truths.append(dataset.index.target(number))
        if images:
            found = [above(each, SURE) for each in detect(model, images, self.config.train.amp)]
            title = f"{title}: annotated beside found with a score of {SURE:.0%} or more"
            plots.detections(images, truths, found, self.classes, path, title)


class Predictor(task.Predictor):
    """The objects with at least the score ``threshold``."""

    def __init__(self, source: str | Path, *, top: int, threshold: float):
        self.model, self.threshold = load_dense(source), threshold
        self.channels, self.classes = len(self.model.detector.transform.image_mean), self.model.classes
        self.ids = self.model.config.get("category_ids") or list(range(len(self.classes)))

    def predict(self, image: Tensor) -> tuple[list[Result], Found]:
        found = above(detect(self.model, [image])[0], self.threshold)
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [Result(self.classes[k], score, tuple(box), self.ids[k]) for k, score, box in rows], found

    def draw(self, image: Tensor, found: Found, path: Path, title: str) -> None:
        plots.detection(image, found, self.classes, path, f"{title}: {len(found['labels'])}")


def build_model(config: DetectConfig, num_classes: int) -> Detector:
    """The recipe's detector, on the CPU.

    Raises:
        ConfigError: a name or an argument that does not fit.
    """
    data, model = config.data, config.model
    images = {"min_size": data.min_size, "max_size": data.max_size, "mean": data.mean, "std": data.std}
    try:
        return build_detector(**vars(model), num_classes=num_classes, in_chans=data.in_chans, **images)
    except (ValueError, TypeError, RuntimeError, AssertionError, OSError, ImportError) as error:
        raise ConfigError(f"model {model.name!r} with {model.neck} and {model.head}: {error}") from error


def detect(model: nn.Module, images: list[Tensor], amp: str = "no") -> list[Found]:
    """A detector's predictions for images (float ``[C, H, W]`` in [0, 1]) on its device, without gradients."""
    model.eval()
    # not inference_mode: what is cached here (anchors, index plans of a map's size) is used by the training after it
    with torch.no_grad(), autocast(images[0].device, amp):
        return model(images)


def above(found: Found, score: float) -> Found:
    """The detections with at least this score."""
    keep = found["scores"] >= score
    return {key: value[keep] for key, value in found.items()}


train, evaluate, predict = deprecated.commands("detect", DetectConfig, Task.build)
