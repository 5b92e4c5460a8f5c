"""Triplet attention: its definition, the three kinds of names in the authors' files, sizes, timm's networks with it;
compilation, exports and precisions are in test_contract.py."""

import copy
import re

import pytest
import timm
import torch

from foveal.backbones.triplet import ULSAM, TripletAttention, checkpoint_filter_fn, own_name

from .test_contract import TIMMS

NARROW = {case.name: case.arguments | {"num_classes": 5} for case in TIMMS.values()}


def create(name: str, **kwargs) -> torch.nn.Module:
    """A small model in which every gate and statistic matters."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**NARROW[name], **kwargs}).eval()
    with torch.no_grad():
        for parameter in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("running_mean"))]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def theirs(name: str, block: str, gate: str) -> str:
    """A parameter's name as of the authors: torchvision's, with ``block`` for the attention and ``gate``'s wording."""
    parts = {"cw": "ChannelGateH", "hc": "ChannelGateW", "hw": "SpatialGate"}
    if match := re.fullmatch(r"(layer.+)\.se\.(cw|hc|hw)\.(.+)", name):
        place, kind, rest = match.groups()
        return (
            f"{place}.{block}.{parts[kind]}.spatial.{rest}"
            if gate == "spatial"
            else f"{place}.{block}.{kind}.conv.{rest}"
        )
    return name


@pytest.mark.parametrize("name", NARROW)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    millions = {"triplet_resnet18": 11.69, "triplet_resnet50": 25.56, "triplet_mobilenetv2_100": 3.51}[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    gates = [m for m in model.modules() if isinstance(m, TripletAttention)]
    assert len(gates) == {"triplet_resnet18": 8, "triplet_resnet50": 16, "triplet_mobilenetv2_100": 17}[name]
    assert {sum(p.numel() for p in gate.parameters()) for gate in gates} == {300}


def test_the_gates_are_those_of_a_rotated_map():
    """Each gate on the map with its axes exchanged, as in the paper."""
    torch.manual_seed(0)
    for options in ({}, {"no_spatial": True}, {"kernel_size": 3}):
        module, x = TripletAttention(6, **options).eval(), torch.randn(2, 6, 5, 9)
        outs = []
        for gate, axes in ((module.cw, (0, 2, 1, 3)), (module.hc, (0, 3, 2, 1)), (module.hw, (0, 1, 2, 3))):
            if gate is not None:
                y = x.permute(axes)
                z = torch.stack([y.amax(1), y.mean(1)], 1)
                outs.append((y * gate.bn(gate.conv(z)).sigmoid()).permute(axes))
        torch.testing.assert_close(module(x), sum(outs) / len(outs))


@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize(
    ("block", "gate"),
    [("triplet_attention", "spatial"), ("triplet_attention", "conv"), ("triplet", "conv"), ("pcam", "spatial")],
)
@pytest.mark.parametrize("name", ["triplet_resnet18", pytest.param("triplet_resnet50", marks=pytest.mark.slow)])
def test_all_names_of_the_published_files_load(name, block, gate, kernel_size, tmp_path):
    model = create(name, kernel_size=kernel_size)
    state = {f"module.{theirs(key, block, gate)}": value for key, value in model.state_dict().items()}
    assert len(state.keys() & {f"module.{key}" for key in model.state_dict()}) < len(state)
    torch.save({"state_dict": state, "arch": "resnet"}, tmp_path / "x.pth.tar")
    overlay = dict(file=str(tmp_path / "x.pth.tar"), num_classes=5)
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **NARROW[name]).eval()
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(other(x), model(x))
    assert other.layer1[0].se.cw.conv.kernel_size == (kernel_size, kernel_size)


