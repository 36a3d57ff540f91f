"""An engine that is no longer used is freed at once, and what it held with it."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from differential import Expected, nothing
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from crosstrain.engine import (
    DeterministicEngine,
    Engine,
    Events,
    RemovableEventHandle,
    create_supervised_trainer,
    resume_or_start,
)


def fails_at_three(engine: Any, batch: Any) -> None:
    """A step that fails at iteration 3."""
    if engine.state.iteration == 3:
        raise Expected


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed is freed by reference counting alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Holder:
    """An object with a handler."""

    def __init__(self) -> None:
        self.seen = 0

    def handler(self, engine: Engine) -> None:
        self.seen += 1


def deal(engine: Engine, error: BaseException) -> None:
    """A handler of EXCEPTION_RAISED."""


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("end", ["new", "run", "terminated", "raised", "dealt", "debug"])
def test_an_engine_is_freed_at_once(end: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(fails_at_three if end in ("raised", "dealt") else nothing)
    holder = Holder()
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), holder.handler)
    engine.add_event_handler(Events.STARTED | Events.COMPLETED, lambda engine, number: None, 1)
    if end == "terminated":
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), Engine.terminate)
    if end == "dealt":
        engine.add_event_handler(Events.EXCEPTION_RAISED, deal)
    if end == "debug":
        caplog.set_level(logging.DEBUG, logger="crosstrain")
    if end == "raised":
        with pytest.raises(Expected) as caught:
            engine.run([1, 2, 3], max_epochs=2)
        # The traceback holds the frames of the run.
        del caught
    elif end != "new":
        engine.run([1, 2, 3], max_epochs=2)
    gone = weakref.ref(engine)
    del engine
    assert gone() is None
    assert handle.engine() is None
    handle.remove()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("runs", [0, 1, 2])
def test_a_trainer_that_resumes_is_freed_at_once(
    tmp_path: Path, deterministic: bool, runs: int
) -> None:
    """The run that `resume_or_start` returns does not keep its trainer."""
    data = [(torch.ones(2, 1), torch.ones(2, 1))] * 3
    for _ in range(max(runs, 1)):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = create_supervised_trainer(
            model,
            optimizer,
            torch.nn.functional.mse_loss,
            backend="cpu",
            deterministic=deterministic,
        )
        to_save = {"model": model, "optimizer": optimizer}
        run = resume_or_start(trainer, to_save, tmp_path, every=Events.EPOCH_COMPLETED)
        if runs:
            trainer.run(data, max_epochs=len(list(tmp_path.glob("*.pt"))) + 1)
        gone = weakref.ref(trainer)
        del trainer
        assert gone() is None
        del run


@pytest.mark.usefixtures("no_collector")
def test_what_a_failed_step_held_is_not_kept() -> None:
    class Big:
        pass

    def fail(engine: Engine, batch: int) -> None:
        local = Big()
        kept.append(weakref.ref(local))
        raise Expected

    kept: list[weakref.ref[Big]] = []
    engine = Engine(fail)
    with contextlib.suppress(Expected):
        engine.run([1])
    assert kept[0]() is None


@pytest.mark.usefixtures("no_collector")
def test_a_handle_keeps_nothing_alive() -> None:
    engine = Engine(nothing)
    holder = Holder()
    handle = engine.add_event_handler(Events.STARTED, holder.handler)
    gone = weakref.ref(holder)
    engine.remove_event_handler(holder.handler, Events.STARTED)
    del holder
    assert gone() is None
    assert handle.handler() is None
    handle.remove()


def test_a_paused_engine_is_collected() -> None:
    raised: list[BaseException] = []
    closed: list[str] = []

    def data() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append("closed")

    engine = Engine(nothing)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda error: raised.append(error))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), Engine.interrupt)
    engine.run(data(), epoch_length=5)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert closed == ["closed"]
    assert raised == []


@pytest.mark.parametrize("kind", [Engine, DeterministicEngine])
@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
def test_the_workers_of_a_collected_engine_are_told_to_end(
    kind: Any, loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait for each 5 s and kill it: its queue is closed before it is told."""
    killed: list[Any] = []
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "terminate", killed.append)

    def pause() -> None:
        engine = kind(nothing)
        # A cycle of the user's, as any handler that refers to the trainer makes one.
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: engine.interrupt())
        engine.run(loader(torch.arange(8.0), num_workers=2))
        assert set(multiprocessing.active_children()) > before

    before = set(multiprocessing.active_children())
    pause()
    gc.collect()
    assert killed == []
    assert set(multiprocessing.active_children()) == before


def test_bound_methods_as_handlers() -> None:
    holder = Holder()
    engine = Engine(nothing)
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED, holder.handler)
    assert isinstance(handle, RemovableEventHandle)
    assert engine.has_event_handler(holder.handler, Events.ITERATION_COMPLETED)
    assert not engine.has_event_handler(Holder().handler)
    engine.run([1, 2])
    handle.remove()
    engine.run([1, 2])
    assert holder.seen == 2
    with engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), holder.handler):
        engine.run([1, 2])
    engine.run([1, 2])
    assert holder.seen == 3


def test_callables_without_weak_references() -> None:
    class Slotted:
        __slots__ = ("seen",)

        def __init__(self) -> None:
            self.seen = 0

        def __call__(self, engine: Engine) -> None:
            self.seen += 1

    handler = Slotted()
    engine = Engine(nothing)
    with engine.add_event_handler(Events.ITERATION_COMPLETED, handler):
        engine.run([1, 2])
    engine.run([1, 2])
    assert handler.seen == 2


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="Python 3.13 keeps attributes in place all the same"
)
def test_nothing_asks_for_the_dictionary_of_an_engine_when_it_is_made() -> None:
    """From then on Python would look up each attribute there: the loop took 40 % longer.

    So it would with more than 30 attributes, which a `DeterministicEngine` has.
    """
    engine = Engine(lambda engine, batch: None)
    dictionaries = [one for one in gc.get_referents(engine) if isinstance(one, dict)]
    assert not any("last_event_name" in one for one in dictionaries)
    vars(engine)
    dictionaries = [one for one in gc.get_referents(engine) if isinstance(one, dict)]
    assert any("last_event_name" in one for one in dictionaries)
