"""Plots of the tables of `foveal bench`: `foveal bench plots [FOLDER] [--output FOLDER]`.

Every row of a table is drawn. The palette is Okabe and Ito's, each colour with its own marker.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from ..files import atomic
from .measure import read_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("results")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = "osD^vP*X<>phd"
DPI = 160  # 8 inches are 1280 pixels

Row = dict[str, str]
Facts = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A figure, its file name, its table, and its title."""

    name: str
    title: str
    figure: Figure
    table: Path


def machine(row: Row) -> str:
    """Machine and versions of a table, in one line."""
    found = [row["gpu"]] if row.get("gpu") else []
    if row.get("cpu"):
        found.append(f"{row['cpu']}, {row['threads']} thread{'s' * (row['threads'] != '1')}")
    versions = [f"{name} {row[name].partition('+')[0]}" for name in ("foveal", "torch", "triton") if row.get(name)]
    return ", ".join([*found, *versions, *filter(None, [row.get("date")])])


def new_figure(width: float, height: float, dpi: int = DPI, h_pad: float | None = None) -> Figure:
    """An empty figure without a display; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=dpi, layout=ConstrainedLayoutEngine(h_pad=h_pad))
    FigureCanvasAgg(figure)
    return figure


# ------------------------------------------------------------------------------------------------------ dots


@dataclass(frozen=True)
class Panel:
    """One axis of a plot: a column of the rows that match ``where``."""

    title: str
    column: str
    where: Mapping[str, str] = field(default_factory=dict)

    def value(self, row: Row) -> float | None:
        """The value of a row; None if the row is not in this panel."""
        if not row.get(self.column) or any(row[key] != wanted for key, wanted in self.where.items()):
            return None
        return float(row[self.column])


@dataclass(frozen=True)
class Table:
    """Layout of a dot plot: a line for each ``label`` (a format of the row), a dot for each value of ``series``.

    Rows whose column ``hollow[0]`` equals ``hollow[1]`` get a hollow marker, named ``hollow[2]``.
    """

    title: str
    label: str
    series: str
    panels: tuple[Panel, ...]
    hollow: tuple[str, str, str] | None = None

    def label_of(self, row: Row) -> str:
        return self.label.format_map(row)

    def series_of(self, row: Row) -> str:
        name = row.get(self.series) or "eager"  # of earlier tables of models
        return {"tiled": "foveal", "native": "foveal, native", "natten": f"NATTEN {row.get('natten')}"}.get(name, name)

    def is_hollow(self, row: Row) -> bool:
        return self.hollow is not None and row[self.hollow[0]] == self.hollow[1]


FORWARD, BOTH = Panel("forward, ms", "forward_ms"), Panel("forward + backward, ms", "forward_backward_ms")
SHARES = (
    Panel("forward, share of the floor", "forward_share_of_floor"),
    Panel("forward + backward", "forward_backward_share_of_floor"),
)
TABLES = {
    "kernels": Table(
        "Neighborhood attention of DiNAT-T at 224, batch 8 (d: dilation)",
        "{map}",
        "backend",
        (FORWARD, Panel("memory, forward, MiB", "forward_extra_mib")),
        ("bias", "table", "with bias"),
    ),
    "aggregate": Table(
        "Neighborhood aggregation of OverLoCK-XT (k: kernel)",
        "{map}, batch {batch}",
        "backend",
        (FORWARD, BOTH, Panel("memory, MiB", "forward_backward_extra_mib")),
    ),
    "windows": Table(
        "Attention in windows, beside PyTorch's",
        "{case}: {map} {rule}, {batch} x {heads} x {depth}, {bias}",
        "by",
        (FORWARD, BOTH, Panel("memory, MiB", "forward_backward_extra_mib")),
    ),
    "halo": Table(
        "Halo attention, the layers of timm's HaloNets",
        "{model} {input}: {layer}",
        "by",
        (
            Panel("forward, ms", "forward_ms", {"part": "attention"}),
            Panel("with projections, ms", "forward_ms", {"part": "module"}),
            Panel("memory, MiB", "forward_extra_mib", {"part": "attention"}),
        ),
    ),
    "models": Table("Whole models beside their peers", "{model}, {input}", "run", (FORWARD, BOTH)),
    "served": Table("One image through a model in PyTorch and as exported", "{model}, {dtype}", "by", (FORWARD,)),
    "data": Table(
        "Loading JPEG files, per core",
        "{files}, {augmentation}",
        "loader",
        (Panel("images per second", "images_per_core_second"),),
    ),
    "layers": Table("Neighborhood operations of the models on a GPU", "{case}, {map} {rule}", "by", SHARES),
    "zoo": Table("One image through every model", "{model}, {input}", "form", (Panel("ms", "ms"),)),
}


def dots(table: Table, rows: Sequence[Row]) -> Figure:
    """Draw a line per label, in the order of the rows, and a dot per series; logarithmic if values span a decade."""
    labels = list(dict.fromkeys(table.label_of(row) for row in rows))
    names = sorted(dict.fromkeys(map(table.series_of, rows)), key=lambda name: not name.startswith("foveal"))
    styles = {name: (COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(names)}
    figure = new_figure(8, 1.35 + (0.22 if table.hollow is None else 0.34) * len(labels))
    axes = figure.subplots(1, len(table.panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, table.panels, strict=True):
        lines: dict[float, list[float]] = {}
        for row in rows:
            if (value := panel.value(row)) is None:
                continue
            hollow, (colour, marker) = table.is_hollow(row), styles[table.series_of(row)]
            y = labels.index(table.label_of(row)) + (0 if table.hollow is None else 0.21 if hollow else -0.21)
            lines.setdefault(y, []).append(value)
            face, edge = ("white", colour) if hollow else (colour, "white")
            size, width = (5.5, 1.1) if hollow else (6.5, 0.5)
            look = {"color": colour, "markerfacecolor": face, "markeredgecolor": edge, "markeredgewidth": width}
            axis.plot(value, y, marker, markersize=size, zorder=4 if marker == MARKERS[0] else 3, **look)
        for y, values in lines.items():
            axis.plot([min(values), max(values)], [y, y], color="0.8", linewidth=1.2, zorder=1)
        drawn = [value for values in lines.values() for value in values] or [1.0]
        if logarithmic := min(drawn) > 0 and max(drawn) >= 10 * min(drawn):
            _logarithmic(axis, drawn, wide=len(table.panels) == 1)
        else:
            axis.set_xlim(0, 1.05 * max(drawn))
        axis.set_title(panel.title + (" (log)" if logarithmic else ""), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="0.88", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    _legend(figure, styles, table.hollow[2] if table.hollow else "")
    _titles(figure, table.title, machine(rows[0]))
    return figure


def _logarithmic(axis: Axes, values: Sequence[float], wide: bool = True) -> None:
    """Logarithmic axis with ticks at 1, 2, 5, 10 up to three decades, or one if the axis is not ``wide``."""
    from matplotlib.ticker import LogLocator

    room = max(values) < (1000 if wide else 15) * min(values)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if room else (1.0,)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axis.xaxis.minorticks_off()


def _legend(figure: Figure, series: Mapping[str, tuple[str, str]], hollow: str = "") -> None:
    """Legend of the colours and markers, and of hollow markers."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker=m, color=colour, ls="", label=name) for name, (colour, m) in series.items()]
    if hollow:
        handles.append(Line2D([], [], marker="o", color="0.3", markerfacecolor="white", ls="", label=hollow))
    if len(handles) > 1:
        columns = min(len(handles), 5)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _titles(figure: Figure, title: str, note: str) -> None:
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    figure.text(0.99, 1 - 0.09 / figure.get_figheight(), note, fontsize=7, color="0.35", ha="right", va="top")


