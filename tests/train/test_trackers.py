"""Figures reach the trackers of accelerate, every epoch once, also over a resume."""

import csv
import os
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from foveal.configs.schema import ConfigError
from foveal.train import trackers
from foveal.train.classify import train

FIGURES = {"train_loss", "top1", "lr", "images_per_second", "data_wait", "memory_mib", "grad_norm"}


class Fake(GeneralTracker):
    """Remembers."""

    name = "fake"
    requires_logging_directory = False
    events: list[tuple] = []  # noqa: RUF012

    def __init__(self, run_name: str, **_):
        super().__init__()
        self.events.append(("made", run_name))

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.events.append(("config", values))

    def log(self, values: dict, step: int | None = None, **_) -> None:
        self.events.append(("log", step, values))

    def finish(self) -> None:
        self.events.append(("finish",))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "fake", Fake)
    monkeypatch.setattr(Fake, "events", [])
    return Fake


def test_of_ones_own(quick: Path, tmp_path: Path, fake):
    run = tmp_path / "run"
    given = [f"output={run}", "log.trackers=[fake]", "data.limit=128"]
    assert train(quick, given) == 0
    kinds = [event[0] for event in fake.events]
    assert kinds == ["made", "config", "log", "log", "finish"]
    assert fake.events[1][1]["optim.lr"] == 3e-3
    steps, rows = zip(*[event[1:] for event in fake.events if event[0] == "log"], strict=True)
    assert steps == (1, 2)
    with (run / "metrics.csv").open() as file:
        for row, stored in zip(rows, csv.DictReader(file), strict=True):
            assert set(row) >= FIGURES
            assert row["top1"] == pytest.approx(float(stored["top1"]))
    assert not (run / "tensorboard").exists()  # it was not asked for
    assert (run / "trackers.json").read_text() == '{"fake": null}\n'


def test_ends_with_a_run_that_fails(quick: Path, tmp_path: Path, fake):
    assert train(quick, [f"output={tmp_path / 'run'}", "log.trackers=[fake]", "optim.lr=1e30", "data.limit=128"]) == 1
    assert fake.events[-1] == ("finish",)


@pytest.mark.parametrize(
    ("names", "says"),
    [(["wndb"], "there is no 'wndb'; known are .*wandb"), (["comet_ml"], "comet_ml is not installed")],
)
def test_mistakes(names, says):
    with pytest.raises(ConfigError, match=says):
        trackers.choose(names)


def test_mlflow(quick: Path, tmp_path: Path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    given = [f"output={run}", "log.trackers=[tensorboard,mlflow]", "data.limit=128", "resume=auto"]
    assert train(quick, [*given, "schedule.epochs=1"]) == 0
    assert train(quick, [*given, "schedule.epochs=3"]) == 0
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'foveal'")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.data.params["model.name"] == "test_foveal_dinat"
    assert set(kept.data.metrics) >= FIGURES
    assert [each.step for each in client.get_metric_history(kept.info.run_id, "top1")] == [1, 2, 3]
    assert os.listdir(run / "tensorboard")
