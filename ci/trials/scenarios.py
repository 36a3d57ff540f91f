"""The scenarios: what a training has to survive with the same bits, the same for every backend.

Each trains a small network on real data straight through, and once more interrupted and resumed in
fresh processes, and compares batches, losses, weights, optimizer, loss scale and random states. A
user's own training (see `crosstrain.ci.trials.target`) can be played in place of ours where that
makes sense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from .course import first_distance
from .play import Play, Verdict

#: The word in a backend's capabilities that says that it computes nothing: no scenario applies.
COMPUTES_NOTHING = "null"

#: By how much the losses of a ported run may differ from those of the one that stayed, 2.3 being
#: the loss of a network that knows nothing.
LOSS_TOLERANCE = 0.05

# The iterations in which the gradients are made to overflow.
_OVERFLOWS = (4, 12)


@dataclass(frozen=True)
class Scenario:
    """One way to interrupt a training.

    Args:
        title: what it shows, in a few words.
        needs: the capabilities that a backend must have for it.
        processes: how many processes it starts.
        own_only: why it cannot be played with a user's training, as a sentence; empty if it can.
    """

    name: str
    title: str
    run: Callable[[Play], Verdict]
    needs: frozenset[str] = frozenset()
    processes: int = 3
    own_only: str = ""


def _stopped(training: str, at: Callable[[Play], int], **figures: int) -> Callable[[Play], Verdict]:
    """Returns what stops one of our trainings after an iteration, and resumes it."""

    def run(play: Play) -> Verdict:
        play.begin(training)
        play.stop(at(play))
        play.finish()
        return play.verdict(**figures)

    return run


def _middle(play: Play) -> int:
    # Of the second epoch, if there is one.
    first = play.length if play.total > play.length else 0
    return first + max(1, play.length // 2)


def _sigkill(play: Play) -> Verdict:
    play.begin()
    every = max(1, play.total // 8)
    # A save waits for the one before it: after the third, the first is whole for certain.
    play.kill(2 * every + 1, play.total // 2, every=every, background=True)
    play.kill(play.total // 2 + 1, play.total - 3, every=every, background=True)
    play.finish(every=every, background=True)
    return play.verdict(checkpoint_every=every)


def _workers(play: Play) -> Verdict:
    play.need_workers()
    play.begin(workers=0)
    play.stop(max(1, play.total * 3 // 8), workers=2)
    play.finish(workers=1)
    return play.verdict(workers="0; 2, then 1")


def _overflow(play: Play) -> Verdict:
    play.begin("overflowing", options={"at": _OVERFLOWS})
    before, after = _OVERFLOWS
    play.kill(before + 3, after - 2, every=2, background=True)
    play.finish()
    found = play.verdict(skipped_steps=", ".join(map(str, _skipped(play))))
    if not found.problem and _skipped(play) != list(_OVERFLOWS):
        problem = (
            f"Steps were skipped in the iterations {_skipped(play)}, and the gradients overflow "
            f"in {list(_OVERFLOWS)}: the backend says that it scales the loss."
        )
        return found._replace(problem=problem)
    return found


def _skipped(play: Play) -> list[int]:
    """Returns the iterations whose step the resumed run skipped."""
    rows = play.resumed.rows
    return [
        iteration
        for iteration, row in sorted(rows.items())
        if row["skipped steps"] > rows.get(iteration - 1, {"skipped steps": 0})["skipped steps"]
    ]


def _background(play: Play) -> Verdict:
    play.begin()
    play.kill(3, play.total - 3, every=1, background=True, overlap=True)
    play.finish(every=1, background=True, overlap=True)
    return play.verdict(checkpoint_every=1)


def _elastic(play: Play) -> Verdict:
    play.need_processes(4)
    play.begin("in_shards")
    play.kill(5, play.total // 2, together=2, every=2, background=True)
    play.finish(together=4)
    return play.verdict(processes="1; 2, then 4")


def _port(play: Play) -> Verdict:
    other = "cpu:bf16" if play.spec == "cpu" else "cpu"
    play.begin()
    play.stop(max(1, play.total * 3 // 8))
    play.stop(max(2, play.total * 6 // 8), spec=other)
    play.finish()
    if play.target:
        # How far its losses may be apart is not known.
        return play.verdict(partial(first_distance, tolerance=None), ported_to=other)
    compare = partial(first_distance, tolerance=LOSS_TOLERANCE)
    return play.verdict(compare, ported_to=other, tolerance=LOSS_TOLERANCE)


_ALL = (
    Scenario("boundary", "stopped at an epoch's end", _stopped("plain", lambda play: play.length)),
    Scenario("middle", "stopped in the middle of an epoch", _stopped("plain", _middle)),
    Scenario("sigkill", "killed by SIGKILL at two random moments", _sigkill, processes=4),
    Scenario("workers", "resumed with other numbers of workers", _workers),
    Scenario(
        "accumulation",
        "stopped within an accumulation window",
        # After the second of a window's three iterations, where the epoch ends, too.
        _stopped("accumulating", lambda _: 8, window=3),
        own_only="How gradients are accumulated is for the training to say.",
    ),
    Scenario(
        "overflow",
        "killed between two overflows of fp16",
        _overflow,
        needs=frozenset({"loss_scaling"}),
        own_only="Overflows are planted in the scenario's own loss.",
    ),
    Scenario(
        "two_optimizers",
        "two networks with an optimizer each",
        _stopped("two_optimizers", lambda _: 5),
        own_only="How many optimizers there are is for the training to say.",
    ),
    Scenario(
        "random_layers",
        "dropout and batch norm",
        _stopped("random_layers", lambda _: 11),
        own_only="Which layers there are is for the training to say.",
    ),
    Scenario(
        "schedule",
        "a learning rate that changes each step",
        # In the first part of the schedule; the second is to begin on time.
        _stopped("scheduled", lambda _: 3),
        own_only="Which schedule there is is for the training to say.",
    ),
    Scenario("background", "killed while checkpoints are written", _background),
    Scenario(
        "elastic",
        "in logical shards, on another number of processes each time",
        _elastic,
        needs=frozenset({"logical_shards"}),
        processes=1,
        own_only="How batches are dealt out is for the training to say.",
    ),
    Scenario("port", "ported to another backend and back", _port, processes=4),
)

SCENARIOS: Mapping[str, Scenario] = MappingProxyType({each.name: each for each in _ALL})
"""Every scenario by its name, in the order of reports."""
