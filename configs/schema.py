"""The schema of a training recipe, and the strict loader of its YAML files.

A recipe is a short YAML file. It may name other files under ``base:`` (relative to itself), which are read first; its
own values, and then the ``key=value`` pairs of the command line, override them. Mappings merge, lists replace lists. A
key that the schema does not know, or a value of the wrong type, is a :class:`ConfigError` that names the key, the file
and the nearest valid key. What depends on another value is written as a fraction of it, never as a second number.
"""

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = [
    "AugmentConfig",
    "ClassifyConfig",
    "ConfigError",
    "DataConfig",
    "DenseOptimConfig",
    "DetectAugmentConfig",
    "DetectConfig",
    "DetectDataConfig",
    "DetectModelConfig",
    "DistillConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ScheduleConfig",
    "SegmentAugmentConfig",
    "SegmentConfig",
    "SegmentDataConfig",
    "SegmentEvalConfig",
    "SegmentLossConfig",
    "SegmentModelConfig",
    "TrainConfig",
    "find_config",
    "load_config",
    "override_value",
    "recipe_names",
    "save_config",
]

RECIPES = Path(__file__).parent
COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message is meant for the user."""


def _checked(
    default: Any = MISSING,
    *,
    choices: Sequence | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    items: int | None = None,
) -> Any:
    """A dataclass field with the values it may take: ``low`` to ``high`` with the ends, ``above`` to ``below`` without;
    for a list these hold for each item, and ``items`` is their number."""
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return field(default=default, metadata={"choices": choices, "bounds": bounds, "items": items})


def _checked_list(default: list, **bounds: Any) -> Any:
    """The same for a list whose default holds values."""
    checked = _checked(None, **bounds)
    return field(default_factory=default.copy, metadata=checked.metadata)


def _probability(default: float) -> Any:
    return _checked(default, low=0.0, high=1.0)


@dataclass
class ModelConfig:
    """What ``timm.create_model`` is given."""

    name: str = MISSING
    pretrained: bool = False  # the published weights, by the name's tag
    checkpoint: str | None = None  # weights to start from: a file, a timm folder or a run folder
    num_classes: int | None = _checked(None, low=1)  # null: as many as the data have
    drop_rate: float | None = _checked(None, low=0.0, below=1.0)
    drop_path_rate: float | None = _checked(None, low=0.0, below=1.0)  # null: the model's own
    grad_checkpointing: bool = False
    sync_bn: bool = False  # batch norms over all processes
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the entry function


@dataclass
class DataConfig:
    """Where the images are and how they reach the model."""

    kind: str = _checked("folder", choices=("folder", "wds", "idx", "digits"))
    root: str | None = None  # folder: ROOT/SPLIT/CLASS/IMAGE; wds: shards and _info.json; idx: the four IDX files
    train_split: str = "train"
    val_split: str = "val"  # for wds also a brace pattern with its count: 'val-{0000..0063}.tar|50000'
    val_fraction: float = _checked(0.2, above=0.0, below=1.0)  # digits: share held out, stratified, fixed
    classes: list[str] | None = None  # names by index; null: folder names, or what the data set is known to hold
    num_classes: int | None = _checked(None, low=1)  # needed by wds when `classes` is null
    limit: int | None = _checked(None, low=1)  # idx, digits: train on the first so many images only
    val_limit: int | None = _checked(None, low=1)  # likewise for the evaluation
    image_size: int | None = _checked(None, low=1)  # side of the square input; null: the model's own
    in_chans: int = _checked(3, low=1)
    mean: list[float] | None = None  # per channel, of values in [0, 1]; null: the model's own
    std: list[float] | None = _checked(None, above=0.0)
    interpolation: str | None = None  # of the evaluation; null: the model's own
    crop_pct: float | None = None  # folder, wds: side of the centre crop over the resized short side
    workers: int = _checked(8, low=0)  # folder, wds: decoding processes for each training process
    decode: str = _checked("fast", choices=("timm", "fast", "draft"))  # folder, wds: in training; see train/README.md
    exclude: str | None = None  # folder, wds: a bad_samples.csv or a list of names; these samples are left out
    max_bad_fraction: float = _probability(0.01)  # unreadable images beyond this share of an epoch stop the run


@dataclass
class AugmentConfig:
    """Training-time augmentation. Mixing is by batch, as ``timm.data.Mixup`` does it."""

    hflip: float = _probability(0.5)
    vflip: float = _probability(0.0)
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # folder, wds: area of the random crop
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])  # folder, wds: its aspect
    color_jitter: float = _checked(0.4, low=0.0)  # folder, wds
    auto_augment: str | None = None  # folder, wds: for example rand-m9-mstd0.5-inc1
    interpolation: str = "random"  # folder, wds: random, bilinear or bicubic
    shift: float = _checked(0.0, low=0.0)  # idx, digits: largest translation as a fraction of the side
    rotate: float = _checked(0.0, low=0.0)  # idx, digits: largest rotation in degrees
    zoom: float = _checked(0.0, low=0.0)  # idx, digits: largest change of size, 0.1 for 0.9 to 1.1
    erase: float = _probability(0.0)  # probability of random erasing
    erase_mode: str = _checked("pixel", choices=("const", "rand", "pixel"))
    mixup: float = _checked(0.0, low=0.0)  # alpha; 0: off
    cutmix: float = _checked(0.0, low=0.0)  # alpha; 0: off
    mix_prob: float = _probability(1.0)
    mix_switch_prob: float = _probability(0.5)
    mix_off_fraction: float = _probability(0.0)  # mixing is off in this last fraction of the epochs
    sizes: list[int] = _checked_list([], low=1)  # growing sides of the input, each for an equal part of the run


@dataclass
class LossConfig:
    name: str = _checked("cross_entropy", choices=("cross_entropy", "bce"))
    smoothing: float = _checked(0.0, low=0.0, below=1.0)
    auxiliary: float = _checked(0.0, low=0.0)  # weight of the loss of the model's auxiliary head; 0: it is not trained


@dataclass
class DistillConfig:
    """Learning from a teacher's answers to the same images, beside the labels (DeiT, arXiv 2012.12877, section 4)."""

    teacher: str | None = None  # what `foveal.load` takes: a name with published weights, a run, a folder; null: none
    alpha: float = _probability(0.5)  # weight of the teacher's part; the labels' is 1 - alpha
    kind: str = _checked("hard", choices=("hard", "soft"))  # learn its decision, or its distribution
    temperature: float = _checked(1.0, above=0.0)  # soft: divides both sides' logits


