"""What the engine costs: its updates beside those of a loop written by hand, with the same model, data and optimizer.

Both train copies of one model by turns, a few updates a round, in one process; figures are medians over the rounds. An
update is all that the engine does from one batch to the next: loading, schedule, norm of the gradient, bar, looking for
NaN and signals. Evaluations, checkpoints and logs come by epoch and are left out. The rate is constant, so that both
train the same and meet the same numbers.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from ..configs.schema import ClassifyConfig, load_config
from .classify import Task
from .engine import Trainer, create_optimizer


@dataclass(frozen=True)
class EngineCase:
    """A recipe and what is changed of it; ``updates`` a round."""

    id: str
    recipe: str
    overrides: tuple[str, ...]
    updates: int


PLAIN = ("optim.clip_grad=null", "loss.smoothing=0", "model.drop_path_rate=0")
PLAIN += ("schedule.name=constant", "schedule.warmup_fraction=0", "schedule.cooldown_fraction=0")
CASES = (
    # the demo's own, whose updates are short: where the engine's part is the largest
    EngineCase("digits", "classify/digits", PLAIN, 20),
    EngineCase(
        "nat_mini 64px",
        "classify/digits",
        (*PLAIN, "model.name=nat_mini", "model.kwargs=null", "data.image_size=64", "train.batch_size=8"),
        4,
    ),
)


def rows(case: EngineCase, rounds: int) -> list[dict[str, object]]:
    """Milliseconds of an update by the engine and by hand, and the engine's speed over that of the other."""
    overrides = [o for o in case.overrides if o != "model.kwargs=null"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = load_config(case.recipe, [*overrides, f"output={folder}"], ClassifyConfig)
        if "model.kwargs=null" in case.overrides:
            config.model.kwargs = {}
        calls = {
            "engine": _engine(config, case.updates, Path(folder), stack),
            "by hand": _by_hand(config, case.updates),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call, _ in calls.values():
            call()  # warm-up
        for number in range(rounds):
            for name in sorted(calls, reverse=bool(number % 2)):  # neither always comes second
                begin = time.perf_counter()
                calls[name][0]()
                times[name].append((time.perf_counter() - begin) / case.updates)
    speed = {name: 1 / statistics.median(values) for name, values in times.items()}
    labels = {"case": case.id, "batch": config.train.batch_size, "updates": case.updates, "rounds": rounds}
    return [
        {
            **labels,
            "loop": name,
            "update_ms": f"{1e3 / speed[name]:.2f}",
            "updates_per_s": f"{speed[name]:.2f}",
            "of_by_hand": f"{speed[name] / speed['by hand']:.3f}",
        }
        for name in calls
    ]


def _task(config: ClassifyConfig) -> tuple[Accelerator, Any]:
    set_seed(config.seed)
    accelerator = Accelerator()
    return accelerator, Task.build(deepcopy(config), accelerator)


def _engine(
    config: ClassifyConfig, updates: int, folder: Path, stack: ExitStack
) -> tuple[Callable[[], None], nn.Module]:
    """What trains for so many updates, and the model that it trains. Until ``stack`` ends signals are remembered, and
    there is the bar, as of a run of many epochs."""
    accelerator, task = _task(config)
    config = deepcopy(config)
    config.train.steps_per_epoch = updates  # so that a round is an epoch, with all that the loop does around one
    parts = {"optim": config.optim, "schedule": config.schedule, "train": config.train}
    said = stack.enter_context((folder / "said").open("w"))
    trainer = Trainer(accelerator, task, run=folder, console=Console(file=said), **parts)
    stack.enter_context(trainer.watching())
    return trainer.train_epoch, trainer.raw


def _by_hand(config: ClassifyConfig, updates: int) -> tuple[Callable[[], None], nn.Module]:
    accelerator, task = _task(config)
    loader, device = task.data.train, accelerator.device
    model = task.model.to(device).train()
    optimizer = create_optimizer(model, config.optim, config.train.batch_size)

    def batches():
        epoch = 0
        while True:
            yield from loader.epoch(epoch)
            epoch += 1

    stream = batches()

    def run() -> None:
        total = torch.zeros((), device=device)
        for _ in range(updates):
            images, targets = next(stream)
            loss = F.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        total.item()  # as anybody looks at the loss now and then

    return run, model
