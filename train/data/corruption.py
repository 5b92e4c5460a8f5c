"""The 15 corruptions of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), in five severities, for held-out
images; by the library imagecorruptions."""

import difflib
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from ...configs.schema import ConfigError

NAMES = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur")
NAMES += ("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression")
SEVERITIES = (1, 2, 3, 4, 5)
SEEDED = ("impulse_noise", "glass_blur")  # take a seed; the others draw from NumPy's global state
Images = TypeVar("Images", torch.Tensor, np.ndarray)


class Corruption:
    """Corrupts images; the random numbers depend on the image alone.

    Args:
        name: one of ``NAMES``.
        severity: 1 to 5.
    """

    def __init__(self, name: str, severity: int):
        self.name, self.severity = name, severity

    def __call__(self, image: Images) -> Images:
        """A uint8 image ``[C, H, W]`` of 1 or 3 channels, of 32 pixels or more a side, to the same. A grey image is
        corrupted as one of three channels, and keeps the first."""
        from imagecorruptions import corrupt

        pixels = np.ascontiguousarray(np.asarray(image))
        seed = zlib.crc32(pixels.tobytes())
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            more = {"seed": seed} if self.name in SEEDED else {}
            new = corrupt(pixels.transpose(1, 2, 0), self.severity, self.name, **more)
        finally:
            np.random.set_state(state)
        new = np.ascontiguousarray(new.transpose(2, 0, 1)[: len(pixels)])
        return torch.from_numpy(new) if isinstance(image, torch.Tensor) else new


def parse(text: str | None) -> list[Corruption]:
    """The corruptions of ``data.corruption``: ``NAME:SEVERITY``, ``NAME`` in all severities, or ``all``.

    Raises:
        ConfigError: an unknown name or severity.
    """
    if text is None:
        return []
    name, colon, severity = text.partition(":")
    if name != "all" and name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.3)
        raise ConfigError(f"data.corruption={text}: no corruption {name!r}; nearest: {', '.join(near) or 'all'}")
    if colon and severity not in map(str, SEVERITIES):
        raise ConfigError(f"data.corruption={text}: the severity must be 1 to 5")
    severities = (int(severity),) if colon else SEVERITIES
    return [Corruption(each, level) for each in (NAMES if name == "all" else (name,)) for level in severities]


def only(text: str | None, input_size: Sequence[int]) -> Corruption | None:
    """The corruption of the held-out images, if it is one alone; several are evaluated one after the other.

    Raises:
        ConfigError: from `parse`, or an ``input_size`` (channels, height, width) that the library does not take.
    """
    found = parse(text)
    channels, *size = input_size
    if found and (channels not in (1, 3) or min(size) < 32):
        raise ConfigError(
            f"data.corruption={text} needs images of 1 or 3 channels and at least 32 pixels a side (data.image_size), "
            f"not {channels} and {size[0]}x{size[1]}"
        )
    return found[0] if len(found) == 1 else None
