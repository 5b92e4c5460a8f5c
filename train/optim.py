"""timm's optimizers and learning-rate schedules, from a recipe."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from ..configs.schema import ConfigError, OptimConfig, ScheduleConfig


def create_optimizer(model: Any, config: OptimConfig, global_batch: int) -> torch.optim.Optimizer:
    """timm's optimizer ``config.name``; the learning rate scales linearly from ``lr_batch`` to the global batch.

    A model may group its parameters with ``parameter_groups(weight_decay, layer_decay, backbone_lr_ratio)``; else
    biases, norms and its ``no_weight_decay`` names are not decayed.

    Raises:
        ConfigError: an unknown name, or invalid arguments.
    """
    extra: dict[str, Any] = {"betas": tuple(config.betas)} if config.betas is not None else {}
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
        raise ConfigError(f"optim.name={config.name}: {error}") from error


def check_optim(config: OptimConfig) -> None:
    """Raises:
    ConfigError: timm does not have the optimizer.
    """
    try:
        get_optimizer_info(config.name.lower().removeprefix("lookahead_"))
    except ValueError as error:
        raise ConfigError(f"optim.name={config.name}: {error}") from None


def check_schedule(config: ScheduleConfig) -> None:
    """Raises:
    ConfigError: milestones outside (0, 1), missing for ``multistep``, or given for another schedule.
    """
    if (config.name == "multistep") != bool(config.milestones):
        raise ConfigError(
            f"schedule.name={config.name}, schedule.milestones={config.milestones}: only multistep takes them"
        )
    if any(not 0 < part < 1 for part in config.milestones):
        raise ConfigError(f"schedule.milestones={config.milestones} must be fractions of the run, between 0 and 1")


def create_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, updates_per_epoch: int
) -> tuple[Scheduler, int]:
    """The schedule of the learning rate, in updates, and the number of epochs including the cooldown."""
    total = config.epochs * updates_per_epoch
    check_schedule(config)
    lr = max(group["lr"] for group in optimizer.param_groups)  # timm multiplies by each group's lr_scale
    scheduler: Any
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
