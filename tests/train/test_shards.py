"""Shards: what `foveal shards` writes, and that reading them misses nothing, doubles nothing, and goes on anywhere."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from typer.testing import CliRunner

from foveal.cli import app
from foveal.configs.schema import load_config
from foveal.train.data import DataError, build_classification_data, find_classes
from foveal.train.data import shards as making
from foveal.train.data.guard import Excluded
from foveal.train.data.shards import Options, make_shards
from foveal.train.data.wds import StreamedImages, load_index, scan_shard

pytest.importorskip("webdataset", reason="webdataset, of the extra foveal[train], is not installed")
CPU = torch.device("cpu")
MODEL = {"input_size": (3, 24, 24), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """36 and 11 JPEGs of 24 x 24, each of one grey level that only it has; three classes."""
    level = 1
    for split, count in (("train", 12), ("val", 4)):
        for name in ("ash", "beech", "oak <b>"):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count - (split == "val" and name == "ash")):
                Image.fromarray(np.full((24, 24, 3), 5 * level, np.uint8)).save(place / f"{i}.a.JPEG", quality=100)
                level += 1
    return tmp_path / "images"


def build(root: Path, *overrides: str, rank: int = 0, world: int = 1):
    given = ["output=o", "model.name=m", "train.batch_size=4", "data.workers=0", "augment.color_jitter=0"]
    given += ["data.kind=wds", f"data.root={root}", "augment.scale=[0.9,1]", *overrides]
    config = load_config(None, given)
    return build_classification_data(config, find_classes(config.data), MODEL, device=CPU, rank=rank, world=world)


def levels(batches) -> list[int]:
    """Which images: their grey levels."""
    return [round(float(image.mean() * 51)) for batch in batches for image in batch.images]


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("*.tar"))}


# Making


def test_shards_hold_the_files_and_timm_reads_them(folder, tmp_path):
    out = tmp_path / "shards"
    done = make_shards(folder, out, Options(samples=10))
    assert done.splits == {"train": (4, 36), "val": (2, 11)}
    assert done.bad == {}
    info = json.loads((out / "_info.json").read_text())
    assert info["classes"] == ["ash", "beech", "oak <b>"]
    assert info["splits"]["train"]["shard_lengths"] == [10, 10, 10, 6]
    with tarfile.open(out / "train-000000.tar") as tar:
        names = [member.name for member in tar]
        image = next(name for name in names if name.endswith(".jpg"))
        label = int(tar.extractfile(image[:-3] + "cls").read())
        kind, stem = image[:-4].split("/")
        assert info["classes"][label] == kind
        assert stem.endswith("_a")  # a dot in a name would be cut there
        content = tar.extractfile(image).read()
        assert content == (folder / "train" / kind / f"{stem[:-2]}.a.JPEG").read_bytes()
    reader = create_dataset("wds/", str(out), split="train", is_training=False)
    theirs = sorted((int(np.asarray(image).mean().round()), target) for image, target in reader)
    from_files = sorted(
        (int(np.asarray(Image.open(p)).mean().round()), info["classes"].index(p.parent.name))
        for p in (folder / "train").rglob("*.JPEG")
    )
    assert theirs == from_files


def test_shards_are_shuffled_by_seed_alone(folder, tmp_path):
    for name, seed, jobs in (("one", 0, 1), ("two", 0, 3), ("three", 1, 1)):
        make_shards(folder, tmp_path / name, Options(samples=10, seed=seed), jobs=jobs)
    one, two, three = (files(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys()
    assert one["train-000000.tar"] != three["train-000000.tar"]
    labels = [label for *_, label in scan_shard(str(tmp_path / "one" / "train-000000.tar"))]
    assert len(set(labels)) > 1


def test_shards_by_megabytes(folder, tmp_path):
    size = sum(path.stat().st_size for path in (folder / "train").rglob("*.JPEG"))
    make_shards(folder, tmp_path / "out", Options(megabytes=size / 3 / 1e6))
    assert 3 <= len(list((tmp_path / "out").glob("train-*.tar"))) <= 4


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch):
    make_shards(folder, tmp_path / "whole", Options(samples=10))
    out = tmp_path / "out"
    real = making._write_shard

    def fail(path, samples, options):
        if path.name == "train-000002.tar":
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(path, samples, options)

    monkeypatch.setattr(making, "_write_shard", fail)
    with pytest.raises(OSError, match="No space"):
        make_shards(folder, out, Options(samples=10))
    assert not (out / "_info.json").exists()
    assert [p.name for p in out.glob("*.tar")] and not list(out.glob(".*"))
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    monkeypatch.setattr(making, "_write_shard", real)
    assert make_shards(folder, out, Options(samples=10)).written == 4
    assert files(out) == files(tmp_path / "whole")
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
    assert make_shards(folder, out, Options(samples=10)).written == 0
    with pytest.raises(DataError, match=r"out .*_shards\.json"):
        make_shards(folder, out, Options(samples=11))


@pytest.mark.parametrize("jobs", [1, 2])
def test_bad_images_are_listed_and_the_list_is_kept(folder, tmp_path, jobs):
    bad = [folder / "train" / "ash" / "3.a.JPEG", folder / "val" / "beech" / "0.a.JPEG"]
    bad[0].write_bytes(bad[0].read_bytes()[:200])
    bad[1].write_bytes(b"")
    out = tmp_path / "out"
    done = make_shards(folder, out, Options(samples=10, verify=True), jobs=jobs)
    assert done.splits == {"train": (4, 35), "val": (2, 10)}
    assert set(done.bad) == {str(path) for path in bad}
    (out / "train-000001.tar").unlink()
    assert set(make_shards(folder, out, Options(samples=10, verify=True)).bad) == set(done.bad)
    assert (out / "bad_samples.csv").read_text().startswith("sample,reason\n")
    assert len(levels(build(out).val.epoch(0))) == 10


def test_images_are_made_smaller(folder, tmp_path):
    Image.fromarray(np.full((60, 120), 90, np.uint8)).save(folder / "train" / "ash" / "wide.png")
    Image.fromarray(np.full((20, 10, 3), 90, np.uint8)).save(folder / "train" / "ash" / "tall.png", "BMP")
    make_shards(folder, tmp_path / "out", Options(max_size=48))
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    (tmp_path / "x.jpg").write_bytes(members["ash/wide.jpg"])
    with Image.open(tmp_path / "x.jpg") as image:
        assert (image.size, image.mode) == ((48, 24), "L")
    assert members["ash/tall.png"].startswith(b"\x89PNG")  # which readers of shards know
    assert members["ash/0_a.jpg"] == (folder / "train" / "ash" / "0.a.JPEG").read_bytes()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda root, out: (out.mkdir(), (out / "thesis.tex").write_text("x")), "out "),
        (lambda root, out: root.rename(root.with_name("away")), "images .*'train' or 'val'"),
        (lambda root, out: (root / "train" / "elm").mkdir(), "train: elm"),
    ],
)
def test_mistakes(folder, tmp_path, change, names):
    out = tmp_path / "out"
    change(folder, out)
    with pytest.raises(DataError, match=names):
        make_shards(folder, out, Options())
    assert not list(tmp_path.glob("out/*.tar"))


def test_command(folder, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["shards", str(folder), str(out), "--samples", "9", "--verify"])
    assert result.exit_code == 0, result.output
    assert "train: 36 images in 4 shards" in result.stdout
    assert CliRunner().invoke(app, ["shards", str(folder), str(out), "--samples", "0"]).exit_code == 2


def test_two_at_a_time(folder, tmp_path):
    (tmp_path / "out").mkdir()
    hold = "import sys, filelock; x = filelock.FileLock(sys.argv[1]); x.acquire(); print('held', flush=True); input()"
    lock = tmp_path / "out" / making.LOCK
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=str(tmp_path / "out")):
            make_shards(folder, tmp_path / "out", Options())
        assert lock.exists()  # it is the other's
        other.communicate("\n")
    make_shards(folder, tmp_path / "out", Options())


# Reading


@pytest.fixture
def made(folder, tmp_path) -> Path:
    make_shards(folder, tmp_path / "shards", Options(samples=8))
    return tmp_path / "shards"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once(made, world, workers):
    parts = [build(made, f"data.workers={workers}", rank=rank, world=world) for rank in range(world)]
    evaluated = [levels(part.val.epoch(0)) for part in parts]
    assert sorted(level for part in evaluated for level in part) == list(range(37, 48))
    trained = [levels(part.train.epoch(3)) for part in parts]
    assert len({len(part) for part in trained}) == 1
    seen = [level for part in trained for level in part]
    assert len(seen) == len(set(seen)) == 36 - 36 % (4 * world)
    assert set(seen) <= set(range(1, 37))
    assert trained == [levels(build(made, rank=r, world=world).train.epoch(3)) for r in range(world)]
    assert trained != [levels(build(made, rank=r, world=world).train.epoch(4)) for r in range(world)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_of_an_epoch_is_the_same(made, workers):
    overrides = ("augment.color_jitter=0.4", "augment.scale=[0.1,1]", "augment.auto_augment=rand-m9-mstd0.5-inc1")
    whole = list(build(made, *overrides).train.epoch(1))
    rest = list(build(made, *overrides, f"data.workers={workers}").train.epoch(1, 5))
    assert len(rest) == 4
    for one, other in zip(whole[5:], rest, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def test_reading_leaves_the_random_numbers_alone(made):
    data = build(made)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.train.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_exclude(made, tmp_path):
    index = load_index(str(made), "train", [f"train-{i:06}.tar" for i in range(5)])
    key = index.key[3].decode()
    for text in (f"sample,reason\n{made}/train-000000.tar:{key},x\n", f"train-000000.tar:{key}\n"):
        (tmp_path / "bad.csv").write_text(text)
        data = build(made, f"data.exclude={tmp_path / 'bad.csv'}")
        assert data.train.samples == 35
        assert len(data.notes) == 1
    with pytest.raises(DataError, match=r"data\.exclude=.*none\.csv"):
        build(made, f"data.exclude={tmp_path / 'none.csv'}")


def test_a_damaged_shard_is_named(made):
    path = made / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"train-000002\.tar"):
        build(made)


def test_a_shard_that_lost_samples_is_named(made):
    with tarfile.open(made / "train-000001.tar") as tar:
        members = [(member, tar.extractfile(member)) for member in tar][:-2]
        with tarfile.open(made / "shorter.tar", "w") as other:
            for member, content in members:
                other.addfile(member, content)
    (made / "shorter.tar").replace(made / "train-000001.tar")
    with pytest.raises(DataError, match=r"train-000001\.tar .*7 .*8"):
        build(made)


def test_index_follows_the_shards(made):
    file = made / "_index-val.npz"
    stamp = file.stat().st_mtime_ns
    build(made)
    assert file.stat().st_mtime_ns == stamp  # used as it is
    whole = file.read_bytes()
    at = whole.index(b"offset.npy") + 60  # in the deflated array
    method = whole.index(b"PK\1\2") + 10  # of compression
    damaged = [whole[:start] + bytes([255] * size) + whole[start + size :] for start, size in ((at, 20), (method, 1))]
    for damage in (b"", b"no index", *damaged):
        file.write_bytes(damage)
        assert len(levels(build(made).val.epoch(0))) == 11
        assert file.stat().st_size > 100  # written anew


def test_an_index_that_cannot_be_written(made):
    """It is only a shorter way."""
    (made / "_index-val.npz").unlink()
    (made / "_index-val.npz").mkdir()
    with pytest.warns(UserWarning, match=r"_index-val\.npz"):
        data = build(made)
    assert len(levels(data.val.epoch(0))) == 11
    assert not [path for path in made.iterdir() if path.name.startswith(".")]


def test_streamed_shards(made):
    """From a command, as from an address: evaluation sees every sample once."""
    names = ",".join(f"val-{i:06}" for i in range(2))
    splits = (f"data.val_split='pipe:cat {made}/{{{names}}}.tar|11'",)
    for workers in (0, 2):
        data = build(made, *splits, f"data.workers={workers}")
        assert isinstance(data.val.dataset, StreamedImages)
        assert sorted(levels(data.val.epoch(0))) == list(range(37, 48))


class Draws:
    """A transform that gives its draws, after the image's level."""

    def read(self, file: io.BytesIO) -> list[float]:
        with Image.open(file) as image:
            level = image.getpixel((0, 0))[0] / 5
        return [round(level), random.random(), float(np.random.rand())]

    def augment(self, image: list[float]) -> list[float]:
        return [*image, float(torch.rand(()))]


