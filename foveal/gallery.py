"""The gallery: what the models look at, what they cost, and reports of finished runs, as a page that opens offline.

``python -m foveal.gallery FOLDER`` writes ``FOLDER/index.html`` with its pictures; ``--pictures`` writes only the
pictures of the README, into FOLDER.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import timm
import torch
from PIL import Image

from . import zoo
from .benchmarks import plots
from .files import atomic
from .kernels.window import Window
from .train import report
from .visualize import draw_keys, looks, patterns

README = ("windows", "zoo-cpu-2core-accuracy", "kernels-cpu-2core")  # the pictures in docs/pictures
POINT = (0.46, 0.3)  # where the pictures look, as fractions of width and height
PHOTOGRAPH_DPI = 150  # photographs make large files
PANELS = 8  # of a family's picture at most

Families = Mapping[str, tuple[str | None, str]]  # by title: a model, None where it has no windows to draw; a sentence
FAMILIES: Families = {
    "NAT": ("nat_tiny", "Each position sees the 7x7 positions nearest to it, at every level of the pyramid."),
    "DiNAT": ("dinat_tiny", "Every second layer takes its 49 keys further apart; two layers see most of the map."),
    "DiNAT_s": ("dinat_s_tiny", "The same attention in Swin's layout, in place of shifted windows."),
    "Isotropic": ("dinat_isotropic_small", "One resolution from the first layer to the last, as in a plain ViT."),
    "HaloNet": ("halo_h1", "The queries of a block share a window: the block and a halo around it."),
    "HaloNet hybrids": ("halo26t", "timm's convolutional networks with halo attention in their last stages."),
    "MaxViT": ("maxvit_tiny_224", "Blocks first, then a grid: as many keys again, spread over the whole map."),
    "OverLoCK": ("overlock_xt", "A small and a large dynamic kernel, computed from an overview of the image."),
    "AsCAN": ("ascan_tiny", "Plain attention over the whole map, between convolutions."),
    "CARE": (None, "Linear attention and convolutions: each position is mixed with all, without a window to draw."),
}

STYLE = """
.card img { display: block; width: 100%; height: auto; background: #fff; border-radius: .3rem; }
.card + .card { margin-top: .75rem; }
h3 { margin: 1.5rem 0 .3rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .75rem; }
a { color: var(--c0); }
code { font-size: .9em; }
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
    shown = photograph(8 * side)
    query = int(POINT[1] * side), int(POINT[0] * side)
    near, far = Window(kernel_size), Window(kernel_size, dilation=dilation)
    figure = plots.new_figure(8, 3.2, PHOTOGRAPH_DPI, h_pad=0.1)
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
    model: Any = timm.create_model(name).eval()
    channels, height, _ = model.pretrained_cfg["input_size"]
    shown = photograph(height)
    image = torch.from_numpy(shown).permute(2, 0, 1)[None, :channels]
    chosen = patterns(looks(model, image, POINT))[:PANELS]
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = plots.new_figure(2 * columns, 2.5 * rows, PHOTOGRAPH_DPI, h_pad=0.08)
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
    return (
        f'<figure class=card><a href="{file}"><img src="{file}" alt="{escape(alt)}" style="max-width: {rem:g}rem"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _looks(output: Path, families: Families) -> Iterable[str]:
    save_windows(output / "pictures" / "windows.png")
    yield _figure(
        "pictures/windows.png",
        "a photograph with the window of one query: the 7x7 nearest positions, 49 that lie 8 apart, and both in turn",
        "The dot marks the query, the squares what it sees: on the first map of a DiNAT at 224, by the window rule.",
    )
    for title, (model, words) in families.items():
        yield f"<h3>{escape(title)}</h3>\n<p>{escape(words)}</p>"
        if model is None:
            continue
        file, picture = f"pictures/windows-{model}.png", family_picture(model)
        plots.save(picture, output / file, f"foveal.gallery {model}", colours=160)
        caption = f"<code>{model}</code>: what the marked query sees, by the layers' own rules, weights aside."
        yield _figure(file, f"windows of {model} on a photograph", caption, 9 * picture.get_figwidth())


def _plots(results: Path, output: Path) -> Iterable[str]:
    for picture in plots.pictures(results, zoo.facts):
        path = plots.save_picture(picture, output / "pictures")
        caption = f"{escape(picture.title)}. <code>{escape(picture.table.name)}</code>"
        yield _figure(f"pictures/{path.name}", picture.title, caption)


def _reports(runs: Path, output: Path) -> Iterable[str]:
    """Links to copies of the reports of finished runs."""
    for summary in sorted(runs.rglob("summary.json")):
        name = summary.parent.relative_to(runs).as_posix()
        path = output / "runs" / f"{name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as new:
            shutil.copyfile(report.write(summary.parent), new)
        yield f'<p><a href="{escape(quote(f"runs/{name}.html"))}">{escape(name)}</a></p>'


def build(
    output: Path,
    results: Path = plots.RESULTS,
    runs: Path = Path("runs"),
    families: Families = FAMILIES,
) -> Path:
    """Write the page and its pictures; the path of the page.

    Args:
        output: folder, new or of an earlier gallery.
        results: folder of the tables of `foveal bench`.
        runs: folder of runs, searched for finished ones.

    Raises:
        OSError: the folder cannot be written.
        ValueError: a damaged table or run.
    """
    sections = {
        "What the models look at": [*_looks(output, families)],
        "Accuracy, speed and size": [*_plots(results, output)],
        "Trained here": [*_reports(runs, output)],
    }
    links = content = ""
    for title, parts in sections.items():
        anchor = title.split()[0].lower().strip(",")
        if parts:
            links += f'<a href="#{anchor}">{title}</a>'
            content += "\n".join([f'<section id="{anchor}"><h2>{title}</h2>', *parts, "</section>\n"])
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>foveal: gallery</title><style>{report.STYLE}{STYLE}</style></head>\n<body>\n<h1>foveal</h1>\n"
        "<p>Vision backbones that look closely around each point. Accuracies are the published ones; times and "
        f"memory were measured, each on the machine that its picture names.</p>\n<nav>{links}</nav>\n{content}"
        "</body></html>\n"
    )
    path = output / "index.html"
    with atomic(path) as new:
        new.write_text(page, encoding="utf-8")
    return path


def save_windows(path: Path) -> Path:
    plots.save(windows_picture(), path, "foveal.gallery", colours=160)
    return path


def readme_pictures(output: Path, results: Path = plots.RESULTS) -> list[Path]:
    """Write those of `README` alone; their paths."""
    drawn = (picture for picture in plots.pictures(results, zoo.facts) if picture.name in README)
    return [save_windows(output / "windows.png"), *(plots.save_picture(picture, output) for picture in drawn)]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m foveal.gallery", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="to write into")
    parser.add_argument("--pictures", action="store_true", help="the pictures of the README alone, without a page")
    options = parser.parse_args(arguments)
    written = readme_pictures(options.folder) if options.pictures else [build(options.folder)]
    print(*(f"wrote {path}" for path in written), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
