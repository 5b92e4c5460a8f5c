"""The report of a run, looked at by a browser."""

import csv
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from foveal.cli import app
from foveal.train import plots, train
from foveal.train.report import write
from foveal.train.scoring import write_confusion

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NASTY = '<script>document.title="broken"</script>'
# Run by the page itself when everything is there: what the test wants to know goes into an attribute.
LOOK = """<script>
addEventListener("error", e => { window.failed = String(e.message); });
addEventListener("load", () => {
  const images = [...document.images].map(i => i.naturalWidth);
  const root = document.documentElement;
  const back = getComputedStyle(document.body).backgroundColor;
  const fetched = performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:"));
  const found = {images, inner: innerWidth, over: root.scrollWidth - root.clientWidth, title: document.title, back,
    fetched, sections: [...document.querySelectorAll("h2")].map(h => h.textContent), failed: window.failed || null};
  parent.postMessage(found, "*");
});
</script>"""
# A frame has the width of a phone, which a browser's window cannot have.
FRAME = """<!doctype html><body><script>
addEventListener("message", e => { document.body.dataset.found = JSON.stringify(e.data); });
</script><iframe src="page.html" style="width:%dpx;height:800px;border:0"></iframe>"""


def table(path: Path, rows: list[list]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def some_run(folder: Path, task: str, classes: int = 4) -> Path:
    """What a run of a task leaves, with class names that are HTML."""
    folder.mkdir(parents=True)
    names = [NASTY, "$a$ & b", *(f"class {i} " + "long" * (i % 7) for i in range(2, classes))]
    figures = {
        "classify": {"top1": 71.25, "top5": 93.0, "val_loss": 1.5},
        "detect": {f"box_{name}": 31.5 for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium")},
        "segment": {"miou": 41.5, "mean_accuracy": 50.0, "pixel_accuracy": 77.0},
    }[task]
    (folder / "config.yaml").write_text(f"task: {task}\noutput: '{NASTY}'\n")
    table(
        folder / "metrics.csv",
        [
            ["epoch", "lr", "train_loss", *figures, "grad_norm", "images_per_second", "data_wait", "seconds"],
            *(
                [e, 1e-3 / e, 2 / e, *(v * e / 9 for v in figures.values()), 0.5, 1e3, 0.1, 10 * e]
                for e in range(1, 10)
            ),
        ],
    )
    summary = {"model": "dinat_tiny", "best_epoch": 9, "parameters": 27_900_000, **figures}
    if task == "detect":
        summary |= {"box_ap_large": None} | {f"last_{name}": value for name, value in figures.items()}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "2"}, "command": ["x" * 300, NASTY]}))
    table(
        folder / "bad_samples.csv",
        [["sample", "reason"], *([f"/{'deep/' * 40}{i}{NASTY}", "OSError"] for i in range(60))],
    )
    Image.fromarray(np.full((300, 1200, 3), 90, np.uint8)).save(folder / "predictions.png")
    if task == "classify":
        draw = np.random.default_rng(0)
        pairs = {tuple(map(int, pair)): int(draw.integers(1, 9)) for pair in draw.integers(0, classes, (300, 2))}
        write_confusion(folder, names, pairs)
    if task == "segment":
        table(
            folder / "classes.csv",
            [["class", "pixels", "iou"], *([name, 5, "" if i else 4] for i, name in enumerate(names))],
        )
    return folder


def look(report: Path, folder: Path, width: int, *settings: str) -> tuple[dict, list[str]]:
    """What the page says of itself at a width, and what the browser's console says."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    folder.mkdir()
    page = report.read_text(encoding="utf-8")
    (folder / "page.html").write_text(page.replace("</head>", LOOK + "</head>"), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME % width)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # which is small in a container
        "--enable-logging=stderr",
        f"--user-data-dir={folder}/user",
    ]
    address = (folder / "frame.html").as_uri()
    command = [browser, *options, *settings, "--virtual-time-budget=5000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    attribute = re.search(r'data-found="([^"]*)"', done.stdout)
    assert attribute, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(attribute[1].replace("&quot;", '"').replace("&amp;", "&")), console


@pytest.mark.parametrize(
    ("task", "has"),
    [
        ("classify", {"Curves", "Predictions", "Classes", "Confusion", "Left out", "Settings", "Machine", "Epochs"}),
        ("detect", {"Curves", "Predictions", "Average precision", "Left out", "Settings"}),
        ("segment", {"Curves", "Predictions", "Classes", "Left out", "Settings"}),
    ],
)
def test_in_a_browser(task, has, tmp_path):
    report = write(some_run(tmp_path / "run", task, classes=12))
    found, console = look(report, tmp_path / "phone", 390)
    assert console == []
    assert found["failed"] is None
    assert (found["inner"], found["over"]) == (390, 0)  # nothing to scroll to the side
    assert found["images"] == [1200]
    assert found["fetched"] == []
    assert found["title"] == "dinat_tiny"  # the names of classes were not run
    assert has <= set(found["sections"])


def test_light_and_dark(tmp_path):
    report = write(some_run(tmp_path / "run", "classify"))
    light, _ = look(report, tmp_path / "light", 1200, "--blink-settings=preferredColorScheme=1")
    dark, _ = look(report, tmp_path / "dark", 1200, "--blink-settings=preferredColorScheme=0")
    assert light["back"] == "rgb(255, 255, 255)"
    assert dark["back"] == "rgb(20, 23, 27)"


class Tags(HTMLParser):
    """The elements, and that those which are opened are closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("classes", [4, 120])
