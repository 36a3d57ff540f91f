"""Composed runs: any building blocks together, stopped anywhere, gone on with from fresh objects.

A composition is played three times: straight through; until it is killed; and from the last
checkpoint on, with other workers and another global seed. What comes of it is one of the outcomes.
The promise is that it is none of `FAILED`: a resumed run gives the batches, losses and weights of
the straight one, or an error or a warning says that it does not, and names what makes the
difference. Where it does, what it names is taken out, and the rest is played: so each cause has to
be named, and none hides behind another.

What is drawn, how it is played and how it is judged are one file: what is new in the first is to be
seen in the others.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import composition_kept as kept
import composition_parts as parts
import torch
from composition_causes import Cause, causes_of, without
from torch import nn

from crosstrain.backends import get
from crosstrain.engine import (
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    DataUsedUp,
    DeterministicEngine,
    EmptyData,
    Engine,
    Events,
    ResumeError,
    ResumeWarning,
    create_supervised_evaluator,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)
from crosstrain.engine.digest import digest

IDENTICAL, TOLD, REFUSED = "identical", "told", "refused"
SILENT, MISNAMED, CRASHED = "SILENT", "MISNAMED", "CRASHED"
FAILED = (SILENT, MISNAMED, CRASHED)
EPOCHS = 3
LONGEST = 60

# It is said where a resume takes time, not where its numbers differ.
_HARMLESS = "fetched and thrown away"


class TooLong(BaseException):
    """Ends a run that does not end by itself, since its data is set anew for ever."""


class Killed(BaseException):
    """Ends a run as a kill does: no handler of the run deals with it."""


# ------------------------------------------------------------------------------------ handlers


def _shift(one: Made) -> None:
    if one.dataset is not None:
        one.dataset.shift = float(torch.rand(()))


def _freeze(one: Made) -> None:
    weight = one.model.first.weight
    weight.requires_grad_(not weight.requires_grad)


def _scale_rate(one: Made) -> None:
    for group in one.optimizer.param_groups:
        group["lr"] *= 0.9


def _noise_rate(one: Made) -> None:
    for group in one.optimizer.param_groups:
        group["lr"] = 0.01 + 0.05 * parts.GLOBAL_DRAWS["numpy"]()


def _add_group(one: Made) -> None:
    if len(one.optimizer.param_groups) == 1:
        one.optimizer.add_param_group({"params": [one.extra], "lr": 0.01})


def _perturb(one: Made) -> None:
    with torch.no_grad():
        one.model.last.weight.add_(0.01 * torch.randn_like(one.model.last.weight))


def _evaluate(one: Made) -> None:
    one.evaluator.run(one.held_out)


def _evaluate_on_training(one: Made) -> None:
    one.evaluator.run(one.data, epoch_length=2)


def _set_epoch(one: Made) -> None:
    sampler = getattr(one.data, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(one.trainer.state.epoch)


def _reweigh(one: Made) -> None:
    sampler = getattr(one.data, "sampler", None)
    if hasattr(sampler, "weights"):
        sampler.weights = sampler.weights * 0.5 + torch.rand(parts.SAMPLES)


def _feedback(one: Made) -> None:
    sampler = getattr(one.data, "sampler", None)
    if hasattr(sampler, "weights"):
        sampler.weights[0] += abs(float(one.trainer.state.output or 0.0))


def _exchange(one: Made) -> None:
    one.trainer.set_data(one.data)


def _end_epoch(one: Made) -> None:
    if one.trainer.state.iteration % 4 == 3:
        one.trainer.terminate_epoch()


def _dropout(one: Made) -> None:
    one.model.drop.p = min(0.6, one.model.drop.p + 0.05)


def _draw(one: Made) -> None:
    for draw in parts.GLOBAL_DRAWS.values():
        draw()


HANDLERS: dict[str, Callable[[Made], None]] = {
    "draws": _draw,
    "changes the dataset": _shift,
    "freezes": _freeze,
    "scales the rate": _scale_rate,
    "draws the rate": _noise_rate,
    "adds a group": _add_group,
    "perturbs weights": _perturb,
    "evaluates": _evaluate,
    "evaluates on the training data": _evaluate_on_training,
    "sets the epoch": _set_epoch,
    "reweighs": _reweigh,
    "gives feedback": _feedback,
    "exchanges the data": _exchange,
    "ends the epoch": _end_epoch,
    "raises dropout": _dropout,
}
EVENTS = (
    "STARTED",
    "EPOCH_STARTED",
    "GET_BATCH_STARTED",
    "GET_BATCH_COMPLETED",
    "ITERATION_STARTED",
    "ITERATION_COMPLETED",
    "EPOCH_COMPLETED",
)
FILTERS = ("always", "every 3", "once 2")
SECONDS = ("none", "none", "none", "in the step", "in a handler")
STEPS = ("supervised", "supervised", "supervised", "window of 2", "window of 3", "own")
SAVING = ("every 1", "every 3", "epoch", "by hand", "by hand, epoch")
HOWS = ("nothing", "global", "global", "hidden")


@dataclass(frozen=True)
class Composition:
    """What a run is made of, as plain values."""

    seed: int
    dataset: str
    sampler: str
    collate: str
    draws: tuple[str, str, str]
    workers: tuple[int, int]
    persistent: bool
    model: str
    optimizer: str
    step: str
    second: str
    handlers: tuple[tuple[str, str, str], ...]
    saving: str
    scheduler: bool
    loader: str = "plain"
    kept: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """Returns it as one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, text: str) -> Composition:
        """Returns what `text` was made from."""
        values = json.loads(text)
        for name in ("draws", "workers"):
            values[name] = tuple(values[name])
        for name in ("handlers", "kept"):
            values[name] = tuple(map(tuple, values.get(name, ())))
        return cls(**values)


