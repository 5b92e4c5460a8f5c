"""Image files as a model takes them."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn

from ..backbones.images import MODES, read_upright

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
        return read_upright(path, channels)
    except FileNotFoundError as error:
        raise OSError(f"{path}: no such file") from error
    except _UNREADABLE as error:
        raise OSError(f"{path}: not a readable image: {error or type(error).__name__}") from error


_PREPARE = """\
import numpy as np
from PIL import Image, ImageOps

photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")
width, height = {resized}
photo = photo.resize((width, height), Image.Resampling.{interpolation})
left, top = round((width - {columns}) / 2), round((height - {rows}) / 2)
pixels = np.asarray(photo.crop((left, top, left + {columns}, top + {rows})), np.float32) / 255
pixels = (pixels.reshape({rows}, {columns}, {channels}) - {mean}) / {std}
images = pixels.transpose(2, 0, 1)[None].astype(np.float32)
"""


def preparing(model: nn.Module) -> str | None:
    """Python that makes ``images`` ``[1, C, H, W]`` of ``photo.jpg`` as `preprocessing` does, with Pillow and NumPy
    alone; None for images that no file holds, or that are not cropped from the centre."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    channels, rows, columns = config["input_size"]
    if channels not in MODES or config["crop_mode"] != "center":
        return None
    height, width = (math.floor(side / config["crop_pct"]) for side in (rows, columns))
    resized = f"(int({height} * side / min(photo.size)) for side in photo.size)"
    if height != width:
        resized = f"(round(side / min(photo.width / {width}, photo.height / {height})) for side in photo.size)"
    return _PREPARE.format(
        mode=MODES[channels],
        resized=resized,
        interpolation=config["interpolation"].upper(),
        rows=rows,
        columns=columns,
        channels=channels,
        mean=list(config["mean"]),
        std=list(config["std"]),
    )


def label_names(model: nn.Module) -> list[str] | None:
    """The names of a classifier's classes that came with its weights, by index; timm also has them by number."""
    names = model.pretrained_cfg.get("label_names")
    if isinstance(names, dict):
        names = [name for _, name in sorted((int(index), name) for index, name in names.items())]
    return list(names) if names else None


def preprocessing(model: nn.Module) -> Any:
    """The evaluation transform of a model, from a PIL image to a ``[C, H, W]`` tensor, by its ``pretrained_cfg``."""
    return create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg), is_training=False)