@dataclass
class OptimConfig:
    """Any optimizer of timm by name. Biases, norms and the model's ``no_weight_decay`` names are not decayed."""

    name: str = "adamw"
    lr: float = _checked(1e-3, above=0.0)
    lr_batch: int | None = _checked(None, low=1)  # `lr` is for this global batch and scales linearly; null: as written
    weight_decay: float = _checked(0.05, low=0.0)
    betas: list[float] | None = _checked(None, low=0.0, below=1.0, items=2)
    eps: float | None = _checked(None, above=0.0)
    momentum: float = 0.9
    layer_decay: float | None = None
    clip_grad: float | None = _checked(None, above=0.0)  # largest norm of the whole gradient


@dataclass
class DenseOptimConfig(OptimConfig):
    """The same for a detector or a segmenter."""

    backbone_lr_ratio: float = _checked(1.0, low=0.0)  # the backbone's rate over that of the rest


@dataclass
class ScheduleConfig:
    """Learning rate per update. All lengths are fractions of `epochs`, all rates ratios to the peak."""

    name: str = _checked("cosine", choices=("cosine", "poly", "step", "multistep", "constant"))
    epochs: int = _checked(300, low=1)
    warmup_fraction: float = _probability(0.0)
    warmup_lr_ratio: float = _probability(1e-3)
    cooldown_fraction: float = _checked(0.0, low=0.0)  # further epochs at the lowest rate, after `epochs`
    min_lr_ratio: float = _probability(0.0)
    power: float = 1.0  # poly: 1 is a linear decay
    decay_fraction: float = _checked(0.3, above=0.0, high=1.0)  # step: a step after each such part of the run
    decay_rate: float = 0.1  # step, multistep
    milestones: list[float] = field(default_factory=list)  # multistep: a step after each such part of `epochs`


