"""What several processes save together where they are not alike: objects, scores, names, copies."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from processes import results, run_world
from ranks_saved_program import ITERATIONS, loader, training

from crosstrain.engine import ResumeWarning, resume_or_start


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What each of two ranks did; one world for all tests."""
    folder = tmp_path_factory.mktemp("saved")
    run_world(2, "ranks_saved_program.py", str(folder), CROSSTRAIN_TIMEOUT="30")
    return results(folder, 2), folder


def test_each_rank_gets_its_own_state_of_a_named_object(told: Any) -> None:
    """A meter, a metric, an average's buffer, an attribute of the engine's state, a source."""
    first, second = told[0]
    assert first["own"][0] != second["own"][0]
    for rank in (first, second):
        assert rank["own"][1] == rank["own"][0]


def test_with_another_number_of_ranks_it_is_told_what_differed(told: Any) -> None:
    """What follows from the rank and their number is another here, and not told once more."""
    trainer, to_save, _ = training(0, 1)
    with warnings.catch_warnings(record=True, action="always", category=ResumeWarning) as caught:
        resume_or_start(trainer, to_save, told[1] / "parted", every=5, signals=())
        trainer.run(loader(), max_epochs=2)
    texts = [str(one.message) for one in caught]
    assert len(texts) == 3, "\n".join(texts)
    first, second, third = texts
    assert "'meters[0]', 'meters[1]', 'meters[2]', 'noise' differed" in first
    assert "'average' differed" in second
    assert "what differed between the ranks of the buffers meters[2].places." in third
    assert to_save["meters"][2].places.tolist() == [0, 1, 2, 3]


def test_what_is_due_for_the_second_tier_is_saved_by_all_ranks(told: Any) -> None:
    """One of them copies, and all take its state, at the iterations of both tiers."""
    assert all(rank["copied"] == [2, 3, 4, 6, ITERATIONS] for rank in told[0])
    assert (told[1] / "copies" / f"checkpoint_{ITERATIONS}.pt").is_file()


def test_the_score_of_the_rank_that_saves_is_that_of_all(told: Any) -> None:
    """Otherwise one of them would wait in vain for the others to save."""
    first, second = told[0]
    assert first["scored"] == second["scored"]
    assert "0.4" in first["scored"][0]
    assert [path.name for path in (told[1] / "best").iterdir()] == ["checkpoint_0.4000.pt"]


def test_ranks_that_name_other_objects_are_told_at_the_first_save(told: Any) -> None:
    first, second = told[0]
    reason = "to_save names 'log' on rank 0 and not on rank 1. All ranks go on from one checkpoint"
    for rank in (first, second):
        assert reason in rank["named"]


def test_one_rank_may_evaluate_a_model_that_shares_its_gradients(told: Any) -> None:
    """Its buffers are not sent to ranks that do not evaluate."""
    assert [rank["evaluated"] for rank in told[0]] == [2, 2]


def test_an_optimizer_that_steps_by_other_numbers_is_told(told: Any) -> None:
    """A schedule that follows each rank's own loss lets the copies of the model part."""
    for rank in told[0]:
        (text,) = rank["parted"]
        assert "The optimizer 'optimizer' does not step by the same numbers on all ranks" in text


def test_an_optimizer_whose_state_is_spread_over_processes_goes_on(told: Any) -> None:
    """torch's ZeroRedundancyOptimizer."""
    for rank in told[0]:
        assert rank["spread"]
        assert all(rank["spread"])


def test_what_is_unfrozen_and_would_not_be_shared_is_told(told: Any) -> None:
    """DistributedDataParallel shares the gradients of what was trained when it was made."""
    for rank in told[0]:
        refused, sharded = rank["unfrozen"]
        assert refused.startswith(f"{ITERATIONS} ")
        assert "'0.weight', '0.bias' was frozen when the model was prepared" in refused
        assert sharded == "nothing"


def test_an_engine_without_a_backend_is_told_that_there_are_others(told: Any) -> None:
    for rank in told[0]:
        refused, warned = rank["alone"]
        assert "This is one of 2 processes, and the trainer has no backend" in refused
        assert 'DeterministicEngine(step, get("cpu").open())' in refused
        assert "The state is that of this process alone: the engine has no backend" in warned
    assert not (told[1] / "alone").exists()


def test_a_wait_in_vain_says_what_all_ranks_have_to_do(told: Any) -> None:
    first, second = told[0]
    hint = "called on every rank, in the same order and as often, not under `if rank == 0`"
    for name in ("apart", "apart from a state"):
        assert first[name][0].startswith("RankFailed: Rank ")
        assert "Rank 1 failed at iteration 2: RuntimeError" in first[name][0]
        assert hint in first[name][0]
        assert "imed out waiting 1000ms" in second[name][0]
        assert hint in second[name][1]
    assert "Rank 0 was taking the engine's state at iteration 2." in first["apart from a state"][0]
