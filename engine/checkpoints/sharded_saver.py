"""ShardedSaver: checkpoints that all processes write together, each its part, whole or absent."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from crosstrain.engine.errors import warn_user
from crosstrain.engine.ranks.world import this_rank, world_size
from crosstrain.engine.spread import parameter_names, split
from crosstrain.engine.storage.atomic import make_folder
from crosstrain.engine.storage.errors import CheckpointError, CheckpointWarning
from crosstrain.engine.storage.lock import FolderLock
from crosstrain.engine.storage.sharded_manifest import ShardedManifest
from crosstrain.engine.storage.sharded_write import (
    ASIDE,
    LEFTOVER,
    Ranks,
    Staged,
    write_sharded,
)
from crosstrain.engine.storage.staging import Snapshot, host_state

from .save_handler import FolderSaver, SaveJob
from .sharded_latest import sharded_folders
from .sharded_load import SUFFIX

__all__ = ["ShardedSaver"]

_logger = logging.getLogger(__name__)


class ShardedSaver(FolderSaver):
    """Saves checkpoints as folders, into which each process writes the part that it holds.

    For models that FSDP has sharded; others work too, and are written by the first process. Give it
    to `Checkpoint`; all processes make it, and call the handler, together. A folder appears under
    its name only when all processes' files are on the disk and a manifest with their hashes is
    beside them. The name is that of `Checkpoint`, with the ending `.sharded`.

    Args:
        dirname: a folder on a file system that all processes see.
        create_dir: makes the folder if it is not there.
        require_empty: raises if the folder holds sharded checkpoints already.
        background: copies the state and returns; a thread in each process writes it. The next save
            waits for it. All processes learn of its end, or of a failure, in the same iteration.

    Raises:
        ValueError: in all processes, if the folder is not there and not to be made, or holds
            checkpoints.
        CheckpointBusy: if another run saves into the folder.
        CheckpointWriteError: if the folder cannot be used.
    """

    def __init__(
        self,
        dirname: str | os.PathLike[str],
        create_dir: bool = True,
        require_empty: bool = True,
        *,
        background: bool = False,
    ) -> None:
        super().__init__(dirname, background)
        # The thread's messages and the training's would otherwise get into each other's place.
        self._writers, self._voters = Ranks.make(), Ranks.make()
        error: Exception | None = None
        if this_rank() == 0:
            try:
                self._open_folder(create_dir, require_empty)
            except (CheckpointError, OSError, ValueError) as caught:
                error = caught
        self._writers.agree(f"opening {self.dirname}", error)

    def _open_folder(self, create_dir: bool, require_empty: bool) -> None:
        if create_dir:
            make_folder(self.dirname)
        if not self.dirname.is_dir():
            raise ValueError(
                f"Directory path '{self.dirname}' is not found. Pass create_dir=True to make it"
            )
        self._lock = FolderLock(self.dirname)
        if self._lock.exclusive:
            _clean(self.dirname)
        present = sharded_folders(self.dirname)
        if require_empty and present:
            self._lock.release()
            raise ValueError(
                f"{self.dirname} holds sharded checkpoints already: "
                f"{', '.join(sorted(path.name for path, _ in present))}. To go on from them, see "
                "resume_or_start_sharded. To use this directory anyway, pass require_empty=False"
            )
        told = [one for _, one in present if isinstance(one, ShardedManifest)]
        self._newest_ns = max((one.saved_at_ns for one in told), default=0)

    def path_of(self, filename: str) -> Path:
        """Returns the folder that a `Checkpoint`'s file name stands for."""
        return self.dirname / (Path(filename).stem + SUFFIX)

    def __call__(
        self,
        checkpoint: Mapping[str, Any],
        filename: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a checkpoint; all processes call it together.

        Args:
            checkpoint: states by name, or the state of one object itself.
            filename: the name; its ending is replaced by `.sharded`.
            metadata: as of `BaseSaveHandler`; further, `objects`: the nest of objects whose states
                they are, by which the parameters of optimizers are named.

        Raises:
            CheckpointContentError: if a state holds what cannot be loaded safely.
            CheckpointWriteError: in all processes, if the file system refuses one of them.
        """
        self.wait()
        told = dict(metadata or {})
        facts: dict[str, Any] = dict(told.get("run", {}))
        if facts.pop("bare", False):
            checkpoint = {facts["objects"][0]: checkpoint}
        facts.setdefault("objects", tuple(map(str, checkpoint)))
        error: Exception | None = None
        staged: Staged | None = None
        snapshot: Snapshot | None = None
        try:
            staged, snapshot = self._stage(checkpoint, told.get("objects"))
        except Exception as caught:  # noqa: BLE001 - raised again when the others know of it
            error = caught
        # A state that cannot be saved may be one process's only: all must know before they write.
        self._writers.agree(f"saving {filename}", error)
        assert staged is not None
        manifest = ShardedManifest(
            folder=self.path_of(filename).name,
            files={},
            saved_at_ns=self._next_time(),
            world_size=world_size(),
            versions=self._versions,
            objects=tuple(facts["objects"]),
            iteration=facts.get("iteration"),
            epoch=facts.get("epoch"),
            backend=facts.get("backend"),
        )
        write = partial(write_sharded, self.dirname, staged, manifest, self._writers)
        if snapshot is None:
            write()
        else:
            path = self.path_of(filename)
            self._job = ShardedJob(self._voters, filename, snapshot, write, self._remove_now, path)

    def _stage(self, checkpoint: Any, objects: Any) -> tuple[Staged, Snapshot | None]:
        """Returns this process's part of the states, and the snapshot that has yet to fill it."""
        names = {} if objects is None else parameter_names(objects)
        taken = split(checkpoint, names)
        parts = {name: shard.to_local().detach() for name, shard in taken.shards.items()}  # type: ignore[attr-defined]
        nest: dict[str, Any] = {"states": taken.tree, "parts": parts}
        snapshot = Snapshot(nest, self._buffers) if self._background else None
        plain = host_state(nest) if snapshot is None else snapshot.state
        staged = Staged(plain["states"], plain["parts"], taken.shards, taken.places, names)
        return staged, snapshot

    def _remove_now(self, filename: str) -> None:
        if this_rank() == 0:
            _remove(self.path_of(filename))


class ShardedJob(SaveJob):
    """A sharded checkpoint on its way to the disk: all processes learn together that it is there.

    Args:
        voters: the processes, for their training threads.
        *args: see `SaveJob`.
    """

    def __init__(self, voters: Ranks, *args: Any) -> None:
        self._voters = voters
        self._vote: Callable[[], bool] | None = None
        self._ended = False
        super().__init__(*args)

    @property
    def running(self) -> bool:
        """Whether a process is still writing; all ask together, and get the same answer.

        What is answered is the vote that was begun when it was asked the last time: so nobody
        waits for it.
        """
        if self._ended:
            return False
        if self._vote is not None and self._vote():
            self._ended = True
            return False
        self._vote = self._voters.begin_vote(not super().running)
        return True

    def finish(self) -> None:
        """Waits until the checkpoint is on the disk; all processes call it together.

        Raises:
            CheckpointError: if it could not be saved.
        """
        if self._vote is not None:
            self._vote()
        super().finish()


def _clean(folder: Path) -> None:
    """Removes what killed processes have left, and puts back what was set aside for a moment."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(ASIDE):
            home = folder / entry.name.removeprefix(ASIDE)
            if home.exists():
                _discard(entry)
            else:
                os.rename(entry, home)
        elif entry.name.startswith(LEFTOVER[0]) and entry.name.endswith(LEFTOVER[1]):
            _discard(entry)
            _logger.info("Removed %s, which a killed process had not finished.", entry)


def _remove(path: Path) -> None:
    """Takes a checkpoint's name away at once, then its files."""
    aside = path.with_name(f"{LEFTOVER[0]}{secrets.token_hex(8)}{LEFTOVER[1]}")
    try:
        os.rename(path, aside)
        _discard(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        # No error: it would end this process only, and the others would wait for it.
        warn_user(
            f"Old checkpoint {path} could not be removed: {error.strerror or error}. The new one "
            "is saved",
            CheckpointWarning,
        )


def _discard(path: Path) -> None:
    shutil.rmtree(path)
