"""What a state calls that which each rank has of its own, and what is said of it elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from crosstrain.engine.errors import ResumeWarning, warn_user

#: The key of a state that holds what differs between the ranks.
RANKS: Final = "ranks"


def warn_of_own(names: Collection[str], before: int, size: int) -> None:
    """Says what each rank had of its own, where a run goes on with another number of them."""
    if names:
        warn_user(
            f"The state was written by {before} processes and goes on in {size}, and "
            f"{', '.join(map(repr, sorted(names)))} differed between them. Each of the ranks that "
            "there were goes on with its own, a further one with that of the rank that saved; "
            "that of a rank which is no more is not carried over. Reduce over the ranks, before "
            "it is saved, what is to go on in any number of them.",
            ResumeWarning,
        )
