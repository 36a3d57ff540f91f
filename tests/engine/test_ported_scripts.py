"""Scripts of pytorch-ignite's examples with other import lines give what they give there."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from ported_scripts import IGNITE, OURS, SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_import_line_and_the_same_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some scripts silence it, and the tests that come after are to hear it again.
    monkeypatch.setattr(logging.getLogger("crosstrain.engine.Engine"), "disabled", False)
    results = []
    for lib, place in ((IGNITE, tmp_path / "ignite"), (OURS, tmp_path / "ours")):
        place.mkdir()
        with warnings.catch_warnings():
            # What torch and pytorch-ignite deprecate is not what is compared.
            warnings.simplefilter("ignore", DeprecationWarning)
            results.append(SCRIPTS[name](lib, place))
    assert results[1] == results[0]
