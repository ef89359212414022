"""50 MB in one frame over a link of 1 MB/s: is what takes a minute mistaken for death?"""

from __future__ import annotations

import sys
from time import monotonic

import gevent
import pytest
from helpers import running

import greensafe as zmq
from greensafe import Client, PeerError
from greensafe.testing import FaultyLink

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIZE = 50_000_000
RATE = 1_000_000

ANSWER = """
def answer(body):
    return bytes(int(body)) if len(body) < 20 else b"%d" % len(body)
"""

SERVERS = {
    "greensafe": ANSWER
    + """
import greensafe
server = greensafe.Server("tcp://127.0.0.1:0", lambda request: answer(request.body), deadline=None)
server.start()
print(server.endpoint, flush=True)
server.serve_forever()
""",
    "plain": ANSWER
    + """
import zmq
sock = zmq.Context().socket(zmq.REP)
sock.bind("tcp://127.0.0.1:*")
print(sock.last_endpoint.decode(), flush=True)
while True:
    sock.send(answer(sock.recv()))
""",
}


@pytest.mark.parametrize("kind", SERVERS)
def test_large_and_slow(context: zmq.Context, kind: str) -> None:
    """A reply and a request of 50 MB at the same time, each over a link of its own, with heartbeats of 1, 2 and 5 seconds."""
    zeros = b"0" * SIZE
    with running([sys.executable, "-c", SERVERS[kind]]) as (_, endpoint):
        start = monotonic()

        def move(heartbeat: float, is_reply: bool) -> str:
            with FaultyLink(endpoint) as link, Client(link.endpoint, context=context, heartbeat=heartbeat) as client:
                link.throttle(RATE, "to_client" if is_reply else "to_server")
                try:
                    reply = client.request(b"%d" % SIZE if is_reply else zeros)
                except PeerError as error:
                    return f"{error!r} after {monotonic() - start:.1f} s"
                assert len(reply) == SIZE if is_reply else reply == b"%d" % SIZE
                return "well"

        asked = {(beat, is_reply): gevent.spawn(move, beat, is_reply) for beat in (1.0, 2.0, 5.0) for is_reply in (True, False)}
        ended = {case: each.get() for case, each in asked.items()}
    print(f"\n{kind}: {ended} in {monotonic() - start:.0f} s")
    assert set(ended.values()) == {"well"}
