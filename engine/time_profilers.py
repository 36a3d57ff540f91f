"""Where a run's time goes: into the data, the step, or the handlers of its events.

`BasicTimeProfiler` and `HandlersTimeProfiler` give what pytorch-ignite's of these names give, whose
own insist on its own engine. They read the host's clock: work that a step has only started on a
device counts where the host first waits for it.
"""

from __future__ import annotations

import csv
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from .dispatch import Dispatcher, Phase
from .events import Events

_BASIC = (
    Events.EPOCH_STARTED,
    Events.EPOCH_COMPLETED,
    Events.STARTED,
    Events.COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
)


class _TimeProfiler:
    """What both profilers do: follow a run, from its start, and take the times between its events.

    Attributes:
        processing_times: of each iteration's step, in seconds.
        dataflow_times: of each batch, from asking for it to having it.
    """

    # Whether the time of the data includes that of the handlers that are called around it.
    _data_with_handlers = False

    def __init__(self) -> None:
        self.processing_times: list[float] = []
        self.dataflow_times: list[float] = []
        self._asked = self._started = 0.0

    def attach(self, engine: Any) -> None:
        """Follows an engine's runs from the next on; each run begins with no times.

        Raises:
            TypeError: if it is no engine of crosstrain's.
        """
        if not isinstance(engine, Dispatcher):
            raise TypeError(
                f"Argument engine should be crosstrain.engine.Engine, but given {type(engine)}"
            )
        if not engine.has_event_handler(self._begin):
            engine.add_in_phase(Events.STARTED, self._begin, Phase.FIRST)
            engine.time_handlers(self._take)

    def _begin(self, engine: Any) -> None:
        self.processing_times, self.dataflow_times = [], []
        self._reset(engine)

    def _take(
        self, event: Any, handler: Callable[..., Any] | None, began: float, ended: float
    ) -> None:
        if handler is not None:
            if not _is_ours(handler):
                self._take_handler(event, handler, ended - began)
            return
        self._take_event(event, ended - began)
        if event == Events.GET_BATCH_STARTED:
            self._asked = began if self._data_with_handlers else ended
        elif event == Events.GET_BATCH_COMPLETED:
            had = ended if self._data_with_handlers else began
            self.dataflow_times.append(had - self._asked)
        elif event == Events.ITERATION_STARTED:
            self._started = ended
        elif event == Events.ITERATION_COMPLETED:
            self.processing_times.append(began - self._started)

    def _reset(self, engine: Any) -> None:
        """Forgets the times of the run before."""

    def _take_handler(self, event: Any, handler: Callable[..., Any], seconds: float) -> None:
        """Takes the time of one handler."""

    def _take_event(self, event: Any, seconds: float) -> None:
        """Takes the time of all handlers of an event."""


