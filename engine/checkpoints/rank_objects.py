"""What named objects hold on one rank and not on another: saved for each, and given back to each.

A meter of this rank's losses, a source that this rank draws from, a metric before it is reduced: of
these the rank that saves has only its own. What is trained is the same on all ranks, and is not
compared; but the numbers by which an optimizer steps are, since its model parts where they differ.
Of other modules, such as an average of the model, the buffers are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch

from crosstrain.backends import World
from crosstrain.engine.digest import digest
from crosstrain.engine.engine import Engine
from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.formats.plain import to_plain
from crosstrain.engine.guards import is_mapping, is_sequence
from crosstrain.engine.nests import is_module, unwrap, walk_objects
from crosstrain.engine.ranks.agreement import agreement_of
from crosstrain.engine.ranks.line import Line, has_ranks
from crosstrain.engine.ranks.of_each import RANKS, warn_of_own
from crosstrain.engine.spread import has_spread, is_sharded
from crosstrain.engine.storage.errors import CheckpointContentError

from .model_part import ModelPart

# Beside what differs of the engine itself, under RANKS in its state.
_OBJECTS: Final = "objects"
_WHAT: Final = "comparing the named objects of all ranks"

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
    ranks = [its[RANKS] for _, _, its in pairs if is_mapping(its) and RANKS in its]
    if not ranks or not has_ranks():
        return
    trained = _trained(pairs)
    own = {name: _plain(_own_of(one, state, trained)) for name, one, state in pairs}
    with _line({name: value for name, value, _ in pairs}) as line:
        mine = {name: digest(state) for name, state in own.items()}
        told = line.meet(_WHAT, mine, of=line.everyone)
        known = told[rank]
        for other, theirs in enumerate(told):
            _check_names(known, rank, theirs, other)
        differ = [name for name in known if any(one[name] != known[name] for one in told)]
        differ = _without_parted(differ, pairs)
        if not differ:
            return
        states = {name: own[name] for name in differ}
        found = line.gather("gathering what named objects hold", states, rank)
    if found is not None:
        ranks[0][_OBJECTS] = [
            {name: state for name, state in theirs.items() if digests[name] != known[name]}
            for theirs, digests in zip(found, told, strict=True)
        ]


def _check_names(
    known: Mapping[str, str], rank: int, theirs: Mapping[str, str], other: int
) -> None:
    for one, here, two, there in ((known, rank, theirs, other), (theirs, other, known, rank)):
        missing = [name for name in one if name not in two]
        if missing:
            raise ValueError(
                f"to_save names {', '.join(map(repr, missing))} on rank {here} and not on rank "
                f"{there}. All ranks go on from one checkpoint, so give each the same names; what "
                "only one of them uses may have any state on the others."
            )


def with_own(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns what is about to be loaded, with this rank's states in place of the saving rank's.

    With another number of ranks each of those that there were before gets its own, and a further
    one the saving rank's; a `ResumeWarning` names the objects.
    """
    for _, engine, state in pairs:
        ranks = state.get(RANKS) if isinstance(engine, Engine) and is_mapping(state) else None
        others = ranks.get(_OBJECTS) if is_mapping(ranks) else None
        if not is_sequence(others) or not all(map(is_mapping, others)):
            continue
        world = World() if engine.backend is None else engine.backend.world
        if len(others) != world.size:
            warn_of_own({name for theirs in others for name in theirs}, len(others), world.size)
        own = others[world.rank] if world.rank < len(others) else {}
        return [(name, one, _laid_over(one, its, own.get(name))) for name, one, its in pairs]
    return list(pairs)


def _engines(objects: Mapping[str, Any]) -> list[Engine]:
    """Returns the engines whose states all ranks take together."""
    values = [value for _, value in walk_objects(objects)]
    return [one for one in values if isinstance(one, Engine) and hasattr(one, "state_on")]


@contextmanager
def _line(objects: Mapping[str, Any]) -> Generator[Line]:
    agreed = [agreement_of(engine) for engine in _engines(objects)]
    lines = [agreement.line for agreement in agreed if agreement is not None]
    with nullcontext(lines[0]) if lines else Line() as line:
        yield line


def _trained(pairs: Sequence[Pair]) -> set[int]:
    """Returns the identities of the parameters that the optimizers among objects step."""
    optimizers = [one for _, one, _ in pairs if isinstance(one, torch.optim.Optimizer)]
    groups = [group for one in optimizers for group in one.param_groups]
    return {id(parameter) for group in groups for parameter in group["params"]}


def _own_of(value: Any, state: Any, trained: set[int]) -> Any:
    """Returns what of an object's state may be another on each rank; None if nothing is."""
    value = unwrap(value)
    if isinstance(value, torch.optim.Optimizer):
        return [{k: v for k, v in g.items() if k != "params"} for g in value.param_groups]
    if isinstance(value, (Engine, ModelPart)):
        return None
    if not is_module(value) or not is_mapping(state):
        return state
    parameters = dict(value.named_parameters(remove_duplicate=False))
    if any(id(parameter) in trained for parameter in parameters.values()):
        # Its buffers are rank 0's, or alike, in each forward pass.
        return None
    return {name: part for name, part in state.items() if name not in parameters}


def _without_parted(differ: list[str], pairs: Sequence[Pair]) -> list[str]:
    """Warns of optimizers among what differs between the ranks, and returns the rest."""
    objects = {name: one for name, one, _ in pairs}
    parted = [name for name in differ if isinstance(objects[name], torch.optim.Optimizer)]
    if parted:
        warn_user(
            f"The optimizer {', '.join(map(repr, parted))} does not step by the same numbers on "
            "all ranks, such as its learning rate, so the copies of its model part; a run that "
            "goes on gives all of them those of the rank that saves. Where a scheduler is stepped "
            "by a loss or a metric, step it by the mean of all ranks (mean_over_ranks).",
            ResumeWarning,
        )
    return [name for name in differ if name not in parted]


def _laid_over(value: Any, state: Any, own: Any) -> Any:
    """Returns an object's state with what this rank has of its own."""
    if own is None or not (is_module(unwrap(value)) and is_mapping(own) and is_mapping(state)):
        return state if own is None else own
    whole: Any = copy.copy(state)
    whole.update(own)
    return whole


def _plain(state: Any) -> Any:
    if state is None or has_spread(state):
        # Each process writes its part.
        return None
    try:
        return to_plain(state, lambda tensor, _: tensor.cpu())
    except CheckpointContentError:
        # The save says it, with the object's name.
        return None
