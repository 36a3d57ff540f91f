"""Where a checkpoint is: a path on a disk, or a URL in a store, shown without credentials."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.:/-]*)?://")
# A password may hold slashes, as AWS's do; but what is a port is no password.
_USER: Final = re.compile(r"(?<=://)(?![^/@:\s]*:[0-9]+(?:[/\s]|$))[^/@:\s]*:[^@\s]*@")
_QUERY: Final = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")


def without_credentials(text: str) -> str:
    """Returns a text, URLs in which lose what stands before an @ with a password, or behind a ?."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


class StorePath:
    """A place in a store, such as `s3://bucket/run/checkpoint_100.pt`; used like a `pathlib.Path`.

    Credentials that the URL was given with are used to reach the store. They are not in its text or
    its repr, and are left out where it is pickled.

    Args:
        url: the URL.
    """

    __slots__ = ("_base", "_query", "opened")

    def __init__(self, url: str) -> None:
        #: What whoever opens the store keeps here, for all places that come of this one.
        self.opened: dict[int, Any] = {}
        base, _, query = url.partition("?")
        while base.endswith("/") and not base.endswith("://"):
            base = base[:-1]
        self._base = base
        self._query = query

    @property
    def url(self) -> str:
        """All of the URL, credentials too: not to be shown."""
        return self._base + (f"?{self._query}" if self._query else "")

    @property
    def protocol(self) -> str:
        """What stands before `://`."""
        return self._base.partition("://")[0].rpartition("::")[2]

    @property
    def secrets(self) -> tuple[str, ...]:
        """What nobody is shown: the user, the password, and the values behind a ?."""
        found = _USER.search(self._base)
        user = found.group().removesuffix("@") if found else ""
        values = [pair.partition("=")[2] for pair in self._query.split("&")]
        parts = [user, *user.split(":", 1), self._query, *values]
        parts += [unquote(part) for part in parts]
        return tuple(sorted({part for part in parts if len(part) > 2}, key=len, reverse=True))

    def hide(self, text: str) -> str:
        """Returns a text without what nobody is shown."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return without_credentials(text)

    @property
    def name(self) -> str:
        """The last part, without what nobody is shown."""
        return str(self).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> StorePath:
        """The folder that it is in."""
        return self._with(self._base.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> StorePath:
        """Returns the place of the same name with another ending."""
        return self.parent / Path(self.name).with_suffix(suffix).name

    def absolute(self) -> StorePath:
        """Returns itself: a URL is never relative."""
        return self

    def _with(self, base: str) -> StorePath:
        made = StorePath(base + (f"?{self._query}" if self._query else ""))
        made.opened = self.opened
        return made

    def __truediv__(self, name: str) -> StorePath:
        """Returns the place of a name in it."""
        return self._with(f"{self._base}{'' if self._base.endswith('/') else '/'}{name}")

    def __fspath__(self) -> str:
        """Returns the URL without credentials, for functions that take a path or its text."""
        return str(self)

    def __str__(self) -> str:
        return without_credentials(self._base)

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self) -> tuple[type[StorePath], tuple[str]]:
        return StorePath, (str(self),)


#: Where a folder or a checkpoint is.
Location = Path | StorePath


def location_of(value: str | os.PathLike[str]) -> Location:
    """Returns where a path, or a URL, leads.

    Args:
        value: a path, in which `~` is the home folder, or a URL as fsspec has them.
    """
    if isinstance(value, StorePath):
        return value
    text: Any = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError(f"a path should be text, got {text!r}; os.fsdecode turns bytes into text")
    return StorePath(text) if _URL.match(text) else Path(value).expanduser()
