"""Detection data in COCO's format: read once into flat arrays, checked entry by entry, decoded image by image.

Boxes are corners ``(x1, y1, x2, y2)`` in pixels inside the program and ``(x, y, width, height)`` in files. Classes are
numbered 0 .. N-1 in the order of the category ids, which may have gaps. Whatever an annotation file holds that cannot
be used is counted by reason and named, see :class:`BadEntries`.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from faster_coco_eval import mask as run_lengths
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...backbones.images import to_mode
from ...configs.schema import DetectAugmentConfig, DetectConfig
from .composites import write_composites
from .files import ATTEMPTS, UNREADABLE, DenseLoader, Found
from .guard import BadSamples, DataError, Excluded
from .order import EpochOrder
from .semantic import photometric
from .transforms import seeded
from .voc import read_voc

# reported, and still used
CLIPPED = "box reaches beyond the image: clipped"
MEASURED = "area is negative or not a number: measured"
Target = dict[str, torch.Tensor]


class BadEntries(BadSamples):
    """The book of unreadable images, and of the entries of annotation files that cannot be used as they are.

    Attributes:
        entries: (file, image, annotation id, reason).
    """

    def __init__(self, limit: float):
        super().__init__(limit)
        self.entries: list[tuple[str, str, Any, str]] = []

    def counts(self, file: str) -> dict[str, int]:
        """How many entries of ``file`` by reason, without the particulars in its parentheses; most first."""
        return dict(Counter(entry[3].split(" (")[0] for entry in self.entries if entry[0] == file).most_common())

    def write(self, path: Path) -> None:
        """Writes bad_annotations.csv too, beside ``path``, where there is something to write."""
        super().write(path)
        if not self.entries:
            return
        path = path.with_name("bad_annotations.csv")
        temporary = Path(f"{path}.tmp")
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "image", "annotation", "reason"])
            writer.writerows(self.entries)
        os.replace(temporary, path)


@dataclass
class CocoIndex:
    """An annotation file as arrays: I images, A annotations, those of image i at ``starts[i]:starts[i + 1]``.

    ``usable`` marks what can be trained on; the evaluation takes all A, crowds included, as the file has them.
    ``segments`` holds the masks' JSON texts one after the other, that of annotation a at ``ends[a - 1]:ends[a]``: one
    array, where millions of Python objects would be copied into every loading process. It is empty where no masks were
    asked for.
    """

    file: str
    folder: Path
    categories: dict[int, str]  # id -> name, by id
    names: list[str]
    image_ids: np.ndarray  # int64 [I]
    sizes: np.ndarray  # int64 [I, 2]: height, width
    starts: np.ndarray  # int64 [I + 1]
    boxes: np.ndarray  # float64 [A, 4]: x, y, width, height, as in the file
    labels: np.ndarray  # int64 [A]: 0 .. N-1
    crowd: np.ndarray  # bool [A]
    areas: np.ndarray  # float64 [A]
    usable: np.ndarray  # bool [A]
    segments: np.ndarray  # uint8
    ends: np.ndarray  # int64 [A]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def masks(self) -> bool:
        return len(self.ends) > 0

    def select(self, keep: np.ndarray) -> None:
        """Keeps the images numbered ``keep``, in this order, with their annotations."""
        taken = [np.arange(self.starts[i], self.starts[i + 1]) for i in keep]
        rows = np.concatenate(taken) if taken else np.empty(0, np.int64)
        if self.masks:
            begins = np.concatenate([[0], self.ends[:-1]])
            pieces = [self.segments[begins[a] : self.ends[a]] for a in rows]
            self.segments = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
            self.ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum([len(t) for t in taken], dtype=np.int64)])
        self.boxes, self.labels, self.crowd = self.boxes[rows], self.labels[rows], self.crowd[rows]
        self.areas, self.usable = self.areas[rows], self.usable[rows]
        self.names, self.image_ids, self.sizes = [self.names[i] for i in keep], self.image_ids[keep], self.sizes[keep]

    def segment(self, annotation: int) -> Any:
        begin = self.ends[annotation - 1] if annotation else 0
        return json.loads(self.segments[begin : self.ends[annotation]].tobytes())

    def mask(self, annotation: int, height: int, width: int) -> np.ndarray:
        """uint8 ``[height, width]`` of one annotation."""
        return run_lengths.decode(_encoded(self.segment(annotation), height, width))

    def target(self, image: int) -> Target:
        """What a detector learns from an image: boxes float32 ``[N, 4]`` (corners, clipped to the image), labels int64
        ``[N]``, and where there are masks uint8 ``[N, H, W]``. Crowds and what is not usable are left out."""
        height, width = self.sizes[image].tolist()
        rows = np.arange(self.starts[image], self.starts[image + 1])
        rows = rows[self.usable[rows] & ~self.crowd[rows]]
        target = {
            "boxes": torch.from_numpy(_clip(self.boxes[rows], height, width)).float(),
            "labels": torch.from_numpy(self.labels[rows]),
        }
        if self.masks:
            masks = [self.mask(a, height, width) for a in rows]
            target["masks"] = torch.from_numpy(np.stack(masks) if masks else np.empty((0, height, width), np.uint8))
        return target

    def truth(self, images: Sequence[int]) -> dict[str, Any]:
        """These images as COCO's evaluation takes them, crowds included."""
        ids = list(self.categories)
        annotations = []
        for image in images:
            for a in range(self.starts[image], self.starts[image + 1]):
                entry = {
                    "id": len(annotations) + 1,  # from 1: to COCO's matching an id of 0 is no match
                    "image_id": int(self.image_ids[image]),
                    "category_id": ids[self.labels[a]],
                    "bbox": self.boxes[a].tolist(),
                    "area": float(self.areas[a]),
                    "iscrowd": int(self.crowd[a]),
                }
                if self.masks:
                    entry["segmentation"] = self.segment(a)
                annotations.append(entry)
        return {
            "images": [
                {"id": int(self.image_ids[i]), "height": int(self.sizes[i, 0]), "width": int(self.sizes[i, 1])}
                for i in images
            ],
            "annotations": annotations,
            "categories": [{"id": key, "name": name} for key, name in self.categories.items()],
        }


