"""The strict loader: what it merges, and what it says when something is wrong."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from foveal.configs.schema import (
    OLD_KEYS,
    SCHEMAS,
    ClassifyConfig,
    ConfigError,
    DetectConfig,
    SegmentConfig,
    find_config,
    load_config,
    override_value,
    recipe_names,
    recipe_task,
    save_config,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.yaml", "model: {name: test_vit}\naugment: {scale: [0.5, 1.0]}\noptim: {lr: 0.1}\n")


def valid_keys(schema: type, prefix: str = "") -> set[str]:
    found = set()
    for f in dataclasses.fields(schema):
        found |= valid_keys(f.type, f"{prefix}{f.name}.") if dataclasses.is_dataclass(f.type) else {prefix + f.name}
    return found


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
    with pytest.raises(ConfigError, match=r"a\.yaml -> b\.yaml -> a\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_a_base_by_the_name_of_a_shipped_recipe(tmp_path):
    file = write(tmp_path / "a.yaml", "base: care_s0\nseed: 3\n")
    config = load_config(file)
    assert (config.model.name, config.seed) == ("care_s0", 3)
    assert recipe_task(write(tmp_path / "b.yaml", "base: detect/finetune\n")) == "detect"
    write(tmp_path / "care_s0", "model: {name: mine}\n")  # a file comes first
    assert load_config(file).model.name == "mine"
    with pytest.raises(ConfigError, match=r"care_s7.*care_s0"):
        load_config(write(tmp_path / "c.yaml", "base: care_s7\n"))


def test_missing_base(tmp_path):
    file = write(tmp_path / "a.yaml", "base: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml.*gone\.yaml"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim: {learning_rate: 1}", r"bad\.yaml: .*`optim\.learning_rate`"),
        ("optim: {wieght_decay: 1}", r"bad\.yaml: .*`optim\.wieght_decay`.*`optim\.weight_decay`"),
        ("optimizer: {lr: 1}", r"`optimizer`.*`optim`"),
        ("batch_size: 4", r"`batch_size`.*`train\.(val_)?batch_size`"),
        ("1: 4", r"bad\.yaml: .*`1`"),
        ("optim: {lr: fast}", r"bad\.yaml: `optim\.lr` is 'fast'"),
        ("optim: 3", r"bad\.yaml: `optim` is 3"),
        ("optim:", r"bad\.yaml: `optim` is None"),
        ("data: {kind: foldr}", r"bad\.yaml: `data\.kind` is 'foldr'.*'wds'.*'folder'\?$"),
        ("train: {batch_size: 0}", r"bad\.yaml: `train\.batch_size` is 0.* 0$"),
        ("data: {classes: [a, [b]]}", r"bad\.yaml: `data\.classes\[1\]` is \['b'\]"),
        ("optim: {lr: 1, lr: 2}", r"(?s)bad\.yaml.*'lr'"),
        ("model: {kwargs: {a: 1, a: 2}}", r"(?s)bad\.yaml.*'a'"),
        ("model: {name: [}", r"bad\.yaml.*YAML"),
        ("model: &a [*a]", r"bad\.yaml.*YAML"),
        ("- a\n- b", r"bad\.yaml.* list"),
        ("base: 3", r"bad\.yaml: `base`.* 3"),
        ("seed: 1", r"bad\.yaml: .*`model\.name`"),
        ("model: {name: }", r"bad\.yaml: `model\.name` is None"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path, text, named):
    with pytest.raises(ConfigError) as raised:
        load_config(write(tmp_path / "bad.yaml", text))
    assert any(re.search(named, line) for line in [str(raised.value), *str(raised.value).splitlines()])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.lrr=1", r"`optim\.lrr`.*`optim\.lr`"),
        ("optim.lr=x", r"`optim\.lr` is 'x'"),
        ("optim.lr=[", r"optim\.lr=\["),
        ("seed", r"'seed'.* key=value"),
        ("seed=-1", r"`seed` is -1.* 0$"),
        ("model.kwargs=3", r"`model\.kwargs` is 3"),
        ("model.name=", r"`model\.name` is None"),
        ("optim=x", r"`optim` is 'x'"),
        ("optim..lr=1", r"'optim\.\.lr=1'"),
    ],
)
def test_what_is_wrong_on_the_command_line(recipe, override, named):
    with pytest.raises(ConfigError, match=f"^command line: .*{named}"):
        load_config(recipe, [override])


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    file = write(tmp_path / "bad.yaml", "optim: {lr: -1, lrr: 2}\ntrain: {batch_size: 2.5}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(file, ["seed=-1", "data.kind=x"])
    lines = str(raised.value).splitlines()
    for key, source in (
        *(("optim.lr", file), ("optim.lrr", file), ("train.batch_size", file), ("model.name", file)),
        *(("seed", "command line"), ("data.kind", "command line")),
    ):
        assert sum(re.match(f"{source}: [a-z ]*`{key}`", line) is not None for line in lines) == 1, key
    assert len(lines) == 6


def test_text_is_taken_as_it_stands(tmp_path):
    """Where a key is text YAML's types do not matter: no dates, numbers, booleans; on the command line no comments and
    no quotes either."""
    file = write(
        tmp_path / "mine.yaml",
        "model: {name: m, checkpoint: 1e5, kwargs: {rate: 1e-3, name: 2024-05-01, on: yes}}\noutput: 2024_05_01\n"
        "data: {classes: [no, yes, 007, null, 'null', ~], root: 2024-05-01, train_split: null, mean: null}\n"
        "train: {amp: no}\n",
    )
    config = load_config(file)
    assert (config.output, config.data.root, config.data.train_split) == ("2024_05_01", "2024-05-01", "null")
    assert (config.model.checkpoint, config.train.amp, config.data.mean) == ("1e5", "no", None)
    assert config.data.classes == ["no", "yes", "007", "null", "null", "~"]
    assert config.model.kwargs == {"rate": 1e-3, "name": "2024-05-01", "on": True}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.root=d/site #2", "d/site #2"),
        ("data.root=2024_05_01", "2024_05_01"),
        ("data.root= [a]: {b", " [a]: {b"),
        ("data.root='a #2'", "a #2"),
        ('data.root="null"', "null"),
        ("data.root='a' 'b'", "'a' 'b'"),
        ("data.root=a=b", "a=b"),
        ("data.root=None", "None"),
        ("data.root=null", None),
        ("data.root=", None),
        ("data.classes=[no, yes, 007, 1e3, 'a # b']", ["no", "yes", "007", "1e3", "a # b"]),
        ("data.classes=null", None),
        ("data.mean=[.5, 1e-1]", [0.5, 0.1]),
        ("data.val_split=val-{0000..0063}.tar|50000", "val-{0000..0063}.tar|50000"),
        ("data.in_chans=1_0", 10),
    ],
)
def test_overrides_are_read_by_the_type_of_their_key(recipe, override, value):
    config = load_config(recipe, [override])
    assert getattr(config.data, override.split("=")[0].removeprefix("data.")) == value


def text_keys(schema: type, prefix: str = "") -> dict[str, bool]:
    """The keys of a schema that take free text, and whether it is a list of it."""
    found = {}
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            found |= text_keys(f.type, f"{prefix}{f.name}.")
        elif not (f.name.endswith("kwargs") or "dict" in str(f.type)) and re.search(r"\bstr\b", str(f.type)):
            found[prefix + f.name] = "list" in str(f.type)
    return found


def get(config: typing.Any, key: str) -> typing.Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


TEXTS = [
    "d/site #2",
    "2024_05_01",
    "2024-05-01",
    "007",
    "0x1f",
    "1.10",
    "1e3",
    "1:30",
    "no",
    "True",
    "${FOVEAL_NONE}/x",
]
TEXTS += ["a: b", "[a", "{b}", "'q", "&a", "*a", "!t", "%d", "@x", "`x", "-", "a~", "$5", "ä ö"]


@pytest.mark.parametrize("task", SCHEMAS)
@pytest.mark.parametrize("text", TEXTS)
def test_every_text_key_takes_its_text(tmp_path, task, text):
    """On the command line as it is, in a file quoted or, where it is a plain scalar of YAML, as it is."""
    keys, schema = text_keys(SCHEMAS[task]), SCHEMAS[task]
    own = {"detect": "data.val_images", "upsample": "data.val_split"}.get(task, "data.classes")
    assert {"output", "data.root", own} <= set(keys)
    quoted = "'" + text.replace("'", "''") + "'"
    plain = not re.search(r"(^[\[{'&*!%@`-])|[:#]", text)
    for shown in (quoted, text) if plain else (quoted,):
        file = write(tmp_path / "text.yaml", "model: {name: m}\noutput: o\n")
        nested: dict = {}
        for key, many in keys.items():
            *sections, leaf = key.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = ["MARK"] if many else "MARK"
        config = load_config(write(file, yaml.safe_dump(nested).replace("MARK", shown)), (), schema)
        assert {key: get(config, key) for key in keys} == {key: [text] if many else text for key, many in keys.items()}
    given = load_config(None, [f"{key}=[{quoted}]" if many else f"{key}={text}" for key, many in keys.items()], schema)
    assert {key: get(given, key) for key in keys} == {key: get(config, key) for key in keys}
    save_config(given, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", (), schema) == given


def test_paths_of_home_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/disk #1")
    file = write(
        tmp_path / "a.yaml", "model: {name: '${HOME}'}\ndata: {root: ~/x, train_split: '${HOME}'}\noutput: ${DATA}/o\n"
    )
    config = load_config(file, ["model.checkpoint=${HOME}/${NONE}/w.pt", "data.exclude=$HOME"])
    assert (config.data.root, config.output, config.data.exclude) == ("/home/me/x", "/disk #1/o", "$HOME")
    assert config.model.checkpoint == "/home/me/${NONE}/w.pt"
    assert (config.model.name, config.data.train_split) == ("${HOME}", "${HOME}")  # no paths
    assert override_value(["output=~/a.json"], "output") == "/home/me/a.json"


def test_text_that_goes_on_as_a_comment_is_refused(tmp_path):
    model = "model: {name: m}\n"
    with pytest.raises(ConfigError, match=r"(?s)'d/site'.*#2"):
        load_config(write(tmp_path / "a.yaml", model + "data:\n  root: d/site #2\n"))
    with pytest.raises(ConfigError, match=r"(?s)'a'.*#1"):
        load_config(write(tmp_path / "a.yaml", model + "data:\n  classes:\n  - a #1\n  - b\n"))
    fine = "data:\n  root: 'd/site #2' #quoted\n  val_split: v # comment\nseed: 3 #4\n"
    config = load_config(write(tmp_path / "a.yaml", model + fine))
    assert (config.data.root, config.data.val_split, config.seed) == ("d/site #2", "v", 3)


def test_old_keys_load_and_name_the_new_ones(tmp_path):
    file = write(tmp_path / "old.yaml", "model: {name: m}\ntrain: {accumulate: 3, keep: 4}\naugment: {ratio: [1, 2]}\n")
    with pytest.warns(DeprecationWarning) as caught:
        config = load_config(file, ["train.save_every=7", "train.fsdp_unit=5"])
    train = config.train
    assert (train.grad_accum_steps, train.save_total_limit, train.save_interval) == (3, 4, 7)
    assert (train.fsdp_min_num_params, config.augment.ratio) == (5, [1.0, 2.0])  # a classifier's key was not renamed
    warned = [str(warning.message) for warning in caught]
    assert any(all(part in w for part in (str(file), "train.accumulate", "train.grad_accum_steps")) for w in warned)
    assert any(all(part in w for part in ("command line", "train.save_every", "train.save_interval")) for w in warned)
    assert len(warned) == 4


def test_every_old_key_has_a_new_one_somewhere():
    for old, new in OLD_KEYS.items():
        schemas = [ClassifyConfig, DetectConfig, SegmentConfig]
        reached = [s for s in schemas if new in valid_keys(s) and old not in valid_keys(s)]
        assert reached, old


def test_old_and_new_key_together_are_refused(recipe):
    file = write(recipe.parent / "both.yaml", "base: mine.yaml\ntrain: {accumulate: 3, grad_accum_steps: 4}\n")
    with pytest.raises(ConfigError, match=r"both\.yaml.*train\.accumulate.*train\.grad_accum_steps"):
        load_config(file)
    assert load_config(recipe, ["train.accumulate=3", "train.grad_accum_steps=4"]).train.grad_accum_steps == 4


def test_saved_configuration_reads_back_equal(tmp_path, recipe):
    config = load_config(recipe, ["model.kwargs.dilations=[[1,2],[1]]", "output=x"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_short_names():
    assert find_config("digits", "classify") == find_config("classify/digits") == find_config("classify/digits.yaml")
    assert find_config("digits", "detect") == find_config("detect/digits")
    assert find_config("fashion_mnist") == find_config("classify/fashion_mnist")
    with pytest.raises(ConfigError, match=r"classify/digits, detect/digits, segment/digits"):
        find_config("digits")
    assert "classify/digits" in recipe_names()
    assert not any(name.startswith("_") for name in recipe_names())
    with pytest.raises(ConfigError, match=r"'digts'.*classify/digits"):
        find_config("digts")
    with pytest.raises(ConfigError, match=r"'digts'[^,]*segment/digits[^,]*$"):
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
    ("override", "limits"),
    [
        ("augment.hflip=7", ["7", "1"]),
        ("augment.hflip=-1", ["-1", "0"]),
        ("loss.smoothing=1", ["1"]),
        ("loss.smoothing=-0.1", ["-0.1", "0"]),
        ("optim.lr=.inf", ["inf"]),
        ("optim.lr=.nan", ["nan"]),
        ("optim.lr=0", ["0"]),
        ("optim.clip_grad=0", ["0"]),
        ("optim.betas=[0.9]", ["[0.9]", "2"]),
        ("optim.betas=[0.9,1.0]", ["[1]", "1.0", "1"]),
        ("model.drop_path_rate=2", ["2", "1"]),
        ("train.ema_decay=1.5", ["1.5", "1"]),
        ("data.std=[0.0]", ["[0]", "0.0"]),
        ("data.val_fraction=1", ["1"]),
        ("schedule.decay_fraction=0", ["0"]),
        ("train.batch_size=1.5", ["1.5"]),
        ("seed=5000000000", ["5000000000", "4294967296"]),
    ],
)
def test_values_out_of_range(override, limits):
    with pytest.raises(ConfigError) as raised:
        load_config("digits", [override])
    message = str(raised.value)
    assert message.startswith("command line: `" + override.split("=")[0])
    assert all(re.search(rf"(?<![\d.]){re.escape(limit)}(?![\d.])", message) for limit in limits), message
