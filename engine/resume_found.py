"""What a run is to be resumed from: found by one rank, and the same on all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint_errors import CheckpointNotFound
from .disk_saver import DiskSaver
from .loading import Latest, candidates, load_latest
from .manifest import Manifest
from .rank_line import RankLine
from .ranks import RankFailed
from .retention import Item
from .safe_load import load_file

__all__ = ["Found", "find", "find_together", "own_files", "together"]


_READING = "reading the checkpoint that rank 0 has found"


class Found(NamedTuple):
    """The checkpoint that a run goes on from.

    Args:
        latest: the file, and what was passed over.
        state: what it holds; None if there is no checkpoint.
    """

    latest: Latest
    state: Any


def find(
    objects: Mapping[str, Any],
    folder: Path,
    own: re.Pattern[str],
    resume_from: str | os.PathLike[str] | None,
) -> Found:
    """Reads the newest good checkpoint of a folder, or the one that is named.

    Args:
        objects: what it must hold.
        folder: the folder.
        own: names of the run's files.
        resume_from: the one that is named.

    Raises:
        CheckpointNotFound: if there are checkpoints and none is good.
        CheckpointError: if the one that is named cannot be read.
    """
    if resume_from is not None:
        loaded = load_file(Path(resume_from).expanduser())
        latest, state = Latest(folder, loaded.path, loaded.manifest, ()), loaded.state
    else:
        latest, state = load_latest(folder, tuple(objects), own)
    if not latest and latest.passed_over:
        raise CheckpointNotFound(
            f"{latest.describe()}. A new run in this folder would lose what may be rescued: move "
            "these files away to start from the beginning, or name one by resume_from"
        )
    return Found(latest, state)


def own_files(folder: Path, own: re.Pattern[str], iteration: int) -> list[Item]:
    """Returns the files that a run has saved up to an iteration: those that it may remove.

    Later ones belong to a course of the run that was given up; it is not for us to remove them.

    Args:
        folder: where they are.
        own: the names of the run's files.
        iteration: where the run is.
    """
    found: list[Item] = []
    for path, manifest in candidates(folder, own):
        if not isinstance(manifest, Manifest) or manifest.file != path.name:
            continue
        if manifest.iteration is not None and manifest.iteration <= iteration:
            found.append(Item(manifest.iteration, path.name))
    return sorted(found)


def find_together(
    line: RankLine, open_and_find: Callable[[], tuple[DiskSaver, Found]]
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
        line.meet(what, json.dumps(told))
        with together(line, _READING):
            pass
        return saver, found
    told = json.loads(line.meet(what))
    with together(line, _READING):
        found = _read(told)
        # It does not write here, and so takes no folder.
        saver = DiskSaver(found.latest.folder, require_empty=False)
    return saver, found


def _read(told: Mapping[str, Any]) -> Found:
    folder = Path(told["folder"])
    if told["path"] is None:
        return Found(Latest(folder, None, None, ()), None)
    loaded = load_file(Path(told["path"]))
    wanted = None if told["manifest"] is None else Manifest.decode(told["manifest"].encode())
    if loaded.manifest != wanted:
        raise CheckpointNotFound(
            f"{told['path']} is another file here than on rank 0. All ranks resume from one file: "
            "save into a folder of a file system that they share"
        )
    return Found(Latest(folder, loaded.path, loaded.manifest, ()), loaded.state)


@contextmanager
def together(line: RankLine, what: str) -> Generator[None, None, None]:
    """Ends a block on all ranks where it raises on one.

    Args:
        line: to the other ranks.
        what: what is done there, the same on all.

    Raises:
        RankFailed: if it failed on another rank: names it, and says why.
    """
    failed: Exception | None = None
    try:
        yield
    except RankFailed:
        raise
    except Exception as error:  # noqa: BLE001  raised again when the others know of it
        failed = error
    line.meet(what, error=failed)
