"""Training, evaluation and prediction by recipes. The names below are imported when they are used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .prediction import Prediction, predict
    from .run import train
    from .task import Result

__all__ = ["Prediction", "Result", "evaluate", "predict", "train"]

_MODULES = {
    "evaluate": "evaluation",
    "Prediction": "prediction",
    "predict": "prediction",
    "Result": "task",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
