"""neighborhood_attention: reference against slow loops, tiled against reference, both against NATTEN."""

import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foveal import kernels
from foveal.kernels import (
    BackendError,
    DecomposedRelativePositionBias,
    RelativePositionBias,
    TensorCache,
    backend,
    cache,
    dispatch,
    neighborhood_aggregate,
    neighborhood_attention,
    tiling,
)
from foveal.kernels.cache import CONSTANTS
from foveal.kernels.neighborhood import native, tiled
from foveal.kernels.neighborhood import natten as natten_backend
from foveal.kernels.tracing import for_other_runtimes

from . import naive

NATTEN = natten_backend.installed_version()
needs_natten = pytest.mark.skipif(NATTEN is None, reason="natten is not installed (make test installs it)")
CXX = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler: neither CXX nor g++")
FUSED = pytest.param("native", marks=needs_compiler)


def inputs(
    shape, value_depth=None, kernel_size=(3, 3), bias=None, dtype=torch.float32, seed=0, query_stride=(1, 1), **_
):
    """(leaves, bias object): q, k, v and the bias tensors as leaves that want gradients; ``shape`` is that of k."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)

    queries = (-(-length // step) for length, step in zip(shape[1:3], query_stride, strict=True))
    leaves = [leaf(shape[0], *queries, *shape[3:]), leaf(*shape), leaf(*shape[:4], value_depth or shape[4])]
    rows, columns = (2 * k - 1 for k in kernel_size)
    if bias == "table":
        leaves.append(leaf(shape[3], rows, columns))
        return leaves, RelativePositionBias(leaves[3])
    if bias in ("factored", "counted"):
        leaves += [leaf(rows, shape[4]), leaf(columns, shape[4])]
        return leaves, DecomposedRelativePositionBias(leaves[3], leaves[4], counted=bias == "counted")
    if bias == "factored-per-head":
        leaves += [leaf(shape[3], rows, shape[4]), leaf(shape[3], columns, shape[4])]
        return leaves, DecomposedRelativePositionBias(leaves[3], leaves[4])
    return leaves, None


def output_gradient(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def with_gradients(leaves, bias, name, rounded=None, **options):
    """Output and the gradients of all leaves, for a gradient of the output that was ``rounded`` to that dtype."""
    out = neighborhood_attention(*leaves[:3], bias=bias, backend=name, **options)
    weight = output_gradient(out.shape, rounded or out.dtype).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weight)]


def relative_error(got, want):
    """Largest difference over the largest value; NaN and infinity count as wrong."""
    assert got.shape == want.shape
    if got.numel() == 0:
        return 0.0
    assert torch.isfinite(got).all()
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))


# ------------------------------------------------------------------------------- the reference against loops


@pytest.mark.parametrize("boundary", ["shift", "zero", "mask"])
@pytest.mark.parametrize("bias", [None, "table", "factored"])
@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation"),
    [((7, 6), (3, 3), (1, 1), (1, 1)), ((9, 7), (4, 3), (2, 3), (2, 1)), ((7, 11), (3, 2), (1, 2), (2, 3))],
    ids=["h7w6-k3", "h9w7-k4x3-s2x3-d2x1", "h7w11-k3x2-s1x2-d2x3"],
)
@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_against_loops(name, size, kernel_size, stride, dilation, bias, boundary):
    leaves, rule = inputs((2, *size, 2, 4), 3, kernel_size, bias, torch.float64)
    options = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "boundary": boundary}
    got = neighborhood_attention(*leaves[:3], bias=rule, backend=name, **options)
    with torch.no_grad():
        want = naive.attention(
            *leaves[:3],
            **options,
            table=leaves[3] if bias == "table" else None,
            factors=leaves[3:] if bias == "factored" else None,
        )
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("boundary", ["shift", "zero", "mask"])
@pytest.mark.parametrize("bias", [None, "table", "factored", "counted"])
@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "query_stride"),
    [
        ((9, 6), (3, 3), (1, 1), (2, 3)),
        ((9, 7), (4, 5), (4, 2), (2, 2)),
        ((5, 9), (4, 1), (3, 1), (3, 4)),
        ((3, 4), (6, 6), (4, 4), (2, 1)),
    ],
    ids=["s1", "s4x2", "apart", "one-window"],
)
@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_strided_queries_against_loops(name, size, kernel_size, stride, query_stride, bias, boundary):
    if bias == "counted" and any(s % n for s, n in zip(stride, query_stride, strict=True)):
        stride = kernel_size = tuple(n * s for n, s in zip(query_stride, (1, 2), strict=True))
    if boundary == "shift":
        size = tuple(max(length, k) for length, k in zip(size, kernel_size, strict=True))
    options = {"kernel_size": kernel_size, "stride": stride, "query_stride": query_stride, "boundary": boundary}
    leaves, rule = inputs((2, *size, 2, 4), 3, bias=bias, dtype=torch.float64, **options)
    got = neighborhood_attention(*leaves[:3], bias=rule, backend=name, **options)
    with torch.no_grad():
        want = naive.attention(
            *leaves[:3],
            **options,
            dilation=(1, 1),
            table=leaves[3] if bias == "table" else None,
            factors=leaves[3:] if bias in ("factored", "counted") else None,
            counted=bias == "counted",
        )
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("boundary", ["zero", "mask"])
@pytest.mark.parametrize("bias", [None, "table", "factored"])
@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation", "offset"),
    [
        ((8, 7), (4, 3), (4, 3), (1, 1), (2, 1)),
        ((3, 9), (4, 5), (4, 2), (1, 1), (1, 1)),
        ((9, 11), (2, 4), (2, 3), (2, 3), (1, 2)),
    ],
    ids=["blocks", "halo", "dilated"],
)
@pytest.mark.parametrize("name", ["reference", "tiled", "dynamic"])
def test_offsets_against_loops(name, size, kernel_size, stride, dilation, offset, bias, boundary):
    leaves, rule = inputs((2, *size, 2, 4), 3, kernel_size, bias, torch.float64)
    options = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "boundary": boundary}
    with torch.no_grad():
        want = naive.attention(
            *leaves[:3],
            **options,
            offset=offset,
            table=leaves[3] if bias == "table" else None,
            factors=leaves[3:] if bias == "factored" else None,
        )
    for moved in (0, -3):  # an offset counts modulo the stride
        options["offset"] = tuple(o + moved * s for o, s in zip(offset, stride, strict=True))
        got = neighborhood_attention(*leaves[:3], bias=rule, backend=name, **options)
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("name", ["reference", "tiled", "dynamic"])
@pytest.mark.parametrize(("size", "kernel_size", "shift"), [((14, 21), (7, 7), (3, 5)), ((8, 5), (4, 5), (2, 0))])
def test_shifted_windows_of_swin(name, size, kernel_size, shift):
    """Blocks with an offset are windows of the rolled map, in which regions that were apart do not see each other."""
    leaves, rule = inputs((2, *size, 2, 8), 5, kernel_size, "table", torch.float64)
    options = {"kernel_size": kernel_size, "stride": kernel_size, "boundary": "mask"}
    got = with_gradients(leaves, rule, name, offset=shift, **options)

    def windows(t, dim=1):  # [B, H, W, ...] rolled -> [B * windows, K * K, ...]
        t = torch.roll(t, (-shift[0], -shift[1]), (dim, dim + 1))
        (k, k2), tail = kernel_size, t.shape[dim + 2 :]
        t = t.unflatten(dim + 1, (-1, k2)).unflatten(dim, (-1, k)).transpose(dim + 1, dim + 2)
        return t.reshape(-1, k * k2, *tail)

    row, column = ((torch.arange(n) < s).long() for n, s in zip(size, shift, strict=True))  # wraps around
    region = windows((2 * row[:, None] + column)[None])  # windows, K * K
    q, k, v = (windows(t) for t in leaves[:3])
    logits = torch.einsum("bqnd,bknd->bnqk", q, k) * 8**-0.5
    at = torch.cartesian_prod(*map(torch.arange, kernel_size))
    entry = at[None] - at[:, None] + torch.tensor(kernel_size) - 1
    logits = logits + leaves[3][:, entry[..., 0], entry[..., 1]]
    apart = (region[:, None] != region[:, :, None]).repeat(2, 1, 1)[:, None]
    out = torch.einsum("bnqk,bknd->bqnd", logits.masked_fill(apart, float("-inf")).softmax(-1), v)
    rows, columns = (n // k for n, k in zip(size, kernel_size, strict=True))
    out = out.view(2, rows, columns, *kernel_size, 2, 5).transpose(2, 3).reshape(2, *size, 2, 5)
    out = torch.roll(out, shift, (1, 2))
    want = [out, *torch.autograd.grad(out, leaves, output_gradient(out.shape, out.dtype))]
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("bias", [None, "table", "factored"])
def test_strided_queries_are_some_of_all(name, bias):
    options = {"kernel_size": (7, 6), "stride": (4, 3), "boundary": "mask", "backend": name}
    (q, *rest), rule = inputs((2, 15, 16, 2, 8), 5, options["kernel_size"], bias)
    want = neighborhood_attention(q, *rest[:2], bias=rule, **options)[:, ::2, ::3]
    got = neighborhood_attention(q[:, ::2, ::3], *rest[:2], bias=rule, query_stride=(2, 3), **options)
    weight = torch.randn_like(want)
    for a, b in zip(
        [got, *torch.autograd.grad(got, [q, *rest], weight)],
        [want, *torch.autograd.grad(want, [q, *rest], weight)],
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5


# ------------------------------------------------------------------------------ tiled against the reference


@st.composite
def calls(draw):
    """Options of a call, its map and its bias: any sizes that the rule allows."""
    boundary = draw(st.sampled_from(["shift", "shift", "zero", "mask"]))
    options: dict = {"kernel_size": [], "stride": [], "dilation": [], "boundary": boundary}
    bias = draw(st.sampled_from([None, "table", "table", "factored", "factored-per-head", "counted"]))
    strided = bias == "counted" or draw(st.booleans())
    if strided:
        options["query_stride"] = []
    size = []
    for _ in range(2):
        kernel_size = draw(st.integers(1, 8))
        stride = draw(st.integers(1, kernel_size))
        dilation = 1 if strided else draw(st.integers(1, 4))
        if strided:
            allowed = [n for n in range(1, 5) if bias != "counted" or stride % n == 0]
            options["query_stride"].append(draw(st.sampled_from(allowed)))
        shortest = kernel_size * dilation if boundary == "shift" else 1
        options["kernel_size"].append(kernel_size)
        options["stride"].append(stride)
        options["dilation"].append(dilation)
        size.append(draw(st.integers(shortest, max(shortest, 14) + draw(st.sampled_from([0, 0, 5, 17])))))
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if boundary != "shift" and not strided and draw(st.booleans()):
        options["offset"] = tuple(draw(st.integers(0, stride - 1)) for stride in options["stride"])
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, 0.3, 1.0, -0.5]))
    shape = (draw(st.integers(0, 3)), *size, draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 7])))
    return shape, draw(st.sampled_from([1, 5, 8])), bias, options


@given(calls(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([tiling.CHUNK, 64, 3000]))
@settings(max_examples=400)
def test_tiled_equals_reference(call, dtype, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "CHUNK", chunk)  # small chunks: several slices of batch, groups and tile rows
        equals_reference(call, dtype, "tiled")


@needs_compiler
@given(calls())
@settings(max_examples=80)
def test_native_equals_reference(call):
    equals_reference(call, torch.float32, "native")


def equals_reference(call, dtype, name):
    shape, value_depth, bias, options = call
    leaves, rule = inputs(shape, value_depth, bias=bias, dtype=dtype, **options)
    got = with_gradients(leaves, rule, name, **options)
    exact = [t.detach().double().requires_grad_(True) for t in leaves]
    if bias is not None:
        rule = (
            RelativePositionBias(exact[3])
            if bias == "table"
            else DecomposedRelativePositionBias(*exact[3:], counted=rule.counted)
        )
    want = with_gradients(exact, rule, "reference", rounded=dtype, **options)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    rounding = 8 * torch.finfo(dtype).eps * largest_term(exact, want, dtype) if shape[0] else 0
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype and a.shape == b.shape
        if b.numel():
            a, b = a.detach().double(), b.detach()
            assert float((a - b).abs().max()) <= limit * float(b.abs().max()) + rounding, index


def largest_term(leaves, results, dtype):
    """How large the terms are that the gradients sum up, before they cancel.

    The gradient of a logit is its weight times the difference of two products of values with the output's gradient;
    where one weight is nearly 1 these are nearly alike. It is multiplied by queries, keys and factors.
    """
    sizes = [float(t.detach().abs().max()) for t in (*leaves, *results)]
    grad = output_gradient(results[0].shape, dtype).double()
    products = float(grad.norm(dim=-1).max() * leaves[2].detach().norm(dim=-1).max())
    factors = max(float(t.detach().abs().max()) for t in (*leaves[:2], *leaves[3:]))
    return max(*sizes, products * max(1.0, factors))


@given(calls())
@settings(max_examples=100)
def test_all_at_once_equals_chunk_by_chunk(call):
    """The form that compilers and exporters see, run eagerly (a tensor subclass takes it), against the chunked one."""

    class Plain(torch.Tensor):
        pass

    shape, value_depth, bias, options = call
    assume(shape[0] > 0)  # there the fused operator cuts the bias off the graph, which is as good as its zero gradient
    leaves, rule = inputs(shape, value_depth, bias=bias, dtype=torch.float64, **options)
    want = with_gradients(leaves, rule, "tiled", **options)
    plain = [t.detach().as_subclass(Plain).requires_grad_(True) for t in leaves]
    plain_rule = rule
    if rule is not None:
        plain_rule = (
            RelativePositionBias(*plain[3:])
            if bias == "table"
            else DecomposedRelativePositionBias(*plain[3:], counted=rule.counted)
        )
    got = with_gradients(plain, plain_rule, "tiled", **options)
    scale = max((float(t.detach().abs().max()) for t in want if t.numel()), default=1.0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.detach().as_subclass(torch.Tensor), b.detach(), atol=1e-11 * scale, rtol=1e-10)


DINAT_LAYERS = [(56, 2, 1), (56, 2, 8), (28, 4, 4), (14, 8, 2), (7, 16, 1)]


@pytest.mark.parametrize("name", ["tiled", FUSED])
@pytest.mark.parametrize(("size", "heads", "dilation"), DINAT_LAYERS, ids=lambda x: str(x))
def test_layers_of_dinat(size, heads, dilation, name):
    leaves, rule = inputs((1, size, size, heads, 32), None, (7, 7), "table")
    got = with_gradients(leaves, rule, name, kernel_size=7, dilation=dilation)
    want = with_gradients(leaves, rule, "reference", kernel_size=7, dilation=dilation)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


HALO = {"kernel_size": (14, 14), "stride": 8}


@pytest.mark.parametrize(
    ("shape", "bias", "options"),
    [
        ((2, 16, 24, 3, 8), "factored", {**HALO, "boundary": "zero"}),
        ((1, 16, 16, 4, 16), "factored-per-head", {**HALO, "boundary": "mask"}),
        ((2, 21, 13, 2, 8), "factored", {**HALO, "boundary": "mask"}),
        ((1, 5, 7, 2, 8), "factored", {**HALO, "boundary": "zero"}),
        ((2, 16, 24, 3, 8), "factored", {**HALO, "query_stride": (2, 2), "boundary": "zero"}),
        ((2, 16, 24, 3, 8), "counted", {**HALO, "query_stride": (2, 2), "boundary": "zero"}),
        ((2, 21, 13, 2, 8), "counted", {**HALO, "query_stride": (2, 4), "boundary": "mask"}),
        ((2, 14, 21, 2, 32), "table", {"kernel_size": (7, 7), "stride": 7, "boundary": "mask"}),
        ((1, 17, 22, 3, 8), "table", {"kernel_size": (7, 7), "stride": 7, "boundary": "mask"}),
        ((2, 28, 35, 2, 32), "table", {"kernel_size": (7, 7), "stride": 7, "offset": 3, "boundary": "mask"}),
        ((1, 24, 31, 3, 8), "table", {"kernel_size": (7, 7), "stride": 7, "offset": (0, 5), "boundary": "mask"}),
        ((2, 29, 26, 2, 8), "factored", {**HALO, "offset": (4, 7), "boundary": "zero"}),
        ((2, 14, 21, 2, 32), "table", {"kernel_size": (7, 7), "stride": 7, "dilation": (2, 3), "boundary": "mask"}),
        ((1, 17, 22, 3, 8), "table", {"kernel_size": (7, 7), "stride": 7, "dilation": (3, 4), "boundary": "mask"}),
        ((1, 4, 22, 3, 8), "table", {"kernel_size": (7, 7), "dilation": (1, 4), "boundary": "mask"}),
    ],
    ids=[
        "halo-zero",
        "halo-mask-per-head",
        "halo-ragged",
        "halo-less-than-a-block",
        "halo-strided",
        "halo-counted",
        "halo-counted-ragged",
        "window",
        "window-ragged",
        "window-shifted",
        "window-shifted-ragged",
        "halo-shifted",
        "grid",
        "grid-uneven",
        "grid-small",
    ],
)
@pytest.mark.parametrize(
    ("name", "chunk"), [("tiled", tiling.CHUNK), ("tiled", 20000), pytest.param("native", None, marks=needs_compiler)]
)
def test_layers_of_halonet_and_maxvit(shape, bias, options, name, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(tiling, "CHUNK", chunk)
    leaves, rule = inputs(shape, 12, bias=bias, **options)
    got = with_gradients(leaves, rule, name, **options)
    want = with_gradients(leaves, rule, "reference", **options)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("boundary", ["zero", "mask"])
@pytest.mark.parametrize("bias", ["factored", "factored-per-head", "counted"])
@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "query_stride"),
    [
        ((8, 8), (14, 14), 8, (1, 1)),
        ((7, 8), (8, 8), 8, (2, 2)),
        ((5, 6), (5, 6), 6, (1, 1)),
        ((2, 8), (8, 9), 8, (1, 4)),
    ],
    ids=["8x8-k14", "7x8-k8-q2", "5x6-k5x6", "2x8-k8x9-q1x4"],
)
def test_a_map_in_one_window(size, kernel_size, stride, query_stride, bias, boundary, monkeypatch):
    """Its own form, for small calls: keys outside count as one."""
    options = {"kernel_size": kernel_size, "stride": (min(stride, *kernel_size),) * 2, "query_stride": query_stride}
    options |= {"boundary": boundary}
    if bias == "counted":
        options["stride"] = tuple(s - s % n for s, n in zip(options["stride"], query_stride, strict=True))
    leaves, rule = inputs((2, *size, 2, 4), 3, bias=bias, dtype=torch.float64, **options)
    calls, form = [], tiled._one_window
    monkeypatch.setattr(tiled, "_one_window", lambda *a: calls.append(a) or form(*a))
    want = with_gradients(leaves, rule, "reference", **options)
    for chunk, times in ((tiling.CHUNK, 1), (10, 0)):
        monkeypatch.setattr(tiling, "CHUNK", chunk)
        calls.clear()
        got = with_gradients(leaves, rule, "tiled", **options)
        assert len(calls) == (times if min(options["stride"]) >= max(size) else 0)
        assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_window_with_large_logits(dtype):
    """Neither the exponentials inside nor the one sum of those outside overflow."""
    options = {**HALO, "boundary": "zero"}
    leaves, _ = inputs((1, 6, 7, 2, 8), None, (14, 14), "factored", dtype)
    with torch.no_grad():
        leaves[3].mul_(60), leaves[4].mul_(60)
    exact = [t.detach().double().requires_grad_(True) for t in leaves]
    want = with_gradients(exact, DecomposedRelativePositionBias(*exact[3:]), "reference", **options)
    got = with_gradients(leaves, DecomposedRelativePositionBias(*leaves[3:]), "tiled", **options)
    # a logit is the sum of a few terms, each rounded at its size
    largest = sum(float((exact[0] @ t.t()).abs().max()) for t in exact[3:])
    assert largest > 500
    limit = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps * largest
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < limit


def peak_bytes(call):
    """Most memory that PyTorch holds at once during a call, beyond what it held before."""
    gc.collect()  # what tests before have left would count as given back by the call, were it collected meanwhile
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
    finally:
        gc.enable()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("size", "heads", "depth"), [(16, 4, 32), (32, 8, 16)], ids=["map16", "map32"])
def test_halo_attention_takes_a_third_of_timms_memory(size, heads, depth):
    """Beyond inputs, output and gradients; the projections are replaced by their results."""
    from timm.layers.halo_attn import HaloAttn

    channels = heads * depth
    module = HaloAttn(channels, num_heads=heads, block_size=8, halo_size=3)
    q, kv = (torch.randn(1, size, size, n * channels, requires_grad=True) for n in (1, 2))
    module.q, module.kv = (torch.nn.Identity() for _ in range(2))
    module.q.forward, module.kv.forward = (lambda _, t=t: t.permute(0, 3, 1, 2) for t in (q, kv))
    tables = module.pos_embed.height_rel, module.pos_embed.width_rel
    weight = torch.randn(1, size, size, channels)

    def theirs():
        return module(torch.empty(1, channels, size, size)).permute(0, 2, 3, 1)

    def ours():
        k, v = kv.unflatten(-1, (heads, 2 * depth)).split(depth, -1)
        shifted = (torch.nn.functional.pad(t[3:], (0, 0, 0, 3)) for t in tables)
        options = {**HALO, "boundary": "zero", "bias": DecomposedRelativePositionBias(*shifted)}
        return neighborhood_attention(q.unflatten(-1, (heads, depth)), k, v, **options).flatten(3)

    def infer(attend):
        with torch.no_grad():
            return [attend()]

    def train(attend):
        out = attend()
        return [out, *torch.autograd.grad(out, (q, kv, *tables), weight)]

    for step in (infer, train):
        got, want = step(ours), step(theirs)
        assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5
        results = sum(t.nbytes for t in got)
        mine, timms = (peak_bytes(lambda f=f, step=step: step(f)) - results for f in (ours, theirs))
        assert 0 < mine <= timms / 3, step.__name__


@pytest.mark.parametrize("bias", ["table", "factored", "factored-per-head"])
def test_only_inputs_are_kept_for_the_backward(bias, monkeypatch):
    if bias == "table":  # more than one chunk: small calls keep their probabilities
        monkeypatch.setattr(tiling, "CHUNK", 10000)
    leaves, rule = inputs((2, 16, 16, 2, 8), None, (6, 6), bias)
    inputs_at = {t.untyped_storage().data_ptr() for t in leaves}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        neighborhood_attention(*leaves[:3], kernel_size=6, stride=4, boundary="zero", bias=rule, backend="tiled")
    assert len(kept) == len(leaves)
    assert {t.untyped_storage().data_ptr() for t in kept} <= inputs_at


def test_table_is_expanded_once_in_eval_and_never_stale(monkeypatch):
    expansions = []
    expand = tiled._pattern_bias
    monkeypatch.setattr(tiled, "_pattern_bias", lambda *a: expansions.append(a) or expand(*a))
    module = Attention(kernel_size=4, stride=4, boundary="mask")
    x = tensors(2, 8, 8, 2, 8)

    def check(expected, calls=2, table=None, **options):
        expansions.clear()
        want_table = RelativePositionBias((module.table if table is None else table).detach().clone())
        want = neighborhood_attention(*x, bias=want_table, backend="reference", **module.options)
        for _ in range(calls):
            with torch.inference_mode(options.get("inference", False)), torch.no_grad():
                torch.testing.assert_close(module(*x), want)
        assert len(expansions) == expected

    check(1)
    check(0, inference=True)
    module.table.data.copy_(torch.randn(2, 7, 7))  # neither identity nor version changes
    check(1)
    module.table.detach().numpy()[0, 3, 3] += 1
    check(1)
    module.load_state_dict({"table": torch.randn(2, 7, 7)})
    check(1)
    module.table.data = torch.randn(2, 7, 7)
    check(1)
    torch.nn.init.zeros_(module.table)
    check(1, inference=True)
    check(0)
    module.options["dilation"] = 2
    check(1)
    module.double()
    x = tensors(2, 8, 8, 2, 8, dtype=torch.float64)
    check(1)
    module.table.data.fill_(float("nan"))  # unequal to itself: expanded every time
    expansions.clear()
    with torch.no_grad():
        assert module(*x).isnan().any() and module(*x).isnan().any()
    assert len(expansions) == 2
    module.table.data.normal_()

    module.cache.clear()
    module(*x).sum().backward()  # with gradients nothing is kept
    assert module.cache.nbytes == 0
    check(1)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.cache.nbytes == 0 < module.cache.nbytes
        with torch.no_grad():
            torch.testing.assert_close(copied(*x), module(*x))


def test_all_caches_share_one_budget(monkeypatch):
    x = tensors(1, 8, 8, 2, 8)
    modules = [Attention(kernel_size=4, stride=4, boundary="mask").requires_grad_(False) for _ in range(5)]
    modules[0](*x)
    size = modules[0].cache.nbytes
    CONSTANTS.clear()
    modules[0](*x)
    others = sum(other.nbytes for other in cache._caches) - size
    monkeypatch.setattr(cache, "BUDGET", others + 3 * size)
    monkeypatch.setattr(cache, "SHARE", 1)
    for module in modules:
        module(*x)
        assert module.cache.nbytes == size
        assert sum(other.nbytes for other in cache._caches) <= cache.BUDGET
    assert 0 in {module.cache.nbytes for module in modules}
    monkeypatch.setattr(cache, "SHARE", cache.BUDGET // size + 1)
    modules[0].cache.clear()
    modules[0](*x)  # too large on its own: the last one's stays
    assert (modules[0].cache.nbytes, modules[-1].cache.nbytes) == (0, size)


def test_a_cache_ends_with_its_owner():
    module, x = Attention(kernel_size=3).requires_grad_(False), tensors(1, 8, 8, 2, 8)
    module(*x)
    before = sum(other.nbytes for other in cache._caches)
    size = module.cache.nbytes
    del module
    gc.collect()
    assert size > 0 and sum(other.nbytes for other in cache._caches) == before - size


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("bias", [None, "table", "factored"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((4, 5), {"kernel_size": (3, 2)}),
        ((5, 3), {"kernel_size": (2, 3), "stride": (2, 1), "dilation": (2, 1)}),
        ((3, 4), {"kernel_size": (4, 3), "boundary": "zero", "stride": (2, 2)}),
        ((3, 4), {"kernel_size": (4, 2), "boundary": "mask", "dilation": (1, 2)}),
        ((4, 5), {"kernel_size": (3, 3), "query_stride": (2, 3)}),
        ((4, 5), {"kernel_size": (4, 2), "boundary": "zero", "stride": (4, 2), "query_stride": (2, 1)}),
    ],
    ids=["shift", "shift-s2-d2", "zero", "mask", "shift-q2x3", "zero-q2x1"],
)
def test_gradcheck(name, bias, size, options):
    leaves, _ = inputs((1, *size, 2, 1), 2, bias=bias, dtype=torch.float64, **options)

    def call(q, k, v, *tensors):
        rule = (
            None
            if bias is None
            else RelativePositionBias(*tensors)
            if bias == "table"
            else DecomposedRelativePositionBias(*tensors)
        )
        return neighborhood_attention(q, k, v, bias=rule, backend=name, **options)

    assert torch.autograd.gradcheck(call, leaves)


def test_second_derivative_belongs_to_the_reference():
    leaves, _ = inputs((1, 4, 4, 1, 2), None, (3, 3), None, torch.float64)

    def call(q, k, v, name="reference"):
        return neighborhood_attention(q, k, v, kernel_size=3, backend=name)

    assert torch.autograd.gradgradcheck(call, leaves)
    with pytest.raises(RuntimeError, match=r"'tiled'.*create_graph.*'reference'"):
        torch.autograd.grad(call(*leaves, name="tiled").sum(), leaves[0], create_graph=True)


# --------------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("name", ["tiled", FUSED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, "table", "factored"])
def test_low_precision_is_as_good_as_eager(dtype, bias, name):
    """Error against float64 at most twice (gradients: three times) that of eager PyTorch in the same dtype."""
    options = {"kernel_size": 5, "dilation": 2}
    exact, _ = inputs((2, 14, 15, 2, 16), None, (5, 5), bias, torch.float64)
    exact = [t.detach().to(dtype).double().requires_grad_(True) for t in exact]  # the same values, exactly
    low = [t.detach().to(dtype).requires_grad_(True) for t in exact]

    def rule_of(leaves):
        return (
            None
            if bias is None
            else RelativePositionBias(leaves[3])
            if bias == "table"
            else DecomposedRelativePositionBias(*leaves[3:])
        )

    want = with_gradients(exact, rule_of(exact), "reference", **options)
    got = with_gradients(low, rule_of(low), name, **options)
    eager = eager_gather(low, bias, **options)
    for index, (a, e, w) in enumerate(zip(got, eager, want, strict=True)):
        assert a.dtype == dtype
        assert relative_error(a, w) <= (2 if index == 0 else 3) * relative_error(e, w), index


@pytest.mark.parametrize("bias", [None, "table", "factored"])
@pytest.mark.parametrize(
    ("name", "dropout_p"), [("tiled", 0.0), ("tiled", 0.001), pytest.param("native", 0.0, marks=needs_compiler)]
)
def test_float16_logits_do_not_overflow(bias, name, dropout_p):
    """200 * 200 * 32 * 32 ** -0.5 = 226,274 is beyond float16; the weights and the output are not."""
    q = torch.full((1, 9, 9, 1, 32), 200.0, dtype=torch.float16)
    _, rule = inputs((1, 9, 9, 1, 32), None, (3, 3), bias, torch.float16)
    got = neighborhood_attention(q, q, q, kernel_size=3, dropout_p=dropout_p, bias=rule, backend=name)
    assert torch.isfinite(got).all()
    assert float((got.detach() - q).abs().median()) < 1


def eager_gather(leaves, bias, kernel_size, dilation):
    """Plain PyTorch in the dtype of its inputs, as a user would write it: gather, matmul, softmax, matmul."""
    from foveal.kernels.window import Window

    q, k, v = leaves[:3]
    rule = Window(kernel_size, 1, dilation)
    rows, _, row = rule.keys(q.shape[1])
    columns, _, column = rule.keys(q.shape[2])
    near_k, near_v = (t[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4) for t in (k, v))
    logits = torch.einsum("bhwnd,bhwknd->bhwnk", q * q.shape[-1] ** -0.5, near_k)
    if bias == "table":
        logits = logits + leaves[3][:, row[:, None, :, None], column[None, :, None, :]].permute(1, 2, 0, 3, 4).flatten(
            3
        )
    elif bias == "factored":
        by_row = torch.einsum("bhwnd,hid->bhwni", q, leaves[3][row])
        by_column = torch.einsum("bhwnd,wjd->bhwnj", q, leaves[4][column])
        logits = logits + (by_row[..., None] + by_column[..., None, :]).flatten(-2)
    out = torch.einsum("bhwnk,bhwknd->bhwnd", logits.softmax(-1), near_v)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weight)]


# --------------------------------------------------------------------------------------------- against NATTEN


@needs_natten
@pytest.mark.parametrize("name", ["reference", "tiled", "natten"])
@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation"),
    [
        ((14, 14), (7, 7), (1, 1), (1, 1)),
        ((14, 14), (7, 7), (1, 1), (2, 2)),
        ((15, 17), (5, 3), (1, 1), (2, 4)),
        ((13, 11), (4, 6), (1, 1), (1, 1)),
        ((17, 19), (4, 3), (2, 3), (3, 2)),
        ((16, 15), (6, 5), (3, 2), (2, 1)),
        ((12, 13), (3, 2), (3, 2), (4, 5)),
        ((11, 23), (2, 8), (2, 3), (5, 2)),
    ],
    ids=lambda x: "x".join(map(str, x)),
)
def test_against_natten(name, size, kernel_size, stride, dilation):
    import natten

    q, k, v = (t.detach() for t in inputs((2, *size, 2, 8))[0])
    options = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    want = natten.na2d(q, k, v, **options)
    got = neighborhood_attention(q, k, v, backend=name, **options)
    assert relative_error(got, want) < 1e-5
    assert relative_error(neighborhood_attention(q, k, v, scale=0.7, backend=name, **options), want) > 1e-3


# --------------------------------------------------------------------------------- tiled under torch.compile


def nodes_of(call, *leaves):
    """The output of the compiled ``call``, and the operators in its one graph."""
    nodes = []

    def keep(graph, example_inputs):
        nodes.extend(node for node in graph.graph.nodes if str(node.target).startswith(("aten.", "foveal.")))
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend=keep)(*leaves), nodes


@pytest.mark.parametrize(
    ("bias", "options"),
    [
        (None, {"kernel_size": (3, 3), "dilation": (2, 3)}),
        ("table", {"kernel_size": (4, 3), "stride": (2, 1), "boundary": "mask"}),
        ("factored-per-head", {"kernel_size": (5, 5), "stride": 3, "boundary": "zero"}),
        ("counted", {"kernel_size": (6, 6), "stride": 4, "query_stride": (2, 2), "boundary": "mask"}),
    ],
    ids=["plain", "table", "decomposed", "counted"],
)
def test_compilers_see_tiled_as_one_node(bias, options):
    leaves, _ = inputs((2, 9, 10, 2, 4), 3, bias=bias, **options)

    def call(q, k, v, *tensors):
        rule = None
        if bias is not None:
            rule = RelativePositionBias(*tensors) if bias == "table" else DecomposedRelativePositionBias(*tensors)
        if bias == "counted":
            rule = DecomposedRelativePositionBias(*tensors, counted=True)
        return neighborhood_attention(q, k, v, bias=rule, scale=0.4, **options)

    got, (node,) = nodes_of(call, *leaves)
    assert str(node.target) in ("foveal.tiled_attention.default", "foveal.tiled_attention")
    want = call(*leaves)
    like = output_gradient(got.shape, got.dtype)
    assert relative_error(got, want) == 0
    pairs = zip(*(torch.autograd.grad(out, leaves, like) for out in (got, want)), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) < 1e-6
    constants = node.args[-2:]  # window and scale
    tensors = (*leaves, None, None)[:5]
    torch.library.opcheck(tiled._node, (*tensors, *constants), test_utils=("test_schema", "test_faketensor"))
    tensors = (like, *(None if t is None else t.detach() for t in tensors))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(tiled._node_backward, (*tensors, *constants, bias is not None), test_utils=checks)


@needs_natten
def test_compilers_see_natten_as_one_node():
    q, k, v = (t.detach() for t in inputs((1, 8, 9, 2, 8))[0])
    options = {"kernel_size": 3, "dilation": 2, "scale": 0.5, "backend": "natten"}
    got, (node,) = nodes_of(lambda q, k, v: neighborhood_attention(q, k, v, **options), q, k, v)
    torch.testing.assert_close(got, neighborhood_attention(q, k, v, **options))
    assert str(node.target) in ("foveal.natten_na2d.default", "foveal.natten_na2d")


def test_natten_operators_are_proper_and_have_a_gradient(monkeypatch):
    """The custom operators, with a differentiable function in NATTEN's place: it has no gradient on a CPU, and its CPU
    path (flex_attention) cannot run under the modes of ``opcheck``."""

    def stand_in(q, k, v, window, scale):
        options = {"kernel_size": tuple(window[:2]), "stride": tuple(window[2:4]), "dilation": tuple(window[4:])}
        return neighborhood_attention(q, k, v, scale=scale, backend="reference", **options)

    monkeypatch.setattr(natten_backend, "_call", stand_in)
    leaves, _ = inputs((1, 6, 7, 2, 4), None, (3, 3), None, torch.float64)
    arguments = (*leaves, [3, 3, 1, 1, 2, 2], 0.5)
    torch.library.opcheck(natten_backend.natten_na2d, arguments)
    got = torch.autograd.grad(natten_backend.natten_na2d(*arguments).square().sum(), leaves)
    want = torch.autograd.grad(stand_in(*arguments).square().sum(), leaves)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": RelativePositionBias(torch.zeros(1, 5, 5))}, "bias.*RelativePositionBias"),
        ({"boundary": "zero"}, "'shift'.*'zero'"),
        ({"query_stride": (1, 2)}, r"query_stride.*\(1, 2\)"),
        ({"dropout_p": 0.1}, r"dropout.*0\.1"),
        ({"grad": True}, "gradient.*CPU"),
        ({"dtype": torch.float64}, "float64"),
        ({"kernel_size": (1, 3)}, r"kernel_size.*\(1, 3\)"),
        ({"depth": 24}, "depth.*24"),
        ({"depth": 7}, "depth.*8.*7"),
        ({"value_depth": 16}, "16.*8"),
        ({"batch": 0}, "batch"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@needs_natten
def test_natten_names_what_it_lacks(change, reason):
    change = {"batch": 1, "depth": 8, "value_depth": None, "dtype": torch.float32, "grad": False, **change}
    shape = (change.pop("batch"), 6, 6, 1, change.pop("depth"))
    query_stride = change.get("query_stride", (1, 1))
    leaves, _ = inputs(shape, change.pop("value_depth"), dtype=change.pop("dtype"), query_stride=query_stride)
    if not change.pop("grad"):
        leaves = [t.detach() for t in leaves]
    with pytest.raises(BackendError, match=reason):
        neighborhood_attention(*leaves, backend="natten", **{"kernel_size": 3, **change})


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_dropout_drops_weights_and_keeps_the_mean(name):
    """With all values 1 the output is the sum of the kept weights: mean 1, and each query sees 0 or more of them."""
    torch.manual_seed(0)
    q = torch.zeros(64, 8, 8, 2, 4)
    v = torch.ones(64, 8, 8, 2, 1)
    out = neighborhood_attention(q, q, v, kernel_size=3, dropout_p=0.4, backend=name)
    assert abs(float(out.mean()) - 1) < 0.01
    counts = out * 0.6 * 9  # kept keys out of 9
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    assert abs(float(counts.var()) - 9 * 0.4 * 0.6) < 0.1
    torch.manual_seed(0)
    leaves, rule = inputs((1, 6, 6, 1, 4), None, (3, 3), "table")
    grads = torch.autograd.grad(
        neighborhood_attention(*leaves[:3], kernel_size=3, bias=rule, dropout_p=0.5, backend=name).sum(), leaves
    )
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_dropout_of_strided_queries(name):
    torch.manual_seed(0)
    q, v = torch.zeros(64, 4, 4, 2, 4), torch.ones(64, 8, 8, 2, 1)
    options = {"kernel_size": 5, "stride": 4, "query_stride": 2, "backend": name}
    out = neighborhood_attention(q, v.expand(-1, -1, -1, -1, 4), v, dropout_p=0.4, **options)
    assert out.shape == (64, 4, 4, 2, 1)
    assert abs(float(out.mean()) - 1) < 0.01
    counts = out * 0.6 * 25  # kept keys out of 25
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    assert abs(float(counts.var()) - 25 * 0.4 * 0.6) < 0.6


@pytest.mark.parametrize("name", ["reference", "tiled", FUSED])
def test_batch_of_none(name):
    leaves, rule = inputs((0, 7, 7, 2, 4), 3, (3, 3), "table")
    out, *grads = with_gradients(leaves, rule, name, kernel_size=3, dilation=2)
    assert out.shape == (0, 7, 7, 2, 3)
    assert not grads[3].any()


@pytest.mark.parametrize("name", ["reference", "tiled", FUSED])
def test_strides_of_the_inputs_do_not_matter(name):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 9, 8, 3, 2, 4, generator=generator)
    views = packed.unbind(3)
    first = torch.randn(2, 2, 4, 9, 8, generator=generator).permute(0, 3, 4, 1, 2)
    flipped = torch.randn(2, 9, 16, 2, 4, generator=generator)[:, :, ::2]
    expanded = torch.randn(1, 1, 8, 2, 4, generator=generator).expand(2, 9, 8, 2, 4)
    for q, k, v in (views, (first, views[1], flipped), (expanded, first, views[0]), (flipped, expanded, expanded)):
        got = neighborhood_attention(q, k, v, kernel_size=3, dilation=2, backend=name)
        want = neighborhood_attention(
            q.contiguous(), k.contiguous(), v.contiguous(), kernel_size=3, dilation=2, backend=name
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["tiled", FUSED])
@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_output_is_contiguous_and_may_be_changed_in_place(size, name):
    leaves, rule = inputs((2, *size, 2, 4), None, (3, 3), "table")
    out = neighborhood_attention(*leaves[:3], kernel_size=3, dilation=2, bias=rule, backend=name)
    assert out.is_contiguous()
    want = torch.autograd.grad(out.sum() * 2, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.mul_(2).sum(), leaves), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["tiled", FUSED])
def test_default_device_does_not_leak_in(name):
    leaves, rule = inputs((1, 9, 11, 2, 4), None, (3, 3), "table")
    want = with_gradients(leaves, rule, "tiled", kernel_size=3, dilation=2)
    CONSTANTS.clear()
    native._axis.cache_clear()
    with torch.device("meta"):
        out = neighborhood_attention(*leaves[:3], bias=rule, kernel_size=3, dilation=2, backend=name)
        grads = torch.autograd.grad(out, leaves, torch.ones(out.shape, device="cpu"))
    torch.testing.assert_close(out, want[0])
    assert all(g.device.type == "cpu" and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", ["tiled", FUSED])
def test_part_of_the_inputs_wants_gradients(name):
    leaves, _ = inputs((1, 9, 8, 2, 4), None, (3, 3), "table")
    for chosen in ([0], [1], [2], [3], [0, 3], [1, 2]):
        picked = [t if i in chosen else t.detach() for i, t in enumerate(leaves)]
        got, want = (
            torch.autograd.grad(
                neighborhood_attention(
                    *picked[:3], bias=RelativePositionBias(picked[3]), kernel_size=3, backend=each
                ).sum(),
                [picked[i] for i in chosen],
            )
            for each in (name, "reference")
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiled", FUSED])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, name):
    from torch.utils.checkpoint import checkpoint

    leaves, rule = inputs((1, 9, 8, 2, 4), None, (3, 3), "table")

    def call(q, k, v):
        return neighborhood_attention(q, k, v, bias=rule, kernel_size=3, backend=name)

    got = torch.autograd.grad(checkpoint(call, *leaves[:3], use_reentrant=False).sum(), leaves)
    want = torch.autograd.grad(call(*leaves[:3]).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if reentrant:  # refuses torch.autograd.grad
        checkpoint(call, *leaves[:3], use_reentrant=True).sum().backward()
        assert all(torch.equal(t.grad, b) for t, b in zip(leaves, want, strict=True))


def test_transforms_of_torch_func():
    leaves, rule = inputs((1, 7, 8, 2, 4), None, (3, 3), "table")
    q, k, v = (t.detach() for t in leaves[:3])
    rule = RelativePositionBias(rule.table.detach())

    def call(q, name="tiled"):
        return neighborhood_attention(q, k, v, bias=rule, kernel_size=3, backend=name).square().sum()

    torch.testing.assert_close(torch.func.grad(call)(q), torch.func.grad(lambda q: call(q, "reference"))(q))
    batch = torch.stack([q, 2 * q])
    torch.testing.assert_close(torch.vmap(call)(batch), torch.stack([call(q), call(2 * q)]))


@pytest.mark.parametrize("name", ["tiled", FUSED])
def test_inputs_are_not_changed(name):
    leaves, rule = inputs((1, 9, 9, 2, 4), None, (3, 3), "table")
    before = [t.detach().clone() for t in leaves]
    with_gradients(leaves, rule, name, kernel_size=3)
    for a, b in zip(leaves, before, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_like_the_functional_operators():
    leaves, rule = inputs((1, 8, 8, 2, 8), None, (3, 3), "table")
    with torch.autocast("cpu", torch.bfloat16):
        out = neighborhood_attention(*leaves[:3], kernel_size=3, bias=rule)
        mixed = neighborhood_attention(leaves[0].bfloat16(), *leaves[1:3], kernel_size=3, bias=rule)
    assert out.dtype == mixed.dtype == torch.bfloat16
    want = neighborhood_attention(*leaves[:3], kernel_size=3, bias=rule)
    assert relative_error(out.detach(), want.detach()) < 0.05
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 4
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        double = [t.double() for t in leaves[:3]]
        assert neighborhood_attention(*double, kernel_size=3).dtype == torch.float64
        with pytest.raises(TypeError, match=r"float32.*float64"):
            neighborhood_attention(leaves[0], *double[1:], kernel_size=3)


@pytest.mark.parametrize("name", ["tiled", FUSED])
@pytest.mark.parametrize("bias", [None, "table", "factored", "factored-per-head"])
def test_autocast_around_the_backward_changes_nothing(bias, name):
    """A common habit: `loss.backward()` inside the autocast block."""
    leaves, rule = inputs((1, 9, 8, 2, 4), None, (3, 3), bias)
    out = neighborhood_attention(*leaves[:3], kernel_size=3, bias=rule, backend=name)
    want = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("chosen", range(4))
def test_a_subclass_among_the_inputs_gets_standard_operators(chosen):
    class Plain(torch.Tensor):
        pass

    leaves, _ = inputs((1, 9, 8, 2, 4), None, (3, 3), "table")
    want = neighborhood_attention(*leaves[:3], kernel_size=3, bias=RelativePositionBias(leaves[3]))
    leaves[chosen] = leaves[chosen].detach().as_subclass(Plain)
    got = neighborhood_attention(*leaves[:3], kernel_size=3, bias=RelativePositionBias(leaves[3]))
    assert type(got) is Plain
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want)


def test_plans_made_in_inference_mode_serve_training():
    leaves, rule = inputs((1, 11, 13, 2, 4), None, (3, 3), "table")
    CONSTANTS.clear()
    with torch.inference_mode():
        neighborhood_attention(*leaves[:3], kernel_size=3, bias=RelativePositionBias(leaves[3]))
    with_gradients(leaves, rule, "tiled", kernel_size=3)


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    CONSTANTS.clear()
    with FakeTensorMode():
        q = torch.empty(1, 11, 12, 2, 4)
        assert neighborhood_attention(q, q, q, kernel_size=3).shape == q.shape
    leaves, rule = inputs((1, 11, 12, 2, 4), None, (3, 3), "table")
    with_gradients(leaves, rule, "tiled", kernel_size=3)

    module, x = Attention(kernel_size=3), tensors(1, 11, 12, 2, 4)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):  # real inputs and parameters, results without numbers
            module(*x)
        assert type(module(*x)) is torch.Tensor


def test_meta_tensors_give_the_shape():
    q = torch.empty(2, 14, 15, 2, 8, device="meta")
    table = torch.empty(2, 5, 5, device="meta")
    out = neighborhood_attention(q, q, q[..., :3], kernel_size=3, dilation=2, bias=RelativePositionBias(table))
    assert out.device.type == "meta" and out.shape == (2, 14, 15, 2, 3)


# ------------------------------------------------------------------------------------------ compile and export


@pytest.mark.parametrize(
    ("bias", "options"),
    [
        ("table", {"kernel_size": 3, "dilation": 2}),
        ("factored", {"kernel_size": (4, 3), "stride": 2, "boundary": "zero"}),
        (None, {"kernel_size": (4, 3), "stride": 2, "boundary": "mask"}),
        ("table", {"kernel_size": (4, 3), "stride": (4, 3), "offset": (1, 2), "boundary": "mask"}),
        ("factored", {"kernel_size": (7, 6), "stride": 4, "query_stride": (2, 3), "boundary": "zero"}),
        ("counted", {"kernel_size": (7, 6), "stride": 4, "query_stride": (2, 4), "boundary": "mask"}),
    ],
    ids=[
        "table-shift-d2",
        "factored-zero-s2",
        "none-mask-s2",
        "table-shifted",
        "factored-zero-q2x3",
        "counted-mask-q2x4",
    ],
)
def test_compile_without_graph_breaks(bias, options):
    torch._dynamo.reset()
    kernel_size = (3, 3) if options["kernel_size"] == 3 else options["kernel_size"]
    seen = []

    def count(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    def call(q, k, v, *tensors):
        rule = None
        if bias is not None:
            rule = (
                RelativePositionBias(*tensors)
                if bias == "table"
                else DecomposedRelativePositionBias(*tensors, counted=bias == "counted")
            )
        return neighborhood_attention(q, k, v, bias=rule, **options)

    compiled = torch.compile(call, fullgraph=True, backend=count)
    for size in ((9, 11), (12, 8), (9, 11), (12, 8)):
        query_stride = options.get("query_stride", (1, 1))
        leaves, rule = inputs((2, *size, 2, 4), None, kernel_size, bias, query_stride=query_stride)
        got = compiled(*leaves)
        weight = torch.ones_like(got)
        want = neighborhood_attention(*leaves[:3], bias=rule, backend="reference", **options)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        if size == (12, 8):
            graphs = len(seen)
    assert len(seen) == graphs == 2  # one graph for each shape, none for a shape seen before


def test_compile_with_options_that_change():
    """An int that changes between calls becomes symbolic in the tracer; each value is still compiled in one piece."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, size, reach: neighborhood_attention(q, q, q, kernel_size=size, dilation=reach),
        fullgraph=True,
        backend="eager",
    )
    for size, reach in ((3, 1), (3, 3), (5, 2), (3, 3)):
        q = torch.randn(1, 11, 10, 2, 4)
        want = neighborhood_attention(q, q, q, kernel_size=size, dilation=reach)
        torch.testing.assert_close(compiled(q, size, reach), want)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("bias", [None, "table"])
