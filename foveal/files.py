"""Files that are complete or absent. A leaf: every folder may import it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it when the block ends, removed when the block raises.

    Readers see the old file or the new one, never a part. The temporary name is unique and hidden and keeps the suffix,
    by which libraries choose a format.

    Raises:
        OSError: from the rename; ``path`` is then unchanged.

    Examples:
        >>> from foveal.files import atomic
        >>> with atomic("scores.json") as new:
        ...     _ = new.write_text("{}")
        >>> open("scores.json").read()
        '{}'
    """
    path = Path(path)
    new = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
