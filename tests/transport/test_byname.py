"""Tests of greensafe.green._byname, with a name service of the test's own, and no socket."""

from __future__ import annotations

import gc
import weakref

import pytest
import zmq
from helpers import MS, wait_until
from naming import NO_NAME, NOT_NOW, NameService

from greensafe.transport import byname as _byname, names
from greensafe.transport.byname import ByName
from greensafe.transport.names import Answer, ask, host_in

pytestmark = pytest.mark.usefixtures("limit")


class Owner:
    """What a socket does, in lists."""

    def __init__(self, name: str = "peer") -> None:
        host = host_in(f"tcp://{name}:5555")
        assert host is not None
        self.by_name = ByName(host, self.on_trouble)
        self.moves: list[str] = []
        self.troubles: list[str] = []
        self.refusal: Exception | None = None
        self.is_busy = False

    def begin(self) -> ByName:
        self.by_name.begin(False, self.move)
        return self.by_name

    def move(self, number: str, old: str | None) -> bool:
        assert old == (self.by_name.number)
        if self.refusal is not None:
            raise self.refusal
        if not self.is_busy:
            self.moves.append(number.removeprefix("tcp://").removesuffix(":5555"))
        return not self.is_busy

    def on_trouble(self, trouble: str) -> None:
        self.troubles.append(trouble)


@pytest.fixture
def owner(resolver: NameService, monkeypatch: pytest.MonkeyPatch) -> Owner:
    """An owner whose name is not begun with; answers are never old."""
    monkeypatch.setattr(names, "FRESH", 0.0)
    return Owner()


def test_several_addresses_in_turn(owner: Owner, resolver: NameService) -> None:
    """Each is tried at once after the one before; then the name is asked anew, and what libzmq tries again is tried first."""
    resolver.table["peer"] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    by_name = owner.begin()
    wait_until(lambda: owner.moves == ["10.0.0.1"])
    assert by_name.on_failed()
    assert by_name.on_failed()
    assert owner.moves == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert resolver.asked == ["peer"]
    assert not by_name.on_failed()
    wait_until(lambda: "rests" in repr(by_name))
    assert resolver.asked == ["peer", "peer"]
    assert len(owner.moves) == 3
    assert by_name.on_failed()
    assert owner.moves[3:] == ["10.0.0.1"]
    by_name.end()


def test_an_address_that_changes(owner: Owner, resolver: NameService) -> None:
    """It is followed after a failure and a loss, not while the connection stands."""
    resolver.table["peer"] = ["10.0.0.1"]
    by_name = owner.begin()
    wait_until(lambda: owner.moves == ["10.0.0.1"])
    for number, happens in enumerate((by_name.on_failed, by_name.on_lost), 2):
        resolver.table["peer"] = [f"10.0.0.{number}"]
        happens()
        wait_until(lambda number=number: owner.moves[-1] == f"10.0.0.{number}")
    assert by_name.is_at("tcp://10.0.0.3:5555")
    assert by_name.was_at("tcp://10.0.0.1:5555")
    assert by_name.was_at("tcp://10.0.0.2:5555")
    assert not by_name.was_at("tcp://10.0.0.3:5555")
    resolver.table["peer"] = ["10.0.0.4"]
    by_name.on_lost()
    answers: list[Answer] = []
    ask(by_name.host, False, answers.append)
    by_name.on_connected()
    wait_until(lambda: answers)
    assert owner.moves[-1] == "10.0.0.3"
    by_name.end()


def test_an_owner_that_cannot_move_now(owner: Owner, resolver: NameService) -> None:
    """It is asked again at the next failure."""
    resolver.table["peer"] = ["10.0.0.1"]
    by_name = owner.begin()
    wait_until(lambda: owner.moves)
    resolver.table["peer"] = ["10.0.0.2"]
    owner.is_busy = True
    by_name.on_failed()
    wait_until(lambda: "rests" in repr(by_name))
    assert by_name.is_at("tcp://10.0.0.1:5555")
    owner.is_busy = False
    by_name.on_failed()
    wait_until(lambda: by_name.is_at("tcp://10.0.0.2:5555"))
    by_name.end()