def test_torch_jit_trace(bias):
    leaves, _ = inputs((2, 9, 11, 2, 4), None, (3, 3), bias)

    def call(q, k, v, *tables):
        return neighborhood_attention(
            q, k, v, kernel_size=3, dilation=2, bias=RelativePositionBias(*tables) if tables else None
        )

    traced = torch.jit.trace(call, tuple(leaves), check_trace=False)
    others, _ = inputs((5, 9, 11, 2, 4), None, (3, 3), bias, seed=1)
    torch.testing.assert_close(traced(*others), call(*others))


def test_compile_with_the_default_compiler():
    torch._dynamo.reset()
    leaves, _ = inputs((2, 10, 9, 2, 8), None, (3, 3), "table")

    def call(q, k, v, table):
        return neighborhood_attention(q, k, v, kernel_size=3, dilation=3, bias=RelativePositionBias(table))

    torch.use_deterministic_algorithms(False)  # Inductor has no index_put for it; the poison is tested elsewhere
    got = torch.compile(call, fullgraph=True)(*leaves)
    want = call(*leaves)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves), strict=True
    ):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("shape", [(2, 7, 5, 2, 4), (1, 9, 8, 3, 8)])
def test_large_map_in_one_window(shape, monkeypatch):
    """Its bias is expanded for some rows of queries at a time."""
    monkeypatch.setattr(tiling, "CHUNK", 2 * shape[3] * shape[2] * shape[1] * shape[2] - 1)  # logits of two rows
    calls = []
    rows = tiled._some_rows
    monkeypatch.setattr(tiled, "_some_rows", lambda *arguments: calls.append(1) or rows(*arguments))
    size = shape[1:3]
    leaves, _ = inputs(shape, None, size, "table")
    grad = torch.randn_like(leaves[0])
    for options in ({"boundary": "shift"}, {"boundary": "mask", "stride": size}):
        found = []
        for name in ("tiled", "reference"):
            q, k, v, table = leaves
            options |= {"kernel_size": size, "bias": RelativePositionBias(table), "backend": name}
            out = neighborhood_attention(q, k, v, **options)
            found.append((out, *torch.autograd.grad(out, leaves, grad)))
        for got, want in zip(*found, strict=True):
            assert relative_error(got, want) < 1e-5
    assert len(calls) == 2 * 2 * shape[1]  # recomputed for the gradients


