"""States whose tensors lie in the memory of their file, until each is copied to where it belongs.

Nothing is read of a tensor before it is copied, and no memory is taken for it in between. The price
is that such a tensor is what the file is: it must not outlive the load, and a file that is written
over meanwhile changes it. So all of them are given memory of their own before a load returns, or
were copied into a parameter, and the file's size and time are compared with those of before.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch

from crosstrain.engine.storage.errors import CheckpointCorrupt
from crosstrain.engine.storage.locations import Location
from crosstrain.engine.storage.tree_hash import Place, fill, in_threads

from .staging import view_like

# What is larger is read by a thread of its own.
_LARGE = 2 << 20

# Size and time of the last write, in nanoseconds.
Stamp = tuple[int, int]


def stamp_of(descriptor: int) -> Stamp:
    """Returns what shows that a file has been written to."""
    told = os.fstat(descriptor)
    return told.st_size, told.st_mtime_ns


def check_stamp(descriptor: int, before: Stamp) -> None:
    """Raises CheckpointCorrupt if somebody has written to a file."""
    if stamp_of(descriptor) != before:
        raise CheckpointCorrupt(
            "it was written to while it was being read: what was verified may not be what was "
            "loaded. Whoever copies a file to where it is read should copy it under another name, "
            "and rename it when it is whole. Load it again, into new objects"
        )


def can_map() -> bool:
    """Tells whether the system opens a descriptor's file once more: what was verified is mapped."""
    return sys.platform.startswith("linux") and os.path.isdir("/proc/self/fd")


def path_of_descriptor(descriptor: int) -> str:
    """Returns a path that leads to an open file, whatever has become of its name."""
    return f"/proc/self/fd/{descriptor}"


class Mapped:
    """The storages of a state that lie in a file's memory.

    Args:
        descriptor: the file; a copy of it is kept, and closed with this object.
        path: its name, for messages.
        stamp: of the file, before it was verified.
        storages: each with the place of its bytes in the file.
    """

    def __init__(
        self,
        descriptor: int,
        path: Location,
        stamp: Stamp,
        storages: list[tuple[torch.UntypedStorage, int]],
    ) -> None:
        self._path = path
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = stamp
        # They are kept alive: an address is theirs alone as long as they are.
        self._storages = {one.data_ptr(): (one, at) for one, at in storages if one.nbytes()}
        self._own: dict[int, torch.UntypedStorage] = {}

    def check_unchanged(self) -> None:
        """Raises CheckpointCorrupt if what was copied is not what was verified."""
        with self._named():
            check_stamp(self._descriptor, self._stamp)

    @contextlib.contextmanager
    def _named(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            text = f"{self._path} cannot be read: {error.strerror or error}"
            raise CheckpointCorrupt(text) from error
        except CheckpointCorrupt as error:
            raise CheckpointCorrupt(f"{self._path} is not a good checkpoint: {error}") from None

    def spans(self, nest: Any) -> set[tuple[int, int]]:
        """Returns where in the file the tensors of a nest have their bytes: begins and ends."""
        found: set[tuple[int, int]] = set()
        for tensor in _tensors(nest):
            known = self._storages.get(tensor.untyped_storage().data_ptr())
            if known is not None:
                found.add((known[1], known[1] + known[0].nbytes()))
        return found

    def own(self, nest: Any) -> None:
        """Gives the tensors of a nest memory of their own, in place; what is shared stays shared.

        Tensors that do not lie in the file are left alone.
        """
        with self._named():
            self.own_by(self._read, nest)

    def own_by(self, read: Callable[[list[Place]], None], nest: Any) -> None:
        """Does what `own` does, and has a function read places of the file into memory."""
        there = [
            (tensor, tensor.untyped_storage().data_ptr())
            for tensor in _tensors(nest)
            if tensor.device.type == "cpu" and type(tensor) in _PLAIN
        ]
        there = [(tensor, at) for tensor, at in there if at in self._storages]
        wanted = [at for at in dict.fromkeys(at for _, at in there) if at not in self._own]
        sizes = {at: self._storages[at][0].nbytes() for at in wanted}
        made = {at: torch.empty(size, dtype=torch.uint8) for at, size in sizes.items()}
        read([(self._storages[at][1], _bytes_of(memory)) for at, memory in made.items()])
        self._own |= {at: memory.untyped_storage() for at, memory in made.items()}
        for tensor, at in there:
            tensor.data = view_like(tensor, self._own[at])

    def _read(self, places: list[Place]) -> None:
        """Reads into fresh memory: to copy from the mapping would cost more."""
        # The small ones together: to hand one over costs more than to read it.
        small = [place for place in places if len(place[1]) < _LARGE]
        runs = [small, *([place] for place in places if len(place[1]) >= _LARGE)]
        in_threads(self._fill, [run for run in runs if run])

    def _fill(self, run: list[Place]) -> None:
        for at, view in run:
            fill(self._descriptor, view, at)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _tensors(nest: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of a nest, each once."""
    seen: dict[int, Any] = {}
    waiting = [nest]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if id(value) not in seen:
                seen[id(value)] = value
                yield value
        elif isinstance(value, (list, tuple, Mapping)):
            if id(value) in seen:
                continue
            seen[id(value)] = value
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
            # A module's state has the versions of its layouts in an attribute.
            waiting.extend(getattr(value, "__dict__", {}).values())


def _bytes_of(memory: torch.Tensor) -> memoryview:
    numbers: Any = memory.numpy()
    return memoryview(numbers)
