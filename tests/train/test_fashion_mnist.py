"""The real thing: the shipped Fashion-MNIST recipe, shortened, reaches 91 % (in some ten minutes on two cores)."""

import json

import pytest

from foveal.configs.schema import load_config
from foveal.train import evaluate, train
from foveal.train.data.factory import idx_root


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fashion_mnist(tmp_path):
    root = idx_root(load_config("fashion_mnist").data).resolve()
    assert (root / "train-images-idx3-ubyte.gz").exists() or (root / "train-images-idx3-ubyte").exists(), (
        f"Fashion-MNIST is not in {root}: run `make fashion-mnist`, or set FOVEAL_FASHION_MNIST to its folder"
    )
    train("fashion_mnist", [f"output={tmp_path / 'run'}", f"data.root={root}", "schedule.epochs=9"])
    evaluate(tmp_path / "run" / "last", [f"output={tmp_path / 'result.json'}"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["n"] == 10_000
    assert result["top1"] >= 91.0
