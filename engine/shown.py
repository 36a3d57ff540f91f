"""Texts that others chose, such as names of files, as they are told: no terminal obeys them."""

from __future__ import annotations


def shown(text: object) -> str:
    """Returns a text in one line, in which what cannot be printed is escaped.

    That is what moves a terminal's cursor, colours or titles, what ends a line of a log, what turns
    the direction of writing, and bytes of a name that are no UTF-8.
    """
    told = str(text)
    return told if told.isprintable() else "".join(map(_escaped, told))


def harmless(text: object) -> str:
    """Returns what `shown` does, of a text that may have several lines."""
    return "\n".join("\t".join(map(shown, line.split("\t"))) for line in str(text).split("\n"))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    number = ord(character)
    # A byte that Python has not been able to decode.
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
