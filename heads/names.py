"""Translate the parameter names of published checkpoints, and check that they fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor


def translate(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    """The name with its first matching prefix replaced; None if no prefix matches.

    Args:
        table: prefixes and their replacements; ``{}`` is a number, in the order of both.
    """
    for source, target in table:
        if match := re.match(re.escape(source).replace(r"\{\}", r"(\d+)"), name):
            return target.format(*match.groups()) + name[match.end() :]
    return None


def check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], other_shape: Collection[str] = ()) -> None:
    """Compare names and shapes, before anything is loaded.

    Args:
        other_shape: names that may differ in shape.

    Raises:
        ValueError: if they differ; the message names the first few.
    """
    both = [name for name in own if name in given and name not in other_shape]
    shapes = [(name, tuple(given[name].shape), tuple(own[name].shape)) for name in both]
    found = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [f"{name} {theirs} for {ours}" for name, theirs, ours in shapes if theirs != ours],
    }
    parts = [f"{len(n)} {what}: {', '.join(n[:4])}{' ...' * (len(n) > 4)}" for what, n in found.items() if n]
    if parts:
        raise ValueError(f"the weights do not fit: {'; '.join(parts)}")
