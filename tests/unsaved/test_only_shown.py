"""What is only shown is not told; what decides of the training is, by whatever way it does."""

from __future__ import annotations

import csv
import io
import math
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from crosstrain.engine import Events, ResumeWarning, create_supervised_trainer, resume_or_start

Case = Callable[[Any, nn.Module, Any], None]
SHOWN: list[Case] = []
TOLD: list[Case] = []
OUT = io.StringIO()
NAMED: dict[str, Any] = {}


class _Meter:
    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        self.value = self.sum = self.average = 0.0
        self.count = 0
        self.recent: deque[float] = deque(maxlen=3)

    def update(self, value: float, n: int = 1) -> None:
        self.value = value
        self.sum += value * n
        self.count += n
        self.average = self.sum / self.count
        self.recent.append(value)

    @property
    def median(self) -> float:
        return torch.tensor(list(self.recent)).median().item()

    def __str__(self) -> str:
        return "{name} {average:.3f} ({value})".format(**self.__dict__)


class _Ordered(_Meter):
    def __lt__(self, other: float) -> bool:
        return self.average < other


class _Progress:
    def __init__(self, meters: list[_Meter]) -> None:
        self.meters = meters

    def display(self, batch: int) -> None:
        entries = [f"[{batch}]"]
        entries += [str(meter) for meter in self.meters]
        print("\t".join(entries), file=OUT)


