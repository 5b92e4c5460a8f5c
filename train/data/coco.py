"""Reads COCO annotations into flat arrays.

Labels are 0 .. N-1 in the order of the category ids, which may have gaps.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .class_names import choose_names
from .files import find_images, read_json
from .guard import DataError, Report
from .index import DetectionIndex, Texts, encode_ids, encode_paths, offsets
from .validate import Objects, check_boxes, check_content, find_faults, key_of, mask_area


def read_coco(
    file: Path,
    folder: Path,
    *,
    masks: bool,
    categories: dict[int, str] | None = None,
    classes: Sequence[str] | None = None,
) -> DetectionIndex:
    """Reads an annotation file; see `index_objects` for the arguments.

    Raises:
        DataError: the file is missing, damaged or not in COCO's format, or has other categories.
    """
    return index_objects(str(file), folder, read_json(file), masks=masks, categories=categories, classes=classes)


def index_objects(
    source: str,
    folder: Path,
    content: dict[str, list[dict[str, Any]]],
    *,
    masks: bool,
    categories: dict[int, str] | None = None,
    classes: Sequence[str] | None = None,
) -> DetectionIndex:
    """Converts images, annotations and categories to flat arrays; every detection reader ends here.

    Args:
        source: name of the data in messages and reports.
        folder: base of the images' ``file_name``.
        content: lists as in COCO's annotation files. Ids may be text.
        masks: whether masks are needed. A missing area is then that of the mask, else of the box.
        categories: id -> name of the classes; None: those of ``content``.
        classes: `data.classes`; objects of others are left out. None: all classes.

    Raises:
        DataError: not in COCO's format, an ambiguous image name, or categories that are not in ``categories``.
    """
    check_content(source, content)
    images, report = content["images"], Report(source)
    names, ids = ([image[key] for image in images] for key in ("file_name", "id"))
    categories, labels, given = _label_categories(source, content["categories"], categories, classes)
    entries = _select(content.get("annotations", []), content["categories"], labels, report)
    _report_ids(images, content["categories"], entries, report)
    sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
    objects = Objects.parse(entries, {key_of(value): number for number, value in enumerate(ids)}, labels)
    check_boxes(source, objects, sizes, names)
    faults = find_faults(objects, sizes, masks=masks)
    for row, reason in faults.rows:
        sample = names[objects.image[row]] if objects.image[row] >= 0 else str(entries[row].get("image_id"))
        report.rows.append((sample, entries[row].get("id"), reason))
    rows = np.flatnonzero(~faults.dropped)
    rows = rows[np.argsort(objects.image[rows], kind="stable")]  # image by image
    image, boxes, areas = objects.image[rows], objects.boxes[rows], objects.areas[rows]
    for i in np.flatnonzero(~(areas >= 0)):
        shape = sizes[image[i]].tolist()
        segment = objects.segments[rows[i]] if masks else None
        areas[i] = mask_area(segment, *shape) if segment else boxes[i, 2] * boxes[i, 3]
    texts = [json.dumps(objects.segments[row]).encode() for row in rows] if masks else []
    return DetectionIndex(
        paths=encode_paths(find_images(folder, names, report)),
        report=report,
        categories=dict(categories),
        image_ids=encode_ids(ids),
        sizes=sizes,
        starts=offsets(np.bincount(image, minlength=len(names)).tolist()),
        boxes=boxes,
        labels=objects.label[rows],
        crowd=objects.crowd[rows] == 1,
        areas=areas,
        usable=~faults.unusable[rows],
        segments=Texts.pack(texts) if masks else None,
        category_ids=given,
    )


def _label_categories(
    source: str, entries: list[dict[str, Any]], categories: dict[int, str] | None, classes: Sequence[str] | None
) -> tuple[dict[int, str], dict[str, int], tuple[Any, ...]]:
    """The classes, id -> name; `key_of` the file's ids -> label; and the file's ids by label, empty if they are those
    of the classes.

    Ids that are not integers are replaced by those of ``categories`` with the same name, else numbered from 1.
    """
    keys, names = [key_of(entry["id"]) for entry in entries], [entry["name"] for entry in entries]
    whole = all(type(entry["id"]) is int for entry in entries)
    known = {name: number for number, name in (categories or {}).items()}
    numbers = [
        entry["id"] if whole else known.get(entry["name"], row) for row, entry in enumerate(entries, 1 + len(known))
    ]
    own = dict(sorted(zip(numbers, names, strict=True)) if whole else zip(numbers, names, strict=True))
    if classes is not None:
        chosen = choose_names(classes, own, strict=categories is None)
        own = {number: chosen[number] for number in own if number in chosen}
        categories = chosen if categories is None else categories
    categories = own if categories is None else categories
    if foreign := {number: name for number, name in own.items() if categories.get(number) != name}:
        raise DataError(f"{source} has categories that the model does not have (id: name): {foreign}")
    order = {number: label for label, number in enumerate(categories)}
    labels = {key: order[number] for key, number in zip(keys, numbers, strict=True) if number in own}
    given: list[Any] = list(categories)
    for key, entry in zip(keys, entries, strict=True):
        if key in labels:
            given[labels[key]] = entry["id"]
    return dict(categories), labels, () if whole else tuple(given)


def _select(
    entries: list[dict[str, Any]], categories: list[dict[str, Any]], labels: dict[str, int], report: Report
) -> list[dict[str, Any]]:
    """Keeps the objects of classes with a label and, to be reported, those of unknown categories."""
    names = {key_of(entry["id"]): entry["name"] for entry in categories if key_of(entry["id"]) not in labels}
    left = Counter(name for entry in entries if (name := names.get(key_of(entry.get("category_id")))) is not None)
    if left:
        text = ", ".join(f"{name} {count:,}" for name, count in left.most_common(5))
        report.notes.append(f"{left.total():,} objects of other classes, left out (data.classes): {text}")
    return [entry for entry in entries if key_of(entry.get("category_id")) not in names] if names else entries


def _report_ids(
    images: list[dict[str, Any]], categories: list[dict[str, Any]], entries: list[dict[str, Any]], report: Report
) -> None:
    ids = {"images": [entry["id"] for entry in images], "categories": [entry["id"] for entry in categories]}
    for key in ("image_id", "category_id"):
        ids[f"objects ({key})"] = [entry.get(key) for entry in entries]
    for what, values in ids.items():
        odd = [value for value in values if type(value) in (str, float) or (type(value) is int and abs(value) >= 2**63)]
        if odd:
            report.notes.append(f"{len(odd):,} ids of {what} are text, fractions or above 2^63: {odd[0]!r}")
