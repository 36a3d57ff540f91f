"""Trainings whose processes are not alike resume exactly, or are told what they lack."""

from __future__ import annotations

import random
from typing import Any

import pytest
from processes import results, run_world
from ranks_parted_program import EPOCHS, EXACT, ITERATIONS

# Three: a sum of two is the same in any order.
PROCESSES = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, forked_programs: None) -> list[dict[str, Any]]:
    """What came of each of the trainings, in each process; one world for all tests."""
    folder = tmp_path_factory.mktemp("parted")
    at = [random.randrange(1, ITERATIONS * EPOCHS) for _ in EXACT]
    print("stopped at", dict(zip((one.__name__ for one in EXACT), at, strict=True)))
    program = ("ranks_parted_program.py", str(folder), *map(str, at))
    run_world(PROCESSES, *program, CROSSTRAIN_TIMEOUT="30")
    return results(folder, PROCESSES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.__name__ for one in EXACT])
def test_each_process_goes_on_as_it_was(found: Any, name: str) -> None:
    """Models that part, statistics of each, buffers within a window, sums, what is not sent yet."""
    assert [rank[name] for rank in found] == [True] * PROCESSES


def test_what_goes_on_exactly_is_not_told(found: Any) -> None:
    for rank in found:
        assert not [text for text in rank["in vain"] if "esume" in text]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("static", "'model' is a DistributedDataParallel that adds its gradients up in another"),
        ("in_buckets", "gradients lie in the buckets of a DistributedDataParallel"),
        ("window_in_buckets", "gradients lie in the buckets of a DistributedDataParallel"),
        ("compressed_unnamed", "state of the communication hook.iter"),
        ("averaged", "its 'averager.step'"),
        ("post_local", "state of the communication hook.iter"),
        ("taught_anew", "The script has made the step, its 'teacher' with other contents"),
        ("kept_back", "FSDP keeps the gradients of this accumulation window to itself"),
    ],
)
def test_what_no_checkpoint_holds_is_told(found: Any, name: str, text: str) -> None:
    for rank in found:
        assert any(text in told for told in rank[name])
