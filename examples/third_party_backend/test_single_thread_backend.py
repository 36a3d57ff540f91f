"""The test that a package with a backend should have: it keeps every promise of the protocol."""

from __future__ import annotations

import pytest

from crosstrain.ci.conformance import applicable, check_backend

SPECS = ("single-thread", "single-thread:bf16")


@pytest.mark.parametrize(
    ("spec", "check"), [(spec, check) for spec in SPECS for check in applicable(spec)]
)
def test_conforms(spec: str, check: str) -> None:
    assert check_backend(spec, checks=[check]) == []
