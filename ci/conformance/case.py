"""What the conformance checks work with: the backend under test, and a small training on it."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from crosstrain.backends import Backend, StepResult, get, random_state
from crosstrain.backends.placement import map_tensors
from crosstrain.engine import Checkpoint

# Words of `Backend.capabilities`.
NOTHING = "null"
SCALING = "loss_scaling"

TargetBackend = str | type[Any]

LEARNING_RATE = 1.0

# Keeps gradients small enough that no first loss scale in use, up to 2**16, makes them overflow.
_SHARE = 1 / 16
# Flags that a library may set once and for all when it is loaded; the others are the user's.
_SET_BY_LOADING = ("fill_uninitialized_memory", "threads", "python_threads", "variables")


class NonConformance(AssertionError):
    """A backend does not keep a promise of the step protocol."""


def expect(condition: object, problem: str) -> None:
    """Raise `NonConformance` with the problem unless a condition holds."""
    if not condition:
        raise NonConformance(problem)


def expect_flags(before: Mapping[str, object], problem: str) -> None:
    """Expect the flags that were set before; the problem is followed by those that changed."""
    changed = [name for name, value in flags().items() if before.get(name) != value]
    expect(not changed, f"{problem}: {', '.join(changed)}.")


def error_of(call: Callable[[], object], problem: str) -> Exception:
    """Return the error that a call raises, of whichever kind; that it raises none is a problem."""
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return error
    raise NonConformance(problem)


def expect_refusal(call: Callable[[], object], about: str, problem: str) -> None:
    """Expect a call to raise an error that says something."""
    expect(str(error_of(call, problem)), f"Its error about {about} says nothing.")


def expect_error_passes(context: AbstractContextManager[object], name: str) -> None:
    """Expect an error of a context's block to come out of it."""
    with contextlib.suppress(KeyError):
        with context:
            raise KeyError
        raise NonConformance(f"{name}() swallows an error of its block.")


class Case:
    """A backend under test, made anew for each check; see `check_backend` for the arguments."""

    def __init__(self, target: TargetBackend, option: str | None, tolerance: float) -> None:
        self.kind: Any
        if not isinstance(target, str):
            self.kind, self.option = target, option or target.options[0]
        elif option is not None:
            raise ValueError(f"The spec {target!r} says its option; leave option={option!r} out.")
        else:
            made = get(target)
            self.kind, self.option = type(made), made.option
        self.tolerance = tolerance
        self.at_start = {
            name: value for name, value in flags().items() if name not in _SET_BY_LOADING
        }
        # It is used once, as what is loaded may set variables, once and for all. If it does not
        # open, the check of opening says so; if it puts nothing, that of putting.
        with contextlib.suppress(Exception), self.opened() as backend:
            backend.put(torch.zeros(1))

    def new(self) -> Any:
        """Make a backend that is not opened; whether it is one is what the checks find out."""
        return self.kind(self.option)

    @contextlib.contextmanager
    def opened(self) -> Generator[Backend, None, None]:
        """Open a new backend for a block."""
        backend = self.new()
        backend.open()
        try:
            yield backend
        finally:
            backend.close()

    @contextlib.contextmanager
    def isolated(self) -> Generator[None, None, None]:
        """Run a block as one process of one, and undo what it does to variables and generators."""
        with mock.patch.dict(os.environ), random_state.preserved():
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                os.environ.pop(name, None)
            yield


def small_model() -> torch.nn.Module:
    """Make a network with dropout and batch norm, always of the same weights."""
    with random_state.preserved():
        random_state.seed(17)
        return torch.nn.Sequential(
            torch.nn.Linear(8, 32),
            torch.nn.BatchNorm1d(32),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(32, 1),
        )


