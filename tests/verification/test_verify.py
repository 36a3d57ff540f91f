"""`verify` finds each planted fault, names what differs first and where, and passes the exact."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import SUPPORT
from rich.console import Console

from crosstrain.backends import BackendUnavailable
from crosstrain.ci import Verdict, VerifyError, cli, verify
from crosstrain.ci.verification.command import print_verdict

TARGETS = SUPPORT / "verify_targets.py"

# In test_verify_command.py each process is an interpreter of its own, as for everybody else.
pytestmark = pytest.mark.usefixtures("forked_programs")

# What each fault is found by: stopped after this iteration, the status, the first thing that
# differs, the iteration, and a word of the advice.
FAULTS: Mapping[str, tuple[int, str, str, str, int, str]] = {
    "unseeded_generator": (8, "not repeatable", "batch", "", 1, "current_sample"),
    "own_generator": (8, "not exact", "batch", "", 9, "current_sample"),
    "hidden_state": (8, "not exact", "loss", "", 9, "Here: Counting.calls"),
    "reseeding": (8, "not exact", "random after", "torch", 10, "Do not reseed"),
    # The optimizer's own state holds the next rate; the scheduler's is what comes after it.
    "unsaved_scheduler": (4, "not exact", "setting", "'lr' of optimizer", 6, "scheduler"),
    "unsaved_stream": (8, "not exact", "parameter", "model.4.weight", 9, "noise"),
    "nondeterministic": (8, "not repeatable", "gradient", "model.0.weight", 1, "autograd"),
    "ends_itself": (4, "not exact", "", "", 11, "early stopping"),
    # Programs that users wrote; the advice that is right is the first.
    "negatives": (6, "not exact", "batch", "", 7, "Here: Negatives.draw_negatives"),
    "counting_sampler": (8, "not exact", "batch", "", 9, "Here: CountingSampler"),
    "normalizer": (8, "not exact", "loss", "", 9, "what prepare_batch or a handler"),
    "second_loader": (8, "not exact", "loss", "", 9, "draws from a second loader"),
    "unfreezes_once": (
        14,
        "not exact",
        "gradient",
        "model.0.weight",
        15,
        "such as one with once=2",
    ),
}
FIRST = ("negatives", "counting_sampler", "normalizer", "unfreezes_once")


@pytest.fixture(scope="module")
def verdicts() -> Iterator[Mapping[str, Future[Verdict]]]:
    """All verifications, two at a time: each one mostly waits for a process to import torch."""
    with ThreadPoolExecutor(2) as pool:
        # Each test waits for its own.
        yield {
            name: pool.submit(verify, f"{TARGETS}:{name}", at=[place], kills=0)
            for name, (place, *_) in FAULTS.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name: str, verdicts: Mapping[str, Future[Verdict]]) -> None:
    place, status, kind, thing, iteration, advice = FAULTS[name]
    verdict = verdicts[name].result()
    assert not verdict.exact
    assert verdict.status == status
    difference = verdict.difference
    assert difference is not None
    found = difference.thing or ("", "")
    assert tuple(found) == (kind, thing)
    assert difference.iteration == iteration
    assert advice in (verdict.causes[0] if name in FIRST else " ".join(verdict.causes))
    assert verdict.runs[0].resumed_from == (place,)
    assert verdict.iterations == {"ends_itself": 10, "unfreezes_once": 18}.get(name, 12)


def test_a_dataset_with_its_own_generator_is_also_warned_of(
    verdicts: Mapping[str, Future[Verdict]],
) -> None:
    assert any("generator" in text for text in verdicts["own_generator"].result().warnings)


def command(*arguments: str | Path) -> int:
    return cli.main(["verify", *map(str, arguments)])


def test_the_transformer_of_the_examples_resumes_exactly(repo_root: Path, tmp_path: Path) -> None:
    target = f"{repo_root / 'examples' / 'verify_transformer.py'}:training"
    verdict = verify(target, at=[21], kills=0, workers=[0, 2], folder=tmp_path / "kept")
    assert verdict.exact, verdict
    assert verdict.runs[0].workers == (0, 2)
    assert (tmp_path / "kept" / "straight.trace").is_file()


def test_what_was_found_is_printed_with_its_causes(
    verdicts: Mapping[str, Future[Verdict]],
) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_verdict(console, verdicts["unsaved_stream"].result())
    file: Any = console.file
    text = " ".join(file.getvalue().split())
    assert "It does not resume exactly" in text
    assert "iteration 9 (epoch 2): the parameter 'model.4.weight' differs" in text
    assert "noise from a generator of its own" in text
    print_verdict(console, verdicts["nondeterministic"].result())
    assert "It does not repeat: two runs that nobody interrupted" in file.getvalue()


def test_a_run_that_cannot_go_on_is_not_exact() -> None:
    verdict = verify(f"{TARGETS}:fails_when_resumed", at=[5], kills=0)
    assert verdict.status == "not exact"
    assert "this training cannot go on" in verdict.problem
    assert verdict.difference is None


def test_a_training_that_fails_by_itself_cannot_be_verified() -> None:
    with pytest.raises(VerifyError, match=r"to its end: RuntimeError: the third iteration is bad"):
        verify(f"{TARGETS}:fails")


def test_the_time_limit_ends_it() -> None:
    with pytest.raises(VerifyError, match=r"limit of 5 s is over.*--time-limit"):
        verify(f"{TARGETS}:sleeps", time_limit=5)


def test_an_iteration_out_of_range_is_named() -> None:
    with pytest.raises(VerifyError, match=r"has 12 iterations.*1 to 11, and not after 12"):
        verify(f"{TARGETS}:exact", at=[12])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{TARGETS}:no_such_function"], "no function 'no_such_function'"),
        ([f"{TARGETS}:own_generator", "--workers", "2"], "no argument `workers`"),
        ([f"{TARGETS}:exact", "--backend", "apex:O1"], "apex:O1"),
        (["nonsense"], "PACKAGE.MODULE:FUNCTION"),
    ],
)
def test_what_cannot_be_verified_is_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("crosstrain verify: error: ")
    assert message in said


@pytest.mark.parametrize(
    "arguments",
    [{"kills": -1}, {"workers": []}, {"workers": [-1]}, {"every": 0}],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(VerifyError, match="at least"):
        verify(f"{TARGETS}:exact", **arguments)


def test_a_run_that_was_killed_after_its_end_is_not_called_identical() -> None:
    # The one kill, of this seed, comes before the first checkpoint.
    with pytest.raises(VerifyError, match=r"No run was resumed before its end.*--at"):
        verify(f"{TARGETS}:exact", at=[], kills=1, every=1000)


def test_a_run_without_a_resume_is_told_beside_those_with_one() -> None:
    console = Console(file=io.StringIO(), width=200)
    verdict = verify(f"{TARGETS}:exact", at=[5], kills=1, every=1000)
    assert verdict.exact
    assert [run.resumed for run in verdict.runs] == [True, False]
    print_verdict(console, verdict)
    file: Any = console.file
    assert file.getvalue().count("identical") == 1
    assert "never resumed before its end" in file.getvalue()


def test_a_verification_that_interrupts_nothing_is_refused() -> None:
    with pytest.raises(VerifyError, match="Nothing would be interrupted"):
        verify(f"{TARGETS}:exact", at=[], kills=0)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VerifyError, match=r"is not empty\. Name another"):
        verify(f"{TARGETS}:exact", folder=tmp_path)


def test_an_unavailable_backend_has_the_reason_of_its_probe() -> None:
    with pytest.raises(BackendUnavailable):
        verify(f"{TARGETS}:exact", backend="apex:O1")
