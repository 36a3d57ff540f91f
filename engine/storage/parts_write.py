"""Writing a checkpoint in parts: the processes' steps, after each of which all of them agree."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crosstrain.engine.guards import is_exact_list, is_mapping
from crosstrain.engine.proof import Strictness
from crosstrain.engine.ranks.line import Line

from .atomic import HashingFile, check_free_space, flush_folder, write_file
from .errors import CheckpointError, CheckpointWriteError
from .leftovers import ASIDE, PARTS, new_name
from .locations import Location
from .manifest import INDEX, MANIFEST, Manifest, rank_file
from .parts_index import Entry, encode_index
from .parts_read import hash_file
from .safe_load import check_written
from .staging import state_bytes
from .tree_hash import Tree

__all__ = ["Staged", "Writers", "write_in_parts"]

_SPARE_BYTES = 2 << 20
# Smaller tensors are written by each process: to compare them would cost more.
_LARGE = 4096


class Writers:
    """The processes that write a checkpoint together.

    Args:
        line: theirs, for the thread that writes; None if there is one process.
    """

    def __init__(self, line: Line | None) -> None:
        self._line = line
        self.rank = 0 if line is None else line.rank
        self.size = 1 if line is None else line.size

    def gather(self, step: str, value: Any) -> list[Any]:
        """Returns every process's value, in the order of ranks."""
        return [value] if self._line is None else self._line.meet(step, value, of=range(self.size))

    def agree(self, path: Location, error: Exception | None, value: Any = None) -> list[Any]:
        """Returns every process's value, or raises in all what one of them met.

        Raises:
            CheckpointError: if a process failed; it says which and why.
        """
        told = self.gather(f"saving {path.name}", (_described(error), value))
        failed = [(rank, text) for rank, (text, _) in enumerate(told) if text is not None]
        if failed:
            if self.size == 1 or isinstance(error, CheckpointError):
                raise _told(error or OSError(), path)
            why = "; ".join(f"rank {rank}: {text}" for rank, text in failed)
            cause = error if isinstance(error, OSError) else None
            raise CheckpointWriteError.of(path, why, cause) from error
        return [one for _, one in told]


def _described(error: Exception | None) -> str | None:
    if error is None:
        return None
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


@dataclass
class Staged:
    """A state on the CPU that nothing changes any more.

    Args:
        states: without the spread tensors.
        parts: this process's parts of these, by name.
        shards: the spread tensors themselves; their values are not looked at.
        places: where they belong in the states.
        names: of the optimizers' parameters.
        strictness: whether what could not be loaded again is an error, a warning, or not looked
            for.
    """

    states: Any
    parts: Mapping[str, torch.Tensor]
    shards: Mapping[str, Any]
    places: list[tuple[tuple[Any, ...], str]]
    names: Mapping[tuple[Any, ...], list[str]]
    strictness: Strictness = "error"


def write_in_parts(folder: Path, staged: Staged, manifest: Manifest, writers: Writers) -> None:
    """Writes a checkpoint; all processes call it together, and all return when it is whole.

    Args:
        folder: where.
        staged: this process's state.
        manifest: what it says of itself, without the files.
        writers: the processes.

    Raises:
        CheckpointError: in all processes, if one fails; then nothing is there.
    """
    # torch takes half a second to import it, and most runs never need it.
    from .torch_parts import write_parts

    path, aside = folder / manifest.file, None

    def agree(error: Exception | None, value: Any = None) -> list[Any]:
        return writers.agree(path, error, value)

    try:
        needed = sum(agree(None, state_bytes([staged.states, staged.parts])))
        aside = _fresh_folder(folder, needed, writers, agree)
        entries, parts = write_parts(aside, staged.shards, staged.parts, writers.rank, agree)
        files = {**parts, **_write_own(aside, staged, manifest, writers, agree)}
        files = {name: entry for found in agree(None, files) for name, entry in found.items()}
        error: Exception | None = None
        if writers.rank == 0:
            try:
                _commit(folder, aside, entries, manifest, files)
            except (OSError, CheckpointError) as caught:
                error = caught
        agree(error)
    except BaseException:
        if writers.rank == 0 and aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _told(error: Exception, path: Location) -> Exception:
    if isinstance(error, CheckpointError) or not isinstance(error, OSError):
        return error
    return CheckpointWriteError.of(path, str(error.strerror or error), error)


def _fresh_folder(folder: Path, needed: int, writers: Writers, agree: Any) -> Path:
    """Returns a new folder that all processes see."""
    error: Exception | None = None
    path = folder / new_name(PARTS)
    if writers.rank == 0:
        try:
            check_free_space(path, needed + _SPARE_BYTES * writers.size)
            path.mkdir()
        except OSError as caught:
            error = caught
    name: str = agree(error, path.name)[0]
    path = folder / name
    if not path.is_dir():
        error = CheckpointWriteError(
            f"{path} was made by rank 0 and is not there for rank {writers.rank}: save into a "
            "folder on a file system that all processes share"
        )
    agree(error)
    return path


