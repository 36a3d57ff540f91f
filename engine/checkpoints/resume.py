"""resume_or_start: the one line that makes a run go on where it was stopped, however it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from crosstrain.engine.engine import Engine
from crosstrain.engine.proof import Checks
from crosstrain.engine.ranks.agreement import agree
from crosstrain.engine.ranks.world import this_rank
from crosstrain.engine.spread import is_sharded

from .handler import Checkpoint
from .resumable import ResumableRun, begin, event_of, with_trainer
from .resume_found import Found, base_name, find, find_together, own_files, restore_found
from .saver import DiskSaver
from .sharded_resume import resume_or_start_sharded
from .stop_signals import STOP_SIGNALS

__all__ = ["resume_or_start"]


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
    signals: Sequence[signal.Signals] = STOP_SIGNALS,
    checks: Checks | None = None,
) -> ResumableRun:
    """Restores a run from the newest good checkpoint of a folder, if any, and saves it there.

    Where FSDP has sharded a model, all processes save together: see `resume_or_start_sharded`. A
    run goes on from either kind of checkpoint, so that the backend can be changed between starts.

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
        signals: which signals end the run in order. The second Ctrl-C ends it at once. SIGHUP is
            left alone where the program, or `nohup`, has set it.
        checks: how strict the resume is about what it measures of itself, see `Checks`.

    Returns:
        What was restored and, later, what ended the run: `sys.exit(run.exit_code)` tells a
        scheduler whether to start it again.

    Raises:
        TypeError: if an object lacks `state_dict` or `load_state_dict`, or `every` is no event.
        ValueError: if `to_save` leaves out what the trainer trains, or `every` is below 1.
        CheckpointBusy: if another process saves into the folder.
        CheckpointError: if there are checkpoints and none is good, or it does not fit the objects.
        ResumeError: if the run would not go on as the one that was saved.
    """
    event = event_of(every)
    trainer.checks = trainer.checks if checks is None else checks
    objects = with_trainer(trainer, to_save)
    if is_sharded(objects):
        if overlap:
            raise ValueError(
                "overlap=True copies in the thread that writes, which a sharded model cannot have: "
                "its processes write together. Leave it out; background=True is the default"
            )
        return resume_or_start_sharded(
            trainer,
            to_save,
            dirname,
            every,
            n_saved=n_saved,
            filename_prefix=filename_prefix,
            background=background,
            resume_from=resume_from,
            signals=signals,
            checks=checks,
        )
    ranks = agree(trainer)
    base = base_name(objects, filename_prefix)

    def open_and_find() -> tuple[DiskSaver, Found]:
        saver = DiskSaver(dirname, require_empty=False, background=background, overlap=overlap)
        try:
            return saver, find(objects, saver.dirname, base, resume_from)
        except BaseException:
            saver.close()
            raise

    if ranks is None:
        saver, found = open_and_find()
    else:
        saver, found = find_together(ranks.line, open_and_find)
    try:
        restore_found(objects, found, ranks, trainer.checks)
    except BaseException:
        saver.close()
        raise
    latest = found.latest
    saver.follow(latest)
    checkpoint = Checkpoint(objects, saver, filename_prefix, n_saved=n_saved)
    if this_rank() == 0:
        own = own_files(saver.dirname, base, trainer.state.iteration)
        checkpoint.load_state_dict({"_saved": own})
    return begin(trainer, checkpoint, latest, signals, event)
