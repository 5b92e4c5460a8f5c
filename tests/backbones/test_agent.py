"""Agent and InLine attention against their formulas, at any size, with a class token, and with other agents."""

import pytest
import torch
import torch.nn.functional as F

from foveal.backbones.attention import AgentAttention2d, InlineAttention2d, SoftmaxAttention2d

HOSTS = {"map": {}, "PVT's": dict(split_q=True), "class token": dict(class_token=True)}


def layer(kind: type, *args, **kwargs) -> SoftmaxAttention2d:
    torch.manual_seed(1)
    module = kind(12, 3, *args, **kwargs).double()
    for p in module.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return module


def qkv(module: SoftmaxAttention2d, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``[B, N, C]`` each."""
    if module.split_q:
        return (module.q(x), *module.kv(x).chunk(2, -1))
    return module.qkv(x).chunk(3, -1)


def split(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (3, 4)).transpose(1, 2)  # B heads N D


def interpolate(x: torch.Tensor, size) -> torch.Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def position_bias(coarse, lines, token, size, agents, shape) -> torch.Tensor:
    """``[heads, A, (1 +) N]`` from ``lines``, the sum of rows and columns ``[heads, A, H0, W0]``."""
    bias = (interpolate(coarse, size) + interpolate(lines, size)).flatten(2)
    if token is not None:
        bias = torch.cat([token, bias], -1)
    by_agent = bias.transpose(1, 2).unflatten(2, agents)
    return interpolate(by_agent, shape).flatten(2).transpose(1, 2)


def agent_formula(module: AgentAttention2d, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    q, k, v = qkv(module, x)
    first = module.prefix
    agents = F.adaptive_avg_pool2d(q[:, first:].mT.unflatten(2, size), module.agent_shape).flatten(2).mT
    shapes = size, module.agents, module.agent_shape
    token = [module.ac_bias[0], module.ca_bias[0].mT] if first else [None, None]
    ha, wa = (each[0].permute(0, 3, 1, 2) for each in (module.ha_bias, module.wa_bias))
    read = position_bias(module.an_bias, module.ah_bias[0] + module.aw_bias[0], token[0], *shapes)
    give = position_bias(module.na_bias, ha + wa, token[1], *shapes)
    values = (split(agents) @ split(k).mT / 2 + read).softmax(-1) @ split(v)
    y = (split(q) @ split(agents).mT / 2 + give.mT).softmax(-1) @ values
    y = y.transpose(1, 2).flatten(2)
    local = F.conv2d(v[:, first:].mT.unflatten(2, size), module.dwc.conv.weight, module.dwc.conv.bias, 1, 1, 1, 12)
    return module.proj(torch.cat([y[:, :first], y[:, first:] + local.flatten(2).mT], 1))


def inline_formula(module: InlineAttention2d, x: torch.Tensor, size: tuple[int, int], source=None) -> torch.Tensor:
    q, k, v = qkv(module, x)
    first, count = module.prefix, x.shape[1]
    logits = split(q) @ split(k).mT / 2
    y = ((logits - logits.mean(-1, keepdim=True) + 1) / count) @ split(v)
    y = y.transpose(1, 2).flatten(2)
    kernel = module.residual((x if source is None else source).mean(1)[..., None]).reshape(-1, 1, 3, 3)
    values = v[:, first:].mT.unflatten(2, size)
    local = F.conv2d(values.flatten(0, 1)[None], kernel, padding=1, groups=len(kernel)).view_as(values)
    if module.dwc is not None:
        local = local + F.conv2d(values, module.dwc.conv.weight, module.dwc.conv.bias, 1, 1, 1, 12)
    return module.proj(torch.cat([y[:, :first], y[:, first:] + local.flatten(2).mT], 1))


def compare(module: SoftmaxAttention2d, formula, size: tuple[int, int]) -> None:
    """Outputs and all gradients; tokens in and out if there is a class token."""
    x = torch.randn(2, module.prefix + size[0] * size[1], 12, dtype=torch.double, requires_grad=True)
    got = module(x, size) if module.prefix else module(x.unflatten(1, size)).flatten(1, 2)
    parameters = [x, *module.parameters()]
    results = [[out, *torch.autograd.grad(out.sin().sum(), parameters)] for out in (got, formula(module, x, size))]
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("size", [(6, 5), (9, 16), (1, 1)])
@pytest.mark.parametrize("agent_shape", [None, (4, 3)])
def test_agent_attention_is_its_formula(host, size, agent_shape):
    compare(layer(AgentAttention2d, (2, 3), (6, 5), agent_shape, **HOSTS[host]), agent_formula, size)


@pytest.mark.parametrize("host", [*HOSTS, "CSWin's"])
@pytest.mark.parametrize("size", [(6, 5), (1, 1)])
def test_inline_attention_is_its_formula(host, size):
    compare(layer(InlineAttention2d, **HOSTS.get(host, dict(lepe=True))), inline_formula, size)


def test_the_kernel_of_cswin_is_of_the_input_before_the_norm():
    module = layer(InlineAttention2d, lepe=True)
    x, before = torch.randn(2, 2, 4, 5, 12, dtype=torch.double)
    want = inline_formula(module, x.flatten(1, 2), (4, 5), before.flatten(1, 2))
    torch.testing.assert_close(module(x, None, before).flatten(1, 2), want)


def test_position_biases_are_kept_in_eval_and_follow_their_parameters():
    module = layer(AgentAttention2d, 2, (6, 5)).eval()
    x = torch.randn(1, 6, 8, 12, dtype=torch.double)
    with torch.no_grad():
        before, held = module(x), module.cache.nbytes
        assert held > 0
        module.na_bias.mul_(2)
        assert not torch.allclose(module(x), before)


@pytest.mark.parametrize("kind", [AgentAttention2d, InlineAttention2d])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype):
    """At as many positions as the first stage has at 224."""
    module = layer(kind, *((3, 56) if kind is AgentAttention2d else ())).float()
    x = torch.randn(1, 56, 56, 12)
    want = module(x)
    got = module.to(dtype)(x.to(dtype)).float()
    assert (got - want).abs().max() < 10 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, 3, 7), "dim 5.* num_heads 3"), ((6, 3, 0, 7), "agents .*0"), ((6, 3, 2, (7,)), r"map_size .*\(7,\)")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AgentAttention2d(*(arguments if len(arguments) == 4 else (*arguments, 7)))
