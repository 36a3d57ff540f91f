"""Which sharded checkpoints a folder has, and the newest good one, the same in all processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed

from crosstrain.engine.ranks.world import this_rank
from crosstrain.engine.storage.errors import CheckpointError, CheckpointNotFound
from crosstrain.engine.storage.sharded_manifest import ShardedManifest

from .loading import Latest, PassedOver
from .sharded_load import SUFFIX, ShardedCheckpoint, in_group, verified

__all__ = ["folders_together", "from_first", "latest_sharded", "sharded_folders"]

_logger = logging.getLogger(__name__)
T = TypeVar("T")


def sharded_folders(
    folder: Path, prefix: str = ""
) -> list[tuple[Path, ShardedManifest | CheckpointError]]:
    """Lists the sharded checkpoints of a folder, newest first, with what each says of itself.

    Args:
        folder: the folder.
        prefix: how their names begin.

    Raises:
        CheckpointNotFound: if there is no such folder.
    """
    try:
        names = [entry for entry in folder.iterdir() if entry.name.endswith(SUFFIX)]
    except OSError as error:
        raise CheckpointNotFound(
            f"{folder} cannot be read as a folder: {error.strerror or error}"
        ) from error
    found: list[tuple[Path, ShardedManifest | CheckpointError]] = []
    for path in names:
        if not path.is_dir() or path.name.startswith(".") or not path.name.startswith(prefix):
            continue
        try:
            found.append((path, ShardedCheckpoint.open(path).manifest))
        except CheckpointError as error:
            found.append((path, error))

    def age(item: tuple[Path, ShardedManifest | CheckpointError]) -> tuple[bool, int, str]:
        path, told = item
        saved = told.saved_at_ns if isinstance(told, ShardedManifest) else None
        return saved is None, saved or 0, path.name

    return sorted(found, key=age, reverse=True)


def folders_together(
    folder: Path, prefix: str
) -> list[tuple[Path, ShardedManifest | CheckpointError]]:
    """Lists what `sharded_folders` does, as the first process sees it, the same in all processes.

    Args:
        folder: the folder.
        prefix: how their names begin.

    Raises:
        CheckpointNotFound: if there is no such folder.
    """
    return from_first(lambda: sharded_folders(folder, prefix))


def from_first(ask: Callable[[], T]) -> T:
    """Returns, in all processes, what a function returns in the first; they call it together.

    Raises:
        CheckpointError: in all processes, what it raises there.
    """
    if not in_group():
        return ask()
    told: list[Any] = [None]
    if this_rank() == 0:
        try:
            told = [ask()]
        except CheckpointError as error:
            told = [error]
    send: Any = distributed.broadcast_object_list  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    send(told, 0)
    if isinstance(told[0], CheckpointError):
        raise told[0]
    return told[0]  # type: ignore[no-any-return]


def latest_sharded(
    dirname: str | os.PathLike[str], objects: Collection[str] = (), prefix: str = ""
) -> Latest:
    """Finds the newest good sharded checkpoint of a folder; all processes call it together.

    Args:
        dirname: the folder.
        objects: names that it must hold.
        prefix: how its name begins.

    Returns:
        As of `Checkpoint.latest`: the same in all processes.

    Raises:
        CheckpointNotFound: if there is no such folder.
    """
    folder = Path(dirname).expanduser()
    passed_over: list[PassedOver] = []
    for path, told in folders_together(folder, prefix):
        reason = str(told) if isinstance(told, CheckpointError) else ""
        if isinstance(told, ShardedManifest):
            missing = [name for name in objects if name not in told.objects]
            if told.folder != path.name:
                reason = f"it was saved as {told.folder}: it was renamed, or two were swapped"
            elif missing:
                reason = f"it does not hold {', '.join(missing)}"
            else:
                try:
                    manifest = verified(path).manifest.summary()
                    return Latest(folder, path, manifest, tuple(passed_over))
                except CheckpointError as error:
                    reason = str(error)
        _logger.warning("Passed over %s: %s", path, reason)
        passed_over.append(PassedOver(path, reason))
    return Latest(folder, None, None, tuple(passed_over))
