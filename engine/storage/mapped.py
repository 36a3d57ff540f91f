"""States whose tensors lie in the memory of their file, until each is copied to where it belongs.

Nothing is read of a tensor before it is copied, and no memory is taken for it in between. The price
is that such a tensor is what the file is: it must not outlive the load, and a file that is written
over meanwhile changes it. So all of them are given memory of their own before a load returns, or
were copied into a parameter, and the file's size and time are compared with those of before.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from crosstrain.engine.guards import is_mapping

from .errors import CheckpointCorrupt
from .staging import view_like

__all__ = ["Mapped", "Stamp", "can_map", "check_stamp", "path_of_descriptor", "stamp_of"]

# Below it, huge pages gain nothing.
_HUGE = 2 << 20

# Size and time of the last write, in nanoseconds.
Stamp = tuple[int, int]


def stamp_of(descriptor: int) -> Stamp:
    """Returns what shows that a file has been written to."""
    told = os.fstat(descriptor)
    return told.st_size, told.st_mtime_ns


def check_stamp(descriptor: int, before: Stamp) -> None:
    """Makes sure that nobody has written to a file.

    Raises:
        CheckpointCorrupt: if somebody has.
    """
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
        stamp: of the file, before it was verified.
        storages: each with the place of its bytes in the file.
    """

    def __init__(
        self, descriptor: int, stamp: Stamp, storages: list[tuple[torch.UntypedStorage, int]]
    ) -> None:
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = stamp
        # They are kept alive: an address is theirs alone as long as they are.
        self._storages = {one.data_ptr(): (one, at) for one, at in storages if one.nbytes()}
        self._own: dict[int, torch.UntypedStorage] = {}

    def check_unchanged(self) -> None:
        """Makes sure that what was copied is what was verified.

        Raises:
            CheckpointCorrupt: if somebody has written to the file meanwhile.
        """
        check_stamp(self._descriptor, self._stamp)

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

        Args:
            nest: containers of tensors; tensors that do not lie in the file are left alone.
        """
        for tensor in _tensors(nest):
            if tensor.device.type != "cpu" or type(tensor) not in _PLAIN:
                continue
            at = tensor.untyped_storage().data_ptr()
            if at not in self._storages:
                continue
            if at not in self._own:
                self._own[at] = _copy(self._storages[at][0])
            tensor.data = view_like(tensor, self._own[at])


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
        elif isinstance(value, (dict, list, tuple)) or is_mapping(value):
            if id(value) in seen:
                continue
            seen[id(value)] = value
            waiting.extend(value.values() if is_mapping(value) else value)
            # A module's state has the versions of its layouts in an attribute.
            waiting.extend(getattr(value, "__dict__", {}).values())


def _copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Copies a storage; a large one into huge pages, where fresh memory costs a fifth."""
    nbytes = storage.nbytes()
    source = torch.empty(0, dtype=torch.uint8).set_(storage)
    if nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return source.clone().untyped_storage()
    # Private: a forked process must not share it.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    made = torch.frombuffer(memory, dtype=torch.uint8)
    made.copy_(source)
    return made.untyped_storage()
