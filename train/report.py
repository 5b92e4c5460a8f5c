"""``foveal report``: a run in one HTML file that opens anywhere, offline, without scripts.

Everything is read from the run folder, so that a report can be made of a run that is still going on, or of an old one.
"""

import base64
import csv
import json
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

Row = dict[str, str]
# title, columns of metrics.csv with what a reader calls each
CHARTS = (
    ("Loss", {"train_loss": "training, augmented", "val_loss": "held out"}),
    ("Accuracy, %", {"top1": "top-1", "top5": "top-5"}),
    ("Box AP", {"box_ap": "AP", "box_ap50": "AP50", "box_ap75": "AP75"}),
    ("Mask AP", {"mask_ap": "AP", "mask_ap50": "AP50", "mask_ap75": "AP75"}),
    ("Segmentation, %", {"miou": "mean IoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"}),
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
    "top1": "top-1, %",
    "top5": "top-5, %",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "miou": "mean IoU, %",
    "pixel_accuracy": "pixel accuracy, %",
    "best_epoch": "best epoch",
    "n": "held-out images",
    "parameters": "M parameters",
    "epochs": "epochs",
    "seconds": "seconds",
    "images_per_second": "images/s at best",
}
LARGEST_MATRIX = 20  # classes; of more, the list of what is most confused is shown
LISTED = 50  # rows of a long table

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --text: #1b1f24; --dim: #5b6570; --line: #d5dae0;
  --c0: #0b62c4; --c1: #c2410c; --c2: #15803d; --heat: 11 98 196; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2127; --text: #e6e9ed; --dim: #9aa5b1;
  --line: #38404a; --c0: #6cb2ff; --c1: #ff9d66; --c2: #66d190; --heat: 66 140 230; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p { margin: .3rem 0; }
.dim { color: var(--dim); }
.bad { color: var(--bad); }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.facts { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); margin-top: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .75rem; margin: 0;
  min-width: 0; }
