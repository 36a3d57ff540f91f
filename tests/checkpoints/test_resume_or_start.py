"""resume_or_start: stopped however it may be, the run goes on with the same bits."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import on_xla
import pytest
import torch
from checkpoint_objects import BATCHES, made, names
from fork_server import ForkServer
from resumable_program import ITERATIONS, train

from crosstrain.engine import (
    Checkpoint,
    CheckpointBusy,
    CheckpointMismatch,
    CheckpointNotFound,
    DiskSaver,
    Engine,
    Events,
    ResumeWarning,
    create_supervised_trainer,
    resume_or_start,
)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    # An optimizer's first step imports torch._dynamo, which takes seconds.
    with ForkServer("resumable_program", "torch._dynamo", *on_xla.PRELOAD) as server:
        yield server


class Program:
    """Runs the program again and again in one folder."""

    def __init__(self, server: ForkServer, place: Path) -> None:
        self._server = server
        self.folder = place / "checkpoints"
        self.result = place / "result.json"

    def run(self, **options: Any) -> dict[str, Any] | int:
        """Returns the outcome, or the code of a program that did not come to its end."""
        self.result.unlink(missing_ok=True)
        code = self._server.run(train, str(self.folder), str(self.result), options)
        if code or not self.result.exists():
            return code
        return dict(json.loads(self.result.read_text()))


@pytest.fixture
def program(server: ForkServer, tmp_path: Path) -> Program:
    return Program(server, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = Program(server, tmp_path_factory.mktemp("uninterrupted")).run()
    assert isinstance(outcome, dict)
    assert outcome["iteration"] == ITERATIONS
    assert outcome["resumed_from"] is None
    return outcome


def same_end(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("iteration", "weights", "rate"):
        assert one[part] == other[part], part
    count = len(one["losses"])
    assert one["losses"] == other["losses"][-count:] if count else True


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("at", [1, 5, 12, 13, 24])
def test_a_signal_saves_and_ends_in_order(
    program: Program, uninterrupted: dict[str, Any], name: str, at: int
) -> None:
    stopped = program.run(signals={at: [name]})
    assert isinstance(stopped, dict)
    assert stopped["iteration"] == at
    assert stopped["stop"] == name
    assert stopped["exit_code"] == 128 + getattr(signal, name)
    assert stopped["signals restored"]
    assert f"checkpoint_{at}.pt" in names(program.folder)
    resumed = program.run(seed=9)
    assert isinstance(resumed, dict)
    assert resumed["resumed_from"] == f"checkpoint_{at}.pt"
    assert resumed["exit_code"] == 0
    same_end(resumed, uninterrupted)
    assert stopped["losses"] + resumed["losses"] == uninterrupted["losses"]


def test_killed_again_and_again(program: Program, uninterrupted: dict[str, Any]) -> None:
    for number, at in enumerate([3, 6, 11, 14, 18, 23]):
        # Before the first checkpoint there is nothing but the seed to begin from.
        seed = number if program.folder.exists() and names(program.folder) else 0
        how = {"background": number % 2 == 0, "workers": number % 3}
        killed = program.run(signals={at: ["SIGKILL"]}, seed=seed, **how)
        assert killed == -signal.SIGKILL
    resumed = program.run(seed=99, workers=1)
    assert isinstance(resumed, dict)
    same_end(resumed, uninterrupted)
    assert len(names(program.folder)) == 2


@pytest.mark.slow
@on_xla.needs_xla
@pytest.mark.parametrize("spec", ["xla", "xla:bf16"])
def test_killed_and_stopped_on_xla(program: Program, tmp_path: Path, spec: str) -> None:
    (tmp_path / "straight").mkdir()
    whole = Program(program._server, tmp_path / "straight").run(backend=spec)
    assert isinstance(whole, dict)
    assert program.run(signals={11: ["SIGKILL"]}, backend=spec) == -signal.SIGKILL
    stopped = program.run(signals={14: ["SIGTERM"]}, backend=spec, seed=5, workers=1)
    assert isinstance(stopped, dict)
    assert (stopped["iteration"], stopped["stop"]) == (14, "SIGTERM")
    assert program.run(signals={18: ["SIGKILL"]}, backend=spec, seed=6) == -signal.SIGKILL
    resumed = program.run(seed=99, workers=2, backend=spec)
    assert isinstance(resumed, dict)
    same_end(resumed, whole)


def test_the_second_interrupt_ends_at_once(server: ForkServer, program: Program) -> None:
    options = {"slow": 6, "signals": {6: ["SIGINT"]}}
    pid = server.start(train, str(program.folder), str(program.result), options)
    while "checkpoint_4.pt" not in (names(program.folder) if program.folder.exists() else []):
        time.sleep(0.01)
    # Within a second it is the same one, sent twice.
    time.sleep(1.5)
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert server.wait(pid) == 1
    assert time.monotonic() - began < 20, "it waited for the iteration, which takes 30 s"
    assert not program.result.exists()
    assert names(program.folder) == ["checkpoint_4.pt"]


def test_a_signal_after_a_pause_saves_and_ends_in_order(tmp_path: Path) -> None:
    objects = made()
    trainer = objects["trainer"]
    run = resume_or_start(trainer, objects, tmp_path, Events.EPOCH_COMPLETED)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: trainer.interrupt())
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=3), lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    trainer.run(BATCHES, max_epochs=3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.warns(ResumeWarning, match="does not pause there once more"):
        trainer.run()
    assert (run.exit_code, trainer.state.iteration) == (143, 3)
    assert any("_3" in name for name in names(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_changes_nothing(program: Program) -> None:
    stopped = program.run(signals={5: ["SIGTERM", "SIGTERM", "SIGTERM"]})
    assert isinstance(stopped, dict)
    assert stopped["iteration"] == 5


@pytest.mark.parametrize(
    ("context", "name"),
    [("fork", "SIGINT"), ("fork", "SIGTERM"), ("forkserver", "SIGTERM"), ("spawn", "SIGTERM")],
)
def test_a_signal_to_the_whole_group(
    program: Program, uninterrupted: dict[str, Any], context: str, name: str
) -> None:
    """As terminals and schedulers send it: the loader's workers leave it to the trainer.

    It comes in an evaluation, which goes to its end; the user's `worker_init_fn` runs in each.
    """
    stopped = program.run(signals={6: [name]}, workers=2, context=context, group=True)
    assert isinstance(stopped, dict)
    assert (stopped["iteration"], stopped["evaluated"]) == (6, 12)
    assert stopped["workers"] == ["worker0", "worker1"]
    resumed = program.run()
    assert isinstance(resumed, dict)
    same_end(resumed, uninterrupted)


def test_a_complete_run_trains_nothing_more(
    program: Program, uninterrupted: dict[str, Any]
) -> None:
    first = program.run()
    files = {name: (program.folder / name).read_bytes() for name in names(program.folder)}
    again = program.run(seed=3)
    assert isinstance(first, dict)
    assert isinstance(again, dict)
    same_end(first, uninterrupted)
    assert again["losses"] == []
    same_end(again, uninterrupted)
    assert files == {name: (program.folder / name).read_bytes() for name in names(program.folder)}


def test_a_damaged_newest_checkpoint_costs_one_interval(
    program: Program, uninterrupted: dict[str, Any]
) -> None:
    assert program.run(signals={14: ["SIGTERM"]}) != 0
    newest = program.folder / "checkpoint_14.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = program.run()
    assert isinstance(resumed, dict)
    assert resumed["resumed_from"] == "checkpoint_12.pt"
    same_end(resumed, uninterrupted)
    # What is damaged is neither overwritten unasked nor removed.
    assert newest.exists()


def test_when_every_checkpoint_is_damaged_no_run_begins(tmp_path: Path) -> None:
    run_to(tmp_path, 5)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(CheckpointNotFound, match=r"no good checkpoint.*checkpoint_5\.pt.*move"):
        prepare(tmp_path)
    # The folder is given up.
    DiskSaver(tmp_path, require_empty=False).close()


def prepare(folder: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    objects = made()
    to_save = {name: value for name, value in objects.items() if name != "trainer"}
    options = {"every": 2} | options
    return objects, resume_or_start(objects["trainer"], to_save, folder, **options)


def run_to(folder: Path, end: int, **options: Any) -> tuple[dict[str, Any], Any]:
    objects, run = prepare(folder, **options)
    objects["trainer"].add_event_handler(
        Events.ITERATION_COMPLETED(once=end), objects["trainer"].terminate, goes_on=True
    )
    objects["trainer"].run(BATCHES, max_epochs=2)
    run.checkpoint.save_handler.close()
    return objects, run


def test_only_what_is_due_is_saved_and_the_end(tmp_path: Path) -> None:
    _, run = run_to(tmp_path, 7, n_saved=None, every=3)
    assert names(tmp_path) == [f"checkpoint_{n}.pt" for n in (3, 6, 7)]
    assert run.resumed_from is None
    _, run = run_to(tmp_path, 20, n_saved=None, every=Events.EPOCH_COMPLETED)
    assert names(tmp_path) == sorted(f"checkpoint_{n}.pt" for n in (3, 6, 7, 10, 20))
    assert run.resumed_from == tmp_path / "checkpoint_7.pt"
    assert run.exit_code == 0


def test_what_is_saved_is_told_from_the_first_save_on(tmp_path: Path) -> None:
    objects, run = prepare(tmp_path, every=4)
    told: list[Any] = []

    @objects["trainer"].on(Checkpoint.SAVED_CHECKPOINT)
    def saved(_: Engine) -> None:
        told.append(run.checkpoint.last_checkpoint)

    objects["trainer"].run(BATCHES, max_epochs=1)
    run.checkpoint.save_handler.close()
    assert told == [tmp_path / f"checkpoint_{n}.pt" for n in (4, 8, 10)]


def test_retention_goes_on_over_restarts(tmp_path: Path) -> None:
    run_to(tmp_path, 5)
    assert names(tmp_path) == ["checkpoint_4.pt", "checkpoint_5.pt"]
    (tmp_path / "best_model_3.pt").write_bytes(b"another handler's")
    run_to(tmp_path, 9)
    assert names(tmp_path) == ["best_model_3.pt", "checkpoint_8.pt", "checkpoint_9.pt"]


def test_resume_from_an_earlier_checkpoint(tmp_path: Path, caplog: Any) -> None:
    run_to(tmp_path, 9, n_saved=None)
    with caplog.at_level(logging.INFO):
        objects, run = prepare(tmp_path, resume_from=tmp_path / "checkpoint_4.pt")
    assert objects["trainer"].state.iteration == 4
    assert "Resumed from" in caplog.text
    objects["trainer"].run(BATCHES, max_epochs=2)
    run.checkpoint.save_handler.close()
    # Of the course that was given up, what has not been overwritten is left alone.
    assert names(tmp_path) == sorted(f"checkpoint_{n}.pt" for n in (9, 18, 20))
    assert Checkpoint.latest(tmp_path).path == tmp_path / "checkpoint_20.pt"


def test_prefixes_keep_runs_of_one_folder_apart(tmp_path: Path) -> None:
    run_to(tmp_path, 5, filename_prefix="a")
    _, run = run_to(tmp_path, 3, filename_prefix="b")
    assert run.resumed_from is None
    _, run = run_to(tmp_path, 9, filename_prefix="a")
    assert run.resumed_from == tmp_path / "a_checkpoint_5.pt"


def test_a_second_trainer_of_a_process_is_kept_out_until_the_first_has_ended(
    tmp_path: Path,
) -> None:
    objects, run = prepare(tmp_path)
    with pytest.raises(CheckpointBusy, match="Another trainer of this process has"):
        prepare(tmp_path)
    prepare(tmp_path, filename_prefix="other")
    objects["trainer"].run(BATCHES, max_epochs=1)
    later, again = prepare(tmp_path)
    assert again.resumed_from == tmp_path / "checkpoint_10.pt"
    with pytest.raises(CheckpointBusy, match="its run has not ended"):
        objects["trainer"].run(BATCHES, max_epochs=2)
    later["trainer"].run(BATCHES, max_epochs=2)
    for each in (run, again):
        each.checkpoint.save_handler.close()


def test_all_other_handlers_have_run_before_the_save(tmp_path: Path) -> None:
    class Seen:
        def __init__(self) -> None:
            self.log: list[str] = []

        def state_dict(self) -> dict[str, Any]:
            return {"log": list(self.log)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.log = list(state["log"])

    seen = Seen()
    trainer = Engine(lambda engine, batch: None)
    run = resume_or_start(trainer, {"seen": seen}, tmp_path, every=1, n_saved=None)
    for event in (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        trainer.add_event_handler(event, lambda name: seen.log.append(name), event.name)
    trainer.run([0] * 2, max_epochs=2)
    run.checkpoint.save_handler.close()
    one = ["ITERATION_COMPLETED", "ITERATION_COMPLETED", "EPOCH_COMPLETED"]
    for iteration, expected in ((1, one[:1]), (2, one), (3, [*one, one[0]]), (4, one * 2)):
        saved = torch.load(tmp_path / f"checkpoint_{iteration}.pt")
        assert saved["seen"]["log"] == expected


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss)
    with pytest.raises(ValueError, match="leaves out 'optimizer'"):
        resume_or_start(trainer, {"model": model}, tmp_path, every=1)
    with pytest.raises(ValueError, match="'trainer' of type Linear"):
        resume_or_start(trainer, {"trainer": model}, tmp_path, every=1)
    with pytest.raises(TypeError, match=r"every.*'often'"):
        resume_or_start(trainer, {"model": model, "o": optimizer}, tmp_path, every="often")
    with pytest.raises(ValueError, match="every"):
        resume_or_start(trainer, {"model": model, "o": optimizer}, tmp_path, every=0)
    with pytest.raises(TypeError, match="state_dict"):
        resume_or_start(trainer, {"model": 1}, tmp_path, every=1)
    assert names(tmp_path) == []


def test_another_set_of_objects_does_not_begin_anew(tmp_path: Path) -> None:
    run_to(tmp_path, 5)
    objects = made()
    to_save = {"model": objects["model"], "ema": torch.nn.Linear(1, 1)}
    with pytest.raises(CheckpointNotFound, match="does not hold ema"):
        resume_or_start(objects["trainer"], to_save, tmp_path, every=1)
    fewer = {"model": objects["model"], "optimizer": objects["optimizer"]}
    with pytest.raises(CheckpointMismatch, match="'lr_scheduler'"):
        resume_or_start(made()["trainer"], fewer, tmp_path, every=1)


def test_outside_of_the_main_thread_signals_are_told_not_to_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=run_to, args=(tmp_path, 3))
        thread.start()
        thread.join()
    assert "not in the main thread" in caplog.text
    assert names(tmp_path) == ["checkpoint_2.pt", "checkpoint_3.pt"]
    assert signal.getsignal(signal.SIGTERM) is before
