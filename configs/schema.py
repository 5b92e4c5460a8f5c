"""The schema of a training recipe, and the strict loader of its YAML files.

A recipe is a short YAML file. It may name others under ``base:`` (files relative to itself, or shipped recipes by
name), read first; its own values, and then the ``key=value`` pairs of the command line, override them. Mappings merge,
lists replace lists. A key that the schema does not know, or a value it does not allow, is a :class:`ConfigError` that
names the key, the file, the value and the nearest valid key. What depends on another value is written as a fraction of
it, never as a second number.

A key whose type is text takes its text as it stands: ``output=2024_05_01`` is no number and ``classes: [no, yes]`` are
two names. In paths a leading ``~`` is the home folder and ``${NAME}`` an environment variable, if there is one. Only
the values of the free mappings (``model.kwargs``) are typed by YAML's rules.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from ..errors import ConfigError
from ..files import atomic

RECIPES = Path(__file__).parent
COMMAND_LINE = "command line"

# Keys of earlier recipes. Each is read as the new one where a schema has the new one and not the old.
OLD_KEYS = {
    "train.accumulate": "train.grad_accum_steps",
    "train.eval_every": "train.eval_interval",
    "train.save_every": "train.save_interval",
    "train.keep": "train.save_total_limit",
    "train.fsdp_unit": "train.fsdp_min_num_params",
    "data.short_side": "data.min_size",
    "augment.short_sides": "augment.min_size",
    "augment.crop_short_sides": "augment.crop_min_size",
    "augment.jitter": "augment.scale_jitter",
    "augment.crop": "augment.crop_size",
    "augment.final_crop": "augment.final_crop_size",
    "augment.resize": "augment.scale",
    "augment.ratio": "augment.ratio_range",
    "eval.resize": "eval.scale",
    "eval.scales": "eval.ratios",
    "eval.window": "eval.crop_size",
    "eval.multiple_of": "eval.size_divisor",
}


class Problems:
    """Collects what is wrong with a recipe: a ValueError inside ``with problems:`` is kept, and the program goes on
    behind it."""

    def __init__(self) -> None:
        self.found: list[ValueError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if isinstance(error, ValueError):  # DataError, too
            self.found.append(error)
        return isinstance(error, ValueError)

    def raise_all(self) -> None:
        """Raises the error that was kept; of several, a `ConfigError` with a line each."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise ConfigError("\n".join(dict.fromkeys(map(str, self.found))))


# ---- the sections

SCHEMA = ConfigDict(extra="forbid", allow_inf_nan=False)
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]  # of dropping something, or of an average
IntPair = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
FloatPair = Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)]
RatePair = Annotated[list[Rate], Field(min_length=2, max_length=2)]


def expand_path(path: str) -> str:
    """The path with a leading ``~`` and each ``${NAME}`` of a variable that is set replaced; the rest is text."""
    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", lambda name: os.environ.get(name[1], name[0]), path))


PathText = Annotated[str, AfterValidator(expand_path)]


def _list(*values: Any) -> Any:
    """A field whose default is a list of ``values``."""
    return field(default_factory=lambda: list(values))


@dataclass(config=SCHEMA, kw_only=True)
class OptimConfig:
    """Any optimizer of timm by name. Biases, norms and the model's ``no_weight_decay`` names are not decayed."""

    name: str = "adamw"
    lr: PositiveFloat = 1e-3
    lr_batch: PositiveInt | None = None  # `lr` is for this global batch and scales linearly; null: as written
    weight_decay: NonNegativeFloat = 0.05
    betas: RatePair | None = None
    eps: PositiveFloat | None = None
    momentum: float = 0.9
    layer_decay: float | None = None
    clip_grad: PositiveFloat | None = None  # largest norm of the whole gradient


@dataclass(config=SCHEMA, kw_only=True)
class DenseOptimConfig(OptimConfig):
    """The same for a detector or a segmenter."""

    backbone_lr_ratio: NonNegativeFloat = 1.0  # the backbone's rate over that of the rest


