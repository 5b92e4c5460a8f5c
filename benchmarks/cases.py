"""The benchmark cases: layer shapes of published models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels import flops
from ..kernels.window import Window


@dataclass(frozen=True)
class Layer:
    """A call of a neighborhood operation, and its count in the model."""

    operation: str  # "attention", "aggregate", or "mix": an aggregation with a softmax of logits
    shape: tuple[int, ...]  # B, H, W, N, D of the keys; of the values of an aggregation
    queries: tuple[int, int]
    value_depth: int
    rows: Window
    columns: Window
    bias: str  # "table", "factored" or "none"
    count: int = 1
    name: str = ""

    @property
    def map(self) -> str:
        return f"{self.shape[1]}x{self.shape[2]}"

    @property
    def id(self) -> str:
        if self.operation == "attention":
            return f"{self.map} d{self.rows.dilation}"
        return f"{self.map} k{self.rows.kernel_size} depth {self.shape[4]}"

    @property
    def rule(self) -> str:
        pairs = {
            "k": (self.rows.kernel_size, self.columns.kernel_size),
            "s": (self.rows.stride, self.columns.stride),
            "d": (self.rows.dilation, self.columns.dilation),
            "q": (self.rows.query_stride, self.columns.query_stride),
        }
        shown = {name: pair for name, pair in pairs.items() if name == "k" or pair != (1, 1)}
        if (offset := (self.rows.offset, self.columns.offset)) != (0, 0):
            shown["o"] = offset
        return " ".join(f"{name}{a}" if a == b else f"{name}{a}x{b}" for name, (a, b) in shown.items())

    @property
    def pairs(self) -> int:
        """Query-key pairs of all images and heads."""
        batch, _, _, heads, _ = self.shape
        return batch * heads * math.prod(self.queries) * self.rows.kernel_size * self.columns.kernel_size

    @property
    def options(self) -> dict[str, Any]:
        both = (self.rows, self.columns)
        found: dict[str, Any] = {
            "kernel_size": tuple(w.kernel_size for w in both),
            "dilation": tuple(w.dilation for w in both),
            "boundary": self.rows.boundary,
        }
        if self.operation == "attention":
            found |= {name: tuple(getattr(w, name) for w in both) for name in ("stride", "query_stride", "offset")}
        return found

    def flops(self, backward: bool) -> int:
        """FLOPs of a forward pass, or of forward and backward with recomputed probabilities."""
        directions = (False, True) if backward else (False,)
        if self.operation != "attention":
            return sum(flops.aggregation(self.pairs, self.value_depth, each) for each in directions)
        return sum(flops.attention(self.pairs, self.shape[4], self.value_depth, each) for each in directions)

    def bytes(self, backward: bool, item: int = 2) -> int:
        """Minimum memory traffic: each tensor once in forward, and once in backward each that is read or written."""
        batch, height, width, heads, depth = self.shape
        keys = batch * height * width * heads
        if self.operation != "attention":
            forward = self.pairs + 2 * keys * depth
            return item * (forward + 2 * self.pairs + 3 * keys * depth if backward else forward)
        queries = batch * math.prod(self.queries) * heads
        # the backward reads q, k, v, o and the gradient of o, and writes those of q, k and v: twice the forward
        return item * (queries + keys) * (depth + self.value_depth) * (3 if backward else 1)


def _attention(level: int, dilation: int) -> Layer:
    size, window = 56 >> level, Window(7, dilation=dilation)
    shape = (8, size, size, 2 << level, 32)
    return Layer("attention", shape, (size, size), 32, window, window, "table", name=f"level {level}")


# DiNAT-Tiny at 224 (arXiv 2209.15001), batch 8: one layer per level and dilation.
DINAT_TINY = tuple(_attention(*each) for each in ((0, 1), (0, 8), (1, 1), (1, 4), (2, 1), (2, 2), (3, 1)))


def _aggregate(name: str, rows: int, columns: int, heads: int, depth: int, kernel_size: int, batch: int = 8) -> Layer:
    window, shape = Window(kernel_size), (batch, rows, columns, heads, depth)
    return Layer("aggregate", shape, (rows, columns), depth, window, window, "none", name=name)


# OverLoCK-XT (arXiv 2502.20087): both kernels of its stages at 224, one also with heads of twice the depth, and stage 3
# at the sizes of segmentation and detection.
OVERLOCK_XT = (
    _aggregate("stage 3, 224", 14, 14, 8, 16, 13),
    _aggregate("stage 3, 224", 14, 14, 8, 16, 5),
    _aggregate("stage 3, 224", 14, 14, 8, 32, 13),
    _aggregate("stage 4, 224", 7, 7, 12, 14, 7),
    _aggregate("stage 4, 224", 7, 7, 12, 14, 5),
    _aggregate("stage 3, 448", 28, 28, 8, 16, 13, 2),
    _aggregate("stage 3, 448", 28, 28, 8, 16, 5, 2),
    _aggregate("stage 3, 800x1216", 50, 76, 8, 16, 13, 1),
    _aggregate("stage 3, 800x1216", 50, 76, 8, 16, 5, 1),
)


@dataclass(frozen=True)
class CompiledLayer:
    """A layer whose kernels are compiled for a GPU that need not be there."""

    layer: Layer
    dtype: str = "bfloat16"

    @property
    def id(self) -> str:
        layer = self.layer
        return f"{layer.operation} {layer.map} {layer.rule} {layer.bias} depth {layer.shape[4]} {self.dtype}"


def _compiled(
    size: int, heads: int, window: Window, bias: str = "table", depth: int = 32, dtype: str = "bfloat16"
) -> CompiledLayer:
    operation = "mix" if bias == "mix" else "attention"
    shape, queries = (128, size, size, heads, depth), (window.queries(size),) * 2
    return CompiledLayer(Layer(operation, shape, queries, depth, window, window, bias.replace("mix", "table")), dtype)


# DiNAT-T at 224 first; then without a bias, deeper heads, another dtype; HaloNet, MaxViT and OverLoCK.
COMPILED = (
    _compiled(56, 2, Window(7)),
    _compiled(56, 2, Window(7, dilation=8)),
    _compiled(28, 4, Window(7)),
    _compiled(14, 8, Window(7, dilation=2)),
    _compiled(56, 2, Window(7), "none"),
    _compiled(56, 2, Window(7), depth=64),
    _compiled(56, 2, Window(7), dtype="float16"),
    _compiled(32, 4, Window(14, 8, boundary="zero"), "factored"),
    _compiled(56, 2, Window(7, 7, boundary="mask")),
    *(_compiled(size, 8, Window(k), "mix", 16) for size, k in ((14, 5), (7, 7), (14, 13), (28, 17))),
)


@dataclass(frozen=True)
class LayersCase:
    """The distinct neighborhood operations, or halo attention modules of timm, in a model at an image size."""

    model: str
    batch: int
    rows: int
    columns: int

    @property
    def id(self) -> str:
        return f"{self.model} {self.batch}x{self.rows}x{self.columns}"


# DiNAT-T first, for which the targets are set; then the largest, the higher resolution, and the maps of a detector.
GPU_LAYERS = (
    LayersCase("dinat_tiny", 128, 224, 224),
    LayersCase("dinat_large", 128, 224, 224),
    LayersCase("dinat_large_384", 32, 384, 384),
    LayersCase("dinat_tiny", 2, 800, 1216),
    LayersCase("halo_h1", 128, 256, 256),
    LayersCase("halo_h4", 64, 384, 384),
    LayersCase("maxvit_tiny_224", 128, 224, 224),
    LayersCase("overlock_t", 128, 224, 224),
)
TINY_LAYERS = tuple(
    LayersCase(f"test_foveal_{family}", 1, 64, 64) for family in ("dinat", "halonet", "maxvit", "overlock")
)


HALO = (
    LayersCase("halonet_h1", 2, 256, 256),
    LayersCase("halonet_h1", 2, 512, 512),
    LayersCase("halonet26t", 4, 256, 256),
    LayersCase("halonet26t", 4, 512, 512),
    LayersCase("halonet50ts", 4, 256, 256),
)
GPU_HALO = (LayersCase("halonet26t", 128, 256, 256), LayersCase("halonet_h1", 128, 256, 256))
TINY_HALO = (LayersCase("halonet26t", 1, 256, 256),)


@dataclass(frozen=True)
class WindowCase:
    """Attention in windows that tile a map, beside scaled_dot_product_attention.

    Args:
        table: where the shapes are from.
        backward: measure the backward pass, too.
    """

    table: str
    layer: Layer
    backward: bool = True

    @property
    def id(self) -> str:
        batch, *_, heads, depth = self.layer.shape
        return f"{self.table}, {self.layer.map} {self.layer.rule} {self.layer.bias}, {batch} x {heads} x {depth}"


def _window_case(
    table: str,
    batch: int,
    size: int,
    kernel_size: int,
    heads: int,
    depth: int,
    bias: str = "table",
    backward: bool = True,
) -> WindowCase:
    window = Window(kernel_size, kernel_size, boundary="mask")
    layer = Layer("attention", (batch, size, size, heads, depth), (size, size), depth, window, window, bias)
    return WindowCase(table, layer, backward)


def _window_cases(swin_batches: Sequence[int], bias_batches: Sequence[int]) -> tuple[WindowCase, ...]:
    """The shapes of Flash Window Attention's benchmark (arXiv 2501.06480), of Swin-T at 224, and of FlashBias'
    (arXiv 2505.12044): global attention, and Swin V2-B's windows of 24 at 384."""
    return (
        *(
            _window_case("Flash Window Attention", batch, 8 * k, k, 4, depth)
            for k, depth, batch in itertools.product((8, 4), (16, 64, 256), (1, 4, 16))
        ),
        *(
            _window_case("Swin-T", batch, 56 >> i, 7, 3 << i, 32)
            for batch, i in itertools.product(swin_batches, range(4))
        ),
        *(
            _window_case("FlashBias", 2, size, size, 4, 32, bias)
            for size, bias in itertools.product((16, 32, 64), ("table", "factored"))
        ),
        *(
            _window_case("FlashBias, Swin V2-B", batch, 96 >> i, 24, 4 << i, 32)
            for batch, i in itertools.product(bias_batches, range(3))
        ),
        # last: a dense bias takes 4 GiB, and twice as much when it is expanded
        _window_case("FlashBias", 2, 128, 128, 4, 32, backward=False),
    )


