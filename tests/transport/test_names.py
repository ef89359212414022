"""Tests of greensafe.names, with a name service of the test's own."""

from __future__ import annotations

import gc
import socket
import weakref
from typing import Any

import gevent
import pytest
from helpers import LONG, MS, wait_until
from naming import NO_NAME, NOT_NOW, NameService

from greensafe.transport import names
from greensafe.transport.names import AT_ONCE, LATE, Answer, Host, ask, host_in

pytestmark = pytest.mark.usefixtures("limit")


LOOPBACK = socket.if_nameindex()[0]


def _host(name: str) -> Host:
    found = host_in(f"tcp://{name}:5555")
    assert found is not None
    return found


def _answers(resolver: NameService, *hosts: str, ipv6: bool = False) -> list[Answer]:
    answers: list[Answer] = []
    for host in hosts:
        ask(_host(host), ipv6, answers.append)
    wait_until(lambda: len(answers) == len(hosts))
    return answers


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:5555",
        "tcp://127.1:5555",
        "tcp://[::1]:5555",
        "tcp://::1:5555",
        "tcp://[fe80::1%eth0]:5555",
        "tcp://eth0:0;10.0.0.1:5555",
        "ipc:///tmp/localhost:1",
        "inproc://localhost:1",
        "tcp://a b:5555",
        "tcp://a:*",
        "tcp://a",
    ],
)
def test_what_holds_no_name(endpoint: str) -> None:
    """Numbers, other transports, and what libzmq refuses, are libzmq's."""
    assert host_in(endpoint) is None


@pytest.mark.parametrize(
    ("endpoint", "name", "address", "number"),
    [
        ("tcp://localhost:5555", "localhost", "127.0.0.1", "tcp://127.0.0.1:5555"),
        ("tcp://a_b.c-d:1", "a_b.c-d", "::1", "tcp://[::1]:1"),
        ("tcp://eth0:0;a:1", "a", "10.0.0.1", "tcp://eth0:0;10.0.0.1:1"),
        ("tcp://a%eth0:1", "a", "fe80::1", "tcp://[fe80::1%eth0]:1"),
        ("tcp://:1", "", "127.0.0.1", "tcp://127.0.0.1:1"),
        ("tcp://a:05555", "a", "127.0.0.1", "tcp://127.0.0.1:5555"),
        ("tcp://a:5555-x", "a", "127.0.0.1", "tcp://127.0.0.1:5555"),
        ("tcp://a:000", "a", "127.0.0.1", "tcp://127.0.0.1:0"),
        (f"tcp://a%{LOOPBACK[0]}:1", "a", "fe80::1", f"tcp://[fe80::1%{LOOPBACK[1]}]:1"),
    ],
)
def test_an_endpoint_with_a_name(endpoint: str, name: str, address: str, number: str) -> None:
    """The name is found, and a number takes its place; what stands around it stays."""
    host = host_in(endpoint)
    assert host is not None
    assert host.name == name
    assert host.at(address) == number
    assert host.at(address) in host.aliases(address)


def test_libzmq_calls_a_number_by_several_names() -> None:
    """Its events leave the source out, and map IPv4 to IPv6 where that is on."""
    host = host_in("tcp://lo:0;a:1")
    assert host is not None
    assert host.aliases("127.0.0.1") == {"tcp://lo:0;127.0.0.1:1", "tcp://127.0.0.1:1", "tcp://[::ffff:127.0.0.1]:1"}


def test_addresses_in_the_resolvers_order(resolver: NameService) -> None:
    """IPv6 addresses are asked for where they are of use, and not elsewhere."""
    resolver.table["a"] = ["10.0.0.2", "::1", "10.0.0.1", "10.0.0.2"]
    assert [answer.addresses for answer in _answers(resolver, "a")] == [("10.0.0.2", "10.0.0.1")]
    assert [answer.addresses for answer in _answers(resolver, "a", ipv6=True)] == [("10.0.0.2", "::1", "10.0.0.1")]


@pytest.mark.parametrize(
    ("found", "text", "is_definite"),
    [
        (NO_NAME, "not known", True),
        (NOT_NOW, "Temporary", False),
        (OSError("broken"), "broken", False),
        (UnicodeError("label empty or too long"), "label", True),
        ([], "no address", True),
        (["::1"], "IPV6", True),
    ],
)
def test_what_stands_in_the_way(resolver: NameService, found: Any, text: str, is_definite: bool) -> None:
    """The answer tells what the resolver says, or what to set, and whether waiting helps."""
    resolver.table["a"] = found
    answer = _answers(resolver, "a")[0]
    assert answer.addresses == ()
    assert "a" in answer.trouble
    assert text in answer.trouble
    assert answer.is_definite is is_definite


