"""The training loop, for any task: what a task brings is a step, an evaluation, and what its checkpoints hold.

One update is ``accumulate`` forward passes of every process. The learning rate is set per update. A run can be stopped
at any update: the state written then (weights, optimizer, scaler, random numbers, place in the epoch) goes on as if
nothing had happened, bit for bit where the loader's images do not depend on worker processes.
"""

import csv
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, reduce
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..configs.schema import ConfigError, OptimConfig, ScheduleConfig, TrainConfig
from . import checkpoint
from .data import Data

Metrics = dict[str, float]


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names epoch and step."""


class Interrupted(Exception):
    """A signal asked the run to stop; ``code`` is the exit status, 128 + the signal's number."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class StopSignals:
    """Remembers Ctrl-C and SIGTERM so that the loop can stop at an update; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.code = 0
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
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = 128 + number


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
    epoch_seconds: float = 0.0
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
        console: Console,
    ):
        self.accelerator, self.run_folder, self.config = accelerator, run, train
        self.task, self.data, self.console = task, task.data, console
        self.main = accelerator.is_main_process
        self.clip_grad = optim.clip_grad
        # updates in an epoch
        self.steps = train.steps_per_epoch or self.data.train.batches // train.accumulate
        if self.steps == 0:
            raise ConfigError(
                f"an epoch has {self.data.train.batches} batches, fewer than train.accumulate={train.accumulate}"
            )
        self.images_per_step = train.batch_size * train.accumulate * accelerator.num_processes
        optimizer = create_optimizer(task.model, optim, self.images_per_step)
        self.scheduler, self.epochs = create_schedule(optimizer, schedule, self.steps)
        self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        self.raw = accelerator.unwrap_model(self.model)
        self.forward = torch.compile(self.model) if train.compile else self.model
        self.ema = ModelEmaV3(self.raw, decay=train.ema_decay, use_warmup=train.ema_warmup) if train.ema_decay else None
        self.state = State()
        # Looking at the loss waits for the device, so on an accelerator it is done only now and then.
        self.check_every = 1 if accelerator.device.type == "cpu" else 20

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one when averaging is on."""
        return self.ema.module if self.ema is not None else self.raw

    @property
    def shape(self) -> dict[str, int]:
        """What makes an update and a pass over the data, which must not change between a run and its continuation."""
        return {
            "updates per epoch": self.steps,
            "processes": self.accelerator.num_processes,
            "images per update": self.images_per_step,
            "batches per pass": self.data.train.batches,
        }

    def resume(self) -> bool:
        """Takes up RUN/last; False when there is none. Nothing is changed unless all of it can be read and fits.

        Raises:
            CheckpointError: unreadable, or of another model or set-up.
        """
        folder = checkpoint.newest(self.run_folder / "last")
        if folder is None:
            return False
        saved = checkpoint.read_trainer(folder)
        for key, value in self.task.identity.items():
            if saved["identity"].get(key) != value:
                raise checkpoint.CheckpointError(
                    f"{folder} belongs to another run: {key} was {saved['identity'].get(key)!r}, is now {value!r}"
                )
        for key, value in self.shape.items():
            was = saved["shape"].get(key, value)  # earlier versions wrote the first two only
            if was != value:
                raise checkpoint.CheckpointError(f"{folder}: {key} were {was}, are now {value}")
        raw = folder / (checkpoint.RAW if self.ema is not None else checkpoint.WEIGHTS)
        if self.ema is not None:
            checkpoint.load_exact(self.ema.module, folder / checkpoint.WEIGHTS)
        checkpoint.load_exact(self.raw, raw)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        rank = self.accelerator.process_index
        self.state = State(**saved["state"])
        self.state.loss_sum, self.state.loss_count = saved["losses"][rank]
        _set_random_state(saved["random"][rank])
        return True

    def fit(self) -> State:
        """Runs to the end.

        Raises:
            Interrupted: after a signal; everything is saved.
            NonFiniteLoss: RUN/last and RUN/best are as they were before the epoch.
        """
        state = self.state
        log = SummaryWriter(str(self.run_folder / "tensorboard"), purge_step=state.epoch + 1) if self.main else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with StopSignals() as self.signals, Progress(*columns, console=self.console, disable=not self.main) as bar:
            done = state.epoch * self.steps + state.step
            self.bar, self.bar_task = bar, bar.add_task("", total=self.epochs * self.steps, completed=done, note="")
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

    def _epoch(self, log: SummaryWriter | None) -> None:
        state = self.state
        self.bar.update(self.bar_task, description=f"epoch {state.epoch + 1}/{self.epochs}")
        start = time.perf_counter()
        try:
            self._train()
            training = state.epoch_seconds + time.perf_counter() - start
            due = (state.epoch + 1) % self.config.eval_every == 0 or state.epoch + 1 == self.epochs
            metrics = self._evaluate() if due else {}
        except Interrupted:
            state.epoch_seconds += time.perf_counter() - start
            state.seconds += time.perf_counter() - start
            raise
        state.seconds += time.perf_counter() - start

        sums = torch.tensor([state.loss_sum, state.loss_count], device=self.accelerator.device)
        total, count = reduce(sums, "sum").tolist()
        row = {
            "epoch": state.epoch + 1,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": total / count,
            **{name: metrics.get(name) for name in self.task.metrics},
            "images_per_second": self.steps * self.images_per_step / training,
            "seconds": state.seconds,
        }
        state.history.append(row)
        monitor = self.task.monitor
        best = due and (state.best is None or row[monitor] > state.best[monitor])
        if best:
            state.best = row
        state.epoch, state.step = state.epoch + 1, 0
        state.loss_sum, state.loss_count, state.epoch_seconds = 0.0, 0, 0.0
        if best and self.main:
            weights = self.evaluated
            checkpoint.write_folder(self.run_folder / "best", lambda folder: self.task.save_weights(folder, weights))
        self._save_last()
        if self.main:
            self._log(row, log, due, best)
            if due:
                self.task.on_epoch(self.run_folder, self.evaluated, state.epoch)
        if self._asked_to_stop() and state.epoch < self.epochs:
            raise Interrupted(self.signals.code or 130)

    def _train(self) -> None:
        """The rest of the epoch's updates."""
        state, accumulate = self.state, self.config.accumulate
        self.model.train()
        device = self.accelerator.device
        loss_sum = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32)
        first_bad = torch.full((), -1, device=device)
        batches = self._batches()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        began, first = time.perf_counter(), state.step
        while state.step < self.steps:
            for part in range(accumulate):
                batch = next(batches)
                last = part + 1 == accumulate
                with nullcontext() if last else self.accelerator.no_sync(self.model):
                    with self.accelerator.autocast():
                        loss = self.task.train_step(self.forward, batch, state.epoch)
                    self.accelerator.backward(loss / accumulate)
                value = loss.detach()
                loss_sum += value
                first_bad = torch.where((first_bad < 0) & ~value.isfinite(), state.step, first_bad)
            if self.clip_grad is not None:
                self.accelerator.clip_grad_norm_(parameters, self.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            state.step += 1
            updates = state.epoch * self.steps + state.step
            self.scheduler.step_update(updates)
            if self.ema is not None:
                self.ema.update(self.raw, step=updates)
            stop = False
            if state.step % self.check_every == 0 or state.step == self.steps:
                self._check_finite(int(first_bad), float(value))
                speed = (state.step - first) * self.images_per_step / (time.perf_counter() - began)
                self.bar.update(self.bar_task, note=f"loss {float(value):.3f}  {speed:,.0f} img/s")
                stop = state.step < self.steps and self._asked_to_stop()
            self.bar.update(self.bar_task, completed=updates)
            if stop or state.step == self.steps:
                state.loss_sum += float(loss_sum)
                state.loss_count += (state.step - first) * accumulate
            if stop:
                raise Interrupted(self.signals.code or 130)
        batches.close()

    def _batches(self) -> Iterator[Any]:
        """Training batches from where the run stands: an epoch's own pass over the data, or, with ``steps_per_epoch``,
        one pass after the other whatever the epoch."""
        state, accumulate = self.state, self.config.accumulate
        if self.config.steps_per_epoch is None:
            yield from self.data.train.epoch(state.epoch, state.step * accumulate)
            return
        number, start = divmod((state.epoch * self.steps + state.step) * accumulate, self.data.train.batches)
        while True:
            yield from self.data.train.epoch(number, start)
            number, start = number + 1, 0

    def _check_finite(self, step: int, value: float) -> None:
        bad = torch.tensor([step if step >= 0 else self.steps], device=self.accelerator.device)
        bad = int(self.accelerator.gather(bad).min())
        if bad == self.steps:
            return
        kept = checkpoint.newest(self.run_folder / "last")
        hold = f"{kept} (end of epoch {self.state.epoch}) is intact" if kept else "no epoch was finished"
        raise NonFiniteLoss(
            f"the loss became {value} at epoch {self.state.epoch + 1}, step {bad + 1} of {self.steps}; {hold}. "
            "A lower optim.lr, optim.clip_grad, or train.amp=no may help"
        )

    def _asked_to_stop(self) -> bool:
        """Whether any process was signalled; asked by all of them at the same update."""
        if self.accelerator.num_processes == 1:
            return bool(self.signals.code)
        flag = torch.tensor([float(bool(self.signals.code))], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).max())

    def _evaluate(self) -> Metrics:
        def on_batch(_: int) -> None:
            if self.signals.code and self.accelerator.num_processes == 1:  # others may be inside a collective
                raise Interrupted(self.signals.code)

        self.bar.update(self.bar_task, note="evaluating")
        if self.accelerator.num_processes > 1:
            for buffer in self.evaluated.buffers():  # what every process evaluates is what the first one saves
                buffer.copy_(broadcast(buffer.data))
        return self.task.evaluate(self.evaluated, on_batch)

    def _save_last(self) -> None:
        state = self.state
        randoms = gather_object([_random_state()])
        losses = gather_object([(state.loss_sum, state.loss_count)])
        found = gather_object([self.data.bad.names])
        if not self.main:
            self.accelerator.wait_for_everyone()
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
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"updates": state.epoch * self.steps + state.step},  # the rate is a function of it
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "random": randoms,
        }

        def fill(folder: Path) -> None:
            self.task.save_weights(folder, self.evaluated)
            if self.ema is not None:
                checkpoint.save_raw(folder, self.raw)
            checkpoint.save_trainer(folder, saved)

        checkpoint.write_folder(self.run_folder / "last", fill)
        write_csv(self.run_folder / "metrics.csv", state.history)
        self.accelerator.wait_for_everyone()

    def _log(self, row: dict[str, Any], log: SummaryWriter, due: bool, best: bool) -> None:
        for key, value in row.items():
            if key not in ("epoch", "seconds") and value is not None:
                log.add_scalar(key, value, row["epoch"])
        log.flush()
        text = f"epoch {row['epoch']:>3}/{self.epochs}  loss {row['train_loss']:.4f}"
        if due:
            text += f"  held out: {self.task.headline(row)}{' *' if best else '  '}"
        self.console.print(
            f"{text}  {row['images_per_second']:,.0f} img/s  {row['seconds']:,.0f} s", highlight=False, soft_wrap=True
        )


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
