"""Scripts after the patterns of pytorch-ignite's examples, each a function of the library.

A script takes what it needs from a `Library`, so that only the import lines differ: ours, or those
of the installed pytorch-ignite. It trains on the digits or on numbers of its own, and returns what
it has printed, saved and learned. More than 600 lines, since a script is one piece here as it is
where it comes from.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ignite.engine
import ignite.handlers
import ignite.utils
import pytest
import torch
from ignite import distributed as idist
from ignite import metrics as measures
from ignite.contrib.engines import common
from ignite.handlers import (
    EMAHandler,
    EpochOutputStore,
    FastaiLRFinder,
    LinearCyclicalScheduler,
    ParamGroupScheduler,
    PiecewiseLinear,
    ProgressBar,
    TensorboardLogger,
    TerminateOnNan,
    TimeLimit,
    Timer,
    create_lr_scheduler_with_warmup,
)
from ignite.handlers.state_param_scheduler import ExpStateScheduler, LambdaStateScheduler
from ignite.handlers.tensorboard_logger import (
    GradsHistHandler,
    GradsScalarHandler,
    OptimizerParamsHandler,
    OutputHandler,
    WeightsScalarHandler,
)
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import crosstrain.engine

__all__ = ["IGNITE", "OURS", "SCRIPTS", "Library"]

# What the import lines name.
NAMES = ("Engine", "Events", "EventEnum", "State", "create_supervised_trainer")
NAMES += ("create_supervised_evaluator", "DeterministicEngine", "convert_tensor", "manual_seed")
HANDLERS = (
    "Checkpoint",
    "DiskSaver",
    "ModelCheckpoint",
    "EarlyStopping",
    "global_step_from_engine",
)

Library = SimpleNamespace
OURS = Library(**{name: getattr(crosstrain.engine, name) for name in NAMES + HANDLERS})
IGNITE = Library(
    **{name: getattr(ignite.engine, name) for name in NAMES if hasattr(ignite.engine, name)},
    **{name: getattr(ignite.handlers, name) for name in HANDLERS},
    manual_seed=ignite.utils.manual_seed,
)
IGNITE.convert_tensor = ignite.utils.convert_tensor

Script = Callable[[Any, Path], Any]
SCRIPTS: dict[str, Script] = {}


def script(function: Script) -> Script:
    """Lists a script by its name."""
    SCRIPTS[function.__name__] = function
    return function


@dataclass
class Work:
    """A model, its optimizer, and loaders over the digits."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: DataLoader[Any]
    test: DataLoader[Any]


def work(
    lib: Any,
    kind: str = "sgd",
    batch_size: int = 32,
    drops: float = 0.1,
    shuffle: bool = True,
) -> Work:
    """Returns the same work for whoever asks: 256 digits to train on and 128 to test on."""
    lib.manual_seed(4)
    digits = load_digits()
    data = TensorDataset(
        torch.tensor(digits.data[:384] / 16, dtype=torch.float32), torch.tensor(digits.target[:384])
    )
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Dropout(drops), nn.Linear(24, 10))
    optimizers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), 0.2, momentum=0.5),
        "adam": lambda: torch.optim.Adam(model.parameters(), 0.01),
    }
    return Work(
        model,
        optimizers[kind](),
        DataLoader(Subset(data, range(256)), batch_size, shuffle=shuffle),
        DataLoader(Subset(data, range(256, 384)), 64),
    )


def bits(*modules: nn.Module) -> list[str]:
    """Returns the parameters and buffers of modules, to the bit."""
    return [
        value.detach().numpy().tobytes().hex()
        for module in modules
        for value in module.state_dict().values()
    ]


def listed(folder: Path) -> list[str]:
    """Returns what is in a folder, by name."""
    return sorted(path.name for path in folder.iterdir())


def scalars(folder: Path) -> dict[str, Any]:
    """Returns what TensorBoard would show of a folder: the scalars, and the names of the rest."""
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    shown: dict[str, Any] = {
        tag: [(item.step, item.value) for item in events.Scalars(tag)]
        for tag in sorted(tags["scalars"])
    }
    return shown | {"histograms": sorted(tags["histograms"])}


