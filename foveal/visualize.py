"""Plots of what a model attends to at one point: windows, attention, receptive field and feature maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import atomic
from .kernels import Call, RelativePositionBias, recording
from .kernels.window import Window

KEY = "#56b4e9"  # sky blue and vermillion of Okabe and Ito's colour-blind safe palette
MARK = "#d55e00"


@dataclass(frozen=True, eq=False)
class Look:
    """Keys and weights of the query at the point in one call of a neighborhood operation.

    Attributes:
        layer: name of the calling module.
        size: rows and columns of the map.
        rule: the options of the call, as text.
        query: (row, column) of the query on the map.
        rows: row of each key, ``[Kh]``; may lie outside the map if windows may.
        columns: column of each key, ``[Kw]``, likewise.
        weights: weight of each key, ``[heads, Kh, Kw]``: the softmax including the bias, or the given weights of an
            aggregation.
    """

    layer: str
    size: tuple[int, int]
    rule: str
    query: tuple[int, int]
    rows: Tensor
    columns: Tensor
    weights: Tensor


def looks(model: nn.Module, image: Tensor, point: tuple[float, float]) -> list[Look]:
    """Run the model once and record keys and weights of the query at ``point`` in every neighborhood operation.

    Args:
        model: any model with neighborhood attention or aggregation.
        image: ``[1, C, H, W]``, preprocessed for the model.
        point: (x, y) as fractions of width and height, in [0, 1).

    Examples:
        >>> import timm, torch
        >>> from foveal.visualize import looks
        >>> model = timm.create_model("test_foveal_dinat").eval()
        >>> first = looks(model, torch.randn(1, 3, 64, 96), (0.5, 0.5))[0]
        >>> first.query  # row and column on a map of 16 x 24
        (8, 12)
    """
    check_point(point)
    found: list[Look] = []

    def note(call: Call) -> None:
        found.append(_look(running[-1], call, point))

    with _module_names(model) as running, recording(note), torch.no_grad():
        model(image)
    if not found:
        raise ValueError(f"{type(model).__name__} has no neighborhood attention or aggregation")
    return found


def receptive_field(model: Any, image: Tensor, point: tuple[float, float]) -> Tensor:
    """Effective receptive field of the last map at ``point`` for one image (arXiv 1701.04128, section 2): the absolute
    gradient of the sum of its channels, summed over the input channels, relative to the maximum.

    Args:
        image: as for `looks`.
        point: likewise.

    Returns:
        ``[H, W]`` in [0, 1].

    Examples:
        >>> import timm, torch
        >>> from foveal.visualize import receptive_field
        >>> model = timm.create_model("test_foveal_dinat").eval()
        >>> field = receptive_field(model, torch.randn(1, 3, 64, 96), (0.5, 0.5))
        >>> field.shape, field.max().item()
        (torch.Size([64, 96]), 1.0)
    """
    check_point(point)
    image = image.clone().requires_grad_(True)
    last = model.forward_intermediates(image, indices=1, intermediates_only=True)[-1]
    y, x = (int(at * length) for at, length in zip(reversed(point), last.shape[2:], strict=True))
    (gradient,) = torch.autograd.grad(last[0, :, y, x].sum(), image)
    field = gradient[0].abs().sum(0)
    return field / field.max().clamp(min=torch.finfo(field.dtype).tiny)


def feature_maps(model: Any, image: Tensor) -> list[Tensor]:
    """The map of each stage as an RGB image ``[h, w, 3]`` in [0, 1]: its first three principal components over the
    positions, scaled from the 1st to the 99th percentile.

    Examples:
        >>> import timm, torch
        >>> from foveal.visualize import feature_maps
        >>> model = timm.create_model("test_foveal_dinat").eval()
        >>> [tuple(each.shape) for each in feature_maps(model, torch.randn(1, 3, 64, 96))]
        [(16, 24, 3), (8, 12, 3), (4, 6, 3), (2, 3, 3)]
    """
    with torch.no_grad():
        maps = model.forward_intermediates(image, intermediates_only=True)
    return [_colours([each])[0] for each in maps]


def _colours(maps: list[Tensor]) -> list[Tensor]:
    """Maps ``[1, C, h, w]`` as RGB images, all by the principal components and the range of the first."""
    values = [each[0].flatten(1).t().double() for each in maps]  # positions x channels
    mean = values[0].mean(0)
    _, _, basis = torch.linalg.svd(values[0] - mean, full_matrices=False)
    parts = [(each - mean) @ basis[:3].t() for each in values]
    parts = [F.pad(each, (0, 3 - each.shape[1])) for each in parts]
    low, high = (torch.quantile(parts[0], q, dim=0) for q in (0.01, 0.99))
    scaled = [((each - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) for each in parts]
    return [each.reshape(*own.shape[2:], 3).float() for each, own in zip(scaled, maps, strict=True)]


def visualize(
    model: nn.Module,
    image: Tensor,
    shown: Any,
    output: str | Path,
    *,
    point: tuple[float, float] = (0.5, 0.5),
    title: str = "",
    layers: int = 12,
) -> list[Look]:
    """Draw one PNG: the image with the point, the receptive field, the maps of the stages, and for each attention layer
    its window and the attention of the query at the point, averaged over the heads.

    Args:
        model: a model in evaluation mode with `forward_intermediates`.
        image: ``[1, C, H, W]``, preprocessed for the model.
        shown: the same image without normalization, ``[H, W]`` or ``[H, W, 3]`` in [0, 1].
        output: the file to write.
        point: (x, y) as fractions of width and height.
        layers: maximum number of layers to draw, one of each pattern first.

    Returns:
        A `Look` for every layer, drawn or not.

    Raises:
        ValueError: for a point outside the image, fewer than one layer, or a model without neighborhood attention.
        OSError: if the file cannot be written.

    Examples:
        >>> import timm, torch
        >>> from foveal.visualize import visualize
        >>> model = timm.create_model("test_foveal_dinat").eval()
        >>> image = torch.rand(1, 3, 64, 96)
        >>> seen = visualize(model, image, image[0].permute(1, 2, 0).numpy(), "look.png", layers=2)
        >>> len(seen)  # attention layers, two of them drawn
        7
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    seen = looks(model, image, point)
    field, stages = receptive_field(model, image, point), feature_maps(model, image)
    chosen = _chosen(seen, layers)
    columns = max(4, 2 + len(stages))
    rows = 1 + -(-len(chosen) // columns)
    figure = Figure(figsize=(2.7 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    size = image.shape[2], image.shape[3]
    _draw_input(axes[0, 0], axes[0, 1], shown, size, point, field)
    for number, (axis, picture) in enumerate(zip(axes[0, 2:], stages, strict=False)):
        _backdrop(axis, picture, size)
        axis.set_title(f"stage {number + 1}: {picture.shape[1]}x{picture.shape[0]}\n(principal components)", fontsize=9)
    for axis, look in zip(axes[1:].flat, chosen, strict=False):
        _draw_look(axis, look, shown, size)
    figure.suptitle(title)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as new:
        figure.savefig(new, dpi=110, format="png")
    return seen


def draw_attention(images: Any, weights: Tensor, output: str | Path, *, title: str = "", queries: int = 6) -> None:
    """Draw one PNG: a row for each image, with the mean of the attention of all queries and that of the first ones.

    Args:
        images: without normalization, uint8 ``[B, H, W, 1 or 3]`` (of others, the first three channels).
        weights: of the positions of a map, ``[B, num_queries, h, w]``.
        output: the file to write.
        queries: maximum number of queries to draw.

    Examples:
        >>> import numpy, torch
        >>> from foveal.visualize import draw_attention
        >>> draw_attention(numpy.zeros((2, 32, 48, 3), "uint8"), torch.rand(2, 8, 4, 6), "attention.png")
        >>> open("attention.png", "rb").read()[1:4]
        b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .backbones.images import to_rgb

    shown = min(queries, weights.shape[1])
    figure = Figure(figsize=(1.6 * (2 + shown), 1.7 * len(images) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.subplots(len(images), 2 + shown, squeeze=False)
    for row, image, maps in zip(axes, images, weights.float(), strict=True):
        size = image.shape[0], image.shape[1]
        for axis, part in zip(row, [None, maps.mean(0), *maps[:shown]], strict=True):
            axis.set_axis_off()
            _backdrop(axis, to_rgb(image), size)
            if part is not None:  # square root, to make small weights visible
                axis.images[-1].set_alpha(0.35)
                part = (part / part.max().clamp(min=1e-30)).sqrt()
                axis.imshow(part, cmap="viridis", vmin=0, vmax=1, alpha=0.65, extent=(0, size[1], size[0], 0))
    for axis, text in zip(axes[0], ["image", f"mean of {weights.shape[1]}", *range(1, 1 + shown)], strict=True):
        axis.set_title(text if isinstance(text, str) else f"query {text}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as new:
        figure.savefig(new, dpi=110, format="png")


def patterns(seen: list[Look]) -> list[Look]:
    """The first look of each rule and map size, in order."""
    found: dict[tuple[str, tuple[int, int]], Look] = {}
    for look in seen:
        found.setdefault((look.rule, look.size), look)
    return list(found.values())


def draw_keys(axis: Any, shown: Any, size: tuple[int, int], query: tuple[int, int], keys: Tensor) -> None:
    """Draw the image in grey, and the keys that a query sees.

    Args:
        axis: of matplotlib.
        shown: ``[H, W]`` or ``[H, W, 3]`` in [0, 1].
        size: rows and columns of the map.
        keys: (row, column) of each key ``[keys, 2]``; may lie outside the map.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    height, width = shown.shape[:2]
    h, w = height / size[0], width / size[1]
    grey = shown if shown.ndim == 2 else shown.mean(-1)
    _backdrop(axis, 0.75 * grey, (height, width))
    boxes = [Rectangle((column * w, row * h), w, h) for row, column in keys.tolist()]
    few = len(boxes) < 500  # edges of more boxes would hide the image
    edges: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.3} if few else {"linewidth": 0}
    alpha = 0.9 if 8 * len(boxes) < size[0] * size[1] else 0.55
    axis.add_collection(PatchCollection(boxes, facecolor=KEY, alpha=alpha, antialiased=few, **edges))
    at = ((query[1] + 0.5) * w, (query[0] + 0.5) * h)
    axis.plot(*at, "o", color=MARK, markersize=5, markeredgecolor="white", markeredgewidth=0.8)
    _limit(axis, size, (height, width), keys[:, 0], keys[:, 1])
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def check_point(point: tuple[float, float]) -> None:
    """Raise ValueError unless both coordinates are fractions in [0, 1)."""
    if not all(0 <= at < 1 for at in point):
        raise ValueError(f"the point must be fractions of the image, 0 <= x, y < 1, got {point[0]:g}, {point[1]:g}")


def _chosen(seen: list[Look], count: int) -> list[Look]:
    """At most ``count`` looks, in order: one of each pattern first, then others at even distances."""

    def spread(some: list[Look], n: int) -> list[Look]:
        return some if n >= len(some) else [some[i * len(some) // n] for i in range(n)]

    first = spread(patterns(seen), count)
    others = [look for look in seen if look not in patterns(seen)]
    return sorted(first + spread(others, count - len(first)), key=seen.index)


def clicked(shown: Any) -> tuple[float, float]:
    """Show the image in a window and wait for a click; returns the point as fractions.

    Raises:
        ValueError: there is no display, or the window was closed.
    """
    import matplotlib.pyplot as plt

    try:
        plt.switch_backend("TkAgg")
    except ImportError as error:
        raise ValueError(f"cannot open a window to click in ({error}); give the point with --point X,Y") from error
    figure, axis = plt.subplots()
    height, width = shown.shape[:2]
    _backdrop(axis, shown, (height, width))
    axis.set_title("click on a point")
    points = figure.ginput(1, timeout=0)
    plt.close(figure)
    if not points:
        raise ValueError("the window was closed without a click; give the point with --point X,Y")
    x, y = points[0]
    return min(max(x / width, 0.0), 1 - 1e-6), min(max(y / height, 0.0), 1 - 1e-6)


def _draw_input(left: Any, right: Any, shown: Any, size: tuple[int, int], point: tuple[float, float], field: Tensor):
    """The image with the point, and the receptive field over it."""
    height, width = size
    for axis in (left, right):
        _backdrop(axis, shown, size)
        axis.plot(point[0] * width, point[1] * height, "+", color=MARK, markersize=14, markeredgewidth=2.5)
    left.set_title(f"input {width}x{height}", fontsize=9)
    # four decades: smaller values are rounding errors
    right.imshow(field.clamp(min=1e-4).log10(), cmap="viridis", vmin=-4, vmax=0, extent=(0, width, height, 0))
    right.set_title("receptive field of the last map\n(log10 of the gradient, -4 to 0)", fontsize=9)


def _backdrop(axis: Any, shown: Any, size: tuple[int, int]) -> None:
    height, width = size
    axis.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="nearest")


def _draw_look(axis: Any, look: Look, shown: Any, size: tuple[int, int]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    height, width = size
    h, w = height / look.size[0], width / look.size[1]  # pixels of a position
    _backdrop(axis, shown, size)
    axis.images[-1].set_alpha(0.35)
    weights = look.weights.mean(0)
    boxes = [Rectangle((c * w, r * h), w, h) for r in look.rows.tolist() for c in look.columns.tolist()]
    # square root, to make small weights visible
    keys = PatchCollection(boxes, cmap="viridis", edgecolor="white", linewidth=0.3)
    keys.set_array((weights / weights.max().clamp(min=1e-30)).sqrt().flatten().numpy())
    keys.set_clim(0, 1)
    axis.add_collection(keys)
    row, column = look.query
    axis.add_patch(Rectangle((column * w, row * h), w, h, fill=False, edgecolor=MARK, linewidth=2))
    axis.set_title(f"{look.layer}\n{look.rule}, map {look.size[1]}x{look.size[0]}", fontsize=7)
    _limit(axis, look.size, size, look.rows, look.columns)


def _limit(axis: Any, size: tuple[int, int], pixels: tuple[int, int], rows: Tensor, columns: Tensor) -> None:
    """Set the limits to show the image and all keys, which may lie outside."""
    h, w = pixels[0] / size[0], pixels[1] / size[1]
    axis.set_xlim(min(0, float(columns.min()) * w), max(pixels[1], (float(columns.max()) + 1) * w))
    axis.set_ylim(max(pixels[0], (float(rows.max()) + 1) * h), min(0, float(rows.min()) * h))


@contextmanager
def _module_names(model: nn.Module) -> Iterator[list[str]]:
    """Track the names of the running modules, the innermost last."""
    running: list[str] = []

    def leave(*_: Any) -> None:
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def _look(layer: str, call: Call, point: tuple[float, float]) -> Look:
    """Keys and weights of the query at ``point``."""
    problem = call.problem
    x, y = point
    rows, columns = _AxisWindow(problem.rows, problem.size[0], y), _AxisWindow(problem.columns, problem.size[1], x)
    if call.operation == "neighborhood_aggregate":
        weights = call.tensors[0][0, rows.number, columns.number].float().unflatten(-1, problem.kernel_size)
    else:
        logits = _mix_logits if call.operation == "neighborhood_mix" else _attention_logits
        logits = logits(call, rows, columns)
        if problem.boundary == "mask":
            logits = logits.masked_fill(~(rows.inside[:, None] & columns.inside), float("-inf"))
        weights = logits.flatten(1).softmax(-1).reshape(logits.shape)
    options = {"stride": problem.stride, "dilation": problem.dilation, "every": problem.query_stride}
    shift = {"shift": problem.offset} if problem.offset != (0, 0) else {}
    kernel = "window" if call.operation == "neighborhood_attention" else "kernel"
    rule = [f"{kernel} {_short(problem.kernel_size)}"]
    rule += [f"{name} {_short(value)}" for name, value in options.items() if value != (1, 1)]
    rule += [f"{name} {_short(value)}" for name, value in shift.items()]
    query = rows.query, columns.query
    return Look(layer, problem.size, ", ".join(rule), query, rows.position, columns.position, weights.cpu())


def _attention_logits(call: Call, rows: _AxisWindow, columns: _AxisWindow) -> Tensor:
    """Logits of one query with bias: ``[heads, Kh, Kw]``."""
    q, k, _, bias = call.tensors
    query = q[0, rows.number, columns.number].float()  # heads D
    near = k[0, rows.inside_position][:, columns.inside_position].float()  # Kh Kw heads D
    near = near * (rows.inside[:, None] & columns.inside)[..., None, None]
    logits = call.problem.scale * torch.einsum("nd,ijnd->nij", query, near)
    if isinstance(bias, RelativePositionBias):
        return logits + bias.table.float()[:, rows.row][:, :, columns.row]
    if bias is not None:
        by_row, by_column = (t.float().expand(len(query), -1, -1) for t in bias.tensors)
        logits = logits + torch.einsum("nd,nid->ni", query, by_row[:, rows.row])[:, :, None]
        logits = logits + torch.einsum("nd,njd->nj", query, by_column[:, columns.row])[:, None]
    return logits


def _mix_logits(call: Call, rows: _AxisWindow, columns: _AxisWindow) -> Tensor:
    logits, _, table, kernel_bias = call.tensors
    given = logits[0, rows.number, columns.number].float()
    given = (given if kernel_bias is None else given + kernel_bias.float()).unflatten(-1, call.problem.kernel_size)
    return given if table is None else given + table.float()[:, rows.row][:, :, columns.row]


class _AxisWindow:
    """Position of the query and its keys along one axis, by the window rule."""

    def __init__(self, window: Window, length: int, fraction: float) -> None:
        self.number = min(int(fraction * length) // window.query_stride, window.queries(length) - 1)
        self.query = self.number * window.query_stride
        group, index = self.number % window.dilation, self.number // window.dilation
        start = window.start(index, window.group_length(length, group))
        key = torch.arange(start, start + window.kernel_size)
        self.position = key * window.dilation + group
        self.inside = (self.position >= 0) & (self.position < length)
        self.inside_position = self.position.clamp(0, length - 1)
        self.row = window.table_row(key, torch.tensor(index))


def _short(value: tuple[int, int]) -> str:
    rows, columns = value
    return str(rows) if rows == columns else f"{rows}x{columns}"


def visualize_file(
    file: str | Path,
    name: str,
    output: str | Path,
    point: tuple[float, float] | None,
    *,
    layers: int = 12,
    pretrained: bool = True,
) -> tuple[int, int]:
    """`visualize` for an image file and the name of a model, a run folder or a model folder.

    Args:
        point: (x, y) as fractions of width and height after the model's crop; None: wait for a click.
        pretrained: False: random weights with a fixed seed.

    Returns:
        The number of attention layers drawn, and of all.
    """
    import timm

    from .backbones.images import preprocessing, read_image, to_rgb
    from .backbones.loading import load

    check_point(point or (0.5, 0.5))
    torch.manual_seed(0)
    model: Any = (load(name) if pretrained else timm.create_model(name)).eval()
    pixels = preprocessing(model)(read_image(file, model.pretrained_cfg["input_size"][0]))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    shown = to_rgb((pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
    x, y = point or clicked(shown)
    title = f"{name}{'' if pretrained else ', initial weights'}, {Path(file).name}, point {x:.2f}, {y:.2f}"
    found = visualize(model, pixels[None], shown, output, point=(x, y), title=title, layers=layers)
    return min(layers, len(found)), len(found)


def _chosen_map(name: str, upsample: str) -> dict[str, Any]:
    """Arguments of `build_backbone`: those of the model's folder and of the upsampler's run, the index of the map that
    it is for, and two finer strides, the finer one first."""
    import timm

    from .backbones.loading import local_path, resolve
    from .heads.backbone import feature_info, power_of_two
    from .heads.dense import read_dense_config
    from .heads.upsamplers import PUBLISHED

    model, found = resolve(name), None if upsample in PUBLISHED else read_dense_config(local_path(upsample))
    trained = {} if found is None else found[1].get("backbone", {})  # of a run
    if trained and trained["name"].partition(".")[0] != model.architecture:
        raise ValueError(f"{upsample} was trained for {trained['name']}, {name} is a {model.architecture}")
    options: dict[str, Any] = (model.config or {}).get("model_args", {}) | trained.get("kwargs", {})
    indices = options.pop("out_indices", None)
    with torch.device("meta"):
        own_strides = [each["reduction"] for each in feature_info(timm.create_model(model.architecture, **options))]
    if indices is None:
        stride = trained.get("stride", own_strides[-1])
        if stride not in own_strides:
            raise ValueError(f"{upsample} was trained for a map of stride {stride}, {name}'s have {own_strides}")
        indices = (len(own_strides) - 1 - own_strides[::-1].index(stride),)
    least = min(power_of_two(own_strides[indices[0]]) // 4, 4)
    if least < 1:
        raise ValueError(f"a map of stride {own_strides[indices[0]]} can't be enlarged four times")
    return options | dict(out_indices=tuple(indices), strides=(least, 2 * least))


def visualize_upsampled(
    file: str | Path, name: str, output: str | Path, upsample: str, *, pretrained: bool = True, side: int = 448
) -> list[tuple[int, int]]:
    """Draw a backbone's last map, its bilinear interpolation to stride 4, and the upsampled maps of strides 8 and 4,
    all by the principal components of the first. Of a folder of ``foveal train upsample`` it is the map for which the
    upsampler was trained; of a map of stride 8 or less, the others have a half and a quarter of its stride.

    Args:
        file: the image, whose short side is resized to about ``side``.
        name: of the backbone, or a run or model folder.
        upsample: as `foveal.heads.upsamplers.load_upsampler` takes it.
        pretrained: False: a backbone with random weights and a fixed seed.

    Returns:
        Rows and columns of the maps.

    Raises:
        ValueError: backbone and upsampler do not fit each other.
        OSError: a file cannot be read or written, or weights not be downloaded.

    Examples:
        >>> from PIL import Image
        >>> from foveal.visualize import visualize_upsampled
        >>> Image.new("RGB", (80, 60)).save("image.png")
        >>> visualize_upsampled("image.png", "vit_tiny_patch16_224", "look.png", "bilinear", pretrained=False, side=64)
        [(4, 6), (16, 24), (8, 12), (16, 24)]
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from torchvision.transforms.v2 import functional

    from .backbones.images import read_image
    from .heads.build import build_backbone

    torch.manual_seed(0)
    options = _chosen_map(name, upsample)
    least = options["strides"][0]
    backbone = build_backbone(name, pretrained=pretrained, upsample=upsample, **options).eval()
    image: Any = read_image(file, 3)
    scale = side / min(image.size)
    columns, rows = (max(round(each * scale / 32), 1) * 32 for each in image.size)
    pixels = functional.pil_to_tensor(image.resize((columns, rows))).float() / 255
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (backbone.mean, backbone.std))
    with torch.no_grad():
        given = backbone.pyramid.resized(((pixels - mean) / std)[None])
        own = backbone.body_maps(given)[0]
        finest, finer = backbone.pyramid(given, [own])
    maps = [own, F.interpolate(own, finest.shape[2:], mode="bilinear"), finer, finest]
    titles = [
        "the backbone's",
        "bilinear",
        *[f"{backbone.pyramid.upsampler.kind}, stride {n}" for n in (2 * least, least)],
    ]
    figure = Figure(figsize=(2.7 * 5, 3.0 * rows / columns + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, title, picture in zip(
        figure.subplots(1, 5), ["image", *titles], [pixels.permute(1, 2, 0), *_colours(maps)], strict=True
    ):
        axis.set_axis_off()
        _backdrop(axis, picture.numpy(), (rows, columns))
        axis.set_title(f"{title}\n{picture.shape[1]}x{picture.shape[0]}", fontsize=9)
    figure.suptitle(f"{name}{'' if pretrained else ', initial weights'}, {Path(file).name}")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with atomic(output) as new:
        figure.savefig(new, dpi=110, format="png")
    return [(int(each.shape[2]), int(each.shape[3])) for each in maps]
