"""TraceRecorder: a handler that writes down a digest of all that a training does.

One idea in three parts: the recorder, an iteration while it is recorded, and where what is recorded
lies in an engine and its objects.
"""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy
import torch

from crosstrain.engine import Engine, Events, ShardedBatch, StepEvents
from crosstrain.engine.exact import environment
from crosstrain.engine.nests import unwrap, walk_objects
from crosstrain.engine.state import Unread

from .digest import Digester, kept_digest, salt, tensors_of, text_digest
from .file import Header, Thing, TraceWriter, path_of_rank

_MASK: Final = (1 << 64) - 1


class TraceRecorder:
    """Records each iteration of an engine into a file, for `crosstrain diff`.

    Recorded are, in this order: the batch; the random states of host and device before the step;
    the settings of the optimizers, such as the learning rate; the loss (the iteration's output);
    the gradient of each parameter, after the backward pass and before clipping; each parameter and
    each buffer after the iteration; the random states then. Digests are computed on the device, and
    read there every `every_sync` iterations, all in one transfer. Nothing is drawn, and nothing
    that the training computes is changed.

    After a resume it goes on in the same file. If the process is killed, up to `every_sync`
    iterations are not in it. Name the recorder in what is saved (`to_save`), and the trace is
    written before each checkpoint, so that a resumed run leaves no gap. Of several processes, rank
    r > 0 writes to `path.rank<r>`. In logical shards the batch is that of the process's first
    shard: rank 0's traces are the same on any number of processes.

    Args:
        path: the file; made if need be, with its folder.
        every_sync: after how many iterations the digests are read; the host waits for the device.
        norms: whether the norm of each gradient, parameter and buffer is recorded beside its
            digest: traces of different kinds of devices are compared by these.

    Raises:
        ValueError: if `every_sync` is below 1.
    """

    def __init__(
        self, path: str | os.PathLike[str], every_sync: int = 10, *, norms: bool = True
    ) -> None:
        if every_sync < 1:
            raise ValueError(f"every_sync is a number of iterations of at least 1: {every_sync}.")
        self.path = path
        self.every_sync = every_sync
        self.norms = norms
        self._digester = Digester()
        self._sources: _Sources | None = None
        self._writer: TraceWriter | None = None
        self._current: _Iteration | None = None
        self._pending: list[_Iteration] = []

    def attach(self, trainer: Engine, objects: Mapping[str, Any] | None = None) -> None:
        """Attaches the recorder to an engine, after all handlers whose doings it shall see.

        Args:
            trainer: the engine. A factory's knows what it trains; its gradients are seen before
                they are stepped with. Of another one they are seen as the iteration leaves them.
            objects: what it trains, by name, as in `to_save`; by default what the trainer names.

        Raises:
            ValueError: if the recorder is attached already.
        """
        if self._sources is not None:
            raise ValueError("The recorder is attached already: make one for each trainer.")
        self._sources = sources = _Sources(trainer, trainer.objects if objects is None else objects)
        trainer.add_event_handler(Events.STARTED, self._open, trainer)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._begin)
        if sources.has_backward_event:
            trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED, self._take_gradients)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._end)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.flush)
        trainer.call_at_end(self.flush)

    def state_dict(self) -> dict[str, Any]:
        """Writes what has not been written yet; returns nothing that a resumed run needs."""
        self.flush()
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: the trace goes on where the trainer does."""

    # ---------------------------------------------------------------- an iteration

    def _open(self, trainer: Engine) -> None:
        assert self._sources is not None
        self._current, self._pending = None, []
        conditions = environment(trainer.backend)
        shards = getattr(trainer, "shards", None)
        if shards is not None:
            conditions["logical shards"] = shards
        things, state = self._sources.things, trainer.state
        header = Header(state.iteration, things, conditions, state.seed)
        world = None if trainer.backend is None else trainer.backend.world
        # Each process sees its own batches.
        self._writer = TraceWriter(path_of_rank(self.path, world.rank if world else 0), header)

    def _begin(self) -> None:
        sources = self._sources
        assert sources is not None
        state = sources.trainer.state
        taken = self._current = _Iteration(self._digester, state.iteration, state.epoch)
        batch = state.batch
        if isinstance(batch, ShardedBatch):
            # Rank 0's first shard is the same part of the batch whatever the number of processes.
            batch = batch[0]
        taken.nest(Thing("batch"), batch)
        for name, stream in sources.streams.items():
            taken.digests[Thing("random", name)] = stream()
        taken.settings(sources.settings)

    def _take_gradients(self) -> None:
        sources, taken = self._sources, self._current
        if sources is None or taken is None:
            return
        for name, parameter in sources.parameters.items():
            if parameter.grad is not None:
                taken.tensor(Thing("gradient", name), parameter.grad, self.norms)

    def _end(self) -> None:
        sources, taken = self._sources, self._current
        if sources is None or taken is None:
            return
        if not sources.has_backward_event:
            self._take_gradients()
        taken.output(sources.trainer.state.raw_output)
        for kind, tensors in (("parameter", sources.parameters), ("buffer", sources.buffers())):
            for name, tensor in tensors.items():
                taken.tensor(Thing(kind, name), tensor, self.norms)
        for name, stream in sources.streams.items():
            taken.digests[Thing("random after", name)] = stream()
        # Everything else can be given up.
        for unread in taken.unread.values():
            unread.gather()
        self._pending.append(taken)
        self._current = None
        if len(self._pending) >= self.every_sync:
            self.flush()

    def flush(self) -> None:
        """Reads what has been computed since the last time, and appends it to the file."""
        pending, self._pending = self._pending, []
        if pending and self._writer is not None:
            _read(pending)
            self._writer.append([(t.iteration, t.epoch, t.digests, t.values) for t in pending])


class _Iteration:
    """One iteration while it goes on: digests and values, read or still on a device."""

    def __init__(self, digester: Digester, iteration: int, epoch: int) -> None:
        self.iteration = iteration
        self.epoch = epoch
        self.digests: dict[Thing, int] = {}
        self.values: dict[Thing, float] = {}
        self.unread: dict[torch.device, _Unread] = {}
        self._digester = digester

    def tensor(self, thing: Thing, tensor: torch.Tensor, norm: bool) -> None:
        digest = self._digester.digest(tensor)
        unread = self.unread.setdefault(digest.device, _Unread())
        unread.digests.append((thing, salt(tensor), digest))
        floats = tensor.is_floating_point() and tensor.layout is torch.strided
        if norm and floats and not hasattr(tensor, "to_local"):
            unread.values.append((thing, _norm(tensor)))

    def nest(self, thing: Thing, value: Any) -> list[torch.Tensor]:
        """Takes a nest of tensors and other values, as one thing; returns the tensors."""
        tensors, rest = tensors_of(value)
        self.digests[thing] = rest
        for number, tensor in enumerate(tensors, 1):
            digest = self._digester.digest(tensor)
            unread = self.unread.setdefault(digest.device, _Unread())
            # Odd and different factors: the tensors of a nest cannot change places unseen.
            added = salt(tensor) + number
            unread.digests.append((thing, added, digest * (2 * number - 1)))
        return tensors

    def settings(self, settings: Mapping[str, Callable[[], Any]]) -> None:
        for name, setting in settings.items():
            thing, value = Thing("setting", name), setting()
            if isinstance(value, (int, float)):
                self.digests[thing] = kept_digest(f"{type(value).__name__}{value!r}")
                self.values[thing] = float(value)
            else:
                self.nest(thing, value)

    def output(self, output: Any) -> None:
        """Takes the iteration's output; its value, too, if it is a loss."""
        value = output.tensor if isinstance(output, Unread) else output
        tensors = self.nest(Thing("loss"), value)
        if isinstance(value, (int, float)):
            self.values[Thing("loss")] = float(value)
        elif len(tensors) == 1 and tensors[0].numel() == 1 and tensors[0].is_floating_point():
            loss = tensors[0].detach().reshape(()).to(torch.float32)
            unread = self.unread.setdefault(loss.device, _Unread())
            unread.values.append((Thing("loss"), loss))


