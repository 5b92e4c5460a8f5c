"""Data sets good and bad: what is read, and what is said when it can't be."""

import gzip
import io
import json
import os
import shlex
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform

from foveal.configs.schema import AugmentConfig, load_config
from foveal.train import train
from foveal.train.data import BadSamples, DataError, build_classification_data, find_classes
from foveal.train.data.factory import balanced_weights
from foveal.train.data.idx import read_idx, read_split
from foveal.train.data.memory import BatchAugment, load_digits, resize_images
from foveal.train.data.order import EpochOrder, Normalize
from foveal.train.data.transforms import TrainTransform, posterize, seeded

CPU = torch.device("cpu")
MODEL_CFG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def build(*overrides: str, **kwargs):
    config = load_config(None, ["output=o", "model.name=m", "train.batch_size=20", "data.workers=0", *overrides])
    classes = find_classes(config.data)
    return build_classification_data(config, classes, MODEL_CFG, device=CPU, **kwargs), classes


# IDX files


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    root = tmp_path / "idx"
    root.mkdir()
    draw = np.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 25)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (root / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        labels = np.arange(count, dtype=np.uint8) % 10
        (root / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return root


def test_idx_plain_and_gzipped(idx_folder):
    images, labels = read_split(idx_folder, "val")
    assert images.shape == (25, 28, 28)
    assert labels.tolist() == [i % 10 for i in range(25)]
    data, classes = build("data.kind=idx", f"data.root={idx_folder}", "data.in_chans=1", "data.image_size=28")
    assert (len(classes), data.train.batches, data.val.batches) == (10, 3, 2)
    first = next(data.val.epoch(0))
    assert first.images.shape == (20, 1, 28, 28)
    assert torch.allclose(first.images[0, 0] * 0.25 + 0.5, torch.from_numpy(images[0]) / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda b: b[:-5], "18 bytes.* 13$"),
        (lambda b: b[:6], "6 bytes.*16"),
        (lambda b: b"PNG!" + b[4:], "504e4721.*00000803"),
        (lambda b: b"", "00000803"),
    ],
)
def test_idx_damaged(tmp_path, damage, names):
    path = tmp_path / "x-images-idx3-ubyte"
    path.write_bytes(damage(idx(np.zeros((2, 3, 3), np.uint8))))
    with pytest.raises(DataError, match=names):
        read_idx(path, 3)


def test_idx_gzip_cut_short(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx(np.arange(200, dtype=np.uint8)))[:-12])
    with pytest.raises(DataError, match=r"x\.gz"):
        read_idx(path, 1)


def test_idx_counts_disagree(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(24, np.uint8))))
    with pytest.raises(DataError, match=r"25 .*24"):
        read_split(idx_folder, "val")


def test_idx_missing_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"make fashion-mnist.*data\.root"):
        read_split(tmp_path / "nowhere", "train")


def test_idx_label_out_of_range(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(25, 10, np.uint8))))
    with pytest.raises(DataError, match=r"10 .*0\.\.9"):
        build("data.kind=idx", f"data.root={idx_folder}", "data.in_chans=1")


# Digits and batched augmentation


def test_digits_are_split_by_class_and_always_the_same():
    first, second = load_digits(0.2), load_digits(0.2)
    assert (len(first["train"][0]), len(first["val"][0])) == (1437, 360)
    assert all(np.array_equal(first[s][i], second[s][i]) for s in first for i in (0, 1))
    counts = np.bincount(first["val"][1])
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert first["train"][0].max() == 255


def test_resize():
    image = np.zeros((1, 8, 8), np.uint8)
    image[0, 3:5, 3:5] = 255
    resized = resize_images(image, 16, 3)
    assert resized.shape == (1, 3, 16, 16)
    assert resized[0, :, 7:9, 7:9].min() > 200
    assert torch.equal(resize_images(image, 8, 1)[0, 0], torch.from_numpy(image[0]))


def test_augment_leaves_unaugmented_images_alone():
    images = torch.rand(4, 1, 9, 9)
    assert torch.equal(BatchAugment(AugmentConfig(hflip=0.0))(images), images)
    assert torch.equal(BatchAugment(AugmentConfig(hflip=1.0))(images), images.flip(-1))
    assert torch.equal(BatchAugment(AugmentConfig(hflip=0.0, vflip=1.0))(images), images.flip(-2))


