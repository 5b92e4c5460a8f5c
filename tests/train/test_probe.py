"""`foveal probe`: features that are never stale, the three heads, drawings, and errors with the values."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from foveal.backbones.loading import load
from foveal.cli import app
from foveal.configs.schema import ConfigError, ProbeConfig, load_config
from foveal.heads.probing import FrozenBackbone, from_published
from foveal.train.data import DataError
from foveal.train.data.order import probe_batch
from foveal.train.probe import probe

QUICK = ["data.image_size=32", "data.limit=120", "data.val_limit=40", "train.val_batch_size=40"]
RANDOM = [*QUICK, "model.pretrained=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder."""
    torch.manual_seed(0)
    model = timm.create_model("test_foveal_dinat", in_chans=1, num_classes=3)
    model.pretrained_cfg |= {"mean": (0.3,), "std": (0.37,), "input_size": (1, 32, 32)}
    place = tmp_path_factory.mktemp("models") / "model"
    timm.models.save_for_hf(model, str(place), model_args={"in_chans": 1}, safe_serialization=True)
    return place


def run(tmp_path, source, head="linear", *overrides: str, data="digits"):
    """A probe with the cache in ``tmp_path``; its result, and the lines about its features."""
    number = len(list(tmp_path.glob("out*")))
    lines = []

    class Lines:
        def print(self, text, **_):
            lines.append(text)

    options = [f"output={tmp_path / f'out{number}'}", f"cache={tmp_path / 'cache'}", *QUICK, *overrides]
    result = probe(source, data, head, options, Lines())
    return result, [line for line in lines if line.startswith("features of")]


@pytest.mark.slow
def test_each_head(folder, tmp_path):
    learned = ["schedule.epochs=8", "optim.name=adamw", "optim.lr=0.01", "optim.lr_batch=null"]
    result, _ = run(tmp_path, folder, "ep", "head.num_queries=8", *learned)
    assert result["top1"] > 50
    assert (result["n"], result["train_images"], result["classes"]) == (40, 120, 10)
    out = tmp_path / "out0"
    assert json.loads((out / "result.json").read_text())["top1"] == result["top1"]
    assert len((out / "metrics.csv").read_text().splitlines()) == 9
    assert Image.open(out / "attention.png").width > 500
    # the weights are those of the best epoch, with the published names
    head = from_published(load_file(out / "head.safetensors"))
    from foveal.train.data.memory import load_digits, resize_images

    images, labels = (array[:40] for array in load_digits(0.2)["val"])
    pixels = (resize_images(images, 32, 1).float() / 255 - 0.3) / 0.37
    predicted = head(FrozenBackbone(load(folder))(pixels)).argmax(1)
    assert (predicted == torch.from_numpy(labels.astype(np.int64))).float().mean() * 100 == pytest.approx(
        result["top1"]
    )
    neighbours, _ = run(tmp_path, folder, "knn", "head.k=[1,5]")
    assert set(neighbours["top1"]) == {"1", "5"}
    assert min(neighbours["top1"].values()) > 50


@pytest.mark.slow
def test_features_are_read_again_only_if_nothing_changed(folder, tmp_path):
    def written(*overrides, source=folder, head="knn"):
        _, lines = run(tmp_path, source, head, *overrides)
        assert len(lines) == 2
        return ["written" in line for line in lines]

    assert written() == [True, True]
    assert written() == [False, False]
    assert written("schedule.epochs=1", head="linear") == [False, False]  # the same features
    assert written("head.num_queries=8", "schedule.epochs=1", head="ep") == [True, True]  # tokens
    assert written("data.image_size=40") == [True, True]
    assert written("data.mean=[0.4]") == [True, True]
    assert written("data.limit=80") == [True, False]
    assert written("train.amp=bf16") == [True, True]
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    assert written(source=other) == [False, False]  # the same weights in another place
    state = load_file(other / "model.safetensors")
    state["patch_embed.proj.0.weight"][0, 0, 0, 0] += 1e-3
    from safetensors.torch import save_file

    save_file(state, other / "model.safetensors")
    assert written(source=other) == [True, True]


