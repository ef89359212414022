"""A handler that computes for ever without yielding: nothing else in its process runs meanwhile, no timer either.

    spinning_handler.py preempt    the handler alone is interrupted at its deadline (experimental)
    spinning_handler.py exit       the process ends with code 70, for its supervisor to restart it

The log tells in both cases who blocked the hub.
"""

import logging
import sys

from greensafe import Client, RemoteError, Server


def count_for_ever():
    number = 0
    while True:
        number += 1


def handler(request):
    if request.body == b"spin":
        count_for_ever()
    return b"this is the answer to " + request.body


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    mode = sys.argv[1] if len(sys.argv) > 1 else "preempt"
    options = {"preempt": True} if mode == "preempt" else {"exit_when_blocked": 2.0}
    with Server("tcp://127.0.0.1:0", handler, deadline=2.0, **options) as server, Client(server.endpoint) as client:
        for body in (b"Hello", b"spin", b"Hello again"):
            try:
                print(client.request(body).decode(), flush=True)
            except RemoteError as error:
                print(error, flush=True)
