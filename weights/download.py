"""The files of the manifest, dense models included, from their addresses."""

from __future__ import annotations

from pathlib import Path

from ..backbones import download
from .manifest import Checkpoint


def fetch(checkpoint: Checkpoint) -> Path:
    """The file of a released checkpoint, from a cache or the first of its addresses that gives it.

    Raises:
        OSError: if no address does (see `backbones.download.fetch`), or it has none.
    """
    if not checkpoint.addresses:
        raise OSError(
            f"{checkpoint.file} cannot be fetched: download it by hand from {checkpoint.page} and name the file "
            f"instead of {checkpoint.name}"
        )
    return download.fetch(checkpoint.name, checkpoint.addresses, checkpoint.sha256)
