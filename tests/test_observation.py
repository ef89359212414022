"""docs/observation.md, and what is logged: what it shows is run, and what it names is there."""

from __future__ import annotations

import dataclasses
import logging
import re
import typing
from pathlib import Path

import pytest
from helpers import ROOT, run_python, wait_until

import greensafe as zmq
from greensafe import Client, RemoteError, Request, Server, hooks, stats

pytestmark = pytest.mark.usefixtures("limit")

TEXT = (ROOT / "docs/observation.md").read_text()


def test_its_program_prints_what_it_says(tmp_path: Path) -> None:
    """The document's output is that of its program."""
    program = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    output = re.search(r"It prints:\n\n```\n(.*?)```", TEXT, re.DOTALL)
    assert program is not None
    assert output is not None
    file = tmp_path / "observed.py"
    file.write_text(program[1])
    result = run_python(file, env={"PYTHONWARNINGS": "error"})
    assert (result.out, result.code) == (output[1], 0), result.err


def test_its_tables_are_whole() -> None:
    """Every record, every field of the stats, every cause of a drop and every logger stands in it."""
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    named = set(re.findall(r"\w+", prose))
    assert {kind.__name__ for kind in typing.get_args(hooks.Record)} <= named
    for name in stats.__all__:
        assert {name, *(field.name for field in dataclasses.fields(getattr(stats, name)))} <= named
    with Server("inproc://s", lambda request: b"", deadline=1) as server, Client("inproc://s") as client:
        assert {*server.stats.drops, *client.stats.drops} <= named
    for source in (ROOT / "greensafe").rglob("*.py"):
        for logger in re.findall(r'getLogger\("([^"]*)"\)', source.read_text()):
            assert f"`{logger}`" in prose


def test_what_is_logged(context: zmq.Context, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of a request that succeeds; a start, a stop, a loss and a failure each say where, and the last which request."""

    def handler(request: Request) -> bytes:
        if request.body == b"fail":
            raise ValueError("no")
        return request.body

    caplog.set_level(logging.INFO, "greensafe")
    with Server("tcp://127.0.0.1:0", handler, deadline=1, context=context) as server:
        endpoint = str(server.endpoint)
        client = Client(endpoint, context=context)
        for _ in range(3):
            client.request(b"x")
        assert [record.getMessage() for record in caplog.records] == [f"serving at {endpoint}"]
        with pytest.raises(RemoteError):
            client.request(b"fail")
        failed = caplog.records[-1]
        assert (failed.name, failed.levelno) == ("greensafe.watchdog", logging.ERROR)
        assert failed.__dict__["request_id"] in failed.getMessage()
        assert failed.exc_info is not None
        assert failed.exc_info[0] is ValueError
    wait_until(lambda: client.stats.endpoints[0].losses)
    client.close()
    assert {record.__dict__["endpoint"] for record in caplog.records} == {endpoint}
    assert {(record.name, record.levelname) for record in caplog.records[2:]} == {
        ("greensafe.server", "INFO"),
        ("greensafe.channel", "INFO"),
    }