def _clip(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """x, y, width, height to corners within the image."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return corners.clip(0, [width, height, width, height])


def _encoded(segment: Any, height: int, width: int) -> dict[str, Any]:
    """Any of COCO's three forms as compressed run lengths."""
    if isinstance(segment, list):
        return run_lengths.merge(run_lengths.frPyObjects(segment, height, width))
    if isinstance(segment["counts"], list):
        return run_lengths.frPyObjects(segment, height, width)
    return segment


def _area(segment: Any, height: int, width: int) -> int:
    """Pixels of a mask."""
    return int(run_lengths.area(_encoded(segment, height, width)))


def _run_sum(text: str) -> int:
    """The sum of compressed run lengths (as COCO packs them: 5 bits a character, differences to the run before last
    from the fourth on); -1 where the text is none. The library reads beyond its memory on such a text."""
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


def _fault_of_mask(segment: Any, height: int, width: int) -> str | None:
    """Why a segmentation cannot be used, None if it can."""
    if not segment:
        return "no mask"
    if isinstance(segment, dict):
        size, counts = segment.get("size"), segment.get("counts")
        if size != [height, width]:
            return f"mask of another size than the image ({size}, the image has {[height, width]})"
        if isinstance(counts, list):
            good = all(type(c) is int and c >= 0 for c in counts) and sum(counts) == height * width
        else:
            good = isinstance(counts, str) and _run_sum(counts) == height * width
        return None if good else "mask's run lengths don't fill the image"
    if not isinstance(segment, list):
        return f"mask is neither polygons nor run lengths ({type(segment).__name__})"
    side = max(height, width)
    for polygon in segment:
        try:
            numbers = np.array(polygon)  # much faster than number by number: there are tens of millions in COCO
        except ValueError:  # lists of lists
            numbers = np.empty(0)
        if numbers.ndim != 1 or numbers.dtype.kind not in "if" or len(numbers) < 6 or len(numbers) % 2:
            return "mask has a polygon that is not three points or more"
        if not (numbers.min() >= -side and numbers.max() <= 2 * side):  # so written that NaN is found too
            return "mask has a polygon far outside the image"
    return None


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(c) in (int, float) and abs(c) < 1e9 for c in value)  # so no NaN either


