"""Semantic segmentation data: the folder layouts of published datasets.

A mask is an image of one channel (or a palette) with a class per pixel; 255 is ignored in loss and score. Other values
(ADE20K's 0, the ids of Cityscapes) are mapped on reading. Images and masks are paired by name.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from ...configs.schema import SegmentDataConfig
from .class_names import ADE20K, CITYSCAPES, CITYSCAPES_IDS, DIGITS, VOC
from .dense_transforms import IGNORE
from .files import image_suffixes, is_hidden
from .guard import DataError, check_classes
from .index import SegmentationIndex, encode_paths

MAX_CLASSES = 255
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
SPLITS = {"ade20k": ("training", "validation")}  # default splits of training and evaluation
NAMES = {"ade20k": ADE20K, "cityscapes": CITYSCAPES, "voc": VOC, "digits": ("background", *DIGITS)}

Pair = tuple[Path, Path]  # of an image and its mask, which may not exist


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
    * folder: ``data.images`` and ``data.masks``, with SPLIT in place of ``{split}``; folders below them may nest

    Raises:
        DataError: a folder or list is missing, or there is no image.
    """
    if config.kind == "voc":
        pairs = _voc(root, split)
    elif config.kind == "cityscapes":
        pairs = _cityscapes(root, split)
    elif config.kind == "ade20k":
        pairs = _join(root / "images" / split, root / "annotations" / split)
    else:
        images, masks = (root / pattern.replace("{split}", split) for pattern in (config.images, config.masks))
        pairs = _join(images, masks)
    if not any(image.is_file() for image, _ in pairs):
        raise DataError(f"no images of the split {split!r} in {root} (data.kind={config.kind})")
    images, masks = zip(*pairs, strict=True)
    table = label_map(config, num_classes, masks[0])
    return SegmentationIndex(paths=encode_paths(images), masks=encode_paths(masks), table=table)


def _files(folder: Path, suffixes: Collection[str], end: str = "") -> dict[str, Path]:
    """Files below ``folder`` by their relative path without ``end`` and suffix; others are skipped.

    Raises:
        DataError: no such folder, or two files that differ only in their suffix.
    """
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in folder.parent.iterdir())[:10]) if folder.parent.is_dir() else ""
        raise DataError(f"the folder {folder} does not exist; {folder.parent} has {there or 'nothing'}")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and path.stem.endswith(end) and not is_hidden(path.name):
            name = str(path.relative_to(folder).with_suffix("")).removesuffix(end)
            if name in files:
                raise DataError(f"{files[name]} and {path} have one name, by which images and masks are paired")
            files[name] = path
    return files


def _join(images: Path, masks: Path, image_end: str = "", mask_end: str = "") -> list[Pair]:
    left, right = _files(images, image_suffixes(), image_end), _files(masks, MASK_SUFFIXES, mask_end)
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


def _cityscapes(root: Path, split: str) -> list[Pair]:
    masks = root / "gtFine" / split
    end = "_gtFine_labelTrainIds"
    if not any(masks.rglob(f"*{end}.png")):
        end = "_gtFine_labelIds"
    return _join(root / "leftImg8bit" / split, masks, "_leftImg8bit", end)


def label_map(config: SegmentDataConfig, num_classes: int, mask: Path) -> np.ndarray:
    """int16 ``[256]``: the class of each value of a mask file; 255: ignored, -1: not a label."""
    table = np.full(256, -1, np.int16)
    if config.values is not None:
        table[config.ignore_label] = IGNORE
        classes = find_classes(config)
        if unknown := [name for name in config.values.values() if name is not None and name not in classes]:
            raise DataError(f"data.values names {', '.join(unknown)}, which data.classes lacks: {', '.join(classes)}")
        if outside := [value for value in config.values if not 0 <= value <= 255]:
            raise DataError(f"data.values has {outside[0]}; masks hold 0 to 255")
        for value, name in config.values.items():
            table[value] = IGNORE if name is None else classes.index(name)
    elif config.kind == "cityscapes" and mask.stem.endswith("_labelIds"):
        table[:34] = IGNORE
        for index, value in enumerate(CITYSCAPES_IDS.values()):
            table[value] = index
    elif config.kind == "ade20k" or config.reduce_zero_label:
        table[0] = IGNORE
        table[1 : num_classes + 1] = np.arange(num_classes)
    else:
        table[:num_classes] = np.arange(num_classes)
    if config.values is None:
        table[config.ignore_label] = IGNORE  # over a class of this value
    return table
