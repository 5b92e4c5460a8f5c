"""Pascal VOC's boxes: an XML file for each image."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .class_names import VOC
from .coco import index_objects
from .guard import DataError
from .index import DetectionIndex

LABELS = {name: number for number, name in enumerate(VOC) if number}  # 0 is the background of its masks


def read_voc(root: Path, sets: str, *, train: bool, categories: dict[int, str] | None = None) -> DetectionIndex:
    """The images and boxes of one or several sets.

    Args:
        root: the folder that holds ``VOC2007`` and the like (``VOCdevkit``).
        sets: ``YEAR/SPLIT``, such as ``VOC2007/test``; several with ``+`` between them. SPLIT is a list of
            ``YEAR/ImageSets/Main``.
        train: learn what VOC marks as difficult like the rest; else it is a crowd, which COCO's evaluation neither
            demands nor counts as wrong, as VOC's own does. By COCO's rule that holds for a box on a part of it, too,
            which VOC's counts as wrong.
        categories: as of `index_objects`; the sets' own are 1 to 20 by name.

    Returns:
        the index. VOC's pixels count from 1 and its boxes hold the last one; here they begin at 0.

    Raises:
        DataError: a list or an annotation is missing or damaged, or names another class.
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
            height, width, objects = _read_image(root / year / "Annotations" / f"{name}.xml")
            file = f"{year}/JPEGImages/{name}.jpg"
            images.append({"id": len(images) + 1, "file_name": file, "height": height, "width": width})
            for label, (x1, y1, x2, y2), difficult in objects:
                entry = {"id": len(annotations) + 1, "image_id": len(images), "category_id": label}
                entry |= {"bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], "iscrowd": int(difficult and not train)}
                annotations.append(entry)
    own = [{"id": number, "name": name} for name, number in LABELS.items()]
    content = {"images": images, "annotations": annotations, "categories": own}
    return index_objects(f"{root}/{sets}", root, content, masks=False, categories=categories)


def _read_image(file: Path) -> tuple[int, int, list[tuple[int, list[float], bool]]]:
    """Height, width, and of each object the label, the corners as the file has them, and whether it is difficult."""
    try:
        tree = ElementTree.parse(file).getroot()
        height, width = (int(tree.findtext(f"size/{side}", "")) for side in ("height", "width"))
        objects = []
        for entry in tree.iter("object"):
            corners = [float(entry.findtext(f"bndbox/{end}", "")) for end in ("xmin", "ymin", "xmax", "ymax")]
            label = LABELS[entry.findtext("name", "").strip()]
            objects.append((label, corners, entry.findtext("difficult", "0").strip() == "1"))
    except OSError as error:
        raise DataError(f"the annotation {file} can't be read: {error}") from None
    except KeyError as error:
        raise DataError(f"{file} names {error}, which is none of VOC's classes") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file} is no annotation of Pascal VOC, or was cut short: {error}") from None
    return height, width, objects
