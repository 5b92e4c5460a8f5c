"""``train`` and ``evaluate`` of each task's module, which `foveal.train` has for all; they go with the next release."""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console


def commands(task: str) -> tuple[Callable[..., int], Callable[..., int]]:
    """``train`` and ``evaluate`` of the module of a task. They return 0, as before; what goes wrong is raised."""
    package = import_module("foveal.train")

    def warn(name: str) -> None:
        text = f"foveal.train.{task}.{name} goes with the next release: use foveal.train.{name}"
        warnings.warn(text, DeprecationWarning, stacklevel=3)

    def train(config_path: str | Path, overrides: Sequence[str] = ()) -> int:
        warn("train")
        package.train(config_path, overrides, task)
        return 0

    def evaluate(source: str, overrides: Sequence[str] = ()) -> int:
        warn("evaluate")
        package.evaluate(source, overrides, Console())
        return 0

    return train, evaluate
