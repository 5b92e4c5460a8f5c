"""Which task a run or a model folder is of, and the commands that go by it."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from ..heads.build import read_dense_config

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
        content = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe} can't be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{recipe} holds no recipe")
    return _known(content.get("task", "classify"), recipe)


def _known(task: Any, file: Path) -> str:
    if task not in TASKS:
        raise ValueError(f"{file}: task is {task!r}, known are {', '.join(TASKS)}")
    return task


def evaluate(source: str, overrides: Sequence[str] = ()) -> int:
    """Measures a run, a folder or a model by its task; see `classify.evaluate`, `detect.evaluate` and
    `segment.evaluate` for what they take, and for the exit codes."""
    return import_module(f".{task_of(source)}", __package__).evaluate(source, overrides)


def predict(
    source: str | Path, images: Sequence[str | Path], threshold: float, output: Path | None
) -> Iterator[tuple[str, list[tuple[str, float] | tuple[str, float, str]] | OSError]]:
    """What a detector or a segmenter finds in image files; with ``output`` also drawn into that folder.

    Yields:
        the path, and for each object its class, its score and in words its box, or for each class of pixels its name
        and its share of them; or the error where an image cannot be read.

    Raises:
        ValueError: the folder holds neither, or cannot be loaded.
    """
    if task_of(source) == "segment":
        from . import segment

        yield from segment.predict(source, images, output)
        return
    from . import detect

    for path, found in detect.predict(source, images, threshold, output):
        if isinstance(found, OSError):
            yield path, found
        else:
            yield path, [(each["label"], each["score"], _place(each["box"])) for each in found]


def _place(box: Sequence[float]) -> str:
    x1, y1, x2, y2 = (f"{value:.0f}" for value in box)
    return f"  from ({x1}, {y1}) to ({x2}, {y2})"
