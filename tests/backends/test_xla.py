"""XLA on the CPU: exact resume after a SIGKILL, random states, and no hidden cost.

Runs where torch_xla is installed and PJRT_DEVICE=CPU: `tox -e xla`. `test_conformance.py` puts it
through the step protocol.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SUPPORT
from step_runs import OPTIMIZERS, digits

from crosstrain import backends
from crosstrain.backends import BackendError
from crosstrain.engine import Events, create_supervised_evaluator, create_supervised_trainer

_FOUND = backends.probe("xla")
_ON_CPU = os.environ.get("PJRT_DEVICE") == "CPU"

pytestmark = pytest.mark.skipif(
    not (_FOUND.ok and _ON_CPU),
    reason=_FOUND.reason or "PJRT_DEVICE is not CPU, and these tests are about XLA's CPU device.",
)

SPECS = ("xla", "xla:bf16")

PROGRAM = SUPPORT / "xla_program.py"


def test_the_device_is_labelled_as_what_it_is() -> None:
    assert _FOUND.devices == ["XLA on the CPU, which is not a TPU"]
    assert {"torch", "torch_xla"} <= set(_FOUND.versions)


# Exact resume


def run_program(spec: str, folder: Path, kill_at: int | None = None) -> dict[str, Any]:
    """Trains in a process of its own, killed with SIGKILL after an iteration if one is given."""
    command = [sys.executable, str(PROGRAM), spec, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        last = line
        if kill_at is not None and line.startswith(f"iteration {kill_at} "):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    code = process.wait()
    assert code == (0 if kill_at is None else -signal.SIGKILL)
    return {} if kill_at is not None else json.loads(last)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_killed_runs_end_with_the_same_bits(spec: str, tmp_path: Path) -> None:
    whole = run_program(spec, tmp_path / "whole")
    killed = tmp_path / "killed"
    run_program(spec, killed, kill_at=7)
    run_program(spec, killed, kill_at=12)
    resumed = run_program(spec, killed)
    # A checkpoint was written every 4 iterations, the last one before the second kill at 12 or 8.
    assert resumed["first"] in (9, 13)
    assert whole["first"] == 1
    assert resumed["losses"] == whole["losses"][resumed["first"] - 1 :]
    assert resumed["weights"] == whole["weights"]
    assert resumed["random"] == whole["random"]


# Random states


def trainer(spec: str = "xla", **settings: Any) -> Any:
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(32, 10)
    )
    kind = settings.pop("kind", "sgd")
    optimizer = OPTIMIZERS[kind](model.parameters())
    backend = backends.get(spec).open()
    made = create_supervised_trainer(
        model, optimizer, torch.nn.functional.cross_entropy, backend=backend, **settings
    )
    backend.sync()
    backend.seed(11)
    return made, model, backend


def weights_after(evaluate: bool) -> list[torch.Tensor]:
    engine, model, backend = trainer()
    evaluator = create_supervised_evaluator(model, backend=backend)

    @engine.on(Events.ITERATION_COMPLETED)
    def look() -> None:
        if evaluate:
            evaluator.run(digits()[50:52])
            assert model(backend.put(digits()[0][0])).cpu().shape == (32, 10)
            backend.sync()

    engine.run(digits()[:5], max_epochs=2)
    return [p.detach().cpu() for p in model.parameters()]


def test_an_evaluation_leaves_the_trainings_random_numbers() -> None:
    with_it, without = weights_after(True), weights_after(False)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


def test_the_random_state_is_a_large_plain_number() -> None:
    with backends.get("xla") as backend:
        for state in (0, 2**63 + 5, 2**64 - 1):
            backend.set_rng_state({"xla": state})
            assert backend.rng_state() == {"xla": state}


def test_a_boundary_moves_the_state_only_after_a_draw() -> None:
    with backends.get("xla") as backend:
        backend.seed(1)
        for _ in range(3):
            backend.sync()
        assert backend.rng_state() == {"xla": 1}
        torch.rand(3, device=backend.device)
        backend.sync()
        assert backend.rng_state() != {"xla": 1}


def test_a_random_state_of_another_device_is_refused() -> None:
    with backends.get("xla") as backend:
        with pytest.raises(BackendError, match=r"that of \['cuda'\], not of an XLA device"):
            backend.set_rng_state({"cuda": torch.zeros(1)})
        with pytest.raises(BackendError, match="a device without one"):
            backend.set_rng_state({})


def test_randperm_on_the_device_is_refused_where_bits_must_repeat() -> None:
    with backends.get("xla") as backend:
        with backend.deterministic():
            with pytest.raises(BackendError, match="randperm on an XLA device"):
                torch.randperm(5, device=backend.device)
            assert sorted(torch.randperm(5).tolist()) == [0, 1, 2, 3, 4]
        with backend.deterministic(warn_only=True):
            drawn = []
            for _ in range(2):
                torch.manual_seed(4)
                with pytest.warns(UserWarning, match="drawn on the CPU"):
                    drawn.append(torch.randperm(50, device=backend.device))
            assert drawn[0].device.type == "xla"
            assert torch.equal(drawn[0].cpu(), drawn[1].cpu())
        assert sorted(torch.randperm(5, device=backend.device).tolist()) == [0, 1, 2, 3, 4]


# Cost


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_steady_step_compiles_nothing_and_waits_for_nothing(spec: str, kind: str) -> None:
    engine, _, backend = trainer(spec, kind=kind, max_norm=1.0)
    seen: list[dict[str, int]] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(backend.counts()))
    engine.run(digits()[:20])
    warm, end = seen[5], seen[-1]
    assert end["compilations"] == warm["compilations"]
    assert end["reads"] == warm["reads"]
    assert end["fallbacks"] == warm["fallbacks"]
    assert end["executions"] - warm["executions"] == len(seen) - 6


def test_reads_and_compilations_are_counted() -> None:
    with backends.get("xla") as backend:
        before = backend.counts()
        value = (torch.ones(3, 5, device=backend.device) * 2).sum()
        assert value.item() == 30
        after = backend.counts()
        assert after["compilations"] > before["compilations"]
        assert after["reads"] == before["reads"] + 1


# Preparation


def test_shared_weights_stay_shared_and_the_optimizer_follows() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(4, 4, bias=False)
            self.second = torch.nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> Any:
            return self.second(self.first(x))

    with backends.get("xla") as backend:
        model = Tied()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        backend.prepare(model, optimizer)
        assert model.second.weight is model.first.weight
        assert optimizer.param_groups[0]["params"] == [model.first.weight]
        before = model.first.weight.detach().cpu().clone()
        backend.backward(model(backend.put(torch.ones(2, 4))).sum(), optimizer)
        backend.step(optimizer)
        backend.sync()
        assert not torch.equal(model.second.weight.detach().cpu(), before)


def test_what_is_not_open_says_so() -> None:
    backend = backends.get("xla")
    with pytest.raises(BackendError, match="not open"):
        backend.rng_state()


def test_fp32_means_full_precision_while_it_is_open() -> None:
    from torch_xla import backends as settings

    before = settings.get_mat_mul_precision()
    with backends.get("xla"):
        assert settings.get_mat_mul_precision() == "highest"
    assert settings.get_mat_mul_precision() == before
    with backends.get("xla:bf16"):
        assert settings.get_mat_mul_precision() == before


def test_a_device_that_comes_too_late_for_autograd_is_told() -> None:
    program = (
        "import torch\n"
        "from crosstrain import backends\n"
        "torch.ones(2, requires_grad=True).sum().backward()\n"
        "try: backends.get('xla').open()\n"
        "except backends.BackendError as error: print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "refused: This process ran a backward pass before its XLA device" in done.stdout
