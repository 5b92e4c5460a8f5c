"""`foveal bench data`: images per second and core of the training loader beside timm's, on the same files.

The files are JPEGs of photographs that scikit-image and scikit-learn ship, cut and scaled to the sizes of ImageNet's.
Nothing is timed before both loaders have given the same evaluation batches, to the bit, and training batches of the
same mean. Both decode in the process that asks, with one thread. Figures are images for each second of its processor
time, medians of interleaved passes over all images: what one core does, whatever else the machine is doing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
from PIL import Image
from rich.console import Console
from timm.data import create_dataset, create_loader

from .run import print_table, write_csv

IMAGES, BATCH, SIZE = 128, 32, 224
MEANS_DIFFER = 0.3  # of normalised values; four deviations of what random crops and brightness make of so few images
Pass = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]  # a pass over the images: normalised, and labels
# (root, training, AutoAugment, how it decodes) -> passes, each call a new one
BuildOurs = Callable[[Path, bool, str | None, str], Pass]


@dataclass(frozen=True)
class DataCase:
    """One comparison: files of this size."""

    width: int
    height: int
    training: bool = True
    auto_augment: str | None = None  # without: colour jitter of 0.4

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


def write_photographs(root: Path, width: int, height: int, count: int = IMAGES) -> Path:
    """JPEGs of quality 95 in ``root/{train,val}/{a,b}``, a quarter of them upright; the same in val as in train."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]
    photographs = [Image.fromarray(array) for array in arrays]
    draw = np.random.default_rng(0)
    for name in ("train/a", "train/b"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        w, h = (height, width) if draw.random() < 0.25 else (width, height)
        part = draw.uniform(0.5, 1.0)
        cut_w = part * min(photograph.width, photograph.height * w / h)
        cut_h = cut_w * h / w
        left, top = draw.uniform(0, photograph.width - cut_w), draw.uniform(0, photograph.height - cut_h)
        image = photograph.resize((w, h), Image.Resampling.BICUBIC, box=(left, top, left + cut_w, top + cut_h))
        image.save(root / "train" / "ab"[i % 2] / f"{i:04}.jpg", quality=95)
    (root / "val").symlink_to("train")
    return root


def timm_loader(root: Path, case: DataCase) -> Pass:
    """timm's loader by its defaults, which are its training script's."""
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


def data_rows(case: DataCase, rounds: int, build_ours: BuildOurs) -> list[dict[str, object]]:
    """timm's loader, and ours with each way of decoding.

    Raises:
        RuntimeError: they don't read the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = write_photographs(Path(folder), case.width, case.height)
        passes = {"timm": timm_loader(root, case)}
        for decode in ("timm", "fast", "draft") if case.training else ("fast",):
            name = f"foveal, decode={decode}" if case.training else "foveal"
            passes[name] = build_ours(root, case.training, case.auto_augment, decode)
        _check(case, passes)
        speeds: dict[str, list[float]] = {name: [] for name in passes}
        for number in range(rounds):
            order = list(passes.items())
            for name, read in order if number % 2 else order[::-1]:  # who comes after whom makes a difference
                begin = time.process_time()
                count = sum(len(labels) for _, labels in read())
                speeds[name].append(count / (time.process_time() - begin))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return [
        {
            "files": f"{case.width}x{case.height}",
            "augmentation": (case.auto_augment or "colour jitter") if case.training else "evaluation",
            "loader": name,
            "images_per_core_second": round(speed, 1),
            "times_timm": round(speed / medians["timm"], 3),
            "pillow": PIL.__version__,
            "timm": timm.__version__,
        }
        for name, speed in medians.items()
    ]


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
            raise RuntimeError(f"{case.id}: {name} gives other pixels than timm; not timed")
        if float((other.mean() - images.mean()).abs()) > MEANS_DIFFER:
            raise RuntimeError(f"{case.id}: {name} has a mean of {other.mean():.3f}, timm {images.mean():.3f}")


def main(arguments: list[str], build_ours: BuildOurs) -> int:
    parser = argparse.ArgumentParser(prog="foveal bench data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed passes; the median is printed (default 7)")
    parser.add_argument("--only", help="cases whose name holds this text, such as 500x375")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    cases = [case for case in CASES if not options.only or options.only in case.id]
    console = Console(width=None if sys.stdout.isatty() else 200)
    if not cases:
        console.print(f"no case of 'foveal bench data' holds {options.only!r}")
        return 2
    torch.set_num_threads(1)
    rows = [row for case in cases for row in data_rows(case, options.rounds, build_ours)]
    print_table("foveal bench data", rows, console)
    if options.csv:
        write_csv(options.csv, rows)
        console.print(f"wrote {options.csv}")
    return 0
