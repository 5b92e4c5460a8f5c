"""The training loop, for any task: what a task brings is a step, an evaluation, and what its checkpoints hold.

One update is ``train.grad_accum_steps`` forward passes of every process. The learning rate is set per update. A run can
be stopped at any update: the state written then (weights, optimizer, scaler, random numbers, place in the epoch) goes
on as if nothing had happened, bit for bit where the loader's images do not depend on worker processes.

Several processes meet at fixed places only: what goes wrong on one of them is kept until the next such place and raised
there by all, so that none waits for another that is gone.
"""

import csv
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object, reduce, set_seed
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.tensorboard import SummaryWriter

from ..configs.schema import ConfigError, OptimConfig, ScheduleConfig, TrainConfig, rename_keys
from ..errors import Interrupted, RunError
from ..heads.legacy import migrate_arguments, migrate_inference
from . import checkpoint
from .data import Data, DataError

READING = (DataError, OSError, RuntimeError)  # what a loader was seen to raise; the last from a worker that died
NORM_EVERY = 20  # updates between two looks at the norm of a gradient that is not clipped
LOOK_EVERY = 20  # updates, at most, that an accelerator computes without being waited for
LOOK_SECONDS = 2.0  # and for how long, so that a run that is told to stop does in time
BAR_SECONDS = 0.5  # between two pictures of the progress bar
LISTS = (nn.ModuleList, nn.Sequential)
Metrics = dict[str, float]


