"""The hello client of "Disconnects are good for you": a REQ socket, with a limit and an answer to every failure."""

import sys

import greensafe as zmq

if __name__ == "__main__":
    endpoint = sys.argv[1] if len(sys.argv) > 1 else "tcp://localhost:5555"
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(endpoint)
        for request in (b"Hello", b"fail", b"Hello again"):
            socket.send(request)
            try:
                message = socket.recv(timeout=5.0)
            except zmq.OperationTimeout as error:
                print(f"No reply: {error}")  # the socket can send again
                continue
            failure = zmq.RemoteError.from_reply(message)
            print(f"The server failed: {failure}" if failure else f"Received reply: {message.decode()}")
