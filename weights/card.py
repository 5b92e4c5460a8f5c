"""The card of a converted model: what the manifest says of it, and what was checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg

from .export import RECORD
from .manifest import checkpoints

_USE = """```python
import foveal, timm

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval(){answer}
```"""


def card(config: Mapping[str, Any], measured: str | None = None) -> str:
    """A README.md for the folder of this ``config.json``, which `convert` wrote.

    Args:
        measured: a score that was measured with the converted model, in words.
    """
    record, cfg = config[RECORD], config["pretrained_cfg"]
    checkpoint = checkpoints().get(record["checkpoint"])
    architecture = get_pretrained_cfg(config["architecture"])
    channels, rows, columns = cfg["input_size"]
    features = bool((config.get("model_args") or {}).get("features_only"))
    table: dict[str, Any] = {
        "model": f"`{config['architecture']}`, {record['parameters']:,} parameters"
        + (", a backbone: it gives feature maps" if features else f", {config['num_classes']:,} classes"),
        "paper": _text(cfg.get("paper_ids") or architecture.paper_ids),
    }
    if checkpoint is None:
        table["weights"] = f"from `{record['file']}`; that is not known to be a published file"
        table["licence of the weights"] = cfg.get("license") or "not known: that of whoever made the file"
    else:
        table |= {
            "weights": f"`{checkpoint.name}`, published as {checkpoint.address or checkpoint.page}",
            "converted from": checkpoint.original,
            "code of the authors": f"{checkpoint.code}, licence: {checkpoint.code_licence}",
            "licence of the weights": checkpoint.weights_licence,
            "published score": checkpoint.score_text() + (" (of the whole dense model)" if features else ""),
            "note": " ".join(filter(None, [checkpoint.note, checkpoint.about])),
        }
        if not checkpoint.score:
            del table["published score"]
    table |= {
        "input": f"{channels} x {rows} x {columns}, mean {_text(cfg['mean'])}, std {_text(cfg['std'])}, crop "
        f"{cfg['crop_pct']} ({cfg.get('crop_mode', 'center')}), {cfg['interpolation']}",
        "measured": measured,
    }
    averaged = {True: "; the averaged (EMA) weights", False: "; the raw weights", None: ""}[record["averaged"]]
    checked = [
        f"made from `{record['file']}`, sha256 `{record['sha256']}`{averaged}",
        f"all {record['tensors']} tensors of it are used, all parameters are set",
        *([f"left out, of the heads: {_groups(record['heads'])}"] if record["heads"] else []),
        f"`model.safetensors` has sha256 `{record['model_sha256']}`",
        "the answer to a fixed image was computed before writing and is that of the written model; it is stored in "
        "`config.json`, and `foveal verify` computes it again",
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in table.items() if value)
    title = checkpoint.name if checkpoint else config["architecture"]
    use = _USE.format(answer="\nmaps = model(images)  # a list" if features else "\nlogits = model(images)")
    return (
        f"# {title}\n\n| | |\n|---|---|\n{lines}\n\n{use}\n\n## Checked\n\n"
        + "\n".join(f"* {each}" for each in checked)
        + f"\n\nWritten by foveal {record['version']}: `foveal convert`.\n"
    )


def _groups(heads: Mapping[str, int]) -> str:
    return ", ".join(f"{count} `{group}`" for group, count in heads.items())


def _text(value: Any) -> str:
    return ", ".join(str(each) for each in value) if isinstance(value, (list, tuple)) else str(value or "")
