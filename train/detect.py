"""Object detection and instance segmentation: training, evaluation and prediction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from skimage.measure import approximate_polygon, find_contours
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..backbones.loading import local_path
from ..configs.schema import ConfigError, DetectConfig, load_config
from ..files import atomic
from ..heads.build import build_detector
from ..heads.checkpoint import load_dense, save_dense
from ..heads.detection import Detector
from ..heads.registry import HEADS
from . import deprecated, plots, task
from .data import Data, DetectionBatch, build_detection_data
from .detection_metrics import CocoScorer, encode_masks, metric_labels
from .scoring import Losses, autocast
from .task import Result, build_dense, check_backbone, find_recipe, loop_problems, processes, use_kept_split

SURE = 0.5  # minimum score of detections in drawings
Found = dict[str, Tensor]  # boxes [N, 4], labels [N], scores [N], perhaps masks [N, 1, H, W]


class Task(task.Task):
    """A detector: ``(images, targets)`` to a dictionary of losses in training, images to detections in evaluation."""

    pictures = 6
    files = ("output", "predictions")  # the latter in COCO's result format
    model: Detector

    def __init__(self, config: DetectConfig, model: Detector, data: Data):
        super().__init__(config, model, list(data.categories.values()), data)
        self.metrics = {"val_loss": "loss"} | metric_labels(model.masks)
        self.shown = tuple(name for name in self.metrics if name.endswith(("_ap", "_ap50")))
        self.input = f"{config.data.min_size}/{config.data.max_size}"
        index = data.val.dataset.index
        if self.annotated and not index.objects().any():
            lacking = "has a usable mask" if model.masks else "can be learned"
            self.notes.append(f"none of the {len(index.labels):,} held-out objects {lacking}: no held-out loss")
        self.identity = {
            "model": json.dumps(model.arguments, sort_keys=True),
            "categories": json.dumps(data.categories, sort_keys=True),
            "augmentation": json.dumps(vars(config.augment), sort_keys=True),
        }

    @classmethod
    def build(cls, config: DetectConfig, accelerator: Accelerator) -> "Task":
        masks = HEADS["detect"][config.model.head].masks
        problems = loop_problems(config)
        with problems:
            check_backbone(config)
        if not problems.concern("data"):
            with problems:
                data = build_detection_data(config, masks=masks, **processes(accelerator))
        problems.raise_all()
        return cls(config, build_model(config, len(data.categories)), data)

    @classmethod
    def load(cls, source: str | Path, overrides: list[str], accelerator: Accelerator) -> "Task":
        model = load_dense(local_path(source))
        ids = model.config.get("category_ids") or ()
        if len(ids) != len(model.classes):
            raise ConfigError(f"{source}: config.json has no valid `category_ids`, the category id of each class")
        transform, channels = model.detector.transform, len(model.detector.transform.image_mean)
        defaults = {
            "output": "-",
            "model": {"name": model.arguments["name"], "head": model.arguments["head"]},
            "data": {"in_chans": channels, "min_size": transform.min_size[-1], "max_size": transform.max_size},
        }
        config = load_config(find_recipe(source), overrides, DetectConfig, defaults)
        use_kept_split(config, source, overrides)
        transform.min_size, transform.max_size = (config.data.min_size,), config.data.max_size
        if config.eval.max_detections is not None:
            model.max_detections = config.eval.max_detections
        data = build_detection_data(
            config,
            masks=model.masks,
            categories=dict(zip(ids, model.classes, strict=True)),
            train=False,
            **processes(accelerator),
        )
        return cls(config, model, data)

    @property
    def parts(self) -> dict[str, str]:
        neck = HEADS["detect"][self.config.model.head].neck
        return {key: name for key, name in super().parts.items() if (key, neck) != ("neck", "none")}

    def train_step(self, model: nn.Module, batch: DetectionBatch, epoch: int) -> Tensor:
        return torch.stack([loss.float() for loss in model(batch.images, batch.targets).values()])

    @property
    def counts(self) -> bool:
        return hasattr(self.model.detector, "normalizers")

    def normalizers(self, batch: DetectionBatch) -> Tensor:
        counts = self.model.normalizers(batch.images, batch.targets)
        assert counts is not None, "counts"
        return counts.to(batch.images[0].device)

    def scorer(self) -> CocoScorer:
        return CocoScorer(self.data.val.dataset.index, self.model.masks, self.config.eval.max_detections)

    def predict(self, model: Any, batch: DetectionBatch) -> tuple[list[Found], Losses | None]:
        """The mean over images of their losses; images without objects count only with ``data.keep_empty``."""
        index, losses = self.data.val.dataset.index, []
        with autocast(self.data.val.device, self.config.train.amp):
            found = model(batch.images)
            for image, number in zip(batch.images, batch.numbers, strict=True):
                target = {k: v.as_subclass(Tensor).to(image.device) for k, v in index.target(number).items()}
                if len(target["boxes"]) or self.config.data.keep_empty:
                    terms = torch.stack([each.float() for each in model.held_out_losses([image], [target]).values()])
                    counts = model.normalizers([image], [target])
                    counts = torch.ones_like(terms) * (1 if counts is None else counts.to(terms))
                    losses.append(torch.stack([terms * counts, counts]))
        return found, torch.stack(losses).sum(0) if losses else None

    @property
    def annotated(self) -> bool:
        return not self.data.val.dataset.index.crowd.all()

    def by_class(self, scorer: CocoScorer) -> tuple[list[str], list[list[Any]]]:
        names = ["objects", *(name for name in self.metrics if name.endswith(("_ap", "_ap50", "_ap75")))]
        return ["class", *names], [
            [name, *(figures[key] for key in names)]
            for name, figures in zip(self.classes, scorer.by_class, strict=True)
        ]

    def save_weights(self, folder: Path, model: Any) -> None:
        transform = model.detector.transform
        mean, std = list(transform.image_mean), list(transform.image_std)
        sizes = {"short_side": transform.min_size[-1], "max_size": transform.max_size}
        images = {"in_chans": len(mean), **sizes, "mean": mean, "std": std}
        save_dense(folder, model, self.classes, images, category_ids=list(self.data.categories))

    def example(self, model: nn.Module, number: int) -> tuple[Tensor, Found, Found]:
        dataset = self.data.val.dataset
        image = dataset.image(number).to(self.data.val.device).float().div_(255)
        with autocast(image.device, self.config.train.amp):
            (found,) = model([image])
        return image, dataset.index.target(number), above(found, SURE)

    def plot(self, examples: list[tuple[Tensor, Found, Found]], path: Path, title: str) -> None:
        title = f"{title}: annotations (left), detections with a score of {SURE:.0%} or more (right)"
        plots.detections(examples, self.classes, path, title)


class Predictor(task.Predictor):
    """Returns the objects with a score of at least ``threshold``."""

    formats = ("drawn", "coco", "yolo", "masks")

    def __init__(self, source: str | Path, *, top: int, threshold: float):
        self.model, self.threshold = load_dense(source), threshold
        self.channels, self.classes = len(self.model.detector.transform.image_mean), self.model.classes
        self.ids = self.model.config.get("category_ids") or list(range(len(self.classes)))

    def predict(self, image: Tensor) -> tuple[list[Result], Found]:
        found = above(self.model([image])[0], self.threshold)
        found = {key: value.cpu() for key, value in found.items()}
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [Result(self.classes[k], score, tuple(box), self.ids[k]) for k, score, box in rows], found

    def draw(self, image: Tensor, found: Found, path: Path, title: str) -> None:
        plots.detection(image, found, self.classes, path, title)

    def masks(self, image: Tensor, found: Found, path: Path) -> None:
        """Pixels have the number of the object, from 1 by decreasing score, 0 without one; the higher score wins."""
        if "masks" not in found:
            raise ValueError("the detector has no masks (format=masks)")
        numbers = np.zeros(image.shape[-2:], np.uint16)
        for number in range(len(found["masks"]), 0, -1):
            numbers[found["masks"][number - 1, 0].numpy() > 0.5] = number
        with atomic(path) as new:
            Image.fromarray(numbers).save(new, format="PNG")

    def categories(self) -> dict[int, str]:
        return dict(zip(self.ids, self.classes, strict=True))

    def coco(self, found: Found) -> list[dict[str, Any]]:
        codes = encode_masks(found["masks"]) if "masks" in found else None
        entries = []
        rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
        for number, ((x1, y1, x2, y2), score, label) in enumerate(rows):
            width, height = x2 - x1, y2 - y1
            entry = {"category_id": self.ids[label], "score": score, "bbox": [x1, y1, width, height]}
            if codes is not None:
                area = float((found["masks"][number] > 0.5).sum())
                entries.append(entry | {"area": area, "segmentation": codes[number]})
            else:
                corners = [x1, y1, x2, y1, x2, y2, x1, y2]
                entries.append(entry | {"area": width * height, "segmentation": [corners]})
        return entries

    def yolo(self, image: Tensor, found: Found) -> list[str]:
        boxes = box_convert(found["boxes"], "xyxy", "cxcywh")
        boxes = boxes / boxes.new_tensor([image.shape[-1], image.shape[-2]] * 2)
        lines = []
        rows = zip(found["labels"].tolist(), boxes.tolist(), found["scores"].tolist(), strict=True)
        for number, (label, box, score) in enumerate(rows):
            shape = mask_polygon(found["masks"][number, 0].numpy() > 0.5) if "masks" in found else []
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in (*(shape or box), score))]))
        return lines


def mask_polygon(mask: np.ndarray) -> list[float]:
    """The outline of a mask ``[H, W]`` as one polygon, x and y in turn as fractions of the image; empty for an empty
    mask.

    Parts and holes are joined to it by lines there and back, which enclose nothing (by the even-odd rule).
    """
    height, width = mask.shape
    inside = np.pad(mask, 1)  # contours at the border are closed
    rings = [approximate_polygon(ring, 0.4)[:, ::-1] - 0.5 for ring in find_contours(inside.astype(np.uint8), 0.5)]
    points = [point for ring in rings for point in (*ring, rings[0][0])]
    return (np.array(points).reshape(-1, 2) / (width, height)).clip(0, 1).ravel().tolist()


def build_model(config: DetectConfig, num_classes: int) -> Detector:
    """The recipe's detector; raises `ConfigError`."""
    sizes = {"min_size": config.data.min_size, "max_size": config.data.max_size}
    if config.eval.max_detections is not None:
        regions = HEADS["detect"][config.model.head].kind == "two_stage"
        key = "box_detections_per_img" if regions else "detections_per_img"
        config.model.head_kwargs = {key: config.eval.max_detections} | config.model.head_kwargs
    return build_dense(build_detector, config, num_classes, **sizes)


def above(found: Found, score: float) -> Found:
    """The detections with at least this score."""
    keep = found["scores"] >= score
    return {key: value[keep] for key, value in found.items()}


train, evaluate = deprecated.commands("detect")
