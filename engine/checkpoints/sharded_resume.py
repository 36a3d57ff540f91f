"""resume_or_start_sharded: `resume_or_start` for runs whose processes save and load together."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstrain.engine.engine import Engine
from crosstrain.engine.proof import Checks
from crosstrain.engine.ranks.agreement import agree
from crosstrain.engine.storage.errors import CheckpointNotFound
from crosstrain.engine.storage.sharded_manifest import ShardedManifest

from .handler import Checkpoint
from .resumable import ResumableRun, begin, event_of, with_trainer
from .resume_found import Found, base_name, newer_file, open_checkpoint, restore_found
from .retention import Item
from .sharded_latest import folders_together, from_first, latest_sharded
from .sharded_saver import ShardedSaver
from .stop_signals import STOP_SIGNALS

__all__ = ["resume_or_start_sharded"]


def resume_or_start_sharded(
    trainer: Engine,
    to_save: Mapping[str, Any],
    dirname: str | os.PathLike[str],
    every: Any,
    *,
    n_saved: int | None = 2,
    filename_prefix: str = "",
    background: bool = True,
    resume_from: str | os.PathLike[str] | None = None,
    signals: Sequence[signal.Signals] = STOP_SIGNALS,
    checks: Checks | None = None,
) -> ResumableRun:
    """Does what `resume_or_start` does, with a `ShardedSaver`; all processes call it together.

    Args:
        trainer: see `resume_or_start`, as for all that follow.
        to_save: likewise.
        dirname: the folder, on a file system that all processes see.
        every: likewise.
        n_saved: likewise.
        filename_prefix: likewise.
        background: see `ShardedSaver`.
        resume_from: a checkpoint of either kind to restore instead of the newest one.
        signals: likewise.
        checks: likewise.

    Returns:
        As of `resume_or_start`.

    Raises:
        TypeError: as of `resume_or_start`.
        ValueError: likewise.
        CheckpointBusy: if another run saves into the folder.
        CheckpointError: if there are checkpoints and none is good, or it does not fit the objects.
        ResumeError: if the run would not go on as the one that was saved.
    """
    event = event_of(every)
    trainer.checks = trainer.checks if checks is None else checks
    objects = with_trainer(trainer, to_save)
    ranks = agree(trainer)
    saver = ShardedSaver(dirname, require_empty=False, background=background)
    base = base_name(objects, filename_prefix)
    try:
        found = _find(objects, saver.dirname, base, resume_from)
        restore_found(objects, found, ranks, trainer.checks)
    except BaseException:
        saver.close()
        raise
    saver.follow(found.latest)
    checkpoint = Checkpoint(objects, saver, filename_prefix, n_saved=n_saved)
    # Later ones belong to a course of the run that was given up.
    saved = [
        Item(told.iteration, path.with_suffix(".pt").name)
        for path, told in folders_together(saver.dirname, base)
        if isinstance(told, ShardedManifest)
        and told.iteration is not None
        and told.folder == path.name
        and told.iteration <= trainer.state.iteration
    ]
    checkpoint.load_state_dict({"_saved": sorted(saved)})
    return begin(trainer, checkpoint, found.latest, signals, event)


def _find(
    objects: Mapping[str, Any],
    folder: Path,
    base: str,
    resume_from: str | os.PathLike[str] | None,
) -> Found:
    """Finds the newest good checkpoint, or the one that is named, the same in all processes."""
    if resume_from is not None:
        return open_checkpoint(folder, Path(resume_from).expanduser())
    latest = latest_sharded(folder, tuple(objects), base)
    file = from_first(lambda: newer_file(objects, latest, base))
    if file is not None:
        return open_checkpoint(folder, file)
    if not latest and latest.passed_over:
        raise CheckpointNotFound(
            f"{latest.describe()}. A new run in this folder would lose what may be rescued: move "
            "these folders away to start from the beginning, or name one by resume_from"
        )
    return Found(latest, None)
