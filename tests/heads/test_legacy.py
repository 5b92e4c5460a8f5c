"""Names, arguments and files of before the `Backbone` class, which keep working for one release."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from foveal.heads import build, segmentation
from foveal.heads.backbone import Backbone, ShapeSpec
from foveal.heads.build import build_backbone, build_detector, build_segmenter
from foveal.heads.checkpoint import load_dense, read_dense_config, save_dense
from foveal.heads.legacy import migrate_state_dict

# Runs that the state before wrote; tests/train/test_earlier_runs.py compares what their models find.
RUNS = Path(__file__).parents[1] / "data" / "runs_0.1.0"
IMAGE = torch.linspace(0, 1, 3 * 64 * 64).sin().abs().view(1, 3, 64, 64)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_folders_load_and_are_saved_under_todays_names(task, tmp_path):
    old = load_file(RUNS / task / "best" / "model.safetensors")
    with pytest.warns(DeprecationWarning, match=r"features\.network"):
        model = load_dense(RUNS / task)
    assert model.arguments["name"] == "test_foveal_dinat"
    save_dense(tmp_path, model, model.classes, model.config["preprocessing"])
    new = load_file(tmp_path / "model.safetensors")
    assert not any("features" in name or "network" in name for name in new)
    migrated = migrate_state_dict(old)
    assert migrated.keys() == new.keys()
    assert all(torch.equal(new[name], tensor) for name, tensor in migrated.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        again = load_dense(tmp_path)
    assert all(torch.equal(tensor, new[name]) for name, tensor in again.state_dict().items() if name in new)


def test_config_gets_todays_names():
    _, config = read_dense_config(RUNS / "segment")
    assert config["arguments"]["name"] == "test_foveal_dinat"
    assert "backbone" not in config["arguments"]
    assert set(config["preprocessing"]["inference"]) <= set(inspect.signature(segmentation.probabilities).parameters)


def test_state_dicts_load_under_any_prefix():
    """As a wrapper loads a run's checkpoint."""
    state = load_file(RUNS / "segment" / "best" / "model.safetensors")
    model = load_dense(RUNS / "segment")
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.warns(DeprecationWarning, match=r"module\.features\.network"):
        nn.ModuleDict({"module": model}).load_state_dict({f"module.{name}": tensor for name, tensor in state.items()})
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in migrate_state_dict(state).items())


def test_arguments_and_moved_names():
    with pytest.warns(DeprecationWarning, match="backbone.*name"):
        model = build_detector(backbone="test_foveal_nat", head="fcos", num_classes=2)
    assert model.arguments["name"] == "test_foveal_nat"
    for name in ("load_dense", "read_dense_config", "save_dense", "reparameterize"):
        with pytest.warns(DeprecationWarning, match=f"build.{name}.*checkpoint"):
            assert callable(getattr(build, name))
    with pytest.warns(DeprecationWarning, match="slide.*slide_inference"):
        assert segmentation.slide is segmentation.slide_inference
    with pytest.warns(DeprecationWarning, match="fitted"):
        assert segmentation.fitted((375, 500), (2048, 512)) == (512, 683)
    with pytest.warns(DeprecationWarning, match="bounds.*scale"):
        segmentation.probabilities(nn.Identity(), IMAGE, bounds=(64, 32))
    with pytest.warns(DeprecationWarning, match="FeatureSpec"):
        from foveal.heads.features import FeatureSpec
    assert FeatureSpec is ShapeSpec
    with pytest.raises(AttributeError, match="nothing"):
        getattr(build, "nothing")  # noqa: B009


def test_build_features_gives_a_list():
    with pytest.warns(DeprecationWarning, match="build_features"):
        features = build.build_features("test_foveal_nat", frozen_stages=1)
    assert isinstance(features, Backbone)
    features.eval().load_state_dict(build_backbone("test_foveal_nat").state_dict())
    maps = features(IMAGE)
    assert isinstance(maps, list)
    for ours, own in zip(maps, features.network(IMAGE), strict=True):
        assert torch.equal(ours, own)


def test_segmenters_take_the_old_argument():
    with pytest.warns(DeprecationWarning, match="backbone.*name"):
        assert build_segmenter(backbone="test_foveal_nat", num_classes=2).arguments["name"] == "test_foveal_nat"
