"""Gives objects back the states that a checkpoint holds, and finds the newest good checkpoint."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosstrain.engine.errors import warn_user
from crosstrain.engine.proof import Checks, Proof
from crosstrain.engine.storage.archive import read_archive
from crosstrain.engine.storage.atomic import open_regular
from crosstrain.engine.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    CheckpointWarning,
)
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.safe_load import LoadedFile, load_file, verify_file

from .objects import check_objects, restore

__all__ = ["Latest", "PassedOver", "candidates", "find_latest", "load_latest", "load_objects"]

_logger = logging.getLogger(__name__)

_ANY_NAME = re.compile(r"[^.].*\.pt")


def load_objects(
    to_load: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    checks: Checks | None = None,
    **kwargs: Any,
) -> Proof:
    """Does what `Checkpoint.load_objects` documents."""
    if not isinstance(checkpoint, (str, os.PathLike, Mapping)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "Argument checkpoint should be a string, a path or a dictionary, but given "
            f"{type(checkpoint)}"
        )
    check_objects(to_load, "load_state_dict", "to_load")
    if isinstance(checkpoint, Mapping):
        return restore(to_load, checkpoint, None, kwargs, checks)
    if os.path.isdir(os.path.expanduser(checkpoint)):
        from .sharded_load import load_sharded

        return load_sharded(to_load, checkpoint, checks, **kwargs)
    loaded = load_file(Path(os.fspath(checkpoint)).expanduser())
    _tell_doubts(loaded)
    bare = None if loaded.manifest is None else loaded.manifest.bare
    return restore(to_load, loaded.state, loaded.path, kwargs, checks, bare)


def _tell_doubts(loaded: LoadedFile) -> None:
    """Warns of what can be loaded but not be vouched for."""
    manifest = loaded.manifest
    if manifest is None:
        doubt = (
            f"{loaded.path} has no manifest, because another program wrote it: damage in its "
            "tensors cannot be found. A checkpoint saved by crosstrain has one"
        )
    elif manifest.file != loaded.path.name:
        doubt = (
            f"{loaded.path} was saved as {manifest.file} (iteration {manifest.iteration}): it was "
            "renamed, or two files were swapped"
        )
    else:
        return
    warn_user(doubt, CheckpointWarning)


@dataclass(frozen=True)
class PassedOver:
    """A file that is not the newest good checkpoint, though it is newer or of unknown age."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Latest:
    """The newest good checkpoint of a folder; true if there is one, and usable as a path.

    Args:
        folder: where it was looked for.
        path: the file; None if there is no good one.
        manifest: what it says of itself.
        passed_over: the files before it, and why they are not it.
    """

    folder: Path
    path: Path | None
    manifest: Manifest | None
    passed_over: tuple[PassedOver, ...]

    def __bool__(self) -> bool:
        return self.path is not None

    def __fspath__(self) -> str:
        """Returns the path as text.

        Raises:
            CheckpointNotFound: if there is no good checkpoint; says what was passed over and why.
        """
        if self.path is None:
            raise CheckpointNotFound(self.describe())
        return str(self.path)

    def describe(self) -> str:
        """Says in words what was found."""
        found = "no good checkpoint" if self.path is None else f"newest good one: {self.path.name}"
        over = "; ".join(f"{item.path.name}: {item.reason}" for item in self.passed_over)
        return f"{self.folder}: {found}" + (f". Passed over: {over}" if over else "")


def find_latest(folder: Path, objects: Collection[str] = ()) -> Latest:
    """Does what `Checkpoint.latest` documents."""
    passed_over: list[PassedOver] = []
    for path in _newest_first(folder, objects, passed_over):
        try:
            manifest = verify_file(path)
        except CheckpointError as error:
            _pass_over(path, str(error), passed_over)
            continue
        return Latest(folder, path, manifest, tuple(passed_over))
    return Latest(folder, None, None, tuple(passed_over))


def load_latest(
    folder: Path, objects: Collection[str], names: re.Pattern[str]
) -> tuple[Latest, Any]:
    """Finds the newest good checkpoint with these objects, and reads it at once.

    Args:
        folder: the folder.
        objects: names that it must hold.
        names: which file names are looked at.

    Returns:
        What was found, and its state; None if there is none.
    """
    passed_over: list[PassedOver] = []
    for path in _newest_first(folder, objects, passed_over, names):
        try:
            loaded = load_file(path)
        except CheckpointError as error:
            _pass_over(path, str(error), passed_over)
            continue
        return Latest(folder, path, loaded.manifest, tuple(passed_over)), loaded.state
    return Latest(folder, None, None, tuple(passed_over)), None


def _pass_over(path: Path, reason: str, passed_over: list[PassedOver]) -> None:
    _logger.warning("Passed over %s: %s", path, reason)
    passed_over.append(PassedOver(path, reason))


def candidates(
    folder: Path, names: re.Pattern[str] = _ANY_NAME
) -> list[tuple[Path, Manifest | CheckpointError]]:
    """Lists the checkpoint files of a folder, newest first, with what each says of itself.

    Only the manifests are read. Files that do not tell their age, because theirs is missing or
    damaged, come first, by their time on the disk: they may be the newest.

    Args:
        folder: the folder.
        names: which file names are looked at.

    Raises:
        CheckpointNotFound: if there is no such folder.
    """
    try:
        paths = [path for path in folder.iterdir() if names.fullmatch(path.name)]
    except FileNotFoundError:
        raise CheckpointNotFound(f"There is no folder {folder}") from None
    except OSError as error:
        raise CheckpointNotFound(
            f"{folder} cannot be read as a folder: {error.strerror or error}"
        ) from error
    found = [(path, _manifest_of(path)) for path in paths if path.is_file()]
    return sorted(found, key=_age, reverse=True)


def _age(item: tuple[Path, Manifest | CheckpointError]) -> tuple[bool, int, str]:
    path, manifest = item
    if isinstance(manifest, Manifest):
        return False, manifest.saved_at_ns, path.name
    try:
        return True, path.stat().st_mtime_ns, path.name
    except OSError:
        return True, 0, path.name


def _manifest_of(path: Path) -> Manifest | CheckpointError:
    try:
        with open_regular(path) as file:
            comment = read_archive(file.fileno()).comment
        if comment:
            return Manifest.decode(comment)
        return CheckpointCorrupt(
            "it has no manifest, because another program wrote it; load it by its path if you "
            "trust it to be whole"
        )
    except OSError as error:
        return CheckpointCorrupt(f"it cannot be read: {error.strerror or error}")
    except CheckpointError as error:
        return error


def _newest_first(
    folder: Path,
    objects: Collection[str],
    passed_over: list[PassedOver],
    names: re.Pattern[str] = _ANY_NAME,
) -> Iterator[Path]:
    """Yields the files that may be it, newest first; tells why the others may not."""
    for path, manifest in candidates(folder, names):
        if not isinstance(manifest, Manifest):
            _pass_over(path, str(manifest), passed_over)
            continue
        missing = [name for name in objects if name not in manifest.objects]
        if manifest.file != path.name:
            reason = f"it was saved as {manifest.file}: it was renamed, or two files were swapped"
            _pass_over(path, reason, passed_over)
        elif missing:
            _pass_over(path, f"it does not hold {', '.join(missing)}", passed_over)
        else:
            yield path
