"""The operator's tool.

    python accept.py ENDPOINT FOLDER                who has asked, and who was accepted
    python accept.py ENDPOINT FOLDER FINGERPRINT    accept this agent

FOLDER is the master's: the operator's token is in there.
"""

from __future__ import annotations

import getpass
import json
import sys
from pathlib import Path
from typing import Any

from keys import signature

from greensafe import Client, RemoteError


def ask(master: Client, token: bytes, what: dict[str, Any]) -> Any:
    body = json.dumps(what).encode()
    (answer,) = master.request_multipart([body, signature(token, body)], idempotent=True)
    return json.loads(answer)


def main(endpoint: str, folder: Path, accepted: str | None = None) -> None:
    token = (folder / "operator.token").read_bytes()
    with Client(endpoint, retries=sys.maxsize) as master:
        if accepted is None:
            for agent in ask(master, token, {"do": "list"}):
                print("  ".join(agent), flush=True)
        else:
            answer = ask(master, token, {"do": "accept", "fingerprint": accepted, "by": getpass.getuser()})
            print(f"{answer['name']} is accepted", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    except RemoteError as error:
        sys.exit(str(error))
