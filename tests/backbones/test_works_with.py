"""Every family in the tools that users bring: the cells of docs/works_with.md.

A tool that wraps, replaces, recomputes or watches the modules of a network must find that every module is called and
computes with what it holds, and that no tensor that a hook has seen is overwritten.
"""

import copy
import functools
import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import apply_test_time_pool
from timm.models import save_for_hf
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import foveal.backbones
from foveal.backbones.profile import of_model
from foveal.kernels import backend
from foveal.train.checkpoint import save_model
from foveal.weights.convert import convert
from foveal.weights.export import export

from .test_contract import SMALL

# The small variant of every family, and more where the registry holds other structures.
CASES: dict[str, dict] = {
    **{name: {} for name in foveal.backbones.list_models() if name.startswith("test_foveal_")},
    **{SMALL[case].name: SMALL[case].arguments for case in ("dinat_s", "isotropic", "vitrpb", "fan_vit")},
    # timm's hybrids, narrow: one with each activation and attention
    **{name: dict(width_factor=0.25) for name in ("halo26t", "sehalo33ts", "eca_haloext26ts")},
    "lamhalobot50ts_256": dict(width_factor=0.25, img_size=64),
    "triplet_resnet18": dict(channels=(16, 32, 48, 64)),
    "triplet_resnet50": dict(channels=(8, 8, 16, 16)),
    "triplet_mobilenetv2_100": dict(channel_multiplier=0.25),
}
SLOW = ("eca_haloext26ts", "lamhalobot50ts_256", "test_foveal_agent_pvt", "test_foveal_fan", "test_foveal_agent_swin")
LONG = (
    SMALL["fan_vit"].name,
    "test_foveal_agent_cswin",
    "test_foveal_agent_deit",
    "test_foveal_inline_pvt",
    "test_foveal_moh_vit",
    "test_foveal_tap_fan",
    "triplet_mobilenetv2_100",
    "triplet_resnet50",
)


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (name in SLOW + LONG) + [pytest.mark.long] * (name in LONG)


families = pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in CASES])


NO_PLAIN_HEAD = [case.name for case in SMALL.values() if not case.plain_head]


def structure(name: str, **kwargs) -> set:
    """The kinds of layers in a model, by class and parameters, and whether it takes one size of images alone."""
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    layers = {(type(m), *sorted(n for n, p in m._parameters.items() if p is not None)) for m in model.modules()}
    return layers | {("fixed size", model.default_cfg["fixed_input_size"])}


def test_every_family_is_covered():
    families = {foveal.backbones.family(name) for name in foveal.backbones.list_models()}
    assert {foveal.backbones.family(name) for name in CASES} == families


@pytest.mark.slow
def test_every_structure_is_covered():
    covered = set().union(*(structure(name, **arguments) for name, arguments in CASES.items()))
    others = {name: structure(name) - covered for name in foveal.backbones.list_models() if name not in CASES}
    assert {name: left for name, left in others.items() if left} == {}


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


SQUARE = images(2, 3, 64, 64)


def second(name: str) -> torch.Tensor:
    """Images of another size, at which DiNAT's last maps are smaller than its windows; else other images."""
    return images(2, 3, 64, 64).flip(3) if fixed(name) else images(2, 3, 40, 72)


def fixed(name: str) -> bool:
    """Whether a case takes images of 64 x 64 alone."""
    return "img_size" in CASES[name]


