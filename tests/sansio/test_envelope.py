"""Tests of greensafe.sansio.envelope."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, strategies as st

from greensafe.errors import RemoteProtocolError
from greensafe.sansio.envelope import (
    GREET,
    HEADER_SIZE,
    MAGIC,
    MAX_METADATA,
    NO_JOURNAL,
    SERVER_HEADER_SIZE,
    Header,
    Kind,
    ServerHeader,
    decode,
    remaining_ms,
    split,
)

ID = bytes(range(16))
INSTANCE = bytes(range(16, 32))
JOURNAL = bytes(range(32, 48))
RID = b"\0\x6b\x8b\x45\x67"
HEADER = Header(Kind.REQUEST, ID, 1500).encode()
SERVER_HEADER = ServerHeader(Kind.REPLY, ID, INSTANCE).encode()

ids = st.binary(min_size=16, max_size=16)
metadata = st.binary(max_size=200)
uint16 = st.integers(0, 0xFFFF)
uint32 = st.integers(0, 0xFFFFFFFF)
remaining = st.none() | st.integers(0, 0xFFFFFFFE)
clients = st.builds(Header, st.integers(0, 0x7F), ids, remaining, uint32, uint16, metadata, uint32, ids)
servers = st.builds(ServerHeader, st.integers(0x80, 0xFF), ids, ids, ids, uint16, metadata)
headers = clients | servers


@given(headers)
def test_round_trip(header: Header | ServerHeader) -> None:
    """decode is the inverse of encode, for both halves and also for kinds that nobody knows yet."""
    decoded = decode(header.encode())
    assert decoded == header
    assert type(decoded) is type(header)
    assert hash(decoded) == hash(header)


@given(
    st.binary(max_size=80)
    | st.binary(min_size=24, max_size=80).map(lambda tail: MAGIC + b"\x01" + tail)
    | st.tuples(st.integers(0, 255), st.binary(min_size=16, max_size=120)).map(
        lambda parts: struct.pack("!4sBBH", MAGIC, 1, parts[0], 8 + len(parts[1])) + parts[1]
    )
)
def test_decode_takes_anything(frame: bytes) -> None:
    """Arbitrary bytes are a valid header, which encodes to the same bytes, or none; the documented condition says which."""
    header = decode(frame)
    assert (header is not None) == _is_valid(frame)
    assert header is None or header.encode() == frame


def _is_valid(frame: bytes) -> bool:
    """The condition of docs/protocol.md, read as it stands there."""
    if frame[:4] != b"\x89GS\n" or frame[4:5] != b"\x01" or len(frame) < 8:
        return False
    is_servers = frame[5] >= 0x80
    fixed = 58 if is_servers else 54
    return int.from_bytes(frame[6:8], "big") == len(frame) >= fixed and len(frame) - fixed <= 65_477


@given(headers, st.data())
def test_valid_if_and_only_if(header: Header | ServerHeader, data: st.DataObject) -> None:
    """A byte more, a byte less, or a wrong one in magic, version or length make it somebody's id; any kind is a valid one."""
    frame = header.encode()
    assert decode(frame + b"x") is None
    assert decode(frame[:-1]) is None
    index = data.draw(st.integers(0, 7))
    broken = bytearray(frame)
    broken[index] ^= data.draw(st.integers(1, 255))
    decoded = decode(bytes(broken))
    if index != 5:
        assert decoded is None
    else:
        assert (decoded is not None) == (broken[5] < 0x80 or len(broken) >= SERVER_HEADER_SIZE)
        assert decoded is None or decoded.kind == broken[5]


@pytest.mark.parametrize("version", [version for version in range(256) if version != 1])
def test_other_versions(version: int) -> None:
    """A header of another version is somebody's id, and goes back as such."""
    for frame in (HEADER, SERVER_HEADER):
        other = frame[:4] + bytes([version]) + frame[5:]
        assert decode(other) is None
        assert split([RID, other, b"", b"x"]).route == [RID, other, b""]


def test_byte_table_of_a_client() -> None:
    """Each byte of a client's half is where the table says."""
    frame = Header(Kind.REQUEST, ID, 0x01020304, 0x05060708, GREET, b"meta", 0x090A0B0C, JOURNAL).encode()
    assert HEADER_SIZE == 54
    assert len(frame) == 58
    assert frame[0:4] == b"\x89\x47\x53\x0a"
    assert frame[4] == 1
    assert frame[5] == 1
    assert frame[6:8] == b"\x00\x3a"
    assert frame[8:24] == ID
    assert frame[24:28] == b"\x01\x02\x03\x04"
    assert frame[28:32] == b"\x05\x06\x07\x08"
    assert frame[32:34] == b"\x00\x01"
    assert frame[34:38] == b"\x09\x0a\x0b\x0c"
    assert frame[38:54] == JOURNAL
    assert frame[54:] == b"meta"
    assert Header(Kind.REQUEST, ID).encode()[24:] == b"\xff\xff\xff\xff" + bytes(4 + 2 + 4 + 16)


def test_byte_table_of_a_server() -> None:
    """Each byte of a server's half is where the table says."""
    frame = ServerHeader(Kind.REPLY, ID, INSTANCE, JOURNAL, 0x0203, b"meta").encode()
    assert SERVER_HEADER_SIZE == 58
    assert len(frame) == 62
    assert frame[0:4] == b"\x89\x47\x53\x0a"
    assert frame[4] == 1
    assert frame[5] == 0x81
    assert frame[6:8] == b"\x00\x3e"
    assert frame[8:24] == ID
    assert frame[24:40] == INSTANCE
    assert frame[40:56] == JOURNAL
    assert frame[56:58] == b"\x02\x03"
    assert frame[58:] == b"meta"
    assert ServerHeader(Kind.REPLY, ID, INSTANCE).encode()[40:] == NO_JOURNAL + b"\x00\x01"