def test_augment_moves_within_its_limits():
    torch.manual_seed(0)
    images = torch.zeros(256, 1, 32, 32)
    images[:, :, 15:17, 15:17] = 1
    moved = BatchAugment(AugmentConfig(hflip=0.0, shift=0.125))(images)
    y = (moved * torch.arange(32.0).view(-1, 1)).sum((1, 2, 3)) / moved.sum((1, 2, 3)) - 15.5
    assert 3.0 < y.abs().max() <= 4.001  # an eighth of 32
    assert y.std() > 1.5
    turned = BatchAugment(AugmentConfig(hflip=0.0, rotate=10.0))(images)
    assert torch.allclose(turned.sum((1, 2, 3)), images.sum((1, 2, 3)), rtol=0.05)


def test_erasing_only_in_training():
    torch.manual_seed(0)
    images = torch.full((32, 1, 16, 16), 0.5)
    kept = Normalize([0.5], [0.25], CPU)(images)
    assert kept.abs().max() == 0
    erased = Normalize([0.5], [0.25], CPU, erase=1.0)(images)
    assert (erased.flatten(1).abs().amax(1) > 0).all()


# Order


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_order_covers_every_sample_once(world):
    seen = [i for rank in range(world) for b in EpochOrder(17, 4, train=False, rank=rank, world=world) for i in b]
    assert sorted(seen) == list(range(17))


def test_training_order():
    orders = [EpochOrder(50, 8, train=True, seed=1, rank=r, world=2) for r in range(2)]
    assert [len(o) for o in orders] == [3, 3]
    seen = [i for o in orders for b in o for i in b]
    assert len(seen) == len(set(seen)) == 48
    again = EpochOrder(50, 8, train=True, seed=1, rank=0, world=2)
    whole = list(again)
    again.set(0, 1)
    assert list(again) == whole[1:]
    again.set(1)
    assert list(again) != whole


# Folders


def test_folder(make_images):
    root = make_images()
    data, classes = build(f"data.root={root}", "augment.erase=0.5")
    assert classes == ["blue", "red"]
    batches = list(data.train.epoch(0))
    assert [tuple(b.images.shape) for b in batches] == [(20, 3, 32, 32)] * 5
    val = list(data.val.epoch(0))
    targets = torch.cat([b.targets for b in val])
    images = torch.cat([b.images for b in val])
    assert targets.tolist() == [0] * 10 + [1] * 10
    assert torch.equal(images.mean((2, 3))[:, [2, 0]].argmax(1), targets)  # blue has the larger blue channel


def test_folder_with_workers_gives_the_same_evaluation(make_images):
    root = make_images(val=15)
    one, two = (next(build(f"data.root={root}", f"data.workers={w}")[0].val.epoch(0)) for w in (0, 2))
    assert torch.equal(one.images, two.images)


@pytest.mark.parametrize(
    ("break_it", "names"),
    [
        (lambda root: (root / "train" / "green").mkdir(), "train: green$"),
        (lambda root: (root / "val").rename(root / "test"), "'val' .*test, train"),
        (lambda root: root.rename(root.with_name("elsewhere")), r"images .*data\.root"),
        (lambda root: [p.rename(p.with_suffix(".txt")) for p in root.rglob("train/*/*.png")], r"train: .*\.png"),
        (lambda root: (root / "val" / "red").rename(root / "val" / "pink"), r"val .*\['pink'\]"),
        (lambda root: (root / "train" / "red").rename(root / "train" / "blue" / "x"), r"\['blue'\]"),
    ],
)
def test_folder_mistakes(make_images, break_it, names):
    root = make_images(train=2, val=2)
    break_it(root)
    with pytest.raises(DataError, match=names):
        build(f"data.root={root}", "train.batch_size=2")


def test_folder_nested_images(make_images):
    root = make_images(train=2, val=2)
    (root / "train" / "red" / "deeper").mkdir()
    for path in (root / "train" / "red").glob("*.png"):
        path.rename(path.parent / "deeper" / path.name)
    with pytest.raises(DataError, match=r"train: .*\['red'\]"):
        build(f"data.root={root}", "train.batch_size=2")


