"""Checks COCO annotations: whole files, every object, and the image files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from faster_coco_eval import mask as run_lengths
from pydantic import AfterValidator, Field, InstanceOf, StrictInt, StrictStr, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict  # pydantic needs it before Python 3.12

from .guard import DataError
from .index import clip_boxes, encode_segment

# reported, and still used
REPAIRED = "mask has polygons of fewer than three points or far outside the image: left out"
CLIPPED = "box reaches beyond the image: clipped"
MEASURED = "area is negative or not a number: measured"


def key_of(value: Any) -> str:
    """An id as text for comparisons: 7, 7.0 and "7" are equal."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return str(value) if type(value) in (int, str) else repr((value,))  # which is no id


def _check_id(value: Any) -> Any:
    if type(value) is int or (type(value) is str and value) or (type(value) is float and value.is_integer()):
        return value
    raise ValueError("an id should be an integer or text")


_Id = Annotated[Any, AfterValidator(_check_id)]


class _Image(TypedDict):
    id: _Id
    file_name: Annotated[StrictStr, Field(min_length=1)]
    height: Annotated[StrictInt, Field(gt=0)]
    width: Annotated[StrictInt, Field(gt=0)]


class _Category(TypedDict):
    id: _Id
    name: StrictStr


class _Content(TypedDict):
    images: Annotated[list[_Image], Field(min_length=1)]
    categories: Annotated[list[_Category], Field(min_length=1)]
    annotations: NotRequired[list[InstanceOf[dict]]]  # checked one by one, by `find_faults`


_CONTENT = TypeAdapter(_Content)


def check_content(source: str, content: Any) -> None:
    """Raises:
    DataError: not in COCO's format, no image or category, or an id or a category's name given twice.
    """
    try:
        _CONTENT.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place, value = ".".join(map(str, first["loc"])) or "the file", str(first["input"])[:200]
        raise DataError(f"{source} is not in COCO's format: {place}: {first['msg']}, got {value}") from None
    for key, field in (("images", "id"), ("categories", "id"), ("categories", "name")):
        counts = Counter(key_of(entry[field]) for entry in content[key])
        if twice := [str(value) for value, count in counts.items() if count > 1]:
            raise DataError(f"{source}: {key} with the same {field}: {', '.join(twice[:5])}")


@dataclass
class Objects:
    """A annotations as columns; the comments give the replacement of missing and invalid values."""

    image: np.ndarray  # int64 [A]: index of the image; -1
    label: np.ndarray  # int64 [A]: index of the category; -1
    boxes: np.ndarray  # float64 [A, 4]: x, y, width, height; NaN
    crowd: np.ndarray  # int64 [A]: 0, 1; -1
    areas: np.ndarray  # float64 [A]; NaN if missing, -1 if invalid
    segments: list[Any]  # [A]

    @classmethod
    def parse(cls, entries: Sequence[dict], images: dict[str, int], categories: dict[str, int]) -> "Objects":
        """From COCO's annotations, and the indices of images and categories by `key_of` of their ids."""

        def numbers(key: str, indices: dict[str, int]) -> np.ndarray:
            return np.array([indices.get(key_of(entry.get(key)), -1) for entry in entries], np.int64)

        boxes = [box if _is_box(box) else 4 * [np.nan] for box in (entry.get("bbox") for entry in entries)]
        crowds = [entry.get("iscrowd", 0) for entry in entries]
        areas = [entry.get("area") for entry in entries]
        return cls(
            numbers("image_id", images),
            numbers("category_id", categories),
            np.array(boxes, np.float64).reshape(-1, 4),
            np.array([int(crowd) if crowd in (0, 1) else -1 for crowd in crowds], np.int64),
            np.array([np.nan if area is None else area if _is_number(area) else -1 for area in areas], np.float64),
            [entry.get("segmentation") for entry in entries],
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # False for NaN


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


@dataclass
class Faults:
    """Result of `find_faults`."""

    dropped: np.ndarray  # bool [A]: of no use to training or evaluation
    unusable: np.ndarray  # bool [A]: cannot be trained on
    rows: list[tuple[int, str]]  # (object, reason), in the order of the file


def find_faults(objects: Objects, sizes: np.ndarray, *, masks: bool) -> Faults:
    """Checks every object.

    Args:
        sizes: height and width of each image.
        masks: whether masks are needed. Invalid polygons are then removed from ``objects.segments``. An object without
            a valid mask gets None there: it is not learned, and keeps its box in the evaluation.
    """
    sizes = sizes[objects.image]
    reasons: dict[int, str] = {}  # the first one of each object

    def report(wrong: np.ndarray, reason: str) -> None:
        reasons.update((row, reason) for row in np.flatnonzero(wrong).tolist() if row not in reasons)

    report(objects.image < 0, "image is not in the file")
    report(objects.label < 0, "category is not in the file")
    report(np.any(np.isnan(objects.boxes), axis=1), "box is not four numbers")
    report(objects.crowd < 0, "iscrowd is neither 0 nor 1")
    dropped = np.zeros(len(sizes), bool)
    dropped[list(reasons)] = True
    repaired = []
    if masks:
        for row, segment in enumerate(objects.segments):
            shape = sizes[row].tolist()
            if row not in reasons and isinstance(segment, list):
                segment = [polygon for polygon in segment if is_sound(polygon, *shape)]
                repaired += [row] if 0 < len(segment) < len(objects.segments[row]) else []
                objects.segments[row] = segment
            if row in reasons or (fault := mask_fault(segment, *shape)):
                objects.segments[row] = None
                reasons.setdefault(row, fault)

    first, last = objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]
    sides = sizes[:, ::-1]
    corners = clip_boxes(objects.boxes, sizes).astype(np.float32)  # rounding may leave no area
    report(np.any(objects.boxes[:, 2:] <= 0, axis=1), "box has no area")
    report(np.any((first >= sides) | (last <= 0), axis=1), "box lies outside the image")
    report(np.any(corners[:, :2] >= corners[:, 2:], axis=1), "box has no area")
    if masks:
        for row, segment in enumerate(objects.segments):
            if row not in reasons and isinstance(segment, dict) and not mask_area(segment, *sizes[row].tolist()):
                reasons[row] = "mask is empty"
    unusable = dropped.copy()
    unusable[list(reasons)] = True
    beyond = np.flatnonzero(~unusable & ((first < -1) | (last > sides + 1)).any(1))
    measured = np.flatnonzero(~dropped & (objects.areas < 0))
    rows = [*reasons.items(), *((row, CLIPPED) for row in beyond), *((row, MEASURED) for row in measured)]
    rows += [(row, REPAIRED) for row in repaired]
    return Faults(dropped, unusable, sorted(rows, key=lambda pair: pair[0]))


