"""The strict loader: what it merges, and what it says when something is wrong."""

import dataclasses
from pathlib import Path

import pytest

from foveal.configs.schema import (
    ClassifyConfig,
    ConfigError,
    find_config,
    load_config,
    override_value,
    recipe_names,
    save_config,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.yaml", "model: {name: test_vit}\naugment: {scale: [0.5, 1.0]}\noptim: {lr: 0.1}\n")


def test_file_then_command_line(recipe):
    config = load_config(recipe, ["optim.lr=1e-2", "model.kwargs.depth=3", "augment.ratio=[1,1]"])
    assert (config.optim.lr, config.augment.scale, config.augment.ratio) == (0.01, [0.5, 1.0], [1.0, 1.0])
    assert config.model.kwargs == {"depth": 3}
    assert config.output == "runs/mine"


def test_bases_merge_and_lists_replace(tmp_path, recipe):
    write(tmp_path / "more.yaml", "base: mine.yaml\nmodel: {kwargs: {a: [1, 2, 3]}}\noptim: {weight_decay: 0.5}\n")
    child = write(tmp_path / "child.yaml", "base: [more.yaml]\nmodel: {kwargs: {a: [7], b: 1}}\nseed: 4\n")
    config = load_config(child)
    assert config.model.kwargs == {"a": [7], "b": 1}
    assert (config.optim.lr, config.optim.weight_decay, config.seed) == (0.1, 0.5, 4)


def test_loads_share_nothing(recipe):
    first = load_config(recipe)
    first.augment.scale.append(9.0)
    first.model.kwargs["x"] = 1
    second = load_config(recipe)
    assert second.augment.scale == [0.5, 1.0]
    assert second.model.kwargs == {}
    assert load_config(None, ["output=o", "model.name=m"]).augment.scale == [0.08, 1.0]


def test_cycle_of_bases(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_missing_base(tmp_path):
    file = write(tmp_path / "a.yaml", "base: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: base file .*gone\.yaml does not exist"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {learning_rate: 1}", r"bad\.yaml: unknown key `optim\.learning_rate`"),
        (
            "optim: {wieght_decay: 1}",
            r"bad\.yaml: unknown key `optim\.wieght_decay`; did you mean `optim\.weight_decay`",
        ),
        ("optimizer: {lr: 1}", r"unknown key `optimizer`; did you mean `optim`"),
        ("batch_size: 4", r"unknown key `batch_size`; did you mean `train\.(val_)?batch_size`"),
        ("optim: {lr: fast}", r"bad\.yaml: `optim\.lr` has a wrong value: .*fast"),
        ("optim: 3", r"bad\.yaml: `optim` is a section"),
        (
            "model: {name: m}\ndata: {kind: foldr}",
            r"bad\.yaml: `data\.kind` is 'foldr', must be one of .*did you mean 'folder'",
        ),
        ("model: {name: m}\ntrain: {batch_size: 0}", r"bad\.yaml: `train\.batch_size` is 0, must be at least 1"),
        ("model: {name: [}", r"bad\.yaml can't be read as YAML"),
        ("- a\n- b", r"bad\.yaml holds a list"),
        ("base: 3", r"bad\.yaml: `base` must be a file name"),
        ("seed: 1", r"no value for `model\.name`"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        load_config(write(tmp_path / "bad.yaml", text))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lrr=1", r"command line: unknown key `optim\.lrr`; did you mean `optim\.lr`"),
        ("optim.lr=x", r"command line: `optim\.lr` has a wrong value"),
        ("seed", r"command line: 'seed' is not of the form key=value"),
        ("seed=-1", r"command line: `seed` is -1, must be at least 0"),
        ("model.kwargs=3", r"command line: `model\.kwargs` has a wrong value"),
    ],
)
def test_what_is_wrong_on_the_command_line(recipe, override, says):
    with pytest.raises(ConfigError, match=says):
        load_config(recipe, [override])


def test_saved_configuration_reads_back_equal(tmp_path, recipe):
    config = load_config(recipe, ["model.kwargs.dilations=[[1,2],[1]]", "output=x"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_short_names():
    assert find_config("digits", "classify") == find_config("classify/digits") == find_config("classify/digits.yaml")
    assert find_config("digits", "detect") == find_config("detect/digits")
    assert find_config("fashion_mnist") == find_config("classify/fashion_mnist")
    with pytest.raises(ConfigError, match=r"ambiguous: classify/digits, detect/digits, segment/digits"):
        find_config("digits")
    assert "classify/digits" in recipe_names()
    assert not any(name.startswith("_") for name in recipe_names())
    with pytest.raises(ConfigError, match=r"did you mean .*classify/digits"):
        find_config("digts")
    with pytest.raises(ConfigError, match=r"did you mean segment/digits\?"):
        find_config("digts", "segment")


def test_override_value():
    assert override_value(["a=1", "output=x=y", "output=z"], "output") == "z"
    assert override_value(["a=1"], "output") is None


def test_every_default_is_of_its_type():
    config = load_config(None, ["output=o", "model.name=m"])
    assert isinstance(config, ClassifyConfig)
    for section in dataclasses.fields(config):
        assert hasattr(config, section.name)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("augment.hflip=7", "`augment.hflip` is 7.0, must be at least 0 and at most 1"),
        ("loss.smoothing=1.5", "must be at least 0 and below 1"),
        ("optim.lr=.inf", "must be a finite number"),
        ("optim.lr=0", "must be above 0"),
        ("optim.clip_grad=0", "must be above 0"),
        ("optim.betas=[0.9]", "must have 2 items"),
        ("optim.betas=[0.9, 1.0]", "must be at least 0 and below 1"),
        ("model.drop_path_rate=2", "must be at least 0 and below 1"),
        ("train.ema_decay=1.5", "must be at least 0 and below 1"),
        ("data.std=[0.0]", "must be above 0"),
        ("seed=5000000000", "must be at least 0 and below"),
    ],
)
def test_values_out_of_range(override, says):
    with pytest.raises(ConfigError) as raised:
        load_config("digits", [override])
    assert says in str(raised.value)
    assert str(raised.value).startswith("command line: `" + override.split("=")[0])
