"""Indexes of the samples of a split, as flat arrays; all readers return one.

Worker processes share arrays. They would copy a list of Python objects, because reference counts are written to.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar

import numpy as np
import torch
from faster_coco_eval import mask as run_lengths
from torchvision import tv_tensors

from .dense_transforms import LazyMasks
from .guard import DataError, Excluded, Report

Target = dict[str, torch.Tensor]


def encode_paths(paths: Iterable[str | os.PathLike]) -> np.ndarray:
    """Paths as an array of bytes; names need not be UTF-8."""
    return np.array([os.fsencode(path) for path in paths], bytes)


def encode_ids(ids: Sequence[Any]) -> np.ndarray:
    """Ids as an array: int64 if possible, else bytes of JSON."""
    if all(type(value) is int and -(2**63) <= value < 2**63 for value in ids):
        return np.array(ids, np.int64)
    return np.array([json.dumps(value).encode() for value in ids], bytes)


def offsets(lengths: Iterable[int]) -> np.ndarray:
    """Start offsets of parts with these lengths, and the end of the last one."""
    return np.cumsum([0, *lengths], dtype=np.int64)


@dataclass
class Texts:
    """Byte strings concatenated in one array; item a is ``content[starts[a]:starts[a + 1]]``."""

    content: np.ndarray  # uint8
    starts: np.ndarray  # int64 [A + 1]

    @classmethod
    def pack(cls, texts: Sequence[bytes]) -> "Texts":
        return cls(np.frombuffer(b"".join(texts), np.uint8), offsets(map(len, texts)))

    def __getitem__(self, row: int) -> bytes:
        return self.content[self.starts[row] : self.starts[row + 1]].tobytes()


@dataclass(kw_only=True)
class Index:
    """N images of a split, and a report of those left out.

    Subclasses add arrays; ``per_sample`` lists those with one row per sample.
    """

    paths: np.ndarray = field(default_factory=lambda: np.empty(0, bytes))  # [N]; empty if the images are in archives
    report: Report = field(default_factory=lambda: Report(""))  # what could not be used
    per_sample: ClassVar[tuple[str, ...]] = ("paths",)

    def __len__(self) -> int:
        return len(getattr(self, self.per_sample[0]))

    def name(self, number: int) -> str:
        """The name of a sample in reports."""
        return os.fsdecode(self.paths[number])

    def open(self, number: int) -> IO[bytes]:
        """Opens the image file of a sample; raises OSError."""
        return open(self.name(number), "rb")

    def select(self, keep: np.ndarray) -> None:
        """Keeps the samples numbered ``keep``, in this order."""
        for array in self.per_sample:
            setattr(self, array, getattr(self, array)[keep])

    def exclude(self, excluded: Excluded, root: str | os.PathLike) -> None:
        """Removes the samples that ``excluded`` lists, as full paths or relative to ``root``.

        Raises:
            DataError: no sample remains.
        """
        if not excluded:
            return
        names = map(self.name, range(len(self)))
        keep = [not excluded.holds(name, os.path.relpath(name, root)) for name in names]
        self.select(np.flatnonzero(keep))
        if len(self) == 0:
            raise DataError(f"data.exclude leaves no sample in {root}")


@dataclass(kw_only=True)
class ClassificationIndex(Index):
    """Images with one class each."""

    label: np.ndarray  # int64 [N]
    per_sample: ClassVar[tuple[str, ...]] = ("paths", "label")


@dataclass(kw_only=True)
class SegmentationIndex(Index):
    """Images with a class for each pixel."""

    masks: np.ndarray  # bytes [N]: paths, all empty where there are no masks
    # int16 [256]: the class of each value of a mask file; [2**24]: of each colour, as 0xRRGGBB; 255 for none, -1 for
    # a value that is no label
    table: np.ndarray
    classes: tuple[str, ...] = ()  # for masks drawn from labelme's shapes
    per_sample: ClassVar[tuple[str, ...]] = ("paths", "masks")

    def mask_name(self, number: int) -> str:
        return os.fsdecode(self.masks[number])


@dataclass(kw_only=True)
class DetectionIndex(Index):
    """Images with A objects in total; those of image i are ``starts[i]:starts[i + 1]``.

    ``usable`` marks objects that can be trained on; the evaluation uses all A, including crowds.
    """

    categories: dict[int, str]  # id -> name, by id; labels count them from 0
    image_ids: np.ndarray  # [N]: int64, or bytes of JSON if an id is text or too large
    sizes: np.ndarray  # int64 [N, 2]: height, width
    starts: np.ndarray  # int64 [N + 1]
    boxes: np.ndarray  # float64 [A, 4]: x, y, width, height
    labels: np.ndarray  # int64 [A]
    crowd: np.ndarray  # bool [A]
    areas: np.ndarray  # float64 [A]
    usable: np.ndarray  # bool [A]
    segments: Texts | None = None  # masks as JSON, in any of COCO's three forms or null
    category_ids: tuple[Any, ...] = ()  # by label, as the file has them; empty: those of `categories`
    per_sample: ClassVar[tuple[str, ...]] = ("paths", "image_ids", "sizes")
    per_object: ClassVar[tuple[str, ...]] = ("boxes", "labels", "crowd", "areas", "usable")

    def rows(self, number: int) -> np.ndarray:
        """Rows of an image's objects."""
        return np.arange(self.starts[number], self.starts[number + 1])

    def select(self, keep: np.ndarray) -> None:
        super().select(keep)
        taken = [self.rows(number) for number in keep]
        rows = np.concatenate([np.empty(0, np.int64), *taken])
        self.starts = offsets(map(len, taken))
        for array in self.per_object:
            setattr(self, array, getattr(self, array)[rows])
        if self.segments is not None:
            self.segments = Texts.pack([self.segments[row] for row in rows])

    def _learned(self, number: int) -> np.ndarray:
        """Rows of an image's objects to learn."""
        rows = self.rows(number)
        return rows[self.usable[rows] & ~self.crowd[rows]]

    def learned_labels(self, number: int) -> np.ndarray:
        """The classes of these, int64 ``[N]``."""
        return self.labels[self._learned(number)]

    def objects(self) -> np.ndarray:
        """Number of objects to learn in each image, int64 ``[N]``."""
        learned = np.concatenate([[0], np.cumsum(self.usable & ~self.crowd)])
        return learned[self.starts[1:]] - learned[self.starts[:-1]]

    def target(self, number: int, lazy: bool = False) -> Target:
        """The training target of an image: boxes, float32 ``[N, 4]`` (corners, clipped to the image), labels, int64
        ``[N]``, and, if there are any, masks, uint8 ``[N, H, W]``. Without crowds and unusable objects.

        Args:
            lazy: masks are `LazyMasks`, to be decoded after the transforms.
        """
        height, width = self.sizes[number].tolist()
        rows = self._learned(number)
        boxes = torch.from_numpy(clip_boxes(self.boxes[rows], self.sizes[number])).float()
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.from_numpy(self.labels[rows]),
        }
        if self.segments is not None:
            codes = [encode_segment(json.loads(self.segments[row]), height, width) for row in rows]
            masks = LazyMasks.of(codes, height, width)
            target["masks"] = masks if lazy else tv_tensors.Mask(masks.decode())
        return target

    def image_id(self, number: int) -> Any:
        """The id that the annotation file gives an image."""
        value = self.image_ids[number]
        return json.loads(value) if isinstance(value, bytes) else int(value)

    def label_ids(self) -> list[Any]:
        """The id of each class in the annotation file, by label."""
        return list(self.category_ids or self.categories)

    def truth(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Ground truth of the images in COCO's format with the file's ids, including crowds."""
        ids, annotations = self.label_ids(), []
        for number in numbers:
            for row in self.rows(number):
                entry = {
                    "id": len(annotations) + 1,  # COCO's matching takes an id of 0 for no match
                    "image_id": self.image_id(number),
                    "category_id": ids[self.labels[row]],
                    "bbox": self.boxes[row].tolist(),
                    "area": float(self.areas[row]),
                    "iscrowd": int(self.crowd[row]),
                }
                if self.segments is not None:
                    entry["segmentation"] = json.loads(self.segments[row])
                annotations.append(entry)
        return {
            "images": [
                {"id": self.image_id(i), "height": int(self.sizes[i, 0]), "width": int(self.sizes[i, 1])}
                for i in numbers
            ],
            "annotations": annotations,
            "categories": [{"id": key, "name": name} for key, name in zip(ids, self.categories.values(), strict=True)],
        }


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Converts boxes ``[A, 4]`` (x, y, width, height) to corners, clipped to images of ``sizes`` ``[A, 2]`` or ``[2]``
    (height, width)."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return corners.clip(0, np.concatenate([sizes[..., ::-1], sizes[..., ::-1]], axis=-1))


def encode_segment(segment: Any, height: int, width: int) -> dict[str, Any]:
    """Converts any of COCO's three forms of a mask to compressed run lengths (RLE)."""
    if isinstance(segment, list):
        return run_lengths.merge(run_lengths.frPyObjects(segment, height, width))
    if isinstance(segment["counts"], list):
        return run_lengths.frPyObjects(segment, height, width)
    return segment