def test_code_that_changes_the_features_is_noticed(folder, tmp_path, monkeypatch):
    """What no key holds: the features of the first batch are compared."""
    run(tmp_path, folder, "knn")
    forward = FrozenBackbone.forward
    monkeypatch.setattr(FrozenBackbone, "forward", lambda self, x: 1.1 * forward(self, x))
    _, lines = run(tmp_path, folder, "knn")
    assert all("written" in line and "changed" in line for line in lines)
    assert all("read" in line for line in run(tmp_path, folder, "knn")[1])


def test_files_that_changed_are_read_again(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in ("dark", "bright"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (40, 48, 3)) + 150 * (label == "bright")
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / split / label / f"{i}.png")
    options = ["model.pretrained=false", "data.workers=0", "data.limit=null", "data.val_limit=null", "head.k=[3]"]
    options += ["data.max_bad_fraction=0.2"]
    (result, lines), again = (
        run(tmp_path, "test_foveal_dinat", "knn", *options, data=str(tmp_path / "data")) for _ in "ab"
    )
    assert result["top1"]["3"] > 70
    assert ["read" in line for line in again[1]] == [True, True]
    Image.new("RGB", (40, 48)).save(tmp_path / "data" / "train" / "dark" / "3.png")
    _, lines = run(tmp_path, "test_foveal_dinat", "knn", *options, data=str(tmp_path / "data"))
    assert ["written" in line for line in lines] == [True, False]
    (tmp_path / "data" / "val" / "dark" / "2.png").write_bytes(b"no image")
    result, lines = run(tmp_path, "test_foveal_dinat", "knn", *options, data=str(tmp_path / "data"))
    again, lines = run(tmp_path, "test_foveal_dinat", "knn", *options, data=str(tmp_path / "data"))
    assert ["read" in line for line in lines] == [True, True]
    for each in (result, again):  # from the cache, too
        assert (each["n"], [name.endswith("2.png") for name in each["unreadable"]]) == (7, [True])


def test_without_a_cache_images_are_augmented_in_each_epoch(tmp_path):
    options = [
        f"output={tmp_path / 'out'}",
        *RANDOM,
        "cache=null",
        "schedule.epochs=2",
        "train.batch_size=50",
        "augment.hflip=0",
    ]
    result = probe("test_foveal_dinat", "digits", "linear", options)
    assert (result["epochs"], result["train_images"], result["n"]) == (2, 120, 40)
    with pytest.raises(ConfigError, match=r"cache=null"):
        probe("test_foveal_dinat", "digits", "knn", [f"output={tmp_path / 'b'}", *RANDOM, "cache=null"])