# -------------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Point:
    """A model: its family, label and position; ``larger``: trained on more than ImageNet-1K."""

    family: str
    label: str
    x: float
    y: float
    larger: bool
    ours: bool
    line: tuple[Any, ...]  # points of the same value are joined by a line


SIZES = (("parameters", 1e6), ("macs", 1e9))
_FAMILIES = (  # the colour tells them
    "dinat_s|dinat|nat|maxvit|overlock|care|swin|convnext|davit|van|shiftvit|rmt|raftmlp|stvit|sgformer|transnext|moh_vit"
    "|triplet|fan|tap_fan|agent|inline"
)
_SHORT = {"mini": "M", "tiny": "T", "small": "S", "base": "B", "large": "L", "xlarge": "XL"}


def short(name: str) -> str:
    """Short name of a model within its family: ``dinat_large_384`` is ``L 384``."""
    name = re.sub(rf"^({_FAMILIES})_(?!isotropic)", "", name)
    name = re.sub(r"^(\w+)_isotropic", r"\1", name).replace("vitrpb", "vit").replace("halonet", "").replace("halo", "")
    words = [word for word in name.split("_") if word not in ("patch4", "window7", "tf", "224", "256")]
    return " ".join(_SHORT.get(word, word.upper() if len(word) < 3 else word) for word in words)


