"""Agent-Swin and InLine-Swin: shifted windows against the authors' procedure, checkpoints."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from foveal.backbones.attention import AgentAttention2d, InlineAttention2d, ShiftedWindowAttention2d
from foveal.backbones.swin import Swin, checkpoint_filter_fn
from foveal.heads.build import build_backbone

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def small(**kwargs) -> Swin:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_agent_swin", **{"num_classes": 10, **kwargs}).eval()


def test_attention_of_the_blocks():
    """The last blocks of the third stage of B have windows, which are shifted by the number of the block."""
    with torch.device("meta"):
        models = [timm.create_model(f"{kind}_swin_b") for kind in ("agent", "inline")]
    for model, kind in zip(models, (AgentAttention2d, InlineAttention2d), strict=True):
        stages = [[block.attn for block in level.blocks] for level in model.layers]
        whole = [sum(isinstance(attn, kind) for attn in stage) for stage in stages]
        assert whole == [2, 2, 2, 0]
        for stage in stages:
            for j, attn in enumerate(stage):
                if not isinstance(attn, kind):
                    assert (attn.window_size, attn.shift) == (7, 3 * (j % 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 1, 1)), r"depths \(1, 1, 1\).*'num_heads': 4"),
        (dict(num_heads=(1, 2, 3, 4)), "dim 64 .*num_heads 3"),
        (dict(attention="linear"), "attention .*'linear'"),
        (dict(agent_shapes=(2, 2)), "'agent_shapes': 2"),
        (dict(attention="inline", agent_shapes=(2, 2, 2, 2)), r"agent_shapes \(2, 2, 2, 2\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_windows_alone_are_swin():
    """The same network as timm's, whose merging begins a stage; at sizes that need no padding."""
    shape = dict(embed_dim=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 4), window_size=4, img_size=128)
    torch.manual_seed(0)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, strict_img_size=False, **shape).eval()
    model = small(attention="softmax", mlp_ratio=4.0, **shape)
    state = {}
    for name, value in theirs.state_dict().items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        state[name.replace("head.fc.", "head.")] = value
    model.load_state_dict(checkpoint_filter_fn(state, model))
    x = torch.randn(2, 3, 128, 128)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- attention


