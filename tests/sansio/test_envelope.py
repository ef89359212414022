"""Tests of greensafe.sansio.envelope."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, strategies as st

from greensafe.errors import RemoteProtocolError
from greensafe.sansio.envelope import HEADER_SIZE, MAGIC, MAX_METADATA, Header, Kind, remaining_ms, split

ID = bytes(range(16))
RID = b"\0\x6b\x8b\x45\x67"
HEADER = Header(Kind.REQUEST, ID, 1500).encode()

headers = st.builds(
    Header,
    st.sampled_from(list(Kind)),
    st.binary(min_size=16, max_size=16),
    st.none() | st.integers(0, 0xFFFFFFFE),
    st.binary(max_size=200),
)


@given(headers)
def test_round_trip(header: Header) -> None:
    """decode is the inverse of encode."""
    assert Header.decode(header.encode()) == header
    assert hash(Header.decode(header.encode())) == hash(header)


@given(st.binary() | st.binary().map(lambda tail: MAGIC + tail))
def test_decode_takes_anything(frame: bytes) -> None:
    """Arbitrary bytes are either a valid header, which encodes to the same bytes, or none."""
    header = Header.decode(frame)
    assert header is None or header.encode() == frame


@given(headers, st.data())
def test_valid_if_and_only_if(header: Header, data: st.DataObject) -> None:
    """A frame is a header if and only if magic, version, kind and length are right."""
    frame = header.encode()
    assert Header.decode(frame + b"x") is None
    assert Header.decode(frame[:-1]) is None
    index = data.draw(st.integers(0, 7))
    broken = bytearray(frame)
    broken[index] ^= data.draw(st.integers(1, 255))
    decoded = Header.decode(bytes(broken))
    if index == 5 and broken[5] in set(Kind):
        assert decoded is not None
    else:
        assert decoded is None


def test_byte_table() -> None:
    """The frame is laid out as documented."""
    frame = Header(Kind.REPLY, ID, None, b"meta").encode()
    assert frame == b"\x89GS\n" + b"\x01" + b"\x81" + struct.pack("!H", 32) + ID + b"\xff\xff\xff\xff" + b"meta"
    assert HEADER_SIZE == 28


def test_encode_refuses_what_does_not_fit() -> None:
    """An id of another length and metadata that is too long are errors."""
    with pytest.raises(ValueError, match="16 bytes"):
        Header(Kind.REQUEST, b"short").encode()
    with pytest.raises(ValueError, match="metadata"):
        Header(Kind.REQUEST, ID, metadata=bytes(MAX_METADATA + 1)).encode()
    assert Header.decode(Header(Kind.REQUEST, ID, 2**40).encode()).remaining_ms == 2**32 - 2  # type: ignore[union-attr]


def test_remaining_is_rounded_up() -> None:
    """The server never gives up before the client."""
    assert remaining_ms(10.0, None) is None
    assert remaining_ms(10.0, 10.0001) == 1
    assert remaining_ms(10.0, 9.0) == 0


@pytest.mark.parametrize(
    ("frames", "route", "has_header", "body"),
    [
        ([RID, b"", b"body"], 2, False, [b"body"]),
        ([RID, b"", b"a", b"b"], 2, False, [b"a", b"b"]),
        ([RID, b"", b""], 2, False, [b""]),
        ([RID, b"", b"", b""], 2, False, [b"", b""]),
        ([RID, b"\x6a\x98\x3a\xe4", b"", b"body"], 3, False, [b"body"]),
        ([RID, b"id1", b"id2", b"", b"body"], 4, False, [b"body"]),
        ([b"proxy", RID, b"", b"body"], 3, False, [b"body"]),
        ([b"proxy", b"proxy2", RID, b"\x6a\x98\x3a\xe4", b"", b"body"], 5, False, [b"body"]),
        ([RID, HEADER, b"", b"body"], 3, True, [b"body"]),
        ([b"proxy", RID, HEADER, b"", b""], 4, True, [b""]),
        ([HEADER, b"", b"body"], 2, False, [b"body"]),
        ([RID, HEADER + b"x", b"", b"body"], 3, False, [b"body"]),
        ([RID, HEADER, b"id", b"", b"body"], 4, False, [b"body"]),
    ],
    ids=str,
)
def test_envelopes(frames: list[bytes], route: int, has_header: bool, body: list[bytes]) -> None:
    """REQ, CORRELATE, DEALER, proxies, empty bodies, greensafe headers: split at the first empty frame after the id."""
    envelope = split(frames)
    assert envelope.route == frames[:route]
    assert (envelope.header is not None) == has_header
    assert envelope.body == body


@pytest.mark.parametrize("frames", [[], [RID], [RID, b"body"], [RID, b""], [b""], [b"", b""], [RID, b"id", b""]], ids=str)
def test_malformed(frames: list[bytes]) -> None:
    """Without delimiter or without body it is refused, and the text says which."""
    with pytest.raises(RemoteProtocolError, match=r"empty frame|without a body"):
        split(frames)


@given(st.lists(st.binary(max_size=3) | headers.map(Header.encode), max_size=8))
def test_split_loses_nothing(frames: list[bytes]) -> None:
    """Any list of frames is either refused or taken apart without loss."""
    try:
        envelope = split(frames)
    except RemoteProtocolError:
        assert b"" not in frames[1:-1]
        return
    assert envelope.route + envelope.body == frames
    assert envelope.route[-1] == b""
    assert envelope.body
