"""What the reference shows of attributes: comments that begin with `#:`, and members of events."""

from __future__ import annotations

from typing import Any

import griffe

MARK = "#:"


class Comments(griffe.Extension):
    """Takes the `#:` comments above an attribute for its docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Gives an attribute without a docstring the one that stands above it, or its value."""
        if attr.docstring is not None or attr.lineno is None or attr.parent is None:
            return
        lines = attr.lines_collection[attr.filepath]
        first = attr.lineno - 1
        while first > 0 and lines[first - 1].strip().startswith(MARK):
            first -= 1
        above = lines[first : attr.lineno - 1]
        said = " ".join(line.strip().removeprefix(MARK).strip() for line in above)
        owner = attr.parent
        if not said and isinstance(owner, griffe.Class) and "EventEnum" in map(str, owner.bases):
            said = f"Its value is `{attr.value}`."
        if said:
            attr.docstring = griffe.Docstring(said, lineno=first + 1, parent=attr)
