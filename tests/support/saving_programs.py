"""Programs that save checkpoints and are disturbed while they do; children of a fork server."""

from __future__ import annotations

import errno
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crosstrain.engine import Checkpoint, DiskSaver, Engine

# What of the operating system a save uses, each a moment at which it can be stopped or fail.
SYSCALLS = ("open", "write", "pwrite", "fsync", "link", "replace", "close", "unlink")


def refusing(name: str, code: int) -> Callable[..., Any]:
    """Returns a system call that always fails; `open` for unnamed files only."""
    call: Callable[..., Any] = getattr(os, name)

    @functools.wraps(call)
    def refused(*args: Any, **kwargs: Any) -> Any:
        if name == "open" and args[1] & os.O_TMPFILE != os.O_TMPFILE:
            return call(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    return refused


class Counter:
    """An object whose whole state follows from one number, so that a torn one is seen.

    Args:
        elements: how many floats it holds in each of two tensors.
    """

    def __init__(self, elements: int) -> None:
        self.first = torch.zeros(elements)
        self.second = torch.zeros(elements, dtype=torch.float64)

    def set(self, value: int) -> None:
        self.first.fill_(value)
        self.second.fill_(-value)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "value": int(self.first[0])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first.copy_(state["first"])
        self.second.copy_(state["second"])
        value = state["value"]
        assert torch.equal(self.first, torch.full_like(self.first, value))
        assert torch.equal(self.second, torch.full_like(self.second, -value))


class Saver:
    """Saves a counter again and again.

    Args:
        folder: where to.
        mode: `sync`, `background`, or `same-name`, which always writes over one file; `named`,
            for the rest of the process, as on file systems without unnamed files.
        elements: the counter's size.
    """

    def __init__(self, folder: str, mode: str, elements: int = 100_000) -> None:
        self.counter = Counter(elements)
        self.engine = Engine(lambda engine, batch: None)
        self.engine.state.epoch_length, self.engine.state.max_epochs = 1, 10**9
        if mode == "named":
            os.open = refusing("open", errno.EOPNOTSUPP)
        saver = DiskSaver(folder, require_empty=False, background=mode == "background")
        pattern = "checkpoint.pt" if mode == "same-name" else None
        to_save = {"counter": self.counter, "engine": self.engine}
        self.checkpoint = Checkpoint(to_save, saver, n_saved=1, filename_pattern=pattern)

    def save(self, value: int) -> None:
        """Saves the counter at a value, and waits until it is on the disk."""
        self.counter.set(value)
        self.engine.state.iteration = value
        self.checkpoint(self.engine)
        self.checkpoint.wait()


def load_newest(folder: str | Path, elements: int = 100_000) -> int:
    """Loads the newest checkpoint, checks that it is of one piece, and returns its value."""
    counter, engine = Counter(elements), Engine(lambda engine, batch: None)
    found = Checkpoint.latest(folder)
    assert not found or not found.passed_over, found.describe()
    Checkpoint.load_objects({"counter": counter, "engine": engine}, found)
    assert engine.state.iteration == int(counter.first[0])
    assert found.manifest is not None
    assert found.manifest.iteration == engine.state.iteration
    return engine.state.iteration


def save_for_ever(folder: str, mode: str, first: int, told: str) -> None:
    """Saves until it is killed, and tells in a file each value that is on the disk."""
    saver = Saver(folder, mode)
    with Path(told).open("r+b", buffering=0) as file:
        for value in range(first, 1_000_000):
            saver.save(value)
            os.pwrite(file.fileno(), b"%020d" % value, 0)


def save_and_die(folder: str, mode: str, value: int, moment: int, half: bool) -> None:
    """Saves once, and is killed at the n-th system call; `half` lets it do half of a write."""
    saver = Saver(folder, mode)
    count = 0

    def disturb(call: Callable[..., Any], args: tuple[Any, ...], writes: bool) -> Any:
        nonlocal count
        count += 1
        if count == moment:
            if half and writes:
                call(args[0], args[1][: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)

    _wrap(disturb)
    saver.save(value)


def save_and_fail(
    folder: str, mode: str, value: int, moment: int, code: int, told: str, short: bool
) -> None:
    """Saves once while the n-th system call fails, and tells what was raised.

    Args:
        folder: where to.
        mode: see `Saver`.
        value: what to save.
        moment: which call fails.
        code: the error.
        told: the file to tell it in.
        short: whether writes take only a part of what they are given, as they may.
    """
    saver = Saver(folder, mode)
    count = 0
    failed = ""

    def disturb(call: Callable[..., Any], args: tuple[Any, ...], writes: bool) -> Any:
        nonlocal count, failed
        count += 1
        if count == moment:
            failed = call.__name__
            if failed == "close":
                # The descriptor is closed all the same, as on Linux.
                call(*args)
            raise OSError(code, os.strerror(code))
        if short and writes and len(args[1]) > 1:
            return call(args[0], args[1][: len(args[1]) // 2 + 1], *args[2:])
        return call(*args)

    originals = _wrap(disturb)
    raised = ""
    try:
        saver.save(value)
    except OSError as error:
        raised = f"{type(error).__name__}|{errno.errorcode[error.errno or 0]}|{error}"
    for name, call in originals.items():
        setattr(os, name, call)
    Path(told).write_text(f"{failed}\n{raised}\n")


def _wrap(disturb: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    originals: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in SYSCALLS}
    # What a save reads of the checkpoints beside it is not disturbed: there are more after each.
    reading: set[int] = set()

    def wrapped(name: str) -> Callable[..., Any]:
        call = originals[name]
        writes = name == "write"

        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
                descriptor = call(*args, **kwargs)
                reading.add(descriptor)
                return descriptor
            if name == "close" and args[0] in reading:
                reading.remove(args[0])
                return call(*args)
            return disturb(functools.wraps(call)(lambda *a: call(*a, **kwargs)), args, writes)

        return counted

    for name in SYSCALLS:
        setattr(os, name, wrapped(name))
    return originals
