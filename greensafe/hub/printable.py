"""Text from outside, made safe for one line of a log or a terminal.

What a peer has written must not end the line that it stands in, so that it forges the next one, nor move a terminal's cursor.
Characters that cannot be printed are escaped as `repr` escapes them; quotes, backslashes and all letters stay as they are.

It does not know what the text is about.
"""

from __future__ import annotations

__all__ = ["printable"]

#: Characters of a text that are shown, unless the caller says otherwise.
MOST = 1000


def printable(text: str, most: int | None = MOST) -> str:
    """The text in one line, cut off after `most` characters (None for never) with a note of its length."""
    cut = text if most is None or len(text) <= most else text[:most]
    if not cut.isprintable():
        cut = "".join(each if each.isprintable() else repr(each)[1:-1] for each in cut)
    return cut if most is None or len(text) <= most else f"{cut}... ({len(text)} characters)"
