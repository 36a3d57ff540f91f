"""Ranks that end together: terminations, exceptions, signals and differences on one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import results, torchrun

from crosstrain.backends import get
from crosstrain.engine import (
    DeterministicEngine,
    Engine,
    RankCheck,
    ResumeWarning,
    agree,
    resume_or_start,
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What each of two ranks did; one world for all tests, since starting one takes seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(2, "ranks_stop_program.py", str(folder), "all", "10", "1", OMP_NUM_THREADS="1")
    return results(folder, 2), folder


@pytest.mark.slow
def test_what_all_ask_for_is_done_where_they_ask(told: Any) -> None:
    """As in one process: no iteration more, and the same events."""
    for rank in told[0]:
        assert rank["all at an iteration"] == ["TERMINATE 5", "COMPLETED 5"]
        assert rank["all at the start"] == ["TERMINATE 0", "COMPLETED 0"]
        assert rank["all while one begins"] == ["TERMINATE 0", "COMPLETED 0"]
        epochs = ["EPOCH_COMPLETED 8", "EPOCH_COMPLETED 16"]
        assert rank["all at an epoch"] == [*epochs, "TERMINATE 16", "COMPLETED 16"]
        ends = ["TERMINATE_SINGLE_EPOCH 5", "EPOCH_COMPLETED 5", "EPOCH_COMPLETED 13"]
        assert rank["all an epoch"] == [*ends, "EPOCH_COMPLETED 21", "COMPLETED 21"]


@pytest.mark.slow
def test_what_one_asks_for_is_done_by_all_at_one_place(told: Any) -> None:
    first, second = told[0]
    for name in ("one at an iteration", "one in an iteration", "one at an epoch", "one an epoch"):
        assert first[name] == second[name], name
    for name in ("one at an iteration", "one in an iteration"):
        last = first[name][-2].split()
        assert last[0] == "TERMINATE"
        assert 5 <= int(last[1]) < 2400


@pytest.mark.slow
def test_failure_of_one_ends_all_and_is_named(told: Any) -> None:
    first, second = told[0]
    assert second["failing"] == ["ValueError: boom", "ValueError"]
    reason = "RankFailed: Rank 1 failed at iteration 4: ValueError: boom"
    assert first["failing"] == [reason, "RankFailed"]


@pytest.mark.slow
def test_other_lengths_are_named(told: Any) -> None:
    for rank in told[0]:
        assert "epoch_length is 6 on rank 1 and 5 on rank 0" in rank["known lengths"]
        assert "5 iterations on rank 0 and 6 on rank 1" in rank["learned lengths"]
    # Which of them is told depends on which rank is the first to ask.
    both = ("5 iterations on rank 0 and 6 on rank 1", "rank 0 after 5 iterations, and rank 1 has")
    assert any(words in told[0][1]["unknown lengths"] for words in both)


@pytest.mark.slow
def test_state_that_is_not_taken_together_is_refused(told: Any) -> None:
    first, second = told[0]
    absent = "Rank 1 did not come within 1 s (CROSSTRAIN_TIMEOUT)"
    assert absent in first["alone"][0]
    assert "Call it on every rank" in first["alone"][0]
    for rank in (first, second):
        assert "engine's state at iteration 0" in rank["alone"][1]
        assert "engine's state at iteration 1" in rank["alone"][1]


@pytest.mark.slow
def test_parameter_that_differs_is_named(told: Any) -> None:
    for rank in told[0]:
        same, other = rank["parted"]
        assert same == "nothing"
        assert "At iteration 8 ranks 0, 1 do not have the same parameters: 1 of 4" in other
        assert "the first is '1.weight'" in other


@pytest.mark.slow
def test_signal_on_one_saves_the_same_iteration_on_all(told: Any) -> None:
    first, second = told[0]
    for part, count in (("signals", 10), ("evaluating", 3)):
        assert len(first[part]) == count
        assert first[part] == second[part]
        for code, iteration, saved in first[part]:
            assert (code, saved) == (143, iteration)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_checkpoint_that_one_cannot_read_is_resumed_from_by_none(told: Any, rank: int) -> None:
    """Each says why it did not go on; the next try starts from the same checkpoint."""
    for mine, seen in enumerate(told[0]):
        first, failed, later = seen[f"unread by {rank}"]
        assert first == "resumed from None"
        assert "Too many open files" in failed
        assert failed.startswith(f"RankFailed: Rank {rank} failed") == (mine != rank)
        assert later == "resumed from trainer_4.pt"


@pytest.mark.slow
def test_each_rank_gets_its_random_states_back(told: Any) -> None:
    """With as many ranks; with fewer or more, one warning says what is not carried over."""
    ranks, folder = told
    for rank in ranks:
        whole, resumed, warned = rank["states"]
        assert resumed == whole[3:]
        assert warned == 0
    assert ranks[0]["states"][0] != ranks[1]["states"][0]
    drawn: list[float] = []
    engine = DeterministicEngine(lambda e, b: drawn.append(torch.rand(1).item()), get("cpu"))
    state = torch.load(folder / "state.pt", weights_only=True)
    with pytest.warns(ResumeWarning) as warnings:
        engine.load_state_dict(state)
    engine.run()  # a further warning would be an error
    (warning,) = warnings
    assert "written by 2 processes and goes on in 1" in str(warning.message)
    assert "random streams of rank 1." in str(warning.message)
    assert drawn == ranks[0]["states"][0][3:]


def test_nothing_is_agreed_upon_in_one_process(tmp_path: Path) -> None:
    """And nothing is listened to: the engine is as it was."""
    with get("cpu") as backend:
        engine = Engine(lambda engine, batch: None, backend)
        assert agree(engine) is None
        RankCheck(torch.nn.Linear(2, 2)).attach(engine)
        run = resume_or_start(engine, {}, tmp_path, every=2)
        engine.run(max_epochs=1, epoch_length=4)
        assert engine.ranks is None
        assert run.exit_code == 0
    with pytest.raises(ValueError, match="every is invalid: 0"):
        RankCheck(torch.nn.Linear(2, 2), every=0)