class BasicTimeProfiler(_TimeProfiler):
    """Tells how long data, step and each event's handlers take.

    The time of the data includes that of the handlers of GET_BATCH_STARTED and
    GET_BATCH_COMPLETED.

    Attributes:
        event_handlers_times: of each event, how long all its handlers took each time.
        event_handlers_names: the handlers of each event at the run's start.
    """

    _data_with_handlers = True

    def __init__(self) -> None:
        super().__init__()
        self.event_handlers_times: dict[Any, list[float]] = {event: [] for event in _BASIC}
        self.event_handlers_names: dict[Any, list[str]] = {event: [] for event in _BASIC}
        self._epochs: list[int] = []
        self._state: Any = None

    def _reset(self, engine: Any) -> None:
        self.event_handlers_times = {event: [] for event in _BASIC}
        self.event_handlers_names = {event: _handlers_of(engine, event) for event in _BASIC}
        self._epochs, self._state = [], engine.state

    def _take_event(self, event: Any, seconds: float) -> None:
        if event in self.event_handlers_times:
            self.event_handlers_times[event].append(seconds)
        if event == Events.ITERATION_COMPLETED:
            self._epochs.append(self._state.epoch)

    def get_results(self) -> dict[str, dict[str, Any]]:
        """Returns totals, extremes with their index, means and deviations, in seconds.

        Its keys are `processing_stats`, `dataflow_stats`, `event_handlers_stats` (by the event's
        name, and `total_time`) and `event_handlers_names`.
        """
        times, names = self.event_handlers_times, self.event_handlers_names
        handlers: dict[str, Any] = {event.name: _statistics(times[event]) for event in _BASIC}
        handlers["total_time"] = torch.tensor(sum(map(sum, times.values())))
        return OrderedDict(
            processing_stats=_statistics(self.processing_times),
            dataflow_stats=_statistics(self.dataflow_times),
            event_handlers_stats=handlers,
            event_handlers_names={f"{event.name}_names": names[event] for event in _BASIC},
        )

    def write_results(self, output_path: str | Path) -> None:
        """Writes the times of each iteration to a CSV file; those of an epoch in each of its rows.

        Args:
            output_path: the file.
        """
        of_run = (Events.STARTED, Events.COMPLETED)
        of_epoch = (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
        of_iteration = (
            *(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED),
            *(Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED),
        )
        times = self.event_handlers_times
        rows: list[list[float]] = []
        for index, epoch in enumerate(self._epochs):
            row = [epoch, index + 1, self.processing_times[index], self.dataflow_times[index]]
            for events, place in (
                (of_run, 0),
                (of_epoch, epoch - self._epochs[0]),
                (of_iteration, index),
            ):
                # The run's end, and the last epoch's, may not have come.
                row += [times[e][place] if place < len(times[e]) else 0.0 for e in events]
            rows.append(row)
        heads = ["epoch", "iteration", "processing_stats", "dataflow_stats"]
        heads += [f"Event_{event.name}" for event in (*of_run, *of_epoch, *of_iteration)]
        _write(output_path, heads, rows)

    @staticmethod
    def print_results(results: dict[str, dict[str, Any]]) -> str:
        """Prints what `get_results` returned, and returns what it has printed."""
        lines = [
            "Time profiling stats (in seconds): total | min/index | max/index | mean | std",
            f"Processing function:\n{_line(results['processing_stats'])}",
            f"Dataflow:\n{_line(results['dataflow_stats'])}",
            f"Event handlers:\n{float(results['event_handlers_stats']['total_time']):.5f}",
        ]
        for event in _BASIC:
            names = results["event_handlers_names"][f"{event.name}_names"]
            stats = _line(results["event_handlers_stats"][event.name])
            lines.append(f"- Events.{event.name}: {names}\n{stats}")
        said = "\n\n".join(lines)
        print(said)
        return said


class HandlersTimeProfiler(_TimeProfiler):
    """Tells how long data, step and each single handler take, of events of your own as well.

    Attributes:
        event_handlers_times: of each event, by the handler's name, how long it took each time.
        event_handlers_names: the handlers of each event at the run's start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.event_handlers_times: dict[Any, dict[str, list[float]]] = {}
        self.event_handlers_names: dict[Any, list[str]] = {}

    def _reset(self, engine: Any) -> None:
        names = {event: _handlers_of(engine, event) for event in engine.registered_events()}
        self.event_handlers_names = names
        self.event_handlers_times = {e: {name: [] for name in names[e]} for e in names}

    def _take_handler(self, event: Any, handler: Callable[..., Any], seconds: float) -> None:
        of_event = self.event_handlers_times.setdefault(event, {})
        of_event.setdefault(_name_of(handler), []).append(seconds)

    def get_results(self) -> list[list[Any]]:
        """Returns a row for each handler, then those named Total, Processing and Dataflow.

        A row is the name, the event's name, the total, (least, its index), (most, its index), the
        mean and the standard deviation, in seconds.
        """
        taken = [
            (name, getattr(event, "name", str(event)), times)
            for event, handlers in self.event_handlers_times.items()
            for name, times in handlers.items()
        ]
        rows: list[list[Any]] = [[name, event, *_row(times)] for name, event, times in taken]
        total = round(sum(sum(times) for _, _, times in taken), 5)
        rows.append(["Total", "", total, "", "", "", ""])
        rows.append(["Processing", "None", *_row(self.processing_times)])
        rows.append(["Dataflow", "None", *_row(self.dataflow_times)])
        return rows

    def write_results(self, output_path: str | Path) -> None:
        """Writes all times to a CSV file: a column for each handler, filled up with zeros.

        Args:
            output_path: the file.
        """
        columns = {"processing_stats": self.processing_times, "dataflow_stats": self.dataflow_times}
        for event, handlers in self.event_handlers_times.items():
            for name, times in handlers.items():
                columns[f"{name} ({getattr(event, 'name', str(event))})"] = times
        rows = zip_longest(*columns.values(), fillvalue=0.0)
        numbered = [[index + 1, *row] for index, row in enumerate(rows)]
        _write(output_path, ["#", *columns], numbered)

    @staticmethod
    def print_results(results: list[list[Any]]) -> None:
        """Prints what `get_results` returned as a table, and leaves it as it is."""
        heads = ["Handler", "Event Name", "Total(s)"]
        heads += ["Min(s)/IDX", "Max(s)/IDX", "Mean(s)", "Std(s)"]
        table = [heads, *([_cell(value) for value in row] for row in results)]
        widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def _is_ours(handler: Callable[..., Any]) -> bool:
    return isinstance(getattr(handler, "__self__", None), _TimeProfiler)


def _handlers_of(engine: Any, event: Any) -> list[str]:
    return [_name_of(one) for one in engine.slot(event).bound() if not _is_ours(one)]


def _name_of(handler: Callable[..., Any]) -> str:
    return str(getattr(handler, "__qualname__", type(handler).__name__))


def _statistics(times: Sequence[float]) -> OrderedDict[str, Any]:
    found: OrderedDict[str, Any] = OrderedDict(total=sum(times) if times else "not yet triggered")
    if len(times) > 1:
        least, most = min(times), max(times)
        found["min/index"] = least, times.index(least)
        found["max/index"] = most, times.index(most)
        found["mean"], found["std"] = statistics.fmean(times), statistics.stdev(times)
    return found


def _row(times: Sequence[float]) -> list[Any]:
    if not times:
        return ["not triggered", ("None", "None"), ("None", "None"), "None", "None"]
    least, most = min(times), max(times)
    std: Any = round(statistics.stdev(times), 5) if len(times) > 1 else "None"
    extremes = (round(least, 5), times.index(least)), (round(most, 5), times.index(most))
    return [round(sum(times), 5), *extremes, round(statistics.fmean(times), 5), std]


def _line(stats: dict[str, Any]) -> str:
    return " | ".join(map(_number, stats.values()))


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value[0]:.5f}/{value[1]}" if isinstance(value, tuple) else f"{value:.5f}"


def _cell(value: Any) -> str:
    return f"{value[0]}/{value[1]}" if isinstance(value, tuple) else str(value)


def _write(path: str | Path, heads: list[str], rows: Sequence[Sequence[float]]) -> None:
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        writer.writerows(rows)
