"""Loads thousands of damaged and hostile files, and reports what did not end as documented.

A child of a fork server: it has its memory limited, and if it dies, the test sees it. By itself,
`python tests/support/fuzzing_program.py --seed 7`, it loads eight times as many, others each time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hostile_files import MARK, Entry, attacks, bombs, foreign

from crosstrain.engine import (
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    DiskSaver,
    Engine,
    Events,
    ResumeError,
)
from crosstrain.engine.storage.manifest import Manifest

SECONDS = 10
MEMORY = 1 << 30
NAME = "checkpoint_4.pt"


def objects() -> dict[str, Any]:
    """Returns a model, its optimizer and an engine."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())

    def step(engine: Engine, batch: Any) -> None:
        optimizer.zero_grad()
        model(torch.randn(5, 6)).pow(2).sum().backward()
        optimizer.step()

    return {"model": model, "optimizer": optimizer, "trainer": Engine(step)}


def train(folder: Path) -> tuple[bytes, bytes]:
    """Trains a little, and returns two checkpoints of the run."""
    to_save = objects()
    trainer: Engine = to_save["trainer"]
    with DiskSaver(folder) as saver:
        handler = Checkpoint(to_save, saver, n_saved=None)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
        trainer.run(range(4))
    return (folder / NAME).read_bytes(), (folder / "checkpoint_3.pt").read_bytes()


def payload_of(file: bytes) -> bytes:
    """Returns what torch.save wrote of a checkpoint: without manifest."""
    at = file.rindex(b"PK\5\6") + 22
    return file[: at - 2] + b"\0\0"


def signed(payload: bytes, **facts: Any) -> bytes:
    """Closes what claims to be torch's archive with a manifest that fits it."""
    values: dict[str, Any] = {"file": NAME, "saved_at_ns": 1, "objects": tuple(objects())}
    digest = hashlib.sha256(payload[:-2] + b"\0\0").hexdigest()
    values |= {"size": len(payload), "sha256": digest, "iteration": 4} | facts
    manifest = Manifest(**values).encode()
    return payload[:-2] + len(manifest).to_bytes(2, "little") + manifest


def damaged(file: bytes, other: bytes, draw: random.Random, many: int) -> Iterator[Entry]:
    """Yields what disks, copies and editors make of a checkpoint; each differs from it."""
    size = len(file)
    end = file.rindex(b"PK\5\6")
    cuts = range(0, size, size // (20 * many))
    for at in {*cuts, *range(end - 30, end + 30), size - 1, size - 2}:
        yield f"cut at {at}", file[:at]
    for _ in range(90 * many):
        at, bit = draw.randrange(size), 1 << draw.randrange(8)
        yield f"bit {bit} of byte {at}", file[:at] + bytes([file[at] ^ bit]) + file[at + 1 :]
    for at in range(end, size):
        if at < end + 22 or draw.randrange(8) < many:
            yield f"byte {at}", file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :]
    for _ in range(20 * many):
        at, length = draw.randrange(size), draw.randrange(1, 600)
        middle = bytes(length) if draw.random() < 0.5 else draw.randbytes(length)
        yield f"{length} bytes at {at}", file[:at] + middle + file[at + length :] + b"x"
        yield f"{length} lost at {at}", file[:at] + file[at + length :]
        yield f"{length} inserted at {at}", file[:at] + middle + file[at:]
    yield "appended", file + b"\0"
    yield "twice", file + file
    yield "manifest of another", payload_of(file)[:-2] + other[other.rindex(b"PK\5\6") + 20 :]
    yield "data of another", payload_of(other)[:-2] + file[end + 20 :]


def forged(file: bytes) -> Iterator[Entry]:
    """Yields checkpoints whose manifest was edited, and its own hash set right again."""
    payload = payload_of(file)
    text = Manifest.decode(file[file.rindex(b"PK\5\6") + 22 :]).encode()
    values = json.loads(text[: text.rindex(b"\nsha256:")])
    for name in values:
        for value in (None, -1, 10**30, "x", [], {}, True, 1.5, ["a", 1], {"a": 1}):
            if not _is_legal(name, value, values[name]):
                yield f"{name} = {value!r}", _close(payload, values | {name: value})
        yield f"without {name}", _close(payload, {k: v for k, v in values.items() if k != name})
    yield "more", _close(payload, values | {"more": 1})
    yield "a list", _close(payload, [values])
    yield "no JSON", _close(payload, None, b"{")
    yield "deep JSON", _close(payload, None, b"[" * 30_000)
    yield "nothing", _close(payload, None, b"")


def _is_legal(name: str, value: Any, now: Any) -> bool:
    """Tells whether a manifest may say this: its hash proves it whole, not true."""
    legal = {"backend": (str, type(None)), "iteration": (int, type(None))}
    legal["epoch"] = legal["iteration"]
    kinds = legal.get(name, (type(now),))
    strict = name in ("format", "schema", "sha256", "size")
    if name == "versions":
        return value == {}
    if name == "objects":
        return value == []
    return type(value) in kinds and not strict and value not in (-1, 10**30)


def _close(payload: bytes, values: Any, raw: bytes | None = None) -> bytes:
    text = json.dumps(values, indent=1).encode() if raw is None else raw
    text += b"\nsha256:" + hashlib.sha256(text).hexdigest().encode() + b"\n"
    return payload[:-2] + len(text).to_bytes(2, "little") + text


