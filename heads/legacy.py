"""Compatibility with names, arguments and files of the previous release. To be removed in the next release."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

# old and new prefixes of parameter names: in detectors, in segmenters, in MMDetection's models
_KEYS = (
    ("detector.backbone.features.network.", "detector.backbone.body."),
    ("features.network.", "backbone.body."),
    ("backbone.network.", "backbone.body."),
)


def migrate_state_dict(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The same tensors in the same order under the new names.

    Args:
        prefix: before the names of the model's parameters.
    """
    migrated = {}
    for name, tensor in state_dict.items():
        old, new = next(((prefix + old, prefix + new) for old, new in _KEYS if name.startswith(prefix + old)), ("", ""))
        migrated[new + name.removeprefix(old)] = tensor
    if old_names := state_dict.keys() - migrated.keys():
        _warn(f"parameter names of an earlier version ({min(old_names)}); save the model again to update them", 4)
    return migrated


def migrate_in_place(state_dict: dict[str, Any], prefix: str = "") -> None:
    """`migrate_state_dict` for a module's ``_load_from_state_dict``."""
    migrated = migrate_state_dict(state_dict, prefix)
    state_dict.clear()
    state_dict.update(migrated)


def migrate_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A builder's arguments from config.json under the new names."""
    return {"name" if key == "backbone" else key: value for key, value in arguments.items()}


def migrate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a dense model's folder with the new names."""
    migrated = dict(config)
    if isinstance(config.get("arguments"), Mapping):
        migrated["arguments"] = migrate_arguments(config["arguments"])
    preprocessing = config.get("preprocessing")
    inference = preprocessing.get("inference") if isinstance(preprocessing, Mapping) else None
    if isinstance(inference, Mapping):
        migrated["preprocessing"] = {**preprocessing, "inference": migrate_inference(inference)}
    return migrated


INFERENCE = {"bounds": "scale", "multiple_of": "size_divisor", "window": "crop_size", "scales": "ratios"}


def migrate_inference(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `probabilities` from config.json under the new names."""
    return {INFERENCE.get(key, key): value for key, value in arguments.items()}


def old_arguments(**names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that accepts old keyword arguments (``old="new"``) with a warning."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    _warn(f"{function.__name__}: the argument {old} is now {new}", stacklevel=3)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that have moved.

    Args:
        module: their old module.
        names: ``package.module:name`` by old name, relative to `foveal.heads`.
    """

    def getattribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].partition(":")
        _warn(f"{module}.{name} is deprecated, use {new} of foveal.heads.{place}", stacklevel=3)
        return getattr(importlib.import_module(f".{place}", __package__), new)

    return getattribute


def _warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
