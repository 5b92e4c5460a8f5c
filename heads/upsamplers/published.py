"""The published upsamplers, and upsamplers by name, folder or arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Published:
    """Published weights.

    Attributes:
        checkpoint: their name in the manifest: the backbone on whose maps they were trained, and a tag.
        arguments: of `create_upsampler`.
        cfg: address, licence and origin.
    """

    checkpoint: str
    arguments: dict[str, Any]
    cfg: PretrainedCfg


def _uplift(checkpoint: str, patch: int, name: str) -> Published:
    cfg = PretrainedCfg(
        hf_hub_id=f"UPLiFT-upsampler/{name}",
        hf_hub_filename=f"{name}.safetensors",
        input_size=(3, 448, 448),
        license="unknown",
        origin_url="https://github.com/mwalmer-umd/UPLiFT",
    )
    return Published(checkpoint, {"name": "uplift", "channels": 384, "patch": patch}, cfg)


PUBLISHED = {
    "uplift_dinov2_s14": _uplift("vit_small_patch14_dinov2.uplift", 14, "uplift_dinov2-s14"),
    "uplift_dinov3_splus16": _uplift("vit_small_plus_patch16_dinov3.uplift", 16, "uplift_dinov3-splus16"),
    "naf": Published(
        "vit_base_patch16_dinov3.naf",
        {"name": "naf"},
        PretrainedCfg(
            url="https://github.com/valeoai/NAF/releases/download/model/naf_release.pth",
            input_size=(3, 512, 512),
            license="unknown",
            origin_url="https://github.com/valeoai/NAF",
        ),
    ),
}


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """The tensors of a published file that are parameters: not the frequencies of the rotary embedding."""
    return {name: x for name, x in state.items() if name != "image_encoder.rope.periods"}


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
        arguments = PUBLISHED[name].arguments | arguments
        name = arguments.pop("name")
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
    name = str(source)
    if name in PUBLISHED:
        upsampler, state = create_upsampler(name), fetched(name, PUBLISHED[name].cfg)
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
