"""Cells of the matrix: each in a process of its own, which is found dead, late or lying.

The command is a stand-in for `crosstrain.ci.matrix.run_one`, which plays what real cells must not:
it hangs, crashes and leaves processes behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crosstrain.ci.matrix.outcome import Cell, Outcome
from crosstrain.ci.matrix.run_all import MARK, CellPlan, run_cells
from crosstrain.engine.machine import began as is_alive

# Plays the part that the scenario's name says.
STAND_IN = """
import os, pathlib, signal, subprocess, sys, time
from crosstrain.ci.matrix.outcome import Outcome

spec, scenario = sys.argv[1:3]
folder = pathlib.Path(sys.argv[sys.argv.index("--folder") + 1])
shared = folder.parent.parent.parent

def sleeper(name):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (shared / name).write_text(str(child.pid))

def write(**more):
    given = {"spec": spec, "scenario": scenario, "status": "passed"} | more
    Outcome(**given).write(folder / "outcome.json")

match scenario.partition("-")[0]:
    case "passes":
        write(losses=(1.0, float("nan")))
    case "fails":
        write(status="failed", reason="the weights differ")
    case "crashes":
        print("what the library said", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    case "exits":
        sys.exit(3)
    case "lies":
        write(scenario="passes")
    case "scribbles":
        (folder / "outcome.json").write_text("{}")
    case "hangs":
        sleeper("child")
        print("waiting for the collective", file=sys.stderr, flush=True)
        (shared / "hanging").write_text(str(os.getpid()))
        time.sleep(600)
    case "leaves":
        sleeper("child")
        write()
    case "meets":
        # Passes only if the other one runs at the same time.
        (shared / scenario).touch()
        other = shared / ("meets-b" if scenario == "meets-a" else "meets-a")
        while not other.exists():
            time.sleep(0.01)
        write()
    case "alone":
        # Fails if another one runs at the same time.
        try:
            (shared / "taken").mkdir()
        except FileExistsError:
            sys.exit("the device is taken")
        time.sleep(0.3)
        (shared / "taken").rmdir()
        write()
    case "target":
        write(figures={"target": sys.argv[sys.argv.index("--target") + 1]})
"""


class Listener:
    def __init__(self) -> None:
        self.events: list[str] = []

    def started(self, cell: Cell) -> None:
        self.events.append(f"started {cell.scenario}")

    def ended(self, outcome: Outcome) -> None:
        self.events.append(f"ended {outcome.scenario}")


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., CellPlan]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def make(
        *scenarios: str, spec: str = "cpu:bf16", timeout: float = 120, **more: object
    ) -> CellPlan:
        return CellPlan(
            cells=tuple(Cell(spec, scenario) for scenario in scenarios),
            folder=tmp_path,
            timeout=timeout,
            command=(str(script),),
            **more,
        )

    return make


def play(plan: CellPlan) -> dict[str, Outcome]:
    return {outcome.scenario: outcome for outcome in run_cells(plan, Listener())}


def test_outcomes_are_those_that_the_cells_wrote(plan: Callable[..., CellPlan]) -> None:
    found = play(plan("passes", "fails"))
    assert found["passes"].status == "passed"
    assert str(found["passes"].losses) == "(1.0, nan)"
    assert (found["fails"].status, found["fails"].reason) == ("failed", "the weights differ")


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("crashes", ("SIGSEGV", "what the library said")),
        ("exits", ("exit code 3", "stderr is empty")),
        ("lies", ("the outcome of another cell", "passes")),
        ("scribbles", ("outcome.json", "missing keys")),
    ],
)
def test_a_cell_without_an_outcome_of_its_own_is_an_error(
    plan: Callable[..., CellPlan], scenario: str, words: tuple[str, ...]
) -> None:
    outcome = play(plan(scenario))[scenario]
    assert outcome.status == "error"
    assert all(word in outcome.reason for word in words), outcome.reason


def test_a_late_cell_is_killed_with_all_that_it_started(
    plan: Callable[..., CellPlan], tmp_path: Path
) -> None:
    # The interpreter has to come up within the limit, or there is no child to be killed.
    outcome = play(plan("hangs", timeout=15))["hangs"]
    assert outcome.status == "timeout"
    assert "15 s" in outcome.reason
    assert "waiting for the collective" in outcome.reason
    assert outcome.seconds >= 15
    for name in ("hanging", "child"):
        assert not is_alive(int((tmp_path / name).read_text()))


def test_what_a_cell_leaves_behind_is_killed(plan: Callable[..., CellPlan], tmp_path: Path) -> None:
    assert play(plan("leaves"))["leaves"].status == "passed"
    assert not is_alive(int((tmp_path / "child").read_text()))


def test_closing_kills_what_runs(plan: Callable[..., CellPlan], tmp_path: Path) -> None:
    results = run_cells(plan("hangs", "passes", jobs=2), Listener())
    assert next(results).scenario == "passes"
    deadline = time.monotonic() + 60
    while not (tmp_path / "hanging").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int((tmp_path / name).read_text()) for name in ("hanging", "child")]
    assert all(map(is_alive, pids))
    results.close()
    assert not any(map(is_alive, pids))


def test_cells_run_at_the_same_time(plan: Callable[..., CellPlan]) -> None:
    found = play(plan("meets-a", "meets-b", jobs=2, timeout=60))
    assert {outcome.status for outcome in found.values()} == {"passed"}


def test_cells_of_an_exclusive_device_take_turns(plan: Callable[..., CellPlan]) -> None:
    taken = frozenset({"tpu"})
    found = play(plan("alone-1", "alone-2", "alone-3", spec="tpu", jobs=3, exclusive=taken))
    assert {outcome.status for outcome in found.values()} == {"passed"}
    assert len(found) == 3


def test_one_at_a_time_by_default(plan: Callable[..., CellPlan]) -> None:
    listener = Listener()
    list(run_cells(plan("passes", "fails"), listener))
    assert listener.events == ["started passes", "ended passes", "started fails", "ended fails"]


def test_the_folder_of_a_cell_that_did_not_pass_is_kept(
    plan: Callable[..., CellPlan], tmp_path: Path
) -> None:
    play(plan("passes", "crashes"))
    # CI's archives refuse colons in the names of files.
    kept = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("cells/*/*"))
    assert kept == ["cells/cpu_bf16/crashes"]
    assert "what the library said" in (tmp_path / kept[0] / "stderr.txt").read_text()


def test_the_target_reaches_the_cells(plan: Callable[..., CellPlan]) -> None:
    outcome = play(plan("target", target="training:build"))["target"]
    assert outcome.figures == {"target": "training:build"}


def test_our_own_environment_carries_no_mark() -> None:
    assert MARK not in os.environ
