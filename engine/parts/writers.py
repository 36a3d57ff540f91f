"""The processes that write a checkpoint together: steps, after each of which all of them agree."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from crosstrain.engine.ranks.line import Line
from crosstrain.engine.storage.errors import CheckpointError, CheckpointWriteError
from crosstrain.engine.storage.locations import Location
from crosstrain.engine.stores.folders import Aside

_SPARE_BYTES = 2 << 20


class Writers:
    """The processes that write a checkpoint together.

    Args:
        line: theirs, for the thread that writes; None if there is one process.
        path: where the checkpoint will be.
    """

    def __init__(self, line: Line | None, path: Location) -> None:
        self._line = line
        self._path = path
        self.rank = 0 if line is None else line.rank
        self.size = 1 if line is None else line.size

    def agree(self, error: Exception | None, value: Any = None) -> list[Any]:
        """Returns every process's value, by ranks, or raises in all what one has met."""
        is_saved = isinstance(error, CheckpointWriteError) and error.is_saved
        mine = _described(error), is_saved, value
        told = [mine]
        if self._line is not None:
            told = self._line.meet(f"saving {self._path.name}", mine, of=range(self.size))
        failed = [(rank, text) for rank, (text, _, _) in enumerate(told) if text is not None]
        if not failed:
            return [one for _, _, one in told]
        cause = error if isinstance(error, OSError) else None
        if error and (isinstance(error, CheckpointError) or (self.size == 1 and cause is None)):
            raise error
        why = "; ".join(f"rank {rank}: {text}" for rank, text in failed)
        if any(saved for _, saved, _ in told):
            # It has its name only when all else is done.
            raise CheckpointWriteError(why.replace("r", "R", 1), cause, self._path, is_saved=True)
        why = failed[0][1] if self.size == 1 else why
        raise CheckpointWriteError.of(self._path, why, cause) from error

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Has every process do a step; returns, or raises, as `agree` does of what it came to."""
        error: Exception | None = None
        value = None
        try:
            value = work()
        except (OSError, CheckpointError) as caught:
            error = caught
        return self.agree(error, value)

    def first(self, work: Callable[[], Any]) -> Any:
        """Has the first process do a step, and returns in all what it came to."""
        return self.together(work if self.rank == 0 else lambda: None)[0]

    @contextmanager
    def filling(self, aside: Aside, needed: int) -> Generator[None]:
        """Begins what is aside until it has its name; what is not filled to its end is dropped.

        This process is going to write `needed` bytes there.
        """
        try:
            told = self.agree(None, needed)
            token = self.first(lambda: aside.begin(sum(told) + _SPARE_BYTES * self.size))
            self.together(lambda: aside.join(token, needed + _SPARE_BYTES, self.rank))
            yield
        except BaseException:
            # Whatever ended it, Ctrl-C too: nobody else would remove what is there of it.
            if self.rank == 0:
                aside.drop()
            raise
        finally:
            aside.close()


def _described(error: Exception | None) -> str | None:
    if error is None:
        return None
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)
