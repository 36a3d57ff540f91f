"""The conformance checks: one function for each promise of the step protocol."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from crosstrain.backends import Availability, Backend, UnknownBackend, World

from .case import Case, error_of, expect, expect_flags, flags
from .data import check_batches, check_put, check_put_is_exact
from .state import (
    check_checkpoint,
    check_deterministic_flags,
    check_deterministic_results,
    check_host_streams,
    check_random_states,
    check_resume,
    check_scale_is_not_dropped,
    check_state_is_portable,
)
from .steps import (
    check_accumulation,
    check_agreement,
    check_autocast,
    check_clipping,
    check_missing_gradient,
    check_overflow,
    check_prepare,
    check_step_result,
    check_two_optimizers,
)


@dataclass(frozen=True)
class Check:
    """One promise of the protocol, as a function that raises where it is not kept.

    Args:
        computes: whether it needs a backend that runs arithmetic.
        scales: whether it needs a backend that scales the loss.
    """

    run: Callable[[Case], None]
    computes: bool = False
    scales: bool = False

    @property
    def promise(self) -> str:
        """What is promised, in a line."""
        return (self.run.__doc__ or "").splitlines()[0]


def check_declaration(case: Case) -> None:
    """It says its name, options, capabilities and device, and has every method."""
    kind = case.kind
    for name, member in vars(Backend).items():
        if (callable(member) or isinstance(member, classmethod)) and not name.startswith("_"):
            expect(callable(getattr(kind, name, None)), f"It has no method {name}().")
    options: Any = getattr(kind, "options", None)
    expect(
        type(options) is tuple and options and {type(word) for word in options} == {str},
        f"options is {options!r}; it is a tuple of at least one word, the first the default.",
    )
    backend = case.new()
    expect(
        isinstance(backend, Backend), "It is no crosstrain.backends.Backend: a member is missing."
    )
    expect(backend.name and isinstance(backend.name, str), f"name is {backend.name!r}, not a word.")
    expect(
        backend.option == case.option,
        f"It was made with option {case.option!r} and says {backend.option!r}.",
    )
    expect(
        isinstance(backend.device, torch.device),
        f"device is {backend.device!r}, which is no torch.device.",
    )
    capabilities: Any = backend.capabilities
    expect(
        isinstance(capabilities, frozenset),
        f"capabilities is {capabilities!r}, which is no frozenset of words.",
    )


def check_options(case: Case) -> None:
    """It takes each of its options, and refuses any other with UnknownBackend."""
    expect(
        case.kind().option == case.kind.options[0],
        "Made with no option, it does not take the first of its options.",
    )
    error = error_of(
        lambda: case.kind("no-such-option"),
        "It takes the option 'no-such-option', which it does not declare.",
    )
    if not isinstance(error, UnknownBackend):
        raise error
    expect(
        all(option in str(error) for option in case.kind.options),
        f"Its error about an unknown option does not name the legal ones: {error}",
    )


def _accelerated() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def check_probe(case: Case) -> None:
    """Its probe answers, the same each time, and changes nothing."""
    before, accelerated = flags(), _accelerated()
    host = torch.get_rng_state()
    first, second = case.kind.probe(), case.kind.probe(case.option)
    expect(isinstance(first, Availability), f"probe() returned {type(first).__name__}.")
    expect(first.ok == second.ok, "Two probes, one after the other, do not agree.")
    if first.ok:
        expect(first.versions, "It is available, but names no version of any library.")
        expect(not first.reason, f"It is available, but gives a reason why not: {first.reason}")
    else:
        expect(
            first.reason and first.remedy, "It is not available, but lacks a reason or a remedy."
        )
    expect(flags() == before, "probe() changed a flag, a variable, or started a thread.")
    expect(_accelerated() == accelerated, "probe() started the accelerator.")
    expect(torch.equal(torch.get_rng_state(), host), "probe() drew random numbers.")


def check_opening(case: Case) -> None:
    """It opens and closes any number of times, and leaves the flags as they were."""
    before = {**flags(), **case.at_start}
    made = case.new()
    expect_flags(before, "Making it changed")
    for _ in range(2):
        expect(made.open() is made, "open() does not return the backend.")
        expect(made.open() is made, "open() on an open backend does not return it.")
        world: Any = made.world
        expect(isinstance(world, World), f"world is {world!r}, which is no World.")
        expect((world.rank, world.size) == (0, 1), f"Alone, its world is {world}.")
        made.close()
        made.close()
        expect_flags(before, "close() did not restore")
    with case.new() as entered:
        expect(isinstance(entered, Backend), "As a context manager it does not give the backend.")


def check_mistaken_world(case: Case) -> None:
    """It does not open where torchrun's variables contradict each other."""
    os.environ.update({"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "2"})

    def opening() -> None:
        with case.opened():
            pass

    error = error_of(
        opening, "It opens as rank 3 of 2: read the world with World.from_environment()."
    )
    expect("WORLD_SIZE" in str(error), f"Its error does not name WORLD_SIZE: {error}")


# Every check by name, in the order in which they run.
CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "declaration": Check(check_declaration),
        "options": Check(check_options),
        "probe": Check(check_probe),
        "opening": Check(check_opening),
        "mistaken_world": Check(check_mistaken_world, computes=True),
        "put": Check(check_put),
        "put_is_exact": Check(check_put_is_exact),
        "batches": Check(check_batches),
        "prepare": Check(check_prepare),
        "autocast": Check(check_autocast),
        "step_result": Check(check_step_result),
        "agreement": Check(check_agreement, computes=True),
        "accumulation": Check(check_accumulation, computes=True),
        "clipping": Check(check_clipping, computes=True),
        "missing_gradient": Check(check_missing_gradient, computes=True),
        "two_optimizers": Check(check_two_optimizers, computes=True),
        "overflow": Check(check_overflow, computes=True, scales=True),
        "deterministic_flags": Check(check_deterministic_flags),
        "deterministic_results": Check(check_deterministic_results, computes=True),
        "random_states": Check(check_random_states, computes=True),
        "host_streams": Check(check_host_streams),
        "portable_state": Check(check_state_is_portable),
        "resume": Check(check_resume, computes=True),
        "checkpoint": Check(check_checkpoint, computes=True),
        "scale_is_not_dropped": Check(check_scale_is_not_dropped, computes=True, scales=True),
    }
)
