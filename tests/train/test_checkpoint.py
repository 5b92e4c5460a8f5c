"""Checkpoints that are cut, foreign, or meet a full disk: nothing is half loaded, nothing good is lost."""

import argparse
import csv
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import timm
import torch
import yaml

import foveal
from foveal.backbones import nat
from foveal.configs.schema import SCHEMAS, ConfigError, _keys, load_config
from foveal.train import checkpoint, classify, evaluate, train, trainer
from foveal.train.checkpoint import CheckpointError, load_initial, newest, write_folder
from foveal.train.resume import is_fixed
from foveal.weights.convert import convert
from foveal.weights.export import export

from .conftest import QUICK


def tiny(**kwargs) -> torch.nn.Module:
    sizes = {"depths": (1, 1), "num_heads": (1, 2), "dilations": ((1,), (1,))}
    return timm.create_model("test_foveal_dinat", in_chans=1, **{"num_classes": 10, **sizes, **kwargs})


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def fill_with(text: str):
    return lambda folder: (folder / "file").write_text(text)


# Writing


def test_folder_is_replaced(tmp_path):
    folder = tmp_path / "last"
    write_folder(folder, fill_with("one"))
    write_folder(folder, fill_with("two"))
    assert (folder / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_kill_between_the_renames_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "last"
    write_folder(folder, fill_with("one"))
    rename = Path.rename

    def killed(self, target):
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt  # nothing after this point runs, as with a kill
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, fill_with("two"))
    monkeypatch.undo()
    assert not folder.exists()
    assert (newest(folder) / "file").read_text() == "one"
    write_folder(folder, fill_with("three"))
    assert (newest(folder) / "file").read_text() == "three"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_no_space_keeps_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "last"
    write_folder(folder, fill_with("one"))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(CheckpointError, match=r"\[Errno 28\].*/last"):
        write_folder(folder, fill_with("two"))
    assert (folder / "file").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


@pytest.fixture
def small_files():
    """The system refuses files beyond 100 kB, as it refuses any on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_safetensors_that_do_not_fit(tmp_path, small_files):
    with pytest.raises(CheckpointError, match=str(tmp_path / "best")):
        write_folder(tmp_path / "best", lambda folder: checkpoint.save_model(folder, tiny(embed_dim=64), {}, []))
    assert list(tmp_path.iterdir()) == []


def test_trainer_state_that_does_not_fit(tmp_path, small_files):
    state = {"format": 1, "tensor": torch.zeros(100_000)}
    with pytest.raises(CheckpointError, match=str(tmp_path / "last")):
        write_folder(tmp_path / "last", lambda folder: checkpoint.save_trainer(folder, state))
    assert list(tmp_path.iterdir()) == []


def test_run_on_a_full_disk_says_so(quick, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(quick, [f"output={run}", "schedule.epochs=1"])
    before = (run / "last" / "trainer.pt").read_bytes()

    def full(folder, state):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_trainer", full)
    with pytest.raises(CheckpointError, match=rf"{run}/last.*{os.strerror(errno.ENOSPC)}.*{run}/last"):
        train(quick, [f"output={run}", "schedule.epochs=2", "resume=auto"])
    assert (run / "last" / "trainer.pt").read_bytes() == before
    monkeypatch.undo()
    train(quick, [f"output={run}", "schedule.epochs=2", "resume=auto"])


def test_metrics_that_a_full_disk_does_not_take(quick, tmp_path, monkeypatch, capsys):
    """The checkpoint before them is whole, and the run goes on from it once there is room."""
    run = tmp_path / "run"
    writer = csv.DictWriter.writerows

    def full(self, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(csv.DictWriter, "writerows", full)
    options = [f"output={run}", "schedule.epochs=2", "data.limit=128", "data.val_limit=64", "resume=auto"]
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))):
        train(quick, options)
    checkpoint.verify(run / "last")
    monkeypatch.setattr(csv.DictWriter, "writerows", writer)
    train(quick, options)
    assert "epoch 2, update 1" in " ".join(capsys.readouterr().out.split())
    assert len((run / "metrics.csv").read_text().splitlines()) == 3


ON_A_SMALL_DISK = """
import os, sys
from pathlib import Path
from foveal.train import checkpoint, train

recipe, disk = map(Path, sys.argv[1:])
options = [f"output={disk / 'run'}", "data.limit=128", "data.val_limit=64", "resume=auto", "log.trackers=[]"]
train(recipe, [*options, "schedule.epochs=1"])
best, last = (sum(f.stat().st_size for f in (disk / "run" / name).iterdir()) for name in ("best", "last"))
left, room = best + 40_000, os.statvfs(disk)  # best/ is written anew by a run that goes on, beside a few small files
assert left < last
(disk / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize - left))
try:
    train(recipe, [*options, "schedule.epochs=3"])
