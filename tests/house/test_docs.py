"""The pages of docs/: their code runs as it stands, their tables are what the code says, their links lead somewhere."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
import timm
import torch

from foveal.configs.schema import load_config
from foveal.kernels import DecomposedRelativePositionBias, RelativePositionBias
from foveal.kernels.neighborhood import api, natten
from foveal.kernels.problem import Problem
from foveal.kernels.window import Window

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob(".github/*.md")])


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_tutorial_trains(tmp_path, monkeypatch):
    _, definition, use, training = blocks("docs/new_backbone.md")
    assert len([line for line in definition.splitlines() if line.strip()]) < 90
    file = tmp_path / "peeknet.py"
    file.write_text(definition)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import peeknet  # the file that was just written

    names = vars(peeknet)
    exec(compile(use, "use", "exec"), names)
    _, recipe = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/new_backbone.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "peeknet.yaml").write_text(recipe.replace("epochs: 10", "epochs: 5") + "  # shorter\n")
    exec(compile(training, "train", "exec"), names)
    assert json.loads((tmp_path / "runs/peeknet/summary.json").read_text())["top1"] > 80


def test_the_code_for_newcomers_runs() -> None:
    names: dict = {}
    for block in blocks("docs/porting.md"):
        exec(compile(block, "porting.md", "exec"), names)
    assert names["new"].shape == (2, 14, 14, 4, 32)


@pytest.mark.parametrize(
    "page",
    ["docs/frozen.md", "docs/index.md", "docs/kernels.md", "docs/own_head.md", "docs/recipes.md", "docs/weights.md"],
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_foveal_dinat", num_classes=2)
    timm.models.save_for_hf(model, "dinat-mini", safe_serialization=True)  # as if it had been converted
    names: dict = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    assert names


def test_a_recipe_of_ones_own() -> None:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    file = ROOT / "configs/classify/dinat_tiny.yaml"
    assert recipe.startswith(f"base: {file.name} ")
    values = [line for line in recipe.splitlines()[1:] if line]
    options = []
    for line in values:  # a section on each line, {key: value, ...}
        section, inside = line.split(": ", 1)
        options += [f"{section}.{each.strip().replace(': ', '=')}" for each in inside.strip("{}").split(",")]
    config = load_config(file, options)
    assert (config.model.name, config.model.pretrained, config.schedule.epochs) == ("dinat_tiny", True, 30)


def test_the_generated_tables_are_as_their_sources_say() -> None:
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    for page in tables["TABLES"]:
        assert tables["filled"](page) == (ROOT / "docs" / page).read_text(encoding="utf-8"), "python docs/tables.py"


def called(
    *, kernel_size=7, stride=1, dilation=1, query_stride=1, boundary="shift", offset=0, size=56, **changes
) -> Problem:
    """A call as the backends are told of it."""
    rows, columns = (
        Window(kernel, stride, dilation, boundary, query_stride, offset=offset)
        for kernel in (kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size))
    )
    whole = {"shape": (2, size, size, 2, 32), "value_depth": 32, "dtype": torch.float32, "device": "cuda"} | changes
    return Problem(rows=rows, columns=columns, needs_grad=whole.pop("needs_grad", False), tracing=False, **whole)


def depth(channels: int) -> Problem:
    return called(shape=(2, 56, 56, 2, channels), value_depth=channels)


# what each row of the table in docs/kernels.md is about
ROWS = {
    "NVIDIA GPU from compute capability 8.0 on": [called(), called(needs_grad=True)],
    "older NVIDIA GPU": [called(old_gpu="7.5")],
    "CPU, forward": [called(device="cpu")],
    "CPU, with gradients": [called(device="cpu", needs_grad=True)],
    "another device (mps, xpu)": [called(device="mps"), called(device="xpu")],
    "float16, bfloat16, float32": [called(dtype=t) for t in (torch.float16, torch.bfloat16, torch.float32)],
    "float64": [called(dtype=torch.float64)],
    "`RelativePositionBias`, kernel up to 32": [called(bias=RelativePositionBias, kernel_size=k) for k in (7, 32)],
    "`DecomposedRelativePositionBias`, kernel up to 32": [
        called(bias=DecomposedRelativePositionBias, kernel_size=k) for k in (7, 32)
    ],
    "either bias, larger kernel": [
        called(bias=b, kernel_size=33) for b in (RelativePositionBias, DecomposedRelativePositionBias)
    ],
    "kernel of 1": [called(kernel_size=1)],
    "even or non-square kernel": [called(kernel_size=(4, 7)), called(kernel_size=(2, 2))],
    "stride, dilation (need not divide the map)": [called(stride=3), called(dilation=5)],
    "query stride": [called(query_stride=2)],
    "offset of the blocks": [called(stride=3, offset=2, boundary=kind) for kind in ("zero", "mask")],
    "boundary `zero` or `mask`": [called(boundary="zero"), called(boundary="mask")],
    "head size 20": [depth(20)],
    "head size 24": [depth(24)],
    "head size above 256": [depth(264)],
    "`v` with other channels than `q`": [called(value_depth=40)],
    "attention dropout": [called(dropout_p=0.1)],
    "empty batch": [called(shape=(0, 56, 56, 2, 32))],
}


def test_what_each_backend_takes(monkeypatch) -> None:
    """Every cell of the table is the backend's own answer."""
    monkeypatch.setattr(natten, "installed_version", lambda: "0.21.7")
    monkeypatch.setattr("foveal.kernels.triton_support._installed", True)
    monkeypatch.setattr("foveal.kernels.triton_support._interpreted", False)
    text = (
        (ROOT / "docs/kernels.md").read_text(encoding="utf-8").partition("<!-- backends -->\n")[2].partition("\n\n")[0]
    )
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert set(head[1:]) == set(api.BACKENDS)
    assert [row[0] for row in rows] == list(ROWS)
    for name, *cells in rows:
        for backend, cell in zip(head[1:], cells, strict=True):
            problems = ROWS[name]
            if backend == "native" and {p.device for p in problems} == {"cuda"} and "GPU" not in name:
                problems = [dataclasses.replace(p, device="cpu") for p in problems]
            answers = {api.BACKENDS[backend].unsupported_reason(problem) for problem in problems}
            assert ("yes" if answers == {None} else "no") == cell, (name, backend, answers)
            assert cell == "yes" or None not in answers, (name, backend, answers)  # the same for all that the row names


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


class Links(HTMLParser):
    """What a page asks for and what it offers."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(given["href"])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="the extra 'docs' is not installed")
def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path) -> None:
    mkdocs = Path(sys.executable).with_name("mkdocs")
    run = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    pages = {}
    for file in sorted(tmp_path.rglob("*.html")):
        pages[file] = Links()
        pages[file].feed(file.read_text(encoding="utf-8"))
    assert len(pages) > 15
    assert "torch.Size([1, 14, 14, 2, 32])" in html.unescape(
        re.sub(r"<[^>]+>", "", (tmp_path / "api/kernels.html").read_text(encoding="utf-8"))
    )
    for page, found in pages.items():
        assert [src for src in found.loaded if re.match(r"([a-z]+:)?//", src)] == [], page  # nothing from the network
        if page.name == "404.html":
            continue
        for target in [*found.links, *found.loaded]:
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            file = (page.parent / unquote(path)).resolve() if path else page
            assert file.exists(), (page.name, target)
            if anchor and file in pages:
                assert unquote(anchor) in pages[file].ids, (page.name, target)
