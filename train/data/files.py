"""Files of a data folder of unknown layout: found by name, read with size limits."""

import hashlib
import json
import os
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import yaml
from PIL import Image

from ...backbones.images import image_shape, image_suffixes, is_hidden
from .guard import DataError, Report

LIMITS = {".xml": 2**24, ".txt": 2**26, ".yaml": 2**20, ".json": 2**32, ".csv": 2**30}  # bytes
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# raised by Pillow for files that are damaged, truncated, or not images
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# of a mask's name after that of its image
ENDINGS = re.compile(r"[_-](masks?|l|labels?|labelids|labeltrainids|seg|segmentation|gt|annotations?)$", re.IGNORECASE)
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])")


def split_of(path: str) -> str:
    """``train``, ``val`` or ``test`` by the last part of a path that names a split (``valid``, ``train2017``); else an
    empty string."""
    for part in reversed(PurePosixPath(path).parts):
        if found := _SPLIT.findall(part.lower()):
            return SPLIT_NAMES[found[-1]]
    return ""


class Paths:
    """Finds paths by the names that annotations use: a full path, the end of one, a file name, or a stem."""

    def __init__(self, paths: Iterable[str]):
        self.all = list(paths)
        self.names: dict[str, list[str]] = defaultdict(list)
        for path in self.all:
            name = PurePosixPath(path)
            self.names[name.name].append(path)
            self.names[name.stem].append(path)

    def find(self, name: str, near: str = "", split: str = "") -> str | None:
        """The path that matches ``name`` best; None if there is none, or no single best.

        Args:
            name: it may have backslashes, a leading ``./``, folders of another machine, or no suffix.
            near: the annotation file that contains the name; paths close to it are preferred.
            split: then paths of this split are preferred.
        """
        parts = _parts(name)
        found = self.names.get(parts[-1], []) if parts else []
        if len(found) < 2:
            return found[0] if found else None
        ranks = sorted(((_likeness(path, parts, near, split), path) for path in found), reverse=True)
        return ranks[0][1] if ranks[0][0] > ranks[1][0] else None

    def find_each(self, names: Sequence[str], near: str = "", split: str = "") -> list[str | None]:
        """`find` for all images of an annotation file. A path that matches several names is only used for those that
        it ends with, or that end with it.

        Raises:
            DataError: several paths match a name equally well.
        """
        found = [self.find(name, near, split) for name in names]
        for name, path in zip(names, found, strict=True):
            if path is None and (several := self.names.get(_parts(name)[-1] if _parts(name) else "", [])):
                raise DataError(f"the image {name} may be {' or '.join(several[:5])}{' ...' * (len(several) > 5)}")
        count = Counter(found)
        return [
            path if path is None or count[path] == 1 or ends_with(path, name) or ends_with(name, path) else None
            for name, path in zip(names, found, strict=True)
        ]


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace("\\", "/")).parts


def ends_with(path: str, name: str) -> bool:
    """Whether a path ends with ``name``."""
    parts = _parts(name)
    return _parts(path)[-len(parts) :] == parts


def find_images(folder: Path, names: Sequence[str], report: Report) -> list[Path]:
    """Paths of images from their names in annotations: in ``folder``, else by `Paths.find_each`, which is reported.
    Missing images keep the path of their name.

    Raises:
        DataError: several files match a name equally well.
    """
    paths = [folder / name for name in names]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if missing and folder.is_dir():
        taken = {os.path.normpath(path) for path in paths}
        places = Files(folder).images.find_each([names[number] for number in missing])
        for number, place in zip(missing, places, strict=True):
            if place is not None and os.path.normpath(folder / place) not in taken:
                paths[number] = folder / place
                report.rows.append((names[number], None, "image found at another path"))
    return paths


def _likeness(path: str, parts: tuple[str, ...], near: str, split: str) -> tuple[int, bool, int]:
    own, there = PurePosixPath(path).parts, PurePosixPath(near).parent.parts
    same = next((i for i, (a, b) in enumerate(zip(own[::-1], parts[::-1], strict=False)) if a != b), len(own))
    shared = next((i for i, (a, b) in enumerate(zip(own, there, strict=False)) if a != b), len(there))
    return max(same, 1), bool(split) and split_of(str(PurePosixPath(path).parent)) == split, shared