def _renamed(key: str, earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A part of an earlier run's identity with today's names of arguments and recipe keys."""
    if key == "augmentation":
        return rename_keys("augment", earlier, now)
    return migrate_arguments(earlier) if key == "model" else migrate_inference(earlier)


class NonFiniteLoss(RunError):
    """The loss became NaN or infinite; the message names epoch and step."""


class OtherProcessError(RunError):
    """What another process raised; the message says which one, and what."""


class StopSignals:
    """Remembers Ctrl-C and SIGTERM so that the loop can stop at an update; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def stop(self) -> Interrupted:
        """What to raise; where only another process was signalled, as if it had been SIGTERM."""
        return Interrupted(130 if self.number == signal.SIGINT else 0)


def raise_together(accelerator: Accelerator, error: Exception | None) -> None:
    """Raises ``error`` where there is one, and what tells of it on the other processes. All of them must come here."""
    if accelerator.num_processes == 1:
        found = []
    else:
        mine = [] if error is None else [f"process {accelerator.process_index}: {type(error).__name__}: {error}"]
        found = gather_object(mine)
    if error is not None:
        raise error
    if found:
        raise OtherProcessError("; ".join(found))


@contextmanager
def raised_by_all(accelerator: Accelerator) -> Iterator[None]:
    """What goes wrong within it, on the main process alone, say, is raised by all processes at its end."""
    try:
        yield
    except Exception as error:
        raise_together(accelerator, error)
        raise
    raise_together(accelerator, None)


class Together:
    """A loader of evaluation whose errors wait until every process has read its share, and are then raised by all."""

    def __init__(self, loader: Any, accelerator: Accelerator):
        self._loader, self._accelerator = loader, accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        failure = None
        try:
            yield from self._loader.epoch(epoch, start)
        except READING as error:
            failure = error
        raise_together(self._accelerator, failure)


class Task(Protocol):
    """What is trained, and what its loop cannot know."""

    model: nn.Module  # on the CPU when the run begins
    data: Data
    metrics: tuple[str, ...]  # what `evaluate` answers, in the order of metrics.csv
    monitor: str  # the one whose largest value marks the best epoch
    identity: dict[str, Any]  # what must not change between a run and its continuation

    def train_step(self, model: nn.Module, batch: Any, epoch: int) -> Tensor:
        """The loss of a batch, a scalar; runs under the chosen precision."""

    def evaluate(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> Metrics:
        """Runs on every process, with the same answer; calls ``on_batch`` with the images done after each batch."""

    def save_weights(self, folder: Path, model: nn.Module) -> None:
        """Writes what a user loads into an existing folder."""

    def on_epoch(self, run: Path, model: nn.Module, epoch: int) -> None:
        """After an evaluation, on the main process: pictures, say. ``epoch`` counts from 1."""

    def headline(self, row: dict[str, Any]) -> str:
        """The metrics of a row in a few words."""


@dataclass
class State:
    """Where a run stands. ``step`` counts the updates done in epoch ``epoch`` (both from 0)."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0  # of training and evaluation, without the time between interruptions
    loss_sum: float = 0.0  # of this process, in the epoch so far
    loss_count: int = 0
    norm_sum: float = 0.0  # of the gradient's norm, where it was looked at, in the epoch so far
    norm_count: int = 0
    epoch_seconds: float = 0.0  # of training, in the epoch so far
    wait_seconds: float = 0.0  # of these, waiting for the main process's loader
    best: dict[str, Any] | None = None  # the row of the best epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.csv


def create_optimizer(model: nn.Module, config: OptimConfig, global_batch: int) -> torch.optim.Optimizer:
    """timm's optimizer ``config.name``, its rate scaled linearly from ``lr_batch`` to the global batch.

    A model with ``parameter_groups(weight_decay, layer_decay, backbone_lr_ratio)`` divides its parameters itself; of
    another, biases, norms and what it names are not decayed.
    """
    extra = {"betas": tuple(config.betas)} if config.betas is not None else {}
    if config.eps is not None:
        extra["eps"] = config.eps
    lr = config.lr * (global_batch / config.lr_batch if config.lr_batch else 1)
    try:
        parameters: Any = model
        if hasattr(model, "parameter_groups"):
            ratio = getattr(config, "backbone_lr_ratio", 1.0)
            parameters = model.parameter_groups(config.weight_decay, config.layer_decay, ratio)
        else:
            extra["layer_decay"] = config.layer_decay
        return create_optimizer_v2(
            parameters, opt=config.name, lr=lr, weight_decay=config.weight_decay, momentum=config.momentum, **extra
        )
    except (AssertionError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"optim: {config.name!r} can't be made: {error}") from None


def create_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, updates_per_epoch: int
) -> tuple[Scheduler, int]:
    """The learning rate by update, and the number of epochs including the cooldown."""
    total = config.epochs * updates_per_epoch
    if (config.name == "multistep") != bool(config.milestones):
        raise ConfigError(
            f"schedule: name={config.name} with milestones={config.milestones}: multistep, only, has them"
        )
    if any(not 0 < part < 1 for part in config.milestones):
        raise ConfigError(f"schedule.milestones={config.milestones} are not parts of the run, between 0 and 1")
    lr = max(group["lr"] for group in optimizer.param_groups)  # each group's own, times its lr_scale, from here on
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.name,
        num_epochs=total,  # the unit here is an update
        warmup_epochs=round(config.warmup_fraction * total),
        warmup_lr=config.warmup_lr_ratio * lr,
        min_lr=config.min_lr_ratio * lr,
        decay_epochs=max(1, round(config.decay_fraction * total)),
        decay_milestones=sorted(round(part * total) + 1 for part in config.milestones),  # timm's count from 1
        decay_rate=config.power if config.name == "poly" else config.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler, config.epochs + round(config.cooldown_fraction * config.epochs)


def _random_state() -> dict[str, Any]:
    """Every generator that training draws from, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_block(module: nn.Module) -> bool:
    """Whether ``module`` has parts and is only ever called as a whole: no list, and no stage, which holds a list of
    blocks and of which dense tasks call the blocks and the downsampler one by one."""
    parts = list(module.children())
    lists = [part for part in parts if isinstance(part, LISTS)]
    stage = any(True for each in lists for element in each for _ in element.children())
    return bool(parts) and not isinstance(module, LISTS) and not stage


def shard(model: nn.Module, unit: int) -> None:
    """Divides the parameters of ``model``, in place, among the processes (PyTorch's FSDP2): each element of a list or
    sequence that is a block and has ``unit`` parameters or more, the innermost first, is gathered by itself where it
    is used; what remains, with the whole."""
    taken: set[nn.Parameter] = set()
    for module in reversed(list(model.modules())):  # children before their parents
        if isinstance(module, LISTS):
            for element in module:
                mine = [p for p in element.parameters() if p not in taken]
                if _is_block(element) and sum(p.numel() for p in mine) >= unit:
                    fully_shard(element)
                    taken.update(element.parameters())
    fully_shard(model)


def whole(tensor: Any) -> Any:
    """What of a state is divided among the processes, put together on each of them; anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's part of ``tensor``, divided as ``own`` is; all of it where ``own`` is not divided."""
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


class Trainer:
    """Trains ``model`` and keeps RUN/last, RUN/best, metrics.csv and the TensorBoard log.

    Args:
        run: the run folder.
        task: what is trained (`Task`).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        *,
        run: Path,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        train: TrainConfig,
        tensorboard: bool = True,
        console: Console,
    ):
        self.accelerator, self.run_folder, self.config = accelerator, run, train
        self.task, self.data, self.console = task, task.data, console
        self.main, self.tensorboard = accelerator.is_main_process, tensorboard
        self.clip_grad = optim.clip_grad
        # updates in an epoch
        self.steps = train.steps_per_epoch or self.data.train.batches // train.grad_accum_steps
        if self.steps == 0:
            raise ConfigError(
                f"an epoch has {self.data.train.batches} batches, fewer than "
                f"train.grad_accum_steps={train.grad_accum_steps}"
            )
        self.images_per_step = train.batch_size * train.grad_accum_steps * accelerator.num_processes
        if accelerator.num_processes > 1:
            self.data.val = Together(self.data.val, accelerator)
        model = task.model
        if train.channels_last:
            model.to(memory_format=torch.channels_last)
        if train.parallel == "fsdp":
            self._check_divisible(train)
        self.divided = train.parallel == "fsdp" and accelerator.num_processes > 1
        # What is saved and looked at: with FSDP a whole model beside the divided one, brought up to date when needed.
        self.raw = deepcopy(model).to(accelerator.device) if self.divided else model
        self.ema = None
        averaged = deepcopy(model) if self.divided and train.ema_decay else None
        if self.divided:
            shard(model.to(accelerator.device), train.fsdp_min_num_params)
        optimizer = create_optimizer(model, optim, self.images_per_step)
        self.scheduler, self.epochs = create_schedule(optimizer, schedule, self.steps)
        if self.divided:
            self.model, self.optimizer = model, accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
            self.raw = accelerator.unwrap_model(self.model)
        self.forward = torch.compile(self.model) if train.compile else self.model
        if train.ema_decay:
            self.ema = ModelEmaV3(averaged or self.raw, decay=train.ema_decay, use_warmup=train.ema_warmup)
            if self.divided:
                shard(self.ema.module.to(accelerator.device), train.fsdp_min_num_params)
        self.state = State()
        self._failure: Exception | None = None
        self._batch: Any = None
        # Looking at the loss waits for the device, so on an accelerator it is done only now and then.
        self.look_every = 1 if accelerator.device.type == "cpu" else LOOK_EVERY

    @staticmethod
    def _check_divisible(train: TrainConfig) -> None:
        if train.amp == "fp16":
            raise ConfigError("train.parallel=fsdp with train.amp=fp16: only whole gradients are scaled; use bf16")
        if train.channels_last:
            raise ConfigError("train.parallel=fsdp with train.channels_last: FSDP divides contiguous weights only")

    @property
    def trained(self) -> nn.Module:
        """The model whose parameters are trained, without what wraps it."""
        return self.model if self.divided else self.raw

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one when averaging is on. With FSDP as it was when
        `gather` was last called."""
        return self.ema.module if self.ema is not None and not self.divided else self.raw

    def gather(self) -> None:
        """Brings `evaluated` up to date; every process must come here."""
        if self.divided:
            source = self.ema.module if self.ema is not None else self.model
            self.raw.load_state_dict({name: whole(tensor) for name, tensor in source.state_dict().items()})

    def _load(self, module: nn.Module, path: Path) -> None:
        """Loads a whole model's file into ``module``, which may be divided."""
        if not self.divided:
            checkpoint.load_exact(module, path)
            return
        checkpoint.load_exact(self.raw, path)  # which checks names and shapes
        found = self.raw.state_dict()
        with torch.no_grad():
            for name, own in module.state_dict().items():
                own.copy_(part_like(found[name], own))

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state in the form of one for a whole model, on the main process."""
        saved = self.optimizer.state_dict()
        if not self.divided:
            return saved
        state = {}
        for number, values in saved["state"].items():
            full = {name: whole(value) for name, value in values.items()}
            if self.main:
                state[number] = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in full.items()}
        return saved | {"state": state}

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        if self.divided:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            for number, values in saved["state"].items():
                own = parameters[number]
                saved["state"][number] = {
                    name: part_like(v, own) if isinstance(v, Tensor) and v.shape == own.shape else v
                    for name, v in values.items()
                }
        self.optimizer.load_state_dict(saved)

    @property
    def shape(self) -> dict[str, int]:
        """What makes an update and a pass over the data, which must not change between a run and its continuation."""
        return {
            "updates per epoch": self.steps,
            "images per update": self.images_per_step,
            "images per pass": self.data.train.batches * self.config.batch_size * self.accelerator.num_processes,
        }

    def resume(self) -> bool:
        """Takes up the newest undamaged checkpoint, RUN/last or one before it; False when there is none. Nothing is
        changed unless all of it can be read and fits.

        With another number of processes it goes on at the same images, the update being of as many: each update is a
        run of the epoch's order, whichever way it is divided. What is drawn at random is drawn anew then.

        Raises:
            CheckpointError: unreadable, all damaged, or of another model or set-up.
        """
        folder = self._undamaged()
        if folder is None:
            return False
        saved = failure = None
        try:
            saved = checkpoint.read_trainer(folder)
            self._check_continues(folder, saved)
            if self.ema is not None:
                self._load(self.ema.module, folder / checkpoint.WEIGHTS)
            self._load(self.trained, folder / (checkpoint.RAW if self.ema is not None else checkpoint.WEIGHTS))
        except checkpoint.CheckpointError as error:
            failure = error
        raise_together(self.accelerator, failure)
        self._load_optimizer(saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.state = state = State(**saved["state"])
        if len(saved["random"]) == world:
            state.loss_sum, state.loss_count = saved["losses"][rank]
            _set_random_state(saved["random"][rank])
        else:
            updates = state.epoch * self.steps + state.step
            set_seed((self.task.identity["seed"] + 1_000_003 * updates) % 2**32, device_specific=True)
            if self.main:
                state.loss_sum, state.loss_count = (sum(values) for values in zip(*saved["losses"], strict=True))
        self.gather()
        with raised_by_all(self.accelerator):
            if self.main:
                write_csv(self.run_folder / "metrics.csv", state.history)  # a kill may have come before it
                self.data.bad.read(self.run_folder / "bad_samples.csv")
                self._agree_on_best()
        if self.accelerator.num_processes > 1:
            state.best = broadcast_object_list([state.best])[0]
        return True

    def _agree_on_best(self) -> None:
        """Makes RUN/best and the state one: a kill may have come before the first was written, or an older checkpoint
        was taken and it is of a later epoch, whose weights are no more this run's."""
        state, folder = self.state, checkpoint.newest(self.run_folder / "best")
        if state.best is None:
            return
        if state.step == 0 and state.best["epoch"] == state.epoch:
            self._save_best()
            return
        held = checkpoint.read_epoch(folder) if folder is not None else None
        if folder is not None and held in (None, state.best["epoch"]):  # None: an earlier version wrote it
            return
        now = state.step == 0 and state.history[-1][self.task.monitor] is not None
        there = f"holds epoch {held}" if folder is not None else "is gone"
        self.console.print(
            f"[yellow]warning:[/] {escape(str(self.run_folder / 'best'))} {there}, where the best up to here is epoch "
            f"{state.best['epoch']}; {f'epoch {state.epoch}' if now else 'the next one that is evaluated'} takes its "
            "place",
            highlight=False,
            soft_wrap=True,
        )
        state.best = state.history[-1] if now else None
        if now:
            self._save_best()

    def _undamaged(self) -> Path | None:
        """The newest checkpoint whose files are as they were written; newer ones are put aside with a warning."""
        found, failure = [None], None
        if self.main:
            damaged = {}
            for folder in checkpoint.generations(self.run_folder / "last"):
                try:
                    checkpoint.verify(folder)
                except checkpoint.DamagedError as error:
                    damaged[folder] = error
                    continue
                found = [folder]
                break
            if damaged and found == [None]:
                failure = checkpoint.CheckpointError("; ".join(map(str, damaged.values())))
            for folder, error in damaged.items() if failure is None else ():
                aside = folder.with_name(f"{folder.name}.damaged")
                try:
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)  # so that it takes no place among those that are kept
                except OSError as refused:
                    failure = checkpoint.CheckpointError(f"{error}; it can't be put aside: {refused}")
                    break
                self.console.print(
                    f"[yellow]warning:[/] {escape(str(error))}; going on from {found[0]}, put it aside as {aside}",
                    highlight=False,
                    soft_wrap=True,
                )
        raise_together(self.accelerator, failure)
        return broadcast_object_list(found)[0] if self.accelerator.num_processes > 1 else found[0]

    def _check_continues(self, folder: Path, saved: dict[str, Any]) -> None:
        for key, value in self.task.identity.items():
            earlier = saved["identity"].get(key)
            if key in ("model", "evaluation", "augmentation") and str(earlier).startswith("{"):
                earlier = json.dumps(_renamed(key, json.loads(earlier), json.loads(value)), sort_keys=True)
            if earlier != value:
                raise checkpoint.CheckpointError(
                    f"{folder} belongs to another run: {key} was {earlier!r}, is now {value!r}"
                )
        was = saved["shape"]
        for key, value in self.shape.items():
            # where an epoch is one pass, the images that fill no update at its end may be others
            if was[key] == value or (key == "images per pass" and self.config.steps_per_epoch is None):
                continue
            then, now = len(saved["random"]), self.accelerator.num_processes
            text = f"{folder}: {key} were {was[key]}, are now {value}"
            if then != now:
                forward = self.config.batch_size * now
                text += f", with {now} process(es) instead of {then}"
                if key != "images per pass" and was["images per update"] % forward == 0:
                    text += f"; train.grad_accum_steps={was['images per update'] // forward} keeps what an update is"
            raise checkpoint.CheckpointError(text)

    def fit(self, track: Callable[[dict[str, float], int], None] | None = None) -> State:
        """Runs to the end.

        Args:
            track: is given the figures of each epoch and its number, on the main process; of a run that goes on, those
                of the epochs before it first.

        Raises:
            Interrupted: after a signal; everything is saved.
            NonFiniteLoss: RUN/last and RUN/best are as they were before the epoch.
        """
        state = self.state
        self.track, log = track, None
        with raised_by_all(self.accelerator):
            if self.main and self.tensorboard:  # whose last row is missing where a kill came before it was logged
                log = SummaryWriter(str(self.run_folder / "tensorboard"), purge_step=max(state.epoch, 1))
            for row in state.history if self.main else ():
                self._record(row, log if row["epoch"] == state.epoch else None)
        with self.watching():
            try:
                while state.epoch < self.epochs:
                    self._epoch(log)
            except Interrupted:
                if state.step:  # else it came at the end of an epoch, which is saved already
                    self._save_last()
                raise
            finally:
                if log is not None:
                    log.close()
        return state

    def train_epoch(self) -> None:
        """The updates of one epoch and nothing else, within `watching`: for measuring their speed."""
        self._mark = time.perf_counter()
        self._train()
        self.state.epoch, self.state.step = self.state.epoch + 1, 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it signals are remembered, and the bar shows how far the run is."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        bar = Progress(
            *columns,
            console=self.console,
            disable=not self.main,
            # a thread draws it, at the cost of the updates; where it goes to a file it is drawn at the end only
            auto_refresh=self.console.is_terminal or self.console.is_jupyter,
            refresh_per_second=1 / BAR_SECONDS,
        )
        with StopSignals() as self.signals, bar:
            done = self.state.epoch * self.steps + self.state.step
            self.bar, self.bar_task = bar, bar.add_task("", total=self.epochs * self.steps, completed=done, note="")
            yield

    def _tick(self) -> float:
        """Books the time since it was asked last."""
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self.state.seconds += passed
        return passed

    def _epoch(self, log: SummaryWriter | None) -> None:
        state = self.state
        self.bar.update(self.bar_task, description=f"epoch {state.epoch + 1}/{self.epochs}")
        self._mark = time.perf_counter()
        try:
            self._train()
            training = state.epoch_seconds
            due = (state.epoch + 1) % self.config.eval_interval == 0 or state.epoch + 1 == self.epochs
            metrics = self._evaluate() if due else {}
        except Interrupted:
            self._tick()
            raise
        self._tick()

        sums = torch.tensor([state.loss_sum, state.loss_count], device=self.accelerator.device)
        total, count = reduce(sums, "sum").tolist()
        row = {
            "epoch": state.epoch + 1,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": total / count,
            **{name: metrics.get(name) for name in self.task.metrics},
            "grad_norm": state.norm_sum / state.norm_count if state.norm_count else None,
            "images_per_second": self.steps * self.images_per_step / training,
            "data_wait": state.wait_seconds / training,
            "memory_mib": _peak_memory(self.accelerator.device) / 2**20,
            "seconds": state.seconds,
        }
        state.history.append(row)
        monitor = self.task.monitor
        best = due and (state.best is None or row[monitor] > state.best[monitor])
        if best:
            state.best = row
        state.epoch, state.step = state.epoch + 1, 0
        state.loss_sum, state.loss_count, state.epoch_seconds = 0.0, 0, 0.0
        state.norm_sum, state.norm_count, state.wait_seconds = 0.0, 0, 0.0
        self._save_last(best)
        with raised_by_all(self.accelerator):
            if self.main:
                self._log(row, log, due, best)
            if self.main and due:
                self.task.on_epoch(self.run_folder, self.evaluated, state.epoch)
        if self._asked_to_stop() and state.epoch < self.epochs:
            raise self.signals.stop()

    def _train(self) -> None:
        """The rest of the epoch's updates."""
        state, accumulate = self.state, self.config.grad_accum_steps
        if state.step == self.steps:  # it was stopped in the evaluation
            return
        self.model.train()
        losses: list[Tensor] = []  # since the last look, of each pass
        norms: list[Tensor] = []
        batches = self._batches()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # accelerate's own looks for packages at each update; it is needed where a gradient is scaled
        optimizer = self.optimizer if self.accelerator.scaler is not None else self.optimizer.optimizer
        batch = self._first(batches)
        began, first = time.perf_counter(), state.step
        looked, looked_at, drawn, pace = began, first, 0.0, 1
        while state.step < self.steps:
            for part in range(accumulate):
                if batch is None:
                    batch = self._next(batches)
                last = part + 1 == accumulate
                with self._no_sync(last):
                    with self.accelerator.autocast():
                        loss = self.task.train_step(self.forward, batch, state.epoch)
                    self._backward(loss if accumulate == 1 else loss / accumulate)
                batch = None
                losses.append(loss.detach())
            ends = state.step + 1 == self.steps
            interval = self.config.save_interval
            saves = interval is not None and (state.step + 1) % interval == 0 and not ends
            looks = state.step + 1 >= looked_at + pace or ends or saves
            # an unclipped gradient need not be measured at each update
            norm = self._clip(parameters, (state.step + 1) % NORM_EVERY == 0 or ends)
            if norm is not None:
                norms.append(norm)
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            state.loss_count += accumulate
            updates = state.epoch * self.steps + state.step
            self.scheduler.step_update(updates)
            if self.ema is not None:
                self.ema.update(self.trained, step=updates)
            stop = False
            if looks:
                values, sizes = _numbers(losses), _numbers(norms)  # which waits for the device
                now = time.perf_counter()
                bad = [looked_at + i // accumulate for i, value in enumerate(values) if not math.isfinite(value)]
                stop, pace = self._look(bad, values[-1], (now - looked) / (state.step - looked_at))
                stop = stop and not ends
                for (
                    value
                ) in values:  # one by one, so that the sum of a run that was stopped is the same to the last bit
                    state.loss_sum += value
                for size in filter(math.isfinite, sizes):  # with fp16 that of a step that is skipped is not
                    state.norm_sum, state.norm_count = state.norm_sum + size, state.norm_count + 1
                if now - drawn >= BAR_SECONDS or stop or saves or ends:
                    speed = (state.step - first) * self.images_per_step / (now - began)
                    note = f"loss {values[-1]:.3f}  {speed:,.0f} img/s"
                    self.bar.update(self.bar_task, completed=updates, note=note)
                    drawn = now
            if stop or saves or ends:
                state.epoch_seconds += self._tick()
            if stop:
                raise self.signals.stop()
            if saves:
                self._save_last()
            if looks:
                looked, looked_at = time.perf_counter(), state.step
                losses.clear()
                norms.clear()
        batches.close()
        self._batch = None

    def _backward(self, loss: Tensor) -> None:
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _no_sync(self, last: bool) -> Any:
        """Whether the processes' gradients are added up in the backward pass to come: only in an update's last."""
        if self.divided:
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def _clip(self, parameters: list[nn.Parameter], asked: bool) -> Tensor | None:
        """Clips the gradient and answers its norm before that; without clipping only where ``asked``."""
        if self.clip_grad is None and not asked:
            return None
        if self.divided:
            return whole(nn.utils.clip_grad_norm_(parameters, self.clip_grad or float("inf")))
        if self.clip_grad is not None:
            return self.accelerator.clip_grad_norm_(parameters, self.clip_grad)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        scaler = self.accelerator.scaler
        return norm if scaler is None else norm / scaler.get_scale()

    def _first(self, batches: Iterator[Any]) -> Any:
        """The first batch, once every process has one."""
        batch = failure = None
        try:
            batch = self._next(batches)
        except READING as error:
            failure = error
        raise_together(self.accelerator, failure)
        return batch

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch. An error on one of several processes is kept for `_look`; until then the last batch does."""
        start = time.perf_counter()
        try:
            if self._failure is None:
                self._batch = next(batches)
        except StopIteration:
            raise AssertionError("a loader ended before its last batch") from None
        except READING as error:
            if self.accelerator.num_processes == 1 or self._batch is None:
                raise
            self._failure = error
        self.state.wait_seconds += time.perf_counter() - start
        return self._batch

    def _look(self, bad: list[int], value: float, seconds: float) -> tuple[bool, int]:
        """Whether to stop, and in how many updates to look again, after all processes have looked at each other.

        Args:
            bad: the updates of this epoch with a loss that is not finite, since the last look.
            value: the newest loss.
            seconds: what an update took.

        Raises:
            NonFiniteLoss, or what kept a process from reading its data.
        """
        pace = max(1, min(self.look_every, int(LOOK_SECONDS / max(seconds, 1e-6))))
        flags = [min(bad, default=self.steps), -int(bool(self.signals.number)), -int(self._failure is not None), pace]
        if self.accelerator.num_processes > 1:
            together = self.accelerator.gather(torch.tensor([flags], device=self.accelerator.device))
            flags = together.amin(0).tolist()
        first_bad, stop, failed, pace = flags
        if failed:
            raise_together(self.accelerator, self._failure)
        if first_bad < self.steps:
            kept = checkpoint.newest(self.run_folder / "last")
            when = f"end of epoch {self.state.epoch}" if self.config.save_interval is None else "from before"
            hold = f"{kept} ({when}) is intact" if kept else "nothing was saved yet"
            raise NonFiniteLoss(
                f"the loss became {value} at epoch {self.state.epoch + 1}, step {first_bad + 1} of {self.steps}; "
                f"{hold}. A lower optim.lr, optim.clip_grad, or train.amp=no may help"
            )
        return bool(stop), pace

    def _batches(self) -> Iterator[Any]:
        """Training batches from where the run stands: an epoch's own pass over the data, or, with ``steps_per_epoch``,
        one pass after the other whatever the epoch."""
        state, accumulate = self.state, self.config.grad_accum_steps
        if self.config.steps_per_epoch is None:
            yield from self.data.train.epoch(state.epoch, state.step * accumulate)
            return
        number, start = divmod((state.epoch * self.steps + state.step) * accumulate, self.data.train.batches)
        while True:
            yield from self.data.train.epoch(number, start)
            number, start = number + 1, 0

    def _asked_to_stop(self) -> bool:
        """Whether any process was signalled; asked by all of them at the same update."""
        if self.accelerator.num_processes == 1:
            return bool(self.signals.number)
        flag = torch.tensor([float(bool(self.signals.number))], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).max())

    def _evaluate(self) -> Metrics:
        def on_batch(_: int) -> None:
            if self.signals.number and self.accelerator.num_processes == 1:  # others may be inside a collective
                raise self.signals.stop()

        self.bar.update(self.bar_task, note="evaluating")
        self.gather()
        if self.accelerator.num_processes > 1:
            for buffer in self.evaluated.buffers():  # what every process evaluates is what the first one saves
                buffer.copy_(broadcast(buffer.data))
        return self.task.evaluate(self.evaluated, on_batch)

    def _save_last(self, best: bool = False) -> None:
        """Writes RUN/last, and RUN/best after it where the epoch was the ``best``."""
        state = self.state
        randoms = gather_object([_random_state()])
        losses = gather_object([(state.loss_sum, state.loss_count)])
        found = gather_object([self.data.bad.names])
        self.gather()
        trained = {name: whole(t) for name, t in self.trained.state_dict().items()} if self.ema is not None else {}
        optimizer = self._optimizer_state()
        with raised_by_all(self.accelerator):
            if not self.main:
                return
            for names in found:
                self.data.bad.merge(names)
            self.data.bad.write(self.run_folder / "bad_samples.csv")
            plain = {key: value for key, value in vars(state).items() if key not in ("loss_sum", "loss_count")}
            saved = {
                "format": 1,
                "state": plain,
                "losses": losses,
                "identity": self.task.identity,
                "shape": self.shape,
                "optimizer": optimizer,
                "scheduler": {"updates": state.epoch * self.steps + state.step},  # the rate is a function of it
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "random": randoms,
            }

            def fill(folder: Path) -> None:
                self.task.save_weights(folder, self.evaluated)
                if self.ema is not None:
                    checkpoint.save_raw(folder, trained)
                checkpoint.save_trainer(folder, saved)
                checkpoint.seal(folder)

            checkpoint.write_folder(self.run_folder / "last", fill, self.config.save_total_limit)
            if best:
                self._save_best()
            write_csv(self.run_folder / "metrics.csv", state.history)

    def _save_best(self) -> None:
        epoch, weights = self.state.best["epoch"], self.evaluated

        def fill(folder: Path) -> None:
            self.task.save_weights(folder, weights)
            checkpoint.write_epoch(folder, epoch)

        checkpoint.write_folder(self.run_folder / "best", fill)

    def _record(self, row: dict[str, Any], log: SummaryWriter | None) -> None:
        """Sends the figures of an epoch where they are kept beside metrics.csv."""
        values = {key: value for key, value in row.items() if key not in ("epoch", "seconds") and value is not None}
        if log is not None:
            for key, value in values.items():
                log.add_scalar(key, value, row["epoch"])
            log.flush()
        if self.track is not None:
            self.track(values, row["epoch"])

    def _log(self, row: dict[str, Any], log: SummaryWriter | None, due: bool, best: bool) -> None:
        self._record(row, log)
        text = f"epoch {row['epoch']:>3}/{self.epochs}  loss {row['train_loss']:.4f}"
        if due:
            text += f"  held out: {self.task.headline(row)}{' *' if best else '  '}"
        self.console.print(
            f"{text}  {row['images_per_second']:,.0f} img/s  {row['seconds']:,.0f} s", highlight=False, soft_wrap=True
        )


def _numbers(scalars: list[Tensor]) -> list[float]:
    return torch.stack(scalars).tolist() if scalars else []


def _peak_memory(device: torch.device) -> int:
    """Bytes at the highest: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows anew, so that a resumed run leaves neither gaps nor doubles. None becomes an empty field."""
    if not rows:
        return
    temporary = Path(f"{path}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
