"""The wheel holds the tree, the packages refuse their bare names, and the pins agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import crosstrain

PACKAGES = ("engine", "backends", "ci")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the working tree.

    It is built from a copy: setuptools would leave a build folder in the tree, and what an older
    build left there would end up in the wheel.
    """
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source)
    for package in (*PACKAGES, "package"):
        shutil.copytree(
            repo_root / package,
            source / package,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    target = tmp_path_factory.mktemp("wheel")
    pip_wheel = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    result = run(sys.executable, "-m", *pip_wheel, "--wheel-dir", target, source, cwd=target)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = target.glob("*.whl")
    return built


def tree_files(repo_root: Path) -> Iterator[str]:
    for path in (repo_root / "package").iterdir():
        if path.is_file():
            yield f"crosstrain/{path.name}"
    for package in PACKAGES:
        for path in (repo_root / package).rglob("*"):
            inside = path.relative_to(repo_root).as_posix()
            if inside.startswith("ci/typing/"):
                continue
            if path.suffix in (".py", ".css", ".jinja") or path.name == "py.typed":
                yield f"crosstrain/{inside}"


def test_wheel_holds_every_file_once(repo_root: Path, wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(tree_files(repo_root))
    assert {f"crosstrain/{package}/py.typed" for package in PACKAGES} <= set(names)


def test_rooms_have_no_folders_inside(repo_root: Path) -> None:
    deep = [name for name in tree_files(repo_root) if name.count("/") > 3]
    assert deep == []
    assert not [
        name
        for name in tree_files(repo_root)
        if name.startswith("crosstrain/backends/") and name.count("/") > 2
    ]


def test_wheel_metadata(repo_root: Path, wheel: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    archive = zipfile.ZipFile(wheel)
    info = f"crosstrain-{project['version']}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.11"
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "crosstrain = crosstrain.ci.cli:main" in entry_points
    assert "[crosstrain.backends]" in entry_points


def test_unpacked_wheel_runs(wheel: Path, repo_root: Path, tmp_path: Path) -> None:
    """Also for whoever stands in a clone, where Python looks first: no folder there hides it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(1, {str(tmp_path)!r})\n"
        "import crosstrain.backends, crosstrain.ci.cli, crosstrain.engine\n"
        "for module in (crosstrain.backends, crosstrain.ci.cli, crosstrain.engine):\n"
        "    print(module.__file__)\n"
    )
    result = run(sys.executable, "-c", program, cwd=repo_root)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(tmp_path)) for line in result.stdout.splitlines())


def test_the_name_itself_tells_the_version_and_runs_the_command(tmp_path: Path) -> None:
    """And costs nothing to import."""
    told = run(sys.executable, "-m", "crosstrain", "--version", cwd=tmp_path)
    program = (
        "import sys, crosstrain; print('crosstrain', crosstrain.__version__)\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(crosstrain, 'version')"
    )
    asked = run(sys.executable, "-c", program, cwd=tmp_path)
    assert told.stdout == asked.stdout, told.stderr + asked.stderr
    assert told.stdout == f"crosstrain {crosstrain.__version__}\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_bare_import_is_refused(repo_root: Path, package: str) -> None:
    result = run(sys.executable, "-c", f"import {package}", cwd=repo_root)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), result.stderr
    assert f"crosstrain.{package}" in last


@pytest.mark.parametrize("package", PACKAGES)
def test_typing_links_lead_to_the_root_folders(repo_root: Path, package: str) -> None:
    link = repo_root / "ci" / "typing" / "crosstrain" / package
    assert link.is_symlink(), f"{link} is no symbolic link; was the clone made without them?"
    assert not link.readlink().is_absolute()
    assert link.resolve() == repo_root / package


def pins(repo_root: Path) -> dict[str, str]:
    lines = (repo_root / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {item.name: str(item.specifier).removeprefix("==") for item in requirements}


def test_every_requirement_has_a_pin_that_it_allows(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # The tools of `dev` come in through their own commands, not through a test or a check.
    texts = [*project["dependencies"]]
    texts += [text for name, extra in extras.items() if name != "dev" for text in extra]
    requirements = [Requirement(text) for text in texts]
    pinned = pins(repo_root)
    for requirement in requirements:
        if requirement.name != "crosstrain":
            version = pinned.get(requirement.name)
            assert version is not None, f"constraints.txt does not pin {requirement.name}"
            assert requirement.specifier.contains(version), f"{requirement} but =={version}"
    assert set(pinned) == {requirement.name for requirement in requirements} - {"crosstrain"}


def test_pre_commit_uses_the_pinned_ruff(repo_root: Path) -> None:
    config = (repo_root / ".pre-commit-config.yaml").read_text()
    versions = set(re.findall(r"ruff==([\d.]+)", config))
    assert versions == {pins(repo_root)["ruff"]}