def plain_model() -> torch.nn.Module:
    """Make a network that draws no random numbers, always of the same weights."""
    with random_state.preserved():
        random_state.seed(18)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def batch_of(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a batch: x (16, 8) and y (16, 1), the sine of a fixed projection; the same each time."""
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(16, 8, generator=generator)
    weights = torch.linspace(-1, 1, 8)
    return x, torch.sin(x @ weights).unsqueeze(1)


def loss_of(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the loss that the checks train on: a share of the mean squared error."""
    return torch.nn.functional.mse_loss(found, wanted) * _SHARE


def backward(
    backend: Backend, model: Callable[..., Any], optimizers: Any, number: int, factor: float = 1.0
) -> float:
    """Run forward and backward on a batch, the loss times a factor; return the plain loss."""
    x, y = backend.put(batch_of(number))
    with backend.autocast():
        loss = loss_of(model(x), y)
    backend.backward(loss * factor, optimizers)
    return float(loss.detach())


class Training:
    """A training step as the engine drives it, over one model and one optimizer."""

    def __init__(self, backend: Backend, model: torch.nn.Module | None = None) -> None:
        self.backend = backend
        model = plain_model() if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.model, self.optimizer = backend.prepare(model, optimizer)

    def backward(self, number: int, factor: float = 1.0) -> float:
        """Do what the function of this name does, with this model and optimizer."""
        return backward(self.backend, self.model, self.optimizer, number, factor)

    def step(self, number: int, max_norm: float | None = None, factor: float = 1.0) -> StepResult:
        """Run one iteration on a batch, whose loss is kept."""
        self.optimizer.zero_grad()
        self.loss = self.backward(number, factor)
        result = self.backend.step(self.optimizer, max_norm)
        self.backend.sync()
        return result

    def losses(self, first: int, last: int) -> list[float]:
        """Run iterations and return their losses."""
        found: list[float] = []
        for number in range(first, last):
            self.step(number)
            found.append(self.loss)
        return found

    def weights(self) -> torch.Tensor:
        """Return all weights as one vector on the CPU, in fp32."""
        weights = (whole(parameter).cpu().float() for parameter in self.model.parameters())
        return torch.cat([weight.flatten() for weight in weights])

    def state(self) -> dict[str, Any]:
        """Return everything that a resume needs, on the CPU."""
        objects = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {
            **map_tensors(objects, lambda tensor: whole(tensor).cpu().clone()),
            "backend": self.backend.state_dict(),
            "host": random_state.capture(),
            "device": self.backend.rng_state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned: random states last, after the boundary."""
        # It gives a sharded model and its optimizer their parts.
        objects = {"model": self.model, "optimizer": self.optimizer}
        Checkpoint.load_objects(objects, {name: state[name] for name in objects})
        self.backend.load_state_dict(state["backend"])
        self.backend.sync()
        random_state.restore(state["host"])
        self.backend.set_rng_state(state["device"])


def by_hand(steps: int, max_norm: float | None = None) -> tuple[list[float], torch.Tensor, float]:
    """Train in plain torch, in fp32 on the CPU: what every backend has to come close to.

    It returns the losses, the weights at the end as one vector, and the last gradient's norm.
    """
    model = plain_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    norm = 0.0
    for number in range(steps):
        x, y = batch_of(number)
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = float("inf") if max_norm is None else max_norm
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
        optimizer.step()
        losses.append(float(loss.detach()))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return losses, weights, norm


def whole(tensor: Any) -> Any:
    """Return a tensor, detached; in one piece, if its parts lie in several processes."""
    found = tensor.detach()
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the Euclidean distance of two vectors."""
    return float((ours - theirs).square().sum().sqrt())


def is_close(ours: float, theirs: float, tolerance: float) -> bool:
    """Tell whether two numbers differ by no more than a share of the second."""
    return abs(ours - theirs) <= tolerance * max(abs(theirs), 1e-3)


def through_a_file(value: Any) -> Any:
    """Save a value and load it as a checkpoint is loaded: safely, and without its device."""
    devices: set[str] = set()
    map_tensors(value, lambda tensor: devices.add(str(tensor.device)))
    expect(devices <= {"cpu"}, f"A state holds tensors on {sorted(devices)}; copy them to the CPU.")
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    # torch raises several kinds of errors here; all mean that the file cannot be read safely.
    except Exception as error:
        raise NonConformance(
            f"A state does not load with weights_only=True: {error}. Use tensors and plain types."
        ) from error


def flags() -> dict[str, object]:
    """Return what a context may set and has to restore: torch's flags, threads, variables."""
    memory: Any = torch.utils.deterministic
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill_uninitialized_memory": memory.fill_uninitialized_memory,
        "cudnn.enabled": cudnn.enabled,
        "cudnn.benchmark": cudnn.benchmark,
        "cudnn.deterministic": cudnn.deterministic,
        "cudnn.conv.fp32_precision": cudnn.conv.fp32_precision,
        "cudnn.rnn.fp32_precision": cudnn.rnn.fp32_precision,
        "cuda.matmul.fp32_precision": matmul.fp32_precision,
        "default_dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "python_threads": threading.active_count(),
        "grad": torch.is_grad_enabled(),
        "variables": dict(os.environ),
    }