def resigned(file: bytes, draw: random.Random, many: int) -> Iterator[Entry]:
    """Yields damaged archives whose manifest fits them: only the reader's own checks are left."""
    payload = payload_of(file)
    end = payload.rindex(b"PK\6\6")
    directory = payload.index(b"PK\1\2")
    pickled = payload.index(b"\x80\x02")
    pickle_end = payload.index(b"PK\3\4", pickled)
    places = [(0, 200), (pickled, pickle_end), (directory, end), (end, len(payload) - 22)]
    for low, high in places:
        for _ in range(35 * many):
            at, value = draw.randrange(low, high), draw.randrange(256)
            changed = payload[:at] + bytes([value]) + payload[at + 1 :]
            yield f"byte {at} is {value}, signed", signed(changed)


def unsigned(file: bytes, draw: random.Random, many: int) -> Iterator[Entry]:
    """Yields damaged files that have no manifest, as another program's."""
    payload = payload_of(file)
    yield "no manifest", payload
    for _ in range(25 * many):
        at, bit = draw.randrange(len(payload)), 1 << draw.randrange(8)
        changed = payload[:at] + bytes([payload[at] ^ bit]) + payload[at + 1 :]
        yield f"bit {bit} of byte {at}, no manifest", changed


class TookTooLong(BaseException):
    """Raised by the alarm; no `except Exception` on the way swallows it."""


class Judge:
    """Loads files and keeps account of what did not end as it should."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.wrong: list[str] = []
        self.outcomes: dict[str, int] = {}
        self.slowest = 0.0

    def load(self, name: str, data: bytes, *, may_load: bool, must_warn: bool = False) -> None:
        """Loads a file both ways, and judges the outcome.

        Args:
            name: what it is.
            data: its bytes.
            may_load: whether it may load at all; then it must not have been good by chance.
            must_warn: whether, if it loads, there must be a warning.
        """
        self.path.write_bytes(data)
        for way in ("load_objects", "latest"):
            began = time.perf_counter()
            signal.alarm(SECONDS)
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    outcome = self._load(way)
            except (CheckpointError, ResumeError) as error:
                outcome = type(error).__name__
                if str(self.path) not in str(error):
                    self.wrong.append(f"{name}: the error does not name the file: {error}")
                if isinstance(error.__cause__, MemoryError) or "allocate" in str(error):
                    self.wrong.append(f"{name}: used up the memory: {error}")
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is not documented
                outcome = "undocumented"
                self.wrong.append(f"{name}, {way}: {type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
            self.slowest = max(self.slowest, time.perf_counter() - began)
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
            if outcome == "loaded":
                warned = any(issubclass(each.category, CheckpointWarning) for each in told)
                if not may_load or (must_warn and not warned):
                    self.wrong.append(f"{name}, {way}: loaded, warned: {warned}")
        if Path(MARK).exists():
            self.wrong.append(f"{name}: ran code")
            Path(MARK).unlink()

    def _load(self, way: str) -> str:
        if way == "load_objects":
            Checkpoint.load_objects(objects(), self.path)
            return "loaded"
        found = Checkpoint.latest(self.path.parent)
        if found:
            return "found"
        assert len(found.passed_over) == 1
        return "passed over"


def fuzz(folder: str, seed: int, report: str, many: int = 1) -> None:
    """Loads every mutation, and writes a report in JSON.

    Args:
        folder: an empty one.
        seed: of what is drawn.
        report: where the report goes.
        many: how many are drawn, 1 to 8; what is not drawn is loaded in any case.
    """
    place = Path(folder)
    (place / "good").mkdir()
    (place / "fuzzed").mkdir()
    file, other = train(place / "good")
    # Each file that is passed over is logged, and there are thousands.
    logging.disable()
    judge = Judge(place / "fuzzed")
    judge.load("untouched", file, may_load=True)
    assert judge.outcomes == {"loaded": 1, "found": 1}
    _limit_memory()
    draw = random.Random(seed)
    count = 0
    for entries, may_load, must_warn in (
        (damaged(file, other, draw, many), False, False),
        (forged(file), False, False),
        (resigned(file, draw, many), True, False),
        (unsigned(file, draw, many), True, True),
        (bombs(), False, False),
        (attacks(), False, False),
        (foreign(place), False, False),
        (((f"{n}, signed", signed(d)) for n, d in bombs() if d), False, False),
        (((f"{n}, signed", signed(d)) for n, d in attacks()), False, False),
    ):
        for name, data in entries:
            count += 1
            if data == file:
                continue
            judge.load(name, data, may_load=may_load, must_warn=must_warn)
    Path(report).write_text(
        json.dumps(
            {
                "count": count,
                "wrong": judge.wrong,
                "outcomes": judge.outcomes,
                "slowest": judge.slowest,
            }
        )
    )


def _limit_memory() -> None:
    def took_too_long(*_: object) -> None:
        raise TookTooLong

    signal.signal(signal.SIGALRM, took_too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    """Loads all that it can draw of a seed; tells what did not end as documented."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    seed = parser.parse_args().seed
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        fuzz(folder, seed, str(report), 8)
        found = json.loads(report.read_text())
    print(f"seed {seed}: {found['count']} files", found["outcomes"], *found["wrong"], sep="\n")
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
