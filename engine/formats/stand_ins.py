"""Tells what a checkpoint's pickle would make, by making it of stand-ins that do nothing.

`torch.load(weights_only=True)` runs no code of the pickle's choice, but it believes its numbers:
how many bytes a tensor has, how large a `bytearray` is to be, how often a list holds another. Here
Python's own unpickler runs the same instructions beforehand, in the way that its documentation
calls "Restricting Globals": what it finds by name and what it makes are stand-ins that check each
number against the archive, and add up what it would cost. The same check is made of every file that
is written, before it gets its name: what is saved can be loaded.

One file: each name that a pickle may use has its stand-in here, each stand-in counts for the same
check, and what is not in the table at the end is refused. Apart from each other they could not be
read as what they are, one closed list.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch

from crosstrain.engine.storage.archive import Record
from crosstrain.engine.storage.errors import CheckpointCorrupt, CheckpointError, CheckpointUnsafe

#: How deep tuples may be nested in a dictionary's key, and how many items one may have in all.
MAX_KEY_DEPTH: Final = 8
MAX_KEY_ITEMS: Final = 10_000
_MAX_DEPTH: Final = 200
_MAX_DIMENSIONS: Final = 64
_MAX_PICKLE: Final = 2 << 30
# Keys of one hash are compared with each other, each with each.
_MAX_SAME_HASH: Final = 1000
_NUMBER: Final = 1 << 63


class PickleCheck:
    """What was found in a pickle.

    Args:
        records: the archive's records by name; tensors must lie in them.
        file_size: the size of the whole file; what a load may cost is measured by it.
        allowed: names of globals that the user has allowed by `torch.serialization`.
    """

    def __init__(
        self, records: Mapping[str, Record], file_size: int, allowed: frozenset[str]
    ) -> None:
        #: The globals that are not allowed, in the order in which the pickle asks for them.
        self.refused: dict[str, None] = {}
        #: All globals that it asks for.
        self.names: set[str] = set()
        self.records = records
        self.storages: dict[str, _Storage] = {}
        self.max_steps = 1_000_000 + 4 * file_size
        self._allowed = allowed
        self._max_bytes = (8 << 20) + 32 * file_size
        self._spent = 0

    def spend(self, nbytes: int) -> None:
        """Counts memory that the pickle takes: few bytes of it may take it any number of times."""
        self._spent += nbytes
        if self._spent > self._max_bytes:
            raise CheckpointUnsafe(
                f"what its pickle makes takes over {self._max_bytes:,} bytes, far more than the "
                "file"
            )

    def find(self, module: str, name: str) -> Any:
        """Returns the stand-in of a global, and remembers whether it is refused."""
        if (module, name) == _OUR_TABLE:
            return _Table.of(self)
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        self.names.add(path)
        if module == "torch" and (name in _STORAGES or _dtype(name) is not None):
            return _Named(self, path)
        if path in _CALLS or path in ("torch.storage.UntypedStorage", "numpy.ndarray"):
            return _Named(self, path)
        if path not in self._allowed:
            self.refused[path] = None
        return _Foreign

    def check_key(self, key: Any, hashes: Counter[int]) -> None:
        """Makes sure that a key of a dictionary, or an item of a set, is soon hashed and compared.

        Beside it `hashes` counts how many keys have which hash.
        """
        if type(key) is str:
            return
        left, todo = MAX_KEY_ITEMS, [(key, 0)]
        while todo:
            item, depth = todo.pop()
            if type(item) is tuple:
                left -= len(item)
                if depth == MAX_KEY_DEPTH or left < 0:
                    raise CheckpointUnsafe(
                        f"its pickle has a key of tuples that are nested over {MAX_KEY_DEPTH} deep "
                        f"or have over {MAX_KEY_ITEMS:,} items"
                    )
                todo.extend((part, depth + 1) for part in item)
            elif type(item) not in _KEYS:
                raise CheckpointUnsafe(f"its pickle uses a {_kind(item)} as a dictionary's key")
        self.spend(16 * (1 + MAX_KEY_ITEMS - left))
        if type(key) is not bytes:
            # What text and bytes have for a hash differs from process to process.
            digest = hash(key)
            hashes[digest] += 1
            if hashes[digest] > _MAX_SAME_HASH:
                raise CheckpointUnsafe("its pickle has too many keys of one hash")


def check_pickle(
    data: bytes, records: Mapping[str, Record], file_size: int, allowed: frozenset[str]
) -> PickleCheck:
    """Runs a pickle of `torch.save` on stand-ins; it may be loaded, if nothing is refused.

    The arguments are those of `PickleCheck`.

    Raises:
        CheckpointCorrupt: if it is no pickle, or refers to what is not there.
        CheckpointUnsafe: if it would cost more than the file's size explains, or uses an
            instruction that is not needed for tensors and plain types.
    """
    check = PickleCheck(records, file_size, allowed)
    try:
        made = _Unpickler(io.BytesIO(_translated(data, check)), check).load()
        _check_walkable(made, check.max_steps)
    except CheckpointError:
        # A class that is not allowed explains whatever else is odd.
        if not check.refused:
            raise
    except (pickle.UnpicklingError, EOFError, IndexError, AttributeError) as error:
        if not check.refused:
            raise CheckpointCorrupt(f"its pickle is damaged ({error})") from None
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        if not check.refused:
            raise CheckpointCorrupt(f"its pickle is damaged ({type(error).__name__})") from None
    return check


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, check: PickleCheck) -> None:
        super().__init__(file, encoding="utf-8")
        self._check = check

    def find_class(self, module: str, name: str, /) -> Any:
        """Returns a stand-in for a class or function."""
        return self._check.find(module, name)

    def persistent_load(self, pid: Any, /) -> Any:
        """Returns a stand-in for a tensor's storage."""
        return _storage(self._check, pid)


