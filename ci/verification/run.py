"""Verifying a training: does it resume exactly, and if not, where and by what does it part?"""

from __future__ import annotations

import contextlib
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from crosstrain.backends import World, get
from crosstrain.ci.options import UsageError
from crosstrain.ci.traces.diff import Difference, as_json, earliest, first_difference
from crosstrain.ci.traces.file import Trace, TraceError, path_of_rank
from crosstrain.ci.trials.course import Course
from crosstrain.ci.trials.order import UNUSABLE, Order
from crosstrain.ci.trials.processes import STOPPED, Kill, Relay, TrainingChild
from crosstrain.ci.trials.target import Target

from .causes import Status, causes

# The exit codes of a process that was stopped or killed, after which another one goes on.
_INTERRUPTED = (STOPPED, -signal.SIGKILL)

#: Called with what a run is called, the iteration that it has done, and how many there are (0
#: where that is not known yet).
Progress = Callable[[str, int, int], None]


class VerifyError(UsageError):
    """A training cannot be verified; the message says why and what to do."""


@dataclass(frozen=True)
class RunResult:
    """One interrupted run, compared with the one that went straight through.

    Args:
        workers: worker processes of the loader, of each of its processes.
        resumed_from: the iterations that it went on from.
        killed: how often it was killed.
        resumed: whether it went on from a checkpoint before the training's end: a run that did not
            says nothing.
        difference: where it parts from the straight run; None if it does not.
        problem: the error that it ended with; empty if none.
    """

    name: str
    workers: tuple[int, ...]
    resumed_from: tuple[int, ...]
    killed: int
    seconds: float
    resumed: bool
    difference: Difference | None = None
    problem: str = ""

    @property
    def exact(self) -> bool:
        """Whether it ended with the bits of the straight run."""
        return self.difference is None and not self.problem


@dataclass(frozen=True)
class Verdict:
    """What a verification has come to.

    Args:
        target: the training.
        backend: the spec.
        nproc_per_node: how many processes trained together; several where that changed.
        status: `exact`; `not exact`: only a resumed run differs; `not repeatable`: two runs that
            nobody interrupted differ, so that no resumed one could be exact.
        iterations: how many the training has.
        runs: the interrupted runs.
        difference: where it parts first; None if it is exact, or a run ended with an error.
        problem: the error that a resumed run ended with; empty if none.
        causes: what usually makes it so, and what to do, the likeliest first.
        warnings: what the engine warned of.
        seed: of the straight run, and of the moments of the kills.
        seconds: how long it took.
    """

    target: str
    backend: str
    nproc_per_node: int | tuple[int, ...]
    status: Status
    iterations: int
    runs: tuple[RunResult, ...]
    difference: Difference | None
    problem: str
    causes: tuple[str, ...]
    warnings: tuple[str, ...]
    seed: int
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether the training resumes exactly."""
        return self.status == "exact"

    def as_json(self) -> dict[str, Any]:
        """Returns the verdict as plain values."""
        runs = [{**asdict(run), "difference": as_json(run.difference)} for run in self.runs]
        return {**asdict(self), "runs": runs, "difference": as_json(self.difference)}


def verify(
    target: str | Target,
    backend: str = "cpu",
    *,
    nproc_per_node: int | Sequence[int] = 1,
    at: Sequence[int] | None = None,
    kills: int = 2,
    workers: Sequence[int] = (0,),
    seed: int = 0,
    every: int | None = None,
    time_limit: float = 900.0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Proves, or disproves, that a training resumes exactly.

    It is run straight through; then again, and stopped after an iteration and resumed in a fresh
    process under another seed; then once more, and killed at random moments. Each run writes a
    trace, and these are compared. Where one differs, the training is run straight through a second
    time, to tell what does not repeat from what does not resume.

    Args:
        target: the training, `module:function` or `file.py:function`.
        backend: a spec.
        nproc_per_node: how many processes train together, under torchrun, on this machine. All are
            stopped, one at random is killed, and the traces of all are compared. Several numbers:
            the first for the straight run, and on in turn with each resumed start, for a training
            in logical shards; then rank 0's traces are compared.
        at: the iterations to stop after; by default the middle, and an epoch's end.
        kills: how often a run is killed with SIGKILL; 0: never.
        workers: worker processes of the loader: the first for the straight run, and on in turn with
            each resumed process.
        seed: of the straight run; the others follow from it.
        every: iterations between two checkpoints of the run that is killed.
        time_limit: seconds for all of it.
        folder: where traces, checkpoints and what the processes print are left; None: nowhere.
        progress: is told how far each run is.

    Raises:
        VerifyError: if it cannot be told: the target cannot be used, the straight run fails, or the
            time is up.
        TargetError: if the target has no legal form.
        BackendError: if the backend is unknown or unavailable here.
    """
    started = time.monotonic()
    parsed = Target.parse(target) if isinstance(target, str) else target
    get(backend)
    if World.from_environment().size > 1:
        raise VerifyError(
            "This is one of several processes already, as torchrun starts them. verify starts its "
            "own: call it without torchrun, and say how many by --nproc-per-node."
        )
    sizes = (nproc_per_node,) if isinstance(nproc_per_node, int) else tuple(nproc_per_node)
    if not sizes or min(sizes) < 1:
        raise VerifyError(f"nproc_per_node is at least 1; got {nproc_per_node}.")
    if kills < 0 or not workers or min(workers) < 0 or (every is not None and every < 1):
        raise VerifyError(
            f"kills and workers are at least 0 and every is at least 1; got kills={kills}, "
            f"workers={tuple(workers)}, every={every}."
        )
    if not kills and at is not None and not at:
        raise VerifyError(
            "Nothing would be interrupted: name iterations in at, leave it out, or set kills."
        )
    with tempfile.TemporaryDirectory(prefix="verify-") as place:
        where = Path(place) if folder is None else folder
        where.mkdir(parents=True, exist_ok=True)
        if folder is not None and any(where.iterdir()):
            raise VerifyError(f"The folder {folder} is not empty. Name another one.")
        show: Progress = progress or (lambda *_: None)
        with contextlib.closing(Relay(where)) as relay:
            work = _Verification(
                parsed,
                backend,
                sizes,
                tuple(workers),
                seed,
                where,
                relay,
                show,
                started,
                time_limit,
            )
            return work.verdict(at, kills, every)


