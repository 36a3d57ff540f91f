"""One process of a verification: it imports torch, waits for an order, and trains as it says.

The order is a line of JSON on stdin, or, for the processes that torchrun starts, which share that,
an argument. It answers with lines of JSON on what was its stdout; what the training itself prints
goes to stderr.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from crosstrain.backends import BackendError, World
from crosstrain.ci.traces.recorder import TraceRecorder
from crosstrain.ci.trials.target import Target, TargetError, Training
from crosstrain.engine import Checks, Events, Manifest, ResumeWarning, manual_seed, resume_or_start
from crosstrain.engine.checkpoints.layouts import list_checkpoints

from .order import FAILED, UNUSABLE, Order

__all__ = ["main"]

Emit = Callable[[Mapping[str, Any]], None]


def _train(order: Order, emit: Emit) -> int:
    """Trains as an order says; returns the exit code of the process."""
    manual_seed(order.resumed_seed if _goes_on(order) else order.seed)
    try:
        training = Target.parse(order.target).build(order.backend, order.workers)
    except (BackendError, TargetError) as error:
        emit({"error": str(error)})
        return UNUSABLE
    trainer = training.trainer
    # The traces show how far a difference goes: what a resume finds itself is told beside them.
    found = {item.name: getattr(trainer.checks, item.name) for item in fields(Checks)}
    warned: dict[str, Any] = {
        name: "warn" if how == "error" else how for name, how in found.items()
    }
    trainer.checks = Checks(**warned)
    # Every iteration is written at once, so that a kill leaves no gap.
    TraceRecorder(order.trace, 1).attach(trainer, training.to_save)

    @trainer.on(Events.ITERATION_COMPLETED)
    def report() -> None:  # pyright: ignore[reportUnusedFunction]
        emit({"iteration": trainer.state.iteration})
        if trainer.state.iteration == order.stop_at:
            # As a scheduler does it, to all processes: the run saves after this iteration, and
            # ends.
            os.kill(os.getpid(), signal.SIGTERM)

    if order.folder is None:
        emit({"begun": True, "resumed_from": None})
        training.run()
        code = 0
    else:
        code = _train_in(order.folder, order, training, emit)
    if code == 0:
        state = trainer.state
        emit({"done": True, "iterations": state.iteration, "epoch_length": state.epoch_length})
    return code


def _goes_on(order: Order) -> bool:
    """Tells whether there is a checkpoint that the run will go on from."""
    folder = None if order.folder is None else Path(order.folder)
    if folder is None or not folder.is_dir():
        return False
    return any(isinstance(told.manifest, Manifest) for told in list_checkpoints(folder))


def _train_in(folder: str, order: Order, training: Training, emit: Emit) -> int:
    run = resume_or_start(training.trainer, training.to_save, folder, every=order.every)
    at = training.trainer.state.iteration if run.resumed_from else None
    emit({"begun": True, "resumed_from": at})
    training.run()
    return run.exit_code


def _tell_warnings(emit: Emit) -> None:
    """Has the engine's warnings told, too, in this process, which is there for nothing else."""
    usual: Callable[..., None] = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, ResumeWarning):
            emit({"warning": str(message)})
        usual(message, category, *rest, **more)

    warnings.showwarning = show


def _watch(source: int) -> None:
    """Ends this process and its loader's workers when who started them has gone."""
    while os.read(source, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def _of_ranks(world: World, emit: Emit) -> Emit:
    """Returns what a process of several answers with: its rank; progress is told by one of them."""

    def tell(line: Mapping[str, Any]) -> None:
        if world.rank and not line.keys().isdisjoint({"begun", "iteration", "done"}):
            return
        told = {**line, "rank": world.rank}
        for kind in line.keys() & {"error", "warning"}:
            text = f"Rank {world.rank}: {line[kind]}" if kind == "error" else line[kind]
            # All write into one pipe: what is longer than this may be torn by what another says.
            whole = len(json.dumps(text)) < select.PIPE_BUF - 100
            told[kind] = text if whole else f"{text[:500]}..."
        emit(told)

    return tell


def main() -> int:
    """Waits for an order and carries it out; returns the exit code."""
    # The training may print: that is none of our lines. Nor shall it read them.
    source, channel = os.dup(0), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def write(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), file=channel, flush=True)

    emit: Emit = write
    orders = os.fdopen(source)
    if len(sys.argv) > 1:
        text = sys.argv[1]
        emit = _of_ranks(World.from_environment(), write)
        emit({"born": os.getpgrp()})
    else:
        text = orders.readline()
        if not text:
            return 0
    threading.Thread(target=_watch, args=(orders.fileno(),), daemon=True).start()
    _tell_warnings(emit)
    code = _carry_out(Order.from_json(text), emit)
    emit({"left": code})
    return code


def _carry_out(order: Order, emit: Emit) -> int:
    try:
        return _train(order, emit)
    # A user's code may raise anything; whoever gave the order is told.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        emit({"error": f"{type(error).__name__}: {error}"})
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
