"""What training changes and no state_dict holds goes on as it was, or the resume says so."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.engine import (
    Checkpoint,
    Checks,
    Engine,
    Events,
    ResumeError,
    ResumeWarning,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

EPOCHS, LENGTH = 3, 4


class Net(nn.Module):
    """A network with whatever a training can change without a state_dict telling it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(16, 3)
        self.scale: torch.Tensor
        self.table: torch.Tensor
        self.register_buffer("scale", torch.ones(16), persistent=False)
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("table", torch.zeros(3 * 2**17), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        shift = 0 if self.cache is None else self.cache.mean()
        return self.head(self.drop(self.norm(self.backbone(x) * self.scale + shift)))


class Setup:
    """A training as a script sets it up at each start."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], checks: Checks | None) -> None:
        manual_seed(3)
        self.net = Net()
        self.net.backbone.requires_grad_(False)
        self.others = [*self.net.norm.parameters(), *self.net.head.parameters()]
        self.optimizer = torch.optim.AdamW(self.others, 1e-2)
        self.model = wrap(self.net)
        self.trainer = create_supervised_trainer(
            self.model,
            self.optimizer,
            nn.functional.cross_entropy,
            backend="cpu",
            deterministic=True,
            checks=checks,
        )
        self.to_save = {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}
        data = TensorDataset(torch.randn(32, 8), torch.randint(0, 3, (32,)))
        self.data = DataLoader(data, batch_size=8, shuffle=True)

    def add_group(self) -> None:
        self.net.backbone.requires_grad_(True)
        self.optimizer.add_param_group({"params": self.net.backbone.parameters(), "lr": 1e-3})

    def scale(self) -> None:
        self.net.scale.mul_(1.5)

    def grow_cache(self) -> None:
        self.net.cache = torch.arange(5.0)

    def evaluation_mode(self) -> None:
        self.net.norm.eval()

    def freeze_head(self) -> None:
        self.net.head.weight.requires_grad_(False)

    def all_weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.net.state_dict().items()}


CHANGES = ["add_group", "scale", "grow_cache", "evaluation_mode", "freeze_head"]


def compiled(net: nn.Module) -> nn.Module:
    """Wraps as torch.compile does, without a compiler."""
    return torch.compile(net, backend="eager")


def start(
    folder: Path,
    changes: dict[str, int],
    *,
    stop: int = 0,
    resume: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = lambda net: net,
    checks: Checks | None = None,
) -> Setup:
    """Trains, with changes after given iterations; saves after `stop` and ends."""
    one = Setup(wrap, checks)
    for name, iteration in changes.items():
        change = getattr(one, name)
        one.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=iteration), change)
    if resume:
        (file,) = folder.glob("*.pt")
        Checkpoint.load_objects(one.to_save, file)
    if stop:
        checkpoint = Checkpoint(one.to_save, str(folder))
        one.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), checkpoint)
        one.trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=stop), lambda engine: engine.terminate()
        )
    one.trainer.run(one.data, max_epochs=EPOCHS)
    return one


def assert_same(one: Setup, other: Setup) -> None:
    weights = other.all_weights()
    for name, value in one.all_weights().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("case", range(6))
def test_changes_of_a_run_are_there_after_a_resume(case: int, tmp_path: Path) -> None:
    choose = random.Random(case)
    total = EPOCHS * LENGTH
    chosen = choose.sample(CHANGES, choose.randint(1, 4))
    changes = {name: choose.randint(1, total - 2) for name in chosen}
    stop = choose.randint(min(changes.values()), total - 1)
    wraps = [compiled, lambda net: net]
    straight = start(tmp_path, changes)
    start(tmp_path, changes, stop=stop, wrap=wraps[case % 2])
    resumed = start(tmp_path, changes, resume=True, wrap=wraps[case // 2 % 2])
    assert_same(straight, resumed)
    said = str(resumed.trainer.proof)
    assert "the structure of 2 trained objects" in said
    if any(changes.get(name, total) <= stop for name in ("scale", "grow_cache", "freeze_head")):
        assert "put back" in said


def test_what_a_handler_of_the_beginning_does_again_is_put_right(tmp_path: Path) -> None:
    def run(**arguments: Any) -> Setup:
        one = Setup(lambda net: net, None)
        one.trainer.add_event_handler(
            Events.STARTED, lambda: one.net.head.weight.requires_grad_(False)
        )
        one.trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=3), lambda: one.net.head.weight.requires_grad_(True)
        )
        if arguments:
            one.trainer.load_state_dict(arguments["trainer"])
            one.net.load_state_dict(arguments["net"])
            one.optimizer.load_state_dict(arguments["optimizer"])
        else:

            @one.trainer.on(Events.ITERATION_COMPLETED(once=6))
            def keep() -> None:
                states["trainer"] = one.trainer.state_dict()
                states["net"] = one.all_weights()
                states["optimizer"] = torch.utils._pytree.tree_map(
                    lambda v: v.clone() if isinstance(v, torch.Tensor) else v,
                    one.optimizer.state_dict(),
                )

        one.trainer.run(one.data, max_epochs=EPOCHS)
        return one

    states: dict[str, Any] = {}
    assert_same(run(), run(**states))


def test_attributes_that_a_resumed_beginning_changes_are_put_back(tmp_path: Path) -> None:
    """At the straight run's STARTED there is no second epoch yet."""

    def run(resumed: bool) -> Setup:
        one = Setup(lambda net: net, None)

        @one.trainer.on(Events.STARTED(once=2))
        def raise_dropout() -> None:
            one.net.drop.p = 0.5
            fired.append(resumed)

        to_save = {"trainer": one.trainer, "net": one.net, "optimizer": one.optimizer}
        if resumed:
            Checkpoint.load_objects(to_save, *tmp_path.glob("*.pt"))
        else:
            checkpoint = Checkpoint(to_save, str(tmp_path), n_saved=1)
            one.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), checkpoint)
        one.trainer.run(one.data, max_epochs=EPOCHS)
        return one

    fired: list[bool] = []
    assert_same(run(False), run(True))
    assert fired == [True]


