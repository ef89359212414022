"""What programs are written against: import paths, names, parameters, fields, loggers and reprs; exports.toml lists them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import tomllib
import typing
from typing import Any

import pytest
from helpers import ROOT

import greensafe
from greensafe import Client, Request, Server, hooks, stats

pytestmark = pytest.mark.usefixtures("limit")

PINS = tomllib.loads((ROOT / "tests/exports.toml").read_text())
EXPORTS = {path: names.split() for path, names in PINS["exports"].items()}


def test_exports() -> None:
    """Each public module has its names, and says so in `__all__`."""
    for path, names in EXPORTS.items():
        module = importlib.import_module(path)
        assert set(names) <= set(module.__all__), path
        for name in names:
            assert hasattr(module, name), f"{path}.{name}"


def _find(name: str) -> Any:
    """Return what `name` stands for: a public name, or a member of one."""
    first, _, member = name.partition(".")
    path = next(path for path, names in EXPORTS.items() if first in names)
    found = getattr(importlib.import_module(path), first)
    return getattr(found, member) if member else found


def _parameters(call: Any) -> str:
    """Write the parameters of `call` as they stand in exports.toml."""
    shown: list[str] = []
    for each in inspect.signature(call).parameters.values():
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not any(text.startswith("*") for text in shown):
            shown.append("*")
        text = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "") + each.name
        if each.default is not each.empty:
            text += "=UNSET" if "UNSET" in repr(each.default) else f"={each.default!r}"
        shown.append(text)
    return ", ".join(shown)


@pytest.mark.parametrize("name", PINS["parameters"])
def test_parameters(name: str) -> None:
    """A public call takes what it took, in the same order, with the same defaults."""
    assert _parameters(_find(name)) == " ".join(PINS["parameters"][name].split())


@pytest.mark.parametrize("name", PINS["members"])
def test_members(name: str) -> None:
    """An object has the public members that it had."""
    assert set(PINS["members"][name].split()) <= set(dir(_find(name)))


def test_fields() -> None:
    """The records of hooks and the stats have the fields that they had, in the same order."""
    records = [*typing.get_args(hooks.Record), *(getattr(stats, name) for name in stats.__all__)]
    found = {each.__name__: [field.name for field in dataclasses.fields(each)] for each in records}
    assert found == {name: fields.split() for name, fields in PINS["fields"].items()}


def test_loggers() -> None:
    """Every logger is one of these; a module says its logger's name in full, so that the name stays when the module moves."""
    found = set()
    for path in (ROOT / "greensafe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
                (name,) = node.args
                assert isinstance(name, ast.Constant), f"{path}: {ast.unparse(node)}"
                found.add(name.value)
    assert found == set(PINS["loggers"].split())


def test_reprs() -> None:
    """What a program prints of its server, client, request and sockets keeps its format."""
    seen = []

    def handler(request: Request) -> bytes:
        seen.append(repr(request))
        return b""

    with greensafe.Context() as context, context.socket(greensafe.REQ) as sock:
        with (
            Server("inproc://s", handler, deadline=1, context=context) as server,
            Client("inproc://s", context=context) as client,
        ):
            client.request(b"x")
            seen += [repr(server), repr(client)]
        seen += [repr(each) for each in (server, client, greensafe.deadline(5.0), context, sock)]
    formats = [
        r"<Request [0-9a-f]{32} from [0-9a-f]{10} running 1 frames>",
        r"<Server started inproc://s inflight=\d answered=\d cancelled=0 zombies=0 malformed=0>",
        r"<Client open inproc://s up=1 inflight=0 late=0>",
        r"<Server closed inproc://s inflight=0 answered=1 cancelled=0 zombies=0 malformed=0>",
        r"<Client closed inproc://s up=0 inflight=0 late=0>",
        r"<deadline 5\.0 not entered>",
        r"<greensafe\.green\.context\.Context\(\d sockets?\) at 0x[0-9a-f]+>",
        r"<greensafe\.green\.socket\.Socket\(zmq\.REQ\) at 0x[0-9a-f]+>",
    ]
    for text, form in zip(seen, formats, strict=True):
        assert re.fullmatch(form, text), (text, form)
