"""Rank states: what differs between the ranks of a world, in one state that all resume from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from crosstrain.backends import World
from crosstrain.engine.digest import digest, same
from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.made_with import packed, unpacked
from crosstrain.engine.ranks.agreement import agreement_of
from crosstrain.engine.ranks.line import Line, has_ranks
from crosstrain.engine.ranks.of_each import RANKS, warn_of_own
from crosstrain.engine.training.gradients import combined

if TYPE_CHECKING:
    from crosstrain.backends import Backend
    from crosstrain.engine.engine import Engine

#: What the number of logical shards is called among the conditions of a run.
SHARDS: Final = "logical shards"
_logger = logging.getLogger(__name__)
_PARTS: Final = (
    *("rng_states", "epoch_rng_states", "position", "backend", "step", "made"),
    *("structure", "shown"),
)
# What may be large, and is alike on all ranks as a rule: sent where it is not.
_LARGE: Final = "structure"
_NOT_THERE: Final = object()


def gathered(values: Mapping[str, Any], engine: Engine, destination: int) -> dict[str, Any]:
    """Returns a rank's state with what differs on the others; collective in a world.

    Args:
        values: this rank's state.
        engine: whose state it is.
        destination: the rank whose result holds all; that of each other rank holds its own.

    Raises:
        RankFailed: if not all ranks do this at the same iteration, within CROSSTRAIN_TIMEOUT.
    """
    size = 1 if engine.backend is None else engine.backend.world.size
    if size == 1 or not has_ranks():
        if engine.backend is None and has_ranks():
            warn_user(
                "The state is that of this process alone: the engine has no backend, and so knows "
                "nothing of the other ranks of the process group. A run that goes on from it gives "
                "all of them this one's random states and position. Make the engine with a "
                "backend, which takes the group that is there: DeterministicEngine(step, get("
                '"cpu").open()).',
                ResumeWarning,
            )
        return dict(values)
    what = f"taking the engine's state at iteration {values['iteration']}"
    names = (*_PARTS, *engine.state_dict_user_keys)
    own = {name: values[name] for name in names if name in values}
    agreement = agreement_of(engine)
    with Line() if agreement is None else nullcontext(agreement.line) as line:
        mark = digest(own.get(_LARGE))
        if line.meet(what, mark, of=(destination,)) == [mark]:
            own.pop(_LARGE, None)
        found, rank = line.gather(what, own, destination), line.rank
    others = None
    if found is not None:
        others = [
            {name: part for name, part in theirs.items() if not same(part, values[name])}
            for theirs in found
        ]
    return {**values, RANKS: {"size": size, "rank": rank, "others": others}}


def check_same_shards(state: Mapping[str, Any], shards: int | None) -> None:
    """Checks that a state was written with as many logical shards as there are here.

    Raises:
        ValueError: if not; it has both numbers.
    """
    then = state["environment"].get(SHARDS)
    if then == shards:
        return
    raise ValueError(
        f"The state was written {_with(then)}, and this run is {_with(shards)}. Their number "
        "decides the order of additions and stays that of the run: make the trainer "
        + ("without shards=." if then is None else f"with shards={then}.")
    )


def _with(shards: int | None) -> str:
    return "without logical shards" if shards is None else f"with {shards} logical shards"


def own_part(state: Mapping[str, Any], backend: Backend | None) -> dict[str, Any]:
    """Returns a rank's own state of one that `gathered` returned, or that one process wrote.

    With as many ranks each gets what it had. With another number each of those that there were
    before gets its random states, and a further one None: it is to be seeded; an accumulation
    window goes on with the mean of the ranks' gradients. One `ResumeWarning` says so. What is only
    compared is what all ranks had alike: of the rest, each had its own for that number of them.

    Args:
        state: the state.
        backend: whose world goes on.
    """
    world = World() if backend is None else backend.world
    own = {name: value for name, value in state.items() if name != RANKS}
    ranks: Any = state.get(RANKS)
    size = state["environment"]["world size"] if ranks is None else ranks["size"]
    shards = state["environment"].get(SHARDS)
    found: Sequence[Mapping[str, Any]] = (ranks or {}).get("others") or []
    if size != world.size:
        warn_of_own({name for one in found for name in one} - {*_PARTS}, size, world.size)
        own, *found = _without_shares(own, found)
    mine = found[world.rank] if world.rank < len(found) else {}
    if shards is not None and size != world.size:
        # What the training computes is the same in all processes, and so are their streams.
        _logger.info(
            "The state was written by %s processes and goes on in %s: %s logical shards, the same "
            "bits.",
            size,
            world.size,
            shards,
        )
        kept = {name: value for name, value in mine.items() if name not in _PARTS}
        went = {**own, **_alike([{**own, **other} for other in found or [{}]], own)}
        return {**went, **kept, "environment": {**own["environment"], "world size": world.size}}
    place = world.rank, world.size
    if ranks is not None and ranks["others"] is None and (ranks["rank"], size) != place:
        own["rng_states"] = own["epoch_rng_states"] = None
        warn_user(
            f"The state is that of rank {ranks['rank']} of {size} alone, taken there while another "
            "rank got those of all. Not carried over: the random states of rank "
            f"{world.rank}, which begins with a seed that follows from the run's.",
            ResumeWarning,
        )
        return own
    if size == world.size:
        return {**own, **mine}
    # What is reported here is not to be reported once more.
    own["environment"] = {**own["environment"], "world size": world.size}
    return _of_other_size([{**own, **other} for other in found or [{}]], size, world)


def _without_shares(
    own: Mapping[str, Any], found: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yields states without digests of what a script makes by its rank, such as its share of files.

    What all ranks had made alike before the run stays; what one process had made may be either.
    """
    made = [{**own, **one}.get("made", {}).get("before the run", {}) for one in found] or [{}]
    alike = {n: one for n, one in made[0].items() if all(each.get(n) == one for each in made)}
    for part in (own, *found):
        kept = {"made": {**part["made"], "before the run": alike}} if "made" in part else {}
        yield {**part, **kept}