@script
def mnist(lib: Any, folder: Path) -> Any:
    """A supervised trainer, an evaluator over both loaders at each epoch's end, a progress bar."""
    w, said = work(lib), []
    criterion = nn.CrossEntropyLoss()
    trainer = lib.create_supervised_trainer(w.model, w.optimizer, criterion, device="cpu")
    wanted = {"accuracy": measures.Accuracy(), "nll": measures.Loss(criterion)}
    evaluator = lib.create_supervised_evaluator(w.model, metrics=wanted, device="cpu")
    with (folder / "bar").open("w") as stream:
        bar = ProgressBar(file=stream, mininterval=0, ascii=True)

        @trainer.on(lib.Events.ITERATION_COMPLETED(every=3))
        def log_training_loss(engine: Any) -> None:
            said.append((engine.state.epoch, engine.state.iteration, engine.state.output))

        @trainer.on(lib.Events.EPOCH_COMPLETED | lib.Events.COMPLETED)
        def log_results(engine: Any) -> None:
            for loader in (w.train, w.test):
                evaluator.run(loader)
                said.append((engine.last_event_name.name, dict(evaluator.state.metrics)))

        bar.attach(trainer, output_transform=lambda loss: {"loss": loss})
        trainer.run(w.train, max_epochs=2)
    shown = (folder / "bar").read_text().count("loss=")
    return (
        said,
        bits(w.model),
        shown,
        {key: value > 0 for key, value in trainer.state.times.items()},
    )


@script
def mnist_save_resume_engine(lib: Any, folder: Path) -> Any:
    """A crash in the middle of an epoch, and a new process's objects loaded from the file."""

    def build() -> tuple[Any, Work, Any, dict[str, Any], list[float]]:
        w, losses = work(lib, drops=0.0, shuffle=False), []

        def step(engine: Any, batch: Any) -> float:
            w.model.train()
            w.optimizer.zero_grad()
            x, y = batch
            loss = nn.functional.cross_entropy(w.model(x), y)
            loss.backward()
            w.optimizer.step()
            losses.append(loss.item())
            return loss.item()

        trainer = lib.DeterministicEngine(step)
        schedule = torch.optim.lr_scheduler.StepLR(w.optimizer, 1, 0.7)
        trainer.add_event_handler(lib.Events.EPOCH_COMPLETED, lambda: schedule.step())
        to_save = {"trainer": trainer, "model": w.model, "optimizer": w.optimizer}
        return trainer, w, schedule, to_save | {"lr_scheduler": schedule}, losses

    trainer, w, _, to_save, _ = build()
    handler = lib.Checkpoint(to_save, lib.DiskSaver(folder / "saved", require_empty=False))
    trainer.add_event_handler(lib.Events.ITERATION_COMPLETED(every=5), handler)

    @trainer.on(lib.Events.ITERATION_COMPLETED(once=13))
    def crash(engine: Any) -> None:
        raise RuntimeError("STOP")

    with pytest.raises(RuntimeError, match="STOP"):
        trainer.run(w.train, max_epochs=3)
    trainer, w, schedule, to_save, losses = build()
    (name,) = listed(folder / "saved")
    lib.Checkpoint.load_objects(
        to_load=to_save, checkpoint=torch.load(folder / "saved" / name, weights_only=False)
    )
    began = trainer.state.iteration
    trainer.run(w.train, max_epochs=3)
    return name, began, trainer.state.iteration, losses, schedule.get_last_lr(), bits(w.model)


@script
def cifar10(lib: Any, folder: Path) -> Any:
    """The helpers of `common`: checkpoints, schedule, running averages, TensorBoard, the best."""
    w = work(lib)
    model, optimizer = idist.auto_model(w.model), idist.auto_optim(w.optimizer)
    loader = idist.auto_dataloader(w.train.dataset, batch_size=32, shuffle=False)
    schedule = PiecewiseLinear(optimizer, "lr", [(0, 0.0), (8, 0.3), (24, 0.0)])

    def step(engine: Any, batch: Any) -> dict[str, float]:
        x, y = batch
        model.train()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return {"batch loss": loss.item()}

    trainer = lib.Engine(step)
    trainer.logger.disabled = True
    to_save = {"trainer": trainer, "model": model, "optimizer": optimizer, "lr_scheduler": schedule}
    common.setup_common_training_handlers(
        trainer,
        to_save=to_save,
        save_every_iters=8,
        save_handler=lib.DiskSaver(folder / "training", require_empty=False),
        lr_scheduler=schedule,
        output_names=["batch loss"],
        with_pbars=False,
        clear_cuda_cache=False,
    )
    wanted = {"accuracy": measures.Accuracy(), "loss": measures.Loss(nn.functional.cross_entropy)}
    evaluator = lib.create_supervised_evaluator(model, metrics=wanted, device=idist.device())
    trainer.add_event_handler(
        lib.Events.EPOCH_COMPLETED(every=1) | lib.Events.COMPLETED, lambda: evaluator.run(w.test)
    )
    logger = common.setup_tb_logging(
        str(folder / "logs"), trainer, optimizer, evaluators={"test": evaluator}
    )
    best = lib.Checkpoint(
        {"model": model},
        lib.DiskSaver(folder / "best", require_empty=False),
        filename_prefix="best",
        n_saved=2,
        global_step_transform=lib.global_step_from_engine(trainer),
        score_name="test_accuracy",
        score_function=lib.Checkpoint.get_default_score_fn("accuracy"),
    )
    evaluator.add_event_handler(lib.Events.COMPLETED(lambda *_: trainer.state.epoch > 1), best)
    trainer.run(loader, max_epochs=3)
    logger.close()
    kept = [listed(folder / name) for name in ("training", "best")]
    return kept, scalars(folder / "logs"), bits(w.model), dict(trainer.state.metrics)


