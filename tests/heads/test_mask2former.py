"""Mask2Former on our features, against transformers' own on the same backbone and parameters."""

import copy
import subprocess
import sys

import pytest
import timm
import torch

from foveal.heads.build import build_segmenter
from foveal.heads.checkpoint import load_dense, save_dense
from foveal.heads.mask2former import query_outputs
from foveal.heads.segmentation import Mask2Former

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("scipy", reason="needs scipy")

SMALL = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2, encoder_layers=1)
SMALL |= dict(encoder_feedforward_dim=32, decoder_layers=2, dim_feedforward=32, num_queries=5, train_num_points=64)
NAME = "test_foveal_dinat"


def segmenter(**kwargs) -> Mask2Former:
    torch.manual_seed(0)
    return build_segmenter(NAME, "mask2former", num_classes=4, head_kwargs=SMALL | kwargs)


@pytest.fixture
def theirs():
    """transformers' model with the backbone that it makes of a timm name."""
    backbone = transformers.TimmBackboneConfig(backbone=NAME, out_indices=[0, 1, 2, 3])
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=4, **SMALL)
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def test_equals_transformers(theirs):
    ours = segmenter().eval()
    ours.backbone.body = timm.create_model(NAME, features_only=True).eval()  # as transformers makes it: no norms
    prefix = "model.pixel_level_module.encoder."
    ours.head.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith(prefix)})
    body = theirs.model.pixel_level_module.encoder._backbone
    ours.backbone.body.load_state_dict(body.state_dict())

    images = torch.rand(2, 3, 64, 96)
    normalized = (images - ours.mean) / ours.std
    output = theirs(normalized)
    processor = transformers.Mask2FormerImageProcessor()
    want = processor.post_process_semantic_segmentation(output, [(64, 96)] * 2)
    got = ours(images)
    assert got.shape == (2, 4, 64, 96)
    # theirs goes through 384x384 on its way to the image's size: nearly all pixels are the same, not all
    agree = (torch.stack(want) == got.argmax(1)).float().mean()
    assert agree > 0.98
    shares, masks = output.class_queries_logits.softmax(-1)[..., :-1], output.masks_queries_logits
    masks = torch.nn.functional.interpolate(masks, (64, 96), mode="bilinear").sigmoid()
    scores = torch.einsum("bqc,bqhw->bchw", shares, masks)
    torch.testing.assert_close(got.exp(), scores, rtol=1e-4, atol=1e-6)

    targets = torch.randint(0, 4, (2, 64, 96))
    classes = [torch.arange(4), torch.arange(4)]
    labels = [(image == torch.arange(4)[:, None, None]).float() for image in targets]
    torch.manual_seed(1)  # the points where masks are compared are drawn
    want = theirs(normalized, mask_labels=labels, class_labels=classes).loss
    torch.manual_seed(1)
    torch.testing.assert_close(sum(ours(images, targets).values()), want)


def test_learns_and_survives_images_without_a_class():
    model = segmenter()
    images, targets = torch.rand(2, 3, 50, 70), torch.randint(0, 4, (2, 50, 70))
    targets[0, :20] = 255
    sum(model(images, targets).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    targets[0] = 255
    assert all(loss.isfinite() for loss in model(images, targets).values())
    targets[:] = 255
    assert all(loss.isfinite() for loss in model(images, targets).values())


def test_half_precision_ends_before_the_scores():
    """What the queries say may be rounded; their sums are not rounded again."""
    model, said = segmenter().eval(), []
    images = torch.rand(1, 3, 64, 64)
    model.head.class_predictor.register_forward_hook(lambda *call: said.append(call[-1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model(images)
        classes, masks = (layers[-1] for layers in query_outputs(model.head, (images - model.mean) / model.std))
    assert said[0].dtype == torch.bfloat16
    masks = torch.nn.functional.interpolate(masks, (64, 64), mode="bilinear").sigmoid()
    want = torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks)
    torch.testing.assert_close(got.exp(), want, rtol=1e-5, atol=1e-7)


def test_padding_belongs_to_no_class():
    """A class that fills the image does not fill the padding around it."""
    model = segmenter().eval()
    seen = []
    model.head.criterion.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    model(torch.rand(1, 3, 40, 64), torch.full((1, 40, 64), 2))
    (mask,) = seen[0]["mask_labels"]
    assert seen[0]["class_labels"][0].tolist() == [2]
    assert mask.shape == (1, 64, 64)
    assert mask[0, :40].all() and not mask[0, 40:].any()


def test_round_trip_and_copies(tmp_path):
    model = segmenter().eval()
    save_dense(tmp_path, model, list("abcd"), {})
    loaded = load_dense(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images), model(images))
    other = copy.deepcopy(model)  # as an average of the weights is made
    with torch.no_grad():
        other.backbone.body.load_state_dict({k: v * 0 for k, v in other.backbone.body.state_dict().items()})
    assert not torch.equal(other(images), model(images))
    torch.testing.assert_close(loaded(images), model(images))


def test_embeddings_are_not_decayed():
    model = segmenter()
    groups = model.parameter_groups(0.05, None, 0.1)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    kept = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    names = [n for n, p in model.named_parameters() if p.ndim > 1 and id(p) in kept and not n.startswith("backbone.")]
    assert {n.rsplit(".", 2)[-2] if n.endswith("weight") else n.rsplit(".", 1)[-1] for n in names} == {
        *("queries_embedder", "queries_features", "level_embed")
    }


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"neck": "pan"}, "pan.*fpn"),
        ({"neck_kwargs": {"out_channels": 64}}, "out_channels"),
        ({"auxiliary_kwargs": {"channels": 64}}, "auxiliary_kwargs"),
        ({"head_kwargs": {"num_query": 5}}, "num_query"),
        ({"head_kwargs": {"a3fpn": {}}}, "a3fpn"),
        ({"head_kwargs": {"num_labels": 5}}, "num_labels"),
        ({"strides": (8, 16, 32)}, r"\(8, 16, 32\)"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_segmenter(NAME, "mask2former", num_classes=4, **kwargs)


def test_parts_of_the_queries_change_nothing(monkeypatch):
    model, images = segmenter(encoder_layers=2).eval(), torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        whole = model(images)
        monkeypatch.setattr("foveal.heads.mask2former.QUERIES", 10)
        torch.testing.assert_close(model(images), whole)


PEAK = """
import torch
from foveal.heads.build import build_segmenter

# not ru_maxrss, which begins at that of the process that started this one
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20
model = build_segmenter("test_foveal_dinat", "mask2former", num_classes=150).eval()
images = torch.rand(1, 3, 1024, 1024)
before = peak()
with torch.no_grad():
    model.coarse(images)
print(peak() - before)
"""


@pytest.mark.slow
def test_a_window_of_a_large_image_takes_less_than_1_gib():
    """With the default head; 1.2 GiB if the pixel decoder attends at once."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(run.stdout.split()[-1]) < 0.95