def compose(seed: int) -> Composition:
    """Returns the composition of a seed."""
    choose = random.Random(seed)
    chosen = choose.choice
    many = choose.choice((0, 0, 1, 1, 2, 3))
    workers = choose.random() < 0.08
    return Composition(
        seed=seed,
        dataset=chosen(("map", "map", "map", "map", *parts.DATASETS)),
        sampler=chosen(parts.SAMPLERS),
        collate=chosen(("default", "default", "own")),
        draws=(chosen(HOWS), chosen(HOWS), chosen(HOWS)),
        workers=(chosen((0, 1, 2)), chosen((0, 1, 2))) if workers else (0, 0),
        persistent=choose.random() < 0.5,
        model=chosen(parts.NETS),
        optimizer=chosen(sorted(parts.OPTIMIZERS)),
        step=chosen(STEPS),
        second=chosen(SECONDS),
        handlers=tuple(
            (chosen(sorted(HANDLERS)), chosen(EVENTS), chosen(FILTERS)) for _ in range(many)
        ),
        saving=chosen(SAVING),
        scheduler=choose.random() < 0.3,
        loader=chosen(("plain", "plain", *parts.LOADERS)),
        kept=tuple(
            (chosen(tuple(kept.PLACES)), chosen(tuple(kept.KINDS)))
            for _ in range(choose.choice((0, 1, 1)))
        ),
    )


# ------------------------------------------------------------------------------------- playing


