"""Agreement: the ranks of a world end a run together, at one boundary, and for one reason.

How a stop is agreed upon without a collective operation on the way: a rank that wants one calls
the others through the store. On each a thread answers, at once and whatever the training is at,
which boundary the rank has passed last, and has the next one wait for the decision: the first
boundary that nobody has passed. So nobody can be asked to end where it can no longer end, ranks
that wait for each other in a collective operation are not held up, and an iteration in which nobody
asks for anything costs a lock and no message.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from torch import distributed

from crosstrain.engine.dispatch import Phase
from crosstrain.engine.errors import RankFailed
from crosstrain.engine.events import Events
from crosstrain.engine.requests import END_EPOCH, END_RUN, EPOCH_ENDS, PAUSE, RUN_ENDS

from .line import Line
from .watch import Watch, describe

if TYPE_CHECKING:
    from crosstrain.engine.engine import Engine

_ENDS: Final = END_RUN | END_EPOCH
# Within this a thread answers that lives; torchrun gives its processes 30 s between SIGTERM and
# SIGKILL.
_ANSWER: Final = 20.0


class _Decision(NamedTuple):
    """What all ranks do: at which boundary at the earliest, and what; the signal that asked."""

    boundary: int
    wish: int
    signal: int


def agree(trainer: Engine) -> Agreement | None:
    """Has the ranks of a world end the trainer's runs together; returns None in one process.

    `create_supervised_trainer` and `resume_or_start` do so; for an `Engine` of your own, call it in
    every rank, where the process group has been joined and before handlers are attached. From then
    on, in each run:

    - `terminate()` and `terminate_epoch()` on any rank take effect on all, at the same iteration:
      after STARTED, at the end of an iteration, or of an epoch. If all ranks call them at the same
      place, that is the one; otherwise the first one that no rank has passed.
    - An exception that ends the run of one rank ends it on all: the others raise `RankFailed`,
      which names the rank and what it raised.
    - Ranks that begin with other limits, lengths or iterations, or end at other iterations, raise
      `RankFailed`, which names them.

    `interrupt()` is no matter of all: call it on each. Evaluators are not agreed upon: they may run
    on one rank only.

    Args:
        trainer: the engine; of the world that its backend has joined.
    """
    agreed = agreement_of(trainer)
    if agreed is not None:
        return agreed
    backend = trainer.backend
    if backend is None or backend.world.size == 1 or not distributed.is_initialized():
        return None
    trainer.ranks = agreed = Agreement(trainer)
    return agreed


def agreement_of(engine: Engine) -> Agreement | None:
    """Returns the agreement that an engine's ranks have; None where there is none."""
    return engine.ranks if isinstance(engine.ranks, Agreement) else None


