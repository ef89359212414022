"""docs/protocol.md: its numbers are the code's, and its tables are whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from greensafe.errors import CODES, RemoteError
from greensafe.sansio import callers, rounds
from greensafe.sansio.envelope import (
    CALLER_LIMIT,
    GREET,
    HEADER_SIZE,
    MAGIC,
    MAX_METADATA,
    MAX_ROUTE,
    MAX_ROUTE_BYTES,
    OTHER_JOURNAL,
    SERVER_HEADER_SIZE,
    SERVER_STOPPED,
    VERSION,
    Header,
    Kind,
    ServerHeader,
)
from greensafe.sansio.liveness import LOOKS, WORDLESS
from greensafe.sansio.weights import MAX_FRAMES

TEXT = (Path(__file__).resolve().parents[2] / "docs/protocol.md").read_text()

ID, INSTANCE, JOURNAL = (bytes([number]) * 16 for number in (1, 2, 3))


def _tables(head: str) -> list[list[list[str]]]:
    """The rows of each table that has this head, a list of cells each."""
    found = re.findall(rf"^\| {re.escape(head)} \|\n\|[-:| ]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("| ").split(" | ")] for row in table.splitlines()] for table in found]


def _parts(frame: bytes, *tables: list[list[str]]) -> dict[str, bytes]:
    """What stands in a frame in the place of each field; the fields leave no gap between them."""
    parts, end = {}, 0
    for offset, size, field in (row for table in tables for row in table):
        assert int(offset) == end, field
        end = len(frame) if size == "rest" else end + int(size)
        parts[re.split(r"[:;,]", field)[0]] = frame[int(offset) : end]
    return parts


def test_byte_tables() -> None:
    """Each field of both halves is where the document says, and as long."""
    both, client, server = _tables("offset | bytes | field")
    assert _parts(Header(Kind.CANCEL, ID, 5, 6, GREET, b"meta", 7, JOURNAL).encode(), both, client) == {
        "magic": MAGIC,
        "version": b"\x01",
        "kind": b"\x02",
        "length of the whole frame in bytes": b"\x00\x3a",
        "request id": ID,
        "milliseconds that the client goes on waiting": b"\0\0\0\x05",
        "patience": b"\0\0\0\x06",
        "flags": b"\0\x01",
        "age": b"\0\0\0\x07",
        "the id of the only journal that may run it": JOURNAL,
        "metadata": b"meta",
    }
    assert _parts(ServerHeader(Kind.PONG, ID, INSTANCE, JOURNAL, 3, b"meta").encode(), both, server) == {
        "magic": MAGIC,
        "version": b"\x01",
        "kind": b"\x84",
        "length of the whole frame in bytes": b"\x00\x3e",
        "request id": ID,
        "the server's instance": INSTANCE,
        "the id of its journal": JOURNAL,
        "hops": b"\0\x03",
        "metadata": b"meta",
    }
    assert client[-1][0] == str(HEADER_SIZE)
    assert server[-1][0] == str(SERVER_HEADER_SIZE)


def test_kinds() -> None:
    """Every kind is in the table, with its number and who sends it."""
    (table,) = _tables("kind | name | sent by | what it says | what the other does")
    assert [(int(row[0].strip("`"), 16), row[1], row[2]) for row in table] == [
        (int(kind), kind.name, "client" if kind < 0x80 else "server") for kind in Kind
    ]
    assert {len(row) for row in table} == {5}


def test_codes() -> None:
    """Every code in the table of errors exists, and is said with a kind that carries an error."""
    (table,) = _tables("code | kind | when")
    assert {row[0] for row in table} - {"any"} <= set(CODES)
    assert {row[1] for row in table} == {Kind.ERROR.name, Kind.REJECTED.name, Kind.INTERRUPTED.name}


def test_error_frame() -> None:
    """The example is an error frame."""
    (example,) = re.findall(r"```json\n(.*)\n```", TEXT)
    error = RemoteError.from_reply(example.encode())
    assert error is not None
    assert error.to_reply() == example.encode()


@pytest.mark.parametrize(
    "sentence",
    [
        f"Version {VERSION}.",
        f"magic: `{MAGIC.hex(' ').upper()}`",
        f"`{GREET.to_bytes(2, 'big').hex(' ')}` is GREET",
        f"at least {HEADER_SIZE} if the kind is below `80`, at least {SERVER_HEADER_SIZE} from `80` on",
        f"the metadata has at most {MAX_METADATA:,} bytes",
        f"for {round(WORDLESS * 5)}/5 of the patience",
        f"a {({5: 'fifth'})[LOOKS]} of the smallest patience",
        f"more often than every {callers.SHORTEST_PULSE * 1000:g} ms",
        f"among its first {MAX_ROUTE}, no more than {MAX_ROUTE_BYTES:,} bytes before that",
        f"`max_frames`, {MAX_FRAMES} in all",
        f"no more than {rounds.EACH} in {rounds.INTERVAL * 1000:g} ms, to all together {rounds.ALL},",
        f"a message of more than {rounds.LONG} bytes counts as several",
        f"more seldom than every {callers.LONGEST_PULSE:g} s",
        f"the type `{CALLER_LIMIT}`",
        f"the code FAILED_PRECONDITION and the type `{OTHER_JOURNAL}`",
        f"(type `{SERVER_STOPPED}`)",
        f"begins with these bytes: `{RemoteError.FRAME_HEAD.decode()}`",
        f"at most {RemoteError.MAX_FRAME:,} bytes",
    ],
)
def test_numbers(sentence: str) -> None:
    """What the text says of a number is what the code has."""
    assert sentence in " ".join(TEXT.split())
