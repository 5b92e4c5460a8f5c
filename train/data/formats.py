"""Annotations of objects as tools write them, found out from a folder and read into COCO's lists: COCO's JSON, Pascal
VOC's XML, YOLO's text files, labelme's JSON.

Each reader takes the files of a folder and returns a `Found`, or None where the folder is of another format. A damaged
file costs its image and is reported.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .files import SPLIT_NAMES, Files, Paths, image_size, read_json, sizes_of, split_of
from .guard import DataError, Report

MAX_POINTS = 100_000  # of a polygon
MASK_FOLDERS = re.compile(r"segmentation(class|object)|masks?$|labels?$", re.IGNORECASE)


@dataclass
class Found:
    """What a folder holds, in COCO's form.

    Attributes:
        format: in words.
        images: with ``split`` (train, val, test, or empty) besides COCO's keys; ``file_name`` is relative to the root.
            Of a classification they have a ``label``, of a segmentation a ``mask``: the path of an image or of a JSON
            file of shapes.
        annotations: VOC's difficult ones have ``difficult``.
        names: category id or label -> name.
        values: value of a mask's pixels -> name; ``ignored`` are those of no class.
        notes: what a reader decided, for the user.
        report: what could not be used.
    """

    format: str
    root: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    values: dict[int, str] = field(default_factory=dict)
    ignored: list[int] = field(default_factory=lambda: [255])
    notes: list[str] = field(default_factory=list)
    report: Report = field(default_factory=lambda: Report(""))

    def add_image(self, path: str, size: tuple[Any, Any], split: str) -> int:
        """The id of a new image."""
        number = len(self.images) + 1
        height, width = size
        self.images.append({"id": number, "file_name": path, "height": height, "width": width, "split": split})
        return number

    def add(
        self, image: int, category: Any, box: list[float], polygons: Sequence[list[float]] = (), **more: Any
    ) -> None:
        """An object of an image; the box is x, y, width and height in pixels. ``category`` may be a name until
        `_number_names`."""
        entry = {"id": len(self.annotations) + 1, "image_id": image, "category_id": category, "bbox": box, **more}
        if polygons:
            entry["segmentation"] = [*polygons]
        self.annotations.append(entry)


def find_boxes(files: Files) -> Found | None:
    """The first format of `DETECTION` that the folder has."""
    for read in DETECTION.values():
        if found := read(files):
            found.report.source = str(files.root)
            return found
    return None


# ---- COCO


def read_coco_files(files: Files) -> Found | None:
    """COCO's JSON under any name, one file or several; their classes are joined by name where ids differ."""
    loose = [path for path in files[".json"] if PurePosixPath(path).stem not in files.images.names]  # no labelme
    instances = [path for path in loose if PurePosixPath(path).name.startswith("instances")]
    found, numbered, parts = Found("COCO JSON", files.root), set(), []
    for path in instances or loose:
        content = _coco_content(files, path)
        if content is not None:
            parts.append((path, content))
    if not parts:
        return None
    if instances and (others := sorted(set(loose) - set(instances))):
        found.notes.append(f"read are {', '.join(instances)}; not read: {first_names(others)}")
    ids = _category_ids([content for _, content in parts])
    found.names = {number: name for name, number in sorted(ids.items(), key=lambda pair: pair[1])}
    for path, content in parts:
        _join(found, files, path, content, ids, numbered)
    return found


def _coco_content(files: Files, path: str) -> dict[str, Any] | None:
    content = files.json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "categories")):
        return None
    content.setdefault("annotations", [])
    return content if isinstance(content["annotations"], list) else None


def _category_ids(contents: list[dict[str, Any]]) -> dict[str, int]:
    """Name -> id: the files' own where they agree, else counted from 1 by first occurrence."""
    pairs: set[tuple[str, int]] = {
        (entry["name"], entry["id"])
        for content in contents
        for entry in content["categories"]
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("id"), int)
    }
    ids = dict(sorted(pairs, key=lambda pair: pair[1]))
    if len(ids) == len(pairs) == len(set(ids.values())):
        return ids
    return {name: number for number, name in enumerate(ids, 1)}


