"""Writing a sharded checkpoint: the processes' steps, after each of which all of them agree."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from crosstrain.engine.guards import is_exact_list, is_mapping

from .atomic import HashingFile, check_free_space, flush_folder, write_file
from .errors import CheckpointError, CheckpointWriteError
from .manifest import Manifest
from .sharded_manifest import (
    INDEX,
    MANIFEST,
    METADATA,
    Entry,
    ShardedManifest,
    encode_index,
    hash_file,
    rank_file,
)
from .staging import state_bytes

__all__ = ["ASIDE", "LEFTOVER", "Ranks", "Staged", "write_sharded"]

#: How the name of what is not finished begins and ends.
LEFTOVER = (".crosstrain-", ".parts")
#: What stands before the name of a checkpoint that another is just taking the place of.
ASIDE = ".crosstrain-aside-"
_SPARE_BYTES = 2 << 20
# Smaller tensors are written by each process: to compare them would cost more.
_LARGE = 4096


class Ranks:
    """The processes of a run, among whom something is agreed.

    Args:
        group: a process group over the CPU; None if there is one process.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank: int = 0 if group is None else distributed.get_rank(group)
        self.size: int = 1 if group is None else distributed.get_world_size(group)

    @classmethod
    def make(cls) -> Ranks:
        """Returns all processes, with lines of their own; all call it together."""
        ready = distributed.is_available() and distributed.is_initialized()
        if not ready or distributed.get_world_size() == 1:
            return cls(None)
        make: Any = distributed.new_group  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return cls(make(backend="gloo"))

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's value, in the order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        gather: Any = distributed.all_gather_object  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        gather(values, value, group=self.group)
        return values

    def agree(self, step: str, error: Exception | None, value: Any = None) -> list[Any]:
        """Returns every process's value, or raises in all what one of them met.

        Raises:
            CheckpointError: if another process failed; it says which and why.
            Exception: `error`, if it is not None.
        """
        told = self.gather((None if error is None else _described(error), value))
        if error is not None:
            raise error
        failed = [(rank, text) for rank, (text, _) in enumerate(told) if text is not None]
        if failed:
            raise CheckpointWriteError(f"Rank {failed[0][0]} failed in {step}: {failed[0][1]}")
        return [one for _, one in told]

    def begin_vote(self, yes: bool) -> Callable[[], bool]:
        """Begins to ask whether all say yes; returns what waits for the answer."""
        if self.group is None:
            return lambda: yes
        ballot = torch.tensor([int(yes)])
        reduce: Any = distributed.all_reduce  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        work = reduce(ballot, distributed.ReduceOp.MIN, group=self.group, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(ballot[0])

        return answer


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass
class Staged:
    """A state on the CPU that nothing changes any more.

    Args:
        states: without the spread tensors.
        parts: this process's parts of these, by name.
        shards: the spread tensors themselves; their values are not looked at.
        places: where they belong in the states.
        names: of the optimizers' parameters.
    """

    states: Any
    parts: Mapping[str, torch.Tensor]
    shards: Mapping[str, Any]
    places: list[tuple[tuple[Any, ...], str]]
    names: Mapping[tuple[Any, ...], list[str]]


def write_sharded(folder: Path, staged: Staged, manifest: ShardedManifest, ranks: Ranks) -> None:
    """Writes a checkpoint; all processes call it together, and all return when it is whole.

    Args:
        folder: where.
        staged: this process's state.
        manifest: what it says of itself, without the files.
        ranks: the processes.

    Raises:
        CheckpointError: in all processes, if one fails; then nothing is there.
    """
    # torch takes half a second to import it, and most runs never need it.
    from .dcp_files import write_parts

    step, aside = f"saving {folder / manifest.folder}", None
    needed = sum(ranks.gather(state_bytes([staged.states, staged.parts])))
    try:
        aside = _fresh_folder(folder, needed, step, ranks)
        path = folder / manifest.folder
        entries = write_parts(aside, staged.shards, staged.parts, ranks.group, path)
        files = _write_own(aside, staged, manifest, step, ranks)
        error: Exception | None = None
        if ranks.rank == 0:
            try:
                _commit(folder, aside, entries or {}, manifest, files)
            except (OSError, CheckpointError) as caught:
                error = _told(caught, path)
        ranks.agree(step, error)
    except BaseException:
        if ranks.rank == 0 and aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _told(error: Exception, path: Path) -> Exception:
    if isinstance(error, CheckpointError) or not isinstance(error, OSError):
        return error
    return CheckpointWriteError.of(path, str(error.strerror or error), error)


def _fresh_folder(folder: Path, needed: int, step: str, ranks: Ranks) -> Path:
    """Returns a new folder that all processes see."""
    error: Exception | None = None
    path = folder / f"{LEFTOVER[0]}{secrets.token_hex(8)}{LEFTOVER[1]}"
    if ranks.rank == 0:
        try:
            check_free_space(path, needed + _SPARE_BYTES * ranks.size)
            path.mkdir()
        except OSError as caught:
            error = _told(caught, folder)
    name: str = ranks.agree(step, error, path.name)[0]
    path = folder / name
    if not path.is_dir():
        error = CheckpointWriteError(
            f"{path} was made by rank 0 and is not there for rank {ranks.rank}: save into a folder "
            "on a file system that all processes share"
        )
    ranks.agree(step, error)
    return path


def _write_own(
    aside: Path, staged: Staged, manifest: ShardedManifest, step: str, ranks: Ranks
) -> dict[str, tuple[int, str]]:
    """Writes what is this process's own; returns the sizes and hashes of all processes' files."""
    error: Exception | None = None
    mine: dict[str, tuple[int, str]] = {}
    states, same = _without_repeated(staged.states, ranks)
    name = rank_file(ranks.rank)
    try:
        own = {
            "states": states,
            "same": [list(path) for path in same],
            "places": [[list(path), key] for path, key in staged.places],
            "names": [[list(path), names] for path, names in staged.names.items()],
        }
        _write_rank_file(aside / name, own, manifest, ranks)
        shards = aside.glob(f"__{ranks.rank}_*.distcp")
        first = [aside / METADATA] if ranks.rank == 0 else []
        for path in (aside / name, *shards, *first):
            # Read back: what is hashed is what the file system has, not what was meant.
            mine[path.name] = (path.stat().st_size, hash_file(path))
    except (OSError, CheckpointError) as caught:
        error = _told(caught, aside)
    told = ranks.agree(step, error, mine)
    return {name: entry for files in told for name, entry in files.items()}


def _write_rank_file(path: Path, own: Any, manifest: ShardedManifest, ranks: Ranks) -> None:
    """Writes a rank's file: itself an ordinary checkpoint, with a manifest of its own."""

    def produce(file: HashingFile) -> None:
        torch.save(own, file)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    def trailer(size: int, digest: str) -> tuple[bytes, int]:
        told = Manifest(
            file=path.name,
            size=size,
            sha256=digest,
            saved_at_ns=manifest.saved_at_ns,
            objects=tuple(own),
            iteration=manifest.iteration,
            epoch=manifest.epoch,
            backend=manifest.backend,
            world_size=ranks.size,
            rank=ranks.rank,
            versions=manifest.versions,
        ).encode()
        return told, len(told)

    write_file(path, produce, trailer, parallel=False)


def _without_repeated(states: Any, ranks: Ranks) -> tuple[Any, list[tuple[Any, ...]]]:
    """Leaves out large tensors that are in rank 0 as they are here, as in replicated models.

    Returns:
        The states, and the paths of what was left out.
    """
    if ranks.size == 1:
        return states, []
    digests = {path: _digest(tensor) for path, tensor in _large_tensors(states, ())}
    first: dict[tuple[Any, ...], str] = ranks.gather(digests)[0]
    if ranks.rank == 0:
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
    manifest: ShardedManifest,
    files: Mapping[str, tuple[int, str]],
) -> None:
    """Writes index and manifest, and gives the folder its name."""
    _write_flushed(aside / INDEX, encode_index(entries))
    found = {**files, INDEX: ((aside / INDEX).stat().st_size, hash_file(aside / INDEX))}
    # The manifest vouches for what is on the disk, so all else is flushed before it.
    flush_folder(aside)
    _write_flushed(aside / MANIFEST, replace(manifest, files=found).encode())
    flush_folder(aside)
    target = folder / manifest.folder
    kept = folder / f"{ASIDE}{manifest.folder}"
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
