"""Image files in one folder per class."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from timm.utils import natural_key

from ...backbones.images import image_suffixes, is_hidden
from .guard import DataError, Report
from .index import ClassificationIndex, encode_paths


def scan_folder(root: Path, split: str) -> list[str]:
    """The class names below ``root/split``, sorted; every class must have an image.

    Raises:
        DataError: the folder is missing, has no classes, or a class has no images.
    """
    folder = root / split
    if not folder.is_dir():
        if not root.is_dir():
            raise DataError(f"the data folder {root} does not exist (data.root)")
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
        raise DataError(
            f"there is no folder {split!r} in {root} (data.train_split, data.val_split); it has {there}; "
            "data.kind=auto reads folders of classes without a split, too"
        )
    extensions = tuple(sorted(image_suffixes()))
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    if not names:
        raise DataError(f"no images: {folder} has no class folders")
    empty = [n for n in names if not _has_image(folder / n, extensions)]
    if len(empty) == len(names):
        raise DataError(f"no images in {folder}: its {len(names)} folders hold no file like {', '.join(extensions)}")
    if empty:
        raise DataError(f"class folders without an image in {folder}: {', '.join(empty[:10])}")
    return names


def _has_image(folder: Path, extensions: tuple[str, ...]) -> bool:
    walk = os.walk(folder, followlinks=True)
    return any(name.lower().endswith(extensions) and not is_hidden(name) for _, _, files in walk for name in files)


def read_folder(root: Path, split: str, classes: Sequence[str]) -> ClassificationIndex:
    """The images below ``root/split/CLASS``, in timm's order.

    Raises:
        DataError: folders that are missing or empty, unknown classes, or images in deeper folders.
    """
    present = scan_folder(root, split)
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise DataError(f"{root / split} has classes that are not among the {len(classes)} known: {unknown[:10]}")
    numbers = {name: i for i, name in enumerate(classes)}
    suffixes = image_suffixes()
    samples: list[tuple[str, int]] = []
    report = Report(str(root / split))
    for name in present:
        for folder, _, files in os.walk(root / split / name, followlinks=True):
            inside = os.path.relpath(folder, root / split)
            for file in sorted(files):
                if is_hidden(file) or any(map(is_hidden, Path(inside).parts)):
                    report.rows.append((f"{inside}/{file}", None, "hidden file"))
                elif Path(file).suffix.lower() not in suffixes:
                    report.rows.append((f"{inside}/{file}", None, "no image that is read"))
                elif inside != name:
                    report.rows.append((f"{inside}/{file}", None, "image in a folder below its class"))
                else:
                    samples.append((os.path.join(folder, file), numbers[name]))
    nested = set(present) - {classes[label] for _, label in samples}
    if nested:
        raise DataError(f"{root / split}: images must lie directly in their class folder, got {sorted(nested)[:10]}")
    paths, labels = zip(*sorted(samples, key=lambda sample: natural_key(sample[0])), strict=True)
    return ClassificationIndex(report=report, paths=encode_paths(paths), label=np.array(labels, np.int64))