@dataclass(config=SCHEMA, kw_only=True)
class ScheduleConfig:
    """Learning rate per update. All lengths are fractions of `epochs`, all rates ratios to the peak."""

    name: Literal["cosine", "poly", "step", "multistep", "constant"] = "cosine"
    epochs: PositiveInt = 300
    warmup_fraction: Probability = 0.0
    warmup_lr_ratio: Probability = 1e-3
    cooldown_fraction: NonNegativeFloat = 0.0  # further epochs at the lowest rate, after `epochs`
    min_lr_ratio: Probability = 0.0
    power: float = 1.0  # poly: 1 is a linear decay
    decay_fraction: float = Field(default=0.3, gt=0, le=1)  # step: a step after each such part of the run
    decay_rate: float = 0.1  # step, multistep
    milestones: list[float] = _list()  # multistep: a step after each such part of `epochs`


@dataclass(config=SCHEMA, kw_only=True)
class TrainConfig:
    batch_size: PositiveInt = 128  # images for each process and forward pass
    val_batch_size: PositiveInt | None = None  # null: batch_size
    grad_accum_steps: PositiveInt = 1  # forward passes for each update
    parallel: Literal["ddp", "fsdp"] = "ddp"  # several processes: a model each, or a part of it each
    fsdp_min_num_params: PositiveInt = 1_000_000  # fsdp: blocks with as many parameters or more are units
    steps_per_epoch: PositiveInt | None = None  # updates that count as an epoch; null: one pass over the data
    amp: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: Rate = 0.0  # 0: off. When on, the averaged weights are evaluated and kept
    ema_warmup: bool = False  # let the decay grow from 0, for short runs
    eval_interval: PositiveInt = 1  # epochs; the last one is always evaluated
    patience: PositiveInt | None = None  # stop after this many evaluations without a better score; null: never
    compile: bool = False
    channels_last: bool = False  # memory format of the weights, and with them of the maps
    save_total_limit: PositiveInt = 2  # checkpoints to go on from: the last one and those before it
    save_interval: PositiveInt | None = None  # updates; null: at the end of each epoch only
    threads: PositiveInt | None = None  # CPU threads of PyTorch; null: as the environment has it


@dataclass(config=SCHEMA, kw_only=True)
class LogConfig:
    """Where figures go beside metrics.csv: tensorboard, mlflow, wandb or any other tracker of accelerate's."""

    trackers: list[str] = _list("tensorboard")


@dataclass(config=SCHEMA, kw_only=True)
class RunConfig:
    """What the recipes of all tasks have."""

    auto: list[str] = _list()  # keys that training chooses by the data; one that a later file or override gives is not
    output: PathText  # run folder; when a recipe does not name it: runs/NAME, runs/detect/NAME or runs/segment/NAME
    resume: Literal["never", "auto"] = "never"  # auto: go on from OUTPUT/last, or start anew
    imports: list[str] = _list()  # modules that register models of your own, on Python's path or in the current folder
    seed: int = Field(default=0, ge=0, lt=2**32)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(config=SCHEMA, kw_only=True)
class ImagesConfig:
    """What the ``data`` of all tasks have."""

    root: PathText | None = None  # the folder of the data; other paths are below it
    limit: PositiveInt | None = None  # the first so many training images only; classify: of idx and digits
    val_limit: PositiveInt | None = None  # likewise for the evaluation
    split: PathText | None = None  # auto: a CSV of images and train or val; null: as the data have it, else drawn
    val_fraction: float = Field(default=0.2, gt=0, lt=1)  # auto, digits: share that is held out, of each class
    in_chans: PositiveInt = 3
    mean: list[float] | None = None  # per channel, of values in [0, 1]; null: the model's own
    std: list[PositiveFloat] | None = None
    workers: NonNegativeInt = 4  # decoding processes for each training process
    exclude: PathText | None = None  # a bad_samples.csv or a list of names; these samples are left out
    max_bad_fraction: Probability = 0.01  # unreadable images beyond this share of an epoch stop the run


@dataclass(config=SCHEMA, kw_only=True)
class DenseDataConfig(ImagesConfig):
    """What the ``data`` of detection and segmentation have; ``digits`` are composites, written when missing."""

    train_split: str | None = None  # null: train (segment, ade20k: training)
    val_split: str | None = None  # null: val (segment, ade20k: validation); auto: test where there is no other

    digits_train: PositiveInt = 400  # digits: how many composites to write, ...
    digits_val: PositiveInt = 100
    digits_size: int = Field(default=128, ge=32)  # ... of which side


