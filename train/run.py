"""`train`: a recipe in, a run folder out."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.console import Console

from ..backbones.base import registered_cfg
from ..configs.schema import SCHEMAS, ConfigError, load_config, recipe_task, save_config
from ..errors import Interrupted
from ..files import write_json
from . import checkpoint, report
from .choices import choose
from .data import workers_end
from .data.auto import kept_split
from .distributed import join_processes, raised_by_all
from .logging import accelerate_trackers, flat
from .resume import resume
from .tasks import find_task, import_models
from .trainer import Trainer

RUN_FILES = ("config.yaml", "last", "last.old", "best", "metrics.csv")  # any of them: a run is there


def train(
    recipe: str | Path, overrides: Sequence[str] = (), task: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Trains a recipe to its end.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: ``key=value`` pairs.
        task: ``classify``, ``detect`` or ``segment``; None: the recipe's own.
        console: where progress is printed; None: the standard output of the main process.

    Returns:
        the content of summary.json.

    Raises:
        ConfigError, DataError: the recipe or its data cannot be used.
        CheckpointError: a checkpoint cannot be read or written, or is of another run.
        NonFiniteLoss: the loss became NaN or infinite.
        WorkerError: a process that reads data was killed.
        OtherProcessError: what another process raised.
        Interrupted: Ctrl-C or SIGTERM; all is saved, and ``resume=auto`` goes on from there.

    Examples:
        >>> from rich.console import Console
        >>> from foveal.train import train
        >>> options = ["schedule.epochs=1", "data.limit=64", "data.val_limit=32", "log.trackers=[]"]
        >>> train("classify/digits", options, console=Console(quiet=True))["epochs"]
        1
    """
    config = load_config(recipe, overrides, SCHEMAS[task or recipe_task(recipe)])
    if config.resume == "auto":
        kept_split(config.data, Path(config.output), [pair for pair in overrides if pair.startswith("data.split=")])
    chosen = choose(config, str(recipe))
    import_models(config.imports)
    console = console or Console(quiet=os.environ.get("RANK", "0") != "0")
    run, accelerator = Path(config.output), create_accelerator(config)
    set_seed(config.seed)
    with raised_by_all(accelerator):
        job = find_task(config.task).Task.build(config, accelerator)
        job.notes += chosen
    set_seed(config.seed, device_specific=True)
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes to it
    trainer = Trainer(config, job, accelerator, console)
    resumed = config.resume == "auto" and resume(trainer)
    describe(trainer, resumed)
    if resumed and trainer.finished and (run / "summary.json").exists():
        trainer.logger.print(f"{run} is finished: {trainer.state.epoch} epochs; nothing to do")
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))
    with raised_by_all(accelerator):
        if accelerator.is_main_process:
            run.mkdir(parents=True, exist_ok=True)
            if resumed:
                keep_former(trainer)
            (run / "summary.json").unlink(missing_ok=True)  # by which a run is finished: this one now goes on
            save_config(config, run / "config.yaml")
            if job.data.division is not None:
                job.data.division.write(run)
            write_json(run / "environment.json", environment(accelerator))
    try:
        with workers_end(job.data.train, job.data.val):
            trainer.fit()
            summary = finish(trainer)
    except Interrupted as stop:
        command = ["foveal", "train", config.task, str(recipe)]
        command += [pair for pair in overrides if not pair.startswith("resume=")] + ["resume=auto"]
        raise Interrupted(stop.code, f"saved as {run}/last; this goes on from there: {shlex.join(command)}") from None
    finally:
        if accelerator.is_main_process and not checkpoint.generations(run / "last"):
            (run / "config.yaml").unlink(missing_ok=True)  # nothing to go on from, so nothing to protect
    accelerator.end_training()
    return summary