@pytest.mark.parametrize("strictness", ["error", "warn", "off"])
def test_groups_that_cannot_be_rebuilt_are_told(strictness: Any, tmp_path: Path) -> None:
    def start(names: list[str]) -> Setup:
        one = Setup(lambda net: net, Checks(structure=strictness))
        one.optimizer = torch.optim.SGD([getattr(one.net.head, name) for name in names], 0.1)
        engine = create_supervised_trainer(
            one.net,
            one.optimizer,
            nn.functional.cross_entropy,
            backend="cpu",
            deterministic=True,
            checks=Checks(structure=strictness),
        )
        one.trainer = engine
        return one

    first = start(["weight", "bias"])
    first.trainer.run(first.data, max_epochs=1)
    second = start(["bias", "weight"])
    second.trainer.load_state_dict(first.trainer.state_dict())
    second.trainer.state.max_epochs = 2
    if strictness == "error":
        with pytest.raises(ResumeError, match=r"model\.head\.weight then, model\.head"):
            second.trainer.run(second.data)
    elif strictness == "warn":
        with pytest.warns(ResumeWarning, match="group 0 of optimizer has other parameters"):
            second.trainer.run(second.data)
        assert "DIFFERS" in str(second.trainer.proof)
    else:
        second.trainer.run(second.data)
        assert not second.trainer.proof.differences


def test_a_large_buffer_with_other_contents_is_told(tmp_path: Path) -> None:
    first = start(tmp_path, {}, stop=2)
    second = Setup(lambda net: net, None)
    second.net.table[7] = 1.0
    (file,) = tmp_path.glob("*.pt")
    Checkpoint.load_objects(second.to_save, file)
    with pytest.raises(ResumeError, match=re.escape("model.table, a buffer with persistent=False")):
        second.trainer.run(second.data)
    assert first.trainer.state.iteration == 2


def test_a_sparse_buffer_is_compared() -> None:
    def start_with(edges: torch.Tensor) -> Setup:
        def wrap(net: nn.Module) -> nn.Module:
            net.register_buffer("edges", edges.to_sparse(), persistent=False)
            return net

        return Setup(wrap, None)

    first = start_with(torch.eye(3))
    first.trainer.run(first.data, max_epochs=1)
    for edges in (torch.eye(3), 2 * torch.eye(3)):
        second = start_with(edges)
        second.trainer.load_state_dict(first.trainer.state_dict())
        second.trainer.state.max_epochs = 2
        with nullcontext() if edges[0, 0] == 1 else pytest.raises(ResumeError, match="edges"):
            second.trainer.run(second.data)


