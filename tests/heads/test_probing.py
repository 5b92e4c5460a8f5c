"""Probes: heads by their definitions, LARS as published, and features of frozen backbones of every layout."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from foveal.configs.schema import ProbeOptimConfig
from foveal.heads.probing import (
    AttentivePooling,
    FrozenBackbone,
    Probe,
    efficient_probe,
    from_published,
    knn,
    linear_probe,
)
from foveal.train.optim import create_optimizer


def test_attentive_pooling_by_its_definition():
    """Each query pools its own group of the projected channels."""
    torch.manual_seed(0)
    pooling, tokens = AttentivePooling(24, num_queries=4, d_out=2), torch.randn(3, 7, 24)
    nn.init.normal_(pooling.cls_token)
    weights = (pooling.cls_token[0] @ tokens.transpose(1, 2) / 24**0.5).softmax(2)
    values = pooling.v(tokens).unflatten(2, (4, 3))
    want = torch.stack([weights[:, i, :, None].mul(values[:, :, i]).sum(1) for i in range(4)], 1).flatten(1)
    torch.testing.assert_close(pooling(tokens), want)
    torch.testing.assert_close(pooling.attention(tokens), weights)


def test_parameters_of_the_published_size():
    count = sum(p.numel() for p in efficient_probe(768, 1000).parameters())
    assert count == 768 * 768 + 32 * 768 + 1000 * 769
    for dim, queries, d_out in ((768, 32, 32), (100, 32, 1), (64, 0, 1)):
        with pytest.raises(ValueError, match=rf"{dim} .*{queries} .*{d_out}"):
            efficient_probe(dim, 10, queries, d_out)


@pytest.mark.parametrize("wrapper", [dict, lambda state: {"model": state, "saved_module": "head"}])
def test_published_heads_load(wrapper):
    probe = efficient_probe(32, 5, num_queries=4, d_out=2).eval()
    tokens = torch.randn(2, 9, 32)
    torch.testing.assert_close(from_published(wrapper(probe.state_dict()))(tokens), probe(tokens))
    with pytest.raises(ValueError, match=r"0\.cls_token"):
        from_published(linear_probe(32, 5).state_dict())


def test_lars_as_published():
    """MAE's LARS: momentum over gradients that a trust ratio scales, except for those of biases."""
    torch.manual_seed(0)
    probe = linear_probe(6, 3)
    config = ProbeOptimConfig(weight_decay=0.01)
    optimizer = create_optimizer(probe, config, 512)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    own = {name: p.detach().clone() for name, p in probe.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in own.items()}
    for _ in range(3):
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        optimizer.zero_grad()
        F.cross_entropy(probe(x), y).backward()
        for name, p in probe.named_parameters():
            step = p.grad.clone()
            if p.ndim > 1:
                step += 0.01 * own[name]
                # timm divides by the norms of gradient and decay separately
                norm = p.grad.norm() + 0.01 * own[name].norm()
                step *= 0.001 * own[name].norm() / norm
            momentum[name] = 0.9 * momentum[name] + step
            own[name] = own[name] - 0.2 * momentum[name]
        optimizer.step()
    for name, p in probe.named_parameters():
        torch.testing.assert_close(p.detach(), own[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"layer_decay=0\.5"):
        probe.parameter_groups(0.0, 0.5)


# a plain ViT with class token, maps of both formats, networks of foveal, and tokens without an axis of maps
BACKBONES = {
    "test_foveal_dinat": 6,
    "test_foveal_care": 6,
    "test_resnet": 6,
    "test_efficientnet": 6,
    "test_convnext": 6,
    "swin_tiny_patch4_window7_224": 6,
    "test_vit": 24,
}
ARGUMENTS = {
    "swin_tiny_patch4_window7_224": dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), img_size=(64, 96))
}
ARGUMENTS["test_vit"] = dict(img_size=(64, 96))


