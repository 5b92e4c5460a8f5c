"""Layers and helpers shared by several families."""

from __future__ import annotations

import math
import operator
import platform
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding, trunc_normal_
from timm.models import checkpoint_seq
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import has_static_value, statically_known_true
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchvision.ops import FrozenBatchNorm2d


def fx_leaf(function: Callable) -> Callable:
    """Make a function, or the ``forward`` of a module, one node for ``torch.fx``: it may branch on sizes and dtypes.

    timm's ``register_notrace_module`` and ``register_notrace_function`` do so for timm's tracer alone. Here the call
    itself records the node, so that it is one for every tracer (torchvision's ``create_feature_extractor``,
    ``symbolic_trace``, the quantizers). Positional arguments only.
    """

    @wraps(function)
    def recorded(*args):
        proxy = next((x for x in args if isinstance(x, torch.fx.Proxy)), None)
        if proxy is None:
            return function(*args)
        if isinstance(args[0], nn.Module):
            path = proxy.tracer.path_of_module(args[0])
            return proxy.tracer.create_proxy("call_module", path, args[1:], {})
        return proxy.tracer.create_proxy("call_function", recorded, args, {})

    return recorded


def refuse_scripting(module: nn.Module) -> nn.Module:
    """What torch.jit.script calls first, as ``__prepare_scriptable__`` of a module that it cannot compile."""
    raise NotImplementedError(
        f"torch.jit.script cannot compile {type(module).__name__}, which plans by the size of its maps in Python: use "
        "torch.export, torch.compile or torch.jit.trace"
    )


@fx_leaf
def scale_channels(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, C, H, W]`` times ``gamma`` ``[C]``. A view of a parameter taken outside would be a constant to fx."""
    return gamma[:, None, None] * x


@fx_leaf
def add_scaled(x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """``x`` plus `scale_channels` of ``y`` in one pass."""
    return torch.addcmul(x, gamma[:, None, None], y)


def scaled(x: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
    """``x`` times the factors of LayerScale, or as it is without any."""
    return x if gamma is None else gamma * x


@fx_leaf
def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` in that memory format; as it is under ``torch.func.vmap``, which does not know it."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=torch.channels_last)


@fx_leaf
def for_convolution(x: torch.Tensor) -> torch.Tensor:
    """A view ``[B, C, H, W]`` of a channels-last map, as it is, but `with_strides` of its own in compiled code for one
    image on a CPU."""
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return with_strides(x) if compiled and x.device.type == "cpu" and x.shape[0] == 1 else x


def with_strides(x: torch.Tensor) -> torch.Tensor:
    """A view as a tensor of its own, for compiled convolutions. Inductor gives lengths of 1 in a view the stride 0,
    with which PyTorch takes a channels-last map for NCHW: a depthwise convolution then takes four times as long."""
    return x.clamp(min=-math.inf)  # fused with what computes the map; a clone would be removed


class Blocks(nn.Sequential):
    """A sequence of blocks, recomputed in the backward pass if ``grad_checkpointing`` is set."""

    grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self, x)
        return super().forward(x)


class Stage(nn.Module):
    """Blocks at one resolution, after a ``downsample`` and before a ``norm`` unless these are None."""

    def __init__(
        self, blocks: Sequence[nn.Module] | Blocks, downsample: nn.Module | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = blocks if isinstance(blocks, Blocks) else Blocks(*blocks)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(x if self.downsample is None else self.downsample(x))
        return x if self.norm is None else self.norm(x)


class Level(nn.Module):
    """Blocks at one resolution, then the downsampler to the next (none after the last level)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = Blocks(*blocks)
        self.downsample = downsample if downsample is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.downsample(self.blocks(x))


