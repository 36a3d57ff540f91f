"""A trace holds what a training did, to the bit, and survives kills, resumes and bad files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_xla import needs_xla
from torch import nn
from trace_runs import ITERATIONS, build, traced

from crosstrain.ci import TraceRecorder
from crosstrain.ci.traces.diff import first_difference
from crosstrain.ci.traces.digest import Digester, salt, tensors_of
from crosstrain.ci.traces.file import Thing, Trace, TraceError
from crosstrain.engine import (
    DeterministicEngine,
    Events,
    create_supervised_trainer,
    resume_or_start,
)

SPECS = ("cpu", "cpu:bf16", "cpu:fp16")


def digest(tensor: torch.Tensor) -> int:
    digester = Digester()
    return (int(digester.digest(tensor)) + salt(tensor)) % 2**64


# ---------------------------------------------------------------- digests


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8],
)
@pytest.mark.parametrize("count", [1, 1000, 2**20 + 3])
def test_a_digest_sees_each_element_and_its_place(dtype: torch.dtype, count: int) -> None:
    tensor = torch.arange(count).remainder(101).to(dtype)
    before = digest(tensor)
    assert digest(tensor.clone()) == before
    for place in {0, count // 2, count - 1}:
        changed = tensor.clone()
        changed[place] += 1
        assert digest(changed) != before
    if count > 1:
        assert digest(tensor.flip(0)) != before
        assert digest(tensor.roll(1)) != before


def test_a_digest_sees_bits_that_compare_equal() -> None:
    zero = torch.zeros(3)
    assert digest(zero) != digest(-zero)
    nan = torch.full((3,), torch.nan)
    other = (nan.view(torch.int32) + 1).view(torch.float32)
    assert digest(nan) == digest(nan.clone())
    assert digest(nan) != digest(other)


def test_a_digest_sees_the_highest_bit_of_one_element() -> None:
    tensor = torch.ones(1000)
    flipped = tensor.clone()
    flipped[400] = -1
    assert digest(flipped) != digest(tensor)


def test_a_digest_is_of_content_and_shape_not_of_layout() -> None:
    tensor = torch.randn(4, 6)
    assert digest(tensor.t().contiguous()) == digest(tensor.t())
    assert digest(tensor.reshape(6, 4)) != digest(tensor)
    assert digest(tensor.to_sparse_coo()) == digest(tensor.clone().to_sparse_coo())
    assert digest(torch.zeros(0)) != digest(torch.zeros(0, 2))
    assert digest(torch.complex(tensor, tensor)) != digest(torch.complex(tensor, -tensor))


def test_a_nest_is_told_by_its_form_and_plain_values() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    assert [t is u for t, u in zip(tensors_of({"y": [b], "x": a})[0], (a, b), strict=True)]
    forms: list[Any] = [
        [a, b],
        (a, {"b": b}),
        {"a": a, "b": b},
        [a, b, 1],
        [a, b, 1.0],
        [a, b, "1"],
    ]
    assert len({tensors_of(form)[1] for form in forms}) == len(forms)
    assert tensors_of({"a": 1, "b": 2}) == tensors_of({"b": 2, "a": 1})


# ---------------------------------------------------------------- recording


@pytest.mark.parametrize("spec", SPECS)
def test_a_trace_does_not_depend_on_when_it_is_read_and_changes_nothing(
    spec: str, tmp_path: Path
) -> None:
    plain = build(spec)
    plain.run()
    for every_sync in (1, 5, 100):
        with_trace = traced(tmp_path / f"{every_sync}", spec, every_sync=every_sync)
        for ours, theirs in zip(
            with_trace.to_save["model"].state_dict().values(),
            plain.to_save["model"].state_dict().values(),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
    first = Trace(tmp_path / "1")
    assert first.iterations == list(range(1, ITERATIONS + 1))
    for other in ("5", "100"):
        assert first_difference(first, Trace(tmp_path / other)) is None


def test_a_record_holds_everything_in_the_order_in_which_it_comes_about(tmp_path: Path) -> None:
    training = traced(tmp_path / "trace")
    record = Trace(tmp_path / "trace").record(ITERATIONS)
    kinds = list(dict.fromkeys(thing.kind for thing in record.digests))
    assert kinds == [
        "batch", "random", "setting", "loss", "gradient", "parameter", "buffer", "random after"
    ]  # fmt: skip
    assert Thing("gradient", "model.0.weight") in record.digests
    assert Thing("buffer", "model.1.running_mean") in record.digests
    assert record.values[Thing("loss")] == training.trainer.state.output
    assert record.values[Thing("setting", "'lr' of optimizer")] == 1e-2
    weight: torch.Tensor = training.to_save["model"][0].weight
    expected = float(weight.detach().norm())
    assert record.values[Thing("parameter", "model.0.weight")] == pytest.approx(expected, rel=1e-6)
    assert record.epoch == 2


def test_each_iteration_of_a_window_has_its_gradients(tmp_path: Path) -> None:
    traced(tmp_path / "trace", gradient_accumulation_steps=3)
    trace = Trace(tmp_path / "trace")
    gradient = Thing("gradient", "model.4.weight")
    found = [trace.record(iteration).digests[gradient] for iteration in trace.iterations]
    assert len(set(found)) == ITERATIONS
    weight = Thing("parameter", "model.4.weight")
    weights = [trace.record(iteration).digests[weight] for iteration in trace.iterations]
    assert len(set(weights)) == ITERATIONS // 3 + 1


def test_several_models_unused_and_shared_parameters(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 1)
    second.register_parameter("unused", nn.Parameter(torch.ones(2)))
    second.register_parameter("again", second.weight)
    optimizers = [torch.optim.SGD(first.parameters(), 0.1), torch.optim.Adam(second.parameters())]
    trainer = create_supervised_trainer(
        [first, second],
        optimizers,
        nn.functional.mse_loss,
        backend="cpu",
        model_fn=lambda models, x: models[1](models[0](x)),
    )
    TraceRecorder(tmp_path / "trace").attach(trainer)
    trainer.run([(torch.ones(2, 3), torch.ones(2, 1))] * 3)
    record = Trace(tmp_path / "trace").record(3)
    gradients = [thing.name for thing in record.digests if thing.kind == "gradient"]
    assert gradients == ["model_0.weight", "model_0.bias", "model_1.weight", "model_1.bias"]
    assert Thing("parameter", "model_1.unused") in record.digests
    assert Thing("setting", "'lr' of optimizer_1") in record.digests


def test_an_engine_with_a_step_of_ones_own_is_recorded_too(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(engine: Any, batch: torch.Tensor) -> dict[str, Any]:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss.item(), "name": "a"}

    trainer = DeterministicEngine(step, seed=1)
    TraceRecorder(tmp_path / "trace", 2).attach(trainer, {"net": model, "sgd": optimizer})
    trainer.run([torch.ones(1, 2)] * 3)
    record = Trace(tmp_path / "trace").record(2)
    assert Thing("gradient", "net.weight") in record.digests
    assert Thing("loss") in record.digests
    assert Thing("setting", "'lr' of sgd") in record.digests


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_goes_on_in_the_same_file_without_a_gap(tmp_path: Path) -> None:
    traced(tmp_path / "straight")
    path = tmp_path / "resumed"
    for stop in (5, 9, None):
        # Later processes have another seed, and so other weights until they are restored.
        training = build(seed=3 if stop == 5 else 4)
        recorder = TraceRecorder(path, 4)
        recorder.attach(training.trainer, training.to_save)
        trainer = training.trainer
        if stop is not None:
            # After the save of iteration 5 or 9, of which the trace holds all, two more are done.
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop + 2), _fail)
        to_save = {**training.to_save, "trace": recorder}
        run = resume_or_start(trainer, to_save, tmp_path / "run", Events.ITERATION_COMPLETED(
            event_filter=lambda _, iteration: iteration in (5, 9)
        ))  # fmt: skip
        if stop is None:
            training.run()
        else:
            with pytest.raises(RuntimeError, match="power cut"):
                training.run()
        run.checkpoint.wait()
    trace = Trace(path)
    assert [header.after for header in trace.headers] == [0, 5, 9]
    assert trace.iterations == list(range(1, ITERATIONS + 1))
    assert first_difference(Trace(tmp_path / "straight"), trace) is None


def _fail() -> None:
    raise RuntimeError("power cut")


def test_a_new_run_in_the_same_file_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    traced(path, seed=1)
    traced(path, seed=2)
    traced(tmp_path / "alone", seed=2)
    assert first_difference(Trace(path), Trace(tmp_path / "alone")) is None


# ---------------------------------------------------------------- files


def test_a_line_that_was_cut_off_is_left_out_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    traced(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    torn = Trace(path)
    assert torn.torn
    assert torn.iterations == list(range(1, ITERATIONS))
    traced(path)
    assert Trace(path).iterations == list(range(1, ITERATIONS + 1))
    assert not Trace(path).torn


def test_damage_before_the_end_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    traced(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"epoch":1', b'"epoch":2')
    path.write_bytes(b"".join(lines))
    with pytest.raises(TraceError, match="damaged in line 4"):
        Trace(path)


def test_other_files_are_neither_read_nor_written(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    with pytest.raises(TraceError, match="is no trace"):
        Trace(path)
    with pytest.raises(TraceError, match=r"is no trace.*name another file"):
        traced(path)
    assert path.read_text() == "mine\n"
    with pytest.raises(TraceError, match="cannot be read"):
        Trace(tmp_path / "missing")


def test_a_recorder_is_for_one_trainer_and_reads_at_least_each_iteration(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "trace")
    recorder.attach(build().trainer)
    with pytest.raises(ValueError, match="attached already"):
        recorder.attach(build().trainer)
    with pytest.raises(ValueError, match="every_sync"):
        TraceRecorder(tmp_path / "trace", 0)


@needs_xla
def test_on_a_lazy_device_the_host_waits_only_where_the_trace_is_read(tmp_path: Path) -> None:
    reads: list[int] = []
    for every_sync in (1, 6):
        training = build("xla", dropout=0.0)
        TraceRecorder(tmp_path / f"{every_sync}", every_sync).attach(training.trainer)
        backend: Any = training.trainer.backend
        before = backend.counts()["reads"]
        training.run()
        reads.append(backend.counts()["reads"] - before)
    assert reads[0] - reads[1] >= ITERATIONS - 2
    assert first_difference(Trace(tmp_path / "1"), Trace(tmp_path / "6")) is None
