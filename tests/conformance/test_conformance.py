"""Backends that are here keep the step protocol, and one that breaks a promise is caught."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import forked
import pytest
import torch
from broken_backends import BROKEN, ProbeRaises, ProbeSetsVariable, WithMasters
from broken_steps import LosesGradients, OwnStream

from crosstrain.backends import Availability, BackendUnavailable, UnknownBackend
from crosstrain.backends.cpu import CpuBackend
from crosstrain.backends.null import NullBackend
from crosstrain.ci.conformance import CHECKS, applicable, check_backend, main

# By how much, as a share, the numbers of a backend may differ from those of fp32 on the CPU, where
# that is not the usual: O2 and O3 keep fp16 weights, whose steps are rounded.
TOLERANCES = {"apex:O0": 0.01, "apex:O2": 0.1, "apex:O3": 0.3}

SCALING = [name for name, check in CHECKS.items() if check.scales]


@pytest.mark.parametrize("check", sorted(set(CHECKS) - set(SCALING)))
def test_each_backend_conforms(backend_spec: str, check: str) -> None:
    tolerance = TOLERANCES.get(backend_spec, 0.05)
    assert check_backend(backend_spec, checks=[check], tolerance=tolerance) == []


@pytest.mark.needs("loss_scaling")
@pytest.mark.parametrize("check", SCALING)
def test_each_backend_that_scales_the_loss_conforms(backend_spec: str, check: str) -> None:
    tolerance = TOLERANCES.get(backend_spec, 0.05)
    assert check_backend(backend_spec, checks=[check], tolerance=tolerance) == []


@pytest.mark.parametrize("check", applicable("null"))
def test_the_null_backend_conforms(check: str) -> None:
    assert check_backend("null", checks=[check]) == []


@pytest.mark.parametrize("option", ["fsdp", "fsdp-bf16", "fsdp-fp16"])
def test_sharding_conforms_in_one_process(option: str) -> None:
    assert check_backend(f"cpu:{option}") == []


def test_optimizers_may_hold_copies_of_the_weights() -> None:
    assert check_backend(WithMasters, checks=["prepare", "agreement", "clipping"]) == []


def test_each_check_says_what_it_is_for() -> None:
    assert all(check.promise for check in CHECKS.values())
    assert len({check.promise for check in CHECKS.values()}) == len(CHECKS)


def test_what_does_not_apply_is_left_out() -> None:
    assert set(applicable("cpu:fp16")) == set(CHECKS)
    assert "overflow" not in applicable("cpu")
    assert "agreement" not in applicable("null")
    assert applicable(CpuBackend, "bf16") == applicable("cpu:bf16")


@pytest.fixture
def _as_before() -> Iterator[None]:
    """Undoes what a broken backend does to torch."""
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
    torch.use_deterministic_algorithms(False)
    torch.set_autocast_enabled("cpu", False)


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize(
    ("check", "kind", "option"), [pytest.param(*case, id=case[1].__name__) for case in BROKEN]
)
def test_a_broken_backend_is_caught(check: str, kind: type[Any], option: str) -> None:
    findings = check_backend(kind, option, checks=[check])
    assert [finding.check for finding in findings] == [check]
    assert findings[0].problem.strip()


def test_each_check_catches_something() -> None:
    assert {check for check, _, _ in BROKEN} == set(CHECKS)


def test_a_stream_of_its_own_that_is_kept_properly_conforms() -> None:
    names = ["deterministic_results", "random_states", "host_streams", "resume"]
    assert check_backend(OwnStream, checks=names) == []


def test_findings_name_the_check_and_the_problem() -> None:
    (finding,) = check_backend(ProbeRaises, checks=["probe"])
    assert str(finding) == "probe: It raised RuntimeError: no driver"
    (finding,) = check_backend(LosesGradients, checks=["agreement"])
    assert "in fp32 on the CPU it is" in finding.problem


def test_a_probe_that_raises_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(option: str | None = None) -> Availability:
        raise RuntimeError("no driver")

    monkeypatch.setattr(NullBackend, "probe", raising)
    (finding,) = check_backend("null")
    assert (finding.check, "RuntimeError" in finding.problem) == ("probe", True)
    assert main(["null"]) == 1
    said = capsys.readouterr().out
    assert "FAIL null probe" in said
    assert "no driver. A probe must not raise: it returns Availability(" in said


def test_checks_leave_variables_and_generators_as_they_were() -> None:
    variables, generator = dict(os.environ), torch.get_rng_state()
    assert check_backend(ProbeSetsVariable)
    assert dict(os.environ) == variables
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_probe_may_name_kinds_of_str_and_nothing_else() -> None:
    # A class of torch's, which a safe load of a checkpoint would refuse.
    assert type(torch.__version__) is not str
    found = Availability(True, versions={"torch": torch.__version__}, devices=[torch.__version__])
    assert [type(word) for word in (*found.versions.values(), *found.devices)] == [str, str]
    assert found.versions["torch"] == torch.__version__
    with pytest.raises(TypeError, match=r"are words; got 3, a int\. Write str"):
        Availability(True, devices=[3])


def gone(option: str | None = None) -> Availability:
    return Availability(False, "Gone.", "Find it.")


def test_what_cannot_run_here_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "probe", gone)
    with pytest.raises(BackendUnavailable, match="Gone"):
        check_backend("cpu")


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no checks \['nope'\]"):
        check_backend("cpu", checks=["nope"])
    with pytest.raises(UnknownBackend):
        check_backend("cpuu")
    with pytest.raises(ValueError, match="leave option='bf16' out"):
        check_backend("cpu", "bf16")


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["null"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["ok", "null", name] for name in applicable("null")]
    monkeypatch.setattr(NullBackend, "put", lambda self, batch: None)
    assert main(["null"]) == 1
    assert "FAIL null put" in capsys.readouterr().out
    monkeypatch.setattr(NullBackend, "probe", gone)
    assert main(["null"]) == 2
    assert "Gone. Remedy: Find it." in capsys.readouterr().err


def test_command_line_as_a_module() -> None:
    command = [sys.executable, "-m", "crosstrain.ci.conformance", "null", "cpu:bf17"]
    result = forked.run(command, cwd="/")
    assert result.returncode == 2
    assert "Did you mean 'cpu:bf16'?" in result.stderr
