"""NVIDIA's `apex.amp`: what needs no GPU, with `enabled=False`, but an apex that has it.

Each opt level on a GPU is tested by `test_conformance.py`: `tox -e apex`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from step_runs import digits

from crosstrain.backends import Availability, BackendError
from crosstrain.backends.apex import ApexBackend, amp_absence
from crosstrain.backends.torch_backend import TorchBackend
from crosstrain.ci.conformance import check_backend

_ABSENT = amp_absence()

if _ABSENT is not None:
    pytest.skip(_ABSENT.reason, allow_module_level=True)


class ApexOnCpu(ApexBackend):
    """The same calls of apex where there is no GPU: `enabled=False` leaves the numbers alone."""

    def __init__(self, option: str | None = None) -> None:
        super().__init__(option, enabled=False)
        self.device = torch.device("cpu")

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        return Availability(True)

    def _start(self, stack: ExitStack) -> None:
        import apex.amp  # type: ignore[import-not-found]

        self._amp = apex.amp

    rng_state = TorchBackend.rng_state
    set_rng_state = TorchBackend.set_rng_state
    seed = TorchBackend.seed


@pytest.mark.parametrize("check", ["agreement", "accumulation", "clipping", "prepare", "resume"])
@pytest.mark.parametrize("level", ApexBackend.options)
def test_disabled_amp_does_what_fp32_does(level: str, check: str) -> None:
    # What was clipped is seen in the change of the weights, which rounds to a few 1e-5 of it.
    tolerance = 1e-4 if check == "clipping" else 1e-6
    assert check_backend(ApexOnCpu, level, checks=[check], tolerance=tolerance) == []


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
