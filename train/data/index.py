"""What readers return: the samples of a split as typed, flat arrays.

The arrays are shared by all worker processes. A list with a Python object for each of a million samples would be copied
into every one of them, as reference counts are written to.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from faster_coco_eval import mask as run_lengths
from torchvision import tv_tensors

from .guard import DataError, Excluded, Report

Target = dict[str, torch.Tensor]


def encode_paths(paths: Sequence[str | os.PathLike]) -> np.ndarray:
    """Paths as an array of bytes; names need not be UTF-8."""
    return np.array([os.fsencode(path) for path in paths], bytes)


@dataclass(kw_only=True)
class Index:
    """N image files and what was left out of the split.

    A subclass adds arrays; those with one row per sample are listed in ``per_sample``.
    """

    paths: np.ndarray  # bytes [N]
    report: Report | None = None  # what could not be used
    per_sample: ClassVar[tuple[str, ...]] = ("paths",)

    def __len__(self) -> int:
        return len(getattr(self, self.per_sample[0]))

    def name(self, number: int) -> str:
        """What reports call a sample."""
        return os.fsdecode(self.paths[number])

    def open(self, number: int) -> io.IOBase:
        """The image file of a sample; raises OSError if there is none."""
        return open(self.paths[number], "rb")

    def select(self, keep: np.ndarray) -> None:
        """Keeps the samples numbered ``keep``, in this order."""
        for array in self.per_sample:
            setattr(self, array, getattr(self, array)[keep])

    def exclude(self, excluded: Excluded, root: str | os.PathLike) -> None:
        """Leaves out the samples that ``excluded`` names, whole or relative to ``root``.

        Raises:
            DataError: none remains.
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

    masks: np.ndarray  # bytes [N]: paths
    table: np.ndarray  # int16 [256]: the class of each value of a mask file; 255 for none, -1 for no label
    per_sample: ClassVar[tuple[str, ...]] = ("paths", "masks")

    def mask_name(self, number: int) -> str:
        return os.fsdecode(self.masks[number])


@dataclass(kw_only=True)
class DetectionIndex(Index):
    """Images with A objects in all, those of image i at ``starts[i]:starts[i + 1]``.

    ``usable`` marks the objects that can be trained on; the evaluation takes all A, crowds included. ``segments`` holds
    the masks as JSON texts (any of COCO's three forms) one after the other, that of object a at
    ``segment_starts[a]:segment_starts[a + 1]``; None if masks were not asked for.
    """

    categories: dict[int, str]  # id -> name, by id; labels count them from 0
    image_ids: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int64 [N, 2]: height, width
    starts: np.ndarray  # int64 [N + 1]
    boxes: np.ndarray  # float64 [A, 4]: x, y, width, height
    labels: np.ndarray  # int64 [A]
    crowd: np.ndarray  # bool [A]
    areas: np.ndarray  # float64 [A]
    usable: np.ndarray  # bool [A]
    segments: np.ndarray | None = None  # uint8
    segment_starts: np.ndarray | None = None  # int64 [A + 1]
    per_sample: ClassVar[tuple[str, ...]] = ("paths", "image_ids", "sizes")
    per_object: ClassVar[tuple[str, ...]] = ("boxes", "labels", "crowd", "areas", "usable")

    def rows(self, number: int) -> np.ndarray:
        """The objects of an image."""
        return np.arange(self.starts[number], self.starts[number + 1])

    def select(self, keep: np.ndarray) -> None:
        super().select(keep)
        taken = [self.rows(number) for number in keep]
        rows = np.concatenate([np.empty(0, np.int64), *taken])
        self.starts = offsets(map(len, taken))
        for array in self.per_object:
            setattr(self, array, getattr(self, array)[rows])
        if self.segments is not None:
            texts = [self.segments[self.segment_starts[a] : self.segment_starts[a + 1]] for a in rows]
            self.segments = np.concatenate([np.empty(0, np.uint8), *texts])
            self.segment_starts = offsets(map(len, texts))

    def objects(self) -> np.ndarray:
        """int64 ``[N]``: how many objects of each image can be learned."""
        learned = np.concatenate([[0], np.cumsum(self.usable & ~self.crowd)])
        return learned[self.starts[1:]] - learned[self.starts[:-1]]

    def segment(self, row: int) -> Any:
        """The mask of an object as the file has it."""
        return json.loads(self.segments[self.segment_starts[row] : self.segment_starts[row + 1]].tobytes())

    def target(self, number: int) -> Target:
        """What a detector learns from an image: boxes float32 ``[N, 4]`` (corners, clipped to the image), labels int64
        ``[N]``, and where there are masks uint8 ``[N, H, W]``. Crowds and what is not usable are left out."""
        height, width = self.sizes[number].tolist()
        rows = self.rows(number)
        rows = rows[self.usable[rows] & ~self.crowd[rows]]
        boxes = torch.from_numpy(clip_boxes(self.boxes[rows], self.sizes[number])).float()
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.from_numpy(self.labels[rows]),
        }
        if self.segments is not None:
            masks = [run_lengths.decode(encode_segment(self.segment(row), height, width)) for row in rows]
            target["masks"] = tv_tensors.Mask(np.stack(masks) if masks else np.empty((0, height, width), np.uint8))
        return target

    def truth(self, numbers: Sequence[int]) -> dict[str, Any]:
        """These images as COCO's evaluation takes them, crowds included."""
        numbers, ids = np.asarray(numbers, int), list(self.categories)
        annotations = []
        for number in numbers:
            for row in self.rows(number):
                entry = {
                    "id": len(annotations) + 1,  # from 1: to COCO's matching an id of 0 is no match
                    "image_id": int(self.image_ids[number]),
                    "category_id": ids[self.labels[row]],
                    "bbox": self.boxes[row].tolist(),
                    "area": float(self.areas[row]),
                    "iscrowd": int(self.crowd[row]),
                }
                annotations.append(entry | ({} if self.segments is None else {"segmentation": self.segment(row)}))
        sizes = zip(self.image_ids[numbers].tolist(), self.sizes[numbers].tolist(), strict=True)
        return {
            "images": [{"id": key, "height": height, "width": width} for key, (height, width) in sizes],
            "annotations": annotations,
            "categories": [{"id": key, "name": name} for key, name in self.categories.items()],
        }


def offsets(lengths: Sequence[int]) -> np.ndarray:
    """Where each of several parts begins, and the last one ends."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes ``[A, 4]`` (x, y, width, height) to corners within images of ``sizes`` ``[A, 2]`` or ``[2]`` (height,
    width)."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return corners.clip(0, np.concatenate([sizes[..., ::-1], sizes[..., ::-1]], axis=-1))


def encode_segment(segment: Any, height: int, width: int) -> dict[str, Any]:
    """Any of COCO's three forms of a mask as compressed run lengths."""
    if isinstance(segment, list):
        return run_lengths.merge(run_lengths.frPyObjects(segment, height, width))
    if isinstance(segment["counts"], list):
        return run_lengths.frPyObjects(segment, height, width)
    return segment
