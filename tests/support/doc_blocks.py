"""The code blocks of the manual, run as they are printed.

A page is played from top to bottom in an empty folder, in one Python namespace, by sybil:

- ```` ```python ```` is run;
- ```` ```sh ```` is run by bash, in the same folder, with the repository's ``examples/`` in it;
- any of ``FILES`` with ``title="name"`` becomes a file of that name there;
- ```` ```text ```` and ```` ```diff ```` are no code: what a program prints, what a script loses
  and gains.

What a page needs and need not show stands in ``<!-- invisible-code-block: python ... -->``. A block
that cannot run here is a fragment: ``<!-- skip: next "why" -->`` stands before it, or
``<!-- skip: next if(not installed("package"), "why") -->``.

`python tests/support/doc_blocks.py` counts them.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

import forked_shell
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).resolve().parent.parent.parent
FENCE = RawFencedCodeBlockLexer(re.compile(r"(?P<info>[^\n]*)\n"))
INFO = re.compile(r'(?P<language>[a-z]+)(?: title="(?P<title>[^"]+)")?')
FILES = ("python", "toml", "yaml", "json", "ini", "sh")
NO_CODE = ("text", "diff")
BIN = Path(sys.executable).parent


class Block:
    """One fenced block: an evaluator for sybil, which plays it in the page's folder."""

    def __init__(self, language: str, title: str | None, source: str) -> None:
        self.language = language
        self.title = title
        self.source = source

    @property
    def is_code(self) -> bool:
        return self.language not in NO_CODE

    def __call__(self, example: Example) -> str | None:
        if not self.is_code:
            return None
        if self.title is not None:
            Path(self.title).parent.mkdir(parents=True, exist_ok=True)
            Path(self.title).write_text(self.source)
            return None
        return run_shell(self.source)


def run_shell(source: str) -> str | None:
    """Runs the lines with bash, and Python's programs forked; tells what went wrong."""
    with tempfile.TemporaryDirectory() as place, forked_shell.programs(Path(place)) as stand_ins:
        path, support = f"{stand_ins}:{BIN}:{os.environ['PATH']}", str(ROOT / "tests" / "support")
        env = os.environ | {"PATH": path, "PYTHONPATH": support}
        command = ["bash", "-euo", "pipefail", "-c", source]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env)
    if done.returncode:
        return f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return None


class Blocks:
    """Parses every fence that is not plain Python; an unknown or missing language is an error."""

    def __call__(self, document: Document) -> Iterator[Region]:
        for fence in FENCE(document):
            info = INFO.fullmatch(fence.lexemes["info"].strip())
            where = f"{document.path}: {document.line_column(fence.start)}"
            if info is None:
                raise ValueError(f"{where}: a block needs a language, such as `text` for output")
            language, title = info["language"], info["title"]
            if language == "python" and title is None:
                continue
            runs = language == "sh" or (title is not None and language in FILES)
            if not runs and language not in NO_CODE:
                raise ValueError(f"{where}: a block of {language} needs a title, as a file")
            block = Block(language, title, str(fence.lexemes["source"]))
            yield Region(fence.start, fence.end, block, block)


def sybil() -> Sybil:
    return Sybil(parsers=[Blocks(), PythonCodeBlockParser(), SkipParser()])


def pages() -> list[Path]:
    """Every page of the manual that holds code."""
    found = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [page for page in found if "```" in page.read_text()]


def parse(page: Path) -> Document:
    return sybil().parse(page)


def is_code(example: Example) -> bool:
    """Whether it is a block that a reader sees, of code."""
    evaluator = example.region.evaluator
    if isinstance(evaluator, Block):
        return evaluator.is_code
    text = example.document.text[example.region.start : example.region.end]
    return isinstance(evaluator, PythonEvaluator) and "invisible" not in text.split("\n")[0]


def skip_without_reason(page: Path) -> list[str]:
    """Names the lines where a block is skipped and nothing says why."""
    return [
        f"{page}:{example.line}"
        for example in parse(page).examples()
        if isinstance(example.parsed, tuple)
        and example.parsed[0] in ("next", "start")
        and not example.parsed[1]
    ]


def play(page: Path) -> Counter[str]:
    """Plays a page in the current folder.

    Returns:
        How many blocks of code were seen, and how many of them ran.

    Raises:
        Exception: what a block raised, with the page's line.
    """
    counts: Counter[str] = Counter()
    if not Path("examples").exists():
        Path("examples").symlink_to(ROOT / "examples")
    document = parse(page)
    document.namespace.update(__name__="__main__", installed=installed)
    for example in document.examples():
        counted = is_code(example)
        counts["blocks"] += counted
        try:
            example.evaluate()
        except SkipTest:
            continue
        counts["run"] += counted
    return counts


def installed(name: str) -> bool:
    """Whether a package is here that the manual shows and the tests do not need."""
    return importlib.util.find_spec(name) is not None


def is_skipped(action: str, reason: str) -> bool:
    """Whether a skip says that it skips, here and now."""
    if not reason.startswith("if("):
        return action != "end"
    condition = ast.parse(reason[2:], mode="eval").body
    assert isinstance(condition, ast.Tuple)
    return bool(eval(ast.unparse(condition.elts[0]), {"installed": installed}))


def counted(page: Path) -> Counter[str]:
    """Counts as `play` would, without running anything."""
    document = parse(page)
    counts: Counter[str] = Counter()
    skipped = False
    for example in document.examples():
        if isinstance(example.parsed, tuple):
            skipped = is_skipped(*example.parsed)
            continue
        counts["blocks"] += is_code(example)
        counts["run"] += is_code(example) and not skipped
        skipped = False
    return counts


def main() -> None:
    total: Counter[str] = Counter()
    for page in pages():
        counts: Any = counted(page)
        total += counts
        print(f"{page.relative_to(ROOT)!s:40} {counts['blocks']:3} {counts['run']:3}")
    print(f"{'blocks of code, and how many run':40} {total['blocks']:3} {total['run']:3}")


if __name__ == "__main__":
    main()
