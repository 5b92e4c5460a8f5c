"""Figures of a run: curves, and held-out images with predictions."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

from ..backbones.images import to_rgb
from ..files import atomic
from .scoring import ClassificationScorer, Example

RIGHT, WRONG = "#1b7837", "#b2182b"  # colour-blind safe; a symbol marks them, too
COLOURS = [*matplotlib.color_sequences["tab10"], *matplotlib.color_sequences["Dark2"]]
PLAIN: dict[str, Any] = {"parse_math": False}  # names may have dollar signs
Found = dict[str, Tensor]


def save(figure: Figure, path: Path, title: str | None = None) -> None:
    """Write a figure as PNG and close it."""
    if title:
        figure.suptitle(title, fontsize=11, **PLAIN)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as new:
        figure.savefig(new, dpi=115, bbox_inches="tight", format="png")
    plt.close(figure)


def curves(history: list[dict[str, Any]], path: Path, title: str, shown: dict[str, str], monitor: str) -> None:
    """Loss, metrics and learning rate by epoch, from the rows of ``metrics.csv``.

    Args:
        shown: metrics to draw, with their labels.
        monitor: the metric whose maximum is marked.
    """
    epochs = [row["epoch"] for row in history]
    scored = [row for row in history if row[monitor] is not None]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    left.plot(epochs, [row["train_loss"] for row in history], label="training (with its augmentation)")
    left.plot([row["epoch"] for row in scored], [row["val_loss"] for row in scored], label="held out")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    for (name, label), colour in zip(shown.items(), (RIGHT, "#2166ac", WRONG, "0.3"), strict=False):
        middle.plot([row["epoch"] for row in scored], [row[name] for row in scored], color=colour, label=label)
        if name == monitor and scored:
            best = max(scored, key=lambda row: row[monitor])
            middle.plot(best["epoch"], best[monitor], "o", color=colour, label=f"best {best[monitor]:.2f}")
    middle.set(xlabel="epoch", ylabel="held out")
    middle.legend(loc="lower right")
    right.plot(epochs, [row["lr"] for row in history], color="0.3")
    right.set(xlabel="epoch", ylabel="learning rate")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    save(figure, path, title)


# ---- classification


def predictions(
    score: ClassificationScorer, classes: list[str], path: Path, title: str, columns: int = 10, rows: int = 4
) -> None:
    """Held-out images with the predicted class: mistakes first, in red with a cross, others in green with a tick."""
    size = columns * rows
    wrong = score.wrong[: size // 2]
    examples = wrong + score.right[: size - len(wrong)]
    rows = -(-len(examples) // columns)
    long_names = max(len(name) for name in classes) > 4
    figure, axes = plt.subplots(rows, columns, figsize=(1.35 * columns, (1.9 if long_names else 1.7) * rows + 0.6))
    _hide(axes.flat)
    for axis, example in zip(axes.flat, examples, strict=False):
        _example(axis, example, classes, long_names)
    top1 = score.metrics["top1"]
    mistakes = round(score.n * (1 - top1 / 100))
    shown = f"{len(wrong)} of {mistakes} mistakes (✗ red), then correct predictions (✓ green)"
    save(figure, path, f"{title}: {top1:.2f} % of {score.n:,} held-out images correct\n{shown}")


def _example(axis: Axes, example: Example, classes: list[str], long_names: bool) -> None:
    hit = example.predicted == example.target
    axis.set_axis_on()
    axis.imshow(to_rgb(example.image.permute(1, 2, 0).numpy()), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=RIGHT if hit else WRONG, linewidth=1 if hit else 3)
    text = f"{'✓' if hit else '✗'} {classes[example.predicted]}"
    if not hit:
        text += f"{chr(10) if long_names else ', '}is {classes[example.target]}"
    style = {"color": RIGHT if hit else WRONG, "fontweight": None if hit else "bold"}
    axis.set_title(text, fontsize=8 if long_names else 9, **style, **PLAIN)
    axis.set_xlabel(f"{example.probability:.0%}", fontsize=7, labelpad=2)


# ---- detection


def detections(
    examples: Sequence[tuple[Tensor, Found, Found]], classes: Sequence[str], path: Path, title: str, columns: int = 2
) -> None:
    """Pairs of images, ground truth on the left and detections on the right, ``columns`` pairs per row."""
    rows = -(-len(examples) // columns)
    height = max(image.shape[-2] / image.shape[-1] for image, *_ in examples)
    size = (3.4 * 2 * columns, (3.4 * min(height, 2) + 0.3) * rows + 0.5)
    figure, axes = plt.subplots(rows, 2 * columns, figsize=size, squeeze=False)
    _hide(axes.flat)
    for (left, right), (image, truth, found) in zip(axes.reshape(-1, 2), examples, strict=False):
        _objects(left, image, truth, classes, "annotated")
        _objects(right, image, found, classes, "found")
    save(figure, path, title)


def detection(image: Tensor, found: Found, classes: Sequence[str], path: Path, name: str) -> None:
    """One image with its detections."""
    ratio = image.shape[-2] / image.shape[-1]
    figure, axis = plt.subplots(figsize=(7, 7 * min(max(ratio, 0.4), 2.5) + 0.4))
    _objects(axis, image, found, classes, name)
    save(figure, path)


def _objects(axis: Axes, image: Tensor, found: Found, classes: Sequence[str], title: str) -> None:
    """An image (float ``[C, H, W]`` in [0, 1]) with boxes, class names and, if any, scores and masks."""
    height, width = image.shape[-2:]
    place = {"interpolation": "nearest", "extent": (0, width, height, 0)}  # edges of pixels are integers, as in boxes
    axis.set_axis_on()
    axis.imshow(to_rgb(image.permute(1, 2, 0).float().cpu().numpy()).clip(0, 1), **place)
    labels = found["labels"].tolist()
    axis.set(xticks=[], yticks=[])
    axis.set_title(f"{title}: {len(labels)}", fontsize=9, **PLAIN)
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    for mask, colour in zip(found.get("masks", ()), colours, strict=False):
        layer = np.zeros((height, width, 4))
        layer[mask.reshape(height, width).float().cpu().numpy() > 0.5] = (*colour, 0.45)
        axis.imshow(layer, **place)
    for i, (x1, y1, x2, y2) in enumerate(found["boxes"].tolist()):
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colours[i], linewidth=1.4))
        text = f"{classes[labels[i]]}" + (f" {100 * float(found['scores'][i]):.0f}" if "scores" in found else "")
        tag = {"facecolor": colours[i], "edgecolor": "none", "pad": 1, "alpha": 0.85}
        side = "top" if y1 < 0.08 * height else "bottom"  # inside the box if there is no room above it
        axis.text(x1, y1, text, fontsize=7, color="white", va=side, bbox=tag, clip_on=True, **PLAIN)
    axis.set(xlim=(0, width), ylim=(height, 0))


# ---- segmentation


def label_colours(classes: int) -> np.ndarray:
    """uint8 ``[classes, 3]``: the colours of Pascal VOC's masks, which differ most for neighbouring labels."""
    labels = np.arange(classes)[:, None]
    colours = np.zeros((classes, 3), int)
    for bit in range(8):  # three bits of the label at a time, the lowest to the highest bit of red, green, blue
        colours |= ((labels >> (3 * bit + np.arange(3))) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def segmentations(
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: list[str], path: Path, title: str
) -> None:
    """Held-out images with their true and predicted classes, and a legend of the classes that occur.

    Args:
        examples: image uint8 ``[H, W, C]``, truth and prediction ``[H, W]``; truth 255 (no class) is white.
    """
    colours = np.full((256, 3), 255, np.uint8)
    colours[: len(classes)] = label_colours(len(classes))
    figure, axes = plt.subplots(len(examples), 3, figsize=(9, 3 * len(examples) + 0.8), squeeze=False)
    _hide(axes.flat)
    for row, (image, truth, predicted) in zip(axes, examples, strict=True):
        for axis, shown in zip(row, (to_rgb(image), colours[truth], colours[predicted]), strict=True):
            axis.imshow(shown, interpolation="nearest")
    for axis, name in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(name)
    seen = np.unique(np.concatenate([labels.ravel() for _, *pair in examples for labels in pair]))
    seen = [int(label) for label in seen if label < len(classes)]
    handles = [Rectangle((0, 0), 1, 1, fc=colours[label] / 255, ec="0.5", lw=0.5) for label in seen]
    names = [classes[label] for label in seen]
    legend = figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=6, fontsize=8)
    for text in legend.get_texts():
        text.set(**PLAIN)
    save(figure, path, title)


def _hide(axes: Iterable[Axes]) -> None:
    for axis in axes:
        axis.set_axis_off()