@dataclass(config=SCHEMA, kw_only=True)
class DenseModelConfig:
    """What ``heads.build`` is given of a detector or a segmenter."""

    name: str  # the backbone: any name that timm creates with features_only
    neck: Literal["fpn", "a3fpn"] = "fpn"  # upernet with fpn: its own top-down path
    pretrained: bool = False  # the backbone's published weights, by the name's tag
    checkpoint: PathText | None = None  # the backbone's weights: a file, a timm folder or a run folder of a classifier
    frozen_stages: int = Field(default=-1, ge=-1)  # this many stages and the stem stay as they are; -1: all learn
    norm_eval: bool = False  # the backbone's batch norms keep their statistics
    sync_bn: bool = False  # batch norms of the whole model over all processes
    drop_path_rate: Rate | None = None  # null: the backbone's own
    grad_checkpointing: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the backbone
    neck_kwargs: dict[str, Any] = field(default_factory=dict)
    head_kwargs: dict[str, Any] = field(default_factory=dict)  # of torchvision's detector, or heads.segmentation


# ---- classification


@dataclass(config=SCHEMA, kw_only=True)
class ModelConfig:
    """What ``timm.create_model`` is given."""

    name: str
    pretrained: bool = False  # the published weights, by the name's tag
    checkpoint: PathText | None = None  # weights to start from: a file, a timm folder or a run folder
    num_classes: PositiveInt | None = None  # null: as many as the data have
    frozen_stages: int = Field(default=-1, ge=-1)  # this many stages and the stem stay as they are; -1: all learn
    drop_rate: Rate | None = None
    drop_path_rate: Rate | None = None  # null: the model's own
    grad_checkpointing: bool = False
    sync_bn: bool = False  # batch norms over all processes
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the entry function


@dataclass(config=SCHEMA, kw_only=True)
class DataConfig(ImagesConfig):
    """Where the images are and how they reach the model.

    ``root`` is for folder: ROOT/SPLIT/CLASS/IMAGE; wds: shards and _info.json; idx: the four IDX files.
    """

    kind: Literal["folder", "auto", "wds", "idx", "digits"] = "folder"
    train_split: str = "train"
    val_split: str = "val"  # for wds also a brace pattern with its count: 'val-{0000..0063}.tar|50000'
    classes: list[str] | None = None  # names by index; null: folder names, or what the data set is known to hold
    num_classes: PositiveInt | None = None  # needed by wds when `classes` is null
    # balanced: rare classes more often; an image by 1 / images of its class, or of its rarest class's square root
    sampling: Literal["uniform", "balanced"] = "uniform"
    image_size: PositiveInt | None = None  # side of the square input; null: the model's own
    interpolation: str | None = None  # of the evaluation; null: the model's own
    crop_pct: float | None = None  # folder, wds: side of the centre crop over the resized short side
    workers: NonNegativeInt = 8  # folder, wds
    decode: Literal["timm", "fast", "draft"] = "fast"  # folder, wds: in training; see train/README.md


@dataclass(config=SCHEMA, kw_only=True)
class AugmentConfig:
    """Training-time augmentation. Mixing is by batch, as ``timm.data.Mixup`` does it."""

    hflip: Probability = 0.5
    vflip: Probability = 0.0
    scale: list[float] = _list(0.08, 1.0)  # folder, wds: area of the random crop
    ratio: list[float] = _list(0.75, 4 / 3)  # folder, wds: its aspect
    color_jitter: NonNegativeFloat = 0.4  # folder, wds
    auto_augment: str | None = None  # folder, wds: for example rand-m9-mstd0.5-inc1
    interpolation: str = "random"  # folder, wds: random, bilinear or bicubic
    shift: NonNegativeFloat = 0.0  # idx, digits: largest translation as a fraction of the side
    rotate: NonNegativeFloat = 0.0  # idx, digits: largest rotation in degrees
    zoom: NonNegativeFloat = 0.0  # idx, digits: largest change of size, 0.1 for 0.9 to 1.1
    erase: Probability = 0.0  # probability of random erasing
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: NonNegativeFloat = 0.0  # alpha; 0: off
    cutmix: NonNegativeFloat = 0.0  # alpha; 0: off
    mix_prob: Probability = 1.0
    mix_switch_prob: Probability = 0.5
    mix_off_fraction: Probability = 0.0  # mixing is off in this last fraction of the epochs
    sizes: list[PositiveInt] = _list()  # growing sides of the input, each for an equal part of the run


