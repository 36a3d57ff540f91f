"""The scenarios: sound trainings pass each, and faults of a backend or a training are found."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from processes import SUPPORT

from crosstrain.ci.matrix.outcome import Outcome
from crosstrain.ci.matrix.run_one import main, play_cell
from crosstrain.ci.trials.course import Course, deviation, first_difference, first_distance
from crosstrain.ci.trials.processes import marked
from crosstrain.ci.trials.scenarios import LOSS_TOLERANCE, SCENARIOS

pytestmark = pytest.mark.usefixtures("forked_programs")

# Backends of another package: one that loses its loss scale, one that draws its dropout from a
# stream that it does not save, and one that nobody has.
BACKENDS = """
import torch
from crosstrain.backends import Availability
from crosstrain.backends.torch_backend import TorchBackend

class ForgetsScale(TorchBackend):
    name, options = "forgets-scale", ("fp16",)

    def load_state_dict(self, state):
        pass

class Noisy(TorchBackend):
    name = "noisy"

    def backward(self, loss, optimizer):
        if not hasattr(self, "_noise"):
            self._noise = torch.Generator().manual_seed(1)
        super().backward(loss * (1 + torch.rand(1, generator=self._noise).item()), optimizer)

class Absent(TorchBackend):
    name = "absent"

    @classmethod
    def probe(cls, option=None):
        return Availability(False, "Nobody has such a device.", "Invent one.")
"""


@pytest.fixture
def _theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the backends for the processes of the scenarios."""
    place = tmp_path / "site"
    info = place / "theirs-1.0.dist-info"
    info.mkdir(parents=True)
    (place / "their_backends.py").write_text(BACKENDS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    lines = ["forgets-scale = their_backends:ForgetsScale", "noisy = their_backends:Noisy"]
    text = "\n".join(["[crosstrain.backends]", *lines, "absent = their_backends:Absent"])
    (info / "entry_points.txt").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(place))


def play(spec: str, name: str, folder: Path, target: str | None = None) -> Outcome:
    file = None if target is None else f"{SUPPORT / 'scenario_targets.py'}:{target}"
    return play_cell(spec, SCENARIOS[name], folder, file)


# Ours


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_scenario_passes(name: str, tmp_path: Path) -> None:
    spec = "cpu:fp16" if "loss_scaling" in SCENARIOS[name].needs else "cpu"
    outcome = play(spec, name, tmp_path)
    assert (outcome.status, outcome.reason) == ("passed", "")
    figures = outcome.figures
    assert len(outcome.losses) == len(outcome.resumed_losses) == figures["iterations"] == 16
    resumed = [int(place) for place in str(figures["resumed_from"]).split(", ")]
    assert len(resumed) == int(figures["kills"]) + int(figures["stops"]) > 0
    assert all(0 < place < 16 for place in resumed)
    if name == "port":
        assert 0 < float(figures["largest_deviation"]) <= LOSS_TOLERANCE
    else:
        assert outcome.losses == outcome.resumed_losses
        assert figures["largest_deviation"] == 0
    if name == "overflow":
        assert figures["skipped_steps"] == "4, 12"
        assert 4 <= resumed[0] < 12
    assert {"torch", "python"} <= set(outcome.versions)
    assert list(tmp_path.iterdir()) == [], "the folder of the checkpoints is left"


@pytest.mark.parametrize(
    ("spec", "name"),
    [("cpu:fsdp", "background"), ("cpu:fsdp-bf16", "port"), ("cpu:fsdp-fp16", "overflow")],
)
def test_a_sharded_model_passes(spec: str, name: str, tmp_path: Path) -> None:
    """Its checkpoints are folders, its tensors are spread, and it is ported to one that is not."""
    outcome = play(spec, name, tmp_path)
    assert (outcome.status, outcome.reason) == ("passed", "")
    assert int(outcome.figures["kills"]) + int(outcome.figures["stops"]) > 0


def test_the_cell_on_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crosstrain.ci.matrix.run_one", "null", "middle"]
    result = subprocess.run([*command, "--folder", str(tmp_path / "new")], check=False)
    assert result.returncode == 0
    outcome = Outcome.read(tmp_path / "new" / "outcome.json")
    assert (outcome.spec, outcome.scenario, outcome.status) == ("null", "middle", "skipped")
    assert "computes nothing" in outcome.reason
    assert outcome.hardware is not None
    assert outcome.hardware["cores"] > 0
    with pytest.raises(SystemExit) as caught:
        main(["cpu", "middel", "--folder", str(tmp_path)])
    assert caught.value.code == 2


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, crosstrain.ci.matrix.run_one; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# What does not run


@pytest.mark.usefixtures("_theirs")
@pytest.mark.parametrize(
    ("spec", "name", "status", "words"),
    [
        ("absent", "middle", "unavailable", "Nobody has such a device. Invent one."),
        ("cpu", "overflow", "skipped", "has no loss_scaling, which the scenario needs"),
        ("cpu:bf17", "middle", "error", "Did you mean 'cpu:bf16'?"),
    ],
)
def test_what_cannot_be_played_says_why(
    spec: str, name: str, status: str, words: str, tmp_path: Path
) -> None:
    outcome = play(spec, name, tmp_path)
    assert outcome.status == status
    assert words in outcome.reason


# Faults of a backend


@pytest.mark.usefixtures("_theirs")
def test_a_backend_that_loses_its_scale_fails(tmp_path: Path) -> None:
    outcome = play("forgets-scale", "overflow", tmp_path)
    assert outcome.status == "failed"
    first = int(str(outcome.figures["resumed_from"])) + 1
    assert outcome.reason.startswith(f"Iteration {first}")
    assert "loss scale differs: " in outcome.reason


