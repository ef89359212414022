"""docs/security.md: what it shows is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import zmq.auth
from helpers import ROOT

import greensafe
from greensafe import Client, Refused

pytestmark = pytest.mark.usefixtures("limit")

TEXT = (ROOT / "docs/security.md").read_text()


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's server answers a client whose key is in the folder, and nobody else."""
    for folder, name in (("certificates", "server"), ("certificates/clients", "me"), ("certificates", "stranger")):
        (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        zmq.auth.create_certificates(tmp_path / folder, name)
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert example is not None
    names: dict[str, Any] = {"handler": lambda request: b"the answer"}
    exec(example[1].replace("tcp://*:5555", "tcp://127.0.0.1:0"), names)
    with names["context"], names["server"] as server:
        for name, is_admitted in (("clients/me", True), ("stranger", False), (None, False)):
            with greensafe.Context() as context:
                if name is not None:
                    keys = zmq.auth.load_certificate(tmp_path / f"certificates/{name}.key_secret")
                    context.curve_publickey, context.curve_secretkey = keys
                    context.curve_serverkey = zmq.auth.load_certificate("certificates/server.key")[0]
                with Client(server.endpoint, context=context) as client:
                    if is_admitted:
                        assert client.request(b"x") == b"the answer"
                    else:
                        with pytest.raises(Refused):
                            client.request(b"x")
        server.stop()
        names["authenticator"].stop()