QUICK = "test_foveal_dinat", "test_resnet", "test_vit", "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BACKBONES])
def test_features_of_every_layout(name):
    """On an image that is not square: the tokens in row-major order, as `forward_intermediates` has the last map."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **ARGUMENTS.get(name, {}))
    x = torch.randn(2, 3, 64, 96)
    backbone = FrozenBackbone(model, "patches")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = backbone.train()(x)
    assert tokens.shape == (2, BACKBONES[name], backbone.width)
    assert not tokens.requires_grad
    assert not any(module.training for module in backbone.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rows, columns = backbone.map_size(tokens.shape[1], 64, 96)
    assert rows * columns == tokens.shape[1]
    assert rows < columns
    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    if last.shape[1] == backbone.width:  # without a convolution after it
        torch.testing.assert_close(tokens.transpose(1, 2).unflatten(2, (rows, columns)), last)
    pooled = FrozenBackbone(model, "pooled")
    assert pooled(x).shape == (2, pooled.width)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled(x))


def test_class_tokens():
    model = timm.create_model("test_vit", img_size=64)
    x = torch.randn(1, 3, 64, 64)
    every, patches = FrozenBackbone(model, "all")(x), FrozenBackbone(model, "patches")(x)
    assert every.shape[1] == patches.shape[1] + model.num_prefix_tokens
    torch.testing.assert_close(every[:, model.num_prefix_tokens :], patches)


def test_what_is_no_map():
    backbone = FrozenBackbone(timm.create_model("test_foveal_dinat"))
    with pytest.raises(ValueError, match=r"7 .*64x96.* 32"):
        backbone.map_size(7, 64, 96)
    backbone.model.feature_info = []
    with pytest.raises(ValueError, match=r"feature_info.* 6 "):
        backbone.map_size(6, 64, 96)

    class Pooled(nn.Module):
        num_features = 8

        def forward_features(self, x):
            return x.new_zeros(len(x), 8)

    with pytest.raises(ValueError, match=r"Pooled .*\[2, 8\]"):
        FrozenBackbone(Pooled())(torch.zeros(2, 3, 8, 8))


def test_a_layout_that_is_not_declared():
    class Hidden(nn.Module):
        num_features = 8

        def forward_features(self, x):
            return x.new_zeros(len(x), 3, 5, 8)  # channels last, without output_fmt

    with pytest.raises(ValueError, match=r"\[2, 3, 5, 8\] .* 8"):
        FrozenBackbone(Hidden())(torch.zeros(2, 3, 8, 8))


def test_nearest_neighbours(monkeypatch):
    torch.manual_seed(0)
    train, labels, queries = torch.randn(50, 6), torch.randint(4, (50,)), torch.randn(9, 6)
    want = torch.zeros(9, 4)
    for i, query in enumerate(queries):
        cosines = F.cosine_similarity(train, query[None])
        for j in cosines.argsort(descending=True)[:7].tolist():
            want[i, labels[j]] += (cosines[j] / 0.1).exp()
    want /= want.sum(1, keepdim=True)
    torch.testing.assert_close(knn(train, labels, queries, 4, k=7, temperature=0.1), want)
    monkeypatch.setattr("foveal.heads.probing._CHUNK", 100)  # two queries at a time
    torch.testing.assert_close(knn(train, labels, queries, 4, k=7, temperature=0.1), want)
    for k in (0, 51):
        with pytest.raises(ValueError, match=rf"k={k} .*50"):
            knn(train, labels, queries, 4, k=k)
    with pytest.raises(ValueError, match="0"):
        knn(train, labels, queries, 4, k=1, temperature=0.0)


@pytest.mark.slow
def test_a_probe_is_exported():
    probe = efficient_probe(32, 5, num_queries=4).eval()
    assert isinstance(probe, Probe)
    x = torch.randn(2, 9, 32)
    program = torch.export.export(probe, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", min=2)},))
    y = torch.randn(2, 30, 32)
    torch.testing.assert_close(program.module()(y), probe(y))