except checkpoint.CheckpointError as error:
    print(error)
checkpoint.verify(disk / "run/last")
assert not list((disk / "run").glob("*.tmp/*"))
(disk / "filler").unlink()
train(recipe, [*options, "schedule.epochs=3"])
assert len((disk / "run/metrics.csv").read_text().splitlines()) == 4
"""


@pytest.mark.slow
def test_a_run_on_a_disk_that_becomes_full(quick, tmp_path):
    """A file system of 8 MB in memory, which only this run sees."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    small = f"mount -t tmpfs -o size=8m none {disk}"
    if shutil.which("unshare") is None or subprocess.run([*mount, small], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a file system of their own (unshare, mount)")
    command = f'{small}; exec "$0" -c "$1" "$2" "$3"'
    done = subprocess.run(
        [*mount, command, sys.executable, ON_A_SMALL_DISK, str(quick), str(disk)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{disk}/run/last.*{os.strerror(errno.ENOSPC)}.*{disk}/run/last", said)
    assert said.count("epoch 2, update 1") == 2


# Reading


def flipped(content: bytes) -> bytes:
    """One bit in the middle, which neither the zip nor the safetensors format notices in a tensor's bytes."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :]


FOREIGN = {"stem.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("w.pth", b"", None),
        ("w.pth", b"this is no checkpoint", None),
        ("w.pth", bytes(range(256)), None),
        ("w.pth", {"epoch": 3}, None),
        ("w.pth", [1, 2], None),
        ("w.pth", {"state_dict": FOREIGN}, r"stem\.weight"),
        ("w.safetensors", b"", None),
        ("w.safetensors", b"this is no checkpoint", None),
        ("w.safetensors", safetensors.torch.save(FOREIGN), r"stem\.weight"),
    ],
)
def test_foreign_files(tmp_path, name, content, named):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    model = tiny()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_initial(model, path)
    assert str(path) in str(caught.value)
    assert same(before, model.state_dict())


def test_code_in_a_pickle_is_not_run(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"a": Fraction(1, 2)}, path)  # any class beyond tensors, plain values, arguments and paths
    with pytest.raises(CheckpointError, match=r"evil\.pth.*fractions"):
        load_initial(tiny(), path)


def test_a_bit_that_a_pickle_lost(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"a": torch.arange(1000.0)}}, path)
    content = path.read_bytes()
    at = content.find(torch.tensor(500.0).numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"w\.pth.*checksum"):
        load_initial(tiny(), path)


def test_arguments_beside_the_tensors(tmp_path):
    path = tmp_path / "published.pth.tar"
    torch.save({"state_dict": tiny().state_dict(), "args": argparse.Namespace(lr=1e-3)}, path)
    assert load_initial(tiny(), path) == []


def test_truncated_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        load_initial(tiny(), path)


def test_weights_of_another_size(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(tiny(embed_dim=32).state_dict(), path)
    model = tiny()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"\(32, .*\(16, "):
        load_initial(model, path)
    assert same(before, model.state_dict())


def test_weights_with_the_same_head_and_with_another(tmp_path):
    source = tiny()
    for suffix, save in ((".pth", torch.save), (".safetensors", safetensors.torch.save_file)):
        path = tmp_path / f"w{suffix}"
        save({"model": source.state_dict()} if suffix == ".pth" else source.state_dict(), path)
        model = tiny()
        assert load_initial(model, path) == []
        assert same(source.state_dict(), model.state_dict())
        other = tiny(num_classes=3)
        head = other.head.weight.clone()
        assert load_initial(other, path) == ["head.weight", "head.bias"]
        assert torch.equal(other.head.weight, head)
        assert torch.equal(other.norm.weight, source.norm.weight)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        load_initial(tiny(), tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*model\.safetensors"):
        load_initial(tiny(), tmp_path)


# Resuming


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_epoch")
    (folder / "quick.yaml").write_text(QUICK)
    train(folder / "quick.yaml", [f"output={folder / 'run'}", "schedule.epochs=1"])
    return folder / "run"


@pytest.fixture
def stopped(one_epoch, tmp_path) -> Path:
    return Path(shutil.copytree(one_epoch, tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "damage", "named"),
    [
        ("trainer.pt", lambda b: b[: len(b) // 2], r"last/trainer\.pt .*SHA-256"),
        ("trainer.pt", lambda b: b"x", r"last/trainer\.pt .*SHA-256"),
        ("trainer.pt", flipped, r"last/trainer\.pt .*SHA-256"),
        ("trainer.pt", None, r"last/trainer\.pt .*missing"),
        ("model.safetensors", lambda b: b[:1000], r"last/model\.safetensors .*SHA-256"),
        ("model.safetensors", flipped, r"last/model\.safetensors .*SHA-256"),
        ("model.safetensors", None, r"last/model\.safetensors .*missing"),
        ("checksums.json", lambda b: b[:-10], r"last/checksums\.json "),
        ("checksums.json", lambda b: b"[]", r"last/checksums\.json "),
        ("checksums.json", None, r"last/checksums\.json "),
    ],
)
def test_resume_of_a_damaged_checkpoint(stopped, quick, name, damage, named):
    """With none before it nothing is begun anew and nothing changed."""
    file = stopped / "last" / name
    file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=named):
        train(quick, [f"output={stopped}", "resume=auto"])
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(quick, tmp_path, capsys):
    run = tmp_path / "run"
    whole, options = tmp_path / "whole", ["train.save_total_limit=3"]
    train(quick, [f"output={whole}", *options, "schedule.epochs=4"])
    shutil.copytree(whole, run)
    assert [path.name for path in checkpoint.generations(run / "last")] == ["last", "last.old", "last.old2"]
    for folder, name in (("last", "trainer.pt"), ("last.old", "model.safetensors")):
        file = run / folder / name
        file.write_bytes(flipped(file.read_bytes()))
    (run / "summary.json").unlink()
    train(quick, [f"output={run}", *options, "schedule.epochs=4", "resume=auto"])
    said = " ".join(capsys.readouterr().out.split())
    for name in ("last/trainer.pt", "last.old/model.safetensors"):
        aside = run / f"{name.split('/')[0]}.damaged"
        assert re.search(rf"warning: {run}/{name} .*{run}/last\.old2,.*{aside}", said)
    assert "epoch 3, update 1" in said
    for name in ("last", "last.old", "last.old2"):
        checkpoint.verify(run / name)
    assert (run / "last/model.safetensors").read_bytes() == (whole / "last/model.safetensors").read_bytes()


def test_a_damaged_checkpoint_that_cannot_be_put_aside(stopped, quick, monkeypatch):
    shutil.copytree(stopped / "last", stopped / "last.old")
    file = stopped / "last/trainer.pt"
    file.write_bytes(flipped(file.read_bytes()))

    def refused(self, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(CheckpointError, match=r"last/trainer\.pt.*\[Errno 13\]"):
        train(quick, [f"output={stopped}", "resume=auto"])


def test_as_many_are_kept_as_asked_for(tmp_path):
    folder = tmp_path / "last"
    for number in range(5):
        write_folder(folder, fill_with(str(number)), keep=3)
    kept = checkpoint.generations(folder)
    assert [(path / "file").read_text() for path in kept] == ["4", "3", "2"]
    shutil.rmtree(folder)  # as a kill between the renames leaves it
    write_folder(folder, fill_with("5"), keep=3)
    assert [(path / "file").read_text() for path in checkpoint.generations(folder)] == ["5", "3", "2"]
    write_folder(folder, fill_with("6"))
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.fixture
def no_rights():
    """Not the superuser, who may write anywhere."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_read_only_folder(tmp_path, no_rights):
    folder = Path(tempfile.mkdtemp())
    write_folder(folder / "last", fill_with("one"))
    folder.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"\[Errno 13\].*/last"):
        write_folder(folder / "last", fill_with("two"))
    assert (folder / "last" / "file").read_text() == "one"
    folder.chmod(0o700)
    shutil.rmtree(folder)


def test_run_in_a_read_only_folder_says_so(quick, tmp_path, monkeypatch):
    def refused(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(PermissionError, match=str(tmp_path / "run")):
        train(quick, [f"output={tmp_path / 'run'}"])


def test_a_run_whose_folder_becomes_read_only(capsys, monkeypatch, no_rights):
    """In the second epoch; it goes on when it may write again."""
    place = Path(tempfile.mkdtemp())
    recipe, run = place / "quick.yaml", place / "run"
    recipe.write_text(QUICK)
    original = classify.Task.train_step

    def step(self, model, batch, epoch):
        if epoch == 1:
            run.chmod(0o500)
        return original(self, model, batch, epoch)

    options = [f"output={run}", "data.limit=128", "data.val_limit=64", "resume=auto", "schedule.epochs=2"]
    with monkeypatch.context() as patch:
        patch.setattr(classify.Task, "train_step", step)
        with pytest.raises(CheckpointError, match=rf"\[Errno 13\].*{run}/last"):
            train(recipe, options)
    checkpoint.verify(run / "last")
    run.chmod(0o700)
    train(recipe, options)
    assert "epoch 2, update 1" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.name=test_foveal_nat", r"model\.name .*'test_foveal_dinat'.*'test_foveal_nat'"),
        ("model.frozen_stages=2", r"model\.frozen_stages .*-1.*2"),
        ("model.num_classes=12", r"model\.num_classes .*None.*12"),
        ("optim.layer_decay=0.5", r"optim\.layer_decay .*None.*0\.5"),
        ("optim.weight_decay=0", r"optim\.weight_decay .*0\.05.*0\.0"),
        ("optim.name=sgd", r"optim\.name .*'adamw'.*'sgd'"),
        ("train.ema_decay=0.9", "averaging .*False.*True"),
        ("seed=1", "seed .*0.*1"),
        ("train.batch_size=32", "epoch .*8.*16"),
    ],
)
def test_resume_of_another_run(stopped, quick, override, named):
    with pytest.raises(CheckpointError, match=f"{stopped}/last.*{named}"):
        train(quick, [f"output={stopped}", "resume=auto", override])


def test_a_resumed_run_says_what_changed(stopped, quick, capsys):
    """The keys with both values, the rate that it goes on at; the former recipe stays."""
    former = (stopped / "config.yaml").read_text()
    train(quick, [f"output={stopped}", "resume=auto", "schedule.epochs=3", "optim.lr=0.012", "augment.mixup=0.5"])
    said = " ".join(capsys.readouterr().out.split())
    for each in ("schedule.epochs 1 -> 3", "optim.lr 0.003 -> 0.012", "augment.mixup 0.0 -> 0.5", "config.1.yaml"):
        assert each in said
    assert "resume never" not in said
    assert re.search(r"learning rate .*\d, .*\d", said)
    assert (stopped / "config.1.yaml").read_text() == former
    with pytest.raises(ConfigError, match=r"epoch 1\b.*3 epochs"):
        train(quick, [f"output={stopped}", "resume=auto", "schedule.epochs=1"])
    assert load_config(stopped / "config.yaml").schedule.epochs == 3


def test_a_resumed_run_without_changes_says_none(stopped, quick, capsys):
    file = stopped / "config.yaml"
    file.write_text(file.read_text().replace("epochs: 1", "epochs: 2"))  # as if it had been stopped
    train(quick, [f"output={stopped}", "resume=auto"])
    assert "->" not in capsys.readouterr().out
    assert not (stopped / "config.1.yaml").exists()


def test_options_of_the_optimizer_are_those_of_the_resumed_recipe(stopped, quick, monkeypatch):
    """PyTorch's `load_state_dict` takes them from the checkpoint."""
    seen, fit = [], trainer.Trainer.fit
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self: seen.append(self.optimizer.param_groups) or fit(self))
    more = ["optim.weight_decay=0.2", "optim.betas=[0.8,0.9]", "optim.eps=1e-6", "schedule.epochs=2"]
    train(quick, [f"output={stopped}", "resume=auto", *more])
    assert {group["weight_decay"] for group in seen[0]} == {0.0, 0.2}
    assert {(group["betas"], group["eps"]) for group in seen[0]} == {((0.8, 0.9), 1e-6)}


