"""Everything that `load` takes, and what it says about everything else."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import save_for_hf

import foveal
from foveal.backbones import base, download
from foveal.heads.build import build_segmenter
from foveal.heads.checkpoint import save_dense
from foveal.weights.manifest import checkpoints

NAME = "test_foveal_dinat"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A model with other weights than those of a fresh one, and the run folder that holds it."""
    torch.manual_seed(7)
    model = timm.create_model(NAME, num_classes=4, in_chans=1, kernel_size=3).eval()
    run = tmp_path_factory.mktemp("run")
    arguments = {"in_chans": 1, "kernel_size": 3}
    save_for_hf(model, str(run / "best"), model_args=arguments, safe_serialization=True)
    return model, run


@pytest.fixture
def folder(trained: tuple[torch.nn.Module, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[1] / "best", tmp_path / "model"))


def output_of(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(1, 1, 64, 64, generator=generator))


@pytest.mark.parametrize("what", ["run", "run as text", "best", "local-dir", "file"])
def test_sources(what: str, trained: tuple[torch.nn.Module, Path]) -> None:
    model, run = trained
    source = {
        "run": run,
        "run as text": str(run),
        "best": run / "best",
        "local-dir": f"local-dir:{run / 'best'}",
        "file": run / "best" / "model.safetensors",
    }[what]
    loaded = foveal.load(source)
    assert not loaded.training
    assert torch.equal(output_of(loaded), output_of(model))


def test_a_file_is_that_file(folder: Path) -> None:
    """Not the model.safetensors beside it."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    other = {name: tensor + 0.01 for name, tensor in state.items()}
    safetensors.torch.save_file(other, folder / "averaged.safetensors")
    loaded = foveal.load(folder / "averaged.safetensors").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in other.items())


def test_the_last_best_of_a_killed_run(trained: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    shutil.copytree(trained[1] / "best", tmp_path / "best.old")
    assert torch.equal(output_of(foveal.load(tmp_path)), output_of(trained[0]))


def test_arguments_go_to_timm(trained: tuple[torch.nn.Module, Path]) -> None:
    assert foveal.load(trained[1], num_classes=9).num_classes == 9


def test_a_published_file_by_name(tmp_path: Path) -> None:
    model = timm.create_model("nat_mini")
    file = tmp_path / "nat_mini.pth"
    torch.save(model.state_dict(), file)
    loaded = foveal.load("nat_mini", pretrained_cfg_overlay={"file": str(file)})
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_a_name_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=NAME):
        foveal.load(NAME)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Empty caches, no network, and the addresses that were asked for."""
    asked: list[str] = []

    def refuse(request, **kwargs):
        asked.append(request.full_url)
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)

    def refuse_repository(repository, file, **kwargs):
        asked.append(f"{download.HUB}{repository}")
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(download.socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(download, "urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse_repository)
    return asked


def test_weights_that_cannot_be_fetched(caches: list[str]) -> None:
    """Each server is asked once, and the advice names a place where the file is then found."""
    with pytest.raises(OSError, match=r"dinat_mini\.in1k.*no route to host.*no connection") as caught:
        foveal.load("dinat_mini")
    url, hub = caches
    assert url.endswith("/dinat_mini_in1k_224.pth")
    assert "shi-labs/dinat-mini-in1k-224" in hub
    assert url in str(caught.value)
    assert hub in str(caught.value)

    place = Path(str(caught.value).rpartition("put it at ")[2])
    model = timm.create_model("dinat_mini")
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), place)
    loaded = foveal.load("dinat_mini")
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert len(caches) == 2


def test_without_a_network_the_hub_is_not_retried(caches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host, _):
        raise socket.gaierror(f"no address for {host}")

    monkeypatch.setattr(download, "getproxies", dict)
    monkeypatch.setattr(download.socket, "getaddrinfo", unknown)
    with pytest.raises(OSError, match=r"no address for huggingface\.co"):
        foveal.load("dinat_mini")
    assert [download.HUB in asked for asked in caches] == [False]


