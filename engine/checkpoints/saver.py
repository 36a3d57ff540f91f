"""DiskSaver: writes checkpoints into a folder, each of them whole or absent, and removes them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crosstrain.engine.guards import is_mapping
from crosstrain.engine.proof import Checks, Strictness
from crosstrain.engine.ranks.world import this_rank, world_size
from crosstrain.engine.storage.archive import read_archive
from crosstrain.engine.storage.atomic import (
    HashingFile,
    check_free_space,
    make_folder,
    open_regular,
    remove_leftovers,
    write_file,
)
from crosstrain.engine.storage.errors import CheckpointError, CheckpointWriteError
from crosstrain.engine.storage.lock import FolderLock
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.safe_load import check_written
from crosstrain.engine.storage.staging import HostState, Snapshot, on_host

from .save_handler import FolderSaver, SaveJob

__all__ = ["DiskSaver"]

_logger = logging.getLogger(__name__)

# What is not tensor data: the archive's directory, the pickle, the manifest. Generous.
_SPARE_BYTES = 2 << 20


class DiskSaver(FolderSaver):
    """Saves checkpoints as files in a folder.

    A file appears under its name only when all of it is on the disk; a kill, a full disk or a power
    cut before that leaves what was there. It ends with a manifest, by which a load finds damage.

    Args:
        dirname: the folder.
        atomic: writes aside and renames. If false, in place: for file systems without rename; a
            kill then leaves a part of a file, which a load refuses.
        create_dir: makes the folder if it is not there.
        require_empty: raises if the folder holds checkpoints already.
        save_on_rank: which process writes, where there are several.
        background: copies the state and returns; a thread writes it. The next save waits for it.
        overlap: with `background`, parameters and optimizer states are copied in the thread too,
            and the optimizer's next step waits for that. Sound only if nothing but
            `optimizer.step()` changes them; a change by another operation on the tensor itself is
            noticed and an error, a change through `.data` is not.
        **kwargs: arguments of `torch.save`, as far as they leave the file safe to load.

    Raises:
        ValueError: if the folder is not there and not to be made, or holds checkpoints.
        TypeError: if an argument of `torch.save` would make the file unsafe or unreadable.
        CheckpointBusy: if another process saves into the folder.
        CheckpointWriteError: if the folder cannot be used.
    """

    def __init__(
        self,
        dirname: str | os.PathLike[str],
        atomic: bool = True,
        create_dir: bool = True,
        require_empty: bool = True,
        save_on_rank: int = 0,
        *,
        background: bool = False,
        overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        if overlap and not background:
            raise ValueError(
                "overlap=True copies in the thread that writes, and background=False has none: "
                "pass background=True as well, or leave overlap out"
            )
        super().__init__(dirname, background)
        self.save_on_rank = save_on_rank
        self.kwargs = _checked_arguments(kwargs)
        self._atomic = atomic
        self._overlap = overlap
        if this_rank() == save_on_rank:
            self._open_folder(create_dir, require_empty)

    def _open_folder(self, create_dir: bool, require_empty: bool) -> None:
        try:
            if create_dir:
                make_folder(self.dirname)
            if not self.dirname.is_dir():
                raise ValueError(
                    f"Directory path '{self.dirname}' is not found. Pass create_dir=True to make it"
                )
            self._lock = FolderLock(self.dirname)
            if self._lock.exclusive:
                removed = remove_leftovers(self.dirname)
                if removed:
                    _logger.info(
                        "Removed %d file(s) from %s that a killed process had not finished.",
                        len(removed),
                        self.dirname,
                    )
            present = sorted(path.name for path in self.dirname.glob("*.pt"))
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointWriteError(
                f"Checkpoints cannot be saved into {self.dirname}: {error.strerror or error}",
                error,
                self.dirname,
            ) from error
        if require_empty and present:
            self._lock.release()
            raise ValueError(
                f"Files {present} with extension '.pt' are already present in the directory "
                f"{self.dirname}. To go on from them, see resume_or_start. To use this directory "
                "anyway, pass `require_empty=False`."
            )
        self._newest_ns = max((_saved_at(self.dirname / name) for name in present), default=0)

    def __call__(
        self,
        checkpoint: Mapping[str, Any],
        filename: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a checkpoint; in the background, waits for the one before it first.

        Args:
            checkpoint: states by name, or the state of one object itself.
            filename: the file's name in the folder.
            metadata: see `BaseSaveHandler`; further, `optimizers`: those whose step `overlap` may
                rely on, and `checks`: how strict to be about what could not be loaded again.

        Raises:
            CheckpointContentError: if a state holds what cannot be loaded safely.
            CheckpointWriteError: if the file system refuses; in the background, if it refused the
                checkpoint before this one.
        """
        if this_rank() != self.save_on_rank:
            return
        self.wait()
        told = metadata or {}
        describe = self._describe(checkpoint, filename, told)
        strictness = told.get("checks", Checks()).writer
        if not self._background:
            self._write(filename, describe, on_host(checkpoint), strictness)
            return
        optimizers: Iterable[torch.optim.Optimizer] = told.get("optimizers", ())
        snapshot = Snapshot(checkpoint, self._buffers, optimizers if self._overlap else ())
        host = HostState(snapshot.state, snapshot.nbytes)
        write = partial(self._write, filename, describe, host, strictness)
        path = self.dirname / filename
        self._job = SaveJob(filename, snapshot, write, self._remove_now, path)

    def _describe(
        self, checkpoint: Any, filename: str, metadata: Mapping[str, Any]
    ) -> Callable[[int, str], Manifest]:
        facts: dict[str, Any] = {
            "saved_at_ns": self._next_time(),
            "objects": _names_of(checkpoint),
            "world_size": world_size(),
            "rank": this_rank(),
            "versions": self._versions,
            **metadata.get("run", {}),
        }
        return lambda size, digest: Manifest(file=filename, size=size, sha256=digest, **facts)

    def _remove_now(self, filename: str) -> None:
        if this_rank() != self.save_on_rank:
            return
        path = self.dirname / filename
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointWriteError(
                f"Old checkpoint {path} could not be removed: {error.strerror or error}. The new "
                "one is saved",
                error,
                path,
            ) from error

    def _write(
        self,
        filename: str,
        describe: Callable[[int, str], Manifest],
        host: HostState,
        strictness: Strictness,
    ) -> None:
        """Writes a plain state; in whichever thread."""
        path = self.dirname / filename
        check_free_space(path, host.nbytes + _SPARE_BYTES)

        def produce(file: HashingFile) -> None:
            # torch asks only for write and flush.
            torch.save(host.state, file, **self.kwargs)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

        def trailer(size: int, digest: str) -> tuple[bytes, int]:
            encoded = describe(size, digest).encode()
            return encoded, len(encoded)

        def check(descriptor: int) -> None:
            check_written(descriptor, host.state, path, strictness)

        # Beside training, the thread makes do with one core.
        parallel = not self._background
        write_file(path, produce, trailer, check=check, atomic=self._atomic, parallel=parallel)


def _names_of(checkpoint: Any) -> tuple[str, ...]:
    return tuple(map(str, checkpoint)) if is_mapping(checkpoint) else ()


def _saved_at(path: Path) -> int:
    """Returns when a checkpoint was saved, as its manifest says; 0 if it says nothing."""
    try:
        with open_regular(path) as file:
            comment = read_archive(file.fileno()).comment
        return Manifest.decode(comment).saved_at_ns if comment else 0
    except (OSError, CheckpointError):
        # Whether a file is good is told where it is loaded; here only good ones count.
        return 0


def _checked_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Refuses arguments of torch.save that would write what is not loaded safely."""
    legal: dict[str, tuple[Any, ...]] = {
        "pickle_protocol": (2,),
        "_use_new_zipfile_serialization": (True,),
        "_disable_byteorder_record": (True, False),
    }
    for name, value in kwargs.items():
        if name not in legal or value not in legal[name]:
            raise TypeError(
                f"DiskSaver got {name}={value!r}. Of the arguments of torch.save it takes those "
                "that leave a file that loads with weights_only=True: "
                + ", ".join(f"{key} in {values}" for key, values in legal.items())
            )
    return dict(kwargs)
