"""From the ``data`` and ``augment`` sections of a recipe to the loaders of training and evaluation."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...configs.schema import ClassifyConfig, DataConfig
from . import files, idx, memory, wds
from .guard import BadSamples, DataError, Excluded, check_classes
from .order import EpochOrder, Normalize
from .transforms import EvalTransform, TrainTransform

Loader = memory.MemoryLoader | files.FileLoader
CHANNELS = (1, 3)


@dataclass
class Data:
    """What a run reads. ``train`` is None when only an evaluation was asked for."""

    train: Loader | None
    val: Loader
    preprocessing: dict[str, Any]  # timm's names: input_size, mean, std, interpolation, crop_pct, crop_mode
    bad: BadSamples
    notes: list[str] = field(default_factory=list)  # for the user


def idx_root(config: DataConfig) -> Path:
    """Folder of the IDX files: ``data.root``, else the variable FOVEAL_FASHION_MNIST, else data/fashion-mnist."""
    return Path(config.root or os.environ.get("FOVEAL_FASHION_MNIST") or "data/fashion-mnist")


def find_classes(config: DataConfig) -> list[str]:
    """The class names of a data set by index, without reading its images.

    Raises:
        DataError: no names and no number are given where the data don't tell them, or the folders can't be used.
    """
    if config.classes is not None:
        classes = list(config.classes)
        if config.num_classes is not None and config.num_classes != len(classes):
            raise DataError(f"data.num_classes is {config.num_classes}, but data.classes names {len(classes)}")
    elif config.kind == "folder":
        classes = files.scan_folder(_root(config), config.train_split)
    elif config.kind == "digits":
        classes = list(memory.DIGITS)
    elif config.num_classes is not None:
        classes = [str(index) for index in range(config.num_classes)]
    elif config.kind == "idx":
        classes = list(idx.FASHION_MNIST)
    else:
        classes = wds.read_classes(_root_text(config))
    check_classes(classes, f"data.kind={config.kind}")
    return classes


def _root(config: DataConfig) -> Path:
    if not config.root:
        raise DataError(f"data.root is needed for data.kind={config.kind}: the folder with {config.train_split!r}")
    return Path(config.root)


def _root_text(config: DataConfig) -> str:
    """The root of shards, which may be an address."""
    return config.root if "://" in (config.root or "") else str(_root(config))


def _preprocessing(config: DataConfig, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation's preprocessing: the recipe's values over the model's ``pretrained_cfg``."""
    size = config.image_size or cfg["input_size"][-1]
    small = config.kind in ("idx", "digits")  # these are brought to the full input, without a crop
    result = {
        "input_size": (config.in_chans, size, size),
        "mean": list(config.mean or cfg["mean"]),
        "std": list(config.std or cfg["std"]),
        "interpolation": "bilinear" if small else config.interpolation or cfg["interpolation"],
        "crop_pct": 1.0 if small else config.crop_pct or cfg["crop_pct"],
        "crop_mode": "center" if small else cfg.get("crop_mode") or "center",
    }
    for key in ("mean", "std"):
        if len(result[key]) != config.in_chans:
            if getattr(config, key) is not None:
                raise DataError(f"data.{key} has {len(result[key])} values, data.in_chans is {config.in_chans}")
            result[key] = [sum(result[key]) / len(result[key])] * config.in_chans
    return result


def build_data(
    config: ClassifyConfig,
    classes: list[str],
    model_cfg: Mapping[str, Any],
    *,
    device: torch.device,
    train: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """Builds the loaders.

    Args:
        config: the whole recipe.
        classes: names by index, from :func:`find_classes`.
        model_cfg: the model's ``pretrained_cfg``, for what the recipe leaves open.
        device: where batches go.
        train: False builds the evaluation loader alone.

    Raises:
        DataError: data that are missing, damaged or out of range.
    """
    data = config.data
    if data.in_chans not in CHANNELS:
        raise DataError(f"data.in_chans is {data.in_chans}; images have 1 (grey) or 3 (RGB) channels")
    preprocessing = _preprocessing(data, model_cfg)
    bad = BadSamples(data.max_bad_fraction)
    splits = ("train", "val") if train else ("val",)
    if data.kind in ("idx", "digits"):
        if data.exclude is not None:
            raise DataError(f"data.exclude={data.exclude}: data.kind={data.kind} has no names to leave out")
        loaders = _memory(config, classes, preprocessing, bad, device, splits, rank, world)
        return Data(loaders.get("train"), loaders["val"], preprocessing, bad)
    excluded = Excluded.read(data.exclude)
    loaders = _files(config, classes, preprocessing, bad, device, splits, rank, world, excluded)
    notes = [excluded.note()] if excluded else []
    return Data(loaders.get("train"), loaders["val"], preprocessing, bad, notes)


def _order(config: ClassifyConfig, samples: int, train: bool, rank: int, world: int) -> EpochOrder:
    batch_size = config.train.batch_size if train else config.train.val_batch_size or config.train.batch_size
    return EpochOrder(samples, batch_size, train=train, seed=config.seed, rank=rank, world=world)


def _normalize(config: ClassifyConfig, preprocessing: dict, train: bool, device: torch.device) -> Normalize:
    erase = config.augment.erase if train else 0.0
    return Normalize(preprocessing["mean"], preprocessing["std"], device, erase, config.augment.erase_mode)


def _memory(config, classes, preprocessing, bad, device, splits, rank, world) -> dict[str, memory.MemoryLoader]:
    data = config.data
    in_chans, size, _ = preprocessing["input_size"]
    arrays: dict[str, tuple[np.ndarray, np.ndarray]]
    if data.kind == "digits":
        arrays = memory.load_digits(data.val_fraction)
    else:
        arrays = {split: idx.read_split(idx_root(data), split) for split in splits}
    loaders = {}
    for split in splits:
        train = split == "train"
        limit = data.limit if train else data.val_limit
        images, targets = (array[:limit] for array in arrays[split])
        loaders[split] = memory.MemoryLoader(
            memory.resize_images(images, size, in_chans),
            targets,
            len(classes),
            _order(config, len(images), train, rank, world),
            _normalize(config, preprocessing, train, device),
            config.augment if train else None,
        )
    return loaders


def _files(config, classes, preprocessing, bad, device, splits, rank, world, excluded) -> dict[str, files.FileLoader]:
    data = config.data
    loaders = {}
    for split in splits:
        train = split == "train"
        name = data.train_split if train else data.val_split
        if train:
            transform = TrainTransform(
                config.augment, data.decode, preprocessing["input_size"], tuple(preprocessing["mean"])
            )
        else:
            transform = EvalTransform(preprocessing)
        shared = {"train": train, "seed": config.seed, "excluded": excluded}
        normalize = _normalize(config, preprocessing, train, device)
        loader = files.FileLoader
        if data.kind == "folder":
            dataset = files.FolderImages(_root(data), name, classes, transform, **shared)
        else:
            root = _root_text(data)
            shards, lengths, samples = wds.find_shards(root, name, train)
            if any(wds.is_streamed(shard) for shard in shards):
                split_up = {"rank": rank, "world": world, "workers": data.workers}
                dataset, loader = wds.StreamedImages(shards, transform, **shared, **split_up), files.StreamLoader
            else:
                dataset = wds.ShardImages(root, wds.load_index(root, name, shards, lengths), transform, **shared)
        if loader is files.FileLoader:
            samples = len(dataset)
        if not samples:
            raise DataError(f"the split {name!r} in {data.root} has no images")
        order = _order(config, samples, train, rank, world)
        loaders[split] = loader(dataset, len(classes), order, normalize, bad, data.workers)
    return loaders
