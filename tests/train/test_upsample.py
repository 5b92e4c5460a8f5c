"""Training of an upsampler for a frozen backbone, and a linear probe on its maps."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import interpolate

import foveal
from foveal.configs.schema import ConfigError
from foveal.heads.build import build_backbone, build_segmenter
from foveal.heads.checkpoint import save_dense
from foveal.train import evaluate, predict, train
from foveal.train.checkpoint import CheckpointError
from foveal.train.data import DataError
from foveal.train.upsample import Task
from foveal.weights.export import export

QUIET = Console(quiet=True)
OPTIONS = ["data.kind=folder", "data.image_size=128", "schedule.epochs=2", "train.batch_size=2", "log.trackers=[]"]
OPTIONS += ["train.threads=1", "model.stride=16", "loss.levels=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a segmenter whose backbone is frozen, images, and a run on both."""
    root = tmp_path_factory.mktemp("upsample")
    torch.manual_seed(0)
    segmenter = build_segmenter("test_foveal_dinat", "linear", num_classes=2, strides=(16,), embed_dim=32)
    save_dense(root / "segmenter", segmenter, ["a", "b"], {"in_chans": 3})
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        (root / "images" / split / "below").mkdir(parents=True)
        for number in range(count):
            small = Image.fromarray(draw.integers(0, 256, (3, 4, 3), np.uint8))
            small.resize((100, 70)).save(root / "images" / split / "below" / f"{number}.png")
    given = [f"data.root={root / 'images'}", f"model.checkpoint={root / 'segmenter'}", f"output={root / 'run'}"]
    return root, given, train("upsample/digits", [*given, *OPTIONS], console=QUIET)


def test_it_learns_and_is_evaluated_alike(made):
    root, _, summary = made
    rows = list(csv.DictReader((root / "run/metrics.csv").open()))
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert summary["n"] == 3
    result = evaluate(root / "run")
    assert result["cosine"] == pytest.approx(summary["cosine"], abs=1e-3)
    assert result["bilinear"] == pytest.approx(summary["bilinear"], abs=1e-3)
    assert result["loss_ratio"] == pytest.approx(summary["loss_ratio"], rel=1e-3)
    upsampler = foveal.load(root / "run")
    assert upsampler.arguments == {"name": "uplift", "channels": 128, "patch": 16}
    assert not upsampler.training


def test_the_backbone_of_a_segmenter_is_the_one_that_was_saved(made):
    root, _, _ = made
    stored = load_file(root / "segmenter/model.safetensors")
    for strides in ((16,), (4, 16)):
        backbone = build_backbone(
            "test_foveal_dinat", checkpoint=root / "segmenter", strides=strides, embed_dim=32
        ).eval()
        own = backbone.state_dict()
        same = {f"backbone.{n}" for n in own} & set(stored)
        assert len(same) > 20
        assert all(torch.equal(own[n.removeprefix("backbone.")], stored[n]) for n in same)
    with pytest.raises(ValueError, match=r"embed_dim|of another shape"):
        build_backbone("test_foveal_dinat", checkpoint=root / "segmenter", strides=(16,))
    with pytest.raises(ValueError, match=r"missing.*levels\.2"):
        build_backbone("test_foveal_dinat", checkpoint=root / "segmenter", strides=(32,), embed_dim=32)


def test_the_loss_is_the_published_one():
    """Each step of each level against the backbone's map of the same size."""
    maps = [torch.randn(1, 2, side, side) for side in (8, 4, 2)]
    pyramid = [(torch.zeros(1), x) for x in maps]
    one, first, second = (torch.randn_like(x) for x in (maps[0], maps[1], maps[0]))
    want = ((one - maps[0]) ** 2).mean() + ((first - maps[1]) ** 2).mean() + ((second - maps[0]) ** 2).mean()
    torch.testing.assert_close(Task.loss([[one], [first, second]], pyramid), want)


