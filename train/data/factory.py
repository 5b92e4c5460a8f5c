"""Builds the training and evaluation loaders from the ``data`` and ``augment`` sections of a recipe."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ...backbones.images import MODES, image_shape, read_pixels
from ...configs.schema import (
    ClassifyConfig,
    DataConfig,
    DetectConfig,
    DetectDataConfig,
    ProbeConfig,
    SegmentConfig,
    SegmentDataConfig,
    UpsampleConfig,
    UpsampleDataConfig,
)
from . import auto, corruption, folder, idx, masks, memory, wds
from .class_names import DIGITS, FASHION_MNIST
from .coco import read_coco
from .composites import write_composites
from .dataset import ClassificationDataset, DetectionDataset, SegmentationDataset, SquashedImages
from .dense_transforms import detection_transform, segmentation_transform
from .files import UNREADABLE, Files
from .formats import first_names
from .guard import BadSamples, DataError, Excluded, check_classes
from .index import DetectionIndex, Index, encode_paths
from .loader import ClassificationLoader, DetectionLoader, ImagesLoader, Loader, SegmentationLoader, StreamLoader
from .order import EpochOrder, Normalize, probe_batch
from .transforms import EvalTransform, TrainTransform
from .voc import read_voc

HEADERS = 2_000  # images per split whose number of channels is checked before a run
SAMPLED = 50  # images for the mean and std of other than 1 or 3 channels


@dataclass
class Data:
    """The data of a run; ``train`` is None for an evaluation alone."""

    train: Loader | memory.MemoryLoader | None
    val: Loader | memory.MemoryLoader
    bad: BadSamples
    notes: list[str]  # for the log: what was left out
    preprocessing: dict[str, Any] = field(default_factory=dict)  # timm's names: input_size, mean, std, crop_pct, ...
    categories: dict[int, str] = field(default_factory=dict)  # detect: id -> name; labels count them from 0
    division: auto.Division | None = None  # data.kind=auto: which images are held out


class _Builder:
    """The parts that all tasks share: limits, order, exclusions and notes."""

    def __init__(
        self,
        config: ClassifyConfig | DetectConfig | SegmentConfig | UpsampleConfig | ProbeConfig,
        rank: int,
        world: int,
    ):
        self.config, self.rank, self.world = config, rank, world
        data = config.data
        if data.in_chans not in MODES and data.kind in ("idx", "digits"):
            raise DataError(f"data.in_chans is {data.in_chans}; images of data.kind={data.kind} have 1 or 3 channels")
        self.bad, self.excluded = BadSamples(data.max_bad_fraction), Excluded.read(data.exclude)
        self.notes: list[str] = []
        if colours := colour_changes(getattr(config, "augment", None)) if data.in_chans not in MODES else []:
            self.notes.append(f"{data.in_chans} channels are not colours, so {', '.join(colours)} is off")

    def check_channels(self, index: Index) -> None:
        """Raises:
        DataError: images whose headers have another number of channels than the recipe; names the first.
        """
        channels = self.config.data.in_chans
        other: dict[int, list[str]] = defaultdict(list)
        for number in range(0, len(index.paths), -(-len(index.paths) // HEADERS) or 1):
            name = index.name(number)
            if channels in MODES and not name.lower().endswith((".npy", ".tif", ".tiff")):
                continue
            with suppress(*UNREADABLE):  # reported where it is read
                found = image_shape(name, channels)[2]
                if found not in (MODES if channels in MODES else (channels,)):
                    other[found].append(name)
        if other:
            text = "; ".join(f"{len(names):,} with {count}: {first_names(names)}" for count, names in other.items())
            raise DataError(f"images without data.in_chans={channels} channels: {text}")

    def limit(self, training: bool) -> int | None:
        return self.config.data.limit if training else self.config.data.val_limit

    def order(self, samples: int, training: bool, classes: Sequence[Sequence[int]] | None = None) -> EpochOrder:
        """The order of the samples; ``classes`` of each sample are for ``data.sampling=balanced``."""
        if not samples:
            raise DataError(f"no image to {'train' if training else 'evaluate'} on in {self.config.data.root}")
        train = self.config.train
        if training and train.batch_size is None:  # of a probe
            train.batch_size = probe_batch(samples, self.config.optim.lr_batch or 256)
        batch_size = train.batch_size if training else train.val_batch_size or train.batch_size
        kind = {"train": training, "seed": self.config.seed, "rank": self.rank, "world": self.world}
        balanced = training and self.config.data.sampling == "balanced"
        if balanced and classes is None:
            raise DataError("data.sampling=balanced: the classes of streamed shards are not known in advance")
        weights = balanced_weights(classes) if balanced and classes is not None else None
        return EpochOrder(samples, batch_size, weights=weights, **kind)

    def build(self, loader: Callable[[bool], Any], train: bool) -> Data:
        """Calls ``loader(training)`` for evaluation and, if ``train``, for training."""
        loaders = {training: loader(training) for training in ((True, False) if train else (False,))}
        if self.excluded:
            self.notes.append(self.excluded.note())
        return Data(loaders.get(True), loaders[False], self.bad, self.notes)


def colour_changes(augment: Any) -> list[str]:
    """The keys of colour augmentations that are on."""
    keys = ("color_jitter", "auto_augment", "photometric")
    return [f"augment.{key}" for key in keys if getattr(augment, key, None)]


def found_channels(index: Index) -> int:
    """The number of channels of the first readable image; also 3 for grey images."""
    for number in range(min(len(index.paths), SAMPLED)):
        with suppress(*UNREADABLE):
            found = image_shape(index.name(number))[2]
            return 3 if found in MODES else found
    return 3


def choose_statistics(config: Any) -> str:
    """Sets ``data.mean`` and ``data.std`` of images that are neither grey nor RGB, unless given, to those of some
    training images; returns a line for the log, or an empty string.

    Raises:
        DataError: no image can be read.
    """
    data = config.data
    given = data.mean is not None and data.std is not None
    if data.in_chans in MODES or data.kind in ("idx", "digits") or given:
        return ""
    index = _training_images(config)
    sums, count, read = np.zeros((2, data.in_chans)), 0, 0
    for number in range(0, len(index), -(-len(index) // SAMPLED) or 1):
        with suppress(*UNREADABLE), index.open(number) as file:
            pixels = np.asarray(read_pixels(file, data.in_chans), np.float64).reshape(data.in_chans, -1) / 255
            sums += (pixels.sum(1), (pixels**2).sum(1))
            count, read = count + pixels.shape[1], read + 1
    if not read:
        raise DataError(f"no training image of data.in_chans={data.in_chans} channels in {data.root}")
    mean = sums[0] / count
    std = np.sqrt(np.maximum(sums[1] / count - mean**2, 1e-12))
    mean, std = ([float(f"{value:.4g}") for value in values] for values in (mean, std))
    data.mean, data.std = data.mean or mean, data.std or std
    text = f"data.mean={data.mean} data.std={data.std}".replace(", ", ",")
    return f"of {read} training images, can be given: {text}"


def _training_images(config: Any) -> Index:
    data = config.data
    if data.kind == "auto":
        return auto.read_set(config).train
    if config.task == "detect":
        return _read_boxes(data, _dense_root(data), True, False, None)
    if config.task == "segment":
        return masks.read_masks(_dense_root(data), data, masks.split_name(data, True), len(find_classes(data)))
    root = _root(data)
    if data.kind == "folder":
        return folder.read_folder(Path(root), data.train_split, find_classes(data))
    shards, lengths, _ = wds.find_shards(root, data.train_split, True)
    if any(map(wds.is_streamed, shards)):
        raise DataError(f"data.in_chans={data.in_chans} of streamed shards needs data.mean and data.std")
    return wds.load_index(root, data.train_split, shards, lengths)


def balanced_weights(classes: Sequence[Sequence[int]]) -> np.ndarray:
    """Sampling weights, float ``[N]``, from the classes of each sample. With one class per sample, 1 / its number of
    samples, so that all classes are drawn equally often. With several, the largest 1 / square root of it, as in LVIS's
    repeat factor sampling (arXiv 1908.03195, appendix B); without classes, the smallest weight. Raises `DataError`
    if no sample has a class."""
    own = [np.unique(each) for each in classes]
    if not any(map(len, own)):
        raise DataError("data.sampling=balanced: no training image has a class")
    counts = np.bincount(np.concatenate(own).astype(np.int64))
    power = 1.0 if all(len(each) == 1 for each in own) else 0.5
    weights = np.array([(counts[each] ** -power).max() if len(each) else 0 for each in own])
    return np.where(weights > 0, weights, weights[weights > 0].min())


# ---- classification


def idx_root(config: DataConfig) -> Path:
    """Folder of the IDX files: ``data.root``, else the variable FOVEAL_FASHION_MNIST, else data/fashion-mnist."""
    return Path(config.root or os.environ.get("FOVEAL_FASHION_MNIST") or "data/fashion-mnist")


def _root(config: DataConfig) -> str:
    """The root of folders or shards; shards may be at a URL."""
    if not config.root:
        raise DataError(f"data.root is needed for data.kind={config.kind}: the folder with {config.train_split!r}")
    return config.root if "://" in config.root else str(Path(config.root))


def find_classes(config: DataConfig | SegmentDataConfig) -> list[str]:
    """The class names of a data set by index, without reading its images.

    Raises:
        DataError: neither the recipe nor the data name the classes, or the folders can't be used.
    """
    if config.kind == "auto":
        return check_classes(auto.find_classes(config), f"data.kind=auto, {config.root}")
    if isinstance(config, SegmentDataConfig):
        return masks.find_classes(config)
    if config.classes is not None:
        classes = config.classes
        if config.num_classes is not None and config.num_classes != len(classes):
            raise DataError(f"data.num_classes is {config.num_classes}, but data.classes names {len(classes)}")
    elif config.kind == "folder":
        classes = folder.scan_folder(Path(_root(config)), config.train_split)
    elif config.kind == "digits":
        classes = DIGITS
    elif config.num_classes is not None:
        classes = [str(index) for index in range(config.num_classes)]
    elif config.kind == "idx":
        classes = FASHION_MNIST
    else:
        classes = wds.read_classes(_root(config))
    return check_classes(classes, f"data.kind={config.kind}")


def _preprocessing(config: DataConfig, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation's preprocessing: the recipe's values, else those of the model's ``pretrained_cfg``."""
    size = config.image_size or cfg["input_size"][-1]
    small = config.kind in ("idx", "digits")  # resized to the full input, not cropped
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


