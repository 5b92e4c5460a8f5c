"""Detects the layout of a folder of classified images (a folder per class, or a table) or of images with masks (beside
the images or in another folder, or labelme's shapes)."""

import csv
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ...configs.schema import SegmentDataConfig
from .files import ENDINGS, SPLIT_NAMES, UNREADABLE, Files, Paths, split_of
from .formats import Found, first_names, list_splits, read_labelme_files
from .guard import DataError
from .masks import SAMPLED, BadMask, read_values

# ---- classification

LABEL_COLUMNS = ("label", "class", "category", "target", "species", "breed", "class_name", "label_name")
SPLIT_COLUMNS = ("split", "set", "subset", "fold")


def find_labels(files: Files) -> Found:
    """Reads a table of names and labels if there is one, else a folder per class, perhaps below a folder per split.

    Raises:
        DataError: there is neither.
    """
    found = next((each for path in (*files[".csv"], *files[".tsv"]) if (each := _read_table(files, path))), None)
    found = found or _read_folders(files)
    found.report.source = str(files.root)
    return found


def _read_table(files: Files, path: str) -> Found | None:
    lines = files.text(path).splitlines()
    rows = list(csv.reader(lines, delimiter="\t" if path.endswith(".tsv") else _delimiter(lines)))
    if len(rows) < 2:
        return None
    header, body = [name.strip().lower() for name in rows[0]], [row for row in rows[1:] if any(row)]
    head = [row for row in body[:50] if len(row) == len(header)]
    columns = [i for i in range(len(header)) if head and all(row[i].strip() for row in head)]
    hits = {i: sum(files.images.find(row[i].strip(), path) is not None for row in head) for i in columns}
    image = max(hits, key=lambda i: hits[i], default=-1)
    if image < 0 or hits[image] < 0.5 * len(head):
        return None
    split = next((i for i, name in enumerate(header) if name in SPLIT_COLUMNS), None)
    label = _label_of(header, body, [i for i in range(len(header)) if i not in (image, split)])
    if label is None:
        return None  # a list of images without labels
    found = Found(f"table {path}", files.root)
    for number, row in enumerate(body, 2):
        place = files.images.find(row[image].strip(), path) if len(row) == len(header) else None
        name = label(row) if place is not None else None
        if place is None or not name:
            why = "row has no label" if place else "no image, or several, of this name"
            found.report.rows.append((row[image] if len(row) > image else path, number, why))
            continue
        part = SPLIT_NAMES.get(row[split].strip().lower(), "") if split is not None else split_of(place)
        found.images.append({"id": number, "file_name": place, "split": part, "label": name})
    unnamed = len(files.images.all) - len({entry["file_name"] for entry in found.images})
    if unnamed:
        found.notes.append(f"{unnamed:,} images are not in {path}")
    return _named(found)


def _delimiter(lines: list[str]) -> str:
    return max(",;\t", key=lines[0].count) if lines else ","


def _label_of(header: list[str], body: list[list[str]], columns: list[int]) -> Any:
    """A function from a row to its label, from a column with a usual name, the only other column, or one-hot columns;
    None if there are none of these."""
    named = [i for i in columns if header[i] in LABEL_COLUMNS]
    whole = [row for row in body if len(row) == len(header)]
    if named or len(columns) == 1:
        column = named[0] if named else columns[0]
        return lambda row: row[column].strip()
    one = ["0"] * (len(columns) - 1) + ["1"]
    if columns and all(sorted(row[i].strip() for i in columns) == one for row in whole):
        return lambda row: header[next(i for i in columns if row[i].strip() == "1")]
    return None


def _read_folders(files: Files) -> Found:
    found = Found("a folder per class", files.root)
    parts = {path: PurePosixPath(path).parts for path in files.images.all}
    # skip outer folders that contain everything, such as that of an archive
    shortest = min(map(len, parts.values()), default=0)
    start = next((i for i in range(shortest - 2) if len({names[i] for names in parts.values()}) > 1), shortest - 2)
    start = max(start, 0)
    splits = {p[start] for p in parts.values() if len(p) > start + 1}
    by_split = bool(splits) and all(split_of(name) for name in splits)
    for path, names in parts.items():
        place = start + by_split
        if len(names) <= place + 1:
            found.report.rows.append((path, None, "image is not in a class folder"))
            continue
        split = split_of(names[start]) if by_split else ""
        found.images.append({"id": len(found.images) + 1, "file_name": path, "split": split, "label": names[place]})
    if not found.images:
        raise DataError(
            f"{files.root} has neither a folder per class nor a table of names and labels for its "
            f"{len(files.images.all):,} images; `foveal predict` takes images without labels"
        )
    return _named(found)


