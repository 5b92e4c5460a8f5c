"""Image files: one folder per class, or WebDataset shards. Decoded and augmented by timm's transforms in workers."""

import io
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from multiprocessing import Value
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ...backbones.images import to_mode
from .guard import BadSamples, DataError, check_labels
from .order import Batch, EpochOrder, Normalize, NumberedBatches

# what Pillow raises for files that are damaged, cut short, or no images at all
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
ATTEMPTS = 10  # readable neighbours to look for in place of an unreadable image

Found = list[tuple[str, str]]  # (name, reason) of unreadable images
Item = tuple[torch.Tensor | None, int, Found]


def _decode(file: io.IOBase, channels: int) -> Image.Image:
    with Image.open(file) as image:
        return to_mode(image, channels)  # decodes


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


class FolderImages(Dataset):
    """Images below class folders, through timm's reader; the unreadable are reported, never returned.

    Items are (uint8 ``[C, H, W]`` or None, label, unreadable images met on the way).
    """

    def __init__(self, root: Path, split: str, classes: list[str], transform: Callable, channels: int, train: bool):
        present = scan_folder(root, split)
        unknown = sorted(set(present) - set(classes))
        if unknown:
            raise DataError(f"{root / split} has classes that are not among the {len(classes)} known: {unknown[:10]}")
        index = {name: i for i, name in enumerate(classes)}
        self.reader = create_dataset("", str(root / split), search_split=False, class_map=index).reader
        nested = set(present) - {classes[label] for _, label in self.reader.samples}
        if nested:
            raise DataError(
                f"{root / split}: images must lie directly in their class folder, not so: {sorted(nested)[:10]}"
            )
        self.transform, self.channels, self.train = transform, channels, train

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Item:
        found: Found = []
        for attempt in range(ATTEMPTS if self.train else 1):
            position = (index + attempt) % len(self)
            try:
                file, label = self.reader[position]
                with file:
                    image = _decode(file, self.channels)
            except UNREADABLE as error:
                found.append((self.reader.filename(position, absolute=True), f"{type(error).__name__}: {error}"))
                continue
            return torch.as_tensor(self.transform(image)), label, found
        return None, -1, found


class ShardImages(IterableDataset):
    """WebDataset shards described by timm's reader (``_info.json``, or a brace pattern with its count).

    Every process and worker reads its own shards: each sample is seen exactly once in evaluation. In training the
    shards are shuffled by seed and epoch, and repeated as often as the epoch's batches need.
    """

    def __init__(
        self,
        root: str,
        split: str,
        transform: Callable,
        channels: int,
        *,
        train: bool,
        seed: int,
        rank: int,
        world: int,
        workers: int,
    ):
        try:
            reader = create_dataset("wds/", root, split=split, is_training=train).reader
        except (RuntimeError, KeyError, ValueError) as error:
            raise DataError(f"WebDataset split {split!r} in {root}: {error}") from None
        self.shards = [os.path.join(root, name) for name in reader.split_info.filenames]
        self.samples = reader.num_samples
        missing = [s for s in self.shards if "://" not in s and not s.startswith("pipe:") and not os.path.isfile(s)]
        if missing:
            raise DataError(f"{len(missing)} of {len(self.shards)} shards don't exist, first {missing[0]}")
        if not self.samples:
            raise DataError(f"WebDataset split {split!r} in {root} has no images")
        readers = world * max(workers, 1)
        if train and len(self.shards) < readers:
            raise DataError(
                f"{len(self.shards)} shards can't feed {world} process(es) x {max(workers, 1)} data.workers; lower it"
            )
        self.transform, self.channels, self.train, self.seed = transform, channels, train, seed
        self.rank, self.world = rank, world
        self.number = Value("q", 0)  # shared, since workers hold copies of this object

    def set(self, epoch: int) -> None:
        self.number.value = epoch

    def __iter__(self) -> Iterator[Item]:
        import webdataset

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        shards = list(self.shards)
        draw = random.Random(f"{self.seed}/{self.number.value}")
        if self.train:
            draw.shuffle(shards)
        mine = shards[self.rank * workers + worker :: self.world * workers]
        found: Found = []

        def book(error: Exception) -> bool:
            found.append((str(getattr(error, "args", [""])[-1]), f"{type(error).__name__}: {error}"))
            return True

        while True:
            stages = [webdataset.SimpleShardList(mine), webdataset.tarfile_to_samples(handler=book)]
            if self.train:
                stages.append(webdataset.shuffle(2048, rng=draw))
            for sample in webdataset.DataPipeline(*stages):
                try:
                    name = next(k for k in ("jpg", "jpeg", "png", "webp") if k in sample)
                    label = int(sample["cls"])
                    image = _decode(io.BytesIO(sample[name]), self.channels)
                except (*UNREADABLE, KeyError, StopIteration) as error:
                    reason = f"{type(error).__name__}: {error}"
                    found.append((f"{sample.get('__url__')}:{sample.get('__key__')}", reason))
                    if not self.train:
                        yield None, -1, found.copy()
                        found.clear()
                    continue
                yield torch.as_tensor(self.transform(image)), label, found.copy()
                found.clear()
            if found:
                yield None, -1, found.copy()
                found.clear()
            if not self.train:
                return


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
        self.loader = DataLoader(
            dataset,
            batch_sampler=NumberedBatches(order),
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # its own: from the global one each new iterator would draw, a resumed one too
        )

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


class FileLoader:
    """Batches of image files, decoded in ``workers`` processes and normalised on the device.

    Args:
        dataset: :class:`FolderImages` or :class:`ShardImages`.
        order: batches of indices; for shards it only counts.
        bad: the book of unreadable images.
    """

    def __init__(
        self,
        dataset: FolderImages | ShardImages,
        num_classes: int,
        order: EpochOrder,
        normalize: Normalize,
        bad: BadSamples,
        workers: int,
    ):
        self.dataset, self.num_classes, self.order = dataset, num_classes, order
        self.normalize, self.bad = normalize, bad
        self.streaming = isinstance(dataset, ShardImages)
        batches = {"batch_size": order.batch_size} if self.streaming else {"batch_sampler": order}
        self.loader = DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=normalize.device.type == "cuda",
            persistent_workers=workers > 0 and not self.streaming,
            **batches,
        )

    @property
    def samples(self) -> int:
        return self.order.samples

    @property
    def batches(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from the ``start``-th on (from shards: as many as are left, newly drawn).

        Raises:
            DataError: a label out of range, or too many unreadable images.
        """
        self.order.set(epoch, start)
        if self.streaming:
            self.dataset.set(epoch)
        self.bad.start(-(-self.samples // self.order.world))
        left = self.batches - start
        for images, targets, found in self.loader:
            self.bad.add(found)
            if len(images) == 0:
                if self.order.train and not self.streaming:
                    raise DataError(f"no readable image within {ATTEMPTS} neighbours of a whole batch: {found[:3]}")
                continue
            check_labels(targets, self.num_classes, "labels")
            device = self.normalize.device
            images = images.to(device, non_blocking=True).float().div_(255)
            yield Batch(self.normalize(images), targets.to(device, non_blocking=True))
            left -= 1
            if left == 0 and self.order.train:
                return
