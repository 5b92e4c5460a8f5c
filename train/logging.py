"""Logs of a run: console with progress bar, metrics.csv, TensorBoard, accelerate's trackers (MLflow, wandb, ...)."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ..configs.schema import ConfigError
from ..files import atomic
from .distributed import raised_by_all

if TYPE_CHECKING:
    from .task import Row

BAR_SECONDS = 0.5  # between two updates of the progress bar
TENSORBOARD = "tensorboard"  # written here, not by accelerate: a resumed run removes epochs after its checkpoint
PROJECT = "foveal"
BUILT_IN = frozenset(LOGGER_TYPE_TO_CLASS)


def accelerate_trackers(names: Sequence[str]) -> list[Any]:
    """The trackers in ``log.trackers`` that accelerate starts.

    Raises:
        ConfigError: an unknown name, or one that is not installed.
    """
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"log.trackers: unknown {name!r}; known are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name in BUILT_IN and name not in installed:
            raise ConfigError(f"log.trackers: {name} is not installed")
    return [name for name in dict.fromkeys(names) if name != TENSORBOARD]


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write all rows, so that a resumed run leaves no gaps or duplicates. None becomes an empty field."""
    if not rows:
        return
    with atomic(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


class Logger:
    """The logs of a run: printed lines, a progress bar, and one `log` for the row of an epoch.

    Inside `start` the bar is drawn and the trackers run. Only the main process writes files and trackers; its errors
    are raised by all.

    Args:
        config: the recipe, which is passed to the trackers.
    """

    def __init__(self, config: Any, accelerator: Accelerator, console: Console):
        self.config, self.accelerator, self.console = config, accelerator, console
        self.run = Path(config.output)
        self._tensorboard: SummaryWriter | None = None
        self._trackers = Trackers(self.run, accelerator)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not accelerator.is_main_process,
            # a thread draws it, which takes time from the updates; into a file it is drawn once, at the end
            auto_refresh=console.is_terminal or console.is_jupyter,
            refresh_per_second=1 / BAR_SECONDS,
        )
        self._drawn = 0.0

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.print(f"[yellow]warning:[/] {escape(text)}")

    def start(self, history: list[Row], completed: int, total: int) -> ExitStack:
        """Start bar and trackers for a run of ``total`` updates; the returned context ends them.

        Args:
            history: rows of the previous epochs of a resumed run, of which the last may not have been logged.
        """
        with ExitStack() as stack:
            with raised_by_all(self.accelerator):
                stack.callback(self._trackers.finish)
                self._trackers.start(self.config)
                if self.accelerator.is_main_process:
                    if TENSORBOARD in self.config.log.trackers:
                        self._tensorboard = SummaryWriter(
                            str(self.run / "tensorboard"), purge_step=max(len(history), 1)
                        )
                        stack.callback(self._tensorboard.close)
                    for row in history:
                        self._record(row, tensorboard=row is history[-1])
            self._bar_task = self._bar.add_task("", completed=completed, total=total, note="")
            stack.enter_context(self._bar)
            return stack.pop_all()

    def describe(self, description: str | None = None, note: str | None = None) -> None:
        """Change the text before and after the bar."""
        fields: dict[str, Any] = {"description": description, "note": note}
        self._bar.update(self._bar_task, **{key: text for key, text in fields.items() if text is not None})

    def progress(self, updates: int, loss: float, images_per_second: float, now: bool) -> None:
        """Advance the bar, at most twice a second unless ``now``."""
        if now or time.perf_counter() - self._drawn >= BAR_SECONDS:
            note = f"loss {loss:.3f}  {images_per_second:,.0f} img/s"
            self._bar.update(self._bar_task, completed=updates, note=note)
            self._drawn = time.perf_counter()

    def log(self, history: list[Row]) -> None:
        """Log the newest row of ``history``; metrics.csv gets all rows."""
        write_csv(self.run / "metrics.csv", history)
        self._record(history[-1])

    def _record(self, row: Row, tensorboard: bool = True) -> None:
        values = {key: value for key, value in row.items() if key not in ("epoch", "seconds") and value is not None}
        if self._tensorboard is not None and tensorboard:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, row["epoch"])
            self._tensorboard.flush()
        self._trackers.log(values, row["epoch"])


class Trackers:
    """accelerate's trackers. A resumed run continues the trackers' runs, whose ids are in RUN/trackers.json with the
    last logged epoch; each epoch is logged once."""

    def __init__(self, run: Path, accelerator: Accelerator):
        self.run, self.accelerator = run, accelerator
        self.file = run / "trackers.json"
        self._known: dict[str, Any] = {}

    def start(self, config: Any) -> None:
        """Start them on every process."""
        if not self.accelerator.log_with:
            return
        if self.file.is_file():
            self._known = json.loads(self.file.read_text(encoding="utf-8"))
        name = self.run.resolve().name
        settings: dict[str, dict[str, Any]] = {
            "mlflow": {"run_id": self._known.get("mlflow"), "run_name": name},
            "wandb": {"id": self._known.get("wandb"), "name": name, "resume": "allow", "dir": str(self.run)},
        }
        self.accelerator.init_trackers(PROJECT, None if self._known else dict(flat(config)), settings)
        if self.accelerator.is_main_process:
            self._known = {"logged": 0} | self._known | {t.name: _run_id(t) for t in self.accelerator.trackers}
            self._write()

    def log(self, values: Row, epoch: int) -> None:
        if self.accelerator.trackers and epoch > self._known["logged"]:
            self.accelerator.log(values, step=epoch)
            self._known["logged"] = epoch
            self._write()

    def _write(self) -> None:
        with atomic(self.file) as new:
            new.write_text(json.dumps(self._known) + "\n", encoding="utf-8")

    def finish(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []


def _run_id(tracker: Any) -> str | None:
    if tracker.name == "mlflow":
        return tracker.tracker.info.run_id
    return tracker.tracker.id if tracker.name == "wandb" else None


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``section.key`` and value of a recipe, lists and mappings as text."""
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", value if isinstance(value, bool | int | float | str) else str(value)