def create(name: str, **kwargs) -> nn.Module:
    """A model in evaluation mode in which every parameter and every statistic matters."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **CASES[name], **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.numel() < 2 or p.std() < 0.01 else 0.1 * p.std()))
        for _ in range(3):
            model.train()(SQUARE + 0.5)
    return model.eval()


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    error = (got - want).abs().max() / want.abs().max()
    assert error < tolerance, f"{error:.1e} of the largest logit"


def outputs(name: str, model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(x) for x in (SQUARE, second(name))]


def layers(model: nn.Module, *kinds: type) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds or (nn.Linear, nn.Conv2d))}


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(SQUARE).square().mean().backward()
        optimizer.step()
    model.eval()


# ---- accelerate


@families
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading(name, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = create(name)
    want = outputs(name, model)
    if where == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    for a, b in zip(outputs(name, model), want, strict=True):
        assert_close(a, b, 5e-6)


# ---- FSDP


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@families
def test_every_module_sharded_by_itself(name, process_group):
    """FSDP2 frees the parameters of a module when its forward returns."""
    model = create(name)
    want = outputs(name, model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in [m for m in list(model.modules())[1:] if any(True for _ in m.parameters(recurse=False))][::-1]:
        torch.distributed.fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True)
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    for got, each in zip(outputs(name, model), want, strict=True):
        assert_close(got, each, 5e-6)
    model.train()(SQUARE).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- peft


def adapted(name: str, kind: str) -> nn.Module:
    """A model with an adapter on every layer that the kind can take."""
    peft = pytest.importorskip("peft")
    model = create(name)
    # a regular expression: a name in a list also matches the end of other names, such as RMT's `proj`
    dense = "|".join(re.escape(n) for n, m in layers(model).items() if getattr(m, "groups", 1) == 1)
    if kind == "ia3":
        config = peft.IA3Config(target_modules=dense, feedforward_modules=[])
    else:
        config = peft.LoraConfig(r=2, target_modules=dense, use_dora=kind == "dora")
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


@families
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_an_adapter_acts_as_when_it_is_merged(name, kind):
    model = adapted(name, kind)
    got = outputs(name, model)
    model(second(name)).square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0] == []
    for a, b in zip(got, outputs(name, model.merge_and_unload()), strict=True):
        assert_close(a, b, 1e-4)


# ---- weights that are recomputed before every forward


def recompute(model: nn.Module, how: str) -> None:
    for layer in layers(model).values():
        if how == "prune":
            prune.l1_unstructured(layer, "weight", 0.3)
        elif how == "weight_norm by hooks":
            torch.nn.utils.weight_norm(layer)
        elif how == "spectral_norm by hooks":
            torch.nn.utils.spectral_norm(layer)
        elif how == "orthogonal":
            parametrizations.orthogonal(layer)
        else:
            getattr(parametrizations, how)(layer)


def settle(model: nn.Module, how: str) -> None:
    """Make what is recomputed the weights."""
    for layer in layers(model).values():
        if how == "prune":
            prune.remove(layer, "weight")
        elif how == "weight_norm by hooks":
            torch.nn.utils.remove_weight_norm(layer)
        elif how == "spectral_norm by hooks":
            torch.nn.utils.remove_spectral_norm(layer)
        else:
            parametrize.remove_parametrizations(layer, "weight")


RECOMPUTED = ["prune", "weight_norm", "weight_norm by hooks", "spectral_norm", "spectral_norm by hooks"]


@families
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", RECOMPUTED)
def test_recomputed_weights(name, how):
    model = create(name)
    recompute(model, how)
    train(model)
    other = create(name)
    recompute(other, how)
    other(second(name))  # before the new weights: nothing of the old may stay
    other.load_state_dict(model.state_dict())
    got = outputs(name, model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(name, other), got, strict=True))
    settle(model, how)
    for a, b in zip(got, outputs(name, model), strict=True):
        assert_close(a, b)


@families
@pytest.mark.parametrize("how", ["prune", "spectral_norm", "lora"])
def test_what_is_recomputed_is_folded_rightly_or_not_at_all(name, how):
    model = create(name) if how != "lora" else adapted(name, "lora").base_model.model
    if not hasattr(model, "reparameterize"):
        pytest.skip("the family has nothing to fold")
    if how != "lora":
        recompute(model, how)
    want = outputs(name, model)
    if how == "lora" and name == "test_foveal_overlock":  # adapters are on layers that stay
        for a, b in zip(outputs(name, model.reparameterize()), want, strict=True):
            assert_close(a, b)
    else:
        with pytest.raises(ValueError):
            model.reparameterize()


# ---- norms


@families
def test_norms_that_take_the_batch(name):
    """AdaBN and TENT: batch norms in training mode or without statistics, in a model in evaluation mode."""
    model = create(name)
    norms = layers(model, nn.BatchNorm2d)
    for norm in norms.values():
        norm.train()
        norm.num_batches_tracked.zero_()
    with torch.no_grad():
        want = model(SQUARE)
    assert [n for n, norm in norms.items() if norm.num_batches_tracked != 1] == []
    for norm in norms.values():
        norm.eval()
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    with torch.no_grad():
        assert_close(model(SQUARE), want)
    assert model(SQUARE).isfinite().all()


# ---- quantization


@families
def test_quantize_dynamic(name):
    model = create(name)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for a, b in zip(outputs(name, quantized), outputs(name, model), strict=True):
        assert_close(a, b, 0.1)


# ---- hooks


def tensors(held) -> list[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        return [held]
    return [t for each in held for t in tensors(each)] if isinstance(held, (tuple, list)) else []


class Watch:
    """Forward hooks that keep what passes the modules, and copies of it."""

    def __init__(self, *modules: nn.Module) -> None:
        self.called: set[nn.Module] = set()
        self.seen: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        self.handles = [m.register_forward_pre_hook(self.before) for m in modules]
        self.handles += [m.register_forward_hook(self.after) for m in modules]

    def keep(self, module: nn.Module, held) -> None:
        self.called.add(module)
        self.seen += [(module, t, t.detach().clone()) for t in tensors(held)]

    def before(self, module, args) -> None:
        self.keep(module, args)

    def after(self, module, args, output) -> None:
        self.keep(module, (args, output))

    def changed(self) -> list[nn.Module]:
        for handle in self.handles:
            handle.remove()
        return [module for module, t, copied in self.seen if not torch.equal(t, copied)]


@families
def test_every_module_with_parameters_is_called(name):
    model = create(name)
    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    want = outputs(name, model)
    for x, output in zip((SQUARE, second(name)), want, strict=True):
        watch = Watch(*owners)
        with torch.no_grad():
            assert_close(model(x), output)
        assert watch.changed() == []
        assert set(owners) == watch.called


@families
def test_what_passed_a_hook_stays(name):
    """Of each module alone: a hook on a neighbor may hide that it is overwritten."""
    model = create(name)
    forms = [model]
    if hasattr(model, "reparameterize"):
        forms.append(copy.deepcopy(model).reparameterize())
    with torch.no_grad():
        for form in forms:
            for path, module in form.named_modules():
                watch = Watch(module)
                form(second(name)[:1])
                assert watch.changed() == [], path


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_full_backward_hooks(name, training):
    plain = create(name).train(training)
    hooked = copy.deepcopy(plain)
    called = set()
    for path, module in hooked.named_modules():
        module.register_full_backward_hook(lambda *_, path=path: called.add(path))
        module.register_full_backward_pre_hook(lambda *_: None)
    for model in (plain, hooked):
        torch.manual_seed(0)  # of stochastic depth
        model(SQUARE).square().mean().backward()
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    for n, p in hooked.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-3, atol=1e-5)
    owners = {n for n, m in hooked.named_modules() if any(True for _ in m.parameters(recurse=False))}
    assert owners <= called


# ---- copies


@families
def test_copies(name):
    model = create(name)
    want = outputs(name, model)  # what a forward keeps is not in a copy's way
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), average):
        assert all(torch.equal(a, b) for a, b in zip(outputs(name, other), want, strict=True))
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
        assert not torch.equal(outputs(name, other)[0], want[0])
        assert torch.equal(outputs(name, model)[0], want[0])
    parameters = {n: p.detach() * 0.5 for n, p in model.named_parameters()}
    with torch.no_grad():
        called = [torch.func.functional_call(model, parameters, (x,)) for x in (SQUARE, second(name))]
    other = copy.deepcopy(model)
    other.load_state_dict(parameters, strict=False)
    for a, b in zip(called, outputs(name, other), strict=True):
        assert_close(a, b, 5e-6)
    assert all(torch.equal(a, b) for a, b in zip(outputs(name, model), want, strict=True))


# ---- torch.fx


@families
def test_fx(name):
    """One graph for every size, whose parameters are the model's: none was taken for a constant."""
    model = create(name)
    graph = torch.fx.symbolic_trace(model)
    assert [name for name, value in vars(graph).items() if isinstance(value, torch.Tensor)] == []
    for x in (SQUARE, second(name)):
        torch.testing.assert_close(graph(x), model(x))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)
    loaded = pickle.loads(pickle.dumps(graph))
    torch.testing.assert_close(loaded(second(name)), model(second(name)))


