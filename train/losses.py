"""What a classifier is trained with: losses, mixed images, a second head, a teacher."""

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
    """The loss for class indices, and that for mixed targets, which are smoothed already."""
    if name == "bce":
        return BinaryCrossEntropy(smoothing=smoothing), BinaryCrossEntropy(smoothing=0.0)
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss(), SoftTargetCrossEntropy()


def check_mix(config: ClassifyConfig) -> None:
    """Raises:
    ConfigError: an odd batch, where images are mixed.
    """
    given, size = config.augment, config.train.batch_size
    if size % 2 and (given.mixup > 0 or given.cutmix > 0):
        raise ConfigError(
            f"train.batch_size={size} is odd, and augment.mixup={given.mixup:g}, augment.cutmix={given.cutmix:g} pair "
            "images; 0 turns them off"
        )


def build_mix(config: ClassifyConfig, num_classes: int) -> Mixup | None:
    """Mixup and CutMix, where the recipe has them."""
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
    """Turns on a model's second head in training when the recipe has a loss for it.

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
            f"{config.model.name} has an auxiliary head, which loss.auxiliary=0 would not train: give it a weight, or "
            "leave the head out of model.kwargs"
        )
    if config.distill.teacher is not None and hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # its second head learns from the teacher; another model's only head does


def check_teacher(source: str) -> None:
    """Raises:
    ConfigError: the teacher's name is unknown.
    """
    try:
        resolve(source)
    except ValueError as error:
        raise ConfigError(f"distill.teacher: {error}; distill.teacher=null trains without one") from None


class Teacher:
    """A frozen classifier that takes the student's batches, normalised for the student, and sees them as it was trained
    to.

    Args:
        source: as `foveal.load` takes it.
        num_classes: outputs of the student.
        preprocessing: of the student's images (mean, std, input_size), from `build_classification_data`.
        classes: names of the student's classes. A teacher that has one of them at another index is refused; one with
            other names, or none, is trusted.

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
            raise ConfigError(f"distill.teacher: {error}; distill.teacher=null trains without one") from None
        if self.model.num_classes != num_classes:
            raise ConfigError(
                f"distill.teacher: {source} has {self.model.num_classes} classes, the model has {num_classes}"
            )
        cfg = self.model.pretrained_cfg
        places: dict[str, int] = {name: i for i, name in enumerate(cfg.get("label_names") or ())}
        for i, name in enumerate(classes):
            if places.get(name, i) != i:
                raise ConfigError(f"distill.teacher: class {name!r} is number {places[name]} of {source}, here {i}")

        def by_channel(values: Sequence[float]) -> Tensor:
            # an RGB teacher of grey images: the mean of its channels, as timm sums its first filters
            values = values if len(values) == channels else [sum(values) / len(values)] * channels
            return torch.tensor(values, device=device).view(1, -1, 1, 1)

        mean, std = by_channel(preprocessing["mean"]), by_channel(preprocessing["std"])
        own_mean, own_std = by_channel(cfg["mean"]), by_channel(cfg["std"])
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.size = tuple(cfg["input_size"][1:]) if cfg.get("fixed_input_size") else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The student's batch ``[B, C, H, W]`` to logits ``[B, num_classes]``, float32."""
        images = images * self.scale + self.shift
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False)
        return self.model(images).float()


def distillation_loss(logits: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """Cross entropy with the teacher's decision (``"hard"``), or the Kullback-Leibler divergence from its distribution
    times the squared temperature (``"soft"``: Hinton et al., arXiv 1503.02531); both a mean over the batch."""
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    student, teacher = ((x / temperature).log_softmax(1) for x in (logits, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