class _Unread:
    """Digests and values that lie on one device."""

    def __init__(self) -> None:
        # With each digest what is to be added to it.
        self.digests: list[tuple[Thing, int, torch.Tensor]] = []
        self.values: list[tuple[Thing, torch.Tensor]] = []
        self.numbers = torch.empty(0, dtype=torch.int64)

    def gather(self) -> None:
        """Puts them into one tensor, in whose place they are given up; values by their bits."""
        with torch.no_grad():
            self.numbers = torch.stack([digest for _, _, digest in self.digests])
            if self.values:
                values = torch.stack([value for _, value in self.values]).view(torch.int32)
                self.numbers = torch.cat([self.numbers, values.to(torch.int64)])
        none = torch.empty(0)
        self.digests = [(thing, added, none) for thing, added, _ in self.digests]
        self.values = [(thing, none) for thing, _ in self.values]


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    linalg: Any = torch.linalg
    found: torch.Tensor = linalg.vector_norm(tensor.detach(), dtype=wide)
    return found.to(torch.float32)


def _read(pending: list[_Iteration]) -> None:
    """Copies the digests and values of several iterations to the host, a device at a time."""
    for device in {device for taken in pending for device in taken.unread}:
        parts = [(taken, taken.unread.pop(device)) for taken in pending if device in taken.unread]
        numbers: Any = torch.cat([part.numbers for _, part in parts]).cpu()
        sizes = [size for _, part in parts for size in (len(part.digests), len(part.values))]
        read = iter(numbers.split(sizes))
        for taken, part in parts:
            for (thing, added, _), digest in zip(part.digests, next(read).tolist(), strict=True):
                taken.digests[thing] = (taken.digests.get(thing, 0) + digest + added) & _MASK
            bits = next(read).to(torch.int32).view(torch.float32)
            for (thing, _), value in zip(part.values, bits.tolist(), strict=True):
                taken.values[thing] = value


