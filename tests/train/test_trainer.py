"""The training loop: each key of a recipe does what it says."""

import csv
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import distributed, nn

from foveal.backbones.nat import NAT
from foveal.configs.schema import ConfigError, ModelConfig, OptimConfig
from foveal.errors import Interrupted
from foveal.train import classify, train, trainer
from foveal.train.classify import build_model, growing_sizes
from foveal.train.optim import create_optimizer

from .test_resume import metrics, stop_at

TINY = ["schedule.epochs=1", "data.limit=64", "data.val_limit=32", "train.batch_size=32", "data.image_size=16"]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_input_that_grows(quick, tmp_path, monkeypatch):
    seen, original = [], NAT.forward

    def forward(self, images):
        if self.training:
            seen.append(images.shape[-1])
        return original(self, images)

    monkeypatch.setattr(NAT, "forward", forward)
    options = [
        *TINY,
        f"output={tmp_path / 'run'}",
        "data.image_size=32",
        "augment.sizes=[16,24,32]",
        "augment.mixup=0.2",
    ]
    train(quick, [*options, "schedule.epochs=4"])
    assert seen == [16, 16, 16, 16, 24, 24, 32, 32]


@pytest.mark.parametrize(("sizes", "named"), [([32, 16], r"\[32, 16\]"), ([16, 24], r"\[16, 24\].* 32")])
def test_sizes_that_do_not_grow(sizes, named):
    with pytest.raises(ConfigError, match=named):
        growing_sizes(sizes, nn.Identity(), (3, 32, 32))


def test_sizes_that_the_model_does_not_take():
    model = timm.create_model("vitrpb_isotropic_small", depth=1)
    with pytest.raises(ConfigError, match=r"augment\.sizes.*160x160"):
        growing_sizes([160, 224], model, (3, 224, 224))


def test_channels_last(quick, tmp_path, monkeypatch):
    """The same training with maps in another order of memory."""
    formats, original = [], nn.Conv2d.forward

    def forward(self, x):
        y = original(self, x)
        formats.append(y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous())
        return y

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    options = [*TINY, "train.ema_decay=0.9", "augment.erase=0"]
    for name, flag in (("usual", "false"), ("last", "true")):
        formats.clear()
        train(quick, [*options, f"output={tmp_path / name}", f"train.channels_last={flag}"])
        assert all(formats) == (flag == "true")
    usual, last = (metrics(tmp_path / name)[0] for name in ("usual", "last"))
    assert float(last["val_loss"]) == pytest.approx(float(usual["val_loss"]), rel=1e-4)


def test_synchronized_batch_norms(tmp_path):
    config = ModelConfig(name="test_foveal_care", sync_bn=True)
    alone = build_model(config, 10, 3)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in alone.modules())  # there is nobody to share with
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = build_model(config, 10, 3)
    finally:
        distributed.destroy_process_group()
    norms = [m for m in alone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) > 0
    assert alone.state_dict().keys() == model.state_dict().keys()


def test_decay_by_layer_and_what_is_not_decayed():
    """timm's groups by the model's own order of layers; its ``no_weight_decay`` names, biases and norms have none."""
    model = timm.create_model("test_foveal_dinat", num_classes=10)
    optimizer = create_optimizer(model, OptimConfig(lr=1e-3, weight_decay=0.1, layer_decay=0.5), 64)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(names.values())
    spared = model.no_weight_decay()
    assert spared
    for name, group in found.items():
        decays = model.get_parameter(name).ndim > 1 and name not in spared
        assert group["weight_decay"] == (0.1 if decays else 0.0), name
    assert found["head.weight"]["lr_scale"] == 1
    assert found["patch_embed.norm.weight"]["lr_scale"] == min(group["lr_scale"] for group in found.values()) < 0.5


def test_fine_tuning_at_a_larger_size_resamples_the_tables(folder_recipe, make_images, tmp_path):
    """MaxViT's windows grow with the image, and their tables with them, as 224 to 384."""
    options = [f"data.root={make_images()}", "model.kwargs.img_size=64"]
    recipe = tmp_path / "maxvit.yaml"
    text = folder_recipe.read_text()
    recipe.write_text("model: {name: test_foveal_maxvit}\n" + text[text.index("data:") :])
    train(recipe, [*options, f"output={tmp_path / 'small'}", "data.image_size=64"])
    more = ["model.kwargs.img_size=96", "data.image_size=96", f"model.checkpoint={tmp_path / 'small'}", "optim.lr=1e-9"]
    train(recipe, [*options, *more, f"output={tmp_path / 'large'}"])
    small, large = (
        timm.create_model(f"local-dir:{tmp_path / n / 'best'}", pretrained=True) for n in ("small", "large")
    )
    tables = [n for n, p in large.named_parameters() if p.shape != small.get_parameter(n).shape]
    assert tables
    assert all(name.endswith("relative_position_bias_table") for name in tables)
    for name, parameter in large.named_parameters():
        if name not in tables:
            torch.testing.assert_close(parameter, small.get_parameter(name), rtol=0, atol=1e-6)


