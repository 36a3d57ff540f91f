"""Rules about the source text of the packages, checked on the syntax tree.

Imports go one way, `ci -> engine -> backends`; a vendor's package is imported only by the backend
that is for it; `engine` never names a device. `test_imports.py` applies the rules to the tree.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

# A package may import itself and what stands to the right of it.
ORDER = ("ci", "engine", "backends")

# The rooms of `engine`: what each may import from besides itself. A room is a folder; the files
# beside the folders each are a room of their own, or share one (`LEVELS`).
BASE = frozenset({"base"})
EVENTS = BASE | {"events"}
DISPATCH = EVENTS | {"dispatch"}
ENGINE = DISPATCH | {"engine"}
RANKS = ENGINE | {"ranks"}
DATA = RANKS | {"data"}
SOURCE = BASE | {"source"}
TRAINING = DATA | {"training"}
EXACT = TRAINING | {"exact"}
STORAGE = BASE | {"storage"}
STORES = STORAGE | {"stores"}
FORMATS = STORES | {"formats"}
PARTS = FORMATS | {"parts", "ranks"}
ROOMS = {
    "base": BASE,
    "events": BASE,
    "dispatch": EVENTS,
    "engine": DISPATCH,
    "early_stopping": ENGINE,
    "ranks": ENGINE,
    "data": RANKS,
    "training": DATA,
    "exact": TRAINING,
    "source": BASE,
    "unsaved": DATA | SOURCE,
    "deterministic": EXACT | SOURCE | {"unsaved"},
    "supervised": EXACT | {"deterministic"},
    "storage": BASE,
    "stores": STORAGE,
    "formats": STORES,
    "parts": FORMATS | {"ranks"},
    "checkpoints": RANKS | PARTS,
}
# The rooms of `ci`, in the same way. Its command line names the others by strings.
COMMON = frozenset({"options"})
TRACES = COMMON | {"traces"}
TRIALS = TRACES | {"trials"}
CI_ROOMS = {
    "__main__": COMMON | {"cli"},
    "cli": COMMON,
    "conformance": COMMON,
    "demo": TRIALS,
    "doctor": COMMON,
    "emulated": COMMON,
    "inspect_checkpoint": COMMON,
    "matrix": TRIALS,
    "options": frozenset(),
    # The same backends as the matrix's columns.
    "plugin": TRIALS | {"matrix"},
    "traces": COMMON,
    "trials": TRACES,
    "verification": TRIALS,
}
FOLDERS = {
    "engine": (
        "ranks",
        "data",
        "training",
        "exact",
        "source",
        "unsaved",
        "storage",
        "stores",
        "formats",
        "parts",
        "checkpoints",
    ),
    "ci": (
        "conformance",
        "emulated",
        "matrix",
        "plugin",
        "traces",
        "trials",
        "verification",
    ),
}
LEVELS = {
    **dict.fromkeys(
        (
            "digest",
            "errors",
            "guards",
            "loader_workers",
            "machine",
            "made_with",
            "nests",
            "place",
            "progress",
            "proof",
            "random_states",
            "shown",
            "splitmix",
            "spread",
            "state",
            "structure",
        ),
        "base",
    ),
    "loop": "engine",
    "recording": "deterministic",
    "requests": "engine",
    "resumption": "deterministic",
    "seen_by_ignite": "engine",
}

# Where a third-party module may be imported. What is not here may be imported nowhere.
THIRD_PARTY = {
    "torch": ("backends/*.py", "engine/*.py", "ci/*.py"),
    "numpy": ("backends/*.py", "engine/*.py", "ci/*.py"),
    "blake3": ("engine/storage/tree_hash.py", "engine/storage/parts_files.py"),
    "fsspec": ("engine/stores/by_url.py",),
    "rich": ("ci/*.py",),
    "jinja2": ("ci/matrix/report*.py",),
    "markupsafe": ("ci/matrix/report*.py",),
    "pytest": ("ci/plugin/*.py",),
    "matplotlib": ("ci/demo.py",),
    "sklearn": ("ci/trials/digits.py",),
    "apex": ("backends/apex*.py",),
    "torch_xla": ("backends/xla*.py",),
    "torch_tpu": ("backends/tpu*.py",),
    "libtpu": ("backends/tpu*.py",),
}

# Functions that import a module, or look for one, by a name that is given as a string.
LOOKUPS = frozenset({"import_module", "find_spec", "__import__"})

DEVICES = frozenset({"cuda", "xla", "apex", "tpu", "mps"})


@dataclass(frozen=True)
class Finding:
    """One breach of a rule.

    Args:
        file: path from the repository root.
        line: line number.
        text: what was found: a module, an identifier or a string.
        problem: which rule it breaks.
    """

    file: str
    line: int
    text: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text!r}: {self.problem}"


@dataclass(frozen=True)
class Import:
    """One imported module, with its name made absolute."""

    line: int
    module: str
    relative: bool


def imports(folder: str, tree: ast.AST) -> Iterator[Import]:
    """Yields every import of a file in a folder of ours, at whatever depth it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, relative=False)
        elif isinstance(node, ast.ImportFrom):
            yield from _from_imports(folder, node)


