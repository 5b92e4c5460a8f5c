"""From an index to samples: decoded and, in training, augmented.

A dataset is asked for (epoch, number). What is drawn for a sample depends on the seed, the epoch and its number alone,
so it is the same whichever process reads it, and again after a resume.
"""

import struct
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...backbones.images import to_mode, upright
from .dense_transforms import IGNORE, SemanticMask
from .formats import draw_shapes
from .guard import DataError
from .index import ClassificationIndex, DetectionIndex, Index, SegmentationIndex
from .transforms import EvalTransform, TrainTransform, seeded

# what Pillow raises for files that are damaged, cut short, or no images at all
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
ATTEMPTS = 10  # readable neighbours to look for in place of an unreadable sample

Found = list[tuple[str, str]]  # (name, reason) of unreadable samples
Item = tuple[Any, Found]  # a sample, None, or a DataError; and the unreadable samples met on the way


class ImageDataset(Dataset):
    """Samples of an index; the unreadable are reported, never returned: in training the next readable one takes the
    place.

    A DataError is returned, too: raised in a worker process, its message would be wrapped in a traceback.
    """

    def __init__(self, index: Index, *, train: bool, seed: int):
        self.index, self.train, self.seed = index, train, seed

    def __len__(self) -> int:
        return len(self.index)

    def read(self, number: int) -> Any:
        """A sample as it is in its files; raises one of `UNREADABLE`, or a DataError that stops the run."""
        raise NotImplementedError

    def augment(self, sample: Any) -> Any:
        """What is done to a sample in training; in evaluation it only becomes tensors."""
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
                except UNREADABLE as error:
                    found.append((self.index.name(number), f"{type(error).__name__}: {error}"))
                    continue
                return self.augment(sample), found
        return None, found


class ClassificationDataset(ImageDataset):
    """(uint8 ``[C, H, W]``, class) of classified images."""

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


class DenseDataset(ImageDataset):
    """Images with a target, augmented together.

    Args:
        transform: of `dense_transforms`; None in evaluation.
    """

    def __init__(self, index: Index, channels: int, transform: v2.Transform | None, seed: int):
        super().__init__(index, train=transform is not None, seed=seed)
        self.channels, self.transform = channels, transform

    def image(self, number: int) -> torch.Tensor:
        """uint8 ``[C, H, W]``, upright; raises one of `UNREADABLE`."""
        with self.index.open(number) as file, Image.open(file) as image:
            return v2.functional.pil_to_tensor(to_mode(upright(image), self.channels))

    def augment(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.transform is not None:
            sample = self.transform(sample | {"image": tv_tensors.Image(sample["image"])})
        return {
            key: value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value
            for key, value in sample.items()
        }


class DetectionDataset(DenseDataset):
    """Images (uint8 ``[C, H, W]``) with their ``number`` and, in training, the target of `DetectionIndex.target`."""

    index: DetectionIndex

    def image(self, number: int) -> torch.Tensor:
        """As above; a file whose upright size is not that of its annotations is unreadable, too."""
        image = super().image(number)
        height, width = self.index.sizes[number].tolist()
        if image.shape[-2:] != (height, width):
            raise ValueError(f"is {image.shape[-1]}x{image.shape[-2]} pixels, its annotations are for {width}x{height}")
        return image

    def read(self, number: int) -> dict[str, Any]:
        sample = {"image": self.image(number), "number": number}
        return sample | self.index.target(number) if self.train else sample


class BadMask(ValueError):
    """A mask file that does not belong to its image, or holds no classes."""


class SegmentationDataset(DenseDataset):
    """Images (uint8 ``[C, H, W]``) with their ``mask`` (uint8 ``[H, W]``: classes, 255 for none)."""

    index: SegmentationIndex

    def read(self, number: int) -> dict[str, Any]:
        image, path = self.image(number), self.index.mask_name(number)
        if path.endswith(".json"):
            mask = draw_shapes(path, self.index.classes, tuple(image.shape[-2:]))
        else:
            mask = read_mask(path, self.index.table)
        if mask.shape != image.shape[-2:]:
            sizes = " but the image ".join(f"{shape[1]}x{shape[0]}" for shape in (mask.shape, image.shape[-2:]))
            raise BadMask(f"the mask {path} is {sizes} pixels")
        return {"image": image, "mask": SemanticMask(mask)}


def read_mask(path: str, table: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W]``, classes and 255.

    Args:
        table: see `SegmentationIndex`.

    Raises:
        DataError: a value that is no class of the data, which says that the classes are not theirs; names it.
        BadMask: pixels that are no numbers of classes (colours, floats). Grey stored as RGB is read as one channel.
        OSError: unreadable.
    """
    with Image.open(path) as file:
        image = upright(file)
        if image.mode in ("LA", "RGB", "RGBA"):
            bands = np.asarray(image)
            if (bands[..., :1] == bands[..., : 1 if image.mode == "LA" else 3]).all():
                image = image.getchannel(0)
        if image.mode not in ("L", "P", "1", "I", "I;16"):
            raise BadMask(f"the mask {path} holds {image.mode} pixels; classes are one channel of whole numbers")
        values = np.asarray(image)
    inside = values.clip(0, 255)
    labels = table[inside]
    labels[values != inside] = -1
    if (labels < 0).any():
        wrong = np.unique(values[labels < 0]).tolist()
        text = ", ".join(map(str, wrong[:5])) + (" ..." if len(wrong) > 5 else "")
        raise DataError(
            f"the mask {path} holds the label{'s' * (len(wrong) > 1)} {text}, but data.classes has "
            f"{table[table < IGNORE].max() + 1} (data.kind, data.classes)"
        )
    return labels.astype(np.uint8)