@pytest.mark.parametrize(
    ("head", "override", "words"),
    [
        ("knn", "head.k=[5,201]", "201.* 120 "),
        ("ep", "head.num_queries=48", "128 .*48"),
        ("linear", "train.batch_size=201", "120 .*201"),
        ("linear", "train.batch_size=1", r"batch_size=1\b"),
        ("ep", "data.limit=1", "1 training images in digits.* 2"),
        ("linear", "optim.layer_decay=0.5", "layer_decay"),
        ("linear", "augment.mixup=0.2", r"augment\.mixup=0\.2"),
        ("linear", "augment.hflip=0", r"augment\.hflip=0.*cache"),
        ("ep", "augment={scale: [0.5, 1]}", r"augment\.scale=\[0\.5, 1.*cache"),
        ("linear", "data.decode=timm", r"data\.decode=timm.*cache"),
        ("linear", "head.num_queries=8", r"head\.num_queries=8.*linear"),
        ("linear", "head.tokens=all", r"head\.tokens=all.*linear"),
        ("ep", "head.k=[5]", r"head\.k=\[5\].*ep"),
        ("knn", "optim.lr=1", r"optim\.lr=1.*knn"),
        ("knn", "schedule.epochs=1", r"schedule\.epochs=1.*knn"),
        ("knn", "train.batch_size=8", r"train\.batch_size=8.*knn"),
        ("linear", "loss.name=bce", r"loss\.name|loss"),
        ("linear", "data.sampling=balanced", "balanced"),
        ("linear", "optim.name=larz", "larz"),
        ("linear", "data.corruption=fog", "fog"),
    ],
)
def test_invalid_settings(head, override, words, tmp_path):
    options = [f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", *RANDOM, override]
    with pytest.raises((ConfigError, DataError), match=words):
        probe("test_foveal_dinat", "digits", head, options)
    assert not list(tmp_path.iterdir())  # at once, before the features


def test_the_batch_follows_the_data():
    batches = {n: probe_batch(n, 4096) for n in (1, 2, 15, 16, 47, 48, 120, 32_768, 1_281_167)}
    assert batches == {1: 1, 2: 2, 15: 2, 16: 2, 47: 4, 48: 4, 120: 8, 32_768: 4096, 1_281_167: 4096}
    assert [probe_batch(n, 256) for n in (120, 5000)] == [8, 256]


@pytest.mark.parametrize("cache", ["null", "here"])
def test_few_images(cache, folder, tmp_path):
    options = [*QUICK, "data.limit=3", "schedule.epochs=1", f"output={tmp_path / 'out'}"]
    options += [f"cache={'null' if cache == 'null' else tmp_path / cache}"]
    assert probe(folder, "digits", "linear", options)["train_images"] == 3
    assert load_config(tmp_path / "out" / "config.yaml", (), ProbeConfig).train.batch_size == 2


def test_sizes_and_folders(tmp_path, folder):
    options = [f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", *RANDOM]
    with pytest.raises(ConfigError, match=r"3x32x32.*32"):
        probe("test_vit", "digits", "ep", [*options, "model.kwargs={dynamic_img_size: false}"])  # of 160 pixels
    with pytest.raises(DataError, match="nothing"):
        probe("test_foveal_dinat", tmp_path / "nothing", "ep", options)
    run(tmp_path, folder, "knn")
    with pytest.raises(ConfigError, match="out0"):
        probe(folder, "digits", "knn", [f"output={tmp_path / 'out0'}", *QUICK])


def test_tokens_that_are_no_map_are_refused_before_training(tmp_path):
    options = [f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}", *RANDOM]
    with pytest.raises(ConfigError, match=r"CoaT .*3x32x32.*\b2 tokens.*32"):  # its class token is not declared
        probe("coat_lite_tiny", "digits", "ep", [*options, "model.kwargs={img_size: 32}"])
    assert not list(tmp_path.iterdir())


def test_the_result_is_kept_if_the_figure_fails(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("foveal.train.probe._draw", fail)
    with pytest.raises(OSError, match="no space"):
        run(tmp_path, folder, "ep", "head.num_queries=8", "schedule.epochs=1")
    assert {"result.json", "config.yaml", "head.safetensors"} <= {path.name for path in (tmp_path / "out0").iterdir()}


def test_the_best_head_is_kept_if_the_training_stops(folder, tmp_path, monkeypatch):
    epochs = []

    def train_epoch(head, *_):
        if len(epochs) == 1:
            raise KeyboardInterrupt
        epochs.append(head[1].weight.detach().clone())
        return 1.0

    monkeypatch.setattr("foveal.train.probe._train_epoch", train_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, folder)
    file = tmp_path / "out0" / "head.safetensors"
    assert torch.equal(load_file(file)["1.weight"], epochs[0])
    with pytest.raises(KeyboardInterrupt):  # in the first epoch: the old head is not taken for its own
        run(tmp_path, folder, "linear", f"output={tmp_path / 'out0'}")
    assert not file.exists()


def test_the_command(folder, tmp_path):
    arguments = ["probe", str(folder), "digits", "--head", "knn", f"output={tmp_path / 'x'}", f"cache={tmp_path / 'c'}"]
    shown = CliRunner().invoke(app, [*arguments, *QUICK])
    assert shown.exit_code == 0, shown.output
    assert "top1, k=20" in shown.output
    assert CliRunner().invoke(app, [*arguments, *QUICK]).exit_code == 2  # the output is there
