"""Reads a checkpoint's pickle without doing what it says, and tells whether it may be loaded.

`torch.load(weights_only=True)` runs no code of the pickle's choice, but it believes its numbers:
how many bytes a tensor has, how large a `bytearray` is to be, how often a list holds another. The
scan executes the same instructions on symbols, checks each number against the archive, and collects
the classes that the pickle asks for, so that all of them can be named at once.
"""

from __future__ import annotations

import pickle
import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from crosstrain.engine.guards import is_exact_dict, is_exact_list, is_exact_tuple

from .archive import Record
from .errors import CheckpointCorrupt, CheckpointError, CheckpointUnsafe
from .pickle_calls import (
    CALLS,
    Made,
    Name,
    Stored,
    add_attributes,
    has_own_hash,
    is_known,
    storage_item_size,
)
from .pickle_measure import check_walkable

__all__ = ["PickleScan"]

_MAX_ODD_KEYS: Final = 10_000
_BASE_OPERATIONS: Final = 1_000_000
_UINT8: Final = struct.Struct("B")
_UINT32: Final = struct.Struct("<I")
_STOP: Final = pickle.STOP[0]


def _by_code(
    *operations: tuple[bytes, Callable[[Any], Any]],
) -> Mapping[int, Callable[[Any], Any]]:
    return {code[0]: operation for code, operation in operations}


def _skip(shape: struct.Struct) -> Callable[[PickleScan], Any]:
    return lambda scan: scan.unpack(shape)


def _push(value: Callable[[], Any]) -> Callable[[PickleScan], None]:
    return lambda scan: scan.stack.append(value())


def _number(shape: struct.Struct) -> Callable[[PickleScan], None]:
    return lambda scan: scan.stack.append(scan.unpack(shape))


def _get(shape: struct.Struct) -> Callable[[PickleScan], None]:
    return lambda scan: scan.stack.append(scan.memo[scan.unpack(shape)])


def _remember(shape: struct.Struct) -> Callable[[PickleScan], None]:
    return lambda scan: scan.put(scan.unpack(shape))


def _tuple_of(count: int) -> Callable[[PickleScan], None]:
    return lambda scan: scan.short_tuple(count)