class Attention(torch.nn.Module):
    def __init__(self, heads=2, **options):
        super().__init__()
        kernel_size = options["kernel_size"]
        rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.table = torch.nn.Parameter(torch.randn(heads, 2 * rows - 1, 2 * columns - 1))
        self.cache = TensorCache()
        self.options = options

    def forward(self, q, k, v):
        return neighborhood_attention(q, k, v, bias=RelativePositionBias(self.table, self.cache), **self.options)


EXPORTS = [
    {"kernel_size": 3, "dilation": 2},
    {"kernel_size": (5, 4), "dilation": (2, 3)},
    {"kernel_size": 6, "stride": 2, "boundary": "mask"},
    {"kernel_size": 6, "stride": 4, "query_stride": 2, "boundary": "mask"},
    {"kernel_size": (5, 4), "stride": (5, 4), "offset": (2, 3), "boundary": "mask"},
    {"kernel_size": (4, 3), "dilation": (2, 1), "boundary": "zero"},
]
EXPORT_IDS = ["k3-d2", "k5x4-d2x3", "k6-s2-mask", "k6-s4-q2-mask", "k5x4-shifted", "k4x3-d2x1-zero"]


def export_inputs(count, options):
    q, k, v = tensors(count, 13, 17, 2, 4)
    step = options.get("query_stride", 1)
    return q[:, ::step, ::step].contiguous(), k, v


