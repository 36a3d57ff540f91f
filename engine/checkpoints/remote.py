"""The second tier of a run's checkpoints: some of those on the disk are copied to a store."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from crosstrain.engine.storage.background import BackgroundJob
from crosstrain.engine.storage.errors import CheckpointError, CheckpointWriteError
from crosstrain.engine.storage.folders import open_place
from crosstrain.engine.storage.locations import StorePath
from crosstrain.engine.storage.store_folder import StoreFolder

from .retention import Item, Retention

__all__ = ["RemoteCopies"]

_logger = logging.getLogger(__name__)


class RemoteCopies:
    """Copies files to a store, one at a time, in a thread; the newest `n_saved` are kept there.

    A copy may take longer than the time between two saves on the disk: it does not hold these up,
    and what it copies is the file as it was, whatever becomes of its name.

    Args:
        location: the folder in the store.
        n_saved: how many copies to keep there; None keeps all.

    Raises:
        CheckpointBusy: if another process saves there.
        CheckpointWriteError: if the store cannot be used.
    """

    def __init__(self, location: StorePath, n_saved: int | None) -> None:
        self.location = location
        self._folder = StoreFolder(location)
        self._n_saved = n_saved
        self._kept: list[Item] = []
        self._job: BackgroundJob | None = None
        try:
            self._folder.make()
            self._claim = self._folder.claim()
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointWriteError(
                f"Checkpoints cannot be copied to {location}: {error.strerror or error}",
                error,
                location,
            ) from None
        if self._claim.removed:
            _logger.info(
                "Ended %d upload(s) to %s that a killed process had not finished.",
                len(self._claim.removed),
                location,
            )

    def keeps(self, items: Iterable[Item]) -> None:
        """Hears which copies of this run are there: they are removed when newer ones are."""
        self._kept = sorted(items)

    def copy(self, path: Path, iteration: int) -> None:
        """Begins to copy a checkpoint; waits for the copy before it first.

        Args:
            path: the file.
            iteration: of the run.

        Raises:
            CheckpointError: what the copy before it raised.
        """
        self.wait()
        with contextlib.ExitStack() as stack:
            # Opened here: the next save may remove the file.
            file = stack.enter_context(open_place(path))
            kept, removed = Retention(self._n_saved, False, self._kept).with_added(
                Item(iteration, path.name)
            )
            held = stack.pop_all()

        def work() -> None:
            with held:
                self._folder.copy(path.name, file.fileno())
            # Only now: the new one was compared with what was put.
            for name in removed:
                self._folder.remove(name)
            self._kept = kept
            _logger.info("Copied %s to %s.", path.name, self.location)

        self._job = BackgroundJob(work, f"copying {path.name} to {self.location}")

    def ask(self) -> None:
        """Raises what the last copy has met, if it has ended; does not wait."""
        if self._job is not None and not self._job.running:
            self.wait()

    def wait(self) -> None:
        """Waits until the last copy is in the store.

        Raises:
            CheckpointError: if it could not be copied.
        """
        job = self._job
        if job is None:
            return
        job.join()
        self._job = None
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        """Waits, and gives the folder up."""
        try:
            self.wait()
        finally:
            self._claim.release()
