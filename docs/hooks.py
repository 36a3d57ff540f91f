"""What MkDocs does beside its configuration: pages made from files that have another home.

The home page is the README, the examples are the scripts themselves, and the reference has a page
for each public name, listed by `__all__`: nothing here can go stale. Sources are read, never
imported, so that the manual is built without torch.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent

# The modules whose `__all__` is the public API, and names of others that users import from there.
PUBLIC_MODULES = ("crosstrain.engine", "crosstrain.backends", "crosstrain.ci")
PUBLIC_BESIDE = {
    "crosstrain.backends.fsdp": ("Sharding",),
    "crosstrain.ci.emulated": ("host_reads", "register"),
    "crosstrain.ci.conformance": ("applicable", "check_backend"),
    "crosstrain.ci.matrix.run_one": ("play_cell",),
    "crosstrain.ci.trials.scenarios": ("SCENARIOS",),
}

# Sections of the reference: a title, and the beginnings of the modules where its names are defined.
SECTIONS = (
    (
        "Checkpoints",
        tuple(
            f"crosstrain.engine.{room}"
            for room in ("checkpoints", "parts", "formats", "stores", "storage")
        ),
    ),
    ("Training steps", ("crosstrain.engine.training", "crosstrain.engine.supervised")),
    (
        "Exact resume",
        (
            "crosstrain.engine.data",
            "crosstrain.engine.deterministic",
            "crosstrain.engine.exact",
            "crosstrain.engine.proof",
            "crosstrain.engine.source",
            "crosstrain.engine.unsaved",
        ),
    ),
    ("Many processes", ("crosstrain.engine.ranks",)),
    ("Backends", ("crosstrain.backends",)),
    ("Tests and proofs", ("crosstrain.ci",)),
    ("The loop", ("crosstrain.engine",)),
)
ORDER = (
    "The loop",
    "Training steps",
    "Exact resume",
    "Checkpoints",
    "Many processes",
    "Backends",
    "Tests and proofs",
)

# Files outside docs/ that are pages of the manual, and where.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    ".github/workflows/matrix.yml": "examples/matrix_workflow.md",
}

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml"}


class PublicName(NamedTuple):
    """A public name of crosstrain.

    Args:
        module: where users import it from.
        name: what it is called there.
        home: the module that defines it.
        summary: the first line of its docstring.
    """

    module: str
    name: str
    home: str
    summary: str

    @property
    def page(self) -> str:
        """Its page in the manual."""
        return f"reference/{self.module.removeprefix('crosstrain.')}/{self.name}.md"

    @property
    def section(self) -> str:
        """The section of the reference that it belongs to."""
        return next(title for title, beginnings in SECTIONS if self.home.startswith(beginnings))


@cache
def source(module: str) -> tuple[ast.Module, bool]:
    """Parses a module of crosstrain; tells also whether it is a package."""
    path = ROOT.joinpath(*module.split(".")[1:])
    package = path.is_dir()
    text = (path / "__init__.py" if package else path.with_suffix(".py")).read_text()
    return ast.parse(text), package


def assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """Names the variables that a statement assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def defined(module: str, name: str) -> tuple[str, str]:
    """Finds the module that defines a name which `module` has, and the docstring's first line."""
    tree, package = source(module)
    for node, after in pairwise([*tree.body, ast.Pass()]):
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in assigned(node):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            return module, str(after.value.value).split("\n")[0] if documented else ""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, (ast.get_docstring(node) or "").split("\n")[0]
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + package] if node.level else []
            return defined(".".join([*base, *filter(None, [node.module])]), name)
    raise LookupError(f"{module} has no definition of {name}")


def public_names() -> Iterator[PublicName]:
    """Yields the public names, as `__all__` of the public modules has them."""
    for module in PUBLIC_MODULES:
        for node in source(module)[0].body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    yield PublicName(module, name, *defined(module, name))
    for module, names in PUBLIC_BESIDE.items():
        for name in names:
            yield PublicName(module, name, *defined(module, name))


def reference_page(public: PublicName) -> str:
    """Writes the page of one name; mkdocstrings fills it from the docstring."""
    return f"---\ntitle: {public.name}\n---\n\n::: {public.module}.{public.name}\n"


def reference_index() -> str:
    """Writes the list of all public names, each with what it is for."""
    lines = ["# Reference", "", "Every public name, from its docstring.", ""]
    for section in ORDER:
        lines += [f"## {section}", "", "| name | what it is for |", "|---|---|"]
        for public in public_names():
            if public.section == section:
                target = public.page.removeprefix("reference/")
                lines.append(f"| [`{public.name}`]({target}) | {public.summary} |")
        lines.append("")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Says which file outside docs/ is which page."""
    examples = sorted((ROOT / "examples").rglob("*"))
    return PAGES | {
        path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).with_suffix(".md").as_posix()
        for path in examples
        if path.suffix in LANGUAGES and path.name != "__init__.py"
    }


def with_links(text: str, home: str, page: str) -> str:
    """Turns the links of a file into those of the manual.

    Args:
        text: the file's Markdown.
        home: where the file lies, from the repository's root.
        page: where its page lies, from docs/.

    Returns:
        The text. A link to a file that is no page of the manual is left, for MkDocs to complain of.
    """
    known = pages()

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if ":" in target:
            return found[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(home), target))
        if wanted in known:
            wanted = known[wanted]
        elif wanted.startswith("docs/"):
            wanted = wanted.removeprefix("docs/")
        elif (ROOT / wanted).is_dir():
            wanted = next((known[file] for file in known if file.startswith(f"{wanted}/")), target)
        else:
            return found[0]
        relative = posixpath.relpath(wanted, posixpath.dirname(page) or ".")
        return f"[{found['text']}]({relative}{found['anchor'] or ''})"

    return LINK.sub(link, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts examples and reference into the navigation."""
    reference: list[Any] = [{"All names": "reference/index.md"}]
    names = list(public_names())
    for section in ORDER:
        reference.append(
            {section: [{public.name: public.page} for public in names if public.section == section]}
        )
    examples = [{home: page} for home, page in pages().items() if page.startswith("examples/")]
    assert config.nav is not None
    config.nav += [
        {"Examples": examples},
        {"Reference": reference},
        {"Project": [{"Changes": "changelog.md"}, {"Contributing": "contributing.md"}]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that have their home elsewhere."""
    from mkdocs.structure.files import File

    for home, page in pages().items():
        text = (ROOT / home).read_text()
        if not home.endswith(".md"):
            text = f"# {home}\n\n```{LANGUAGES[Path(home).suffix]}\n{text}```\n"
        else:
            text = with_links(text, home, page)
        files.append(File.generated(config, page, content=text))
    for public in public_names():
        files.append(File.generated(config, public.page, content=reference_page(public)))
    files.append(File.generated(config, "reference/index.md", content=reference_index()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Points links that lead out of docs/ to the pages of these files."""
    if page.file.generated_by is not None:
        return markdown
    return with_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
