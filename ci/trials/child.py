"""The child that trains: it imports torch, waits for an order, and trains as it says.

It is started before it is needed, because importing torch takes longer than training. It reads
orders as lines of JSON from stdin, and answers with lines of JSON on what was its stdout; what the
training itself prints goes to stderr. torchrun's processes, which share a stdin, get their order as
an argument. When stdin ends, its starter has gone, and so does it, with its workers.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from crosstrain.backends import BackendError, UnknownBackend, World, get, probe, random_state
from crosstrain.ci.traces.recorder import TraceRecorder
from crosstrain.engine import (
    Events,
    Manifest,
    ResumeWarning,
    ShardedBatch,
    manual_seed,
    resume_or_start,
)
from crosstrain.engine.checkpoints import list_checkpoints
from crosstrain.engine.proof import Checks
from crosstrain.engine.spread import is_sharded

from .digests import digest, leaf_digests
from .order import FAILED, UNUSABLE, Order
from .target import Target, TargetError, Training
from .traits import traits_of

Emit = Callable[[Mapping[str, Any]], None]

# More iterations than any run has.
_NEVER = 10**9


class _Reporter:
    """Tells each iteration, and stops or holds the process where it was told to.

    With a trace, all that an iteration did is in there; without one its digests are told.
    """

    def __init__(self, training: Training, order: Order, emit: Emit) -> None:
        self._training = training
        self._order = order
        self._emit = emit
        trainer = training.trainer
        if order.trace is not None:
            # Every iteration is written at once, so that a kill leaves no gap.
            TraceRecorder(order.trace, 1).attach(trainer, training.to_save)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._hold)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._take)

    def _hold(self) -> None:
        while self._training.trainer.state.iteration == self._order.hold_at:
            time.sleep(0.01)

    def _take(self) -> None:
        state = self._training.trainer.state
        self._emit(
            {"iteration": state.iteration, "epoch": state.epoch}
            | ({} if self._order.trace is not None else self._digests())
        )
        if state.iteration == self._order.stop_at:
            # As a scheduler does it, to all processes: the run saves after this iteration, and
            # ends.
            os.kill(os.getpid(), signal.SIGTERM)

    def _digests(self) -> dict[str, Any]:
        trainer = self._training.trainer
        state = trainer.state
        output: Any = state.output
        loss = _number(output)
        batch = state.batch
        if isinstance(batch, ShardedBatch):
            # The first shard's part is the same whatever the number of processes.
            batch = batch[0]
        found: dict[str, Any] = {
            "batch": digest(batch),
            "loss": digest(output) if loss is None else loss.hex(),
            "scalar": loss is not None,
            "skipped steps": getattr(state, "skipped_steps", 0),
            "weights": self._digest_of(True),
            "optimizer": self._digest_of(False),
        }
        if trainer.backend is not None:
            found["loss scale"] = digest(trainer.backend.state_dict())
        device: dict[str, Any] = {} if trainer.backend is None else trainer.backend.rng_state()
        found["random states"] = digest([random_state.capture(), device])
        return found

    def _digest_of(self, weights: bool) -> str:
        trainer = self._training.trainer
        return digest(
            {
                name: thing.state_dict()
                for name, thing in self._training.to_save.items()
                if thing is not trainer and isinstance(thing, torch.nn.Module) == weights
            }
        )


def _number(output: Any) -> float | None:
    """Returns a loss as a number; None if the training's output is something else."""
    if isinstance(output, torch.Tensor) and output.numel() == 1:
        return float(output)
    return float(output) if isinstance(output, (int, float)) else None


