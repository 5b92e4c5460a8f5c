"""The small variants that dense heads take, from the registry."""

from __future__ import annotations

import timm
import torch

import foveal.backbones

SMALL = [name for name in foveal.backbones.list_models() if name.startswith("test_foveal_")]


def strides(name: str) -> list[int]:
    with torch.device("meta"):
        return [level["reduction"] for level in timm.create_model(name).feature_info]


# maps of more than one stride; a plain transformer's have one, unless they are upsampled
HIERARCHICAL = [name for name in SMALL if len(set(strides(name))) > 1]
# what other libraries' dense heads expect
PYRAMIDS = [name for name in SMALL if strides(name) == [4, 8, 16, 32]]
