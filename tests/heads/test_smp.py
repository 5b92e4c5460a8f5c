"""Backbones as encoders of segmentation_models_pytorch: the encoder's name is ``tu-NAME``."""

import pytest
import timm
import torch
import torch.nn.functional as F

from ..variants import SOME_PYRAMIDS

smp = pytest.importorskip(
    "segmentation_models_pytorch", reason="needs segmentation_models_pytorch", exc_type=ImportError
)

CLASSES = 3


@pytest.mark.parametrize("name", SOME_PYRAMIDS)
@pytest.mark.parametrize(
    "architecture", ["Unet", "Segformer", *(pytest.param(k, marks=pytest.mark.slow) for k in ("FPN", "UPerNet"))]
)
def test_trains_and_predicts(architecture, name):
    torch.manual_seed(0)
    model = getattr(smp, architecture)(f"tu-{name}", encoder_weights=None, classes=CLASSES)
    reference = timm.create_model(name, features_only=True)
    assert model.encoder.out_channels == [3, 0, *reference.feature_info.channels()]
    images, targets = torch.randn(2, 3, 64, 64), torch.randint(CLASSES, (2, 64, 64))

    loss = F.cross_entropy(model.train()(images), targets)
    loss.backward()
    assert torch.isfinite(loss)
    first = next(model.encoder.parameters())
    assert first.grad.abs().max() > 0
    before = first.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(first, before)

    reference.load_state_dict(model.encoder.model.state_dict())
    with torch.no_grad():
        logits = model.eval()(images)
        features = model.encoder(images)
        torch.testing.assert_close(features[2:], reference.eval()(images))
    assert logits.shape == (2, CLASSES, 64, 64)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", SOME_PYRAMIDS)
def test_other_depths_channels_and_sizes(name):
    model = smp.Unet(
        f"tu-{name}", encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 8, 8), in_channels=1, classes=1
    )
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 1, 96, 48)).shape == (1, 1, 96, 48)


@pytest.mark.parametrize("name", SOME_PYRAMIDS)
@pytest.mark.parametrize("architecture", ["DeepLabV3Plus", "PAN"])
def test_a_smaller_output_stride_is_refused(architecture, name):
    """They want a stride of 16 and dilate the last stage for it."""
    with pytest.raises(ValueError, match=r"output_stride 16\b.*\b32"):
        getattr(smp, architecture)(f"tu-{name}", encoder_weights=None, classes=CLASSES)
