"""From datasets to batches on the device, read in worker processes by epoch and index."""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .dataset import ATTEMPTS, Found, Item
from .guard import BadSamples, DataError, check_labels, printable
from .index import Target
from .order import Batch, EpochOrder, Normalize, NumberedBatches, Ordered
from .wds import StreamedImages
from .workers import Reader


class DetectionBatch(NamedTuple):
    """images: float ``[C, H, W]`` each, in [0, 1]; targets: their objects (empty in evaluation); numbers: which images
    of the index they are."""

    images: list[Tensor]
    targets: list[Target]
    numbers: list[int]


class SegmentationBatch(NamedTuple):
    """images: float ``[B, C, H, W]`` in [0, 1]; targets: int64 ``[B, H, W]``, 255 where there is no class."""

    images: Tensor
    targets: Tensor


def leave_signals_to_the_trainer(_: int) -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal: the trainer stops the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(stack: Callable[[list], Any], items: list[Item]) -> tuple[Any, Found, DataError | None]:
    """(stacked readable samples or None, unreadable samples, error to raise or None)."""
    found = [pair for _, pairs in items for pair in pairs]
    error = next((sample for sample, _ in items if isinstance(sample, DataError)), None)
    samples = [sample for sample, _ in items if sample is not None]
    return stack(samples) if samples and error is None else None, found, error


class Loader(Ordered):
    """Batches of a dataset; subclasses stack samples and move them to the device.

    Args:
        order: batches of indices; ``dataset`` is indexed with pairs (epoch, index).
        device: of the batches.
        bad: list of the unreadable samples.
        workers: number of reading processes.
    """

    def __init__(self, dataset: Dataset, order: EpochOrder, device: torch.device, bad: BadSamples, workers: int):
        self.dataset, self.order, self.device, self.bad = dataset, order, device, bad
        self.loader = self._loader(
            num_workers=workers,
            collate_fn=partial(_collate, self.stack),
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=device.type == "cuda",
            # its own generator: iterators would draw from the global one, also after resuming
            generator=torch.Generator(),
        )

    def _loader(self, **settings: Any) -> DataLoader:
        workers = settings["num_workers"]
        return Reader(
            self.dataset, batch_sampler=NumberedBatches(self.order), persistent_workers=workers > 0, **settings
        )

    def _read(self, epoch: int, start: int) -> Iterator[tuple[Any, Found, DataError | None]]:
        """Results of `_collate` for the batches of an epoch from the ``start``-th on."""
        self.order.set(epoch, start)
        yield from self.loader

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yields the batches of an epoch from the ``start``-th on.

        Raises:
            DataError: too many unreadable samples, or a label out of range.
        """
        self.bad.start(-(-self.samples // self.order.world))
        for samples, found, error in self._read(epoch, start):
            if error is not None:
                # a new exception: `error` would keep this frame, and so the workers, alive
                raise DataError(str(error))
            self.bad.add(found)
            if samples is not None:
                yield from self.finish(samples)
            elif self.order.train:
                raise DataError(f"no readable image within {ATTEMPTS} neighbours of a whole batch: {found[:3]}")

    @staticmethod
    def stack(samples: list[Any]) -> Any:
        """Stack samples, in the worker process."""
        raise NotImplementedError

    def finish(self, samples: Any) -> Iterator[Any]:
        """Yield the output of `stack` as one or several batches on the device."""
        raise NotImplementedError

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class ClassificationLoader(Loader):
    """Batches of classified images, normalized on the device."""

    def __init__(
        self, dataset: Dataset, num_classes: int, order: EpochOrder, normalize: Normalize, bad: BadSamples, workers: int
    ):
        super().__init__(dataset, order, normalize.device, bad, workers)
        self.num_classes, self.normalize = num_classes, normalize

    @staticmethod
    def stack(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.tensor(labels)

    def finish(self, samples: tuple[Tensor, Tensor]) -> Iterator[Batch]:
        images, labels = samples
        check_labels(labels, self.num_classes, "labels")
        yield Batch(self.normalize.bytes(images), self._to_device(labels))


class StreamLoader(ClassificationLoader):
    """The same for streamed shards, where ``order`` only counts the batches."""

    dataset: StreamedImages

    def _loader(self, **settings: Any) -> DataLoader:
        return Reader(self.dataset, batch_size=self.order.batch_size, **settings)  # a new one reads a new epoch

    def _read(self, epoch: int, start: int) -> Iterator[tuple[Any, Found, DataError | None]]:
        """In training, the remaining number of batches of the epoch, newly drawn and all full.

        Raises:
            DataError: a reader found no training image in any of its shards.
        """
        self.dataset.set(epoch, start)
        if not self.order.train:
            yield from self.loader
            return
        for _, batch in zip(range(start, self.batches), self.loader, strict=False):  # the loader has no end
            samples, found, _ = batch
            if samples is None or len(samples[0]) < self.order.batch_size:
                first = "; ".join(f"{name} ({reason})" for name, reason in found[-3:])
                raise DataError(
                    f"a reader of streamed shards found no image in a pass over its own: {printable(first)}; "
                    "they are damaged, or data.exclude names them all"
                )
            yield batch


class ImagesLoader(Loader):
    """Batches of images alone, normalized on the device."""

    def __init__(self, dataset: Dataset, order: EpochOrder, normalize: Normalize, bad: BadSamples, workers: int):
        super().__init__(dataset, order, normalize.device, bad, workers)
        self.normalize = normalize

    @staticmethod
    def stack(samples: list[Tensor]) -> Tensor:
        return torch.stack(samples)

    def finish(self, samples: Tensor) -> Iterator[Tensor]:
        yield self.normalize.bytes(samples)


class DetectionLoader(Loader):
    """Batches of images with their objects."""

    @staticmethod
    def stack(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return samples

    def finish(self, samples: list[dict[str, Any]]) -> Iterator[DetectionBatch]:
        images = [self._to_device(sample.pop("image")).float().div_(255) for sample in samples]
        numbers = [sample.pop("number") for sample in samples]
        targets = [{key: self._to_device(value) for key, value in sample.items()} for sample in samples]
        yield DetectionBatch(images, targets, numbers)


class SegmentationLoader(Loader):
    """Batches of images with their masks. Evaluation keeps image sizes and only batches consecutive images of one size,
    so a batch of the order may be split."""

    @staticmethod
    def stack(samples: list[Target]) -> list[tuple[Tensor, Tensor]]:
        groups: list[list[Target]] = []
        for sample in samples:
            if not groups or groups[-1][0]["image"].shape != sample["image"].shape:
                groups.append([])
            groups[-1].append(sample)
        return [
            (torch.stack([each["image"] for each in group]), torch.stack([each["mask"] for each in group]))
            for group in groups
        ]

    def finish(self, samples: list[tuple[Tensor, Tensor]]) -> Iterator[SegmentationBatch]:
        for images, masks in samples:
            yield SegmentationBatch(self._to_device(images).float().div_(255), self._to_device(masks).long())
