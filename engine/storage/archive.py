"""A strict reader of the zip archives that `torch.save` writes; what it never writes is refused.

torch's own reader trusts the archive: it inflates compressed records, follows overlapping ones, and
reads nothing of a record that the directory marks as a folder, whose tensors then hold what the
memory held before. (Before torch 2.13 it also handed out memory beyond a record's end.) What passes
here has stored records only, each in its own place, so that reading takes no more memory than the
file is long, and every byte of a tensor is one of the file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Protocol

from .errors import CheckpointCorrupt, CheckpointUnsafe

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF
# The directory's mark of a folder, as MS-DOS has it.
_IS_FOLDER = 0x10


class Readable(Protocol):
    """Bytes that can be read anywhere."""

    @property
    def length(self) -> int:
        """How many they are."""
        ...

    def read(self, count: int, at: int) -> bytes:
        """Reads bytes at a position: fewer where they end, none outside of them."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """A part of an open file that is an archive of its own; the file's position is not used."""

    descriptor: int
    begin: int
    length: int

    @classmethod
    def whole(cls, descriptor: int) -> Window:
        """Returns all of a file."""
        return cls(descriptor, 0, os.fstat(descriptor).st_size)

    def read(self, count: int, at: int) -> bytes:
        """Reads bytes at a position in the archive: fewer where it ends, none outside of it."""
        if not 0 <= at <= self.length:
            return b""
        return os.pread(self.descriptor, min(count, self.length - at), self.begin + at)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an archive: where its bytes lie in the file, and how many they are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Archive:
    """The records of an archive by their names, without the folder that all of them share.

    `size` is the length of the archive without its comment.
    """

    records: dict[str, Record]
    size: int
    comment: bytes


def read_archive(window: Window) -> Archive:
    """Reads the directory of an archive and checks each entry.

    Raises:
        CheckpointCorrupt: if this is no whole archive as `torch.save` writes them.
        CheckpointUnsafe: if records are compressed or overlap.
        OSError: if the file cannot be read.
    """
    head = window.read(4, 0)
    if head != b"PK\x03\x04":
        raise CheckpointCorrupt(_no_archive(head, window.length))
    end_at, comment = _find_end(window)
    directory_at, directory_size, count = _locate_directory(window, end_at)
    if count * _ENTRY.size > directory_size:
        raise CheckpointCorrupt("the archive's directory is shorter than it says")
    directory = window.read(directory_size, directory_at)
    if len(directory) != directory_size:
        raise CheckpointCorrupt("the archive's directory is cut off")
    entries = _entries(directory, count)
    records = _place(window, entries, directory_at)
    return Archive(_without_folder(records), end_at + _END.size, comment)


def read_comment(source: Readable) -> bytes:
    """Returns the comment of an archive, and looks at nothing else of it."""
    try:
        return _find_end(source)[1]
    except CheckpointCorrupt:
        head = source.read(4, 0)
        if head != b"PK\x03\x04":
            raise CheckpointCorrupt(_no_archive(head, source.length)) from None
        raise


def _no_archive(head: bytes, length: int) -> str:
    if length == 0:
        return "it is empty"
    if head[:1] == b"\x80":
        return (
            "it is a bare pickle, the form that torch.save had before version 1.6; load it with "
            "the program that wrote it and save it again with torch.save"
        )
    return "it is no archive of torch.save: it does not begin like one"


def _find_end(window: Readable) -> tuple[int, bytes]:
    """Finds the record at an archive's end: the last one of its kind, as torch's reader does."""
    tail = window.read(_END.size + 0xFFFF, max(0, window.length - _END.size - 0xFFFF))
    at = tail.rfind(b"PK\x05\x06", 0, max(0, len(tail) - _END.size + 4))
    if at < 0:
        raise CheckpointCorrupt("it is cut off: the end of the archive is missing")
    comment = tail[at + _END.size :]
    (comment_size,) = struct.unpack_from("<H", tail, at + _END.size - 2)
    if len(comment) != comment_size:
        raise CheckpointCorrupt(
            f"it is cut off, or something was appended: {comment_size} bytes should follow the "
            f"archive and {len(comment)} do"
        )
    return window.length - len(tail) + at, comment


def _locate_directory(window: Window, end_at: int) -> tuple[int, int, int]:
    """Returns position, size and number of entries of the directory."""
    _, disk, start_disk, here, count, size, at, _ = _END.unpack(_read(window, end_at, _END))
    closes_at = end_at
    locator_at = end_at - _LOCATOR64.size
    if locator_at >= 0:
        mark, _, end64_at, _ = _LOCATOR64.unpack(_read(window, locator_at, _LOCATOR64))
        if mark == b"PK\x06\x07":
            if end64_at != locator_at - _END64.size:
                raise CheckpointCorrupt("the archive's end is not where it should be")
            fields = _END64.unpack(_read(window, end64_at, _END64))
            if fields[0] != b"PK\x06\x06":
                raise CheckpointCorrupt("the archive's end is damaged")
            disk, start_disk, here, count, size, at = fields[4:]
            closes_at = end64_at
    if disk or start_disk or here != count or at + size != closes_at:
        raise CheckpointCorrupt("the archive's directory is not where it should be")
    return at, size, count


