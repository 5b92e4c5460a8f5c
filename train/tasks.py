"""Which tasks there are, and which one a folder is of."""

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
    content = _read_recipe(recipe) if recipe.is_file() else {}
    return _known(content.get("task", "classify"), recipe)


def import_models(modules: Sequence[str], run: Path | None = None) -> None:
    """Imports modules that register models with timm, from Python's path or the current folder.

    Args:
        run: the run folder that names them; code that came with it is not run.

    Raises:
        ConfigError: there is no such module, or it lies in the run folder.
    """
    if modules and os.getcwd() not in sys.path:  # where `python -m foveal` looks, too
        sys.path.append(os.getcwd())
    for name in modules:
        top = name.partition(".")[0]
        spec = importlib.util.find_spec(top) if all(map(str.isidentifier, name.split("."))) else None
        if spec is None:
            raise ConfigError(
                f"imports: there is no module {name!r} on Python's path or in {os.getcwd()} (a name, without .py)"
            )
        places = [Path(place).resolve() for place in (spec.origin, *(spec.submodule_search_locations or ())) if place]
        if run is not None and name not in sys.modules and any(p.is_relative_to(run.resolve()) for p in places):
            raise ConfigError(f"imports: {name} lies in {run}: code of a run folder is run only by --import {name}")
        import_module(name)


def import_remembered(source: str | Path) -> None:
    """Imports the modules that the recipe of a run names; nothing for other sources."""
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
        raise ValueError(f"{recipe} holds no recipe")
    return content


def _known(task: Any, file: Path) -> str:
    if task not in TASKS:
        raise ValueError(f"{file}: task is {task!r}, known are {', '.join(TASKS)}")
    return task


def find_task(name: str) -> Any:
    """The module of a task: its ``Task`` and its ``Predictor``."""
    assert name in TASKS, name
    return import_module(f".{name}", __package__)