@dataclass(config=SCHEMA, kw_only=True)
class LossConfig:
    name: Literal["cross_entropy", "bce"] = "cross_entropy"
    smoothing: Rate = 0.0
    auxiliary: NonNegativeFloat = 0.0  # weight of the loss of the model's auxiliary head; 0: it is not trained


@dataclass(config=SCHEMA, kw_only=True)
class DistillConfig:
    """Learning from a teacher's outputs on the same images, beside the labels (DeiT, arXiv 2012.12877, section 4)."""

    teacher: PathText | None = None  # as for `foveal.load`: name with published weights, run, folder; null: none
    alpha: Probability = 0.5  # weight of the teacher's part; the labels' is 1 - alpha
    kind: Literal["hard", "soft"] = "hard"  # learn its decision, or its distribution
    temperature: PositiveFloat = 1.0  # soft: divides both sides' logits


@dataclass(config=SCHEMA, kw_only=True)
class ClassifyConfig(RunConfig):
    """A whole classification run."""

    task: Literal["classify"] = "classify"  # so that a run's config.yaml names its task
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


# ---- detection


@dataclass(config=SCHEMA, kw_only=True)
class DetectModelConfig(DenseModelConfig):
    """What ``heads.build.build_detector`` is given."""

    head: Literal["mask_rcnn", "cascade_mask_rcnn", "faster_rcnn", "retinanet", "fcos", "mask2former"] = "mask_rcnn"


@dataclass(config=SCHEMA, kw_only=True)
class DetectDataConfig(DenseDataConfig):
    """Annotations in COCO's format, and the folders of their images."""

    kind: Literal["coco", "auto", "voc", "digits"] = "coco"
    # voc: sets instead, such as VOC2007/trainval+VOC2012/trainval, which name their images
    train_annotations: PathText = "annotations/instances_train2017.json"
    train_images: PathText = "train2017"
    val_annotations: PathText = "annotations/instances_val2017.json"
    val_images: PathText = "val2017"
    classes: list[str] | None = None  # auto: names by label; objects of others are left out; null: all that occur
    # balanced: rare classes more often; an image by 1 / images of its class, or of its rarest class's square root
    sampling: Literal["uniform", "balanced"] = "uniform"
    keep_empty: bool = False  # train on images without objects too
    min_size: PositiveInt = 800  # evaluation: the short side is resized to this, ...
    max_size: PositiveInt = 1333  # ... unless the long side would exceed this


@dataclass(config=SCHEMA, kw_only=True)
class DetectAugmentConfig:
    """Training-time augmentation."""

    hflip: Probability = 0.5
    vflip: Probability = 0.0
    min_size: list[PositiveInt] = _list(800)  # the short side is resized to one of these
    sampling: Literal["choice", "range"] = "choice"  # range: any length between the two of min_size
    max_size: PositiveInt = 1333  # limit of the long side
    crop_prob: Probability = 0.0  # share of images that are resized, cropped and resized again (as DETR does)
    crop_min_size: list[PositiveInt] = _list(400, 500, 600)  # the first size
    crop_size: IntPair = _list(384, 600)  # least and largest side of the crop
    final_crop_size: IntPair | None = None  # rows, columns, at a random place; null: none
    scale_jitter: FloatPair | None = None  # range of a factor of what fits final_crop_size; replaces min_size
    photometric: bool = False  # brightness, contrast, saturation, hue


@dataclass(config=SCHEMA, kw_only=True)
class DetectEvalConfig:
    # of an image, the best ones, found and counted: crowded scenes need more than COCO's 100; null: 100, or what
    # model.head_kwargs has the detector find
    max_detections: PositiveInt | None = None


