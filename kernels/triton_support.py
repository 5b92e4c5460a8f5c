"""Checks whether Triton kernels can run a call, without importing Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from .problem import Problem

# False excludes the Triton kernels from the automatic choice; by name they still run.
AUTOMATIC = True

LARGEST = 2**15  # keys of a window of aggregation, whose multiples by the window's length fit 32 bits

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_installed = find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def interpreting() -> bool:
    """Whether Triton runs in its interpreter. Read once, as Triton reads the variable when a kernel is defined."""
    return _interpreted


def unsupported_reason(problem: Problem) -> str | None:
    """The reason why no Triton kernel can run the call: installation, device or dtype; else None."""
    if not _installed:
        return "Triton is not installed (it comes with PyTorch's CUDA packages)"
    if problem.device != "cuda" and not (problem.device == "cpu" and interpreting()):
        return f"Triton kernels run on cuda, and under TRITON_INTERPRET=1 on a cpu (got {problem.device})"
    if problem.old_gpu:
        return f"Triton kernels need compute capability 8.0, below which there is no bfloat16 (got {problem.old_gpu})"
    if problem.subclass:
        return "Triton kernels need storage, which a subclass of Tensor may not have"
    if problem.dtype not in DTYPES:
        return f"Triton kernels take float16, bfloat16 and float32 (got {problem.dtype})"
    return None
