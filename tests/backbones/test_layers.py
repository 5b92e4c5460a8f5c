"""Linear layers as convolutions: the layer's output and gradients, wherever the layer itself is not asked for."""

import copy

import pytest
import torch
from torch import nn

from foveal.backbones import layers


@pytest.fixture(autouse=True)
def convolve(monkeypatch):
    monkeypatch.setattr(layers, "CONVOLVE", True)


def convolutions(function, *args) -> int:
    """How often a call convolves."""
    with torch.profiler.profile() as recorded:
        function(*args)
    return sum(event.count for event in recorded.key_averages() if event.key == "aten::conv2d")


@pytest.mark.parametrize("size", [(8, 14, 14), (1, 7, 7), (3, 5), (2, 1, 1), (2, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_convolution_is_the_linear_layer(size, bias):
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(*size, 24, requires_grad=True)
    grad = torch.randn(*size, 40)
    assert convolutions(layers.linear, layer, x) == 1
    tensors = [x, *layer.parameters()]
    out, want = layers.linear(layer, x), layer(x)
    torch.testing.assert_close(out, want)
    assert out.is_contiguous()
    got, want = (torch.autograd.grad(y, tensors, grad) for y in (out, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_layer_itself_is_called_where_it_is_asked_for():
    layer, x, called = nn.Linear(24, 40), torch.randn(2, 3, 3, 24), []
    hooked = copy.deepcopy(layer)
    hooked.register_forward_hook(lambda *_: called.append(1))
    assert convolutions(layers.linear, hooked, x) == 0 and called
    with torch.autocast("cpu", torch.bfloat16):
        assert layers.linear(layer, x).dtype == torch.bfloat16
    for other, y in ((nn.Identity(), x), (layer, x[0, 0]), (copy.deepcopy(layer).double(), x.double()), (nn.Linear(24, 40), x[:0])):
        assert convolutions(layers.linear, other, y) == 0
    assert torch.func.vmap(lambda each: layers.linear(layer, each))(x).shape == (2, 3, 3, 40)
    ((node,),) = (
        [n.target for n in torch.export.export(_Wrapped(layer), (x,)).graph.nodes if n.op == "call_function"],
    )
    assert node is torch.ops.aten.linear.default


class _Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layers.linear(self.layer, x)


def test_the_parts_of_an_mlp_are_called():
    """Dropout, the norm and the activation; compiled as one graph."""
    mlp = layers.Mlp(24, 48, norm_layer=nn.LayerNorm, drop=0.5).eval()
    x = torch.randn(2, 4, 4, 24)
    want = mlp.fc2(mlp.norm(mlp.act(mlp.fc1(x))))
    torch.testing.assert_close(mlp(x), want)
    torch.testing.assert_close(torch.compile(mlp, backend="eager", fullgraph=True)(x), want)
    assert (mlp.train()(x) == 0).any()
