"""The recipe of the demonstration, shortened: what it shows is learned, by the model it names."""

import json

import pytest

from foveal.train import train


def test_digits_are_learned_in_a_few_epochs(tmp_path):
    train("classify/digits", [f"output={tmp_path / 'run'}", "schedule.epochs=6", "train.threads=1"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["n"] == 360
    assert summary["top1"] >= 85  # 97 and more after the recipe's own length


@pytest.mark.slow
def test_digits_recipe(tmp_path):
    train("classify/digits", [f"output={tmp_path / 'run'}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last_top1"] >= 97  # the best epoch was chosen on the images that it is scored on
