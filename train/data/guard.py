"""What can be wrong with data: the error that users see, and the book of images that could not be read."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch


class DataError(ValueError):
    """Data that cannot be used; the message is meant for the user."""


def printable(name: str) -> str:
    """A file name as a terminal takes it: what is not UTF-8 is written out."""
    return name.encode("utf-8", "backslashreplace").decode()


class BadSamples:
    """Counts the unreadable images of each epoch, keeps their names and reasons, and says when there are too many.

    An image that cannot be decoded is skipped: the next readable one takes its place in training, and the evaluation
    goes without it (its ``n`` says so).

    Args:
        limit: share of an epoch's images beyond which reading stops.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.names: dict[str, str] = {}  # name -> reason, of the whole run
        self._epoch: set[str] = set()
        self._size = 1

    def start(self, size: int) -> None:
        """Begins a pass over ``size`` images."""
        self._epoch, self._size = set(), size

    def add(self, found: Iterable[tuple[str, str]]) -> None:
        """Books (name, reason) pairs.

        Raises:
            DataError: more than ``limit`` of this pass could not be read; names the first of them.
        """
        for name, reason in found:
            self.names[name] = reason
            self._epoch.add(name)
        if len(self._epoch) > self.limit * self._size:
            first = printable("; ".join(f"{name} ({self.names[name]})" for name in sorted(self._epoch)[:5]))
            raise DataError(
                f"{len(self._epoch)} of {self._size} images could not be read, more than the allowed "
                f"{self.limit:.2%} (data.max_bad_fraction): {first}{'; ...' if len(self._epoch) > 5 else ''}"
            )

    def merge(self, names: dict[str, str]) -> None:
        """Takes over the names found by another process."""
        self.names.update(names)

    def read(self, path: Path) -> None:
        """Takes over what :meth:`write` wrote, if it is there."""
        if path.exists():
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                self.names.update({row["sample"]: row["reason"] for row in csv.DictReader(file)})

    def write(self, path: Path) -> None:
        """Writes name and reason of every unreadable image of the run; nothing when all were readable."""
        if not self.names:
            return
        temporary = Path(f"{path}.tmp")
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # any file name
            writer = csv.writer(file)
            writer.writerow(["sample", "reason"])
            writer.writerows(sorted(self.names.items()))
        os.replace(temporary, path)


class Excluded:
    """Names of samples to leave out, from a ``bad_samples.csv`` (its first column) or a list with a name on each line.

    A name is a path, or for shards ``SHARD:KEY``, as reports have it or relative to the folder of the data.
    """

    def __init__(self, names: Iterable[str] = ()):
        self.names = frozenset(names)
        self.count = 0  # left out so far

    @classmethod
    def read(cls, path: str | Path | None) -> "Excluded":
        """Raises:
        DataError: the file can't be read, or names nothing.
        """
        if path is None:
            return cls()
        try:
            with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = [row[0] for row in csv.reader(file) if row]
        except (OSError, csv.Error) as error:
            raise DataError(f"data.exclude={path} can't be read: {error}") from None
        names = rows[1:] if rows[:1] == ["sample"] else rows
        if not names:
            raise DataError(f"data.exclude={path} names no sample")
        return cls(names)

    def __bool__(self) -> bool:
        return bool(self.names)

    def holds(self, *names: str) -> bool:
        """Whether one of a sample's ``names`` is to be left out; counts those that are."""
        found = any(name in self.names for name in names)
        self.count += found
        return found

    def note(self) -> str:
        return f"data.exclude: {self.count:,} samples left out, of {len(self.names):,} that are named"


NOTHING = Excluded()


def check_labels(targets: torch.Tensor, num_classes: int, where: str) -> None:
    """Raises:
    DataError: a label lies outside ``[0, num_classes)``.
    """
    if targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"{where}: label {low if low < 0 else high} is outside 0..{num_classes - 1}")


def check_classes(classes: Sequence[str], where: str) -> None:
    """Raises:
    DataError: a class name is given twice, or there are fewer than two classes.
    """
    twice = sorted(name for name, count in Counter(classes).items() if count > 1)
    if twice:
        raise DataError(f"{where}: class names given more than once: {', '.join(twice[:5])}")
    if len(classes) < 2:
        raise DataError(f"{where}: a classification needs at least two classes, found {list(classes)}")
