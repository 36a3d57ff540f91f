"""Logical shards: the same bits on any number of processes, killed and gone on with another."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_examples import LAYERS, OPTIMIZERS, Workers
from elastic_program import KINDS, Words, count_words, loss_of_words
from fork_server import ForkServer
from forked import run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import SUPPORT, run_world
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from training_runs import assert_same, loss_fn, network, sgd, state_of

from crosstrain import backends
from crosstrain.backends import BackendError, World
from crosstrain.ci.traces.diff import compare
from crosstrain.ci.traces.file import Trace
from crosstrain.engine import (
    DeterministicEngine,
    Events,
    LogicalShards,
    PerRank,
    StepEvents,
    create_supervised_trainer,
)
from crosstrain.engine.data.shares import check_shards
from crosstrain.engine.training.tree_sum import PartialSums

PROGRAM = "elastic_program.py"


def told(folder: Path, size: int) -> list[dict[str, Any]]:
    files = [folder / f"{rank}-of-{size}.json" for rank in range(size)]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each kind of training comes to in one process that nobody stops."""
    folder = tmp_path_factory.mktemp("alone")
    run_world(1, PROGRAM, str(folder), *KINDS)
    return told(folder, 1)[0]


def test_trainings_have_the_same_bits_on_one_two_and_four_processes(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    for size in (2, 4):
        run_world(size, PROGRAM, str(tmp_path), *KINDS)
    assert alone["overflows"]["skipped"] > 0
    for size in (2, 4):
        for rank, theirs in enumerate(told(tmp_path, size)):
            for kind in KINDS:
                assert theirs[kind] == alone[kind], (kind, rank, size)


def test_a_run_that_is_killed_goes_on_with_any_number_of_processes(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    kind, log = "overflows", ""
    for size, kill_after in ((2, 5), (1, 10)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(size), str(SUPPORT / PROGRAM), str(tmp_path), kind]
        command += ["--save", "--kill-after", str(kill_after)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = run(command, 240, env=environment)
        assert done.returncode != 0
        log += done.stderr
    log += run_world(4, PROGRAM, str(tmp_path), kind, "--save")
    for resumed in told(tmp_path, 4):
        assert resumed[kind]["digest"] == alone[kind]["digest"]
        left = len(resumed[kind]["losses"])
        assert 0 < left < len(alone[kind]["losses"])
        assert resumed[kind]["losses"] == alone[kind]["losses"][-left:]
    assert "written by 2 processes and goes on in 1: 4 logical shards, the same bits" in log
    assert "written by 1 processes and goes on in 4" in log
    assert "ResumeWarning" not in log


def test_traces_of_any_number_of_processes_are_identical(tmp_path: Path) -> None:
    traces: list[Trace] = []
    for size in (1, 2):
        path = tmp_path / f"{size}.trace"
        told = ("words", "--trace", str(path))
        run_world(size, PROGRAM, str(tmp_path), *told)
        traces.append(Trace(path))
    found = compare(*traces)
    assert found.difference is None
    assert found.tolerance is None


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Workers]]:
    """Worlds of 1, 2 and 4 processes that train what they are told."""
    folder = tmp_path_factory.mktemp("worlds")
    with ForkServer("elastic_examples", "torch._dynamo") as server:
        found = [Workers(server, size, folder) for size in (1, 2, 4)]
        yield found
        for world in found:
            world.close()


ARITHMETIC = [("cpu", "float32"), ("cpu", "float64"), ("cpu", "bfloat16")]
ARITHMETIC += [("cpu:bf16", "float32"), ("cpu:fp16", "float32")]
TRAININGS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "arithmetic": st.sampled_from(ARITHMETIC),
        "inputs": st.integers(1, 33),
        "width": st.sampled_from([1, 3, 17, 64]),
        "layers": st.lists(st.sampled_from(sorted(LAYERS)), max_size=4),
        "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
        "max_norm": st.sampled_from([None, 0.5]),
        "samples": st.integers(1, 40),
        "batch": st.integers(1, 20),
        "shards": st.sampled_from([4, 8]),
        "window": st.integers(1, 3),
        "reduction": st.sampled_from(["mean", "sum", "count"]),
        # Bytes: of the first that is sent at once, of others, and up to where one round is made.
        "buckets": st.tuples(*(st.sampled_from([1, 1000, 2**20]) for _ in range(3))),
    }
)


