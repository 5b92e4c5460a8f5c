"""Figures reach the trackers of accelerate, every epoch once, also over a resume."""

import csv
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from foveal.configs.schema import ConfigError
from foveal.train import distributed, logging, train
from foveal.train.trainer import NonFiniteLoss

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
    train(quick, given)
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
    assert (run / "trackers.json").read_text() == '{"logged": 2, "fake": null}\n'


def test_an_epoch_is_logged_once_whenever_a_kill_comes(quick: Path, tmp_path: Path, fake):
    """After the checkpoint and before it was logged; and after a later epoch, of which the checkpoint is lost."""
    run = tmp_path / "run"
    given = [f"output={run}", "log.trackers=[fake,tensorboard]", "data.limit=128", "data.val_limit=64", "resume=auto"]
    train(quick, [*given, "schedule.epochs=1"])
    (run / "trackers.json").write_text('{"logged": 0, "fake": null}')
    shutil.rmtree(run / "tensorboard")
    fake.events.clear()
    train(quick, [*given, "schedule.epochs=2"])
    assert [event[1] for event in fake.events if event[0] == "log"] == [1, 2]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("top1")] == [1, 2]
    (run / "trackers.json").write_text('{"logged": 3, "fake": null}')
    fake.events.clear()
    train(quick, [*given, "schedule.epochs=4"])
    assert [event[1] for event in fake.events if event[0] == "log"] == [4]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("top1")] == [1, 2, 3, 4]


def test_a_tracker_that_fails_is_told_to_all(quick: Path, tmp_path: Path, fake, monkeypatch):
    """Processes that meet to hear of errors hear of this one, instead of waiting for the first."""
    told, original = [], distributed.raise_together

    def together(accelerator, error):
        told.append(error)
        original(accelerator, error)

    def gone(*_, **__):
        raise ValueError("gone")

    monkeypatch.setattr(distributed, "raise_together", together)
    given = [f"output={tmp_path / 'run'}", "log.trackers=[fake]", "data.limit=128", "data.val_limit=64"]
    for name in ("log", "store_init_configuration"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="gone"):
            patch.setattr(fake, name, gone)
            train(quick, [*given, f"output={tmp_path / name}"])
        assert str(told[-1]) == "gone"


def test_ends_with_a_run_that_fails(quick: Path, tmp_path: Path, fake):
    with pytest.raises(NonFiniteLoss, match=r"epoch 1.*optim.lr"):
        train(quick, [f"output={tmp_path / 'run'}", "log.trackers=[fake]", "optim.lr=1e30", "data.limit=128"])
    assert fake.events[-1] == ("finish",)


@pytest.mark.parametrize(
    ("names", "named"),
    [(["wndb"], r"log\.trackers.*'wndb'.*wandb"), (["comet_ml"], r"log\.trackers.*comet_ml")],
)
def test_mistakes(names, named):
    with pytest.raises(ConfigError, match=named):
        logging.accelerate_trackers(names)


def test_mlflow(quick: Path, tmp_path: Path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    given = [f"output={run}", "log.trackers=[tensorboard,mlflow]", "data.limit=128", "resume=auto"]
    train(quick, [*given, "schedule.epochs=1"])
    train(quick, [*given, "schedule.epochs=3"])
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'foveal'")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.data.params["model.name"] == "test_foveal_dinat"
    assert set(kept.data.metrics) >= FIGURES
    assert [each.step for each in client.get_metric_history(kept.info.run_id, "top1")] == [1, 2, 3]
    assert os.listdir(run / "tensorboard")


def wandb_records(file: Path) -> Iterator[bytes]:
    """What an offline run has written: seven bytes, then LevelDB's log, records cut to blocks of 32 KiB."""
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, part = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # all of a record, its end
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb(quick: Path, tmp_path: Path, monkeypatch):
    """Offline: every epoch once, of one run, also over a resume."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "400")  # seconds for its own process to start, on a busy machine
    run = tmp_path / "run"
    given = [f"output={run}", "log.trackers=[wandb]", "data.limit=128", "data.val_limit=64", "resume=auto"]
    train(quick, [*given, "schedule.epochs=1"])
    train(quick, [*given, "schedule.epochs=3"])
    number = json.loads((run / "trackers.json").read_text())["wandb"]
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{number}.wandb"] * 2
    rows, settings = [], {}
    for file in files:
        for data in wandb_records(file):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            items = record.history.item if kind == "history" else record.config.update if kind == "config" else ()
            found = {each.key or each.nested_key[0]: json.loads(each.value_json) for each in items}
            if kind == "history":
                rows.append(found)
            settings |= found if kind == "config" else {}
    assert [row["_step"] for row in rows] == [1, 2, 3]
    assert all(set(row) >= FIGURES for row in rows)
    with (run / "metrics.csv").open() as file:
        assert [row["top1"] for row in rows] == [pytest.approx(float(row["top1"])) for row in csv.DictReader(file)]
    assert settings["model.name"] == "test_foveal_dinat"
