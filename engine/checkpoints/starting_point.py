"""StartingPoint: what a run goes on from, found by rank 0, and the same on all ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from crosstrain.engine.formats.safe_load import LoadedFile, load_file
from crosstrain.engine.parts.read import Parts
from crosstrain.engine.proof import Checks
from crosstrain.engine.ranks.line import Line
from crosstrain.engine.storage.errors import CheckpointError, CheckpointNotFound, lack_of
from crosstrain.engine.storage.locations import Location, StorePath, location_of
from crosstrain.engine.storage.manifest import Manifest

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
from .retention import Item
from .saver import DiskSaver

_LOOKING = "looking for the newest good checkpoint"
_READING = "reading the checkpoint that rank 0 has found"


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
class StartingPoint:
    """The checkpoint that a run goes on from, if any; all ranks make this, and call it, together.

    Args:
        objects: what it must hold.
        filename_prefix: of the run's checkpoints.
        resume_from: the one that is named, if one is.
        line: to the other ranks; None if there is one process.
        folder: of the run's checkpoints, as this process was told, as `remote`.
        remote: the second tier, if there is one.
    """

    objects: Mapping[str, Any]
    filename_prefix: str
    resume_from: str | os.PathLike[str] | None
    line: Line | None
    folder: Location
    remote: StorePath | None
    _answer: _Answer | None = None
    _loaded: LoadedFile | None = None
    _parts: Parts | None = None
    _left: Iterator[Told] = field(default_factory=lambda: iter(()))
    _passed_over: list[PassedOver] = field(default_factory=list[PassedOver])

    def open(self, make: Callable[[Location], DiskSaver]) -> DiskSaver:
        """Opens the folder with what makes a saver of it, and finds the checkpoint."""
        savers: list[DiskSaver] = []

        def begin_here() -> _Answer:
            savers.append(make(self.folder))
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
        saved = list_checkpoints(folder, pattern)
        copied = [] if self.remote is None else list_checkpoints(self.remote, pattern)
        listed = newest_first([*saved, *copied])
        latest = Latest(folder.absolute(), None, None, ())
        answer = _Answer(latest, _own(saved), _own(copied), newest_time(listed))
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
        named = None if self.resume_from is None else location_of(self.resume_from).parent
        told = (self.folder, self.remote, named)
        here = {str(one): one for one in told if isinstance(one, StorePath)}
        path, folder = answer.latest.path, answer.latest.folder
        if isinstance(path, StorePath) and str(path.parent) in here:
            path = here[str(path.parent)] / path.name
        if isinstance(folder, StorePath):
            folder = here.get(str(folder), folder)
        return answer._replace(latest=replace(answer.latest, path=path, folder=folder))

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