@pytest.mark.parametrize("elsewhere", [False, True], ids=["pytorch", "elsewhere"])
@pytest.mark.parametrize("options", EXPORTS, ids=EXPORT_IDS)
def test_export_with_a_free_batch(options, elsewhere):
    module = Attention(**options).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with for_other_runtimes() if elsewhere else nullcontext():
        program = torch.export.export(module, export_inputs(2, options), dynamic_shapes=({0: batch},) * 3)
    for count in (1, 5):
        x = export_inputs(count, options)
        torch.testing.assert_close(program.module()(*x), module(*x))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in")) or "sym" in name for name in names), names
    if elsewhere:  # tiles are gathered in one step: q, k, v and the output
        moving = [node for node in program.graph.nodes if str(node.target).startswith(("aten.permute", "aten.trans"))]
        transposed = [node.meta["val"].ndim for node in moving]
        assert max(transposed, default=0) <= 7, transposed


@pytest.mark.parametrize("options", EXPORTS[1:], ids=EXPORT_IDS[1:])
def test_onnx_equals_eager(options, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    torch.use_deterministic_algorithms(False)
    module = Attention(**options).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    path = tmp_path / "attention.onnx"
    # three tensors: the exporter takes one object given three times for one input
    with for_other_runtimes():
        program = torch.export.export(module, export_inputs(2, options), dynamic_shapes=({0: batch},) * 3)
    torch.onnx.export(program, (), str(path), dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 4):
        x, y, z = export_inputs(count, options)
        names = [i.name for i in session.get_inputs()]
        got = session.run(None, dict(zip(names, (x.numpy(), y.numpy(), z.numpy()), strict=True)))[0]
        assert relative_error(torch.from_numpy(got), module(x, y, z).detach()) < 1e-5


# -------------------------------------------------------------------------------------- dispatch and bad input


def tensors(*shape, **options):
    return [torch.randn(*shape, **options) for _ in range(3)]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (tensors(1, 6, 6, 1, 4), {"kernel_size": 7}, ValueError, "kernel_size 7.*dilation 1.*6 rows"),
        (tensors(1, 20, 13, 1, 4), {"kernel_size": 7, "dilation": 2}, ValueError, "7.*2.*13 columns"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 3, "stride": 4}, ValueError, "stride 4.*kernel_size 3"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 0}, ValueError, "kernel_size.*0"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": (3, -1)}, ValueError, r"kernel_size.*\(3, -1\)"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 3, "dilation": 0}, ValueError, "dilation.*0"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 3.0}, TypeError, r"kernel_size.*3\.0"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": (3, 3, 3)}, TypeError, r"kernel_size.*\(3, 3, 3\)"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": True}, TypeError, "kernel_size.*True"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 3, "boundary": "wrap"}, ValueError, "'wrap'.*shift, zero, mask"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 3, "dropout_p": 1.0}, ValueError, r"dropout_p.*1\.0"),
        (tensors(9, 9, 1, 4), {"kernel_size": 3}, ValueError, r"q .*\[B, H, W, heads, D\].*\(9, 9, 1, 4\)"),
        (tensors(1, 9, 9, 0, 4), {"kernel_size": 3}, ValueError, r"\(1, 9, 9, 0, 4\)"),
        (tensors(1, 0, 9, 1, 4), {"kernel_size": 3, "boundary": "zero"}, ValueError, r"\(1, 0, 9, 1, 4\)"),
        (
            tensors(1, 9, 9, 1, 4, device="meta")[:2] + tensors(1, 9, 9, 1, 4)[:1],
            {"kernel_size": 3},
            ValueError,
            "meta, meta and cpu",
        ),
        (
            [*tensors(1, 9, 9, 1, 4)[:2], torch.randn(1, 9, 8, 1, 4)],
            {"kernel_size": 3},
            ValueError,
            r"v \(1, 9, 8, 1, 4\)",
        ),
        (
            [torch.randn(1, 9, 9, 1, 5), *tensors(1, 9, 9, 1, 4)[:2]],
            {"kernel_size": 3},
            ValueError,
            r"q \(1, 9, 9, 1, 5\), k \(1, 9, 9, 1, 4\)",
        ),
        (
            [*tensors(1, 9, 9, 1, 4)[:2], torch.randn(1, 9, 9, 1, 4).double()],
            {"kernel_size": 3},
            TypeError,
            "float32.*float32.*float64",
        ),
        ([torch.ones(1, 9, 9, 1, 4, dtype=torch.int32)] * 3, {"kernel_size": 3}, TypeError, "q .*int32"),
        (
            tensors(1, 9, 9, 2, 4),
            {"kernel_size": 3, "bias": RelativePositionBias(torch.zeros(2, 5, 6))},
            ValueError,
            r"table.*\[2, 5, 6\].*\[2, 5, 5\]",
        ),
        (
            tensors(1, 9, 9, 2, 4),
            {"kernel_size": (3, 5), "bias": DecomposedRelativePositionBias(torch.zeros(5, 4), torch.zeros(5, 4))},
            ValueError,
            r"columns.*\[5, 4\].*\[9, 4\].*\[2, 9, 4\]",
        ),
        (
            tensors(1, 9, 9, 2, 4),
            {"kernel_size": 3, "bias": torch.zeros(2, 5, 5)},
            TypeError,
            "bias.*Tensor",
        ),
        (
            tensors(1, 9, 9, 2, 4),
            {"kernel_size": 3, "bias": RelativePositionBias(torch.zeros(2, 5, 5, dtype=torch.int64))},
            TypeError,
            "table.*int64",
        ),
        (
            tensors(1, 9, 9, 2, 4),
            {"kernel_size": 3, "bias": RelativePositionBias(torch.zeros(2, 5, 5, device="meta"))},
            ValueError,
            "table.*meta.*cpu",
        ),
        (
            tensors(1, 9, 9, 1, 4),
            {"kernel_size": 3, "query_stride": 2},
            ValueError,
            r"5 x 5.*query_stride.*q \(1, 9, 9, 1, 4\)",
        ),
        (
            [torch.randn(1, 5, 9, 1, 4), *tensors(1, 9, 9, 1, 4)[:2]],
            {"kernel_size": 3, "query_stride": (2, 1), "dilation": (1, 2)},
            ValueError,
            r"query_stride \(2, 1\).*dilation \(1, 2\)",
        ),
        (
            [torch.randn(1, 5, 9, 1, 4), *tensors(1, 9, 9, 1, 4)[:2]],
            {
                "kernel_size": 3,
                "stride": (3, 1),
                "query_stride": (2, 1),
                "bias": DecomposedRelativePositionBias(torch.zeros(5, 4), torch.zeros(5, 4), counted=True),
            },
            ValueError,
            "query_stride 2.*stride 3.*rows",
        ),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 3, "query_stride": 0}, ValueError, "query_stride.*0"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 3, "offset": 1.0}, TypeError, r"offset.*1\.0"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 3, "stride": 3, "offset": 4}, ValueError, r"offset \(1, 1\).*'shift'"),
        (
            [torch.randn(1, 5, 9, 1, 4), *tensors(1, 9, 9, 1, 4)[:2]],
            {"kernel_size": 3, "stride": 3, "offset": 1, "query_stride": (2, 1), "boundary": "mask"},
            ValueError,
            r"offset \(1, 1\).*query_stride \(2, 1\)",
        ),
        ([[1.0], *tensors(1, 9, 9, 1, 4)[:2]], {"kernel_size": 3}, TypeError, "q .*list"),
        (tensors(1, 9, 9, 1, 4), {"kernel_size": 3, "backend": "cutlass"}, BackendError, "'cutlass'.*argument"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        neighborhood_attention(*arguments, **options)


def test_smallest_map_that_fits():
    q, k, v = tensors(1, 14, 21, 1, 4)
    out = neighborhood_attention(q, k, v, kernel_size=7, dilation=(2, 3))
    torch.testing.assert_close(
        out, neighborhood_attention(q, k, v, kernel_size=7, dilation=(2, 3), backend="reference")
    )


def test_backend_context_and_argument():
    q, k, v = tensors(1, 6, 6, 1, 4)
    with pytest.raises(BackendError, match=r"'fast'.*backend\(\)"), backend("fast"):
        pass
    with backend("natten"):
        with pytest.raises(BackendError, match=r"'natten'.*backend\(\)"):
            neighborhood_attention(q, k, v, kernel_size=3, boundary="mask")
        neighborhood_attention(q, k, v, kernel_size=3, boundary="mask", backend="tiled")  # the argument wins
        with backend(None):
            neighborhood_attention(q, k, v, kernel_size=3, boundary="mask")
    neighborhood_attention(q, k, v, kernel_size=3, boundary="mask")


def test_backend_blocks_of_threads_may_end_in_any_order():
    q, k, v = tensors(1, 6, 6, 1, 4)
    first, second = backend("reference"), backend("natten")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(BackendError, match="'natten'"):
        neighborhood_attention(q, k, v, kernel_size=3)
    second.__exit__(None, None, None)
    neighborhood_attention(q, k, v, kernel_size=3)


@pytest.mark.parametrize("force", ["argument", "context"])
def test_a_forced_choice_is_logged_once(monkeypatch, caplog, force):
    monkeypatch.setattr(dispatch, "_announced", set())
    q = torch.randn(1, 6, 6, 1, 4)
    with caplog.at_level("INFO", logger=dispatch.__name__), backend("reference" if force == "context" else None):
        for _ in range(2):
            neighborhood_attention(q, q, q, kernel_size=3, backend="reference" if force == "argument" else None)
    (record,) = caplog.records
    assert record.args[:2] == ("reference", "cpu")
    assert force in record.getMessage()


@pytest.mark.parametrize(
    ("shape", "order"),
    [((1, 8, 20, 20, 8), (0, 1, 2, 3, 4)), ((1, 14, 14, 7, 32), (0, 3, 1, 2, 4))],  # and moved in front by permute
    ids=["contiguous", "permuted"],
)
def test_heads_first_that_the_window_fits_warn(shape, order):
    x = torch.randn(shape).permute(order)
    _, heads, rows, columns, _ = x.shape
    with pytest.warns(UserWarning, match=rf"{heads} x {rows}.*{columns} heads"):
        neighborhood_attention(x, x, x, kernel_size=7)
    weights = torch.randn(*x.shape[:4], 9)
    with pytest.warns(UserWarning, match=rf"{heads} x {rows}.*{columns} heads"):
        neighborhood_aggregate(weights, x, kernel_size=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neighborhood_attention(*[x.permute(0, 2, 3, 1, 4)] * 3, kernel_size=7)
        y = torch.randn(1, 7, 16, 16, 32)  # a map of 7 x 16 with 16 heads, as of a wide image
        neighborhood_attention(y, y, y, kernel_size=7)


def test_heads_that_come_first_are_pointed_out():
    """NATTEN 0.17's layout, or that of `scaled_dot_product_attention`."""
    q = torch.randn(1, 2, 14, 14, 8)
    with pytest.raises(ValueError, match=r"\[B, H, W, heads, D\]; heads"):
        neighborhood_attention(q, q, q, kernel_size=7)
    q = torch.randn(1, 8, 14, 14, 8)
    with pytest.raises(ValueError, match=r"\[B, H, W, heads, D\]; heads"):
        neighborhood_attention(q, q, q, kernel_size=7, bias=RelativePositionBias(torch.zeros(8, 13, 13)))
    small = torch.randn(1, 4, 14, 2, 8)  # a map that is too small
    with pytest.raises(ValueError, match="does not fit") as error:
        neighborhood_attention(small, small, small, kernel_size=7)
    assert "heads" not in str(error.value)


def test_the_automatic_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_announced", set())
    leaves, rule = inputs((1, 6, 6, 1, 8), None, (3, 3), "table")
    with caplog.at_level("INFO", logger=dispatch.__name__):
        for _ in range(2):
            neighborhood_attention(*leaves[:3], kernel_size=3, bias=rule)
    assert [record.args[:2] for record in caplog.records] == [("tiled", "cpu")]


def test_missing_natten_is_a_reason(monkeypatch):
    monkeypatch.setattr(natten_backend, "installed_version", lambda: None)
    with pytest.raises(BackendError, match=r"foveal\[natten\]"):
        neighborhood_attention(*tensors(1, 6, 6, 1, 4), kernel_size=3, backend="natten")
    monkeypatch.setattr(natten_backend, "installed_version", lambda: "0.21rc1")
    neighborhood_attention(*tensors(1, 6, 6, 1, 8), kernel_size=3, boundary="mask")
    monkeypatch.setattr(natten_backend, "installed_version", lambda: "0.17.5")
    with pytest.raises(BackendError, match=r"0\.17\.5.*0\.20"):
        neighborhood_attention(*tensors(1, 6, 6, 1, 4), kernel_size=3, backend="natten")


@pytest.mark.parametrize(
    ("old", "new"), [("TableBias", RelativePositionBias), ("FactoredBias", DecomposedRelativePositionBias)]
)
def test_the_former_names_of_the_biases(old, new):
    with pytest.warns(DeprecationWarning, match=new.__name__):
        assert getattr(kernels, old) is new
    with pytest.raises(AttributeError, match="Bias2"):
        _ = kernels.Bias2


def test_backend_from_the_environment():
    code = (
        "import torch; from foveal.kernels import *; q = torch.randn(1, 6, 6, 1, 4)\n"
        "try: neighborhood_attention(q, q, q, kernel_size=3)\n"
        "except BackendError as e: print(e)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FOVEAL_BACKEND": "cutlass"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'cutlass'" in run.stdout and dispatch.ENVIRONMENT in run.stdout


def test_threads_share_the_plans():
    leaves = tensors(2, 19, 17, 2, 4)
    CONSTANTS.clear()
    want = neighborhood_attention(*leaves, kernel_size=3, backend="reference")
    results = []
    workers = [
        threading.Thread(target=lambda: results.append(neighborhood_attention(*leaves, kernel_size=3)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for got in results:
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "tiled", "dynamic", FUSED])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_shows(backend, scale):
    q = torch.randn(1, 9, 9, 2, 8)
    assert neighborhood_attention(q, q, q, kernel_size=3, scale=scale, backend=backend).isnan().any()
    out = neighborhood_attention(q, q, q, kernel_size=np.int64(3), dilation=(np.int32(2), 2), backend=backend)
    assert torch.equal(out, neighborhood_attention(q, q, q, kernel_size=3, dilation=2, backend=backend))
