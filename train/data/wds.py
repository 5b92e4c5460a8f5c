"""WebDataset shards: tar files of images and labels, indexed for random access, or streamed.

Consecutive files with the same name up to the first dot of the last part are a sample: ``KEY.jpg``, ``KEY.cls``. Local
shards are indexed, so that any sample can be read alone: order, share of each process and resuming are those of a
folder. Shards behind an address or a command are streamed.
"""

import hashlib
import io
import json
import os
import random
import re
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing import Array
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import IterableDataset, get_worker_info

from ...files import atomic
from .dataset import Found, Item
from .files import UNREADABLE
from .guard import DataError, Excluded
from .index import ClassificationIndex, encode_paths
from .transforms import EvalTransform, TrainTransform, seeded

IMAGES = ("jpg", "jpeg", "png", "webp", "npy", "tif", "tiff")
OPEN_SHARDS = 64  # of each process
NO_LABEL, NO_IMAGE = -1, -2  # in place of a label


@dataclass(kw_only=True)
class ShardIndex(ClassificationIndex):
    """Locations of the N samples of S shards below ``root``. A label may be NO_LABEL or NO_IMAGE."""

    root: str
    shards: np.ndarray  # bytes [S]: names
    stamps: np.ndarray  # int64 [S, 2]: size in bytes and time of change (ns) when they were indexed
    shard: np.ndarray  # int32 [N]
    offset: np.ndarray  # int64 [N]: of the image's bytes
    size: np.ndarray  # int64 [N]
    key: np.ndarray  # bytes [N]
    files: OrderedDict[int, io.FileIO] = field(default_factory=OrderedDict)  # open shards of this process
    per_sample: ClassVar[tuple[str, ...]] = ("shard", "offset", "size", "label", "key")
    stored: ClassVar[tuple[str, ...]] = ("shards", "stamps", *per_sample)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"files": OrderedDict()}

    def lengths(self) -> np.ndarray:
        """Samples of each shard."""
        return np.bincount(self.shard, minlength=len(self.shards))

    def write(self, path: Path) -> None:
        with atomic(path) as new:
            np.savez_compressed(new, **{name: getattr(self, name) for name in self.stored})

    def _path(self, shard: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.shards[shard]))

    def name(self, number: int) -> str:
        return f"{self._path(self.shard[number])}:{os.fsdecode(self.key[number])}"

    def open(self, number: int) -> io.BytesIO:
        if self.label[number] < 0:
            raise ValueError("no image" if self.label[number] == NO_IMAGE else "no class")
        size = int(self.size[number])
        content = os.pread(self._file(int(self.shard[number])).fileno(), size, int(self.offset[number]))
        if len(content) < size:
            raise EOFError(f"{len(content)} of its {size} bytes are there")
        return io.BytesIO(content)

    def _file(self, shard: int) -> io.FileIO:
        if shard in self.files:
            self.files.move_to_end(shard)
        else:
            self.files[shard] = io.FileIO(self._path(shard))
            if len(self.files) > OPEN_SHARDS:
                self.files.popitem(last=False)[1].close()
        return self.files[shard]


def stamps(shards: Sequence[str]) -> np.ndarray:
    """int64 ``[S, 2]``: size and modification time of each file."""
    found = [os.stat(shard) for shard in shards]
    return np.array([(each.st_size, each.st_mtime_ns) for each in found], np.int64).reshape(-1, 2)


def index_shards(root: str, names: Sequence[str]) -> ShardIndex:
    """Read the headers and labels of tar files below ``root``.

    Raises:
        DataError: a file is not a tar file, or truncated.
    """
    paths = [os.path.join(root, name) for name in names]
    rows = [(number, *sample) for number, path in enumerate(paths) for sample in scan_shard(path)]
    shard, key, offset, size, label = zip(*rows, strict=True) if rows else ([],) * 5
    return ShardIndex(
        root=root,
        shards=encode_paths(names),
        stamps=stamps(paths),
        shard=np.array(shard, np.int32),
        offset=np.array(offset, np.int64),
        size=np.array(size, np.int64),
        label=np.array(label, np.int64),
        key=encode_paths(key),
    )


