"""Streams that really run later: what is queued has not happened until somebody waits for it."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

_NativeStream: Any = torch.Stream
_NativeEvent: Any = torch.Event
# Work may wait for work of another queue, and a writer's thread waits for that of the training.
LOCK = threading.RLock()


class Queue:
    """The work of a stream, in order.

    Args:
        index: the number of its device.
        is_default: whether operations on it are run when they are called, as the host cannot see
            when they are; only what it can see without waiting, a copy to it, comes later.
    """

    def __init__(self, index: int, is_default: bool = False) -> None:
        self.index = index
        self.is_default = is_default
        self.added = 0
        #: What is recorded of it for a graph, and not done; None: it is not recorded.
        self.recorded: list[Callable[[], Any]] | None = None
        #: Whether something was asked of it while it was recorded that cannot be part of a graph.
        self.spoilt = False
        self._done = 0
        self._todo: deque[Callable[[], None]] = deque()

    def add(self, work: Callable[[], None]) -> None:
        """Queues work."""
        with LOCK:
            self._todo.append(work)
            self.added += 1
            _busy[id(self)] = self

    def run_until(self, position: int) -> None:
        """Does all work that was queued before a position."""
        if self.recorded is not None:
            raise self.refusal("synchronize: operation not permitted when stream is capturing")
        with LOCK, torch.no_grad():
            while self._done < position:
                self._done += 1
                self._todo.popleft()()
            if not self._todo:
                _busy.pop(id(self), None)

    def refusal(self, words: str) -> RuntimeError:
        """Returns the error of what cannot be recorded; the recording ends with another one."""
        self.spoilt = True
        return RuntimeError(words)

    def run(self) -> None:
        """Does all work that is queued."""
        self.run_until(self.added)

    def poll(self, position: int) -> bool:
        """Tells whether the work before a position is done; does one piece of it, as time would."""
        self.run_until(min(position, self._done + 1))
        return self._done >= position

    @property
    def waiting(self) -> int:
        """How much work is queued."""
        return len(self._todo)


_defaults: dict[int, Queue] = {}
# Those that have work: nobody else may hold them.
_busy: dict[int, Queue] = {}
_thread = threading.local()
# The streams of those who wait for a backward pass, which has threads of its own.
_callers: list[list[Any]] = []


class _Kind(type):
    """Has the streams and events of other devices be instances of ours, which stand for torch's."""

    native: Any

    def __instancecheck__(cls, one: object) -> bool:
        return isinstance(one, cls.native)


class Stream(_NativeStream, metaclass=_Kind):  # type: ignore[misc]
    """A stream of the device; of another type of device it is torch's own."""

    native = _NativeStream

    def __new__(cls, device: Any = None, **options: Any) -> Any:
        """Makes one of ours where the device is ours."""
        where = _device(device)
        if where is None:
            return _NativeStream(device=device, **options)
        made = _NativeStream.__new__(cls, device=where)
        made.queue = options.get("queue") or Queue(where.index or 0)
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        self.queue: Queue

    def __enter__(self) -> Stream:
        _stack().append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        # By identity: to torch, streams of one device are equal.
        streams = _stack()
        del streams[max(place for place, one in enumerate(streams) if one is self)]

    def wait_stream(self, other: Any) -> None:
        """Has later work on this stream wait for what the other one has now."""
        self._wait_for(other.queue, other.queue.added)

    def wait_event(self, event: Any) -> None:
        """Has later work on this stream wait for what was queued before the event."""
        if event.place is not None:
            self._wait_for(*event.place)

    def _wait_for(self, queue: Queue, position: int) -> None:
        if self.queue.recorded is not None and queue is not self.queue:
            raise self.queue.refusal(
                "wait: dependency created on uncaptured work in another stream"
            )
        if queue.is_default or queue is self.queue:
            return  # What a default stream computes is done when it is called.
        if self.queue.is_default:
            queue.run_until(position)
        else:
            self.queue.add(lambda: queue.run_until(position))

    def record_event(self, event: Any = None) -> Any:
        """Marks what is queued so far."""
        event = Event(device=torch.device(_name(), self.queue.index)) if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Waits, on the host, for all that is queued."""
        self.queue.run()

    def query(self) -> bool:
        """Tells whether all is done; asking does one piece of it, as time would."""
        return self.queue.poll(self.queue.added)


class Event(_NativeEvent, metaclass=_Kind):  # type: ignore[misc]
    """A mark in a stream of the device; of another type of device it is torch's own."""

    native = _NativeEvent

    def __new__(cls, device: Any = None, **options: Any) -> Any:
        """Makes one of ours where the device is ours."""
        where = _device(device)
        if where is None:
            return _NativeEvent(device=device, **options)
        return _NativeEvent.__new__(cls, device=where)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.place: tuple[Queue, int] | None = None

    def record(self, stream: Any = None) -> None:
        """Marks what a stream has queued so far; that of the thread, if none is given."""
        queue = (current() if stream is None else stream).queue
        self.place = (queue, queue.added)

    def wait(self, stream: Any = None) -> None:
        """Has a stream wait for what was marked."""
        (current() if stream is None else stream).wait_event(self)

    def synchronize(self) -> None:
        """Waits, on the host, for what was marked."""
        if self.place is not None:
            self.place[0].run_until(self.place[1])

    def query(self) -> bool:
        """Tells whether what was marked is done; asking does one piece of it, as time would."""
        return self.place is None or self.place[0].poll(self.place[1])


