"""Errors of data, and reports of unusable samples."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...files import atomic


class DataError(ValueError):
    """Data cannot be used; the message is meant for the user."""


def printable(name: str) -> str:
    """A printable file name: bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass
class Report:
    """Entries that a reader skipped or changed: rows of (sample, entry, reason).

    Args:
        source: the file that was read.
        notes: what concerns many entries.
    """

    source: str
    rows: list[tuple[str, Any, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Rows by reason, most frequent first."""
        return dict(Counter(reason for *_, reason in self.rows).most_common())

    def __str__(self) -> str:
        """Counts and first samples in one line; empty if everything was used."""
        parts = [*self.notes]
        for reason, count in self.counts().items():
            names = [sample for sample, _, why in self.rows if why == reason][:3]
            parts.append(f"{count:,} x {reason} ({', '.join(names)}{', ...' if count > 3 else ''})")
        return f"{self.source}: {'; '.join(parts)}" if parts else ""


class BadSamples:
    """Counts the unreadable samples of each epoch, stores names and reasons, and raises if there are too many.

    In training an unreadable sample is replaced by the next readable one; in evaluation it is skipped (see ``n``).

    Args:
        limit: allowed fraction of unreadable samples per epoch.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.names: dict[str, str] = {}  # name -> reason, of the whole run
        self.reports: list[Report] = []  # of the annotation files
        self._epoch: set[str] = set()
        self._size = 1

    def start(self, size: int) -> None:
        """Start a pass over ``size`` samples."""
        self._epoch, self._size = set(), size

    def add(self, found: Iterable[tuple[str, str]]) -> None:
        """Add (name, reason) pairs.

        Raises:
            DataError: more than ``limit`` of this pass are unreadable; the message names the first ones.
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
        """Add the names from another process."""
        self.names.update(names)

    def read(self, path: Path) -> None:
        """Add the rows of a file of :meth:`write`, if it exists."""
        if path.exists():
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                self.names.update({row["sample"]: row["reason"] for row in csv.DictReader(file)})

    def write(self, path: Path) -> None:
        """Write the unreadable samples to ``path``, and the unusable annotations to ``bad_annotations.csv`` in the same
        folder; no file for an empty list."""
        _write_csv(path, ("sample", "reason"), sorted(self.names.items()))
        rows = [(report.source, *row) for report in self.reports for row in report.rows]
        _write_csv(path.with_name("bad_annotations.csv"), ("file", "image", "annotation", "reason"), rows)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if not rows:
        return
    with atomic(path) as new, new.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


class Excluded:
    """Names of samples to exclude, from a ``bad_samples.csv`` (its first column) or a list with one name per line.

    A name is a path, or ``SHARD:KEY`` for shards, as in reports or relative to the data folder.
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
        """Whether one of a sample's ``names`` is excluded; counts excluded samples."""
        found = any(name in self.names for name in names)
        self.count += found
        return found

    def note(self) -> str:
        return f"data.exclude: {self.count:,} samples left out, of {len(self.names):,} that are named"


def check_labels(targets: torch.Tensor, num_classes: int, where: str) -> None:
    """Raises:
    DataError: a label lies outside ``[0, num_classes)``.
    """
    if targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"{where}: label {low if low < 0 else high} is outside 0..{num_classes - 1}")


def check_classes(classes: Sequence[str], where: str) -> list[str]:
    """The classes as a list.

    Raises:
        DataError: a class name is given twice, or there are fewer than two classes.
    """
    twice = sorted(name for name, count in Counter(classes).items() if count > 1)
    if twice:
        raise DataError(f"{where}: class names given more than once: {', '.join(twice[:5])}")
    if len(classes) < 2:
        raise DataError(f"{where}: a classification needs at least two classes, found {list(classes)}")
    return list(classes)
