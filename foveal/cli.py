"""The `foveal` command: arguments, and errors as one line with an exit status.

Each subcommand imports what it needs when it runs, so that `foveal --help` and `foveal list` do not import PyTorch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from . import __version__
from .errors import Interrupted, RunError

_NO_MEMORY = ("can't allocate memory", "out of memory")  # in PyTorch's RuntimeError, on a CPU and on CUDA
_DISTRIBUTIONS = {
    "imagecorruptions": "imagecorruptions-imaug",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "faster_coco_eval": "faster-coco-eval",
}


class _Commands(TyperGroup):
    """Runs a subcommand: an int that it returns is the exit status, errors of the user become one line on stderr."""

    def invoke(self, ctx: Any) -> None:
        with _errors_as_text():
            status = super().invoke(ctx)
        if status:
            raise typer.Exit(status)


@contextmanager
def _errors_as_text() -> Iterator[None]:
    """Exit status 2 for invalid input, 1 for a run that failed, 130 after Ctrl-C, 0 after SIGTERM.

    Bugs keep their traceback; with ``FOVEAL_DEBUG=1`` so does everything.
    """
    try:
        yield
    except Interrupted as stop:
        _print_error("stopped", stop.message, "yellow")
        raise typer.Exit(stop.code) from None
    except KeyboardInterrupt:
        _print_error("stopped", "at once; what was saved before is intact", "yellow")
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if _is_bug(error) or os.environ.get("FOVEAL_DEBUG", "0") not in ("", "0"):
            raise
        if isinstance(error, BrokenPipeError):
            print(flush=True)  # fails again if it was the output that broke, see `main`
        _print_error("error", _missing_extra(error) or str(error) or type(error).__name__, "red")
        raise typer.Exit(2 if isinstance(error, ValueError | FileNotFoundError) else 1) from None


def _is_bug(error: Exception) -> bool:
    known = not isinstance(error, RuntimeError) or isinstance(error, RunError)
    return not known and not any(words in str(error) for words in _NO_MEMORY)


def _missing_extra(error: Exception) -> str | None:
    """The extra of this package that installs a missing module."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    from importlib.metadata import requires

    module = error.name.partition(".")[0]
    distribution = _DISTRIBUTIONS.get(module, module)
    for requirement in requires("foveal") or ():
        name, _, marker = requirement.partition(";")
        if name.strip().startswith(distribution) and "extra ==" in marker:
            extra = marker.split("extra ==")[1].strip(" \"'")
            return f"this needs {distribution}: pip install 'foveal[{extra}]'"
    return None


def _print_error(heading: str, message: str, colour: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0 or heading == "error":
        line = "\n  ".join(" ".join(each.split()) for each in message.splitlines() if each.strip())
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[{colour}]{heading}:[/] {escape(line)}")


app = typer.Typer(
    help="Local-attention vision backbones: train, score, convert and export.",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the console script. If whoever reads the output is gone (``foveal list | head``), it ends without
    a message, with the exit status of a program that SIGPIPE ends."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except (SystemExit, BrokenPipeError) as end:
        # click and rich exit with 1 when they meet a broken pipe
        if not isinstance(end, BrokenPipeError) and not isinstance(end.__context__, BrokenPipeError):
            raise
        for stream in (sys.stdout, sys.stderr):  # what they hold must not fail again at the end of Python
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(141)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"foveal {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (also: FOVEAL_DEBUG=1).")] = False,
) -> None:
    if debug:
        os.environ["FOVEAL_DEBUG"] = "1"


# ---- models


