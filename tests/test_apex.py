"""NVIDIA's `apex.amp`: each opt level on a GPU, and what needs none with `enabled=False`.

The first part runs where there is a GPU and the right apex: `tox -e apex`. The second needs only
that apex.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from step_runs import digits

from crosstrain import backends
from crosstrain.backends import Availability, BackendError
from crosstrain.backends.apex import ApexBackend
from crosstrain.backends.apex_package import amp_absence
from crosstrain.backends.torch_backend import TorchBackend
from crosstrain.ci.conformance import CHECKS, applicable, check_backend

_FOUND = backends.probe("apex")
_PACKAGE = amp_absence()

on_gpu = pytest.mark.skipif(not _FOUND.ok, reason=_FOUND.reason or "-")
with_apex = pytest.mark.skipif(_PACKAGE is not None, reason=_PACKAGE.reason if _PACKAGE else "-")

# O2 and O3 keep fp16 weights, whose steps are rounded.
TOLERANCES = {"O0": 0.01, "O1": 0.05, "O2": 0.1, "O3": 0.3}


@on_gpu
@pytest.mark.parametrize("level", TOLERANCES)
@pytest.mark.parametrize("check", sorted(CHECKS))
def test_conforms(level: str, check: str) -> None:
    spec = f"apex:{level}"
    if check not in applicable(spec):
        pytest.skip(f"{spec} does not scale the loss")
    assert check_backend(spec, checks=[check], tolerance=TOLERANCES[level]) == []


class ApexOnCpu(ApexBackend):
    """The same calls of apex where there is no GPU: `enabled=False` leaves the numbers alone."""

    device = torch.device("cpu")

    def __init__(self, option: str | None = None) -> None:
        super().__init__(option, enabled=False)

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        return Availability(True)

    def _start(self, stack: ExitStack) -> None:
        import apex.amp  # type: ignore[import-not-found]

        self._amp = apex.amp

    rng_state = TorchBackend.rng_state
    set_rng_state = TorchBackend.set_rng_state
    seed = TorchBackend.seed


@with_apex
@pytest.mark.parametrize("check", ["agreement", "accumulation", "clipping", "prepare", "resume"])
@pytest.mark.parametrize("level", TOLERANCES)
def test_disabled_amp_does_what_fp32_does(level: str, check: str) -> None:
    assert check_backend(ApexOnCpu, level, checks=[check], tolerance=1e-6) == []


@with_apex
def test_one_initialisation_serves_trainer_and_evaluator() -> None:
    model: Any = torch.nn.Linear(64, 10)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with ApexOnCpu() as backend:
        model, optimizer = backend.prepare(model, optimizer)
        assert backend.prepare(model) == (model,)
        with pytest.raises(BackendError, match="initialised once only"):
            backend.prepare(torch.nn.Linear(2, 2))
        x, y = backend.put(digits()[0])
        loss = torch.nn.functional.cross_entropy(model(x), y)
        with pytest.raises(BackendError, match="one or several that prepare"):
            backend.backward(loss, None)
        backend.backward(loss, optimizer)
        assert backend.step(optimizer).applied
        assert backend.state_dict() == {}
