"""Boxes of Pascal VOC, an XML file per image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .class_names import VOC
from .coco import index_objects
from .files import read_xml
from .formats import voc_objects
from .guard import DataError
from .index import DetectionIndex

LABELS = {name: number for number, name in enumerate(VOC) if number}  # 0 is the background of its masks


def read_voc(
    root: Path,
    sets: str,
    *,
    train: bool,
    categories: dict[int, str] | None = None,
    classes: Sequence[str] | None = None,
) -> DetectionIndex:
    """The images and boxes of one or several sets.

    Args:
        root: the folder with ``VOC2007`` etc. (``VOCdevkit``).
        sets: ``YEAR/SPLIT``, such as ``VOC2007/test``, joined by ``+``. SPLIT is a list in ``YEAR/ImageSets/Main``.
        train: treat difficult objects like others. Otherwise they are crowds, which COCO's evaluation ignores, as VOC's
            does; COCO's also ignores detections of a part of them.
        categories, classes: as in `index_objects`; VOC's own are 1 to 20 by name, and ``classes`` can have others.

    Returns:
        The index. VOC's pixels start at 1, with inclusive boxes; here they start at 0.

    Raises:
        DataError: a list or an annotation is missing or damaged, or has another class than VOC's without ``classes``.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for each in sets.split("+"):
        year, _, split = each.strip().partition("/")
        listing = root / year / "ImageSets" / "Main" / f"{split}.txt"
        try:
            names = listing.read_text(encoding="utf-8").split()
        except OSError as error:
            raise DataError(f"data.kind=voc, {each!r}: can't read the list of images: {error}") from None
        for name in names:
            path = root / year / "Annotations" / f"{name}.xml"
            tree = read_xml(path)
            try:
                size, objects = voc_objects(tree)
            except ValueError as error:
                raise DataError(f"{path}: {error}") from None
            if size is None:
                raise DataError(f"{path} has no size")
            file = f"{year}/JPEGImages/{name}.jpg"
            images.append({"id": len(images) + 1, "file_name": file, "height": size[0], "width": size[1]})
            for label, (x1, y1, x2, y2), difficult in objects:
                if label not in LABELS and classes is None:
                    raise DataError(f"{path}: {label!r} is not one of VOC's classes (data.classes adds others)")
                entry = {"id": len(annotations) + 1, "image_id": len(images), "category_id": label}
                entry |= {"bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], "iscrowd": int(difficult and not train)}
                annotations.append(entry)
    found = {entry["category_id"] for entry in annotations}
    new = [name for name in classes or () if name not in LABELS]
    new += sorted(found - {*LABELS, *new})
    numbers = LABELS | {name: number for number, name in enumerate(new, len(VOC))}
    for entry in annotations:
        entry["category_id"] = numbers[entry["category_id"]]
    own = [{"id": number, "name": name} for name, number in numbers.items() if name in {*LABELS, *found}]
    content = {"images": images, "annotations": annotations, "categories": own}
    return index_objects(f"{root}/{sets}", root, content, masks=False, categories=categories, classes=classes)
