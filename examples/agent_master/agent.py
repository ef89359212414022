"""An agent that has itself authorised. It asks, it waits, it goes on: no loop, no limit, nothing about restarts.

    python agent.py ENDPOINT NAME

That the master was killed and started again in between, how often, and at what point, it does not notice.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import sys
from typing import Any

from keys import fingerprint, new_secret, proof, public_of, session_key

from greensafe import Client


def ask(master: Client, what: dict[str, Any], idempotent: bool = False) -> Any:
    return json.loads(master.request(json.dumps(what).encode(), idempotent=idempotent))


def authorise(master: Client, name: str) -> bytes:
    """Returns the session key, however long that takes."""
    secret = new_secret()
    public = public_of(secret)
    # Harmless however often it runs. Its answer also tells the client that this master keeps a journal: so what follows is sent
    # again to whoever has that journal, and to nobody else, until it is answered.
    theirs = ask(master, {"do": "exchange keys", "name": name, "public": public}, idempotent=True)
    print(f"wait until an operator accepts {fingerprint(public)}", flush=True)
    session = ask(master, {"do": "authorise", "fingerprint": fingerprint(public)})
    key = session_key(secret, theirs["public"], session["nonce"])
    if not hmac.compare_digest(proof(key), session["proof"]):
        raise ValueError("whoever answered is not the master with whom keys were exchanged")
    return key


def main(endpoint: str, name: str) -> None:
    with Client(endpoint, retries=sys.maxsize) as master:
        key = authorise(master, name)
    print(f"authorised: session key {hashlib.sha256(key).hexdigest()[:16]}", flush=True)  # its digest: keys are not for the log


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else socket.gethostname())
