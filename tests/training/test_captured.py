"""A step that is a graph, beside the same step called, on the devices that have graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from processes import told_by

from crosstrain.backends import BackendError, get
from crosstrain.engine import Captured, create_supervised_trainer

pytestmark = pytest.mark.usefixtures("forked_programs")

Tell = Callable[[str], dict[str, Any]]

emulated = pytest.param(
    "emulated",
    marks=pytest.mark.skipif(
        Version(torch.__version__).release < (2, 13), reason="a device in Python needs torch 2.13"
    ),
)
cuda = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
)


@pytest.fixture(scope="module", params=[emulated, cuda])
def tell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tell:
    """Runs one of the programs in a process of its own, which has the device for good."""

    def run(name: str) -> dict[str, Any]:
        return told_by("captured_program.py", name, tmp_path_factory.mktemp(name), request.param)

    return run


def test_a_graph_has_the_bits_of_the_same_step_called(tell: Tell) -> None:
    """In windows, with a smaller last batch, clipped, drawing on the device, over skipped steps."""
    told = tell("bits")
    for captured, called in told.values():
        assert captured == called
    assert 0 < told["fp16, windows of 1"][0]["steps"][2] < 8


def test_what_changes_in_a_run_is_noticed(tell: Tell) -> None:
    """Frozen, loaded, moved and exchanged parts, rates of a scheduler, an evaluation."""
    told = tell("changes")
    assert len(told) == 6
    for captured, called in told.values():
        assert captured == called
    assert len({str(captured["weights"]) for captured, _ in told.values()}) == 6


def test_a_run_goes_on_bit_for_bit(tell: Tell) -> None:
    """In windows, from files that a thread has written while graphs were replayed."""
    told = tell("resumes")
    assert [found["wrong"] for found in told.values()] == [[], []]
    assert told["fp16"]["steps"][2] < told["fp32"]["steps"][2]


def test_a_step_of_ones_own_is_captured(tell: Tell) -> None:
    told = tell("own")
    assert told["graph"] == told["called"]


def test_a_graph_is_freed_with_its_trainer_and_not_while_another_is_recorded(tell: Tell) -> None:
    told = tell("freed")
    assert told["gone"]
    assert len(told["calls"]) < told["steps"] == 16
    assert min(told["calls"]) > 0, "a graph is left to free in the call that was recorded"


def test_a_replay_reads_nothing_and_runs_no_python_of_the_model(tell: Tell) -> None:
    assert tell("reads") == {"fp32": [0, 0], "fp16": [0, 0]}


def test_what_cannot_be_a_graph_is_refused_with_its_reason(tell: Tell) -> None:
    told = tell("refusals")
    for name, words in {
        "cpu": "'cpu:fp32' cannot record a step as a graph",
        "reads": "operation not permitted when stream is capturing",
        "draws": "draws random numbers on the host",
        "capturable": "Make it with capturable=True",
        "scaler": "Make it with fused=True, or use bf16",
        "rate": "SGD reads its learning rate on the host",
        "counts": "_Counting changes on the host",
        "listens": "handlers of GRADIENTS_READY",
        "cycles": "betas of optimizer 0, group 0",
        "shards": "shards=2",
        "host": "lies on 'cpu'",
        "sizes": "16 combinations",
    }.items():
        assert words in told[name], name


def test_devices_without_graphs_say_so() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(BackendError, match=r"'cpu:bf16' cannot record .* Leave capture out"):
        create_supervised_trainer(model, optimizer, torch.sum, backend="cpu:bf16", capture=True)
    with pytest.raises(BackendError, match=r"'null:record' .* no method 'graphs'"):
        Captured(lambda: None, get("null"), model, optimizer)
