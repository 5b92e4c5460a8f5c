"""What every training command does around its task: a recipe in, a run folder and an exit code out."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.console import Console
from rich.markup import escape

from ..configs.schema import ConfigError, load_config, save_config
from . import checkpoint, engine, report, trackers
from .data import DataError
from .engine import Interrupted, NonFiniteLoss, OtherProcessError, State, Trainer, raise_together

USER_ERRORS = (ConfigError, DataError, checkpoint.CheckpointError, NonFiniteLoss, OtherProcessError)
RUN_FILES = ("config.yaml", "last", "last.old", "best", "metrics.csv")


def shared_store(environ: Mapping[str, str], processes: int) -> str | None:
    """A word to the user where torchrun restarts processes and keeps one store over all attempts: a process may then
    read there the address of one that is gone, and cannot connect to it."""
    restarts = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if processes == 1 or not restarts or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return (
        f"torchrun --max-restarts={restarts}: a restart may find old addresses and fail; with "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment, on every node, each attempt has its own"
    )


class Task(engine.Task):
    """What a command brings: beside what the loop needs, its words and figures."""

    notes: list[str]  # what the user is told once, at the beginning

    def describe(self) -> str:
        """Model, input and classes in a few words."""

    def finish(self, run: Path, state: State, model: torch.nn.Module, draw: bool) -> dict[str, Any]:
        """Evaluates the best weights (``model``), on every process, draws figures into ``run`` where ``draw``, and
        answers what summary.json begins with."""


def run_recipe(
    config_path: str | Path,
    overrides: Sequence[str],
    schema: type,
    build_task: Callable[[Any, Accelerator], Task],
) -> int:
    """Trains the recipe at ``config_path`` (a file or a shipped recipe's name) with ``key=value`` overrides.

    Args:
        schema: the dataclass of the recipe, with ``output``, ``resume``, ``seed``, ``optim``, ``schedule``, ``train``.
        build_task: ``(config, accelerator) -> task``; may fill in what the recipe left open, which the run's own
            config.yaml then holds. The random numbers are seeded, the same on every process.

    Returns:
        exit code: 0 done; 1 refused or failed, with one line that says why; 130 after Ctrl-C and 0 after SIGTERM, both
        with everything saved for ``resume=auto`` and the command that goes on.
    """
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    output, task = "the run folder", "classify"
    try:
        config = load_config(config_path, overrides, schema)
        output, task = config.output, config.task
        _run(config, build_task, console)
    except USER_ERRORS as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except OSError as error:  # a full disk, a folder without permission
        console.print(f"[bold red]error:[/] writing {output} or reading data: {escape(str(error))}", soft_wrap=True)
        return 1
    except Interrupted as stop:
        given = [o for o in overrides if not o.startswith("resume=")]
        command = shlex.join(["foveal", "train", task, str(config_path), *given, "resume=auto"])
        said = f"saved as {output}/last; this goes on from there: {command}"
        console.print(f"[yellow]stopped[/], {escape(said)}", highlight=False, soft_wrap=True)
        return stop.code
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/] at once; what was saved before is intact")
        return 130
    return 0


def _run(config: Any, build_task: Callable[[Any, Accelerator], Task], console: Console) -> None:
    run = Path(config.output)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    AcceleratorState._reset_state()  # the precision of an earlier run in this process must not bind this one
    try:
        extra = trackers.choose(config.log.trackers)
        accelerator = Accelerator(mixed_precision=config.train.amp, log_with=extra or None, project_dir=str(run))
    except ValueError as error:
        raise ConfigError(f"train.amp={config.train.amp}: {error}") from None
    if config.model.sync_bn and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        raise ConfigError("model.sync_bn: PyTorch synchronises batch norms on GPUs only")
    if config.resume == "never" and any((run / name).exists() for name in RUN_FILES):
        raise ConfigError(f"{run} already holds a run: resume=auto goes on with it, output=FOLDER names another")
    set_seed(config.seed)
    task = failure = None
    try:
        task = build_task(config, accelerator)
    except (*USER_ERRORS, OSError) as error:
        failure = error
    raise_together(accelerator, failure)
    task.identity |= {
        "seed": config.seed,
        "optim.name": config.optim.name,
        "averaging": config.train.ema_decay > 0,
    }
    set_seed(config.seed, device_specific=True)
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes to it
    trainer = Trainer(
        accelerator,
        task,
        run=run,
        optim=config.optim,
        schedule=config.schedule,
        train=config.train,
        tensorboard=trackers.TENSORBOARD in config.log.trackers,
        console=console,
    )
    resumed = config.resume == "auto" and trainer.resume()
    parameters = sum(p.numel() for p in task.model.parameters())
    console.print(
        f"{task.describe()}, {parameters / 1e6:.2f} M parameters; "
        f"{task.data.train.samples:,} training and {task.data.val.samples:,} held-out images; "
        f"{accelerator.device.type} x {accelerator.num_processes}, {torch.get_num_threads()} threads",
        highlight=False,
    )
    for note in filter(None, [*task.notes, shared_store(os.environ, accelerator.num_processes)]):
        console.print(note, highlight=False, soft_wrap=True)
    if resumed and trainer.state.epoch >= trainer.epochs and (run / "summary.json").exists():
        console.print(f"{run} is finished: {trainer.epochs} epochs; nothing to do", highlight=False, soft_wrap=True)
        accelerator.end_training()
        return
    if resumed:
        console.print(f"resumed at epoch {trainer.state.epoch + 1}, update {trainer.state.step + 1}", highlight=False)
    try:
        if accelerator.is_main_process:
            run.mkdir(parents=True, exist_ok=True)
            (run / "summary.json").unlink(missing_ok=True)  # that of a run which now goes on, by which it is finished
            save_config(config, run / "config.yaml")
            write_json(run / "environment.json", environment(accelerator))
    except OSError as error:
        failure = error
    raise_together(accelerator, failure)
    with trackers.tracking(accelerator, run, config) as track:
        state = trainer.fit(track)
    checkpoint.load_exact(trainer.raw, checkpoint.newest(run / "best") / checkpoint.WEIGHTS)
    summary = task.finish(run, state, trainer.raw, draw=accelerator.is_main_process)
    if accelerator.is_main_process:
        summary |= {
            "parameters": parameters,
            "epochs": state.epoch,
            "seconds": state.seconds,
            "images_per_second": max(row["images_per_second"] for row in state.history),
        }
        write_json(run / "summary.json", summary)
        report.write(run)
        console.print(
            f"[bold green]done[/]: held out {task.headline(state.history[-1])} at the last epoch, "
            f"{task.headline(state.best)} at the best ({state.best['epoch']}), after {state.seconds:,.0f} s; {run}",
            highlight=False,
            soft_wrap=True,
        )
    accelerator.end_training()


def run_evaluation(evaluate: Callable[[str, list[str], Console], None], source: str, overrides: Sequence[str]) -> int:
    """Evaluates what ``source`` names, with ``key=value`` overrides.

    Returns:
        exit code: 0 done; 1 refused or failed, with one line that says why; 130 after Ctrl-C.
    """
    console = Console()
    try:
        evaluate(source, list(overrides), console)
    except (*USER_ERRORS, ValueError, OSError, ImportError) as error:  # the latter three from loading
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/]")
        return 130
    return 0


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` under a temporary name and renames it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
