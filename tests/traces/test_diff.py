"""`crosstrain diff` names the first iteration, and the first thing in it, where two runs part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trace_runs import ITERATIONS, traced

from crosstrain.ci import Training, cli
from crosstrain.ci.traces.diff import compare
from crosstrain.ci.traces.file import Trace, TraceError
from crosstrain.engine import Events, StepEvents

AT = 7


def _at(event: Any, action: Callable[[Training], object]) -> Callable[[Training], None]:
    def change(training: Training) -> None:
        training.trainer.add_event_handler(event(once=AT), lambda: action(training))

    return change


def _nudge(training: Training) -> None:
    with torch.no_grad():
        training.to_save["model"][4].bias[1] += 1e-6


def _nudge_gradient(training: Training) -> None:
    training.to_save["model"][0].weight.grad[2, 0] += 1e-6


def _lower_rate(training: Training) -> None:
    training.to_save["optimizer"].param_groups[0]["lr"] *= 0.5


def _reseed(training: Training) -> None:
    torch.manual_seed(99)


def _change_batch(training: Training) -> None:
    training.trainer.state.batch[0][0, 0] += 1e-6


# What is done at iteration 7, and what is the first to show it.
CHANGES: dict[str, tuple[Callable[[Training], None], str, str]] = {
    "batch": (_at(Events.ITERATION_STARTED, _change_batch), "batch", ""),
    "stream before": (_at(Events.ITERATION_STARTED, _reseed), "random", "torch"),
    "rate": (_at(Events.ITERATION_STARTED, _lower_rate), "setting", "'lr' of optimizer"),
    "weight before": (_at(Events.ITERATION_STARTED, _nudge), "loss", ""),
    "gradient": (_at(StepEvents.BACKWARD_COMPLETED, _nudge_gradient), "gradient", "model.0.weight"),
    "weight": (_at(Events.ITERATION_COMPLETED, _nudge), "parameter", "model.4.bias"),
    "stream": (_at(Events.ITERATION_COMPLETED, _reseed), "random after", "torch"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_first_thing_that_differs_is_named(name: str, tmp_path: Path) -> None:
    change, kind, thing = CHANGES[name]
    traced(tmp_path / "a")
    traced(tmp_path / "b", change=change)
    found = compare(Trace(tmp_path / "a"), Trace(tmp_path / "b"))
    assert found.tolerance is None
    difference = found.difference
    assert difference is not None
    assert difference.thing is not None
    assert (difference.iteration, *difference.thing) == (AT, kind, thing)


def diff(*arguments: str | Path) -> int:
    return cli.main(["diff", *map(str, arguments)])


def test_the_command_says_how_it_compared_and_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, same = (tmp_path / name for name in ("a", "b", "same"))
    traced(a)
    traced(same)
    traced(b, change=CHANGES["weight"][0])
    assert diff(a, same) == 0
    text = capsys.readouterr().out
    assert f"bit by bit, over {ITERATIONS} iterations. Both runs were on cpu:fp32" in text
    assert "No difference." in text
    assert diff(a, b) == 1
    text = capsys.readouterr().out
    assert "They part at iteration 7 (epoch 2): the parameter 'model.4.bias' differs." in text
    assert "relative deviation" in text
    assert diff(a, b, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["equal"] is False
    assert report["difference"]["iteration"] == 7
    assert report["difference"]["thing"] == {"kind": "parameter", "name": "model.4.bias"}
    # The same traces by norms: a millionth is nothing.
    assert diff(a, b, "--tolerance", "1e-3") == 0
    assert "by norms, within 0.001" in capsys.readouterr().out


def test_across_kinds_runs_are_compared_by_norms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {spec: tmp_path / spec for spec in ("cpu", "cpu:bf16", "cpu:fp16")}
    for spec, path in paths.items():
        traced(path, spec, dropout=0.0)
    found = compare(Trace(paths["cpu"]), Trace(paths["cpu:bf16"]))
    assert found.tolerance == 2e-2
    assert "One run was on cpu:fp32" in found.why
    assert found.difference is None or found.difference.iteration > 3
    # Steps that overflow are skipped in fp16, so the weights may part; the scale is no difference.
    found = compare(Trace(paths["cpu"]), Trace(paths["cpu:fp16"]))
    assert "Gradients are left out" in found.why
    assert found.difference is None or found.difference.iteration > 1
    assert diff(paths["cpu"], paths["cpu:bf16"], "--exact") == 1
    assert "Bit by bit was asked for" in capsys.readouterr().out


def test_across_kinds_a_real_difference_is_still_found(tmp_path: Path) -> None:
    traced(tmp_path / "a", dropout=0.0)

    def lower(training: Training) -> None:
        _lower_rate(training)

    change = _at(Events.ITERATION_STARTED, lower)
    traced(tmp_path / "b", "cpu:bf16", dropout=0.0, change=change)
    found = compare(Trace(tmp_path / "a"), Trace(tmp_path / "b"), tolerance=0.2).difference
    assert found is not None
    assert found.iteration == AT
    assert found.thing is not None
    assert found.thing.kind == "setting"


def test_a_run_that_goes_on_for_longer_differs_at_its_end(tmp_path: Path) -> None:
    traced(tmp_path / "a")
    traced(
        tmp_path / "b",
        change=_at(Events.ITERATION_COMPLETED, lambda training: training.trainer.terminate()),
    )
    found = compare(Trace(tmp_path / "a"), Trace(tmp_path / "b")).difference
    assert found is not None
    assert found.thing is None
    assert str(found) == "iteration 8 (epoch 2) is missing in the second run"


@pytest.mark.parametrize("options", [("--exact", "--tolerance", "0.1"), ()])
def test_unusable_input_is_exit_code_2(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traced(tmp_path / "a")
    other = tmp_path / "a" if options else tmp_path / "missing"
    assert diff(tmp_path / "a", other, *options) == 2
    assert capsys.readouterr().err.startswith("crosstrain diff: error: ")


def test_traces_without_a_common_iteration_cannot_be_compared(tmp_path: Path) -> None:
    traced(tmp_path / "a")
    lines = (tmp_path / "a").read_bytes().splitlines(keepends=True)
    (tmp_path / "b").write_bytes(lines[0] + lines[-1])
    (tmp_path / "a").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(TraceError, match=r"no iteration in common.*1 to 11.*12 to 12"):
        compare(Trace(tmp_path / "a"), Trace(tmp_path / "b"))
