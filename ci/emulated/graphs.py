"""Graphs of the device: operations that are recorded on a stream, and done again where they were.

As on a GPU, recording does nothing: what it returns is poison until the first replay. Numbers and
tensors of the host are held as they are; whatever would have the host wait is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch

from .streams import Queue, Stream, current_queue, synchronize

#: The devices whose generators take themselves for recorded, after a recording that failed.
stuck: set[int] = set()

# The queues that are recorded now.
_recording: list[Queue] = []


class EmulatedGraph:
    """Work that was recorded on a stream."""

    def __init__(self) -> None:
        self._work: list[Callable[[], Any]] = []
        self._queue: Queue | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        """Records, from here on, what is asked of the present stream."""
        del pool, capture_error_mode
        queue = current_queue(torch.accelerator.current_device_index())
        if queue.is_default or queue.recorded is not None:
            raise RuntimeError("A graph is recorded on a stream that is not the default one, once.")
        self._work = []
        self._queue, queue.recorded, queue.spoilt = queue, self._work, False
        stuck.discard(queue.index)
        _recording.append(queue)

    def capture_end(self) -> None:
        """Ends what `capture_begin` began.

        If something was asked that cannot be part of a graph, then, as CUDA's, the device's
        generator refuses to draw until the next recording.
        """
        if self._queue is None:
            return
        self._queue.recorded = None
        with contextlib.suppress(ValueError):
            _recording.remove(self._queue)
        if self._queue.spoilt:
            stuck.add(self._queue.index)
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        """Does the work again, on the present stream."""
        queue = current_queue(torch.accelerator.current_device_index())
        if queue.recorded is not None:
            refuse_waiting("replay of a graph")
        work = self._work

        def do() -> None:
            with torch.no_grad():
                for one in work:
                    one()

        if queue.is_default:
            do()
        else:
            queue.add(do)

    def reset(self) -> None:
        """Gives up what was recorded."""
        self._work = []

    def __del__(self) -> None:
        """Spoils what is recorded meanwhile, as the end of one of CUDA's does."""
        for queue in _recording if self._work else ():
            queue.spoilt = True

    def pool(self) -> tuple[int, int]:
        """Returns a name for its memory, which is no scarce thing here."""
        return (0, id(self))


@contextlib.contextmanager
def graph(
    graph: EmulatedGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Generator[None, None, None]:
    """Records a graph inside, on a side stream."""
    synchronize()
    name = torch._C._get_privateuse1_backend_name()
    with Stream(device=name) if stream is None else stream:
        graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            graph.capture_end()


def refuse_waiting(what: str) -> None:
    """Refuses what would have the host, or the stream, wait while a graph is recorded."""
    queue = current_queue(torch.accelerator.current_device_index())
    raise queue.refusal(f"{what}: operation not permitted when stream is capturing")
