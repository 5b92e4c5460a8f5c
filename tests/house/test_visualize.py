"""`foveal visualize`: what is drawn is what the operations computed."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import foveal
from foveal import visualize
from foveal.backbones import attention
from foveal.cli import app
from foveal.heads.checkpoint import save_dense
from foveal.heads.upsamplers import create_upsampler

MODELS = {
    "test_foveal_dinat": (96, 160),  # a table, dilations
    "test_foveal_halonet": (64, 80),  # row and column embeddings, windows that leave the map
    "test_foveal_maxvit": (72, 96),  # blocks and grids, cut ones
    "test_foveal_overlock": (96, 128),  # weights from logits
}


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_those_of_the_operation(name, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    point = (0.83, 0.12)
    calls = []
    modules = {module for module in vars(attention).values() if isinstance(module, types.ModuleType)}
    for module, operation in itertools.product(modules, ("neighborhood_attention", "neighborhood_mix")):
        if not hasattr(module, operation):
            continue
        original = getattr(module, operation)

        def noted(*tensors, original=original, **options):
            out = original(*tensors, **options)
            calls.append((tensors[-1], options, out))
            return out

        monkeypatch.setattr(module, operation, noted)
    seen = visualize.looks(model, torch.randn(1, 3, *MODELS[name]), point)
    assert len(seen) == len(calls) > 0
    modules = dict(model.named_modules())
    for look, (v, options, out) in zip(seen, calls, strict=True):
        assert look.layer in modules
        inside = [(at >= 0) & (at < length) for at, length in zip((look.rows, look.columns), look.size, strict=True)]
        rows, columns = (at.clamp(0, n - 1) for at, n in zip((look.rows, look.columns), look.size, strict=True))
        values = v[0, rows][:, columns] * (inside[0][:, None] & inside[1][None])[..., None, None]
        got = torch.einsum("nij,ijnd->nd", look.weights, values)
        step = options.get("query_stride", 1)
        row, column = (at // step for at in look.query)
        torch.testing.assert_close(got, out[0, row, column], rtol=1e-4, atol=1e-5)


def test_the_receptive_field_of_a_convolution():
    class Box(torch.nn.Module):
        def forward_intermediates(self, x, **_):
            return [torch.nn.functional.conv2d(x, torch.ones(1, 1, 3, 3), padding=1)]

    field = visualize.receptive_field(Box(), torch.randn(1, 1, 10, 20), (0.5, 0.3))
    want = torch.zeros(10, 20)
    want[2:5, 9:12] = 1
    assert torch.equal(field, want)


def test_every_pattern_is_drawn_before_a_second_of_one():
    model = timm.create_model("test_foveal_dinat").eval()
    seen = visualize.looks(model, torch.randn(1, 3, 224, 224), (0.5, 0.5))
    patterns = {(look.rule, look.size) for look in seen}
    assert 1 < len(patterns) < len(seen)
    chosen = visualize._chosen(seen, len(patterns))
    assert {(look.rule, look.size) for look in chosen} == patterns
    assert [seen.index(look) for look in chosen] == sorted(seen.index(look) for look in chosen)
    assert visualize._chosen(seen, 100) == seen
    assert len(visualize._chosen(seen, 1)) == 1


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_the_command(tmp_path, photograph):
    output = tmp_path / "new" / "look.png"
    options = ["visualize", photograph, "--model", "test_foveal_dinat", "--untrained", "--output", str(output)]
    result = CliRunner().invoke(app, [*options, "--point", "0.2,0.9", "--layers", "5"])
    assert result.exit_code == 0, result.output
    assert "5 of " in result.output
    with Image.open(output) as picture:
        assert picture.width > 800
        assert len(set(picture.convert("L").resize((64, 64)).getdata())) > 50, "not blank"
    assert [path.name for path in output.parent.iterdir()] == ["look.png"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--point", "0.5"], "got '0.5'"),
        (["--point", "1,0.2"], "got 1, 0.2"),
        (["--point", "nan,0.2"], "got nan, 0.2"),
        (["--model", "resnet18"], "ResNet"),
        (["--upsample", "bilinear", "--point", "0.2,0.9"], "--point"),
        (["--upsample", "bilinear", "--click", "--layers", "5"], "--click, --layers"),
    ],
)
def test_bad_input(tmp_path, photograph, options, said):
    arguments = ["visualize", photograph, "--model", "test_foveal_dinat", "--untrained", "--output"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "x.png"), *options])
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "x.png").exists()


def test_the_map_of_a_trained_upsampler(tmp_path, photograph):
    """Its stride and the backbone's arguments are in the folder; the wrong backbone is named."""
    upsampler, output = create_upsampler("uplift", channels=32, patch=8), tmp_path / "look.png"
    backbone = {"name": "test_foveal_dinat", "kwargs": {"embed_dim": 16}, "stride": 8}
    save_dense(tmp_path / "own", upsampler, [], {}, backbone=backbone)
    given: dict = dict(pretrained=False, side=64)
    maps = visualize.visualize_upsampled(photograph, "test_foveal_dinat", output, str(tmp_path / "own"), **given)
    assert maps == [(8, 12), (32, 48), (16, 24), (32, 48)]
    assert output.is_file()
    with pytest.raises(ValueError, match=r"own was trained for test_foveal_dinat.*vit_tiny_patch16_224"):
        visualize.visualize_upsampled(photograph, "vit_tiny_patch16_224", output, str(tmp_path / "own"), **given)

    net = timm.create_model("test_foveal_dinat", embed_dim=24, num_classes=3)
    timm.models.save_for_hf(net, tmp_path / "run", model_args={"embed_dim": 24}, safe_serialization=True)
    maps = visualize.visualize_upsampled(photograph, str(tmp_path / "run"), output, "bilinear", side=64)
    assert maps == [(2, 3), (16, 24), (8, 12), (16, 24)]


def test_models_of_timm_with_our_attention():
    model = timm.create_model("halonet26t", num_classes=0).eval()
    assert foveal.replace_attention(model)
    assert len(visualize.looks(model, torch.randn(1, 3, 64, 64), (0.5, 0.5))) > 0
