"""Saving in the background: the same bytes, whatever training does then, and no lost failure."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_objects import BATCHES, made, names, same

from crosstrain.engine import (
    Checkpoint,
    CheckpointError,
    CheckpointWriteError,
    DiskSaver,
    Engine,
    Events,
)
from crosstrain.engine.checkpoints.save_handler import RunFacts

REAL_FSYNC = os.fsync


class Gate:
    """Holds every fsync, and so the writer's thread, until it is opened; then may refuse it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.error: OSError | None = None
        self.inside = 0
        self.most_inside = 0

    def __call__(self, descriptor: int) -> None:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.reached.set()
        self.open.wait()
        self.inside -= 1
        if self.error is not None:
            raise self.error
        REAL_FSYNC(descriptor)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(os, "fsync", gate)
    yield gate
    gate.open.set()


def run_with(folder: Path, *, n_saved: int | None = None, **how: bool) -> Checkpoint:
    """Trains and saves each iteration; the same bits for the same arguments."""
    objects = made()
    trainer = objects["trainer"]
    handler = Checkpoint(objects, DiskSaver(folder, **how), n_saved=n_saved)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run(BATCHES)
    return handler


@pytest.mark.parametrize("overlap", [False, True])
def test_the_files_are_those_of_a_synchronous_run(tmp_path: Path, overlap: bool) -> None:
    run_with(tmp_path / "sync")
    run_with(tmp_path / "background", background=True, overlap=overlap)
    expected = names(tmp_path / "sync")
    assert len(expected) == len(BATCHES)
    assert names(tmp_path / "background") == expected
    for name in expected:
        one = torch.load(tmp_path / "sync" / name)
        assert same(one, torch.load(tmp_path / "background" / name)), name


