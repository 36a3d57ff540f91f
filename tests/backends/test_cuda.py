"""CUDA: copies to a GPU, its random states, and no hidden wait; `test_conformance.py` has the rest.

Runs where there is a GPU: `tox -e cuda`, which fails where there is none.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_storm import ITERATIONS, results, start
from step_runs import digits

from crosstrain import backends
from crosstrain.backends import BackendError
from crosstrain.backends.legacy import from_arguments
from crosstrain.engine import Events, create_supervised_trainer

pytestmark = pytest.mark.usefixtures("backend_spec")

on_cuda = pytest.mark.backends("cuda")
on_each = pytest.mark.backends("cuda", "cuda:tf32", "cuda-amp", "cuda-amp:bf16")


def make(spec: str, **settings: Any) -> Any:
    backend = backends.get(spec).open()
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **settings)
    backend.prepare(model, optimizer)
    return backend, model, optimizer


def step(backend: Any, model: Any, optimizer: Any, batch: Any) -> Any:
    x, y = backend.put(batch)
    optimizer.zero_grad()
    with backend.autocast():
        loss = torch.nn.functional.cross_entropy(model(x), y)
    backend.backward(loss, optimizer)
    result = backend.step(optimizer, 1.0)
    backend.sync()
    return result


@on_each
def test_a_step_with_a_fused_optimizer_waits_for_nothing(backend_spec: str) -> None:
    backend, model, optimizer = make(backend_spec, fused=True)
    with backend:
        pinned = [(x.pin_memory(), y.pin_memory()) for x, y in digits()[:6]]
        step(backend, model, optimizer, pinned[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [step(backend, model, optimizer, batch) for batch in pinned[1:]]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(result.applied for result in results)


@on_cuda
@pytest.mark.parametrize("pinned", [False, True])
def test_batches_arrive_whole_while_the_gpu_is_busy(pinned: bool) -> None:
    with backends.get("cuda") as backend:
        data = [torch.full((1 << 20,), float(n)) for n in range(20)]
        source = [tensor.pin_memory() for tensor in data] if pinned else data
        busy = torch.randn(2048, 2048, device=backend.device)
        kept = []
        for batch in backend.batches(source):
            for _ in range(4):
                busy = torch.tanh(busy @ busy)
            kept.append(batch + 0)
            del batch
        for number, got in enumerate(kept):
            assert bool((got == number).all()), number


@pytest.mark.backends("cuda", "cuda:tf32")
def test_fp32_rounds_nothing_and_tf32_does(backend_spec: str) -> None:
    tf32 = backend_spec == "cuda:tf32"
    value = 1 + 2.0**-12  # TF32 has 10 bits of mantissa
    with backends.get(backend_spec) as backend:
        a = torch.full((64, 64), value, device=backend.device)
        eye = torch.eye(64, device=backend.device)
        assert (a @ eye == value).all().item() is not tf32
        image = torch.full((8, 16, 16, 16), value, device=backend.device)
        kernel = torch.eye(16, device=backend.device).reshape(16, 16, 1, 1)
        product = torch.nn.functional.conv2d(image, kernel)
        if not tf32:
            assert (product == value).all().item()


@on_cuda
def test_the_random_state_is_the_gpus() -> None:
    with backends.get("cuda") as backend:
        backend.seed(4)
        file = io.BytesIO()
        torch.save(backend.rng_state(), file)
        first = torch.rand(5, device=backend.device)
        file.seek(0)
        backend.set_rng_state(torch.load(file, weights_only=True))
        assert torch.equal(torch.rand(5, device=backend.device), first)
        with pytest.raises(BackendError, match="not of 'cuda'"):
            backend.set_rng_state({"xla": 1})


@on_cuda
def test_a_gpu_that_is_not_there_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(BackendError, match=f"index={count}, but this process sees {count} devices"):
        backends.get("cuda", index=count).open()


@on_cuda
def test_the_index_of_a_device_is_kept() -> None:
    with from_arguments(f"cuda:{torch.cuda.device_count() - 1}", None, False) as backend:
        assert backend.device.index == torch.cuda.device_count() - 1


@on_each
def test_a_graph_of_the_step_has_the_bits_of_the_same_step_called(backend_spec: str) -> None:
    """The same programs run on the emulated device: `tests/training/test_captured.py`."""
    batches = [(torch.randn(16, 64), torch.randint(10, (16,))) for _ in range(7)]
    found: list[Any] = []
    for capture in (True, False):
        backend, model, optimizer = make(backend_spec, fused=True, capturable=True)
        trainer = create_supervised_trainer(
            model,
            optimizer,
            torch.nn.functional.cross_entropy,
            backend=backend,
            max_norm=1.0,
            gradient_accumulation_steps=2,
            capture=capture,
        )
        if not capture:
            for group in optimizer.param_groups:
                group["lr"] = torch.full((), group["lr"], device=backend.device)
        losses: list[float] = []
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e, told=losses: told.append(e.state.output)
        )
        backend.seed(5)
        with backend, backend.deterministic():
            trainer.run(batches, max_epochs=3)
        weights = [value.cpu().tolist() for value in model.state_dict().values()]
        found.append((losses, weights, trainer.state.applied_steps))
    assert found[0] == found[1]


@on_cuda
@pytest.mark.parametrize("kind", ["images", "overflows", "words"])
def test_logical_shards_have_the_same_bits_after_kills(kind: str, tmp_path: Path) -> None:
    """Four shards in one process, under torchrun and so over NCCL: twice, and killed in between."""
    found = []
    for name, kills in (("straight", ()), ("again", ()), ("killed", (5, 11))):
        folder = tmp_path / name
        folder.mkdir()
        for kill_after in (*kills, 0):
            told = ["--kill-after", str(kill_after)] if kill_after else []
            told += ["--save"] if kills else []
            done = start(1, folder, kind, "--device", "cuda", *told)
            assert bool(done.returncode) is bool(kill_after), done.stderr
        found += results(folder, 1, kind)
    straight, again, killed = found
    assert again == straight
    assert killed["digest"] == straight["digest"]
    assert 0 < len(killed["losses"]) < ITERATIONS
    assert killed["losses"] == straight["losses"][-len(killed["losses"]) :]
