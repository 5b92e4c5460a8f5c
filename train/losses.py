"""Losses, Mixup and CutMix, auxiliary heads and distillation for classifiers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ..backbones.loading import load, resolve
from ..configs.schema import ClassifyConfig, ConfigError


def build_losses(name: str, smoothing: float) -> tuple[nn.Module, nn.Module]:
    """The losses for class indices and for the soft targets of mixed images, which are smoothed already."""
    if name == "bce":
        return BinaryCrossEntropy(smoothing=smoothing), BinaryCrossEntropy(smoothing=0.0)
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss(), SoftTargetCrossEntropy()


def check_mix(config: ClassifyConfig) -> None:
    """Raises:
    ConfigError: an odd batch size with mixed images.
    """
    given, size = config.augment, config.train.batch_size
    if size % 2 and (given.mixup > 0 or given.cutmix > 0):
        raise ConfigError(
            f"train.batch_size={size} is odd, but augment.mixup={given.mixup:g}, augment.cutmix={given.cutmix:g} need "
            "pairs of images; 0 disables them"
        )


def build_mix(config: ClassifyConfig, num_classes: int) -> Mixup | None:
    """The recipe's Mixup and CutMix; None without them."""
    augment = config.augment
    if not (augment.mixup > 0 or augment.cutmix > 0):
        return None
    check_mix(config)
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=config.loss.smoothing,
        num_classes=num_classes,
    )


def prepare_heads(model: Any, config: ClassifyConfig) -> None:
    """Enables a model's auxiliary or distillation head in training if the recipe has a loss for it.

    Raises:
        ConfigError: a loss without the auxiliary head, or the head without a loss.
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
            f"{config.model.name} has an auxiliary head, but loss.auxiliary=0: set a weight, or remove the head from "
            "model.kwargs"
        )
    if config.distill.teacher is not None and hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # models without this head distil into their classifier


def check_teacher(source: str) -> None:
    """Raises:
    ConfigError: the teacher's name is unknown.
    """
    try:
        resolve(source)
    except ValueError as error:
        raise ConfigError(f"distill.teacher: {error}; distill.teacher=null disables distillation") from None


class Teacher:
    """A frozen classifier that is called with the student's batches and converts them to its own normalization.

    Args:
        source: a source for `foveal.load`.
        num_classes: outputs of the student.
        preprocessing: of the student's images (mean, std, input_size), from `build_classification_data`.
        classes: names of the student's classes. A teacher with the same name at another index is refused; unknown or
            missing names are accepted.

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
            self.model: Any = load(source, in_chans=channels).to(device).requires_grad_(False)
        except (ValueError, OSError) as error:
            raise ConfigError(f"distill.teacher: {error}; distill.teacher=null disables distillation") from None
        if self.model.num_classes != num_classes:
            raise ConfigError(
                f"distill.teacher: {source} has {self.model.num_classes} classes, the model has {num_classes}"
            )
        cfg = self.model.pretrained_cfg
        places: dict[str, int] = {name: i for i, name in enumerate(cfg.get("label_names") or ())}
        for i, name in enumerate(classes):
            if places.get(name, i) != i:
                raise ConfigError(f"distill.teacher: class {name!r} has index {places[name]} in {source}, {i} here")

        def by_channel(values: Sequence[float]) -> Tensor:
            # grey images for an RGB teacher: the mean of its values, as timm sums its first filters
            values = values if len(values) == channels else [sum(values) / len(values)] * channels
            return torch.tensor(values, device=device).view(1, -1, 1, 1)

        mean, std = by_channel(preprocessing["mean"]), by_channel(preprocessing["std"])
        own_mean, own_std = by_channel(cfg["mean"]), by_channel(cfg["std"])
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.size = tuple(cfg["input_size"][1:]) if cfg.get("fixed_input_size") else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]``, float32, for the student's batch ``[B, C, H, W]``."""
        images = images * self.scale + self.shift
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False)
        return self.model(images).float()


def distillation_loss(logits: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """Cross entropy with the teacher's argmax (``"hard"``), or the Kullback-Leibler divergence from its distribution
    times the squared temperature (``"soft"``: Hinton et al., arXiv 1503.02531); the mean over the batch."""
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    student, teacher = ((x / temperature).log_softmax(1) for x in (logits, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
