"""Loading that verifies first, runs no code, and takes no more memory than the file is long."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import threading
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from crosstrain.engine.errors import warn_user
from crosstrain.engine.guards import is_mapping
from crosstrain.engine.proof import Strictness

from .archive import Archive, Window, read_archive
from .atomic import open_regular
from .errors import (
    CheckpointContentError,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnsafe,
    CheckpointWarning,
)
from .manifest import Manifest
from .plain import to_plain
from .stand_ins import PickleCheck, check_pickle

__all__ = ["LoadedFile", "check_written", "load_file", "load_part", "verify_file"]

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
        check = _scan(Window.whole(file.fileno()), archive)
        file.seek(0)
        return LoadedFile(path, manifest, _load(file, check.names))


def load_part(file: IO[bytes], at: int, length: int, path: Path) -> Any:
    """Reads what `torch.save` has written into a part of a file: through the same door as a file.

    This is how parts of sharded checkpoints (`.distcp`) are read: each of their tensors is an
    archive of its own. What is checked is what `load_file` checks, but for the manifest; the part
    is in memory while it is read.

    Args:
        file: the open file; its position is not used.
        at: where in it the part begins.
        length: how many bytes it has.
        path: of the file, for messages.

    Returns:
        What `torch.save` was given, on the CPU.

    Raises:
        CheckpointCorrupt: if the part is damaged.
        CheckpointUnsafe: if it needs classes that are neither tensors nor plain types, or would
            take more memory than its size explains.
    """
    with _named(path):
        window = Window(file.fileno(), at, length)
        check = _scan(window, read_archive(window))
        data = window.read(length, 0)
        if len(data) != length:
            raise CheckpointCorrupt(f"it is cut off: a part of it should end at {at + length:,}")
        return _load(io.BytesIO(data), check.names)


def check_written(descriptor: int, state: Any, path: Path, strictness: Strictness) -> None:
    """Holds a file that was just written to what a load of it accepts, but for its hash.

    Args:
        descriptor: the file, open for reading too.
        state: the plain state that was written: it is looked through for what is to blame.
        path: what the file is to be called.
        strictness: whether what could not be loaded is an error, a warning, or not looked for.

    Raises:
        CheckpointContentError: if the file could not be loaded; names the objects to blame.
    """
    if strictness == "off":
        return
    try:
        _check(descriptor)
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


def _check(descriptor: int) -> None:
    window = Window.whole(descriptor)
    _scan(window, read_archive(window))


def _to_blame(state: Any) -> list[str]:
    """Returns the names of the objects whose states could not be loaded if they stood alone."""
    names: list[str] = []
    for name, value in state.items() if is_mapping(state) else ():
        with tempfile.TemporaryFile() as file:
            # Without the data: the tensors' places are what is looked at.
            torch.save(to_plain(value, lambda tensor, _: tensor.new_empty(0)), file)
            file.flush()
            try:
                _check(file.fileno())
            except CheckpointError:
                names.append(repr(name))
    return names


@contextlib.contextmanager
def _opened(path: Path) -> Generator[IO[bytes]]:
    """Opens a file, and puts its name in front of what is raised about it."""
    with _named(path), open_regular(path) as file:
        yield file


@contextlib.contextmanager
def _named(path: Path) -> Generator[None]:
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
