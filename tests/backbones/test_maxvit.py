"""MaxViT against timm where timm supports the size, and a plain formulation elsewhere; windows, tables, checkpoints."""

import copy
import zlib

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm, resize_rel_pos_bias_table
from timm.models import get_pretrained_cfg, maxxvit, save_for_hf
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

import foveal.backbones
from foveal.backbones.attention import PartitionAttention2d, RelativePositionTable, resample_table
from foveal.backbones.maxvit import checkpoint_filter_fn, default_cfgs

MODELS = [name for name in foveal.backbones.list_models() if name.startswith("maxvit_")]
LIGHT = [name for name in MODELS if "tiny" in name]
HEAVY = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in LIGHT]
TABLE = "relative_position_bias_table"
DEPTHS, DIMS = (1, 1, 2, 1), (32, 64, 96, 128)


def theirs_of(name: str) -> str:
    size, resolution = name.removeprefix("maxvit_").split("_")
    return f"maxvit_{size}_tf_{resolution}"


def fill(model: nn.Module) -> nn.Module:
    """Values that keep activations of order one, chosen by name and size alone; tables and statistics among them."""
    state = {}
    for name, old in model.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("model.").encode()))
        x = torch.randn(old.numel(), generator=generator).reshape(old.shape)
        if name.endswith("running_var"):
            x = 1 + 0.25 * x.clamp(-2, 2)
        elif name.endswith(("running_mean", "bias")):
            x = 0.1 * x
        elif name.endswith(TABLE):
            x = 0.5 * x
        elif x.ndim == 1:
            x = 1 + 0.1 * x
        elif x.ndim > 1:
            x = x / x[0].numel() ** 0.5
        state[name] = x.to(old.dtype)
    model.load_state_dict(state)
    return model.eval()


def ours(**kwargs) -> nn.Module:
    """A light MaxViT of the published kind."""
    return fill(timm.create_model("maxvit_tiny_224", **{"depths": DEPTHS, "dims": DIMS, "num_classes": 10, **kwargs}))


def theirs(**kwargs) -> nn.Module:
    """The same by timm."""
    arguments = dict(depths=DEPTHS, embed_dim=DIMS, head_hidden_size=DIMS[-1], num_classes=10)
    return fill(timm.create_model("maxvit_tiny_tf_224", **{**arguments, **kwargs}))


def theirs_at(img_size: int | tuple[int, int]) -> nn.Module:
    """timm's model for another size with the weights of its 224 model, as timm loads them."""
    model = theirs(img_size=img_size)
    model.load_state_dict(maxxvit.checkpoint_filter_fn(theirs().state_dict(), model))
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference against the largest value."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def assert_same_outputs(got: nn.Module, want: nn.Module, x: torch.Tensor) -> None:
    """Logits, the maps of the stages and the gradient of the input."""
    x = x.clone().requires_grad_(True)
    outputs = []
    for model in (got, want):
        features, maps = model.forward_intermediates(x)
        logits = model.forward_head(features)
        (gradient,) = torch.autograd.grad((logits * images(*logits.shape)).sum(), x)
        with torch.no_grad():  # other ways through our code
            again = model(x)
        outputs.append([logits, again, gradient, features, *maps[-4:]])  # timm has the stem's map, too
    for a, b in zip(*outputs, strict=True):
        close(a, b)


# ---------------------------------------------------------------------------------------------------------------- timm


def test_published_tags():
    published = {
        name: set(cfg.tags) for name, cfg in maxxvit.default_cfgs.items() if "maxvit" in name and "_tf_" in name
    }
    assert {theirs_of(name): set(default_cfgs[name].tags) for name in MODELS} == published
    for name in MODELS:
        for tag in default_cfgs[name].tags:
            got, want = get_pretrained_cfg(f"{name}.{tag}"), get_pretrained_cfg(f"{theirs_of(name)}.{tag}")
            assert got.hf_hub_id == f"timm/{theirs_of(name)}.{tag}"
            assert (got.architecture, got.tag, got.fixed_input_size, want.fixed_input_size) == (name, tag, False, True)
            own = dict.fromkeys(("architecture", "origin_url", "paper_ids", "fixed_input_size"))
            assert {**got.to_dict(remove_null=False), **own} == {**want.to_dict(remove_null=False), **own}
        assert default_cfgs[name].tags[0] == maxxvit.default_cfgs[theirs_of(name)].tags[0]
    assert get_pretrained_cfg("maxvit_base_224.in21k").num_classes == 21843


