"""The schema of a training recipe, and the strict loader of its YAML files.

A recipe is a short YAML file. Its ``base:`` lists recipes to read first (files relative to it, or shipped recipes by
name); its own values override theirs, and ``key=value`` pairs of the command line override both. Mappings are merged,
lists are replaced. An unknown key or invalid value raises a `ConfigError` with the key, the file, the value and the
nearest valid key. Values that depend on others are fractions of them.

Text values are taken literally: ``output=2024_05_01`` is not a number, and ``classes: [no, yes]`` are two names. In
paths, a leading ``~`` is the home folder and ``${NAME}`` an environment variable, if it is set. YAML's types apply only
to values of free mappings (``model.kwargs``).
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

# Former keys -> present ones, for schemas that have the present key and not the former.
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
    """Collects the errors of a recipe: ``with problems:`` stores a ValueError and continues after the block."""

    def __init__(self) -> None:
        self.found: list[ValueError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if isinstance(error, ValueError):  # DataError, too
            self.found.append(error)
        return isinstance(error, ValueError)

    def concern(self, section: str) -> bool:
        """Whether a collected error is about a key of a section."""
        return any(str(error).startswith(f"{section}.") for error in self.found)

    def raise_all(self) -> None:
        """Raises the stored error; for several, a `ConfigError` with a line each."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise ConfigError("\n".join(dict.fromkeys(map(str, self.found))))


# ---- the sections

SCHEMA = ConfigDict(extra="forbid", allow_inf_nan=False)
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]  # of dropout or averaging
IntPair = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
FloatPair = Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)]
RatePair = Annotated[list[Rate], Field(min_length=2, max_length=2)]


def expand_path(path: str) -> str:
    """Expands a leading ``~``, and each ``${NAME}`` of a variable that is set."""
    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", lambda name: os.environ.get(name[1], name[0]), path))


PathText = Annotated[str, AfterValidator(expand_path)]


def _list(*values: Any) -> Any:
    """A field with the list of ``values`` as default."""
    return field(default_factory=lambda: list(values))


@dataclass(config=SCHEMA, kw_only=True)
class OptimConfig:
    """An optimizer of timm. Biases, norms and the model's ``no_weight_decay`` names are not decayed."""

    name: str = "adamw"
    lr: PositiveFloat = 1e-3
    lr_batch: PositiveInt | None = None  # global batch size of `lr`, which is scaled linearly; null: no scaling
    weight_decay: NonNegativeFloat = 0.05
    betas: RatePair | None = None
    eps: PositiveFloat | None = None
    momentum: float = 0.9
    layer_decay: float | None = None
    clip_grad: PositiveFloat | None = None  # maximum norm of the gradient


@dataclass(config=SCHEMA, kw_only=True)
class DenseOptimConfig(OptimConfig):
    """An optimizer for detectors and segmenters."""

    backbone_lr_ratio: NonNegativeFloat = 1.0  # learning rate of the backbone relative to the rest


