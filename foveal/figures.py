"""Size, cost and released weights of every model, read from ``figures.csv``, without building any.

``python -m foveal.backbones.profile`` writes the table; a test counts every model again. A leaf: only the
standard library, so that `foveal list` does not wait for PyTorch.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("figures.csv")


@dataclass(frozen=True)
class Figures:
    """A row of the table: a model with its default weights' configuration.

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
    tags: tuple[str, ...]  # of released weights that can be fetched, sorted
    licence: str  # of the default weights; without any, of the code


@functools.cache
def figures(file: Path = FILE) -> dict[str, Figures]:
    """The table by model name, sorted."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [_parse(row) for row in csv.DictReader(stream)]
    return {row.name: row for row in rows}


def write(rows: list[Figures], file: Path = FILE) -> None:
    """Write the table anew, sorted by name."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("name", "family", "parameters", "macs", "input", "tags", "licence"))
        for row in sorted(rows, key=lambda row: row.name):
            size, tags = "x".join(map(str, row.input_size)), " ".join(row.tags)
            writer.writerow((row.name, row.family, row.parameters, row.macs, size, tags, row.licence))


def _parse(row: dict[str, str]) -> Figures:
    channels, rows, columns = map(int, row["input"].split("x"))
    return Figures(
        name=row["name"],
        family=row["family"],
        parameters=int(row["parameters"]),
        macs=int(row["macs"]),
        input_size=(channels, rows, columns),
        tags=tuple(row["tags"].split()),
        licence=row["licence"],
    )
