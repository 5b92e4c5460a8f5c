"""Features of a frozen backbone: computed once and kept on disk, or anew in each epoch.

The folder of cached features is named by a hash of all that they depend on: the weights and structure of the model, its
preprocessing, the images (those of files by path, size and time of change), precision and versions. When they are read,
those of the first batch are computed and compared, as code may change without its version.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.loading import first_lines
from ..configs.schema import ConfigError
from ..files import atomic, write_json
from ..heads.probing import FrozenBackbone
from .data import DataError, workers_end
from .data.memory import MemoryLoader
from .data.order import Batch, EpochOrder
from .scoring import autocast

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest value
TYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Cached:
    """Features ``[N, ...]`` and labels ``[N]`` in batches on a device."""

    values: Tensor
    labels: Tensor
    device: torch.device
    order: EpochOrder | None = None  # of training; None: as they are, in batches of 1,024
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if self.order is not None:
            self.order.set(epoch)
        for rows in self.order or torch.arange(len(self)).split(1024):
            rows = torch.as_tensor(rows)
            yield Batch(self.values[rows].to(self.device).float(), self.labels[rows].to(self.device))


@dataclass
class Computed:
    """The same, of a loader's images, read in each epoch."""

    backbone: FrozenBackbone
    loader: Any
    amp: str
    note: str = ""

    def __len__(self) -> int:
        return self.loader.samples

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for images, labels in self.loader.epoch(epoch):
            with autocast(images.device, self.amp):
                values = self.backbone(images)
            yield Batch(values.float(), labels)


def check_backbone(backbone: FrozenBackbone, shape: tuple[int, int, int], device: torch.device) -> None:
    """Raises:
    ConfigError: the model does not take images of this shape, or has no such features; of tokens, they are no map.
    """
    try:
        values = backbone(torch.zeros(1, *shape, device=device))
        if backbone.kind != "pooled":
            backbone.map_size(values.shape[1] - backbone.skipped, *shape[1:])
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{type(backbone.model).__name__} on images {'x'.join(map(str, shape))} (data.image_size, data.in_chans): "
            f"{first_lines(error)}"
        ) from error


def cached(computed: Computed, store: Path, key: Mapping[str, Any], name: str) -> Cached:
    """The features of all images of a loader, from ``store`` if they are there.

    Args:
        store: folder of cached features.
        key: what they depend on besides model, images and precision.
        name: of the images, for the note.

    Raises:
        DataError: streamed shards, or too little space on the disk.
    """
    backbone, loader = computed.backbone, computed.loader
    key = {**key, "model": model_key(backbone.model), "kind": backbone.kind, "data": data_key(loader)}
    key |= {"amp": computed.amp, "versions": {each: version(each) for each in ("foveal", "torch", "timm")}}
    folder = store / hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
    device, kind = loader.normalize.device, TYPES[computed.amp]
    with workers_end(loader):
        batches: Any = computed.epoch(0)
        first = next(batches, None)
        if first is None:
            raise DataError(f"there are no readable {name}")
        found = _read(folder, kind)
        bad = getattr(loader, "bad", None)  # the list of unreadable images of all loaders
        if found is not None and _same(first, *found):
            batches.close()
            if bad is not None:
                bad.merge(json.loads((folder / "features.json").read_text(encoding="utf-8"))["unreadable"])
            return Cached(*found, device, note=f"features of {len(found[1]):,} {name}: read from {folder}")
        changed = ", anew as the first ones have changed" if found is not None else ""
        size = first.images[0].numel() * kind.itemsize * loader.samples
        folder.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(folder).free):
            raise DataError(
                f"the features of {loader.samples:,} {name} take {size / 1e9:,.1f} GB; free in {folder}: "
                f"{free / 1e9:,.1f} GB. cache=FOLDER keeps them elsewhere, cache=null nowhere"
            )
        known = set() if bad is None else set(bad.names)
        shape = _write(folder, first, batches, kind)
        unreadable = {} if bad is None else {name: why for name, why in bad.names.items() if name not in known}
        # last: it marks a complete folder
        write_json(folder / "features.json", {"shape": shape, "dtype": str(kind), "unreadable": unreadable})
    written = _read(folder, kind)
    assert written is not None, folder
    return Cached(*written, device, note=f"features of {len(written[1]):,} {name}: written to {folder}{changed}")


def _write(folder: Path, batch: Batch | None, batches: Iterator[Batch], kind: torch.dtype) -> list[int]:
    """Writes features and labels; returns the shape of an image's features."""
    labels, shape = [], []
    with atomic(folder / "values.bin") as new, new.open("wb") as file:
        while batch is not None:
            values = batch.images.to("cpu", kind)
            file.write(values.contiguous().view(torch.uint8).numpy().tobytes())
            labels.append(batch.targets.cpu())
            shape = list(values.shape[1:])
            batch = next(batches, None)
        with atomic(folder / "labels.npy") as table:
            np.save(table, torch.cat(labels).numpy())
    return shape


def _read(folder: Path, kind: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Features, memory-mapped, and labels; None unless they are complete."""
    if not (folder / "features.json").is_file():
        return None
    shape = json.loads((folder / "features.json").read_text(encoding="utf-8"))["shape"]
    labels = torch.from_numpy(np.load(folder / "labels.npy"))
    count = len(labels) * int(np.prod(shape))
    if (folder / "values.bin").stat().st_size != count * kind.itemsize:
        return None
    return torch.from_file(str(folder / "values.bin"), size=count, dtype=kind).view(len(labels), *shape), labels


def _same(batch: Batch, values: Tensor, labels: Tensor) -> bool:
    got, want = batch.images.cpu(), values[: len(batch.images)].float()
    if got.shape != want.shape or not torch.equal(batch.targets.cpu(), labels[: len(got)]):
        return False
    return bool((got - want).abs().max() <= TOLERANCE[values.dtype] * want.abs().max())


def model_key(model: nn.Module) -> str:
    """A hash of the structure of a model, its parameters and buffers."""
    return tensors_sha256([*model.named_parameters(), *model.named_buffers()], repr(model))


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """A hash of a text and of the names and values of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def data_key(loader: Any) -> str:
    """A hash of the images and labels of a loader: of pixels in memory, else of paths, sizes and times of change.

    Raises:
        DataError: streamed shards, whose images are not known in advance.
    """
    digest = hashlib.sha256()
    if isinstance(loader, MemoryLoader):
        arrays = [loader.images.contiguous().numpy(), loader.targets.numpy()]
    elif not hasattr(loader.dataset, "index"):
        raise DataError("features of streamed shards cannot be cached: copy the shards, or cache=null")
    else:
        index = loader.dataset.index
        names = dict.fromkeys((*index.per_sample, *getattr(index, "stored", ())))
        arrays = [getattr(index, name) for name in names]
        stats = [os.stat(path) if os.path.exists(path) else None for path in index.paths]
        arrays.append(np.array([(s.st_size, s.st_mtime_ns) if s else (-1, -1) for s in stats], np.int64))
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
