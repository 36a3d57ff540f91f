"""`verify` passes networks of other libraries, where they are installed and fit this torch."""

from __future__ import annotations

import importlib

import pytest
from processes import SUPPORT

from crosstrain.ci import verify

TARGET = SUPPORT / "vision_target.py"


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_network_of_another_library_resumes_exactly(library: str) -> None:
    try:
        importlib.import_module(library)
    except (ImportError, RuntimeError, AttributeError) as error:
        # A torchvision that was built for another torch raises RuntimeError.
        pytest.skip(f"{library} is not usable here: {error}")
    verdict = verify(f"{TARGET}:{library}", at=[2, 4], kills=0, workers=[0])
    assert verdict.exact, verdict
