"""From a segmenter's logits to class probabilities of images: resizing, sliding windows, several scales, flips."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..legacy import INFERENCE, old_arguments
from .layers import resize

BAND_BYTES = 2**26  # of the probabilities that `label_map` holds at a time
WHOLE = 2**21  # pixels of an image that `bounded` leaves whole: UPerNet takes 1.5 GB per megapixel
WINDOW, STEP = 1024, 896  # of its windows


def rescale_size(
    size: Sequence[int], scale: Sequence[int] | None, ratio: float = 1.0, size_divisor: int = 1
) -> tuple[int, int]:
    """The size (rows, columns) of a resized image, as in mmcv's ``rescale_size``.

    Args:
        size: of the image (rows, columns).
        scale: limits of the long and the short side, in any order; the aspect ratio is kept. None: the original size.
        ratio: multiplies ``scale``.
        size_divisor: both sides are rounded up to multiples of it.

    Examples:
        >>> from foveal.heads.segmentation import rescale_size
        >>> rescale_size((375, 500), scale=(2048, 512))  # the shorter side to 512
        (512, 683)
    """
    factor = ratio * (min(max(scale) / max(size), min(scale) / min(size)) if scale is not None else 1)
    rows, columns = (max(1, int(side * factor + 0.5)) for side in size)
    return -(-rows // size_divisor) * size_divisor, -(-columns // size_divisor) * size_divisor


def _windows(size: Sequence[int], crop_size: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Sliding windows from the top left; the last of a row and of a column end at the border."""
    starts = []
    for length, side, step in zip(size, crop_size, stride, strict=True):
        steps = -(-max(length - side, 0) // step)
        starts.append([max(min(i * step, length - side), 0) for i in range(steps + 1)])
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + crop_size[0]), slice(left, left + crop_size[1])


