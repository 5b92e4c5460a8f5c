"""Parts of networks, run for their goldens: `outputs` names what they compute as the golden does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal.heads.upsamplers import NAF, UPLiFT

Tensors = dict[str, Tensor]


def _gradients(loss: Tensor, inputs: Tensors) -> Tensors:
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def _uplift(case: Any, inputs: Tensors, state_dict: Tensors) -> Tensors:
    model = UPLiFT(case["config"]["channels"], case["config"]["patch"])
    model.load_state_dict(state_dict)
    image, features = inputs.values()
    steps = model.eval().steps(image, features, case["config"]["iters"])
    grad = _gradients(steps[-1].square().sum(), inputs)
    full = torch.nn.functional.interpolate(steps[-1], image.shape[-2:], mode="bilinear", antialias=True)
    return {
        **{f"step{i}": x[:, :16] for i, x in enumerate(steps)},
        "outsize": full[:1, :4],
        "image_grad": grad["image"][:, :, ::4, ::4],
        "features_grad": grad["features"][:, :16],
    }


def _naf(case: Any, inputs: Tensors, state_dict: Tensors) -> Tensors:
    model, sizes = NAF(), [tuple(size) for size in case["config"]["output_sizes"]]
    model.load_state_dict(state_dict)
    outs = model.eval().maps(*inputs.values(), sizes)
    grad = _gradients(torch.stack([x.square().sum() for x in outs]).sum(), inputs)
    return {
        "guide": model.queries(inputs["image"], sizes[0])[:1, ::21],
        "out0": outs[0][:1, ::8],
        "out1": outs[1][1:, ::8],
        "out2": outs[2][:, ::8],
        "image_grad": grad["image"][:, :, ::4, ::4],
        "features_grad": grad["features"][:, ::2],
    }


RUNS: dict[str, Callable[[Any, Tensors, Tensors], Tensors]] = {"uplift_dinov2_s14": _uplift, "naf": _naf}


def outputs(case: Any, inputs: Tensors, state_dict: Tensors) -> Tensors:
    """What the part of the network named by ``case["model"]`` computes, gradients with respect to its inputs included.

    Args:
        case: the golden's description.
        inputs: by their names there.
        state_dict: by the published names.
    """
    floats = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    return {name: x.detach() for name, x in RUNS[case["model"]](case, floats, state_dict).items()}
