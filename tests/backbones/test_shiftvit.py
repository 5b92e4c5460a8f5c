"""ShiftViT: variants, the shift, sizes, checkpoints."""

import pytest
import timm
import torch
import torch.nn.functional as F

from foveal.backbones.profile import profile
from foveal.backbones.shiftvit import ShiftViT, checkpoint_filter_fn, shift

# Parameters, GMACs at 224, and stochastic depth of the authors' code
VARIANTS = {
    "shiftvit_tiny_light": (19608328, 2.96, 0.2),
    "shiftvit_tiny": (28566664, 4.58, 0.2),
    "shiftvit_small_light": (33796360, 5.74, 0.4),
    "shiftvit_small": (50304136, 8.74, 0.4),
    "shiftvit_base_light": (59708776, 10.19, 0.5),
    "shiftvit_base": (89026408, 15.54, 0.6),
}


def small(**kwargs) -> ShiftViT:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_shiftvit", **{"num_classes": 10, **kwargs}).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    found = profile(name)
    with torch.device("meta"):
        last = timm.create_model(name).stages[-1].blocks[-1]
    assert (found.parameters, round(found.macs / 1e9, 2), last.drop_path.drop_prob) == VARIANTS[name]
    assert last.moved == 64


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_shift(size):
    """By one-hot 3x3 filters: a fifth of the channels from each neighbor, zeros beyond the border; the rest stays."""
    x = torch.randn(2, 10, *size, dtype=torch.double, requires_grad=True)
    weight = torch.zeros(10, 1, 3, 3, dtype=torch.double)
    for channel, (row, column) in enumerate([(1, 2), (1, 0), (2, 1), (0, 1), (1, 1)]):
        weight[2 * channel : 2 * channel + 2, 0, row, column] = 1
    want = F.conv2d(x, weight, padding=1, groups=10)
    assert torch.equal(shift(x, 2), want)
    cotangent = torch.randn_like(want)
    grads = [torch.autograd.grad(y, x, cotangent) for y in (shift(x, 2), want)]
    torch.testing.assert_close(*grads)


def test_remainders_are_cut_off_and_small_maps_padded():
    model = small()
    x = torch.randn(1, 3, 67, 5)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[2:] for m in maps] == [(16, 1), (8, 1), (4, 1), (2, 1)]
    torch.testing.assert_close(maps[0], model.stages[0](model.stem(x[:, :, :64, :4])))
    down = model.stages[1].downsample
    padded = F.conv2d(F.pad(down.norm(maps[0]), (0, 1)), down.reduction.weight, stride=2)
    torch.testing.assert_close(maps[1], model.stages[1].blocks(padded))


def test_norms_of_the_maps():
    model = small(features_only=True, out_norm=True)
    x = torch.randn(1, 3, 64, 96)
    for i, (got, raw) in enumerate(zip(model(x), small(features_only=True)(x), strict=True)):
        torch.testing.assert_close(got, F.group_norm(raw, 1))
        assert model.model.get_submodule(f"norm{i}").num_groups == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"n_div .*4.* 3"):
        small(n_div=3)


def test_foreign_checkpoints_are_refused():
    state = small().state_dict()
    with pytest.raises(ValueError, match=r"1 \(stem\.norm\.bias\).* none"):
        checkpoint_filter_fn({k: v for k, v in state.items() if k != "stem.norm.bias"}, small())
    with pytest.raises(ValueError, match=r"none.* 1 \(stages\.4\.downsample\.norm\.bias\)"):
        checkpoint_filter_fn({**state, "layers.3.downsample.norm.bias": torch.zeros(16)}, small())
