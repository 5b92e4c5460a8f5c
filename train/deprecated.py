"""The functions of each task that `foveal.train` has for all of them now; they go with the next release."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console


def commands(task: str) -> tuple[Callable[..., Any], ...]:
    """``train``, ``evaluate`` and ``predict`` of the module of a task, as they were: they return 0, or yield tuples.
    What goes wrong is raised."""
    train_package = import_module(__package__)

    def warn(name: str) -> None:
        text = f"foveal.train.{task}.{name} goes with the next release: use foveal.train.{name}"
        warnings.warn(text, DeprecationWarning, stacklevel=3)

    def train(config_path: str | Path, overrides: Sequence[str] = ()) -> int:
        warn("train")
        train_package.train(config_path, overrides, task)
        return 0

    def evaluate(source: str, overrides: Sequence[str] = ()) -> int:
        warn("evaluate")
        train_package.evaluate(source, overrides, Console())
        return 0

    def predict(
        source: str | Path, images: Sequence[str | Path], *args: Any, **kwargs: Any
    ) -> Iterator[tuple[str, Any]]:
        warn("predict")
        names = ("output",) if task == "segment" else ("threshold", "output")
        for each in train_package.predict(source, images, **dict(zip(names, args, strict=False)), **kwargs):
            if task == "detect":
                found: list[Any] = [vars(result) for result in each.results]
            else:
                found = [(result.label, result.score) for result in each.results]
            yield each.path, each.error or found

    for function in (train, evaluate, predict):  # pickled by these names, for other processes
        function.__module__, function.__qualname__ = f"{__package__}.{task}", function.__name__
    return train, evaluate, predict