@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_that_training_does_later_reaches_the_file(
    tmp_path: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = threading.Event()
    asked = os.statvfs

    def wait_for_training(path: Path) -> os.statvfs_result:
        # The thread asks for the free space before it writes the first byte.
        trained.wait()
        return asked(path)

    monkeypatch.setattr(os, "statvfs", wait_for_training)
    objects = made()
    trainer, model, optimizer = (objects[name] for name in ("trainer", "model", "optimizer"))
    trainer.run(BATCHES)
    expected = {name: torch.clone(value) for name, value in model.state_dict().items()}
    moments = {
        name: value["exp_avg"].clone() for name, value in optimizer.state_dict()["state"].items()
    }
    handler = Checkpoint(objects, DiskSaver(tmp_path, background=True, overlap=overlap))
    handler(trainer)
    # The batch norm's statistics change in forward, the parameters in the optimizer's step.
    for batch in BATCHES:
        model(batch).sum().backward()
        optimizer.step()
    trained.set()
    handler.wait()
    saved = torch.load(tmp_path / "checkpoint_10.pt")
    assert same(dict(saved["model"]), expected)
    assert same(
        {name: value["exp_avg"] for name, value in saved["optimizer"]["state"].items()}, moments
    )
    assert saved["trainer"]["iteration"] == 10


def test_the_call_returns_before_the_file_is_there(tmp_path: Path, gate: Gate) -> None:
    engine = Engine(lambda engine, batch: None)
    gate.open.set()
    handler = Checkpoint({"m": torch.nn.Linear(1, 1)}, DiskSaver(tmp_path, background=True))
    gate.open.clear()
    engine.register_events(*type(Checkpoint.SAVED_CHECKPOINT))
    told: list[Any] = []
    engine.add_event_handler(
        Checkpoint.SAVED_CHECKPOINT, lambda: told.append(handler.last_checkpoint)
    )
    handler(engine)
    gate.reached.wait()
    assert names(tmp_path) == []
    assert handler.last_checkpoint is None
    assert told == []
    gate.open.set()
    handler.wait()
    assert names(tmp_path) == ["m_0.pt"]
    assert told == [tmp_path / "m_0.pt"] == [handler.last_checkpoint]


def test_one_is_in_flight_at_most(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    saver = DiskSaver(tmp_path, background=True)
    gate.open.clear()
    saver({"a": torch.ones(3)}, "1.pt")
    gate.reached.wait()
    second = threading.Thread(target=saver, args=({"a": torch.ones(3)}, "2.pt"))
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive(), "the second save did not wait for the first"
    assert names(tmp_path) == []
    gate.open.set()
    second.join()
    saver.close()
    assert gate.most_inside == 1
    assert names(tmp_path) == ["1.pt", "2.pt"]


def test_a_failure_is_raised_at_the_next_iteration(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    objects = made()
    trainer = objects["trainer"]
    handler = Checkpoint(objects, DiskSaver(tmp_path, background=True), n_saved=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)

    @trainer.on(Events.ITERATION_STARTED(once=6))
    def break_disk() -> None:
        # Not under the save of iteration 3, which may be writing still.
        handler.wait()
        gate.error = OSError(errno.EIO, "Input/output error")
        gate.open.clear()

    @trainer.on(Events.ITERATION_STARTED(once=7))
    def let_it_fail() -> None:
        gate.open.set()
        job = handler.save_handler.job  # type: ignore[union-attr]
        while job is not None and job.running:
            time.sleep(0.001)

    with pytest.raises(CheckpointWriteError, match=r"checkpoint_6\.pt.*EIO"):
        trainer.run(BATCHES)
    assert trainer.state.iteration == 7
    assert names(tmp_path) == ["checkpoint_3.pt"]
    assert handler.last_checkpoint == tmp_path / "checkpoint_3.pt"
    gate.error = None
    trainer.run(BATCHES)
    assert names(tmp_path) == ["checkpoint_9.pt"]


def test_of_two_handlers_with_one_saver_each_learns_how_its_own_save_ended(
    tmp_path: Path, gate: Gate
) -> None:
    gate.open.set()
    objects = made()
    engine = objects["trainer"]
    engine.register_events(*type(Checkpoint.SAVED_CHECKPOINT))
    told: list[Any] = []
    saver = DiskSaver(tmp_path, background=True)
    first = Checkpoint(objects, saver, filename_prefix="first")
    second = Checkpoint(objects, saver, filename_prefix="second")
    engine.add_event_handler(
        Checkpoint.SAVED_CHECKPOINT,
        lambda: told.append((first.last_checkpoint, second.last_checkpoint)),
    )
    first(engine)
    one = tmp_path / "first_checkpoint_0.pt"
    second(engine)
    # The saver has waited for the first one, and so it is there.
    assert told == [(one, None)]
    saver.wait()
    assert told[1:] == [(one, tmp_path / "second_checkpoint_0.pt")]
    engine.state.iteration = 1
    gate.open.clear()
    first(engine)
    gate.error = OSError(errno.EIO, "Input/output error")
    gate.open.set()
    with pytest.raises(CheckpointWriteError, match=r"first_checkpoint_1\.pt.*EIO"):
        second(engine)
    gate.error = None
    # It was told, once; the older one is there, and is what the handler goes on from.
    first.wait()
    assert first.last_checkpoint == one
    assert names(tmp_path) == ["first_checkpoint_0.pt", "second_checkpoint_0.pt"]
    second(engine)
    second.wait()
    assert names(tmp_path) == ["first_checkpoint_0.pt", "second_checkpoint_1.pt"]


@pytest.mark.parametrize("how", ["completed", "terminated", "interrupted", "failed"])
def test_the_end_of_a_run_waits_for_the_file(tmp_path: Path, gate: Gate, how: str) -> None:
    gate.open.set()
    objects = made()
    trainer = objects["trainer"]
    handler = Checkpoint(objects, DiskSaver(tmp_path, background=True))
    gate.open.clear()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), handler)

    @trainer.on(Events.ITERATION_STARTED(once=5))
    def end() -> None:
        threading.Timer(0.1, gate.open.set).start()
        if how == "terminated":
            trainer.terminate(skip_completed=True)
        elif how == "interrupted":
            trainer.interrupt()
        elif how == "failed":
            raise KeyError("from a handler")

    if how == "failed":
        with pytest.raises(KeyError, match="from a handler"):
            trainer.run(BATCHES)
    else:
        trainer.run(BATCHES)
    assert names(tmp_path) == ["checkpoint_4.pt"]
    assert handler.last_checkpoint == tmp_path / "checkpoint_4.pt"


def test_a_handler_of_the_runs_exception_still_decides(tmp_path: Path) -> None:
    objects = made()
    trainer = objects["trainer"]
    handler = Checkpoint(objects, DiskSaver(tmp_path, background=True))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    seen: list[BaseException] = []

    @trainer.on(Events.ITERATION_COMPLETED(once=4))
    def fail() -> None:
        raise KeyError("dealt with")

    @trainer.on(Events.EXCEPTION_RAISED)
    def deal(error: BaseException) -> None:
        seen.append(error)

    trainer.run(BATCHES)
    assert [type(error) for error in seen] == [KeyError]


def test_a_failure_at_the_end_does_not_hide_the_runs_own(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    objects = made()
    trainer = objects["trainer"]
    handler = Checkpoint(objects, DiskSaver(tmp_path, background=True))
    gate.error = OSError(errno.ENOSPC, "No space left on device")
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), handler)

    @trainer.on(Events.ITERATION_COMPLETED(once=4))
    def fail() -> None:
        raise KeyError("first")

    with pytest.raises(KeyError, match="first") as error:
        trainer.run(BATCHES)
    assert "checkpoint_4.pt" in "".join(error.value.__notes__)