@dataclass
class TrainConfig:
    batch_size: int = _checked(128, low=1)  # images for each process and forward pass
    val_batch_size: int | None = _checked(None, low=1)  # null: batch_size
    accumulate: int = _checked(1, low=1)  # forward passes for each update
    parallel: str = _checked("ddp", choices=("ddp", "fsdp"))  # several processes: a model each, or a part of it each
    fsdp_unit: int = _checked(1_000_000, low=1)  # fsdp: a block with so many parameters or more is gathered by itself
    steps_per_epoch: int | None = _checked(None, low=1)  # updates that count as an epoch; null: one pass over the data
    amp: str = _checked("no", choices=("no", "bf16", "fp16"))
    ema_decay: float = _checked(0.0, low=0.0, below=1.0)  # 0: off. When on, the averaged weights are evaluated and kept
    ema_warmup: bool = False  # let the decay grow from 0, for short runs
    eval_every: int = _checked(1, low=1)  # epochs; the last one is always evaluated
    compile: bool = False
    channels_last: bool = False  # memory format of the weights, and with them of the maps
    keep: int = _checked(2, low=1)  # checkpoints to go on from: the last one and those before it
    save_every: int | None = _checked(None, low=1)  # updates; null: at the end of each epoch only
    threads: int | None = _checked(None, low=1)  # CPU threads of PyTorch; null: as the environment has it


@dataclass
class LogConfig:
    """Where figures go beside metrics.csv: tensorboard, mlflow, wandb or any other tracker of accelerate's."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])


@dataclass
class ClassifyConfig:
    """A whole classification run."""

    task: str = _checked("classify", choices=("classify",))  # so that a run's config.yaml says what it is of
    output: str = MISSING  # run folder; when a recipe does not name it: runs/<name of the recipe>
    resume: str = _checked("never", choices=("never", "auto"))  # auto: go on from OUTPUT/last, or start anew
    seed: int = _checked(0, low=0, below=2**32)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class DetectModelConfig:
    """What ``heads.build.build_detector`` is given."""

    name: str = MISSING  # the backbone: any name that timm creates with features_only
    head: str = _checked(
        "mask_rcnn", choices=("mask_rcnn", "cascade_mask_rcnn", "faster_rcnn", "retinanet", "fcos", "mask2former")
    )
    neck: str = _checked("fpn", choices=("fpn", "a3fpn"))
    pretrained: bool = False  # the backbone's published weights, by the name's tag
    checkpoint: str | None = None  # the backbone's weights: a file, a timm folder or a run folder of a classifier
    frozen_stages: int = _checked(-1, low=-1)  # this many stages and the stem stay as they are; -1: all learn
    norm_eval: bool = False  # the backbone's batch norms keep their statistics
    sync_bn: bool = False  # batch norms of the whole detector over all processes
    drop_path_rate: float | None = _checked(None, low=0.0, below=1.0)  # null: the backbone's own
    grad_checkpointing: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the backbone
    neck_kwargs: dict[str, Any] = field(default_factory=dict)
    head_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of torchvision's detector


@dataclass
class DetectDataConfig:
    """Annotations in COCO's format, and the folders of their images; all paths are below ``root``."""

    kind: str = _checked("coco", choices=("coco", "voc", "digits"))  # digits: composites, written when not there
    root: str | None = None
    # voc: sets instead, such as VOC2007/trainval+VOC2012/trainval, which name their images
    train_annotations: str = "annotations/instances_train2017.json"
    train_images: str = "train2017"
    val_annotations: str = "annotations/instances_val2017.json"
    val_images: str = "val2017"
    limit: int | None = _checked(None, low=1)  # the first so many training images only
    val_limit: int | None = _checked(None, low=1)
    digits_train: int = _checked(400, low=1)  # digits: how many composites to write, ...
    digits_val: int = _checked(100, low=1)
    digits_size: int = _checked(128, low=32)  # ... of which side
    keep_empty: bool = False  # train on images without objects too
    in_chans: int = _checked(3, low=1)
    mean: list[float] | None = None  # per channel, of values in [0, 1]; null: the backbone's own
    std: list[float] | None = _checked(None, above=0.0)
    short_side: int = _checked(800, low=1)  # evaluation: the short side is brought to this, ...
    max_size: int = _checked(1333, low=1)  # ... unless the long one came to more than this
    workers: int = _checked(4, low=0)  # decoding processes for each training process
    exclude: str | None = None  # a bad_samples.csv or a list of names; these samples are left out
    max_bad_fraction: float = _probability(0.01)  # unreadable images beyond this share of an epoch stop the run