def init_weights(module: nn.Module) -> None:
    """Linear layers from a normal with std 0.02 truncated at two std, biases 0; PyTorch's defaults for the rest."""
    for m in module.modules():
        if isinstance(m, nn.Linear) and not m.weight.is_meta:
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def init_convs(module: nn.Module) -> None:
    """Convolutions from a normal with variance 2 / (outputs of an input value, per group), biases 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=math.sqrt(2 / (m.weight.numel() / m.in_channels)))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class Classifiers(nn.ModuleList):
    """Two classifiers that are initialized as one: in-place changes of ``weight`` or ``bias`` (``mul_``, ``fill_``, as
    in ``nn.init.constant_`` and timm's ``--head-init-scale``) apply to both."""

    @property
    def weight(self) -> _Both:
        layers: Any = self
        return _Both(*(layer.weight for layer in layers))

    @property
    def bias(self) -> _Both:
        layers: Any = self
        return _Both(*(layer.bias for layer in layers))


class _Both:
    """Two parameters, with the in-place methods of tensors."""

    def __init__(self, *parameters: nn.Parameter) -> None:
        self.parameters = parameters

    def __getattr__(self, name: str) -> Callable[..., _Both]:
        if not name.endswith("_") or name.endswith("__"):
            raise AttributeError(f"a network with two classifiers has two of {name!r}: iterate over get_classifier()")

        def change(*args: Any, **kwargs: Any) -> _Both:
            for parameter in self.parameters:
                getattr(parameter, name)(*args, **kwargs)
            return self

        return change


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth rates, linear over all blocks from 0 to ``rate``, split by level."""
    last = max(sum(depths) - 1, 1)
    rates = iter([rate * i / last for i in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def to_format(x: torch.Tensor, output_fmt: str, own: str = "NHWC") -> torch.Tensor:
    """Convert a map from the format ``own`` to ``"NHWC"`` or ``"NCHW"``, as a view."""
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f'output_fmt must be "NCHW" or "NHWC", got {output_fmt!r}')
    if output_fmt == own:
        return x
    return x.permute(0, 3, 1, 2) if own == "NHWC" else x.permute(0, 2, 3, 1)


def positive_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """An int or a pair as (rows, columns); ValueError with ``name`` for anything else and for lengths below 1."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(length, (int, np.integer)) and length > 0 for length in pair):
        raise ValueError(f"{name} must be a positive int or a pair (rows, columns) of them, got {value!r}")
    return int(pair[0]), int(pair[1])


def plain_numbers(value: Any) -> Any:
    """NumPy's numbers and arrays, also in lists, tuples and dictionaries, as Python's, which JSON and timm know."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain_numbers(each) for key, each in value.items()}
    return type(value)(plain_numbers(each) for each in value) if type(value) in (list, tuple) else value


class ConvSame(Conv2dSame):
    """timm's convolution with TensorFlow's padding, which depends on the size, as one node of a graph.

    Padding a map would copy it, which takes up to ten times as long as a depthwise convolution. Equal padding on both
    sides is the convolution's own; one position more after the map is, too, if the kernel begins with a zero."""

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # maybe of any size
            return super().forward(x)
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        padding = [operator.index(get_same_padding(*side)) for side in sides]
        odd, weight = [p % 2 for p in padding], self.weight
        if any(odd):
            if x.device.type != "cpu" or self.groups == 1 or max(self.dilation) > 1 or in_mode():
                return super().forward(x)
            weight = F.pad(weight, (odd[1], 0, odd[0], 0))
        padding = [p // 2 + extra for p, extra in zip(padding, odd, strict=True)]
        return F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)


# ---- children that a parent need not call

_PLAIN = (nn.Linear, nn.Conv2d, ConvSame, nn.Identity)
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def computes_with_own(module: nn.Module) -> bool:
    """Whether a module computes with its own parameters. Not so with pruning, weight norm and other parametrizations or
    offloading (which recompute or load them before the forward), quantization or sharding."""
    recomputed = module._forward_pre_hooks or "parametrizations" in module._modules or "forward" in module.__dict__
    return not recomputed and not any(is_traceable_wrapper_subclass(p) for p in module._parameters.values())


def is_plain(module: nn.Module) -> bool:
    """Whether a parent may use a child's parameters instead of calling it: the child is a plain Linear or convolution,
    not wrapped or replaced, and has no hooks."""
    hooks = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in _PLAIN and not hooks and computes_with_own(module)


def is_fixed(norm: Any) -> bool:
    """Whether a parent may use a BatchNorm's statistics instead of calling it: as `is_plain`, in evaluation mode and
    with statistics."""
    hooks = norm._forward_hooks or norm._backward_hooks or norm._backward_pre_hooks
    whole = type(norm) in _BATCH_NORMS and norm.running_var is not None and norm.weight is not None
    return whole and not norm.training and not hooks and computes_with_own(norm)


def check_foldable(conv: nn.Module, norm: nn.Module) -> None:
    """Raise a ValueError unless both modules compute with their own parameters, so that they can be folded."""
    for module in (conv, norm):
        if not computes_with_own(module) or (module is conv and type(conv) not in _PLAIN):
            raise ValueError(
                f"a {type(module).__name__} that is wrapped, parametrized, pruned or offloaded cannot be folded: make "
                "its weights plain first (merge adapters, remove parametrizations and hooks)"
            )


def fold_batch_norm(conv: nn.Conv2d, norm: Any) -> bool:
    """Fold a BatchNorm, also a synchronized or frozen one, into the convolution before it; False for other modules.

    Raises:
        ValueError: from `check_foldable`.
    """
    if getattr(norm, "running_var", None) is None:
        return False
    check_foldable(conv, norm)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.bias.requires_grad_(conv.weight.requires_grad)
    return True


# ---- linear layers as convolutions


def _mkl_lacks_avx512() -> bool:
    """Whether this is an AMD CPU with AVX-512."""
    name, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        with info.open() as file:
            name = file.read(256)  # of the first core
    return "AuthenticAMD" in name and torch.backends.cpu.get_cpu_capability() == "AVX512"


# PyTorch's float32 products are MKL's, which on AMD uses AVX2 alone; convolutions are oneDNN's, with AVX-512: twice as
# fast.
CONVOLVE = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and _mkl_lacks_avx512()


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)`` of a Linear, or what a user put in its place, on ``[..., C]``; as a 1x1 convolution if `CONVOLVE`,
    on a CPU in float32."""
    return _convolve(x, layer.weight, layer.bias) if _as_convolution(layer, x) else layer(x)


def half_linear(layer: nn.Linear, x: torch.Tensor, half: int) -> torch.Tensor:
    """The first or second half, 0 or 1, of the outputs of `linear`, for a layer that `is_plain` and has a bias."""
    weight, bias = layer.weight.chunk(2)[half], layer.bias.chunk(2)[half]
    return _convolve(x, weight, bias) if _as_convolution(layer, x) else F.linear(x, weight, bias)


def _as_convolution(layer: nn.Module, x: torch.Tensor) -> bool:
    if not CONVOLVE or isinstance(x, torch.fx.Proxy) or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if type(layer) is not nn.Linear or not is_plain(layer) or layer.weight.dtype != torch.float32:
        return False
    return x.ndim > 2 and x.numel() > 0 and not _needs_products()


def _convolve(x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
    compiling, inner = torch.compiler.is_compiling(), x.shape[1:-1]
    if compiling and all(has_static_value(length) for length in inner):
        images, height, width = _images(math.prod(inner), 2 if x.shape[0] == 1 else 1)
        maps = x.reshape(x.shape[0] * images, height, width, x.shape[-1]).permute(0, 3, 1, 2)
        if height == 1 or maps.shape[0] == 1:
            maps = with_strides(maps)
    else:  # PyTorch convolves fewer than 16 images by MKL's products if it has one thread
        rows = x.numel() // x.shape[-1]
        images = 16 if not compiling and rows % 16 == 0 else rows // x.shape[-2]
        maps = x.reshape(images, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(maps, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@torch.compiler.assume_constant_result
def _images(count: int, fewest: int) -> tuple[int, int, int]:
    """``count`` pixels as images of some rows and columns, not of one (see `with_strides`), if possible: of 49 pixels
    and more, and at least ``fewest``, at best 16 or more."""
    sizes = ((images, count // images) for images in range(1, count + 1) if count % images == 0)
    found = [(n, h, area // h) for n, area in sizes for h in range(2, math.isqrt(area) + 1) if area % h == 0]
    default = (1, 1, count)
    return max(found, key=lambda s: (s[1] * s[2] >= 49, s[0] >= fewest, min(s[0], 16)), default=default)


def _needs_products() -> bool:
    """Whether an exporter, a transform, a hook or autocast expects the layer itself."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return True
    if torch.compiler.is_compiling():
        return False
    return _has_any_global_hook() or torch._C._are_functorch_transforms_active()


