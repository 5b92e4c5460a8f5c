"""OverLoCK: its three forms, its checkpoints, its dense design, and the mixing itself. Published outputs: goldens."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from foveal.backbones import overlock
from foveal.backbones.attention import context_mixing, mixing
from foveal.backbones.overlock import BRANCHES, DilatedReparam, _enlarged, checkpoint_filter_fn
from foveal.kernels.aggregate.softmax import expand_table
from foveal.kernels.window import Window

NAME = "test_foveal_overlock"


def create(name: str = NAME, **kwargs) -> torch.nn.Module:
    """A model with nothing at its neutral value."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 10, **kwargs}).eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.add_(0.1 * torch.randn_like(value)).abs_() if "var" in key else value.add_(
                0.1 * torch.randn_like(value)
            )
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def from_file(path, state_dict, **kwargs) -> torch.nn.Module:
    torch.save(state_dict, path)
    overlay = dict(file=str(path), num_classes=10)
    return timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 10, **kwargs}
    ).eval()


@pytest.mark.parametrize(
    ("name", "training", "without_aux", "folded"),
    [
        ("overlock_xt", 17.31, 16.97, 16.45),
        ("overlock_t", 34.99, 34.48, 33.47),
        ("overlock_s", 58.31, 57.80, 56.16),
        ("overlock_b", 98.01, 97.43, 94.94),
    ],
)
def test_parameter_counts(name, training, without_aux, folded):
    def millions(model):
        return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)

    with torch.device("meta"):
        model = timm.create_model(name, aux_head=True)
        assert millions(timm.create_model(name)) == pytest.approx(without_aux, abs=0.011)
    assert millions(model) == training
    assert millions(model.reparameterize()) == folded


@pytest.mark.parametrize("kernel_size", BRANCHES)
def test_branches_fold_into_one_convolution(kernel_size):
    torch.manual_seed(0)
    block = DilatedReparam(8, kernel_size).double()
    for bn in (bn for _, bn in block.branches()):
        for value in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
            value.uniform_(0.5, 2)
    x = torch.randn(2, 8, 19, 23, dtype=torch.double)
    block.eval()
    want = sum(bn(conv(x)) for conv, bn in block.branches())
    torch.testing.assert_close(block(x), want)
    block.reparameterize()
    assert set(block.state_dict()) == {"lk_origin.weight", "lk_origin.bias"}
    torch.testing.assert_close(block(x), want)


def test_branches_see_the_batch_in_training():
    torch.manual_seed(0)
    block = DilatedReparam(4, 7).train()
    x = torch.randn(3, 4, 9, 9)
    want = sum(F.batch_norm(conv(x), None, None, training=True) for conv, _ in block.branches())
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)
    assert all(bn.num_batches_tracked == 1 for _, bn in block.branches())


def test_reparameterize(monkeypatch):
    model = create(aux_head=True)
    x = images(2, 3, 128, 96)
    small = model(x[:, :, :40, :50])
    with monkeypatch.context() as patch:
        patch.setattr(DilatedReparam, "forward", lambda self, x: sum(bn(conv(x)) for conv, bn in self.branches()))
        want = model(x)
    assert model.reparameterize() is model
    assert (model(x) - want).abs().max() < 1e-5 * want.abs().max()
    torch.testing.assert_close(model(x[:, :, :40, :50]), small)
    assert model.aux_head is None and not model.auxiliary_training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.testing.assert_close(model.reparameterize().state_dict(), before)
    model.train()(x)  # trains on, without the branches


def test_reparameterized_models_stay_frozen_and_in_their_mode():
    model = create(aux_head=True).requires_grad_(False)
    model.sub_blocks4.requires_grad_(True)
    model.reparameterize()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("sub_blocks4.")}
    assert not any(module.training for module in model.modules())


