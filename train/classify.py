"""``foveal train classify`` and ``foveal evaluate``: from a recipe to a trained, measured, loadable classifier."""

import difflib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from ..backbones.loading import load, resolve
from ..configs.schema import ClassifyConfig, ConfigError, ModelConfig, load_config, override_value
from . import checkpoint, plots
from .data import Data, build_data, find_classes
from .data.guard import printable
from .engine import State
from .run import run_evaluation, run_recipe, write_json
from .scoring import score, write_confusion

EXAMPLES = 40  # right and wrong ones each, for the figure of predictions


def build_model(config: ModelConfig, classes: int, in_chans: int) -> nn.Module:
    """Creates the recipe's model with timm.

    Raises:
        ConfigError: unknown name, arguments it does not take, or fewer outputs than classes.
    """
    outputs = config.num_classes or classes
    if outputs < classes:
        raise ConfigError(f"model.num_classes is {outputs}, but the data have {classes} classes")
    rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    arguments = {key: value for key, value in rates.items() if value is not None} | config.kwargs
    local = config.name.startswith("local-dir:")
    if not local and not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name.split(".")[0], timm.list_models(), n=4)
        raise ConfigError(f"model.name: there is no model {config.name!r}; nearest: {', '.join(near) or 'none'}")
    try:
        # not by timm's pretrained=True, which compares no hash and tries no mirror
        create = load if config.pretrained and not local else partial(timm.create_model, pretrained=config.pretrained)
        model = create(config.name, num_classes=outputs, in_chans=in_chans, **arguments).train()
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise ConfigError(f"model {config.name!r} can't be created with {arguments}: {error}") from error
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if config.sync_bn and torch.distributed.is_initialized():
        model = convert_sync_batchnorm(model)  # timm's: PyTorch's drops the activations that timm's norms hold
    return model


def prepare_heads(model: nn.Module, config: ClassifyConfig) -> None:
    """Makes a model's further head answer in training when the recipe has a loss for it.

    Raises:
        ConfigError: the recipe weighs an auxiliary head that the model does not have.
    """
    if config.loss.auxiliary > 0:
        if not hasattr(model, "set_auxiliary_training"):
            raise ConfigError(f"loss.auxiliary={config.loss.auxiliary:g}: {config.model.name} has no auxiliary head")
        try:
            model.set_auxiliary_training(True)
        except ValueError as error:
            raise ConfigError(f"loss.auxiliary={config.loss.auxiliary:g}: {error}") from None
    elif getattr(model, "auxiliary_training", False):
        raise ConfigError(
            f"{config.model.name} was made with an auxiliary head, and loss.auxiliary=0 would not train it: give it a "
            "weight, or leave the head out of model.kwargs"
        )
    if config.distill.teacher is not None and hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # its second head learns from the teacher; another model's only head does


