"""Semantic segmentation: training, evaluation and prediction."""

import io
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from PIL import Image
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model
from torch import Tensor, nn

from ..backbones.images import to_rgb
from ..backbones.loading import local_path
from ..configs.schema import ConfigError, SegmentConfig, load_config
from ..files import atomic
from ..heads.build import build_segmenter
from ..heads.checkpoint import load_dense, read_dense_config, save_dense
from ..heads.dense import same_draws
from ..heads.segmentation import Mask2Former, Segmenter, label_map
from ..heads.segmentation.inference import WHOLE, bounded, probability_bands, views_to_learn
from ..heads.segmentation.published import load_heads
from . import checkpoint, deprecated, plots, task
from .data import IGNORE, Data, SegmentationBatch, build_segmentation_data, find_classes
from .data.files import UNREADABLE
from .scoring import Losses, SegmentationScorer, autocast
from .task import Result, build_dense, check_backbone, find_recipe, loop_problems, processes, use_kept_split

KEYS = ("auxiliary", "ignored_in_mean")


class Task(task.Task):
    """A segmenter: images to logits ``[B, classes, H, W]``, in training perhaps also those of an auxiliary head; or
    Mask2Former, which computes its own loss."""

    metrics: ClassVar = {
        "val_loss": "loss",
        "miou": "mIoU",
        "mean_accuracy": "mean accuracy",
        "pixel_accuracy": "pixel accuracy",
    }
    shown = ("miou", "pixel_accuracy")
    pictures = 4
    model: Segmenter

    def __init__(self, config: SegmentConfig, model: Segmenter, classes: list[str], data: Data):
        super().__init__(config, model, classes, data)
        self.settings = inference(config)
        self.input = f"crop {'x'.join(map(str, config.augment.crop_size))}"
        self.identity = {
            "model": json.dumps(model.arguments, sort_keys=True),
            "classes": classes,
            "data.kind": config.data.kind,
            "evaluation": json.dumps(self.settings, sort_keys=True),
            "augmentation": json.dumps(vars(config.augment), sort_keys=True),
            # the keys of runs of 0.1.0, and others if set
            "loss": json.dumps({k: v for k, v in vars(config.loss).items() if k in KEYS or v}, sort_keys=True),
        }

    @classmethod
    def build(cls, config: SegmentConfig, accelerator: Accelerator) -> "Task":
        together = accelerator.num_processes if config.model.sync_bn else 1
        problems, classes = loop_problems(config), []
        with problems:
            check_backbone(config)
        with problems:
            inference(config)
        with problems:
            if config.model.head == "upernet" and config.train.batch_size * together == 1:
                raise ConfigError(
                    "train.batch_size=1: UPerNet has batch norms on maps of one pixel, which need two images or more"
                )
        if not problems.concern("data"):
            with problems:
                classes = find_classes(config.data)
        if classes:
            with problems:
                check_loss(config, len(classes))
        if classes and is_model(config.model.name) and not problems.concern("data"):
            with problems:
                cfg = get_pretrained_cfg(config.model.name) or PretrainedCfg()  # timm's for models without one
                data = segmentation_data(config, classes, cfg.mean, accelerator)
        problems.raise_all()
        config.data.classes = classes if config.data.kind == "auto" else config.data.classes
        model = build_model(config, len(classes))
        new = load_initial(model, config.model.segmenter) if config.model.segmenter is not None else []
        self = cls(config, model, classes, data)
        if new:
            self.notes.append(f"not in {config.model.segmenter} for these classes, so new: {', '.join(new)}")
        return self

    @classmethod
    def load(cls, source: str | Path, overrides: list[str], accelerator: Accelerator) -> "Task":
        model, recipe = load_dense(local_path(source)), find_recipe(source)
        defaults = {"output": "-", "model": {"name": model.arguments["name"]}}
        if recipe is None:  # evaluate with the settings of the training, unless overridden
            given = dict(model.config["preprocessing"].get("inference", {}))
            seen = {"antialias": given.pop("antialias", True), "in_chans": model.arguments.get("in_chans", 3)}
            defaults |= {"eval": given | {"mode": "slide" if given.get("crop_size") else "whole"}, "data": seen}
        config = load_config(recipe, overrides, SegmentConfig, defaults)
        use_kept_split(config, source, overrides)
        classes = find_classes(config.data)
        if len(classes) != model.arguments["num_classes"]:
            raise ConfigError(f"{source} has {model.arguments['num_classes']} classes, the data have {len(classes)}")
        if classes != model.classes and sorted(classes) == sorted(model.classes):
            theirs, ours = next(pair for pair in zip(classes, model.classes, strict=True) if pair[0] != pair[1])
            raise ConfigError(f"{source} has another order of classes: {ours} where the data have {theirs}")
        return cls(
            config,
            model,
            classes,
            segmentation_data(config, classes, model.mean.flatten().tolist(), accelerator, train=False),
        )

    def train_step(self, model: nn.Module, batch: SegmentationBatch, epoch: int) -> Tensor:
        if isinstance(self.model, Mask2Former):
            return torch.stack(list(model(batch.images, batch.targets).values()))
        output = model(batch.images)
        logits, extra = output if isinstance(output, tuple) else (output, None)
        given, settings = self.config.loss, self.loss_settings(logits.device)
        loss = segmentation_loss(logits, batch.targets, *settings)
        if extra is not None:
            loss = loss + given.auxiliary * segmentation_loss(extra, batch.targets, *settings)
        return loss

    def loss_settings(self, device: torch.device) -> tuple[bool, Tensor | None, float]:
        """The last arguments of `segmentation_loss`."""
        given = self.config.loss
        weights = None if given.class_weights is None else torch.tensor(given.class_weights, device=device)
        return given.ignored_in_mean, weights, given.focal_gamma

    @property
    def counts(self) -> bool:
        return isinstance(self.model, Mask2Former) or not self.config.loss.ignored_in_mean

    def normalizers(self, batch: SegmentationBatch) -> Tensor:
        if isinstance(self.model, Mask2Former):
            return self.model.normalizers(batch.targets).to(batch.targets.device)
        return (batch.targets != IGNORE).sum().float()[None]

    def scorer(self) -> SegmentationScorer:
        return SegmentationScorer(len(self.classes))

    @property
    def annotated(self) -> bool:
        return any(self.data.val.dataset.index.masks)

    def score(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> SegmentationScorer:
        if not self.annotated:
            return self._predict_all(model)
        scorer = super().score(model, on_batch)
        absent = [name for name, pixels, _ in self.by_class(scorer)[1] if not pixels]
        if absent:
            warnings.warn(
                f"no pixel of {', '.join(absent)} in the masks of {scorer.n} held-out images: their recall is left out "
                "of the mean, and their IoU is 0 where they are predicted, else left out",
                stacklevel=2,
            )
        return scorer

    def _predict_all(self, model: nn.Module) -> SegmentationScorer:
        """Keeps the classes of the pixels of all images, without figures."""
        scorer, dataset, state, start = self.scorer(), self.data.val.dataset, PartialState(), time.perf_counter()
        model.eval()
        self.data.bad.start(len(dataset))
        for number in range(state.process_index, len(dataset), state.num_processes):
            try:
                pixels = dataset.image(number)[None].to(self.data.val.device).float().div_(255)
            except UNREADABLE as error:
                self.data.bad.add([(dataset.index.name(number), f"{type(error).__name__}: {error}")])
                continue
            with autocast(pixels.device, self.config.train.amp):
                labels = label_map(model, pixels, **self.settings)[0]
            stored = io.BytesIO()
            class_image(labels.cpu().numpy().astype(np.uint8)).save(stored, format="PNG")
            scorer.masks.append((dataset.index.name(number), stored.getvalue()))
        scorer.masks = gather_object(scorer.masks)
        scorer.n = len(scorer.masks)
        scorer.images_per_second = scorer.n / (time.perf_counter() - start)
        scorer.metrics = dict.fromkeys(self.metrics)
        return scorer

    def write_predictions(self, scorer: SegmentationScorer, file: Path) -> Path:
        """Writes a PNG for each image, by its path below the data, into the folder ``file`` without its suffix."""
        folder, root = file.with_suffix(""), Path(self.config.data.root or "")
        names = [Path(name).relative_to(root) for name, _ in scorer.masks]
        count = Counter(name.with_suffix("") for name in names)
        for name, (_, content) in zip(names, scorer.masks, strict=True):
            place = folder / (name.with_suffix(".png") if count[name.with_suffix("")] == 1 else f"{name}.png")
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic(place) as new:
                new.write_bytes(content)
        return folder

    def predict(self, model: nn.Module, batch: SegmentationBatch) -> tuple[Tensor, Losses]:
        """Classes ``[B, H, W]`` of the pixels, and the losses of their probabilities; for Mask2Former, those of its
        queries, window by window."""
        images, targets = batch
        labels, losses = [], []
        with autocast(images.device, self.config.train.amp):
            for rows, band in probability_bands(model, images, **self.settings):
                labels.append(band.argmax(1))
                losses += [] if isinstance(model, Mask2Former) else [self._band_losses(band, targets[:, rows])]
            if isinstance(model, Mask2Former):
                for view, own in views_to_learn(images, targets, **self.settings):
                    with same_draws(view.device):
                        terms, counts = torch.stack(list(model(view, own).values())), model.normalizers(own)
                    losses.append(torch.stack([terms * counts.to(terms), counts.to(terms)]))
        return torch.cat(labels, 1), torch.stack(losses).sum(0)

    def _band_losses(self, probabilities: Tensor, targets: Tensor) -> Losses:
        """Of rows, from the probabilities ``[B, classes, rows, W]`` of their pixels."""
        ignored_in_mean, *settings = self.loss_settings(targets.device)
        known = targets != IGNORE
        sure = probabilities.gather(1, targets.where(known, 0)[:, None])[:, 0]
        each = pixel_losses(-sure.clamp(min=torch.finfo(sure.dtype).tiny).log(), targets, *settings)
        count = targets.numel() if ignored_in_mean else known.sum().item()
        return torch.stack([each[known].sum(), each.new_tensor(count)])[:, None]

    def result(self, scorer: SegmentationScorer) -> dict[str, Any]:
        return super().result(scorer) | {"iou": {name: iou for name, _, iou in self.by_class(scorer)[1]}}

    def by_class(self, scorer: SegmentationScorer) -> tuple[list[str], list[list[Any]]]:
        iou = [None if np.isnan(value) else value for value in scorer.iou.tolist()]
        rows = zip(self.classes, scorer.confusion.sum(1).tolist(), iou, strict=True)
        return ["class", "pixels", "iou"], [list(row) for row in rows]

    def save_weights(self, folder: Path, model: Any) -> None:
        mean, std = (getattr(model, name).flatten().tolist() for name in ("mean", "std"))
        images = {"in_chans": self.config.data.in_chans, "mean": mean, "std": std}
        save_dense(folder, model, self.classes, images | {"inference": self.settings})

    def example(self, model: nn.Module, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image, labels = self.data.val.dataset.read(number).values()
        pixels = image[None].to(self.data.val.device).float().div_(255)
        with autocast(pixels.device, self.config.train.amp):
            predicted = label_map(model, pixels, **self.settings)[0]
        return image.permute(1, 2, 0).numpy(), labels.numpy(), predicted.cpu().numpy()

    def plot(self, examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path, title: str) -> None:
        plots.segmentations(examples, self.classes, path, title)


class Predictor(task.Predictor):
    """Returns the class of each pixel, with the settings of the model's last evaluation; written as a palette image in
    Pascal VOC's colours."""

    formats = ("masks", "drawn")

    def __init__(self, source: str | Path, *, top: int, threshold: float):
        self.model = load_dense(source)
        self.settings = self.model.config["preprocessing"].get("inference", {})
        self.channels = self.model.arguments.get("in_chans", 3)

    def predict(self, image: Tensor) -> tuple[list[Result], np.ndarray]:
        settings = bounded(image.shape[-2:], self.settings)
        if settings != self.settings:
            warnings.warn(
                f"images of more than {WHOLE / 2**20:g} megapixels are predicted in windows of "
                f"{'x'.join(map(str, settings['crop_size']))}, to bound the memory; the model was evaluated on whole "
                "images (eval.mode, eval.scale)",
                stacklevel=2,
            )
        labels = label_map(self.model, image[None], **settings)[0].cpu().numpy().astype(np.uint8)
        shares = np.bincount(labels.ravel(), minlength=len(self.model.classes)) / labels.size
        order = [int(k) for k in np.argsort(-shares) if shares[k] > 0]
        return [Result(self.model.classes[k], float(shares[k])) for k in order], labels

    def draw(self, image: Tensor, found: np.ndarray, path: Path, title: str) -> None:
        """Blends the image with the colours of the classes."""
        pixels = to_rgb(image.permute(1, 2, 0).cpu().numpy()) * 255
        mixed = (pixels + plots.label_colours(256)[found]) / 2
        with atomic(path) as new:
            Image.fromarray(mixed.round().astype(np.uint8)).save(new, format="PNG")

    def masks(self, image: Tensor, found: np.ndarray, path: Path) -> None:
        with atomic(path) as new:
            class_image(found).save(new, format="PNG")


def class_image(labels: np.ndarray) -> Image.Image:
    """Classes uint8 ``[H, W]`` as a palette image in Pascal VOC's colours."""
    image = Image.fromarray(labels)
    image.putpalette(plots.label_colours(256).tobytes())
    return image


def build_model(config: SegmentConfig, num_classes: int) -> Segmenter:
    """The recipe's segmenter; see `build_dense`."""
    return build_dense(build_segmenter, config, num_classes)


def load_initial(model: Segmenter, source: str) -> list[str]:
    """Loads the initial weights of a whole segmenter from a run, a model folder, or the heads of a file with mmseg's
    names (`build_segmenter` loads its backbone), except classifiers for another number of classes.

    Returns:
        names of the tensors that were not loaded.
    """
    path = Path(source)
    try:
        if path.is_file():
            return load_heads(model, checkpoint.read_tensors(path))
        found = read_dense_config(path)
        if found is None:
            raise ValueError(f"{source} is neither a file nor a folder of a segmenter")
        tensors, own = checkpoint.read_tensors(checkpoint.find_weights(found[0])), model.state_dict()
        heads = [name for name in own if ".classifier.conv." in name and name in tensors]
        other = [name for name in heads if tensors[name].shape != own[name].shape]
        model.load_state_dict(tensors | {name: own[name] for name in other})
        return other
    except (ValueError, RuntimeError) as error:
        raise checkpoint.CheckpointError(f"model.segmenter: {error}") from None


def segmentation_data(
    config: SegmentConfig, classes: list[str], mean: Sequence[float], accelerator: Accelerator, train: bool = True
) -> Data:
    """The recipe's data; crops beyond the image are filled with the mean: the recipe's, or else ``mean``."""
    mean, channels = config.data.mean or mean, config.data.in_chans
    mean = list(mean) if len(mean) == channels else [sum(mean) / len(mean)] * channels
    return build_segmentation_data(config, classes, mean, train=train, **processes(accelerator))


def inference(config: SegmentConfig) -> dict[str, Any]:
    """The keyword arguments of `label_map` for a recipe's evaluation.

    Raises:
        ConfigError: sliding windows that would skip pixels, or windows with ``eval.mode=whole``.
    """
    given = config.eval
    if given.mode == "whole" and (given.crop_size or given.stride):
        raise ConfigError(
            f"eval.mode=whole with eval.crop_size={given.crop_size}, eval.stride={given.stride}: they need mode=slide"
        )
    window = None if given.mode == "whole" else list(given.crop_size or config.augment.crop_size)
    if window and given.stride and any(step > side for step, side in zip(given.stride, window, strict=True)):
        raise ConfigError(f"eval.stride={given.stride} exceeds the windows {window} and would skip pixels")
    return {
        "scale": given.scale,
        "size_divisor": given.size_divisor,
        "antialias": config.data.antialias,
        "crop_size": window,
        "stride": given.stride if window else None,
        "ratios": list(given.ratios),
        "flip": given.flip,
    }


def check_loss(config: SegmentConfig, classes: int) -> None:
    """Raises:
    ConfigError: class weights for another number of classes, or options that Mask2Former's loss does not have.
    """
    weights, gamma = config.loss.class_weights, config.loss.focal_gamma
    if config.model.head == "mask2former" and (weights is not None or gamma):
        raise ConfigError(f"loss.class_weights={weights}, loss.focal_gamma={gamma}: mask2former has its own loss")
    if weights is not None and len(weights) != classes:
        raise ConfigError(f"loss.class_weights has {len(weights)} values for {classes} classes")


def segmentation_loss(
    logits: Tensor, targets: Tensor, ignored_in_mean: bool, weights: Tensor | None = None, gamma: float = 0.0
) -> Tensor:
    """Cross-entropy of logits ``[B, classes, H, W]``, or focal loss if ``gamma``, weighted by class:
    the mean over pixels with a class or, with ``ignored_in_mean``, their sum divided by the number of all pixels."""
    if weights is None and not gamma:
        total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    else:
        each = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")
        total = pixel_losses(each, targets, weights, gamma).sum()
    pixels = targets.numel() if ignored_in_mean else (targets != IGNORE).sum().clamp(min=1)
    return total / pixels


def pixel_losses(each: Tensor, targets: Tensor, weights: Tensor | None, gamma: float) -> Tensor:
    """Cross-entropies of pixels, times the factor of the focal loss and the weight of their class."""
    # 1 - p, clamped: powers below 1 have an infinite slope at 0
    each = (-torch.expm1(-each)).clamp(min=1e-7) ** gamma * each if gamma else each
    return each if weights is None else each * weights[targets.where(targets != IGNORE, 0)]


train, evaluate = deprecated.commands("segment")
