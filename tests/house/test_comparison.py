"""The README's table of what works where: every "yes" and "no" is what happens when it is tried here."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from foveal.kernels import RelativePositionBias, neighborhood_aggregate, neighborhood_attention

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
# What a peer raises where it cannot do something. Anything else is a mistake of this file, and fails.
REFUSALS = (AssertionError, AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)

Try = Callable[[], object]


def table() -> dict[str, dict[str, str]]:
    """The table as {row: {column: cell}}."""
    lines = re.search(r"^\| what works \|.*?(?=^\s*$)", README, re.MULTILINE | re.DOTALL)
    assert lines, "the README has no table of what works where"
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].strip().splitlines())
    columns = [column.split()[0] for column in header[1:]]
    return {row[0]: dict(zip(columns, row[1:], strict=True)) for row in rows}


def inputs(grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, 12, 12, 2, 16, requires_grad=grad) for _ in range(3))


def natten_forward(grad: bool = False) -> Tensor:
    from natten import na2d

    return na2d(*inputs(grad), kernel_size=7, dilation=1)


def ours_forward(grad: bool = False) -> Tensor:
    return neighborhood_attention(*inputs(grad), kernel_size=7, bias=RelativePositionBias(torch.randn(2, 13, 13)))


def timms(name: str) -> nn.Module:
    """A model of timm's own, not one that foveal registered."""
    module = timm.models.model_entrypoint(name).__module__ if timm.is_model(name) else ""
    if not module.startswith("timm."):
        raise NotImplementedError(f"timm has no {name}")
    return timm.create_model(name).eval()


def dinat_of_transformers() -> None:
    """In a process of its own: other tests give transformers the operations that NATTEN took away."""
    code = (
        "import torch; from transformers import DinatConfig, DinatModel; "
        "config = DinatConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 2], dilations=[[1], [2]]); "
        "DinatModel(config).eval()(torch.randn(1, 3, 64, 64))"
    )
    with tempfile.TemporaryDirectory() as elsewhere:  # beside our kernels/, transformers takes it for its own
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=elsewhere)
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1])


def authors_dinat() -> object:
    """What the layer of the authors' NAT and DiNAT calls."""
    from natten import NeighborhoodAttention2D

    return NeighborhoodAttention2D(32, kernel_size=7, dilation=1, num_heads=2, qkv_bias=True, rel_pos_bias=True)


def natten_bias() -> Tensor:
    from natten import na2d

    return na2d(*inputs(), kernel_size=7, rpb=torch.randn(2, 13, 13))


def natten_017() -> object:
    from natten.functional import na2d_av

    return na2d_av


class Layer(nn.Module):
    """One operation as a model, to be exported."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.operation(q, k, v, kernel_size=7)


def exported(operation: Callable[[], Callable[..., Tensor]]) -> Try:
    def call() -> object:
        qkv = inputs()
        program = torch.export.export(Layer(operation()), qkv)
        torch.testing.assert_close(program.module()(*qkv), neighborhood_attention(*qkv, kernel_size=7))
        return torch.onnx.export(program, dynamo=True, verbose=False)

    return call


def at(model: Callable[[str], nn.Module], name: str, height: int = 200, width: int = 312) -> Try:
    return lambda: model(name)(torch.randn(1, 3, height, width))


def natten_op() -> Callable[..., Tensor]:
    from natten import na2d

    return na2d


def ours(name: str) -> nn.Module:
    return timm.create_model(name).eval()


def detector() -> object:
    from foveal.heads.build import build_detector

    return build_detector("test_foveal_dinat", "retinanet", num_classes=3).eval()([torch.rand(3, 96, 130)])


# What is tried for each cell; a cell without a trial is a dash.
TRIALS: dict[str, dict[str, Try]] = {
    "NAT and DiNAT by name, on a CPU": {
        "foveal": at(ours, "test_foveal_dinat"),
        "timm": at(timms, "dinat_mini"),
        "transformers": dinat_of_transformers,
        "authors'": authors_dinat,
    },
    "neighborhood attention, forward on a CPU": {"foveal": ours_forward, "NATTEN": natten_forward},
    "its gradients on a CPU": {
        "foveal": lambda: ours_forward(grad=True).sum().backward(),
        "NATTEN": lambda: natten_forward(grad=True).sum().backward(),
    },
    "its relative position bias": {
        "foveal": ours_forward,
        "NATTEN": natten_bias,
        "transformers": dinat_of_transformers,
        "authors'": authors_dinat,
    },
    "its export to ONNX": {
        "foveal": exported(lambda: neighborhood_attention),
        "NATTEN": exported(natten_op),
    },
    "weighted sums (`na2d_av`)": {
        "foveal": lambda: neighborhood_aggregate(
            torch.rand(1, 12, 12, 2, 25), torch.randn(1, 12, 12, 2, 8), kernel_size=5
        ),
        "NATTEN": natten_017,
        "authors'": natten_017,
    },
    "HaloNet on 200x312 pixels": {"foveal": at(ours, "halo26t"), "timm": at(timms, "halonet26t")},
    "MaxViT on 200x312 pixels": {"foveal": at(ours, "maxvit_tiny_224"), "timm": at(timms, "maxvit_tiny_tf_224")},
    "OverLoCK, CARE, VAN and RMT by name": {
        "foveal": lambda: [at(ours, name)() for name in ("overlock_xt", "care_s0", "van_b0", "rmt_t")],
        "timm": lambda: [timms(name) for name in ("overlock_xt", "care_s0", "van_b0", "rmt_t")],
    },
    "a detector on any of these backbones": {"foveal": detector},
}
# The message where something does not work: it must have failed for this reason.
REASONS = {
    "timm": r"timm has no \w+|must be divisible by window|^$",  # the last: halo_attn's bare assertion
    "NATTEN": r"does not support backward on CPU|argument 'rpb'|na2d_av|to an ONNX model",
    "transformers": r"natten2d",
    "authors'": r"argument 'rel_pos_bias'|na2d_av",
}
CELLS = [(row, column) for row, trials in TRIALS.items() for column in trials]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize(("row", "column"), CELLS, ids=[f"{row}: {column}" for row, column in CELLS])
def test_a_cell_is_what_happens(row: str, column: str) -> None:
    package = {"NATTEN": "natten", "authors'": "natten"}.get(column, column)
    pytest.importorskip(package, reason=f"{package} is not installed")
    try:
        TRIALS[row][column]()
        happened = "yes"
    except REFUSALS as error:
        assert package != "foveal", error
        assert re.search(REASONS[column], str(error)), error
        happened = "no"
    assert table()[row][column] == happened


def test_nothing_stands_in_the_table_that_is_not_tried() -> None:
    assert [*table()] == [*TRIALS]
    for row, cells in table().items():
        assert {column for column, cell in cells.items() if cell != "-"} == set(TRIALS[row])
