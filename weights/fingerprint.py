"""Fingerprints: a few numbers of a model's outputs for a fixed image, to identify the model on any machine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads.detection import Detector
from ..heads.mask2former import query_outputs
from ..heads.registry import head_spec

_VALUES = 64  # of every output, spread evenly over it


def image(shape: tuple[int, ...]) -> torch.Tensor:
    """A normalized image, the same on every machine: approximately N(0, 1), sums of four uniforms from PCG64."""
    count = math.prod(shape)
    raw = np.random.PCG64(zlib.crc32(b"image:foveal")).random_raw(4 * count)
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    values = (uniform.reshape(-1, 4).sum(1) - 2.0) * math.sqrt(3.0)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


@torch.no_grad()
def fingerprint(model: Any, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """Shape, norm, largest magnitude and some values of each output for `image` ``[1, *input_size]``, as plain numbers
    for JSON. The model must be in evaluation mode."""
    shape = (1, *input_size)
    found = model(image(shape))
    outputs = []
    for output in found if isinstance(found, (list, tuple)) else [found]:
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
    """The largest error over the largest value between two fingerprints; infinite if shapes differ."""
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


class RawOutputs(nn.Module):
    """Outputs of a dense model before the selection of detections, which is not continuous in the weights."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[1, C, H, W]`` to the neck's maps, the logits and deltas on them, and for four fixed regions the class, box
        and mask outputs; to a segmenter's logits; to the class and mask logits of Mask2Former; to those of Conditional
        DETR and its boxes."""
        if self.model.task == "upsample":
            return self._upsampled(image)
        if head_spec(self.model.task, self.model.arguments["head"]).kind == "mask_queries":
            return self._queries(image)
        if not isinstance(self.model, Detector):
            return [self.model(image)]
        detector: Any = self.model.detector
        maps = self.model.backbone(image)
        levels = list(maps.values())
        if self.model.kind == "box_queries":
            return [layers[-1] for layers in detector.head(levels[-1])]
        if self.model.kind == "one_stage":
            found = detector.head(levels)
            return [*levels, *(found[key] for key in sorted(found))]
        logits, deltas = detector.rpn.head(levels)
        heads, (rows, columns) = detector.roi_heads, image.shape[-2:]
        share = torch.tensor([[0, 0, 1, 1], [0.1, 0.2, 0.3, 0.5], [0.4, 0.3, 0.55, 0.6], [0.2, 0.1, 0.9, 0.8]])
        regions = [share.to(image) * torch.tensor([columns, rows, columns, rows]).to(image)]
        pooled = heads.box_roi_pool(maps, regions, [(rows, columns)])
        stages = zip(_stages(heads.box_head), _stages(heads.box_predictor), strict=True)
        boxes = [part for head, predictor in stages for part in predictor(head(pooled))]
        masks = []
        if self.model.masks:
            pooled = heads.mask_roi_pool(maps, regions, [(rows, columns)])
            stages = zip(_stages(heads.mask_head), _stages(heads.mask_predictor), strict=True)
            masks = [predictor(head(pooled)) for head, predictor in stages]
        return [*levels, *logits, *deltas, *boxes, *masks]

    def _upsampled(self, image: Tensor) -> list[Tensor]:
        """A map of means of the image, at two and three times its size."""
        features = F.avg_pool2d(image, 16).repeat(1, 128, 1, 1)[:, : self.model.channels or 32]
        h, w = features.shape[-2:]
        return self.model.maps(image, features, [(2 * h, 2 * w), (3 * h, 3 * w)])

    def _queries(self, image: Tensor) -> list[Tensor]:
        """Outputs without masked attention, whose masks change discontinuously with the sign of a logit."""
        head: Any = (self.model.detector if isinstance(self.model, Detector) else self.model).head
        predictor = head.model.transformer_module.decoder.mask_predictor
        handle = predictor.register_forward_hook(lambda _, __, found: (found[0], torch.zeros_like(found[1])))
        try:
            return [layers[-1] for layers in query_outputs(head, image)]
        finally:
            handle.remove()


def _stages(part: nn.Module) -> list[nn.Module]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]
