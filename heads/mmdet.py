"""Backbones and the A3-FPN neck for MMDetection.

    _base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", ...]
    from foveal.heads.mmdet import completed  # below _base_: mmengine takes other files that import for a newer format

    custom_imports = dict(imports=["foveal.heads.mmdet"])
    model = completed(dict(backbone=dict(_delete_=True, type="FovealBackbone", name="dinat_tiny", pretrained=True)))

``configs/mmdet/`` has complete configs. Requires mmdet 3.3 with a compiled mmcv 2.1, or the maintained fork
``onedl-mmdetection`` with ``onedl-mmcv`` (the same import names).

For SyncBatchNorm use ``sync_bn=True`` of the backbone and the neck. The ``sync_bn`` of mmengine's runner uses PyTorch's
conversion, which drops the activations inside timm's norms (HaloNet, MaxViT and others).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .backbone import Backbone, ShapeSpec
from .body import build_body, synchronized
from .legacy import migrate_in_place
from .necks.a3fpn import A3FPN

try:
    from mmdet.registry import MODELS
except ImportError as error:
    raise ImportError(
        f"foveal.heads.mmdet needs MMDetection, which does not import here ({error}). Install onedl-mmengine, "
        "onedl-mmcv and onedl-mmdetection; or mmengine, mmcv 2.1 (compiled, not mmcv-lite) and mmdet 3.3"
    ) from error


@MODELS.register_module()
class FovealBackbone(Backbone):
    """Any foveal or timm model as a backbone of mmdet: images ``[B, 3, H, W]`` to a list of maps.

    Args:
        name: of the model.
        frozen_stages, norm_eval: see `Backbone`.
        kwargs: of `foveal.heads.build.build_backbone`: ``pretrained`` or ``checkpoint``, ``sync_bn``,
            ``drop_path_rate``, ``grad_checkpointing``, ``strides`` or ``out_indices``, ...; and of `timm.create_model`.

    Raises:
        ValueError: if ``init_cfg`` is given (mmengine would skip all names, as none match), and as `build_backbone`.
    """

    def __init__(self, name: str, *, frozen_stages: int = -1, norm_eval: bool = False, **kwargs: Any) -> None:
        if "init_cfg" in kwargs:
            raise ValueError(f"set the weights by pretrained=True or checkpoint=PATH, not by {kwargs['init_cfg']=}")
        body, classifier = build_body(name, **kwargs)
        super().__init__(body, classifier=classifier, frozen_stages=frozen_stages, norm_eval=norm_eval)

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        migrate_in_place(state_dict)
        super()._load_from_state_dict(state_dict, *args)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return list(super().forward(images).values())


@MODELS.register_module(name="A3FPN")
def a3fpn(
    in_channels: Sequence[int], strides: Sequence[int] = (4, 8, 16, 32), sync_bn: bool = False, **kwargs: Any
) -> A3FPN:
    """The A3-FPN neck over maps of these channels and strides.

    Args:
        in_channels, strides: of the maps; see `completed`.
        sync_bn: SyncBatchNorm if a process group is initialized.
        kwargs: of `A3FPN`: ``extra_levels="pool"`` for Faster and Mask R-CNN; for RetinaNet ``start_level=1`` and
            ``extra_levels="p6p7"``.

    Raises:
        ValueError: as `A3FPN`.
    """
    return synchronized(A3FPN(ShapeSpec(tuple(in_channels), tuple(strides)), **kwargs), sync_bn)


def completed(model: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model`` of a config, completed with values of its backbone.

    These are ``in_channels`` of the neck (and ``strides``, if its type is A3FPN), and ``mean`` and ``std`` of the data
    preprocessor (in mmdet's scale of 0 to 255, RGB) unless they are given here.

    Args:
        model: with a ``backbone`` of type FovealBackbone; entries of a base file may be missing. Not modified.

    Raises:
        ValueError: as `build_backbone`.
    """
    arguments = {key: value for key, value in model["backbone"].items() if key not in ("type", "_delete_")}
    with torch.device("meta"):
        backbone = FovealBackbone(**{**arguments, "pretrained": False, "checkpoint": None})
    neck = {**model.get("neck", {}), "in_channels": list(backbone.spec.channels)}
    if neck.get("type") == "A3FPN":
        neck["strides"] = list(backbone.spec.strides)
    images = dict(mean=[255 * x for x in backbone.mean], std=[255 * x for x in backbone.std])
    return {**model, "neck": neck, "data_preprocessor": {**images, **model.get("data_preprocessor", {})}}
