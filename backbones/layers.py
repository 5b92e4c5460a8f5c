"""What several families share and timm has no layer for. Feature maps are channels-last, ``[B, H, W, C]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import create_classifier, trunc_normal_
from torch import nn

POOLS = ("", "avg", "max", "avgmax", "catavgmax")


class Backbone(nn.Module):
    """Pooling, dropout and classifier over a channels-last map, with timm's methods around them.

    A family calls `_init_head` in its constructor and writes ``forward_features`` (``[B, 3, H, W]`` to ``[B, h, w,
    num_features]``). The classifier is named ``head``, as in the checkpoints that these families were published with.
    """

    output_fmt = "NHWC"

    def _init_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        self.num_features = num_features
        self.drop_rate = drop_rate
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(num_classes, global_pool)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        check_head(num_classes, global_pool)
        self.num_classes = num_classes
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        init_weights(self.head)

    def get_classifier(self) -> nn.Module:
        """The classifier: a Linear, or an Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for ``num_classes`` (0: none), and the pooling if one is given."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        like = next(self.parameters())
        self._set_head(num_classes, pool)
        self.head.to(device=like.device, dtype=like.dtype).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed besides biases and norms: the relative position bias tables."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] == "rpb"}

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """``[B, h, w, num_features]`` to the logits, or with ``pre_logits`` to ``[B, head_hidden_size]``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))


class StagedBackbone(Backbone):
    """A backbone of a stem and stages, one map each, with timm's methods for these maps.

    A family writes `_stem` and `_stage` beside what `Backbone` asks for, and `_norm` if it has a final norm. With
    ``out_norm`` it has a norm per stage, ``norm0`` and so on, in the maps' own format ``output_fmt``.
    """

    levels_name = "stages"
    out_norm: bool

    @property
    def _levels(self) -> nn.Sequential:
        return getattr(self, self.levels_name)

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images to what the first stage takes."""
        raise NotImplementedError

    def _stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The map of stage ``i`` from that of the one before, or from the stem's."""
        return self._levels[i](x)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm."""
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations. The statistics of BatchNorms
        in them then see every batch twice, with the same result up to a larger momentum."""
        for level in self._levels:
            level.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The maps of the stages, before what halves them for the next.

        Args:
            x: images ``[B, in_chans, H, W]``.
            indices: the last n stages if an int, these stages if a sequence, all if None.
            norm: apply the final norm, if there is one, to the last stage's map (it fits no other). A model with
                ``out_norm`` applies its stage norms instead, always.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: return only the maps.

        Returns:
            The maps at strides 4, 8, 16, 32, or (final features as `forward_features` gives them, maps). With
            ``stop_early`` the final features are those of the last stage that ran, without the final norm if that is
            not the last of all.
        """
        take, last = take_indices(len(self._levels), indices)
        stop = last if stop_early or intermediates_only else len(self._levels) - 1
        final = len(self.feature_info) - 1  # there may be fewer stages: pruned
        maps = []
        x = self._stem(x)
        for i in range(stop + 1):
            x = self._stage(i, x)
            if i in take:
                y = x
                if self.out_norm:
                    y = getattr(self, f"norm{i}")(y)
                elif norm and i == final:
                    y = self._norm(y)
                maps.append(to_format(y, output_fmt, self.output_fmt))
        if intermediates_only:
            return maps
        return (self._norm(x) if stop == final else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove everything that `forward_intermediates` does not need for ``indices``; returns them as a list."""
        take, last = take_indices(len(self._levels), indices)
        shortened = last < len(self._levels) - 1
        if self.out_norm:
            for i in set(range(len(self._levels))) - set(take):
                delattr(self, f"norm{i}")
        setattr(self, self.levels_name, self._levels[: last + 1])
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        self._prune_end(norm=prune_norm or shortened, shortened=shortened)
        if prune_head or shortened:
            self._remove_head()
        return take

    def _prune_end(self, norm: bool, shortened: bool) -> None:
        """Remove what follows the stages: the final norm if ``norm``, all that was for the whole network's last map if
        it is ``shortened``."""
        if norm and hasattr(self, "norm"):
            self.norm = nn.Identity()

    def _remove_head(self) -> None:
        self.reset_classifier(0, "")


def check_head(num_classes: int, global_pool: str, pools: Sequence[str] = POOLS) -> None:
    """Raise a ValueError for a pooling that is not one of ``pools``, or a negative number of classes."""
    if global_pool not in pools:
        raise ValueError(f"global_pool must be one of {tuple(pools)}, got {global_pool!r}")
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")


def unwrap(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint, as a new dict with the names of a bare model.

    Taken off are a ``state_dict`` or ``model`` around the tensors, and the prefixes of ``DistributedDataParallel`` and
    ``features_only``. Of a detector or segmentor, the ``backbone.`` is kept.
    """
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    for prefix in ("module.", "model."):
        if checkpoint and all(name.startswith(prefix) for name in checkpoint):
            checkpoint = {name[len(prefix) :]: value for name, value in checkpoint.items()}
    backbone = {name[9:]: value for name, value in checkpoint.items() if name.startswith("backbone.")}
    return backbone or dict(checkpoint)


def misfit(missing: Sequence[str], unexpected: Sequence[str]) -> ValueError:
    """The error for a checkpoint with other names than the model's."""

    def some(names: Sequence[str]) -> str:
        return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "none"

    return ValueError(f"the checkpoint is not of this model: missing {some(missing)}, unexpected {some(unexpected)}")


def init_weights(module: nn.Module) -> None:
    """Linear layers from a normal cut at two deviations of 0.02, biases 0; other layers keep PyTorch's defaults."""
    for m in module.modules():
        if isinstance(m, nn.Linear) and not m.weight.is_meta:
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth rates, linear over all blocks from 0 to ``rate``, split by level."""
    last = max(sum(depths) - 1, 1)
    rates = iter([rate * i / last for i in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """timm's ``indices`` of `forward_intermediates` (the last n, these, or all) as a list within ``range(count)``, and
    the largest of them."""
    if indices is None:
        indices = count
    given = indices
    if isinstance(indices, int):
        given = range(-indices, 0) if indices <= count else ()
    if not given or not all(-count <= i < count for i in given):
        raise ValueError(f"indices {indices} select nothing or leave the range of {count} maps")
    take = [i % count for i in given]
    return take, max(take)


def to_format(x: torch.Tensor, output_fmt: str, own: str = "NHWC") -> torch.Tensor:
    """A map of the format ``own`` as ``"NHWC"`` or ``"NCHW"``; one made of the other is a view."""
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f'output_fmt must be "NCHW" or "NHWC", got {output_fmt!r}')
    if output_fmt == own:
        return x
    return x.permute(0, 3, 1, 2) if own == "NHWC" else x.permute(0, 2, 3, 1)
