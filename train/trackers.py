"""Where the figures of a run go beside metrics.csv: TensorBoard's files, and what accelerate has trackers for."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..configs.schema import ConfigError
from .engine import raised_by_all

TENSORBOARD = "tensorboard"  # written by the engine, which takes back what came after the checkpoint of a resumed run
PROJECT = "foveal"
BUILT_IN = frozenset(LOGGER_TYPE_TO_CLASS)


def choose(names: Sequence[str]) -> list[str]:
    """Those of ``log.trackers`` that accelerate is to start.

    Raises:
        ConfigError: one that there is not, or that is not installed.
    """
    there = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"log.trackers: there is no {name!r}; known are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name in BUILT_IN and name not in there:
            raise ConfigError(f"log.trackers: {name} is not installed")
    return [name for name in dict.fromkeys(names) if name != TENSORBOARD]


@contextmanager
def tracking(
    accelerator: Accelerator, run: Path, config: Any
) -> Iterator[Callable[[dict[str, float], int], None] | None]:
    """Starts the accelerator's trackers, and ends them whatever happens. A run that is resumed goes on in the tracker's
    run of before, whose number is kept in RUN/trackers.json beside the last epoch that was logged.

    Yields:
        what logs the figures of an epoch, unless it was logged before; None without trackers.
    """
    if not accelerator.log_with:
        yield None
        return
    file, known = run / "trackers.json", {}

    def track(values: dict[str, float], epoch: int) -> None:
        if epoch > known["logged"]:
            accelerator.log(values, step=epoch)
            known["logged"] = epoch
            _write(file, known)

    try:
        with raised_by_all(accelerator):
            if file.is_file():
                known = json.loads(file.read_text(encoding="utf-8"))
            settings: dict[str, dict[str, Any]] = {
                "mlflow": {"run_id": known.get("mlflow"), "run_name": run.resolve().name},
                "wandb": {"id": known.get("wandb"), "name": run.resolve().name, "resume": "allow", "dir": str(run)},
            }
            accelerator.init_trackers(PROJECT, None if known else dict(_flat(config)), settings)
            if accelerator.is_main_process:
                known = {"logged": 0} | known | {tracker.name: _number(tracker) for tracker in accelerator.trackers}
                _write(file, known)
        yield track
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def _write(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.replace(file)


def _number(tracker: Any) -> str | None:
    if tracker.name == "mlflow":
        return tracker.tracker.info.run_id
    return tracker.tracker.id if tracker.name == "wandb" else None


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``section.key`` and value of a recipe, lists and mappings as text."""
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", value if isinstance(value, bool | int | float | str) else str(value)
