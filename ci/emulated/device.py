"""The device `emulated`: its tensors, its memory, its generators, and what it counts.

A tensor of `emulated:0` holds a tensor of the CPU that nobody else sees. Each operation on it comes
here by torch's dispatcher, where it is checked, counted, and run on what is held: at once on the
default stream, later on another (`streams`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import distributed
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

from crosstrain.backends.errors import BackendUnavailable, Missing

from .autocasting import libraries
from .graphs import EmulatedGraph, graph, refuse_waiting, stuck
from .memory import install as install_memory
from .memory import is_pinned
from .streams import Event, Queue, Stream, current, current_queue
from .streams import install as install_streams

NAME = "emulated"
#: How many devices there are.
COUNT = 2

# Operations whose result the host has to know before it can go on.
_READERS = frozenset(
    {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"}
    | {"unique_consecutive", "unique_dim", "repeat_interleave", "bincount"}
)
_COPIES = frozenset({"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"})
# Seeds of the device give other numbers than the same ones of the CPU.
_OTHER = 7919


class _Machine:
    """What torch knows as `torch.emulated`, with its names, and what the devices have besides."""

    Stream, Event = Stream, Event
    current_stream = staticmethod(current)
    # Graphs of a type of device are called after it, as in `torch.cuda.CUDAGraph`.
    EMULATEDGraph = EmulatedGraph
    graph = staticmethod(graph)

    def __init__(self) -> None:
        self.states = [_seeded(number) for number in range(COUNT)]
        self.reads: list[Counter[str]] = []
        self.index = 0
        #: How many allocations there is memory for; None: for all.
        self.room: int | None = None

    def manual_seed(self, seed: int) -> None:
        self.states[self.index] = _seeded(seed)

    def manual_seed_all(self, seed: int) -> None:
        self.states = [_seeded(seed) for _ in range(COUNT)]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self.states[self._number(device)].clone()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self.states[self._number(device)] = state.clone()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def stream(self, stream: Any) -> Any:
        return stream

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return COUNT

    def current_device(self) -> int:
        return self.index

    def set_device(self, device: Any) -> None:
        self.index = self._number(device)

    def _number(self, device: Any) -> int:
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return self.index if index is None else index

    def note_read(self, name: str) -> None:
        for counted in self.reads:
            counted[name] += 1

    def take(self) -> None:
        if self.room == 0:
            raise torch.OutOfMemoryError(f"{NAME}: out of memory, as the test asked for.")
        if self.room is not None:
            self.room -= 1


def _seeded(seed: int) -> torch.Tensor:
    return torch.Generator().manual_seed((seed + _OTHER) % 2**63).get_state()


_MACHINE = _Machine()
# Libraries take back what they have registered when they are freed.
_REGISTERED: list[Any] = []
_library: Any = torch.library.Library
_DATA: Any = torch.Tensor.data


@contextlib.contextmanager
def host_reads() -> Generator[Counter[str], None, None]:
    """Counts what the host reads of the devices inside: `.item()`, `bool`, `.cpu()`, `nonzero`.

    Each of them waits for the device. A copy that does not block is none. The counter has the names
    of torch's operations: `_local_scalar_dense` is `.item()` and `bool`, `_to_copy` is `.cpu()`.
    """
    counted: Counter[str] = Counter()
    _MACHINE.reads.append(counted)
    try:
        yield counted
    finally:
        _MACHINE.reads = [one for one in _MACHINE.reads if one is not counted]


@contextlib.contextmanager
def out_of_memory(after: int = 0) -> Generator[None, None, None]:
    """Has the devices run out of memory inside, after so many more tensors."""
    _MACHINE.room = after
    try:
        yield
    finally:
        _MACHINE.room = None


def why_not() -> Missing | None:
    """Returns why torch can have no such device in this process; None if it can."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return Missing(
            f"torch {torch.__version__} takes no device that is written in Python.",
            "Install torch 2.13 or newer, or test on cpu.",
        )
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in (NAME, "privateuseone"):
        return Missing(
            f"torch has one place for a device of another package, and '{taken}' has it.",
            "Test in an environment without that package.",
        )
    return None


def register() -> None:
    """Gives the device to torch, for as long as the process lives; once is enough.

    Raises:
        BackendUnavailable: if torch cannot have it.
    """
    missing = why_not()
    if missing is not None:
        raise BackendUnavailable(NAME, *missing)
    if _REGISTERED:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_MACHINE)
    library: Any = _library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    _REGISTERED.extend([library, *libraries(NAME)])
    install_memory(NAME)
    install_streams()
    if distributed.is_available():
        # What processes share comes here by the dispatcher, too, and goes on over the host.
        distributed.Backend.default_device_backend_map[NAME] = "gloo"
    accelerator: Any = torch.accelerator
    accelerator.device_count = _MACHINE.device_count
    accelerator.current_device_index = _MACHINE.current_device
    accelerator.set_device_index = _MACHINE.set_device
    accelerator.device_index = _device_index


