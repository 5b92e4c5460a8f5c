"""`foveal bench data`: images per second and core of the training loader against timm's, on the same files.

The files are JPEGs of photos from scikit-image and scikit-learn, cropped and scaled to the sizes of ImageNet's. Before
timing, both loaders must return bitwise equal evaluation batches, and training batches with the same mean. Both decode
in the calling process, with one thread. Figures are images per second of CPU time, so they do not depend on the load of
the machine.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader

from .measure import Bench, Row

IMAGES, BATCH, SIZE = 128, 32, 224
MEANS_DIFFER = 0.3  # of normalized values; four standard deviations under random crops and brightness
Pass = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]  # one pass: normalized images and labels


@dataclass(frozen=True)
class DataCase:
    """One comparison: files of this size."""

    width: int
    height: int
    training: bool = True
    auto_augment: str | None = None  # None: colour jitter of 0.4

    @property
    def id(self) -> str:
        what = (self.auto_augment or "colour jitter") if self.training else "evaluation"
        return f"{self.width}x{self.height}, {what}"


CASES = (
    DataCase(500, 375),
    DataCase(500, 375, auto_augment="rand-m9-inc1"),
    DataCase(500, 375, training=False),
    DataCase(1000, 750),
)
TINY = (DataCase(60, 45, training=False),)


def write_images(root: Path, width: int, height: int, count: int = IMAGES) -> Path:
    """Write JPEGs of quality 95 to ``root/{train,val}/{a,b}``, a quarter in portrait format; val equals train."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]
    images = [Image.fromarray(array) for array in arrays]
    draw = np.random.default_rng(0)
    for name in ("train/a", "train/b"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        image = images[i % len(images)]
        w, h = (height, width) if draw.random() < 0.25 else (width, height)
        part = draw.uniform(0.5, 1.0)
        cut_w = part * min(image.width, image.height * w / h)
        cut_h = cut_w * h / w
        left, top = draw.uniform(0, image.width - cut_w), draw.uniform(0, image.height - cut_h)
        crop = image.resize((w, h), Image.Resampling.BICUBIC, box=(left, top, left + cut_w, top + cut_h))
        crop.save(root / "train" / "ab"[i % 2] / f"{i:04}.jpg", quality=95)
    (root / "val").symlink_to("train")
    return root


def timm_loader(root: Path, case: DataCase) -> Pass:
    """timm's loader with the defaults of its training script."""
    dataset = create_dataset("", str(root / "train"), search_split=False, is_training=case.training)
    loader = create_loader(
        dataset,
        (3, SIZE, SIZE),
        BATCH,
        is_training=case.training,
        color_jitter=0.4,
        auto_augment=case.auto_augment,
        interpolation="random" if case.training else "bicubic",
        crop_pct=0.9,
        num_workers=0,
        device=torch.device("cpu"),
        pin_memory=False,
    )
    return lambda: loader


def our_loader(root: Path, case: DataCase, decode: str) -> Pass:
    """Our training loader over ``ROOT/{train,val}/CLASS``."""
    from ..configs.schema import load_config
    from ..train.data import build_classification_data, find_classes

    given = ["output=none", "model.name=none", f"data.root={root}", "data.workers=0", f"data.decode={decode}"]
    given += ["data.interpolation=bicubic", "data.crop_pct=0.9", f"train.batch_size={BATCH}"]
    config = load_config(None, [*given, f"augment.auto_augment={case.auto_augment or 'null'}"])
    imagenet = {"input_size": (3, SIZE, SIZE), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    data = build_classification_data(config, find_classes(config.data), imagenet, device=torch.device("cpu"))
    return lambda: (data.train if case.training else data.val).epoch(0)


def data_rows(case: DataCase, bench: Bench) -> Iterator[Row]:
    """timm's loader, and ours with each decoder.

    Raises:
        RuntimeError: their batches differ.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = write_images(Path(folder), case.width, case.height)
        passes = {"timm": timm_loader(root, case)}
        for decode in ("timm", "fast", "draft") if case.training else ("fast",):
            passes[f"foveal, decode={decode}" if case.training else "foveal"] = our_loader(root, case, decode)
        _check(case, passes)
        calls = {name: lambda one=one: deque(one(), maxlen=0) for name, one in passes.items()}
        times = bench.median_ms(calls, timer=time.process_time)
    for name, taken in times.items():
        yield {
            "files": f"{case.width}x{case.height}",
            "augmentation": (case.auto_augment or "colour jitter") if case.training else "evaluation",
            "loader": name,
            "images_per_core_second": round(1e3 * IMAGES / taken, 1),
            "times_timm": round(times["timm"] / taken, 3),
            "pillow": PIL.__version__,
        }


def _check(case: DataCase, passes: dict[str, Pass]) -> None:
    found = {}
    for name, read in passes.items():
        batches = list(read())
        found[name] = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    images, labels = found["timm"]
    for name, (other, others) in found.items():
        if other.shape != images.shape or not torch.equal(others.sort()[0], labels.sort()[0]):
            raise RuntimeError(f"{case.id}: {name} reads {tuple(other.shape)}, timm {tuple(images.shape)}; not timed")
        if not case.training and not torch.equal(other, images):
            raise RuntimeError(f"{case.id}: {name} reads other pixels than timm; not timed")
        if float((other.mean() - images.mean()).abs()) > MEANS_DIFFER:
            raise RuntimeError(f"{case.id}: {name} has a mean of {other.mean():.3f}, timm {images.mean():.3f}")
