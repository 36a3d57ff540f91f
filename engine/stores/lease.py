"""One writer to a folder of a store, where nothing releases a lock when its process dies.

Each writer holds a generation: an object `.crosstrain.lock.N`, which it creates on the condition
that there is none, and writes again every few seconds. Whoever finds one that is still written to
is told so and does not begin; one whose process has died, or that nobody has written to for a
while, is followed by generation N + 1, and its holder, should it live on, finds that out before its
next save. `.crosstrain.lock` has the number of the newest, for stores whose lists lag behind.

The way is that of leases with fencing (Gray and Cheriton, SOSP 1989; Kleppmann's "How to do
distributed locking", 2016). Where a store has no conditional put, two that begin within one request
of each other are not noticed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final

from crosstrain.engine.machine import began, machine
from crosstrain.engine.shown import shown
from crosstrain.engine.storage.errors import CheckpointBusy

from .store import Store

_logger = logging.getLogger(__name__)

LOCK: Final = ".crosstrain.lock"
#: A holder writes that it lives every so many seconds.
BEAT: Final = 5.0
# What has not been written to for so many of them is nobody's.
_MISSED: Final = 2.5
# At exit, and for the beats themselves: another comes soon.
_SHORT: Final = 2.0


@dataclass(frozen=True)
class _Holder:
    """Who holds a generation.

    `machine` tells this machine, since it was started, and its namespace of processes; `began` when
    the process began, as the system counts: ids are used again. `beat` is how often it has said
    that it lives.
    """

    token: str
    pid: int
    host: str
    machine: str
    began: str
    beat: int = 0
    released: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> _Holder | None:
        """Returns a holder; None if this is none, as while it is being written."""
        try:
            made = cls(**json.loads(data))
        except (ValueError, TypeError):
            return None
        return made if type(made.pid) is int and type(made.machine) is str else None

    @classmethod
    def here(cls) -> _Holder:
        pid = os.getpid()
        return cls(secrets.token_hex(16), pid, socket.gethostname(), machine(), began(pid))

    def is_this_process(self) -> bool:
        """Tells whether it was this process, in which nobody holds the folder any more."""
        return (self.machine, self.pid) == (machine(), os.getpid()) and not self.has_died()

    def has_died(self) -> bool:
        """Tells whether it is known to have ended: on this machine only."""
        return self.machine == machine() and self.began != began(self.pid)


class Lease:
    """Holds a folder of a store for this process, until `release` or the end of the process.

    All holders in one process share one lease.

    Raises:
        CheckpointBusy: if another process holds it; names its id and host.
        OSError: if the store refuses what this takes.
    """

    _held: ClassVar[dict[str, _Held]] = {}
    _guard: ClassVar = threading.Lock()

    #: Whether nobody else in this process held the folder when this one took it.
    first: bool

    def __init__(self, store: Store) -> None:
        key = f"{store.place}"
        with self._guard:
            held = self._held.get(key)
            self.first = held is None or held.pid != os.getpid()
            if held is None or self.first:
                held = self._held[key] = _Held(store, self._given_up)
            held.users += 1
        self._lease = held
        # The collector may run in any thread, the store's own too: nothing is asked or waited for.
        self._dropped = weakref.finalize(self, held.drop)
        self._dropped.atexit = False

    def renew(self) -> None:
        """Raises CheckpointBusy if another process has taken the folder meanwhile."""
        if self._dropped.alive and self._lease.pid == os.getpid():
            self._lease.check()

    def release(self) -> None:
        """Gives the folder up; another holder in this process keeps it."""
        if self._dropped.detach() is not None:
            self._given_up(self._lease, 1)

    @classmethod
    def _given_up(cls, held: _Held, users: int) -> None:
        # Counted, not left to the collector: errors of the packages refer to whoever has asked.
        with cls._guard:
            held.users -= users
            if held.users > 0:
                return
            held.end()
            if cls._held.get(f"{held.store.place}") is held:
                del cls._held[f"{held.store.place}"]


class _Held:
    """The one lease of a process on a folder: a thread says again and again that it lives.

    Args:
        store: the folder.
        given_up: told of holders that were dropped without being released, and how many.
    """

    def __init__(self, store: Store, given_up: Callable[[_Held, int], None]) -> None:
        self.pid = os.getpid()
        self.users = 0
        self.store = store
        self._given_up = given_up
        self._number, self._holder = _take(store)
        self._drops: deque[None] = deque()
        self._wake = threading.Event()
        self._ended = False
        self._writing = threading.Lock()
        threading.Thread(target=self._beat, name=f"holding {store.place}", daemon=True).start()
        atexit.register(self.end)

    def drop(self) -> None:
        """Hears that a holder was dropped."""
        self._drops.append(None)
        self._wake.set()

    def _beat(self) -> None:
        while not self._ended:
            self._wake.wait(BEAT)
            self._wake.clear()
            if dropped := len(self._drops):
                for _ in range(dropped):
                    self._drops.popleft()
                self._given_up(self, dropped)
            with self._writing:
                if not self._ended:
                    self._holder = replace(self._holder, beat=self._holder.beat + 1)
                    self._write()

    def _write(self) -> None:
        try:
            self.store.within(_SHORT).put(_name(self._number), self._holder.encode())
        except OSError as error:
            _logger.info("%s: %s", shown(self.store.place), shown(error.strerror))

    def end(self) -> None:
        """Gives the folder up; not in a forked process, whose it never was."""
        if self.pid != os.getpid():
            return
        atexit.unregister(self.end)
        if self._writing.acquire(timeout=2 * _SHORT):
            if not self._ended:
                self._ended = True
                self._holder = replace(self._holder, released=True)
                # At the interpreter's end the store may not be reached any more.
                with contextlib.suppress(Exception):
                    self._write()
            self._writing.release()
        self._ended = True
        self._wake.set()

    def check(self) -> None:
        """Raises CheckpointBusy if somebody has followed."""
        newest = max(_hinted(self.store), self._number)
        found = _holder(self.store, self._number + 1)
        if found is None and newest == self._number:
            return
        found = found or _holder(self.store, newest)
        told = _busy(found, self.store, "has taken over")
        told += " This one has written nothing since."
        raise CheckpointBusy(told)


def _name(number: int) -> str:
    return f"{LOCK}.{number}"


def _take(store: Store) -> tuple[int, _Holder]:
    """Returns the generation that this process holds from now on, and what it says of itself."""
    me = _Holder.here()
    number, found = _newest(store)
    if found is not None:
        _wait_for_end_of(found, number, store)
    try:
        store.create(_name(number + 1), me.encode())
    except FileExistsError:
        found = _holder(store, number + 1)
        raise CheckpointBusy(_busy(found, store, "has just begun to save")) from None
    number += 1
    store.put(LOCK, json.dumps({"generation": number}).encode())
    for one in store.list():
        if (old := _number(one.name)) is not None and old < number:
            store.remove(one.name)
    return number, me


def _newest(store: Store) -> tuple[int, _Holder | None]:
    told = [number for one in store.list() if (number := _number(one.name)) is not None]
    number = max([_hinted(store), *told])
    # A list may lag behind, and a process be killed before it has written the number.
    found = _holder(store, number) if number else None
    while (next_one := _holder(store, number + 1)) is not None:
        number, found = number + 1, next_one
    return number, found


def _number(name: str) -> int | None:
    text = name.removeprefix(f"{LOCK}.")
    return int(text) if text != name and text.isascii() and text.isdigit() else None


def _hinted(store: Store) -> int:
    try:
        values: Any = json.loads(store.get(LOCK))
        number: Any = values["generation"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return 0
    return number if type(number) is int and 0 <= number < 2**63 else 0


_UNKNOWN: Final = _Holder("", 0, "unknown", "", "")


def _holder(store: Store, number: int) -> _Holder | None:
    """Returns who holds a generation; None if nobody ever has."""
    try:
        return _Holder.decode(store.get(_name(number))) or _UNKNOWN
    except FileNotFoundError:
        return None


def _wait_for_end_of(found: _Holder, number: int, store: Store) -> None:
    """Returns when a holder is not there any more; raises CheckpointBusy if it is."""
    if found.released or found.has_died() or found.is_this_process():
        return
    if found.machine == machine():
        raise CheckpointBusy(_busy(found, store, "is saving"))
    patience = _MISSED * BEAT
    _logger.warning(
        "%s was held by process %d on host %s, which has not given it up: looking for %.0f s "
        "whether it still lives.",
        shown(store.place),
        found.pid,
        shown(found.host),
        patience,
    )
    until = time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(min(1.0, patience / 10))
        now = _holder(store, number)
        if now is None or now.released:
            return
        if now != found:
            raise CheckpointBusy(_busy(now, store, "is saving"))


def _busy(found: _Holder | None, store: Store, does: str) -> str:
    who = "another process"
    if found is not None and found.pid:
        who = f"process {found.pid} on host {found.host}"
    return (
        f"{who} {does} checkpoints into {store.place}; two runs in one folder would remove each "
        "other's. Give this run a folder of its own, or end the other one."
    )