@contextlib.contextmanager
def _device_index(device: int | None) -> Generator[None, None, None]:
    before = _MACHINE.index
    _MACHINE.index = before if device is None else device
    try:
        yield
    finally:
        _MACHINE.index = before


class Emulated(torch.Tensor):
    """A tensor of the device."""

    raw: torch.Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, index: int) -> Any:
        """Makes a tensor that says that it is on the device."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, index),
        )

    def __init__(self, raw: torch.Tensor, index: int) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        """Is another look at the same memory, which autograd does not follow."""
        return self.detach()

    @data.setter
    def data(self, other: Any) -> None:
        if not isinstance(other, Emulated):
            raise RuntimeError(
                f"Incompatible tensor type: {type(other)} for data of '{self.device}'"
            )
        _DATA.__set__(self, other)
        self.raw = other.raw

    def untyped_storage(self) -> torch.UntypedStorage:
        """Returns what tells its memory from all other; to read it there is to read poison."""
        return self.raw.untyped_storage()

    def new_tensor(self, data: Any, **options: Any) -> Any:  # type: ignore[override]
        """Returns a tensor of data, of the same type and on the same device unless told."""
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def tolist(self) -> Any:
        """Reads its values."""
        return self.cpu().tolist()

    def __format__(self, words: str) -> str:
        return format(self.item(), words) if self.dim() == 0 else format(str(self), words)

    def data_ptr(self) -> int:
        """Returns where it lies."""
        return self.raw.data_ptr()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation that has to do with the device."""
    name = func.overloadpacket.__name__
    if name == "record_stream":
        return None  # Memory is never used again here before its owner is gone.
    flat = _tensors((args, kwargs))
    ours = [one for one in flat if isinstance(one, Emulated)]
    copies = name in _COPIES
    if not copies:
        _refuse_mixture(func, flat, ours)
    wanted = kwargs.get("device")
    index = _index_of(wanted, ours)
    to_host = wanted is not None and torch.device(wanted).type == "cpu"
    if copies and name != "_to_copy":
        to_host = not isinstance(args[0 if name == "copy_" else 1], Emulated)
    queue = current_queue(index)
    # A graph has a number of the host as it is now; pinned memory it reads at each replay.
    bare = _bare if copies or queue.recorded is None else _baked
    plain_args, plain_kwargs = pytree.tree_map(bare, (args, kwargs))
    call = _Call(func, plain_args, plain_kwargs, index)
    reads, is_view = _reads(name, args), call.is_view()
    if queue.recorded is not None:
        _refuse_recording(call, name, args, to_host)
    if copies and to_host and ours:
        return _to_host(call, name, queue)
    if reads:
        _MACHINE.note_read(name)
    if reads or func.namespace == "c10d":
        # Gloo has it from here on, and the work that is returned is waited for as any other's.
        queue.run()
        out = call.now()
    elif queue.recorded is not None and not is_view:
        out = call.recorded(queue.recorded)
    elif queue.is_default or is_view:
        out = call.now()
    else:
        out = call.later(queue)
    known = {id(one.raw): one for one in ours} if func._schema.is_mutable else {}

    def wrapped(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        if id(one) in known:
            return known[id(one)]
        if not is_view:
            _MACHINE.take()
        return Emulated(one, index)

    return pytree.tree_map(wrapped, out)


def _refuse_mixture(func: Any, flat: Sequence[torch.Tensor], ours: Sequence[Emulated]) -> None:
    # A tensor of no dimension is a number, which may come from anywhere.
    places = {str(one.device) for one in flat if one.dim() > 0 or isinstance(one, Emulated)}
    if ours and len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} was given tensors on "
            f"{' and '.join(sorted(places))}."
        )


def _index_of(wanted: Any, ours: Sequence[Emulated]) -> int:
    """Returns the number of the device that an operation runs on."""
    device = None if wanted is None else torch.device(wanted)
    if device is not None and device.type == NAME:
        return _MACHINE.index if device.index is None else device.index
    return ours[0].device.index if ours else _MACHINE.index


def _reads(name: str, args: Any) -> bool:
    """Tells whether the host has to know something before the operation can go on."""
    masks = (torch.bool, torch.uint8)
    return name in _READERS or (
        name == "index" and any(one.dtype in masks for one in _tensors(args[1]))
    )


def _refuse_recording(call: _Call, name: str, args: Any, to_host: bool) -> None:
    """Refuses what no graph can hold."""
    waits = _reads(name, args) or call.func.namespace == "c10d"
    if name in _COPIES:
        host = [one for one in _tensors(args) if not isinstance(one, Emulated)]
        # Within the device nobody waits, nor for pinned memory, if that was said.
        waits = not call.is_prompt(name) and (to_host or bool(host))
        waits |= any(not is_pinned(one) for one in host)
    if waits:
        refuse_waiting(name)