# The instructions of protocol 2, by their names in the module pickle, all but those with a length.
_SHORT: Final = rb"""
    [N\x88\x89)\](tsuaeQRb\x81\x85\x86\x87]  # NONE to TUPLE3: without an argument
  | [Kqh\x80].                               # BININT1, BINPUT, BINGET, PROTO
  | M..                                      # BININT2
  | [Jj]....                                 # BININT, LONG_BINGET
  | G.{8}                                    # BINFLOAT
"""
# Each of these makes something that takes about 100 bytes: EMPTY_LIST, MARK, TUPLE1 to TUPLE3.
_NO_CONTAINERS: Final = bytes(set(range(256)) - set(b"](\x85\x86\x87"))
_OUR_TABLE: Final = ("crosstrain", "{}")
_MAKE_TABLE: Final = b"ccrosstrain\n{}\n)R"


def _translated(data: bytes, check: PickleCheck) -> bytes:
    """Checks a pickle's instructions, and returns it with a stand-in for each dictionary.

    The unpickler would hash a dictionary's keys before anybody could look at them, and would take
    memory for the largest index in its memo that is named.
    """
    if len(data) > _MAX_PICKLE:
        raise CheckpointUnsafe(f"its pickle has {len(data):,} bytes; {_MAX_PICKLE:,} is the most")
    most = len(data) >> 16
    bound = (
        b"r..[\\x00-\\x%02x]\\x00" % most if most < 256 else b"r...[\\x00-\\x%02x]" % (most >> 8)
    )
    short = re.compile(b"(?:%s|%s){1,1000}+" % (_SHORT, bound), re.DOTALL | re.VERBOSE)
    parts: list[bytes] = []
    begin = at = 0
    while True:
        run = short.match(data, at)
        if run is not None:
            at = run.end()
            check.spend(100 * len(run[0].translate(None, _NO_CONTAINERS)))
        code = data[at : at + 1]
        if code == pickle.STOP:
            return b"".join([*parts, data[begin : at + 1]])
        if code == pickle.BINUNICODE:
            at += 5 + int.from_bytes(data[at + 1 : at + 5], "little")
        elif code in (pickle.SHORT_BINSTRING, pickle.LONG1):
            at += 2 + data[at + 1]
        elif code == pickle.EMPTY_DICT:
            parts += [data[begin:at], _MAKE_TABLE]
            at += 1
            begin = at
        elif code == pickle.GLOBAL:
            middle = data.index(b"\n", at, at + 1000)
            at = data.index(b"\n", middle + 1, middle + 1000) + 1
        elif run is None:
            raise _odd_instruction(code)


