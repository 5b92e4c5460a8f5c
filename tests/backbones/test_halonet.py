"""HaloNet: attention, hybrids and network against timm's; the paper's parameter counts; the rest by hand."""

import copy
import io
import math
import zlib

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from timm.models import model_entrypoint
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn

from foveal.backbones.attention import HaloAttention2d
from foveal.backbones.halonet import _HYBRIDS, HaloNet
from foveal.backbones.replace import replace_attention

from ..kernels.test_neighborhood import peak_bytes

# Largest difference from timm's output, relative to the largest value. Random networks with norms that fit them
# amplify rounding some thousand times: these are compared in double precision.
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}

# arguments of timm's module and a map that it takes
TIMM_ATTENTION = {
    "plain": (dict(block_size=8, halo_size=3), (16, 24)),
    "strided": (dict(block_size=8, halo_size=2, stride=2), (16, 24)),
    "odd-block-pooled": (dict(block_size=7, halo_size=2, stride=2), (14, 21)),
    "asked-for-pool": (dict(block_size=6, halo_size=0, stride=2, avg_down=True), (12, 18)),
    "narrow-keys": (dict(block_size=4, halo_size=1, stride=2, qk_ratio=0.33, dim_out=64), (8, 16)),
    "all-options": (
        dict(block_size=5, halo_size=4, dim_out=48, num_heads=6, dim_head=16, qkv_bias=True, scale_pos_embed=True),
        (10, 15),
    ),
}


