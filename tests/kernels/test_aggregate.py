"""neighborhood_aggregate: reference against slow loops, tiled against reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.kernels import BackendError, backend, neighborhood_aggregate, tiling
from foveal.kernels.aggregate import tiled
from foveal.kernels.cache import CONSTANTS
from foveal.kernels.window import Window

from . import naive
from .test_neighborhood import relative_error


class Plain(torch.Tensor):
    """A subclass, which takes the form that compilers and exporters see."""


def inputs(shape, kernel_size, dtype=torch.float32, seed=0):
    """weights and v, as leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((*shape[:4], kernel_size[0] * kernel_size[1]), shape)
    return [
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True) for size in sizes
    ]


def with_gradients(leaves, name, like=lambda t: t, **options):
    """Output and the gradients of both leaves, for the gradient of the output that ``like`` makes of a drawn one."""
    out = neighborhood_aggregate(*leaves, backend=name, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, like(grad))]


def assert_rounding_apart(got, want, leaves, **options):
    """``got`` in any order of additions against ``want`` in float64.

    All three are sums of products. n products, each rounded and added in whatever order, are off by at most n * eps / 2
    of the sum of their sizes, to first order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    Both count here, sizes and numbers, with the operation itself: of the absolute values, and of ones.
    """
    sizes = [t.detach().double().abs().requires_grad_(True) for t in leaves]
    ones = [torch.ones_like(t).requires_grad_(True) for t in sizes]
    sizes = with_gradients(sizes, "reference", torch.abs, **options)
    numbers = with_gradients(ones, "reference", torch.ones_like, **options)
    eps = torch.finfo(leaves[0].dtype).eps
    for index, (a, b, size, number) in enumerate(zip(got, want, sizes, numbers, strict=True)):
        assert a.dtype == leaves[0].dtype and a.shape == b.shape
        assert bool(((a.detach().double() - b.detach()).abs() <= (number + 1) * eps * size).all()), index


# ------------------------------------------------------------------------------- the reference against loops


@pytest.mark.parametrize("boundary", ["shift", "zero", "mask"])
@pytest.mark.parametrize(
    ("size", "kernel_size", "dilation"),
    [((7, 6), (3, 3), (1, 1)), ((9, 7), (4, 3), (2, 1)), ((7, 11), (3, 2), (2, 3)), ((5, 8), (5, 1), (1, 4))],
    ids=["h7w6-k3", "h9w7-k4x3-d2x1", "h7w11-k3x2-d2x3", "h5w8-k5x1-d1x4"],
)
@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_against_loops(name, size, kernel_size, dilation, boundary):
    leaves = inputs((2, *size, 2, 3), kernel_size, torch.float64)
    options = {"kernel_size": kernel_size, "dilation": dilation, "boundary": boundary}
    with torch.no_grad():
        want = naive.aggregate(*leaves, **options)
    assert relative_error(neighborhood_aggregate(*leaves, backend=name, **options), want) < 1e-12


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_keys_outside_contribute_nothing(name):
    """All weights and values 1: the sum counts the keys inside the map, for "zero" and "mask" alike."""
    for boundary in ("zero", "mask"):
        out = neighborhood_aggregate(
            torch.ones(1, 4, 5, 1, 9), torch.ones(1, 4, 5, 1, 1), kernel_size=3, boundary=boundary, backend=name
        )
        assert out[0, :, :, 0, 0].tolist() == [[4, 6, 6, 6, 4], [6, 9, 9, 9, 6], [6, 9, 9, 9, 6], [4, 6, 6, 6, 4]]


# ------------------------------------------------------------------------------ tiled against the reference


@st.composite
def calls(draw):
    """Options of a call and its shape: any sizes that the rule allows."""
    boundary = draw(st.sampled_from(["shift", "shift", "zero", "mask"]))
    sizes, kernel_size, dilation = [], [], []
    for _ in range(2):
        kernel_size.append(draw(st.integers(1, 9)))
        dilation.append(draw(st.sampled_from([1, 1, 2, 3, 4])))
        shortest = kernel_size[-1] * dilation[-1] if boundary == "shift" else 1
        sizes.append(draw(st.integers(shortest, max(shortest, 14) + draw(st.sampled_from([0, 0, 5, 17])))))
    options = {"kernel_size": tuple(kernel_size), "dilation": tuple(dilation), "boundary": boundary}
    return (draw(st.integers(0, 3)), *sizes, draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 7]))), options


