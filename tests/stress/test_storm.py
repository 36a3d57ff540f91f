"""The storm in short: a run that is killed again and again loses nothing."""

from __future__ import annotations

from pathlib import Path

import on_xla
import pytest
from storm import storm

from crosstrain.ci.trials.processes import TrainingFailed

pytestmark = pytest.mark.usefixtures("forked_programs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "kills", "scheme"),
    [
        ("cpu", 4, ""),
        ("cpu", 2, "file://"),
        pytest.param("xla", 2, "", marks=on_xla.needs_xla),
        pytest.param("xla:bf16", 2, "", marks=on_xla.needs_xla),
    ],
)
def test_a_short_storm(tmp_path: Path, spec: str, kills: int, scheme: str) -> None:
    assert storm(spec, kills, workers=1, folder=tmp_path, seed=3, scheme=scheme) == ""


def test_a_training_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="There is no backend 'cqu'"):
        storm("cqu", kills=1, workers=0, folder=tmp_path, seed=0)
