"""Reads COCO annotations into flat arrays.

Labels are 0 .. N-1 in the order of the category ids, which may have gaps.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .files import read_json
from .guard import DataError, Report
from .index import DetectionIndex, Texts, encode_paths, offsets
from .validate import Objects, check_boxes, check_content, find_faults, mask_area


def read_coco(file: Path, folder: Path, *, masks: bool, categories: dict[int, str] | None = None) -> DetectionIndex:
    """Reads an annotation file; see `index_objects` for the arguments.

    Raises:
        DataError: the file is missing, damaged or not in COCO's format, or has other categories.
    """
    return index_objects(str(file), folder, read_json(file), masks=masks, categories=categories)


def index_objects(
    source: str,
    folder: Path,
    content: dict[str, list[dict[str, Any]]],
    *,
    masks: bool,
    categories: dict[int, str] | None = None,
) -> DetectionIndex:
    """Converts images, annotations and categories to flat arrays; every detection reader ends here.

    Args:
        source: name of the data in messages and reports.
        folder: base of the images' ``file_name``.
        content: lists as in COCO's annotation files.
        masks: whether masks are needed. A missing area is then that of the mask, else of the box.
        categories: id -> name of the classes; None: those of ``content``.

    Raises:
        DataError: not in COCO's format, or with categories that are not in ``categories``.
    """
    check_content(source, content)
    own = {entry["id"]: entry["name"] for entry in content["categories"]}
    categories = dict(sorted(own.items())) if categories is None else categories
    foreign = {key: name for key, name in own.items() if categories.get(key) != name}
    if foreign:
        raise DataError(f"{source} has categories that the model does not have (id: name): {foreign}")
    images, entries, report = content["images"], content.get("annotations", []), Report(source)
    names, ids = ([image[key] for image in images] for key in ("file_name", "id"))
    sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
    objects = Objects.parse(entries, ids, list(categories))
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
        paths=encode_paths([_find(folder, name) for name in names]),
        report=report,
        categories=dict(categories),
        image_ids=np.array(ids, np.int64),
        sizes=sizes,
        starts=offsets(np.bincount(image, minlength=len(names)).tolist()),
        boxes=boxes,
        labels=objects.label[rows],
        crowd=objects.crowd[rows] == 1,
        areas=areas,
        usable=~faults.unusable[rows],
        segments=Texts.pack(texts) if masks else None,
    )


def _find(folder: Path, name: str) -> Path:
    """The path of an image, also from a file name with backslashes."""
    path = folder / name
    return folder / name.replace("\\", "/") if "\\" in name and not path.exists() else path