def _fault_of_box(box: list[float], height: int, width: int) -> str | None:
    """Why a box cannot be learned, None if it can."""
    if box[2] <= 0 or box[3] <= 0:
        return "box has no area"
    if box[0] >= width or box[1] >= height or box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
        return "box lies outside the image"
    x1, y1, x2, y2 = np.float32(_clip(np.array([box]), height, width)[0])
    return None if x1 < x2 and y1 < y2 else "box has no area"  # below float32's steps


def _read_json(file: Path) -> dict[str, list[dict]]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError(f"the annotation file {file} does not exist") from None
    except OSError as error:
        raise DataError(f"the annotation file {file} can't be read: {error}") from None
    except (ValueError, RecursionError) as error:  # the former also of bytes that are no text
        raise DataError(f"{file} is not JSON, or was cut short: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}; COCO's format is an object with lists")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise DataError(f"{file} is not in COCO's format: it has no list {key!r} of objects")
    return content


def read_categories(file: Path, entries: list[dict]) -> dict[int, str]:
    """id -> name, by id.

    Raises:
        DataError: no category, an id that is no integer, an id or a name given twice.
    """
    found = [(entry.get("id"), entry.get("name")) for entry in entries]
    wrong = [pair for pair in found if type(pair[0]) is not int or not isinstance(pair[1], str)]
    if wrong:
        raise DataError(f"{file}: a category has an integer `id` and a `name`, not {wrong[0]}")
    for what, values in (("ids", [i for i, _ in found]), ("names", [n for _, n in found])):
        twice = [str(value) for value, count in Counter(values).items() if count > 1]
        if twice:
            raise DataError(f"{file}: category {what} given more than once: {', '.join(twice[:5])}")
    if not found:
        raise DataError(f"{file} has no categories")
    return dict(sorted(found))


def _read_images(file: Path, entries: list[dict]) -> dict[int, tuple[str, int, int]]:
    images = {}
    for entry in entries:
        name, sides = entry.get("file_name"), (entry.get("height"), entry.get("width"))
        if type(entry.get("id")) is not int or not isinstance(name, str) or not name:
            raise DataError(f"{file}: an image has an integer `id` and a `file_name`, not {str(entry)[:200]}")
        if not all(type(side) is int and side > 0 for side in sides):
            raise DataError(f"{file}: image {name!r} has no `height` and `width` in pixels: {sides}")
        if entry["id"] in images:
            raise DataError(f"{file}: two images have the id {entry['id']}: {images[entry['id']][0]!r} and {name!r}")
        images[entry["id"]] = (name, *sides)
    if not images:
        raise DataError(f"{file} has no images")
    return images


