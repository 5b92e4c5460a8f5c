"""Chooses the recipe keys listed in ``auto`` from the data: input size, anchors, epochs, batch size and others.

These are rules of thumb, not measurements. Choices are printed; keys that are given are not chosen.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configs.schema import SCHEMAS, ConfigError, load_config
from .data.auto import DataSet, read_set, sizes
from .data.factory import choose_statistics, found_channels
from .data.index import DetectionIndex

# Total images of a run, from published and from random weights.
SEEN = {"classify": (30_000, 100_000), "detect": (16_000, 48_000), "segment": (16_000, 48_000)}
EPOCHS = {"classify": (5, 200), "detect": (12, 300), "segment": (12, 300)}
RATE = {"classify": (1e-4, 1e-3), "detect": (2e-4, 1.5e-3), "segment": (2e-4, 1.5e-3)}
BYTES = {"classify": 3_000, "detect": 3_500, "segment": 4_500}  # of float32 activations, per pixel of an image
LARGEST_BATCH = {"classify": 64, "detect": 16, "segment": 16}
ANCHORED = ("mask_rcnn", "cascade_mask_rcnn", "faster_rcnn")
OBJECT = 48  # smallest side, in pixels, for the lower quartile of the objects
Values = dict[str, Any]


def choose(config: Any, recipe: str) -> list[str]:
    """Sets the keys of ``config.auto``, in place, from the data, or from the run that ``resume=auto`` continues.

    Returns:
        lines for the log with the chosen values; empty if there are none.

    Raises:
        ConfigError: a key that cannot be chosen, or another ``data.kind``.
        DataError: invalid data.
    """
    return [*(_choose_keys(config, recipe) if config.auto else []), *_choose_statistics(config)]


def _choose_keys(config: Any, recipe: str) -> list[str]:
    if config.data.kind != "auto":
        raise ConfigError(f"{recipe}: auto={config.auto} needs data.kind=auto, not {config.data.kind}, or auto=[]")
    saved = Path(config.output) / "config.yaml"
    if config.resume == "auto" and saved.is_file():
        earlier = load_config(saved, (), SCHEMAS[config.task])
        values = {key: _get(earlier, key) for key in config.auto}
    else:
        values = _choices(config, read_set(config))
    unknown = [key for key in config.auto if key not in values]
    if unknown:
        raise ConfigError(f"{recipe}: unknown in auto: {', '.join(unknown)}; known: {', '.join(sorted(values))}")
    values = {key: value for key, value in values.items() if key in config.auto and value is not ...}
    for key, value in values.items():
        _set(config, key, value)
    config.auto = []
    text = " ".join(f"{key}={'null' if value is None else value}".replace(", ", ",") for key, value in values.items())
    return [f"chosen by the data, unless given: {text}"]


def _choose_statistics(config: Any) -> list[str]:
    saved = Path(config.output) / "config.yaml"
    if config.resume == "auto" and saved.is_file():
        earlier = load_config(saved, (), SCHEMAS[config.task]).data
        config.data.mean, config.data.std = config.data.mean or earlier.mean, config.data.std or earlier.std
    return list(filter(None, [choose_statistics(config)]))


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part, ...) if isinstance(config, dict) else getattr(config, part)
    return config


def _set(config: Any, key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    if isinstance(config, dict):
        config[last] = value
    else:
        setattr(config, last, value)


def _choices(config: Any, data: DataSet) -> Values:
    """Key -> value for all keys that can be chosen for a task; ``...`` for those that the model does not have."""
    task, model, channels = config.task, config.model, found_channels(data.train)
    first = int(not (model.pretrained or model.checkpoint or getattr(model, "segmenter", None)))
    count, pixels = len(data.train), sizes(data.train)
    values = {"detect": _detector, "segment": _segmenter, "classify": _classifier}[task](config, data, pixels)
    height, width = values.pop("input")
    low, high = EPOCHS[task]
    cuda = torch.cuda.is_available()
    half = cuda and torch.cuda.is_bf16_supported()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return values | {
        "train.batch_size": batch_size(task, height * width // (1 + half), count, memory()),
        "train.amp": "bf16" if half else "no",
        "schedule.epochs": int(np.clip(round(SEEN[task][first] / max(count, 1)), low, high)),
        "optim.lr": RATE[task][first],
        "model.frozen_stages": -1 if first else 0,
        "data.workers": min(8, max(1, cpus - 1)),
        "data.in_chans": channels,
    }


def memory() -> int:
    """Bytes of this process's GPU, else half of the machine's."""
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 2**32


def batch_size(task: str, pixels: int, count: int, memory: int) -> int:
    """The largest power of two that fits into half of ``memory`` and gives at least eight batches per epoch."""
    fits = memory // (2 * BYTES[task] * max(pixels, 1))
    most = min(fits, count // 8, LARGEST_BATCH[task])
    return 2 ** max(int(np.log2(max(most, 1))), 1 if task == "segment" else 0)


def _detector(config: Any, data: DataSet, pixels: np.ndarray) -> Values:
    index = data.train
    assert isinstance(index, DetectionIndex)
    segmented = bool(data.found.annotations) and all(each.get("segmentation") for each in data.found.annotations)
    learned = index.usable & ~index.crowd
    boxes = index.boxes[learned]
    of_image = index.sizes[np.repeat(np.arange(len(index)), np.diff(index.starts))][learned]
    sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
    relative = sides / of_image.min(1)
    quarter = np.quantile(relative, 0.25) if len(relative) else 0.1
    short = float(np.median(pixels.min(1)))
    least = np.clip(2 * short, 64, 256)
    size = _round(np.clip(OBJECT / quarter, least, np.clip(1.5 * short, least, 800)))
    aspect = float(np.clip(np.quantile(pixels.max(1) / pixels.min(1), 0.9), 1, 2))
    longest = _round(size * aspect, up=True)
    head = "mask_rcnn" if segmented else "faster_rcnn"
    used = config.model.head if "model.head" not in config.auto else head
    values: Values = {
        "input": (size, longest),
        "model.head": head,
        "data.min_size": size,
        "data.max_size": longest,
        "augment.min_size": [_round(0.8 * size), size, _round(1.2 * size)],
        "augment.max_size": _round(1.2 * longest, up=True),
        "model.head_kwargs.anchor_scale": ...,
        "model.head_kwargs.anchor_ratios": ...,
    }
    if used in ANCHORED and len(boxes):
        small, large = np.quantile(sides * size / of_image.min(1), [0.1, 0.9])
        scale = max(np.clip(small / 4, 2, 8), 0.7 * large / 64)  # the levels have strides 4 to 64
        values["model.head_kwargs.anchor_scale"] = round(2 * float(scale)) / 2
        values["model.head_kwargs.anchor_ratios"] = anchor_ratios(boxes[:, 3] / boxes[:, 2])
    return values


def anchor_ratios(ratios: np.ndarray) -> list[float]:
    """Median, 10 % and 90 % quantiles of height / width, without values within a factor of 1.25 of another."""
    chosen: list[float] = []
    for value in np.quantile(np.clip(ratios, 0.1, 10), [0.5, 0.1, 0.9]):
        if all(max(value / other, other / value) > 1.25 for other in chosen):
            chosen.append(round(float(value), 2))
    return sorted(chosen)


def _segmenter(config: Any, data: DataSet, pixels: np.ndarray) -> Values:
    short = float(np.median(pixels.min(1))) if len(pixels) else 512
    crop = _round(np.clip(short, 128, 512))
    scale = [2048, 640] if short > 1000 else None  # else a crop of a large image shows only a detail
    return {"input": (crop, crop), "augment.crop_size": [crop, crop], "augment.scale": scale, "eval.scale": scale}


def _classifier(config: Any, data: DataSet, pixels: np.ndarray) -> Values:
    short = float(np.median(pixels.min(1))) if len(pixels) else 224
    side = None if short >= 160 else _round(np.clip(short, 64, 160), up=True)
    return {"input": (side or 224, side or 224), "data.image_size": side, "model.frozen_stages": ...}


def _round(value: float, up: bool = False) -> int:
    """The nearest multiple of 32, or the next one if ``up``."""
    return int(-(-value // 32) * 32) if up else max(32, round(float(value) / 32) * 32)