class Made:
    """The objects of one start of a composition."""

    def __init__(self, composition: Composition, resumed: bool) -> None:
        self.composition = composition
        parts.GLOBALS.clear()
        parts.HIDDEN.clear()
        choose = random.Random(composition.seed)
        self.data, self.dataset = parts.make_data(
            composition.dataset,
            composition.sampler,
            composition.collate,
            composition.loader,
            composition.draws,
            composition.workers[resumed],
            composition.persistent,
            choose,
        )
        manual_seed(1000 + 7 * resumed + composition.seed)
        backend = get("cpu").open()
        self.model: Any = parts.Net(composition.model)
        self.extra = nn.Parameter(torch.ones(2))
        self.model.extra = self.extra
        named = [p for name, p in self.model.named_parameters() if name != "extra"]
        self.optimizer = parts.OPTIMIZERS[composition.optimizer](named)
        self.others: Any = None
        if composition.second != "none":
            self.others = _cycle(
                parts.DataLoader(parts.Mapped("nothing", choose), batch_size=2, shuffle=True)
            )
        self.undo: list[Callable[[], None]] = [self._end_workers]
        draws = [(place, kept.KINDS[kind][0]()) for place, kind in composition.kept]
        self.trainer = self._trainer(backend, dict(draws))
        self.evaluator = create_supervised_evaluator(self.model, backend=backend)
        workers, stay = composition.workers[resumed], composition.persistent
        self.held_out = parts.DataLoader(
            parts.Mapped("global" if stay else "nothing", choose),
            batch_size=BATCH_OF_EVALUATION,
            shuffle=True,
            num_workers=workers,
            persistent_workers=stay and workers > 0,
        )
        self.to_save: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        for place, draw in draws:
            if place in kept.places_of(composition):
                kept.PLACES[place][0](self, draw)
        if composition.scheduler:
            scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.7)
            self.to_save["scheduler"] = scheduler
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: scheduler.step())
        for name, event, when in composition.handlers:
            self._attach(name, event, when)
        if composition.second == "in a handler":
            self.trainer.add_event_handler(
                Events.ITERATION_COMPLETED(every=2), lambda: _use(self, next(self.others))
            )

    def _trainer(self, backend: Any, draws: Mapping[str, Callable[[], float]]) -> Engine:
        composition = self.composition
        loss = kept.loss_by(draws)
        if composition.step != "own":
            many = {"window of 2": 2, "window of 3": 3}.get(composition.step, 1)
            prepare = self._with_others if composition.second == "in the step" else None
            if "the step" in draws:
                prepare = kept.prepare_by(draws["the step"], prepare)
            return create_supervised_trainer(
                self.model,
                self.optimizer,
                loss,
                backend=backend,
                deterministic=True,
                gradient_accumulation_steps=many,
                prepare_batch=prepare,
            )
        backend.prepare(self.model, self.optimizer)
        scale = draws.get("the step", lambda: 1.0)

        def step(engine: Any, batch: Any) -> float:
            x, y = batch if self.composition.second != "in the step" else self._with_others(batch)
            x = x * scale()
            self.model.train()
            self.optimizer.zero_grad()
            value = loss(self.model(x), y)
            value.backward()
            self.optimizer.step()
            return float(value)

        return DeterministicEngine(step, backend)

    def _with_others(self, batch: Any, **_: Any) -> Any:
        x, y = batch
        more, _ = next(self.others)
        return x + 0.01 * more.mean(), y

    def _end_workers(self) -> None:
        """Tells workers that stay to end: the collector of cycles would wait 5 s for each."""
        for data in (self.data, self.held_out):
            if isinstance(data, parts.DataLoader):
                vars(data).update(_iterator=None)

    def _attach(self, name: str, event: str, when: str) -> None:
        function = HANDLERS[name]
        on: Any = Events[event]
        if when == "every 3":
            on = on(every=3)
        elif when == "once 2":
            on = on(once=2)

        def handler() -> None:
            function(self)

        handler.__qualname__ = function.__name__
        self.trainer.add_event_handler(on, handler)

    def final(self) -> str:
        """Returns a digest of what was trained."""
        return digest([self.model.state_dict(), self.optimizer.state_dict()])


def _cycle(loader: Any) -> Any:
    while True:
        yield from loader


def _use(one: Made, batch: Any) -> None:
    with torch.no_grad():
        one.model.last.bias.add_(0.01 * batch[0].mean())


BATCH_OF_EVALUATION = 6
Row = tuple[int, int, str, str]


