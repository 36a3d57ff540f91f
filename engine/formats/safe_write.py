"""Writing a state as a file that a load accepts: looked at before it gets its name."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from crosstrain.engine.errors import warn_user
from crosstrain.engine.proof import Strictness
from crosstrain.engine.storage.atomic import Contents, HashingFile
from crosstrain.engine.storage.errors import (
    CheckpointContentError,
    CheckpointError,
    CheckpointWarning,
)
from crosstrain.engine.storage.locations import Location
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.tree_hash import Tree

from .plain import to_plain
from .safe_load import check_loadable
from .staging import HostState

# What is not tensor data: the archive's directory, the pickle, the manifest. Generous.
_SPARE_BYTES = 2 << 20


def contents_of(
    host: HostState,
    manifest: Manifest,
    path: Location,
    strictness: Strictness,
    *,
    blamed: Any = None,
    atomic: bool = True,
    parallel: bool = False,
    **kwargs: Any,
) -> Contents:
    """Returns what a file holds: a state, as `torch.save` writes it, and its manifest.

    Args:
        host: the state.
        manifest: what the file says of itself, without its hash.
        path: what it is to be called.
        strictness: whether what could not be loaded again is an error, a warning, or not looked
            for.
        blamed: the states by the names that an error tells, if not the state itself.
        atomic: as of `Contents`.
        parallel: as of `Contents`.
        **kwargs: arguments of `torch.save`.
    """

    def produce(file: HashingFile) -> None:
        # torch asks only for write and flush.
        torch.save(host.state, file, **kwargs)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    def trailer(tree: Tree) -> bytes:
        return manifest.with_tree(tree).encode()

    check = partial(_check_written, state=blamed or host.state, path=path, strictness=strictness)
    return Contents(produce, trailer, check, host.nbytes + _SPARE_BYTES, atomic, parallel)


def _check_written(descriptor: int, state: Any, path: Location, strictness: Strictness) -> None:
    """Holds a file that was just written to what a load of it accepts, but for its hash.

    An error names the objects to blame, which are looked for in the plain state.
    """
    if strictness == "off":
        return
    try:
        check_loadable(descriptor)
    except CheckpointError as error:
        blamed = _to_blame(state)
        message = (
            f"Checkpoint {path} could not be loaded again: {error}. "
            + (f"It is in the state of {', '.join(blamed)}. " if blamed else "")
            + "Keep it in a form of its own: as a tensor, or under fewer and shorter keys"
        )
        if strictness == "error":
            raise CheckpointContentError(f"{message}. It was not saved") from error
        warn_user(message, CheckpointWarning)


def _to_blame(state: Any) -> list[str]:
    """Returns the names of the objects whose states could not be loaded if they stood alone."""
    names: list[str] = []
    for name, value in state.items() if isinstance(state, Mapping) else ():
        with tempfile.TemporaryFile() as file:
            # Without the data: the tensors' places are what is looked at.
            torch.save(to_plain(value, lambda tensor, _: tensor.new_empty(0)), file)
            file.flush()
            try:
                check_loadable(file.fileno())
            except CheckpointError:
                names.append(repr(name))
    return names
