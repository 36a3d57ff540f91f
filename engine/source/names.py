"""What functions and methods do, by their names: the one table of it.

A name is all that the source shows of a call, and each of these does the same in every library that
trains. What has none of these names may do anything.
"""

from __future__ import annotations

import re
from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: What changes a collection and does not look at it.
WRITES: Final = _words(
    "__setitem__ add append appendleft clear extend insert update write writerow"
)
#: What changes a collection and depends on what it holds, or takes something away.
TAKES: Final = _words(
    "difference_update discard intersection_update pop popitem popleft remove resize reverse"
    " rotate sort symmetric_difference_update"
)
#: What shows what it is given.
SHOWS: Final = _words(
    "add_figure add_histogram add_image add_scalar add_scalars add_text debug dump dumps error"
    " flush info log log_metrics print set_description set_description_str set_postfix"
    " set_postfix_str warning write writeheader writerow writerows"
)
#: What makes a collection of Python's.
COLLECTIONS: Final = _words("OrderedDict defaultdict deque dict list set")
#: What gives a value that follows from its arguments and its object, and changes neither.
PURE: Final = COLLECTIONS | _words(
    "DictWriter abs all any array as_tensor asarray bool ceil clone copy cpu deepcopy detach"
    " divmod dumps enumerate exp float floor format get int isfinite isinstance isnan isoformat"
    " item items join keys len ljust max mean median min monotonic now numel numpy parameters"
    " perf_counter pow process_time range repr replace reversed rjust round rstrip size sorted"
    " split sqrt state_dict std str strftime strip sum tensor time time_ns timedelta tolist"
    " total_seconds tuple upper values var zip"
)
#: What may read any attribute, or any variable.
OF_ALL: Final = ("asdict", "getattr", "vars")
DARK: Final = frozenset({"eval", "exec", "globals", "locals"})
#: What gives the thing itself that it is called of, or an item of it.
COPIES: Final = frozenset({"__getitem__", "get", "getattr"})
#: What tells a size.
SIZES: Final = _words("device dtype len ndim numel shape size")
#: What says something, or registers what is in a state, and writes to nothing else.
SAYS: Final = _words("debug info log print register_buffer warn warning")
#: Modules whose functions make something new.
MAKING_MODULES: Final = _words("F collections itertools math np numpy torch")
#: What draws from a generator that all share, or sets one, or does a training's work.
DRAWS: Final = re.compile(
    "bernoulli|choice|dropout|exponential|multinomial|normal|perm|poisson|rand|sample|seed|shuffle"
    "|uniform|rng|^step$|zero_grad|backward|load_state|^next$|^apply$|^exec$|^eval$|setattr|delattr"
)
#: Made with a state of their own, they draw from nothing else.
OWN_DRAWS: Final = frozenset({"default_rng", "RandomState"})
#: What registers a hook.
HOOK: Final = re.compile("^register_.*hook$")


def is_in_place(name: str) -> bool:
    """Tells whether a method is named as those that change a tensor."""
    return name.endswith("_") and not name.endswith("__")
