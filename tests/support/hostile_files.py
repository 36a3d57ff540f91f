"""Files that no good program writes: bombs, pickles that run code, files of other projects.

Each generator yields (name, bytes). `zipped` builds archives by hand: zipfile would refuse to.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Written by a pickle that is allowed to run code; the tests look for it afterwards.
MARK = "/tmp/crosstrain-fuzz-code-has-run"

Entry = tuple[str, bytes]


def zipped(entries: list[Entry], *, method: int = 0, claim: int | None = None) -> bytes:
    """Builds an archive of torch's form.

    Args:
        entries: names and contents.
        method: 0 stores, 8 deflates.
        claim: the size that each entry claims to have.
    """
    body, directory = b"", b""
    for name, data in entries:
        packed = data
        if method == 8:
            engine = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = engine.compress(data) + engine.flush()
        size = len(data) if claim is None else claim
        path = f"archive/{name}".encode()
        crc = zlib.crc32(data)
        sizes = (crc, len(packed), size, len(path), 0)
        local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, method, 0, 0, *sizes)
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, method, 0, 0, *sizes, 0, 0, 0, 0, len(body)
        )
        directory += path
        body += local + path + packed
    end = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), len(body), 0
    )
    return body + directory + end


def with_pickle(pickled: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """Builds an archive around a pickle, as torch.save lays it out."""
    entries = [("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")]
    entries += [(f"data/{key}", data) for key, data in (storages or {}).items()]
    return zipped(entries)


def text(value: str) -> bytes:
    """Encodes text as a pickle does."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    """Encodes an integer as a pickle does."""
    return pickle.dumps(value, 2)[2:-1]


def call(path: str, *arguments: bytes) -> bytes:
    """Encodes the call of a global, arguments encoded already."""
    module, name = path.rsplit(".", 1)
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def storage(key: str = "0", kind: str = "FloatStorage", numel: int = 4) -> bytes:
    """Encodes a reference to a tensor's storage."""
    inner = text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    return b"(" + inner + integer(numel) + b"tQ"