class Mlp(timm_layers.Mlp):
    """timm's MLP, its layers by `linear`; GELU in place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.act) is nn.GELU:
            self.act = GELU((self, "fc1"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.drop1(self.act(linear(self.fc1, x))))
        return self.drop2(linear(self.fc2, x))


class PreNormBlock(nn.Module):
    """The block of ViT: attention and an MLP with GELU, each with a LayerNorm before it, a residual and DropPath. More
    arguments of `forward` are the attention's."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = timm_layers.DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), *args))
        return x + self.drop_path(self.mlp(self.norm2(x)))


# ---- depthwise convolutions with faster gradients

FFT_TAPS = 121  # of a kernel whose gradient is faster by FFT


@fx_leaf
def depthwise_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dilation: int = 1
) -> torch.Tensor:
    """Depthwise convolution of ``[B, C, H, W]`` with odd kernels ``[C, 1, K, K]`` to the same size.

    On a CPU in eager mode with gradients that oneDNN takes up to 20 times as long for."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not wanted or x.device.type != "cpu" or for_operators(*tensors):
        return F.conv2d(
            x, weight, bias, padding=dilation * (weight.shape[2] // 2), dilation=dilation, groups=x.shape[1]
        )
    if torch.is_autocast_enabled("cpu"):
        tensors = [t.to(torch.get_autocast_dtype("cpu")) for t in tensors]
    return _DepthwiseConv.apply(dilation, *tensors)


def in_mode() -> bool:
    """Whether a mode, such as a counter of FLOPs, sees the operations: none may compute more than a module asks for."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def for_operators(*tensors: torch.Tensor) -> bool:
    """Whether a tracer, a transform or a tensor subclass expects standard operators."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 or any(type(t) not in (torch.Tensor, nn.Parameter) for t in tensors)


class _DepthwiseConv(torch.autograd.Function):
    """The gradient of the input is a convolution with the kernel turned by 180 degrees; that of a large kernel a
    correlation by FFT, in float32."""

    @staticmethod
    def forward(ctx, dilation, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        ctx.options = dict(padding=dilation * (weight.shape[2] // 2), dilation=dilation, groups=len(weight))
        return F.conv2d(x, weight, bias, **ctx.options)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        _, wants_x, wants_weight, *wants_bias = ctx.needs_input_grad
        dx = F.conv2d(grad, weight.flip(2, 3), **ctx.options) if wants_x else None
        dw = _kernel_grad(x, grad, weight, **ctx.options) if wants_weight else None
        return None, dx, dw, *(grad.sum((0, 2, 3)) if wanted else None for wanted in wants_bias)


def _kernel_grad(
    x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, padding: int, dilation: int, groups: int
) -> torch.Tensor:
    k = weight.shape[2]
    x, grad = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, grad))
    if k * k < FFT_TAPS:
        options = [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], groups, [False, True, False]
        return torch.ops.aten.convolution_backward(grad, x, weight.to(x.dtype), None, *options)[1].to(weight.dtype)
    size = [length + padding for length in x.shape[2:]]
    spectrum = [torch.fft.rfft2(t.contiguous(), s=size) for t in (x, grad)]
    correlation = torch.fft.irfft2((spectrum[0] * spectrum[1].conj()).sum(0), s=size)
    rows, columns = (torch.arange(-padding, padding + 1, dilation, device=x.device) % length for length in size)
    return correlation[:, None, rows[:, None], columns].to(weight.dtype)


# ---- activations in place, which on a CPU saves as much time as the activation itself takes


def may_overwrite(x: torch.Tensor, computed_by: nn.Module | None = None) -> bool:
    """Whether the output of a module (None: of no module) may be overwritten: no gradient, hook, graph or transform
    needs it."""
    if for_operators(x) or type(computed_by) is nn.Identity:  # any node of a graph may be taken out of it
        return False
    if (torch.is_grad_enabled() and x.requires_grad) or _has_any_global_hook():
        return False
    return computed_by is None or is_plain(computed_by)


def unwatched(module: nn.Module) -> bool:
    """Whether nothing but its caller holds the output of a module that makes a new one: it has no hooks."""
    hooks = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and computes_with_own(module)


def gelu_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """GELU of a layer's output, in place where it may be."""
    y = layer(x)
    return torch.ops.aten.gelu_(y) if may_overwrite(y, layer) else F.gelu(y)