def create_accelerator(config: Any) -> Accelerator:
    """This process's device, its group, and the precision and trackers of the recipe.

    Raises:
        ConfigError: what the device does not support, or a folder that holds a run already.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    trackers = accelerate_trackers(config.log.trackers)
    AcceleratorState._reset_state()  # the precision of an earlier run in this process must not bind this one
    try:
        accelerator = join_processes(
            mixed_precision=config.train.amp, log_with=trackers or None, project_dir=config.output
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"train.amp={config.train.amp}: {error}") from error
    if config.model.sync_bn and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        raise ConfigError("model.sync_bn: PyTorch synchronizes batch norms on GPUs only")
    if config.resume == "never" and any((Path(config.output) / name).exists() for name in RUN_FILES):
        raise ConfigError(
            f"{config.output} already holds a run: resume=auto goes on with it (without a checkpoint, from the start), "
            "output=FOLDER names another"
        )
    return accelerator


def describe(trainer: Trainer, resumed: bool) -> None:
    """Prints what is going to be trained, on what."""
    task, accelerator, state = trainer.task, trainer.accelerator, trainer.state
    trainer.logger.print(
        f"{task.describe()}, {parameter_count(task.model) / 1e6:.2f} M parameters; "
        f"{task.data.train.samples:,} training and {task.data.val.samples:,} held-out images; "
        f"{accelerator.device.type} x {accelerator.num_processes}, {torch.get_num_threads()} threads"
    )
    for note in filter(None, [*task.notes, shared_store(os.environ, accelerator.num_processes)]):
        trainer.logger.print(note)
    if not resumed:
        trainer.logger.print(f"starts from {initial_weights(trainer.config.model)}")
    elif state.epoch < trainer.epochs:
        trainer.logger.print(f"resumed at epoch {state.epoch + 1}, update {state.step + 1}")
    trainer.logger.print(plan(trainer))


def initial_weights(model: Any) -> str:
    """What a new run starts from, in a few words."""
    if source := getattr(model, "segmenter", None) or model.checkpoint:
        return f"the weights of {source}"
    if not model.pretrained:
        return "random weights" + (" in the backbone" if hasattr(model, "head") else "")
    tag = "" if ":" in model.name or "." in model.name else registered_cfg(model.name).tag
    return f"the published weights {model.name}{f'.{tag}' if tag else ''}"


def plan(trainer: Trainer) -> str:
    """Optimizer, peak learning rate and length of a run, in a line."""
    optim, schedule, images = trainer.config.optim, trainer.config.schedule, trainer.images_per_step
    groups = zip(trainer.scheduler.base_values, trainer.optimizer.param_groups, strict=True)
    peak = max(rate * group.get("lr_scale", 1.0) for rate, group in groups)
    scaled = f" (optim.lr={optim.lr:g} x {images} / optim.lr_batch={optim.lr_batch})" if optim.lr_batch else ""
    cooldown = trainer.epochs - schedule.epochs
    more = f" + {cooldown} of cooldown at the lowest rate (schedule.cooldown_fraction)" if cooldown else ""
    return (
        f"{optim.name}, peak learning rate {peak:.3g}{scaled}; {schedule.epochs} epochs{more} of {trainer.steps:,} "
        f"updates of {images:,} images"
    )


def keep_former(trainer: Trainer) -> None:
    """Says what a resumed run changes of its recipe, and renames the former config.yaml."""
    file, config = trainer.run / "config.yaml", trainer.config
    if not file.is_file():
        return
    try:
        earlier = dict(flat(load_config(file, [], SCHEMAS[config.task])))
    except ConfigError as error:
        trainer.logger.warn(f"{file} cannot be compared with the recipe: {error}")
        earlier = {}
    now = dict(flat(config))
    changed = [f"{key} {earlier.get(key)} -> {now[key]}" for key in now if earlier and earlier[key] != now[key]]
    changed = [text for text in changed if text.partition(" ")[0] not in ("resume", "output")]
    if changed or not earlier:
        kept = next(name for n in count(1) if not (name := file.with_name(f"config.{n}.yaml")).exists())
        file.rename(kept)
        trainer.logger.warn(f"the recipe has changed ({kept.name} keeps the former one): {', '.join(changed)}")


def finish(trainer: Trainer) -> dict[str, Any]:
    """Evaluates the best weights, and writes summary.json, figures and the report."""
    run, task, state = trainer.run, trainer.task, trainer.state
    is_main = trainer.accelerator.is_main_process
    folder = checkpoint.newest(run / "best")
    assert folder is not None and state.best is not None, "the last epoch is always evaluated"
    checkpoint.load_exact(trainer.eval_model, folder / checkpoint.WEIGHTS)
    summary = task.finish(run, state, trainer.eval_model, draw=is_main) | {
        "parameters": parameter_count(task.model),
        "epochs": state.epoch,
        "seconds": state.seconds,
        "images_per_second": max(row["images_per_second"] for row in state.history),
    }
    if is_main:
        write_json(run / "summary.json", summary)
        if state.epoch < trainer.epochs:
            patience = trainer.config.train.patience
            trainer.logger.print(f"no better score in {patience} evaluations (train.patience): stopped early")
        report.write(run)
        trainer.logger.print(
            f"[bold green]done[/]: held out {task.headline(state.history[-1])} at the last epoch, "
            f"{task.headline(state.best)} at the best ({state.best['epoch']}), after {state.seconds:,.0f} s; {run}"
        )
    return summary


def parameter_count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shared_store(environ: Mapping[str, str], processes: int) -> str | None:
    """A note where torchrun restarts processes and keeps one store over all attempts: a process may then read the
    address of one that is gone there, and cannot connect to it."""
    restarts = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if processes == 1 or not restarts or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return (
        f"torchrun --max-restarts={restarts}: a restart may find old addresses and fail; with "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment, on every node, each attempt has its own"
    )


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions and machine, for the record of a run."""
    names = ("foveal", "torch", "torchvision", "timm", "accelerate", "numpy")
    gpu = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(accelerator.device),
        "gpu": gpu,
        "processes": accelerator.num_processes,
        "backend": os.environ.get("FOVEAL_BACKEND"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