def test_a_state_without_a_structure_says_so(tmp_path: Path) -> None:
    first = start(tmp_path, {})
    state = first.trainer.state_dict()
    del state["structure"]
    second = Setup(lambda net: net, None)
    second.trainer.load_state_dict(state)
    assert "not checked: the structure" in str(second.trainer.proof)


def test_objects_that_only_a_checkpoint_names_are_recorded(tmp_path: Path) -> None:
    def build() -> tuple[Engine, dict[str, Any], nn.Module]:
        one = Setup(lambda net: net, None)
        teacher = nn.Linear(2, 2)
        return one.trainer, {**one.to_save, "teacher": teacher}, teacher

    trainer, to_save, teacher = build()
    teacher.requires_grad_(False)
    checkpoint = Checkpoint(to_save, str(tmp_path))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), checkpoint)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), trainer.terminate)
    data = [(torch.randn(4, 8), torch.randint(0, 3, (4,)))] * 5
    trainer.run(data)
    (file,) = tmp_path.glob("*.pt")
    trainer, to_save, teacher = build()
    Checkpoint.load_objects(to_save, file)
    trainer.run(data)
    assert not teacher.weight.requires_grad
    assert "requires_grad of teacher.weight" in str(trainer.proof)


class Capturing(nn.Module):
    """Registers hooks in its first forward, and notes that it has, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        self.seen: list[torch.Tensor] = []
        self.scaled = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not getattr(self, "installed", False):
            for layer in self.layers:
                layer.register_forward_hook(lambda _, given, found: self.seen.append(found))
            self.installed = True
        self.seen.clear()
        found: torch.Tensor = self.layers(x)
        return found + sum(one.mean() for one in self.seen[-3:])


class Around(nn.Module):
    """Has a flag of its own, which says that its weight was set, and no hooks to make."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Capturing()
        self.weight = nn.Parameter(torch.zeros(2))
        self.ready = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.weight.data.fill_(2.0)
            self.ready = True
        found: torch.Tensor = self.inner(x) * self.weight
        return found


def _capture(folder: Path, epochs: int, installs: bool = True) -> tuple[nn.Module, list[str]]:
    manual_seed(0)
    model = Around()
    if not installs:
        model.inner.forward = model.inner.layers.forward  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, backend="cpu", deterministic=True
    )
    run = resume_or_start(trainer, {"model": model, "optimizer": optimizer}, folder, every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run([(torch.ones(1, 2), torch.ones(1, 2))] * 2, max_epochs=epochs)
    run.checkpoint.save_handler.close()
    return model, [str(one.message) for one in caught]


def test_hooks_that_a_first_forward_makes_are_made_again(tmp_path: Path) -> None:
    """A flag that was put back without its hooks kept them from being made."""
    straight, _ = _capture(tmp_path / "straight", 3)
    for epochs in (1, 2, 3):
        resumed, said = _capture(tmp_path / "resumed", epochs)
        assert not any("has not made them again" in text for text in said)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_hooks_that_are_not_made_again_are_told(tmp_path: Path) -> None:
    _capture(tmp_path, 1)
    _, said = _capture(tmp_path, 2, installs=False)
    assert [text for text in said if "model.inner.installed told" in text], said


@pytest.mark.parametrize("held", ["the list", "a group"])
def test_groups_that_a_handler_holds_are_those_that_take_the_state(
    held: str, tmp_path: Path
) -> None:
    def run(folder: Path, epochs: int) -> list[Any]:
        manual_seed(3)
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        groups, group = optimizer.param_groups, optimizer.param_groups[0]
        trainer = create_supervised_trainer(
            model, optimizer, nn.functional.mse_loss, deterministic=True
        )

        @trainer.on(Events.EPOCH_COMPLETED)
        def decay(engine: Any) -> None:
            one = groups[0] if held == "the list" else group
            one["lr"] = 0.1 / 2**engine.state.epoch

        resume_or_start(trainer, {"model": model, "optimizer": optimizer}, folder, 3, signals=())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.run([(torch.ones(2, 2), torch.ones(2, 1))] * 4, max_epochs=epochs)
        assert optimizer.param_groups[0] is group
        return model.weight.tolist()

    straight = run(tmp_path / "straight", 4)
    run(tmp_path / "resumed", 2)
    assert run(tmp_path / "resumed", 4) == straight
