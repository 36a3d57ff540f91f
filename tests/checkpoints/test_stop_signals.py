"""What a stop signal does: in its handler nothing but to set a flag; the rest at a boundary."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crosstrain.engine import DeterministicEngine, Engine, Events, resume_or_start
from crosstrain.engine.checkpoints.stop_signals import StopSignals


@pytest.fixture
def hangup() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_handler_only_sets_flags(
    name: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], hangup: None
) -> None:
    """It may run in the middle of a write to the log: it neither logs nor prints."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    number = signal.Signals[name]
    told: list[int] = []
    signals = StopSignals(noticed=told.append)
    signals.install()
    try:
        caplog.set_level(logging.DEBUG)
        os.kill(os.getpid(), number)
        assert signals.received == number
    finally:
        signals.restore()
    assert told == [number]
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_a_signal_that_is_sent_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a scheduler to each process, and by torchrun to its ranks; a later Ctrl-C ends at once."""
    told: list[int] = []
    signals = StopSignals(noticed=told.append)
    signals.install()
    try:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert told == [signal.SIGINT]
        monkeypatch.setattr("crosstrain.engine.checkpoints.stop_signals._SAME", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.restore()


@pytest.mark.parametrize("mine", [signal.SIG_IGN, lambda number, frame: None])
def test_a_hangup_that_somebody_has_set_is_left_alone(mine: object, hangup: None) -> None:
    """As under nohup."""
    signal.signal(signal.SIGHUP, mine)  # type: ignore[arg-type]
    signals = StopSignals()
    signals.install()
    try:
        assert signal.getsignal(signal.SIGHUP) is mine
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signals.restore()


def test_a_hangup_ends_a_run_saved(tmp_path: Path, hangup: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    trainer = DeterministicEngine(lambda engine, batch: None)
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=3), lambda: os.kill(os.getpid(), signal.SIGHUP)
    )
    run = resume_or_start(trainer, {"model": torch.nn.Linear(1, 1)}, tmp_path, every=100)
    trainer.run([torch.zeros(1)] * 8)
    assert (trainer.state.iteration, run.exit_code) == (3, 129)
    assert run.checkpoint.last_checkpoint == tmp_path / "checkpoint_3.pt"
    run.checkpoint.save_handler.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("broken", [False, True])
def test_it_says_saved_when_it_is(
    broken: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log does not say that a run was saved whose last checkpoint could not be written."""
    caplog.set_level(logging.INFO)
    folder = tmp_path / "run"
    trainer = DeterministicEngine(lambda engine, batch: None)

    def stop(engine: Engine) -> None:
        if broken:
            folder.rmdir()
            folder.touch()
        os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), stop)
    run = resume_or_start(trainer, {"model": torch.nn.Linear(1, 1)}, folder, every=100)
    if broken:
        with pytest.raises(OSError, match="was not saved"):
            trainer.run([torch.zeros(1)] * 8)
    else:
        trainer.run([torch.zeros(1)] * 8)
    assert ("saved at iteration 3; the run has ended" in caplog.text) == (not broken)
    run.checkpoint.save_handler.close()  # type: ignore[union-attr]


def test_a_run_in_a_handler_that_is_stopped_ends_the_one_around_it(tmp_path: Path) -> None:
    """What the handler makes of half of a run is not saved; started again, both go on."""

    def trained(stops: bool) -> list[int]:
        outer, done = Engine(lambda engine, batch: None), list[int]()

        @outer.on(Events.EPOCH_COMPLETED)
        def run_inner() -> None:
            inner = Engine(lambda engine, batch: done.append(engine.state.iteration))
            model = torch.nn.Linear(1, 1)
            within = resume_or_start(inner, {"model": model}, tmp_path / "inner", every=9)
            if stops:
                event = Events.ITERATION_COMPLETED(once=2)
                inner.add_event_handler(event, lambda: signal.raise_signal(signal.SIGTERM))
            try:
                inner.run([None] * 4, max_epochs=1)
            finally:
                within.checkpoint.save_handler.close()  # type: ignore[union-attr]

        run = resume_or_start(outer, {"model": torch.nn.Linear(1, 1)}, tmp_path / "outer", every=2)
        try:
            outer.run([None] * 3, max_epochs=1)
        finally:
            run.checkpoint.save_handler.close()  # type: ignore[union-attr]
        return done

    with pytest.raises(SystemExit) as ended:
        trained(stops=True)
    assert ended.value.code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "outer").glob("*.pt")] == ["checkpoint_2.pt"]
    assert (tmp_path / "inner" / "checkpoint_2.pt").is_file()
    assert trained(stops=False)


@pytest.mark.parametrize("logs", [True, False])
def test_a_run_says_what_it_goes_on_from(
    tmp_path: Path,
    logs: bool,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once: in the log, or, where nothing has set up logging, on stderr."""
    caplog.set_level(logging.INFO)
    if not logs:
        monkeypatch.setattr(logging.getLogger("crosstrain"), "propagate", False)
        monkeypatch.setattr(logging, "lastResort", None)
    for words in ("starts from the beginning", "Resumed from"):
        caplog.clear()
        trainer = Engine(lambda engine, batch: None)
        run = resume_or_start(trainer, {"model": torch.nn.Linear(1, 1)}, tmp_path, every=4)
        trainer.run([None] * 4, max_epochs=1)
        run.checkpoint.save_handler.close()  # type: ignore[union-attr]
        assert caplog.text.count(words) == logs
        assert capsys.readouterr().err.count(words) == (not logs)
