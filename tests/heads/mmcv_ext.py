"""What mmdet 3.3.0 (mmengine 0.10.7, mmcv-lite 2.1.0) lacks to be imported and run here, for tests only.

`install` puts in place:

* ``mmcv._ext``, the compiled extension that mmcv-lite comes without: NMS and RoIAlign by torchvision, and a
  NotImplementedError for everything else.
* ``is_installed`` and ``get_installed_path`` in ``mmengine.config.config``: theirs ask ``pkg_resources``, which
  setuptools dropped in version 82; they serve the ``mmdet::`` in a configuration's ``_base_``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
import torchvision


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
    if offset:
        raise NotImplementedError(f"nms with offset={offset}")
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def roi_align_forward(
    input,
    rois,
    output,
    argmax_y,
    argmax_x,
    aligned_height,
    aligned_width,
    spatial_scale,
    sampling_ratio,
    pool_mode,
    aligned,
) -> None:
    if pool_mode != 1:
        raise NotImplementedError("roi_align by maxima")
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad,
    rois,
    argmax_y,
    argmax_x,
    grad_input,
    aligned_height,
    aligned_width,
    spatial_scale,
    sampling_ratio,
    pool_mode,
    aligned,
) -> None:
    with torch.enable_grad():  # the operation is linear in its input, so any input has this gradient
        image = torch.zeros_like(grad_input, requires_grad=True)
        out = torchvision.ops.roi_align(
            image, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned
        )
    grad_input.copy_(torch.autograd.grad(out, image, grad)[0])


class _Extension(ModuleType):
    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(f"mmcv's {name} has no stand-in")

        return missing


def install() -> None:
    """Make ``mmdet.models`` importable; a compiled mmcv is left as it is."""
    if importlib.util.find_spec("mmcv._ext") is None:
        extension = _Extension("mmcv._ext")
        extension.__spec__ = importlib.util.spec_from_loader("mmcv._ext", loader=None)
        extension.nms = nms
        extension.roi_align_forward = roi_align_forward
        extension.roi_align_backward = roi_align_backward
        sys.modules["mmcv._ext"] = extension

    if importlib.util.find_spec("pkg_resources") is None:
        import mmengine.config.config as config

        config.is_installed = lambda package: importlib.util.find_spec(package) is not None
        config.get_installed_path = lambda package: str(Path(importlib.util.find_spec(package).origin).parent)