class Agreement:
    """Keeps one engine's runs in step with those of the other ranks. Made by `agree`."""

    def __init__(self, engine: Engine) -> None:
        self.line = Line()
        #: The signal that has ended the run on all ranks; 0 if none did.
        self.stop_signal = 0
        self._engine: Any = engine
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._number = self.line.count(f"engines/{self.line.rank}")
        self._runs = 0
        self._begin_run()
        engine.add_event_handler(Events.STARTED, self._on_started)
        # What the other handlers of these events ask for is known then.
        engine.add_in_phase(Events.STARTED, self._after_started, Phase.LAST)
        engine.add_in_phase(Events.ITERATION_COMPLETED, self._after_iteration, Phase.LAST)
        engine.add_in_phase(Events.EPOCH_COMPLETED, self._after_epoch, Phase.LAST)

    def _begin_run(self) -> None:
        # Boundaries are counted in halves of an iteration: 2 i is the end of iteration i; 2 i + 1,
        # that of an epoch that ends with it, or of STARTED where it was done already.
        self._passed = 2 * self._engine.state.iteration
        # How many calls this rank has answered, and how many of them it knows the decision of.
        self._answered = self._decided = 0
        self._decision: _Decision | None = None
        # What this rank wants and what is not decided: bits of Engine.asked, and a signal.
        self._wish = self._signal = 0
        # Which of the ends that the engine is asked for are those of all: bits of Engine.asked.
        self._agreed = 0
        #: What the keys of this run begin with, on all ranks.
        self.run_key = f"run/{self._number}/{self._runs}"

    # ---------------------------------------------------------------- the run's events

    def _on_started(self) -> None:
        engine = self._engine
        self.close()
        self._runs += 1
        signal = self._signal
        self._begin_run()
        self._signal, self.stop_signal = signal, 0
        self._watch = Watch(self.line, self.run_key, engine.state, self._answer)
        self.line.while_waiting = self._watch.check
        self._watch.compare_start()

    def _after_started(self) -> None:
        self._at_boundary(2 * self._engine.state.iteration + 1)

    def _after_iteration(self) -> None:
        self._at_boundary(2 * self._engine.state.iteration)

    def _after_epoch(self) -> None:
        assert self._watch is not None
        self._watch.compare_lengths()
        # It has ended: nobody needs to be asked any more.
        self._engine.asked &= ~EPOCH_ENDS
        self._wish &= ~EPOCH_ENDS
        self._at_boundary(2 * self._engine.state.iteration + 1)

    def ask_to_stop(self, signal: int) -> None:
        """Has all ranks end because of a signal that this one has got; called in its handler."""
        self._signal = self._signal or signal

    def review(self, asked: int) -> int:
        """Takes back what a handler has asked of this rank alone, until all are asked."""
        agreed = self._agreed
        if agreed & END_RUN:
            return asked
        if agreed & END_EPOCH:
            # It is done now.
            self._agreed = 0
        elif asked & _ENDS:
            self._wish |= asked & ~PAUSE
            return asked & PAUSE
        return asked

    # ---------------------------------------------------------------- boundaries

    def _at_boundary(self, boundary: int) -> None:
        """Passes a boundary, or does there what all have agreed upon."""
        if not (self._wish or self._signal or self._decision or self._engine.asked & _ENDS):
            # The thread that answers for this rank must not read it in between.
            with self._lock:
                if self._answered == self._decided:
                    self._passed = boundary
                    if self._watch is None or self._watch.told is None:
                        return
        self._do_what_is_agreed(boundary)

    def _do_what_is_agreed(self, boundary: int) -> None:
        assert self._watch is not None
        self._watch.check()
        if self._agreed & END_RUN:
            return
        self._engine.asked = self.review(self._engine.asked)
        while True:
            called = self._wish or self._signal or self._answered > self._decided
            if self._decision is None and called:
                self._decision = self._decide()
            decision = self._decision
            if decision is not None and boundary >= decision.boundary:
                self._decision = None
                self._do(decision, boundary)
                if self._agreed & END_RUN:
                    return
                continue
            with self._lock:
                # A call that came meanwhile was answered with the boundary before this one.
                if decision is not None or self._answered == self._decided:
                    self._passed = boundary
                    return

    def _do(self, decision: _Decision, boundary: int) -> None:
        engine = self._engine
        if decision.signal:
            # The run is ended by who saves it.
            self.stop_signal, self._signal, self._wish = decision.signal, 0, 0
            self._agreed = END_RUN
        elif decision.wish & END_RUN:
            engine.asked |= decision.wish & RUN_ENDS
            self._agreed = END_RUN
        elif boundary % 2 == 0:
            # At an epoch's end there is none left to end.
            engine.asked |= decision.wish & EPOCH_ENDS
            self._agreed = END_EPOCH
            self._wish &= ~EPOCH_ENDS

    # ---------------------------------------------------------------- calls and answers

    def _answer(self, number: int, store: Any, wish: int = 0) -> None:
        """Answers a call, once, over the connection of the thread that it is called in."""
        with self._lock:
            if self._answered > number:
                return
            self._answered = number + 1
            mine = {"passed": self._passed, "wish": wish, "signal": self._signal}
        store.set(f"{self.run_key}/call/{number}/{self.line.rank}", json.dumps(mine))

    def _decide(self) -> _Decision:
        line, number = self.line, self._decided
        base = f"{self.run_key}/call/{number}"
        assert self._watch is not None
        wish, self._wish = self._wish, 0
        self._answer(number, line.store, wish)
        if line.first(f"{base}/caller", str(line.rank)) == str(line.rank):
            self._watch.tell({"call": number})
            line.set(f"{base}/decision", json.dumps(self._collect(base)))
        elif not line.awaits(f"{base}/decision", 2 * _ANSWER, lambda: [self._caller(base)]):
            raise RankFailed(f"Rank {self._caller(base)} asked to end the run and then fell silent")
        told = json.loads(line.get(f"{base}/decision"))
        with self._lock:
            self._decided = number + 1
        if isinstance(told, str):
            raise RankFailed(told)
        # What the answer to an earlier call did not hold is asked for once more, unless all do it.
        self._wish |= wish & ~told[1]
        return _Decision(*told)

    def _caller(self, base: str) -> int:
        return int(self.line.get(f"{base}/caller"))

    def _collect(self, base: str) -> list[int] | str:
        """Waits for all answers to a call; returns the decision, or why there is none."""
        line = self.line
        passed, wish, signal = 0, 0, 0
        for rank in range(line.size):
            key, left = f"{base}/{rank}", f"{self.run_key}/left/{rank}"

            def silent(rank: int = rank, left: str = left) -> list[int]:
                return [] if line.has(left) else [rank]

            try:
                came = line.has(left) or line.awaits(key, _ANSWER, silent)
            except RankFailed as error:
                return f"There is no iteration at which all ranks can end: {error}"
            if not came and not line.has(left):
                return (
                    f"There is no iteration at which all ranks can end: rank {rank} has not "
                    f"answered within {_ANSWER:g} s"
                )
            answer = json.loads(line.get(left if line.has(left) else key))
            passed = max(passed, answer["passed"])
            wish |= answer["wish"]
            signal = signal or answer["signal"]
        return [passed + 1, wish, signal]

    # ---------------------------------------------------------------- the end

    def first_cause(self, error: BaseException) -> BaseException:
        """Returns what another rank's failure makes of an error of this one; else the error."""
        return error if self._watch is None else self._watch.first_cause(error)

    def leave(self, failure: BaseException | None) -> BaseException | None:
        """Tells the others how this rank's run has ended; returns what it is to raise."""
        watch = self._watch
        if watch is None:
            return failure
        try:
            return watch.leave(failure)
        except distributed.DistError as error:
            # Without the store nobody can be told; they notice, as this rank has.
            if failure is not None:
                failure.add_note(f"The other ranks could not be told: {describe(error)}")
            return failure
        finally:
            self.close()

    def close(self) -> None:
        """Stops listening."""
        watch, self._watch = self._watch, None
        self.line.while_waiting = None
        if watch is not None:
            watch.close()