def test_corrupt_image_is_skipped_counted_and_named(make_images, folder_recipe, tmp_path, capsys):
    root = make_images(train=100, val=100)
    bad = [root / "train" / "red" / "003.png", root / "val" / "blue" / "007.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:60])
    bad[1].write_text("this is no image")
    run = tmp_path / "run"
    train(folder_recipe, [f"data.root={root}", f"output={run}"]), capsys.readouterr().out
    book = (run / "bad_samples.csv").read_text()
    assert book.startswith("sample,reason\n")
    assert all(str(path) in book for path in bad)
    assert len(book.splitlines()) == 3
    assert json.loads((run / "summary.json").read_text())["n"] == 199
    data, _ = build(f"data.root={root}", f"data.exclude={run / 'bad_samples.csv'}", "data.max_bad_fraction=0")
    assert sum(len(batch.targets) for batch in [*data.train.epoch(0), *data.val.epoch(0)]) == 180 + 199


def test_too_many_corrupt_images_stop_the_run(make_images, folder_recipe, tmp_path, capsys):
    root = make_images(train=100)
    for name in ("010", "020", "030"):
        (root / "train" / "red" / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 200 .*1\.00%.*020\.png"):
        train(folder_recipe, [f"data.root={root}", f"output={tmp_path / 'run'}"])


def test_names_that_are_not_utf8(make_images, tmp_path):
    root = make_images(train=12)
    name = os.fsdecode(os.fsencode(root / "train" / "red") + b"/caf\xe9.png")
    Path(name).write_bytes(b"no image")
    data, _ = build(f"data.root={root}", "data.max_bad_fraction=0.1")
    list(data.train.epoch(0))
    assert list(data.bad.names) == [name]
    data.bad.write(tmp_path / "bad.csv")
    again = BadSamples(0)
    again.read(tmp_path / "bad.csv")
    assert again.names == data.bad.names
    with pytest.raises(DataError) as error:
        again.add(again.names.items())
    assert r"caf\udce9.png" in str(error.value)  # which can be printed
    data, _ = build(f"data.root={root}", f"data.exclude={tmp_path / 'bad.csv'}")
    assert data.train.samples == 24


def test_bad_samples_count_each_name_once():
    bad = BadSamples(0.01)
    bad.start(200)
    for _ in range(5):
        bad.add([("a", "x"), ("b", "x")])
    with pytest.raises(DataError, match=r"3 of 200 .*a \(x\); b \(x\); c \(y\)"):
        bad.add([("c", "y")])


# Shards


def write_shard(path: Path, samples: list[tuple[str, bytes, str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, image, label in samples:
            for suffix, content in (("png", image), ("cls", label.encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    pytest.importorskip("webdataset", reason="webdataset, of the extra foveal[train], is not installed")
    root = tmp_path / "shards"
    root.mkdir()
    splits = {}
    for split, count in (("train", 4), ("val", 3)):
        names = [f"{split}-{i:02}.tar" for i in range(count)]
        for number, name in enumerate(names):
            samples = []
            for i in range(30):
                label = (number + i) % 2
                pixels = np.full((40, 40, 3), 40, np.uint8)
                pixels[..., 2 * label] = 200
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                samples.append((f"{number}{i:03}", buffer.getvalue(), str(label)))
            if split == "val" and number == 1:
                samples[5] = ("broken", b"no image", "1")
            write_shard(root / name, samples)
        info = {"name": split, "num_samples": 30 * count, "filenames": names, "shard_lengths": [30] * count}
        splits[split] = info
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


WDS = ("data.kind=wds", "data.num_classes=2", "data.max_bad_fraction=0.03")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards(shards, workers):
    data, _ = build(*WDS, f"data.root={shards}", f"data.workers={workers}")
    assert (data.train.samples, data.train.batches) == (120, 6)
    batches = list(data.train.epoch(0))
    assert [len(b.targets) for b in batches] == [20] * 6
    for batch in batches:
        assert torch.equal(batch.images.mean((2, 3))[:, [0, 2]].argmax(1), batch.targets)
    assert sum(len(b.targets) for b in data.val.epoch(0)) == 89
    assert [name.rsplit("/", 1)[1] for name in data.bad.names] == ["val-01.tar:broken"]


def test_shards_are_divided_between_processes(shards):
    parts = [build(*WDS, f"data.root={shards}", rank=rank, world=2)[0] for rank in range(2)]
    counts = [sum(len(b.targets) for b in part.val.epoch(0)) for part in parts]
    assert counts == [45, 44]


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("data.num_classes=null", r"data\.num_classes.*data\.classes"),
        ("data.train_split=nope", "'nope'"),
        ("data.train_split='pipe:cat {a,b}.tar|90' data.workers=5", r"2 .*1 .*5 data\.workers"),
        ("data.train_split='gone-{00..02}.tar|90'", r"3 of 3 .*gone-00\.tar"),
    ],
)
def test_shard_mistakes(shards, override, names):
    with pytest.raises(DataError, match=names):
        build(*WDS, f"data.root={shards}", *shlex.split(override))


def test_shard_label_out_of_range(shards):
    data, _ = build(*WDS, f"data.root={shards}", "data.classes=[a,b]")
    data.train.num_classes = 1
    with pytest.raises(DataError, match=r"1 .*0\.\.0"):
        list(data.train.epoch(0))


def test_values_of_unusual_image_files(tmp_path):
    """16 bits are scaled, transparency lies over black, and what has no known range is refused."""
    from foveal.backbones.images import to_mode

    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert np.asarray(to_mode(deep, 1)).tolist() == [[0, 1, 255]]
    clear = Image.fromarray(np.array([[[255, 255, 255, 0], [200, 100, 0, 255]]], np.uint8), "RGBA")
    assert np.asarray(to_mode(clear, 3)).tolist() == [[[0, 0, 0], [200, 100, 0]]]
    with pytest.raises(ValueError, match="mode F"):
        to_mode(Image.fromarray(np.zeros((2, 2), np.float32)), 1)


# Decoding and augmentation


def photograph(path: Path, size: tuple[int, int], mode: str = "RGB") -> Path:
    """A smooth picture with edges."""
    y, x = np.mgrid[: size[1], : size[0]] / max(size)
    waves = [np.sin(20 * x + k) * np.cos(13 * y * (k + 1)) + (x > 0.6) for k in range(3)]
    pixels = np.stack([60 + 50 * (w + 1) for w in waves], -1).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, quality=95)
    return path


def read(path: Path, decode: str, seed: int, channels: int = 3, **augment) -> torch.Tensor:
    settings = AugmentConfig(**{"color_jitter": 0.0, **augment})
    transform = TrainTransform(settings, decode, (channels, 64, 64), (0.5,) * channels)
    with seeded(seed), path.open("rb") as file:
        return transform.augment(transform.read(file)).int()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(160, 120), (50, 90)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
def test_fast_decoding_has_timms_pixels(tmp_path, mode, size, channels):
    """The same draws give the same crop, flip and filter; the rounding differs."""
    path = photograph(tmp_path / ("x.png" if mode == "RGBA" else "x.jpg"), size, mode)
    for seed in range(8):
        ours, theirs = (read(path, decode, seed, channels) for decode in ("fast", "timm"))
        assert ours.shape == theirs.shape == (channels, 64, 64)
        assert (ours - theirs).abs().max() <= 2
        assert (ours - theirs).abs().float().mean() < 0.1


def test_timm_decoding_is_timms(tmp_path):
    path = photograph(tmp_path / "x.jpg", (200, 150))
    theirs = create_transform(
        (3, 64, 64), is_training=True, use_prefetcher=True, color_jitter=0.4, interpolation="random"
    )
    for seed in range(5):
        with seeded(seed), Image.open(path) as image:
            expected = theirs(image.convert("RGB"))
        assert torch.equal(read(path, "timm", seed, color_jitter=0.4), expected.int())


def test_draft_decoding_is_nearly_the_same(tmp_path):
    path = photograph(tmp_path / "x.jpg", (640, 480))
    scale = {"scale": [0.5, 1.0]}  # crops of several times the size
    pairs = [(read(path, "draft", seed, **scale), read(path, "fast", seed, **scale)) for seed in range(8)]
    assert any(not torch.equal(*pair) for pair in pairs)
    assert max((a - b).abs().float().mean() for a, b in pairs) < 4  # the crop moves by a part of a pixel too
    small = {"scale": [0.03, 0.05]}  # of less than twice the size: decoded whole
    for seed in range(4):
        assert torch.equal(read(path, "draft", seed, **small), read(path, "fast", seed, **small))


@pytest.mark.parametrize("policy", ["rand-m10-mstd9-inc1", "original", "v0", "augmix-m9-mstd3-w3", "3a"])
def test_every_policy_takes_every_magnitude(tmp_path, policy):
    """A posterize that leaves no bit is black; Pillow 13 refuses it."""
    path = photograph(tmp_path / "x.jpg", (90, 80))
    for seed in range(60):
        read(path, "fast", seed, auto_augment=policy)
    assert posterize(Image.new("RGB", (2, 2), (255, 255, 255)), 0).getextrema() == ((0, 0),) * 3
    assert posterize(Image.new("L", (2, 2), 255), 1).getextrema() == (128, 128)


def test_interpolation_that_fast_decoding_lacks(make_images):
    with pytest.raises(DataError, match=r"augment.interpolation=lanczos.*data.decode=timm"):
        build(f"data.root={make_images()}", "augment.interpolation=lanczos")


def test_evaluation_is_timms(make_images):
    root = make_images(val=6)
    data, _ = build(f"data.root={root}", "data.crop_pct=0.8", "data.interpolation=bicubic")
    (batch,) = data.val.epoch(0)
    theirs = create_loader(
        create_dataset("", str(root / "val"), search_split=False),
        (3, 32, 32),
        20,
        crop_pct=0.8,
        interpolation="bicubic",
        mean=MODEL_CFG["mean"],
        std=MODEL_CFG["std"],
        num_workers=0,
        device=CPU,
        pin_memory=False,
    )
    (expected,) = theirs
    assert torch.equal(batch.images, expected[0])
    assert torch.equal(batch.targets, expected[1])


def test_the_rest_of_an_epoch_with_workers(make_images):
    """Whichever process draws it, and whatever was drawn before."""
    root = make_images()
    given = (f"data.root={root}", "augment.auto_augment=rand-m9-mstd0.5-inc1")
    whole = list(build(*given)[0].train.epoch(2))
    rest = list(build(*given, "data.workers=2")[0].train.epoch(2, 3))
    assert len(rest) == 2
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.images, other.images)
    assert not torch.equal(whole[0].images, next(build(*given)[0].train.epoch(3)).images)


@pytest.mark.parametrize(
    "write", [lambda root: f"sample,reason\n{root}/train/red/003.png,x\n", lambda root: "train/red/003.png\n"]
)
def test_exclude(make_images, tmp_path, write):
    root = make_images(train=12)
    (tmp_path / "bad.csv").write_text(write(root))
    data, _ = build(f"data.root={root}", f"data.exclude={tmp_path / 'bad.csv'}")
    assert data.train.samples == 23
    assert str(root / "train/red/003.png") not in map(data.train.dataset.index.name, range(23))
    (note,) = data.notes
    assert "1 samples" in note


def test_balanced_sampling():
    """Each class as often as the others, of images with several classes those with a rare one more often; the same
    order again after a resume, and the same images for any number of processes."""
    labels = np.array([0] * 90 + [1] * 10)
    weights = balanced_weights(labels[:, None])
    orders = [EpochOrder(100, 10, train=True, seed=3, rank=r, world=2, weights=weights) for r in range(2)]
    drawn = Counter()
    for epoch in range(40):
        batches = []
        for order in orders:
            order.set(epoch)
            batches += list(order)
        one = EpochOrder(100, 20, train=True, seed=3, weights=weights)
        one.set(epoch)
        assert Counter(i for batch in one for i in batch) == Counter(i for batch in batches for i in batch)
        drawn.update(labels[i] for batch in batches for i in batch)
        orders[0].set(epoch, 2)
        assert list(orders[0]) == batches[2:5]
    assert drawn.total() == 4000
    assert abs(drawn[0] - 2000) < 5 * 1000**0.5
    several = balanced_weights([[0, 0], [0, 1], [0], []])
    assert several == pytest.approx([3**-0.5, 1.0, 3**-0.5, 3**-0.5])
    with pytest.raises(DataError, match=r"data\.sampling"):
        balanced_weights([[], []])


def test_balanced_sampling_of_a_recipe(folder_recipe, make_images, tmp_path):
    root = make_images(train=30)
    for path in sorted((root / "train" / "red").iterdir())[3:]:
        path.unlink()
    seen = {}
    for sampling in ("uniform", "balanced"):
        config = load_config(folder_recipe, [f"data.root={root}", f"data.sampling={sampling}", "train.batch_size=32"])
        data = build_classification_data(config, ["blue", "red"], MODEL_CFG, device=CPU)
        seen[sampling] = sum(int(b.targets.sum()) for epoch in range(3) for b in data.train.epoch(epoch))
    assert seen["uniform"] <= 9 < seen["balanced"]
