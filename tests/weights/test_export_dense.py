"""Exported detectors and segmenters run elsewhere with the outputs of the original."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.transforms.v2 import functional

import foveal
import foveal.weights.compare as comparing
from foveal.backbones.images import read_image
from foveal.heads.build import build_detector, build_segmenter
from foveal.heads.checkpoint import load_dense, reparameterize, save_dense
from foveal.heads.registry import HEADS
from foveal.weights.cards import dense_card, dense_example
from foveal.weights.compare import detection_error, detections_differ
from foveal.weights.export import default_size, export
from foveal.weights.formats import FORMATS, ExportError
from foveal.weights.manifest import checkpoints
from foveal.weights.verify import verify

SLOW = pytest.mark.slow
SIZE = (64, 96)


def shake(model: nn.Module) -> nn.Module:
    """Other numbers everywhere, and so large that a detector is sure of some objects and not of others."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5)
    for name, parameter in model.named_parameters():
        # else every box goes beyond the image, and all proposals are alike: their probabilities are 1
        if name.endswith(("bbox_reg.weight", "bbox_pred.weight", "rpn.head.cls_logits.weight", "class_embed.weight")):
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def detector(
    head: str,
    neck: str = "fpn",
    backbone: str = "test_resnet",
    min_size: int = 64,
    options: dict[str, Any] | None = None,
    **head_kwargs,
) -> nn.Module:
    settings = {"detections_per_img": 20, "topk_candidates": 100} | head_kwargs
    if head.endswith("rcnn"):
        settings = {"box_width": 32, "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 60}
        settings |= {"box_detections_per_img": 20} | (
            {"mask_width": 32} if head.endswith("mask_rcnn") else {"convention": "mmdet"}
        )
    sizes = {"min_size": min_size, "max_size": max(min_size, 96), **(options or {})}
    if head == "conditional_detr":
        settings = {"width": 32, "num_heads": 2, "ffn_width": 32, "encoder_layers": 1, "num_queries": 20} | head_kwargs
    neck_kwargs = {"out_channels": 64 if head == "fcos" else 32}  # whose norms have 32 groups
    neck_kwargs = {} if head == "conditional_detr" else neck_kwargs
    torch.manual_seed(0)
    model = build_detector(backbone, head, neck, num_classes=3, head_kwargs=settings, neck_kwargs=neck_kwargs, **sizes)
    return shake(model)


def segmenter(head: str, neck: str = "fpn", backbone: str = "test_resnet", **options) -> nn.Module:
    settings: dict[str, object] = {} if head == "linear" else {"channels": 32}
    if head == "mask2former":
        settings = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2, encoder_layers=1)
        settings |= dict(encoder_feedforward_dim=32, decoder_layers=2, dim_feedforward=32, num_queries=5)
    own = head in ("mask2former", "linear") or (head == "upernet" and neck == "fpn")
    parts = dict(head_kwargs=settings, neck_kwargs={} if own else {"out_channels": 32})
    torch.manual_seed(0)
    model = build_segmenter(backbone, head, neck, num_classes=4, **parts, **options)
    if head == "mask2former" or (head, neck) == ("upernet", "a3fpn"):
        return model.eval()  # the hard gates of that neck, shaken, turn with the last bit of a number
    return shake(model)


def saved(model: nn.Module, folder: Path, **preprocessing) -> Path:
    """A run's folder, as training leaves it."""
    classes = [f"class_{i}" for i in range(model.arguments["num_classes"])]
    save_dense(folder / "best", model, classes, {"in_chans": 3} | preprocessing, category_ids=[7, 8, 9])
    return folder


def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg"))