def _to_host(call: _Call, name: str, queue: Queue) -> Any:
    """Copies from the device to the host: waits for it, or fills the copy in when it is there."""
    if not call.is_prompt(name):
        _MACHINE.note_read(name)
        queue.run()
        return call.now()
    if queue.recorded is not None:
        return call.recorded(queue.recorded)
    # What is on the default stream is read as it is now: what comes later may change it.
    return call.later(queue, keep_inputs=queue.is_default)


class _Call:
    """An operation on what the tensors of a device hold, which draws from its generator."""

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any], index: int) -> None:
        self.func, self.args, self.kwargs, self.index = func, args, kwargs, index

    def is_view(self) -> bool:
        """Tells whether it gives another look at the same memory, and computes nothing."""
        returned = [one.alias_info for one in self.func._schema.returns]
        return any(one is not None and not one.is_write for one in returned)

    def is_prompt(self, name: str) -> bool:
        """Tells whether it is a copy that the host does not wait for."""
        positional = name == "copy_" and self.args[2:] == (True,)
        return bool(self.kwargs.get("non_blocking")) or positional

    def now(self) -> Any:
        """Runs it; what it draws comes from the device's generator."""
        if torch.Tag.nondeterministic_seeded not in self.func.tags:
            return self.func(*self.args, **self.kwargs)
        if self.index in stuck:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        host = torch.default_generator
        kept = host.get_state()
        host.set_state(_MACHINE.states[self.index])
        try:
            return self.func(*self.args, **self.kwargs)
        finally:
            _MACHINE.states[self.index] = host.get_state()
            host.set_state(kept)

    def later(self, queue: Queue, keep_inputs: bool = False) -> Any:
        """Queues it, and returns poison in the place of its results until it has run.

        With `keep_inputs` it works on its inputs as they are now.
        """
        changed = self._changed()
        if changed:
            return self._change_later(queue, changed, keep_inputs)
        result = self._tried()
        visible, fill = _poisoned(result)
        queue.add(lambda: fill(result if keep_inputs else self.now()))
        return visible

    def recorded(self, work: list[Callable[[], Any]]) -> Any:
        """Records it for a graph; returns the memory in which each replay leaves its results."""
        changed = self._changed()
        if changed:
            work.append(self.now)
            return changed[0] if len(self.func._schema.returns) == 1 else None
        visible, fill = _poisoned(self._tried())
        work.append(lambda: fill(self.now()))
        return visible

    def _tried(self) -> Any:
        """Returns its results as they would be now, and changes nothing: it works on copies."""
        drawn = _MACHINE.states[self.index]
        mine = self.args, self.kwargs
        self.args, self.kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, mine)
        try:
            return self.now()
        finally:
            self.args, self.kwargs = mine
            _MACHINE.states[self.index] = drawn  # It is drawn when it runs.

    def _change_later(self, queue: Queue, changed: list[torch.Tensor], keep_inputs: bool) -> Any:
        before = [one.clone() for one in changed]
        if keep_inputs:
            self.args = (self.args[0], self.args[1].clone(), *self.args[2:])
        for one in changed:
            _poison(one)

        def work() -> None:
            for one, value in zip(changed, before, strict=True):
                one.copy_(value)
            self.now()

        queue.add(work)
        return changed[0] if len(self.func._schema.returns) == 1 else None

    def _changed(self) -> list[torch.Tensor]:
        """Returns the tensors that it changes in place."""
        found: list[torch.Tensor] = []
        for number, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = number < len(self.args)
                found += _tensors(self.args[number] if given else self.kwargs.get(argument.name))
        return found


def _tensors(value: Any) -> list[torch.Tensor]:
    return [one for one in pytree.tree_leaves(value) if isinstance(one, torch.Tensor)]


def _poisoned(results: Any) -> tuple[Any, Callable[[Any], None]]:
    """Returns poison in the place of results, and what fills the results in there."""
    visible = pytree.tree_map_only(torch.Tensor, lambda one: _poison(one.clone()), results)

    def fill(found: Any) -> None:
        for place, value in zip(_tensors(visible), _tensors(found), strict=True):
            place.copy_(value)

    return visible, fill


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)


def _bare(one: Any) -> Any:
    if isinstance(one, Emulated):
        return one.raw
    return torch.device("cpu") if isinstance(one, torch.device) and one.type == NAME else one


def _baked(one: Any) -> Any:
    is_number = isinstance(one, torch.Tensor) and not isinstance(one, Emulated)
    return one.clone() if is_number else _bare(one)
