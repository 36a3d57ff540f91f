"""The hash of a file as a tree: made while it is written, verified in parts and by several threads.

Leaves are the BLAKE3 of each MiB: as safe a hash as sha256, and four times as fast on a core that
has instructions for either. A block is a run of leaves, and its hash is the sha256 of their hashes
one after the other; so a manifest holds few hashes however long the file is. The root is the
sha256 of the blocks' hashes.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from blake3 import blake3

from .errors import CheckpointCorrupt

#: The bytes of a leaf.
LEAF: Final = 1 << 20
# So many at once are read, and hashed while they are in a core's cache.
_PIECE: Final = 1 << 19
#: More hashes would leave the names of objects no room in the manifest, which is a zip comment.
MAX_BLOCKS: Final = 64
# More threads than this wait for the memory.
_MAX_THREADS: Final = 8
# A thread takes so many leaves at once.
_RUN: Final = 8
# What is shorter is copied out of a buffer: a read of its own would cost more.
_DIRECT: Final = 64 << 10

#: Where bytes begin in a file, and the memory that they are to be read into.
Place = tuple[int, memoryview]
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Tree:
    """The hashes of a file: of each block, in hexadecimal, of which the last may be shorter."""

    size: int
    block_size: int
    blocks: tuple[str, ...]

    @property
    def root(self) -> str:
        """The hash of all, in hexadecimal."""
        return hashlib.sha256(b"".join(map(bytes.fromhex, self.blocks))).hexdigest()


def digest_of(data: Any) -> bytes:
    """Returns the BLAKE3 of a buffer (bytes, a numpy array), by as many threads as pay."""
    return blake3(data, max_threads=blake3.AUTO).digest()


class TreeHash:
    """Hashes what it is given piece by piece."""

    def __init__(self) -> None:
        self._leaves: list[bytes] = []
        self._leaf = blake3()
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
                self._leaf, self._filled = blake3(), 0

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
    """

    def __init__(self, descriptor: int, tree: Tree) -> None:
        self._descriptor = descriptor
        self._tree = tree
        self._left = set(range(len(tree.blocks)))

    def verify(
        self, spans: Iterable[tuple[int, int]] | None = None, places: Sequence[Place] = ()
    ) -> None:
        """Verifies the blocks in which some bytes lie, those that were not verified before.

        What is to be kept of the file is read to where it is kept and hashed there, so that it
        passes through the processor's cache once, and what was verified is what is kept.

        Args:
            spans: begin and end of each run of bytes; None: all of the file.
            places: what is to be kept; no two share a byte. Those of blocks that are not verified
                now are read too.

        Raises:
            CheckpointCorrupt: if a byte of such a block is not as it was written.
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
        kept = _Places(places)
        runs = [
            (leaf, min(leaf + _RUN, (block + 1) * many, last), block in wanted)
            for block in range(len(self._tree.blocks))
            if block in wanted or kept.any_in(block * size, (block + 1) * size)
            for leaf in range(block * many, min((block + 1) * many, last), _RUN)
        ]
        leaves: dict[int, list[bytes]] = {}
        read = partial(self._read_run, kept)
        # hashlib and the system's read both work beside other threads.
        for (begin, _, hashed), found in zip(runs, in_threads(read, runs), strict=True):
            if hashed:
                leaves.setdefault(begin // many, []).extend(found)
        for block, found in leaves.items():
            if _of_leaves(found) != self._tree.blocks[block]:
                begin, end = block * size, min((block + 1) * size, self._tree.size)
                raise CheckpointCorrupt(
                    "its contents have changed since it was saved (the hash of its bytes "
                    f"{begin:,} to {end:,} is another): the disk or a copy has damaged it"
                )
        self._left -= wanted

    def _read_run(self, kept: _Places, run: tuple[int, int, bool]) -> list[bytes]:
        """Reads some leaves; returns their hashes, if they are to be hashed."""
        first, end, hashed = run
        size = self._tree.size
        buffer = memoryview(bytearray(min(_PIECE, size)))
        found: list[bytes] = []
        for leaf in range(first, end):
            digest = blake3()
            for at, view in kept.pieces(leaf * LEAF, min((leaf + 1) * LEAF, size), buffer):
                fill(self._descriptor, view, at)
                kept.copy_small(at, view)
                if hashed:
                    for last in (size - 2, size - 1):
                        if at <= last < at + len(view):
                            view[last - at] = 0
                    digest.update(view)
            found.append(digest.digest())
        return found


class _Places:
    """The places that parts of a file are kept in, by where in the file they begin."""

    def __init__(self, places: Sequence[Place]) -> None:
        filled = sorted((place for place in places if len(place[1])), key=lambda place: place[0])
        self._all = filled
        self._large = [place for place in filled if len(place[1]) >= _DIRECT]
        self._small = [place for place in filled if len(place[1]) < _DIRECT]

    def any_in(self, begin: int, end: int) -> bool:
        """Tells whether a part of the file is kept, or some of it."""
        return next(_within(self._all, begin, end), None) is not None

    def pieces(self, begin: int, end: int, buffer: memoryview) -> Iterator[Place]:
        """Yields where each piece of a run of bytes is to be read to: its place, or the buffer.

        What is not kept, or is small, comes into the buffer; no piece is longer.
        """
        for first in range(begin, end, len(buffer)):
            at, last = first, min(first + len(buffer), end)
            for start, view in _within(self._large, first, last):
                if at < start:
                    yield at, buffer[: start - at]
                at, until = max(at, start), min(start + len(view), last)
                yield at, view[at - start : until - start]
                at = until
            if at < last:
                yield at, buffer[: last - at]

    def copy_small(self, at: int, view: memoryview) -> None:
        """Copies what is small to its place, from a buffer with the file's bytes from `at` on."""
        for start, small in _within(self._small, at, at + len(view)):
            begin, end = max(at, start), min(at + len(view), start + len(small))
            small[begin - start : end - start] = view[begin - at : end - at]


def _within(places: list[Place], begin: int, end: int) -> Iterator[Place]:
    """Yields those of sorted places that have bytes in a run of a file."""
    index = bisect_right(places, begin, key=lambda place: place[0])
    if index and places[index - 1][0] + len(places[index - 1][1]) > begin:
        index -= 1
    while index < len(places) and places[index][0] < end:
        yield places[index]
        index += 1


def fill(descriptor: int, view: memoryview, at: int) -> None:
    """Reads from a place in a file until memory is full; CheckpointCorrupt if it ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], at + done)
        if count == 0:
            raise CheckpointCorrupt("it has become shorter while it was being read")
        done += count


def in_threads(do: Callable[[_T], _R], items: list[_T]) -> list[_R]:
    """Returns what a function returns for each item; several threads do them.

    It should spend its time outside of Python.
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
