"""Loading sharded checkpoints: verified first, no code run, into any number of processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from crosstrain.engine.proof import Checks, Proof
from crosstrain.engine.ranks.world import this_rank, world_size
from crosstrain.engine.spread import at_path, is_spread, object_at, parameter_names
from crosstrain.engine.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
)
from crosstrain.engine.storage.safe_load import load_file
from crosstrain.engine.storage.sharded_manifest import (
    INDEX,
    MANIFEST,
    Entry,
    ShardedManifest,
    decode_index,
    hash_file,
    rank_file,
)

from .objects import check_objects, restore

__all__ = [
    "SUFFIX",
    "ShardedCheckpoint",
    "in_group",
    "is_sharded_checkpoint",
    "load_sharded",
    "read_sharded",
    "verified",
]

SUFFIX = ".sharded"
Place = tuple[tuple[Any, ...], str]


@dataclass(frozen=True)
class ShardedCheckpoint:
    """A sharded checkpoint, as far as its manifest tells.

    Args:
        path: its folder.
        manifest: the manifest.
    """

    path: Path
    manifest: ShardedManifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ShardedCheckpoint:
        """Reads the manifest of a folder, and nothing else.

        Raises:
            CheckpointNotFound: if there is no such folder, or it has no manifest.
            CheckpointCorrupt: if the manifest is damaged.
        """
        folder = Path(path).expanduser()
        try:
            return cls(folder, ShardedManifest.decode((folder / MANIFEST).read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound(
                f"{folder} is no sharded checkpoint: there is no {MANIFEST} in it. A folder "
                "without one was not written by ShardedSaver, or not to its end"
            ) from None
        except OSError as error:
            raise CheckpointCorrupt(
                f"{folder / MANIFEST} cannot be read: {error.strerror or error}"
            ) from error
        except CheckpointError as error:
            raise CheckpointCorrupt(f"{folder} is not a good checkpoint: {error}") from None

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Checks that each file is there and as it was written.

        Args:
            share: (r, n) checks every n-th file from the r-th on, for n processes to share it.

        Raises:
            CheckpointCorrupt: if one is not.
        """
        rank, size = share
        for name in sorted(self.manifest.files)[rank::size]:
            expected, digest = self.manifest.files[name]
            path = self.path / name
            try:
                found = path.lstat().st_size
                if path.is_symlink() or not path.is_file():
                    raise CheckpointCorrupt(f"{path} is no file")
                if found != expected:
                    told = f"{found:,} bytes and was written with {expected:,}"
                    raise CheckpointCorrupt(f"{path} is damaged: it has {told}")
                if hash_file(path) != digest:
                    raise CheckpointCorrupt(
                        f"{path} is damaged, or of another checkpoint: its sha256 is not the one "
                        "that the manifest tells"
                    )
            except FileNotFoundError:
                raise CheckpointCorrupt(f"{path} is missing") from None
            except OSError as error:
                raise CheckpointCorrupt(
                    f"{path} cannot be read: {error.strerror or error}"
                ) from error

    def index(self) -> dict[str, Entry]:
        """Returns the index of the spread tensors, held against the files.

        Raises:
            CheckpointCorrupt: if it does not fit.
        """
        try:
            return decode_index((self.path / INDEX).read_bytes(), self.manifest.files)
        except CheckpointCorrupt as error:
            raise CheckpointCorrupt(f"{self.path} is not a good checkpoint: {error}") from None

    def own_states(self, rank: int) -> tuple[Any, list[Place], dict[tuple[Any, ...], list[str]]]:
        """Returns a rank's states without spread tensors, where these belong, and names.

        Raises:
            CheckpointCorrupt: if they are not in the form that ShardedSaver writes.
        """
        first = load_file(self.path / rank_file(0)).state
        own = first if rank == 0 else load_file(self.path / rank_file(rank)).state
        try:
            states = own["states"]
            for path in own["same"]:
                # What is as in rank 0 is stored there only.
                container, key = at_path(states, tuple(path))
                source, _ = at_path(first["states"], tuple(path))
                container[key] = source[key]
            places = [(tuple(path), str(name)) for path, name in own["places"]]
            names = {tuple(path): list(found) for path, found in own["names"]}
            for path, _ in places:
                at_path(states, path)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointCorrupt(
                f"{self.path / rank_file(rank)} is not what ShardedSaver writes "
                f"({type(error).__name__}: {error})"
            ) from None
        return states, places, names


def is_sharded_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Tells whether a path is a folder with a manifest of a sharded checkpoint."""
    return (Path(path).expanduser() / MANIFEST).is_file()


def read_sharded(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a sharded checkpoint as a whole one: all states by name, as `torch.load` returns them.

    Needs no process group, and memory for all of it. Save the result with `torch.save` to turn it
    into an ordinary checkpoint.

    Args:
        path: its folder.

    Returns:
        Plain types and tensors on the CPU; of what is each process's own, rank 0's.

    Raises:
        CheckpointNotFound: if there is no such checkpoint.
        CheckpointCorrupt: if it is damaged.
        CheckpointUnsafe: if it cannot be loaded without running code.
    """
    found = ShardedCheckpoint.open(path)
    found.verify()
    states, places, _ = found.own_states(0)
    _fill(found, states, places, {})
    return dict(states)


