"""Files as authors publish them, with random values: the same for the same names on every machine."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

GOLDENS = Path(__file__).parents[1] / "goldens"


def parameter(name: str, shape: Sequence[int]) -> torch.Tensor:
    """A value that keeps activations of order one, by the published name of the parameter."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.tensor(zlib.crc32(name.encode()) % 1000)
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if leaf == "running_var":
        return 1.0 + 0.25 * x.clamp(-2, 2)
    if leaf in ("running_mean", "bias", "beta"):
        return 0.1 * x
    if x.ndim <= 1 or x.numel() == x.shape[0]:  # weights of norms, layer scales
        return 1.0 + 0.1 * x
    return x / x[0].numel() ** 0.5


def state_dict(spec: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    return {name: parameter(name, shape) for name, shape in spec.items()}


def of(model: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Values for the names of a model."""
    return state_dict({prefix + name: value.shape for name, value in model.state_dict().items()})


def published(name: str) -> dict[str, torch.Tensor]:
    """Values for the names and shapes that the authors' own model of a golden case has."""
    return state_dict(json.loads((GOLDENS / f"{name}.json").read_text())["spec"])
