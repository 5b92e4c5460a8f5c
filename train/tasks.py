"""Which tasks there are, and which one a folder is of."""

from importlib import import_module
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from ..heads.checkpoint import read_dense_config

TASKS = ("classify", "detect", "segment")


def task_of(source: str | Path) -> str:
    """``"detect"`` or ``"segment"`` for a run, a checkpoint folder or a model folder of these; else ``"classify"``.

    Raises:
        ValueError: the folder's config.json is no JSON, or its config.yaml no YAML, or their task is none of these.
    """
    dense = read_dense_config(source)
    if dense is not None:
        return _known(dense[1].get("task"), dense[0] / "config.json")
    recipe = Path(source) / "config.yaml"  # of a run that has no best/ yet
    try:
        content = safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe} can't be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{recipe} holds no recipe")
    return _known(content.get("task", "classify"), recipe)


def _known(task: Any, file: Path) -> str:
    if task not in TASKS:
        raise ValueError(f"{file}: task is {task!r}, known are {', '.join(TASKS)}")
    return task


def find_task(name: str) -> Any:
    """The module of a task: its ``Task`` and its ``Predictor``."""
    assert name in TASKS, name
    return import_module(f".{name}", __package__)
