"""The derivation of docs/scaling.md: its formula at sizes that can be worked out by hand."""

import csv
import re
from pathlib import Path

import pytest

from foveal.benchmarks import scaling
from foveal.benchmarks.scaling import Machine, derive

PLAIN = Machine(node=8, inside=100e9, between=10e9, latency=0.0)


def test_what_is_sent():
    """A ring sends each gradient twice but for a share of its own; FSDP gathers twice and scatters once."""
    assert derive(250_000_000, 2, 1, None).bytes == 1e9
    assert derive(250_000_000, 2, 1, None, fsdp=True).bytes == 1.5e9
    assert derive(250_000_000, 1, 1, None).bytes == 0


def test_the_slowest_link_counts():
    inside, between = (derive(250_000_000, gpus, 1, None, machine=PLAIN).messages for gpus in (8, 16))
    assert inside == pytest.approx(2 * 7 / 8 * 1e9 / 100e9)
    assert between == pytest.approx(2 * 15 / 16 * 1e9 / 10e9)
    hops = derive(1, 512, 1, None, machine=Machine(latency=1e-3)).messages
    assert hops == pytest.approx(2 * 511 * 1e-3, rel=1e-3)


def test_what_cannot_be_hidden_makes_the_step_longer():
    """150 ms of messages; compute of 120 ms has 80 ms of backward pass, of which the half hides messages."""
    step = derive(750_000_000, 16, 12, 100.0, machine=Machine(between=37.5e9, latency=0.0), overlap=0.5)
    assert step.messages == pytest.approx(0.15)
    assert step.seconds == pytest.approx(0.12 + 0.15 - 0.04)
    assert step.efficiency == pytest.approx(0.12 / 0.23)
    hidden = derive(750_000_000, 16, 120, 100.0, machine=Machine(between=37.5e9, latency=0.0), overlap=0.5)
    assert (hidden.seconds, hidden.efficiency) == (1.2, 1.0)


def test_no_step_times_without_a_figure(tmp_path, capsys):
    path = tmp_path / "scaling.csv"
    assert scaling.main(["--model", "dinat_large", "--csv", str(path)]) == 0
    assert "step times wait for a measured figure" in capsys.readouterr().out
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert [(row["by"], row["gpus"]) for row in table] == [
        (by, g) for g in ("8", "64", "512") for by in ("ddp", "fsdp")
    ]
    assert {row["step_ms"] for row in table} == {"-"}
    assert scaling.main(["--model", "dinat_large", "--images-per-second", "300"]) == 0
    assert "wait" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--images-per-second", "300"], "name it with --model"),
        (["--model", "dinat_large", "--images-per-second", "0"], "above 0"),
        (["--model", "dinat_huge"], "there is no model 'dinat_huge'"),
        (["--overlap", "1.5"], "between 0 and 1"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_mistakes(arguments, says, capsys):
    with pytest.raises(SystemExit):
        scaling.main(arguments)
    assert says in capsys.readouterr().err


def test_the_page_holds_what_is_derived():
    text = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
    for name in scaling.LARGE:
        line = re.search(rf"^\| {name} \|.*$", text, re.MULTILINE).group()
        parameters = scaling.parameters_of(name)
        steps = [derive(parameters, gpus, 1, None, fsdp=fsdp) for fsdp in (False, True) for gpus in scaling.GPUS]
        cells = [f"{step.bytes / 1e6:,.0f} MB, {1e3 * step.messages:.1f} ms" for step in steps]
        assert line == f"| {name} | {parameters / 1e6:.1f} M | " + " | ".join(cells) + " |"