def _name() -> str:
    return torch._C._get_privateuse1_backend_name()


def _device(device: Any) -> torch.device | None:
    """Returns the device that is meant, with its number; None: of another type."""
    if isinstance(device, int):
        device = torch.device(_name(), device)
    found = torch.device(_name()) if device is None else torch.device(device)
    if found.type != _name():
        return None
    number = torch.accelerator.current_device_index() if found.index is None else found.index
    return torch.device(_name(), number)


def _stack() -> list[Any]:
    if not hasattr(_thread, "streams"):
        _thread.streams = []
    found: list[Any] = _thread.streams
    return found


def default_queue(index: int) -> Queue:
    """Returns the queue of a device's default stream."""
    with LOCK:
        if index not in _defaults:
            _defaults[index] = Queue(index, is_default=True)
        return _defaults[index]


def current_queue(index: int) -> Queue:
    """Returns the queue of this thread's stream on a device."""
    # A backward pass is on the streams of the thread that asked for it.
    in_backward = torch._C._current_graph_task_id() != -1 and not _stack()
    for stream in reversed(_callers[-1] if in_backward and _callers else _stack()):
        if stream.queue.index == index:
            found: Queue = stream.queue
            return found
    return default_queue(index)


def current(device: Any = None) -> Any:
    """Returns this thread's stream on a device."""
    where = _device(device)
    if where is None:
        raise ValueError(f"{device} is not a device of '{_name()}'.")
    return Stream(device=where, queue=current_queue(where.index or 0))


def synchronize(device: Any = None) -> None:
    """Waits, on the host, for all that a device has queued."""
    where = _device(device)
    with LOCK:
        for queue in list(_busy.values()):
            if where is not None and queue.index == where.index:
                queue.run()


def pending() -> int:
    """Returns how much work is queued on all devices, and not done."""
    return sum(queue.waiting for queue in list(_busy.values()))


def _on_callers_streams(run: Any) -> Any:
    """Returns a function of torch that runs backward passes, on the streams of who calls it."""

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        mine = list(_stack())
        _callers.append(mine)
        try:
            return run(*args, **kwargs)
        finally:
            _callers[:] = [one for one in _callers if one is not mine]

    return call


def install() -> None:
    """Puts streams and events in the place of torch's, whose own know no order on this device."""
    places: Any = torch
    places.Stream, places.Event = Stream, Event
    passes: Any = torch.autograd
    passes.backward = _on_callers_streams(passes.backward)
    passes.grad = _on_callers_streams(passes.grad)
    accelerator: Any = torch.accelerator
    accelerator.current_stream, accelerator.synchronize = current, synchronize
    accelerator.set_stream = lambda stream: _stack().append(stream)
