"""Models with a second head: the auxiliary loss, and learning from a teacher."""

from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from foveal.configs.schema import ClassifyConfig, ConfigError, ModelConfig
from foveal.train import evaluate, train
from foveal.train.checkpoint import CheckpointError
from foveal.train.classify import Task
from foveal.train.losses import Teacher, distillation_loss, prepare_heads

from .conftest import QUICK

DATA = SimpleNamespace(preprocessing={"input_size": (3, 2, 2)}, notes=[])


class TwoHeads(torch.nn.Module):
    """The convention: a pair in training and only when asked, else logits."""

    def __init__(self):
        super().__init__()
        self.head, self.other = torch.nn.Linear(12, 4), torch.nn.Linear(12, 4)
        self.asked, self.num_classes = False, 4

    def set_auxiliary_training(self, enable=True):
        self.asked = enable

    set_distilled_training = set_auxiliary_training

    def forward(self, x):
        x = x.flatten(1)
        return (self.head(x), self.other(x)) if self.asked and self.training else self.head(x)


def recipe(**sections) -> ClassifyConfig:
    config = ClassifyConfig(output="-", model=ModelConfig(name="two_heads"))
    for section, values in sections.items():
        for key, value in values.items():
            setattr(getattr(config, section), key, value)
    return config


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 2, 2, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])


def test_auxiliary_head_is_weighed():
    torch.manual_seed(0)
    model, (images, targets) = TwoHeads(), batch()
    config = recipe(loss=dict(auxiliary=0.4))
    prepare_heads(model, config)
    got = Task(config, model, list("abcd"), DATA).train_step(model, (images, targets), 0)
    x = images.flatten(1)
    want = F.cross_entropy(model.head(x), targets) + 0.4 * F.cross_entropy(model.other(x), targets)
    torch.testing.assert_close(got, want)
    assert not isinstance(model.eval()(images), tuple)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("heads", [1, 2])
def test_distillation(kind, heads):
    """The second head learns from the teacher where there is one, else the only head."""
    torch.manual_seed(0)
    model, (images, targets) = TwoHeads(), batch()
    config = recipe(distill=dict(teacher="x", alpha=0.3, kind=kind, temperature=2.0))
    if heads == 2:
        prepare_heads(model, config)
    outputs = torch.randn(6, 4)
    got = Task(config, model, list("abcd"), DATA, teacher=lambda x: outputs).train_step(model, (images, targets), 0)
    x = images.flatten(1)
    taught = model.other(x) if heads == 2 else model.head(x)
    if kind == "hard":
        part = F.cross_entropy(taught, outputs.argmax(1))
    else:
        p, q = (outputs / 2).softmax(1), (taught / 2).softmax(1)
        part = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(got, 0.7 * F.cross_entropy(model.head(x), targets) + 0.3 * part)
    torch.testing.assert_close(distillation_loss(taught, outputs, kind, 2.0), part)


def test_the_teacher_leaves_the_auxiliary_head_alone():
    torch.manual_seed(0)
    model, (images, targets) = TwoHeads(), batch()
    config = recipe(loss=dict(auxiliary=0.4), distill=dict(teacher="x", alpha=0.3))
    prepare_heads(model, config)
    outputs = torch.randn(6, 4)
    got = Task(config, model, list("abcd"), DATA, teacher=lambda x: outputs).train_step(model, (images, targets), 0)
    x = images.flatten(1)
    labels = F.cross_entropy(model.head(x), targets) + 0.4 * F.cross_entropy(model.other(x), targets)
    torch.testing.assert_close(got, 0.7 * labels + 0.3 * F.cross_entropy(model.head(x), outputs.argmax(1)))


def test_teacher_sees_images_as_it_was_trained_to(tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model("test_foveal_dinat", num_classes=4).eval()
    trained.pretrained_cfg |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "num_classes": 4}
    labels = dict(label_names=["ape", "bee", "cat", "dog"])
    timm.models.save_for_hf(trained, tmp_path, model_config=labels, safe_serialization=True)
    seen_by_student = {"input_size": (3, 32, 32), "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    teacher = Teacher(str(tmp_path), 4, seen_by_student, torch.device("cpu"), ["ape", "bee", "cat", "dog"])
    raw = torch.rand(2, 3, 32, 32)

    def normalized(mean, std):
        return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    got = teacher(normalized(seen_by_student["mean"], seen_by_student["std"]))
    want = trained(normalized((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not got.requires_grad
    with pytest.raises(ConfigError, match=r"distill.teacher: .* 4 .* 5$"):
        Teacher(str(tmp_path), 5, seen_by_student, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"distill.teacher: .*'bee' .* 1 .* 0 ."):
        Teacher(str(tmp_path), 4, seen_by_student, torch.device("cpu"), ["bee", "ape", "cat", "dog"])
    with pytest.raises(ConfigError, match=r"distill.teacher: .*no_such"):
        Teacher("no_such", 4, seen_by_student, torch.device("cpu"))


def test_a_run_teaches_another(tmp_path):
    """From a recipe: the teacher is a run; resuming with another kind of teaching is refused."""
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    options = ["schedule.epochs=1", "data.limit=128", "data.val_limit=64"]
    train(path, [f"output={tmp_path / 'teacher'}", *options])
    taught = [f"output={tmp_path / 'student'}", *options, f"distill.teacher={tmp_path / 'teacher'}"]
    train(path, taught)
    with pytest.raises(CheckpointError, match=r"distill.kind .*hard.*soft"):
        train(path, [*taught, "resume=auto", "distill.kind=soft"])


SECOND_HEAD = """\
model: {name: %s, kwargs: %s}
data: {kind: digits, image_size: 32, in_chans: 1, mean: [0.3], std: [0.37], limit: 128, val_limit: 64}
augment: {hflip: 0.0}
schedule: {epochs: 1}
train: {batch_size: 32, threads: 1, ema_decay: 0.9}
"""


def test_models_with_a_second_head_train_by_recipe(tmp_path):
    """An auxiliary head, which is part of what is saved; and a distillation head that learns from that run."""
    overlock, care = tmp_path / "overlock.yaml", tmp_path / "care.yaml"
    overlock.write_text(SECOND_HEAD % ("test_foveal_overlock", "{aux_head: true}"))
    care.write_text(SECOND_HEAD % ("test_foveal_care", "{}"))
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"loss\.auxiliary.*model\.kwargs"):
        train(overlock, [f"output={run}"])
    train(overlock, [f"output={run}", "loss.auxiliary=0.4"])
    saved = safetensors.torch.load_file(run / "best" / "model.safetensors")
    assert "aux_head.2.weight" in saved
    assert evaluate(run)["n"] == 64
    train(care, [f"output={tmp_path / 'taught'}", f"distill.teacher={run}"])
    first, second = (
        safetensors.torch.load_file(tmp_path / "taught" / "last" / "model.safetensors")[f"{name}.fc.bias"]
        for name in ("head", "dist_head")
    )
    assert (first != 0).any()
    assert (second != 0).any()
    assert not torch.equal(first, second)


def test_an_auxiliary_head_that_is_not_there(tmp_path):
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    with pytest.raises(ConfigError, match=r"loss\.auxiliary=0\.4.*test_foveal_dinat"):
        train(path, [f"output={tmp_path / 'run'}", "loss.auxiliary=0.4"])
