"""The reference has a page for every public name, and for what the manual's code imports."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import doc_blocks
import pytest


@pytest.fixture(scope="module")
def hooks(repo_root: Path) -> ModuleType:
    """What MkDocs makes the reference with."""
    spec = importlib.util.spec_from_file_location("manual_hooks", repo_root / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("module", ["crosstrain.engine", "crosstrain.backends", "crosstrain.ci"])
def test_every_public_name_has_a_page(hooks: ModuleType, module: str) -> None:
    listed = [public.name for public in hooks.public_names() if public.module == module]
    assert sorted(listed) == sorted(importlib.import_module(module).__all__)


def test_every_public_name_says_what_it_is_for(hooks: ModuleType) -> None:
    assert [public.name for public in hooks.public_names() if not public.summary] == []


def test_pages_and_sections_are_those_of_the_names(hooks: ModuleType) -> None:
    names = list(hooks.public_names())
    assert len({public.page.lower() for public in names}) == len(names)
    index = hooks.reference_index()
    for public in names:
        assert public.section in hooks.ORDER
        assert f"[`{public.name}`]({public.page.removeprefix('reference/')})" in index
        assert f"::: {public.module}.{public.name}\n" in hooks.reference_page(public)


def test_the_manual_imports_what_the_reference_has(hooks: ModuleType) -> None:
    known = {(public.module, public.name) for public in hooks.public_names()}
    known |= {(f"crosstrain.engine.{name}", "*") for name in ("engine", "events", "deterministic")}
    known |= {tuple(module.rsplit(".", 1)) for module in hooks.PUBLIC_BESIDE}
    unknown = []
    for page in doc_blocks.pages():
        for example in doc_blocks.parse(page).examples():
            if not doc_blocks.is_code(example):
                continue
            block = example.region.evaluator
            source = block.source if isinstance(block, doc_blocks.Block) else str(example.parsed)
            if isinstance(block, doc_blocks.Block) and block.language != "python":
                continue
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "crosstrain"
                ):
                    unknown += [
                        f"{page.name}:{example.line}: {node.module}.{alias.name}"
                        for alias in node.names
                        if not known & {(node.module, alias.name), (node.module, "*")}
                    ]
    assert unknown == []
