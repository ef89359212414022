"""The Socket of "Disconnects are good for you": a recv whose time runs out returns None.

greensafe's own on_timeout raises, as the article recommends for most applications; a subclass decides otherwise.
"""

import sys

import greensafe as zmq


class Socket(zmq.Socket):
    def on_timeout(self):
        return None


if __name__ == "__main__":
    endpoint = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:5555"
    with zmq.Context() as context, Socket(context, zmq.REQ, default_timeout=1.0) as socket:
        socket.connect(endpoint)
        socket.send(b"Hello")
        message = socket.recv(timeout=0.2)
        print("no reply within 0.2 s" if message is None else message.decode())