def _named(found: Found) -> Found:
    found.names = dict(enumerate(sorted({entry["label"] for entry in found.images})))
    return found


# ---- segmentation

INSTANCES = re.compile(r"SegmentationObject|SegmentationClass(Npy|Visualization)|instance", re.IGNORECASE)
BRUSH = re.compile(r"task-\d+-annotation-\d+-by-\d+-tag-")
COLOURS = 64  # most distinct values of a mask
VOC_BORDER = "#e0e0c0"  # around the objects of Pascal VOC's masks in colour


def find_masks(files: Files, data: SegmentDataConfig | None = None, *, optional: bool = False) -> Found:
    """Finds images and masks by content (files with few distinct values are masks), else labelme's shapes.

    Args:
        data: with ``values`` and ``ignore_label``, if they are given; None: both are found in the masks.
        optional: images alone are found, too.

    Raises:
        DataError: there is neither, an image has two masks, or ``data.values`` lacks a value.
    """
    found = _read_pairs(files, data or SegmentDataConfig(kind="auto")) or read_labelme_files(files)
    if found is None and optional and files.images.all:
        found = Found("images without masks", files.root)
        found.images = [
            {"id": number, "file_name": path, "split": split_of(path), "mask": ""}
            for number, path in enumerate(files.images.all)
        ]
    if found is None and (brush := [path for path in files.images.all if BRUSH.search(path)]):
        raise DataError(
            f"{files.root} has {len(brush):,} brush masks of Label Studio, one per label and without the image's name: "
            f"{first_names(brush)}; merge them to one mask per image that is named as the image"
        )
    if found is None:
        raise DataError(
            f"{files.root} has neither masks for its images nor labelme's JSON files (data.kind=auto); masks with more "
            f"than {COLOURS} colours need data.kind=folder and data.values"
        )
    found.report.source = str(files.root)
    if found.annotations:
        labels = sorted(set(found.names.values()) - {"background", "_background_"})
        found.names = dict(enumerate(["background", *labels]))
    return found


def _read_pairs(files: Files, data: SegmentDataConfig) -> Found | None:
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for path in files.images.all:
        place = PurePosixPath(path)
        ending = ENDINGS.search(place.stem)
        if not INSTANCES.search(str(place.parent)):
            groups[str(place.parent), ending.group() if ending else "", place.suffix.lower()].append(path)
    masks = {key: paths for key, paths in groups.items() if _are_masks(files, paths)}
    pictures = Paths(path for key, paths in groups.items() if key not in masks for path in paths)
    if not masks or not pictures.all:
        return None
    found, taken = Found("images and masks", files.root), dict[str, str]()
    for (_, ending, _), paths in masks.items():
        for path in paths:
            stem = PurePosixPath(path).stem
            image = pictures.find(stem.removesuffix(ending), path, split_of(path))
            if image is None:
                found.report.rows.append((path, None, "mask without a single matching image"))
            elif image in taken:
                raise DataError(f"{image} has two masks, {taken[image]} and {path}; set data.kind=folder, data.masks")
            else:
                taken[image] = path
    if without := [path for path in pictures.all if path not in taken]:
        found.report.rows += [(path, None, "image without a mask") for path in without]
    lists = list_splits(files, "Segmentation")
    for image, mask in sorted(taken.items()):
        split = lists.get(PurePosixPath(image).stem) or split_of(image)
        found.images.append({"id": len(found.images), "file_name": image, "split": split, "mask": mask})
    if not found.images:
        return None
    _name_values(found, files, data)
    return found


