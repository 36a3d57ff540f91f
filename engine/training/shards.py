"""Logical shards: a training with the same bits on any number of processes.

A mean over 8 samples and the mean of two means over 4 differ in their last bits. So each global
batch is dealt to S logical shards, whatever the number of processes; each shard has a forward and a
backward pass of its own, under random numbers of its own, and the results are added up in one fixed
order (`tree_sum`). A process computes S/W shards, one after the other. Dealing, passes, buffers and
the sum are one file, since the promise holds only if all four keep to the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from crosstrain.backends import BackendError
from crosstrain.engine.data.shares import ShardedBatch, check_shards
from crosstrain.engine.data.streams import StreamKey, seed_host
from crosstrain.engine.random_states import random_states_kept
from crosstrain.engine.spread import is_spread, parameters_of

from .arguments import prepare
from .options import StepOptions, several
from .step import StepEvents, TrainingStep
from .tree_sum import Exchange, Leaf, PartialSums, foreach, gather_into

if TYPE_CHECKING:
    from crosstrain.backends import Backend
    from crosstrain.engine.engine import Engine

#: What a loss is: `mean` over a shard's samples, `sum` over them, or a mean over what a function of
#: the shard's part of the batch counts.
Reduction = str | Callable[[Any], Any]

# Where in the streams of an iteration the shards' keys are: beyond any batch.
_SHARDS: Final = 1 << 58


class LogicalShards:
    """Computes the gradients of global batches shard by shard, the same on any number of processes.

    For a process function of your own; `create_supervised_trainer(..., shards=S)` does it by
    itself. Give the same number to the engine, `DeterministicEngine(step, backend, shards=S)`,
    which deals the data out by shards. Models and optimizers are prepared here, not by the
    backend's `prepare`, which would have the processes add gradients up in an order of their own.

    Args:
        count: the number of logical shards, S: a power of two.
        backend: an opened backend.
        model: a model, or several; all processes take rank 0's parameters and buffers.
        optimizer: its optimizer, or several.
        reduction: what the loss is: `mean` over a shard's samples, `sum` over them, or a function
            that is called with a shard's part of the batch and returns, as a number or a tensor of
            one element on the host, what the loss is a mean over, such as how many tokens. A shard
            in which it counts 0 has no part in the loss.

    Raises:
        ValueError: if the number of processes does not divide `count`, or `reduction` is none.
        BackendError: if the backend or a model cannot do it, with the reason, or the processes'
            models differ.
    """

    def __init__(
        self,
        count: int,
        backend: Backend,
        model: Any,
        optimizer: Any,
        reduction: Reduction = "mean",
    ) -> None:
        self.count = check_shards(count, backend.world)
        self.backend = backend
        if not (reduction in ("mean", "sum") or callable(reduction)):
            raise ValueError(
                f"The reduction of a loss is 'mean', 'sum' or a function that counts, got "
                f"{reduction!r}."
            )
        self.reduction = reduction
        _refuse(backend, several(model))
        #: The prepared model or models, and the optimizer or optimizers.
        self.model, self.optimizer = prepare(backend, model, optimizer, replicated=False)
        self.models: list[torch.nn.Module] = several(self.model)
        self.optimizers: list[torch.optim.Optimizer] = several(self.optimizer)
        self._buffers = _Buffers(self.models)
        self._parameters: list[Tensor] = []
        self._exchange: Exchange | None = None
        # Whether a backward pass comes to each parameter once at most; None: not known yet.
        self._once: bool | None = None
        # The gradients that lie in the exchange's buffers, which the next one overwrites.
        self._lent: list[Tensor | None] = []
        if backend.world.size > 1:
            _take_those_of_rank_0(self.models, backend)

    def backward(
        self, engine: Any, batch: Any, loss_of: Callable[[Any], Tensor], scale: float = 1.0
    ) -> Tensor:
        """Adds the global batch's gradients to those that there are, the same in all processes.

        A collective operation: all processes call it at the same iterations.

        Args:
            engine: the engine, whose seed and iteration key the random numbers.
            batch: what the engine gave to the process function.
            loss_of: called with a shard's part of the batch, as the loader collated it; runs the
                forward pass, under the backend's autocast if you like, and returns the loss, of one
                element. The backward pass follows.
            scale: each loss is multiplied by it, such as 1/n in an accumulation window of n
                iterations.

        Returns:
            The global batch's loss, detached, unread, not multiplied by `scale`.

        Raises:
            ValueError: if the batch was not dealt out to as many shards, or `reduction` counts
                nothing in any of them.
        """
        if not isinstance(batch, ShardedBatch) or batch.shards != self.count:
            found = f"{batch.shards}" if isinstance(batch, ShardedBatch) else type(batch).__name__
            raise ValueError(
                f"The batch was not dealt out to {self.count} logical shards ({found}). Run the "
                f"step in DeterministicEngine(step, backend, shards={self.count}), over a "
                "DataLoader of a map-style dataset."
            )
        self._look_for_parameters()
        window: list[Tensor | None] = []
        for parameter, lent in zip(self._parameters, self._lent, strict=True):
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and gradient is lent:
                gradient = gradient.clone()
            window.append(gradient)
        self._buffers.begin(keep=self.count > 1)
        if self.backend.world.size > 1 and self._exchange is None:
            self._exchange = self._make_exchange()
        try:
            grads, values = self._own_shards(engine, batch, loss_of, scale)
            if self._exchange is not None:
                grads, values = self._of_all(self._exchange, grads, values)
        except BaseException:
            # Some of it may have been sent.
            self._exchange = None
            raise
        return self._take_over(grads, values, window, batch.total)

    def _make_exchange(self) -> Exchange:
        number = torch.zeros((), dtype=self._precise, device=self._parameters[0].device)
        buffers = self._buffers.like()
        told = torch.zeros(len(self._parameters) + 2 + len(buffers), device=number.device)
        like = [*self._parameters, number, number, *buffers, told]
        return Exchange(like, self.backend.world.size)

    def _look_for_parameters(self) -> None:
        """Finds what is trained now: parts of a model may have been frozen or unfrozen."""
        found: dict[int, Tensor] = {}
        for model in self.models:
            found |= {id(p): p for p in model.parameters() if p.requires_grad}
        for optimizer in self.optimizers:
            found |= {id(p): p for p in parameters_of(optimizer) if p.requires_grad}
        # In the order in which backward passes come to them, about: the last layers first.
        trained = list(found.values())[::-1]
        if list(map(id, trained)) != list(map(id, self._parameters)):
            self._parameters, self._lent = trained, [None] * len(trained)
            self._exchange, self._once = None, None

    # ---------------------------------------------------------------- this process's shards

    def _own_shards(
        self, engine: Any, batch: ShardedBatch, loss_of: Callable[[Any], Tensor], scale: float
    ) -> tuple[Leaf, Leaf]:
        """Returns the sums over this process's shards: of gradients, and of loss and buffers."""
        grads, values = PartialSums(), PartialSums()
        alone, last, paired = len(batch) == 1, len(batch) - 1, False
        with random_states_kept(self.backend), self._watched(grads) as arrivals:
            for place, (part, samples) in enumerate(zip(batch, batch.samples, strict=True)):
                shard = batch.first + place
                if place:
                    self._buffers.restore()
                told: Leaf = [None, None]
                if samples:
                    self._seed(engine, shard)
                    arrivals.begin(self._once is True, hands_over=place == last)
                    told = self._pass(part, samples, batch.total, loss_of, scale)
                    if self._once is None and any(arrivals.seen):
                        self._once = max(arrivals.seen) == 1
                if place % 2 == 0:
                    # The backward pass of the second of two neighbours adds up both, if it comes to
                    # each parameter once: (a + b) + c is not a + (b + c).
                    paired = self._once is True and not alone
                if not paired:
                    grads.add(self._taken())
                elif place % 2:
                    grads.add(self._taken(), 1)
                values.add([*told, *self._buffers.leaf(samples, batch.total, shard == 0)])
        return grads.total(), values.total()

    @contextmanager
    def _watched(self, sums: PartialSums) -> Generator[_Arrivals, None, None]:
        """Watches gradients come, and has those of the last pass sent while it goes on.

        Where backward passes come to a parameter twice, as with reentrant checkpoints, nothing is
        watched: gradients are taken when a pass has ended.
        """
        arrivals = _Arrivals(len(self._parameters), self._exchange, sums)
        handles: list[Any] = []
        parameters: list[Any] = [] if self._once is False else self._parameters
        try:
            for slot, parameter in enumerate(parameters):
                hook = partial(arrivals.take, slot)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
            yield arrivals
        finally:
            for handle in handles:
                handle.remove()

    def _seed(self, engine: Any, shard: int) -> None:
        key = StreamKey(engine.state.seed, engine.state.iteration).seed_at(_SHARDS + shard)
        seed_host(key)
        self.backend.seed(key)

    def _pass(
        self, part: Any, samples: int, total: int, loss_of: Callable[[Any], Tensor], scale: float
    ) -> Leaf:
        """Runs a shard's passes; returns its part of the loss, and of what it is a mean over."""
        loss = loss_of(part)
        weight, counted = (1.0 if self.reduction == "sum" else samples / total), None
        if callable(self.reduction):
            count = float(self.reduction(part))
            if not count > 0:
                # Nothing to take a mean over: the loss is no number, and nothing of it gets out.
                return [None, None]
            # Divided by what is the same everywhere, so that fp16 gradients stay where they are.
            weight = count / total
            counted = torch.full((), weight, dtype=self._precise, device=loss.device)
        shown = loss.detach().reshape(()).to(self._precise) * weight
        self.backend.backward(loss * (weight * scale), self.optimizers)
        return [shown, counted]

    @property
    def _precise(self) -> torch.dtype:
        doubles = bool(self._parameters) and self._parameters[0].dtype == torch.float64
        return torch.float64 if doubles else torch.float32

    def _taken(self) -> Leaf:
        leaf: Leaf = []
        for parameter in self._parameters:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and gradient.layout != torch.strided:
                raise BackendError(
                    f"A parameter of shape {tuple(parameter.shape)} got a gradient of layout "
                    f"{gradient.layout}, whose entries are not added up in a fixed order. Make its "
                    "module with sparse=False, or train without logical shards."
                )
            leaf.append(gradient)
        return leaf

    # ---------------------------------------------------------------- all shards

    def _of_all(self, exchange: Exchange, grads: Leaf, values: Leaf) -> tuple[Leaf, Leaf]:
        """Returns the sums over the shards of all processes."""
        leaf = [*grads, *values]
        device = self._parameters[0].device
        first = len(grads) + 2
        own = [one is not None or exchange.has(slot) for slot, one in enumerate(leaf[:first])]
        told = torch.tensor(own, dtype=torch.float32).to(device)
        changed = [torch.as_tensor(one, device=device) for one in self._buffers.changed]
        told = torch.cat([told, *(one.reshape(1).to(torch.float32) for one in changed)])
        found: Leaf = list(exchange.sum([*leaf, told]))
        counts = found.pop()
        assert counts is not None
        counts_too = callable(self.reduction)
        if device.type == "cpu" or not all(own[: first - (not counts_too)]):
            # What this process lacks others may have: they tell. Elsewhere nobody has to wait.
            known: list[float] = counts.tolist()
            found = [
                one if place >= first or count else None
                for place, (one, count) in enumerate(zip(found, known, strict=True))
            ]
            self._buffers.changed = known[first:]
        else:
            self._buffers.changed = list(counts[first:].unbind(0))
            if not counts_too:
                found[first - 1] = None
        return found[: len(grads)], found[len(grads) :]

    def _take_over(
        self, grads: Leaf, values: Leaf, window: Sequence[Tensor | None], total: int
    ) -> Tensor:
        """Gives the parameters their gradients and the buffers their values; returns the loss."""
        loss, counted, *buffers = values
        if loss is None:
            raise ValueError(
                "The loss of this batch is a mean over nothing: loss_reduction counts 0 in each "
                "part of it. Leave such batches out."
            )
        if counted is not None:
            foreach._foreach_div_([one for one in grads if one is not None], counted)
            loss = loss / counted
        lent = self.backend.world.size > 1
        for place, (parameter, one, before) in enumerate(
            zip(self._parameters, grads, window, strict=True)
        ):
            self._lent[place] = None
            if before is not None:
                # A window's sum goes on from iteration to iteration, in their order.
                parameter.grad = before if one is None else before.add_(one)
            else:
                parameter.grad = one
                if lent:
                    self._lent[place] = parameter.grad
        self._buffers.take_over(buffers, total)
        return loss.clone() if lent else loss