.facts b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; line-height: 1.3; }
.facts span, figcaption { color: var(--dim); font-size: .85rem; }
figcaption b { color: var(--text); font-size: .95rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
svg .axis { stroke: var(--line); }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
figcaption b { display: block; }
figcaption span { white-space: nowrap; margin-right: .8em; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .35em; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll img { display: block; min-width: 44rem; width: 100%; background: #fff; border-radius: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
.words td { overflow-wrap: anywhere; min-width: 7rem; }
.mistaken td:nth-child(2), .mistaken th:nth-child(2) { text-align: left; }
th { color: var(--dim); font-weight: 600; }
.matrix td { text-align: center; min-width: 2.2rem; border: 1px solid var(--line);
  background: rgb(var(--heat) / var(--v, 0)); }
.matrix td.full { color: #fff; }
.matrix th { max-width: 9rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.matrix th.top { padding: .3rem; vertical-align: bottom; }
.matrix th.top div { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 6rem; margin: auto;
  overflow: hidden; text-overflow: ellipsis; }
pre { margin: 0; font-size: .8rem; white-space: pre-wrap; }
details { margin-top: .5rem; }
summary { cursor: pointer; }
"""


def write(run: str | Path) -> Path:
    """Writes RUN/report.html of what the run folder holds; its path.

    Raises:
        ValueError: the folder holds no run.

    Examples:
        >>> from pathlib import Path
        >>> from foveal.train.report import write
        >>> Path("run").mkdir()
        >>> _ = Path("run/config.yaml").write_text("model: {name: nat_mini}")
        >>> write("run").name  # of what there is so far
        'report.html'
    """
    run = Path(run)
    recipe = run / "config.yaml"
    if not recipe.is_file():
        raise ValueError(f"{run} is no run folder: it has no config.yaml")
    history, summary, machine = (
        _table(run / "metrics.csv"),
        _json(run / "summary.json"),
        _json(run / "environment.json"),
    )
    title = " ".join(filter(None, [str(summary.get("model", "")), str(summary.get("head", ""))])) or run.resolve().name
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=dim>{escape(str(run))}</p>"]
    if not summary:
        parts.append(f"<p class=bad>The run is not finished: {len(history)} epochs are done.</p>")
    parts += [_headline(summary), _section("Curves", _charts(history)), _section("Predictions", _pictures(run))]
    parts += [_section("Average precision", _precision(summary)), _section("Classes", _classes(run))]
    parts += [_section("Confusion", _confusion(run)), _section("Left out", _left_out(run))]
    config = f"<details class=card><summary>config.yaml</summary><pre>{escape(_text(recipe))}</pre></details>"
    parts += [_section("Settings", config), _section("Machine", _pairs(machine)), _section("Epochs", _epochs(history))]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
    )
    path = run / "report.html"
    temporary = path.with_name(".report.html")
    text = page + "\n".join(filter(None, parts)) + "\n</body></html>\n"
    temporary.write_text(text, encoding="utf-8", errors="replace")  # file names need not be UTF-8
    os.replace(temporary, path)
    return path


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(_text(path) or "{}")


def _table(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return list(csv.DictReader(file))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>" if content else ""


def _number(value: Any) -> str:
    """A figure as a reader wants it: thousands apart, four digits that count."""
    if value is None or value == "":
        return "-"
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return escape(value)
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "", names: int = 0) -> str:
    """The first ``names`` columns hold names, which stay as they are ("007"); the others figures."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    shown = [[*map(escape, row[:names]), *map(_number, row[names:])] for row in rows]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in shown)
    return (
        f'<div class=scroll><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )


def _pairs(facts: dict[str, Any]) -> str:
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {each}" for name, each in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        rows.append(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>")
    return f'<div class=scroll><table class="words"><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""


def _headline(summary: dict[str, Any]) -> str:
    known = [(label, summary[key]) for key, label in HEADLINES.items() if summary.get(key) is not None]
    known = [(label, value / 1e6 if label.startswith("M ") else value) for label, value in known]
    cards = "".join(f"<div class=card><b>{_number(value)}</b><span>{label}</span></div>" for label, value in known)
    return f"<div class=facts>{cards}</div>" if cards else ""


# ---- curves


def _charts(history: Sequence[Row]) -> str:
    charts = []
    for title, columns in CHARTS:
        lines = {}
        for name, label in columns.items():
            points = [(float(row["epoch"]), float(row[name])) for row in history if row.get(name)]
            points = [(x, y * (100 if name in SHARES else 1)) for x, y in points if math.isfinite(y)]
            if points:
                lines[label] = points
        if lines:
            charts.append(_chart(title, lines))
    return f"<div class=grid>{''.join(charts)}</div>" if charts else ""


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values from ``low`` to ``high``."""
    step = 10 ** math.floor(math.log10(high - low))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 5)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _chart(title: str, lines: dict[str, list[tuple[float, float]]], width: int = 340, height: int = 190) -> str:
    """A chart as a figure: axes, curves, and a title for each point."""
    left, right, top, bottom = 46, 10, 10, 24
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    if y_high - y_low < 1e-12 * max(abs(y_high), 1e-300):
        y_low, y_high = y_low - (abs(y_low) or 1) * 0.5, y_high + (abs(y_high) or 1) * 0.5

    def place(x: float, y: float) -> tuple[str, str]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return f"{across:.1f}", f"{top + (y_high - y) / (y_high - y_low) * (height - top - bottom):.1f}"

    drawn = []
    for y in _ticks(y_low, y_high):
        _, at = place(x_low, y)
        drawn.append(f'<line class=axis x1="{left}" x2="{width - right}" y1="{at}" y2="{at}"/>')
        drawn.append(f'<text x="{left - 5}" y="{float(at) + 4:.1f}" text-anchor="end">{_tick(y)}</text>')
    for x in _ticks(x_low, x_high):
        if x == int(x):
            at, _ = place(x, y_low)
            drawn.append(f'<text x="{at}" y="{height - 7}" text-anchor="middle">{int(x)}</text>')
    names = []
    for number, (label, points) in enumerate(lines.items()):
        colour = f"var(--c{number})"
        at = [place(x, y) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in at)
        drawn.append(f'<polyline class=curve style="stroke:{colour}" points="{path}"/>')
        radius = 3 if len(points) <= 40 else 1.5
        for (x, y), (across, down) in zip(points, at, strict=True):
            text = f"epoch {x:g}, {label}: {y:.5g}"
            drawn.append(f'<circle cx="{across}" cy="{down}" r="{radius}" style="fill:{colour}">')
            drawn.append(f"<title>{escape(text)}</title></circle>")
        key = f'<i class=key style="background:{colour}"></i>{escape(label)} {_number(points[-1][1])}'
        names.append(f"<span>{key}</span>")
    caption = f"<figcaption><b>{title}</b>{' '.join(names)}</figcaption>"
    described = f'role="img" aria-label="{title} by epoch" viewBox="0 0 {width} {height}"'
    return f"<figure class=card>{caption}<svg {described}>{''.join(drawn)}</svg></figure>"


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.0e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:,.6g}"


# ---- what a run leaves


def _pictures(run: Path) -> str:
    found = [run / "predictions.png"]
    if not found[0].is_file():
        found = sorted((run / "pictures").glob("*.png"))[-1:]
    images = []
    for path in found:
        code = base64.b64encode(path.read_bytes()).decode()
        images.append(
            f'<figure class=card><div class=scroll><img alt="held-out images with predictions" '
            f'src="data:image/png;base64,{code}"></div><figcaption>{escape(path.name)}</figcaption></figure>'
        )
    return "".join(images)


def _precision(summary: dict[str, Any]) -> str:
    rows = []
    for kind in ("box", "mask"):
        for when, prefix in (("best epoch", ""), ("last epoch", "last_")):
            if f"{prefix}{kind}_ap" in summary:
                figures = [summary.get(f"{prefix}{kind}_{name}") for name in AP_COLUMNS]
                rows.append([f"{kind}, {when}", *figures])
    return _html_table(["", *AP_COLUMNS.values()], rows, names=1) if rows else ""


def _classes(run: Path) -> str:
    """The worst classes first, where there are more than can be looked at."""
    rows = _table(run / "classes.csv")
    if not rows:
        return ""
    figure = next(iter(list(rows[0])[2:]))
    ordered = sorted(rows, key=lambda row: float(row[figure]) if row[figure] else math.inf)
    many = len(rows) > LISTED
    shown = ordered[:LISTED] if many else rows
    table = _html_table(list(rows[0]), [list(row.values()) for row in shown], names=1)
    return (f"<p class=dim>The {LISTED} classes with the lowest {figure} of {len(rows):,}.</p>" if many else "") + table


def _confusion(run: Path) -> str:
    """The matrix of true and predicted classes where they are few, and what is most often mistaken for what."""
    rows = _table(run / "confusion.csv")
    if not rows:
        return ""
    counts = {(row["class"], row["predicted"]): int(row["count"]) for row in rows}
    classes = [row["class"] for row in _table(run / "classes.csv")]
    parts = []
    if len(classes) <= LARGEST_MATRIX:
        head = "".join(f'<th class=top title="{escape(c)}"><div>{escape(c)}</div></th>' for c in classes)
        body = []
        for true in classes:
            total = sum(counts.get((true, other), 0) for other in classes)
            cells = []
            for other in classes:
                count = counts.get((true, other), 0)
                share = count / total if total else 0
                full = " class=full" if share > 0.5 else ""
                cells.append(f'<td{full} style="--v:{share:.3f}">{count or ""}</td>')
            body.append(f'<tr><th title="{escape(true)}">{escape(true)}</th>{"".join(cells)}</tr>')
        parts.append("<p class=dim>Rows: the true class; columns: the prediction; numbers of held-out images.</p>")
        table = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        parts.append(f'<div class=scroll><table class="matrix">{table}</table></div>')
    wrong = sorted(((n, pair) for pair, n in counts.items() if pair[0] != pair[1]), key=lambda each: -each[0])
    if wrong:
        kept = [(true, predicted, n) for n, (true, predicted) in wrong[: LISTED if not parts else 10]]
        parts.append(
            "<p class=dim>Most often mistaken:</p>" + _html_table(["class", "for", "images"], kept, "mistaken", names=2)
        )
    return "".join(parts)


def _left_out(run: Path) -> str:
    parts = []
    for name, what in (("bad_samples.csv", "samples"), ("bad_annotations.csv", "annotations")):
        rows = _table(run / name)
        if rows:
            more = f"; the first {LISTED}" if len(rows) > LISTED else ""
            shown = "".join(
                "<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row.values()) + "</tr>"
                for row in rows[:LISTED]
            )
            head = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
            table = f'<table class="words"><thead><tr>{head}</tr></thead><tbody>{shown}</tbody></table>'
            parts.append(f"<p>{len(rows):,} {what} could not be used{more}:</p><div class=scroll>{table}</div>")
    return "".join(parts)


def _epochs(history: Sequence[Row]) -> str:
    if not history:
        return ""
    table = _html_table(list(history[0]), [list(row.values()) for row in history])
    return f"<details class=card><summary>metrics.csv, {len(history):,} epochs</summary>{table}</details>"