def scan_shard(path: str) -> list[tuple[str, int, int, int]]:
    """The samples of a tar file in order: key, offset and size of the image, label.

    Raises:
        DataError: not a tar file, or truncated.
    """
    samples: list[tuple[str, int, int, int]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in groupby(_members(tar), key=itemgetter(0)):
                image, label = None, NO_LABEL
                for _, suffix, member in members:
                    if suffix in IMAGES and image is None:
                        image = member.offset_data, member.size
                    elif suffix == "cls":
                        text = tar.extractfile(member).read()
                        label = int(text) if re.fullmatch(rb"\s*\d+\s*", text) else NO_LABEL
                offset, size = image or (0, 0)
                samples.append((key, offset, size, label if image else NO_IMAGE))
            tar.fileobj.seek(tar.offset)  # tarfile treats an invalid header as the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) not in (b"", bytes(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"the shard {path} can't be read after {len(samples)} samples ({error}); copy or make it again"
        ) from None
    return samples


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, suffix and location of each file of a sample."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile keeps all of them
        match = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]*)", member.name)
        if member.isfile() and match is not None:
            yield match[1], match[2].lower(), member


def load_index(root: str, split: str, names: Sequence[str], lengths: Sequence[int] = ()) -> ShardIndex:
    """The index of a split's local shards: the stored one if it is up to date, otherwise a new one, which is stored
    next to the shards if possible (with a warning if not).

    Args:
        lengths: samples of each shard according to ``_info.json``; empty: unknown.

    Raises:
        DataError: shards are missing, damaged, or have other numbers of samples.
    """
    paths = [os.path.join(root, name) for name in names]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{len(missing)} of {len(paths)} shards don't exist, first {missing[0]}")
    tag = split if re.fullmatch(r"[\w-]+", split) else hashlib.sha256(split.encode()).hexdigest()[:12]  # a pattern
    file = Path(root) / f"_index-{tag}.npz"
    index = _read_index(root, file, names)
    if index is None or not np.array_equal(index.stamps, stamps(paths)):
        index = index_shards(root, names)
        if os.access(root, os.W_OK):
            try:
                index.write(file)
            except OSError as error:  # a full disk
                warnings.warn(f"{file} can't be written, each start will index the shards: {error}", stacklevel=2)
    counts = index.lengths()
    for path, count, expected in zip(paths, counts.tolist(), lengths or counts, strict=True):
        if count != expected:
            raise DataError(f"the shard {path} has {count} samples, not {expected} (_info.json); copy or make it again")
    return index


