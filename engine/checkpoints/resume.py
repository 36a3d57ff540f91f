"""resume_or_start: the one line that makes a run go on where it was stopped, however it was.

What the run goes on from is found by rank 0, and is the same on all ranks.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from crosstrain.engine.engine import Engine
from crosstrain.engine.formats.safe_load import LoadedFile, load_file
from crosstrain.engine.parts.read import Parts
from crosstrain.engine.proof import Checks
from crosstrain.engine.ranks.agreement import agree
from crosstrain.engine.ranks.line import Line, has_ranks
from crosstrain.engine.ranks.world import this_rank, world_size
from crosstrain.engine.spread import is_sharded
from crosstrain.engine.storage.errors import (
    CheckpointError,
    CheckpointNotFound,
    lack_of,
)
from crosstrain.engine.storage.locations import Location, StorePath, location_of
from crosstrain.engine.storage.manifest import Manifest

from .claim import Claim
from .handler import Checkpoint
from .layouts import (
    PARTS,
    Told,
    doubt_of,
    layout_of,
    list_checkpoints,
    newest_first,
    newest_time,
)
from .loading import Latest, PassedOver, load_parts, pass_over
from .objects import restore, to_own
from .remote import RemoteCopies
from .resumable import ResumableRun, event_of, with_trainer
from .retention import Item
from .saver import DiskSaver
from .stop_signals import STOP_SIGNALS

_LOOKING = "looking for the newest good checkpoint"
_READING = "reading the checkpoint that rank 0 has found"


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
            left alone where the program, or `nohup`, has set it.
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
    event = event_of(every)
    remote_event = None if every_remote is None else event_of(every_remote)
    trainer.checks = trainer.checks if checks is None else checks
    objects = with_trainer(trainer, to_save)
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
    look = _Look(objects, filename_prefix, resume_from, line or own, (folder, *second))
    claim = Claim(folder, filename_prefix, trainer)
    with ExitStack() as stack:
        if own is not None:
            stack.callback(own.close)
        # Whatever ends this block, Ctrl-C too: the folder, its lock and the place are free again.
        undo = stack.enter_context(ExitStack())
        undo.callback(claim.give_back)
        saver = look.open(
            partial(DiskSaver, require_empty=False, background=background, overlap=overlap)
        )
        undo.callback(saver.close)
        claim.take()
        copies = look.copies(second, n_saved)
        if copies is not None:
            undo.callback(copies.close)
        latest = look.restore(trainer.checks)
        if copies is not None:
            copies.keeps(look.own_files(trainer.state.iteration, remote=True))
            copies.catch_up(latest)
        checkpoint = Checkpoint(objects, saver, filename_prefix, n_saved=n_saved)
        undo.pop_all()
    checkpoint.load_state_dict({"_saved": look.own_files(trainer.state.iteration)})
    run = ResumableRun(trainer, checkpoint, claim, latest, signals, copies)
    run.attach(event, remote_event)
    return run


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


def _second_tier(folder: Location, remote: Any, every_remote: Any) -> tuple[StorePath, ...]:
    """Returns where checkpoints are copied to, if they are."""
    if remote is None:
        if every_remote is not None:
            raise ValueError(
                f"every_remote={every_remote!r} says when to copy, and remote=None not where to: "
                'give a URL, as remote="s3://bucket/run"'
            )
        return ()
    there = location_of(remote)
    if isinstance(folder, StorePath) or not isinstance(there, StorePath):
        raise ValueError(
            f"The first tier is a folder on the disk and the second, remote, a URL; got {folder} "
            f"and {there}"
        )
    return (there,)


class _Answer(NamedTuple):
    """What rank 0 has found: told to all ranks.

    `saved` has the iterations and names of the run's own checkpoints, `copied` of those in the
    second tier; `newest_ns` is when the newest of the folder was saved.
    """

    latest: Latest
    saved: tuple[Item, ...]
    copied: tuple[Item, ...]
    newest_ns: int


@dataclass
class _Look:
    """Looks for the checkpoint that a run goes on from, and restores it; on all ranks together.

    Args:
        objects: what it must hold.
        filename_prefix: of the run's checkpoints.
        resume_from: the one that is named, if one is.
        line: to the other ranks; None if there is one process.
        folders: where to look, as this process was told: the run's, and the second tier.
    """

    objects: Mapping[str, Any]
    filename_prefix: str
    resume_from: str | os.PathLike[str] | None
    line: Line | None
    folders: tuple[Location, ...]
    _answer: _Answer | None = None
    _loaded: LoadedFile | None = None
    _parts: Parts | None = None
    _left: Iterator[Told] = field(default_factory=lambda: iter(()))
    _passed_over: list[PassedOver] = field(default_factory=list[PassedOver])

    def open(self, make: Callable[[Location], DiskSaver]) -> DiskSaver:
        """Opens the folder with what makes a saver of it, and finds the checkpoint."""
        savers: list[DiskSaver] = []

        def begin_here() -> _Answer:
            savers.append(make(self.folders[0]))
            return self._first(savers[0].dirname)

        try:
            answer = self._as_told_here(self._from_first(begin_here))
            while (path := answer.latest.path) is not None and layout_of(path) is PARTS:
                try:
                    self._parts = Parts.verified(path, self.line)
                    break
                except CheckpointError as error:
                    if self.resume_from is not None or lack_of(error):
                        raise
                    find_next = partial(self._next, answer, str(error))
                answer = self._as_told_here(self._from_first(find_next))
            with nullcontext() if self.line is None else self.line.together(_READING):
                if not savers:
                    self._read_too(answer.latest)
                    # It does not write files here, and so takes no folder.
                    savers.append(make(answer.latest.folder))
        except BaseException:
            # Whatever ended it: a saver that nobody gets would keep the folder's lock.
            for saver in savers:
                saver.close()
            raise
        self._answer = answer
        savers[0].follow(answer.newest_ns)
        return savers[0]

    def _from_first(self, ask: Callable[[], _Answer]) -> _Answer:
        return ask() if self.line is None else self.line.from_first(_LOOKING, ask)

    def _first(self, folder: Location) -> _Answer:
        """Lists the folder, once, and returns the first checkpoint that may be it."""
        name = next(iter(self.objects)) if len(self.objects) == 1 else "checkpoint"
        base = (f"{self.filename_prefix}_" if self.filename_prefix else "") + f"{name}_"
        pattern = re.compile(rf"{re.escape(base)}\d+")
        tiers = [list_checkpoints(one, pattern) for one in (folder, *self.folders[1:])]
        listed = newest_first(told for tier in tiers for told in tier)
        saved, copied = _own(tiers[0]), _own(tiers[1]) if len(tiers) > 1 else ()
        latest = Latest(folder.absolute(), None, None, ())
        answer = _Answer(latest, saved, copied, newest_time(listed))
        if self.resume_from is None:
            self._left = iter(listed)
            return self._next(answer)
        path = location_of(self.resume_from)
        if layout_of(path) is PARTS:
            manifest: Manifest | None = Parts.open(path).manifest
        else:
            manifest = self._load(path).manifest
        newest = 0 if manifest is None or not manifest.is_believable else manifest.saved_at_ns
        newest = max(answer.newest_ns, newest)
        latest = replace(latest, path=path.absolute(), manifest=manifest)
        return answer._replace(latest=latest, newest_ns=newest)

    def _next(self, answer: _Answer, bad: str | None = None) -> _Answer:
        """Returns the next checkpoint that may be it: a file that was read, or parts."""
        if bad is not None and answer.latest.path is not None:
            pass_over(answer.latest.path, bad, self._passed_over)
        found: Told | None = None
        for told in self._left:
            reason = doubt_of(told, self.objects)
            if reason is None and told.layout is not PARTS:
                try:
                    self._load(told.path)
                except CheckpointError as error:
                    if lack_of(error):
                        raise
                    reason = str(error)
            if reason is None:
                found = told
                break
            pass_over(told.path, reason, self._passed_over)
        latest = Latest(answer.latest.folder, None, None, tuple(self._passed_over))
        if found is None and latest.passed_over:
            raise CheckpointNotFound(
                f"{latest.describe()}. A new run in this folder would lose what may be rescued: "
                "move these files away to start from the beginning, or name one by resume_from"
            )
        if found is not None:
            manifest = found.manifest if isinstance(found.manifest, Manifest) else None
            latest = replace(latest, path=found.path.absolute(), manifest=manifest)
        return answer._replace(latest=latest)

    def _load(self, path: Location) -> LoadedFile:
        self._loaded = load_file(path, take=partial(to_own, self.objects, {}))
        return self._loaded

    def _read_too(self, latest: Latest) -> None:
        """Reads, on another rank, what rank 0 has read."""
        if latest.path is None:
            return
        here = self._parts if layout_of(latest.path) is PARTS else self._load(latest.path)
        if here is None or here.manifest != latest.manifest:
            raise CheckpointNotFound(
                f"{latest.path} is another file here than on rank 0. All ranks resume from one "
                "file: save into a folder of a file system that they share"
            )

    def restore(self, checks: Checks) -> Latest:
        """Restores the objects from what was found, and returns that; on all ranks or on none."""
        assert self._answer is not None
        latest, line = self._answer.latest, self.line
        path = latest.path
        if path is None:
            return latest
        # Its name only: rank 0 has the folder's path as it was given, which may be relative.
        with nullcontext() if line is None else line.together(f"restoring {path.name}"):
            if layout_of(path) is PARTS:
                assert self._parts is not None
                load_parts(self.objects, self._parts, checks)
            else:
                assert self._loaded is not None
                restore(self.objects, self._loaded, {}, checks)
        self._loaded = self._parts = None
        return latest

    def _as_told_here(self, answer: _Answer) -> _Answer:
        """Returns the answer with places in stores as this process was told them.

        What comes from rank 0 has no credentials.
        """
        told = list(self.folders)
        if self.resume_from is not None:
            told.append(location_of(self.resume_from).parent)
        here = {str(one): one for one in told if isinstance(one, StorePath)}
        path, folder = answer.latest.path, answer.latest.folder
        if isinstance(path, StorePath) and str(path.parent) in here:
            path = here[str(path.parent)] / path.name
        if isinstance(folder, StorePath):
            folder = here.get(str(folder), folder)
        return answer._replace(latest=replace(answer.latest, path=path, folder=folder))

    def copies(self, second: tuple[StorePath, ...], n_saved: int | None) -> RemoteCopies | None:
        """Returns what copies to the second tier; nothing on ranks that have nothing to copy."""
        line, in_parts = self.line, is_sharded(self.objects)
        with nullcontext() if line is None else line.together("opening the second tier"):
            if not second or not (in_parts or this_rank() == 0):
                return None
            return RemoteCopies(second[0], n_saved, in_parts)

    def own_files(self, iteration: int, *, remote: bool = False) -> list[Item]:
        """Returns the checkpoints that a run has saved up to an iteration: those it may remove.

        Later ones belong to a course of the run that was given up; it is not for us to remove them.
        """
        assert self._answer is not None
        items = self._answer.copied if remote else self._answer.saved
        return [item for item in items if item.priority <= iteration]


def _own(listed: list[Told]) -> tuple[Item, ...]:
    """Returns the iterations and names of the checkpoints that are what they were saved as."""
    saved = {
        Item(told.manifest.iteration, told.path.with_suffix(".pt").name)
        for told in listed
        if isinstance(told.manifest, Manifest)
        and told.manifest.iteration is not None
        and told.manifest.file == told.path.name
    }
    return tuple(sorted(saved))
