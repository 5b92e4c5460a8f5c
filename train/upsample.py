"""Training of UPLiFT for a frozen backbone, without labels (arXiv 2601.17950, section 3).

An image is halved ``loss.levels`` times, and the backbone's map of each size computed. From each of the smaller sizes,
the upsampler doubles the map until it has the side of the full image's; each step is compared with the backbone's own
map of that size by the mean squared error.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn

from ..configs.schema import ConfigError, UpsampleConfig, load_config
from ..heads.backbone import Backbone, power_of_two
from ..heads.body import build_body
from ..heads.checkpoint import load_dense, save_dense
from ..heads.upsamplers import UPLiFT
from . import task
from .data import Data, build_image_data
from .features import tensors_sha256
from .scoring import Losses, Metrics, Scorer
from .task import check_backbone, find_recipe, loop_problems, processes

OTHER_WEIGHTS = "; model.pretrained=false model.checkpoint=FILE takes other weights"
Level = tuple[Tensor, Tensor, int]  # image, its map, steps


class TrainedUPLiFT(UPLiFT):
    """UPLiFT whose forward pass takes all levels, as one call of a DDP module must."""

    def forward(self, levels: Sequence[Level]) -> list[list[Tensor]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [self.steps(*level) for level in levels]


class Task(task.Task):
    """An upsampler, and the backbone whose maps it learns to enlarge."""

    metrics: ClassVar = {
        "val_loss": "loss",
        "cosine": "cosine similarity, %",
        "bilinear": "cosine similarity of bilinear interpolation, %",
        "loss_ratio": "loss, % of that of bilinear interpolation",
    }
    shown = ("cosine", "bilinear", "loss_ratio")

    def __init__(self, config: UpsampleConfig, model: Any, data: Data, backbone: Backbone, device: torch.device):
        super().__init__(config, model, [], data)
        self.weights = tensors_sha256(sorted(backbone.state_dict().items()))
        self.backbone = backbone.requires_grad_(False).eval().to(device)
        self.input = f"{config.data.image_size}x{config.data.image_size}, {config.loss.levels} levels"
        self.identity = {
            "model": json.dumps(model.arguments, sort_keys=True),
            "backbone": f"{config.model.name} {json.dumps(config.model.kwargs, sort_keys=True)}",
            "weights of the backbone": self.weights,
            "input": self.input,
        }

    @classmethod
    def build(cls, config: UpsampleConfig, accelerator: Accelerator) -> "Task":
        problems = loop_problems(config)
        with problems:
            check_backbone(config)
        with problems:
            if not config.model.pretrained and config.model.checkpoint is None:
                raise ConfigError(
                    f"model.pretrained=false and model.checkpoint=null give {config.model.name} random weights: "
                    "an upsampler is trained for trained ones"
                )
        problems.raise_all()
        backbone = build_frozen(config)
        data = image_data(config, backbone, accelerator)
        model = TrainedUPLiFT(backbone.spec.channels[0], backbone.spec.strides[0])
        return cls(config, model, data, backbone, accelerator.device)

    @classmethod
    def load(cls, source: str | Path, overrides: list[str], accelerator: Accelerator) -> "Task":
        recipe = find_recipe(source)
        if recipe is None:
            raise ConfigError(f"{source} is no run of foveal train upsample, whose recipe names backbone and data")
        config = load_config(recipe, overrides, UpsampleConfig, {"output": "-"})
        backbone = build_frozen(config)
        data, model = image_data(config, backbone, accelerator, train=False), load_dense(source)
        own = cls(config, model, data, backbone, accelerator.device)
        trained = model.config.get("backbone", {}).get("weights_sha256")
        if trained != own.weights:
            raise ConfigError(
                f"{source} was trained for a backbone whose weights have the SHA-256 {trained}, those of "
                f"model.pretrained={config.model.pretrained}, model.checkpoint={config.model.checkpoint} "
                f"have {own.weights}"
            )
        return own

    @torch.no_grad()
    def pyramid(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Images and maps, halved 0, 1, ... ``loss.levels`` times."""
        side, found = images.shape[-1], []
        for level in range(self.config.loss.levels + 1):
            size = [side // 2**level] * 2
            image = images if level == 0 else F.interpolate(images, size, mode="bilinear", antialias=True)
            found.append((image, self.backbone(image)["0"]))
        return found

    def train_step(self, model: nn.Module, batch: Tensor, epoch: int) -> Tensor:
        pyramid = self.pyramid(batch)
        levels = [(*pyramid[level], level) for level in range(1, len(pyramid))]
        return self.loss(model(levels), pyramid)

    @staticmethod
    def loss(outputs: list[list[Tensor]], pyramid: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over all steps of all levels; the last step of a level has the size of the full image's map."""
        losses = [
            F.mse_loss(x.float(), pyramid[left][1].float())
            for steps in outputs
            for left, x in enumerate(reversed(steps))
        ]
        return torch.stack(losses).sum()

    def scorer(self) -> "UpsampleScorer":
        return UpsampleScorer()

    def predict(self, model: Any, batch: Tensor) -> tuple[Tensor, Losses]:
        """Sums over images: of the cosine similarity of the map from the smallest size, and of its interpolation, with
        the full image's map; of the loss, and of that of interpolation."""
        pyramid = self.pyramid(batch)
        maps, count = [x for _, x in pyramid], batch.new_tensor(len(batch))
        outputs = [model.steps(*pyramid[level], level) for level in range(1, len(pyramid))]
        bilinear = [
            [F.interpolate(x, larger.shape[-2:], mode="bilinear") for larger in reversed(maps[:level])]
            for level, x in enumerate(maps)
            if level
        ]
        alike = [F.cosine_similarity(x[-1][-1].float(), maps[0].float()) for x in (outputs, bilinear)]
        losses = [self.loss(x, pyramid) * count for x in (outputs, bilinear)]
        sums = [each.mean((1, 2)).sum() for each in alike]
        return torch.stack([*sums, *losses]), torch.stack([losses[0], count])[:, None]

    def save_weights(self, folder: Path, model: Any) -> None:
        images = {"in_chans": 3, "mean": list(self.backbone.mean), "std": list(self.backbone.std)}
        own = self.config.model
        backbone = {"name": own.name, "kwargs": own.kwargs, "stride": model.patch, "weights_sha256": self.weights}
        save_dense(folder, model, [], images, backbone=backbone)

    def describe(self) -> str:
        return f"UPLiFT on {self.config.model.name}'s map of stride {self.model.patch}, {self.input}"

    def examine(self, run: Path, model: nn.Module, title: str, draw: bool) -> dict[str, Any]:
        return {"n": self.score(model).n}


class UpsampleScorer(Scorer):
    """Cosine similarities in percent, means over positions and images, and the ratio of the losses."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, batch: Tensor, predictions: Tensor) -> int:
        self._sums = self._sums.to(predictions.device) + predictions
        return len(batch)

    def compute(self) -> Metrics:
        reduced: Any = reduce(self._sums, "sum")
        cosine, bilinear, loss, interpolated = (100 * reduced / max(self.n, 1)).tolist()
        return {"cosine": cosine, "bilinear": bilinear, "loss_ratio": 100 * loss / max(interpolated, 1e-12)}


class Predictor(task.Predictor):
    """There is none: an upsampler is a part of a model."""

    def __init__(self, source: str | Path, *, top: int, threshold: float):
        raise ValueError(
            f"{source} is an upsampler, which predicts nothing by itself: train a head with model.upsample={source}, "
            "or see its maps with foveal visualize --upsample"
        )

    def predict(self, image: Tensor) -> Any:
        raise NotImplementedError


def build_frozen(config: UpsampleConfig) -> Backbone:
    """The recipe's backbone, with one map.

    Raises:
        ConfigError: arguments or weights that do not fit, another stride, or an image that cannot be halved so often.
    """
    model, stride = config.model, config.model.stride
    given: dict[str, Any] = dict(pretrained=model.pretrained, checkpoint=model.checkpoint, upsampled=True)
    try:
        body, classifier = build_body(model.name, strides=(stride or 32,), **given, **model.kwargs)
        backbone = Backbone(body, classifier=classifier)
    except (ValueError, TypeError, RuntimeError, AssertionError, OSError) as error:
        hint = OTHER_WEIGHTS if model.pretrained and isinstance(error, OSError) else ""
        raise ConfigError(f"model {model.name!r} with {model.kwargs}: {error}{hint}") from error
    own, side = backbone.spec.strides[-1], config.data.image_size
    if stride is not None and stride not in (own, power_of_two(own)):
        raise ConfigError(f"model.stride: {model.name} has no map of stride {stride}")
    if len(backbone.spec) > 1:
        raise ConfigError(f"model.kwargs={model.kwargs} give maps of strides {backbone.spec.strides}, not one")
    least = own * 2**config.loss.levels
    if side % least:
        raise ConfigError(
            f"data.image_size={side} must be a multiple of {least}: stride {own}, loss.levels={config.loss.levels}"
        )
    return backbone


def image_data(config: UpsampleConfig, backbone: Backbone, accelerator: Accelerator, train: bool = True) -> Data:
    """The recipe's images, normalized as the backbone takes them."""
    statistics = dict(mean=config.data.mean or backbone.mean, std=config.data.std or backbone.std)
    return build_image_data(config, **statistics, train=train, **processes(accelerator))