def points(known: Mapping[str, Mapping[str, Any]], x: Mapping[str, float]) -> list[Point]:
    """The models with a published accuracy; ``x``: their coordinates."""
    found = []
    for name, facts in known.items():
        if facts["top1"] is None:
            continue
        kind = re.sub(r"_?(mini|tiny|small|base|large|xlarge|xt|[tsb]|s\d)(_|$).*", "", name)
        larger = bool(facts["larger"])
        line = (facts["family"], name if "hybrid" in facts["family"] else kind, larger, facts["input"][1])
        found.append(Point(facts["family"], short(name), x[name], facts["top1"], larger, facts["ours"], line))
    return sorted(found, key=lambda point: (not point.ours, "timm" in point.family, point.family))


def scatter(title: str, note: str, axis_label: str, models: Sequence[Point]) -> Figure:
    """Accuracy over cost, a marker and colour for each family, hollow for pre-training on larger datasets."""
    figure = new_figure(9, 6.4)
    axis = figure.subplots()
    families = dict.fromkeys(point.family for point in models if point.ours)
    peers = dict.fromkeys(point.family for point in models if not point.ours)  # grey, to save colours
    styles = {name: (COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(families)}
    styles |= {name: ("0.45", MARKERS[::-1][n % len(MARKERS)]) for n, name in enumerate(peers)}
    for line in dict.fromkeys(point.line for point in models):
        joined = sorted((point.x, point.y) for point in models if point.line == line)
        axis.plot(*zip(*joined, strict=True), color=styles[line[0]][0], linewidth=0.8, alpha=0.45, zorder=1)
    for point in models:
        colour, marker = styles[point.family]
        face = "white" if point.larger else colour
        axis.plot(point.x, point.y, marker, color=colour, markerfacecolor=face, markersize=6, zorder=3 + point.ours)
    _logarithmic(axis, [point.x for point in models])
    axis.margins(0.06)
    axis.set_xlabel(f"{axis_label} (log)", fontsize=9)
    axis.set_ylabel("top-1 on ImageNet-1K, %, published", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, styles, "pre-trained on ImageNet-21K or 22K" if any(point.larger for point in models) else "")
    _titles(figure, title, note)
    _place_labels(axis, models, {name: colour for name, (colour, _) in styles.items()})
    return figure


def _place_labels(axis: Axes, models: Sequence[Point], colours: Mapping[str, str]) -> None:
    """Label timm's models, and ours that no cheaper one surpasses, near to their markers and without overlap.

    Raises:
        ValueError: there is no room for a label.
    """
    from matplotlib import patheffects
    from matplotlib.font_manager import FontProperties
    from matplotlib.transforms import Bbox

    figure: Any = axis.figure
    font = FontProperties(size=7.5)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # keep the positions
    renderer, frame, pixel = figure.canvas.get_renderer(), axis.get_window_extent(), figure.dpi / 72
    places = axis.transData.transform([(point.x, point.y) for point in models])
    radius = 4 * pixel
    _, line, _ = renderer.get_text_width_height_descent("lp", font, False)  # ascender and descender
    taken = [Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in places]
    for point, (x, y) in zip(models, places, strict=True):
        if point.ours and any(other.x <= point.x and other.y > point.y for other in models):
            continue
        width, _, _ = renderer.get_text_width_height_descent(point.label, font, False)
        width, height = width + 2 * pixel, line + pixel
        box = None
        for far, turn in ((far, turn) for far in range(5, 90, 3) for turn in range(0, 360, 15)):
            dx, dy = math.cos(math.radians(turn)), math.sin(math.radians(turn))
            dx, dy = dx * (far * pixel + width / 2), dy * (far * pixel + height / 2)
            tried = Bbox.from_bounds(x + dx - width / 2, y + dy - height / 2, width, height)
            inside = frame.x0 < tried.x0 and tried.x1 < frame.x1 and frame.y0 < tried.y0 and tried.y1 < frame.y1
            if inside and not tried.count_overlaps(taken):
                box = tried
                break
        if box is None:
            raise ValueError(f"there is no room for the label {point.label!r} of {point.family}")
        taken.append(box)
        axis.annotate(
            point.label,
            (point.x, point.y),
            (dx / pixel, dy / pixel),
            textcoords="offset points",
            fontproperties=font,
            color=colours[point.family],
            ha="center",
            va="center",
            zorder=5,
            path_effects=[patheffects.withStroke(linewidth=1.8, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            if far > 11
            else None,
        )


# -------------------------------------------------------------------------------------------------- pictures


def pictures(folder: Path, facts: Facts | None = None) -> Iterator[Picture]:
    """Plots of every table in ``folder``, and of accuracy if ``facts`` are given.

    Args:
        facts: family, ours, same, top1, larger, input, parameters and macs of a model, by name.
    """
    for part, table in TABLES.items():
        for path in sorted([*folder.glob(f"{part}-cpu-*.csv"), *folder.glob(f"gpu-{part}.csv")]):
            rows = read_csv(path)
            shown = _both_forms(rows) if part == "zoo" else rows
            shown = [row for row in shown if any(panel.value(row) is not None for panel in table.panels)]
            if shown:
                yield Picture(path.stem, table.title, dots(table, shown), path)
            if part == "zoo" and facts is not None:
                yield from _accuracy(path, rows, facts)


def _both_forms(rows: Sequence[Row]) -> list[Row]:
    forms = (("as created", "forward_ms"), ("reparameterized", "deployed_ms"))
    return [{**row, "form": form, "ms": row[column]} for row in rows for form, column in forms if row[column]]


def _accuracy(path: Path, rows: Sequence[Row], facts: Facts) -> Iterator[Picture]:
    known = {row["model"]: facts(row["model"]) for row in rows}
    speed = {row["model"]: float(row["forward_ms"]) for row in rows}
    size, macs = ({name: each[key] / unit for name, each in known.items()} for key, unit in SIZES)
    own = {name: each for name, each in known.items() if not each["same"]}  # timm's versions have the same size
    for what, title, label, x in (
        ("accuracy", "Accuracy and speed, one image", "milliseconds for one image", speed),
        ("parameters", "Accuracy and size", "million parameters", size),
        ("macs", "Accuracy and arithmetic", "GMACs of one image", macs),
    ):
        if found := points(known if x is speed else own, x):
            figure = scatter(title, machine(rows[0]) if x is speed else "", label, found)
            yield Picture(f"{path.stem}-{what}", title, figure, path)


def save(figure: Figure, path: Path, source: str, colours: int | None = None) -> None:
    """Write a PNG with the description ``source``, quantized to ``colours``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", source)
    with Image.open(buffer) as image:
        drawn = image.convert("RGB")
    if colours is not None:  # a method that keeps rare colours
        drawn = drawn.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as new:
        drawn.save(new, format="PNG", optimize=True, pnginfo=text)


def save_picture(picture: Picture, folder: Path) -> Path:
    """Write a plot with the name and hash of its table as description; returns its path."""
    path, table = folder / f"{picture.name}.png", picture.table
    save(picture.figure, path, fingerprint(table), colours=128)
    return path


def fingerprint(table: Path) -> str:
    return f"{table.name} {hashlib.sha256(table.read_bytes()).hexdigest()[:16]}"


def _facts(name: str) -> Mapping[str, Any]:
    from ..zoo import facts  # slow: reads the manifest

    return facts(name)


def main(arguments: Sequence[str]) -> int:
    """Run ``foveal bench plots``.

    Raises:
        ValueError: there is no table in the folder.
    """
    parser = argparse.ArgumentParser(prog="foveal bench plots", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of tables named like those shipped (the default)")
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: FOLDER; of those shipped, plots)")
    options = parser.parse_args(arguments)
    folder = options.folder or RESULTS
    output = options.output or options.folder or Path("plots")
    written = [save_picture(picture, output) for picture in pictures(folder, _facts)]
    if not written:
        raise ValueError(f"{folder} has no table with a name like kernels-cpu-NAME.csv or gpu-models.csv")
    print(*(f"wrote {path}" for path in written), sep="\n")
    return 0
