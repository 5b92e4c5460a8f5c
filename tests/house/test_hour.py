"""The first hour: the commands of README and docs as they are written, in a new folder, without a network."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
# what a command needs that is not there: the rest of README's commands is run
NEEDS = {
    "/path/to/": "a data set",
    "FOLDER": "your own data (docs/own_data.md, whose test runs it)",
    "dinat_mini": "published weights",
    "dinat-mini": "published weights",
}
# first, so that README's `--model runs/detect/digits` is there; its own recipe takes eight minutes
SHORT = ["schedule.epochs=1", "data.digits_train=64", "data.digits_val=16"]

Call = Callable[..., str]


def commands(page: str) -> list[str]:
    """The lines of a page's blocks that call foveal."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [line for line in lines if line.startswith("foveal ")]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    def run(*words: str) -> str:
        program = str(Path(sys.executable).with_name("foveal"))
        done = subprocess.run([program, *words], cwd=tmp_path, env=os.environ | OFFLINE, capture_output=True, text=True)
        assert done.returncode == 0, f"foveal {shlex.join(words)}: {done.stderr}"
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_readme(tmp_path: Path, call: Call) -> None:
    """Train, evaluate, predict, export, visualize, all on the data that come with the package."""
    Image.fromarray(load_sample_images().images[0]).save(tmp_path / "photo.jpg")
    call("train", "detect", "digits", *SHORT)
    ran = []
    for line in commands("README.md"):
        if not any(needed in line for needed in NEEDS):
            call(*shlex.split(line, comments=True)[1:])
            ran.append(line.split()[1])
    assert set(ran) >= {"train", "evaluate", "predict", "export", "visualize"}
    assert json.loads((tmp_path / "runs/digits/summary.json").read_text())["top1"] > 97
    for made in ("predictions/photo.png", "runs/digits-onnx/model.onnx", "look.png"):
        assert (tmp_path / made).stat().st_size > 0
    assert "finished" in call("train", "classify", "digits", "resume=auto")
    # the file is run by what its card shows
    card = (tmp_path / "runs/digits-onnx/README.md").read_text(encoding="utf-8")
    (tmp_path / "runs/digits-onnx/photo.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes())
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "runs/digits-onnx", capture_output=True, text=True
    )
    assert re.search(r"^\S.* \d+\.\d%$", found.stdout, re.MULTILINE), found.stderr


@pytest.mark.slow
def test_the_commands_of_the_tutorial(tmp_path: Path, call: Call) -> None:
    """A model of one's own is trained, scored and exported."""
    page = (ROOT / "docs/new_backbone.md").read_text(encoding="utf-8")
    (tmp_path / "gazenet.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    (tmp_path / "gazenet.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    lines = [line for line in commands("docs/new_backbone.md") if "gazenet" in line]
    assert len(lines) == 3
    for line in lines:
        call(*shlex.split(line)[1:])
    assert (tmp_path / "gazenet-onnx/model.onnx").stat().st_size > 0


@pytest.mark.slow
def test_models_are_chosen_and_exported_without_a_network(tmp_path: Path, call: Call) -> None:
    assert "dinat_mini" in call("list", "--sort", "top1", "--max-params", "30M", "--any-size")
    assert "81.8" in call("info", "dinat_mini")
    call("export", "test_foveal_dinat", "--no-pretrained", "--to", "pt2", "--output", "exported")
    assert (tmp_path / "exported/model.pt2").is_file()