@dataclass(config=SCHEMA, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule, per update. Lengths are fractions of `epochs`, rates are relative to the peak."""

    name: Literal["cosine", "poly", "step", "multistep", "constant"] = "cosine"
    epochs: PositiveInt = 300
    warmup_fraction: Probability = 0.0
    warmup_lr_ratio: Probability = 1e-3
    cooldown_fraction: NonNegativeFloat = 0.0  # more epochs at the minimum rate, after `epochs`
    min_lr_ratio: Probability = 0.0
    power: float = 1.0  # poly; 1: linear decay
    decay_fraction: float = Field(default=0.3, gt=0, le=1)  # step: fraction of the run between steps
    decay_rate: float = 0.1  # step, multistep
    milestones: list[float] = _list()  # multistep: fractions of `epochs`


@dataclass(config=SCHEMA, kw_only=True)
class TrainConfig:
    batch_size: PositiveInt = 128  # images per process and forward pass
    val_batch_size: PositiveInt | None = None  # null: batch_size
    grad_accum_steps: PositiveInt = 1  # forward passes per update
    parallel: Literal["ddp", "fsdp"] = "ddp"  # several processes: replicated or sharded model
    fsdp_min_num_params: PositiveInt = 1_000_000  # fsdp: smaller blocks are not sharded separately
    steps_per_epoch: PositiveInt | None = None  # updates per epoch; null: one pass over the data
    amp: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: Rate = 0.0  # 0: off; else the averaged weights are evaluated and saved
    ema_warmup: bool = False  # increase the decay from 0, for short runs
    eval_interval: PositiveInt = 1  # epochs; the last one is always evaluated
    monitor: Literal["score", "loss"] = "score"  # what marks the best epoch: the task's score, or the held-out loss
    patience: PositiveInt | None = None  # stop after so many evaluations without a better epoch; null: never
    compile: bool = False
    channels_last: bool = False  # memory format of weights and feature maps
    save_total_limit: PositiveInt = 2  # checkpoints to keep for resuming
    save_interval: PositiveInt | None = None  # in updates; null: at the end of each epoch
    threads: PositiveInt | None = None  # CPU threads of PyTorch; null: its default


@dataclass(config=SCHEMA, kw_only=True)
class LogConfig:
    """Trackers besides metrics.csv: tensorboard, mlflow, wandb or any other of accelerate's."""

    trackers: list[str] = _list("tensorboard")


@dataclass(config=SCHEMA, kw_only=True)
class RunConfig:
    """Keys of the recipes of all tasks."""

    auto: list[str] = _list()  # keys to choose from the data, unless a later file or override sets them
    output: PathText  # run folder; default for recipes: runs/NAME, runs/detect/NAME or runs/segment/NAME
    resume: Literal["never", "auto"] = "never"  # auto: resume from OUTPUT/last if it exists
    imports: list[str] = _list()  # modules that register your own models, on Python's path or in the current folder
    seed: int = Field(default=0, ge=0, lt=2**32)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(config=SCHEMA, kw_only=True)
class ImagesConfig:
    """``data`` keys of all tasks."""

    root: PathText | None = None  # data folder; other paths are relative to it
    limit: PositiveInt | None = None  # use the first so many training images; classify: idx and digits only
    val_limit: PositiveInt | None = None  # the same for evaluation
    split: PathText | None = None  # auto: a CSV file (image, train or val); null: the data's own split, else random
    val_fraction: float = Field(default=0.2, gt=0, lt=1)  # auto, digits: held-out fraction of each class
    # balanced: images with rare classes more often; classify: all classes equally often
    sampling: Literal["uniform", "balanced"] = "uniform"
    in_chans: PositiveInt = 3  # 1: grey, 3: RGB; others need .npy or TIFF files with as many
    # per channel, for values in [0, 1]; null: the model's, or for other than 1 or 3 channels those of some images
    mean: list[float] | None = None
    std: list[PositiveFloat] | None = None
    workers: NonNegativeInt = 4  # worker processes per training process
    exclude: PathText | None = None  # a bad_samples.csv or list of names to leave out
    max_bad_fraction: Probability = 0.01  # stop the run at a larger fraction of unreadable images per epoch


@dataclass(config=SCHEMA, kw_only=True)
class DenseDataConfig(ImagesConfig):
    """``data`` keys of detection and segmentation. ``digits`` are generated composites."""

    train_split: str | None = None  # null: train (segment, ade20k: training)
    val_split: str | None = None  # null: val (segment, ade20k: validation); auto: test where there is no other

    digits_train: PositiveInt = 400  # digits: number of composites
    digits_val: PositiveInt = 100
    digits_size: int = Field(default=128, ge=32)  # digits: side of the composites in pixels


@dataclass(config=SCHEMA, kw_only=True)
class DenseModelConfig:
    """Arguments of ``heads.build`` for detectors and segmenters."""

    name: str  # backbone: any timm model with features_only
    neck: Literal["fpn", "a3fpn"] = "fpn"  # upernet: fpn is its own
    pretrained: bool = False  # published weights of the backbone, by the name's tag
    checkpoint: PathText | None = None  # weights of the backbone: a file, a timm folder or a classifier's run folder
    frozen_stages: int = Field(default=-1, ge=-1)  # freeze the stem and so many stages; -1: nothing
    norm_eval: bool = False  # freeze the statistics of the backbone's batch norms
    # makes finer maps than the backbone's: bilinear, naf, uplift_dinov2_s14, uplift_dinov3_splus16, a run or folder
    upsample: PathText | None = None
    sync_bn: bool = False  # synchronize batch norms over all processes
    drop_path_rate: Rate | None = None  # null: the backbone's default
    grad_checkpointing: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)  # more arguments of the backbone
    neck_kwargs: dict[str, Any] = field(default_factory=dict)
    head_kwargs: dict[str, Any] = field(default_factory=dict)  # of torchvision's detector, or heads.segmentation


