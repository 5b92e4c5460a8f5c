"""``data.kind=auto``: detects the format of a folder, its split and its classes."""

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...configs.schema import DataConfig, DenseDataConfig, DetectDataConfig, SegmentDataConfig
from ...files import atomic
from .class_names import choose_names
from .coco import index_objects
from .files import SPLIT_NAMES, UNREADABLE, Files, image_size, same_files
from .formats import DETECTION, Found, find_boxes, first_names
from .guard import DataError, Report
from .index import ClassificationIndex, DetectionIndex, Index, SegmentationIndex, encode_paths
from .masks import value_table
from .pairs import find_labels, find_masks
from .validate import key_of

SPLIT_FILE = "split.csv"  # of a run


@dataclass
class Division:
    """A split into training and held-out images.

    Attributes:
        train, val: indices of images.
        rows: pairs (image, train or val) to save; empty if the data come with a split.
        text: a summary for the log.
        notes: images that are not used, for the log.
    """

    train: np.ndarray
    val: np.ndarray
    rows: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    notes: list[str] = field(default_factory=list)

    def write(self, run: Path) -> None:
        """Writes split.csv into a run folder, for its evaluations and ``resume=auto``."""
        if self.rows:
            with atomic(run / SPLIT_FILE) as new, new.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("image", "split"), *self.rows])


def kept_split(data: DataConfig | DenseDataConfig, run: Path, overrides: Sequence[str] = ()) -> None:
    """Sets ``data.split`` to a run's split.csv, unless the overrides name other data or another split."""
    given = {pair.partition("=")[0] for pair in overrides} & {"data.root", "data.split", "data.val_split"}
    if getattr(data, "kind", None) == "auto" and not given and (run / SPLIT_FILE).is_file():
        data.split = str(run / SPLIT_FILE)


def divide(
    names: Sequence[str],
    splits: Sequence[str],
    classes: Sequence[Hashable],
    data: DataConfig | DenseDataConfig,
    seed: int,
    train: bool = True,
) -> Division:
    """Divides images into training and held-out ones: by ``data.split``, by the data's split, else at random.

    Args:
        names: of the images, as in split.csv.
        splits: of each image: train, val, test, or empty.
        classes: of each image; a random split is stratified by them.
        train: False for an evaluation alone, which uses all images if the data have no split.

    Raises:
        DataError: a requested split does not exist, or ``data.split`` can't be read.
    """
    if data.split is not None:
        return _listed(names, Path(data.split))
    given, count = np.array(splits, object), Counter(splits)
    default = ("train", "val") if isinstance(data, DataConfig) else (None, None)
    wanted = (data.train_split, data.val_split)
    learned = SPLIT_NAMES.get(wanted[0] or "train", wanted[0] or "")
    held_out = SPLIT_NAMES.get(wanted[1] or "val", wanted[1] or "")
    if wanted[1] == default[1] and "val" not in count and "test" in count:
        held_out = "test"
    for key, name, usual, part in zip(("train", "val"), wanted, default, (learned, held_out), strict=True):
        if name != usual and part not in count and (train or key == "val"):
            raise DataError(f"data.{key}_split={name}: the data have {', '.join(filter(None, count)) or 'no split'}")
    if count[held_out] and (count[learned] or not train):
        rest = {name or "no split": n for name, n in count.items() if name not in (learned, held_out)}
        notes = [f"images of {name} are not used: {n:,}" for name, n in rest.items()]
        text = f"train {count[learned]:,}, {held_out} {count[held_out]:,}, split by the data"
        return Division(np.flatnonzero(given == learned), np.flatnonzero(given == held_out), [], text, notes)
    if not train:
        everything = np.arange(len(names))
        return Division(everything, everything, [], f"all {len(names):,}")
    val = draw(names, classes, data.val_fraction, seed)
    notes = _together(names, val, data)
    rows = [(name, "val" if out else "train") for name, out in zip(names, val, strict=True)]
    how = f"data.val_fraction={data.val_fraction:g}, seed={seed}"
    by_class = " by class" * (len(set(classes)) > 1)
    text = f"train {(~val).sum():,}, val {val.sum():,}, drawn at random{by_class} ({how})"
    return Division(np.flatnonzero(~val), np.flatnonzero(val), rows, text, notes)