def runs_as_its_card_says(folder: Path, model: nn.Module, to: str, size: tuple[int, int]) -> None:
    """The card's Python on a photograph gives what the original gives on the same pixels."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert code == dense_example(model, to, size)
    photo().save(folder / "photo.jpg")
    found: dict[str, object] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, "card", "exec"), found)
    finally:
        os.chdir(before)
    image = torch.from_numpy(found["image"])
    with torch.no_grad():
        if "boxes" not in found:
            expected = model(image).argmax(1)[0, : found["height"], : found["width"]]
            assert (torch.as_tensor(found["classes"]) == expected).float().mean() > 0.999
            assert tuple(found["classes"].shape) == (found["height"], found["width"])
            return
        (expected,) = model(list(image))
    names = ["boxes", "labels", "scores", *(["masks"] if model.masks else [])]
    got = [torch.as_tensor(found[name]) for name in names]
    assert len(got[0]) > 0
    got[0] = (got[0] * found["scale"]).float()
    assert detection_error(model)([expected[name] for name in names], got, image) < 1e-4


def check(model: nn.Module, to: str, tmp_path: Path, size: tuple[int, int] = SIZE) -> Path:
    for module in FORMATS[to].needs:
        pytest.importorskip(module, reason=f"{to} needs it")
    done = export(saved(model, tmp_path / "run"), to, tmp_path / "out", size=size)
    assert 0 <= done.difference < 1e-4
    assert done.checked[1:] == ["china.jpg", "flower.jpg"]
    runs_as_its_card_says(done.folder, model, to, size)
    return done.folder


def test_a_detector_in_onnx(tmp_path: Path) -> None:
    """Through the command's own way in; smaller than the photographs that it takes, so that it resizes."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra foveal[export] is not installed")
    model = detector("retinanet", min_size=48, score_thresh=0.997)
    run = saved(model, tmp_path / "run")
    done = export(run, "onnx", tmp_path / "out", size=SIZE)
    assert done.files == ["README.md", "config.json", "model.onnx"]
    assert done.difference < 1e-4
    (note,) = done.notes
    assert int(note.split()[0]) > 3
    card = (done.folder / "README.md").read_text()
    assert re.search(r"`image` \[1, 3, 64, 96\], float32 in \[0, 1\].* 48 x 72 ", card)
    assert "0 class_0, 1 class_1, 2 class_2" in card
    config = json.loads((done.folder / "config.json").read_text())
    assert config["category_ids"] == [7, 8, 9]
    assert config["export"] == {"format": "onnx", "size": [64, 96], "outputs": ["boxes", "labels", "scores"]}
    runs_as_its_card_says(done.folder, model, "onnx", SIZE)
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    assert [each.name for each in session.get_outputs()] == ["boxes", "labels", "scores"]
    described = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert described == {"task": "detect", "input_size": [3, *SIZE], "classes": ["class_0", "class_1", "class_2"]}
    # where it is sure of nothing there are no rows
    noise = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    assert len(model(list(noise))[0]["boxes"]) == 0
    assert [each.shape for each in session.run(None, {"image": noise.numpy()})] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize(
    ("head", "neck", "to"),
    [
        pytest.param(head, "fpn", to, marks=SLOW)
        for head, to in [
            *(("retinanet", "pt2"), ("fcos", "onnx"), ("fcos", "pt2")),
            *(("faster_rcnn", "onnx"), ("faster_rcnn", "pt2"), ("mask_rcnn", "onnx"), ("mask_rcnn", "pt2")),
            *(("cascade_mask_rcnn", "onnx"), ("cascade_mask_rcnn", "pt2")),
        ]
    ],
)
def test_detectors(head: str, neck: str, to: str, tmp_path: Path) -> None:
    check(detector(head, neck), to, tmp_path)


@SLOW
@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_queries_for_boxes(to: str, tmp_path: Path) -> None:
    """With padding, of which the backbone sees a mask, and resized inside."""
    model = detector("conditional_detr", min_size=40, score_thresh=0.4)
    folder = check(model, to, tmp_path, (64, 90))
    assert "suppression" not in (folder / "README.md").read_text()
    noise = torch.rand(1, 3, 64, 90)
    with torch.no_grad():
        scores = model(list(noise))[0]["scores"]
    assert 3 < len(scores) < 60
    assert scores.diff().abs().max() > 1e-2


@SLOW
def test_a_detector_of_our_own_parts(tmp_path: Path) -> None:
    check(detector("retinanet", "a3fpn", "test_foveal_dinat"), "onnx", tmp_path)