WINDOWS, GPU_WINDOWS = _window_cases((8,), (2,)), _window_cases((64, 256), (64,))
TINY_WINDOWS = tuple(_window_case("tiny", 1, 8, k, 2, 16, bias) for k, bias in ((4, "table"), (8, "factored")))


@dataclass(frozen=True)
class ModelCase:
    """A model and a peer of similar cost.

    Args:
        peer: empty for a model that is measured alone.
        same: the peer has the same parameters under the same names; they are copied and the outputs compared.
        way: "unfold": the peer is the same model with neighborhood operations by unfolding. "replace": the model is the
            peer after `foveal.replace_attention`.
    """

    model: str
    peer: str
    batch: int
    size: int
    same: bool = False
    way: str = ""

    @property
    def id(self) -> str:
        return self.own_name

    @property
    def own_name(self) -> str:
        return f"{self.model}, replaced" if self.way == "replace" else self.model

    @property
    def peer_name(self) -> str:
        return f"{self.peer} by unfold" if self.way == "unfold" else self.peer


def _unfolded(model: str, batch: int, size: int) -> ModelCase:
    return ModelCase(model, model, batch, size, same=True, way="unfold")


def _replaced(model: str, size: int = 224) -> ModelCase:
    return ModelCase(model, model, 8, size, same=True, way="replace")


