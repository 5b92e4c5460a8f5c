"""Published upsamplers: by name, and converted."""

import pytest
import torch
from safetensors.torch import save_file

import foveal
from foveal.heads.upsamplers import PUBLISHED, create_upsampler, load_upsampler
from foveal.weights import cards
from foveal.weights.convert import ConversionError, convert, restore
from foveal.weights.manifest import checkpoints
from foveal.weights.verify import verify


def published(name: str) -> dict[str, torch.Tensor]:
    """As training writes them: DataParallel's prefix, counters of batches as floats, RoPE's frequencies."""
    torch.manual_seed(0)
    state = {f"module.{n}": x.float() for n, x in create_upsampler(name).state_dict().items()}
    if name == "naf":
        state["module.image_encoder.rope.periods"] = 100 ** (torch.arange(16) / 16)
    return state


def test_the_manifest_has_them() -> None:
    found = {name for name, each in checkpoints().items() if each.task == "upsample"}
    assert found == {each.checkpoint for each in PUBLISHED.values()}
    assert checkpoints()["vit_base_patch16_dinov3.naf"].address.endswith("naf_release.pth")
    assert "unknown" in cards.published_card(checkpoints()["vit_small_patch14_dinov2.uplift"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_convert(name, tmp_path):
    state = published(name)
    torch.save(state, tmp_path / "weights.pth")
    done = convert(tmp_path / "weights.pth", tmp_path / "folder", model=name)
    assert done.record["checkpoint"] == PUBLISHED[name].checkpoint
    assert all(check.passed for check in verify(tmp_path / "folder"))
    kept = {n: x for n, x in state.items() if "rope" not in n}
    again = restore(tmp_path / "folder")
    assert again.keys() == kept.keys()
    assert all(torch.equal(x, kept[n]) and x.dtype == kept[n].dtype for n, x in again.items())
    for loaded in (foveal.load(tmp_path / "folder"), load_upsampler(tmp_path / "folder")):
        assert all(torch.equal(x, state[f"module.{n}"].to(x.dtype)) for n, x in loaded.state_dict().items())


def test_files_that_do_not_fit(tmp_path):
    save_file(published("naf"), tmp_path / "naf.safetensors")
    with pytest.raises(ConversionError, match=r"not used.*image_encoder"):
        convert(tmp_path / "naf.safetensors", tmp_path / "folder", model="uplift_dinov2_s14")
