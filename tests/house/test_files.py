"""`foveal.files`: a file is complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from foveal.files import atomic


def test_the_file_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with atomic(path) as new:
        new.write_text("new")
        assert new.parent == tmp_path and new.suffix == ".json" and not path.exists()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("scores.json", "new")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    with pytest.raises(error), atomic(path) as new:
        new.write_text("half")
        raise error
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("scores.json", "old")]


def test_a_failed_rename_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), atomic(tmp_path / "folder") as new:
        new.write_text("text")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_two_writers_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as first, atomic(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "first"