def read_coco(
    file: Path,
    folder: Path,
    bad: BadEntries,
    *,
    masks: bool,
    categories: dict[int, str] | None = None,
    read: Callable[[Path], dict[str, list[dict]]] = _read_json,
) -> CocoIndex:
    """Reads and checks an annotation file.

    Args:
        folder: where its ``file_name`` are.
        bad: where entries that cannot be used are booked: (file, image, annotation id, reason).
        masks: whether masks are learned: then an annotation without a sound one is not usable. An area that the file
            does not give is that of the mask; without masks, of the box.
        categories: id -> name of the classes to number by; None for the file's own, all of them.
        read: what answers the lists of ``file``.

    Raises:
        DataError: the file is missing, damaged or not in COCO's format, or has categories that are not among
            ``categories``.
    """
    content = read(file)
    own = read_categories(file, content["categories"])
    categories = own if categories is None else categories
    foreign = {key: name for key, name in own.items() if categories.get(key) != name}
    if foreign:
        raise DataError(f"{file} has categories that the model was not made for (id: name): {foreign}")
    labels = {key: label for label, key in enumerate(categories)}
    images = _read_images(file, content["images"])
    number = {key: i for i, key in enumerate(images)}
    rows: list[list[tuple]] = [[] for _ in images]
    for entry in content["annotations"]:
        key, image, box = entry.get("id"), entry.get("image_id"), entry.get("bbox")
        crowd, segment, category = entry.get("iscrowd", 0), entry.get("segmentation"), entry.get("category_id")
        if type(image) is not int or image not in number:
            bad.entries.append((str(file), str(image), key, f"image is not in the file (image_id {image})"))
            continue
        name, height, width = images[image]
        fault = None
        if type(category) is not int or category not in labels:
            fault = f"category is not in the file (category_id {category})"
        elif not _numbers(box) or len(box) != 4:
            fault = "box is not four numbers"
        elif not isinstance(crowd, int | float) or crowd not in (0, 1):
            fault = f"iscrowd is neither 0 nor 1 ({crowd!r})"
        elif masks:
            fault = _fault_of_mask(segment, height, width)
        if fault:  # of no use to the evaluation either
            bad.entries.append((str(file), name, key, fault))
            continue
        fault = _fault_of_box(box, height, width)
        if fault is None and masks and isinstance(segment, dict) and not _area(segment, height, width):
            fault = "mask is empty"
        if fault:
            bad.entries.append((str(file), name, key, fault))
        x, y, w, h = box
        if fault is None and (min(x, y) < -1 or x + w > width + 1 or y + h > height + 1):
            bad.entries.append((str(file), name, key, CLIPPED))
        area = entry.get("area")
        if not _numbers([area]) or area < 0:
            if area is not None:
                bad.entries.append((str(file), name, key, f"{MEASURED} ({str(area)[:50]})"))
            area = _area(segment, height, width) if masks else w * h
        text = json.dumps(segment).encode() if masks else b""
        rows[number[image]].append((box, labels[category], bool(crowd), area, fault is None, text))
    flat = [row for group in rows for row in group]
    boxes, label, crowd, area, usable, text = zip(*flat, strict=True) if flat else ((),) * 6
    return CocoIndex(
        file=str(file),
        folder=folder,
        categories=dict(categories),
        names=[name for name, _, _ in images.values()],
        image_ids=np.array(list(images), np.int64),
        sizes=np.array([sides for _, *sides in images.values()], np.int64),
        starts=np.concatenate([[0], np.cumsum([len(group) for group in rows], dtype=np.int64)]),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        labels=np.array(label, np.int64),
        crowd=np.array(crowd, bool),
        areas=np.array(area, np.float64),
        usable=np.array(usable, bool),
        segments=np.frombuffer(b"".join(text), np.uint8),
        ends=np.cumsum([len(t) for t in text], dtype=np.int64) if masks else np.empty(0, np.int64),
    )