def test_one_lookup_for_all(resolver: NameService) -> None:
    """However many ask for a name, and however they spell it, it is looked up once, also for those that come soon after."""
    resolver.table["a"] = ["10.0.0.1"]
    resolver.hang("a")
    answers: list[Answer] = []
    for name in ("a", "A"):
        for _ in range(10):
            ask(_host(name), False, answers.append)
    wait_until(lambda: resolver.under_way)
    resolver.answer("a")
    wait_until(lambda: len(answers) == 20)
    assert _answers(resolver, "a")[0] is answers[0]
    assert resolver.asked == ["a"]


def test_an_answer_grows_old(resolver: NameService, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has changed is found out."""
    monkeypatch.setattr(names, "FRESH", 0.0)
    for address in ("10.0.0.1", "10.0.0.2"):
        resolver.table["a"] = [address]
        assert _answers(resolver, "a")[0].addresses == (address,)


def test_dead_names_leave_the_threads_alone(resolver: NameService) -> None:
    """Of 20 names that hang a few are looked up at once; the others have their turn when those are over."""
    dead = [f"dead{number}" for number in range(20)]
    for name in dead:
        resolver.hang(name)
    answers: list[Answer] = []
    for name in dead:
        ask(_host(name), False, answers.append)
    wait_until(lambda: resolver.under_way == AT_ONCE)
    resolver.close()
    wait_until(lambda: len(answers) == len(dead))
    assert resolver.most == AT_ONCE


def test_names_that_were_late_leave_room(resolver: NameService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that have hung before cannot hold up the others."""
    monkeypatch.setattr(names, "LIMIT", -1.0)  # whatever is asked is late
    monkeypatch.setattr(names, "FRESH", 0.0)
    dead = [f"dead{number}" for number in range(20)]
    _answers(resolver, *dead)
    monkeypatch.setattr(names, "LIMIT", LONG)
    for name in dead:
        resolver.hang(name)
        ask(_host(name), False, lambda answer: None)
    wait_until(lambda: resolver.under_way == LATE)
    resolver.table["a"] = ["10.0.0.1"]
    assert _answers(resolver, "a")[0].addresses == ("10.0.0.1",)
    assert resolver.under_way == LATE


def test_a_name_that_is_known_to_work_has_room(resolver: NameService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that hang for the first time cannot hold it up."""
    monkeypatch.setattr(names, "FRESH", 0.0)
    resolver.table["a"] = ["10.0.0.1"]
    _answers(resolver, "a")
    for number in range(20):
        resolver.hang(f"dead{number}")
        ask(_host(f"dead{number}"), False, lambda answer: None)
    wait_until(lambda: resolver.under_way == AT_ONCE)
    assert _answers(resolver, "a")[0].addresses == ("10.0.0.1",)
    assert resolver.under_way == AT_ONCE


def test_who_cancels_is_not_called(resolver: NameService) -> None:
    """The lookup goes on for the others; one that raises does not keep them from it."""
    resolver.hang("a")
    cancelled: list[Answer] = []
    answers: list[Answer] = []
    question = ask(_host("a"), False, cancelled.append)
    ask(_host("a"), False, lambda answer: None)
    ask(_host("a"), False, answers.append)
    question.cancel()
    resolver.answer("a")
    wait_until(lambda: answers)
    assert not cancelled


def test_a_lookup_that_is_killed(resolver: NameService) -> None:
    """Who waits for it is told, and the next one is made."""
    resolver.hang("a")
    answers: list[Answer] = []
    ask(_host("a"), False, answers.append)
    wait_until(lambda: resolver.under_way)
    lookups = [each for each in gc.get_objects() if isinstance(each, gevent.Greenlet) and each.args[:1] == ("a",)]
    gevent.killall(lookups)
    wait_until(lambda: answers)
    assert "killed" in answers[0].trouble
    assert not answers[0].is_definite


def test_an_asker_that_is_gone(resolver: NameService) -> None:
    """A lookup that hangs keeps its asker alive only until that cancels."""

    class Asker:
        def on_answer(self, answer: Answer) -> None: ...

    resolver.hang("a")
    asker = Asker()
    gone = weakref.ref(asker)
    question = ask(_host("a"), False, asker.on_answer)
    gevent.sleep(MS)
    question.cancel()
    del asker
    assert gone() is None
