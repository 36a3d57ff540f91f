"""A run that is stopped at any iteration and resumed in another process ends with the same bits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import on_xla
import pytest
import resume_harness as harness
import torch
from fork_server import ForkServer

Straight = Callable[[str], Path]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    # torch imports the latter when the first optimizer is made, which takes seconds.
    names = ("resume_harness", "torch._dynamo", "crosstrain.backends.cpu", *on_xla.PRELOAD)
    with ForkServer(*names) as server:
        yield server


@pytest.fixture(scope="module")
def straight(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Gives the file that a variant's run straight through has written; runs it if need be."""
    folder = tmp_path_factory.mktemp("straight")

    def run(variant: str) -> Path:
        file = folder / f"{variant}.pt"
        if not file.exists():
            assert server.run(harness.train_straight, str(file), variant, 2, 7) == 0
        return file

    return run


def resume(
    server: ForkServer, file: Path, variant: str, snapshot: str, workers: int, seed: int, tmp: Path
) -> list[str]:
    """Resumes in a process of its own; returns what differs at the end."""
    report = tmp / "report.json"
    arguments = (str(file), variant, snapshot, workers, seed, str(report))
    assert server.run(harness.train_on, *arguments) == 0
    found: list[str] = json.loads(report.read_text())
    return found


SNAPSHOTS = [str(k) for k in range(1, harness.ITERATIONS + 1)]
SNAPSHOTS += [f"epoch {e}" for e in range(1, harness.EPOCHS + 1)]


# An iteration of each place in a window, one of the second epoch, the last, and an epoch's end.
FEW = ["4", "5", "9", "17", str(harness.ITERATIONS), "epoch 1"]
HALVES = [[*dict.fromkeys([*FEW, *SNAPSHOTS[half::2]])] for half in (0, 1)]
# A process of XLA compiles for seconds before it goes on: only one of its variants has all.
COVERED = {
    **{name: HALVES[number % 2] for number, name in enumerate(harness.ON_HOST)},
    "fp32": SNAPSHOTS,
    "xla": SNAPSHOTS,
    "xla-bf16": FEW,
    "spmd-2": FEW,
    "spmd-4": FEW[1:4],
    "spmd-2-bf16": FEW[1:4],
}
CASES = [
    pytest.param(
        variant,
        snapshot,
        id=f"{variant}-{snapshot}",
        marks=() if variant in harness.ON_HOST else on_xla.needs_xla,
    )
    for variant, snapshots in COVERED.items()
    for snapshot in snapshots
]


@pytest.mark.parametrize(("variant", "snapshot"), CASES)
def test_a_resumed_run_ends_with_the_same_bits(
    server: ForkServer, straight: Straight, tmp_path: Path, variant: str, snapshot: str
) -> None:
    number = SNAPSHOTS.index(snapshot)
    workers, seed = number % 4 % 3, 1000 + number
    assert resume(server, straight(variant), variant, snapshot, workers, seed, tmp_path) == []


def test_every_variant_is_resumed() -> None:
    assert COVERED.keys() == harness.VARIANTS.keys()


def test_the_runs_differ_where_they_should(straight: Straight) -> None:
    """What makes the comparison worth something: it does not compare constants."""
    runs = {name: torch.load(straight(name)) for name in harness.ON_HOST}
    for run in runs.values():
        batches, losses, states = zip(*(row[1:] for row in run["rows"].values()), strict=True)
        assert len(set(batches)) == len(set(losses)) == len(set(states)) == harness.ITERATIONS
    assert len({run["rows"][harness.ITERATIONS][2] for run in runs.values()}) == len(runs)
    assert [row[1] for row in runs["fp32"]["rows"].values()] == [
        row[1] for row in runs["bf16"]["rows"].values()
    ]


@on_xla.needs_xla
def test_every_device_gets_the_same_batches(straight: Straight) -> None:
    runs = [torch.load(straight(name))["rows"] for name in ("fp32", "xla", "xla-bf16", "spmd-4")]
    batches = [[row[1] for row in rows.values()] for rows in runs]
    assert all(found == batches[0] for found in batches)
    # Not constants are compared. Devices of one precision may well agree to the bit on some CPUs.
    losses = [rows[harness.ITERATIONS][2] for rows in runs]
    assert losses[0] != losses[2]


@on_xla.needs_xla
def test_another_number_of_devices_is_told(server: ForkServer, tmp_path: Path) -> None:
    files = [str(tmp_path / f"{count}.pt") for count in (2, 4)]
    assert server.run(harness.train_leg, None, "spmd-2", 14, files[0]) == 0
    assert server.run(harness.train_leg, files[0], "spmd-4", 15, files[1]) == 0
    (warned,) = torch.load(files[1])["warnings"]
    assert "devices was '2 devices of XLA" in warned
    assert "and is '4 devices of XLA" in warned


def test_an_overflow_really_skips_a_step(straight: Straight) -> None:
    run = torch.load(straight("fp16-overflow"))
    steps = [*range(3, harness.ITERATIONS + 1, 3), harness.ITERATIONS]
    assert run["skipped"], "no step was skipped"
    assert set(run["skipped"]) < set(steps)
    # The scheduler follows applied steps only.
    applied = len(steps) - len(run["skipped"])
    assert run["end"]["scheduler"]["last_epoch"] == applied
    assert run["end"]["trainer"]["step"]["applied_steps"] == applied


def test_one_wrong_bit_is_found(server: ForkServer, straight: Straight, tmp_path: Path) -> None:
    """What makes the comparison worth something: one bit of a random state makes it fail."""
    run = torch.load(straight("fp32"))
    snapshot = harness.read(run["snapshots"]["4"])
    snapshot["trainer"]["rng_states"]["python"]["words"][10] ^= 1
    content = io.BytesIO()
    torch.save(snapshot, content)
    torch.save({**run, "snapshots": {"4": content.getvalue()}}, tmp_path / "wrong.pt")
    # The training does not draw from Python's generator, which the next epoch seeds anew.
    found = resume(server, tmp_path / "wrong.pt", "fp32", "4", 0, 1, tmp_path)
    assert found == [f".{iteration}[3]" for iteration in range(5, 14)]
