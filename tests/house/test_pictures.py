"""Plots of the benchmark tables and the pictures of the README: every row drawn, nothing covered, nothing stale."""

from __future__ import annotations

import os
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from foveal import pictures, zoo
from foveal.backbones import family
from foveal.benchmarks import plots
from foveal.benchmarks.measure import read_csv
from foveal.cli import app
from foveal.kernels import neighborhood_attention
from foveal.kernels.window import Window
from foveal.visualize import KEY, MARK

ROOT = Path(__file__).parents[2]

# ------------------------------------------------------------------------------------------------------ plots


def known() -> dict[str, dict]:
    """The facts of the models as the README's table has them, which takes no time; of timm's, made up."""
    lines = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("| name |"))
    head = [cell.strip() for cell in lines[at].strip("|").split("|")]
    facts = {}
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        row = dict(zip(head, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        name = row["name"].strip("`")
        facts[name] = {
            "family": family(name),
            "ours": True,
            "same": "",
            "top1": float(row["top-1, published"]) if row["top-1, published"] else None,
            "larger": row["pre-trained on"],
            "input": [3, int(row["input"]), int(row["input"])],
            "parameters": 1e6 * float(row["parameters"].split()[0]),
            "macs": 1e9 * float(row["GMACs"]),
        }
    for name, (title, top1) in zoo.PEERS.items():
        facts[name] = {**facts["dinat_tiny"], "family": title, "ours": False, "top1": top1}
    for name, twin in zoo.SAME.items():
        facts[name] = {**facts[twin], "family": "timm's", "ours": False, "same": twin}
    return facts


def drawn(axis) -> list[float]:
    """Where the markers of an axis are."""
    return sorted(float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() != "None")


def covered(figure) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    texts = [*figure.texts, figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for line, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            ticks = [tick for tick in line.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
            texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
    # an annotation's own extent counts its leader line
    boxes = {text: Text.get_window_extent(text) for text in texts if text.get_text()}
    frame = figure.bbox
    outside = [(t.get_text(), "edge") for t, b in boxes.items() if b.x0 < frame.x0 - 1 or b.x1 > frame.x1 + 1]
    pairs = [(a.get_text(), b.get_text()) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    return outside + pairs


@pytest.mark.parametrize("shipped", [p for part in plots.TABLES for p in plots.RESULTS.glob(f"{part}-*.csv")])
def test_every_row_of_a_table_is_drawn(shipped, tmp_path):
    path = tmp_path / shipped.name
    shutil.copy(shipped, path)
    (picture,) = plots.pictures(tmp_path)
    rows, part = read_csv(path), shipped.name.partition("-")[0]
    if part == "zoo":
        want = [[float(row[key]) for row in rows for key in ("forward_ms", "deployed_ms") if row[key]]]
    else:
        panels = plots.TABLES[part].panels
        shown = [[row for row in rows if row[p.column] and row.items() >= p.where.items()] for p in panels]
        want = [[float(row[p.column]) for row in of] for p, of in zip(panels, shown, strict=True)]
    assert (picture.name, picture.table) == (path.stem, path)
    assert [drawn(axis) for axis in picture.figure.axes] == [sorted(values) for values in want]
    assert covered(picture.figure) == []


def test_the_accuracy_of_every_model_is_drawn():
    path = plots.RESULTS / "zoo-cpu-2core.csv"
    facts, rows = known(), read_csv(path)
    figures = {each.name: each.figure for each in plots._accuracy(path, rows, facts.__getitem__)}
    published = [row for row in rows if facts[row["model"]]["top1"] is not None]
    own = [facts[row["model"]] for row in published if not facts[row["model"]]["same"]]
    want = {
        "accuracy": [float(row["forward_ms"]) for row in published],
        "parameters": [each["parameters"] / 1e6 for each in own],
        "macs": [each["macs"] / 1e9 for each in own],
    }
    assert len(published) > 50
    assert list(figures) == [f"zoo-cpu-2core-{what}" for what in want]
    for (what, values), figure in zip(want.items(), figures.values(), strict=True):
        (axis,) = figure.axes
        np.testing.assert_allclose(drawn(axis), sorted(values), err_msg=what)
        labelled = {text.get_text() for text in axis.texts}
        best = max(published, key=lambda row: facts[row["model"]]["top1"])["model"]
        assert plots.short(best) in labelled
        assert len(axis.texts) < len(values)
        assert covered(figure) == []


def test_names_are_short():
    names = ("dinat_large_384_11x11", "nat_mini", "overlock_xt", "dinat_s_small", "vitrpb_isotropic_base", "care_s2")
    assert [plots.short(name) for name in names] == ["L 384 11x11", "M", "XT", "S", "vit B", "S2"]
    peers = ("swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224", "halo2bot50ts_256", "halonet26t")
    assert [plots.short(name) for name in peers] == ["T", "T", "2bot50ts", "26t"]


def test_no_room_for_a_label():
    models = [plots.Point("NAT", label, 1.0, 80.0, False, True, ("NAT",)) for label in ("S", "wide" * 60)]
    with pytest.raises(ValueError, match="wide" * 60):
        plots.scatter("title", "", "ms", models)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "new" / "picture.png"
    plots.save(Figure(), path, "source")
    before = path.read_bytes()
    with Image.open(path) as picture:
        assert picture.text["Description"] == "source"

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        plots.save(Figure(facecolor="red"), path, "other")
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["picture.png"]


def test_the_command(tmp_path):
    shutil.copy(plots.RESULTS / "data-cpu-2core.csv", tmp_path)
    invoked = CliRunner().invoke(app, ["bench", "plots", str(tmp_path), "--output", str(tmp_path / "out")])
    assert invoked.exit_code == 0, invoked.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data-cpu-2core.png"]
    for folder in (tmp_path / "out", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=folder.name):
            plots.main([str(folder)])


# ------------------------------------------------------------------------------------- pictures of the README


@pytest.mark.parametrize("name", ("windows", *pictures.TABLES))
def test_the_pictures_are_those_of_the_tables(name):
    path = ROOT / "docs" / "pictures" / f"{name}.png"
    assert path.stat().st_size <= 150_000
    with Image.open(path) as picture:
        assert picture.width >= 1200
        said = picture.text["Description"]
        colours = np.asarray(picture.convert("RGB"), dtype=int)
    for wanted in (KEY, MARK) if name == "windows" else plots.COLOURS[:3]:
        rgb = [int(wanted[at : at + 2], 16) for at in (1, 3, 5)]
        assert (abs(colours - rgb).max(-1) < 20).sum() > 50, f"{wanted} is lost"
    table = plots.RESULTS / f"{name.removesuffix('-accuracy')}.csv"
    assert said == (plots.fingerprint(table) if name != "windows" else "foveal.pictures"), "run `make pictures`"


def test_what_two_layers_reach_is_what_their_attention_reads():
    side, query = 16, (3, 9)
    x = torch.rand(1, side, side, 1, 1, requires_grad=True)
    flat = torch.zeros_like(x)
    near = neighborhood_attention(flat, flat, x, kernel_size=3, backend="reference")
    far = neighborhood_attention(flat, flat, near, kernel_size=3, dilation=4, backend="reference")
    (gradient,) = torch.autograd.grad(far[0, query[0], query[1]].sum(), x)
    want = gradient[0, :, :, 0, 0].nonzero().tolist()
    rows, columns = (pictures.reach(side, at, [Window(3, dilation=4), Window(3)]) for at in query)
    assert [[row, column] for row in rows for column in columns] == want
    assert 9 < len(want) <= 81
