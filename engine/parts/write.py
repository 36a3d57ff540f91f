"""Writing a checkpoint in parts: the processes' steps, after each of which all of them agree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from crosstrain.engine.formats.safe_write import contents_of
from crosstrain.engine.formats.staging import HostState
from crosstrain.engine.guards import is_exact_list, is_mapping
from crosstrain.engine.proof import Strictness
from crosstrain.engine.ranks.line import Line
from crosstrain.engine.storage.errors import CheckpointError, CheckpointWriteError
from crosstrain.engine.storage.folder import Aside, Folder
from crosstrain.engine.storage.locations import Location
from crosstrain.engine.storage.manifest import Manifest, rank_file

from .index import encode_index

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
        is_saved = isinstance(error, CheckpointWriteError) and error.is_saved
        told = self.gather(f"saving {path.name}", (_described(error), is_saved, value))
        failed = [(rank, text) for rank, (text, _, _) in enumerate(told) if text is not None]
        if failed:
            if self.size == 1 or isinstance(error, CheckpointError):
                raise _told(error or OSError(), path)
            why = "; ".join(f"rank {rank}: {text}" for rank, text in failed)
            cause = error if isinstance(error, OSError) else None
            if any(saved for _, saved, _ in told):
                # It has its name only when all else is done.
                raise CheckpointWriteError(why.replace("r", "R", 1), cause, path, is_saved=True)
            raise CheckpointWriteError.of(path, why, cause) from error
        return [one for _, _, one in told]

    def begin(self, aside: Aside, needed: int, path: Location) -> None:
        """Makes what all processes share, and has all of them see it.

        Args:
            aside: where the checkpoint is until it has its name.
            needed: the bytes of what this process writes there.
            path: where it will be.

        Raises:
            CheckpointError: in all processes, if that cannot be.
        """
        told = self.agree(path, None, needed)
        begun: list[str] = []
        error: Exception | None = None
        if self.rank == 0:
            error = met(lambda: begun.append(aside.begin(sum(told) + _SPARE_BYTES * self.size)))
        token: str = self.agree(path, error, begun[0] if begun else "")[0]
        self.agree(path, met(lambda: aside.join(token, needed + _SPARE_BYTES, self.rank)))


def met(work: Callable[[], object]) -> Exception | None:
    """Returns what a step has met; None if nothing."""
    try:
        work()
    except (OSError, CheckpointError) as error:
        return error
    return None


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
        nbytes: the bytes of both.
        shards: the spread tensors themselves; their values are not looked at.
        places: where they belong in the states.
        names: of the optimizers' parameters.
        strictness: whether what could not be loaded again is an error, a warning, or not looked
            for.
    """

    states: Any
    parts: Mapping[str, torch.Tensor]
    nbytes: int
    shards: Mapping[str, Any]
    places: list[tuple[tuple[Any, ...], str]]
    names: Mapping[tuple[Any, ...], list[str]]
    strictness: Strictness = "error"


def write_in_parts(folder: Folder, staged: Staged, manifest: Manifest, writers: Writers) -> None:
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

    path, aside = folder.place / manifest.file, folder.aside(manifest)

    def agree(error: Exception | None, value: Any = None) -> list[Any]:
        return writers.agree(path, error, value)

    with filling(aside, writers):
        writers.begin(aside, staged.nbytes, path)
        entries, parts = write_parts(aside, staged.shards, staged.parts, writers.rank, agree)
        files = {**parts, **_write_own(aside, staged, manifest, writers, agree)}
        told = agree(met(aside.deliver), files)
        if writers.rank == 0:
            files = {name: entry for found in told for name, entry in found.items()}
            whole = replace(manifest, files=files)
            agree(met(lambda: aside.commit(encode_index(entries), whole)))
        else:
            agree(None)


@contextmanager
def filling(aside: Aside, writers: Writers) -> Generator[None]:
    """Holds what is aside until it has its name; what is not filled to its end is dropped.

    Args:
        aside: where a checkpoint is until it has its name.
        writers: the processes that fill it; the first one drops it.
    """
    try:
        yield
    except BaseException:
        # Whatever ended it, Ctrl-C too: nobody else would remove what is there of it.
        if writers.rank == 0:
            aside.drop()
        raise
    finally:
        aside.close()


def _told(error: Exception, path: Location) -> Exception:
    if isinstance(error, CheckpointError) or not isinstance(error, OSError):
        return error
    return CheckpointWriteError.of(path, str(error.strerror or error), error)


def _write_own(
    aside: Aside, staged: Staged, manifest: Manifest, writers: Writers, agree: Any
) -> dict[str, tuple[int, str]]:
    """Writes what is this process's own; returns size and hash of its file."""
    states, same = _without_repeated(staged.states, writers, agree)
    own = {
        "states": states,
        "same": [list(path) for path in same],
        "places": [[list(path), key] for path, key in staged.places],
        "names": [[list(path), names] for path, names in staged.names.items()],
    }
    error: Exception | None = None
    try:
        # It is small, as a rule, and a manifest of its own stands behind what was hashed.
        mine = _write_rank_file(aside, own, manifest, writers, staged.strictness)
    except (OSError, CheckpointError) as caught:
        error, mine = caught, {}
    agree(error)
    return mine


def _write_rank_file(
    aside: Aside, own: Any, manifest: Manifest, writers: Writers, strictness: Strictness
) -> dict[str, tuple[int, str]]:
    """Writes a rank's file: itself an ordinary checkpoint, with a manifest of its own."""
    name = rank_file(writers.rank)
    told = replace(manifest, file=name, objects=tuple(own), rank=writers.rank)
    path = aside.root / name
    # There is room for it: `begin` has looked.
    contents = contents_of(HostState(own, 0), told, path, strictness, blamed=own["states"])
    return {name: aside.write(name, contents)}


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