def test_kinds() -> None:
    """The numbers of the kinds: clients' below 0x80, servers' from there on."""
    assert {kind.name: int(kind) for kind in Kind} == {
        "REQUEST": 0x01,
        "CANCEL": 0x02,
        "PING": 0x03,
        "ACK": 0x04,
        "REPLY": 0x81,
        "ERROR": 0x82,
        "WORKING": 0x83,
        "PONG": 0x84,
        "REJECTED": 0x85,
        "DRAINING": 0x86,
        "INTERRUPTED": 0x87,
        "CLOSED": 0x88,
    }


def test_encode_refuses_what_does_not_fit() -> None:
    """Ids of another length and metadata that is too long are errors."""
    for header in (
        Header(Kind.REQUEST, b"short"),
        Header(Kind.REQUEST, ID, journal=b"short"),
        ServerHeader(Kind.REPLY, b"short", INSTANCE),
        ServerHeader(Kind.REPLY, ID, b"short"),
        ServerHeader(Kind.REPLY, ID, INSTANCE, b"short"),
    ):
        with pytest.raises(ValueError, match="16 bytes"):
            header.encode()
    long = bytes(MAX_METADATA + 1)
    for header in (Header(Kind.REQUEST, ID, metadata=long), ServerHeader(Kind.REPLY, ID, INSTANCE, metadata=long)):
        with pytest.raises(ValueError, match="metadata"):
            header.encode()


def test_numbers_beyond_the_field_are_cut_to_it() -> None:
    """Longer than 49 days is told as 49 days, never as no limit; more hops than anybody has as the most that can be told."""
    header = decode(Header(Kind.REQUEST, ID, 2**40, 2**40).encode())
    assert isinstance(header, Header)
    assert (header.remaining_ms, header.patience_ms) == (2**32 - 2, 2**32 - 1)
    below = decode(Header(Kind.REQUEST, ID, -1).encode())
    assert isinstance(below, Header)
    assert below.remaining_ms == 0
    server = decode(ServerHeader(Kind.REPLY, ID, INSTANCE, hops=70_000).encode())
    assert isinstance(server, ServerHeader)
    assert server.hops == 0xFFFF


def test_the_most_metadata_fits_into_either_half() -> None:
    """What a client may send a server can return; one byte more is no header, in either half."""
    most = bytes(MAX_METADATA)
    assert decode(Header(Kind.REQUEST, ID, metadata=most).encode()) is not None
    frame = ServerHeader(Kind.REPLY, ID, INSTANCE, metadata=most).encode()
    assert len(frame) == 0xFFFF
    assert decode(frame) is not None
    length = HEADER_SIZE + MAX_METADATA + 1
    too_long = MAGIC + struct.pack("!BBH", 1, Kind.REQUEST, length) + bytes(length - 8)
    assert decode(too_long) is None
    assert decode(too_long[: HEADER_SIZE + MAX_METADATA]) is None


def test_remaining_is_rounded_up() -> None:
    """The server never gives up before the client."""
    assert remaining_ms(10.0, None) is None
    assert remaining_ms(10.0, 10.0001) == 1
    assert remaining_ms(10.0, 9.0) == 0


def test_reprs() -> None:
    """A header shows its kind and its id, also a kind that nobody knows."""
    assert repr(decode(HEADER)) == f"<Header REQUEST {ID.hex()} remaining=1500 ms>"
    assert "kind 0x7f" in repr(Header(0x7F, ID))
    assert repr(decode(SERVER_HEADER)) == f"<ServerHeader REPLY {ID.hex()} of {INSTANCE.hex()} hops=1>"
    assert decode(HEADER) != ID
    assert decode(SERVER_HEADER) != decode(HEADER)


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
        ([RID, HEADER, b"", HEADER, b"", b"x"], 3, True, [HEADER, b"", b"x"]),
        ([RID, HEADER, HEADER, b"", b"body"], 4, True, [b"body"]),
        ([b"proxy", RID, HEADER, b"", b""], 4, True, [b""]),
        ([RID, SERVER_HEADER, b"", b"body"], 3, True, [b"body"]),
        ([HEADER, b"", b"body"], 2, False, [b"body"]),
        ([RID, HEADER + b"x", b"", b"body"], 3, False, [b"body"]),
        ([RID, HEADER, b"id", b"", b"body"], 4, False, [b"body"]),
        ([b"", b"", b"body"], 2, False, [b"body"]),
    ],
    ids=str,
)
def test_envelopes(frames: list[bytes], route: int, has_header: bool, body: list[bytes]) -> None:
    """REQ, CORRELATE, DEALER, proxies, empty bodies, greensafe headers: split at the first empty frame after the id."""
    envelope = split(frames)
    assert envelope.route == frames[:route]
    assert (envelope.header is not None) == has_header
    assert envelope.body == body
    assert envelope.origin == tuple(frames[: route - 1 - has_header])


@pytest.mark.parametrize("frames", [[], [RID], [RID, b"body"], [RID, b""], [b""], [b"", b""], [RID, b"id", b""]], ids=str)
def test_malformed(frames: list[bytes]) -> None:
    """Without delimiter or without body it is refused, and the text says which."""
    with pytest.raises(RemoteProtocolError, match=r"empty frame|without a body"):
        split(frames)


@given(st.lists(st.binary(max_size=3) | headers.map(lambda header: header.encode()), max_size=8))
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
    assert len(envelope.origin) >= 1
