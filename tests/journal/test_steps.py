"""Tests of greensafe.journal.steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from greensafe.errors import JournalError
from greensafe.journal import Effect, Forget, JsonOrBytes, in_transaction
from greensafe.journal.steps import Act, check_name, is_under_way

CODEC = JsonOrBytes()

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
json_values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(json_values | st.binary())
def test_round_trip(value: Any) -> None:
    """Bytes and what JSON knows come back as they were."""
    assert CODEC.decode(CODEC.encode(value)) == value


@pytest.mark.parametrize(
    ("value", "back"),
    [((1, (2,)), [1, [2]]), ({1: "a"}, {"1": "a"}), (bytearray(b"x"), b"x"), (memoryview(b"x"), b"x"), (b"", b""), ("b", "b")],
)
def test_what_json_makes_of_it(value: Any, back: Any) -> None:
    """Other types come back as JSON's, each time."""
    assert CODEC.decode(CODEC.encode(value)) == back


def test_bytes_that_look_like_json_are_bytes() -> None:
    """What kind it was is told by the first byte, not guessed."""
    assert CODEC.encode(b"j1") == b"bj1"
    assert CODEC.decode(b"bj1") == b"j1"
    assert CODEC.encode([1, 2]) == b"j[1,2]"


@pytest.mark.parametrize("value", [object(), {1, 2}, [b"x"], {"a": object()}])
def test_what_is_neither_is_an_error(value: Any) -> None:
    """Anything else is a TypeError; pickle is never used."""
    with pytest.raises(TypeError):
        CODEC.encode(value)


@pytest.mark.parametrize("data", [b"", b"x", b"\x80\x04", b"[1]", b"j", b"j{"])
def test_what_another_codec_wrote_is_an_error(data: bytes) -> None:
    """It is a ValueError, not something half right."""
    with pytest.raises(ValueError, match=r"codec|Expecting|JSON|delimiter|enclosed"):
        CODEC.decode(data)


def test_in_transaction_takes_a_function() -> None:
    """Anything else is a TypeError at once, not in the journal's thread."""
    assert in_transaction(json.dumps).act is json.dumps
    with pytest.raises(TypeError, match="function of a connection"):
        in_transaction("INSERT INTO t VALUES (1)")  # type: ignore[arg-type]


def test_the_name_of_a_step() -> None:
    """Any text, but half of a surrogate pair is none; the error shows where it is."""
    for good in ("", "a\0b", "ä", "\U0001f600"):
        check_name(good)
    with pytest.raises(ValueError, match=r"half of a surrogate pair"):
        check_name("a\ud800")
    with pytest.raises(TypeError, match="not bytes"):
        check_name(b"a")


def test_an_effect_that_nobody_waits_for_is_not_called() -> None:
    """It says of itself whether it runs just now, which its function sees as well."""
    seen: list[bool] = []
    act = Act(in_transaction(lambda connection, a: seen.append(is_under_way(write)) or a), (5,), JsonOrBytes())
    write = Effect(bytes(16), "e", 1, act)
    assert act(None) == b"j5"
    assert (seen, is_under_way(write)) == ([True], False)
    act.is_wanted = False
    with pytest.raises(JournalError, match="nobody waits"):
        act(None)
    assert not is_under_way(Forget(bytes(16)))