def _read_index(root: str, path: Path, names: Sequence[str]) -> ShardIndex | None:
    """A stored index if it is valid for these shards, else None."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            index = ShardIndex(root=root, **{name: stored[name] for name in ShardIndex.stored})
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError):
        return None
    return index if [os.fsdecode(name) for name in index.shards] == list(names) else None


class StreamedImages(IterableDataset):
    """Images in shards behind addresses or commands (``https://``, ``pipe:``), read sequentially.

    Every process and worker reads its own shards: in evaluation each sample is read exactly once. In training shards
    are shuffled by seed, epoch and first batch, samples in a buffer, and repeated as often as the epoch needs; a reader
    that finds no image in its shards reports it and ends.
    """

    def __init__(
        self,
        shards: Sequence[str],
        transform: TrainTransform | EvalTransform,
        *,
        train: bool,
        seed: int,
        excluded: Excluded,
        rank: int,
        world: int,
        workers: int,
    ):
        self.shards, self.excluded = list(shards), excluded
        if train and len(self.shards) < world * max(workers, 1):
            raise DataError(
                f"{len(self.shards)} shards can't feed {world} process(es) x {max(workers, 1)} data.workers; lower it"
            )
        self.transform, self.train, self.seed = transform, train, seed
        self.rank, self.world = rank, world
        self.place = Array("q", 2)  # epoch, batch; shared, since workers hold copies of this object

    def set(self, epoch: int, start: int = 0) -> None:
        """The next iteration reads this epoch, from its ``start``-th batch on."""
        self.place[:] = epoch, start

    def __iter__(self) -> Iterator[Item]:
        from webdataset import filters, pipeline, shardlists, tariterators

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        shards = list(self.shards)
        epoch, start = self.place
        draw = random.Random(f"{self.seed}/{epoch}/{start}")
        if self.train:
            draw.shuffle(shards)
        reader = self.rank * workers + worker
        mine = shards[reader :: self.world * workers]
        found: Found = []
        count = 0

        def book(error: Exception) -> bool:
            found.append((str(getattr(error, "args", [""])[-1]), f"{type(error).__name__}: {error}"))
            return True

        while True:
            before = count
            stages = [shardlists.SimpleShardList(mine), tariterators.tarfile_to_samples(handler=book)]
            if self.train:
                stages.append(filters.shuffle(2048, rng=draw))
            for sample in pipeline.DataPipeline(*stages):
                name = f"{sample.get('__url__')}:{sample.get('__key__')}"
                if self.excluded.holds(name):
                    continue
                with seeded(self.seed, epoch, start, reader, count) if self.train else nullcontext():
                    try:
                        kind = next(k for k in IMAGES if k in sample)
                        label = int(sample["cls"])
                        image = self.transform.read(io.BytesIO(sample[kind]))
                    except (*UNREADABLE, KeyError, StopIteration) as error:
                        found.append((name, f"{type(error).__name__}: {error}"))
                        continue
                    pixels = torch.as_tensor(self.transform.augment(image))
                count += 1
                yield (pixels, label), found.copy()
                found.clear()
            if self.train and count > before:
                continue  # reports come with the next image: batches stay full
            if self.train:
                found.append((mine[0], f"first of {len(mine)} shards"))
            if found:
                yield None, found
            return


def find_shards(root: str, split: str, train: bool) -> tuple[list[str], list[int], int]:
    """Names of a split's shards, the samples of each (empty if unknown), and their total.

    Raises:
        DataError: no such split, no shards, or an ``_info.json`` with an address or a command instead of local files.
    """
    try:
        reader = ReaderWds(root=root, split=split, is_training=train)
    except (RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"WebDataset split {split!r} in {root}: {error}") from None
    names = [str(name) for name in reader.split_info.filenames]
    from webdataset.shardlists import expand_urls

    asked = set(expand_urls(split.partition("|")[0]))
    if foreign := [name for name in names if ":" in name and name not in asked]:  # pipe:COMMAND would be run
        raise DataError(
            f"_info.json in {root} names the shard {foreign[0]!r}, which is not a local file and could be a command; "
            "if intended, pass it as the split"
        )
    if "://" in root:
        names = [name if ":" in name else f"{root.rstrip('/')}/{name}" for name in names]
    if not names:
        raise DataError(f"WebDataset split {split!r} in {root} has no shards")
    return names, list(reader.split_info.shard_lengths), reader.num_samples


def read_classes(root: str) -> list[str]:
    """The class names in ``_info.json`` of local shards.

    Raises:
        DataError: there are none.
    """
    file = Path(root) / "_info.json"
    try:
        classes = json.loads(file.read_text(encoding="utf-8")).get("classes") if file.is_file() else None
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file} is not valid: {error}") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"the shards in {root} don't name their classes; set data.num_classes or data.classes")
    return classes


def is_streamed(name: str) -> bool:
    """Whether a shard can only be read sequentially: behind an address or a command, or compressed."""
    return "://" in name or name.startswith("pipe:") or not name.endswith(".tar")