def test_the_loss_beside_that_of_bilinear_interpolation():
    """Interpolation itself has 100 % of it, the backbone's own maps 0."""

    class Halved(Task):
        def __init__(self):
            pass

        def pyramid(self, images):
            return [(images, interpolate(images, (side, side), mode="area")) for side in (8, 4, 2)]

    class Interpolation:
        def steps(self, image, x, count):
            return [interpolate(x, scale_factor=2.0**step, mode="bilinear") for step in range(1, count + 1)]

    class Perfect:
        def steps(self, image, x, count):
            return [interpolate(image, (2 * side, 2 * side), mode="area") for side in (2, 4)[2 - count :]]

    task, images = Halved(), torch.rand(2, 3, 16, 16)
    for model, cosine, ratio in ((Interpolation(), None, 100), (Perfect(), 100, 0)):
        scorer = task.scorer().run(torch.nn.Identity(), [images], lambda _, batch, m=model: task.predict(m, batch))
        assert scorer.metrics["loss_ratio"] == pytest.approx(ratio, abs=1e-3)
        assert scorer.metrics["cosine"] == pytest.approx(cosine or scorer.metrics["bilinear"], abs=1e-3)
        assert scorer.metrics["bilinear"] < 99


def test_a_probe_on_the_upsampled_map(made):
    root, _, _ = made
    torch.manual_seed(0)
    options = dict(checkpoint=root / "segmenter", frozen_stages=3, out_indices=(2,), embed_dim=32)
    model = build_segmenter("test_foveal_dinat", "linear", num_classes=2, upsample=str(root / "run"), **options).train()
    assert model.backbone.spec.strides == (4,)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {
        "head.norm.weight",
        "head.norm.bias",
        "head.classifier.conv.weight",
        "head.classifier.conv.bias",
    }
    assert not model.backbone.body.model.norm2.training
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in learning)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["data.image_size=96"], r"data\.image_size=96.*64"),
        (["model.stride=2"], r"model\.stride.*\b2\b"),
        (["model.name=no_such_model"], "no_such_model"),
        (["model.kwargs={embed_dim: 16}"], "segmenter.*of another shape"),
        (["model.checkpoint=null"], r"model\.pretrained=false.*model\.checkpoint=null"),
        (["data.in_chans=1"], r"data\.in_chans.*\b1\b"),
        (["data.val_split=test"], "test"),
    ],
)
def test_wrong_recipes(made, options, match):
    root, given, _ = made
    other = [*given, *OPTIONS, f"output={root / 'other'}", *options]
    with pytest.raises((ConfigError, DataError), match=match):
        train("upsample/digits", other, console=QUIET)


def test_a_run_belongs_to_the_weights_of_its_backbone(made, tmp_path):
    """Under another path they may stay; other weights of the same structure are refused, under the same path too."""
    root, given, _ = made
    run = shutil.copytree(root / "run", tmp_path / "run")
    copy = shutil.copytree(root / "segmenter", tmp_path / "copy")
    options = [*given, *OPTIONS, f"output={run}", f"model.checkpoint={copy}", "resume=auto", "schedule.epochs=3"]
    own = json.loads((run / "best/config.json").read_text())["backbone"]
    assert own == {"name": "test_foveal_dinat", "kwargs": {"embed_dim": 32}, "stride": 16} | {
        "weights_sha256": own["weights_sha256"]
    }
    assert evaluate(run, [f"model.checkpoint={copy}"])["n"] == 3

    torch.manual_seed(1)
    other = build_segmenter("test_foveal_dinat", "linear", num_classes=2, strides=(16,), embed_dim=32)
    save_dense(tmp_path / "other", other, ["a", "b"], {"in_chans": 3})
    with pytest.raises(ConfigError, match=f"{own['weights_sha256']}.*{tmp_path / 'other'}"):
        evaluate(run, [f"model.checkpoint={tmp_path / 'other'}"])
    with pytest.raises(CheckpointError, match=own["weights_sha256"]):
        train("upsample/digits", [*options, f"model.checkpoint={tmp_path / 'other'}"], console=QUIET)
    assert train("upsample/digits", options, console=QUIET)["n"] == 3
    assert len(list(csv.DictReader((run / "metrics.csv").open()))) == 3
    (copy / "model.safetensors").write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=own["weights_sha256"]):
        train("upsample/digits", [*options, "schedule.epochs=4"], console=QUIET)


def test_an_upsampler_is_no_model_of_its_own(made):
    root, _, _ = made
    with pytest.raises(ValueError, match=r"model\.upsample="):
        list(predict(root / "run", [root / "images"]))
    with pytest.raises(ValueError, match="upsample="):
        export(root / "run", "onnx", root / "exported")
    with pytest.raises(ConfigError, match="best"):
        evaluate(_moved(root))


def _moved(root):
    """A folder of weights without the recipe of its run."""
    (root / "alone/best").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (root / "alone/best" / name).write_bytes((root / "run/best" / name).read_bytes())
    return root / "alone/best"
