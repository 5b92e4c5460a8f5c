"""A3-FPN: its parts against plain formulas, the published parameter names, sizes that strides do not divide."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveal.heads.backbone import ShapeSpec
from foveal.heads.necks import A3FPN
from foveal.heads.necks.a3fpn import RepVGG, Sample
from foveal.heads.necks.published import load_published
from foveal.heads.necks.resample import DeformableResampling, deformable_aggregate

from .published_names import from_published

R50 = ShapeSpec((256, 512, 1024, 2048), (4, 8, 16, 32))
SMALL = ShapeSpec((16, 24, 32, 48), (4, 8, 16, 32))
PLAIN = dict(squeeze=(1, 1, 2, 2), compress=(4, 4, 4, 8), groups=(4, 4, 4, 4), resampling_groups=(2, 3, 2, 4))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pyramid(*size: int, spec: ShapeSpec = SMALL, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Maps of an image of this size, every stride rounding up."""
    maps = zip(spec.channels, spec.strides, strict=True)
    return [draw(2, c, *(-(-side // s) for side in size), seed=c, dtype=dtype) for c, s in maps]


def stir(module: nn.Module) -> nn.Module:
    """Every parameter and statistic away from its initial value, so that each takes part."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, x in (*module.named_parameters(), *module.named_buffers()):
            if not x.is_floating_point():
                continue
            noise = torch.randn(x.shape, generator=generator).to(x)
            if name.endswith("running_var"):
                x.copy_(1 + 0.2 * noise.clamp(-2, 2))
            elif x.ndim == 1:
                x.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
            else:
                x.copy_(noise / x[0].numel() ** 0.5)
    return module


def aggregate_by_grid(value, points, groups, scale, center=True):
    """The sum over groups and samples as it is written, with one grid_sample for each."""
    _, channels, height, width = value.shape
    columns, rows = torch.arange(width).to(value), torch.arange(height).to(value)
    taps = [(i, j) for i in range(3) for j in range(3) if center or (i, j) != (1, 1)]
    out = []
    for g in range(groups):
        own = points[:, g * 3 * len(taps) : (g + 1) * 3 * len(taps)]
        x = value[:, g * channels // groups : (g + 1) * channels // groups]
        total = torch.zeros_like(x)
        for k, (i, j) in enumerate(taps):
            px = columns + scale * (i - 1 + own[:, 2 * k])
            py = rows[:, None] + scale * (j - 1 + own[:, 2 * k + 1])
            grid = torch.stack([(2 * px + 1) / width - 1, (2 * py + 1) / height - 1], -1)
            sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            total = total + sampled * own[:, 2 * len(taps) + k, None]
        out.append(total)
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    ("shape", "groups", "scale", "center"),
    [
        ((2, 8, 5, 7), 1, 0.5, True),
        ((1, 12, 9, 4), 3, 2.0, True),
        ((2, 6, 1, 3), 2, 1.0, True),
        ((1, 8, 6, 5), 4, 1.5, False),
    ],
    ids=["g1-s0.5", "g3-s2", "one-row", "no-center"],
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "each"])
def test_aggregation_and_its_gradients(shape, groups, scale, center, fused):
    count = groups * (9 if center else 8) * 3
    value = draw(*shape, dtype=torch.float64).requires_grad_(True)
    points = draw(shape[0], count + 5, *shape[2:], seed=1, dtype=torch.float64).requires_grad_(True)
    upstream = draw(*shape, seed=2, dtype=torch.float64)
    results = []
    for function in (partial(deformable_aggregate, fused=fused), aggregate_by_grid):
        y = function(value, points, groups, scale, center)
        results.append((y, *torch.autograd.grad((y * upstream).sum(), (value, points))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    read = results[0][2].abs().amax((0, 2, 3)) > 0
    assert read[:count].any() and not read[count:].any()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "each"])
def test_aggregation_gradcheck(fused):
    value = draw(1, 4, 2, 3, dtype=torch.float64).requires_grad_(True)
    points = (0.3 * draw(1, 54, 2, 3, seed=1, dtype=torch.float64)).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v, p: deformable_aggregate(v, p, 2, 2.0, fused=fused), (value, points))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "each"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_aggregation_in_half_precision(dtype, fused):
    value, points = draw(1, 8, 6, 7).to(dtype), draw(1, 54, 6, 7, seed=1).to(dtype)
    got = deformable_aggregate(value, points, 2, 2.0, fused=fused)
    assert got.dtype == dtype
    torch.testing.assert_close(got, deformable_aggregate(value.float(), points.float(), 2, 2.0, fused=fused).to(dtype))


def test_resampling_module():
    """Offsets and weights come from the context; at first the result is nothing; the gate blends the values in."""
    fresh = DeformableResampling(12, 3)
    assert fresh(draw(1, 12, 5, 6), draw(1, 12, 5, 6, seed=1)).abs().max() == 0
    module = stir(DeformableResampling(12, 3, 2.0, context_kernel=None, center_scale=True, output_bias=False)).double()
    x, context = draw(2, 12, 5, 6, dtype=torch.float64), draw(2, 12, 5, 6, seed=1, dtype=torch.float64)
    value = module.value(x)
    y = aggregate_by_grid(value, module.points(context), 3, 2.0)
    gate = torch.sigmoid(torch.einsum("gc,bchw->bghw", module.center_gate.weight[..., 0, 0], y))
    gate = torch.sigmoid(torch.logit(gate) + module.center_gate.bias[:, None, None]).repeat_interleave(4, 1)
    torch.testing.assert_close(module(x, context), module.output(y * (1 - gate) + value * gate))
    with pytest.raises(ValueError, match=r"10.*4"):
        DeformableResampling(10, 4)


def test_parameter_counts():
    """The released settings for ResNet-50: detectron2, mmdetection with its further convolution, and the lite one."""

    def count(**kwargs) -> float:
        with torch.device("meta"):
            return sum(p.numel() for p in A3FPN(R50, **kwargs).parameters()) / 1e6

    assert round(count(extra_levels="pool"), 2) == 37.45
    assert round(count(extra_levels=1), 2) == 38.04
    assert round(count(preset="lite"), 2) == 9.56
    with torch.device("meta"):
        assert round(sum(p.numel() for p in A3FPN(R50).columns[-1].parameters()) / 1e6, 1) == 22.2


@pytest.mark.parametrize(
    ("extra", "start", "strides", "size"),
    [
        (None, 0, (4, 8, 16, 32), (64, 96)),
        ("pool", 0, (4, 8, 16, 32, 64), (70, 51)),
        (1, 0, (4, 8, 16, 32, 64), (33, 64)),
        ("p6p7", 1, (8, 16, 32, 64, 128), (75, 90)),
    ],
    ids=["none", "pool-70x51", "one-33x64", "retinanet-75x90"],
)
def test_outputs_have_the_sizes_of_the_inputs(extra, start, strides, size):
    neck = A3FPN(SMALL, 20, extra_levels=extra, start_level=start, **PLAIN)
    assert neck.spec == ShapeSpec((20,) * len(strides), strides)
    maps = pyramid(*size)
    out = neck(maps)
    sizes = [x.shape[2:] for x in maps][start:]
    while len(sizes) < len(strides):
        sizes.append(torch.Size(-(-side // 2) for side in sizes[-1]))
    assert [x.shape for x in out] == [(2, 20, *size) for size in sizes]
    sum(x.square().sum() for x in out).backward()
    assert [n for n, p in neck.named_parameters() if p.grad is None] == []
    # as initialized, nothing is resampled from anywhere, so the layers before have no gradient yet
    stir(neck).zero_grad()
    sum(x.square().sum() for x in neck(maps)).backward()
    still = [n for n, p in neck.named_parameters() if p.grad.abs().max() == 0]
    assert still == []


def test_sampling():
    """Exact where strides divide; else the near border is continued, and what is too much cut off."""
    down = stir(Sample(3, 5, 1, 2)).eval()
    x = draw(1, 3, 8, 6)
    torch.testing.assert_close(down(x, (4, 3)), down.conv(x))
    odd = x[..., :7, :5]
    torch.testing.assert_close(down(odd, (4, 3)), down.conv(F.pad(odd, (0, 1, 0, 1), mode="replicate")))
    torch.testing.assert_close(down(x, (3, 2)), down.conv(x[..., :6, :4]))
    up = stir(Sample(3, 3, 4, 1))
    want = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(up(x, (32, 24)), want)
    torch.testing.assert_close(up(x, (30, 23)), want[..., :30, :23])


def test_two_and_three_maps():
    for count in (2, 3):
        spec = ShapeSpec(SMALL.channels[:count], SMALL.strides[:count])
        neck = A3FPN(spec, 16, resampling_groups=(2,) * count, groups=(2,) * count)
        assert len(neck.columns) == count - 1
        assert [x.shape[1:] for x in neck(pyramid(40, 56, spec=spec))] == [(16, 10, 14), (16, 5, 7), (16, 3, 4)][:count]


def test_wiring():
    """Which maps each column reads, with the released segmentor's quirk and without."""
    torch.manual_seed(0)
    maps = pyramid(64, 64)
    squeezed = lambda neck: [f(x) for f, x in zip(neck.squeeze, maps, strict=True)]  # noqa: E731
    finish = lambda neck, x: [f(y) for f, y in zip(neck.outputs, x, strict=True)]  # noqa: E731

    def column(neck, i, *given):
        return [level(list(given)) for level in neck.columns[i].values()]

    neck = stir(A3FPN(SMALL, 16, **PLAIN)).eval()
    x0, x1, x2, x3 = squeezed(neck)
    x2, x3 = column(neck, 0, x2, x3)
    x1, x2, x3 = column(neck, 1, x1, x2, x3)
    torch.testing.assert_close(neck(maps), finish(neck, column(neck, 2, x0, x1, x2, x3)))

    for quirk in (False, True):
        neck = stir(A3FPN(SMALL, 16, direction="bottom_up", updated_first=quirk, **PLAIN)).eval()
        x0, x1, x2, x3 = squeezed(neck)
        new1 = neck.columns[0]["1"]([x0, x1])
        x0, x1 = neck.columns[0]["0"]([x0, new1 if quirk else x1]), new1
        x0, x1, x2 = column(neck, 1, x0, x1, x2)
        torch.testing.assert_close(neck(maps), finish(neck, column(neck, 2, x0, x1, x2, x3)))

    neck = stir(A3FPN(SMALL, 16, columns=1, **PLAIN)).eval()
    want = finish(neck, column(neck, 0, *squeezed(neck)))
    torch.testing.assert_close(neck(maps), want)
    torch.testing.assert_close(neck(maps[::-1]), want[::-1])


def test_start_level_leaves_the_other_outputs_as_they_are():
    whole = stir(A3FPN(SMALL, 16, extra_levels=2, **PLAIN)).eval()
    part = A3FPN(SMALL, 16, extra_levels="p6p7", start_level=1, **PLAIN).eval()
    state = {
        re.sub(r"^outputs\.(\d)", lambda m: f"outputs.{int(m[1]) - 1}", n): x for n, x in whole.state_dict().items()
    }
    part.load_state_dict({n: x for n, x in state.items() if n in part.state_dict()})
    torch.testing.assert_close(part(pyramid(32, 64)), whole(pyramid(32, 64))[1:])


def test_reparameterize():
    neck = stir(A3FPN(SMALL, 16, blocks=2, expansion=3, **PLAIN)).eval()
    blocks = [m for m in neck.modules() if isinstance(m, RepVGG)]
    inputs = [draw(2, m.conv1.conv.in_channels, 5, 6, seed=i) for i, m in enumerate(blocks)]
    want = [m(x) for m, x in zip(blocks, inputs, strict=True)]
    double = A3FPN(SMALL, 16, blocks=2, expansion=3, **PLAIN).double().eval()
    double.load_state_dict(neck.state_dict())
    maps = pyramid(33, 47, dtype=torch.float64)
    before = double(maps)
    assert neck.reparameterize().reparameterize() is neck and not any(
        "conv2.norm" in n and "blocks" in n for n in neck.state_dict()
    )
    for m, x, y in zip(blocks, inputs, want, strict=True):
        assert (m(x) - y).abs().max() < 1e-5
    for got, y in zip(
        double.reparameterize()(maps), before, strict=True
    ):  # whole: where no float32 rounding flips gates
        assert (got - y).abs().max() < 1e-10
    assert all(p.grad is None for p in double.parameters())


def test_autocast():
    neck = stir(A3FPN(SMALL, 16, **PLAIN))
    maps = pyramid(33, 47)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sum(x.float().square().mean() for x in neck(maps)).backward()
    assert all(torch.isfinite(p.grad).all() for p in neck.parameters())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "each"])
def test_compile(fused):
    value, points = draw(1, 8, 6, 7), draw(1, 54, 6, 7, seed=1)
    compiled = torch.compile(partial(deformable_aggregate, fused=fused), backend="aot_eager", fullgraph=True)
    want = deformable_aggregate(value, points, 2, 2.0, fused=fused)
    torch.testing.assert_close(compiled(value, points, 2, 2.0), want)


@pytest.mark.slow
def test_export(tmp_path):
    """To ONNX through `torch.export`, without the fused operator, which ONNX does not know."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    spec = ShapeSpec((16, 24), (4, 8))
    neck = stir(A3FPN(spec, 8, extra_levels="pool")).eval()
    maps = pyramid(36, 52, spec=spec)
    program = torch.export.export(neck, (maps,))
    assert "deform_conv2d" not in str(program.graph) and "grid_sampler" in str(program.graph)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "neck.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "neck.onnx", providers=["CPUExecutionProvider"])
    given = {i.name: x.numpy() for i, x in zip(session.get_inputs(), maps, strict=True)}
    for got, want in zip(session.run(None, given), neck(maps), strict=True):
        assert (torch.from_numpy(got) - want).abs().quantile(0.99) < 1e-5  # single gates may flip


def test_bad_arguments():
    for kwargs, message in (
        (dict(preset="tiny"), r"preset.*full, lite.*tiny"),
        (dict(direction="up"), r"direction.*top_down, bottom_up.*'up'"),
        (dict(columns=4), r"columns.*3.*4"),
        (dict(extra_levels="p8"), r"extra_levels.*p8"),
        (dict(start_level=4), r"start_level.*4"),
        (dict(squeeze=(1, 2)), r"squeeze.*4.*\[1, 2\]"),
        (dict(squeeze=(1, 2, 64, 4)), r"squeeze.*64"),
        (dict(resampling=[True]), r"resampling.*3.*\[True\]"),
    ):
        with pytest.raises(ValueError, match=message):
            A3FPN(SMALL, **kwargs)
    with pytest.raises(ValueError, match=r"\(8,\)"):
        A3FPN(ShapeSpec((8,), (4,)))
    with pytest.raises(ValueError, match=r"6.*4"):
        A3FPN(ShapeSpec((8, 8), (4, 6)))
    with pytest.raises(ValueError, match=r"4.*3"):
        A3FPN(SMALL, **PLAIN)(pyramid(32, 32)[:3])


# --------------------------------------------------------------------------------------------------------------------
# The authors' names

CONFIG = dict(
    in_channels=[16, 24, 32, 48],
    out_channels=16,
    squeeze=[1, 1, 2, 2],
    compress_channel=[4, 4, 4, 8],
    group_num=[4, 4, 4, 4],
    num_repblocks=1,
    expansion=4.0,
    using_resampling=[True, True, True],
    dcn_groups=[2, 3, 2, 4],
    dcn_config=dict(offset_scale=2.0, dcn_output_bias=True),
)


def norm(name: str, channels: int) -> dict[str, list[int]]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{n}": [channels] for n in names} | {f"{name}.num_batches_tracked": []}


def conv(name: str, outputs: int, inputs: int, kernel: int = 1) -> dict[str, list[int]]:
    return {f"{name}.conv.weight": [outputs, inputs, kernel, kernel], **norm(f"{name}.norm", outputs)}


def published_spec(config: dict, direction: str = "top_down", first_height: int = 2, convs: int = 4) -> dict:
    """The authors' parameter names and shapes, written down from their modules, with the resampler in every column."""
    widths = [c // s for c, s in zip(config["in_channels"], config["squeeze"], strict=True)]
    out, spec = config["out_channels"], {}
    for i, (inputs, width) in enumerate(zip(config["in_channels"], widths, strict=True)):
        if width != inputs:
            spec |= conv(f"conv{i}", width, inputs)
    suffix = {2: ("", ""), 3: ("2x", "2x1", "2x"), 4: ("2x", "2x1", "2x2", "2x3")}
    for height in range(first_height, 5):
        levels = range(4 - height, 4) if direction == "top_down" else range(height)
        for position, level in enumerate(levels):
            name = f"a3fpn_body.a3fpn_{height}_level{position}"
            c = widths[level]
            for other, source in enumerate(levels):
                inputs, factor = widths[source], 2 ** abs(other - position)
                what = suffix[height][position].replace("2x", f"{factor}x")
                if other > position and inputs != c:
                    spec |= conv(f"{name}.upsample{what}.sample_layer.0", c, inputs)
                if other < position:
                    spec |= conv(f"{name}.downsample{what}.sample_layer", c, 1 if inputs == c else inputs, factor)
            compress, hidden = config["compress_channel"][level], int(height * config["expansion"])
            for k in range(height):
                spec |= conv(f"{name}.MCA.weight_level_{k + 1}", compress, c)
            weights = f"{name}.MCA.weight_levels"
            spec |= conv(f"{weights}.conv1", hidden, compress * height) | conv(
                f"{weights}.conv2", hidden, compress * height
            )
            for b in range(config["num_repblocks"]):
                spec |= conv(f"{weights}.bottlenecks.{b}.conv1", hidden, hidden, 3)
                spec |= conv(f"{weights}.bottlenecks.{b}.conv2", hidden, hidden)
            spec |= {f"{weights}.conv3.conv.weight": [height, hidden, 1, 1], f"{weights}.conv3.conv.bias": [height]}
            spec |= conv(f"{name}.MCA.context_conv", c * (height - 1), c * height)
            for k in range(height - 1):
                dcn = f"{name}.MCA.resampler{k + 1}"
                points = -(-config["dcn_groups"][level] * 27 // 8) * 8
                for layer, shape in (
                    ("offset_mask_dw", [c, 1, 3, 3]),
                    ("offset_mask", [points, c]),
                    ("value_proj", [c, c]),
                    ("output_proj", [c, c]),
                ):
                    spec |= {f"{dcn}.resampling.{layer}.weight": shape, f"{dcn}.resampling.{layer}.bias": [shape[0]]}
                spec |= {f"{dcn}.norm.weight": [c], f"{dcn}.norm.bias": [c]}
            for part in ("gn", "norm"):
                spec |= {f"{name}.ICA.{part}.weight": [c], f"{name}.ICA.{part}.bias": [c]}
    for i, width in enumerate(widths):
        spec |= conv(f"conv{i}{i}", out, width, 3)
    if convs > 4:
        spec |= conv("conv44", out, out, 3)
    for i in range(convs - 5):
        spec |= conv(f"extra_convs.{i}", out, out, 3)
    return spec


def fill(spec: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Every tensor is told apart from every other by its values."""
    state = {}
    for i, (name, shape) in enumerate(spec.items()):
        x = draw(*shape, seed=i) if shape else torch.tensor(0)
        state[name] = 1 + 0.1 * x.abs() if name.endswith(("running_var", "norm.weight", "gn.weight")) else 0.2 * x
    return state


def test_the_written_names_are_the_golden_ones():
    meta = json.loads((Path(__file__).parents[1] / "goldens" / "a3fpn_small.json").read_text())
    assert published_spec(meta["config"], convs=5) == meta["spec"]


def shares(neck: A3FPN, state: dict[str, torch.Tensor]) -> set[str]:
    """The published tensors that are in the neck, by value."""
    own = {x.flatten()[0].item(): x for x in neck.state_dict().values() if x.is_floating_point()}
    return {
        name
        for name, x in state.items()
        if x.ndim and (y := own.get(x.flatten()[0].item())) is not None and torch.equal(y.flatten(), x.flatten())
    }


def test_detector_of_mmdetection():
    """Names after ``neck.``; P6 by a convolution; RetinaNet's levels, and what it computes in vain."""
    state = fill(published_spec(CONFIG, convs=5))
    whole = {f"neck.{n}": x for n, x in state.items()} | {"backbone.conv1.weight": torch.ones(3)}
    neck = from_published(CONFIG | dict(num_outs=5), {"state_dict": whole})
    assert neck.spec.strides == (4, 8, 16, 32, 64)
    assert shares(neck, state) == {n for n, x in state.items() if x.ndim}

    state = fill(published_spec(CONFIG, convs=6))
    neck = from_published(CONFIG | dict(num_outs=5, end_level=6), state)
    assert neck.spec.strides == (8, 16, 32, 64, 128)
    left = {n for n, x in state.items() if x.ndim} - shares(neck, state)
    assert left and all(n.startswith(("conv00.", "a3fpn_body.a3fpn_4_level0.")) for n in left)

    # four maps asked for, five levels made: conv44 is not among them
    state = fill(published_spec(CONFIG, convs=6))
    neck = from_published(CONFIG | dict(num_outs=4, end_level=5), state)
    assert neck.spec.strides == (8, 16, 32, 64)
    assert "extra_convs.0.conv.weight" in shares(neck, state) and "conv44.conv.weight" not in shares(neck, state)


def test_detector_of_detectron2():
    state = fill(published_spec(CONFIG))
    neck = from_published(CONFIG, {"model": {f"backbone.a3fpn.{n}": x.numpy() for n, x in state.items()}})
    assert neck.levels == [[2, 3], [1, 2, 3], [0, 1, 2, 3]] and neck.spec.strides == (4, 8, 16, 32)
    assert shares(neck, state) == {n for n, x in state.items() if x.ndim}


def test_segmentor_of_mmsegmentation():
    """Columns upwards."""
    state = fill(published_spec(CONFIG, "bottom_up"))
    neck = from_published(CONFIG, {f"decode_head.a3fpn.{n}": x for n, x in state.items()}, "bottom_up")
    assert neck.levels == [[0, 1], [0, 1, 2], [0, 1, 2, 3]] and neck.updated_first
    assert shares(neck, state) == {n for n, x in state.items() if x.ndim}


def test_pixel_decoder_of_mask2former():
    state = fill(published_spec(CONFIG, first_height=4))
    whole = {f"sem_seg_head.pixel_decoder.a3fpn.{n}": x for n, x in state.items()}
    neck = from_published(CONFIG, whole)
    assert neck.levels == [[0, 1, 2, 3]]
    assert shares(neck, state) == {n for n, x in state.items() if x.ndim}


def test_deployed_checkpoint_keeps_its_branches():
    state = fill(published_spec(CONFIG, convs=5))
    folded = {n.replace("conv1.conv", "conv"): x for n, x in state.items() if ".bottlenecks.0.conv1.conv." in n}
    assert shares(from_published(CONFIG, state | folded), state) == {n for n, x in state.items() if x.ndim}


def test_published_refusals():
    state = fill(published_spec(CONFIG, convs=5))
    neck = from_published(CONFIG, state | {"conv9.conv.weight": torch.ones(1)})  # which is another part of a model
    before = {name: x.clone() for name, x in neck.state_dict().items()}
    gate = "a3fpn_body.a3fpn_3_level1.ICA.gn.bias"
    for change, message in (
        ({"b.a3fpn_body.x": torch.ones(1)}, r"b\."),
        ({"conv11.conv.weight": torch.ones(1)}, r"outputs\.1\.conv\.weight \(1,\)"),
        ({"conv33.conv.bias": torch.ones(1)}, r"outputs\.3\.conv\.bias"),
        ({gate: None}, r"columns\.1\.2\.reassemble\.gate\.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            load_published(neck, {name: 2 * x for name, x in (state | change).items() if x is not None})
    assert all(torch.equal(x, before[name]) for name, x in neck.state_dict().items())
    with pytest.raises(ValueError, match="a3fpn_body"):
        load_published(neck, {"conv1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"blocks\.1\."):
        from_published(CONFIG | dict(num_repblocks=2), state)