@dataclass
class DetectAugmentConfig:
    """Training-time augmentation."""

    hflip: float = _probability(0.5)
    vflip: float = _probability(0.0)
    short_sides: list[int] = _checked_list([800], low=1)  # the short side is brought to one of these
    sampling: str = _checked("choice", choices=("choice", "range"))  # range: any length between the two of short_sides
    max_size: int = _checked(1333, low=1)  # limit of the long side
    crop_prob: float = _probability(0.0)  # share of images that are resized, cropped and resized again (as DETR does)
    crop_short_sides: list[int] = _checked_list([400, 500, 600], low=1)  # the first size
    crop: list[int] = _checked_list([384, 600], low=1, items=2)  # least and largest side of the crop
    final_crop: list[int] | None = _checked(None, low=1, items=2)  # rows, columns, at a random place; null: none
    jitter: list[float] | None = _checked(None, above=0.0, items=2)  # a factor of what fits final_crop, not short_sides
    photometric: bool = False  # brightness, contrast, saturation, hue


@dataclass
class DetectConfig:
    """A whole detection run."""

    task: str = _checked("detect", choices=("detect",))
    output: str = MISSING  # run folder; when a recipe does not name it: runs/detect/<name of the recipe>
    resume: str = _checked("never", choices=("never", "auto"))  # auto: go on from OUTPUT/last, or start anew
    seed: int = _checked(0, low=0, below=2**32)
    model: DetectModelConfig = field(default_factory=DetectModelConfig)
    data: DetectDataConfig = field(default_factory=DetectDataConfig)
    augment: DetectAugmentConfig = field(default_factory=DetectAugmentConfig)
    optim: DenseOptimConfig = field(default_factory=DenseOptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class SegmentModelConfig:
    """What ``heads.build.build_segmenter`` is given."""

    name: str = MISSING  # the backbone: any name that timm creates with features_only
    head: str = _checked("upernet", choices=("upernet", "semantic_fpn", "mask2former"))
    neck: str = _checked("fpn", choices=("fpn", "a3fpn"))  # upernet with fpn: its own top-down path
    pretrained: bool = False  # the backbone's published weights, by the name's tag
    checkpoint: str | None = None  # the backbone's weights: a file, a timm folder or a run folder of a classifier
    segmenter: str | None = None  # or the whole model's: a run folder, a model folder, or a file with mmseg's names
    auxiliary: bool = True  # upernet: an FCN head on the third map, which helps to train and is not asked afterwards
    size_divisor: int = _checked(32, low=1)  # images are padded to multiples of it; 1: the backbone takes any size
    frozen_stages: int = _checked(-1, low=-1)  # this many stages and the stem stay as they are; -1: all learn
    norm_eval: bool = False  # the backbone's batch norms keep their statistics
    sync_bn: bool = False  # batch norms of the whole segmenter over all processes
    drop_path_rate: float | None = _checked(None, low=0.0, below=1.0)  # null: the backbone's own
    grad_checkpointing: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the backbone
    neck_kwargs: dict[str, Any] = field(default_factory=dict)
    head_kwargs: dict[str, Any] = field(default_factory=dict)  # channels, dropout ... of heads.segmentation
    auxiliary_kwargs: dict[str, Any] = field(default_factory=dict)  # level, channels ... of heads.segmentation.FCN


@dataclass
class SegmentDataConfig:
    """Where the images and their masks are; the layouts stand in ``train/data/semantic.py``."""

    kind: str = _checked("folder", choices=("folder", "ade20k", "cityscapes", "voc", "digits"))
    root: str | None = None
    train_split: str | None = None  # null: train (ade20k: training)
    val_split: str | None = None  # null: val (ade20k: validation)
    images: str = "images/{split}"  # folder: images below ROOT, {split} stands for the split's name
    masks: str = "masks/{split}"  # folder: PNG files of the same names, a class for each pixel
    classes: list[str] | None = None  # names by label; needed by folder, known of the others
    reduce_zero_label: bool = False  # folder: 0 is no class, 1 is the first (ade20k: always)
    ignore_label: int = _checked(255, low=0, high=255)  # the value of a pixel without a class
    limit: int | None = _checked(None, low=1)  # the first so many training images only
    val_limit: int | None = _checked(None, low=1)
    digits_train: int = _checked(400, low=1)  # digits: how many composites to write, ...
    digits_val: int = _checked(100, low=1)
    digits_size: int = _checked(128, low=32)  # ... of which side
    in_chans: int = _checked(3, low=1)
    mean: list[float] | None = None  # per channel, of values in [0, 1]; null: the backbone's own
    std: list[float] | None = _checked(None, above=0.0)
    antialias: bool = True  # where images are made smaller; false: as OpenCV, with which the published recipes ran
    workers: int = _checked(4, low=0)  # reading processes for each training process
    exclude: str | None = None  # a bad_samples.csv or a list of names; these samples are left out
    max_bad_fraction: float = _probability(0.01)  # bad samples beyond this share of a pass stop the run


@dataclass
class SegmentAugmentConfig:
    """Training-time augmentation: random resize, crop, flip, colour."""

    resize: list[int] | None = _checked(None, low=1, items=2)  # long and short side to fit in; null: the image's own
    ratio: list[float] = _checked_list([0.5, 2.0], above=0.0, items=2)  # random factor of that
    crop: list[int] = _checked_list([512, 512], low=1, items=2)  # rows, columns
    cat_max_ratio: float = _checked(0.75, above=0.0, high=1.0)  # largest share of one class in a crop; 1: any crop
    hflip: float = _probability(0.5)
    photometric: bool = True  # brightness, contrast, saturation, hue


@dataclass
class SegmentLossConfig:
    auxiliary: float = _checked(0.4, low=0.0)  # weight of the auxiliary head's cross-entropy
    ignored_in_mean: bool = False  # divide by all pixels, as mmseg does, not by those that have a class


@dataclass
class SegmentEvalConfig:
    """What the model sees in evaluation; the answer is brought back to the image's size."""

    mode: str = _checked("whole", choices=("whole", "slide"))
    window: list[int] | None = _checked(None, low=1, items=2)  # slide: rows, columns; null: the training crop
    stride: list[int] | None = _checked(None, low=1, items=2)  # slide; null: two thirds of the window
    resize: list[int] | None = _checked(None, low=1, items=2)  # long and short side to fit in; null: the image's own
    multiple_of: int = _checked(1, low=1)  # the resized sides are rounded up to multiples of it
    scales: list[float] = _checked_list([1.0], above=0.0)  # the mean over these factors, ...
    flip: bool = False  # ... and over the mirror images


@dataclass
class SegmentConfig:
    """A whole segmentation run."""

    task: str = _checked("segment", choices=("segment",))
    output: str = MISSING  # run folder; when a recipe does not name it: runs/segment/<name of the recipe>
    resume: str = _checked("never", choices=("never", "auto"))  # auto: go on from OUTPUT/last, or start anew
    seed: int = _checked(0, low=0, below=2**32)
    model: SegmentModelConfig = field(default_factory=SegmentModelConfig)
    data: SegmentDataConfig = field(default_factory=SegmentDataConfig)
    augment: SegmentAugmentConfig = field(default_factory=SegmentAugmentConfig)
    loss: SegmentLossConfig = field(default_factory=SegmentLossConfig)
    eval: SegmentEvalConfig = field(default_factory=SegmentEvalConfig)
    optim: DenseOptimConfig = field(default_factory=DenseOptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)


def recipe_names() -> list[str]:
    """Names of the shipped recipes, such as ``classify/digits``.

    Examples:
        >>> from foveal.configs.schema import recipe_names
        >>> "classify/digits" in recipe_names()
        True
    """
    files = RECIPES.glob("*/*.yaml")
    return sorted(f"{f.parent.name}/{f.stem}" for f in files if not f.parent.name.startswith("_"))


def find_config(config: str | Path, task: str | None = None) -> Path:
    """The file behind a path or a shipped recipe's name: ``classify/digits``, or ``digits`` where ``task`` is given.

    Raises:
        ConfigError: nothing is found; the message names the nearest recipes.
    """
    path = Path(config)
    if path.is_file():
        return path
    name = str(config).removesuffix(".yaml")
    shipped = recipe_names()
    found = [n for n in shipped if name in (n, n.split("/", 1)[1])]
    if task is not None and f"{task}/{name}" in found:
        found = [f"{task}/{name}"]
    if len(found) == 1:
        return RECIPES / f"{found[0]}.yaml"
    if found:
        raise ConfigError(f"the recipe name {name!r} is ambiguous: {', '.join(found)}")
    shipped = [n for n in shipped if task is None or n.startswith(f"{task}/")]
    names = {n: [n] for n in shipped}
    for n in shipped:
        names.setdefault(n.split("/", 1)[1], []).append(n)
    near = sorted({n for match in difflib.get_close_matches(name, names, n=4) for n in names[match]})
    hint = f"; did you mean {', '.join(near)}?" if near else f"; shipped are {', '.join(shipped)}"
    raise ConfigError(f"no configuration file and no shipped recipe is called {str(config)!r}{hint}")


def _read(path: Path, including: tuple[Path, ...] = ()) -> list[tuple[str, dict]]:
    """The layers of a file, its bases first, each with the name to blame."""
    path = path.resolve()
    if path in including:
        chain = " -> ".join(p.name for p in (*including, path))
        raise ConfigError(f"base files include each other in a circle: {chain}")
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{including[-1]}: base file {path} does not exist") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} can't be read as YAML: {error}") from None
    layer = OmegaConf.to_container(content) if content is not None else {}
    if not isinstance(layer, dict):
        raise ConfigError(f"{path} holds a {type(layer).__name__}, not a mapping of keys to values")
    bases = layer.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: `base` must be a file name or a list of them, not {bases!r}")
    layers = []
    for base in bases:
        layers += _read(path.parent / base, (*including, path))
    return [*layers, (str(path), layer)]


