"""Deterministic training: the same data for a seed, and runs that resume bit for bit anywhere.

A state is written by `recording.py`, and what was loaded is given to a run by `resumption.py`; here
the loop of the engine calls both. Whoever changes one of the three has to see the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from crosstrain.backends import random_state
from crosstrain.engine.data.sampling import ReproducibleBatchSampler, update_dataloader
from crosstrain.engine.data.streams import ALL_STREAMS
from crosstrain.engine.exact.rank_states import check_same_shards
from crosstrain.engine.exact.snapshot import OPTIONAL_KEYS, check_keys
from crosstrain.engine.ranks.of_each import RANKS
from crosstrain.engine.training.own_step import OwnStep

from .engine import Engine, check_iterable
from .proof import Checks
from .random_states import random_states_kept
from .recording import RecordingEngine, warn_inexact
from .resumption import ExactResumption, Resumption
from .state import State

if TYPE_CHECKING:
    from crosstrain.backends import Backend

__all__ = [
    "DeterministicEngine",
    "ReproducibleBatchSampler",
    "keep_random_state",
    "manual_seed",
    "update_dataloader",
]

F = TypeVar("F", bound=Callable[..., Any])


def manual_seed(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators (torch's on each device it knows).

    Args:
        seed: an integer of at least 0.

    Raises:
        ValueError: if it is negative.
    """
    random_state.seed(seed)


def keep_random_state(function: F) -> F:
    """Decorates a function so that it leaves the host's random states as it found them.

    Args:
        function: a handler, or any function; what it returns is returned.
    """
    return random_state.preserved()(function)


