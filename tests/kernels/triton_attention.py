"""The sweep of the Triton kernels of neighborhood attention. ``test_triton.py`` runs this file in a process of its own,
under Triton's interpreter, which has to be chosen before a kernel is defined, or on a GPU.
"""

from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import assume, given, settings

from foveal.kernels import BackendError, RelativePositionBias, neighborhood_attention, triton_common, triton_support
from foveal.kernels.neighborhood import triton as backend
from foveal.kernels.window import Window

from .test_neighborhood import calls, inputs, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
SHIFTED = {"kernel_size": (4, 5), "stride": (4, 5), "boundary": "mask"}
HALO = {"kernel_size": (8, 8), "stride": (4, 4)}


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    """The interpreter keeps bfloat16 as integers of the same bits, multiplies these, and cuts where a GPU rounds."""
    if not triton_support.interpreting():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x):
        bits = x.dtype.scalar == tl.bfloat16
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if bits else x

    def rounded(self, x, to):
        if x.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, x, to)
        nearest = torch.from_numpy(np.ascontiguousarray(x.data)).to(BRAIN).view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(nearest, tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *more: product(self, widened(a), widened(b), *more)
    )


# --------------------------------------------------------------------------------------- the kernels against float64


def eager(
    q, k, v, tensors, bias, *,
    kernel_size, stride=1, dilation=1, query_stride=1, offset=0, boundary="shift", scale=None,
):  # fmt: skip
    """Attention as one would write it, all of it in the dtype of the inputs."""
    kernel_size, stride, dilation, query_stride, offset = (
        (x, x) if isinstance(x, int) else x for x in (kernel_size, stride, dilation, query_stride, offset)
    )
    (row_at, row_in, row), (column_at, column_in, column) = (
        Window(*options, boundary, apart, bias == "counted" and apart > 1, first).keys(length, q.device)
        for *options, apart, first, length in zip(
            kernel_size, stride, dilation, query_stride, offset, k.shape[1:3], strict=True
        )
    )
    inside = row_in[:, None, :, None] & column_in[None, :, None, :]
    near = [t[:, row_at[:, None, :, None], column_at[None, :, None, :]] for t in (k, v)]
    near = [t * inside[None, ..., None, None] for t in near]
    logits = torch.einsum("bhwnd,bhwijnd->bhwnij", q, near[0]) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias == "table":
        logits = logits + tensors[0][:, row[:, None, :, None], column[None, :, None, :]].permute(1, 2, 0, 3, 4)
    elif bias is not None:
        rows, columns = (t if t.ndim == 3 else t.expand(q.shape[3], -1, -1) for t in tensors)
        logits = logits + torch.einsum("bhwnd,nhid->bhwni", q, rows[:, row])[..., None]
        logits = logits + torch.einsum("bhwnd,nwjd->bhwnj", q, columns[:, column])[..., None, :]
    if boundary == "mask":
        logits = logits.masked_fill(~inside[:, :, None], float("-inf"))
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:])
    return torch.einsum("bhwnij,bhwijnd->bhwnd", weights, near[1]), logits.detach().flatten(-2).logsumexp(-1)


def gradients(out, leaves):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, weight.to(out.device, out.dtype))]


def rule_of(bias, tensors, rule):
    """The bias object ``rule`` with other tensors."""
    return (
        None
        if rule is None
        else RelativePositionBias(*tensors)
        if bias == "table"
        else type(rule)(*tensors, rule.counted)
    )


