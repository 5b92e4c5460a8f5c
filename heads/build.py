"""Dense models by the names of their parts. The only file here that imports the backbones."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import convert_sync_batchnorm
from timm.models.resnet import Bottleneck
from torch import distributed, nn

from ..backbones import list_models, loading
from .detection import HEADS, Detector, Pyramid
from .features import Features, FeatureSpec
from .necks import NECKS, build_neck
from .segmentation import FCN, Mask2Former, Segmenter, SemanticFPN, UPerNet

Dense = Detector | Segmenter | Mask2Former
Model = TypeVar("Model", bound=nn.Module)

# What lets a backbone take images of any size and gives each map its norm, where its class knows the argument.
_DENSE_DEFAULTS = dict(out_norm=True, strict_img_size=False, dynamic_img_size=True)


def build_features(
    backbone: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    in_chans: int = 3,
    strides: Sequence[int] = (4, 8, 16, 32),
    out_indices: Sequence[int] | None = None,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    sync_bn: bool = False,
    drop_path_rate: float | None = None,
    grad_checkpointing: bool = False,
    stride_in_1x1: bool = False,
    **kwargs: Any,
) -> Features:
    """The feature maps of any foveal or timm model.

    Args:
        backbone: a model's name, with or without the tag of its weights.
        pretrained: start from the published weights.
        checkpoint: start from these weights instead: a folder that ``foveal train classify`` wrote, a model folder as
            timm writes it, or a file in any key format of the model's family (classification or dense).
        in_chans: channels of the images.
        strides: of the maps; of several with one stride the last is taken.
        out_indices: the maps by timm's indices instead, for models without those strides (plain transformers).
        frozen_stages: see `Features`.
        norm_eval: see `Features`.
        sync_bn: BatchNorms share their statistics between processes, if a process group is up. Without one they are
            the usual ones, so that the same arguments build the model for one device.
        drop_path_rate: stochastic depth; None: the model's default.
        grad_checkpointing: recompute the blocks in the backward pass instead of keeping their activations.
        stride_in_1x1: the blocks of a ResNet stride in their first convolution, as those of its paper (arXiv
            1512.03385), whose weights detectron2 starts from; timm's in their second.
        kwargs: passed to `timm.create_model`. Where the model's class knows them, ``out_norm=True`` (a new norm per
            map, as the published dense NAT, DiNAT and OverLoCK have them) and free image sizes are the default.

    Raises:
        ValueError: if the name, the strides or the weights do not fit; the message names them. That includes a
            checkpoint that leaves any parameter unset but the new norms.
        OSError: if published weights cannot be fetched.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_features
        >>> features = build_features("test_foveal_dinat", strides=(8, 16, 32), frozen_stages=1)
        >>> features.spec
        FeatureSpec(channels=(32, 64, 128), strides=(8, 16, 32))
        >>> [tuple(each.shape) for each in features(torch.randn(1, 3, 64, 96))]
        [(1, 32, 8, 12), (1, 64, 4, 6), (1, 128, 2, 3)]
    """
    if pretrained and checkpoint is not None:
        raise ValueError(f"pretrained=True and checkpoint={str(checkpoint)!r}: start from one of them")
    architecture = loading.resolve(backbone).architecture
    kwargs = {"in_chans": in_chans, **kwargs}
    if drop_path_rate is not None:
        kwargs["drop_path_rate"] = drop_path_rate
    network: Any
    with torch.device("meta"):
        whole = timm.create_model(architecture, **{**kwargs, "out_norm": False} if "out_norm" in kwargs else kwargs)
    known = inspect.signature(type(whole).__init__).parameters
    dense = {name: value for name, value in _DENSE_DEFAULTS.items() if name in known}
    if out_indices is None:
        out_indices = _indices(architecture, whole, strides)
    kwargs = {**dense, **kwargs, "features_only": True, "out_indices": tuple(out_indices)}

    if pretrained:
        network = loading.load(backbone, **kwargs)
    elif checkpoint is not None:
        network = _from_checkpoint(architecture, Path(checkpoint), kwargs)
    else:
        network = timm.create_model(architecture, **kwargs)
    if stride_in_1x1:
        _stride_in_1x1(network, architecture)
    if grad_checkpointing:
        (network.model if hasattr(network, "model") else network).set_grad_checkpointing()
    network = _synchronized(network, sync_bn)
    return Features(network, whole, frozen_stages=frozen_stages, norm_eval=norm_eval)


def _synchronized(model: Model, wanted: bool) -> Model:
    """The model with synchronized BatchNorms, if wanted and a process group is up; not twice on the same one.

    By timm's conversion: PyTorch's drops the activations that timm's norms hold.
    """
    up = distributed.is_available() and distributed.is_initialized()
    if not (wanted and up):
        return model
    converted: Any = convert_sync_batchnorm(model)
    return converted


def _stride_in_1x1(network: nn.Module, architecture: str) -> None:
    """Move the strides of a ResNet's blocks from their second convolution to the first, in place."""
    blocks = [m for m in network.modules() if isinstance(m, Bottleneck) and m.conv2.stride != (1, 1)]
    if not blocks:
        raise ValueError(f"stride_in_1x1 is for ResNets with blocks of three convolutions, not for {architecture}")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _indices(architecture: str, whole: Any, strides: Sequence[int]) -> list[int]:
    """timm's indices of the last map of each stride."""
    last = {info["reduction"]: i for i, info in enumerate(getattr(whole.feature_info, "info", whole.feature_info))}
    if not set(strides) <= set(last):
        raise ValueError(
            f"{architecture} has maps at strides {', '.join(map(str, last))}, not at {', '.join(map(str, strides))}; "
            "choose among them with out_indices"
        )
    return [last[stride] for stride in strides]


