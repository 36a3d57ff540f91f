"""The seed of a run, which all of its processes have to have alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .line import Line, has_ranks

if TYPE_CHECKING:
    from crosstrain.backends import Backend


def agreed_seed(given: int | None, backend: Backend | None) -> int:
    """Returns the seed of a run: the one given, or one drawn from torch's global generator.

    In several processes it is rank 0's that counts where it is drawn. It is a collective operation
    there: all of them have to start the run, and to have been given the same.
    """
    seed = int(torch.randint(0, int(1e9), (1,)).item()) if given is None else given
    if backend is None or backend.world.size == 1 or not has_ranks():
        return seed
    with Line() as line:
        found = line.meet("agreeing on the run's seed", (given, seed), of=line.everyone)
    for rank, (other, _) in enumerate(found):
        if other != found[0][0]:
            raise ValueError(
                f"The processes of a run have to have one seed: rank 0 was given {found[0][0]}, "
                f"rank {rank} {other}. Give all of them the same, or none: then rank 0's is drawn "
                "and taken by all."
            )
    agreed: int = found[0][1]
    return agreed
