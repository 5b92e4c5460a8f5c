"""The state of a run, and its checkpoints: RUN/last, earlier generations of it, and RUN/best.

A run resumes at the update where it was saved, bit for bit unless the loader's images depend on worker processes. With
another number of processes it resumes at the same image if the images per update are the same: an update is a slice of
the epoch's order, however it is split. Random generators are then reseeded.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed

from ..configs.schema import OLD_KEYS, ConfigError
from ..heads.legacy import migrate_arguments, migrate_inference
from . import checkpoint
from .checkpoint import CheckpointError, DamagedError
from .distributed import (
    full_optimizer_state,
    full_state_dict,
    load_full_optimizer_state,
    load_full_state_dict,
    raised_by_all,
)
from .logging import flat, write_csv

if TYPE_CHECKING:
    from .task import Row

Trainer = Any  # `trainer.Trainer`, whose module imports this one

OPTIONS = ("weight_decay", "betas", "eps", "momentum", "lr_scale")  # of optimizer groups, from the recipe
SHAPE_KEYS = "train.batch_size, train.grad_accum_steps, train.steps_per_epoch, data.limit, data.exclude, processes"


# Recipe keys that a resumed run may not change, by task; `ADJUSTABLE` are those of them that it may.
FIXED = {
    "": (
        *("task", "seed", "model.name", "model.kwargs", "model.frozen_stages", "optim.name", "optim.layer_decay"),
        *("data.in_chans", "data.mean", "data.std"),
    ),
    "classify": (
        *("model.num_classes", "data.kind", "data.val_fraction", "data.classes", "data.num_classes"),
        *("data.image_size", "data.interpolation", "data.crop_pct", "loss.*", "distill.*"),
    ),
    "detect": ("model.*", "data.classes", "data.min_size", "data.max_size", "augment.*", "eval.*"),
    "segment": (
        *("model.*", "data.kind", "data.classes", "data.reduce_zero_label", "data.values", "data.ignore_label"),
        *("data.antialias", "augment.*", "loss.*", "eval.*"),
    ),
    "upsample": ("model.*", "data.image_size", "loss.*"),
}
ADJUSTABLE = ("model.pretrained", "model.checkpoint", "model.segmenter", "model.sync_bn")


def is_fixed(task: str, key: str) -> bool:
    """Whether a resumed run may not change a recipe key."""
    patterns = (*FIXED[""], *FIXED[task])
    return key not in ADJUSTABLE and any(fnmatchcase(key, pattern) for pattern in patterns)


@dataclass
class State:
    """Progress of a run. ``step`` counts the updates done in epoch ``epoch`` (both from 0)."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0  # of training and evaluation, over all sessions
    loss_sum: float = 0.0  # of this process, in the epoch so far
    loss_count: int = 0
    norm_sum: float = 0.0  # of the measured gradient norms, in the epoch so far
    norm_count: int = 0
    epoch_seconds: float = 0.0  # of training, in the epoch so far
    wait_seconds: float = 0.0  # of these, waiting for the main process's loader
    best: Row | None = None  # the row of the best epoch
    history: list[Row] = field(default_factory=list)  # the rows of metrics.csv

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        self.loss_sum, self.loss_count, self.norm_sum, self.norm_count = 0.0, 0, 0.0, 0
        self.epoch_seconds = self.wait_seconds = 0.0


def random_state() -> dict[str, Any]:
    """The states of all random generators, as tensors and plain values."""
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _identity(trainer: Trainer) -> dict[str, Any]:
    """Settings that a resumed run must share with the checkpoint."""
    config = trainer.config
    run = {"seed": config.seed, "optim.name": config.optim.name, "averaging": config.train.ema_decay > 0}
    return trainer.task.identity | run


def _shape(trainer: Trainer) -> dict[str, int]:
    """Sizes of an update and of a pass over the data, which a resumed run must share, too."""
    per_forward = trainer.config.train.batch_size * trainer.accelerator.num_processes
    return {
        "updates per epoch": trainer.steps,
        "images per update": trainer.images_per_step,
        "images per pass": trainer.task.data.train.batches * per_forward,
    }


# ---- writing


