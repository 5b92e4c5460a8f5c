"""Boxes of Pascal VOC, an XML file per image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .class_names import VOC
from .coco import index_objects
from .files import read_xml
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
        train: treat VOC's difficult objects like others. Otherwise they are crowds, which COCO's evaluation ignores, as
            VOC's does; unlike VOC's, COCO's also ignores boxes on a part of them.
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
            raise DataError(f"data.kind=voc, {each!r}: the list of its images can't be read: {error}") from None
        for name in names:
            path = root / year / "Annotations" / f"{name}.xml"
            height, width, objects = _read_image(path)
            file = f"{year}/JPEGImages/{name}.jpg"
            images.append({"id": len(images) + 1, "file_name": file, "height": height, "width": width})
            for label, (x1, y1, x2, y2), difficult in objects:
                if label not in LABELS and classes is None:
                    raise DataError(f"{path} names {label!r}, none of VOC's classes (data.classes names others)")
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


def _read_image(file: Path) -> tuple[int, int, list[tuple[str, list[float], bool]]]:
    """Height, width, and of each object the name, the corners as the file has them, and whether it is difficult."""
    tree = read_xml(file)
    try:
        height, width = (int(tree.findtext(f"size/{side}", "")) for side in ("height", "width"))
        objects = []
        for entry in tree.iter("object"):
            corners = [float(entry.findtext(f"bndbox/{end}", "")) for end in ("xmin", "ymin", "xmax", "ymax")]
            objects.append(
                (entry.findtext("name", "").strip(), corners, entry.findtext("difficult", "0").strip() == "1")
            )
    except ValueError as error:
        raise DataError(f"{file} is no annotation of Pascal VOC: {error}") from None
    return height, width, objects
