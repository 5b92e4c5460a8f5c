"""Segmentation heads against other implementations, published names, and inference against loops."""

import copy
import json
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.fpn import decoder as smp_fpn
from torch import nn
from transformers import ResNetConfig, UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

import foveal
from foveal.heads.backbone import ShapeSpec
from foveal.heads.build import build_segmenter
from foveal.heads.checkpoint import load_dense, save_dense
from foveal.heads.necks import A3FPN, FPN
from foveal.heads.segmentation import (
    FCN,
    Segmenter,
    SemanticFPN,
    UPerNet,
    inference,
    label_map,
    probabilities,
    rescale_size,
    slide_inference,
)
from foveal.heads.segmentation.inference import bounded
from foveal.heads.segmentation.published import from_mmseg, load_heads

from ..variants import HIERARCHICAL
from .published_names import from_published, to_mmseg

GOLDENS = Path(__file__).parents[1] / "goldens"
SPEC = ShapeSpec((8, 12, 16, 20), (4, 8, 16, 32))
SMALL = {"head_kwargs": {"channels": 32}}
QUERIES = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2, encoder_layers=1)
QUERIES |= dict(encoder_feedforward_dim=32, decoder_layers=2, dim_feedforward=32, num_queries=20)


def maps(rows: int = 19, columns: int = 26, spec: ShapeSpec = SPEC) -> list[torch.Tensor]:
    """Maps of an image that no stride divides: each level's sides are halved and rounded up."""
    result = []
    for channels in spec.channels:
        result.append(torch.randn(2, channels, rows, columns))
        rows, columns = -(-rows // 2), -(-columns // 2)
    return result


def shake(module: nn.Module) -> nn.Module:
    """Random weights, statistics of norms included, so that nothing is hidden by a one or a zero."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.2)
    return module.eval()


class Heads(nn.Module):
    """Head and auxiliary head under the names that a `Segmenter` gives them."""

    def __init__(self, spec: ShapeSpec = SPEC, classes: int = 7, channels: int = 24):
        super().__init__()
        self.head = UPerNet(spec, classes, channels=channels)
        self.auxiliary = FCN(spec.channels[2], classes, channels=10)


@pytest.fixture
def theirs() -> nn.Module:
    """transformers' heads, ported from mmsegmentation by its authors."""
    config = UperNetConfig(
        backbone_config=ResNetConfig(), hidden_size=24, num_labels=7, auxiliary_channels=10, auxiliary_num_convs=1
    )
    parts = nn.Module()
    parts.decode_head = UperNetHead(config, list(SPEC.channels))
    parts.auxiliary_head = UperNetFCNHead(config, list(SPEC.channels))
    return shake(parts)


def test_upernet_equals_transformers(theirs):
    ours = Heads().eval()
    assert load_heads(ours, theirs.state_dict()) == []
    x = maps()
    for own, other in ((ours.head, theirs.decode_head), (ours.auxiliary, theirs.auxiliary_head)):
        expected = other(list(x))
        assert own(x).shape == expected.shape
        assert expected.std(dim=(2, 3)).max() > 0.03  # the maps matter, not the biases alone
        assert (own(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(16, 24), (32, 32)])
def test_semantic_fpn_equals_smp(monkeypatch, size):
    """segmentation_models_pytorch's branch upsamples with align_corners=True; everything else is the same."""

    class Aligned:
        @staticmethod
        def interpolate(x, scale_factor, mode, align_corners):
            assert (scale_factor, mode, align_corners) == (2.0, "bilinear", True)
            return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)

    class Same(nn.Module):
        spec = ShapeSpec((40,) * 4, (4, 8, 16, 32))

        def forward(self, maps):
            return maps

    decoder = smp_fpn.FPNDecoder([3, 8, 8, 12, 16, 20], pyramid_channels=40, segmentation_channels=64, dropout=0.0)
    shake(decoder)
    ours = shake(SemanticFPN(Same(), 5, channels=64))
    for level, block in enumerate(reversed(decoder.seg_blocks)):
        for step, other in zip(ours.steps[level], block.block, strict=True):
            for own, same in zip((step.conv, step.norm), other.block, strict=False):
                own.load_state_dict(same.state_dict())
    monkeypatch.setattr(smp_fpn, "F", Aligned)
    x = maps(*size, spec=Same.spec)
    expected = decoder.merge([block(level) for block, level in zip(decoder.seg_blocks, reversed(x), strict=True)])
    assert torch.allclose(ours(x), ours.classifier(expected), atol=1e-5)


