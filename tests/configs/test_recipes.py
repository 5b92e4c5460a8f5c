"""Every shipped recipe is valid, says what it claims, and its model can be made."""

import re

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

import foveal
from foveal.configs.schema import RECIPES, load_config, recipe_names

IMAGENET = [n for n in foveal.list_models() if not n.startswith("test_")]


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_builds(name):
    config = load_config(name)
    with torch.device("meta"):
        rates = {} if config.model.drop_path_rate is None else {"drop_path_rate": config.model.drop_path_rate}
        model = timm.create_model(
            config.model.name, num_classes=10, in_chans=config.data.in_chans, **rates, **config.model.kwargs
        )
    assert sum(p.numel() for p in model.parameters()) > 0


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
