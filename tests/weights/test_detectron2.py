"""Models of detectron2 after conversion, against code that only uses detectron2's names and formulas."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveal
from foveal.heads.build import build_backbone, build_detector
from foveal.heads.mask2former import query_outputs
from foveal.heads.necks.published import load_published
from foveal.weights import cards
from foveal.weights.convert import ConversionError, convert, restore
from foveal.weights.manifest import checkpoints
from foveal.weights.verify import verify

from . import filler
from .test_dense import a3fpn_state, close

NAME = "test_foveal_dinat"
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image of the fingerprints: those of the models' own sizes are for files that somebody will use."""
    monkeypatch.setattr("foveal.weights.convert._fingerprint_size", lambda *_: (3, 64, 64))


def write(folder: Path, state: State) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"model": state, "iteration": 90000}, folder / "model_final.pth")
    return folder / "model_final.pth"


def check_folder(folder: Path, state: State, left_out: tuple[str, ...] = ()) -> None:
    back = restore(folder)
    assert list(back) == [name for name in state if name not in left_out]
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    assert all(check.passed for check in verify(folder))


# ---- Mask2Former (arXiv 2112.01527), from the names of its authors' parameters

HEADS, WIDTH, HIDDEN, MASKS, ENCODERS, DECODERS, QUERIES, CLASSES = 2, 32, 48, 40, 2, 4, 7, 5


