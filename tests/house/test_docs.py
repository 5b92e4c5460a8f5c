"""The pages of docs/: their code runs as it stands, and their links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_tutorial_trains(tmp_path, monkeypatch):
    definition, use, training = blocks("docs/new_backbone.md")
    assert len([line for line in definition.splitlines() if line.strip()]) < 90
    file = tmp_path / "peeknet.py"
    file.write_text(definition)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import peeknet  # the file that was just written

    names = vars(peeknet)
    exec(compile(use, "use", "exec"), names)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/new_backbone.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "peeknet.yaml").write_text(recipe.replace("epochs: 10", "epochs: 5") + "  # shorter\n")
    exec(compile(training, "train", "exec"), names)
    assert json.loads((tmp_path / "runs/peeknet/summary.json").read_text())["top1"] > 80


def test_the_code_for_newcomers_runs() -> None:
    names: dict = {}
    for block in blocks("docs/porting.md"):
        exec(compile(block, "porting.md", "exec"), names)
    assert names["new"].shape == (2, 14, 14, 4, 32)


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
