"""SG-Former: variants, both attentions by their definition, other sizes, order and rounding, checkpoints."""

import argparse
import math

import pytest
import timm
import torch
import torch.nn.functional as F

from foveal.backbones.attention import GuidedAttention2d, HybridAttention2d, merge_ranks
from foveal.backbones.profile import profile
from foveal.backbones.sgformer import SGFormer, checkpoint_filter_fn
from foveal.kernels import neighborhood_attention

# Parameters, and GMACs at 224, of the authors' code
VARIANTS = {
    "sgformer_s": (22_545_981, 4.78),
    "sgformer_m": (38_689_316, 7.43),
    "sgformer_b": (77_950_293, 15.54),
}


PARTS = {3: ((0, 1, 4), (1, 3, 4), (3, 4, 4)), 2: ((0, 1, 2), (1, 2, 2))}  # first, last, of how many


def small(**kwargs) -> SGFormer:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_sgformer", **{"num_classes": 10, **kwargs}).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize("name", VARIANTS)
def test_size_and_cost(name):
    found = profile(name)
    assert (found.parameters, round(found.macs / 1e9, 2)) == VARIANTS[name]


def test_configuration():
    with torch.device("meta"):
        model = timm.create_model("sgformer_b")
    kinds = [[type(block.attn).__name__[:6] for block in stage.blocks] for stage in model.stages]
    assert kinds == [["Hybrid", "Guided"] * n for n in (2, 3, 12)] + [["SelfAt"] * 2]
    assert model.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.4)
    assert model.default_cfg["license"] == "none stated" and "no licence" in model.default_cfg["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 1)), r"depths=\(1, 1\)"),
        (dict(num_heads=(2, 3, 4, 4)), r"num_heads=\(2, 3"),
        (dict(num_heads=(2, 2, 4, 5)), r"num_heads=\(2, 2, 4, 5"),
        (dict(lengths=((8, 4, 2), (4, 2, 1), (2,))), r"lengths .*\(2,\)"),
        (dict(img_size=0), "img_size"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


# ----------------------------------------------------------------------------------------------------------- attention


def softmax_attention(q, k, v):
    """Of ``[N, heads, D]`` to ``[M, heads, D]``: outputs ``[N, heads * D]``, and the mean weight of each key."""
    weights = torch.einsum("nhd,mhd->hnm", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v).flatten(1), weights.mean((0, 1))


def hybrid_by_definition(x: torch.Tensor, attention: HybridAttention2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Window by window; ``x`` is one image ``[H, W, C]``."""
    (H, W), heads, r = x.shape[:2], attention.num_heads // 2, attention.ratio
    padded = F.pad(x, (0, 0, 0, -W % r, 0, -H % r)).permute(2, 0, 1)
    reduced = attention.sr(padded).permute(1, 2, 0)
    k, v = attention.kv1(F.gelu(attention.norm(reduced))).flatten(0, 1).unflatten(-1, (2, heads, -1)).unbind(1)
    y, received = softmax_attention(attention.q1(x).flatten(0, 1).unflatten(-1, (heads, -1)), k, v)
    y, received = y.unflatten(0, (H, W)), received.view(reduced.shape[:2])
    significance = torch.stack([torch.stack([received[i // r, j // r] for j in range(W)]) for i in range(H)])
    q, (k, v) = attention.q2(x).unflatten(-1, (heads, -1)), attention.kv2(x).unflatten(-1, (2, heads, -1)).unbind(2)
    fine, size = torch.empty_like(y), attention.window_size
    for at in ((slice(i, i + size), slice(j, j + size)) for i in range(0, H, size) for j in range(0, W, size)):
        out, received = softmax_attention(*(t[at].flatten(0, 1) for t in (q, k, v)))
        fine[at] = out.view_as(fine[at])
        significance[at] += received.view_as(significance[at])
    return torch.cat([y, fine], -1), significance.detach()


def with_convolution(y: torch.Tensor, x: torch.Tensor, attention) -> torch.Tensor:
    """The sum with the depthwise convolution of the input, projected; both ``[B, H, W, C]``."""
    return attention.proj(
        y + attention.lepe_conv.conv(attention.lepe_linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    )


@pytest.mark.parametrize("shape", [(6, 9), (7, 4), (2, 1)])
def test_hybrid_attention_by_its_definition(shape):
    """Also of maps that neither the ratio nor the window divides."""
    torch.manual_seed(0)
    attention = HybridAttention2d(8, 4, ratio=2, window_size=3).double()
    x = (3 * torch.randn(2, *shape, 8, dtype=torch.double)).requires_grad_(True)
    got, significance = attention(x)
    ys, maps = zip(*(hybrid_by_definition(each, attention) for each in x), strict=True)
    want = with_convolution(torch.stack(ys), x, attention)
    torch.testing.assert_close((got, significance), (want, torch.stack(maps)))
    assert not significance.requires_grad
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (got, want)))


def test_windows_are_those_of_the_kernels():
    torch.manual_seed(0)
    attention = HybridAttention2d(8, 4, ratio=2)
    x = torch.randn(2, 9, 16, 8)
    q, k, v = (t.unflatten(-1, (2, -1)) for t in (attention.q2(x), *attention.kv2(x).chunk(2, -1)))
    want = neighborhood_attention(q, k, v, kernel_size=7, stride=7, boundary="mask")
    torch.testing.assert_close(attention._windows(x)[0], want.flatten(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_significance_is_float32_in_half_precision(dtype):
    attention = HybridAttention2d(8, 4, ratio=2).to(dtype)
    x = torch.randn(1, 9, 8, 8).to(dtype)
    y, significance = attention(x)
    assert (y.dtype, significance.dtype) == (dtype, torch.float32)
    with torch.autocast("cpu", dtype):
        y, significance = attention.float()(x.float())
    assert (y.dtype, significance.dtype) == (dtype, torch.float32)


def ranks_by_definition(count: int, part: tuple[int, int, int], length: int) -> list[int]:
    """Those of the part, evenly spread over whole groups."""
    first, last = math.floor(count * part[0] / part[2]), math.ceil(count * part[1] / part[2])
    total = math.ceil((last - first) / length) * length
    return [first + at * (last - first) // total for at in range(total)]


@pytest.mark.parametrize(
    ("lengths", "shape", "tokens"),
    [((6, 4, 3), (6, 8), 12), ((2, 1), (4, 3), 9), ((6, 4, 3), (3, 5), 6), ((2, 1), (3, 3), 8), ((4, 2, 1), (1, 1), 3)],
)
def test_guided_attention_by_its_definition(lengths, shape, tokens):
    """Token by token; the first two maps fill the groups."""
    torch.manual_seed(0)
    attention = GuidedAttention2d(8, 4, lengths).double()
    x = torch.randn(2, *shape, 8, dtype=torch.double, requires_grad=True)
    significance, outputs = torch.rand(2, *shape, dtype=torch.double), []
    for each, received in zip(x, significance, strict=True):
        positions, merged = each.flatten(0, 1)[received.flatten().argsort()], []
        for part, layer in zip(PARTS[len(lengths)], attention.merge, strict=True):
            groups = positions[ranks_by_definition(len(positions), part, layer.in_features)].split(layer.in_features)
            merged += [layer.weight[0] @ group + layer.bias for group in groups]
        assert len(merged) == tokens
        halves = [kv(torch.stack(merged)).unflatten(-1, (2, 2, -1)).unbind(1) for kv in (attention.kv1, attention.kv2)]
        k, v = (torch.cat(pair, 1) for pair in zip(*halves, strict=True))
        outputs.append(softmax_attention(attention.q(each).flatten(0, 1).unflatten(-1, (4, -1)), k, v)[0].view_as(each))
    want = with_convolution(torch.stack(outputs), x, attention)
    got, after = attention(x, significance)
    torch.testing.assert_close(got, want)
    assert after is None
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (got, want)))


@pytest.mark.parametrize("scale", [1, 4])
def test_ranks_are_those_of_the_authors(scale):
    """At 224, and of four times as many positions: each once, in order."""
    for count, lengths in ((3136, (196, 56, 28)), (784, (49, 14, 7)), (196, (2, 1))):
        parts = zip(PARTS[len(lengths)], lengths, strict=True)
        ranks = torch.cat([merge_ranks(scale * count, part, length, torch.device("cpu")) for part, length in parts])
        assert torch.equal(ranks, torch.arange(scale * count))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 97, 1000])
@pytest.mark.parametrize("lengths", [(196, 56, 28), (49, 14, 7), (2, 1)])
def test_ranks_of_any_count(count, lengths):
    """Whole groups of every part, at least one, in order; no position is left out or more often than others twice."""
    times = torch.zeros(count, dtype=torch.long)
    for part, length in zip(PARTS[len(lengths)], lengths, strict=True):
        ranks = merge_ranks(count, part, length, torch.device("cpu"))
        assert len(ranks) % length == 0 < len(ranks)
        assert torch.equal(ranks, ranks.sort()[0])
        each = ranks.bincount(minlength=count)
        assert each[each > 0].max() - each[each > 0].min() <= 1
        times += each
    assert times.min() > 0


# --------------------------------------------------------------------------------------------------- sizes, precision


def test_the_position_embedding_is_resampled():
    model = small()
    x = images(1, 3, 40, 72)
    want = F.interpolate(model.stem.pos_embed.permute(0, 3, 1, 2), size=(10, 18), mode="bicubic").permute(0, 2, 3, 1)
    got = model.stem(x)
    with torch.no_grad():
        model.stem.pos_embed.zero_()
    torch.testing.assert_close(got - model.stem(x), want)
    assert small(img_size=(96, 40)).stem.pos_embed.shape == (1, 24, 10, 16)


def test_float64_is_stable():
    """In another batch and with noise, at a size that groups do not fill; in float32, order and outputs may change."""
    model = small().double()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x = images(3, 3, 72, 100).double()
    want = model(x)
    torch.testing.assert_close(torch.cat([model(each[None]) for each in x]), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x * (1 + 1e-14)), want, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- checkpoints


def authors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under the authors' names."""
    parts = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}
    result = {}
    for name, value in state.items():
        name = name.replace("stem.pos_embed", "pos_embed").replace("stem.", "patch_embed1.")
        if name.startswith("stages."):
            _, stage, part, rest = name.split(".", 3)
            name = f"{parts[part]}{int(stage) + 1}.{rest}"
        if "patch_embed" in name and name != "patch_embed1.norm.weight" and name != "patch_embed1.norm.bias":
            name = name.replace(".conv.weight", ".c.weight").replace(".norm.", ".bn.")
        for i in range(3):
            name = name.replace(f"merge.{i}", f"f{i + 1}")
        name = name.replace("lepe_conv.conv.", "lepe_conv.").replace("mlp.dwconv.conv.", "mlp.dwconv.dwconv.")
        result[name] = value.flatten(1, 2) if name == "pos_embed" else value
    return result


def test_authors_checkpoints():
    """As their training writes them, with averaged weights."""
    own = small().state_dict()
    theirs = authors(own)
    assert len(set(theirs) & set(own)) == 2  # the head
    raw = {name: value + 1 for name, value in theirs.items()}
    options = argparse.Namespace(lr=0.1)
    found = checkpoint_filter_fn({"state_dict": raw, "state_dict_ema": theirs, "args": options}, small())
    assert set(found) == set(own) and all(torch.equal(found[name], value) for name, value in own.items())
    larger = checkpoint_filter_fn(theirs, small(img_size=128))["stem.pos_embed"]
    want = F.interpolate(own["stem.pos_embed"].permute(0, 3, 1, 2), size=(32, 32), mode="bicubic")
    torch.testing.assert_close(larger, want.permute(0, 2, 3, 1))


def test_checkpoints_that_do_not_fit():
    state = authors(small().state_dict())
    with pytest.raises(ValueError, match=r"1 \(stages\.0\.norm\.bias\).* none"):
        checkpoint_filter_fn({k: v for k, v in state.items() if k != "norm1.bias"}, small())
    with pytest.raises(ValueError, match=r"none, unexpected 1 \(x\)"):
        checkpoint_filter_fn({**state, "x": torch.zeros(1)}, small())
