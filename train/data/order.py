"""Shared by all loaders: order of the samples, their distribution over processes, and normalization."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing

from .guard import DataError


class Batch(NamedTuple):
    """images: normalized float ``[B, C, H, W]``; targets: int64 ``[B]``; both on the device."""

    images: torch.Tensor
    targets: torch.Tensor


def probe_batch(samples: int, largest: int) -> int:
    """Images per update of a probe: ``largest``, or the power of two for at least eight updates per epoch, or 2."""
    return min(samples, max(2, min(largest, 1 << max(samples // 8, 1).bit_length() - 1)))


class EpochOrder:
    """Batches of indices: a batch sampler whose order depends only on seed and epoch, so that it can be resumed.

    In training all processes get the same number of full batches, and the rest of the epoch is dropped. In evaluation
    every sample belongs to exactly one process; the last batch may be smaller.

    Args:
        samples: size of the data set.
        batch_size: of each process.
        train: shuffled, full batches.
        rank, world: this process and the number of processes.
        weights: of the samples, in training: each epoch draws as many as there are, with replacement. None: each once.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        weights: Any = None,
    ):
        if train and samples < batch_size * world:
            raise DataError(
                f"{samples} training images don't fill one batch of {batch_size} x {world} process(es); "
                "lower train.batch_size"
            )
        self.samples, self.batch_size = samples, batch_size
        self.train, self.seed, self.rank, self.world = train, seed, rank, world
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        self.start, self.number = 0, 0

    def __len__(self) -> int:
        """Batches of an epoch for this process."""
        if self.train:
            return self.samples // (self.batch_size * self.world)
        mine = len(range(self.rank, self.samples, self.world))
        return -(-mine // self.batch_size)

    def set(self, epoch: int, start: int = 0) -> None:
        """The next iteration yields this epoch, from its ``start``-th batch on."""
        self.number, self.start = epoch, start

    def __iter__(self) -> Iterator[list[int]]:
        if self.train:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)
            order = torch.randperm(self.samples, generator=generator)
            if self.weights is not None:
                order = torch.multinomial(self.weights, self.samples, replacement=True, generator=generator)
        else:
            order = torch.arange(self.samples)
        mine = order[self.rank :: self.world]
        for batch in range(self.start, len(self)):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


class Ordered:
    """Sizes of a loader: images of the dataset, and batches of this process per epoch."""

    order: EpochOrder

    @property
    def samples(self) -> int:
        return self.order.samples

    @property
    def batches(self) -> int:
        return len(self.order)


class NumberedBatches:
    """The batches of an order, each index with its epoch, for worker processes."""

    def __init__(self, order: EpochOrder):
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.order:
            yield [(self.order.number, index) for index in batch]


class Normalize:
    """(image - mean) / std per channel, and in training random erasing (Zhong et al., arXiv 1708.04896).

    Args:
        mean, std: of values in [0, 1], one per channel.
        erase: probability; 0 for evaluation.
    """

    def __init__(
        self, mean: list[float], std: list[float], device: torch.device, erase: float = 0.0, erase_mode: str = "pixel"
    ):
        self.device = device
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        self.byte_mean, self.byte_std = (  # rounded once, as timm's
            torch.tensor([255 * value for value in values], device=device).view(-1, 1, 1) for values in (mean, std)
        )
        self.erase = RandomErasing(erase, mode=erase_mode, device=device) if erase else None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """images: float in [0, 1], ``[B, C, H, W]``."""
        images = (images - self.mean) / self.std
        return self.erase(images) if self.erase is not None else images

    def bytes(self, images: torch.Tensor) -> torch.Tensor:
        """The same for uint8 ``[B, C, H, W]`` on any device, by the operations of timm's loader, in one new tensor."""
        images = images.to(self.device, non_blocking=True).float().sub_(self.byte_mean).div_(self.byte_std)
        return self.erase(images) if self.erase is not None else images

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Back to uint8 ``[B, C, H, W]`` on the CPU, for figures."""
        return ((images * self.std + self.mean) * 255).round().clamp(0, 255).byte().cpu()
