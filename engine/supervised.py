"""Trainers and evaluators for supervised learning, ready to run.

The names and arguments of the functions are those of pytorch-ignite's `ignite.engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from crosstrain.engine.ranks.agreement import agree
from crosstrain.engine.ranks.world import unshared
from crosstrain.engine.training.arguments import (
    Device,
    LossFunction,
    open_backend,
    prepare,
    step_options,
)
from crosstrain.engine.training.captured_step import CapturedStep
from crosstrain.engine.training.evaluation import EvaluationStep, prediction
from crosstrain.engine.training.options import is_many
from crosstrain.engine.training.shards import LogicalShards, Reduction, ShardedStep
from crosstrain.engine.training.step import TrainingStep

from .deterministic import DeterministicEngine
from .engine import Engine
from .proof import Checks

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

    from crosstrain.backends import Backend


def create_supervised_trainer(
    model: Any,
    optimizer: Any,
    loss_fn: LossFunction,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., tuple[Any, Any]] | None = None,
    model_transform: Callable[[Any], Any] | None = None,
    output_transform: Callable[[Any, Any, Any, Any], Any] | None = None,
    deterministic: bool = False,
    amp_mode: str | None = None,
    scaler: bool | GradScaler = False,
    gradient_accumulation_steps: int = 1,
    model_fn: Callable[[Any, Any], Any] | None = None,
    *,
    backend: str | Backend | None = None,
    max_norm: float | None = None,
    checks: Checks | None = None,
    shards: int | None = None,
    loss_reduction: Reduction = "mean",
    capture: bool = False,
) -> Engine:
    """Makes a trainer: an `Engine` whose step trains the model on a backend.

    Args:
        model: a model, or a list of several; moved to the device in place.
        optimizer: its optimizer, or a list of several; all are stepped together.
        loss_fn: called as `loss_fn(y_pred, y)`, returns a loss of one element.
        device: the device, for those who come from pytorch-ignite; `backend` says more.
        non_blocking: passed to `prepare_batch`.
        prepare_batch: called as `prepare_batch(batch, device=..., non_blocking=...)`, returns
            `(x, y)`; by default the batch is a pair, which the backend puts on its device.
        model_transform: called with the model's output, returns what the loss takes.
        output_transform: called as `output_transform(x, y, y_pred, loss)`, returns the iteration's
            output; by default the loss, copied to the host only when `state.output` is read.
        deterministic: whether the trainer is a `DeterministicEngine`, which resumes exactly.
        amp_mode: as in pytorch-ignite, `amp` or `apex`; `backend` says more.
        scaler: as in pytorch-ignite, for `amp`; true also sets `trainer.state.scaler`.
        gradient_accumulation_steps: over how many iterations gradients are accumulated; they are
            averaged over the true size of each window, the run's last one as well.
        model_fn: called as `model_fn(model, x)`, returns the model's output.
        backend: a spec such as `cpu:bf16`, or a backend. None: what `device` and `amp_mode` say,
            and where they say nothing, `$CROSSTRAIN_BACKEND` or `cpu`.
        max_norm: each optimizer's gradients are clipped to this total norm.
        checks: how strict a resume is about each thing that it measures; see `Checks`.
        shards: trains with the same bits on any number of processes that divides this power of
            two: each batch is dealt out to so many logical shards, each with passes of its own.
            It takes `deterministic=True`. None: one pass for each process.
        loss_reduction: with `shards`, what `loss_fn` returns: the `mean` over a shard's samples,
            the `sum` over them, or a mean over what this function of a shard's batch counts, such
            as its tokens.
        capture: replays forward pass, backward pass and optimizer step as one graph of the device,
            which costs the host one call. It takes a backend with the capability `graphs`,
            optimizers with `capturable=True` (and `fused=True` with fp16), and batches of a few
            shapes; whatever else does not fit is refused with the reason.

    Returns:
        The trainer. `trainer.objects` names what it trains; `StepEvents` are registered.

    Raises:
        ValueError: if arguments do not go together, or the optimizer holds no parameter of the
            model.
        UnknownBackend: if there is no such backend.
        BackendUnavailable: if the backend cannot run here.
        BackendError: if `capture` is asked for, and the device or an optimizer cannot do it.
    """
    options = step_options(
        non_blocking=non_blocking,
        prepare_batch=prepare_batch,
        model_transform=model_transform,
        output_transform=output_transform,
        accumulation_steps=gradient_accumulation_steps,
        model_fn=model_fn,
        max_norm=max_norm,
    )
    chosen = open_backend(backend, device, amp_mode, scaler)
    if shards is not None:
        _check_shards(shards, capture, deterministic)
        logical = LogicalShards(shards, chosen, model, optimizer, loss_reduction)
        model, optimizer = logical.model, logical.optimizer
        step: TrainingStep = ShardedStep(logical, loss_fn, options)
        trainer: Engine = DeterministicEngine(step, chosen, shards=shards)
    else:
        model, optimizer = prepare(chosen, model, optimizer)
        kind = CapturedStep if capture else TrainingStep
        step = kind(model, optimizer, loss_fn, chosen, options)
        trainer = (DeterministicEngine if deterministic else Engine)(step, chosen)
    trainer.checks = checks or Checks()
    trainer.objects = {**_named("model", model), **_named("optimizer", optimizer)}
    step.attach(trainer)
    agree(trainer)
    if scaler is True:
        # Only the backends that amp_mode stands for get here; they have torch's scaler.
        state: Any = trainer.state
        amp: Any = chosen
        state.scaler = amp.precision.scaler
    return trainer


def _check_shards(shards: int, capture: bool, deterministic: bool) -> None:
    if capture:
        raise ValueError(
            f"shards={shards} adds gradients up pass by pass on the host's word, and "
            "capture=True has all passes in one graph. Leave one of them out."
        )
    if not deterministic:
        raise ValueError(
            f"shards={shards} is for the same bits on any number of processes, which takes "
            "deterministic=True."
        )


def _named(name: str, value: Any) -> dict[str, Any]:
    if not is_many(value):
        return {name: unshared(value)}
    return {f"{name}_{index}": unshared(item) for index, item in enumerate(value)}


def create_supervised_evaluator(
    model: Any,
    metrics: Mapping[str, Any] | None = None,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., tuple[Any, Any]] | None = None,
    model_transform: Callable[[Any], Any] | None = None,
    output_transform: Callable[[Any, Any, Any], Any] = prediction,
    amp_mode: str | None = None,
    model_fn: Callable[[Any, Any], Any] | None = None,
    *,
    backend: str | Backend | None = None,
) -> Engine:
    """Makes an evaluator: an `Engine` whose step runs the model in evaluation mode.

    Args:
        model: the model; moved to the device in place.
        metrics: by name, objects with `attach(engine, name)`, such as pytorch-ignite's metrics.
        device: as of `create_supervised_trainer`.
        non_blocking: as of `create_supervised_trainer`.
        prepare_batch: as of `create_supervised_trainer`.
        model_transform: as of `create_supervised_trainer`.
        output_transform: called as `output_transform(x, y, y_pred)`; `(y_pred, y)` by default.
        amp_mode: as of `create_supervised_trainer`.
        model_fn: as of `create_supervised_trainer`.
        backend: as of `create_supervised_trainer`. Give it the trainer's, `trainer.backend`.

    Raises:
        ValueError: if arguments do not go together.
        UnknownBackend: if there is no such backend.
        BackendUnavailable: if the backend cannot run here.
    """
    options = step_options(
        non_blocking=non_blocking,
        prepare_batch=prepare_batch,
        model_transform=model_transform,
        model_fn=model_fn,
    )
    chosen = open_backend(backend, device, amp_mode)
    model, _ = prepare(chosen, model, [])
    evaluator = Engine(EvaluationStep(model, chosen, options, output_transform), chosen)
    for name, metric in (metrics or {}).items():
        metric.attach(evaluator, name)
    return evaluator