def save(trainer: Trainer, best: bool = False) -> None:
    """Writes RUN/last and, after the ``best`` epoch, RUN/best. Every process must call this."""
    state, bad, scaler = trainer.state, trainer.task.data.bad, trainer.accelerator.scaler
    randoms = gather_object([random_state()])
    losses = gather_object([(state.loss_sum, state.loss_count)])
    found = gather_object([bad.names])
    trainer.sync_eval_model()
    trained = full_state_dict(trainer.model_without_ddp) if trainer.ema is not None else {}
    optimizer = full_optimizer_state(trainer.optimizer, keep=trainer.accelerator.is_main_process)
    with raised_by_all(trainer.accelerator):
        if not trainer.accelerator.is_main_process:
            return
        for names in found:
            bad.merge(names)
        bad.write(trainer.run / "bad_samples.csv")
        saved = {
            "format": 1,
            "state": {key: value for key, value in vars(state).items() if key not in ("loss_sum", "loss_count")},
            "losses": losses,
            "recipe": dict(flat(trainer.config)),
            "identity": _identity(trainer),
            "shape": _shape(trainer),
            "optimizer": optimizer,
            "scheduler": {"updates": trainer.updates},  # the learning rate is a function of it
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": randoms,
        }

        def fill(folder: Path) -> None:
            trainer.task.save_weights(folder, trainer.eval_model)
            if trainer.ema is not None:
                checkpoint.save_raw(folder, trained)
            checkpoint.save_trainer(folder, saved)
            checkpoint.seal(folder)

        checkpoint.write_folder(trainer.run / "last", fill, trainer.config.train.save_total_limit)
        if best:
            _save_best(trainer)


def _save_best(trainer: Trainer) -> None:
    def fill(folder: Path) -> None:
        trainer.task.save_weights(folder, trainer.eval_model)
        checkpoint.write_epoch(folder, trainer.state.best["epoch"])

    checkpoint.write_folder(trainer.run / "best", fill)


# ---- reading


def resume(trainer: Trainer) -> bool:
    """Restores the newest undamaged checkpoint; returns False if there is none. Every process must call this.

    Raises:
        CheckpointError: unreadable, all damaged, or of another model or set-up; nothing is changed.
    """
    accelerator = trainer.accelerator
    folder = _newest_undamaged(trainer)
    if folder is None:
        return False
    with raised_by_all(accelerator):
        saved = checkpoint.read_trainer(folder)
        _check_continues(trainer, folder, saved)
        trained, ema = trainer.model_without_ddp, trainer.ema
        raw = checkpoint.read_exact(trained, folder / (checkpoint.WEIGHTS if ema is None else checkpoint.RAW))
        if ema is not None:
            load_full_state_dict(ema.module, checkpoint.read_exact(ema.module, folder / checkpoint.WEIGHTS))
        load_full_state_dict(trained, raw)
    _load_optimizer(trainer, saved["optimizer"])
    if accelerator.scaler is not None and saved["scaler"] is not None:
        accelerator.scaler.load_state_dict(saved["scaler"])
    trainer.state = state = State(**saved["state"])
    for row in [*state.history, *([state.best] if state.best else [])]:
        row.update({name: row.get(name) for name in trainer.task.metrics})  # those of 0.1.0 have no held-out loss
    if trainer.updates:
        _set_rate(trainer)
    _restore_random_state(trainer, saved)
    trainer.sync_eval_model()
    with raised_by_all(accelerator):
        if accelerator.is_main_process:
            write_csv(trainer.run / "metrics.csv", trainer.state.history)  # it may be missing after a kill
            trainer.task.data.bad.read(trainer.run / "bad_samples.csv")
            _check_best(trainer)
    trainer.state.best = broadcast_object_list([trainer.state.best])[0]
    return True


def _load_optimizer(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Restores the optimizer's state, with the options of the recipe as it is now: PyTorch restores those, too."""
    options = [{key: group[key] for key in OPTIONS if key in group} for group in trainer.optimizer.param_groups]
    load_full_optimizer_state(trainer.optimizer, saved)
    for group, own in zip(trainer.optimizer.param_groups, options, strict=True):
        group.update(own)


def _set_rate(trainer: Trainer) -> None:
    """Sets the learning rate by the present recipe, which may have changed since the checkpoint was written."""

    def rate() -> float:
        return max(group["lr"] for group in trainer.optimizer.param_groups)

    before = rate()
    trainer.scheduler.step_update(trainer.updates)
    if rate() != before:
        trainer.logger.warn(f"the learning rate changes from {before:.3g} to {rate():.3g}")


def _restore_random_state(trainer: Trainer, saved: dict[str, Any]) -> None:
    state, accelerator = trainer.state, trainer.accelerator
    if len(saved["random"]) == accelerator.num_processes:
        state.loss_sum, state.loss_count = saved["losses"][accelerator.process_index]
        set_random_state(saved["random"][accelerator.process_index])
        return
    set_seed((trainer.config.seed + 1_000_003 * trainer.updates) % 2**32, device_specific=True)
    if accelerator.is_main_process:
        state.loss_sum, state.loss_count = (sum(values) for values in zip(*saved["losses"], strict=True))


def _newest_undamaged(trainer: Trainer) -> Path | None:
    """The newest checkpoint whose hashes match; damaged newer ones are moved aside with a warning."""
    found: list[Path | None] = [None]
    with raised_by_all(trainer.accelerator):
        damaged: dict[Path, DamagedError] = {}
        for folder in checkpoint.generations(trainer.run / "last") if trainer.accelerator.is_main_process else ():
            try:
                checkpoint.verify(folder)
            except DamagedError as error:
                damaged[folder] = error
                continue
            found = [folder]
            break
        if damaged and found == [None]:
            raise CheckpointError("; ".join(map(str, damaged.values())))
        for folder, error in damaged.items():
            aside = folder.with_name(f"{folder.name}.damaged")
            try:
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)  # so that it does not count for train.save_total_limit
            except OSError as refused:
                raise CheckpointError(f"{error}; it cannot be moved aside: {refused}") from refused
            trainer.logger.warn(f"{error}; resuming from {found[0]}, moved the damaged one to {aside}")
    return broadcast_object_list(found)[0]


