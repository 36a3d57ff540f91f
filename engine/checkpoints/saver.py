"""DiskSaver: writes checkpoints into a folder, each of them whole or absent, and removes them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from crosstrain.engine.errors import warn_user
from crosstrain.engine.formats.safe_write import contents_of
from crosstrain.engine.formats.staging import HostBuffers, HostState, Snapshot, on_host
from crosstrain.engine.guards import is_mapping
from crosstrain.engine.nests import walk_objects
from crosstrain.engine.parts.write import Staged, write_in_parts
from crosstrain.engine.parts.writers import Writers
from crosstrain.engine.proof import Strictness
from crosstrain.engine.ranks.line import Line
from crosstrain.engine.ranks.world import this_rank, world_size
from crosstrain.engine.shown import shown
from crosstrain.engine.spread import has_spread, parameter_names, split
from crosstrain.engine.storage.errors import (
    CheckpointNotFound,
    CheckpointWarning,
    CheckpointWriteError,
    refused,
)
from crosstrain.engine.storage.locations import Location, StorePath, location_of
from crosstrain.engine.storage.manifest import Manifest, later_than, software_versions
from crosstrain.engine.stores.folders import folder_at

from .layouts import FILE, PARTS, endings, is_there, layout_of, list_checkpoints, newest_time
from .save_handler import BaseSaveHandler, RunFacts
from .save_job import SaveJob, own_lines

_logger = logging.getLogger(__name__)


class DiskSaver(BaseSaveHandler):
    """Saves checkpoints in a folder: each is a file, or, of a sharded model, a folder of parts.

    The folder may be one in a store, given by a URL such as `s3://bucket/run`: fsspec reaches it. A
    checkpoint is staged on this machine, uploaded, and compared with what the store has of it.

    A checkpoint appears under its name only when all of it is on the disk; a kill, a full disk or a
    power cut before that leaves what was there. It has a manifest, by which a load finds damage.

    Where FSDP has spread a model over processes, each writes what it holds: the name then ends with
    `.sharded`, the folder has to be on a file system or in a store that all of them see, and they
    call this together. Else one process writes, and the others return at once.

    Args:
        dirname: the folder, or its URL in a store.
        atomic: writes aside and renames. If false, in place: for file systems without rename; a
            kill then leaves a part of a file, which a load refuses. Parts are always written aside.
        create_dir: makes the folder if it is not there.
        require_empty: raises if the folder holds checkpoints already.
        save_on_rank: which process writes, where there are several.
        background: copies the state and returns; a thread writes it. The next save waits for it.
        overlap: with `background`, parameters and optimizer states are copied in the thread too,
            and the optimizer's next step waits for that. Sound only if nothing but
            `optimizer.step()` changes them; a change by another operation on the tensor itself is
            noticed and an error, a change through `.data` is not. Not for sharded models.
        parts: writes parts although no model is sharded: each process what is its own.
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
        parts: bool = False,
        **kwargs: Any,
    ) -> None:
        if overlap and not background:
            raise ValueError(
                "overlap=True copies in the thread that writes, and background=False has none: "
                "pass background=True as well, or leave overlap out"
            )
        # Wherever the program goes, a relative path is one of where it was then.
        self.dirname = location_of(dirname).absolute()
        self._folder = folder_at(self.dirname)
        self.save_on_rank = save_on_rank
        self._background = background
        self._run = RunFacts()
        self._lines: tuple[Line | None, Line | None] | None = None
        self._newest_ns: int | None = None
        self._told_of_ending = False
        # Of what is in a store: whether a name is one of parts.
        self._in_parts: dict[str, bool] = {}
        self._versions = software_versions()
        self._buffers = HostBuffers()
        self._job: SaveJob | None = None
        self.register_with_ignite()
        self.kwargs = _checked_arguments(kwargs)
        self._atomic = atomic
        self._overlap = overlap
        self._always_in_parts = parts
        if this_rank() == save_on_rank:
            self._open_folder(create_dir, require_empty)

    def _open_folder(self, create_dir: bool, require_empty: bool) -> None:
        with refused(f"Checkpoints cannot be saved into {self.dirname}", self.dirname):
            if create_dir:
                self._folder.make()
            if not self._folder.exists():
                raise ValueError(
                    f"Directory path '{self.dirname}' is not found. Pass create_dir=True to make it"
                )
            if removed := self._folder.claim():
                _logger.info(
                    "Removed %d leftover(s) from %s that a killed process had not finished.",
                    removed,
                    shown(self.dirname),
                )
            found = self._folder.entries(endings()) if require_empty else []
            present = [entry.name for entry in found]
        if present:
            self._folder.release()
            told = " or ".join(sorted({f"'{Path(name).suffix}'" for name in present}))
            raise ValueError(
                f"Files {present} with extension {told} are already present in the directory "
                f"{self.dirname}. To go on from them, see resume_or_start. To use this directory "
                "anyway, pass `require_empty=False`."
            )

    @property
    def background(self) -> bool:
        """Whether a thread writes."""
        return self._background

    @property
    def job(self) -> SaveJob | None:
        """What the thread is writing, or has written and was not asked about; None if nothing."""
        return self._job

    def path_of(self, filename: str) -> Location:
        """Returns where the checkpoint of a name is: the file, or the folder of its parts."""
        parts = PARTS.path_of(self.dirname, filename)
        in_parts = layout_of(parts) is PARTS
        if in_parts and isinstance(self.dirname, StorePath):
            # Its name tells the form there, whether it is there or not.
            if filename not in self._in_parts:
                self._in_parts[filename] = is_there(parts)
            in_parts = self._in_parts[filename]
        return parts if in_parts else self.dirname / filename

    def check_name(self, filename: str) -> None:
        """Makes sure that a checkpoint can have a name, and is found by it.

        Args:
            filename: the name.

        Raises:
            ValueError: if it cannot.
        """
        self._folder.check_name(filename)
        ending = Path(filename).suffix
        if ending == PARTS.ending:
            raise ValueError(
                f"The checkpoint's name {filename!r} ends with {ending}, as folders of sharded "
                f"models do: give it the ending {FILE.ending}"
            )
        if ending != FILE.ending and not self._told_of_ending:
            self._told_of_ending = True
            warn_user(
                f"Checkpoints get names that end with {ending!r}, not {FILE.ending}. They are "
                "saved, and load by their paths, but Checkpoint.latest, resume_or_start, "
                "`crosstrain inspect FOLDER` and require_empty do not see them",
                CheckpointWarning,
            )

    def prepare(self, run: RunFacts) -> None:
        """Hears what the next checkpoint is of."""
        self._run = run

    @property
    def saved_at_ns(self) -> int:
        """When the checkpoint that was saved last was saved, as its manifest says, in ns."""
        return self._newest_ns or 0

    def follow(self, newest_ns: int) -> None:
        """Makes sure that what is saved from now on is newer than a time, in ns."""
        self._newest_ns = max(self._newest_ns or 0, newest_ns)

    def _next_time(self) -> int:
        """Returns the time of a new checkpoint, in ns: after that of every other in the folder."""
        if self._newest_ns is None:
            try:
                listed = list_checkpoints(self.dirname)
            except CheckpointNotFound:
                # There is no folder: what writes says so.
                listed = []
            self._newest_ns = newest_time(listed)
        self._newest_ns = later_than(self._newest_ns)
        return self._newest_ns

    def __call__(
        self,
        checkpoint: Mapping[str, Any],
        filename: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a checkpoint; in the background, waits for the one before it first.

        Args:
            checkpoint: states by name, or the state of one object itself.
            filename: the file's name in the folder; parts have the ending `.sharded` in place of
                its own.
            metadata: not used.

        Raises:
            CheckpointContentError: if a state holds what cannot be loaded safely.
            CheckpointWriteError: if the file system refuses; in the background, if it refused the
                checkpoint before this one. Of parts, in all processes.
        """
        self.check_name(filename)
        self.wait()
        run, self._run = self._run, RunFacts()
        in_parts = self._always_in_parts or has_spread(checkpoint)
        if isinstance(self.dirname, StorePath):
            self._in_parts[filename] = in_parts
        if in_parts:
            self._folder.check_name(PARTS.path_of(self.dirname, filename).name)
            self._save_parts(checkpoint, filename, run)
        elif this_rank() == self.save_on_rank:
            self._save_file(checkpoint, filename, run)

    def _describe(self, checkpoint: Any, name: str, run: RunFacts) -> Manifest:
        names = run.names
        if names is None:
            names = tuple(map(str, checkpoint)) if is_mapping(checkpoint) else ()
        return Manifest(
            file=name,
            size=0,
            sha256="",
            saved_at_ns=self._next_time(),
            objects=names,
            bare=run.bare,
            iteration=run.iteration,
            epoch=run.epoch,
            backend=run.backend,
            world_size=world_size(),
            rank=this_rank(),
            versions=self._versions,
        )

    def _keep_folder(self) -> None:
        """Makes sure that the folder is still this process's, where it was."""
        lost = f"Nothing was saved into {self.dirname}, since its lock is lost"
        with refused(lost, self.dirname):
            self._folder.renew()

    def _copied(
        self, state: Any, stepped: Sequence[torch.optim.Optimizer] = ()
    ) -> tuple[HostState, Snapshot | None]:
        """Returns a state on the host, and what has yet to fill it where a thread is to."""
        if not self._background:
            return on_host(state), None
        snapshot = Snapshot(state, self._buffers, stepped)
        return HostState(snapshot.state, snapshot.nbytes), snapshot

    def _begin(
        self,
        write: Callable[[], None],
        filename: str,
        path: Location,
        snapshot: Snapshot | None,
        voting: Line | None = None,
    ) -> None:
        if snapshot is None:
            write()
        else:
            self._job = SaveJob(filename, snapshot, write, self._remove_now, path, voting)

    def _save_file(self, checkpoint: Any, filename: str, run: RunFacts) -> None:
        self._keep_folder()
        told = self._describe(checkpoint, filename, run)
        path = self.dirname / filename
        values = [value for _, value in walk_objects(run.objects)] if self._overlap else []
        stepped = [value for value in values if isinstance(value, torch.optim.Optimizer)]
        host, snapshot = self._copied(checkpoint, stepped)
        write = partial(self._write, path, told, host, run.checks.writer)
        self._begin(write, filename, path, snapshot)

    def _write(
        self, path: Location, told: Manifest, host: HostState, strictness: Strictness
    ) -> None:
        """Writes a plain state; in whichever thread."""
        contents = contents_of(
            host,
            told,
            path,
            strictness,
            atomic=self._atomic,
            # Beside training, the thread makes do with one core.
            parallel=not self._background,
            **self.kwargs,
        )
        self._folder.write(path.name, contents)

    def _save_parts(self, checkpoint: Any, filename: str, run: RunFacts) -> None:
        if self._overlap:
            raise ValueError(
                "overlap=True copies in the thread that writes, which a sharded model cannot have: "
                "its processes write together. Leave it out; background=True is enough"
            )
        if run.bare and run.names:
            checkpoint = {run.names[0]: checkpoint}
        path = PARTS.path_of(self.dirname, filename)
        if self._lines is None:
            self._lines = own_lines("savers")
        writing, voting = self._lines
        writers = Writers(writing, path)
        error: Exception | None = None
        ready: tuple[Manifest, Staged, Snapshot | None] | None = None
        try:
            self._keep_folder()
            told = replace(self._describe(checkpoint, path.name, run), bare=False, rank=0)
            ready = (told, *self._stage(checkpoint, run))
        except Exception as caught:  # noqa: BLE001 - raised again when the others know of it
            error = caught
        # A state that cannot be saved may be one process's only: all must know before they write.
        writers.agree(error)
        assert ready is not None
        told, staged, snapshot = ready
        write = partial(write_in_parts, self._folder, staged, told, writers)
        self._begin(write, filename, path, snapshot, voting)

    def _stage(self, checkpoint: Any, run: RunFacts) -> tuple[Staged, Snapshot | None]:
        """Returns this process's part of the states, and the snapshot that has yet to fill it."""
        names = parameter_names(run.objects) if run.objects else {}
        taken = split(checkpoint, names)
        parts = {name: shard.to_local().detach() for name, shard in taken.shards.items()}  # type: ignore[attr-defined]
        host, snapshot = self._copied({"states": taken.tree, "parts": parts})
        return Staged(host, taken.shards, taken.places, names, run.checks.writer), snapshot

    def remove(self, filename: str) -> None:
        """Removes a checkpoint; in the background, after the pending one is good.

        If the pending one fails, it stays. Does nothing if it is gone already.
        """
        if self._job is None or not self._job.remove_afterwards(filename):
            self._remove_now(filename)

    def _remove_now(self, filename: str) -> None:
        known = self._in_parts.pop(filename, None)
        if this_rank() != self.save_on_rank:
            return
        if known is not True:
            place = self.dirname / filename
            try:
                self._folder.remove(filename)
            except OSError as error:
                told = _not_removed(place, error)
                if not any(list(self._in_parts.values())):
                    raise CheckpointWriteError(told, error, place) from error
                # It is of before a resume, and the others would wait for this process.
                warn_user(told, CheckpointWarning)
        if known is not False:
            parts = PARTS.path_of(self.dirname, filename)
            try:
                self._folder.remove_parts(parts.name)
            except OSError as error:
                # No error: it would end this process only, and the others would wait for it.
                warn_user(_not_removed(parts, error), CheckpointWarning)

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Where all processes save together, all call it together.

        Raises:
            CheckpointError: what the thread raised, once.
        """
        if self._job is not None:
            self._job.finish()
            self._job = None

    def close(self) -> None:
        """Waits, and gives the folder up, and whatever was opened."""
        try:
            self.wait()
        finally:
            self._folder.release()
            lines, self._lines = self._lines, None
            for line in filter(None, lines or ()):
                line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _not_removed(place: Location, error: OSError) -> str:
    why = error.strerror or error
    return f"Old checkpoint {place} could not be removed: {why}. The new one is saved"


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
