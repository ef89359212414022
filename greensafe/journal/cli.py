"""The command `greensafe journal`, which shows a person what is in a journal.

    greensafe journal ls FILE           what is unfinished, and how much there is of the rest
    greensafe journal show ID FILE      one request, with its steps
    greensafe journal forget ID FILE    delete one: sent again, it is run again
    greensafe journal verify FILE       is the file whole?
    greensafe journal vacuum FILE       give free space back to the disk

All but vacuum work while a server holds the file; forget then leaves alone what is open. The exit code is 0 if all is well, 1
if it is not (no such file or request, the file is damaged or in use), 2 for wrong arguments.

What clients and handlers have chosen is printed in one line, with what a terminal would obey escaped.

It does not know how the file is read; see `reading`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from ..errors import JournalError
from ..hub.printable import printable
from ..sansio.envelope import Kind
from .reading import Entry, Reading, Summary, forget, vacuum
from .steps import JsonOrBytes

__all__ = ["add_commands"]

_STATES = ("open", "done", "acked")

#: Requests that `ls` shows of each state, and characters of bytes that are shown in one line.
MOST = 50
WIDTH = 60


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add `ls` and the others to a parser; what is parsed has `run`, which returns the exit code."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=lambda arguments: _guarded(run, arguments))
        return made

    ls = add("ls", _ls, "list what is unfinished, the oldest first, and count the rest")
    ls.add_argument("--state", choices=(*_STATES, "all"), default="open", help="list these instead (open)")
    ls.add_argument("--most", type=int, default=MOST, help=f"of each state ({MOST})")
    show = add("show", _show, "show one request with its steps")
    for each in (show, add("forget", _forget, "delete a request: its id is new again, and sent again it is run again")):
        each.add_argument("id", metavar="ID", help="in hex, as Request.id and the log have it; its beginning or end will do")
    for each in (ls, show):
        each.add_argument("--json", action="store_true", help="one JSON object per line; bytes as latin-1 text")
    add("verify", _verify, "look through all of the file for damage")
    add("vacuum", _vacuum, "write the file anew without free space; not while a server holds it")
    for each in commands.choices.values():
        each.add_argument("file", metavar="FILE", help="the journal")


def _guarded(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    try:
        return run(arguments)
    except JournalError as error:
        print(f"greensafe: {printable(str(error), None)}", file=sys.stderr)
        return 1


def _ls(arguments: argparse.Namespace) -> int:
    states = _STATES if arguments.state == "all" else (arguments.state,)
    with Reading(arguments.file) as reading:
        entries, summary = reading.entries(states, max(0, arguments.most)), reading.summary()
    if arguments.json:
        print("\n".join([*map(_json, entries), _json(summary)]))
        return 0
    for entry in entries:
        print(_line(entry))
    print("\n".join(_sums(summary)))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with Reading(arguments.file) as reading:
        entry = reading.find(arguments.id)
    print(_json(entry) if arguments.json else "\n".join(_shown(entry)))
    return 0


def _forget(arguments: argparse.Namespace) -> int:
    entry = forget(arguments.file, arguments.id)
    print(f"forgotten: {_line(entry)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with Reading(arguments.file) as reading:
        faults = list(reading.faults())
        count = 0 if faults else sum(reading.summary().counts.values())
    print("\n".join(printable(fault.replace("\n", "; ")) for fault in faults) if faults else f"whole: {count} requests")
    return 1 if faults else 0


def _vacuum(arguments: argparse.Namespace) -> int:
    before, after = vacuum(arguments.file)
    print(f"{before} bytes before, {after} after")
    return 0


# How things look.


def _line(entry: Entry) -> str:
    what = "" if not entry.frames else f"  {_text(entry.frames[0], WIDTH)}"
    steps = f" {len(entry.steps)} steps" if entry.steps else ""
    return f"{entry.request_id}  {entry.state:<5}  {_age(entry.changed_seconds):>7}  run {entry.attempts}{steps}{what}"


def _sums(summary: Summary) -> Iterator[str]:
    counts = ", ".join(f"{count} {state}" for state, count in summary.counts.items())
    dropped = ", ".join(f"{count} {cause}" for cause, count in summary.dropped.items())
    yield f"{counts}; dropped: {dropped}; {summary.bytes} bytes"
    process = "no server" if summary.process is None else f"process {summary.process or 'unknown (see `lsof`)'}"
    yield f"journal {summary.journal_id}, {process}"


def _shown(entry: Entry) -> Iterator[str]:
    yield f"request   {entry.request_id}"
    yield f"state     {entry.state}"
    yield f"sent      {_when(entry.since_seconds)}"
    yield f"changed   {_when(entry.changed_seconds)}"
    if entry.left_seconds is not None:
        yield f"caller    gives up {_when(-entry.left_seconds)}"
    yield f"runs      {entry.attempts}, the last {entry.fruitless} without a new step"
    yield f"client    {_text(entry.client, WIDTH)}"
    if entry.metadata:
        yield f"metadata  {_text(entry.metadata, WIDTH)}"
    for name, number, value in entry.steps:
        yield f"step      {printable(name)} ({number}): {_result(value)}"
    what = "body" if entry.state == "open" else Kind(entry.kind).name.lower() if entry.kind in set(Kind) else str(entry.kind)
    for frame in entry.frames:
        yield f"{what:<9} {_text(frame)}"


def _result(value: bytes) -> str:
    """A step's result, if it was written by the default codec; else its bytes."""
    try:
        return repr(JsonOrBytes().decode(value))
    except ValueError:
        return _text(value)


def _text(data: bytes, width: int | None = None) -> str:
    """Bytes in one line: what can be printed as it is, the rest escaped."""
    text = repr(data if width is None else data[: width + 1])[2:-1]
    return text if width is None or len(text) <= width else f"{text[:width]}..."


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if abs(seconds) >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _when(seconds: float) -> str:
    """Format a time `seconds` ago as local wall-clock time."""
    try:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - seconds))
    except (OverflowError, OSError):  # no calendar goes so far: the file is damaged
        clock = "never"
    return f"{clock} ({_age(seconds)} ago)" if seconds >= 0 else f"{clock} (in {_age(-seconds)})"


def _json(record: Entry | Summary) -> str:
    return json.dumps(_plain(dataclasses.asdict(record)))


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