class Keep(torch.fx.Interpreter):
    """Runs a graph and keeps the output of every node, and a copy of it."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self.kept: dict[torch.fx.Node, tuple[torch.Tensor, torch.Tensor]] = {}

    def run_node(self, n: torch.fx.Node):
        out = super().run_node(n)
        if isinstance(out, torch.Tensor):
            self.kept[n] = out, out.clone()
        return out


@families
def test_fx_overwrites_no_node(name):
    """Whatever an extractor takes out of the graph stays."""
    keep = Keep(torch.fx.symbolic_trace(create(name)))
    with torch.no_grad():
        keep.run(second(name))
    assert [n for n, (out, copied) in keep.kept.items() if not torch.equal(out, copied)] == []


@families
def test_fx_trains(name):
    model = create(name).train()
    graph = torch.fx.symbolic_trace(model)
    grads = []
    for each in (model, graph):
        torch.manual_seed(0)
        model.zero_grad()
        out = each(images(2, 3, 64, 64))
        assert out.shape == (2, 5)
        out.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert [name for name, grad in grads[1].items() if grad is None] == []
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-4 * max(1, grad.abs().max()))


def to_nchw(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else x


@families
def test_fx_features(name):
    """timm's and torchvision's extractors, and timm's by hooks, give the maps of `forward_intermediates`."""
    model = create(name)
    nodes = [info["module"] for info in model.feature_info]
    wanted = model.forward_intermediates(second(name), intermediates_only=True)
    maps = create_feature_extractor(model, nodes)(second(name))
    for node, want in zip(nodes, wanted, strict=True):
        torch.testing.assert_close(to_nchw(model, maps[node]), want)
    for kind in ("fx", "hook"):
        by_timm = create(name, features_only=True, feature_cls=kind)
        own = model.state_dict()  # some extractors hold the model, others its children, those of children as stem_conv1
        known = {n: {n, n.partition(".")[2], n.replace("_", ".", 1)} & own.keys() for n in by_timm.state_dict()}
        by_timm.load_state_dict({n: own[name] for n, (name,) in known.items()})
        taken = by_timm(second(name))
        torch.testing.assert_close(taken, [maps[node] for node in nodes][-len(taken) :])
    some = create(name, features_only=True, feature_cls="fx", out_indices=(1, 2))
    assert some.feature_info.out_indices == (1, 2)


