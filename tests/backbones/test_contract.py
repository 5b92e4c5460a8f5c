"""What every backbone owes timm and PyTorch's tools, on very small models of every family and network class."""

import copy
import io
import math
from typing import NamedTuple

import pytest
import timm
import torch
import torch._dynamo.testing
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import foveal.backbones


class Case(NamedTuple):
    """A small model, and what is particular to its family."""

    name: str
    arguments: dict
    levels: bool = True  # maps at strides 4, 8, 16 and 32
    any_size: bool = True
    rounds_up: bool = True  # an odd length is halved upwards; else downwards, as published
    plain_head: bool = True  # pooling and one Linear
    features: bool = True  # forward_features gives the last map, normalized
    hooks: bool = True  # the modules that feature_info names give the feature maps
    level_norms: bool = True  # takes out_norm=True
    attention_dropout: bool = True  # takes attn_drop_rate and proj_drop_rate
    tables: str | tuple[str, ...] | None = "rpb"  # what the names of its position biases end in, None without any


ISOTROPIC = dict(embed_dim=32, depth=4, num_heads=2, kernel_size=3)
FAN = dict(levels=False, features=False, rounds_up=False, plain_head=False, attention_dropout=False, tables="cls_token")
SMALL = {
    "nat": Case("test_foveal_nat", {}),
    "dinat": Case("test_foveal_dinat", {}),
    "dinat-auto": Case("test_foveal_dinat", dict(dilations="auto")),
    "dinat_s": Case(
        "dinat_s_tiny",
        dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3, dilations="auto"),
    ),
    "isotropic": Case("dinat_isotropic_small", dict(ISOTROPIC, dilations=(1, 2, 1, 2)), levels=False),
    "vitrpb": Case(
        "vitrpb_isotropic_small",
        dict(embed_dim=32, depth=3, num_heads=2, img_size=64),
        levels=False,
        any_size=False,
    ),
    "ascan": Case("test_foveal_ascan", {}, tables="relative_position_bias_table"),
    "care": Case("test_foveal_care", {}, rounds_up=False, plain_head=False, attention_dropout=False, tables=None),
    "halonet": Case("test_foveal_halonet", {}, attention_dropout=False, tables="_rel"),
    "overlock": Case(
        "test_foveal_overlock",
        {},
        plain_head=False,
        attention_dropout=False,
        tables=None,
    ),
    "van": Case("test_foveal_van", {}, level_norms=False, attention_dropout=False, tables=None),
    "shiftvit": Case("test_foveal_shiftvit", {}, rounds_up=False, attention_dropout=False, tables=None),
    "rmt": Case("test_foveal_rmt", {}, plain_head=False, attention_dropout=False, tables=None),
    "transnext": Case(
        "test_foveal_transnext",
        {},
        level_norms=False,
        attention_dropout=False,
        tables=("_bias_local", "query_embedding", "temperature", "cpb.fc1.weight", "cpb.fc2.weight"),
    ),
    "moh_vit": Case(
        "test_foveal_moh_vit",
        {},
        level_norms=False,
        attention_dropout=False,
        tables=("_bias_local", "query_embedding", "temperature", "cpb.fc1.weight", "cpb.fc2.weight"),
    ),
    "raftmlp": Case("test_foveal_raftmlp", {}, attention_dropout=False, tables=None),
    "stvit": Case("test_foveal_stvit", {}, plain_head=False, attention_dropout=False, tables=None),
    "sgformer": Case("test_foveal_sgformer", {}, level_norms=False, attention_dropout=False, tables="pos_embed"),
    "fan": Case("test_foveal_fan", {}, **FAN),
    "tap_fan": Case("test_foveal_tap_fan", {}, **FAN),
    "fan_vit": Case(
        "fan_vit_tiny", dict(embed_dim=32, depth=4, num_heads=2, map_blocks=(0, 1, 2)), **FAN | dict(rounds_up=True)
    ),
    "agent_deit": Case(
        "test_foveal_agent_deit", {}, levels=False, attention_dropout=False, tables=("cls_token", "pos_embed")
    ),
    "agent_pvt": Case(
        "test_foveal_agent_pvt", {}, rounds_up=False, level_norms=False, attention_dropout=False, tables=None
    ),
    "inline_pvt": Case(
        "test_foveal_inline_pvt", {}, rounds_up=False, level_norms=False, attention_dropout=False, tables=None
    ),
    "agent_swin": Case("test_foveal_agent_swin", {}, attention_dropout=False, tables="relative_position_bias_table"),
    "agent_cswin": Case("test_foveal_agent_cswin", {}, attention_dropout=False, tables=None),
    "maxvit": Case("test_foveal_maxvit", {}, plain_head=False, tables="relative_position_bias_table"),
}
# timm's networks with an attention of ours, in the tests that call no method of ours
TIMMS = {
    "triplet_resnet18": Case("triplet_resnet18", dict(channels=(8, 16, 16, 24))),
    "triplet_mobilenetv2": Case("triplet_mobilenetv2_100", dict(channel_multiplier=0.25)),
    "triplet_resnet50": Case("triplet_resnet50", dict(channels=(8, 8, 8, 8))),
}
ALL = SMALL | TIMMS
every = pytest.mark.parametrize(
    "case", [*SMALL, *(pytest.param(name, marks=[pytest.mark.slow] * (name != "triplet_resnet18")) for name in TIMMS)]
)
LEVELS = [name for name, case in SMALL.items() if case.levels]  # networks of several levels
ANY_SIZE = [name for name, case in SMALL.items() if case.any_size]
NORMS = [name for name, case in SMALL.items() if case.levels and case.level_norms]
# What traces or compiles a model for seconds runs for these by default; for the others it is slow.
QUICK = "care", "van", "shiftvit"
# Of the same attention in another network, and of the same network with another attention.
TWICE = "agent_deit", "inline_pvt", "agent_swin", "agent_cswin", "triplet_resnet50", "triplet_mobilenetv2"
traced = pytest.mark.parametrize(
    "case",
    [
        name if name in QUICK else pytest.param(name, marks=[pytest.mark.slow, *[pytest.mark.long] * (name in TWICE)])
        for name in ALL
    ],
)
NAT_LIKE = [name for name in SMALL if name in ("nat", "dinat", "dinat-auto", "dinat_s", "isotropic", "vitrpb")]