# ---- classification


@dataclass(config=SCHEMA, kw_only=True)
class ModelConfig:
    """Arguments of ``timm.create_model``."""

    name: str
    pretrained: bool = False  # published weights, by the name's tag
    checkpoint: PathText | None = None  # initial weights: a file, a timm folder or a run folder
    num_classes: PositiveInt | None = None  # null: those of the data
    frozen_stages: int = Field(default=-1, ge=-1)  # freeze the stem and so many stages; -1: nothing
    drop_rate: Rate | None = None
    drop_path_rate: Rate | None = None  # null: the model's default
    grad_checkpointing: bool = False
    sync_bn: bool = False  # synchronize batch norms over all processes
    kwargs: dict[str, Any] = field(default_factory=dict)  # more arguments of the entry function


@dataclass(config=SCHEMA, kw_only=True)
class DataConfig(ImagesConfig):
    """Images and their preprocessing.

    Content of ``root``: folder: SPLIT/CLASS/IMAGE; wds: shards and _info.json; idx: the four IDX files.
    """

    kind: Literal["folder", "auto", "wds", "idx", "digits"] = "folder"
    train_split: str = "train"
    val_split: str = "val"  # wds: also a brace pattern with a count, 'val-{0000..0063}.tar|50000'
    classes: list[str] | None = None  # names by index; null: those of the data
    num_classes: PositiveInt | None = None  # wds: required if `classes` is null
    image_size: PositiveInt | None = None  # side of the square input; null: the model's
    interpolation: str | None = None  # in evaluation; null: the model's
    crop_pct: float | None = None  # folder, wds: side of the centre crop over the resized short side
    workers: NonNegativeInt = 8  # folder, wds
    decode: Literal["timm", "fast", "draft"] = "fast"  # folder, wds: for training; see train/README.md
    corruption: str | None = None  # of held-out images: NAME:SEVERITY, NAME (five severities) or all; null: none


@dataclass(config=SCHEMA, kw_only=True)
class AugmentConfig:
    """Augmentation in training. Images are mixed per batch, with ``timm.data.Mixup``."""

    hflip: Probability = 0.5
    vflip: Probability = 0.0
    scale: list[float] = _list(0.08, 1.0)  # folder, wds: area of the random crop
    ratio: list[float] = _list(0.75, 4 / 3)  # folder, wds: aspect ratio of the crop
    color_jitter: NonNegativeFloat = 0.4  # folder, wds
    auto_augment: str | None = None  # folder, wds: for example rand-m9-mstd0.5-inc1
    interpolation: str = "random"  # folder, wds: random, bilinear or bicubic
    shift: NonNegativeFloat = 0.0  # idx, digits: maximum translation as a fraction of the side
    rotate: NonNegativeFloat = 0.0  # idx, digits: maximum rotation in degrees
    zoom: NonNegativeFloat = 0.0  # idx, digits: maximum scaling; 0.1: 0.9 to 1.1
    erase: Probability = 0.0  # probability of random erasing
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: NonNegativeFloat = 0.0  # alpha; 0: off
    cutmix: NonNegativeFloat = 0.0  # alpha; 0: off
    mix_prob: Probability = 1.0
    mix_switch_prob: Probability = 0.5
    mix_off_fraction: Probability = 0.0  # disable mixing in this last fraction of the epochs
    sizes: list[PositiveInt] = _list()  # increasing input sizes, each for an equal part of the run


@dataclass(config=SCHEMA, kw_only=True)
class LossConfig:
    name: Literal["cross_entropy", "bce"] = "cross_entropy"
    smoothing: Rate = 0.0
    # weight of the auxiliary head's loss, or of the loss that the model returns: the attention diversification loss
    # (ADL) of FAN and TAP-FAN, the balance of heads of MoH-ViT; 0: none
    auxiliary: NonNegativeFloat = 0.0


@dataclass(config=SCHEMA, kw_only=True)
class DistillConfig:
    """Distillation from a teacher, in addition to the labels (DeiT, arXiv 2012.12877, section 4)."""

    teacher: PathText | None = None  # a source for `foveal.load`: name, run, folder; null: no distillation
    alpha: Probability = 0.5  # weight of the distillation loss; that of the labels is 1 - alpha
    kind: Literal["hard", "soft"] = "hard"  # targets: the teacher's argmax or its distribution
    temperature: PositiveFloat = 1.0  # soft: of both distributions


