"""What a model's forward, or a hook, keeps beside what is saved is told; what is saved is not."""

from __future__ import annotations

import multiprocessing
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composition_kept import KINDS, function_with_a_gradient
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torch.utils.hooks import RemovableHandle

from crosstrain.engine import (
    Checks,
    DeterministicEngine,
    Events,
    ResumeWarning,
    create_supervised_trainer,
    resume_or_start,
)

Place = Callable[[nn.Sequential, torch.optim.Optimizer, Callable[[], float]], Any]


def _forward_hook(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    model[0].register_forward_hook(lambda module, given, found: found + draw())


def _pre_hook(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    model[1].register_forward_pre_hook(lambda module, given: (given[0] + draw(),))


def _backward_hook(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    def scaled(module: Any, given: Any, found: Any) -> Any:
        return tuple(one if one is None else one * draw() for one in given)

    model[1].register_full_backward_hook(scaled)


def _tensor_hook(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    model[0].weight.register_hook(lambda gradient: gradient * draw())


def _gradient_hook(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    def scaled(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(draw())

    model[0].weight.register_post_accumulate_grad_hook(scaled)


def _step_hook(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    def rated(*_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * draw()

    optimizer.register_step_pre_hook(rated)


class Drawing(nn.Module):
    """Adds what it draws by an object that it holds."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self._drawn()

    def _drawn(self) -> float:
        return self.draw()


def _attribute(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    model[1] = Drawing(draw)


def _step(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    class Scaled(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.draw())  # type: ignore[attr-defined]
            return super().step(closure)

    optimizer.__class__ = Scaled
    optimizer.draw = draw


def _function(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    model[1] = function_with_a_gradient(draw)


def _set_forward(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    forward = model[1].forward
    model[1].forward = lambda x: forward(x) + draw()


def _set_step(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> None:
    step = optimizer.step

    def stepped(self: Any, closure: Any = None) -> Any:
        _rated(optimizer, draw)
        return step(closure)

    optimizer.step = types.MethodType(stepped, optimizer)
    # It wraps the step in its turn.
    torch.optim.lr_scheduler.StepLR(optimizer, 2)


def _rated(optimizer: Any, draw: Callable[[], float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * draw()


def _hook_of_all_modules(model: nn.Sequential, optimizer: Any, draw: Callable[[], float]) -> Any:
    return register_module_forward_hook(
        lambda module, given, found: found + draw() if module is model[1] else None
    )


def _hook_of_all_optimizers(model: Any, optimizer: Any, draw: Callable[[], float]) -> Any:
    return register_optimizer_step_post_hook(lambda *_: _rated(optimizer, draw))


PLACES: dict[str, tuple[Place, str]] = {
    "a forward hook": (_forward_hook, "a forward hook of model.0"),
    "a forward pre-hook": (_pre_hook, "a forward pre-hook of model.1"),
    "a backward hook": (_backward_hook, "a backward hook of model.1"),
    "a hook of a parameter": (_tensor_hook, "a hook of model.0.weight"),
    "a hook after a gradient": (_gradient_hook, "a hook after its gradient of model.0.weight"),
    "a hook of an optimizer": (_step_hook, "a step pre-hook of optimizer"),
    "a forward set on a module": (_set_forward, "the forward of model.1"),
    "a step set on an optimizer": (_set_step, "the step of optimizer"),
    "a hook of all modules": (_hook_of_all_modules, "a forward hook of all modules"),
    "a hook of all optimizers": (_hook_of_all_optimizers, "a step post-hook of all optimizers"),
    "an optimizer's step": (_step, "the step of optimizer"),
    "a function with a gradient of its own": (_function, "the forward of model.1"),
    "an attribute": (_attribute, "the forward of model.1"),
}


class Counter:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1 + self.calls / 8


def _counter() -> Callable[[], float]:
    return Counter()


def _list() -> Callable[[], float]:
    seen: list[float] = []

    def draw() -> float:
        seen.append(1 + len(seen) / 8)
        return seen[-1]

    return draw


def _generator() -> Callable[[], float]:
    generator = np.random.default_rng(1)
    return lambda: float(generator.random())


def _told(
    place: Place | None, draw: Callable[[], float], checks: Checks | None = None, loss: Any = None
) -> list[str]:
    """Trains for two epochs, and returns what is said when a state is taken after each."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    loss = nn.functional.mse_loss if loss is None else loss
    weights = [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]
    optimizer = torch.optim.SGD(weights, 0.1)
    hook = None if place is None else place(model, optimizer, draw)
    trainer = create_supervised_trainer(
        model, optimizer, loss, backend="cpu", deterministic=True, checks=checks
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epochs in (1, 2):
            trainer.run([(torch.ones(1, 2), torch.ones(1, 1))] * 3, max_epochs=epochs)
            trainer.state_dict()
    if isinstance(hook, RemovableHandle):
        hook.remove()
    return [str(one.message) for one in caught if "A resumed run will" in str(one.message)]


@pytest.mark.parametrize("make", [_counter, _list, _generator])
@pytest.mark.parametrize("place", PLACES)
def test_what_a_hook_or_a_forward_keeps_is_told_by_where_it_is(
    place: str, make: Callable[[], Callable[[], float]]
) -> None:
    put, called = PLACES[place]
    said = _told(put, make())
    assert len(said) == 1, said
    assert called in said[0]
    assert not _told(put, make(), Checks(unnamed="off"))


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_keeps_something_of_its_calls_is_told_by_what_it_is(kind: str) -> None:
    make, words = KINDS[kind]
    said = _told(_attribute, make())
    assert len(said) == 1, said
    assert any(word in said[0] for word in words), said


class Saved(Drawing):
    """Has its counter in its state, and a number that is recorded."""

    def __init__(self) -> None:
        super().__init__(Counter())
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale *= 1.5
        return super().forward(x) * self.scale

    def get_extra_state(self) -> int:
        return self.draw.calls  # type: ignore[attr-defined]

    def set_extra_state(self, state: int) -> None:
        self.draw.calls = state  # type: ignore[attr-defined]


class Learned(nn.Module):
    """A loss that learns its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = ((found - wanted) ** 2).mean() * self.scale.exp() + self.scale
        return loss


class Annealed(nn.Module):
    """A loss that counts its calls in a number, which is recorded."""

    calls = 0

    def forward(self, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return ((found - wanted) ** 2).mean() / self.calls


def test_what_is_saved_or_recorded_is_not_told() -> None:
    assert not _told(None, Counter())
    assert not _told(lambda model, optimizer, draw: model.append(nn.Dropout()), Counter())
    assert not _told(lambda model, optimizer, draw: model.append(Saved()), Counter())
    assert not _told(None, Counter(), loss=nn.MSELoss())
    assert not _told(
        lambda model, optimizer, draw: model[0].weight.register_hook(torch.zeros_like), Counter()
    )
    assert not _told(None, Counter(), loss=Annealed())


class Block(nn.Module):
    """A module with parameters, as most people write them: alone, nested, shared, in a list."""

    def __init__(self, depth: int, shared: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2, momentum=0.1)
        self.shared = shared
        self.inner = nn.ModuleList(Block(depth - 1, shared) for _ in range(depth))
        self.kept = {"linear": self.linear}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.norm(self.linear(x)) + self.shared(x)
        for block in self.inner:
            found = block(found)
        return found + self.kept["linear"](x)


@pytest.mark.parametrize("own_step", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_modules_of_ones_own_are_saved_with_the_model_that_has_them(
    depth: int, own_step: bool, tmp_path: Path
) -> None:
    model = nn.Sequential(Block(depth, nn.Linear(2, 2)), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(engine: Any, batch: Any) -> None:
        optimizer.zero_grad()
        model(batch[0]).sum().backward()
        optimizer.step()

    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, backend="cpu", deterministic=True
    )
    if own_step:
        trainer = DeterministicEngine(step)
    resume_or_start(trainer, {"model": model, "optimizer": optimizer}, tmp_path, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        trainer.run([(torch.ones(3, 2), torch.ones(3, 1))] * 3, max_epochs=2)


@pytest.mark.parametrize("named", ["the model", "what wraps it"])
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_a_model_and_what_wraps_it_are_one(wrap: Any, named: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(engine: Any, batch: Any) -> None:
        optimizer.zero_grad()
        (wrapped(batch) if named == "the model" else model(batch)).sum().backward()
        optimizer.step()

    trainer = DeterministicEngine(step)
    to_save = {"model": model if named == "the model" else wrapped, "optimizer": optimizer}
    resume_or_start(trainer, to_save, tmp_path, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        trainer.run([torch.ones(3, 2)] * 3, max_epochs=2)


def test_memory_that_processes_share_is_looked_at() -> None:
    class Shared:
        def __init__(self) -> None:
            self.calls = multiprocessing.Value("i", 0)

        def __call__(self) -> float:
            with self.calls.get_lock():
                self.calls.value += 1
            return float(self.calls.value)

    said = _told(_forward_hook, Shared())
    assert len(said) == 1, said
    assert "a forward hook of model.0" in said[0]


def test_a_function_that_a_named_object_holds_is_looked_into(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    factors = [1.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: factors[-1])
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, backend="cpu", deterministic=True
    )

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        factors.append(factors[-1] * 0.9)
        scheduler.step()

    to_save = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    resume_or_start(trainer, to_save, tmp_path, every=1)
    with pytest.warns(ResumeWarning, match="the lr_lambdas of LambdaLR, number 1, its 'factors'"):
        trainer.run([(torch.ones(1, 2), torch.ones(1, 1))] * 3, max_epochs=1)


def test_the_function_of_each_of_several_schedulers_is_looked_into(tmp_path: Path) -> None:
    models = [nn.Linear(2, 2), nn.Linear(2, 1)]
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in models]
    factors = [[1.0], [1.0]]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda _, own=own: own[-1])  # type: ignore[misc]
        for one, own in zip(optimizers, factors, strict=True)
    ]
    trainer = create_supervised_trainer(
        nn.Sequential(*models), optimizers, nn.functional.mse_loss, deterministic=True
    )

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        factors[0].append(factors[0][-1] * 0.9)
        for one in schedulers:
            one.step()

    to_save = {"model": trainer.objects["model"], "optimizers": optimizers}
    resume_or_start(trainer, {**to_save, "schedulers": schedulers}, tmp_path, every=1)
    with pytest.warns(ResumeWarning, match="the lr_lambdas of LambdaLR, number 1, its 'own'"):
        trainer.run([(torch.ones(1, 2), torch.ones(1, 1))] * 3, max_epochs=1)


SCALE = 0.0


class Scaled:
    """A transform whose strength handlers change where no object keeps it."""

    scale = 0.0

    def __init__(self, by_class: bool) -> None:
        self.by_class = by_class

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.scale if self.by_class else SCALE)


class ByScale(Dataset[Any]):
    """Samples that pass through what may be a transform, or a list of some."""

    scale = 0.0

    def __init__(self, how: str, by_class: bool) -> None:
        self.by_class = by_class
        self.transforms = [Scaled(by_class)] if how == "transforms" else []
        self.given = Scaled(by_class) if how == "an object" else None
        self.own = how == "itself"

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        x = torch.ones(2) * index
        if self.own:
            x = x + (self.scale if self.by_class else SCALE)
        for one in [*self.transforms, *([self.given] if self.given else [])]:
            x = one(x)
        return x, torch.ones(1)


AROUND: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda dataset: dataset,
    "a subset": lambda dataset: Subset(dataset, range(6)),
    "a subset of a subset": lambda dataset: Subset(Subset(dataset, range(7)), range(6)),
    "several": lambda dataset: ConcatDataset([TensorDataset(*[torch.ones(2, 2)] * 2), dataset]),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("how", ["itself", "transforms", "an object"])
@pytest.mark.parametrize("by_class", [False, True])
def test_what_data_is_fetched_by_is_looked_into_wherever_it_lies(
    around: str, how: str, by_class: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((Scaled, "scale"), (ByScale, "scale"), (sys.modules[__name__], "SCALE")):
        monkeypatch.setattr(owner, name, 0.0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, deterministic=True
    )

    @trainer.on(Events.EPOCH_COMPLETED)
    def grow() -> None:
        global SCALE
        SCALE += 0.1
        Scaled.scale += 0.1
        ByScale.scale += 0.1
        trainer.state_dict()

    loader = DataLoader(AROUND[around](ByScale(how, by_class)), 2)
    kind = "ByScale" if how == "itself" else "Scaled"
    with pytest.warns(ResumeWarning, match=f"'{kind}.scale'" if by_class else "its 'SCALE'"):
        trainer.run(loader, max_epochs=2)


class Pair:
    """Two loaders in step, which it holds or finds among its module's variables."""

    def __init__(self, held: list[Any]) -> None:
        self.held = held
        self.first = held[0] if held else None

    def __iter__(self) -> Any:
        pair = [self.first, self.held[1]] if self.held else LOADERS
        return ((x + z, y) for (x, y), (z, _) in zip(*pair, strict=True))


LOADERS: list[Any] = []


@pytest.mark.parametrize("how", ["held", "a variable of the module"])
@pytest.mark.parametrize("changes", [False, True])
def test_what_is_changed_of_data_within_data_is_told(
    how: str, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ByScale("an object", True)
    loaders = [DataLoader(TensorDataset(torch.ones(8, 2), torch.ones(8, 1)), 2)]
    loaders.insert(0, DataLoader(Subset(dataset, range(8)), 2))
    monkeypatch.setattr(sys.modules[__name__], "LOADERS", loaders)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, deterministic=True
    )

    @trainer.on(Events.EPOCH_COMPLETED)
    def grow() -> None:
        assert dataset.given
        dataset.given.scale += 0.1 * changes
        trainer.state_dict()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.run(Pair(loaders if how == "held" else []), max_epochs=2)
    said = [str(one.message) for one in told if issubclass(one.category, ResumeWarning)]
    assert any("dataset.given.scale'" in one for one in said) == changes, said


def test_a_loss_that_learns_is_told_unless_it_is_named() -> None:
    said = _told(None, Counter(), loss=Learned())
    assert len(said) == 1, said
    assert "loss_fn" in said[0]
