"""Agent attention: a few agents read the map, and all positions read the agents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn

from ...kernels import TensorCache
from ...kernels.tracing import is_dynamic
from ..layers import average_pool, bilinear, positive_pair
from .aggregated import without_autocast
from .full import SoftmaxAttention2d, attend
from .maps import DepthwiseConv, resized_nhwc, to_nchw

COARSE = 7  # rows and columns of the coarse position bias


class AgentAttention2d(SoftmaxAttention2d):
    """Agent attention (arXiv:2312.08874, section 3), linear in the number of positions.

    Agents are the queries, averaged over the cells of a grid. They attend to the map, and then all positions attend to
    them, each with a learned position bias: a coarse map, rows and columns, interpolated to the size of the map. A 3x3
    depthwise convolution of the values is added.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``.
        agents: rows and columns of the grid that the position bias is learned for, an int or a pair.
        map_size: (H, W) that it is learned for.
        agent_shape: rows and columns of the grid, None for ``agents``; the position bias is interpolated to it.
        class_token: as in `SoftmaxAttention2d`. The token takes no part in the agents and the convolution.
        split_q: likewise.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import AgentAttention2d
        >>> attention = AgentAttention2d(dim=64, num_heads=2, agents=3, map_size=(14, 14), agent_shape=(4, 6))
        >>> attention(torch.randn(1, 16, 20, 64)).shape
        torch.Size([1, 16, 20, 64])
    """

    an_bias: nn.Parameter
    na_bias: nn.Parameter
    ah_bias: nn.Parameter
    aw_bias: nn.Parameter
    ha_bias: nn.Parameter
    wa_bias: nn.Parameter
    ac_bias: nn.Parameter
    ca_bias: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agents: int | Sequence[int],
        map_size: int | Sequence[int],
        agent_shape: int | Sequence[int] | None = None,
        *,
        class_token: bool = False,
        split_q: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, class_token=class_token, split_q=split_q)
        self.agents = positive_pair("agents", agents)
        self.agent_shape = self.agents if agent_shape is None else positive_pair("agent_shape", agent_shape)
        self.dwc = DepthwiseConv(dim, 3)
        (rows, columns), count = positive_pair("map_size", map_size), math.prod(self.agents)
        # a: agents, n: positions, h, w: rows and columns, c: the class token; as the authors store them
        shapes = dict(an=(num_heads, count, COARSE, COARSE), na=(num_heads, count, COARSE, COARSE))
        shapes |= dict(ah=(1, num_heads, count, rows, 1), aw=(1, num_heads, count, 1, columns))
        shapes |= dict(ha=(1, num_heads, rows, 1, count), wa=(1, num_heads, 1, columns, count))
        if class_token:
            shapes |= dict(ac=(1, num_heads, count, 1), ca=(1, num_heads, 1, count))
        for name, shape in shapes.items():
            bias = nn.Parameter(torch.empty(shape))
            trunc_normal_(bias, std=0.02)
            self.register_parameter(f"{name}_bias", bias)
        self.cache = TensorCache()

    def extra_repr(self) -> str:
        return f"agents={self.agents}, agent_shape={self.agent_shape}, num_heads={self.num_heads}"

    def _mix(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: tuple[int, int], source: torch.Tensor
    ) -> torch.Tensor:
        queries = to_nchw(self._to_map(q, size))
        exact = is_dynamic(*size) or torch.jit.is_tracing()  # the older exporter knows fixed sizes alone
        agents = average_pool(queries, self.agent_shape) if exact else F.adaptive_avg_pool2d(queries, self.agent_shape)
        local = self._to_tokens(self.dwc(self._to_map(v, size)))
        q, k, v, agents = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v, agents.flatten(2).transpose(1, 2)))
        to_map, to_agents = self._biases(size)
        return attend(q, agents, attend(agents, k, v, to_map), to_agents).flatten(2) + local

    def _biases(self, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Position biases of the agents' attention to the map, ``[heads, A, N]``, and back, ``[heads, N, A]``."""
        biases = [
            [self.an_bias, self.ah_bias[0], self.aw_bias[0]],
            [self.na_bias, self.ha_bias[0].permute(0, 3, 1, 2), self.wa_bias[0].permute(0, 3, 1, 2)],
        ]
        if self.prefix:
            biases[0].append(self.ac_bias[0, :, :, :, None])
            biases[1].append(self.ca_bias[0].transpose(1, 2)[..., None])
        source = torch.cat([each.flatten() for part in biases for each in part])
        shapes = tuple(tuple(each.shape) for each in biases[0])
        return self.cache.get(_position_biases, shapes, self.agents, self.agent_shape, size, source=source)


def _position_biases(
    source: torch.Tensor,
    shapes: Sequence[tuple[int, ...]],
    agents: tuple[int, int],
    agent_shape: tuple[int, int],
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `AgentAttention2d._biases`; ``source`` are the parameters of both, of ``shapes`` ``[heads, agents, h, w]``
    each: coarse map, rows, columns and perhaps class token. In float32 at least."""
    source = source.to(torch.promote_types(source.dtype, torch.float32))
    lengths = [math.prod(shape) for shape in shapes]
    both = []
    with without_autocast(source):
        for part in source.chunk(2):
            coarse, rows, columns, *token = (
                _of_agents(each.view(shape), agents, agent_shape)
                for each, shape in zip(part.split(lengths), shapes, strict=True)
            )
            bias = bilinear(rows, (size[0], 1)) + bilinear(columns, (1, size[1])) + bilinear(coarse, size)
            both.append(torch.cat([*(each.flatten(2) for each in token), bias.flatten(2)], -1))
    return both[0], both[1].transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _of_agents(x: torch.Tensor, agents: tuple[int, int], agent_shape: tuple[int, int]) -> torch.Tensor:
    """``[heads, agents, h, w]`` for another number of agents, interpolated over their grid."""
    if agents == agent_shape:
        return x
    y = bilinear(x.flatten(2).transpose(1, 2).unflatten(2, agents), agent_shape)
    return y.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])


def resampled_positions(state: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with its position embeddings (of a square, if they are tokens) by bicubic, and rows and columns of
    `AgentAttention2d` by linear interpolation, of the sizes in the model's ``own`` state, as in the authors'
    fine-tuning."""
    result = dict(state)
    for name, x in state.items():
        like = own.get(name)
        if like is None or x.shape == like.shape:
            continue
        if name.endswith("pos_embed"):
            result[name] = resized_nhwc(x if x.ndim == 4 else x.unflatten(1, (math.isqrt(x.shape[1]), -1)), like, ())
        elif name.endswith((".ah_bias", ".aw_bias")):
            result[name] = bilinear(x[0], like.shape[3:])[None]
        elif name.endswith((".ha_bias", ".wa_bias")):
            result[name] = bilinear(x[0].permute(0, 3, 1, 2), like.shape[2:4]).permute(0, 2, 3, 1)[None]
    return result