def test_names_of_mobilenet_are_torchvisions():
    """Each of the authors' names, in their order, is one of ours, with the same shape."""
    model = create("triplet_mobilenetv2_100", channel_multiplier=1.0)
    own = model.state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    pair = ["0.weight", *(f"1.{leaf}" for leaf in norm)]
    gates = [
        f"{g}.spatial.{p}"
        for g in ("ChannelGateH", "ChannelGateW", "SpatialGate")
        for p in ("conv.weight", *(f"bn.{n}" for n in norm))
    ]
    names = [f"features.{i}.{leaf}" for i in (0, 18) for leaf in pair]
    for i in range(1, 18):
        wide = ["0", "1"] if i > 1 else ["0"]
        last = len(wide)
        parts = [f"{w}.{leaf}" for w in wide for leaf in pair]
        parts += [f"{last}.weight", *(f"{last + 1}.{leaf}" for leaf in norm), *(f"{last + 2}.{leaf}" for leaf in gates)]
        names += [f"features.{i}.conv.{part}" for part in parts]
    names += ["classifier.1.weight", "classifier.1.bias"]
    assert sorted(map(own_name, names)) == sorted(own)
    assert own["blocks.1.0.conv_dw.weight"].shape == (96, 1, 3, 3)  # features.2.conv.1.0
    assert own_name("features.2.conv.1.0.weight") == "blocks.1.0.conv_dw.weight"
    assert own_name("features.17.conv.4.cw.conv.bn.bias") == "blocks.6.0.bn3.1.cw.bn.bias"
    converted = checkpoint_filter_fn({name: own[own_name(name)] for name in names}, model)
    model.load_state_dict(converted)


def test_other_names_are_refused():
    model = create("triplet_resnet18")
    state = model.state_dict()
    state["layer1.0.se.gate.weight"] = state.pop("layer1.0.se.cw.conv.weight")
    with pytest.raises(ValueError, match=r"layer1\.0\.se\.cw\.conv\.weight.*layer1\.0\.se\.gate\.weight"):
        checkpoint_filter_fn(state, model)


@pytest.mark.parametrize("size", [(32, 32), (37, 61), (1, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", NARROW)
def test_any_size(name, size):
    model = create(name, features_only=True)
    maps = model(torch.randn(1, 3, *size))
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    for y, stride in zip(maps, [2, 4, 8, 16, 32], strict=True):
        assert y.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", NARROW)
def test_channels_classes_and_half(name):
    x = torch.rand(2, 3, 64, 96)
    model = create(name)
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model(x), model.forward_head(features))
    model.reset_classifier(7)
    assert (model(x).shape, model.num_classes) == ((2, 7), 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(features, pre_logits=True))
    assert create(name, num_classes=0, in_chans=1)(x[:, :1]).shape == (2, model.head_hidden_size)
    whole = timm.create_model(name, **NARROW[name]).eval()
    want = whole(x)
    for dtype, limit in ((torch.float16, 0.01), (torch.bfloat16, 0.06)):
        got = copy.deepcopy(whole).to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        assert (got - want).abs().max() < limit * want.abs().max()


@pytest.mark.parametrize("name", NARROW)
def test_training_reaches_every_parameter(name):
    model = create(name).train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_new_networks_start_as_the_authors():
    """Of ResNets, the gate of rows and columns starts at 1/2; the last norm of a block is not zero."""
    for name, first in (("triplet_resnet18", 0.0), ("triplet_mobilenetv2_100", 1.0)):
        modules = [m for m in timm.create_model(name, **NARROW[name]).modules() if isinstance(m, TripletAttention)]
        assert {m.hw.bn.weight.item() for m in modules} == {first}
        assert {m.cw.bn.weight.item() for m in modules} == {1.0}
    assert timm.create_model("triplet_resnet18", **NARROW["triplet_resnet18"]).layer1[0].bn2.weight.min() == 1


def test_arguments():
    with pytest.raises(ValueError, match="4"):
        TripletAttention(8, kernel_size=4)
    with pytest.raises(ValueError, match=r"10.* 4"):
        ULSAM(10, 4)
    model = timm.create_model("resnet34", channels=(8, 8, 8, 8), block_args=dict(attn_layer=TripletAttention)).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