@dataclass(config=SCHEMA, kw_only=True)
class DetectConfig(RunConfig):
    """A whole detection run."""

    task: Literal["detect"] = "detect"
    model: DetectModelConfig
    data: DetectDataConfig = field(default_factory=DetectDataConfig)
    augment: DetectAugmentConfig = field(default_factory=DetectAugmentConfig)
    eval: DetectEvalConfig = field(default_factory=DetectEvalConfig)
    optim: DenseOptimConfig = field(default_factory=DenseOptimConfig)


# ---- segmentation


@dataclass(config=SCHEMA, kw_only=True)
class SegmentModelConfig(DenseModelConfig):
    """What ``heads.build.build_segmenter`` is given."""

    head: Literal["upernet", "semantic_fpn", "mask2former"] = "upernet"
    segmenter: PathText | None = None  # the whole model's weights: a run or model folder, or a file with mmseg's names
    auxiliary: bool = True  # upernet: an FCN head on the third map, which helps to train and is not used afterwards
    size_divisor: PositiveInt = 32  # images are padded to multiples of it; 1: the backbone takes any size
    auxiliary_kwargs: dict[str, Any] = field(default_factory=dict)  # level, channels ... of heads.segmentation.FCN


def _mask_value(key: Any) -> int | str:
    """A value of a mask's pixels: 0 to 255, a colour as ``#rrggbb``, or ``other``."""
    text = str(key).strip().lower()
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.strip("[]()").split(",")]
    if len(numbers) in (1, 3) and all(0 <= number <= 255 for number in numbers):
        return numbers[0] if len(numbers) == 1 else "#" + bytes(numbers).hex()
    if text != "other" and not re.fullmatch("#[0-9a-f]{6}", text):
        raise ValueError("must be 0 to 255, a colour such as '#8000ff' or [128, 0, 255], or other")
    return text


MaskValue = Annotated[int | str, BeforeValidator(_mask_value)]


@dataclass(config=SCHEMA, kw_only=True)
class SegmentDataConfig(DenseDataConfig):
    """Where the images and their masks are; the layouts stand in ``train/data/masks.py``."""

    kind: Literal["folder", "auto", "ade20k", "cityscapes", "voc", "digits"] = "folder"
    images: PathText = "images/{split}"  # folder: images below ROOT, {split} stands for the split's name
    # folder: files of the same names, perhaps with an ending such as _mask or _L; a class for each pixel
    masks: PathText = "masks/{split}"
    classes: list[str] | None = None  # names by label; needed by folder, known of the others
    reduce_zero_label: bool = False  # folder: 0 is no class, 1 is the first (ade20k: always)
    # class by value or colour ('#8000ff' or [128, 0, 255]) of a mask; null: no class; `other`: all that are not named
    values: dict[MaskValue, str | None] | None = None
    ignore_label: int = Field(default=255, ge=0, le=255)  # the value of a pixel without a class, unless in `values`
    antialias: bool = True  # where images are made smaller; false: as OpenCV, with which the published recipes ran


@dataclass(config=SCHEMA, kw_only=True)
class SegmentAugmentConfig:
    """Training-time augmentation: random resize, crop, flip, colour."""

    scale: IntPair | None = None  # long and short side to fit in; null: the image's own
    ratio_range: FloatPair = _list(0.5, 2.0)  # random factor of that
    crop_size: IntPair = _list(512, 512)  # rows, columns
    cat_max_ratio: float = Field(default=0.75, gt=0, le=1)  # largest share of one class in a crop; 1: any crop
    hflip: Probability = 0.5
    photometric: bool = True  # brightness, contrast, saturation, hue


@dataclass(config=SCHEMA, kw_only=True)
class SegmentLossConfig:
    auxiliary: NonNegativeFloat = 0.4  # weight of the auxiliary head's cross-entropy
    class_weights: list[NonNegativeFloat] | None = None  # by class, of the loss of its pixels; not of their number
    focal_gamma: NonNegativeFloat = 0.0  # above 0: focal loss (arXiv 1708.02002), which lowers that of easy pixels
    ignored_in_mean: bool = False  # divide by all pixels, as mmseg does, not by those that have a class