class Files:
    """All files below a folder by suffix, as sorted paths relative to it, without hidden files and folders."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise DataError(f"the data folder {root} does not exist (data.root)")
        self.root = root
        self.by_suffix: dict[str, list[str]] = defaultdict(list)
        self.hidden: list[str] = []
        seen: set[str] = set()  # links may form a cycle
        for folder, folders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            inside = "" if folder == str(root) else f"{os.path.relpath(folder, root)}/".replace(os.sep, "/")
            self.hidden += sorted(f"{inside}{name}" for name in (*folders, *names) if is_hidden(name))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            for name in sorted(name for name in names if not is_hidden(name)):
                self.by_suffix[os.path.splitext(name)[1].lower()].append(f"{inside}{name}")
        readable = image_suffixes()
        self.images = Paths(sorted(path for end in self.by_suffix if end in readable for path in self.by_suffix[end]))

    def __getitem__(self, suffix: str) -> list[str]:
        return self.by_suffix.get(suffix, [])

    def ignored(self, used: Iterable[str] = ()) -> dict[str, list[str]]:
        """Paths that are neither images nor of the ``used`` suffixes, by suffix."""
        known = image_suffixes() | {*used}
        return {suffix: paths for suffix, paths in self.by_suffix.items() if suffix not in known}

    def text(self, path: str) -> str:
        """The text of a file; raises `DataError` if it is too large, unreadable or not UTF-8."""
        try:
            return _read_bytes(self.root / path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.root / path} is not UTF-8 text: {error}") from None

    def json(self, path: str) -> Any:
        return read_json(self.root / path)

    def yaml(self, path: str) -> Any:
        """The content of a file, each scalar as its text: a class may be called no, 007 or 1.10."""
        try:
            return yaml.load(self.text(path), yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise DataError(f"{path} is not YAML: {error}") from None


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image, upright; raises one of `UNREADABLE`."""
    return image_shape(path)[:2]


def same_files(paths: Iterable[str]) -> dict[str, str]:
    """Duplicate file -> first file with the same content. Only files of equal size are read."""
    by_length: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        with suppress(OSError):
            by_length[os.stat(path).st_size].append(path)
    same: dict[str, str] = {}
    for group in by_length.values():
        first: dict[bytes, str] = {}
        for path in group if len(group) > 1 else ():
            digest = hashlib.blake2b()
            with suppress(OSError), open(path, "rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
                if (known := first.setdefault(digest.digest(), path)) != path:
                    same[path] = known
    return same


def read_json(file: Path) -> Any:
    """The content of a JSON file; raises `DataError` if it is too large, unreadable or not JSON."""
    content = _read_bytes(file, ".json")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON, or truncated: {error}") from None


def read_xml(file: Path) -> ElementTree.Element:
    """The root of an XML file; raises `DataError` if it is too large, unreadable, not XML, or has a DOCTYPE, whose
    entities could expand without limit or read files."""
    content = _read_bytes(file)
    try:
        return ElementTree.fromstring(content, ElementTree.XMLParser(target=_NoDocumentType()))
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"{file} is not valid XML, or truncated: {error}") from None


def _read_bytes(file: Path, kind: str = "") -> bytes:
    limit = LIMITS.get(kind or file.suffix.lower(), 2**20)
    try:
        if (size := file.stat().st_size) > limit:
            raise DataError(f"{file} has {size:,} bytes; the limit is {limit:,}")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from None


class _NoDocumentType(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(f"<!DOCTYPE {name}> is not allowed in annotations")


def sizes_of(files: Files, paths: Iterable[str], report: Report) -> dict[str, tuple[int, int]]:
    """Path -> height and width; images that cannot be opened are added to the report."""
    sizes = {}
    for path in paths:
        try:
            sizes[path] = image_size(files.root / path)
        except UNREADABLE as error:
            report.rows.append((path, None, f"image cannot be opened: {type(error).__name__}"))
    return sizes