def _read(window: Window, at: int, shape: struct.Struct) -> bytes:
    data = window.read(shape.size, at)
    if len(data) != shape.size:
        raise CheckpointCorrupt("the archive is cut off")
    return data


def _entries(directory: bytes, count: int) -> list[tuple[str, int, int]]:
    """Returns name, position of the local header, and size of each entry."""
    found: list[tuple[str, int, int]] = []
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(directory):
            raise CheckpointCorrupt("the archive's directory is shorter than it says")
        values = _ENTRY.unpack_from(directory, at)
        mark, flags, method = values[0], values[3], values[4]
        packed, size, name_size, extra_size, remark_size = values[8:13]
        attributes, local_at = values[15], values[16]
        if mark != b"PK\x01\x02":
            raise CheckpointCorrupt("the archive's directory is damaged")
        at += _ENTRY.size
        name = directory[at : at + name_size].decode("utf-8", "replace")
        extra = directory[at + name_size : at + name_size + extra_size]
        at += name_size + extra_size + remark_size
        size, packed, local_at = _wide(extra, size, packed, local_at)
        if method != 0 or packed != size:
            raise CheckpointUnsafe(
                f"its record {name[:200]!r} is compressed, {packed:,} bytes standing for {size:,}: "
                "torch.save does not write such a record, and reading it may take any amount of "
                "memory. Load it where it was written and save it again"
            )
        if attributes & _IS_FOLDER or name.endswith("/"):
            raise CheckpointUnsafe(
                f"its record {name[:200]!r} is marked as a folder: torch would not read it, and "
                "hand out whatever its memory held"
            )
        if flags & 1:
            raise CheckpointCorrupt(f"its record {name[:200]!r} is encrypted")
        found.append((name, local_at, size))
    if at != len(directory):
        raise CheckpointCorrupt("the archive's directory is longer than it says")
    return found


def _wide(extra: bytes, size: int, packed: int, local_at: int) -> tuple[int, int, int]:
    """Takes the numbers that do not fit into 32 bits from an entry's extra field."""
    values = [size, packed, local_at]
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            wide = [index for index, value in enumerate(values) if value == _FULL]
            if length < 8 * len(wide) or at + length > len(extra):
                raise CheckpointCorrupt("the archive's directory is damaged")
            for position, index in enumerate(wide):
                (values[index],) = struct.unpack_from("<Q", extra, at + 8 * position)
            break
        at += length
    return values[0], values[1], values[2]


def _place(window: Window, entries: list[tuple[str, int, int]], directory_at: int) -> list[Record]:
    """Finds where the bytes of each entry begin, and makes sure that no two entries share any."""
    records: list[Record] = []
    free_from = 0
    for name, local_at, size in sorted(entries, key=lambda entry: entry[1]):
        if local_at < free_from:
            raise CheckpointUnsafe(
                f"its record {name[:99]!r} overlaps another: no program writes that by accident"
            )
        encoded = name.encode("utf-8")
        head = window.read(_LOCAL.size + len(encoded), local_at)
        if len(head) < _LOCAL.size:
            raise CheckpointCorrupt("the archive is cut off")
        header = _LOCAL.unpack_from(head)
        method, name_size, extra_size = header[3], header[9], header[10]
        same = name_size == len(encoded) and head[_LOCAL.size :] == encoded
        if header[0] != b"PK\x03\x04" or method != 0 or not same:
            raise CheckpointCorrupt(
                f"its record {name[:200]!r} does not fit the archive's directory"
            )
        begin = local_at + _LOCAL.size + name_size + extra_size
        free_from = begin + size
        if free_from > directory_at:
            raise CheckpointCorrupt(
                f"its record {name[:200]!r} reaches beyond the archive's records"
            )
        records.append(Record(name, begin, size))
    return records


def _without_folder(records: list[Record]) -> dict[str, Record]:
    folders = {record.name.partition("/")[0] for record in records}
    if len(folders) != 1:
        raise CheckpointCorrupt("it is a zip archive, but not one of torch.save")
    found: dict[str, Record] = {}
    folded: set[str] = set()
    for record in records:
        name = record.name.partition("/")[2]
        # torch's reader does not tell upper and lower case apart.
        if name.lower() in folded:
            raise CheckpointUnsafe(f"its archive holds two records of the name {name[:200]!r}")
        folded.add(name.lower())
        found[name] = record
    return found