class DeterministicEngine(RecordingEngine):
    """An engine whose run follows from its seed, and which resumes exactly from any iteration.

    Pass p over the data begins with the global generators seeded with `seed + p`; a DataLoader over
    a map-style dataset then gives the batches of torch's own sampling, and each sample's random
    numbers follow from (seed, p, position), in whatever process it is fetched. `state_dict` holds
    what a resumed run needs to end with the same bits, besides model, optimizer and scheduler.

    Args:
        process_function: as of `Engine`. If it has `state_dict` and `load_state_dict`, as a
            factory's training step does, its state rides along. If not, the gradients that wait
            for their optimizer's step do: of the models and optimizers in `objects`, and of those
            that the function refers to.
        backend: as of `Engine`; its arithmetic is deterministic while a run goes on.
        seed: the seed of each run that begins anew, from 0 to 2**63 - 1. None: drawn from torch's
            global generator when a run starts, as pytorch-ignite does, so that `manual_seed`
            decides it.
        streams: which global generators are keyed for each sample: of `python`, `numpy`, `torch`.
        warn_only: whether an operation without a deterministic kernel warns instead of raising.
        checks: how strict a resume is about each thing that it measures; by default, all of it is
            an error. What it finds stands in `proof` afterwards, and in one line of the log.

        shards: to how many logical shards each batch is dealt out, for a process function that
            computes it by `LogicalShards`; a power of two that the number of processes divides.

    Raises:
        ValueError: if `streams` names another generator, the seed is out of range, or the number of
            processes does not divide that of shards.
    """

    def __init__(
        self,
        process_function: Callable[[Any, Any], Any],
        backend: Backend | None = None,
        *,
        seed: int | None = None,
        streams: Iterable[str] = ALL_STREAMS,
        warn_only: bool = False,
        checks: Checks | None = None,
        shards: int | None = None,
    ) -> None:
        super().__init__(
            process_function, backend, seed=seed, streams=streams, checks=checks, shards=shards
        )
        self._warn_only = warn_only
        # From `load_state_dict` on, until the data is opened or a new run begins.
        self._resumption: Resumption | None = None

    def _own_state(self) -> dict[str, Any]:
        if self._resumption is None:
            return super()._own_state()
        return {**Engine.state_dict(self), **self._resumption.state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the engine to go on from a state; the next `run` restores all of it, in order.

        Args:
            state_dict: what `state_dict` returned, or a state of pytorch-ignite's form: progress
                and `rng_states`. The latter resumes exactly only where pytorch-ignite's own does.

        Raises:
            TypeError: if it is not a mapping.
            ValueError: if a key is missing or unexpected, or has an illegal value.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"Argument state_dict should be a dictionary, but given {type(state_dict)}"
            )
        own = {"epoch_length", "iteration", "epoch", "max_epochs", "max_iters", "terminated"}
        full = check_keys(state_dict, {*own, RANKS, *self.state_dict_user_keys})
        if full and state_dict.get("epoch_length", 0) is None:
            # Within a first pass over data of unknown length, an iteration needs no epoch.
            super().load_state_dict({**state_dict, "iteration": 0})
            self.state.iteration = state_dict["iteration"]
        else:
            super().load_state_dict(state_dict)
        self._cursor.reset()
        if full:
            check_same_shards(state_dict, self.shards)
        self._resumption = (ExactResumption if full else Resumption)(state_dict, self)
        for key in self.state_dict_user_keys:
            setattr(self.state, key, self._resumption.snapshot[key])
        self.state.seed = self._given_seed
        if full:
            self._take_streams_and_epoch(state_dict)

    def _take_streams_and_epoch(self, state: Mapping[str, Any]) -> None:
        self.state.seed, self._streams = state["seed"], tuple(state["streams"])
        progress = state["progress"]
        open_epoch = progress["epoch"] > 0 and not progress["ended"]
        self.state.epoch = progress["epoch"] - open_epoch
        if not state["exact"]:
            warn_inexact("the state was written in the middle of an iteration")
        older = [what for key, what in OPTIONAL_KEYS.items() if key not in state]
        self.proof.unchecked += [f"{what} (the state is an older version's)" for what in older]

    # ---------------------------------------------------------------- the run

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._resumption = None

    def _continue(self) -> State:
        if self._session is None:
            # Data that was set before the run: it is opened when the run has come to it.
            self._data_iter = None
            if isinstance(self._step, OwnStep):
                self._step.watch()
            if self._resumption is not None:
                self._resumption.take_up()
        arithmetic = (
            nullcontext() if self.backend is None else self.backend.deterministic(self._warn_only)
        )
        try:
            with arithmetic:
                return super()._continue()
        finally:
            if self._session is None:
                # Workers stop with the run.
                self._cursor.close()
                if self._resumption is not None:
                    self._resumption.run_has_ended()

    def _begins(self) -> None:
        super()._begins()
        if self._resumption is not None:
            self._resumption.run_begins()

    def _epoch_begins(self) -> None:
        if self._resumption is not None:
            self._resumption.epoch_begins()
        super()._epoch_begins()

    def _ends(self) -> None:
        if self._resumption is not None:
            self._resumption.run_ends()

    # ---------------------------------------------------------------- the data

    def set_data(self, data: Iterable[Any]) -> None:
        """Takes the next batch, and all after it, from other data, as another pass of the run.

        A state that is written after this says so: resume it with this data, given to `run` or set
        by the same handler.

        Args:
            data: what `run` takes.

        Raises:
            TypeError: if it is not iterable.
        """
        check_iterable(data)
        resumption = self._resumption
        if resumption is None:
            self._cursor.exchange()
        elif self._place.open and resumption.is_of_ended_epoch:
            # A handler of this epoch's beginning: the run that was saved did the same after it.
            self._cursor.exchange(resumption.snapshot["position"], self._key)
            self._resumption = None
            self._prove(data)
        self.state.dataloader = data
        if self._session is None:
            # It is opened when the run has come to it, which takes no other data then.
            self._data_iter = iter(())
        elif self._resumption is not None:
            self._data_iter = None
        else:
            self._data_iter = self._open_data()

    def _prove(self, data: Any) -> None:
        """Has data that was set at a resumed epoch's beginning fetched twice, and compared."""
        if self.checks.batch_before == "off":
            return
        self.proof.unchecked.append("the batch before: set_data() has left its pass")
        with random_states_kept(self.backend):
            self._cursor.rehearse(data, self._key, self.proof, self.checks.batch_before)
        self.logger.info("Resumed at iteration %s. %s.", self.state.iteration, self.proof)

    def _open_data(self) -> Any:
        data = self.state.dataloader
        if self._resumption is None:
            self._cursor.open(data, self._key)
        else:
            self._resumption.open_data(data)
            # Not before: if this was the wrong data, the next run still goes on from the state.
            self._resumption = None
            self.logger.info("Resumed at iteration %s. %s.", self.state.iteration, self.proof)
        self.loaded_with = {}
        return self._cursor

    def _reopen_data(self) -> Iterator[Any]:
        self._cursor.open_next_pass(self.state.dataloader, self._key)
        return self._cursor
