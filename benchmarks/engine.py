"""`foveal bench engine`: steps of the trainer against a minimal loop with the same model, data and optimizer.

Both train copies of one model, a few steps per round. A step includes everything that the trainer does from one batch
to the next: loading, schedule, gradient norm, progress bar, checks for NaN and signals. Evaluation, checkpoints and
logs per epoch are excluded. The learning rate is constant, so that both compute the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from .measure import Bench, Row


@dataclass(frozen=True)
class EngineCase:
    """A recipe and its overrides; ``updates`` per round."""

    id: str
    recipe: str
    overrides: tuple[str, ...]
    updates: int
    default_kwargs: bool = False  # the model's defaults, not the arguments of the recipe


PLAIN = ("optim.clip_grad=null", "loss.smoothing=0", "model.drop_path_rate=0")
PLAIN += ("schedule.name=constant", "schedule.warmup_fraction=0", "schedule.cooldown_fraction=0")
CASES = (
    # the demo's, with short steps: the overhead of the trainer is largest
    EngineCase("digits", "classify/digits", PLAIN, 20),
    EngineCase(
        "nat_mini 64px",
        "classify/digits",
        (*PLAIN, "model.name=nat_mini", "data.image_size=64", "train.batch_size=8"),
        4,
        default_kwargs=True,
    ),
)
TINY = (EngineCase("tiny", "classify/digits", (*PLAIN, "data.image_size=16", "data.limit=256"), 2),)


def engine_rows(case: EngineCase, bench: Bench) -> Iterator[Row]:
    """Milliseconds per step of the trainer and of the minimal loop, and their ratio."""
    from ..configs.schema import ClassifyConfig, load_config

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = load_config(case.recipe, [*case.overrides, f"output={folder}"], ClassifyConfig)
        if case.default_kwargs:
            config.model.kwargs = {}
        engine, _ = _engine(config, case.updates, Path(folder), stack)
        by_hand, _ = _by_hand(config, case.updates)
        times = bench.median_ms({"engine": engine, "by hand": by_hand})
    for name, taken in times.items():
        yield {
            "case": case.id,
            "batch": config.train.batch_size,
            "updates": case.updates,
            "loop": name,
            "update_ms": round(taken / case.updates, 2),
            "updates_per_s": round(1e3 * case.updates / taken, 2),
            "of_by_hand": round(times["by hand"] / taken, 3),
        }


def _task(config: Any) -> tuple[Any, Any]:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from ..train.classify import Task

    set_seed(config.seed)
    accelerator = Accelerator()
    return accelerator, Task.build(deepcopy(config), accelerator)


def _engine(config: Any, updates: int, folder: Path, stack: ExitStack) -> tuple[Callable[[], None], nn.Module]:
    """A function that trains for a number of steps, and its model. Signals are handled and the progress bar is shown
    until ``stack`` ends, as in a run of many epochs."""
    from ..train.trainer import Trainer

    accelerator, task = _task(config)
    config = deepcopy(config)
    config.train.steps_per_epoch = updates  # a round is an epoch
    config.output, config.log.trackers = str(folder), []
    output = stack.enter_context((folder / "console").open("w"))
    trainer = Trainer(config, task, accelerator, Console(file=output))
    stack.enter_context(trainer.watching())

    def run() -> None:
        trainer.train_epoch()
        trainer.state.start_epoch(trainer.state.epoch + 1)

    return run, trainer.model_without_ddp


def _by_hand(config: Any, updates: int) -> tuple[Callable[[], None], nn.Module]:
    from ..train.optim import create_optimizer

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
        total.item()  # the loss is logged occasionally

    return run, model
