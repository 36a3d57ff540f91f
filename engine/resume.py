"""resume_or_start: the one line that makes a run go on where it was stopped, however it was."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .agreement import Agreement, agree
from .checkpoint import Checkpoint
from .disk_saver import DiskSaver
from .engine import Engine
from .events import Events, is_event, is_events_list
from .loading import Latest, PassedOver, restore
from .object_tree import check_objects, unsaved_objects, walk_objects
from .progress import is_done
from .ranks import this_rank
from .resume_found import Found, find, find_together, own_files, together
from .stop_signals import StopSignals

__all__ = ["ResumableRun", "begin", "event_of", "resume_or_start", "with_trainer"]

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
        self._ranks = trainer.ranks
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
        self._trainer.add_event_handler(event, self._mark)
        self._trainer.add_event_handler(Events.STARTED, self._begin)
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
        # Whatever else happens after an iteration, such as a scheduler's step, must have happened
        # before it is saved: so these are the last handlers of their events.
        for event, handler in (
            (Events.ITERATION_COMPLETED, self._after_iteration),
            (Events.EPOCH_COMPLETED, self._after_epoch),
            (Events.TERMINATE, self._after_terminate),
        ):
            if trainer.has_event_handler(handler, event):
                trainer.remove_event_handler(handler, event)
            trainer.add_event_handler(event, handler)

    def _end(self) -> None:
        self._signals.restore()
        trainer = self._trainer
        if trainer.has_event_handler(self._on_exception, Events.EXCEPTION_RAISED):
            trainer.remove_event_handler(self._on_exception, Events.EXCEPTION_RAISED)
        self.checkpoint.wait()

    def _after_iteration(self) -> None:
        state = self._trainer.state
        self._boundary = state.iteration
        if state.epoch_length is not None and state.iteration % state.epoch_length == 0:
            # The epoch ends here, and what its handlers do belongs to this iteration.
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
            trainer.terminate()

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


def resume_or_start(
    trainer: Engine,
    to_save: Mapping[str, Any],
    dirname: str | os.PathLike[str],
    every: Any,
    *,
    n_saved: int | None = 2,
    filename_prefix: str = "",
    background: bool = True,
    overlap: bool = False,
    resume_from: str | os.PathLike[str] | None = None,
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> ResumableRun:
    """Restores a run from the newest good checkpoint of a folder, if any, and saves it there.

    Call it when all handlers are attached, and then `trainer.run(...)`, the same way at the first
    start and at every later one. A checkpoint is written after all other handlers of an iteration
    (and of its epoch, if that ends with it), when one is due, when the run ends, and when a signal
    asks it to end; then TERMINATE and COMPLETED fire, and `run` returns. A run that is complete
    already returns at once.

    Args:
        trainer: the engine; saved as `trainer` unless `to_save` holds it.
        to_save: all that the run changes, by name: model, optimizer, scheduler, ...
        dirname: the folder, which belongs to this run; created if need be.
        every: after how many iterations to save, or an event, such as `Events.EPOCH_COMPLETED`.
        n_saved: how many checkpoints to keep; with 2, there is one left where the disk has damaged
            the newest.
        filename_prefix: the first part of the files' names.
        background: see `DiskSaver`; takes memory for a second copy of the state.
        overlap: see `DiskSaver`.
        resume_from: a checkpoint to restore instead of the newest one.
        signals: which signals end the run in order. The second Ctrl-C ends it at once.

    Returns:
        What was restored and, later, what ended the run: `sys.exit(run.exit_code)` tells a
        scheduler whether to start it again.

    Raises:
        TypeError: if an object lacks `state_dict` or `load_state_dict`, or `every` is no event.
        ValueError: if `to_save` leaves out what the trainer trains, or `every` is below 1.
        CheckpointBusy: if another process saves into the folder.
        CheckpointError: if there are checkpoints and none is good, or it does not fit the objects.
    """
    event = event_of(every)
    objects = with_trainer(trainer, to_save)
    ranks = agree(trainer)
    name = re.escape(f"{filename_prefix}_" if filename_prefix else "")
    single = re.escape(next(iter(objects))) if len(objects) == 1 else "checkpoint"
    own = re.compile(rf"{name}{single}_\d+\.pt")

    def open_and_find() -> tuple[DiskSaver, Found]:
        saver = DiskSaver(dirname, require_empty=False, background=background, overlap=overlap)
        try:
            return saver, find(objects, saver.dirname, own, resume_from)
        except BaseException:
            saver.close()
            raise

    if ranks is None:
        saver, found = open_and_find()
    else:
        saver, found = find_together(ranks.line, open_and_find)
    try:
        latest = _restore(objects, found, ranks)
    except BaseException:
        saver.close()
        raise
    checkpoint = Checkpoint(objects, saver, filename_prefix, n_saved=n_saved)
    if this_rank() == 0:
        iteration = trainer.state.iteration
        checkpoint.load_state_dict({"_saved": own_files(saver.dirname, own, iteration)})
    return begin(trainer, checkpoint, latest, signals, event)


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


def _restore(objects: Mapping[str, Any], found: Found, ranks: Agreement | None) -> Latest:
    """Restores the objects from what was found; in a world, on all ranks or on none."""
    latest = found.latest
    if latest and ranks is None:
        restore(objects, found.state, latest.path, {})
    elif latest.path is not None and ranks is not None:
        # Its name only: rank 0 has the folder's path as it was given, which may be relative.
        with together(ranks.line, f"restoring {latest.path.name}"):
            restore(objects, found.state, latest.path, {})
    return latest


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
