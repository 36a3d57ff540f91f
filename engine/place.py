"""Place: where a run is, as one value, besides what its state counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Place:
    """Where a run is between two of its steps, and what it owes; another run begins with a new one.

    Args:
        began: after which iteration the epoch began that is open, or was the last to be.
        stepped: the last iteration whose step is done; within an epoch it is kept only where
            something is called after each step, as a `DeterministicEngine` has it.
        within: how many iterations the epoch that is begun next has behind it already; None: as
            many as the state's counters leave.
        open: whether an epoch has begun and has neither ended nor been left by the run.
        ended: whether the epoch that was begun last has ended.
        broken: whether an exception left an iteration before its step's end: it is done again.
        loaded: whether a state was loaded and no run has gone on from it: the next one does, even
            where nothing is left to do.
        owed: what a loaded state had still to do, as bits of `Engine.asked`.
    """

    began: int = 0
    stepped: int = 0
    within: int | None = None
    open: bool = False
    ended: bool = False
    broken: bool = False
    loaded: bool = False
    owed: int = 0

    def leave(self) -> None:
        """Says that the run leaves the open epoch; the next one is begun from its beginning."""
        self.open, self.within = False, 0

    def end_epoch(self) -> None:
        """Says that the open epoch has ended."""
        self.leave()
        self.ended = True
