"""Detects and reads annotation formats of objects: COCO JSON, Pascal VOC XML, YOLO text files, labelme JSON.

Each reader takes the files of a folder and returns a `Found`, or None if the folder has another format. Damaged files
are reported and their images left out.
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

from .files import SPLIT_NAMES, Files, Paths, ends_with, image_size, read_json, read_xml, sizes_of, split_of
from .guard import DataError, Report
from .validate import key_of

MAX_POINTS = 100_000  # of a polygon
UNNAMED = "no file names the classes: numbers are used"
MASK_FOLDERS = re.compile(r"segmentation(class|object)|masks?$|labels?$", re.IGNORECASE)


@dataclass
class Found:
    """The content of a data folder, as lists in COCO's format.

    Attributes:
        format: its name, for the log.
        images: COCO's keys and ``split`` (train, val, test, or empty); ``file_name`` is relative to the root. With a
            ``label`` for classification; with a ``mask`` for segmentation, the path of an image or of labelme's JSON.
        annotations: COCO's keys; VOC's also have ``difficult``.
        names: category id or label -> name.
        values: value of a mask's pixels -> name, None for no class, as `data.values`.
        notes: decisions of the reader, for the log.
        report: files and objects that could not be used.
    """

    format: str
    root: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    values: dict[Any, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    report: Report = field(default_factory=lambda: Report(""))

    def add_image(self, path: str, size: tuple[Any, Any], split: str) -> int:
        """Adds an image of ``size`` (height, width); returns its id."""
        number = len(self.images) + 1
        height, width = size
        self.images.append({"id": number, "file_name": path, "height": height, "width": width, "split": split})
        return number

    def add(
        self, image: int, category: Any, box: list[float], polygons: Sequence[list[float]] = (), **more: Any
    ) -> None:
        """Adds an object with a box (x, y, width, height in pixels). ``category`` may be a name until
        `_number_names`."""
        entry = {"id": len(self.annotations) + 1, "image_id": image, "category_id": category, "bbox": box, **more}
        if polygons:
            entry["segmentation"] = [*polygons]
        self.annotations.append(entry)


def find_boxes(files: Files) -> Found | None:
    """Reads a folder in the first matching format of `DETECTION`; None if no format matches."""
    for read in DETECTION.values():
        if found := read(files):
            found.report.source = str(files.root)
            return found
    return None


# ---- COCO


def read_coco_files(files: Files) -> Found | None:
    """Reads one or several COCO JSON files of any name; where ids differ, classes are merged by name."""
    loose = [path for path in files[".json"] if PurePosixPath(path).stem not in files.images.names]  # else labelme's
    instances = [path for path in loose if PurePosixPath(path).name.startswith("instances")]
    found, numbered, parts = Found("COCO JSON", files.root), set(), []
    for path in instances or loose:
        content = _coco_content(files, path)
        if content is not None:
            parts.append((path, content))
    if not parts:
        return None
    if instances and (others := sorted(set(loose) - set(instances))):
        found.notes.append(f"read {', '.join(instances)}; ignored {first_names(others)}")
    ids = _category_ids([content for _, content in parts])
    found.names = {number: name for name, number in sorted(ids.items(), key=lambda pair: pair[1])}
    entries = [entry for _, content in parts for entry in content["categories"] if isinstance(entry, dict)]
    if any(ids.get(str(entry.get("name")), entry.get("id")) != entry.get("id") for entry in entries):
        found.notes.append(f"category ids are text or differ between files: numbered from 1, {first_names([*ids])}")
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
    """Name -> id: those of the files if they agree, else new ones from 1."""
    pairs = {
        (entry["name"], entry.get("id") if type(entry.get("id")) is int else key_of(entry.get("id")))
        for content in contents
        for entry in content["categories"]
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    ids = dict(sorted(pairs, key=lambda pair: (isinstance(pair[1], str), pair[1], pair[0])))
    if len(ids) == len(pairs) == len(set(ids.values())) and all(type(number) is int for number in ids.values()):
        return ids
    return {name: number for number, name in enumerate(ids, 1)}


def _join(
    found: Found, files: Files, path: str, content: dict[str, Any], ids: dict[str, int], numbered: set[str]
) -> None:
    """Adds the lists of a file; its images get new ids if an earlier file has the same ones."""
    split = split_of(path)
    own = {key_of(entry.get("id")): entry.get("name") for entry in content["categories"] if isinstance(entry, dict)}
    images = [dict(entry) for entry in content["images"] if isinstance(entry, dict)]
    again = any(key_of(entry.get("id")) in numbered for entry in images)
    numbers: dict[str, Any] = {}
    names = [str(entry.get("file_name", "")) for entry in images]
    places = files.images.find_each(names, path, split)
    for entry, name, place in zip(images, names, places, strict=True):
        entry["file_name"], entry["split"] = place or name or "(no file_name)", split or split_of(place or "")
        if again:
            numbers[key_of(entry.get("id"))] = entry["id"] = len(numbered) + len(numbers) + 1_000_000_000
        found.images.append(entry)
    numbered |= {key_of(entry.get("id")) for entry in images}
    if elsewhere := [f"{n} is {p}" for n, p in zip(names, places, strict=True) if p and not ends_with(p, n)]:
        found.notes.append(f"{len(elsewhere):,} images found at another path: {first_names(elsewhere)}")
    for entry in content["annotations"]:
        if isinstance(entry, dict):
            entry = dict(entry, image_id=numbers.get(key_of(entry.get("image_id")), entry.get("image_id")))
            name = own.get(key_of(entry.get("category_id")))
            entry["category_id"] = ids.get(name) if isinstance(name, str) else None
            found.annotations.append(entry)


# ---- Pascal VOC


def read_voc_files(files: Files) -> Found | None:
    """Reads an XML file per image, with any classes, in any folders. Corners are used as they are."""
    found, labels = Found("Pascal VOC XML", files.root), Counter[str]()
    lists = list_splits(files, "Main")
    pictures = Paths(p for p in files.images.all if not MASK_FOLDERS.search(str(PurePosixPath(p).parent)))
    entries, seen = [], False
    for path in files[".xml"]:
        try:
            tree = read_xml(files.root / path)
            if tree.tag != "annotation":
                continue
            seen = True
            stem, name = PurePosixPath(path).stem, (tree.findtext("filename") or "").strip()
            image = pictures.find(name, path) if PurePosixPath(name).stem == stem else None
            image = image or pictures.find(stem, path) or (pictures.find(name, path) if name else None)
            if image is None:
                raise DataError("no single image of this name")
            entries.append((path, image, *voc_objects(tree)))
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


def list_splits(files: Files, task: str) -> dict[str, str]:
    """Image name -> split by VOC's ``ImageSets/TASK/{train,val,test}.txt``; by other lists of ``ImageSets`` where there
    are none of the task."""
    places = [PurePosixPath(path) for path in files[".txt"]]
    places = [place for place in places if "ImageSets" in place.parts and place.stem.lower() in SPLIT_NAMES]
    lists: dict[str, str] = {}
    for place in [place for place in places if place.parent.name == task] or places:
        names = [line.split()[0] for line in files.text(str(place)).splitlines() if line.strip()]
        lists |= dict.fromkeys(names, SPLIT_NAMES[place.stem.lower()])
    return lists


def voc_objects(tree: Any) -> tuple[tuple[int, int] | None, list[tuple[str, list[float], int]]]:
    """The size (height, width), None if missing; and name, corners and difficult (0, 1) of each object."""
    height, width = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    objects = []
    for entry in tree.iter("object"):
        corners = [float(entry.findtext(f"bndbox/{end}") or "nan") for end in ("xmin", "ymin", "xmax", "ymax")]
        name = (entry.findtext("name") or "").strip()
        if not name or not all(map(math.isfinite, corners)):
            raise DataError("an object has no name or no box")
        objects.append((name, corners, int((entry.findtext("difficult") or "0").strip() == "1")))
    return (height, width) if height > 0 and width > 0 else None, objects


def _number_names(found: Found, labels: Iterable[str]) -> Found:
    """Replaces the category names of annotations by ids from 1."""
    found.names = dict(enumerate(sorted(labels), 1))
    numbers = {name: number for number, name in found.names.items()}
    for entry in found.annotations:
        entry["category_id"] = numbers[entry["category_id"]]
    return found


# ---- YOLO


def read_yolo_files(files: Files) -> Found | None:
    """Reads a text file per image with a line per object: class and box (centre, size) or polygon, as fractions of the
    image. Names and splits come from a YAML file, or from CVAT's ``obj.names`` and ``train.txt``."""
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
        found.notes.append(f"{len(without):,} images without a label file, so without objects: {first_names(without)}")
    for path, size in sizes_of(files, labels, found.report).items():
        split = listed.get(path) or next((s for p, s in prefixes.items() if path.startswith(p)), "")
        number = found.add_image(path, size, split or ("" if prefixes or listed else split_of(path)))
        if (label := labels[path]) is not None:
            _yolo_lines(found, files, label, number, size)
    _check_centres(found)
    return found