@dataclass(config=SCHEMA, kw_only=True)
class ClassifyConfig(RunConfig):
    """A classification recipe."""

    task: Literal["classify"] = "classify"  # recorded in a run's config.yaml
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


# ---- probing


@dataclass(config=SCHEMA, kw_only=True)
class ProbeModelConfig:
    """The frozen backbone: a source of ``foveal.load``, or a model of timm with random weights."""

    name: str
    pretrained: bool = True  # false: random weights
    kwargs: dict[str, Any] = field(default_factory=dict)  # more arguments of the entry function


@dataclass(config=SCHEMA, kw_only=True)
class ProbeHeadConfig:
    kind: Literal["ep", "linear", "knn"] = "ep"  # efficient probing, linear probing, nearest neighbours
    num_queries: PositiveInt = 32  # ep
    d_out: PositiveInt = 1  # ep: channels of the tokens over those of the output
    tokens: Literal["patches", "all"] = "patches"  # ep; all: with a plain ViT's class and register tokens
    k: list[PositiveInt] = _list(20)  # knn: numbers of neighbours
    temperature: PositiveFloat = 0.07  # knn


@dataclass(config=SCHEMA, kw_only=True)
class ProbeAugmentConfig(AugmentConfig):
    """With ``cache=null``: a random crop and a flip, as published."""

    color_jitter: NonNegativeFloat = 0.0
    interpolation: str = "bicubic"


@dataclass(config=SCHEMA, kw_only=True)
class ProbeOptimConfig(OptimConfig):
    """LARS as published, without decay."""

    name: str = "lars"
    lr: PositiveFloat = 0.1
    lr_batch: PositiveInt | None = 256
    weight_decay: NonNegativeFloat = 0.0


@dataclass(config=SCHEMA, kw_only=True)
class ProbeScheduleConfig(ScheduleConfig):
    epochs: PositiveInt = 90
    warmup_fraction: Probability = 1 / 9  # 10 epochs
    warmup_lr_ratio: Probability = 0.0


@dataclass(config=SCHEMA, kw_only=True)
class ProbeTrainConfig:
    # images per update; null: the published 4096, with cache=null `optim.lr_batch`, or less for 8 updates per epoch
    batch_size: PositiveInt | None = None
    val_batch_size: PositiveInt = 64  # images at a time in the backbone
    amp: Literal["no", "bf16", "fp16"] = "no"  # of the backbone, and the type of the cached features
    patience: PositiveInt | None = None  # stop after so many epochs without a better one; null: never


@dataclass(config=SCHEMA, kw_only=True)
class ProbeConfig:
    """A probe of a frozen backbone."""

    task: Literal["probe"] = "probe"
    output: PathText  # folder
    seed: int = Field(default=0, ge=0, lt=2**32)
    cache: PathText | None = "runs/features"  # folder of features; null: read and augment the images in each epoch
    model: ProbeModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    augment: ProbeAugmentConfig = field(default_factory=ProbeAugmentConfig)
    head: ProbeHeadConfig = field(default_factory=ProbeHeadConfig)
    optim: ProbeOptimConfig = field(default_factory=ProbeOptimConfig)
    schedule: ProbeScheduleConfig = field(default_factory=ProbeScheduleConfig)
    train: ProbeTrainConfig = field(default_factory=ProbeTrainConfig)


# ---- detection


@dataclass(config=SCHEMA, kw_only=True)
class DetectModelConfig(DenseModelConfig):
    """Arguments of ``heads.build.build_detector``."""

    head: Literal[
        "mask_rcnn", "cascade_mask_rcnn", "faster_rcnn", "retinanet", "fcos", "mask2former", "conditional_detr"
    ] = "mask_rcnn"


@dataclass(config=SCHEMA, kw_only=True)
class DetectDataConfig(DenseDataConfig):
    """Annotations and the folders of their images."""

    kind: Literal["coco", "auto", "voc", "digits"] = "coco"
    # voc: image sets instead, such as VOC2007/trainval+VOC2012/trainval; images are not used
    train_annotations: PathText = "annotations/instances_train2017.json"
    train_images: PathText = "train2017"
    val_annotations: PathText = "annotations/instances_val2017.json"
    val_images: PathText = "val2017"
    classes: list[str] | None = None  # auto: names by label; other objects are left out; null: all that occur
    keep_empty: bool = False  # also train on images without objects
    min_size: PositiveInt = 800  # evaluation: size of the short side, ...
    max_size: PositiveInt = 1333  # ... unless the long side would exceed this


