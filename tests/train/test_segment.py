"""Segmentation runs from beginning to end, their scores against other ways to count, and what they refuse."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix, jaccard_score

from foveal.configs.schema import ConfigError, SegmentConfig, load_config
from foveal.heads.build import build_segmenter
from foveal.heads.checkpoint import load_dense, save_dense
from foveal.train import evaluate, plots, predict, segment, train
from foveal.train.checkpoint import CheckpointError
from foveal.train.data import DataError
from foveal.train.scoring import SegmentationScorer
from foveal.train.segment import segmentation_loss

from ..heads.published_names import to_mmseg
from .conftest import stopped

RECIPE = """\
model:
  name: test_foveal_dinat
  drop_path_rate: 0.1
  head_kwargs: {channels: 32}
  auxiliary_kwargs: {channels: 16}
data:
  root: ROOT
  classes: [ground, red, green]
  workers: 0
augment: {crop_size: [48, 64], ratio_range: [0.8, 1.25]}
optim: {lr: 2e-3}
schedule: {epochs: 2, warmup_fraction: 0.1}
train: {batch_size: 4, threads: 1}
"""


# of a Mask2Former small enough for every test
QUERIES = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2, encoder_layers=1)
QUERIES |= dict(encoder_feedforward_dim=32, decoder_layers=2, dim_feedforward=32, num_queries=5, train_num_points=64)
# columns of metrics.csv by the names of an evaluation's result
RESULT = {"val_loss": "loss"} | {key: key for key in segment.Task.metrics if key != "val_loss"}


def write_blocks(root: Path, counts: dict[str, int]) -> Path:
    """ROOT/images and ROOT/masks: a red and a green block on noise, with a border of pixels without a class."""
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            height, width = 48, 64 + 8 * (number % 2)
            pixels = draw.integers(0, 90, (height, width, 3), dtype=np.uint8)
            labels = np.zeros((height, width), np.uint8)
            for label in (1, 2):
                side = draw.integers(14, 28)
                x, y = (label - 1) * width // 2 + draw.integers(0, width // 2 - side), draw.integers(0, height - side)
                pixels[y : y + side, x : x + side, label - 1] = 230
                labels[y : y + side, x : x + side] = label
            labels[:2] = 255
            Image.fromarray(pixels).save(root / "images" / split / f"{number:03}.png")
            Image.fromarray(labels).save(root / "masks" / split / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> Path:
    """16 training and 5 held-out images."""
    return write_blocks(tmp_path_factory.mktemp("blocks"), {"train": 16, "val": 5})


def write_recipe(folder: Path, blocks: Path) -> Path:
    path = folder / "blocks.yaml"
    path.write_text(RECIPE.replace("ROOT", str(blocks)))
    return path


@pytest.fixture
def recipe(tmp_path: Path, blocks: Path, monkeypatch) -> Path:
    """A recipe for `blocks`; its figures, half of the time of so short a run, are left out."""
    for figure in ("segmentations", "curves"):
        monkeypatch.setattr(plots, figure, lambda *_: None)
    return write_recipe(tmp_path, blocks)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, blocks) -> Path:
    """A run that has learnt the blocks, with averaged weights."""
    folder = tmp_path_factory.mktemp("finished")
    options = ["train.ema_decay=0.9", "train.ema_warmup=true", "schedule.epochs=12", "train.eval_interval=6"]
    train(write_recipe(folder, blocks), [f"output={folder / 'run'}", *options], "segment")
    return folder / "run"


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[tuple[str, ...]]:
    return [(r["epoch"], r["lr"], r["train_loss"], r["val_loss"], r["miou"], r["pixel_accuracy"]) for r in rows(run)]


def test_what_a_run_leaves(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        *("config.yaml", "metrics.csv", "curves.png", "predictions.png", "tensorboard", "environment.json"),
        *("summary.json", "best", "last", "last.old", "pictures", "classes.csv", "report.html"),
    }
    assert {p.name for p in (finished / "pictures").iterdir()} == {"epoch_006.png", "epoch_012.png"}
    assert {p.name for p in (finished / "best").iterdir()} == {"config.json", "model.safetensors"}
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["n"] == 5
    assert load_config(finished / "config.yaml", schema=SegmentConfig).augment.crop_size == [48, 64]


def test_it_learns(finished):
    """Plain blocks on noise, twelve epochs of four steps."""
    assert json.loads((finished / "summary.json").read_text())["miou"] > 70


def truth(blocks: Path) -> list[tuple[torch.Tensor, np.ndarray]]:
    result = []
    for path in sorted((blocks / "images" / "val").iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
        result.append((pixels, np.asarray(Image.open(blocks / "masks" / "val" / path.name))))
    return result


def test_scores_against_scikit_learn(finished, blocks):
    """The loaded model, image by image, counted by scikit-learn, gives what the run has written."""
    model = load_dense(finished)
    outputs, labels, surprises = [], [], []
    with torch.no_grad():
        for image, mask in truth(blocks):
            logits = model(image[None])
            predicted = logits.argmax(1)[0].numpy()
            outputs.append(predicted[mask != 255])
            labels.append(mask[mask != 255])
            logarithms = logits[0].log_softmax(0).permute(1, 2, 0).numpy()[mask != 255]
            surprises.append(-logarithms[np.arange(len(labels[-1])), labels[-1]])
    y, p = np.concatenate(labels), np.concatenate(outputs)
    iou = jaccard_score(y, p, average=None)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["miou"] == pytest.approx(100 * iou.mean(), abs=1e-9)
    assert summary["val_loss"] == pytest.approx(np.concatenate(surprises).mean(), rel=1e-5)
    assert summary["pixel_accuracy"] == pytest.approx(100 * (y == p).mean(), abs=1e-9)
    counts = confusion_matrix(y, p)
    recall = np.diag(counts) / counts.sum(1)
    assert summary["mean_accuracy"] == pytest.approx(100 * recall.mean(), abs=1e-9)
    with (finished / "classes.csv").open() as file:
        by_class = {r["class"]: (int(r["pixels"]), float(r["iou"])) for r in csv.DictReader(file)}
    for k, name in enumerate(("ground", "red", "green")):
        assert by_class[name] == (int((y == k).sum()), pytest.approx(100 * iou[k]))


def test_classes_that_do_not_occur_are_not_averaged():
    targets = torch.tensor([0] * 8 + [1] * 4 + [255] * 3).view(1, 3, 5)
    predicted = torch.tensor([0] * 6 + [1] * 2 + [0] + [1] * 3 + [2] * 3).view(1, 3, 5)
    score = SegmentationScorer(3)
    score.run(torch.nn.Identity(), [(targets, targets)], lambda model, batch: (predicted, None))
    assert score.confusion.tolist() == [[6, 2, 0], [1, 3, 0], [0, 0, 0]]
    assert score.iou[:2].tolist() == pytest.approx([100 * 6 / 9, 100 * 3 / 6])
    assert np.isnan(score.iou[2])
    assert score.metrics == pytest.approx(
        {"val_loss": None, "miou": (100 * 6 / 9 + 50) / 2, "mean_accuracy": (75 + 75) / 2, "pixel_accuracy": 75}
    )
    assert score.n == 1


def test_loss_against_loops():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    targets[0, :2] = 255
    terms = [
        -logits[b, :, i, j].log_softmax(0)[targets[b, i, j]]
        for b in range(2)
        for i in range(4)
        for j in range(5)
        if targets[b, i, j] != 255
    ]
    assert len(terms) == 30
    assert segmentation_loss(logits, targets, False) == pytest.approx(sum(terms).item() / 30, rel=1e-5)
    assert segmentation_loss(logits, targets, True) == pytest.approx(sum(terms).item() / 40, rel=1e-5)
    assert segmentation_loss(logits, torch.full_like(targets, 255), False) == 0


def test_evaluate_gives_the_recorded_scores(finished, blocks, tmp_path):
    best = json.loads((finished / "summary.json").read_text())
    data = [f"data.root={blocks}", "data.classes=[ground,red,green]", "data.workers=0"]
    (tmp_path / "copy").mkdir()
    for file in (finished / "best").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    for source, options in ((finished, []), (finished / "best", []), (tmp_path / "copy", data)):
        result = evaluate(source, [f"output={tmp_path / 'result.json'}", *options])
        assert json.loads((tmp_path / "result.json").read_text()) == result
        assert {key: result[name] for key, name in RESULT.items()} == {key: best[key] for key in RESULT}
        assert result["n"] == 5
        assert set(result["iou"]) == {"ground", "red", "green"}


@pytest.mark.parametrize(
    "options",
    [
        ["eval.mode=slide", "eval.crop_size=[32,40]"],
        ["eval.ratios=[0.75,1.0,1.5]", "eval.flip=true"],
        ["eval.scale=[72,48]", "eval.size_divisor=32", "train.val_batch_size=1"],
    ],
)
def test_other_ways_to_evaluate(finished, tmp_path, options):
    """On a task that it has learnt they come out close to whole images."""
    result = evaluate(finished, options)
    best = json.loads((finished / "summary.json").read_text())
    assert result["miou"] != best["miou"]
    assert abs(result["miou"] - best["miou"]) < 20
    assert result["loss"] != best["val_loss"]
    assert abs(result["loss"] - best["val_loss"]) < 0.5


def test_predict_writes_the_classes(finished, blocks, tmp_path):
    image = blocks / "images" / "val" / "000.png"
    (tmp_path / "no.png").write_text("no picture")
    found, missing = predict(finished, [image, tmp_path / "no.png"], output=tmp_path / "out")
    assert isinstance(missing.error, OSError)
    drawn = np.asarray(Image.open(tmp_path / "out" / "000.png"))
    shares = {each.label: each.score for each in found.results}
    assert shares == {n: pytest.approx((drawn == k).mean()) for k, n in enumerate(("ground", "red", "green"))}
    with torch.no_grad():
        expected = load_dense(finished)(truth(blocks)[0][0][None]).argmax(1)[0].numpy()
    assert (drawn == expected).all()


def test_photographs_are_turned_upright(finished, blocks, tmp_path):
    """Stored lying on its side with a tag that says so, an image has the classes of the same image standing up."""
    with Image.open(blocks / "images" / "val" / "000.png") as image:
        image.crop((0, 0, image.width - 8, image.height)).save(tmp_path / "upright.png")
    with Image.open(tmp_path / "upright.png") as image:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees to the right
        image.rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    list(predict(finished, [tmp_path / "upright.png", tmp_path / "lying.png"], output=tmp_path / "out"))
    upright, lying = (np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) for name in ("upright", "lying"))
    assert upright.shape[0] != upright.shape[1]
    assert np.array_equal(upright, lying)


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted(recipe, tmp_path, monkeypatch, workers):
    """Stopped in the middle of an epoch and at the end of one, the continuation is the same to the last bit."""
    options = [
        f"data.workers={workers}",
        "train.ema_decay=0.9",
        "model.head_kwargs.channels=16",
        "train.eval_interval=2",
    ]
    train(recipe, [f"output={tmp_path / 'whole'}", *options], "segment")

    original, stops = segment.Task.train_step, {2, 4}  # updates: 4 an epoch
    calls = []

    def step(self, model, batch, epoch):
        calls.append(epoch)
        if len(calls) in stops:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, batch, epoch)

    monkeypatch.setattr(segment.Task, "train_step", step)
    parts = [f"output={tmp_path / 'parts'}", "resume=auto", *options]
    assert [stopped(recipe, parts, "segment") for _ in stops] == [130, 130]
    train(recipe, parts, "segment")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name in ("model", "raw"):
        whole, parts = (load_file(tmp_path / run / f"last/{name}.safetensors") for run in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_updates_instead_of_passes(recipe, tmp_path):
    options = ["train.steps_per_epoch=3", "schedule.name=poly", "schedule.epochs=3", "train.eval_interval=3"]
    options += ["train.amp=bf16", "data.limit=8"]
    train(recipe, [f"output={tmp_path / 'run'}", *options, "model.head_kwargs.channels=16"], "segment")
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    "options",
    [
        ["model.head=semantic_fpn", "model.neck_kwargs.out_channels=32", "loss.ignored_in_mean=true"],
        ["model.auxiliary=false", "model.auxiliary_kwargs={}", "model.frozen_stages=1", "optim.layer_decay=0.8"],
        ["model.grad_checkpointing=true", "optim.backbone_lr_ratio=0.1", "data.in_chans=1", "optim.name=sgd"],
    ],
    ids=lambda options: options[0],
)
def test_options_train(recipe, tmp_path, options):
    train(recipe, [f"output={tmp_path / 'run'}", "schedule.epochs=1", "data.limit=8", *options], "segment")
    assert float(rows(tmp_path / "run")[0]["train_loss"]) > 0
    assert load_dense(tmp_path / "run").arguments["head"] in ("upernet", "semantic_fpn")


def test_starting_from_a_segmenter_of_other_classes(recipe, finished, tmp_path, capsys):
    options = [f"model.segmenter={finished}", "data.classes=[ground,red,green,blue]", "schedule.epochs=1"]
    train(recipe, [f"output={tmp_path / 'run'}", *options, "optim.lr=1e-9", "data.limit=4"], "segment")
    said = " ".join(capsys.readouterr().out.split())
    assert "so new: head.classifier.conv.weight, head.classifier.conv.bias, auxiliary.classifier.conv.weight" in said
    ours, theirs = load_dense(tmp_path / "run").state_dict(), load_dense(finished).state_dict()
    assert torch.allclose(ours["head.fuse.conv.weight"], theirs["head.fuse.conv.weight"], atol=1e-6)


def test_a_published_file_evaluates_as_the_model_it_was_of(blocks, tmp_path):
    """A file as mmsegmentation writes it, backbone with the authors' names, becomes the same segmenter."""
    arguments = {"head_kwargs": {"channels": 32}, "auxiliary_kwargs": {"channels": 16}}
    model = build_segmenter("test_foveal_dinat", num_classes=3, **arguments).eval()
    own = model.state_dict()
    prefix = "backbone.body.model."
    published = {f"backbone.{n.removeprefix(prefix)}": t for n, t in own.items() if n.startswith(prefix)}
    torch.save({"state_dict": published | to_mmseg(own), "meta": {}}, tmp_path / "upernet.pth")
    config = load_config(write_recipe(tmp_path, blocks), [f"model.segmenter={tmp_path / 'upernet.pth'}"], SegmentConfig)
    loaded = segment.build_model(config, 3).eval()
    assert segment.load_initial(loaded, config.model.segmenter) == []
    image = torch.rand(1, 3, 50, 60)
    assert torch.equal(loaded(image), model(image))


