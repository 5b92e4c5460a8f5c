"""timm's feature networks with weights. The only file in heads/ that imports the backbones."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors.torch import load_file as read_tensors
from timm.layers import convert_sync_batchnorm
from timm.models import PretrainedCfg
from timm.models._features import FeatureGetterNet
from timm.models.resnet import Bottleneck
from torch import distributed, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..backbones import download, loading
from ..backbones.layers import check_foldable as check_foldable  # for necks and heads
from ..backbones.loading import local_path as local_path
from ..backbones.loading import without_wrappers as without_wrappers
from .backbone import feature_info, power_of_two, published_names
from .dense import WEIGHTS, read_dense_config
from .legacy import migrate_state_dict
from .names import check_fit

Model = TypeVar("Model", bound=nn.Module)

# Any image size, and a norm for each map: the defaults where a model's class has these arguments.
_DENSE_DEFAULTS = dict(out_norm=True, strict_img_size=False, dynamic_img_size=True)


def build_body(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    strides: Sequence[int] = (4, 8, 16, 32),
    out_indices: Sequence[int] | None = None,
    sync_bn: bool = False,
    drop_path_rate: float | None = None,
    grad_checkpointing: bool = False,
    stride_in_1x1: bool = False,
    upsampled: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, nn.Module]:
    """The feature network of a foveal or timm model, and the classifier on the meta device; see `build_backbone`.

    Args:
        upsampled: strides that the model lacks are left out, but there is a map to make the finest one from. A plain
            transformer's map has the final norm, as upsamplers are trained on it.
    """
    if pretrained and checkpoint is not None:
        raise ValueError(f"pretrained=True and checkpoint={str(checkpoint)!r} exclude each other")
    architecture = loading.resolve(name).architecture
    if drop_path_rate is not None:
        kwargs["drop_path_rate"] = drop_path_rate
    body: Any
    classifier = _without_values(architecture, kwargs)
    known = set(inspect.signature(type(classifier).__init__).parameters)
    found = {info["reduction"] for info in feature_info(classifier)}
    if out_indices is None and "learnable_downsample" in known and set(strides) - found == {32}:
        kwargs = {"learnable_downsample": 768} | kwargs
        classifier = _without_values(architecture, kwargs)
    if out_indices is None:
        out_indices = _indices(architecture, classifier, strides, upsampled)
    if upsampled and not known & {"out_norm"} and _is_plain(classifier):
        kwargs = {"feature_cls": functools.partial(FeatureGetterNet, norm=True)} | kwargs
    kwargs = {key: value for key, value in _DENSE_DEFAULTS.items() if key in known} | kwargs
    kwargs |= {"features_only": True, "out_indices": tuple(out_indices)}

    if pretrained:
        body = loading.load(name, **kwargs)
    elif checkpoint is not None:
        body = _from_checkpoint(architecture, classifier, Path(checkpoint), kwargs)
    else:
        body = timm.create_model(architecture, **kwargs)
    if stride_in_1x1:
        _stride_in_1x1(body, architecture)
    if grad_checkpointing:
        (body.model if hasattr(body, "model") else body).set_grad_checkpointing()
    return synchronized(body, sync_bn), classifier


def _without_values(architecture: str, kwargs: dict[str, Any]) -> Any:
    """The classifier on the meta device."""
    with torch.device("meta"):
        return timm.create_model(architecture, **kwargs | ({"out_norm": False} if "out_norm" in kwargs else {}))


def synchronized(model: Model, sync_bn: bool) -> Model:
    """The model with SyncBatchNorm, if requested and a process group is initialized.

    Uses timm's conversion: PyTorch's drops the activations inside timm's norms.
    """
    up = distributed.is_available() and distributed.is_initialized()
    if not (sync_bn and up):
        return model
    converted: Any = convert_sync_batchnorm(model)
    return converted


def _stride_in_1x1(body: nn.Module, architecture: str) -> None:
    """Move the strides of a ResNet's blocks from their second convolution to the first, in place."""
    blocks = [m for m in body.modules() if isinstance(m, Bottleneck) and m.conv2.stride != (1, 1)]
    if not blocks:
        raise ValueError(f"stride_in_1x1 needs a ResNet with bottleneck blocks, not {architecture}")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _is_plain(classifier: Any) -> bool:
    """Whether all maps have one stride, and timm can apply the final norm to them."""
    one_stride = len({info["reduction"] for info in feature_info(classifier)}) == 1
    return one_stride and hasattr(classifier, "forward_intermediates")


