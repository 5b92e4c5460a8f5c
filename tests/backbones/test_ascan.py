"""AsCAN: the layouts and what they cost, the grammar, full attention at any size, folding of BatchNorm, checkpoints."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import foveal.backbones
import foveal.backbones.attention.window
from foveal.backbones.ascan import AsCAN, ConvBlock, TransformerBlock, checkpoint_filter_fn
from foveal.backbones.attention import FullAttention2d, RelativePositionTable, resample_table
from foveal.backbones.profile import profile

# Millions of parameters and GMACs at 224 that the layouts were made to match; remembered, see the head of ascan.py
TO_MATCH = {"ascan_tiny": (55, 7.7), "ascan_base": (98, 16.7), "ascan_large": (173, 30.7)}
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def small(**kwargs) -> AsCAN:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_ascan", **{"num_classes": 10, **kwargs}).eval()


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter and statistic its own values, so that an exchange shows in the output."""
    generator = torch.Generator().manual_seed(3)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            x.data.uniform_(0.5, 2.0, generator=generator)
        elif x.is_floating_point():
            x.data.add_((0.5 if "table" in name else 0.1) * torch.randn(x.shape, generator=generator))
    return model


def load(state_dict: dict, classes: int = 10, **kwargs) -> AsCAN:
    """Create a model with a state dict as its pretrained weights, timm's way; ``classes`` are the weights' own."""
    overlay = dict(state_dict=state_dict, num_classes=classes)
    return timm.create_model("test_foveal_ascan", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", TO_MATCH)
def test_size_and_cost(name):
    found = profile(name)
    millions, giga = TO_MATCH[name]
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert found.macs / 1e9 == pytest.approx(giga, rel=0.02)


@pytest.mark.parametrize("name", TO_MATCH)
def test_says_that_it_is_a_reconstruction(name):
    cfg = timm.get_pretrained_cfg(name)
    assert not cfg.has_weights
    (note,) = cfg.notes
    for text in (note, foveal.backbones.ascan.__doc__.replace("\n", " ")):
        assert "reconstruction" in text
        assert "not verified" in text
    assert foveal.backbones.family(name) == "AsCAN"


def test_layout():
    """C and T as the strings say, more C early and more T late, and every stage halves the map once."""
    with torch.device("meta"):
        model = timm.create_model("ascan_base")
    kinds = {ConvBlock: "C", TransformerBlock: "T"}
    assert ["".join(kinds[type(b)] for b in stage.blocks) for stage in model.stages] == [
        "CC",
        "CCCCT",
        "CCCTTTTTTTTTT",
        "CTTTTTT",
    ]
    assert all(stage.downsample is None for stage in model.stages)
    heads = [b.attn for b in model.stages[2].blocks if isinstance(b, TransformerBlock)]
    assert {(a.num_heads, a.head_dim) for a in heads} == {(12, 32)}
    assert {a.rel_pos.window_size for a in heads} == {(14, 14)}
    first, second = model.stages[1].blocks[:2]
    assert (first.expand.conv.stride, first.shortcut.conv.stride, second.expand.conv.stride) == ((2, 2), (2, 2), (1, 1))
    assert isinstance(second.shortcut, nn.Identity)
    assert first.expand.conv.out_channels == 4 * 192
    assert first.se.fc1.out_channels == 192 // 4


def test_a_stage_that_begins_with_t():
    model = small(stages=("T", "TC", "C", "T"), embed_dims=(16, 16, 32, 64))
    assert [stage.downsample is not None for stage in model.stages] == [True, True, False, True]
    assert isinstance(model.stages[1].blocks[1].shortcut, nn.Identity)
    assert [x.shape[1:] for x in model.forward_intermediates(IMAGE, intermediates_only=True)] == [
        (16, 16, 24),
        (16, 8, 12),
        (32, 4, 6),
        (64, 2, 3),
    ]
    x = torch.randn(1, 5, 7, 16)
    stage = model.stages[1]
    halved = stage.downsample(x)
    want = F.conv2d(x.permute(0, 3, 1, 2), stage.downsample.conv.weight, stride=2, padding=1) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(halved, want.permute(0, 2, 3, 1))
    torch.testing.assert_close(stage(x), stage.blocks(halved))


@pytest.mark.parametrize(
    "arguments",
    [
        dict(norm_layer="layernorm2d", act_layer="silu"),
        dict(norm_layer="groupnorm1", act_layer="relu"),
        dict(se_ratio=0, act_layer="hard_swish"),
        dict(position="none"),
    ],
)
def test_options(arguments):
    model = small(**arguments)
    assert torch.isfinite(model(IMAGE)).all()
    names = " ".join(dict(model.named_parameters()))
    assert ("table" in names) == ("position" not in arguments)
    assert (".se." in names) == ("se_ratio" not in arguments)
    norms = {type(m).__name__ for m in model.stem.modules() if "Norm" in type(m).__name__} - {"ConvNormAct"}
    kind = {"layernorm2d": "LayerNorm2d", "groupnorm1": "GroupNorm1"}.get(arguments.get("norm_layer"), "BatchNorm2d")
    assert norms == {kind}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(stages="CCTT"), "stages .*'CCTT'"),
        (dict(stages=("CC", "CT", "T")), r"stages .*'CC', 'CT', 'T'\)"),
        (dict(stages=("CC", "CX", "T", "T")), "stage 1 .*'CX'"),
        (dict(stages=("CC", "CT", "", "T")), "stage 2 .*''"),
        (dict(stages=("CC", "ct", "T", "T")), "stage 1 .*'ct'"),
        (dict(embed_dims=(16, 32, 64)), r"embed_dims .*\(16, 32, 64\)"),
        (dict(embed_dims=(16, 16, 36, 64)), r"embed_dims\[2\] = 36 .*head_dim 8"),
        (dict(norm_layer="batchnorm"), "norm_layer .*batchnorm2d.*'batchnorm'"),
        (dict(act_layer="tanh"), "act_layer .*gelu.*'tanh'"),
        (dict(position="absolute"), "position .*bias, none.*'absolute'"),
        (dict(img_size=0), "img_size .*0"),
        (dict(global_pool="median"), "median"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_a_stage_of_c_alone_needs_no_whole_heads():
    assert small(embed_dims=(12, 16, 32, 64))(IMAGE).shape == (2, 10)


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("position", ["bias", "none"])
@pytest.mark.parametrize("size", [(4, 4), (3, 7), (1, 1)])
def test_full_attention(size, position):
    """Softmax over all pairs of positions, with the (resampled) table as bias; gradients too."""
    torch.manual_seed(0)
    H, W = size
    attn = FullAttention2d(8, 2, (4, 4) if position == "bias" else None).double()
    x = torch.randn(2, H, W, 8, dtype=torch.double, requires_grad=True)
    q, k, v = attn.qkv(x).reshape(2, H * W, 3, 2, 4).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * 4**-0.5
    if position == "bias":
        nn.init.normal_(attn.rel_pos.relative_position_bias_table)
        table = attn.rel_pos.relative_position_bias_table
        table = table if size == (4, 4) else resample_table(table, size)
        at = torch.cartesian_prod(torch.arange(H), torch.arange(W))
        offset = at[None, :] - at[:, None]  # key - query
        logits = logits + table[:, offset[..., 0] + H - 1, offset[..., 1] + W - 1]
    want = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, H, W, 8))
    got = attn(x)
    torch.testing.assert_close(got, want)
    parameters = [x, *attn.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(want.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_table_is_the_parameter_at_the_size_trained_at(monkeypatch):
    """And of the size of the map elsewhere; the kernel is the map."""
    seen = []

    def spy(q, k, v, *, kernel_size, bias, **_):
        assert kernel_size == tuple(q.shape[1:3])
        seen.append((kernel_size, bias.table))
        return v

    monkeypatch.setattr(foveal.backbones.attention.window, "neighborhood_attention", spy)
    model = small()
    tables = [m.relative_position_bias_table for m in model.modules() if isinstance(m, RelativePositionTable)]
    model(torch.randn(1, 3, 64, 64))
    assert [size for size, _ in seen] == [(8, 8), (4, 4), (2, 2), (2, 2)]
    assert all(torch.equal(table, own) for (_, table), own in zip(seen, tables, strict=True))
    seen.clear()
    model(torch.randn(1, 3, 67, 150))
    assert [size for size, _ in seen] == [(9, 19), (5, 10), (3, 5), (3, 5)]
    assert seen[0][1].shape == (2, 17, 37)


def test_set_input_size():
    model = randomized(small())
    x = torch.randn(1, 3, 96, 130)
    want = model(x)
    at_home = model(IMAGE[..., :64])
    model.set_input_size((96, 130))
    assert model.img_size == (96, 130)
    torch.testing.assert_close(model(x), want)
    sizes = [m.window_size for m in model.modules() if isinstance(m, RelativePositionTable)]
    assert sizes == [(12, 17), (6, 9), (3, 5), (3, 5)]
    assert not torch.allclose(model(IMAGE[..., :64]), at_home, atol=1e-6)  # the tables were resampled twice
    fresh = small(img_size=(96, 130))
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


@pytest.mark.parametrize("size", [0, (64, -3), (64, 64, 64), 64.0])
def test_bad_input_size(size):
    model = small()
    want = model(IMAGE)
    with pytest.raises(ValueError, match=rf"img_size .*{re.escape(repr(size))}"):
        model.set_input_size(size)
    assert model.img_size == (64, 64)
    assert torch.equal(model(IMAGE), want)


@torch.no_grad()
def test_a_kept_table_follows_the_dtype():
    """Also where the values are the same in both."""
    table = RelativePositionTable(2, (4, 4)).bfloat16()
    assert table((5, 7)).dtype == torch.bfloat16
    table.float()
    assert torch.equal(table((5, 7)), resample_table(table.relative_position_bias_table, (5, 7)))
    assert table((5, 7)).dtype == torch.float32


def test_graphs_with_a_resampled_table():
    """One graph at another size than the table's as well, and in an exported program."""
    model = randomized(small())
    torch._dynamo.reset()
    x = IMAGE[:, :, :, :33]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    torch.testing.assert_close(program.module()(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- folded BatchNorm


def test_reparameterize():
    model = randomized(small(stages=("C", "TC", "CT", "T")))  # with a downsampler
    images = [IMAGE, torch.randn(1, 3, 37, 61), torch.randn(1, 3, 1, 1)]
    want = [model(x) for x in images]
    assert model.reparameterize() is model
    for x, each in zip(images, want, strict=True):
        assert (model(x) - each).abs().max() < 1e-5 * each.abs().max()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    folded = {k: v.clone() for k, v in model.state_dict().items()}
    model.reparameterize()
    assert all(torch.equal(v, folded[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(model.train()(IMAGE), want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.freeze_batch_norm_2d])
def test_reparameterize_folds_other_batch_norms(convert):
    model = randomized(small())
    want = model(IMAGE)
    model = convert(model).eval().reparameterize()
    torch.testing.assert_close(model(IMAGE), want, rtol=1e-4, atol=1e-5)
    assert not [name for name in model.state_dict() if name.endswith("running_var")]


def test_folded_weights_need_a_folded_model():
    model = randomized(small())
    folded = copy.deepcopy(model).reparameterize()
    with pytest.raises(ValueError, match=r"reparameterize\(\)"):
        load(folded.state_dict(), num_classes=10)
    other = small().reparameterize()
    other.load_state_dict(checkpoint_filter_fn(folded.state_dict(), other))
    torch.testing.assert_close(other(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_state_dicts():
    model = randomized(small())
    torch.testing.assert_close(load(model.state_dict(), num_classes=10)(IMAGE), model(IMAGE))
    wrapped = {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}
    torch.testing.assert_close(load(wrapped, num_classes=10)(IMAGE), model(IMAGE))
    # made for another size: what set_input_size does
    larger = load(model.state_dict(), num_classes=10, img_size=(96, 130))
    x = torch.randn(1, 3, 96, 130)
    torch.testing.assert_close(larger(x), model(x))
    # dense, and a wrapped backbone of this package again
    dense = load(model.state_dict(), features_only=True, out_norm=True)
    for y, z in zip(dense(IMAGE), model.forward_intermediates(IMAGE, intermediates_only=True), strict=True):
        want = F.layer_norm(z.permute(0, 2, 3, 1), z.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(y, want)
    again = load(dense.state_dict(), features_only=True, out_norm=True)
    torch.testing.assert_close(again(IMAGE), dense(IMAGE))


def test_foreign_checkpoints_are_refused():
    state_dict = small().state_dict()
    with pytest.raises(ValueError, match=r"conv1\.weight, fc\.weight"):
        load({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, num_classes=10)
    with pytest.raises(ValueError, match=r"1 \(norm\.bias\).* none"):
        load({k: v for k, v in state_dict.items() if k != "norm.bias"}, num_classes=10)
    with pytest.raises(ValueError, match=r"none.* 1 \(stem\.2\.weight\)"):
        load({**state_dict, "stem.2.weight": torch.zeros(16)}, num_classes=3)