def load_sharded(
    to_load: Mapping[str, Any],
    path: str | os.PathLike[str],
    checks: Checks | None = None,
    **kwargs: Any,
) -> Proof:
    """Gives objects their states from a sharded checkpoint; all processes call it together.

    The objects may lie in any number of processes, sharded or not. Models are filled in place.
    What is each process's own, such as a random state, is restored where the number of processes
    is the one that wrote it; with another number all of them get rank 0's.

    Args:
        to_load: the objects by name, or nests of them.
        path: the checkpoint's folder.
        checks: as of `Checkpoint.load_objects`.
        **kwargs: as of `Checkpoint.load_objects`.

    Raises:
        CheckpointNotFound: if there is no such checkpoint.
        CheckpointCorrupt: in all processes, if one finds it damaged.
        CheckpointUnsafe: if it cannot be loaded without running code.
        CheckpointMismatch: if it does not fit the objects.
    """
    check_objects(to_load, "load_state_dict", "to_load")
    found = verified(path)
    same = found.manifest.world_size == world_size()
    states, places, names = found.own_states(this_rank() if same else 0)
    live = parameter_names(to_load)
    for where, then in names.items():
        now = live.get(where)
        if now is not None and now != then and sorted(now) == sorted(then):
            places = _reordered(states, places, where, then, now)
    _fill(found, states, places, to_load)
    return restore(to_load, states, found.path, kwargs, checks, bare=False)


def verified(path: str | os.PathLike[str]) -> ShardedCheckpoint:
    """Opens and verifies a checkpoint; the processes share the work, so all call it together.

    Args:
        path: its folder.

    Raises:
        CheckpointError: in all processes, what one of them finds.
    """
    error: CheckpointError | None = None
    found: ShardedCheckpoint | None = None
    try:
        found = ShardedCheckpoint.open(path)
        found.verify((this_rank(), world_size()) if in_group() else (0, 1))
        found.index()
    except CheckpointError as caught:
        error = caught
    if in_group():
        told: list[Any] = [None] * distributed.get_world_size()
        gather: Any = distributed.all_gather_object  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        gather(told, None if error is None else str(error))
        theirs = next(((r, text) for r, text in enumerate(told) if text is not None), None)
        if error is None and theirs is not None:
            error = CheckpointCorrupt(f"{theirs[1]} (found by rank {theirs[0]})")
    if error is not None:
        raise error
    assert found is not None
    return found


def in_group() -> bool:
    """Tells whether this process is one of several of a process group."""
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size() > 1


def _fill(
    found: ShardedCheckpoint, states: Any, places: Sequence[Place], objects: Mapping[str, Any]
) -> None:
    """Reads the spread tensors into the objects' own parts, or, where there are none, whole."""
    # torch takes half a second to import it, and most runs never need it.
    from crosstrain.engine.storage.dcp_files import read_parts

    index = found.index()
    targets: dict[str, torch.Tensor] = {}
    for path, name in places:
        if name not in index:
            raise CheckpointCorrupt(f"{found.path} is not a good checkpoint: no part of {name!r}")
        value, rest = object_at(objects, path) if objects else (None, path)
        if objects and value is None:
            continue  # left out of to_load
        targets[name] = _target(value, rest, index[name])
        container, key = at_path(states, path)
        container[key] = targets[name]
    read_parts(found.path, index, targets)


def _target(value: Any, rest: tuple[Any, ...], entry: Entry) -> torch.Tensor:
    like: Any = None
    if isinstance(value, torch.nn.Module) and len(rest) == 1:
        like = value.state_dict().get(rest[0])
        if is_spread(like) and like.shape == entry.size and like.dtype == entry.dtype:
            return like  # type: ignore[no-any-return]
    elif isinstance(value, torch.optim.Optimizer) and len(rest) == 3 and rest[0] == "state":
        parameters = [p for group in value.param_groups for p in group["params"]]
        if isinstance(rest[1], int) and rest[1] < len(parameters):
            like = parameters[rest[1]]
    if is_spread(like) and like.shape == entry.size:
        return torch.empty_like(like, dtype=entry.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.dtype)


def _reordered(
    states: Any, places: list[Place], where: tuple[Any, ...], then: list[str], now: list[str]
) -> list[Place]:
    """Puts an optimizer's states into the order in which its parameters are now."""
    container, key = at_path(states, where)
    state = container[key]
    if len(state["param_groups"]) > 1:
        raise CheckpointMismatch(
            f"The optimizer at {'.'.join(map(str, where))} has several groups, and its parameters "
            "are in another order than in the checkpoint: whose settings are whose cannot be told. "
            "Make the optimizer with its parameters in the order of then"
        )
    to = {then.index(name): now.index(name) for name in now}
    moved = {to.get(place, place): values for place, values in state["state"].items()}
    container[key] = {**state, "state": moved}
    at = len(where)
    return [
        ((*path[: at + 1], to.get(path[at + 1], path[at + 1]), *path[at + 2 :]), name)
        if path[:at] == where and len(path) > at + 1 and path[at] == "state"
        else (path, name)
        for path, name in places
    ]