@pytest.mark.parametrize(
    ("head", "neck", "to"),
    [
        ("semantic_fpn", "fpn", "onnx"),
        *(
            pytest.param(*each, marks=SLOW)
            for each in [
                *(("semantic_fpn", "fpn", "pt2"), ("semantic_fpn", "fpn", "openvino")),
                *(("upernet", "fpn", "onnx"), ("upernet", "fpn", "pt2"), ("upernet", "fpn", "openvino")),
                *(("upernet", "a3fpn", "onnx"), ("upernet", "a3fpn", "pt2"), ("mask2former", "fpn", "onnx")),
            ]
        ),
    ],
)
def test_segmenters(head: str, neck: str, to: str, tmp_path: Path) -> None:
    """For any batch."""
    if head == "mask2former":
        pytest.importorskip("transformers", reason="mask2former needs transformers")
        pytest.importorskip("scipy", reason="mask2former needs scipy")
    model = segmenter(head, neck)
    folder = check(model, to, tmp_path)
    run = FORMATS[to].open(folder)
    for batch in (1, 3):
        x = torch.rand(batch, 3, *SIZE)
        with torch.no_grad():
            torch.testing.assert_close(run(x)[0], model(x), rtol=1e-4, atol=1e-4)


UPLIFT = {"name": "uplift", "channels": 32, "patch": 16}
NAF = {"name": "naf", "dim": 64}  # whose windows take 9 x 9 positions
UPSAMPLED = ("linear", "onnx"), ("semantic_fpn", "pt2")  # the others take as long, with the same upsamplers
EVERY_HEAD = [
    pytest.param(task, head, upsampler, to, marks=[SLOW] + [pytest.mark.long] * ((head, to) not in UPSAMPLED))
    for task in HEADS
    for head, spec in HEADS[task].items()
    for to, upsampler in (("onnx", UPLIFT), ("pt2", NAF))
    if to not in spec.not_exported
]


@pytest.mark.parametrize(("task", "head", "upsampler", "to"), EVERY_HEAD)
def test_heads_on_an_upsampled_transformer(
    task: str, head: str, upsampler: dict[str, Any], to: str, tmp_path: Path
) -> None:
    if head == "mask2former":
        pytest.importorskip("transformers", reason="mask2former needs transformers")
    size = (160, 160) if upsampler is NAF else (64, 96)
    options = dict(upsample=upsampler, depth=2, embed_dim=32, num_heads=2)
    options |= {"strides": (8,)} if HEADS[task][head].strides == (32,) else {}  # or there is nothing to upsample
    if task == "detect":
        check(detector(head, backbone="vit_tiny_patch16_224", min_size=min(size), options=options), to, tmp_path, size)
        return
    model = segmenter(head, backbone="vit_tiny_patch16_224", **options)
    run = FORMATS[to].open(check(model, to, tmp_path, size))
    x = torch.rand(3, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(run(x)[0], model(x), rtol=1e-4, atol=1e-4)


@SLOW
def test_a_segmenter_of_our_own_parts(tmp_path: Path) -> None:
    check(segmenter("semantic_fpn", "a3fpn", "test_foveal_nat"), "onnx", tmp_path)


@pytest.mark.parametrize("model", [lambda: detector("fcos"), lambda: segmenter("upernet")], ids=["detect", "segment"])
def test_safetensors(model, tmp_path: Path) -> None:
    """The folder is the same one again, and `foveal.load` reads it."""
    model = model()
    run = saved(model, tmp_path / "run")
    done = export(run, "safetensors", tmp_path / "out")
    assert (done.files, done.difference) == (["README.md", "config.json", "model.safetensors"], 0.0)
    for name in ("config.json", "model.safetensors"):
        assert (done.folder / name).read_bytes() == (run / "best" / name).read_bytes()
    code = (done.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, object] = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(done.folder)), found)
    assert found["model"].classes == load_dense(run).classes
    assert ("found" in found) != ("logits" in found)


def test_a_folded_neck_is_loaded_again(tmp_path: Path) -> None:
    """Whole models, and those of which only the neck was folded, the backbone not."""
    model = segmenter("semantic_fpn", "a3fpn", "test_foveal_ascan")
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        expected = model(x)
        for name, fold in (("neck", model.head.neck.reparameterize), ("all", lambda: reparameterize(model))):
            fold()
            save_dense(tmp_path / name, model, list("abcd"), {})
            again = foveal.load(tmp_path / name)(x)
            assert torch.equal(again, model(x))
            assert (again - expected).abs().max() < 1e-4 * expected.abs().max()
    folded = set(foveal.load(tmp_path / "all").state_dict())
    assert len(folded) < len(foveal.load(tmp_path / "neck").state_dict())
    assert not any("conv1.norm" in key for key in folded if ".blocks." in key)


