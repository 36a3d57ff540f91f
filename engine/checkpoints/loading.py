"""Gives objects back the states that a checkpoint holds, and finds the newest good checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from crosstrain.engine.engine import Engine
from crosstrain.engine.errors import warn_user
from crosstrain.engine.formats.safe_load import LoadedFile, load_file
from crosstrain.engine.nests import walk_objects
from crosstrain.engine.parts.fill import filled, reordered
from crosstrain.engine.parts.read import Parts, is_in_parts, own_states
from crosstrain.engine.proof import Checks, Proof
from crosstrain.engine.ranks.line import Line, has_ranks
from crosstrain.engine.ranks.world import this_rank, world_size
from crosstrain.engine.shown import shown
from crosstrain.engine.spread import parameter_names
from crosstrain.engine.storage.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointWarning,
    lack_of,
)
from crosstrain.engine.storage.locations import Location, location_of
from crosstrain.engine.storage.manifest import Manifest

from .layouts import doubt_of, layout_of, list_checkpoints
from .objects import check_objects, restore, to_own

_logger = logging.getLogger(__name__)


def load_objects(
    to_load: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    checks: Checks | None = None,
    **kwargs: Any,
) -> Proof:
    """Does what `Checkpoint.load_objects` documents."""
    if not isinstance(checkpoint, (str, os.PathLike, Mapping)):
        raise TypeError(
            "Argument checkpoint should be a string or a dictionary, or a path, but given "
            f"{type(checkpoint)}"
        )
    check_objects(to_load, "load_state_dict", "to_load")
    if isinstance(checkpoint, Mapping):
        return restore(to_load, LoadedFile(None, None, checkpoint), kwargs, checks)
    path = checkpoint.place if isinstance(checkpoint, Latest) else location_of(checkpoint)
    if is_in_parts(path):
        with Line() if has_ranks() else nullcontext() as line:
            found = Parts.verified(path, line)
        return load_parts(to_load, found, checks, **kwargs)
    goes_on = any(isinstance(value, Engine) for _, value in walk_objects(to_load))
    take = partial(to_own, to_load, kwargs)
    loaded = load_file(path, take=take, names=None if goes_on else list(to_load))
    _tell_doubts(path, loaded.manifest)
    return restore(to_load, loaded, kwargs, checks)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Reads a checkpoint of either form as a whole: all states by name, on the CPU.

    Needs no process group, and memory for all of it. Save the result of one in parts with
    `torch.save` to turn it into an ordinary file.

    Args:
        path: the file, or the folder of parts; a URL where it is in a store.

    Returns:
        Plain types and tensors, as `torch.load` returns them; of parts, of what is each process's
        own, rank 0's.

    Raises:
        CheckpointNotFound: if there is no such checkpoint.
        CheckpointCorrupt: if it is damaged.
        CheckpointUnsafe: if it cannot be loaded without running code.
    """
    where = location_of(path)
    return layout_of(where).read(where).state


def _tell_doubts(path: Location, manifest: Manifest | None) -> None:
    """Warns of what can be loaded but not be vouched for."""
    if manifest is None:
        doubt = (
            f"{path} has no manifest, because another program wrote it: damage in its "
            "tensors cannot be found. A checkpoint saved by crosstrain has one"
        )
    elif manifest.file != path.name:
        doubt = (
            f"{path} was saved as {manifest.file} (iteration {manifest.iteration}): it was "
            "renamed, or two files were swapped"
        )
    else:
        return
    warn_user(doubt, CheckpointWarning)


# ------------------------------------------------------------------ the newest one


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that is not the newest good one, though it is newer or of unknown age."""

    path: Location
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

    folder: Location
    path: Location | None
    manifest: Manifest | None
    passed_over: tuple[PassedOver, ...]

    def __bool__(self) -> bool:
        return self.path is not None

    def __fspath__(self) -> str:
        """Returns the path as text.

        Raises:
            CheckpointNotFound: if there is no good checkpoint; says what was passed over and why.
        """
        return str(self.place)

    @property
    def place(self) -> Location:
        """The path.

        Raises:
            CheckpointNotFound: as `__fspath__` does.
        """
        if self.path is None:
            raise CheckpointNotFound(self.describe())
        return self.path

    def describe(self) -> str:
        """Says in words what was found."""
        found = "no good checkpoint" if self.path is None else f"newest good one: {self.path.name}"
        over = "; ".join(f"{item.path.name}: {item.reason}" for item in self.passed_over)
        return shown(f"{self.folder}: {found}" + (f". Passed over: {over}" if over else ""))


def find_latest(folder: Location, objects: Collection[str] = ()) -> Latest:
    """Does what `Checkpoint.latest` documents."""
    passed_over: list[PassedOver] = []
    for told in list_checkpoints(folder):
        reason = doubt_of(told, objects)
        if reason is None:
            try:
                manifest = told.layout.verify(told.path)
                return Latest(folder, told.path, manifest, tuple(passed_over))
            except CheckpointError as error:
                if lack_of(error):
                    raise
                reason = str(error)
        pass_over(told.path, reason, passed_over)
    return Latest(folder, None, None, tuple(passed_over))


def pass_over(path: Location, reason: str, passed_over: list[PassedOver]) -> None:
    """Notes, in the log too, why a checkpoint is not the one."""
    _logger.warning("Passed over %s: %s", shown(path), shown(reason))
    passed_over.append(PassedOver(path, reason))


# ------------------------------------------------------------------ a checkpoint in parts


def load_parts(
    to_load: Mapping[str, Any], found: Parts, checks: Checks | None = None, **kwargs: Any
) -> Proof:
    """Gives objects their states from a checkpoint in parts; all processes call it together.

    The objects may lie in any number of processes, sharded or not. Models are filled in place. What
    is each process's own, such as a random state, is restored where the number of processes is the
    one that wrote it; with another number all of them get rank 0's.
    """
    same = found.manifest.world_size == world_size()
    states, places, names = own_states(found, this_rank() if same else 0)
    live = parameter_names(to_load)
    for where, then in names.items():
        now = live.get(where)
        if now is not None and now != then and sorted(now) == sorted(then):
            places = reordered(states, places, where, then, now)
    loaded = LoadedFile(found.path, found.manifest, filled(found, states, places, to_load))
    return restore(to_load, loaded, kwargs, checks)
