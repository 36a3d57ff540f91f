"""A program for several processes: they join and leave groups, and one of them is slow at it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from torch import distributed

from crosstrain.backends import World, get

SLOW = 0.3  # seconds


def main(folder: Path, slow_rank: int) -> None:
    """Joins and leaves twice; tells when this process had connected, and when it went on."""
    connected, went_on = list[float](), list[float]()
    join, leave = distributed.init_process_group, distributed.destroy_process_group
    world = World.from_environment()
    pause = SLOW if world.rank == slow_rank else 0

    def join_slowly(*arguments: Any, **settings: Any) -> None:
        join(*arguments, **settings)
        time.sleep(pause)
        connected.append(time.monotonic())

    def leave_slowly() -> None:
        # Meanwhile the others join the next group.
        time.sleep(pause)
        leave()

    with (
        mock.patch.object(distributed, "init_process_group", join_slowly),
        mock.patch.object(distributed, "destroy_process_group", leave_slowly),
    ):
        for _ in range(2):
            with get("cpu"):
                went_on.append(time.monotonic())
    told = {"connected": connected, "went_on": went_on}
    (folder / f"{world.rank}-of-{world.size}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
