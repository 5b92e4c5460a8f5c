"""Conversion of files in every published format: complete or refused, and reversible to the bit."""

from __future__ import annotations

import argparse
import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models import push_to_hf_hub, save_for_hf
from torch import nn
from typer.testing import CliRunner

import foveal
import foveal.weights.convert as converting
from foveal.backbones import family
from foveal.backbones.profile import Profile
from foveal.cli import app
from foveal.weights import cards
from foveal.weights.convert import ConversionError, convert, restore
from foveal.weights.export import export
from foveal.weights.manifest import Checkpoint, checkpoints
from foveal.weights.names import closest
from foveal.weights.verify import verify

from ..backbones.test_swin import authors as swin_authors
from . import filler

NAME = "test_foveal_dinat"
TINY_DINATS = dict(embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], dilations=[[1], [1, 2], [1], [1]])
TINY_ISOTROPIC = dict(embed_dim=32, depth=2, num_heads=2)
DILATED = TINY_ISOTROPIC | {"dilations": [1, 2]}
TINY_VIT = dict(img_size=64, embed_dim=32, depth=2, num_heads=2)
TINY_MAXVIT = dict(depths=[1, 1, 1, 1], dims=[32, 64, 96, 128], img_size=64)
TIMMS_MAXVIT = dict(depths=(1, 1, 1, 1), embed_dim=(32, 64, 96, 128), img_size=64, head_hidden_size=128)


def vit() -> dict[str, torch.Tensor]:
    """With the index that the authors store, written out: the offset of the key from the query in a flat table."""
    state = filler.of(timm.create_model("vitrpb_isotropic_small", **TINY_VIT))
    side = 4
    index = torch.empty(side**2, side**2, dtype=torch.long)
    for q in range(side**2):
        for k in range(side**2):
            rows, columns = k // side - q // side + side - 1, k % side - q % side + side - 1
            index[q, k] = rows * (2 * side - 1) + columns
    return state | {f"layers.{i}.attn.relative_position_index": index.clone() for i in range(2)}


def tiny(name: str, **arguments: Any) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: filler.of(timm.create_model(name, **arguments))


# format: (model that loads it, its arguments, the tensors of the file)
FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "nat": ("test_foveal_nat", {}, tiny("test_foveal_nat")),
    "dinat, 9 classes": (NAME, {}, tiny(NAME, num_classes=9)),
    "dinat_s": ("dinat_s_tiny", TINY_DINATS, tiny("dinat_s_tiny", **TINY_DINATS)),
    "nat_isotropic": ("nat_isotropic_small", TINY_ISOTROPIC, tiny("nat_isotropic_small", **TINY_ISOTROPIC)),
    "dinat_isotropic": ("dinat_isotropic_small", DILATED, tiny("dinat_isotropic_small", **DILATED)),
    "dinat, 22k classes": (NAME, {}, tiny(NAME, num_classes=21841)),
    "dinat, 11x11 at 384": ("dinat_large_384_11x11", TINY_DINATS, tiny("dinat_large_384_11x11", **TINY_DINATS)),
    "vitrpb with its index": ("vitrpb_isotropic_small", TINY_VIT, vit),
    "halonet": ("test_foveal_halonet", {}, tiny("test_foveal_halonet")),
    "hybrid of timm": ("halo26t", {"width_factor": 0.25}, tiny("halonet26t", width_factor=0.25)),
    "maxvit of timm": ("maxvit_tiny_224", TINY_MAXVIT, tiny("maxvit_tiny_tf_224", **TIMMS_MAXVIT)),
    "maxvit of timm at 384": (
        "maxvit_tiny_384",
        {**TINY_MAXVIT, "img_size": 384},
        tiny("maxvit_tiny_tf_384", **{**TIMMS_MAXVIT, "img_size": 384}),
    ),
    "maxvit of timm, 21k classes": (
        "maxvit_tiny_224",
        TINY_MAXVIT,
        tiny("maxvit_tiny_tf_224", **TIMMS_MAXVIT, num_classes=21843),
    ),
    "overlock, auxiliary head": ("test_foveal_overlock", {}, tiny("test_foveal_overlock", aux_head=True)),
    "overlock, folded": (
        "test_foveal_overlock",
        {},
        lambda: filler.of(timm.create_model("test_foveal_overlock").reparameterize()),
    ),
    "ascan": ("test_foveal_ascan", {}, tiny("test_foveal_ascan")),
    "care": ("test_foveal_care", {}, tiny("test_foveal_care")),
    "van": ("test_foveal_van", {}, tiny("test_foveal_van")),
    "shiftvit": ("test_foveal_shiftvit", {}, tiny("test_foveal_shiftvit")),
    "rmt, token labels": ("test_foveal_rmt", {"aux_head": "features"}, tiny("test_foveal_rmt", aux_head="features")),
    "transnext": ("test_foveal_transnext", {}, tiny("test_foveal_transnext")),
    "moh_vit": ("test_foveal_moh_vit", {}, tiny("test_foveal_moh_vit")),
    "fan": ("test_foveal_fan", {}, tiny("test_foveal_fan")),
    "tap_fan": ("test_foveal_tap_fan", {}, tiny("test_foveal_tap_fan")),
    "agent_deit": ("test_foveal_agent_deit", {}, tiny("test_foveal_agent_deit")),
    "agent_pvt": ("test_foveal_agent_pvt", {}, tiny("test_foveal_agent_pvt")),
    "agent_swin": ("test_foveal_agent_swin", {}, tiny("test_foveal_agent_swin")),
    "agent_cswin": ("test_foveal_agent_cswin", {}, tiny("test_foveal_agent_cswin")),
    "inline_pvt": ("test_foveal_inline_pvt", {}, tiny("test_foveal_inline_pvt")),
    "raftmlp": ("test_foveal_raftmlp", {}, tiny("test_foveal_raftmlp")),
    "stvit": ("test_foveal_stvit", {}, tiny("test_foveal_stvit")),
    "sgformer": ("test_foveal_sgformer", {}, tiny("test_foveal_sgformer")),
}
WRAPPERS = {
    "model.pth": lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "checkpoint.pth.tar": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "arch": "x"},
    "pytorch_model.bin": lambda state: state,
    "model.safetensors": lambda state: state,
}