def check_boxes(source: str, objects: Objects, sizes: np.ndarray, names: Sequence[str]) -> None:
    """Detects other box formats from all objects of a file; one by one, such boxes would be clipped and trained on.

    Args:
        sizes: height and width of each image.
        names: of the images.

    Raises:
        DataError: boxes are fractions of the image, corners instead of sizes, or most of them without an area.
    """
    rows = np.flatnonzero((objects.image >= 0) & ~np.isnan(objects.boxes).any(1))
    if len(rows) == 0:
        return
    boxes, sides = objects.boxes[rows], sizes[objects.image[rows]][:, ::-1]
    first, last = boxes[:, :2], boxes[:, 2:]
    wrong, areas, between = None, objects.areas[rows], (last - first).prod(1)
    corners = (last > first).all() and (last <= sides).all()
    given = np.allclose(areas, between, rtol=1e-3) and not np.allclose(areas, last.prod(1), rtol=1e-3)
    if first.max() <= 1 and min(last.max(), (first + last).max()) <= 1 and sides.min() > 2:
        wrong = "boxes are fractions of the image, not pixels"
    elif corners and (given or 2 * (first + last > sides + 1).any(1).sum() > len(rows)):
        wrong = "boxes are corners (x1, y1, x2, y2), not (x, y, width, height)"
    elif 2 * (last <= 0).any(1).sum() > len(rows):
        wrong = "boxes have no area: sizes where corners belong, or the reverse"
    if wrong:
        examples = "; ".join(f"{names[objects.image[row]]}: {objects.boxes[row].tolist()}" for row in rows[:3])
        raise DataError(f"{source}: {wrong}: {examples}")


def mask_area(segment: Any, height: int, width: int) -> int:
    """Area of a mask in pixels."""
    return int(run_lengths.area(encode_segment(segment, height, width)))


def mask_fault(segment: Any, height: int, width: int) -> str | None:
    """Why a segmentation cannot be used; None if it can."""
    if not segment:
        return "no mask"
    if isinstance(segment, dict):
        size, counts = segment.get("size"), segment.get("counts")
        if size != [height, width]:
            return "mask size differs from the image"
        if isinstance(counts, list):
            sound = all(type(c) is int and c >= 0 for c in counts) and sum(counts) == height * width
        else:
            sound = isinstance(counts, str) and sum_runs(counts) == height * width
        return None if sound else "mask's run lengths don't fill the image"
    return None if isinstance(segment, list) else "mask is neither polygons nor run lengths"


def is_sound(polygon: Any, height: int, width: int) -> bool:
    """Whether a polygon has at least three points, none of them far outside the image."""
    try:
        numbers = np.array(polygon)  # faster than a loop: COCO has tens of millions of numbers
    except (ValueError, OverflowError):  # lists of lists
        return False
    if numbers.ndim != 1 or numbers.dtype.kind not in "if" or len(numbers) < 6 or len(numbers) % 2:
        return False
    side = max(height, width)
    return bool(numbers.min() >= -side and numbers.max() <= 2 * side)  # False with NaN, too


def sum_runs(text: str) -> int:
    """The sum of COCO's compressed run lengths (5 bits per character; from the fourth run on, differences to the run
    before last); -1 if invalid. The library reads out of bounds on invalid strings."""
    codes = np.frombuffer(text.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return -1
    last = np.flatnonzero(codes & 32 == 0)  # of each number
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() > 6:
        return -1
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    runs = np.add.reduceat((codes & 31) << (5 * place), first)
    runs -= np.where(codes[last] & 16, 1 << (5 * (place[last] + 1)), 0)  # two's complement
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return int(runs.sum()) if runs.min() >= 0 else -1
