"""The examples of the README run as they stand, one after the other, and its figures are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import foveal
from foveal.backbones import list_models
from foveal.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they write there
    assert len(EXAMPLES) == 6
    names: dict = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert names["out"].shape == names["v"].shape
    assert names["pixels"].shape == (1, 150, 200, 312)
    assert set(names["found"]) == {"boxes", "labels", "scores", "masks"}
    assert (tmp_path / "exported" / "model.pt2").stat().st_size > 0
    assert names["done"].difference < 1e-5
    # the comment behind the shapes is what a reader believes
    (comment,) = re.findall(r"shapes = .*# (\[.*\])", README)
    assert str(names["shapes"]) == comment


def test_the_commands_exist() -> None:
    lines = [line for line in README.splitlines() if line.startswith("foveal ")]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        path = words[:2] if words[0] == "train" else words[:1]
        result = CliRunner().invoke(app, [*path, "--help"])
        assert result.exit_code == 0, line
        for option in (w for w in words if w.startswith("--")):
            assert option in result.stdout, line


def test_the_table_of_models_is_the_one_that_is_printed() -> None:
    result = CliRunner().invoke(app, ["list", "--markdown"])
    assert result.exit_code == 0
    rows = re.findall(r"^\| `(\w+)` \|", result.stdout, re.MULTILINE)
    assert set(rows) == {name for name in list_models() if not name.startswith("test_")}
    assert result.stdout in (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), "run foveal list --markdown"


def test_what_is_cited_is_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {foveal.__version__}\n" in citation
    assert f"version = {{{foveal.__version__}}}" in README


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 250
