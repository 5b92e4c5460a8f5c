"""The training loop, for any task.

An update is ``train.grad_accum_steps`` forward passes of every process; the learning rate is set per update. A run can
be stopped and resumed at any update (`resume`).
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, reduce
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..configs.schema import ConfigError
from ..errors import Interrupted, RunError
from . import checkpoint
from .distributed import (
    EvaluationLoader,
    TrainingBatches,
    any_process,
    check_sharding,
    full,
    full_state_dict,
    gradient_sync,
    load_full_state_dict,
    raise_together,
    raised_by_all,
    shard,
)
from .logging import Logger
from .optim import create_optimizer, create_schedule
from .resume import State, save
from .signals import StopSignals

if TYPE_CHECKING:
    from .task import Row, Task

NORM_INTERVAL = 20  # updates between two measurements of the norm of a gradient that is not clipped
# Reading the loss waits for the device, so it is read every 20 updates or two seconds, whichever is shorter: a run must
# still react to signals in time.
LOOK_INTERVAL = {"cpu": 1}
LOOK_SECONDS = 2.0


class NonFiniteLoss(RunError):
    """The loss became NaN or infinite; the message names epoch and step."""


class Stopwatch:
    """`lap` returns the seconds since its last call."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()

    def lap(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before


@dataclass
class Pending:
    """Losses and gradient norms still on the device, from update ``start`` on."""

    start: int
    watch: Stopwatch = field(default_factory=Stopwatch)
    losses: list[Tensor] = field(default_factory=list)  # of each forward pass
    norms: list[Tensor] = field(default_factory=list)


class Trainer:
    """Trains a task's model and writes RUN/last, RUN/best and the logs.

    Args:
        task: its model is on the CPU.

    Attributes:
        model: the training model, wrapped by DDP and compiled as the recipe asks.
        model_without_ddp: the task's module, with the trained parameters; sharded under FSDP.
        eval_model: the unsharded module that is evaluated and saved, with averaged weights if averaging is on. Under
            FSDP it is a copy, updated by `sync_eval_model`.
        steps: updates per epoch.
        epochs: of the run, including the cooldown.
    """

    def __init__(self, config: Any, task: Task, accelerator: Accelerator, console: Console):
        self.config, self.task, self.accelerator = config, task, accelerator
        train, batches = config.train, task.data.train.batches
        self.steps = train.steps_per_epoch or batches // train.grad_accum_steps
        if self.steps == 0:
            raise ConfigError(
                f"an epoch has {batches} batches, fewer than train.grad_accum_steps={train.grad_accum_steps}"
            )
        if accelerator.num_processes > 1:
            task.data.val = EvaluationLoader(task.data.val, accelerator)
        self._wrap_model()
        self.optimizer = create_optimizer(self.model_without_ddp, config.optim, self.images_per_step)
        self.scheduler, self.epochs = create_schedule(self.optimizer, config.schedule, self.steps)
        self.state, self.signals, self.watch = State(), StopSignals(), Stopwatch()
        self.logger = Logger(config, accelerator, console)

    def _wrap_model(self) -> None:
        train, device = self.config.train, self.accelerator.device
        self.model_without_ddp = model = self.task.model
        if train.channels_last:
            model.to(memory_format=torch.channels_last)
        if train.parallel == "fsdp":
            check_sharding(train)
        sharded = train.parallel == "fsdp" and self.accelerator.num_processes > 1
        self.model: Any = model.to(device) if sharded else self.accelerator.prepare(model)
        self.eval_model = deepcopy(model) if sharded else model
        self.ema = ModelEmaV3(model, train.ema_decay, use_warmup=train.ema_warmup) if train.ema_decay else None
        if sharded:
            shard(model, train.fsdp_min_num_params)
        if self.ema is not None and sharded:
            shard(self.ema.module, train.fsdp_min_num_params)
        elif self.ema is not None:
            self.eval_model = self.ema.module
        if train.compile:
            self.model = torch.compile(self.model)

    @property
    def sharded(self) -> bool:
        return isinstance(self.model_without_ddp, FSDPModule)

    @property
    def run(self) -> Path:
        return Path(self.config.output)

    @property
    def images_per_step(self) -> int:
        """Images per update, over all processes."""
        return self.config.train.batch_size * self.config.train.grad_accum_steps * self.accelerator.num_processes

    @property
    def updates(self) -> int:
        """Number of updates since the run began."""
        return self.state.epoch * self.steps + self.state.step

    def sync_eval_model(self) -> None:
        """Copies sharded weights into `eval_model`; every process must call this."""
        if self.sharded:
            source = self.ema.module if self.ema is not None else self.model_without_ddp
            load_full_state_dict(self.eval_model, full_state_dict(source))

    # ---- the run

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done, or ``train.patience`` evaluations brought no better score."""
        state, patience = self.state, self.config.train.patience
        if state.epoch >= self.epochs or state.best is None or patience is None or state.step:
            return state.epoch >= self.epochs
        scored = [row for row in state.history if row[self.task.monitor] is not None]
        return sum(row["epoch"] > state.best["epoch"] for row in scored) >= patience

    def fit(self) -> State:
        """Trains to the last epoch.

        Raises:
            Interrupted: after a signal; the state is saved.
            NonFiniteLoss: RUN/last and RUN/best stay as they were before the epoch.
        """
        state = self.state
        with self.watching():
            try:
                while not self.finished:
                    self._run_epoch()
            except Interrupted:
                if state.step:  # else an epoch has just ended and is saved already
                    save(self)
                raise
        return state

    def watching(self) -> ExitStack:
        """A context that records signals and keeps the logs open."""
        with ExitStack() as stack:
            stack.enter_context(self.logger.start(self.state.history, self.updates, self.epochs * self.steps))
            stack.enter_context(self.signals)
            return stack.pop_all()

    def _run_epoch(self) -> None:
        state, metrics = self.state, {}
        self.logger.describe(f"epoch {state.epoch + 1}/{self.epochs}")
        self.train_epoch()
        is_due = (state.epoch + 1) % self.config.train.eval_interval == 0 or state.epoch + 1 == self.epochs
        try:
            metrics = self._evaluate() if is_due else {}
        finally:
            state.seconds += self.watch.lap()
        row = self._row(metrics)
        state.history.append(row)
        is_best = is_due and (state.best is None or self.task.is_better(row, state.best))
        if is_best:
            state.best = row
        state.start_epoch(state.epoch + 1)
        save(self, is_best)
        with raised_by_all(self.accelerator):
            if self.accelerator.is_main_process:
                self.logger.log(state.history)
                self.logger.print(self._line(row, is_due, is_best))
                if is_due:
                    self.task.on_epoch(self.run, self.eval_model, state.epoch)
        if any_process(self.accelerator, bool(self.signals)) and not self.finished:
            raise self.signals.stop()

    def _evaluate(self) -> dict[str, float]:
        def on_batch(_: int) -> None:
            if self.signals and self.accelerator.num_processes == 1:  # others may be inside a collective
                raise self.signals.stop()

        self.logger.describe(note="evaluating")
        self.sync_eval_model()
        if self.accelerator.num_processes > 1:
            for buffer in self.eval_model.buffers():  # all processes evaluate what the first one saves
                buffer.copy_(broadcast(buffer.data))
        return self.task.evaluate(self.eval_model, on_batch)

    def _row(self, metrics: dict[str, float]) -> Row:
        """The row of metrics.csv for the epoch that ends."""
        state, device = self.state, self.accelerator.device
        sums: Any = reduce(torch.tensor([state.loss_sum, state.loss_count], device=device), "sum")
        total, count = sums.tolist()
        return {
            "epoch": state.epoch + 1,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": total / count,
            **{name: metrics.get(name) for name in self.task.metrics},
            "grad_norm": state.norm_sum / state.norm_count if state.norm_count else None,
            "images_per_second": self.steps * self.images_per_step / state.epoch_seconds,
            "data_wait": state.wait_seconds / state.epoch_seconds,
            "memory_mib": _peak_memory(device) / 2**20,
            "seconds": state.seconds,
        }

    def _line(self, row: Row, is_due: bool, is_best: bool) -> str:
        text = f"epoch {row['epoch']:>3}/{self.epochs}  loss {row['train_loss']:.4f}"
        if is_due:
            text += f"  held out: {self.task.headline(row)}{' *' if is_best else '  '}"
        return f"{text}  {row['images_per_second']:,.0f} img/s  {row['seconds']:,.0f} s"

    # ---- an epoch

    def train_epoch(self) -> None:
        """Runs the remaining updates of the epoch.

        Raises:
            Interrupted: after a signal to any process.
            NonFiniteLoss: the loss became NaN or infinite on any process.
            OtherProcessError: another process could not read its data.
        """
        state, interval = self.state, self.config.train.save_interval
        self.watch.lap()
        if state.step == self.steps:  # the run was stopped during the evaluation
            return
        self.model.train()
        stream = self._stream()
        batches = TrainingBatches(stream, self.accelerator)
        pending, wait = Pending(state.step), 1
        began, first = time.perf_counter(), state.step
        while state.step < self.steps:
            self._update(batches, pending)
            ends = state.step == self.steps
            saves = interval is not None and state.step % interval == 0 and not ends
            if state.step < pending.start + wait and not (ends or saves):
                continue
            loss, stop, wait = self._look(pending, batches.failure)
            stop = stop and not ends
            speed = (state.step - first) * self.images_per_step / (time.perf_counter() - began)
            self.logger.progress(self.updates, loss, speed, now=stop or saves or ends)
            if stop or saves or ends:
                seconds = self.watch.lap()
                state.seconds, state.epoch_seconds = state.seconds + seconds, state.epoch_seconds + seconds
            if stop:
                raise self.signals.stop()
            if saves:
                save(self)
            pending = Pending(state.step)
        stream.close()

    def _stream(self) -> Generator[Any]:
        """The training batches that follow: the rest of the epoch's pass over the data or, with ``steps_per_epoch``,
        pass after pass independently of epochs."""
        passes, loader = self.config.train.grad_accum_steps, self.task.data.train
        if self.config.train.steps_per_epoch is None:
            yield from loader.epoch(self.state.epoch, self.state.step * passes)
            return
        number, start = divmod(self.updates * passes, loader.batches)
        while True:
            yield from loader.epoch(number, start)
            number, start = number + 1, 0

    def _update(self, batches: TrainingBatches, pending: Pending) -> None:
        """One update of the weights."""
        state, passes = self.state, self.config.train.grad_accum_steps
        for number, (batch, weights) in enumerate(weighted(batches, self)):
            with gradient_sync(self.accelerator, self.model, sync=number + 1 == passes):
                with self.accelerator.autocast():
                    loss = (self.task.train_step(self.model, batch, state.epoch) * weights).sum()
                self.accelerator.backward(loss / passes)
            pending.losses.append(loss.detach())
        state.step += 1
        state.loss_count += passes
        if self.config.optim.clip_grad is not None or state.step % NORM_INTERVAL == 0 or state.step == self.steps:
            pending.norms.append(self._clip_gradients())
        scaler = self.accelerator.scaler
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step_update(self.updates)
        if self.ema is not None:
            self.ema.update(self.model_without_ddp, step=self.updates)

    def _clip_gradients(self) -> Tensor:
        """Clips the gradient to ``optim.clip_grad``, if set, and returns its norm before that."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = full(nn.utils.get_total_norm([p.grad for p in parameters]))
        if self.config.optim.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_grad, norm)
        return norm

    def _look(self, pending: Pending, failure: Exception | None) -> tuple[float, bool, int]:
        """Waits for the device and synchronizes losses, signals and failures over the processes.

        Args:
            failure: an error of this process in reading its data.

        Returns:
            the newest loss, whether to stop, and the number of updates until the next look.
        """
        state, passes = self.state, self.config.train.grad_accum_steps
        losses, norms = (
            torch.stack(scalars).tolist() if scalars else [] for scalars in (pending.losses, pending.norms)
        )
        seconds = pending.watch.lap() / (state.step - pending.start)
        most = LOOK_INTERVAL.get(self.accelerator.device.type, 20)
        wait = max(1, min(most, int(LOOK_SECONDS / max(seconds, 1e-6))))
        bad = [pending.start + i // passes for i, value in enumerate(losses) if not math.isfinite(value)]
        flags = [min(bad, default=self.steps), -int(bool(self.signals)), -int(failure is not None), wait]
        gathered: Any = self.accelerator.gather(torch.tensor([flags], device=self.accelerator.device))
        first_bad, stop, failed, wait = gathered.amin(0).tolist()
        if failed:
            raise_together(self.accelerator, failure)
        if first_bad < self.steps:
            raise self._non_finite(first_bad, losses[-1])
        for value in losses:  # one by one: the sum of a resumed run must be bit-identical
            state.loss_sum += value
        for norm in filter(math.isfinite, norms):  # not finite in updates that fp16 skips
            state.norm_sum, state.norm_count = state.norm_sum + norm, state.norm_count + 1
        return losses[-1], bool(stop), wait

    def _non_finite(self, step: int, loss: float) -> NonFiniteLoss:
        kept = checkpoint.newest(self.run / "last")
        when = f"end of epoch {self.state.epoch}" if self.config.train.save_interval is None else "earlier"
        return NonFiniteLoss(
            f"the loss became {loss} at epoch {self.state.epoch + 1}, step {step + 1} of {self.steps}; "
            + (f"{kept} ({when}) is intact" if kept else "no checkpoint was saved yet")
            + ". Try a lower optim.lr, optim.clip_grad, or train.amp=no"
        )


def weighted(batches: TrainingBatches, trainer: Trainer) -> Iterator[tuple[Any, Tensor | float]]:
    """The batches of an update, with weights that make the mean of their losses the loss of one large batch. If the
    loss is a mean over pixels or objects (`Task.counts`), all batches are read before the first is used."""
    task, passes, processes = trainer.task, trainer.config.train.grad_accum_steps, trainer.accelerator.num_processes

    def read() -> Any:
        start = time.perf_counter()
        batch = next(batches)
        trainer.state.wait_seconds += time.perf_counter() - start
        return batch

    if not task.counts or passes * processes == 1:
        for _ in range(passes):
            yield read(), 1.0
        return
    ahead = [read() for _ in range(passes)]
    counts = torch.stack([task.normalizers(batch) for batch in ahead])
    total: Any = reduce(counts.sum(0), "sum")
    # the loss functions divide by at least 1, too
    weights = counts.clamp(min=1) / total.clamp(min=1) * (passes * processes)
    for number in range(passes):
        yield ahead.pop(0), weights[number]


def _peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
