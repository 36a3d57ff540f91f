"""What named objects hold on one rank and not on another: saved for each, and given back to each.

A meter of this rank's losses, a source that this rank draws from, a metric before it is reduced: of
these the rank that saves has only its own. So it has of the statistics of batch norm, and of models
that part between two averages of their weights, with the state of their optimizers. Of a module,
only the parameters and buffers that differ are saved again; and what several ranks have alike, as
where an average of the model is kept on one rank only, is saved once for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final, NamedTuple

import torch

from crosstrain.backends import World
from crosstrain.engine.digest import bytes_of, digest
from crosstrain.engine.engine import Engine
from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.formats.plain import OnTensor, to_plain
from crosstrain.engine.guards import is_dense, is_sequence
from crosstrain.engine.nests import has, is_module, unwrap, walk_objects
from crosstrain.engine.ranks.agreement import agreement_of
from crosstrain.engine.ranks.check import digests
from crosstrain.engine.ranks.line import Line, has_ranks
from crosstrain.engine.ranks.of_each import RANKS, warn_of_own
from crosstrain.engine.ranks.world import joined
from crosstrain.engine.spread import has_spread, is_sharded
from crosstrain.engine.storage.errors import CheckpointContentError
from crosstrain.engine.storage.tree_hash import digest_of

# Beside what differs of the engine itself, under RANKS in its state.
_OBJECTS: Final = "objects"
_WHAT: Final = "comparing the named objects of all ranks"
# The one part of an object that is no module.
_WHOLE: Final = ""

# The name, the object and its state.
Pair = tuple[str, Any, Any]


def score_of_all(score: Any, objects: Mapping[str, Any], rank: int) -> Any:
    """Returns the score of the rank that saves, where all ranks have to save together.

    Each may have evaluated another part: one that does not save would keep the others waiting.

    Args:
        score: this rank's.
        objects: what is to be saved.
        rank: the rank that saves.
    """
    if not has_ranks() or not (_engines(objects) or is_sharded(objects)):
        return score
    with _line(objects) as line:
        return line.meet("comparing the scores of all ranks", score, of=(rank,))[0]


def note_differences(pairs: Sequence[Pair], rank: int) -> None:
    """Puts what objects hold on other ranks into an engine's state, for the rank that saves.

    It is a collective operation, of all ranks, where one of the objects is an engine whose state
    holds what differs between the ranks.

    Args:
        pairs: the objects, and the states that are about to be saved.
        rank: the rank that saves.

    Raises:
        RankFailed: if not all ranks do this, within CROSSTRAIN_TIMEOUT.
        ValueError: if the ranks give other names.
    """
    ranks = [its[RANKS] for _, _, its in pairs if isinstance(its, Mapping) and RANKS in its]
    if not ranks or not has_ranks():
        return
    parts = {name: _parts(one, state) for name, one, state in pairs}
    marks = {name: _marks(part) for name, part in parts.items()}
    with _line({name: value for name, value, _ in pairs}) as line:
        mine = {name: _summary(one, marks[name]) for name, one, _ in pairs}
        told = line.meet(_WHAT, mine, of=line.everyone)
        known = told[rank]
        for other, theirs in enumerate(told):
            _check_names(known, rank, theirs, other)
        differ = {
            name: _Summary(*(any(t[name][i] != its[i] for t in told) for i in range(len(its))))
            for name, its in known.items()
        }
        _warn_of_parted([name for name, found in differ.items() if found.rates])
        names = [name for name in known if any(differ[name])]
        if not names:
            return
        saved = line.meet("comparing what differs", {n: marks[n] for n in names}, of=(rank,))[0]
        sent_by = {name: [t[name] for t in told].index(mine[name]) for name in names}
        own = {
            name: {
                key: _plain(parts[name][key], _on_host)
                for key, mark in marks[name].items()
                if mark != saved[name].get(key)
            }
            for name in names
            if sent_by[name] == line.rank
        }
        found = line.gather("gathering what named objects hold", (own, sent_by), rank)
    if found is not None:
        ranks[0][_OBJECTS] = [
            {
                name: its.get(_WHOLE, its)
                for name, first in sent_by.items()
                if (its := found[first][0][name])
            }
            for _, sent_by in found
        ]


def _check_names(
    known: Mapping[str, Any], rank: int, theirs: Mapping[str, Any], other: int
) -> None:
    for one, here, two, there in ((known, rank, theirs, other), (theirs, other, known, rank)):
        missing = [name for name in one if name not in two]
        if missing:
            raise ValueError(
                f"to_save names {', '.join(map(repr, missing))} on rank {here} and not on rank "
                f"{there}. All ranks go on from one checkpoint, so give each the same names; what "
                "only one of them uses may have any state on the others."
            )


def saves_with_all(engine: Engine) -> bool:
    """Tells whether an engine's state is taken by all ranks together, or there is only one.

    That of a plain Engine is where `resume_or_start` saves it: elsewhere, as with pytorch-ignite,
    one rank alone may call the handler.
    """
    agreed = engine.restartable and agreement_of(engine) is not None
    return engine.resumes_data or agreed or _world_of(engine).size == 1


def own_state(engine: Engine, rank: int) -> dict[str, Any]:
    """Returns the state of a plain Engine with the random states of each rank, for one to save.

    It is a collective operation where `saves_with_all`. Elsewhere in several processes it has no
    random states: another rank is not to draw what this one draws.
    """
    state, agreement = engine.state_to_save(), agreement_of(engine)
    if not saves_with_all(engine):
        state.pop("rng_states", None)
    elif agreement is not None and engine.restartable:
        names = ("rng_states", *engine.state_dict_user_keys)
        mine = {name: state[name] for name in names}
        line = agreement.line
        others = line.gather("gathering the random states", mine, rank)
        state[RANKS] = {"size": line.size, "rank": line.rank, "others": others}
    return state


def _world_of(engine: Engine) -> World:
    return (joined() or World()) if engine.backend is None else engine.backend.world


def with_own(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns what is about to be loaded, with this rank's states in place of the saving rank's.

    With another number of ranks each of those that there were before gets its own, and a further
    one the saving rank's; a `ResumeWarning` names the objects.
    """
    pairs = [(name, one, _of_this_rank(one, its)) for name, one, its in pairs]
    for _, engine, state in pairs:
        taken = isinstance(engine, Engine) and isinstance(state, Mapping)
        ranks = state.get(RANKS) if taken else None
        others = ranks.get(_OBJECTS) if isinstance(ranks, Mapping) else None
        if not is_sequence(others) or not all(isinstance(one, Mapping) for one in others):
            continue
        world = _world_of(engine)
        if len(others) != world.size:
            others = [_without_statistics(theirs, pairs) for theirs in others]
            warn_of_own({name for theirs in others for name in theirs}, len(others), world.size)
        own = others[world.rank] if world.rank < len(others) else {}
        return [(name, one, _laid_over(one, its, own.get(name))) for name, one, its in pairs]
    return list(pairs)


