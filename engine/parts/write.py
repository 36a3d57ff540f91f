"""Writing a checkpoint in parts: the parts of tensors, and what is each process's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from crosstrain.engine.digest import Leaf, leaf_of
from crosstrain.engine.formats.safe_write import contents_of
from crosstrain.engine.formats.staging import HostState
from crosstrain.engine.proof import Strictness
from crosstrain.engine.spread import at_path
from crosstrain.engine.storage.manifest import Manifest, rank_file
from crosstrain.engine.stores.folders import Aside, Folder

from .index import encode_index
from .writers import Writers

# Smaller tensors are written by each process: to compare them would cost more.
_LARGE = 4096


@dataclass
class Staged:
    """A state on the CPU that nothing changes any more.

    Args:
        host: `states` without the spread tensors, and `parts`, this process's of these by name.
        shards: the spread tensors themselves; their values are not looked at.
        places: where they belong in the states.
        names: of the optimizers' parameters.
        strictness: as of `contents_of`.
    """

    host: HostState
    shards: Mapping[str, Any]
    places: list[tuple[tuple[Any, ...], str]]
    names: Mapping[tuple[Any, ...], list[str]]
    strictness: Strictness


def write_in_parts(folder: Folder, staged: Staged, manifest: Manifest, writers: Writers) -> None:
    """Writes a checkpoint; all processes call it together, and all return when it is whole.

    If one fails, all raise a CheckpointError, and nothing is there.
    """
    # torch takes half a second to import it, and most runs never need it.
    from .torch_parts import write_parts

    aside = folder.aside(manifest)
    with writers.filling(aside, staged.host.nbytes):
        entries, files = write_parts(aside, staged.shards, staged.host.state["parts"], writers)
        files |= _write_own(aside, staged, manifest, writers)

        def deliver() -> dict[str, tuple[int, str]]:
            aside.deliver()
            return files

        all_files = {
            name: entry for found in writers.together(deliver) for name, entry in found.items()
        }
        whole = replace(manifest, files=all_files)
        writers.first(lambda: aside.commit(encode_index(entries), whole))


def _write_own(
    aside: Aside, staged: Staged, manifest: Manifest, writers: Writers
) -> dict[str, tuple[int, str]]:
    """Writes what is this process's own; returns size and hash of its file.

    It is itself an ordinary checkpoint, with a manifest of its own.
    """
    states, same = _without_repeated(staged.host.state["states"], writers)
    own = {
        "states": states,
        "same": [list(path) for path in same],
        "places": [[list(path), key] for path, key in staged.places],
        "names": [[list(path), names] for path, names in staged.names.items()],
    }
    name = rank_file(writers.rank)
    told = replace(manifest, file=name, objects=tuple(own), rank=writers.rank)
    # There is room for it: `filling` has looked.
    contents = contents_of(
        HostState(own, 0), told, aside.root / name, staged.strictness, blamed=states
    )
    return {name: writers.together(lambda: aside.write(name, contents))[writers.rank]}


def _without_repeated(states: Any, writers: Writers) -> tuple[Any, list[tuple[Any, ...]]]:
    """Leaves out large tensors that are in rank 0 as they are here, as in replicated models.

    Returns the states, and the paths of what was left out.
    """
    if writers.size == 1:
        return states, []
    digests = {path: leaf_of("", tensor) for path, tensor in _large_tensors(states, ())}
    first: dict[tuple[Any, ...], Leaf] = writers.agree(None, digests)[0]
    if writers.rank == 0:
        return states, []
    same = [path for path, digest in digests.items() if first.get(path) == digest]
    for path in same:
        # A plain state's containers are its own, so they can be changed.
        container, key = at_path(states, path)
        container[key] = None
    return states, same


def _large_tensors(value: Any, path: tuple[Any, ...]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > _LARGE:
            yield path, value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif type(value) is list:
        items = enumerate(value)
    for key, item in items:
        yield from _large_tensors(item, (*path, key))