# ---- torch.func and forward mode


@families
def test_gradients_per_sample(name):
    if name == "lamhalobot50ts_256":
        pytest.skip("vmap of timm's lambda layers gives other gradients, by their norm of a chunk of channels")
    model = create(name).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    x, labels = images(3, 3, 64, 64).double(), torch.tensor([1, 2, 3])

    def loss(parameters, image, label):
        logits = torch.func.functional_call(model, (parameters, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, labels)
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name][i], p.grad, rtol=1e-9, atol=1e-11)


@families
def test_forward_mode(name):
    """`jvp` and dual numbers, against the reverse mode."""
    model = create(name).double()
    x, direction = images(1, 3, 64, 64).double(), images(1, 3, 64, 64).double().flip(-1)
    out, tangent = torch.func.jvp(model, (x,), (direction,))
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(model, (x,), (direction,)), (out, tangent))
    x.requires_grad_(True)
    cotangent = torch.randn_like(out)
    (grad,) = torch.autograd.grad(model(x), x, cotangent)
    torch.testing.assert_close((tangent * cotangent).sum(), (grad * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x.detach(), direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


@families
def test_transforms_one_after_another(name):
    """Nothing that a transform wraps may stay in a cache: the next transform would stop at it."""
    model = create(name).double()
    x, directions = images(1, 3, 64, 64).double(), images(2, 1, 3, 64, 64).double().flip(-1)

    def tangent(x, direction):
        return torch.func.jvp(model, (x,), (direction,))[1]

    torch.func.jvp(lambda x: tangent(x, directions[0]), (x,), (directions[1],))
    if name != "lamhalobot50ts_256":  # see above
        got = torch.func.vmap(lambda direction: tangent(x, direction))(directions)
        torch.testing.assert_close(got, torch.stack([tangent(x, direction) for direction in directions]))


@families
def test_an_ensemble(name):
    """`vmap` over stacked parameters, which take gradients."""
    if name == "lamhalobot50ts_256":
        pytest.skip("vmap of timm's lambda layers differs, see above")
    models = [create(name).double() for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.05)
    state, x = torch.func.stack_module_state(models), second(name).double()
    ensemble = torch.func.vmap(lambda *state: torch.func.functional_call(models[0], state, (x,)))
    got = ensemble(*state)
    torch.testing.assert_close(got, torch.stack([model(x) for model in models]))
    with torch.no_grad():
        torch.testing.assert_close(ensemble(*state), got)
    got.square().mean().backward()
    assert [n for n, p in state[0].items() if p.grad is None] == []


# ---- TorchScript


@families
@pytest.mark.filterwarnings("ignore")
def test_the_older_onnx_exporter(name, capfd):
    """As timm's onnx_export.py calls it: a free batch runs at any batch."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file, axes = create(name), io.BytesIO(), {"image": {0: "batch"}, "logits": {0: "batch"}}
    names: dict = dict(input_names=["image"], output_names=["logits"], dynamic_axes=axes)
    torch.onnx.export(model, (second(name),), file, dynamo=False, opset_version=17, **names)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = images(batch, *second(name).shape[1:])
        (got,) = session.run(None, {"image": x.numpy()})
        assert_close(torch.from_numpy(got), model(x))


@families
def test_scripting_is_refused(name):
    with pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.jit.script(create(name))


# ---- timm


@families
def test_creation_on_a_device_in_a_dtype(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16, num_classes=5, **CASES[name])
    tensors = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    assert [n for n, t in tensors.items() if not t.is_meta or t.dtype != torch.bfloat16] == []
    model = timm.create_model(name, dtype=torch.bfloat16, num_classes=5, **CASES[name])
    assert model(second(name).bfloat16()).dtype == torch.bfloat16


@families
def test_initialization_of_the_classifier(name):
    """timm's --head-init-scale and --head-init-bias."""
    model = create(name)
    with torch.no_grad():
        model.get_classifier().weight.mul_(0.0)
    torch.nn.init.constant_(model.get_classifier().bias, -3.0)
    assert torch.equal(model(second(name)), torch.full((2, 5), -3.0))
    assert len(list(model.get_classifier().parameters())) in (2, 4)


@families
def test_a_head_in_place_of_the_own(name):
    """Pooled features where the head is the classifier, else the map."""
    model = create(name)
    classifier = model.get_classifier()
    if name == "test_foveal_care":
        model.head = model.dist_head = nn.Sequential(nn.Dropout(0.1), nn.Linear(model.num_features, 7))
    elif model.default_cfg["classifier"] in ("fc", "classifier"):  # timm's ResNets and EfficientNets
        head = nn.Sequential(nn.Dropout(0.1), nn.Linear(model.head_hidden_size, 7))
        setattr(model, model.default_cfg["classifier"], head)
    elif classifier is model.head:
        model.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(model.head_hidden_size, 7))
    else:
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        model.head = nn.Sequential(*pool, nn.Linear(model.num_features, 7))
    assert model(second(name)).shape == (2, 7)
    assert model.train()(second(name)).shape == (2, 7)


@families
def test_timms_own_checks(name):
    """What timm's tests of its models ask of every one: shapes without classifier and pooling, names, gradients."""
    model = create(name)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    cfg, state = model.default_cfg, model.state_dict()
    for key in ("classifier", "first_conv"):
        names = (cfg[key],) if isinstance(cfg[key], str) else cfg[key]
        assert [each for each in names if f"{each}.weight" not in state] == []
    features = model.forward_features(SQUARE)
    model.train()(SQUARE).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval().reset_classifier(0)
    assert model(SQUARE).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    out = model(SQUARE)
    size = slice(1, 3) if channels_last else slice(2, 4)
    assert out.shape[size] == features.shape[size]
    features_only = create(name, features_only=True)
    channels = [y.shape[1] for y in features_only(SQUARE)]
    assert channels == features_only.feature_info.channels()


@families
def test_test_time_pooling(name):
    """timm's --test-pool: the mean and the maximum over windows of the default size, by the model's own head."""
    model = create(name)
    x = images(2, 3, *(2 * length for length in model.default_cfg["input_size"][1:]))
    if getattr(model, "output_fmt", "NCHW") == "NHWC" or name in NO_PLAIN_HEAD:
        with pytest.raises(NotImplementedError, match=name):
            apply_test_time_pool(model, {"input_size": x.shape[1:]})
        assert dict(model.default_cfg)["pool_size"] == model.default_cfg.get("pool_size")
        return
    if fixed(name):
        pytest.skip("a model of one image size")
    with torch.no_grad():
        maps = model.forward_features(x)
        windows = maps.unfold(2, model.default_cfg["pool_size"][0], 1).unfold(3, model.default_cfg["pool_size"][1], 1)
        logits = model.forward_head(windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)).unflatten(0, (2, -1))
        pooled, applied = apply_test_time_pool(model, {"input_size": x.shape[1:]})
        assert applied
        assert_close(pooled(x), (logits.mean(1) + logits.amax(1)) / 2)


