"""What an object of another package holds, where Python's own protocols give its contents.

A table of pandas, an Arrow array, a dictionary that another process manages, mapped memory, a file
that is read on, a date: such an object has no `state_dict`, and no attributes that say what it is
worth. What it does not give by a protocol (a connection to a database, a hash under way) stays
unknown.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final

import numpy

from crosstrain.engine.digest import attributes_of
from crosstrain.engine.guards import is_others

# Larger ones are looked at in a few places.
_ROWS: Final = 4096
_BYTES: Final = 16 << 20
_TABLES: Final = ("__array__", "__dataframe__", "__arrow_c_array__", "__arrow_c_stream__")


def holds_data(value: Any) -> bool:
    """Tells whether an object gives its contents by a protocol; asks its class, and not it."""
    kind: Any = type(value)
    if isinstance(value, type) or callable(value):
        return False
    if any(hasattr(kind, name) for name in _TABLES):
        return hasattr(kind, "__len__")
    if not is_others(kind) and attributes_of(value):
        return False
    return (
        isinstance(value, io.IOBase) or _is_collection(kind) or _is_memory(value) or _is_value(kind)
    )


def data_of(value: Any) -> Any:
    """Returns what is compared of an object for which `holds_data` is true.

    The object may raise anything, such as a closed file, or a connection that has ended.
    """
    kind: Any = type(value)
    if isinstance(value, io.IOBase):
        if isinstance(value, (io.BytesIO, io.StringIO)):
            return value.tell(), value.getvalue()
        # What is written to may be a log; what is read from goes on where it is.
        return value.tell() if value.readable() and not value.writable() else None
    if any(hasattr(kind, name) for name in _TABLES):
        return _rows_of(value)
    if _is_memory(value):
        return _some(memoryview(value).cast("B"))
    if _is_collection(kind):
        keys = list(value.keys()) if hasattr(kind, "keys") else range(len(value))
        return len(keys), [(key, value[key]) for key in keys[:: max(1, len(keys) // _ROWS)]]
    return hash(value)


def _rows_of(table: Any) -> Any:
    """Returns a table's length, its columns and its rows, or some of them, as plain values."""
    rows = len(table)
    columns = [str(name) for name in getattr(table, "columns", ())]
    size = getattr(table, "nbytes", 0)
    if isinstance(size, int) and size > _BYTES:
        # It may lie in a file, or be computed.
        return rows, columns
    some = table[:: rows // _ROWS] if rows > 2 * _ROWS else table
    found = numpy.asarray(some)
    return rows, columns, found.tolist() if found.dtype.hasobject else found


def _some(memory: memoryview) -> Any:
    # Nobody writes into what is only read; it may be a large file.
    step = max(1, len(memory) >> (0 if memory.readonly else 20))
    return len(memory), bytes(memory[::step])


def _is_collection(kind: Any) -> bool:
    """Tells whether a class is a mapping or a list by its methods, as proxies are."""
    names = ("keys",) if issubclass(kind, Mapping) or hasattr(kind, "keys") else ("append",)
    return all(hasattr(kind, name) for name in (*names, "__getitem__", "__len__"))


def _is_memory(value: Any) -> bool:
    try:
        memoryview(value).release()
    except (TypeError, BufferError, ValueError):
        return False
    return True


def _is_value(kind: Any) -> bool:
    """Tells whether objects of a class are compared, and hashed, by what they are worth."""
    return kind.__eq__ is not object.__eq__ and kind.__hash__ not in (None, object.__hash__)