def _check_centres(found: Found) -> None:
    """Raises:
    DataError: most boxes reach beyond their image, because they are corners, not centres and sizes.
    """
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in found.images}
    names = {entry["id"]: entry["file_name"] for entry in found.images}
    boxes = [entry for entry in found.annotations if "segmentation" not in entry]
    beyond = []
    for entry in boxes:
        (x, y, w, h), (width, height) = entry["bbox"], sizes[entry["image_id"]]
        if min(x / width, y / height) < -0.02 or max((x + w) / width, (y + h) / height) > 1.02:
            beyond.append(f"{names[entry['image_id']]}: {[x, y, w, h]}")
    if 2 * len(beyond) > len(boxes):
        raise DataError(
            f"{found.root}: {len(beyond):,} of {len(boxes):,} boxes reach beyond their image, so they are not (centre, "
            f"size) as fractions, in pixels: {'; '.join(beyond[:3])}"
        )


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
        pairs = list(names.items() if isinstance(names, dict) else enumerate(names))
        if not all(isinstance(name, str) and str(key).isdecimal() for key, name in pairs):
            raise DataError(f"{files.root}: invalid `names` in the YAML file: {str(names)[:100]}")
        return {int(key): name for key, name in pairs}
    lists = [p for p in files[".txt"] if PurePosixPath(p).name in ("classes.txt", "labels.txt")]
    for path in (*files[".names"], *lists):
        return dict(enumerate(line.strip() for line in files.text(path).splitlines() if line.strip()))
    found.notes.append(UNNAMED)
    return {}