@given(calls(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([tiling.CHUNK, 64, 3000]))
@settings(max_examples=200)
def test_tiled_equals_reference(call, dtype, chunk):
    shape, options = call
    leaves = inputs(shape, options["kernel_size"], dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "CHUNK", chunk)  # small chunks: several slices of batch, heads, groups and tile rows
        got = with_gradients(leaves, "tiled", **options)
    exact = [t.detach().double().requires_grad_(True) for t in leaves]
    assert_rounding_apart(got, with_gradients(exact, "reference", **options), leaves, **options)


@given(calls(), st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=100)
def test_every_tile_gives_the_same(call, rows, columns):
    """Tiles that the planner would not take: rows, squares, whole maps, ragged ones."""
    shape, options = call
    leaves = inputs(shape, options["kernel_size"], torch.float64)
    want = with_gradients(leaves, "reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "_cost", lambda a, b: abs(a.tile - rows) + abs(b.tile - columns))
        got = with_gradients(leaves, "tiled", **options)
        plain = [t.detach().as_subclass(Plain).requires_grad_(True) for t in leaves]
        traced = with_gradients(plain, "tiled", **options)
    assert_rounding_apart(got, want, leaves, **options)
    assert_rounding_apart([t.detach().as_subclass(torch.Tensor) for t in traced], want, leaves, **options)


OVERLOCK_LAYERS = [(14, 8, 13, 16), (14, 8, 5, 16), (7, 12, 7, 14), (7, 12, 5, 14), (28, 2, 13, 16)]


@pytest.mark.parametrize(("size", "heads", "kernel_size", "depth"), OVERLOCK_LAYERS, ids=lambda x: str(x))
def test_layers_of_overlock(size, heads, kernel_size, depth):
    leaves = inputs((2, size, size, heads, depth), (kernel_size, kernel_size))
    got = with_gradients(leaves, "tiled", kernel_size=kernel_size)
    want = with_gradients(leaves, "reference", kernel_size=kernel_size)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


def test_tiles_follow_the_map():
    """A map of 14 x 14 is one tile for a window of 13; a large one is cut, and a row may be a tile."""
    window = Window(13)
    ((a, b),) = tiling.plan(window, window, 14, 14, tiled._cost)
    assert (a.tile, b.tile) == (14, 14)
    ((a, b),) = tiling.plan(window, window, 56, 56, tiled._cost)
    assert a.tile < 56 and b.tile < 56
    ((a, b),) = tiling.plan(Window(1), Window(14), 56, 14, tiled._cost)
    assert b.tile == 14


DERIVATIVES = [
    ((4, 5), {"kernel_size": (3, 2)}),
    ((5, 3), {"kernel_size": (2, 3), "dilation": (2, 1)}),
    ((3, 4), {"kernel_size": (4, 3), "boundary": "zero"}),
]


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize(("size", "options"), DERIVATIVES, ids=["shift", "shift-d2", "zero"])
def test_first_and_second_derivatives(name, size, options):
    leaves = inputs((1, *size, 2, 2), options["kernel_size"], torch.float64)

    def call(weights, v):
        return neighborhood_aggregate(weights, v, backend=name, **options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


# --------------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(14, 15), (12, 16)], ids=["uneven", "even"])
def test_low_precision_is_as_good_as_eager(dtype, size):
    """Error against float64 at most twice (gradients: three times) that of eager PyTorch in the same dtype."""
    exact = [t.detach().to(dtype).double().requires_grad_(True) for t in inputs((2, *size, 2, 16), (5, 5))]
    low = [t.detach().to(dtype).requires_grad_(True) for t in exact]
    want = with_gradients(exact, "reference", kernel_size=5, dilation=2)
    got = with_gradients(low, "tiled", kernel_size=5, dilation=2)
    rows, columns = (Window(5, 1, 2).keys(n)[0] for n in size)
    near = low[1][:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4)
    out = torch.einsum("bhwnk,bhwknd->bhwnd", low[0], near)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    eager = [out, *torch.autograd.grad(out, low, grad)]
    for index, (a, e, w) in enumerate(zip(got, eager, want, strict=True)):
        assert a.dtype == dtype
        assert relative_error(a, w) <= (2 if index == 0 else 3) * relative_error(e, w), index


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_float16_sums_do_not_overflow(name):
    """25 products of 400 * 300 with alternating signs: each is beyond float16, their sum is not."""
    weights = torch.full((1, 9, 9, 1, 25), 400.0, dtype=torch.float16)
    weights[..., 1::2] *= -1
    weights[..., 0] = 0.5
    out = neighborhood_aggregate(
        weights, torch.full((1, 9, 9, 1, 4), 300.0, dtype=torch.float16), kernel_size=5, backend=name
    )
    assert bool((out == 150).all())


def test_autocast_casts_like_the_functional_operators():
    leaves = inputs((1, 8, 8, 2, 8), (3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        out = neighborhood_aggregate(*leaves, kernel_size=3)
        mixed = neighborhood_aggregate(leaves[0].bfloat16(), leaves[1], kernel_size=3)
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert relative_error(out, neighborhood_aggregate(*leaves, kernel_size=3)) < 0.05
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), leaves)] == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert neighborhood_aggregate(*(t.double() for t in leaves), kernel_size=3).dtype == torch.float64
        with pytest.raises(TypeError, match=r"float32.*float64"):
            neighborhood_aggregate(leaves[0], leaves[1].double(), kernel_size=3)


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_batch_of_none(name):
    out, *grads = with_gradients(inputs((0, 7, 9, 2, 4), (3, 3)), name, kernel_size=3, dilation=2)
    assert out.shape == (0, 7, 9, 2, 4)
    assert [g.shape for g in grads] == [(0, 7, 9, 2, 9), (0, 7, 9, 2, 4)]


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_strides_of_the_inputs_do_not_matter(name):
    generator = torch.Generator().manual_seed(0)
    heads_first = torch.randn(2, 2, 9, 9, 8, generator=generator).permute(0, 3, 4, 1, 2)
    flipped = torch.randn(2, 9, 16, 2, 9, generator=generator)[:, :, ::2]
    expanded = torch.randn(1, 9, 8, 1, 9, generator=generator).expand(2, 9, 8, 2, 9)
    packed = torch.randn(2, 9, 8, 2, 2, 9, generator=generator).unbind(3)
    weights = [heads_first, flipped, expanded, packed[0]]
    for w in weights:
        for v in (*packed, flipped, expanded):
            got = neighborhood_aggregate(w, v, kernel_size=3, dilation=2, backend=name)
            want = neighborhood_aggregate(w.contiguous(), v.contiguous(), kernel_size=3, dilation=2, backend=name)
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_output_is_contiguous_and_may_be_changed_in_place(size):
    leaves = inputs((2, *size, 2, 4), (3, 3))
    out = neighborhood_aggregate(*leaves, kernel_size=3, dilation=2, backend="tiled")
    assert out.is_contiguous()
    want = torch.autograd.grad(out.sum() * 2, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.mul_(2).sum(), leaves), want, strict=True):
        torch.testing.assert_close(a, b)


def test_default_device_does_not_leak_in():
    leaves = inputs((1, 9, 11, 2, 4), (3, 3))
    want = with_gradients(leaves, "tiled", kernel_size=3, dilation=2)
    CONSTANTS.clear()
    with torch.device("meta"):
        out = neighborhood_aggregate(*leaves, kernel_size=3, dilation=2, backend="tiled")
        grads = torch.autograd.grad(out, leaves, torch.ones(out.shape, device="cpu"))
    torch.testing.assert_close(out, want[0])
    assert all(g.device.type == "cpu" and torch.isfinite(g).all() for g in grads)


def test_inputs_are_not_changed():
    leaves = inputs((1, 9, 9, 2, 4), (3, 3))
    before = [t.detach().clone() for t in leaves]
    with_gradients(leaves, "tiled", kernel_size=3)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("chosen", [0, 1])
def test_one_of_the_inputs_wants_gradients(chosen):
    leaves = inputs((1, 9, 8, 2, 4), (3, 3))
    picked = [t if i == chosen else t.detach() for i, t in enumerate(leaves)]
    got, want = (
        torch.autograd.grad(neighborhood_aggregate(*picked, kernel_size=3, backend=name).sum(), leaves[chosen])[0]
        for name in ("tiled", "reference")
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    leaves = inputs((1, 9, 8, 2, 4), (3, 3))

    def call(weights, v):
        return neighborhood_aggregate(weights, v, kernel_size=3, backend="tiled")

    want = torch.autograd.grad(call(*leaves).sum(), leaves)
    checkpoint(call, *leaves, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(t.grad, b) for t, b in zip(leaves, want, strict=True))


def test_transforms_of_torch_func():
    weights, v = (t.detach() for t in inputs((1, 7, 8, 2, 4), (3, 3)))

    def call(weights, v, name="tiled"):
        return neighborhood_aggregate(weights, v, kernel_size=3, backend=name).square().sum()

    for argnums in (0, 1):
        torch.testing.assert_close(
            torch.func.grad(call, argnums)(weights, v), torch.func.grad(call, argnums)(weights, v, "reference")
        )
    batch = torch.stack([v, 2 * v])
    torch.testing.assert_close(
        torch.vmap(call, (None, 0))(weights, batch), torch.stack([call(weights, x) for x in batch])
    )


def test_plans_made_in_inference_mode_serve_training():
    leaves = inputs((1, 11, 13, 2, 4), (3, 3))
    CONSTANTS.clear()
    with torch.inference_mode():
        neighborhood_aggregate(*leaves, kernel_size=3, dilation=2)
    for plain in (False, True):
        used = [t.detach().as_subclass(Plain).requires_grad_(True) for t in leaves] if plain else leaves
        got = with_gradients(used, "tiled", kernel_size=3, dilation=2)
        want = with_gradients(leaves, "reference", kernel_size=3, dilation=2)
        assert max(relative_error(a.as_subclass(torch.Tensor), b) for a, b in zip(got, want, strict=True)) < 1e-5


# --------------------------------------------------------------------------------------- compilers, exporters


OPTIONS = [
    {"kernel_size": 3, "dilation": 2},
    {"kernel_size": (5, 4), "dilation": (2, 3)},
    {"kernel_size": 6, "boundary": "mask"},
    {"kernel_size": 13},
    {"kernel_size": (3, 2), "dilation": (2, 1)},  # two plans
]
IDS = ["k3-d2", "k5x4-d2x3", "k6-mask", "k13", "k3x2-d2x1"]


class Aggregate(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, weights, v):
        return neighborhood_aggregate(weights, v, **self.options)

    def example(self, batch=2):
        size = self.options["kernel_size"]
        kernel_size = (size, size) if isinstance(size, int) else size
        return [t.detach() for t in inputs((batch, 13, 17, 2, 4), kernel_size, seed=batch)]


@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[2]], ids=[IDS[4], IDS[2]])
def test_compile_in_one_graph_with_gradients(options):
    torch._dynamo.reset()
    module = Aggregate(**options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        leaves = [t.requires_grad_(True) for t in module.example(batch)]
        got, want = compiled(*leaves), module(*leaves)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), leaves),
            torch.autograd.grad(want.square().sum(), leaves),
            strict=True,
        ):
            assert relative_error(a, b) < 1e-5


