"""RaftMLP: MLPs along the rows and columns of a map.

Paper: RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality? (Tatsunami and Taki, ACCV 2022,
arXiv:2108.04384). Authors' code: https://github.com/okojoalg/raft-mlp (Apache-2.0), without weights. This is an
independent implementation; checkpoints in the authors' format load and give the authors' outputs.

A block mixes positions along the columns, positions along the rows, and channels. The first two see the channels as
rafts, groups of every n-th channel: the ``raft_size`` channels of a raft at all positions of a column or row are one
vector for an MLP that all rafts share. Its layers fix the size of the map: maps of another size are resampled to it and
back in every block, residuals included, which blurs them.

A patch embedding sums convolutions of several kernel sizes. The authors store them as one matrix.

Feature maps are ``[B, H, W, C]``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .attention import resized, resized_nhwc, to_nchw
from .base import Backbone, check_names, create, keep_new, unwrap
from .layers import Mlp, Stage, fx_leaf, init_weights, positive_pair

__all__ = ["RaftMLP", "checkpoint_filter_fn", "family"]


@fx_leaf
def resized_to_multiple(x: Tensor, factor: int) -> Tensor:
    """`resized` up to the next multiples of ``factor``."""
    return resized(x, [(length + factor - 1) // factor * factor for length in x.shape[2:]])


class PatchEmbed(nn.Module):
    """The sum of convolutions of one stride and several even kernel sizes; ``[B, C, H, W]`` to ``[B, h, w, dim_out]``.
    A map that the stride does not divide is enlarged."""

    def __init__(self, dim: int, dim_out: int, stride: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.stride = stride
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim_out, kernel, stride, (kernel - stride) // 2, bias=kernel == kernel_sizes[0])
            for kernel in kernel_sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        x = resized_to_multiple(x, self.stride)
        total: Any = sum(conv(x) for conv in self.convs)
        return total.permute(0, 2, 3, 1)


class Downsample(PatchEmbed):
    """`PatchEmbed` for ``[B, H, W, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(to_nchw(x))


class RaftMixing(nn.Module):
    """LayerNorm, and an MLP along one axis of a map ``[B, H, W, C]`` that is shared by all rafts.

    Args:
        dim: channels C.
        length: positions along the axis.
        raft_size: channels of a raft, ``C / raft_size`` apart.
        axis: ``"rows"``: along the first axis of the map; ``"columns"``: along the second.
    """

    def __init__(self, dim: int, length: int, raft_size: int, axis: str) -> None:
        super().__init__()
        self.raft_size, self.axis = raft_size, axis
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(raft_size * length, 2 * raft_size * length)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).unflatten(-1, (self.raft_size, -1))  # B H W raft n
        if self.axis == "rows":
            return self._mixed(x.permute(0, 2, 4, 3, 1)).permute(0, 4, 1, 3, 2).flatten(3)
        return self._mixed(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2).flatten(3)

    def _mixed(self, x: Tensor) -> Tensor:
        """``[B, other axis, n, raft, axis]`` to the same."""
        return self.mlp(x.flatten(3)).unflatten(-1, (self.raft_size, -1))


