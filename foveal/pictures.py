"""The figures of the README: ``python -m foveal.pictures FOLDER`` (`make pictures`) writes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import zoo
from .benchmarks import plots
from .kernels.window import Window
from .visualize import draw_keys

TABLES = ("zoo-cpu-2core-accuracy", "kernels-cpu-2core")  # of `foveal bench plots`
POINT = (0.46, 0.3)  # of the query, as fractions of width and height
DPI = 150  # photos make large files


def photo(size: int) -> np.ndarray:
    """``[size, size, 3]`` in [0, 1]: the upper part of scikit-image's photo of an astronaut (NASA)."""
    from skimage import data

    image = Image.fromarray(data.astronaut()).crop((32, 0, 416, 384)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float32) / 255


def reach(length: int, at: int, windows: Sequence[Window]) -> list[int]:
    """Positions along an axis that a query sees through stacked layers, given from the last to the first."""
    seen = {at}
    for window in windows:
        position, inside, _ = window.keys(length)
        seen = {int(p) for query in seen for p in position[query][inside[query]]}
    return sorted(seen)


def windows_picture(kernel_size: int = 7, dilation: int = 8, side: int = 56) -> Any:
    """Windows of a local, a dilated, and both layers in sequence, on the first map of a DiNAT at 224."""
    shown = photo(8 * side)
    query = int(POINT[1] * side), int(POINT[0] * side)
    near, far = Window(kernel_size), Window(kernel_size, dilation=dilation)
    figure = plots.new_figure(8, 3.2, DPI, h_pad=0.1)
    for axis, layers, title in zip(
        figure.subplots(1, 3),
        ([near], [far], [far, near]),
        (
            f"neighborhood attention\nsees the {kernel_size}x{kernel_size} nearest positions",
            f"dilated by {dilation}:\nas many, {dilation} positions apart",
            "one layer after the other:\n{} of {} positions",
        ),
        strict=True,
    ):
        keys = torch.cartesian_prod(*(torch.tensor(reach(side, at, layers)) for at in query))
        draw_keys(axis, shown, (side, side), query, keys)
        axis.set_title(title.format(f"{len(keys):,}", f"{side**2:,}"), fontsize=10)
    return figure


def write(folder: Path, results: Path = plots.RESULTS) -> list[Path]:
    """Write the figures into a folder, from the tables of `foveal bench` in another; returns their paths."""
    windows = folder / "windows.png"
    plots.save(windows_picture(), windows, "foveal.pictures", colours=160)
    tables = (picture for picture in plots.pictures(results, zoo.facts) if picture.name in TABLES)
    return [windows, *(plots.save_picture(picture, folder) for picture in tables)]


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])), sep="\n")
