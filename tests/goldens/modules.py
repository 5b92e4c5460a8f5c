"""Parts of networks, run for their goldens: `outputs` names what they compute as the golden does."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.fan import FANBlock, attention_diversification_loss
from foveal.backbones.triplet import ULSAM, TripletAttention, own_name
from foveal.heads.detection.conditional_detr import ConditionalDETRHead, criterion, detections
from foveal.heads.detection.published import from_conditional_detr
from foveal.heads.probing import from_published
from foveal.heads.upsamplers import NAF, UPLiFT

Tensors = dict[str, Tensor]


def normal(name: str, shape: list[int]) -> torch.Tensor:
    """float32, roughly N(0, 1), depending on the name and the size alone: sums of four uniforms from PCG64."""
    count = math.prod(shape)
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(4 * max(count, 1))
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    values = (uniform.reshape(-1, 4).sum(1) - 2.0) * math.sqrt(3.0)
    return torch.from_numpy(values[:count].astype(np.float32)).reshape(shape)


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


def _conditional_detr(case: Any, inputs: Tensors, state_dict: Tensors) -> Tensors:
    config = case["config"]
    names = {"width": "d_model", "num_heads": "nhead", "ffn_width": "dim_feedforward", "num_queries": "num_queries"}
    names |= {f"{part}_layers": f"num_{part}_layers" for part in ("encoder", "decoder")}
    settings = {ours: config[theirs] for ours, theirs in names.items()}
    head = ConditionalDETRHead(config["in_channels"], config["num_classes"], **settings).eval()
    head.load_state_dict(from_conditional_detr(state_dict, ""))
    x = inputs["map"]
    valid = torch.zeros(len(x), *x.shape[-2:], dtype=torch.bool)
    for own, (rows, columns) in zip(valid, config["valid"], strict=True):
        own[:rows, :columns] = True
    logits, boxes = head(x, valid)
    labels, truth = ([torch.tensor(each[key]) for each in config["targets"]] for key in ("labels", "boxes"))
    kinds = {"loss_ce": 0, "loss_bbox": 1, "loss_giou": 2}
    losses, weights = criterion(logits, boxes, labels, truth), torch.tensor([config["weights"][kind] for kind in kinds])
    total = (losses * weights).sum()
    last = len(losses) - 1
    places = [name.partition("_")[2].partition("_") for name in config["loss_names"]]
    by_name = [losses[int(layer or last), kinds[f"loss_{kind}"]] for kind, _, layer in places]
    gradients = torch.autograd.grad(total, [x, head.query_embed.weight])
    found = [detections(*each, 100) for each in zip(logits[-1], boxes[-1], config["image_sizes"], strict=True)]
    memory, places, cells = head.encode(x, valid)
    _, reference = head.transformer.decoder(head.positions(memory), memory, places, cells, head.num_queries)
    return {
        "pred_logits": logits,
        "pred_boxes": boxes,
        "memory": memory.transpose(1, 2).unflatten(2, x.shape[-2:])[:, :16],
        "reference": reference.expand(len(x), -1, -1),
        "losses": torch.stack(by_name),
        "total": total[None],
        "map_grad": gradients[0][:, :16],
        "query_grad": gradients[1][:, :32],
        **{key: torch.stack([each[key] for each in found]) for key in ("scores", "boxes")},
        "labels": torch.stack([each["labels"] for each in found]).int(),
    }


def _efficient_probing(case: Any, inputs: Tensors, state_dict: Tensors) -> Tensors:
    probe, (tokens,) = from_published(state_dict), inputs.values()
    assert len(probe[0].cls_token[0]) == case["config"]["num_queries"]
    logits = probe(tokens)
    grad = _gradients(logits.square().sum(), inputs)["tokens"]
    return {
        "logits": logits,
        "pooled": probe[0](tokens),
        "attention": probe[0].attention(tokens),
        "tokens_grad": grad[..., :32],
    }


def _attention(module: torch.nn.Module, inputs: Tensors) -> Tensors:
    out = module.eval()(inputs["map"])
    return {"out": out, "map_grad": _gradients(out.square().sum(), inputs)["map"]}


def _triplet(case: Any, inputs: Tensors, state_dict: Tensors) -> Tensors:
    module = TripletAttention(inputs["map"].shape[1], **case["config"])
    names = {f".{name}": name for name in state_dict}
    module.load_state_dict({own_name(name)[1:]: state_dict[names[name]] for name in names})
    return _attention(module, inputs)


def _ulsam(case: Any, inputs: Tensors, state_dict: Tensors) -> Tensors:
    module = ULSAM(**case["config"])
    module.load_state_dict(state_dict)
    return _attention(module, inputs)


def _fan_block(case: Any, inputs: Tensors, state_dict: Tensors) -> Tensors:
    config, tokens = case["config"], inputs["tokens"]
    block = FANBlock(*(config[key] for key in ("dim", "num_heads", "mlp_ratio", "eta", "num_scales"))).eval()
    block.load_state_dict({name.replace(".dwconv.", "."): x for name, x in state_dict.items()})
    x = tokens.unflatten(1, config["size"])
    out = block(x).flatten(1, 2)
    found = {"out": out, "tokens_grad": _gradients(out.square().sum(), inputs)["tokens"]}
    if block.dilation_predictor is None:
        return found
    name, (batch, count, _) = case["input_names"][0].partition(":")[0], tokens.shape
    shape = [batch, config["num_heads"], count, count]
    logits = [3 * normal(f"{name}:adl{i}", shape) + 4 * normal(f"{name}:column{i}", [count]) for i in range(2)]
    maps = [each.softmax(-1).requires_grad_(True) for each in logits]
    loss = attention_diversification_loss(maps)
    queries, keys = block.attn.q, block.attn.kv
    y = block.norm1(block.dilation_predictor(x))
    return {
        **found,
        "attention": block.attn.weights(queries(y), keys(y).chunk(2, -1)[0]),
        "scale_weights": block.dilation_predictor.weights(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
        "adl": loss[None],
        "adl_grad0": torch.autograd.grad(loss, maps[0])[0],
    }


RUNS: dict[str, Callable[[Any, Tensors, Tensors], Tensors]] = {
    "uplift_dinov2_s14": _uplift,
    "naf": _naf,
    "conditional_detr": _conditional_detr,
    "efficient_probing": _efficient_probing,
    "triplet": _triplet,
    "ulsam": _ulsam,
    "fan block": _fan_block,
    "tap-fan block": _fan_block,
}


def outputs(case: Any, inputs: Tensors, state_dict: Tensors) -> Tensors:
    """What the part of the network named by ``case["model"]`` computes, gradients with respect to its inputs included.

    Args:
        case: the golden's description.
        inputs: by their names there.
        state_dict: by the published names.
    """
    floats = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    return {name: x.detach() for name, x in RUNS[case["model"]](case, floats, state_dict).items()}
