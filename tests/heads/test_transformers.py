"""Backbones in Hugging Face transformers by `TimmBackboneConfig(backbone=NAME)`: trained a step, saved, reloaded."""

import pytest
import timm
import torch

from ..variants import SOME_PYRAMIDS

transformers = pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)

CLASSES = 3
WIDTH = 32


def backbone_config(name, out_indices, **kwargs):
    return transformers.TimmBackboneConfig(backbone=name, out_indices=out_indices, **kwargs)


def channels(name) -> list[int]:
    with torch.device("meta"):
        return timm.create_model(name, features_only=True).feature_info.channels()


def mask2former(name):
    return transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(
            backbone_config=backbone_config(name, [0, 1, 2, 3]),
            feature_size=WIDTH,
            mask_feature_size=WIDTH,
            hidden_dim=WIDTH,
            num_attention_heads=2,
            encoder_layers=1,
            encoder_feedforward_dim=WIDTH,
            decoder_layers=2,
            dim_feedforward=WIDTH,
            num_queries=5,
            num_labels=CLASSES,
            train_num_points=64,
        )
    )


def upernet(name):
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone_config(name, [0, 1, 2, 3]),
            hidden_size=16,
            auxiliary_in_channels=channels(name)[2],
            auxiliary_channels=8,
            num_labels=CLASSES,
        )
    )


def detr(name, **kwargs):
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            backbone_config=backbone_config(name, [3], **{"freeze_batch_norm_2d": True, **kwargs}),
            d_model=WIDTH,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=WIDTH,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=WIDTH,
            num_queries=5,
            num_labels=CLASSES,
        )
    )


def rt_detr(name):
    return transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(
            backbone_config=backbone_config(name, [1, 2, 3], freeze_batch_norm_2d=True),
            encoder_in_channels=channels(name)[1:],
            encoder_hidden_dim=WIDTH,
            encoder_attention_heads=2,
            encoder_ffn_dim=WIDTH,
            decoder_in_channels=[WIDTH] * 3,
            decoder_attention_heads=2,
            decoder_ffn_dim=WIDTH,
            decoder_layers=1,
            d_model=WIDTH,
            num_queries=8,
            num_denoising=4,
            num_labels=CLASSES,
        )
    )


def boxes():
    return [
        dict(class_labels=torch.tensor([0, 2]), boxes=torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.4, 0.4]]))
    ] * 2


def regions():
    masks = torch.zeros(2, 64, 64)
    masks[0, :30], masks[1, 30:] = 1, 1
    return dict(mask_labels=[masks] * 2, class_labels=[torch.tensor([0, 2])] * 2)


# what builds the model, its targets, the way to the timm model in it, the stages that it takes
MODELS = {
    "mask2former": (mask2former, regions, "model.pixel_level_module.encoder._backbone", (0, 1, 2, 3)),
    "upernet": (
        upernet,
        lambda: dict(labels=torch.arange(2 * 64 * 64).view(2, 64, 64) % CLASSES),
        "backbone._backbone",
        (0, 1, 2, 3),
    ),
    "detr": (detr, lambda: dict(labels=boxes()), "model.backbone.model", (3,)),
    "rt_detr": (rt_detr, lambda: dict(labels=boxes()), "model.backbone.model._backbone", (1, 2, 3)),
}


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(name, out_indices):
    """A backbone whose norms have seen images, as the weights of a run would be."""
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, out_indices=out_indices)
    for _ in range(3):
        model.train()(3 * images() + 1)
    return model.eval()


@pytest.mark.parametrize("name", SOME_PYRAMIDS)
@pytest.mark.parametrize(
    "kind", ["mask2former", "detr", *(pytest.param(k, marks=pytest.mark.slow) for k in ("upernet", "rt_detr"))]
)
def test_trains_predicts_and_reloads(kind, name, tmp_path):
    if (kind, name) == ("detr", "test_foveal_rmt"):
        pytest.skip("transformers' DETR renames every out_proj of a folder that it loads, RMT's too")
    make, targets, path, out_indices = MODELS[kind]
    torch.manual_seed(0)
    model = make(name)
    inner = model.get_submodule(path)

    # the weights of a timm model go in as they are, and its maps come out
    reference = trained(name, out_indices)
    assert inner.load_state_dict(reference.state_dict(), strict=False).missing_keys == []
    with torch.no_grad():
        for got, want in zip(inner.eval()(images()), reference(images()), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    model.train()
    loss = model(pixel_values=images(), **targets()).loss
    loss.backward()
    assert torch.isfinite(loss)
    first = next(inner.parameters())
    assert first.grad.abs().max() > 0
    before = first.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert not torch.equal(first, before)

    model.eval()
    with torch.no_grad():
        want = model(pixel_values=images())
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        got = again.eval()(pixel_values=images())
    compared = [key for key, value in want.items() if torch.is_tensor(value) and value.is_floating_point()]
    assert "logits" in compared or "class_queries_logits" in compared
    for key in compared:
        assert torch.isfinite(want[key]).all()
        torch.testing.assert_close(
            got[key], want[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_detr_with_the_norms_that_it_freezes_itself():
    """OverLoCK sums up convolutions with the norms' statistics, which DETR's own norms hold without an epsilon."""
    torch.manual_seed(0)
    inner = detr("test_foveal_overlock", freeze_batch_norm_2d=False).model.backbone.model
    reference = trained("test_foveal_overlock", (3,))
    assert inner.load_state_dict(reference.state_dict(), strict=False).missing_keys == []
    with torch.no_grad():
        torch.testing.assert_close(inner.eval()(images()), reference(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOME_PYRAMIDS)
def test_backbone_alone(name):
    """Some of the stages, other image sizes and channels."""
    model = transformers.AutoBackbone.from_config(backbone_config(name, [1, 3], num_channels=1)).eval()
    want = channels(name)
    assert model.channels == [want[1], want[3]]
    with torch.no_grad():
        maps = model(images(96)[:, :1]).feature_maps
    assert [m.shape for m in maps] == [(2, want[1], 12, 12), (2, want[3], 3, 3)]


def test_weights_of_a_folder(tmp_path):
    """A folder that `foveal train` or timm wrote, by timm's name for it."""
    torch.manual_seed(0)
    model = timm.create_model("test_foveal_dinat", num_classes=CLASSES).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    backbone = transformers.TimmBackbone.from_pretrained(f"local-dir:{tmp_path}", out_indices=(2, 3)).eval()
    with torch.no_grad():
        got = backbone(images()).feature_maps
        want = model.forward_intermediates(images(), indices=(2, 3), intermediates_only=True)
    torch.testing.assert_close(list(got), want)
