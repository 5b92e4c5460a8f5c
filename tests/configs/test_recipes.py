"""Every shipped recipe is valid, says what it claims, and its model can be made."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from timm.models import get_pretrained_cfg

import foveal
from foveal.configs.schema import RECIPES, DetectConfig, SegmentConfig, load_config, recipe_names
from foveal.heads.necks import NECKS
from foveal.train import classify, data, detect, segment
from foveal.train.data.coco import DetectBatch
from foveal.train.data.semantic import Batch as SegmentBatch
from foveal.train.data.semantic import find_classes
from foveal.train.engine import create_optimizer, create_schedule

IMAGENET = [n for n in foveal.list_models() if not n.startswith("test_")]


def of(task: str) -> list[str]:
    return [name for name in recipe_names() if name.startswith(f"{task}/")]


@pytest.mark.parametrize("name", of("classify"))
def test_recipe_builds(name):
    config = load_config(name)
    with torch.device("meta"):
        rates = {} if config.model.drop_path_rate is None else {"drop_path_rate": config.model.drop_path_rate}
        model = timm.create_model(
            config.model.name, num_classes=10, in_chans=config.data.in_chans, **rates, **config.model.kwargs
        )
    assert sum(p.numel() for p in model.parameters()) > 0


FURTHER = (pytest.mark.slow, pytest.mark.long)
ONE_OF_EACH = (
    *("care_s0", "halo_h0", "maxvit_tiny_224", "overlock_xt", "ascan_tiny", "dinat_mini", "dinat_large_384", "digits"),
    *("nat_mini_upernet_ade20k", "nat_mini_mask_rcnn_3x"),
)


def one_each(task: str) -> list:
    """The recipes of a task; those of further models of a family take minutes together."""
    pairs = [(name, name.split("/")[1]) for name in of(task)]
    return [pytest.param(n, marks=[] if short in ONE_OF_EACH else FURTHER, id=short) for n, short in pairs]


@pytest.fixture
def images(tmp_path) -> Path:
    """Two classes with one image each, to train on and to evaluate."""
    for split in ("train", "val"):
        for name, colour in (("blue", (20, 40, 200)), ("red", (200, 40, 20))):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (80, 64), colour).save(tmp_path / split / name / "image.png")
    return tmp_path


def update(model: torch.nn.Module, loss: torch.Tensor, config, updates: int = 10) -> None:
    """The rest of a step: gradients of every parameter that learns, the recipe's optimizer and schedule."""
    assert loss.shape == ()
    optimizer = create_optimizer(model, config.optim, config.train.batch_size)
    schedule, _ = create_schedule(optimizer, config.schedule, updates)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    if config.optim.clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
    optimizer.step()
    schedule.step_update(1)


@pytest.mark.parametrize("name", one_each("classify"))
def test_classifier_steps(name, images):
    """Two images through the recipe's own loader and augmentation; the model at full size, on the meta device, where a
    step has shapes and no values."""
    options = ["train.batch_size=2", "train.val_batch_size=2", "data.workers=0", "model.pretrained=false"]
    config = load_config(name, [*options, "model.checkpoint=null"])
    if config.data.kind != "digits":
        config.data.kind, config.data.root, config.data.classes = "folder", str(images), None
    classes = data.find_classes(config.data)
    with torch.device("meta"):
        model = classify.build_model(config.model, len(classes), config.data.in_chans)
    loaders = data.build_data(config, classes, model.pretrained_cfg, device=torch.device("cpu"))
    classify.prepare_heads(model, config)
    outputs = model.num_classes
    teacher = None if config.distill.teacher is None else lambda x: x.new_zeros(len(x), outputs)
    task = classify.Task(config, model, classes, loaders, teacher)
    batch = next(loaders.train.epoch(0))
    side = config.data.image_size or model.pretrained_cfg["input_size"][-1]
    assert batch.images.shape == (2, config.data.in_chans, side, side)
    model.train()
    with torch.device("meta"):
        loss = task.train_step(model, type(batch)(*(part.to("meta") for part in batch)), 0)
    update(model, loss, config)