@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_one_file_without_scripts(task, classes, tmp_path):
    text = write(some_run(tmp_path / "run", task, classes)).read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.open == []
    assert "script" not in tags.seen
    assert all(address.startswith("data:") for address in tags.addresses)
    assert "url(" not in text
    assert re.search(r"60 samples .*\b50\b", text)
    if task == "detect":
        assert ">31.5<" in text
    elif classes == 120:
        assert "of 120" in text
    if task == "classify":
        assert ('class="matrix"' in text) == (classes == 4)


def test_an_unfinished_run(tmp_path):
    run = some_run(tmp_path / "run", "classify")
    for name in ("summary.json", "predictions.png", "classes.csv", "confusion.csv", "bad_samples.csv"):
        (run / name).unlink()
    text = write(run).read_text(encoding="utf-8")
    assert "not finished: 9 epochs" in text
    (run / "metrics.csv").unlink()
    assert "not finished: 0 epochs" in write(run).read_text(encoding="utf-8")


def test_names_are_no_figures(tmp_path):
    run = some_run(tmp_path / "run", "classify")
    write_confusion(run, ["007", "1990", "nan", "2e3"], {(0, 1): 1234, (1, 0): 2, (2, 3): 1, (3, 2): 1})
    rows = write(run).read_text(encoding="utf-8").split("<tr>")
    assert "<td>007</td><td>1990</td><td>1,234</td></tr>\n" in rows
    assert "<td>nan</td><td>2e3</td><td>1</td></tr>\n" in rows
    assert "<td>1990</td><td>2</td><td>0</td><td>0</td></tr>\n" in rows
    assert any(row.startswith("<td>007</td><td>1,234</td>") for row in rows)


def test_file_names_that_are_not_utf8(tmp_path):
    run = some_run(tmp_path / "run", "classify")
    (run / "bad_samples.csv").write_bytes(b"sample,reason\ncaf\xe9.png,OSError\n")
    (run / "environment.json").write_text(json.dumps({"command": ["train", os.fsdecode(b"\xe9")]}))
    text = write(run).read_text(encoding="utf-8")
    assert "<td>caf\ufffd.png</td>" in text
    assert "<td>train ?</td>" in text


def test_of_a_real_run(quick, tmp_path):
    """Written at the end of a run; the matrix says what the score says."""
    run = tmp_path / "run"
    train(quick, [f"output={run}", "schedule.epochs=1", "data.limit=128"])
    with (run / "confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((run / "summary.json").read_text())
    right = sum(int(row["count"]) for row in rows if row["class"] == row["predicted"])
    assert sum(int(row["count"]) for row in rows) == summary["n"] == 360
    assert 100 * right / 360 == pytest.approx(summary["top1"])
    text = (run / "report.html").read_text(encoding="utf-8")
    for part in ("Loss", "Accuracy", "data:image/png", 'class="matrix"', "test_foveal_dinat", "dilations"):
        assert part in text
    (run / "report.html").unlink()
    result = CliRunner().invoke(app, ["report", str(run)])
    assert (result.exit_code, result.stdout.strip()) == (0, str(run / "report.html"))
    assert (run / "report.html").read_text(encoding="utf-8") == text
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2


@pytest.mark.parametrize(
    "losses",
    [[0.0], [3.0, 3.0], [1e-30, 5e20], [0, 1], [2.1, 2.3], [-5, 1e6], [1e-7, 3e-7], [99.1, 99.2]],
)
def test_charts_of_any_values(tmp_path, losses):
    """Every point is inside the frame, and there are round ticks beside it."""
    (tmp_path / "config.yaml").write_text("task: classify\n")
    table(tmp_path / "metrics.csv", [["epoch", "train_loss"], *enumerate(losses, 1)])
    text = write(tmp_path).read_text(encoding="utf-8")
    (chart,) = re.findall("<svg.*?</svg>", text, re.DOTALL)
    points = re.findall(r'<circle cx="(.*?)" cy="(.*?)"', chart)
    assert len(points) == len(losses)
    assert all(46 <= float(x) <= 330 and 10 <= float(y) <= 166 for x, y in points)
    ticks = [float(y) for y in re.findall(r"<line .*? y1=\"(.*?)\"", chart)]
    assert 2 <= len(ticks) <= 6
    assert all(10 <= y <= 166 for y in ticks)


def test_figures_take_any_name(tmp_path):
    """A name is no formula."""
    image = np.zeros((8, 8, 3), np.uint8)
    truth = np.zeros((8, 8), np.uint8)
    plots.segmentations([(image, truth, truth)], [r"$\frac{$"], tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").stat().st_size > 1000
