"""The storm in short: a run that is killed again and again loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosstrain.ci.demo import DemoFailed
from crosstrain.ci.storm import storm


@pytest.mark.slow
def test_a_short_storm(tmp_path: Path) -> None:
    assert storm("cpu", kills=4, workers=1, folder=tmp_path, seed=3) == []


def test_a_training_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match="There is no backend 'cqu'"):
        storm("cqu", kills=1, workers=0, folder=tmp_path, seed=0)