def check(shape, value_depth, bias, options, dtype):
    """Output within twice and gradients within three times of what eager PyTorch in this dtype has against float64."""
    leaves, rule = inputs(shape, value_depth, bias=bias, dtype=dtype, **options)
    low = [t.detach().to(DEVICE).requires_grad_(True) for t in leaves]
    exact = [t.detach().double().requires_grad_(True) for t in low]
    out, lse = eager(*exact[:3], exact[3:], bias, **options)
    want = gradients(out, exact)
    plain = gradients(eager(*low[:3], low[3:], bias, **options)[0], low)
    # all weights of a query share the rounding of its log-sum-exp, which is kept in float32 and in units of log 2
    floor = 8 * torch.finfo(dtype).eps + torch.finfo(FLOAT).eps * float(lse.abs().max())
    rule = rule_of(bias, low[3:], rule)
    result, *again = (
        gradients(neighborhood_attention(*low[:3], bias=rule, backend="triton", **options), low)
        for _ in range(2 if DEVICE == "cuda" else 1)  # the interpreter runs one program after another in any case
    )
    for twice in again:
        assert all(torch.equal(a, b) for a, b in zip(result, twice, strict=True)), "another output the second time"
    for index, (got, near, best) in enumerate(zip(result, plain, want, strict=True)):
        assert got.dtype == dtype and got.shape == best.shape
        limit = max((3 if index else 2) * relative_error(near, best), floor)
        # a gradient that cancels is off by the rounding of its terms, which are as large as the largest of the call
        largest = max(float(t.detach().abs().max()) for t in want)
        rounding = 4 * torch.finfo(dtype).eps * largest if float(best.detach().abs().max()) < 1e-2 * largest else 0.0
        assert torch.isfinite(got).all()
        difference = float((got.detach().double() - best.detach()).abs().max())
        assert difference <= limit * float(best.detach().abs().max()) + rounding, (index, difference, limit)


@pytest.mark.parametrize(
    ("shape", "value_depth", "bias", "options", "dtype"),
    [
        ((2, 5, 7, 2, 8), 8, None, {"kernel_size": (3, 3)}, BRAIN),
        ((1, 9, 7, 2, 16), 16, "table", {"kernel_size": (3, 4), "dilation": (2, 1)}, HALF),
        ((1, 11, 8, 1, 5), 3, "table", {"kernel_size": (3, 2), "dilation": (2, 3), "stride": (2, 1)}, FLOAT),
        ((1, 7, 7, 1, 8), 24, "table", {"kernel_size": (7, 7), "scale": 0.3}, BRAIN),
        ((1, 6, 9, 1, 8), 8, "table", {"kernel_size": (4, 3), "stride": (3, 2), "boundary": "mask"}, FLOAT),
        ((1, 8, 9, 2, 8), 8, "factored", {**HALO, "boundary": "zero"}, HALF),
        ((1, 5, 8, 2, 8), 8, "factored-per-head", {**HALO, "boundary": "mask"}, FLOAT),
        ((1, 9, 8, 1, 8), 4, "counted", {**HALO, "query_stride": (2, 2), "boundary": "zero"}, BRAIN),
        ((1, 9, 7, 1, 8), 8, "factored", {"kernel_size": (3, 2), "query_stride": (2, 4), "boundary": "shift"}, FLOAT),
        ((1, 2, 36, 1, 8), 8, None, {"kernel_size": (1, 33), "boundary": "zero"}, FLOAT),
        ((1, 9, 12, 2, 8), 8, "table", {**SHIFTED, "offset": (2, 1)}, FLOAT),
        ((1, 6, 9, 1, 8), 8, "factored", {**HALO, "offset": (1, 3), "boundary": "zero"}, FLOAT),
        ((1, 5, 5, 1, 8), 8, "table", {"kernel_size": (3, 3), "scale": -0.3}, FLOAT),
        ((1, 5, 5, 1, 8), 8, "factored", {"kernel_size": (3, 3), "scale": 0.0}, FLOAT),
    ],
    ids=[
        "plain", "dilated", "uneven", "one-window", "blocks", "halo", "halo-mask", "counted", "apart", "wide",
        "shifted", "shifted-halo", "negative-scale", "no-scale",
    ],
)  # fmt: skip
def test_small(shape, value_depth, bias, options, dtype):
    check(shape, value_depth, bias, options, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("boundary", "dtypes"),
    [
        ("shift", (FLOAT, HALF, BRAIN, FLOAT)),
        ("zero", (HALF, BRAIN, FLOAT, HALF)),
        ("mask", (BRAIN, FLOAT, HALF, BRAIN)),
    ],
    ids=["shift", "zero", "mask"],
)
@pytest.mark.parametrize("bias", [None, "table", "factored", "counted"])
def test_every_option(bias, boundary, dtypes):
    options = {"kernel_size": (4, 5), "stride": (2, 3), "boundary": boundary}
    options["query_stride" if bias == "counted" else "dilation"] = (2, 1)
    dtype = dtypes[[None, "table", "factored", "counted"].index(bias)]
    check((1, 9, 13, 2, 8), 20, bias, options, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 16, 32, 40, 64, 128, 256])