@pytest.mark.parametrize("name", one_each("segment"))
def test_segmenter_steps(name):
    """Two crops of the recipe's size on the meta device; Mask2Former, which matches by values, small on the CPU."""
    config = load_config(name, ["train.batch_size=2", "model.pretrained=false", "model.checkpoint=null"], SegmentConfig)
    small = config.model.head == "mask2former"
    if small:
        config.model.name, config.model.kwargs, config.augment.crop = "test_foveal_dinat", {}, [64, 64]
    classes = find_classes(config.data)
    device = torch.device("cpu" if small else "meta")
    with device:
        model = segment.build_model(config, len(classes)).train()
        task = segment.Task(config, model, classes, SimpleNamespace(val=None, notes=[]))
        images = torch.zeros(2, config.data.in_chans, *config.augment.crop)
        loss = task.train_step(model, SegmentBatch(images, torch.zeros(2, *config.augment.crop).long()), 0)
    update(model, loss, config, config.train.steps_per_epoch or 10)


@pytest.mark.parametrize("name", one_each("detect"))
def test_detector_steps(name):
    """Two small images with an object each; the detector at full size."""
    options = ["train.batch_size=2", "model.pretrained=false", "model.checkpoint=null", "data.short_side=64"]
    config = load_config(name, [*options, "data.max_size=96"], DetectConfig)
    model = detect.build_model(config, 20).train()
    task = detect.Task(config, model, SimpleNamespace(categories={i: str(i) for i in range(20)}, notes=[]))
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 8:40, 16:56] = 1
    target = {"boxes": torch.tensor([[16.0, 8, 56, 40]]), "labels": torch.tensor([3]), "masks": mask}
    images = [torch.rand(config.data.in_chans, 64, 64) for _ in range(2)]
    loss = task.train_step(model, DetectBatch(images, [target, dict(target)], [0, 1]), 0)
    assert loss.isfinite()
    update(model, loss, config)


@pytest.mark.parametrize("name", of("detect"))
def test_detector_builds(name):
    """With what the schedule takes from the data filled in: its milestones fall on whole epochs."""
    config = load_config(name, ["model.pretrained=false"], DetectConfig)
    with torch.device("meta"):
        model = detect.build_model(config, 80)
    assert (model.num_classes, model.masks) == (80, config.model.head == "mask_rcnn")
    assert isinstance(model.pyramid.neck, NECKS[config.model.neck])
    for part in config.schedule.milestones:
        epochs = part * config.schedule.epochs
        assert epochs == pytest.approx(round(epochs), abs=1e-6)


