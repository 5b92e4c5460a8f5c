"""Deprecated ``train`` and ``evaluate`` of the tasks, to be removed in the next release: use `foveal.train`."""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console


def commands(task: str) -> tuple[Callable[..., int], Callable[..., int]]:
    """``train`` and ``evaluate`` of a task's module. They return 0, as before; errors are raised."""
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
