"""Several processes: the same data as one, weights by true counts, resumed in any number."""

from __future__ import annotations

from typing import Any

import pytest
from processes import results, run_program, run_world
from shares_program import BATCH, FIRST, ITERATIONS, KINDS, SAMPLES

SIZES = 2, 4

Told = dict[str, Any]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Told]]:
    """What each process tells, by the number of processes; 2 are started first, then 1, then 4."""
    folder = tmp_path_factory.mktemp("shares")
    run_world(2, "shares_program.py", str(folder))
    run_program("shares_program.py", str(folder))
    run_world(4, "shares_program.py", str(folder))
    return {size: results(folder, size) for size in (1, 2, 4)}


def joined(parts: list[Any]) -> list[Any]:
    """The indices and draws of all processes' parts of a batch, one after the other."""
    return [[item for part in parts if part for item in part[place]] for place in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("part", ["course", "chain"])
def test_same_batches_and_losses(worlds: dict[int, list[Told]], size: int, part: str) -> None:
    """At each iteration the same samples, augmentations and loss; 2 to 1 to 4 on resume too."""
    whole, told = worlds[1][0]["course"], [one[part] for one in worlds[size]]
    iterations = told[0]["losses"].keys()
    wanted = {("chain", 2): range(1, FIRST + 1), ("chain", 4): range(8, ITERATIONS + 1)}
    assert list(map(int, iterations)) == list(wanted.get((part, size), range(1, ITERATIONS + 1)))
    for iteration in iterations:
        parts = [one["batches"][iteration] for one in told]
        assert joined(parts) == whole["batches"][iteration], iteration
        counts = [len(part[0]) if part else 0 for part in parts]
        # As even as can be, from the left.
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)
        for one in told:
            assert one["losses"][iteration] == pytest.approx(whole["losses"][iteration], abs=1e-12)
    # The uneven last batch has fewer samples than there are processes, where they are four.
    assert len(whole["batches"]["5"][0]) == SAMPLES % BATCH == 2


@pytest.mark.parametrize(
    ("part", "size"),
    [*((part, size) for part in ("course", "sharded") for size in SIZES), ("chain", 4)],
)
def test_same_weights(worlds: dict[int, list[Told]], size: int, part: str) -> None:
    """Weighted by true counts, many processes end as one does, and all of them with the same."""
    whole, told = worlds[1][0]["course"]["weights"], [one[part]["weights"] for one in worlds[size]]
    assert all(one == told[0] for one in told)
    for ours, theirs in zip(told[0], whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)


def test_same_bits_in_the_same_world(worlds: dict[int, list[Told]]) -> None:
    assert [one["same world"] for one in worlds[2]] == [True, True]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_data(worlds: dict[int, list[Told]], kind: str, size: int) -> None:
    """Every kind of map-style data gives in parts what it gives one process."""
    whole, told = worlds[1][0]["data"][kind], [one["data"][kind] for one in worlds[size]]
    assert [len(rows) for rows in told] == [len(whole)] * size
    for number, batch in enumerate(whole):
        parts = [rows[number] for rows in told]
        indices, draws = joined(parts)
        assert indices == batch[0]
        if kind == "lists":
            # Fetched by one call each, so drawn for a part at once: no number comes twice.
            assert draws[: len(parts[0][1])] == parts[0][1]
            assert len(set(draws)) == len(draws)
        else:
            assert draws == batch[1]
        if kind == "collate":
            # The first part draws as the whole batch does; other samples, other numbers.
            collated = [part[2] for part in parts if part]
            assert collated[0] == batch[2]
            assert len(set(collated)) == len(collated)


@pytest.mark.parametrize("size", SIZES)
def test_placeholder_counts_for_nothing(worlds: dict[int, list[Told]], size: int) -> None:
    """A process without a sample takes part with nothing, even where its loss is not a number."""
    for one in worlds[size]:
        assert one["placeholders"]["weights"] == one["course"]["weights"]
        assert one["placeholders"]["losses"] == one["course"]["losses"]


@pytest.mark.parametrize("size", SIZES)
def test_run_that_ends_within_a_window(worlds: dict[int, list[Told]], size: int) -> None:
    """Gradients of a window that was cut short are shared before it is stepped."""
    for one in worlds[size]:
        assert one["ended"] == worlds[size][0]["ended"]
        for ours, theirs in zip(one["ended"], worlds[1][0]["ended"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10)


def test_streams(worlds: dict[int, list[Told]]) -> None:
    """One seed, rank 0's; training and a process's own data draw other numbers in each."""
    alone = worlds[1][0]["streams"]
    for size in SIZES:
        told = [one["streams"] for one in worlds[size]]
        assert {one["seed"] for one in told} == {alone["seed"]}
        assert told[0]["drawn"] == alone["drawn"]
        for name in ("drawn", "own"):
            assert len({tuple(one[name]) for one in told}) == size


def test_distributed_sampler(worlds: dict[int, list[Told]]) -> None:
    """Torch's sampler deals out as torch defines it, and a run with it resumes exactly."""
    keyed = []
    for one in worlds[2]:
        expected, found, resumed = one["distributed"]
        assert [indices for indices, _ in found] == expected
        assert resumed == found
        keyed.append({tuple(row) for _, draws in found for row in draws})
    assert not keyed[0] & keyed[1], "each process's samples have numbers of their own"
    for one in worlds[2]:
        # Each refuses it itself, or hears of it from the other.
        assert "own to each of 3; that given to run() is own to each of 2" in one["own position"]


@pytest.mark.parametrize("size", SIZES)
def test_refusals(worlds: dict[int, list[Told]], size: int) -> None:
    """Nothing trains on the same data in all processes without a word."""
    last = size - 1
    smaller = "1 process" if last == 1 else f"1 to {last} processes"
    for told in (one["refusals"] for one in worlds[size]):
        assert f"Each of {size} processes would train on all of this" in told["same data"]
        assert "deterministic=True" in told["same data"]
        for name in ("list", "list, plain"):
            assert f"list cannot be dealt out to {size} processes" in told[name]
            assert "PerRank(data)" in told[name]
        assert f"A global batch of {last} cannot be dealt out to {size} processes" in told["small"]
        assert f"Start {smaller}, or, for a new run, give the loader a" in told["small"]
        assert "With batch_size=None this loader takes one sample an iteration" in told["single"]
        assert f"of num_replicas={size + 1}, and this process is rank" in told["other"]
        assert "rank 0 was given 0, rank 1 1" in told["seeds"]
        assert told["own"] == "no error"
