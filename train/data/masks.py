"""Semantic segmentation data: the folder layouts of published datasets.

A mask is an image with a class per pixel: a value of one channel (or a palette), or a colour; 255 is ignored in loss
and score. Other values (ADE20K's 0, the ids of Cityscapes) and colours are mapped on reading. Images and masks are
paired by name.
"""

import difflib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...backbones.images import image_suffixes, is_hidden, upright
from ...configs.schema import SegmentDataConfig
from .class_names import ADE20K, CITYSCAPES, CITYSCAPES_IDS, DIGITS, VOC
from .dense_transforms import IGNORE
from .files import ENDINGS, UNREADABLE
from .guard import DataError, Report, check_classes
from .index import SegmentationIndex, encode_paths

MAX_CLASSES = 255
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
SPLITS = {"ade20k": ("training", "validation")}  # default splits of training and evaluation
NAMES = {"ade20k": ADE20K, "cityscapes": CITYSCAPES, "voc": VOC, "digits": ("background", *DIGITS)}

SAMPLED = 200  # masks whose colours are looked at
Pair = tuple[Path, Path]  # of an image and its mask, which may not exist


class BadMask(ValueError):
    """A mask of another size than its image, or whose pixels are not class numbers or colours."""


def split_name(config: SegmentDataConfig, training: bool) -> str:
    """The split of training or evaluation: from the recipe, or the layout's default."""
    given = config.train_split if training else config.val_split
    return given or SPLITS.get(config.kind, ("train", "val"))[not training]


def find_classes(config: SegmentDataConfig) -> list[str]:
    """The class names by index.

    Raises:
        DataError: none are given and the layout has none, one is given twice, or there are too many.
    """
    if config.classes is not None:
        classes = config.classes
    elif config.values is not None:
        classes = list(dict.fromkeys(name for name in config.values.values() if name is not None))
    elif config.kind in NAMES:
        classes = NAMES[config.kind]
    else:
        raise DataError(f"data.classes (or data.values) is needed for data.kind={config.kind}: the names by label")
    if len(classes) > MAX_CLASSES:
        raise DataError(f"{len(classes)} classes: masks hold at most {MAX_CLASSES}, {IGNORE} is the pixel without one")
    return check_classes(classes, f"data.kind={config.kind}")


def read_masks(root: Path, config: SegmentDataConfig, split: str, num_classes: int) -> SegmentationIndex:
    """Images and masks of a split in pairs, sorted by name; one of a pair may be missing.

    Layouts below ``root``:

    * ade20k: ``images/SPLIT/*.jpg``, ``annotations/SPLIT/*.png``
    * cityscapes: ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png``, ``gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png`` (or
      ``..._labelIds.png``)
    * voc: ``ImageSets/Segmentation/SPLIT.txt`` names, ``JPEGImages/NAME.jpg``, ``SegmentationClass/NAME.png``
    * folder: ``data.images`` and ``data.masks``, with SPLIT in place of ``{split}``; folders below them may nest. Names
      of masks may end in ``_mask``, ``_L`` and the like (`ENDINGS`); where both are one folder, they do. No masks: null

    Returns:
        The index; its report names what is passed over.

    Raises:
        DataError: a folder or list is missing, there is no image, or the masks hold colours that ``data.values`` lacks.
    """
    report = Report(f"{root} ({split})")
    if config.kind == "voc":
        pairs = _voc(root, split)
    elif config.kind == "cityscapes":
        pairs = _cityscapes(root, split, report)
    elif config.kind == "ade20k":
        pairs = _join(root / "images" / split, root / "annotations" / split, report)
    elif config.masks is None:
        files = _files(root / config.images.replace("{split}", split), image_suffixes(), report)
        pairs = [(image, Path()) for image in files.values()]
    else:
        images, masks = (root / pattern.replace("{split}", split) for pattern in (config.images, config.masks))
        pairs = _join(images, masks, report)
    if not any(image.is_file() for image, _ in pairs):
        raise DataError(f"no images of the split {split!r} in {root} (data.kind={config.kind})")
    images, masks = zip(*pairs, strict=True)
    table = label_map(config, num_classes, masks[0], report)
    if config.masks is None:
        masks = [""] * len(images)
    elif len(table) > 256:
        check_colours([mask for _, mask in pairs if mask.is_file()], table)
    return SegmentationIndex(paths=encode_paths(images), masks=encode_paths(masks), table=table, report=report)


