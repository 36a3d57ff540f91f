"""Types of options that several commands have: a wrong value is one line that names the option.

argparse puts `argument --workers: ` before what is raised here.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path


class UsageError(Exception):
    """What was asked for cannot be done: the message says why, and what to write in its place.

    The command line tells it, and the errors of its kind, in a line.
    """


def at_least(least: int) -> Callable[[str], int]:
    """Returns the type of a whole number of at least so much."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not text.isascii() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def above_zero(text: str) -> float:
    """Reads a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def add_words(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, option: str, word: str, text: str
) -> None:
    """Declares an option that takes words with commas between them, and may be repeated."""
    metavar = f"{word}[,{word}...]"
    parser.add_argument(option, metavar=metavar, type=words, action="extend", default=[], help=text)


def words(text: str) -> list[str]:
    """Reads words with commas between them."""
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} has an empty entry; write words with a comma between them, such as "
            "cpu,cpu:bf16"
        )
    return found


def folder(text: str) -> Path:
    """Reads the name of a folder, which need not exist."""
    path = Path(text)
    wrong = next((one for one in (path, *path.parents) if one.exists() and not one.is_dir()), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{str(wrong)!r} is a file; name a folder")
    return path


def file_to_write(text: str) -> Path:
    """Reads the name of a file, whose folder has to exist: it is written at the very end."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}; make it first")
    return path


def require_demo(*modules: str) -> None:
    """Raises `UsageError`, with how to install the extra `demo`, if a module of it is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'crosstrain[demo]'"
        )