def _together(names: Sequence[str], val: np.ndarray, data: DataConfig | DenseDataConfig) -> list[str]:
    """Puts duplicate files on the same side of the split, in place; returns a note about them."""
    number = {os.path.join(str(data.root), name): i for i, name in enumerate(names)}
    same = same_files(number)
    for path, first in same.items():
        val[number[path]] = val[number[first]]
    pairs = [f"{names[number[path]]} = {names[number[first]]}" for path, first in same.items()]
    note = f"{len(pairs):,} duplicate files, kept in the same split: {first_names(pairs)}"
    return [note] if pairs else []


def draw(names: Sequence[str], classes: Sequence[Hashable], fraction: float, seed: int) -> np.ndarray:
    """Draws the held-out images, stratified by class: bool ``[N]``. Depends on the names and the seed, not on their
    order; each class keeps at least one training image.

    Raises:
        DataError: fewer than two images.
    """
    if len(names) < 2:
        raise DataError(f"{len(names)} image{'s' * (len(names) != 1)} can't be split into training and held-out ones")
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number in sorted(range(len(names)), key=names.__getitem__):
        groups[classes[number]].append(number)
    held_out, owed, random = np.zeros(len(names), bool), 0.0, np.random.default_rng(seed)
    for _, numbers in sorted(groups.items(), key=lambda pair: str(pair[0])):
        owed += len(numbers) * fraction
        count = min(round(owed), len(numbers) - 1)
        owed -= count
        held_out[random.permutation(numbers)[:count]] = True
    if not held_out.any():
        held_out[min(range(len(names)), key=names.__getitem__)] = True
    return held_out


def _listed(names: Sequence[str], file: Path) -> Division:
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            listed = {row[0]: SPLIT_NAMES.get(row[1].strip(), "") for row in csv.reader(opened) if len(row) > 1}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data.split={file} can't be read: {error}") from None
    parts = np.array([listed.get(name, "-") for name in names], object)
    notes = []
    for what, missing in (
        ("images are not in", [name for name in names if name not in listed]),
        ("images are missing, of those in", sorted(set(listed) - set(names) - {"image"})),
    ):
        if missing:
            notes.append(f"{len(missing):,} {what} {file}: {', '.join(missing[:3])}")
    train, val = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "val")
    rows = [(name, part) for name, part in zip(names, parts, strict=True) if part in ("train", "val")]
    return Division(train, val, rows, f"train {len(train):,}, val {len(val):,} by {file}", notes)


# ---- the data set of a folder


@dataclass
class DataSet:
    """The data of a folder for a task, with its split.

    Attributes:
        classes: names by label.
        train, val: training and held-out images; ``train`` is empty for an evaluation alone.
    """

    task: str
    found: Found
    classes: list[str]
    division: Division
    train: Index
    val: Index

    def lines(self) -> list[str]:
        """Three lines for the log: format and split; classes and sizes; irregularities."""
        found, report = self.found, str(self.train.report)
        odd = [*found.notes, *self.division.notes, *filter(None, [report])]
        return [
            f"{found.format} in {found.root}: {self.division.text}",
            f"{self.counts()}; images {size_range(sizes(self.train if len(self.train) else self.val))}",
            f"odd: {'; '.join(odd)}" if odd else "nothing odd",
        ]

    def by_class(self, index: Index) -> np.ndarray:
        """Number of objects, or images, of each class in a part of the data, int64 ``[C]``."""
        if isinstance(index, DetectionIndex):
            rows = index.labels[index.usable & ~index.crowd]
        else:
            rows = getattr(index, "label", np.empty(0, np.int64))
        return np.bincount(rows, minlength=len(self.classes))

    def counts(self) -> str:
        names = self.classes
        if self.task == "segment":
            return f"{len(names)} classes: {first_names(names, 10)}"
        count = self.by_class(self.val) + (self.by_class(self.train) if len(self.train) else 0)
        order = np.argsort(-count, kind="stable")
        each = first_names([f"{names[i]} {count[i]:,}" for i in order], 10)
        return f"{count.sum():,} {'objects' if self.task == 'detect' else 'images'} of {len(names)} classes: {each}"


def find_classes(data: DataConfig | SegmentDataConfig) -> list[str]:
    """The class names of a folder of classified images or masks, by label; `data.classes` if it is given."""
    if data.classes is not None:
        return list(data.classes)  # `read_set` compares them with the data
    files = Files(_root(data))
    found = find_masks(files, data) if isinstance(data, SegmentDataConfig) else find_labels(files)
    return list(found.names.values())


def _root(data: DataConfig | DenseDataConfig) -> Path:
    if not data.root:
        raise DataError("data.root is needed for data.kind=auto")
    return Path(data.root)


