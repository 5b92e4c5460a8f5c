"""DeiT, a plain vision transformer, with agent or InLine attention.

Papers: Agent Attention (Han et al., ECCV 2024, arXiv:2312.08874); InLine attention: Bridging the Divide: Reconsidering
Softmax and Linear Attention (Han et al., NeurIPS 2024, arXiv:2412.06590); DeiT (Touvron et al., ICML 2021,
arXiv:2012.12877). The authors' repositories, https://github.com/LeapLabTHU/Agent-Attention and
https://github.com/LeapLabTHU/InLine, state no licence for code or weights. This is an independent implementation;
checkpoints in the authors' format load unchanged and give the published outputs.

The network is timm's ViT of 12 blocks on patches of 16, with a class token and an absolute position embedding;
parameters have the authors' names, except ``dwc``. `agent_deit_b` has agent attention in the first four blocks and
softmax attention in the others. Other sizes than that of training interpolate the position embedding, by bicubic
interpolation as in the authors' fine-tuning.

Tokens are ``[B, 1 + H * W, C]`` inside, the class token first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import nn

from .attention import SoftmaxAttention2d, map_sizes, resampled_positions, resized_nhwc, without_size_guards
from .base import POOLS, Backbone, check_head, check_names, create, unwrap
from .hosts import UNPUBLISHED, family, host_attention, own_convolution, published_cfg
from .layers import Blocks, PreNormBlock, drop_path_rates, fx_leaf, init_weights, positive_pair

__all__ = ["DeiT", "checkpoint_filter_fn", "family"]


class TokenMap(nn.Module):
    """Tokens to the map of the positions, ``[B, 1 + H * W, C]`` to ``[B, H, W, C]``, a view."""

    @fx_leaf
    @without_size_guards
    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return x[:, 1:].unflatten(1, size)


class TokenBlock(PreNormBlock):
    """A block of tokens, whose map a module of its own gives, for what takes features from modules (hooks, fx)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.map = TokenMap()

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        x = super().forward(x, *args)
        self.map(x, *args)
        return x


class TokenBlocks(Blocks):
    """Blocks that also take the size of the map."""

    def forward(self, x: torch.Tensor, size: tuple[int, int], start: int = 0, stop: int | None = None) -> torch.Tensor:
        for i in range(start, len(self) if stop is None else stop):
            run = partial(checkpoint, self[i], use_reentrant=False) if self.grad_checkpointing else self[i]
            x = run(x, size)
        return x


class TokenPool(nn.Module):
    """Tokens to the class token, or to a pooling of the others: ``[B, 1 + N, C]`` to ``[B, C]``."""

    def __init__(self, pool: Any = None) -> None:
        super().__init__()
        self.pool = pool
        self.pool_type = "token" if pool is None else pool.pool_type

    def feat_mult(self) -> int:
        return 1 if self.pool is None else self.pool.feat_mult()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is None:
            return x[:, 0]
        return self.pool(x[:, 1:, None]) if self.pool_type else x


@fx_leaf
def _size(x: torch.Tensor) -> tuple[int, int]:
    """(H, W) of ``[B, H, W, C]``."""
    return map_sizes(x)[1:3]


@fx_leaf
def _to_tokens(
    x: torch.Tensor, token: torch.Tensor, embedding: torch.Tensor, map_size: tuple[int, int]
) -> torch.Tensor:
    """A map to tokens with the class token first, plus the position embedding of a map of ``map_size``."""
    positions = resized_nhwc(embedding[:, 1:].unflatten(1, map_size), x, ())
    x = (x + positions).flatten(1, 2)
    return torch.cat([(token + embedding[:, :1]).to(x.dtype).expand(x.shape[0], -1, -1), x], 1)