def choose_images(index: CocoIndex, bad: BadSamples, *, train: bool, keep_empty: bool, limit: int | None) -> int:
    """Leaves in ``index`` the images that are there, in training those with something to learn, the first ``limit``.

    Returns:
        how many images without a usable object were left out.

    Raises:
        DataError: no image remains, or more files are missing than ``bad`` allows.
    """
    there = np.array([(index.folder / name).is_file() for name in index.names])
    if not there.any():
        raise DataError(f"none of the {len(there)} images of {index.file} is in {index.folder}")
    bad.start(len(there))
    bad.add((str(index.folder / index.names[i]), "the file does not exist") for i in np.flatnonzero(~there))
    learned = np.concatenate([[0], np.cumsum(index.usable & ~index.crowd)])
    empty = learned[index.starts[1:]] == learned[index.starts[:-1]]
    left_out = there & empty if train and not keep_empty else np.zeros_like(there)
    keep = np.flatnonzero(there & ~left_out)
    if len(keep) == 0:
        raise DataError(f"{index.file} has no image with an object to learn from (data.keep_empty keeps those without)")
    if len(keep[:limit]) < len(there):
        index.select(keep[:limit])
    return int(left_out.sum())


class RandomSizedCrop(v2.Transform):
    """A crop whose sides are drawn between two lengths, independently, and never beyond the image (DETR, arXiv
    2005.12872, appendix A.4)."""

    def __init__(self, shortest: int, longest: int):
        super().__init__()
        self.shortest, self.longest = shortest, longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        sides = v2.query_size(flat_inputs)
        crop = self._sides(sides)
        top, left = (int(torch.randint(0, s - c + 1, ())) for s, c in zip(sides, crop, strict=True))
        return {"top": top, "left": left, "height": crop[0], "width": crop[1]}

    def _sides(self, sides: Sequence[int]) -> list[int]:
        return [int(torch.randint(min(self.shortest, s), min(self.longest, s) + 1, ())) for s in sides]

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


class FinalCrop(RandomSizedCrop):
    """A crop of so many rows and columns, or of as many as there are, at a random place."""

    def __init__(self, rows: int, columns: int):
        v2.Transform.__init__(self)
        self.sides = rows, columns

    def _sides(self, sides: Sequence[int]) -> list[int]:
        return [min(most, side) for most, side in zip(self.sides, sides, strict=True)]


class Photometric(v2.Transform):
    """New colours, see `semantic.photometric`. torchvision's own also swaps channels."""

    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        return tv_tensors.wrap(photometric(inpt.as_subclass(torch.Tensor), random), like=inpt)


def augmentation(config: DetectAugmentConfig) -> v2.Transform:
    """Flip, then a random size, or with ``crop_prob`` a size, a crop and a size again, or with ``scale_jitter`` a size
    from far below to far above what fits (large-scale jittering, arXiv 2012.07177); then the last crop and new colours.
    What is smaller than the crop is padded in its batch. Sizes are interpolated without antialiasing, as the detectors
    do it in evaluation."""
    if not config.min_size or (config.crop_prob and not config.crop_min_size):
        raise DataError("augment.min_size and augment.crop_min_size need a length at least")
    if config.sampling == "range":
        if len(config.min_size) != 2 or config.min_size[0] > config.min_size[1]:
            raise DataError(f"augment.min_size={config.min_size}: sampling=range takes the least and the largest")
        sizes = list(range(config.min_size[0], config.min_size[1] + 1))
    else:
        sizes = config.min_size
    if config.crop_size[0] > config.crop_size[1]:
        raise DataError(f"augment.crop_size={config.crop_size}: the least side, then the largest")
    resize = v2.RandomShortestSize(sizes, config.max_size, antialias=False)
    if config.scale_jitter is not None:
        if config.final_crop_size is None or config.crop_prob or config.scale_jitter[0] > config.scale_jitter[1]:
            raise DataError(
                f"augment.scale_jitter={config.scale_jitter} is the least factor and the largest, of "
                f"augment.final_crop_size={config.final_crop_size}, without augment.crop_prob={config.crop_prob}"
            )
        resize = v2.ScaleJitter(tuple(config.final_crop_size), tuple(config.scale_jitter), antialias=False)
    if config.crop_prob:
        crop = [
            v2.RandomShortestSize(config.crop_min_size, antialias=False),
            RandomSizedCrop(*config.crop_size),
            v2.RandomShortestSize(sizes, config.max_size, antialias=False),
        ]
        resize = v2.RandomChoice([resize, v2.Compose(crop)], p=[1 - config.crop_prob, config.crop_prob])
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(config.hflip),
            v2.RandomVerticalFlip(config.vflip),
            resize,
            *([FinalCrop(*config.final_crop_size)] if config.final_crop_size is not None else []),
            *([Photometric()] if config.photometric else []),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1.0),  # what a crop has left nothing of
        ]
    )


