"""``foveal shards``: WebDataset shards from folders of images.

The plan (which image goes to which shard, in which order) depends only on names and sizes of the images and on the
options. Each shard is written under a temporary name and renamed; the same command continues a stopped run. Image files
are copied byte for byte unless they are resized.
"""

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from ...backbones.images import image_shape, kept_suffix, read_pixels, to_mode, upright
from ...files import atomic
from .files import UNREADABLE
from .folder import read_folder, scan_folder
from .guard import BadSamples, DataError
from .wds import load_index

SPLITS = ("train", "val")
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # supported by readers of shards; anything else becomes PNG
LOCK = ".lock"
QUALITY = 90  # of a resized JPEG


@dataclass(frozen=True)
class Options:
    """Options of `make_shards`.

    Attributes:
        samples: images per shard; None: by ``megabytes``.
        megabytes: size of a shard, by its source files, in 10^6 bytes.
        seed: of the order.
        verify: decode every image; unreadable ones are left out and listed.
        max_size: images with a longer side are resized to it and stored as JPEG.
        quality: store every image as JPEG of this quality; None: only resized ones, with 90.
    """

    samples: int | None = None
    megabytes: float = 100.0
    seed: int = 0
    verify: bool = False
    max_size: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        limits = {"samples": (1, np.inf), "max_size": (1, np.inf), "quality": (1, 100), "megabytes": (1e-6, np.inf)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise DataError(f"{name} is {value}, must be from {least:g} to {most:g}")


@dataclass
class Done:
    """Result: per split the number of shards and samples; and the skipped images, with the reason."""

    splits: dict[str, tuple[int, int]]
    written: int  # shards of this run; the others existed
    bad: dict[str, str]


Sample = tuple[str, str, int]  # path, key in the shard, label


@dataclass(frozen=True)
class Plan:
    """The samples of each shard, by split; ``digest`` is a hash of everything that the shards depend on."""

    classes: list[str]
    splits: dict[str, list[list[Sample]]]
    digest: str

    @classmethod
    def make(cls, source: Path, options: Options) -> "Plan":
        """Raises:
        DataError: folders that are missing or empty, or images in deeper folders.
        """
        splits = [split for split in SPLITS if (source / split).is_dir()]
        if not splits:
            raise DataError(f"{source} has no folder {' or '.join(map(repr, SPLITS))} with a folder for each class")
        classes = scan_folder(source, splits[0])
        digest = hashlib.sha256(json.dumps([vars(options), classes], sort_keys=True).encode())
        plan = {}
        for split in splits:
            index = read_folder(source, split, classes)
            if text := str(index.report):
                warnings.warn(text, stacklevel=2)
            images = sorted(zip(map(index.name, range(len(index))), index.label.tolist(), strict=True))
            facts = [os.stat(path) for path, _ in images]
            for (path, label), fact in zip(images, facts, strict=True):
                name = os.path.relpath(path, source)
                digest.update(os.fsencode(f"{name}\0{label}\0{fact.st_size}\0{fact.st_mtime_ns}\n"))
            keys = _keys([path for path, _ in images])
            order = np.random.default_rng([options.seed, SPLITS.index(split)]).permutation(len(images))
            shards: list[list[Sample]] = [[]]
            size = 0
            for i in order.tolist():
                if len(shards[-1]) == options.samples if options.samples else size >= options.megabytes * 1e6:
                    shards.append([])
                    size = 0
                shards[-1].append((images[i][0], keys[i], images[i][1]))
                size += facts[i].st_size
            plan[split] = shards
        return cls(classes, plan, digest.hexdigest())

    def shards(self, output: Path) -> dict[Path, list[Sample]]:
        """The samples of each file below ``output``."""
        return {
            output / f"{split}-{number:06}.tar": samples
            for split, shards in self.splits.items()
            for number, samples in enumerate(shards)
        }


def _keys(paths: Sequence[str]) -> list[str]:
    """``CLASS/NAME`` of each path, without dots in the name (readers split there), made unique."""
    taken: set[str] = set()
    keys = []
    for path in paths:
        folder, name = os.path.split(path)
        base = f"{os.path.basename(folder)}/{os.path.splitext(name)[0].replace('.', '_')}"
        key, number = base, 1
        while key in taken:
            number += 1
            key = f"{base}_{number}"
        taken.add(key)
        keys.append(key)
    return keys


def encode(path: str, options: Options) -> tuple[str, bytes]:
    """An image file as stored: suffix and bytes.

    Raises:
        one of `UNREADABLE`: the file cannot be read or, if needed, decoded.
    """
    content = Path(path).read_bytes()
    if kind := kept_suffix(io.BytesIO(content)):
        rows, columns, channels = image_shape(path)
        if options.quality is not None or (options.max_size is not None and max(rows, columns) > options.max_size):
            raise ValueError(f"max_size and quality do not apply to .{kind} files with {channels} channels")
        if options.verify:
            read_pixels(io.BytesIO(content), channels)
        return kind, content
    with Image.open(io.BytesIO(content)) as image:
        kind = KINDS.get(image.format)
        smaller = options.max_size is not None and max(image.size) > options.max_size
        if not smaller and options.quality is None and kind is not None:
            if options.verify:
                to_mode(upright(image), 3)
            return kind, content
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")
        pixels = to_mode(upright(image), 1 if grey else 3)
    if smaller:
        scale = options.max_size / max(pixels.size)
        size = tuple(max(round(side * scale), 1) for side in pixels.size)
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    stored = io.BytesIO()
    if smaller or options.quality is not None:
        pixels.save(stored, "JPEG", quality=options.quality or QUALITY)
        return "jpg", stored.getvalue()
    pixels.save(stored, "PNG")
    return "png", stored.getvalue()


def _write_shard(path: Path, samples: Sequence[Sample], options: Options) -> tuple[Path, list[tuple[str, str]]]:
    """Write a shard under a temporary name and return the skipped images. Its bytes depend only on the arguments."""
    temporary = path.with_name(f".{path.name}.tmp")
    bad = []
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for source, key, label in samples:
                try:
                    suffix, content = encode(source, options)
                except UNREADABLE as error:
                    bad.append((source, f"{type(error).__name__}: {error}"))
                    continue
                for ending, part in ((suffix, content), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
        file.flush()
        os.fsync(file.fileno())
    return temporary, bad


def make_shards(
    source: Path,
    output: Path,
    options: Options,
    *,
    jobs: int = 1,
    on_shard: Callable[[int, int], None] | None = None,
) -> Done:
    """Write ``OUTPUT/SPLIT-000000.tar`` ... from ``SOURCE/SPLIT/CLASS/IMAGE``, and finally ``_info.json``.

    Args:
        jobs: processes.
        on_shard: called with the number of finished shards and of all shards.

    Raises:
        DataError: nothing to read; or ``output`` has other content, or shards of other images or options.
        OSError: ``output`` cannot be written.
    """
    if jobs < 1:
        raise DataError(f"jobs is {jobs}, must be at least 1")
    plan = Plan.make(source, options)
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(f"another process makes shards in {output}") from None
    try:
        _claim(output, {"digest": plan.digest, "source": str(source.resolve()), **vars(options)})
        return _make(plan, output, options, jobs, on_shard)
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.release()


def _claim(output: Path, record: dict[str, Any]) -> None:
    """Mark ``output`` as the folder of these shards; raises if it has other content."""
    file = output / "_shards.json"
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["digest"]
        except (ValueError, KeyError, TypeError):
            found = None
        if found != record["digest"]:
            raise DataError(
                f"{output} holds shards of other images, or made with other options ({file.name}); name another folder"
            )
    elif any(name != LOCK for name in os.listdir(output)):
        raise DataError(f"{output} is not empty, and holds no shards that `foveal shards` made")
    else:
        _write_json(file, record)


def _make(plan: Plan, output: Path, options: Options, jobs: int, on_shard: Callable[[int, int], None] | None) -> Done:
    bad, listed = BadSamples(1.0), output / "bad_samples.csv"
    bad.read(listed)
    places = plan.shards(output)
    todo = {path: samples for path, samples in places.items() if not path.exists()}
    count = len(places) - len(todo)
    try:
        for path, (temporary, found) in _written(todo, options, jobs):
            bad.names.update(found)
            bad.write(listed)  # before the shard, whose existence marks it as done
            temporary.replace(path)
            count += 1
            if on_shard is not None:
                on_shard(count, len(places))
    finally:
        for path in todo:
            path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)
    splits = {}
    for split in plan.splits:
        names = [path.name for path in places if path.name.startswith(f"{split}-")]
        index = load_index(str(output), split, names)
        if not len(index):
            raise DataError(f"no image of the split {split!r} could be read: see {listed}")
        info = {"name": split, "num_samples": len(index), "filenames": names}
        splits[split] = info | {"shard_lengths": index.lengths().tolist()}
    _write_json(output / "_info.json", {"classes": plan.classes, "splits": splits})
    made = {split: (len(info["filenames"]), info["num_samples"]) for split, info in splits.items()}
    return Done(made, len(todo), bad.names)


def _written(
    todo: dict[Path, list[Sample]], options: Options, jobs: int
) -> Iterator[tuple[Path, tuple[Path, list[tuple[str, str]]]]]:
    if jobs == 1 or len(todo) < 2:
        for path, samples in todo.items():
            yield path, _write_shard(path, samples, options)
        return
    fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    pool = ProcessPoolExecutor(min(jobs, len(todo)), mp_context=multiprocessing.get_context(fork))
    try:
        running = {pool.submit(_write_shard, path, samples, options): path for path, samples in todo.items()}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic(path) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