def write(folder: Path, name: str, state: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    content = WRAPPERS.get(name, lambda x: x)(state)
    if name.endswith("safetensors"):
        safetensors.torch.save_file(content, folder / name)
    else:
        torch.save(content, folder / name)
    return folder / name


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """To the bit, kind and order of the names included."""
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


def output_of(model: nn.Module) -> torch.Tensor:
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(image)
    return torch.cat([x.flatten() for x in out]) if isinstance(out, list) else out


@pytest.mark.parametrize("form", FAMILIES)
def test_there_and_back(form: str, tmp_path: Path) -> None:
    name, arguments, make = FAMILIES[form]
    state = make()
    wrapper = list(WRAPPERS)[list(FAMILIES).index(form) % len(WRAPPERS)]
    file = write(tmp_path / "theirs", wrapper, state)
    done = convert(file, tmp_path / "ours", model=name, arguments=arguments)
    assert done.files == ["README.md", "config.json", "model.safetensors"]
    assert done.record["tensors"] == len(state)

    given = {f"module.{k}": v for k, v in state.items()} if wrapper.endswith("tar") else state
    back = restore(done.folder)
    if wrapper.endswith("safetensors"):  # sorts the names
        back = {key: back[key] for key in given}
    same(back, given)
    # these formats have the names of the models here
    model = foveal.load(done.folder)
    loaded = model.state_dict()
    assert set(state) - set(loaded) <= {key for key in state if key.endswith("relative_position_index")}
    assert all(torch.equal(loaded[key].reshape(state[key].shape), state[key]) for key in loaded)
    assert all(check.passed for check in verify(done.folder))


HYBRIDS = [each for each in checkpoints().values() if each.family == "halonet"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", HYBRIDS, ids=lambda each: each.model)
def test_every_hybrid_of_timm(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Names and shapes of timm's own network, narrower."""
    (mirror,) = checkpoint.mirrors
    narrow = {} if checkpoint.model == "haloregz_b" else {"width_factor": 0.25}  # whose widths have minima
    state = filler.of(timm.create_model(mirror.removeprefix("hf://timm/").partition(".")[0], **narrow))
    file = write(tmp_path / "x", "model.pth", state)
    done = convert(file, tmp_path / "ours", model=checkpoint.name, arguments=narrow)
    same(restore(done.folder), state)
    assert done.record["checkpoint"] == checkpoint.name


@pytest.mark.parametrize("form", ["dinat, 9 classes", "overlock, folded", "care", "maxvit of timm", "hybrid of timm"])
def test_timm_alone_reads_the_folder(form: str, tmp_path: Path) -> None:
    name, arguments, make = FAMILIES[form]
    state = make()
    folder = convert(write(tmp_path / "x", "model.pth", state), tmp_path / "y", model=name, arguments=arguments).folder
    overlay = dict(state_dict=state, url="", hf_hub_id=None, num_classes=len(state[[*state][-1]]))
    kwargs = {**arguments, "num_classes": overlay["num_classes"]}
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    got = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(output_of(got), output_of(expected))


def mmpretrain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """VAN of the authors under the names of MMPretrain, by its classes."""
    names = {".proj.": ".projection.", "block": "blocks", ".conv0.": ".DW_conv.", ".conv_spatial.": ".DW_D_conv."}
    result = {}
    for name, value in state.items():
        for theirs, renamed in (names | {".dwconv.dwconv.": ".dwconv."}).items():
            name = name.replace(theirs, renamed)
        result[f"head.fc.{name[5:]}" if name.startswith("head.") else f"backbone.{name}"] = value
    return result


def rmt_with_constants() -> dict[str, torch.Tensor]:
    """Of the authors, with the buffers of every stage of their files."""
    state = filler.published("rmt_t")
    decays = [level.blocks[0].retention.decay for level in timm.create_model("rmt_t").layers]
    state |= {f"layers.{i}.Relpos.decay": torch.tensor(decay) for i, decay in enumerate(decays)}
    return state | {f"layers.{i}.Relpos.angle": torch.ones(16) for i in range(4)}


def stvit_with_constants() -> dict[str, torch.Tensor]:
    """Of the authors, with the identities in every block of their files."""
    state = filler.published("stvit_s")
    blocks = sorted({name.partition(".pos_embed")[0] for name in state if ".pos_embed." in name})
    places = [f"{block}.attn.{kind}.weights" for block in blocks for kind in ("fold", "unfold")]
    return state | {name: torch.eye(9).view(9, 1, 3, 3).clone() for name in places}


RENAMED = {
    "van": ("van_b0", "authors", lambda: filler.published("van_b0")),
    "van of transformers": ("van_b0", "transformers", lambda: filler.published("van_b0_hf_96x128")),
    "raftmlp": ("raftmlp_s", "authors", lambda: filler.published("raftmlp_s")),
    "rmt": ("rmt_t", "authors", rmt_with_constants),
    "stvit": ("stvit_s", "authors", stvit_with_constants),
    "sgformer": ("sgformer_s", "authors", lambda: filler.published("sgformer_s")),
    "transnext": ("transnext_micro", "authors", lambda: filler.published("transnext_micro")),
    "agent_pvt": ("agent_pvt_t", "authors", lambda: filler.published("agent_pvt_t")),
    "agent_swin": ("agent_swin_t", "authors", lambda: swin_authors(filler.of(timm.create_model("agent_swin_t")))),
    "inline_cswin": ("inline_cswin_t", "authors", lambda: filler.published("inline_cswin_t")),
    "inline_deit": ("inline_deit_t", "authors", lambda: filler.published("inline_deit_t")),
    "shiftvit": ("shiftvit_tiny", "authors", lambda: filler.published("shiftvit_tiny")),
    "van of mmpretrain": ("van_b0", "mmdet", lambda: mmpretrain(filler.published("van_b0"))),
}


LATER = "inline_deit", "agent_swin", "inline_cswin"


@pytest.mark.parametrize("form", [pytest.param(f, marks=[pytest.mark.slow] if f in LATER else []) for f in RENAMED])
def test_formats_with_other_names(form: str, tmp_path: Path) -> None:
    name, keys, make = RENAMED[form]
    state = make()
    file = write(tmp_path / "theirs", "checkpoint.pth", state)
    done = convert(file, tmp_path / "ours", model=name)
    assert done.record["keys"] == keys
    constant = r"van\.layernorm\.|.*\.(Relpos\..*|(un)?fold\.weights|attn_mask)$"
    unused = [key for key in state if re.match(constant, key)]
    assert done.record["dropped"] == unused
    same(restore(done.folder), {key: value for key, value in state.items() if key not in unused})
    assert foveal.load(done.folder).num_classes == 1000
    assert all(check.passed for check in verify(done.folder))


@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
def test_transformers(layer_scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes from the library's own class; queries, keys and values are one matrix here."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra dev has it)")
    functional = pytest.importorskip("natten.functional", reason="transformers builds no Dinat without NATTEN")
    for missing in ("natten2dav", "natten2dqkrpb"):
        monkeypatch.setattr(functional, missing, None, raising=False)
    config = transformers.DinatConfig(
        embed_dim=16, depths=[2, 2, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0,
        dilations=[[1, 5], [1, 2], [1, 1], [1]], layer_scale_init_value=layer_scale, num_labels=10,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.DinatForImageClassification(config)
    state = filler.of(theirs)
    folder = tmp_path / "hub"
    write(folder, "pytorch_model.bin", state)
    (folder / "config.json").write_text(json.dumps({"model_type": "dinat", "architectures": ["X"]}))
    scale = {"layer_scale": layer_scale} if layer_scale else {}
    done = convert(folder, tmp_path / "ours", model=NAME, arguments=scale)
    assert done.record["keys"] == "transformers"
    same(restore(done.folder), state)
    loaded = foveal.load(done.folder).state_dict()
    part = "dinat.encoder.levels.1.layers.0.attention.self"
    expected = torch.cat([state[f"{part}.{each}.weight"] for each in ("query", "key", "value")])
    assert torch.equal(loaded["levels.1.blocks.0.attn.qkv.weight"], expected)
    assert torch.equal(loaded["head.bias"], state["classifier.bias"])


DENSE = {
    "nat, mmdet": ("test_foveal_nat", {}, "rpn_head.rpn_conv.weight"),
    "dinat, detectron2": (NAME, {}, "sem_seg_head.pixel_decoder.adapter_1.weight"),
    "overlock, detection": ("test_foveal_overlock", {}, "neck.lateral_convs.0.conv.weight"),
    "overlock, segmentation": ("test_foveal_overlock", {"out_overview": False}, "decode_head.conv_seg.weight"),
}


@pytest.mark.parametrize("form", DENSE)
def test_backbones_of_dense_models(form: str, tmp_path: Path) -> None:
    """Only when asked for, and what is left out is said."""
    name, arguments, head = DENSE[form]
    model = timm.create_model(name, features_only=True, out_norm=True, **arguments).eval()
    state = filler.of(model.model, "backbone.")
    heads = {head: torch.ones(2, 2), head.replace("weight", "bias"): torch.ones(2)}
    whole = {"model" if "detectron2" in form else "state_dict": state | heads, "meta": {"epoch": 36}}
    file = write(tmp_path / "theirs", "dense.pth", whole)
    group = head.partition(".")[0]
    with pytest.raises(ConversionError, match=rf" {len(state) + 2} .* {len(state)} .*2 {group}.*--backbone"):
        convert(file, tmp_path / "ours", model=name)
    assert not (tmp_path / "ours").exists()
    done = convert(file, tmp_path / "ours", model=name, backbone=True)
    assert f"2 {group}" in "\n".join(done.lines())
    assert f"2 `{group}`" in (done.folder / "README.md").read_text()
    same(restore(done.folder), state)
    assert all(check.passed for check in verify(done.folder))
    model.model.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()})
    assert torch.equal(output_of(foveal.load(done.folder)), output_of(model))
    with pytest.raises(ValueError, match=str(done.folder)):
        export(done.folder, "onnx", tmp_path / "onnx")


def test_the_dilations_of_a_dense_checkpoint(tmp_path: Path) -> None:
    """They come from the manifest; without them the outputs would differ."""
    checkpoint = checkpoints()["dinat_mini.maskrcnn_coco"]
    small = {"embed_dim": 16, "num_heads": [1, 2, 4, 8]}
    model = timm.create_model("dinat_mini", features_only=True, out_norm=True, **checkpoint.arguments, **small).eval()
    state = filler.of(model.model, "backbone.") | {"neck.x": torch.ones(1)}
    file = write(tmp_path / "theirs", "maskrcnn_dinat_mini.pth", {"state_dict": state})  # as it is published
    done = convert(file, tmp_path / "ours", model="dinat_mini", backbone=True, arguments=small)
    assert done.record["checkpoint"] == checkpoint.name
    loaded = foveal.load(done.folder)
    assert [m.dilation for m in loaded.modules() if hasattr(m, "dilation") and hasattr(m, "rpb")][:3] == [1, 28, 1]
    card = (done.folder / "README.md").read_text()
    assert "box AP 47.2, mask AP 42.5" in card
    assert checkpoint.address in card


def test_a_resnet_under_a_neck(tmp_path: Path) -> None:
    """A3-FPN in mmdetection: timm's backbone of that name, without its classifier."""
    model = timm.create_model("test_resnet", features_only=True)
    state = filler.of(model, "backbone.")
    heads = {"neck.conv0.weight": torch.ones(1), "bbox_head.fc.weight": torch.ones(1)}
    file = write(tmp_path / "theirs", "x.pth", {"state_dict": state | heads})
    done = convert(file, tmp_path / "ours", model="test_resnet", backbone=True)
    assert done.record["heads"] == {"neck": 1, "bbox_head": 1}
    same(restore(done.folder), state)
    assert all(check.passed for check in verify(done.folder))


def test_averaged_or_raw(tmp_path: Path) -> None:
    raw = filler.of(timm.create_model(NAME))
    averaged = {key: value + 1 for key, value in raw.items()}
    both = write(tmp_path / "x", "both.pth", {"state_dict": raw, "state_dict_ema": averaged})
    for ema, expected, said in ((None, averaged, True), (True, averaged, True), (False, raw, False)):
        done = convert(both, tmp_path / "ours", model=NAME, ema=ema, force=True)
        assert done.record["averaged"] is said
        same(restore(done.folder), expected)
    assert "raw" in done.lines()[2]
    one = write(tmp_path / "x", "one.pth", {"state_dict": raw})
    with pytest.raises(ValueError, match=r"one\.pth.*EMA"):
        convert(one, tmp_path / "none", model=NAME, ema=True)
    assert "raw weights" not in convert(one, tmp_path / "plain", model=NAME).lines()[2]
    # mmengine's hook changes them about: what it saves as state_dict are the averaged ones
    hook = pytest.importorskip("mmengine.hooks", reason="needs mmengine").EMAHook()
    net = timm.create_model(NAME)
    net.load_state_dict(raw)
    hook.before_run(argparse.Namespace(model=net))
    hook.ema_model.module.load_state_dict(averaged)
    content = {"state_dict": net.state_dict()}
    hook.before_save_checkpoint(None, content)
    swapped = write(tmp_path / "x", "swapped.pth", content)
    for ema, expected, said in ((None, averaged, True), (True, averaged, True), (False, raw, False)):
        done = convert(swapped, tmp_path / "ours", model=NAME, ema=ema, force=True)
        assert done.record["averaged"] is said
        same(restore(done.folder), expected)


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    def refused(message: str, change: dict[str, Any], model: str = NAME, **kwargs: Any) -> None:
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        with pytest.raises(ConversionError, match=message):
            convert(write(tmp_path / "x", "x.pth", changed), tmp_path / "ours", model=model, **kwargs)
        assert not (tmp_path / "ours").exists()

    state = filler.of(timm.create_model(NAME))
    refused(r"1 \(norm\.bias\)", {"norm.bias": None})
    refused(r"1 \(extra\.weight\)", {"extra.weight": torch.ones(2)})
    refused(r"2 \(head\.weight, head\.bias\)", {"head.weight": None, "head.bias": None})
    refused(r"1 \(head\.scale\)", {"head.scale": torch.ones(2)})
    refused(r"1 \(norm\.bias \(7,\) for \(128,\)\)", {"norm.bias": torch.ones(7)})
    refused(r"1 \(norm\.bias\) not finite", {"norm.bias": torch.full((128,), torch.nan)})
    refused(r"rpb.*5x5", {}, arguments={"kernel_size": 5})
    resampled = {"kernel_size": 5, "interpolate_rpb": True}
    refused(r"rpb.*resampled", {}, arguments=resampled)
    bias = state["head.bias"]
    for kind, value in (
        ("int8", (100 * bias).to(torch.int8)),
        ("bool", bias > 0),
        ("float64", bias.double() * (1 + 1e-12)),
        ("float64", bias.double() * 1e300),
    ):
        refused(rf"float32.*1 \(head\.bias in {kind}\)", {"head.bias": value})
    for value in (torch.complex(bias, bias), bias.to_sparse()):
        refused(r": 1 \(head\.bias\)", {"head.bias": value})
    refused("finite", {"norm.weight": 1e38 * state["norm.weight"]})
    refused("--backbone", {}, backbone=True)
    state = vit()
    wrong = state["layers.0.attn.relative_position_index"].flip(0)
    change = {"layers.0.attn.relative_position_index": wrong}
    refused("relative_position_index", change, "vitrpb_isotropic_small", arguments=TINY_VIT)


def test_damaged_and_dangerous_files(tmp_path: Path) -> None:
    state = filler.of(timm.create_model(NAME))

    def refused(file: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            convert(file, tmp_path / "ours", model=NAME)
        assert not (tmp_path / "ours").exists()

    for name in ("pytorch_model.bin", "model.safetensors"):
        file = write(tmp_path / "cut", name, state)
        content = file.read_bytes()
        for keep in (0, 10, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:keep])
            refused(file, name)
    # one bit, anywhere in the tensors
    flips = random.Random(0)
    file = write(tmp_path / "flipped", "pytorch_model.bin", state)
    content = bytearray(file.read_bytes())
    for _ in range(3):
        place = content.index(b"data/40") + 200 + flips.randrange(100)
        content[place] ^= 1 << flips.randrange(8)
        file.write_bytes(content)
        refused(file, r"/data/\d+")
        content[place] = write(tmp_path / "good", "pytorch_model.bin", state).read_bytes()[place]
    # the format of old
    torch.save(state, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-100])
    refused(file, file.name)
    file.write_text("# a note\n")
    refused(file, r": Unsupported operand \d+$")  # no word of loading it anyway

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for number, content in enumerate(({"state_dict": Payload()}, {**state, "hook": Payload()})):
        file = tmp_path / f"{number}.pth"
        torch.save(content, file)
        refused(file, r"\(getattr\)")
    assert not (tmp_path / "executed").exists()


def test_what_mmengine_writes_beside_the_weights(tmp_path: Path) -> None:
    """The history of the losses is a pickle of classes and functions: it is passed over, and none of it runs."""
    mmengine = pytest.importorskip("mmengine", reason="needs mmengine")
    hub = mmengine.MessageHub("test")
    for loss in (torch.tensor(1.5), 0.5):
        hub.update_scalar("train/loss", loss)
    hub.update_info("iter", 2)
    state = filler.of(timm.create_model(NAME))
    content = {"state_dict": state, "message_hub": hub.state_dict(), "meta": {"epoch": 1, "cfg": "x = 1"}}
    file = tmp_path / "epoch_1.pth"
    torch.save(content, file)
    with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer"):
        torch.load(file, weights_only=True)
    same(restore(convert(file, tmp_path / "ours", model=NAME).folder), state)

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save(content | {"more": Payload()}, file)
    with pytest.raises(ValueError, match=r"epoch_1\.pth.*HistoryBuffer"):
        convert(file, tmp_path / "none", model=NAME)
    assert not (tmp_path / "executed").exists()


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x", "x.pth", filler.of(timm.create_model(NAME)))
    monkeypatch.setattr(converting, "difference", lambda *_: float("nan"))
    with pytest.raises(ConversionError, match=r"nan.*0\.0001"):
        convert(file, tmp_path / "ours", model=NAME)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    monkeypatch.undo()
    folder = convert(file, tmp_path / "ours", model=NAME).folder
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="--force"):
        convert(file, folder, model=NAME)
    convert(file, folder, model=NAME, force=True)
    assert (folder / "mine.txt").read_text() == "keep"


def test_sources_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x", "x.pth", filler.of(timm.create_model(NAME)))
    for source, model, message in (
        (file, None, "--model"),
        (file, "", "''"),
        (file, "dinat_tinny", "'dinat_tinny'.*dinat_tiny"),
        (file, "dinat_tiny.in5k", r"dinat_tiny\.in5k.*dinat_tiny\.in1k, .*upernet_ade20k"),
        ("nat_mini", None, r"'nat_mini'.*nat_mini\.in1k"),
        (tmp_path / "absent.pth", NAME, "absent.pth"),
        (tmp_path, NAME, str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "y", model=model)
    for arguments in ({"pretrained": True}, {"checkpoint_path": "x.pth"}, {"pretrained_cfg_overlay": {}}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            convert(file, tmp_path / "y", model=NAME, arguments=arguments)
    with pytest.raises(ValueError, match="out_indices"):
        convert(file, tmp_path / "y", model=NAME, arguments={"out_indices": [0]})
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run.*best"):
        convert(file, tmp_path / "run", model=NAME, force=True)
    with pytest.raises(ValueError, match=rf"{NAME}.*no_such"):
        convert(file, tmp_path / "y", model=NAME, arguments={"no_such": 1})
    with pytest.raises(ConversionError, match=r"1000 .*dinat_large\.in22k.* 21841"):
        convert(file, tmp_path / "y", model="dinat_large.in22k")

    # a published name is fetched; what is published of it is in the folder
    published = write(tmp_path / "z", "CARETrans_S0.pth.tar", {"state_dict": filler.published("care_s0")})
    monkeypatch.setattr(Checkpoint, "fetch", lambda _: published)
    done = convert("care_s0.in1k", tmp_path / "care")
    assert done.record["checkpoint"] == "care_s0.in1k"
    config = json.loads((done.folder / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "none stated"
    same(restore(done.folder), filler.published("care_s0"))
    card = (done.folder / "README.md").read_text()
    for part in (
        "# care_s0.in1k",
        "top-1 78.4",
        "none stated",
        "drive.google.com",
        "224 x 224",
        "CARETrans_S0.pth.tar",
    ):
        assert part in card
    checks = {check.name: check for check in verify(done.folder)}
    assert all(check.passed for check in checks.values())
    assert "published: 7.34 M" in checks["parameters"].detail
    # another file of that model stays without those claims
    other = shutil.copy(published, tmp_path / "mine.pth")
    unknown = convert(other, tmp_path / "care2", model="care_s0")
    assert "licence" in unknown.lines()[-1]
    assert "license" not in json.loads((unknown.folder / "config.json").read_text())["pretrained_cfg"]
    # a folder that was converted is a source, too, and stays what it is
    again = convert(done.folder, tmp_path / "care3")
    assert again.record["checkpoint"] == "care_s0.in1k"
    assert again.record["fingerprint"] == done.record["fingerprint"]


def test_another_model_of_the_same_shapes(tmp_path: Path) -> None:
    """NAT and DiNAT differ in their dilations alone, which no tensor tells: names of files and folders do."""
    small: dict[str, Any] = dict(embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], kernel_size=3)
    net = timm.create_model("nat_mini", **small)
    dilated = {"dilations": [[1], [1, 2], [1], [1]]}
    file = write(tmp_path / "x", "nat_mini.pth", net.state_dict())
    for name in ("dinat_mini", "dinat_mini.in1k"):
        with pytest.raises(ValueError, match=rf"nat_mini\.in1k.*{name}"):
            convert(file, tmp_path / "y", model=name, arguments=small | dilated)
    save_for_hf(net, tmp_path / "folder", safe_serialization=True)
    with pytest.raises(ValueError, match=r" nat_mini.* dinat_mini"):
        convert(tmp_path / "folder", tmp_path / "y", model="dinat_mini", arguments=small | dilated)
    # a file with a published hash
    hybrid = filler.of(timm.create_model("halonet26t", width_factor=0.25))
    file = write(tmp_path / "x", "halonet26t_a1h_256-3083328c.pth", hybrid)
    with pytest.raises(ConversionError, match=r"[0-9a-f]{64}.* 3083328c"):
        convert(file, tmp_path / "y", model="halo26t", arguments={"width_factor": 0.25})
    # a folder of transformers
    theirs = pytest.importorskip("transformers", reason="transformers is not installed")
    told = theirs.DinatConfig(depths=[1, 2, 1, 1], dilations=[[1], [1, 3], [1], [1]]).to_dict()
    state = {
        re.sub(r"^levels\.(\d)\.blocks\.(\d)\.", r"dinat.encoder.levels.\1.layers.\2.", name): value
        for name, value in net.state_dict().items()
    } | {"dinat.embeddings.patch_embeddings.projection.0.weight": torch.ones(1)}
    hub = write(tmp_path / "hub", "pytorch_model.bin", state).parent
    for model_type, expected in (("dinat", r"\[1, 1, 3, 1, 1\]"), ("nat", r"\[1, 1, 1, 1, 1\]")):
        (hub / "config.json").write_text(json.dumps(told | {"model_type": model_type}))
        with pytest.raises(ConversionError, match=rf"config\.json.*{expected}.*dinat_mini.*\[1, 1, 2, 1, 1\]"):
            convert(hub, tmp_path / "y", model="dinat_mini", arguments=small | dilated)
    assert not (tmp_path / "y").exists()


def test_the_model_of_a_folder_of_transformers(tmp_path: Path) -> None:
    """By its config.json; and of a file that has the name of a published one."""
    config = {"depths": [3, 4, 6, 5], "embed_dim": 64, "kernel_size": 7}
    dilations = [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]
    file = tmp_path / "config.json"
    assert converting._of_transformers({"model_type": "nat", **config}, file) == "nat_mini"
    assert converting._of_transformers({"model_type": "dinat", "dilations": dilations, **config}, file) == "dinat_mini"
    van = {"model_type": "van", "hidden_sizes": [64, 128, 320, 512], "depths": [3, 3, 12, 3]}
    assert converting._of_transformers(van, file) == "van_b2"
    assert converting._of_transformers({"model_type": "nat", **config, "embed_dim": 8}, file) is None
    hub = write(tmp_path / "hub", "pytorch_model.bin", {"a": torch.ones(1)}).parent
    (hub / "config.json").write_text(json.dumps({"model_type": "nat", **config, "embed_dim": 8}))
    with pytest.raises(ValueError, match=r"nat.*--model.*nat_mini, nat_small"):
        converting._locate(hub, None)
    with pytest.raises(ValueError, match=r"x\.pth.*--model"):
        converting._locate(write(tmp_path, "x.pth", {"a": torch.ones(1)}), None)
    named = write(tmp_path, "dinat_mini_in1k_224.pth", {"a": torch.ones(1)})
    assert converting._locate(named, None).architecture == "dinat_mini"


CLOSE = {family(name): name for name in reversed(foveal.list_models()) if not name.startswith("test_")}


@pytest.mark.parametrize(
    "name", ["dinat_mini", *(pytest.param(n, marks=pytest.mark.slow) for n in CLOSE.values() if n != "dinat_mini")]
)
def test_a_file_of_unknown_origin_names_the_closest_models(tmp_path: Path, name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=7).state_dict()
    state = {key: torch.zeros(x.shape, dtype=x.dtype) for key, x in state.items()}
    if name == "dinat_mini":
        with pytest.raises(ValueError, match=r"--model.*: dinat_mini \(251 of 253 tensors\), nat_mini \(251 of 253"):
            convert(write(tmp_path, "x.pth", state), tmp_path / "out")
        return
    near = [each.split()[0] for each in closest(state)]
    assert name in near
    assert {family(each) for each in near} <= {family(name), "NAT", "DiNAT", "DiNAT_s", "isotropic"}


def test_a_training_run(tmp_path: Path) -> None:
    arguments = {"in_chans": 1, "kernel_size": 5}
    model = timm.create_model(NAME, num_classes=3, **arguments).eval()
    model.pretrained_cfg |= {"input_size": (1, 40, 40), "mean": (0.5,), "std": (0.5,)}
    labels = {"label_names": ["a", "b", "c"]}
    save_for_hf(
        model, str(tmp_path / "run" / "best"), model_config=labels, model_args=arguments, safe_serialization=True
    )
    done = convert(tmp_path / "run", tmp_path / "ours")
    config = json.loads((done.folder / "config.json").read_text())
    assert config["label_names"] == list("abc")
    assert config["pretrained_cfg"]["mean"] == [0.5]
    loaded = foveal.load(done.folder)
    same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert all(check.passed for check in verify(done.folder))
    # what is made of it has another file, and no record of this one
    exported = export(done.folder, "safetensors", tmp_path / "exported").folder
    assert "conversion" not in json.loads((exported / "config.json").read_text())


@pytest.mark.parametrize("name", [name for name in foveal.list_models() if name.startswith("test_foveal_")])
def test_timms_own_ways(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """save_for_hf, local-dir: and, without a network, push_to_hf_hub: what would be uploaded is the model."""
    model = timm.create_model(name, num_classes=4)
    model.load_state_dict(filler.of(model))
    model.eval()
    save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(output_of(loaded), output_of(model))
    done = convert(tmp_path / "saved", tmp_path / "converted")
    assert torch.equal(output_of(foveal.load(done.folder)), output_of(model))

    class Api:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return argparse.Namespace(repo_id=f"someone/{repo_id}")

        def file_exists(self, **_: Any) -> bool:
            return False

        def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return repo_id

    def no_network(*_: Any) -> None:
        raise AssertionError("a connection is made")

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    monkeypatch.setattr("socket.socket.connect", no_network)
    assert push_to_hf_hub(foveal.load(done.folder), "mine", safe_serialization=True) == "someone/mine"
    assert {path.name for path in (tmp_path / "uploaded").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert torch.equal(output_of(foveal.load(tmp_path / "uploaded")), output_of(model))


CARD = {"model", "published score", "parameters", "preprocessing", "licence of the weights", "licence of the code"}
CARD |= {"code of the authors", "address", "sha256", "format"}


def test_a_card_of_every_published_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counted = {}
    monkeypatch.setattr(cards, "profile", lambda name: counted.setdefault(name, Profile(1_000, 10**9, (3, 8, 8))))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, checkpoint in checkpoints().items():
        facts = cards.facts(checkpoint)
        assert set(facts) >= CARD | (
            {"GMACs", "input", "classes"} if checkpoint.task == "classify" else {"foveal convert"}
        )
        text = cards.published_card(checkpoint)
        assert text.startswith(f"# {name}\n")
        assert "None" not in text
        scores = (f"{score:g}" for score in checkpoint.score.values())
        for value in (*checkpoint.addresses, *scores, checkpoint.weights_licence):
            assert value in text, name
    # what was recorded at the first download
    checkpoint = checkpoints()["nat_mini.in1k"]
    assert cards.facts(checkpoint)["sha256"].startswith("none published")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "nat_mini.pth.sha256").write_text("ab12  nat_mini.pth\n")
    assert cards.facts(checkpoint)["sha256"].startswith("ab12 ")
    assert cards.facts(checkpoints()["halo26t.a1h_in1k"])["sha256"].startswith("3083328c ...")


def test_the_command(tmp_path: Path) -> None:
    def call(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(each) for each in arguments])

    state = filler.of(timm.create_model(NAME, num_classes=3, kernel_size=5))
    file = write(tmp_path / "x", "x.pth", {"state_dict": state, "model_ema": state})
    options = ("--model", NAME, "--output", tmp_path / "ours", "--set", "kernel_size=5", "--raw")
    result = call("convert", file, *options)
    assert result.exit_code == 0, result.stderr
    assert re.search(f"x.pth: .*raw.*{cards.KEY_FORMATS['foveal']}", result.stdout)
    result = call("verify", tmp_path / "ours")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["ok"] * 4
    assert call("info", tmp_path / "ours", "--card").stdout == (tmp_path / "ours" / "README.md").read_text()
    result = call("convert", file, *options)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--force" in result.stderr
    result = call("convert", file, "--model", NAME, "--output", tmp_path / "y", "--set", "kernel_size")
    assert (result.exit_code, "--set takes KEY=VALUE" in result.stderr) == (2, True)
    info = call("info", "nat_mini.maskrcnn_coco")
    assert "box AP 46.5, mask AP 41.7" in info.stdout
    card = call("info", "dinat_tiny.in1k").stdout
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in card.splitlines()[1:])
    assert rows.keys() >= CARD | {"GMACs", "mirrors"}
    assert rows["published score"] == "top-1 82.7"
    assert rows["parameters"] == "27,901,582"
    card = call("info", "dinat_tiny.in1k", "--markdown").stdout
    assert card.startswith("# dinat_tiny.in1k\n\n| | |\n|---|---|\n| model | `dinat_tiny` |\n")
    assert 'timm.create_model("dinat_tiny.in1k", pretrained=True)' in card
    assert (
        "foveal convert CARETrans_S0.pth.tar --model care_s0.in1k" in call("info", "care_s0.in1k", "--markdown").stdout
    )
    result = call("info", "dinat_tiny", "--markdown")
    assert (result.exit_code, "NAME.TAG" in result.stderr) == (2, True)
    told = json.loads(call("info", "care_s1.in1k", "--json").stdout)
    assert told["card"]["published score"] == "top-1 80.1"
    facts = told["published"]["in1k"]
    assert (facts["score"], facts["licence_of_weights"]) == ({"top1": 80.1}, "none stated")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("nat_mini", "nat_mini.in1k"),
        ("dinat_mini", "dinat_mini.in1k"),
        ("dinat_s_tiny", "dinat_s_tiny.in1k"),
        ("overlock_xt", "overlock_xt.in1k"),
        ("care_s0", "care_s0.in1k"),
    ],
)
def test_the_names_and_shapes_that_authors_publish(case: str, name: str, tmp_path: Path) -> None:
    """At full size, from the descriptions of the authors' models beside the golden outputs."""
    state = filler.published(case)
    done = convert(write(tmp_path / "x", "model.pth", state), tmp_path / "ours", model=name)
    same(restore(done.folder), state)
    assert [check for check in verify(done.folder) if not check.passed] == []
