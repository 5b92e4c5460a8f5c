"""Tiny data and quick recipes for the training tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