def test_where_published_weights_are_looked_for(
    caches: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = timm.models.get_pretrained_cfg("dinat_mini")
    hub = "hf://shi-labs/dinat-mini-in1k-224"
    assert download.addresses(cfg) == [cfg.url, hub]

    def only_pickles(repository, file, **_):
        if file == "model.safetensors":
            raise EntryNotFoundError(file)
        return f"{repository}/{file}"

    # the hub, and there the file that it has
    monkeypatch.setattr("huggingface_hub.hf_hub_download", only_pickles)
    assert download.fetch("x", [cfg.url, hub]) == Path("shi-labs/dinat-mini-in1k-224/pytorch_model.bin")
    assert caches == [cfg.url]
    # before both what the hub's cache has
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, file, **__: f"cache/{file}")
    assert download.fetch("x", [cfg.url, hub]) == Path("cache/model.safetensors")
    # foveal.load asks for these
    monkeypatch.setattr(download, "fetch", lambda *given: caches.append(given) or tmp_path / "none")
    with pytest.raises(OSError, match="none"):
        foveal.load("dinat_mini")
    assert caches[-1] == ("dinat_mini.in1k", [cfg.url, hub])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinat_tinny", "dinat_tinny.*dinat_tiny"),
        ("runs/nothing", "runs/nothing"),
        ("dinat_tiny.in2k", "dinat_tiny .*'in2k'.*in1k"),
        ("resnet81", "resnet81.*resnet"),
        ("", "foveal list"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foveal.load(name)


def test_folders_that_are_none_of_ours(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, source: Path = folder) -> None:
        with pytest.raises(ValueError, match=message):
            foveal.load(source)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(r"empty .*config\.json", empty)
    (empty / "config.yaml").touch()
    refused("empty .*best/", empty)

    config = json.loads((folder / "config.json").read_text())
    (folder / "note.txt").touch()
    refused(r"note\.txt", folder / "note.txt")

    (folder / "config.json").write_text(json.dumps({**config, "architecture": "dinat_tinny"}))
    refused("'dinat_tinny'.*dinat_tiny")
    (folder / "config.json").write_text(json.dumps({"model_type": "dinat", "architectures": ["DinatModel"]}))
    refused(r"config\.json .*architecture")
    (folder / "config.json").write_text("{")
    refused(r"config\.json .*JSON")

    (folder / "config.json").write_text(json.dumps({**config, "architecture": "test_foveal_nat", "model_args": {}}))
    refused("test_foveal_nat.*levels")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    refused(r"model\.safetensors .*header")
    (folder / "model.safetensors").unlink()
    refused(r"model\.safetensors, pytorch_model\.bin")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.onnx", "onnxruntime"),
        ("model.pt2", "torch.export.load"),
        ("model.xml", "OpenVINO"),
        ("model.mlpackage", "Core ML"),
    ],
)
def test_exports_that_are_no_models(name: str, what: str, folder: Path) -> None:
    """Neither the folder, with or without config.json, nor the file; and the weights, if they are there, are taken."""
    (folder / name).touch()
    assert foveal.load(folder).num_classes == 4
    (folder / "model.safetensors").unlink()
    for config in (True, False):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} .*{what}.*README\.md"):
            foveal.load(folder)
        if config:
            (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(name)} .*{what}"):
        foveal.load(folder / name)
    (folder / "their.pth.tar").touch()
    with pytest.raises(ValueError, match=r"their\.pth\.tar .*foveal convert FILE --model NAME"):
        foveal.load(folder / "their.pth.tar")


def test_dense_models(tmp_path: Path) -> None:
    """The folder, by its path or as local-dir:, its file, another file beside it; an export of one is none."""
    model = build_segmenter("test_foveal_nat", num_classes=3, head_kwargs={"channels": 16}, auxiliary=False).eval()
    for place in ("run/best", "run/last"):
        save_dense(tmp_path / place, model, list("abc"), {})
    run, x = tmp_path / "run", torch.rand(1, 3, 64, 64)
    state = model.state_dict()
    shifted = {key: value + 1 if key.endswith("classifier.conv.bias") else value for key, value in state.items()}
    safetensors.torch.save_file(shifted, run / "last" / "raw.safetensors")
    with torch.no_grad():
        expected = model(x)
        for source in (
            run,
            str(run),
            f"local-dir:{run}",
            run / "best",
            run / "last",
            run / "best" / "model.safetensors",
        ):
            assert torch.equal(foveal.load(source)(x), expected)
        other = foveal.load(run / "last" / "raw.safetensors")(x)
    torch.testing.assert_close(other, expected + 1)
    with pytest.raises(ValueError, match="num_classes"):
        foveal.load(run, num_classes=3)
    (run / "last" / "model.safetensors").rename(run / "last" / "model.onnx")
    (run / "last" / "raw.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.onnx .*ONNX"):
        foveal.load(run / "last")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_a_pickle_of_tensors(name: str, trained: tuple[torch.nn.Module, Path], folder: Path, monkeypatch) -> None:
    """timm, which reads pickles with code in some versions, is not asked to read anything."""

    def refuse(*args, **kwargs):
        raise AssertionError("timm opens a file")

    for reader in ("_builder.load_state_dict", "_builder.load_state_dict_from_path", "_hub.load_state_dict"):
        monkeypatch.setattr(f"timm.models.{reader}", refuse)
    read, safe = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: safe.append(k["weights_only"]) or read(*a, **k))
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    arguments = argparse.Namespace(model="x", lr=1e-3)  # as training scripts leave them there
    torch.save({"state_dict": {f"module.{key}": v for key, v in state.items()}, "args": arguments}, folder / name)
    loaded = foveal.load(folder)
    assert torch.equal(output_of(loaded), output_of(trained[0]))
    assert safe == [True]
    assert loaded.pretrained_cfg["state_dict"] is None