def create(case: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(ALL[case].name, **{"num_classes": 10, **ALL[case].arguments, **kwargs})


def channels(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Channels of a map as `forward_features` gives it."""
    return x.shape[-1 if model.output_fmt == "NHWC" else 1]


def to_nchw(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A map as `forward_features` gives it; of tokens, of a square image, without the class token."""
    if x.ndim == 3:
        x = x[:, 1:].unflatten(1, (math.isqrt(x.shape[1] - 1), -1))
    return x.permute(0, 3, 1, 2) if model.output_fmt == "NHWC" else x


def first_convs(model: torch.nn.Module) -> tuple[str, ...]:
    """The convolutions of the image, by name."""
    names = model.default_cfg["first_conv"]
    return (names,) if isinstance(names, str) else names


def halve(length: int, stride: int, up: bool) -> int:
    """A length after a network's strides, at least one."""
    return max(1, -(-length // stride) if up else length // stride)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_every_small_model_is_covered():
    small = {name for name in foveal.backbones.list_models() if name.startswith("test_foveal_")}
    assert small <= {case.name for case in SMALL.values()}
    for name in small:
        with torch.device("meta"):
            assert 1e5 < sum(p.numel() for p in timm.create_model(name).parameters()) < 1e6


@pytest.mark.parametrize("case", SMALL)
def test_forward(case):
    model = create(case).eval()
    x = images(2, 3, 64, 64)
    features = model.forward_features(x)
    assert model.output_fmt in ("NHWC", "NCHW")
    assert channels(model, features) == model.num_features
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, 10)
    torch.testing.assert_close(model(x), model.forward_head(features))
    if SMALL[case].plain_head:
        assert model.get_classifier() is model.head
        torch.testing.assert_close(model(x), model.head(pooled))
    assert torch.isfinite(model(x)).all()
    assert model(images(0, 3, 64, 64)).shape == (0, 10)


@pytest.mark.parametrize("case", ANY_SIZE)
@pytest.mark.parametrize("size", [(37, 61), (28, 28), (32, 32), (1, 1), (4, 90)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_any_input_size(case, size):
    """Down to maps of one position."""
    model = create(case).eval()
    _, maps = model.forward_intermediates(images(2, 3, *size))
    for x, info in zip(maps, model.feature_info, strict=True):
        stride = info["reduction"]
        up = SMALL[case].rounds_up
        assert x.shape == (2, info["num_chs"], halve(size[0], stride, up), halve(size[1], stride, up))
        assert torch.isfinite(x).all()


def test_one_input_size():
    model = create("vitrpb")
    with pytest.raises(ValueError, match=r"80x64.* 64x64"):
        model(images(1, 3, 80, 64))
    assert create("vitrpb", img_size=(80, 64))(images(1, 3, 80, 64)).shape == (1, 10)


@pytest.mark.parametrize("case", SMALL)
def test_training_reaches_every_parameter(case):
    more = dict(proj_drop_rate=0.1, attn_drop_rate=0.1) if SMALL[case].attention_dropout else {}
    model = create(case, drop_rate=0.1, drop_path_rate=0.1, **more).train()
    x = images(4, 3, 64, 64).requires_grad_(True)
    model(x).square().sum().backward()
    assert x.grad.abs().max() > 0
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    assert [n for n, p in model.named_parameters() if p.grad.abs().max() == 0] == []


@every
def test_grad_checkpointing_changes_nothing(case):
    model = create(case, drop_path_rate=0.0).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = images(2, 3, 64, 64)
    for m in (model, other):
        features, maps = m.forward_intermediates(x)
        (m.forward_head(features).square().sum() + sum(y.square().sum() for y in maps) + m(x).sum()).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", LEVELS)
def test_features_only(case):
    x = images(2, 3, 64, 96)
    whole = create(case, num_classes=10).eval()
    model = create(case, features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    widths = [info["num_chs"] for info in whole.feature_info]
    assert model.feature_info.channels() == widths
    maps = model(x)
    for y, width, stride in zip(maps, widths, [4, 8, 16, 32], strict=True):
        assert y.shape == (2, width, 64 // stride, 96 // stride)
    some = create(case, features_only=True, out_indices=(1, 3)).eval()
    assert (some.feature_info.reduction(), some.feature_info.channels()) == ([8, 32], [widths[1], widths[3]])
    if not SMALL[case].hooks:
        return
    # the modules that feature_info names give these maps
    outputs = {}
    for info in whole.feature_info:
        module = whole.get_submodule(info["module"])
        module.register_forward_hook(lambda m, i, o, name=info["module"]: outputs.update({name: o}))
    whole.load_state_dict({k.removeprefix("model."): v for k, v in model.state_dict().items()}, strict=False)
    whole(x)
    for y, info in zip(maps, whole.feature_info, strict=True):
        torch.testing.assert_close(to_nchw(whole, outputs[info["module"]]), y)


def test_features_only_isotropic():
    model = create("isotropic", features_only=True, out_indices=(1, 3))
    assert (model.feature_info.reduction(), model.feature_info.channels()) == ([16, 16], [32, 32])
    assert [y.shape for y in model(images(1, 3, 64, 96))] == [(1, 32, 4, 6)] * 2


@pytest.mark.parametrize("case", LEVELS)
def test_pruned_models_have_no_unused_parameters(case):
    for arguments in (dict(out_indices=(1, 2)), dict(out_indices=(1, 2), out_norm=True))[: 1 + SMALL[case].level_norms]:
        model = create(case, features_only=True, **arguments).train()
        sum(y.square().sum() for y in model(images(2, 3, 64, 64))).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("case", SMALL)
def test_forward_intermediates(case):
    model = create(case).eval()
    x = images(2, 3, 64, 64)
    count = len(model.feature_info)
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x))
    assert len(maps) == count

    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    if SMALL[case].features:
        torch.testing.assert_close(last[0], to_nchw(model, features))
    other = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close([y.permute(0, 3, 1, 2) for y in other], maps)
    some = model.forward_intermediates(x, indices=[0, -2], intermediates_only=True)
    torch.testing.assert_close(some, [maps[0], maps[-2]])
    end, some = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert to_nchw(model, end).shape[2:] == maps[0].shape[2:]
    torch.testing.assert_close(some, [maps[0]])

    for wrong in ([count], [-count - 1], count + 1, 0, -1, []):
        with pytest.raises(ValueError, match="indices"):
            model.forward_intermediates(x, indices=wrong)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("case", SMALL)
def test_prune_intermediate_layers(case):
    model = create(case).eval()
    x = images(1, 3, 64, 64)
    maps = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    torch.testing.assert_close(model.forward_intermediates(x, indices=[0, 1], intermediates_only=True), maps)
    assert model.num_classes == 0
    assert channels(model, model(x)) == model.num_features == model.feature_info[1]["num_chs"]


@pytest.mark.parametrize("case", [name for name in NORMS if name in NAT_LIKE])
def test_level_norms(case):
    model = create(case, out_norm=True).eval()
    for i, info in enumerate(model.feature_info):
        norm = getattr(model, f"norm{i}")
        assert norm.normalized_shape == (info["num_chs"],)
        torch.nn.init.uniform_(norm.weight)
    x = images(1, 3, 64, 64)
    plain = create(case).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(x), plain(x))  # the classifier does not see them
    pairs = zip(model.forward_intermediates(x)[1], plain.forward_intermediates(x, output_fmt="NHWC")[1], strict=True)
    for i, (got, raw) in enumerate(pairs):
        torch.testing.assert_close(got, getattr(model, f"norm{i}")(raw).permute(0, 3, 1, 2))


@pytest.mark.parametrize("case", SMALL)
def test_classifier(case):
    model = create(case).eval()
    x = images(2, 3, 64, 64)
    features = model.forward_features(x)
    model.reset_classifier(7)
    assert (model(x).shape, model.num_classes) == ((2, 7), 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(5, "max")
    assert model(x).shape == (2, 5)
    assert create(case, num_classes=0)(x).shape == (2, model.head_hidden_size)
    assert create(case, num_classes=4, in_chans=1)(x[:, :1]).shape == (2, 4)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(5, "median")
    if not SMALL[case].plain_head:
        return
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, to_nchw(model, features).amax((2, 3)))
    model.reset_classifier(5, "catavgmax")
    assert (model(x).shape, model.head_hidden_size) == ((2, 5), 2 * model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    assert create(case, num_classes=0, global_pool="")(x).shape == features.shape


@pytest.mark.parametrize("case", SMALL)
def test_other_output_strides_are_refused(case):
    stride = create(case).feature_info[-1]["reduction"]
    create(case, output_stride=stride)
    with pytest.raises(ValueError, match="output_stride 8 "):
        create(case, output_stride=8)


@pytest.mark.parametrize("case", SMALL)
def test_parameter_groups(case):
    model = create(case)
    names = {name for name, _ in model.named_parameters()}
    suffix = SMALL[case].tables
    tables = set() if suffix is None else {name for name in names if name.endswith(suffix)}
    assert model.no_weight_decay() == tables
    assert bool(tables) == (suffix is not None)
    free, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert all(p.ndim > 1 for p in decayed["params"])
    assert len(free["params"]) + len(decayed["params"]) == len(names)

    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    named = {id(p): name for name, p in model.named_parameters()}
    scale = {named[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scale) == names
    first = scale[first_convs(model)[0] + ".weight"]
    last = model.default_cfg["classifier"]
    last = scale[(last if isinstance(last, str) else last[0]) + ".weight"]
    assert (first, last) == (min(scale.values()), max(scale.values()))
    assert len(set(scale.values())) >= len(model.feature_info) + 1
    if case not in NAT_LIKE:
        return
    blocks = sorted(
        {n.split(".norm1.")[0] for n in names if ".norm1." in n},
        key=lambda n: [int(i) for i in n.split(".") if i.isdigit()],
    )
    order = ["patch_embed.proj", *blocks, "head"]
    rates = [next(scale[n] for n in sorted(names) if n.startswith(block + ".")) for block in order]
    assert rates == sorted(rates)
    assert len(set(rates)) == len(blocks) + 2
    for level in {n.split(".downsample.")[0] for n in names if ".downsample." in n}:
        assert scale[f"{level}.downsample.norm.weight"] >= max(
            v for n, v in scale.items() if n.startswith(f"{level}.blocks.")
        )


@pytest.mark.parametrize("case", SMALL)
def test_config(case):
    model = create(case)
    for key in ("license", "paper_ids", "first_conv", "classifier", "input_size", "crop_pct", "interpolation"):
        assert model.default_cfg[key], key
    assert all(isinstance(model.get_submodule(each), torch.nn.Conv2d) for each in first_convs(model))
    classifier, name = model.get_classifier(), model.default_cfg["classifier"]
    if isinstance(name, str):
        assert model.get_submodule(name) is classifier
    else:  # two heads
        assert [model.get_submodule(each) for each in name] == list(classifier)


@every
def test_autocast(case):
    model = create(case).eval()
    x = images(2, 3, 64, 64)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
        small = create(case).eval()(images(1, 3, 28, 28)) if ALL[case].any_size else None
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    assert small is None or small.dtype == torch.bfloat16


@traced
def test_compile(case):
    """One graph, forward and backward, and none more for another batch of the size."""
    model = create(case, drop_path_rate=0.0).train()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = images(2, 3, 64, 64)
    want = model(x)
    torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    compiled(images(2, 3, 64, 64))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in (*TWICE, "agent_pvt", "triplet_resnet18") else [])
        for name in ALL
        if name not in NAT_LIKE or name == "dinat-auto"
    ],
)
def test_compile_to_code(case):
    model = create(case).eval()
    if hasattr(model, "reparameterize"):  # what is deployed
        model.reparameterize()
    torch._dynamo.reset()
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-4)


@every
@pytest.mark.filterwarnings("ignore")
def test_jit_trace(case):
    model = create(case).eval()
    traced = torch.jit.trace(model, images(2, 3, 64, 64), check_trace=False)
    x = images(3, 3, 64, 64)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@traced
def test_torch_export(case):
    model = create(case).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    x = images(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@traced
@pytest.mark.filterwarnings("ignore")
def test_onnx(case):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = create(case).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        model, (images(2, 3, 64, 64),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for size in (2, 5):
        x = images(size, 3, 64, 64)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-5)


@every
def test_state_dict_round_trip(case, tmp_path):
    model = create(case).eval()
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    other = create(case, pretrained=True, num_classes=10, pretrained_cfg_overlay=dict(file=str(path), num_classes=10))
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(other.eval()(x), model(x))
