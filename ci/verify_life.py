"""One process of a verification: it imports torch, waits for an order, and trains as it says.

It reads one line of JSON from stdin and answers with lines of JSON on what was its stdout; what the
training itself prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crosstrain.backends import BackendError
from crosstrain.engine import Events, Manifest, ResumeWarning, manual_seed, resume_or_start
from crosstrain.engine.loading import candidates

from .target import Target, TargetError, Training
from .trace_recorder import TraceRecorder
from .verify_order import FAILED, UNUSABLE, Order

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
    # Every iteration is written at once, so that a kill leaves no gap.
    TraceRecorder(order.trace, 1).attach(trainer, training.to_save)

    @trainer.on(Events.ITERATION_COMPLETED)
    def report() -> None:  # pyright: ignore[reportUnusedFunction]
        emit({"iteration": trainer.state.iteration})
        if trainer.state.iteration == order.stop_at:
            # As a scheduler does it: the run saves after this iteration, and ends.
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
    return any(isinstance(manifest, Manifest) for _, manifest in candidates(folder))


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


def main() -> int:
    """Waits for an order and carries it out; returns the exit code."""
    # The training may print: that is none of our lines.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), file=channel, flush=True)

    _tell_warnings(emit)
    text = sys.stdin.readline()
    if not text:
        return 0
    try:
        return _train(Order.from_json(text), emit)
    # A user's code may raise anything; whoever gave the order is told.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        emit({"error": f"{type(error).__name__}: {error}"})
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
