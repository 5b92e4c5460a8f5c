"""What every backbone owes timm and PyTorch's tools, on very small models of every family and network class."""

import copy
import io

import pytest
import timm
import torch
import torch._dynamo.testing
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import foveal.backbones

ISOTROPIC = dict(embed_dim=32, depth=4, num_heads=2, kernel_size=3)
SMALL = {
    "nat": ("test_foveal_nat", {}),
    "dinat": ("test_foveal_dinat", {}),
    "dinat-auto": ("test_foveal_dinat", dict(dilations="auto")),
    "dinat_s": (
        "dinat_s_tiny",
        dict(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3, dilations="auto"),
    ),
    "isotropic": ("dinat_isotropic_small", dict(ISOTROPIC, dilations=(1, 2, 1, 2))),
    "vitrpb": ("vitrpb_isotropic_small", dict(embed_dim=32, depth=3, num_heads=2, img_size=64)),
}
LEVELS = ["nat", "dinat", "dinat-auto", "dinat_s"]  # networks of several levels
ANY_SIZE = [*LEVELS, "isotropic"]


def create(case: str, **kwargs) -> torch.nn.Module:
    name, arguments = SMALL[case]
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 10, **arguments, **kwargs})


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_every_small_model_is_covered():
    small = {name for name in foveal.backbones.list_models() if name.startswith("test_foveal_")}
    assert small <= {name for name, _ in SMALL.values()}
    for name in small:
        with torch.device("meta"):
            assert 1e5 < sum(p.numel() for p in timm.create_model(name).parameters()) < 1e6


