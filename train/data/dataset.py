"""Datasets: decode the samples of an index and, in training, augment them.

A dataset is indexed by (epoch, number). The random augmentation of a sample depends on seed, epoch and number only, so
it is independent of worker processes and of resuming.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...backbones.images import ChannelError, read_pixels
from .dense_transforms import IGNORE, LazyMasks, SemanticMask
from .files import UNREADABLE
from .formats import draw_shapes
from .guard import DataError
from .index import ClassificationIndex, DetectionIndex, Index, SegmentationIndex
from .masks import BadMask, read_values
from .transforms import EvalTransform, TrainTransform, seeded

ATTEMPTS = 10  # samples to try in place of an unreadable one

Found = list[tuple[str, str]]  # (name, reason) of unreadable samples
Item = tuple[Any, Found]  # a sample, None or a DataError; unreadable samples met on the way


class ImageDataset(Dataset):
    """Samples of an index. Unreadable ones are reported; in training, the next readable sample replaces them.

    A `DataError` is returned, not raised: from a worker process, its message would be wrapped in a traceback.
    """

    def __init__(self, index: Index, *, train: bool, seed: int):
        self.index, self.train, self.seed = index, train, seed

    def __len__(self) -> int:
        return len(self.index)

    def read(self, number: int) -> Any:
        """Reads a sample; raises one of `UNREADABLE`, or a `DataError` that stops the run."""
        raise NotImplementedError

    def augment(self, sample: Any) -> Any:
        """Augments a sample in training and converts it to tensors."""
        raise NotImplementedError

    def __getitem__(self, item: tuple[int, int]) -> Item:
        epoch, first = item
        found: Found = []
        with seeded(self.seed, epoch, first) if self.train else nullcontext():
            for attempt in range(ATTEMPTS if self.train else 1):
                number = (first + attempt) % len(self)
                try:
                    sample = self.read(number)
                except DataError as error:
                    return error, found
                except ChannelError as error:
                    return DataError(f"{self.index.name(number)} {error} (data.in_chans)"), found
                except UNREADABLE as error:
                    found.append((self.index.name(number), f"{type(error).__name__}: {error}"))
                    continue
                return self.augment(sample), found
        return None, found


class ClassificationDataset(ImageDataset):
    """Pairs of an image, uint8 ``[C, H, W]`` (float32 in [0, 255] for other than 1 or 3 channels), and its class."""

    index: ClassificationIndex

    def __init__(
        self, index: ClassificationIndex, transform: TrainTransform | EvalTransform, *, train: bool, seed: int
    ):
        super().__init__(index, train=train, seed=seed)
        self.transform = transform

    def read(self, number: int) -> tuple[Image.Image, int]:
        with self.index.open(number) as file:
            return self.transform.read(file), int(self.index.label[number])

    def augment(self, sample: tuple[Image.Image, int]) -> tuple[torch.Tensor, int]:
        image, label = sample
        return torch.as_tensor(self.transform.augment(image)), label


class SquashedImages(ImageDataset):
    """Images alone, uint8 ``[3, size, size]``, bilinearly resized without regard to their aspect ratio."""

    def __init__(self, index: Index, size: int, *, train: bool, seed: int):
        super().__init__(index, train=train, seed=seed)
        self.size = size

    def read(self, number: int) -> torch.Tensor:
        with self.index.open(number) as file:
            image = v2.functional.pil_to_tensor(read_pixels(file, 3))
        return v2.functional.resize(image, [self.size, self.size], antialias=True)

    def augment(self, sample: torch.Tensor) -> torch.Tensor:
        return sample


class DenseDataset(ImageDataset):
    """Images and targets, augmented together.

    Args:
        transform: of `dense_transforms`; None in evaluation.
    """

    def __init__(self, index: Index, channels: int, transform: v2.Transform | None, seed: int):
        super().__init__(index, train=transform is not None, seed=seed)
        self.channels, self.transform = channels, transform

    def image(self, number: int) -> torch.Tensor:
        """uint8 ``[C, H, W]`` (float32 in [0, 255] for other than 1 or 3 channels), upright.

        Raises one of `UNREADABLE`.
        """
        with self.index.open(number) as file:
            image = read_pixels(file, self.channels)
            return image if isinstance(image, torch.Tensor) else v2.functional.pil_to_tensor(image)

    def augment(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.transform is not None:
            sample = self.transform(sample | {"image": tv_tensors.Image(sample["image"])})
        sample |= {key: value.decode() for key, value in sample.items() if isinstance(value, LazyMasks)}
        return {
            key: value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value
            for key, value in sample.items()
        }


class DetectionDataset(DenseDataset):
    """Images (``[C, H, W]``) with their ``number`` and, in training, the target of `DetectionIndex.target`."""

    index: DetectionIndex

    def image(self, number: int) -> torch.Tensor:
        """uint8 ``[C, H, W]``; also raises ValueError if the upright size is not that of the annotations."""
        image = super().image(number)
        height, width = self.index.sizes[number].tolist()
        if image.shape[-2:] != (height, width):
            raise ValueError(f"{image.shape[-1]}x{image.shape[-2]} pixels, annotations for {width}x{height}")
        return image

    def read(self, number: int) -> dict[str, Any]:
        sample = {"image": self.image(number), "number": number}
        return sample | self.index.target(number, lazy=True) if self.train else sample


class SegmentationDataset(DenseDataset):
    """Images ``[C, H, W]`` with their ``mask`` (uint8 ``[H, W]``: classes, 255 ignored)."""

    index: SegmentationIndex

    def read(self, number: int) -> dict[str, Any]:
        image, path = self.image(number), self.index.mask_name(number)
        if not path:
            mask = np.full(tuple(image.shape[-2:]), IGNORE, np.uint8)
        elif path.endswith(".json"):
            mask = draw_shapes(path, self.index.classes, tuple(image.shape[-2:]))
        else:
            mask = read_mask(path, self.index.table)
        if mask.shape != image.shape[-2:]:
            sizes = " but the image ".join(f"{shape[1]}x{shape[0]}" for shape in (mask.shape, image.shape[-2:]))
            raise BadMask(f"the mask {path} is {sizes} pixels")
        return {"image": image, "mask": SemanticMask(mask)}

    def classes(self, number: int) -> np.ndarray:
        """The classes in a mask, int64 ``[N]``; empty for unreadable masks, which training skips."""
        path = self.index.mask_name(number)
        try:
            mask = self.read(number)["mask"].numpy() if path.endswith(".json") else read_mask(path, self.index.table)
        except DataError:
            raise
        except UNREADABLE:
            return np.empty(0, np.int64)
        return np.flatnonzero(np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE])


def read_mask(path: str, table: np.ndarray) -> np.ndarray:
    """Reads a mask as uint8 ``[H, W]``: classes, 255 ignored.

    Args:
        table: see `SegmentationIndex`.

    Raises:
        DataError: a value without a class: `data.classes` or `data.values` does not match the data.
        BadMask, OSError: as `read_values`.
    """
    colours = len(table) > 256
    values = read_values(path, colours)
    inside = values.clip(0, len(table) - 1)
    labels = table[inside]
    labels[values != inside] = -1
    if (labels < 0).any():
        wrong = np.unique(values[labels < 0]).tolist()
        named = [f"#{value:06x}" if colours else str(value) for value in wrong[:5]]
        text, several = ", ".join(named) + (" ..." if len(wrong) > 5 else ""), "s" * (len(wrong) > 1)
        if colours:
            raise DataError(f"the mask {path} contains the colour{several} {text}, which data.values lacks")
        raise DataError(
            f"the mask {path} contains the label{several} {text}, but data.classes has "
            f"{table[table < IGNORE].max() + 1} (data.kind, data.classes, data.values)"
        )
    return labels.astype(np.uint8)
