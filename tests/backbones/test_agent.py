"""Agent and InLine attention against their formulas, the variants of their four hosts, and DeiT and PVT: sizes,
checkpoints."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F

import foveal
from foveal.backbones.attention import AgentAttention2d, InlineAttention2d, SoftmaxAttention2d
from foveal.backbones.profile import profile

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


@pytest.mark.parametrize(
    ("host", "shape", "size", "message"),
    [
        ("map", (1, 30, 12), (6, 6), r"36 tokens.* \(1, 30, 12\)"),
        ("map", (1, 30, 12), None, r"\(1, 30, 12\)"),
        ("map", (1, 6, 5, 12), (6, 5), r"\(1, 6, 5, 12\)"),
        ("class token", (1, 30, 12), (6, 5), r"1 \+ 30 tokens.* \(1, 30, 12\)"),
        ("class token", (1, 6, 5, 12), None, r"\(1, 6, 5, 12\)"),
    ],
)
@pytest.mark.parametrize("kind", [AgentAttention2d, InlineAttention2d, SoftmaxAttention2d])
def test_inputs_that_do_not_fit(kind, host, shape, size, message):
    module = kind(12, 3, *((2, (6, 5)) if kind is AgentAttention2d else ()), **HOSTS[host])
    with pytest.raises(ValueError, match=message):
        module(torch.randn(shape), size)


# ------------------------------------------------------------------------------------------------------------ variants

# Parameters of the authors' code, and GMACs next to those of their READMEs, which count no products of the attention in
# part; of InLine they count the convolutions as a few.
VARIANTS = {
    "agent_deit_t": (6_015_640, 1.2),
    "agent_deit_s": (22_647_112, 4.4),
    "agent_deit_s_448": (23_070_472, 17.7),
    "agent_deit_b": (87_204_904, 17.6),
    "agent_pvt_t": (11_570_352, 2.0),
    "agent_pvt_s": (20_635_066, 4.0),
    "agent_pvt_m": (35_921_746, 7.0),
    "agent_pvt_m_256": (36_083_682, 9.2),
    "agent_pvt_l": (48_738_180, 10.4),
    "inline_deit_t": (6_477_736, 1.1),
    "inline_deit_s": (16_734_760, 5.0),
    "inline_deit_b": (23_797_096, 17.2),
    "inline_pvt_t": (12_032_232, 2.0),
    "inline_pvt_s": (21_556_136, 3.9),
    "inline_pvt_m": (37_618_856, 6.9),
    "inline_pvt_l": (51_154_280, 10.2),
    "agent_swin_t": (28_902_964, 4.5),
    "agent_swin_s": (49_666_684, 8.7),
    "agent_swin_s_288": (49_707_964, 14.6),
    "agent_swin_b": (88_095_096, 15.4),
    "agent_swin_b_384": (88_305_016, 46.3),
    "inline_swin_t": (29_223_544, 4.5),
    "inline_swin_s": (49_793_296, 8.7),
    "inline_swin_b": (88_350_120, 15.4),
    "agent_cswin_t": (20_458_672, 4.3),
    "agent_cswin_s": (32_814_100, 6.8),
    "agent_cswin_b": (73_249_696, 14.9),
    "agent_cswin_b_384": (73_328_416, 46.3),
    "inline_cswin_t": (20_604_520, 4.3),
    "inline_cswin_s": (33_032_872, 6.8),
    "inline_cswin_b": (73_413_640, 14.9),
}
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def small(name: str = "test_foveal_agent_pvt", **kwargs) -> torch.nn.Module:
    """With position biases that matter."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 10, **kwargs}).eval()
    for name, p in model.named_parameters():
        p.data.add_(torch.randn_like(p) * (1 if name.endswith("_bias") else 0.05))
    return model


def load(state: dict, name: str = "test_foveal_agent_pvt", **kwargs) -> torch.nn.Module:
    """Create a model with a state dict as its pretrained weights, timm's way."""
    overlay = dict(state_dict=state, num_classes=10)
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 10, **kwargs}
    ).eval()