class Sort(str, Enum):
    """Sort keys of `foveal list`."""

    name = "name"
    parameters = "parameters"
    macs = "macs"
    top1 = "top1"


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'dinat_*'.")] = "*",
    sort: Annotated[Sort, typer.Option(help="Sort key; top-1 in descending order.")] = Sort.name,
    max_params: Annotated[str | None, typer.Option(metavar="N", help="Maximum parameters, such as 30M.")] = None,
    any_size: Annotated[bool, typer.Option("--any-size", help="Only models that accept any image size.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of docs/models.md, without the models for tests.")
    ] = False,
) -> None:
    """List the models: family, parameters, GMACs at their input size, published top-1, licences, exports."""
    from . import zoo

    rows = zoo.select(pattern, sort.value, None if max_params is None else _number(max_params), any_size)
    if not rows:
        raise ValueError(f"no model matches {pattern!r} and the options; `foveal list` lists all")
    if markdown:
        print(zoo.markdown([row for row in rows if not row["name"].startswith("test_")]))
    elif as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_models(rows)


def _number(text: str) -> float:
    """30M, 1.5e7 or 25000000."""
    unit = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper(), 1.0)
    try:
        return float(text if unit == 1 else text[:-1]) * unit
    except ValueError:
        raise ValueError(f"--max-params takes a number such as 30M, got {text!r}") from None


def _print_models(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("name", "family", "parameters", "GMACs", "input", "any size", "top-1", "tags"):
        number = name in ("parameters", "GMACs", "input", "top-1")
        table.add_column(name, justify="right" if number else "left", no_wrap=name in ("name", "parameters"))
    for name in ("code licence", "weights licence", "exports"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["name"],
            row["family"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs'] / 1e9:.2f}",
            "x".join(map(str, row["input"][1:])),
            "yes" if row["any_size"] else "no",
            f"{row['top1']:.1f}" if row["top1"] else "-",
            ", ".join(row["tags"]) or "-",
            row["code_licence"] or "-",
            row["weights_licence"] or "-",
            row["exports"],
        )
    _console().print(table)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Model name, with or without a tag; with --card also a folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Print the model card of its family, or of a folder.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the card of published weights.")] = False,
) -> None:
    """Show a model: size, cost, preprocessing and weights; with a tag, such as dinat_mini.in1k, the card of these."""
    from . import zoo
    from .weights import cards
    from .weights.manifest import checkpoints

    given = [option for option, on in (("--json", as_json), ("--card", card), ("--markdown", markdown)) if on]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are mutually exclusive")
    # detectors and segmenters are in the manifest, but not among timm's tags
    published = checkpoints().get(name)
    if markdown:
        if published is None:
            raise ValueError(f"--markdown prints the card of published weights, NAME.TAG, got {name!r}")
        print(cards.published_card(published), end="")
    elif as_json:
        print(json.dumps(zoo.info(name), indent=2))
    elif card:
        folder = _folder(name)
        print(_folder_card(folder) if folder else zoo.family_card(published.model if published else name), end="")
    elif published is not None:
        _print_rows([(key, value.replace("`", "")) for key, value in cards.facts(published).items()], title=name)
    elif _folder(name):
        raise ValueError(f"{name} is a folder; info takes a model name, or with --card a folder")
    else:
        _print_rows(zoo.info_rows(name))


def _folder(name: str) -> Path | None:
    """The folder of a name, with ``local-dir:`` and ``~`` resolved; None for a model name."""
    from .backbones.loading import local_path

    return folder if name.strip() and (folder := local_path(name)).is_dir() else None


def _folder_card(folder: Path) -> str:
    """The card in a folder or a run's best/."""
    for place in (folder / "README.md", folder / "best" / "README.md"):
        if place.is_file():
            return place.read_text(encoding="utf-8")
    raise ValueError(f"{folder} has no README.md: `foveal convert` and `foveal export` write one")


def _print_rows(rows: Sequence[tuple[str, str]], title: str | None = None) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(key, escape(value))
    _console().print(table)


# ---- training and scoring


class Task(str, Enum):
    """Tasks of training."""

    classify = "classify"
    detect = "detect"
    segment = "segment"
    upsample = "upsample"


Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Module that registers your own models; may be repeated."),
]


