"""The package `apex`: which of the things of that name is installed, told without an import."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from .errors import Missing

__all__ = ["LAST_WITH_AMP", "amp_absence", "package_versions"]

# The last commit of NVIDIA's apex that has `apex.amp`.
LAST_WITH_AMP = "e13873debc4699d39c6861074b9a3b2a02327f92"

_SOURCE = f"git+https://github.com/NVIDIA/apex@{LAST_WITH_AMP}"
_INSTALL = f"pip install --no-build-isolation {_SOURCE}"


def amp_absence() -> Missing | None:
    """Returns why there is no `apex.amp` here, and what to do; None if there is.

    It looks at the files of the package: to import it runs code, and patches nothing that it could
    undo.
    """
    folders = _folders()
    if not folders:
        return Missing("apex is not installed.", f"Install the last one with amp: {_INSTALL}")
    if _has(folders, "amp") and _has(folders, "multi_tensor_apply"):
        return None
    if _has(folders, "multi_tensor_apply"):
        return Missing(
            f"The apex in {folders[0]} is one whose amp was removed, in May 2025.",
            f"Install the last commit that has it: {_INSTALL}; or use cuda-amp, which needs none.",
        )
    return Missing(
        f"The package in {folders[0]} is called apex, but is not NVIDIA's: PyPI has another.",
        f"Run pip uninstall apex, then {_INSTALL}",
    )


def package_versions() -> dict[str, str]:
    """Returns the version of the installed apex, if it tells one."""
    try:
        return {"apex": version("apex")}
    except PackageNotFoundError:
        return {}


def _folders() -> list[Path]:
    try:
        spec = find_spec("apex")
    except (ImportError, ValueError):
        # A module in sys.modules that has no spec: something made by hand, and not a package.
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(place) for place in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin else []


def _has(folders: list[Path], name: str) -> bool:
    return any((folder / name / "__init__.py").is_file() for folder in folders)
