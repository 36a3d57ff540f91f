"""How far a run is and how far it shall go: the rules by which `run` starts, resumes and ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .errors import EmptyData
from .state import State


@dataclass(slots=True)
class Place:
    """Where a run is between two of its steps, and what it owes; another run begins with a new one.

    Args:
        began: after which iteration the epoch began that is open, or was the last to be.
        stepped: the last iteration whose step is done; within an epoch it is kept only where
            something is called after each step, as a `DeterministicEngine` has it.
        within: how many iterations the epoch that is begun next has behind it already; None: as
            many as the state's counters leave.
        open: whether an epoch has begun and has neither ended nor been left by the run.
        ended: whether the epoch that was begun last has ended.
        broken: whether an exception left an iteration before its step's end: it is done again.
        loaded: whether a state was loaded and no run has gone on from it: the next one does, even
            where nothing is left to do.
        owed: what a loaded state had still to do, as bits of `Engine.asked`.
    """

    began: int = 0
    stepped: int = 0
    within: int | None = None
    open: bool = False
    ended: bool = False
    broken: bool = False
    loaded: bool = False
    owed: int = 0

    def leave(self) -> None:
        """Says that the run leaves the open epoch; the next one is begun from its beginning."""
        self.open, self.within = False, 0

    def end_epoch(self) -> None:
        """Says that the open epoch has ended."""
        self.leave()
        self.ended = True


def data_length(data: Any) -> int | None:
    """Returns the number of batches that `data` gives, or None where it does not tell."""
    try:
        return len(data)
    except TypeError:
        # No __len__, or a DataLoader over an iterable dataset, whose __len__ raises this.
        return None


def is_done(state: State) -> bool:
    """Tells whether a state has reached its limit of iterations or epochs."""
    if state.max_iters is not None and state.iteration >= state.max_iters:
        return True
    if state.max_epochs is None:
        return False
    if state.epoch >= state.max_epochs:
        return True
    length = state.epoch_length
    return length is not None and state.iteration >= length * state.max_epochs


def check_limits(
    state: State, max_epochs: int | None, max_iters: int | None, may_be_behind: bool = False
) -> None:
    """Checks new limits against a state that may have made progress already, and takes them.

    They may be below what is done where the run that they are of was before.
    """
    if max_epochs is not None and max_iters is not None:
        raise ValueError(
            "Arguments max_iters and max_epochs are mutually exclusive. Please provide only "
            f"max_epochs or max_iters; got max_epochs={max_epochs}, max_iters={max_iters}."
        )
    for wanted, name, other, counter in (
        (max_iters, "max_iters", "max_epochs", "iteration"),
        (max_epochs, "max_epochs", "max_iters", "epoch"),
    ):
        if wanted is None:
            continue
        check_count(name, wanted)
        if getattr(state, other) is not None:
            raise ValueError(
                f"To switch from {other} to {name} mode during resume, you must first reset by "
                f"setting 'engine.state.{other} = None' before calling run(). It is "
                f"{getattr(state, other)}."
            )
        if getattr(state, name) is not None:
            if not may_be_behind:
                _check_not_behind(name, wanted, counter, getattr(state, counter))
            setattr(state, name, wanted)


def _check_not_behind(name: str, value: int, counter: str, done: int) -> None:
    if value < done:
        raise ValueError(
            f"Argument {name} should be greater than or equal to the start {counter} defined in "
            f"the state: {value} vs {done}. Please, set engine.state.{name} = None before calling "
            "engine.run() in order to restart the training from the beginning."
        )


def check_count(name: str, value: Any) -> None:
    """Checks that a limit or a length is an integer of at least 1."""
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(
            f"Argument {name} is invalid: {value!r}. Please, set a correct {name} positive value, "
            "an integer of at least 1."
        )


def begin(
    state: State,
    data: Iterable[Any] | None,
    max_epochs: int | None,
    max_iters: int | None,
    epoch_length: int | None,
) -> None:
    """Sets a state to the start of a new run; the limits have been checked."""
    length = _length(state, data, epoch_length)
    state.iteration = 0
    state.epoch = 0
    state.max_epochs = 1 if max_epochs is None and max_iters is None else max_epochs
    state.max_iters = max_iters
    state.epoch_length = length


def resume(state: State, data: Iterable[Any] | None, epoch_length: int | None) -> None:
    """Checks that a state that has iterations left can go on with this data."""
    if state.epoch_length is None:
        state.epoch_length = _length(state, data, epoch_length)
    elif epoch_length is not None and epoch_length != state.epoch_length:
        raise ValueError(
            "Argument epoch_length should be same as in the state, but given "
            f"{epoch_length} vs {state.epoch_length}. Leave it out, or set "
            "engine.state.max_epochs = None to start a new run."
        )


def _length(state: State, data: Iterable[Any] | None, epoch_length: int | None) -> int | None:
    """Returns the length of an epoch: the one that is given, the data's, or else the state's."""
    if epoch_length is not None:
        check_count("epoch_length", epoch_length)
        return epoch_length
    length = None if data is None else data_length(data)
    if length == 0:
        raise EmptyData(
            "Input data has zero size. Please provide non-empty data: an epoch has at least one "
            f"iteration, and this {type(data).__name__} has the length 0."
        )
    if length is None:
        length = state.epoch_length
    if length is None and data is None:
        raise ValueError(
            "epoch_length should be provided if data is None: it is the number of iterations that "
            "make an epoch, such as run(max_epochs=3, epoch_length=100)"
        )
    return length


def load_progress(state: State, values: Mapping[str, Any], user_keys: Sequence[str] = ()) -> None:
    """Sets a state's counters and limits from a dictionary; leaves it as it was if one is bad.

    It has `epoch_length`, one of `iteration` and `epoch` (of completed ones), one of `max_epochs`
    and `max_iters`, and `user_keys`.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"Argument state_dict should be a dictionary, but given {type(values)}")
    _require(values, "epoch_length", "state")
    if "epoch" not in values:
        _require(values, "iteration", "state")
    elif "iteration" in values:
        raise ValueError(
            "State dictionary should contain only one of 'iteration' or 'epoch' keys. It has both: "
            f"{values['iteration']!r} and {values['epoch']!r}"
        )
    limit = _limit_in(values)
    for key in user_keys:
        _require(values, key, "user state")
    iteration, epoch = _position(values)
    if values[limit] is not None:
        check_count(limit, values[limit])
        counter, done = ("epoch", epoch) if limit == "max_epochs" else ("iteration", iteration)
        _check_not_behind(limit, values[limit], counter, done)
    state.epoch_length, state.iteration, state.epoch = values["epoch_length"], iteration, epoch
    state.max_epochs = state.max_iters = None
    for key in (limit, *user_keys):
        setattr(state, key, values[key])