# ---- transformers


@families
@pytest.mark.parametrize("written", ["by foveal train", "by timm"])
def test_timm_wrapper(name, written, tmp_path):
    """transformers' wrappers take a folder of `foveal train`; of one whose ``model_args`` have ``num_classes``, as
    timm's `save_for_hf` writes them and `foveal train` did, they take what `foveal convert` makes of it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, folder, classes = create(name), tmp_path / "model", list("abcde")
    wrapper = transformers.TimmWrapperForImageClassification
    if written == "by foveal train":
        folder.mkdir()
        save_model(folder, model, {"num_classes": 5, **CASES[name]}, classes)
    else:
        arguments = {"num_classes": 5, **CASES[name]}
        save_for_hf(model, tmp_path / "timm", {"label_names": classes}, model_args=arguments, safe_serialization=True)
        convert(tmp_path / "timm", folder)
    with torch.no_grad():
        wrapped, x = wrapper.from_pretrained(folder).eval(), second(name)
        assert wrapped.config.id2label == dict(enumerate(classes))
        assert_close(wrapped(x).logits, model(x), 5e-6)
        out = transformers.TimmWrapperModel.from_pretrained(folder).eval()(x, output_hidden_states=True)
        features, maps = model.forward_intermediates(x)
        assert_close(out.last_hidden_state, features, 5e-6)
        assert_close(out.pooler_output, model.forward_head(features, pre_logits=True), 5e-6)
        assert len(out.hidden_states) == len(maps)
    assert timm.create_model(f"local-dir:{folder}").num_classes == 5


@pytest.mark.parametrize("write", [convert, lambda run, folder: export(run, "safetensors", folder)], ids=["c", "e"])
def test_timm_wrapper_of_a_run_of_0_1_0(write, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    run = Path(__file__).parents[1] / "data/runs_0.1.0/classify/best"
    write(run, tmp_path / "new")
    wrapped = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "new").eval()
    x = images(2, 1, 28, 28)
    assert_close(wrapped(x).logits, foveal.load(run)(x), 5e-6)


# ---- Grad-CAM and Lightning


@families
def test_grad_cam(name):
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    model = create(name)
    # the logits of a class token do not depend on the last map
    layer = model.get_submodule(model.feature_info[-2 if "fan" in name else -1]["module"])
    transform = functools.partial(to_nchw, model)
    if "deit" in name:  # the logits do not depend on maps; no other token of the last block has a gradient
        layer, transform = model.blocks[-1].norm1, lambda y: to_nchw(model, y[:, 1:].unflatten(1, (4, 4)))
    with grad_cam.GradCAM(model, [layer], reshape_transform=transform) as cam:
        maps = cam(SQUARE, targets=None)
    assert maps.shape == (2, 64, 64)
    assert np.isfinite(maps).all()
    assert all(g.abs().max() > 0 for g in cam.activations_and_grads.gradients)


@families
def test_lightning(name, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = create(name)

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    module = Module()
    before = copy.deepcopy(module.state_dict())
    data = torch.utils.data.TensorDataset(SQUARE, torch.tensor([0, 1]))
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not torch.equal(*(next(iter(state.values())) for state in (before, module.state_dict())))
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert torch.equal(loaded.model(second(name)), module.eval().model(second(name)))


# ---- FLOPs


@families
def test_the_flop_counter_of_torch(name):
    """The figure of `foveal info`, by every backend of a CPU; two FLOPs for a MAC."""
    model, x = timm.create_model(name, **CASES[name]).eval(), second(name)[:1]
    counted = []
    with torch.no_grad():
        model(x)  # position biases that are computed once
    for each in (None, "reference", "tiled", "dynamic"):
        with torch.no_grad(), backend(each), FlopCounterMode(display=False) as counter:
            model(x)
        counted.append(counter.get_total_flops())
    assert counted == [2 * of_model(model.to("meta"), tuple(x.shape[1:])).macs] * 4


@pytest.mark.slow
@families
@pytest.mark.filterwarnings("ignore")
def test_fvcore(name):
    """It counts the products of a trace: masked pairs too, and nothing folded, as it puts hooks on every module."""
    fvcore = pytest.importorskip("fvcore.nn")
    model, x = timm.create_model(name, **CASES[name]).eval(), second(name)[:1]
    want = of_model(copy.deepcopy(model).to("meta"), tuple(x.shape[1:])).macs
    analysis = fvcore.FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
    products = sum(analysis.by_operator()[name] for name in ("conv", "linear", "matmul", "bmm", "einsum"))
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.jit.trace(model, x, check_trace=False)
    assert 2 * products == counter.get_total_flops() >= 2 * want


# ---- NumPy


@families
def test_numpy_integers(name):
    def as_numpy(value):
        if isinstance(value, (tuple, list)):
            return [as_numpy(each) for each in value]
        return np.int64(value) if type(value) is int else value

    arguments = {key: as_numpy(value) for key, value in CASES[name].items()}
    if name in ("test_foveal_ascan", "test_foveal_maxvit"):
        arguments["img_size"] = np.int32(64)
    elif foveal.backbones.family(name) in ("NAT", "DiNAT"):
        arguments |= dict(kernel_size=np.int64(3), depths=np.array([1, 1, 1, 1]), dilations=[[np.int64(2)]] * 4)
    model = timm.create_model(name, num_classes=np.int64(5), in_chans=np.int64(3), **arguments)
    assert model(second(name)).shape == (2, 5)
    model.reset_classifier(np.int64(3))
    assert model(second(name)).shape == (2, 3)
