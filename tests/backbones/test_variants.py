"""Every registered model can be made for real. Their published sizes are in the tests of their families."""

import pytest
import timm
import torch

import foveal


@pytest.mark.slow
@pytest.mark.parametrize("name", foveal.list_models())
def test_construction(name):
    """With initialised parameters, for other classes; as many as are counted without memory."""
    model = timm.create_model(name, num_classes=3)
    assert model.num_classes == 3
    assert [n for n, p in model.named_parameters() if not torch.isfinite(p).all()] == []
    with torch.device("meta"):
        counted = timm.create_model(name, num_classes=3)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in counted.parameters())
