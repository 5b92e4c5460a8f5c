"""neighborhood_mix: every backend against slow loops, its biases, boundaries and errors."""

import math

import pytest
import torch

from foveal.kernels import RelativePositionBias, neighborhood_mix
from foveal.kernels.aggregate.softmax import expand_table
from foveal.kernels.window import Window

from . import naive
from .test_neighborhood import relative_error

CASES = {
    "h5w6-k3": ((5, 6), (3, 3), (1, 1)),
    "h6w7-k4x3-d1x2": ((6, 7), (4, 3), (1, 2)),
}


def leaves_of(size, kernel_size, dtype=torch.float64, heads=2, depth=3, seed=0, batch=2):
    """Logits, values, table and kernel bias, that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    area, table = math.prod(kernel_size), [2 * k - 1 for k in kernel_size]
    shapes = (batch, *size, heads, area), (batch, *size, heads, depth), (heads, *table), (area,)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True) for s in shapes]


def by_loops(logits, v, table, kernel_bias, kernel_size, dilation, boundary):
    """The softmax query by query, in a way that is differentiable; then the sum over the window."""
    _, height, width, heads, _ = v.shape
    out = []
    for y in range(height):
        for x in range(width):
            rows = naive.window(y, height, kernel_size[0], 1, dilation[0], boundary)
            columns = naive.window(x, width, kernel_size[1], 1, dilation[1], boundary)
            z, values = [], []
            for i, (ky, row) in enumerate(rows):
                for j, (kx, column) in enumerate(columns):
                    outside = ky is None or kx is None
                    if outside and boundary == "mask":
                        continue
                    t = i * kernel_size[1] + j
                    z.append(logits[:, y, x, :, t] + table[:, row, column] + kernel_bias[t])
                    values.append(torch.zeros_like(v[:, 0, 0]) if outside else v[:, ky, kx])
            weights = torch.stack(z, -1).softmax(-1)
            out.append(torch.einsum("bnk,bnkd->bnd", weights, torch.stack(values, 2)))
    return torch.stack(out, 1).view(v.shape[0], height, width, heads, -1)


def with_gradients(function, leaves):
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("boundary", ["shift", "zero", "mask"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["reference", "tiled", "dynamic"])
def test_against_loops(name, case, boundary):
    size, kernel_size, dilation = CASES[case]
    leaves = leaves_of(size, kernel_size)
    options = {"kernel_size": kernel_size, "dilation": dilation, "boundary": boundary}

    def mix(logits, v, table, kernel_bias):
        return neighborhood_mix(
            logits, v, bias=RelativePositionBias(table), kernel_bias=kernel_bias, backend=name, **options
        )

    got = with_gradients(mix, leaves)
    want = with_gradients(lambda *tensors: by_loops(*tensors, **options), leaves)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("boundary", ["shift", "zero", "mask"])
def test_compiled_with_the_gradients_of_eager_mode(boundary):
    options = {"kernel_size": (4, 3), "dilation": (1, 2), "boundary": boundary}
    leaves = leaves_of((6, 7), (4, 3))

    def mix(logits, v, table, kernel_bias):
        return neighborhood_mix(logits, v, bias=RelativePositionBias(table), kernel_bias=kernel_bias, **options)

    torch._dynamo.reset()
    got = with_gradients(torch.compile(mix, fullgraph=True, backend="aot_eager"), leaves)
    assert max(relative_error(a, b) for a, b in zip(got, with_gradients(mix, leaves), strict=True)) < 1e-12


def test_biases_are_added_to_the_logits():
    logits, v, table, kernel_bias = leaves_of((5, 5), (3, 3))
    expanded = expand_table(table, Window(3), Window(3), (5, 5)).permute(1, 2, 0, 3)
    want = neighborhood_mix(logits + expanded + kernel_bias, v, kernel_size=3)
    got = neighborhood_mix(logits, v, kernel_size=3, bias=RelativePositionBias(table), kernel_bias=kernel_bias)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        neighborhood_mix(logits, v, kernel_size=3, kernel_bias=kernel_bias),
        neighborhood_mix(logits + kernel_bias, v, kernel_size=3),
    )


def test_autocast_casts_logits_and_values_alone():
    leaves = leaves_of((6, 6), (3, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = neighborhood_mix(*leaves[:2], kernel_size=3, bias=RelativePositionBias(leaves[2]), kernel_bias=leaves[3])
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), leaves)] == [torch.float32] * 4


def test_expanded_tables_are_not_tied_to_the_mode_that_made_them():
    table = torch.randn(2, 9, 9)
    with torch.inference_mode():
        want = expand_table(table, Window(5), Window(5), (11, 6))
    table.requires_grad_(True)
    got = expand_table(table, Window(5), Window(5), (11, 6))
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert table.grad.sum() == math.prod(got.shape)


def test_errors_name_the_values():
    logits, v, table, kernel_bias = leaves_of((5, 5), (3, 3))
    with pytest.raises(ValueError, match=r"table.*\(2, 5, 5\).*\(2, 5, 4\)"):
        neighborhood_mix(logits, v, kernel_size=3, bias=RelativePositionBias(table[..., :4]))
    with pytest.raises(ValueError, match=r"kernel_bias.*\(9,\).*\(8,\)"):
        neighborhood_mix(logits, v, kernel_size=3, kernel_bias=kernel_bias[:8])
    with pytest.raises(ValueError, match=r"logits.*3 x 3"):
        neighborhood_mix(logits[..., :8], v, kernel_size=3)
    with pytest.raises(TypeError, match=r"bias.*Tensor"):
        neighborhood_mix(logits, v, kernel_size=3, bias=table)