def test_smp_decoder_is_the_one_of_its_model():
    """The class compared with above is what users of that library get as FPN."""
    assert isinstance(smp.FPN("resnet18", encoder_weights=None).decoder, smp_fpn.FPNDecoder)


def test_semantic_fpn_on_sizes_that_do_not_double():
    head = SemanticFPN(FPN(SPEC, 32), 5, channels=32)
    assert head(maps(19, 26)).shape == (2, 5, 19, 26)


def test_upernet_with_another_neck():
    head = UPerNet(SPEC, 5, channels=16, neck=lambda spec: FPN(spec, 16))
    assert head.neck.spec.channels == (16,) * 4
    assert head(maps()).shape == (2, 5, 19, 26)
    with pytest.raises(ValueError, match=r"64.*\(4, 8, 16, 32\)"):
        UPerNet(SPEC, 5, channels=16, neck=lambda spec: FPN(spec, 16, "pool"))


# ---- published names


def mmseg_names(levels: int = 4) -> set[str]:
    """What mmsegmentation calls the parameters of UPerNet and its auxiliary FCN head."""
    units = [f"decode_head.psp_modules.{i}.1" for i in range(4)] + ["decode_head.bottleneck"]
    units += [f"decode_head.{kind}_convs.{i}" for kind in ("lateral", "fpn") for i in range(levels - 1)]
    units += ["decode_head.fpn_bottleneck", "auxiliary_head.convs.0"]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{unit}.conv.weight" for unit in units} | {f"{unit}.bn.{part}" for unit in units for part in norm}
    return names | {
        f"{head}.conv_seg.{part}" for head in ("decode_head", "auxiliary_head") for part in ("weight", "bias")
    }


def test_mmseg_names_both_ways():
    own = {f"{name}": tensor for name, tensor in shake(Heads()).state_dict().items()}
    published = to_mmseg(own)
    assert set(published) == mmseg_names()
    back = from_mmseg(published | {"backbone.norm0.weight": torch.ones(1)})
    assert back.keys() == own.keys()
    assert all(back[name] is own[name] for name in own)