def _files(folder: Path, suffixes: Collection[str], report: Report, end: str = "") -> dict[str, Path]:
    """Files below ``folder`` by their relative path without ``end`` and suffix; others are reported, but for those
    without ``end``.

    Raises:
        DataError: no such folder, or two files that differ only in their suffix.
    """
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in folder.parent.iterdir())[:10]) if folder.parent.is_dir() else ""
        raise DataError(f"the folder {folder} does not exist; {folder.parent} has {there or 'nothing'}")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(map(is_hidden, inside.parts)):
            report.rows += [(str(path), None, "hidden file")] if path.is_file() else []
        elif path.suffix.lower() not in suffixes:
            report.rows += [(str(path), None, f"not read as {path.suffix or 'a file without suffix'}")] * path.is_file()
        elif path.stem.endswith(end):
            name = str(inside.with_suffix("")).removesuffix(end)
            if name in files:
                raise DataError(f"{files[name]} and {path} have one name, by which images and masks are paired")
            files[name] = path
    return files


def _join(images: Path, masks: Path, report: Report, image_end: str = "", mask_end: str = "") -> list[Pair]:
    left = _files(images, image_suffixes(), report, image_end)
    if images.resolve() == masks.resolve():  # images and masks side by side
        own = [name for name, path in left.items() if path.suffix.lower() in MASK_SUFFIXES]
        own = [name for name in own if ENDINGS.search(name) and ENDINGS.sub("", name) in left]
        right = {name: left.pop(name) for name in own}
    else:
        right = _files(masks, MASK_SUFFIXES, report, mask_end)
    for name in [name for name in right if name not in left]:
        own = ENDINGS.sub("", name)
        if own in left and own in right:
            raise DataError(f"{left[own]} has two masks, {right[own]} and {right[name]}")
        if own in left:
            right[own] = right.pop(name)
    report.rows += [(str(path), None, "image without a mask") for name, path in left.items() if name not in right]
    report.rows += [(str(path), None, "mask without an image") for name, path in right.items() if name not in left]
    return [
        (left.get(name, images / f"{name}{image_end}.*"), right.get(name, masks / f"{name}{mask_end}.png"))
        for name in sorted(left | right)
    ]


def _voc(root: Path, split: str) -> list[Pair]:
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        names = listing.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(f"the list of the split {split!r} can't be read: {error}") from None
    return [(root / "JPEGImages" / f"{n}.jpg", root / "SegmentationClass" / f"{n}.png") for n in sorted(names)]


def _cityscapes(root: Path, split: str, report: Report) -> list[Pair]:
    masks = root / "gtFine" / split
    end = "_gtFine_labelTrainIds"
    if not any(masks.rglob(f"*{end}.png")):
        end = "_gtFine_labelIds"
    pairs = _join(root / "leftImg8bit" / split, masks, report, "_leftImg8bit", end)
    report.rows = [row for row in report.rows if not row[0].endswith("_polygons.json")]  # each image has one
    return pairs


# ---- from values to classes


def label_map(config: SegmentDataConfig, num_classes: int, mask: Path, report: Report) -> np.ndarray:
    """The class of each value of a mask file, see `SegmentationIndex`; reports the classes that are left out."""
    if config.values is not None:
        classes = find_classes(config)
        values = choose_values(config.values, classes, report)
        return value_table({config.ignore_label: None, **values} if _is_grey(values) else values, classes)
    known, chosen = NAMES.get(config.kind, ()), config.classes or ()
    selects = bool(chosen) and set(chosen) <= set(known)
    if selects:
        num_classes = len(known)
    table = np.full(256, -1, np.int16)
    if config.kind == "cityscapes" and mask.stem.endswith("_labelIds"):
        table[:34] = IGNORE
        for index, value in enumerate(CITYSCAPES_IDS.values()):
            table[value] = index
    elif config.kind == "ade20k" or config.reduce_zero_label:
        table[0] = IGNORE
        table[1 : num_classes + 1] = np.arange(num_classes)
    else:
        table[:num_classes] = np.arange(num_classes)
    table[config.ignore_label] = IGNORE  # over a class of this value
    if selects:
        report_left_out([name for name in known if name not in chosen], report)
        labels = np.array([chosen.index(name) if name in chosen else IGNORE for name in known], np.int16)
        named = (table >= 0) & (table != IGNORE)
        table[named] = labels[table[named]]
    return table


