"""`recording`: every call is reported, in its own thread, and costs nothing where it is traced. FLOP counters."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foveal.kernels import (
    BackendError,
    DecomposedRelativePositionBias,
    RelativePositionBias,
    backend,
    neighborhood_aggregate,
    neighborhood_attention,
    neighborhood_mix,
    recording,
)
from foveal.kernels.aggregate.api import neighborhood_logits
from foveal.kernels.neighborhood import triton
from foveal.kernels.window import Window

Q = torch.randn(2, 9, 8, 2, 4)
LOGITS = torch.randn(2, 9, 8, 2, 15)
TABLE = torch.randn(2, 5, 5)
EMBEDDINGS = torch.randn(2, 9, 4)


def operations(q=Q, logits=LOGITS, table=TABLE, embeddings=EMBEDDINGS):
    yield lambda: neighborhood_attention(q, q, q[..., :3], kernel_size=3)
    yield lambda: neighborhood_attention(q, q, q, kernel_size=3, bias=RelativePositionBias(table))
    yield lambda: neighborhood_attention(
        q[:, ::2, ::2],
        q,
        q,
        kernel_size=5,
        stride=2,
        query_stride=2,
        boundary="mask",
        bias=DecomposedRelativePositionBias(*embeddings),
    )
    yield lambda: neighborhood_aggregate(logits, q, kernel_size=(3, 5), boundary="zero")
    yield lambda: neighborhood_mix(logits, q, kernel_size=(3, 5))
    yield lambda: neighborhood_logits(q, q[:], kernel_size=3, dilation=2)


def test_what_is_reported():
    calls = []
    with recording(calls.append):
        outs = [operation() for operation in operations()]
    assert [call.operation.removeprefix("neighborhood_") for call in calls] == [
        "attention", "attention", "attention", "aggregate", "mix", "logits"
    ]  # fmt: skip
    assert [call.problem.bias for call in calls[:3]] == [None, RelativePositionBias, DecomposedRelativePositionBias]
    assert [call.problem.rows.kernel_size for call in calls] == [3, 3, 5, 3, 3, 3]
    assert {call.backend for call in calls} == {"tiled"}
    for call, out in zip(calls, outs, strict=True):
        assert call.problem.shape == (2, 9, 8, 2, 4) and call.tensors[1].shape[:3] == (2, 9, 8)
        assert (call.empty_output().shape, call.empty_output().dtype) == (out.shape, out.dtype)
    neighborhood_attention(Q, Q, Q, kernel_size=3)
    assert len(calls) == 6


def test_recording_changes_nothing_in_the_output():
    for operation in operations():
        with recording(lambda call: None):
            out = operation()
        assert torch.equal(out, operation())


def test_an_output_of_its_own_takes_the_place_of_the_backend():
    with backend("triton"):  # which has none here
        with recording(lambda call: call.empty_output().fill_(7)):
            assert neighborhood_attention(Q, Q, Q, kernel_size=3).unique().tolist() == [7]
        calls = []
        with recording(calls.append), pytest.raises(BackendError, match="triton"):
            neighborhood_attention(Q, Q, Q, kernel_size=3)
        with pytest.raises(BackendError, match="triton"):
            _ = calls[0].backend


def test_blocks_nest_and_end_with_an_error():
    inner, outer = [], []
    with recording(outer.append):
        with pytest.raises(KeyError), recording(inner.append):
            neighborhood_attention(Q, Q, Q, kernel_size=3)
            raise KeyError
        neighborhood_attention(Q, Q, Q, kernel_size=3)
    assert (len(inner), len(outer)) == (1, 2)


def test_each_thread_records_its_own_calls():
    mine, others = [], []

    def work():
        neighborhood_attention(Q, Q, Q, kernel_size=5)
        with recording(others.append):
            neighborhood_attention(Q, Q, Q, kernel_size=7)

    with recording(mine.append):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        neighborhood_attention(Q, Q, Q, kernel_size=3)
    assert [call.problem.kernel_size for call in mine] == [(3, 3)]
    assert [call.problem.kernel_size for call in others] == [(7, 7)]


def test_a_compiled_graph_stays_whole_and_is_not_recorded():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: neighborhood_attention(q, q, q, kernel_size=3), fullgraph=True, backend="eager")
    calls = []
    with recording(calls.append):
        out = compiled(Q)
    assert calls == []
    torch.testing.assert_close(out, neighborhood_attention(Q, Q, Q, kernel_size=3))


def test_under_the_transforms_of_torch_func():
    calls = []
    with recording(calls.append):
        out = torch.vmap(lambda q: neighborhood_attention(q, q, q, kernel_size=3))(Q[:, None])
    assert [call.problem.shape for call in calls] == [(1, 9, 8, 2, 4)]
    torch.testing.assert_close(out[:, 0], neighborhood_attention(Q, Q, Q, kernel_size=3))


# ---- torch.utils.flop_counter

QUERIES = 2 * 9 * 8 * 2  # over images and heads
# multiply-accumulates of the forward and of the backward pass
MACS = (
    (QUERIES * 9 * (4 + 3), QUERIES * 9 * (3 * 4 + 2 * 3)),
    (QUERIES * 9 * 8, QUERIES * 9 * 20),
    (2 * 5 * 4 * 2 * 25 * 8, 2 * 5 * 4 * 2 * 25 * 20),
    (QUERIES * 15 * 4, QUERIES * 15 * 8),
    (QUERIES * 15 * 4, QUERIES * 15 * 8),
    (QUERIES * 9 * 4, QUERIES * 9 * 8),
)


@pytest.mark.parametrize("name", ["reference", "tiled", "dynamic"])
def test_a_flop_counter_counts_the_definition(name):
    leaves = [t.clone().requires_grad_(True) for t in (Q, LOGITS, TABLE, EMBEDDINGS)]
    with backend(name):
        for operation, macs in zip(operations(*leaves), MACS, strict=True):
            want = operation()
            used = [t for t in leaves if t in _leaves(want)]
            gradients = torch.autograd.grad(want.square().sum(), used)
            with FlopCounterMode(display=False) as forward:
                out = operation()
            loss = out.square().sum()
            with FlopCounterMode(display=False) as backward:
                got = torch.autograd.grad(loss, used)
            assert (forward.get_total_flops() // 2, backward.get_total_flops() // 2) == macs
            torch.testing.assert_close(out, want)
            torch.testing.assert_close(got, gradients)


def _leaves(out: torch.Tensor) -> set:
    """Leaf tensors that a gradient reaches."""
    nodes, found = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        found |= {node.variable} if hasattr(node, "variable") else set()
        nodes += [each for each, _ in node.next_functions if each is not None]
    return found


def test_the_operators_have_the_same_formulas():
    """With their shapes alone: the fakes of the operators that `native`, `triton`, `natten` and compiled code call."""
    q, logits, table = (t.to("meta") for t in (Q, LOGITS, TABLE))
    lse, window, ops = q[..., 0], triton.window_list(Window(3), Window(3)), torch.ops.foveal
    attention, mix = (q, q, q, table, None), (logits, q, None, None)
    calls = [
        (ops.neighborhood_attention, (*attention, window, 1.0), MACS[1][0]),
        (ops.neighborhood_attention_backward, (q, *attention, q, lse, window, 1.0, True), MACS[1][1]),
        (ops.tiled_attention, (*attention, window, 1.0), MACS[1][0]),
        (ops.tiled_attention_backward, (q, *attention, window, 1.0, True), MACS[1][1]),
        (ops.tiled_product, ("dots", q, q, window), MACS[5][0]),
        (ops.native_attention, (*attention, window, 1.0), MACS[1][0]),
        (ops.native_attention_backward, (q, *attention, window, 1.0, True), MACS[1][1]),
        (ops.natten_na2d, (q, q, q, [3] * 2 + [1] * 4, 1.0), MACS[1][0]),
        (ops.natten_na2d_backward, (q, q, q, q, [3] * 2 + [1] * 4, 1.0), MACS[1][1]),
        (ops.aggregate_apply, (logits, q, [3, 5, 1, 1], "zero"), MACS[3][0]),
        (ops.aggregate_spread, (logits, q, [3, 5, 1, 1], "zero"), MACS[3][0]),
        (ops.aggregate_dots, (q, q, [3, 3, 2, 2], "shift"), MACS[5][0]),
        (ops.aggregate_mix, (*mix, [3, 5, 1, 1], "shift"), MACS[4][0]),
        (ops.aggregate_mix_backward, (q, *mix, q, lse, [3, 5, 1, 1], "shift"), MACS[4][1]),
    ]
    for operator, arguments, macs in calls:
        with FlopCounterMode(display=False) as counter:
            operator(*arguments)
        assert counter.get_total_flops() // 2 == macs, operator


def test_a_flop_counter_counts_pytorch_s_attention_on_a_cpu():
    """The forward pass as its products, the backward pass as that of its kernels for GPUs."""
    q, k, v = (torch.randn(2, 3, length, depth, requires_grad=True) for length, depth in ((5, 8), (7, 8), (7, 8)))
    counted = []
    for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kind), FlopCounterMode(display=False) as counter:
            out = F.scaled_dot_product_attention(q, k, v)
        counted.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counted.append(counter.get_total_flops())
    products = 2 * 2 * 3 * 5 * 7 * 8
    assert counted == [2 * products, 5 * products, 2 * products, 4 * products]


def test_a_flop_counter_with_dropout():
    """The random numbers are those of a call without a counter, which counts the backend's own products."""
    outs = []
    for counter in (FlopCounterMode(display=False), nullcontext()):
        torch.manual_seed(0)
        with counter:
            outs.append(neighborhood_attention(Q, Q, Q, kernel_size=3, dropout_p=0.5))
    assert torch.equal(*outs)
