"""Base classes of the tasks: what training, evaluation and prediction call."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from PIL import Image
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from ..backbones.images import read_image, to_mode
from ..backbones.loading import local_path, unknown_model
from ..configs.schema import ConfigError, Problems
from ..files import write_json
from . import plots
from .data.auto import kept_split
from .data.files import UNREADABLE
from .distributed import check_sharding
from .optim import check_optim, check_schedule
from .scoring import Losses, Metrics, Scorer, write_table

Row = dict[str, Any]  # of metrics.csv
RANDOM_WEIGHTS = "; model.checkpoint=FILE starts from other weights, model.pretrained=false from random ones"


class Task(ABC):
    """A model, its data, and the loss, metrics and drawings that depend on the task.

    Attributes:
        model: on the CPU when a run begins.
        notes: lines printed when a run begins.
        identity: settings that a resumed run must share with the checkpoint.
        input: size of the images, for the log.
    """

    metrics: Mapping[str, str]  # column of metrics.csv -> label
    shown: tuple[str, ...]  # metrics of headlines and curves; the first is the task's score
    files: ClassVar[tuple[str, ...]] = ("output",)  # overrides of an evaluation that name a file to write
    pictures: ClassVar[int] = 0  # held-out images drawn after each evaluation

    def __init__(self, config: Any, model: nn.Module, classes: list[str], data: Any):
        self.config, self.model, self.classes, self.data = config, model, classes, data
        self.notes: list[str] = list(data.notes)
        self.identity: dict[str, Any] = {}
        self.input = ""

    @classmethod
    @abstractmethod
    def build(cls, config: Any, accelerator: Accelerator) -> "Task":
        """Builds a recipe's model, with its initial weights, and data for training."""

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path, overrides: list[str], accelerator: Accelerator) -> "Task":
        """Loads a trained model and its evaluation data; see `evaluation.evaluate`."""

    @abstractmethod
    def train_step(self, model: nn.Module, batch: Any, epoch: int) -> Tensor:
        """The loss of a batch, a scalar or its terms ``[K]``; called under autocast."""

    @property
    def counts(self) -> bool:
        """Whether the loss is a mean over pixels or objects (`normalizers`), whose number differs between batches."""
        return False

    def normalizers(self, batch: Any) -> Tensor:
        """The divisors of a batch's loss terms, float ``[1]`` or ``[K]``: numbers of pixels or objects. With them, an
        update of several batches has the loss of one large batch, not a mean of means."""
        raise NotImplementedError

    @abstractmethod
    def save_weights(self, folder: Path, model: Any) -> None:
        """Writes a model folder, as `foveal.load` reads it."""

    @abstractmethod
    def scorer(self) -> Scorer:
        """A new scorer for the held-out images."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Any) -> tuple[Any, Losses | None]:
        """Predictions for a held-out batch, in the scorer's format, and its losses: those of training, on the images as
        they are evaluated, without augmentation, dropout and auxiliary heads. Buffers and random state do not change.
        """

    def score(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> Any:
        """Scores all held-out images and returns the scorer; every process must call this.

        Args:
            on_batch: called after each batch with its number of images.
        """
        return self.scorer().run(model, self.data.val.epoch(0), self.predict, on_batch)

    def evaluate(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> Metrics:
        """The metrics of `score`, the same on every process."""
        return self.score(model, on_batch).metrics

    def result(self, scorer: Scorer) -> dict[str, Any]:
        """The task's part of the result of `evaluation.evaluate`."""
        return {"loss" if name == "val_loss" else name: value for name, value in scorer.metrics.items()}

    @property
    def annotated(self) -> bool:
        """Whether the held-out images have annotations."""
        return True

    def write_predictions(self, scorer: Any, file: Path) -> Path:
        """Writes the predictions of an evaluation, by default to ``file``; returns where they are."""
        write_json(file, scorer.results())
        return file

    def by_class(self, scorer: Any) -> tuple[list[str], list[list[Any]]]:
        """Head and rows of the table of classes: name, count, metrics (None where undefined). Without rows, there is
        no table."""
        return [], []

    def corrupted(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """The error in percent by corruption and severity, if the recipe has several corruptions; every process must
        call this."""
        return {}

    # ---- logs and drawings

    @property
    def monitor(self) -> str:
        """The metric that marks the best epoch."""
        return "val_loss" if self.config.train.monitor == "loss" else self.shown[0]

    def is_better(self, row: Row, best: Row) -> bool:
        """Whether the epoch of ``row`` is better than that of ``best``."""
        new, old = row[self.monitor], best[self.monitor]
        if new is None or old is None:
            return old is None and new is not None
        return new < old if self.monitor == "val_loss" else new > old

    @property
    def parts(self) -> dict[str, str]:
        """Names of the model and of its head and neck, if it has them."""
        return {key: name for key in ("name", "head", "neck") if (name := getattr(self.config.model, key, None))}

    def describe(self) -> str:
        """Model, input and number of classes, for the log."""
        return f"{', '.join(self.parts.values())}, {self.input}, {len(self.classes)} classes"

    def headline(self, row: Row) -> str:
        """The held-out loss and the `shown` metrics of a row, for the log."""
        loss = "" if row["val_loss"] is None else f"loss {row['val_loss']:.4f}  "
        return loss + "  ".join(f"{self.metrics[name]} {row[name]:.2f}" for name in self.shown if row[name] is not None)

    def on_epoch(self, run: Path, model: nn.Module, epoch: int) -> None:
        """Called after each evaluation on the main process; ``epoch`` counts from 1."""
        if self.pictures:
            self.draw(model, run / "pictures" / f"epoch_{epoch:03}.png", f"{self.parts['name']}, epoch {epoch}")

    def finish(self, run: Path, state: Any, model: nn.Module, draw: bool) -> dict[str, Any]:
        """Examines the best weights (``model``); every process must call this. Files are written only if ``draw``.

        Returns:
            the first entries of summary.json.
        """
        best, last = state.best, state.history[-1]  # the last epoch is always evaluated
        more = self.examine(run, model, f"{self.parts['name']}, epoch {best['epoch']}", draw)
        if draw:
            labels = {name: self.metrics[name] for name in self.shown}
            plots.curves(state.history, run / "curves.png", self.describe(), labels, self.monitor)
        figures = {name: best[name] for name in self.metrics} | {f"last_{name}": last[name] for name in self.metrics}
        parts = self.parts
        return {"model": parts.pop("name"), **parts, "best_epoch": best["epoch"], **figures, **more}

    def examine(self, run: Path, model: nn.Module, title: str, draw: bool) -> dict[str, Any]:
        """Draws predictions of the best weights and writes the table of classes, if there is one.

        Returns:
            further entries of summary.json.
        """
        scorer = self.score(model)
        if draw:
            self.draw(model, run / "predictions.png", title)
            write_table(run / "classes.csv", *self.by_class(scorer))
        return {"n": scorer.n}

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path, title: str) -> None:
        """Draws predictions for `pictures` held-out images, the same ones each time."""
        model.eval()
        examples, images = [], len(self.data.val.dataset)
        count = min(self.pictures, images)
        for number in (i * images // count for i in range(count)):
            with suppress(*UNREADABLE):  # counted by the evaluation
                examples.append(self.example(model, number))
        if examples:
            self.plot(examples, path, title)

    def example(self, model: nn.Module, number: int) -> Any:
        """A held-out image with its annotations and predictions, for `plot`."""
        raise NotImplementedError

    def plot(self, examples: list[Any], path: Path, title: str) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Result:
    """A predicted class or object of an image.

    Attributes:
        score: in [0, 1]: the probability of the class (classifier), the confidence (detector) or the share of the
            pixels (segmenter).
        box: of an object: x1, y1, x2, y2 in pixels of the file.
        category_id: of an object: the id of its class in the annotations that the detector was trained on.
    """

    label: str
    score: float
    box: tuple[float, float, float, float] | None = None
    category_id: int | None = None

    def __str__(self) -> str:
        place = "  from ({:.0f}, {:.0f}) to ({:.0f}, {:.0f})".format(*self.box) if self.box is not None else ""
        return f"{100 * self.score:6.2f} %  {self.label}{place}"


class Predictor(ABC):
    """A trained model for image files.

    Attributes:
        channels: of the model's images.
    """

    formats: ClassVar[tuple[str, ...]] = ()  # of output files, the default first
    model: Any
    channels: int

    @abstractmethod
    def __init__(self, source: str | Path, *, top: int, threshold: float):
        """Loads the model; see `prediction.predict`."""

    def open(self, source: str | Path | Image.Image) -> Image.Image | Tensor:
        """Opens an image or file with the model's number of channels; other than 1 or 3 are float ``[C, H, W]`` in
        [0, 1]."""
        return to_mode(source, self.channels) if isinstance(source, Image.Image) else read_image(source, self.channels)

    def read(self, source: str | Path | Image.Image) -> Tensor:
        """Reads an image or file as float ``[C, H, W]`` in [0, 1].

        Raises:
            OSError: a missing file, or not an image.
        """
        image = self.open(source)
        return image if isinstance(image, Tensor) else pil_to_tensor(image).float() / 255

    @abstractmethod
    def predict(self, image: Tensor) -> tuple[list[Result], Any]:
        """Results for an image, the highest score first, and the raw predictions for `draw` and the other writers."""

    def draw(self, image: Tensor, found: Any, path: Path, title: str) -> None:
        """Writes a PNG of the image with its predictions."""
        raise NotImplementedError

    def masks(self, image: Tensor, found: Any, path: Path) -> None:
        """Writes a PNG with the class, or the number of the object, of each pixel."""
        raise NotImplementedError

    def categories(self) -> dict[int, str]:
        """Category id -> name."""
        raise NotImplementedError

    def coco(self, found: Any) -> list[dict[str, Any]]:
        """The objects as COCO annotations, without ids."""
        raise NotImplementedError

    def yolo(self, image: Tensor, found: Any) -> list[str]:
        """The objects as lines of a YOLO text file: class from 0, centre and size (with masks a polygon)
        relative to the image, score."""
        raise NotImplementedError


def loop_problems(config: Any) -> Problems:
    """Checks the recipe keys of the training loop."""
    problems = Problems()
    with problems:
        check_optim(config.optim)
    with problems:
        check_schedule(config.schedule)
    if config.train.parallel == "fsdp":
        with problems:
            check_sharding(config.train)
    files = {"model.checkpoint": config.model.checkpoint, "model.segmenter": getattr(config.model, "segmenter", None)}
    files |= {"data.exclude": config.data.exclude, "data.split": config.data.split}
    if config.data.kind != "digits" and "://" not in str(config.data.root):  # composites are written
        files["data.root"] = config.data.root
    for key, path in files.items():
        with problems:
            if path is not None and not local_path(path).exists():
                raise ConfigError(f"{key}: {path} does not exist")
    if config.model.pretrained and "pretrained_cfg_overlay" not in config.model.kwargs:
        with problems:
            check_published("model.pretrained", config.model.name)
    return problems


def check_published(key: str, name: str) -> None:
    """Raises:
    ConfigError: a registered model without published weights.
    """
    cfg = get_pretrained_cfg(name)
    if is_model(name) and not (cfg is not None and cfg.has_weights):
        raise ConfigError(f"{key}: {name} has no published weights")


def find_recipe(source: str | Path) -> Path | None:
    """The config.yaml of a run or of the run that a checkpoint folder lies in; None for anything else."""
    folder = local_path(source)
    places = (folder, folder.resolve().parent) if folder.is_dir() else ()
    return next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)


