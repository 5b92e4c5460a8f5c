"""Names of the tasks, and the task of a folder."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from ..backbones.loading import local_path
from ..errors import ConfigError
from ..heads.checkpoint import read_dense_config

TASKS = ("classify", "detect", "segment", "upsample")


def task_of(source: str | Path) -> str:
    """The task of a run, a checkpoint folder or a model folder; ``"classify"`` for anything else.

    Raises:
        ValueError: config.json or config.yaml cannot be parsed, or names an unknown task.
    """
    dense = read_dense_config(source)
    if dense is not None:
        return _known(dense[1].get("task"), dense[0] / "config.json")
    recipe = Path(source) / "config.yaml"  # a run that has no best/ yet
    content = _read_recipe(recipe) if recipe.is_file() else {}
    return _known(content.get("task", "classify"), recipe)


def import_models(modules: Sequence[str], run: Path | None = None) -> None:
    """Imports modules that register models with timm, from Python's path or the current folder.

    Args:
        run: the run folder whose recipe names them; modules inside it are not trusted.

    Raises:
        ConfigError: a module is missing, or lies in the run folder.
    """
    if modules and os.getcwd() not in sys.path:  # `python -m foveal` has it already
        sys.path.append(os.getcwd())
    for name in modules:
        top = name.partition(".")[0]
        spec = importlib.util.find_spec(top) if all(map(str.isidentifier, name.split("."))) else None
        if spec is None:
            raise ConfigError(
                f"imports: no module {name!r} on Python's path or in {os.getcwd()} (give its name, without .py)"
            )
        places = [Path(place).resolve() for place in (spec.origin, *(spec.submodule_search_locations or ())) if place]
        if run is not None and name not in sys.modules and any(p.is_relative_to(run.resolve()) for p in places):
            raise ConfigError(f"imports: {name} is in {run}: code in a run folder is only run with --import {name}")
        import_module(name)


def import_remembered(source: str | Path) -> None:
    """Imports the modules that a run's recipe names; does nothing for other sources."""
    folder = local_path(source)
    for place in (folder, folder.resolve().parent) if folder.is_dir() else ():
        if (recipe := place / "config.yaml").is_file():
            import_models(_read_recipe(recipe).get("imports") or (), run=place)
            return


def _read_recipe(recipe: Path) -> dict[str, Any]:
    try:
        content = safe_load(recipe.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe} can't be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{recipe} is not a recipe")
    return content


def _known(task: Any, file: Path) -> str:
    if task not in TASKS:
        raise ValueError(f"{file}: unknown task {task!r}; known: {', '.join(TASKS)}")
    return task


def find_task(name: str) -> Any:
    """The module of a task, with its ``Task`` and ``Predictor``."""
    assert name in TASKS, name
    return import_module(f".{name}", __package__)