def _override_layers(overrides: Iterable[str]) -> list[tuple[str, dict]]:
    layers = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", key):
            raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form key=value")
        try:
            layer = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{COMMAND_LINE}: {override!r} can't be read: {error}") from None
        layers.append((COMMAND_LINE, layer))
    return layers


def override_value(overrides: Iterable[str], key: str) -> str | None:
    """The text given for ``key`` on the command line, the last one if there are several; None if there is none."""
    values = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == key]
    return values[-1] if values else None


def _valid_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for f in dataclasses.fields(schema):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(f.type):
            keys += _valid_keys(f.type, f"{prefix}{f.name}.")
    return keys


def _check_keys(layer: Mapping, schema: Any, source: str, root: type, prefix: str = "") -> None:
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if key not in fields:
            valid = _valid_keys(root)
            by_leaf = {v.rsplit(".", 1)[-1]: v for v in reversed(valid)}
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
            near = near or [by_leaf[k] for k in difflib.get_close_matches(str(key), by_leaf, n=1, cutoff=0.5)]
            hint = f"did you mean `{near[0]}`?" if near else f"valid here: {', '.join(fields)}"
            raise ConfigError(f"{source}: unknown key `{name}`; {hint}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: `{name}` is a section of keys, not a value ({value!r})")
            _check_keys(value, fields[key], source, root, f"{name}.")