def test_depths(depth):
    check((1, 6, 6, 1, depth), max(8, depth // 2), "table", {"kernel_size": (3, 3)}, FLOAT if depth % 3 else BRAIN)


@pytest.mark.parametrize(
    ("bias", "dtype"),
    [
        pytest.param(None, FLOAT, marks=pytest.mark.slow),
        ("table", FLOAT),
        ("factored", FLOAT),
        pytest.param("factored", BRAIN, marks=pytest.mark.slow),
    ],
)
def test_other_tiles_and_wide_offsets(bias, dtype):
    """Several rows and columns of blocks, with queries that see no key of the first; several tiles and images for each
    program, 64-bit offsets."""
    choice = (4, 4, 2, 8, 4, 2)
    with (
        mock.patch.object(backend, "candidates", lambda kernel, call: (choice,)),
        mock.patch.object(triton_common, "wide", lambda *tensors: True),
        mock.patch.object(backend, "_programs", lambda *sizes: 2),
        mock.patch.object(backend, "_images", lambda *sizes: 1),
    ):
        check((2, 5, 11, 1, 8), 8, bias, {"kernel_size": (3, 5), "dilation": (1, 2)}, dtype)


@pytest.mark.slow
@pytest.mark.long
@given(calls())
@settings(max_examples=15)
def test_drawn(call):
    shape, value_depth, bias, options = call
    assume(shape[0] > 0 and shape[1] * shape[2] <= 150)
    check((min(shape[0], 2), *shape[1:]), value_depth, bias, options, FLOAT)


def test_the_same_answer_twice():
    """Bit for bit, with the tiles of the table's gradient dealt out to few programs."""
    leaves, _ = inputs((2, 6, 6, 1, 8), bias="table", dtype=BRAIN)
    leaves = [t.detach().to(DEVICE).requires_grad_(True) for t in leaves]
    first, second = (
        gradients(
            neighborhood_attention(*leaves[:3], kernel_size=3, bias=RelativePositionBias(leaves[3]), backend="triton"),
            leaves,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strides_as_they_come():
    """Views of one packed projection, channels that do not lie side by side, an expanded gradient."""
    packed = torch.randn(1, 6, 7, 3, 2, 8, device=DEVICE, requires_grad=True)
    q, k, v = packed.unbind(3)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.movedim(-1, 1).contiguous().movedim(1, -1)
    got, want = (neighborhood_attention(q, k, v, kernel_size=3, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), packed)[0] for t in (got, want)))


@pytest.mark.parametrize(("dtype", "bias"), [(FLOAT, "table"), (torch.float64, "factored")])
def test_bias_of_another_dtype(dtype, bias):
    """Beside float16 inputs a float32 bias counts with its own digits; float64 is taken as float32."""
    leaves, rule = inputs((1, 5, 6, 1, 8), bias=bias, dtype=dtype)
    leaves = [t.detach().to(DEVICE, HALF if i < 3 else dtype).requires_grad_(True) for i, t in enumerate(leaves)]
    both = []
    for name in ("triton", "reference"):
        out = neighborhood_attention(*leaves[:3], kernel_size=3, bias=rule_of(bias, leaves[3:], rule), backend=name)
        both.append(gradients(out, leaves))
    for got, want in zip(*both, strict=True):
        assert got.dtype == want.dtype
        assert relative_error(got, want) < 5e-3


@pytest.mark.parametrize("bias", ["table", "factored"])
@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
def test_float32_beside_a_bias_of_fewer_digits(bias, dtype):
    """The inputs' gradients have the digits of float32, whatever the dtype of the bias."""
    leaves, rule = inputs((1, 6, 6, 1, 8), bias=bias, dtype=dtype)
    leaves = [t.detach().to(DEVICE, FLOAT if i < 3 else dtype).requires_grad_(True) for i, t in enumerate(leaves)]
    exact = [t.detach().double().requires_grad_(True) for t in leaves]
    out = neighborhood_attention(*leaves[:3], kernel_size=3, bias=rule_of(bias, leaves[3:], rule), backend="triton")
    want = neighborhood_attention(*exact[:3], kernel_size=3, bias=rule_of(bias, exact[3:], rule), backend="reference")
    for index, (got, best) in enumerate(zip(gradients(out, leaves), gradients(want, exact), strict=True)):
        assert relative_error(got, best) < (1e-5 if index < 4 else 4 * torch.finfo(dtype).eps), index


def test_an_empty_batch():
    leaves, rule = inputs((0, 5, 5, 1, 8), bias="table")
    leaves = [t.detach().to(DEVICE).requires_grad_(True) for t in leaves]
    out = neighborhood_attention(*leaves[:3], kernel_size=3, bias=rule_of("table", leaves[3:], rule), backend="triton")
    assert out.shape == (0, 5, 5, 1, 8)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert grads[0].shape == (0, 5, 5, 1, 8) and not grads[3].any()


# ------------------------------------------------------------------------------------------------- as an operation


def arguments(bias, **options):
    leaves, _ = inputs((1, 5, 6, 1, 8), bias=bias, **options)
    leaves = [t.detach().to(DEVICE).requires_grad_(True) for t in leaves]
    return leaves, (*leaves, None, None)[:5]


@pytest.mark.parametrize("bias", [None, "table", "factored"])
def test_the_operation_is_as_it_says(bias):
    _, tensors = arguments(bias)
    window = backend.window_list(Window(3), Window(3))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backend.attention, (*tensors, window, 0.3), test_utils=tests)
    if bias != "factored":
        return
    out, lse = backend.attention(*tensors, window, 0.3)
    held = [None if t is None else t.detach() for t in tensors]
    call = (torch.randn_like(out), *held, out.detach(), lse.detach(), window, 0.3, True)
    torch.library.opcheck(backend.attention_backward, call, test_utils=("test_schema", "test_faketensor"))


def test_compiles_to_one_node():
    leaves, _ = arguments("table")

    def call(q, k, v, table):
        return neighborhood_attention(q, k, v, kernel_size=3, bias=RelativePositionBias(table), backend="triton")

    want = gradients(call(*leaves), leaves)
    got = gradients(torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_it_cannot_do_it_says():
    (q, k, v, table), _ = arguments("table")

    def call(q):
        return neighborhood_attention(q, k, v, kernel_size=3, bias=RelativePositionBias(table), backend="triton")

    (first,) = torch.autograd.grad(call(q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(first.sum(), q)
    with pytest.raises(BackendError, match=r"torch\.func"):
        torch.func.vmap(call)(torch.stack([q, q]))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
def test_a_cuda_graph_holds_it():
    leaves, _ = arguments("table")

    def step():
        out = neighborhood_attention(*leaves[:3], kernel_size=3, bias=RelativePositionBias(leaves[3]), backend="triton")
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    want, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------------------------------------ the window rule


@triton.jit
def _rule(
    out, length, K: tl.constexpr, S: tl.constexpr, N: tl.constexpr, SHIFT: tl.constexpr, C: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    x = tl.arange(0, 32)
    tl.store(out + x, triton_common.window_start(x, length, K, S, N, SHIFT, AHEAD))
    tl.store(out + 32 + x, triton_common.first_query(x, length, K, S, N, SHIFT, AHEAD))
    tl.store(out + 64 + x, triton_common.last_query(x, length, K, S, N, SHIFT, AHEAD))
    tl.store(out + 96 + x, triton_common.table_index(x, S, N, C))


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 6, 7])
def test_the_window_rule_on_the_device(kernel_size):
    for stride in range(1, kernel_size + 1):
        for apart in (1, 2, 3, 5):
            offsets = [("zero", o) for o in range(1, stride) if apart == 1]
            for boundary, offset in [("shift", 0), ("zero", 0), *offsets]:
                length = 3 * kernel_size if stride % 2 else kernel_size + 1
                counted = stride % apart == 0 and apart > 1
                window = Window(kernel_size, stride, 1, boundary, apart, counted, offset)
                out = torch.zeros(4, 32, dtype=torch.int32, device=DEVICE)
                _rule[(1,)](out, length, kernel_size, stride, apart, boundary == "shift", window.counted, window.ahead)
                starts, first, last, index = out.tolist()
                queries = range(window.queries(length))
                assert starts[: len(queries)] == [window.start(q, length) for q in queries]
                rows = window.table_row(torch.zeros(1, dtype=torch.int64), torch.arange(len(queries)))
                assert index[: len(queries)] == (kernel_size - 1 - rows).tolist()
                for key in range(length):
                    seeing = [q for q in queries if 0 <= key - window.start(q, length) < kernel_size]
                    assert not seeing or (first[key], last[key]) == (seeing[0], seeing[-1])
                    assert seeing or first[key] > last[key]
