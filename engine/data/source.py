"""ResumableSource: what a step or a handler draws from, so that it can be named in `to_save`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from crosstrain.engine.errors import DataUsedUp
from crosstrain.engine.proof import Checks, Proof
from crosstrain.engine.random_states import random_states_kept

from .cursor import Cursor
from .flows import Dataflow
from .generators import GENERATORS, generator_state, set_generator_state
from .own_states import is_stateful
from .streams import ALL_STREAMS, StreamKey

if TYPE_CHECKING:
    from crosstrain.backends import Backend


class ResumableSource:
    """Gives a second loader, a stream or a random generator a state, to be saved beside a trainer.

    A trainer's state holds where the run is in its own data. What a step or a handler draws from
    besides has a position, or random states, of its own: wrap it in this, draw from it, and name it
    in `to_save`. What it gives is then as exact on a resume as a `DeterministicEngine`'s own data.

        unlabelled = ResumableSource(DataLoader(images, 64, shuffle=True))
        noise = ResumableSource(torch.Generator().manual_seed(3))

        def step(engine, batch):
            more = next(unlabelled)
            scale = torch.rand((), generator=noise.source)

        resume_or_start(trainer, {"model": model, "unlabelled": unlabelled, "noise": noise}, ...)

    Args:
        source: a `torch.Generator`, `random.Random`, `numpy.random.Generator` or `RandomState`,
            which stays what is drawn from; or any data that `run` takes: a loader, an iterable, an
            iterator at its beginning; or a function of no arguments that returns an iterable.
        endless: whether data begins anew when it is used up. If not, `next` raises StopIteration
            there, and the next call begins the next pass: `for` loops go over a pass each.
        seed: of the data's order and augmentation, as of `DeterministicEngine`. None: drawn from
            torch's global generator now; on a resume it is the saved one.
        backend: of a world of several processes, among which a loader's batches are dealt out: all
            of them then need the same seed.
        checks: how strict a resume is about the batch before. What it finds stands in `proof`.

    Raises:
        TypeError: if it is none of these.
    """

    def __init__(
        self,
        source: Any,
        *,
        endless: bool = True,
        seed: int | None = None,
        backend: Backend | None = None,
        checks: Checks | None = None,
    ) -> None:
        #: What was given.
        self.source = source
        self.checks, self.proof = checks or Checks(), Proof()
        self._endless = endless
        self._generates = isinstance(source, GENERATORS)
        if self._generates:
            return
        self._data = _data_of(source)
        self._seed = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed
        self._cursor = Cursor(backend)
        self._backend = backend
        self._open = self._used_up = False
        # What was loaded, until the data is opened there, and what was seen of the data then.
        self._loaded: dict[str, Any] | None = None
        self._shown: Any = None
        # What handlers change of it from now on goes into its state.
        self._cursor.watch(self._data)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._generates:
            raise TypeError(f"{type(self.source).__name__} is drawn from itself: use .source.")
        if not self._open:
            self._go_on()
        for _ in range(2):
            if self._used_up:
                with random_states_kept(self._backend):
                    self._cursor.open_next_pass(self._data, self._key)
                self._used_up = False
            try:
                item = next(self._cursor)
            except StopIteration:
                self._used_up = True
                if not self._endless:
                    raise
            else:
                self._cursor.step_done()
                return item
        raise DataUsedUp(
            f"{type(self.source).__name__} is used up, and iterating over it anew gives nothing. "
            "Give ResumableSource() data that can be iterated over more than once, or a function "
            "that returns it; or pass endless=False."
        )

    def _go_on(self) -> None:
        loaded = self._loaded
        with random_states_kept(self._backend):
            if loaded is None or loaded["position"] is None:
                self._cursor.open(self._data, self._key)
            else:
                flow, self.proof = self._flow, Proof()
                now = flow.visible()
                self._cursor.go_to(
                    loaded["position"], self._data, self._key, self.proof, self.checks.batch_before
                )
                flow.give_changed(self._shown, now)
                self._used_up = loaded["used up"]
        self._open, self._loaded = True, None

    @property
    def flow(self) -> Dataflow | None:
        """What opens the data; None of a random generator."""
        return None if self._generates else self._flow

    @property
    def _flow(self) -> Dataflow:
        flow = self._cursor.seen
        assert flow is not None, "it is watched from the beginning"
        return flow

    @property
    def _key(self) -> StreamKey:
        return StreamKey(self._seed, 0, ALL_STREAMS)

    def state_dict(self) -> dict[str, Any]:
        """Returns where it is, as tensors and plain types."""
        if self._generates:
            return {"generator": generator_state(self.source)}
        state: dict[str, Any] = {
            "seed": self._seed,
            "position": None,
            "used up": self._used_up,
            "shown": None,
        }
        if self._open:
            return {**state, "position": self._cursor.position()}
        if self._loaded is not None and self._flow.is_as(self._shown):
            return self._loaded
        # It is opened there with the next batch; handlers have changed the data since.
        state.update(self._loaded or {})
        name = "shown" if state["position"] is None else "position"
        then = state[name] or {"data": self._flow.fingerprint(), "flow": {}}
        return {**state, name: {**then, "flow": self._flow.as_now(then["flow"])}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a state: generators now, data when it is drawn from next.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: if it is the state of a generator and this is data, or the other way round.
        """
        if self._generates != ("generator" in state_dict):
            kinds = ("data", "a random generator")
            raise ValueError(
                f"The state is that of {kinds[not self._generates]}, and this "
                f"{type(self.source).__name__} is {kinds[self._generates]}. Wrap what was wrapped "
                "when the state was written."
            )
        if self._generates:
            set_generator_state(self.source, state_dict["generator"])
            return
        self._cursor.rewind()
        self._open = self._used_up = False
        self._seed, self._loaded = state_dict["seed"], dict(state_dict)
        if (then := state_dict["position"] or state_dict.get("shown")) is not None:
            self._cursor.show(then, self._data)
        self._shown = self._flow.visible()

    def __len__(self) -> int:
        return len(self._data)


class _Made:
    """Iterates over what a function returns."""

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())


def _data_of(source: Any) -> Any:
    if is_stateful(source) or (isinstance(source, Iterable) and not isinstance(source, Iterator)):
        return source
    if isinstance(source, Iterator):
        # Under random streams of its own, as any other iterable.
        return _Made(lambda: source)
    if not callable(source):
        raise TypeError(
            f"ResumableSource takes a random generator, data, or a function that returns data; got "
            f"a {type(source).__name__}."
        )
    make: Any = source
    return _Made(make)
