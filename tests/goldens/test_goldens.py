"""With the same parameters, the models' outputs equal those of the published implementations. See README.md."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import foveal.backbones
import foveal.kernels

from ..heads.published_names import from_published
from .modules import normal, outputs

HERE = Path(__file__).parent
NECKS = sorted(path.stem for path in HERE.glob("a3fpn*.json"))
PARTS = sorted({path.stem for path in HERE.glob("*.json") if "image" not in json.loads(path.read_text())} - set(NECKS))
CASES = sorted({path.stem for path in HERE.glob("*.json")} - set(NECKS) - set(PARTS))
# every case with both backends of the operations, except where the family uses neither operation, or another does
NEITHER = ("care", "van", "shiftvit", "rmt", "raftmlp", "stvit", "sgformer", "moh_vit", "triplet", "fan", "tap_fan")
NEITHER += ("agent_", "inline_")
_RUNS = [(name, b) for name in CASES for b in (["tiled"] if name.startswith(NEITHER) else ["reference", "tiled"])]
# the same networks are compared at another size, or with another attention
TWICE = ("agent_pvt_t", "inline_pvt_t", "inline_deit_t", "agent_swin_t", "inline_swin_t", "inline_cswin_t")
RUNS = [pytest.param(*run, marks=[pytest.mark.slow] if run[0] in TWICE else []) for run in _RUNS]
LIMIT = 1e-4  # largest difference, relative to the largest golden value, unless the case has its own


def parameter(name: str, shape: list[int]) -> torch.Tensor:
    """A value that keeps activations of order one, by the published name of the parameter."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    x = normal(name, shape)
    if leaf == "running_var":
        return 1.0 + 0.25 * x.clamp(-2, 2)
    if leaf == "running_mean":
        return 0.1 * x
    if leaf.startswith("rpb") or "relative_position" in leaf or leaf.endswith("_rel"):
        return 0.5 * x
    if leaf.endswith("_bias") and x.ndim >= 4:  # of positions
        return 2.0 * x
    if leaf in ("bias", "beta"):
        return 0.1 * x
    if leaf.startswith("gamma"):
        return 0.2 + 0.05 * x
    if x.numel() == x.shape[0]:  # weights of norms, layer scales
        return 1.0 + 0.1 * x
    return x * ((0.5 if x.ndim == 4 else 1.0) / math.sqrt(x[0].numel()))


def state_dict(meta: dict) -> dict[str, torch.Tensor]:
    """The parameters of a case, with its corrections where these would make a part degenerate."""
    filled = {name: parameter(name, shape) for name, shape in meta["spec"].items()}
    for name, x in filled.items():
        if not x.is_floating_point():
            continue
        if x.ndim == 4 and x.shape[0] > 1:
            x *= meta.get("conv_scale", 1.0)
        x *= meta.get("scale", {}).get(name, 1.0)
        for ending, factor in meta.get("scale_suffix", {}).items():
            if name.endswith(ending):
                x *= factor
        for ending, value in meta.get("fixed_suffix", {}).items():
            if name.endswith(ending):
                x.fill_(value)
    return filled


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got.detach().double() - want.double()).abs().max() / want.double().abs().max())


@pytest.fixture(scope="module")
def case(request):
    """(description, golden tensors, model with the published parameters loaded by a user's way)"""
    meta = json.loads((HERE / f"{request.param}.json").read_text())
    overlay = dict(state_dict=state_dict(meta), url="", hf_hub_id=None)
    model = timm.create_model(meta["model"], pretrained=True, pretrained_cfg_overlay=overlay).eval()
    return (
        meta,
        load_file(HERE / f"{request.param}.safetensors"),
        model.to(getattr(torch, meta.get("dtype", "float32"))),
    )


@pytest.mark.parametrize(("case", "backend"), RUNS, indirect=["case"])
def test_published_outputs(case, backend):
    meta, want, model = case
    dtype = next(model.parameters()).dtype
    image = normal("image:" + meta["image"], meta["input"]).to(dtype).requires_grad_(True)
    with foveal.kernels.backend(backend):
        features, maps = model.forward_intermediates(image)
        logits = model.forward_head(features)
        (gradient,) = torch.autograd.grad(logits.square().sum(), image)
        with torch.no_grad():
            torch.testing.assert_close(model(image), logits)

    def kept(name: str, x: torch.Tensor) -> torch.Tensor:
        step = meta.get("step", {}).get(name, 1)
        return x[:, :, ::step, ::step]

    errors = {"logits": error(logits, want["logits"])}
    errors["input_grad"] = error(kept("input_grad", gradient[:, :, ::4, ::4]), want["input_grad"])
    numbers = sorted(int(name[7:]) for name in want if name.startswith("feature"))
    for i in numbers:  # counted from the last, as some networks also have a map of their stem
        x = maps[i - numbers[-1] - 1]
        channels = meta.get("channels", {}).get(f"feature{i}", range(16))
        errors[f"feature{i}"] = error(kept(f"feature{i}", x[:, list(channels)]), want[f"feature{i}"])
    assert set(errors) == set(want)
    assert max(errors.values()) < meta.get("limit", LIMIT), errors


@pytest.mark.parametrize("case", [name for name in CASES if "nat_" in name], indirect=True)
def test_natten_is_refused_for_the_bias(case):
    """NATTEN has no relative position bias: a named backend says so instead of leaving it out."""
    pytest.importorskip("natten", reason="NATTEN is not installed (make test installs it)")
    meta, _, model = case
    with foveal.kernels.backend("natten"), pytest.raises(RuntimeError, match="bias"):
        model(torch.zeros(meta["input"]))


@pytest.mark.parametrize("name", NECKS)
def test_published_neck(name):
    """In float64: the reassembly has a hard threshold, where rounding to float32 flips single values."""
    meta, want = json.loads((HERE / f"{name}.json").read_text()), load_file(HERE / f"{name}.safetensors")
    neck = from_published(meta["config"], {n: parameter(n, shape) for n, shape in meta["spec"].items()})
    shapes = zip(meta["input_names"], meta["inputs"].values(), strict=True)
    with torch.no_grad():
        maps = neck.double().eval()([normal(n, shape).double() for n, shape in shapes])
    steps = meta["step"].values()
    for got, step, x in zip(maps, steps, (want[n] for n in meta["step"]), strict=True):
        assert error(got[:, : x.shape[1], ::step, ::step], x) < LIMIT


@pytest.mark.parametrize("name", [pytest.param(part, marks=[pytest.mark.slow] * (part == "naf")) for part in PARTS])
def test_published_module(name):
    meta, want = json.loads((HERE / f"{name}.json").read_text()), load_file(HERE / f"{name}.safetensors")
    shapes = zip(meta["input_names"], meta["inputs"].items(), strict=True)
    got = outputs(meta, {key: normal(name, shape) for name, (key, shape) in shapes}, state_dict(meta))
    errors = {key: error(got[key], x) for key, x in want.items()}
    assert max(errors.values()) < meta.get("limit", LIMIT), errors
