"""``foveal report``: a run in one HTML file, offline and without scripts.

Everything is read from the run folder, so reports work for running and for old runs. The page is the template
report.html; this file fills it.
"""

import base64
import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.ticker import MaxNLocator

from ..files import atomic

Row = dict[str, str]
Points = list[tuple[float, float]]
# title, columns of metrics.csv with their labels
CHARTS = (
    ("Loss", {"train_loss": "training, augmented", "val_loss": "held out"}),
    ("Accuracy, %", {"top1": "top-1", "top5": "top-5"}),
    ("Box AP", {"box_ap": "AP", "box_ap50": "AP50", "box_ap75": "AP75"}),
    ("Mask AP", {"mask_ap": "AP", "mask_ap50": "AP50", "mask_ap75": "AP75"}),
    ("Segmentation, %", {"miou": "mean IoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"}),
    ("Cosine similarity, %", {"cosine": "upsampler", "bilinear": "bilinear interpolation"}),
    ("Loss, % of that of bilinear interpolation", {"loss_ratio": "upsampler"}),
    ("Learning rate", {"lr": "largest"}),
    ("Norm of the gradient", {"grad_norm": "before clipping, mean"}),
    ("Images per second", {"images_per_second": "training"}),
    ("Waiting for data, % of the time", {"data_wait": "share"}),
    ("Memory, MiB", {"memory_mib": "highest"}),
)
SHARES = ("data_wait",)  # 0 .. 1, shown in percent
AP_COLUMNS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "small",
    "ap_medium": "medium",
    "ap_large": "large",
}
HEADLINES = {
    "val_loss": "held-out loss",
    "top1": "top-1, %",
    "top5": "top-5, %",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "miou": "mean IoU, %",
    "pixel_accuracy": "pixel accuracy, %",
    "cosine": "cosine similarity, %",
    "bilinear": "of bilinear interpolation, %",
    "best_epoch": "best epoch",
    "n": "held-out images",
    "parameters": "M parameters",
    "epochs": "epochs",
    "seconds": "seconds",
    "images_per_second": "images/s at best",
}
LARGEST_MATRIX = 20  # classes; for more, only the most frequent mistakes are shown
LISTED = 50  # rows of a long table
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 190, 46, 10, 10, 24  # of a chart and its margins


