"""RankCheck: finds out, now and then, whether all ranks still hold the same parameters."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from crosstrain.engine.errors import RankFailed, warn_user
from crosstrain.engine.events import Events
from crosstrain.engine.progress import check_count
from crosstrain.engine.splitmix import FACTORS, GOLDEN
from crosstrain.engine.spread import is_spread

from .agreement import agree
from .world import unshared

if TYPE_CHECKING:
    from crosstrain.engine.engine import Engine

    from .line import Line

# Words that are mixed at a time, 32 bytes for each: on a CPU, what its caches hold.
_BLOCK: Final = 1 << 22
_CPU_BLOCK: Final = 1 << 14
# Odd, so that nothing is lost in the multiplications: the constants of splitmix64 (Steele et al.,
# OOPSLA 2014), as signed integers.
_STEP, _MIX, _MIX2 = (value - 2**64 for value in (GOLDEN, *FACTORS))


class RankCheck:
    """Compares the parameters of all ranks every so many iterations; attach it on every rank.

    Processes that share their gradients have the same parameters, bit for bit, after each step.
    Where they part, because of a process that was started with another model, of a handler that
    changes them, or of a faulty device, training goes on and is worth nothing. A digest of each
    parameter is made on the device by integer operations; one copy to the host and some messages of
    a few bytes follow.

    Args:
        models: a model, several, or models by name; those that all ranks hold as a whole.
        every: after how many iterations.
        buffers: whether buffers are compared, too. Those of batch norm differ between ranks.

    Raises:
        ValueError: if `every` is below 1.
    """

    def __init__(self, models: Any, every: int = 100, *, buffers: bool = False) -> None:
        check_count("every", every)
        self.every = every
        named: Mapping[str, Any] = {"": models}
        if isinstance(models, Mapping):
            named = models
        elif type(models) is list or type(models) is tuple:
            named = {f"models[{index}]": model for index, model in enumerate(models)}
        self._models = {name: unshared(model) for name, model in named.items()}
        self._buffers = buffers
        self._told: deque[str] = deque()

    def attach(self, trainer: Engine) -> None:
        """Has the engine run the check; does nothing in one process.

        Of a sharded model no rank has a copy: with a warning, its parameters are left out.

        Args:
            trainer: the engine that trains the models.
        """
        if agree(trainer) is None:
            return
        everything, compared = self._everything(), self._tensors()
        if len(compared) < len(everything):
            warn_user(
                f"RankCheck compares {len(compared)} of {len(everything)} parameters and buffers: "
                "the others are sharded, and no two ranks hold the same part"
            )
        if compared:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: one for name, one in self._everything().items() if not is_spread(one)}

    def _everything(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for label, model in self._models.items():
            prefix = f"{label}." if label else ""
            found.update({f"{prefix}{n}": p for n, p in model.named_parameters()})
            if self._buffers:
                found.update({f"{prefix}{n}": b for n, b in model.named_buffers()})
        return found

    def __call__(self, engine: Engine) -> None:
        """Compares; called by the engine.

        Raises:
            RankFailed: names the rank that differs, the iteration and the first parameter; or the
                rank that did not come to this iteration.
        """
        ranks = agree(engine)
        if ranks is None:
            return
        line, iteration = ranks.line, engine.state.iteration
        tensors = self._tensors()
        mine = digests(tensors.values())
        keys = f"{ranks.run_key}/check"
        base = f"{keys}/{line.rank}/{iteration}"
        line.set(base, json.dumps(mine))
        self._told.append(base)
        rank = 0 if line.rank else line.size - 1
        theirs = _of(line, keys, rank, iteration)
        if theirs != mine:
            found = {r: _of(line, keys, r, iteration) for r in range(line.size)}
            raise _difference(found, list(tensors), iteration)
        # Whoever has come here has read what was set for the time before the last.
        if len(self._told) == 3:
            line.drop(self._told.popleft())


def _of(line: Line, keys: str, rank: int, iteration: int) -> list[int]:
    key = f"{keys}/{rank}/{iteration}"
    if not line.awaits(key, line.timeout, lambda: [rank]):
        raise RankFailed(
            f"Rank {line.rank} compares its parameters at iteration {iteration}, and rank {rank} "
            f"did not come to that within {line.timeout:g} s (CROSSTRAIN_TIMEOUT).",
            rank,
        )
    return list(json.loads(line.get(key)))


def _difference(found: Mapping[int, list[int]], names: Sequence[str], iteration: int) -> RankFailed:
    """Returns the error that says which ranks differ from most, and where first."""
    if any(len(values) != len(names) for values in found.values()):
        counts = ", ".join(f"{len(values)} on rank {rank}" for rank, values in found.items())
        return RankFailed(
            f"At iteration {iteration} the ranks have other numbers of parameters: {counts}."
        )
    votes = Counter(tuple(values) for values in found.values())
    most, count = votes.most_common(1)[0]
    odd = [rank for rank, values in found.items() if tuple(values) != most]
    blamed = None
    if count * 2 <= len(found):
        who = f"ranks {', '.join(map(str, found))} do not have the same parameters"
    elif len(odd) > 1:
        who = f"ranks {', '.join(map(str, odd))} have other parameters than the other ranks"
    else:
        blamed = odd[0]
        who = f"rank {blamed} has other parameters than the other ranks"
    differing = [
        name for i, name in enumerate(names) if any(found[rank][i] != most[i] for rank in odd)
    ]
    return RankFailed(
        f"At iteration {iteration} {who}: {len(differing)} of {len(names)} differ, the first is "
        f"'{differing[0]}'. Go on from a checkpoint of before, in all ranks.",
        blamed,
    )


def digests(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Returns a 64-bit digest of each tensor, of its bits and their places.

    The digest is a sum modulo 2**64 of a mix (splitmix64's) of each word with its place, so it
    does not depend on the order in which a device adds up. All are made on the device; reading them
    is one copy a device.
    """
    made = [_digest(tensor.detach()) for tensor in tensors]
    found: dict[torch.device, Any] = {}
    for device in {digest.device for digest in made}:
        found[device] = torch.stack([d for d in made if d.device == device]).tolist()
    return [found[digest.device].pop(0) for digest in made]


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    if content.storage_offset() % 8:
        # Words of 64 bits, which are the fewest, have to lie on their boundaries.
        content = content.clone()
    whole = content.numel() // 8 * 8
    words: Any = content[:whole].view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=content.device)
    block = _CPU_BLOCK if content.device.type == "cpu" else _BLOCK
    part: torch.Tensor
    for part in (*words.split(block), content[whole:].to(torch.int64)):
        places = torch.arange(1, 1 + part.numel(), device=content.device)
        mixed = part + places * _STEP
        mixed = (mixed ^ (mixed >> 30)) * _MIX
        mixed = (mixed ^ (mixed >> 27)) * _MIX2
        # The parts' order counts, too.
        total = (total + (mixed ^ (mixed >> 31)).sum()) * _MIX
    return total