def _check_values(config: Any, blame: Mapping[str, str], prefix: str = "") -> None:
    for f in dataclasses.fields(config):
        name, value = prefix + f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            _check_values(value, blame, f"{name}.")
            continue
        source = blame.get(name, "defaults")
        choices, bounds, items = (f.metadata.get(key) for key in ("choices", "bounds", "items"))
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: `{name}` is {value!r}, must be one of {', '.join(choices)}{hint}")
        if items is not None and value is not None and len(value) != items:
            raise ConfigError(f"{source}: `{name}` is {value!r}, must have {items} items")
        for number in value if isinstance(value, list) else [value]:
            _check_number(number, bounds or {}, f"{source}: `{name}` is {value!r}")


def _check_number(value: Any, bounds: Mapping[str, float | None], blame: str) -> None:
    if not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise ConfigError(f"{blame}, must be a finite number")
    tests = {"low": (operator.ge, "at least"), "above": (operator.gt, "above")}
    tests |= {"high": (operator.le, "at most"), "below": (operator.lt, "below")}
    limits = [(*tests[key], limit) for key, limit in bounds.items() if limit is not None]
    if not all(holds(value, limit) for holds, _, limit in limits):
        raise ConfigError(f"{blame}, must be {' and '.join(f'{words} {limit:g}' for _, words, limit in limits)}")


