"""Deprecated names of `foveal.heads.backbone`; to be removed in the next release."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from .backbone import Backbone
from .body import build_body
from .legacy import moved, old_arguments

__getattr__ = moved(__name__, {"FeatureSpec": "backbone:ShapeSpec"})


class Features(Backbone):
    """Deprecated: use `Backbone`, which returns a dict of maps; this returns a list."""

    def __init__(self, network: nn.Module, whole: Any, **kwargs: Any) -> None:
        super().__init__(network, classifier=whole, **kwargs)

    @property
    def network(self) -> nn.Module:
        return self.body

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return list(super().forward(images).values())


@old_arguments(backbone="name")
def build_features(name: str, *, frozen_stages: int = -1, norm_eval: bool = False, **kwargs: Any) -> Features:
    """Deprecated: use `foveal.heads.build.build_backbone`."""
    warnings.warn("build_features is deprecated, use build_backbone of foveal.heads.build", DeprecationWarning, 3)
    return Features(*build_body(name, **kwargs), frozen_stages=frozen_stages, norm_eval=norm_eval)
