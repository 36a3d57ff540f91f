"""The maps of the rooms, engine/README.md, ci/README.md and CONTRIBUTING.md, name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import source_rules


def named(text: str) -> list[str]:
    """The files and folders that a text names in code's quotes."""
    return re.findall(r"`([\w/]+(?:\.py|/))`", text)


@pytest.mark.parametrize(("package", "least"), [("engine", 40), ("ci", 25)])
def test_the_files_of_the_map_exist(repo_root: Path, package: str, least: int) -> None:
    folders = (repo_root / package, repo_root)
    names = named((repo_root / package / "README.md").read_text())
    missing = [name for name in names if not any((p / name).exists() for p in folders)]
    assert len(names) > least
    assert not missing, missing


@pytest.mark.parametrize("package", ["engine", "ci"])
def test_each_room_has_a_line(repo_root: Path, package: str) -> None:
    names = named((repo_root / package / "README.md").read_text())
    assert {f"{room}/" for room in source_rules.FOLDERS[package]} <= set(names)
    table = named((repo_root / "CONTRIBUTING.md").read_text())
    assert {f"ci/{room}/" for room in source_rules.FOLDERS["ci"]} <= set(table)


def test_a_file_that_is_gone_would_be_found() -> None:
    assert named("`data/order.py`, `Checkpoint` and `ranks/`") == ["data/order.py", "ranks/"]


def test_no_two_files_of_tests_have_one_name(repo_root: Path) -> None:
    """Else pytest takes one for the other where both are collected, and refuses it."""
    names = [file.name for file in (repo_root / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
