"""The registry of heads, and who reads it."""

from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from foveal.configs import schema
from foveal.heads.build import build_detector, build_segmenter
from foveal.heads.checkpoint import reparameterize
from foveal.heads.necks import NECKS
from foveal.heads.registry import HEADS, head_spec
from foveal.heads.segmentation.mask2former import Mask2Former

MODELS = {"detect": schema.DetectModelConfig, "segment": schema.SegmentModelConfig}
BUILDERS = {"detect": build_detector, "segment": build_segmenter}


def choices(config: type, key: str) -> tuple[str, ...]:
    return get_args(get_type_hints(config)[key])


@pytest.mark.parametrize("task", HEADS)
def test_recipes_choose_among_them(task):
    assert choices(MODELS[task], "head") == tuple(HEADS[task])
    assert choices(MODELS[task], "neck") == tuple(NECKS)
    assert all((spec.task, spec.name) == (task, name) for name, spec in HEADS[task].items())


def test_an_unknown_head_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"yolo.*segment.*upernet, semantic_fpn, linear, mask2former"):
        head_spec("segment", "yolo")


@pytest.mark.parametrize("task", HEADS)
def test_the_builders_take_a_recipe_s_model(task):
    config = MODELS[task](name="test_foveal_nat", frozen_stages=1, kwargs={"kernel_size": 5}, drop_path_rate=0.1)
    model = BUILDERS[task](**vars(config), num_classes=3)
    assert model.arguments["kernel_size"] == 5
    assert model.task == task
    assert not next(model.backbone.body.parameters()).requires_grad
    assert BUILDERS[task](**model.arguments).arguments == model.arguments


NARROW = {  # norms of 32 groups of one channel
    "fcos": {"neck_kwargs": {"out_channels": 32}},
    "semantic_fpn": {"head_kwargs": {"channels": 32}},
    "mask2former": {"head_kwargs": {"feature_size": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}},
}


@pytest.mark.parametrize(("task", "head"), [(task, name) for task in HEADS for name in HEADS[task] if name in NARROW])
def test_one_image_whose_coarsest_map_is_one_pixel(task, head):
    """PyTorch's group norm refuses a batch of one, not of two."""
    if head == "mask2former":
        pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    sides = {"min_size": 32, "max_size": 32} if task == "detect" else {}
    model = BUILDERS[task]("test_foveal_care", head, num_classes=3, **NARROW[head] | sides).eval()
    image = torch.rand(3, 32, 32)
    with torch.no_grad():
        alone = tensors(model([image]) if task == "detect" else model(image[None]))
        first = tensors(model([image] * 2)[0] if task == "detect" else model(torch.stack([image] * 2))[:1])
    for got, want in zip(alone, first, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("task", "head"), [(task, name) for task in HEADS for name, spec in HEADS[task].items() if spec.neck == "none"]
)
def test_a_head_without_a_neck_refuses_one(task, head):
    for wrong, named in (({"neck": "a3fpn"}, "a3fpn"), ({"neck_kwargs": {"out_channels": 8}}, "out_channels")):
        with pytest.raises(ValueError, match=f"{head}.*{named}"):
            BUILDERS[task]("test_foveal_care", head, num_classes=3, **wrong)


# ---- every head with what wraps and watches modules, as tests/backbones/test_works_with.py for the backbones

CASES = [(task, name, "fpn") for task in HEADS for name in HEADS[task]]
CASES += [("detect", "retinanet", "a3fpn"), ("segment", "upernet", "a3fpn"), ("segment", "mask2former", "a3fpn")]
every_head = pytest.mark.parametrize(  # a cascade has the parts of a Mask R-CNN three times
    ("task", "head", "neck"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case[1] == "cascade_mask_rcnn")) for case in CASES],
)


def small(task: str, head: str, neck: str) -> nn.Module:
    if head == "mask2former":
        pytest.importorskip("transformers", reason="needs transformers")
    own: dict = {"min_size": 64, "max_size": 96} if task == "detect" else {}
    if HEADS[task][head].neck == "before" and (task == "detect" or neck == "a3fpn"):
        own["neck_kwargs"] = {"out_channels": 64}
    if head == "conditional_detr":
        own["head_kwargs"] = {"width": 32, "ffn_width": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
    torch.manual_seed(0)
    return BUILDERS[task]("test_foveal_care", head, neck, num_classes=3, **own).eval()


def outputs(model: nn.Module) -> list[torch.Tensor]:
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return tensors(model([image]) if model.task == "detect" else model(image[None]))


def tensors(held) -> list[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        return [held]
    held = list(held.values()) if isinstance(held, dict) else held
    return [t for each in held for t in tensors(each)] if isinstance(held, (tuple, list)) else []


def loss(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(2)
    images = torch.rand(2, 3, 64, 96)
    if model.task == "segment":
        labels = torch.randint(3, (2, 64, 96))
        out = model(images, labels) if isinstance(model, Mask2Former) else model(images)
        return sum(t.float().square().mean() for t in tensors(out))
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[0, 10:40, 10:50] = 1
    target = {"boxes": torch.tensor([[10.0, 10, 50, 40]]), "labels": torch.tensor([2]), "masks": masks}
    return sum(model(list(images), [dict(target), dict(target)]).values())


@every_head
def test_what_passed_a_hook_stays(task, head, neck):
    model = small(task, head, neck)
    seen = []

    def keep(path, held):
        seen.extend((path, t, t.clone()) for t in tensors(held))

    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, path=path: keep(path, args))
        module.register_forward_hook(lambda _, args, output, path=path: keep(path, output))
    outputs(model)
    assert {path for path, t, copied in seen if not torch.equal(t, copied)} == set()


@every_head
def test_full_backward_hooks(task, head, neck):
    model = small(task, head, neck).train()
    called = set()
    for path, module in model.named_modules():
        module.register_full_backward_hook(lambda *_, path=path: called.add(path))
    loss(model).backward()
    assert len(called) > 10


@every_head
def test_offloading(task, head, neck):
    accelerate = pytest.importorskip("accelerate")
    if head == "mask2former":
        pytest.skip("transformers' decoder reads the weights of its embeddings")
    model = small(task, head, neck)
    want = outputs(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    for got, each in zip(outputs(model), want, strict=True):
        torch.testing.assert_close(got, each)


@pytest.mark.parametrize(("head", "neck"), [("retinanet", "a3fpn"), ("cascade_mask_rcnn", "fpn")])
def test_what_is_recomputed_is_not_folded(head, neck):
    model = small("detect", head, neck)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", 0.3)
    with pytest.raises(ValueError):
        model.backbone.neck.reparameterize() if neck == "a3fpn" else reparameterize(model)