def _renamed(key: str, earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A part of an earlier run's identity with the present names of arguments and recipe keys."""
    if key == "augmentation":
        names = {name: OLD_KEYS.get(f"augment.{name}", name).removeprefix("augment.") for name in earlier}
        return {name if name in now else names[name]: value for name, value in earlier.items()}
    return migrate_arguments(earlier) if key == "model" else migrate_inference(earlier)


def _check_continues(trainer: Trainer, folder: Path, saved: dict[str, Any]) -> None:
    epoch, step = saved["state"]["epoch"], saved["state"]["step"]
    if epoch + (step > 0) > trainer.epochs:
        done = f"{epoch} epochs" + (f" and {step} updates" if step else "")
        raise ConfigError(f"{folder} is already past epoch {trainer.epochs}, the last of this recipe: it has {done}")
    former, now = saved.get("recipe", {}), dict(flat(trainer.config))  # checkpoints of 0.1.0 have none
    changed = {key: (former[key], now[key]) for key in now if key in former and former[key] != now[key]}
    if refused := [key for key in changed if is_fixed(trainer.config.task, key)]:
        text = "; ".join("{} was {!r}, is now {!r}".format(key, *changed[key]) for key in refused)
        raise CheckpointError(f"{folder} belongs to another run: {text}")
    for key, value in _identity(trainer).items():
        earlier = saved["identity"].get(key)
        if key in ("model", "evaluation", "augmentation") and str(earlier).startswith("{"):
            earlier = json.dumps(_renamed(key, json.loads(earlier), json.loads(value)), sort_keys=True)
        if earlier != value:
            raise CheckpointError(f"{folder} belongs to another run: {key} was {earlier!r}, is now {value!r}")
    sizes = [
        [len(group["params"]) for group in groups]
        for groups in (saved["optimizer"]["param_groups"], trainer.optimizer.param_groups)
    ]
    if sizes[0] != sizes[1]:
        keys = [key for key in changed if key.startswith(("model.", "optim."))]
        why = "; ".join("{} was {!r}, is now {!r}".format(key, *changed[key]) for key in keys)
        raise CheckpointError(
            f"{folder}: the optimizer had groups of {sizes[0]} parameters, now has {sizes[1]}, "
            f"as {why or 'other parameters decay'}: start another run with model.checkpoint={folder}"
        )
    was = saved["shape"]
    for key, value in _shape(trainer).items():
        # if an epoch is one pass, the number of left-over images at its end may differ
        if was[key] == value or (key == "images per pass" and trainer.config.train.steps_per_epoch is None):
            continue
        then, now = len(saved["random"]), trainer.accelerator.num_processes
        text = f"{folder}: {key} were {was[key]}, are now {value} ({SHAPE_KEYS})"
        if then != now:
            forward = trainer.config.train.batch_size * now
            text += f", with {now} process(es) instead of {then}"
            if key != "images per pass" and was["images per update"] % forward == 0:
                text += f"; train.grad_accum_steps={was['images per update'] // forward} keeps the size of an update"
        raise CheckpointError(text)


def _check_best(trainer: Trainer) -> None:
    """Makes RUN/best and the state agree: the run may have been killed before RUN/best was written, or RUN/best is of a
    later epoch than the checkpoint."""
    state, folder = trainer.state, checkpoint.newest(trainer.run / "best")
    if state.best is None:
        return
    if state.step == 0 and state.best["epoch"] == state.epoch:
        _save_best(trainer)
        return
    held = checkpoint.read_epoch(folder) if folder is not None else None
    if folder is not None and held in (None, state.best["epoch"]):  # None: written by an earlier version
        return
    now = state.step == 0 and state.history[-1][trainer.task.monitor] is not None
    trainer.logger.warn(
        f"{trainer.run / 'best'} {f'holds epoch {held}' if folder is not None else 'is missing'}, but the best so far "
        f"is epoch {state.best['epoch']}; {f'epoch {state.epoch}' if now else 'the next evaluated epoch'} replaces it"
    )
    state.best = state.history[-1] if now else None
    if now:
        _save_best(trainer)
