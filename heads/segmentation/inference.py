"""From a segmenter's logits to class probabilities of photographs: sizes, sliding windows, several scales, flips."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import resize

Pair = tuple[int, int]


def fitted(size: Sequence[int], bounds: Sequence[int] | None, scale: float = 1.0, multiple_of: int = 1) -> Pair:
    """The size (rows, columns) of an image after the test-time, or the base of the training-time, resize.

    Args:
        size: of the image (rows, columns).
        bounds: the longer and the shorter side may grow or shrink to these, the aspect is kept; None: the image's own.
        scale: of the bounds.
        multiple_of: both sides are then rounded up to multiples of it.

    Examples:
        >>> from foveal.heads.segmentation import fitted
        >>> fitted((375, 500), bounds=(2048, 512))  # the shorter side to 512
        (512, 683)
    """
    factor = scale * (min(max(bounds) / max(size), min(bounds) / min(size)) if bounds is not None else 1)
    rows, columns = (max(1, int(side * factor + 0.5)) for side in size)
    return -(-rows // multiple_of) * multiple_of, -(-columns // multiple_of) * multiple_of


def _windows(size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Windows from the top left on; the last of a row and of a column end at the border."""
    starts = []
    for length, side, step in zip(size, window, stride, strict=True):
        steps = -(-max(length - side, 0) // step)
        starts.append([max(min(i * step, length - side), 0) for i in range(steps + 1)])
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + window[0]), slice(left, left + window[1])


def slide(model: Callable[[Tensor], Tensor], images: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Logits ``[B, classes, H, W]`` as the mean over the windows that hold a pixel.

    Args:
        model: images to logits of the same height and width.
        images: ``[B, C, H, W]``.
        window: rows and columns; an image smaller than the window is one window.
        stride: rows and columns from a window to the next.

    Raises:
        ValueError: a stride of 0, or one beyond the window, which would leave pixels out.

    Examples:
        >>> import torch
        >>> from foveal.heads.segmentation import slide
        >>> slide(lambda images: images.mean(1, keepdim=True), torch.rand(1, 3, 50, 90), (32, 32), (20, 20)).shape
        torch.Size([1, 1, 50, 90])
    """
    for side, step in zip(window, stride, strict=True):
        if not 0 < step <= side:
            raise ValueError(f"sliding windows of {tuple(window)} with stride {tuple(stride)} don't cover the image")
    total: Tensor | None = None
    count = images.new_zeros(1, 1, *images.shape[-2:], dtype=torch.float32)
    for rows, columns in _windows(images.shape[-2:], window, stride):
        logits = model(images[..., rows, columns]).float()
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
        total[..., rows, columns] += logits
        count[..., rows, columns] += 1
    assert total is not None
    return total / count


@torch.no_grad()
def probabilities(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    bounds: Sequence[int] | None = None,
    multiple_of: int = 1,
    antialias: bool = True,
    window: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Class probabilities ``[B, classes, H, W]`` of images ``[B, C, H, W]``, float in [0, 1], at their own size.

    Each of the ``scales`` (and with ``flip`` its mirror image) gives logits that are brought to the images' size; the
    mean of their softmax is the answer.

    Args:
        model: in evaluation mode; images to logits of the same height and width.
        bounds: what the model sees, see `fitted`.
        multiple_of: likewise.
        antialias: when images are made smaller for it.
        window: rows and columns, see `slide`; None for whole images.
        stride: of the windows; None: two thirds of them.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_segmenter
        >>> from foveal.heads.segmentation import probabilities
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=5).eval()
        >>> answer = probabilities(model, torch.rand(1, 3, 50, 90), window=(64, 64), flip=True)
        >>> answer.shape, bool((answer.sum(1) - 1).abs().max() < 1e-5)
        (torch.Size([1, 5, 50, 90]), True)
    """
    size = images.shape[-2:]
    if window is not None and stride is None:
        stride = tuple(max(1, 2 * side // 3) for side in window)
    total: Tensor | None = None
    for scale in scales:
        shape = fitted(size, bounds, scale, multiple_of)
        scaled = images
        if shape != tuple(size):
            scaled = F.interpolate(images, shape, mode="bilinear", align_corners=False, antialias=antialias)
        for mirrored in (False, True) if flip else (False,):
            view = scaled.flip(-1) if mirrored else scaled
            logits = model(view) if window is None or stride is None else slide(model, view, window, stride)
            logits = logits.flip(-1) if mirrored else logits
            part = resize(logits.float(), size).softmax(1)
            total = part if total is None else total.add_(part)
    return total / (len(scales) * (1 + flip))