def test_the_last_failure_is_raised_by_the_run_itself(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    objects = made()
    handler = Checkpoint(objects, DiskSaver(tmp_path, background=True))
    gate.error = OSError(errno.ENOSPC, "No space left on device")
    objects["trainer"].add_event_handler(Events.ITERATION_COMPLETED(once=10), handler)
    with pytest.raises(CheckpointWriteError, match="ENOSPC"):
        objects["trainer"].run(BATCHES)


def test_overlap_notices_a_change_outside_of_the_optimizer(tmp_path: Path) -> None:
    model = torch.nn.Linear(2000, 2000)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saver = DiskSaver(tmp_path, background=True, overlap=True)
    changed = threading.Event()
    original = torch.Tensor.copy_

    def late_copy(target: torch.Tensor, source: torch.Tensor, *more: Any) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            changed.wait()
        return original(target, source, *more)

    torch.Tensor.copy_ = late_copy  # type: ignore[assignment, method-assign]
    try:
        saver.prepare(RunFacts(objects={"optimizer": optimizer}))
        saver({"model": model.state_dict()}, "m.pt")
        with torch.no_grad():
            model.weight.clamp_(-0.01, 0.01)
        changed.set()
        with pytest.raises(CheckpointError, match="outside of optimizer"):
            saver.wait()
    finally:
        torch.Tensor.copy_ = original  # type: ignore[method-assign]
    assert names(tmp_path) == []
    # Without overlap, the change comes too late to matter.
    with DiskSaver(tmp_path, background=True) as safe:
        safe.prepare(RunFacts(objects={"optimizer": optimizer}))
        safe({"model": model.state_dict()}, "m.pt")
        expected = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.zero_()
    assert torch.equal(torch.load(tmp_path / "m.pt")["model"]["weight"], expected)


def test_overlap_holds_the_optimizers_step_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(500, 500)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model(torch.ones(1, 500)).sum().backward()
    expected = model.weight.detach().clone()
    saver = DiskSaver(tmp_path, background=True, overlap=True)
    copying = threading.Event()
    original = torch.Tensor.copy_

    def slow_copy(target: torch.Tensor, source: torch.Tensor, *more: Any) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            copying.wait()
        return original(target, source, *more)

    torch.Tensor.copy_ = slow_copy  # type: ignore[assignment, method-assign]
    try:
        saver.prepare(RunFacts(objects={"optimizer": optimizer}))
        saver({"model": model.state_dict()}, "m.pt")
        timer = threading.Timer(0.1, copying.set)
        timer.start()
        optimizer.step()
        assert copying.is_set(), "the step did not wait for the copy"
        saver.close()
    finally:
        torch.Tensor.copy_ = original  # type: ignore[method-assign]
    assert not torch.equal(model.weight, expected)
    assert torch.equal(torch.load(tmp_path / "m.pt")["model"]["weight"], expected)


def test_buffers_are_used_again_and_follow_the_states_size(tmp_path: Path) -> None:
    with DiskSaver(tmp_path, background=True) as saver:
        for size in (100_000, 100_000, 10, 200_000, 0, 100_000):
            state = {"a": torch.full((size,), float(size)), "b": torch.arange(size)}
            saver(state, f"{size}.pt")
            state["a"].fill_(-1.0)
            state["b"].fill_(-1)
            saver.wait()
            loaded = torch.load(tmp_path / f"{size}.pt")
            assert torch.equal(loaded["a"], torch.full((size,), float(size)))
            assert torch.equal(loaded["b"], torch.arange(size))


@pytest.mark.skipif(
    not torch.accelerator.is_available(),
    reason="copies through pinned memory on a side stream need an accelerator, and there is none",
)
@pytest.mark.parametrize("overlap", [False, True])
def test_from_an_accelerator(tmp_path: Path, overlap: bool) -> None:
    device = torch.accelerator.current_accelerator()
    model = torch.nn.Sequential(torch.nn.Linear(2000, 2000), torch.nn.BatchNorm1d(2000)).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    batch = torch.randn(64, 2000, device=device)
    with DiskSaver(tmp_path, background=True, overlap=overlap) as saver:
        for step in range(5):
            model(batch).square().mean().backward()
            optimizer.step()
            expected = {name: value.cpu() for name, value in model.state_dict().items()}
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saver.prepare(RunFacts(objects={"optimizer": optimizer}))
            saver(states, f"{step}.pt")
            for _ in range(3):
                model(batch).square().mean().backward()
                optimizer.step()
            saver.wait()
            loaded = torch.load(tmp_path / f"{step}.pt")
            assert same(dict(loaded["model"]), expected)
            assert all(tensor.device.type == "cpu" for tensor in loaded["model"].values())