def _from_checkpoint(architecture: str, checkpoint: Path, kwargs: dict[str, Any]) -> nn.Module:
    """The network with the weights of a checkpoint, every one of them but the new norms."""
    beside_config = checkpoint.suffix == ".safetensors" and (checkpoint.parent / "config.json").is_file()
    statistics = {}  # of the images that a folder's model was trained on
    if checkpoint.is_file() and not beside_config:
        file = checkpoint
    else:
        found = loading.resolve(checkpoint)
        if found.architecture != architecture:
            raise ValueError(f"{checkpoint} holds a {found.architecture}, not a {architecture}")
        file = loading.weights_file(found)
        trained = (found.config or {}).get("pretrained_cfg") or {}
        statistics = {key: tuple(trained[key]) for key in ("mean", "std") if key in trained}

    def load(state_dict: dict[str, Any]) -> nn.Module:
        network: Any
        overlay = dict(source=None, file=None, custom_load=False, state_dict=state_dict)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                network = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{file} does not fit {architecture}: {error}") from error
        network.pretrained_cfg |= {"state_dict": None, "file": str(file), **statistics}  # not the tensors twice
        return network

    state_dict = loading.read_weights(file)
    network = load(dict(state_dict))
    if architecture not in list_models():
        # Where this package's families check the names, timm's leave what is missing as initialized, without a word.
        # Whatever does not follow a change of the checkpoint did not come from it.
        shifted = {k: v + 1 if torch.is_tensor(v) and v.is_floating_point() else v for k, v in state_dict.items()}
        other = load(shifted).state_dict()
        floating = {k: v for k, v in network.state_dict().items() if v.is_floating_point() and v.numel()}
        if unset := [name for name, value in floating.items() if torch.equal(value, other[name])]:
            raise ValueError(
                f"{file} does not fit {architecture}: it lacks {len(unset)} of its tensors, {', '.join(unset)}"
            )
    return network


