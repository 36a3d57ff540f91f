"""State: what a run knows of itself, shared between the engine, the step and the handlers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from numbers import Number
from types import MappingProxyType
from typing import Any

# Which attribute of the state counts an event, by the event's name.
_COUNTERS: Mapping[Any, str] = MappingProxyType(
    {
        "GET_BATCH_STARTED": "iteration",
        "GET_BATCH_COMPLETED": "iteration",
        "ITERATION_STARTED": "iteration",
        "ITERATION_COMPLETED": "iteration",
        "EPOCH_STARTED": "epoch",
        "EPOCH_COMPLETED": "epoch",
        "STARTED": "epoch",
        "COMPLETED": "epoch",
    }
)


class Unread:
    """A value that lies on a device and is copied to the host when, and only if, it is read."""

    __slots__ = ("_number", "tensor")

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self._number: float | None = None

    def read(self) -> float:
        """Returns the value as a Python number; waits for the device the first time."""
        number = self._number
        if number is None:
            number = self._number = self.tensor.item()
        return number


class State:
    """Carries a run's counters, limits, data, batch, output, metrics and times.

    `iteration` and `epoch` count from 1 while a run goes on (0: not begun). `times` holds the
    seconds of the last epoch (`EPOCH_COMPLETED`) and of the run (`COMPLETED`). `raw_output` is what
    the step returned, as it returned it; `output` is the same, with an `Unread` value read.

    Args:
        **kwargs: further attributes to set.
    """

    event_to_attr: Mapping[Any, str] = _COUNTERS

    def __init__(self, **kwargs: Any) -> None:
        self.iteration: int = 0
        self.epoch: int = 0
        self.epoch_length: int | None = None
        self.max_epochs: int | None = None
        self.max_iters: int | None = None
        self.raw_output: Any = None
        self.batch: Any = None
        self.metrics: dict[str, Any] = {}
        self.dataloader: Iterable[Any] | None = None
        self.seed: int | None = None
        self.times: dict[str, float | None] = {"EPOCH_COMPLETED": None, "COMPLETED": None}
        self._deferred: dict[str, Callable[[], int]] = {}
        for name, value in kwargs.items():
            setattr(self, name, value)

    def defer(self, name: str, read: Callable[[], int]) -> None:
        """Has `applied_steps` or `skipped_steps` be worked out when it is first read."""
        vars(self).pop(name, None)
        self._deferred[name] = read

    @cached_property
    def applied_steps(self) -> int:
        """How often a training step changed the weights in this run; may wait for the device."""
        return self._read_deferred("applied_steps")

    @cached_property
    def skipped_steps(self) -> int:
        """How often a loss scaler skipped a training step; may wait for the device."""
        return self._read_deferred("skipped_steps")

    def _read_deferred(self, name: str) -> int:
        if name not in self._deferred:
            raise AttributeError(
                f"This state has no '{name}': only the trainer of a training step has it."
            )
        return self._deferred.pop(name)()

    @property
    def output(self) -> Any:
        """The step's output of this iteration; reading a deferred one waits for the device."""
        output = self.raw_output
        return output.read() if isinstance(output, Unread) else output

    @output.setter
    def output(self, value: Any) -> None:
        self.raw_output = value

    def count_events(self, event_to_attr: Mapping[Any, str]) -> None:
        """Adds events that are counted by attributes of this state, each set to 0 where absent.

        Args:
            event_to_attr: from an event, or its name, to the name of the attribute.
        """
        counters = dict(self.event_to_attr)
        for event, attribute in event_to_attr.items():
            counters[event if isinstance(event, str) else event.name] = attribute
            if not hasattr(self, attribute):
                setattr(self, attribute, 0)
        # On the instance: events of one engine are no business of another's.
        self.event_to_attr = counters

    def get_event_attrib_value(self, event_name: Any) -> int:
        """Returns the count of an event.

        Args:
            event_name: the event, or its name.

        Raises:
            RuntimeError: if no attribute counts this event.
        """
        name = event_name if isinstance(event_name, str) else event_name.name
        if name not in self.event_to_attr:
            raise RuntimeError(
                f"Unknown event name '{event_name}': no attribute of the state counts it. Counted "
                f"events: {', '.join(map(str, self.event_to_attr))}. Name its attribute with "
                "register_events(..., event_to_attr={event: attribute})"
            )
        count: int = getattr(self, self.event_to_attr[name])
        return count

    def __repr__(self) -> str:
        lines = ["State:"]
        for name, value in vars(self).items():
            if name in ("event_to_attr", "_deferred"):
                continue
            shown = str(value) if isinstance(value, (Number, str)) else f"{type(value)}"
            lines.append(f"\t{'output' if name == 'raw_output' else name}: {shown}")
        return "\n".join(lines) + "\n"
