"""IDX files of MNIST and similar datasets (http://yann.lecun.com/exdb/mnist), plain or gzipped.

A file is a big-endian header (two zero bytes, a type code, the number of dimensions, then each dimension as uint32)
followed by the values, last dimension fastest. Fashion-MNIST (Xiao et al., arXiv 1708.07747, MIT licence) comes as four
of them in Debian's package ``dataset-fashion-mnist``.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from .guard import DataError

UINT8 = 0x08  # type code of unsigned bytes, the only one in these datasets
SPLITS = {"train": "train", "val": "t10k"}


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of bytes with ``ndim`` dimensions.

    Returns:
        uint8 array of the shape in the header.

    Raises:
        DataError: wrong magic number, or wrong number of values.
    """
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read (damaged or truncated?): {error}") from None
    header, magic = 4 + 4 * ndim, bytes([0, 0, UINT8, ndim])
    if content[:4] != magic:
        raise DataError(
            f"{path} is not an IDX file of {ndim}-D bytes: starts with {content[:4].hex()}, not {magic.hex()}"
        )
    if len(content) < header:
        raise DataError(f"{path} is truncated: {len(content)} bytes, but the header alone has {header}")
    shape = tuple(np.frombuffer(content, ">u4", ndim, offset=4).tolist())
    values = np.frombuffer(content, np.uint8, offset=header)
    if len(values) != math.prod(shape):
        raise DataError(f"{path}: shape {shape} has {math.prod(shape)} bytes, the file holds {len(values)}")
    return values.reshape(shape).copy()  # writable


def _find(root: Path, name: str) -> Path:
    for candidate in (root / name, root / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    hint = "" if root.is_dir() else f" (the folder {root} does not exist)"
    raise DataError(
        f"no {name} or {name}.gz in {root}{hint}; `make fashion-mnist` fetches Fashion-MNIST into data/fashion-mnist, "
        "data.root names another folder"
    )


def read_split(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[N, rows, columns]`` and labels ``[N]``, both uint8, of a split (``train`` or ``val``).

    Raises:
        DataError: a file is missing or damaged, or the numbers of labels and images differ.
    """
    if split not in SPLITS:
        raise DataError(f"IDX files have the splits {', '.join(SPLITS)}, not {split!r}")
    images = read_idx(_find(root, f"{SPLITS[split]}-images-idx3-ubyte"), 3)
    labels = read_idx(_find(root, f"{SPLITS[split]}-labels-idx1-ubyte"), 1)
    if len(images) != len(labels):
        raise DataError(f"{root}, {split}: {len(images)} images but {len(labels)} labels")
    if len(images) == 0:
        raise DataError(f"{root}, {split}: the files hold no images")
    return images, labels