def test_a_teacher_of_timm(quick, tmp_path):
    """Any model that timm makes, here from a folder."""
    teacher = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    timm.models.save_for_hf(teacher, str(tmp_path / "teacher"), model_args={"in_chans": 1}, safe_serialization=True)
    for kind in ("hard", "soft"):
        taught = [f"distill.teacher={tmp_path / 'teacher'}", f"distill.kind={kind}", f"output={tmp_path / kind}"]
        train(quick, [*TINY, *taught])


def test_what_is_logged_of_an_epoch(quick, tmp_path):
    train(quick, [*TINY, f"output={tmp_path / 'run'}"])
    (row,) = rows(tmp_path / "run")
    assert 0 <= float(row["data_wait"]) < 1
    assert float(row["grad_norm"]) > 0
    assert float(row["memory_mib"]) > 100


def test_norm_of_the_gradient_with_clipping_and_without(quick, tmp_path):
    """Before it is clipped, and of the true gradient where a scaled one is used."""
    norms = []
    for name, more in (("plain", []), ("clipped", ["optim.clip_grad=1e9"]), ("fp16", ["train.amp=fp16"])):
        train(quick, [*TINY, "train.batch_size=64", *more, "augment.erase=0", f"output={tmp_path / name}"])
        norms.append(float(rows(tmp_path / name)[0]["grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[2] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize(("seconds", "most"), [(0.2, 4), (0.01, 1), (1e9, 8)])
def test_slow_updates_are_looked_at_more_often(quick, tmp_path, monkeypatch, seconds, most):
    """As on an accelerator, which is not waited for at each update: a signal is answered within ``seconds``, or an
    update. The first one is always looked at."""
    calls = stop_at(2, monkeypatch)
    counted = classify.Task.train_step

    def slow(self, model, batch, epoch):
        time.sleep(0.05)
        return counted(self, model, batch, epoch)

    monkeypatch.setattr(classify.Task, "train_step", slow)
    monkeypatch.setattr(trainer, "LOOK_INTERVAL", {"cpu": 20})
    monkeypatch.setattr(trainer, "LOOK_SECONDS", seconds)
    options = ["data.limit=64", "data.val_limit=32", "train.batch_size=8", "data.image_size=16"]
    with pytest.raises(Interrupted):
        train(quick, [*options, "schedule.epochs=2", f"output={tmp_path / 'run'}"])
    assert not (tmp_path / "run/summary.json").exists()
    assert 2 <= len(calls) <= 1 + most if most < 8 else len(calls) == 8


@pytest.mark.slow
def test_compiled(quick, tmp_path):
    torch._dynamo.reset()  # other tests compiled the same code for other sizes, after which sizes are symbols
    for name in ("plain", "compiled"):
        compiled = f"train.compile={'true' if name == 'compiled' else 'false'}"
        train(quick, [*TINY, compiled, "model.drop_path_rate=0", f"output={tmp_path / name}"])
    plain, compiled = (metrics(tmp_path / name)[0] for name in ("plain", "compiled"))
    assert float(compiled["val_loss"]) == pytest.approx(float(plain["val_loss"]), rel=1e-3)


def test_early_stopping(quick, tmp_path, monkeypatch):
    """Two evaluations without a better score end the run, which is then finished."""
    scores = iter([10.0, 30.0, 20.0, 30.0, 50.0])
    evaluated = {"val_loss": 1.0, "top5": 1.0}
    monkeypatch.setattr(classify.Task, "evaluate", lambda *_: evaluated | {"top1": next(scores)})
    options = [*TINY, f"output={tmp_path / 'run'}", "schedule.epochs=9", "train.patience=2"]
    summary = train(quick, options)
    assert (summary["epochs"], summary["best_epoch"], summary["last_top1"]) == (4, 2, 30.0)
    again = train(quick, [*options, "resume=auto"])
    assert again == summary
    assert next(scores) == 50.0


def test_the_best_epoch_by_the_held_out_loss(quick, tmp_path, monkeypatch):
    """The smallest one, where the score would choose another and would not stop."""
    losses, scores = iter([3.0, 1.0, 2.0, 1.5, 0.5]), iter([10.0, 20.0, 30.0, 40.0, 50.0])
    monkeypatch.setattr(
        classify.Task, "evaluate", lambda *_: {"val_loss": next(losses), "top5": 1.0, "top1": next(scores)}
    )
    options = [*TINY, f"output={tmp_path / 'run'}", "schedule.epochs=9", "train.patience=2", "train.monitor=loss"]
    summary = train(quick, options)
    assert (summary["epochs"], summary["best_epoch"], summary["val_loss"]) == (4, 2, 1.0)


def test_a_forced_backend_is_printed(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FOVEAL_BACKEND", "reference")
    options = ["data.limit=64", "data.val_limit=8", "data.image_size=16", "schedule.epochs=1"]
    train(quick, [*options, f"output={tmp_path / 'run'}"])
    assert "FOVEAL_BACKEND=reference" in capsys.readouterr().out