def read_set(
    config: Any, *, masks: bool | None = False, categories: dict[int, str] | None = None, train: bool = True
) -> DataSet:
    """Reads ``data.root`` of a recipe with ``data.kind=auto``.

    Args:
        masks: detection: whether to read the masks of objects; None: if all have one.
        categories: detection: id -> name of a trained model's classes.
        train: False for an evaluation alone.

    Raises:
        DataError: an unknown format, or a class or split that does not exist.
    """
    data, task = config.data, "classify" if config.task == "probe" else config.task
    files = Files(_root(data))
    if task == "detect":
        found = _choose_categories(find_boxes(files) or _nothing(files), data, categories)
        if not found.names:
            raise DataError(f"{files.root}: no usable object; {found.report}")
        keys = rarest_classes(found)
        without = [entry for entry in found.annotations if not entry.get("segmentation")]
        masks = not without if masks is None else masks
        if 0 < len(without) < len(found.annotations):
            found.notes.append(f"{len(without):,} of {len(found.annotations):,} objects have no mask, only a box")
    elif task == "classify":
        found = _choose_labels(find_labels(files), data.classes, train)
        keys = [entry["label"] for entry in found.images]
    else:
        found = _choose_values(find_masks(files, data, optional=not train), data.classes, train)
        keys = [0] * len(found.images)
    if not found.images:
        raise DataError(f"{files.root}: no usable image; {found.report}")
    found.notes += _ignored(found, files)
    names = [entry["file_name"] for entry in found.images]
    division = divide(names, [entry["split"] for entry in found.images], keys, data, config.seed, train)
    index = {"detect": partial(index_boxes, masks=masks), "classify": index_labels, "segment": index_masks}[task]
    if not len(division.val) or (train and not len(division.train)):
        raise DataError(f"{files.root}: no image to {'train on or to ' * train}evaluate: {division.text}")
    held_out = index(found, division.val, train=False)
    if len(division.train):
        learned = index(found, division.train, train=True)
    else:
        learned = replace(held_out, report=Report(""))
        learned.select(division.train)
    learned.report.rows[:0] = found.report.rows
    learned.report.source = learned.report.source or found.report.source
    return DataSet(task, found, list(found.names.values()), division, learned, held_out)


def _ignored(found: Found, files: Files) -> list[str]:
    """Notes on files that are not read."""
    known = {".xml", ".txt", ".json", ".yaml", ".yml", ".csv", ".tsv", ".names", ".data", ".md", ".html"}
    groups = {
        f"files {suffix or 'without suffix'} are ignored": paths for suffix, paths in files.ignored(known).items()
    }
    used = {entry[key] for entry in found.images for key in ("file_name", "mask") if key in entry}
    used |= {sample for sample, *_ in found.report.rows}
    groups["image files are not used"] = [path for path in files.images.all if path not in used]
    groups["hidden files and folders are ignored"] = files.hidden
    return [f"{len(paths):,} {text}: {first_names(paths)}" for text, paths in groups.items() if paths]


def _nothing(files: Files) -> Found:
    there = ", ".join(f"{len(paths)} {end or 'without suffix'}" for end, paths in sorted(files.by_suffix.items()))
    raise DataError(
        f"{files.root} has no annotations in the formats {', '.join(DETECTION)} (data.kind=auto); it contains "
        f"{there or 'no files'}"
    )


