"""A run's best/ by itself, years later: without the run, its recipe, its data and the recipes of the package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import foveal

LATER = """
import sys
sys.modules["foveal.configs"] = None  # to import it is an error
import torch, foveal
from foveal.weights.export import export

model = foveal.load("best")
image = torch.load("image.pt", weights_only=True)
with torch.no_grad():
    output = model([image[0]])[0]["boxes"] if TASK == "detect" else model(image)
torch.save(output, "output.pt")
export("best", "safetensors", "exported")
if TASK == "classify":  # for the others this takes a minute
    export("best", "onnx", "onnx")
"""


def train(task: str, folder: Path) -> Path:
    from ..train import conftest, test_segment

    recipe = folder / "recipe.yaml"
    if task == "classify":
        recipe.write_text(conftest.QUICK.replace("epochs: 2", "epochs: 1"))
    elif task == "detect":
        data = conftest.write_rectangles(folder / "data", {"train": 4, "val": 2})
        recipe.write_text(conftest.DETECT.replace("data:\n", f"data:\n  root: {data}\n"))
    else:
        recipe = test_segment.write_recipe(folder, test_segment.write_blocks(folder / "blocks", {"train": 4, "val": 2}))
    foveal.train.train(recipe, [f"output={folder / 'run'}", "schedule.epochs=1"], task)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_best_is_enough(task: str, tmp_path: Path) -> None:
    (tmp_path / "then").mkdir()
    run = train(task, tmp_path / "then")
    model = foveal.load(run)
    channels = 1 if task == "classify" else 3
    image = torch.rand(1, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model([image[0]])[0]["boxes"] if task == "detect" else model(image)

    later = tmp_path / "later"
    later.mkdir()
    shutil.copytree(run / "best", later / "best")
    shutil.rmtree(tmp_path / "then")
    torch.save(image, later / "image.pt")
    script = LATER.replace("TASK", repr(task))
    done = subprocess.run([sys.executable, "-c", script], cwd=later, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(later / "output.pt", weights_only=True), expected)
    assert (later / "onnx" / "model.onnx").is_file() == (task == "classify")
    exported = foveal.load(later / "exported")
    with torch.no_grad():
        again = exported([image[0]])[0]["boxes"] if task == "detect" else exported(image)
    assert torch.equal(again, expected)
    # the names of the classes came along
    config = json.loads((later / "exported" / "config.json").read_text())
    assert len(config.get("classes") or config["label_names"]) > 1