def use_kept_split(config: Any, source: str | Path, overrides: Sequence[str]) -> None:
    """Makes an evaluation use the held-out images of the run ``source``, unless the overrides name other data."""
    recipe = find_recipe(source)
    if recipe is not None:
        kept_split(config.data, recipe.parent, overrides)


def processes(accelerator: Accelerator) -> dict[str, Any]:
    """Device, rank and world size, as keyword arguments of the functions that build loaders."""
    return dict(device=accelerator.device, rank=accelerator.process_index, world=accelerator.num_processes)


def check_backbone(config: Any) -> None:
    """Raises:
    ConfigError: the backbone's name is unknown.
    """
    if not is_model(config.model.name):
        raise ConfigError(f"model.name: {unknown_model(config.model.name)}")


def build_dense(builder: Callable[..., Any], config: Any, num_classes: int, **more: Any) -> Any:
    """A recipe's detector or segmenter, on the CPU; ``builder`` is `build_detector` or `build_segmenter`.

    Raises:
        ConfigError: an invalid name or argument, or weights that do not fit.
    """
    model, data = config.model, config.data
    images = dict(in_chans=data.in_chans, mean=data.mean, std=data.std)
    try:
        return builder(**vars(model), num_classes=num_classes, **images, **more)
    except (ValueError, TypeError, RuntimeError, AssertionError, OSError, ImportError) as error:
        hint = RANDOM_WEIGHTS if model.pretrained and isinstance(error, OSError) else ""
        raise ConfigError(f"model {model.name!r} with {model.neck} and {model.head}: {error}{hint}") from error
