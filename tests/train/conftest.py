"""Tiny data and quick recipes for the training tests."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveal.errors import Interrupted
from foveal.train import train

QUICK = """\
model:
  name: test_foveal_dinat
  drop_path_rate: 0.1
  kwargs: {depths: [1, 1], num_heads: [1, 2], dilations: [[2], [1]]}
data: {kind: digits, image_size: 32, in_chans: 1, mean: [0.3], std: [0.37], limit: 512}
augment: {hflip: 0.0, shift: 0.08, erase: 0.1}
optim: {lr: 3e-3}
schedule: {epochs: 2, warmup_fraction: 0.1}
train: {batch_size: 64, threads: 1}
"""

FOLDER = """\
model: {name: test_foveal_dinat, kwargs: {depths: [1, 1], num_heads: [1, 2], dilations: [[1], [1]]}}
data: {image_size: 32, workers: 0, crop_pct: 1.0}
augment: {scale: [0.5, 1.0]}
schedule: {epochs: 1}
train: {batch_size: 20, threads: 1}
"""


def stopped(recipe: Path, overrides: list[str], task: str = "classify") -> int:
    """Trains a run that is stopped by a signal; its exit status."""
    with pytest.raises(Interrupted) as stop:
        train(recipe, overrides, task)
    return stop.value.code


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """A recipe that trains on 512 digits for two epochs, about a second each."""
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    return path


@pytest.fixture
def folder_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "folder.yaml"
    path.write_text(FOLDER)
    return path


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes ROOT/{train,val}/{blue,red}/NN.png: plain colours with noise."""

    def make(train: int = 50, val: int = 10, classes: tuple[str, ...] = ("blue", "red")) -> Path:
        root = tmp_path / "images"
        draw = np.random.default_rng(0)
        for split, count in (("train", train), ("val", val)):
            for number, name in enumerate(classes):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = draw.integers(0, 60, (40, 48, 3), dtype=np.uint8)
                    pixels[..., (2, 0, 1)[number % 3]] += 150
                    Image.fromarray(pixels).save(folder / f"{i:03}.png")
        return root

    return make


def write_rectangles(root: Path, counts: dict[str, int], size: tuple[int, int] = (64, 80), seed: int = 0) -> Path:
    """A folder in COCO's layout: one or two plain rectangles, red or green, on noise; category ids 3 and 7."""
    draw = np.random.default_rng(seed)
    height, width = size
    (root / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            pixels = draw.integers(0, 90, (height, width, 3), dtype=np.uint8)
            for side in range(1 + number % 2):  # one in each half, so that none covers another
                half = width // 2
                w, h = draw.integers(12, half - 4), draw.integers(12, height - 8)
                x, y = side * half + draw.integers(0, half - w), draw.integers(0, height - h)
                kind = int(draw.integers(2))
                pixels[y : y + h, x : x + w, kind] = 230
                x, y, w, h = (int(v) for v in (x, y, w, h))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number + 100,
                        "category_id": (3, 7)[kind],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
            name = f"{number:03}.png"
            Image.fromarray(pixels).save(root / split / name)
            images.append({"id": number + 100, "file_name": name, "height": height, "width": width})
        categories = [{"id": 7, "name": "green"}, {"id": 3, "name": "red"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


DETECT = """\
model:
  name: test_foveal_dinat
  head: fcos
  drop_path_rate: 0.1
  neck_kwargs: {out_channels: 64}
data:
  train_annotations: annotations/instances_train.json
  train_images: train
  val_annotations: annotations/instances_val.json
  val_images: val
  min_size: 64
  max_size: 96
  workers: 0
augment: {min_size: [56, 64], max_size: 96}
optim: {lr: 1e-3}
schedule: {epochs: 2, warmup_fraction: 0.1}
train: {batch_size: 4, threads: 1}
"""


@pytest.fixture
def rectangles(tmp_path: Path) -> Path:
    """16 training and 6 held-out images of rectangles."""
    return write_rectangles(tmp_path / "rectangles", {"train": 16, "val": 6})


@pytest.fixture
def detect_recipe(tmp_path: Path, rectangles: Path) -> Path:
    """A recipe that trains on `rectangles` for two epochs, some seconds."""
    path = tmp_path / "detect.yaml"
    path.write_text(DETECT.replace("data:\n", f"data:\n  root: {rectangles}\n"))
    return path