def _join(
    found: Found, files: Files, path: str, content: dict[str, Any], ids: dict[str, int], numbered: set[Any]
) -> None:
    """Adds a file's lists, with new numbers for images where those of an earlier file occur again."""
    split = split_of(path)
    own = {entry.get("id"): entry.get("name") for entry in content["categories"] if isinstance(entry, dict)}
    images = [dict(entry) for entry in content["images"] if isinstance(entry, dict)]
    again = any(repr(entry.get("id")) in numbered for entry in images)
    numbers: dict[Any, Any] = {}
    for entry in images:
        name = str(entry.get("file_name", ""))
        place = files.images.find(name, path, split)
        entry["file_name"], entry["split"] = place or name or "(no file_name)", split or split_of(place or "")
        if again:
            numbers[repr(entry.get("id"))] = entry["id"] = len(numbered) + len(numbers) + 1_000_000_000
        found.images.append(entry)
    numbered |= {repr(entry.get("id")) for entry in images}
    for entry in content["annotations"]:
        if isinstance(entry, dict):
            entry = dict(entry, image_id=numbers.get(repr(entry.get("image_id")), entry.get("image_id")))
            name = own.get(entry.get("category_id"))
            entry["category_id"] = ids[name] if isinstance(name, str) and name in ids else entry.get("category_id")
            found.annotations.append(entry)


# ---- Pascal VOC


def read_voc_files(files: Files) -> Found | None:
    """An XML file for each image, with any classes, wherever they lie. Corners are taken as they stand."""
    found, labels = Found("Pascal VOC XML", files.root), Counter[str]()
    lists = _voc_lists(files)
    pictures = Paths(p for p in files.images.all if not MASK_FOLDERS.search(str(PurePosixPath(p).parent)))
    entries, seen = [], False
    for path in files[".xml"]:
        try:
            tree = files.xml(path)
            if tree.tag != "annotation":
                continue
            seen = True
            stem, name = PurePosixPath(path).stem, (tree.findtext("filename") or "").strip()
            image = pictures.find(name, path) if PurePosixPath(name).stem == stem else None
            image = image or pictures.find(stem, path) or (pictures.find(name, path) if name else None)
            if image is None:
                raise DataError("no image, or several, of this name")
            entries.append((path, image, *_voc_objects(tree)))
        except (DataError, ValueError) as error:
            found.report.rows.append((path, None, f"annotation left out: {error}"))
    if not seen:
        return None
    missing = sizes_of(files, (image for _, image, size, _ in entries if size is None), found.report)
    for path, image, size, objects in entries:
        if size is None and image not in missing:
            continue
        number = found.add_image(image, size or missing[image], lists.get(PurePosixPath(path).stem) or split_of(image))
        for name, (x1, y1, x2, y2), difficult in objects:
            labels[name] += 1
            found.add(number, name, [x1, y1, x2 - x1, y2 - y1], difficult=difficult)
    return _number_names(found, labels)


def _voc_lists(files: Files) -> dict[str, str]:
    """Image name -> split by ImageSets/*/{train,val,test}.txt."""
    lists: dict[str, str] = {}
    for path in files[".txt"]:
        place = PurePosixPath(path)
        if "ImageSets" in place.parts and place.stem.lower() in SPLIT_NAMES:
            names = [line.split()[0] for line in files.text(path).splitlines() if line.strip()]
            lists |= dict.fromkeys(names, SPLIT_NAMES[place.stem.lower()])
    return lists


def _voc_objects(tree: Any) -> tuple[tuple[int, int] | None, list[tuple[str, list[float], int]]]:
    """The size, None where the file has none; name, corners and whether it is difficult of each object."""
    height, width = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    objects = []
    for entry in tree.iter("object"):
        corners = [float(entry.findtext(f"bndbox/{end}") or "nan") for end in ("xmin", "ymin", "xmax", "ymax")]
        name = (entry.findtext("name") or "").strip()
        if not name or not all(map(math.isfinite, corners)):
            raise DataError("an object without a name or a box")
        objects.append((name, corners, int((entry.findtext("difficult") or "0").strip() == "1")))
    return (height, width) if height > 0 and width > 0 else None, objects


def _number_names(found: Found, labels: Iterable[str]) -> Found:
    """Categories from 1 by name, of annotations that still have names."""
    found.names = dict(enumerate(sorted(labels), 1))
    numbers = {name: number for number, name in found.names.items()}
    for entry in found.annotations:
        entry["category_id"] = numbers[entry["category_id"]]
    return found


# ---- YOLO


