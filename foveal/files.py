"""Atomic writing of files. Imports nothing of ours; every folder may import it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` at the end of the block, removed if the block raises.

    Readers see the old file or the new one, never a partial one. The temporary name is unique and hidden and keeps the
    suffix, from which libraries infer a format.

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


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON with a newline at the end."""
    with atomic(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