def test_the_compiled_products_keep_their_promises():
    """Schemas, fakes and gradients, as compilers rely on them."""
    weights, v = inputs((1, 6, 7, 2, 4), (3, 3))
    window = tiled.window_list(Window(3), Window(3, dilation=2))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for name, x in (("apply", weights), ("spread", weights), ("dots", v)):
        torch.library.opcheck(tiled._node, (name, x, v, window), test_utils=checks)
    biases = torch.randn(2, 5, 5, requires_grad=True), torch.randn(9, requires_grad=True)
    window = tiled.window_list(Window(3, boundary="mask"), Window(3, boundary="mask"))
    for tensors in ((weights, v, *biases), (weights, v, None, None)):
        torch.library.opcheck(tiled._mix_node, (*tensors, window), test_utils=checks)


@pytest.mark.slow
def test_compile_with_the_default_compiler():
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)  # the poison is tested elsewhere
    module = Aggregate(kernel_size=3, dilation=3)
    leaves = [t.requires_grad_(True) for t in module.example()]
    got, want = torch.compile(module, fullgraph=True)(*leaves), module(*leaves)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves), strict=True
    ):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("options", OPTIONS[1:4], ids=IDS[1:4])
def test_export_with_a_free_batch(options):
    module = Aggregate(**options)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, tuple(module.example()), dynamic_shapes=({0: batch},) * 2)
    for count in (1, 5):
        x = module.example(count)
        torch.testing.assert_close(program.module()(*x), module(*x))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in")) or "sym" in name for name in names), names


