"""How far a run is and how far it shall go: the rules by which `run` starts, resumes and ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .state import State

__all__ = ["begin", "check_limits", "data_length", "is_done", "load_progress", "resume"]


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


def check_limits(state: State, max_epochs: int | None, max_iters: int | None) -> None:
    """Checks new limits against a state that may have made progress already, and takes them.

    Raises:
        ValueError: if both are given, one is below 1 or below what is done, or the state counts by
            the other one.
    """
    if max_epochs is not None and max_iters is not None:
        raise ValueError(
            "Arguments max_iters and max_epochs are mutually exclusive. Please provide only "
            f"max_epochs or max_iters; got max_epochs={max_epochs}, max_iters={max_iters}."
        )
    for wanted, name, other in (
        (max_iters, "max_iters", "max_epochs"),
        (max_epochs, "max_epochs", "max_iters"),
    ):
        if wanted is not None and getattr(state, other) is not None:
            raise ValueError(
                f"To switch from {other} to {name} mode during resume, you must first reset by "
                f"setting 'engine.state.{other} = None' before calling run(). It is "
                f"{getattr(state, other)}."
            )
    if state.max_epochs is not None:
        _take_limit(state, "max_epochs", max_epochs, "epoch")
    if state.max_iters is not None:
        _take_limit(state, "max_iters", max_iters, "iteration")


def _take_limit(state: State, name: str, value: int | None, counter: str) -> None:
    if value is None:
        return
    _check_positive(name, value)
    done = getattr(state, counter)
    if value < done:
        raise ValueError(
            f"Argument {name} should be greater than or equal to the start {counter} defined in "
            f"the state: {value} vs {done}. Please, set engine.state.{name} = None before calling "
            "engine.run() in order to restart the training from the beginning."
        )
    setattr(state, name, value)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(
            f"Argument {name} is invalid: {value}. Please, set a correct {name} positive value, at "
            "least 1."
        )


def begin(
    state: State,
    data: Iterable[Any] | None,
    max_epochs: int | None,
    max_iters: int | None,
    epoch_length: int | None,
) -> None:
    """Sets a state to the start of a new run.

    Raises:
        ValueError: if the data is empty, or there is neither data nor an epoch length.
    """
    for name, limit in (("max_epochs", max_epochs), ("max_iters", max_iters)):
        if limit is not None:
            _check_positive(name, limit)
    known = epoch_length if epoch_length is not None else _length_of(data)
    if known is None:
        known = state.epoch_length
    _check_epoch_length(known, data)
    state.iteration = 0
    state.epoch = 0
    state.max_epochs = 1 if max_epochs is None and max_iters is None else max_epochs
    state.max_iters = max_iters
    state.epoch_length = known


def resume(state: State, data: Iterable[Any] | None, epoch_length: int | None) -> None:
    """Checks that a state that has iterations left can go on with this data.

    Raises:
        ValueError: if `epoch_length` differs from the state's, the data is empty, or there is
            neither data nor an epoch length.
    """
    if state.epoch_length is None:
        known = epoch_length if epoch_length is not None else _length_of(data)
        _check_epoch_length(known, data)
        state.epoch_length = known
    elif epoch_length is not None and epoch_length != state.epoch_length:
        raise ValueError(
            "Argument epoch_length should be same as in the state, but given "
            f"{epoch_length} vs {state.epoch_length}. Leave it out, or set "
            "engine.state.max_epochs = None to start a new run."
        )


def _length_of(data: Iterable[Any] | None) -> int | None:
    return None if data is None else data_length(data)


def _check_epoch_length(length: int | None, data: Iterable[Any] | None) -> None:
    if length is None and data is None:
        raise ValueError(
            "epoch_length should be provided if data is None: it is the number of iterations that "
            "make an epoch, such as run(max_epochs=3, epoch_length=100)"
        )
    if length is not None and length < 1:
        given = f"epoch_length={length}" if data is None else f"{type(data).__name__} of {length}"
        raise ValueError(
            f"Input data has zero size ({given}). Please provide non-empty data: an epoch has at "
            "least one iteration"
        )


def load_progress(state: State, values: Mapping[str, Any]) -> None:
    """Sets a state's counters and limits from a dictionary.

    Args:
        state: the state to set.
        values: `epoch_length`, one of `iteration` and `epoch` (of completed ones), and one of
            `max_epochs` and `max_iters`.

    Raises:
        TypeError: if `values` is not a mapping.
        ValueError: if a key is missing or contradicts another, or a value is out of range.
    """
    if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"Argument state_dict should be a dictionary, but given {type(values)}")
    _require_one(values, "iteration", "epoch")
    _require_one(values, "max_epochs", "max_iters")
    if "epoch_length" not in values:
        raise ValueError(
            "Required state attribute 'epoch_length' is absent in provided state_dict "
            f"'{list(values)}'"
        )
    iteration, epoch = _position(values)
    state.epoch_length, state.iteration, state.epoch = values["epoch_length"], iteration, epoch
    state.max_epochs = state.max_iters = None
    if "max_epochs" in values:
        _take_limit(state, "max_epochs", values["max_epochs"], "epoch")
    else:
        _take_limit(state, "max_iters", values["max_iters"], "iteration")


def _require_one(values: Mapping[str, Any], first: str, second: str) -> None:
    found = [name for name in (first, second) if name in values]
    if len(found) != 1:
        raise ValueError(
            f"state_dict should contain exactly one of '({first!r}, {second!r})' keys, found "
            f"{found or 'none'} in {list(values)}"
        )


def _position(values: Mapping[str, Any]) -> tuple[int, int]:
    name = "iteration" if "iteration" in values else "epoch"
    done, length = values[name], values["epoch_length"]
    if not isinstance(done, int) or done < 0:
        raise ValueError(f"state_dict's '{name}' should be an integer of at least 0, got {done!r}")
    if done == 0:
        return 0, 0
    if length is None or length <= 0:
        raise ValueError(
            "epoch_length must be a positive integer to calculate missing 'iteration' or 'epoch' "
            f"key, got {length!r}. Input state_dict keys: {list(values)}"
        )
    return (done, done // length) if name == "iteration" else (done * length, done)