def _leaves(layer: Mapping, prefix: str = "") -> Iterable[str]:
    for key, value in layer.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")


def load_config(
    path: str | Path | None,
    overrides: Iterable[str] = (),
    schema: type = ClassifyConfig,
    defaults: Mapping | None = None,
) -> Any:
    """Reads a recipe, its bases and the overrides into a new instance of ``schema``.

    Args:
        path: file or shipped recipe name; None for the schema's defaults alone.
        overrides: ``key=value`` pairs, values in YAML (``augment.scale=[0.5,1]``, ``model.checkpoint=null``).
        schema: the dataclass to fill.
        defaults: values below those of the file.

    Raises:
        ConfigError: names the key, the file (or "command line") and the nearest valid key.

    Examples:
        >>> from foveal.configs.schema import ConfigError, load_config
        >>> config = load_config("classify/digits", ["schedule.epochs=5"])
        >>> config.model.name, config.schedule.epochs, config.output
        ('test_foveal_dinat', 5, 'runs/digits')
        >>> try:
        ...     load_config("classify/digits", ["schedule.epoch=5"])
        ... except ConfigError as error:
        ...     print(error)
        command line: unknown key `schedule.epoch`; did you mean `schedule.epochs`?
    """
    layers = [("defaults", dict(defaults or {}))]
    task: Any = next((f.default for f in dataclasses.fields(schema) if f.name == "task"), None)
    stem = None
    if path is not None:
        file = find_config(path, task)
        stem = file.stem
        layers += _read(file)
    layers += _override_layers(overrides)

    config = OmegaConf.structured(schema)
    blame: dict[str, str] = {}
    for source, layer in layers:
        _check_keys(layer, schema, source, schema)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            key = error.full_key or next(iter(layer), "?")
            reason = (error.msg or str(error)).splitlines()[0]
            raise ConfigError(f"{source}: `{key}` has a wrong value: {reason}") from None
        blame.update(dict.fromkeys(_leaves(layer), source))
    if stem is not None and OmegaConf.is_missing(config, "output"):
        config.output = f"runs/{stem}" if task in (None, "classify") else f"runs/{task}/{stem}"
    source = layers[-1][0] if path is None else str(path)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{source}: no value for `{'`, `'.join(missing)}`; add e.g. {missing[0]}=...")
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error}") from None
    _check_values(result, blame)
    return result


def save_config(config: Any, path: str | Path) -> None:
    """Writes a resolved configuration, every key spelled out; `load_config` reads it back to the same values.

    Examples:
        >>> from foveal.configs.schema import load_config, save_config
        >>> config = load_config("classify/digits")
        >>> save_config(config, "whole.yaml")
        >>> load_config("whole.yaml") == config
        True
    """
    temporary = Path(f"{path}.tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
    temporary.replace(path)