def build_classification_data(
    config: ClassifyConfig | ProbeConfig,
    classes: list[str],
    model_cfg: Mapping[str, Any],
    *,
    device: torch.device,
    train: bool = True,
    augment: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """Builds the loaders.

    Args:
        config: the whole recipe.
        classes: names by index, from :func:`find_classes`.
        model_cfg: the model's ``pretrained_cfg``, for preprocessing that the recipe does not set.
        device: of the batches.
        train: False builds the evaluation loader alone.
        augment: False: the training images as those of an evaluation, all of them and in order.
        rank, world: this process and the number of processes.

    Raises:
        DataError: missing, damaged or invalid data.
    """
    builder, data = _Builder(config, rank, world), config.data
    in_memory = data.kind in ("idx", "digits")
    found = None
    if data.kind == "auto":
        found = auto.read_set(replace(config, data=replace(data, classes=classes)), train=train)
        builder.notes += found.lines()
    if in_memory and data.exclude is not None:
        raise DataError(f"data.exclude={data.exclude}: the images of data.kind={data.kind} have no names")
    preprocessing = _preprocessing(data, model_cfg)
    loader = partial(_memory_loader if in_memory else _file_loader, builder, config, classes, preprocessing, device)
    loader = partial(loader, augment=augment)
    if found is not None:
        loader = partial(loader, found=found)
    built = builder.build(loader, train)
    return replace(built, preprocessing=preprocessing, division=found and found.division)


def _normalize(
    config: ClassifyConfig | ProbeConfig, preprocessing: dict[str, Any], training: bool, device: torch.device
) -> Normalize:
    erase = config.augment.erase if training else 0.0
    return Normalize(preprocessing["mean"], preprocessing["std"], device, erase, config.augment.erase_mode)


def _memory_loader(
    builder: _Builder,
    config: ClassifyConfig | ProbeConfig,
    classes: Sequence[str],
    preprocessing: dict[str, Any],
    device: torch.device,
    training: bool,
    augment: bool,
) -> memory.MemoryLoader:
    split, learns = "train" if training else "val", training and augment
    if config.data.kind == "digits":
        arrays = memory.load_digits(config.data.val_fraction)[split]
    else:
        arrays = idx.read_split(idx_root(config.data), split)
    images, targets = (array[: builder.limit(training)] for array in arrays)
    in_chans, size, _ = preprocessing["input_size"]
    resized = memory.resize_images(images, size, in_chans)
    change = None if training else corruption.only(config.data.corruption, preprocessing["input_size"])
    if change is not None:
        resized = torch.stack([change(image) for image in resized])
    return memory.MemoryLoader(
        resized,
        targets,
        len(classes),
        builder.order(len(images), learns, targets[:, None]),
        _normalize(config, preprocessing, learns, device),
        config.augment if learns else None,
    )


def _file_loader(
    builder: _Builder,
    config: ClassifyConfig | ProbeConfig,
    classes: Sequence[str],
    preprocessing: dict[str, Any],
    device: torch.device,
    training: bool,
    augment: bool,
    found: auto.DataSet | None = None,
) -> ClassificationLoader:
    data = config.data
    name, root = data.train_split if training else data.val_split, _root(data)
    assert (found is None) == (data.kind != "auto")
    learns = training and augment
    if learns:
        shape, mean = preprocessing["input_size"], tuple(preprocessing["mean"])
        transform = TrainTransform(config.augment, data.decode, shape, mean)
    else:
        change = None if training else corruption.only(data.corruption, preprocessing["input_size"])
        transform = EvalTransform(preprocessing, change)
    kind: dict[str, Any] = {"train": learns, "seed": config.seed}
    further = _normalize(config, preprocessing, learns, device), builder.bad, data.workers
    if found is not None:
        index: Any = found.train if training else found.val
    elif data.kind == "folder":
        index = folder.read_folder(Path(root), name, classes)
        builder.notes += filter(None, [str(index.report)])
        builder.bad.reports.append(index.report)
    else:
        shards, lengths, samples = wds.find_shards(root, name, learns)
        if any(map(wds.is_streamed, shards)):
            kind |= {"rank": builder.rank, "world": builder.world, "workers": data.workers}
            stream = wds.StreamedImages(shards, transform, excluded=builder.excluded, **kind)
            return StreamLoader(stream, len(classes), builder.order(samples, learns), *further)
        index = wds.load_index(root, name, shards, lengths)
    index.exclude(builder.excluded, root)
    builder.check_channels(index)
    dataset = ClassificationDataset(index, transform, **kind)
    return ClassificationLoader(
        dataset, len(classes), builder.order(len(index), learns, index.label[:, None]), *further
    )


# ---- detection and segmentation


def _dense_root(config: DetectDataConfig | SegmentDataConfig | UpsampleDataConfig) -> Path:
    """``data.root``; for ``data.kind=digits``, composites are written there if missing."""
    if not config.root:
        raise DataError(f"data.root is needed for data.kind={config.kind}")
    root = Path(config.root)
    if config.kind == "digits":
        with PartialState().main_process_first():  # the others find them on disk
            write_composites(root, config.digits_train, config.digits_val, config.digits_size, seed=0)
    if not root.is_dir():
        raise DataError(f"the data folder {root} does not exist (data.root)")
    return root


def build_detection_data(
    config: DetectConfig,
    *,
    masks: bool,
    device: torch.device,
    categories: dict[int, str] | None = None,
    train: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """As :func:`build_classification_data`, for detectors.

    Args:
        masks: whether the detector learns masks.
        categories: id -> name of a trained model's classes; None: those of the training annotations.
    """
    builder, data = _Builder(config, rank, world), config.data
    if data.kind == "voc" and masks:
        raise DataError("data.kind=voc has boxes only, but this detector needs masks")
    root = _dense_root(data)
    found = auto.read_set(config, masks=masks, categories=categories, train=train) if data.kind == "auto" else None
    builder.notes += found.lines() if found is not None else []

    def loader(training: bool) -> DetectionLoader:
        nonlocal categories
        index: Any
        if found is not None:
            index = found.train if training else found.val
        else:
            index = _read_boxes(data, root, training, masks, categories)
        categories = index.categories
        if training or train or len(index.crowd):
            _check_objects(index, training)
        _choose_images(index, builder, data, training)
        builder.check_channels(index)
        transform = detection_transform(config.augment, data.in_chans in MODES) if training else None
        dataset = DetectionDataset(index, data.in_chans, transform, config.seed)
        balanced = training and data.sampling == "balanced"
        classes = [index.learned_labels(number) for number in range(len(index))] if balanced else None
        return DetectionLoader(dataset, builder.order(len(index), training, classes), device, builder.bad, data.workers)

    built = builder.build(loader, train)
    return replace(built, categories=categories, division=found and found.division)


def _read_boxes(
    data: DetectDataConfig, root: Path, training: bool, masks: bool, categories: dict[int, str] | None
) -> DetectionIndex:
    annotations = data.train_annotations if training else data.val_annotations
    given: dict[str, Any] = {"categories": categories, "classes": data.classes}
    if data.kind == "voc":
        return read_voc(root, annotations, train=training, **given)
    images = root / (data.train_images if training else data.val_images)
    return read_coco(root / annotations, images, masks=masks, **given)


def _check_objects(index: DetectionIndex, training: bool) -> None:
    """Raises:
    DataError: all objects are crowds or unusable; names the first.
    """
    if (~index.crowd & (index.usable | (not training))).any():
        return
    names, images = list(index.categories.values()), np.repeat(np.arange(len(index)), np.diff(index.starts))
    examples = [
        f"{index.name(images[row])}: {names[index.labels[row]]} at {index.boxes[row].tolist()}"
        + ", a crowd" * bool(index.crowd[row])
        for row in range(min(3, len(index.crowd)))
    ]
    raise DataError(
        f"{index.report.source}: none of {len(index.crowd):,} objects can be {'learned' if training else 'scored'} "
        f"(crowds and difficult ones are ignored). {'; '.join(examples)} {index.report}".strip()
    )


def _choose_images(index: DetectionIndex, builder: _Builder, data: DetectDataConfig, training: bool) -> None:
    """Keeps the images of ``index`` that exist, are not excluded and, in training, have objects; at most the limit.

    Raises:
        DataError: no image remains, or more files are missing than the recipe allows.
    """
    source = index.report.source
    builder.bad.reports.append(index.report)
    builder.notes += filter(None, [str(index.report)])
    index.exclude(builder.excluded, data.root or "")
    there = np.array([os.path.isfile(path) for path in index.paths])
    if not there.any():
        raise DataError(f"none of the {len(there)} images of {source} exists; the first is {index.name(0)}")
    gone = [index.name(number) for number in np.flatnonzero(~there).tolist()]
    builder.bad.start(len(there))
    builder.bad.add((name, "the file does not exist") for name in gone)
    if gone:
        builder.notes.append(f"{source}: {len(gone):,} images don't exist, first {gone[0]}")
    keep = there if data.keep_empty or not training else there & (index.objects() > 0)
    if not keep.any():
        raise DataError(f"{source} has no image with an object to learn (data.keep_empty keeps images without)")
    if empty := int(there.sum() - keep.sum()):
        builder.notes.append(f"{source}: {empty:,} images without objects left out of training (data.keep_empty)")
    index.select(np.flatnonzero(keep)[: builder.limit(training)])


def build_segmentation_data(
    config: SegmentConfig,
    classes: Sequence[str],
    mean: Sequence[float],
    *,
    device: torch.device,
    train: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """As :func:`build_classification_data`, for segmenters.

    Args:
        mean: per channel, in [0, 1]: fills crops beyond the image.
    """
    builder, data = _Builder(config, rank, world), config.data
    root = _dense_root(data)
    if data.masks is None and (train or data.kind != "folder"):
        raise DataError(f"data.masks=null is for an evaluation with data.kind=folder, not data.kind={data.kind}")
    if data.kind == "digits":
        data = replace(data, kind="folder", images="{split}", masks="semantic/{split}")
    fill = [round(255 * value) for value in mean]
    found = None
    if data.kind == "auto":
        found = auto.read_set(replace(config, data=replace(data, classes=list(classes))), train=train)
        builder.notes += found.lines()

    def loader(training: bool) -> SegmentationLoader:
        if found is not None:
            index: Any = found.train if training else found.val
        else:
            index = masks.read_masks(root, data, masks.split_name(data, training), len(classes))
            builder.notes += filter(None, [str(index.report)])
        builder.bad.reports.append(index.report)
        index.exclude(builder.excluded, root)
        index.select(np.arange(len(index))[: builder.limit(training)])
        builder.check_channels(index)
        coloured = data.in_chans in MODES
        transform = segmentation_transform(config.augment, fill, data.antialias, coloured) if training else None
        dataset = SegmentationDataset(index, data.in_chans, transform, config.seed)
        found_classes = None
        if training and data.sampling == "balanced":
            with ThreadPoolExecutor(max(1, data.workers)) as pool:  # decoding releases the lock
                found_classes = list(pool.map(dataset.classes, range(len(index))))
        order = builder.order(len(index), training, found_classes)
        return SegmentationLoader(dataset, order, device, builder.bad, data.workers)

    return replace(builder.build(loader, train), division=found and found.division)


# ---- images alone


def build_image_data(
    config: UpsampleConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    train: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """As :func:`build_classification_data`, for images without annotations, normalized with ``mean`` and ``std``."""
    if config.data.in_chans != 3:
        raise DataError(f"data.in_chans is {config.data.in_chans}; upsamplers take RGB images, 3")
    builder, data = _Builder(config, rank, world), config.data
    root = _dense_root(data)

    def loader(training: bool) -> ImagesLoader:
        folder = root / (data.train_split if training else data.val_split)
        paths = [folder / path for path in Files(folder).images.all] if folder.is_dir() else []
        if not paths:
            raise DataError(f"there is no image in {folder} (data.root, data.train_split, data.val_split)")
        index = Index(paths=encode_paths(paths))
        index.exclude(builder.excluded, root)
        index.select(np.arange(len(index))[: builder.limit(training)])
        dataset = SquashedImages(index, data.image_size, train=training, seed=config.seed)
        normalize = Normalize(mean, std, device, 0.0, "const")
        return ImagesLoader(dataset, builder.order(len(index), training), normalize, builder.bad, data.workers)

    return builder.build(loader, train)