@dataclass
class Played:
    """What one start of a composition did."""

    rows: list[Row]
    final: str | None
    error: BaseException | None
    said: list[str]
    logged: list[str]
    began: int = 0


def play(
    composition: Composition, folder: Path, *, resumed: bool = False, kill: int | None = None
) -> Played:
    """Plays a composition once.

    Args:
        composition: what is played.
        folder: its checkpoints.
        resumed: whether it goes on from them, with other workers and another seed.
        kill: after which iteration it is killed; None: it runs to its end, and, not resumed, saves
            at its end only.
    """
    played = Played([], None, None, [], [])
    made = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = Made(composition, resumed)
            _run(made, folder, played, resumed, kill)
            played.final = made.final()
        except Killed:
            pass
        except TooLong as error:
            played.error = error
        except Exception as error:  # noqa: BLE001  judged by its kind
            played.error = error
    for undo in made.undo if made is not None else ():
        undo()
    played.said = [
        str(item.message)
        for item in caught
        if issubclass(item.category, (ResumeWarning, CheckpointWarning))
        and _HARMLESS not in str(item.message)
    ]
    return played


def _run(made: Made, folder: Path, played: Played, resumed: bool, kill: int | None) -> None:
    trainer, saving = made.trainer, made.composition.saving
    straight = kill is None and not resumed
    wait: Callable[[], None] = lambda: None  # noqa: E731

    def note(engine: Any) -> None:
        state = engine.state
        row = (state.iteration, state.epoch, digest(state.batch), float(state.output).hex())
        played.rows.append(row)
        if state.iteration > LONGEST:
            raise TooLong

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    if saving.startswith("by hand"):
        to_save = {**made.to_save, "trainer": trainer}
        if resumed and (files := sorted(folder.glob("*.pt"), key=_number)):
            Checkpoint.load_objects(to_save, files[-1])
        event = Events.EPOCH_COMPLETED if saving.endswith("epoch") else Events.ITERATION_COMPLETED
        if straight:
            event = Events.COMPLETED
        checkpoint = Checkpoint(to_save, str(folder) + ("-again" if resumed else ""))
        trainer.add_event_handler(event, checkpoint)
    else:
        every: Any = Events.EPOCH_COMPLETED if saving == "epoch" else int(saving.split()[1])
        if straight:
            every = 10 * LONGEST
        run = resume_or_start(trainer, made.to_save, folder, every, signals=())
        wait = run.checkpoint.wait
    played.began = trainer.state.iteration

    def end(engine: Any) -> None:
        if kill is not None and engine.state.iteration > kill:
            wait()
            raise Killed

    trainer.add_event_handler(Events.ITERATION_STARTED, end)
    lengths = {"endless": 5, "endless that goes on": 5}
    length = lengths.get(made.composition.sampler)
    trainer.run(made.data, max_epochs=EPOCHS, epoch_length=length)


def _number(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])


@dataclass
class Verdict:
    """What came of a composition.

    Args:
        outcome: one of the six words.
        detail: what was said, or what differs.
        named: the causes that were named.
        alarms: what was said of a run that is identical all the same.
    """

    outcome: str
    detail: str = ""
    named: list[Cause] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)


# Blocks that do not fit together, whoever trains them.
_THEIR_OWN = (
    "Expected more than 1 value per channel",
    "zip() argument 2 is",
    "object has no attribute 'r",
)
_OURS = (ResumeError, CheckpointError, DataUsedUp, EmptyData)


_DEPTH = 8


def judge(composition: Composition) -> Verdict:
    """Plays a composition, and what is left of it without the causes that it names, and so on.

    Returns:
        The verdict, or the first one of the rest that failed; `alarms` are those of all.
    """
    first = verdict = judge_once(composition)
    for _ in range(_DEPTH):
        if verdict.outcome != TOLD:
            break
        composition = without(composition, verdict.named)
        verdict = judge_once(composition)
        first.alarms += verdict.alarms
        if verdict.outcome in FAILED:
            verdict.detail += f", in what is left: {composition.text()}"
            return verdict
    return first