@dataclass(config=SCHEMA, kw_only=True)
class DetectAugmentConfig:
    """Augmentation in training."""

    hflip: Probability = 0.5
    vflip: Probability = 0.0
    min_size: list[PositiveInt] = _list(800)  # sizes of the short side
    sampling: Literal["choice", "range"] = "choice"  # choose one of min_size, or from a range of two
    max_size: PositiveInt = 1333  # limit of the long side
    crop_prob: Probability = 0.0  # probability of resizing, cropping and resizing again (as in DETR)
    crop_min_size: list[PositiveInt] = _list(400, 500, 600)  # sizes of the short side before the crop
    crop_size: IntPair = _list(384, 600)  # minimum and maximum side of the crop
    final_crop_size: IntPair | None = None  # height, width, at a random position; null: no crop
    scale_jitter: FloatPair | None = None  # range of scales relative to final_crop_size; replaces min_size
    photometric: bool = False  # brightness, contrast, saturation, hue


@dataclass(config=SCHEMA, kw_only=True)
class DetectEvalConfig:
    # detections per image, of the model and in the metrics; null: COCO's 100, or the limit in model.head_kwargs
    max_detections: PositiveInt | None = None


@dataclass(config=SCHEMA, kw_only=True)
class DetectConfig(RunConfig):
    """A detection recipe."""

    task: Literal["detect"] = "detect"
    model: DetectModelConfig
    data: DetectDataConfig = field(default_factory=DetectDataConfig)
    augment: DetectAugmentConfig = field(default_factory=DetectAugmentConfig)
    eval: DetectEvalConfig = field(default_factory=DetectEvalConfig)
    optim: DenseOptimConfig = field(default_factory=DenseOptimConfig)


# ---- segmentation


@dataclass(config=SCHEMA, kw_only=True)
class SegmentModelConfig(DenseModelConfig):
    """Arguments of ``heads.build.build_segmenter``."""

    head: Literal["upernet", "semantic_fpn", "linear", "mask2former"] = "upernet"
    segmenter: PathText | None = None  # weights of the whole model: a run or model folder, or a file with mmseg's names
    auxiliary: bool = True  # upernet: an FCN head on the third feature map, in training only
    size_divisor: PositiveInt = 32  # pad images to multiples of this
    auxiliary_kwargs: dict[str, Any] = field(default_factory=dict)  # of heads.segmentation.FCN


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
    """Images and masks; for the layouts, see ``train/data/masks.py``."""

    kind: Literal["folder", "auto", "ade20k", "cityscapes", "voc", "digits"] = "folder"
    images: PathText = "images/{split}"  # folder: folder of images; {split} is the split's name
    # folder: files of the same names, perhaps with an ending such as _mask or _L; null: evaluate images without masks
    masks: PathText | None = "masks/{split}"
    classes: list[str] | None = None  # names by label; required by folder
    reduce_zero_label: bool = False  # folder: 0 is ignored, 1 is the first class (ade20k: always)
    # mask value or colour ('#8000ff' or [128, 0, 255]) -> class; null: ignored; `other`: all that are not named
    values: dict[MaskValue, str | None] | None = None
    ignore_label: int = Field(default=255, ge=0, le=255)  # mask value to ignore, unless in `values`
    antialias: bool = True  # when downsizing; false: as OpenCV, which the published recipes used


@dataclass(config=SCHEMA, kw_only=True)
class SegmentAugmentConfig:
    """Augmentation in training: random resize, crop, flip, colour."""

    scale: IntPair | None = None  # long and short side to fit into; null: the image's own
    ratio_range: FloatPair = _list(0.5, 2.0)  # random factor of the size
    crop_size: IntPair = _list(512, 512)  # height, width
    cat_max_ratio: float = Field(default=0.75, gt=0, le=1)  # maximum fraction of one class in a crop
    hflip: Probability = 0.5
    photometric: bool = True  # brightness, contrast, saturation, hue


@dataclass(config=SCHEMA, kw_only=True)
class SegmentLossConfig:
    auxiliary: NonNegativeFloat = 0.4  # weight of the auxiliary head's cross-entropy
    class_weights: list[NonNegativeFloat] | None = None  # by class; the mean is still over the number of pixels
    focal_gamma: NonNegativeFloat = 0.0  # above 0: focal loss (arXiv 1708.02002)
    ignored_in_mean: bool = False  # mean over all pixels, as in mmseg, not only over those with a class


