"""The manual's lists are the source's: commands, options, variables, messages of a resume."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import doc_commands
import pytest

# Variables by which the command line speaks to its own processes, and a script of one machine's.
INTERNAL = {"CROSSTRAIN_APEX", "CROSSTRAIN_CELL", "CROSSTRAIN_PYTEST_WORLD"}

# What a resume says through these is on the page of messages.
TOLD = {
    "ResumeError",
    "ResumeWarning",
    "CheckpointMismatch",
    "CheckpointBusy",
    "CheckpointNotFound",
}
# Files whose ValueErrors and RuntimeErrors are those of a resume as well.
OF_A_RESUME = ("exact/rank_states.py", "exact/snapshot.py", "checkpoints/resumable.py")
# What only says which rank or file it is about, or is a mistake in a call and no resume's.
NOT_OF_A_RESUME = (
    "There is no folder",
    "cannot be read as a folder",
    "\0: \0. Nothing was loaded",
    " to its end",
    "has a 'trainer' of type",
    "There is no checkpoint",
)


def test_commands_are_those_of_the_parsers() -> None:
    assert doc_commands.PAGE.read_text() == doc_commands.written(), (
        "docs/commands.md is old: python tests/support/doc_commands.py"
    )


def test_every_environment_variable_is_listed(repo_root: Path) -> None:
    sources = [
        path
        for package in ("engine", "backends", "ci")
        for path in (repo_root / package).rglob("*.py")
        if "typing" not in path.parts
    ]
    found = {
        name for path in sources for name in re.findall(r"CROSSTRAIN_[A-Z_]+", path.read_text())
    }
    page = doc_commands.PAGE.read_text()
    assert sorted(name for name in found - INTERNAL if f"`{name}`" not in page) == []


def literal(node: ast.AST) -> Iterator[str]:
    """The constant pieces of a message; what stands between them is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from literal(value) if isinstance(value, ast.Constant) else ["\0"]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from literal(node.left)
        yield from literal(node.right)
    else:
        yield "\0"


def name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def messages(path: Path, classes: set[str]) -> Iterator[str]:
    """What is raised or warned of in a file by these classes, with NUL for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        told = {name_of(node.func), *(name_of(argument) for argument in node.args[1:])}
        if told & (classes | {"differs"}):
            text = "".join(literal(node.args[0]))
            if len(text.replace("\0", "").strip()) > 15:
                yield text


@pytest.fixture(scope="module")
def quoted(repo_root: Path) -> list[list[str]]:
    """The quoted messages of the page, each as its pieces."""
    page = (repo_root / "docs" / "messages.md").read_text()
    first_columns = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    return [
        [piece.strip(" .") for piece in quote.split("…") if len(piece.strip(" .")) > 3]
        for column in first_columns
        for quote in re.findall(r"`([^`]+)`", column)
    ]


def test_every_message_of_a_resume_is_on_the_page(repo_root: Path, quoted: list[list[str]]) -> None:
    missing = []
    for path in sorted((repo_root / "engine").rglob("*.py")):
        also = {"ValueError"} if path.as_posix().endswith(OF_A_RESUME) else set()
        for text in messages(path, TOLD | also):
            if any(part in text for part in NOT_OF_A_RESUME):
                continue
            if not any(pieces and all(piece in text for piece in pieces) for pieces in quoted):
                missing.append(f"{path.relative_to(repo_root)}: {text}")
    assert missing == []


def test_every_quoted_message_is_in_the_source(repo_root: Path, quoted: list[list[str]]) -> None:
    constants: list[str] = []
    for path in (repo_root / "engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.BinOp):
                constants.append("".join(literal(node)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.append(node.value)
    source = "\n".join(constants)
    assert [piece for pieces in quoted for piece in pieces if piece not in source] == []


def test_every_difference_has_what_to_write_instead(repo_root: Path) -> None:
    listed = re.findall(r"^(\d+)\. ", (repo_root / "docs" / "engine.md").read_text(), re.MULTILINE)
    rows = re.findall(
        r"^\| ([\d, ]+) \|", (repo_root / "docs" / "from_ignite.md").read_text(), re.MULTILINE
    )
    told = [number for row in rows for number in row.split(", ")]
    assert sorted(told, key=int) == listed