def test_detections_that_differ() -> None:
    """Order does not count, nor what stands at the end; objects, labels, boxes, scores and masks do."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [1, 1, 9, 9]])
    labels, scores = torch.tensor([0, 1, 0]), torch.tensor([0.9, 0.5, 0.300001])
    output = boxes, labels, scores
    differ = lambda other, threshold=0.05, limit=10: detections_differ(output, other, (100, 100), threshold, limit)  # noqa: E731
    turned = [each.flip(0) for each in output]
    assert differ(turned) == 0
    assert differ([boxes + 0.005, labels, scores]) == pytest.approx(5e-5, rel=0.1)
    assert differ([boxes, labels, scores - 2e-5]) == pytest.approx(2e-5, rel=0.1)
    for other in ([boxes + 1, labels, scores], [boxes, labels + 1, scores], [boxes, labels, scores - 0.01]):
        assert differ(other) == math.inf
    assert differ([each[:2] for each in output]) == math.inf
    assert differ([each[:0] for each in output]) == math.inf
    assert detections_differ([each[:0] for each in output], output, (100, 100), 0.05, 10) == math.inf
    assert differ([each[:2] for each in output], threshold=0.3) == 0  # the last one is hardly above it
    assert differ([each[:2] for each in output], limit=3) == 0  # another of the same score may have been the last
    masks = torch.rand(3, 1, 100, 100)
    moved = masks.clone()
    moved[1] += 0.25
    assert detections_differ((*output, masks), (*output, moved), (100, 100), 0.05, 10) == pytest.approx(0.25, rel=1e-3)


def test_sizes(tmp_path: Path) -> None:
    """A photograph's as the model sees it: 4:3, or the windows that it was scored in."""
    model = detector("fcos", min_size=800)
    model.detector.transform.max_size = 1333
    assert default_size(model) == (800, 1088)
    model.detector.transform.min_size, model.detector.transform.max_size = (96,), 96
    assert default_size(model) == (96, 96)
    model = segmenter("upernet")
    for inference, size in (
        ({"crop_size": [512, 640], "scale": [2048, 512]}, (512, 640)),
        ({"crop_size": None, "scale": [2048, 512]}, (512, 704)),
        ({"crop_size": None, "scale": None}, (160, 160)),
    ):
        model.config = {"preprocessing": {"inference": inference}}
        assert default_size(model) == size


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = detector("retinanet")
    run, out = saved(model, tmp_path / "run"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"retinanet.*safetensors, onnx, pt2,.*openvino"):
        export(run, "openvino", out)
    with pytest.raises(ValueError, match=r"\(64, 96\).*safetensors"):
        export(run, "safetensors", out, size=SIZE)
    with pytest.raises(ValueError, match=r"size.*\(0, 96\)"):
        export(run, "onnx", out, size=(0, 96))
    with pytest.raises(ValueError, match="--half"):
        export(run, "onnx", out, half=True)
    with pytest.raises(ValueError, match="--no-pretrained"):
        export(run, "onnx", out, pretrained=False)
    with pytest.raises(ValueError, match="--calibration, --dynamic"):
        export(run, "onnx", out, calibration=[tmp_path], dynamic=True)
    for file in (run / "best" / "model.safetensors", f"local-dir:{run / 'best' / 'model.safetensors'}"):
        with pytest.raises(ValueError, match=r"model\.safetensors.*best$"):
            export(file, "safetensors", out)
    for output in (run, run / "best"):
        with pytest.raises(ValueError, match=output.name):
            export(run, "safetensors", output, force=True)
    with pytest.raises(OSError, match=r"absent\.png"):
        export(run, "safetensors", out, images=[tmp_path / "absent.png"])
    # different outputs leave nothing behind
    for apart, text in ((1e-3, r"1\.0e-03"), (math.inf, "inf")):
        monkeypatch.setattr(comparing, "detections_differ", lambda *_, apart=apart: apart)
        with pytest.raises(ExportError, match=rf"{text} on random, batch 1.*0\.0001"):
            export(run, "safetensors", out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_names_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that `foveal.load` takes is exported; what it refuses, too."""
    run = saved(segmenter("semantic_fpn"), tmp_path / "run")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "mine.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, name in enumerate((f"local-dir:{run}", "~/run", "local-dir:~/run")):
        assert foveal.load(name).classes == load_dense(run).classes
        done = export(name, "safetensors", tmp_path / str(number), images=[tmp_path / "mine.png"])
        assert done.files == ["README.md", "config.json", "model.safetensors"]
    (run / "best" / "model.safetensors").rename(run / "best" / "model.onnx")
    for function in (foveal.load, lambda name: export(name, "onnx", tmp_path / "out")):
        with pytest.raises(ValueError, match=r"best.*model\.onnx"):
            function("~/run")


def test_weights_that_were_converted(tmp_path: Path) -> None:
    """Licence and address stay in the card, also of an export of an export; the record of the file does not."""
    source, published = tmp_path / "converted", checkpoints()["dinat_mini.maskrcnn_coco"]
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "mine.png")
    record = {"file": "x.pth", "checkpoint": published.name}
    save_dense(source, segmenter("semantic_fpn"), list("abcd"), {"in_chans": 3}, conversion=record)
    for name in ("first", "second"):
        source = export(source, "safetensors", tmp_path / name, images=[tmp_path / "mine.png"]).folder
        card = (source / "README.md").read_text()
        assert f"| weights | `{published.name}`, published as {published.address}, converted; from " in card
        assert f"| licence of the published weights | {published.weights_licence} |" in card
        config = json.loads((source / "config.json").read_text())
        assert ("conversion" in config, config["checkpoint"]) == (False, published.name)
        with pytest.raises(ValueError, match=source.name):  # and no check of another file fails
            list(verify(source))


def test_openvino_is_for_one_image(tmp_path: Path) -> None:
    """The card says of the file what the file takes."""
    model = segmenter("semantic_fpn")
    model.classes = list("abcd")
    for to, batch in (("openvino", "1"), ("onnx", "batch")):
        card = dense_card(model, to, SIZE, {"weights": "from here"}, "checked")
        assert f"`image` [{batch}, 3, 64, 96]" in card
        assert f"`logits` [{batch}, 4, 64, 96]" in card
        assert ("model.reshape(image.shape)" in card) == (to == "openvino")


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_the_card_of_four_channels(kind: str, tmp_path: Path) -> None:
    """No photograph has them: the card reads an array, as `read_image` does."""
    model = segmenter("semantic_fpn")
    assert '(Image.open("photo.jpg")).convert("RGB")' in dense_example(model, "onnx", SIZE)
    model.mean = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(-1, 1, 1)
    code = dense_example(model, "onnx", SIZE)
    assert "photo.jpg" not in code
    assert "session.run" in code
    pixels = np.random.default_rng(0).integers(0, 200, (SIZE[0] // 2, SIZE[1] // 3, 4)).astype(kind)
    np.save(tmp_path / "image.npy", pixels / np.float32(200) if kind == "float32" else pixels)
    found: dict[str, object] = {}
    exec(code.split("import onnxruntime")[0].replace("image.npy", str(tmp_path / "image.npy")), found)
    resized = functional.resize(read_image(tmp_path / "image.npy", 4), [SIZE[0], SIZE[1] * 2 // 3], antialias=True)
    expected = model.mean[None].expand(1, 4, *SIZE).clone()
    expected[..., : resized.shape[-1]] = resized
    torch.testing.assert_close(torch.from_numpy(found["image"]), expected, rtol=1e-5, atol=1e-6)


def test_a_detector_that_finds_nothing(tmp_path: Path) -> None:
    model = detector("retinanet")
    nn.init.constant_(model.detector.head.classification_head.cls_logits.bias, -1000.0)
    run = saved(model, tmp_path / "run")
    with pytest.raises(ValueError, match=r"random.*china\.jpg.*--image"):
        export(run, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_given(tmp_path: Path) -> None:
    run = saved(segmenter("semantic_fpn"), tmp_path / "run")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "mine.png")
    done = export(run, "safetensors", tmp_path / "out", images=[tmp_path / "mine.png"])
    assert done.checked == ["random, batch 2", str(tmp_path / "mine.png")]