@app.command()
def train(
    task: Annotated[Task, typer.Argument(help="Task.", show_default=False)],
    config: Annotated[str, typer.Argument(help="Recipe: a YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    imports: Imports = None,
) -> None:
    """Train a model with a recipe."""
    from .train import train as run

    remembered = [f"imports=[{','.join(imports)}]"] if imports else []
    run(config, remembered + (overrides or []), task.value)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="Run folder, model folder or model name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    imports: Imports = None,
) -> None:
    """Score a model on its evaluation data."""
    from .train import evaluate as run

    _import(imports)
    run(source, overrides or [], _console())


def _import(modules: list[str] | None) -> None:
    if modules:
        from .train.tasks import import_models

        import_models(modules)


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(help="Image files, folders of images, videos.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model name, run folder or model folder.", show_default="the newest run under runs/"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classifier: number of classes to show.")] = 5,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Detector: minimum score to show.")] = 0.5,
    output: Annotated[
        Path | None, typer.Option(help="Detector, segmenter: folder for the predictions, drawn or in --format.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="drawn, masks, coco or yolo, for --output; may be repeated."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="a GPU if there is one")
    ] = None,
    imports: Imports = None,
) -> int:
    """Predict images with a classifier, detector or segmenter."""
    from rich.progress import track

    from .train import predict as run
    from .train.results import find_images

    _import(imports)
    if model is None:
        model = _newest_run()
        print(f"model: {model}", file=sys.stderr)
    failed = 0
    found = run(model, images, top=top, threshold=threshold, output=output, formats=formats or (), device=device)
    # on the terminal of whoever waits, unless the results are printed there
    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    bar = {"console": Console(stderr=True), "disable": not shown, "total": len(find_images(images)) if shown else None}
    for prediction in track(found, "images", **bar):
        if prediction.error is not None:
            print(f"error: {prediction.error}", file=sys.stderr)
            failed += 1
            continue
        print(prediction.path)
        for result in prediction.results:
            print(f"  {result}")
    return 1 if failed else 0


def _newest_run() -> str:
    """The run under ./runs with the most recent best/."""
    best = sorted(Path("runs").rglob("best/config.json"), key=lambda file: file.stat().st_mtime)
    if not best:
        raise ValueError(
            "no trained model under runs/: train one (`make demo` or `foveal train classify digits`), or choose one "
            "with --model"
        )
    return str(best[-1].parent.parent)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Model name, run folder or model folder.")],
    to: Annotated[str, typer.Option(help="safetensors, onnx, pt2, aoti, openvino or coreml.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    image: Annotated[
        list[str] | None,
        typer.Option(help="Also compare on this image; may be repeated.", show_default="two sample images"),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="float16; images and logits stay float32.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="ONNX: convolutions and linear layers in 8 bits.")] = False,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="For --int8: image file, or folder of them; may be repeated.")
    ] = None,
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic",
            help="Dynamic height and width, from 32 pixels on, for models marked in `foveal list`.",
        ),
    ] = False,
    size: Annotated[str | None, typer.Option(metavar="ROWSxCOLUMNS", help="Detector, segmenter: image size.")] = None,
    score: Annotated[
        Path | None, typer.Option(help="Also score the export on these images, one folder per class.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="For a model name: published or random weights.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files in a non-empty folder.")] = False,
    imports: Imports = None,
) -> None:
    """Export a model and compare it with the original."""
    from .weights.export import export as write
    from .weights.formats import FORMATS

    _import(imports)
    done = write(
        source,
        to,
        output,
        images=image or [],
        half=half,
        int8=int8,
        calibration=calibration or [],
        dynamic=dynamic,
        size=None if size is None else _rows_and_columns(size),
        score=score,
        force=force,
        pretrained=pretrained,
        on_phase=lambda phase: print(f"{phase} ...", file=sys.stderr),
    )
    print(f"{done.folder}: {', '.join(done.files)}")
    if done.difference is None:
        print(f"converted, not run here: {FORMATS[to.lower()].not_here()}")
    else:
        print(f"largest difference {done.difference:.1e} of the largest output, on: {'; '.join(done.checked)}")
    for note in done.notes:
        print(note)


def _rows_and_columns(text: str) -> tuple[int, int]:
    rows, x, columns = text.partition("x")
    if not x or not rows.isdecimal() or not columns.isdecimal():
        raise ValueError(f"a size is ROWSxCOLUMNS, such as 512x640, got {text!r}")
    return int(rows), int(columns)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="File, folder or name of published weights.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="Model name with the tag of its published weights, such as dinat_mini.in1k.")
    ] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--raw", help="Averaged or raw weights.", show_default="the scored ones")
    ] = None,
    backbone: Annotated[
        bool,
        typer.Option("--backbone", help="Only convert the backbone of a detector or segmenter."),
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Argument of the model; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files in a non-empty folder.")] = False,
) -> None:
    """Convert a checkpoint to a verified model folder: safetensors, config and card.

    The format of the parameter names is detected. Detectors and segmenters of mmdetection, mmsegmentation and
    detectron2 are converted if this package has their heads; --backbone only converts the backbone. For files of
    detectron2 that are not published ones, some settings are required by --set."""
    import yaml

    from .weights.convert import convert as write

    arguments = {}
    for pair in set_ or []:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}")
        try:
            arguments[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {pair}: {error}") from error
    done = write(source, output, model=model, ema=ema, backbone=backbone, arguments=arguments, force=force)
    print("\n".join(done.lines()))


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="Folder that `foveal convert` wrote.")],
    images: Annotated[Path | None, typer.Option(help="Score on these images, one folder per class.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the score into the folder's card.")] = False,
) -> int:
    """Verify a converted model against its source and the published facts."""
    from .weights.verify import verify as check

    failed = 0
    for each in check(folder, images, write_card=card):
        print(f"{'ok    ' if each.passed else 'FAILED'}  {each.name}: {each.detail}")
        failed += not each.passed
    return 1 if failed else 0


