"""The store that the ranks of a world talk through, asked without waits that do not end."""

from __future__ import annotations

import queue
import threading
import weakref
from typing import Any

from torch import distributed


class AskedStore:
    """Asks a store, and gives up where it does not answer within a limit.

    torch waits for an answer of its TCPStore without one. Over a cable that was cut nothing comes,
    not even the end of the connection, until the kernel gives it up: after some 15 minutes on
    Linux. So one thread does the asking, and is left behind where no answer comes.
    """

    def __init__(self, store: Any, limit: float) -> None:
        self._store = store
        #: Seconds after which a question is given up; may be changed.
        self.limit = limit
        #: Whether one was given up: then the connection is blocked, and each further one fails.
        self.lost = False
        self._turn = threading.Lock()
        self._questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        arguments = (store, self._questions, self._answers)
        thread = threading.Thread(target=_answer, args=arguments, name="store", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, self._questions, thread)

    def close(self) -> None:
        """Ends the thread that asks; nothing can be asked after it."""
        self._end()

    def _ask(self, name: str, *arguments: Any) -> Any:
        with self._turn:
            if not self._end.alive:
                raise distributed.DistNetworkError("This connection to the store has been closed.")
            if not self.lost:
                self._questions.put((name, arguments))
                try:
                    failed, answer = self._answers.get(timeout=self.limit)
                except queue.Empty:
                    self.lost = True
                else:
                    if failed:
                        raise answer
                    return answer
        raise distributed.DistNetworkError(
            f"The store of the process group has not answered within {self.limit:g} s: its "
            "machine, that of MASTER_ADDR, cannot be reached."
        )

    def set(self, key: str, text: str | bytes) -> None:
        """Sets a key."""
        self._ask("set", key, text)

    def get(self, key: str) -> bytes:
        """Returns what a key has been set to."""
        return bytes(self._ask("get", key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Returns what several keys have been set to, by one message."""
        return [bytes(value) for value in self._ask("multi_get", keys)]

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
        """Tells whether the store has `multi_set` and `multi_get`."""
        return bool(self._store.has_extended_api())

    def clone(self) -> Any:
        """Returns another connection to the store: torch's, that may wait without a limit."""
        return self._ask("clone")


def _answer(store: Any, questions: Any, answers: Any) -> None:
    """Asks the store what the queue holds, one after the other, until it holds None."""
    while (question := questions.get()) is not None:
        name, arguments = question
        try:
            answers.put((False, getattr(store, name)(*arguments)))
        except (RuntimeError, TypeError, ValueError) as error:
            answers.put((True, error))
        del question, arguments


def _end(questions: Any, thread: threading.Thread) -> None:
    questions.put(None)
    # A thread that runs when the interpreter ends can take the process down. One that waits for a
    # machine which does not answer waits on.
    thread.join(0.5)
