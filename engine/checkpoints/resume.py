"""resume_or_start: the one line that makes a run go on where it was stopped, however it was."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

from crosstrain.engine.engine import Engine
from crosstrain.engine.events import Events, is_event, is_events_list
from crosstrain.engine.nests import walk_objects
from crosstrain.engine.proof import Checks
from crosstrain.engine.ranks.agreement import agree
from crosstrain.engine.ranks.line import Line, has_ranks
from crosstrain.engine.ranks.world import this_rank, world_size
from crosstrain.engine.spread import is_sharded
from crosstrain.engine.storage.locations import Location, StorePath, location_of

from .claim import Claim
from .done_again import DoneAgain
from .handler import Checkpoint
from .loading import Latest
from .objects import check_objects, unsaved_objects
from .remote import RemoteCopies
from .resumable import ResumableRun
from .saver import DiskSaver
from .starting_point import StartingPoint
from .stop_signals import STOP_SIGNALS


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
    remote: str | os.PathLike[str] | None = None,
    every_remote: Any = None,
) -> ResumableRun:
    """Restores a run from the newest good checkpoint of a folder, if any, and saves it there.

    Where FSDP has sharded a model, all processes save together, each its part (see `DiskSaver`). A
    run goes on from either form of checkpoint, so that the backend can be changed between starts.

    Call it when all handlers are attached, and then `trainer.run(...)`, the same way at the first
    start and at every later one. A checkpoint is written after all other handlers of an iteration
    (and of its epoch, if that ends with it), when one is due, when the run ends, and when a signal
    asks it to end; then TERMINATE and COMPLETED fire, and `run` returns. A run that is complete
    already returns at once.

    Args:
        trainer: the engine; saved as `trainer` unless `to_save` holds it.
        to_save: all that the run changes, by name: model, optimizer, scheduler, ...
        dirname: the folder, or its URL in a store, such as `s3://bucket/run`; it belongs to this
            run, and is created if need be.
        every: after how many iterations to save, or an event, such as `Events.EPOCH_COMPLETED`.
        n_saved: how many checkpoints to keep; with 2, there is one left where the disk has damaged
            the newest.
        filename_prefix: the first part of the files' names.
        background: see `DiskSaver`; takes memory for a second copy of the state.
        overlap: see `DiskSaver`.
        resume_from: a checkpoint to restore instead of the newest one.
        signals: which signals end the run in order. The second Ctrl-C ends it at once. SIGHUP is
            left alone where the program, or `nohup`, has set it. After one has ended a run, `run`
            raises `SystemExit` with its exit code where a trainer would go on from that run: the
            same one, one that was set up before, one that trains the same parameters.
        checks: how strict the resume is about what it measures of itself, see `Checks`.
        remote: a second tier: the URL of a folder in a store, to which checkpoints are copied from
            `dirname`, a folder on the disk. A run goes on from the newest good one of both.
        every_remote: when a checkpoint is saved that is copied there, as `every`; each of them, by
            default. What the run ends with is always copied.

    Returns:
        What was restored and, later, what ended the run: `sys.exit(run.exit_code)` tells a
        scheduler whether to start it again.

    Raises:
        TypeError: if an object lacks `state_dict` or `load_state_dict`, or `every` is no event.
        CheckpointStoreMissing: if the package that reaches such a store is not installed.
        ValueError: if `to_save` leaves out what the trainer trains, or `every` is below 1.
        CheckpointBusy: if another process saves into the folder, or another trainer of this one,
            whose run has not ended.
        CheckpointError: if there are checkpoints and none is good, or it does not fit the objects.
        ResumeError: if the run would not go on as the one that was saved.
    """
    event = _event_of(every)
    remote_event = None if every_remote is None else _event_of(every_remote)
    trainer.checks = trainer.checks if checks is None else checks
    objects = _with_trainer(trainer, to_save)
    _check_world(trainer)
    if overlap and is_sharded(objects):
        raise ValueError(
            "overlap=True copies in the thread that writes, which a sharded model cannot have: "
            "its processes write together. Leave it out; background=True is the default"
        )
    ranks = agree(trainer)
    line = None if ranks is None else ranks.line
    # Processes that train a sharded model without agreeing on their runs still read together.
    own = Line() if line is None and has_ranks() and is_sharded(objects) else None
    folder = location_of(dirname)
    second = _second_tier(folder, remote, every_remote)
    line = line or own
    start = StartingPoint(objects, filename_prefix, resume_from, line, folder, second)
    claim = Claim(folder, filename_prefix, trainer)
    with ExitStack() as stack:
        if own is not None:
            stack.callback(own.close)
        # Whatever ends this block, Ctrl-C too: the folder, its lock and the place are free again.
        undo = stack.enter_context(ExitStack())
        undo.callback(claim.give_back)
        saver = start.open(
            partial(DiskSaver, require_empty=False, background=background, overlap=overlap)
        )
        undo.callback(saver.close)
        claim.take()
        copies = _open_second_tier(second, n_saved, is_sharded(objects), line)
        if copies is not None:
            undo.callback(copies.close)
        latest = start.restore(trainer.checks)
        if copies is not None:
            copies.keeps(start.own_files(trainer.state.iteration, remote=True))
            copies.catch_up(latest)
        checkpoint = Checkpoint(objects, saver, filename_prefix, n_saved=n_saved)
        undo.pop_all()
    checkpoint.load_state_dict({"_saved": start.own_files(trainer.state.iteration)})
    done_again = _done_again(trainer, saver, filename_prefix, latest)
    run = ResumableRun(trainer, checkpoint, claim, latest, signals, copies, done_again)
    run.attach(event, remote_event)
    return run


def _done_again(trainer: Engine, saver: DiskSaver, prefix: str, latest: Latest) -> DoneAgain | None:
    """Returns what compares iterations that are repeated, where that can be done, and is asked."""
    strictness = trainer.checks.done_again
    on_disk = this_rank() == 0 and not isinstance(saver.dirname, StorePath)
    if not on_disk or not trainer.resumes_data or strictness == "off":
        return None
    found = DoneAgain(saver, prefix, strictness)
    if latest.manifest is not None:
        found.resumed_from(latest.manifest.saved_at_ns, trainer.state.iteration)
    return found


def _event_of(every: Any) -> Any:
    """Returns the event of `every`: a number of iterations, or an event; else a TypeError."""
    if isinstance(every, int) and not isinstance(every, bool):
        return Events.ITERATION_COMPLETED(every=every)
    if is_event(every) or is_events_list(every):
        return every
    raise TypeError(
        f"every should be a number of iterations or an event, such as 1000 or "
        f"Events.EPOCH_COMPLETED, got {every!r}"
    )


class _Objects(Mapping[str, Any]):
    """The objects of a run by name, of which the trainer itself is not kept: it keeps this."""

    def __init__(self, objects: Mapping[str, Any], trainer: Engine) -> None:
        self._engine = weakref.ref(trainer)
        self._objects = {
            name: None if value is trainer else value for name, value in objects.items()
        }
        self._own = frozenset(name for name, value in objects.items() if value is trainer)

    def __getitem__(self, name: str) -> Any:
        return self._engine() if name in self._own else self._objects[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def __len__(self) -> int:
        return len(self._objects)


def _with_trainer(trainer: Engine, to_save: Mapping[str, Any]) -> _Objects:
    """Returns the objects with the trainer among them; raises if what it trains is left out."""
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
    return _Objects(objects, trainer)


def _check_world(trainer: Engine) -> None:
    """Checks that a trainer in one of several processes knows of the others.

    Raises:
        ValueError: if it has no backend: only rank 0 would save, and nobody wait for it.
    """
    size = world_size()
    if trainer.backend is None and size > 1:
        raise ValueError(
            f"This is one of {size} processes, and the trainer has no backend to know it by: each "
            "would train on all batches, and look for checkpoints that only rank 0 saves. Make it "
            "with one, which takes the process group that is there: DeterministicEngine(step, get("
            '"cpu").open()), from crosstrain.backends import get'
        )


def _second_tier(folder: Location, remote: Any, every_remote: Any) -> StorePath | None:
    """Returns where checkpoints are copied to, if they are."""
    if remote is None:
        if every_remote is not None:
            raise ValueError(
                f"every_remote={every_remote!r} says when to copy, and remote=None not where to: "
                'give a URL, as remote="s3://bucket/run"'
            )
        return None
    there = location_of(remote)
    if isinstance(folder, StorePath) or not isinstance(there, StorePath):
        raise ValueError(
            f"The first tier is a folder on the disk and the second, remote, a URL; got {folder} "
            f"and {there}"
        )
    return there


def _open_second_tier(
    place: StorePath | None, n_saved: int | None, in_parts: bool, line: Line | None
) -> RemoteCopies | None:
    """Returns what copies to the second tier; nothing on ranks that have nothing to copy."""
    with nullcontext() if line is None else line.together("opening the second tier"):
        if place is None or not (in_parts or this_rank() == 0):
            return None
        return RemoteCopies(place, n_saved, in_parts)
