"""RaftMLP: variants, mixing by its definition, maps of other sizes, checkpoints of the authors' code."""

import pytest
import timm
import torch
import torch.nn.functional as F

from foveal.backbones.profile import profile
from foveal.backbones.raftmlp import RaftMixing, RaftMLP, checkpoint_filter_fn

# Parameters, and GMACs at 224, of the authors' code
VARIANTS = {"raftmlp_s": (9868768, 2.09), "raftmlp_m": (21413632, 4.27), "raftmlp_l": (36184672, 6.54)}


def small(**kwargs) -> RaftMLP:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_raftmlp", **{"num_classes": 10, **kwargs}).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    found = profile(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    assert (found.parameters, round(found.macs / 1e9, 2)) == VARIANTS[name]
    assert [stage.blocks[0].size for stage in model.stages] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert {block.drop_path.drop_prob for stage in model.stages for block in stage.blocks} == {0.1}


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_mixing_along_an_axis(axis):
    """Each raft of channels n apart, at all positions of a column or row, by itself."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 12)
    mixing = RaftMixing(12, {"rows": 5, "columns": 3}[axis], 3, axis)
    got, y, want = mixing(x), mixing.norm(x), torch.empty(2, 5, 3, 12)
    for raft in range(4):
        channels = [raft, raft + 4, raft + 8]
        for at in range({"rows": 3, "columns": 5}[axis]):
            where = (slice(None), slice(None), at) if axis == "rows" else (slice(None), at)
            part = y[where][:, :, channels]  # [B, length, 3]
            want[where][:, :, channels] = mixing.mlp(part.mT.flatten(1)).unflatten(1, (3, -1)).mT
    torch.testing.assert_close(got, want)


def test_other_sizes_are_resampled_in_every_block():
    model = small()
    x = torch.randn(1, 3, 70, 64)
    (first,) = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert first.shape[2:] == (18, 16)
    enlarged = F.interpolate(x, size=(72, 64), mode="bicubic")
    stem, block = model.stem, model.stages[0].blocks[0]
    embedded = stem.convs[0](enlarged) + stem.convs[1](enlarged)
    y = F.interpolate(embedded, size=(16, 16), mode="bicubic").permute(0, 2, 3, 1)
    y = y + block.vertical(y)
    y = y + block.horizontal(y)
    y = F.interpolate(y.permute(0, 3, 1, 2), size=(18, 16), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(first, (y + block.channel(y)).permute(0, 3, 1, 2))


def test_another_training_size():
    model = small(img_size=(96, 40))
    assert [stage.blocks[0].size for stage in model.stages] == [(24, 10), (12, 5), (6, 3), (3, 2)]
    assert model.stages[1].blocks[0].horizontal.mlp.fc1.in_features == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 1)), r"depths=\(1, 1\)"),
        (dict(embed_dims=(16, 25, 32, 64)), r"raft_size=2.* 25"),
        (dict(img_size=0), "img_size"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_checkpoints_that_do_not_fit():
    state = small().state_dict()
    with pytest.raises(ValueError, match=r"1 \(norm\.bias\).* none"):
        checkpoint_filter_fn({k: v for k, v in state.items() if k != "norm.bias"}, small())
    with pytest.raises(ValueError, match=r"stem .* 240 .* 192"):
        checkpoint_filter_fn({**state, "levels.0.fn.0.fc.weight": torch.zeros(16, 192)}, small())
