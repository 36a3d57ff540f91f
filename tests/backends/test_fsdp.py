"""FSDP2: sharded models train as whole ones do, in one, two and four processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import results, run_program, run_world

from crosstrain.backends import BackendError, UnknownBackend, get
from crosstrain.backends.fsdp import Sharding
from crosstrain.engine import Events, create_supervised_trainer
from crosstrain.engine.training import gradients


def close(mine: Any, theirs: Any, rel: float = 1e-12, absolute: float = 1e-12) -> bool:
    return all(
        a == pytest.approx(b, rel=rel, abs=absolute) for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.slow
def test_sharded_models_train_as_whole_ones(tmp_path: Path) -> None:
    """Weights, norms and loss scales are those of one process and of DDP; the parts are parts."""
    run_program("fsdp_program.py", str(tmp_path))
    for size in (2, 4):
        run_world(size, "fsdp_program.py", str(tmp_path))
    (alone,) = results(tmp_path, 1)
    for size in (1, 2, 4):
        told = results(tmp_path, size)
        for one in told:
            for name in ("mlp cpu", "mlp cpu:fsdp", "mlp no_sync", "mlp kept"):
                assert close(one[name]["weights"], alone["mlp cpu"]["weights"]), (size, name)
                assert one[name]["norms"] == pytest.approx(alone["mlp cpu"]["norms"], rel=1e-12)
            for name in ("tied cpu", "tied cpu:fsdp"):
                assert close(one[name]["weights"], alone["tied cpu"]["weights"]), (size, name)
                assert one[name]["tied"]
            assert one["mlp cpu:fsdp"]["blocks"] == ["", "0", "2", "3"]
            assert one["tied cpu:fsdp"]["blocks"] == ["", "encoder.layers.0", "encoder.layers.1"]
            # The overflow was in the first rank's gradients, and no rank applied them.
            assert one["fsdp-fp16"]["applied"] == told[0]["fsdp-fp16"]["applied"]
            assert one["fsdp-fp16"]["applied"][1:] == [False, True]
            assert one["fsdp-fp16"]["scale"] == told[0]["fsdp-fp16"]["scale"]
            assert one["fsdp-fp16"]["dtypes"] == ["torch.float16", "torch.float32"]
            assert one["fsdp-bf16"]["dtypes"] == ["torch.bfloat16", "torch.float32"]
            assert one["policy"] == ["", "3"]
            assert one["own"] == ["", "0"]
            assert one["own stepped"]
            assert "on the device 'meta'" in one["meta"]
            if size > 1:
                assert "The Linear of rank 1 has other parameters" in one["differs"]
        # Each parameter is in one process only.
        assert sum(one["mlp cpu"]["parts"] for one in told) == size * 73
        assert sum(one["mlp cpu:fsdp"]["parts"] for one in told) == 73


def test_options_say_what_shards() -> None:
    """The spec chooses; what does not fit is an error that names the options."""
    assert get("cpu:fsdp-bf16").option == "fsdp-bf16"
    with pytest.raises(UnknownBackend, match=r"Did you mean 'cpu:fsdp'"):
        get("cpu:fsd")
    with pytest.raises(BackendError, match=r"'cpu:bf16', which does not shard.*fsdp, fsdp-bf16"):
        get("cpu:bf16", sharding=Sharding())
    model = torch.nn.Linear(2, 1)
    with pytest.raises(BackendError, match=r"'cpu:fsdp' has to be opened before it shards"):
        get("cpu:fsdp").prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_optimizer_keeps_its_state_when_its_model_is_sharded() -> None:
    """An optimizer that has stepped before it is prepared goes on from there."""

    def step(model: Any, optimizer: Any) -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found: list[list[Any]] = []
    for spec in ("cpu", "cpu:fsdp"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        step(model, optimizer)
        with get(spec) as backend:
            model, optimizer = backend.prepare(model, optimizer)
            step(model, optimizer)
            whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
            found.append([value.tolist() for value in whole])
    assert found[0] == found[1]


def test_gradients_in_a_window_are_saved_or_refused() -> None:
    """Whole in the state, parts in the model; where torch hides them, an error says so."""
    for no_sync in (False, True):
        with get("cpu:fsdp", sharding=Sharding(no_sync=no_sync)) as backend:
            model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model, optimizer = backend.prepare(model, optimizer)
            with backend.accumulating(model):
                backend.backward(model(torch.ones(1, 2)).sum(), optimizer)
            if no_sync:
                with pytest.raises(ValueError, match=r"no_sync=True\) FSDP keeps them to itself"):
                    gradients.capture([model], [optimizer])
                continue
            found = gradients.capture([model], [optimizer])
            assert all(type(value) is torch.Tensor for value in found.values())
            optimizer.zero_grad()
            gradients.restore(found, gradients.named_by_place([model], [optimizer]))
            weight = model[0].weight
            assert type(weight.grad) is type(weight)
            assert torch.equal(weight.grad.full_tensor(), found["model.0.weight"])


@pytest.mark.parametrize("no_sync", [False, True])
def test_window_that_a_run_cuts_short_is_stepped_or_refused(no_sync: bool) -> None:
    """Stepped with its own size; where torch hides its gradients, an error says what to change."""
    torch.manual_seed(1)
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with get("cpu:fsdp", sharding=Sharding(no_sync=no_sync)) as backend:
        trainer = create_supervised_trainer(
            model,
            optimizer,
            torch.nn.functional.mse_loss,
            gradient_accumulation_steps=4,
            backend=backend,
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate)
        data = [(torch.ones(1, 2), torch.zeros(1, 2))] * 8
        if no_sync:
            with pytest.raises(BackendError, match=r"no_sync=True\), FSDP keeps the gradients"):
                trainer.run(data)
        else:
            assert vars(trainer.run(data))["optim_steps"] == 1