class CocoImages(Dataset):
    """Images with their targets; the unreadable are reported, never returned.

    Items are asked for as (epoch, image number) and are (uint8 ``[C, H, W]`` or None, target, image number, unreadable
    images met on the way). What is drawn for an item depends on seed, epoch and number alone, whatever process draws.

    Args:
        transform: of the training; None in evaluation, where the target is left empty.
    """

    def __init__(self, index: CocoIndex, channels: int, transform: v2.Transform | None, seed: int):
        self.index, self.channels, self.transform, self.seed = index, channels, transform, seed

    def __len__(self) -> int:
        return len(self.index)

    def image(self, number: int) -> torch.Tensor:
        """uint8 ``[C, H, W]``.

        Raises:
            one of UNREADABLE: also when the file has another size than its annotations.
        """
        with Image.open(self.index.folder / self.index.names[number]) as file:
            image = to_mode(file, self.channels)
        height, width = self.index.sizes[number].tolist()
        if image.size != (width, height):
            raise ValueError(f"is {image.width}x{image.height} pixels, its annotations are for {width}x{height}")
        return v2.functional.pil_to_tensor(image)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor | None, Target, int, Found]:
        epoch, index = item
        found: Found = []
        for attempt in range(ATTEMPTS if self.transform is not None else 1):
            number = (index + attempt) % len(self)
            try:
                image = self.image(number)
            except UNREADABLE as error:
                name = str(self.index.folder / self.index.names[number])
                found.append((name, f"{type(error).__name__}: {error}"))
                continue
            if self.transform is None:
                return image, {}, number, found
            image, target = self._augment(image, self.index.target(number), (self.seed, epoch, index))
            return image, target, number, found
        return None, {}, -1, found

    def _augment(self, image: torch.Tensor, target: Target, seed: Sequence[int]) -> tuple[torch.Tensor, Target]:
        canvas = tuple(image.shape[-2:])
        typed = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=canvas),
            "labels": target["labels"],
        }
        if "masks" in target:
            typed["masks"] = tv_tensors.Mask(target["masks"])
        with seeded(*seed):
            typed = self.transform(typed)
        plain = {key: value.as_subclass(torch.Tensor) for key, value in typed.items()}
        return plain.pop("image"), plain


class DetectBatch(NamedTuple):
    """images: float ``[C, H, W]`` each, in [0, 1]; targets: what they hold (empty in evaluation); numbers: which images
    of the index they are."""

    images: list[torch.Tensor]
    targets: list[Target]
    numbers: list[int]


class CocoLoader(DenseLoader):
    """Batches of images and what they hold; see `DenseLoader`."""

    def __init__(self, dataset: CocoImages, order: EpochOrder, device: torch.device, bad: BadSamples, workers: int):
        super().__init__(dataset, order, device, bad, workers, collate=list)

    @property
    def index(self) -> CocoIndex:
        return self.dataset.index

    def epoch(self, epoch: int, start: int = 0) -> Iterator[DetectBatch]:
        """Yields the batches of an epoch from the ``start``-th on.

        Raises:
            DataError: too many unreadable images.
        """
        for items in self._read(epoch, start):
            self.bad.add(pair for *_, found in items for pair in found)
            items = [item for item in items if item[0] is not None]
            if not items:
                if self.order.train:
                    raise DataError(f"no readable image within {ATTEMPTS} neighbours of a whole batch")
                continue
            images = [image.to(self.device, non_blocking=True).float().div_(255) for image, *_ in items]
            targets = [{k: v.to(self.device, non_blocking=True) for k, v in target.items()} for _, target, *_ in items]
            yield DetectBatch(images, targets, [number for *_, number, _ in items])