@dataclass(config=SCHEMA, kw_only=True)
class SegmentEvalConfig:
    """What the model sees in evaluation; its output is resized to the image's size."""

    mode: Literal["whole", "slide"] = "whole"
    crop_size: IntPair | None = None  # slide: rows, columns; null: the training crop
    stride: IntPair | None = None  # slide; null: two thirds of crop_size
    scale: IntPair | None = None  # long and short side to fit in; null: the image's own
    size_divisor: PositiveInt = 1  # the resized sides are rounded up to multiples of it
    ratios: list[PositiveFloat] = _list(1.0)  # the mean over these factors, ...
    flip: bool = False  # ... and over the mirror images


@dataclass(config=SCHEMA, kw_only=True)
class SegmentConfig(RunConfig):
    """A whole segmentation run."""

    task: Literal["segment"] = "segment"
    model: SegmentModelConfig
    data: SegmentDataConfig = field(default_factory=SegmentDataConfig)
    augment: SegmentAugmentConfig = field(default_factory=SegmentAugmentConfig)
    loss: SegmentLossConfig = field(default_factory=SegmentLossConfig)
    eval: SegmentEvalConfig = field(default_factory=SegmentEvalConfig)
    optim: DenseOptimConfig = field(default_factory=DenseOptimConfig)


SCHEMAS = {"classify": ClassifyConfig, "detect": DetectConfig, "segment": SegmentConfig}

# ---- finding recipes


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
    by_name: dict[str, list[str]] = {}  # with the folder and without
    for shipped in recipe_names():
        if task is None or shipped.startswith(f"{task}/"):
            by_name[shipped] = [shipped]
            by_name.setdefault(shipped.split("/")[1], []).append(shipped)
    found = by_name.get(name, [])
    if len(found) == 1:
        return RECIPES / f"{found[0]}.yaml"
    if found:
        raise ConfigError(f"the recipe name {name!r} is ambiguous: {', '.join(found)}")
    near = sorted({each for match in difflib.get_close_matches(name, by_name, n=4) for each in by_name[match]})
    hint = f"did you mean {', '.join(near)}?" if near else f"shipped are {', '.join(n for n in by_name if '/' in n)}"
    raise ConfigError(f"there is no configuration file and no shipped recipe {str(config)!r}; {hint}")


def recipe_task(config: str | Path) -> str:
    """The task of a recipe: its own ``task``, else that of the folder of shipped recipes that it or its base lies in,
    else ``classify``.

    Raises:
        ConfigError: nothing is found, or the name is of several tasks.
    """
    layers = _read(find_config(config), object)
    keys = {key: value for _, layer in layers for key, value in layer.items()}
    folders = (Path(file).parent.name for file, _ in reversed(layers))
    return next((task for task in (keys.get("task"), *folders) if task in SCHEMAS), "classify")


# ---- reading them


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number and 2024-05-01 as text."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text."""


FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
NULL = "tag:yaml.org,2002:null"
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _alternatives(kind: Any) -> tuple:
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return tuple(part.__origin__ if typing.get_origin(part) is Annotated else part for part in parts)


def _field_type(schema: Any, key: str) -> Any:
    """The type of a dotted key; Any for one that the schema does not know."""
    for part in key.split("."):
        known = {f.name: f.type for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else {}
        schema = known.get(part, Any)
    return schema


def _check_comment(node: Any) -> None:
    """Refuses unquoted text that goes on with `` #2``, which YAML takes for a comment."""
    if node.style is not None or node.end_mark is None or node.end_mark.buffer is None:
        return
    end = node.end_mark
    rest = re.match(r" #[^\s#].*", end.buffer[end.pointer :])
    if rest is not None:
        problem = f"the text {node.value!r} goes on with {rest[0]!r}: quote all of it, or begin a comment with '# '"
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=end)


def _key(node: Any) -> str:
    """The text of a key; of a list, such as the colour ``[128, 0, 255]``, with commas."""
    return ",".join(map(_key, node.value)) if isinstance(node, yaml.SequenceNode) else str(node.value)


