"""Runs that are killed at any moment and gone on with: nothing of the result depends on it, to the last bit."""

import csv
import itertools
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foveal.errors import Interrupted
from foveal.train import checkpoint, classify, train

TIMES = {"images_per_second", "data_wait", "memory_mib", "seconds"}  # of a row, what no run repeats

# everything that draws or remembers: dropout, drop path, shifts, erasing, mixing, averaging, a schedule with warm-up
RANDOM = """\
model:
  name: test_foveal_dinat
  drop_rate: 0.1
  drop_path_rate: 0.2
  kwargs: {depths: [1, 1], num_heads: [1, 2], dilations: [[2], [1]]}
data: {kind: digits, image_size: 16, in_chans: 1, mean: [0.3], std: [0.37], limit: 256, val_limit: 64}
augment: {hflip: 0.0, shift: 0.08, rotate: 10, erase: 0.2, mixup: 0.3, cutmix: 1.0, mix_off_fraction: 0.3}
loss: {smoothing: 0.1}
optim: {lr: 3e-3, clip_grad: 1.0}
schedule: {epochs: 10, warmup_fraction: 0.1, cooldown_fraction: 0.1}
train: {batch_size: 16, grad_accum_steps: 2, ema_decay: 0.95, save_interval: 3, threads: 1}
"""


def timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return timeless(list(csv.DictReader(file)))


def trainer_state(run: Path) -> dict:
    """RUN/last/trainer.pt without its times, and without the keys of its recipe that say where it is."""
    state = torch.load(run / "last" / checkpoint.TRAINER, weights_only=True)
    state["state"]["history"] = timeless(state["state"]["history"])
    state["state"]["best"] = timeless([state["state"]["best"]])
    for name in ("seconds", "epoch_seconds", "wait_seconds"):
        del state["state"][name]
    for name in ("output", "resume"):
        del state["recipe"][name]
    return state


def assert_same(a, b, where: str = "trainer.pt") -> None:
    """Equal to the last bit, whatever they hold."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_run(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole)
    for name in ("last/model.safetensors", "last/raw.safetensors", "best/model.safetensors"):
        if (whole / name).exists():
            assert_same(load_file(run / name), load_file(whole / name), name)
    assert_same(trainer_state(run), trainer_state(whole))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "random.yaml"
    path.write_text(RANDOM)
    return path


@pytest.mark.parametrize(("kills", "epochs"), [(3, 2), pytest.param(20, 8, marks=pytest.mark.slow)])
def test_killed_at_random_points(recipe, tmp_path, kills, epochs):
    """The processes are forked from one that has imported everything, so that a start costs no imports."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["foveal.train.classify"])

    def start(run: Path) -> multiprocessing.Process:
        options = [f"output={run}", f"schedule.epochs={epochs}", "resume=auto"]
        process = server.Process(target=train, args=(recipe, options), daemon=True)  # ends with this one at the latest
        process.start()
        return process

    def written(run: Path) -> int:
        file = run / "last" / checkpoint.TRAINER
        try:
            return file.stat().st_mtime_ns
        except FileNotFoundError:  # between the two renames, too
            return 0

    process = start(tmp_path / "whole")
    process.join()
    assert (tmp_path / "whole/summary.json").exists()
    draw, left = random.Random(kills), kills
    for attempt in itertools.count():
        run = tmp_path / f"parts{attempt}"
        while not (run / "summary.json").exists():
            before, process = written(run), start(run)
            if left:
                # most often a while after the run has got one checkpoint further, so that it comes to an end
                further = draw.random() < 0.8
                while process.is_alive() and (written(run) == before if further else not run.exists()):
                    time.sleep(0.005)
                process.join(draw.uniform(0, 0.3))
                left -= process.is_alive()
                process.kill()
            process.join()
        assert_same_run(run, tmp_path / "whole")
        if not left:
            return


