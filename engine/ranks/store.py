"""The store that the ranks of a world talk through, asked without waits that do not end."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import distributed


def _asked(name: str) -> Callable[..., Any]:
    """Returns a method that asks the store by its method of this name."""

    def method(store: AskedStore, *arguments: Any) -> Any:
        return store.ask(name, *arguments)

    return method


class AskedStore:
    """Asks a store, and gives up where it does not answer within a limit.

    torch waits for an answer of its TCPStore without one. Over a cable that was cut nothing comes,
    not even the end of the connection, until the kernel gives it up: after some 15 minutes on
    Linux. So one thread does the asking, and is left behind where no answer comes.
    """

    def __init__(self, store: Any, limit: float) -> None:
        #: Seconds after which a question is given up; may be changed.
        self.limit = limit
        #: Whether one was given up: then the connection is blocked, and each further one fails.
        self.lost = False
        self._turn = threading.Lock()
        self._questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        talk = (store, self._questions, self._answers)
        thread = threading.Thread(target=_answer, args=talk, name="store", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, self._questions, thread)

    def close(self) -> None:
        """Ends the thread that asks; nothing can be asked after it."""
        self._end()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Returns what the store's method of a name returns."""
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

    # torch's own methods. What `clone` returns may wait without a limit.
    set, get, check, add = _asked("set"), _asked("get"), _asked("check"), _asked("add")
    multi_set, multi_get = _asked("multi_set"), _asked("multi_get")
    compare_set, delete_key = _asked("compare_set"), _asked("delete_key")
    has_extended_api, clone = _asked("has_extended_api"), _asked("clone")


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
