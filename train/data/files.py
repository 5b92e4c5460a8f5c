"""Image files, one folder per class, and the loaders that decode and augment image files in worker processes."""

import io
import os
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .guard import NOTHING, BadSamples, DataError, Excluded, check_labels, printable
from .order import Batch, EpochOrder, Normalize, NumberedBatches
from .transforms import EvalTransform, TrainTransform, seeded

# what Pillow raises for files that are damaged, cut short, or no images at all
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
ATTEMPTS = 10  # readable neighbours to look for in place of an unreadable image

Found = list[tuple[str, str]]  # (name, reason) of unreadable images
Item = tuple[torch.Tensor | None, int, Found]


def scan_folder(root: Path, split: str) -> list[str]:
    """The class names below ``root/split``, sorted; every one must hold an image somewhere.

    Raises:
        DataError: the folder is missing, has no classes, or a class has no images.
    """
    folder = root / split
    if not folder.is_dir():
        if not root.is_dir():
            raise DataError(f"the data folder {root} does not exist (data.root)")
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
        raise DataError(f"there is no folder {split!r} in {root} (data.train_split, data.val_split); it has {there}")
    extensions = tuple(get_img_extensions())
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise DataError(f"no images: {folder} has no class folders")
    empty = [n for n in names if not _has_image(folder / n, extensions)]
    if len(empty) == len(names):
        raise DataError(f"no images in {folder}: its {len(names)} folders hold no file like {', '.join(extensions)}")
    if empty:
        raise DataError(f"class folders without an image in {folder}: {', '.join(empty[:10])}")
    return names


def _has_image(folder: Path, extensions: tuple[str, ...]) -> bool:
    return any(name.lower().endswith(extensions) for _, _, files in os.walk(folder, followlinks=True) for name in files)


class Images(Dataset):
    """Images with their labels, by position. An item is asked for by (epoch, position): what is drawn for it depends on
    both and on the seed alone, so it is the same whichever process reads it, and again after a resume.

    Items are (uint8 ``[C, H, W]`` or None, label, unreadable images met on the way): an unreadable image is reported,
    never returned; in training its next readable neighbour takes its place.
    """

    def __init__(self, transform: TrainTransform | EvalTransform, *, train: bool, seed: int):
        self.transform, self.train, self.seed = transform, train, seed

    def name(self, position: int) -> str:
        """What a report calls it."""
        raise NotImplementedError

    def label(self, position: int) -> int:
        raise NotImplementedError

    def open(self, position: int) -> io.IOBase:
        """The file; raises one of `UNREADABLE` where there is none."""
        raise NotImplementedError

    def __getitem__(self, item: tuple[int, int]) -> Item:
        epoch, index = item
        found: Found = []
        with seeded(self.seed, epoch, index) if self.train else nullcontext():
            for attempt in range(ATTEMPTS if self.train else 1):
                position = (index + attempt) % len(self)
                try:
                    with self.open(position) as file:
                        image = self.transform.read(file)
                except UNREADABLE as error:
                    found.append((self.name(position), f"{type(error).__name__}: {error}"))
                    continue
                return torch.as_tensor(self.transform.augment(image)), self.label(position), found
        return None, -1, found


