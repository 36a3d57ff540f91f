"""Gives objects back the states that a checkpoint holds, and finds the newest good checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from crosstrain.engine.errors import warn_user
from crosstrain.engine.proof import Checks, Proof
from crosstrain.engine.ranks.line import has_ranks
from crosstrain.engine.ranks.world import this_rank, world_size
from crosstrain.engine.spread import at_path, is_spread, object_at, parameter_names
from crosstrain.engine.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointWarning,
)
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.parts_index import Entry
from crosstrain.engine.storage.parts_read import Parts, Place, is_in_parts, own_states
from crosstrain.engine.storage.safe_load import LoadedFile, load_file

from .layouts import doubt_of, layout_of, list_checkpoints
from .objects import check_objects, restore

__all__ = [
    "Latest",
    "PassedOver",
    "filled",
    "find_latest",
    "load_objects",
    "load_parts",
    "pass_over",
    "read_checkpoint",
    "verified_parts",
]

_logger = logging.getLogger(__name__)


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
    path = Path(os.fspath(checkpoint)).expanduser()
    if is_in_parts(path):
        return load_parts(to_load, verified_parts(path), checks, **kwargs)
    loaded = load_file(path)
    _tell_doubts(loaded)
    bare = None if loaded.manifest is None else loaded.manifest.bare
    return restore(to_load, loaded.state, loaded.path, kwargs, checks, bare)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Reads a checkpoint of either form as a whole: all states by name, on the CPU.

    Needs no process group, and memory for all of it. Save the result of one in parts with
    `torch.save` to turn it into an ordinary file.

    Args:
        path: the file, or the folder of parts.

    Returns:
        Plain types and tensors, as `torch.load` returns them; of parts, of what is each process's
        own, rank 0's.

    Raises:
        CheckpointNotFound: if there is no such checkpoint.
        CheckpointCorrupt: if it is damaged.
        CheckpointUnsafe: if it cannot be loaded without running code.
    """
    where = Path(path).expanduser()
    return layout_of(where).read(where).state


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


# ------------------------------------------------------------------ the newest one


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that is not the newest good one, though it is newer or of unknown age."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Latest:
    """The newest good checkpoint of a folder; true if there is one, and usable as a path.

    Args:
        folder: where it was looked for.
        path: the file, or the folder of parts; None if there is no good one.
        manifest: what it says of itself.
        passed_over: those before it, and why they are not it.
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
    for told in list_checkpoints(folder):
        reason = doubt_of(told, objects)
        if reason is None:
            try:
                manifest = told.layout.verify(told.path)
                return Latest(folder, told.path, manifest, tuple(passed_over))
            except CheckpointError as error:
                reason = str(error)
        pass_over(told.path, reason, passed_over)
    return Latest(folder, None, None, tuple(passed_over))


def pass_over(path: Path, reason: str, passed_over: list[PassedOver]) -> None:
    """Notes, in the log too, why a checkpoint is not the one."""
    _logger.warning("Passed over %s: %s", path, reason)
    passed_over.append(PassedOver(path, reason))


# ------------------------------------------------------------------ a checkpoint in parts


def verified_parts(path: Path) -> Parts:
    """Opens and verifies a checkpoint in parts; the processes share the work, all call it together.

    Args:
        path: its folder.

    Raises:
        CheckpointError: in all processes, what one of them finds.
    """
    error: CheckpointError | None = None
    found: Parts | None = None
    try:
        found = Parts.open(path)
        found.verify((this_rank(), world_size()) if has_ranks() else (0, 1))
        found.index()
    except CheckpointError as caught:
        error = caught
    if has_ranks():
        told: list[Any] = [None] * distributed.get_world_size()
        gather: Any = distributed.all_gather_object
        gather(told, None if error is None else str(error))
        theirs = next(((r, text) for r, text in enumerate(told) if text is not None), None)
        if error is None and theirs is not None:
            error = CheckpointCorrupt(f"{theirs[1]} (found by rank {theirs[0]})")
    if error is not None:
        raise error
    assert found is not None
    return found


def load_parts(
    to_load: Mapping[str, Any], found: Parts, checks: Checks | None = None, **kwargs: Any
) -> Proof:
    """Gives objects their states from a checkpoint in parts; all processes call it together.

    The objects may lie in any number of processes, sharded or not. Models are filled in place.
    What is each process's own, such as a random state, is restored where the number of processes
    is the one that wrote it; with another number all of them get rank 0's.

    Args:
        to_load: the objects by name, or nests of them.
        found: the checkpoint, verified.
        checks: as of `Checkpoint.load_objects`.
        **kwargs: likewise.

    Raises:
        CheckpointError: if it is damaged, not safe, or does not fit the objects.
        ResumeError: if an object does not hold what it was given.
    """
    same = found.manifest.world_size == world_size()
    states, places, names = own_states(found, this_rank() if same else 0)
    live = parameter_names(to_load)
    for where, then in names.items():
        now = live.get(where)
        if now is not None and now != then and sorted(now) == sorted(then):
            places = _reordered(states, places, where, then, now)
    return restore(
        to_load, filled(found, states, places, to_load), found.path, kwargs, checks, bare=False
    )


def filled(
    found: Parts, states: Any, places: Sequence[Place], objects: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads the spread tensors into the objects' own parts, or, where there are none, whole.

    Args:
        found: the checkpoint.
        states: its states without spread tensors; these are put in.
        places: where these belong.
        objects: the objects that the states are for; empty for none.

    Returns:
        The states.
    """
    # torch takes half a second to import it, and most runs never need it.
    from crosstrain.engine.storage.torch_parts import read_parts

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
    return dict(states)


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