SMALL: dict[str, Any] = {
    "seed": 0,
    "arithmetic": ("cpu", "float32"),
    "inputs": 1,
    "width": 1,
    "optimizer": "Adagrad",
    "max_norm": None,
    "samples": 5,
    "batch": 8,
    "shards": 4,
    "window": 1,
    "reduction": "mean",
    "buckets": (1000, 1, 2**20),
}


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(training=TRAININGS)
@example(training={**SMALL, "layers": ["again"]})
@example(training={**SMALL, "layers": ["observed"]})
def test_any_model_and_batch_has_the_same_bits_on_any_number_of_processes(
    worlds: list[Workers], training: dict[str, Any]
) -> None:
    told = dict(training)
    told["spec"], told["dtype"] = told.pop("arithmetic")
    # torch's GradScaler takes no complex gradients.
    complex_too = told["spec"] != "cpu:fp16"
    told["layers"] = [name for name in told["layers"] if complex_too or name != "spectrum"]
    for world in worlds:
        world.ask(told)
    first, *others = [answer for world in worlds for answer in world.answers()]
    assert first
    assert others == [first] * 6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    levels=st.integers(0, 4),
    processes=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.complex64]),
)
def test_the_sum_does_not_depend_on_who_adds(
    seed: int, levels: int, processes: int, dtype: torch.dtype
) -> None:
    draws, pick = torch.Generator().manual_seed(seed), random.Random(seed)
    shapes = [(pick.randrange(4), pick.randrange(1, 5)) for _ in range(3)]

    def leaf() -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for shape in shapes:
            value = torch.randn(shape, dtype=torch.complex64, generator=draws) * 10
            if pick.random() < 0.2:
                # Zeros of both signs.
                value = value * 0
            whole = value if dtype.is_complex else value.real
            found.append(None if pick.random() < 0.3 else whole.to(dtype))
        return found

    def added(leaves: list[Any], level: int = 0) -> list[Tensor | None]:
        sums = PartialSums()
        for one in leaves:
            sums.add([None if part is None else part.clone() for part in one], level)
        return sums.total()

    leaves = [leaf() for _ in range(2**levels)]
    each = 2 ** max(0, levels - processes)
    parts = [added(leaves[first : first + each]) for first in range(0, len(leaves), each)]
    for one, other in zip(added(parts), added(leaves), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            # As text, which tells zeros of both signs apart.
            assert repr(one.tolist()) == repr(other.tolist())


# ---------------------------------------------------------------- one process


def loader(samples: int = 40, size: int = 16) -> Any:
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 64, generator=draws)
    return DataLoader(TensorDataset(x, torch.randint(0, 10, (samples,), generator=draws)), size)


def trainer_of(model: nn.Module, shards: int | None = 4, **changes: Any) -> Any:
    given: dict[str, Any] = {"backend": "cpu", "deterministic": True, **changes}
    optimizer = given.pop("optimizer", None) or sgd(model)
    return create_supervised_trainer(model, optimizer, loss_fn, shards=shards, **given)


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def test_one_process_computes_what_the_tree_says() -> None:
    ours, theirs = mlp(), mlp()
    stepper, optimizer = sgd(ours), sgd(theirs)
    losses: list[float] = []
    trainer = trainer_of(ours, optimizer=stepper)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: losses.append(trainer.state.output)
    )
    trainer.run(loader())
    shown: list[float] = []
    for x, y in loader():
        found: list[tuple[list[Tensor], Tensor]] = []
        for a, b in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            loss = loss_fn(theirs(a), b)
            weight = len(a) / len(x)
            gradients = torch.autograd.grad(loss * weight, list(theirs.parameters()))
            found.append((list(gradients), loss.detach() * weight))
        while len(found) > 1:
            found = [
                ([p + q for p, q in zip(g, h, strict=True)], k + m)
                for (g, k), (h, m) in zip(found[::2], found[1::2], strict=True)
            ]
        for parameter, gradient in zip(theirs.parameters(), found[0][0], strict=True):
            parameter.grad = gradient
        optimizer.step()
        shown.append(found[0][1].item())
    assert losses == shown
    assert_same(state_of(ours, stepper), state_of(theirs, optimizer))


@pytest.mark.parametrize("window", [1, 3])
def test_shards_train_as_a_training_without_them_within_rounding(window: int) -> None:
    ours, theirs = mlp(), mlp()
    for model, shards in ((ours, 8), (theirs, None)):
        trainer = trainer_of(model, shards, max_norm=0.5, gradient_accumulation_steps=window)
        trainer.run(loader(), max_epochs=2)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Still(Words):
    """Computes each sample by itself: nothing is dropped out, and every layer used."""

    def train(self, mode: bool = True) -> Still:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(x)))
        return logits


