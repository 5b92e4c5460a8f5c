"""The sweep of the Triton kernels of aggregation. ``test_triton_aggregate.py`` runs this file in a process of its own,
under Triton's interpreter, which has to be chosen before a kernel is defined; on a GPU it runs as it is.
"""

from functools import partial

import numpy as np
import pytest
import torch
import triton.language as tl

from foveal.kernels import BackendError, RelativePositionBias, neighborhood_aggregate, neighborhood_mix
from foveal.kernels.aggregate import triton as backend
from foveal.kernels.aggregate.api import neighborhood_logits
from foveal.kernels.aggregate.softmax import expand_table
from foveal.kernels.window import Window

from .test_mix import leaves_of, with_gradients
from .test_neighborhood import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch):
    """The interpreter multiplies the bits of bfloat16, which it keeps as integers, and cuts where a GPU rounds."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def rounded(self, x, to):
        if x.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, x, to)
        nearest = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(nearest, tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)

    def as_float32(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: original(self, as_float32(a), as_float32(b), *rest)
    )


# size, kernel_size, dilation, depth, batch: odd and even windows, rows that differ from columns, dilations that do not
# divide the map, windows as large as the map, more than one tile, depths that are no power of two
CASES = {
    "h5w6-k3": ((5, 6), (3, 3), (1, 1), 5, 2),
    "h5w6-k4x3-d1x2": ((5, 6), (4, 3), (1, 2), 3, 1),
    "h5w5-k5": ((5, 5), (5, 5), (1, 1), 16, 1),
    "h7w4-k2x1-d3x1": ((7, 4), (2, 1), (3, 1), 20, 1),
    "h7w9-k3": ((7, 9), (3, 3), (1, 1), 1, 1),
    "h12w12-k5": ((12, 12), (5, 5), (1, 1), 8, 1),  # queries without a key in the first block
}
ODD = list(CASES)[:2]


def gathered(v, windows):
    """The keys of every query, ``[B, H, W, K, N, D]``, zeros outside the map, and whether they are inside."""
    (rows, row_in, _), (columns, column_in, _) = (
        window.keys(length, v.device) for window, length in zip(windows, v.shape[1:3], strict=True)
    )
    inside = (row_in[:, None, :, None] & column_in[None, :, None, :]).flatten(2)
    near = v[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4)
    return near.masked_fill(~inside[..., None, None], 0.0), inside


def eager(weights, v, table=None, kernel_bias=None, *, mix, kernel_size, dilation, boundary):
    """As one would write it in PyTorch, all of it in the dtype of the inputs."""
    windows = [Window(k, 1, d, boundary) for k, d in zip(kernel_size, dilation, strict=True)]
    near, inside = gathered(v, windows)
    if mix:
        weights = weights + expand_table(table, *windows, v.shape[1:3]).permute(1, 2, 0, 3) + kernel_bias
        if boundary == "mask":
            weights = weights.masked_fill(~inside[:, :, None], float("-inf"))
        weights = weights.softmax(-1)
    return torch.einsum("bhwnk,bhwknd->bhwnd", weights, near)


def run(name, *tensors, mix, **options):
    if name == "eager":
        return eager(*tensors, mix=mix, **options)
    if not mix:
        return neighborhood_aggregate(*tensors[:2], backend=name, **options)
    logits, v, table, kernel_bias = tensors
    return neighborhood_mix(
        logits, v, bias=RelativePositionBias(table), kernel_bias=kernel_bias, backend=name, **options
    )


def compare(case, dtype, boundary, mix):
    """Triton beside eager PyTorch in the same dtype, both beside float64."""
    size, kernel_size, dilation, depth, batch = CASES[case]
    leaves = leaves_of(size, kernel_size, depth=depth, batch=batch)[: 4 if mix else 2]
    low = [t.detach().to(DEVICE, dtype).requires_grad_(True) for t in leaves]
    high = [t.detach().double().requires_grad_(True) for t in low]
    options = {"mix": mix, "kernel_size": kernel_size, "dilation": dilation, "boundary": boundary}
    exact = with_gradients(partial(run, "reference", **options), high)
    peer = with_gradients(partial(run, "eager", **options), low)
    got = with_gradients(partial(run, "triton", **options), low)
    # of the value itself; and of what is summed in float32 to it, where that cancels
    floor, terms = 8 * torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps * max(map(largest, exact))
    for index, (a, b, c) in enumerate(zip(got, peer, exact, strict=True)):
        assert a.dtype == dtype
        limit = max((3 if index else 2) * relative_error(b, c), floor) + terms / max(largest(c), 1e-30)
        assert relative_error(a, c) <= limit, index


def largest(t):
    return float(t.detach().abs().max())


@pytest.mark.parametrize(
    ("case", "boundary"), [*((case, "shift") for case in CASES), *((case, "zero") for case in ODD)]
)
def test_aggregate(case, boundary):
    compare(case, torch.float32, boundary, mix=False)


@pytest.mark.parametrize(
    ("case", "boundary"),
    [*((case, boundary) for case in ODD for boundary in ("shift", "zero", "mask")), ("h12w12-k5", "shift")],
)
def test_mix(case, boundary):
    compare(case, torch.float32, boundary, mix=True)


@pytest.mark.parametrize("mix", [False, True], ids=["aggregate", "mix"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_eager(dtype, mix):
    compare("h5w6-k3", dtype, "shift", mix)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "mix"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)],
    ids=["bfloat16-aggregate", "bfloat16-mix", "float32-mix"],
)
@pytest.mark.parametrize("boundary", ["shift", "zero", "mask"])
@pytest.mark.parametrize("case", CASES)
def test_everything(case, boundary, mix, dtype):
    compare(case, dtype, boundary, mix)


def test_the_same_answer_twice():
    leaves = [t.detach().to(DEVICE, torch.float32).requires_grad_(True) for t in leaves_of((5, 6), (3, 3))]
    options = {"mix": True, "kernel_size": (3, 3), "dilation": (1, 1), "boundary": "shift"}
    first, second = (with_gradients(partial(run, "triton", **options), leaves) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_any_strides():
    """Heads before positions, channels before positions, expanded batches: what models hand over, and not."""
    weights, v = (t.detach().to(DEVICE, torch.float32) for t in leaves_of((5, 6), (3, 3))[:2])
    want = neighborhood_aggregate(weights, v, kernel_size=3, backend="triton")
    heads_first = weights.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    channels_first = v.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    keys_first = weights.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    for a, b in ((heads_first, v), (weights, channels_first), (keys_first, v)):
        assert torch.equal(neighborhood_aggregate(a, b, kernel_size=3, backend="triton"), want)
    got = neighborhood_aggregate(weights[:1].expand(2, -1, -1, -1, -1), v, kernel_size=3, backend="triton")
    assert torch.equal(got[0], want[0])


def test_derivatives_of_every_order():
    """The second derivative of the aggregation, and the logits of ``na2d_qk`` with theirs."""
    weights, v = (t.detach().to(DEVICE, torch.float32).requires_grad_(True) for t in leaves_of((3, 4), (3, 2))[:2])

    def second(name):
        out = neighborhood_aggregate(weights, v, kernel_size=(3, 2), backend=name)
        first = torch.autograd.grad(out.square().sum(), [weights, v], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [weights, v])

    def logits(name):
        out = neighborhood_logits(v, v.flip(1), kernel_size=(3, 2), backend=name)
        return [out, *torch.autograd.grad(out.square().sum(), [v])]

    for function in (second, logits):
        for a, b in zip(function("triton"), function("reference"), strict=True):
            assert relative_error(a, b) < 1e-5


def test_an_empty_batch():
    leaves = [t.detach().to(DEVICE, torch.float32) for t in leaves_of((3, 3), (3, 3), batch=0)]
    leaves = [t.requires_grad_(True) for t in leaves]
    options = {"mix": True, "kernel_size": (3, 3), "dilation": (1, 1), "boundary": "shift"}
    out = run("triton", *leaves, **options)
    assert out.shape == (0, 3, 3, 2, 3)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(bool((g == 0).all()) for g in gradients[2:])


def test_the_operations_keep_their_promises():
    """Schemas, fakes and gradients, as compilers rely on them."""
    weights, v, table, kernel_bias = (
        t.detach().to(DEVICE, torch.float32).requires_grad_(True) for t in leaves_of((3, 3), (3, 3), batch=1)
    )
    window = [3, 3, 1, 1]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operation in (backend._apply, backend._spread):
        torch.library.opcheck(operation, (weights, v, window, "shift"), test_utils=checks)
    torch.library.opcheck(backend._dots, (v, v, window, "shift"), test_utils=checks)
    torch.library.opcheck(backend._mix, (weights, v, table, kernel_bias, window, "mask"), test_utils=checks)
    torch.library.opcheck(backend._mix, (weights, v, None, None, window, "mask"), test_utils=checks)


@pytest.mark.slow
def test_compiled_without_a_break():
    leaves = [t.detach().to(DEVICE, torch.float32).requires_grad_(True) for t in leaves_of((3, 3), (3, 3), batch=1)]

    def call(logits, v, table, kernel_bias):
        out = neighborhood_mix(
            2 * logits, v, kernel_size=3, bias=RelativePositionBias(table), kernel_bias=kernel_bias, backend="triton"
        )
        return neighborhood_aggregate(logits, out, kernel_size=3, backend="triton").sin()

    got = with_gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), leaves)
    for a, b in zip(got, with_gradients(call, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(1, 3, 3, 1, 300), "256.*300"),
        (torch.ones(1, 3, 3, 1, 4, dtype=torch.float64), "float32.*float64"),
    ],
)
def test_what_it_cannot_run_is_an_error_by_name_and_runs_elsewhere_without(tensor, reason):
    v = tensor.to(DEVICE)
    weights = torch.full((1, 3, 3, 1, 9), 1 / 9, dtype=v.dtype, device=v.device)
    with pytest.raises(BackendError, match=reason):
        neighborhood_aggregate(weights, v, kernel_size=3, backend="triton")
    torch.testing.assert_close(neighborhood_aggregate(weights, v, kernel_size=3), v)
    torch.testing.assert_close(neighborhood_mix(weights, v, kernel_size=3), v)
