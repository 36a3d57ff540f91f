"""The second tier of a run's checkpoints: some of those on the disk are copied to a store."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from crosstrain.engine.errors import warn_user
from crosstrain.engine.formats.safe_load import verify_file
from crosstrain.engine.parts.copy import PartsToCopy
from crosstrain.engine.parts.writers import Writers
from crosstrain.engine.ranks.line import Line
from crosstrain.engine.ranks.world import this_rank
from crosstrain.engine.shown import shown
from crosstrain.engine.storage.errors import CheckpointWarning, refused
from crosstrain.engine.storage.locations import StorePath
from crosstrain.engine.stores.folders import open_place
from crosstrain.engine.stores.store_folder import StoreFolder

from .layouts import FILE, PARTS, layout_of
from .loading import Latest
from .retention import Item, Retention
from .save_job import JointJob, own_lines

_logger = logging.getLogger(__name__)


class RemoteCopies:
    """Copies checkpoints to a store, one at a time, in a thread; the newest `n_saved` are kept.

    A copy may take longer than the time between two saves on the disk: it does not hold these up,
    and what it copies is the checkpoint as it was, whatever becomes of its name.

    One process copies files. Of a checkpoint in parts (`in_parts`) each process copies what it has
    written; then all of them make this object, and call what it has, together.
    """

    def __init__(self, location: StorePath, n_saved: int | None, in_parts: bool = False) -> None:
        self.location = location
        self._folder = StoreFolder(location)
        self._n_saved = n_saved
        self._kept: list[Item] = []
        self._job: JointJob | None = None
        self._lines: tuple[Line | None, Line | None] = (None, None)
        self._is_first = this_rank() == 0
        if self._is_first:
            self._open()
        if in_parts:
            self._lines = own_lines("copies")

    def _open(self) -> None:
        with refused(f"Checkpoints cannot be copied to {self.location}", self.location):
            self._folder.make()
            removed = self._folder.claim()
        if removed:
            _logger.info(
                "Ended %d upload(s) to %s that a killed process had not finished.",
                removed,
                shown(self.location),
            )

    def keeps(self, items: Iterable[Item]) -> None:
        """Hears which copies of this run are there: they are removed when newer ones are."""
        self._kept = sorted(items)

    def catch_up(self, latest: Latest) -> None:
        """Begins to copy what the run goes on from, if a good one is on the disk only.

        A kill may have come between the save there and its copy, and the run may be complete. Of
        what both have, the copy is compared with that on the disk, and what of it is another is put
        again.
        """
        path, manifest = latest.path, latest.manifest
        if not isinstance(path, Path) or path.parent != latest.folder or manifest is None:
            return
        name = path.with_suffix(FILE.ending).name
        there = {item.filename for item in self._kept}
        if manifest.iteration is not None:
            self.copy(path, manifest.iteration, compare=name in there)

    def copy(self, path: Path, iteration: int, *, compare: bool = False) -> None:
        """Begins to copy a checkpoint, when the copy before it has ended; raises what that has met.

        It is held against its own manifest before it is put; a damaged one is not, and is told as
        an error.

        Args:
            path: the file, or the folder of the parts.
            iteration: of the run.
            compare: leaves what is there already, if it has the same bytes.
        """
        self.wait()
        writing, voting = self._lines
        # Opened here: the next save may remove it.
        put: Callable[[StoreFolder], None] | None = None
        if layout_of(path) is PARTS:
            writers = Writers(writing, self.location / path.name)
            put = partial(PartsToCopy(path, writers).put, compare=compare)
        elif self._is_first:
            put = _file(path, compare)
        item = Item(iteration, path.with_suffix(FILE.ending).name)

        def work() -> None:
            if put is not None:
                put(self._folder)
            # Only now: the new one was compared with what was put.
            self._keep_newest(item)
            if self._is_first:
                _logger.info("%s is in %s, too.", shown(path.name), shown(self.location))

        self._job = JointJob(work, f"copying {path.name} to {self.location}", voting)

    def _keep_newest(self, item: Item) -> None:
        kept, removed = Retention(self._n_saved, False, self._kept).with_added(item)
        left = [old for old in self._kept if old.filename in removed and not self._remove(old)]
        # What could not be removed is tried again with the next one.
        self._kept = [*left, *kept]

    def _remove(self, old: Item) -> bool:
        """Removes a copy; tells whether it is gone."""
        if not self._is_first:
            return True
        try:
            # Of a run from before it was sharded, or after, there are the others, too.
            self._folder.remove(old.filename)
            self._folder.remove_parts(PARTS.path_of(self.location, old.filename).name)
        except OSError as error:
            # No error: the new one is there, and it would end this process only.
            why = error.strerror or error
            text = f"Old copy {self.location / old.filename} could not be removed: {why}"
            warn_user(text, CheckpointWarning)
            return False
        return True

    def ask(self) -> None:
        """Raises what the last copy has met, if it has ended; does not wait."""
        if self._job is not None and not self._job.running:
            self.wait()

    def wait(self) -> None:
        """Waits until the last copy is in the store, and raises what it has met."""
        if self._job is not None:
            self._job.finish()
            self._job = None

    def close(self) -> None:
        """Waits, and gives the folder up."""
        try:
            self.wait()
        finally:
            self._folder.release()
            for line in filter(None, self._lines):
                line.close()


def _file(path: Path, compare: bool) -> Callable[[StoreFolder], None]:
    """Opens a file, and returns what verifies and copies it; see `RemoteCopies.copy`."""
    held = contextlib.ExitStack()
    file = held.enter_context(open_place(path))

    def put(folder: StoreFolder) -> None:
        with held:
            verify_file(path, file)
            if not (compare and folder.holds(path.name, file.fileno())):
                folder.copy(path.name, file.fileno())

    return put