def authors(name: str) -> str:
    """The authors' name of a parameter of PVT."""
    name = re.sub(r"^stem\.", "stages.0.downsample.", name).replace(".dwc.conv.", ".dwc.")
    if match := re.match(r"stages\.(\d)\.(downsample\.pos_embed|downsample\.|blocks\.)", name):
        part = {"downsample.pos_embed": "pos_embed{}", "downsample.": "patch_embed{}.", "blocks.": "block{}."}[match[2]]
        name = part.format(int(match[1]) + 1) + name[match.end() :]
    return name


def published(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a PVT under the names and with the shapes of the authors' files."""
    state = {authors(name): value for name, value in model.state_dict().items()}
    return {name: value.flatten(1, 2) if "pos_embed" in name else value for name, value in state.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_size(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == VARIANTS[name][0]


@pytest.mark.parametrize("name", [n if n.endswith("_t") else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS])
def test_cost(name):
    assert profile(name).macs / 1e9 == pytest.approx(VARIANTS[name][1], rel=0.03 if "swin" in name else 0.06)


def test_configuration():
    with torch.device("meta"):
        deit, pvt = timm.create_model("agent_deit_b"), timm.create_model("inline_pvt_l")
    kinds = [type(block.attn) for block in deit.blocks]
    assert kinds == [AgentAttention2d] * 4 + [SoftmaxAttention2d] * 8
    assert (deit.blocks[0].attn.agents, deit.blocks[-1].drop_path.drop_prob) == ((9, 9), pytest.approx(0.3))
    assert (pvt.stem.norm.eps, pvt.stages[0].blocks[0].norm1.eps) == (1e-5, 1e-6)
    for model in (deit, pvt):
        assert (model.default_cfg["license"], model.default_cfg["crop_mode"]) == ("none stated", "squash")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("agent_pvt", dict(depths=(1, 1, 1)), r"depths \(1, 1, 1\).*'embed_dims': 4"),
        ("agent_pvt", dict(agent_shapes=(2, 2, 3)), r"'agent_shapes': 3"),
        ("agent_pvt", dict(attention="linear"), "agent, inline, softmax.*'linear'"),
        ("agent_deit", dict(attention="linear"), "agent, inline, softmax.*'linear'"),
        ("agent_deit", dict(num_heads=5), "dim 64 .*num_heads 5"),
        ("agent_deit", dict(global_pool="mean"), "'token'.*'mean'"),
        ("agent_pvt", dict(attention="inline", agent_shapes=(2, 2, 2, 2)), r"agent_shapes \(2, 2, 2, 2\)"),
    ],
)
def test_arguments_of_models(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(f"test_foveal_{name}", **arguments)


@pytest.mark.parametrize("size", [(128, 128), (32, 128)])
def test_position_embeddings_are_interpolated_in_every_stage(size):
    """Also where the second map, or the first, has as many positions as one in training, of 64x64: 16 x 16."""
    model = small("test_foveal_inline_pvt")
    x = torch.randn(1, 3, *size)
    embeddings = [model.stem, *(stage.downsample for stage in model.stages[1:])]
    want = model(x)
    for i, each in enumerate(embeddings):
        own = each.pos_embed.permute(0, 3, 1, 2)
        resized = interpolate(own, (size[0] // (4 * 2**i), size[1] // (4 * 2**i)))
        each.pos_embed = torch.nn.Parameter(resized.permute(0, 2, 3, 1))
    torch.testing.assert_close(model(x), want)


def test_class_token_and_other_pools():
    model = small("test_foveal_agent_deit")
    tokens = model.forward_features(IMAGE)
    assert tokens.shape == (2, 1 + 4 * 6, 64)
    torch.testing.assert_close(model(IMAGE), model.head(tokens[:, 0]))
    weights = copy.deepcopy(model.head)
    model.reset_classifier(10, "avg")
    model.head = weights
    torch.testing.assert_close(model(IMAGE), model.head(tokens[:, 1:].mean(1)))


def test_hooks_get_maps():
    """Of the positions, as `forward_intermediates` gives them."""
    model = small("test_foveal_agent_deit")
    by_hooks = timm.create_model("test_foveal_agent_deit", features_only=True, feature_cls="hook", out_indices=(0, 2))
    by_hooks.load_state_dict({f"body.{name}": p for name, p in model.state_dict().items() if "head." not in name})
    maps = model.forward_intermediates(IMAGE, [0, 2], output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(by_hooks.eval()(IMAGE), maps)


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_file_with_a_configuration_of_yacs(tmp_path):
    """Read without running code of it, by timm and by this package; yacs itself is not needed."""
    config = pytest.importorskip("yacs.config", reason="yacs is not installed").CfgNode
    model = small()
    settings = config({"MODEL": {"TYPE": "agent_pvt", "NAMES": ["x"]}, "LR": 1e-3})
    file = tmp_path / "max_acc.pth"
    torch.save({"model": published(model), "optimizer": {"state": {}}, "max_accuracy": 78.4, "config": settings}, file)
    overlay = dict(pretrained_cfg_overlay=dict(file=str(file), num_classes=10), num_classes=10)
    for loaded in (
        timm.create_model("test_foveal_agent_pvt", pretrained=True, **overlay).eval(),
        foveal.load("test_foveal_agent_pvt", **overlay),
    ):
        torch.testing.assert_close(loaded(IMAGE), model(IMAGE))


def test_a_dense_file_needs_its_agents():
    """The same weights give other outputs with more agents; where these are not given, the file is refused."""
    model = small()
    state = {f"backbone.{name}": x for name, x in published(model).items() if not name.startswith("head.")}
    state |= {"neck.fpn_convs.0.conv.weight": torch.ones(1)}
    for wrapped in (state, {f"module.{name}": x for name, x in state.items()}, {"state_dict": state}):
        with pytest.raises(ValueError, match="agent_shapes"):
            load(wrapped, features_only=True)
    same, more = (load(state, features_only=True, agent_shapes=shapes) for shapes in ((2, 2, 3, 3), (4, 4, 6, 6)))
    want = model.forward_intermediates(IMAGE, intermediates_only=True)
    torch.testing.assert_close(same(IMAGE), want)
    assert not torch.allclose(more(IMAGE)[0], want[0], rtol=1e-3)
    assert load(state, "test_foveal_agent_pvt", features_only=True, agent_shapes=((2, 4), 2, 3, 3))(IMAGE)


@pytest.mark.parametrize("name", ["test_foveal_agent_pvt", "test_foveal_agent_deit"])
def test_another_training_size(name):
    """Rows and columns as at any size, position embeddings by bicubic interpolation."""
    model, x = small(name), torch.randn(1, 3, 96, 128)
    state = published(model) if "pvt" in name else model.state_dict()
    other = load(state, name, img_size=(96, 128))
    want = model(x)
    if "pvt" in name:
        assert other.stages[1].downsample.pos_embed.shape[1:3] == (12, 16)
        for ours, theirs in zip(model.modules(), other.modules(), strict=True):
            if hasattr(ours, "pos_embed"):
                ours.pos_embed = theirs.pos_embed
        want = model(x)
    torch.testing.assert_close(other(x), want)


def test_files_that_do_not_fit():
    state = published(small())
    with pytest.raises(ValueError, match=r"1 \(stages\.0\.blocks\.0\.attn\.dwc\.conv\.weight\).* none"):
        load({k: v for k, v in state.items() if k != "block1.0.attn.dwc.weight"})
    with pytest.raises(ValueError, match=r"none.* 1 \(stages\.0\.blocks\.7\.x\)"):
        load({**state, "block1.7.x": torch.zeros(1)})
