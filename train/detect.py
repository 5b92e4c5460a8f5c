"""``foveal train detect``, and evaluation and prediction with what it leaves: from COCO annotations to a detector."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torchvision.transforms.v2 import functional as F

from ..backbones.images import read_upright
from ..configs.schema import ConfigError, DetectConfig, load_config, override_value
from ..heads.build import build_detector, load_dense, save_dense
from ..heads.detection import WITH_MASKS, Detector
from . import pictures, plots
from .data.coco import CocoLoader, DetectBatch, DetectData, build_coco
from .data.files import UNREADABLE
from .data.guard import printable
from .detection_metrics import CocoScorer, metric_names
from .engine import State
from .run import run_evaluation, run_recipe, write_json
from .scoring import autocast

SHOWN = 6  # held-out images in each picture
SURE = 0.5  # score from which a detection is drawn


def build_model(config: DetectConfig, num_classes: int) -> Detector:
    """The recipe's detector, on the CPU.

    Raises:
        ConfigError: a name or an argument that does not fit.
    """
    model, data = config.model, config.data
    try:
        return build_detector(
            model.name,
            model.head,
            model.neck,
            num_classes=num_classes,
            min_size=data.min_size,
            max_size=data.max_size,
            mean=data.mean,
            std=data.std,
            in_chans=data.in_chans,
            pretrained=model.pretrained,
            checkpoint=model.checkpoint,
            frozen_stages=model.frozen_stages,
            norm_eval=model.norm_eval,
            sync_bn=model.sync_bn,
            drop_path_rate=model.drop_path_rate,
            grad_checkpointing=model.grad_checkpointing,
            neck_kwargs=model.neck_kwargs,
            head_kwargs=model.head_kwargs,
            **model.kwargs,
        )
    except (ValueError, TypeError, RuntimeError, AssertionError, OSError, ImportError) as error:
        raise ConfigError(f"model {model.name!r} with {model.neck} and {model.head}: {error}") from error


class Task:
    """What detection brings to the engine."""

    monitor = "box_ap"

    def __init__(self, config: DetectConfig, model: Detector, data: DetectData):
        self.config, self.model, self.data, self.notes = config, model, data, data.notes
        self.classes = list(data.categories.values())
        self.metrics = metric_names(model.masks)
        self.identity = {
            "model": json.dumps(model.arguments, sort_keys=True),
            "categories": json.dumps(data.categories, sort_keys=True),
            "augmentation": json.dumps(vars(config.augment), sort_keys=True),
        }

    def train_step(self, model: nn.Module, batch: DetectBatch, epoch: int) -> torch.Tensor:
        return sum(model(batch.images, batch.targets).values())

    def evaluate(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> dict[str, float | None]:
        return score(model, self.data.val, amp=self.config.train.amp, on_batch=on_batch).compute()

    def save_weights(self, folder: Path, model: nn.Module) -> None:
        transform = model.detector.transform
        preprocessing = prepared(model) | {"mean": list(transform.image_mean), "std": list(transform.image_std)}
        save_dense(folder, model, self.classes, preprocessing, category_ids=list(self.data.categories))

    def on_epoch(self, run: Path, model: nn.Module, epoch: int) -> None:
        """Pictures of a few held-out images, the same ones each time."""
        folder = run / "pictures"
        folder.mkdir(exist_ok=True)
        self._draw(model, folder / f"epoch_{epoch:03}.png", f"{self.config.model.name}, epoch {epoch}")

    def _draw(self, model: nn.Module, path: Path, title: str) -> None:
        dataset = self.data.val.dataset
        count = min(SHOWN, len(dataset))
        device = self.data.val.device
        images, truths = [], []
        for number in (i * len(dataset) // count for i in range(count)):
            try:
                image = dataset.image(number)
            except UNREADABLE:
                continue  # it is in the book of unreadable images
            images.append(image.to(device).float().div_(255))
            truths.append(dataset.index.target(number))
        if images:
            answers = [sure(each) for each in detect(model, images, self.config.train.amp)]
            title = f"{title}: annotated beside found with a score of {SURE:.0%} or more"
            pictures.pairs(images, truths, answers, self.classes, path, title)

    def headline(self, row: dict[str, Any]) -> str:
        words = [f"box AP {row['box_ap']:.2f} (AP50 {row['box_ap50']:.2f})"]
        if self.model.masks:
            words.append(f"mask AP {row['mask_ap']:.2f} (AP50 {row['mask_ap50']:.2f})")
        return "  ".join(words)

    def describe(self) -> str:
        model, data = self.config.model, self.config.data
        return f"{model.name}, {model.neck}, {model.head}, {data.min_size}/{data.max_size}, {len(self.classes)} classes"

    def finish(self, run: Path, state: State, model: nn.Module, draw: bool) -> dict[str, Any]:
        best, last = state.best, state.history[-1]  # the last epoch is always evaluated
        if draw:
            shown = {"box_ap": "box AP", "box_ap50": "box AP50"}
            if self.model.masks:
                shown |= {"mask_ap": "mask AP", "mask_ap50": "mask AP50"}
            title = f"{self.config.model.name}, {self.config.model.head}"
            plots.curves(state.history, run / "curves.png", title, shown, self.monitor)
            self._draw(model, run / "predictions.png", f"{self.config.model.name}, epoch {best['epoch']}")
        figures = {name: best[name] for name in self.metrics}
        last_figures = {f"last_{name}": last[name] for name in self.metrics}
        model_name = {key: getattr(self.config.model, key) for key in ("head", "neck")}
        return {"model": self.config.model.name, **model_name, "best_epoch": best["epoch"], **figures, **last_figures}


def detect(model: nn.Module, images: list[torch.Tensor], amp: str = "no") -> list[dict[str, torch.Tensor]]:
    """A detector's answers to images (float ``[C, H, W]``, in [0, 1]) on its device, without gradients."""
    model.eval()
    # not inference_mode: what is cached here (anchors, index plans of a map's size) is used by the training after it
    with torch.no_grad(), autocast(images[0].device, amp):
        return model(images)