def report_left_out(names: Sequence[str], report: Report) -> None:
    if names:
        text = f"{', '.join(names[:5])}{', ...' * (len(names) > 5)}"
        report.notes.append(f"pixels of {len(names):,} other classes, ignored (data.classes): {text}")


def choose_values(values: Mapping[Any, str | None], classes: Sequence[str], report: Report) -> dict[Any, str | None]:
    """``values`` with None for the names that are not among ``classes``, which are reported.

    Raises:
        DataError: one of ``classes`` has no value; names the nearest.
    """
    names = dict.fromkeys(name for name in values.values() if name is not None)
    for name in classes:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or list(names)[:10]
            raise DataError(f"data.values has no value for {name!r} of data.classes, but for {', '.join(near)}")
    report_left_out([name for name in names if name not in classes], report)
    return {value: name if name in classes else None for value, name in values.items()}


def _is_grey(values: Mapping[Any, Any]) -> bool:
    """Whether values are numbers of one channel, not colours."""
    kinds = {type(value) for value in values if value != "other"}
    if len(kinds) > 1:
        raise DataError(f"data.values has both numbers and colours: {', '.join(map(str, list(values)[:8]))}")
    return str not in kinds


def value_table(values: Mapping[Any, str | None], classes: Sequence[str]) -> np.ndarray:
    """``values`` as `SegmentationIndex.table`; keys are 0 to 255 or colours as ``#rrggbb``, and perhaps ``other``."""
    grey, labels = _is_grey(values), {None: IGNORE} | {name: label for label, name in enumerate(classes)}
    table = np.full(256 if grey else 2**24, labels[values["other"]] if "other" in values else -1, np.int16)
    for value, name in values.items():
        if value != "other":
            table[value if grey else int(value[1:], 16)] = labels[name]
    return table


def read_values(path: str | Path, colours: bool) -> np.ndarray:
    """``[H, W]`` whole numbers of a mask, upright: with ``colours`` 0xRRGGBB, else the values of its channel.

    Raises:
        BadMask: pixels that are neither. Grey stored as RGB is read as one channel.
        OSError: unreadable.
    """
    with Image.open(path) as file:
        image = upright(file)
        if image.mode in ("LA", "RGB", "RGBA") and not colours:
            bands = np.asarray(image)
            if (bands[..., :1] == bands[..., : 1 if image.mode == "LA" else 3]).all():
                image = image.getchannel(0)
        if colours and image.mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
            bands = np.asarray(image.convert("RGB")).astype(np.int32)
            return bands[..., 0] << 16 | bands[..., 1] << 8 | bands[..., 2]
        if image.mode not in ("L", "P", "1", "I", "I;16") or colours:
            raise BadMask(
                f"the mask {path} has {image.mode} pixels; classes need one channel of integers, or colours with names "
                "in data.values"
            )
        return np.asarray(image)


def check_colours(paths: Sequence[Path], table: np.ndarray) -> None:
    """Looks for colours that are no labels in some masks.

    Raises:
        DataError: there are; counts and names them with the first files.
    """
    found, files = defaultdict[int, int](int), list[Path]()
    some = paths[:: -(-len(paths) // SAMPLED) or 1]
    for path in some:
        try:
            values, counts = np.unique(read_values(path, colours=True), return_counts=True)
        except UNREADABLE:  # reported where it is read
            continue
        wrong = table[values] < 0
        for value, count in zip(values[wrong].tolist(), counts[wrong].tolist(), strict=True):
            found[value] += count
        files += [path] * bool(wrong.any())
    if found:
        most = sorted(found, key=lambda value: -found[value])
        named = ", ".join(f"#{value:06x} ({found[value]:,} pixels)" for value in most[:5])
        more, first = ", ..." * (len(most) > 5), ", ".join(map(str, files[:3]))
        raise DataError(
            f"{len(files):,} of {len(some):,} masks have {len(found):,} colours that data.values lacks: {named}{more}; "
            f"first {first}. Without a class: {{'#{most[0]:06x}': null}}, or {{other: null}} for all of them"
        )