def _of_other_size(parts: Sequence[dict[str, Any]], size: int, world: World) -> dict[str, Any]:
    """Returns the state of a rank of a world that has another size than the one before.

    Args:
        parts: what each of the ranks before had, or the one process that wrote the state.
        size: how many there were.
        world: which rank of how many goes on.
    """
    lost = [f"the main process's random streams of rank {r}" for r in range(world.size, size)]
    for rank in range(size, world.size):
        lost.append(f"the main process's random streams of rank {rank}, which there was none of")
    if own := _own_buffers(parts):
        lost.append(f"what differed between the ranks of the buffers {', '.join(own)}")
    went = (
        parts[world.rank]
        if world.rank < size
        else {**parts[0], "rng_states": None, "epoch_rng_states": None}
    )
    went = {**went, **_alike(parts, went)}
    if _has_window(parts[0].get("step")):
        went["step"] = combined([part["step"] for part in parts])
    warn_user(
        f"The state was written by {size} processes and goes on in {world.size}. The order of the "
        "samples, their augmentation and the global batch go on as they were; sums over the "
        "processes are added up in another order, so the numbers agree within rounding. Not "
        f"carried over: {', '.join(lost)}. A rank without begins with a seed that follows from the "
        "run's seed, the position and the rank.",
        ResumeWarning,
    )
    return went


def _alike(parts: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of a state another number of ranks compares its own with, or puts back.

    That is what all ranks had alike: the indices of a rank's part, a `self.rank`, a mask that
    follows from it are others in a world of another size, and the script has made them for it.

    Args:
        parts: what each of the ranks before had.
        own: what the rank that goes on takes from them.
    """
    alike: dict[str, Any] = {}
    if all("made" in part for part in parts):
        alike["made"] = {"by the first step": [], **_in_all([part["made"] for part in parts])}
    if all("structure" in part for part in parts):
        structures = [part["structure"] for part in parts]
        made_with = _in_all([unpacked(one.get("made with", [])) for one in structures])
        modules = {
            name: {**module, "buffers": _in_all(_buffers(structures, name))}
            for name, module in own["structure"]["modules"].items()
        }
        more = {"made with": packed(made_with), "modules": modules}
        alike["structure"] = {**own["structure"], **more}
    return alike


def _buffers(structures: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [one["modules"].get(name, {"buffers": {}})["buffers"] for one in structures]


def _in_all(nests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what several nests of mappings have alike."""
    found: dict[str, Any] = {}
    for key, first in nests[0].items():
        its = [one.get(key, _NOT_THERE) for one in nests]
        if all(isinstance(one, Mapping) for one in its):
            found[key] = _in_all(its)
        elif all(same(first, one) for one in its):
            found[key] = first
    return found


def _own_buffers(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the buffers with persistent=False that differed between the ranks."""
    structures = [part["structure"] for part in parts if "structure" in part]
    found = [
        f"{name}.{buffer}"
        for name in dict.fromkeys(name for one in structures for name in one["modules"])
        for each in [_buffers(structures, name)]
        for buffer in {name: None for one in each for name in one}
        if buffer not in _in_all(each)
    ]
    return sorted(found)


def _has_window(step: Any) -> bool:
    return isinstance(step, Mapping) and bool(step.get("gradients"))
