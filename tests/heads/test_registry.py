"""The registry of heads, and who reads it."""

from typing import get_args, get_type_hints

import pytest

from foveal.configs import schema
from foveal.heads.build import build_detector, build_segmenter
from foveal.heads.necks import NECKS
from foveal.heads.registry import HEADS, head_spec

MODELS = {"detect": schema.DetectModelConfig, "segment": schema.SegmentModelConfig}
BUILDERS = {"detect": build_detector, "segment": build_segmenter}


def choices(config: type, key: str) -> tuple[str, ...]:
    return get_args(get_type_hints(config)[key])


@pytest.mark.parametrize("task", HEADS)
def test_recipes_choose_among_them(task):
    assert choices(MODELS[task], "head") == tuple(HEADS[task])
    assert choices(MODELS[task], "neck") == tuple(NECKS)
    assert all((spec.task, spec.name) == (task, name) for name, spec in HEADS[task].items())


def test_an_unknown_head_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"yolo.*segment.*upernet, semantic_fpn, mask2former"):
        head_spec("segment", "yolo")


@pytest.mark.parametrize("task", HEADS)
def test_the_builders_take_a_recipe_s_model(task):
    config = MODELS[task](name="test_foveal_nat", frozen_stages=1, kwargs={"kernel_size": 5}, drop_path_rate=0.1)
    model = BUILDERS[task](**vars(config), num_classes=3)
    assert model.arguments["kernel_size"] == 5
    assert model.task == task
    assert not next(model.backbone.body.parameters()).requires_grad
    assert BUILDERS[task](**model.arguments).arguments == model.arguments
