"""PatientStore: the process group's store, without waits that do not end."""

from __future__ import annotations

import threading
from typing import Any

from torch import distributed

__all__ = ["PatientStore"]


class PatientStore:
    """Asks a store, and gives up where it does not answer within a limit.

    torch waits for an answer of its TCPStore without one. Over a cable that was cut nothing comes,
    not even the end of the connection, until the kernel gives it up: after some 15 minutes on
    Linux. Each question is asked in a thread, which is left behind where no answer comes.

    Args:
        store: torch's store.
        limit: seconds.
    """

    def __init__(self, store: Any, limit: float) -> None:
        self._store = store
        #: Seconds after which a question is given up; may be changed.
        self.limit = limit
        #: Whether one was given up: then the connection is blocked, and each further one fails.
        self.lost = False

    def _ask(self, name: str, *arguments: Any) -> Any:
        if not self.lost:
            answers: list[Any] = []
            errors: list[BaseException] = []

            def ask() -> None:
                try:
                    answers.append(getattr(self._store, name)(*arguments))
                except (RuntimeError, TypeError, ValueError) as error:
                    errors.append(error)

            thread = threading.Thread(target=ask, name="store", daemon=True)
            thread.start()
            thread.join(self.limit)
            if errors:
                raise errors[0]
            if answers:
                return answers[0]
            self.lost = True
        raise distributed.DistNetworkError(
            f"The store of the process group has not answered within {self.limit:g} s: its "
            "machine, that of MASTER_ADDR, cannot be reached."
        )

    def set(self, key: str, text: str) -> None:
        """Sets a key."""
        self._ask("set", key, text)

    def get(self, key: str) -> bytes:
        """Returns what a key has been set to."""
        return bytes(self._ask("get", key))

    def check(self, keys: list[str]) -> bool:
        """Tells whether all of some keys have been set."""
        return bool(self._ask("check", keys))

    def compare_set(self, key: str, expected: str, text: str) -> bytes:
        """Sets a key if it is what is expected; returns what it is then."""
        return bytes(self._ask("compare_set", key, expected, text))

    def add(self, key: str, step: int) -> int:
        """Adds to a number and returns it."""
        return int(self._ask("add", key, step))

    def delete_key(self, key: str) -> None:
        """Forgets a key."""
        self._ask("delete_key", key)

    def multi_set(self, keys: list[str], texts: list[str]) -> None:
        """Sets several keys by one message."""
        self._ask("multi_set", keys, texts)

    def has_extended_api(self) -> bool:
        """Tells whether the store has `multi_set`."""
        return bool(self._store.has_extended_api())

    def clone(self) -> Any:
        """Returns another connection to the store: torch's, that may wait without a limit."""
        return self._ask("clone")