@dataclass
class DetectData:
    """What a detection run reads; ``train`` is None when only an evaluation was asked for."""

    train: CocoLoader | None
    val: CocoLoader
    categories: dict[int, str]  # id -> name, by id; the class of a label is its place
    bad: BadEntries
    notes: list[str]  # what was left out, in words


def build_coco(
    config: DetectConfig,
    *,
    masks: bool,
    device: torch.device,
    categories: dict[int, str] | None = None,
    train: bool = True,
    rank: int = 0,
    world: int = 1,
) -> DetectData:
    """Builds the loaders.

    Args:
        masks: whether the detector learns masks.
        device: where batches go.
        categories: id -> name of a trained model's classes; None: those of the training annotations.
        train: False builds the evaluation loader alone.

    Raises:
        DataError: data that are missing, damaged or out of range.
    """
    data = config.data
    if data.root is None:
        raise DataError(f"data.root is needed: the folder with {data.val_annotations} and {data.val_images}")
    if data.kind == "voc" and masks:
        raise DataError("data.kind=voc has boxes, and this detector learns masks")
    root = Path(data.root)
    if data.kind == "digits":
        with PartialState().main_process_first():  # the others find them written
            write_composites(root, data.digits_train, data.digits_val, data.digits_size, seed=0)
    if not root.is_dir():
        raise DataError(f"the data folder {root} does not exist (data.root)")
    bad, excluded = BadEntries(data.max_bad_fraction), Excluded.read(data.exclude)
    notes: list[str] = []
    loaders = {}
    for split in ("train", "val") if train else ("val",):
        training = split == "train"
        annotations, images = (getattr(data, f"{split}_{name}") for name in ("annotations", "images"))
        file, folder, read = root / annotations, root / images, _read_json
        if data.kind == "voc":
            folder, read = root, lambda _, sets=annotations, training=training: read_voc(root, sets, train=training)
        index = read_coco(file, folder, bad, masks=masks, categories=categories, read=read)
        categories = index.categories
        if excluded:
            paths = [index.folder / name for name in index.names]
            keep = [not excluded.holds(str(path), os.path.relpath(path, root)) for path in paths]
            index.select(np.flatnonzero(keep))
            if len(index) == 0:
                raise DataError(f"data.exclude={data.exclude} leaves no image of {file}")
        limit = data.limit if training else data.val_limit
        empty = choose_images(index, bad, train=training, keep_empty=data.keep_empty, limit=limit)
        counts = bad.counts(str(file))
        if counts:
            notes.append(f"{file}: " + ", ".join(f"{count:,} x {reason}" for reason, count in counts.items()))
        if empty:
            notes.append(f"{file}: {empty:,} images without an object left out of training (data.keep_empty=true: not)")
        if not training and index.crowd.all():
            raise DataError(f"{file} has no annotation to evaluate against (crowds are ignored)")
        transform = augmentation(config.augment) if training else None
        batch_size = config.train.batch_size if training else config.train.val_batch_size or config.train.batch_size
        order = EpochOrder(len(index), batch_size, train=training, seed=config.seed, rank=rank, world=world)
        dataset = CocoImages(index, data.in_chans, transform, config.seed)
        loaders[split] = CocoLoader(dataset, order, device, bad, data.workers)
    if excluded:
        notes.append(excluded.note())
    if bad.names:
        notes.append(f"{len(bad.names):,} images of the annotations don't exist, first {min(bad.names)}")
    return DetectData(loaders.get("train"), loaders["val"], categories, bad, notes)
