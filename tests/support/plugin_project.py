"""A project of somebody's that uses the pytest plugin, and what it is run by; for our tests."""

from __future__ import annotations

import pytest

# A package of somebody else's, whose backend is nowhere available.
ABSENT = """
from crosstrain.backends import Availability
from crosstrain.backends.torch_backend import TorchBackend

class AbsentBackend(TorchBackend):
    options = ("fp32", "tiny")
    name = "absent"

    @classmethod
    def probe(cls, option=None):
        return Availability(False, "Nobody has such a device.", "Invent one.")
"""

USES = """
def test_uses(backend, backend_spec):
    assert f"{backend.name}:{backend.option}" in (backend_spec, f"{backend_spec}:fp32")
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROSSTRAIN_BACKENDS", raising=False)
    pytester.makepyfile(absent_backend=ABSENT)
    info = pytester.mkdir("absent-1.0.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: absent\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[crosstrain.backends]\nabsent = absent_backend:AbsentBackend\n"
    )
    pytester.syspathinsert()
    # For the processes that torchrun starts.
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-ra", "-v", *arguments)


def outcomes(result: pytest.RunResult) -> dict[str, str]:
    """What became of each test, by its name."""
    found: dict[str, str] = {}
    for line in result.outlines:
        name, _, rest = line.partition(" ")
        if "::" in name and rest.split()[:1]:
            found[name.partition("::")[2]] = rest.split()[0]
    return found


# What a test runs on
