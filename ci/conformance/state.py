"""Conformance of what a backend keeps: flags, random states, and the state that a resume needs."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import torch

from crosstrain.backends import Backend, random_state
from crosstrain.engine import Events, create_supervised_trainer, resume_or_start

from .case import (
    LEARNING_RATE,
    SCALING,
    Case,
    Training,
    batch_of,
    expect,
    expect_error_passes,
    expect_flags,
    expect_refusal,
    flags,
    loss_of,
    small_model,
    through_a_file,
)


def check_deterministic_flags(case: Case) -> None:
    """Its deterministic context restores every flag that it sets, and sets none before."""
    with case.opened() as backend:
        before = flags()
        for warn_only in (False, True):
            context = backend.deterministic(warn_only=warn_only)
            expect(flags() == before, "deterministic() sets flags before it is entered.")
            with context:
                pass
            expect_flags(before, "deterministic() did not restore")
            expect_error_passes(backend.deterministic(warn_only=warn_only), "deterministic")
            expect_flags(before, "deterministic() did not restore after an error")


def _seed(backend: Backend, value: int) -> None:
    """Seeds everything, right after a boundary."""
    backend.sync()
    random_state.seed(value)
    backend.seed(value)


def _train(case: Case, steps: int) -> tuple[list[float], torch.Tensor]:
    with case.opened() as backend, backend.deterministic():
        training = Training(backend, small_model())
        _seed(backend, 5)
        return training.losses(0, steps), training.weights()


def check_deterministic_results(case: Case) -> None:
    """Two runs from the same seeds, with dropout and batch norm, give the same bits."""
    losses, weights = _train(case, 8)
    again, weights_again = _train(case, 8)
    _expect_same(losses, again, 0, "Two runs part")
    expect(torch.equal(weights, weights_again), "Two runs end with different weights.")


def _expect_same(losses: list[float], again: list[float], first: int, problem: str) -> None:
    same = [a == b for a, b in zip(losses, again, strict=True)]
    step = first + (*same, False).index(False)
    expect(all(same), f"{problem} at step {step}: the losses differ.")


def _draw(backend: Backend) -> torch.Tensor:
    """Draws a dropout mask on the device, and ends the step."""
    ones = backend.put(torch.ones(64))
    mask = torch.nn.functional.dropout(ones, 0.5, training=True).cpu()
    backend.sync()
    return mask


def check_random_states(case: Case) -> None:
    """Its random states, with the host's, repeat what the device draws; so do its seeds."""
    with case.opened() as backend:
        _seed(backend, 7)
        first = _draw(backend)
        host, device = random_state.capture(), through_a_file(backend.rng_state())
        expected = [_draw(backend), _draw(backend)]
        expect(not torch.equal(*expected), "Two draws in a row are the same.")
        random_state.restore(host)
        backend.set_rng_state(device)
        found = [_draw(backend), _draw(backend)]
        expect(
            all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)),
            "After set_rng_state(rng_state()) the device draws other numbers.",
        )
        _seed(backend, 7)
        expect(torch.equal(_draw(backend), first), "After the same seed() the device draws others.")
        _seed(backend, 8)
        expect(not torch.equal(_draw(backend), first), "Another seed() changes nothing.")
        _check_reading(backend)


def _check_reading(backend: Backend) -> None:
    _seed(backend, 9)
    first = _draw(backend)
    _seed(backend, 9)
    for _ in range(3):
        backend.rng_state()
        backend.state_dict()
    expect(
        torch.equal(_draw(backend), first), "Reading rng_state() or state_dict() moves the stream."
    )


def _host_bytes() -> bytes:
    file = io.BytesIO()
    torch.save(random_state.capture(), file)
    return file.getvalue()


def check_host_streams(case: Case) -> None:
    """It draws nothing from the generators of the host, which belong to the data."""
    with case.opened() as backend:
        random_state.seed(3)
        before = _host_bytes()
        training = Training(backend)
        for batch in backend.batches([batch_of(0), batch_of(1)]):
            backend.put(batch)
        training.step(0)
        backend.rng_state()
        backend.state_dict()
        with backend.deterministic():
            backend.sync()
        expect(
            _host_bytes() == before,
            "Something that it does draws from Python's, NumPy's or torch's generator on the host.",
        )


def check_state_is_portable(case: Case) -> None:
    """Its states are plain values on the CPU, which load safely and come back as they were."""
    with case.opened() as backend:
        training = Training(backend)
        training.step(0)
        state = through_a_file(backend.state_dict())
        through_a_file(backend.rng_state())
    with case.opened() as backend:
        Training(backend)
        backend.load_state_dict(state)
        found = backend.state_dict()
        expect(
            repr(found) == repr(state),
            f"load_state_dict() was given {state!r}, and state_dict() gives {found!r}.",
        )


def check_resume(case: Case) -> None:
    """A run that is saved, loaded into new objects and continued keeps its bits."""
    for cut in (1, 3):
        with case.opened() as backend, backend.deterministic():
            training = Training(backend, small_model())
            _seed(backend, 5)
            training.losses(0, cut)
            if SCALING in backend.capabilities:
                training.step(0, factor=float("inf"))
            state = through_a_file(training.state())
            expected, weights = training.losses(cut, 6), training.weights()
        with case.opened() as backend, backend.deterministic():
            resumed = Training(backend, small_model())
            _seed(backend, 99)
            resumed.load(state)
            found = resumed.losses(cut, 6)
            _expect_same(expected, found, cut, f"Stopped after step {cut}, the resumed run parts")
            expect(
                torch.equal(resumed.weights(), weights), "The resumed run ends with other weights."
            )


def check_checkpoint(case: Case) -> None:
    """A run writes a checkpoint file that loads safely, and another goes on from it."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        straight = _run(case, Path(folder, "straight"), 2)
        _run(case, Path(folder, "run"), 1)
        found = _run(case, Path(folder, "run"), 2)
    expect(
        found == straight[2:],
        f"Resumed from a file after 2 of 4 steps, its losses are {found}, and not {straight[2:]}.",
    )


def _run(case: Case, folder: Path, epochs: int) -> list[float]:
    """Trains two steps an epoch, from the folder's checkpoint if there is one; returns losses."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    with case.opened() as backend, random_state.preserved():
        trainer = create_supervised_trainer(
            model, optimizer, loss_of, backend=backend, deterministic=True
        )
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: losses.append(float(trainer.state.output))
        )
        objects = {"model": model, "optimizer": optimizer}
        resume_or_start(trainer, objects, folder, every=1, background=False)
        trainer.run([batch_of(0), batch_of(1)], max_epochs=epochs)
    return losses


def check_scale_is_not_dropped(case: Case) -> None:
    """It refuses a state without a loss scale, rather than to make one up."""
    with case.opened() as backend:
        Training(backend)
        expect_refusal(
            lambda: backend.load_state_dict({}),
            "a missing loss scale",
            "It scales the loss, but loads a state that holds no loss scale.",
        )
