"""A training program with the one line that makes it resumable; a child of a fork server."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.engine import Engine, Events, create_supervised_trainer, resume_or_start

ITERATIONS = 24


def note_worker(result: str, worker: int) -> None:
    """The user's `worker_init_fn`: leaves a file for each worker."""
    (Path(result).parent / f"worker{worker}").touch()


def train(folder: str, result: str, options: dict[str, Any]) -> None:
    """Trains two epochs of 12 iterations, and writes what became of it.

    Args:
        folder: of the checkpoints.
        result: the file for the outcome, in JSON.
        options: `signals`: from iterations to names of signals that the program sends itself;
            `slow`: an iteration that takes long; `workers` and `context` of the loader; `group`:
            whether signals go to all processes, as a terminal's do; `seed`, `background`, `every`;
            `backend`, a spec; `remote` and
            `every_remote` of the second tier.
    """
    torch.manual_seed(options.get("seed", 0))
    data = torch.randn(48, 6, generator=torch.Generator().manual_seed(5))
    target = (data[:, 0] > 0).long()
    # The weights are no secret of the seed: a resumed run must not profit from having the same.
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        torch.nn.functional.cross_entropy,
        backend=options.get("backend", "cpu"),
        deterministic=True,
    )
    if options.get("group"):
        os.setpgid(0, 0)
    run = resume_or_start(
        trainer,
        {"model": model, "optimizer": optimizer, "scheduler": scheduler},
        folder,
        every=options.get("every", 4),
        background=options.get("background", True),
        remote=options.get("remote"),
        every_remote=options.get("every_remote"),
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
    losses: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output)
    )
    wanted = {int(key): value for key, value in options.get("signals", {}).items()}

    @trainer.on(Events.ITERATION_STARTED)
    def disturb(engine: Any) -> None:
        for name in wanted.get(engine.state.iteration, ()):
            number = getattr(signal, name)
            if options.get("group"):
                evaluate(number)
            else:
                os.kill(os.getpid(), number)
        if engine.state.iteration == options.get("slow"):
            time.sleep(30)

    how: dict[str, Any] = {
        "batch_size": 4,
        "num_workers": options.get("workers", 0),
        "multiprocessing_context": options.get("context"),
        "worker_init_fn": functools.partial(note_worker, result),
    }
    # Two loaders of two workers each: torch is imported once for all of them.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.utils.data"])
    loader = DataLoader(TensorDataset(data, target), shuffle=True, **how)
    evaluator = Engine(lambda engine, batch: None)

    def evaluate(number: int) -> None:
        """All processes get a signal in an evaluation, which takes more batches than are ready."""
        signalled = Events.ITERATION_STARTED(once=1)
        evaluator.add_event_handler(signalled, lambda: os.killpg(0, number))
        # With a generator of its own: it takes nothing of the training's random numbers.
        evaluator.run(DataLoader(TensorDataset(data), generator=torch.Generator(), **how))

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    trainer.run(loader, max_epochs=2)
    after = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    outcome = {
        "iteration": trainer.state.iteration,
        "exit_code": run.exit_code,
        "stop": None if run.stop_signal is None else run.stop_signal.name,
        "resumed_from": None if run.resumed_from is None else run.resumed_from.name,
        "resumed_place": str(run.resumed_from),
        "losses": losses,
        "weights": [parameter.tolist() for parameter in model.parameters()],
        "rate": scheduler.get_last_lr(),
        "signals restored": before == after,
        "evaluated": evaluator.state.iteration,
        "workers": sorted(path.name for path in Path(result).parent.glob("worker*")),
    }
    Path(result).write_text(json.dumps(outcome))
