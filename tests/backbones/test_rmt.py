"""RMT: variants, attention that decays with the distance, memory, half precision, token labels, checkpoints."""

import argparse
import gc

import numpy as np
import pytest
import timm
import torch

import foveal.backbones
from foveal.backbones.attention import ManhattanAttention2d, decayed_attention, manhattan, rotate_by_index
from foveal.backbones.profile import profile
from foveal.backbones.rmt import RMT, checkpoint_filter_fn
from foveal.kernels import RelativePositionBias, neighborhood_attention

# parameters as in the authors' logs, GMACs of convolutions, projections and attention at 224 counted by hand
VARIANTS = {
    "rmt_t": (14_334_216, 2.64),
    "rmt_s": (26_967_240, 4.78),
    "rmt_b": (54_154_896, 10.37),
    "rmt_l": (95_464_864, 19.49),
    "rmt_s.in1k_token_label": (26_967_240 + 1_025_000, 4.83),
    "rmt_b.in1k_token_label": (54_154_896 + 513_000, 10.40),
    "rmt_l.in1k_token_label": (95_464_864 + 641_000, 19.52),
}
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def small(**kwargs) -> RMT:
    torch.manual_seed(0)
    model = timm.create_model("test_foveal_rmt", **{"num_classes": 10, **kwargs}).eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    return model


def load(state_dict: dict, classes: int = 10, **kwargs) -> RMT:
    """Create a model with a state dict as its pretrained weights, timm's way; ``classes`` are the weights' own."""
    overlay = dict(state_dict=state_dict, num_classes=classes)
    return timm.create_model("test_foveal_rmt", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize("name", VARIANTS)
def test_size_and_cost(name):
    found = profile(name)
    parameters, giga = VARIANTS[name]
    assert found.parameters == parameters
    assert abs(found.macs / 1e9 - giga) < 0.015


def test_configuration():
    with torch.device("meta"):
        models = {name: timm.create_model(name) for name in ("rmt_t", "rmt_s", "rmt_b.in1k_token_label")}
    assert all(foveal.backbones.family(name) == "RMT" for name in ("rmt_t", "rmt_b"))
    assert [level.blocks[0].retention.axes for level in models["rmt_t"].layers] == ["each", "each", "both", "both"]
    assert [level.blocks[0].retention.axes for level in models["rmt_s"].layers] == ["each", "each", "each", "both"]
    largest = models["rmt_b.in1k_token_label"]
    assert [level.blocks[0].gamma_1 is None for level in largest.layers] == [True, True, False, False]
    assert largest.default_cfg["license"] == "none stated" and "no licence" in largest.default_cfg["notes"][0]
    assert [c.out_features for c in largest.get_classifier()] == [1000, 1000]
    assert models["rmt_t"].get_classifier() is models["rmt_t"].head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 1, 1)), r"depths \(1, 1, 1\).*'embed_dims': 4"),
        (dict(num_heads=(1, 2, 5, 4)), "dim 48 .*num_heads 5"),
        (dict(axes=("each", "each", "both", "all")), "axes .*'all'"),
        (dict(aux_head="map"), "aux_head .*'map'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


# ----------------------------------------------------------------------------------------------------------- attention


def heads(*shape: int, dtype: torch.dtype = torch.double) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3)]


DECAY = ManhattanAttention2d(32, 4, "both", heads_range=6).decay


