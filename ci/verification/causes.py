"""What usually makes a resumed run differ, and what to do, by the first thing that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

Status = Literal["exact", "not exact", "not repeatable"]

_EPOCH_HANDLER: Final = (
    "A handler of EPOCH_STARTED makes what the epoch's data is drawn from, such as negatives or a "
    "subset, and does so otherwise in a process that goes on within the epoch. Make it from "
    "trainer.state.epoch alone, or give it state_dict and load_state_dict and name it in to_save."
)
_SAMPLER: Final = (
    "A sampler counts its own epochs, or goes on from where its last pass ended, and begins anew "
    "in a new process. Give it set_epoch(epoch), or state_dict and load_state_dict."
)
_ELSEWHERE: Final = (
    "The loader, or its generator, is used outside the training as well, such as for an evaluation "
    "at the epoch's end. Make a loader of its own for that, with another generator."
)

# What it changes a little may show in a gradient before it shows in the loss.
_OUTSIDE: Final = (
    "The model, or the loss function, has state outside its state_dict: a plain attribute, a "
    "buffer with persistent=False, a counter, a generator. Register it as a buffer, or give the "
    "object state_dict and load_state_dict and name it in to_save. So it is with what "
    "prepare_batch or a handler of EPOCH_STARTED keeps."
)

_RESUMED: Final = MappingProxyType(
    {
        "batch": (
            _EPOCH_HANDLER,
            (
                "The dataset, a transform or a collate_fn keeps a generator or a counter of its "
                "own, which begins anew in a new process. Draw from the global generators, or from "
                "crosstrain.engine.current_sample()."
            ),
            (
                "The data itself is drawn from the global generators when the training is built, "
                "so another seed makes other data. Draw it from a generator with a fixed seed."
            ),
            _SAMPLER,
            _ELSEWHERE,
        ),
        "batch of a later epoch": (
            _SAMPLER,
            _ELSEWHERE,
            (
                "The dataset keeps a generator or a counter of its own, which begins anew in a new "
                "process. Draw from the global generators, or from "
                "crosstrain.engine.current_sample()."
            ),
            _EPOCH_HANDLER,
        ),
        "random": (
            (
                "A handler seeds the global generators from something that is not saved, such as a "
                "number that was drawn, or counted, in its own process. Do not reseed: the trainer "
                "sees to the random states."
            ),
            (
                "A handler draws from them more or less often than in the straight run, because it "
                "counts its calls or looks at the time. Wrap it in "
                "crosstrain.engine.keep_random_state."
            ),
        ),
        "setting": (
            "A scheduler was not saved. Name it in to_save.",
            (
                "A handler changes the optimizer's settings by a counter of its own. Compute them "
                "from trainer.state.iteration, or save the counter."
            ),
        ),
        "loss": (
            _OUTSIDE,
            (
                "The step draws from a second loader, or from an iterator, which begins anew in a "
                "new process. Wrap it as docs/resume_checks.md says, and name it in to_save."
            ),
            (
                "The model draws random numbers from a generator of its own. Use the global one, "
                "or name an object in to_save whose state_dict has the generator's state."
            ),
        ),
        "gradient": (
            (
                "What is trained or frozen was changed by a handler that the resumed run does not "
                "call again, such as one with once=2. Do it in a handler of EPOCH_STARTED, by "
                "trainer.state.epoch."
            ),
            (
                "A backward hook, or the backward pass of a function of your own, has state that "
                "is not saved. Put it into a buffer of the model."
            ),
            _OUTSIDE,
        ),
        "parameter": (
            (
                "A handler changes the weights by what is not saved: noise from a generator of its "
                "own, an average, a counter. Give it state_dict and load_state_dict, and name it "
                "in to_save."
            ),
            "The optimizer has state outside its state_dict.",
        ),
        "buffer": (
            "A handler, or the forward pass, computes the buffer from what is not saved.",
            "The buffer was registered with persistent=False and is not saved.",
        ),
        "missing": (
            (
                "A handler that ends the run, such as early stopping, was not saved. Name it in "
                "to_save."
            ),
        ),
    }
)

_ANEW: Final = MappingProxyType(
    {
        "batch": (
            (
                "The dataset, a transform or a collate_fn has a generator of its own that nobody "
                "seeds, such as numpy.random.default_rng(). Draw from the global generators, or "
                "from crosstrain.engine.current_sample()."
            ),
            "The order of the samples comes from a set, from os.listdir or from the time. Sort it.",
        ),
        "random": (
            (
                "Something seeds the global generators from the time or the process, or draws from "
                "them more or less often in each run: a thread, or code that looks at the time. "
                "Take that out, or wrap the handler in crosstrain.engine.keep_random_state."
            ),
        ),
        "setting": (
            "A handler sets it by the time, or by a measurement that is not the same each time.",
        ),
        "loss": (
            (
                "The forward pass is not deterministic: a kernel of your own, code outside torch, "
                "threads that add in the order in which they end, or a generator that nobody "
                "seeds."
            ),
            "The weights were initialised by a generator that nobody seeds.",
        ),
        "gradient": (
            (
                "The backward pass is not deterministic: a kernel or an autograd.Function of your "
                "own that adds in no fixed order, or depends on the time. torch's own operations "
                "raise an error there, unless the trainer was made with warn_only=True."
            ),
        ),
        "parameter": (
            (
                "A handler, or the optimizer, changes the weights by a generator that nobody "
                "seeds, or by code that is not deterministic."
            ),
        ),
        "buffer": (
            (
                "The forward pass or a handler writes it by code that is not deterministic, or "
                "draws from a generator that nobody seeds."
            ),
        ),
        "missing": ("A handler ends the run by the time, or by a measurement.",),
    }
)


def causes(
    status: Status,
    kind: str | None,
    epoch_began: bool,
    traits: Mapping[str, Sequence[str]],
) -> tuple[str, ...]:
    """Returns what usually causes a difference, and what to do about it, the likeliest first.

    Args:
        status: of the verdict, which is not exact.
        kind: the kind of the first thing that differs (see `Thing`); None for a missing iteration.
        epoch_began: whether an epoch has begun between the resume and the difference.
        traits: what the training has of its own that may hold state, by kind (see `traits_of`).
    """
    kind = kind and kind.removesuffix(" after")
    if status == "not repeatable":
        return _ANEW[kind or "missing"]
    if kind == "batch" and epoch_began:
        kind = "batch of a later epoch"
    known = _RESUMED[kind or "missing"]
    here = {
        _EPOCH_HANDLER: traits.get("epoch handlers", ()),
        _SAMPLER: traits.get("samplers", ()),
        _OUTSIDE: traits.get("attributes", ()) if kind == "loss" else (),
    }
    # A handler that is not there causes nothing.
    known = tuple(one for one in known if one != _EPOCH_HANDLER or here[one])
    # What the training has comes before what it may have.
    known = tuple(sorted(known, key=lambda one: not here.get(one)))
    return tuple(
        f"{one} Here: {', '.join(names)}." if (names := here.get(one)) else one for one in known
    )
