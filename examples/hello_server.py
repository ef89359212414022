"""The hello server of "Disconnects are good for you", safe.

The original connects to a wildcard and concatenates str and bytes; a server binds, and messages are bytes.
It goes on after a handler's exception: the client is told, and the next request is served.
"""

import sys

from greensafe import Server


def handler(request):
    if request.body == b"fail":
        raise Exception("Unfortunately this failed")
    return b"this is the answer to " + request.body


if __name__ == "__main__":
    server = Server(sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:5555", handler, deadline=30)
    server.start()
    print(server.endpoint, flush=True)
    server.serve_forever()  # until SIGTERM or SIGINT
