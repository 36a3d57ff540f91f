"""ResumableRun: when a run that is to go on is saved, and how a signal ends it in order."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstrain.engine.dispatch import Phase
from crosstrain.engine.engine import Engine
from crosstrain.engine.events import Events, is_event, is_events_list
from crosstrain.engine.progress import is_done
from crosstrain.engine.ranks.agreement import agreement_of

from .handler import Checkpoint
from .loading import Latest, PassedOver
from .objects import check_objects, unsaved_objects, walk_objects
from .stop_signals import StopSignals

__all__ = ["ResumableRun", "begin", "event_of", "with_trainer"]

_logger = logging.getLogger(__name__)


class ResumableRun:
    """What `resume_or_start` has set up, and what has become of it.

    Args:
        trainer: the engine.
        checkpoint: the handler that saves.
        latest: the checkpoint that was restored, and those passed over.
        signals: what ends the run in order.
    """

    def __init__(
        self,
        trainer: Engine,
        checkpoint: Checkpoint,
        latest: Latest,
        signals: Sequence[signal.Signals],
    ) -> None:
        self.checkpoint = checkpoint
        self._trainer = trainer
        self._latest = latest
        self._signals = StopSignals(signals, self._notice)
        # In one process nobody has to be asked.
        self._ranks = agreement_of(trainer)
        self._due = False
        self._boundary = self._saved = trainer.state.iteration if latest else -1
        finished = bool(latest) and is_done(trainer.state)
        self._finished = (trainer.state.iteration, trainer.state.epoch) if finished else None

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint that was restored; None if the run starts from the beginning."""
        return self._latest.path

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        """The files that would have come before it but are no good, each with its reason."""
        return self._latest.passed_over

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

    def attach(self, event: Any) -> None:
        """Attaches the saving to the engine.

        Args:
            event: when a checkpoint is due.
        """
        # A training may be several runs: those that the checkpoint has behind it are passed by.
        self._trainer.has_phases = True
        self._trainer.add_event_handler(event, self._mark)
        self._trainer.add_event_handler(Events.STARTED, self._begin)
        # Whatever else happens after an iteration, such as a scheduler's step, must have happened
        # before it is saved.
        for saved, handler in (
            (Events.ITERATION_COMPLETED, self._after_iteration),
            (Events.EPOCH_COMPLETED, self._after_epoch),
            (Events.TERMINATE, self._after_terminate),
        ):
            self._trainer.add_in_phase(saved, handler, Phase.SAVE)
        self._trainer.call_at_end(self._end)

    def _mark(self) -> None:
        self._due = True

    def _begin(self) -> None:
        trainer = self._trainer
        self._signals.install()
        if self._finished is not None and trainer.state.iteration == 0:
            # run() takes a state at its limit for a reason to train anew, from trained weights.
            trainer.state.iteration, trainer.state.epoch = self._finished
            _logger.info(
                "The run is complete already, at iteration %d: nothing is trained. To train on, "
                "raise max_epochs or max_iters; to train anew, use another folder.",
                self._finished[0],
            )
        self._finished = None

    def _end(self) -> None:
        self._signals.restore()
        trainer = self._trainer
        if trainer.has_event_handler(self._on_exception, Events.EXCEPTION_RAISED):
            trainer.remove_event_handler(self._on_exception, Events.EXCEPTION_RAISED)
        self.checkpoint.wait()

    def _after_iteration(self) -> None:
        state = self._trainer.state
        self._boundary = state.iteration
        ends_epoch = state.epoch_length is not None and state.iteration % state.epoch_length == 0
        if ends_epoch and not self._trainer.should_terminate:
            # The epoch ends here, and what its handlers do belongs to this iteration. They are not
            # called where the run ends first.
            return
        self._save_if_due(state.iteration == state.max_iters)

    def _after_epoch(self) -> None:
        # The epoch that has just ended is counted already, so this is not true one epoch early.
        self._save_if_due(is_done(self._trainer.state))

    def _after_terminate(self) -> None:
        # In the middle of an iteration there is no state that a run could go on from.
        if self._trainer.state.iteration == self._boundary:
            self._save_if_due(done=True)

    def _save_if_due(self, done: bool) -> None:
        trainer = self._trainer
        stop = self.stop_signal
        if not (self._due or done or stop is not None or trainer.should_terminate):
            return
        self._due = False
        if trainer.state.iteration != self._saved:
            self.checkpoint(trainer)
            self._saved = trainer.state.iteration
        if stop is not None and not trainer.should_terminate:
            _logger.warning(
                "%s: saved at iteration %d; the run ends.", stop.name, trainer.state.iteration
            )
            trainer.terminate(goes_on=True)

    def _notice(self) -> None:
        if self._ranks is not None:
            received = self._signals.received
            self._ranks.ask_to_stop(0 if received is None else int(received))
            return
        self._trainer.add_event_handler(Events.EXCEPTION_RAISED, self._on_exception)

    def _on_exception(self, error: BaseException) -> None:
        """Ends the run in order where a signal has killed the loader's workers, not this process.

        Ctrl-C reaches all processes of a terminal, and workers that were spawned die of it.
        """
        trainer = self._trainer
        at_boundary = trainer.state.iteration == self._boundary
        loader_died = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        if not (at_boundary and loader_died):
            raise error
        trainer.terminate_epoch(skip_epoch_completed=True)
        self._save_if_due(done=False)


def begin(
    trainer: Engine,
    checkpoint: Checkpoint,
    latest: Latest,
    signals: Sequence[signal.Signals],
    event: Any,
) -> ResumableRun:
    """Returns a run whose objects have been restored, attached to its engine, and logs from what.

    Args:
        trainer: see `ResumableRun`, as for the next three.
        checkpoint: likewise.
        latest: likewise.
        signals: likewise.
        event: when a checkpoint is due.
    """
    manifest = latest.manifest
    if not latest:
        _logger.info("No checkpoint in %s: the run starts from the beginning.", latest.folder)
    else:
        _logger.info(
            "Resumed from %s: iteration %s, epoch %s.",
            latest.path,
            "unknown" if manifest is None else manifest.iteration,
            "unknown" if manifest is None else manifest.epoch,
        )
    run = ResumableRun(trainer, checkpoint, latest, signals)
    run.attach(event)
    return run


def event_of(every: Any) -> Any:
    """Returns the event of `every`: a number of iterations, or an event.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(every, int) and not isinstance(every, bool):
        return Events.ITERATION_COMPLETED(every=every)
    if is_event(every) or is_events_list(every):
        return every
    raise TypeError(
        f"every should be a number of iterations or an event, such as 1000 or "
        f"Events.EPOCH_COMPLETED, got {every!r}"
    )


def with_trainer(trainer: Engine, to_save: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the objects with the trainer among them.

    Raises:
        TypeError: if an object lacks `state_dict` or `load_state_dict`.
        ValueError: if what the trainer trains is left out.
    """
    for method in ("state_dict", "load_state_dict"):
        check_objects(to_save, method, "to_save")
    objects = dict(to_save)
    if not any(value is trainer for _, value in walk_objects(objects)):
        if "trainer" in objects:
            raise ValueError(
                f"to_save has a 'trainer' of type {type(objects['trainer']).__name__} that is not "
                "the trainer whose run is to be saved. Give it another name"
            )
        objects["trainer"] = trainer
    missing = unsaved_objects(trainer, objects)
    if missing:
        raise ValueError(
            f"to_save leaves out {', '.join(map(repr, missing))}, which the trainer trains: the "
            "run could not go on exactly. Name it in to_save"
        )
    return objects