class ChannelMixing(nn.Module):
    """LayerNorm and MLP over the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


class RaftBlock(nn.Module):
    """Mixing along the columns, along the rows, and of the channels, each with a residual and stochastic depth.

    Args:
        dim: channels.
        size: rows and columns of the map; others are resampled.
        raft_size: see `RaftMixing`.
    """

    def __init__(self, dim: int, size: tuple[int, int], raft_size: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.size = size
        self.vertical = RaftMixing(dim, size[0], raft_size, "rows")
        self.horizontal = RaftMixing(dim, size[1], raft_size, "columns")
        self.channel = ChannelMixing(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = resized_nhwc(x, None, self.size)
        y = y + self.drop_path(self.vertical(y))
        y = y + self.drop_path(self.horizontal(y))
        x = resized_nhwc(y, x, self.size)
        return x + self.drop_path(self.channel(x))


class RaftMLP(Backbone):
    """RaftMLP. Takes images of any size; those of the training size without resampling.

    Args:
        img_size: training size, an int or (height, width), which fixes the size of the maps in the blocks.
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, or ``""`` for a map of logits.
        output_stride: only 32; the stages cannot keep their resolution.
        embed_dims: channels per stage.
        depths: blocks per stage.
        raft_size: channels of a raft; divides ``embed_dims``.
        kernel_sizes: of the patch embedding of each stage.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, the same in all blocks.
        out_norm: add a LayerNorm per stage, ``norm0`` ..., that `forward_intermediates` and ``features_only`` apply to
            their maps, for dense prediction. Not in the authors' code.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.raftmlp import RaftMLP
        >>> model = timm.create_model("test_foveal_raftmlp", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('RaftMLP', (1, 10))
    """

    tables = ()

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        raft_size: int = 2,
        kernel_sizes: Sequence[Sequence[int]] = ((4, 8), (2, 4), (2, 4), (2,)),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
    ) -> None:
        super().__init__(in_chans, output_stride, out_norm=out_norm)
        if not len(embed_dims) == len(depths) == len(kernel_sizes):
            raise ValueError(f"{embed_dims=}, {depths=} and {kernel_sizes=} differ in length")
        if any(dim % raft_size for dim in embed_dims):
            raise ValueError(f"embed_dims must be divisible by {raft_size=}, got {tuple(embed_dims)}")
        rows, columns = self.img_size = positive_pair("img_size", img_size)
        self.stem = PatchEmbed(in_chans, embed_dims[0], 4, kernel_sizes[0])
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            stride = 2 if i else 4
            rows, columns = -(-rows // stride), -(-columns // stride)
            downsample = Downsample(embed_dims[i - 1], dim, 2, kernel_sizes[i]) if i else None
            blocks = [RaftBlock(dim, (rows, columns), raft_size, drop_path_rate) for _ in range(depth)]
            stages.append(Stage(blocks, downsample))
            self._add_map(dim, f"stages.{i}")
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(embed_dims[-1])
        init_weights(self)
        self._init_head(embed_dims[-1], num_classes, global_pool, drop_rate)


# ---- checkpoints

_MIXING = {"1": "vertical", "3": "horizontal", "5": "channel"}


def _own_name(name: str) -> str:
    """Our name of a parameter. Numbered in the authors' levels: the embedding 0, and from 2 on the blocks; in a block
    the mixings 1, 3 and 5; in their MLPs the layers 0 and 3."""
    name = re.sub(r"^heads\.0\.1\.", "norm.", name)
    name = re.sub(r"^classifier\.", "head.", name)
    if match := re.match(r"levels\.(\d+)\.fn\.(\d+)\.([135])\.(norm\.(?:1\.)?|fn\.[03]\.)", name):
        stage, block, mixing, part = match.groups()
        part = "norm." if part.startswith("norm") else "mlp.fc1." if part == "fn.0." else "mlp.fc2."
        return f"stages.{stage}.blocks.{int(block) - 2}.{_MIXING[mixing]}.{part}{name[match.end() :]}"
    return name


def checkpoint_filter_fn(state_dict: dict[str, Any], model: RaftMLP) -> dict[str, Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports checkpoints of the authors' code and state dicts of these models, also wrapped by ``features_only`` or
    ``DistributedDataParallel``, or under ``state_dict`` or ``model``. If the checkpoint has no norms of ``out_norm``,
    those of the model keep their values.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model.
    """
    own = model.state_dict()
    result = {}
    stages: Any = model.stages
    for name, value in unwrap(state_dict).items():
        if match := re.fullmatch(r"levels\.(\d+)\.fn\.0\.fc\.(weight|bias)", name):
            result |= _embedding(value, own, "stem" if match[1] == "0" else f"stages.{match[1]}.downsample", match[2])
            continue
        result[_own_name(name)] = value
        if re.search(r"\.[13]\.norm\.1\.(weight|bias)$", name):  # theirs with the channels of a raft together
            raft_size = stages[0].blocks[0].vertical.raft_size
            result[_own_name(name)] = value.unflatten(0, (-1, raft_size)).t().flatten()
    keep_new(result, own)
    check_names(result, own)
    return result


def _embedding(value: Tensor, own: dict[str, Tensor], name: str, kind: str) -> dict[str, Tensor]:
    """The convolutions of a patch embedding from the columns of the authors' matrix, or from its bias."""
    if kind == "bias":
        return {f"{name}.convs.0.bias": value}
    shapes = {key: x.shape for key, x in own.items() if re.fullmatch(rf"{re.escape(name)}\.convs\.\d\.weight", key)}
    columns = [shape[1:].numel() for shape in shapes.values()]
    if sum(columns) != value.shape[1]:
        raise ValueError(f"the patch embedding {name} takes {sum(columns)} values, the checkpoint's {value.shape[1]}")
    parts = zip(shapes.items(), value.split(columns, dim=1), strict=True)
    return {key: part.unflatten(1, shape[1:]) for (key, shape), part in parts}


# ---- registry


def _cfg(**facts: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "interpolation": "bilinear",
        "first_conv": ("stem.convs.0", "stem.convs.1"),
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/okojoalg/raft-mlp",
        "paper_ids": "arXiv:2108.04384",
        **facts,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"raftmlp_{size}.untrained": _cfg() for size in "sml"},
        "test_foveal_raftmlp.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), origin_url=None),
    }
)


def family(name: str) -> str:
    """The family of a model of this file: ``"RaftMLP"``."""
    return "RaftMLP"


_create = partial(create, checkpoint_filter_fn, RaftMLP)


@register_model
def raftmlp_s(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """RaftMLP-S, 9.9 M parameters. No weights are published."""
    return _create("raftmlp_s", pretrained, kwargs, drop_path_rate=0.1)


@register_model
def raftmlp_m(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """RaftMLP-M, 21.4 M parameters. No weights are published."""
    return _create("raftmlp_m", pretrained, kwargs, embed_dims=(96, 192, 384, 768), drop_path_rate=0.1)


@register_model
def raftmlp_l(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """RaftMLP-L, 36.2 M parameters. No weights are published."""
    return _create("raftmlp_l", pretrained, kwargs, embed_dims=(128, 192, 512, 1024), drop_path_rate=0.1)


@register_model
def test_foveal_raftmlp(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """A very small RaftMLP, for tests and demonstrations."""
    args = dict(img_size=64, embed_dims=(16, 24, 32, 64), depths=(1, 1, 2, 1))
    return _create("test_foveal_raftmlp", pretrained, kwargs, **args)
