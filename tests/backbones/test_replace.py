"""`replace_attention` in timm's models with windows; halo attention is in test_halonet.py."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import davit, maxxvit, swin_transformer, swin_transformer_v2, twins
from torch import nn

import foveal
from foveal.backbones.replace import replace_attention
from foveal.kernels import recording

SWIN = {
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "strict_img_size": False,
    "drop_path_rate": 0.0,
}
SMALL_MAXVIT = {"embed_dim": (64, 64), "depths": (1, 1), "stem_width": 8}
# model, arguments, image size, another that is no multiple of the windows, and how many modules are replaced
MODELS = {
    "swin_tiny_patch4_window7_224": (SWIN, 64, (72, 44), 4),
    "swinv2_tiny_window8_256": (SWIN, 64, (72, 44), 4),
    "twins_svt_small": ({"embed_dims": (8, 16), "num_heads": (2, 2), "depths": (2, 1), "wss": (4, 2)}, 32, (48, 40), 2),
    "davit_tiny": ({"embed_dims": (8, 16), "num_heads": (2, 2), "depths": (1, 1), "window_size": 4}, 64, (56, 76), 2),
    "test_maxvit": ({"img_size": 64}, 64, (96, 160), 8),
    "maxvit_rmlp_pico_rw_256": ({**SMALL_MAXVIT, "img_size": 96}, 96, (64, 160), 4),
    "maxvit_nano_rw_256": ({**SMALL_MAXVIT, "img_size": 96}, 96, (64, 160), 4),
    "maxxvit_rmlp_nano_rw_256": ({**SMALL_MAXVIT, "img_size": 96}, 96, (64, 160), 4),
    "maxvit_tiny_pm_256": ({**SMALL_MAXVIT, "img_size": 96}, 96, (64, 160), 2),
}
every = pytest.mark.parametrize("name", MODELS)
WINDOWED = (
    swin_transformer.SwinTransformerBlock,
    swin_transformer_v2.SwinTransformerV2Block,
    davit.SpatialBlock,
    twins.LocallyGroupedAttn,
    maxxvit.PartitionAttentionCl,
    maxxvit.PartitionAttention2d,
    maxxvit.ParallelPartitionAttention,
)


def create(name):
    """In float64, with parameters that are all felt."""
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model(name, num_classes=5, **MODELS[name][0]).double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            std = 0.5 if p.ndim == 1 or "table" in key else p[0].numel() ** -0.5
            p.copy_(std * torch.randn(p.shape, generator=generator).double() + (p.ndim == 1 and key.endswith("weight")))
    return model


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()


@every
def test_outputs_and_gradients_are_timms(name):
    _, size, _, count = MODELS[name]
    theirs = create(name)
    ours = copy.deepcopy(theirs)
    parameters = dict(ours.named_parameters())
    replaced = replace_attention(ours)
    assert len(replaced) == count and replace_attention(ours) == {}  # nothing left
    assert all(isinstance(ours.get_submodule(key), WINDOWED) for key in replaced)
    assert not any(type(module) in WINDOWED for module in ours.modules())
    assert all(p is parameters[key] for key, p in ours.named_parameters())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, calls, results = images(size, size), [], []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_(True)
        with recording(calls.append):
            out = model(leaf)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double()
        results.append([out, *torch.autograd.grad(out, [leaf, *model.parameters()], weight)])
    assert len(calls) == count * (2 if "pm" in name else 1)
    largest = max(float(t.abs().max()) for t in results[0][1:])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12 * largest)
    with torch.no_grad():
        for _ in range(2):  # the second time from the cache
            torch.testing.assert_close(ours(x), results[0][0], rtol=1e-10, atol=1e-12)


@every
def test_any_size(name):
    """Sizes that are no multiples of the windows, without a mask among the buffers."""
    model = create(name)
    replaced = replace_attention(model)
    calls = []
    with torch.no_grad(), recording(calls.append):
        assert torch.isfinite(model(images(*MODELS[name][2]))).all()
    assert any(n % k for call in calls for n, k in zip(call.problem.size, call.problem.kernel_size, strict=True))
    assert len(replaced) and not [key for key, _ in model.named_buffers() if "mask" in key]


def test_windows_end_at_the_border():
    """What timm's attention gives for the window alone, with no padding among its keys."""
    theirs = create("davit_tiny").stages[0].blocks[0][0].attn
    block = copy.deepcopy(create("davit_tiny").stages[0].blocks[0][0])
    replace_attention(block)
    x = torch.randn(2, 6, 9, 8).double()
    got = block.attn(x)
    for rows, columns in ((slice(0, 4), slice(0, 4)), (slice(4, 6), slice(4, 8)), (slice(4, 6), slice(8, 9))):
        window = x[:, rows, columns]
        want = theirs(window.flatten(1, 2)).unflatten(1, window.shape[1:3])
        torch.testing.assert_close(got[:, rows, columns], want)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_timms_methods_work_on(name):
    """Another image and window size, another precision, copies and pickles, gradient checkpointing, training."""
    theirs, ours = create(name), create(name)
    assert replace_attention(ours)["layers.0.blocks.1"] == "window_size=(4, 4), shift_size=(2, 2), num_heads=2"
    for model in (theirs, ours):
        model.set_input_size(img_size=(48, 72), window_size=3)
    x = images(48, 72)
    want = theirs(x)
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(model(x), want)
    assert ours.layers[0].blocks[1].attn_mask is None
    ours.set_grad_checkpointing(True)
    torch.testing.assert_close(ours.train()(x), want)
    ours.layers[0].blocks[1].attn.attn_drop.p = 0.25
    calls = []
    with recording(calls.append):
        ours(x), ours.eval()(x)
    assert [call.problem.dropout_p for call in calls] == [0, 0.25, 0, 0, 0, 0, 0, 0]
    assert torch.isfinite(ours.bfloat16()(x.bfloat16())).all()


def test_what_is_not_timms_own_is_left_alone():
    class Other(twins.LocallyGroupedAttn):
        pass

    model = create("swin_tiny_patch4_window7_224")
    blocks = model.layers[0].blocks
    blocks[0].attn = nn.Identity()
    shared = twins.LocallyGroupedAttn(8, num_heads=2, ws=3)
    found = replace_attention(
        nn.ModuleDict({"a": blocks, "b": shared, "c": nn.Sequential(shared), "d": Other(8, ws=3)})
    )
    assert list(found) == ["a.1", "b", "c.0"] and found["b"] == found["c.0"] == "window_size=(3, 3), num_heads=2"
    assert type(blocks[0]) is swin_transformer.SwinTransformerBlock
    assert foveal.replace_attention is replace_attention


@pytest.mark.parametrize("name", ["davit_tiny", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers(name):
    model, size = create(name).float(), MODELS[name][1]
    replace_attention(model)
    x = images(size, size).float()
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), want, rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="Attention"):
        torch.jit.script(model)