def resume_table() -> dict[str, list[str]]:
    """The rows of train/README.md: their first words, and the keys or patterns in the second column."""
    readme = (Path(__file__).parents[2] / "train/README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| ((?:may change|refused|the same update)[^|]*) \| (.*) \|$", readme, re.MULTILINE)
    return {name.partition(":")[0]: re.findall(r"`([\w.*]+)`", text) for name, text in found}


@pytest.mark.parametrize("task", SCHEMAS)
def test_every_recipe_key_is_in_the_table_of_what_a_resumed_run_may_change(task):
    table = resume_table()
    sections = {key.rpartition(".")[0] for key in _keys(SCHEMAS[task])}

    def row(name: str, key: str) -> bool:
        patterns = table.get(name, []) + table.get(f"{name}, {task}", [])
        return any(fnmatchcase(key, pattern) for pattern in patterns)

    for key in set(_keys(SCHEMAS[task])) - sections:
        refused = row("refused", key) and not row("may change", key)
        assert refused == is_fixed(task, key), key
        assert refused or row("may change", key) or row("the same update", key), key


@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_the_identity_of_earlier_checkpoints_is_of_keys_that_are_refused(task):
    run = Path(__file__).parents[1] / "data/runs_0.1.0" / task
    identity = torch.load(run / "last" / checkpoint.TRAINER, weights_only=True)["identity"]
    keys = {"model": "model.name", "model arguments": "model.kwargs", "preprocessing": "data.image_size"}
    keys |= {"augmentation": "augment.hflip", "evaluation": "eval.mode", "distillation": "distill.alpha"}
    keys |= {"classes": "data.classes", "categories": "data.classes", "loss": "loss.auxiliary"}
    averaging = "averaging"  # train.ema_decay, of which 0 is refused
    assert all(is_fixed(task, keys.get(key, key)) for key in identity if key != averaging)


