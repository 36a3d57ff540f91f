"""A DataLoader's workers end with the iterator that they work for: not before it, and not after.

Schedulers and terminals send SIGTERM, SIGINT or SIGHUP to the whole process group. The process that
trains saves and ends in order; its loader's workers would die at once, and the batch that it waits
for would never come.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, Final

import torch
from torch.utils.data import DataLoader

# Windows has no SIGHUP.
_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)


def iterator_over(data: Any) -> Iterator[Any]:
    """Returns an iterator over data, whose workers leave the ending signals to this process.

    Only the signals that this process listens to; the others end a worker as they end the process.
    It works for workers that are forked, spawned, or started by a fork server, and runs the user's
    `worker_init_fn` in them. Other data than a DataLoader with workers is iterated over as it is.
    """
    # A subclass that only wraps another loader has no workers of its own.
    if not isinstance(data, DataLoader) or getattr(data, "num_workers", 0) == 0:
        return iter(data)
    with _signals_left_alone(data):
        iterator: Iterator[Any] = iter(data)
    if (queues := getattr(iterator, "_index_queues", None)) is not None:
        # The collector of cycles would close them first; the iterator then tells its workers in
        # vain to end, and waits 5 s for each. So they are kept until the iterator is gone.
        weakref.finalize(iterator, _let_go, queues).atexit = False
    return iterator


def _let_go(queues: Any) -> None:
    """Holds queues as the argument of a call that is made when their owner is gone."""


@contextmanager
def _signals_left_alone(data: Any) -> Generator[None, None, None]:
    """Has the workers that a DataLoader starts inside leave the ending signals to this process."""
    listened = {number for number in _SIGNALS if callable(signal.getsignal(number))}
    if not listened or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    own = data.worker_init_fn
    data.worker_init_fn = _WorkerStart(own, tuple(sorted(listened)))
    context: Any = data.multiprocessing_context or multiprocessing
    if context.get_start_method() != "fork":
        # Python unblocks signals where it starts this one.
        resource_tracker.ensure_running()
    # A worker inherits this, and so cannot be ended before it has begun to leave them alone; a
    # server that forks off workers keeps it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, listened)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        data.worker_init_fn = own


class _WorkerStart:
    """Runs first in a worker: sets what the signals do there, and then runs the user's function."""

    def __init__(self, own: Callable[[int], None] | None, signals: tuple[int, ...]) -> None:
        self._own, self._signals = own, signals
        # Set when the process that trains ends in order: then it ends its workers by SIGTERM.
        shared: Any = torch.zeros(1, dtype=torch.uint8)
        self._over: torch.Tensor = shared.share_memory_()
        over = partial(self._over.fill_, 1)
        atexit.register(over)
        # When the loader's iterator is gone, its workers have nobody left to work for either.
        weakref.finalize(self, _finish, over).atexit = False

    def __call__(self, worker: int) -> None:
        handle = _Ignored(os.getppid(), self._over)
        for number in self._signals:
            signal.signal(number, handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        if self._own is not None:
            self._own(worker)


def _finish(over: Callable[[], Any]) -> None:
    over()
    atexit.unregister(over)


class _Ignored:
    """Handles a signal in a worker: does nothing as long as the process that trains goes on."""

    def __init__(self, parent: int, over: torch.Tensor) -> None:
        self._parent, self._over = parent, over

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Ends the worker as the signal would have, if there is nobody left to work for."""
        if bool(self._over) or os.getppid() != self._parent:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
