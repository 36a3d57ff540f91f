"""A power cut at any moment: what was not flushed is lost, and the checkpoint before is not.

A model of the disk: it follows what a save does to files and folders, and says what is on the disk
if the power is cut after each step. Of a file that are the bytes that were flushed last; of a
folder the names that it had then, or, since a journal may have come further by itself, those after
any later step.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from crosstrain.engine import Checkpoint, DiskSaver, Engine, read_checkpoint

#: The names in each folder, by the inode of the folder, and theirs.
Names = dict[int, dict[str, int]]
_STEPS = ("fsync", "link", "replace", "rename", "unlink", "mkdir", "rmdir")


@dataclass
class Moment:
    """The disk after a step of a save.

    Args:
        live: the names that a process sees.
        flushed: those that each folder had when it was flushed last.
        when: after which step that was.
        contents: the bytes that each file had when it was flushed last.
        done: what had been reported as saved.
    """

    live: Names
    flushed: Names
    when: dict[int, int]
    contents: dict[int, bytes]
    done: int


@dataclass
class Disk:
    """Follows what is done to a folder.

    Args:
        root: the folder; it exists and is empty.
    """

    root: Path
    moments: list[Moment] = field(default_factory=list[Moment])
    done: int = 0
    _kept: ExitStack = field(default_factory=ExitStack)
    _flushed: Names = field(default_factory=dict[int, dict[str, int]])
    _when: dict[int, int] = field(default_factory=dict[int, int])
    _contents: dict[int, bytes] = field(default_factory=dict[int, bytes])

    def follow(self, patch: pytest.MonkeyPatch) -> None:
        """Begins to take down each step."""
        for name in _STEPS:
            patch.setattr(os, name, self._followed(name, getattr(os, name)))

    def _followed(self, name: str, does: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **more: Any) -> Any:
            answer = does(*arguments, **more)
            if name == "fsync":
                self._flush(arguments[0])
            self.take_down()
            return answer

        return step

    def _flush(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        # As long as it is open, no other gets its inode.
        self._kept.callback(os.close, os.dup(descriptor))
        if stat.S_ISDIR(status.st_mode):
            self._flushed[status.st_ino] = self._names().get(status.st_ino, {})
            self._when[status.st_ino] = len(self.moments)
        else:
            # It may be open for writing only, and have no name.
            path = Path(f"/proc/self/fd/{descriptor}")
            self._contents[status.st_ino] = path.read_bytes()

    def _names(self) -> Names:
        found: Names = {}
        for folder, _, _ in os.walk(self.root):
            with os.scandir(folder) as entries:
                found[os.stat(folder).st_ino] = {entry.name: entry.inode() for entry in entries}
        return found

    def close(self) -> None:
        """Forgets what was deleted."""
        self._kept.close()

    def take_down(self) -> None:
        """Takes down how the disk is."""
        moment = Moment(
            self._names(), dict(self._flushed), dict(self._when), dict(self._contents), self.done
        )
        self.moments.append(moment)

    def cut(self) -> Iterator[tuple[int, int, dict[str, bytes | None]]]:
        """Yields what a power cut can leave: paths and contents, None for a folder.

        With what had been reported as saved, and the step after which the power was cut.
        """
        root = self.root.stat().st_ino
        for last, now in enumerate(self.moments):
            seen: list[dict[str, bytes | None]] = []
            for reached in range(last + 1):
                # What the journal has reached, but no less than was flushed.
                then = {
                    folder: now.flushed[folder]
                    if now.when[folder] >= reached
                    else self.moments[reached].live.get(folder, now.flushed[folder])
                    for folder in now.flushed
                }
                then |= {
                    folder: names
                    for folder, names in self.moments[reached].live.items()
                    if folder not in now.flushed
                }
                tree = dict(_paths(root, then, now.contents, ""))
                if tree not in seen:
                    seen.append(tree)
                    yield now.done, last, tree


def _paths(
    folder: int, names: Names, contents: dict[int, bytes], before: str
) -> Iterator[tuple[str, bytes | None]]:
    for name, inode in names.get(folder, {}).items():
        if inode in names:
            yield f"{before}{name}", None
            yield from _paths(inode, names, contents, f"{before}{name}/")
        else:
            yield f"{before}{name}", contents.get(inode, b"")


def put(tree: dict[str, bytes | None], folder: Path) -> None:
    folder.mkdir()
    for name, data in tree.items():
        if data is None:
            (folder / name).mkdir()
        elif name != ".crosstrain.lock":
            (folder / name).write_bytes(data)


class Counter:
    """An object whose whole state follows from one number."""

    value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": torch.full((700,), float(self.value))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("it is read as a whole")


def value_of(path: Path) -> int:
    state = read_checkpoint(path)
    state = state.get("counter", state)
    assert state["tensor"].eq(state["value"]).all()
    return int(state["value"])


@pytest.mark.parametrize("name", ["numbered", "same"])
@pytest.mark.parametrize("mode", ["file", "background", "parts", "background parts"])
def test_a_power_cut_loses_nothing_that_was_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, name: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    disk = Disk(folder)
    counter, engine = Counter(), Engine(lambda *_: None)
    saver = DiskSaver(
        folder, require_empty=False, background="background" in mode, parts="parts" in mode
    )
    pattern = "checkpoint.pt" if name == "same" else None
    handler = Checkpoint({"counter": counter}, saver, n_saved=1, filename_pattern=pattern)
    with monkeypatch.context() as patch:
        disk.follow(patch)
        disk.take_down()
        for value in (1, 2, 3):
            counter.value = engine.state.iteration = value
            handler(engine)
            handler.wait()
            disk.done = value
            disk.take_down()
    saver.close()
    disk.close()
    count = 0
    for count, (done, step, tree) in enumerate(disk.cut()):
        after = tmp_path / f"after-{count}"
        put(tree, after)
        # As the next start does.
        DiskSaver(after, require_empty=False).close()
        latest = Checkpoint.latest(after)
        told = f"step {step}, saved {done}: {sorted(tree)}: {latest.describe()}"
        assert not latest.passed_over, told
        found = 0 if latest.path is None else value_of(latest.path)
        assert done <= found <= done + 1, told
    assert count > 15