@pytest.mark.parametrize("case", SMALL)
def test_forward(case):
    model = create(case).eval()
    x = images(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape[-1] == model.num_features
    assert model.output_fmt == "NHWC"
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.head
    assert model.forward_head(features).shape == (2, 10)
    torch.testing.assert_close(model(x), model.head(pooled))
    assert torch.isfinite(model(x)).all()
    assert model(images(0, 3, 64, 64)).shape == (0, 10)


@pytest.mark.parametrize("case", ANY_SIZE)
@pytest.mark.parametrize("size", [(37, 61), (28, 28), (32, 32), (1, 1), (4, 90)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_any_input_size(case, size):
    """Down to maps of one position; strides round up."""
    model = create(case).eval()
    _, maps = model.forward_intermediates(images(2, 3, *size))
    for x, info in zip(maps, model.feature_info, strict=True):
        stride = info["reduction"]
        assert x.shape == (2, info["num_chs"], -(-size[0] // stride), -(-size[1] // stride))
        assert torch.isfinite(x).all()


def test_one_input_size():
    model = create("vitrpb")
    with pytest.raises(ValueError, match=r"input is 80x64, this model takes 64x64 only"):
        model(images(1, 3, 80, 64))
    assert create("vitrpb", img_size=(80, 64))(images(1, 3, 80, 64)).shape == (1, 10)


@pytest.mark.parametrize("case", SMALL)
def test_training_reaches_every_parameter(case):
    model = create(case, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1).train()
    x = images(4, 3, 64, 64).requires_grad_(True)
    model(x).square().sum().backward()
    assert x.grad.abs().max() > 0
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    assert [n for n, p in model.named_parameters() if p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("case", SMALL)
def test_grad_checkpointing_changes_nothing(case):
    model = create(case, drop_path_rate=0.0).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = images(2, 3, 64, 64)
    for m in (model, other):
        features, maps = m.forward_intermediates(x)
        (m.forward_head(features).square().sum() + sum(y.square().sum() for y in maps) + m(x).sum()).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", LEVELS)
def test_features_only(case):
    x = images(2, 3, 64, 96)
    whole = create(case, num_classes=10).eval()
    model = create(case, features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [16, 32, 64, 128]
    maps = model(x)
    for y, channels, stride in zip(maps, [16, 32, 64, 128], [4, 8, 16, 32], strict=True):
        assert y.shape == (2, channels, 64 // stride, 96 // stride)
    # the modules that feature_info names give these maps
    outputs = {}
    for info in whole.feature_info:
        module = whole.get_submodule(info["module"])
        module.register_forward_hook(lambda m, i, o, name=info["module"]: outputs.update({name: o}))
    whole.load_state_dict({k.removeprefix("model."): v for k, v in model.state_dict().items()}, strict=False)
    whole(x)
    for y, info in zip(maps, whole.feature_info, strict=True):
        torch.testing.assert_close(outputs[info["module"]].permute(0, 3, 1, 2), y)


def test_features_only_isotropic():
    model = create("isotropic", features_only=True, out_indices=(1, 3))
    assert (model.feature_info.reduction(), model.feature_info.channels()) == ([16, 16], [32, 32])
    assert [y.shape for y in model(images(1, 3, 64, 96))] == [(1, 32, 4, 6)] * 2


@pytest.mark.parametrize("case", LEVELS)
def test_pruned_models_have_no_unused_parameters(case):
    for arguments in (dict(out_indices=(1, 2)), dict(out_indices=(1, 2), out_norm=True)):
        model = create(case, features_only=True, **arguments).train()
        sum(y.square().sum() for y in model(images(2, 3, 64, 64))).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("case", SMALL)
def test_forward_intermediates(case):
    model = create(case).eval()
    x = images(2, 3, 64, 64)
    count = len(model.feature_info)
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x))
    assert len(maps) == count

    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(last[0], features)
    some = model.forward_intermediates(x, indices=[0, -2], intermediates_only=True)
    torch.testing.assert_close(some, [maps[0], maps[-2]])
    end, some = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert end.shape[1:3] == maps[0].shape[2:]
    torch.testing.assert_close(some, [maps[0]])

    for wrong in ([count], [-count - 1], count + 1, 0, -1, []):
        with pytest.raises(ValueError, match="indices"):
            model.forward_intermediates(x, indices=wrong)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("case", SMALL)
def test_prune_intermediate_layers(case):
    model = create(case).eval()
    x = images(1, 3, 64, 64)
    maps = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    torch.testing.assert_close(model.forward_intermediates(x, indices=[0, 1], intermediates_only=True), maps)
    assert model.num_classes == 0
    assert model(x).shape[-1] == model.num_features == model.feature_info[1]["num_chs"]


@pytest.mark.parametrize("case", LEVELS)
def test_level_norms(case):
    model = create(case, out_norm=True).eval()
    for i, info in enumerate(model.feature_info):
        norm = getattr(model, f"norm{i}")
        assert norm.normalized_shape == (info["num_chs"],)
        torch.nn.init.uniform_(norm.weight)
    x = images(1, 3, 64, 64)
    plain = create(case).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(x), plain(x))  # the classifier does not see them
    pairs = zip(model.forward_intermediates(x)[1], plain.forward_intermediates(x, output_fmt="NHWC")[1], strict=True)
    for i, (got, raw) in enumerate(pairs):
        torch.testing.assert_close(got, getattr(model, f"norm{i}")(raw).permute(0, 3, 1, 2))


@pytest.mark.parametrize("case", SMALL)
def test_classifier(case):
    model = create(case).eval()
    x = images(2, 3, 64, 64)
    height, width = model.forward_features(x).shape[1:3]
    model.reset_classifier(7)
    assert (model(x).shape, model.num_classes) == ((2, 7), 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(5, "max")
    assert model(x).shape == (2, 5)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled, model.forward_features(x).amax((1, 2)))
    model.reset_classifier(5, "catavgmax")
    assert (model(x).shape, model.head_hidden_size) == ((2, 5), 2 * model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, height, width, model.num_features)
    assert create(case, num_classes=0)(x).shape == (2, model.num_features)
    assert create(case, num_classes=0, global_pool="")(x).shape == (2, height, width, model.num_features)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(5, "median")


@pytest.mark.parametrize("case", SMALL)
def test_input_channels(case):
    assert create(case, in_chans=1)(images(1, 1, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize("case", SMALL)
def test_other_output_strides_are_refused(case):
    stride = create(case).feature_info[-1]["reduction"]
    create(case, output_stride=stride)
    with pytest.raises(ValueError, match="output_stride 8 "):
        create(case, output_stride=8)


@pytest.mark.parametrize("case", SMALL)
def test_parameter_groups(case):
    model = create(case)
    names = {name for name, _ in model.named_parameters()}
    tables = {name for name in names if name.endswith("rpb")}
    assert model.no_weight_decay() == tables != set()
    free, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert all(p.ndim > 1 for p in decayed["params"])
    assert len(free["params"]) + len(decayed["params"]) == len(names)

    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    named = {id(p): name for name, p in model.named_parameters()}
    scale = {named[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scale) == names
    blocks = sorted(
        {n.split(".norm1.")[0] for n in names if ".norm1." in n},
        key=lambda n: [int(i) for i in n.split(".") if i.isdigit()],
    )
    order = ["patch_embed.proj", *blocks, "head"]
    rates = [next(scale[n] for n in sorted(names) if n.startswith(block + ".")) for block in order]
    assert rates == sorted(rates)
    assert len(set(rates)) == len(blocks) + 2
    for level in {n.split(".downsample.")[0] for n in names if ".downsample." in n}:
        assert scale[f"{level}.downsample.norm.weight"] >= max(
            v for n, v in scale.items() if n.startswith(f"{level}.blocks.")
        )


@pytest.mark.parametrize("case", SMALL)
def test_config(case):
    model = create(case)
    for key in ("license", "paper_ids", "first_conv", "classifier", "input_size", "crop_pct", "interpolation"):
        assert model.default_cfg[key], key
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), torch.nn.Conv2d)
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()


@pytest.mark.parametrize("case", SMALL)
def test_autocast(case):
    model = create(case).eval()
    x = images(2, 3, 64, 64)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
        small = create(case).eval()(images(1, 3, 28, 28)) if case != "vitrpb" else None
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    assert small is None or small.dtype == torch.bfloat16


@pytest.mark.parametrize("case", SMALL)
def test_compile(case):
    """One graph, forward and backward, and none more for another batch of the size."""
    model = create(case, drop_path_rate=0.0).train()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = images(2, 3, 64, 64)
    want = model(x)
    torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    compiled(images(2, 3, 64, 64))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL)
def test_compile_to_code(case):
    model = create(case).eval()
    torch._dynamo.reset()
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", SMALL)
def test_torch_export(case):
    model = create(case).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    x = images(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.filterwarnings("ignore")
def test_onnx(case):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = create(case).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        model, (images(2, 3, 64, 64),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for size in (2, 5):
        x = images(size, 3, 64, 64)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", SMALL)
def test_state_dict_round_trip(case, tmp_path):
    model = create(case).eval()
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    other = create(case, pretrained=True, num_classes=10, pretrained_cfg_overlay=dict(file=str(path), num_classes=10))
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(other.eval()(x), model(x))
