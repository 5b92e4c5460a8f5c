"""``foveal evaluate``: scores a trained model on held-out data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..backbones.loading import local_path
from ..configs.schema import override_value
from ..files import write_json
from .data import workers_end
from .data.guard import printable
from .distributed import join_processes
from .scoring import Scorer, write_table
from .task import Task
from .tasks import find_task, import_remembered, task_of


def evaluate(source: str | Path, overrides: Sequence[str] = (), console: Console | None = None) -> dict[str, Any]:
    """Evaluates a run (its ``best/``), a checkpoint folder of a run, a model folder or the name of a classifier.

    Args:
        overrides: ``key=value`` pairs over the recipe of a run; for other sources, they define the data.
            ``output=FILE`` writes the result as JSON; for detectors, ``predictions=FILE`` writes all detections in
            COCO's result format.
        console: prints a table of the result; None: no output.

    Returns:
        ``source``, ``model``, the metrics in percent, ``n`` (images), ``images_per_second``, ``unreadable`` (image ->
        reason). For detectors and segmenters also ``classes``, metrics by class, and for segmenters ``iou`` by class;
        None for classes that do not occur. The metrics of a detector are None if the images have no annotations; all
        detections are then written to RUN/predictions.json, unless ``predictions`` names a file. With several
        corruptions (``data.corruption=all``) also ``corruptions``, the top-1 errors in percent by corruption and
        severity, and ``mean_corruption_error``, their mean, not relative to that of another network; the table is
        written to RUN/corruptions.csv, of one to RUN/corruptions-NAME.csv.

    Raises:
        ValueError: an invalid ``source`` or override, or missing data (`ConfigError`, `DataError`).
        CheckpointError: weights that do not fit the recipe.
        OSError: a file cannot be read or written.

    Examples:
        >>> import timm
        >>> from foveal.train import evaluate
        >>> model = timm.create_model("test_foveal_dinat", num_classes=10, in_chans=1)
        >>> timm.models.save_for_hf(model, "folder", model_args={"in_chans": 1}, safe_serialization=True)
        >>> data = ["data.kind=digits", "data.image_size=32", "data.in_chans=1", "data.mean=[0.3]", "data.std=[0.37]"]
        >>> evaluate("folder", data)["n"]
        360
    """
    import_remembered(source)
    kind = find_task(task_of(local_path(source))).Task
    files = {key: override_value(overrides, key) for key in kind.files}
    overrides = [pair for pair in overrides if pair.partition("=")[0] not in files]
    accelerator = join_processes()
    task: Task = kind.load(source, overrides, accelerator)
    if task.config.train.threads:
        torch.set_num_threads(task.config.train.threads)
    with workers_end(task.data.val):
        scorer = task.score(task.model.to(accelerator.device))
    for names in gather_object([task.data.bad.names]):
        task.data.bad.merge(names)
    errors = task.corrupted(accelerator)
    result = {
        "source": str(source),
        "model": task.config.model.name,
        **task.result(scorer),
        **_classes(task, scorer),
        **_corruptions(errors),
        "n": scorer.n,
        "images_per_second": scorer.images_per_second,
        "unreadable": task.data.bad.names,
    }
    if accelerator.is_main_process:
        if console is not None:
            _print(task, scorer, str(source), console)
        _write(task, scorer, result, files, console)
        if errors:
            name = "corruptions" if len(errors) > 1 else f"corruptions-{next(iter(errors))}"
            _write_corruptions(errors, beside(source) / f"{name}.csv", console)
    return result


def _corruptions(errors: dict[str, list[float]]) -> dict[str, Any]:
    """Entries of the result: the errors, and their mean."""
    if not errors:
        return {}
    means = [sum(each) / len(each) for each in errors.values()]
    return {"corruptions": errors, "mean_corruption_error": sum(means) / len(means)}


def _write_corruptions(errors: dict[str, list[float]], file: Path, console: Console | None) -> None:
    """The table of top-1 errors in percent by corruption and severity, with means."""
    columns = [*zip(*errors.values(), strict=True)]
    rows = [*errors.items(), ("mean", [sum(each) / len(each) for each in columns])]
    head = ["error in percent at severity", *map(str, range(1, 1 + len(columns))), "mean"]
    table = [[name, *(round(each, 3) for each in row), round(sum(row) / len(row), 3)] for name, row in rows]
    write_table(file, head, table)
    if console is not None:
        shown = Table(*head, box=None, pad_edge=False)
        for name, *figures in table:
            shown.add_row(name, *(f"{each:.4g}" for each in figures))
        console.print(shown)
        console.print(f"written to {file}", highlight=False, soft_wrap=True)


def _write(
    task: Task, scorer: Any, result: dict[str, Any], files: dict[str, str | None], console: Console | None
) -> None:
    if file := files["output"]:
        write_json(file, result)
    found: str | Path | None = files.get("predictions")
    if found is None and not task.annotated:
        found = task.write_predictions(scorer, unannotated_results(result["source"]))
        if console is not None:
            text = f"nothing to score: the images have no annotations; predictions written to {found}"
            console.print(text, highlight=False, soft_wrap=True)
    elif found:
        task.write_predictions(scorer, Path(found))


def unannotated_results(source: str | Path) -> Path:
    """The default file for predictions without annotations."""
    return beside(source) / "predictions.json"


def beside(source: str | Path) -> Path:
    """Where files about a source are written: in the run, or beside the model folder."""
    folder = local_path(source)
    return folder if (folder / "config.yaml").is_file() else folder.resolve().parent


def _classes(task: Task, scorer: Scorer) -> dict[str, Any]:
    head, rows = task.by_class(scorer)
    return {"classes": {name: dict(zip(head[1:], row, strict=True)) for name, *row in rows}} if rows else {}


def _print(task: Task, scorer: Scorer, source: str, console: Console) -> None:
    for note in task.notes:
        console.print(note, highlight=False, soft_wrap=True)
    heading = f"{source}: {task.describe()}{'; metrics in percent' * task.annotated}"
    console.print(heading, highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    for name, value in scorer.metrics.items() if task.annotated else ():
        table.add_row(task.metrics[name], "-" if value is None else f"{value:.4g}")
    table.add_row("images", f"{scorer.n:,}")
    table.add_row("images/s", f"{scorer.images_per_second:,.1f}")
    console.print(table)
    head, rows = task.by_class(scorer)
    if rows and task.annotated:
        table = Table(*head, box=None, pad_edge=False)
        for name, count, *figures in rows:
            table.add_row(escape(name), f"{count:,}", *("-" if value is None else f"{value:.4g}" for value in figures))
        console.print(table)
    if bad := sorted(task.data.bad.names):
        named = escape(printable(", ".join(bad[:5])))
        console.print(f"[yellow]{len(bad)} unreadable images left out:[/] {named}", highlight=False, soft_wrap=True)
