"""CARE: variants, linear attention, sizes, the two classifiers, folding of BatchNorm, checkpoints."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import foveal.backbones
from foveal.backbones.care import CARE, checkpoint_filter_fn, linear_attention
from foveal.backbones.profile import profile

# Published parameters in millions and GMACs at 224, with one more digit than printed by the authors
VARIANTS = {"care_s0": (7.34, 0.715), "care_s1": (9.60, 1.025), "care_s2": (19.48, 1.918)}
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def small(**kwargs) -> CARE:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_care", **{"num_classes": 10, **kwargs}).eval()


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter and statistic its own values, so that an exchange shows in the output."""
    generator = torch.Generator().manual_seed(3)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            x.data.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("gamma"):
            x.data.uniform_(0.1, 0.3, generator=generator)
        elif x.is_floating_point():
            x.data.add_(0.1 * torch.randn(x.shape, generator=generator))
    return model


def load(state_dict: dict, classes: int = 10, **kwargs) -> CARE:
    """Create a model with a state dict as its pretrained weights, timm's way; ``classes`` are the weights' own."""
    overlay = dict(state_dict=state_dict, num_classes=classes)
    return timm.create_model("test_foveal_care", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize("name", VARIANTS)
def test_size_and_cost(name):
    found = profile(name)
    millions, giga = VARIANTS[name]
    assert round(found.parameters / 1e6, 2) == millions
    # the two products of linear attention are counted here, and not in the figures
    assert giga < found.macs / 1e9 < giga * 1.005


def test_configuration():
    with torch.device("meta"):
        models = {name: timm.create_model(name) for name in VARIANTS}
    assert all(foveal.backbones.family(name) == "CARE" for name in models)
    last = models["care_s2"].stages[3].blocks
    assert last[-1].gamma is None and last[-1].inter_layer.inter2_fc2 is None
    assert last[-2].gamma.shape == (384,)
    assert [len(stage.blocks) for stage in models["care_s1"].stages] == [3, 6, 10, 6]
    assert [m.num_features for m in models.values()] == [1024, 1024, 1536]
    for model in models.values():
        assert not timm.models.get_pretrained_cfg(model.default_cfg["architecture"]).has_weights
        assert model.default_cfg["license"] == "none stated"
        assert "no licence" in model.default_cfg["notes"][0]
        mixers = [stage.blocks[0].token_mixer for stage in model.stages]
        assert [m.head_dim for m in mixers] == [None, None, 16, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 1, 1)), r"depths \(1, 1, 1\).*'embed_dims': 4"),
        (dict(embed_dims=(16, 18, 32, 64)), "embed_dims .*4.* 18"),
        (dict(depths=(1, 0, 1, 1)), r"depths .*1.*\(1, 0, 1, 1\)"),
        (dict(head_dims=(None, None, 3, 8)), "8 .*embed_dim 32.*head_dim=3"),
        (dict(global_pool="median"), "median"),
        (dict(num_classes=-1), "num_classes"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


# ----------------------------------------------------------------------------------------------------------- attention


def test_linear_attention_is_normalized_attention_with_a_kernel():
    """As a matrix of all pairs of positions: weights phi(q) . phi(k), each row divided by its sum."""
    torch.manual_seed(0)
    qk, v = torch.randn(2, 24, 5, 7, dtype=torch.double), torch.randn(2, 12, 5, 7, dtype=torch.double)
    q, k = (F.elu(qk) + 1).reshape(2, 2, 3, 4, 35).unbind(1)
    weights = q.mT @ k  # [B, heads, N, N]
    weights = weights / 35 / (weights.mean(-1, keepdim=True) + 1e-6)
    want = (weights @ v.reshape(2, 3, 4, 35).mT).mT.reshape(2, 12, 5, 7)
    torch.testing.assert_close(linear_attention(qk, v, 4), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_linear_attention_sums_in_float32(way):
    torch.manual_seed(0)
    qk, v = torch.randn(1, 16, 48, 48).bfloat16(), torch.randn(1, 8, 48, 48).bfloat16()
    want = linear_attention(qk.float(), v.float(), 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        got = linear_attention(qk, v, 8)
    assert torch.equal(got, want)


# --------------------------------------------------------------------------------------------------------------- sizes


def test_remainders_are_cut_off():
    """No padding in the stem and the downsamplers, as published: 67 = 4 * 16 + 3, and 95 / 4 = 23 = 2 * 11 + 1."""
    model = randomized(small())
    x = torch.randn(1, 3, 67, 95, requires_grad=True)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[2:] for m in maps] == [(16, 23), (8, 11), (4, 5), (2, 2)]
    torch.testing.assert_close(maps[0], model.stages[0](model.stem(x[:, :, :64, :92])))
    (gradient,) = torch.autograd.grad(maps[3].sum(), x)
    assert gradient[:, :, 64:].abs().max() == gradient[:, :, :, 92:].abs().max() == 0 < gradient.abs().max()


def test_small_maps_are_padded_with_zeros():
    model = randomized(small())
    x = torch.randn(1, 3, 3, 11)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[2:] for m in maps] == [(1, 2), (1, 1), (1, 1), (1, 1)]
    torch.testing.assert_close(maps[0], model.stages[0](model.stem(F.pad(x, (0, 0, 0, 1)))))
    torch.testing.assert_close(maps[1], model.stages[1](F.pad(maps[0], (0, 0, 0, 1))))
    torch.testing.assert_close(maps[2], model.stages[2](F.pad(maps[1], (0, 1, 0, 1))))


# ------------------------------------------------------------------------------------------------------ two classifiers


def test_the_answer_is_the_mean_of_two_classifiers():
    model = randomized(small())
    features = model.forward_features(IMAGE)
    pooled = F.gelu(features.mean((2, 3)))
    logits = [
        h.fc(F.layer_norm(pooled, (128,), h.norm.weight, h.norm.bias, 1e-6)) for h in (model.head, model.dist_head)
    ]
    torch.testing.assert_close(model(IMAGE), (logits[0] + logits[1]) / 2)
    assert not torch.allclose(*logits)


def test_distilled_training():
    model = randomized(small())
    want = model(IMAGE)
    model.set_distilled_training(True)
    torch.testing.assert_close(model(IMAGE), want)  # evaluation: the mean, always
    for m in model.modules():
        m.training = not isinstance(m, nn.BatchNorm2d)
    logits, distilled = model(IMAGE)
    torch.testing.assert_close((logits + distilled) / 2, want)
    assert not torch.allclose(logits, distilled)
    model.set_distilled_training(False)
    torch.testing.assert_close(model(IMAGE), want)


def test_reset_classifier_resets_both():
    model = small()
    before = [h.fc.weight.clone() for h in (model.head, model.dist_head)]
    model.double().reset_classifier(10)
    assert all(not torch.equal(h.fc.weight, w) for h, w in zip((model.head, model.dist_head), before, strict=True))
    assert model(IMAGE.double()).dtype == torch.double
    assert tuple(model.get_classifier()) == (model.head.fc, model.dist_head.fc)
    model.float().reset_classifier(5, "catavgmax")
    assert (model(IMAGE).shape, model.head_hidden_size) == ((2, 5), 256)
    model.reset_classifier(5, "")
    assert model(IMAGE).shape == (2, 5, 2, 3)
    model.reset_classifier(0)
    assert model(IMAGE).shape == (2, 128, 2, 3)
    assert not [name for name in model.state_dict() if "head" in name]


# ---------------------------------------------------------------------------------------------------- folded BatchNorm


def test_reparameterize():
    model = randomized(small(out_norm=True))
    images = [IMAGE, torch.randn(1, 3, 37, 61), torch.randn(1, 3, 1, 1)]
    want = [model.forward_intermediates(x)[1] + [model(x)] for x in images]
    plain = copy.deepcopy(model)
    assert model.reparameterize() is model
    for x, tensors in zip(images, want, strict=True):
        for got, each in zip(model.forward_intermediates(x)[1] + [model(x)], tensors, strict=True):
            assert (got - each).abs().max() < 1e-5 * each.abs().max()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    folded = {k: v.clone() for k, v in model.state_dict().items()}
    assert set(folded) == {
        k for k in plain.state_dict() if f"{k.rpartition('.')[0]}.running_var" not in plain.state_dict()
    }
    model.reparameterize()
    assert all(torch.equal(v, folded[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(model.train()(IMAGE), want[0][-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.freeze_batch_norm_2d])
def test_reparameterize_folds_other_batch_norms(convert):
    model = randomized(small())
    want = model(IMAGE)
    model = convert(model).eval().reparameterize()
    torch.testing.assert_close(model(IMAGE), want, rtol=1e-4, atol=1e-5)
    assert not [name for name in model.state_dict() if name.endswith("running_var")]


def test_reparameterized_features():
    model = randomized(small(features_only=True, out_indices=(1, 2)))
    want = model(IMAGE)
    model.model.reparameterize()
    torch.testing.assert_close(model(IMAGE), want, rtol=1e-4, atol=1e-5)


def test_state_dicts_load_into_both_forms():
    model = randomized(small())
    want = model(IMAGE)
    folded = copy.deepcopy(model).reparameterize()
    torch.testing.assert_close(load(folded.state_dict(), num_classes=10)(IMAGE), want, rtol=1e-4, atol=1e-5)
    other = small().reparameterize()
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    torch.testing.assert_close(other(IMAGE), folded(IMAGE))
    other.load_state_dict(checkpoint_filter_fn(folded.state_dict(), other))
    torch.testing.assert_close(other(IMAGE), folded(IMAGE))


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_own_and_authors_names():
    """They are the same; golden state dicts with the published names load strictly (tests/goldens)."""
    model = randomized(small())
    torch.testing.assert_close(load(model.state_dict(), num_classes=10)(IMAGE), model(IMAGE))
    wrapped = {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}
    torch.testing.assert_close(load(wrapped, num_classes=10)(IMAGE), model(IMAGE))


def test_a_downloaded_file(tmp_path):
    """What the notes say: the authors' training script wrote a dictionary with the weights under state_dict."""
    model = randomized(small())
    path = tmp_path / "CARETrans.pth.tar"
    torch.save({"epoch": 309, "arch": "CARETrans_S0", "state_dict": model.state_dict()}, path)
    overlay = dict(file=str(path), num_classes=10)
    got = timm.create_model("test_foveal_care", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(got.eval()(IMAGE), model(IMAGE))


def test_other_uses_of_the_weights():
    model = randomized(small())
    state_dict = model.state_dict()
    features = model.forward_features(IMAGE)
    other = load(state_dict, num_classes=4)
    assert other(IMAGE).shape == (2, 4)
    torch.testing.assert_close(other.forward_features(IMAGE), features)
    torch.testing.assert_close(load(state_dict, num_classes=0).forward_features(IMAGE), features)
    gray = load(state_dict, in_chans=1, num_classes=10)
    torch.testing.assert_close(gray.stem[0].weight, model.stem[0].weight.sum(1, keepdim=True))
    dense = load(state_dict, features_only=True, out_norm=True)
    for y, x in zip(dense(IMAGE), model.forward_intermediates(IMAGE, intermediates_only=True), strict=True):
        want = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(y, want)
    again = load(dense.state_dict(), features_only=True, out_norm=True)  # its names begin with "model."
    torch.testing.assert_close(again(IMAGE), dense(IMAGE))


def test_foreign_checkpoints_are_refused():
    state_dict = small().state_dict()
    with pytest.raises(ValueError, match=r"conv1\.weight, fc\.weight"):
        load({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, num_classes=10)
    with pytest.raises(ValueError, match=r"1 \(stages\.0\.blocks\.0\.gamma\).* none"):
        load({k: v for k, v in state_dict.items() if k != "stages.0.blocks.0.gamma"}, num_classes=10)
    # also where timm would load leniently, because the classifier differs
    with pytest.raises(ValueError, match=r"none.* 1 \(stem\.2\.weight\)"):
        load({**state_dict, "stem.2.weight": torch.zeros(16)}, num_classes=3)


def test_parameters_without_statistics_are_refused():
    """BatchNorms of which a part is there were not folded, and must not be made neutral."""
    model = randomized(small())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"inter1_norm\.num_batches_tracked.* none"):
        load(parameters, num_classes=10)
    folded = small().reparameterize()
    with pytest.raises(ValueError, match=r"none.* 48 .*inter1_norm\.bias"):
        checkpoint_filter_fn({k: v for k, v in model.state_dict().items() if "running" not in k}, folded)
    with pytest.raises(ValueError, match=r"bn1\.running_var .*bn1\.weight, bn1\.running_mean"):
        checkpoint_filter_fn({"bn1.running_var": torch.ones(1), "bn1.bias": torch.ones(1)}, folded)


def test_filter_changes_nothing():
    model = small(out_norm=True)
    inputs = randomized(small()).state_dict()
    before = {k: v.clone() for k, v in inputs.items()}
    own = {k: v.clone() for k, v in model.state_dict().items()}
    for target in (model, small().reparameterize()):
        checkpoint_filter_fn(inputs, target)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[k], v) for k, v in before.items())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items())
