"""Probes: classifiers of the features of a frozen backbone.

* **Efficient probing**: Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency (ICLR 2026,
  arXiv:2506.10178). Authors' code: https://github.com/billpsomas/efficient-probing (Apache-2.0). This is an independent
  implementation; the parameters have the names of the authors' heads.
* **Linear probing**, as of MAE (arXiv:2111.06377, appendix A.1): BatchNorm without parameters, then a Linear.
* **k-NN**, as of DINO (arXiv:2104.14294, section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["patches", "all", "pooled"]
_CHUNK = 2**26  # similarities at a time


class FrozenBackbone(nn.Module):
    """The features of a backbone that is not trained: always in evaluation mode and without gradients, so that neither
    its weights nor the statistics of its norms change.

    Args:
        model: a classifier of this package or of timm.
        kind: ``"patches"``: tokens of the last map, through the final norm; ``"all"``: with the class and register
            tokens of a plain ViT; ``"pooled"``: the vector that the model's own classifier would get.

    Examples:
        >>> import timm, torch
        >>> from foveal.heads.probing import FrozenBackbone
        >>> backbone = FrozenBackbone(timm.create_model("test_foveal_dinat"), "patches")
        >>> backbone.train()(torch.randn(2, 3, 64, 96)).shape, backbone.model.training
        (torch.Size([2, 6, 128]), False)
    """

    def __init__(self, model: Any, kind: Kind = "patches") -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.kind = kind

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.model.head_hidden_size if self.kind == "pooled" else self.model.num_features

    @property
    def skipped(self) -> int:
        """Class and register tokens, which are before those of the map."""
        return getattr(self.model, "num_prefix_tokens", 0) if self.kind == "all" else 0

    def train(self, mode: bool = True) -> FrozenBackbone:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images to tokens ``[B, N, C]``, or pooled ``[B, C]``.

        Raises:
            ValueError: the model has no tokens or map.
        """
        features = self.model.forward_features(images)
        if self.kind == "pooled":
            return self.model.forward_head(features, pre_logits=True)
        return self._tokens(features)

    def _tokens(self, features: Any) -> Tensor:
        name, width = type(self.model).__name__, self.model.num_features
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{name} has no tokens to attend to: its features are {found}")
        if features.ndim == 3:
            skipped = 0 if self.kind == "all" else getattr(self.model, "num_prefix_tokens", 0)
            tokens = features[:, skipped:]
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            tokens = features.flatten(1, 2)
        else:
            tokens = features.flatten(2).transpose(1, 2)
        if tokens.shape[2] != width:  # a layout that the model does not declare
            raise ValueError(f"{name}: features {list(features.shape)} have no axis of {width} channels as expected")
        return tokens

    def map_size(self, count: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map of ``count`` tokens of an image.

        Raises:
            ValueError: they are no map of the model's stride, or the model declares none.
        """
        found = getattr(self.model, "feature_info", None)
        if not found:
            raise ValueError(f"{type(self.model).__name__} has no feature_info for the map of its {count} tokens")
        stride = found[-1]["reduction"]
        for rows, columns in ((height // stride, width // stride), (-(-height // stride), -(-width // stride))):
            if rows * columns == count:
                return rows, columns
        raise ValueError(f"{count} tokens are no map of {height}x{width} pixels at stride {stride}")


class AttentivePooling(nn.Module):
    """Queries attend to the tokens, which are the keys as they are, with one head; each query pools its own group of
    channels of the values.

    Args:
        dim: channels of the tokens.
        num_queries: queries; their number times ``d_out`` divides ``dim``.
        d_out: ``dim`` over the channels of the output.

    Raises:
        ValueError: for channels that cannot be divided so.
    """

    def __init__(self, dim: int, num_queries: int = 32, d_out: int = 1) -> None:
        super().__init__()
        if num_queries < 1 or d_out < 1 or dim % (num_queries * d_out):
            raise ValueError(f"{dim} channels are not divisible by num_queries {num_queries} x d_out {d_out}")
        self.cls_token = nn.Parameter(torch.empty(1, num_queries, dim).normal_(std=0.02))
        self.v = nn.Linear(dim, dim // d_out, bias=False)

    def attention(self, tokens: Tensor) -> Tensor:
        """``[B, N, C]`` to the weights of the tokens ``[B, num_queries, N]``."""
        queries = self.cls_token * tokens.shape[2] ** -0.5
        return (queries @ tokens.transpose(1, 2)).softmax(2)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, C / d_out]``."""
        # the tokens are pooled before the projection, which commutes: that takes about C / num_queries times less
        pooled = self.attention(tokens) @ tokens
        groups = self.v.weight.unflatten(0, (pooled.shape[1], -1))
        return torch.einsum("bqc,qdc->bqd", pooled, groups).flatten(1)


class Probe(nn.Sequential):
    """A head of features with the parameters of the published ones: `efficient_probe` or `linear_probe`."""

    def parameter_groups(self, weight_decay: float, layer_decay: float | None, _: float = 1.0) -> list[dict[str, Any]]:
        """Groups for timm's optimizers: as in the published LARS, biases have neither decay nor a trust ratio.

        Raises:
            ValueError: a layer decay, as a head has no layers.
        """
        if layer_decay is not None:
            raise ValueError(f"layer_decay={layer_decay} is for backbones; a probe has one layer")
        adapted = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        return [
            {"params": adapted, "weight_decay": weight_decay, "always_adapt": True},
            {"params": others, "weight_decay": 0.0, "always_adapt": False},
        ]


def efficient_probe(dim: int, num_classes: int, num_queries: int = 32, d_out: int = 1) -> Probe:
    """`AttentivePooling`, BatchNorm without parameters, and a Linear: tokens ``[B, N, dim]`` to logits.

    Args:
        dim: channels of the tokens.
        num_classes: number of classes.
        num_queries: as of `AttentivePooling`.
        d_out: as of `AttentivePooling`.

    Examples:
        >>> import torch
        >>> from foveal.heads.probing import efficient_probe
        >>> efficient_probe(64, 10, num_queries=8)(torch.randn(2, 49, 64)).shape
        torch.Size([2, 10])
    """
    pooling = AttentivePooling(dim, num_queries, d_out)
    return Probe(pooling, *_classifier(dim // d_out, num_classes))


def linear_probe(dim: int, num_classes: int) -> Probe:
    """BatchNorm without parameters and a Linear: pooled features ``[B, dim]`` to logits.

    Examples:
        >>> import torch
        >>> from foveal.heads.probing import linear_probe
        >>> linear_probe(64, 10)(torch.randn(2, 64)).shape
        torch.Size([2, 10])
    """
    return Probe(*_classifier(dim, num_classes))


def _classifier(width: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm1d(width, eps=1e-6, affine=False), nn.Linear(width, num_classes)


def from_published(checkpoint: Mapping[str, Any]) -> Probe:
    """The efficient probe of a checkpoint of the authors' code, perhaps in ``model`` or ``state_dict``, in evaluation
    mode.

    Raises:
        ValueError: names or shapes of another head; the message has the first ones.

    Examples:
        >>> import torch
        >>> from foveal.heads.probing import efficient_probe, from_published
        >>> state = efficient_probe(64, 10, num_queries=8).state_dict()  # torch.load("ep_head.pth", weights_only=True)
        >>> from_published({"model": state})(torch.randn(2, 49, 64)).shape
        torch.Size([2, 10])
    """
    state = next((checkpoint[key] for key in ("model", "state_dict") if key in checkpoint), checkpoint)
    try:
        (_, queries, dim), (width, _), (classes, _) = (state[f"{key}"].shape for key in _SHAPES)
        probe = efficient_probe(dim, classes, queries, dim // width)
        probe.load_state_dict(dict(state))
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"no head of efficient probing: {error} ({', '.join(list(state)[:4])})") from error
    return probe.eval()


_SHAPES = ("0.cls_token", "0.v.weight", "2.weight")


def knn(
    train: Tensor, labels: Tensor, queries: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes of the ``k`` nearest training images, by the cosine of their pooled features.

    Args:
        train: features ``[N, C]`` of the training images.
        labels: their classes ``[N]``.
        queries: features ``[M, C]``.
        num_classes: number of classes.
        k: neighbours.
        temperature: an image votes with exp(cosine / temperature).

    Returns:
        The share of the votes for each class, ``[M, num_classes]``.

    Raises:
        ValueError: more neighbours than training images, or a temperature that is not positive.

    Examples:
        >>> import torch
        >>> from foveal.heads.probing import knn
        >>> knn(torch.eye(3), torch.tensor([0, 1, 1]), torch.tensor([[0.0, 2.0, 1.0]]), num_classes=2, k=1)
        tensor([[0., 1.]])
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"k={k} neighbours of {len(train)} training images")
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    train = F.normalize(train.float(), dim=1)
    votes = []
    for part in queries.split(max(1, _CHUNK // len(train))):
        near = (F.normalize(part.float(), dim=1) @ train.T).topk(k)
        weights = (near.values / temperature).softmax(1)
        votes.append(weights.new_zeros(len(part), num_classes).scatter_add_(1, labels[near.indices], weights))
    return torch.cat(votes)