def _odd_instruction(code: bytes) -> CheckpointError:
    if not code or code == pickle.LONG_BINPUT:
        return CheckpointCorrupt("its pickle is cut off, or damaged")
    if code in (pickle.FRAME, pickle.STACK_GLOBAL, pickle.MEMOIZE, pickle.SHORT_BINUNICODE):
        return CheckpointUnsafe(
            "its pickle has protocol 4 or newer; torch.save writes 2: leave pickle_protocol alone"
        )
    return CheckpointUnsafe(
        f"its pickle holds the instruction {code[0]:#04x}, which tensors and plain types never need"
    )


class _StandIn:
    """Stands for an object: what kind it is, how many bytes one element has, and what it holds."""

    __slots__ = ("held", "kind", "size")

    def __init__(self, kind: str, size: int = 0) -> None:
        self.kind = kind
        self.size = size
        self.held: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        raise CheckpointCorrupt(f"its pickle sets a state that no {self.kind} has")


class _Table(_StandIn):
    """Stands for a dictionary, an OrderedDict, or a Counter."""

    __slots__ = ("_check", "_hashes")

    def __init__(self, check: PickleCheck, kind: str = "dictionary") -> None:
        super().__init__(kind)
        self._check = check
        self._hashes: Counter[int] | None = None

    @classmethod
    def of(cls, check: PickleCheck) -> Callable[[], _Table]:
        check.spend(64)
        return lambda: cls(check)

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str:
            if self._hashes is None:
                self._hashes = Counter()
            self._check.check_key(key, self._hashes)
        self.held += (key, value)

    def __setstate__(self, state: Any) -> None:
        # The attributes of an OrderedDict: `_metadata`, the versions of a module's state.
        attributes = state.held[::2] if type(state) is _Table else [None]
        if self.kind != "OrderedDict" or any(
            type(name) is not str or name.startswith("__") for name in attributes
        ):
            raise CheckpointCorrupt(f"its pickle sets a state that no {self.kind} has")
        self.held.append(state)


class _NumpyDtype(_StandIn):
    """Stands for a NumPy dtype; `size` is that of one element."""

    def __setstate__(self, state: Any) -> None:
        kinds = (int, str, type(None), type(None), type(None), int, int, int)
        good = type(state) is tuple and tuple(map(type, state)) == kinds
        if not good or state[0] != 3 or state[1] not in "<>|=" or state[5:] != (-1, -1, 0):
            super().__setstate__(state)


class _NumpyArray(_StandIn):
    """Stands for a NumPy array of numbers."""

    __slots__ = ("_check",)

    def __init__(self, check: PickleCheck) -> None:
        super().__init__("numpy array")
        self._check = check

    def __setstate__(self, state: Any) -> None:
        kinds = (int, tuple, _NumpyDtype, bool, bytes)
        good = type(state) is tuple and tuple(map(type, state)) == kinds
        if not good or state[0] != 1 or not _is_shape(state[1], 32):
            super().__setstate__(state)
        _, shape, dtype, _, data = state
        if len(data) != math.prod(shape) * dtype.size:
            super().__setstate__(state)
        self._check.spend(len(data))


class _Foreign(_StandIn):
    """Stands for a class or function that no plain type needs, and for what it would make."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__("foreign object")
        self.held += arguments

    def __setstate__(self, state: Any) -> None:
        self.held.append(state)

    def append(self, item: Any) -> None:
        """Takes what an object like a list would."""
        self.held.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held += (key, value)


class _Named(_StandIn):
    """Stands for a function, class or dtype that tensors and plain types need."""

    __slots__ = ("_check",)

    def __init__(self, check: PickleCheck, path: str) -> None:
        super().__init__(path)
        self._check = check

    def __call__(self, *arguments: Any) -> Any:
        function = _CALLS.get(self.kind)
        if function is None:
            raise CheckpointCorrupt(f"its pickle calls {self.kind}, which is no function")
        self._check.spend(64 + sum(map(_length, arguments)))
        return function(self._check, *arguments)


class _Storage(_StandIn):
    """Stands for a tensor's data; `size` is that of one element."""

    __slots__ = ("nbytes", "seen")

    def __init__(self, nbytes: int, size: int) -> None:
        super().__init__("storage", size)
        self.nbytes = nbytes
        #: Of the largest tensor that looks at it: an expanded one is larger than its data.
        self.seen = nbytes