def mask2former_spec(channels: tuple[int, ...], hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    """The names and shapes of their pixel decoder and queries, all widths different."""
    spec: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        spec[f"{name}.weight"] = shape
        if bias:
            spec[f"{name}.bias"] = shape[:1]

    pixels, queries = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    for i, width in enumerate(channels[:0:-1]):
        add(f"{pixels}.input_proj.{i}.0", WIDTH, width, 1, 1)
        add(f"{pixels}.input_proj.{i}.1", WIDTH)
    spec[f"{pixels}.transformer.level_embed"] = (3, WIDTH)
    for i in range(ENCODERS):
        layer = f"{pixels}.transformer.encoder.layers.{i}"
        points = HEADS * 3 * 4
        for name, outputs in (("sampling_offsets", 2 * points), ("attention_weights", points)):
            add(f"{layer}.self_attn.{name}", outputs, WIDTH)
        add(f"{layer}.self_attn.value_proj", WIDTH, WIDTH)
        add(f"{layer}.self_attn.output_proj", WIDTH, WIDTH)
        add(f"{layer}.norm1", WIDTH)
        add(f"{layer}.linear1", 24, WIDTH)
        add(f"{layer}.linear2", WIDTH, 24)
        add(f"{layer}.norm2", WIDTH)
    add(f"{pixels}.mask_features", MASKS, WIDTH, 1, 1)
    add(f"{pixels}.adapter_1", WIDTH, channels[0], 1, 1, bias=False)
    add(f"{pixels}.adapter_1.norm", WIDTH)
    add(f"{pixels}.layer_1", WIDTH, WIDTH, 3, 3, bias=False)
    add(f"{pixels}.layer_1.norm", WIDTH)
    for kind, own in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn")):
        for i in range(DECODERS):
            layer = f"{queries}.transformer_{kind}_layers.{i}"
            spec[f"{layer}.{own}.in_proj_weight"] = (3 * hidden, hidden)
            spec[f"{layer}.{own}.in_proj_bias"] = (3 * hidden,)
            add(f"{layer}.{own}.out_proj", hidden, hidden)
            add(f"{layer}.norm", hidden)
    for i in range(DECODERS):
        add(f"{queries}.transformer_ffn_layers.{i}.linear1", 20, hidden)
        add(f"{queries}.transformer_ffn_layers.{i}.linear2", hidden, 20)
        add(f"{queries}.transformer_ffn_layers.{i}.norm", hidden)
    add(f"{queries}.decoder_norm", hidden)
    add(f"{queries}.query_feat", QUERIES, hidden, bias=False)
    add(f"{queries}.query_embed", QUERIES, hidden, bias=False)
    add(f"{queries}.level_embed", 3, hidden, bias=False)
    if hidden != WIDTH:
        for i in range(3):
            add(f"{queries}.input_proj.{i}", hidden, WIDTH, 1, 1)
    add(f"{queries}.class_embed", CLASSES + 1, hidden)
    for i, outputs in enumerate((hidden, hidden, MASKS)):
        add(f"{queries}.mask_embed.layers.{i}", outputs, hidden)
    spec["criterion.empty_weight"] = (CLASSES + 1,)
    return spec


class Reference:
    """What the parameters mean: section 3 of the paper; its encoder is that of arXiv 2010.04159, on three maps."""

    def __init__(self, state: State, a3fpn: nn.Module | None = None) -> None:
        self.state = {name.removeprefix("sem_seg_head."): x.double() for name, x in state.items()}
        self.a3fpn = a3fpn  # arXiv 2604.10210, in place of the FPN

    def pair(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.state[f"{name}.weight"], self.state.get(f"{name}.bias")

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self.pair(name))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self.pair(name))

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.pair(name)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def group_norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, *self.pair(name))

    @staticmethod
    def position(rows: int, columns: int, width: int) -> Tensor:
        """``[rows, columns, width]``: half for the row, half for the column, sines and cosines in turn."""
        frequency = 10000.0 ** (-torch.arange(0, width // 2, 2, dtype=torch.double) / (width // 2))
        parts = []
        for count in (rows, columns):
            place = 2 * math.pi * torch.arange(1, count + 1, dtype=torch.double) / (count + 1e-6)
            angle = place[:, None] * frequency
            parts.append(torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
        down, along = parts
        return torch.cat([down[:, None].expand(-1, columns, -1), along[None].expand(rows, -1, -1)], -1)

    def deformable(self, name: str, x: Tensor, place: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Each place samples four points on each map, for each head, around where it is itself."""
        batch, total, width = x.shape
        query = x + place
        value = self.linear(f"{name}.value_proj", x).view(batch, total, HEADS, width // HEADS)
        offsets = self.linear(f"{name}.sampling_offsets", query).view(batch, total, HEADS, 3, 4, 2)
        shares = self.linear(f"{name}.attention_weights", query).view(batch, total, HEADS, 12).softmax(-1)
        own = torch.cat(
            [
                torch.stack(torch.meshgrid((torch.arange(r) + 0.5) / r, (torch.arange(c) + 0.5) / c, indexing="ij"), -1)
                .flip(-1)
                .flatten(0, 1)
                for r, c in sizes
            ]
        ).double()  # x, y from 0 to 1
        result, start = torch.zeros(batch, total, HEADS, width // HEADS, dtype=x.dtype), 0
        for level, (rows, columns) in enumerate(sizes):
            level_map = value[:, start : start + rows * columns].view(batch, rows, columns, HEADS, -1)
            start += rows * columns
            points = own[:, None, None] + offsets[:, :, :, level] / torch.tensor([columns, rows])
            for head in range(HEADS):
                sampled = F.grid_sample(
                    level_map[:, :, :, head].permute(0, 3, 1, 2), 2 * points[:, :, head] - 1, align_corners=False
                )  # [batch, channels, total, 4]
                weights = shares[:, :, head, 4 * level : 4 * level + 4]
                result[:, :, head] += torch.einsum("bctp,btp->btc", sampled, weights)
        return self.linear(f"{name}.output_proj", result.flatten(2))

    def pixels(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps at strides 4 to 32 to the masks' embeddings and the three maps that are attended to, coarsest first."""
        name = "pixel_decoder"
        tokens, places, sizes = [], [], []
        for i, x in enumerate(maps[:0:-1]):
            x = self.group_norm(f"{name}.input_proj.{i}.1", self.conv(f"{name}.input_proj.{i}.0", x))
            sizes.append((x.shape[2], x.shape[3]))
            tokens.append(x.flatten(2).mT)
            level = self.state[f"{name}.transformer.level_embed"][i]
            places.append(self.position(*sizes[-1], WIDTH).flatten(0, 1) + level)
        x, place = torch.cat(tokens, 1), torch.cat(places)
        for i in range(ENCODERS):
            layer = f"{name}.transformer.encoder.layers.{i}"
            x = self.norm(f"{layer}.norm1", x + self.deformable(f"{layer}.self_attn", x, place, sizes))
            hidden = self.linear(f"{layer}.linear1", x).relu()
            x = self.norm(f"{layer}.norm2", x + self.linear(f"{layer}.linear2", hidden))
        split = x.split([r * c for r, c in sizes], 1)
        seen = [part.mT.unflatten(2, size) for part, size in zip(split, sizes, strict=True)]
        if self.a3fpn is not None:
            *seen, fine = self.a3fpn([*seen, maps[0]])
            return self.conv(f"{name}.mask_features", fine), seen
        fine = self.group_norm(f"{name}.adapter_1.norm", self.conv(f"{name}.adapter_1", maps[0]))
        fine = fine + F.interpolate(seen[-1], fine.shape[-2:], mode="bilinear", align_corners=False)
        fine = self.group_norm(f"{name}.layer_1.norm", self.conv(f"{name}.layer_1", fine)).relu()
        return self.conv(f"{name}.mask_features", fine), seen

    def attention(self, name: str, query: Tensor, key: Tensor, value: Tensor, hidden_places: Tensor | None) -> Tensor:
        """``hidden_places`` ``[B, queries, keys]``: those that a query does not see."""
        weights, biases = self.state[f"{name}.in_proj_weight"].chunk(3), self.state[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if hidden_places is not None:
            logits = logits.masked_fill(hidden_places[:, None], -math.inf)
        return self.linear(f"{name}.out_proj", (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def predictions(self, x: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm("predictor.decoder_norm", x)
        mask = x
        for i in range(3):
            mask = self.linear(f"predictor.mask_embed.layers.{i}", mask.relu() if i else mask)
        return self.linear("predictor.class_embed", x), torch.einsum("bqc,bchw->bqhw", mask, embeddings)

    def __call__(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the queries' classes and masks."""
        embeddings, seen = self.pixels([x.double() for x in maps])
        batch, position = len(embeddings), self.state["predictor.query_embed.weight"]
        x = self.state["predictor.query_feat.weight"].expand(batch, -1, -1)
        keys, places = [], []
        for i, level_map in enumerate(seen):
            if f"predictor.input_proj.{i}.weight" in self.state:
                level_map = self.conv(f"predictor.input_proj.{i}", level_map)
            keys.append(level_map.flatten(2).mT + self.state["predictor.level_embed.weight"][i])
            places.append(self.position(*level_map.shape[-2:], level_map.shape[1]).flatten(0, 1))
        for i in range(DECODERS):
            level = i % 3
            _, masks = self.predictions(x, embeddings)
            masks = F.interpolate(masks, seen[level].shape[-2:], mode="bilinear", align_corners=False)
            outside = masks.flatten(2) < 0
            outside &= ~outside.all(-1, keepdim=True)
            name = f"predictor.transformer_cross_attention_layers.{i}"
            key = keys[level] + places[level]
            found = self.attention(f"{name}.multihead_attn", x + position, key, keys[level], outside)
            x = self.norm(f"{name}.norm", x + found)
            name = f"predictor.transformer_self_attention_layers.{i}"
            found = self.attention(f"{name}.self_attn", x + position, x + position, x, None)
            x = self.norm(f"{name}.norm", x + found)
            name = f"predictor.transformer_ffn_layers.{i}"
            hidden = self.linear(f"{name}.linear1", x).relu()
            x = self.norm(f"{name}.norm", x + self.linear(f"{name}.linear2", hidden))
        return self.predictions(x, embeddings)


def mask2former_state(prefix: str = "backbone.", hidden: int = HIDDEN) -> tuple[State, nn.Module]:
    """A file's tensors, and the backbone among them."""
    body = timm.create_model(NAME, features_only=True, out_norm=True).eval()
    state = filler.of(body.model, prefix)
    body.model.load_state_dict({name.removeprefix(prefix): x for name, x in state.items()})
    return state | filler.state_dict(mask2former_spec(tuple(body.feature_info.channels()), hidden)), body.double()


@pytest.fixture
def mask2former() -> None:
    pytest.importorskip("transformers", reason="mask2former needs transformers")
    pytest.importorskip("scipy", reason="mask2former needs scipy")


@pytest.mark.parametrize(
    "hidden",
    [pytest.param(HIDDEN, marks=pytest.mark.slow, id="input projections"), pytest.param(WIDTH, id="one width")],
)
@torch.no_grad()
def test_mask2former_for_classes(hidden: int, mask2former: None, tmp_path: Path) -> None:
    """The logits of its queries, and what each pixel is."""
    state, body = mask2former_state(hidden=hidden)
    done = convert(write(tmp_path / "x", state), tmp_path / "ours", model=NAME, arguments={"task": "segment"})
    assert done.record["keys"] == "detectron2"
    assert done.record["tensors"] == len(state)
    assert done.model == f"mask2former on {NAME} with fpn, {CLASSES} classes"
    check_folder(done.folder, state)

    model = foveal.load(done.folder).double()
    images = torch.rand(2, 3, 70, 90, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    x = F.pad((images - model.mean) / model.std, (0, 6, 0, 26))
    classes, masks = Reference(state)(body(x))
    assert (masks > 0).double().mean() > 0.05
    assert (masks < 0).double().mean() > 0.05
    for got, want in zip(query_outputs(model.head, x), (classes, masks), strict=True):
        close(got[-1], want)
    masks = F.interpolate(masks, (96, 96), mode="bilinear", align_corners=False)[..., :70, :90].sigmoid()
    close(model(images).exp(), torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks))


@torch.no_grad()
def test_mask2former_for_objects(mask2former: None, tmp_path: Path) -> None:
    """The same weights in the detector; names as beside a neck, and the statistics that old files hold."""
    state, body = mask2former_state("backbone.bottom_up.")
    mean, std = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
    state |= {name: torch.tensor(x).view(3, 1, 1) for name, x in (("pixel_mean", mean), ("pixel_std", std))}
    file = write(tmp_path / "x", state)
    with pytest.raises(ConversionError, match=r"pixel_mean.*0\.392.*\[0\.4, "):
        told = {"task": "detect", "mean": [0.4, 0.4, 0.4]}
        convert(file, tmp_path / "ours", model=NAME, arguments=told)
    done = convert(file, tmp_path / "ours", model=NAME, arguments={"task": "detect"})
    assert done.record["dropped"] == ["pixel_mean", "pixel_std"]
    check_folder(done.folder, state, ("pixel_mean", "pixel_std"))
    model = foveal.load(done.folder)
    assert model.arguments["mean"] == pytest.approx([value / 255 for value in mean])
    assert model.arguments["std"] == pytest.approx([value / 255 for value in std])
    x = torch.randn(1, 3, 64, 96, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for got, want in zip(query_outputs(model.double().detector.head, x), Reference(state)(body(x)), strict=True):
        close(got[-1], want)


@torch.no_grad()
def test_mask2former_with_a3fpn(mask2former: None, tmp_path: Path) -> None:
    """As the released ones: one column, on the encoder's maps and the backbone's finest."""
    from ..heads.published_names import from_published
    from ..heads.test_a3fpn import published_spec

    state, body = mask2former_state()
    width = body.feature_info.channels()[0]
    channels, groups = (width, WIDTH, WIDTH, WIDTH), [width // 16, 2, 2, 2]
    config = dict(in_channels=channels, out_channels=WIDTH, squeeze=[1] * 4, num_repblocks=1, expansion=4)
    config |= dict(compress_channel=[max(each, 8) for each in groups], group_num=groups, dcn_groups=groups)
    config |= dict(using_resampling=[True] * 3, dcn_config={"dcn_output_bias": True, "offset_scale": 2.0})
    place = "sem_seg_head.pixel_decoder.a3fpn."
    own = filler.state_dict({place + name: shape for name, shape in published_spec(config, first_height=4).items()})
    state = {name: x for name, x in state.items() if not re.search(r"\.(adapter|layer)_1\.", name)} | own
    done = convert(write(tmp_path / "x", state), tmp_path / "ours", model=NAME, arguments={"task": "segment"})
    assert done.model == f"mask2former on {NAME} with a3fpn, {CLASSES} classes"
    check_folder(done.folder, state)
    model = foveal.load(done.folder).double()
    x = torch.randn(1, 3, 64, 96, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    neck = from_published(config, own).eval().double()
    for got, want in zip(query_outputs(model.head, x), Reference(state, neck)(body(x)), strict=True):
        close(got[-1], want)


def test_mask2former_by_the_manifest(mask2former: None, tmp_path: Path) -> None:
    """Of a published file is known what it is for, and how its windows are dilated."""
    model = "dinat_large_384_11x11"
    small: dict[str, Any] = dict(embed_dim=16, num_heads=[1, 2, 4, 8], depths=[1, 1, 1, 1], dilations=[[1]] * 4)
    body = timm.create_model(model, features_only=True, out_norm=True, **small)
    state = filler.of(body.model, "backbone.")
    state |= filler.state_dict(mask2former_spec(tuple(body.feature_info.channels())))

    def published(name: str, classes: int) -> Path:
        shapes = {key: x.shape for key, x in state.items() if re.search(r"class_embed|empty_weight", key)}
        own = {key: (classes + 1, *shape[1:]) for key, shape in shapes.items()}
        return write(tmp_path / "x", state | filler.state_dict(own)).rename(tmp_path / "x" / f"{name}.pth")

    file = published("of_mine", 5)
    with pytest.raises(ConversionError, match=r"task=segment.*task=detect"):
        convert(file, tmp_path / "ours", model=model, arguments=small)
    file = published("mask2former_dinat_large_coco_panoptic", 133)
    done = convert(file, tmp_path / "ours", model=model, arguments=small)
    assert cards.SEMANTIC_ONLY in done.model
    card = (done.folder / "README.md").read_text()
    assert "PQ 58.5" in card
    assert cards.SEMANTIC_ONLY in card
    assert foveal.load(done.folder).config["task"] == "segment"
    file = published("mask2former_dinat_large_cityscapes_panoptic", 19)
    unsure = convert(file, tmp_path / "unsure", model=model, arguments=small)
    assert "dilations" in unsure.lines()[-1]
    # the sizes of the images that objects are found in
    named = f"{model}.mask2former_cityscapes_instance"
    with pytest.raises(ValueError, match=r"cityscapes_panoptic.*cityscapes_instance"):
        convert(file, tmp_path / "objects", model=named, arguments=small)
    file = published("mine", 8)
    for own, expected in (({}, (1024, 2048)), ({"min_size": 96, "max_size": 128}, (96, 128))):
        found = convert(file, tmp_path / f"objects {expected[0]}", model=named, arguments=small | own)
        transform = foveal.load(found.folder).detector.transform
        assert (*transform.min_size, transform.max_size) == expected
    file = published("mask2former_dinat_large_coco_panoptic", 133)
    with pytest.raises(ValueError, match=r"task.*'panoptic'"):
        convert(file, tmp_path / "more", model=model, arguments=small | {"task": "panoptic"})


# ---- Faster and Mask R-CNN: mmdetection's with the same conventions, under detectron2's names

RESNET = (  # mmdetection's name, detectron2's
    (r"^backbone\.conv1\.", "backbone.bottom_up.stem.conv1."),
    (r"^backbone\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
    (r"^backbone\.layer(\d)\.", lambda found: f"backbone.bottom_up.res{int(found[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
REGIONS = (
    (r"^rpn_head\.rpn_conv\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn_head\.rpn_cls\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn_head\.rpn_reg\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^roi_head\.bbox_head\.shared_fcs\.(\d)\.", lambda found: f"roi_heads.box_head.fc{int(found[1]) + 1}."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.mask_head\.convs\.(\d)\.conv\.", lambda found: f"roi_heads.mask_head.mask_fcn{int(found[1]) + 1}."),
    (r"^roi_head\.mask_head\.upsample\.", "roi_heads.mask_head.deconv."),
    (r"^roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_head.predictor."),
)
FPN = (
    (r"^neck\.lateral_convs\.(\d)\.conv\.", lambda found: f"backbone.fpn_lateral{int(found[1]) + 2}."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", lambda found: f"backbone.fpn_output{int(found[1]) + 2}."),
)
SMALL = dict(layers=[1, 2, 1, 1], channels=[4, 8, 16, 32])
MEAN = [103.53, 116.28, 123.675]  # blue, green, red


def renamed(state: State, *tables: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]) -> State:
    result = {}
    for name, tensor in state.items():
        for table in tables:
            for theirs, ours in table:
                name = re.sub(theirs, ours, name)
        result[name] = tensor
    return result


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., nn.Module]]:
    for module in ("mmengine", "mmcv", "mmdet"):
        pytest.importorskip(module, reason="needs mmdet 3.3 with mmengine and mmcv", exc_type=ImportError)
    from ..heads.test_mmdet import MODELS, mmengine, read, shrink  # isort: skip  (before mmdet, which lacks parts)
    from mmdet.models.backbones import ResNet

    blocks = (ResNet.arch_settings[50][0], tuple(SMALL["layers"]))
    monkeypatch.setitem(ResNet.arch_settings, 50, blocks)

    def build(first: bool, neck: dict[str, Any], masks: bool) -> nn.Module:
        config = shrink(read("mask_rcnn").model.to_dict())
        config["backbone"] = dict(
            type="ResNet", depth=50, stem_channels=64, base_channels=4, style="caffe" if first else "pytorch"
        )
        config["neck"] = dict(in_channels=[16, 32, 64, 128], out_channels=16) | neck
        if not masks:
            del config["roi_head"]["mask_head"], config["roi_head"]["mask_roi_extractor"]
            config["type"] = "FasterRCNN"
        model = MODELS.build(mmengine.ConfigDict(config))
        state = filler.of(model)
        state["backbone.conv1.weight"] /= 60  # of images from 0 to 255
        model.load_state_dict(state)
        return model.eval()

    yield build


def detectron2_state(original: nn.Module) -> State:
    """With frozen norms in the backbone, which do not count batches."""
    state = {
        name: x
        for name, x in original.state_dict().items()
        if not name.startswith("neck.a3fpn") and not (name.startswith("backbone.") and "num_batches" in name)
    }
    return renamed(state, RESNET, REGIONS, FPN)


def same_detections(original: nn.Module, model: nn.Module, image: Tensor, x: Tensor) -> None:
    """In float64: two boxes whose scores are nearly alike must come in the same order."""
    original, model = deepcopy(original).double(), deepcopy(model).double()
    image, x = image.double(), x.double()
    original.roi_head.mask_head = None  # which are pasted in float32
    from mmdet.structures import DetDataSample

    size = tuple(image.shape[-2:])
    shapes = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), batch_input_shape=size)
    original.roi_head.test_cfg.update(score_thr=0.05, max_per_img=100)
    original.rpn_head.test_cfg.update(nms_pre=1000, max_per_img=1000)
    want = original.predict(x, [DetDataSample(metainfo=shapes)], rescale=False)[0].pred_instances
    transform = model.detector.transform
    transform.min_size, transform.max_size = (size[0],), size[1]
    (got,) = model([image])
    assert len(want.scores) > 5
    close(got["scores"], want.scores)
    assert torch.equal(got["labels"], want.labels)
    assert (got["boxes"] - want.bboxes).abs().max() < 1e-2  # pixels


@torch.no_grad()
def test_mask_rcnn_on_a3fpn(theirs: Callable[..., nn.Module], tmp_path: Path) -> None:
    """As the released one: images in BGR from 0 to 255, a ResNet that strides in its first convolutions."""
    original = theirs(True, dict(type="A3FPN", extra_levels="pool"), True)
    neck = a3fpn_state((16, 32, 64, 128), "backbone.a3fpn.")
    load_published(original.neck, neck)
    state = {name: x for name, x in detectron2_state(original).items() if not name.startswith("neck.")} | neck
    told: dict[str, Any] = dict(stride_in_1x1=True, channel_order="bgr", std=[1 / 255] * 3)
    told["mean"] = [value / 255 for value in reversed(MEAN)]
    done = convert(write(tmp_path / "x", state), tmp_path / "ours", model="resnet50", arguments=SMALL | told)
    assert done.record["tensors"] == len(state)
    assert re.fullmatch(r"mask_rcnn .*resnet50 .*a3fpn.*\b3 classes", done.model)
    assert any("BGR" in line for line in done.lines())
    check_folder(done.folder, state)

    model = foveal.load(done.folder)
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    x = 255 * image.flip(0)[None] - torch.tensor(MEAN).view(3, 1, 1)  # as their preprocessor gives it
    mean, std = (torch.tensor(model.arguments[key]).view(3, 1, 1) for key in ("mean", "std"))
    for got, want in zip(model.backbone(((image - mean) / std)[None]).values(), original.extract_feat(x), strict=True):
        close(got, want)
    same_detections(original, model, image, x)


@torch.no_grad()
def test_faster_rcnn_on_an_fpn(theirs: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Images in RGB, a ResNet that strides in its second convolutions, also alone."""
    original = theirs(False, dict(type="FPN", num_outs=5), False)
    state = detectron2_state(original)
    told: dict[str, Any] = dict(stride_in_1x1=False, channel_order="rgb", mean=[0.4, 0.5, 0.6], std=[1 / 255] * 3)
    file = write(tmp_path / "x", state)
    done = convert(file, tmp_path / "ours", model="resnet50", arguments=SMALL | told)
    assert re.fullmatch(r"faster_rcnn .*resnet50 .*\bfpn.*\b3 classes", done.model)
    assert not any("BGR" in line for line in done.lines())
    check_folder(done.folder, state)
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    x = 255 * (image - torch.tensor(told["mean"]).view(3, 1, 1))[None]
    same_detections(original, foveal.load(done.folder), image, x)

    timms = {"out_indices": (1, 2, 3, 4)}
    body = convert(file, tmp_path / "body", model="resnet50", arguments=SMALL | told | timms, backbone=True)
    assert body.record["heads"] == {
        **{f"fpn_{kind}{level}": 2 for level in range(2, 6) for kind in ("lateral", "output")},
        "proposal_generator": 6,
        "roi_heads": 8,
    }
    check_folder(body.folder, {name: x for name, x in state.items() if ".bottom_up." in name})
    network = foveal.load(body.folder)
    assert network.pretrained_cfg["mean"] == told["mean"]
    for got, want in zip(network(x), original.backbone(x), strict=True):
        close(got, want)


def old_file(folder: Path, channels: int, stored: dict[str, list[float]], **change: Tensor) -> Path:
    """A Faster R-CNN of the detectron2 of 2019, which stores anchors and statistics beside what is learned."""
    heads: dict[str, Any] = dict(neck_kwargs={"out_channels": 16}, head_kwargs={"box_width": 8})
    model = build_detector(NAME, "faster_rcnn", num_classes=2, in_chans=channels, **heads)
    state = filler.of(model.backbone.body.model, "backbone.bottom_up.")
    spec: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int) -> None:
        spec.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    for i, width in enumerate(model.backbone.body_spec.channels):
        add(f"backbone.fpn_lateral{i + 2}", 16, width, 1, 1)
        add(f"backbone.fpn_output{i + 2}", 16, 16, 3, 3)
    add("proposal_generator.rpn_head.conv", 16, 16, 3, 3)
    add("proposal_generator.rpn_head.objectness_logits", 3, 16, 1, 1)
    add("proposal_generator.rpn_head.anchor_deltas", 12, 16, 1, 1)
    add("roi_heads.box_head.fc1", 8, 16 * 7 * 7)
    add("roi_heads.box_head.fc2", 8, 8)
    add("roi_heads.box_predictor.cls_score", 3, 8)
    add("roi_heads.box_predictor.bbox_pred", 8, 8)
    state |= filler.state_dict(spec) | {f"pixel_{key}": torch.tensor(x).view(-1, 1, 1) for key, x in stored.items()}
    for level in range(5):  # a size for each, height over width 1 / 2, 1 and 2
        sides = [(32 * 2**level / ratio**0.5, 32 * 2**level * ratio**0.5) for ratio in (0.5, 1.0, 2.0)]
        anchors = torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in sides])
        state[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = anchors
    return write(folder, state | change)


def test_an_old_file_of_detectron2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors and statistics are compared and left behind; the statistics of a published one are the manifest's."""
    bgr = {"mean": [103.53, 116.28, 123.675], "std": [57.375, 57.12, 58.395]}
    told = {"channel_order": "bgr"}
    file = old_file(tmp_path / "x", 3, bgr)
    done = convert(file, tmp_path / "ours", model=NAME, arguments=told)
    anchors = [f"proposal_generator.anchor_generator.cell_anchors.{level}" for level in range(5)]
    assert done.record["dropped"] == ["pixel_mean", "pixel_std", *anchors]
    assert all(check.passed for check in verify(done.folder))
    assert foveal.load(done.folder).arguments["mean"] == pytest.approx([0.485, 0.456, 0.406])

    known = dataclasses.replace(checkpoints()["nat_mini.maskrcnn_coco"], model=NAME, tag="mine", channel_order="bgr")
    every = checkpoints() | {known.name: known}
    for module in ("convert", "cards", "verify"):
        monkeypatch.setattr(f"foveal.weights.{module}.checkpoints", lambda: every)
    done = convert(file, tmp_path / "published", model=known.name)
    assert all(check.passed for check in verify(done.folder))
    assert tuple(foveal.load(done.folder).arguments["mean"]) == known.mean
    with pytest.raises(ConversionError, match=r"pixel_mean.*mine.*\[0\.485, 0\.456, 0\.406\]"):
        convert(file, tmp_path / "no", model=known.name, arguments={"channel_order": "rgb"})

    file = old_file(tmp_path / "y", 3, bgr, **{anchors[1]: torch.ones(3, 4)})
    with pytest.raises(ConversionError, match=r"\.1 .*\[\[1\.0, 1\.0, .*\[\[-45\.25"):
        convert(file, tmp_path / "no", model=NAME, arguments=told)
    file = old_file(tmp_path / "z", 3, bgr | {"std": [0.0] * 3})
    with pytest.raises(ConversionError, match=r"std.*\[0\.0, 0\.0, 0\.0\]"):
        convert(file, tmp_path / "no", model=NAME, arguments=told)
    file = old_file(tmp_path / "z", 4, {})
    rest = {"in_chans": 4, "mean": [0.5] * 4, "std": [0.5] * 4}
    with pytest.raises(ConversionError, match=r"bgr.* 4 channels"):
        convert(file, tmp_path / "no", model=NAME, arguments=told | rest)
    assert not (tmp_path / "no").exists()


def resnet_file(folder: Path) -> Path:
    """The backbone under detectron2's names, and something of the heads."""
    net = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4), **SMALL)
    state = renamed(filler.of(net, "backbone."), RESNET)
    return write(folder, state | {"proposal_generator.rpn_head.conv.weight": torch.ones(1)})


def test_what_the_file_does_not_tell(tmp_path: Path) -> None:
    """All of it is asked for at once, and what timm does not have is refused."""
    file = resnet_file(tmp_path / "x")

    def refused(message: str, arguments: dict[str, Any], model: str = "resnet50", **kwargs: Any) -> None:
        with pytest.raises(ConversionError, match=message):
            convert(file, tmp_path / "ours", model=model, arguments=SMALL | arguments, **kwargs)
        assert not (tmp_path / "ours").exists()

    for backbone in (False, True):
        refused(
            r"--set.*stride_in_1x1=.*MODEL\.RESNETS\.STRIDE_IN_1X1.*channel_order=.*INPUT\.FORMAT.*mean=.*"
            r"MODEL\.PIXEL_MEAN.*std=.*MODEL\.PIXEL_STD",
            {},
            backbone=backbone,
        )
    rest: dict[str, Any] = dict(mean=[0.5] * 3, std=[0.2] * 3)
    refused(r"--set.* stride_in_1x1=[^;]*$", dict(rest, channel_order="rgb"))
    refused(r"--set.* channel_order=[^;]*$", dict(rest, stride_in_1x1=True))
    refused("channel_order.*'grb'", dict(rest, channel_order="grb"))
    refused("stride_in_1x1.*'maybe'", dict(rest, stride_in_1x1="maybe"))
    for backbone in (False, True):
        for values in ("hello", [123.675, 116.28, 103.53], [0.5], None):
            refused("mean.* 3 ", dict(rest, mean=values), backbone=backbone)
    refused("std.* 3 ", dict(rest, std=[0.2, 0.2, 0.0]))
    refused(
        "stride_in_1x1.*--backbone",
        dict(rest, stride_in_1x1=True, channel_order="rgb"),
        backbone=True,
    )
    refused(
        "channel_order.*--backbone",
        dict(rest, stride_in_1x1=False, channel_order="bgr"),
        backbone=True,
    )
    # the manifest tells it of published ones
    refused("stride_in_1x1", {}, "resnet50.a3fpn_maskrcnn_coco", backbone=True)
    known = checkpoints()["resnet50.a3fpn_mask2former_coco"]
    done = convert(
        file, tmp_path / "ours", model=known.name, arguments=SMALL | {"out_indices": (1, 2, 3, 4)}, backbone=True
    )
    assert tuple(foveal.load(done.folder).pretrained_cfg["std"]) == known.std


def test_where_a_resnet_strides() -> None:
    """The first convolution of a block leaves out what the second would have seen."""
    nets = [build_backbone("resnet50", stride_in_1x1=first, **SMALL).eval() for first in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    sizes: dict[str, tuple[int, ...]] = {}
    for i, net in enumerate(nets):
        block = net.body.layer2[0]
        block.conv2.register_forward_pre_hook(lambda _, x, i=i: sizes.update({f"{i}": tuple(x[0].shape[2:])}))
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(nets[0](x).values(), nets[1](x).values(), strict=True):
        assert a.shape == b.shape
    assert sizes == {"0": (16, 16), "1": (8, 8)}
    with pytest.raises(ValueError, match=r"stride_in_1x1.*test_foveal_nat"):
        build_backbone("test_foveal_nat", stride_in_1x1=True)


def test_sides_of_boxes_shrink_without_a_bound() -> None:
    """As in detectron2, which limits how much they grow alone; mmdetection limits both."""
    boxes, codes = torch.tensor([[0.0, 0.0, 100.0, 100.0]]), torch.tensor([[0.0, 0.0, -10.0, 10.0]])
    for convention, least in (("detectron2", 100 * math.exp(-10)), ("mmdet", 100 * 16 / 1000)):
        kwargs: dict[str, Any] = dict(neck_kwargs={"out_channels": 16}, head_kwargs={"convention": convention})
        model = build_detector("test_foveal_nat", "faster_rcnn", num_classes=2, **kwargs)
        found = model.detector.rpn.box_coder.decode_single(codes, boxes)[0]
        assert (found[2] - found[0]).item() == pytest.approx(least, rel=1e-3)
        assert (found[3] - found[1]).item() == pytest.approx(100 * 1000 / 16, rel=1e-5)
        corners = model.detector.rpn.anchor_generator.cell_anchors[0][0]  # of ratio 1 / 2
        assert corners.tolist() == pytest.approx([-16 * 2**0.5, -16 / 2**0.5, 16 * 2**0.5, 16 / 2**0.5])
    with pytest.raises(ValueError, match=r"convention.*torchvision, mmdet, detectron2.*'caffe'"):
        build_detector("test_foveal_nat", "faster_rcnn", num_classes=2, head_kwargs={"convention": "caffe"})
    with pytest.raises(ValueError, match=r"convention.*torchvision, mmdet.*'detectron2'"):
        build_detector("test_foveal_nat", "retinanet", num_classes=2, head_kwargs={"convention": "detectron2"})
