"""What ours promises by itself: errors that help, events of others, deferred output, logs."""

from __future__ import annotations

import logging
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import ignite.engine
import pytest
import torch
from differential import Expected

from crosstrain.engine import DeterministicEngine, Engine, EventEnum, Events, State
from crosstrain.engine.state import Unread


def nothing(engine: Any, batch: Any) -> None:
    """A step that does nothing."""


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("data", [3, 2.5, object(), nothing, torch.nn.Linear(1, 1)])
def test_data_that_is_not_iterable(data: Any) -> None:
    engine = Engine(nothing)
    for call in (engine.run, engine.set_data):
        with pytest.raises(TypeError, match=r"should be iterable: a list.*got <class"):
            call(data)


def test_a_dataset_in_place_of_a_loader() -> None:
    class Dataset(torch.utils.data.Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(TypeError, match="DataLoader"):
        Engine(nothing).run(Dataset())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (None, "processing function in order to run: a callable of .engine, batch., got None"),
        (lambda: None, r"'process_function': takes parameters \[\] but will be called with"),
        (lambda engine: None, r"takes parameters \['engine'\] but will be called with .*Engine"),
        (lambda engine, batch, *, loss: None, "missing a required .*argument: 'loss'"),
    ],
)
def test_a_process_function_of_the_wrong_form(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(function)


def test_a_process_function_or_handler_that_is_not_callable() -> None:
    with pytest.raises(TypeError, match="3 'process_function': it is not callable"):
        Engine(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'no' 'handler': it is not callable\. Pass a function"):
        Engine(nothing).add_event_handler(Events.STARTED, "no")  # type: ignore[arg-type]


def test_a_handler_of_the_wrong_form() -> None:
    engine = Engine(nothing)

    def handler(engine: Engine, one: int, two: int) -> None: ...

    with pytest.raises(ValueError, match=r"\['engine', 'one', 'two'\] but will be called with"):
        engine.add_event_handler(Events.STARTED, handler, 1)
    with pytest.raises(ValueError, match=r"'key'\).*Nor can it be called without the engine"):
        engine.add_event_handler(Events.STARTED, handler, 1, 2, key=3)
    with pytest.raises(ValueError, match=r"its parameters cannot be read.*function of your own"):
        engine.add_event_handler(Events.STARTED, dict.fromkeys([1]).update)
    assert not engine.has_event_handler(handler)


def test_an_unknown_event() -> None:
    class Own(EventEnum):
        TICK = "tick"

    engine = Engine(nothing)
    message = r"TICK is not a valid event for this Engine. Registered events: EPOCH_STARTED.*regi"
    for call in (
        lambda: engine.add_event_handler(Own.TICK, print),
        lambda: engine.add_event_handler(Events.STARTED | Own.TICK, print),
        lambda: engine.fire_event(Own.TICK),
        lambda: engine.on(Own.TICK)(lambda: None),
        lambda: engine.slot(Own.TICK),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not engine.has_event_handler(print)
    for wrong in (None, 3, Events, "tick"):
        with pytest.raises(ValueError, match="is not a valid event"):
            engine.add_event_handler(wrong, print)


def test_events_that_cannot_be_registered() -> None:
    engine = Engine(nothing)
    with pytest.raises(TypeError, match=r"Value at 1 of event_names.*given 3"):
        engine.register_events("fine", 3)
    assert not engine.has_registered_events("fine")
    with pytest.raises(ValueError, match=r"event_to_attr to be dictionary.*list"):
        engine.register_events("fine", event_to_attr=["fine"])  # type: ignore[arg-type]


def test_removing_what_is_not_attached() -> None:
    engine = Engine(nothing)
    with pytest.raises(ValueError, match=r"STARTED' does not exist.*Events with handlers: none"):
        engine.remove_event_handler(nothing, Events.STARTED)
    engine.add_event_handler(Events.STARTED, print)
    with pytest.raises(ValueError, match=r"nothing.*is not found.*STARTED: \[<built-in"):
        engine.remove_event_handler(nothing, Events.STARTED)


def test_lengths_and_limits_that_do_not_go_together() -> None:
    engine = Engine(nothing)
    with pytest.raises(ValueError, match=r"epoch_length should be provided if data is None.*100"):
        engine.run()
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate)
    engine.run([1, 2, 3], max_epochs=3)
    with pytest.raises(ValueError, match=r"given 5 vs 3\. Leave it out, or set"):
        engine.run([1, 2, 3], epoch_length=5)
    with pytest.raises(ValueError, match=r"mutually exclusive.*max_epochs=3, max_iters=4"):
        engine.run([1, 2, 3], max_epochs=3, max_iters=4)
    with pytest.raises(ValueError, match=r"state\.max_epochs = None' before.*It is 3"):
        engine.run([1, 2, 3], max_iters=9)
    assert engine.run([1, 2, 3]).epoch == 3
    with pytest.raises(ValueError, match="start epoch defined in the state: 2 vs 3"):
        engine.run([1, 2, 3], max_epochs=2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 1, "iteration": 2}, r"only one of 'iteration' or 'epoch' keys.*both: 2 and 1"),
        ({}, r"state attribute 'iteration' is absent.*\['max_epochs', 'epoch_length'\]"),
        ({"epoch": 1, "max_iters": 3}, r"exactly one of '\('max_epochs', 'max_iters'\)'"),
        ({"epoch": 1.5}, "'epoch' should be an integer of at least 0, got 1.5"),
        ({"iteration": -1}, "'iteration' should be an integer of at least 0, got -1"),
        ({"epoch": 1, "epoch_length": None}, "epoch_length must be a positive integer"),
        ({"epoch": 1, "epoch_length": -3}, r"epoch_length must be a positive integer.*-3"),
        ({"epoch": 1, "max_epochs": 2.5}, "max_epochs is invalid: 2.5"),
        ({"epoch": 4}, "start epoch defined in the state: 3 vs 4"),
    ],
)
def test_states_that_are_refused(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(nothing).load_state_dict({"max_epochs": 3, "epoch_length": 5, **state})


def test_a_state_without_what_it_needs() -> None:
    engine = Engine(nothing)
    engine.state_dict_user_keys += ["alpha"]
    with pytest.raises(ValueError, match="state attribute 'epoch_length' is absent"):
        engine.load_state_dict({"epoch": 1, "max_epochs": 3})
    with pytest.raises(ValueError, match="user state attribute 'alpha' is absent"):
        engine.load_state_dict({"epoch": 1, "max_epochs": 3, "epoch_length": 2})
    with pytest.raises(ValueError, match=r"exactly one of '\('max_epochs', 'max_iters'\)'.*none"):
        engine.load_state_dict({"epoch": 1, "epoch_length": 2})
    with pytest.raises(TypeError, match="should be a dictionary, but given <class 'NoneType'>"):
        engine.load_state_dict(None)  # type: ignore[arg-type]


def test_terminate_epoch_before_the_epoch_has_a_batch() -> None:
    for event in (Events.STARTED, Events.EPOCH_STARTED):
        engine = Engine(nothing)
        engine.add_event_handler(event, engine.terminate_epoch)
        with pytest.raises(RuntimeError, match=r"should not be called on.*or terminate\(\)"):
            engine.run([1, 2])


def test_run_inside_a_run() -> None:
    engine = Engine(nothing)
    errors: list[str] = []

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def again() -> None:
        with pytest.raises(RuntimeError, match=r"same run\. Use another Engine for an inner loop"):
            engine.run([1, 2])
        errors.append("refused")

    assert engine.run([1, 2, 3], max_epochs=2).iteration == 6
    assert errors == ["refused"]


# ---------------------------------------------------------------- events of another library


def test_events_of_ignite_on_our_engine() -> None:
    theirs = ignite.engine.Events
    engine = Engine(nothing)
    seen: list[Any] = []
    for event in (
        theirs.EPOCH_COMPLETED,
        theirs.ITERATION_COMPLETED(every=2),
        theirs.ITERATION_COMPLETED(event_filter=lambda engine, count: count == 3),
        theirs.STARTED | theirs.COMPLETED,
        Events.STARTED | theirs.COMPLETED(every=2),
    ):
        engine.add_event_handler(event, lambda engine: seen.append(engine.last_event_name.name))
    engine.run([1, 2, 3], max_epochs=2)
    assert seen == (
        ["STARTED"] * 2
        + ["ITERATION_COMPLETED", "ITERATION_COMPLETED", "EPOCH_COMPLETED"]
        + ["ITERATION_COMPLETED", "ITERATION_COMPLETED", "EPOCH_COMPLETED"]
        + ["COMPLETED"] * 2
    )


@pytest.mark.parametrize("event", list(Events), ids=lambda event: event.name)
def test_an_event_of_ignite_is_ours_of_its_name(event: Events) -> None:
    theirs = ignite.engine.Events[event.name]
    assert event == theirs
    assert theirs == event
    assert hash(event) == hash(theirs)
    assert {event: 1}[theirs] == {theirs: 1}[event] == 1
    assert event(every=2) == theirs
    engine = Engine(nothing)
    assert engine.has_registered_events(theirs)
    state = State(iteration=5, epoch=2)
    if event.name in State.event_to_attr:
        assert state.get_event_attrib_value(theirs) == state.get_event_attrib_value(event) > 0


def test_custom_events_of_ignite_on_our_engine() -> None:
    class Theirs(ignite.engine.EventEnum):
        TICK = "tick"

    def step(engine: Any, batch: int) -> None:
        engine.state.ticks += 1
        engine.fire_event(Theirs.TICK)

    engine = Engine(step)
    engine.register_events(*Theirs, event_to_attr={Theirs.TICK: "ticks"})
    seen: list[int] = []
    engine.add_event_handler(Theirs.TICK(every=2), lambda engine: seen.append(engine.state.ticks))
    engine.run(range(5))
    assert seen == [2, 4]


def test_events_are_pickled_by_name() -> None:
    event = Events.EPOCH_STARTED
    assert pickle.loads(pickle.dumps(event)) is event
    assert pickle.loads(pickle.dumps(event(every=2, after=1))).gate == event(every=2, after=1).gate


# ---------------------------------------------------------------- deferred output


class Tensor:
    """Counts how often it is read."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.reads = 0

    def item(self) -> float:
        self.reads += 1
        return self.value


def test_an_output_is_read_when_somebody_asks_and_once() -> None:
    tensors = [Tensor(float(number)) for number in range(6)]
    engine = Engine(lambda engine, batch: Unread(tensors[batch]))
    seen: list[float] = []

    @engine.on(Events.ITERATION_COMPLETED(every=3))
    def look() -> None:
        seen.append(engine.state.output)
        seen.append(engine.state.output)

    engine.run(range(6))
    assert seen == [2.0, 2.0, 5.0, 5.0]
    assert [tensor.reads for tensor in tensors] == [0, 0, 1, 0, 0, 1]
    assert engine.state.raw_output.tensor is tensors[5]
    assert "output: <class 'crosstrain.engine.state.Unread'>" in repr(engine.state)
    assert tensors[5].reads == 1


def test_an_output_of_a_real_tensor() -> None:
    engine = Engine(lambda engine, batch: Unread((batch * 2.5).sum().detach()))
    assert engine.run([torch.ones(2)]).output == 5.0
    engine.state.output = "mine"
    assert engine.state.output == engine.state.raw_output == "mine"


def test_the_last_batch_is_free_while_the_next_is_fetched() -> None:
    class Data:
        def __iter__(self) -> Iterator[torch.Tensor]:
            previous: weakref.ref[torch.Tensor] | None = None
            for _ in range(3):
                alive.append(previous is not None and previous() is not None)
                batch = torch.zeros(3)
                previous = weakref.ref(batch)
                yield batch
                del batch

    alive: list[bool] = []
    Engine(nothing).run(Data())
    assert alive == [False] * 3


# ---------------------------------------------------------------- logs


def test_each_event_is_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="crosstrain")
    engine = Engine(nothing)
    assert engine.logger.name == "crosstrain.engine.Engine"
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate_epoch)
    engine.run([1, 2], max_epochs=1)
    engine.run([1, 2], max_epochs=2)
    fired = [
        record.getMessage().rpartition(".")[2]
        for record in caplog.records
        if "Firing handlers" in record.getMessage()
    ]
    iteration = [
        "GET_BATCH_STARTED",
        "GET_BATCH_COMPLETED",
        "ITERATION_STARTED",
        "ITERATION_COMPLETED",
    ]
    assert fired == [
        *("STARTED", "EPOCH_STARTED", *iteration, *iteration, "EPOCH_COMPLETED", "COMPLETED"),
        *("STARTED", "EPOCH_STARTED", *iteration),
        *("TERMINATE_SINGLE_EPOCH", "EPOCH_COMPLETED", "COMPLETED"),
    ]
    assert "1 | 2, Firing handlers for event Events.ITERATION_COMPLETED" in caplog.text
    assert "Added handler" in caplog.text


def test_the_level_is_read_when_an_epoch_begins(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), engine.interrupt)
    with caplog.at_level(logging.INFO, logger="crosstrain"):
        engine.run([1, 2], max_epochs=2)
        assert "Run begins: 2 epochs of 2 iterations" in caplog.text
        assert "Pause asked for" in caplog.text
        assert "Firing" not in caplog.text
    with caplog.at_level(logging.DEBUG, logger="crosstrain"):
        engine.run()
        assert "2 | 3, Firing handlers for event Events.ITERATION_STARTED" in caplog.text
    caplog.clear()
    engine.run([1, 2])
    assert caplog.text == ""


def test_a_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail(engine: Engine, batch: int) -> None:
        raise Expected("on purpose")

    with pytest.raises(Expected):
        Engine(fail).run([1, 2])
    assert "Exception at iteration 1: Expected('on purpose')" in caplog.text
    # As text: a record that is kept keeps no batch alive.
    assert not any(isinstance(arg, Expected) for arg in caplog.records[-1].args or ())


def test_the_logger_of_a_subclass_has_its_name() -> None:
    class Own(Engine):
        pass

    assert Own(nothing).logger.name == "crosstrain.engine.Own"


@pytest.mark.parametrize("kind", [Engine, DeterministicEngine])
def test_a_spec_in_place_of_a_backend_is_an_error_that_says_how_to_open_one(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"not 'cpu'.*get\(spec\).open\(\)"):
        kind(lambda engine, batch: None, "cpu")
