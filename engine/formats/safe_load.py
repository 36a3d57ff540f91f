"""Loading that verifies first, runs no code, and takes no more memory than the file is long.

Where the system can, the state that is returned lies in the memory of the file itself (see
`mapped`), so that a load takes no memory beyond that of the objects.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import torch

from crosstrain.engine.storage.archive import Archive, Window, read_archive
from crosstrain.engine.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
)
from crosstrain.engine.storage.locations import Location
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.tree_hash import Place, TreeCheck, fill
from crosstrain.engine.stores.folders import folder_at, open_place

from .mapped import Mapped, Stamp, can_map, check_stamp, path_of_descriptor, stamp_of
from .stand_ins import PickleCheck, check_pickle

_BLOCK = 1 << 20
# torch.save begins each tensor at a multiple of 64; some processors need it where numbers are read.
_ALIGNED = 16
_BYTE_ORDER = sys.byteorder.encode()
# torch keeps the allowed globals in one place for the whole process.
_allowing = threading.Lock()

#: Is given a state, and the manifest if there is one; returns parts of the state.
Take = Callable[[Any, Manifest | None], Any]


@dataclass(frozen=True)
class LoadedFile:
    """A checkpoint that was verified and read.

    Args:
        path: where it was; None if it was in memory.
        manifest: what it says of itself; None if it was written by another program.
        state: what `torch.save` was given.
        mapped: the file's memory, if the state's tensors lie in it; whoever asked for it has to
            see to it that none of them outlives the load.
    """

    path: Location | None
    manifest: Manifest | None
    state: Any
    mapped: Mapped | None = None


def verify_file(path: Location, opened: IO[bytes] | None = None) -> Manifest | None:
    """Checks that a checkpoint is whole, without reading its contents into memory.

    Args:
        path: the file.
        opened: the file, where it is open already; it stays the caller's to close.

    Returns:
        Its manifest, every byte of the file being as it was written; None if the file has none,
        because another program wrote it: then only its archive was checked.

    Raises:
        CheckpointError: as of `load_file`.
    """
    with _opened(path, opened) as file:
        whole = _Whole(file)
        whole.verify()
        return whole.manifest


def load_file(
    path: Location,
    *,
    take: Take | None = None,
    names: Collection[str] | None = None,
    opened: IO[bytes] | None = None,
) -> LoadedFile:
    """Reads a checkpoint onto the CPU, after checking that it is whole and safe.

    Verified and read is one open file: one that is put in its place meanwhile is not read.

    Args:
        path: the file.
        take: leaves the tensors in the memory of the file, where the system can: they are to be
            copied, and the load is to end with `mapped.check_unchanged()`. Called with the state
            and the manifest, before all is verified, it returns those parts of the state that are
            to be in memory of their own at once: they are read and verified in one pass.
        names: the objects whose states are needed, if not all are: of a file that tells the hashes
            of its blocks, only theirs are read and verified, and the state holds no others.
        opened: the file, where it is open already; it stays the caller's to close.

    Returns:
        The state, with the manifest if the file has one.

    Raises:
        CheckpointNotFound: if there is no such file.
        CheckpointCorrupt: if it is damaged, or somebody writes to it meanwhile.
        CheckpointUnsafe: if it needs classes to be unpickled that are neither tensors nor plain
            types, or would take more memory than its size explains. Names the classes, and how to
            allow them.
    """
    with _opened(path, opened) as file:
        whole = _Whole(file)
        mapped = take is not None and can_map()
        whole.verify(whole.beside_tensors() if mapped else None)
        check = _scan(Window.whole(file.fileno()), whole.archive)
        found = _load_mapped(file, path, whole, check) if mapped else None
        memory: Mapped | None = None
        if take is not None and found is not None:
            state, memory = found
            spans: set[tuple[int, int]] | None = None
            if names is not None and whole.can_verify_in_part(names, state):
                state = {name: state[name] for name in names}
                spans = whole.with_headers(memory.spans(state))
            memory.own_by(partial(whole.verify, spans), take(state, whole.manifest))
        else:
            whole.verify()
            file.seek(0)
            state = _load(file, check.names)
        check_stamp(file.fileno(), whole.stamp)
        return LoadedFile(path, whole.manifest, state, memory)


def load_part(file: IO[bytes], at: int, length: int, path: Location) -> Any:
    """Reads what `torch.save` has written into a part of a file: through the same door as a file.

    This is how parts of sharded checkpoints (`.distcp`) are read: each of their tensors is an
    archive of its own. What is checked is what `load_file` checks, but for the manifest; the part
    is in memory while it is read, and the file's position is not used.
    """
    with _named(path):
        window = Window(file.fileno(), at, length)
        check = _scan(window, read_archive(window))
        data = window.read(length, 0)
        if len(data) != length:
            raise CheckpointCorrupt(f"it is cut off: a part of it should end at {at + length:,}")
        return _load(io.BytesIO(data), check.names)


def check_loadable(descriptor: int) -> None:
    """Raises a CheckpointError if a load of an open file would refuse it, but for its hash."""
    window = Window.whole(descriptor)
    _scan(window, read_archive(window))


@contextlib.contextmanager
def _opened(path: Location, opened: IO[bytes] | None = None) -> Generator[IO[bytes]]:
    """Opens a file, if it is not open, and puts its name in front of what is raised about it."""
    ready = contextlib.nullcontext(opened) if opened is not None else open_place(path)
    with _named(path), ready as file:
        yield file


@contextlib.contextmanager
def _named(path: Location) -> Generator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointNotFound(
            f"There is no checkpoint {path}. Files in {path.parent}: "
            f"{', '.join(_neighbours(path.parent)) or 'none that end with .pt'}"
        ) from None
    except IsADirectoryError:
        raise CheckpointCorrupt(
            f"{path} is a folder; name a file in it, or find the newest good one with "
            "Checkpoint.latest()"
        ) from None
    except OSError as error:
        raise CheckpointCorrupt(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointUnsafe as error:
        raise CheckpointUnsafe(f"{path} was not loaded: {error}") from error.__cause__
    except CheckpointError as error:
        raise CheckpointCorrupt(f"{path} is not a good checkpoint: {error}") from error.__cause__


def _neighbours(folder: Location) -> list[str]:
    try:
        names = [entry.name for entry in folder_at(folder).entries((".pt",))]
    except OSError:
        return []
    return [*names[:10], "..."] if len(names) > 10 else names


class _Whole:
    """An open file that is held against its manifest; made, against the size that this tells."""

    def __init__(self, file: IO[bytes]) -> None:
        self.stamp: Stamp = stamp_of(file.fileno())
        self.archive = read_archive(Window.whole(file.fileno()))
        self.manifest = Manifest.decode(self.archive.comment) if self.archive.comment else None
        self._file = file
        self._tree: TreeCheck | None = None
        self._verified = False
        if self.manifest is None:
            return
        if self.manifest.size != self.archive.size:
            raise CheckpointCorrupt(
                f"its manifest was written for {self.manifest.size:,} bytes and it has "
                f"{self.archive.size:,}"
            )
        if (tree := self.manifest.tree) is not None:
            self._tree = TreeCheck(file.fileno(), tree)

    def can_verify_in_part(self, names: Collection[str], state: Any) -> bool:
        """Tells whether some of the objects can be verified without the others."""
        manifest = self.manifest
        if manifest is None or self._tree is None or manifest.bare:
            return False
        if not isinstance(state, Mapping):
            return False
        return set(names) < set(manifest.objects) and all(name in state for name in names)

    def beside_tensors(self) -> set[tuple[int, int]]:
        """Returns where that lies which is no tensor's: begins and ends."""
        spans = self.with_headers(
            (record.offset, record.offset + record.size)
            for name, record in self.archive.records.items()
            if not name.startswith("data/")
        )
        ends = (record.offset + record.size for record in self.archive.records.values())
        return {*spans, (max(ends, default=0), self.archive.size)}

    def with_headers(self, spans: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
        """Returns spans of records, with what says where these begin: it is before them."""
        records = self.archive.records.values()
        ends = sorted([0, *(record.offset + record.size for record in records)])
        return {(ends[bisect_right(ends, begin) - 1], end) for begin, end in spans}

    def verify(
        self, spans: Iterable[tuple[int, int]] | None = None, places: Sequence[Place] = ()
    ) -> None:
        """Verifies the file, or some of its bytes, and reads what is to be kept.

        Args:
            spans: which bytes; None: all that were not verified before.
            places: of what is to be kept.
        """
        if self._tree is not None:
            self._tree.verify(spans, places)
            return
        self._verify_as_one()
        for at, view in places:
            fill(self._file.fileno(), view, at)

    def _verify_as_one(self) -> None:
        if self.manifest is None or self._verified:
            return
        found = _hash(self._file, self.archive.size)
        if found != self.manifest.sha256:
            raise CheckpointCorrupt(
                f"its contents have changed since it was saved (sha256 {found[:16]}..., saved "
                f"with {self.manifest.sha256[:16]}...): the disk or a copy has damaged it"
            )
        self._verified = True


def _hash(file: IO[bytes], size: int) -> str:
    """Hashes the archive as it was before the length of its comment was filled in."""
    digest = hashlib.sha256()
    file.seek(0)
    left = size - 2
    while left:
        block = file.read(min(_BLOCK, left))
        if not block:
            raise CheckpointCorrupt("it has become shorter while it was being read")
        digest.update(block)
        left -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest()


def _scan(window: Window, archive: Archive) -> PickleCheck:
    records = archive.records
    if "constants.pkl" in records:
        raise CheckpointUnsafe(
            "it is a TorchScript program, not a state: load it with torch.jit.load if you trust "
            "it, and save its state_dict()"
        )
    pickled = records.get("data.pkl")
    if pickled is None:
        raise CheckpointCorrupt("it is a zip archive without the pickle of torch.save (data.pkl)")
    order = records.get("byteorder")
    if order is not None:
        told = window.read(order.size, order.offset) if order.size < 16 else b""
        if told not in (b"little", b"big"):
            raise CheckpointCorrupt("it does not tell in which order its bytes are")
    data = window.read(pickled.size, pickled.offset)
    check = check_pickle(data, records, window.length, frozenset(_user_allowed()))
    if check.refused:
        raise CheckpointUnsafe(_refusal([path[:200] for path in check.refused]))
    return check


def _user_allowed() -> Iterator[str]:
    """Yields the names of the globals that the user has allowed with torch.serialization."""
    for entry in _safe_globals():
        if isinstance(entry, tuple):
            yield entry[1]
        else:
            yield f"{entry.__module__}.{entry.__qualname__}"


def _safe_globals() -> list[Any]:
    return torch.serialization.get_safe_globals()


def _refusal(refused: list[str]) -> str:
    shown = ", ".join(refused[:8]) + (f" and {len(refused) - 8} more" if len(refused) > 8 else "")
    return (
        f"its pickle asks for {shown}: neither tensors nor plain types, and whoever wrote the file "
        "chose what would run. If you trust it, import these and allow them by "
        f"torch.serialization.add_safe_globals([{', '.join(refused[:8])}]), or use the context "
        "manager torch.serialization.safe_globals(...), then load again; it is loaded with "
        "weights_only=True either way. Files that crosstrain writes never need this"
    )


def _load(file: IO[bytes], names: set[str]) -> Any:
    try:
        with _quietly(names):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises a dozen kinds, from AssertionError to RuntimeError, for damaged files.
        raise CheckpointCorrupt(f"torch cannot load it: {error}") from error


def _load_mapped(
    file: IO[bytes], path: Location, whole: _Whole, check: PickleCheck
) -> tuple[Any, Mapped] | None:
    """Loads a state whose tensors lie in the file's memory; None if this file has to be read."""
    records = [whole.archive.records[f"data/{key}"] for key in check.storages]
    if any(record.offset % _ALIGNED for record in records):
        return None
    order = whole.archive.records.get("byteorder")
    if order is None or os.pread(file.fileno(), order.size, order.offset) != _BYTE_ORDER:
        # torch turns the bytes around, in memory.
        return None
    found: list[torch.UntypedStorage] = []

    def keep(storage: Any, _: str) -> Any:
        found.append(storage)
        return storage

    try:
        with _quietly(check.names):
            place = path_of_descriptor(file.fileno())
            state = torch.load(place, map_location=keep, weights_only=True, mmap=True)
    except Exception:  # noqa: BLE001 - it is read then, and whatever is wrong with it is told
        return None
    # Each is made when the pickle names it first, as the scan has seen it.
    if [storage.nbytes() for storage in found] != [record.size for record in records]:
        return None
    places = [(storage, record.offset) for storage, record in zip(found, records, strict=True)]
    return state, Mapped(file.fileno(), path, whole.stamp, places)


@contextlib.contextmanager
def _quietly(names: set[str]) -> Generator[None]:
    with _allowing, warnings.catch_warnings(), _numpy_allowed(names):
        # torch warns of what the scan has already decided.
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _numpy_allowed(names: set[str]) -> Generator[None]:
    """Allows NumPy arrays of numbers where the scan has found some; takes it back afterwards."""
    if not any(name.startswith("numpy.") for name in names):
        yield
        return
    import numpy as np

    multiarray = __import__("numpy._core.multiarray", fromlist=["_reconstruct", "scalar"])
    functions = [multiarray._reconstruct, multiarray.scalar]
    wanted: list[Any] = [np.ndarray, np.dtype]
    wanted += [type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efdFD"]
    for function in functions:
        for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
            wanted.append((function, f"{module}.{function.__name__}"))
    have = _safe_globals()
    # What the user has allowed must still be allowed afterwards.
    with torch.serialization.safe_globals([item for item in wanted if item not in have]):
        yield
