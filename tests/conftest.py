"""What every test begins with, so that its outcome depends on nothing but the code."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# What is printed is printed as where there is no terminal: 80 columns, no colours; in processes that tests start, too.
os.environ["COLUMNS"] = "80"
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH"):
    os.environ.pop(name, None)

# The same examples in every run, however slow the machine; `pytest --hypothesis-profile=explore` draws others.
REPEATED = settings(deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
settings.register_profile("explore", REPEATED)
settings.register_profile("repeat", REPEATED, derandomize=True)
settings.load_profile("repeat")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of any scope: what a test draws does not depend on the tests that ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