class PickleScan:
    """Executes a pickle of `torch.save` on symbols.

    Args:
        data: the pickle.
        records: the archive's records by name; tensors must lie in them.
        file_size: the size of the whole file; what a load may cost is measured by it.
        allowed: names of globals that the user has allowed by `torch.serialization`.
    """

    def __init__(
        self, data: bytes, records: Mapping[str, Record], file_size: int, allowed: frozenset[str]
    ) -> None:
        self._data = data
        self._records = records
        self._allowed = allowed
        self._at = 0
        self.stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._odd_keys = 0
        self._max_operations = _BASE_OPERATIONS + file_size // 32
        self._max_bytes = 4 * file_size + (64 << 20)
        self._spent = 0
        self.refused: dict[str, None] = {}
        self.names: set[str] = set()

    def run(self) -> None:
        """Scans the pickle; afterwards `refused` holds the globals that are not allowed, in order.

        Raises:
            CheckpointCorrupt: if it is no pickle, or refers to what is not there.
            CheckpointUnsafe: if it would cost more than the file's size explains, or uses an
                instruction that is not needed for tensors and plain types.
        """
        try:
            check_walkable(self._execute(), self._max_operations)
        except CheckpointError:
            # A class that is not allowed explains whatever else is odd.
            if not self.refused:
                raise
        except (IndexError, KeyError, ValueError, TypeError) as error:
            if not self.refused:
                raise CheckpointCorrupt(
                    f"its pickle is damaged near byte {self._at} ({type(error).__name__}: {error})"
                ) from None

    def _execute(self) -> Any:
        operations = self._OPERATIONS
        for _ in range(self._max_operations):
            code = self._data[self._at]
            self._at += 1
            if code == _STOP:
                return self.stack.pop()
            operation = operations.get(code)
            if operation is None:
                raise CheckpointUnsafe(_unknown_instruction(code))
            operation(self)
        raise CheckpointUnsafe(
            f"its pickle has more than {self._max_operations:,} instructions, far more than a file "
            "of this size needs"
        )

    # The instructions, in the words of the module pickletools.

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise CheckpointCorrupt("its pickle is cut off")
        self._at += count
        return taken

    def unpack(self, shape: struct.Struct) -> Any:
        """Reads a number."""
        return shape.unpack(self._take(shape.size))[0]

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at, self._at + 1000)
        line = self._data[self._at : end].decode("utf-8")
        self._at = end + 1
        return line

    def _global(self) -> None:
        module, name = self._line(), self._line()
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        known = is_known(module, name)
        self.names.add(path)
        if not known and path not in self._allowed:
            self.refused[path] = None
        self.stack.append(Name(module, name, known))

    def _persistent(self) -> None:
        identity = self.stack.pop()
        if not is_exact_tuple(identity) or len(identity) != 5 or identity[0] != "storage":
            raise CheckpointCorrupt("its pickle refers to something that is no tensor's storage")
        _, kind, key, _, numel = identity
        item_size = storage_item_size(kind)
        if type(key) is not str or not re.fullmatch(r"[0-9]{1,9}", key):
            raise CheckpointCorrupt(f"its pickle refers to a storage of the odd name {key!r}")
        record = self._records.get(f"data/{key}")
        if record is None:
            raise CheckpointCorrupt(f"the data of its storage {key} is missing from the archive")
        if item_size is None or type(numel) is not int or record.size != numel * item_size:
            raise CheckpointCorrupt(
                f"its storage {key} should be {numel!r} elements of {kind!r} and the archive holds "
                f"{record.size:,} bytes for it"
            )
        self.stack.append(Stored(record.size, item_size))

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if not is_exact_tuple(arguments) or type(function) is not Name:
            raise CheckpointCorrupt("its pickle calls something that is no function")
        if not function.known:
            self.stack.append(Made("foreign", (arguments,)))
            return
        self._spend(sum(_size_of(argument) for argument in arguments))
        made = CALLS[function.path](*arguments)
        if type(made) is Made and made.kind == "tensor":
            self._spend(made.size)
        elif type(made) is Made and made.kind == "set":
            self._count_odd(made.size)
        self.stack.append(made)

    def _spend(self, size: int) -> None:
        """Counts the memory that a call takes: a pickle may make it any number of times."""
        self._spent += size
        if self._spent > self._max_bytes:
            raise CheckpointUnsafe(
                f"what its pickle makes takes over {self._max_bytes:,} bytes, far more than "
                "the file"
            )

    def _new_object(self) -> None:
        arguments = self.stack.pop()
        cls = self.stack.pop()
        if type(cls) is not Name:
            raise CheckpointCorrupt("its pickle makes an instance of something that is no class")
        # No plain type is made by this instruction; whoever uses it asks for a class.
        if cls.path not in self._allowed:
            self.refused[cls.path] = None
        self.stack.append(Made("foreign", (arguments,)))

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is not Made:
            raise CheckpointCorrupt("its pickle sets the state of something that has none")
        if is_exact_tuple(state):
            self._spend(sum(_size_of(part) for part in state))
        add_attributes(target, state)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Made and target.kind == "foreign":
            target.parts = (*target.parts, items)
        elif is_exact_list(target):
            target.extend(items)
        else:
            raise CheckpointCorrupt("its pickle appends to something that is no list")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_marked_items(self) -> None:
        self._set_items(self._pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Made and target.kind == "foreign":
            target.parts = (*target.parts, items)
            return
        if type(target) is Made and target.items is not None:
            target = target.items
        if type(target) is not dict or len(items) % 2:
            raise CheckpointCorrupt("its pickle sets an entry of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                self._check_key(key)
            target[key] = value

    def _check_key(self, key: Any) -> None:
        if has_own_hash(key):
            return
        if type(key) is Made:
            raise CheckpointUnsafe(f"its pickle uses a {key.kind} as a dictionary's key")
        self._count_odd(1)

    def _count_odd(self, count: int) -> None:
        self._odd_keys += count
        if self._odd_keys > _MAX_ODD_KEYS:
            raise CheckpointUnsafe(
                "its pickle has too many keys, or items of sets, that are not text or integers"
            )

    def _mark(self) -> None:
        self._marks.append(self.stack)
        self.stack = []

    def _pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self._marks.pop()
        return items

    def _tuple(self) -> None:
        items = tuple(self._pop_mark())
        self.stack.append(items)

    def short_tuple(self, count: int) -> None:
        """Makes a tuple of the last values."""
        if len(self.stack) < count:
            raise CheckpointCorrupt("its pickle is damaged: a tuple lacks items")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def put(self, index: int) -> None:
        """Remembers the last value."""
        self.memo[index] = self.stack[-1]

    def _long(self) -> None:
        self.stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def _text(self) -> None:
        size = self.unpack(_UINT32)
        self.stack.append(str(self._take(size), "utf-8", "surrogatepass"))

    def _old_text(self) -> None:
        self.stack.append(self._take(self._take(1)[0]).decode("utf-8"))

    _OPERATIONS: ClassVar[Mapping[int, Callable[[Any], Any]]] = _by_code(
        (pickle.PROTO, _skip(_UINT8)),
        (pickle.NONE, _push(lambda: None)),
        (pickle.NEWTRUE, _push(lambda: True)),
        (pickle.NEWFALSE, _push(lambda: False)),
        (pickle.EMPTY_TUPLE, _push(tuple)),
        (pickle.EMPTY_LIST, _push(list)),
        (pickle.EMPTY_DICT, _push(dict)),
        (pickle.BININT, _number(struct.Struct("<i"))),
        (pickle.BININT1, _number(_UINT8)),
        (pickle.BININT2, _number(struct.Struct("<H"))),
        (pickle.BINFLOAT, _number(struct.Struct(">d"))),
        (pickle.BINGET, _get(_UINT8)),
        (pickle.LONG_BINGET, _get(_UINT32)),
        (pickle.BINPUT, _remember(_UINT8)),
        (pickle.LONG_BINPUT, _remember(_UINT32)),
        (pickle.TUPLE1, _tuple_of(1)),
        (pickle.TUPLE2, _tuple_of(2)),
        (pickle.TUPLE3, _tuple_of(3)),
        (pickle.TUPLE, _tuple),
        (pickle.MARK, _mark),
        (pickle.LONG1, _long),
        (pickle.BINUNICODE, _text),
        (pickle.SHORT_BINSTRING, _old_text),
        (pickle.GLOBAL, _global),
        (pickle.BINPERSID, _persistent),
        (pickle.REDUCE, _reduce),
        (pickle.NEWOBJ, _new_object),
        (pickle.BUILD, _build),
        (pickle.APPEND, _append),
        (pickle.APPENDS, _appends),
        (pickle.SETITEM, _set_item),
        (pickle.SETITEMS, _set_marked_items),
    )


def _size_of(argument: Any) -> int:
    """Returns about how many bytes a copy of an argument takes."""
    if type(argument) in (str, bytes):
        return len(argument)
    if is_exact_list(argument) or is_exact_dict(argument):
        return 64 * len(argument)
    return 0


def _unknown_instruction(code: int) -> str:
    if bytes([code]) in (
        pickle.FRAME,
        pickle.STACK_GLOBAL,
        pickle.MEMOIZE,
        pickle.SHORT_BINUNICODE,
    ):
        return (
            "its pickle has protocol 4 or newer; torch.save writes 2: leave pickle_protocol alone"
        )
    return f"its pickle holds the instruction {code:#04x}, which tensors and plain types never need"