def _construct(loader: _Loader, node: yaml.Node, kind: Any) -> Any:
    """The value of a YAML node. Where ``kind`` is text, the node's own text."""
    alternatives = _alternatives(kind)
    if isinstance(node, yaml.MappingNode):
        names = [_key(key) for key, _ in node.value]
        for name in {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"duplicate key {name!r}", problem_mark=node.start_mark)
        loader.flatten_mapping(node)
        pairs = [(_key(key), value) for key, value in node.value]
        item = next((typing.get_args(each)[1] for each in alternatives if typing.get_origin(each) is dict), None)
        return {name: _construct(loader, value, item or _field_type(kind, name)) for name, value in pairs}
    if isinstance(node, yaml.SequenceNode):
        item = next((typing.get_args(each)[0] for each in alternatives if typing.get_origin(each) is list), Any)
        return [_construct(loader, value, item) for value in node.value]
    if any(each is str or typing.get_origin(each) is Literal for each in alternatives):
        if str in alternatives:
            _check_comment(node)
        null = node.tag == NULL and (type(None) in alternatives or not node.value)
        return None if null else node.value
    return loader.construct_object(node, deep=True)


def _read(path: Path, schema: type, including: tuple[Path, ...] = ()) -> list[tuple[str, dict]]:
    """The layers of a file, its bases first, each with the name to blame."""
    path = path.resolve()
    if path in including:
        chain = " -> ".join(p.name for p in (*including, path))
        raise ConfigError(f"base files include each other in a circle: {chain}")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        layer = {} if node is None else _construct(loader, node, schema)
    except FileNotFoundError:
        raise ConfigError(f"{including[-1]}: base file {path} does not exist") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read as YAML: {error}") from None
    if not isinstance(layer, dict):
        raise ConfigError(f"{path} holds a {type(layer).__name__}, not a mapping of keys to values")
    bases = layer.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: `base` must be a file name or a list of them, not {bases!r}")
    layers = []
    for base in bases:
        layers += _read(_find_base(path, base, schema), schema, (*including, path))
    return [*layers, (str(path), layer)]


def _find_base(recipe: Path, base: str, schema: type) -> Path:
    """A file, relative to the recipe, or a shipped recipe by name: ``care_s0``, ``detect/finetune``."""
    beside = recipe.parent / base
    if beside.is_file() or beside.suffix:
        return beside  # if it is missing, the reader says so
    return find_config(base, None if "/" in base else _task(schema))


def _task(schema: Any) -> str | None:
    fields: Any = dataclasses.fields(schema) if dataclasses.is_dataclass(schema) else ()
    return next((f.default for f in fields if f.name == "task"), None)


def _override_layer(override: str, schema: type) -> dict:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form key=value")
    kind = _field_type(schema, key)
    try:
        loader = _Loader(text)
        if any(each is str for each in _alternatives(kind)):  # text as it is given; quotes around all of it are YAML's
            quoted = re.fullmatch(r"'[^']*'|\"[^\"]*\"", text)
            tag = loader.resolve(yaml.ScalarNode, text, (not quoted, bool(quoted)))
            node = yaml.ScalarNode(tag, text[1:-1] if quoted else text)
        else:
            node = loader.get_single_node()
        layer: Any = None if node is None else _construct(loader, node, kind)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{COMMAND_LINE}: {override!r} can't be read: {error}") from None
    for part in reversed(key.split(".")):
        layer = {part: layer}
    return layer


def override_value(overrides: Iterable[str], key: str) -> str | None:
    """The path given for ``key`` on the command line, the last one if there are several; None if there is none."""
    values = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == key]
    return expand_path(values[-1]) if values else None


def _rename_old_keys(layer: Mapping, schema: type, source: str) -> dict:
    """The layer with the keys of `OLD_KEYS` replaced; the layer itself stays."""
    valid, layer = set(_keys(schema)), dict(layer)
    for old, new in OLD_KEYS.items():
        section, key, new_key = old.split(".")[0], old.split(".")[1], new.split(".")[1]
        values = layer.get(section)
        if old in valid or new not in valid or not isinstance(values, Mapping) or key not in values:
            continue
        if new_key in values:
            raise ConfigError(f"{source}: `{old}` is the earlier name of `{new}`, which is given, too")
        layer[section] = {new_key if name == key else name: value for name, value in values.items()}
        warnings.warn(f"{source}: `{old}` is now `{new}`", DeprecationWarning, stacklevel=4)
    return layer


