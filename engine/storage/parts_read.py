"""Reading a checkpoint in parts: a folder into which each process has written what it holds.

Verified first, and no code is run: what is not plain is refused, as in a file.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosstrain.engine.guards import is_mapping
from crosstrain.engine.spread import at_path

from .atomic import open_regular
from .errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound
from .manifest import INDEX, MANIFEST, Manifest, rank_file
from .parts_index import Entry, decode_index
from .safe_load import load_file

__all__ = ["ENDING", "Parts", "Place", "hash_file", "is_in_parts", "own_states"]

#: How the name of such a folder ends.
ENDING = ".sharded"
Place = tuple[tuple[Any, ...], str]
# A manifest lists a file or two of each process, and the names of the objects.
_MAX_MANIFEST = 64 << 20


def hash_file(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal.

    Raises:
        CheckpointCorrupt: if it is no regular file.
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path, linked=False) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_in_parts(path: str | os.PathLike[str]) -> bool:
    """Tells whether a path is a folder that is, or calls itself, a checkpoint in parts."""
    folder = Path(path).expanduser()
    return folder.is_dir() and (folder.name.endswith(ENDING) or (folder / MANIFEST).is_file())


@dataclass(frozen=True)
class Parts:
    """A checkpoint in parts, as far as its manifest tells.

    Args:
        path: its folder.
        manifest: the manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Parts:
        """Reads the manifest of a folder, and nothing else.

        Raises:
            CheckpointNotFound: if there is no such folder, or it has no manifest.
            CheckpointCorrupt: if the manifest is damaged.
        """
        folder = Path(path).expanduser()
        try:
            with open_regular(folder / MANIFEST, linked=False) as file:
                encoded = file.read(_MAX_MANIFEST + 1)
            if len(encoded) > _MAX_MANIFEST:
                raise CheckpointCorrupt(f"its manifest has more than {_MAX_MANIFEST:,} bytes")
            manifest = Manifest.decode(encoded)
            if not manifest.in_parts:
                raise CheckpointCorrupt("its manifest is that of a checkpoint in one file")
            return cls(folder, manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound(
                f"{folder} is no checkpoint in parts: there is no {MANIFEST} in it. A folder "
                "without one was not written by DiskSaver, or not to its end"
            ) from None
        except OSError as error:
            raise CheckpointCorrupt(
                f"{folder / MANIFEST} cannot be read: {error.strerror or error}"
            ) from error
        except CheckpointError as error:
            raise CheckpointCorrupt(f"{folder} is not a good checkpoint: {error}") from None

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Checks that each file is there and as it was written.

        Args:
            share: (r, n): process r of n checks its share. Where n processes have written it, that
                is what r has written: the same that it is about to read.

        Raises:
            CheckpointCorrupt: if one is not.
        """
        rank, size = share
        for name in sorted(self.manifest.files):
            if _writer_of(name) % size != rank:
                continue
            expected, digest = self.manifest.files[name]
            path = self.path / name
            try:
                found = path.lstat().st_size
                if path.is_symlink() or not path.is_file():
                    raise CheckpointCorrupt(f"{path} is no file, but a link or a folder")
                if found != expected:
                    told = f"{found:,} bytes and was written with {expected:,}"
                    raise CheckpointCorrupt(f"{path} is damaged: it has {told}")
                if hash_file(path) != digest:
                    raise CheckpointCorrupt(
                        f"{path} is damaged, or of another checkpoint: its sha256 is not the one "
                        "that the manifest tells"
                    )
            except FileNotFoundError:
                raise CheckpointCorrupt(f"{path} is missing") from None
            except OSError as error:
                raise CheckpointCorrupt(
                    f"{path} cannot be read: {error.strerror or error}"
                ) from error

    def check_same(self) -> None:
        """Makes sure, when all was read, that it was all of one checkpoint.

        Files are found by the folder's name, which a save under the same name gives to another.

        Raises:
            CheckpointError: if the folder is gone, or another one.
        """
        if Parts.open(self.path).manifest != self.manifest:
            raise CheckpointCorrupt(
                f"{self.path} was replaced by another checkpoint while it was being read: what was "
                "read may be of both. Load it again, into new objects"
            )

    def index(self) -> dict[str, Entry]:
        """Returns the index of the spread tensors, held against the files.

        Raises:
            CheckpointCorrupt: if it does not fit.
        """
        try:
            with open_regular(self.path / INDEX, linked=False) as file:
                encoded = file.read(self.manifest.files[INDEX][0])
            return decode_index(encoded, self.manifest.files)
        except OSError as error:
            raise CheckpointCorrupt(
                f"{self.path / INDEX} cannot be read: {error.strerror or error}"
            ) from error
        except CheckpointCorrupt as error:
            raise CheckpointCorrupt(f"{self.path} is not a good checkpoint: {error}") from None


def _writer_of(name: str) -> int:
    """Returns which process has written a file of a checkpoint in parts."""
    number = re.match(r"(?:__|rank-)([0-9]+)", name)
    return int(number[1]) if number else 0


def own_states(
    found: Parts, rank: int
) -> tuple[dict[str, Any], list[Place], dict[tuple[Any, ...], list[str]]]:
    """Returns a rank's states without spread tensors, where these belong, and names.

    Args:
        found: the checkpoint.
        rank: the rank.

    Raises:
        CheckpointError: if they are not in the form that is written.
    """
    first: Any = load_file(found.path / rank_file(0)).state
    own: Any = first if rank == 0 else load_file(found.path / rank_file(rank)).state
    try:
        states = own["states"]
        if not is_mapping(states):
            raise TypeError("its states are not by name")
        for path in own["same"]:
            # What is as in rank 0 is stored there only.
            container, key = at_path(states, tuple(path))
            source, _ = at_path(first["states"], tuple(path))
            container[key] = source[key]
        places = [(tuple(path), str(name)) for path, name in own["places"]]
        names = {tuple(path): list(map(str, names)) for path, names in own["names"]}
        for path, _ in places:
            container, key = at_path(states, path)
            container[key] = None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointCorrupt(
            f"{found.path / rank_file(rank)} is not what DiskSaver writes "
            f"({type(error).__name__}: {error})"
        ) from None
    return dict(states), places, names