@pytest.mark.parametrize("name", LIGHT + HEAVY)
def test_state_dict_is_timms(name):
    with torch.device("meta"):
        got, want = timm.create_model(name), timm.create_model(theirs_of(name))
    assert {k: v.shape for k, v in got.state_dict().items()} == {k: v.shape for k, v in want.state_dict().items()}
    assert got.partition_size == want.stages[0].blocks[0].attn_block.partition_size
    rates = {"tiny": 0.2, "small": 0.3, "base": 0.4, "large": 0.6, "xlarge": 0.6}
    assert got.stages[-1].blocks[-1].attn_grid.drop_path.drop_prob == rates[name.split("_")[1]]


def test_whole_model_at_224():
    models = [fill(timm.create_model(name, num_classes=10)) for name in ("maxvit_tiny_224", "maxvit_tiny_tf_224")]
    assert_same_outputs(*models, images(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("img_size", "input_size"),
    [
        (224, (224, 224)),
        (224, (224, 448)),  # several windows of 7 in the last stage
        pytest.param(384, (384, 384), marks=pytest.mark.slow),
        ((256, 96), (256, 96)),
        ((64, 96), (192, 96)),
        (32, (48, 33)),  # windows of one position: timm takes any size
        (63, (63, 41)),
    ],
    ids=str,
)
def test_timms_answer(img_size, input_size):
    assert_same_outputs(ours(img_size=img_size), theirs(img_size=img_size), images(2, 3, *input_size))


def test_training_is_timms():
    """Batch statistics and every parameter's gradient; that of a bias before a batch norm is zero."""
    pair = ours(img_size=64, drop_path_rate=0.0).double().train(), theirs(img_size=64).double().train()
    x = images(4, 3, 64, 64).double()
    for model in pair:
        (model(x) * images(4, 10)).sum().backward()
    grads = dict(pair[1].named_parameters())
    for name, p in pair[0].named_parameters():
        scale = grads[name].grad.abs().max()
        assert (p.grad - grads[name].grad).abs().max() <= 1e-6 * scale + 1e-12, name
    statistics = dict(pair[1].named_buffers())
    for name, x in pair[0].named_buffers():
        torch.testing.assert_close(x, statistics[name])


def test_initial_weights_are_distributed_as_timms():
    torch.manual_seed(0)
    pair = timm.create_model("maxvit_tiny_224"), timm.create_model("maxvit_tiny_tf_224")
    theirs = pair[1].state_dict()
    for name, x in pair[0].state_dict().items():
        if x.numel() > 500 and x.is_floating_point() and theirs[name].std() > 0:
            assert x.std() == pytest.approx(theirs[name].std().item(), rel=0.25), name
            assert (x.abs().max() / x.std()) == pytest.approx((theirs[name].abs().max() / x.std()).item(), rel=0.5), (
                name
            )


# ------------------------------------------------------------------------------------------------------------ any size


def plain_attention(attn: PartitionAttention2d, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pad to a multiple, cut as timm does, leave the padding out of the softmax, put together, crop."""
    B, H, W, C = x.shape
    rows, columns = size
    x = F.pad(x, (0, 0, 0, -W % columns, 0, -H % rows))
    inside = F.pad(x.new_ones(H, W), (0, -W % columns, 0, -H % rows))
    height, width = x.shape[1:3]
    if attn.kind == "block":
        cut, order = (height // rows, rows, width // columns, columns), (0, 1, 3, 2, 4, 5)
    else:
        cut, order = (rows, height // rows, columns, width // columns), (0, 2, 4, 1, 3, 5)
    back = [order.index(i) for i in range(6)]
    shape = [(B, *cut, C)[i] for i in order]
    tokens = x.reshape(B, *cut, C).permute(order).reshape(-1, rows * columns, C)
    keys = inside.reshape(1, *cut, 1).permute(order).reshape(-1, 1, 1, rows * columns)

    q, k, v = (
        attn.qkv(tokens).reshape(len(tokens), -1, 3, attn.num_heads, C // attn.num_heads).transpose(1, 3).unbind(2)
    )
    table = resample_table(attn.rel_pos.relative_position_bias_table, size)
    t, i = torch.arange(rows)[None, :] - torch.arange(rows)[:, None], torch.arange(columns)
    bias = table[:, t[:, None, :, None] + rows - 1, (i[None, :] - i[:, None])[None, :, None, :] + columns - 1]
    logits = q @ k.transpose(-1, -2) * (C // attn.num_heads) ** -0.5 + bias.reshape(
        attn.num_heads, *[rows * columns] * 2
    )
    logits = logits + torch.where(keys.repeat(B, 1, 1, 1) > 0, 0.0, -torch.inf)
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(shape).permute(back).reshape(B, height, width, C)
    return attn.proj(out[:, :H, :W])


def plainly(model: nn.Module) -> nn.Module:
    """A copy of the model with the plain attention."""
    model = copy.deepcopy(model)
    for attn in model.modules():
        if isinstance(attn, PartitionAttention2d):

            def forward(x, attn=attn):
                size = attn.rel_pos.window_size
                if attn.parts is not None:
                    size = tuple((length + attn.parts - 1) // attn.parts for length in x.shape[1:3])
                return plain_attention(attn, x, size)

            attn.forward = forward
    return model


@pytest.mark.parametrize("kind", ["block", "grid"])
@pytest.mark.parametrize("parts", [None, 4], ids=["fixed", "scaled"])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (14, 21, (7, 7)),
        (13, 20, (7, 7)),
        (25, 39, (6, 9)),
        (8, 50, (7, 7)),
        (3, 5, (7, 7)),
        (1, 1, (7, 7)),
        (9, 4, (1, 3)),
    ],
    ids=str,
)
def test_partition_attention(kind, parts, height, width, size):
    torch.manual_seed(0)
    attn = PartitionAttention2d(24, 3, size, kind, parts=parts)
    nn.init.normal_(attn.rel_pos.relative_position_bias_table)
    x = torch.randn(2, height, width, 24, requires_grad=True)
    at = size if parts is None else (-(-height // parts), -(-width // parts))
    outputs = attn(x), plain_attention(attn, x, at)
    close(*outputs, 1e-5)
    wanted = [x, *attn.parameters()]
    grads = [torch.autograd.grad((y * y.detach().cos()).sum(), wanted) for y in outputs]
    for got, want in zip(*grads, strict=True):
        assert (got - want).abs().max() <= 1e-4 * max(want.abs().max(), 1e-2)


@pytest.mark.parametrize(
    ("partition", "size"),
    [
        *((partition, size) for partition in ("fixed", "scaled") for size in ((256, 256), (200, 312), (37, 1))),
        ("fixed", (800, 1216)),
        pytest.param("scaled", (800, 1216), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_size(partition, size):
    """Forward and features against the plain formulation; the windows are those of 224."""
    torch.manual_seed(0)
    name = "test_foveal_maxvit"
    model = fill(timm.create_model(name, num_classes=10, img_size=224, partition=partition))
    x = images(1, 3, *size)
    with torch.no_grad():
        want = plainly(model)
        close(model(x), want(x))
        features = fill(timm.create_model(name, features_only=True, img_size=224, partition=partition))
        for i, (y, z) in enumerate(zip(features(x), want.forward_intermediates(x)[1], strict=True)):
            assert y.shape == (1, 16 * 2**i, *(-(-length // (4 * 2**i)) for length in size))
            close(y, z)


def test_both_partitions_agree_at_the_models_size():
    x = images(1, 3, 224, 224)
    assert torch.equal(ours()(x), ours(partition="scaled")(x))


@pytest.mark.parametrize("size", [(256, 256), (256, 384), (160, 224)], ids=str)
def test_scaled_windows_are_timms_of_that_size(size):
    model = ours(partition="scaled")
    assert_same_outputs(model, theirs_at(size), images(1, 3, *size))
    assert model.partition_size == (7, 7)  # the tables stay


def test_scaled_tables_are_trained():
    model = ours(partition="scaled").train()
    model(images(2, 3, 96, 64)).square().sum().backward()
    for name, p in model.named_parameters():
        if name.endswith(TABLE):
            assert p.grad.abs().max() > 0, name


@pytest.mark.slow
def test_scaled_model_compiles_and_exports():
    model = fill(timm.create_model("test_foveal_maxvit", num_classes=10, partition="scaled"))
    x = images(1, 3, 96, 80)
    want = model(x)
    program = torch.export.export(model, (x,))
    close(program.module()(x), want)
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend="eager")(x), want)


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("old", [(7, 7), (12, 12), (1, 1), (8, 12)], ids=str)
@pytest.mark.parametrize("new", [(7, 7), (12, 12), (16, 16), (1, 1), (7, 9), (6, 10), (25, 38)], ids=str)
def test_resampling_is_timms(old, new):
    table = torch.randn(3, *(2 * size - 1 for size in old), dtype=torch.float64)
    shape = (3, *(2 * size - 1 for size in new))
    want = resize_rel_pos_bias_table(table.float(), new_window_size=new, new_bias_shape=shape)
    want = want.reshape(shape)  # older timm flattens it
    torch.testing.assert_close(resample_table(table, new).float(), want, rtol=1e-5, atol=1e-5)
    assert resample_table(table.bfloat16(), new).dtype == torch.bfloat16


def test_resampled_tables_are_kept_until_the_table_changes():
    module = RelativePositionTable(2, (7, 7)).eval()
    p = module.relative_position_bias_table

    def table(size):
        return module(size)

    with torch.no_grad():
        first = table((9, 9))
        assert table((9, 9)) is first
        for write in (lambda: p.add_(1), lambda: p.data.mul_(2), lambda: module.load_state_dict({TABLE: p + 3})):
            write()
            again = table((9, 9))
            assert again is not first
            assert torch.equal(again, resample_table(p, (9, 9)))
            first = again
        assert table((9, 8)).shape == (2, 17, 15)
        assert torch.equal(table((7, 7)), p)
    assert table((9, 9)).requires_grad
    with torch.inference_mode():
        kept = table((9, 9))
    table((9, 9)).sum().backward()
    assert p.grad is not None
    p.requires_grad_(False)
    scale = torch.ones((), requires_grad=True)
    (table((9, 9)) * scale).sum().backward()  # not a tensor of inference mode
    assert torch.equal(table((9, 9)), kept)


@pytest.mark.parametrize("size", [256, (256, 384)], ids=str)
def test_set_input_size(size):
    model = ours()
    frozen = model.stages[0].blocks[0].attn_grid.attn.rel_pos.relative_position_bias_table.requires_grad_(False)
    model.set_input_size(size)
    rows, columns = to_pair(size)
    assert model.img_size == (rows, columns)
    assert model.partition_size == (rows // 32, columns // 32)
    table = model.stages[0].blocks[0].attn_grid.attn.rel_pos.relative_position_bias_table
    assert (table.requires_grad, frozen.requires_grad) == (False, False)
    for name, p in model.named_parameters():
        if name.endswith(TABLE):
            assert p.shape[1:] == (2 * (rows // 32) - 1, 2 * (columns // 32) - 1)
    assert_same_outputs(model, theirs_at(size), images(1, 3, rows, columns))


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def test_set_input_size_arguments():
    model = timm.create_model("test_foveal_maxvit")
    model.set_input_size(partition_size=3)
    assert (model.img_size, model.partition_size) == ((64, 64), (3, 3))
    model.set_input_size((20, 96))
    assert model.partition_size == (1, 3)
    for wrong in (0, (64, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="img_size"):
            model.set_input_size(wrong)
    with pytest.raises(ValueError, match=r"partition_size .*0$"):
        model.set_input_size(64, partition_size=0)


def test_a_resized_model_is_saved_as_such(tmp_path):
    model = fill(timm.create_model("test_foveal_maxvit", num_classes=10))
    model.set_input_size(96)
    arguments = dict(img_size=model.img_size, partition_size=model.partition_size)
    save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(1, 3, 96, 96)
    assert (again.img_size, again.partition_size) == ((96, 96), (3, 3))
    assert torch.equal(again(x), model(x))


# --------------------------------------------------------------------------------------------------------- checkpoints


def load(state_dict: dict, **kwargs) -> nn.Module:
    """Create a model with a state dict as its pretrained weights, timm's way."""
    overlay = dict(state_dict=state_dict, num_classes=10)
    arguments = dict(depths=DEPTHS, dims=DIMS, num_classes=10, pretrained_cfg_overlay=overlay)
    return timm.create_model("maxvit_tiny_224", pretrained=True, **{**arguments, **kwargs}).eval()


def test_checkpoint_of_timm():
    weights = theirs().state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    x = images(1, 3, 224, 224)
    want = theirs()(x)
    for wrapped in (
        weights,
        {"state_dict": weights},
        {"model": {f"module.{name}": value for name, value in weights.items()}},
        {f"model.{name}": value for name, value in weights.items()},
        {f"backbone.{name}": value for name, value in weights.items()} | {"neck.weight": torch.ones(1)},
    ):
        close(load(wrapped)(x), want)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    theirs().load_state_dict(ours().state_dict())  # and back


def test_checkpoint_for_another_window():
    x = images(1, 3, 256, 160)
    close(load(theirs().state_dict(), img_size=(256, 160))(x), theirs_at((256, 160))(x))


def test_checkpoint_and_other_heads():
    weights = theirs().state_dict()
    x = images(1, 3, 224, 224)
    close(load(weights, global_pool="")(x), theirs(global_pool="").eval()(x))
    features = load(weights, features_only=True, out_norm=True, out_indices=(0, 3))
    assert [y.shape for y in features(x)] == [(1, 32, 56, 56), (1, 128, 7, 7)]
    other = load(weights, num_classes=7)
    assert other(x).shape == (1, 7)
    torch.testing.assert_close(other.head.pre_logits.fc.weight, weights["head.pre_logits.fc.weight"])


def test_checkpoints_that_are_not_of_the_model():
    model, weights = ours(), ours().state_dict()
    renamed = {name.replace("attn_grid", "attn_lattice"): value for name, value in weights.items()}
    with pytest.raises(ValueError, match=r"65 .*attn_grid.* 65 .*attn_lattice"):
        checkpoint_filter_fn(renamed, model)
    with pytest.raises(ValueError, match="out_norm=True"):
        checkpoint_filter_fn(ours(out_norm=True).state_dict(), model)


# ------------------------------------------------------------------------------------------------------------- network


def test_reparameterize():
    model = ours()
    folded = copy.deepcopy(model)
    assert folded.reparameterize() is folded
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    names = set(folded.state_dict())
    assert set(folded.reparameterize().state_dict()) == names
    for size in ((224, 224), (75, 130)):
        x = images(1, 3, *size)
        close(folded(x), model(x))
        with torch.no_grad():
            close(folded(x), model(x))


@pytest.mark.parametrize("other", [freeze_batch_norm_2d, convert_sync_batchnorm])
def test_other_batch_norms_fold_too(other):
    model = ours()
    folded = other(copy.deepcopy(model)).eval().reparameterize()
    assert not [name for name, _ in folded.named_buffers() if name.endswith("running_var")]
    x = images(1, 3, 64, 64)
    close(folded(x), model(x))


def test_nothing_given_is_written_to():
    model, x = ours(), images(1, 3, 64, 64)
    before = x.clone()
    features = model.forward_features(x).detach()
    kept = features.clone()
    with torch.no_grad():
        model(x)
        model.forward_head(features)
    assert torch.equal(x, before)
    assert torch.equal(features, kept)


def test_head():
    """Pool, norm, hidden layer, tanh, classifier; a reset keeps all but the last."""
    model, x = ours(), images(2, 3, 64, 64)
    hidden = model.head.pre_logits.fc.weight.detach().clone()
    features = model.forward_features(x)
    pooled = F.layer_norm(features.mean((2, 3)), (128,), model.head.norm.weight, model.head.norm.bias, 1e-5)
    want = torch.tanh(F.linear(pooled, hidden, model.head.pre_logits.fc.bias))
    close(model.forward_head(features, pre_logits=True), want, 1e-5)
    close(model(x), F.linear(want, model.head.fc.weight, model.head.fc.bias), 1e-5)
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(7, "")
    assert model(x).shape == (2, 7, 2, 2)
    model.reset_classifier(0, "max")
    assert torch.equal(model.head.pre_logits.fc.weight, hidden)
    assert model(x).shape == (2, model.head_hidden_size) == (2, 128)
    for wrong in ("catavgmax", "median"):
        with pytest.raises(ValueError, match=f"global_pool .*'avgmax'.* '{wrong}'"):
            model.reset_classifier(7, wrong)
    with pytest.raises(ValueError, match=r"num_classes .*-1"):
        model.reset_classifier(-1)


def test_wrong_arguments():
    for arguments, message in (
        (dict(depths=(1, 1)), r"depths \(1, 1\) .*dims \(64, 128, 256, 512\)"),
        (dict(dims=(32, 64, 96, 100)), r"dims .*100\) .*head_dim 32"),
        (dict(partition="padded"), r'partition .*"fixed".*"scaled".*padded'),
        (dict(img_size=-1), "img_size .*-1"),
        (dict(partition_size=(7, 0)), r"partition_size .*\(7, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("maxvit_tiny_224", **arguments)
    with pytest.raises(ValueError, match=r"dim 30 .*num_heads 4"):
        PartitionAttention2d(30, 4, (7, 7), "block")
    with pytest.raises(ValueError, match=r"kind .*'cross'"):
        PartitionAttention2d(32, 4, (7, 7), "cross")
