"""Export: exported models load elsewhere and give the same outputs; a failed export leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from typer.testing import CliRunner

import foveal.weights.export as exporting
from foveal.backbones.loading import load
from foveal.cli import app
from foveal.train import predict
from foveal.weights import folder as folders
from foveal.weights.cards import preparing
from foveal.weights.compare import compare, relative_error
from foveal.weights.export import export
from foveal.weights.formats import ExportError
from foveal.weights.images import preprocessing, read_image
from foveal.weights.manifest import checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it, with a model that crops windows, pads maps and dilates."""
    torch.manual_seed(3)
    model = timm.create_model(
        "test_foveal_dinat", num_classes=5, in_chans=1, embed_dim=32, depths=(2, 1), num_heads=(1, 2), dilations="auto"
    )
    model.pretrained_cfg |= {"input_size": (1, 32, 32), "mean": (0.3,), "std": (0.4,), "crop_pct": 1.0}
    folder = tmp_path_factory.mktemp("run")
    arguments = {"in_chans": 1, "embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2], "dilations": "auto"}
    labels = {"label_names": list("abcde")}
    save_for_hf(model, str(folder / "best"), model_config=labels, model_args=arguments, safe_serialization=True)
    (folder / "summary.json").write_text(json.dumps({"top1": 98.5, "n": 360, "best_epoch": 33, "epochs": 40}))
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return path


def test_safetensors_folder_is_loaded_by_timm_alone(run: Path, image: Path, tmp_path: Path) -> None:
    done = export(run, "safetensors", tmp_path / "a" / "model", images=[image])
    assert done.files == ["README.md", "config.json", "model.safetensors"]
    assert done.difference == 0.0
    assert str(image) in done.checked
    model = timm.create_model(f"local-dir:{done.folder}", pretrained=True).eval()
    original = load(run)
    assert model.pretrained_cfg["label_names"] == list("abcde")
    x = preprocessing(original)(read_image(image, 1))[None]
    with torch.no_grad():
        assert torch.equal(model(x), original(x))
    card = (done.folder / "README.md").read_text()
    assert re.search(r"top-1 98\.50 % .*360 .*33 of 40", card)
    assert "arXiv:2209.15001" in card
    # readable for whom the folder is readable, whatever the writer of the tensors does
    assert stat.S_IMODE((done.folder / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (done.folder / "config.json").stat().st_mode
    )


@pytest.mark.parametrize(("size", "crop"), [((3, 48, 32), 0.875), ((1, 32, 32), 0.9), ((5, 32, 32), 0.9)])
def test_the_card_prepares_images(size: tuple[int, ...], crop: float, tmp_path: Path) -> None:
    """With Pillow and NumPy alone, and to the same numbers as `preprocessing`."""
    channels = size[0]
    model = timm.create_model("test_foveal_care", num_classes=3, in_chans=channels)
    mean, std = (0.4, 0.5, 0.6, 0.3, 0.2)[:channels], (0.2, 0.3, 0.4, 0.1, 0.2)[:channels]
    model.pretrained_cfg |= {"input_size": size, "mean": mean, "std": std, "crop_pct": crop}
    labels, arguments = {"label_names": ["a", "b|c", "d"]}, {"in_chans": channels}
    save_for_hf(model, tmp_path / "x", model_config=labels, model_args=arguments, safe_serialization=True)
    done = export(tmp_path / "x", "safetensors", tmp_path / "out")
    card = (done.folder / "README.md").read_text()
    assert "| classes | 3: 0 a, 1 b\\|c, 2 d |" in card
    assert f"resized (bicubic), crop {crop} (center) |" in card
    code = card.split("```python\n")[1].split("```")[0].replace("PATH_OF_THIS_FOLDER", str(done.folder))
    original, exif = load(tmp_path / "x"), Image.Exif()
    exif[0x0112] = 6
    for width, height in ((61, 90), (90, 61), (33, 33), (7, 5)):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, max(channels, 3)), dtype=np.uint8)
        photo = tmp_path / f"{width}{'.npy' if channels > 3 else '.jpg'}"
        if channels > 3:
            np.save(photo, pixels)
        else:
            Image.fromarray(pixels).save(photo, exif=exif)
        found: dict[str, object] = {}
        exec(code.replace("photo.jpg", str(photo)).replace("image.npy", str(photo)), found)
        expected = preprocessing(original)(read_image(photo, channels))[None]
        close = 1e-6 if channels <= 3 else 2e-5  # floats are resized, not bytes
        torch.testing.assert_close(torch.from_numpy(found["image"]), expected, rtol=0, atol=close)
        with torch.no_grad():
            torch.testing.assert_close(found["logits"], original(expected), rtol=1e-4, atol=1e-5)