def _from_imports(folder: str, node: ast.ImportFrom) -> Iterator[Import]:
    relative = node.level > 0
    here = ["crosstrain", *folder.split("/")]
    parts = here[: len(here) + 1 - node.level] if relative else []
    base = ".".join([*parts, *([node.module] if node.module else [])])
    if base == "crosstrain" or not node.module:
        # What is imported is a module of that package.
        for alias in node.names:
            yield Import(node.lineno, f"{base}.{alias.name}", relative)
    else:
        yield Import(node.lineno, base, relative)


def import_findings(file: str, source: str) -> list[Finding]:
    """Checks the imports of one file, and the modules of ours that its strings name.

    Args:
        file: path from the repository root, such as ``engine/state.py``.
        source: the text of the file.

    Returns:
        Every breach, in the order of the lines.
    """
    package = file.split("/", 1)[0]
    folder = file.rsplit("/", 1)[0]
    tree = ast.parse(source)
    found = [
        Finding(file, item.line, item.module, problem)
        for item in imports(folder, tree)
        if (problem := _import_problem(file, package, item)) is not None
    ]
    for line, text in _constants(tree):
        match = re.fullmatch(r"crosstrain\.(\w+)(\.\w+)*", text)
        if match and not _may_import(package, match[1]):
            found.append(Finding(file, line, text, _arrow(package, match[1])))
    for line, text in _looked_up(tree):
        top = text.split(".")[0]
        if top in THIRD_PARTY and not _allowed_in(top, file):
            found.append(Finding(file, line, text, "a vendor's module, looked for by another file"))
    return sorted(found, key=lambda finding: finding.line)


def _import_problem(file: str, package: str, item: Import) -> str | None:
    parts = item.module.split(".")
    top = parts[0]
    if top == "crosstrain":
        target = parts[1] if len(parts) > 1 else ""
        if not _may_import(package, target):
            return _arrow(package, target)
        if item.relative != (_room_folder(item.module) == file.rsplit("/", 1)[0]):
            return "imports are relative inside a folder and absolute across folders"
        return _room_problem(file, item.module)
    if top in ORDER:
        return f"a bare name; write crosstrain.{item.module}"
    if top in sys.stdlib_module_names or _allowed_in(top, file):
        return None
    places = ", ".join(THIRD_PARTY.get(top, ())) or "no file"
    return f"a third-party import that is allowed in {places}"


def _room_folder(module: str) -> str:
    """The folder of a module of ours, as far as its name tells: rooms have no folders inside."""
    parts = module.split(".")[1:]
    return "/".join(parts[:-1]) if len(parts) > 1 and not _is_room(parts) else "/".join(parts)


def _is_room(parts: list[str]) -> bool:
    return len(parts) == 2 and parts[1] in FOLDERS.get(parts[0], ())