def tensor(data: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Encodes a tensor over a storage."""

    def shape(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    hooks = call("collections.OrderedDict")
    arguments = (data, integer(offset), shape(size), shape(stride), b"\x89", hooks)
    return call("torch._utils._rebuild_tensor_v2", *arguments)


def _pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def bombs() -> Iterator[Entry]:
    """Yields files that cost far more to load than they are long."""
    zeros = b"\0" * (64 << 20)
    good = _pickled(b"}" + text("a") + tensor(storage(numel=4), 0, (4,), (1,)) + b"s")
    yield "deflated pickle", zipped([("data.pkl", b"\x80\x02]." + zeros)], method=8)
    yield (
        "deflated storage",
        zipped([("data.pkl", good), ("version", b"3\n"), ("data/0", zeros)], method=8),
    )
    yield "claimed size", zipped([("data.pkl", good), ("data/0", b"x" * 16)], claim=1 << 31)
    yield "no data", with_pickle(good)
    for numel in (5, 10**6, 10**12, 2**61, 2**63, -1):
        body = tensor(storage(numel=numel), 0, (4,), (1,))
        yield f"{numel} elements in 16 bytes", with_pickle(_pickled(body), {"0": b"x" * 16})
    views = [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 4), (1, 1)),
        (0, (2**40,), (0,)),
        (-1, (1,), (1,)),
        (0, (4,), (-1,)),
        (2**62, (1,), (1,)),
        (0, (2**40, 2**40), (0, 0)),
        (0, (1,) * 100, (1,) * 100),
        (0, (2,), (2**63,)),
    ]
    for offset, size, stride in views:
        body = tensor(storage(), offset, size, stride)
        name = f"view {offset} {size[:3]} {stride[:3]}"
        yield name, with_pickle(_pickled(body), {"0": b"x" * 16})
    many = b"]" + b"".join(tensor(storage(), 0, (2**26,), (0,)) + b"a" for _ in range(50))
    yield "many expanded views", with_pickle(_pickled(many), {"0": b"x" * 16})
    yield "bytearray", with_pickle(_pickled(call("builtins.bytearray", integer(2**40))))
    for cls in ("torch.FloatTensor", "torch.storage.UntypedStorage", "torch.Tensor", "torch.Size"):
        yield cls, with_pickle(_pickled(call(cls, integer(2**40))))
    yield "laughs", with_pickle(_pickled(_laughs(b"]", b"(h%ch%ce")))
    yield "laughing tuples", with_pickle(_pickled(_laughs(b")", b"0h%ch%c\x86")))
    yield "a list in itself", with_pickle(_pickled(b"]q\0h\0a"))
    yield "a dictionary in itself", with_pickle(_pickled(b"}q\0" + text("a") + b"h\0s"))
    yield "deep lists", with_pickle(_pickled(b"]" * 100_000 + b"a" * 99_999))
    yield "deep tuples", with_pickle(_pickled(b")" + b"\x85" * 500_000))
    yield "many instructions", with_pickle(_pickled(b"]" + b"]0" * 3_000_000))
    yield "many lists", with_pickle(_pickled(b"](" + b"]" * 3_000_000 + b"e"))
    yield "many marks", with_pickle(_pickled(b"(" * 3_000_000))
    keys = b"".join(integer(n * (2**61 - 1)) + b"N" for n in range(1, 30_000))
    yield "colliding keys", with_pickle(_pickled(b"}(" + keys + b"u"))
    items = b"".join(integer(n * (2**61 - 1)) for n in range(1, 30_000))
    yield "colliding set", with_pickle(_pickled(call("builtins.set", b"](" + items + b"e")))
    shared = b"](" + b"".join(map(integer, range(50_000))) + b"eq\0"
    sets = call("builtins.set", b"h\0") + b"q\x01" + call("builtins.set", b"h\0") * 20_000
    yield "many sets", with_pickle(_pickled(shared + sets))
    long = text("x" * 10**6) + b"q\0"
    encoded = call("_codecs.encode", b"h\0", text("latin1"))
    yield "many encodings", with_pickle(_pickled(long + encoded * 20_000))
    mutable = call("builtins.bytearray", b"h\0", text("latin-1"))
    yield "many bytearrays", with_pickle(_pickled(long + mutable * 20_000))
    yield "many arrays", with_pickle(_pickled(long + encoded + b"q\x01" + _array() * 20_000))
    yield "slow codec", with_pickle(_pickled(call("_codecs.encode", text("x" * 99), text("rot13"))))
    overlapping = bytearray(zipped([("data.pkl", good), ("data/0", b"x" * 16), ("data/1", b"y")]))
    at = overlapping.rfind(b"PK\1\2")
    struct.pack_into("<L", overlapping, at + 42, 0)
    yield "overlapping records", bytes(overlapping)
    twice = [("data.pkl", good), ("data/0", b"x" * 16), ("DATA/0", b"x" * 16)]
    yield "one name twice", zipped(twice)
    yield "many records", zipped([("data.pkl", good), *((f"data/{n}", b"") for n in range(40_000))])

    yield from _forged_numbers()
    yield from _endless_keys()
    marked = bytearray(with_pickle(good, {"0": b"x" * 16}))
    at = marked.rindex(b"PK\1\2")
    struct.pack_into("<L", marked, at + 38, 0x10)
    yield "a record marked as a folder", bytes(marked)


def _endless_keys() -> Iterator[Entry]:
    """Yields keys that are never hashed, compared or printed to an end."""
    doubled = b")q\0" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60))
    yield "a key of doubled tuples", with_pickle(_pickled(doubled + b"}h\x3cNs"))
    yield "a deep key", with_pickle(_pickled(b"})" + b"\x85" * 900_000 + b"Ns"))
    yield "a deep key of many", with_pickle(_pickled(b"}()" + b"\x85" * 900_000 + b"Nu"))
    in_set = b"](h\x3ce"
    yield "a set of doubled tuples", with_pickle(_pickled(doubled + call("builtins.set", in_set)))
    numbers = b"(" + b"".join(map(integer, range(9000))) + b"tq\0"
    yield (
        "a long key again and again",
        with_pickle(_pickled(numbers + b"}(" + b"h\0N" * 10**5 + b"u")),
    )
    sizes = b"(" + b"".join(map(integer, range(3000))) + b"tq\0"
    many = b"".join(b"h\1h\0\x85R" for _ in range(200_000))
    yield "many sizes", with_pickle(_pickled(sizes + b"ctorch\nSize\nq\1" + many))
    collided = b"".join(b"G" + struct.pack(">d", n * float(2**61 - 1)) for n in range(1, 9))
    keys = b"".join(integer(n * (2**61 - 1)) + b"N" for n in range(1, 5000))
    yield "colliding numbers", with_pickle(_pickled(collided + b"}(" + keys + b"u"))
    tuples = b"".join(integer(n * (2**61 - 1)) + b"\x85N" for n in range(1, 5000))
    yield "colliding tuples", with_pickle(_pickled(b"}(" + tuples + b"u"))


def _forged_numbers() -> Iterator[Entry]:
    """Yields numbers of thousands of bits, and nests, where a small number or a name should be."""
    huge = integer(2**2030)
    nest = b")" + b"\x85" * 100_000
    shape = b"(" + huge * 60 + b"t"
    for name, size, stride in (
        ("size", shape, shape),
        ("stride", b"(" + b"K\1" * 60 + b"t", shape),
        ("long size", b"(" + b"K\1" * 10**5 + b"t", b"(" + b"K\0" * 10**5 + b"t"),
        ("nested size", nest, nest),
    ):
        hooks = call("collections.OrderedDict")
        body = call(
            "torch._utils._rebuild_tensor_v2", storage(), b"K\0", size, stride, b"\x89", hooks
        )
        yield f"tensor of huge {name}", with_pickle(_pickled(body), {"0": b"x" * 16})
    kind = b"ctorch\nFloatStorage\n"
    for name, key, numel in (
        ("elements", text("0"), huge),
        ("name", huge, b"K\4"),
        ("nested name", nest, b"K\4"),
        ("nested number", text("0"), nest),
    ):
        body = b"(" + text("storage") + kind + key + text("cpu") + numel + b"tQ"
        yield f"storage of huge {name}", with_pickle(_pickled(body), {"0": b"x" * 16})
    yield (
        "nested kind",
        with_pickle(
            _pickled(b"(" + text("storage") + nest + text("0") + text("cpu") + b"K\4tQ"),
            {"0": b"x" * 16},
        ),
    )
    yield "nested identity", with_pickle(_pickled(b"(" + nest * 5 + b"tQ"))
    for path in ("torch.Size", "builtins.set", "_codecs.encode", "numpy.dtype", "torch.device"):
        yield f"{path} of a nest", with_pickle(_pickled(call(path, nest)))
        yield f"{path} of nests", with_pickle(_pickled(call(path, nest, nest)))
    yield "a far memo", with_pickle(_pickled(b"]r\xff\xff\xff\xff"))
    yield "a far memo at the end", with_pickle(_pickled(b"]r\0\0\xff\0"))
    yield "state of a function", with_pickle(_pickled(b"ctorch\nSize\n}" + text("a") + b"K\1sb"))
    yield (
        "slots of a function",
        with_pickle(_pickled(b"ctorch\nSize\nN}" + text("a") + b"K\1s\x86b")),
    )
    yield (
        "two types of one storage",
        with_pickle(
            _pickled(
                b"]("
                + storage()
                + storage(kind="IntStorage")
                + storage("0", "ByteStorage", 16)
                + b"e"
            ),
            {"0": b"x" * 16},
        ),
    )


def _array() -> bytes:
    dtype = call("numpy.dtype", text("u1"), b"\x89", b"\x88")
    empty = b"(" + integer(0) + b"t"
    code = call("_codecs.encode", text("b"), text("latin1"))
    array = call("numpy._core.multiarray._reconstruct", b"cnumpy\nndarray\n", empty, code)
    shape = b"(" + integer(10**6) + b"t"
    return array + b"(" + integer(1) + shape + dtype + b"\x89" + b"h\x01tb"


def _laughs(seed: bytes, step: bytes) -> bytes:
    body = seed + b"q\0"
    for n in range(60):
        if seed == b"]":
            body += b"]" + (step % (n, n)) + b"q" + bytes([n + 1])
        else:
            body += (step % (n, n)) + b"q" + bytes([n + 1])
    return body


def attacks() -> Iterator[Entry]:
    """Yields files whose pickles want to run code, or to make objects of other classes."""
    touch = text(f"touch {MARK}")
    python = text(f"open({MARK!r}, 'w').close()")
    for path in ("os.system", "posix.system", "subprocess.getoutput", "builtins.exec"):
        yield path, with_pickle(_pickled(call(path, python if "exec" in path else touch)))
    for path in (
        "builtins.eval",
        "builtins.getattr",
        "builtins.open",
        "builtins.__import__",
        "importlib.import_module",
        "sys.exit",
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch.utils.cpp_extension.load_inline",
        "torch._utils._rebuild_wrapper_subclass",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "collections.defaultdict",
        "pathlib.PosixPath",
        "numpy.load",
        "numpy._core.multiarray.fromfile",
        "functools.partial",
        "pickle.loads",
    ):
        yield path, with_pickle(_pickled(call(path, touch)))
    yield "python 2", with_pickle(_pickled(call("__builtin__.eval", python)))
    yield "instance", with_pickle(_pickled(b"csubprocess\nPopen\n(" + touch + b"t\x81."))
    yield "inst", with_pickle(_pickled(b"(" + touch + b"ios\nsystem\n"))
    yield "obj", with_pickle(_pickled(b"(cos\nsystem\n" + touch + b"o"))
    yield "global from the stack", with_pickle(_pickled(text("os") + text("system") + b"\x93"))
    yield "extension", with_pickle(_pickled(b"\x82\x01"))
    yield "persistent", with_pickle(_pickled(text("os.system") + b"Q"))
    body = tensor(storage(), 0, (4,), (1,)) + b"(" + storage() + integer(0) + b")" + b")tb"
    yield "state of a tensor", with_pickle(_pickled(body), {"0": b"x" * 16})
    hooked = call("collections.OrderedDict") + b"}" + text("__class__") + text("x") + b"sb"
    yield "class of a dictionary", with_pickle(_pickled(hooked))
    yield "numpy objects", _saved({"a": np.array([print, open], dtype=object)}, "unchecked")
    huge = b"(" + integer(2**40) + b"t"
    array = call("numpy._core.multiarray._reconstruct", b"cnumpy\nndarray\n", huge, text("b"))
    yield "huge numpy array", with_pickle(_pickled(array))


def _saved(state: Any, name: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert name
    return buffer.getvalue()


class Config:
    """A class of some other project, pickled into its checkpoints."""

    def __init__(self) -> None:
        self.lr = 0.1


def foreign(folder: Path) -> Iterator[Entry]:
    """Yields files that other programs write, whether torch may read them or not."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    yield "whole model", _saved(model, "model")
    yield "with a class", _saved({"state_dict": model.state_dict(), "args": Config()}, "class")
    yield "defaultdict", _saved({"state": defaultdict(list, a=[1])}, "defaultdict")
    yield "path", _saved({"path": folder}, "path")
    yield "optimizer", _saved(torch.optim.SGD(model.parameters(), 0.1), "optimizer")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer, _use_new_zipfile_serialization=False)
    yield "before torch 1.6", buffer.getvalue()
    yield "protocol 4", _with_protocol(model.state_dict(), 4)
    path = str(folder / "script.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    yield "TorchScript", Path(path).read_bytes()
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    yield "npz", buffer.getvalue()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.zeros(10**6))
    yield "compressed npz", buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    yield "npy", buffer.getvalue()
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    yield "safetensors", struct.pack("<Q", len(header)) + header + b"\0" * 4
    yield "pickle", pickle.dumps({"a": [1, 2]})
    yield "old pickle", pickle.dumps(OrderedDict(a=1), 0)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    yield "tar", buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "text/plain" * 50)
    yield "document", buffer.getvalue()
    yield "empty", b""
    yield "one byte", b"P"
    yield "empty archive", zipped([])
    yield "no pickle", zipped([("version", b"3\n")])
    yield "text", b"epoch,loss\n1,0.5\n" * 100
    yield "html", b"<!DOCTYPE html><title>404</title>"
    yield "lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "zeros", b"\0" * 5000
    yield "byte order", with_pickle(_pickled(b"}")).replace(b"little", b"middle")


def _with_protocol(state: Any, protocol: int) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_protocol=protocol)
    return buffer.getvalue()
