"""Imports go one way, cost nothing before they are needed, and the engine names no device."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import source_rules

HEAVY = frozenset({"torch", "numpy", "rich", *source_rules.THIRD_PARTY})

# The identifiers and strings of `engine/` that may name a device, and why.
ALLOWED_IN_ENGINE = {
    "supervised_training_step_apex": "the name that scripts written for ignite import",
    "supervised_training_step_tpu": "the name that scripts written for ignite import",
}


def package_files(repo_root: Path, package: str) -> list[str]:
    files = [
        path.relative_to(repo_root).as_posix()
        for path in sorted((repo_root / package).rglob("*.py"))
        if "typing" not in path.parts
    ]
    assert files, f"no source in {package}/"
    return files


# Imports against the rule that are still to be put right. This list only gets shorter.
KNOWN_ARROWS: frozenset[tuple[str, str]] = frozenset()


@pytest.mark.parametrize("package", source_rules.ORDER)
def test_imports_follow_the_rules(repo_root: Path, package: str) -> None:
    findings = [
        str(finding)
        for file in package_files(repo_root, package)
        for finding in source_rules.import_findings(file, (repo_root / file).read_text())
        if (finding.file, finding.text) not in KNOWN_ARROWS
    ]
    assert not findings, "\n".join(findings)


def sources(repo_root: Path) -> dict[str, str]:
    return {
        file: (repo_root / file).read_text()
        for package in source_rules.ORDER
        for file in package_files(repo_root, package)
    }


def test_no_files_import_each_other_in_a_circle(repo_root: Path) -> None:
    found = source_rules.circles(sources(repo_root))
    assert not found, "\n".join(" <-> ".join(one) for one in found)


@pytest.mark.parametrize(
    ("file", "line", "circle"),
    [
        (
            "ci/trials/order.py",
            "from .processes import Child",
            ["ci/trials/order.py", "ci/trials/processes.py"],
        ),
        (
            "ci/traces/file.py",
            "if TYPE_CHECKING:\n    from crosstrain.ci.traces import diff",
            ["ci/traces/diff.py", "ci/traces/file.py"],
        ),
        (
            "backends/errors.py",
            "def f():\n    from . import registry",
            ["backends/errors.py", "backends/registry.py"],
        ),
    ],
)
def test_a_planted_circle_is_found(
    repo_root: Path, file: str, line: str, circle: list[str]
) -> None:
    planted = sources(repo_root)
    planted[file] += f"\n{line}\n"
    assert circle in [
        [file for file in found if file in circle] for found in source_rules.circles(planted)
    ]


def test_one_file_of_ci_starts_processes(repo_root: Path) -> None:
    starting = [
        file
        for file in package_files(repo_root, "ci")
        if any(
            item.module in ("subprocess", "multiprocessing", "pty")
            for item in source_rules.imports("ci", ast.parse((repo_root / file).read_text()))
        )
    ]
    assert starting == ["ci/trials/processes.py"]


def test_engine_names_no_device(repo_root: Path) -> None:
    found = [
        (f"{file}:{line}: {text!r}", text)
        for file in package_files(repo_root, "engine")
        for line, text in source_rules.device_names((repo_root / file).read_text())
    ]
    new = [where for where, text in found if text not in ALLOWED_IN_ENGINE]
    stale = ALLOWED_IN_ENGINE.keys() - {text for _, text in found}
    assert not new, "engine/ names a device, which is for backends/ to do:\n" + "\n".join(new)
    assert not stale, f"entries of ALLOWED_IN_ENGINE that match nothing: {sorted(stale)}"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("backends/a.py", "from crosstrain.engine import Engine"),
        ("backends/a.py", "def f():\n    import crosstrain.ci.cli"),
        ("engine/state.py", "from crosstrain.ci import cli"),
        ("engine/state.py", "from crosstrain import ci"),
        ("engine/state.py", "if TYPE_CHECKING:\n    from crosstrain.ci import cli"),
        ("engine/state.py", "import_module('crosstrain.ci.cli')"),
        ("engine/loop.py", "from crosstrain.engine.state import State"),
        ("engine/loop.py", "from .ranks.line import Line"),
        ("engine/loop.py", "from crosstrain.engine.ranks.line import Line"),
        ("engine/events.py", "from .dispatch import Dispatcher"),
        ("engine/storage/atomic.py", "from crosstrain.engine.engine import Engine"),
        ("engine/checkpoints/resume.py", "from crosstrain.engine.data.cursor import Cursor"),
        ("engine/data/cursor.py", "def f():\n    from crosstrain.engine import Engine"),
        ("engine/state.py", "from ..backends import get"),
        ("engine/state.py", "import crosstrain"),
        ("engine/state.py", "from backends import get"),
        ("engine/state.py", "import torch_xla.runtime"),
        ("engine/state.py", "from ignite.engine import Engine"),
        ("backends/cpu.py", "from apex import amp"),
        ("backends/xla.py", "import torch_tpu"),
        ("backends/registry.py", "find_spec('torch_xla')"),
        ("ci/trials/child.py", "from crosstrain.ci.matrix.outcome import Outcome"),
        ("ci/traces/file.py", "from crosstrain.ci.trials.order import Order"),
        ("ci/doctor.py", "from crosstrain.ci.matrix import report"),
        ("ci/trials/child.py", "from crosstrain.engine.storage.manifest import Manifest"),
        ("ci/cli.py", "import lightning"),
        ("ci/cli.py", "importlib.import_module('apex.amp')"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str) -> None:
    assert len(source_rules.import_findings(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("backends/a.py", "from .protocol import Backend\nimport torch"),
        ("backends/xla.py", "def f():\n    import torch_xla\n    find_spec('torch_xla')"),
        ("engine/loop.py", "from .engine import Engine\nfrom .state import State"),
        (
            "engine/data/cursor.py",
            "from .order import a\nfrom crosstrain.engine.ranks.line import b",
        ),
        ("engine/supervised.py", "from crosstrain.engine.training import step"),
        ("engine/state.py", "from . import guards\nfrom crosstrain.backends import get"),
        ("ci/cli.py", "import os.path\nimport crosstrain.engine\nload('crosstrain.backends.cpu')"),
        ("ci/trials/child.py", "from crosstrain.ci.traces.recorder import TraceRecorder"),
        ("ci/trials/child.py", "from crosstrain.engine.storage import Manifest"),
        ("ci/traces/file.py", "from crosstrain.engine.guards import is_mapping"),
        ("backends/registry.py", "MEANT = {'torch_xla': 'xla'}"),
        ("engine/state.py", "'''Read crosstrain.ci.'''\nx = 'see crosstrain.ci for more'"),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    assert source_rules.import_findings(file, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "cuda = 1",
        "x.is_cuda",
        "f(device='cuda:0')",
        "def step_tpu(): ...",
        "class XLABackend: ...",
        "def f(amp_apex): ...",
        "f(use_mps=True)",
        "import torch.cuda",
        "from torch import cuda as c",
        "f'{x} on TPU'",
        "class TorchTpu: ...",
    ],
)
def test_a_device_name_is_found(source: str) -> None:
    assert source_rules.device_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "output = dumps(timestamps)",
        "'''Docs may say cuda.'''",
        "x = 1  # cuda",
        "class A:\n    '''On an xla device.'''\n    y: int\n    '''tpu'''",
        "raise ValueError('input')",
    ],
)
def test_what_is_no_device_name_passes(source: str) -> None:
    assert source_rules.device_names(source) == []


def modules_after(*command: str | Path) -> set[str]:
    """Runs a command of ours and returns the top-level names of what it imported."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    # Away from the repository: nothing may be found through the working folder.
    result = subprocess.run(
        [str(word) for word in command],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line for line in result.stderr.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    "statement",
    [
        "import crosstrain.backends",
        "import crosstrain.backends; crosstrain.backends.names()",
        "import crosstrain.ci",
        "import crosstrain.ci.cli",
    ],
)
def test_a_light_import_stays_light(statement: str) -> None:
    modules = modules_after(sys.executable, "-c", statement)
    assert "crosstrain" in modules
    assert not modules & HEAVY


def test_help_imports_no_heavy_module(console_script: Path) -> None:
    modules = modules_after(console_script, "--help")
    assert "crosstrain" in modules
    assert not modules & HEAVY


def test_a_heavy_import_would_be_seen() -> None:
    assert "torch" in modules_after(sys.executable, "-c", "import crosstrain.backends.cpu")


def test_help_does_not_import_the_subcommands(console_script: Path) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    result = subprocess.run(
        [console_script, "--help"],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    ours = {name for name in imported if name.startswith("crosstrain.ci")}
    assert ours == {"crosstrain.ci", "crosstrain.ci.cli", "crosstrain.ci.options"}
