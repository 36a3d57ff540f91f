"""Loading that verifies first, runs no code, and takes no more memory than the file is long."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from .archive import Archive, read_archive
from .errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
)
from .manifest import Manifest
from .pickle_scan import PickleScan

__all__ = ["LoadedFile", "load_file", "verify_file"]

_BLOCK = 1 << 20
# torch keeps the allowed globals in one place for the whole process.
_allowing = threading.Lock()


@dataclass(frozen=True)
class LoadedFile:
    """A checkpoint file that was verified and read.

    Args:
        path: the file.
        manifest: what it says of itself; None if it was written by another program.
        state: what `torch.save` was given.
    """

    path: Path
    manifest: Manifest | None
    state: Any


def verify_file(path: Path) -> Manifest | None:
    """Checks that a checkpoint is whole, without reading its contents into memory.

    Args:
        path: the file.

    Returns:
        Its manifest, every byte of the file being as it was written; None if the file has none,
        because another program wrote it: then only its archive was checked.

    Raises:
        CheckpointNotFound: if there is no such file.
        CheckpointCorrupt: if it is damaged.
        CheckpointUnsafe: if its archive is made to take more memory than it has bytes.
    """
    with _opened(path) as file:
        return _verify(file)[1]


def load_file(path: Path) -> LoadedFile:
    """Reads a checkpoint onto the CPU, after checking that it is whole and safe.

    Verified and read is one open file: one that is put in its place meanwhile is not read.

    Args:
        path: the file.

    Returns:
        The state, with the manifest if the file has one.

    Raises:
        CheckpointNotFound: if there is no such file.
        CheckpointCorrupt: if it is damaged.
        CheckpointUnsafe: if it needs classes to be unpickled that are neither tensors nor plain
            types, or would take more memory than its size explains. Names the classes, and how to
            allow them.
    """
    with _opened(path) as file:
        archive, manifest = _verify(file)
        scan = _scan(file, archive)
        if scan.refused:
            raise CheckpointUnsafe(_refusal(list(scan.refused)))
        return LoadedFile(path, manifest, _load(file, scan.names))


@contextlib.contextmanager
def _opened(path: Path) -> Generator[IO[bytes]]:
    """Opens a file, and puts its name in front of what is raised about it."""
    try:
        with path.open("rb") as file:
            yield file
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


def _neighbours(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".pt")
    except OSError:
        return []
    return [*names[:10], "..."] if len(names) > 10 else names


def _verify(file: IO[bytes]) -> tuple[Archive, Manifest | None]:
    archive = read_archive(file.fileno())
    if not archive.comment:
        return archive, None
    manifest = Manifest.decode(archive.comment)
    if manifest.size != archive.size:
        raise CheckpointCorrupt(
            f"its manifest was written for {manifest.size:,} bytes and it has {archive.size:,}"
        )
    found = _hash(file, archive.size)
    if found != manifest.sha256:
        raise CheckpointCorrupt(
            f"its contents have changed since it was saved (sha256 {found[:16]}..., saved with "
            f"{manifest.sha256[:16]}...): the disk or a copy has damaged it"
        )
    return archive, manifest


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


def _scan(file: IO[bytes], archive: Archive) -> PickleScan:
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
        told = os.pread(file.fileno(), order.size, order.offset) if order.size < 16 else b""
        if told not in (b"little", b"big"):
            raise CheckpointCorrupt("it does not tell in which order its bytes are")
    file_size = os.fstat(file.fileno()).st_size
    data = os.pread(file.fileno(), pickled.size, pickled.offset)
    scan = PickleScan(data, records, file_size, frozenset(_user_allowed()))
    scan.run()
    return scan


def _user_allowed() -> Iterator[str]:
    """Yields the names of the globals that the user has allowed with torch.serialization."""
    for entry in _safe_globals():
        if isinstance(entry, tuple):
            yield entry[1]
        else:
            yield f"{entry.__module__}.{entry.__qualname__}"


def _safe_globals() -> list[Any]:
    return torch.serialization.get_safe_globals()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


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
    file.seek(0)
    try:
        with _allowing, warnings.catch_warnings(), _numpy_allowed(names):
            # torch warns of what the scan has already decided.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises a dozen kinds, from AssertionError to RuntimeError, for damaged files.
        raise CheckpointCorrupt(f"torch cannot load it: {error}") from error


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