_STORAGES: Final = MappingProxyType(
    {
        "ByteStorage": 1,
        "CharStorage": 1,
        "BoolStorage": 1,
        "ShortStorage": 2,
        "HalfStorage": 2,
        "BFloat16Storage": 2,
        "IntStorage": 4,
        "FloatStorage": 4,
        "LongStorage": 8,
        "DoubleStorage": 8,
        "ComplexFloatStorage": 8,
        "ComplexDoubleStorage": 16,
    }
)


def _storage(check: PickleCheck, identity: Any) -> _Storage:
    if type(identity) is not tuple or len(identity) != 5 or not _is(identity[0], str, "storage"):
        raise CheckpointCorrupt("its pickle refers to something that is no tensor's storage")
    _, kind, key, _, numel = identity
    if type(key) is not str or not re.fullmatch(r"[0-9]{1,9}", key):
        raise CheckpointCorrupt("its pickle refers to a storage of an odd name")
    record = check.records.get(f"data/{key}")
    if record is None:
        raise CheckpointCorrupt(f"the data of its storage {key} is missing from the archive")
    module, _, name = kind.kind.rpartition(".") if type(kind) is _Named else ("", "", "")
    size = _STORAGES.get(name, 0) if module == "torch" else int(name == "UntypedStorage")
    if not size or type(numel) is not int or record.size != numel * size:
        told = f"{numel:,}" if type(numel) is int and abs(numel) < _NUMBER else "no number of"
        raise CheckpointCorrupt(
            f"its storage {key} should be {told} elements of {_kind(kind)[:100]} and the archive "
            f"holds {record.size:,} bytes for it"
        )
    known = check.storages.setdefault(key, _Storage(record.size, size))
    if known.size != size:
        raise CheckpointCorrupt(f"its pickle refers to its storage {key} as of two types")
    return known


def _tensor(check: PickleCheck, *arguments: Any) -> _StandIn:
    """Stands for `torch._utils._rebuild_tensor_v2`."""
    if len(arguments) not in (6, 7):
        raise _wrong("_rebuild_tensor_v2", arguments)
    return _view(check, arguments[:6], arguments[6:], None)


def _tensor_of_dtype(check: PickleCheck, *arguments: Any) -> _StandIn:
    """Stands for `torch._utils._rebuild_tensor_v3`."""
    dtype = None
    if len(arguments) in (7, 8) and type(arguments[6]) is _Named:
        dtype = _dtype(arguments[6].kind.removeprefix("torch."))
    if dtype is None:
        raise _wrong("_rebuild_tensor_v3", arguments)
    return _view(check, arguments[:6], arguments[7:], dtype)


def _view(
    check: PickleCheck, told: tuple[Any, ...], metadata: tuple[Any, ...], dtype: torch.dtype | None
) -> _StandIn:
    storage, offset, size, stride, requires_grad, hooks = told
    good = (
        type(storage) is _Storage
        and type(offset) is int
        and 0 <= offset < _NUMBER
        and _is_shape(size, _MAX_DIMENSIONS)
        and _is_shape(stride, _MAX_DIMENSIONS)
        and len(size) == len(stride)
        and type(requires_grad) is bool
        and type(hooks) is _Table
        and not hooks.held
        and all(_is_bit_view(entry) for entry in metadata)
    )
    if not good:
        raise _wrong("a function that makes a tensor", told)
    item_size = storage.size if dtype is None else dtype.itemsize
    numel = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if numel and (last + 1) * item_size > storage.nbytes:
        raise CheckpointCorrupt(
            f"a tensor of shape {size} reaches beyond its {storage.nbytes:,} bytes of data"
        )
    # A tensor itself takes half a kilobyte; tensors that look at the same data share it.
    more = max(numel * item_size - storage.seen, 0)
    storage.seen += more
    check.spend(512 + more)
    return _StandIn("tensor")