@dataclass(config=SCHEMA, kw_only=True)
class SegmentEvalConfig:
    """Model input in evaluation; outputs are resized to the size of the image."""

    mode: Literal["whole", "slide"] = "whole"
    crop_size: IntPair | None = None  # slide: height, width; null: the training crop
    stride: IntPair | None = None  # slide; null: two thirds of crop_size
    scale: IntPair | None = None  # long and short side to fit into; null: the image's own
    size_divisor: PositiveInt = 1  # round resized sides up to multiples of this
    ratios: list[PositiveFloat] = _list(1.0)  # average over these scales, ...
    flip: bool = False  # ... and over mirrored images


@dataclass(config=SCHEMA, kw_only=True)
class SegmentConfig(RunConfig):
    """A segmentation recipe."""

    task: Literal["segment"] = "segment"
    model: SegmentModelConfig
    data: SegmentDataConfig = field(default_factory=SegmentDataConfig)
    augment: SegmentAugmentConfig = field(default_factory=SegmentAugmentConfig)
    loss: SegmentLossConfig = field(default_factory=SegmentLossConfig)
    eval: SegmentEvalConfig = field(default_factory=SegmentEvalConfig)
    optim: DenseOptimConfig = field(default_factory=DenseOptimConfig)


# ---- upsamplers


@dataclass(config=SCHEMA, kw_only=True)
class UpsampleModelConfig:
    """A backbone that stays as it is, and the map of it for which UPLiFT is trained."""

    name: str  # any timm model with features_only
    pretrained: bool = False  # published weights, by the name's tag; this or checkpoint is needed
    checkpoint: PathText | None = None  # weights: a file, a timm folder or a run folder
    stride: PositiveInt | None = None  # of the map; null: the coarsest up to 32
    sync_bn: bool = False  # synchronize batch norms over all processes
    kwargs: dict[str, Any] = field(default_factory=dict)  # more arguments of the backbone


@dataclass(config=SCHEMA, kw_only=True)
class UpsampleDataConfig(ImagesConfig):
    """Images without annotations: all below ``root/SPLIT``. ``digits`` are generated composites."""

    kind: Literal["folder", "digits"] = "folder"
    train_split: str = "train"
    val_split: str = "val"
    image_size: PositiveInt = 448  # images are resized to this side, whatever their aspect ratio
    digits_train: PositiveInt = 400  # digits: number of composites
    digits_val: PositiveInt = 100
    digits_size: int = Field(default=128, ge=32)  # digits: side of the composites in pixels


@dataclass(config=SCHEMA, kw_only=True)
class UpsampleLossConfig:
    levels: PositiveInt = 3  # how often images are halved


@dataclass(config=SCHEMA, kw_only=True)
class UpsampleConfig(RunConfig):
    """A recipe for an upsampler."""

    task: Literal["upsample"] = "upsample"
    model: UpsampleModelConfig
    data: UpsampleDataConfig = field(default_factory=UpsampleDataConfig)
    loss: UpsampleLossConfig = field(default_factory=UpsampleLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


SCHEMAS = {
    "classify": ClassifyConfig,
    "detect": DetectConfig,
    "segment": SegmentConfig,
    "upsample": UpsampleConfig,
}

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
    """The file of a recipe, given by path or shipped name: ``classify/digits``, or ``digits`` with ``task``.

    Raises:
        ConfigError: not found or ambiguous; the message gives the nearest recipes.
    """
    path = Path(config)
    if path.is_file():
        return path
    name = str(config).removesuffix(".yaml")
    by_name: dict[str, list[str]] = {}  # with and without the folder
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
    hint = f"did you mean {', '.join(near)}?" if near else f"shipped: {', '.join(n for n in by_name if '/' in n)}"
    raise ConfigError(f"no file and no shipped recipe {str(config)!r}; {hint}")


def recipe_task(config: str | Path) -> str:
    """The task of a recipe: its ``task`` key, else the folder of it or its base in the shipped recipes, else
    ``classify``.

    Raises:
        ConfigError: not found, or ambiguous.
    """
    layers = _read(find_config(config), object)
    keys = {key: value for _, layer in layers for key, value in layer.items()}
    folders = (Path(file).parent.name for file, _ in reversed(layers))
    return next((task for task in (keys.get("task"), *folders) if task in SCHEMAS), "classify")


# ---- reading recipes


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number and 2024-05-01 as text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as another type."""


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
    """The type of a dotted key; Any for unknown keys."""
    for part in key.split("."):
        known = {f.name: f.type for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else {}
        schema = known.get(part, Any)
    return schema


def _check_comment(node: Any) -> None:
    """Refuses unquoted text followed by `` #2``, which YAML takes for a comment."""
    if node.style is not None or node.end_mark is None or node.end_mark.buffer is None:
        return
    end = node.end_mark
    rest = re.match(r" #[^\s#].*", end.buffer[end.pointer :])
    if rest is not None:
        problem = f"{node.value!r} is followed by {rest[0]!r}: quote the text, or begin a comment with '# '"
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=end)


