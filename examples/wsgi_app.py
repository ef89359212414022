"""A monkey-patched WSGI application that asks a service, and answers 504 when the service does not answer in time."""

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402

from gevent.pywsgi import WSGIServer  # noqa: E402

from greensafe import Client, DeadlineExceeded, RemoteError, deadline  # noqa: E402


def make_app(client, seconds):
    """One Client serves all requests of the process, each in its own greenlet."""

    def app(environ, start_response):
        try:
            with deadline(seconds):
                body = client.request(environ["PATH_INFO"].encode())
        except DeadlineExceeded as error:
            status, body = "504 Gateway Timeout", str(error).encode()
        except RemoteError as error:
            status, body = "502 Bad Gateway", str(error).encode()
        else:
            status = "200 OK"
        start_response(status, [("Content-Type", "text/plain")])
        return [body]

    return app


if __name__ == "__main__":
    service = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:5555"
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 8080
    with Client(service) as client:
        server = WSGIServer(("127.0.0.1", port), make_app(client, seconds=2), log=None)
        server.start()
        print(server.server_port, flush=True)
        server.serve_forever()