def room(module: str) -> str | None:
    """Returns the room of a module of `engine` or `ci`, or None for the package itself.

    Args:
        module: the dotted name, such as ``crosstrain.engine.ranks.world``.
    """
    parts = module.split(".")
    if len(parts) < 3 or parts[1] not in FOLDERS:
        return None
    return LEVELS.get(parts[2], parts[2]) if parts[1] == "engine" else parts[2]


def _room_problem(file: str, module: str) -> str | None:
    parts = file.removesuffix(".py").split("/")
    if parts[0] not in FOLDERS or parts[1] == "__init__":
        return None
    if not module.startswith(f"crosstrain.{parts[0]}"):
        return _face_problem(parts[0], module)
    rooms = ROOMS if parts[0] == "engine" else CI_ROOMS
    mine, other = room(".".join(("crosstrain", *parts))), room(module)
    assert mine in rooms, f"{file} is in no room: name it in ROOMS, LEVELS or CI_ROOMS"
    if other == mine or other in rooms[mine]:
        return None
    return f"an arrow between rooms, {mine} -> {other}; {mine} may import {sorted(rooms[mine])}"


def _face_problem(package: str, module: str) -> str | None:
    """Says so where `ci` looks behind the face of a room of the engine: its `__init__`."""
    parts = module.split(".")
    if package == "ci" and len(parts) > 3 and parts[1] == "engine":
        return f"ci imports a room's face: from {'.'.join(parts[:3])} import ..."
    return None


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Finds the files that import each other in a circle, in functions and for types too.

    Args:
        sources: the text of each file by its path from the repository root.

    Returns:
        The files of each circle, sorted; no file is in two of them.
    """
    arrows = {file: _imported_files(file, text, sources) for file, text in sources.items()}
    reached = {file: _reached(file, arrows) for file in arrows}
    found = {
        tuple(sorted(other for other in reached[file] if file in reached[other]))
        for file in arrows
        if file in reached[file]
    }
    return [list(one) for one in sorted(found)]


def _imported_files(file: str, text: str, known: Iterable[str]) -> set[str]:
    here = file.removesuffix(".py").split("/")[:-1]
    named: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ["crosstrain", *here][: len(here) + 2 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # A name may be a module's.
            named |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    places = {name.removeprefix("crosstrain.").replace(".", "/") for name in named}
    files = {f"{place}{end}" for place in places for end in (".py", "/__init__.py")}
    return files & set(known)


def _reached(file: str, arrows: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(arrows[file])
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += arrows[other]
    return found


def _may_import(package: str, target: str) -> bool:
    return target in ORDER and ORDER.index(target) >= ORDER.index(package)


def _arrow(package: str, target: str) -> str:
    return f"an arrow {package} -> {target or 'crosstrain'}; allowed is {' -> '.join(ORDER)}"


def _allowed_in(module: str, file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in THIRD_PARTY.get(module, ()))


def device_names(source: str) -> list[tuple[int, str]]:
    """Finds every identifier and string of a file that names a device.

    A name is taken apart at underscores, at changes of case and at whatever is no letter, so
    ``amp_tpu`` and ``XLABackend`` are found and ``output`` and ``dumps`` are not. Docstrings are
    exempt; comments are not part of the syntax tree.

    Returns:
        Line numbers and the whole identifier or string.
    """
    tree = ast.parse(source)
    found = [(line, text) for line, text in _identifiers(tree) if names_device(text)]
    found += [(line, text) for line, text in _constants(tree) if names_device(text)]
    return sorted(found)


def names_device(text: str) -> bool:
    """Tells whether one of the words that make up a text is the name of a device."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)
    return any(word.lower() in DEVICES for word in words)


def _identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname", "module", "rest"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value
        for field in ("names", "kwd_attrs"):
            for value in getattr(node, field, ()):
                if isinstance(value, str):
                    yield line, value


def _looked_up(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            function, first = node.func, node.args[0]
            name = getattr(function, "attr", getattr(function, "id", None))
            if name in LOOKUPS and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def _constants(tree: ast.AST) -> Iterator[tuple[int, str]]:
    # A string that stands alone as a statement is documentation.
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
