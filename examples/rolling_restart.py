"""Two servers are restarted one after the other, again and again, while 20 greenlets ask them all the time: no request fails.

Each server is a process of its own. SIGTERM ends it: it tells its clients, which go to the other one, answers what it was
asked, and exits with code 0; then it is started again at the same address. The client makes no retries and knows of nothing.
"""

import os
import signal
import sys
import time
from collections import Counter

import gevent
from gevent.subprocess import PIPE, Popen

from greensafe import Client, GreensafeError, deadline, serve
from greensafe.hooks import ServerStarted

GREENLETS = 20
ROUNDS = 3
START = time.monotonic()


def say(text):
    print(f"{time.monotonic() - START:6.3f} s  {text}", flush=True)


# The server's process.


def handler(request):
    gevent.sleep(0.02)
    return b"%d" % os.getpid()


def print_endpoint(record):
    if isinstance(record, ServerStarted):
        print(record.endpoint, flush=True)


# Its operator.


class Site:
    """An address, and the process that serves there."""

    def __init__(self, name):
        self.name = name
        self.endpoint = "tcp://127.0.0.1:0"
        self.pids = []
        self.start()

    def start(self):
        self.process = Popen([sys.executable, __file__, "serve", self.endpoint], stdout=PIPE, text=True)
        self.pids.append(self.process.pid)
        self.endpoint = self.process.stdout.readline().strip()  # the same again after the first time
        say(f"{self.name} serves at {self.endpoint}, process {self.process.pid}")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait()
        self.process.stdout.close()
        return code


# The client.


class Load:
    """Greenlets that ask, one request after the other, until `is_over`."""

    def __init__(self, client):
        self.client = client
        self.is_over = False
        self.failed = []
        self.slowest = 0.0
        self.answers = Counter()
        self.greenlets = [gevent.spawn(self.ask) for _ in range(GREENLETS)]

    def ask(self):
        while not self.is_over:
            start = time.monotonic()
            try:
                self.answers[int(self.client.request(b"who are you?"))] += 1
            except GreensafeError as error:
                self.failed.append(error)
                gevent.sleep(0.01)
            self.slowest = max(self.slowest, time.monotonic() - start)

    def wait_for(self, sites):
        """Return when each of them has answered 100 requests more."""
        enough = {site.process.pid: self.answers[site.process.pid] + 100 for site in sites}
        while any(self.answers[pid] < count for pid, count in enough.items()):
            gevent.sleep(0.01)


def main():
    sites = [Site("A"), Site("B")]
    try:
        with Client(*(site.endpoint for site in sites)) as client, deadline(60):
            load = Load(client)
            load.wait_for(sites)
            for site in sites * ROUNDS:
                restart(site, client, load)
                load.wait_for(sites)
            load.is_over = True
            gevent.joinall(load.greenlets)
    finally:
        for site in sites:
            site.process.kill()
    for site in sites:
        by = " + ".join(str(load.answers[pid]) for pid in site.pids)
        print(f"{site.name}: {by} requests answered by its {len(site.pids)} processes")
    for error in load.failed:
        print(f"failed: {error!r}")
    print(
        f"{load.answers.total() + len(load.failed)} requests, {len(load.failed)} failed; the slowest took {load.slowest:.3f} s"
    )
    return 1 if load.failed else 0


def restart(site, client, load):
    inflight = {each.endpoint: each.inflight for each in client.stats.endpoints}
    total, own = load.answers.total(), load.answers[site.process.pid]
    say(f"{site.name} gets SIGTERM, with {inflight[site.endpoint]} requests in flight there")
    code = site.stop()
    total, own = load.answers.total() - total, load.answers[site.process.pid] - own
    say(f"{site.name} has exited with code {code}; {total} requests were answered meanwhile, {own} of them by it")
    site.start()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], handler, deadline=30, hooks=print_endpoint)
    else:
        sys.exit(main())
