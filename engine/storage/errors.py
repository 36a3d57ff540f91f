"""The errors and warnings of checkpoints: what is raised, and by which name it is caught."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator
from typing import Final

from crosstrain.engine.shown import harmless

from .locations import Location

_LACKS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class CheckpointError(Exception):
    """The base of every error of a checkpoint; what it says holds nothing that a terminal obeys.

    Args:
        message: what went wrong. It may name files, and what is in them, as others called them.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(harmless(message))


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no such file, or no good checkpoint in the folder."""


class CheckpointCorrupt(CheckpointError):
    """The file is damaged or incomplete, or is no checkpoint; nothing was loaded from it."""


def lack_of(error: Exception) -> int:
    """Returns the `errno` of what this machine lacked to read a checkpoint; 0 if of nothing.

    It may be good then, and to go on from an older one would lose what was trained since.
    """
    causes = (error, error.__cause__)
    told = (each.errno for each in causes if isinstance(each, OSError))
    return next((number for number in told if number in _LACKS), 0)


class CheckpointUnsafe(CheckpointError):
    """The file needs pickled classes, or more memory than its size explains; nothing was loaded."""


class CheckpointMismatch(CheckpointError, ValueError, RuntimeError):
    """The checkpoint does not fit the objects: a key is missing or too many, or a shape differs."""


class CheckpointContentError(CheckpointError, TypeError):
    """A state to be saved holds what a safe checkpoint cannot carry; nothing was written."""


class CheckpointBusy(CheckpointError):
    """Another process is saving into the same folder."""


class CheckpointStoreMissing(CheckpointError, ImportError):
    """The package that reaches such a store is not installed; says which."""


class CheckpointWriteError(CheckpointError, OSError):
    """The file system refused a write; the checkpoints that were there are as they were.

    Args:
        message: what failed, on which file, and why.
        cause: the error of the operating system; its `errno` is taken over.
        path: the file that could not be written.
        is_saved: whether the checkpoint is there, and only what had to be done after it failed.
    """

    def __init__(
        self,
        message: str,
        cause: OSError | None = None,
        path: Location | None = None,
        *,
        is_saved: bool = False,
    ) -> None:
        super().__init__(message)
        self.is_saved = is_saved
        self.errno = errno.ENOSPC if cause is None else cause.errno
        self.filename = None if path is None else str(path)

    @classmethod
    def of(cls, path: Location, why: str, cause: OSError | None) -> CheckpointWriteError:
        """Returns the error of a checkpoint that was not saved.

        Args:
            path: the checkpoint.
            why: what went wrong.
            cause: the error of the operating system, if there was one.
        """
        return cls(
            f"Checkpoint {path} was not saved: {why}. Checkpoints that were saved before are as "
            "they were",
            cause,
            path,
        )

    def __str__(self) -> str:
        return str(self.args[0])


@contextlib.contextmanager
def refused(what: str, place: Location) -> Generator[None]:
    """Raises what the system refuses as a `CheckpointWriteError`; what is one of ours stays so."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        text = f"{what}: {error.strerror or error}"
        raise CheckpointWriteError(text, error, place) from error


class CheckpointWarning(UserWarning):
    """Something about a checkpoint that is allowed, but not what it should be."""
