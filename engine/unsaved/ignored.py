"""Names that a user has asked not to be told of, one by one: `Checks(ignored=[...])`.

A name is given in the form in which a warning has it. It stands for what it names and for all that
lies in it: `the step, its 'env'` for `the step, its 'env.clock.ticks'`, too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Final

# What was found, and after it what it is, or why it could not be looked into.
_REMARK: Final = re.compile(r"(, its (['\"]).*?\2) \(.*\)$")
# Of so many in one variable it is the variable that is named.
_MANY: Final = 4
_SHOWN: Final = 8


def is_ignored(what: str, ignored: Iterable[str]) -> bool:
    """Tells whether one of some names is that of what was found, or of something it lies in."""
    return any(_covers(_plain(name), _plain(what)) for name in ignored)


def check_ignored(ignored: Collection[str], known: Iterable[str]) -> None:
    """Refuses names that nothing has.

    Args:
        ignored: what the user has given.
        known: what may be told of in this run, changed or not.

    Raises:
        ValueError: with the names that are most like it.
    """
    there = [*dict.fromkeys(map(to_ignore, known))]
    plain = [*map(_plain, there)]
    for name in ignored:
        own = _plain(name)
        # What lies in a variable may come later, and so may what its owner is told of as added.
        outer = (one for one in plain if one.endswith("'") or ", its " not in own)
        if not (any(_covers(own, one) for one in plain) or any(_covers(one, own) for one in outer)):
            like = difflib.get_close_matches(name, there, _SHOWN, 0.0)
            raise ValueError(
                f"Checks(ignored=[{name!r}]) names nothing that this run uses, so a thing that it "
                "was meant for would be told of, and another might not be. Take it from the "
                "warning, or leave it out. Most like it: " + "; ".join(map(repr, like))
            )


def to_ignore(what: str) -> str:
    """Returns the name by which something that was found is ignored."""
    return _REMARK.sub(r"\1", what)


def to_ignore_all(found: Iterable[str]) -> list[str]:
    """Returns names by which all that was found is ignored; of much in one variable, its own."""
    names = [*dict.fromkeys(map(to_ignore, found))]
    roots = [_root(name) for name in names]
    return [
        *dict.fromkeys(
            root if roots.count(root) >= _MANY else name
            for name, root in zip(names, roots, strict=True)
        )
    ]


def _root(name: str) -> str:
    """Returns the name of the variable that something lies in."""
    owner, its, used = name.rpartition(", its ")
    variable = re.match(r"['\"](\w+)[.\[]", used)
    return f"{owner}{its}'{variable[1]}'" if variable else name


def _covers(name: str, what: str) -> bool:
    if name == what or what.startswith((f"{name},", f"{name} (")):
        return True
    # What lies in a variable stands inside its quotation marks.
    inner = name.removesuffix("'")
    return inner != name and what.startswith((f"{inner}.", f"{inner}["))


def _plain(name: str) -> str:
    # Python puts a name that has marks of one kind into those of the other.
    return name.replace('"', "'")
