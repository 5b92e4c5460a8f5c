"""The derivation of docs/scaling.md: its formula at sizes that can be worked out by hand."""

import csv
import re
from pathlib import Path

import pytest

from foveal.benchmarks import scaling
from foveal.benchmarks.run import write_csv
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
    path, nothing = tmp_path / "scaling.csv", ["--results", str(tmp_path)]
    assert scaling.main(["--model", "dinat_large", "--csv", str(path), *nothing]) == 0
    assert "step times wait for a measured figure of dinat_large" in capsys.readouterr().out
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert [(row["by"], row["gpus"]) for row in table] == [
        (by, g) for g in ("8", "64", "512") for by in ("ddp", "fsdp")
    ]
    assert {row["step_ms"] for row in table} == {"-"}
    assert scaling.main(["--model", "dinat_large", "--images-per-second", "300", *nothing]) == 0
    assert "wait" not in capsys.readouterr().out


@pytest.fixture
def results(tmp_path) -> Path:
    """As `foveal bench gpu` writes them, made up: DiNAT-L twice, one that failed, a peer, and a dry run."""
    told = {"note": "", "date": "2000-01-01", "gpu": "GPU of a test"}
    made_up = [
        ("gpu-models.csv", "dinat_large", "eager", "training", "100.0", {}),
        ("gpu-models.csv", "dinat_large", "compiled", "training", "200.0", {}),
        ("gpu-models.csv", "dinat_large", "compiled", "inference", "900.0", {}),
        ("gpu-models.csv", "overlock_b", "compiled", "training", "", {"note": "it failed"}),
        ("gpu-models.csv", "nat_tiny", "eager", "training", "50.0", {}),
        ("gpu-models.csv", "convnext_tiny", "eager", "training", "500.0", {}),
        ("gpu-models-dry.csv", "halo_h7", "eager", "training", "7.0", {"gpu": ""}),
    ]
    for name in ("gpu-models.csv", "gpu-models-dry.csv"):
        table = [
            {"model": model, "peer": "", "input": "32x3x224x224", "run": run, "mode": mode, "images_per_second": speed}
            | {**told, **more}
            for file, model, run, mode, speed, more in made_up
            if file == name
        ]
        write_csv(tmp_path / name, table, {})
    return tmp_path


def test_measured_figures_are_read(results, tmp_path, capsys):
    found = scaling.measured(results)
    assert {name: (own.images_per_second, own.batch, own.run) for name, own in found.items()} == {
        "dinat_large": (200.0, 32, "compiled"),
        "nat_tiny": (50.0, 32, "eager"),
    }
    path = tmp_path / "scaling.csv"
    assert scaling.main(["--results", str(results), "--csv", str(path)]) == 0
    said = capsys.readouterr().out
    assert "dinat_large: 200 images/s, batch 32, compiled, GPU of a test, 2000-01-01" in said
    assert "wait for a measured figure of dinat_s_large, halo_h7," in said
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert {row["model"] for row in table} == {*scaling.LARGE, "nat_tiny"}
    for row in table:
        if row["model"] not in found:
            assert (row["step_ms"], row["efficiency"]) == ("-", "-")
            continue
        own, fsdp = found[row["model"]], row["by"] == "fsdp"
        step = derive(scaling.parameters_of(row["model"]), int(row["gpus"]), 32, own.images_per_second, fsdp=fsdp)
        assert row["step_ms"] == f"{1e3 * step.seconds:.1f}"
        assert float(row["step_ms"]) >= 1e3 * 32 / own.images_per_second
        assert row["batch"] == "32"


def test_the_page_is_completed_by_one_command(results, tmp_path):
    page = tmp_path / "scaling.md"
    marked = "{}\n\n<!-- steps -->\n\n{}\n\n<!-- end -->\n\n{}\n\n<!-- sent -->\n\n{}\n\n<!-- end -->\n\n{}\n"
    page.write_text(marked.format("above", "old", "between", "", "below"))
    for _ in range(2):  # and again, with the same outcome
        assert scaling.main(["--results", str(results), "--page", str(page)]) == 0
        above, steps, between, sent, below = re.split(r"\n\n<!-- \w+ -->\n\n", page.read_text())
        assert (above, between, below) == ("above", "between", "below\n")
        assert sent == scaling.sent_table()
        first, second = steps.splitlines()[2:4]
        assert first.startswith("| dinat_large | 200 (GPU of a test, compiled, 2000-01-01) | 32 | ")
        assert second.startswith("| nat_tiny | 50 ")
        assert "Not measured on a GPU yet, so without step times: dinat_s_large, halo_h7," in steps
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"has not one place between <!-- sent --> and <!-- end -->"):
        scaling.main(["--results", str(results), "--page", str(page)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--images-per-second", "300"], "name it with --model"),
        (["--model", "dinat_large", "--images-per-second", "0"], "above 0"),
        (["--model", "dinat_huge"], "there is no model 'dinat_huge'"),
        (["--overlap", "1.5"], "between 0 and 1"),
        (["--batch", "0"], "at least 1"),
        (["--results", "nowhere"], "nowhere is no folder"),
    ],
)
def test_mistakes(arguments, says, capsys):
    with pytest.raises(SystemExit):
        scaling.main(arguments)
    assert says in capsys.readouterr().err


def test_the_page_holds_what_is_derived():
    """From the tables that are there: with new ones, `foveal bench scaling --page docs/scaling.md` writes it anew."""
    text = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
    assert f"<!-- steps -->\n\n{scaling.step_table(scaling.measured(scaling.RESULTS))}\n\n<!-- end -->" in text
    assert f"<!-- sent -->\n\n{scaling.sent_table()}\n\n<!-- end -->" in text
    for name in scaling.LARGE:
        line = re.search(rf"^\| {name} \|.*$", text, re.MULTILINE).group()
        parameters = scaling.parameters_of(name)
        steps = [derive(parameters, gpus, 1, None, fsdp=fsdp) for fsdp in (False, True) for gpus in scaling.GPUS]
        cells = [f"{step.bytes / 1e6:,.0f} MB, {1e3 * step.messages:.1f} ms" for step in steps]
        assert line == f"| {name} | {parameters / 1e6:.1f} M | " + " | ".join(cells) + " |"
