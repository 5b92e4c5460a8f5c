"""Agent-CSWin and InLine-CSWin: stripes against their formula, checkpoints."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from foveal.backbones.attention import CrossShapedAttention2d
from foveal.backbones.cswin import CSWin, checkpoint_filter_fn

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def small(**kwargs) -> CSWin:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_agent_cswin", **{"num_classes": 10, **kwargs}).eval()


def by_formula(module: CrossShapedAttention2d, x: torch.Tensor) -> torch.Tensor:
    """One stripe after the other."""
    qkv = module.qkv(x).chunk(3, -1)
    if module.stripe_width is None:
        return module.proj(in_stripe(qkv, module.lepe[0].conv, module.num_heads))
    halves = zip(*(t.chunk(2, -1) for t in qkv), strict=True)
    outputs = []
    for axis, half, lepe in zip((2, 1), halves, module.lepe, strict=True):
        stripes = zip(*(t.split(module.stripe_width, axis) for t in half), strict=True)
        outputs.append(torch.cat([in_stripe(s, lepe.conv, module.num_heads // 2) for s in stripes], axis))
    return module.proj(torch.cat(outputs, -1))


def in_stripe(maps: tuple[torch.Tensor, ...], lepe: nn.Conv2d, heads: int) -> torch.Tensor:
    B, H, W, C = maps[0].shape
    q, k, v = (t.reshape(B, H * W, heads, C // heads).transpose(1, 2) for t in maps)
    y = ((q @ k.mT * (C // heads) ** -0.5).softmax(-1) @ v).transpose(1, 2).reshape(B, H, W, C)
    local = F.conv2d(maps[2].permute(0, 3, 1, 2), lepe.weight, lepe.bias, padding=1, groups=C)
    return y + local.permute(0, 2, 3, 1)


@pytest.mark.parametrize("width", [3, None])
@pytest.mark.parametrize("size", [(6, 9), (7, 5), (2, 8), (1, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_attention_is_its_formula(size, width):
    """With all gradients."""
    torch.manual_seed(1)
    module = CrossShapedAttention2d(8, 2, width).double()
    x = torch.randn(2, *size, 8, dtype=torch.double, requires_grad=True)
    results = []
    for out in (module(x), by_formula(module, x)):
        results.append([out, *torch.autograd.grad(out.sin().sum(), (x, *module.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_bad_heads():
    with pytest.raises(ValueError, match="num_heads 3"):
        CrossShapedAttention2d(12, 3, 7)


# --------------------------------------------------------------------------------------------------------- checkpoints


def authors(name: str) -> str:
    name = re.sub(r"^stem\.(proj|norm)\.", lambda m: f"stage1_conv_embed.{'02'[m[1] == 'norm']}.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.proj\.", r"merge\1.conv.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", r"merge\1.", name)
    name = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"stage{int(m[1]) + 1}.", name)
    name = re.sub(r"\.attn\.(qkv|proj)\.", r".\1.", name)
    name = re.sub(r"\.attn\.lepe\.(\d)\.conv\.", r".attns.\1.get_v.", name)
    return name.replace(".attn.dwc.conv.", ".attns.0.get_v.").replace(".attn.", ".attns.0.")


@pytest.mark.parametrize("attention", ["agent", "inline"])
def test_the_authors_files(attention, tmp_path):
    """The averaged weights, whose scores are published."""
    model = small(attention=attention)
    state = {authors(name): value for name, value in model.state_dict().items()}
    assert {"stage1_conv_embed.0.weight", "stage1.0.qkv.bias", "merge3.norm.bias"} <= set(state)
    assert {"stage1.0.attns.0.get_v.weight", "stage3.1.attns.1.get_v.bias", "stage4.0.attns.0.get_v.bias"} <= set(state)
    raw = {name: value + 1 for name, value in state.items()}
    content = {"model": raw, "state_dict_ema": state, "epoch": 309}
    found = checkpoint_filter_fn(content, model)
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    torch.save(content, tmp_path / "max_ema_acc.pth")
    overlay = dict(file=str(tmp_path / "max_ema_acc.pth"), num_classes=10)
    loaded = timm.create_model(
        "test_foveal_agent_cswin",
        pretrained=True,
        num_classes=10,
        attention=attention,
        pretrained_cfg_overlay=overlay,
    ).eval()
    torch.testing.assert_close(loaded(IMAGE), model(IMAGE), rtol=0, atol=0)


def test_files_that_do_not_fit():
    model = small()
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"1 \(stages\.0\.blocks\.0\.attn\.an_bias\).* none"):
        checkpoint_filter_fn({k: v for k, v in state.items() if k != "stages.0.blocks.0.attn.an_bias"}, model)
    with pytest.raises(ValueError, match=r"none.* 1 \(stages\.0\.blocks\.7\.attn\.x\)"):
        checkpoint_filter_fn({**state, "stage1.7.attns.0.x": torch.zeros(1)}, model)


def test_the_mean_is_of_the_map_before_its_norm():
    """That of inline attention: what a block adds depends on it even where the norm removes it."""
    block = small(attention="inline").stages[0].blocks[0]
    x = torch.randn(1, 8, 8, 16)
    assert not torch.allclose(block(x + 5) - (x + 5), block(x) - x)
