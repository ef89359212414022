"""Tests of greensafe.printable."""

from __future__ import annotations

import pytest

from greensafe.hub.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("plain 'text' with \"quotes\", \\ and Grüße 温度", "plain 'text' with \"quotes\", \\ and Grüße 温度"),
        ("one\ntwo\r\nthree", r"one\ntwo\r\nthree"),
        ("\x1b[2J\x07\x00\x7f\x9b", r"\x1b[2J\x07\x00\x7f\x9b"),
        ("a\u2028b\x85c\u202ed", r"a\u2028b\x85c\u202ed"),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_cannot_be_printed_is_escaped(text: str, shown: str) -> None:
    """Line ends, terminal escapes, bidi overrides and surrogates are; all else stays as it is."""
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_a_long_text_is_cut_off() -> None:
    """So that one text does not fill the log; its length is said, and None cuts off nothing."""
    assert printable("x" * 30, 10) == "x" * 10 + "... (30 characters)"
    assert printable("\n" * 11, 10) == r"\n" * 10 + "... (11 characters)"
    assert printable("x" * 5000, None) == "x" * 5000
    assert len(printable("x" * 10**6)) < 1100