def _train(order: Order, emit: Emit) -> int:
    """Trains as an order says; returns the exit code of the process."""
    resumed = order.resumed_seed is not None and _goes_on(order)
    manual_seed(order.resumed_seed if resumed and order.resumed_seed is not None else order.seed)
    try:
        target = Target.parse(order.target)
        training = target.build(order.spec, order.workers, **order.options)
    except (BackendError, TargetError) as error:
        emit({"error": str(error)})
        return UNUSABLE
    _Reporter(training, order, emit)
    begun = {"begun": True, "traits": traits_of(training)}
    if order.trace is not None:
        # What a resume measures of itself is told, and the trace shows where the run parts.
        training.trainer.checks = _that_warn(training.trainer.checks)
    if order.folder is None:
        emit({**begun, "resumed_from": None})
        training.run()
        emit(_ending(training, order))
        return 0
    run = resume_or_start(
        training.trainer,
        training.to_save,
        order.folder,
        every=order.every or _NEVER,
        background=order.background,
        # The processes of a sharded model copy and write together, and can have background only.
        overlap=order.overlap and not is_sharded(training.to_save),
    )
    resumed_from = training.trainer.state.iteration if run.resumed_from else None
    emit({**begun, "resumed_from": resumed_from})
    training.run()
    if run.stop_signal is None:
        emit(_ending(training, order))
    return run.exit_code


def _that_warn(checks: Checks) -> Checks:
    strict = ("batch_before", "read_back", "structure")
    softened: Any = {name: "warn" for name in strict if getattr(checks, name) == "error"}
    return replace(checks, **softened)


def _goes_on(order: Order) -> bool:
    """Tells whether there is a checkpoint that the run will go on from."""
    folder = None if order.folder is None else Path(order.folder)
    if folder is None or not folder.is_dir():
        return False
    return any(isinstance(told.manifest, Manifest) for told in list_checkpoints(folder))


def _ending(training: Training, order: Order) -> dict[str, Any]:
    """Returns what a run that is complete has come to."""
    trainer = training.trainer
    found: dict[str, Any] = {"done": True, "length": trainer.state.epoch_length}
    if order.trace is not None:
        return found
    end: dict[str, str] = {}
    for name, thing in training.to_save.items():
        if thing is not trainer:
            end |= leaf_digests(thing.state_dict(), name)
    state = trainer.state_dict()
    names = {"backend": "loss scale", "step": "window", "rng_states": "random states"}
    for key, name in names.items():
        end |= leaf_digests(state.get(key), name)
    metrics = {k: v for k, v in trainer.state.metrics.items() if isinstance(v, float)}
    environment = state.get("environment", {})
    return {**found, "end": end, "environment": environment, "metrics": metrics}


def _probe(spec: str, target: str | None) -> dict[str, Any]:
    """Returns what the probe of a backend says, its capabilities, and what a target can do.

    `wrong` says what is wrong with the names of the backend or the target; empty if nothing is.
    """
    answer = {**asdict(probe(spec)), "capabilities": [], "takes_workers": True, "wrong": ""}
    try:
        answer["capabilities"] = sorted(get(spec).capabilities)
        if target is not None:
            answer["takes_workers"] = Target.parse(target).takes_workers()
    except (TargetError, UnknownBackend) as error:
        answer["wrong"] = str(error)
    # The probe has told the reason.
    except BackendError:
        pass
    return answer


def _tell_warnings(emit: Emit) -> None:
    """Has the engine's warnings told, too, in this process, which is there for nothing else."""
    usual: Callable[..., None] = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, ResumeWarning):
            emit({"warning": str(message)})
        usual(message, category, *rest, **more)

    warnings.showwarning = show


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
    """Answers orders until one of them was a training; returns the exit code."""
    # What a user's training prints must not be taken for an answer, nor may it read our orders.
    source, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def write(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    emit: Emit = write
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    if len(sys.argv) > 1:
        emit = _of_ranks(World.from_environment(), write)
        emit({"born": os.getpgrp()})
        orders.put({"train": sys.argv[1]})
    # The first optimizer imports it, which takes as long as importing torch does.
    importlib.import_module("torch._dynamo")
    threading.Thread(target=_watch, args=(source, orders), daemon=True).start()
    _tell_warnings(emit)
    while "probe" in (order := orders.get()):
        emit(_probe(order["probe"], order["target"]))
    code = _carry_out(Order.from_json(order["train"]), emit)
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