def _is_shape(value: Any, most: int) -> bool:
    return (
        type(value) is tuple
        and len(value) <= most
        and all(type(item) is int and 0 <= item < _NUMBER for item in value)
    )


def _is_bit_view(value: Any) -> bool:
    return type(value) is _Table and all(
        type(key) is str and key in ("conj", "neg") and type(entry) is bool
        for key, entry in zip(value.held[::2], value.held[1::2], strict=True)
    )


def _parameter(_: PickleCheck, *arguments: Any) -> Any:
    if len(arguments) != 3 or _kind(arguments[0]) != "tensor":
        raise _wrong("_rebuild_parameter", arguments)
    return arguments[0]


def _ordered_dict(check: PickleCheck, *arguments: Any) -> _Table:
    if arguments:
        raise _wrong("OrderedDict", arguments)
    return _Table(check, "OrderedDict")


def _counter(check: PickleCheck, *arguments: Any) -> _Table:
    if len(arguments) > 1 or any(type(argument) is not _Table for argument in arguments):
        raise _wrong("Counter", arguments)
    made = _Table(check, "Counter")
    for argument in arguments:
        made.held += argument.held
    return made


def _set(check: PickleCheck, *arguments: Any) -> _StandIn:
    if len(arguments) > 1 or any(type(one) is not list for one in arguments):
        raise _wrong("set", arguments)
    made = _StandIn("set")
    hashes: Counter[int] = Counter()
    for item in arguments[0] if arguments else ():
        check.check_key(item, hashes)
        made.held.append(item)
    return made


def _size(_: PickleCheck, *arguments: Any) -> _StandIn:
    if len(arguments) != 1 or not _is_shape(arguments[0], MAX_KEY_ITEMS):
        raise _wrong("torch.Size", arguments)
    return _StandIn("Size")


def _device(_: PickleCheck, *arguments: Any) -> _StandIn:
    kinds = [type(argument) for argument in arguments]
    good = kinds in ([str], [str, int]) and len(arguments[0]) < 100
    if not good or not all(0 <= index < _NUMBER for index in arguments[1:]):
        raise _wrong("torch.device", arguments)
    return _StandIn("device")


def _layout(_: PickleCheck, *arguments: Any) -> _StandIn:
    if len(arguments) != 1 or type(arguments[0]) is not str:
        raise _wrong("_get_layout", arguments)
    return _StandIn("layout")


def _complex(_: PickleCheck, *arguments: Any) -> complex:
    if len(arguments) != 2 or any(type(argument) is not float for argument in arguments):
        raise _wrong("complex", arguments)
    return complex(*arguments)


def _encode(_: PickleCheck, *arguments: Any) -> bytes:
    # Bytes, in the pickle protocol that torch.save uses. Other codecs may take any time.
    text, codec = arguments if len(arguments) == 2 else (None, None)
    if type(text) is not str or type(codec) is not str or codec not in ("latin1", "latin-1"):
        raise _wrong("_codecs.encode", arguments)
    return text.encode("latin-1")


def _bytearray(check: PickleCheck, *arguments: Any) -> _StandIn:
    # bytearray(n), with an integer, makes n bytes out of nothing.
    if arguments and not (len(arguments) == 1 and type(arguments[0]) is bytes):
        _encode(check, *arguments)
    return _StandIn("bytearray")


def _numpy_dtype(_: PickleCheck, *arguments: Any) -> _StandIn:
    code = arguments[0] if arguments else None
    found = re.fullmatch(r"[iuf]([1248])|b(1)|c(8|16)", code) if type(code) is str else None
    flags = len(arguments) == 3 and arguments[1] is False and arguments[2] is True
    if found is None or not flags:
        named = f" {code[:20]!r}" if type(code) is str else ""
        raise CheckpointUnsafe(
            f"its pickle needs a NumPy array of type{named}; only numbers can be loaded safely. "
            "Save a tensor instead: torch.from_numpy(array)"
        )
    return _NumpyDtype("numpy dtype", int(next(group for group in found.groups() if group)))