def with_gradients(function, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    out = function(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def test_decay():
    assert np.allclose(DECAY, [np.log(1 - 2.0 ** (-2 - 6 * h / 4)) for h in range(4)], rtol=1e-6)


@pytest.mark.parametrize("axes", ["each", "both"])
def test_decay_as_a_table_of_neighborhood_attention(axes):
    """A window of the whole row, column or map, whose bias is the decay."""
    H, W = 7, 12
    decay = torch.tensor(DECAY)[:, None, None]
    y, x = (torch.arange(1 - length, length).abs() for length in (H, W))

    def windows(q, k, v):
        def attend(v, size, table):
            bias = RelativePositionBias(table.to(q.dtype))
            return neighborhood_attention(q, k, v, kernel_size=size, bias=bias, backend="reference")

        if axes == "both":
            return attend(v, (H, W), decay * y[:, None] + decay * x)
        return attend(attend(v, (1, W), decay * x), (H, 1), decay * y[:, None])

    leaves = heads(2, H, W, 4, 8)
    want = with_gradients(windows, leaves)
    got = with_gradients(lambda q, k, v: decayed_attention(q, k, v, DECAY, axes), leaves)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_chunks_of_rows_change_nothing(training, monkeypatch):
    leaves = heads(2, 13, 9, 4, 8)
    want = with_gradients(lambda q, k, v: decayed_attention(q, k, v, DECAY, "both"), leaves)
    sizes, whole = [], manhattan._attend_chunk
    monkeypatch.setattr(manhattan, "MASK_ENTRIES", 4 * (13 * 9) * (3 * 9))  # three rows
    monkeypatch.setattr(manhattan, "_attend_chunk", lambda q, *rest: sizes.append(q.shape[1]) or whole(q, *rest))
    if training:
        got = with_gradients(lambda q, k, v: decayed_attention(q, k, v, DECAY, "both"), leaves)
        assert sizes == [3, 3, 3, 3, 1, 1, 3, 3, 3, 3]  # again in the backward pass, from the last
    else:
        with torch.no_grad():
            got = [decayed_attention(*leaves, DECAY, "both")]
        assert sizes == [3, 3, 3, 3, 1]
    torch.testing.assert_close(got, want[: len(got)], rtol=1e-9, atol=1e-9)


def peak_bytes(call) -> int:
    """Most memory that PyTorch holds at once during a call, beyond what it held before."""
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            call()
    finally:
        gc.enable()
    held = peak = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_memory_of_a_training_step_in_chunks(monkeypatch):
    """With chunks as large, relative to the map, as those of 50x84 positions."""
    H, W = 24, 32
    whole = 2 * 4 * (H * W) ** 2 * 4  # the mask and the logits in float32
    monkeypatch.setattr(manhattan, "MASK_ENTRIES", 4 * (H * W) ** 2 // 16)
    leaves = heads(1, H, W, 4, 8, dtype=torch.float32)
    step = lambda: with_gradients(lambda q, k, v: decayed_attention(q, k, v, DECAY, "both"), leaves)  # noqa: E731
    step()
    assert peak_bytes(step) < whole / 5


@pytest.mark.slow
def test_memory_at_800x1333():
    """Of the whole network, of which a map of 50x84 positions in eight heads has the largest mask."""
    model = timm.create_model("rmt_t", features_only=True).eval()
    image = torch.randn(1, 3, 800, 1333)
    with torch.no_grad():
        assert peak_bytes(lambda: model(image)) < 2 * 8 * (50 * 84) ** 2 * 4 / 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.double])
def test_rotation(dtype):
    """As complex numbers, to the rounding of the result alone: index 4199 is no number of half precision."""
    (q, *_) = heads(1, 50, 84, 2, 16)
    q = q.detach().to(dtype)
    index = torch.arange(50 * 84, dtype=torch.double).view(50, 84, 1, 1)
    angle = index * 10000 ** -torch.linspace(0, 1, 8, dtype=torch.double)
    want = torch.view_as_complex(q.double().unflatten(-1, (8, 2))) * torch.polar(torch.ones_like(angle), angle)
    want = torch.view_as_real(want).flatten(-2)
    error = float((rotate_by_index(q).double() - want).abs().max() / want.abs().max())
    # an angle of 4199 is rounded in float32, by up to 4199 * 2^-24
    assert error < torch.finfo(dtype).eps + 4199 * 2**-23


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_the_model(dtype):
    model = small()
    want = model(IMAGE)
    got = model.to(dtype)(IMAGE.to(dtype)).float()
    assert (got - want).abs().max() < 10 * torch.finfo(dtype).eps * want.abs().max()
    assert all(b.dtype == dtype for name, b in model.named_buffers() if not name.endswith("tracked"))


# --------------------------------------------------------------------------------------------------- heads, checkpoints


@pytest.mark.parametrize("on", ["features", "projected"])
def test_token_labels_count_half(on):
    """The classifier of positions, by the largest logit over them."""
    model = small(aux_head=on)
    x = model.forward_features(IMAGE)
    projected = torch.nn.functional.silu(model.norm(model.proj(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    positions = model.aux_head(x if on == "features" else projected)
    want = model.head(projected.mean((1, 2))) + 0.5 * positions.flatten(1, 2).max(1).values
    torch.testing.assert_close(model(IMAGE), want)
    model.reset_classifier(4)
    assert model(IMAGE).shape == (2, 4) and model.aux_head.out_features == 4
    model.reset_classifier(3, "")
    assert model(IMAGE).shape == (2, 2, 3, 3)
    model.reset_classifier(0)
    assert (model(IMAGE).shape, len(model.get_classifier())) == ((2, 2, 3, 96), 2)


def constants(model: RMT) -> dict[str, torch.Tensor]:
    """The buffers of the authors' files."""
    decays = {f"layers.{i}.Relpos.decay": torch.tensor(m.blocks[0].retention.decay) for i, m in enumerate(model.layers)}
    return decays | {f"layers.{i}.Relpos.angle": torch.rand(16) for i in range(4)}


def test_the_authors_file(tmp_path):
    """With raw and averaged weights, constants, an optimizer and options."""
    model = small()
    raw = {name: value + 1 for name, value in model.state_dict().items()}
    state = model.state_dict() | constants(model)
    file = {"model": raw, "model_ema": state, "epoch": 3, "scaler": {}, "args": argparse.Namespace(lr=1e-3)}
    torch.testing.assert_close(checkpoint_filter_fn(file, model), model.state_dict())
    torch.testing.assert_close(load(state)(IMAGE), model(IMAGE))
    model.pretrained_cfg = {"architecture": "rmt_t"}  # whose score is of the raw weights
    torch.testing.assert_close(checkpoint_filter_fn(file, model), raw)


def test_the_authors_dense_file():
    model = small(features_only=True, out_norm=True)
    state = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    names = [k for k in state if not k.startswith(("proj.", "norm.", "head."))]
    theirs = {f"backbone.{k}".replace("backbone.norm", "backbone.extra_norms."): state[k] for k in names}
    assert "backbone.extra_norms.3.bias" in theirs
    theirs |= {f"backbone.{k}": v for k, v in constants(small()).items()} | {"decode_head.conv_seg.bias": torch.ones(9)}
    got = load({"state_dict": theirs}, features_only=True, out_norm=True)(IMAGE)
    torch.testing.assert_close(got, model(IMAGE))
    with pytest.raises(ValueError, match=r"norm0\.bias.*out_norm"):
        load(theirs)


def test_files_that_do_not_fit():
    model = small(aux_head="projected")
    other = {"layers.2.Relpos.decay": torch.tensor([-0.2, -0.1, -0.05])}
    with pytest.raises(ValueError, match=r"layers\.2\.Relpos\.decay .*-0\.2"):
        load(small().state_dict() | other)
    with pytest.raises(ValueError, match=r"aux_head\.bias"):
        load(model.state_dict())
    with pytest.raises(ValueError, match=r"96 channels.*projected"):
        load(model.state_dict(), aux_head="features")
    torch.testing.assert_close(load(model.state_dict(), aux_head="projected")(IMAGE), model(IMAGE))
    assert load(model.state_dict(), num_classes=0)(IMAGE).shape == (2, 96)
    with pytest.raises(ValueError, match=r"missing .*layers\.0.*unexpected .*blocks\.7"):
        load({"layers.9.blocks.7.x": torch.ones(1)})
