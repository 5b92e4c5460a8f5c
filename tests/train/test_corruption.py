"""ImageNet-C's corruptions of held-out images: determinism, the table of errors, and what is refused."""

import csv
import json
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from foveal.configs.schema import ConfigError
from foveal.train import evaluate
from foveal.train.data.corruption import NAMES, Corruption, only, parse

installed = pytest.mark.skipif(find_spec("imagecorruptions") is None, reason="foveal[corruption] is not installed")
QUICK = ("shot_noise", "impulse_noise", "glass_blur", "frost")  # of each kind of random numbers
DIGITS = ["data.kind=digits", "data.image_size=32", "data.in_chans=1", "data.mean=[0.3]", "data.std=[0.37]"]


def test_names_and_severities():
    assert [(c.name, c.severity) for c in parse("fog:3")] == [("fog", 3)]
    assert [c.severity for c in parse("fog")] == [1, 2, 3, 4, 5]
    assert len({(c.name, c.severity) for c in parse("all")}) == 75
    assert parse(None) == []
    assert only("fog", (3, 32, 32)) is None
    assert only("fog:1", (3, 32, 32)).name == "fog"


@pytest.mark.parametrize(
    ("text", "size", "match"),
    [
        ("frog", (3, 64, 64), "frog.*fog"),
        ("fog:6", (3, 64, 64), "fog:6"),
        ("fog:1", (1, 28, 28), "28x28"),
        ("all", (4, 64, 64), "4 and"),
    ],
)
def test_what_is_refused(text, size, match):
    with pytest.raises(ConfigError, match=match):
        only(text, size)


@installed
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_each_depends_on_the_image_alone(name):
    rng = np.random.default_rng(0)
    low = rng.integers(0, 255, (3, 6, 5), dtype=np.uint8)
    image = np.stack([np.asarray(Image.fromarray(x).resize((40, 48))) for x in low])
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    light, heavy = (Corruption(name, severity)(torch.from_numpy(image)) for severity in (1, 5))
    assert (np.random.get_state()[1] == state).all()
    np.random.seed(2)
    assert torch.equal(Corruption(name, 1)(torch.from_numpy(image)), light)
    assert np.array_equal(Corruption(name, 1)(image), light.numpy())
    assert light.dtype == torch.uint8
    assert light.shape == image.shape
    distances = [np.abs(x.numpy().astype(float) - image).mean() for x in (light, heavy)]
    assert 0 < distances[0] < distances[1] or name == "frost"  # which darkens the image and adds white
    assert Corruption(name, 1)(image[:1]).shape == (1, 48, 40)


@installed
def test_table(tmp_path, monkeypatch):
    """A model that answers by the mean of the image."""
    model = timm.create_model("test_foveal_care", num_classes=10, in_chans=1)
    model.pretrained_cfg |= {"input_size": (1, 32, 32)}
    timm.models.save_for_hf(model, str(tmp_path / "x"), model_args={"in_chans": 1}, safe_serialization=True)
    more = ["data.val_limit=40", f"output={tmp_path / 'result.json'}", "train.val_batch_size=40"]
    result = evaluate(tmp_path / "x", [*DIGITS, *more, "data.corruption=contrast"])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert list(result["corruptions"]) == ["contrast"]
    for severity, error in enumerate(result["corruptions"]["contrast"], 1):
        alone = evaluate(tmp_path / "x", [*DIGITS, *more, f"data.corruption=contrast:{severity}"])
        assert alone["top1"] == pytest.approx(100 - error)
        assert "corruptions" not in alone
    clean = evaluate(tmp_path / "x", [*DIGITS, *more])
    assert (clean["loss"], clean["n"]) == (result["loss"], 40)
    assert alone["loss"] != pytest.approx(clean["loss"])
    with (tmp_path / "corruptions-contrast.csv").open() as file:
        _, row, mean = list(csv.reader(file))
    assert [float(x) for x in row[1:6]] == pytest.approx(result["corruptions"]["contrast"], abs=1e-3)
    assert float(row[6]) == float(mean[6]) == pytest.approx(result["mean_corruption_error"], abs=1e-3)


@installed
def test_image_files_are_corrupted_after_the_crop(tmp_path):
    for name, colour in (("blue", (20, 40, 200)), ("red", (200, 40, 20))):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (80, 64), colour).save(tmp_path / "val" / name / "image.png")
    model = timm.create_model("test_foveal_care", num_classes=2)
    timm.models.save_for_hf(model, str(tmp_path / "x"), safe_serialization=True)
    data = ["data.kind=folder", f"data.root={tmp_path}", "data.workers=0"]
    losses = [
        evaluate(tmp_path / "x", [*data, *more])["loss"]
        for more in ([], ["data.corruption=shot_noise:5"], ["data.corruption=shot_noise:5"])
    ]
    assert losses[0] != pytest.approx(losses[1])
    assert losses[1] == losses[2]


def test_training_takes_one_severity(tmp_path):
    from foveal.train import train

    with pytest.raises(ConfigError, match="corruption=fog"):
        train("classify/digits", ["data.corruption=fog", f"output={tmp_path}", "data.image_size=32"])
