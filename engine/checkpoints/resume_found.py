"""What a run is to be resumed from: found by one rank, and the same on all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from crosstrain.engine.proof import Checks
from crosstrain.engine.ranks.agreement import Agreement
from crosstrain.engine.ranks.line import Line
from crosstrain.engine.storage.errors import CheckpointNotFound
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.safe_load import load_file
from crosstrain.engine.storage.sharded_manifest import ShardedManifest

from .loading import Latest, candidates, load_latest
from .objects import restore
from .retention import Item
from .saver import DiskSaver
from .sharded_latest import sharded_folders
from .sharded_load import SUFFIX, ShardedCheckpoint, is_sharded_checkpoint, load_sharded

__all__ = [
    "Found",
    "base_name",
    "find",
    "find_together",
    "newer_file",
    "open_checkpoint",
    "own_files",
    "restore_found",
]


_READING = "reading the checkpoint that rank 0 has found"


class Found(NamedTuple):
    """The checkpoint that a run goes on from.

    Args:
        latest: the file or folder, and what was passed over.
        state: what it holds; None if there is none, or each process reads its part of it.
    """

    latest: Latest
    state: Any


def base_name(objects: Mapping[str, Any], filename_prefix: str) -> str:
    """Returns how the names of a run's checkpoints begin.

    Args:
        objects: what is saved.
        filename_prefix: see `Checkpoint`.
    """
    name = next(iter(objects)) if len(objects) == 1 else "checkpoint"
    return (f"{filename_prefix}_" if filename_prefix else "") + f"{name}_"


def _names(base: str, ending: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(base)}\d+{re.escape(ending)}")


def find(
    objects: Mapping[str, Any],
    folder: Path,
    base: str,
    resume_from: str | os.PathLike[str] | None,
) -> Found:
    """Reads the newest good checkpoint of a folder, or the one that is named.

    A sharded one that is newer than all whole ones is verified where it is loaded.

    Args:
        objects: what it must hold.
        folder: the folder.
        base: how the names of the run's files begin.
        resume_from: the one that is named.

    Raises:
        CheckpointNotFound: if there are checkpoints and none is good.
        CheckpointError: if the one that is named cannot be read.
    """
    if resume_from is not None:
        return open_checkpoint(folder, Path(resume_from).expanduser())
    latest, state = load_latest(folder, tuple(objects), _names(base, ".pt"))
    names = _names(base, SUFFIX)
    for path, told in sharded_folders(folder, base):
        if not isinstance(told, ShardedManifest) or not names.fullmatch(path.name):
            continue
        manifest = told.summary()
        if _is_newer(path, manifest, objects, latest):
            return Found(replace(latest, path=path, manifest=manifest), None)
    if not latest and latest.passed_over:
        raise CheckpointNotFound(
            f"{latest.describe()}. A new run in this folder would lose what may be rescued: move "
            "these files away to start from the beginning, or name one by resume_from"
        )
    return Found(latest, state)


def newer_file(objects: Mapping[str, Any], latest: Latest, base: str) -> Path | None:
    """Returns the newest whole checkpoint of a folder, if a sharded one is not newer.

    Args:
        objects: what it must hold.
        latest: the newest sharded one, and the folder.
        base: how the names of the run's files begin.
    """
    for path, told in candidates(latest.folder, _names(base, ".pt")):
        if isinstance(told, Manifest) and _is_newer(path, told, objects, latest):
            return path
    return None


def _is_newer(path: Path, told: Manifest, objects: Iterable[str], latest: Latest) -> bool:
    """Tells whether a checkpoint has the objects, and was saved after the latest of its kind."""
    after = -1 if latest.manifest is None else latest.manifest.saved_at_ns
    whole = told.file == path.name and all(name in told.objects for name in objects)
    return whole and told.saved_at_ns > after


def open_checkpoint(folder: Path, path: Path) -> Found:
    """Reads a checkpoint; of a sharded one, what it says of itself.

    Args:
        folder: where the run is saved.
        path: the file, or the folder of a sharded one.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if is_sharded_checkpoint(path):
        opened = ShardedCheckpoint.open(path)
        return Found(Latest(folder, opened.path, opened.manifest.summary(), ()), None)
    loaded = load_file(path)
    return Found(Latest(folder, loaded.path, loaded.manifest, ()), loaded.state)


def restore_found(
    objects: Mapping[str, Any], found: Found, ranks: Agreement | None, checks: Checks
) -> None:
    """Restores objects from what was found; in a world, on all ranks or on none.

    Args:
        objects: the objects by name.
        found: what was found, the same on all ranks.
        ranks: the ranks; None if there is one process.
        checks: how strict it is.

    Raises:
        CheckpointError: if it is damaged, or does not fit the objects.
        RankFailed: if another rank cannot.
    """
    path = found.latest.path
    if path is None:
        return
    manifest = found.latest.manifest
    bare = None if manifest is None else manifest.bare
    # Its name only: rank 0 has the folder's path as it was given, which may be relative.
    with nullcontext() if ranks is None else ranks.line.together(f"restoring {path.name}"):
        if found.state is None:
            load_sharded(objects, path, checks)
        else:
            restore(objects, found.state, path, {}, checks, bare)


def own_files(folder: Path, base: str, iteration: int) -> list[Item]:
    """Returns the files that a run has saved up to an iteration: those that it may remove.

    Later ones belong to a course of the run that was given up; it is not for us to remove them.

    Args:
        folder: where they are.
        base: how the names of the run's files begin.
        iteration: where the run is.
    """
    found: list[Item] = []
    for path, manifest in candidates(folder, _names(base, ".pt")):
        if not isinstance(manifest, Manifest) or manifest.file != path.name:
            continue
        if manifest.iteration is not None and manifest.iteration <= iteration:
            found.append(Item(manifest.iteration, path.name))
    return sorted(found)


def find_together(
    line: Line, open_and_find: Callable[[], tuple[DiskSaver, Found]]
) -> tuple[DiskSaver, Found]:
    """Has rank 0 find the checkpoint, and each other rank read the same file.

    Args:
        line: to the other ranks.
        open_and_find: opens the folder to save into, and finds the checkpoint there.

    Returns:
        What saves, on this rank, and what was found.

    Raises:
        RankFailed: if another rank cannot; each rank that cannot raises why.
    """
    what = "looking for the newest good checkpoint"
    if line.rank == 0:
        try:
            saver, found = open_and_find()
        except Exception as error:
            line.meet(what, error=error)
            raise
        latest = found.latest
        told = {
            "folder": str(latest.folder.absolute()),
            "path": None if latest.path is None else str(latest.path.absolute()),
            "manifest": None if latest.manifest is None else latest.manifest.encode().decode(),
        }
        line.meet(what, told)
        with line.together(_READING):
            pass
        return saver, found
    (told,) = line.meet(what, of=(0,))
    with line.together(_READING):
        found = _read(told)
        # It does not write here, and so takes no folder.
        saver = DiskSaver(found.latest.folder, require_empty=False)
    return saver, found


def _read(told: Mapping[str, Any]) -> Found:
    folder = Path(told["folder"])
    if told["path"] is None:
        return Found(Latest(folder, None, None, ()), None)
    found = open_checkpoint(folder, Path(told["path"]))
    wanted = None if told["manifest"] is None else Manifest.decode(told["manifest"].encode())
    if found.latest.manifest != wanted:
        raise CheckpointNotFound(
            f"{told['path']} is another file here than on rank 0. All ranks resume from one file: "
            "save into a folder of a file system that they share"
        )
    return found
