"""`recording`: every call is reported, in its own thread, and costs nothing where it is traced."""

from __future__ import annotations

import threading

import pytest
import torch

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

Q = torch.randn(2, 9, 8, 2, 4)
LOGITS = torch.randn(2, 9, 8, 2, 15)
TABLE = torch.randn(2, 5, 5)
EMBEDDINGS = torch.randn(2, 9, 4)


def operations():
    yield lambda: neighborhood_attention(Q, Q, Q[..., :3], kernel_size=3)
    yield lambda: neighborhood_attention(Q, Q, Q, kernel_size=3, bias=RelativePositionBias(TABLE))
    yield lambda: neighborhood_attention(
        Q[:, ::2, ::2],
        Q,
        Q,
        kernel_size=5,
        stride=2,
        query_stride=2,
        boundary="mask",
        bias=DecomposedRelativePositionBias(*EMBEDDINGS),
    )
    yield lambda: neighborhood_aggregate(LOGITS, Q, kernel_size=(3, 5), boundary="zero")
    yield lambda: neighborhood_mix(LOGITS, Q, kernel_size=(3, 5))
    yield lambda: neighborhood_logits(Q, Q[:], kernel_size=3, dilation=2)


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