class _Arrivals:
    """What the backward passes of an iteration have come to."""

    def __init__(self, count: int, exchange: Exchange | None, sums: PartialSums) -> None:
        self._exchange, self._sums = exchange, sums
        self._once = self._hands_over = False
        #: How often the pass has come to each parameter.
        self.seen = [0] * count

    def begin(self, once: bool, hands_over: bool) -> None:
        """Begins a pass, after passes that came to each parameter once at most, or did not.

        What is handed over is sent as soon as it is whole.
        """
        self._once = once
        self._hands_over = once and hands_over and self._exchange is not None
        self.seen = [0] * len(self.seen)

    def take(self, slot: int, parameter: Tensor) -> None:
        """Is called where a pass has added to a parameter's gradient."""
        self.seen[slot] += 1
        if self.seen[slot] > 1 and self._once:
            raise BackendError(
                f"A backward pass came twice to a parameter of shape {tuple(parameter.shape)}, "
                "and the passes before came to each once, so that its gradient was taken as "
                "whole. Checkpoint layers with use_reentrant=False, or in all batches."
            )
        gradient = parameter.grad
        if not self._hands_over or gradient is None or gradient.layout != torch.strided:
            return
        assert self._exchange is not None
        parameter.grad = None
        self._exchange.put(slot, self._sums.with_last(slot, gradient))