def test_a_run_that_was_killed_before_its_first_checkpoint_blocks_nothing(quick, tmp_path, capsys):
    """What a SIGKILL leaves: the next start says so, and keeps a recipe that differs."""
    run, options = tmp_path / "run", ["schedule.epochs=1", "data.limit=64", "data.val_limit=32"]
    train(quick, [f"output={tmp_path / 'other'}", *options])
    run.mkdir()
    for name in ("config.yaml", "environment.json"):
        (run / name).write_bytes((tmp_path / "other" / name).read_bytes())
    former = (run / "config.yaml").read_text()
    started = json.loads((run / "environment.json").read_text())
    alive = started["process"] | {"pid": os.getppid(), "started": psutil.Process(os.getppid()).create_time()}
    (run / "environment.json").write_text(json.dumps(started | {"process": alive}))
    with pytest.raises(ConfigError, match=f"{os.getppid()} .*{run}"):
        train(quick, [f"output={run}", *options, "optim.lr=0.001"])
    assert (run / "config.yaml").read_text() == former
    (run / "environment.json").write_text(json.dumps(started | {"process": alive | {"started": 1.0}}))  # another one
    capsys.readouterr()
    train(quick, [f"output={run}", *options, "optim.lr=0.001"])
    assert (run / "config.1.yaml").read_text() == former
    assert "optim.lr 0.003 -> 0.001" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_fails_before_its_first_checkpoint_blocks_nothing(quick, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(classify.Task, "train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(quick, [f"output={tmp_path / 'run'}", "schedule.epochs=1", "data.limit=64"])
    train(quick, [f"output={tmp_path / 'run'}", "schedule.epochs=1", "data.limit=64"])


def test_resume_finds_the_old_folder(stopped, quick):
    (stopped / "last").rename(stopped / "last.old")
    train(quick, [f"output={stopped}", "resume=auto"])
    assert len((stopped / "metrics.csv").read_text().splitlines()) == 3


def test_a_run_with_other_groups_of_parameters(stopped, quick, monkeypatch):
    """Of an earlier version in which other parameters were exempt from weight decay."""
    monkeypatch.setattr(nat.NAT, "tables", ())
    with pytest.raises(CheckpointError, match=rf"\[.*model\.checkpoint={stopped}/last"):
        train(quick, [f"output={stopped}", "resume=auto"])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_prefixes_of_wrappers_at_every_entry_point(stopped, quick, tmp_path, prefix):
    """A run whose files were written by hand from a compiled or wrapped model. For the weights that a detector or a
    segmenter starts from, see tests/backbones/test_loading.py."""
    digits = ["data.kind=digits", "data.image_size=32", "data.in_chans=1", "data.mean=[0.3]", "data.std=[0.37]"]
    want, state = evaluate(stopped), safetensors.torch.load_file(stopped / "best/model.safetensors")
    for folder in (stopped / "best", stopped / "last"):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        tensors = {prefix + name: value for name, value in tensors.items()}
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    checkpoint.seal(stopped / "last")
    shutil.copytree(stopped / "best", tmp_path / "model")
    for source, options in ((stopped, []), (stopped / "best", []), (tmp_path / "model", digits)):
        assert evaluate(source, options)["top1"] == want["top1"]
    assert same(foveal.load(stopped).state_dict(), state)
    assert same(foveal.load(stopped / "best/model.safetensors").state_dict(), state)
    convert(
        stopped / "best/model.safetensors",
        tmp_path / "converted",
        model="test_foveal_dinat",
        arguments=yaml.safe_load(QUICK)["model"]["kwargs"] | {"in_chans": 1},
    )
    assert same(safetensors.torch.load_file(tmp_path / "converted/model.safetensors"), state)
    assert export(stopped, "pt2", tmp_path / "exported").folder.is_dir()
    for name, options in (("initial", [f"model.checkpoint={stopped}"]), ("run", ["resume=auto"])):
        train(quick, [f"output={tmp_path / name}", f"schedule.epochs={1 + (name == 'run')}", *options])
    history = (stopped / "metrics.csv").read_text().splitlines()
    assert len(history) == 3
