"""Every kernel test runs with uninitialised memory filled with NaN: a cell that is read before it is written shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
