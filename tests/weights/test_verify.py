"""What `foveal verify` looks at: each thing that can be wrong is found, and only that."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from typer.testing import CliRunner

import foveal
from foveal.cli import app
from foveal.weights.convert import convert
from foveal.weights.fingerprint import difference, fingerprint, image
from foveal.weights.verify import verify

from . import filler

NAME = "test_foveal_nat"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted model of three classes."""
    torch.save(filler.of(timm.create_model(NAME, num_classes=3)), tmp_path / "x.pth")
    return convert(tmp_path / "x.pth", tmp_path / "model", model=NAME).folder


def failed(folder: str | Path) -> set[str]:
    return {check.name for check in verify(folder) if not check.passed}


def edit(folder: Path, change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def test_nothing_is_wrong(folder: Path) -> None:
    assert failed(folder) == set()


def test_a_folder_in_the_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the sign for it as it is behind ``local-dir:``."""
    monkeypatch.setenv("HOME", str(folder.parent))
    assert failed("local-dir:~/model") == set()


def test_one_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1  # the last bit of a weight: too little to be seen in the output
    file.write_bytes(content)
    assert failed(folder) == {"file"}


def test_other_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = safetensors.torch.load_file(file)
    state["levels.1.blocks.0.attn.rpb"] *= 2
    safetensors.torch.save_file(state, file)
    assert failed(folder) == {"file", "outputs for the fixed image"}
    del state["head.bias"]
    safetensors.torch.save_file(state, file)
    assert failed(folder) == {"file", "loads"}


def test_another_model_of_the_same_names(folder: Path) -> None:
    """The weights fit, the outputs do not: here, another dilation."""
    edit(folder, lambda config: config.update(model_args={"dilations": [[2], [1, 1], [1, 1], [1]]}))
    assert failed(folder) == {"outputs for the fixed image"}


def test_preprocessing_and_parameters_against_the_manifest(tmp_path: Path) -> None:
    torch.save(filler.published("care_s0"), tmp_path / "CARETrans_S0.pth.tar")
    folder = convert(tmp_path / "CARETrans_S0.pth.tar", tmp_path / "model", model="care_s0").folder
    assert failed(folder) == set()
    wrong = {"mean": [0.5] * 3, "crop_pct": 0.9, "license": "mit"}
    edit(folder, lambda config: config["pretrained_cfg"].update(wrong))
    (check,) = (check for check in verify(folder) if not check.passed)
    assert check.name == "manifest"
    for part in ("mean [0.5, 0.5, 0.5], not [0.485, 0.456, 0.406]", "crop_pct 0.9, not 0.875", "license mit"):
        assert part in check.detail
    edit(folder, lambda config: config["conversion"].update(checkpoint="care_s1.in1k"))
    assert failed(folder) == {"parameters", "manifest"}


def test_score_on_images(folder: Path, tmp_path: Path) -> None:
    """Against single predictions; the classes are the folders in order, or the labels."""
    model = foveal.load(folder)
    transform = create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg), is_training=False)
    images, random = tmp_path / "images", np.random.default_rng(0)
    outputs = []
    for number in range(40):  # more than a batch
        label = "abc"[number % 3]
        pixels = random.integers(0, 256, (1, 1, 3)) * np.ones((70, 80, 1))
        (images / label).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels.astype(np.uint8))
        picture.save(images / label / f"{number}.png")
        with torch.no_grad():
            outputs.append((label, int(model(transform(picture)[None]).argmax())))
    assert len({output for _, output in outputs}) > 1

    def score(labels: str) -> str:
        right = sum(labels.index(label) == output for label, output in outputs)
        return f"top-1 {100 * right / 40:.3f} % on 40 images"

    (check,) = (check for check in verify(folder, images) if check.name == "score")
    assert check.detail == score("abc")
    assert "top-1" not in (folder / "README.md").read_text()
    edit(folder, lambda config: config.update(label_names=["c", "a", "b"]))
    result = CliRunner().invoke(app, ["verify", str(folder), "--images", str(images), "--card"])
    assert f"score: {score('cab')}" in result.stdout
    assert f"| measured | {score('cab')} |" in (folder / "README.md").read_text()

    edit(folder, lambda config: config.update(label_names=["c", "a", "x"]))
    with pytest.raises(ValueError, match=r"3 folders.* 3 classes.*: b"):
        list(verify(folder, images))
    edit(folder, lambda config: config.pop("label_names"))
    (images / "c").rename(tmp_path / "c")
    with pytest.raises(ValueError, match=r"2 folders.* 3 classes"):
        list(verify(folder, images))
    with pytest.raises(OSError, match="absent"):
        list(verify(folder, tmp_path / "absent"))


def test_folders_that_are_not_checked(folder: Path, tmp_path: Path) -> None:
    edit(folder, lambda config: config.pop("conversion"))
    with pytest.raises(ValueError, match=str(folder)):
        list(verify(folder))
    with pytest.raises(ValueError, match=str(tmp_path)):
        list(verify(tmp_path))


def test_a_card_without_a_score_and_a_damaged_record(folder: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(folder), "--card"])
    assert result.exit_code == 2
    assert "--images" in result.output
    edit(folder, lambda config: [config["conversion"].pop(key) for key in ("fingerprint", "model_sha256")])
    with pytest.raises(ValueError, match=r"config\.json.*fingerprint"):
        next(verify(folder))


def test_records_of_another_form(folder: Path) -> None:
    original = (folder / "config.json").read_text()

    def damaged(says: str, **change: object) -> None:
        (folder / "config.json").write_text(original)
        edit(folder, lambda config: config["conversion"].update(change))
        with pytest.raises(ValueError, match=rf"config\.json.*{says}"):
            next(verify(folder))

    print_of = json.loads(original)["conversion"]["fingerprint"]
    damaged("", fingerprint="x")
    damaged(r"\[3\]", checkpoint=[3])
    damaged("'many'", parameters="many")
    damaged(r"\[1, 3\]", fingerprint=print_of | {"input": [1, 3]})
    damaged("'outputs'", fingerprint={"input": [1, 3, 64, 64]})
    damaged("'shape'", fingerprint=print_of | {"outputs": [{"norm": 1.0}]})
    (folder / "config.json").write_text(original)
    edit(folder, lambda config: config.update(conversion="x"))
    with pytest.raises(ValueError, match=r"config\.json"):
        next(verify(folder))
    for change in ({"model_args": {"no_such": 1}}, {"model_args": {"pretrained": True}}):
        (folder / "config.json").write_text(original)
        edit(folder, lambda config, change=change: config.update(change))
        assert failed(folder) == {"loads"}
    # a name that no manifest has
    (folder / "config.json").write_text(original)
    edit(folder, lambda config: config["conversion"].update(checkpoint="nat_mini.in5k"))
    (check,) = (check for check in verify(folder) if not check.passed)
    assert (check.name, "nat_mini.in5k" in check.detail) == ("manifest", True)
    with pytest.raises(FileNotFoundError, match="nat_mini"):
        next(verify("nat_mini"))


def test_the_fixed_image() -> None:
    """The same numbers everywhere and always: they are stored in files."""
    x = image((1, 3, 64, 64))
    assert x.shape == (1, 3, 64, 64)
    assert abs(x.mean()) < 0.02
    assert abs(x.std() - 1) < 0.02
    assert torch.equal(image((1, 3, 4, 4)).flatten(), x.flatten()[:48])


def test_differences_of_fingerprints() -> None:
    class Net(torch.nn.Module):
        scale, values = 1.0, 100

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, : self.values] * self.scale

    net, size = Net(), (3, 8, 8)
    one = fingerprint(net, size)
    assert difference(one, one) == 0.0
    net.scale = 1.01
    assert difference(fingerprint(net, size), one) == pytest.approx(0.01, rel=1e-4)
    net.scale = float("nan")
    assert np.isnan(difference(fingerprint(net, size), one))
    net.scale = 0.0  # as of a head that starts from zeros
    zeros = fingerprint(net, size)
    assert difference(zeros, zeros) == 0.0
    net.scale = 1e-9
    assert difference(fingerprint(net, size), zeros) == float("inf")
    net.scale, net.values = 1.0, 99
    assert difference(fingerprint(net, size), one) == float("inf")
    net.forward = lambda x: [x, x]
    assert difference(fingerprint(net, size), one) == float("inf")