def _of_this_rank(value: Any, state: Any) -> Any:
    """Returns a state with this rank's random states, if it is a plain Engine's of several."""
    if not (isinstance(value, Engine) and isinstance(state, Mapping) and "format" not in state):
        return state
    world = _world_of(value)
    ranks = state.get(RANKS)
    if not isinstance(ranks, Mapping):
        kept = world.size == 1 or value.resumes_data
        return state if kept else {key: its for key, its in state.items() if key != "rng_states"}
    others = ranks["others"]
    if len(others) != world.size:
        warn_of_own(["the random states"], len(others), world.size)
    return {**state, **(others[world.rank] if world.rank < len(others) else {})}


def _engines(objects: Mapping[str, Any]) -> list[Engine]:
    """Returns the engines whose states all ranks take together."""
    engines = [value for _, value in walk_objects(objects) if isinstance(value, Engine)]
    return [
        one
        for one in engines
        if one.resumes_data or (agreement_of(one) is not None and saves_with_all(one))
    ]


@contextmanager
def _line(objects: Mapping[str, Any]) -> Generator[Line]:
    agreed = [agreement_of(engine) for engine in _engines(objects)]
    lines = [agreement.line for agreement in agreed if agreement is not None]
    with nullcontext(lines[0]) if lines else Line() as line:
        yield line


