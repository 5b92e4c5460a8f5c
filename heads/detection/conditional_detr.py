"""Conditional DETR (Meng et al., arXiv 2108.06152): a transformer turns learned queries into boxes, without anchors and
non-maximum suppression. Each query attends to the map by its content and, separately, around a reference point.

Source: https://github.com/Atten4Vis/ConditionalDETR (Apache-2.0). The parameters have its names, except that the
encoder's self-attention has separate projections. Differences: linear layers of the outputs run in float32 under
autocast. transformers' implementation has the same outputs in evaluation, but with ``auxiliary_loss`` its decoder feeds
the normalized states on, and so trains another network than it evaluates. Options that are not in it: groups of queries
in training (Group DETR, arXiv 2207.13085), the temperature of the positions (20 in DAB-DETR, arXiv 2201.12329), a start
at which queries attend around their reference points, and a norm of the map.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from ..backbone import Backbone

Size = Sequence[int]  # rows, columns

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
COSTS = (2.0, 5.0, 2.0)  # of a match: classes, boxes, their overlap
LOSSES = ("loss_class", "loss_box", "loss_giou")
_PRIOR = 0.01  # initial score of every class
_EPS = 1e-5  # of the reference points, from the border


# ---- the network; layouts: B images, S cells of the map, Q queries, D channels


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else x.relu())
        return x


class Attention(nn.Module):
    """Multi-head attention of projected queries and keys ``[B, *, heads x any]`` and values ``[B, S, D]``."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.out_proj = nn.Linear(width, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = None if valid is None else valid[:, None, None]
        x = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """Attention among the cells of a map; their positions are added to queries and keys."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__(width, num_heads, dropout)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, position: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        placed = x + position
        return super().forward(self.q_proj(placed), self.k_proj(placed), self.v_proj(x), valid)


class Layer(nn.Module):
    """What the layers of encoder and decoder have in common: a feed-forward part, and dropout before residuals."""

    def __init__(self, width: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, ffn_width), nn.Linear(ffn_width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu())))


class EncoderLayer(Layer):
    def __init__(self, width: int, num_heads: int, ffn_width: int, dropout: float) -> None:
        super().__init__(width, ffn_width, dropout)
        self.self_attn = SelfAttention(width, num_heads, dropout)

    def forward(self, x: Tensor, position: Tensor, valid: Tensor | None) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x, position, valid)))
        return self.norm2(self.feed_forward(x))


class DecoderLayer(Layer):
    """Attention among the queries, then conditional cross-attention (section 3.3 of the paper): content and position
    are concatenated in each head instead of added, so that their products do not mix.

    Args:
        first: the queries have no content yet: their position is added to it, and that of the keys to theirs.
    """

    def __init__(self, width: int, num_heads: int, ffn_width: int, dropout: float, first: bool) -> None:
        super().__init__(width, ffn_width, dropout)
        linear = lambda: nn.Linear(width, width)  # noqa: E731
        self.sa_qcontent_proj, self.sa_qpos_proj = linear(), linear()
        self.sa_kcontent_proj, self.sa_kpos_proj, self.sa_v_proj = linear(), linear(), linear()
        self.ca_qcontent_proj, self.ca_qpos_proj, self.ca_qpos_sine_proj = (
            linear(),
            linear() if first else None,
            linear(),
        )
        self.ca_kcontent_proj, self.ca_kpos_proj, self.ca_v_proj = linear(), linear(), linear()
        self.self_attn, self.cross_attn = (Attention(width, num_heads, dropout) for _ in range(2))
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, position: Tensor, sine: Tensor, memory: Tensor, places: Tensor, valid: Tensor | None, size: int
    ) -> Tensor:
        """
        Args:
            x: content of the queries, ``[B, Q, D]``.
            position: of the queries, ``[1, Q, D]``.
            sine: embedding of their reference points, scaled by their content, ``[1 or B, Q, D]``.
            memory: of the encoder, ``[B, S, D]``.
            places: positions of its cells, ``[1 or B, S, D]``.
            valid: which cells are no padding, bool ``[B, S]``; None: all.
            size: of the groups of queries, which attend among themselves.
        """
        q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(position)
        k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(position)
        groups = [each.unflatten(1, (-1, size)).flatten(0, 1) for each in (q, k, self.sa_v_proj(x))]
        x = self.norm1(x + self.dropout(self.self_attn(*groups).view_as(x)))
        q, k, place = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory), self.ca_kpos_proj(places)
        if self.ca_qpos_proj is not None:
            q, k = q + self.ca_qpos_proj(position), k + place
        q, k = self._joined(q, self.ca_qpos_sine_proj(sine)), self._joined(k, place)
        x = self.norm2(x + self.dropout(self.cross_attn(q, k, self.ca_v_proj(memory), valid)))
        return self.norm3(self.feed_forward(x))

    def _joined(self, content: Tensor, position: Tensor) -> Tensor:
        """Concatenated in each head: ``[B, *, 2 D]``."""
        heads = self.cross_attn.num_heads
        parts = [each.unflatten(-1, (heads, -1)) for each in (content, position.expand_as(content))]
        return torch.cat(parts, -1).flatten(-2)


class Encoder(nn.Module):
    def __init__(self, count: int, *settings: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*settings) for _ in range(count))

    def forward(self, x: Tensor, position: Tensor, valid: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, position, valid)
        return x


class Decoder(nn.Module):
    def __init__(self, temperature: float, count: int, width: int, *settings: Any) -> None:
        super().__init__()
        self.temperature = temperature
        self.layers = nn.ModuleList(DecoderLayer(width, *settings, first=i == 0) for i in range(count))
        self.norm = nn.LayerNorm(width)
        self.query_scale, self.ref_point_head = MLP(width, width, width), MLP(width, width, 2)

    def forward(
        self, position: Tensor, memory: Tensor, places: Tensor, valid: Tensor | None, size: int
    ) -> tuple[Tensor, Tensor]:
        """The arguments of `DecoderLayer` to the normalized output of every layer, ``[layers, B, Q, D]``, and the
        reference points (x, y) in [0, 1], ``[1, Q, 2]``."""
        reference = in_full(self.ref_point_head, position).sigmoid()
        x_axis, y_axis = (2 * math.pi * reference).unbind(-1)
        around = sine_embedding(y_axis, x_axis, position.shape[-1], self.temperature).to(memory.dtype)
        x, outputs = memory.new_zeros(len(memory), *position.shape[1:]), []
        for i, layer in enumerate(self.layers):
            sine = around if i == 0 else around * self.query_scale(x)
            x = layer(x, position, sine, memory, places, valid, size)
            outputs.append(self.norm(x))  # for the outputs alone: the next layer takes x
        return torch.stack(outputs), reference


class Transformer(nn.Module):
    def __init__(self, encoder_layers: int, decoder_layers: int, temperature: float, *settings: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(encoder_layers, *settings), Decoder(temperature, decoder_layers, *settings)


class ConditionalDETRHead(nn.Module):
    """A map to the classes and boxes of the queries, after every layer of the decoder.

    Args:
        channels: of the map.
        num_classes: without a background, which has no output.
        width: channels of the transformer.
        num_heads: of its attentions.
        ffn_width: channels of its feed-forward parts.
        encoder_layers: their number; 0: the decoder reads the map itself.
        decoder_layers: their number.
        num_queries: most objects of an image that can be found.
        num_groups: groups of so many queries in training, of which evaluation takes the first (Group DETR).
        temperature: of the positions' sines; the lower, the shorter their wavelengths.
        input_norm: a batch norm of the projected map, padding included. Its cells may be nearly equal: those of a body
            that was trained below a neck with norms differ by a seventh of their size.
        focus: how strongly queries attend around their reference points at the start, which shortens the training on
            few images; 0: not at all, as published.
        dropout: in the transformer.

    Raises:
        ValueError: no layer of the decoder, no query or no group, or a width that heads, axes and sines do not divide.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        width: int = 256,
        num_heads: int = 8,
        ffn_width: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        num_queries: int = 300,
        num_groups: int = 1,
        temperature: float = 10000.0,
        input_norm: bool = False,
        focus: float = 0.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        least = min(width, num_heads, ffn_width, decoder_layers, num_queries, num_groups)
        if not (1 < temperature < math.inf and 0 <= focus < math.inf):
            raise ValueError(f"temperature={temperature} must be above 1, and focus={focus} not negative; both finite")
        if least < 1 or width % math.lcm(num_heads, 4):
            raise ValueError(
                f"width={width} must be a multiple of num_heads={num_heads} and of 4, and ffn_width={ffn_width}, "
                f"decoder_layers={decoder_layers}, num_queries={num_queries} and num_groups={num_groups} at least 1"
            )
        self.num_queries, self.temperature = num_queries, temperature
        self.input_proj = nn.Conv2d(channels, width, 1)
        self.input_norm = nn.BatchNorm2d(width) if input_norm else nn.Identity()
        layers = encoder_layers, decoder_layers
        self.transformer = Transformer(*layers, temperature, width, num_heads, ffn_width, dropout)
        self.query_embed = nn.Embedding(num_groups * num_queries, width)
        self.class_embed, self.bbox_embed = nn.Linear(width, num_classes), MLP(width, width, width, 4)
        self._initialize()
        if focus:
            self._look_around_references(focus)

    def _initialize(self) -> None:
        for parameter in self.transformer.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.transformer.modules():
            if isinstance(module, Attention):
                nn.init.zeros_(module.out_proj.bias)
            if isinstance(module, SelfAttention):
                for layer in (module.q_proj, module.k_proj, module.v_proj):
                    nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)  # the authors' are one layer of 3 D outputs
                    nn.init.zeros_(layer.bias)
        last: Any = self.bbox_embed.layers[-1]
        nn.init.constant_(self.class_embed.bias, -math.log((1 - _PRIOR) / _PRIOR))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @torch.no_grad()
    def _look_around_references(self, gain: float) -> None:
        """Equal projections of the positions of queries and cells, whose product falls with their distance, and nothing
        that hides it: a content of queries without their position, and scales of 1."""
        decoder = self.transformer.decoder
        for layer in decoder.layers:
            nn.init.orthogonal_(layer.ca_kpos_proj.weight, gain)
            layer.ca_qpos_sine_proj.weight.copy_(layer.ca_kpos_proj.weight)
            if layer.ca_qpos_proj is not None:
                nn.init.zeros_(layer.ca_qpos_proj.weight)
        scale: Any = decoder.query_scale.layers[-1]
        nn.init.zeros_(scale.weight)
        nn.init.ones_(scale.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: the map ``[B, channels, h, w]``.
            valid: which of its cells are no padding, bool ``[B, h, w]``; None: all.

        Returns:
            Logits ``[layers, B, Q, num_classes]`` and boxes ``[layers, B, Q, 4]``: centre (x, y), width and height as
            fractions of the image without its padding; in training, of the queries of all groups. In float32 also
            under autocast.
        """
        memory, places, cells = self.encode(x, valid)
        states, reference = self.transformer.decoder(self.positions(memory), memory, places, cells, self.num_queries)
        logits, boxes = in_full(self.class_embed, states), in_full(self.bbox_embed, states)
        centre = torch.log(reference.clamp(min=_EPS) / (1 - reference).clamp(min=_EPS))
        return logits, (boxes + F.pad(centre, (0, 2))).sigmoid()

    def encode(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The memory of the encoder ``[B, S, D]``, the positions of its cells ``[1 or B, S, D]``, and ``valid``
        ``[B, S]``."""
        x = self.input_norm(self.input_proj(x))
        given = torch.ones(1, *x.shape[-2:], dtype=torch.bool, device=x.device) if valid is None else valid
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, columns = given.to(dtype).cumsum(1), given.to(dtype).cumsum(2)  # of the image, up to each cell
        axes = rows / (rows[:, -1:] + 1e-6), columns / (columns[..., -1:] + 1e-6)
        angles = [2 * math.pi * axis for axis in axes]
        places = sine_embedding(*angles, x.shape[1], self.temperature).flatten(1, 2).to(x.dtype)
        cells = None if valid is None else valid.flatten(1)
        return self.transformer.encoder(x.flatten(2).transpose(1, 2), places, cells), places, cells

    def positions(self, memory: Tensor) -> Tensor:
        """Those of the queries, ``[1, Q, D]``."""
        count = self.query_embed.num_embeddings if self.training else self.num_queries
        numbers = torch.arange(count, device=memory.device)
        return self.query_embed(numbers)[None]


def sine_embedding(y: Tensor, x: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Coordinates in radians, of one shape, to ``[*shape, width]``: one half of y, the other of x, each sines and
    cosines in turn of wavelengths from 2 pi to 2 pi times ``temperature``."""
    rates = temperature ** -(torch.arange(width // 4, dtype=y.dtype, device=y.device) / (width // 4))
    angles = torch.stack([y, x], -1)[..., None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def in_full(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a module without autocast: in bfloat16 boxes would be rounded to pixels."""
    if not torch.is_autocast_enabled(x.device.type):
        return module(x)
    with torch.autocast(x.device.type, enabled=False):
        return module(x.to(next(module.parameters()).dtype))


def valid_cells(sizes: Sequence[Size], padded: Size, cells: Size, device: Any = None) -> Tensor | None:
    """Which cells of a map are no padding, bool ``[B, h, w]``; None if no image has any.

    Args:
        sizes: of the images, in the top left corners of the batch.
        padded: rows and columns of the batch.
        cells: h, w.
    """
    if all(tuple(size) == tuple(padded) for size in sizes):
        return None
    starts = [torch.arange(n, device=device) * side // n for n, side in zip(cells, padded, strict=True)]
    return torch.stack([(starts[0] < rows)[:, None] & (starts[1] < columns) for rows, columns in sizes])


# ---- losses


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, labels: Sequence[Tensor], truth: Sequence[Tensor]) -> list[Tensor]:
    """The pairs of queries and objects with the least sum of costs, for every layer and image.

    Args:
        logits: of `ConditionalDETRHead`.
        boxes: likewise.
        labels: of the objects of each image, int64 ``[N]``.
        truth: their boxes in the form of ``boxes``, ``[N, 4]``.

    Returns:
        Layer, image, query, and object, counted over all images, of each pair: int64 ``[pairs]`` each, by layer.
    """
    from scipy.optimize import linear_sum_assignment

    pairs, first = [], 0
    for image, (label, own) in enumerate(zip(labels, truth, strict=True)):
        if len(label) > logits.shape[2]:
            warnings.warn(f"an image has {len(label)} objects, more than num_queries={logits.shape[2]}", stacklevel=2)
        share, found = logits[:, image].sigmoid()[..., label], boxes[:, image]
        right = ALPHA * (1 - share) ** GAMMA * -(share + 1e-8).log()
        wrong = (1 - ALPHA) * share**GAMMA * -(1 - share + 1e-8).log()
        cost = COSTS[0] * (right - wrong) + COSTS[1] * torch.cdist(found, own[None], p=1)
        corners = [box_convert(each, "cxcywh", "xyxy") for each in (found.flatten(0, 1), own)]
        cost = cost - COSTS[2] * generalized_box_iou(*corners).unflatten(0, found.shape[:2])
        # numbers that are not finite reach the loss, where training stops
        for layer, each in enumerate(cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy()):
            query, number = map(torch.as_tensor, linear_sum_assignment(each))
            fixed = [torch.full_like(query, value) for value in (layer, image)]
            pairs.append(torch.stack([*fixed, query, number + first]))
        first += len(label)
    found = torch.cat(pairs, 1)
    return list(found[:, found[0].argsort(stable=True)].to(logits.device))


def criterion(logits: Tensor, boxes: Tensor, labels: Sequence[Tensor], truth: Sequence[Tensor]) -> Tensor:
    """The losses of classes (focal), boxes (L1) and their overlap (generalized IoU) after every layer, without weights,
    over the number of objects: ``[layers, 3]``. The arguments are those of `match`."""
    layer, image, query, number = match(logits, boxes, labels, truth)
    count, layers = sum(map(len, labels)), len(logits)
    wanted = torch.zeros_like(logits)
    wanted[layer, image, query, torch.cat(list(labels))[number]] = 1
    focal = sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA).flatten(1).sum(1)
    found, own = boxes[layer, image, query], torch.cat(list(truth))[number]
    corners = [box_convert(each, "cxcywh", "xyxy") for each in (found, own)]
    # relative to the image: an epsilon of 1e-7 would be much of the area of a small object
    pairs = [(found - own).abs().sum(1), generalized_box_iou_loss(*corners, eps=1e-12)]
    each = [loss.reshape(layers, len(layer) // layers).sum(1) for loss in pairs]
    return torch.stack([focal, *each], 1) / max(count, 1)


# ---- the detector


class ConditionalDETR(nn.Module):
    """Conditional DETR with the interface of torchvision's detectors; classes are numbered from 0.

    Args:
        backbone: whose last map is read, without a neck.
        transform: arguments of torchvision's ``GeneralizedRCNNTransform``.
        size_divisor: images are padded to multiples of it, which some backbones need; 1 in the authors' models.
        class_weight: of the focal loss.
        box_weight: of the L1 loss.
        giou_weight: of the loss of the generalized IoU.
        detections_per_img: maximum number of detections, pairs of a query and a class.
        score_thresh: scores must be higher.
        settings: of `ConditionalDETRHead`, whose defaults are the published ones.

    Raises:
        ValueError: invalid settings, or fewer than one detection.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        transform: dict[str, Any],
        *,
        size_divisor: int = 32,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        detections_per_img: int = 100,
        score_thresh: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if min(detections_per_img, size_divisor) < 1:
            raise ValueError(f"detections_per_img={detections_per_img}, size_divisor={size_divisor} must be at least 1")
        self.transform = GeneralizedRCNNTransform(**transform | {"size_divisible": size_divisor})
        self.backbone = backbone
        self.head = ConditionalDETRHead(backbone.spec.channels[-1], num_classes, **settings)
        self.weights = (class_weight, box_weight, giou_weight)
        self.detections_per_img, self.score_thresh = detections_per_img, score_thresh

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """As `Detector`. Boxes may reach beyond the image, as in the authors' evaluation."""
        if self.training and targets is None:
            raise ValueError("conditional_detr needs targets in training")
        sizes = [image.shape[-2:] for image in images]
        batch, targets = self.transform(images, targets if self.training else None)
        x = list(self.backbone(batch.tensors).values())[-1]
        padded = batch.tensors.shape[-2:]
        logits, boxes = self.head(x, valid_cells(batch.image_sizes, padded, x.shape[-2:], x.device))
        if not self.training:
            limits = self.detections_per_img, self.score_thresh
            return [detections(*each, *limits) for each in zip(logits[-1], boxes[-1], sizes, strict=True)]
        labels = [target["labels"] for target in targets]
        truth = [relative(each["boxes"], size) for each, size in zip(targets, batch.image_sizes, strict=True)]
        # each group is matched on its own, as each layer is
        groups = [x.unflatten(2, (-1, self.head.num_queries)).transpose(1, 2) for x in (logits, boxes)]
        found = criterion(*(x.flatten(0, 1) for x in groups), labels, truth).sum(0) / groups[0].shape[1]
        return {name: weight * loss for name, weight, loss in zip(LOSSES, self.weights, found, strict=True)}

    def normalizers(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """The number of objects of a batch, which its losses are divided by, float ``[1]``."""
        return torch.tensor([float(sum(len(target["labels"]) for target in targets))])


def relative(boxes: Tensor, size: Size) -> Tensor:
    """Corners in pixels, ``[N, 4]``, to centre, width and height as fractions of an image of ``size``."""
    rows, columns = size
    return box_convert(boxes / boxes.new_tensor([columns, rows, columns, rows]), "xyxy", "cxcywh")


def detections(logits: Tensor, boxes: Tensor, size: Size, limit: int, threshold: float = 0.0) -> dict[str, Tensor]:
    """The pairs of a query and a class with the highest scores, of one image.

    Args:
        logits: ``[Q, classes]``.
        boxes: ``[Q, 4]``, of `ConditionalDETRHead`.
        size: rows and columns of the image.
        limit: maximum number of pairs.
        threshold: scores must be higher.

    Returns:
        In descending order of score, ``boxes`` ``[N, 4]`` (corners in pixels), ``labels`` int64 and ``scores`` ``[N]``.
    """
    (rows, columns), classes = size, logits.shape[-1]
    best = logits.sigmoid().flatten().topk(min(limit, logits.numel()))
    kept = (best.values > threshold).nonzero()[:, 0]
    chosen = best.indices[kept]
    corners = box_convert(boxes[chosen // classes], "cxcywh", "xyxy")
    scale = corners.new_tensor([columns, rows, columns, rows])
    return {"boxes": corners * scale, "labels": chosen % classes, "scores": best.values[kept]}