def test_scores_of_raw_weights() -> None:
    for each in checkpoints().values():
        if each.task == "classify":
            assert base.scored_raw(each.model) == (each.averaged is False), each.name


@pytest.mark.parametrize("name", ["shiftvit_tiny_light", "test_foveal_shiftvit"])
def test_raw_and_averaged_weights_with_arguments(name: str, tmp_path: Path) -> None:
    """The weights of the published score are taken, by timm too; averaged ones if there is none. Paths in arguments do
    not matter."""
    small = dict(embed_dim=24, depths=(1, 1, 1, 1), n_div=6, num_classes=5)
    raw = timm.create_model(name, **small).state_dict()
    averaged = {key: value + 1 for key, value in raw.items()}
    arguments = argparse.Namespace(lr=1e-3, output=tmp_path, inner=argparse.Namespace(seed=0))
    torch.save({"model": raw, "model_ema": averaged, "args": arguments}, tmp_path / "x.pth.tar")
    small["pretrained_cfg_overlay"] = dict(file=str(tmp_path / "x.pth.tar"), num_classes=5)
    want = averaged if name.startswith("test") else raw
    for model in (foveal.load(name, **small), timm.create_model(name, pretrained=True, **small)):
        torch.testing.assert_close(model.state_dict(), want, rtol=0, atol=0)
        assert model.pretrained_cfg.get("state_dict") is None
        assert model.pretrained_cfg["file"] == str(tmp_path / "x.pth.tar")


def test_files_without_tensors(folder: Path) -> None:
    safetensors.torch.save_file({}, folder / "model.safetensors")  # timm would go on to the network
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        foveal.load(folder)


@pytest.mark.parametrize("wrap", [True, False])
def test_pickled_code_is_not_run(folder: Path, wrap: bool) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (folder / "executed",))

    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({"state_dict": Payload()} if wrap else Payload(), file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*getattr.*model\.safetensors"):
        foveal.load(folder)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*getattr"):
        foveal.load("nat_mini", pretrained_cfg_overlay={"file": str(file)})
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "NESTED"])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_prefixes_of_wrappers(prefix: str, ending: str, tmp_path: Path) -> None:
    """What torch.compile and DDP put before the names is taken off wherever weights are read."""

    def wrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if prefix == "NESTED":  # modules that were compiled by themselves
            return {re.sub(r"\.(?=[^.]*$)", "._orig_mod.", name): value for name, value in state.items()}
        return {prefix + name: value for name, value in state.items()}

    def same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    from foveal.train import checkpoint

    model = timm.create_model("test_foveal_nat", num_classes=3)
    file = tmp_path / f"weights.{ending}"
    if ending == "pt":
        torch.save({"model": wrapped(model.state_dict())}, file)
    else:
        safetensors.torch.save_file(wrapped(model.state_dict()), file)
    new = timm.create_model("test_foveal_nat", num_classes=3)
    assert checkpoint.load_initial(new, file) == []
    assert same(new, model.state_dict())
    new = timm.create_model("test_foveal_nat", num_classes=3)
    checkpoint.load_exact(new, file)
    assert same(new, model.state_dict())
    body = build_segmenter("test_foveal_nat", "semantic_fpn", num_classes=2, checkpoint=str(file)).backbone.body
    assert any(
        value.equal(model.state_dict()["levels.0.blocks.0.norm1.weight"]) for value in body.state_dict().values()
    )
    if ending == "safetensors" and prefix != "NESTED":
        dense = build_segmenter("test_foveal_nat", "semantic_fpn", num_classes=2)
        save_dense(tmp_path / "dense", dense, ["a", "b"], {"in_chans": 3})
        safetensors.torch.save_file(wrapped(dense.state_dict()), tmp_path / "dense" / "model.safetensors")
        assert same(foveal.load(tmp_path / "dense"), dense.state_dict())
        save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
        safetensors.torch.save_file(wrapped(model.state_dict()), tmp_path / "model" / "model.safetensors")
        assert same(foveal.load(tmp_path / "model"), model.state_dict())


def test_weights_without_a_configuration(tmp_path):
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file(timm.create_model("test_foveal_nat").state_dict(), file)
    with pytest.raises(ValueError, match=r"w\.safetensors.* config\.json"):
        foveal.load(file)


def test_a_model_without_a_configuration_is_told_from_an_unknown_one(monkeypatch):
    with pytest.raises(ValueError, match="'gazenet' is registered"):
        base.registered_cfg("gazenet")
    monkeypatch.setattr(base, "is_model", lambda _: True)
    with pytest.raises(ValueError, match=r"'gazenet'.*default_cfgs"):
        base.registered_cfg("gazenet")
