"""na2d_qk and na2d_av in the layout of NATTEN 0.17: against slow loops, against neighborhood_attention."""

import inspect

import pytest
import torch

from foveal.kernels import RelativePositionBias, backend, neighborhood_attention
from foveal.kernels.compat import na2d_av, na2d_qk

from . import naive
from .test_neighborhood import relative_error

SIZES = [((7, 6), 3, 1), ((9, 11), (5, 3), (1, 3)), ((8, 9), (4, 2), 2), ((14, 14), 13, 1)]
IDS = ["h7w6-k3", "h9w11-k5x3-d1x3", "h8w9-k4x2-d2", "h14w14-k13"]


def pair(x):
    return x if isinstance(x, tuple) else (x, x)


def inputs(size, kernel_size, dtype=torch.float64, batch=2, heads=2, depth=3):
    """query, key, value and rpb: heads first, as NATTEN had them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, *size, depth)] * 3 + [(heads, *(2 * k - 1 for k in pair(kernel_size)))]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True) for s in shapes]


def channels_last(*tensors):
    return [t.permute(0, 2, 3, 1, 4) for t in tensors]


def heads_first(t):
    return t.permute(0, 3, 1, 2, 4)


def test_signatures_are_those_of_natten():
    """Names, order and defaults of natten.functional in NATTEN 0.17: callers pass them either way."""
    ours = [[(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (na2d_qk, na2d_av)]
    empty = inspect.Parameter.empty
    assert ours[0] == [
        ("query", empty),
        ("key", empty),
        ("kernel_size", empty),
        ("dilation", 1),
        ("additional_keys", None),
        ("is_causal", False),
        ("rpb", None),
    ]
    assert ours[1] == [
        ("attn", empty),
        ("value", empty),
        ("kernel_size", empty),
        ("dilation", 1),
        ("additional_values", None),
        ("is_causal", False),
    ]


@pytest.mark.parametrize(("size", "kernel_size", "dilation"), SIZES[:3], ids=IDS[:3])
@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_against_loops(name, size, kernel_size, dilation):
    q, k, v, rpb = (t.detach() for t in inputs(size, kernel_size))
    sizes = pair(kernel_size), pair(dilation)
    with backend(name):
        for bias in (None, rpb):
            got = na2d_qk(q, k, kernel_size, dilation, rpb=bias)
            assert relative_error(got, heads_first(naive.logits(*channels_last(q, k), *sizes, bias))) < 1e-12
        attn = got.softmax(-1)
        want = naive.aggregate(*channels_last(attn, v), *sizes, "shift")
        assert relative_error(na2d_av(attn, v, kernel_size, dilation), heads_first(want)) < 1e-12


@pytest.mark.parametrize(("size", "kernel_size", "dilation"), SIZES, ids=IDS)
@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_the_two_and_a_softmax_are_neighborhood_attention(name, size, kernel_size, dilation):
    leaves = inputs(size, kernel_size)
    q, k, v, rpb = leaves
    grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=v.dtype)
    with backend(name):
        attn = na2d_qk(0.3 * q, k, kernel_size=kernel_size, dilation=dilation, rpb=rpb).softmax(-1)
        out = na2d_av(attn, v, kernel_size=kernel_size, dilation=dilation)
        got = [out, *torch.autograd.grad(out, leaves, grad)]
        out = neighborhood_attention(
            *channels_last(q, k, v),
            kernel_size=kernel_size,
            dilation=dilation,
            bias=RelativePositionBias(rpb),
            scale=0.3,
        )
        want = [heads_first(out), *torch.autograd.grad(heads_first(out), leaves, grad)]
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-11


def test_first_and_second_derivatives():
    q, k, _, rpb = inputs((3, 4), (3, 2), batch=1, depth=2)

    def call(q, k, rpb):
        return na2d_qk(q, k, (3, 2), rpb=rpb)

    assert torch.autograd.gradcheck(call, (q, k, rpb))
    assert torch.autograd.gradgradcheck(call, (q, k, rpb))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    """The logits are rounded once, from float32: half a unit in the last place of the exact sum."""
    q, k, _, _ = (t.detach() for t in inputs((12, 13), 5, dtype, depth=32))
    got = na2d_qk(q, k, 5)
    want = na2d_qk(q.double(), k.double(), 5)
    assert got.dtype == dtype
    assert bool(((got.double() - want).abs() <= 0.51 * torch.finfo(dtype).eps * want.abs() + 1e-5).all())


def test_autocast():
    q, k, v, rpb = inputs((8, 8), 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        attn = na2d_qk(q, k.bfloat16(), 3, rpb=rpb)
        out = na2d_av(attn.softmax(-1), v, 3)
    assert attn.dtype == out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v, rpb)))


def test_compile_in_one_graph_with_gradients():
    torch._dynamo.reset()
    leaves = inputs((8, 8), 3, torch.float32)

    def call(q, k, v, rpb):
        return na2d_av(na2d_qk(q, k, 3, 2, rpb=rpb).softmax(-1), v, 3, 2)

    got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


q, k, v, rpb = (t.detach() for t in inputs((9, 8), 3))
ATTN = torch.zeros(2, 2, 9, 8, 9, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: na2d_qk(q, k, 3, additional_keys=k[:, :, 0]),
            NotImplementedError,
            r"additional_keys .*\[2, 2, 8, 3\]",
        ),
        (lambda: na2d_av(ATTN, v, 3, additional_values=v), NotImplementedError, "additional_values"),
        (lambda: na2d_qk(q, k, 3, is_causal=True), NotImplementedError, "is_causal=True"),
        (lambda: na2d_av(ATTN, v, 3, is_causal=(False, True)), NotImplementedError, r"is_causal=\(False, True\)"),
        (lambda: na2d_qk(q, k, 5, 2), ValueError, "kernel_size 5.*dilation 2.*9"),
        (lambda: na2d_qk(q, k[:, :1], 3), ValueError, r"\(2, 2, 9, 8, 3\).*\(2, 1, 9, 8, 3\)"),
        (lambda: na2d_qk(q[0], k, 3), ValueError, r"query.*\[B, heads, H, W, D\].*\(2, 9, 8, 3\)"),
        (lambda: na2d_av(ATTN, v, 5), ValueError, "attn.*5 x 5.*9"),
        (lambda: na2d_av(ATTN, v[:, :, 1:], 3), ValueError, r"\(2, 2, 9, 8, 9\).*\(2, 2, 8, 8, 3\)"),
        (lambda: na2d_qk(q, k, 3, rpb=rpb[:, 1:]), ValueError, r"rpb.*\[2, 4, 5\].*\[2, 5, 5\]"),
        (lambda: na2d_qk(q, k, 3, rpb=rpb.float()), TypeError, "float64.*float32.*rpb"),
        (lambda: na2d_qk(q, k, 3, rpb=rpb.to("meta")), ValueError, "rpb.*meta.*query.*cpu"),
        (lambda: na2d_qk(q, k.float(), 3), TypeError, "float64.*float32"),
        (lambda: na2d_av([1.0], v, 3), TypeError, "attn.*list"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_not_causal_is_accepted_in_every_spelling():
    for spelling in (False, None, (False, False)):
        assert na2d_qk(q, k, 3, is_causal=spelling).shape == (2, 2, 9, 8, 9)
