"""Image classification: training, evaluation and prediction."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torchvision.transforms.functional import get_image_size

from ..backbones.base import registered_cfg
from ..backbones.images import class_labels, preprocessing
from ..backbones.loading import load, local_path, resolve
from ..configs.schema import ClassifyConfig, ConfigError, ModelConfig, load_config
from ..errors import RunError
from ..heads.backbone import names_of_stages
from . import checkpoint, deprecated, plots, task
from .data import Data, build_classification_data, find_classes, workers_end
from .data.corruption import parse
from .losses import Teacher, build_losses, build_mix, check_mix, check_teacher, distillation_loss, prepare_heads
from .scoring import ClassificationScorer, Losses, autocast, write_confusion
from .task import RANDOM_WEIGHTS, Result, check_published, find_recipe, loop_problems, processes, use_kept_split

EXAMPLES = 40  # right and as many wrong ones, for the figure of predictions


class Task(task.Task):
    """A classifier: images to logits ``[B, num_classes]``; in training perhaps also those of an auxiliary or
    distillation head."""

    metrics: ClassVar = {"val_loss": "loss", "top1": "top-1", "top5": "top-5"}
    shown = ("top1",)
    model: Any

    def __init__(
        self, config: ClassifyConfig, model: Any, classes: list[str], data: Data, teacher: Teacher | None = None
    ):
        super().__init__(config, model, classes, data)
        self.num_classes, self.teacher = model.num_classes, teacher
        self.input = f"input {'x'.join(map(str, data.preprocessing['input_size']))}"
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
        self.loss, self.soft_loss = build_losses(config.loss.name, config.loss.smoothing)
        # mix and sizes are set by `build`
        self.mix: Mixup | None = None
        self.sizes = [data.preprocessing["input_size"][-1]]
        self.epochs = config.schedule.epochs + round(config.schedule.cooldown_fraction * config.schedule.epochs)
        self.mix_until = self.epochs - round(config.augment.mix_off_fraction * self.epochs)

    @classmethod
    def build(cls, config: ClassifyConfig, accelerator: Accelerator) -> "Task":
        problems, classes, cfg = loop_problems(config), [], {}
        with problems:
            check_mix(config)
        with problems:
            if len(parse(config.data.corruption)) > 1:
                raise ConfigError(f"data.corruption={config.data.corruption} is for foveal evaluate; name a severity")
        with problems:
            cfg = model_cfg(config.model)
        if config.distill.teacher is not None:
            with problems:
                check_teacher(config.distill.teacher)
                check_published("distill.teacher", config.distill.teacher)
        if not problems.concern("data"):
            with problems:
                classes = find_classes(config.data)
        if classes and cfg and not problems.concern("data"):
            with problems:
                data = build_classification_data(config, classes, cfg, **processes(accelerator))
        problems.raise_all()
        model = build_model(config.model, len(classes), config.data.in_chans)
        set_preprocessing(model, data.preprocessing)
        prepare_heads(model, config)
        teacher = None
        if config.distill.teacher is not None:
            source = config.distill.teacher
            teacher = Teacher(source, model.num_classes, data.preprocessing, accelerator.device, classes)
        new = checkpoint.load_initial(model, config.model.checkpoint) if config.model.checkpoint else []
        config.data.classes = classes  # an evaluation then needs no training folder
        self = cls(config, model, classes, data, teacher)
        self.mix = build_mix(config, model.num_classes)
        self.sizes = growing_sizes(config.augment.sizes, model, data.preprocessing["input_size"])
        if new:
            self.notes.append(f"not in {config.model.checkpoint} for these classes, so new: {', '.join(new)}")
        return self

    @classmethod
    def load(cls, source: str | Path, overrides: list[str], accelerator: Accelerator) -> "Task":
        folder, recipe = local_path(source), find_recipe(source)
        defaults = {}
        if recipe is None:
            found = resolve(source)  # raises for an unknown source before the data are read
            name = f"local-dir:{folder}" if folder.is_dir() else str(source)
            defaults = {"output": "-", "model": {"name": name}}
            if shape := ((found.config or {}).get("pretrained_cfg") or {}).get("input_size"):
                defaults["data"] = {"in_chans": shape[0]}
        config = load_config(recipe, overrides, ClassifyConfig, defaults)
        use_kept_split(config, source, overrides)
        if config.data.kind == "folder" and config.data.classes is None:
            config.data.train_split = config.data.val_split
        classes = find_classes(config.data)
        if recipe is not None:
            config.model.pretrained = False
            model = build_model(config.model, len(classes), config.data.in_chans)
            checkpoint.load_exact(model, checkpoint.find_weights(folder))
        elif config.model.checkpoint is not None:
            model = build_model(config.model, len(classes), config.data.in_chans)
            if new := checkpoint.load_initial(model, config.model.checkpoint):
                raise checkpoint.CheckpointError(f"{config.model.checkpoint} has another number of classes ({new[0]})")
        else:
            # with its own classifier: a new one for other classes would predict at random
            model: Any = load(source, in_chans=config.data.in_chans)
            if model.num_classes != len(classes):
                raise ConfigError(f"{source} has {model.num_classes} classes, the data have {len(classes)}")
        data = build_classification_data(config, classes, model.pretrained_cfg, train=False, **processes(accelerator))
        return cls(config, model, classes, data)

    def train_step(self, model: nn.Module, batch: tuple[Tensor, Tensor], epoch: int) -> Tensor:
        images, targets = batch
        size = self.sizes[epoch * len(self.sizes) // self.epochs]
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        loss = self.loss
        if self.mix is not None and epoch < self.mix_until:
            images, targets = self.mix(images, targets)
            loss = self.soft_loss
        output = model(images)
        logits, extra = output if isinstance(output, tuple) else (output, output)
        total = loss(logits.float(), targets)
        auxiliary, distill = self.config.loss.auxiliary, self.config.distill
        if auxiliary > 0:
            # of logits, or a scalar that is the loss itself
            total = total + auxiliary * (loss(extra.float(), targets) if extra.ndim else extra.float())
        if self.teacher is not None:
            student = logits if auxiliary > 0 else extra  # an auxiliary head does not learn from the teacher
            distilled = distillation_loss(student.float(), self.teacher(images), distill.kind, distill.temperature)
            total = (1 - distill.alpha) * total + distill.alpha * distilled
        return total

    def scorer(self) -> ClassificationScorer:
        return ClassificationScorer(self.num_classes)

    def predict(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Losses]:
        """Logits ``[B, num_classes]``; the loss is the cross-entropy with the labels."""
        images, targets = batch
        with autocast(images.device, self.config.train.amp):
            logits = model(images).float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return logits, torch.stack([loss, loss.new_tensor(len(targets))])[:, None]

    def corrupted(self, accelerator: Accelerator) -> dict[str, list[float]]:
        corruptions, table, counted = parse(self.config.data.corruption), {}, 0
        for each in corruptions if len(corruptions) > 1 else ():
            data = replace(self.config.data, corruption=f"{each.name}:{each.severity}")
            config, cfg = replace(self.config, data=data), self.data.preprocessing
            images = build_classification_data(config, self.classes, cfg, train=False, **processes(accelerator)).val
            with workers_end(images):
                scorer = self.scorer().run(self.model, images.epoch(0), self.predict)
            if counted not in (0, scorer.n):
                raise RunError(f"{counted} held-out images could be read, then with corruption {each.name} {scorer.n}")
            counted = scorer.n
            table.setdefault(each.name, []).append(100 - scorer.metrics["top1"])
        return table

    def save_weights(self, folder: Path, model: Any) -> None:
        arguments = self.config.model.kwargs | {"in_chans": self.config.data.in_chans}
        checkpoint.save_model(folder, model, arguments, self.classes)

    def examine(self, run: Path, model: nn.Module, title: str, draw: bool) -> dict[str, Any]:
        scorer = ClassificationScorer(self.num_classes, EXAMPLES, self.data.val.normalize.undo)
        scorer.run(model, self.data.val.epoch(0), self.predict)
        if draw:
            plots.predictions(scorer, self.classes, run / "predictions.png", title)
            write_confusion(run, self.classes, scorer.confusion)
        return {"loss": scorer.metrics["val_loss"], "n": scorer.n}


class Predictor(task.Predictor):
    """Returns the most probable classes; classes without a name are ``class INDEX``."""

    def __init__(self, source: str | Path, *, top: int, threshold: float):
        self.model: Any = load(source)
        if self.model.num_classes < 1:
            raise ValueError(f"{source} has no classifier")
        self.transform, self.labels = preprocessing(self.model), class_labels(self.model, source)
        self.top, self.channels = min(top, self.model.num_classes), self.model.pretrained_cfg["input_size"][0]

    def read(self, source: str | Path | Image.Image) -> Tensor:
        image = self.open(source)
        try:
            return self.transform(image)
        except (ValueError, MemoryError, ArithmeticError) as error:  # too elongated
            width, height = get_image_size(image)
            reason = f"cannot be resized from {width}x{height}: {error or type(error).__name__}"
            raise OSError(f"{source}: {reason}") from error

    def predict(self, image: Tensor) -> tuple[list[Result], None]:
        logits = self.model(image[None])
        if logits.shape != (1, self.model.num_classes):
            raise ValueError(f"the output is {list(logits.shape)} for an image, not {self.model.num_classes} logits")
        best = logits.softmax(-1)[0].topk(self.top)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Result(self.labels[i] if self.labels else f"class {i}", score) for i, score in pairs], None


def is_local(config: ModelConfig) -> bool:
    return config.name.startswith("local-dir:")


def check_name(config: ModelConfig) -> None:
    """Raises:
    ConfigError: an unknown name; the message gives the nearest ones.
    """
    if not is_local(config) and not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name.split(".")[0], timm.list_models(), n=4)
        raise ConfigError(
            f"model.name: unknown model {config.name!r}; nearest: {', '.join(near) or 'none'}. "
            "For your own models, use --import MODULE, or imports: [MODULE] in the recipe"
        )


def model_cfg(config: ModelConfig) -> dict[str, Any]:
    """The ``pretrained_cfg`` of the recipe's model, without building it.

    Raises:
        ConfigError: an unknown model or invalid arguments.
    """
    check_name(config)
    if not is_local(config):
        return registered_cfg(config.name).to_dict() | (config.kwargs.get("pretrained_cfg_overlay") or {})
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return timm.create_model(config.name, **config.kwargs).pretrained_cfg
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise ConfigError(f"model {config.name!r} can't be created with {config.kwargs}: {error}") from error


def build_model(config: ModelConfig, classes: int, in_chans: int) -> Any:
    """Creates the recipe's model with timm, in training mode.

    Raises:
        ConfigError: an unknown name, invalid arguments, or fewer outputs than classes.
    """
    outputs = config.num_classes or classes
    if outputs < classes:
        raise ConfigError(f"model.num_classes is {outputs}, but the data have {classes} classes")
    rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    arguments: dict[str, Any] = {key: value for key, value in rates.items() if value is not None} | config.kwargs
    check_name(config)
    local = is_local(config)
    try:
        # timm's pretrained=True would neither check hashes nor try mirrors
        create: Any = (
            load if config.pretrained and not local else partial(timm.create_model, pretrained=config.pretrained)
        )
        model = create(config.name, num_classes=outputs, in_chans=in_chans, **arguments).train()
    except OSError as error:  # weights that cannot be fetched or read, whatever the arguments
        raise ConfigError(f"model {config.name!r}: {error}{RANDOM_WEIGHTS if config.pretrained else ''}") from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"model {config.name!r} can't be created with {arguments}: {error}") from error
    try:
        freeze(model, config.frozen_stages)
    except ValueError as error:
        raise ConfigError(f"model.frozen_stages: {error}") from None
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if config.sync_bn and torch.distributed.is_initialized():
        model = convert_sync_batchnorm(model)  # PyTorch's drops the activations in timm's norm layers
    return model


def freeze(model: nn.Module, stages: int) -> None:
    """Freezes the stem and the first ``stages`` stages, in evaluation mode; -1: nothing."""
    names = [name for named in (model.named_parameters(), model.named_modules()) for name, _ in named if name]
    modules = dict(model.named_modules())
    for name in names_of_stages(stages, model, dict(zip(names, names, strict=True)), modules):
        if name in modules:
            modules[name].register_forward_pre_hook(_evaluate)  # after the loop's model.train()
        else:
            model.get_parameter(name).requires_grad_(False)


def _evaluate(module: nn.Module, _: Any) -> None:
    module.training = False


def set_preprocessing(model: Any, preprocessing: dict[str, Any]) -> None:
    """Sets ``pretrained_cfg`` to the run's preprocessing and classes, without the published weights of that name."""
    cfg = model.pretrained_cfg
    kept = ("architecture", "classifier", "first_conv", "fixed_input_size", "min_input_size")
    model.pretrained_cfg = {key: cfg[key] for key in kept if cfg.get(key) is not None}
    model.pretrained_cfg |= preprocessing | {"num_classes": model.num_classes}


def growing_sizes(sizes: Sequence[int], model: nn.Module, input_size: Sequence[int]) -> list[int]:
    """The input sizes of progressive learning (EfficientNetV2, arXiv 2104.00298, section 4), by part of the run.

    Raises:
        ConfigError: they do not increase up to the model's input size, or the model does not support one of them.
    """
    channels, side, _ = input_size
    if not sizes:
        return [side]
    if list(sizes) != sorted(set(sizes)) or sizes[-1] != side:
        raise ConfigError(f"augment.sizes={list(sizes)} must increase and end at the input size {side}")
    training = model.training
    model.eval()
    for size in sizes[:-1]:
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"augment.sizes: the model does not support {size}x{size}: {error}") from None
    model.train(training)
    return list(sizes)


train, evaluate = deprecated.commands("classify")
