"""Detections drawn on their images, beside the truth."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no display
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

COLOURS = plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors
Found = dict[str, torch.Tensor]


def places(images: Sequence[str | Path], folder: Path) -> list[Path]:
    """Where the drawings of image files go: ``folder/NAME.png``.

    Raises:
        ValueError: two of them would go to the same file, or one to an image's own.
    """
    own = {Path(path).resolve(): path for path in images}
    taken: dict[Path, str | Path] = {}
    for path in images:
        place = folder / f"{Path(path).stem}.png"
        if place.resolve() in own:
            raise ValueError(
                f"the drawing of {path} would replace the image {own[place.resolve()]}; name another folder"
            )
        if place in taken:
            raise ValueError(f"{taken[place]} and {path} would both be drawn to {place}")
        taken[place] = path
    return list(taken)


def draw(axis: plt.Axes, image: torch.Tensor, found: Found, classes: Sequence[str], title: str) -> None:
    """An image (float ``[C, H, W]`` in [0, 1]) with boxes, class names and, where there are any, scores and masks."""
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).float().cpu().numpy()
    height, width = image.shape[-2:]
    place = {"interpolation": "nearest", "extent": (0, width, height, 0)}  # edges of pixels are integers, as in boxes
    axis.imshow(pixels.clip(0, 1), **place)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9, parse_math=False)  # names may have dollar signs
    labels = found["labels"].tolist()
    for i, label in enumerate(labels):
        if "masks" in found:
            mask = found["masks"][i].reshape(height, width).float().cpu().numpy() > 0.5
            layer = np.zeros((height, width, 4))
            layer[mask] = (*COLOURS[label % len(COLOURS)], 0.45)
            axis.imshow(layer, **place)
    for i, (box, label) in enumerate(zip(found["boxes"].tolist(), labels, strict=True)):
        colour = COLOURS[label % len(COLOURS)]
        x, y = box[:2]
        axis.add_patch(Rectangle((x, y), box[2] - x, box[3] - y, fill=False, edgecolor=colour, linewidth=1.4))
        text = classes[label] + (f" {100 * float(found['scores'][i]):.0f}" if "scores" in found else "")
        tag = {"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.85}
        below = y < 0.08 * height  # no room above
        axis.text(
            x,
            y,
            text,
            fontsize=7,
            color="white",
            va="top" if below else "bottom",
            bbox=tag,
            clip_on=True,
            parse_math=False,
        )
    axis.set(xlim=(0, width), ylim=(height, 0))


def pairs(
    images: Sequence[torch.Tensor],
    truths: Sequence[Found],
    answers: Sequence[Found],
    classes: Sequence[str],
    path: Path,
    title: str,
    columns: int = 2,
) -> None:
    """Writes images in pairs, left what is there, right what a detector says, ``columns`` pairs a row."""
    rows = -(-len(images) // columns)
    height = max(image.shape[-2] / image.shape[-1] for image in images)
    figure, axes = plt.subplots(
        rows, 2 * columns, figsize=(3.4 * 2 * columns, (3.4 * min(height, 2) + 0.3) * rows + 0.5), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (image, truth, answer) in enumerate(zip(images, truths, answers, strict=True)):
        for side, (found, name) in enumerate(((truth, "annotated"), (answer, "found"))):
            axis = axes[i // columns, 2 * (i % columns) + side]
            axis.set_axis_on()
            draw(axis, image, found, classes, f"{name}: {len(found['labels'])}")
    save(figure, path, title)


def save(figure: plt.Figure, path: Path, title: str | None = None) -> None:
    """Writes a figure as PNG under a temporary name, renames it and closes the figure."""
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, path)
