"""What a killed run had done since its last checkpoint is compared when it is done once more."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from done_again_program import OUTSIDE, Case
from processes import exit_of, run_program, run_world

PROGRAM = "done_again_program.py"
CAME_OUT = "was done before, after the same checkpoint, and has come out otherwise now"

pytestmark = pytest.mark.usefixtures("forked_programs")


def killed(folder: Path, case: Case) -> None:
    """Starts a run that kills itself."""
    assert exit_of(PROGRAM, str(folder), case.text()) == -signal.SIGKILL


def finished(folder: Path, case: Case) -> dict[str, Any]:
    """Starts a run that ends; returns what it told."""
    run_program(PROGRAM, str(folder), case.text())
    told: dict[str, Any] = json.loads((folder / "told-0.json").read_text())
    return told


def draw(seed: int, **given: Any) -> Case:
    """Returns a case that is saved, and killed at least one iteration later."""
    drawn = random.Random(seed)
    every = drawn.randint(2, 7)
    kill = every * drawn.randint(1, 2) + drawn.randint(2, every)
    place = drawn.choice(["loss", "rate", "weights"])
    chosen = {"workers": drawn.choice([0, 0, 2]), "background": drawn.random() < 0.5}
    return Case(**{"place": place, "every": every, "kill": kill, **chosen, **given})


def told_of(warnings: list[str]) -> list[str]:
    return [one for one in warnings if CAME_OUT in one]


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("seed", range(2))
def test_what_depends_on_anything_outside_is_told(tmp_path: Path, outside: str, seed: int) -> None:
    case = draw(seed, outside=outside)
    killed(tmp_path, case)
    told = finished(tmp_path, replace(case, kill=0))
    assert told["resumed"]
    assert told_of(told["warnings"]), (case, told)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_depends_on_nothing_is_proven_and_nothing_told(
    tmp_path: Path, seed: int
) -> None:
    case = draw(seed)
    (tmp_path / "straight").mkdir()
    straight = finished(tmp_path / "straight", replace(case, kill=0))
    # Killed twice: what the resumed run has done is noted as well.
    killed(tmp_path, case)
    killed(tmp_path, case)
    told = finished(tmp_path, replace(case, kill=0))
    assert told["resumed"]
    assert told["weights"] == straight["weights"]
    assert told["warnings"] == straight["warnings"] == []
    assert "done again as before the resume: iteration" in told["proof"]
    assert [path.suffix for path in (tmp_path / "saved").iterdir()] == [".pt", ".pt"]


def test_draws_that_decide_nothing_are_no_difference(tmp_path: Path) -> None:
    case = draw(1, outside="a file", place="log")
    killed(tmp_path, case)
    told = finished(tmp_path, replace(case, kill=0))
    assert told_of(told["warnings"]) == []
    assert "done again as before the resume: iteration" in told["proof"]


def test_with_off_nothing_is_kept_and_what_lies_outside_goes_unseen(tmp_path: Path) -> None:
    case = Case("a file", kill=6, strict="off")
    killed(tmp_path, case)
    assert [*(tmp_path / "saved").glob(".crosstrain.done*")] == []
    told = finished(tmp_path, replace(case, kill=0))
    assert told["resumed"]
    assert told["warnings"] == []


def test_an_error_ends_the_run_each_time_until_it_is_let_pass(tmp_path: Path) -> None:
    case = Case("a file", kill=6, strict="error")
    killed(tmp_path, case)
    for _ in range(2):
        told = finished(tmp_path, replace(case, kill=0))
        assert CAME_OUT in told["error"]
    told = finished(tmp_path, replace(case, kill=0, strict="warn"))
    assert len(told_of(told["warnings"])) == 1
    assert told["error"] is None


def test_a_difference_that_was_told_is_not_told_again(tmp_path: Path) -> None:
    case = Case(every=7, kill=13)
    killed(tmp_path, case)
    # Another learning rate, on purpose: told once, at its first iteration, and from then on it is
    # this run that is compared.
    other = replace(case, rate=0.2)
    killed(tmp_path, other)
    told = finished(tmp_path, replace(other, kill=0))
    assert told_of(told["warnings"]) == []
    assert "iteration 8, 9, 11" in told["proof"]


def test_under_other_conditions_nothing_is_compared(tmp_path: Path) -> None:
    case = Case("a file", kill=6)
    killed(tmp_path, case)
    told = finished(tmp_path, replace(case, kill=0, threads=2))
    assert told_of(told["warnings"]) == []
    assert "iterations done again: the conditions are others now" in told["proof"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _other(change: Any) -> Any:
    def damage(path: Path) -> None:
        told = json.loads(path.read_text())
        path.write_text(json.dumps(change(told)))

    return damage


DAMAGES = {
    "cut": _cut,
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(bytes(range(256))),
    "a folder": _folder,
    "a pipe": _pipe,
    "a list": _other(lambda told: [told]),
    "another format": _other(lambda told: {**told, "format": "x"}),
    "no checkpoints": _other(lambda told: {**told, "checkpoints": 3}),
    "no marks": _other(
        lambda told: {**told, "checkpoints": {key: {"4": {}} for key in told["checkpoints"]}}
    ),
    "deep": lambda path: path.write_text("[" * 100_000),
    "endless": lambda path: path.write_text('{"format": "' + "x" * 10**6),
}


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed three iterations after a checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    killed(folder, Case(every=4, kill=8))
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_was_written_is_passed_over(
    tmp_path: Path, killed_run: Path, damage: str
) -> None:
    shutil.copytree(killed_run, tmp_path, dirs_exist_ok=True)
    kept = tmp_path / "saved" / ".crosstrain.done"
    assert kept.is_file()
    DAMAGES[damage](kept)
    told = finished(tmp_path, Case(every=4))
    assert told["resumed"]
    assert told["warnings"] == []
    assert "done again" not in told["proof"]
    assert [*(tmp_path / "saved").glob(".crosstrain-*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("outside", ["", "a file"])
def test_of_several_processes_the_first_compares(tmp_path: Path, outside: str) -> None:
    case = Case(outside, place="weights", every=2, kill=4)
    with pytest.raises(AssertionError):
        run_world(2, PROGRAM, str(tmp_path), case.text())
    run_world(2, PROGRAM, str(tmp_path), replace(case, kill=0).text())
    first, other = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert len(told_of(first["warnings"])) == bool(outside)
    assert told_of(other["warnings"]) == []
    assert ("done again as before" in first["proof"]) is not bool(outside)
