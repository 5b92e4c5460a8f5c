"""Runs from beginning to end: what they leave behind, and that they can be repeated, stopped and gone on with."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from foveal.configs.schema import ConfigError, DenseOptimConfig, ModelConfig, ScheduleConfig, load_config
from foveal.errors import Interrupted
from foveal.train import classify, evaluate, train
from foveal.train.checkpoint import CheckpointError
from foveal.train.data import DataError
from foveal.train.optim import create_optimizer, create_schedule
from foveal.train.trainer import NonFiniteLoss

from .conftest import QUICK, stopped


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[tuple[str, ...]]:
    return [(r["epoch"], r["lr"], r["train_loss"], r["val_loss"], r["top1"]) for r in rows(run)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with averaged weights and mixing."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "quick.yaml"
    recipe.write_text(QUICK)
    more = ["train.ema_decay=0.99", "train.ema_warmup=true", "augment.mixup=0.2", "augment.mix_off_fraction=0.5"]
    train(recipe, [f"output={folder / 'run'}", "seed=1", *more])
    return folder / "run"


def test_what_a_run_leaves(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        *("config.yaml", "metrics.csv", "curves.png", "predictions.png", "tensorboard", "environment.json"),
        *("summary.json", "best", "last", "last.old", "report.html", "classes.csv", "confusion.csv"),
    }
    assert {p.name for p in (finished / "best").iterdir()} == {"config.json", "model.safetensors"}
    last = {p.name for p in (finished / "last").iterdir()}
    assert last == {"config.json", "model.safetensors", "raw.safetensors", "trainer.pt", "checksums.json"}
    assert [r["epoch"] for r in rows(finished)] == ["1", "2"]
    assert json.loads((finished / "environment.json").read_text())["versions"]["torch"]
    state = torch.load(finished / "last" / "trainer.pt", weights_only=True)
    assert state["state"]["epoch"] == 2
    assert load_config(finished / "config.yaml").augment.mixup == 0.2


def test_timm_loads_the_run(finished):
    model = timm.create_model(f"local-dir:{finished / 'best'}", pretrained=True)
    cfg = model.pretrained_cfg
    assert tuple(cfg["input_size"]) == (1, 32, 32)
    assert (cfg["num_classes"], list(cfg["mean"]), cfg["crop_pct"]) == (10, [0.3], 1.0)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    config = json.loads((finished / "best" / "config.json").read_text())
    assert config["label_names"] == [str(i) for i in range(10)]


def test_evaluate_gives_the_recorded_accuracy(finished, tmp_path):
    best = max(rows(finished), key=lambda r: float(r["top1"]))
    for source in (finished, finished / "best"):
        result = evaluate(source, [f"output={tmp_path / 'result.json'}"])
        assert json.loads((tmp_path / "result.json").read_text()) == result
        assert result["n"] == 360
        assert result["top1"] == float(best["top1"])
        assert result["loss"] == pytest.approx(float(best["val_loss"]), rel=1e-6)


def test_evaluate_a_folder_of_timm(finished, tmp_path):
    """A bare model folder is scored when the overrides say on what."""
    shutil.copytree(finished / "best", tmp_path / "model")
    best = max(float(r["top1"]) for r in rows(finished))
    assert evaluate(tmp_path / "model", ["data.kind=digits", "data.in_chans=1"])["top1"] == best


def test_published_weights_are_fetched_with_their_hash(tmp_path, monkeypatch):
    source, asked = timm.create_model("nat_mini"), []
    torch.save(source.state_dict(), tmp_path / "published.pth")

    def fetch(name, addresses):
        asked.append(name)
        return tmp_path / "published.pth"

    monkeypatch.setattr("foveal.backbones.loading.download.fetch", fetch)
    model = classify.build_model(ModelConfig(name="nat_mini", pretrained=True), classes=7, in_chans=3)
    assert asked == ["nat_mini.in1k"]
    assert model.training
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    key = next(name for name, parameter in source.named_parameters() if parameter.ndim == 4)
    assert torch.equal(model.state_dict()[key], source.state_dict()[key])


@pytest.mark.parametrize("source", ["no_such_model", "runs/none"])
def test_evaluate_says_what_is_missing(source):
    with pytest.raises(ValueError, match=source):
        evaluate(source, ["data.kind=digits"])


def test_same_seed_same_metrics(quick, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(quick, [f"output={tmp_path / name}", f"seed={seed}"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_run_is_not_overwritten(quick, tmp_path):
    run = tmp_path / "run"
    train(quick, [f"output={run}", "schedule.epochs=1"])
    before = (run / "last" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=f"{run} .*resume=auto.*output="):
        train(quick, [f"output={run}"])
    assert (run / "last" / "model.safetensors").read_bytes() == before


def test_resumed_equals_uninterrupted(quick, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and at the end of one, the continuation is the same to the last bit."""
    options = ["schedule.epochs=3", "train.ema_decay=0.9", "augment.mixup=0.2", "train.grad_accum_steps=2"]
    train(quick, [f"output={tmp_path / 'whole'}", *options])

    original, stops = classify.Task.train_step, {3, 8, 11}  # batches: 8 an epoch
    calls = []

    def step(self, model, batch, epoch):
        calls.append(epoch)
        if len(calls) in stops:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, batch, epoch)

    monkeypatch.setattr(classify.Task, "train_step", step)
    parts = [f"output={tmp_path / 'parts'}", "resume=auto", *options]
    assert [stopped(quick, parts) for _ in stops] == [130, 130, 130]
    train(quick, parts)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (
        timm.models.load_state_dict(str(tmp_path / n / "last/model.safetensors")) for n in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_resume_of_a_finished_run_changes_nothing(quick, tmp_path):
    run = tmp_path / "run"
    train(quick, [f"output={run}", "schedule.epochs=1"])
    before = losses(run)
    train(quick, [f"output={run}", "schedule.epochs=1", "resume=auto"])
    assert losses(run) == before


def test_ctrl_c_saves_and_exits_130(folder_recipe, make_images, tmp_path):
    """A real signal to a real run and its workers, as a terminal sends it."""
    run = tmp_path / "run"
    options = [f"output={run}", f"data.root={make_images()}", "data.workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "foveal", "train", "classify", str(folder_recipe), *options, "schedule.epochs=1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not (run / "metrics.csv").exists():
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate()
    finally:  # also when this test runs out of time
        process.kill()
    assert process.returncode == 130, output
    assert "resume=auto" in output
    assert "Traceback" not in output
    epochs = [int(r["epoch"]) for r in rows(run)]
    assert epochs == list(range(1, len(epochs) + 1))
    train(folder_recipe, [*options, f"schedule.epochs={len(epochs) + 2}", "resume=auto"])
    assert [int(r["epoch"]) for r in rows(run)] == list(range(1, len(epochs) + 3))


def test_sigterm_saves_exits_0_and_says_how_to_go_on(quick, tmp_path, monkeypatch):
    def step(self, model, batch, epoch):
        os.kill(os.getpid(), signal.SIGTERM)
        return model(batch.images).square().mean()

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(classify.Task, "train_step", step)
        with pytest.raises(Interrupted) as stop:
            train(quick, [f"output={run}", "schedule.epochs=1"])
    said = stop.value.message
    assert stop.value.code == 0
    assert (run / "last/trainer.pt").exists()
    assert not (run / "summary.json").exists()  # by which a script tells that the run is not finished
    command = shlex.split(said[said.index("foveal train") :])
    assert command[:4] == ["foveal", "train", "classify", str(quick)]
    train(command[3], command[4:])
    assert (run / "summary.json").exists()


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(quick, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original, calls = classify.Task.train_step, []

    def step(self, model, batch, epoch):
        calls.append(epoch)
        loss = original(self, model, batch, epoch)
        return loss * float("nan") if len(calls) == 11 else loss  # the third batch of the second epoch

    monkeypatch.setattr(classify.Task, "train_step", step)
    with pytest.raises(NonFiniteLoss, match=rf"nan.* epoch 2, step 3 .* 8.*{run}/last.* epoch 1"):
        train(quick, [f"output={run}"])
    state = torch.load(run / "last" / "trainer.pt", weights_only=True)
    assert state["state"]["epoch"] == 1
    tensors = timm.models.load_state_dict(str(run / "last" / "model.safetensors"))
    assert all(t.isfinite().all() for t in tensors.values())
    assert len(rows(run)) == 1


def test_fine_tuning_from_a_run_with_other_classes(finished, folder_recipe, make_images, tmp_path, capsys):
    root = make_images()
    options = [f"data.root={root}", f"output={tmp_path / 'tuned'}", f"model.checkpoint={finished}", "data.in_chans=1"]
    train(folder_recipe, [*options, "model.kwargs.dilations=[[2],[1]]"])
    assert "so new: head.weight, head.bias" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.name=dinat_minni", r"model\.name.*'dinat_minni'.*dinat_mini"),
        ("model.kwargs.colour=red", "test_foveal_dinat.*colour.*red"),
        ("model.num_classes=5", r"model\.num_classes.* 5.* 10"),
        ("optim.name=adamww", r"optim\.name=adamww"),
        ("train.batch_size=4096", "512.* 4096"),
        ("train.grad_accum_steps=100", r" 8.*train\.grad_accum_steps=100"),
        ("data.val_fraction=1.5", r"`data\.val_fraction` is 1\.5"),
        ("data.in_chans=2", "1 .*3 "),
        ("data.mean=[0.1,0.2]", r"data\.mean.* 2.*data\.in_chans.* 1"),
        ("data.classes=[a,b]", r"0\.\.1"),
        ("optim.lrr=1", r"`optim\.lrr`.*`optim\.lr`"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(quick, tmp_path, override, named):
    with pytest.raises((ConfigError, DataError), match=named):
        train(quick, [f"output={tmp_path / 'run'}", override])
    assert not (tmp_path / "run" / "last").exists()


def test_odd_batches_cannot_be_mixed(quick, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.batch_size=33"):
        train(quick, [f"output={tmp_path / 'run'}", "augment.mixup=0.5", "train.batch_size=33"])


@pytest.mark.slow
def test_two_processes_count_every_sample_once(quick, tmp_path):
    """Through accelerate and gloo, on the CPU: 359 held-out samples, whatever divides them."""
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = [f"output={run}", "schedule.epochs=1", "data.val_limit=359", "train.val_batch_size=50"]
    done = subprocess.run(
        [*launch, "-m", "foveal", "train", "classify", str(quick), *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    evaluate(run, [f"output={tmp_path / 'one.json'}"])
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["n"] == 359
    assert one["top1"] == float(rows(run)[0]["top1"])
    assert one["loss"] == pytest.approx(float(rows(run)[0]["val_loss"]), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["train.amp=bf16"],
        ["train.amp=fp16"],
        ["schedule.name=step", "optim.name=sgd", "optim.lr=0.01"],
        ["schedule.name=poly", "schedule.cooldown_fraction=1"],
        ["loss.name=bce", "loss.smoothing=0.1", "augment.cutmix=1"],
        ["model.grad_checkpointing=true", "optim.layer_decay=0.8", "optim.betas=[0.9,0.95]", "optim.eps=1e-7"],
        ["optim.clip_grad=1.0", "optim.name=muon", "train.eval_interval=2", "schedule.epochs=3"],
    ],
    ids=lambda options: options[0],
)
def test_options_train(quick, tmp_path, options):
    run = tmp_path / "run"
    train(quick, [f"output={run}", "schedule.epochs=1", "data.limit=64", "train.batch_size=32", *options])
    found = rows(run)
    assert all(float(r["train_loss"]) > 0 for r in found)
    assert found[-1]["top1"] != ""
    assert len(found) == {"schedule.name=poly": 2, "optim.clip_grad=1.0": 3}.get(options[0], 1)


def test_published_learning_rates():
    """Warm-up, peak, end and cooldown of the ImageNet recipe; half the global batch halves them all."""
    config = load_config("classify/dinat_tiny")
    optimizer = create_optimizer(torch.nn.Linear(2, 2), config.optim, global_batch=512)
    updates = 10  # an epoch
    schedule, epochs = create_schedule(optimizer, config.schedule, updates)
    assert epochs == 310

    def rate(epoch: float) -> float:
        schedule.step_update(round(epoch * updates))
        return 2 * optimizer.param_groups[0]["lr"]

    assert rate(0) == pytest.approx(1e-6)
    assert rate(10) == pytest.approx((1e-6 + 1e-3) / 2)
    assert rate(20) == pytest.approx(1e-3, rel=0.02)
    assert rate(150) == pytest.approx((1e-3 + 5e-6) / 2, rel=1e-3)
    assert rate(300) == rate(309) == pytest.approx(5e-6)


def test_rates_by_part_of_the_model_and_milestones():
    """Two groups of one model, and a step at each milestone; the ratio between the groups stays."""

    class Model(torch.nn.Linear):
        def parameter_groups(self, weight_decay, layer_decay, backbone_lr_ratio):
            assert (weight_decay, layer_decay) == (0.1, 0.7)
            body = {"params": [self.weight], "weight_decay": weight_decay, "lr_scale": backbone_lr_ratio}
            return [body, {"params": [self.bias], "weight_decay": 0.0}]

    optim = DenseOptimConfig(lr=1e-2, lr_batch=16, weight_decay=0.1, layer_decay=0.7, backbone_lr_ratio=0.1)
    optimizer = create_optimizer(Model(2, 2), optim, global_batch=8)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    schedule = ScheduleConfig(name="multistep", epochs=12, milestones=[11 / 12, 8 / 12])  # in any order
    scheduler, epochs = create_schedule(optimizer, schedule, 5)
    assert epochs == 12
    for update, factor in ((0, 1), (39, 1), (40, 0.1), (54, 0.1), (55, 0.01)):
        if update:
            scheduler.step_update(update)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([5e-4 * factor, 5e-3 * factor]), update
    for name, milestones in (("multistep", []), ("cosine", [0.5]), ("multistep", [8])):
        with pytest.raises(ConfigError, match="milestones"):
            create_schedule(optimizer, ScheduleConfig(name=name, milestones=milestones), 5)


def test_epochs_of_so_many_updates(quick, tmp_path):
    """Epochs that are no pass over the data: the passes follow each other, and a stop in one changes nothing."""
    options = ["train.steps_per_epoch=5", "schedule.epochs=4"]  # 20 updates, of 8 for a pass
    train(quick, [f"output={tmp_path / 'whole'}", *options])
    assert len(rows(tmp_path / "whole")) == 4
    run, original, calls = tmp_path / "parts", classify.Task.train_step, []

    def step(self, model, batch, epoch):
        calls.append(batch.targets.tolist())
        if len(calls) == 12:  # in the second pass and the third epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, batch, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify.Task, "train_step", step)
        assert stopped(quick, [f"output={run}", *options]) == 0
        assert not (run / "summary.json").exists()
        train(quick, [f"output={run}", *options, "resume=auto"])
    assert len(calls) == 20
    assert calls[:8] != calls[8:16]
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path):
    """The tutorial's: known by --import, remembered by the run, and not taken from inside a run folder."""
    page = (Path(__file__).parents[2] / "docs/new_backbone.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    (tmp_path / "gazenet.py").write_text(code)
    (tmp_path / "gazenet.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    words = ["gazenet.yaml", "schedule.epochs=1", "data.limit=128"]

    def call(*command: str) -> subprocess.CompletedProcess:
        program = [str(Path(sys.executable).with_name("foveal")), *command]
        return subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)

    unknown = call("train", "classify", *words)
    assert unknown.returncode == 2
    assert "--import" in unknown.stderr
    trained = call("train", "classify", *words, "--import", "gazenet")
    assert trained.returncode == 0, trained.stderr
    assert call("evaluate", "runs/gazenet").returncode == 0
    (tmp_path / "runs/gazenet/gazenet.py").write_text((tmp_path / "gazenet.py").read_text())
    (tmp_path / "gazenet.py").unlink()
    assert call("evaluate", "runs/gazenet").returncode == 2
    moved = subprocess.run(
        [sys.executable, "-m", "foveal", "evaluate", "."],
        cwd=tmp_path / "runs/gazenet",
        capture_output=True,
        text=True,
    )
    assert moved.returncode == 2
    assert "imports" in moved.stderr


def test_all_that_is_wrong_is_said_at_once(quick, tmp_path):
    """Before a model is built or a teacher is fetched."""
    wrong = ["optim.name=adamv", "train.batch_size=63", "data.limit=20", "augment.mixup=0.8", "distill.teacher=nobody"]
    with pytest.raises(ConfigError) as error:
        train(quick, [f"output={tmp_path / 'run'}", *wrong])
    lines = str(error.value).splitlines()
    for number, words in enumerate(("adamv", "batch_size=63.*mixup", "nobody.*distill.teacher=null", "20 .*63")):
        assert re.search(words, lines[number]), lines


@pytest.mark.parametrize("name", ["test_foveal_dinat", "test_foveal_overlock"])
def test_frozen_stages(name):
    """Weights and statistics stay, whatever mode the whole model is put into."""
    config = ModelConfig(name=name, frozen_stages=2, drop_path_rate=0.5)
    model = classify.build_model(config, 3, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert not changed & frozen
    places = {key.rpartition(".")[0] for key in frozen}
    assert not {key for key in changed if key.rpartition(".")[0] in places}
    with pytest.raises(ConfigError, match=r"model\.frozen_stages.*9"):
        classify.build_model(ModelConfig(name=name, frozen_stages=9), 3, 3)


def test_the_header_names_rate_weights_and_cooldown(quick, tmp_path, capsys):
    options = ["optim.lr_batch=256", "schedule.cooldown_fraction=0.5", "data.limit=128", "data.val_limit=64"]
    train(quick, [f"output={tmp_path / 'a'}", *options])
    said = " ".join(capsys.readouterr().out.split())
    assert "weights: random" in said
    assert "learning rate 0.00075 (optim.lr=0.003 x 64 / optim.lr_batch=256); 2 epochs + 1 of cooldown" in said
    train(quick, [f"output={tmp_path / 'b'}", "schedule.epochs=1", f"model.checkpoint={tmp_path / 'a'}"])
    assert f"weights: {tmp_path / 'a'}" in " ".join(capsys.readouterr().out.split())


def test_resume_refuses_other_preprocessing_and_leaves_a_finished_run_alone(tmp_path, capsys):
    run = tmp_path / "run"
    options = [f"output={run}", "schedule.epochs=1", "train.threads=1", "data.limit=128", "data.val_limit=64"]
    train("classify/digits", options)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=r"data\.image_size .*32.*64"):
        train("classify/digits", [*options, "resume=auto", "data.image_size=64"])
    train("classify/digits", [*options, "resume=auto"])
    assert "is finished" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