def write(run: str | Path) -> Path:
    """Write RUN/report.html from the content of the run folder; returns its path.

    Raises:
        ValueError: not a run folder.

    Examples:
        >>> from pathlib import Path
        >>> from foveal.train.report import write
        >>> Path("run").mkdir()
        >>> _ = Path("run/config.yaml").write_text("model: {name: nat_mini}")
        >>> write("run").name
        'report.html'
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run folder: it has no config.yaml")
    history, summary = _table(run / "metrics.csv"), _json(run / "summary.json")
    facts = [(label, summary[key]) for key, label in HEADLINES.items() if summary.get(key) is not None]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["number"] = _number
    page = environment.get_template("report.html").render(
        title=" ".join(str(summary[k]) for k in ("model", "head") if summary.get(k)) or run.resolve().name,
        run=run,
        summary=summary,
        epochs=len(history),
        metrics=(list(history[0]), [list(row.values()) for row in history]) if history else None,
        facts=[(label, value / 1e6 if label.startswith("M ") else value) for label, value in facts],
        charts=[_chart(title, lines) for title, columns in CHARTS if (lines := _lines(history, columns))],
        picture=_picture(run),
        ap_columns=list(AP_COLUMNS.values()),
        precision=_precision(summary),
        classes=_classes(run),
        confusion=_confusion(run),
        left_out=list(filter(None, map(_left_out, (run / "bad_samples.csv", run / "bad_annotations.csv")))),
        config=_text(run / "config.yaml"),
        machine=[(key, _words(value)) for key, value in _json(run / "environment.json").items()],
    )
    with atomic(run / "report.html") as new:
        new.write_text(page, encoding="utf-8", errors="replace")  # file names need not be UTF-8
    return run / "report.html"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(_text(path) or "{}")


def _table(path: Path) -> list[Row]:
    return list(csv.DictReader(io.StringIO(_text(path))))


def _number(value: Any) -> str:
    """Format a number with thousands separators and four significant digits."""
    if value is None or value == "":
        return "-"
    try:
        value = float(value)
    except ValueError:
        return value
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---- curves


def _lines(history: Sequence[Row], columns: dict[str, str]) -> dict[str, Points]:
    """The finite values of columns by epoch, by label; without empty ones."""
    lines = {}
    for name, label in columns.items():
        points = [(float(row["epoch"]), float(row[name])) for row in history if row.get(name)]
        lines[label] = [(x, y * (100 if name in SHARES else 1)) for x, y in points if math.isfinite(y)]
    return {label: points for label, points in lines.items() if points}


def _chart(title: str, lines: dict[str, Points]) -> dict[str, Any]:
    """Ticks and curves in pixel coordinates, each point with a text."""
    x_low, x_high = _range([x for points in lines.values() for x, _ in points])
    y_low, y_high = _range([y for points in lines.values() for _, y in points])

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    curves = []
    for label, points in lines.items():
        placed = [(across(x), down(y), f"epoch {x:g}, {label}: {y:.5g}") for x, y in points]
        curves.append({"label": label, "last": points[-1][1], "points": placed})
    return dict(
        title=title,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        x_ticks=[(across(x), int(x)) for x in _ticks(x_low, x_high) if x == int(x)],
        y_ticks=[(down(y), _tick(y)) for y in _ticks(y_low, y_high)],
        curves=curves,
    )


def _range(values: list[float]) -> tuple[float, float]:
    """Minimum and maximum, which differ."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(high), 1e-300):
        margin = 0.5 * (abs(low) or 1)
        return low - margin, high + margin
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round values between ``low`` and ``high``."""
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(tick) for tick in ticks if low - slack <= tick <= high + slack]


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.0e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:,.6g}"


# ---- what a run leaves


def _picture(run: Path) -> dict[str, str] | None:
    """The predictions of the best epoch, or of the latest one."""
    found = [path for path in (run / "predictions.png",) if path.is_file()] or sorted((run / "pictures").glob("*.png"))
    return {"name": found[-1].name, "code": base64.b64encode(found[-1].read_bytes()).decode()} if found else None


def _precision(summary: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for kind in ("box", "mask"):
        for when, prefix in (("best epoch", ""), ("last epoch", "last_")):
            if f"{prefix}{kind}_ap" in summary:
                figures = [summary.get(f"{prefix}{kind}_{name}") for name in AP_COLUMNS]
                rows.append([f"{kind}, {when}", *figures])
    return rows


def _classes(run: Path) -> dict[str, Any]:
    """The scores of each class; only the worst ones if there are many."""
    rows = _table(run / "classes.csv")
    head = list(rows[0]) if rows else []
    figure = head[2] if head else ""
    if len(rows) > LISTED:
        rows = sorted(rows, key=lambda row: float(row[figure]) if row[figure] else math.inf)
    total, shown = len(rows), [list(row.values()) for row in rows[:LISTED]]
    return {"head": head, "figure": figure, "rows": shown, "total": total}


def _confusion(run: Path) -> dict[str, Any]:
    """The confusion matrix for few classes, and the most frequent mistakes."""
    counts = {(row["class"], row["predicted"]): int(row["count"]) for row in _table(run / "confusion.csv")}
    classes = [row["class"] for row in _table(run / "classes.csv")]
    small = bool(counts) and len(classes) <= LARGEST_MATRIX
    matrix = []
    for true in classes if small else ():
        cells = [counts.get((true, other), 0) for other in classes]
        matrix.append((true, [(count, count / (sum(cells) or 1)) for count in cells]))
    wrong = sorted(((n, pair) for pair, n in counts.items() if pair[0] != pair[1]), key=lambda each: -each[0])
    return {"matrix": matrix, "mistakes": [(*pair, n) for n, pair in wrong[: 10 if small else LISTED]]}


def _left_out(path: Path) -> dict[str, Any] | None:
    rows = _table(path)
    if not rows:
        return None
    shown = [list(row.values()) for row in rows[:LISTED]]
    return {"what": path.stem.removeprefix("bad_"), "head": list(rows[0]), "rows": shown, "total": len(rows)}