@dataclass
class _Verification:
    """The runs of one verification, and what they have in common."""

    _target: Target
    _backend: str
    _sizes: tuple[int, ...]
    _workers: tuple[int, ...]
    _seed: int
    _folder: Path
    _relay: Relay
    _progress: Progress
    _started: float
    _time_limit: float
    # How many more processes there will be for certain: the next of them is started ahead.
    _expected: int = 2
    _total: int = 0
    _warnings: list[str] = field(default_factory=list[str])

    def verdict(self, at: Sequence[int] | None, kills: int, every: int | None) -> Verdict:
        straight = self._straight("straight")
        self._total = straight.total
        places = _middle_and_end(self._total, straight.length) if at is None else sorted(set(at))
        for place in places:
            if not 0 < place < self._total:
                raise VerifyError(
                    f"The training has {self._total} iterations, so it can be stopped after 1 to "
                    f"{self._total - 1}, and not after {place}."
                )
        self._expected = 2 * len(places) + (kills + 1 if kills else 0)
        runs = [self._stopped(place, number) for number, place in enumerate(places, 1)]
        if kills:
            runs.append(self._killed(kills, every or max(1, min(5, self._total // 8))))
        status: Status = "exact"
        failed = next((run for run in runs if not run.exact), None)
        difference = None if failed is None else failed.difference
        problem = "" if failed is None else failed.problem
        if failed is None and not any(run.resumed for run in runs):
            raise VerifyError(
                f"No run was resumed before its end: the training has {self._total} iterations, "
                "and had ended, or not yet saved, when it was killed. Name iterations to stop "
                "after by --at, save more often by --every, or make the training longer."
            )
        if failed is not None:
            status = "not exact"
            self._straight("straight again")
            anew = self._compare("straight again")
            if anew is not None:
                status, difference, problem = "not repeatable", anew, ""
        return Verdict(
            str(self._target),
            self._backend,
            self._sizes[0] if len(self._sizes) == 1 else self._sizes,
            status,
            self._total,
            tuple(runs),
            difference,
            problem,
            () if difference is None else _causes(status, difference, failed, straight),
            tuple(self._warnings),
            self._seed,
            time.monotonic() - self._started,
        )

    def _order(self, name: str, number: int = 0, **more: Any) -> Order:
        """Returns an order of a run; the number tells how many workers its loader has, in turn."""
        trace = str(self._folder / f"{name}.trace")
        workers = self._workers[number % len(self._workers)]
        target, seed = str(self._target), self._seed
        more = {"resumed_seed": seed, "folder": None, "workers": workers, **more}
        return Order(self._backend, target, trace=trace, seed=seed, **more)

    def _run(
        self, name: str, course: Course, order: Order, kill: Kill | None = None, number: int = 0
    ) -> TrainingChild:
        """Has processes carry out an order, follows them to their end, and returns them.

        Args:
            name: of the run.
            course: of the run.
            order: the order.
            kill: when to kill one of them.
            number: which of the sizes, in turn.
        """
        # At once: a process that imports torch says nothing for a while.
        self._progress(name, 0, self._total)
        with self._relay.begin(order, self._sizes[number % len(self._sizes)]) as child:
            self._expected -= 1
            self._relay.start_ahead(min(1, self._expected) if self._sizes == (1,) else 0)
            limit = self._started + self._time_limit
            child.kill_after(max(0.0, limit - time.monotonic()))
            for line in child.follow(course, kill):
                if "iteration" in line:
                    self._progress(name, child.last, self._total)
        if time.monotonic() >= limit:
            raise VerifyError(
                f"The time limit of {self._time_limit:g} s is over, at iteration {child.last} of "
                "one of the runs. Raise it by --time-limit, or make the training shorter."
            )
        if child.code == UNUSABLE and child.error:
            raise VerifyError(child.error)
        if child.code not in (0, *_INTERRUPTED):
            child.error = child.error or child.last_words(child.code)
        self._warnings = list(dict.fromkeys([*self._warnings, *course.warnings]))
        return child

    def _straight(self, name: str) -> Course:
        """Runs the training straight through."""
        course = Course()
        child = self._run(name, course, self._order(name))
        if not course.ended:
            raise VerifyError(f"The training does not run to its end: {child.error}")
        return course

    def _stopped(self, place: int, number: int) -> RunResult:
        """Stops a run after an iteration, before which it saves nothing, and resumes it."""
        name = f"stopped after {place}"
        children = [(0, None, {"stop_at": place}), (number, None, {})]
        return self._interrupted(name, self._seed, children)

    def _killed(self, kills: int, every: int) -> RunResult:
        name = f"killed {kills} time{'s' if kills > 1 else ''}"
        places = _moments(kills, self._total, self._seed, min(self._sizes))
        children = [(number, kill, {"every": every}) for number, kill in enumerate((*places, None))]
        return self._interrupted(name, self._seed + 1000, children)

    def _interrupted(
        self, name: str, seed: int, children: Iterable[tuple[int, Kill | None, dict[str, int]]]
    ) -> RunResult:
        """Runs processes one after the other, until one of them is neither stopped nor killed.

        Args:
            name: of the run.
            seed: of those that go on from a checkpoint; their number is added to it.
            children: for each of them its number, when to kill it, and what it is told besides.
        """
        course, problem = Course(), ""
        workers: list[int] = []
        for number, kill, more in children:
            folder = str(self._folder / f"run {name}")
            order = self._order(name, number, folder=folder, resumed_seed=seed + number, **more)
            workers.append(order.workers)
            child = self._run(name, course, order, kill, number)
            problem = problem or child.error
            if child.code not in _INTERRUPTED:
                break
        places = tuple(place for place in course.resumed_from if place is not None)
        # What was recorded before an error may tell more than the error does.
        recorded = all(path.exists() for path in self._traces(name))
        difference = self._compare(name) if recorded else None
        if problem and difference is not None and difference.thing is None:
            difference = None
        return RunResult(
            name,
            tuple(workers),
            places,
            course.kills,
            course.seconds,
            any(0 < place < self._total for place in places),
            difference,
            problem,
        )

    def _traces(self, name: str) -> list[Path]:
        """Returns the trace of each process of a run; rank 0's, where their number changed."""
        trace, sizes = self._folder / f"{name}.trace", self._sizes
        return [path_of_rank(trace, rank) for rank in range(sizes[0] if len(sizes) == 1 else 1)]

    def _compare(self, name: str) -> Difference | None:
        """Returns the first difference from the straight run, of whichever process."""
        found: list[Difference] = []
        pairs = zip(self._traces("straight"), self._traces(name), strict=True)
        for rank, (one, other) in enumerate(pairs):
            try:
                difference = first_difference(Trace(one), Trace(other))
            except TraceError as error:
                raise VerifyError(str(error)) from error
            if difference is not None:
                several = self._sizes != (1,)
                found.append(replace(difference, rank=rank) if several else difference)
        return earliest(found)


def _causes(
    status: Status, difference: Difference, run: RunResult | None, straight: Course
) -> tuple[str, ...]:
    before = [one for one in (run.resumed_from if run else ()) if one < difference.iteration]
    began, length = False, straight.length
    if before and length:
        began = (difference.iteration - 1) // length > (before[-1] - 1) // length
    kind = None if difference.thing is None else difference.thing.kind
    return causes(status, kind, began, straight.traits)


def _middle_and_end(total: int, length: int) -> list[int]:
    """Returns where to stop by default: in the middle of an epoch, and at the end of one."""
    found = {total // 2}
    if 0 < length < total:
        end = max(1, total // length // 2) * length
        found = {end, end + length // 2}
    return sorted(place for place in found if 0 < place < total)


def _moments(kills: int, iterations: int, seed: int, processes: int) -> list[Kill]:
    """Returns when to kill which of the processes: at random moments, some at their start."""
    source = random.Random(seed)
    found: list[Kill] = []
    for place in sorted(source.randrange(iterations) for _ in range(kills)):
        starting = place == 0 or source.random() < 0.1
        delay = source.uniform(0, 0.5) if starting else source.uniform(0, 0.02)
        found.append(Kill(0 if starting else place, delay, source.randrange(processes)))
    return found