def test_published_heads_with_other_classes_or_without_auxiliary():
    published = to_mmseg(shake(Heads()).state_dict())
    model = Heads(classes=3)
    before = model.head.classifier.conv.weight.clone()
    assert load_heads(model, published) == [
        *("head.classifier.conv.weight", "head.classifier.conv.bias"),
        *("auxiliary.classifier.conv.weight", "auxiliary.classifier.conv.bias"),
    ]
    assert torch.equal(model.head.classifier.conv.weight, before)
    assert torch.equal(model.head.fuse.conv.weight, published["decode_head.fpn_bottleneck.conv.weight"])
    model.auxiliary = None
    load_heads(model, published)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("decode_head.bottleneck.bn.bias"), "head.pooling.fuse.norm.bias"),
        (lambda s: s.update({"decode_head.cls.weight": torch.ones(1)}), "decode_head.cls.weight"),
        (
            lambda s: s.update({"decode_head.lateral_convs.3.conv.weight": torch.ones(1)}),
            "head.neck.lateral.3.conv.weight",
        ),
        (
            lambda s: s.update({"decode_head.bottleneck.conv.weight": torch.ones(1)}),
            "head.pooling.fuse.conv.weight",
        ),
    ],
)
def test_published_heads_that_do_not_fit(change, says):
    published = to_mmseg(shake(Heads()).state_dict())
    change(published)
    model = Heads()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=says):
        load_heads(model, published)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_published_a3fpn_in_the_head():
    """The neck's weights stand under decode_head.a3fpn; they do what the neck's own reader makes of them."""
    golden = json.loads((GOLDENS / "a3fpn_small.json").read_text())
    config = golden["config"] | {"num_outs": 4, "end_level": 4}
    state = {n: torch.rand(s) + 0.5 for n, s in golden["spec"].items() if not n.startswith("conv44")}
    spec = ShapeSpec((*config["in_channels"][:3], 40), (4, 8, 16, 32))
    expected = from_published(config, state).eval()
    settings = dict(compress=config["compress_channel"], groups=config["group_num"], expansion=config["expansion"])
    settings |= dict(squeeze=config["squeeze"], resampling_groups=config["dcn_groups"], output_bias=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = UPerNet(spec, 5, channels=128, neck=lambda pooled: A3FPN(pooled, 32, **settings))

    model = Model()
    heads = {n: t for n, t in to_mmseg(shake(Model()).state_dict()).items() if ".a3fpn." not in n}
    load_heads(model, heads | {f"decode_head.a3fpn.{n}": t for n, t in state.items()})
    model.eval()
    assert torch.equal(model.head.fuse.conv.weight, heads["decode_head.fpn_bottleneck.conv.weight"])
    x = maps(16, 24, ShapeSpec(tuple(config["in_channels"]), spec.strides))
    assert all(torch.equal(a, b) for a, b in zip(model.head.neck(x), expected(x), strict=True))


# ---- whole models


@pytest.mark.parametrize("backbone", [*HIERARCHICAL, "resnet10t", "test_convnext"])
def test_every_family_trains_a_step_at_an_odd_size(backbone):
    torch.manual_seed(0)
    model = build_segmenter(backbone, num_classes=4, **SMALL, auxiliary_kwargs={"channels": 16})
    images, targets = torch.rand(2, 3, 70, 93), torch.randint(4, (2, 70, 93))
    logits, extra = model.train()(images)
    assert logits.shape == extra.shape == (2, 4, 70, 93)
    (F.cross_entropy(logits, targets) + F.cross_entropy(extra, targets)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    output = model.eval()(images[:1])
    assert output.shape == (1, 4, 70, 93)
    assert output.isfinite().all()


@pytest.mark.parametrize(("head", "neck"), [("semantic_fpn", "fpn"), ("semantic_fpn", "a3fpn"), ("upernet", "a3fpn")])
def test_every_head_and_neck_trains_a_step(head, neck):
    model = build_segmenter("test_foveal_nat", head, neck, num_classes=4, **SMALL, neck_kwargs={"out_channels": 32})
    output = model.train()(torch.rand(2, 3, 70, 93))
    output = output if isinstance(output, tuple) else (output,)
    assert {logits.shape for logits in output} == {(2, 4, 70, 93)}
    sum(logits.square().mean() for logits in output).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a3fpn_of_the_released_segmentor():
    """Its widths for ResNet-50, with the pooled map of 512 channels in place of the last; only the shapes."""
    with torch.device("meta"):
        neck = build_segmenter("resnet50c", neck="a3fpn", num_classes=19).head.neck
    weights = [neck.outputs[i].conv.weight.shape for i in range(4)]
    assert weights == [(512, 256, 3, 3), (512, 256, 3, 3), (512, 256, 3, 3), (512, 512, 3, 3)]
    assert neck.levels == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert neck.updated_first


def test_normalization_and_padding_are_inside():
    model = build_segmenter("test_foveal_nat", num_classes=4, **SMALL, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]).eval()
    images = torch.rand(1, 3, 50, 70)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    padded = mean.expand(1, 3, 64, 96).clone()
    padded[..., :50, :70] = images
    expected = F.interpolate(
        model.head(list(model.backbone((padded - mean) / std).values())), (64, 96), mode="bilinear", align_corners=False
    )
    assert torch.allclose(model(images), expected[..., :50, :70], atol=1e-5)
    model.size_divisor = 1
    small = model.head(list(model.backbone((images - mean) / std).values()))
    assert small.shape[-2:] == (13, 18)
    whole = F.interpolate(small, (50, 70), mode="bilinear", align_corners=False)
    assert torch.allclose(model(images), whole, atol=1e-5)


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_saved_and_loaded(head, tmp_path):
    model = build_segmenter("test_foveal_dinat", head, num_classes=3, **SMALL, drop_path_rate=0.2)
    shake(model)
    save_dense(tmp_path, model, ["a", "b", "c"], {"mean": [0.5]})
    again = load_dense(tmp_path)
    assert isinstance(again, Segmenter)
    assert again.classes == ["a", "b", "c"]
    x = torch.rand(1, 3, 40, 40)
    assert torch.equal(again(x), model(x))
    assert torch.equal(foveal.load(tmp_path)(x), model(x))
    with pytest.raises(ValueError, match="num_classes"):
        foveal.load(tmp_path, num_classes=4)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = build_segmenter("test_foveal_dinat", num_classes=3, **SMALL)
    with pytest.raises(ValueError, match=r"2.*3"):
        save_dense(tmp_path / "model", model, ["a", "b"], {})
    own = Segmenter(model.backbone, model.head, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match="Segmenter"):
        save_dense(tmp_path / "model", own, ["a", "b", "c"], {})
    assert not (tmp_path / "model").exists()


def test_parameter_groups_hold_every_parameter_once():
    model = build_segmenter("test_foveal_dinat", num_classes=3, **SMALL)
    groups = model.parameter_groups(0.05, backbone_lr_ratio=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())
    for group in groups:
        for p in group["params"]:
            name = names[id(p)]
            assert group["lr_scale"] == (0.1 if name.startswith("backbone.") else 1.0)
            flat = p.ndim == 1 or name.endswith(".bias") or "rpb" in name
            assert group["weight_decay"] == (0.0 if flat else 0.05), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"head": "upernett"}, "upernett.*upernet, semantic_fpn"),
        ({"neck": "pafpn"}, "pafpn.*fpn"),
        ({"head_kwargs": {"width": 3}}, "width"),
        ({"neck_kwargs": {"out_channels": 3}}, "out_channels"),
        ({"auxiliary_kwargs": {"level": 4}}, "level.*4"),
        ({"num_classes": 0}, "num_classes.* 0"),
        ({"mean": [0.5, 0.5]}, r"mean.*2.*3.*0\.5, 0\.5"),
        ({"std": [1.0] * 3, "in_chans": 1}, r"std.*3.*1.*1\.0, 1\.0"),
        ({"head": "semantic_fpn", "head_kwargs": {"channels": 20}}, "20.*32"),
    ],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        build_segmenter("test_foveal_nat", **{"num_classes": 3, **arguments})