def sizes(index: Index, most: int = 500) -> np.ndarray:
    """Height and width of the images, int64 ``[N, 2]``; without detection annotations, of about ``most`` images."""
    if isinstance(index, DetectionIndex):
        return index.sizes
    found = []
    for number in range(0, len(index), -(-len(index) // most) or 1):
        with suppress(*UNREADABLE):
            found.append(image_size(index.name(number)))
    return np.array(found, np.int64).reshape(-1, 2)


def size_range(sizes: np.ndarray) -> str:
    """Smallest, median and largest size, for the log."""
    if not len(sizes):
        return "of unknown size"
    ends = [f"{w:.0f}x{h:.0f}" for h, w in (sizes.min(0), np.median(sizes, axis=0), sizes.max(0))]
    return f"{ends[0]} to {ends[2]}, median {ends[1]}" if ends[0] != ends[2] else f"of {ends[0]}"


# ---- detection


def _choose_categories(found: Found, data: DetectDataConfig, categories: dict[int, str] | None) -> Found:
    """Keeps the objects of a trained model's classes, of `data.classes`, or of all classes that have objects."""
    count = Counter(entry["category_id"] for entry in found.annotations)
    by_name = {name: number for number, name in found.names.items()}
    if categories is not None:
        wanted = categories
        numbers = {by_name[name]: number for number, name in wanted.items() if name in by_name}
    else:
        wanted = {number: name for number, name in found.names.items() if count[number]}
        if data.classes is not None:
            wanted = choose_names(data.classes, found.names if set(data.classes) <= set(by_name) else wanted)
        elif empty := [name for number, name in found.names.items() if not count[number]]:
            found.notes.append(f"classes without objects, left out: {first_names(empty)}")
        numbers = {number: number for number in wanted}
    if left := {found.names[key]: n for key, n in count.items() if key in found.names and key not in numbers}:
        text = first_names([f"{name} {n:,}" for name, n in sorted(left.items())], 5)
        found.notes.append(f"{sum(left.values()):,} objects of other classes, left out: {text}")
    kept = [e for e in found.annotations if e["category_id"] in numbers or e["category_id"] not in found.names]
    found.annotations = [e | {"category_id": numbers.get(e["category_id"], e["category_id"])} for e in kept]
    found.names = dict(wanted)
    return found


def rarest_classes(found: Found) -> list[Any]:
    """The rarest class of each image, -1 without objects; for a stratified split."""
    held = defaultdict(set)
    for entry in found.annotations:
        held[key_of(entry.get("image_id"))].add(entry["category_id"])
    images = Counter(label for labels in held.values() for label in labels)
    return [
        min(held[key_of(entry.get("id"))], key=lambda label: (images[label], str(label)), default=-1)
        for entry in found.images
    ]


def index_boxes(found: Found, numbers: np.ndarray, *, masks: bool, train: bool) -> DetectionIndex:
    """An index of the images ``numbers``; VOC's difficult objects are crowds in evaluation."""
    images = [found.images[number] for number in numbers]
    ids = {key_of(entry.get("id")) for entry in images}
    known = {key_of(entry.get("id")) for entry in found.images}
    annotations = []
    for entry in found.annotations:
        image = key_of(entry.get("image_id"))
        if image in ids or image not in known:  # the latter are reported
            annotations.append(entry | {"iscrowd": 1} if entry.get("difficult") and not train else entry)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in found.names.items()],
    }
    source = f"{found.root} ({found.format})"
    return index_objects(source, found.root, content, masks=masks, categories=found.names)


# ---- classification and segmentation


def _choose_labels(found: Found, classes: Sequence[str] | None, strict: bool) -> Found:
    if classes is not None:
        found.names = dict(enumerate(choose_names(classes, found.names, strict).values()))
        left = Counter(entry["label"] for entry in found.images if entry["label"] not in found.names.values())
        if left:
            text = first_names([f"{name} {n:,}" for name, n in sorted(left.items())], 5)
            found.notes.append(f"{left.total():,} images of other classes, left out: {text}")
        found.images = [entry for entry in found.images if entry["label"] not in left]
    return found


def index_labels(found: Found, numbers: np.ndarray, *, train: bool) -> ClassificationIndex:
    """An index of the images ``numbers``."""
    labels = {name: label for label, name in found.names.items()}
    images = [found.images[number] for number in numbers]
    paths = encode_paths([found.root / entry["file_name"] for entry in images])
    return ClassificationIndex(paths=paths, label=np.array([labels[entry["label"]] for entry in images], np.int64))


def _choose_values(found: Found, classes: Sequence[str] | None, strict: bool) -> Found:
    """Selects the classes `data.classes`; pixels of the others are ignored."""
    if classes is not None:
        names = choose_names(classes, found.names, strict)
        if left := [name for label, name in found.names.items() if label not in names]:
            found.notes.append(f"pixels of other classes, ignored: {first_names(left, 5)}")
        new = {name: names.get(label) for label, name in found.names.items()}
        found.values = {value: new.get(name) for value, name in found.values.items()}
        found.names = dict(enumerate(names.values()))
    return found


def index_masks(found: Found, numbers: np.ndarray, *, train: bool) -> SegmentationIndex:
    """An index of the images ``numbers``."""
    classes = tuple(found.names.values())
    images = [found.images[number] for number in numbers]
    paths = encode_paths([found.root / entry["file_name"] for entry in images])
    masks = encode_paths([found.root / entry["mask"] if entry["mask"] else "" for entry in images])
    return SegmentationIndex(paths=paths, masks=masks, table=value_table(found.values, classes), classes=classes)