def build_detector(
    backbone: str,
    head: str = "mask_rcnn",
    neck: str = "fpn",
    *,
    num_classes: int,
    min_size: int = 800,
    max_size: int = 1333,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    strides: Sequence[int] | None = None,
    neck_kwargs: Mapping[str, Any] | None = None,
    head_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    sync_bn: bool = False,
    **kwargs: Any,
) -> Detector:
    """A detector, torchvision's or Mask2Former, on any foveal or timm backbone.

    Args:
        backbone: a model's name.
        head: a key of `detection.HEADS`; ``"mask2former"`` needs transformers.
        neck: ``"fpn"`` or ``"a3fpn"``. Mask2Former has its own pixel decoder, with an FPN in it or A3-FPN.
        num_classes: of objects; they are numbered from 0, and the background is none of them.
        min_size: pixels that the short side of an image is brought to in evaluation,
        max_size: unless the long one came to more than this.
        mean: of images in [0, 1], by channel; None: what the backbone was trained with.
        std: likewise.
        strides: of the maps that the neck is given. None: 4 to 32, or for RetinaNet and FCOS, which use maps from 8 on,
            8 to 32 with an FPN.
        neck_kwargs: see `necks`.
        head_kwargs: see `detection.HEADS`.
        pretrained: the backbone's weights, see `build_features`.
        checkpoint: likewise.
        sync_bn: BatchNorms of the whole detector share their statistics between processes, if a process group is up.
        kwargs: of `build_features`: ``frozen_stages``, ``norm_eval``, ``drop_path_rate``, ``in_chans``, the backbone's
            own, ...

    Raises:
        ValueError: if a name or an argument does not fit; the message names it.
        ImportError: ``mask2former`` without transformers.
        OSError: if published weights cannot be fetched.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_detector
        >>> detector = build_detector("test_foveal_dinat", "fcos", num_classes=5, min_size=64, max_size=96).eval()
        >>> with torch.no_grad():
        ...     (found,) = detector([torch.rand(3, 60, 80)])  # float in [0, 1], of any size
        >>> sorted(found), found["boxes"].shape[1]  # corners in pixels
        (['boxes', 'labels', 'scores'], 4)
    """
    arguments = {
        **dict(backbone=backbone, head=head, neck=neck, num_classes=num_classes, min_size=min_size, max_size=max_size),
        **dict(strides=strides, neck_kwargs=dict(neck_kwargs or {}), head_kwargs=dict(head_kwargs or {}), **kwargs),
    }
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; there are {', '.join(HEADS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, must be at least 1")
    dense = head in ("retinanet", "fcos")
    shape: dict[str, Any] = {"extra_levels": "p6p7" if dense else "pool"}
    if strides is None:
        strides = (4, 8, 16, 32)
        if dense and neck == "fpn":
            strides = (8, 16, 32)
        elif dense:  # A3-FPN reads the finest map too, and gives none of that stride
            shape["start_level"] = 1
    features = build_features(backbone, pretrained=pretrained, checkpoint=checkpoint, strides=strides, **kwargs)
    between, more = None, dict(head_kwargs or {})
    if head == "mask2former":
        more |= _pixel_decoder(neck, dict(neck_kwargs or {}), more)
    else:
        try:
            between = build_neck(neck, features.spec, **{**shape, **(neck_kwargs or {})})
        except TypeError as error:
            raise ValueError(f"neck {neck} with {dict(neck_kwargs or {})}: {error}") from None
    mean, std = (_statistics(name, given, features, kwargs) for name, given in (("mean", mean), ("std", std)))
    model = Detector(
        head,
        Pyramid(features, between),
        num_classes,
        min_size=min_size,
        max_size=max_size,
        mean=mean,
        std=std,
        head_kwargs=more,
    )
    model = _synchronized(model, sync_bn)
    model.arguments = arguments | {"mean": list(mean), "std": list(std)}
    return model


SEGMENTATION_HEADS = ("upernet", "semantic_fpn", "mask2former")


def build_segmenter(
    backbone: str,
    head: str = "upernet",
    neck: str = "fpn",
    *,
    num_classes: int,
    auxiliary: bool = True,
    size_divisor: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    neck_kwargs: Mapping[str, Any] | None = None,
    head_kwargs: Mapping[str, Any] | None = None,
    auxiliary_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    sync_bn: bool = False,
    **kwargs: Any,
) -> Segmenter | Mask2Former:
    """A semantic segmenter on any foveal or timm backbone: float images in [0, 1] to logits of their size.

    Args:
        backbone: a model's name.
        head: ``"upernet"``, ``"semantic_fpn"``, or ``"mask2former"`` (needs transformers).
        neck: ``"fpn"`` or ``"a3fpn"``. UPerNet with ``"fpn"`` has its own top-down path; with ``"a3fpn"`` the pooled
            last map and the finer ones go through A3-FPN, as published bottom up, at the head's width. Mask2Former
            has its own pixel decoder, with an FPN in it or A3-FPN.
        auxiliary: UPerNet: an FCN head on the third map, whose logits are the second answer in training.
        size_divisor: see `Segmenter`.
        mean: of images in [0, 1], by channel; None: what the backbone was trained with.
        std: likewise.
        neck_kwargs: settings of the neck.
        head_kwargs: of `UPerNet`, `SemanticFPN` or `Mask2Former`.
        auxiliary_kwargs: of `FCN`, not read where there is no auxiliary head.
        pretrained: the backbone's weights, see `build_features`.
        checkpoint: likewise.
        sync_bn: BatchNorms of the whole segmenter share their statistics between processes, if a process group is up.
        kwargs: of `build_features`: ``frozen_stages``, ``norm_eval``, ``drop_path_rate``, ``in_chans``, the backbone's
            own, ...

    Raises:
        ValueError: if a name or an argument does not fit; the message names it.
        ImportError: ``mask2former`` without transformers.
        OSError: if published weights cannot be fetched.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_segmenter
        >>> segmenter = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=5).eval()
        >>> segmenter(torch.rand(1, 3, 50, 70)).shape
        torch.Size([1, 5, 50, 70])
    """
    settings = [dict(each or {}) for each in (neck_kwargs, head_kwargs, auxiliary_kwargs)]
    arguments = {
        **dict(backbone=backbone, head=head, neck=neck, num_classes=num_classes, auxiliary=auxiliary),
        **dict(size_divisor=size_divisor),
        **dict(zip(("neck_kwargs", "head_kwargs", "auxiliary_kwargs"), settings, strict=True)),
        **kwargs,
    }
    if head not in SEGMENTATION_HEADS:
        raise ValueError(f"unknown head {head!r}; there are {', '.join(SEGMENTATION_HEADS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, must be at least 1")
    features = build_features(backbone, pretrained=pretrained, checkpoint=checkpoint, **kwargs)
    mean, std = (_statistics(name, given, features, kwargs) for name, given in (("mean", mean), ("std", std)))
    around: dict[str, Any] = dict(mean=mean, std=std, size_divisor=size_divisor)
    model: Segmenter | Mask2Former
    if head == "mask2former":
        if auxiliary_kwargs:
            raise ValueError(f"mask2former has no auxiliary head; given are auxiliary_kwargs={settings[2]}")
        model = Mask2Former(features, num_classes, **around, **_pixel_decoder(neck, *settings[:2]), **settings[1])
    else:
        try:
            decoder, extra = _segmentation_heads(features.spec, head, neck, num_classes, auxiliary, *settings)
        except TypeError as error:
            raise ValueError(f"{head} with neck {neck}: {error}") from None
        model = Segmenter(features, decoder, extra, **around)
    model = _synchronized(model, sync_bn)
    model.arguments = arguments | {"mean": list(mean), "std": list(std)}
    return model


def _pixel_decoder(neck: str, settings: dict[str, Any], head_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What Mask2Former is told of the pyramid in its pixel decoder."""
    if neck not in NECKS:
        raise ValueError(f"unknown neck {neck!r}; there are {', '.join(NECKS)}")
    if "a3fpn" in head_kwargs:
        raise ValueError(f"neck='a3fpn' and neck_kwargs set A3-FPN, not head_kwargs with a3fpn={head_kwargs['a3fpn']}")
    if neck == "a3fpn":
        return {"a3fpn": settings}
    if settings:
        raise ValueError(f"the FPN in the pixel decoder of mask2former has no settings, given are {settings}")
    return {}


def _segmentation_heads(
    spec: FeatureSpec,
    head: str,
    neck: str,
    num_classes: int,
    auxiliary: bool,
    neck_kwargs: dict[str, Any],
    head_kwargs: dict[str, Any],
    auxiliary_kwargs: dict[str, Any],
) -> tuple[nn.Module, nn.Module | None]:
    if head == "semantic_fpn":
        return SemanticFPN(build_neck(neck, spec, **neck_kwargs), num_classes, **head_kwargs), None
    make: Callable[[FeatureSpec], nn.Module] | None = None
    if neck != "fpn":
        own: dict[str, Any] = {"out_channels": head_kwargs.get("channels", 512)}
        if neck == "a3fpn":  # as in the released segmentor; its last map comes narrow from the pooling
            own |= dict(direction="bottom_up", updated_first=True)
            own["squeeze"] = [*(min(2**i, 4) for i in range(len(spec) - 1)), 1]
        make = lambda pooled: build_neck(neck, pooled, **own | neck_kwargs)  # noqa: E731
    elif neck_kwargs:
        raise ValueError(f"the top-down path of upernet has no settings, given are neck_kwargs={neck_kwargs}")
    decoder = UPerNet(spec, num_classes, neck=make, **head_kwargs)
    if not auxiliary:
        return decoder, None
    level = auxiliary_kwargs.get("level", 2)
    if not 0 <= level < len(spec):
        raise ValueError(f"the auxiliary head is to read map {level}, the backbone gives {len(spec)} from 0 on")
    return decoder, FCN(spec.channels[level], num_classes, **auxiliary_kwargs)


def _statistics(
    name: str, given: Sequence[float] | None, features: Features, kwargs: Mapping[str, Any]
) -> tuple[float, ...]:
    """``"mean"`` or ``"std"`` by channel, as given or the backbone's; for grey images of a colour backbone the mean of
    its three, as timm sums its first filters."""
    channels = kwargs.get("in_chans", 3)
    if given is None:
        own = getattr(features, name)
        return own if len(own) == channels else (sum(own) / len(own),) * channels
    if len(given) != channels:
        raise ValueError(f"{name} has {len(given)} values, the images have {channels} channels: {list(given)}")
    return tuple(given)


_BUILDERS: dict[str, Callable[..., Dense]] = {"detect": build_detector, "segment": build_segmenter}
_FORMAT, _WEIGHTS = "foveal-dense", "model.safetensors"


def build_dense(task: str, arguments: Mapping[str, Any]) -> Dense:
    """The model of ``"detect"`` or ``"segment"`` with these arguments of its builder.

    Examples:
        >>> from foveal.heads.build import build_dense, build_segmenter
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=5)
        >>> type(build_dense("segment", model.arguments)).__name__
        'Segmenter'
    """
    return _BUILDERS[task](**arguments)


def _foldable(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost modules, by name, that can fold what only training needs."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if hasattr(module, "reparameterize") and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return found


def reparameterize(model: Model) -> Model:
    """Fold the branches and norms of backbone, neck and heads that only training needs, in place, for inference.

    The outputs are those of evaluation mode up to rounding. `save_dense` and `load_dense` keep this form.

    Returns:
        The model itself.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_segmenter, reparameterize
        >>> model = build_segmenter("test_foveal_care", "semantic_fpn", num_classes=5).eval()
        >>> image = torch.rand(1, 3, 64, 64)
        >>> before = model(image)
        >>> torch.allclose(reparameterize(model)(image), before, atol=1e-4)
        True
    """
    for _, module in _foldable(model):
        module.reparameterize()
    return model


def save_dense(
    folder: str | Path,
    model: Dense,
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    **more: Any,
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` of a detector or segmenter into ``folder``, for `load_dense`.

    Args:
        model: of `build_detector` or `build_segmenter`.
        classes: their names by index.
        preprocessing: what a reader should know of the images; the model does it all itself.
        more: further entries of config.json.

    Raises:
        ValueError: a model that was put together otherwise, which could not be built again; or not one name for each of
            its classes.

    Examples:
        >>> from foveal.heads.build import build_segmenter, save_dense
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=2)
        >>> save_dense("folder", model, ["cat", "dog"], {"in_chans": 3})
        >>> import foveal
        >>> foveal.load("folder").classes
        ['cat', 'dog']
    """
    if not model.arguments:
        raise ValueError(
            f"this {type(model).__name__} is not of build_detector or build_segmenter: it has no arguments"
        )
    if len(classes) != model.arguments["num_classes"]:
        raise ValueError(f"{len(classes)} class names for a model of {model.arguments['num_classes']} classes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": _FORMAT,
        "task": "detect" if isinstance(model, Detector) else "segment",
        "arguments": model.arguments,
        "classes": list(classes),
        "preprocessing": dict(preprocessing),
    }
    text = json.dumps(config | more, indent=2) + "\n"
    temporary = folder / f"{_WEIGHTS}.tmp"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / _WEIGHTS)
    temporary = folder / "config.json.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / "config.json")


def read_dense_config(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder that holds the model (for a run: its ``best/``) and its config.json; None where there is no dense one.

    Raises:
        ValueError: if config.json is no JSON.

    Examples:
        >>> from foveal.heads.build import build_segmenter, read_dense_config, save_dense
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=2)
        >>> save_dense("folder", model, ["cat", "dog"], {"in_chans": 3})
        >>> found = read_dense_config("folder")
        >>> found is not None and found[1]["task"]
        'segment'
    """
    folder = Path(folder)
    # a run writes best/ anew and renames it; killed between its two renames, it leaves the last one as best.old/
    for candidate in (folder / "best", folder / "best.old", folder):
        file = candidate / "config.json"
        if file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} is not JSON: {error}") from None
            is_dense = isinstance(config, dict) and config.get("format") == _FORMAT
            return (candidate, config) if is_dense else None
    return None


def load_dense(folder: str | Path, file: Path | None = None) -> Dense:
    """Loads what `save_dense` wrote, or a run's ``best/``, in evaluation mode; with the weights of another file of that
    folder, if one is given.

    The model has ``classes`` (names by index) and ``config`` (all of config.json).

    Raises:
        ValueError: the folder holds no dense model, or its parts do not fit each other.

    Examples:
        >>> from foveal.heads.build import build_segmenter, load_dense, save_dense
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=2)
        >>> save_dense("folder", model, ["cat", "dog"], {"in_chans": 3})
        >>> load_dense("folder").config["arguments"]["head"]
        'semantic_fpn'
    """
    found = read_dense_config(folder)
    if found is None:
        raise ValueError(f"{folder} holds no detector or segmenter: no config.json with format {_FORMAT!r}")
    folder, config = found
    if config.get("task") not in _BUILDERS:
        raise ValueError(f"{folder}/config.json: task is {config.get('task')!r}, known are {', '.join(_BUILDERS)}")
    missing = {"arguments", "classes", "preprocessing"} - set(config)
    if missing:
        raise ValueError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
    try:
        model = build_dense(config["task"], config["arguments"])
        tensors = safetensors.torch.load_file(file or folder / _WEIGHTS)
        for name, module in _foldable(model):
            stored = {key for key in tensors if key.startswith(f"{name}.")}
            if stored != {f"{name}.{key}" for key in module.state_dict()}:
                module.reparameterize()  # as it was when it was saved, or nothing fits
        model.load_state_dict(tensors)
    except (TypeError, FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder} can't be loaded: {error}") from error
    model.classes, model.config = config["classes"], config
    return model.eval()