@app.command()
def visualize(
    image: Annotated[str, typer.Argument(help="Image file.")],
    model: Annotated[str, typer.Option(help="Model name, run folder or model folder.")],
    output: Annotated[Path, typer.Option(help="PNG file to write.")],
    point: Annotated[
        str, typer.Option(metavar="X,Y", help="Query point: fractions of width and height, after the model's crop.")
    ] = "0.5,0.5",
    click: Annotated[bool, typer.Option("--click", help="Choose the point with the mouse (needs a display).")] = False,
    layers: Annotated[int, typer.Option(min=1, help="Maximum number of attention layers to draw.")] = 12,
    untrained: Annotated[bool, typer.Option("--untrained", help="Random instead of published weights.")] = False,
    upsample: Annotated[
        str | None, typer.Option(help="Instead plot the last map and this upsampler's: naf, ..., a run or a folder.")
    ] = None,
) -> None:
    """Plot what a model attends to at a point: windows, attention, receptive field, feature maps."""
    from .train.tasks import import_remembered
    from .visualize import visualize_file, visualize_upsampled

    if upsample is not None:
        given = {"--point": point != "0.5,0.5", "--click": click, "--layers": layers != 12}
        if any(given.values()):
            raise ValueError(f"--upsample={upsample} excludes {', '.join(key for key in given if given[key])}")
        import_remembered(model)
        maps = visualize_upsampled(image, model, output, upsample, pretrained=not untrained)
        print(f"{output}: maps of {', '.join(f'{rows}x{columns}' for rows, columns in maps)} positions")
        return

    try:
        x, y = (float(part) for part in point.split(","))
    except ValueError as error:
        raise ValueError(f"--point takes X,Y, two fractions of the image, got {point!r}") from error
    import_remembered(model)
    drawn, layers_found = visualize_file(
        image, model, output, None if click else (x, y), layers=layers, pretrained=not untrained
    )
    print(f"{output}: {drawn} of {layers_found} attention layers")


