"""A `while` loop over one's own REP socket, under the watchdog.

Whatever happens in the block, the request that was received is answered, so neither this socket nor its client is stuck.
"""

import sys

import gevent

import greensafe as zmq

if __name__ == "__main__":
    endpoint = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:5555"
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.bind(endpoint)
        print(socket.last_endpoint.decode(), flush=True)
        while True:
            with zmq.supervised(socket, deadline=1.0) as request:
                if request.body == b"stop":
                    socket.send(b"bye")
                    break
                if request.body == b"hang":
                    gevent.sleep(3600)
                number = request.json()  # not JSON: the client is told INVALID_ARGUMENT
                socket.send(str(1 / number).encode())  # 0: the client is told of the ZeroDivisionError
