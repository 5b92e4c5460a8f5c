"""What a task (classification, detection, segmentation) brings to training, evaluation and prediction."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from ..backbones.images import read_image
from ..backbones.loading import local_path
from . import plots
from .scoring import Metrics, Scorer

Row = dict[str, Any]  # of metrics.csv


def find_recipe(source: str | Path) -> Path | None:
    """The config.yaml of the run that ``source`` is, or lies in as a checkpoint; None for anything else."""
    folder = local_path(source)
    places = (folder, folder.resolve().parent) if folder.is_dir() else ()
    return next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)


def processes(accelerator: Accelerator) -> dict[str, int]:
    """The arguments by which a builder of loaders takes this process's share of the images."""
    return {"rank": accelerator.process_index, "world": accelerator.num_processes}


class Task(ABC):
    """A model, its data and what the training loop cannot know of them.

    Attributes:
        model: on the CPU when a run begins.
        notes: printed once, at the beginning.
        identity: what must not change between a run and its continuation.
    """

    schema: ClassVar[type]  # of the recipes
    metrics: tuple[str, ...]  # of `evaluate`, in the order of metrics.csv
    monitor: ClassVar[str]  # the metric whose largest value marks the best epoch
    curves: tuple[tuple[str, str], ...]  # metrics that are drawn by epoch, with their labels
    files: ClassVar[tuple[str, ...]] = ("output",)  # overrides of an evaluation that name a file to write
    pictures: ClassVar[bool] = True  # draw held-out images after each evaluation, not only at the end

    def __init__(self, config: Any, model: nn.Module, classes: list[str], data: Any):
        self.config, self.model, self.classes, self.data = config, model, classes, data
        self.notes: list[str] = list(data.notes)
        self.identity: dict[str, Any] = {}

    # ---- how it is made

    @classmethod
    @abstractmethod
    def build(cls, config: Any, accelerator: Accelerator) -> "Task":
        """The model with its initial weights and the data of a recipe, to be trained."""

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path, overrides: list[str], accelerator: Accelerator) -> "Task":
        """A trained model and the data to evaluate it on; see `evaluation.evaluate`."""

    # ---- training

    @abstractmethod
    def train_step(self, model: nn.Module, batch: Any, epoch: int) -> Tensor:
        """The loss of a batch, a scalar; runs under the chosen precision."""

    @abstractmethod
    def save_weights(self, folder: Path, model: nn.Module) -> None:
        """Writes the model folder that users load."""

    # ---- evaluation

    @abstractmethod
    def score(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> Scorer:
        """Scores the held-out images, on every process; ``on_batch`` gets the number of images after each batch."""

    def evaluate(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> Metrics:
        """The metrics of `score`, the same on every process."""
        return self.score(model, on_batch).metrics

    def result(self, scorer: Scorer) -> dict[str, Any]:
        """The figures of an evaluation, as `evaluation.evaluate` returns them."""
        return dict(scorer.metrics)

    # ---- words and figures

    @abstractmethod
    def describe(self) -> str:
        """Model, input and classes in a few words."""

    @abstractmethod
    def headline(self, row: Row) -> str:
        """The metrics of a row in a few words."""

    @abstractmethod
    def table(self, metrics: Metrics) -> tuple[str, list[dict[str, str]]]:
        """What an evaluation was on, and the rows (column to text) of its table."""

    def draw(self, model: nn.Module, path: Path, title: str) -> None:
        """Draws a few held-out images with what ``model`` predicts, the same ones each time."""
        raise NotImplementedError

    def on_epoch(self, run: Path, model: nn.Module, epoch: int) -> None:
        """After an evaluation, on the main process. ``epoch`` counts from 1."""
        if self.pictures:
            (run / "pictures").mkdir(exist_ok=True)
            self.draw(model, run / "pictures" / f"epoch_{epoch:03}.png", f"{self.config.model.name}, epoch {epoch}")

    def finish(self, run: Path, state: Any, model: nn.Module, draw: bool) -> dict[str, Any]:
        """Figures and tables of the best weights (``model``), written where ``draw``; on every process.

        Returns:
            the first entries of summary.json.
        """
        config, best, last = self.config.model, state.best, state.history[-1]  # the last epoch is always evaluated
        parts = {key: getattr(config, key) for key in ("head", "neck") if hasattr(config, key)}
        more = self.examine(run, model, f"{config.name}, epoch {best['epoch']}", draw)
        if draw:
            title = f"{config.name}, {parts['head']}" if parts else f"{config.name} on {self.config.data.kind}"
            plots.curves(state.history, run / "curves.png", title, dict(self.curves), self.monitor)
        figures = {name: best[name] for name in self.metrics} | {f"last_{name}": last[name] for name in self.metrics}
        return {"model": config.name, **parts, "best_epoch": best["epoch"], **figures, **more}

    def examine(self, run: Path, model: nn.Module, title: str, draw: bool) -> dict[str, Any]:
        """Draws predictions of the best weights, and writes tables by class where there are any.

        Returns:
            further entries of summary.json.
        """
        if draw:
            self.draw(model, run / "predictions.png", title)
        return {}


@dataclass(frozen=True)
class Result:
    """A class, or an object, that a model finds in an image.

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
        text = f"{100 * self.score:6.2f} %  {self.label}"
        if self.box is not None:
            x1, y1, x2, y2 = (f"{value:.0f}" for value in self.box)
            text += f"  from ({x1}, {y1}) to ({x2}, {y2})"
        return text


class Predictor(ABC):
    """A trained model for image files.

    Attributes:
        channels: of the images that the model takes, 1 or 3.
    """

    draws: ClassVar[bool] = True  # has something to draw
    channels: int

    @abstractmethod
    def __init__(self, source: str | Path, *, top: int, threshold: float):
        """Loads the model; see `prediction.predict`."""

    def read(self, path: str | Path) -> Tensor:
        """The image of a file, float ``[C, H, W]`` in [0, 1].

        Raises:
            OSError: it is missing, or no image; the message names it.
        """
        return pil_to_tensor(read_image(path, self.channels)).float() / 255

    @abstractmethod
    def predict(self, image: Tensor) -> tuple[list[Result], Any]:
        """What is in an image, the highest score first, and what `draw` draws of it."""

    def draw(self, image: Tensor, found: Any, path: Path, title: str) -> None:
        """Writes a PNG of what was found."""
        raise NotImplementedError