def _numpy_array(check: PickleCheck, *arguments: Any) -> _StandIn:
    cls, shape, code = arguments if len(arguments) == 3 else (None, None, None)
    empty = type(shape) is tuple and len(shape) == 1 and _is(shape[0], int, 0)
    if _kind(cls) != "numpy.ndarray" or not empty or not _is(code, bytes, b"b"):
        raise _wrong("numpy's _reconstruct", arguments)
    return _NumpyArray(check)


def _numpy_scalar(_: PickleCheck, *arguments: Any) -> _StandIn:
    good = tuple(map(type, arguments)) == (_NumpyDtype, bytes)
    if not good or arguments[0].size != len(arguments[1]):
        raise _wrong("numpy's scalar", arguments)
    return _StandIn("numpy scalar")


_CALLS: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.serialization._get_layout": _layout,
        "torch.Size": _size,
        "torch.device": _device,
        "collections.OrderedDict": _ordered_dict,
        "collections.Counter": _counter,
        "builtins.set": _set,
        "builtins.complex": _complex,
        "builtins.bytearray": _bytearray,
        "_codecs.encode": _encode,
        "numpy.dtype": _numpy_dtype,
        "numpy._core.multiarray._reconstruct": _numpy_array,
        "numpy.core.multiarray._reconstruct": _numpy_array,
        "numpy._core.multiarray.scalar": _numpy_scalar,
        "numpy.core.multiarray.scalar": _numpy_scalar,
    }
)
_KEYS: Final = (bool, int, float, complex, str, bytes, type(None), _Named)


def _dtype(name: str) -> torch.dtype | None:
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def _is(value: Any, kind: type, wanted: Any) -> bool:
    """Compares a value from the pickle, whose own comparison might not come to an end."""
    return type(value) is kind and bool(value == wanted)


def _length(argument: Any) -> int:
    """Returns about how many bytes a copy of an argument takes."""
    if type(argument) in (str, bytes):
        return len(argument)
    if type(argument) is list or type(argument) is tuple:
        return 8 * len(argument)
    return 32 * len(argument.held) if type(argument) is _Table else 0


def _kind(value: Any) -> str:
    """Names a value's type, never its contents: they may be of any size."""
    return value.kind if isinstance(value, _StandIn) else type(value).__name__


def _wrong(function: str, arguments: tuple[Any, ...]) -> CheckpointCorrupt:
    shown = ", ".join(_kind(argument)[:40] for argument in arguments[:10])
    return CheckpointCorrupt(f"its pickle calls {function} with wrong arguments ({shown})")


def _check_walkable(root: Any, max_steps: int) -> None:
    """Raises CheckpointUnsafe if a nest holds itself, is too deep, or too long to walk."""
    weights: dict[int, int] = {}
    open_: set[int] = set()
    todo: list[tuple[Any, list[Any] | None]] = []
    if type(root) in _CONTAINERS:
        todo.append((root, None))
    while todo:
        node, inner = todo.pop()
        items = node.held if isinstance(node, _StandIn) else node
        if inner is not None:
            open_.discard(id(node))
            weight = 1 + len(items) + sum(weights[id(child)] for child in inner)
            if weight > max_steps:
                raise CheckpointUnsafe(
                    "its containers share each other so often that to walk them takes more than "
                    f"{max_steps:,} steps"
                )
            weights[id(node)] = weight
        elif id(node) in open_:
            raise CheckpointUnsafe("its pickle holds a container that contains itself")
        elif id(node) not in weights:
            if len(open_) >= _MAX_DEPTH:
                raise CheckpointUnsafe(f"its containers are nested over {_MAX_DEPTH} deep")
            open_.add(id(node))
            inner = [item for item in items if type(item) in _CONTAINERS]
            todo.append((node, inner))
            todo.extend((child, None) for child in inner)


_CONTAINERS: Final = frozenset({list, tuple, _Table, _Foreign, _StandIn})
