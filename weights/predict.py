"""Deprecated: `foveal.train.predict` replaces this module, which the next release removes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..train import predict as predict_all


def predict(
    source: str | Path, images: Sequence[str | Path], top: int = 5
) -> Iterator[tuple[str, list[tuple[str, float]] | OSError]]:
    """Deprecated: use `foveal.train.predict`. Yields each path with (label, probability) pairs, or with the error of a
    file that cannot be read."""
    text = "foveal.weights.predict will be removed in the next release: use foveal.train.predict"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    for each in predict_all(source, images, top=top):
        yield each.path, each.error or [(result.label, result.score) for result in each.results]
