"""`evaluate` and `predict` on model folders: what they return, print and write, and how the command ends."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from foveal.cli import app
from foveal.configs.schema import ConfigError
from foveal.train import Prediction, Result, classify, evaluate, predict
from foveal.train.checkpoint import CheckpointError
from foveal.train.data import DataError
from foveal.train.scoring import ClassificationScorer
from foveal.weights.predict import predict as former_predict

DIGITS = ["data.kind=digits", "data.image_size=32", "data.in_chans=1", "data.mean=[0.3]", "data.std=[0.37]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A classifier of ten classes that predicts the third with probability 0.9, whatever the image."""
    model = timm.create_model("test_foveal_dinat", num_classes=10, in_chans=1)
    model.pretrained_cfg |= {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.1 / 9, 0.1 / 9, 0.9, *[0.1 / 9] * 7]).log())
    path = tmp_path_factory.mktemp("models") / "digits"
    labels = {"label_names": [f"digit {i}" for i in range(10)]}
    timm.models.save_for_hf(model, str(path), model_config=labels, model_args={"in_chans": 1}, safe_serialization=True)
    return path


def command(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_result_is_returned_written_and_printed(folder, tmp_path):
    text = io.StringIO()
    result = evaluate(folder, [*DIGITS, f"output={tmp_path / 'result.json'}"], Console(file=text, width=200))
    assert json.loads((tmp_path / "result.json").read_text()) == result
    twos = 35  # of the 360 held-out digits
    assert result["n"] == 360
    assert result["top1"] == pytest.approx(100 * twos / 360)
    expected = -(twos * np.log(0.9) + (360 - twos) * np.log(0.1 / 9)) / 360
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert (result["source"], result["unreadable"]) == (str(folder), {})
    assert f"{result['top1']:.4g}" in text.getvalue()


def test_without_a_console_nothing_is_printed(folder, capsys):
    evaluate(folder, [*DIGITS, "data.val_limit=20"])
    assert capsys.readouterr().out == ""


def test_what_cannot_be_evaluated(folder, tmp_path):
    for overrides, error, named in (
        ([*DIGITS, "data.classes=[a,b]"], ConfigError, "2"),
        ([*DIGITS, "predictions=x.json"], ConfigError, "predictions"),
        ([*DIGITS, "data.val_limit=0"], ConfigError, "data.val_limit"),
        (["data.kind=folder"], DataError, r"data\.root"),
    ):
        with pytest.raises(error, match=named):
            evaluate(folder, overrides)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "head" not in name}, tmp_path / "half.safetensors")
    overrides = [*DIGITS, f"model.checkpoint={tmp_path / 'half.safetensors'}"]
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        evaluate(folder, overrides)


def test_exit_codes(folder, tmp_path):
    """2 for what was asked, 1 for what failed, with one line on stderr."""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    for overrides, status in (
        ([*DIGITS, "data.val_limit=20"], 0),
        ([*DIGITS, "data.kinds=x"], 2),
        ([*DIGITS, f"model.checkpoint={broken}"], 1),
    ):
        code, out, err = command("evaluate", folder, *overrides)
        assert (code, bool(out), err.count("\n")) == (status, status == 0, 0 if status == 0 else 1)
    assert command("evaluate", tmp_path / "nowhere", *DIGITS)[0] == 2


def test_predictions_of_a_classifier(folder, tmp_path):
    image = tmp_path / "x.png"
    Image.fromarray(np.full((40, 30), 100, np.uint8)).save(image)
    found, missing = predict(folder, [image, tmp_path / "none.png"], top=2)
    assert found == Prediction(str(image), [Result("digit 2", pytest.approx(0.9)), found.results[1]])
    assert found.results[1].score == pytest.approx(0.1 / 9)
    assert str(tmp_path / "none.png") in str(missing.error)
    assert len(next(predict(folder, [image], top=99)).results) == 10
    with pytest.raises(ValueError, match=str(tmp_path)):
        next(predict(folder, [image], output=tmp_path))  # nothing to draw
    code, out, err = command("predict", image, tmp_path / "none.png", "--model", folder, "--top", 1)
    assert (code, out) == (1, f"{image}\n   90.00 %  digit 2\n")
    assert str(tmp_path / "none.png") in err


def test_former_names_warn_and_work(folder, tmp_path):
    image = tmp_path / "x.png"
    Image.fromarray(np.full((40, 30), 100, np.uint8)).save(image)
    with pytest.warns(DeprecationWarning, match=r"foveal\.train\.predict"):
        assert list(former_predict(folder, [image], top=1)) == [(str(image), [("digit 2", pytest.approx(0.9))])]
    with pytest.warns(DeprecationWarning, match=r"foveal\.train\.evaluate"):
        assert classify.evaluate(str(folder), [*DIGITS, "data.val_limit=20"]) == 0


def test_the_classification_scorer_against_loops():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 30, 8), torch.randint(8, (7, 30))
    images = torch.zeros(7, 30, 1)  # the index of a batch, by which its logits are found
    images += torch.arange(7).view(-1, 1, 1)
    scorer = ClassificationScorer(8, keep=3, undo=lambda images: images)

    def predict(_, batch):
        own = logits[int(batch[0][0, 0])]
        return own, torch.stack([F.cross_entropy(own, batch[1], reduction="sum"), torch.tensor(30.0)])[:, None]

    scorer.run(torch.nn.Identity(), zip(images, targets, strict=True), predict)
    pairs = zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True)
    ranks = [sorted(row, reverse=True).index(row[target]) for row, target in pairs]
    assert scorer.n == 210
    assert scorer.metrics["top1"] == pytest.approx(100 * sum(rank == 0 for rank in ranks) / 210)
    assert scorer.metrics["top5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 210)
    loss = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert scorer.metrics["val_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert sum(scorer.confusion.values()) == 210
    right = sum(n for (target, predicted), n in scorer.confusion.items() if target == predicted)
    assert right == sum(rank == 0 for rank in ranks)
    assert (len(scorer.right), len(scorer.wrong)) == (3, 3)
    assert all(each.target == each.predicted for each in scorer.right)
    assert all(each.target != each.predicted for each in scorer.wrong)


def test_no_image_is_an_error():
    with pytest.raises(DataError):
        ClassificationScorer(3).run(torch.nn.Identity(), [], lambda model, batch: (batch, None))