@script
def best_by_validation_score(lib: Any, folder: Path) -> Any:
    """The other helpers: the best by score, early stopping, one evaluator for the logger."""
    w = work(lib)
    trainer = lib.create_supervised_trainer(w.model, w.optimizer, nn.functional.cross_entropy)
    evaluator = lib.create_supervised_evaluator(w.model, {"accuracy": measures.Accuracy()})
    evaluator.logger.disabled = True
    trainer.add_event_handler(lib.Events.EPOCH_COMPLETED, lambda: evaluator.run(w.test))
    stopping = common.add_early_stopping_by_val_score(2, evaluator, trainer, "accuracy")
    best = common.save_best_model_by_val_score(
        str(folder / "best"), evaluator, w.model, "accuracy", n_saved=2, trainer=trainer
    )
    logger = common.setup_tb_logging(
        str(folder / "logs"), trainer, w.optimizer, evaluators=evaluator, log_every_iters=4
    )
    trainer.run(w.train, max_epochs=12)
    logger.close()
    name = Path(str(best.last_checkpoint)).name
    return (
        name,
        listed(folder / "best"),
        trainer.state.epoch,
        stopping.counter,
        scalars(folder / "logs"),
    )


@script
def dcgan(lib: Any, folder: Path) -> Any:
    """Two models and two optimizers in a step of one's own, averages, and an end that saves."""
    lib.manual_seed(9)
    makes = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64))
    tells = nn.Sequential(nn.Linear(64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Sigmoid())
    makes_optimizer = torch.optim.Adam(makes.parameters(), 0.01, betas=(0.5, 0.999))
    tells_optimizer = torch.optim.Adam(tells.parameters(), 0.01, betas=(0.5, 0.999))
    loss, noise = nn.BCELoss(), torch.randn(4, 8)

    def step(engine: Any, batch: Any) -> dict[str, float]:
        tells.zero_grad()
        real = batch[0]
        ones = torch.ones(real.size(0))
        error_real = loss(tells(real).squeeze(), ones)
        error_real.backward()
        fake = makes(torch.randn(real.size(0), 8))
        error_fake = loss(tells(fake.detach()).squeeze(), ones * 0)
        error_fake.backward()
        tells_optimizer.step()
        makes.zero_grad()
        error = loss(tells(fake).squeeze(), ones)
        error.backward()
        makes_optimizer.step()
        return {"errD": (error_real + error_fake).item(), "errG": error.item()}

    trainer, timer, rows = lib.Engine(step), Timer(average=True), []
    trainer.logger.disabled = True
    saver = lib.ModelCheckpoint(folder / "nets", "networks", n_saved=10, require_empty=False)
    trainer.add_event_handler(lib.Events.EPOCH_COMPLETED, saver, {"G": makes, "D": tells})
    timer.attach(
        trainer,
        start=lib.Events.EPOCH_STARTED,
        resume=lib.Events.ITERATION_STARTED,
        pause=lib.Events.ITERATION_COMPLETED,
        step=lib.Events.ITERATION_COMPLETED,
    )
    for name in ("errD", "errG"):
        measures.RunningAverage(
            alpha=0.98, output_transform=lambda output, name=name: output[name]
        ).attach(trainer, name)

    @trainer.on(lib.Events.ITERATION_COMPLETED(every=3))
    def write(engine: Any) -> None:
        rows.append([engine.state.iteration, *engine.state.metrics.values()])

    @trainer.on(lib.Events.EPOCH_COMPLETED)
    def draw(engine: Any) -> None:
        rows.append(makes(noise).sum().item())

    @trainer.on(lib.Events.ITERATION_COMPLETED(once=20))
    def interrupt(engine: Any) -> None:
        raise KeyboardInterrupt

    @trainer.on(lib.Events.EXCEPTION_RAISED)
    def handle(engine: Any, error: BaseException) -> None:
        if not isinstance(error, KeyboardInterrupt) or engine.state.iteration <= 1:
            raise error
        engine.terminate()
        saver(engine, {"netG_exception": makes, "netD_exception": tells})

    trainer.run(work(lib).train, max_epochs=5)
    return rows, listed(folder / "nets"), bits(makes, tells), timer.step_count


@script
def siamese_network(lib: Any, folder: Path) -> Any:
    """Batches of three, a step and an evaluation of one's own, StepLR, a metric over a lambda."""
    lib.manual_seed(2)
    x = torch.rand(96, 2, 8)
    y = (x[:, 0].sum(1) > x[:, 1].sum(1)).float()
    loader = DataLoader(TensorDataset(x[:, 0], x[:, 1], y), 16, shuffle=True)
    body, head = nn.Linear(8, 6), nn.Linear(12, 1)
    model = nn.ModuleDict({"body": body, "head": head})
    optimizer = torch.optim.Adadelta(model.parameters(), 1.0)
    criterion, said = nn.BCEWithLogitsLoss(), []

    def forward(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = head(torch.cat([body(one), body(two)], 1)).squeeze(1)
        return out

    def train_step(engine: Any, batch: Any) -> float:
        one, two, targets = (lib.convert_tensor(part, device="cpu") for part in batch)
        model.train()
        optimizer.zero_grad()
        loss = criterion(forward(one, two), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def test_step(engine: Any, batch: Any) -> Any:
        one, two, targets = batch
        model.eval()
        return forward(one, two), targets

    trainer, evaluator = lib.Engine(train_step), lib.Engine(test_step)
    right = measures.Accuracy(output_transform=lambda out: ((out[0] > 0).float(), out[1]))
    right.attach(evaluator, "accuracy")
    (1 - right).attach(evaluator, "error")
    measures.Loss(criterion).attach(evaluator, "loss")
    schedule = ignite.handlers.LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9))
    trainer.add_event_handler(lib.Events.EPOCH_STARTED, schedule)

    @trainer.on(lib.Events.EPOCH_COMPLETED)
    def test(engine: Any) -> None:
        state = evaluator.run(loader)
        said.append((dict(state.metrics), optimizer.param_groups[0]["lr"], engine.state.output))

    trainer.run(loader, max_epochs=3)
    return said, bits(model)


class EpisodeEvents(Enum):
    """The names of the events of reinforcement learning, before a library's class is chosen."""

    EPISODE_STARTED = "episode_started"
    EPISODE_COMPLETED = "episode_completed"


@script
def reinforcement_learning(lib: Any, folder: Path) -> Any:
    """Steps of an endless stream, episodes as own events, ended by `should_terminate = True`."""
    events = lib.EventEnum("EpisodeEvents", {item.name: item.value for item in EpisodeEvents})
    lib.manual_seed(5)
    policy, said = nn.Linear(2, 2), []
    optimizer = torch.optim.Adam(policy.parameters(), 0.05)
    trainer = lib.Engine(lambda engine, batch: None)

    def step(engine: Any, timestep: int) -> None:
        state = engine.state
        picked = torch.distributions.Categorical(logits=policy(state.observation))
        action = picked.sample()
        state.kept.append((picked.log_prob(action), float(action == timestep % 2)))
        state.ep_reward += state.kept[-1][1]
        state.observation = torch.tensor([timestep % 2, 1.0])
        if random.random() < 0.1:
            engine.terminate_epoch()

    trainer = lib.Engine(step)
    trainer.register_events(*events, event_to_attr={events.EPISODE_STARTED: "episode"})

    @trainer.on(lib.Events.EPOCH_STARTED)
    def reset(engine: Any) -> None:
        engine.state.episode += 1
        engine.fire_event(events.EPISODE_STARTED)

    @trainer.on(events.EPISODE_STARTED)
    def begin(engine: Any) -> None:
        state = engine.state
        state.observation, state.kept, state.ep_reward = torch.ones(2), [], 0.0

    @trainer.on(lib.Events.EPOCH_COMPLETED)
    def finish(engine: Any) -> None:
        loss = torch.stack([-log * (reward - 0.5) for log, reward in engine.state.kept]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine.fire_event(events.EPISODE_COMPLETED)

    @trainer.on(events.EPISODE_STARTED(every=3))
    def log(engine: Any) -> None:
        said.append((engine.state.epoch, engine.state.iteration))

    @trainer.on(events.EPISODE_COMPLETED)
    def solved(engine: Any) -> None:
        said.append(engine.state.ep_reward)
        if engine.state.epoch >= 12:
            engine.should_terminate = True

    trainer.run(range(40), max_epochs=100)
    return said, bits(policy), trainer.state.epoch, bool(trainer.should_terminate)


@script
def fast_neural_style(lib: Any, folder: Path) -> Any:
    """Images without labels, a frozen model that judges, a file every few iterations."""
    lib.manual_seed(6)
    paints, judges = nn.Linear(64, 64), nn.Linear(64, 5).eval()
    for parameter in judges.parameters():
        parameter.requires_grad = False
    optimizer, square = torch.optim.Adam(paints.parameters(), 0.01), nn.MSELoss()
    running = {"total": 0.0}

    def step(engine: Any, batch: Any) -> dict[str, float]:
        x, _ = batch
        optimizer.zero_grad()
        y = paints(x)
        content = square(judges(y), judges(x))
        style = 0.1 * square(y @ y.t(), x @ x.t())
        (content + style).backward()
        optimizer.step()
        running["total"] += content.item() + style.item()
        return {"content_loss": content.item(), "style_loss": style.item(), **running}

    trainer = lib.Engine(step)
    files = lib.ModelCheckpoint(
        folder / "models", "checkpoint", n_saved=10, require_empty=False, create_dir=True
    )
    trainer.add_event_handler(lib.Events.ITERATION_COMPLETED(every=5), files, {"net": paints})
    with (folder / "bar").open("w") as stream:
        bar = ProgressBar(file=stream, mininterval=0, ascii=True)
        bar.attach(trainer, output_transform=lambda output: output)
        trainer.run(work(lib).train, max_epochs=2)
    saved = torch.load(folder / "models" / listed(folder / "models")[-1], weights_only=True)
    return trainer.state.output, listed(folder / "models"), bits(paints), sorted(saved)


@script
def text_classification(lib: Any, folder: Path) -> Any:
    """Batches that are dicts, warm-up, early stopping on a loss, the best files by a score."""
    lib.manual_seed(7)
    words = torch.randint(0, 20, (128, 6))
    rows = [{"input_ids": row, "label": (row.sum() % 2).long()} for row in words]
    loader = DataLoader(rows, 16, shuffle=True)  # type: ignore[arg-type]
    model = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)

    def prepare(batch: Any, device: Any, non_blocking: bool) -> Any:
        moved = lib.convert_tensor(batch, device, non_blocking)
        return moved["input_ids"], moved["label"]

    options = {"prepare_batch": prepare, "device": "cpu", "non_blocking": True}
    trainer = lib.create_supervised_trainer(
        model,
        optimizer,
        nn.functional.cross_entropy,
        output_transform=lambda x, y, y_pred, loss: {"loss": loss.item(), "n": len(x)},
        **options,
    )
    evaluator = lib.create_supervised_evaluator(
        model, {"loss": measures.Loss(nn.functional.cross_entropy)}, **options
    )
    trainer.logger.disabled = evaluator.logger.disabled = True
    cyclic = LinearCyclicalScheduler(optimizer, "lr", 0.02, 0.0, 40)
    warm = create_lr_scheduler_with_warmup(cyclic, 0.0, 4, warmup_end_value=0.02)
    trainer.add_event_handler(lib.Events.ITERATION_STARTED, warm)
    rates: list[float] = []
    trainer.add_event_handler(
        lib.Events.ITERATION_COMPLETED, lambda: rates.append(optimizer.param_groups[0]["lr"])
    )

    def score(engine: Any) -> float:
        return -engine.state.metrics["loss"]

    trainer.add_event_handler(lib.Events.EPOCH_COMPLETED, lambda: evaluator.run(loader))
    evaluator.add_event_handler(lib.Events.COMPLETED, lib.EarlyStopping(1, score, trainer, 0.01))
    best = lib.Checkpoint(
        {"model": model, "trainer": trainer},
        str(folder / "best"),
        n_saved=1,
        filename_prefix="best",
        score_function=score,
        score_name="neg_loss",
        global_step_transform=lib.global_step_from_engine(trainer, lib.Events.EPOCH_COMPLETED),
        filename_pattern="{filename_prefix}_{global_step}_{score_name}={score}.{ext}",
    )
    evaluator.add_event_handler(lib.Events.COMPLETED, best)
    trainer.run(loader, max_epochs=9)
    return rates, listed(folder / "best"), trainer.state.output, trainer.state.epoch, bits(model)


@script
def transformers(lib: Any, folder: Path) -> Any:
    """Gradients over several batches, groups of parameters with schedules each, `max_iters`."""
    w = work(lib, "adam", batch_size=16)
    layers = list(w.model.children())
    optimizer = torch.optim.AdamW(
        [{"params": layers[0].parameters()}, {"params": layers[3].parameters(), "lr": 0.02}], 0.01
    )
    trainer = lib.create_supervised_trainer(
        w.model,
        optimizer,
        nn.functional.cross_entropy,
        gradient_accumulation_steps=4,
        output_transform=lambda x, y, y_pred, loss: (loss.item(), y_pred.argmax(1).tolist()),
    )
    schedule = ParamGroupScheduler(
        [
            LinearCyclicalScheduler(optimizer, "lr", 0.01, 0.0, 16, param_group_index=0),
            PiecewiseLinear(optimizer, "lr", [(4, 0.02), (20, 0.001)], param_group_index=1),
        ],
        names=["body", "head"],
    )
    trainer.add_event_handler(lib.Events.ITERATION_STARTED, schedule)
    said: list[Any] = []

    @trainer.on(lib.Events.ITERATION_COMPLETED(every=4))
    def log(engine: Any) -> None:
        said.append((engine.state.output, [group["lr"] for group in optimizer.param_groups]))

    state = trainer.run(w.train, max_iters=36)
    return said, state.epoch, state.iteration, bits(w.model)


@script
def lr_finder(lib: Any, folder: Path) -> Any:
    """Rates tried one after the other, everything put back, and the one that it suggests."""
    w = work(lib, "adam")
    trainer = lib.create_supervised_trainer(w.model, w.optimizer, nn.functional.cross_entropy)
    before = bits(w.model)
    finder = FastaiLRFinder()
    to_save = {"model": w.model, "optimizer": w.optimizer}
    with finder.attach(trainer, to_save, num_iter=20, end_lr=1.0) as searching:
        searching.run(w.train)
    put_back = bits(w.model) == before
    finder.apply_suggested_lr(w.optimizer)
    trainer.run(w.train, max_epochs=1)
    return finder.get_results(), finder.lr_suggestion(), put_back, bits(w.model)


@script
def averaged_model_and_scheduled_state(lib: Any, folder: Path) -> Any:
    """EMA of a model, attributes of the state that follow a schedule, limits, kept outputs."""
    w = work(lib)
    trainer = lib.create_supervised_trainer(
        w.model,
        w.optimizer,
        nn.functional.cross_entropy,
        output_transform=lambda x, y, y_pred, loss: (y_pred.detach(), y),
    )
    ema = EMAHandler(w.model, momentum=0.02)
    ema.attach(trainer, name="momentum", event=lib.Events.ITERATION_COMPLETED(every=2))
    exp = ExpStateScheduler(initial_value=1.0, gamma=0.9, param_name="share")
    exp.attach(trainer, lib.Events.EPOCH_COMPLETED)
    wave = LambdaStateScheduler(
        lambda_obj=math.cos, param_name="wave", save_history=True, create_new=True
    )
    wave.attach(trainer, lib.Events.ITERATION_COMPLETED)
    kept = EpochOutputStore(output_transform=lambda output: output[1])
    kept.attach(trainer, "labels")
    trainer.add_event_handler(lib.Events.ITERATION_COMPLETED, TimeLimit(3600))
    trainer.add_event_handler(lib.Events.ITERATION_COMPLETED, TerminateOnNan())
    seen: list[Any] = []

    @trainer.on(lib.Events.EPOCH_COMPLETED)
    def look(engine: Any) -> None:
        seen.append((engine.state.share, len(engine.state.labels), engine.state.wave))

    trainer.run(w.train, max_epochs=3)
    return seen, bits(ema.ema_model, w.model), trainer.state.param_history["wave"][-1]


@script
def metrics_of_every_usage(lib: Any, folder: Path) -> Any:
    """Metrics by epoch, by batch and running; of metrics; in groups; detached; of an own output."""
    w, said = work(lib), []
    trainer = lib.create_supervised_trainer(
        w.model,
        w.optimizer,
        nn.functional.cross_entropy,
        output_transform=lambda x, y, y_pred, loss: (y_pred, y),
    )
    accuracy = measures.Accuracy()
    accuracy.attach(trainer, "by batch", usage=measures.metric.BatchWise())
    measures.Average(lambda out: out[0].sum().item()).attach(
        trainer, "running by batch", usage=measures.metric.RunningBatchWise()
    )
    measures.Average(lambda out: out[0].sum().item()).attach(
        trainer, "running by epoch", usage="running_epoch_wise"
    )
    precision, recall = measures.Precision(average=False), measures.Recall(average=False)
    f1 = (precision * recall * 2 / (precision + recall + 1e-20)).mean()
    f1.attach(trainer, "f1")
    shared = measures.MetricGroup({"top": measures.TopKCategoricalAccuracy(2), "mse": _Mean()})
    shared.attach(trainer, "group")
    measures.RunningAverage(measures.Accuracy()).attach(trainer, "average")
    matrix = measures.ConfusionMatrix(10)
    matrix.attach(trainer, "matrix")

    @trainer.on(lib.Events.ITERATION_COMPLETED(every=3))
    def by_batch(engine: Any) -> None:
        metrics = engine.state.metrics
        said.append([metrics[name] for name in ("by batch", "running by batch", "average")])

    @trainer.on(lib.Events.EPOCH_COMPLETED)
    def by_epoch(engine: Any) -> None:
        metrics = engine.state.metrics
        said.append([metrics["f1"], metrics["top"], metrics["mse"], metrics["matrix"].tolist()])

    @trainer.on(lib.Events.EPOCH_COMPLETED(once=2))
    def detach(engine: Any) -> None:
        matrix.detach(engine)
        said.append(matrix.is_attached(engine))

    trainer.run(w.train, max_epochs=3)
    return said, sorted(trainer.state.metrics)


class _Mean(measures.Metric):
    """A metric of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self._sum, self._number = 0.0, 0

    def update(self, output: Any) -> None:
        self._sum += output[0].sum().item()
        self._number += output[0].numel()

    def compute(self) -> float:
        return self._sum / self._number


@script
def tensorboard_handlers(lib: Any, folder: Path) -> Any:
    """Each handler of the TensorBoard logger, attached one by one."""
    w = work(lib)
    trainer = lib.create_supervised_trainer(w.model, w.optimizer, nn.functional.cross_entropy)
    evaluator = lib.create_supervised_evaluator(w.model, {"accuracy": measures.Accuracy()})
    trainer.add_event_handler(lib.Events.EPOCH_COMPLETED, lambda: evaluator.run(w.test))
    with TensorboardLogger(log_dir=folder / "logs") as logger:
        logger.attach(
            trainer,
            OutputHandler("training", output_transform=lambda loss: {"batchloss": loss}),
            event_name=lib.Events.ITERATION_COMPLETED(every=2),
        )
        logger.attach(
            evaluator,
            OutputHandler(
                "validation", "all", global_step_transform=lib.global_step_from_engine(trainer)
            ),
            event_name=lib.Events.EPOCH_COMPLETED,
        )
        for handler in (
            OptimizerParamsHandler(w.optimizer),
            WeightsScalarHandler(w.model),
            GradsScalarHandler(w.model),
        ):
            logger.attach(trainer, handler, event_name=lib.Events.ITERATION_COMPLETED(every=4))
        logger.attach(trainer, GradsHistHandler(w.model), event_name=lib.Events.EPOCH_COMPLETED)
        trainer.run(w.train, max_epochs=2)
    return scalars(folder / "logs")


class FolderOfJson:
    """A save handler of a user's own, that writes what it is given and the metadata as JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
        torch.save(checkpoint, self.folder / filename)
        (self.folder / f"{filename}.json").write_text(json.dumps(metadata))

    def remove(self, filename: str) -> None:
        (self.folder / filename).unlink()


class OfIgnite(FolderOfJson, ignite.handlers.checkpoint.BaseSaveHandler):
    """The same, of their base class, as ClearML's and Neptune's savers are."""


@script
def savers_of_every_kind(lib: Any, folder: Path) -> Any:
    """A folder, a saver, an object of one's own, a plain function of two and of three arguments."""
    w, told = work(lib), []
    trainer = lib.create_supervised_trainer(w.model, w.optimizer, nn.functional.cross_entropy)
    to_save = {"model": w.model, "optimizer": w.optimizer}

    def two(checkpoint: Any, filename: str) -> None:
        told.append((filename, sorted(checkpoint)))

    def three(checkpoint: Any, filename: str, metadata: Any) -> None:
        told.append((filename, sorted(checkpoint), metadata))

    handlers: dict[str, Any] = {
        "path": folder / "path",
        "text": str(folder / "text"),
        "saver": lib.DiskSaver(folder / "saver", create_dir=True),
        "theirs": ignite.handlers.DiskSaver(str(folder / "theirs")),
        "own": OfIgnite(folder / "own"),
        "two": two,
        "three": three,
    }
    made = {
        name: lib.Checkpoint(to_save, handler, name, n_saved=2, include_self=name == "saver")
        for name, handler in handlers.items()
    }
    for handler in made.values():
        trainer.add_event_handler(lib.Events.ITERATION_COMPLETED(every=2), handler)
    fired: list[int] = []
    trainer.add_event_handler(
        lib.Checkpoint.SAVED_CHECKPOINT, lambda engine: fired.append(engine.state.iteration)
    ) if trainer.has_registered_events(lib.Checkpoint.SAVED_CHECKPOINT) else None
    trainer.run(w.train, max_epochs=1)
    names = ("path", "text", "saver", "theirs", "own")
    last = {name: Path(str(handler.last_checkpoint)).name for name, handler in made.items()}
    texts = [
        (folder / "own" / name).read_text() for name in listed(folder / "own") if "json" in name
    ]
    return [listed(folder / name) for name in names], last, told, texts


@script
def states_with_keys_of_ones_own(lib: Any, folder: Path) -> Any:
    """`state_dict_user_keys`, limits that are raised, runs by iterations, filters of each kind."""
    trainer, said = lib.Engine(lambda engine, batch: batch), []
    trainer.state_dict_user_keys.append("alpha")
    trainer.state.alpha = 0.1
    events = lib.Events
    filters = {
        "every": events.ITERATION_COMPLETED(every=4),
        "once": events.ITERATION_COMPLETED(once=[2, 7]),
        "before": events.ITERATION_COMPLETED(before=3),
        "after": events.ITERATION_COMPLETED(after=9),
        "between": events.ITERATION_COMPLETED(every=2, after=3, before=9),
        "own": events.ITERATION_COMPLETED(event_filter=lambda engine, count: count in (1, 5)),
    }
    for name, event in filters.items():
        trainer.add_event_handler(
            event, lambda engine, name: said.append((name, engine.state.iteration)), name
        )
    trainer.run([1, 2, 3], max_epochs=2)
    state = dict(trainer.state_dict())
    other = lib.Engine(lambda engine, batch: batch)
    other.state_dict_user_keys.append("alpha")
    other.load_state_dict(state)
    said.append((other.state.alpha, other.state.iteration, other.state.epoch))
    other.run([1, 2, 3], max_epochs=4)
    by_iterations = lib.Engine(lambda engine, batch: batch)
    by_iterations.run(iter(range(100)), max_iters=7, epoch_length=3)
    return said, state, other.state.iteration, by_iterations.state.epoch, by_iterations.state.output


@script
def stopped_by_nan_and_by_score(lib: Any, folder: Path) -> Any:
    """TerminateOnNan on a loss that bursts; early stopping with each of its options."""
    outcomes: list[Any] = []
    losses = [1.0, 0.5, float("inf"), 0.1]
    trainer = lib.Engine(lambda engine, batch: torch.tensor(batch))
    trainer.add_event_handler(lib.Events.ITERATION_COMPLETED, TerminateOnNan())
    outcomes.append(trainer.run(losses).iteration)
    scores = [0.1, 0.3, 0.31, 0.32, 0.33, 0.2, 0.34, 0.4, 0.1, 0.1]
    for options in (
        {},
        {"min_delta": 0.05},
        {"min_delta": 0.05, "cumulative_delta": True},
        {"threshold": 0.1, "threshold_mode": "rel", "mode": "min"},
    ):
        trainer = lib.Engine(lambda engine, batch: None)
        stopping = lib.EarlyStopping(
            patience=2,
            score_function=lambda engine: scores[engine.state.epoch - 1],
            trainer=trainer,
            **options,
        )
        stopping.logger.disabled = True
        trainer.add_event_handler(lib.Events.EPOCH_COMPLETED, stopping)
        epochs = trainer.run([0], max_epochs=len(scores)).epoch
        outcomes.append((epochs, stopping.counter, stopping.best_score))
    return outcomes


@script
def stream_of_unknown_length(lib: Any, folder: Path) -> Any:
    """An endless generator with an epoch's length, and data that an event changes."""
    lib.manual_seed(8)
    seen: list[Any] = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield torch.randint(0, 99, (3,))

    trainer = lib.Engine(lambda engine, batch: seen.append(batch.tolist()))

    @trainer.on(lib.Events.EPOCH_STARTED(every=2))
    def other_data(engine: Any) -> None:
        engine.set_data(torch.full((3,), engine.state.epoch) for _ in range(9))

    trainer.run(endless(), max_epochs=3, epoch_length=4)
    return seen, trainer.state.epoch_length