@pytest.mark.parametrize("reduction", ["tokens", "sum"])
def test_a_loss_that_is_no_mean_over_samples_has_its_true_weight(reduction: str) -> None:
    draws = torch.Generator().manual_seed(1)
    x = torch.randint(1, 20, (21, 7), generator=draws)
    # Few words in some samples, many in others.
    y = torch.where(
        torch.rand(x.shape, generator=draws) < torch.linspace(0, 0.9, 21)[:, None], 0, x
    )

    def total(y_pred: Tensor, target: Tensor) -> Tensor:
        words = y_pred.flatten(0, 1), target.flatten()
        return nn.functional.cross_entropy(*words, ignore_index=0, reduction="sum")

    loss = loss_of_words if reduction == "tokens" else total
    told = {"loss_reduction": count_words if reduction == "tokens" else "sum"}
    found: list[tuple[Any, float]] = []
    for shards in (8, None):
        torch.manual_seed(3)
        model = Still()
        trainer = create_supervised_trainer(
            model,
            torch.optim.SGD(model.parameters(), 1e-3),
            loss,
            backend="cpu",
            deterministic=True,
            shards=shards,
            **(told if shards else {}),
        )
        trainer.run(DataLoader(TensorDataset(x, y), 21))
        found.append((model, trainer.state.output))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for one, other in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_users_transform_gets_the_parts_and_the_global_loss() -> None:
    seen: list[Any] = []

    def transform(x: Any, y: Any, y_pred: Any, loss: Tensor) -> Any:
        seen.append(([len(part) for part in x], len(y), [p.shape[1] for p in y_pred]))
        return loss

    events: list[str] = []
    trainer = trainer_of(mlp(), output_transform=transform)
    for event in (StepEvents.BACKWARD_STARTED, StepEvents.BACKWARD_COMPLETED):
        trainer.add_event_handler(event, lambda e, name: events.append(name), event.name)
    trainer.run(loader(18))
    assert seen == [([4, 4, 4, 4], 4, [10] * 4), ([1, 1], 2, [10] * 2)]
    assert events == ["BACKWARD_STARTED", "BACKWARD_COMPLETED"] * 2


# ---------------------------------------------------------------- what is refused


def test_another_number_of_shards_is_refused_with_both() -> None:
    trainer = trainer_of(mlp())
    trainer.run(loader())
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="with 4 logical shards, and this run is with 8"):
        trainer_of(mlp(), 8).load_state_dict(state)
    with pytest.raises(ValueError, match="with 4 logical shards, and this run is without"):
        trainer_of(mlp(), None).load_state_dict(state)


@pytest.mark.parametrize("count", [0, 3, -4, 2.0, "4"])
def test_a_number_that_is_no_power_of_two_is_refused(count: Any) -> None:
    with pytest.raises(ValueError, match="a power of two"):
        trainer_of(mlp(), count)


def test_a_number_of_processes_that_does_not_divide_it_is_told_which_do() -> None:
    with pytest.raises(ValueError, match=r"8 logical shards .* 3 processes. .* one of 1, 2, 4, 8:"):
        check_shards(8, World(0, 0, 3))
    with pytest.raises(ValueError, match="one of 1, 2:"):
        check_shards(2, World(0, 0, 4))


def test_models_and_backends_with_sums_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="deterministic=True"):
        trainer_of(mlp(), deterministic=False)
    with pytest.raises(BackendError, match="SyncBatchNorm"):
        trainer_of(nn.SyncBatchNorm.convert_sync_batchnorm(network()))
    with pytest.raises(BackendError, match=r"'null:.*order of its own"):
        trainer_of(mlp(), backend="null")
    with backends.get("cpu:fsdp") as sharded, pytest.raises(BackendError, match="cpu:fsdp"):
        trainer_of(mlp(), backend=sharded)
    sparse = nn.Sequential(nn.EmbeddingBag(17, 10, sparse=True, mode="sum"))
    data = TensorDataset(torch.ones(8, 3, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(BackendError, match="sparse=False"):
        trainer_of(sparse, optimizer=torch.optim.SGD(sparse.parameters(), 0.1)).run(
            DataLoader(data, 8)
        )


def test_what_cannot_be_dealt_out_by_position_is_refused() -> None:
    batches: list[Any] = list(loader())
    for data in (batches, PerRank(batches), iter(batches)):
        with pytest.raises(ValueError, match="cannot be dealt out to logical shards"):
            trainer_of(mlp()).run(data, epoch_length=2)
    backend, model = backends.get("cpu").open(), mlp()
    shards = LogicalShards(4, backend, model, sgd(model))
    engine = DeterministicEngine(lambda e, b: shards.backward(e, b, lambda part: None), backend)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="not dealt out to 4 logical shards"):
        engine.run(loader())
    with pytest.raises(ValueError, match="'mean', 'sum' or a function"):
        LogicalShards(4, backend, model, sgd(model), "median")
    assert not isinstance(shards.model, DistributedDataParallel)
