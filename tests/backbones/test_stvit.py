"""STViT: variants, super token attention by its definition, half precision, checkpoints."""

import argparse

import pytest
import timm
import torch
import torch.nn.functional as F

from foveal.backbones.attention import SuperTokenAttention2d, TokenAttention2d, associate
from foveal.backbones.profile import profile
from foveal.backbones.stvit import STViT, checkpoint_filter_fn
from foveal.kernels import neighborhood_attention

# Trainable parameters of the authors' code, and GMACs at 224 and 384 as in their README, which counts the 3x3
# convolutions by which they copy neighbors, and for B at 384 (32.5) more than that.
VARIANTS = {
    "stvit_s": (25_495_624, 4.4, 14.1),
    "stvit_b": (51_691_288, 9.9, 31.4),
    "stvit_l": (94_971_096, 15.6, 49.7),
}
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def small(**kwargs) -> STViT:
    torch.manual_seed(0)
    model = timm.create_model("test_foveal_stvit", **{"num_classes": 10, **kwargs}).eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    return model


def load(state_dict: dict, classes: int = 10, **kwargs) -> STViT:
    """Create a model with a state dict as its pretrained weights, timm's way; ``classes`` are the weights' own."""
    overlay = dict(state_dict=state_dict, num_classes=classes)
    return timm.create_model("test_foveal_stvit", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize("name", VARIANTS)
def test_size_and_cost(name):
    parameters, at_224, at_384 = VARIANTS[name]
    found, larger = profile(name), profile(f"{name}.in1k_384")
    assert (found.parameters, larger.parameters, larger.input_size) == (parameters, parameters, (3, 384, 384))
    assert abs(found.macs / 1e9 - at_224) < 0.08
    assert abs(larger.macs / 1e9 - at_384) < 0.15


def test_configuration():
    with torch.device("meta"):
        small_, base = timm.create_model("stvit_s"), timm.create_model("stvit_b.in1k_384", drop_path_rate=0.4)
    assert [level.blocks[0].attn.token_size for level in base.layers] == [8, 4, 1, 1]
    assert [level.blocks[0].gamma_1 is None for level in base.layers] == [True, True, False, False]
    assert all(level.blocks[0].gamma_2 is None for level in small_.layers)
    assert base.layers[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.4)
    assert base.default_cfg["license"] == "none stated" and "no licence" in base.default_cfg["notes"][0]
    assert (base.default_cfg["crop_pct"], small_.default_cfg["crop_pct"]) == (1.0, 0.875)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 1, 1)), r"depths \(1, 1, 1\).*'embed_dims': 4"),
        (dict(num_heads=(1, 2, 5, 4)), "dim 48 .*num_heads 5"),
        (dict(token_sizes=(8, 0, 1, 1)), "token_size .*0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


# ----------------------------------------------------------------------------------------------------------- attention


def by_definition(x: torch.Tensor, attention: SuperTokenAttention2d) -> torch.Tensor:
    """Position by position; ``x`` is one image ``[H, W, C]``."""
    (H, W, C), s = x.shape, attention.token_size
    h, w = -(-H // s), -(-W // s)
    padded = F.pad(x, (0, 0, 0, w * s - W, 0, h * s - H))
    cells = [
        [(i, j) for i in range(y * s, y * s + s) for j in range(k * s, k * s + s)] for y in range(h) for k in range(w)
    ]
    means = torch.stack([torch.stack([padded[at] for at in cell]).mean(0) for cell in cells])
    weights = torch.zeros(h * s, w * s, h * w, dtype=x.dtype)
    for i, j in ((i, j) for i in range(h * s) for j in range(w * s)):
        near = [(i // s + di, j // s + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]
        numbers = [a * w + b if 0 <= a < h and 0 <= b < w else None for a, b in near]
        logits = torch.stack([torch.zeros(()).to(x) if n is None else padded[i, j] @ means[n] for n in numbers])
        for n, weight in zip(numbers, (logits * C**-0.5).softmax(0).detach(), strict=True):
            if n is not None:
                weights[i, j, n] = weight
    tokens = torch.einsum("ijn,ijc->nc", weights, padded) / (weights.sum((0, 1))[:, None] + 1e-12)
    tokens = attention.stoken_refine(tokens.view(1, h, w, C)).view(h * w, C)
    return torch.einsum("ijn,nc->ijc", weights, tokens)[:H, :W]


@pytest.mark.parametrize(("size", "shape"), [(2, (6, 4)), (3, (7, 5)), (4, (3, 9))])
def test_super_token_attention_by_its_definition(size, shape):
    """With maps that are padded to whole cells; the gradient is not that of the association."""
    torch.manual_seed(0)
    attention = SuperTokenAttention2d(8, 2, size).double()
    x = (2 * torch.randn(2, *shape, 8, dtype=torch.double)).requires_grad_(True)
    got, want = attention(x), torch.stack([by_definition(each, attention) for each in x])
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(got)
    (gradient,), (expected,) = (torch.autograd.grad((y * weight).sum(), x) for y in (got, want))
    torch.testing.assert_close(gradient, expected)


def test_the_association_is_neighborhood_attention():
    """To the 3x3 cells around, with the positions of a cell as heads: the mean of the super tokens by their weights."""
    torch.manual_seed(0)
    pixels = torch.randn(2, 5, 7, 4, 6, dtype=torch.double)
    means = pixels.mean(3, keepdim=True).expand_as(pixels)
    values = torch.randn(2, 5, 7, 1, 6, dtype=torch.double)
    want = neighborhood_attention(
        pixels, means, values.expand_as(pixels), kernel_size=3, boundary="zero", scale=6**-0.5, backend="reference"
    )
    windows = F.unfold(values[:, :, :, 0].permute(0, 3, 1, 2), 3, padding=1).view(2, 6, 9, 5, 7)
    got = torch.einsum("bhwpk,bckhw->bhwpc", associate(pixels), windows)
    torch.testing.assert_close(got, want)


def test_heads_are_next_to_each_other():
    attention = TokenAttention2d(6, 2)
    x = torch.randn(1, 3, 4, 6)
    q, k, v = attention.qkv(x).view(12, 2, 3, 3).permute(2, 1, 0, 3)  # heads, positions, channels each
    want = ((q @ k.mT) * 3**-0.5).softmax(-1) @ v
    torch.testing.assert_close(attention(x), attention.proj(want.transpose(0, 1).reshape(1, 3, 4, 6)))


def test_token_sizes_fit_the_same_weights():
    model = small()
    other = small(token_sizes=(8, 4, 1, 1))
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(model(IMAGE), other(IMAGE), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_the_model(dtype):
    model = small()
    want = model(IMAGE)
    got = model.to(dtype)(IMAGE.to(dtype)).float()
    assert (got - want).abs().max() < 10 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
def test_a_super_token_without_weights(dtype):
    """All positions of the cell between two are like one of these: no division by zero."""
    first, second = 30 * torch.eye(4)[:2]
    x = torch.stack([first, first, first, second, second, second]).expand(1, 2, 6, 4).to(dtype)
    assert torch.isfinite(SuperTokenAttention2d(4, 1, 2).to(dtype)(x)).all()


def test_a_block_by_its_definition():
    block = small().layers[2].blocks[1]
    x = torch.randn(2, 5, 7, 48)
    y = x + block.pos_embed.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y = y + block.gamma_1 * block.attn(F.layer_norm(y, (48,), block.norm1.weight, block.norm1.bias, 1e-6))
    z = F.gelu(block.mlp2.fc1(block.norm2(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    z = block.mlp2.fc2((z + block.mlp2.dwconv.conv(z)).permute(0, 2, 3, 1))
    torch.testing.assert_close(block(x), y + block.gamma_2 * z)


# --------------------------------------------------------------------------------------------------------- checkpoints


def authors(model: STViT) -> dict[str, torch.Tensor]:
    """The state of a model under the names and with the shapes and constants of the authors' files."""
    names = {".norm1.": ".norm1.norm.", ".mlp2.dwconv.": ".mlp2.conv.", ".downsample.reduction.": ".downsample.proj.0."}
    names |= {".downsample.norm.": ".downsample.proj.1."}
    found = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if value.ndim == 2 and name != "head.weight":
            value = value[:, :, None, None]
        found[name] = value.permute(0, 3, 1, 2) if "gamma" in name else value
        if name.endswith(".norm2.weight"):
            block = name.removesuffix("norm2.weight")
            found |= {f"{block}attn.{kind}.weights": torch.eye(9).view(9, 1, 3, 3) for kind in ("fold", "unfold")}
    return found


def test_the_authors_file():
    """With averaged weights, constants, an optimizer and options; the score is of the raw weights."""
    model = small()
    state = authors(model)
    assert state["layers.2.blocks.0.attn.stoken_refine.qkv.weight"].shape == (144, 48, 1, 1)
    averaged = {name: value + 1 for name, value in state.items()}
    file = {"model": state, "model_ema": averaged, "epoch": 3, "scaler": {}, "args": argparse.Namespace(lr=1e-3)}
    found = checkpoint_filter_fn(file, model)
    torch.testing.assert_close(found, model.state_dict())
    torch.testing.assert_close(load(state)(IMAGE), model(IMAGE))
    assert load(state, num_classes=0)(IMAGE).shape == (2, 96)


def test_map_norms():
    """Not of the authors' files; they keep their initial values."""
    model = small()
    plain = model.forward_intermediates(IMAGE, intermediates_only=True)
    maps = load(authors(model), features_only=True, out_norm=True)(IMAGE)
    for x, y in zip(plain, maps, strict=True):
        normalized = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(y, normalized)


def test_files_that_do_not_fit():
    state = authors(small())
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0\.attn\.fold\.weights"):
        load(state | {"layers.0.blocks.0.attn.fold.weights": torch.ones(9, 1, 3, 3)})
    with pytest.raises(ValueError, match=r"missing .*layers\.0.*unexpected .*blocks\.7"):
        load({"layers.9.blocks.7.x": torch.ones(1)})