def slide_inference(
    model: Callable[[Tensor], Tensor], images: Tensor, crop_size: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """Sliding-window inference: logits ``[B, classes, H, W]``, averaged over the windows that cover a pixel.

    Args:
        model: images to logits of the same height and width.
        images: ``[B, C, H, W]``.
        crop_size: rows and columns of a window; a smaller image is one window.
        stride: rows and columns between windows.

    Raises:
        ValueError: a stride of 0 or greater than crop_size, which would skip pixels.

    Examples:
        >>> import torch
        >>> from foveal.heads.segmentation import slide_inference
        >>> model = lambda images: images.mean(1, keepdim=True)
        >>> slide_inference(model, torch.rand(1, 3, 50, 90), (32, 32), (20, 20)).shape
        torch.Size([1, 1, 50, 90])
    """
    for side, step in zip(crop_size, stride, strict=True):
        if not 0 < step <= side:
            raise ValueError(f"windows of {tuple(crop_size)} with stride {tuple(stride)} skip pixels")
    total: Tensor | None = None
    count = images.new_zeros(1, 1, *images.shape[-2:], dtype=torch.float32)
    for rows, columns in _windows(images.shape[-2:], crop_size, stride):
        logits = model(images[..., rows, columns]).float()
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
        total[..., rows, columns] += logits
        count[..., rows, columns] += 1
    assert total is not None
    return total / count


@old_arguments(**INFERENCE)
@torch.no_grad()
def probabilities(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    scale: Sequence[int] | None = None,
    size_divisor: int = 1,
    antialias: bool = True,
    crop_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    ratios: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Class probabilities ``[B, classes, H, W]`` of images ``[B, C, H, W]``, float in [0, 1], at their original size.

    Logits are resized to the size of the images; the softmax is averaged over ``ratios`` and, with ``flip``, horizontal
    flips.

    Args:
        model: in evaluation mode; images to logits of the same height and width.
        scale: of the model's input, see `rescale_size`.
        size_divisor: of its height and width, see `rescale_size`.
        antialias: when downsizing images.
        crop_size: rows and columns of sliding windows, see `slide_inference`; None: whole images.
        stride: of the windows; None: two thirds of their size.
        ratios: factors of ``scale``.
        flip: average over horizontal flips.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_segmenter
        >>> from foveal.heads.segmentation import probabilities
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=5).eval()
        >>> output = probabilities(model, torch.rand(1, 3, 50, 90), crop_size=(64, 64), flip=True)
        >>> output.shape, bool((output.sum(1) - 1).abs().max() < 1e-5)
        (torch.Size([1, 5, 50, 90]), True)
    """
    size, stride = images.shape[-2:], _stride(crop_size, stride)
    total: Tensor | None = None
    for mirrored, view in _scaled(images, scale, size_divisor, antialias, ratios, flip):
        logits = model(view) if crop_size is None or stride is None else slide_inference(model, view, crop_size, stride)
        logits = logits.flip(-1) if mirrored else logits
        part = resize(logits.float(), size).softmax(1)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total / (len(ratios) * (1 + flip))


@torch.no_grad()
def label_map(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    **settings: Any,
) -> Tensor:
    """Class of each pixel ``[B, H, W]``: the argmax of `probabilities`, computed by `probability_bands`.

    Args:
        model: as for `probabilities`.
        images: ``[B, C, H, W]``.
        settings: further arguments of `probabilities`.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_segmenter
        >>> from foveal.heads.segmentation import label_map
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=5).eval()
        >>> label_map(model, torch.rand(1, 3, 50, 90)).shape
        torch.Size([1, 50, 90])
    """
    return torch.cat([band.argmax(1) for _, band in probability_bands(model, images, **settings)], 1)


@torch.no_grad()
def probability_bands(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    crop_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    **scaling: Any,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the `probabilities` of images in bands of rows from the top: the rows, and their probabilities
    ``[B, classes, rows, W]``. Those of all classes for a large image are never in memory.

    Args:
        model, images, crop_size, stride: as for `probabilities`.
        scaling: ``scale``, ``size_divisor``, ``antialias``, ``ratios`` and ``flip`` of `probabilities`.
    """
    size, stride = images.shape[-2:], _stride(crop_size, stride)
    views = [(mirrored, _View(model, view, crop_size, stride)) for mirrored, view in _scaled(images, **scaling)]
    classes = views[0][1].classes
    step = max(1, BAND_BYTES // (4 * len(images) * classes * size[1]))
    for start in range(0, size[0], step):
        stop, total = min(start + step, size[0]), None
        for mirrored, view in views:
            logits = view.rows(start, stop, size)
            part = (logits.flip(-1) if mirrored else logits).softmax(1)
            total = part if total is None else total.add_(part)
        assert total is not None
        yield slice(start, stop), total / len(views)


def bounded(size: Sequence[int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `probabilities` for an image of ``size`` (rows, columns), with sliding windows where the model
    would see more than 2 megapixels at once.

    Examples:
        >>> from foveal.heads.segmentation.inference import bounded
        >>> bounded((3000, 4000), {"scale": None})["crop_size"], bounded((3000, 4000), {"scale": [2048, 512]})
        ((1024, 1024), {'scale': [2048, 512]})
    """
    ratios = settings.get("ratios", (1.0,))
    rows, columns = rescale_size(size, settings.get("scale"), max(ratios), settings.get("size_divisor", 1))
    if settings.get("crop_size") is not None or rows * columns <= WHOLE:
        return dict(settings)
    return {**settings, "crop_size": (WINDOW, WINDOW), "stride": (STEP, STEP)}


def views_to_learn(
    images: Tensor,
    targets: Tensor,
    *,
    scale: Sequence[int] | None = None,
    size_divisor: int = 1,
    antialias: bool = True,
    crop_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    **_: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the model inputs of `probabilities`, without ``ratios`` and flips (whole images, or one window after the
    other), each with its targets, from ``[B, H, W]``."""
    images = next(_scaled(images, scale, size_divisor, antialias, (1.0,), False))[1]
    if images.shape[-2:] != targets.shape[-2:]:
        targets = F.interpolate(targets[:, None].float(), images.shape[-2:]).long()[:, 0]
    stride = _stride(crop_size, stride)
    if crop_size is None or stride is None:
        yield images, targets
        return
    for rows, columns in _windows(images.shape[-2:], crop_size, stride):
        yield images[..., rows, columns], targets[..., rows, columns]


def _stride(crop_size: Sequence[int] | None, stride: Sequence[int] | None) -> Sequence[int] | None:
    """Of sliding windows: two thirds of their size, unless given."""
    if crop_size is None or stride is not None:
        return stride
    return tuple(max(1, 2 * side // 3) for side in crop_size)


def _scaled(
    images: Tensor,
    scale: Sequence[int] | None = None,
    size_divisor: int = 1,
    antialias: bool = True,
    ratios: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Iterator[tuple[bool, Tensor]]:
    """The images at each ratio and, with ``flip``, mirrored, and whether they are."""
    size = images.shape[-2:]
    for ratio in ratios:
        shape = rescale_size(size, scale, ratio, size_divisor)
        scaled = images
        if shape != tuple(size):
            scaled = F.interpolate(images, shape, mode="bilinear", align_corners=False, antialias=antialias)
        yield False, scaled
        if flip:
            yield True, scaled.flip(-1)


class _View:
    """The logits of one view of the images, a window or several, kept at the resolution of the model's head. They are
    computed where a band of rows first needs them, from the top, and dropped below it."""

    def __init__(
        self,
        model: Any,
        images: Tensor,
        crop_size: Sequence[int] | None,
        stride: Sequence[int] | None,
    ) -> None:
        self.model, self.images, self.size = model, images, images.shape[-2:]
        self.places = [(slice(0, self.size[0]), slice(0, self.size[1]))]
        if crop_size is not None and stride is not None:
            self.places = list(_windows(self.size, crop_size, stride))
        self.several = len(self.places) > 1
        self.windows = [self._window(*self.places.pop(0))]
        _, _, maps, _, finish = self.windows[0]
        self.classes = finish(maps[..., :1, :1]).shape[1]

    def _window(self, rows: slice, columns: slice) -> tuple[slice, slice, Tensor, tuple[int, int], Any]:
        window = self.images[..., rows, columns]
        if hasattr(self.model, "coarse"):
            maps, padded, finish = self.model.coarse(window)
        else:  # computes logits for each pixel
            maps, padded, finish = self.model(window), (window.shape[-2], window.shape[-1]), lambda logits: logits
        return rows, columns, maps.float(), padded, finish

    def rows(self, start: int, stop: int, size: Sequence[int]) -> Tensor:
        """Rows ``start`` to ``stop`` of the logits, resized to ``size``."""
        if tuple(size) == tuple(self.size):
            return self._band(start, stop)
        first, last = (_source(row, size[0], self.size[0]) for row in (start, stop - 1))
        top, bottom = int(first), min(int(last) + 2, self.size[0])
        return _resize_rows(self._band(top, bottom), top, self.size[0], start, stop, size)

    def _band(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``: at each pixel the mean over the windows that cover it."""
        self.windows = [window for window in self.windows if window[0].stop > start]
        while self.places and self.places[0][0].start < stop:
            self.windows.append(self._window(*self.places.pop(0)))
        total: Any = None
        count: Any = None
        for rows, columns, maps, padded, finish in self.windows:
            top, bottom = max(start, rows.start), min(stop, rows.stop, self.size[0])
            if top >= bottom:
                continue
            own = _resize_rows(maps, 0, maps.shape[-2], top - rows.start, bottom - rows.start, padded)
            own = finish(own[..., : min(columns.stop, self.size[1]) - columns.start])
            if not self.several:
                return own
            if total is None:
                total = own.new_zeros(*own.shape[:2], stop - start, self.size[1])
                count = own.new_zeros(stop - start, self.size[1])
            place = (slice(top - start, bottom - start), slice(columns.start, columns.start + own.shape[-1]))
            total[(..., *place)] += own
            count[place] += 1
        assert total is not None
        return total / count


def _source(row: int, length: int, source: int) -> float:
    """Where a row of a resized map lies in its source (``align_corners=False``)."""
    return max((row + 0.5) * source / length - 0.5, 0.0)


def _resize_rows(x: Tensor, top: int, length: int, start: int, stop: int, size: Sequence[int]) -> Tensor:
    """Rows ``start`` to ``stop`` of `resize` to ``size``.

    Args:
        x: the rows of the map from ``top`` on that they need, of ``length`` in all.
    """
    if length != size[0]:
        places = [_source(row, size[0], length) for row in range(start, stop)]
        lower = torch.tensor([int(place) for place in places], device=x.device)
        upper = (lower + 1).clamp(max=length - 1)
        share = torch.tensor([place - int(place) for place in places], device=x.device)[:, None]
        x = x[..., lower - top, :].lerp(x[..., upper - top, :], share.to(x.dtype))
    else:
        x = x[..., start - top : stop - top, :]
    return resize(x, (stop - start, size[1]))
