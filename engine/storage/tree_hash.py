"""The hash of a file as a tree: made while it is written, verified in parts and by several threads.

Leaves are the sha256 of each MiB. A block is a run of leaves, and its hash is that of their hashes
one after the other; so a manifest holds few hashes however long the file is. The root is that of
the blocks' hashes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from .errors import CheckpointCorrupt

__all__ = ["LEAF", "MAX_BLOCKS", "Tree", "TreeCheck", "TreeHash", "fill", "in_threads"]

#: The bytes of a leaf: they stay in a core's cache between reading and hashing.
LEAF: Final = 1 << 20
#: More hashes would leave the names of objects no room in the manifest, which is a zip comment.
MAX_BLOCKS: Final = 64
# More threads than this wait for the memory.
_MAX_THREADS: Final = 8
# A thread takes so many leaves at once, into one buffer.
_RUN: Final = 8

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Tree:
    """The hashes of a file.

    Args:
        size: its bytes.
        block_size: the bytes of a block; the last one may be shorter.
        blocks: the hash of each block, in hexadecimal.
    """

    size: int
    block_size: int
    blocks: tuple[str, ...]

    @property
    def root(self) -> str:
        """The hash of all, in hexadecimal."""
        return hashlib.sha256(b"".join(map(bytes.fromhex, self.blocks))).hexdigest()


class TreeHash:
    """Hashes what it is given piece by piece."""

    def __init__(self) -> None:
        self._leaves: list[bytes] = []
        self._leaf = hashlib.sha256()
        self._filled = 0

    def update(self, data: memoryview | bytes) -> None:
        """Takes the next bytes."""
        view = memoryview(data)
        at = 0
        while at < len(view):
            piece = view[at : at + LEAF - self._filled]
            self._leaf.update(piece)
            at += len(piece)
            self._filled += len(piece)
            if self._filled == LEAF:
                self._leaves.append(self._leaf.digest())
                self._leaf, self._filled = hashlib.sha256(), 0

    def tree(self) -> Tree:
        """Returns the hashes of what was taken so far."""
        leaves = [*self._leaves, *([self._leaf.digest()] if self._filled else ())]
        size = len(self._leaves) * LEAF + self._filled
        many = 1
        while len(leaves) > many * MAX_BLOCKS:
            many *= 2
        blocks = (_of_leaves(leaves[at : at + many]) for at in range(0, len(leaves), many))
        return Tree(size, many * LEAF, tuple(blocks))


def _of_leaves(leaves: list[bytes]) -> str:
    return hashlib.sha256(b"".join(leaves)).hexdigest()


class TreeCheck:
    """Holds an open file against its tree: all of it, or only those blocks that are needed.

    The last two bytes are hashed as zeros: there the archive has the length of its comment, which
    is not known before the hash is.

    Args:
        descriptor: the file; its position is not used.
        tree: what it should be.
    """

    def __init__(self, descriptor: int, tree: Tree) -> None:
        self._descriptor = descriptor
        self._tree = tree
        self._left = set(range(len(tree.blocks)))

    def verify(self, spans: Iterable[tuple[int, int]] | None = None) -> None:
        """Verifies the blocks in which some bytes lie, those that were not verified before.

        Args:
            spans: begin and end of each run of bytes; None: all of the file.

        Raises:
            CheckpointCorrupt: if a byte of such a block is not as it was written.
            OSError: if the file cannot be read.
        """
        size = self._tree.block_size
        wanted = self._left
        if spans is not None:
            touched: set[int] = set()
            for begin, end in spans:
                touched.update(range(begin // size, -(-end // size)))
            wanted = touched & self._left
        many = size // LEAF
        last = -(-self._tree.size // LEAF)
        runs = [
            (leaf, min(leaf + _RUN, (block + 1) * many, last))
            for block in sorted(wanted)
            for leaf in range(block * many, min((block + 1) * many, last), _RUN)
        ]
        leaves: dict[int, list[bytes]] = {}
        # hashlib and the system's read both work beside other threads.
        for (begin, _), found in zip(runs, in_threads(self._hash_run, runs), strict=True):
            leaves.setdefault(begin // many, []).extend(found)
        for block, found in leaves.items():
            if _of_leaves(found) != self._tree.blocks[block]:
                begin, end = block * size, min((block + 1) * size, self._tree.size)
                raise CheckpointCorrupt(
                    "its contents have changed since it was saved (the sha256 of its bytes "
                    f"{begin:,} to {end:,} is another): the disk or a copy has damaged it"
                )
        self._left -= wanted

    def _hash_run(self, run: tuple[int, int]) -> list[bytes]:
        size = self._tree.size
        buffer = memoryview(bytearray(min(LEAF, size)))
        found: list[bytes] = []
        for leaf in range(*run):
            begin = leaf * LEAF
            view = buffer[: min(LEAF, size - begin)]
            fill(self._descriptor, view, begin)
            for at in (size - 2, size - 1):
                if begin <= at < begin + len(view):
                    view[at - begin] = 0
            found.append(hashlib.sha256(view).digest())
        return found


def fill(descriptor: int, view: memoryview, at: int) -> None:
    """Reads from a place in a file until memory is full.

    Raises:
        CheckpointCorrupt: if the file ends before that.
        OSError: if it cannot be read.
    """
    done = 0
    while done < len(view):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [view[done:]], at + done)
        else:  # macOS before 11
            data = os.pread(descriptor, len(view) - done, at + done)
            count = len(data)
            view[done : done + count] = data
        if count == 0:
            raise CheckpointCorrupt("it has become shorter while it was being read")
        done += count


def in_threads(do: Callable[[_T], _R], items: list[_T]) -> list[_R]:
    """Returns what a function returns for each item; the items are done by several threads.

    Args:
        do: the function; it should spend its time outside of Python.
        items: what it is called with.
    """
    threads = min(_cores(), _MAX_THREADS, len(items))
    if threads < 2:
        return list(map(do, items))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(do, items))


def _cores() -> int:
    """Returns how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