def _write_own(
    aside: Path, staged: Staged, manifest: Manifest, writers: Writers, agree: Any
) -> dict[str, tuple[int, str]]:
    """Writes what is this process's own; returns size and hash of its file."""
    states, same = _without_repeated(staged.states, writers, agree)
    path = aside / rank_file(writers.rank)
    own = {
        "states": states,
        "same": [list(path) for path in same],
        "places": [[list(path), key] for path, key in staged.places],
        "names": [[list(path), names] for path, names in staged.names.items()],
    }
    error: Exception | None = None
    try:
        _write_rank_file(path, own, manifest, writers, staged.strictness)
        # It is small, as a rule, and a manifest of its own stands behind what was hashed.
        mine = {path.name: (path.stat().st_size, hash_file(path))}
    except (OSError, CheckpointError) as caught:
        error, mine = caught, {}
    agree(error)
    return mine


def _write_rank_file(
    path: Path, own: Any, manifest: Manifest, writers: Writers, strictness: Strictness
) -> None:
    """Writes a rank's file: itself an ordinary checkpoint, with a manifest of its own."""

    def produce(file: HashingFile) -> None:
        torch.save(own, file)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    def trailer(tree: Tree) -> tuple[bytes, int]:
        told = Manifest(
            file=path.name,
            size=0,
            sha256="",
            saved_at_ns=manifest.saved_at_ns,
            objects=tuple(own),
            iteration=manifest.iteration,
            epoch=manifest.epoch,
            backend=manifest.backend,
            world_size=writers.size,
            rank=writers.rank,
            versions=manifest.versions,
        )
        encoded = told.with_tree(tree).encode()
        return encoded, len(encoded)

    def check(descriptor: int) -> None:
        check_written(descriptor, own["states"], path, strictness)

    write_file(path, produce, trailer, check=check, parallel=False)


def _without_repeated(
    states: Any, writers: Writers, agree: Any
) -> tuple[Any, list[tuple[Any, ...]]]:
    """Leaves out large tensors that are in rank 0 as they are here, as in replicated models.

    Returns:
        The states, and the paths of what was left out.
    """
    if writers.size == 1:
        return states, []
    digests = {path: _digest(tensor) for path, tensor in _large_tensors(states, ())}
    first: dict[tuple[Any, ...], str] = agree(None, digests)[0]
    if writers.rank == 0:
        return states, []
    same = [path for path, digest in digests.items() if first.get(path) == digest]
    return _without(states, set(same), ()), same


def _digest(tensor: torch.Tensor) -> str:
    data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} " + hashlib.sha256(data).hexdigest()


def _large_tensors(value: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > _LARGE:
            yield path, value
        return
    items: Any = ()
    if is_mapping(value):
        items = value.items()
    elif is_exact_list(value):
        items = enumerate(value)
    for key, item in items:
        yield from _large_tensors(item, (*path, key))


def _without(value: Any, same: set[tuple[Any, ...]], path: tuple[Any, ...]) -> Any:
    if path in same:
        return None
    # A plain state's containers are its own, so they can be changed.
    items: Any = ()
    if is_mapping(value):
        items = list(value.items())
    elif is_exact_list(value):
        items = enumerate(value)
    changed: Any = value
    for key, item in items:
        changed[key] = _without(item, same, (*path, key))
    return value


def _commit(
    folder: Path,
    aside: Path,
    entries: Mapping[str, Entry],
    manifest: Manifest,
    files: Mapping[str, tuple[int, str]],
) -> None:
    """Writes index and manifest, and gives the folder its name."""
    _write_flushed(aside / INDEX, encode_index(entries))
    found = {**files, INDEX: ((aside / INDEX).stat().st_size, hash_file(aside / INDEX))}
    # The manifest vouches for what is on the disk, so all else is flushed before it.
    flush_folder(aside)
    _write_flushed(aside / MANIFEST, replace(manifest, files=found).encode())
    flush_folder(aside)
    target = folder / manifest.file
    kept = folder / f"{ASIDE}{manifest.file}"
    with contextlib.suppress(FileNotFoundError):
        # A folder cannot be renamed over one that is not empty. The next start puts this one back,
        # if this process is killed before the new one has the name.
        os.rename(target, kept)
    os.rename(aside, target)
    flush_folder(folder)
    if kept.exists():
        shutil.rmtree(kept)


def _write_flushed(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