class _Buffers:
    """Buffers that forward passes change: each shard begins with the iteration's, all end with one.

    Those of floating point become the mean over the shards, weighted by their samples; others, such
    as counters, become those of shard 0.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        places: dict[int, tuple[torch.nn.Module, str]] = {}
        for model in models:
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    places.setdefault(id(buffer), (module, name))
        self._places = list(places.values())
        self._now: list[Tensor] = []
        self._start: list[Tensor] = []
        #: Of each buffer: how many samples the shards have that have changed it, to be set to those
        #: of all processes; a tensor of one element where reading it would mean to wait.
        self.changed: list[Any] = []
        # Those that a shard has changed whose changes do not count.
        self._put_back: set[int] = set()

    def _present(self) -> list[Tensor]:
        return [getattr(module, name) for module, name in self._places]

    def begin(self, keep: bool) -> None:
        """Notes the buffers' values at the iteration's beginning."""
        self._now = self._present()
        self._start = [buffer.detach().clone() for buffer in self._now] if keep else []
        self.changed = [0] * len(self._places)
        self._put_back = set()

    def restore(self) -> None:
        """Puts the values of the iteration's beginning back, for another shard."""
        for (module, name), now in zip(self._places, self._now, strict=True):
            if getattr(module, name) is not now:
                setattr(module, name, now)
        if self._now:
            with torch.no_grad():
                foreach._foreach_copy_(self._now, self._start)

    def leaf(self, samples: int, total: int, first: bool) -> Leaf:
        """Returns a shard's part of the buffers."""
        if not self._start or not samples:
            return [None] * len(self._places)
        found: Leaf = []
        for place, (buffer, start) in enumerate(zip(self._present(), self._start, strict=True)):
            # By their values: batch norm's kernels write without a mark in the tensor's version.
            changed: Any = _differ(buffer, start)
            if changed is False:
                found.append(None)
            elif _averages(buffer):
                self.changed[place] = self.changed[place] + changed * samples
                found.append(buffer.detach() * (samples / total))
            elif first:
                self.changed[place] = changed * total
                # Bytes as numbers: only shard 0 has any, and sums of these with nothing are exact.
                found.append(_to_bytes(buffer).to(torch.float32))
            else:
                self._put_back.add(place)
                found.append(None)
        return found

    def like(self) -> list[Tensor]:
        """Returns tensors of the types and shapes that `leaf` gives."""
        return [
            buffer if _averages(buffer) else _to_bytes(buffer).to(torch.float32)
            for buffer in self._start
        ]

    def take_over(self, values: Sequence[Tensor | None], total: int) -> None:
        """Sets the buffers to what all shards together have made of them."""
        if not self._start:
            return
        for place, (module, name) in enumerate(self._places):
            now, value, count = self._now[place], values[place], self.changed[place]
            if getattr(module, name) is not now:
                setattr(module, name, now)
            start = self._start[place]
            if value is None or (not isinstance(count, Tensor) and not count):
                if place not in self._put_back:
                    continue
                # Shard 0 has left it as it was.
                value = start
            elif _averages(now):
                value = _mean(value, start, count, total)
            else:
                value = value.to(torch.uint8).view(now.dtype).view(now.shape)
                if isinstance(count, Tensor):
                    value = torch.where(count > 0, value, start)
            with torch.no_grad():
                now.copy_(value)


