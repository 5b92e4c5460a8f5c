"""NAT, DiNAT, DiNAT_s and the isotropic forms: variants, dilations, padding and checkpoints."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import foveal.backbones
import foveal.backbones.attention.neighborhood
from foveal.backbones.attention import NeighborhoodAttention2d
from foveal.backbones.nat import checkpoint_filter_fn

# Published sizes in millions (DiNAT-L with the 21,841 classes of ImageNet-22K, too).
PARAMETERS = {
    "nat_mini": 19.98,
    "nat_tiny": 27.90,
    "nat_small": 50.74,
    "nat_base": 89.77,
    "dinat_mini": 19.98,
    "dinat_tiny": 27.90,
    "dinat_small": 50.72,
    "dinat_base": 89.77,
    "dinat_large": 200.94,
    "dinat_large.in22k": 232.98,
    "dinat_large_384": 200.94,
    "dinat_s_tiny": 28,
    "dinat_s_small": 50,
    "dinat_s_base": 88,
    "dinat_s_large": 197,
    "dinat_s_large_384": 197,
    "nat_isotropic_small": 22,
    "nat_isotropic_base": 86,
    "dinat_isotropic_small": 22,
    "dinat_isotropic_base": 86,
    "vitrpb_isotropic_small": 22,
    "vitrpb_isotropic_base": 86.63,  # published as 86, rounded down
}
DILATIONS = {
    "dinat_mini": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5],
    "dinat_tiny": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5],
    "dinat_small": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5],
    "dinat_base": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5],
    "dinat_large": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5],
    "dinat_large_384": [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5],
    "dinat_large_384_11x11": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5],
    "dinat_s_tiny": [[1, 8], [1, 4], [1, 2] * 3, [1, 1]],
    "dinat_s_small": [[1, 8], [1, 4], [1, 2] * 9, [1, 1]],
    "dinat_s_base": [[1, 8], [1, 4], [1, 2] * 9, [1, 1]],
    "dinat_s_large": [[1, 8], [1, 4], [1, 2] * 9, [1, 1]],
    "dinat_s_large_384": [[1, 13], [1, 6], [1, 3] * 9, [1, 1]],
    "dinat_isotropic_small": [[1, 2] * 6],
    "dinat_isotropic_base": [[1, 2] * 6],
}
DROP_PATH = {"mini": 0.2, "tiny": 0.2, "small": 0.3, "base": 0.5, "large": 0.35}
LAYER_SCALE = {"nat_small", "nat_base", "dinat_base"}
MODELS = sorted(name for name in foveal.backbones.nat.default_cfgs if not name.startswith("test_"))


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def attentions(model: nn.Module) -> list[NeighborhoodAttention2d]:
    return [m for m in model.modules() if isinstance(m, NeighborhoodAttention2d)]


def small(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_dinat", **{"num_classes": 10, **kwargs}).eval()


def load(state_dict: dict, name: str = "test_foveal_dinat", classes: int = 10, **kwargs) -> nn.Module:
    """Create a model with a state dict as its pretrained weights, timm's way; ``classes`` are the weights' own."""
    overlay = dict(state_dict=state_dict, num_classes=classes)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    millions = sum(p.numel() for p in on_meta(name).parameters()) / 1e6
    digits = 2 if isinstance(PARAMETERS[name], float) else 0
    assert round(millions, digits) == PARAMETERS[name]


def test_the_larger_kernel_adds_only_tables():
    def count(name: str) -> int:
        return sum(p.numel() for p in on_meta(name).parameters())

    heads = sum(n * h for n, h in zip((3, 4, 18, 5), (6, 12, 24, 48), strict=True))
    assert count("dinat_large_384_11x11") - count("dinat_large_384") == heads * (21**2 - 13**2)


@pytest.mark.parametrize("name", MODELS)
def test_published_configuration(name):
    model = on_meta(name)
    blocks = attentions(model)
    if name in DILATIONS:
        assert [a.dilation for a in blocks] == [d for level in DILATIONS[name] for d in level]
    else:
        assert {a.dilation for a in blocks} == {1}
    if name.startswith("vitrpb"):
        assert {a.kernel_size for a in blocks} == {(14, 14)}
    else:
        assert {a.kernel_size for a in blocks} == ({(11, 11)} if "11x11" in name else {(7, 7)})
    assert {a.head_dim for a in blocks} == {32}
    assert any("gamma1" in n for n, _ in model.named_parameters()) == (name in LAYER_SCALE)
    size = 384 if "384" in name else 224
    assert model.default_cfg["input_size"] == (3, size, size)
    assert model.default_cfg["crop_pct"] == (1.0 if size == 384 else 0.875)

    variant = name.split("_384")[0].split("_")[-1]
    rate = {"small": 0.1, "base": 0.4}[variant] if "isotropic" in name else DROP_PATH[variant]
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "drop_path")]
    assert rates[0] == 0
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, rate, len(rates), device="cpu"))
    norms = [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert set(norms) == {1e-5}


def test_names_and_families():
    assert set(MODELS) == set(PARAMETERS) - {"dinat_large.in22k"} | {"dinat_large_384_11x11"}
    assert set(MODELS) <= set(timm.list_models())
    families = {name: foveal.backbones.family(name) for name in MODELS}
    assert families["nat_small"] == "NAT"
    assert families["dinat_small"] == families["dinat_large_384_11x11"] == "DiNAT"
    assert families["dinat_s_small"] == "DiNAT_s"
    assert families["vitrpb_isotropic_base"] == families["nat_isotropic_small"] == "isotropic"
    with pytest.raises(ValueError, match="resnet50"):
        foveal.backbones.family("resnet50")


def test_pretrained_tags():
    assert timm.get_pretrained_cfg("dinat_large").tag == "in22k_ft_in1k"
    assert timm.get_pretrained_cfg("dinat_large.in22k").num_classes == 21841
    assert on_meta("dinat_large.in22k").head.out_features == 21841
    assert timm.get_pretrained_cfg("nat_mini").url.endswith("/nat/checkpoints/CLS/nat_mini.pth")


# ----------------------------------------------------------------------------------------------------------- dilations


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_large_384", "dinat_s_tiny"])
def test_auto_dilations_are_the_published_ones_at_the_published_size(name, monkeypatch):
    """The rule the published lists follow, seen at the operation; without the time of the operation."""
    seen = []

    def spy(q, k, v, *, kernel_size, dilation, **kwargs):
        assert kernel_size[0] * dilation <= q.shape[1]
        seen.append(dilation)
        return v

    monkeypatch.setattr(foveal.backbones.attention.neighborhood, "neighborhood_attention", spy)
    size = timm.get_pretrained_cfg(name).input_size
    on_meta(name, dilations="auto")(torch.empty(1, *size, device="meta"))
    assert seen == [d for level in DILATIONS[name] for d in level]


def test_auto_dilations_follow_the_input(monkeypatch):
    """DiNAT's lists for COCO, 1333x800 images: 28, 14, 7, 3 are the largest that fit."""
    seen = []
    monkeypatch.setattr(
        foveal.backbones.attention.neighborhood,
        "neighborhood_attention",
        lambda q, k, v, *, dilation, **_: seen.append(dilation) or v,
    )
    model = on_meta("dinat_s_tiny", dilations="auto")
    model(torch.empty(1, 3, 800, 1333, device="meta"))
    assert seen == [1, 28, 1, 14, *[1, 7] * 3, 1, 3]
    seen.clear()
    model(torch.empty(1, 3, 32, 32, device="meta"))
    assert set(seen) == {1}