def _require(values: Mapping[str, Any], key: str, kind: str) -> None:
    if key not in values:
        raise ValueError(
            f"Required {kind} attribute '{key}' is absent in provided state_dict '{list(values)}'"
        )


def _limit_in(values: Mapping[str, Any]) -> str:
    found = [name for name in ("max_epochs", "max_iters") if name in values]
    if len(found) != 1:
        raise ValueError(
            "state_dict should contain exactly one of '('max_epochs', 'max_iters')' keys, found "
            f"{found or 'none'} in {list(values)}"
        )
    return found[0]


def _position(values: Mapping[str, Any]) -> tuple[int, int]:
    name = "iteration" if "iteration" in values else "epoch"
    done, length = values[name], values["epoch_length"]
    if not isinstance(done, Integral) or int(done) < 0:
        raise ValueError(f"state_dict's '{name}' should be an integer of at least 0, got {done!r}")
    done = int(done)
    if length is None and done == 0:
        return 0, 0
    if not isinstance(length, Integral) or int(length) < 1:
        raise ValueError(
            "epoch_length must be a positive integer to calculate missing 'iteration' or 'epoch' "
            f"key. It is {length!r} in the state_dict"
        )
    length = int(length)
    return (done, done // length) if name == "iteration" else (done * length, done)
