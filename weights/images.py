"""Image files as a model takes them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import nn

from ..backbones.images import to_mode

# What Pillow's decoders are known to raise on files that are damaged, made up or too large.
_UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, ArithmeticError, LookupError, EOFError, MemoryError)
_UNREADABLE += (struct.error, NotImplementedError, Image.DecompressionBombError)


def read_image(path: str | Path, channels: int) -> Image.Image:
    """Open an image, upright, with the channels a model takes: 1 (grey) or 3 (RGB).

    Raises:
        ValueError: if the model takes another number of channels.
        OSError: if the file is missing or is not an image; the message names it.
    """
    if channels not in (1, 3):
        raise ValueError(f"the model takes {channels} channels; image files have 1 or 3")
    try:
        with Image.open(path) as image:
            return to_mode(ImageOps.exif_transpose(image), channels)
    except FileNotFoundError as error:
        raise OSError(f"{path}: no such file") from error
    except _UNREADABLE as error:
        raise OSError(f"{path}: not a readable image: {error or type(error).__name__}") from error


def preprocessing(model: nn.Module) -> Any:
    """The evaluation transform of a model, from a PIL image to a ``[C, H, W]`` tensor, by its ``pretrained_cfg``."""
    return create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg), is_training=False)