@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[2]], ids=[IDS[4], IDS[2]])
def test_onnx_equals_eager(options, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    torch.use_deterministic_algorithms(False)
    module = Aggregate(**options).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    path = tmp_path / "aggregate.onnx"
    torch.onnx.export(
        module,
        tuple(module.example()),
        str(path),
        dynamo=True,
        dynamic_shapes=({0: batch},) * 2,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for count in (1, 4):
        x = module.example(count)
        got = session.run(None, dict(zip(names, (t.numpy() for t in x), strict=True)))[0]
        assert relative_error(torch.from_numpy(got), module(*x)) < 1e-5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace():
    module = Aggregate(kernel_size=3, dilation=2)
    traced = torch.jit.trace(module, tuple(module.example()))
    others = module.example(3)
    torch.testing.assert_close(traced(*others), module(*others))


# -------------------------------------------------------------------------------------- dispatch and bad input


def call_of(shape=(1, 9, 9, 1, 4), area=9, weights=None, v=None):
    return (
        torch.randn(*shape[:4], area) if weights is None else weights,
        torch.randn(*shape) if v is None else v,
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            call_of((1, 6, 6, 1, 4), 49),
            {"kernel_size": 7},
            ValueError,
            r"kernel_size 7 x dilation 1 = 7 .* map's 6 rows",
        ),
        (
            call_of((1, 20, 13, 1, 4), 49),
            {"kernel_size": 7, "dilation": 2},
            ValueError,
            r"7 x dilation 2 = 14 .* 13 columns",
        ),
        (call_of(), {"kernel_size": 0}, ValueError, "kernel_size.*0"),
        (call_of(), {"kernel_size": 3, "dilation": (1, 0)}, ValueError, r"dilation.*\(1, 0\)"),
        (call_of(), {"kernel_size": 3.0}, TypeError, r"kernel_size.*3\.0"),
        (call_of(), {"kernel_size": 3, "boundary": "wrap"}, ValueError, "'wrap'.*shift, zero, mask"),
        (call_of(), {"kernel_size": 5}, ValueError, r"25.*9.*weights \(1, 9, 9, 1, 9\)"),
        (call_of(area=1)[:1] * 2, {"kernel_size": (1, 2)}, ValueError, "1 x 2.*weights"),
        (
            call_of(v=torch.randn(1, 9, 8, 1, 4)),
            {"kernel_size": 3},
            ValueError,
            r"weights \(1, 9, 9, 1, 9\), v \(1, 9, 8, 1, 4\)",
        ),
        (call_of(v=torch.randn(9, 9, 1, 4)), {"kernel_size": 3}, ValueError, r"v .*heads, D\].*\(9, 9, 1, 4\)"),
        (
            call_of(weights=torch.randn(9, 9, 1, 9)),
            {"kernel_size": 3},
            ValueError,
            r"weights .*\[B, H, W, heads, Kh \* Kw\].*\(9, 9, 1, 9\)",
        ),
        (call_of(v=torch.randn(1, 9, 9, 1, 0)), {"kernel_size": 3}, ValueError, r"v \(1, 9, 9, 1, 0\)"),
        (call_of(v=torch.randn(1, 9, 9, 1, 4, device="meta")), {"kernel_size": 3}, ValueError, "cpu.*meta"),
        (
            call_of(v=torch.randn(1, 9, 9, 1, 4).double()),
            {"kernel_size": 3},
            TypeError,
            "float32.*float64",
        ),
        (call_of(v=torch.ones(1, 9, 9, 1, 4, dtype=torch.int32)), {"kernel_size": 3}, TypeError, "v .*int32"),
        (([1.0], torch.randn(1, 9, 9, 1, 4)), {"kernel_size": 3}, TypeError, "weights.*list"),
        (call_of(), {"kernel_size": 3, "backend": "cutlass"}, BackendError, "'cutlass'.*backend"),
        (
            call_of(),
            {"kernel_size": 3, "backend": "natten"},
            BackendError,
            "neighborhood_aggregate.*'natten'.*argument",
        ),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        neighborhood_aggregate(*arguments, **options)


def test_backend_context():
    weights, v = call_of()
    with backend("natten"):
        with pytest.raises(BackendError, match=r"'natten'.*backend\(\)"):
            neighborhood_aggregate(weights, v, kernel_size=3)
        neighborhood_aggregate(weights, v, kernel_size=3, backend="reference")  # the argument wins