class _Sources:
    """Where the things are that are recorded."""

    def __init__(self, trainer: Engine, objects: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self._modules: dict[str, torch.nn.Module] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.settings: dict[str, Callable[[], Any]] = {}
        for label, value in walk_objects(objects):
            thing = unwrap(value)
            if isinstance(thing, torch.nn.Module):
                self._modules[label] = thing
            elif isinstance(thing, torch.optim.Optimizer):
                self.settings.update(_settings_of(label, thing))
        seen: set[int] = set()
        for label, module in self._modules.items():
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    self.parameters[f"{label}.{name}"] = parameter
        self.streams = _streams(trainer)
        self.has_backward_event = StepEvents.BACKWARD_COMPLETED.name in trainer.state.event_to_attr
        kinds: tuple[tuple[str, Iterable[str]], ...] = (
            ("batch", [""]),
            ("random", self.streams),
            ("setting", self.settings),
            ("loss", [""]),
            ("gradient", self.parameters),
            ("parameter", self.parameters),
            ("buffer", self.buffers()),
            ("random after", self.streams),
        )
        #: In the order in which they come about.
        self.things = tuple(Thing(kind, name) for kind, names in kinds for name in names)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns the buffers: looked up each time, since assigning one makes it another tensor."""
        return {
            f"{label}.{name}": buffer
            for label, module in self._modules.items()
            for name, buffer in module.named_buffers()
        }


def _settings_of(label: str, optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], Any]]:
    """Returns what reads each setting of an optimizer that is a number, or a tuple of them."""
    found: dict[str, Callable[[], Any]] = {}
    groups: list[dict[str, Any]] = optimizer.param_groups
    for index, group in enumerate(groups):
        where = f"of {label}" + (f", group {index}" if len(groups) > 1 else "")
        for key, value in group.items():
            number = isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
            # The first learning rate is kept by schedulers and does not change.
            if (number or isinstance(value, torch.Tensor)) and key != "initial_lr":
                found[f"'{key}' {where}"] = _getter(optimizer, index, key)
    return found


def _getter(optimizer: torch.optim.Optimizer, index: int, key: str) -> Callable[[], Any]:
    # By way of the optimizer: loading its state puts other groups in the place of these.
    return lambda: optimizer.param_groups[index].get(key)


def _streams(trainer: Engine) -> dict[str, Callable[[], int]]:
    """Returns what reads the digest of each random state of host and device."""
    found: dict[str, Callable[[], int]] = {
        "python": _python,
        "numpy": _numpy,
        "torch": lambda: text_digest(torch.get_rng_state().numpy().tobytes()),
    }
    backend = trainer.backend
    if backend is not None and backend.rng_state():
        found["device"] = lambda: _host_digest(backend.rng_state())
    return found


def _python() -> int:
    version, words, gauss = random.getstate()
    return text_digest(array("I", words).tobytes() + f"{version}{gauss!r}".encode())


def _numpy() -> int:
    state: Any = numpy.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return _host_digest(state)
    # The usual one, without taking a nest apart at each iteration.
    rest = f"{state['state']['pos']}{state['has_gauss']}{state['gauss']!r}"
    return text_digest(state["state"]["key"].tobytes() + rest.encode())


def _host_digest(state: Any) -> int:
    """Returns the digest of a nest that lies on the host."""
    tensors, rest = tensors_of(state)
    for tensor in tensors:
        content: Any = tensor.cpu().contiguous().numpy()
        rest = text_digest(rest.to_bytes(8, "little") + content.tobytes())
    return rest
