"""Every code block of the manual runs as it is printed, or says why it is a fragment."""

from __future__ import annotations

import ast
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import doc_blocks
import pytest

PAGES = [page.relative_to(doc_blocks.ROOT).as_posix() for page in doc_blocks.pages()]
# They start many processes.
SLOW = {"docs/start.md", "docs/testing.md"}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to play a page in; what the page changes of the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    environment, modules = dict(os.environ), set(sys.modules)
    taken = {number: signal.getsignal(number) for number in SIGNALS}
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)
    for name in set(sys.modules) - modules:
        where = getattr(sys.modules[name], "__file__", None) or ""
        if where.startswith(str(tmp_path)):
            del sys.modules[name]
    for number, handler in taken.items():
        signal.signal(number, handler)
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES]
)
def test_every_block_runs(page: str, empty_folder: Path) -> None:
    assert doc_blocks.skip_without_reason(doc_blocks.ROOT / page) == []
    counts = doc_blocks.play(doc_blocks.ROOT / page)
    assert counts == doc_blocks.counted(doc_blocks.ROOT / page)


def test_a_block_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    for block, error in (
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```sh\nexit 3\n```\n", Exception),
        ("```\nwhat is this\n```\n", ValueError),
        ("```rust\nfn main() {}\n```\n", ValueError),
    ):
        page.write_text(f"# A page\n\n{block}")
        with pytest.raises(error):
            doc_blocks.play(page)
    page.write_text('# A page\n\n<!-- skip: next "why" -->\n\n```python\n1 / 0\n```\n')
    assert doc_blocks.play(page) == {"blocks": 1, "run": 0} == doc_blocks.counted(page)


def test_both_sides_of_every_diff_are_python() -> None:
    sides = []
    for page in doc_blocks.pages():
        for example in doc_blocks.parse(page).examples():
            block = example.region.evaluator
            if isinstance(block, doc_blocks.Block) and block.language == "diff":
                lines = block.source.splitlines()
                for sign in "-+":
                    kept = [line[1:] for line in lines if line[:1] in (sign, " ", "")]
                    sides.append(ast.parse("\n".join(kept)))
    assert len(sides) >= 8