def test_what_a_name_service_says_that_is_down(owner: Owner, resolver: NameService) -> None:
    """The last known address serves if it cannot tell now, or does not answer; not if it knows that there is none."""
    resolver.table["peer"] = ["10.0.0.1"]
    by_name = owner.begin()
    wait_until(lambda: owner.moves == ["10.0.0.1"])
    resolver.table["peer"] = NOT_NOW
    owner.begin()
    wait_until(lambda: owner.moves == ["10.0.0.1"] * 2)
    resolver.table["peer"] = NO_NAME
    owner.begin()
    wait_until(lambda: owner.troubles)
    assert len(owner.moves) == 2
    assert by_name.number is None
    by_name.end()


def test_a_name_service_that_does_not_answer(owner: Owner, resolver: NameService, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is said once, within the limit; the answer is used when it comes, and nobody asks meanwhile."""
    monkeypatch.setattr(_byname, "LIMIT", 10 * MS)
    resolver.hang("peer")
    by_name = owner.begin()
    wait_until(lambda: owner.troubles)
    assert "does not answer" in owner.troubles[0]
    by_name.ask_later()
    assert not by_name.wake()
    resolver.table["peer"] = ["10.0.0.1"]
    resolver.answer("peer")
    wait_until(lambda: owner.moves)
    assert (len(owner.troubles), resolver.asked, by_name.trouble) == (1, ["peer"], "")
    monkeypatch.setattr(_byname, "LIMIT", 10 * MS)
    resolver.hang("peer")
    owner.begin()
    wait_until(lambda: len(owner.moves) == 2)  # the last known one
    by_name.end()


def test_a_pause_of_its_own_is_not_the_name_services(
    owner: Owner, resolver: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes too late after a process was stopped is not said of a service that was stopped with it, or not yet read."""
    resolver.hang("peer")
    by_name = owner.begin()
    by_name._asked_at -= 3 * _byname.LIMIT
    monkeypatch.setattr(_byname, "LIMIT", 10 * MS)
    by_name._on_late()
    assert not owner.troubles
    wait_until(lambda: owner.troubles)
    resolver.answer("peer")
    by_name.end()


def test_pauses_grow(owner: Owner, resolver: NameService, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that asks again later does so after pauses that grow; one that does not is woken by its next use."""
    pauses: list[int] = []
    monkeypatch.setattr(_byname, "delay", lambda tries, chance: pauses.append(tries) or 0.0)
    by_name = owner.begin()
    for tries in range(1, 4):
        wait_until(lambda tries=tries: len(owner.troubles) == tries)
        pauses.clear()
        by_name.ask_later()
        assert pauses == [tries]
    wait_until(lambda: len(owner.troubles) == 4)
    assert "rests" in repr(by_name)
    assert by_name.wake()
    by_name.ask_later()
    by_name.rest()
    wait_until(lambda: len(owner.troubles) == 5)
    by_name.end()


def test_a_connect_that_fails(owner: Owner, resolver: NameService) -> None:
    """The error is told like a name's trouble; a terminated context is nobody's."""
    resolver.table["peer"] = ["10.0.0.1"]
    owner.refusal = zmq.ZMQError(zmq.EMTHREAD)
    by_name = owner.begin()
    wait_until(lambda: owner.troubles)
    assert "10.0.0.1" in owner.troubles[0]
    owner.refusal = zmq.ZMQError(zmq.ETERM)
    owner.begin()
    wait_until(lambda: "rests" in repr(by_name))
    assert len(owner.troubles) == 1
    by_name.end()


def test_it_is_gone_with_its_owner(owner: Owner, resolver: NameService) -> None:
    """Neither a lookup that hangs nor a timer keeps it."""
    resolver.hang("peer")
    other = Owner()
    other.begin()
    wait_until(lambda: resolver.under_way)
    gone = weakref.ref(other.by_name)
    del other
    gc.collect()
    assert gone() is None
    resolver.answer("peer")
    wait_until(lambda: not resolver.under_way)