# ---- inference


class Pointwise(nn.Module):
    """A model without context."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(("window", "stride"), [((16, 16), (11, 11)), ((50, 9), (50, 4)), ((99, 99), (1, 99))])
def test_sliding_equals_whole_without_context(window, stride):
    model, images = Pointwise(), torch.rand(2, 3, 33, 47)
    assert torch.allclose(slide_inference(model, images, window, stride), model(images), atol=1e-6)


def test_sliding_averages_the_windows():
    """A model with context, against loops over the windows, the last ones moved to the border."""
    model, images = nn.Conv2d(3, 2, 5, padding=2), torch.rand(1, 3, 21, 30)
    total, count = torch.zeros(1, 2, 21, 30), torch.zeros(21, 30)
    for top in (0, 7, 9):
        for left in (0, 9, 14):
            total[..., top : top + 12, left : left + 16] += model(images[..., top : top + 12, left : left + 16])
            count[top : top + 12, left : left + 16] += 1
    assert torch.allclose(slide_inference(model, images, (12, 16), (7, 9)), total / count, atol=1e-5)


@pytest.mark.parametrize("stride", [(0, 4), (5, 4)])
def test_sliding_refuses_strides_that_leave_gaps(stride):
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        slide_inference(Pointwise(), torch.rand(1, 3, 9, 9), (4, 4), stride)


@pytest.mark.parametrize(
    ("size", "scale", "ratio", "size_divisor", "expected"),
    [
        ((512, 683), (2048, 512), 1.0, 1, (512, 683)),  # as mmcv.rescale_size gives them
        ((375, 500), (2048, 512), 1.0, 1, (512, 683)),
        ((300, 3000), (2048, 512), 1.0, 1, (205, 2048)),
        ((375, 500), (2048, 512), 0.5, 1, (256, 341)),
        ((375, 500), (2048, 512), 1.0, 32, (512, 704)),
        ((375, 500), None, 1.75, 1, (656, 875)),
    ],
)
def test_rescale_size(size, scale, ratio, size_divisor, expected):
    assert rescale_size(size, scale, ratio, size_divisor) == expected
    assert rescale_size(size[::-1], scale, ratio, size_divisor) == expected[::-1]


def test_probabilities_average_scales_and_mirror_images():
    model, images = nn.Conv2d(3, 4, 3, padding=1), torch.rand(2, 3, 24, 30)
    expected = torch.zeros(2, 4, 24, 30)
    for scale in (0.5, 1.5):
        size = (int(24 * scale), int(30 * scale))
        scaled = F.interpolate(images, size, mode="bilinear", antialias=True)
        for logits in (model(scaled), model(scaled.flip(-1)).flip(-1)):
            expected += F.interpolate(logits, (24, 30), mode="bilinear").softmax(1) / 4
    output = probabilities(model, images, ratios=(0.5, 1.5), flip=True)
    assert torch.allclose(output, expected, atol=1e-6)
    assert torch.allclose(probabilities(model, images), model(images).softmax(1), atol=1e-6)
    model = Pointwise()
    assert torch.allclose(probabilities(model, images, crop_size=(9, 12)), model(images).softmax(1), atol=1e-6)


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet", "mask2former"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": (128, 48)},
        {"scale": (40, 30), "size_divisor": 4},
        {"crop_size": (32, 48)},
        {"crop_size": (96, 64), "stride": (10, 60), "scale": (200, 70)},
        {"ratios": (0.5, 1.0, 1.3), "flip": True, "scale": (100, 70)},
    ],
    ids=lambda settings: "-".join(settings) or "whole",
)
def test_label_map_is_the_argmax_of_the_probabilities(head, settings, monkeypatch):
    """In bands of a few rows, for large images; pixels at which two classes are equal to rounding may differ."""
    torch.manual_seed(0)
    small, divisor = ({"head_kwargs": QUERIES}, 32) if head == "mask2former" else (SMALL, 16)
    model = build_segmenter("test_foveal_dinat", head, num_classes=7, size_divisor=divisor, **small).eval()
    images = F.interpolate(torch.rand(2, 3, 9, 11), (53, 91), mode="bicubic").clamp(0, 1)
    expected = probabilities(model, images, **settings)
    monkeypatch.setattr(inference, "BAND_BYTES", 4 * 2 * 7 * 91 * 5)
    labels = label_map(model, images, **settings)
    assert labels.shape == (2, 53, 91)
    top = expected.topk(2, 1).values
    clear = top[:, 0] - top[:, 1] > 1e-5
    assert clear.float().mean() > 0.95
    assert torch.equal(labels[clear], expected.argmax(1)[clear])


def test_large_images_are_seen_in_windows():
    whole = {"scale": None, "size_divisor": 1, "ratios": [1.0], "crop_size": None, "stride": None}
    assert bounded((1024, 2048), whole) == whole  # Cityscapes
    assert bounded((3000, 4000), whole) == whole | {"crop_size": (1024, 1024), "stride": (896, 896)}
    for settings in (whole | {"scale": [2048, 512]}, whole | {"crop_size": [512, 512], "stride": [300, 300]}):
        assert bounded((3000, 4000), settings) == settings
    assert bounded((1024, 1024), whole | {"ratios": [1.0, 2.0]})["crop_size"] == (1024, 1024)


def test_windows_are_computed_row_by_row(monkeypatch):
    """Only those that a band of rows needs are kept, and each is computed once."""
    model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=4, head_kwargs={"channels": 32}).eval()
    images = torch.rand(1, 3, 200, 90, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(inference, "BAND_BYTES", 4 * 4 * 90 * 8)
    views, window, seen = [], inference._View._window, []

    def record(view, rows, columns):
        seen.append((rows.start, columns.start))
        views.append(len(view.windows) if hasattr(view, "windows") else 0)
        return window(view, rows, columns)

    monkeypatch.setattr(inference._View, "_window", record)
    settings = {"crop_size": (64, 64), "stride": (48, 48)}
    labels = label_map(model, images, **settings)
    assert len(seen) == len(set(seen)) == 8
    assert max(views) < 4
    expected = slide_inference(model, images, (64, 64), (48, 48)).argmax(1)
    assert (labels == expected).float().mean() > 0.999
