"""Image files as a model takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import nn


def read_image(path: str | Path, channels: int) -> Image.Image:
    """Open an image, upright, with the channels a model takes: 1 (grey) or 3 (RGB).

    Raises:
        ValueError: if the model takes another number of channels.
        OSError: if the file is missing or is not an image; the message names it.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"the model takes {channels} channels; image files have 1 or 3")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(modes[channels])
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"not a readable image: {error}"
        raise OSError(f"{path}: {reason}") from error


def preprocessing(model: nn.Module) -> Any:
    """The evaluation transform of a model, from a PIL image to a ``[C, H, W]`` tensor, by its ``pretrained_cfg``."""
    return create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg), is_training=False)