def _key(node: Any) -> str:
    """The text of a key; of a list, such as the colour ``[128, 0, 255]``, with commas."""
    return ",".join(map(_key, node.value)) if isinstance(node, yaml.SequenceNode) else str(node.value)


def _construct(loader: _Loader, node: yaml.Node, kind: Any) -> Any:
    """The value of a YAML node; its literal text if ``kind`` is text."""
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
    """The layers of a file, bases first, each with its file name for errors."""
    path = path.resolve()
    if path in including:
        chain = " -> ".join(p.name for p in (*including, path))
        raise ConfigError(f"circular `base`: {chain}")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        layer = {} if node is None else _construct(loader, node, schema)
    except FileNotFoundError:
        raise ConfigError(f"{including[-1]}: base file {path} does not exist") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read as YAML: {error}") from None
    if not isinstance(layer, dict):
        raise ConfigError(f"{path} contains a {type(layer).__name__}, not a mapping")
    bases = layer.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: `base` must be a file name or a list of file names, not {bases!r}")
    layers = []
    for base in bases:
        layers += _read(_find_base(path, base, schema), schema, (*including, path))
    return [*layers, (str(path), layer)]


def _find_base(recipe: Path, base: str, schema: type) -> Path:
    """A base: a file relative to the recipe, or a shipped recipe (``care_s0``, ``detect/finetune``)."""
    beside = recipe.parent / base
    if beside.is_file() or beside.suffix:
        return beside  # if missing, the reader raises
    return find_config(base, None if "/" in base else _task(schema))


def _task(schema: Any) -> str | None:
    fields: Any = dataclasses.fields(schema) if dataclasses.is_dataclass(schema) else ()
    return next((f.default for f in fields if f.name == "task"), None)


def _override_layer(override: str, schema: type) -> dict:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not key=value")
    kind = _field_type(schema, key)
    try:
        loader = _Loader(text)
        if any(each is str for each in _alternatives(kind)):  # literal text; enclosing quotes are removed
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
    """The path given last for ``key`` on the command line, or None."""
    values = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == key]
    return expand_path(values[-1]) if values else None


def _rename_old_keys(layer: Mapping, schema: type, source: str) -> dict:
    """A copy of the layer with the former keys of `OLD_KEYS` renamed."""
    valid, layer = set(_keys(schema)), dict(layer)
    for old, new in OLD_KEYS.items():
        section, key, new_key = old.split(".")[0], old.split(".")[1], new.split(".")[1]
        values = layer.get(section)
        if old in valid or new not in valid or not isinstance(values, Mapping) or key not in values:
            continue
        if new_key in values:
            raise ConfigError(f"{source}: `{old}` is the former name of `{new}`, but both are given")
        layer[section] = {new_key if name == key else name: value for name, value in values.items()}
        warnings.warn(f"{source}: `{old}` is now `{new}`", DeprecationWarning, stacklevel=4)
    return layer


def _merge(below: dict, above: Mapping, source: str, blame: dict[str, str], prefix: str = "") -> None:
    """Merges ``above`` into ``below``, and records the source of each key in ``blame``."""
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
    """A line for one of pydantic's errors."""
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
        path: a file, or the name of a shipped recipe; None: the schema's defaults.
        overrides: ``key=value`` pairs; values are YAML (``augment.scale=[0.5,1]``, ``model.checkpoint=null``), or
            literal for keys of type text (``data.root=/a #2``).
        schema: the dataclass.
        defaults: values with lower priority than the file's.

    Raises:
        ConfigError: a line per error, with the key, the file (or "command line"), the value and the nearest valid key.

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
    """Writes a configuration with all keys; `load_config` reads it back to the same values.

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
