"""``foveal probe``: trains a small classifier on the features of a frozen backbone and scores it."""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from ..backbones.loading import load, resolve
from ..configs.schema import ConfigError, ProbeConfig, load_config, save_config
from ..files import atomic, write_json
from ..heads.probing import FrozenBackbone, Probe, efficient_probe, knn, linear_probe
from ..visualize import draw_attention
from .data import Data, DataError, build_classification_data, find_classes
from .data.corruption import parse
from .data.order import Batch, EpochOrder, probe_batch
from .distributed import join_processes
from .features import Cached, Computed, cached, check_backbone
from .logging import write_csv
from .optim import check_optim, check_schedule, create_optimizer, create_schedule
from .scoring import ClassificationScorer, Losses
from .tasks import import_remembered
from .trainer import NonFiniteLoss

PUBLISHED_BATCH = 4096
READ: dict[str, tuple[str, ...]] = {"ep": ("num_queries", "d_out", "tokens"), "linear": (), "knn": ("k", "temperature")}
DRAWN = 6  # images with their attention


def probe(
    source: str | Path,
    data: str | Path,
    head: str = "ep",
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Probes a backbone.

    Args:
        source: what `foveal.load` takes, or with ``model.pretrained=false`` any model of timm.
        data: ``digits``, a folder of IDX files, of shards, or of images in classes.
        head: ``ep`` (efficient probing), ``linear`` or ``knn``.
        overrides: ``key=value`` pairs over the defaults of `configs.schema.ProbeConfig`.
        console: prints the progress; None: nothing.

    Returns:
        ``top1`` and ``top5`` in percent, for ``knn`` by k; ``best_epoch`` and ``last_top1``; ``n`` held-out and
        ``train_images``; ``seconds`` without those for the features. The same is in OUTPUT/result.json, beside the
        head's weights, the metrics by epoch, and for ``ep`` the attention of its queries.

    Raises:
        ConfigError: invalid overrides, a model that has no such features, or an output folder that is in use.
        DataError: missing data, too few images.
        NonFiniteLoss: the loss became NaN or infinite.

    Examples:
        >>> from foveal.train.probe import probe
        >>> options = ["model.pretrained=false", "data.image_size=32", "schedule.epochs=1", "output=probed"]
        >>> probe("test_foveal_dinat", "digits", "linear", options)["n"]
        360
    """
    config = _config(source, data, head, overrides)
    console = console or Console(quiet=True)
    accelerator = join_processes()
    if accelerator.num_processes > 1:
        raise ConfigError(f"a probe runs in one process, not in {accelerator.num_processes}")
    import_remembered(source)
    torch.manual_seed(config.seed)
    backbone = FrozenBackbone(_load(config), config.head.tokens if config.head.kind == "ep" else "pooled")
    backbone.to(accelerator.device)
    classes = find_classes(config.data)
    loaders = build_classification_data(
        config, classes, backbone.model.pretrained_cfg, device=accelerator.device, augment=config.cache is None
    )
    check_backbone(backbone, loaders.preprocessing["input_size"], accelerator.device)
    if config.head.kind == "knn" and max(config.head.k) > loaders.train.samples:  # type: ignore[union-attr]
        raise ConfigError(f"head.k={config.head.k}: there are {loaders.train.samples} training images")  # type: ignore
    learned = None
    if config.head.kind != "knn":
        _check_count(config, loaders.train.samples)  # type: ignore[union-attr]
        learned = _build_head(config, backbone.width, len(classes)).to(accelerator.device)
        create_optimizer(learned, config.optim, global_batch=1)  # raises for invalid settings
    for note in loaders.notes:
        console.print(note, highlight=False, soft_wrap=True)
    train, val = _features(config, backbone, loaders)
    for part in (train, val):
        console.print(part.note, highlight=False, soft_wrap=True)
    start = time.perf_counter()
    result: dict[str, Any] = {"source": str(source), "data": str(data), "head": config.head.kind}
    result |= {"classes": len(classes), "train_images": len(train), "n": len(val)}
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    if learned is None:
        result |= _neighbours(config, train, val, len(classes))
    else:
        result |= _fit(config, learned, train, val, len(classes), console)
    result["seconds"] = time.perf_counter() - start
    result["unreadable"] = loaders.bad.names
    save_config(config, folder / "config.yaml")
    write_json(folder / "result.json", result)
    if learned is not None and config.head.kind == "ep":  # last: the result is kept if the figure fails
        _draw(backbone, learned, loaders, folder / "attention.png", f"{source}, {data}")
    return result


def _config(source: str | Path, data: str | Path, head: str, overrides: Sequence[str]) -> ProbeConfig:
    name = Path(str(source).removeprefix("local-dir:")).name or str(source)
    defaults = {"output": f"runs/probe/{name}-{Path(data).name}-{head}", "model": {"name": str(source)}}
    defaults |= {"data": _data(str(data)), "head": {"kind": head}}
    config: ProbeConfig = load_config(None, overrides, ProbeConfig, defaults)
    if config.data.in_chans == 3 and not any(pair.startswith("data.in_chans=") for pair in overrides):
        found = resolve(source)
        shape = ((found.config or {}).get("pretrained_cfg") or {}).get("input_size")
        config.data.in_chans = shape[0] if shape else 3
    if config.data.kind == "folder" and config.data.classes is None:
        config.data.classes = find_classes(config.data)
    check_optim(config.optim)
    check_schedule(config.schedule)
    augment = config.augment
    for key, on in (("mixup", augment.mixup), ("cutmix", augment.cutmix), ("sizes", augment.sizes)):
        if on:
            raise ConfigError(f"augment.{key}={on} is not for probes")
    _check_unread(config)
    if len(parse(config.data.corruption)) > 1:
        raise ConfigError(f"data.corruption={config.data.corruption}: a probe takes one, NAME:SEVERITY")
    if config.cache is not None and config.data.sampling != "uniform":
        raise ConfigError(f"data.sampling={config.data.sampling} needs cache=null")
    if config.cache is None and config.head.kind == "knn":
        raise ConfigError("head.kind=knn needs a cache, but cache=null")
    if config.head.kind != "knn" and config.train.batch_size == 1:
        raise ConfigError(f"train.batch_size=1: the BatchNorm of head.kind={config.head.kind} needs 2 images")
    if (Path(config.output) / "result.json").exists():
        raise ConfigError(f"{config.output} already holds a probe: output=FOLDER writes elsewhere")
    return config


def _check_unread(config: ProbeConfig) -> None:
    """Raises:
    ConfigError: a key is set that this probe does not read.
    """
    kind, cached = f"head.kind={config.head.kind}", f"cache={config.cache}"
    unread = {f"head.{name}": kind for name in asdict(config.head) if name not in ("kind", *READ[config.head.kind])}
    if config.head.kind == "knn":
        unread |= {f"{part}.{name}": kind for part in ("optim", "schedule") for name in asdict(getattr(config, part))}
        unread |= {"train.batch_size": kind, "train.patience": kind}
    if config.cache is not None:
        unread |= {f"augment.{name}": f"{cached}, only with cache=null" for name in asdict(config.augment)}
        unread["data.decode"] = f"{cached}, only with cache=null"
    for key, why in unread.items():
        part, name = key.split(".")
        section = getattr(config, part)
        if (value := getattr(section, name)) != getattr(type(section)(), name):
            raise ConfigError(f"{key}={value} has no effect with {why}")


def _data(data: str) -> dict[str, Any]:
    """The ``data`` section of a folder, or of the digits."""
    if data == "digits":
        return {"kind": "digits"}
    root = Path(data)
    if any(root.glob("*-images-idx3-ubyte*")):
        return {"kind": "idx", "root": data}
    return {"kind": "wds" if "://" in data or (root / "_info.json").is_file() else "auto", "root": data}


def _load(config: ProbeConfig) -> Any:
    arguments: dict[str, Any] = config.model.kwargs | {"in_chans": config.data.in_chans}
    if config.model.pretrained:
        return load(config.model.name, **arguments)
    try:
        return timm.create_model(resolve(config.model.name).name, **arguments)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"model {config.model.name!r} can't be created with {arguments}: {error}") from error


def _features(config: ProbeConfig, backbone: FrozenBackbone, loaders: Data) -> tuple[Any, Any]:
    """Features of the training and of the held-out images."""
    train, val = (Computed(backbone, loader, config.train.amp) for loader in (loaders.train, loaders.val))
    if config.cache is None:
        return replace(train, note="images are read and augmented in each epoch (cache=null)"), val
    store, key = Path(config.cache), {"preprocessing": loaders.preprocessing, "corruption": config.data.corruption}
    train, val = cached(train, store, key, "training images"), cached(val, store, key, "held-out images")
    if config.head.kind != "knn":
        _check_count(config, len(train))  # without unreadable images
        config.train.batch_size = config.train.batch_size or probe_batch(len(train), PUBLISHED_BATCH)
        train.order = EpochOrder(len(train), config.train.batch_size, train=True, seed=config.seed)
    return train, val


def _check_count(config: ProbeConfig, images: int) -> None:
    if images < max(2, config.train.batch_size or 2):
        wanted = f"train.batch_size={config.train.batch_size}" if images > 1 else "a head's BatchNorm needs 2"
        raise DataError(f"{images} training images in {config.data.root or config.data.kind}: {wanted}")


def _build_head(config: ProbeConfig, width: int, classes: int) -> Probe:
    if config.head.kind == "linear":
        return linear_probe(width, classes)
    try:
        return efficient_probe(width, classes, config.head.num_queries, config.head.d_out)
    except ValueError as error:
        raise ConfigError(f"head.num_queries, head.d_out: {error}") from None


def _neighbours(config: ProbeConfig, train: Cached, val: Cached, classes: int) -> dict[str, Any]:
    values, labels = train.values.to(train.device).float(), train.labels.to(train.device)
    found: dict[str, Any] = {"top1": {}, "top5": {}}
    for k in config.head.k:

        def predict(_: nn.Module, batch: Batch, k: int = k) -> tuple[Tensor, None]:
            return knn(values, labels, batch.images, classes, k, config.head.temperature), None

        scorer = ClassificationScorer(classes).run(nn.Identity(), val.epoch(0), predict)
        for name in found:
            found[name][str(k)] = scorer.metrics[name]
    return found


def _predict(head: nn.Module, batch: Batch) -> tuple[Tensor, Losses]:
    logits = head(batch.images)
    loss = F.cross_entropy(logits, batch.targets, reduction="sum")
    return logits, torch.stack([loss, loss.new_tensor(len(logits))])[:, None]


def _fit(config: ProbeConfig, head: Probe, train: Any, val: Any, classes: int, console: Console) -> dict[str, Any]:
    """Trains a head, writes its weights at each new best epoch, and leaves it with those."""
    file = Path(config.output) / "head.safetensors"
    file.unlink(missing_ok=True)  # of a run that was stopped
    order: Any = train.order if isinstance(train, Cached) else train.loader.order
    assert config.train.batch_size is not None
    optimizer = create_optimizer(head, config.optim, config.train.batch_size)
    schedule, epochs = create_schedule(optimizer, config.schedule, len(order))
    console.print(
        f"{config.optim.name}, {epochs} epochs of {len(order)} updates of {config.train.batch_size:,} images, "
        f"peak learning rate {max(schedule.base_values):.3g}",
        highlight=False,
    )
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    weights = head.state_dict()
    for epoch in range(epochs):
        loss = _train_epoch(head, train.epoch(epoch), optimizer, schedule, epoch * len(order), config.optim.clip_grad)
        if not np.isfinite(loss):
            raise NonFiniteLoss(f"the loss became {loss} in epoch {epoch + 1}; try a lower optim.lr={config.optim.lr}")
        scorer = ClassificationScorer(classes).run(head, val.epoch(0), _predict)
        rows.append({"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "train_loss": loss, **scorer.metrics})
        write_csv(Path(config.output) / "metrics.csv", rows)
        if not best or rows[-1]["top1"] > best["top1"]:
            best, weights = rows[-1], deepcopy(head.state_dict())
            with atomic(file) as new:
                save_file(weights, new)
        elif config.train.patience is not None and rows[-1]["epoch"] - best["epoch"] >= config.train.patience:
            break
    head.load_state_dict(weights)
    head.eval()
    figures = {"top1": best["top1"], "top5": best["top5"], "best_epoch": best["epoch"]}
    return figures | {
        "last_top1": rows[-1]["top1"],
        "epochs": len(rows),
        "parameters": sum(p.numel() for p in head.parameters()),
    }


def _train_epoch(
    head: Probe, batches: Any, optimizer: torch.optim.Optimizer, schedule: Any, update: int, clip: float | None
) -> float:
    head.train()
    losses = []
    for values, targets in batches:
        loss = F.cross_entropy(head(values), targets)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(head.parameters(), clip)
        optimizer.step()
        update += 1
        schedule.step_update(update)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


@torch.no_grad()
def _draw(backbone: FrozenBackbone, head: Probe, loaders: Data, path: Path, title: str) -> None:
    """The attention of the queries on the first held-out images."""
    pixels = next(iter(loaders.val.epoch(0))).images[:DRAWN]
    attention: Any = head[0]
    weights = attention.attention(backbone(pixels))
    size = backbone.map_size(weights.shape[2] - backbone.skipped, *pixels.shape[2:])
    loader: Any = loaders.val
    images = loader.normalize.undo(pixels).permute(0, 2, 3, 1).numpy()
    draw_attention(images, weights[:, :, backbone.skipped :].unflatten(2, size).cpu(), path, title=title)
