"""Small datasets in memory as uint8 tensors, augmented batch by batch.

Decoding and augmenting single images takes longer than a step of a small model on a CPU; here every augmentation is one
batched PyTorch operation.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from ...configs.schema import AugmentConfig
from .guard import DataError, check_labels
from .order import Batch, EpochOrder, Normalize, Ordered


def load_digits(val_fraction: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The 1,797 handwritten digits that scikit-learn ships (8x8, 17 grey levels), split by class with a fixed seed.

    Returns:
        ``train`` and ``val``: images uint8 ``[N, 8, 8]`` scaled to 0..255, labels ``[N]``.
    """
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    if not 0 < val_fraction < 1:
        raise DataError(f"data.val_fraction is {val_fraction}, must lie between 0 and 1")
    pixels, labels = bundled(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    parts = train_test_split(images, labels, test_size=val_fraction, stratify=labels, random_state=0)
    train_images, val_images, train_labels, val_labels = parts
    return {"train": (train_images, train_labels), "val": (val_images, val_labels)}


def resize_images(images: np.ndarray, size: int, in_chans: int) -> torch.Tensor:
    """Resize grey images ``[N, H, W]`` to uint8 ``[N, in_chans, size, size]``."""
    tensor = torch.from_numpy(np.ascontiguousarray(images))[:, None]  # [N, 1, H, W]
    if tensor.shape[-2:] != (size, size):
        parts = [
            F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
            for part in tensor.split(4096)  # avoid a float copy of the whole dataset
        ]
        tensor = torch.cat(parts)
    return tensor.expand(-1, in_chans, -1, -1)


class BatchAugment:
    """Flips and one random affine map (shift, rotation, zoom) for each image of a batch; the outside is black.

    Args:
        config: of ``augment``: hflip, vflip, shift (fraction of the side), rotate (degrees), zoom.
    """

    def __init__(self, config: AugmentConfig):
        self.config = config
        self.affine = bool(config.shift or config.rotate or config.zoom)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """images: float ``[B, C, H, W]``."""
        config, batch = self.config, len(images)

        def uniform(largest: float) -> torch.Tensor:
            return (torch.rand(batch) * 2 - 1) * largest

        if config.hflip:
            images = torch.where(self._chance(config.hflip, images), images.flip(-1), images)
        if config.vflip:
            images = torch.where(self._chance(config.vflip, images), images.flip(-2), images)
        if self.affine:
            angle, zoom = uniform(math.radians(config.rotate)), 1 / (1 + uniform(config.zoom))
            cos, sin = zoom * angle.cos(), zoom * angle.sin()
            x, y = uniform(2 * config.shift), uniform(2 * config.shift)  # the grid spans [-1, 1]
            theta = torch.stack([torch.stack([cos, -sin, x], -1), torch.stack([sin, cos, y], -1)], 1)
            grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
            images = F.grid_sample(images, grid, align_corners=False)
        return images

    @staticmethod
    def _chance(probability: float, images: torch.Tensor) -> torch.Tensor:
        return (torch.rand(len(images), 1, 1, 1) < probability).to(images.device)


class MemoryLoader(Ordered):
    """Batches of a dataset in memory.

    Args:
        images: uint8 ``[N, C, H, W]``.
        targets: ``[N]``, class indices.
        num_classes: labels must lie in ``[0, num_classes)``.
        order: indices of the batches.
        normalize: uint8 images to the model's input.
        augment: None for evaluation.
    """

    def __init__(
        self,
        images: torch.Tensor,
        targets: np.ndarray,
        num_classes: int,
        order: EpochOrder,
        normalize: Normalize,
        augment: AugmentConfig | None = None,
    ):
        self.targets = torch.from_numpy(targets.astype(np.int64))
        check_labels(self.targets, num_classes, "labels")
        self.images = images
        self.order = order
        self.normalize = normalize
        self.augment = BatchAugment(augment) if augment is not None else None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from the ``start``-th on."""
        self.order.set(epoch, start)
        for indices in self.order:
            index = torch.as_tensor(indices)
            images = self.images[index].to(self.normalize.device).float().div_(255)
            if self.augment is not None:
                images = self.augment(images)
            yield Batch(self.normalize(images), self.targets[index].to(self.normalize.device))
