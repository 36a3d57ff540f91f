"""ResumableRun: when a run that is to go on is saved, and how a signal ends it in order."""

from __future__ import annotations

import logging
import signal
import sys
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from crosstrain.engine.dispatch import Phase
from crosstrain.engine.engine import Engine
from crosstrain.engine.errors import RankFailed, ResumeWarning, warn_user
from crosstrain.engine.events import Events
from crosstrain.engine.nests import is_module
from crosstrain.engine.progress import is_done
from crosstrain.engine.proof import Proof
from crosstrain.engine.ranks.agreement import agreement_of
from crosstrain.engine.ranks.world import this_rank
from crosstrain.engine.shown import shown
from crosstrain.engine.storage.errors import CheckpointError
from crosstrain.engine.storage.locations import Location

from .claim import Claim
from .done_again import DoneAgain
from .handler import Checkpoint, CheckpointEvents
from .loading import Latest, PassedOver
from .remote import RemoteCopies
from .stop_signals import StopSignals

_logger = logging.getLogger(__name__)

_LAST_SAVE = "waiting until the last checkpoint is on the disk"


class ResumableRun:
    """What `resume_or_start` has set up, and what has become of it.

    Args:
        trainer: the engine. It keeps this, and is not kept by it.
        checkpoint: the handler that saves.
        claim: keeps other trainers out of the place, until the run has ended.
        latest: the checkpoint that was restored, and those passed over.
        signals: what ends the run in order.
        remote: copies some of the checkpoints to a store; None if none are to be.
        done_again: compares iterations that are repeated; None if none are to be.
    """

    def __init__(
        self,
        trainer: Engine,
        checkpoint: Checkpoint,
        claim: Claim,
        latest: Latest,
        signals: Sequence[signal.Signals],
        remote: RemoteCopies | None = None,
        done_again: DoneAgain | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._claim = claim
        self._remote = remote
        self._done_again = done_again
        self._remote_due = False
        self._to_copy: int | None = None
        self._engine = weakref.ref(trainer)
        self._latest = latest
        self._proof = trainer.proof
        # In one process nobody has to be asked.
        self._ranks = agreement_of(trainer)
        asks = None if self._ranks is None else self._ranks.ask_to_stop
        self._signals = StopSignals(signals, asks, claim.key)
        self._due = False
        self._told_of_stop = self._was_stopped = False
        self._proof_is_due = bool(latest)
        self._boundary = self._saved = trainer.state.iteration if latest else -1
        finished = bool(latest) and is_done(trainer.state)
        self._finished = (trainer.state.iteration, trainer.state.epoch) if finished else None

    @property
    def resumed_from(self) -> Location | None:
        """The checkpoint that was restored; None if the run starts from the beginning."""
        return self._latest.path

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        """The files that would have come before it but are no good, each with its reason."""
        return self._latest.passed_over

    @property
    def proof(self) -> Proof:
        """What the resume has checked of itself; complete after the first iteration."""
        trainer = self._engine()
        return self._proof if trainer is None else trainer.proof

    @property
    def stop_signal(self) -> signal.Signals | None:
        """The signal that ended the run, on whichever rank it arrived; None if none did."""
        if self._ranks is None:
            return self._signals.received
        stop = self._ranks.stop_signal
        return signal.Signals(stop) if stop else None

    @property
    def exit_code(self) -> int:
        """What to exit with: 0, or 128 and the number of the signal that ended the run."""
        return 0 if self.stop_signal is None else 128 + self.stop_signal

    @property
    def _trainer(self) -> Engine:
        trainer = self._engine()
        assert trainer is not None, "who calls this is a handler of it"
        return trainer

    def attach(self, event: Any, remote_event: Any = None) -> None:
        """Attaches the saving to the engine, and says what the run goes on from.

        Args:
            event: when a checkpoint is due.
            remote_event: when one is that is copied to a store; None: each of them.
        """
        latest = self._latest
        if not latest:
            _say(f"No checkpoint in {latest.folder}: the run starts from the beginning.")
        else:
            told = latest.manifest
            iteration, epoch = (told.iteration, told.epoch) if told else ("unknown", "unknown")
            _say(f"Resumed from {latest.path}: iteration {iteration}, epoch {epoch}.")
        trainer = self._trainer
        trainer.restartable = True
        if not trainer.has_registered_events(Checkpoint.SAVED_CHECKPOINT):
            # Here, not at the first save: handlers of it can be attached before the run.
            trainer.register_events(*CheckpointEvents)
        trainer.add_event_handler(event, self._mark)
        if remote_event is not None:
            # On ranks that copy nothing, too: what is due there is saved by all.
            trainer.add_event_handler(remote_event, self._mark_remote)
        if self._remote is not None:
            if remote_event is None:
                trainer.add_event_handler(event, self._mark_remote)
            trainer.add_event_handler(Checkpoint.SAVED_CHECKPOINT, self._copy)
            trainer.add_event_handler(Events.ITERATION_COMPLETED, self._remote.ask)
        trainer.add_event_handler(Events.STARTED, self._begin)
        # Whatever else happens after an iteration, such as a scheduler's step, must have happened
        # before it is saved.
        for saved, handler in (
            (Events.ITERATION_COMPLETED, self._after_iteration),
            (Events.EPOCH_COMPLETED, self._after_epoch),
            (Events.TERMINATE, self._after_terminate),
        ):
            trainer.add_in_phase(saved, handler, Phase.SAVE)
        trainer.call_before_run(self._check_stopped)
        trainer.call_at_end(self._end)
        trainer.call_after_pause(self._go_on)
        trainer.deals_with = self._deals_with

    def _mark(self) -> None:
        self._due = True

    def _mark_remote(self) -> None:
        self._due = self._remote_due = True

    def _copy(self) -> None:
        """Begins to copy the checkpoint that is on the disk by now, if it is one that is due."""
        if self._remote is None or self._to_copy is None or self._to_copy != self._saved:
            return
        path = self.checkpoint.last_checkpoint
        assert isinstance(path, Path)
        iteration, self._to_copy = self._to_copy, None
        self._remote.copy(path, iteration)

    def _check_stopped(self) -> None:
        """Ends the program where a signal has ended a run of it that this one goes on from.

        It would go on from half of it, and save that.

        Raises:
            SystemExit: with the exit code of the run that was stopped.
        """
        stop, goes_on_from_it = self._signals.stop_before(self._parameters())
        if stop is not None and goes_on_from_it:
            _logger.warning(
                "%s has ended a run of this program, which is saved, and another that goes on from "
                "it does not begin: the program ends with exit code %d. Started again, it goes on.",
                stop.by.name,
                128 + stop.by,
            )
            raise SystemExit(128 + stop.by)
        if stop is not None and not stop.told:
            stop.told = True
            _logger.warning(
                "%s has ended another run of this program, and this one begins all the same: if it "
                "depends on what that was to come to, end the program there, by "
                "sys.exit(run.exit_code).",
                stop.by.name,
            )
        if self._was_stopped:
            # It goes on, until the next signal.
            self._was_stopped = self._told_of_stop = False
            self._signals.received = None

    def _parameters(self) -> list[torch.nn.Parameter]:
        models = (one for one in self.checkpoint.to_save.values() if is_module(one))
        return [parameter for model in models for parameter in model.parameters()]

    def _listen(self) -> None:
        self._claim.take()
        self._signals.install()

    def _go_on(self) -> None:
        """Takes back what a pause has given back, and says what is lost if the run is stopped."""
        self._listen()
        warn_user(
            "The run goes on after interrupt(). If it is stopped and started again from here on, "
            "it does not pause there once more: its first run() goes on to the end, and the next "
            "run() begins a new run, from trained weights. To do something between two parts of a "
            "run, use a handler, or run() with limits that grow (max_epochs=1, then max_epochs=2).",
            ResumeWarning,
        )

    def _begin(self) -> None:
        trainer = self._trainer
        self._listen()
        if self._finished is not None and trainer.state.iteration == 0:
            # run() takes a state at its limit for a reason to train anew, from trained weights.
            trainer.state.iteration, trainer.state.epoch = self._finished
            _say(
                f"The run is complete already, at iteration {self._finished[0]}: nothing is "
                "trained. To train on, raise max_epochs or max_iters; to train anew, use another "
                "folder."
            )
        elif trainer.should_terminate:
            _say(
                f"The run was ended on purpose, by terminate(), at iteration {self._boundary}: "
                "nothing is trained. To train on, set trainer.should_terminate = False before "
                "run(); to train anew, use another folder."
            )
        self._finished = None

    def _end(self) -> None:
        self._signals.restore()
        self._claim.give_back()
        self._tell_proof()
        trainer, ranks = self._trainer, self._ranks
        alone = ranks is None or not trainer.ended_in_order
        # One rank may be writing for all: none says that the run is saved if it cannot.
        with nullcontext() if ranks is None or alone else ranks.line.together(_LAST_SAVE):
            self._wait_for_save()
        stop, iteration = self.stop_signal, trainer.state.iteration
        # After an error it is not known whether the save was to blame.
        is_saved = iteration == self._saved and trainer.ended_in_order
        if is_saved and self._done_again is not None:
            self._done_again.run_has_ended()
        if stop is not None and trainer.ended_in_order:
            self._was_stopped = True
            self._signals.run_has_ended(stop, self._parameters())
        if stop is not None and is_saved:
            _logger.warning("%s: saved at iteration %d; the run has ended.", stop.name, iteration)
        if stop is not None and trainer.ended_in_order and self._signals.is_within_another:
            # Its handler would go on with half of this run, and that would be saved.
            _logger.warning(
                "%s has ended a run within a handler of another, which ends where it was saved "
                "last: the program ends with exit code %d. Started again, both go on.",
                stop.name,
                128 + stop,
            )
            raise SystemExit(128 + stop)

    def _wait_for_save(self) -> None:
        try:
            self.checkpoint.wait()
        except (CheckpointError, RankFailed):
            raise
        except RuntimeError:
            # torch raises one wherever this thread is when a loader's worker dies: the save is not
            # to blame, and goes on.
            self.checkpoint.wait()
        if self._remote is not None:
            self._remote.wait()

    def _tell_proof(self) -> None:
        if self._proof_is_due:
            self._proof_is_due, trainer = False, self._trainer
            self._proof = trainer.proof
            # An engine that resumes exactly says it itself.
            if this_rank() == 0 and not trainer.resumes_data:
                _logger.info("Resumed at iteration %d. %s.", self._saved, shown(self._proof))

    def _after_iteration(self) -> None:
        trainer = self._trainer
        state = trainer.state
        self._boundary = state.iteration
        if self._done_again is not None:
            self._done_again.iteration_done(trainer)
        if self._proof_is_due:
            self._tell_proof()
        ends_epoch = state.epoch_length is not None and state.iteration % state.epoch_length == 0
        if ends_epoch and not trainer.should_terminate:
            # The epoch ends here, and what its handlers do belongs to this iteration. They are not
            # called where the run ends first.
            return
        self._save_if_due(trainer, state.iteration == state.max_iters)

    def _after_epoch(self) -> None:
        trainer = self._trainer
        # The epoch that has just ended is counted already, so this is not true one epoch early.
        self._save_if_due(trainer, is_done(trainer.state))

    def _after_terminate(self) -> None:
        trainer = self._trainer
        # In the middle of an iteration there is no state that a run could go on from.
        if trainer.state.iteration == self._boundary:
            self._save_if_due(trainer, done=True)

    def _save_if_due(self, trainer: Engine, done: bool) -> None:
        stop = self.stop_signal
        if not (self._due or done or stop is not None or trainer.should_terminate):
            return
        self._due = False
        if stop is not None and not self._told_of_stop:
            self._told_of_stop = True
            _logger.warning(
                "%s: the run is saved and ends at iteration %d.%s",
                stop.name,
                trainer.state.iteration,
                " Ctrl-C once more ends it at once." if stop == signal.SIGINT else "",
            )
        # The disk may go with the machine: what a run ends with is in the store, whatever is due.
        ends = done or stop is not None or bool(trainer.should_terminate)
        remote = self._remote_due or ends
        self._remote_due = False
        if trainer.state.iteration != self._saved:
            self._save(trainer, remote)
        if stop is not None and not trainer.should_terminate:
            trainer.terminate(goes_on=True)

    def _save(self, trainer: Engine, remote: bool) -> None:
        if self._remote is not None:
            # That the one before is on the disk is said now, and not of this one.
            self.checkpoint.wait()
        before, self._to_copy = self._saved, trainer.state.iteration if remote else None
        self._saved = trainer.state.iteration
        try:
            self.checkpoint(trainer)
        except BaseException:
            # Nothing was saved, whatever ended it: the next that is due is not left out.
            self._saved, self._to_copy = before, None
            raise
        if self._done_again is not None:
            self._done_again.saved(self._saved)

    def _deals_with(self, error: BaseException) -> bool:
        """Ends the run in order where it is to end, and the next batch cannot be fetched any more.

        A signal that reaches a group of processes kills the loader's workers too, or a process that
        a transform asks; the iterations before are complete, and an error must not cost their save.
        """
        trainer = self._trainer
        pending = self._ranks is None and self._signals.received is not None
        # What the handlers between two epochs had left to do is in no checkpoint.
        between = (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
        at_boundary = (
            trainer.state.iteration == self._boundary and trainer.last_event_name not in between
        )
        # A save that failed is no matter of the data.
        of_data = isinstance(error, Exception) and not isinstance(error, CheckpointError)
        if not (pending and at_boundary and of_data):
            return False
        _logger.warning(
            "The next batch could not be fetched (%s: %s), while the run was about to end: it ends "
            "with the iterations that are complete.",
            type(error).__name__,
            shown(error),
        )
        trainer.terminate_epoch(skip_epoch_completed=True)
        self._save_if_due(trainer, done=False)
        return True


def _say(message: str) -> None:
    """Tells the user something once, on rank 0: in the log, or, where there is none, on stderr."""
    if this_rank() != 0:
        return
    message = shown(message)
    if _logger.hasHandlers():
        _logger.info(message)
    else:
        print(message, file=sys.stderr, flush=True)