def read_yolo_files(files: Files) -> Found | None:
    """A text file for each image, with a line for each object: a class and a box (centre, size) or a polygon, as
    fractions of the image. Names and splits are those of a YAML file, or of CVAT's ``obj.names`` and ``train.txt``."""
    found = Found("YOLO", files.root)
    settings = next((c for p in (*files[".yaml"], *files[".yml"]) if isinstance(c := _yolo_yaml(files, p), dict)), None)
    stems = Paths(path for path in files[".txt"] if PurePosixPath(path).stem in files.images.names)
    if settings is None and not any(_looks_like_yolo(files, path) for path in stems.all[:20]):
        return None
    found.names = _yolo_names(files, settings, found)
    prefixes, listed = _yolo_splits(files, settings or {}, found)
    labels = {path: _label_file(stems, path) for path in files.images.all}
    if settings and prefixes:
        labels = {p: label for p, label in labels.items() if p in listed or any(map(f"{p}".startswith, prefixes))}
    without = [path for path, label in labels.items() if label is None]
    if without:
        found.notes.append(f"{len(without):,} images have no label file, so no objects: {first_names(without)}")
    for path, size in sizes_of(files, labels, found.report).items():
        split = listed.get(path) or next((s for p, s in prefixes.items() if path.startswith(p)), "")
        number = found.add_image(path, size, split or ("" if prefixes or listed else split_of(path)))
        if (label := labels[path]) is not None:
            _yolo_lines(found, files, label, number, size)
    return found


def _yolo_yaml(files: Files, path: str) -> Any:
    content = files.yaml(path)
    return content if isinstance(content, dict) and isinstance(content.get("names"), list | dict) else None


def _looks_like_yolo(files: Files, path: str) -> bool:
    try:
        rows = [[float(value) for value in line.split()] for line in files.text(path).splitlines() if line.strip()]
    except (ValueError, DataError):
        return False
    return bool(rows) and all(len(row) >= 5 and row[0] == int(row[0]) >= 0 for row in rows)


def _yolo_names(files: Files, settings: dict[str, Any] | None, found: Found) -> dict[int, str]:
    if settings is not None:
        names = settings["names"]
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        if not all(isinstance(name, str | int | float) and str(key).isdecimal() for key, name in pairs):
            raise DataError(f"{files.root}: the names of the YAML file are no list of names: {str(names)[:100]}")
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(key): str(name) for key, name in pairs}
    lists = [p for p in files[".txt"] if PurePosixPath(p).name in ("classes.txt", "labels.txt")]
    for path in (*files[".names"], *lists):
        return dict(enumerate(line.strip() for line in files.text(path).splitlines() if line.strip()))
    found.notes.append("no file names the classes: they are called by their numbers")
    return {}


def _yolo_splits(files: Files, settings: dict[str, Any], found: Found) -> tuple[dict[str, str], dict[str, str]]:
    """Split by the beginning of an image's path, and by its whole path, of what a YAML file or CVAT's lists name."""
    prefixes: dict[str, str] = {}
    listed: dict[str, str] = {}
    folders = {f"{parent}/" for path in files.images.all for parent in PurePosixPath(path).parents}
    named = {SPLIT_NAMES[key]: value for key, value in settings.items() if key in SPLIT_NAMES and value}
    if not named:
        lists = [p for p in files[".txt"] if PurePosixPath(p).stem.lower() in SPLIT_NAMES and _is_list(files, p)]
        named = {SPLIT_NAMES[PurePosixPath(path).stem.lower()]: path for path in lists}
    for split, values in named.items():
        for value in values if isinstance(values, list) else [values]:
            parts = [
                part for part in PurePosixPath(str(value).replace("\\", "/")).parts if part not in ("..", ".", "/")
            ]
            places = ["/".join(parts[i:]) for i in range(len(parts))]
            folder = next((f"{place}/" for place in places if f"{place}/" in folders), None)
            text = next((place for place in places if place in files[".txt"]), None)
            if folder is not None and prefixes.get(folder, split) != split:
                found.notes.append(
                    f"{prefixes[folder]} and {split} are the same folder {folder}: taken as without split"
                )
                prefixes[folder] = ""
            elif folder is not None:
                prefixes[folder] = split
            elif text is not None:
                lines = filter(None, map(str.strip, files.text(text).splitlines()))
                listed |= {image: split for line in lines if (image := files.images.find(line, text)) is not None}
            else:
                found.notes.append(f"{split}: {value} is not below {files.root}")
    longest_first = sorted(prefixes.items(), key=lambda pair: -len(pair[0]))
    return dict(longest_first), listed


def _is_list(files: Files, path: str) -> bool:
    lines = [line for line in files.text(path).splitlines() if line.strip()]
    return bool(lines) and files.images.find(lines[0].strip(), path) is not None


def _label_file(labels: Paths, image: str) -> str | None:
    """``labels/`` for the last ``images/`` of the path, else beside the image, else the only one of its name."""
    path = PurePosixPath(image)
    mirrored = re.sub(r"(^|/)images/(?!.*(^|/)images/)", r"\1labels/", image)
    for place in (PurePosixPath(mirrored).with_suffix(".txt"), path.with_suffix(".txt")):
        if str(place) in labels.names.get(path.stem, ()):
            return str(place)
    return labels.find(f"{path.stem}.txt", image, split_of(image))