def test_made_without_memory():
    """On the meta device, materialized, and filled by a state dict: nothing beside it is needed."""
    model = create()
    x = images(1, 3, 64, 64)
    with torch.device("meta"):
        assigned, filled = timm.create_model(NAME, num_classes=10), timm.create_model(NAME, num_classes=10)
    assigned.load_state_dict(model.state_dict(), assign=True)
    filled.to_empty(device="cpu").load_state_dict(model.state_dict())
    for other in (assigned, filled):
        torch.testing.assert_close(other.eval()(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace():
    model = create().reparameterize()
    x = images(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x[:1])(x), model(x))


def test_both_published_forms_load(tmp_path):
    """The authors' training leaves its auxiliary head in the checkpoint; the other form has neither it nor branches."""
    model = create(aux_head=True)
    x = images(2, 3, 64, 64)
    want = model(x)
    training = {name: value.clone() for name, value in model.state_dict().items()}
    assert {"aux_head.2.weight", "blocks1.0.proj.1.dil_conv_k5_1.weight"} < set(training)
    plain = from_file(tmp_path / "training.pth", {"state_dict": training})
    assert plain.aux_head is None and not plain.reparameterized
    torch.testing.assert_close(plain(x), want)
    whole = from_file(tmp_path / "training.pth", training, aux_head=True)
    torch.testing.assert_close(whole.aux_head.state_dict(), model.aux_head.state_dict())

    folded = copy.deepcopy(model).reparameterize().state_dict()
    assert not any("bn" in name or "dil_" in name or "aux" in name for name in folded)
    deployed = from_file(tmp_path / "folded.pth", folded)
    assert deployed.reparameterized
    torch.testing.assert_close(deployed(x), want, rtol=1e-4, atol=1e-5)
    # a model in that form takes the other one folded
    other = create().reparameterize()
    other.load_state_dict(checkpoint_filter_fn(training, other))
    torch.testing.assert_close(other(x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="aux_head=True"):
        from_file(tmp_path / "folded.pth", folded, aux_head=True)


def test_other_classes_and_channels(tmp_path):
    training = create(aux_head=True).state_dict()
    model = from_file(tmp_path / "weights.pth", training, num_classes=7, in_chans=1, aux_head=True)
    logits, auxiliary = model.train()(images(2, 1, 64, 64))
    assert (logits.shape, auxiliary.shape) == ((2, 7), (2, 7))
    torch.testing.assert_close(model.blocks4[0].proj[8].weight, training["blocks4.0.proj.8.weight"])
    headless = from_file(tmp_path / "weights.pth", training, num_classes=0, aux_head=True)
    torch.testing.assert_close(headless.aux_head[0].weight, training["aux_head.0.weight"])


def test_other_checkpoints_are_refused(tmp_path):
    state_dict = create().state_dict()
    del state_dict["high_level_proj.bias"]
    with pytest.raises(ValueError, match=r"1 \(high_level_proj\.bias\).* none"):
        from_file(tmp_path / "weights.pth", state_dict)


def test_dense_design(tmp_path):
    dense = create(out_norm=True)
    assert [norm.normalized_shape[0] for norm in dense.extra_norm] == [16, 24, 44, 60, 48]
    x = images(2, 3, 128, 96)
    raw, overview = dense._stages(x)
    want = [norm(y) for norm, y in zip(dense.extra_norm, raw, strict=False)]
    want[3] = want[3] + dense.h_proj(dense.extra_norm[4](overview))
    torch.testing.assert_close(dense.forward_intermediates(x, intermediates_only=True), want)
    torch.testing.assert_close(dense(x), dense.forward_head(raw[3]))  # the classifier does not see the norms

    # as the authors' detection and segmentation checkpoints have it
    published = {f"backbone.{n}": v for n, v in dense.state_dict().items() if not n.startswith("head.")}
    published["neck.lateral_convs.0.weight"] = torch.zeros(1)
    model = from_file(tmp_path / "dense.pth", {"state_dict": published}, features_only=True, out_norm=True)
    torch.testing.assert_close(model(x), want)
    some = from_file(tmp_path / "dense.pth", published, features_only=True, out_norm=True, out_indices=(0, 2))
    torch.testing.assert_close(some(x), [want[0], want[2]])
    with pytest.raises(ValueError, match="out_norm=True"):
        from_file(tmp_path / "dense.pth", published, features_only=True)
    # a classification checkpoint starts a dense model
    model = from_file(tmp_path / "cls.pth", create(aux_head=True).state_dict(), features_only=True, out_norm=True)
    assert float(model.model.h_proj[1].weight.detach().max()) == pytest.approx(1e-5)


def test_segmentation_form(tmp_path):
    """The authors' segmentation models have four norms and do not add the overview-net's map."""
    dense = create(out_norm=True, out_overview=False)
    assert len(dense.extra_norm) == 4 and dense.h_proj is None
    x = images(2, 3, 128, 96)
    want = [norm(y) for norm, y in zip(dense.extra_norm, dense._stages(x)[0], strict=True)]
    torch.testing.assert_close(dense.forward_intermediates(x, intermediates_only=True), want)
    published = {f"backbone.{n}": v for n, v in dense.state_dict().items() if not n.startswith("head.")}
    assert not any(name.startswith(("backbone.h_proj", "backbone.extra_norm.4")) for name in published)
    for arguments in (dict(), dict(out_overview=False)):
        model = from_file(tmp_path / "dense.pth", published, features_only=True, out_norm=True, **arguments)
        torch.testing.assert_close(model(x), want)
    some = from_file(tmp_path / "dense.pth", published, features_only=True, out_norm=True, out_indices=(1, 3))
    torch.testing.assert_close(some(x), [want[1], want[3]])
    detection = create(out_norm=True).state_dict()
    with pytest.raises(ValueError, match=r"extra_norm\.4"):
        from_file(tmp_path / "dense.pth", detection, out_norm=True, out_overview=False)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("t", [64, 128, 384, 640]), ("s", [64, 128, 448, 640]), ("b", [80, 160, 528, 720])],
)
def test_dense_channels(name, channels):
    with torch.device("meta"):
        model = timm.create_model(f"overlock_{name}", features_only=True, out_norm=True)
    assert model.feature_info.channels() == channels
    assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_auxiliary_head_trains_when_asked():
    x = images(2, 3, 64, 64)
    model = create(aux_head=True).train()
    logits, auxiliary = model(x)
    assert logits.shape == auxiliary.shape == (2, 10)
    auxiliary.sum().backward()
    assert model.aux_head[2].weight.grad is not None and model.head[4].weight.grad is None
    model.set_auxiliary_training(False)
    assert model(x).shape == (2, 10)
    model.set_auxiliary_training()
    assert model.eval()(x).shape == (2, 10)
    model.reset_classifier(3)
    assert [y.shape for y in model.train()(x)] == [(2, 3), (2, 3)]
    plain = create().train()
    assert plain(x).shape == (2, 10)
    plain.set_auxiliary_training(False)
    with pytest.raises(ValueError, match="aux_head=True"):
        plain.set_auxiliary_training()