def test_dilations_override():
    model = small(dilations=[[2, 3], [1, 1], [1, 2], [1]])
    assert [a.dilation for a in attentions(model)] == [2, 3, 1, 1, 1, 2, 1]
    assert {a.dilation for a in attentions(timm.create_model("test_foveal_nat"))} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dilations=[[1, 2], [1, 2], [1, 2], [1, 2]]), r"\[2, 2, 2, 2\].*\[2, 2, 2, 1\]"),
        (dict(dilations=[[1, 2], [1, 2]]), r"\[2, 2\] .*\[2, 2, 2, 1\]"),
        (dict(dilations=(1, 2, 1, 1)), r"dilations .*\(1, 2, 1, 1\)"),
        (dict(dilations="largest"), "'largest'"),
        (dict(dilations=[[1, 0], [1, 1], [1, 1], [1]]), "dilation .* 0"),
        (dict(dilations=[[1, 1.5], [1, 1], [1, 1], [1]]), r"dilation .* 1\.5"),
        (dict(num_heads=(3, 2, 4, 8)), "dim 16 .*num_heads 3"),
        (dict(num_heads=(1, 2)), r"depths \(2, 2, 2, 1\) .*num_heads \(1, 2\)"),
        (dict(kernel_size=0), "kernel_size .*0"),
        (dict(global_pool="median"), "median"),
        (dict(num_classes=-1), "num_classes"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nat_isotropic_small", dict(img_size=224), "img_size .*224"),
        ("vitrpb_isotropic_small", dict(dilations=(1, 2) * 6), r"dilations.*\(1, 2, 1, 2,"),
        ("dinat_isotropic_small", dict(dilations=(1, 2)), r"\[2\] .*\[12\]"),
    ],
)
def test_bad_arguments_isotropic(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta(name, **arguments)


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (5, 30), (30, 5), (13, 14)])
def test_padding_is_zeros_at_the_input(size, qkv_bias):
    torch.manual_seed(0)
    attn = NeighborhoodAttention2d(8, 2, kernel_size=(7, 5), dilation=2, qkv_bias=qkv_bias).double()
    nn.init.normal_(attn.rpb)
    if qkv_bias:
        nn.init.normal_(attn.qkv.bias)
    x = torch.randn(2, *size, 8, dtype=torch.double, requires_grad=True)
    padded = F.pad(x, (0, 0, 0, max(0, 10 - size[1]), 0, max(0, 14 - size[0])))
    want = attn(padded)[:, : size[0], : size[1]]
    got = attn(x)
    torch.testing.assert_close(got, want)
    parameters = [x, *attn.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(want.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_full_attention_is_plain_attention_with_relative_position_bias(size):
    torch.manual_seed(0)
    H, W = size
    attn = NeighborhoodAttention2d(8, 2, kernel_size=size).double()
    nn.init.normal_(attn.rpb)
    x = torch.randn(2, H, W, 8, dtype=torch.double)
    q, k, v = attn.qkv(x).reshape(2, H * W, 3, 2, 4).permute(2, 0, 3, 1, 4)
    at = torch.cartesian_prod(torch.arange(H), torch.arange(W))
    offset = at[None, :] - at[:, None]  # key - query
    bias = attn.rpb[:, offset[..., 0] + H - 1, offset[..., 1] + W - 1]
    y = ((q @ k.mT) * 4**-0.5 + bias).softmax(-1) @ v
    torch.testing.assert_close(attn(x), attn.proj(y.transpose(1, 2).reshape(2, H, W, 8)))


def test_attention_without_table():
    attn = NeighborhoodAttention2d(8, 2, 3, rel_pos_bias=False)
    with_table = NeighborhoodAttention2d(8, 2, 3)
    with_table.load_state_dict({**attn.state_dict(), "rpb": torch.zeros(2, 5, 5)})
    x = torch.randn(1, 6, 6, 8)
    torch.testing.assert_close(attn(x), with_table(x))


# --------------------------------------------------------------------------------------------------------- checkpoints


def to_transformers(state_dict: dict, prefix: str = "dinat.", head: str = "classifier.") -> dict:
    """Our names as Hugging Face transformers has them."""
    out = {}
    for own, value in state_dict.items():
        name = own.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        name = name.replace("patch_embed.norm.", "embeddings.norm.").replace("levels.", "encoder.levels.")
        name = name.replace(".blocks.", ".layers.").replace(".norm1.", ".layernorm_before.")
        name = name.replace(".norm2.", ".layernorm_after.").replace(".attn.proj.", ".attention.output.dense.")
        name = name.replace(".attn.", ".attention.self.").replace(".mlp.fc1.", ".intermediate.dense.")
        name = name.replace(".mlp.fc2.", ".output.dense.")
        if name.startswith("norm."):
            name = "layernorm." + name[5:]
        if name.startswith("head."):
            out[head + name[5:]] = value
        elif ".qkv." in name:
            for part, x in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[prefix + name.replace("qkv", part)] = x
        elif name.endswith("gamma1"):
            out[prefix + name.replace("gamma1", "layer_scale_parameters")] = torch.stack(
                [
                    value,
                    state_dict[own.replace("gamma1", "gamma2")],
                ]
            )
        elif not name.endswith("gamma2"):
            out[prefix + name] = value
    return out


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter its own values, so that an exchange shows in the output."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def test_own_and_authors_names():
    """They are the same; golden state dicts with the published names load strictly (tests/goldens)."""
    model = randomized(small())
    torch.testing.assert_close(load(model.state_dict(), num_classes=10)(IMAGE), model(IMAGE))
    wrapped = {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}
    torch.testing.assert_close(load(wrapped, num_classes=10)(IMAGE), model(IMAGE))


@pytest.mark.parametrize("layer_scale", [None, 1e-5])
@pytest.mark.parametrize("prefix", ["dinat.", "nat.", ""])
def test_transformers_names(layer_scale, prefix):
    model = randomized(small(layer_scale=layer_scale))
    got = load(to_transformers(model.state_dict(), prefix), num_classes=10, layer_scale=layer_scale)
    torch.testing.assert_close(got(IMAGE), model(IMAGE))


def test_names_are_those_of_transformers(monkeypatch):
    """A state dict of the library's own class is understood completely, shapes included."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    import natten.functional

    # the library imports these from a NATTEN that had them; only names and shapes are of interest here
    for name in ("natten2dav", "natten2dqkrpb"):
        monkeypatch.setattr(natten.functional, name, None, raising=False)
    options = dict(
        embed_dim=16, depths=[2, 2, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0,
        dilations=[[1, 5], [1, 2], [1, 1], [1]], layer_scale_init_value=1e-5, num_labels=10,
    )  # fmt: skip
    with torch.device("meta"):
        published = transformers.DinatForImageClassification(transformers.DinatConfig(**options)).state_dict()
        model = timm.create_model("test_foveal_dinat", layer_scale=1e-5, num_classes=10)
        converted = checkpoint_filter_fn(published, model)
        stages = ["stage1", "stage2", "stage3", "stage4"]
        backbone = transformers.DinatBackbone(transformers.DinatConfig(**options, out_features=stages))
        dense = timm.create_model("test_foveal_dinat", layer_scale=1e-5, out_norm=True)
        converted_dense = checkpoint_filter_fn(backbone.state_dict(), dense)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    want = {k: v.shape for k, v in dense.state_dict().items() if not k.startswith(("norm.", "head."))}
    assert {k: v.shape for k, v in converted_dense.items()} == want


@pytest.mark.parametrize("container", ["state_dict", "model"])
def test_dense_checkpoints(container):
    """mmdetection and detectron2: a norm per level, neither final norm nor classifier, and other networks beside."""
    model = randomized(small(out_norm=True))
    maps = model.forward_intermediates(IMAGE, intermediates_only=True)
    names = {f"backbone.{k}": v for k, v in model.state_dict().items() if not k.startswith(("norm.", "head."))}
    checkpoint = {container: {**names, "neck.conv.weight": torch.zeros(1)}, "meta": {}}
    got = load(checkpoint, features_only=True, out_norm=True)
    torch.testing.assert_close(got(IMAGE), maps)
    with pytest.raises(ValueError, match="out_norm=True"):
        load(checkpoint, features_only=True)
    # a wrapped backbone of this package
    wrapped = dict(got.state_dict())
    assert all(k.startswith("model.") for k in wrapped)
    torch.testing.assert_close(load(wrapped, features_only=True, out_norm=True)(IMAGE), maps)


def test_classification_weights_start_a_dense_model():
    model = randomized(small())
    got = load(model.state_dict(), features_only=True, out_norm=True)
    plain = model.forward_intermediates(IMAGE, intermediates_only=True, output_fmt="NHWC")
    for y, x in zip(got(IMAGE), plain, strict=True):
        torch.testing.assert_close(y, F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2))


def test_isotropic_checkpoints():
    """The authors store an index beside the tables; and the tables follow the input size."""
    arguments = dict(embed_dim=32, depth=2, num_heads=2, num_classes=10)
    torch.manual_seed(0)
    model = randomized(timm.create_model("vitrpb_isotropic_small", img_size=64, **arguments).eval())
    published = dict(model.state_dict())
    published["layers.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    got = load(published, "vitrpb_isotropic_small", img_size=64, **arguments)
    torch.testing.assert_close(got(IMAGE), model(IMAGE))
    larger = load(published, "vitrpb_isotropic_small", img_size=(64, 96), **arguments)
    table = F.interpolate(model.layers[1].attn.rpb[None], size=(7, 11), mode="bicubic")[0]
    torch.testing.assert_close(larger.layers[1].attn.rpb, table)


def test_other_channels_and_classes():
    model = randomized(small())
    gray = load(model.state_dict(), in_chans=1, num_classes=10)
    weight = model.patch_embed.proj[0].weight
    torch.testing.assert_close(gray.patch_embed.proj[0].weight, weight.sum(1, keepdim=True))
    other = load(model.state_dict(), num_classes=4)
    assert other(IMAGE).shape == (2, 4)
    torch.testing.assert_close(other.forward_features(IMAGE), model.forward_features(IMAGE))
    none = load(model.state_dict(), num_classes=0)
    torch.testing.assert_close(none.forward_features(IMAGE), model.forward_features(IMAGE))


def test_foreign_checkpoints_are_refused():
    model = small()
    state_dict = model.state_dict()
    with pytest.raises(ValueError, match=r"conv1\.weight, fc\.weight"):
        load({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, num_classes=10)
    with pytest.raises(ValueError, match=r"1 \(norm\.bias\).* none"):
        load({k: v for k, v in state_dict.items() if k != "norm.bias"}, num_classes=10)
    # also where timm would load leniently, because the classifier differs
    with pytest.raises(ValueError, match=r"none.* 1 \(levels\.0\.blocks\.0\.gamma1\)"):
        load({**state_dict, "levels.0.blocks.0.gamma1": torch.zeros(16)}, num_classes=3)
    with pytest.raises(ValueError, match=r"layers\.0\..*levels\.0\."):
        load(state_dict, "dinat_s_tiny", embed_dim=16, num_heads=(1, 2, 4, 8), num_classes=10)


def test_filter_changes_nothing():
    model = small(out_norm=True)
    inputs = to_transformers(small().state_dict())
    before = {k: v.clone() for k, v in inputs.items()}
    own = {k: v.clone() for k, v in model.state_dict().items()}
    checkpoint_filter_fn(inputs, model)
    torch.testing.assert_close(inputs, before)
    torch.testing.assert_close(dict(model.state_dict()), own)


def test_tables_of_another_kernel_size():
    model = randomized(small())
    state_dict = model.state_dict()
    with pytest.raises(ValueError, match=r"rpb .*5x5.*kernel_size \(3, 3\).*9x9.*kernel_size \(5, 5\)"):
        load(state_dict, kernel_size=5, num_classes=10)
    got = load(state_dict, kernel_size=5, num_classes=10, interpolate_rpb=True)
    for a, b in zip(attentions(got), attentions(model), strict=True):
        torch.testing.assert_close(a.rpb, F.interpolate(b.rpb[None], size=(9, 9), mode="bicubic")[0])
    wanted = checkpoint_filter_fn(state_dict, small(kernel_size=5), interpolate_rpb=True)
    torch.testing.assert_close(dict(got.state_dict()), wanted)


def test_large_11x11_from_7x7():
    """As the authors made their 11x11 checkpoint; names and shapes, without the memory of the model."""
    seven, eleven = on_meta("dinat_large_384"), on_meta("dinat_large_384_11x11")
    with pytest.raises(ValueError, match=r"13x13.*21x21"):
        checkpoint_filter_fn(seven.state_dict(), eleven)
    got = checkpoint_filter_fn(seven.state_dict(), eleven, interpolate_rpb=True)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in eleven.state_dict().items()}
