"""MoH-ViT: variants, gates against their formula, the load-balancing loss, checkpoints."""

import pytest
import timm
import torch

from foveal.backbones.moh_vit import HeadGates, MoHViT, checkpoint_filter_fn
from foveal.backbones.profile import profile
from foveal.configs.schema import ConfigError, load_config
from foveal.train.losses import prepare_heads

from .test_transnext import IMAGE, authors

VARIANTS = {
    "moh_vit_s_80": 49_910_548,
    "moh_vit_s_75": 49_910_548,
    "moh_vit_b_75": 90_020_632,
    "moh_vit_b_50": 90_023_512,
}


def small(**kwargs) -> MoHViT:
    torch.manual_seed(0)
    return timm.create_model("test_foveal_moh_vit", **{"num_classes": 10, **kwargs}).eval()


def gates(routed: int = 2) -> HeadGates:
    torch.manual_seed(1)
    module = HeadGates(8, 2 + 2 * routed, 2, routed)
    for p in module.parameters():
        p.data.normal_()
    return module


@pytest.mark.parametrize("name", VARIANTS)
def test_size(name):
    assert profile(name).parameters == VARIANTS[name]


@pytest.mark.parametrize(("shared", "routed"), [(1, 2), (4, 1), (2, 0), (2, 3), (5, 0)])
def test_heads_that_do_not_fit(shared, routed):
    with pytest.raises(ValueError, match=f"{shared} .*{routed} .* 4"):
        HeadGates(8, 4, shared, routed)


def test_stages_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shared_heads=\(2, 2\).* 4 stages"):
        small(shared_heads=(2, 2))


def test_gates_position_by_position():
    module, x = gates(), torch.randn(1, 2, 3, 8)
    got = module(x)[0]
    for y in range(2):
        for column in range(3):
            at = x[0, y, column]
            scores = (module.wg.weight @ at).softmax(0)
            chosen = sorted(range(4), key=lambda i: -scores[i])[:2]
            kept = torch.tensor([2 * scores[i].item() / scores[chosen].sum().item() * (i in chosen) for i in range(4)])
            both = 2 * (module.wg_0.weight @ at).softmax(0)
            shared = 2 * (module.wg_1.weight @ at).softmax(0)
            torch.testing.assert_close(got[y, column], torch.cat([both[0] * shared, both[1] * kept]))
    assert torch.allclose(gates(0)(x).sum(-1), torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_routing_is_float32_in_any_precision(dtype):
    """The same heads as for the same values in float32, also under autocast."""
    module, x = gates().to(dtype), torch.randn(4, 16, 16, 8).to(dtype)
    got, exact = module(x), module.float()(x.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x.float()), exact)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_load_balancing_loss(checkpointing):
    """A value that the model returns in training alone, with gradients, from every layer that routes."""
    model = small(drop_path_rate=0.0).train()
    layers = [m for m in model.modules() if isinstance(m, HeadGates) and m.routed]
    seen = []
    handles = [m.register_forward_hook(lambda m, given, _: seen.append(m.balance(given[0]))) for m in layers]
    want = model(IMAGE)
    for handle in handles:
        handle.remove()
    model.set_grad_checkpointing(checkpointing)
    model.set_auxiliary_training()
    logits, loss = model(IMAGE)
    torch.testing.assert_close((logits, loss), (want, sum(seen) / len(layers)))
    (weight,) = torch.autograd.grad(loss, layers[0].wg.weight, retain_graph=True)
    assert weight.abs().max() > 0
    (logits.sum() + loss).backward()
    assert all(m.collected is None for m in layers)
    assert model.eval()(IMAGE).shape == logits.shape
    x = torch.zeros(1, 2, 2, 8)
    module = gates()
    module.wg.weight.data.zero_()
    assert float(module.balance(x)) == pytest.approx(2.0)  # two of four take part: 4 * sum of 1/4 * share


def test_recipes_add_the_loss():
    config = load_config("classify/moh_vit_s_75")
    model = small()
    prepare_heads(model, config)
    assert model.auxiliary_training and config.loss.auxiliary == 0.01
    config.loss.auxiliary = 0.0
    with pytest.raises(ConfigError, match="auxiliary"):
        prepare_heads(model, config)


def test_the_authors_names():
    model = small()
    state = {authors(name).replace(".gates.", "."): value for name, value in model.state_dict().items()}
    assert {"block3.1.attn.wg.weight", "block3.1.attn.wg_0.weight", "block1.0.attn.wg_1.weight"} <= set(state)
    found = checkpoint_filter_fn({"model": state, "epoch": 3}, model)
    torch.testing.assert_close(found, dict(model.state_dict()))
