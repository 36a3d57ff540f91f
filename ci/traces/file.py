"""The file of a trace: one line for each iteration, appended, each with its checksum.

A line is eight hexadecimal digits, the CRC-32 of the rest, a space, and JSON. The first line of
each process is a header, which says after which iteration it begins, and what the numbers of its
iterations stand for; iterations that are in the file twice were done twice, and the later ones
count. A last line that a kill has cut off is left out. Imports no torch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from crosstrain.ci.options import UsageError

#: The version of the format.
FORMAT: Final = 1
_NOTHING: Final = "-" * 16


class TraceError(UsageError):
    """A file is no trace, or is damaged; the message names it and says where."""


# How a kind of thing is told, of its kind and its name.
_WORDS: Final = {
    "random": "the random stream '{1}' before the step",
    "random after": "the random stream '{1}' after the step",
    "setting": "the setting {1}",
    "gradient": "the gradient of '{1}'",
    "parameter": "the parameter '{1}'",
    "buffer": "the buffer '{1}'",
}


class Thing(NamedTuple):
    """What is recorded of an iteration.

    Args:
        kind: `batch`, `random`, `setting`, `loss`, `gradient`, `parameter`, `buffer` or
            `random after`.
        name: which one of them; empty where there is but one.
    """

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return _WORDS.get(self.kind, "the {0}").format(self.kind, self.name)


@dataclass(frozen=True)
class Header:
    """What one process says of the iterations that it appends.

    Args:
        after: the iteration after which it begins; 0 for a new run.
        things: what is recorded of each iteration, in the order in which it comes about.
        environment: the backend's spec, the devices, versions and whatever else decides the bits.
    """

    after: int
    things: tuple[Thing, ...]
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int | None = None


@dataclass(frozen=True)
class Record:
    """One iteration.

    Args:
        digests: 16 hexadecimal digits by thing; a thing that was not there has none.
        values: a number by thing: the loss, a setting, the norm of a tensor.
    """

    iteration: int
    epoch: int
    digests: Mapping[Thing, str]
    values: Mapping[Thing, float]


def path_of_rank(path: str | os.PathLike[str], rank: int) -> Path:
    """Returns the file of one process's trace."""
    return Path(f"{os.fspath(path)}.rank{rank}" if rank else path)


class TraceWriter:
    """Appends to a trace's file; what is written is safe from the process being killed."""

    def __init__(self, path: str | os.PathLike[str], header: Header) -> None:
        self._path = Path(path)
        self._things = header.things
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            # What a kill has cut off: the next line would be taken for its rest.
            os.truncate(self._path, _whole_length(self._path))
        self._write([{"trace": FORMAT, **asdict(header)}])

    def append(
        self, records: Iterable[tuple[int, int, Mapping[Thing, int], Mapping[Thing, float]]]
    ) -> None:
        """Appends iterations, each with its epoch, and the digests and values of its things."""
        lines: list[dict[str, Any]] = []
        for iteration, epoch, digests, values in records:
            told = (f"{digests[one]:016x}" if one in digests else _NOTHING for one in self._things)
            line = {"iteration": iteration, "epoch": epoch, "digests": "".join(told)}
            lines.append({**line, "values": [values.get(one) for one in self._things]})
        self._write(lines)

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        block = bytearray()
        for line in lines:
            text = json.dumps(line, separators=(",", ":")).encode()
            block += b"%08x %s\n" % (zlib.crc32(text), text)
        with self._path.open("ab") as file:
            file.write(block)


def _whole_length(path: Path) -> int:
    """Returns how much of a trace's file is whole lines."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    # A process can be killed while it writes its first line.
    begun = end == 0 and data[8:18] == b' {"trace":'[: len(data[8:18])]
    if not begun and _parse(data[: data.find(b"\n") + 1]).get("trace") != FORMAT:
        raise TraceError(f"{path} is no trace of format {FORMAT}: name another file for the trace.")
    return end


def _parse(line: bytes) -> dict[str, Any]:
    """Returns what a line says; nothing if it is not whole."""
    crc, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
        return {}
    found: dict[str, Any] = json.loads(text)
    return found


class Trace:
    """Reads a trace; an iteration is parsed when it is asked for.

    Raises:
        TraceError: if there is none, it is no trace, or a line before the last one is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        #: What the processes that wrote it say, in their order.
        self.headers: list[Header] = []
        #: Whether a kill has cut the last line off.
        self.torn = False
        self._places: dict[int, tuple[int, int]] = {}
        try:
            self._index()
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error.strerror}.") from None

    def _index(self) -> None:
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                found = _parse(line)
                if not found:
                    self.torn = not line.endswith(b"\n") and bool(self.headers)
                    if not self.torn:
                        what = "no trace" if number == 1 else f"damaged in line {number}"
                        raise TraceError(f"{self.path} is {what}. `TraceRecorder` writes traces.")
                elif "trace" in found:
                    self._take_header(found)
                else:
                    self._places[found["iteration"]] = (offset, len(self.headers) - 1)
                offset += len(line)
        if not self.headers:
            raise TraceError(f"{self.path} is empty. `TraceRecorder` writes traces.")

    def _take_header(self, found: dict[str, Any]) -> None:
        if found["trace"] != FORMAT:
            raise TraceError(
                f"{self.path} has format {found['trace']!r}; this version of crosstrain reads "
                f"{FORMAT}. Read it with the version that wrote it."
            )
        header = Header(
            found["after"],
            tuple(Thing(kind, name) for kind, name in found["things"]),
            found["environment"],
            found["seed"],
        )
        # What was done after the iteration that this process went on from is given up.
        self._places = {key: place for key, place in self._places.items() if key <= header.after}
        self.headers.append(header)

    @property
    def iterations(self) -> list[int]:
        """The iterations that it holds, in their order."""
        return sorted(self._places)

    @property
    def environment(self) -> Mapping[str, Any]:
        """What decided the bits of the last process."""
        return self.headers[-1].environment

    def record(self, iteration: int) -> Record:
        """Returns an iteration."""
        offset, number = self._places[iteration]
        with self.path.open("rb") as file:
            file.seek(offset)
            found = _parse(file.readline())
        things, text = self.headers[number].things, found["digests"]
        digests = [text[start : start + 16] for start in range(0, len(text), 16)]
        told = zip(things, digests, found["values"], strict=True)
        by_digest, by_value = dict[Thing, str](), dict[Thing, float]()
        for thing, digest, value in told:
            if digest != _NOTHING:
                by_digest[thing] = digest
            if value is not None:
                by_value[thing] = value
        return Record(found["iteration"], found["epoch"], by_digest, by_value)
