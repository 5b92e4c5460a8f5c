"""The small variants that dense heads take, from the registry."""

from __future__ import annotations

import pytest
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
# the same with most of them slow
SOME_PYRAMIDS = [
    name if name in ("test_foveal_dinat", "test_foveal_care") else pytest.param(name, marks=pytest.mark.slow)
    for name in PYRAMIDS
]