def filled(module: nn.Module, image: torch.Tensor | None = None) -> nn.Module:
    """Values by name and shape, in evaluation mode; with an ``image``, the batch norms normalize what it gives."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            x = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if name.endswith("_rel"):
                x = 0.5 * x  # so that the position matters
            elif name.endswith(("running_var", "norm.weight", "bn.weight", "post_attn.weight")):
                x = 1.0 + 0.1 * x.abs()
            elif x.ndim == 1:
                x = 0.1 * x
            else:
                x = x / math.sqrt(x[0].numel())
            value.copy_(x)
        if image is not None:
            norms = [m for m in module.train().modules() if isinstance(m, nn.BatchNorm2d)]
            for norm in norms:
                norm.momentum = 1.0
            module(image)
    return module.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).detach().abs().max() / want.detach().abs().max())


def output_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_(True)
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TIMM_ATTENTION)
def test_attention_is_timms(case):
    arguments, size = TIMM_ATTENTION[case]
    theirs = filled(HaloAttn(32, **{"num_heads": 4, **arguments})).double()
    ours = HaloAttention2d.from_timm(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x = images(2, 32, *size).double()
    for got, want in zip(output_of(ours, x), output_of(theirs, x), strict=True):
        assert error(got, want) < LIMIT[torch.float64]


@pytest.mark.parametrize("case", TIMM_ATTENTION)
@pytest.mark.parametrize("size", [(1, 1), (3, 9), (17, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_maps_that_are_no_multiple_of_the_block(case, size):
    """As timm's output on the map with zeros appended, cropped: zeros have keys and values of zero."""
    theirs = filled(HaloAttn(32, **{"num_heads": 4, **TIMM_ATTENTION[case][0], "qkv_bias": False})).double()
    ours = HaloAttention2d.from_timm(theirs)
    x = images(2, 32, *size).double()
    (height, width), block = size, theirs.block_size
    pool, theirs.pool = theirs.pool, nn.Identity()
    want = theirs(F.pad(x, (0, -width % block, 0, -height % block)))
    s = theirs.block_stride
    want = want[:, :, : -(-height // s), : -(-width // s)]
    if isinstance(pool, nn.AvgPool2d):
        want = F.avg_pool2d(want, 2, ceil_mode=True, count_include_pad=False)
    assert error(ours(x), want) < LIMIT[torch.float64]


@pytest.mark.parametrize("boundary", ["mask", "zero"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 10), (2, 3)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_attention_by_hand(boundary, stride, size):
    """Query by query: keys of its block and the halo, the tables read by offset in the map, values of another width."""
    arguments = dict(num_heads=2, head_dim=6, block_size=4, halo_size=2, qkv_bias=True)
    module = filled(HaloAttention2d(8, 16, stride=stride, boundary=boundary, **arguments)).double()
    x = images(2, 8, *size).double()
    queries = F.conv2d(x, module.q.weight, module.q.bias).unflatten(1, (2, 6))
    keys, values = F.conv2d(x, module.kv.weight, module.kv.bias).unflatten(1, (2, 14)).split((6, 8), 2)
    got = module(x)
    assert got.shape == (2, 16, -(-size[0] // stride), -(-size[1] // stride))
    for row in range(0, size[0], stride):
        for column in range(0, size[1], stride):
            q = queries[..., row, column]
            logits, seen = [], []
            for r in range(row // 4 * 4 - 2, row // 4 * 4 + 6):
                for c in range(column // 4 * 4 - 2, column // 4 * 4 + 6):
                    inside = 0 <= r < size[0] and 0 <= c < size[1]
                    if boundary == "mask" and not inside:
                        continue
                    k = keys[..., r, c] if inside else torch.zeros_like(q)
                    seen.append(values[..., r, c] if inside else torch.zeros_like(values[..., 0, 0]))
                    # the window is 8 wide and begins 2 before the block: rows of the table begin at offset -7 - 2
                    position = module.pos_embed.height_rel[r - row + 9] + module.pos_embed.width_rel[c - column + 9]
                    logits.append((q * (k * 6**-0.5 + position)).sum(-1))
            weights = torch.stack(logits, -1).softmax(-1)
            want = torch.einsum("bnk,bndk->bnd", weights, torch.stack(seen, -1)).flatten(1)
            torch.testing.assert_close(got[:, :, row // stride, column // stride], want)


@pytest.mark.parametrize("image", [256, pytest.param(512, marks=pytest.mark.slow)])
def test_windows_are_not_unfolded(image):
    """The first stage's attention of H1: at most a third of the memory that unfolding its windows takes."""
    theirs = HaloAttn(64, num_heads=8, block_size=8, halo_size=3)
    ours = HaloAttention2d.from_timm(theirs)
    x = images(1, 64, image // 4, image // 4).requires_grad_(True)
    got, timms = (peak_bytes(lambda f=f: f(x).sum().backward()) for f in (ours, theirs))
    assert 6 * x.nbytes < got < timms / 3  # q, k, v, the output and their gradients at least


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=3), "dim_out 16 .*num_heads 3"),
        (dict(stride=4), "stride .*4"),
        (dict(block_size=0), "block_size 0, halo_size 3"),
        (dict(halo_size=-1), "block_size 8, halo_size -1"),
        (dict(boundary="shift"), "boundary .*'shift'"),
    ],
)
def test_wrong_attention_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HaloAttention2d(16, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# replace_attention
# ---------------------------------------------------------------------------------------------------------------------


def test_replace_attention():
    model = filled(timm.create_model("halonet26t", width_factor=0.25, num_classes=10)).train()
    model.stages[3].eval()
    model.stages[3][0].self_attn.q.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    report = replace_attention(model)
    assert list(report) == ["stages.2.1.self_attn", "stages.3.0.self_attn", "stages.3.1.self_attn"]
    assert report["stages.3.0.self_attn"] == "block_size=8, halo_size=2, num_heads=8, stride=2, boundary=zero"
    assert not any(isinstance(m, HaloAttn) for m in model.modules())
    assert [(n, m.training) for n, m in model.named_modules() if not n.endswith("pool")] == [
        (n, m.training) for n, m in before.named_modules() if not n.endswith("pool")
    ]
    assert list(model.state_dict()) == list(before.state_dict())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert not model.stages[3][0].self_attn.q.weight.requires_grad
    assert replace_attention(model) == {}  # nothing left
    x = images(1, 3, 256, 256)
    assert error(model.eval()(x), before.eval()(x)) < LIMIT[torch.float32]


def test_replace_attention_anywhere():
    """In containers, used twice, in other dtypes and on other devices; what is not timm's own is left alone."""

    class Other(HaloAttn):
        pass

    shared = HaloAttn(16, num_heads=2, block_size=4, halo_size=1).double()
    model = nn.ModuleDict(dict(a=nn.Sequential(shared, nn.ReLU()), b=shared, c=Other(16)))
    assert list(replace_attention(model)) == ["a.0", "b"]
    assert model["a"][0] is model["b"]
    assert type(model["c"]) is Other
    assert model["a"](images(1, 16, 5, 6).double()).dtype == torch.float64
    meta = nn.Sequential(HaloAttn(16)).to("meta")
    replace_attention(meta)
    assert meta(torch.empty(1, 16, 8, 8, device="meta")).shape == (1, 16, 8, 8)
    assert replace_attention(nn.Linear(2, 2)) == {}
    with pytest.raises(ValueError, match="from_timm"):
        replace_attention(shared)


# ---------------------------------------------------------------------------------------------------------------------
# Hybrids
# ---------------------------------------------------------------------------------------------------------------------


# widths that group convolutions of 16 and eight heads allow
NARROW = {name: dict(width_factor=1 / 3 if name == "haloregz_b" else 0.25, num_classes=10) for name in _HYBRIDS}


def pair(name: str, normalized: bool = True, **kwargs) -> tuple[ByobNet, ByobNet]:
    """timm's network, and ours with its parameters as published weights are loaded."""
    theirs = timm.create_model(_HYBRIDS[name][1].partition(".")[0], **kwargs)
    filled(theirs, images(2, *theirs.pretrained_cfg["input_size"]) if normalized else None)
    overlay = dict(state_dict=theirs.state_dict(), url="", hf_hub_id=None, num_classes=theirs.num_classes)
    return theirs, timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def assert_equal_outputs(theirs: ByobNet, ours: ByobNet, dtype: torch.dtype) -> None:
    assert type(ours) is ByobNet
    assert sum(type(m) is HaloAttention2d for m in ours.modules()) > 0
    assert not any(isinstance(m, HaloAttn) for m in ours.modules())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    x = images(1, *theirs.pretrained_cfg["input_size"]).to(dtype)
    results = []
    for model in (ours.to(dtype), theirs.to(dtype)):
        image = x.clone().requires_grad_(True)
        features, maps = model.forward_intermediates(image)
        logits = model.forward_head(features)
        (gradient,) = torch.autograd.grad(logits.square().sum(), image)
        results.append([logits, gradient, *maps])
    assert max(error(got, want) for got, want in zip(*results, strict=True)) < LIMIT[dtype]
    assert ours.feature_info == theirs.feature_info


@pytest.mark.parametrize("name", _HYBRIDS)
def test_narrow_hybrids_are_timms(name):
    assert_equal_outputs(*pair(name, **NARROW[name]), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", _HYBRIDS)
def test_hybrids_are_timms(name):
    assert_equal_outputs(*pair(name, normalized=False), torch.float32)


@pytest.mark.parametrize("name", _HYBRIDS)
def test_the_position_matters_in_these_comparisons(name):
    theirs, ours = pair(name, **NARROW[name])
    x = images(1, *theirs.pretrained_cfg["input_size"])
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, HaloAttention2d):
                module.pos_embed.height_rel.copy_(module.pos_embed.height_rel.roll(1, 0))
        assert error(ours(x), theirs(x)) > 0.01


def test_hybrid_entries():
    for name, (_, weights) in _HYBRIDS.items():
        ours, theirs = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(weights)
        assert (ours.url, ours.hf_hub_id, ours.tag) == (theirs.url, f"timm/{weights}", theirs.tag)
        for key in ("input_size", "crop_pct", "interpolation", "mean", "std", "first_conv", "classifier", "license"):
            assert getattr(ours, key) == getattr(theirs, key), key
        assert ours.license == "apache-2.0"
        assert model_entrypoint(weights.partition(".")[0]).__module__ == "timm.models.byoanet"  # not overwritten


@pytest.mark.parametrize("name", ["halo26t", "haloregz_b"])
@pytest.mark.parametrize("size", [(1, 1), (37, 200)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_hybrids_at_any_size(name, size):
    model = timm.create_model(name, features_only=True, width_factor=1 / 3).eval()
    maps = model(images(1, 3, *size))
    strides = model.feature_info.reduction()
    assert strides == [2, 4, 8, 16, 32]
    for y, stride in zip(maps, strides, strict=True):
        assert y.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
        assert torch.isfinite(y).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halo26t", "haloregz_b"])
@pytest.mark.filterwarnings("ignore")
def test_hybrids_compile_and_export(name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    model = filled(timm.create_model(name, **NARROW[name]))
    x = images(2, 3, 100, 72)
    want = model(x)
    torch._dynamo.reset()
    assert error(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want) < LIMIT[torch.float32]
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    assert error(program.module()(x[:1]), want[:1]) < LIMIT[torch.float32]
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x[:1].numpy()})
    assert error(torch.from_numpy(got), want[:1]) < LIMIT[torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert error(model(x).float(), want) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# HaloNet
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("halo_h0", 5.50),
        ("halo_h1", 8.10),
        ("halo_h2", 9.40),
        ("halo_h3", 11.84),
        ("halo_h4", 19.10),
        ("halo_h5", 30.72),
        ("halo_h6", 43.46),
        ("halo_h7", 67.43),
        ("halo26t", 12.48),
        ("halo50ts", 22.73),
        ("sehalo33ts", 13.69),
        ("eca_haloext26ts", 10.76),
        ("haloregz_b", 11.68),
        ("lamhalobot50ts_256", 22.57),
        ("halo2bot50ts_256", 22.64),
    ],
)
def test_parameter_counts(name, millions):
    """Those of the card; of the hybrids, timm's."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("final", [0, 24], ids=["plain", "final-conv"])
def test_network_is_timms_byobnet(final):
    """Where the values are as wide as the keys, timm's ByobNet can be configured to the same network."""
    blocks = [
        ByoBlockCfg(type="self_attn", d=depth, c=3 * width // 2, s=1 if i == 0 else 2, gs=0, br=2 / 3)
        for i, (width, depth) in enumerate(zip((16, 32, 48, 64), (1, 2, 2, 1), strict=True))
    ]
    config = ByoModelCfg(
        blocks=tuple(blocks),
        stem_chs=8,
        stem_type="7x7",
        stem_pool="maxpool",
        downsample="conv1x1",
        num_features=final,
        self_attn_layer="halo",
        self_attn_kwargs=dict(block_size=2, halo_size=1, num_heads=4),
    )
    theirs = filled(ByobNet(config, num_classes=10), images(2, 3, 64, 128)).double()
    ours = HaloNet(
        widths=(16, 32, 48, 64),
        depths=(1, 2, 2, 1),
        num_heads=4,
        block_size=2,
        halo_size=1,
        out_ratio=1.5,
        num_features=final or None,
        stem_dim=8,
        boundary="zero",
        num_classes=10,
    )
    ours.eval().double().load_state_dict(
        {name.replace("head.fc.", "head."): value for name, value in theirs.state_dict().items()}
    )
    for module in ours.modules():
        if isinstance(module, HaloAttention2d):
            module.dense_offsets = module.stride > 1  # timm's way to count strided queries
    x = images(2, 3, 64, 128).double()
    names = ["output", "input", *(name for name, _ in ours.named_parameters())]
    got = dict(zip(names, output_of(ours, x), strict=True))
    names = ["output", "input", *(name.replace("head.fc.", "head.") for name, _ in theirs.named_parameters())]
    want = dict(zip(names, output_of(theirs, x), strict=True))
    assert got.keys() == want.keys()
    assert max(error(got[name], want[name]) for name in want) < LIMIT[torch.float64]


def test_only_values_and_outputs_are_widened():
    with torch.device("meta"):
        model = timm.create_model("halo_h6")
    for stage, width in zip(model.stages, (64, 128, 256, 512), strict=True):
        for block in stage:
            attention = block.self_attn
            assert attention.q.weight.shape == (width, width, 1, 1)
            assert attention.kv.weight.shape == (width + 3 * width, width, 1, 1)
            assert attention.pos_embed.height_rel.shape == (2 * 16 - 1, width // 8)
            assert block.conv3_1x1.conv.weight.shape == (2.75 * width, 3 * width, 1, 1)
        assert [block.self_attn.stride for block in stage] == [1 if width == 64 else 2] + [1] * (len(stage) - 1)
    assert model.num_features == 1536
    assert [info["num_chs"] for info in model.feature_info] == [176, 352, 704, 1536]


def test_boundary():
    """The default is to mask, and it matters."""
    model = timm.create_model("test_foveal_halonet")
    assert {m.boundary for m in model.modules() if isinstance(m, HaloAttention2d)} == {"mask"}
    other = timm.create_model("test_foveal_halonet", boundary="zero").eval()
    other.load_state_dict(model.state_dict())
    x = images(1, 3, 64, 64)
    assert error(other(x), model.eval()(x)) > 1e-3


def test_map_of_logits():
    """Without pooling there are logits at every position; their mean equals the logits after an average pool."""
    pooled = filled(timm.create_model("test_foveal_halonet", num_classes=10))
    model = timm.create_model("test_foveal_halonet", num_classes=10, global_pool="").eval()
    model.load_state_dict(pooled.state_dict())
    x = images(2, 3, 64, 96)
    logits = model(x)
    assert logits.shape == (2, 10, 2, 3)
    torch.testing.assert_close(logits.mean((2, 3)), pooled(x), rtol=1e-4, atol=1e-5)
    model.reset_classifier(0)
    assert model(x).shape == (2, 96, 2, 3)


def test_blocks_begin_as_their_shortcuts():
    model = timm.create_model("test_foveal_halonet", zero_init_last=True).eval()
    block = model.stages[1][0]
    x = images(1, 32, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(x).relu())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(widths=(16, 32), depths=(1,)), r"widths \(16, 32\) .*depths \(1,\)"),
        (dict(num_heads=5), r"widths \(16, 32, 48, 64\) .*num_heads 5"),
        (dict(value_ratio=1.51), "dim_out 24 .*num_heads 16"),
    ],
)
def test_wrong_network_arguments(arguments, message):
    arguments = {"value_ratio": 1.5, **arguments}
    if arguments["value_ratio"] == 1.51:
        arguments["num_heads"] = 16
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_foveal_halonet", **arguments)


def test_checkpoints():
    model = filled(timm.create_model("test_foveal_halonet"))
    x = images(1, 3, 40, 56)
    state = {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    overlay = dict(state_dict=state)
    other = timm.create_model("test_foveal_halonet", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(other(x), model(x))
    normed = timm.create_model(
        "test_foveal_halonet", pretrained=True, features_only=True, out_norm=True, pretrained_cfg_overlay=overlay
    ).eval()
    for got, raw in zip(normed(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        want = F.layer_norm(raw.permute(0, 2, 3, 1), (raw.shape[1],), eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