def by_procedure(module: ShiftedWindowAttention2d, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Pad, roll, cut, mask and roll back; the table ``[(2w - 1)^2, heads]`` by query - key."""
    (B, H, W, C), w, heads = x.shape, module.window_size, module.num_heads
    shift = [module.shift if length > w else 0 for length in (H, W)]
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
    Hp, Wp = x.shape[1:3]

    def windows(t: torch.Tensor) -> torch.Tensor:  # B*n w*w C
        t = t.reshape(-1, Hp // w, w, Wp // w, w, t.shape[-1]).transpose(2, 3)
        return t.reshape(-1, w * w, t.shape[-1])

    regions = torch.zeros(1, Hp, Wp, 1)
    for axis, (length, s) in enumerate(zip((Hp, Wp), shift, strict=True)):
        number = torch.arange(length)
        number = (number >= length - w).int() + (number >= length - s).int()
        regions = regions + number.view((1, -1, 1, 1) if axis == 0 else (1, 1, -1, 1)) * 3**axis
    regions = windows(regions)[..., 0]
    mask = -100.0 * (regions[:, None] != regions[:, :, None])  # n q k
    rolled = windows(torch.roll(x, (-shift[0], -shift[1]), (1, 2)))
    q, k, v = module.qkv(rolled).reshape(len(rolled), w * w, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    at = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
    offset = at[:, :, None] - at[:, None] + w - 1
    bias = table[offset[0] * (2 * w - 1) + offset[1]].permute(2, 0, 1)
    logits = q @ k.mT * (C // heads) ** -0.5 + bias + mask.repeat(B, 1, 1)[:, None]
    y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(B, Hp // w, Wp // w, w, w, C).transpose(2, 3)
    y = torch.roll(y.reshape(B, Hp, Wp, C), shift, (1, 2))
    return module.proj(y[:, :H, :W])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [(6, 9), (7, 5), (3, 8), (2, 2), (1, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_windows_are_the_authors_procedure(size, shift):
    """With zeros as keys at the right and the bottom, which have the projections' biases; of all gradients."""
    torch.manual_seed(1)
    module = ShiftedWindowAttention2d(8, 2, 3, shift).double()
    nn.init.normal_(module.qkv.bias)
    x = torch.randn(2, *size, 8, dtype=torch.double, requires_grad=True)
    own = module.rel_pos.relative_position_bias_table
    results = []
    for out in (module(x), by_procedure(module, x, own.permute(1, 2, 0).flip(0, 1).flatten(0, 1))):
        results.append([out, *torch.autograd.grad(out.sin().sum(), (x, *module.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_bad_shift():
    with pytest.raises(ValueError, match=r"from 0 to 2 .*got 3"):
        ShiftedWindowAttention2d(8, 2, 3, 3)


# --------------------------------------------------------------------------------------------------------- checkpoints


def authors(state: dict[str, torch.Tensor], buffers: bool = True) -> dict[str, torch.Tensor]:
    """The names and the orientation of the authors' files, with the buffers of shifted windows."""
    result = {}
    for name, value in state.items():
        if name.endswith(".rel_pos.relative_position_bias_table"):
            side, value = value.shape[1] // 2 + 1, value.permute(1, 2, 0).flip(0, 1).flatten(0, 1)
            at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
            row, column = at[:, :, None] - at[:, None] + side - 1
            stem = name.partition("rel_pos.")[0]
            if buffers:
                result[f"{stem}relative_position_index"] = row * (2 * side - 1) + column
            if buffers and stem.endswith(".1.attn."):
                result[f"{stem.removesuffix('attn.')}attn_mask"] = torch.zeros(4, side**2, side**2)
        result[name.replace(".rel_pos.", ".").replace(".dwc.conv.", ".dwc.")] = value
    return result


def test_the_authors_files(tmp_path):
    """Of training, with its options as an object; the buffers are left out."""
    model = small()
    state = authors(model.state_dict())
    assert {"layers.0.blocks.0.attn.dwc.weight", "layers.3.blocks.1.attn_mask"} <= set(state)
    assert state["layers.2.blocks.0.attn.relative_position_bias_table"].shape == (25, 2)
    yacs = pytest.importorskip("yacs.config", reason="yacs is not installed (fvcore brings it)")
    options = yacs.CfgNode({"MODEL": {"NAME": "x", "DEPTHS": [1, 2]}, "AMP": None})
    options.freeze()
    torch.save({"model": state, "epoch": 299, "config": options}, tmp_path / "max_acc.pth")
    overlay = dict(file=str(tmp_path / "max_acc.pth"), num_classes=10)
    name = "test_foveal_agent_swin"
    loaded = timm.create_model(name, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(loaded(IMAGE), model(IMAGE), rtol=0, atol=0)


def test_detectors_need_the_shape_of_their_agents():
    shapes = dict(agent_shapes=(4, (3, 4), 3, 3))
    model = small(features_only=True, out_norm=True, **shapes)
    state = {f"backbone.{name}": value for name, value in authors(model.model.state_dict()).items()}
    found = checkpoint_filter_fn({"state_dict": {**state, "rpn_head.rpn_cls.bias": torch.ones(3)}}, model.model)
    assert all(torch.equal(value, found[name]) for name, value in model.model.state_dict().items())
    other = small(features_only=True, out_norm=True).model
    with pytest.raises(ValueError, match="agent_shapes"):
        checkpoint_filter_fn({"state_dict": state}, other)
    other.load_state_dict(model.model.state_dict())
    y, z = model(IMAGE)[0], other.forward_intermediates(IMAGE, intermediates_only=True)[0]
    assert not torch.allclose(y, z)
    state.pop("backbone.norm3.weight")
    with pytest.raises(ValueError, match=r"1 \(norm3\.weight\)"):
        checkpoint_filter_fn({"state_dict": state}, model.model)


def test_position_biases_of_another_size():
    """As the authors resample them: linearly along the axis of agents' biases, tables bicubically."""
    model, larger = small(), small(img_size=96, window_size=5)
    state = authors(model.state_dict())
    found = checkpoint_filter_fn(state, larger)
    larger.load_state_dict(found)
    assert larger(IMAGE).isfinite().all()
    name = "layers.0.blocks.0.attn."
    rows = F.interpolate(state[f"{name}ah_bias"][0], (24, 1), mode="bilinear")
    torch.testing.assert_close(found[f"{name}ah_bias"][0], rows)
    columns = F.interpolate(state[f"{name}wa_bias"][0].permute(0, 3, 1, 2), (1, 24), mode="bilinear")
    torch.testing.assert_close(found[f"{name}wa_bias"][0].permute(0, 3, 1, 2), columns)
    table = state["layers.2.blocks.0.attn.relative_position_bias_table"].T.view(1, 2, 5, 5)
    table = F.interpolate(table, (9, 9), mode="bicubic")[0].flip(1, 2)
    torch.testing.assert_close(found["layers.2.blocks.0.attn.rel_pos.relative_position_bias_table"], table)


def test_files_that_do_not_fit():
    model = small()
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"1 \(layers\.0\.blocks\.0\.attn\.an_bias\).* none"):
        checkpoint_filter_fn({k: v for k, v in state.items() if k != "layers.0.blocks.0.attn.an_bias"}, model)
    with pytest.raises(ValueError, match=r"none.* 1 \(layers\.7\.x\)"):
        checkpoint_filter_fn({**state, "layers.7.x": torch.zeros(1)}, model)


def test_what_does_not_decay():
    """As in the authors' recipes: the biases of agents decay in their classifiers alone."""
    names = {name.rpartition(".")[2] for name in small().no_weight_decay()}
    assert names == {"relative_position_bias_table"}
    backbone = build_backbone("test_foveal_agent_swin", agent_shapes=(2, 2, 3, 3))
    spared = {id(p) for group in backbone.parameter_groups(0.05) if group["weight_decay"] == 0 for p in group["params"]}
    kinds = {name.rpartition(".")[2] for name, p in backbone.named_parameters() if p.ndim > 1 and id(p) in spared}
    assert kinds == names | {f"{part}_bias" for part in ("an", "na", "ah", "aw", "ha", "wa")}
