"""`train`: trains a recipe and writes a run folder."""

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

import psutil
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

RUN_FILES = ("last", "last.old", "best", "metrics.csv", "summary.json")  # a folder with any of these holds a run


def train(
    recipe: str | Path, overrides: Sequence[str] = (), task: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Trains a recipe.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: ``key=value`` pairs.
        task: ``classify``, ``detect``, ``segment`` or ``upsample``; None: the recipe's own.
        console: prints the progress; None: standard output of the main process.

    Returns:
        the content of summary.json.

    Raises:
        ConfigError, DataError: invalid recipe or data.
        CheckpointError: a checkpoint cannot be read or written, or belongs to another run.
        NonFiniteLoss: the loss became NaN or infinite.
        WorkerError: a data worker was killed.
        OtherProcessError: another process failed.
        Interrupted: Ctrl-C or SIGTERM; the state is saved, and ``resume=auto`` continues from it.

    Examples:
        >>> from rich.console import Console
        >>> from foveal.train import train
        >>> options = ["schedule.epochs=1", "data.limit=64", "data.val_limit=32", "log.trackers=[]"]
        >>> train("classify/digits", options, console=Console(quiet=True))["epochs"]
        1
    """
    config, chosen = read_recipe(recipe, overrides, task)
    console = console or Console(quiet=os.environ.get("RANK", "0") != "0")
    accelerator = create_accelerator(config)
    set_seed(config.seed)
    with raised_by_all(accelerator):
        job = find_task(config.task).Task.build(config, accelerator)
        job.notes += chosen
    set_seed(config.seed, device_specific=True)
    accelerator.wait_for_everyone()  # every process has checked the folder before one writes to it
    trainer = Trainer(config, job, accelerator, console)
    resumed = config.resume == "auto" and resume(trainer)
    describe(trainer, resumed)
    summary = trainer.run / "summary.json"
    if resumed and trainer.finished and summary.exists():
        trainer.logger.print(f"{trainer.run} is finished: {trainer.state.epoch} epochs; nothing to do")
        return json.loads(summary.read_text(encoding="utf-8"))
    with raised_by_all(accelerator):
        if accelerator.is_main_process:
            write_recipe(trainer, resumed)
    try:
        with workers_end(job.data.train, job.data.val):
            trainer.fit()
            return finish(trainer)
    except Interrupted as stop:
        command = ["foveal", "train", config.task, str(recipe)]
        command += [pair for pair in overrides if not pair.startswith("resume=")] + ["resume=auto"]
        raise Interrupted(stop.code, f"saved to {trainer.run}/last; to resume: {shlex.join(command)}") from None


def read_recipe(recipe: str | Path, overrides: Sequence[str], task: str | None) -> tuple[Any, list[str]]:
    """The configuration of a run, and a note about the values chosen from the data; imports the recipe's modules."""
    config = load_config(recipe, overrides, SCHEMAS[task or recipe_task(recipe)])
    if config.resume == "auto":
        kept_split(config.data, Path(config.output), [pair for pair in overrides if pair.startswith("data.split=")])
    chosen = choose(config, str(recipe))
    import_models(config.imports)
    return config, chosen


def create_accelerator(config: Any) -> Accelerator:
    """The recipe's device, process group, precision and trackers.

    Raises:
        ConfigError: an option that the device does not support, or an output folder that already holds a run.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    trackers = accelerate_trackers(config.log.trackers)
    AcceleratorState._reset_state()  # else the precision of an earlier run in this process stays
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
    if config.resume == "never":
        check_unused(Path(config.output))
    return accelerator


def check_unused(run: Path) -> None:
    """Raises:
    ConfigError: the folder holds a run, or a running process is going to write one there.
    """
    other = "output=FOLDER writes elsewhere"
    if any((run / name).exists() for name in RUN_FILES):
        raise ConfigError(
            f"{run} already holds a run: resume=auto continues it (from the start if it has no checkpoint), {other}"
        )
    try:
        started = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    process = started.get("process", {})
    if process.get("host") == platform.node() and process["pid"] != os.getpid() and is_running(process):
        raise ConfigError(f"process {process['pid']} is training in {run}, without a checkpoint yet; {other}")


def is_running(process: Any) -> bool:
    """Whether there still is the process of this number and start time (``environment.json``)."""
    try:
        return abs(psutil.Process(process["pid"]).create_time() - process["started"]) < 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def describe(trainer: Trainer, resumed: bool) -> None:
    """Prints model, data, device and schedule."""
    task, accelerator, state = trainer.task, trainer.accelerator, trainer.state
    trainer.logger.print(
        f"{task.describe()}, {parameter_count(task.model) / 1e6:.2f} M parameters; "
        f"{task.data.train.samples:,} training and {task.data.val.samples:,} held-out images; "
        f"{accelerator.device.type} x {accelerator.num_processes}, {torch.get_num_threads()} threads"
    )
    forced = [f"{name}={os.environ[name]}" for name in ("FOVEAL_BACKEND", "FOVEAL_NATIVE") if os.environ.get(name)]
    notes = [*task.notes, *forced]
    for note in filter(None, [*notes, shared_store(os.environ, accelerator.num_processes)]):
        trainer.logger.print(note)
    if not resumed:
        trainer.logger.print(f"initial weights: {initial_weights(trainer.config.model)}")
    elif state.epoch < trainer.epochs:
        trainer.logger.print(f"resumed at epoch {state.epoch + 1}, update {state.step + 1}")
    trainer.logger.print(plan(trainer))


def initial_weights(model: Any) -> str:
    """The source of a new run's weights, for the log."""
    if source := getattr(model, "segmenter", None) or model.checkpoint:
        return str(source)
    if not model.pretrained:
        return "random" + (", also in the backbone" if hasattr(model, "head") else "")
    tag = "" if ":" in model.name or "." in model.name else registered_cfg(model.name).tag
    return f"published, {model.name}{f'.{tag}' if tag else ''}"


def plan(trainer: Trainer) -> str:
    """Optimizer, peak learning rate and length of a run, in one line."""
    optim, schedule, images = trainer.config.optim, trainer.config.schedule, trainer.images_per_step
    groups = zip(trainer.scheduler.base_values, trainer.optimizer.param_groups, strict=True)
    peak = max(rate * group.get("lr_scale", 1.0) for rate, group in groups)
    scaled = f" (optim.lr={optim.lr:g} x {images} / optim.lr_batch={optim.lr_batch})" if optim.lr_batch else ""
    cooldown = trainer.epochs - schedule.epochs
    more = f" + {cooldown} of cooldown at the minimum rate (schedule.cooldown_fraction)" if cooldown else ""
    return (
        f"{optim.name}, peak learning rate {peak:.3g}{scaled}; {schedule.epochs} epochs{more} of {trainer.steps:,} "
        f"updates of {images:,} images"
    )


def write_recipe(trainer: Trainer, resumed: bool) -> None:
    """Writes config.yaml, split.csv and environment.json into the run folder, which is no longer finished."""
    run, division = trainer.run, trainer.task.data.division
    run.mkdir(parents=True, exist_ok=True)
    if not resumed and (run / "config.yaml").exists():
        trainer.logger.print(f"{run} has a recipe and no checkpoint: starting from the beginning")
    keep_former(trainer)
    (run / "summary.json").unlink(missing_ok=True)
    write_json(run / "environment.json", environment(trainer.accelerator))
    save_config(trainer.config, run / "config.yaml")
    if division is not None:
        division.write(run)


def keep_former(trainer: Trainer) -> None:
    """Warns about recipe keys that a run changes from the config.yaml in its folder, and renames that file."""
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
        trainer.logger.warn(f"the recipe has changed (the former one is kept as {kept.name}): {', '.join(changed)}")


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
            trainer.logger.print(f"stopped early: no better epoch in {patience} evaluations (train.patience)")
        report.write(run)
        trainer.logger.print(
            f"[bold green]done[/]: held out {task.headline(state.history[-1])} at the last epoch, "
            f"{task.headline(state.best)} at the best ({state.best['epoch']}), after {state.seconds:,.0f} s; {run}"
        )
    trainer.accelerator.end_training()
    return summary


def parameter_count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shared_store(environ: Mapping[str, str], processes: int) -> str | None:
    """A note for torchrun with restarts and one store for all attempts: a process may then read the address of a dead
    one from the store and fail to connect."""
    restarts = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if processes == 1 or not restarts or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return (
        f"torchrun --max-restarts={restarts}: a restart may read stale addresses and fail; set "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node, so that each attempt has its own store"
    )


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, machine and command line."""
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
        "process": {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()},
        "backend": os.environ.get("FOVEAL_BACKEND"),
        "native": os.environ.get("FOVEAL_NATIVE"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
