"""The published upsamplers, and upsamplers by name, folder or arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.models import PretrainedCfg
from torch import Tensor

from ..body import fetched, local_path
from ..dense import WEIGHTS, read_dense_config
from ..names import check_fit
from .base import Bilinear, Upsampler
from .naf import NAF
from .uplift import UPLiFT

UPSAMPLERS: dict[str, type[Upsampler]] = {each.kind: each for each in (UPLiFT, NAF, Bilinear)}

_IMAGES: dict[str, Any] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), num_classes=None)
_UPLIFT: dict[str, Any] = dict(
    architecture="uplift",
    input_size=(3, 448, 448),
    license="unknown",
    origin_url="https://github.com/mwalmer-umd/UPLiFT",
    paper_ids="arXiv:2601.17950",
    **_IMAGES,
)
TAG = "in1k"  # all were trained on ImageNet-1K, without labels
PUBLISHED: dict[str, tuple[dict[str, int], PretrainedCfg]] = {  # arguments and weights
    "uplift_dinov2_s14": (
        dict(channels=384, patch=14),
        PretrainedCfg(
            hf_hub_id="UPLiFT-upsampler/uplift_dinov2-s14",
            hf_hub_filename="uplift_dinov2-s14.safetensors",
            **_UPLIFT,
        ),
    ),
    "uplift_dinov3_splus16": (
        dict(channels=384, patch=16),
        PretrainedCfg(
            hf_hub_id="UPLiFT-upsampler/uplift_dinov3-splus16",
            hf_hub_filename="uplift_dinov3-splus16.safetensors",
            **_UPLIFT,
        ),
    ),
    "naf": (
        {},
        PretrainedCfg(
            url="https://github.com/valeoai/NAF/releases/download/model/naf_release.pth",
            architecture="naf",
            input_size=(3, 512, 512),
            license="unknown",
            origin_url="https://github.com/valeoai/NAF",
            paper_ids="arXiv:2511.18452",
            **_IMAGES,
        ),
    ),
}


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """The tensors of a published file that are parameters: not the frequencies of the rotary embedding."""
    return {name: x for name, x in state.items() if name != "image_encoder.rope.periods"}


def is_published(name: str) -> bool:
    """Whether it names published weights, with or without their tag."""
    return name.removesuffix(f".{TAG}") in PUBLISHED


def create_upsampler(name: str, **arguments: Any) -> Upsampler:
    """An upsampler with random weights.

    Args:
        name: in `UPSAMPLERS` or `PUBLISHED`.
        arguments: of its class.

    Raises:
        ValueError: unknown name or arguments.

    Examples:
        >>> from foveal.heads.upsamplers import create_upsampler
        >>> create_upsampler("uplift", channels=192, patch=16).arguments
        {'name': 'uplift', 'channels': 192, 'patch': 16}
    """
    if name in PUBLISHED:
        published, cfg = PUBLISHED[name]
        name, arguments = str(cfg.architecture), published | arguments
    if name not in UPSAMPLERS:
        raise ValueError(f"unknown upsampler {name!r}; choose from {', '.join({**UPSAMPLERS, **PUBLISHED})}")
    try:
        return UPSAMPLERS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"upsampler {name} with {arguments}: {error}") from None


def load_upsampler(source: str | Path) -> Upsampler:
    """An upsampler with its weights, in evaluation mode.

    Args:
        source: ``"bilinear"``, a published name (``"naf"``, ``"uplift_dinov2_s14"``, ``"uplift_dinov3_splus16"``), or a
            folder of ``foveal train upsample`` or ``foveal convert``.

    Raises:
        ValueError: neither of them, or weights that do not fit.
        OSError: published weights cannot be downloaded.

    Examples:
        >>> from foveal.heads.upsamplers import load_upsampler
        >>> load_upsampler("bilinear").kind
        'bilinear'
    """
    name = str(source).removesuffix(f".{TAG}")
    if is_published(name):
        upsampler, state = create_upsampler(name), fetched(name, PUBLISHED[name][1])
    elif name == "bilinear":
        return Bilinear().eval()
    else:
        found = read_dense_config(local_path(source))
        if found is None or found[1].get("task") != "upsample":
            raise ValueError(
                f"{str(source)!r} is no folder with an upsampler; the published ones are {', '.join(PUBLISHED)}"
            )
        folder, config = found
        upsampler = create_upsampler(**config["arguments"])
        state = safetensors.torch.load_file(folder / WEIGHTS)
    state = checkpoint_filter_fn(state)
    try:
        check_fit(upsampler.state_dict(), state)
    except ValueError as error:
        raise ValueError(f"{source} as {upsampler.kind}: {error}") from None
    upsampler.load_state_dict(state)
    return upsampler.eval()