@pytest.mark.usefixtures("_theirs")
def test_a_backend_with_a_stream_that_is_not_saved_fails(tmp_path: Path) -> None:
    outcome = play("noisy", "middle", tmp_path)
    assert outcome.status == "failed"
    # The gradients of the first iteration after the stop differ, and so its weights.
    assert outcome.reason.startswith("Iteration 13: the weights differ: ")
    assert outcome.losses[:13] == outcome.resumed_losses[:13]
    assert outcome.losses[13:] != outcome.resumed_losses[13:]
    assert float(outcome.figures["largest_deviation"]) > 0


# Users' trainings


@pytest.mark.parametrize("name", ["workers", "sigkill"])
def test_a_sound_training_passes(name: str, tmp_path: Path) -> None:
    outcome = play("cpu", name, tmp_path, "sound")
    assert (outcome.status, outcome.reason) == ("passed", "")
    assert outcome.figures["iterations"] == 20


def test_a_training_with_a_hidden_state_fails(tmp_path: Path) -> None:
    outcome = play("cpu", "boundary", tmp_path, "drifting")
    assert outcome.status == "failed"
    assert outcome.reason.startswith("Iteration 11: the loss differs: ")


@pytest.mark.parametrize(
    ("target", "name", "status", "words"),
    [
        ("without_workers", "workers", "skipped", "has no argument `workers`"),
        ("sound", "schedule", "skipped", "for the training to say"),
        ("short", "boundary", "skipped", "2 iterations in epochs of 2, which is too few"),
        ("short", "sigkill", "skipped", "too few to kill it"),
        ("failing", "middle", "error", "OSError: the disk is on fire"),
        ("nothing", "middle", "error", "has no function 'nothing'"),
    ],
)
def test_a_training_that_cannot_be_played_says_why(
    target: str, name: str, status: str, words: str, tmp_path: Path
) -> None:
    outcome = play("cpu", name, tmp_path, target)
    assert outcome.status == status
    assert words in outcome.reason
    printed = "".join(path.read_text() for path in tmp_path.iterdir())
    assert ("Traceback" in printed) == (target == "failing")


# Comparison


def course(*losses: float) -> Course:
    found = Course()
    for iteration, loss in enumerate(losses, 1):
        row: dict[str, Any] = {"iteration": iteration, "epoch": 1, "batch": f"b{iteration}"}
        row |= {"loss": loss.hex(), "scalar": True, "skipped steps": 0, "weights": "w"}
        row |= {"optimizer": "o", "loss scale": "s", "random states": "r"}
        found.take(row)
    found.take({"done": True, "length": 4, "end": {"model.0.weight": "x", "step": "y"}})
    return found


@pytest.mark.parametrize(
    ("thing", "other"),
    [("batch", "b9"), ("loss", "0x1p0"), ("weights", "v"), ("random states", "q")],
)
def test_the_first_difference_is_named(thing: str, other: str) -> None:
    straight = course(0.5, 0.25, 0.125)
    resumed = copy.deepcopy(straight)
    assert first_difference(straight, resumed) == ""
    resumed.rows[2][thing] = resumed.rows[3]["epoch"] = other
    assert first_difference(straight, resumed).startswith(f"Iteration 2: the {thing} differ")
    del resumed.rows[1]
    assert "resumed run did not do iteration 1" in first_difference(straight, resumed)


def test_what_was_done_twice_has_to_agree() -> None:
    straight, resumed = course(0.5, 0.25), course(0.5, 0.25)
    resumed.take({**resumed.rows[2], "loss": (0.75).hex()})
    resumed.take(straight.rows[2])
    found = first_difference(straight, resumed)
    assert found.startswith("Iteration 2 was done again after an interruption, and its loss")
    assert "0.25, then 0.75" in found


def test_parts_of_the_state_that_differ_at_the_end_are_named() -> None:
    straight, resumed = course(0.5), course(0.5)
    resumed.end = {**resumed.end, "model.0.weight": "z"}
    assert first_difference(straight, resumed) == "At the end differ: model.0.weight."


def test_ported_runs_may_differ_within_the_tolerance() -> None:
    straight, resumed = course(0.5, 0.25), course(0.5, 0.375)
    assert first_distance(straight, resumed, 0.125) == ""
    assert "Iteration 2: the losses are 0.125 apart" in first_distance(straight, resumed, 0.1)
    assert first_distance(straight, resumed, None) == ""
    assert deviation(straight, resumed) == 0.125
    broken = course(0.5, math.nan)
    assert "Iteration 2" in first_distance(straight, broken, 10.0)
    assert math.isnan(deviation(straight, broken))
    assert deviation(broken, broken) == 0
    resumed.rows[1]["batch"] = "other"
    assert "the batch differs" in first_distance(straight, resumed, None)


# Processes


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc here")
def test_processes_do_not_outlive_a_cell_that_is_killed(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    command = [
        sys.executable,
        "-m",
        "crosstrain.ci.matrix.run_one",
        "cpu",
        "workers",
        "--folder",
        tmp_path,
    ]
    with subprocess.Popen(command, env={**os.environ, "CELL_OF_A_TEST": mark}) as cell:
        deadline = time.monotonic() + 250
        while len(marked(mark)) < 4 and cell.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cell.send_signal(signal.SIGKILL)
    while marked(mark):
        assert time.monotonic() < deadline, marked(mark)
        time.sleep(0.05)