class Teacher:
    """A frozen model of the same classes that answers to the student's images, prepared as it was trained to see them.

    Args:
        source: what `foveal.load` takes.
        num_classes: outputs of the student.
        preprocessing: how the student's images are made (mean, std, input_size), as `build_data` states it.
        classes: names of the student's classes. A teacher that has one of them elsewhere is refused; one that knows
            them by other names, or by none, is trusted.

    Raises:
        ConfigError: the teacher cannot be loaded, or has other classes.
    """

    def __init__(
        self,
        source: str,
        num_classes: int,
        preprocessing: dict[str, Any],
        device: torch.device,
        classes: Sequence[str] = (),
    ):
        channels = preprocessing["input_size"][0]
        try:
            self.model = load(source, in_chans=channels).to(device).requires_grad_(False)
        except (ValueError, OSError) as error:
            raise ConfigError(f"distill.teacher: {error}") from None
        if self.model.num_classes != num_classes:
            raise ConfigError(
                f"distill.teacher: {source} has {self.model.num_classes} classes, the model has {num_classes}"
            )
        cfg = self.model.pretrained_cfg
        places = {name: i for i, name in enumerate(cfg.get("label_names") or ())}
        for i, name in enumerate(classes):
            if places.get(name, i) != i:
                raise ConfigError(f"distill.teacher: class {name!r} is number {places[name]} of {source}, here {i}")

        def column(values: Sequence[float]) -> torch.Tensor:
            # a teacher of coloured images that is given grey ones: its channels' mean, as timm sums its first filters
            values = values if len(values) == channels else [sum(values) / len(values)] * channels
            return torch.tensor(values, device=device).view(1, -1, 1, 1)

        mean, std = column(preprocessing["mean"]), column(preprocessing["std"])
        own_mean, own_std = column(cfg["mean"]), column(cfg["std"])
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.size = tuple(cfg["input_size"][1:]) if cfg.get("fixed_input_size") else None

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The student's batch ``[B, C, H, W]`` to logits ``[B, num_classes]``, float32."""
        images = images * self.scale + self.shift
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False)
        return self.model(images).float()


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    """Cross entropy with the teacher's decision (``"hard"``), or the Kullback-Leibler divergence from its distribution
    times the squared temperature (``"soft"``: Hinton et al., arXiv 1503.02531); both a mean over the batch."""
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    student, teacher = ((x / temperature).log_softmax(1) for x in (logits, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def describe(model: nn.Module, preprocessing: dict[str, Any]) -> None:
    """Makes the model say how its images were prepared, and forget where other weights of its name came from."""
    cfg = model.pretrained_cfg
    kept = ("architecture", "classifier", "first_conv", "fixed_input_size", "min_input_size")
    model.pretrained_cfg = {key: cfg[key] for key in kept if cfg.get(key) is not None}
    model.pretrained_cfg |= preprocessing | {"num_classes": model.num_classes}


def growing_sizes(sizes: Sequence[int], model: nn.Module, input_size: Sequence[int]) -> list[int]:
    """The sides of the input by part of the run (progressive learning: EfficientNetV2, arXiv 2104.00298, section 4).

    Raises:
        ConfigError: they do not grow to the input's own side, or the model takes no image of one of them.
    """
    channels, side, _ = input_size
    if not sizes:
        return [side]
    if list(sizes) != sorted(set(sizes)) or sizes[-1] != side:
        raise ConfigError(f"augment.sizes={list(sizes)} must grow, and end at the input's side of {side}")
    training = model.training
    model.eval()
    for size in sizes[:-1]:
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"augment.sizes: the model takes no images of {size}x{size}: {error}") from None
    model.train(training)
    return list(sizes)


class Task:
    """What classification brings to the engine: step, evaluation, and the folder that users load."""

    metrics = ("val_loss", "top1", "top5")
    monitor = "top1"

    def __init__(
        self, config: ClassifyConfig, model: nn.Module, classes: list[str], data: Data, teacher: Teacher | None = None
    ):
        self.config, self.model, self.classes, self.data, self.teacher = config, model, classes, data, teacher
        self.num_classes, self.notes = model.num_classes, list(data.notes)
        self.identity = {
            "model": config.model.name,
            "model arguments": json.dumps(config.model.kwargs, sort_keys=True),
            "classes": classes,
            "data.kind": config.data.kind,
            "data.val_fraction": config.data.val_fraction,
            "preprocessing": json.dumps(data.preprocessing, sort_keys=True),
            "loss": json.dumps(vars(config.loss), sort_keys=True),
            "distillation": json.dumps(vars(config.distill), sort_keys=True),
        }
        augment, smoothing = config.augment, config.loss.smoothing
        self.mix = None
        if augment.mixup > 0 or augment.cutmix > 0:
            if config.train.batch_size % 2:
                raise ConfigError(f"mixup and cutmix pair images: train.batch_size={config.train.batch_size} is odd")
            self.mix = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                label_smoothing=smoothing,
                num_classes=self.num_classes,
            )
        schedule = config.schedule
        epochs = schedule.epochs + round(schedule.cooldown_fraction * schedule.epochs)
        self.mix_until = epochs - round(augment.mix_off_fraction * epochs)
        self.epochs, self.sizes = epochs, growing_sizes(augment.sizes, model, data.preprocessing["input_size"])
        if config.loss.name == "bce":
            self.hard = BinaryCrossEntropy(smoothing=smoothing)
            self.soft = BinaryCrossEntropy(smoothing=0.0)  # the mixed targets are smoothed already
        else:
            self.hard = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
            self.soft = SoftTargetCrossEntropy()

    def train_step(self, model: nn.Module, batch, epoch: int) -> torch.Tensor:
        images, targets = batch
        size = self.sizes[epoch * len(self.sizes) // self.epochs]
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        loss = self.hard
        if self.mix is not None and epoch < self.mix_until:
            images, targets = self.mix(images, targets)
            loss = self.soft
        output = model(images)
        logits, extra = output if isinstance(output, tuple) else (output, output)
        total = loss(logits.float(), targets)
        if self.config.loss.auxiliary > 0:
            total = total + self.config.loss.auxiliary * loss(extra.float(), targets)
        if self.teacher is not None:
            distill = self.config.distill
            student = logits if self.config.loss.auxiliary > 0 else extra  # an auxiliary head is not the one to teach
            taught = distillation_loss(student.float(), self.teacher(images), distill.kind, distill.temperature)
            total = (1 - distill.alpha) * total + distill.alpha * taught
        return total

    def evaluate(self, model: nn.Module, on_batch=None) -> dict[str, float]:
        result = score(model, self.data.val, self.num_classes, amp=self.config.train.amp, on_batch=on_batch)
        return {"val_loss": result.loss, "top1": result.top1, "top5": result.top5}

    def save_weights(self, folder: Path, model: nn.Module) -> None:
        arguments = self.config.model.kwargs | {"in_chans": self.config.data.in_chans}
        checkpoint.save_model(folder, model, arguments, self.classes)

    def on_epoch(self, run: Path, model: nn.Module, epoch: int) -> None:
        """Nothing to draw: one figure of the best epoch's predictions at the end tells all."""

    def headline(self, row: dict[str, Any]) -> str:
        return f"loss {row['val_loss']:.4f}  top-1 {row['top1']:.2f} %"

    def describe(self) -> str:
        size = "x".join(map(str, self.data.preprocessing["input_size"]))
        return f"{self.config.model.name}, input {size}, {len(self.classes)} classes"

    def finish(self, run: Path, state: State, model: nn.Module, draw: bool) -> dict[str, Any]:
        """Curves, the best model's predictions, and its figures."""
        result = score(model, self.data.val, self.num_classes, amp=self.config.train.amp, keep=EXAMPLES)
        best, last, name = state.best, state.history[-1], self.config.model.name  # the last epoch is always evaluated
        if draw:
            title = f"{name} on {self.config.data.kind}"
            plots.curves(state.history, run / "curves.png", title, {"top1": "top-1, %"}, self.monitor)
            plots.predictions(result, self.classes, run / "predictions.png", f"{name}, epoch {best['epoch']}")
            write_confusion(run, self.classes, result.confusion)
        return {
            "model": name,
            "best_epoch": best["epoch"],
            "top1": best["top1"],
            "last_top1": last["top1"],
            "top5": best["top5"],
            "loss": best["val_loss"],
            "n": result.n,
        }


def train(config_path: str | Path, overrides: Sequence[str] = ()) -> int:
    """Trains the recipe at ``config_path`` (a file or a shipped recipe's name) with ``key=value`` overrides; the exit
    code is that of `run.run_recipe`.

    Examples:
        >>> from foveal.train.classify import train
        >>> train("digits", ["schedule.epoch=1"])
        error: command line: unknown key `schedule.epoch`; did you mean `schedule.epochs`?
        1
        >>> train("digits", ["schedule.epochs=1", "train.steps_per_epoch=4", "output=runs/short"])  # doctest: +ELLIPSIS
        test_foveal_dinat...
        0
    """
    return run_recipe(config_path, overrides, ClassifyConfig, build_task)


def build_task(config: ClassifyConfig, accelerator: Accelerator) -> Task:
    """The model, the data and what else a recipe asks for, the model on the CPU and with its initial weights."""
    classes = find_classes(config.data)
    model = build_model(config.model, len(classes), config.data.in_chans)
    data = build_data(
        config,
        classes,
        model.pretrained_cfg,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    describe(model, data.preprocessing)
    prepare_heads(model, config)
    teacher = None
    if config.distill.teacher is not None:
        source = config.distill.teacher
        teacher = Teacher(source, model.num_classes, data.preprocessing, accelerator.device, classes)
    new_head = checkpoint.load_initial(model, config.model.checkpoint) if config.model.checkpoint else []
    config.data.classes = classes  # so that an evaluation needs no training folder
    task = Task(config, model, classes, data, teacher)
    if new_head:
        task.notes.append(f"not in {config.model.checkpoint} for these classes, so new: {', '.join(new_head)}")
    return task


def evaluate(source: str, overrides: Sequence[str] = ()) -> int:
    """Scores a trained run (its ``best/``), a checkpoint folder inside it, a model folder, or a model name.

    For a run the recipe is the one saved with it; for the others the overrides say what the data are. ``output=FILE``
    writes the result as JSON.

    The exit code is that of `run.run_evaluation`.

    Examples:
        >>> import timm
        >>> from foveal.train.classify import evaluate
        >>> model = timm.create_model("test_foveal_dinat", num_classes=10, in_chans=1)
        >>> timm.models.save_for_hf(model, "folder", model_args={"in_chans": 1}, safe_serialization=True)
        >>> data = ["data.kind=digits", "data.image_size=32", "data.in_chans=1", "data.mean=[0.3]", "data.std=[0.37]"]
        >>> evaluate("folder", [*data, "output=score.json"])  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        folder: digits, 32 px ...
        0
        >>> import json
        >>> json.load(open("score.json"))["n"]
        360
    """
    return run_evaluation(_evaluate, source, overrides)


def _evaluate(source: str, overrides: list[str], console: Console) -> None:
    file = override_value(overrides, "output")
    overrides = [o for o in overrides if not o.startswith("output=")]
    folder = Path(source)
    weights = None
    if (folder / "config.yaml").is_file():
        weights = checkpoint.newest(folder / "best")
        if weights is None:
            raise checkpoint.CheckpointError(f"{folder} has no best/: no epoch of this run was evaluated")
        config = load_config(folder / "config.yaml", overrides)
    elif folder.is_dir() and (folder.resolve().parent / "config.yaml").is_file():
        weights, config = folder, load_config(folder.resolve().parent / "config.yaml", overrides)
    else:
        resolve(source)  # what is neither a folder of ours nor a model's name is said before the data are looked for
        name = f"local-dir:{folder}" if folder.is_dir() else source
        config = load_config(None, overrides, defaults={"output": "-", "model": {"name": name}})
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = Accelerator().device
    if weights is not None:
        config.model.pretrained = False
    data_config = config.data
    if data_config.kind == "folder" and data_config.classes is None:
        data_config.train_split = data_config.val_split
    classes = find_classes(data_config)
    if weights is None and config.model.checkpoint is None:
        # with the classifier it was trained with: a new one for other classes would answer at random
        model = load(source, in_chans=data_config.in_chans)
        if model.num_classes != len(classes):
            raise ConfigError(f"{source} has {model.num_classes} classes, the data have {len(classes)}")
    else:
        model = build_model(config.model, len(classes), data_config.in_chans)
    if weights is not None:
        checkpoint.load_exact(model, checkpoint.find_weights(weights))
    elif config.model.checkpoint is not None:
        new = checkpoint.load_initial(model, config.model.checkpoint)
        if new:
            raise checkpoint.CheckpointError(f"{config.model.checkpoint} has another number of classes ({new[0]})")
    data = build_data(config, classes, model.pretrained_cfg, device=device, train=False)
    result = score(model.to(device), data.val, model.num_classes, amp=config.train.amp)
    table = Table(title=f"{source}: {config.data.kind}, {data.preprocessing['input_size'][-1]} px")
    row = {"top-1 %": f"{result.top1:.2f}", "top-5 %": f"{result.top5:.2f}", "loss": f"{result.loss:.4f}"}
    row |= {"n": f"{result.n:,}", "images/s": f"{result.images_per_second:,.0f}"}
    for name in row:
        table.add_column(name, justify="right")
    table.add_row(*row.values())
    console.print(table)
    if data.bad.names:
        named = escape(printable(", ".join(sorted(data.bad.names)[:5])))
        console.print(f"[yellow]{len(data.bad.names)} unreadable images left out:[/] {named}")
    if file is not None:
        figures = ("top1", "top5", "loss", "n", "images_per_second")
        content = {"source": source, "model": config.model.name} | {name: getattr(result, name) for name in figures}
        write_json(Path(file), content | {"unreadable": data.bad.names})
