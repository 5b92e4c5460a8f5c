"""Linear layers as convolutions, wherever the layer itself is not asked for; gradients of depthwise convolutions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils.flop_counter import FlopCounterMode

from foveal.backbones import layers, transnext
from foveal.backbones.attention import ChannelNorm


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
    for other, y in (
        (nn.Identity(), x),
        (layer, x[0, 0]),
        (copy.deepcopy(layer).double(), x.double()),
        (nn.Linear(24, 40), x[:0]),
    ):
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


@pytest.mark.parametrize("size", [(2, 14, 14), (1, 14, 14), (1, 7, 7), (3, 13), (1, 1, 1)], ids=str)
def test_compiled_convolutions_have_no_length_of_one(size):
    """Where that is possible; otherwise they convolve a tensor with strides of its own. Any other batch fits, too."""
    layer, nodes = nn.Linear(8, 12), []

    def keep(graph, example_inputs):
        nodes.extend(graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layers.linear(layer, x), backend=keep, fullgraph=True)
    for batch in (size[0], 5):
        x = torch.randn(batch, *size[1:], 8)
        torch.testing.assert_close(compiled(x), layer(x))
    (conv, *_) = [node for node in nodes if node.target is torch.conv2d]
    images, _, *area = conv.args[0].meta["example_value"].shape
    assert min(images, *area) > 1 or "clamp" in str(conv.args[0].target)


@pytest.mark.slow
def test_compiled_maps_of_one_image_have_strides():
    """Not a stride of 0 for the batch, with which PyTorch takes channels-last maps for others."""
    model = nn.Sequential(ChannelNorm(16), nn.Conv2d(16, 16, 7, padding=3, groups=16)).eval()
    x = torch.randn(1, 16, 9, 8).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    with torch.no_grad():
        out, (code, *_) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    calls = [line for line in code.splitlines() if "extern_kernels.convolution(" in line]
    assert calls and not any("(0, 1," in call for call in calls), calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gelu_in_pieces(dtype, monkeypatch):
    monkeypatch.setattr(layers.TanhGELU, "PIECE", 7)
    layer, x = layers.TanhGELU(), 4 * torch.randn(2, 3, 5, 4, dtype=dtype)
    for y in (x, x.contiguous(memory_format=torch.channels_last), x[..., 1:]):
        want, given = F.gelu(y.double(), approximate="tanh").to(dtype), y.clone()
        torch.testing.assert_close(layer(given), want)
        torch.testing.assert_close(given, want)
    leaf = x.clone().requires_grad_(True)
    torch.testing.assert_close(layer(leaf), F.gelu(leaf, approximate="tanh"))
    assert torch.equal(leaf, x)


@pytest.mark.parametrize("size", [(9, 8), (8, 12), (2, 7), (1, 1)], ids=str)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (2, 2, 1), (5, 3, 1), (3, 2, 2)])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_padding_is_tensorflow_s(size, kernel, stride, dilation, groups):
    timms = Conv2dSame(4, 8, kernel, stride, dilation=dilation, groups=groups).double()
    own, x = copy.deepcopy(timms), torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    own.__class__ = layers.ConvSame
    (got, want), tensors = (each(x) for each in (own, timms)), [(x, *each.parameters()) for each in (own, timms)]
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    got, want = (torch.autograd.grad(y, each, grad) for y, each in zip((got, want), tensors, strict=True))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 4), (7, 2), (11, 1), (13, 2)])
def test_gradients_of_a_depthwise_convolution(kernel, dilation):
    """Also of the second order; the kernel may exceed the map."""
    size = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias = torch.randn(2, 3, 9, 6, **size), torch.randn(3, 1, kernel, kernel, **size), torch.randn(3, **size)
    pad = dilation * (kernel // 2)
    out = layers.depthwise_conv(x, weight, bias, dilation)
    assert out.grad_fn.name() == "_DepthwiseConvBackward"
    want = F.conv2d(x, weight, bias, padding=pad, dilation=dilation, groups=3)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    first, known = (torch.autograd.grad(y, (x, weight, bias), grad, create_graph=True) for y in (out, want))
    torch.testing.assert_close(first, known)
    second, known = (torch.autograd.grad(sum(t.square().sum() for t in ts), (x, weight)) for ts in (first, known))
    torch.testing.assert_close(second, known)


def test_gradients_of_a_depthwise_convolution_under_autocast_and_transforms():
    x, weight = torch.randn(2, 3, 9, 6), torch.randn(3, 1, 11, 11, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layers.depthwise_conv(x, weight)
    assert out.dtype == torch.bfloat16
    (got,) = torch.autograd.grad(out.float().square().sum(), weight)
    (want,) = torch.autograd.grad(layers.depthwise_conv(x, weight).square().sum(), weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=0.02 * want.abs().max().item())
    loss = lambda w: layers.depthwise_conv(x, w).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), want, rtol=1e-4, atol=1e-3)


def test_flops_of_a_convolution_with_an_odd_padding_are_its_own():
    conv = layers.ConvSame(8, 8, 3, stride=2, groups=8).eval()
    counts = []
    for device in ("cpu", "meta"):
        with FlopCounterMode(display=False) as counter:
            conv.to(device)(torch.ones(1, 8, 10, 12, device=device))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 8 * 5 * 6 * 9


def test_flops_do_not_depend_on_the_parts_that_are_computed(monkeypatch):
    monkeypatch.setattr(transnext, "HIDDEN", 64)
    mlp, counts = transnext.ConvGLU(4, 8), []
    for device in ("cpu", "meta"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            mlp.to(device)(torch.ones(1, 6, 8, 4, device=device))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 48 * (4 * 16 + 8 * 9 + 8 * 4)