@pytest.mark.parametrize("stops", [(1, 4), (3, 6)])
def test_image_files_are_augmented_alike(folder_recipe, make_images, tmp_path, stops):
    """Stopped within an epoch of files that this process decodes: the loader draws nothing twice."""
    options = [
        f"data.root={make_images(train=60)}",
        "schedule.epochs=2",
        "augment.mixup=0.5",
        "model.drop_path_rate=0.2",
    ]
    train(folder_recipe, [f"output={tmp_path / 'whole'}", *options])
    original, calls = classify.Task.train_step, []

    def step(self, model, batch, epoch):
        calls.append(epoch)
        if len(calls) in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, batch, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify.Task, "train_step", step)
        parts = [f"output={tmp_path / 'parts'}", "resume=auto", *options]
        for _ in stops:
            with pytest.raises(Interrupted) as stopped:
                train(folder_recipe, parts)
            assert stopped.value.code == 0
        train(folder_recipe, parts)
    assert len(calls) == 12
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_kill_between_last_and_best_is_made_good(recipe, tmp_path):
    """The best epoch's weights are written after the checkpoint, from which they can be written again."""
    options = [f"output={tmp_path / 'run'}", "schedule.epochs=1", "schedule.cooldown_fraction=0"]
    train(recipe, options)
    run = tmp_path / "run"
    best = (run / "best/model.safetensors").read_bytes()
    (run / "best/model.safetensors").write_bytes(b"of an epoch before")
    rows = (run / "metrics.csv").read_text()
    (run / "metrics.csv").unlink()
    (run / "summary.json").unlink()
    train(recipe, [*options, "resume=auto"])
    assert (run / "best/model.safetensors").read_bytes() == best
    assert (run / "metrics.csv").read_text() == rows
    assert (run / "summary.json").exists()


def stop_at(number: int, monkeypatch) -> list[int]:
    """Has the run sent SIGTERM in the forward pass of that number, from 1; answers the list that they are added to."""
    original, calls = classify.Task.train_step, []

    def step(self, model, batch, epoch):
        calls.append(epoch)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, batch, epoch)

    monkeypatch.setattr(classify.Task, "train_step", step)
    return calls


def test_a_finished_run_that_goes_on_is_not_finished(quick, tmp_path, monkeypatch):
    options = [f"output={tmp_path / 'run'}", "data.limit=128", "data.val_limit=64"]
    train(quick, [*options, "schedule.epochs=1"])
    assert (tmp_path / "run/summary.json").exists()
    stop_at(1, monkeypatch)
    with pytest.raises(Interrupted, match=f"foveal train classify {quick} output={tmp_path / 'run'} .*resume=auto"):
        train(quick, [*options, "resume=auto"])
    assert not (tmp_path / "run/summary.json").exists()


def test_what_could_not_be_read_is_remembered(folder_recipe, make_images, tmp_path, monkeypatch):
    """One image is bad before the run is stopped, another one after."""
    root, run = make_images(train=60), tmp_path / "run"
    early, late = sorted((root / "train/red").iterdir())[:2]
    early.write_bytes(b"no image")
    options = [f"data.root={root}", f"output={run}", "data.max_bad_fraction=0.1", "resume=auto"]
    train(folder_recipe, [*options, "schedule.epochs=1"])
    early.write_bytes(sorted((root / "train/red").iterdir())[2].read_bytes())
    late.write_bytes(b"no image")
    train(folder_recipe, [*options, "schedule.epochs=2"])
    listed = (run / "bad_samples.csv").read_text()
    assert early.name in listed
    assert late.name in listed


def test_best_of_an_epoch_that_is_not_in_the_checkpoint(quick, tmp_path, capsys):
    """As after falling back to an older checkpoint: its own epoch takes the place, and the run comes to its end."""
    run = tmp_path / "run"
    options = [f"output={run}", "data.limit=128", "data.val_limit=64", "resume=auto"]
    train(quick, [*options, "schedule.epochs=2"])
    path = run / "last" / checkpoint.TRAINER
    saved = torch.load(path, weights_only=True)
    first = saved["state"]["history"][0]
    saved["state"]["best"] = first  # of which best/, written by epoch 2, is not
    torch.save(saved, path)
    checkpoint.seal(path.parent)
    checkpoint.write_epoch(run / "best", 7)
    capsys.readouterr()
    train(quick, [*options, "schedule.epochs=3"])
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(f"warning: {run}/best .*epoch 7.*epoch 1.*epoch 2", said)
    history = metrics(run)
    best = max((2, 3), key=lambda epoch: float(history[epoch - 1]["top1"]))
    assert checkpoint.read_epoch(run / "best") == best