def test_published_detection_schedules():
    images = 117_266  # of train2017, with an object
    for name, epochs, steps, lr, amp in (
        ("dinat_tiny_mask_rcnn_3x", 36, [27, 33], 1e-4, "fp16"),
        ("overlock_t_mask_rcnn_1x", 12, [8, 11], 2e-4, "no"),
        ("overlock_b_mask_rcnn_3x", 36, [27, 33], 1e-4, "no"),
        ("resnet50_a3fpn_mask_rcnn_3x", 40, [27, 35], 2e-2, "no"),
    ):
        config = load_config(f"detect/{name}", [], DetectConfig)
        assert (config.schedule.epochs, config.optim.lr, config.train.amp) == (epochs, lr, amp)
        assert [round(part * epochs) for part in config.schedule.milestones] == steps
        assert config.train.batch_size * 8 == config.optim.lr_batch == 16
        warmup = config.schedule.warmup_fraction * epochs * (images // 16)
        assert warmup == pytest.approx(1500 if "a3fpn" in name else 500, abs=5)
    for name, updates, steps in (
        ("resnet50_a3fpn_mask_rcnn_270k", 270_000, [210_000, 250_000]),
        ("resnet50_a3fpn_faster_rcnn_90k", 90_000, [60_000, 80_000]),
    ):
        config = load_config(f"detect/{name}", [], DetectConfig)
        assert config.schedule.epochs * config.train.steps_per_epoch == updates
        assert [round(part * updates) for part in config.schedule.milestones] == steps
        assert round(config.schedule.warmup_fraction * updates) == 1000
        assert (config.optim.lr, config.train.batch_size * 8) == (0.02, 16)
    detr = load_config("detect/dinat_mini_mask_rcnn_3x", [], DetectConfig).augment
    assert detr.short_sides == list(range(480, 801, 32))
    assert (detr.max_size, detr.crop_prob, detr.crop_short_sides, detr.crop) == (1333, 0.5, [400, 500, 600], [384, 600])


@pytest.mark.parametrize("name", of("segment"))
def test_segmenter_builds(name):
    config = load_config(name, ["model.pretrained=false"], SegmentConfig)
    classes = len(find_classes(config.data))
    with torch.device("meta"):
        model = segment.build_model(config, classes)
    if config.model.head == "mask2former":
        assert model.head.class_predictor.out_features == classes + 1
        return
    assert model.head.classifier.conv.out_channels == classes
    assert (model.auxiliary is not None) == (config.model.head == "upernet")
    assert isinstance(model.head.neck, NECKS["a3fpn"]) == (config.model.neck == "a3fpn")


@pytest.mark.parametrize(
    ("name", "updates", "warmup", "power", "batch", "peak", "end"),
    [
        *(
            (f"{backbone}_upernet_ade20k", 160_000, 1500, 1.0, 16, 6e-5, 0.0)
            for backbone in ("nat_mini", "dinat_base", "dinat_s_tiny", "overlock_s", "dinat_large")
        ),
        ("resnet50_a3fpn_upernet_cityscapes", 80_000, 4000, 2.0, 8, 5e-3, 1e-4),
    ],
)
def test_published_segmentation_schedules(name, updates, warmup, power, batch, peak, end):
    config = load_config(f"segment/{name}", [], SegmentConfig)
    processes = 4 if "cityscapes" in name else 8
    assert config.train.batch_size * processes == batch
    optimizer = torch.optim.SGD(
        torch.nn.Linear(1, 1).parameters(), config.optim.lr * batch / (config.optim.lr_batch or batch)
    )
    steps = config.train.steps_per_epoch
    schedule, epochs = create_schedule(optimizer, config.schedule, steps)
    assert epochs * steps == updates

    def rate(update: int) -> float:
        schedule.step_update(update)
        return optimizer.param_groups[0]["lr"]

    assert rate(0) == pytest.approx(1e-6 * peak)
    assert rate(warmup // 2) == pytest.approx(peak / 2, rel=1e-3)
    middle = (updates + warmup) // 2
    assert rate(middle) == pytest.approx(end + (peak - end) * (1 - middle / updates) ** power, rel=1e-3)
    assert rate(updates) == pytest.approx(end)


def test_published_dilations_fit_the_depths():
    for size, deep in (("mini", 6), ("tiny", 18), ("small", 18), ("base", 18), ("large", 18)):
        config = load_config(f"segment/dinat_{size}_upernet_ade20k", [], SegmentConfig)
        assert [len(level) for level in config.model.kwargs["dilations"]] == [3, 4, deep, 5]
        stride, side = 4, config.augment.crop[0]
        for level in config.model.kwargs["dilations"]:
            assert 7 * max(level) <= side // stride  # no padding of the crop's maps
            stride *= 2


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_states_its_claim(name):
    head = re.match(r"(#.*\n)+", (RECIPES / f"{name}.yaml").read_text()).group()
    for label in ("Command:", "Hardware:", "Time:", "Score:", "Status:"):
        assert f"# {label}" in head, label
    status = re.search(r"# Status: +(.*)", head).group(1)
    assert re.match(r"measured|published figure; not run here|not run", status)
    assert name.split("/")[1] in re.search(r"# Command: +(.*)", head).group(1)


@pytest.mark.parametrize("model", IMAGENET)
def test_every_model_has_its_imagenet_recipe(model):
    config = load_config(f"classify/{model}")
    assert config.model.name == model
    size = get_pretrained_cfg(model).input_size
    assert (config.data.kind, config.data.image_size) == ("folder", size[-1])
    if "nat" in model:
        assert config.train.batch_size * 8 == config.optim.lr_batch  # the published eight processes


def test_published_schedule():
    config = load_config("classify/dinat_tiny")
    epochs, lr = config.schedule.epochs, config.optim.lr
    assert round(config.schedule.warmup_fraction * epochs, 4) == 20
    assert round(config.schedule.cooldown_fraction * epochs, 4) == 10
    assert config.schedule.warmup_lr_ratio * lr == pytest.approx(1e-6)
    assert config.schedule.min_lr_ratio * lr == pytest.approx(5e-6)
    tuned = load_config("classify/dinat_large_384")
    assert (tuned.schedule.epochs, tuned.optim.lr, tuned.optim.weight_decay) == (30, 5e-5, 1e-10)
    assert (tuned.augment.mixup, tuned.augment.cutmix, tuned.train.amp) == (0.0, 0.0, "no")
