"""The manifest: what it must say of every checkpoint, and that timm's configurations say the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model

import foveal
from foveal.backbones import published
from foveal.backbones.attention import NeighborhoodAttention2d
from foveal.weights import manifest
from foveal.weights.manifest import ManifestError, checkpoints

ALL = checkpoints()
CLASSIFIERS = {name: each for name, each in ALL.items() if each.task == "classify"}


def test_the_table_of_the_backbones_is_that_of_the_manifest() -> None:
    """`python -m foveal.weights.manifest` writes it."""
    assert Path(published.__file__).read_text(encoding="utf-8") == manifest.render()


def test_what_is_there() -> None:
    """As many as the authors list, by system and task."""
    assert Counter((each.family, each.task) for each in ALL.values()) == {
        ("nat", "classify"): 25,
        ("nat", "detect"): 24,  # three of them Mask2Former for instances
        ("nat", "segment"): 15,  # two of them Mask2Former
        ("nat", "panoptic"): 3,
        ("halonet", "classify"): 7,
        ("maxvit", "classify"): 21,
        ("overlock", "classify"): 8,
        ("overlock", "detect"): 6,
        ("overlock", "segment"): 3,
        ("care", "classify"): 3,
        ("a3fpn", "detect"): 4,
        ("a3fpn", "segment"): 2,
    }


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_timm_is_told_the_same(name: str) -> None:
    """Address, hub, licence, classes, input size, crop and normalization of every pretrained_cfg."""
    checkpoint, cfg = CLASSIFIERS[name], get_pretrained_cfg(name)
    assert cfg.license == checkpoint.weights_licence
    for key, value in checkpoint.preprocessing().items():
        assert getattr(cfg, key) == value, key
    if checkpoint.keys != "timm":  # timm states those of its networks
        assert cfg.pool_size == tuple(size // (16 if "isotropic" in name else 32) for size in cfg.input_size[1:])
    places = {cfg.url, f"hf://{cfg.hf_hub_id}" if cfg.hf_hub_id else "", *published.MIRRORS.get(name, ())} - {"", None}
    assert places == set(checkpoint.addresses)
    assert bool(cfg.has_weights) == bool(checkpoint.addresses)


def test_no_weights_but_those_of_the_manifest() -> None:
    tagged = {name for arch in foveal.list_models() for name in get_arch_pretrained_cfgs(arch) if "." in name}
    assert {name for name in tagged if not name.endswith(".untrained")} == set(CLASSIFIERS)
    for name in tagged - set(CLASSIFIERS):
        assert not get_pretrained_cfg(name).has_weights


@pytest.mark.parametrize("name", [name for name, each in CLASSIFIERS.items() if each.keys == "timm"])
def test_timms_own_weights(name: str) -> None:
    """Ours name the same file, and prepare images as timm does for it."""
    hub = get_pretrained_cfg(name).hf_hub_id
    theirs, ours = get_pretrained_cfg(hub.removeprefix("timm/")), get_pretrained_cfg(name)
    assert theirs.hf_hub_id == hub
    assert (theirs.url or "") == ours.url
    for key in ("num_classes", "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "license"):
        assert getattr(theirs, key) == getattr(ours, key), key


@pytest.mark.parametrize("name", [name for name, each in ALL.items() if each.task != "classify"])
def test_dense_checkpoints_are_of_models_that_exist(name: str) -> None:
    """With a list of dilations for each of their levels, one for each block."""
    checkpoint = ALL[name]
    assert is_model(checkpoint.model)
    assert set(checkpoint.arguments) <= {"dilations", "stride_in_1x1"}
    # of a ResNet of detectron2 both are known
    assert ("stride_in_1x1" in checkpoint.arguments) == (
        checkpoint.keys == "detectron2" and "resnet" in checkpoint.model
    )
    assert ("stride_in_1x1" in checkpoint.arguments) == (checkpoint.channel_order is not None)
    if "dilations" in checkpoint.arguments:
        with torch.device("meta"):
            model = timm.create_model(checkpoint.model, **checkpoint.arguments)  # refuses others
        layers = [m for m in model.modules() if isinstance(m, NeighborhoodAttention2d)]
        assert [m.dilation for m in layers] == [d for level in checkpoint.arguments["dilations"] for d in level]


def test_every_address_has_a_form_that_is_known() -> None:
    starts = (
        "https://shi-labs.com/projects/nat/checkpoints/",
        "https://shi-labs.com/projects/dinat/checkpoints/",
        "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/",
        "https://github.com/LMMMEng/OverLoCK/releases/download/v1/",
        "https://huggingface.co/Q-M-E/A3-FPN/resolve/main/",
        "hf://timm/",
        "hf://shi-labs/",
    )
    for each in ALL.values():
        assert each.addresses or each.page == "https://drive.google.com/drive/folders/1UGRHQKjBGY8EjUtsHLsy9VBXp7rfUqkf"
        for address in each.addresses:
            assert address.startswith(starts)
    assert ALL["maxvit_xlarge_512.in21k_ft_in1k"].original.endswith("/maxvitxlarge/i21k_i1k/512")
    # timm's file names end in the beginning of their hash
    hybrids = [each for each in ALL.values() if each.family == "halonet"]
    assert all(each.address.endswith(f"-{each.sha256}.pth") for each in hybrids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adress": "x"}, "nat_mini.in1k: unknown adress"),
        ({"tag": None}, "tag missing or no text"),
        ({"address": None}, "an address, or a page and a file"),
        ({"address": "ftp://x/y"}, "'ftp://x/y' is no address"),
        ({"task": "classification"}, "task 'classification' is none of classify"),
        ({"score": {"top_1": 81.8}}, r"scores \['top_1'\], known are top1"),
        ({"score": {"top1": 818}}, "not per cent"),
        ({"sha256": "abc"}, "sha256 'abc'"),
        ({"channel_order": "gbr"}, "channel_order 'gbr', rgb or bgr"),
        ({"crop": None}, "inputs"),
        ({"model": "nat_tiny"}, "nat_tiny.in1k is there twice"),
        ({"address": "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth"}, "of more than one checkpoint"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    family = yaml.load(manifest.FILE.read_text(encoding="utf-8"), Loader=loader)["families"]["nat"]
    family["checkpoints"] = family["checkpoints"][:3]
    family["checkpoints"][0] |= change
    file = tmp_path / "manifest.yaml"
    file.write_text(yaml.safe_dump({"families": {"nat": family}}))
    with pytest.raises(ManifestError, match=message):
        checkpoints(file)


def test_timm_asks_for_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm.create_model(NAME, pretrained=True): the address of the manifest, or the hub's copy with its own names."""
    state = timm.create_model("overlock_xt").state_dict()
    asked: list[str] = []
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", lambda url, **_: asked.append(url) or state)
    model = timm.create_model("overlock_xt.in1k", pretrained=True)
    assert asked == [ALL["overlock_xt.in1k"].address]
    assert torch.equal(model.head[4].weight, state["head.4.weight"])
    hub = "timm.models._builder.load_state_dict_from_hf"
    monkeypatch.setattr(hub, lambda repository, **_: asked.append(f"hf://{repository}") or {})
    with pytest.raises(ValueError, match="not of this model"):
        timm.create_model("dinat_mini.in1k", pretrained=True)
    assert (asked[1],) == ALL["dinat_mini.in1k"].mirrors