def _slower(optimizer: Any, factor: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1 / (2 + abs(float(factor)))


def _each(cases: list[Case], event: Any = Events.ITERATION_COMPLETED) -> Any:
    """Takes a function that makes a handler of what is trained."""

    def add(make: Callable[..., Any]) -> Any:
        def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
            trainer.add_event_handler(event, make(trainer, model, optimizer))

        attach.__name__ = make.__name__
        cases.append(attach)
        return make

    return add


@_each(SHOWN)
def meters(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    losses, times = _Meter("loss"), _Meter("time")
    progress, end = _Progress([losses, times]), time.time()

    def log(engine: Any) -> None:
        nonlocal end
        times.update(time.time() - end)
        losses.update(engine.state.output, 2)
        end = time.time()
        if losses.count % 4 == 0:
            progress.display(engine.state.iteration)
            print(f"{losses.median:.3f}", file=OUT)

    return log


@_each(SHOWN)
def the_best(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    best, best_epoch, rows = None, 0, csv.writer(OUT)

    def summary(epoch: int, loss: float, is_best: bool) -> None:
        row = OrderedDict(epoch=epoch)
        row.update([("loss", loss)])
        if is_best:
            print("best", file=OUT)
        rows.writerow(row.values())

    def log(engine: Any) -> None:
        nonlocal best, best_epoch
        loss = engine.state.output
        is_best = best is None or loss < best
        if is_best:
            best, best_epoch = loss, engine.state.epoch
        summary(best_epoch, best, is_best)

    return log


@_each(SHOWN)
def by_hand(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    total, count, number = 0.0, 0, 0

    def log(engine: Any) -> None:
        nonlocal total, count, number
        number = engine.state.iteration - 1
        total += engine.state.output
        count += 1
        if count % 3 == 0:
            mean = total / count
            print(f"{number}: {mean:.2f} {math.exp(mean):.2f}", file=OUT)
            total, count = 0.0, 0
        _slower(optimizer, number)

    return log


@_each(TOLD)
def a_method_called_as_a_function(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    count, other = 0, torch.optim.lr_scheduler.StepLR(optimizer, 2)
    trainer.scheduler = other

    def step(number: int) -> None:
        print(number, file=OUT)

    def handler(engine: Any) -> None:
        nonlocal count
        count += 1
        step(count)
        trainer.scheduler.step(count)

    return handler


@_each(TOLD)
def groups_of_an_optimizer(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    best = 1e9

    def handler(engine: Any) -> None:
        nonlocal best
        if engine.state.output < best:
            best = engine.state.output
        else:
            for group in optimizer.param_groups:
                group["lr"] = 0.01

    return handler


@_each(TOLD)
def a_collection_on_the_way(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    total = 0.0

    def handler(engine: Any) -> None:
        nonlocal total
        total += engine.state.output
        kept = []
        kept.append(total)
        _slower(optimizer, kept[0])

    return handler


@_each(TOLD)
def a_parameter_by_name(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    total = 0.0

    def show(engine: Any, value: float) -> None:
        print(value, file=OUT)
        _slower(optimizer, value)

    def handler(engine: Any) -> None:
        nonlocal total
        total += engine.state.output
        show(engine, value=total)

    return handler


@_each(TOLD)
def what_another_reads(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    meter = _Meter("loss")
    trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda: _slower(optimizer, meter.median if meter.count else 0)
    )
    return lambda engine: meter.update(engine.state.output)


@_each(TOLD)
def a_comparison_of_objects(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    meter = _Ordered("loss")

    def handler(engine: Any) -> None:
        meter.update(engine.state.output)
        _slower(optimizer, 1 if meter < 0.5 else 2)

    return handler


@_each(TOLD)
def an_end_of_the_epoch(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    count = 0

    def handler(engine: Any) -> None:
        nonlocal count
        count += 1
        if count % 3 == 0:
            print("enough", file=OUT)
            engine.terminate_epoch()

    return handler


@_each(TOLD)
def whether_it_draws(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    count = 0

    def draw() -> bool:
        return bool(torch.rand(()) < 2)

    def handler(engine: Any) -> None:
        nonlocal count
        count += 1
        drawn = count % 2 == 0 and draw()
        print(drawn, file=OUT)

    return handler


@_each(TOLD)
def how_often_it_draws(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    count = 0

    def handler(engine: Any) -> None:
        nonlocal count
        count += 1
        drawn = [model(torch.rand(1, 3)) for _ in range(count)]
        print(drawn, file=OUT)

    return handler


@_each(TOLD)
def a_seed(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    count = 0

    def handler(engine: Any) -> None:
        nonlocal count
        count += 1
        torch.manual_seed(count)

    return handler


@_each(TOLD)
def an_attribute_by_a_name(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    meter = _Meter("loss")

    def handler(engine: Any) -> None:
        meter.update(engine.state.output)
        for name in ("count", "sum"):
            _slower(optimizer, getattr(meter, name))

    return handler


@_each(TOLD)
def an_attribute_of_the_model(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    count = 0

    def handler(engine: Any) -> None:
        nonlocal count
        count += 1
        model[1].p = 0.5 / count

    return handler


@_each(TOLD)
def a_number_that_is_returned(trainer: Any, model: nn.Module, optimizer: Any) -> Any:
    count = 0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + count))
    scheduler.lr_lambdas = [lambda epoch: rate()]
    NAMED["scheduler"] = scheduler

    def rate() -> float:
        return 1 / (1 + count)

    def handler(engine: Any) -> None:
        nonlocal count
        count += 1
        print(rate(), file=OUT)
        scheduler.step()

    return handler


def _said(tmp_path: Path, attach: Case) -> list[str]:
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer: Any = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, backend="cpu", deterministic=True
    )
    NAMED.clear()
    attach(trainer, model, optimizer)
    data = [(torch.ones(2, 3) * i, torch.ones(2, 1)) for i in range(5)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_save = {"model": model, "optimizer": optimizer, **NAMED}
        resume_or_start(trainer, to_save, tmp_path, 1, signals=(), background=False)
        trainer.run(data, max_epochs=2)
    return [str(one.message) for one in caught if one.category is ResumeWarning]


@pytest.mark.parametrize("attach", SHOWN, ids=lambda one: one.__name__)
def test_what_is_only_shown_is_not_told(attach: Case, tmp_path: Path) -> None:
    assert _said(tmp_path, attach) == []


@pytest.mark.parametrize("attach", TOLD, ids=lambda one: one.__name__)
def test_what_does_more_is_told(attach: Case, tmp_path: Path) -> None:
    said = " ".join(_said(tmp_path, attach))
    assert any(f"{name}'" in said for name in ("count", "best", "total", "sum"))
