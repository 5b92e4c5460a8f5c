"""What FAN and TAP-FAN have that the other families do not; the rest is in test_contract.py."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models.xcit import PositionalEncodingFourier

from foveal.backbones.attention import (
    ChannelMixing2d,
    FourierPosition,
    TokenAwarePooling2d,
    attention_diversification_loss,
)
from foveal.backbones.fan import FANBlock, checkpoint_filter_fn
from foveal.heads.build import build_backbone
from foveal.weights.names import unused_by_classifiers

PARAMETERS = {
    "fan_vit_tiny": 7_319_920,
    "fan_vit_small": 28_345_336,
    "fan_vit_base": 54_350_320,
    "fan_vit_large": 80_574_100,
    "fan_hybrid_tiny": 7_467_240,
    "fan_hybrid_small": 26_117_944,
    "fan_hybrid_base": 50_475_048,
    "fan_hybrid_large": 76_855_140,
    "tap_fan_hybrid_tiny": 7_523_752,
    "tap_fan_hybrid_base": 50_735_528,
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def created(name: str = "test_foveal_tap_fan", **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    strides, widths = zip(*((info["reduction"], info["num_chs"]) for info in model.feature_info), strict=True)
    last = model.num_features
    assert (strides, widths) == (
        ((16,) * 4, (last,) * 4) if "vit" in name else ((4, 8, 16, 16), (128, 256, last, last))
    )


# ---- formulas


def test_pooling_of_a_map_that_is_not_square():
    x, layer = randn(2, 6, 9, 8), TokenAwarePooling2d(8).eval()
    layer.proj[2].weight.data *= 30
    weights = layer.weights(x.permute(0, 3, 1, 2))
    want = torch.zeros_like(x)
    for b in range(2):
        for i in range(6):
            for j in range(9):
                for s in range(4):
                    near = [(i + s * a, j + s * c) for a in (-1, 0, 1) for c in (-1, 0, 1)] if s else [(i, j)]
                    inside = [x[b, y, z] for y, z in near if 0 <= y < 6 and 0 <= z < 9]
                    want[b, i, j] += weights[b, s, i, j] * torch.stack(inside).sum(0) / len(near)
    assert weights.max() > 0.4  # the scales differ
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_gates_of_channels():
    x, layer = 2 * randn(2, 3, 5, 8), ChannelMixing2d(8, 2, 4).eval()
    layer.temperature.data = torch.tensor([0.5, 2.0])[:, None, None]
    q, k = (t.flatten(1, 2).softmax(1) for t in (4 * layer.q(x), x))
    layer.q.weight.data *= 4
    layer.q.bias.data *= 4
    head = torch.arange(8) // 4
    k = torch.stack([k[..., head == h].mean(-1) for h in head.tolist()], -1)
    gate = (q * k).sum(1).sigmoid() * torch.tensor([0.5, 2.0])[head]
    assert gate.std() > 0.1
    torch.testing.assert_close(layer(x), gate[:, None, None] * layer.norm_v(layer.mlp_v(x)))


def test_position_is_timms():
    theirs, ours = PositionalEncodingFourier(dim=16), FourierPosition(16)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(torch.zeros(2, 16, 5, 7)), theirs(2, 5, 7))


# ---- the attention diversification loss


def naive_loss(maps, threshold=2.0):
    similar = []
    for each in maps:
        batch, _, count, _ = each.shape
        total = 0.0
        for attention in each.mean(1):
            mean = attention.mean(0)
            mean = torch.where(mean > threshold / count, mean, 0)
            for row in attention:
                row = torch.where(row > threshold / count, row, 0)
                total += float((row @ mean) / max(float(row.norm() * mean.norm()), 1e-12))
        similar.append(total / batch / count)
    return sum(similar) / (len(maps) + 1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_loss(batch):
    maps = [(4 * randn(batch, 2, 12, 12, seed=i) + 3 * randn(12, seed=9)).softmax(-1) for i in range(2)]
    assert float(attention_diversification_loss(maps)) == pytest.approx(naive_loss(maps), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (16, 32)], ids=str)
def test_loss_in_training(size, checkpointing):
    model = created().train()
    model.set_auxiliary_training()
    model.set_grad_checkpointing(checkpointing)
    for block in model.modules():
        if isinstance(block, FANBlock):  # attention that is not uniform
            block.attn.q.weight.data *= 60
            block.attn.kv.weight.data *= 20
    images = randn(1, 3, *size)
    found = []
    for module in model.modules():
        if isinstance(module, FANBlock):
            module.norm1.register_forward_hook(lambda m, i, o: found.append(o.detach()))
    logits, loss = model(images)
    blocks = [m for m in model.modules() if isinstance(m, FANBlock)]
    maps = [b.attn.weights(b.attn.q(x), b.attn.kv(x)[..., :48]) for b, x in zip(blocks, found, strict=True)]
    assert float(loss.detach()) == pytest.approx(naive_loss(maps), rel=1e-4)
    assert (float(loss.detach()) > 0) == (size != (16, 32))  # two tokens: no weight is above twice the uniform one
    loss.backward()
    gradient = model.stages[2].blocks[0].attn.q.weight.grad
    assert torch.isfinite(gradient).all() and bool(gradient.abs().max() > 0) == (size != (16, 32))
    model.eval()
    assert model(images).shape == logits.shape == (1, 5)


# ---- the class token and the maps


def test_class_token_goes_with_the_head():
    whole, maps = created().eval(), created(features_only=True).eval()
    x = randn(2, 3, 64, 96)
    assert not [name for name in maps.state_dict() if "cls_token" in name or ".attn.k." in name or "head" in name]
    torch.testing.assert_close(maps(x), whole.forward_intermediates(x, intermediates_only=True))
    sum(y.square().sum() for y in maps.train()(x)).backward()
    assert [name for name, p in maps.named_parameters() if p.grad is None] == []
    pruned = created()
    pruned.prune_intermediate_layers([3])
    with pytest.raises(ValueError, match="token"):
        pruned.reset_classifier(5, "token")
    pruned.reset_classifier(5, "avg")
    assert pruned(x).shape == (2, 5)


def test_map_of_stride_32_for_detectors():
    backbone = build_backbone("test_foveal_fan", neck="fpn", neck_kwargs={"out_channels": 32})
    assert backbone.body_spec.strides == (4, 8, 16, 32)
    assert backbone.body_spec.channels[-1] == 768
    assert build_backbone("test_foveal_fan", strides=(8, 16, 32)).spec.strides == (8, 16, 32)  # FCOS's
    published = build_backbone("test_foveal_fan", out_indices=(0, 1, 2, 3))
    assert published.spec.strides == (4, 8, 16, 16)
    with pytest.raises(ValueError, match="16, not at 4, 8"):
        build_backbone("fan_vit_tiny", depth=3, map_blocks=(0, 1, 2))


def test_wrong_arguments():
    for wrong in (dict(map_blocks=(1, 2)), dict(map_blocks=(3,)), dict(conv_depths=(1,)), dict(conv_depths=())):
        with pytest.raises(ValueError, match=r"map_blocks|conv_depths"):
            created(**wrong)
    with pytest.raises(ValueError, match=r"48.*5"):
        created(num_heads=5)


# ---- checkpoints

SPEC = json.loads((Path(__file__).parents[1] / "goldens" / "tap_fan_hybrid_tiny.json").read_text())["spec"]
VIT = {"patch_embed.proj.0.0.weight": [24, 3, 3, 3], "patch_embed.proj.6.1.running_mean": [192]}


def older(state: dict) -> dict:
    """CaiT's names of the class attention, and the position's first name."""
    state = {name.replace("pos_embed.", "pos_embeder."): x for name, x in state.items()}
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"cls_attn_blocks.{i}.attn.{part}.{kind}") for part in "qkv"]
            state[f"cls_attn_blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


FORMS = {
    "trainer's": lambda state: {"state_dict": state, "arch": "tap_fan", "epoch": 3},
    "distributed": lambda state: {"model": {f"module.{name}": x for name, x in state.items()}},
    "older": older,
    "segmenter's": lambda state: {
        "state_dict": {f"backbone.{n}": x for n, x in state.items() if not n.startswith(("norm.", "head."))}
        | {"decode_head.linear_pred.weight": torch.zeros(19, 8, 1, 1)}
    },
    "detector's": lambda state: {
        "state_dict": {f"backbone.{n}": x for n, x in state.items() if not n.startswith("head.")}
        | {"backbone.learnable_downsample.weight": torch.ones(768, 192, 3, 3)}
        | {"backbone.learnable_downsample.bias": torch.ones(768)}
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_published_names(form):
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in SPEC.items()}
    more = dict(learnable_downsample=768) if form == "detector's" else {}
    with torch.device("meta"):
        model = timm.create_model("tap_fan_hybrid_tiny", **more)
    found = checkpoint_filter_fn(FORMS[form](state), model)
    want = checkpoint_filter_fn(state, model)
    kept = [n for n in model.state_dict() if form != "segmenter's" or not n.startswith(("norm.", "head."))]
    kept = [n for n in kept if "learnable" not in n and not (form == "detector's" and n.startswith("head."))]
    assert all(torch.equal(found[name], want[name]) for name in kept)
    assert len({found[name].data_ptr() for name in kept}) == len(kept)
    assert "learnable_downsample.weight" in found or not more
    assert all(found[name].shape == x.shape for name, x in model.state_dict().items() if name in kept)


def test_a_segmenters_file_for_a_feature_network():
    """Its class token is left out, which `foveal convert --backbone` reports."""
    state = {name: torch.zeros(shape) for name, shape in SPEC.items()}
    with torch.device("meta"):
        model = timm.create_model("tap_fan_hybrid_tiny", features_only=True).model
    found = checkpoint_filter_fn({f"backbone.{name}": x for name, x in state.items()}, model)
    assert found.keys() - {"head.weight", "head.bias"} == model.state_dict().keys()
    unused = [name for name in state if unused_by_classifiers(f"backbone.{name}")]
    assert len(state) - len(unused) == len(found) - 2
    whole = timm.create_model("tap_fan_hybrid_tiny", features_only=False, num_classes=0)
    again = checkpoint_filter_fn(found, whole)
    assert torch.equal(again["class_attention.cls_token"], whole.class_attention.cls_token)


def test_names_of_a_vit():
    with torch.device("meta"):
        model = timm.create_model("fan_vit_tiny")
    own = model.state_dict()
    blocks = [f"stages.{i}.blocks.{j}" for i, count in enumerate((5, 3, 4)) for j in range(count)]
    published = {}
    for name, x in own.items():
        block = next((i for i, each in enumerate(blocks) if name.startswith(f"{each}.")), None)
        theirs = name if block is None else f"blocks.{block}{name[len(blocks[block]) :]}"
        theirs = theirs.replace("stem.pos_embed", "pos_embed").replace("stem.", "patch_embed.")
        theirs = theirs.replace("class_attention.blocks", "cls_attn_blocks").replace("class_attention.", "")
        for layer in ("conv1", "bn", "conv2"):
            theirs = theirs.replace(f".mlp_v.{layer}.", f".mlp_v.dwconv.{layer}.")
        published[theirs] = torch.full(x.shape, float(len(published)))
    assert {name: list(published[name].shape) for name in VIT} == VIT
    found = checkpoint_filter_fn(published, model)
    assert {name: float(x.flatten()[0]) for name, x in found.items()} == {n: i for i, n in enumerate(own)}
    with pytest.raises(ValueError, match=r"blocks\.12\.gamma1"):
        checkpoint_filter_fn(published | {"blocks.12.gamma1": torch.ones(192)}, model)
