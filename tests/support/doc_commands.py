"""The manual's table of all commands and options, written from the argument parsers.

`python tests/support/doc_commands.py` writes it into docs/commands.md; a test fails where it is
old.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from crosstrain.ci.cli import COMMANDS

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "commands.md"
BEGIN, END = "<!-- from the parsers -->\n", "<!-- to here -->\n"


def cell(text: str) -> str:
    """A text as a cell of a table, without what this machine has in it."""
    text = re.sub(r"where NAME is one of [^()]*", "as `crosstrain doctor` lists them ", text)
    text = re.sub(r"; now [^)]*", "", text)
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def named(action: argparse.Action) -> str:
    """An argument as it is written on a command line."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if isinstance(value, tuple):
        value = " ".join(value)
    if not action.option_strings:
        return f"`{value} ...`" if action.nargs in ("+", "*") else f"`{value}`"
    longest = max(action.option_strings, key=len)
    if action.nargs == 0:
        return f"`{longest}`"
    return f"`{longest} {value} ...`" if action.nargs == "+" else f"`{longest} {value}`"


def rows(command: str) -> Iterator[str]:
    """The table's rows of one command."""
    parser = argparse.ArgumentParser(prog=f"crosstrain {command}")
    COMMANDS[command].load().add_arguments(parser)
    yield f"| **`crosstrain {command}`** | {cell(COMMANDS[command].help)} |"
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        yield f"| {named(action)} | {cell(formatter._expand_help(action))} |"


def table() -> str:
    """The whole table."""
    lines = ["| command, option | what it does |", "|---|---|"]
    for command in COMMANDS:
        lines += rows(command)
    return "\n".join(lines) + "\n"


def written() -> str:
    """The page, with the table as the parsers have it."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written())