def _are_masks(files: Files, paths: list[str]) -> bool:
    """Whether files are masks, judged by three of them. Lossy formats cannot store masks."""
    if paths[0].lower().endswith((".jpg", ".jpeg", ".jp2", ".webp")):
        return False
    counts = []
    for path in {paths[0], paths[len(paths) // 2], paths[-1]}:
        try:
            with Image.open(files.root / path) as image:
                image = image.resize([min(side, 256) for side in image.size], Image.Resampling.NEAREST)
                values = np.asarray(image).reshape(image.height * image.width, -1)
        except UNREADABLE:
            continue
        counts.append(len(np.unique(values, axis=0)))
    return bool(counts) and max(counts) <= COLOURS


def mask_values(files: Files, paths: list[str], colours: bool) -> dict[int | str, list[str]] | None:
    """Value (a key of `data.values`) -> the masks that contain it, of at most `SAMPLED` masks; None for colours, unless
    they are asked for.

    Raises:
        DataError: pixels that are neither.
    """
    held: dict[int | str, list[str]] = defaultdict(list)
    for path in paths[:: -(-len(paths) // SAMPLED)]:
        try:
            values = np.unique(read_values(files.root / path, colours)).tolist()
        except BadMask as error:
            if not colours:
                return None
            raise DataError(str(error)) from None
        except UNREADABLE:
            continue
        for value in values:
            held[f"#{value:06x}" if colours else value].append(path)
    return dict(sorted(held.items()))


def _name_values(found: Found, files: Files, data: SegmentDataConfig) -> None:
    """Names the mask values by `data.values`, else by a table or list in the folder, else by number; 0 and black are
    the background."""
    paths, names = [entry["mask"] for entry in found.images], _written_colours(files)
    held = mask_values(files, paths, colours=True) if names else None
    if held is None or not set(held) <= set(names):
        held = mask_values(files, paths, colours=False) or mask_values(files, paths, colours=True) or {}
    grey = not any(isinstance(value, str) for value in held)
    ignored = {data.ignore_label: None} if grey else {}
    if data.values is not None:
        if not grey or any(isinstance(value, str) and value != "other" for value in data.values):
            held, ignored = mask_values(files, paths, colours=True) or {}, {}
        found.values = data.values | {value: None for value in ignored if value not in data.values}
        if "other" not in data.values and (wrong := [value for value in held if value not in found.values]):
            first = first_names(list(dict.fromkeys(path for value in wrong for path in held[value])))
            raise DataError(f"masks contain {first_names([*map(str, wrong)], 5)}, which data.values lacks: {first}")
    else:
        found.values = _own_names(found, files, held, names if not grey else _written_names(files), data)
    found.names = dict(enumerate(dict.fromkeys(name for name in found.values.values() if name is not None)))


def _own_names(
    found: Found, files: Files, held: dict[Any, list[str]], names: dict[Any, str], data: SegmentDataConfig
) -> dict[Any, str | None]:
    wrong = [value for value in held if isinstance(value, int) and not 0 <= value <= 255]
    if wrong:
        raise DataError(f"masks contain {wrong[:5]}; classes are 0 to 254, and 255 is ignored")
    if {0, 255} >= set(held) >= {255} and data.ignore_label == 255:
        found.notes.append("masks contain 0 and 255: taken as background and object")
        return {0: "background", 255: names.get(255) or names.get(1, "object")}
    values: dict[Any, str | None] = {}
    for value in held:
        usual = "background" if value in (0, "#000000") else value if isinstance(value, str) else f"class {value}"
        values[value] = names.get(value, usual)
    if isinstance(next(iter(held), 0), int):
        values[data.ignore_label] = None
        values |= {0: None} if data.reduce_zero_label else {}
    elif VOC_BORDER in values and VOC_BORDER not in names:
        values[VOC_BORDER] = None
        found.notes.append(f"{VOC_BORDER}, the colour of Pascal VOC's borders, is no class")
    if unnamed := [str(value) for value, name in values.items() if value not in names and name is not None]:
        found.notes.append(f"mask values without a name in any file: {first_names(unnamed, 8)} (data.values)")
    return values


def _written_names(files: Files) -> dict[int, str]:
    """Value -> name, from Roboflow's _classes.csv, classes.txt, class_names.txt or labels.txt."""
    for path in files[".csv"]:
        rows = [[cell.strip() for cell in row] for row in csv.reader(files.text(path).splitlines())]
        if rows and [cell.lower() for cell in rows[0]] == ["pixel value", "class"]:
            return {int(row[0]): row[1] for row in rows[1:] if len(row) == 2 and row[0].isdecimal()}
    for path in files[".txt"]:
        if Path(path).name in ("classes.txt", "class_names.txt", "labels.txt"):
            return dict(enumerate(line.strip() for line in files.text(path).splitlines() if line.strip()))
    return {}


_NUMBERS = r"(\d{1,3})[,;\s]+(\d{1,3})[,;\s]+(\d{1,3})"
_COLOUR = re.compile(rf"([^:,;\t]+)[:,;\t]\s*{_NUMBERS}(?!\d)|{_NUMBERS}[:,;\s]+([^:,;\t]+)")


def _written_colours(files: Files) -> dict[str, str]:
    """Colour -> name, from CVAT's labelmap.txt, CamVid's class_dict.csv or label_colors.txt and the like."""
    for path in (*files[".txt"], *files[".csv"]):
        if re.search(r"label_?map|colou?r|class_?dict", PurePosixPath(path).stem, re.IGNORECASE):
            found = filter(None, map(_COLOUR.match, files.text(path).splitlines()))
            rows = [tuple(filter(None, match.groups())) for match in found]
            pairs = [(row[1:], row[0]) if row[-1].isdecimal() else (row[:3], row[3]) for row in rows]
            colours = [(tuple(map(int, colour)), name.strip()) for colour, name in pairs]
            return {"#" + bytes(colour).hex(): name for colour, name in colours if max(colour) < 256}
    return {}