def _merge(below: dict, above: Mapping, source: str, blame: dict[str, str], prefix: str = "") -> None:
    """Writes ``above`` over ``below``, and into ``blame`` the source of each key."""
    for key, value in above.items():
        blame[f"{prefix}{key}"] = source
        if isinstance(value, Mapping):
            below[key] = below[key] if isinstance(below.get(key), dict) else {}
            _merge(below[key], value, source, blame, f"{prefix}{key}.")
        else:
            below[key] = value


def _keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for f in dataclasses.fields(schema):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(f.type):
            keys += _keys(f.type, f"{prefix}{f.name}.")
    return keys


def _nearest_key(name: str, schema: type) -> str:
    valid = _keys(schema)
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(valid)}
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    near = near or [by_leaf[k] for k in difflib.get_close_matches(name.rpartition(".")[2], by_leaf, n=1, cutoff=0.5)]
    section = name.rpartition(".")[0]
    siblings = (key.rpartition(".")[2] for key in valid if key.rpartition(".")[0] == section)
    return f"did you mean `{near[0]}`?" if near else f"valid here: {', '.join(siblings)}"


def _explain(error: Any, blame: Mapping[str, str], schema: type) -> str:
    """One line for one of pydantic's errors."""
    keys = [part for part in error["loc"] if isinstance(part, str)]
    name = ".".join(keys)
    prefixes = (".".join(keys[:length]) for length in range(len(keys), 0, -1))
    source = next((blame[prefix] for prefix in prefixes if prefix in blame), blame[""])
    if error["type"] == "unexpected_keyword_argument":
        return f"{source}: unknown key `{name}`; {_nearest_key(name, schema)}"
    if error["type"] == "missing":
        return f"{blame['']}: no value for `{name}`; add e.g. {name}=..."
    value, reason = error["input"], error["msg"].replace("Input should be", "must be", 1)
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(str(value), re.findall("'(.*?)'", error["ctx"]["expected"]), n=1)
        reason += f"; did you mean {near[0]!r}?" if near else ""
    item = "".join(f"[{part}]" for part in error["loc"] if isinstance(part, int))
    return f"{source}: `{name}{item}` is {value!r}: {reason}"


def load_config(
    path: str | Path | None,
    overrides: Iterable[str] = (),
    schema: type = ClassifyConfig,
    defaults: Mapping | None = None,
) -> Any:
    """Reads a recipe, its bases and the overrides into a new instance of ``schema``.

    Args:
        path: file or shipped recipe name; None for the schema's defaults alone.
        overrides: ``key=value`` pairs; the value is text where the key's type is (``data.root=/a #2``), and else YAML
            (``augment.scale=[0.5,1]``, ``model.checkpoint=null``).
        schema: the dataclass to fill.
        defaults: values below those of the file.

    Raises:
        ConfigError: everything that is wrong, a line each, with the key, the file (or "command line"), the value and
            the nearest valid key.

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
    layers = [("defaults", {"model": {}, **(defaults or {})})]
    task = _task(schema)
    file = None if path is None else find_config(path, task)
    if file is not None:
        layers += _read(file, schema)
    layers += [(COMMAND_LINE, _override_layer(override, schema)) for override in overrides]

    merged: dict[str, Any] = {}
    blame = {"": layers[-1][0] if file is None else str(file)}
    for source, layer in layers:
        given: dict[str, str] = {}
        _merge(merged, _rename_old_keys(layer, schema, source), source, given)
        if "auto" not in given and isinstance(merged.get("auto"), list):
            merged["auto"] = [key for key in merged["auto"] if key not in given]
        blame |= given
    if file is not None:
        merged.setdefault("output", f"runs/{file.stem}" if task in (None, "classify") else f"runs/{task}/{file.stem}")
    try:
        return TypeAdapter(schema).validate_python(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(each, blame, schema) for each in error.errors())) from None


def save_config(config: Any, path: str | Path) -> None:
    """Writes a resolved configuration, every key spelled out; `load_config` reads it back to the same values.

    Examples:
        >>> from foveal.configs.schema import load_config, save_config
        >>> config = load_config("classify/digits")
        >>> save_config(config, "whole.yaml")
        >>> load_config("whole.yaml") == config
        True
    """
    content = yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    with atomic(path) as new:
        new.write_text(content, encoding="utf-8")