def test_bad_samples_of_a_run(blocks, tmp_path):
    root = write_blocks(tmp_path / "data", {"train": 8, "val": 5})
    (root / "masks" / "train" / "003.png").unlink()
    (root / "images" / "val" / "001.png").write_text("no picture")
    recipe = write_recipe(tmp_path, root)
    options = ["schedule.epochs=1", "model.head_kwargs.channels=16"]
    with pytest.raises(DataError, match=r"1 of 8 .*1\.00%.*data\.max_bad_fraction.*003\.png"):
        train(recipe, [f"output={tmp_path / 'refused'}", *options], "segment")
    train(recipe, [f"output={tmp_path / 'run'}", *options, "data.max_bad_fraction=0.3"], "segment")
    with (tmp_path / "run" / "bad_samples.csv").open() as file:
        found = {Path(r["sample"]).name: r["reason"] for r in csv.DictReader(file)}
    assert found.keys() == {"003.png", "001.png"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["n"] == 4


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.name=dinat_minni", "dinat_minni"),
        ("model.head_kwargs.width=3", "'width'"),
        ("model.kwargs.colour=red", "colour"),
        ("model.segmenter=/nowhere", r"model\.segmenter.*/nowhere"),
        ("train.batch_size=1", "UPerNet"),
        ("data.classes=[ground,red]", r"\b2\b.*data\.classes.*\b2\b"),
        ("augment.crop_size=[48]", r"augment\.crop_size.*\[48\]"),
        ("eval.mod=slide", r"eval\.mod`.*eval\.mode"),
        ("data.std=[0.1,0.2,0]", r"data\.std\[2\].*\b0\b"),
        ("data.mean=[0.5]", r"mean.*\b1\b.*\b3\b"),
        ("eval={mode: slide, crop_size: [32, 32], stride: [24, 40]}", r"eval\.stride=\[24, 40\]"),
        ("eval={mode: whole, crop_size: [32, 32]}", r"eval\.mode=whole.*eval\.crop_size=\[32, 32\]"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(recipe, tmp_path, override, says):
    with pytest.raises((ConfigError, DataError, CheckpointError), match=says):
        train(recipe, [f"output={tmp_path / 'run'}", override], "segment")
    assert not (tmp_path / "run" / "last").exists()


def test_mask2former_without_transformers(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    recipe.write_text(recipe.read_text().replace("  head_kwargs: {channels: 32}\n", "  head: mask2former\n"))
    recipe.write_text(recipe.read_text().replace("  auxiliary_kwargs: {channels: 16}\n", ""))
    with pytest.raises(ConfigError, match=r"mask2former .*transformers"):
        train(recipe, [f"output={tmp_path / 'run'}"], "segment")


def test_held_out_images_without_a_class(recipe, tmp_path):
    root = write_blocks(tmp_path / "data", {"train": 4, "val": 2})
    for path in (root / "masks" / "val").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    options = [f"output={tmp_path / 'run'}", f"data.root={root}", "model.head_kwargs.channels=16", "schedule.epochs=1"]
    with pytest.raises(DataError, match=" 2 images"):
        train(recipe, options, "segment")


def test_a_class_without_a_pixel_is_named(recipe, tmp_path):
    root = write_blocks(tmp_path / "data", {"train": 4, "val": 2})
    for path in (root / "masks" / "val").iterdir():
        labels = np.asarray(Image.open(path)).copy()
        labels[labels == 2] = 0
        Image.fromarray(labels).save(path)
    options = [f"output={tmp_path / 'run'}", f"data.root={root}", "model.head_kwargs.channels=16", "schedule.epochs=1"]
    with pytest.warns(UserWarning, match=r"\bgreen\b.* 2 "):
        train(recipe, options, "segment")


def test_a_continuation_of_other_updates_is_refused(recipe, tmp_path):
    """An epoch of so many updates does not tell the size of a batch, nor that of the data."""
    options = [f"output={tmp_path / 'run'}", "train.steps_per_epoch=1", "train.eval_interval=9", "data.val_limit=1"]
    options += ["model.head_kwargs.channels=16", "resume=auto"]
    train(recipe, [*options, "schedule.epochs=1"], "segment")
    for change, named in (
        ("train.grad_accum_steps=2", r"update .*\b4\b.*\b8\b"),
        ("data.limit=8", r"pass .*\b16\b.*\b8\b"),
    ):
        with pytest.raises(CheckpointError, match=named):
            train(recipe, [*options, "schedule.epochs=2", change], "segment")
    train(recipe, [*options, "schedule.epochs=2"], "segment")


def test_evaluate_refuses_other_classes(finished):
    with pytest.raises(ConfigError, match=r" 3 .* 2$"):
        evaluate(finished, ["data.classes=[a,b]"])
    with pytest.raises(ConfigError, match=r" red .* green$"):
        evaluate(finished, ["data.classes=[ground,green,red]"])


def test_a_folder_that_says_nothing_of_its_use(blocks, tmp_path):
    """Whole images, with the channels that the model was built for."""
    model = build_segmenter("test_foveal_dinat", num_classes=3, in_chans=1, head_kwargs={"channels": 16})
    save_dense(tmp_path / "model", model, ["ground", "red", "green"], {})
    data = [f"data.root={blocks}", "data.classes=[ground,red,green]", "data.workers=0"]
    assert evaluate(tmp_path / "model", data)["n"] == 5
    image = blocks / "images" / "val" / "000.png"
    (found,) = predict(tmp_path / "model", [image])
    assert sum(each.score for each in found.results) == pytest.approx(1)


def test_pictures_replace_neither_images_nor_each_other(finished, blocks, tmp_path):
    image = tmp_path / "000.png"
    image.write_bytes((blocks / "images" / "val" / "000.png").read_bytes())
    before = image.read_bytes()
    with pytest.raises(ValueError, match=re.escape(str(image))):
        list(predict(finished, [image], output=tmp_path))
    assert image.read_bytes() == before
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "out" / "000.png"))):
        list(predict(finished, [image, blocks / "images" / "val" / "000.png"], output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_count_every_image_once(recipe, tmp_path):
    """Through accelerate and gloo, on the CPU: five held-out images for two processes."""
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [
            *launch,
            "-m",
            "foveal",
            "train",
            "segment",
            str(recipe),
            f"output={run}",
            "schedule.epochs=1",
            "train.val_batch_size=1",
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    one = evaluate(run)
    assert one["n"] == 5
    assert all(one[name] == pytest.approx(float(rows(run)[0][key]), rel=1e-9) for key, name in RESULT.items())


README = Path(segment.__file__).parents[1] / "heads" / "README.md"


def blocks_of_readme() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme_scores_a_published_file(blocks, tmp_path, monkeypatch):
    """The README's way from a file to a score, on a small model of three classes."""
    arguments = {"head_kwargs": {"channels": 32}, "auxiliary_kwargs": {"channels": 16}}
    model = build_segmenter("test_foveal_dinat", num_classes=3, **arguments).state_dict()
    published = {f"backbone.{n[20:]}": t for n, t in model.items() if n.startswith("backbone.body.model.")}
    torch.save({"state_dict": published | to_mmseg(model)}, tmp_path / "upernet_dinat_tiny.pth")
    write_recipe(tmp_path, blocks)
    (code,) = (block for block in blocks_of_readme() if "save_dense(" in block)
    monkeypatch.chdir(tmp_path)
    code = code.replace('"dinat_tiny_upernet_ade20k"', '"blocks.yaml"').replace("ADE20K", "['ground', 'red', 'green']")
    exec(code.replace("import ['ground', 'red', 'green']", "import ADE20K"), {})
    data = [f"data.root={blocks}", "data.classes=[ground,red,green]", "data.workers=0"]
    assert evaluate("upernet_dinat_tiny", data)["n"] == 5


def test_predictions_of_a_folder(finished, blocks, tmp_path):
    out = tmp_path / "out"
    found = list(predict(finished, [blocks / "images" / "val"], output=out, formats=["drawn", "masks"], device="cpu"))
    assert len(found) == 5
    for each in found:
        name = Path(each.path).name
        with Image.open(each.path) as image, Image.open(out / "masks" / name) as mask:
            assert mask.size == image.size
            labels, pixels = np.asarray(mask), np.asarray(image).astype(float)
            mixed = (pixels + plots.label_colours(256)[labels]) / 2
        assert np.abs(np.asarray(Image.open(out / "drawn" / name)) - mixed).max() <= 1
    with pytest.raises(ValueError, match="'coco'"):
        next(predict(finished, [blocks], output=out, formats=["coco"]))


def test_weights_of_classes_and_focal_loss():
    """By the definitions, pixel by pixel."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 5, 7), torch.randint(0, 3, (2, 5, 7))
    targets[0, :2] = 255
    weights, gamma, total = torch.tensor([0.5, 0.0, 4.0]), 2.0, 0.0
    for image, labels in zip(logits, targets, strict=True):
        for (i, j), label in np.ndenumerate(labels.numpy()):
            if label != 255:
                p = float(image[:, i, j].softmax(0)[label])
                total -= float(weights[label]) * (1 - p) ** gamma * np.log(p)
    count = int((targets != 255).sum())
    assert segmentation_loss(logits, targets, False, weights, gamma) == pytest.approx(total / count, rel=1e-5)
    assert segmentation_loss(logits, targets, True, weights, gamma) == pytest.approx(total / targets.numel(), rel=1e-5)
    plain = segmentation_loss(logits, targets, False)
    torch.testing.assert_close(segmentation_loss(logits, targets, False, torch.ones(3)), plain)
    logits.mul_(100).requires_grad_()  # pixels that are certain must not make the gradient NaN
    segmentation_loss(logits, targets, False, weights, 0.5).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["loss.class_weights=[1, 2]"], r"loss\.class_weights.* 2 .* 3 "),
        (["model.head=mask2former", "loss.focal_gamma=2"], r"loss\.focal_gamma=2.*mask2former"),
    ],
)
def test_losses_that_do_not_fit(blocks, tmp_path, options, named):
    if "model.head=mask2former" in options:
        options = [*options, "model.head_kwargs={}", "model.auxiliary_kwargs={}", "model.auxiliary=false"]
    with pytest.raises(ConfigError, match=named):
        train(write_recipe(tmp_path, blocks), [f"output={tmp_path / 'run'}", *options], "segment")


@pytest.mark.parametrize(
    "options",
    [
        ["loss.class_weights=[0.2,1.0,3.0]", "loss.focal_gamma=2", "loss.ignored_in_mean=true"],
        ["model.head=mask2former", "eval.mode=slide", "eval.crop_size=[48,64]", "eval.stride=[48,8]"],
    ],
    ids=["pixels", "mask2former"],
)
def test_held_out_loss_is_that_of_training(recipe, blocks, tmp_path, options):
    """Of each image and window by itself, in evaluation mode, weighed by what it is a mean over."""
    if "model.head=mask2former" in options:
        pytest.importorskip("transformers", reason="needs transformers")
        pytest.importorskip("scipy", reason="needs scipy")
        options = [*options, f"model.head_kwargs={json.dumps(QUERIES)}", "model.auxiliary_kwargs={}"]
        recipe.write_text(re.sub("  (head|auxiliary)_kwargs.*\n", "", recipe.read_text()))
    run = tmp_path / "run"
    train(recipe, [f"output={run}", "schedule.epochs=1", *options], "segment")
    config = load_config(run / "config.yaml", [], SegmentConfig)
    model, sums, counts = load_dense(run), 0.0, 0.0
    with torch.no_grad():
        for image, mask in truth(blocks):
            targets = torch.tensor(mask).long()[None]
            if config.model.head == "mask2former":
                for left in range(0, image.shape[-1] - 63, 8):
                    window, own = image[None, :, :, left : left + 64], targets[:, :, left : left + 64]
                    torch.manual_seed(0)
                    terms, weights = torch.stack(list(model(window, own).values())), model.normalizers(own)
                    sums, counts = sums + terms * weights, counts + weights
            else:
                weights = torch.tensor(config.loss.class_weights)
                pixels = targets.numel()
                sums = sums + segmentation_loss(model(image[None]), targets, True, weights, 2.0) * pixels
                counts += pixels
    want = float(torch.as_tensor(sums / counts).sum())
    (row,) = rows(run)
    assert float(row["val_loss"]) == pytest.approx(want, rel=1e-4)
    assert evaluate(run)["loss"] == pytest.approx(want, rel=1e-4)


PEAK = """
import sys
from foveal.train import predict

(prediction,) = predict(sys.argv[1], [sys.argv[2]])
assert prediction.error is None and prediction.results
# not ru_maxrss, which begins at that of the process that started this one
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20)
"""


@pytest.mark.slow
def test_a_photograph_of_12_megapixels_at_full_size_takes_less_than_4_gib(tmp_path):
    """150 classes, without eval.scale; on the whole image it takes 4.4 GiB (UPerNet 16.2, in windows 3.2)."""
    model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=150).eval()
    images = {"in_chans": 3, "mean": [0.5] * 3, "std": [0.5] * 3, "inference": {}}
    save_dense(tmp_path / "model", model, [str(number) for number in range(150)], images)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((4000, 3000)).save(tmp_path / "photo.jpg")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model"), str(tmp_path / "photo.jpg")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert "1024x1024" in run.stderr
    assert float(run.stdout) < 2.5