def prepared(model: Detector) -> dict[str, int]:
    """What a detector does to images, by the names of a recipe's ``data``."""
    transform = model.detector.transform
    sizes = {"short_side": transform.min_size[-1], "max_size": transform.max_size}
    return {"in_chans": len(transform.image_mean), **sizes}


def sure(found: dict[str, torch.Tensor], score: float = SURE) -> dict[str, torch.Tensor]:
    """The detections with at least this score."""
    keep = found["scores"] >= score
    return {key: value[keep] for key, value in found.items()}


def score(
    model: nn.Module, loader: CocoLoader, *, amp: str = "no", on_batch: Callable[[int], None] | None = None
) -> CocoScorer:
    """All detections of ``loader``'s images, of this process."""
    scorer = CocoScorer(loader.index, model.masks)
    for batch in loader.epoch(0):
        scorer.add(batch.numbers, detect(model, batch.images, amp))
        if on_batch is not None:
            on_batch(len(batch.images))
    return scorer


def train(config_path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Trains the recipe at ``config_path`` (a file or a shipped recipe's name) with ``key=value`` overrides; the exit
    code is that of `run.run_recipe`.

    Examples:
        >>> from foveal.train.detect import train
        >>> train("dinat_tiny_mask_rcnn_3x", ["data.root=nowhere", "model.pretrained=false"])  # doctest: +ELLIPSIS
        error: ...nowhere...
        1
    """
    return run_recipe(config_path, overrides, DetectConfig, build_task)


def build_task(config: DetectConfig, accelerator: Accelerator) -> Task:
    """Data and model of a recipe; the model on the CPU and with its initial weights."""
    data = build_coco(
        config,
        masks=config.model.head in WITH_MASKS,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    return Task(config, build_model(config, len(data.categories)), data)


def evaluate(source: str, overrides: Sequence[str] = ()) -> int:
    """Measures a trained run (its ``best/``), a checkpoint folder inside it, or a model folder.

    For a run the recipe is the one saved with it; for a model folder the overrides say what the data are.
    ``output=FILE`` writes the figures as JSON, ``predictions=FILE`` all detections in COCO's result format.

    The exit code is that of `run.run_evaluation`.

    Examples:
        >>> from foveal.train.detect import evaluate
        >>> evaluate("nowhere", ["data.root=/path/to/coco"])  # doctest: +ELLIPSIS
        error: nowhere...
        1
    """
    return run_evaluation(_evaluate, source, overrides)


def _evaluate(source: str, overrides: list[str], console: Console) -> None:
    files = {key: override_value(overrides, key) for key in ("output", "predictions")}
    overrides = [o for o in overrides if o.partition("=")[0] not in files]
    folder = Path(source)
    model = load_dense(folder)
    recipe = next((f / "config.yaml" for f in (folder, folder.resolve().parent) if (f / "config.yaml").is_file()), None)
    if len(model.config.get("category_ids") or ()) != len(model.classes):
        raise ConfigError(f"{folder}: its config.json has no `category_ids`, the id of each class in annotation files")
    defaults = {
        "output": "-",
        "model": {key: model.arguments[name] for key, name in (("name", "backbone"), ("head", "head"))},
        "data": {"min_size" if key == "short_side" else key: value for key, value in prepared(model).items()},
    }
    config = load_config(recipe, overrides, DetectConfig, defaults)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator = Accelerator()
    device = accelerator.device
    transform = model.to(device).detector.transform
    transform.min_size, transform.max_size = (config.data.min_size,), config.data.max_size
    categories = dict(zip(model.config["category_ids"], model.classes, strict=True))
    shares = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    data = build_coco(config, masks=model.masks, device=device, categories=categories, train=False, **shares)
    began = time.perf_counter()
    scorer = score(model, data.val, amp=config.train.amp)
    seconds = time.perf_counter() - began
    figures, found = scorer.compute(), scorer.gathered()
    speed = len(found) / seconds
    for names in gather_object([data.bad.names]):
        data.bad.merge(names)
    if not accelerator.is_main_process:
        return
    for note in data.notes:
        console.print(note, highlight=False, soft_wrap=True)
    table = Table(title=f"{source}: {config.data.val_annotations}, {len(found):,} images, {speed:,.1f} images/s")
    for name in ("", "AP", "AP50", "AP75", "small", "medium", "large"):
        table.add_column(name, justify="right")
    for kind in ("box", "mask") if model.masks else ("box",):
        values = (value for name, value in figures.items() if name.startswith(kind))
        table.add_row(kind, *("-" if value is None else f"{value:.2f}" for value in values))
    console.print(table)
    if data.bad.names:
        named = escape(printable(", ".join(sorted(data.bad.names)[:5])))
        console.print(f"[yellow]{len(data.bad.names)} images left out:[/] {named}", highlight=False, soft_wrap=True)
    if files["output"] is not None:
        content = {"source": str(source), "model": model.arguments["backbone"], **figures, "n": len(found)}
        content |= {"images_per_second": speed, "unreadable": data.bad.names}
        write_json(Path(files["output"]), content)
    if files["predictions"] is not None:
        results = scorer.results(found)
        for result in results:
            if "segmentation" in result:
                code = result["segmentation"]
                result["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode()}
        write_json(Path(files["predictions"]), results)


def predict(
    source: str | Path, images: Sequence[str | Path], threshold: float = SURE, output: Path | None = None
) -> Iterator[tuple[str, list[dict[str, Any]] | OSError]]:
    """Detections in image files, in their own pixels.

    Args:
        source: a run or a folder of `save_dense`.
        threshold: lowest score.
        output: a folder for the images with their detections drawn, ``NAME.png``; None: nothing is drawn.

    Yields:
        the path, and for each object ``label``, ``category_id``, ``score`` and ``box`` (corners), the best first;
        or the error where an image cannot be read.

    Raises:
        ValueError: the folder holds no detector, or drawings would replace images or each other.
    """
    places = pictures.places(images, output) if output is not None else [None] * len(images)
    model = load_dense(source)
    channels = prepared(model)["in_chans"]
    ids = model.config.get("category_ids") or list(range(len(model.classes)))
    for path, place in zip(images, places, strict=True):
        try:
            image = F.pil_to_tensor(read_upright(path, channels)).float() / 255
        except UNREADABLE as error:
            yield str(path), OSError(f"{path}: {error}")
            continue
        found = sure(detect(model, [image])[0], threshold)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            ratio = image.shape[-2] / image.shape[-1]
            figure, axis = plt.subplots(figsize=(7, 7 * min(max(ratio, 0.4), 2.5) + 0.4))
            pictures.draw(axis, image, found, model.classes, f"{Path(path).name}: {len(found['labels'])}")
            pictures.save(figure, place)
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        yield (
            str(path),
            [{"label": model.classes[k], "category_id": ids[k], "score": s, "box": box} for k, s, box in rows],
        )
