"""What a model answers to one fixed image, in a few numbers: enough to see whether it is the same model elsewhere."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

_VALUES = 64  # of every output, spread evenly over it


def image(shape: tuple[int, ...]) -> torch.Tensor:
    """A normalized image of ``shape``, the same on every machine: about N(0, 1), sums of four uniforms from PCG64."""
    count = math.prod(shape)
    raw = np.random.PCG64(zlib.crc32(b"image:foveal")).random_raw(4 * count)
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    values = (uniform.reshape(-1, 4).sum(1) - 2.0) * math.sqrt(3.0)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


@torch.no_grad()
def fingerprint(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """Shape, norm, largest magnitude and some values of the logits (of every map, if it gives maps) for `image` of
    ``[1, *input_size]``; plain numbers, for JSON. The model is to be in evaluation mode."""
    shape = (1, *input_size)
    answer = model(image(shape))
    outputs = []
    for output in answer if isinstance(answer, (list, tuple)) else [answer]:
        flat = output.double().flatten()
        chosen = torch.linspace(0, len(flat) - 1, min(_VALUES, len(flat))).long()
        outputs.append(
            {
                "shape": list(output.shape),
                "norm": flat.norm().item(),
                "largest": flat.abs().max().item(),
                "values": flat[chosen].tolist(),
            }
        )
    return {"input": list(shape), "outputs": outputs}


def difference(got: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """How far two fingerprints are apart, the largest error over the largest value; infinite if shapes differ."""
    if len(got["outputs"]) != len(expected["outputs"]):
        return math.inf
    worst = 0.0
    for ours, theirs in zip(got["outputs"], expected["outputs"], strict=True):
        if ours["shape"] != theirs["shape"] or len(ours["values"]) != len(theirs["values"]):
            return math.inf
        error = max(abs(a - b) for a, b in zip(ours["values"], theirs["values"], strict=True))
        for apart, largest in ((error, theirs["largest"]), (abs(ours["norm"] - theirs["norm"]), theirs["norm"])):
            each = apart / largest if largest else math.inf if apart else 0.0  # a head that starts from zeros
            if not each <= worst:  # NaN must win
                worst = each
    return worst
