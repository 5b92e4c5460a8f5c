"""The tables of `foveal bench gpu` as pictures: ``python -m foveal.benchmarks.plots FOLDER`` reads and writes there."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

# Okabe and Ito's palette, which everyone can tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bars(path: Path, title: str, unit: str, groups: dict[str, dict[str, float]], told: str) -> None:
    """One group of horizontal bars for each key of ``groups``, one bar for each name in it; written as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure = Figure(figsize=(9, 1.5 + 0.2 * sum(len(group) + 1 for group in groups.values())), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    y, ticks, drawn = 0.0, [], set()
    for group in groups.values():
        ticks.append(y + (len(group) - 1) / 2)
        for name, value in group.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axis.barh(y, value, color=colour, edgecolor="black", linewidth=0.3, label=None if name in drawn else name)
            axis.text(value, y, f" {value:.3g}", va="center", fontsize=6)
            drawn.add(name)
            y += 1
        y += 1
    axis.set_yticks(ticks, list(groups), fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.set_title(f"{title}\n{told}", fontsize=9)
    axis.margins(x=0.1, y=0.01)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw(folder: Path) -> list[Path]:
    """A picture for each table and mode in ``folder``; the paths written."""
    written = []
    for part, value, unit in (
        ("layers", "share_of_floor", "share of the memory or arithmetic floor"),
        ("convs", "share_of_floor", "share of the memory or arithmetic floor"),
        ("halo", "ms", "milliseconds"),
        ("models", "images_per_second", "images per second"),
    ):
        table = folder / f"gpu-{part}.csv"
        if not table.exists():
            continue
        rows = read(table)
        told = ", ".join(f"{key} {rows[0][key]}" for key in ("gpu", "torch", "triton", "date") if rows[0].get(key))
        modes = dict.fromkeys((row.get("run", ""), row["mode"]) for row in rows if row[value])
        for run, mode in modes:
            groups: dict[str, dict[str, float]] = {}
            for row in rows:
                if row["mode"] == mode and row.get("run", "") == run and row[value]:
                    label = " ".join(row[key] for key in ("case", "map", "rule", "layer", "model") if row.get(key))
                    groups.setdefault(label, {})[row.get("by") or "images per second"] = float(row[value])
            name = "-".join(filter(None, ("gpu", part, run, mode.replace("+", "-"))))
            path = folder / f"{name}.png"
            bars(path, f"{part}, {' '.join(filter(None, (run, mode)))}", unit, groups, told)
            written.append(path)
    return written


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m foveal.benchmarks.plots FOLDER (with the tables of foveal bench gpu)", file=sys.stderr)
        return 2
    written = draw(Path(arguments[0]))
    print(*(f"wrote {path}" for path in written), sep="\n")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