class Head(str, Enum):
    """Heads of `foveal probe`."""

    ep = "ep"
    linear = "linear"
    knn = "knn"


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="Model name, run folder or model folder.")],
    data: Annotated[str, typer.Argument(help="digits, or a folder: IDX files, shards, images in classes.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    head: Annotated[Head, typer.Option(help="Efficient probing, linear probing or nearest neighbours.")] = Head.ep,
    imports: Imports = None,
) -> None:
    """Score the features of a frozen backbone by a small classifier that is trained on them."""
    from .train.probe import probe as run

    _import(imports)
    result = run(model, data, head.value, overrides or [], _console())
    for key in ("top1", "top5", "best_epoch", "last_top1", "train_images", "n", "seconds"):
        value = result.get(key)
        for k, each in value.items() if isinstance(value, dict) else [("", value)] if value is not None else []:
            name = f"{key}, k={k}" if k else key
            print(f"{name:14} {each:.2f}" if isinstance(each, float) else f"{name:14} {each:,}")


# ---- data, reports


@app.command()
def data(
    root: Annotated[Path, typer.Argument(help="Images with annotations or masks, or one folder per class.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    task: Annotated[Task | None, typer.Option(help="Task.", show_default="detected")] = None,
    draw: Annotated[Path | None, typer.Option(help="PNG file for images with their boxes or masks.")] = None,
) -> int:
    """Inspect a dataset before training: format, splits, classes, sizes, duplicates and problems.

    The exit status is 1 if training on it would be wrong."""
    from .train.data import survey

    found = survey.survey(root, overrides or [], task and task.value)
    print("\n".join(found.lines))
    if draw is not None:
        print(f"{draw}: {survey.draw(found.data, draw)} images")
    for reason in found.wrong:
        _print_error("wrong", reason, "red")
    return 1 if found.wrong else 0


@app.command()
def shards(
    source: Annotated[Path, typer.Argument(help="Folder with train/CLASS/IMAGE, val/CLASS/IMAGE, or one of these.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; repeat the command to continue.")],
    samples: Annotated[int | None, typer.Option(help="Images per shard; or see --megabytes.")] = None,
    megabytes: Annotated[float, typer.Option(help="Size per shard, by its source files, in 10^6 bytes.")] = 100.0,
    seed: Annotated[int, typer.Option(help="Seed of the order of the images.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Decode every image; list those that can't be in bad_samples.csv.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    max_size: Annotated[int | None, typer.Option(help="Resize images with a longer side to it.")] = None,
    quality: Annotated[
        int | None, typer.Option(help="Store every image as JPEG of this quality.", show_default="90 if resized")
    ] = None,
) -> None:
    """Write WebDataset shards from folders of images, for `data.kind=wds`."""
    from rich.progress import Progress

    from .train.data.shards import Options, make_shards

    options = Options(samples, megabytes, seed, verify, max_size, quality)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("shards", total=None)
        done = make_shards(
            source, output, options, jobs=jobs, on_shard=lambda n, total: bar.update(task, completed=n, total=total)
        )
    for split, (count, images) in done.splits.items():
        print(f"{split}: {images:,} images in {count:,} shards")
    print(f"{output}: {done.written:,} shards written now; read them with data.kind=wds data.root={output}")
    if done.bad:
        print(f"{len(done.bad):,} unreadable images left out: {output / 'bad_samples.csv'}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write RUN/report.html: curves, predictions, scores by class, settings and machine, in one file."""
    from .train.report import write

    print(write(run))


# ---- bench, demo


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> int:
    """Measure speed: `foveal bench kernels`, `models`, `data` and others; see `foveal bench --help`."""
    from .benchmarks import run

    return run.main(context.args)


@app.command()
def demo(
    task: Annotated[Task, typer.Argument(help="Task.")] = Task.classify,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write.", show_default="runs/demo, runs/demo-detect or runs/demo-segment"),
    ] = None,
) -> None:
    """Train on handwritten digits, evaluate, export and predict, in a few minutes."""
    from .demo import demo as run

    run(task.value, output)


def _console() -> Console:
    # a table that is piped must not be cut to 80 columns
    return Console() if sys.stdout.isatty() else Console(width=200)