def test_a_model_without_weights(tmp_path: Path) -> None:
    """Random ones, the same each time, where that is asked for; each phase is told before it begins."""
    with pytest.raises(ValueError, match="--no-pretrained"):
        export("test_foveal_nat", "safetensors", tmp_path / "a")
    phases: list[str] = []
    for name in "ab":
        export("test_foveal_nat", "safetensors", tmp_path / name, pretrained=False, on_phase=phases.append)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    assert len(phases) == 8
    card = (tmp_path / "a" / "README.md").read_text()
    assert "random" in card
    (command,) = re.findall("`foveal (export .*) FOLDER`", card)
    assert CliRunner().invoke(app, [*command.split(), str(tmp_path / "again")]).exit_code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    with pytest.raises(ValueError, match="--no-pretrained"):
        export(tmp_path / "a", "onnx", tmp_path / "c", pretrained=False)


def test_a_failed_download_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match="--no-pretrained"):
        export("dinat_mini", "safetensors", tmp_path / "a")


def test_the_card_ends_with_a_class(run: Path, image: Path, tmp_path: Path, capsys) -> None:
    done = export(run, "safetensors", tmp_path / "out", images=[image])
    code = (done.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("PATH_OF_THIS_FOLDER", str(done.folder)).replace("photo.jpg", str(image)), {})
    assert re.fullmatch(r"[a-e] \d+\.\d%\n", capsys.readouterr().out)
    assert "[1, 5]" in code


def test_cards_of_other_images(tmp_path: Path) -> None:
    """An array for channels that no photograph has; no code for other crops."""
    model = timm.create_model("test_foveal_care", num_classes=3, in_chans=4)
    model.pretrained_cfg |= {"input_size": (4, 32, 32), "mean": (0.5,) * 4, "std": (0.2,) * 4}
    assert "image.npy" in preparing(model)
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    assert preparing(model) is not None
    model.pretrained_cfg["crop_mode"] = "squash"
    assert preparing(model) is None


