"""VAN: variants, the dilated convolution by dilation groups, checkpoints of every published format."""

from contextlib import nullcontext

import pytest
import timm
import torch
from torch.nn import functional as F

from foveal.backbones.profile import profile
from foveal.backbones.van import VAN, DilatedDepthwiseConv2d, checkpoint_filter_fn
from foveal.kernels.tracing import for_other_runtimes
from foveal.weights.manifest import checkpoints

# Parameters with 1,000 classes, and GMACs at 224, of the authors' code
VARIANTS = {
    "van_b0": (4105800, 0.86),
    "van_b1": (13861800, 2.50),
    "van_b2": (26578472, 4.99),
    "van_b3": (44765608, 8.93),
    "van_b4": (60283176, 12.14),
    "van_b5": (89967688, 17.13),
    "van_b6": (199829416, 38.71),
}


def small(**kwargs) -> VAN:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_van", **{"num_classes": 10, **kwargs}).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_size_and_cost(name):
    found = profile(name, num_classes=1000)
    assert (found.parameters, round(found.macs / 1e9, 2)) == VARIANTS[name]


@pytest.mark.parametrize(
    "name", [name for name, each in checkpoints().items() if (each.family, each.task) == ("van", "classify")]
)
def test_statistics_of_the_training(name):
    """ImageNet-1K with Inception's, ImageNet-22K with ImageNet's; the copies on the hub state ImageNet's for all."""
    cfg = timm.models.get_pretrained_cfg(name)
    of_1k = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9, 1000)
    of_22k = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, 21841)
    assert (cfg.mean, cfg.std, cfg.crop_pct, cfg.num_classes) == (of_22k if name.endswith("22k") else of_1k)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"depths=\(1, 1\).*mlp_ratios=\(8, 8, 4, 4\)"):
        VAN(depths=(1, 1))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 9), (12, 10)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dilation_groups_are_the_dilated_convolution(size, dtype, format):
    torch.manual_seed(0)
    conv = DilatedDepthwiseConv2d(8, 7, dilation=3).to(dtype)
    x = torch.randn(2, 8, *size, dtype=dtype).contiguous(memory_format=format).requires_grad_()
    results = []
    for y in (conv(x), F.conv2d(x, conv.weight, conv.bias, padding=9, dilation=3, groups=8)):
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, conv.weight, conv.bias))))
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=0.05, atol=0.05)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_exports_have_one_node_for_the_dilated_convolution(elsewhere, dynamic):
    """But for PyTorch's own runtimes, which are faster with dilation groups; of a dynamic shape for all."""
    size = torch.export.Dim("size", min=4, max=64) if dynamic else None
    model = DilatedDepthwiseConv2d(8, 7, dilation=3)
    with for_other_runtimes() if elsewhere else nullcontext():
        program = torch.export.export(model, (torch.randn(1, 8, 16, 16),), dynamic_shapes=({2: size, 3: size},))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert (called == [torch.ops.aten.conv2d.default]) == (elsewhere or dynamic)
    assert called.count(torch.ops.aten.conv2d.default) == 1


def test_initialization():
    model = timm.create_model("van_b1", num_classes=0)
    block = model.stages[2].blocks[0]
    layers = {block.attn.conv0: 25, block.attn.conv_spatial: 49, block.attn.proj_1: 320, block.mlp.fc1: 1280}
    for layer, fan_out in layers.items():
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
        assert not layer.bias.any()


def test_the_norm_of_a_stage_learns_like_its_last_block():
    from timm.optim import param_groups_layer_decay

    model = small()
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    named = {id(p): name for name, p in model.named_parameters()}
    scale = {named[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    for i, stage in enumerate(model.stages):
        last = f"stages.{i}.blocks.{len(stage.blocks) - 1}.layer_scale_1"
        assert scale[f"stages.{i}.norm.weight"] == scale[last]
        assert i == 0 or scale[f"stages.{i}.downsample.proj.weight"] > scale[f"stages.{i - 1}.norm.weight"]


def test_the_backbone_of_a_segmenter():
    """The authors' dense models: names of theirs behind ``backbone.``, heads, and no classifier."""
    model, other = small(), small()
    state = {f"backbone.{authors(name)}": x for name, x in model.state_dict().items() if not name.startswith("head.")}
    state |= {"decode_head.conv_seg.bias": torch.zeros(1), "auxiliary_head.conv_seg.bias": torch.zeros(1)}
    loaded = checkpoint_filter_fn({"state_dict": state}, other)
    assert {name: torch.equal(x, model.state_dict()[name]) for name, x in loaded.items()} == dict.fromkeys(loaded, True)
    assert set(other.state_dict()) - set(loaded) == {"head.weight", "head.bias"}


def authors(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "stem":
        return ".".join(["patch_embed1", *parts[1:]])
    number = int(parts[1]) + 1
    if parts[2] == "downsample":
        return ".".join([f"patch_embed{number}", *parts[3:]])
    if parts[2] == "norm":
        return ".".join([f"norm{number}", *parts[3:]])
    rest = ".".join(parts[3:]).replace(".conv", ".spatial_gating_unit.conv").replace(".dwconv.", ".dwconv.dwconv.")
    return f"block{number}.{rest}"


def test_foreign_checkpoints_are_refused():
    state = small().state_dict()
    with pytest.raises(ValueError, match=r"1 \(stages\.0\.norm\.weight\).* none"):
        checkpoint_filter_fn({k: v for k, v in state.items() if k != "stages.0.norm.weight"}, small())
    with pytest.raises(ValueError, match=r"none.* 1 \(stages\.0\.blocks\.7\.layer_scale_1\)"):
        checkpoint_filter_fn({**state, "block1.7.layer_scale_1": torch.zeros(16)}, small())
