"""One ONNX file for every height and width: the models that take images of any size, small and in all their parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import foveal  # noqa: F401  registers the models
from foveal.weights.export import classifier_spec
from foveal.weights.formats import FORMATS

# no multiples of 32, last maps of one row or column, maps shorter than window times dilation, longer than the example's
SIZES = [(32, 32), (32, 190), (33, 47), (63, 65), (64, 512), (100, 71), (150, 97), (259, 32)]

SMALL = {
    "nat": ("test_foveal_nat", dict(embed_dim=8, depths=(1, 0, 0, 1), num_heads=(1, 1, 1, 2))),
    "dinat": (
        "test_foveal_dinat",
        dict(embed_dim=8, depths=(2, 0, 0, 1), num_heads=(1, 1, 1, 2), kernel_size=5, dilations=[[1, 4], [], [], [2]]),
    ),
    "dinat_s": (
        "dinat_s_tiny",
        dict(embed_dim=8, depths=(1, 0, 0, 1), num_heads=(1, 1, 1, 2), kernel_size=3, dilations=[[2], [], [], [1]]),
    ),
    "care": ("test_foveal_care", {}),
    "van": ("test_foveal_van", {}),
    "shiftvit": ("test_foveal_shiftvit", {}),
    "rmt": ("test_foveal_rmt", {}),
    "raftmlp": ("test_foveal_raftmlp", {}),
    "stvit": ("test_foveal_stvit", {}),
    "sgformer": ("test_foveal_sgformer", {}),
    "transnext": ("test_foveal_transnext", {}),
    "moh_vit": ("test_foveal_moh_vit", {}),
    "triplet": ("triplet_mobilenetv2_100", {}),
    "tap_fan": ("test_foveal_tap_fan", {}),
    "fan_vit": (
        "fan_vit_tiny",
        dict(embed_dim=32, depth=4, num_heads=2, map_blocks=(0, 1, 2)),
    ),
    "agent_deit": ("test_foveal_agent_deit", {}),
    "agent_pvt": ("test_foveal_agent_pvt", {}),
    "agent_swin": ("test_foveal_agent_swin", {}),
    "agent_cswin": ("test_foveal_agent_cswin", {}),
    "inline_pvt": ("test_foveal_inline_pvt", {}),
    "overlock": ("test_foveal_overlock", {}),
}


def build(name: str) -> torch.nn.Module:
    architecture, options = SMALL[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=7, **options).eval()
    for module in model.modules():  # all that is close to zero in a new model
        for parameter, values in module.named_parameters(recurse=False):
            if parameter.startswith(("rpb", "gamma")):
                values.data.normal_()
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


# minutes each; nat is dinat without dilation; or the network or the attention of another case
LONG = ("nat", "dinat_s", "overlock", "agent_deit", "agent_swin", "agent_cswin", "inline_pvt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in SMALL]
)
def test_onnx_for_any_size(name: str, tmp_path: Path) -> None:
    for module in FORMATS["onnx"].needs:
        pytest.importorskip(module, reason="the extra foveal[export] is not installed")
    model = build(name)
    FORMATS["onnx"].write(classifier_spec(model, "onnx", dynamic=True), tmp_path)
    run = FORMATS["onnx"].open(tmp_path)
    for count, size in enumerate(SIZES):
        x = torch.randn(1 + count % 3, 3, *size)
        with torch.no_grad():
            want = model(x)
        (got,) = run(x)
        assert (got - want).abs().max() < 1e-5 * want.abs().max(), size


PROGRAMS = ("van", "rmt", "stvit", "sgformer", "shiftvit", "agent_pvt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in PROGRAMS else [pytest.mark.long]) for name in SMALL],
)
def test_a_program_for_any_size(name: str, tmp_path: Path) -> None:
    """Without guards on maps of one position, which the ONNX exporter drops; but PyTorch has one for MobileNetV2."""
    model = build(name)
    FORMATS["pt2"].write(classifier_spec(model, "pt2", dynamic=True), tmp_path)
    run = FORMATS["pt2"].open(tmp_path)
    for size in SIZES[name == "triplet" : 3]:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            want = model(x)
        (got,) = run(x)
        assert (got - want).abs().max() < 1e-5 * want.abs().max(), size


def test_a_dilation_that_follows_the_size_needs_a_size() -> None:
    model = timm.create_model("test_foveal_dinat", depths=(1, 2), num_heads=(1, 2), dilations="auto").eval()
    free = {axis: torch.export.Dim(word) for axis, word in ((2, "height"), (3, "width"))}
    with pytest.raises(ValueError, match='"auto"'):
        torch.export.export(model, (torch.randn(2, 3, 72, 88),), dynamic_shapes=(free,))
