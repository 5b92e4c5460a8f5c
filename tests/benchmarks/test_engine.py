"""foveal bench engine: the engine and the loop written by hand do the same training."""

from contextlib import ExitStack

import torch

from foveal.benchmarks import engine
from foveal.benchmarks.measure import Bench
from foveal.configs.schema import ClassifyConfig, load_config


def test_both_loops_train_the_same(tmp_path):
    """They leave the same weights, once nothing is drawn at random and the learning rate is constant."""
    fixed = ["shift=0", "rotate=0", "zoom=0"]
    options = [*engine.PLAIN, "data.image_size=16", "data.limit=256", *(f"augment.{each}" for each in fixed)]
    options += [f"output={tmp_path}"]
    config = load_config("classify/digits", options, ClassifyConfig)
    states = []
    with ExitStack() as stack:
        for run, model in (engine._engine(config, 3, tmp_path, stack), engine._by_hand(config, 3)):
            before = model.head.weight.clone()
            for _ in range(2):
                run()
            states.append(model.state_dict())
            assert not torch.equal(before, model.head.weight)
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_the_rows():
    (case,) = engine.TINY
    found = list(engine.engine_rows(case, Bench(rounds=1)))
    assert [row["loop"] for row in found] == ["engine", "by hand"]
    assert found[1]["of_by_hand"] == 1
    assert all(row["update_ms"] > 0 for row in found)