def sum_of(x: torch.Tensor, layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """``x + layer(y)``, in the memory of the layer's output where it may be."""
    y = layer(y)
    return y.add_(x) if may_overwrite(y, layer) and x.dtype == y.dtype else x + y


def in_inference(x: torch.Tensor, *children: nn.Module) -> bool:
    """Whether a parent may compute its output in parts and in place, by the parameters of its children, from ``x`` on:
    in eager mode, where no gradient is needed and no hook or replaced child expects the whole."""
    if not may_overwrite(x) or in_mode():
        return False
    modules = [m for child in children for m in child.modules()]
    wanted = torch.is_grad_enabled() and any(p.requires_grad for child in children for p in child.parameters())
    return not wanted and all(is_plain(m) or (m._modules and unwatched(m)) for m in modules)


class _InPlace:
    """An activation that overwrites its input in inference, unless a hook may hold it.

    Args:
        after: (parent, name) of the child that returns the input; None if the caller has just computed it.
    """

    def __init__(self, after: tuple[nn.Module, str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.after = after

    def overwrites(self, x: torch.Tensor) -> bool:
        module: Any = self
        hooks = module._forward_pre_hooks or module._forward_hooks
        return not hooks and may_overwrite(x, None if self.after is None else getattr(*self.after))


class ReLU(_InPlace, nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu_(x) if self.overwrites(x) else F.relu(x)


class SiLU(_InPlace, nn.SiLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x, inplace=self.overwrites(x))


class GELU(_InPlace, nn.GELU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.overwrites(x):
            return torch.ops.aten.gelu_(x, approximate=self.approximate)
        return F.gelu(x, approximate=self.approximate)


class TanhGELU(GELU):
    """The tanh form of GELU. In place on a CPU as ``x * sigmoid(u)``, whose exponential takes half as long as a tanh,
    through float32 in pieces that stay in the cache."""

    PIECE = 1 << 16

    def __init__(self, after: tuple[nn.Module, str] | None = None) -> None:
        super().__init__(after, approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.overwrites(x) or x.device.type != "cpu":
            return super().forward(x)
        if not (x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            return super().forward(x)
        factor = 2 * math.sqrt(2 / math.pi)
        gate, wide = x.new_empty(2, min(x.numel(), self.PIECE), dtype=torch.promote_types(x.dtype, torch.float32))
        for piece in x.as_strided((x.numel(),), (1,)).split(self.PIECE):
            u, y = gate[: len(piece)], piece
            if piece.dtype != wide.dtype:
                y = wide[: len(piece)].copy_(piece)
            torch.mul(y, y, out=u).mul_(0.044715 * factor).add_(factor).mul_(y).sigmoid_().mul_(y)
            piece.copy_(u)
        return x


def guard_activations(model: nn.Module) -> None:
    """Keep activations of timm's layers from overwriting tensors that a hook may hold; changes the model in place.
    Those after a BatchNorm or the sum of a residual block become `ReLU` and `SiLU`; others no longer work in place."""
    for parent in list(model.modules()):
        residual = getattr(parent, "shortcut", None) is not None
        for name, child in list(parent.named_children()):
            guarded = {nn.ReLU: ReLU, nn.SiLU: SiLU}.get(type(child))
            if guarded and isinstance(parent, BatchNormAct2d):
                setattr(parent, name, guarded((parent, "drop")).train(child.training))
            elif guarded and residual and name == "act":
                setattr(parent, name, guarded().train(child.training))
            elif getattr(child, "inplace", False):
                child.inplace = False


def shortfall(length: int, least: int) -> int:
    """``max(0, least - length)``, also for dynamic sizes."""
    if statically_known_true(length >= least):
        return 0
    longer: Any = torch.sym_max(length, least)
    return longer - length


@fx_leaf
def average_pool(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``F.adaptive_avg_pool2d`` of ``[B, C, H, W]`` for dynamic sizes, as a matrix product for each axis."""
    return _by_products(x, size, _average_matrix)


@fx_leaf
def bicubic(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``F.interpolate`` of ``[B, C, H, W]`` by bicubic interpolation; for exports as a matrix product for each axis, as
    the cubic resize of onnxruntime does not shrink channels-last maps."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return _by_products(x, size, _bicubic_matrix)
    return F.interpolate(x, size=tuple(size), mode="bicubic", align_corners=False)


@fx_leaf
def bilinear(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``F.interpolate`` of ``[B, C, H, W]`` by bilinear interpolation, for exports as `bicubic`; as it is if it has the
    size, unless that is dynamic."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return _by_products(x, size, _bilinear_matrix)
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _by_products(x: torch.Tensor, size: Sequence[int], matrix: Callable[..., torch.Tensor]) -> torch.Tensor:
    """``x`` ``[B, C, H, W]`` times a matrix ``[target, source]`` for each axis."""
    for target in (size[1], size[0]):
        factors = matrix(x.shape[3], target, x.device).to(x.dtype)
        # two dimensions each, without broadcasting, for which exporters guard on lengths of 1
        lines = x.clone(memory_format=torch.contiguous_format).flatten(0, 2)
        batch = -1 if torch.jit.is_tracing() else x.shape[0]  # which torch.jit.trace would record
        x = (lines @ factors.t()).unflatten(0, (batch, *x.shape[1:3])).transpose(2, 3)
    return x


def _average_matrix(source: int, target: int, device: torch.device) -> torch.Tensor:
    number = torch.arange(target, device=device)[:, None]
    length = torch.full((), source, dtype=torch.int64, device=device)
    start = torch.div(number * length, target, rounding_mode="floor")
    stop = torch.div((number + 1) * length + (target - 1), target, rounding_mode="floor")
    position = torch.arange(source, device=device)
    inside = (position >= start) & (position < stop)
    return inside / (stop - start)


def _bilinear_matrix(source: int, target: int, device: torch.device) -> torch.Tensor:
    length, count = (torch.full((), each, dtype=torch.float32, device=device) for each in (source, target))
    at = ((torch.arange(target, device=device)[:, None] + 0.5) * (length / count) - 0.5).clamp(min=0)
    at = torch.minimum(at, length - 1)
    return (1 - (at - torch.arange(source, device=device)).abs()).clamp(min=0)


def _bicubic_matrix(source: int, target: int, device: torch.device) -> torch.Tensor:
    """Keys' cubic convolution with a = -0.75; positions beyond the border are those at it."""
    length, count = (torch.full((), each, dtype=torch.float32, device=device) for each in (source, target))
    at = (torch.arange(target, device=device)[:, None] + 0.5) * (length / count) - 0.5
    first, position, matrix = at.floor(), torch.arange(source, device=device), 0.0
    for step in (-1, 0, 1, 2):
        distance = (at - first - step).abs()
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        tap = torch.minimum((first + step).clamp(min=0), length - 1)
        matrix = matrix + torch.where(distance <= 1, near, far) * (tap == position)
    return matrix
