"""Maps of any size in one graph: the backend ``dynamic`` at known sizes, and what exporters make of free ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.kernels import RelativePositionBias, dynamic, neighborhood_aggregate, neighborhood_attention
from foveal.kernels.aggregate.api import neighborhood_logits
from foveal.kernels.window import Window

from . import test_aggregate, test_neighborhood
from .test_neighborhood import relative_error

SIZES = [(9, 9), (23, 10), (8, 31), (40, 17), (15, 64)]


def assert_same(got, want):
    """Up to the rounding of terms as large as the largest of the call."""
    largest = max((float(t.detach().abs().max()) for t in want if t.numel()), default=0.0)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        if b.numel():
            assert float((a - b).detach().abs().max()) <= 1e-12 * largest, index


@given(test_neighborhood.calls())
@settings(max_examples=60)
def test_attention_equals_reference(call):
    shape, value_depth, bias, options = call
    leaves, rule = test_neighborhood.inputs(shape, value_depth, bias=bias, dtype=torch.float64, **options)
    assert_same(*(test_neighborhood.with_gradients(leaves, rule, name, **options) for name in ("dynamic", "reference")))


@given(test_aggregate.calls())
@settings(max_examples=40)
def test_aggregate_equals_reference(call):
    shape, options = call
    leaves = test_aggregate.inputs(shape, options["kernel_size"], torch.float64)
    assert_same(*(test_aggregate.with_gradients(leaves, name, **options) for name in ("dynamic", "reference")))


@given(st.tuples(st.integers(1, 5), st.integers(1, 3)), st.tuples(st.integers(15, 30), st.integers(15, 30)))
@settings(max_examples=20)
def test_logits_equal_reference(window, size):
    generator = torch.Generator().manual_seed(0)  # an example that fails has to fail again
    q, k = (torch.randn(2, *size, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    options = {"kernel_size": window[0], "dilation": window[1]}
    assert_same(*([neighborhood_logits(q, k, backend=name, **options)] for name in ("dynamic", "reference")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    q, k, v = (torch.randn(1, 16, 19, 2, 8).to(dtype) for _ in range(3))
    options = {"kernel_size": 5, "dilation": 2, "bias": RelativePositionBias(torch.randn(2, 9, 9).to(dtype))}
    got = neighborhood_attention(q, k, v, backend="dynamic", **options)
    want = neighborhood_attention(q, k, v, backend="reference", **options)
    assert got.dtype == dtype
    assert relative_error(got.float(), want.float()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("window", "length"),
    [(Window(7), 224), (Window(7, dilation=8), 56), (Window(13), 100), (Window(14, 8, boundary="zero"), 112)],
    ids=["k7", "k7-d8", "k13", "halo"],
)
def test_keys_are_gathered_once_for_a_tile(window, length):
    """The memory of the keys is that of the tiles' overlap, not of a window for each query."""
    side = dynamic.axis_tiling(window, length, torch.device("cpu"))
    most = -(-window.group_length(length) // side.tile) * window.dilation * (side.tile + window.kernel_size - 1)
    assert len(side.key_at) == side.tiles * side.span <= most
    assert most < 2.1 * length + window.dilation * (2 * side.tile + window.kernel_size)


class Mix(torch.nn.Module):
    """Both operations, on a map and with weights that follow from it."""

    def __init__(self, **options):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(2, 9, 9))
        self.options = {"kernel_size": 5, **options}

    def forward(self, x):
        bias = RelativePositionBias(self.table) if self.options.get("stride", 1) != 3 else None
        x = neighborhood_attention(x, x.cos(), x.sin(), bias=bias, **self.options)
        weights = x.sum(-1, keepdim=True).expand(-1, -1, -1, -1, 9).cumsum(-1).softmax(-1)
        return neighborhood_aggregate(weights, x, kernel_size=3)


def free(least):
    """Batch, height and width of ``[B, H, W, N, D]``."""
    dim = torch.export.Dim
    return ({0: dim("batch"), 1: dim("height", min=least), 2: dim("width", min=least)},)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"dilation": 3}, marks=pytest.mark.slow),
        pytest.param({"stride": 3, "boundary": "mask"}, marks=pytest.mark.slow),
        {"stride": 5, "offset": (2, 4), "boundary": "mask"},
    ],
    ids=["shift", "d3", "mask-s3", "shifted"],
)
def test_export_with_a_free_size(options):
    module = Mix(**options)
    least = 5 * options.get("dilation", 1)
    program = torch.export.export(module, (torch.randn(2, 19, 22, 2, 4),), dynamic_shapes=free(least))
    for size in [(least, least), *SIZES]:
        x = torch.randn(3, *(max(n, least) for n in size), 2, 4)
        assert relative_error(program.module()(x), module(x)) < 1e-5, size


@pytest.mark.slow
def test_a_size_that_may_be_too_small_is_named():
    with pytest.raises(Exception, match=r"(?s)Constraints violated.*height = Dim\('height', min=10\)"):
        torch.export.export(Mix(dilation=2), (torch.randn(2, 19, 22, 2, 4),), dynamic_shapes=free(4))


@pytest.mark.slow
def test_export_with_one_free_side():
    module = Mix(dilation=2)
    shapes = ({2: torch.export.Dim("width", min=10)},)
    program = torch.export.export(module, (torch.randn(2, 14, 22, 2, 4),), dynamic_shapes=shapes)
    for width in (10, 14, 35):
        x = torch.randn(2, 14, width, 2, 4)
        assert relative_error(program.module()(x), module(x)) < 1e-5


@pytest.mark.slow
def test_onnx_with_a_free_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    torch.use_deterministic_algorithms(False)
    module, path = Mix(dilation=(1, 2)).eval(), tmp_path / "mix.onnx"
    x = torch.randn(2, 19, 22, 2, 4)
    torch.onnx.export(module, (x,), str(path), dynamo=True, dynamic_shapes=free(10), external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for count, (height, width) in enumerate([(10, 10), *SIZES], 1):
        x = torch.randn(count, max(height, 10), max(width, 10), 2, 4)
        got = torch.from_numpy(session.run(None, {name: x.numpy()})[0])
        assert relative_error(got, module(x).detach()) < 1e-5


def test_compile_is_for_one_size_each():
    """There a size that changes is compiled again, in the faster form for one size."""
    torch._dynamo.reset()
    module = Mix()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for size in SIZES[:3]:
        x = torch.randn(2, *size, 2, 4)
        torch.testing.assert_close(compiled(x), module(x))
