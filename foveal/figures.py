"""Size, cost and published weights of every model, read from ``figures.csv``, without building any.

``python -m foveal.zoo`` writes the table; a test recomputes it. Uses only the standard
library, so that `foveal list` does not import PyTorch.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("figures.csv")


@dataclass(frozen=True)
class Figures:
    """A row of the table: a model with the configuration of its default weights.

    Examples:
        >>> from foveal.figures import figures
        >>> tiny = figures()["dinat_tiny"]
        >>> tiny.family, tiny.input_size, round(tiny.macs / 1e9, 1)
        ('DiNAT', (3, 224, 224), 4.3)
    """

    name: str
    family: str
    parameters: int
    macs: int  # of one image, counted as in `foveal.backbones.profile`
    input_size: tuple[int, int, int]  # channels, rows, columns
    any_size: bool  # accepts other image sizes
    top1: float | None  # of the default weights on ImageNet-1K, as published, in percent
    tags: tuple[str, ...]  # of published weights that can be downloaded, sorted
    code_licence: str  # of the published code
    weights_licence: str  # of the default weights; empty if none are published


@functools.cache
def figures(file: Path = FILE) -> dict[str, Figures]:
    """The table by model name, sorted."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [_parse(row) for row in csv.DictReader(stream)]
    return {row.name: row for row in rows}


def write(rows: list[Figures], file: Path = FILE) -> None:
    """Write the table, sorted by name."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(each.name for each in fields(Figures))
        for row in sorted(rows, key=lambda row: row.name):
            size = "x".join(map(str, row.input_size))
            text = {"input_size": size, "any_size": "yes" if row.any_size else "", "tags": " ".join(row.tags)}
            writer.writerow((vars(row) | text).values())


def _parse(row: dict[str, str]) -> Figures:
    channels, rows, columns = map(int, row["input_size"].split("x"))
    values: dict[str, Any] = {
        "parameters": int(row["parameters"]),
        "macs": int(row["macs"]),
        "input_size": (channels, rows, columns),
        "any_size": bool(row["any_size"]),
        "top1": float(row["top1"]) if row["top1"] else None,
        "tags": tuple(row["tags"].split()),
    }
    return Figures(**{**row, **values})
