"""Every shipped recipe is valid, says what it claims, and its model can be made."""

import re

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

import foveal
from foveal.configs.schema import RECIPES, DetectConfig, SegmentConfig, load_config, recipe_names
from foveal.heads.necks import NECKS
from foveal.train import detect, segment
from foveal.train.data.semantic import find_classes
from foveal.train.engine import create_schedule

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
