"""The gallery: what the models look at, what they cost, what runs of one's own found, as a page that opens offline.

``python -m foveal.gallery FOLDER`` writes ``FOLDER/index.html`` and ``FOLDER/pictures``; ``--pictures`` writes only the
pictures of the README, into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from . import zoo
from .backbones import list_models
from .backbones.loading import load
from .benchmarks import plots
from .kernels.window import Window
from .train.report import AP_COLUMNS, HEADLINES, STYLE
from .visualize import draw_keys, looks, patterns, visualize
from .weights.images import preprocessing, read_image

README = ("windows", "zoo-cpu-2core-accuracy", "kernels-cpu-2core")  # the pictures in docs/pictures
POINT = (0.46, 0.3)  # where the pictures look, as fractions of width and height
PHOTOGRAPH_DPI = 150  # photographs make large files
PANELS = 8  # of a family's picture at most


@dataclass(frozen=True)
class Family:
    """A section of the page: a model of the family, None where there are no windows to draw, and what it does."""

    name: str
    model: str | None
    words: str


FAMILIES = (
    Family("NAT", "nat_tiny", "Each position sees the 7x7 positions nearest to it, at every level of the pyramid."),
    Family(
        "DiNAT",
        "dinat_tiny",
        "Every second layer takes its 49 keys further apart, so that a layer above sees most of the map through them.",
    ),
    Family("DiNAT_s", "dinat_s_tiny", "The same attention in Swin's layout, in place of shifted windows."),
    Family("Isotropic", "dinat_isotropic_small", "One resolution from the first layer to the last, as in a plain ViT."),
    Family(
        "HaloNet",
        "halo_h1",
        "The queries of a block share a window: the block and a halo around it, which may leave the map.",
    ),
    Family("HaloNet hybrids", "halo26t", "timm's convolutional networks with halo attention in their last stages."),
    Family("MaxViT", "maxvit_tiny_224", "Blocks first, then a grid: as many keys again, spread over the whole map."),
    Family(
        "OverLoCK",
        "overlock_xt",
        "Dynamic kernels, a small and a large one, whose weights are worked out from an overview of the image.",
    ),
    Family("AsCAN", "ascan_tiny", "Plain attention over the whole map, between convolutions."),
    Family(
        "CARE", None, "Linear attention and convolutions: each position is mixed with all, without a window to draw."
    ),
)

SETTING = """
.card img { display: block; width: 100%; height: auto; background: #fff; border-radius: .3rem; }
.card + .card { margin-top: .75rem; }
h3 { margin: 1.5rem 0 .3rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .75rem; }
a { color: var(--c0); }
code { font-size: .9em; }
td:nth-child(6), td:nth-child(7), th:nth-child(6), th:nth-child(7) { text-align: left; }
"""


# -------------------------------------------------------------------------------------------------- pictures


def photograph(size: int) -> np.ndarray:
    """``[size, size, 3]`` in [0, 1]: the upper part of the photograph of the astronaut in scikit-image (NASA)."""
    from skimage import data

    picture = Image.fromarray(data.astronaut()).crop((32, 0, 416, 384)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.float32) / 255


def reach(length: int, at: int, windows: Sequence[Window]) -> list[int]:
    """The positions of an axis that a query sees through layers one on top of the other, the last layer first."""
    seen = {at}
    for window in windows:
        position, inside, _ = window.keys(length)
        seen = {int(p) for query in seen for p in position[query][inside[query]]}
    return sorted(seen)


def windows_picture(kernel_size: int = 7, dilation: int = 8, side: int = 56) -> Any:
    """Neighborhood attention, dilated, and both in turn, on the first map of a DiNAT at 224, by the window rule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = photograph(8 * side)
    query = tuple(int(fraction * side) for fraction in reversed(POINT))
    near, far = Window(kernel_size), Window(kernel_size, dilation=dilation)
    figure = Figure(figsize=(8, 3.2), dpi=PHOTOGRAPH_DPI, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    FigureCanvasAgg(figure)
    for axis, layers, title in zip(
        figure.subplots(1, 3),
        ([near], [far], [far, near]),
        (
            f"neighborhood attention\nsees the {kernel_size}x{kernel_size} nearest positions",
            f"dilated by {dilation}:\nas many, {dilation} positions apart",
            "one layer after the other:\n{} of {} positions",
        ),
        strict=True,
    ):
        keys = torch.cartesian_prod(*(torch.tensor(reach(side, at, layers)) for at in query))
        draw_keys(axis, shown, (side, side), query, keys)
        axis.set_title(title.format(f"{len(keys):,}", f"{side**2:,}"), fontsize=10)
    return figure


def family_picture(name: str) -> Any:
    """Every rule on every size of map that a model of random weights uses; none depends on the weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    model = timm.create_model(name).eval()
    channels, height, _ = model.pretrained_cfg["input_size"]
    shown = photograph(height)
    image = torch.from_numpy(shown).permute(2, 0, 1)[None, :channels]
    chosen = patterns(looks(model, image, POINT))[:PANELS]
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2 * columns, 2.5 * rows), dpi=PHOTOGRAPH_DPI, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(chosen) :]:
        axis.set_axis_off()
    for axis, look in zip(axes.flat, chosen, strict=False):
        draw_keys(axis, shown, look.size, look.query, torch.cartesian_prod(look.rows, look.columns))
        axis.set_title(f"{look.rule}\nmap {look.size[1]}x{look.size[0]}", fontsize=8)
    return figure


# ------------------------------------------------------------------------------------------------------ page


def _figure(file: str, alt: str, caption: str, rem: float = 72) -> str:
    """``caption``: HTML; ``rem``: the picture's width at most."""
    file, alt = escape(quote(file)), escape(alt)  # a run may be called lr=1?#2
    return (
        f'<figure class=card><a href="{file}"><img src="{file}" alt="{alt}" style="max-width: {rem:g}rem"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _section(anchor: str, title: str, parts: Iterable[str]) -> str:
    content = "\n".join(parts)
    return f'<section id="{anchor}"><h2>{title}</h2>\n{content}</section>' if content else ""


WHAT = {  # by the beginning of the name of a table: alternative text, and what the caption says
    "zoo-accuracy": ("published accuracy over measured time", "Published top-1 over the measured time of one image."),
    "zoo-parameters": ("published accuracy over parameters", "Published top-1 over parameters."),
    "zoo-macs": ("published accuracy over arithmetic", "Published top-1 over multiply-accumulates."),
    "zoo": ("time of one image through each model", "One image through each model, and through timm's beside them."),
    "kernels": (
        "time and memory of neighborhood attention",
        "Beside NATTEN on the same CPU, and beside gathering the windows, with the same answers.",
    ),
    "aggregate": (
        "time and memory of neighborhood aggregation",
        "Beside unfolding the windows, with the same answers.",
    ),
    "halo": ("time and memory of halo attention", "Beside timm's module with the same parameters and answers."),
    "export": ("time of exported models", "The files that `foveal export` writes, beside PyTorch."),
    "data": ("images per second of the loaders", "The loader of the training, beside timm's."),
    "gpu": ("measurements on a GPU", "On a GPU."),
}


def _plots(results: Path, output: Path) -> dict[str, list[str]]:
    """The pictures of all tables, by the section of the page that they belong to."""
    found: dict[str, list[str]] = {"models": [], "kernels": []}
    for name, figure, table in plots.figures(results, zoo.facts):
        plots.save(figure, output / "pictures" / f"{name}.png", plots.fingerprint(table))
        part, what = name.partition("-")[0], name.rpartition("-")[2]
        alt, words = WHAT.get(f"{part}-{what}", WHAT[part])
        caption = f"{escape(words)} <code>foveal bench {part}</code>, <code>{escape(table.name)}</code>"
        found["models" if part == "zoo" else "kernels"].append(_figure(f"pictures/{name}.png", alt, caption))
    return found


def _families(output: Path, families: Sequence[Family]) -> Iterable[str]:
    for family in families:
        parts = [f"<p>{escape(family.words)}</p>"]
        if family.model is not None:
            file = f"pictures/windows-{family.model}.png"
            picture = family_picture(family.model)
            plots.save(picture, output / file, f"foveal.gallery {family.model}", colours=160)
            caption = (
                f"<code>{family.model}</code>: what the marked query sees, by the layers' own rules, weights aside."
            )
            alt = f"windows of {family.model} on a photograph"
            parts.append(_figure(file, alt, caption, 9 * picture.get_figwidth()))
        yield f"<h3>{escape(family.name)}</h3>\n" + "\n".join(parts)


def _runs(runs: Path, output: Path) -> Iterable[str]:
    """What finished runs left: score, predictions, curves; of a classifier of `foveal demo`, where it looks."""
    for best in sorted(runs.rglob("best/config.json")):
        run = best.parent.parent
        if not (run / "summary.json").is_file():
            continue
        name = run.relative_to(runs).as_posix()
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        figures = [_figure_of_run(run, file, name, output) for file in ("predictions.png", "curves.png")]
        digit = run.parent / "digit.png"
        if digit.is_file() and "top1" in summary:
            file = f"pictures/runs/{name}/look.png"
            _trained_look(run, digit, output / file)
            caption = "Where it looks on a held-out digit: windows with its attention, receptive field, feature maps."
            figures.append(_figure(file, f"attention of the run {name} on a digit", caption))
        yield f"<h3>{escape(name)}</h3>\n{_scores(summary)}\n" + "\n".join(filter(None, figures))


def _figure_of_run(run: Path, file: str, name: str, output: Path) -> str:
    if not (run / file).is_file():
        return ""
    target = f"pictures/runs/{name}/{file}"
    path = output / target
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{file}.{os.getpid()}")
    try:
        shutil.copyfile(run / file, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    what = "held-out images with predictions" if file == "predictions.png" else "loss and score by epoch"
    return _figure(target, f"{what}, run {name}", f"{what.capitalize()}.")


def _scores(summary: Mapping[str, Any]) -> str:
    names = HEADLINES | {f"mask_{key}": f"mask {label}" for key, label in AP_COLUMNS.items()}
    shown = [(label, summary[key]) for key, label in names.items() if summary.get(key) is not None]
    shown = [(label, value / 1e6 if label.startswith("M ") else value) for label, value in shown]
    cards = "".join(f"<div class=card><b>{value:,.4g}</b><span>{escape(label)}</span></div>" for label, value in shown)
    return f"<div class=facts>{cards}</div>"


def _trained_look(run: Path, file: Path, output: Path) -> None:
    model = load(str(run)).eval()
    cfg = model.pretrained_cfg
    image = preprocessing(model)(read_image(file, cfg["input_size"][0]))
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    shown: Tensor = (image * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(-1)
    visualize(model, image[None], shown.numpy(), output, title=f"{run.name}, {file.name}")


def _models(names: Sequence[str]) -> str:
    titles, *rows = zoo.table([zoo.describe(name) for name in names])
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def build(
    output: Path,
    results: Path = plots.RESULTS,
    runs: Path = Path("runs"),
    families: Sequence[Family] = FAMILIES,
    models: Sequence[str] | None = None,
) -> Path:
    """Write the page and its pictures; the path of the page.

    Args:
        output: folder, new or of an earlier gallery.
        results: folder of the tables of `foveal bench`.
        runs: folder of runs; what is finished there is shown, and nothing if there is none.
        models: of the table; None for all but those for tests.

    Raises:
        OSError: if the folder cannot be written.
    """
    if models is None:
        models = [name for name in list_models() if not name.startswith("test_")]
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    plots.save(windows_picture(), output / "pictures" / "windows.png", "foveal.gallery", colours=160)
    drawn = _plots(results, output)
    first = _figure(
        "pictures/windows.png",
        "a photograph with the window of one query: the 7x7 nearest positions, 49 that lie 8 apart, and both in turn",
        "The dot marks the query, the squares what it sees: on the first map of a DiNAT at 224, by the window rule.",
    )
    sections = [
        ("look", "What the models look at", [first, *_families(output, families)]),
        ("speed", "Accuracy, speed and size", drawn["models"]),
        ("kernels", "The operations", drawn["kernels"]),
        ("runs", "Trained here", list(_runs(runs, output))),
        ("models", "Models", [_models(models)] if models else []),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, parts in sections if parts)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>foveal: gallery</title><style>{STYLE}{SETTING}</style></head>\n<body>\n<h1>foveal</h1>\n"
        "<p>Vision backbones that look closely around each point. Accuracies are the published ones; times and "
        f"memory were measured, each on the machine that its picture names.</p>\n<nav>{links}</nav>\n"
        + "\n".join(filter(None, (_section(*section) for section in sections)))
        + "\n</body></html>\n"
    )
    path = output / "index.html"
    temporary = output / f".index.html.{os.getpid()}"
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def readme_pictures(output: Path, results: Path = plots.RESULTS) -> list[Path]:
    """Write those of `README` alone; their paths."""
    plots.save(windows_picture(), output / "windows.png", "foveal.gallery", colours=160)
    written = [output / "windows.png"]
    for name, figure, table in plots.figures(results, zoo.facts):
        if name in README:
            written.append(output / f"{name}.png")
            plots.save(figure, written[-1], plots.fingerprint(table))
    return written


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m foveal.gallery", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="to write into")
    parser.add_argument("--pictures", action="store_true", help="the pictures of the README alone, without a page")
    options = parser.parse_args(arguments)
    try:
        written = readme_pictures(options.folder) if options.pictures else [build(options.folder)]
    except OSError as error:
        print(f"{options.folder}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # such as a damaged run, which it names
        print(error, file=sys.stderr)
        return 1
    print(*(f"wrote {path}" for path in written), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
