"""``data.kind=auto``: finds out what a folder holds, which part is held out, and which classes are learned."""

import csv
import difflib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...configs.schema import DataConfig, DenseDataConfig, DetectDataConfig
from ...files import atomic
from .coco import index_objects
from .files import SPLIT_NAMES, Files
from .formats import DETECTION, Found, find_boxes
from .guard import DataError
from .index import DetectionIndex

SPLIT_FILE = "split.csv"  # of a run


@dataclass
class Division:
    """Which images are learned and which are held out.

    Attributes:
        train, val: numbers of images.
        rows: the list to keep, (image, train or val); empty where the data have their own.
        text: in a few words.
        notes: what is left out.
    """

    train: np.ndarray
    val: np.ndarray
    rows: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    notes: list[str] = field(default_factory=list)

    def write(self, run: Path) -> None:
        """Writes the list into a run folder, from which an evaluation and ``resume=auto`` take it."""
        if self.rows:
            with atomic(run / SPLIT_FILE) as new, new.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("image", "split"), *self.rows])


def kept_split(data: DataConfig | DenseDataConfig, run: Path, overrides: Sequence[str] = ()) -> None:
    """Sets ``data.split`` to the list that a run kept, unless other data or another list are asked for."""
    given = {pair.partition("=")[0] for pair in overrides} & {"data.root", "data.split", "data.val_split"}
    if data.kind == "auto" and not given and data.split is None and (run / SPLIT_FILE).is_file():
        data.split = str(run / SPLIT_FILE)


def divide(
    names: Sequence[str],
    splits: Sequence[str],
    classes: Sequence[Hashable],
    data: DataConfig | DenseDataConfig,
    seed: int,
    train: bool = True,
) -> Division:
    """Training and held-out images.

    Args:
        names: of the images, as a kept list has them.
        splits: of each image: train, val, test, or empty.
        classes: of each image, by which a part is drawn where the data have no split.
        train: False for an evaluation alone, which takes all of what has no split.

    Raises:
        DataError: a split that is asked for is not there, or a list can't be read.
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
            raise DataError(f"data.{key}_split={name}: there is {', '.join(filter(None, count)) or 'no split'}")
    if count[held_out] and (count[learned] or not train):
        rest = {name or "no split": n for name, n in count.items() if name not in (learned, held_out)}
        notes = [f"images of {name} are not used: {n:,}" for name, n in rest.items()]
        text = f"train {count[learned]:,}, {held_out} {count[held_out]:,} as the folder has them"
        return Division(np.flatnonzero(given == learned), np.flatnonzero(given == held_out), [], text, notes)
    if not train:
        everything = np.arange(len(names))
        return Division(everything, everything, [], f"all {len(names):,}")
    val = draw(names, classes, data.val_fraction, seed)
    rows = [(name, "val" if out else "train") for name, out in zip(names, val, strict=True)]
    text = f"train {(~val).sum():,}, val {val.sum():,}, drawn by class (data.val_fraction={data.val_fraction:g}, seed)"
    return Division(np.flatnonzero(~val), np.flatnonzero(val), rows, text)


def draw(names: Sequence[str], classes: Sequence[Hashable], fraction: float, seed: int) -> np.ndarray:
    """bool ``[N]``: whether an image is held out; of each class, by name and seed, at most all but one.

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
        ("images are gone of", sorted(set(listed) - set(names) - {"image"})),
    ):
        if missing:
            notes.append(f"{len(missing):,} {what} {file}: {', '.join(missing[:3])}")
    train, val = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "val")
    rows = [(name, part) for name, part in zip(names, parts, strict=True) if part in ("train", "val")]
    return Division(train, val, rows, f"train {len(train):,}, val {len(val):,} by {file}", notes)


# ---- detection


def read_boxes(data: DetectDataConfig, root: Path, categories: dict[int, str] | None = None) -> Found:
    """What the folder holds for detection, with the classes that are learned.

    Args:
        categories: id -> name of a trained model's classes; None: `data.classes`, else all that have an object.

    Raises:
        DataError: no format is recognised, or a class is not there.
    """
    files = Files(root)
    found = find_boxes(files)
    if found is None or not found.images:
        more = f"; {found.report}" if found is not None else ""
        there = ", ".join(f"{len(paths)} {end or 'without suffix'}" for end, paths in sorted(files.by_suffix.items()))
        raise DataError(f"{root} holds no annotations of {', '.join(DETECTION)} (data.kind=auto); it has {there}{more}")
    count = Counter(entry["category_id"] for entry in found.annotations)
    by_name = {name: number for number, name in found.names.items()}
    if categories is not None:
        wanted = categories
    elif data.classes is not None:
        wanted = {by_name[name]: name for name in known_classes(data.classes, by_name)}
    else:
        wanted = {number: name for number, name in found.names.items() if count[number]}
        if empty := [name for number, name in found.names.items() if not count[number]]:
            found.notes.append(f"classes without an object are left out: {', '.join(empty[:5])}")
    numbers = {by_name[name]: number for number, name in wanted.items() if name in by_name}
    if left := {found.names[key]: n for key, n in count.items() if key in found.names and key not in numbers}:
        text = ", ".join(f"{name} {n:,}" for name, n in sorted(left.items())[:5])
        found.notes.append(f"{sum(left.values()):,} objects of classes that are left out: {text}")
    kept = [e for e in found.annotations if e["category_id"] in numbers or e["category_id"] not in found.names]
    found.annotations = [e | {"category_id": numbers.get(e["category_id"], e["category_id"])} for e in kept]
    found.names = dict(wanted)
    return found


def known_classes(wanted: Sequence[str], known: Sequence[str] | dict[str, Any]) -> list[str]:
    """The classes of `data.classes`.

    Raises:
        DataError: one is not in the data; names the nearest.
    """
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=3) or list(known)[:10]
            raise DataError(f"data.classes: the data have no {name!r}, but {', '.join(map(str, near))}")
    return list(wanted)


def divide_boxes(found: Found, data: DetectDataConfig, seed: int, train: bool = True) -> Division:
    """`divide` by the class of each image that the fewest images have."""
    held = defaultdict(set)
    for entry in found.annotations:
        held[repr(entry["image_id"])].add(entry["category_id"])
    images = Counter(label for labels in held.values() for label in labels)
    rarest = [
        min(held[repr(entry.get("id"))], key=lambda label: (images[label], str(label)), default=-1)
        for entry in found.images
    ]
    names = [entry["file_name"] for entry in found.images]
    return divide(names, [entry["split"] for entry in found.images], rarest, data, seed, train)


def index_boxes(found: Found, numbers: np.ndarray, *, masks: bool, train: bool) -> DetectionIndex:
    """The images numbered ``numbers``; what VOC calls difficult is a crowd in evaluation."""
    images = [found.images[number] for number in numbers]
    ids = {repr(entry.get("id")) for entry in images}
    known = {repr(entry.get("id")) for entry in found.images}
    annotations = []
    for entry in found.annotations:
        image = repr(entry.get("image_id"))
        if image in ids or image not in known:  # the latter are reported
            annotations.append(entry | {"iscrowd": 1} if entry.get("difficult") and not train else entry)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in found.names.items()],
    }
    source = f"{found.root} ({found.format})"
    index = index_objects(source, found.root, content, masks=masks, categories=found.names)
    if train:
        index.report.rows[:0] = found.report.rows
    return index
