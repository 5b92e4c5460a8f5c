"""Backbones of foveal's and timm's models: what freezes, what learns at which rate, where weights come from."""

import copy
import inspect
import json
import re

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.layers.coord_attn import EfficientLocalAttn
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import distributed, nn

import foveal
from foveal.heads.backbone import Backbone, ShapeSpec
from foveal.heads.build import build_backbone, build_detector, build_segmenter
from foveal.heads.dense import DenseModel

SWIN = dict(embed_dim=24, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8))
# name, arguments, what the parameters of stem and first two stages begin with
MODELS = {
    "resnet18": ({}, ("conv1.", "bn1.", "layer1.", "layer2.")),
    "swin_tiny_patch4_window7_224": (SWIN, ("patch_embed.", "layers_0.", "layers_1.")),
    "convnext_atto": ({}, ("stem_", "stages_0.", "stages_1.")),
    "test_efficientnet": ({}, ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.", "blocks.2.")),
    "test_foveal_dinat": ({}, ("model.patch_embed.", "model.levels.0.", "model.levels.1.")),
    "test_foveal_overlock": ({}, ("model.patch_embed1.", "model.blocks1.", "model.patch_embed2.", "model.blocks2.")),
    "test_foveal_maxvit": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_halonet": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_ascan": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_rmt": ({}, ("model.patch_embed.", "model.layers.0.", "model.layers.1.")),
    "test_foveal_care": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_van": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_shiftvit": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_stvit": ({}, ("model.patch_embed.", "model.layers.0.", "model.layers.1.")),
    "triplet_resnet18": (
        {"channels": (16, 32, 48, 64)},
        ("model.conv1.", "model.bn1.", "model.layer1.", "model.layer2."),
    ),
    "test_foveal_fan": ({"learnable_downsample": 64}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_moh_vit": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_agent_swin": ({}, ("model.patch_embed.", "model.layers.0.", "model.layers.1.")),
    "test_foveal_agent_cswin": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_transnext": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_raftmlp": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_agent_pvt": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
    "test_foveal_sgformer": ({}, ("model.stem.", "model.stages.0.", "model.stages.1.")),
}
EACH = pytest.mark.parametrize("name", MODELS)


def build(name: str, **kwargs) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(name, **MODELS[name][0], **kwargs)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@EACH
def test_maps(name):
    backbone = build(name).eval()
    assert backbone.spec.strides == (4, 8, 16, 32)
    maps = backbone(images(2, 3, 64, 96)).values()
    wanted = zip(backbone.spec.channels, backbone.spec.strides, strict=True)
    assert [x.shape for x in maps] == [(2, c, 64 // s, 96 // s) for c, s in wanted]
    assert backbone.mean == timm.create_model(name, **MODELS[name][0]).pretrained_cfg["mean"]
    two = build(name, strides=(8, 32)).eval()
    assert two.spec == ShapeSpec(backbone.spec.channels[1::2], (8, 32))
    sizes = zip(two.spec.channels, (8, 2), strict=True)
    assert [x.shape[1:] for x in two(images(1, 3, 64, 64)).values()] == [(c, s, s) for c, s in sizes]


def test_nhwc_maps_are_turned():
    backbone = build("swin_tiny_patch4_window7_224").eval()
    x = images(1, 3, 96, 160)  # not the 224 that it was made for
    for got, own in zip(backbone(x).values(), backbone.body(x), strict=True):
        torch.testing.assert_close(got, own.permute(0, 3, 1, 2))


@EACH
def test_frozen_stages(name):
    backbone = build(name, frozen_stages=2, drop_path_rate=0.5).train()
    frozen = {n for n, p in backbone.body.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in backbone.body.named_parameters() if n.startswith(MODELS[name][1])}
    before = copy.deepcopy(backbone.state_dict())
    x = images(2, 3, 64, 64)
    maps = list(backbone(x).values())
    assert not maps[0].requires_grad or name.startswith("test_foveal")  # only the map's own norm learns there
    sum(y.square().sum() for y in maps).backward()
    after = backbone.state_dict()
    still = {n for n in after if n.startswith(tuple(f"body.{p}" for p in MODELS[name][1]))}
    assert all(torch.equal(before[n], after[n]) for n in still)
    statistics = {n for n in after if n.endswith("running_mean")} - still
    assert all(not torch.equal(before[n], after[n]) for n in statistics)
    torch.testing.assert_close(backbone(x)["0"], maps[0])  # nothing is drawn there
    assert backbone.eval().training is False and backbone.train().training is True


def test_frozen_stages_of_two_networks_in_one():
    """OverLoCK's third stage reads its overview-net, which belongs to it."""
    backbone = build("test_foveal_overlock", frozen_stages=3)
    learns = {n.split(".")[1] for n, p in backbone.body.named_parameters() if p.requires_grad}
    assert learns == {"patch_embedx", "sub_blocks4", "extra_norm", "h_proj"}


def test_frozen_extremes():
    assert all(p.requires_grad for p in build("resnet18").parameters())
    stem = build("resnet18", frozen_stages=0)
    frozen = {n for n, p in stem.body.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1.weight", "bn1.weight", "bn1.bias"}
    assert not any(p.requires_grad for p in build("resnet18", frozen_stages=4).parameters())
    with pytest.raises(ValueError, match=r"\bfrozen_stages=5.*ResNet.*\b4\b"):
        build("resnet18", frozen_stages=5)
    apart = pytest.raises(ValueError, match=r"frozen_stages=1.*group_matcher.*MultiScaleVit")
    with torch.device("meta"), apart:
        build_backbone("mvitv2_tiny", frozen_stages=1)


@EACH
def test_groups_with_a_rate_of_their_own(name):
    """For PyTorch's optimizers, which know no lr_scale."""
    backbone = build(name)
    scaled, own = (backbone.parameter_groups(0.05, 0.5, 0.1, lr=lr) for lr in (None, 2e-3))
    assert all("lr_scale" not in group for group in own)
    torch.optim.AdamW(own, lr=1.0)
    assert [group["lr"] for group in own] == [pytest.approx(2e-3 * group["lr_scale"]) for group in scaled]


@pytest.mark.parametrize("name", [n for n in foveal.list_models() if n.startswith("test_")])
def test_timms_layer_decay_of_feature_networks(name):
    """That of the whole model, where timm by itself gives every layer of a feature network one rate."""
    features, whole = timm.create_model(name, features_only=True), timm.create_model(name, num_classes=0)
    rates = []
    for model in (features, whole):
        groups = param_groups_layer_decay(model, layer_decay=0.5)
        scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        rates.append({n.removeprefix("model."): scale[id(p)] for n, p in model.named_parameters()})
    assert len(set(rates[0].values())) > 2
    order = [n for n in rates[0] if n in rates[1]]
    assert sorted(order, key=rates[0].get) == sorted(order, key=rates[1].get)


def test_norm_eval():
    backbone = build("resnet18", norm_eval=True).train()
    before = copy.deepcopy(dict(backbone.named_buffers()))
    sum(y.sum() for y in backbone(images(2, 3, 64, 64)).values()).backward()
    assert all(torch.equal(before[n], x) for n, x in backbone.named_buffers())
    assert backbone.body.layer4[0].bn1.weight.grad is not None


@EACH
def test_rates_and_decay_are_timms(name):
    """What timm's functions give the whole model, under its own names."""
    backbone = build(name)
    whole = timm.create_model(name, **MODELS[name][0])
    no_decay = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()

    def by_name(model, groups, key):
        names = {id(p): n for n, p in model.named_parameters()}
        return {names[id(p)]: group[key] for group in groups for p in group["params"]}

    timms = param_groups_layer_decay(whole, weight_decay=0.05, no_weight_decay_list=no_decay, layer_decay=0.7)
    rates = by_name(whole, timms, "lr_scale")
    decays = by_name(whole, param_groups_weight_decay(whole, 0.05, no_weight_decay_list=no_decay), "weight_decay")
    ours = backbone.parameter_groups(0.05, layer_decay=0.7, lr_ratio=0.5)
    assert sum(len(g["params"]) for g in ours) == len(list(backbone.parameters()))
    own_rates, own_decays = by_name(backbone.body, ours, "lr_scale"), by_name(backbone.body, ours, "weight_decay")
    added, ratios = [], []
    for n, rate in own_rates.items():
        published = backbone._published[n]
        if published in rates:
            ratios.append(rate / rates[published])
            assert own_decays[n] == decays[published], n
        else:
            added.append(rate)
            assert "norm" in n or "h_proj" in n
    # the same steps; timm's head is one layer of its own or in the last block's, ours are the dense heads above it
    assert min(ratios) == pytest.approx(max(ratios)) and set(added) <= {0.5}
    assert max(rate for n, rate in own_rates.items() if backbone._published[n] in rates) == pytest.approx(0.5 * 0.7)
    assert bool(added) == ("out_norm" in inspect.signature(type(whole).__init__).parameters)
    assert {g["lr_scale"] for g in backbone.parameter_groups(0.05)} == {1.0}


class Dense(DenseModel):
    """A classifier of pixels."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Conv2d(128, 4, 1), nn.BatchNorm2d(4))


def test_parameter_groups_of_a_dense_model():
    backbone = build("test_foveal_dinat", frozen_stages=1)
    model = Dense(backbone)
    groups = model.parameter_groups(0.1, layer_decay=0.5, backbone_lr_ratio=0.1)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    head = {id(p): g for g in groups for p in g["params"]}
    kernel, bias, norm = (head[id(p)] for p in (model.head[0].weight, model.head[0].bias, model.head[1].weight))
    assert (kernel["weight_decay"], bias["weight_decay"], norm["weight_decay"]) == (0.1, 0.0, 0.0)
    assert kernel["lr_scale"] == bias["lr_scale"] == 1.0
    last = head[id(backbone.body.model.levels[3].blocks[-1].mlp.fc1.weight)]
    assert (last["lr_scale"], last["weight_decay"]) == (pytest.approx(0.05), 0.1)
    torch.optim.AdamW(groups, lr=1e-3)


@pytest.fixture
def trained(tmp_path):
    """A classifier of three classes as a model folder."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(5)
        model = timm.create_model(name, num_classes=3)
        config = dict(architecture=name, num_classes=3, pretrained_cfg=dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]))
        (tmp_path / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
        return model

    return make


@pytest.mark.parametrize("name", ["resnet18", "test_foveal_dinat"])
def test_checkpoint(name, trained, tmp_path):
    """From a folder, its file, and a bare one; every tensor is the classifier's but the new norms."""
    model = trained(name)
    bare = tmp_path / "other" / "weights.pth"
    bare.parent.mkdir()
    torch.save({"state_dict": {f"module.{n}": x for n, x in model.state_dict().items()}}, bare)
    random = torch.random.get_rng_state()
    for source in (tmp_path, tmp_path / "model.safetensors", bare):
        backbone = build_backbone(name, checkpoint=source, frozen_stages=1)
        own = {backbone._published[n]: x for n, x in backbone.body.state_dict().items()}
        state = model.state_dict()
        assert {n for n in own if n not in state} == {n for n in own if n.startswith("norm") and n[4].isdigit()}
        assert all(torch.equal(x, state[n]) for n, x in own.items() if n in state)
        assert backbone.training
        assert source == bare or (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert torch.equal(random, torch.random.get_rng_state())


def test_checkpoint_of_a_dense_model(tmp_path):
    """The norms of the maps are taken from it."""
    torch.manual_seed(3)
    state = timm.create_model("test_foveal_dinat", features_only=True, out_norm=True).state_dict()
    state = {n.replace("model.", "backbone."): torch.randn_like(x) for n, x in state.items()}
    torch.save({"state_dict": state | {"neck.weight": torch.ones(1)}, "meta": {}}, tmp_path / "detector.pth")
    backbone = build_backbone("test_foveal_dinat", checkpoint=tmp_path / "detector.pth")
    for n, x in backbone.body.state_dict().items():
        assert torch.equal(x, state[n.replace("model.", "backbone.")]), n


@pytest.mark.parametrize(
    ("name", "lost"), [("resnet18", "layer3.0.bn2.running_var"), ("test_foveal_dinat", "levels.1.blocks.0.attn.rpb")]
)
def test_incomplete_checkpoint(name, lost, trained, tmp_path):
    state = trained(name).state_dict()
    del state[lost]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=rf"cut\.pth.*{name}.*{re.escape(lost)}"):
        build_backbone(name, checkpoint=tmp_path / "cut.pth")


def test_refusals(trained, tmp_path):
    trained("test_foveal_nat")
    for arguments, message in (
        (("test_foveal_dinat", dict(checkpoint=tmp_path)), "test_foveal_nat.*test_foveal_dinat"),
        (("resnet18", dict(checkpoint=tmp_path / "none")), "none"),
        (
            ("resnet18", dict(checkpoint=tmp_path, pretrained=True)),
            "pretrained=True.*checkpoint=",
        ),
        (("test_foveal_dinat", dict(pretrained=True)), "test_foveal_dinat"),
        (("resnet19", {}), "resnet19.*resnet18"),
        (
            ("vit_tiny_patch16_224", {}),
            "16.*4, 8, 16, 32.*out_indices",
        ),
        (("resnet18", dict(strides=(4, 64))), "2, 4, 8, 16, 32.*4, 64"),
    ):
        with pytest.raises(ValueError, match=message):
            build_backbone(arguments[0], **arguments[1])
    with pytest.raises(ValueError, match=r"\(8, 16\).*\(4,\)"):
        ShapeSpec((8, 16), (4,))
    with pytest.raises(ValueError, match=r"\(8, 4\)"):
        ShapeSpec((8, 16), (8, 4))


def test_plain_transformer():
    backbone = build_backbone("test_vit", out_indices=(1, 3), frozen_stages=1).eval()
    assert backbone.spec.strides == (16, 16)
    assert [x.shape for x in backbone(images(1, 3, 64, 96)).values()] == [(1, 64, 4, 6)] * 2
    names = [n for n, p in backbone.body.named_parameters() if p.requires_grad and ".blocks." in n]
    assert {n.split(".")[2] for n in names} == {"1", "2", "3"}


def test_grey_images_and_options():
    backbone = build_backbone("test_foveal_dinat", in_chans=1, drop_path_rate=0.3, out_norm=False, kernel_size=5)
    assert backbone(images(1, 1, 32, 32))["0"].shape[1] == backbone.spec.channels[0]
    assert not any("norm0" in n for n, _ in backbone.named_parameters())
    assert any(getattr(m, "drop_prob", 0) == pytest.approx(0.3) for m in backbone.modules())


@pytest.mark.parametrize("name", ["resnet18", "test_foveal_dinat"])
def test_grad_checkpointing(name):
    plain, light = build(name, drop_path_rate=0.0), build(name, drop_path_rate=0.0, grad_checkpointing=True)
    light.load_state_dict(plain.state_dict())
    for backbone in (plain, light):
        sum(y.square().mean() for y in backbone(images(2, 3, 64, 64)).values()).backward()
    for p, q in zip(plain.parameters(), light.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_synchronized_norms(tmp_path):
    """Only with a process group; a norm that holds an activation keeps it."""
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in build("test_foveal_halonet", sync_bn=True).modules())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        backbone = build("test_foveal_halonet", sync_bn=True, norm_eval=True)
    finally:
        distributed.destroy_process_group()
    assert any(isinstance(m, nn.SyncBatchNorm) for m in backbone.modules())
    assert not any(type(m) in (nn.BatchNorm2d, BatchNormAct2d) for m in backbone.modules())
    x = images(1, 3, 64, 64)
    for got, want in zip(backbone.eval()(x).values(), build("test_foveal_halonet").eval()(x).values(), strict=True):
        torch.testing.assert_close(got, want)
    assert not any(m.training for m in backbone.train().modules() if isinstance(m, nn.SyncBatchNorm))


def test_copies_are_whole():
    """As an average of weights needs it."""
    backbone = build("test_foveal_dinat", frozen_stages=1)
    other = copy.deepcopy(backbone).train()
    assert not other.body.model.patch_embed.training
    assert len(other.parameter_groups(0.1, 0.8)) == len(backbone.parameter_groups(0.1, 0.8))


ONE_EACH = dict(depths=(1, 1, 1, 1))
OTHERS = {
    "twins_pcpvt_small": ONE_EACH,
    "twins_svt_small": ONE_EACH,
    "davit_tiny": ONE_EACH,
    "resnet18": dict(block_args=dict(attn_layer="ela")),  # efficient local attention, arXiv:2403.01123
}


@pytest.mark.parametrize("name", OTHERS)
def test_heads_on_timms_local_attention(name):
    """By name, with detector and segmenter."""
    kwargs = OTHERS[name]
    segmenter = build_segmenter(name, num_classes=3, head_kwargs={"channels": 16}, **kwargs).eval()
    blocks = [m for m in segmenter.modules() if isinstance(m, EfficientLocalAttn)]
    assert bool(blocks) == ("block_args" in kwargs)
    with torch.no_grad():
        assert segmenter(images(1, 3, 64, 96)).shape == (1, 3, 64, 96)
        detector = build_detector(name, "retinanet", num_classes=3, neck_kwargs={"out_channels": 16}, **kwargs).eval()
        (found,) = detector([images(3, 64, 96)])
    assert found["boxes"].shape[1] == 4


def test_heads_refuse_maps_of_one_stride():
    """ConViT is a classifier: all of its maps have stride 16."""
    small = dict(depth=3, local_up_to_layer=2)
    assert timm.create_model("convit_tiny", **small)(images(1, 3, 224, 224)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"convit_tiny .* 16, .* 4, 8, 16, 32"):
        build_segmenter("convit_tiny", num_classes=3, **small)


def test_a_plain_transformer_of_ours():
    """DeiT has maps of one stride, without the class token; the others are made of the last, which has the norm."""
    backbone = build_backbone("test_foveal_agent_deit", upsample="bilinear").eval()
    assert backbone.spec.strides == (4, 8, 16, 32)
    x = images(1, 3, 64, 96)
    maps = list(backbone(x).values())
    assert [y.shape for y in maps] == [(1, 64, 64 // s, 96 // s) for s in backbone.spec.strides]
    last = backbone.body.model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(maps[2], last[0])
    with pytest.raises(ValueError, match="upsample"):
        build_backbone("test_foveal_agent_deit")