class DeiT(Backbone):
    """DeiT. Takes images of any size; they are padded to whole patches.

    `forward_features` returns tokens ``[B, 1 + H * W, C]``; the feature maps are of the others than the class token.

    Args:
        img_size: of training, an int or (height, width); position embedding and biases are interpolated for others.
        patch_size: kernel size and stride of the patch embedding.
        in_chans: image channels.
        num_classes: classes, 0 for none.
        global_pool: ``"token"``, the class token; ``"avg"``, ``"max"``, ``"avgmax"`` or ``"catavgmax"`` of the others;
            or ``""`` for the logits of all tokens.
        output_stride: only ``patch_size``.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads; must divide the channels.
        mlp_ratio: hidden channels of the MLP, relative to ``embed_dim``.
        attention: of the first blocks: ``"agent"``, ``"inline"`` or ``"softmax"``.
        attention_depth: the number of these blocks, None for all; the others have softmax attention.
        agents: of `AgentAttention2d`.
        agent_shape: likewise.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import timm, torch
        >>> from foveal.backbones.deit import DeiT
        >>> model = timm.create_model("test_foveal_agent_deit", num_classes=10).eval()
        >>> type(model).__name__, tuple(model(torch.randn(1, 3, 64, 96)).shape)
        ('DeiT', (1, 10))
    """

    stem_name, levels_name = "patch_embed", "blocks"
    uniform = True
    out_indices = 3
    tables = ("cls_token", "pos_embed")
    num_prefix_tokens = 1
    blocks: TokenBlocks

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        output_stride: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        attention: str = "softmax",
        attention_depth: int | None = None,
        agents: int | Sequence[int] = 7,
        agent_shape: int | Sequence[int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, output_stride, stride=patch_size)
        rows, columns = positive_pair("img_size", img_size)
        self.map_size = math.ceil(rows / patch_size), math.ceil(columns / patch_size)
        attend = host_attention(attention, num_heads, agents, self.map_size, agent_shape, class_token=True)
        plain = partial(SoftmaxAttention2d, num_heads=num_heads, class_token=True)
        if attention_depth is not None and not 0 <= attention_depth <= depth:
            raise ValueError(f"attention_depth must be 0 to depth {depth}, got {attention_depth}")
        options: dict[str, Any] = dict(norm_layer=None, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True)
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim, **options)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(self.map_size), embed_dim))
        for embedding in (self.cls_token, self.pos_embed):
            trunc_normal_(embedding, std=0.02)
        blocks = []
        for i, rate in enumerate(drop_path_rates(drop_path_rate, [depth])[0]):
            own = attention_depth is None or i < attention_depth
            blocks.append(TokenBlock(embed_dim, attend(embed_dim) if own else plain(embed_dim), mlp_ratio, rate))
        self.blocks = TokenBlocks(*blocks)
        facts = dict(num_chs=embed_dim, reduction=patch_size)
        self.feature_info = [facts | dict(module=f"blocks.{j}.map") for j in range(depth)]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_weights(self)
        self._init_head(embed_dim, num_classes, global_pool, drop_rate)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        check_head(num_classes, global_pool, ("token", *POOLS))
        super()._set_head(num_classes, "avg" if global_pool == "token" else global_pool)
        self.global_pool = TokenPool(None if global_pool == "token" else self.global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise learning rates."""
        stem = r"^(?:cls_token|pos_embed|patch_embed)"
        return dict(stem=stem, blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    def _tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images to the tokens of the first block and the size of the map."""
        x = self.patch_embed(x)
        return _to_tokens(x, self.cls_token, self.pos_embed, self.map_size), _size(x)

    def _maps(
        self, x: torch.Tensor, take: Sequence[int], stop: int, norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, size = self._tokens(x)
        maps = []
        for i in range(stop + 1):
            x = self.blocks(x, size, i, i + 1)
            if i in take:
                block: Any = self.blocks[i]
                maps.append(block.map(self._norm(x) if norm else x, size))
        return x, maps

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, in_chans, H, W]`` to the tokens after the final norm, ``[B, 1 + h * w, num_features]``."""
        return self._norm(self.blocks(*self._tokens(x)))


# ---- checkpoints


def checkpoint_filter_fn(state_dict: dict[str, Any], model: DeiT) -> dict[str, torch.Tensor]:
    """Convert a checkpoint to a state dict of ``model``. Changes neither argument.

    Supports the names of the authors and of these models, also wrapped by ``features_only`` or
    ``DistributedDataParallel``, or under ``state_dict`` or ``model``. Position embedding and biases for another
    ``img_size`` are interpolated; without agents, whose biases tell rows and columns, an embedding of as many positions
    as the model's is taken to be of its map, and any other of a square.

    Raises:
        ValueError: the parameter names (except the classifier's, which timm handles) do not fit the model, or the
            embedding is of no square and without agents.
    """
    own = model.state_dict()
    given = unwrap(state_dict)
    found = {own_convolution(name): value for name, value in given.items()}
    check_names(found, own)
    embedding = found["pos_embed"]
    rows, columns = _map_size(found, model)
    if (rows, columns) != model.map_size:
        positions = embedding[:, 1:].unflatten(1, (rows, columns))
        positions = resized_nhwc(positions, None, model.map_size).flatten(1, 2)
        found["pos_embed"] = torch.cat([embedding[:, :1], positions], 1)
    return resampled_positions(found, own)


def _map_size(state: dict[str, torch.Tensor], model: DeiT) -> tuple[int, int]:
    """Rows and columns of the position embedding of a checkpoint."""
    for name, rows in state.items():
        if name.endswith(".ah_bias"):
            return rows.shape[3], state[name.replace(".ah_bias", ".aw_bias")].shape[4]
    count = state["pos_embed"].shape[1] - 1
    side = math.isqrt(count)
    if count == math.prod(model.map_size):
        return model.map_size
    if side**2 != count:
        raise ValueError(f"pos_embed has {count} positions, no square: their rows and columns are unknown")
    return side, side


# ---- registry

_FILES = {  # on Tsinghua's cloud, and the size of images
    "agent_deit_t.in1k": ("57e0904221824ee7b7af", 224),
    "agent_deit_s.in1k": ("fdd43304372541db8ea7", 224),
    "agent_deit_s_448.in1k": ("a228f86241c445f1969b", 448),
    "agent_deit_b.in1k": ("5115f15fdd7e4ab58fbc", 224),
    "inline_deit_t.in1k": ("1d6b8191ad6d4114b291", 224),
    "inline_deit_s.in1k": ("2f3898b07e9247f3beb3", 288),
    "inline_deit_b.in1k": ("10bdd726d4b0435eb34e", 448),
}


_deit = partial(published_cfg, first_conv="patch_embed.proj", paper="arXiv:2012.12877", stride=16)
default_cfgs = generate_default_cfgs(
    {
        **{name: _deit(name.partition("_")[0], file, size) for name, (file, size) in _FILES.items()},
        "test_foveal_agent_deit.untrained": _deit("agent", "", 64, **UNPUBLISHED),
    }
)

_create = partial(create, checkpoint_filter_fn, DeiT)


@register_model
def agent_deit_t(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """Agent-DeiT-T, 6.0 M parameters."""
    return _create("agent_deit_t", pretrained, kwargs, attention="agent")


@register_model
def agent_deit_s(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """Agent-DeiT-S, 22.6 M parameters."""
    args = dict(attention="agent", embed_dim=384, num_heads=6, drop_path_rate=0.1)
    return _create("agent_deit_s", pretrained, kwargs, **args)


@register_model
def agent_deit_s_448(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """Agent-DeiT-S for 448 pixels, 23.1 M parameters."""
    args = dict(attention="agent", embed_dim=384, num_heads=6, drop_path_rate=0.1)
    return _create("agent_deit_s_448", pretrained, kwargs, **args, img_size=448)


@register_model
def agent_deit_b(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """Agent-DeiT-B, with agent attention in the first four blocks, 87.2 M parameters."""
    args = dict(attention="agent", attention_depth=4, agents=9, embed_dim=768, num_heads=12, drop_path_rate=0.3)
    return _create("agent_deit_b", pretrained, kwargs, **args)


@register_model
def inline_deit_t(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """InLine-DeiT-T, 6.5 M parameters."""
    return _create("inline_deit_t", pretrained, kwargs, attention="inline", num_heads=6, drop_path_rate=0.1)


@register_model
def inline_deit_s(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """InLine-DeiT-S, of 320 channels and for 288 pixels, 16.7 M parameters."""
    args = dict(attention="inline", embed_dim=320, num_heads=10, drop_path_rate=0.1)
    return _create("inline_deit_s", pretrained, kwargs, **args, img_size=288)


@register_model
def inline_deit_b(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """InLine-DeiT-B, of 384 channels and for 448 pixels, 23.8 M parameters."""
    args = dict(attention="inline", embed_dim=384, num_heads=12, drop_path_rate=0.1)
    return _create("inline_deit_b", pretrained, kwargs, **args, img_size=448)


@register_model
def test_foveal_agent_deit(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """A very small Agent-DeiT whose last block has softmax attention, for tests and demonstrations."""
    args = dict(img_size=64, embed_dim=64, depth=3, num_heads=2, agents=3, attention_depth=2)
    return _create("test_foveal_agent_deit", pretrained, kwargs, **args, attention="agent")