def _indices(architecture: str, classifier: Any, strides: Sequence[int], upsampled: bool) -> list[int]:
    """timm's indices of the last map of each stride."""
    last = {info["reduction"]: i for i, info in enumerate(feature_info(classifier))}
    if upsampled:
        last = {power_of_two(stride): i for stride, i in last.items()}
        source = min((stride for stride in last if stride >= min(strides)), default=max(last))
        return [last[stride] for stride in sorted({source, *(last.keys() & set(strides))}) if stride >= source]
    if not set(strides) <= set(last):
        raise ValueError(
            f"{architecture} has maps at strides {', '.join(map(str, last))}, not at {', '.join(map(str, strides))}; "
            "choose among them with out_indices, or set upsample to make others"
        )
    return [last[stride] for stride in strides]


def fetched(name: str, cfg: PretrainedCfg) -> dict[str, Any]:
    """The tensors of a published file, from a cache or the network; errors as `download.fetch`."""
    return loading.read_weights(download.fetch(name, download.addresses(cfg)))


def _from_checkpoint(architecture: str, classifier: nn.Module, checkpoint: Path, kwargs: dict[str, Any]) -> nn.Module:
    """The feature network with the weights of a checkpoint; only the norms that it adds may be missing."""
    dense = read_dense_config(checkpoint)
    if dense is not None:
        return _from_dense(architecture, classifier, dense[0] / WEIGHTS, kwargs)
    beside_config = checkpoint.suffix == ".safetensors" and (checkpoint.parent / "config.json").is_file()
    statistics = {}  # normalization of the images that a folder's model was trained on
    if checkpoint.is_file() and not beside_config:
        file = checkpoint
    else:
        found = loading.resolve(checkpoint)
        if found.architecture != architecture:
            raise ValueError(f"{checkpoint} holds a {found.architecture}, not a {architecture}")
        file = loading.weights_file(found)
        trained = (found.config or {}).get("pretrained_cfg") or {}
        statistics = {key: tuple(trained[key]) for key in ("mean", "std") if key in trained}

    overlay = dict(source=None, file=None, custom_load=False, state_dict=loading.read_weights(file, architecture))
    body: Any
    with torch.random.fork_rng(devices=[]), _missing_keys() as missing:
        try:
            body = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{file} does not fit {architecture}: {error}") from error
    published, own = published_names(body, classifier), classifier.state_dict()
    if unset := [name for name in body.state_dict() if published[name] in missing & own.keys()]:
        raise ValueError(f"{file} does not fit {architecture}: {len(unset)} tensors are missing, {', '.join(unset)}")
    body.pretrained_cfg |= {"state_dict": None, "file": str(file), **statistics}  # do not keep the tensors twice
    return body


def _from_dense(architecture: str, classifier: nn.Module, file: Path, kwargs: dict[str, Any]) -> nn.Module:
    """The feature network of a detector or segmenter of this package; stages that it has no use for are left out."""
    body: Any = timm.create_model(architecture, **kwargs)
    own, published, known = body.state_dict(), published_names(body, classifier), classifier.state_dict()
    prefix = re.compile(r"^(detector\.)?backbone\.body\.")
    state = {
        prefix.sub("", name): x for name, x in migrate_state_dict(read_tensors(file)).items() if prefix.match(name)
    }
    wanted = [name for name in own if published[name] in known or name in state]
    try:
        check_fit({name: own[name] for name in wanted}, {name: x for name, x in state.items() if name in own})
    except ValueError as error:
        raise ValueError(f"{file} does not fit {architecture}: {error}") from None
    body.load_state_dict(state, strict=False)
    body.pretrained_cfg |= {"file": str(file)}
    return body


@contextmanager
def _missing_keys() -> Iterator[set[str]]:
    """Collect missing keys of any ``load_state_dict`` in this context, which timm logs but does not return."""
    missing: set[str] = set()
    handles = []

    def loaded(_: nn.Module, keys: Any) -> None:
        missing.update(keys.missing_keys)

    def registered(parent: nn.Module, *_: Any) -> None:
        handles.append(parent.register_load_state_dict_post_hook(loaded))

    handles.append(register_module_module_registration_hook(registered))
    try:
        yield missing
    finally:
        for handle in handles:
            handle.remove()
