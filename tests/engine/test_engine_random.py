"""Random programs, drawn by hypothesis, leave the same trace on ours and on pytorch-ignite.

What is left out of the draw are the deliberate differences, each of which has its own test in
`test_engine_deviations.py`:

- data that is used up before the run ends (`iterator` and `endless` never are);
- `max_iters` with an epoch length that is not known;
- an exception dealt with while the epoch length is not known;
- a higher limit after that, or after a run whose epochs were ended early;
- what follows an interruption at DATALOADER_STOP_ITERATION;
- a run after one that an exception has ended;
- a state loaded when nothing is left to do, or together with new data.
"""

from __future__ import annotations

from differential import EVENTS, same
from engine_programs import DATA, REQUESTS, Action, Program
from hypothesis import given, settings
from hypothesis import strategies as st

PLACES = (*(event for event in EVENTS if event != "EXCEPTION_RAISED"), "step", "fetch")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    data = draw(st.sampled_from(DATA))
    length = draw(st.none() | st.integers(1, 5))
    if length is None and data in ("none", "endless", "iterator"):
        length = 3
    unknown = length is None and data == "unsized"
    limits = {} if length is None else {"epoch_length": length}
    limit = draw(st.sampled_from(("max_epochs",) if unknown else ("max_epochs", "max_iters")))
    limits[limit] = draw(st.integers(1, 4)) * (1 if limit == "max_epochs" else 3)
    errors = draw(
        st.sampled_from(("none", "same", "other") if unknown else ("none", "deal", "same", "other"))
    )
    whats = (*REQUESTS, *REQUESTS, "raise", "stop", "swap", "attach", "detach")
    actions = draw(
        st.lists(
            st.builds(Action, st.sampled_from(PLACES), st.integers(1, 7), st.sampled_from(whats)),
            max_size=5,
        )
    )
    # No handler of ours is in the step or in the data.
    actions = [a for a in actions if a.what != "detach" or a.at in EVENTS]
    whats_left = {action.what for action in actions}
    calls: tuple[str, ...] = ("", *REQUESTS, "reset", "more")
    calls += (draw(st.sampled_from(("swap", "fresh"))),)
    if "swap" in whats_left:
        calls = tuple(call for call in calls if call != "fresh")
    return Program(
        data=data,
        size=draw(st.integers(1, 4)),
        limits=tuple(sorted(limits.items())),
        actions=tuple(actions),
        calls=()
        if whats_left & {"raise", "stop"}
        else tuple(draw(st.lists(st.sampled_from(calls), max_size=4))),
        errors=errors,
        watch=tuple(EVENTS if draw(st.booleans()) else draw(st.sets(st.sampled_from(EVENTS)))),
    )


@settings(max_examples=400, derandomize=True)
@given(programs())
def test_a_random_program_leaves_the_same_trace(program: Program) -> None:
    same(program, program.watch)
