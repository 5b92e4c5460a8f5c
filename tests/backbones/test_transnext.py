"""TransNeXt: variants, attention to a neighborhood and a pooled map against its formula, position bias, checkpoints."""

import argparse
import re

import pytest
import timm
import torch
import torch.nn.functional as F

from foveal.backbones import transnext
from foveal.backbones.attention import AggregatedAttention2d, aggregated
from foveal.backbones.profile import profile
from foveal.backbones.transnext import TransNeXt, checkpoint_filter_fn

# parameters of the authors' code; GMACs at the default size, next to those of their README
VARIANTS = {
    "transnext_micro": (12_809_304, 2.7),
    "transnext_micro_aaaa": (13_114_008, 3.3),
    "transnext_tiny": (28_258_960, 5.7),
    "transnext_small": (49_741_564, 10.3),
    "transnext_base": (89_721_496, 18.4),
    "transnext_small.in1k_384": (49_741_564, 32.1),
    "transnext_base.in1k_384": (89_721_496, 56.3),
}
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def small(**kwargs) -> TransNeXt:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_transnext", **{"num_classes": 10, **kwargs}).eval()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * ("small" in n or "base" in n)) for n in VARIANTS]
)
def test_size_and_cost(name):
    found, (parameters, giga) = profile(name), VARIANTS[name]
    assert found.parameters == parameters
    model = timm.create_model(name)
    size = model.default_cfg["input_size"][1]
    # theirs count the MLP of the position bias, 2 -> 512 -> heads for each offset, which eval computes once for a size
    bias = 0
    for i, stage in enumerate(model.stages):
        for attention in (block.attn for block in stage.blocks):
            side = size // (4 * 2**i)
            offsets = side + (side // attention.reduction - 1) * attention.reduction
            bias += offsets**2 * 512 * (2 + attention.num_heads)
    assert (found.macs + bias) / 1e9 == pytest.approx(giga, rel=0.02)  # theirs are rounded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 1, 1)), r"depths \(1, 1, 1\).*'embed_dims': 4"),
        (dict(num_heads=(1, 2, 5, 4)), "dim 48 .*num_heads 5"),
        (dict(bias_size=16), "bias_size .*16"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


# ----------------------------------------------------------------------------------------------------------- attention


def layer(reduction: int, **kwargs) -> AggregatedAttention2d:
    torch.manual_seed(1)
    module = AggregatedAttention2d(12, 2, reduction, base_size=6, **kwargs).double()
    for p in module.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return module


def bias_of_all_pairs(module: AggregatedAttention2d, H: int, W: int, h: int, w: int) -> torch.Tensor:
    """The MLP on the offset of every pair, ``[heads, H * W, h * w]``."""
    axes = []
    for length, pooled in ((H, h), (W, w)):
        at = torch.arange(length, dtype=torch.double)
        centres = F.adaptive_avg_pool1d(at[None], pooled)[0]
        offset = (at[:, None] - centres) / (module.cpb.base_size - 1) * 8
        axes.append(offset.sign() * (1 + offset.abs()).log2() / 3)
    y, x = axes[0][:, None, :, None], axes[1][None, :, None]
    offsets = torch.stack(torch.broadcast_tensors(y, x), -1)
    return module.cpb.fc2(F.relu(module.cpb.fc1(offsets))).permute(4, 0, 1, 2, 3).flatten(3).flatten(1, 2)


def by_formula(module: AggregatedAttention2d, x: torch.Tensor) -> torch.Tensor:
    """Unfolded neighborhoods, logits of all keys at once, and one softmax."""
    B, H, W, C = x.shape
    heads, reduction = module.num_heads, module.reduction

    def split(t: torch.Tensor) -> torch.Tensor:  # B heads N D
        return t.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2)

    def unfold(t: torch.Tensor) -> torch.Tensor:  # B heads N D 9
        t = F.unfold(t.transpose(2, 3).reshape(B, C, H, W), 3, padding=1)
        return t.reshape(B, heads, C // heads, 9, H * W).permute(0, 1, 4, 2, 3)

    if reduction == 1:
        q, k, v = (split(t) for t in module.qkv(x).chunk(3, -1))
        pooled, h, w = (k, v), H, W
    else:
        q = split(module.q(x))
        k, v = (split(t) for t in module.kv(x).chunk(2, -1))
        h, w = max(1, H // reduction), max(1, W // reduction)
        y = F.adaptive_avg_pool2d(F.gelu(module.sr(x.permute(0, 3, 1, 2))), (h, w)).permute(0, 2, 3, 1)
        pooled = tuple(split(t) for t in module.kv(module.norm(y)).chunk(2, -1))
    q = F.normalize(q, dim=-1)
    ones = F.unfold(torch.ones(1, 1, H, W, dtype=x.dtype), 3, padding=1)[0].T  # N 9
    count = h * w + (ones.sum(-1) if reduction > 1 else torch.zeros(H * W, dtype=x.dtype))
    scaled = (q + module.query_embedding) * F.softplus(module.temperature) * count.log()[:, None]
    logits = scaled @ F.normalize(pooled[0], dim=-1).mT + bias_of_all_pairs(module, H, W, h, w)
    if reduction == 1:
        return module.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2).view(B, H, W, C))
    local = (scaled[..., None, :] @ unfold(F.normalize(k, dim=-1)))[..., 0, :] + module.relative_pos_bias_local[:, None]
    weights = torch.cat([local.masked_fill(ones == 0, -torch.inf), logits], -1).softmax(-1)
    learned = q @ module.learnable_tokens + module.learnable_bias
    out = ((weights[..., :9] + learned)[..., None, :] * unfold(v)).sum(-1) + weights[..., 9:] @ pooled[1]
    return module.proj(out.transpose(1, 2).flatten(2).view(B, H, W, C))


@pytest.mark.parametrize(("reduction", "size"), [(2, (6, 8)), (4, (7, 9)), (4, (3, 10)), (1, (5, 4)), (8, (1, 1))])
@pytest.mark.parametrize("entries", [aggregated.BIASES, 2000, 40])
def test_attention_is_its_formula(reduction, size, entries, monkeypatch):
    """With all gradients, also in chunks of an image or a row of queries, or of offsets."""
    monkeypatch.setattr(aggregated, "BIASES", entries)
    monkeypatch.setattr(aggregated, "KEPT", 0 if entries == 2000 else aggregated.KEPT)
    module = layer(reduction)
    x = torch.randn(2, *size, 12, dtype=torch.double, requires_grad=True)
    results = []
    for out in (module(x), by_formula(module, x)):
        results.append([out, *torch.autograd.grad(out.sin().sum(), (x, *module.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close([module(x), module(x)], [results[1][0]] * 2, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("bias_size", "kept"), [(None, 0), (8, aggregated.KEPT)])
def test_chunks_and_operators_agree(bias_size, kept, monkeypatch):
    """With gradients of the first and the second order."""
    monkeypatch.setattr(aggregated, "KEPT", kept)
    module = layer(2, bias_size=bias_size)
    x = torch.randn(2, 7, 10, 12, dtype=torch.double, requires_grad=True)
    leaves, results = (x, *module.parameters()), []
    for chunkable in (True, False):
        if not chunkable:
            monkeypatch.setattr(aggregated, "_chunkable", lambda *_: False)
        out = module(x)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), leaves, allow_unused=True)
        results.append([out, *first, *(t for t in second if t is not None)])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reduction", [1, 2])
def test_interpolated_bias(reduction):
    """First over the keys, then over the queries, of the bias of a square map."""
    module = layer(reduction, bias_size=8)
    (H, W), (h, w), t = (7, 10), (7 // reduction, 10 // reduction), 8 // reduction
    square = bias_of_all_pairs(module, 8, 8, t, t)
    keys = F.interpolate(square.unflatten(2, (t, t)), (h, w), mode="bilinear").flatten(2)
    queries = F.interpolate(keys.mT.unflatten(2, (8, 8)), (H, W), mode="bilinear").flatten(2)
    columns, index, weight = module.cpb((H, W), (h, w), square)
    bias = aggregated._take_biases(columns, 1, index, weight).unflatten(1, (H, h)).unflatten(3, (W, w))
    torch.testing.assert_close(bias.transpose(2, 3).flatten(3).flatten(1, 2), queries.mT, rtol=1e-6, atol=1e-6)
    columns, index, weight = module.cpb((8, 8), (t, t), square)
    bias = aggregated._take_biases(columns, 1, index, weight).unflatten(1, (8, t)).unflatten(3, (8, t))
    torch.testing.assert_close(bias.transpose(2, 3).flatten(3).flatten(1, 2), square, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", [1, 3000, 20000])
def test_the_mlp_in_parts(values, monkeypatch):
    """Of rows of an image, or of images, in inference."""
    model = small()
    want = model(IMAGE)
    monkeypatch.setattr(transnext, "HIDDEN", values)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGE), want, rtol=1e-5, atol=1e-6)


def test_models_with_interpolated_bias_differ_but_at_their_size():
    plain, interpolated = small(), small(bias_size=64)
    for name, p in plain.named_parameters():
        p.data.add_(torch.randn_like(p) * (".cpb." in name))
    interpolated.load_state_dict(plain.state_dict())
    for x, equal in ((IMAGE[..., :64], True), (IMAGE, False)):
        assert torch.allclose(plain(x), interpolated(x), rtol=1e-4, atol=1e-5) == equal
    interpolated = small(features_only=True, bias_size=96)
    assert [y.shape[2:] for y in interpolated(IMAGE[..., :75])] == [(16, 19), (8, 10), (4, 5), (2, 3)]


def test_the_position_bias_is_kept_in_eval_and_follows_its_parameters():
    module = layer(2).eval()
    x = torch.randn(1, 6, 8, 12, dtype=torch.double)
    with torch.no_grad():
        before, held = module(x), module.cpb.cache.nbytes
        assert held > 0
        module.cpb.fc2.weight.mul_(2)
        assert not torch.allclose(module(x), before)
    module(x).sum().backward()
    assert module.cpb.fc1.weight.grad.abs().max() > 0 and module.cpb.cache.nbytes == held


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_the_model(dtype):
    """Logits of the neighborhood, of up to 4 times the logarithm of the keys, are more precise than ``dtype``."""
    model = small()
    want = model(IMAGE)
    got = model.to(dtype)(IMAGE.to(dtype)).float()
    assert (got - want).abs().max() < 10 * torch.finfo(dtype).eps * want.abs().max()


# --------------------------------------------------------------------------------------------------------- checkpoints


def authors(name: str) -> str:
    name = name.replace(".cpb.fc", ".cpb_fc").replace(".dwconv.conv.", ".dwconv.dwconv.")
    name = re.sub(r"^stem\.", "stages.0.downsample.", name)
    if match := re.match(r"stages\.(\d)\.(downsample|blocks|norm)\.", name):
        part = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}[match[2]]
        name = f"{part}{int(match[1]) + 1}.{name[match.end() :]}"
    return name


def test_the_authors_files(tmp_path):
    """Of training, with the options of the script, and of detectors."""
    model = small()
    state = {authors(name): value for name, value in model.state_dict().items()}
    assert {"patch_embed1.proj.weight", "block1.0.attn.cpb_fc1.weight", "norm4.bias"} <= set(state)
    file = tmp_path / "transnext.pth"
    torch.save({"model": state, "optimizer": {}, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, file)
    overlay = dict(file=str(file), num_classes=10)
    loaded = timm.create_model(
        "test_foveal_transnext", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay
    ).eval()
    torch.testing.assert_close(loaded(IMAGE), model(IMAGE))
    dense = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("head.")}
    dense["rpn_head.rpn_cls.bias"] = torch.ones(3)
    found = checkpoint_filter_fn({"state_dict": dense}, model)
    assert set(model.state_dict()) - set(found) == {"head.weight", "head.bias"}


def test_files_that_do_not_fit():
    model = small()
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"1 \(stages\.0\.norm\.weight\).* none"):
        checkpoint_filter_fn({k: v for k, v in state.items() if k != "stages.0.norm.weight"}, model)
    with pytest.raises(ValueError, match=r"none.* 1 \(stages\.0\.blocks\.7\.attn\.x\)"):
        checkpoint_filter_fn({**state, "block1.7.attn.x": torch.zeros(1)}, model)


def test_what_does_not_decay():
    """As in the authors' recipe, whose learned tokens and their bias do decay."""
    names = {name.rpartition("attn.")[2] for name in small().no_weight_decay()}
    assert names == {"relative_pos_bias_local", "query_embedding", "temperature", "cpb.fc1.weight", "cpb.fc2.weight"}
