"""From the ``data`` and ``augment`` sections of a recipe to the loaders of training and evaluation."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform

from ...configs.schema import ClassifyConfig, DataConfig
from . import files, idx, memory
from .guard import BadSamples, DataError, check_classes
from .order import EpochOrder, Normalize

Loader = memory.MemoryLoader | files.FileLoader
CHANNELS = (1, 3)


@dataclass
class Data:
    """What a run reads. ``train`` is None when only an evaluation was asked for."""

    train: Loader | None
    val: Loader
    preprocessing: dict[str, Any]  # timm's names: input_size, mean, std, interpolation, crop_pct, crop_mode
    bad: BadSamples


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
        raise DataError("WebDataset shards don't tell their classes: give data.num_classes or data.classes")
    check_classes(classes, f"data.kind={config.kind}")
    return classes


def _root(config: DataConfig) -> Path:
    if not config.root:
        raise DataError(f"data.root is needed for data.kind={config.kind}: the folder with {config.train_split!r}")
    return Path(config.root)


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
    build = _memory if data.kind in ("idx", "digits") else _files
    loaders = build(config, classes, preprocessing, bad, device, ("train", "val") if train else ("val",), rank, world)
    return Data(loaders.get("train"), loaders["val"], preprocessing, bad)


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


def _files(config, classes, preprocessing, bad, device, splits, rank, world) -> dict[str, files.FileLoader]:
    data, augment = config.data, config.augment
    shared = {"input_size": preprocessing["input_size"], "use_prefetcher": True}  # bytes out; normalised on the device
    transforms = {
        "train": lambda: create_transform(
            **shared,
            is_training=True,
            scale=tuple(augment.scale),
            ratio=tuple(augment.ratio),
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation,
            mean=tuple(preprocessing["mean"]),  # AutoAugment fills with it
        ),
        "val": lambda: create_transform(
            **shared,
            interpolation=preprocessing["interpolation"],
            crop_pct=preprocessing["crop_pct"],
            crop_mode=preprocessing["crop_mode"],
        ),
    }
    loaders = {}
    for split in splits:
        train = split == "train"
        name = data.train_split if train else data.val_split
        transform = transforms[split]()
        if data.kind == "folder":
            dataset = files.FolderImages(_root(data), name, classes, transform, data.in_chans, train)
            samples = len(dataset)
        else:
            dataset = files.ShardImages(
                str(_root(data)),
                name,
                transform,
                data.in_chans,
                train=train,
                seed=config.seed,
                rank=rank,
                world=world,
                workers=data.workers,
            )
            samples = dataset.samples
        order = _order(config, samples, train, rank, world)
        normalize = _normalize(config, preprocessing, train, device)
        loaders[split] = files.FileLoader(dataset, len(classes), order, normalize, bad, data.workers)
    return loaders
