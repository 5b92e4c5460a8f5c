"""Data for training: folders and shards of image files, IDX files, and the bundled digits."""

from .factory import Data, Loader, build_data, find_classes
from .guard import BadSamples, DataError

__all__ = ["BadSamples", "Data", "DataError", "Loader", "build_data", "find_classes"]