def _yolo_lines(found: Found, files: Files, path: str, number: int, size: tuple[int, int]) -> None:
    """Adds the objects of a label file, and reports its wrong lines."""
    height, width = size
    try:
        lines = [line.split() for line in files.text(path).splitlines() if line.strip()]
    except DataError as error:
        found.report.rows.append((path, None, f"labels left out: {error}"))
        return
    for row, words in enumerate(lines, 1):
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            label, values = -1, []
        if label < 0 or (len(values) != 4 and (len(values) < 6 or len(values) % 2)) or len(values) > 2 * MAX_POINTS:
            reason = "line is no class with a box or a polygon"
        elif not all(-0.5 <= value <= 1.5 for value in values):
            reason = "line has values that are no fractions of the image"
        elif label not in found.names and "called by their numbers" not in " ".join(found.notes):
            reason = f"class {label} has no name"
        else:
            found.names.setdefault(label, str(label))
            polygon = [value * (height if i % 2 else width) for i, value in enumerate(values)]
            if len(values) == 4:
                x, y, w, h = polygon
                found.add(number, label, [x - w / 2, y - h / 2, w, h])
            else:
                found.add(number, label, extent(polygon), [polygon])
            continue
        found.report.rows.append((path, row, reason))


def extent(polygon: list[float]) -> list[float]:
    """The box of a polygon: x, y, width, height."""
    x, y = polygon[0::2], polygon[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


# ---- labelme


def read_labelme_files(files: Files) -> Found | None:
    """A JSON file of shapes beside each image: polygons, rectangles and circles."""
    found, labels = Found("labelme JSON", files.root), Counter[str]()
    for path in files[".json"]:
        image = files.images.find(PurePosixPath(path).stem, path)
        if image is None:
            continue
        try:
            content = files.json(path)
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                continue
            height, width = content.get("imageHeight"), content.get("imageWidth")
            if not all(type(side) is int and side > 0 for side in (height, width)):
                height, width = image_size(files.root / image)
        except (DataError, OSError, ValueError) as error:
            found.report.rows.append((path, None, f"annotation left out: {error}"))
            continue
        number = found.add_image(image, (height, width), split_of(image))
        found.images[-1]["mask"] = path
        for row, shape in enumerate(content["shapes"]):
            polygon = labelme_polygon(shape)
            if polygon is None:
                found.report.rows.append((path, row, "shape is no polygon, rectangle or circle with a label"))
                continue
            labels[shape["label"]] += 1
            found.add(number, shape["label"], extent(polygon), [polygon])
    return _number_names(found, labels) if found.images else None


def labelme_polygon(shape: Any) -> list[float] | None:
    """x and y in turn; None where the shape has no area or no label."""
    points = shape.get("points") if isinstance(shape, dict) and isinstance(shape.get("label"), str) else None
    if not isinstance(points, list) or not 2 <= len(points) <= MAX_POINTS:
        return None
    try:
        pairs = [(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError):
        return None
    if not all(map(math.isfinite, (value for pair in pairs for value in pair))):
        return None
    kind = shape.get("shape_type") or "polygon"
    if kind == "rectangle" and len(pairs) == 2:
        (x1, y1), (x2, y2) = pairs
        return [x1, y1, x2, y1, x2, y2, x1, y2]
    if kind == "circle" and len(pairs) == 2:
        (x, y), edge = pairs
        radius, turn = math.dist((x, y), edge), 2 * math.pi / 32
        return [v for i in range(32) for v in (x + radius * math.cos(i * turn), y + radius * math.sin(i * turn))]
    return [value for pair in pairs for value in pair] if kind == "polygon" and len(pairs) >= 3 else None


def draw_shapes(path: str, classes: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """uint8 ``[H, W]`` of labelme's shapes, one over the other: classes, 255 for another label.

    Raises:
        ValueError: the file is damaged.
    """
    content = read_json(Path(path))
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise ValueError(f"{path} has no shapes")
    numbers = {name: number for number, name in enumerate(classes)}
    drawn = Image.new("L", (size[1], size[0]), numbers.get("background", 255))
    for shape in shapes:
        polygon = labelme_polygon(shape)
        if polygon is not None:
            label = "background" if shape["label"] == "_background_" else shape["label"]
            ImageDraw.Draw(drawn).polygon(polygon, fill=numbers.get(label, 255))
    return np.array(drawn)


def first_names(names: list[str], count: int = 3) -> str:
    return f"{', '.join(names[:count])}{', ...' if len(names) > count else ''}"


DETECTION: dict[str, Callable[[Files], Found | None]] = {
    "coco": read_coco_files,
    "voc": read_voc_files,
    "yolo": read_yolo_files,
    "labelme": read_labelme_files,
}