def list_images(root: Path, split: str, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Paths and labels of the images below ``root/split/CLASS``, in timm's order.

    Raises:
        DataError: folders that are missing or empty, unknown classes, or images in deeper folders.
    """
    present = scan_folder(root, split)
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise DataError(f"{root / split} has classes that are not among the {len(classes)} known: {unknown[:10]}")
    index = {name: i for i, name in enumerate(classes)}
    samples = create_dataset("", str(root / split), search_split=False, class_map=index).reader.samples
    nested = set(present) - {classes[label] for _, label in samples}
    if nested:
        raise DataError(
            f"{root / split}: images must lie directly in their class folder, not so: {sorted(nested)[:10]}"
        )
    return samples


class FolderImages(Images):
    """Images below class folders."""

    def __init__(
        self,
        root: Path,
        split: str,
        classes: Sequence[str],
        transform: TrainTransform | EvalTransform,
        *,
        train: bool,
        seed: int = 0,
        excluded: Excluded = NOTHING,
    ):
        super().__init__(transform, train=train, seed=seed)
        samples = list_images(root, split, classes)
        if excluded:
            samples = [pair for pair in samples if not excluded.holds(pair[0], os.path.relpath(pair[0], root))]
        # arrays, where a million Python objects would be copied into every worker that counts references to them
        self.paths = np.array([os.fsencode(path) for path, _ in samples], bytes)
        self.labels = np.array([label for _, label in samples], np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        return os.fsdecode(self.paths[position])

    def label(self, position: int) -> int:
        return int(self.labels[position])

    def open(self, position: int) -> io.IOBase:
        return open(self.paths[position], "rb")


def collate(items: list[Item]) -> tuple[torch.Tensor, torch.Tensor, Found]:
    """Stacks the readable items; images uint8 ``[B, C, H, W]`` (empty when there are none)."""
    found = [pair for _, _, pairs in items for pair in pairs]
    images = [image for image, _, _ in items if image is not None]
    labels = torch.tensor([label for image, label, _ in items if image is not None], dtype=torch.long)
    return torch.stack(images) if images else torch.empty(0, dtype=torch.uint8), labels, found


def leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; a worker that obeyed it would break the run it should only stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class DenseLoader:
    """What the loaders of detection and segmentation share: images with their targets, read and augmented in
    ``workers`` processes, each by its epoch and index.

    Args:
        order: batches of indices into ``dataset``, which is asked for pairs (epoch, index).
        device: where batches go.
        bad: the book of bad samples.
        collate: makes a batch of the items of the dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: EpochOrder,
        device: torch.device,
        bad: BadSamples,
        workers: int,
        collate: Callable[[list], Any],
    ):
        self.dataset, self.order, self.device, self.bad = dataset, order, device, bad
        settings = {
            "num_workers": workers,
            "collate_fn": collate,
            "worker_init_fn": leave_signals_to_the_trainer,
            "pin_memory": device.type == "cuda",
            # its own: from the global one each new iterator would draw, a resumed one too
            "generator": torch.Generator(),
        }
        self.loader = self._loader(workers, settings)

    def _loader(self, workers: int, settings: dict[str, Any]) -> DataLoader:
        batches = NumberedBatches(self.order)
        return DataLoader(self.dataset, batch_sampler=batches, persistent_workers=workers > 0, **settings)

    @property
    def samples(self) -> int:
        return self.order.samples

    @property
    def batches(self) -> int:
        return len(self.order)

    def _read(self, epoch: int, start: int) -> Iterator[Any]:
        """What ``collate`` made of the batches of an epoch from the ``start``-th on."""
        self.order.set(epoch, start)
        self.bad.start(-(-self.samples // self.order.world))
        yield from self.loader


class FileLoader(DenseLoader):
    """Batches of image files, decoded in ``workers`` processes and normalised on the device."""

    def __init__(
        self, dataset: Images, num_classes: int, order: EpochOrder, normalize: Normalize, bad: BadSamples, workers: int
    ):
        super().__init__(dataset, order, normalize.device, bad, workers, collate)
        self.num_classes, self.normalize = num_classes, normalize

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from the ``start``-th on.

        Raises:
            DataError: a label out of range, or too many unreadable images.
        """
        for images, targets, found in self._read(epoch, start):
            self.bad.add(found)
            if len(images) == 0:
                if self.order.train:
                    raise DataError(f"no readable image within {ATTEMPTS} neighbours of a whole batch: {found[:3]}")
                continue
            check_labels(targets, self.num_classes, "labels")
            yield Batch(self.normalize.bytes(images), targets.to(self.device, non_blocking=True))


class StreamLoader(FileLoader):
    """The same from shards that are streamed, where the order of batches only counts them.

    Args:
        dataset: a `wds.StreamedImages`.
    """

    def __init__(self, dataset: IterableDataset, num_classes, order, normalize, bad, workers):
        super().__init__(dataset, num_classes, order, normalize, bad, workers)

    def _loader(self, workers: int, settings: dict[str, Any]) -> DataLoader:
        return DataLoader(self.dataset, batch_size=self.order.batch_size, **settings)  # a new one reads a new epoch

    def _read(self, epoch: int, start: int) -> Iterator[Any]:
        """In training as many batches as the epoch has left, newly drawn, all of them full.

        Raises:
            DataError: a reader found no training image in any of its shards.
        """
        self.dataset.set(epoch, start)
        self.bad.start(-(-self.samples // self.order.world))
        if not self.order.train:
            yield from self.loader
            return
        for _, batch in zip(range(start, self.batches), self.loader, strict=False):  # the loader has no end
            images, _, found = batch
            if len(images) < self.order.batch_size:
                first = "; ".join(f"{name} ({reason})" for name, reason in found[-3:])
                raise DataError(
                    f"a reader of streamed shards found no image in a pass over its own: {printable(first)}; "
                    "they are damaged, or data.exclude names them all"
                )
            yield batch