def test_draws_of_streamed_shards(made):
    """They follow from the seed, the place in the run and the reader, and from nothing else."""

    def drawn(*place: int, seed: int = 0, rank: int = 0) -> list[list[float]]:
        shards = [f"pipe:cat {made}/train-{i:06}.tar" for i in range(4)]
        split_up = {"rank": rank, "world": 2, "workers": 1}
        dataset = StreamedImages(shards, Draws(), train=True, seed=seed, excluded=Excluded(), **split_up)
        dataset.set(*place)
        return [sample[0].tolist() for sample, _ in islice(dataset, 20)]  # of 16: the second pass has begun

    states = random.getstate(), torch.get_rng_state()
    first = drawn(3, 0)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert first == drawn(3, 0)
    others = [drawn(3, 0, seed=1), drawn(3, 0, rank=1), drawn(4, 0), drawn(3, 2)]
    assert {level for level, *_ in first}.isdisjoint(level for level, *_ in others[1])
    for other in (others[0], *others[2:]):
        assert [level for level, *_ in first] != [level for level, *_ in other]
    for column in (1, 2, 3):
        assert len({row[column] for each in (first, *others) for row in each}) == 5 * 20


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_training_has_full_batches(made, workers):
    """Also where passes over the shards end with images that can't be read, and after a resume."""
    with tarfile.open(made / "train-000001.tar", "w") as tar:
        for i in range(6):
            for ending, content in (("jpg", b"no image"), ("cls", b"1")):
                member = tarfile.TarInfo(f"broken{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    stream = f"data.train_split='pipe:cat {made}/train-00000{{0..3}}.tar|200'"
    given = (stream, f"data.workers={workers}", "data.max_bad_fraction=0.1")
    data = build(made, *given)
    whole = list(data.train.epoch(1))
    assert [len(batch.targets) for batch in whole] == [4] * 50
    assert len(data.bad.names) == 6
    rest = list(data.train.epoch(1, 20))
    assert [len(batch.targets) for batch in rest] == [4] * 30
    assert levels(rest) != levels(whole[:30])
    assert list(data.train.epoch(1, 50)) == []


@pytest.mark.parametrize("name", ["pipe:touch {}", " pipe:touch {}", "https://localhost/{}.tar"])
def test_data_name_no_command(made, tmp_path, name):
    """A recipe may say what is run or asked for, a folder of images may not."""
    info = json.loads((made / "_info.json").read_text())
    name = name.format(tmp_path / "ran")
    info["splits"]["train"]["filenames"][0] = name
    (made / "_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=f"_info.json in .*'{name}'"):
        list(build(made).train.epoch(0))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_shards_without_an_image(made, tmp_path, workers):
    excluded = [f"pipe:cat {made}/train-000000.tar:{key}" for key, *_ in scan_shard(str(made / "train-000000.tar"))]
    (tmp_path / "list").write_text("\n".join(excluded))
    given = (f"data.train_split='pipe:cat {made}/train-00000{{0..0}}.tar|8'", f"data.workers={workers}")
    with pytest.raises(DataError, match=r"train-000000\.tar \(first of 1 shards\)"):
        next(build(made, *given, f"data.exclude={tmp_path / 'list'}").train.epoch(0))


def test_names_that_are_not_utf8(folder, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (folder / "train" / "ash" / "0.a.JPEG").rename(folder / "train" / "ash" / f"{name}.JPEG")
    make_shards(folder, tmp_path / "shards", Options(samples=36))
    data = build(tmp_path / "shards").train.dataset.index
    (found,) = [data.name(i) for i in range(len(data)) if name in data.name(i)]
    assert found == f"{tmp_path}/shards/train-000000.tar:ash/{name}"
    (tmp_path / "list").write_bytes(os.fsencode(found))
    assert build(tmp_path / "shards", f"data.exclude={tmp_path / 'list'}").train.samples == 35