def _parts(value: Any, state: Any) -> dict[str, Any]:
    """Returns what of an object's state may be another on each rank: a module's by their names."""
    # Of what is spread each process writes its part, or one gathers it.
    if isinstance(value, Engine) or has(value, "consolidate_state_dict") or has_spread(state):
        return {}
    return dict(state) if _is_in_parts(value, state) else {_WHOLE: state}


def _is_in_parts(value: Any, state: Any) -> bool:
    return is_module(unwrap(value)) and isinstance(state, Mapping)


def _without_statistics(own: Mapping[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Returns what a rank had of its own, less the buffers of models whose weights are alike."""
    trained = _trained(pairs)
    alike = {
        name
        for name, one, _ in pairs
        if (parameters := _parameters(one))
        and not trained.isdisjoint(map(id, parameters.values()))
        and parameters.keys().isdisjoint(own.get(name, ()))
    }
    return {name: its for name, its in own.items() if name not in alike}


def _trained(pairs: Sequence[Pair]) -> set[int]:
    """Returns the identities of the parameters that the optimizers among objects step."""
    optimizers = [one for _, one, _ in pairs if isinstance(one, torch.optim.Optimizer)]
    groups = [group for one in optimizers for group in one.param_groups]
    return {id(parameter) for group in groups for parameter in group["params"]}


def _parameters(value: Any) -> dict[str, Any]:
    value = unwrap(value)
    return dict(value.named_parameters(remove_duplicate=False)) if is_module(value) else {}


class _Summary(NamedTuple):
    """What tells an object's copies apart, each as a digest; or which of it differs."""

    all: Any
    #: The numbers by which an optimizer steps.
    rates: Any


def _summary(value: Any, marks: Mapping[str, str]) -> _Summary:
    groups = value.param_groups if isinstance(value, torch.optim.Optimizer) else []
    rates = [{key: each for key, each in one.items() if key != "params"} for one in groups]
    return _Summary(digest(marks), digest(rates))


def _marks(parts: Mapping[str, Any]) -> dict[str, str]:
    """Returns a digest of each part; what lies on a device is digested there."""
    there: list[torch.Tensor] = []

    def on_host(tensor: torch.Tensor, _: bool) -> torch.Tensor:
        if not is_dense(tensor):
            return tensor.cpu()
        if tensor.device.type == "cpu":
            return _mark_of(tensor)
        there.append(tensor)
        return torch.empty(0, dtype=tensor.dtype)

    found: dict[str, tuple[str, int]] = {}
    for key, part in parts.items():
        found[key] = digest(_plain(part, on_host)), len(there)
    on_device = digests(there)
    marks: dict[str, str] = {}
    begin = 0
    for key, (rest, end) in found.items():
        marks[key] = f"{rest} {on_device[begin:end]}"
        begin = end
    return marks


def _mark_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a digest to take a tensor's place: by BLAKE3, since a save waits for it."""
    kind = f" {tensor.dtype} {tuple(tensor.shape)}".encode()
    return torch.tensor(list(digest_of(bytes_of(tensor)) + kind), dtype=torch.uint8)


def _warn_of_parted(names: Sequence[str]) -> None:
    if names:
        warn_user(
            f"The optimizer {', '.join(map(repr, names))} does not step by the same numbers on "
            "all ranks, such as its learning rate, so the copies of its model part; a run that "
            "goes on in as many processes gives each its own. Where a scheduler is stepped by a "
            "loss or a metric, step it by the mean of all ranks (mean_over_ranks).",
            ResumeWarning,
        )


def _laid_over(value: Any, state: Any, own: Any) -> Any:
    """Returns an object's state with what this rank has of its own."""
    if own is None or not (_is_in_parts(value, state) and isinstance(own, Mapping)):
        return state if own is None else own
    whole: Any = copy.copy(state)
    whole.update(own)
    return whole


def _on_host(tensor: torch.Tensor, _: bool) -> torch.Tensor:
    return tensor.cpu()


def _plain(state: Any, on_tensor: OnTensor) -> Any:
    try:
        return to_plain(state, on_tensor)
    except CheckpointContentError:
        # The save says it, with the object's name.
        return None
