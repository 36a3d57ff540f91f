"""One process of a scenario: it imports torch, waits for an order, and trains as it says.

It is started before it is needed, because importing torch takes longer than training. It reads
orders as lines of JSON from stdin, and answers with lines of JSON on stdout. When stdin ends, its
starter has gone, and so does it, with its workers.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from crosstrain.backends import BackendError, UnknownBackend, get, probe, random_state
from crosstrain.engine import Events, manual_seed, resume_or_start
from crosstrain.engine.spread import is_sharded

from .digests import digest, leaf_digests
from .order import Order
from .target import Target, TargetError, Training
from .trainings import TRAININGS

__all__ = ["main"]

Emit = Callable[[Mapping[str, Any]], None]

# More iterations than any run has.
_NEVER = 10**9


class _Recorder:
    """Writes down each iteration, and stops or holds the process where it was told to."""

    def __init__(self, training: Training, order: Order, emit: Emit) -> None:
        self._training = training
        self._order = order
        self._emit = emit
        trainer = training.trainer
        trainer.add_event_handler(Events.ITERATION_STARTED, self._hold)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._take)

    def _hold(self) -> None:
        while self._training.trainer.state.iteration == self._order.hold_at:
            time.sleep(0.01)

    def _take(self) -> None:
        trainer = self._training.trainer
        state = trainer.state
        output: Any = state.output
        loss = _number(output)
        line: dict[str, Any] = {
            "iteration": state.iteration,
            "epoch": state.epoch,
            "batch": digest(state.batch),
            "loss": digest(output) if loss is None else loss.hex(),
            "scalar": loss is not None,
            "skipped steps": getattr(state, "skipped_steps", 0),
            "weights": self._digest_of(True),
            "optimizer": self._digest_of(False),
        }
        if trainer.backend is not None:
            line["loss scale"] = digest(trainer.backend.state_dict())
        line["random states"] = digest(_random_states(trainer))
        self._emit(line)
        if state.iteration == self._order.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def _digest_of(self, weights: bool) -> str:
        trainer = self._training.trainer
        return digest(
            {
                name: thing.state_dict()
                for name, thing in self._training.to_save.items()
                if thing is not trainer and isinstance(thing, torch.nn.Module) == weights
            }
        )


def _random_states(trainer: Any) -> Any:
    device: dict[str, Any] = {} if trainer.backend is None else trainer.backend.rng_state()
    return [random_state.capture(), device]


def _number(output: Any) -> float | None:
    """Returns a loss as a number; None if the training's output is something else."""
    if isinstance(output, torch.Tensor) and output.numel() == 1:
        return float(output)
    return float(output) if isinstance(output, (int, float)) else None


def _train(order: Order, emit: Emit) -> int:
    """Trains as an order says; returns the exit code of the process."""
    manual_seed(order.seed)
    training = _build(order)
    trainer = training.trainer
    _Recorder(training, order, emit)
    run = resume_or_start(
        trainer,
        training.to_save,
        order.folder,
        every=order.every or _NEVER,
        background=order.background,
        # The processes of a sharded model copy and write together, and can have background only.
        overlap=order.overlap and not is_sharded(training.to_save),
    )
    resumed_from = trainer.state.iteration if run.resumed_from else None
    passed_over = [f"{one.path.name}: {one.reason}" for one in run.passed_over]
    emit({"begun": True, "resumed_from": resumed_from, "passed_over": passed_over})
    training.run()
    if run.stop_signal is None:
        emit(_ending(training))
    return run.exit_code


def _build(order: Order) -> Training:
    if order.target is not None:
        return Target.parse(order.target).build(order.spec, order.workers or 0)
    # The networks are too small for several threads, and their number would change their bits.
    torch.set_num_threads(1)
    backend = get(order.spec).open()
    return TRAININGS[order.training](backend, order.workers or 0)


def _ending(training: Training) -> dict[str, Any]:
    """Returns what a run that is complete has come to."""
    trainer = training.trainer
    found: dict[str, str] = {}
    for name, thing in training.to_save.items():
        if thing is not trainer:
            found |= leaf_digests(thing.state_dict(), name)
    state = trainer.state_dict()
    for key, name in (
        ("backend", "loss scale"),
        ("step", "window"),
        ("rng_states", "random states"),
    ):
        found |= leaf_digests(state.get(key), name)
    return {
        "end": found,
        "length": trainer.state.epoch_length,
        "environment": state.get("environment", {}),
    }


def _probe(spec: str, target: str | None) -> dict[str, Any]:
    """Returns what the probe of a backend says, its capabilities, and what a target can do.

    `wrong` says what is wrong with the names of the backend or the target; empty if nothing is.
    """
    found = probe(spec)
    answer: dict[str, Any] = {
        "ok": found.ok,
        "reason": found.reason,
        "remedy": found.remedy,
        "versions": found.versions,
        "devices": found.devices,
        "capabilities": sorted(get(spec).capabilities) if found.ok else [],
        "takes_workers": True,
        "wrong": "",
    }
    try:
        if found.ok and target is not None:
            answer["takes_workers"] = Target.parse(target).takes_workers()
        if not found.ok:
            get(spec)
    except (TargetError, UnknownBackend) as error:
        answer["wrong"] = str(error)
    # The probe has told the reason.
    except BackendError:
        pass
    return answer


def _watch(source: int, orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Passes orders on, and ends the process and its workers when its starter has gone.

    It reads the descriptor itself: `sys.stdin` has a lock, which a worker that is forked while
    this waits would inherit taken, and wait for without end.
    """
    text = b""
    while part := os.read(source, 65536):
        *lines, text = (text + part).split(b"\n")
        for line in lines:
            orders.put(json.loads(line))
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> int:
    """Answers orders until one of them was a training; returns the exit code."""
    # What a user's training prints must not be taken for an answer, nor may it read our orders.
    source, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def emit(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    # The first optimizer imports it, which takes as long as importing torch does.
    importlib.import_module("torch._dynamo")
    threading.Thread(target=_watch, args=(source, orders), daemon=True).start()
    while True:
        order = orders.get()
        if "probe" in order:
            emit(_probe(order["probe"], order["target"]))
            continue
        try:
            return _train(Order(**order["train"]), emit)
        except Exception as error:
            emit({"error": f"{type(error).__name__}: {error}"})
            raise


if __name__ == "__main__":
    sys.exit(main())