def judge_once(composition: Composition) -> Verdict:
    """Plays a composition straight, killed and resumed, and compares."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, _unlogged():
        root = Path(name)
        straight = play(composition, root / "straight")
        causes = causes_of(composition, parts.HIDDEN)
        if straight.error is not None:
            return _refused(straight.error, "the straight run")
        if len(straight.rows) < 2:
            return Verdict(REFUSED, "too short")
        kill = 1 + random.Random(composition.seed).randrange(len(straight.rows) - 1)
        killed = play(composition, root / "killed", kill=kill)
        if killed.error is not None:
            return _refused(killed.error, "the killed run")
        if killed.rows != [row for row in straight.rows if row[0] <= kill]:
            return Verdict(SILENT, "the run is not the same when it is begun again")
        if (root / "killed").exists():
            shutil.copytree(
                root / "killed", root / "resumed", ignore=shutil.ignore_patterns(".*", "*lock*")
            )
        resumed = play(composition, root / "resumed", resumed=True)
        told = killed.said + resumed.said
        if resumed.error is not None:
            refused = _refused(resumed.error, "the resume")
            said = [*told, refused.detail]
            return refused if refused.outcome != TOLD else _named(said, causes, refused.detail)
        if resumed.began == 0:
            # Killed before the first checkpoint: it has begun anew, with another seed.
            return Verdict(IDENTICAL, "nothing was saved")
        rest = [row for row in straight.rows if row[0] > resumed.began]
        if resumed.rows == rest and resumed.final == straight.final:
            return Verdict(IDENTICAL, alarms=told)
        return _named(told, causes, _difference(rest, resumed, straight, kill))


@contextmanager
def _unlogged() -> Generator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _named(said: list[str], causes: list[Cause], difference: str) -> Verdict:
    """Judges what was said of a difference: it has to name a block that can make one."""
    if not said:
        return Verdict(SILENT, difference)
    named = [cause for cause in causes if cause.is_named_in(said)]
    if named:
        return Verdict(TOLD, said[-1], named)
    names = ", ".join(cause.name for cause in causes) or "none"
    return Verdict(MISNAMED, f"{difference}. Said: {' | '.join(said)}. Possible causes: {names}")


def _refused(error: BaseException, where: str) -> Verdict:
    resumed = where == "the resume"
    if isinstance(error, TooLong):
        # Only the straight run may: from there on all have an end.
        return Verdict(REFUSED if where == "the straight run" else SILENT, f"{where}: has no end")
    text = f"{where}: {type(error).__name__}: {error}"
    if where == "the straight run" and any(own in text for own in _THEIR_OWN):
        return Verdict(REFUSED, text)
    if isinstance(error, _OURS):
        return Verdict(TOLD if resumed else REFUSED, text)
    # Ours says what to do; another's says what its own function found.
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    raised_by_us = frames[-1].startswith("crosstrain.")
    deliberate = isinstance(error, (ValueError, TypeError, RuntimeError)) and len(str(error)) > 60
    if raised_by_us and deliberate:
        return Verdict(TOLD if resumed else REFUSED, text)
    return Verdict(CRASHED, text)


def _difference(rest: list[Row], resumed: Played, straight: Played, kill: int) -> str:
    place = f"killed after {kill}, from {resumed.began} on: "
    for one, other in zip(rest, resumed.rows, strict=False):
        if one != other:
            names = ("iteration", "epoch", "batch", "loss")
            differ = [n for n, a, b in zip(names, one, other, strict=True) if a != b]
            return f"{place}at iteration {one[0]} (epoch {one[1]}) differ: {', '.join(differ)}"
    if len(rest) != len(resumed.rows):
        return f"{place}{len(rest)} iterations were left, {len(resumed.rows)} were done"
    return f"{place}the final weights differ"