def test_head_with_other_pooling():
    x = images(2, 3, 64, 96)
    model = create(global_pool="catavgmax")
    assert (model(x).shape, model.head_hidden_size, model.num_features) == ((2, 10), 128, 60)
    model.reset_classifier(10, "")
    assert model(x).shape == (2, 10, 2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 64, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kernel_sizes=(7, 7, 7, 9)), r"kernel_size .*\(7, 13, 15, 17\).* 9"),
        (dict(depths=(1, 1, 1)), r"depths .*4.*\(1, 1, 1\)"),
        (dict(num_heads=(2, 5)), "48 .* 5 "),
        (dict(embed_dims=(16, 24, 32, 46)), r"embed_dims .*\(16, 24, 32, 46\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create(**arguments)


def test_gradients_reach_the_branches_in_evaluation():
    """Frozen statistics, as detectors are trained."""
    model = create()
    model(images(2, 3, 64, 64)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_small_maps_are_enlarged_in_proportion():
    assert _enlarged(12, 20, 13) == (13, 21)
    assert _enlarged(20, 12, 13) == (21, 13)
    assert _enlarged(6, 10, 7) == (7, 11)
    assert _enlarged(1, 1, 7) == (7, 7)
    for least in (7, 13):
        for height in range(1, least):
            for width in range(1, 40):
                for size in (_enlarged(height, width, least), _enlarged(width, height, least)):
                    assert min(size) == least


def naive_mixing(q, k, v, proj, tables, scale):
    """As published: affinities, then the projection, then each position's window gathered."""
    H, W, heads = q.shape[1:4]
    affinity = scale * torch.einsum("bhwnd,bsnd->bhwns", q, k)
    logits = F.linear(affinity, proj.weight.flatten(1), proj.bias)
    shares = v.unflatten(-1, (len(tables), heads, -1)).unbind(3)
    out = torch.empty_like(torch.stack(shares, 3))
    first = 0
    for i, table in enumerate(tables):
        K = (table.shape[-1] + 1) // 2
        for h in range(H):
            for w in range(W):
                top, left = (min(max(x - K // 2, 0), L - K) for x, L in ((h, H), (w, W)))
                bias = table[:, top - h + K - 1 :, left - w + K - 1 :][:, :K, :K].flatten(1)
                weights = (logits[:, h, w, :, first : first + K * K] + bias).softmax(-1)
                window = shares[i][:, top : top + K, left : left + K].flatten(1, 2)
                out[:, h, w, i] = torch.einsum("bnk,bknd->bnd", weights, window)
        first += K * K
    return out.flatten(3)


@pytest.mark.parametrize("size", [(7, 7), (9, 8), (7, 12)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_context_mixing(size):
    torch.manual_seed(0)
    H, W = size
    q, k = torch.randn(2, H, W, 2, 4, dtype=torch.double), torch.randn(2, 9, 2, 4, dtype=torch.double)
    v = torch.randn(2, H, W, 12, dtype=torch.double)
    proj = torch.nn.Conv2d(9, 25 + 49, 1).double()
    tables = [torch.randn(2, 2 * K - 1, 2 * K - 1, dtype=torch.double) for K in (5, 7)]
    inputs = [q, k, v, *tables]
    results = []
    for mix in (context_mixing, naive_mixing):
        leaves = [t.clone().requires_grad_(True) for t in inputs]
        y = mix(*leaves[:3], proj, leaves[3:], 0.3)
        gradients = torch.autograd.grad(y.square().sum(), [*leaves, proj.weight, proj.bias])
        results.append([y, *gradients])
    torch.testing.assert_close(*results)


def unfolded(logits, v, *, kernel_size, bias, kernel_bias):
    """The authors' fallback: every window, and at the borders the outermost ones again."""
    _, H, W, heads, D = v.shape
    K = kernel_size
    table = expand_table(bias.table, Window(K), Window(K), (H, W)).permute(1, 2, 0, 3)
    weights = (logits + table + kernel_bias).softmax(-1)
    windows = F.unfold(v.permute(0, 3, 4, 1, 2).flatten(1, 2), K).unflatten(2, (H - K + 1, W - K + 1))
    windows = F.pad(windows, [K // 2] * 4, mode="replicate").unflatten(1, (heads, D, K * K))
    return torch.einsum("bhwnk,bndkhw->bhwnd", weights, windows)


def step(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    logits = model(x)
    logits.square().sum().backward()
    return logits.detach()


def test_unfolding_gives_the_same(monkeypatch):
    model = create()
    x = images(1, 3, 128, 128)
    want = step(model, x)
    gradient = model.sub_blocks3[0].weight_proj.weight.grad.clone()
    monkeypatch.setattr(mixing, "neighborhood_mix", unfolded)
    torch.testing.assert_close(step(model, x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.sub_blocks3[0].weight_proj.weight.grad, gradient, rtol=1e-3, atol=1e-5)


def test_what_decays():
    """As in the authors' train.py: by timm's rule all but vectors and biases, and their model exempts nothing."""
    model = timm.create_model("test_foveal_overlock")
    decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())[1]["params"]
    names = {name for name, p in model.named_parameters() if any(p is each for each in decayed)}
    modules = dict(model.named_modules())
    kinds = {type(modules[name.rpartition(".")[0]]).__name__ for name in names}
    assert {"GRN", "LayerScale", "Conv2d", "ContMixBlock"} <= kinds  # the last for its tables
    assert not kinds & {"BatchNorm2d", "ChannelNorm"}


def test_the_norm_of_channels():
    """As PyTorch's, with a gradient of 0 where a channel is 0."""
    x = torch.randn(2, 5, 6, 7).contiguous(memory_format=torch.channels_last)
    x[:, 1] = 0
    x.requires_grad_()
    got, want = overlock._norm_of_channels(x), torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(norm.square().sum() + norm.sum(), x)[0] for norm in (got, want)]
    torch.testing.assert_close(*grads)
    assert overlock._norm_of_channels(torch.full((1, 1, 8, 8), 1e3).half()).item() == 8e3  # its square overflows
