"""The manifest with the default_cfgs of the classifiers: complete, consistent, and nothing stated twice."""

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
from foveal.backbones.attention import NeighborhoodAttention2d
from foveal.weights import manifest
from foveal.weights.manifest import ManifestError, checkpoints

ALL = checkpoints()
CLASSIFIERS = {name: each for name, each in ALL.items() if each.task == "classify"}


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
        ("van", "classify"): 8,
        ("van", "segment"): 6,
        ("shiftvit", "classify"): 4,
        ("rmt", "classify"): 7,
        ("rmt", "detect"): 12,
        ("rmt", "segment"): 7,
        ("stvit", "classify"): 6,
        ("sgformer", "classify"): 3,
        ("transnext", "classify"): 7,
        ("transnext", "detect"): 7,  # four of them DINO
        ("transnext", "segment"): 6,  # three of them Mask2Former
        ("moh_vit", "classify"): 4,
        ("triplet", "classify"): 6,
        ("fan", "classify"): 12,
        ("tap_fan", "classify"): 1,
        ("tap_fan", "segment"): 1,
        ("agent", "classify"): 18,
        ("agent", "detect"): 16,
        ("agent", "segment"): 4,
        ("inline", "classify"): 13,
        ("uplift", "upsample"): 2,
        ("naf", "upsample"): 1,
        ("a3fpn", "detect"): 4,
        ("a3fpn", "segment"): 2,
        ("conditional_detr", "detect"): 4,
    }


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_are_as_their_cfgs_say(name: str) -> None:
    checkpoint, cfg = CLASSIFIERS[name], get_pretrained_cfg(name)
    assert (checkpoint.weights_licence, checkpoint.code) == (cfg.license, cfg.origin_url)
    assert checkpoint.preprocessing() == {
        key: getattr(cfg, key)
        for key in ("num_classes", "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    }
    if checkpoint.keys != "timm":  # timm states those of its networks
        assert cfg.pool_size == tuple(
            size // (16 if "isotropic" in name or "fan_" in name or "deit" in name else 32)
            for size in cfg.input_size[1:]
        )
    places = {cfg.url or "", f"hf://{cfg.hf_hub_id}" if cfg.hf_hub_id else ""} - {""}
    assert places == set(checkpoint.addresses)
    assert bool(cfg.has_weights) == bool(checkpoint.addresses) == (checkpoint.page is None)


def test_the_hub_comes_after_the_authors() -> None:
    mini = ALL["dinat_mini.in1k"]
    assert mini.addresses == (
        "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth",
        "hf://shi-labs/dinat-mini-in1k-224",
    )


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
    assert (theirs.url or "") == (ours.url or "")
    for key in ("num_classes", "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "license"):
        assert getattr(theirs, key) == getattr(ours, key), key


@pytest.mark.parametrize("name", [name for name, each in ALL.items() if each.task not in ("classify", "upsample")])
def test_dense_checkpoints_are_of_models_that_exist(name: str) -> None:
    """With a list of dilations for each of their levels, one for each block."""
    checkpoint = ALL[name]
    assert is_model(checkpoint.model)
    assert set(checkpoint.arguments) <= {"dilations", "stride_in_1x1", "bias_size", "agent_shapes", "output_stride"}
    assert ("output_stride" in checkpoint.arguments) == ("_dc5_" in checkpoint.tag)
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
        "https://huggingface.co/Visual-Attention-Network/VAN-",
        "https://cloud.tsinghua.edu.cn/f/",
        "https://github.com/microsoft/SPACH/releases/download/v1.0/",
        "https://huggingface.co/DaiShiResearch/",
        "https://huggingface.co/Chat-UniVi/MoH-ViT-B-50/",
        "https://github.com/DeppMeng/ConditionalDETR/releases/download/v1.0/ConditionalDETR_r",
        "https://github.com/zhoudaquan/fully_attentional_network_ckpt/releases/download/v1.0.0/",
        "https://github.com/guoyongcs/TAPADL/releases/download/v1.0/",
        "https://github.com/valeoai/NAF/releases/download/model/",
        "hf://UPLiFT-upsampler/",
        "hf://timm/",
        "hf://shi-labs/",
        "hf://Visual-Attention-Network/van-",
        "hf://microsoft/conditional-detr-resnet-50",
    )
    by_hand = (
        "https://drive.google.com/drive/folders/1UGRHQKjBGY8EjUtsHLsy9VBXp7rfUqkf",
        "https://drive.google.com/drive/folders/1ZJDEwxDffqqqzBC2SzhOkpWpGRweDsE4",
        "https://drive.google.com/drive/folders/1uaT5OarQd9iPrnFufHocHpM3zhyTcetB",
        "https://cloud.tsinghua.edu.cn/d/0100f0cea37d41ba8d08/",
        "https://drive.google.com/file/d/",
        "https://pan.baidu.com/s/",
        "https://huggingface.co/Chat-UniVi/",
    )
    for each in ALL.values():
        assert each.addresses or each.page.startswith(by_hand)
        for address in each.addresses:
            assert address.startswith(starts)
    assert ALL["maxvit_xlarge_512.in21k_ft_in1k"].original.endswith("/maxvitxlarge/i21k_i1k/512")
    # timm's file names end in the beginning of their hash
    hybrids = [each for each in ALL.values() if each.family == "halonet"]
    assert all(each.address.endswith(f"-{each.sha256}.pth") for each in hybrids)


@pytest.mark.parametrize(
    ("row", "change", "named"),
    [
        (0, {"adress": "x"}, "nat_mini.in1k: .*adress"),
        (0, {"tag": None}, "nat_mini.None: .*tag"),
        (0, {"tag": "in2k"}, "nat_mini.in2k: .*default_cfgs"),
        (0, {"model": "nat_nano"}, "nat_nano"),
        (0, {"model": "nat_tiny"}, "nat_tiny.in1k"),  # twice
        (0, {"crop": 0.9}, "nat_mini.in1k: crop .*default_cfgs"),
        (0, {"address": "https://x/y"}, "nat_mini.in1k: address .*default_cfgs"),
        (0, {"task": "classification"}, "'classification' .*classify"),
        (0, {"score": {"top_1": 81.8}}, "top_1"),
        (0, {"score": {"top1": 818}}, "818"),
        (2, {"address": None}, "nat_mini.maskrcnn_coco: .*page"),
        (2, {"address": "ftp://x/y"}, "'ftp://x/y'"),
        (2, {"sha256": "abc"}, "'abc'"),
        (2, {"channel_order": "gbr"}, "'gbr' .*rgb, bgr"),
        (2, {"address": "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth"}, "CLS/nat_tiny.pth"),
    ],
)
def test_mistakes_are_named(row: int, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    family = yaml.load(manifest.FILE.read_text(encoding="utf-8"), Loader=loader)["families"]["nat"]
    rows = family["checkpoints"]
    family["checkpoints"] = [*rows[:2], next(each for each in rows if each["tag"] == "maskrcnn_coco")]
    family["checkpoints"][row] |= change
    file = tmp_path / "manifest.yaml"
    file.write_text(yaml.safe_dump({"families": {"nat": family}}))
    with pytest.raises(ManifestError, match=named):
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
    with pytest.raises(ValueError, match=r"levels\.0\.blocks\.0\.attn\.proj\.bias"):  # missing
        timm.create_model("dinat_mini.in1k", pretrained=True)
    assert (asked[1],) == ALL["dinat_mini.in1k"].mirrors