MODELS = (
    ModelCase("dinat_tiny", "swin_tiny_patch4_window7_224", 8, 224),
    ModelCase("maxvit_tiny_224", "maxvit_tiny_tf_224", 4, 224, same=True),
    _unfolded("overlock_xt", 4, 224),
    ModelCase("halo26t", "halonet26t", 4, 256, same=True),
    ModelCase("halo50ts", "halonet50ts", 4, 512),
    ModelCase("agent_swin_t", "swin_tiny_patch4_window7_224", 8, 224),
    _unfolded("transnext_micro", 8, 224),
    _unfolded("transnext_micro", 1, 640),
    _replaced("swin_tiny_patch4_window7_224"),
    _replaced("swinv2_tiny_window8_256", 256),
    _replaced("twins_svt_small"),
    _replaced("davit_tiny"),
    _replaced("maxvit_tiny_tf_224"),
)
GPU_MODELS = (
    ModelCase("dinat_tiny", "swin_tiny_patch4_window7_224", 128, 224),
    ModelCase("maxvit_tiny_224", "maxvit_tiny_tf_224", 128, 224),
    ModelCase("halo26t", "halonet26t", 128, 256),
    ModelCase("nat_tiny", "convnext_tiny", 128, 224),
    ModelCase("overlock_t", "convnext_tiny", 128, 224),
    ModelCase("davit_tiny", "", 128, 224),
    # models that are trained on many GPUs
    ModelCase("dinat_large", "", 64, 224),
    ModelCase("dinat_s_large", "", 64, 224),
    ModelCase("overlock_b", "", 128, 224),
    ModelCase("maxvit_large_224", "", 64, 224),
    ModelCase("maxvit_xlarge_224", "", 64, 224),
    ModelCase("halo_h7", "", 32, 600),
    ModelCase("ascan_large", "", 128, 224),
)
# of 16 images: PyTorch convolves fewer by MKL's products if it has one thread
ROOFLINE = (
    ModelCase("dinat_tiny", "swin_tiny_patch4_window7_224", 16, 224),
    ModelCase("overlock_t", "convnext_tiny", 16, 224),
    ModelCase("maxvit_tiny_224", "maxvit_tiny_tf_224", 16, 224),
    ModelCase("care_s2", "", 16, 224),
    ModelCase("halo50ts", "halonet50ts", 16, 256),
    ModelCase("ascan_tiny", "", 16, 224),
    # beside timm's model of the nearest published accuracy
    ModelCase("van_b1", "swin_tiny_patch4_window7_224", 16, 224),
    ModelCase("rmt_t", "convnext_tiny", 16, 224),
    ModelCase("stvit_s", "convnext_small", 16, 224),
    ModelCase("shiftvit_tiny", "swin_tiny_patch4_window7_224", 16, 224),
    ModelCase("raftmlp_s", "resmlp_12_224", 16, 224),
    ModelCase("sgformer_s", "convnext_small", 16, 224),
    ModelCase("transnext_micro", "convnext_tiny", 16, 224),
)
TINY_MODELS = (ModelCase("test_foveal_dinat", "test_foveal_nat", 1, 64),)
TINY_PAIRS = (*TINY_MODELS, _unfolded("test_foveal_transnext", 1, 64))

# timm's models of the same sizes, timed with all of ours
ZOO_PEERS = (
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "davit_tiny",
    "maxvit_tiny_tf_224",
    "halonet26t",
    "halonet50ts",
)
