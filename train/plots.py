"""Figures of a run: its curves, and held-out predictions with the mistakes marked."""

import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only, also where there is no display
import matplotlib.pyplot as plt

from .scoring import Example, Score

RIGHT, WRONG = "#1b7837", "#b2182b"  # told apart by colour-blind readers too; the symbol says the same


def _save(figure: plt.Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")
    plt.close(figure)
    os.replace(temporary, path)


def curves(history: list[dict[str, Any]], path: Path, title: str, shown: dict[str, str], monitor: str) -> None:
    """Loss, metrics and learning rate by epoch, from the rows of ``metrics.csv``.

    Args:
        shown: the names of metrics to draw, with what a reader calls each.
        monitor: the one whose largest value is marked.
    """
    epochs = [row["epoch"] for row in history]
    scored = [row for row in history if row[monitor] is not None]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    left.plot(epochs, [row["train_loss"] for row in history], label="training (with its augmentation)")
    if "val_loss" in history[0]:
        left.plot([row["epoch"] for row in scored], [row["val_loss"] for row in scored], label="held out")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    for (name, label), colour in zip(shown.items(), (RIGHT, "#2166ac", "#b2182b", "0.3"), strict=False):
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
    figure.suptitle(title)
    figure.tight_layout()
    _save(figure, path)


def predictions(score: Score, classes: list[str], path: Path, title: str, columns: int = 10, rows: int = 4) -> None:
    """Held-out images with the model's answer: mistakes first, framed red with a cross; the rest green with a tick."""
    size = columns * rows
    wrong = score.wrong[: size // 2]
    examples = wrong + score.right[: size - len(wrong)]
    rows = -(-len(examples) // columns)
    long_names = max(len(name) for name in classes) > 4
    figure, axes = plt.subplots(rows, columns, figsize=(1.35 * columns, (1.9 if long_names else 1.7) * rows + 0.6))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, example in zip(axes.flat, examples, strict=False):
        _example(axis, example, classes, long_names)
    mistakes = round(score.n * (1 - score.top1 / 100))
    shown = f"{len(wrong)} of its {mistakes} mistakes (✗ red), then right answers (✓ green)"
    figure.suptitle(f"{title}: {score.top1:.2f} % of {score.n:,} held-out images right\n{shown}", fontsize=11)
    figure.tight_layout()
    _save(figure, path)


def _example(axis: plt.Axes, example: Example, classes: list[str], long_names: bool) -> None:
    hit = example.predicted == example.target
    image = example.image.permute(1, 2, 0).numpy()
    if image.shape[-1] == 1:
        axis.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axis.imshow(image, interpolation="nearest")
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=RIGHT if hit else WRONG, linewidth=1 if hit else 3)
    text = f"{'✓' if hit else '✗'} {classes[example.predicted]}"
    if not hit:
        text += f"{chr(10) if long_names else ', '}is {classes[example.target]}"
    axis.set_title(
        text,
        color=RIGHT if hit else WRONG,
        fontsize=8 if long_names else 9,
        fontweight=None if hit else "bold",
        parse_math=False,  # names may have dollar signs
    )
    axis.set_xlabel(f"{example.probability:.0%}", fontsize=7, labelpad=2)


def label_colours(classes: int) -> np.ndarray:
    """uint8 ``[classes, 3]``: the colours of the Pascal VOC masks, which differ most for labels that are close."""
    labels = np.arange(classes)[:, None]
    colours = np.zeros((classes, 3), int)
    for bit in range(8):  # three bits of the label at a time, the lowest to the highest bit of red, green, blue
        colours |= ((labels >> (3 * bit + np.arange(3))) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def segmentations(
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: list[str], path: Path, title: str
) -> None:
    """Held-out images, each beside its true and its predicted classes, with the names of those that can be seen.

    Args:
        examples: image uint8 ``[H, W, 1 or 3]``, truth and prediction ``[H, W]``; truth 255 (no class) is white.
    """
    colours = np.full((256, 3), 255, np.uint8)
    colours[: len(classes)] = label_colours(len(classes))
    figure, axes = plt.subplots(len(examples), 3, figsize=(9, 3 * len(examples) + 0.8), squeeze=False)
    for row, (image, truth, predicted) in zip(axes, examples, strict=True):
        grey = image[..., :1].repeat(3, -1) if image.shape[-1] == 1 else image
        for axis, shown in zip(row, (grey, colours[truth], colours[predicted]), strict=True):
            axis.imshow(shown, interpolation="nearest")
            axis.set_axis_off()
    for axis, name in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(name)
    seen = np.unique(np.concatenate([part.ravel() for _, *parts in examples for part in parts]))
    seen = [int(label) for label in seen if label < len(classes)]
    handles = [plt.Rectangle((0, 0), 1, 1, fc=colours[label] / 255, ec="0.5", lw=0.5) for label in seen]
    names = [classes[label] for label in seen]
    legend = figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=6, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names may have dollar signs
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)