def _yolo_splits(files: Files, settings: dict[str, Any], found: Found) -> tuple[dict[str, str], dict[str, str]]:
    """Path prefix -> split and image path -> split, from a YAML file or CVAT's lists."""
    prefixes: dict[str, str] = {}
    listed: dict[str, str] = {}
    folders = {f"{parent}/" for path in files.images.all for parent in PurePosixPath(path).parents}
    empty = ("", "~", "null", [])
    named = {SPLIT_NAMES[key]: value for key, value in settings.items() if key in SPLIT_NAMES and value not in empty}
    if not named:
        lists = [p for p in files[".txt"] if PurePosixPath(p).stem.lower() in SPLIT_NAMES and _is_list(files, p)]
        named = {SPLIT_NAMES[PurePosixPath(path).stem.lower()]: path for path in lists}
    for split, values in named.items():
        for value in values if isinstance(values, list) else [values]:
            path = PurePosixPath(str(value).replace("\\", "/"))
            parts = [part for part in path.parts if part not in ("..", ".", "/")]
            places = ["/".join(parts[i:]) for i in range(len(parts))]
            folder = next((f"{place}/" for place in places if f"{place}/" in folders), None)
            text = next((place for place in places if place in files[".txt"]), None)
            if folder is not None and prefixes.get(folder, split) != split:
                found.notes.append(f"{prefixes[folder]} and {split} are the same folder {folder}: not a split")
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
    """The label file of an image: with ``labels/`` for the last ``images/`` of its path, else beside it, else by
    name."""
    path = PurePosixPath(image)
    mirrored = re.sub(r"(^|/)images/(?!.*(^|/)images/)", r"\1labels/", image)
    for place in (PurePosixPath(mirrored).with_suffix(".txt"), path.with_suffix(".txt")):
        if str(place) in labels.names.get(path.stem, ()):
            return str(place)
    return labels.find(f"{path.stem}.txt", image, split_of(image))


def _yolo_lines(found: Found, files: Files, path: str, number: int, size: tuple[int, int]) -> None:
    """Adds the objects of a label file; reports its invalid lines."""
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
            reason = "line is not a class with a box or a polygon"
        elif not all(-0.5 <= value <= 1.5 for value in values):
            reason = "line has values that are not fractions of the image"
        elif label not in found.names and UNNAMED not in found.notes:
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
    """Reads a JSON file per image with polygons, rectangles and circles."""
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
                found.report.rows.append((path, row, "shape is not a polygon, rectangle or circle with a label"))
                continue
            labels[shape["label"]] += 1
            found.add(number, shape["label"], extent(polygon), [polygon])
    return _number_names(found, labels) if found.images else None


def labelme_polygon(shape: Any) -> list[float] | None:
    """The polygon of a shape, x and y alternating; None if the shape has no area or no label."""
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
    """Draws labelme's shapes in order as uint8 ``[H, W]``: classes, 255 for other labels.

    Raises:
        ValueError: a damaged file.
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
