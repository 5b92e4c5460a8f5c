"""Run folders written by foveal 0.1.0, before recipe keys and parameters of detectors were renamed, stay usable.

`tests/data/runs_0.1.0` holds a run of each task that was stopped by SIGTERM in its fourth epoch of six, the metrics of
the classification run when it was not interrupted, and outputs of the best weights of each.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import foveal
from foveal.cli import app

RUNS = Path(__file__).parents[1] / "data" / "runs_0.1.0"
OUTPUTS = json.loads((RUNS / "outputs.json").read_text())
TASKS = ("classify", "detect", "segment")


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run of a task in the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(RUNS / request.param, tmp_path / request.param)


def image() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96).sin()


def test_a_classifier_has_the_same_outputs() -> None:
    outputs = foveal.load(RUNS / "classify")(torch.linspace(-1, 1, 32 * 32).reshape(1, 1, 32, 32))
    torch.testing.assert_close(outputs[0], torch.tensor(OUTPUTS["classify"]), rtol=1e-5, atol=1e-5)


def test_a_segmenter_has_the_same_outputs() -> None:
    outputs = foveal.load(RUNS / "segment")(image())[0, :, ::16, ::24].flatten()[:40]
    torch.testing.assert_close(outputs, torch.tensor(OUTPUTS["segment"]), rtol=1e-4, atol=1e-4)


def test_a_detector_has_the_same_outputs() -> None:
    (found,) = foveal.load(RUNS / "detect")([image()[0].abs()])
    for key in ("scores", "boxes"):
        torch.testing.assert_close(found[key][:5], torch.tensor(OUTPUTS["detect"][key]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("run", TASKS, indirect=True)
def test_a_run_resumes_by_its_own_recipe(run: Path) -> None:
    result = CliRunner().invoke(app, ["train", run.name, str(run / "config.yaml"), "resume=auto"])
    assert result.exit_code == 0, result.output
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    if run.name == "classify":
        with (RUNS / "classify_metrics.csv").open() as file:
            uninterrupted = list(csv.DictReader(file))
        for key in ("lr", "train_loss", "val_loss"):
            expected, got = ([float(row[key]) for row in table] for table in (uninterrupted, rows))
            assert got == pytest.approx(expected, rel=1e-4), key