def _mean(value: Tensor, start: Tensor, count: Any, total: int) -> Tensor:
    """Returns the mean over all shards; those that changed nothing have the value of the start."""
    if not isinstance(count, Tensor):
        return value if count == total else value + start * ((total - count) / total)
    rest = start * ((total - count) / total).to(start.dtype)
    changed = torch.where(count == total, value, value + rest)
    return torch.where(count > 0, changed, start)


def _differ(one: Tensor, other: Tensor) -> Any:
    """Tells whether two tensors differ; as a tensor where reading that would mean to wait."""
    if one.device.type == "cpu":
        return not torch.equal(one, other)
    return (one != other).any()


def _averages(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


def _to_bytes(tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor as flat bytes, whatever its strides."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    flat.copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8)


# ---------------------------------------------------------------- what is refused


def _refuse(backend: Backend, models: Sequence[Any]) -> None:
    """Refuses what adds up in an order of its own."""
    if "logical_shards" not in backend.capabilities:
        raise BackendError(
            f"Logical shards do not go with the backend '{backend.name}:{backend.option}': it adds "
            "gradients up in an order of its own, or keeps them to itself. docs/logical_shards.md "
            "says which backends can: those whose capabilities have 'logical_shards'."
        )
    for model in models:
        if not isinstance(model, torch.nn.Module):
            continue
        if isinstance(model, DistributedDataParallel):
            raise BackendError(
                "A DistributedDataParallel adds gradients up in an order that follows from the "
                "number of processes. Give the model itself: logical shards need no wrapper."
            )
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.SyncBatchNorm):
                raise BackendError(
                    f"'{name}' is a SyncBatchNorm, whose statistics are those of the samples of "
                    "all processes at once. Use BatchNorm: each logical shard has statistics of "
                    "its own, on any number of processes."
                )
        if any(map(is_spread, model.parameters())):
            raise BackendError(
                f"The parameters of this {type(model).__name__} are spread over the processes, "
                "whose gradients are reduced in an order of their own. Train it without logical "
                "shards."
            )


def _take_those_of_rank_0(models: Sequence[torch.nn.Module], backend: Backend) -> None:
    """Gives all processes rank 0's parameters and buffers."""
    named = [
        pair for model in models for pair in (*model.named_parameters(), *model.named_buffers())
    ]
    told = repr([(name, tuple(one.shape), str(one.dtype)) for name, one in named])
    number = int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")
    own = torch.tensor([number], dtype=torch.int64, device=backend.device)
    every = torch.empty(backend.world.size, dtype=torch.int64, device=backend.device)
    gather_into(every, own)
    differing = [rank for rank, found in enumerate(every.tolist()) if found != every[0].item()]
    if differing:
        raise BackendError(
            f"The models of rank 0 and of ranks {differing} differ in the names, shapes or types "
            "of their parameters or buffers. Build the same models in every process."
        )
    with torch.no_grad():
        for _, tensor in named:
            sent = _to_bytes(tensor)
            torch.distributed.broadcast(sent, 0)
            tensor.detach().copy_(sent.view(tensor.dtype).view(tensor.shape))


# ---------------------------------------------------------------- the training step


class ShardedStep(TrainingStep):
    """A training step that computes each iteration in logical shards.

    What differs from a `TrainingStep`: the loss, which is also the default output, is the global
    batch's. BACKWARD_STARTED and BACKWARD_COMPLETED fire once an iteration, around all shards. An
    `output_transform` gets lists of x, y and y_pred, one item for each shard of this process.
    """

    def __init__(
        self,
        shards: LogicalShards,
        loss_fn: Callable[[Any, Any], Tensor],
        options: StepOptions | None = None,
    ) -> None:
        super().__init__(shards.model, shards.optimizer, loss_fn, shards.backend, options)
        self.shards = shards
        # No averaging over processes: the sum over the shards is the same in all of them.
        self._many = False
        self._keeps = not self.options.keeps_loss

    def _iteration(self, engine: Engine, batch: Any, filled: int) -> Any:
        """Runs each shard's forward and backward pass, the sum, and the step."""
        listeners, kept = self._listeners, list[tuple[Any, Any, Any]]()

        def loss_of(part: Any) -> Tensor:
            x, y = self._split(part, self.backend)
            y_pred, loss = self._loss_of(x, y)
            if self._keeps:
                kept.append((x, y, y_pred))
            return loss

        self._filled = 0
        if listeners.backward_started.handlers:
            engine.fire_event(StepEvents.BACKWARD_STARTED)
        loss = self.shards.backward(engine, batch, loss_of, 1 / self._planned)
        if listeners.backward_completed.handlers:
            engine.fire_event(StepEvents.BACKWARD_COMPLETED)
        if filled == self._planned:
            self._step(engine)
            filled = 0
        xs, ys, y_preds = map(list, zip(*kept, strict=True)) if kept else ([], [], [])
        output = self._output(xs, ys, y_preds, loss)
        self._filled = filled
        return output
