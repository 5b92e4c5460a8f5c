"""Objects in COCO's format: an annotation file to flat arrays.

Boxes are corners ``(x1, y1, x2, y2)`` in pixels inside the program and ``(x, y, width, height)`` in files. Classes are
numbered 0 .. N-1 in the order of the category ids, which may have gaps.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .guard import DataError, Report
from .index import DetectionIndex, Texts, encode_paths, offsets
from .validate import Objects, check_boxes, check_content, find_faults, mask_area


def read_coco(file: Path, folder: Path, *, masks: bool, categories: dict[int, str] | None = None) -> DetectionIndex:
    """Reads an annotation file; `index_objects` has the arguments.

    Raises:
        DataError: the file is missing, damaged or not in COCO's format, or has other categories.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"the annotation file {file} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # the former also of bytes that are no text
        raise DataError(f"{file} is not JSON, or was cut short: {error}") from None
    return index_objects(str(file), folder, content, masks=masks, categories=categories)


def index_objects(
    source: str,
    folder: Path,
    content: dict[str, list[dict[str, Any]]],
    *,
    masks: bool,
    categories: dict[int, str] | None = None,
) -> DetectionIndex:
    """The flat arrays of images, annotations and categories; every reader of boxes ends here.

    Args:
        source: what messages and reports call the file.
        folder: where the images' ``file_name`` are.
        content: lists as in COCO's annotation files.
        masks: whether masks are learned. An area that the file does not give is then that of the mask, else of the box.
        categories: id -> name of the classes to number by; None for the file's own, all of them.

    Raises:
        DataError: not in COCO's format, or with categories that are not among ``categories``.
    """
    check_content(source, content)
    own = {entry["id"]: entry["name"] for entry in content["categories"]}
    categories = dict(sorted(own.items())) if categories is None else categories
    foreign = {key: name for key, name in own.items() if categories.get(key) != name}
    if foreign:
        raise DataError(f"{source} has categories that the model was not made for (id: name): {foreign}")
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
    """The path of an image, also of a name that was written on Windows."""
    path = folder / name
    return folder / name.replace("\\", "/") if "\\" in name and not path.exists() else path
