"""The feature pyramid network, and necks by name."""

import pytest
import torch
import torch.nn.functional as F

from foveal.heads.backbone import ShapeSpec
from foveal.heads.build import build_backbone
from foveal.heads.necks import A3FPN, FPN, build_neck

SPEC = ShapeSpec((8, 12, 16), (8, 16, 32))


def pyramid(height: int, width: int) -> list[torch.Tensor]:
    """Maps of an image of this size, every stride rounding up."""
    draw = torch.Generator().manual_seed(0)
    maps = zip(SPEC.channels, SPEC.strides, strict=True)
    return [torch.randn(2, c, -(-height // s), -(-width // s), generator=draw) for c, s in maps]


@pytest.mark.parametrize(
    ("extra", "strides"), [(None, (8, 16, 32)), ("pool", (8, 16, 32, 64)), ("p6p7", (8, 16, 32, 64, 128))]
)
def test_fpn(extra, strides):
    """Against the paper's sum, at a size that the strides do not divide."""
    torch.manual_seed(0)
    neck = FPN(SPEC, 10, extra_levels=extra)
    assert neck.spec == ShapeSpec((10,) * len(strides), strides)
    maps = pyramid(75, 100)
    out = neck(maps)
    inner = [f[0](x) for f, x in zip(neck.pyramid.inner_blocks, maps, strict=True)]
    for i in (1, 0):
        inner[i] = inner[i] + F.interpolate(inner[i + 1], size=inner[i].shape[-2:], mode="nearest")
    for got, x, f in zip(out, inner, neck.pyramid.layer_blocks, strict=False):
        torch.testing.assert_close(got, f[0](x))
    sizes = [x.shape[2:] for x in out]
    assert sizes == [(10, 13), (5, 7), (3, 4), (2, 2), (1, 1)][: len(strides)]
    if extra == "pool":
        torch.testing.assert_close(out[3], out[2][..., ::2, ::2])
    sum(x.square().sum() for x in out).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_by_name():
    assert isinstance(build_neck("fpn", SPEC, out_channels=4), FPN)
    assert build_neck("a3fpn", SPEC, out_channels=4, preset="lite").spec.channels == (4, 4, 4)
    with pytest.raises(ValueError, match=r"pafpn.*fpn, a3fpn"):
        build_neck("pafpn", SPEC)
    with pytest.raises(ValueError, match=r"extra_levels.*p8"):
        build_neck("fpn", SPEC, extra_levels="p8")


@pytest.mark.parametrize("neck", [FPN, A3FPN])
@pytest.mark.parametrize("name", ["resnet18", "test_foveal_dinat", "test_foveal_overlock", "test_foveal_care"])
def test_over_backbones(name, neck):
    """No number is repeated between a backbone and its neck, and any of our widths will do."""
    backbone = build_backbone(name)
    pyramid = neck(backbone.spec, 16)
    maps = pyramid(list(backbone(torch.randn(2, 3, 70, 96)).values()))
    assert pyramid.spec == ShapeSpec((16,) * 4, (4, 8, 16, 32))
    assert [x.shape[1] for x in maps] == [16] * 4
    assert maps[0].shape[-1] == 24 and maps[3].shape[-1] == 3
    assert all(torch.isfinite(x).all() for x in maps)