def test_onnx_for_any_batch(run: Path, image: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra foveal[export] is not installed")
    done = export(run, "onnx", tmp_path / "onnx", images=[image])
    assert done.files == ["README.md", "config.json", "model.onnx"]
    assert done.difference < 1e-4
    session = onnxruntime.InferenceSession(str(done.folder / "model.onnx"))
    described = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert described == {
        "architecture": "test_foveal_dinat",
        "input_size": [1, 32, 32],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.3],
        "std": [0.4],
        "label_names": list("abcde"),
    }
    model = load(run)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 1, 32, 32, generator=torch.Generator().manual_seed(batch))
        (logits,) = session.run(["logits"], {"image": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-5)


def test_an_output_that_is_not_empty(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    (output / "config.json").write_text("old")
    (tmp_path / "another" / "best").mkdir(parents=True)
    (tmp_path / "another" / "best" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"another.*best"):
        export(run, "safetensors", tmp_path / "another", force=True)
    with pytest.raises(ValueError, match=r"model.*--force"):
        export(run, "safetensors", output)
    assert (output / "config.json").read_text() == "old"
    export(run, "safetensors", output, force=True)
    assert (output / "mine.txt").read_text() == "keep"
    assert json.loads((output / "config.json").read_text())["architecture"] == "test_foveal_dinat"
    assert sorted(p.name for p in output.iterdir()) == ["README.md", "config.json", "mine.txt", "model.safetensors"]
    with pytest.raises(ValueError, match=r"mine\.txt"):
        export(run, "safetensors", output / "mine.txt")
    with pytest.raises(ValueError, match=r"deeper.*mine\.txt"):
        export(run, "safetensors", output / "mine.txt" / "deeper")


def test_folders_are_put_in_place_and_replaced(tmp_path: Path) -> None:
    """As Core ML's: readable, and replaced whole."""
    output = tmp_path / "out"
    os.umask(mask := os.umask(0))
    for number in range(3):
        with folders.staged(output) as folder:
            inside = folder / "model.mlpackage" / "Data"
            inside.mkdir(parents=True, mode=0o700)
            (inside / f"{number}.bin").write_text(str(number))
            (inside / f"{number}.bin").chmod(0o600)
            (folder / "config.json").write_text(str(number))
        found = [path for path in output.rglob("*") if path.is_file()]
        assert sorted(path.name for path in found) == [f"{number}.bin", "config.json"]
        assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.mlpackage"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o666 & ~mask}
        for each in (output / "model.mlpackage", output / "model.mlpackage" / "Data"):
            assert stat.S_IMODE(each.stat().st_mode) == 0o777 & ~mask


def test_two_exports_to_one_folder(tmp_path: Path) -> None:
    """The one that ends later leaves the other's as it is."""
    output = tmp_path / "out"
    with pytest.raises(OSError, match="out"), folders.staged(output) as late:
        (late / "config.json").write_text("late")
        (late / "model.onnx").write_text("late")
        with folders.staged(output) as early:
            (early / "config.json").write_text("early")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert (output / "config.json").read_text() == "early"
    with folders.staged(output) as folder:  # what stood there before may be replaced
        (folder / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "new"


def test_outputs_that_are_no_logits(run: Path, image: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_foveal_nat", num_classes=3, global_pool="")
    save_for_hf(model, tmp_path / "map", model_args={"global_pool": ""}, safe_serialization=True)
    with pytest.raises(ValueError, match=r"map.*\[2, 2, 3\].* 3 .*pt2"):
        export(tmp_path / "map", "pt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"\[1, 2, 2, 3\]"):
        list(predict(tmp_path / "map", [image]))


def test_label_names_of_a_folder(run: Path, image: Path, tmp_path: Path) -> None:
    """As timm has them: a list, or by number; one for each class."""
    shutil.copytree(run / "best", tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    config = json.loads(file.read_text())
    expected = list(predict(tmp_path / "x", [image]))
    file.write_text(json.dumps(config | {"label_names": {str(i): "abcde"[i] for i in reversed(range(5))}}))
    assert list(predict(tmp_path / "x", [image])) == expected
    file.write_text(json.dumps(config | {"label_names": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"2 .*5"):
        list(predict(tmp_path / "x", [image]))


def test_another_format_is_not_left_beside(run: Path, tmp_path: Path) -> None:
    """Its config.json and its card would be replaced, its model not."""
    output = tmp_path / "model"
    output.mkdir()
    for name in ("model.onnx", "model.xml"):
        (output / name).write_text("old")
    with pytest.raises(ValueError, match=r"model\.onnx, model\.xml.*safetensors"):
        export(run, "safetensors", output, force=True)
    assert sorted(path.name for path in output.iterdir()) == ["model.onnx", "model.xml"]


def test_weights_that_were_converted(run: Path, tmp_path: Path) -> None:
    """Licence and address stay in the card, also of an export of an export; the record of the file does not."""
    source = tmp_path / "converted"
    shutil.copytree(run / "best", source)
    config = json.loads((source / "config.json").read_text())
    record = {"file": "x.pth", "checkpoint": "dinat_mini.in1k"}
    (source / "config.json").write_text(json.dumps(config | {"conversion": record}))
    published = checkpoints()["dinat_mini.in1k"]
    for name in ("first", "second"):
        source = export(source, "safetensors", tmp_path / name).folder
        card = (source / "README.md").read_text()
        assert f"| weights | `dinat_mini.in1k`, published as {published.address}, converted; from " in card
        assert f"| licence of the published weights | {published.weights_licence} |" in card
        assert "conversion" not in json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"conversion": record | {"checkpoint": None}}))
    card = (export(source, "safetensors", tmp_path / "third").folder / "README.md").read_text()
    assert "converted from `x.pth`" in card and published.address not in card


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_a_difference_leaves_nothing(
    difference: float, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "relative_error", lambda *_: difference)
    with pytest.raises(ExportError, match=rf"{difference:.1e} on random, batch 1.*0\.0001"):
        export(run, "safetensors", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_difference_is_the_worst_one() -> None:
    inputs = {"good": torch.ones(1, 2), "bad": torch.tensor([[2.0, 4.0]])}
    expected = {name: (x,) for name, x in inputs.items()}

    def compared(change: Callable[[torch.Tensor], torch.Tensor], limit: float = 0.5) -> float:
        return compare(expected, lambda x: (change(x),), inputs, limit, relative_error)

    assert compared(lambda x: x) == 0.0
    assert compared(lambda x: x + (x > 3)) == pytest.approx(0.25)
    with pytest.raises(ExportError, match=r"2\.5e-01 on bad.*0\.2"):
        compared(lambda x: x + (x > 3), limit=0.2)
    # of the first alone, though the other is good
    with pytest.raises(ExportError, match="nan on good"):
        compared(lambda x: x / (x.max() > 1) * (x.max() > 1))
    assert np.isnan(relative_error([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.tensor([1.0, np.nan])]))


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tflite.*safetensors, onnx, pt2, aoti"):
        export(run, "tflite", tmp_path / "x")
    for output in (run, run / "best", run / ".." / run.name):
        with pytest.raises(ValueError, match=run.name):
            export(run, "safetensors", output, force=True)
    with pytest.raises(ValueError, match="test_foveal_nat"):
        export("test_foveal_nat", "onnx", tmp_path / "x")
    with pytest.raises(OSError, match=r"absent\.png"):
        export(run, "safetensors", tmp_path / "x", images=[tmp_path / "absent.png"])
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prefix: str, dir: Path):
        raise PermissionError(13, "Permission denied", str(dir / f"{prefix}abc"))

    monkeypatch.setattr(folders.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(OSError, match=r"model: Permission denied$"):
        export(run, "SafeTensors", tmp_path / "model")


def test_values_of_images(tmp_path: Path) -> None:
    """16 bits are scaled, what is transparent is black, and what has no known range is refused."""
    deep = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for channels in (1, 3):
        got = np.asarray(read_image(tmp_path / "deep.png", channels)).reshape(4, channels)
        assert got.tolist() == [[value] * channels for value in (0, 1, 128, 255)]
    Image.new("RGBA", (1, 1), (200, 100, 50, 128)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 3).getpixel((0, 0)) == (100, 50, 25)
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(OSError, match=r"float\.tiff.*F"):
        read_image(tmp_path / "float.tiff", 3)


def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match=r"x\.png"):
        read_image(tmp_path / "x.png", 1)


def test_images(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGBA", (4, 6), (255, 0, 0, 128)).save(path)
    assert (read_image(path, 1).mode, read_image(path, 3).mode) == ("L", "RGB")
    with pytest.raises(OSError, match="4 channels, not 5"):
        read_image(path, 5)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OSError, match=r"x\.png"):
        read_image(path, 3)
    # a photo taken with the camera on its side
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 6)).save(tmp_path / "y.jpg", exif=exif)
    assert read_image(tmp_path / "y.jpg", 3).size == (6, 4)
